//! Where each key stands in the files and what is written there, so that a problem that is found later, or elsewhere, can be
//! shown at its place.

use super::diagnostic::{Diagnostic, FilePosition, Position};
use super::expand::Expansions;
use super::sources::{INCLUDE, Sources};
use crate::explain::RulePlaces;
use crate::problem::{Problem, Severity};
use crate::request::seeded::{self, Rule};
use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Longer values are cut where they are shown.
const SHOWN: usize = 60;
/// Keys of a `[[store]]` whose value cannot hold a secret, not even by mistake. All others are never shown.
const PLAIN: [&str; 23] = [
    "kind",
    "name",
    "path",
    "tls",
    "preset",
    "schema",
    "digest",
    "scopes",
    "notify",
    "channel",
    "connections",
    "timeout",
    "topology",
    "master",
    "database",
    "changes",
    "mode",
    "insecure_http",
    "unknown_statuses",
    "scopes_at",
    "breaker_failures",
    "breaker_pause",
    "user",
];

/// What to do about a file that the process was not allowed at its start.
const RESTART: &str = "restart tollgate, or name one that it may use";

/// All that was found wrong so far, and where everything stands.
pub(crate) struct Places<'t> {
    sources: &'t Sources,
    /// Where each line begins, of all files.
    lines: Vec<usize>,
    spans: HashMap<String, KeySpan>,
    found: Vec<Diagnostic>,
    /// What was found wrong: what follows from it would only be an echo.
    broken: BTreeSet<String>,
    /// Values that could not be expanded: what is read in their place says nothing.
    unexpanded: Vec<String>,
    pub(super) expansions: Expansions,
    /// Files with secrets, with the keys that name them.
    pub(super) secrets: Vec<(String, PathBuf)>,
    /// What is found from now on is not about the file, but about what it names.
    pub(super) surroundings: bool,
}

/// Where a key and its value are in the text.
struct KeySpan {
    key: Range<usize>,
    value: Range<usize>,
    /// A table's text is all that is in it.
    table: bool,
}

