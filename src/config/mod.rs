//! From a TOML file to the settings that each stage declares. The only folder that names TOML for the configuration. What
//! is right is each stage's to say, beside its settings; here every problem gets its place, and echoes of it are left out.

mod diagnostic;
mod document;
mod example;
mod expand;
mod file;
mod needs;
mod places;
mod probe;
mod reference;
mod resolve;
mod section;
mod shown;
mod sources;
mod stores;
mod text_file;
mod trust;

pub use diagnostic::{Diagnostic, Position};
pub use document::Document;
pub use example::example;
pub use expand::Expansions;
pub use needs::{ProcessNeeds, needs};
pub use probe::Probe;
pub use reference::{page, schema};
pub use resolve::Settings;
pub use sources::files;
pub use trust::distrusted;

use crate::edge::Listen;
use crate::sandbox::{self, Extent, Sandbox};
use places::Places;
use resolve::ReadFrom;
use section::{Section, SectionKey, Setting as _, nearest, suggestion};
use sources::{INCLUDE, Sources};
use std::path::Path;
use toml::de::{DeTable, DeValue};

/// All that the file says.
struct File {
    server: file::ServerSection,
    listeners: Vec<file::ListenerSection>,
    admin: file::AdminSection,
    api: file::ApiSection,
    token: file::TokenSection,
    stores: Vec<file::StoreSection>,
    scopes: Vec<file::ScopeSection>,
    cache: file::CacheSection,
    pagination: file::PaginationSection,
    pagination_routes: Vec<file::PaginationRouteSection>,
    limits: file::LimitsSection,
    limit: Vec<file::LimitSection>,
    /// With their names.
    plans: Vec<(String, file::PlanSection)>,
    shared_limits: file::SharedLimitsSection,
    guessing: file::GuessingSection,
    upstreams: Vec<file::UpstreamSection>,
    routes: Vec<file::RouteSection>,
    trace: file::TraceSection,
    log: file::LogSection,
}

/// Reads a configuration file with those that it includes, and looks at what it names as far as `probe` says. `check`, `run`, a
/// reload and the other commands all ask this one function. With any error, everything that was found is returned, warnings
/// too.
pub fn load(path: &Path, probe: Probe<'_>) -> Result<Settings, Vec<Diagnostic>> {
    let text = match text_file::read(path, text_file::CONFIGURATION) {
        Ok(text) => text,
        Err(why) => {
            let sources = Sources::read("", path);
            let mut places = Places::new(&sources);
            places.syntax(None, why, None);
            return Err(places.into_found());
        }
    };
    parse(&text, path, probe)
}

/// The same for a text that is, or could be, in the file `path`: relative paths in it, and in what it includes, start at its
/// folder.
pub fn parse(text: &str, path: &Path, probe: Probe<'_>) -> Result<Settings, Vec<Diagnostic>> {
    let sources = Sources::read(text, path);
    let mut places = Places::new(&sources);
    let Some(root) = sources.table(&mut places) else { return Err(places.into_found()) };
    let file = read(&root, &mut places);
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut settings = resolve::resolve(&file, Document::of(sources.texts()), folder, &mut places);
    settings.read_from = read_from(&sources, &places);
    places.surroundings = true;
    if let Some(sandbox) = sandbox::current() {
        say_what_is_outside(&sandbox, &settings, &mut places);
    }
    probe::look(&settings, &file, probe, &mut places);
    if places.any_error() {
        return Err(places.into_found());
    }
    settings.expansions = places.expansions.clone();
    settings.warnings = places.into_found();
    settings.edge.admin.shown = shown::shown(&settings.document, path).into();
    Ok(settings)
}

fn read_from(sources: &Sources, places: &Places<'_>) -> Vec<ReadFrom> {
    let sources = sources.needs().map(|(key, extent, path)| ReadFrom { key: key.into(), path, extent });
    let values = places.expansions.files().iter().chain(&places.secrets);
    let values = values.map(|(key, path)| ReadFrom { key: key.clone(), path: path.clone(), extent: Extent::Folder });
    sources.chain(values).collect()
}

/// What a process in a sandbox was not allowed at its start.
fn say_what_is_outside(sandbox: &Sandbox, settings: &Settings, places: &mut Places<'_>) {
    // With other errors, defaults may stand in for what could not be read.
    let is_known = !places.any_error();
    for rule in needs(settings, None).iter().filter(|rule| rule.is_setting) {
        if let Some(place) = sandbox.refuses(rule) {
            let (path, place, doing) = (rule.path.display(), place.display(), rule.access.doing());
            let what = format!(
                "{path} is outside of the sandbox: this process was not allowed to {doing} {place} at its start"
            );
            places.needs_restart(&rule.why, what, is_known);
        }
    }
}

