//! `tollgate routes`: what can be reached and how, as a table, as JSON, or as a graph for Graphviz. Reads the configuration and
//! asks nobody.

use super::configuration::ConfigOption;
use super::{Failure, load};
use crate::config::Settings;
use crate::explain::{auth_text, hosts, methods};
use crate::policy::{LimitKeyPart, LimitSettings, Scopes};
use crate::request::page::PageRules;
use crate::request::route::{Auth, Methods, Route};
use crate::request::view::Method;
use serde_json::{Value, json};
use std::fmt::Write as _;

#[derive(clap::Args)]
pub(super) struct RoutesArguments {
    #[command(flatten)]
    config: ConfigOption,
    /// Print JSON
    #[arg(long, conflicts_with = "graph")]
    json: bool,
    /// Print a graph for Graphviz: `tollgate routes --config F --graph | dot -Tsvg > routes.svg`
    #[arg(long)]
    graph: bool,
}

pub(super) fn run(arguments: &RoutesArguments) -> Result<(), Failure> {
    let settings = load(&arguments.config)?;
    if arguments.graph {
        return Ok(say!("{}", graph(&settings).trim_end())?);
    }
    let rows: Vec<RouteRow> = settings.rules.routes.iter().map(|route| RouteRow::of(route, &settings)).collect();
    if arguments.json {
        let listeners: Vec<_> = settings.server.listeners.iter().map(ToString::to_string).collect();
        let all = json!({
            "listeners": listeners,
            "routes": rows.iter().map(RouteRow::json).collect::<Vec<_>>(),
            "cors_preflight": settings.rules.cors_preflight,
            "otherwise": { "status": 404, "reason": "no_route" },
        });
        return Ok(say!("{all:#}")?);
    }
    table(&rows, &settings)
}

/// A route in words.
struct RouteRow {
    path: String,
    methods: String,
    hosts: String,
    token: String,
    reason: String,
    scopes: Vec<String>,
    limits: Vec<String>,
    upstream: String,
    pages: String,
    /// `FILE:LINE`, or the key whose default it is.
    place: String,
}

impl RouteRow {
    fn of(route: &Route, settings: &Settings) -> Self {
        let places = &settings.edge.places;
        Self {
            path: route.name.clone(),
            methods: methods(route.methods),
            hosts: hosts(route),
            token: token(route),
            reason: route.reason.clone(),
            scopes: settings.policy.scopes.as_ref().map_or(Vec::new(), |scopes| scopes_of(route, scopes)),
            limits: settings.limits.iter().filter(|limit| is_limited(route, limit)).map(limit_text).collect(),
            upstream: upstream(route, settings),
            pages: pages(route, settings),
            place: places.of(&route.at).unwrap_or_else(|| format!("default of {}", route.at)),
        }
    }

    fn json(&self) -> Value {
        json!({
            "path": self.path,
            "methods": self.methods,
            "hosts": self.hosts,
            "token": self.token,
            "reason": self.reason,
            "scopes": self.scopes,
            "limits": self.limits,
            "upstream": self.upstream,
            "pages": self.pages,
            "place": self.place,
        })
    }

    fn cells(&self) -> [String; 9] {
        let list = |all: &[String], none: &str| if all.is_empty() { none.to_owned() } else { all.join(", ") };
        let needs_token = self.token != "none" && !self.token.starts_with("none,");
        [
            self.path.clone(),
            self.methods.clone(),
            self.hosts.clone(),
            self.token.clone(),
            if needs_token { list(&self.scopes, "any") } else { "-".into() },
            list(&self.limits, "none"),
            self.upstream.clone(),
            self.pages.clone(),
            self.place.clone(),
        ]
    }
}

fn token(route: &Route) -> String {
    let word = match route.auth {
        Auth::Required => "required",
        Auth::Optional => "optional",
        Auth::None { pass_token: false } => "none",
        Auth::None { pass_token: true } => "none, passed on",
    };
    if route.refuse_query_token { format!("{word}, not in the query") } else { word.into() }
}

