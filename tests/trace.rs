//! W3C Trace Context through the gateway: what the backend gets, and what the access log says.

use crate::harness::*;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPAN: &str = "00f067aa0ba902b7";

fn request(fields: &str) -> String {
    format!("GET /api/v3/user HTTP/1.1\nHost: t\nPRIVATE-TOKEN: {GOOD}\n{fields}\n")
}

/// What the backend got as traceparent and tracestate, and the last line of the log.
fn told(gateway: &Gateway, upstream: &Upstream, fields: &str) -> (Option<String>, Vec<String>, serde_json::Value) {
    upstream.forget();
    let logged = gateway.access_log().len();
    assert_eq!(gateway.ask(&request(fields)).status, 200);
    let seen = upstream.only();
    eventually("the log line", || gateway.access_log().len() == logged + 1);
    let line = gateway.access_log().remove(logged);
    let all = seen.all("traceparent");
    assert!(all.len() <= 1, "{all:?}");
    (all.first().map(|text| (*text).to_owned()), seen.all("tracestate").into_iter().map(str::to_owned).collect(), line)
}

fn started(context: &str) -> (Gateway, Upstream) {
    let upstream = Upstream::start();
    let section = if context.is_empty() { String::new() } else { format!("[trace]\ncontext = \"{context}\"\n") };
    (Gateway::start(upstream.address, &section), upstream)
}

#[test]
fn a_clients_trace_is_passed_on_by_default_and_a_malformed_one_is_removed() {
    let (gateway, upstream) = started("");
    let parent = format!("00-{TRACE}-{SPAN}-00");
    let fields = format!("TraceParent: {parent}\ntracestate: a=1\nTraceState: b=2\n");
    let (passed, state, line) = told(&gateway, &upstream, &fields);
    assert_eq!((passed, state), (Some(parent.clone()), vec!["a=1".to_owned(), "b=2".to_owned()]));
    assert_eq!(line["trace_id"], TRACE);
    let upper = format!("traceparent: {}\ntracestate: a=1\n", parent.to_ascii_uppercase());
    let repeated = format!("traceparent: {parent}\ntraceparent: {parent}\ntracestate: a=1\n");
    for fields in [upper.as_str(), repeated.as_str(), "tracestate: a=1\n", ""] {
        let (passed, state, line) = told(&gateway, &upstream, fields);
        assert_eq!((passed, state, line.get("trace_id")), (None, Vec::new(), None), "{fields}");
    }
    // A refused request is found by its trace as well.
    let refused = format!("GET /api/v3/user HTTP/1.1\nHost: t\ntraceparent: {parent}\n\n");
    let logged = gateway.access_log().len();
    assert_eq!(gateway.ask(&refused).status, 401);
    eventually("the log line", || gateway.access_log().len() == logged + 1);
    assert_eq!(gateway.access_log()[logged]["trace_id"], TRACE);
}

#[test]
fn a_trace_is_made_where_there_is_none_and_tollgates_span_is_the_backends_parent() {
    let (gateway, upstream) = started("make");
    for flags in ["00", "01"] {
        let fields = format!("traceparent: 00-{TRACE}-{SPAN}-{flags}\ntracestate: a=1\n");
        let (passed, state, line) = told(&gateway, &upstream, &fields);
        let passed = passed.unwrap();
        assert!(passed.starts_with(&format!("00-{TRACE}-")) && passed.ends_with(flags), "{passed}");
        assert!(!passed.contains(SPAN), "the backend's parent is the client's span: {passed}");
        assert_eq!((state, &line["trace_id"]), (vec!["a=1".to_owned()], &TRACE.into()));
    }
    let mut made = std::collections::BTreeSet::new();
    for fields in ["", "tracestate: a=1\n", "traceparent: 00-0\ntracestate: a=1\n"] {
        let (passed, state, line) = told(&gateway, &upstream, fields);
        let passed = passed.unwrap();
        let parts: Vec<&str> = passed.split('-').collect();
        assert_eq!((parts.len(), parts[1].len(), parts[2].len(), parts[3]), (4, 32, 16, "03"), "{passed}");
        assert_eq!((state, line["trace_id"].as_str()), (Vec::new(), Some(parts[1])), "{fields}");
        made.insert(parts[1].to_owned());
    }
    assert_eq!(made.len(), 3, "each request begins a trace of its own");
}

#[test]
fn restart_and_drop_pass_no_clients_trace() {
    let fields = format!("traceparent: 00-{TRACE}-{SPAN}-01\ntracestate: a=1\n");
    let (gateway, upstream) = started("restart");
    let (passed, state, line) = told(&gateway, &upstream, &fields);
    let passed = passed.unwrap();
    assert!(!passed.contains(TRACE) && !passed.contains(SPAN), "{passed}");
    assert_eq!((state, line["trace_id"].as_str()), (Vec::new(), passed.split('-').nth(1)));
    let (gateway, upstream) = started("drop");
    let (passed, state, line) = told(&gateway, &upstream, &fields);
    assert_eq!((passed, state, line.get("trace_id")), (None, Vec::new(), None));
    // Also not by a route.
    let more = "[[route]]\npath = \"/api/v3/x\"\nrequest_headers = { set = {}, remove = [\"traceparent\"] }\n";
    let said = gateway.folder.0.join("other.toml");
    std::fs::write(&said, format!("[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n{more}")).unwrap();
    let output = crate::support::run(tollgate().args(["check", "--config", said.to_str().unwrap()]));
    let text = crate::support::stderr(&output) + &crate::support::stdout(&output);
    assert!(!output.status.success() && text.contains("[trace] context"), "{text}");
}
