//! The dashboard and the recorded rates of deploy/, as a real Prometheus evaluates them against a gateway that has seen traffic; and
//! both formats of the metrics, as others read them.

use crate::harness::*;
use crate::servers::HINT;
use crate::servers::prometheus::Prometheus;
use crate::support::*;
use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, Instant};

/// Panels that show nothing here, because nothing of the kind can happen to this gateway.
const EMPTY_HERE: [&str; 4] = [
    // Its store is a file that does not change.
    "Revocations take effect after",
    // It listens without TLS.
    "Certificates",
    // No lookup fails.
    "Failed lookups",
    "Nobody could tell",
];

/// Title and expression of everything on the dashboard.
fn expressions() -> Vec<(String, String)> {
    let dashboard = std::fs::read_to_string("deploy/grafana/tollgate.json").unwrap();
    let dashboard: serde_json::Value = serde_json::from_str(&dashboard).unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let mut found = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            found.push((text(&panel["title"]), text(&target["expr"])));
        }
    }
    for event in dashboard["annotations"]["list"].as_array().unwrap() {
        found.push((text(&event["name"]), text(&event["expr"])));
    }
    found
}

#[test]
fn every_panel_of_the_dashboard_shows_something() {
    let expressions = expressions();
    assert_eq!(expressions.len(), 47, "a panel was added or is lost");
    let upstream = Upstream::start();
    // Known tokens are looked up again and again: a quantile of lookups needs some between two scrapes.
    let more = "[[limit]]\nname = \"tight\"\nkey = [\"token\"]\nrate = \"300/min\"\nburst = 3\n\
                [guessing]\nfailures = 10\n[pagination]\nmax_per_page = 50\n[cache]\npositive_ttl = \"1s\"\n";
    let gateway = Gateway::start(upstream.address, more);
    let folder = Folder::new("prometheus");
    std::fs::copy("deploy/prometheus/recording.yml", folder.file("recording.yml")).unwrap();
    let prometheus = Prometheus::start(folder, &[gateway.admin.to_string()], &["recording.yml"]);

    let mut missing: BTreeSet<String> = expressions.iter().map(|(title, _)| title.clone()).collect();
    // Events: nothing is shown while nothing happens.
    missing.remove("Not ready");
    EMPTY_HERE.iter().for_each(|title| assert!(missing.remove(*title), "no panel {title}"));
    let mut asked = BTreeSet::new();
    let due = Instant::now() + Duration::from_secs(120);
    while !missing.is_empty() && Instant::now() < due {
        // All kinds of requests, again and again: a rate needs a change.
        for target in ["/api/v3/projects?per_page=500&page=0", "/api/v3/projects", "/nowhere"] {
            gateway.get(target);
            gateway.ask(&format!("GET {target} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {BAD}\n\n"));
            gateway.ask(&format!(
                "GET {target}{}private_token={OTHER} HTTP/1.1\nHost: h\n\n",
                if target.contains('?') { '&' } else { '?' }
            ));
        }
        gateway.signal("HUP");
        for (title, expression) in &expressions {
            // All of them are asked once, since all must be understood; from then on only those that have shown nothing.
            if !asked.insert(expression) && !missing.contains(title) {
                continue;
            }
            let expression = expression
                .replace("$__rate_interval", "10s")
                .replace("[1m]", "[10s]")
                .replace("$job", "tollgate")
                .replace("$instance", ".*");
            let answer = prometheus.query(&expression);
            assert_eq!(answer["status"], "success", "{title}: {expression}: {answer}");
            let results = answer["data"]["result"].as_array().unwrap();
            if results.iter().any(|result| result["value"][1] != "NaN") {
                missing.remove(title);
            }
        }
    }
    assert_eq!(missing, BTreeSet::new(), "these panels show nothing");

    let rules = std::fs::read_to_string("deploy/prometheus/recording.yml").unwrap();
    let names: Vec<&str> = rules.lines().filter_map(|line| line.trim().strip_prefix("- record: ")).collect();
    assert_eq!(names.len(), 8);
    for name in names {
        eventually(name, || !prometheus.query(name)["data"]["result"].as_array().unwrap().is_empty());
    }
}

