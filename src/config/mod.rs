//! From a TOML file to the settings that each stage declares. The only folder that names TOML for the configuration.
//! All problems are gathered, each with its place, why, and what to write instead.

mod document;
mod example;
mod file;
mod resolve;
mod section;
mod stores;

pub use document::Document;
pub use example::example;
pub use resolve::{LogTarget, Settings};
pub use section::Problem;

use section::{Field, Section, closest};
use std::path::Path;
use toml::de::{DeTable, DeValue};

/// All that the file says.
struct File {
    server: file::Server,
    admin: file::Admin,
    api: file::Api,
    token: file::Token,
    stores: Vec<file::Store>,
    scopes: Vec<file::Scope>,
    cache: file::Cache,
    pagination: file::Pagination,
    pagination_routes: Vec<file::PaginationRoute>,
    limits: file::Limits,
    upstreams: Vec<file::Upstream>,
    routes: Vec<file::Route>,
    log: file::Log,
}

/// Reads a configuration file.
pub fn load(path: &Path) -> Result<Settings, Vec<Problem>> {
    let failed = |why: String| vec![Problem { line: 0, key: path.display().to_string(), why, instead: String::new() }];
    let text = std::fs::read_to_string(path).map_err(|error| failed(format!("can't be read: {error}")))?;
    parse(&text, path.parent().unwrap_or(Path::new("")))
}

/// The address of the admin listener that a file says, whatever else is wrong with it.
pub fn admin_listener(path: &Path) -> Result<Option<crate::edge::Listen>, String> {
    let failed = |why: String| format!("{}: {why}", path.display());
    let text = std::fs::read_to_string(path).map_err(|error| failed(format!("can't be read: {error}")))?;
    let root = DeTable::parse(&text).map_err(|error| failed(format!("is not TOML: {}", error.message())))?;
    let (lines, mut problems) = (line_starts(&text), Vec::new());
    let admin = Reader { lines: &lines, problems: &mut problems }.one(root.get_ref(), "admin", file::Admin::read);
    match problems.iter().find(|problem| problem.key == "admin" || problem.key == "admin.listen") {
        Some(problem) => Err(failed(problem.to_string())),
        None => Ok(admin.listen.map(|address| address.0)),
    }
}

/// Reads a configuration; relative paths in it start at `folder`.
pub fn parse(text: &str, folder: &Path) -> Result<Settings, Vec<Problem>> {
    let lines = line_starts(text);
    let root = DeTable::parse(text).map_err(|error| {
        let line = error.span().map_or(0, |span| lines.partition_point(|start| *start <= span.start));
        vec![Problem {
            line,
            key: "the file".into(),
            why: format!("is not TOML: {}", error.message()),
            instead: String::new(),
        }]
    })?;
    let mut problems = Vec::new();
    let file = read(root.get_ref(), &lines, &mut problems);
    let document = Document::parse(text);
    let settings = resolve::resolve(&file, document, folder, &mut problems);
    if problems.is_empty() {
        return Ok(settings);
    }
    problems.sort_by(|a, b| (a.line, &a.key).cmp(&(b.line, &b.key)));
    problems.dedup();
    Err(problems)
}

fn line_starts(text: &str) -> Vec<usize> {
    std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect()
}

/// The tables that can stand at the top of the file.
const SECTIONS: [&str; 12] =
    ["server", "admin", "api", "scope", "token", "store", "cache", "pagination", "limits", "upstream", "route", "log"];

fn read(root: &DeTable<'_>, lines: &[usize], problems: &mut Vec<Problem>) -> File {
    for (name, _) in root.iter() {
        let known = SECTIONS.iter().copied();
        if !known.clone().any(|section| section == name.get_ref()) {
            let line = lines.partition_point(|start| *start <= name.span().start);
            problems.push(Problem {
                line,
                key: name.get_ref().to_string(),
                why: "is not a section that tollgate knows".into(),
                instead: closest(name.get_ref(), known),
            });
        }
    }
    let mut reader = Reader { lines, problems };
    let paging =
        root.iter().find(|(key, _)| key.get_ref() == "pagination").and_then(|(_, value)| value.get_ref().as_table());
    File {
        server: reader.one(root, "server", file::Server::read),
        admin: reader.one(root, "admin", file::Admin::read),
        api: reader.one(root, "api", file::Api::read),
        token: reader.one(root, "token", file::Token::read),
        stores: reader.one_or_many(root, "store", file::Store::read),
        scopes: reader.many(root, "scope", "scope", file::Scope::read),
        cache: reader.one(root, "cache", file::Cache::read),
        limits: reader.one(root, "limits", file::Limits::read),
        log: reader.one(root, "log", file::Log::read),
        upstreams: reader.many(root, "upstream", "upstream", file::Upstream::read),
        routes: reader.many(root, "route", "route", file::Route::read),
        pagination: reader.one(root, "pagination", file::Pagination::read),
        pagination_routes: paging
            .map(|table| reader.many(table, "route", "pagination.route", file::PaginationRoute::read))
            .unwrap_or_default(),
    }
}

