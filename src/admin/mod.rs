//! The requests that the admin listener serves, as plain functions. Knows no socket; nothing here is ever served on the
//! API listeners.

mod explain;

pub use explain::{EXPLAIN_FORM, EXPLAIN_SCRIPT};

use crate::clock::Now;
use crate::explain::RulePlaces;
use crate::pipeline::Pipeline;
use crate::policy::GuessEpisode;
use crate::request::head::HeadFault;
use crate::request::view::{FieldKind, Method, RequestView};
use crate::store::credential::DigestPrefix;
use crate::store::rfc3339;
use crate::telemetry::audit_log::{AuditResult, AuditedAction};
use crate::telemetry::heavy_hitters::{HeavyHitter, HitterKind, HitterMeasure, HitterSums};
use crate::telemetry::metrics::Metrics;
use crate::upstream::{Member, Upstream};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// What the responses are made from.
pub struct Operator<'a> {
    pub pipeline: &'a Pipeline,
    pub metrics: &'a Metrics,
    pub upstreams: Vec<&'a Upstream>,
    /// Where its rules are written.
    pub places: &'a RulePlaces,
    /// Of the request, where [`takes_body`] asks for one.
    pub body: &'a [u8],
    /// Host names that the listener accepts besides IP addresses and localhost, in lower case.
    pub hosts: &'a [String],
    pub ready: bool,
    pub started_unix_ms: u64,
    pub now: Now,
    /// The same point in time, as the state of servers has it.
    pub instant: Instant,
}

pub enum Action {
    Respond(AdminResponse),
    /// Something was changed, or was to be.
    Changed(AdminResponse, AuditedAction),
    /// Reload the configuration and respond with [`reloaded`].
    Reload {
        /// Respond with JSON.
        json: bool,
    },
    /// Start the binary again in place of this process, and respond with [`upgraded`].
    Upgrade {
        /// Respond with JSON.
        json: bool,
    },
}

/// The result of an upgrade.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Upgraded {
    /// The process that accepts connections now.
    pub pid: u32,
    /// The one that completes its requests, and ends.
    pub replaced: u32,
}

/// The result of a reload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reloaded {
    /// Keys whose new values are in force.
    pub applied: Vec<String>,
    /// Keys whose new values need a restart.
    pub restart: Vec<String>,
}

#[derive(Debug, PartialEq, Eq)]
pub struct AdminResponse {
    status: u16,
    content_type: &'static str,
    /// The value of Allow, which a 405 must have.
    allow: Option<&'static str>,
    body: String,
}

/// Why a request could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unread {
    TooLarge,
    TargetTooLong,
    BodyTooLarge,
    TooSlow,
    Malformed(HeadFault),
}

/// More are counted only.
const MOST_GUESSING_LISTED: usize = 1_000;

const PAGES: &str = "\
GET  /metrics                   metrics for Prometheus
GET  /healthz                   200 while the process serves
GET  /readyz                    200 while requests are taken, 503 while draining
GET  /status                    version, uptime, store and cache as JSON
GET  /upstreams                 servers, whether they are up, why not and since when, as JSON
POST /upstreams/NAME/servers/ADDRESS/drain     send no new requests to the server; those in flight go on
POST /upstreams/NAME/servers/ADDRESS/undrain   send requests to it again
POST /reload                    reload the configuration
POST /upgrade                   start the binary again, and pass it the listening sockets
POST /cache/forget              remove every token from the cache
GET  /top                       tokens, users, clients and routes that make most of the traffic of the last minute, as JSON
GET  /top?seconds=600&n=100     the same for up to 600 seconds, and up to 100 of each
GET  /guessing                  addresses that guess tokens at the moment, as JSON
POST /guessing/lift             forget the failed tokens of all addresses
POST /guessing/lift?client=ADDRESS   forget those of one address, or of its IPv6 network of 64 bits
POST /explain                   what would become of a request, as JSON; docs/explain.md
POST /cache/forget?sha256=HEX   remove the tokens whose SHA-256 begins with these 12 to 64 hex digits
";

