//! How a table of the file becomes a struct. One declaration gives the struct, its defaults, its documentation and its
//! reader; the reader gathers every error instead of stopping at the first, each with its key, why, and what to write.

use super::places::Places;
use serde_json::{Value, json};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Why a value cannot be used, and what to write instead.
pub(crate) struct InvalidValue {
    pub what: String,
    pub instead: String,
    /// Which element of a list.
    pub element: Option<usize>,
}

pub(crate) fn invalid(what: impl Into<String>, instead: impl Into<String>) -> InvalidValue {
    InvalidValue { what: what.into(), instead: instead.into(), element: None }
}

/// A type that a value of the file can be read as.
pub(crate) trait Setting: Sized {
    /// The value, or everything that is wrong with it.
    fn read(value: &DeValue<'_>) -> Result<Self, Vec<InvalidValue>>;

    /// What it looks like, for editors: JSON Schema. Refuses nothing that `read` takes; `check` is the judge of the rest.
    fn schema() -> Value;
}

/// A table of the file, as far as it has been read.
pub(crate) struct Section<'t, 'p> {
    pub(crate) name: String,
    pub table: Option<&'t DeTable<'t>>,
    /// Keys that are sections themselves.
    pub nested: &'static [&'static str],
    pub places: &'t mut Places<'p>,
    /// Keys that have no default and are not there.
    pub(super) missing: Vec<&'static str>,
}

impl Section<'_, '_> {
    /// Reads a key, or its default when the key is absent or wrong.
    pub(crate) fn field<T: Setting>(&mut self, key: &'static str, default: &str) -> T {
        let found = self.table.and_then(|table| table.iter().find(|(name, _)| name.get_ref() == key));
        if let Some((_, value)) = found {
            match T::read(value.get_ref()) {
                Ok(value) => return value,
                Err(all) => {
                    let path = self.path(key);
                    for InvalidValue { what, instead, element } in all {
                        self.places.unreadable(&path, element, what, instead);
                    }
                }
            }
        } else if default.starts_with(REQUIRED) {
            self.missing.push(key);
        }
        read_default(default)
    }

    /// Reports the keys that nobody asked for, and those that are missing.
    pub(crate) fn finish(&mut self, known: &[SectionKey]) {
        for (name, _) in self.table.into_iter().flat_map(|table| table.iter()) {
            let key = name.get_ref().as_ref();
            if known.iter().any(|field| field.key == key) || self.nested.contains(&key) {
                continue;
            }
            let path = self.path(key);
            let near = nearest(key, known.iter().map(|field| field.key));
            self.places.unknown(&path, "is not a known key", suggestion(near, known.iter().map(|field| field.key)));
            if let Some(near) = near.map(|near| self.path(near)).filter(|near| !self.places.has(near)) {
                // This is the key that was meant: that it is missing, or what its default leads to, is the same fault.
                self.missing.retain(|missing| !near.ends_with(&format!(".{missing}")));
                self.places.spoil(near);
            }
        }
        for key in std::mem::take(&mut self.missing) {
            let path = self.path(key);
            self.places.unreadable(&path, None, "is missing".into(), "it has no default".into());
        }
    }

    fn path(&self, key: &str) -> String {
        format!("{}.{key}", self.name)
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
pub(crate) struct SectionKey {
    pub key: &'static str,
    pub doc: &'static [&'static str],
    /// The type of its value.
    pub kind: &'static str,
    pub default: &'static str,
    pub schema: fn() -> Value,
}

/// The known name that was most likely meant.
pub(crate) fn nearest<'a>(key: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let far = |name: &str| strsim::osa_distance(key, name);
    known.map(|name| (far(name), name)).min().filter(|(far, _)| *far <= 2).map(|(_, name)| name)
}

/// `did you mean …`, or the list of what there is.
pub(crate) fn suggestion<'a>(near: Option<&str>, known: impl Iterator<Item = &'a str>) -> String {
    match near {
        Some(name) => format!("did you mean `{name}`?"),
        None => format!("use one of: {}", known.collect::<Vec<_>>().join(", ")),
    }
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
            /// What the section is called in problems.
            pub(crate) at: String,
        }

        impl $name {
            pub(crate) const DOC: &'static [&'static str] = &[$($doc),*];
            pub(crate) const FIELDS: &'static [$crate::config::section::SectionKey] = &[
                $($crate::config::section::SectionKey {
                    key: stringify!($field),
                    doc: &[$($field_doc),*],
                    kind: stringify!($type),
                    default: $default,
                    schema: <$type as $crate::config::section::Setting>::schema,
                },)*
            ];

            pub(crate) fn read(section: &mut $crate::config::section::Section<'_, '_>) -> Self {
                let read = Self { at: section.name.clone(), $($field: section.field(stringify!($field), $default),)* };
                section.finish(Self::FIELDS);
                read
            }
        }
    };
}
pub(crate) use section;

// What values may be.

impl Setting for bool {
    fn read(value: &DeValue<'_>) -> Result<Self, Vec<InvalidValue>> {
        value.as_bool().ok_or_else(|| vec![invalid("must be true or false", "write it without quotes")])
    }

    fn schema() -> Value {
        json!({ "type": "boolean" })
    }
}

impl Setting for String {
    fn read(value: &DeValue<'_>) -> Result<Self, Vec<InvalidValue>> {
        text(value).map(str::to_owned).map_err(|invalid| vec![invalid])
    }