/// The scopes that allow something there; with the methods where these are not all of the route's, and `in part` where some
/// paths are left out.
fn scopes_of(route: &Route, scopes: &Scopes) -> Vec<String> {
    let mut all = Vec::new();
    for rule in scopes.rules() {
        if !rule.methods.overlaps(route.methods) || !rule.paths.iter().any(|path| path.meets(&route.pattern)) {
            continue;
        }
        let less = Method::FORWARDED.into_iter().any(|method| route.methods.has(method) && !rule.methods.has(method));
        let is_whole = rule.paths.iter().any(|path| path.covers(&route.pattern));
        let words = [less.then(|| methods(rule.methods)), (!is_whole).then(|| "in part".to_owned())];
        let words: Vec<_> = words.into_iter().flatten().collect();
        all.push(if words.is_empty() { rule.scope.clone() } else { format!("{} ({})", rule.scope, words.join(", ")) });
    }
    all
}

fn is_limited(route: &Route, limit: &LimitSettings) -> bool {
    let by_identity =
        |part: &LimitKeyPart| matches!(part, LimitKeyPart::Token | LimitKeyPart::User | LimitKeyPart::Scope);
    let applies = &limit.applies;
    let needs_token =
        !applies.scopes.is_empty() || !applies.users.is_empty() || limit.buckets.key.iter().any(by_identity);
    let is_meant = applies.routes.is_empty() || applies.routes.contains(&route.name);
    is_meant && applies.methods.overlaps(route.methods) && !(needs_token && matches!(route.auth, Auth::None { .. }))
}

fn limit_text(limit: &LimitSettings) -> String {
    if limit.dry_run { format!("{} (dry run)", limit.name) } else { limit.name.clone() }
}

fn name(settings: &Settings, place: usize) -> &str {
    settings.upstreams.get(place).map_or("", |upstream| &upstream.name)
}

fn upstream(route: &Route, settings: &Settings) -> String {
    let mut text = name(settings, route.upstream).to_owned();
    for pool in &route.pools {
        let _ = write!(text, ", scope {}: {}", pool.scope, name(settings, pool.upstream));
    }
    if let Some(canary) = &route.canary {
        let _ = write!(text, ", {} %: {}", percent(canary.share()), name(settings, canary.upstream));
    }
    text
}

/// Without places that say nothing.
fn percent(share: f64) -> f64 {
    (share * 10_000.0).round() / 100.0
}

fn pages(route: &Route, settings: &Settings) -> String {
    if route.is_web_page() || !route.methods.overlaps(Methods::only([Method::Get, Method::Head])) {
        return "-".into();
    }
    let pagination = &settings.rules.pagination;
    let text = |rules: &Option<&PageRules>| match rules {
        None => "off".to_owned(),
        Some(rules) => match rules.max_per_page {
            Some(most) => format!("{} of at most {most}", rules.default_per_page),
            None => format!("{} of any number", rules.default_per_page),
        },
    };
    let whole = pagination.overrides.iter().find(|(pattern, _)| pattern.covers(&route.pattern));
    let own = whole.map_or(Some(&pagination.default), |(_, rules)| rules.as_ref());
    let others = pagination
        .overrides
        .iter()
        .filter(|(pattern, _)| pattern.meets(&route.pattern) && !pattern.covers(&route.pattern));
    match others.count() {
        0 => text(&own),
        count => format!("{}, {count} paths otherwise", text(&own)),
    }
}