impl<'t> Places<'t> {
    pub(super) fn new(sources: &'t Sources) -> Self {
        let lines = std::iter::once(0).chain(sources.text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        Self {
            sources,
            lines,
            spans: HashMap::new(),
            found: Vec::new(),
            broken: BTreeSet::new(),
            unexpanded: Vec::new(),
            expansions: sources.expansions.clone(),
            secrets: Vec::new(),
            surroundings: false,
        }
    }

    pub(super) fn note(&mut self, root: &DeTable<'_>) {
        self.note_table(root, "");
    }

    fn note_table(&mut self, table: &DeTable<'_>, above: &str) {
        for (key, value) in table.iter() {
            self.note_value(join(above, key.get_ref()), key.span(), value);
        }
    }

    fn note_value(&mut self, path: String, key: Range<usize>, value: &Spanned<DeValue<'_>>) {
        match value.get_ref() {
            DeValue::Table(table) => self.note_table(table, &path),
            DeValue::Array(array) => {
                for (index, item) in array.iter().enumerate() {
                    self.note_value(format!("{path}[{index}]"), item.span(), item);
                }
            }
            _ => {}
        }
        let table = matches!(value.get_ref(), DeValue::Table(_));
        self.spans.insert(path, KeySpan { key, value: value.span(), table });
    }

    /// A name can stand in a pattern of `include`.
    fn shown_path(&self, path: &Path) -> PathBuf {
        match path.to_str() {
            Some(text) => self.expansions.hide(text).into(),
            None => path.into(),
        }
    }

    fn place(&self, offset: usize) -> FilePosition {
        let number = |offset: usize| self.lines.partition_point(|start| *start <= offset).max(1);
        let line = number(offset);
        let before = self.sources.text.get(self.lines[line - 1]..offset).unwrap_or_default();
        let index = self.sources.files.partition_point(|file| file.range.start <= offset).max(1) - 1;
        let file = &self.sources.files[index];
        let position = Position { line: line - number(file.range.start) + 1, column: before.chars().count() + 1 };
        FilePosition { index, file: self.shown_path(&file.path), position }
    }

    /// Where a key's value is; of one that is not there, where its section begins.
    fn place_of(&self, path: &str) -> Option<FilePosition> {
        if let Some(span) = self.spans.get(path) {
            return Some(self.place(if span.table { span.key.start } else { span.value.start }));
        }
        let above = path.rfind(['.', '['])?;
        let above = &path[..above];
        self.spans.get(above).map(|span| self.place(span.key.start)).or_else(|| self.place_of(above))
    }

    /// Where each key is, for those who tell by which one a request was judged.
    pub(super) fn known(&self) -> RulePlaces {
        let place = |span: &KeySpan| {
            let FilePosition { file, position, .. } = self.place(span.key.start);
            format!("{}:{}", file.display(), position.line)
        };
        RulePlaces::new(self.spans.iter().map(|(path, span)| (path.clone(), place(span))))
    }

    /// The value as it is written, where it can be shown.
    fn written(&self, path: &str) -> Option<String> {
        let span = self.spans.get(path).filter(|span| !span.table)?;
        let text = self.sources.text.get(span.value.clone())?;
        let last = path.rsplit('.').next().unwrap_or_default().split('[').next().unwrap_or_default();
        let may_be_secret =
            path.starts_with("store") && !PLAIN.contains(&last) || last == "token_sha256" || text.contains('@');
        if may_be_secret && !seeded::off(Rule::ConfigSecret) {
            return None;
        }
        let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
        Some(match line.char_indices().nth(SHOWN) {
            Some((cut, _)) => format!("{}…", &line[..cut]),
            None => line,
        })
    }

    /// Whether a key, or what it is in, was found wrong before.
    pub(super) fn is_broken(&self, path: &str) -> bool {
        let mut path = path;
        loop {
            if self.broken.contains(path) {
                return true;
            }
            let Some(end) = path.rfind(['.', '[']) else { return false };
            path = &path[..end];
        }
    }

    /// Nothing more is said about this key and what is in it.
    pub(super) fn spoil(&mut self, path: impl Into<String>) {
        self.broken.insert(path.into());
    }

    pub(super) fn has(&self, path: &str) -> bool {
        self.spans.contains_key(path)
    }

    /// A value that cannot be read: all of its key is out of use.
    pub(super) fn unreadable(&mut self, path: &str, element: Option<usize>, what: String, instead: String) {
        let exact = element_path(path, element);
        let inside = |other: &String| {
            other.strip_prefix(&exact).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        };
        if !self.unexpanded.iter().any(inside) {
            let (place, found) = (self.place_of(&exact), self.written(&exact));
            self.push(path, place, Severity::Error, what, found, instead, None);
        }
        self.spoil(path);
    }

    /// A value with a name in it that stands for nothing.
    pub(super) fn not_expanded(&mut self, path: &str, what: String, instead: String) {
        let place = self.place_of(path);
        self.push(path, place, Severity::Error, what, None, instead, None);
        self.spoil(path);
        self.unexpanded.push(path.to_owned());
    }

    /// A key that another file has set before.
    pub(super) fn twice(&mut self, path: &str, offset: usize, first: usize) {
        let (place, first) = (self.place(offset), self.place(first));
        let (what, instead) = ("is set in two files".into(), "set it in one of them".into());
        self.push(path, Some(place), Severity::Error, what, None, instead, Some(first));
    }

    /// What is wrong with one of the patterns of `include`.
    pub(super) fn include(&mut self, element: usize, severity: Severity, what: String, instead: String) {
        let exact = element_path(INCLUDE, Some(element));
        let (place, found) = (self.place_of(&exact), self.written(&exact));
        self.push(INCLUDE, place, severity, what, found, instead, None);
    }

    /// A key or a section that is not known. Its value is not shown: who knows what it is.
    pub(super) fn unknown(&mut self, path: &str, what: &str, instead: String) {
        let place = self.spans.get(path).map(|span| self.place(span.key.start));
        self.push(path, place, Severity::Error, what.into(), None, instead, None);
    }

    /// What is wrong with the text itself.
    pub(super) fn syntax(&mut self, offset: Option<usize>, what: String, related: Option<usize>) {
        let place = offset.map(|offset| self.place(offset));
        let related = related.map(|offset| self.place(offset));
        self.push("", place, Severity::Error, what, None, String::new(), related);
    }

    /// Where a key or a table that is defined again at an offset was defined first.
    pub(super) fn first(&self, name: &str, again: usize) -> Option<usize> {
        let begin = self.sources.files.iter().map(|file| file.range.start).rfind(|start| *start <= again)?;
        let same = |path: &str| path.rsplit('.').next() == Some(name);
        let spans = self.spans.iter().filter(|(path, _)| same(path)).map(|(_, span)| span.key.start);
        spans.filter(|start| (begin..again).contains(start)).max().or_else(|| {
            // A table's header: the parser keeps the last one only.
            let line = self.lines[self.lines.partition_point(|start| *start <= again).max(1) - 1];
            let header = self.sources.text[line..].lines().next()?.trim();
            let mut before = self.sources.text[begin..line].match_indices(header).map(|(at, _)| begin + at);
            before.find(|at| self.lines.contains(at)).map(|at| at + (again - line))
        })
    }

    /// What a stage says about the settings of a section; of several sections when `section` is empty.
    pub(super) fn add(&mut self, section: &str, problem: Problem) {
        let related = problem.related.map(|(key, element)| element_path(&join(section, key), element));
        self.report(section, problem, related);
    }

    /// The same, where the other place is in another section.
    pub(super) fn report(&mut self, section: &str, problem: Problem, related: Option<String>) {
        let path = join(section, problem.key);
        let exact = element_path(&path, problem.element);
        if self.is_broken(&exact) || related.as_ref().is_some_and(|related| self.is_broken(related)) {
            return;
        }
        let (place, found) = (self.place_of(&exact), self.written(&exact));
        let related =
            related.and_then(|related| self.place_of(&related)).filter(|related| Some(related) != place.as_ref());
        self.push(&path, place, problem.severity, problem.what, found, problem.instead, related);
        if problem.severity == Severity::Error {
            self.spoil(exact);
        }
    }

    #[allow(clippy::too_many_arguments, reason = "the one place that makes a diagnostic")]
    fn push(
        &mut self,
        key: &str,
        place: Option<FilePosition>,
        severity: Severity,
        what: String,
        found: Option<String>,
        instead: String,
        related: Option<FilePosition>,
    ) {
        // A message may quote a value; `found` is as it stands in the file.
        let hide = |text: &str| self.expansions.hide_about(key, text);
        let (what, instead) = (hide(&what), hide(&instead));
        let (key, surroundings) = (key.to_owned(), self.surroundings);
        let main = self.sources.files.first().map(|file| file.path.clone()).unwrap_or_default();
        let (index, file, place) = match place {
            Some(FilePosition { index, file, position }) => (index, file, Some(position)),
            None => (0, main, None),
        };
        self.found.push(Diagnostic {
            file,
            index,
            place,
            key,
            severity,
            what,
            found,
            instead,
            related: related.map(|FilePosition { file, position, .. }| (file, position)),
            surroundings,
        });
    }

    /// A key that needs what this process can only be given at its start. What else is wrong with it is an echo.
    /// Unless `even_a_default`, only one that is in the file.
    pub(super) fn needs_restart(&mut self, path: &str, what: String, even_a_default: bool) {
        // A table that is there once is not numbered.
        let alone = path.replacen("[0].", ".", 1);
        let path = if !self.has(path) && self.has(&alone) { &alone } else { path };
        if !even_a_default && !path.is_empty() && !self.has(path) {
            return;
        }
        let own = path.split('[').next().filter(|own| *own == INCLUDE).unwrap_or(path);
        self.found.retain(|found| found.key != own || !found.is_error() || found.instead == RESTART);
        let place = self.place_of(path);
        self.push(path, place, Severity::Error, what, None, RESTART.into(), None);
        self.spoil(path);
    }

    pub(super) fn any_error(&self) -> bool {
        self.found.iter().any(Diagnostic::is_error)
    }

    /// Everything, in the order of the files.
    pub(super) fn into_found(self) -> Vec<Diagnostic> {
        let mut found = self.found;
        found.sort_by(|a, b| (a.index, a.place, &a.key, &a.what).cmp(&(b.index, b.place, &b.key, &b.what)));
        found.dedup();
        found
    }
}

pub(super) fn join(section: &str, key: &str) -> String {
    if section.is_empty() { key.to_owned() } else { format!("{section}.{key}") }
}

fn element_path(path: &str, element: Option<usize>) -> String {
    element.map_or_else(|| path.to_owned(), |index| format!("{path}[{index}]"))
}