pub fn respond(view: &RequestView<'_>, operator: &Operator<'_>) -> Action {
    // DNS rebinding: a web page can make a browser send requests here under a host name that resolves to this machine.
    if !is_own_name(view.host, operator.hosts) {
        let why = "This listener accepts an IP address or localhost as Host. To use another name, add it to [admin] hosts \
                   and reload.\n";
        return text(403, why).into();
    }
    if view.fields_of(FieldKind::Origin).any(|origin| !is_own_origin(origin.value, view.host)) {
        let why = "This listener refuses requests of web pages from other origins. Send no Origin header, or http:// and \
                   the value of Host.\n";
        return text(403, why).into();
    }
    let reads = matches!(view.method, Method::Get | Method::Head);
    match (view.path(), view.method) {
        (b"/", _) if reads => text(200, PAGES).into(),
        // The default request of HAProxy's `option httpchk`.
        (b"/", Method::Options) => readiness(operator).allowing("GET, HEAD, OPTIONS").into(),
        (b"/metrics", _) if reads => metrics(operator).into(),
        (b"/healthz", _) if reads => text(200, "ok\n").into(),
        (b"/readyz", _) if reads => readiness(operator).into(),
        (b"/status", _) if reads => status(operator).into(),
        (b"/upstreams", _) if reads => upstreams(operator).into(),
        (b"/reload", Method::Post) => Action::Reload { json: wants_json(view) },
        (b"/upgrade", Method::Post) => Action::Upgrade { json: wants_json(view) },
        (b"/top", _) if reads => top(view.query(), operator).into(),
        (b"/guessing", _) if reads => guessing(operator).into(),
        (b"/guessing/lift", Method::Post) => lift(view.query(), operator),
        (b"/explain", Method::Post) => explain::explain(view, operator),
        (b"/cache/forget", Method::Post) => forget(view.query(), operator),
        (b"/" | b"/metrics" | b"/healthz" | b"/readyz" | b"/status" | b"/upstreams" | b"/top" | b"/guessing", _) => {
            not_allowed("GET, HEAD")
        }
        (b"/reload" | b"/upgrade" | b"/cache/forget" | b"/guessing/lift" | b"/explain", _) => not_allowed("POST"),
        (path, method) => match drain_call(path) {
            Some(call) if method == Method::Post => drain(&call, operator),
            Some(_) => not_allowed("POST"),
            None => text(404, "Not found. GET / lists the available requests.\n").into(),
        },
    }
}

/// The most bytes of a body that are to be read. `None`: none of it.
pub fn takes_body(view: &RequestView<'_>) -> Option<u64> {
    (view.path() == b"/explain" && view.method == Method::Post).then_some(explain::MOST_BYTES)
}

/// The response to bytes that could not be read as a request.
pub fn unreadable(why: Unread) -> AdminResponse {
    match why {
        Unread::TooLarge => text(431, "The request head is larger than 16 KiB.\n"),
        Unread::TargetTooLong => text(414, "The request target is longer than 4 KiB.\n"),
        Unread::BodyTooLarge => text(413, "The request body is larger than 128 KiB.\n"),
        Unread::TooSlow => text(408, "The request head, or its body, was not complete after 5 seconds.\n"),
        Unread::Malformed(HeadFault::RequestLine) => {
            text(400, "Malformed request: expected `GET /healthz HTTP/1.1` or HTTP/1.0, CRLF line ends, no TLS.\n")
        }
        Unread::Malformed(fault) => text(400, &format!("Malformed request: {fault}.\n")),
    }
}

/// What a reload is in the audit log.
pub fn audited_reload(result: &Result<Reloaded, String>) -> AuditedAction {
    match result {
        Ok(Reloaded { applied, restart }) => {
            let same = applied.is_empty() && restart.is_empty();
            let result = if same { AuditResult::Unchanged } else { AuditResult::Done };
            AuditedAction::new("reload", result)
                .with("applied", applied.as_slice())
                .with("restart_needed", restart.as_slice())
        }
        Err(why) => AuditedAction::new("reload", AuditResult::Failed).with("errors", why.lines().collect::<Vec<_>>()),
    }
}

