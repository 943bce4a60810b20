//! The files of a configuration: the one that is named, and those that its `include` names. They are read as one, and each
//! key keeps its place. It must not know what a key means.

use super::expand::{Expansions, NotExpanded, ValueSource};
use super::places::{Places, join};
use super::{text_file, trust};
use crate::problem::Severity;
use crate::sandbox::Extent;
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

/// A pattern that matches more files than this is a mistake, like `/**`.
const MOST_FILES: usize = 1_000;

/// The texts of all files, one behind the other: an offset in the whole is a place in one of them.
pub(super) struct Sources {
    pub(super) text: String,
    pub(super) files: Vec<SourceFile>,
    /// What is wrong with the patterns.
    problems: Vec<IncludeProblem>,
    /// Of the patterns.
    pub(super) expansions: Expansions,
    /// The patterns themselves.
    patterns: Vec<PathBuf>,
}

pub(super) struct SourceFile {
    pub(super) path: PathBuf,
    pub(super) range: Range<usize>,
}

struct IncludeProblem {
    /// Which pattern.
    element: usize,
    severity: Severity,
    what: String,
    instead: String,
}

impl Sources {
    /// With the files that the text includes, read now.
    pub(super) fn read(text: &str, path: &Path) -> Self {
        let Included { files, problems, patterns, expansions } = included(text, path);
        let mut sources = Self { text: String::new(), files: Vec::new(), problems, expansions, patterns };
        sources.add(path.into(), text);
        for (element, file) in files {
            let mut wrong = |what: String, instead: &str| {
                let (severity, instead) = (Severity::Error, instead.to_owned());
                sources.problems.push(IncludeProblem { element, severity, what, instead });
            };
            if let Some(why) = trust::distrusted(&file) {
                let what = format!("{} is not read by a process of root: {why}", file.display());
                wrong(what, "let only root write to the file and its folder, or run as another user");
                continue;
            }
            match text_file::read_regular(&file, text_file::CONFIGURATION) {
                Ok(text) => sources.add(file, &text),
                Err(why) => wrong(format!("{} {why}", file.display()), ""),
            }
        }
        sources
    }

    fn add(&mut self, path: PathBuf, text: &str) {
        let start = self.text.len();
        self.text += text;
        self.files.push(SourceFile { path, range: start..self.text.len() });
        // The next file begins on a line of its own.
        self.text.push('\n');
    }

    /// The file that was named, those that it includes, and the folders in which others are looked for.
    pub(super) fn needs(&self) -> impl Iterator<Item = (&'static str, Extent, PathBuf)> {
        let files = self.files.iter().enumerate();
        let files =
            files.map(|(index, file)| (if index == 0 { "" } else { INCLUDE }, Extent::Folder, file.path.clone()));
        let patterns = self.patterns.iter().map(|pattern| {
            let plain: PathBuf = pattern.iter().take_while(|part| !has_wildcard(&part.to_string_lossy())).collect();
            let extent = if plain == *pattern { Extent::Folder } else { Extent::Itself };
            (INCLUDE, extent, plain)
        });
        files.chain(patterns)
    }

    /// The text of each file.
    pub(super) fn texts(&self) -> impl Iterator<Item = &str> {
        self.files.iter().map(|file| &self.text[file.range.clone()])
    }

    /// Every file as one table, with names expanded. What is wrong is reported; `None`: a file is not TOML.
    pub(super) fn table<'s>(&'s self, places: &mut Places<'s>) -> Option<DeTable<'s>> {
        let mut tables = Vec::new();
        for SourceFile { range, .. } in &self.files {
            let text = &self.text[range.clone()];
            let (root, errors) = DeTable::parse_recoverable(text);
            let root = moved(root.into_inner(), range.start);
            if !errors.is_empty() {
                places.note(&root);
            }
            // What could be read of it says little about what was meant.
            for error in errors {
                let at = error.span().map(|span| span.start + range.start);
                let name = error.span().and_then(|span| text.get(span)).unwrap_or_default();
                match at.filter(|_| error.message() == "duplicate key") {
                    Some(offset) => {
                        let what = format!("`{name}` is in the file twice");
                        places.syntax(at, what, places.first(name.trim_matches(['"', '\'']), offset));
                    }
                    None => places.syntax(at, format!("is not TOML: {}", error.message()), None),
                }
            }
            tables.push(root);
        }
        if places.any_error() {
            return None;
        }
        let mut tables = tables.into_iter();
        let mut root = tables.next()?;
        let mut twice = Vec::new();
        for mut table in tables {
            if let Some((key, _)) = table.remove_entry(INCLUDE) {
                let what = "`include` is in an included file; write it in the first file only";
                places.syntax(Some(key.span().start), what.into(), None);
            }
            merge(&mut root, table, "", &mut twice);
        }
        places.note(&root);
        for Twice { key, place, first } in twice {
            places.twice(&key, place, first);
        }
        for IncludeProblem { element, severity, what, instead } in &self.problems {
            places.include(*element, *severity, what.clone(), instead.clone());
        }
        let folder = self.files.first().and_then(|file| file.path.parent()).unwrap_or(Path::new(""));
        let source = ValueSource { folder, variable: &|name| std::env::var_os(name) };
        let (mut noted, mut failed) = (Expansions::default(), Vec::new());
        expand_table(&mut root, "", &source, &mut noted, &mut failed);
        noted.sort();
        places.expansions = noted;
        for (key, NotExpanded { what, instead }) in failed {
            places.not_expanded(&key, what, instead);
        }
        Some(root)
    }
}