/// The address of the admin listener that a configuration says, whatever else is wrong with it.
pub fn admin_listener(path: &Path) -> Result<Option<Listen>, String> {
    let text = text_file::read(path, text_file::CONFIGURATION).map_err(|why| format!("{}: {why}", path.display()))?;
    let sources = Sources::read(&text, path);
    let mut places = Places::new(&sources);
    let admin = match sources.table(&mut places) {
        Some(root) => one(&mut places, &root, "admin", file::AdminSection::read),
        None => return Err(places.into_found().first().map(ToString::to_string).unwrap_or_default()),
    };
    match places.into_found().iter().find(|found| found.key == "admin" || found.key == "admin.listen") {
        Some(problem) => Err(problem.to_string()),
        None => Ok(admin.listen.map(|address| address.0)),
    }
}

/// The tables that can stand at the top of the file.
const SECTIONS: [&str; 18] = [
    "server",
    "listener",
    "admin",
    "api",
    "scope",
    "token",
    "store",
    "cache",
    "pagination",
    "limits",
    "limit",
    "plan",
    "shared_limits",
    "guessing",
    "upstream",
    "route",
    "trace",
    "log",
];

fn read(root: &DeTable<'_>, places: &mut Places<'_>) -> File {
    if let Some(value) = root.get(INCLUDE)
        && let Err(all) = Vec::<String>::read(value.get_ref())
    {
        all.into_iter().for_each(|wrong| places.unreadable(INCLUDE, wrong.element, wrong.what, wrong.instead));
    }
    let is_known = |name: &str| name == INCLUDE || SECTIONS.contains(&name);
    for (name, _) in root.iter().filter(|(name, _)| !is_known(name.get_ref())) {
        let near = nearest(name.get_ref(), SECTIONS.into_iter());
        places.unknown(name.get_ref(), "is not a known section", suggestion(near, SECTIONS.into_iter()));
        if let Some(near) = near.filter(|near| !places.has(near)) {
            places.spoil(near);
        }
    }
    let paging =
        root.iter().find(|(key, _)| key.get_ref() == "pagination").and_then(|(_, value)| value.get_ref().as_table());
    File {
        server: one(places, root, "server", file::ServerSection::read),
        listeners: many(places, root, "listener", "listener", file::ListenerSection::read),
        admin: one(places, root, "admin", file::AdminSection::read),
        api: one(places, root, "api", file::ApiSection::read),
        token: one(places, root, "token", file::TokenSection::read),
        stores: one_or_many(places, root, "store", file::StoreSection::read),
        scopes: many(places, root, "scope", "scope", file::ScopeSection::read),
        cache: one(places, root, "cache", file::CacheSection::read),
        limits: one(places, root, "limits", file::LimitsSection::read),
        limit: many(places, root, "limit", "limit", file::LimitSection::read),
        plans: named(places, root, "plan", file::PlanSection::read),
        shared_limits: one(places, root, "shared_limits", file::SharedLimitsSection::read),
        guessing: one(places, root, "guessing", file::GuessingSection::read),
        trace: one(places, root, "trace", file::TraceSection::read),
        log: one(places, root, "log", file::LogSection::read),
        upstreams: many(places, root, "upstream", "upstream", file::UpstreamSection::read),
        routes: many(places, root, "route", "route", file::RouteSection::read),
        pagination: one(places, root, "pagination", file::PaginationSection::read),
        pagination_routes: paging
            .map(|table| many(places, table, "route", "pagination.route", file::PaginationRouteSection::read))
            .unwrap_or_default(),
    }
}

type ReadSection<T> = fn(&mut Section<'_, '_>) -> T;

/// `[name]`; one that is not there is read as an empty one.
fn one<T>(places: &mut Places<'_>, root: &DeTable<'_>, name: &str, read: ReadSection<T>) -> T {
    let found = root.iter().find(|(key, _)| key.get_ref() == name);
    let table = found.and_then(|(_, value)| value.get_ref().as_table());
    if found.is_some() && table.is_none() {
        places.unreadable(name, None, "must be a table".into(), format!("write [{name}] on a line of its own"));
    }
    let nested: &[&str] = if name == "pagination" { &["route"] } else { &[] };
    read(&mut Section { name: name.into(), table, nested, places, missing: Vec::new() })
}

/// `[name]`, or any number of `[[name]]`, or none, which is read as an empty one.
fn one_or_many<T>(places: &mut Places<'_>, root: &DeTable<'_>, name: &str, read: ReadSection<T>) -> Vec<T> {
    let found = root.iter().find(|(key, _)| key.get_ref() == name);
    match found.and_then(|(_, value)| value.get_ref().as_array()) {
        Some(array) if !array.is_empty() => many(places, root, name, name, read),
        _ => vec![one(places, root, name, read)],
    }
}

