//! The dashboard and the recorded rates of deploy/, as a real Prometheus evaluates them against a gateway that has seen traffic.

use crate::harness::*;
use crate::servers::prometheus::Prometheus;
use std::collections::BTreeSet;
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