pub(super) const INCLUDE: &str = "include";

/// Every file of a configuration as it is now, for who watches them. What cannot be read is left out.
pub fn files(path: &Path) -> Vec<PathBuf> {
    let mut files = vec![path.to_owned()];
    if let Ok(text) = text_file::read(path, text_file::CONFIGURATION)
        && text.contains(INCLUDE)
    {
        files.extend(included(&text, path).files.into_iter().map(|(_, file)| file));
    }
    files
}

#[derive(Default)]
struct Included {
    /// Each with the number of its pattern, in their order.
    files: Vec<(usize, PathBuf)>,
    problems: Vec<IncludeProblem>,
    patterns: Vec<PathBuf>,
    /// Of the patterns.
    expansions: Expansions,
}

/// The files that a text includes.
fn included(text: &str, path: &Path) -> Included {
    let Included { mut files, mut problems, patterns: mut patterns_seen, mut expansions } = Included::default();
    let (root, errors) = DeTable::parse_recoverable(text);
    // What can be read of an array without its end are values of other keys: files that nobody has named are not to be read.
    if !errors.is_empty() {
        return Included::default();
    }
    let patterns = root.get_ref().get(INCLUDE).and_then(|value| value.get_ref().as_array());
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut known: BTreeSet<PathBuf> = std::fs::canonicalize(path).into_iter().collect();
    for (element, value) in patterns.into_iter().flat_map(|array| array.iter()).enumerate() {
        // One that is not a string, or cannot be expanded, is reported with the other values.
        let Some(pattern) = value.get_ref().as_str() else { continue };
        let source = ValueSource { folder, variable: &|name| std::env::var_os(name) };
        let Ok(expanded) = source.expand(INCLUDE, pattern, &mut expansions) else { continue };
        let pattern = expanded.as_ref().map_or(pattern, |text| text.as_str());
        patterns_seen.push(folder.join(pattern));
        let mut wrong = |severity, what: String, instead: &str| {
            problems.push(IncludeProblem { element, severity, what, instead: instead.into() });
        };
        let found = match matching(folder, pattern) {
            Ok(found) => found,
            Err(why) => {
                wrong(Severity::Error, why, "write it like \"conf.d/*.toml\"");
                continue;
            }
        };
        match found.is_empty() {
            true if has_wildcard(pattern) => {
                wrong(Severity::Warning, "matches no file".into(), "put a file there, or remove the pattern");
            }
            true => {
                wrong(Severity::Error, "is a file that does not exist".into(), "make it, or remove it from the list")
            }
            false => {}
        }
        for file in found {
            // A file that two patterns match is read once; the first file of all does not include itself.
            if std::fs::canonicalize(&file).is_ok_and(|target| !known.insert(target)) {
                continue;
            }
            if files.len() == MOST_FILES {
                wrong(Severity::Error, format!("matches more than {MOST_FILES} files"), "write a narrower pattern");
                return Included { files, problems, patterns: patterns_seen, expansions };
            }
            files.push((element, file));
        }
    }
    Included { files, problems, patterns: patterns_seen, expansions }
}

fn has_wildcard(pattern: &str) -> bool {
    pattern.contains(['*', '?', '['])
}