/// Any number of `[key.NAME]`.
fn named<T>(places: &mut Places<'_>, root: &DeTable<'_>, key: &str, read: ReadSection<T>) -> Vec<(String, T)> {
    let Some((_, value)) = root.iter().find(|(found, _)| found.get_ref() == key) else { return Vec::new() };
    let Some(all) = value.get_ref().as_table() else {
        places.unreadable(
            key,
            None,
            "must be tables with names".into(),
            format!("write [{key}.NAME] on a line of its own"),
        );
        return Vec::new();
    };
    let mut read_all = Vec::new();
    for (own, value) in all.iter() {
        let name = format!("{key}.{}", own.get_ref());
        match value.get_ref().as_table() {
            Some(table) => {
                let mut section = Section { name, table: Some(table), nested: &[], places, missing: Vec::new() };
                read_all.push((own.get_ref().to_string(), read(&mut section)));
            }
            None => {
                let instead = format!("write [{key}.NAME] on a line of its own");
                places.unreadable(&name, None, "must be a table".into(), instead);
            }
        }
    }
    read_all
}

/// Any number of `[[name]]`, which is `key` in its parent.
fn many<T>(places: &mut Places<'_>, parent: &DeTable<'_>, key: &str, name: &str, read: ReadSection<T>) -> Vec<T> {
    let Some((_, value)) = parent.iter().find(|(found, _)| found.get_ref() == key) else { return Vec::new() };
    let (what, instead) = ("must be a list of tables", format!("write [[{name}]] on a line of its own"));
    let Some(array) = value.get_ref().as_array() else {
        places.unreadable(name, None, what.into(), instead);
        return Vec::new();
    };
    let mut read_all = Vec::new();
    for (index, item) in array.iter().enumerate() {
        let name = format!("{name}[{index}]");
        match item.get_ref() {
            DeValue::Table(table) => {
                read_all.push(read(&mut Section {
                    name,
                    table: Some(table),
                    nested: &[],
                    places,
                    missing: Vec::new(),
                }));
            }
            _ => places.unreadable(&name, None, what.into(), instead.clone()),
        }
    }
    read_all
}

/// A section for the reference.
struct Reference {
    header: &'static str,
    doc: &'static [&'static str],
    fields: &'static [SectionKey],
    /// Stands in the example as a comment: there may be none of it.
    commented: bool,
}

const fn shown(header: &'static str, doc: &'static [&'static str], fields: &'static [SectionKey]) -> Reference {
    Reference { header, doc, fields, commented: false }
}

const fn commented(header: &'static str, doc: &'static [&'static str], fields: &'static [SectionKey]) -> Reference {
    Reference { header, doc, fields, commented: true }
}

/// All sections, in the order in which they are documented.
const REFERENCE: [Reference; 23] = [
    shown("[server]", file::ServerSection::DOC, file::ServerSection::FIELDS),
    commented("[[listener]]", file::ListenerSection::DOC, file::ListenerSection::FIELDS),
    shown("[admin]", file::AdminSection::DOC, file::AdminSection::FIELDS),
    shown("[[upstream]]", file::UpstreamSection::DOC, file::UpstreamSection::FIELDS),
    shown("[api]", file::ApiSection::DOC, file::ApiSection::FIELDS),
    shown("[token]", file::TokenSection::DOC, file::TokenSection::FIELDS),
    shown("[[store]]", file::SqliteSection::DOC, file::SqliteSection::FIELDS),
    commented("[[store]]", file::FileSection::DOC, file::FileSection::FIELDS),
    commented("[[store]]", file::PostgresSection::DOC, file::PostgresSection::FIELDS),
    commented("[[store]]", file::RedisSection::DOC, file::RedisSection::FIELDS),
    commented("[[store]]", file::IntrospectionSection::DOC, file::IntrospectionSection::FIELDS),
    shown("[cache]", file::CacheSection::DOC, file::CacheSection::FIELDS),
    commented("[[scope]]", file::ScopeSection::DOC, file::ScopeSection::FIELDS),
    shown("[pagination]", file::PaginationSection::DOC, file::PaginationSection::FIELDS),
    commented("[[pagination.route]]", file::PaginationRouteSection::DOC, file::PaginationRouteSection::FIELDS),
    shown("[limits]", file::LimitsSection::DOC, file::LimitsSection::FIELDS),
    commented("[[limit]]", file::LimitSection::DOC, file::LimitSection::FIELDS),
    commented("[plan.gold]", file::PlanSection::DOC, file::PlanSection::FIELDS),
    shown("[shared_limits]", file::SharedLimitsSection::DOC, file::SharedLimitsSection::FIELDS),
    shown("[guessing]", file::GuessingSection::DOC, file::GuessingSection::FIELDS),
    commented("[[route]]", file::RouteSection::DOC, file::RouteSection::FIELDS),
    shown("[trace]", file::TraceSection::DOC, file::TraceSection::FIELDS),
    shown("[log]", file::LogSection::DOC, file::LogSection::FIELDS),
];

#[cfg(test)]
mod tests;
