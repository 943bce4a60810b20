//! Spans by OTLP over HTTP, with a collector that the test is: what is sent, what is left out, and that a collector that is slow or
//! away costs spans and nothing else.

use crate::harness::*;
use crate::support::*;
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPAN: &str = "00f067aa0ba902b7";

/// Takes ExportTraceServiceRequests over HTTP/1.1.
struct Collector {
    address: SocketAddr,
    spans: Arc<Mutex<Vec<Value>>>,
}

impl Collector {
    fn answering(answer: &'static str) -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").unwrap(), answer)
    }

    fn on(listener: TcpListener, answer: &'static str) -> Self {
        let address = listener.local_addr().unwrap();
        let spans = Arc::new(Mutex::new(Vec::new()));
        let taken = Arc::clone(&spans);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let taken = Arc::clone(&taken);
                std::thread::spawn(move || {
                    let mut reader = BufReader::new(stream);
                    while let Some(body) = request(&mut reader) {
                        taken.lock().unwrap().extend(checked(&body));
                        reader.get_mut().write_all(answer.as_bytes()).unwrap();
                    }
                });
            }
        });
        Self { address, spans }
    }

    fn start() -> Self {
        Self::answering("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
    }

    /// Once there are so many.
    fn spans(&self, count: usize) -> Vec<Value> {
        eventually("spans", || self.spans.lock().unwrap().len() >= count);
        let all = self.spans.lock().unwrap().clone();
        assert_eq!(all.len(), count, "{all:#?}");
        all
    }
}

fn request(reader: &mut BufReader<std::net::TcpStream>) -> Option<Value> {
    let (mut line, mut length, mut json) = (String::new(), 0, false);
    reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
    assert_eq!(line, "POST /v1/traces HTTP/1.1\r\n");
    loop {
        line.clear();
        reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
        let lower = line.trim_end().to_ascii_lowercase();
        match lower.split_once(": ") {
            None => break,
            Some(("content-length", value)) => length = value.parse().unwrap(),
            Some(("content-type", value)) => json = value == "application/json",
            Some(_) => {}
        }
    }
    assert!(json);
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(serde_json::from_slice(&body).unwrap())
}

/// The spans of a request, each checked for what opentelemetry-proto's JSON has to have.
fn checked(body: &Value) -> Vec<Value> {
    let is_hex = |value: &Value, length: usize| {
        let text = value.as_str().unwrap();
        text.len() == length && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let resource = body["resourceSpans"][0]["resource"]["attributes"].as_array().unwrap();
    assert!(resource.iter().any(|a| a["key"] == "service.name" && a["value"]["stringValue"] == "tollgate"));
    let spans = body["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().unwrap();
    for span in spans {
        assert!(is_hex(&span["traceId"], 32) && is_hex(&span["spanId"], 16), "{span}");
        assert!(span.get("parentSpanId").is_none_or(|parent| is_hex(parent, 16)), "{span}");
        let time = |key: &str| span[key].as_str().unwrap().parse::<u64>().unwrap();
        assert!(
            time("startTimeUnixNano") > 1_600_000_000_000_000_000
                && time("endTimeUnixNano") >= time("startTimeUnixNano")
        );
        assert!(!span["name"].as_str().unwrap().is_empty() && span["kind"].is_u64(), "{span}");
        for attribute in span["attributes"].as_array().into_iter().flatten() {
            let value = attribute["value"].as_object().unwrap();
            assert!(attribute["key"].is_string() && value.len() == 1 && value.values().all(Value::is_string), "{span}");
        }
    }
    spans.clone()
}

fn attribute<'a>(span: &'a Value, key: &str) -> Option<&'a str> {
    let found = span["attributes"].as_array()?.iter().find(|attribute| attribute["key"] == key)?;
    found["value"].as_object()?.values().next()?.as_str()
}

fn tracing(collector: SocketAddr, more: &str) -> String {
    format!("[trace]\ncontext = \"make\"\notlp = \"http://{collector}\"\n{more}")
}

fn count(gateway: &Gateway, result: &str) -> f64 {
    gateway.metric(&format!("tollgate_trace_spans_total{{result=\"{result}\"}}"))
}

fn traced(token: &str, flags: &str) -> String {
    let parent = format!("00-{TRACE}-{SPAN}-{flags}");
    format!("GET /api/v3/user?x=secret-of-query HTTP/1.1\nHost: t\nPRIVATE-TOKEN: {token}\ntraceparent: {parent}\n\n")
}