/// The response to a reload.
pub fn reloaded(result: Result<Reloaded, String>, json: bool) -> AdminResponse {
    let status = if result.is_ok() { 200 } else { 500 };
    if json {
        let word = match &result {
            Ok(reloaded) if reloaded.restart.is_empty() => "reloaded",
            Ok(_) => "restart_needed",
            Err(_) => "failed",
        };
        let (errors, done) = match result {
            Ok(done) => (Vec::new(), done),
            Err(why) => (why.lines().map(str::to_owned).collect(), Reloaded::default()),
        };
        let body = serde_json::json!({
            "result": word,
            "applied": done.applied,
            "restart_needed": done.restart,
            "errors": errors,
        });
        return AdminResponse { status, content_type: "application/json", allow: None, body: format!("{body:#}\n") };
    }
    match result {
        Ok(Reloaded { restart, applied }) if restart.is_empty() && applied.is_empty() => text(status, "reloaded\n"),
        Ok(Reloaded { restart, applied }) if restart.is_empty() => {
            text(status, &format!("reloaded; changed and in force: {}\n", applied.join(", ")))
        }
        Ok(Reloaded { restart, .. }) => {
            let keys = restart.join(", ");
            text(status, &format!("reloaded, but these changes need a restart and are not in force: {keys}\n"))
        }
        Err(why) => text(status, &format!("nothing changed: {why}\n")),
    }
}

/// What an upgrade is in the audit log.
pub fn audited_upgrade(result: &Result<Upgraded, String>) -> AuditedAction {
    match result {
        Ok(Upgraded { pid, .. }) => AuditedAction::new("upgrade", AuditResult::Done).with("pid", *pid),
        Err(why) => AuditedAction::new("upgrade", AuditResult::Failed).with("errors", why.lines().collect::<Vec<_>>()),
    }
}

/// The response to an upgrade.
pub fn upgraded(result: Result<Upgraded, String>, json: bool) -> AdminResponse {
    let status = if result.is_ok() { 200 } else { 500 };
    if json {
        let body = match result {
            Ok(Upgraded { pid, replaced }) => {
                serde_json::json!({ "result": "upgraded", "pid": pid, "replaced": replaced, "errors": [] })
            }
            Err(why) => serde_json::json!({ "result": "failed", "errors": why.lines().collect::<Vec<_>>() }),
        };
        return AdminResponse { status, content_type: "application/json", allow: None, body: format!("{body:#}\n") };
    }
    match result {
        Ok(Upgraded { pid, replaced }) => text(
            status,
            &format!(
                "upgraded: process {pid} accepts connections, process {replaced} completes its requests and ends\n"
            ),
        ),
        Err(why) => text(status, &format!("nothing changed: {why}\n")),
    }
}

fn wants_json(view: &RequestView<'_>) -> bool {
    let mut accepted = view.fields.iter().filter(|field| field.name.eq_ignore_ascii_case(b"accept"));
    accepted.any(|field| memchr::memmem::find(&field.value.to_ascii_lowercase(), b"application/json").is_some())
}

fn not_allowed(methods: &'static str) -> Action {
    text(405, &format!("Method not allowed; use {methods}. GET / lists the available requests.\n"))
        .allowing(methods)
        .into()
}

fn readiness(operator: &Operator<'_>) -> AdminResponse {
    if operator.ready { text(200, "ready\n") } else { text(503, "draining\n") }
}

fn metrics(operator: &Operator<'_>) -> AdminResponse {
    let (valid, invalid) = operator.pipeline.authenticator.cache_sizes();
    operator.metrics.cache_entries(valid, invalid);
    operator.metrics.ready(operator.ready);
    operator.upstreams.iter().for_each(|upstream| upstream.publish());
    match operator.metrics.render() {
        Ok(body) => {
            AdminResponse { status: 200, content_type: "text/plain; version=0.0.4; charset=utf-8", allow: None, body }
        }
        Err(error) => text(500, &format!("the metrics cannot be rendered: {error}\n")),
    }
}