struct Reader<'p> {
    lines: &'p [usize],
    problems: &'p mut Vec<Problem>,
}

impl Reader<'_> {
    fn problem(&mut self, offset: usize, key: &str, why: &str, instead: String) {
        let line = self.lines.partition_point(|start| *start <= offset);
        self.problems.push(Problem { line, key: key.into(), why: why.into(), instead });
    }

    fn one<T>(&mut self, root: &DeTable<'_>, name: &str, read: fn(&mut Section<'_>) -> T) -> T {
        let found = root.iter().find(|(key, _)| key.get_ref() == name);
        let table = found.and_then(|(_, value)| value.get_ref().as_table());
        if let (Some((key, _)), None) = (found, table) {
            self.problem(key.span().start, name, "must be a table", format!("write [{name}] on a line of its own"));
        }
        let line = found.map_or(0, |(key, _)| self.lines.partition_point(|start| *start <= key.span().start));
        let nested: &[&str] = if name == "pagination" { &["route"] } else { &[] };
        read(&mut Section { name: name.into(), table, line, nested, lines: self.lines, problems: self.problems })
    }

    /// `[name]`, or any number of `[[name]]`, or none, which is read as an empty one.
    fn one_or_many<T>(&mut self, root: &DeTable<'_>, name: &str, read: fn(&mut Section<'_>) -> T) -> Vec<T> {
        let found = root.iter().find(|(key, _)| key.get_ref() == name);
        match found.and_then(|(_, value)| value.get_ref().as_array()) {
            Some(array) if !array.is_empty() => self.many(root, name, name, read),
            _ => vec![self.one(root, name, read)],
        }
    }

    fn many<T>(&mut self, parent: &DeTable<'_>, key: &str, name: &str, read: fn(&mut Section<'_>) -> T) -> Vec<T> {
        let Some((found, value)) = parent.iter().find(|(found, _)| found.get_ref() == key) else { return Vec::new() };
        let Some(array) = value.get_ref().as_array() else {
            self.problem(found.span().start, name, "is a list of tables", format!("write [[{name}]]"));
            return Vec::new();
        };
        let mut read_all = Vec::new();
        for (index, item) in array.iter().enumerate() {
            let line = self.lines.partition_point(|start| *start <= item.span().start);
            match item.get_ref() {
                DeValue::Table(table) => read_all.push(read(&mut Section {
                    name: format!("{name}[{index}]"),
                    table: Some(table),
                    line,
                    nested: &[],
                    lines: self.lines,
                    problems: self.problems,
                })),
                _ => self.problem(item.span().start, name, "is a list of tables", format!("write [[{name}]]")),
            }
        }
        read_all
    }
}

/// A section for the reference.
struct Reference {
    header: &'static str,
    doc: &'static [&'static str],
    fields: &'static [Field],
    /// Stands in the example as a comment: there may be none of it.
    commented: bool,
}

const fn shown(header: &'static str, doc: &'static [&'static str], fields: &'static [Field]) -> Reference {
    Reference { header, doc, fields, commented: false }
}

const fn commented(header: &'static str, doc: &'static [&'static str], fields: &'static [Field]) -> Reference {
    Reference { header, doc, fields, commented: true }
}

/// All sections, in the order in which they are documented.
const REFERENCE: [Reference; 17] = [
    shown("[server]", file::Server::DOC, file::Server::FIELDS),
    shown("[admin]", file::Admin::DOC, file::Admin::FIELDS),
    shown("[[upstream]]", file::Upstream::DOC, file::Upstream::FIELDS),
    shown("[api]", file::Api::DOC, file::Api::FIELDS),
    shown("[token]", file::Token::DOC, file::Token::FIELDS),
    shown("[[store]]", file::SqliteStore::DOC, file::SqliteStore::FIELDS),
    commented("[[store]]", file::FileStore::DOC, file::FileStore::FIELDS),
    commented("[[store]]", file::PostgresStore::DOC, file::PostgresStore::FIELDS),
    commented("[[store]]", file::RedisStore::DOC, file::RedisStore::FIELDS),
    commented("[[store]]", file::IntrospectionStore::DOC, file::IntrospectionStore::FIELDS),
    shown("[cache]", file::Cache::DOC, file::Cache::FIELDS),
    commented("[[scope]]", file::Scope::DOC, file::Scope::FIELDS),
    shown("[pagination]", file::Pagination::DOC, file::Pagination::FIELDS),
    commented("[[pagination.route]]", file::PaginationRoute::DOC, file::PaginationRoute::FIELDS),
    shown("[limits]", file::Limits::DOC, file::Limits::FIELDS),
    commented("[[route]]", file::Route::DOC, file::Route::FIELDS),
    shown("[log]", file::Log::DOC, file::Log::FIELDS),
];

#[cfg(test)]
mod tests;
