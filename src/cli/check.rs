//! `tollgate check`: every problem of a configuration and of what it names; or where tokens are looked up, and every way
//! around them.

use super::Failure;
use super::configuration::{ConfigOption, FoundConfig};
use super::progress::Progress;
use crate::config::{self, Diagnostic, Probe, Settings};
use crate::edge::SandboxMode;
use crate::request::route::{Auth, Methods, Route};
use crate::sandbox::FileAccess;
use crate::store::Bound;
use anyhow::Context as _;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(super) struct CheckArguments {
    /// The configuration file, as with --config
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    config: ConfigOption,
    /// Do not use the network: resolve no names and connect to no store.
    #[arg(long)]
    offline: bool,
    /// Print one JSON object for each problem, and one with the rules of the sandbox if there is one.
    #[arg(long)]
    json: bool,
}

impl CheckArguments {
    pub(super) const fn names_file(&self) -> bool {
        self.file.is_some()
    }
}

pub(super) fn run(arguments: &CheckArguments) -> Result<(), Failure> {
    let found = arguments.config.or_named(arguments.file.as_deref())?;
    let progress = Progress::new("checking");
    let loaded = config::load(&found.path, Probe::Check { network: !arguments.offline });
    drop(progress);
    if arguments.json {
        let problems = match &loaded {
            Ok(settings) => &settings.warnings,
            Err(problems) => problems,
        };
        problems.iter().map(Diagnostic::json).try_for_each(|object| say!("{object}"))?;
        if let Ok(settings) = &loaded
            && settings.server.sandbox != SandboxMode::Off
        {
            let rules = sandbox_rules(settings)?;
            let shown: Vec<_> =
                rules.iter().map(|(access, path, why)| json!({ "access": access, "path": path, "why": why })).collect();
            say!("{}", json!({ "sandbox": shown }))?;
        }
        return loaded.map(drop).map_err(|_| Failure::Reported);
    }
    let settings = loaded.map_err(|found| Failure::Usage(super::report(&found)))?;
    said(&settings, &found)
}

fn said(settings: &Settings, found: &FoundConfig) -> Result<(), Failure> {
    for warning in &settings.warnings {
        say!("{warning}")?;
    }
    say!("{}: ok{}", found.path.display(), found.how())?;
    // What stood for a name may be in any of these.
    let shown = |line: String| say!("{}", settings.expansions.hide(&line));
    say!("tokens are looked up in:")?;
    for store in &settings.stores {
        let bound = match store.kind.bound() {
            Bound::Notified => "within a second".to_owned(),
            Bound::NotifiedWithTriggers => {
                "within a second, once `tollgate store install-triggers` has been run".to_owned()
            }
            Bound::CacheLifetime => {
                let ttl = humantime::format_duration(settings.cache.positive_ttl);
                format!("after up to {ttl} ([cache] positive_ttl)")
            }
        };
        shown(format!("  {}  (a revoked token stops working {bound})", store.name))?;
    }
    let preflights = settings.rules.cors_preflight;
    if open_routes(settings).next().is_none() && !preflights {
        say!("nothing can be reached without a token")?;
    } else {
        say!("can be reached without a token:")?;
    }
    if preflights {
        say!(
            "  every path  (CORS preflights only; no token): [api] cors_preflight, as browsers send no token with them"
        )?;
    }
    for route in open_routes(settings) {
        let how = match route.auth {
            Auth::Required => "a token, or a credential that the backend checks itself",
            Auth::Optional => "token optional",
            Auth::None { pass_token: false } => "no token",
            Auth::None { pass_token: true } => "the backend checks tokens itself",
        };
        shown(format!("  {}  ({}; {how}): {}", route.name, requests(route), route.reason))?;
    }
    if settings.server.sandbox != SandboxMode::Off {
        say!("the sandbox allows these files, and what is in these folders:")?;
        for (access, path, why) in sandbox_rules(settings)? {
            shown(format!("  {access:<6}  {path}  ({why})"))?;
        }
    }
    Ok(())
}

/// What a gateway with these settings is held to: access, path and what needs it. Without what does not exist.
fn sandbox_rules(settings: &Settings) -> anyhow::Result<Vec<(&'static str, String, String)>> {
    let process = super::run::process_needs().context("the program's own file")?;
    let mut rules: BTreeMap<(PathBuf, FileAccess), Vec<String>> = BTreeMap::new();
    for rule in config::needs(settings, Some(&process)) {
        let why = if rule.why.is_empty() { "the configuration" } else { &rule.why };
        for place in rule.places().into_iter().filter(|place| place.exists()) {
            let all = rules.entry((place, rule.access)).or_default();
            if !all.iter().any(|known| known == why) {
                all.push(why.to_owned());
            }
        }
    }
    let line = |((path, access), why): ((PathBuf, FileAccess), Vec<String>)| {
        (access.as_str(), path.display().to_string(), why.join(", "))
    };
    Ok(rules.into_iter().map(line).collect())
}

/// Every route that can be reached without a token.
pub(super) fn open_routes(settings: &Settings) -> impl Iterator<Item = &Route> {
    settings.rules.routes.iter().filter(|route| route.auth != Auth::Required || !route.unchecked.is_empty())
}

/// The methods of a route, and its hosts.
pub(super) fn requests(route: &Route) -> String {
    let methods = match route.methods {
        Methods::ALL => "any method".to_owned(),
        some => some.names().collect::<Vec<_>>().join(" "),
    };
    let hosts: Vec<String> = route.hosts.iter().map(ToString::to_string).collect();
    if hosts.is_empty() { methods } else { format!("{methods} on {}", hosts.join(", ")) }
}