fn status(operator: &Operator<'_>) -> AdminResponse {
    let (valid, invalid) = operator.pipeline.authenticator.cache_sizes();
    let body = serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "ready": operator.ready,
        "started": rfc3339(operator.started_unix_ms / 1000),
        "uptime_seconds": operator.now.unix_ms.saturating_sub(operator.started_unix_ms) / 1000,
        "store": operator.pipeline.authenticator.store_names(),
        "hears_of_changes": operator.pipeline.authenticator.hears(operator.now),
        "cache": { "valid": valid, "invalid": invalid },
        "requests_in_flight": operator.metrics.requests_in_flight(),
        "routes": operator.pipeline.rules.routes.iter().map(|route| &route.name).collect::<Vec<_>>(),
    });
    AdminResponse { status: 200, content_type: "application/json", allow: None, body: format!("{body:#}\n") }
}

fn upstreams(operator: &Operator<'_>) -> AdminResponse {
    let server = |upstream: &Upstream, Member { server, weight, backup, .. }: &Member| {
        let state = server.state();
        let (limit, adaptive) = upstream.limit_of(server);
        let age = operator.instant.saturating_duration_since(state.since).as_secs();
        serde_json::json!({
            "server": server.label(),
            "addresses": server.addresses().map(|address| address.to_string()).collect::<Vec<_>>(),
            "up": state.down.is_none(),
            "reason": state.down.map(|reason| reason.as_str()),
            "since": rfc3339((operator.now.unix_ms / 1000).saturating_sub(age)),
            "unanswered": state.unanswered,
            "draining": server.is_drained(),
            "in_flight": server.in_flight(),
            "max_requests": limit,
            "adaptive": adaptive.map(|reading| serde_json::json!({
                "unloaded_ms": reading.unloaded.map(|unloaded| unloaded.as_secs_f64() * 1000.0),
                "samples": reading.samples,
                "pinned": reading.is_pinned,
            })),
            "weight": weight,
            "backup": backup,
        })
    };
    let upstream = |upstream: &&Upstream| {
        let members = upstream.members();
        serde_json::json!({
            "upstream": upstream.name(),
            "servers": members.iter().map(|member| server(upstream, member)).collect::<Vec<_>>(),
        })
    };
    let body = serde_json::Value::from(operator.upstreams.iter().map(upstream).collect::<Vec<_>>());
    AdminResponse { status: 200, content_type: "application/json", allow: None, body: format!("{body:#}\n") }
}

/// Who makes the traffic.
fn top(query: Option<&[u8]>, operator: &Operator<'_>) -> AdminResponse {
    let (mut seconds, mut most) = (60, 10);
    for pair in query.unwrap_or_default().split(|byte| *byte == b'&').filter(|pair| !pair.is_empty()) {
        let pair = std::str::from_utf8(pair).ok().and_then(|pair| pair.split_once('='));
        match pair.and_then(|(name, value)| Some((name, value.parse::<u16>().ok()?))) {
            Some(("seconds", value @ 1..=600)) => seconds = value.into(),
            Some(("n", value @ 1..=100)) => most = value.into(),
            _ => return text(400, "Expected ?seconds= from 1 to 600 and &n= from 1 to 100.\n"),
        }
    }
    let hitters = operator.metrics.heavy_hitters();
    let ranking = hitters.ranking(operator.instant, Duration::from_secs(seconds), most);
    let numbers = |sums: &HitterSums| {
        serde_json::json!({
            "requests": sums.requests,
            "bytes": sums.bytes,
            "refusals": sums.refusals,
            "backend_seconds": sums.backend.as_secs_f64(),
        })
    };
    let mut body = serde_json::json!({
        "seconds": ranking.covers.as_secs(),
        "sampled": ranking.sampled,
        "all": numbers(&ranking.all),
    });
    for (kind, lists) in HitterKind::ALL.iter().zip(&ranking.lists) {
        for (measure, list) in HitterMeasure::ALL.iter().zip(lists) {
            let hitter = |hitter: &HeavyHitter| {
                let mut entry = numbers(&hitter.sums);
                entry[kind.as_str()] = hitter.name.as_str().into();
                entry
            };
            body[format!("{}s", kind.as_str())][format!("by_{}", measure.as_str())] = list.iter().map(hitter).collect();
        }
    }
    AdminResponse { status: 200, content_type: "application/json", allow: None, body: format!("{body:#}\n") }
}