fn table(rows: &[RouteRow], settings: &Settings) -> Result<(), Failure> {
    let header = ["PATH", "METHODS", "HOSTS", "TOKEN", "SCOPES", "LIMITS", "UPSTREAM", "PER PAGE", "WHERE"];
    let header = header.map(str::to_owned);
    let cells: Vec<_> = std::iter::once(header).chain(rows.iter().map(RouteRow::cells)).collect();
    let width = |column: usize| cells.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    // A column in which all say the same nothing is left out.
    let says =
        |column: usize| cells[1..].iter().any(|row| !matches!(row[column].as_str(), "any host" | "none" | "-" | "any"));
    let columns: Vec<usize> = (0..9).filter(|column| matches!(column, 0 | 1 | 3 | 6 | 8) || says(*column)).collect();
    for (place, row) in cells.iter().enumerate() {
        let line: Vec<_> = columns.iter().map(|column| format!("{:<1$}", row[*column], width(*column))).collect();
        say!("{}", line.join("  ").trim_end())?;
        if let Some(open) = place.checked_sub(1).and_then(|place| rows.get(place)).filter(|row| !row.reason.is_empty())
        {
            say!("  without a token because: {}", open.reason)?;
        }
    }
    if settings.rules.cors_preflight {
        say!("every path: CORS preflights (OPTIONS) pass without a token  {}", place(settings, "api.cors_preflight"))?;
    }
    say!(
        "any other path, host or method of these: 404 (no_route); other methods than GET HEAD POST PUT PATCH DELETE OPTIONS: 405"
    )?;
    Ok(())
}

fn place(settings: &Settings, key: &str) -> String {
    settings.edge.places.of(key).unwrap_or_else(|| "the default".into())
}

/// Listeners, routes, upstreams and servers, for `dot`.
fn graph(settings: &Settings) -> String {
    let quoted = |text: &str| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"));
    let mut out = String::from(
        "digraph tollgate {\n  rankdir=LR;\n  node [shape=box, fontname=\"sans-serif\", fontsize=11];\n  edge [fontname=\"sans-serif\", fontsize=9];\n  gate [label=\"tollgate\", shape=oval];\n",
    );
    let mut line = |text: String| {
        out.push_str("  ");
        out.push_str(&text);
        out.push_str(";\n");
    };
    for (at, listener) in settings.server.listeners.iter().enumerate() {
        line(format!("listener{at} [label={}, shape=cds]", quoted(&listener.to_string())));
        line(format!("listener{at} -> gate"));
    }
    for route in settings.rules.routes.iter() {
        let row = RouteRow::of(route, settings);
        let hosts = if route.hosts.is_empty() { String::new() } else { format!("\n{}", row.hosts) };
        let label = format!("{}{hosts}\n{}\n{}", row.path, row.methods, auth_text(route.auth));
        let style = if route.auth == Auth::Required { "" } else { ", style=dashed" };
        line(format!("route{} [label={}{style}]", route.index, quoted(&label)));
        line(format!("gate -> route{}", route.index));
        line(format!("route{} -> upstream{}", route.index, route.upstream));
        for pool in &route.pools {
            let label = quoted(&format!("scope {}", pool.scope));
            line(format!("route{} -> upstream{} [label={label}]", route.index, pool.upstream));
        }
        if let Some(canary) = &route.canary {
            let label = quoted(&format!("{} %", percent(canary.share())));
            line(format!("route{} -> upstream{} [label={label}, style=dotted]", route.index, canary.upstream));
        }
    }
    line("nowhere [label=\"everything else\\n404\", style=dotted]".into());
    line("gate -> nowhere [style=dotted]".into());
    for (at, upstream) in settings.upstreams.iter().enumerate() {
        line(format!("upstream{at} [label={}, shape=component]", quoted(&upstream.name)));
        for (number, server) in upstream.servers.iter().enumerate() {
            let more = if server.backup { "\nbackup" } else { "" };
            line(format!("server{at}_{number} [label={}]", quoted(&format!("{}{more}", server.address))));
            let weight =
                if server.weight == 1 { String::new() } else { format!(" [label=\"weight {}\"]", server.weight) };
            line(format!("upstream{at} -> server{at}_{number}{weight}"));
        }
    }
    out.push_str("}\n");
    out
}
