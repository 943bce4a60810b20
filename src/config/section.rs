//! How a table of the file becomes a struct. One declaration gives the struct, its defaults, its documentation and its
//! reader; the reader gathers every error instead of stopping at the first, each with its key, why, and what to write.

use std::fmt;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// One thing wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where in the file; 0 when it is about something that is not there.
    pub line: usize,
    pub key: String,
    pub why: String,
    pub instead: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line > 0 {
            write!(f, "line {}: ", self.line)?;
        }
        write!(f, "{}: {}", self.key, self.why)?;
        if self.instead.is_empty() { Ok(()) } else { write!(f, " ({})", self.instead) }
    }
}

/// Why a value can't be used, and what could stand there.
pub(crate) struct Wrong {
    pub why: String,
    pub instead: &'static str,
}

pub(crate) fn wrong(why: impl Into<String>, instead: &'static str) -> Wrong {
    Wrong { why: why.into(), instead }
}

/// A type that a value of the file can be read as.
pub(crate) trait Setting: Sized {
    fn read(value: &DeValue<'_>) -> Result<Self, Wrong>;
}

/// A table of the file, as far as it has been read.
pub(crate) struct Section<'t> {
    pub(crate) name: String,
    pub table: Option<&'t DeTable<'t>>,
    /// Where the table begins; 0 when the file does not have it.
    pub line: usize,
    /// Keys that are sections themselves.
    pub nested: &'static [&'static str],
    /// Where each line of the file begins.
    pub lines: &'t [usize],
    pub problems: &'t mut Vec<Problem>,
}

impl Section<'_> {
    pub(crate) fn line_of(&self, offset: usize) -> usize {
        self.lines.partition_point(|start| *start <= offset)
    }

    /// Reads a key, or its default when the key is absent or wrong.
    pub(crate) fn field<T: Setting>(&mut self, key: &str, default: &str) -> T {
        let found = self.table.and_then(|table| table.iter().find(|(name, _)| name.get_ref() == key));
        if let Some((name, value)) = found {
            match T::read(value.get_ref()) {
                Ok(value) => return value,
                Err(Wrong { why, instead }) => {
                    let line = self.line_of(name.span().start);
                    self.problem(line, key, why, instead);
                }
            }
        } else if default.starts_with(REQUIRED) {
            self.problem(self.line, key, "is missing", "it has no default");
        }
        read_default(default)
    }

    /// Reports the keys that nobody asked for.
    pub(crate) fn finish(&mut self, known: &[Field]) {
        let Some(table) = self.table else { return };
        for (name, _) in table.iter() {
            let key = name.get_ref().as_ref();
            if !known.iter().any(|field| field.key == key) && !self.nested.contains(&key) {
                let instead = closest(key, known.iter().map(|field| field.key));
                let line = self.line_of(name.span().start);
                self.problem(line, key, "is not a key that tollgate knows", &instead);
            }
        }
    }

    pub(crate) fn problem(&mut self, line: usize, key: &str, why: impl Into<String>, instead: &str) {
        let key = if self.name.is_empty() { key.to_owned() } else { format!("{}.{key}", self.name) };
        self.problems.push(Problem { line, key, why: why.into(), instead: instead.into() });
    }
}

/// Before a default: the key has none, and what follows only stands in until the missing key is reported.
pub(crate) const REQUIRED: char = '!';

/// Reads a default, which is written as it would be in the file.
fn read_default<T: Setting>(default: &str) -> T {
    let text = format!("x = {}", default.trim_start_matches(REQUIRED));
    let read = DeTable::parse(&text).ok().and_then(|table| {
        let (_, value) = table.get_ref().iter().next()?;
        T::read(value.get_ref()).ok()
    });
    match read {
        Some(value) => value,
        // `tests::every_default_reads` goes through all of them.
        None => unreachable!("the default {default} does not read as what it stands for"),
    }
}

/// One key of a section, for the reader and for the reference.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Field {
    pub key: &'static str,
    pub doc: &'static [&'static str],
    pub default: &'static str,
}

/// `did you mean …`, or the list of what there is.
pub(crate) fn closest<'a>(key: &str, known: impl Iterator<Item = &'a str> + Clone) -> String {
    let near = known.clone().map(|name| (distance(key, name), name)).min().filter(|(distance, _)| *distance <= 2);
    match near {
        Some((_, name)) => format!("did you mean `{name}`?"),
        None => format!("there are: {}", known.collect::<Vec<_>>().join(", ")),
    }
}