fn guessing(operator: &Operator<'_>) -> AdminResponse {
    let guard = &operator.pipeline.guessing;
    let mut episodes = guard.episodes(operator.now);
    // Those who are refused most first; a longer list helps nobody.
    episodes.sort_by_key(|episode| std::cmp::Reverse(episode.refused));
    let listed = episodes.iter().take(MOST_GUESSING_LISTED).map(|episode| {
        serde_json::json!({
            "client": GuessEpisode::name(&episode.network),
            "since": rfc3339(episode.began.unix_ms / 1000),
            "failed_tokens": episode.failures,
            "turns": episode.turns,
            "refused": episode.refused,
            "pauses": episode.pauses,
            "pause_seconds_left": episode.retry_after,
        })
    });
    let body = serde_json::json!({
        "watching": guard.settings().is_some(),
        "addresses": episodes.len(),
        "clients": listed.collect::<Vec<_>>(),
    });
    AdminResponse { status: 200, content_type: "application/json", allow: None, body: format!("{body:#}\n") }
}

/// Forgets the failed tokens of an address, or of all.
fn lift(query: Option<&[u8]>, operator: &Operator<'_>) -> Action {
    let value = query.map(|query| query.strip_prefix(b"client=").and_then(|value| std::str::from_utf8(value).ok()));
    let client = match value {
        None => None,
        Some(value) => {
            let decoded = percent_encoding::percent_decode_str(value.unwrap_or_default()).decode_utf8_lossy();
            let Ok(client) = decoded.parse::<IpAddr>() else {
                let why =
                    "Expected ?client= and an address as GET /guessing lists it, without the length of its network.\n";
                return Action::Changed(text(400, why), AuditedAction::new("guessing_lift", AuditResult::Refused));
            };
            Some(client.to_canonical())
        }
    };
    let lifted = operator.pipeline.guessing.lift(client, operator.now);
    for episode in lifted.iter().take(MOST_GUESSING_LISTED) {
        log::warn!("{}", episode.end("may send failed tokens again, by a request of the admin listener", operator.now));
    }
    let body = serde_json::json!({ "result": "lifted", "addresses": lifted.len() });
    let answer =
        AdminResponse { status: 200, content_type: "application/json", allow: None, body: format!("{body:#}\n") };
    let result = if lifted.is_empty() { AuditResult::Unchanged } else { AuditResult::Done };
    let action = AuditedAction::new("guessing_lift", result)
        .with("client", client.map_or("all".to_owned(), |client| client.to_string()))
        .with("addresses", lifted.len());
    Action::Changed(answer, action)
}

/// A request to drain a server, or to end that.
struct DrainCall {
    upstream: String,
    server: String,
    drained: bool,
}

/// Reads `/upstreams/NAME/servers/ADDRESS/drain`. The address of a Unix socket has slashes of its own.
fn drain_call(path: &[u8]) -> Option<DrainCall> {
    let (upstream, rest) = std::str::from_utf8(path).ok()?.strip_prefix("/upstreams/")?.split_once("/servers/")?;
    let (server, word) = rest.rsplit_once('/')?;
    let drained = match word {
        "drain" => true,
        "undrain" => false,
        _ => return None,
    };
    let decoded = |text| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
    Some(DrainCall { upstream: decoded(upstream), server: decoded(server), drained })
}

fn drain(call: &DrainCall, operator: &Operator<'_>) -> Action {
    let DrainCall { upstream, server, drained } = call;
    let action = if *drained { "drain" } else { "undrain" };
    let pool = operator.upstreams.iter().find(|pool| pool.name() == upstream);
    let Some((known, changed)) = pool.and_then(|pool| pool.drain(server, *drained, operator.instant)) else {
        let answer = text(404, "There is no such server. GET /upstreams lists them.\n");
        // The names are whatever the client sent.
        return Action::Changed(answer, AuditedAction::new(action, AuditResult::Refused));
    };
    if changed {
        let what = if *drained { "is drained: it gets no new requests" } else { "is no longer drained" };
        log::warn!("upstream {upstream}: server {server} {what}");
    }
    let body = serde_json::json!({
        "result": if *drained { "draining" } else { "undrained" },
        "upstream": upstream,
        "server": server,
        "in_flight": known.in_flight(),
    });
    let answer =
        AdminResponse { status: 200, content_type: "application/json", allow: None, body: format!("{body:#}\n") };
    let result = if changed { AuditResult::Done } else { AuditResult::Unchanged };
    let action = AuditedAction::new(action, result)
        .with("upstream", upstream.as_str())
        .with("server", server.as_str())
        .with("in_flight", known.in_flight());
    Action::Changed(answer, action)
}