// ---- The formats, and exemplars ----

const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

fn scrape(gateway: &Gateway, accept: &str) -> Answer {
    let mut client = Client::connect(gateway.admin);
    client.send_head(&format!("GET /metrics HTTP/1.1\nHost: localhost\n{accept}\n"));
    client.answer()
}

/// A gateway that has seen requests of all kinds. The first ones had their token in X-Request-Id as well; the next had a name of its own, which
/// breaks the format if it is taken, and a trace that is recorded.
fn busy() -> (Upstream, Gateway) {
    let upstream = Upstream::start();
    let more =
        "[[limit]]\nname = \"tight\"\nkey = [\"token\"]\nrate = \"300/min\"\nburst = 3\n[guessing]\nfailures = 10\n";
    let gateway = Gateway::start(upstream.address, more);
    let ask = |target: &str, token: &str, fields: &str| {
        gateway.ask(&format!("GET {target} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {token}\n{fields}\n")).status
    };
    assert_eq!(ask("/api/v3/projects", GOOD, &format!("X-Request-Id: {GOOD}\n")), 200);
    // Nor here, where nobody gets to look for the token, or where it is one of two.
    assert_eq!(ask("/api/v3/../projects", GOOD, &format!("X-Request-Id: {GOOD}\n")), 400);
    assert_eq!(ask("/api/v3/user", GOOD, &format!("Authorization: Bearer {OTHER}\nX-Request-Id: {GOOD}\n")), 401);
    assert!(gateway.metrics().contains("tollgate_request_duration_seconds_count{route=\"/api/v3/*\"} 2\n"));
    let text = scrape(&gateway, &format!("Accept: {OPENMETRICS}\n")).text();
    assert!(!text.contains(" # {") && !text.contains(GOOD), "a token is no name of a request: {text}");

    let hostile =
        "X-Request-Id: a\"} 1\\n# EOF\ntraceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\n";
    assert_eq!(ask("/api/v3/projects", GOOD, hostile), 200);
    for _ in 0..20 {
        for (target, token) in [("/api/v3/projects?per_page=500", OTHER), ("/api/v3/user", BAD), ("/nowhere", GOOD)] {
            ask(target, token, "traceparent: 00-5bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00\n");
        }
    }
    (upstream, gateway)
}

/// That it names a request of the access log, and says of it what stands there.
fn is_logged(labels: &serde_json::Value, route: &str, seconds: f64, log: &[serde_json::Value]) {
    let line = log.iter().find(|line| line["request_id"] == labels["request_id"]);
    let line = line.unwrap_or_else(|| panic!("no request {labels} in the log"));
    assert_eq!(line["route"].as_str().unwrap_or("none"), route, "{labels} {line}");
    let logged = line["duration_ms"].as_f64().unwrap();
    assert!((seconds * 1000.0 - logged).abs() <= 1.0, "{seconds} s: {line}");
    if let Some(trace) = labels["trace_id"].as_str() {
        assert_eq!(line["trace_id"], trace);
        assert!(trace.starts_with("4bf9"), "only what is recorded can be found: {labels}");
    }
}