/// The files that a pattern names, sorted.
fn matching(folder: &Path, pattern: &str) -> Result<Vec<PathBuf>, String> {
    if !has_wildcard(pattern) {
        let file = folder.join(pattern);
        return Ok(if std::fs::symlink_metadata(&file).is_ok() { vec![file] } else { Vec::new() });
    }
    // The folder's own name is no pattern.
    let whole = match Path::new(pattern).is_absolute() || folder.as_os_str().is_empty() {
        true => pattern.to_owned(),
        false => format!("{}/{pattern}", glob::Pattern::escape(&folder.to_string_lossy())),
    };
    // What an editor leaves beside a file begins with a dot.
    let options = glob::MatchOptions { require_literal_leading_dot: true, ..glob::MatchOptions::new() };
    let found = glob::glob_with(&whole, options).map_err(|error| format!("is not a pattern: {}", error.msg))?;
    let found = found.take(MOST_FILES + 2).collect::<Result<Vec<_>, _>>();
    let mut found = found.map_err(|error| format!("{} cannot be read: {}", error.path().display(), error.error()))?;
    found.sort();
    Ok(found)
}

/// The same table, at other offsets.
fn moved<'t>(table: DeTable<'t>, by: usize) -> DeTable<'t> {
    if by == 0 {
        return table;
    }
    let span = |span: Range<usize>| span.start + by..span.end + by;
    let entries = table.into_iter().map(|(key, value)| {
        let (of_key, of_value) = (span(key.span()), span(value.span()));
        let value = Spanned::new(of_value, moved_value(value.into_inner(), by));
        (Spanned::new(of_key, key.into_inner()), value)
    });
    entries.collect()
}

fn moved_value(value: DeValue<'_>, by: usize) -> DeValue<'_> {
    match value {
        DeValue::Table(table) => DeValue::Table(moved(table, by)),
        DeValue::Array(array) => {
            let mut all = DeArray::new();
            for item in array {
                let span = item.span();
                all.push(Spanned::new(span.start + by..span.end + by, moved_value(item.into_inner(), by)));
            }
            DeValue::Array(all)
        }
        plain => plain,
    }
}

/// A key that two files set.
struct Twice {
    key: String,
    place: usize,
    first: usize,
}

/// Tables become one, lists of tables are appended, and anything else may be set in one file only.
fn merge<'t>(into: &mut DeTable<'t>, table: DeTable<'t>, above: &str, twice: &mut Vec<Twice>) {
    for (key, value) in table {
        let path = join(above, key.get_ref());
        let first = into.get_key_value(key.get_ref().as_ref()).map(|(first, _)| first.span().start);
        let (place, value_span) = (key.span().start, value.span());
        match (into.get_mut(key.get_ref().as_ref()).map(Spanned::get_mut), value.into_inner()) {
            (None, value) => {
                into.insert(key, Spanned::new(value_span, value));
            }
            (Some(DeValue::Table(known)), DeValue::Table(more)) => merge(known, more, &path, twice),
            (Some(DeValue::Array(known)), DeValue::Array(more)) if are_tables(known) && are_tables(&more) => {
                more.into_iter().for_each(|item| known.push(item));
            }
            _ => twice.push(Twice { key: path, place, first: first.unwrap_or_default() }),
        }
    }
}

fn are_tables(array: &DeArray<'_>) -> bool {
    array.iter().all(|item| matches!(item.get_ref(), DeValue::Table(_)))
}

fn expand_table(
    table: &mut DeTable<'_>,
    above: &str,
    source: &ValueSource<'_>,
    noted: &mut Expansions,
    failed: &mut Vec<(String, NotExpanded)>,
) {
    for (key, value) in table.iter_mut() {
        expand_value(value.get_mut(), join(above, key.get_ref()), source, noted, failed);
    }
}

fn expand_value(
    value: &mut DeValue<'_>,
    path: String,
    source: &ValueSource<'_>,
    noted: &mut Expansions,
    failed: &mut Vec<(String, NotExpanded)>,
) {
    match value {
        DeValue::String(text) => match source.expand(&path, text, noted) {
            Ok(None) => {}
            Ok(Some(expanded)) => *text = expanded.to_string().into(),
            Err(why) => failed.push((path, why)),
        },
        DeValue::Array(array) => {
            for (index, item) in array.iter_mut().enumerate() {
                expand_value(item.get_mut(), format!("{path}[{index}]"), source, noted, failed);
            }
        }
        DeValue::Table(table) => expand_table(table, &path, source, noted, failed),
        _ => {}
    }
}