fn forget(query: Option<&[u8]>, operator: &Operator<'_>) -> Action {
    let changed = |answer, result| (answer, AuditedAction::new("cache_forget", result));
    let authenticator = &operator.pipeline.authenticator;
    let Some(query) = query else {
        authenticator.forget_all();
        let (answer, action) = changed(
            text(200, "cache cleared; every token is looked up again on its next request\n"),
            AuditResult::Done,
        );
        return Action::Changed(answer, action.with("tokens", "all"));
    };
    let value = [b"sha256=".as_slice(), b"id=", b"token="].into_iter().find_map(|key| query.strip_prefix(key));
    let hex = value.and_then(|value| std::str::from_utf8(value).ok()).unwrap_or_default();
    let Some(prefix) = DigestPrefix::from_hex(hex) else {
        let why = "Expected ?sha256= and the first 12 to 64 hex digits of the token's SHA-256; the access log's field \
                   `token` has the first 12. Do not send the token itself.\n";
        // What was sent may be a token.
        let (answer, action) = changed(text(400, why), AuditResult::Refused);
        return Action::Changed(answer, action);
    };
    let removed = authenticator.forget_prefix(&prefix);
    let answer = match removed {
        0 => text(200, "no such token in the cache; its next request asks the store\n"),
        1 => text(200, "1 token removed; it is looked up again on its next request\n"),
        count => text(200, &format!("{count} tokens removed; they are looked up again on their next request\n")),
    };
    let result = if removed == 0 { AuditResult::Unchanged } else { AuditResult::Done };
    let (answer, action) = changed(answer, result);
    Action::Changed(answer, action.with("token", hex.get(..12).unwrap_or_default()).with("removed", removed))
}

/// Whether a Host is an address, localhost or one of the configured names, with any port.
fn is_own_name(host: &[u8], hosts: &[String]) -> bool {
    let Ok(host) = std::str::from_utf8(host) else { return false };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    let plain = name.strip_suffix('.').unwrap_or(name);
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<IpAddr>().is_ok()
        || hosts.iter().any(|own| own.eq_ignore_ascii_case(plain))
}

/// Whether an origin is this listener's own: its scheme and the request's Host.
fn is_own_origin(origin: &[u8], host: &[u8]) -> bool {
    let lower = |bytes: &[u8]| bytes.to_ascii_lowercase();
    let (origin, host) = (lower(origin), lower(host));
    let without_port = |host: &[u8]| host.strip_suffix(b":80").unwrap_or(host).to_vec();
    origin.strip_prefix(b"http://").is_some_and(|own| !own.is_empty() && without_port(own) == without_port(&host))
}

fn text(status: u16, body: &str) -> AdminResponse {
    AdminResponse { status, content_type: "text/plain; charset=utf-8", allow: None, body: body.into() }
}

impl From<AdminResponse> for Action {
    fn from(answer: AdminResponse) -> Self {
        Self::Respond(answer)
    }
}

impl AdminResponse {
    fn allowing(self, methods: &'static str) -> Self {
        Self { allow: Some(methods), ..self }
    }