#[test]
fn both_formats_say_the_same_and_openmetrics_names_requests() {
    let (_upstream, gateway) = busy();
    gateway.metrics();
    let folder = Folder::new("formats");
    let venv = std::env::var_os("TOLLGATE_PY_VENV").map_or_else(|| repository("target/py-clients"), Into::into);
    let mut reader = Command::new(venv.join("bin/python"));
    reader.arg(repository("tests/clients/metrics.py"));
    for (name, accept, content_type) in [
        ("before", "", TEXT),
        ("openmetrics", "Accept: application/openmetrics-text;version=1.0.0;q=0.5,*/*;q=0.1\n", OPENMETRICS),
        ("after", "Accept: */*\n", TEXT),
    ] {
        let answer = scrape(&gateway, accept);
        assert_eq!((answer.status, answer.header("content-type")), (200, Some(content_type)));
        assert_eq!(answer.header("vary"), Some("Accept"));
        reader.arg(folder.write(name, &answer.text()));
    }
    let output = run(&mut reader);
    assert!(output.status.success(), "{}\n(if a package is missing: {HINT})", stderr(&output));
    let read: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    let count = |name: &str| read[name].as_u64().unwrap();
    assert!(count("families") > 50 && count("series") > 300 && count("values") > 290, "{read}");

    let (log, exemplars) = (gateway.access_log(), read["exemplars"].as_array().unwrap());
    for exemplar in exemplars {
        assert_eq!(exemplar["name"], "tollgate_request_duration_seconds_bucket");
        let seconds = exemplar["value"].as_f64().unwrap();
        assert!(seconds <= exemplar["series"]["le"].as_str().unwrap().parse().unwrap(), "{exemplar}");
        is_logged(&exemplar["labels"], exemplar["series"]["route"].as_str().unwrap(), seconds, &log);
        let age = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64()
            - exemplar["at"].as_f64().unwrap();
        assert!((0.0..120.0).contains(&age), "{exemplar}");
    }
    let routes: BTreeSet<_> = exemplars.iter().map(|exemplar| exemplar["series"]["route"].as_str().unwrap()).collect();
    assert_eq!(routes, BTreeSet::from(["/api/v3/*", "none"]));
    let traced = exemplars.iter().filter(|exemplar| exemplar["labels"]["trace_id"].is_string()).count();
    assert_eq!(traced, 1, "{read}");
}

#[test]
fn prometheus_stores_the_same_series_as_before_and_gives_exemplars_back() {
    let (_upstream, gateway) = busy();
    let prometheus = Prometheus::start(Folder::new("exemplars"), &[gateway.admin.to_string()], &[]);
    let found = || {
        let answer =
            prometheus.api("query_exemplars?query=tollgate_request_duration_seconds_bucket&start=0&end=4102444800");
        assert_eq!(answer["status"], "success", "{answer}");
        answer["data"].as_array().unwrap().clone()
    };
    eventually("Prometheus has an exemplar", || !found().is_empty());
    let (log, mut seen) = (gateway.access_log(), 0);
    for series in found() {
        for exemplar in series["exemplars"].as_array().unwrap() {
            let seconds = exemplar["value"].as_str().unwrap().parse().unwrap();
            is_logged(&exemplar["labels"], series["seriesLabels"]["route"].as_str().unwrap(), seconds, &log);
            seen += 1;
        }
    }
    assert!(seen >= 2, "{seen}");

    // Names of series as in the older format.
    let stored = prometheus.api("label/__name__/values");
    let stored: BTreeSet<&str> =
        stored["data"].as_array().unwrap().iter().filter_map(serde_json::Value::as_str).collect();
    let text = gateway.metrics();
    let names = text.lines().filter(|line| !line.starts_with('#')).map(|line| line.split(['{', ' ']).next().unwrap());
    let names: BTreeSet<&str> = names.collect();
    let scraped: BTreeSet<&str> =
        stored.iter().copied().filter(|name| !name.starts_with("scrape_") && *name != "up").collect();
    assert_eq!(scraped, names);
    // The bound by which an alert finds slow revocations, however it is written.
    let rule = std::fs::read_to_string("deploy/prometheus/alerts.yml").unwrap();
    let bound = rule.split_once("tollgate_revocation_lag_seconds_bucket{le").unwrap().1.split_once('}').unwrap().0;
    let answer = prometheus.query(&format!("count(tollgate_request_duration_seconds_bucket{{le{bound}}})"));
    assert_eq!(answer["data"]["result"][0]["value"][1], "2", "le{bound}: {answer}");
}
