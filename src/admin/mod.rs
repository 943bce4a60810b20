//! What the operator may ask on the admin listener, as plain functions. Knows no socket; nothing here is ever served on
//! the API listeners.

use crate::Now;
use crate::identity::credential::Digest;
use crate::identity::store::rfc3339;
use crate::pipeline::Pipeline;
use crate::request::view::{FieldKind, Method, RequestView};

/// What the answers are made of.
pub struct Operator<'a> {
    pub pipeline: &'a Pipeline,
    pub ready: bool,
    pub started_unix_ms: u64,
    pub now: Now,
}

pub enum Action {
    Answer(Answer),
    /// Load the configuration anew and answer with [`reloaded`].
    Reload,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    status: u16,
    content_type: &'static str,
    body: String,
}

const PAGES: &str = "\
GET  /metrics                   metrics for Prometheus
GET  /healthz                   200 while the process serves
GET  /readyz                    200 while requests are taken, 503 while draining
GET  /status                    version, uptime, store and cache as JSON
POST /reload                    load the configuration anew
POST /cache/forget              forget every token that was looked up
POST /cache/forget?sha256=HEX   forget one token
";

pub fn respond(view: &RequestView<'_>, operator: &Operator<'_>) -> Action {
    // A page in a browser can make it send requests here under a name that resolves to this machine.
    if !is_local_name(view.host) {
        return text(403, "This listener answers to an IP address or localhost only.\n").into();
    }
    if view.fields_of(FieldKind::Origin).next().is_some() {
        return text(403, "This listener does not answer to web pages.\n").into();
    }
    let reads = matches!(view.method, Method::Get | Method::Head);
    match (view.path(), view.method) {
        (b"/", _) if reads => text(200, PAGES).into(),
        (b"/metrics", _) if reads => metrics(operator).into(),
        (b"/healthz", _) if reads => text(200, "ok\n").into(),
        (b"/readyz", _) if reads && operator.ready => text(200, "ready\n").into(),
        (b"/readyz", _) if reads => text(503, "draining\n").into(),
        (b"/status", _) if reads => status(operator).into(),
        (b"/reload", Method::Post) => Action::Reload,
        (b"/cache/forget", Method::Post) => forget(view.query(), operator).into(),
        (b"/" | b"/metrics" | b"/healthz" | b"/readyz" | b"/status" | b"/reload" | b"/cache/forget", _) => {
            text(405, "Method not allowed; GET / lists what there is.\n").into()
        }
        _ => text(404, "Not found; GET / lists what there is.\n").into(),
    }
}

/// The answer to a reload.
pub fn reloaded(result: Result<(), String>) -> Answer {
    match result {
        Ok(()) => text(200, "reloaded\n"),
        Err(why) => text(500, &format!("nothing changed: {why}\n")),
    }
}

fn metrics(operator: &Operator<'_>) -> Answer {
    let (valid, invalid) = operator.pipeline.authenticator.cache_sizes();
    operator.pipeline.metrics.cache_entries(valid, invalid);
    operator.pipeline.metrics.ready(operator.ready);
    match operator.pipeline.metrics.render() {
        Ok(body) => Answer { status: 200, content_type: "text/plain; version=0.0.4; charset=utf-8", body },
        Err(error) => text(500, &format!("metrics can't be rendered: {error}\n")),
    }
}

fn status(operator: &Operator<'_>) -> Answer {
    let (valid, invalid) = operator.pipeline.authenticator.cache_sizes();
    let body = serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "ready": operator.ready,
        "started": rfc3339(operator.started_unix_ms / 1000),
        "uptime_seconds": operator.now.unix_ms.saturating_sub(operator.started_unix_ms) / 1000,
        "store": operator.pipeline.authenticator.store_names(),
        "hears_of_changes": operator.pipeline.authenticator.hears(operator.now),
        "cache": { "valid": valid, "invalid": invalid },
        "requests_in_flight": operator.pipeline.metrics.requests_in_flight(),
        "routes": operator.pipeline.rules.routes.iter().map(|route| &route.name).collect::<Vec<_>>(),
    });
    Answer { status: 200, content_type: "application/json", body: format!("{body:#}\n") }
}

fn forget(query: Option<&[u8]>, operator: &Operator<'_>) -> Answer {
    let authenticator = &operator.pipeline.authenticator;
    let Some(query) = query else {
        authenticator.forget_all();
        return text(200, "every token is looked up anew\n");
    };
    let hex = query.strip_prefix(b"sha256=").and_then(|hex| std::str::from_utf8(hex).ok());
    match hex.and_then(Digest::from_hex) {
        Some(digest) => {
            authenticator.forget(&digest);
            text(200, &format!("token {} is looked up anew\n", digest.id()))
        }
        None => text(400, "say ?sha256= and the 64 hex digits of the token's SHA-256\n"),
    }
}

fn is_local_name(host: &[u8]) -> bool {
    let Ok(host) = std::str::from_utf8(host) else { return false };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    name.eq_ignore_ascii_case("localhost") || name.parse::<std::net::IpAddr>().is_ok()
}

fn text(status: u16, body: &str) -> Answer {
    Answer { status, content_type: "text/plain; charset=utf-8", body: body.into() }
}

impl From<Answer> for Action {
    fn from(answer: Answer) -> Self {
        Self::Answer(answer)
    }
}

impl Answer {
    pub fn render(&self, head_only: bool, close: bool) -> Vec<u8> {
        let phrase = match self.status {
            200 => "OK",
            400 => "Bad Request",
            403 => "Forbidden",
            404 => "Not Found",
            405 => "Method Not Allowed",
            503 => "Service Unavailable",
            _ => "Internal Server Error",
        };
        let connection = if close { "close" } else { "keep-alive" };
        let mut out = format!(
            "HTTP/1.1 {} {phrase}\r\nContent-Type: {}\r\nContent-Length: {}\r\nCache-Control: no-store\r\nConnection: {connection}\r\n\r\n",
            self.status,
            self.content_type,
            self.body.len(),
        );
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
    fn only_local_names() {
        for host in ["localhost", "LocalHost:9090", "127.0.0.1:9090", "[::1]:9090", "10.0.0.5"] {
            assert!(is_local_name(host.as_bytes()), "{host}");
        }
        for host in ["evil.example", "evil.example:9090", "127.0.0.1.evil.example", ""] {
            assert!(!is_local_name(host.as_bytes()), "{host}");
        }
    }
}
