//! The requests that the admin listener serves, as plain functions. Knows no socket; nothing here is ever served on the
//! API listeners.

mod access;
mod explain;
mod exposition;
mod page;
mod reloads;
mod status;

pub use access::{AdminAccess, AdminTerms};
pub use page::visible;
pub use reloads::{ReloadHistory, ReloadNote, asked_by};
pub use status::{ShownConfig, ShownKey, ShownSection};

use crate::clock::Now;
use crate::explain::RulePlaces;
use crate::pipeline::Pipeline;
use crate::request::head::HeadFault;
use crate::request::view::{Method, RequestView};
use crate::store::credential::DigestPrefix;
use crate::telemetry::audit_log::{AuditResult, AuditedAction};
use crate::telemetry::metrics::{AdminDenial, Metrics};
use crate::upstream::Upstream;
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
    /// Of the listener that was asked.
    pub terms: AdminTerms<'a>,
    /// What the configuration says, without secrets.
    pub config: &'a ShownConfig,
    pub reloads: &'a ReloadHistory,
    pub ready: bool,
    pub started_unix_ms: u64,
    pub now: Now,
    /// The same point in time, as the state of servers has it.
    pub instant: Instant,
}

pub enum Action {
    Respond(AdminResponse),
    /// Refused, whatever was asked for.
    Denied(AdminResponse, AdminDenial),
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

const HTML: &str = "text/html; charset=utf-8";
/// More are counted only.
const MOST_GUESSING_LISTED: usize = 1_000;

const PAGES: &str = "\
GET  /metrics                   metrics for Prometheus
GET  /healthz                   200 while the process serves
GET  /readyz                    200 while requests are taken, 503 while draining
GET  /                          what goes on, as a page, for browsers (Accept: text/html)
GET  /status                    the same as JSON: traffic, servers, stores, cache, limits, configuration
GET  /status?series             with the numbers of each 10 seconds and each 10 minutes
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
    if let Err((denial, answer)) = access::judge(view, &operator.terms) {
        return Action::Denied(answer, denial);
    }
    let reads = matches!(view.method, Method::Get | Method::Head);
    match (view.path(), view.method) {
        (b"/", _) if reads && accepts(view, b"text/html") => html(page::render(&status::report(operator, true))).into(),
        (b"/", _) if reads => text(200, PAGES).into(),
        // The default request of HAProxy's `option httpchk`.
        (b"/", Method::Options) => readiness(operator).allowing("GET, HEAD, OPTIONS").into(),
        (b"/metrics", _) if reads => metrics(view, operator).into(),
        (b"/healthz", _) if reads => text(200, "ok\n").into(),
        (b"/readyz", _) if reads => readiness(operator).into(),
        (b"/status", _) if reads => json(&status::report(operator, view.query() == Some(b"series"))).into(),
        (b"/upstreams", _) if reads => json(&status::upstreams(operator)).into(),
        (b"/reload", Method::Post) => Action::Reload { json: wants_json(view) },
        (b"/upgrade", Method::Post) => Action::Upgrade { json: wants_json(view) },
        (b"/top", _) if reads => top(view.query(), operator).into(),
        (b"/guessing", _) if reads => json(&status::guessing(operator, MOST_GUESSING_LISTED)).into(),
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

/// The most bytes of a body that are to be read. `None`: none of it. Who may not ask is not waited for.
pub fn takes_body(view: &RequestView<'_>, terms: &AdminTerms<'_>) -> Option<u64> {
    let takes = view.path() == b"/explain" && view.method == Method::Post && access::judge(view, terms).is_ok();
    takes.then_some(explain::MOST_BYTES)
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
    accepts(view, b"application/json")
}

fn accepts(view: &RequestView<'_>, kind: &[u8]) -> bool {
    let mut accepted = view.fields.iter().filter(|field| field.name.eq_ignore_ascii_case(b"accept"));
    accepted.any(|field| memchr::memmem::find(&field.value.to_ascii_lowercase(), kind).is_some())
}

fn json(body: &serde_json::Value) -> AdminResponse {
    AdminResponse { status: 200, content_type: "application/json", allow: None, body: format!("{body:#}\n") }
}

/// It is given the fields of [`page::FIELDS`] as well.
fn html(body: String) -> AdminResponse {
    AdminResponse { status: 200, content_type: HTML, allow: None, body }
}

fn not_allowed(methods: &'static str) -> Action {
    text(405, &format!("Method not allowed; use {methods}. GET / lists the available requests.\n"))
        .allowing(methods)
        .into()
}

fn readiness(operator: &Operator<'_>) -> AdminResponse {
    if operator.ready { text(200, "ready\n") } else { text(503, "draining\n") }
}

fn metrics(view: &RequestView<'_>, operator: &Operator<'_>) -> AdminResponse {
    let (valid, invalid) = operator.pipeline.authenticator.cache_sizes();
    operator.metrics.cache_entries(valid, invalid);
    operator.metrics.ready(operator.ready);
    operator.upstreams.iter().for_each(|upstream| upstream.publish());
    let accept = view.fields.iter().filter(|field| field.name.eq_ignore_ascii_case(b"accept"));
    let content_type = exposition::wanted(accept.map(|field| field.value));
    let body = match content_type {
        exposition::TEXT => operator.metrics.render(),
        _ => Ok(operator.metrics.render_openmetrics()),
    };
    match body {
        Ok(body) => AdminResponse { status: 200, content_type, allow: None, body },
        Err(error) => text(500, &format!("the metrics cannot be rendered: {error}\n")),
    }
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
    json(&status::top(operator, Duration::from_secs(seconds), most))
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
            401 => "Unauthorized",
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
            "HTTP/1.1 {} {phrase}\r\nContent-Type: {}\r\nContent-Length: {}\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nCross-Origin-Resource-Policy: same-origin\r\nConnection: {connection}\r\n",
            self.status,
            self.content_type,
            self.body.len(),
        );
        if self.content_type == HTML {
            out += page::FIELDS.as_str();
        }
        if exposition::is_chosen(self.content_type) {
            out += "Vary: Accept\r\n";
        }
        if self.status == 401 {
            // Bearer is not named: browsers would not know what to ask for.
            out += "WWW-Authenticate: Basic realm=\"tollgate admin\", charset=\"UTF-8\"\r\n";
        }
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
