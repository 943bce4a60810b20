//! The access log and the metrics of an exchange: who responded, which server, whose token, however it ended.

use crate::harness::{BAD, GOOD, Gateway, Reply, Upstream, eventually, sha256_hex};
use std::net::SocketAddr;

const TARGET: &str = "/api/v3/projects";

fn line(gateway: &Gateway, id: &str) -> serde_json::Value {
    let find = || gateway.access_log().into_iter().find(|entry| entry["request_id"] == id);
    eventually("the line is written", || find().is_some());
    find().unwrap()
}

fn request(target: &str, id: &str, lines: &str) -> String {
    format!("GET {target} HTTP/1.1\nHost: h.test\nX-Request-Id: {id}\n{lines}\n")
}

fn header(token: &str) -> String {
    format!("PRIVATE-TOKEN: {token}\n")
}

#[test]
fn a_line_says_who_answered_and_which_server() {
    let backend = Upstream::answering(|seen| match seen.head.contains("/own") {
        true => Reply::raw("HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"),
        false => Reply::ok("{}"),
    });
    let gateway = Gateway::start(backend.address, "");
    let server = backend.address.to_string();
    assert_eq!(gateway.ask(&request("/api/v3/own", "own-401", &header(GOOD))).status, 401);
    assert_eq!(gateway.ask(&request(TARGET, "gate-401", &header(BAD))).status, 401);
    assert_eq!(gateway.ask(&request(TARGET, "passed", &header(GOOD))).status, 200);
    let own = line(&gateway, "own-401");
    assert_eq!((&own["by"], &own["reason"], &own["upstream_status"]), (&"backend".into(), &"ok".into(), &401.into()));
    let refused = line(&gateway, "gate-401");
    assert_eq!((&refused["by"], &refused["upstream"]), (&"gate".into(), &serde_json::Value::Null));
    let passed = line(&gateway, "passed");
    assert_eq!(passed["upstream_server"], server);
    assert_eq!((&passed["upstream_status"], &passed["attempts"]), (&200.into(), &1.into()));
    let (server_ms, whole_ms) = (passed["upstream_duration_ms"].as_f64(), passed["duration_ms"].as_f64());
    assert!(server_ms > Some(0.0) && server_ms <= whole_ms, "{passed}");
}

#[test]
fn a_refused_request_names_its_token_its_user_and_where_it_stood() {
    let upstream = Upstream::start();
    let tokens = format!(
        "[[token]]\nsha256 = \"{}\"\nuser = \"ann\"\nscopes = [\"read_user\"]\n[[token]]\nsha256 = \"{}\"\nuser = \"eve\"\n\
         revoked = true\n",
        sha256_hex("scoped"),
        sha256_hex("revoked")
    );
    let gateway = Gateway::start_with_tokens(upstream.address, &tokens, "[api]\nscopes = \"gitlab\"\n");
    let id = |token: &str| serde_json::Value::from(&sha256_hex(token)[..12]);
    let null = serde_json::Value::Null;
    // (name, target, fields, status, source, token, user)
    let cases = [
        ("scope", TARGET, header("scoped"), 403, "header", id("scoped"), "ann".into()),
        ("revoked", TARGET, header("revoked"), 401, "header", id("revoked"), null.clone()),
        ("unknown", "/api/v3/user?private_token=guess", String::new(), 401, "query", id("guess"), null.clone()),
        // Malformed, or two of them: there is no id, but the source is known.
        ("bad-byte", TARGET, header("a b"), 401, "header", null.clone(), null.clone()),
        ("conflict", "/api/v3/user?private_token=one", header("two"), 401, "several", null.clone(), null.clone()),
        ("spelling", "/api/v3/user?private_token[]=one", String::new(), 401, "query", null.clone(), null.clone()),
        ("missing", TARGET, String::new(), 401, "none", null.clone(), null.clone()),
        // Refused before the search for a token.
        ("no-route", "/elsewhere", header("scoped"), 404, "header", id("scoped"), null.clone()),
        ("dots", "/api/v3/../x", header("scoped"), 400, "header", id("scoped"), null.clone()),
        ("override", TARGET, header("scoped") + "X-HTTP-Method-Override: PUT\n", 400, "header", id("scoped"), null),
    ];
    for (name, target, fields, status, source, token, user) in cases {
        assert_eq!(gateway.ask(&request(target, name, &fields)).status, status, "{name}");
        let line = line(&gateway, name);
        assert_eq!((&line["source"], &line["token"], &line["user"]), (&source.into(), &token, &user), "{name}: {line}");
        assert_eq!((&line["by"], &line["status"]), (&"gate".into(), &status.into()), "{name}");
    }
}