#[test]
fn gate_store_and_upstream_are_spans_of_the_clients_trace() {
    let (upstream, collector) = (Upstream::start(), Collector::start());
    // A store that has to be waited for.
    let store = Store::with([(GOOD, "alice"), (OTHER, "bob")]);
    let mut gateway = Gateway::start(upstream.address, &tracing(collector.address, &store.section()));
    // Not recorded by the client: nothing of it is exported.
    assert_eq!(gateway.ask(&traced(OTHER, "00")).status, 200);
    assert_eq!(gateway.ask(&traced(GOOD, "01")).status, 200);
    assert_eq!(gateway.ask(&traced(BAD, "01")).status, 401);
    let spans = collector.spans(5);
    assert!(spans.iter().all(|span| span["traceId"] == TRACE), "{spans:#?}");
    let named = |name: &str| spans.iter().filter(|span| span["name"] == name).collect::<Vec<_>>();
    let (gates, stores, tries) = (named("GET /api/v3/*"), named("token store"), named("upstream api"));
    assert_eq!((gates.len(), stores.len(), tries.len()), (2, 2, 1), "{spans:#?}");
    for gate in &gates {
        assert_eq!((gate["parentSpanId"].as_str(), &gate["kind"]), (Some(SPAN), &2.into()));
        assert!(stores.iter().any(|store| store["parentSpanId"] == gate["spanId"] && store["kind"] == 3));
    }
    let statuses: BTreeSet<_> = gates.iter().filter_map(|gate| attribute(gate, "http.response.status_code")).collect();
    assert_eq!(statuses, BTreeSet::from(["200", "401"]));
    let good = gates.iter().find(|gate| attribute(gate, "http.response.status_code") == Some("200")).unwrap();
    assert_eq!(tries[0]["parentSpanId"], good["spanId"]);
    assert_eq!(attribute(tries[0], "server.address"), Some(upstream.address.to_string().as_str()));
    // What the backend was told is its parent, is the span of the request to it.
    let seen = upstream.seen();
    let told = seen[1].header("traceparent").unwrap();
    assert_eq!(told, format!("00-{TRACE}-{}-01", tries[0]["spanId"].as_str().unwrap()));
    // With the token in the cache, no store is asked.
    assert_eq!(gateway.ask(&traced(GOOD, "01")).status, 200);
    assert_eq!(collector.spans(7).iter().filter(|span| span["name"] == "token store").count(), 2);
    assert_eq!((count(&gateway, "exported"), count(&gateway, "failed"), count(&gateway, "dropped")), (7.0, 0.0, 0.0));
    let text = serde_json::to_string(&*collector.spans.lock().unwrap()).unwrap();
    assert!(!text.contains(GOOD) && !text.contains("secret-of-query"), "{text}");
    // What waits is sent before the process ends.
    assert_eq!(gateway.ask(&traced(GOOD, "01")).status, 200);
    gateway.signal("TERM");
    assert_eq!(gateway.ended().code(), Some(0));
    assert_eq!(collector.spans(9).len(), 9);
}

#[test]
fn a_share_of_the_traces_that_begin_here_is_recorded() {
    let (upstream, collector) = (Upstream::start(), Collector::start());
    let gateway = Gateway::start(upstream.address, &tracing(collector.address, "sample = 0.0\n"));
    assert_eq!(status(&gateway, GOOD), 200);
    assert!(upstream.only().header("traceparent").unwrap().ends_with("-02"), "the backend is told");
    gateway.rewrite(|text| text.replace("sample = 0.0", "sample = 0.5"));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    upstream.forget();
    for _ in 0..200 {
        assert_eq!(status(&gateway, GOOD), 200);
    }
    let seen = upstream.seen();
    let sampled: BTreeSet<String> = seen
        .iter()
        .filter_map(|seen| seen.header("traceparent")?.strip_suffix("-03")?.split('-').nth(1).map(str::to_owned))
        .collect();
    assert!((60..140).contains(&sampled.len()), "{} of 200", sampled.len());
    let spans = collector.spans(2 * sampled.len());
    let exported: BTreeSet<String> = spans.iter().map(|span| span["traceId"].as_str().unwrap().to_owned()).collect();
    assert_eq!(exported, sampled);
}