    fn schema() -> Value {
        json!({ "type": "string" })
    }
}

pub(crate) fn text<'v>(value: &'v DeValue<'_>) -> Result<&'v str, InvalidValue> {
    value.as_str().ok_or_else(|| invalid("must be a string", "put it in quotes"))
}

impl Setting for u64 {
    fn read(value: &DeValue<'_>) -> Result<Self, Vec<InvalidValue>> {
        let number = value.as_integer().and_then(|n| Self::from_str_radix(n.as_str(), n.radix()).ok());
        number.ok_or_else(|| vec![invalid("must be a whole number, 0 or more", "write it without quotes")])
    }

    fn schema() -> Value {
        json!({ "type": "integer", "minimum": 0 })
    }
}

impl<T: Setting> Setting for Vec<T> {
    fn read(value: &DeValue<'_>) -> Result<Self, Vec<InvalidValue>> {
        let Some(array) = value.as_array() else {
            return Err(vec![invalid("must be a list", "put it in square brackets, like [\"…\"]")]);
        };
        let (mut read, mut all) = (Self::new(), Vec::new());
        for (index, item) in array.iter().enumerate() {
            match T::read(Spanned::get_ref(item)) {
                Ok(item) => read.push(item),
                Err(found) => {
                    all.extend(found.into_iter().map(|invalid| InvalidValue { element: Some(index), ..invalid }))
                }
            }
        }
        if all.is_empty() { Ok(read) } else { Err(all) }
    }

    fn schema() -> Value {
        json!({ "type": "array", "items": T::schema() })
    }
}

/// `"none"` for no bound.
impl<T: Setting> Setting for Option<T> {
    fn read(value: &DeValue<'_>) -> Result<Self, Vec<InvalidValue>> {
        if value.as_str() == Some("none") {
            return Ok(None);
        }
        let or_none =
            |invalid: InvalidValue| InvalidValue { what: format!("{}, or \"none\"", invalid.what), ..invalid };
        T::read(value).map(Some).map_err(|all| all.into_iter().map(or_none).collect())
    }

    fn schema() -> Value {
        json!({ "anyOf": [{ "const": "none" }, T::schema()] })
    }
}

impl Setting for std::time::Duration {
    fn read(value: &DeValue<'_>) -> Result<Self, Vec<InvalidValue>> {
        let duration = value.as_str().and_then(|text| humantime::parse_duration(text).ok());
        duration
            .ok_or_else(|| vec![invalid("must be a time with its unit", "write it like \"60s\", \"10m\" or \"250ms\"")])
    }

    fn schema() -> Value {
        json!({ "type": "string" })
    }
}

/// A share between 0 and 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fraction {
    pub per_thousand: u32,
}

impl Setting for Fraction {
    fn read(value: &DeValue<'_>) -> Result<Self, Vec<InvalidValue>> {
        let text = value.as_float().map(|number| number.as_str()).or(value.as_integer().map(|number| number.as_str()));
        let share = text.and_then(|text| text.parse::<f64>().ok()).filter(|share| (0.0..=1.0).contains(share));
        let read = share.map(|share| Self { per_thousand: (share * 1000.0).round() as u32 });
        read.ok_or_else(|| vec![invalid("must be a number from 0 to 1", "write it like 0.2")])
    }

    fn schema() -> Value {
        json!({ "type": "number", "minimum": 0, "maximum": 1 })
    }
}

/// The same for what may be very little.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ratio {
    pub per_million: u32,
}

impl Setting for Ratio {
    fn read(value: &DeValue<'_>) -> Result<Self, Vec<InvalidValue>> {
        let text = value.as_float().map(|number| number.as_str()).or(value.as_integer().map(|number| number.as_str()));
        let share = text.and_then(|text| text.parse::<f64>().ok()).filter(|share| (0.0..=1.0).contains(share));
        let read = share.map(|share| Self { per_million: (share * 1e6).round() as u32 });
        read.ok_or_else(|| vec![invalid("must be a number from 0 to 1", "write it like 0.01")])
    }

    fn schema() -> Value {
        json!({ "type": "number", "minimum": 0, "maximum": 1 })
    }
}

/// A size in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bytes(pub u64);

impl Setting for Bytes {
    fn read(value: &DeValue<'_>) -> Result<Self, Vec<InvalidValue>> {
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
            .ok_or_else(|| vec![invalid("must be a size with its unit", "write it like \"32KiB\" or \"10MiB\"")])
    }

    fn schema() -> Value {
        json!({ "type": "string" })
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
            fn read(value: &toml::de::DeValue<'_>) -> Result<Self, Vec<$crate::config::section::InvalidValue>> {
                match value.as_str() {
                    $(Some($word) => Ok(Self::$variant),)*
                    _ => {
                        let words = [$(concat!("\"", $word, "\"")),*].join(", ");
                        Err(vec![$crate::config::section::invalid("is not allowed here", format!("use one of: {words}"))])
                    }
                }
            }

            fn schema() -> serde_json::Value {
                // A name of the environment may stand for the word.
                serde_json::json!({ "anyOf": [{ "enum": [$($word),*] }, { "type": "string", "pattern": "\\$\\{" }] })
            }
        }
    };
}
pub(crate) use words;
