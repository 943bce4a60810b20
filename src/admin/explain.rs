//! `POST /explain`: what would become of a request here and now. It only looks: no store is asked, no use is noted, nothing is
//! taken from a limit, and no counter of requests moves. It must never repeat or keep a token: the answer has its id, the audit
//! log not even that.

use super::access::is_json;
use super::{Action, AdminResponse, Operator, text};
use crate::explain::{ExplainQuestion, ExplainWorld, Explanation, ToldUpstream, Witness, explain as tell};
use crate::request::origin::{Arrival, TlsArrival};
use crate::request::view::{FieldKind, RequestView};
use crate::telemetry::audit_log::{AuditResult, AuditedAction};
use crate::upstream::Upstream;
use base64::Engine as _;
use serde::Deserialize;
use std::net::IpAddr;
use std::sync::Arc;

/// Of the JSON. All of it is judged several times.
pub(super) const MOST_BYTES: u64 = 128 * 1024;

const USAGE: &str = "Expected Content-Type: application/json and {\"text\": \"GET /api/v3/user HTTP/1.1\\r\\nHost: h\\r\\n\\r\\n\"}: the \
                     bytes of a request as a client sends them, or the same as \"base64\". Besides: \"client\", the address that \
                     it comes from; \"tls\": true; \"as\": {\"user\": \"ann\", \"scopes\": [\"api\"]}, whose token it is taken to have.\n";

/// The form for it, a part of a page, and its script, which the page lets in by a nonce.
pub(super) const EXPLAIN_FORM: &str = include_str!("explain_form.html");
pub(super) const EXPLAIN_SCRIPT: &str = include_str!("explain_form.js");

/// What is asked.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ExplainCall {
    text: Option<String>,
    base64: Option<String>,
    client: Option<IpAddr>,
    #[serde(default)]
    tls: bool,
    #[serde(rename = "as")]
    assumed: Option<AssumedToken>,
}

/// Whose token the request is taken to have.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AssumedToken {
    user: String,
    #[serde(default)]
    scopes: Vec<String>,
}

pub(super) fn explain(view: &RequestView<'_>, operator: &Operator<'_>) -> Action {
    let refused =
        |status, why: &str| Action::Changed(text(status, why), AuditedAction::new("explain", AuditResult::Refused));
    if !view.fields_of(FieldKind::ContentType).any(|field| is_json(field.value)) {
        return refused(415, USAGE);
    }
    // What the parser says could repeat what was sent.
    let Ok(call) = serde_json::from_slice::<ExplainCall>(operator.body) else { return refused(400, USAGE) };
    let bytes = match (call.text, call.base64) {
        (Some(text), None) => text.into_bytes(),
        (None, Some(text)) => match base64::engine::general_purpose::STANDARD.decode(text) {
            Ok(bytes) => bytes,
            Err(_) => return refused(400, USAGE),
        },
        _ => return refused(400, USAGE),
    };
    let witness = match call.assumed {
        Some(AssumedToken { user, scopes }) => Witness::Assumed { user, scopes },
        None => Witness::Cache,
    };
    let arrival = Arrival {
        tls: call.tls.then(|| Arc::new(TlsArrival::default())),
        ..Arrival::of(Some(call.client.unwrap_or(IpAddr::from([127, 0, 0, 1]))))
    };
    let world = ExplainWorld {
        pipeline: operator.pipeline,
        places: operator.places,
        upstreams: operator.upstreams.iter().map(|upstream| told(upstream)).collect(),
        running: true,
    };
    let explanation = tell(&world, &ExplainQuestion { bytes: &bytes, arrival, witness, now: operator.now });
    let action = audited(&explanation);
    let body = serde_json::json!({ "result": "explained", "explanation": explanation });
    let answer =
        AdminResponse { status: 200, content_type: "application/json", allow: None, body: format!("{body:#}\n") };
    Action::Changed(answer, action)
}

/// One line, with nothing of the request that its sender chose.
fn audited(explanation: &Explanation) -> AuditedAction {
    AuditedAction::new("explain", AuditResult::Done)
        .with("verdict", explanation.verdict.as_str())
        .with("reason", explanation.reason.as_str())
        .with("route", explanation.route.as_str())
}

fn told(upstream: &Upstream) -> ToldUpstream {
    let server = |label: &str, down: Option<&str>, drained: bool| match (down, drained) {
        (Some(why), _) => format!("{label} (down: {why})"),
        (None, true) => format!("{label} (drained)"),
        (None, false) => label.to_owned(),
    };
    let servers = upstream.members();
    let servers = servers.iter().map(|member| {
        let state = member.server.state();
        server(member.server.label(), state.down.map(|reason| reason.as_str()), member.server.is_drained())
    });
    ToldUpstream { name: upstream.name().into(), servers: servers.collect(), http2: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The page has a strict policy, and what the gateway says of a request is written by whoever sent it.
    #[test]
    fn the_form_needs_nothing_that_a_strict_page_forbids() {
        for handler in ["onclick", "onsubmit", "onload", "style=", "<script", "javascript:", "action="] {
            assert!(!EXPLAIN_FORM.contains(handler), "{handler}");
        }
        assert!(EXPLAIN_FORM.contains("<noscript>") && !EXPLAIN_FORM.contains("src=\"http"));
        for sink in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "localStorage"] {
            assert!(!EXPLAIN_SCRIPT.contains(sink), "{sink}");
        }
        for name in ["method", "target", "fields", "body", "client", "tls", "user", "scopes"] {
            let (field, read) = (format!("name=\"{name}\""), format!("get(\"{name}\")"));
            assert!(EXPLAIN_FORM.contains(&field) && EXPLAIN_SCRIPT.contains(&read), "{name}");
        }
    }
}