#[test]
fn tries_that_failed_are_spans_of_their_own() {
    let (upstream, collector) = (Upstream::start(), Collector::start());
    let dead = free_port();
    let more = tracing(collector.address, "")
        + &format!("[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:{dead}\", \"{}\"]\n", upstream.address);
    let gateway = Gateway::start(upstream.address, &more);
    for _ in 0..2 {
        assert_eq!(gateway.ask(&traced(GOOD, "01")).status, 200);
    }
    eventually("spans", || !collector.spans.lock().unwrap().is_empty());
    let spans = collector.spans(5);
    let tries: Vec<_> = spans.iter().filter(|span| span["name"] == "upstream api").collect();
    let failed: Vec<_> = tries.iter().filter(|span| attribute(span, "error.type") == Some("connect")).collect();
    assert_eq!((tries.len(), failed.len()), (3, 1), "{tries:#?}");
    assert_eq!(
        (&failed[0]["status"]["code"], attribute(failed[0], "server.address")),
        (&2.into(), Some(&*format!("127.0.0.1:{dead}")))
    );
    let ids: BTreeSet<_> = spans.iter().map(|span| span["spanId"].to_string()).collect();
    assert_eq!(ids.len(), spans.len(), "ids are unique");
}

#[test]
fn a_collector_that_is_away_or_silent_costs_spans_and_nothing_else() {
    let upstream = Upstream::start();
    // Away.
    let port = free_port();
    let away = SocketAddr::from(([127, 0, 0, 1], port));
    let gateway = Gateway::start(upstream.address, &tracing(away, ""));
    assert_eq!(status(&gateway, GOOD), 200);
    eventually("they are counted", || count(&gateway, "failed") == 2.0);
    eventually("it is said", || gateway.process_log().contains("spans cannot be exported"));
    // It comes.
    let collector = Collector::on(
        TcpListener::bind(away).unwrap(),
        "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    );
    for round in 1..=2 {
        assert_eq!(status(&gateway, GOOD), 200);
        assert_eq!(collector.spans(2 * round).len(), 2 * round, "a closed connection is replaced");
    }
    eventually("it is said", || gateway.process_log().contains("spans are exported again"));
    // It refuses them.
    let refusing = Collector::answering("HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n");
    gateway.rewrite(|text| text.replace(&away.to_string(), &refusing.address.to_string()));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    assert_eq!(status(&gateway, GOOD), 200);
    eventually("they are counted", || count(&gateway, "failed") == 4.0);
    // It takes connections, and says nothing: the queue is full at some time.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    gateway.rewrite(|text| text.replace(&refusing.address.to_string(), &silent.local_addr().unwrap().to_string()));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    let mut client = gateway.client();
    let mut slowest = Duration::ZERO;
    for _ in 0..3_000 {
        let sent = Instant::now();
        client.send_head(&get(BAD, "/api/v3/user"));
        assert_eq!(client.answer().status, 401);
        slowest = slowest.max(sent.elapsed());
    }
    assert!(slowest < SECOND, "a request waited {slowest:?} for the collector");
    assert!(count(&gateway, "dropped") > 100.0, "{}", count(&gateway, "dropped"));
    let mut gateway = gateway;
    let asked = Instant::now();
    gateway.signal("TERM");
    assert_eq!(gateway.ended().code(), Some(0));
    assert!(asked.elapsed() < 6 * SECOND, "took {:?} to stop", asked.elapsed());
}

#[test]
fn what_cannot_be_exported_to_is_an_error_of_the_configuration() {
    let check = |section: &str| {
        let folder = crate::servers::Folder::new("otlp");
        let text = format!("[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n[trace]\n{section}");
        let path = folder.write("tollgate.toml", &text);
        let output = run(tollgate().args(["check", "--offline", "--config"]).arg(path));
        (output.status.success(), stdout(&output) + &stderr(&output))
    };
    for (section, says) in [
        ("otlp = \"http://127.0.0.1:4318\"", "trace.otlp: needs spans of tollgate's own"),
        ("context = \"make\"\notlp = \"https://127.0.0.1:4318\"", "has TLS"),
        ("context = \"make\"\notlp = \"http://collector\"", "must have a host and a port"),
        ("context = \"make\"\notlp = \"http://u:p@collector:1\"", "must have a host and a port"),
        ("context = \"make\"\notlp = \"collector:4318\"", "is not the URL of a collector"),
        ("sample = 1.5", "must be a number from 0 to 1"),
    ] {
        let (ok, text) = check(section);
        assert!(!ok && text.contains(says), "{section}: {text}");
    }
    let (ok, text) = check("context = \"restart\"\notlp = \"http://[::1]:4318/v1/traces\"\nsample = 0.0001");
    assert!(ok, "{text}");
}