    pub fn render(&self, head_only: bool, close: bool) -> Vec<u8> {
        let phrase = match self.status {
            200 => "OK",
            400 => "Bad Request",
            403 => "Forbidden",
            404 => "Not Found",
            405 => "Method Not Allowed",
            408 => "Request Timeout",
            413 => "Request Entity Too Large",
            414 => "URI Too Long",
            415 => "Unsupported Media Type",
            431 => "Request Header Fields Too Large",
            503 => "Service Unavailable",
            _ => "Internal Server Error",
        };
        let connection = if close { "close" } else { "keep-alive" };
        let mut out = format!(
            "HTTP/1.1 {} {phrase}\r\nContent-Type: {}\r\nContent-Length: {}\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: {connection}\r\n",
            self.status,
            self.content_type,
            self.body.len(),
        );
        if let Some(methods) = self.allow {
            out += &format!("Allow: {methods}\r\n");
        }
        out += "\r\n";
        if !head_only {
            out += &self.body;
        }
        out.into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_own_names() {
        let hosts = ["tollgate.internal".to_owned(), "tollgate".to_owned()];
        for host in [
            "localhost",
            "LocalHost:9090",
            "127.0.0.1:9090",
            "[::1]:9090",
            "10.0.0.5",
            "tollgate.internal:9090",
            "TOLLGATE.internal",
            "tollgate.internal.:9090",
            "tollgate",
        ] {
            assert!(is_own_name(host.as_bytes(), &hosts), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:9090",
            "127.0.0.1.evil.example",
            "",
            ".",
            ":9090",
            "internal",
            "x.tollgate.internal",
            "tollgate.internal.evil.example",
            "tollgate.internal:9090:1",
        ] {
            assert!(!is_own_name(host.as_bytes(), &hosts), "{host}");
        }
        assert!(!is_own_name(b"tollgate", &[]));
    }

    #[test]
    fn an_origin_is_scheme_and_host() {
        for (origin, host) in [
            ("http://127.0.0.1:9090", "127.0.0.1:9090"),
            ("HTTP://LOCALHOST:9090", "localhost:9090"),
            ("http://[::1]:9090", "[::1]:9090"),
            ("http://tollgate", "tollgate:80"),
        ] {
            assert!(is_own_origin(origin.as_bytes(), host.as_bytes()), "{origin} {host}");
        }
        for (origin, host) in [
            ("https://127.0.0.1:9090", "127.0.0.1:9090"),
            ("http://127.0.0.1:9091", "127.0.0.1:9090"),
            ("http://127.0.0.1", "127.0.0.1:9090"),
            ("http://localhost:9090", "127.0.0.1:9090"),
            ("http://127.0.0.1:9090/", "127.0.0.1:9090"),
            ("http://evil.example", "127.0.0.1:9090"),
            ("http://", ""),
            ("null", "127.0.0.1:9090"),
            ("", "127.0.0.1:9090"),
        ] {
            assert!(!is_own_origin(origin.as_bytes(), host.as_bytes()), "{origin} {host}");
        }
    }

    #[test]
    fn a_reload_says_what_is_in_force_and_what_is_not() {
        let keys = |keys: &[&str]| keys.iter().map(|key| (*key).to_owned()).collect::<Vec<_>>();
        let done = |restart: &[&str]| Ok(Reloaded { applied: keys(&["upstream"]), restart: keys(restart) });
        let broken = || Err("line 1: a\nline 2: b".to_owned());
        let said = |result, json| {
            let answer = reloaded(result, json);
            (answer.status, answer.body)
        };
        assert_eq!(said(done(&[]), false), (200, "reloaded; changed and in force: upstream\n".into()));
        assert_eq!(said(Ok(Reloaded::default()), false), (200, "reloaded\n".into()));
        let (status, body) = said(done(&["server.threads", "server.watch"]), false);
        assert!(status == 200 && body.contains("restart") && body.contains("server.threads, server.watch"), "{body}");
        assert_eq!(said(broken(), false), (500, "nothing changed: line 1: a\nline 2: b\n".into()));
        for (result, status, word) in [
            (done(&[]), 200, "reloaded"),
            (done(&["server.threads"]), 200, "restart_needed"),
            (broken(), 500, "failed"),
        ] {
            let (code, body) = said(result, true);
            let body: serde_json::Value = serde_json::from_str(&body).unwrap();
            assert_eq!((code, body["result"].as_str()), (status, Some(word)));
            assert_eq!(body["errors"].as_array().unwrap().len(), if status == 500 { 2 } else { 0 });
            assert_eq!(body["applied"].as_array().unwrap().len(), if status == 500 { 0 } else { 1 });
        }
    }
}