#[test]
fn a_failed_attempt_is_counted_although_the_next_one_succeeds() {
    let upstream = Upstream::start();
    let dead = SocketAddr::from(([127, 0, 0, 1], crate::servers::free_port()));
    let servers = format!("[[upstream]]\nname = \"api\"\nservers = [\"{dead}\", \"{}\"]\n", upstream.address);
    let gateway = Gateway::start(upstream.address, &servers);
    for index in 0..10 {
        assert_eq!(gateway.ask(&request(TARGET, &format!("try-{index}"), &header(GOOD))).status, 200);
    }
    let failed = gateway.metric("tollgate_upstream_errors_total{kind=\"connect\",upstream=\"api\"}");
    assert_eq!(failed, 1.0, "the server is left alone after its first failure");
    assert_eq!(gateway.metric("tollgate_upstream_retries_total{upstream=\"api\"}"), failed);
    let lines: Vec<_> = (0..10).map(|index| line(&gateway, &format!("try-{index}"))).collect();
    assert!(lines.iter().all(|line| line["upstream_server"] == upstream.address.to_string()), "{lines:?}");
    let retried = lines.iter().filter(|line| line["attempts"] == 2).count();
    assert_eq!(retried as f64, failed, "{lines:?}");
    // No request failed: the log has no outage.
    assert!(!gateway.process_log().contains("requests are failing"), "{}", gateway.process_log());
    let duration = "tollgate_request_duration_seconds_count{route=\"/api/v3/*\"}";
    assert_eq!(gateway.metric(duration), 10.0);
}

#[test]
fn an_answer_that_breaks_off_is_the_backends_and_one_that_never_came_is_ours() {
    let backend = Upstream::answering(|seen| match seen.head.contains("/cut") {
        true => Reply::raw("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf").then_close(),
        false => Reply::raw("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n").then_close(),
    });
    let gateway = Gateway::start(backend.address, "");
    let mut client = gateway.client();
    client.send_head(&request("/api/v3/cut", "cut", &header(GOOD)));
    let _ = client.try_answer();
    assert_eq!(gateway.ask(&request("/api/v3/doubt", "doubt", &header(GOOD))).status, 502);
    let cut = line(&gateway, "cut");
    assert_eq!((&cut["by"], &cut["status"]), (&"backend".into(), &200.into()), "{cut}");
    assert_ne!(cut["reason"], "ok", "{cut}");
    let doubt = line(&gateway, "doubt");
    assert_eq!((&doubt["by"], &doubt["status"], &doubt["upstream_status"]), (&"gate".into(), &502.into(), &200.into()));
    assert_eq!(doubt["reason"], "upstream_malformed");
}

/// However a request ends, it is one log line and one count.
#[test]
fn each_exchange_is_counted_and_logged_once() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let requests = [
        (request(TARGET, "ok", &header(GOOD)), 200),
        (request(TARGET, "bad", &header(BAD)), 401),
        (request("/elsewhere", "route", &header(GOOD)), 404),
        ("GET / HTTP/9.9\n\n".to_owned(), 400),
        (
            format!(
                "POST {TARGET} HTTP/1.1\nHost: t\nX-Request-Id: body\n{}Content-Type: application/x-www-form-urlencoded\n\
                  Transfer-Encoding: chunked\n\n15\nprivate_token=another\n0\n\n",
                header(GOOD)
            ),
            401,
        ),
    ];
    for (request, status) in &requests {
        assert_eq!(gateway.ask(request).status, *status, "{request}");
    }
    let counted = || {
        let metrics = gateway.metrics();
        let values = metrics.lines().filter(|line| line.starts_with("tollgate_requests_total{"));
        values.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>()
    };
    eventually("all are over", || counted() == requests.len() as f64);
    eventually("all are logged", || gateway.access_log().len() == requests.len());
    let verdicts: f64 = gateway
        .metrics()
        .lines()
        .filter(|line| line.starts_with("tollgate_auth_total{"))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum();
    // A request whose body was refused counts as a refusal, and not as valid as well.
    assert_eq!(verdicts, 3.0, "{}", gateway.metrics());
}