/// How many letters differ.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let cost = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = cost.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// Declares a section of the file.
macro_rules! section {
    (
        $(#[doc = $doc:literal])*
        $name:ident {
            $($(#[doc = $field_doc:literal])* $field:ident: $type:ty = $default:expr,)*
        }
    ) => {
        $(#[doc = $doc])*
        #[derive(Clone, Debug)]
        #[allow(dead_code, reason = "one shape for all sections")]
        pub(crate) struct $name {
            $($(#[doc = $field_doc])* pub(crate) $field: $type,)*
            /// Where the section begins in the file; 0 when it is not there.
            pub(crate) line: usize,
        }

        impl $name {
            pub(crate) const DOC: &'static [&'static str] = &[$($doc),*];
            pub(crate) const FIELDS: &'static [$crate::config::section::Field] = &[
                $($crate::config::section::Field {
                    key: stringify!($field),
                    doc: &[$($field_doc),*],
                    default: $default,
                },)*
            ];

            pub(crate) fn read(section: &mut $crate::config::section::Section<'_>) -> Self {
                let read = Self { line: section.line, $($field: section.field(stringify!($field), $default),)* };
                section.finish(Self::FIELDS);
                read
            }
        }
    };
}
pub(crate) use section;

// What values may be.

impl Setting for bool {
    fn read(value: &DeValue<'_>) -> Result<Self, Wrong> {
        value.as_bool().ok_or_else(|| wrong("must be true or false", ""))
    }
}

impl Setting for String {
    fn read(value: &DeValue<'_>) -> Result<Self, Wrong> {
        value.as_str().map(str::to_owned).ok_or_else(|| wrong("must be a text in quotes", ""))
    }
}

impl Setting for u64 {
    fn read(value: &DeValue<'_>) -> Result<Self, Wrong> {
        let number = value.as_integer().and_then(|n| Self::from_str_radix(n.as_str(), n.radix()).ok());
        number.ok_or_else(|| wrong("must be a whole number of 0 or more", ""))
    }
}

impl<T: Setting> Setting for Vec<T> {
    fn read(value: &DeValue<'_>) -> Result<Self, Wrong> {
        let array =
            value.as_array().ok_or_else(|| wrong("must be a list", "put it in square brackets, like [\"…\"]"))?;
        array.iter().map(|item: &Spanned<DeValue<'_>>| T::read(item.get_ref())).collect()
    }
}

/// `"none"` for no bound.
impl<T: Setting> Setting for Option<T> {
    fn read(value: &DeValue<'_>) -> Result<Self, Wrong> {
        if value.as_str() == Some("none") {
            return Ok(None);
        }
        T::read(value).map(Some).map_err(|wrong| Wrong { why: format!("{}, or \"none\"", wrong.why), ..wrong })
    }
}

impl Setting for std::time::Duration {
    fn read(value: &DeValue<'_>) -> Result<Self, Wrong> {
        let duration = value.as_str().and_then(|text| humantime::parse_duration(text).ok());
        duration.ok_or_else(|| wrong("must be a time with its unit", "like \"60s\", \"10m\" or \"250ms\""))
    }
}

/// A size in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bytes(pub u64);

impl Setting for Bytes {
    fn read(value: &DeValue<'_>) -> Result<Self, Wrong> {
        let parse = |text: &str| {
            let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
            let unit: u64 = match text[digits..].trim_start() {
                "B" => 1,
                "KiB" => 1 << 10,
                "MiB" => 1 << 20,
                "GiB" => 1 << 30,
                _ => return None,
            };
            text[..digits].parse::<u64>().ok()?.checked_mul(unit).map(Bytes)
        };
        value
            .as_str()
            .and_then(parse)
            .ok_or_else(|| wrong("must be a size with its unit", "like \"32KiB\" or \"10MiB\""))
    }
}

/// Declares an enum whose variants are words of the file.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $word:literal),* $(,)? }) => {
        $(#[$doc])*
        #[allow(unreachable_pub, reason = "one shape for all words")]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($variant),* }

        impl $crate::config::section::Setting for $name {
            fn read(value: &toml::de::DeValue<'_>) -> Result<Self, $crate::config::section::Wrong> {
                match value.as_str() {
                    $(Some($word) => Ok(Self::$variant),)*
                    _ => Err($crate::config::section::wrong("is none of the words that can stand here", concat!("write one of:" $(, " \"", $word, "\"")*))),
                }
            }
        }
    };
}
pub(crate) use words;
