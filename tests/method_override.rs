//! X-HTTP-Method-Override: a POST with another method in this header is refused, or (`token.method_override = "judge"`)
//! checked as that method in every respect, and the same method is forwarded.

use crate::harness::*;
use crate::support::Puma;

const PATH: &str = "/api/v3/projects/1";
const JUDGE: &str = "[token]\nmethod_override = \"judge\"\n";

fn ask(gateway: &Gateway, method: &str, target: &str, lines: &str, body: &str) -> Answer {
    let length = if body.is_empty() { String::new() } else { format!("Content-Length: {}\n", body.len()) };
    let mut client = gateway.client();
    let head = format!("{method} {target} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\n{lines}{length}\n");
    client.send(head.replace('\n', "\r\n").as_bytes());
    client.send(body.as_bytes());
    client.answer_to(method).unwrap()
}

#[test]
fn one_known_method_on_a_post_is_judged_and_passed_on() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, JUDGE);
    for name in ["X-HTTP-Method-Override", "x-http-method-override"] {
        for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] {
            let more = format!("{name}:  {method} \nConnection: X-HTTP-Method-Override\n");
            assert_eq!(ask(&gateway, "POST", PATH, &more, "").status, 200, "{method}");
            let seen = upstream.only();
            assert!(seen.head.starts_with(&format!("POST {PATH} HTTP/1.1\r\n")), "{}", seen.head);
            assert!(seen.head.contains(&format!("\r\nX-HTTP-Method-Override: {method}\r\n")), "{}", seen.head);
            assert_eq!(seen.all("X-HTTP-Method-Override").len(), 1);
            upstream.forget();
        }
    }
    assert_eq!(gateway.metric("tollgate_method_overrides_total"), 12.0);
    let log = gateway.access_log();
    assert!(log.iter().any(|line| line["method"] == "PATCH" && line["method_override"] == true), "{log:?}");
    assert_eq!(ask(&gateway, "POST", PATH, "", "").status, 200);
    assert!(gateway.metric("tollgate_requests_total{method=\"PATCH\",route=\"/api/v3/*\",status=\"2xx\"}") >= 2.0);
}

#[test]
fn everything_else_about_overrides_is_refused() {
    let upstream = Upstream::start();
    let form = "Content-Type: application/x-www-form-urlencoded\n";
    let patch = "X-HTTP-Method-Override: PATCH\n";
    let mut seen = 0;
    for config in ["", JUDGE] {
        let gateway = Gateway::start(upstream.address, config);
        for (method, target, lines, body) in [
            ("POST", PATH, "X-HTTP-Method-Override: PATCH\nX-HTTP-Method-Override: PATCH\n", ""),
            ("POST", PATH, "X-HTTP-Method-Override: PATCH\nX-HTTP-Method: PATCH\n", ""),
            ("POST", PATH, "X-Method-Override: PATCH\nX-HTTP-Method-Override: PATCH\n", ""),
            ("POST", PATH, "X-HTTP-Method: PATCH\n", ""),
            ("POST", PATH, "X-Method-Override: PATCH\n", ""),
            ("POST", PATH, "X-HTTP-Method-Override: patch\n", ""),
            ("POST", PATH, "X-HTTP-Method-Override: PATCH, DELETE\n", ""),
            ("POST", PATH, "X-HTTP-Method-Override: PATCH DELETE\n", ""),
            ("POST", PATH, "X-HTTP-Method-Override: \"PATCH\"\n", ""),
            ("POST", PATH, "X-HTTP-Method-Override: PATCH;\n", ""),
            ("POST", PATH, "X-HTTP-Method-Override:\n", ""),
            ("POST", PATH, "X-HTTP-Method-Override: TRACE\n", ""),
            ("POST", PATH, "X-HTTP-Method-Override: CONNECT\n", ""),
            ("POST", PATH, "X-HTTP-Method-Override: LINK\n", ""),
            // Servers differ in whether the response to such a POST has a body.
            ("POST", PATH, "X-HTTP-Method-Override: HEAD\n", ""),
            ("GET", PATH, patch, ""),
            ("HEAD", PATH, patch, ""),
            ("PUT", PATH, patch, ""),
            ("PATCH", PATH, patch, ""),
            ("DELETE", PATH, patch, ""),
            ("OPTIONS", PATH, patch, ""),
            ("GET", PATH, "X-HTTP-Method-Override: GET\n", ""),
            // In a query, as Symfony and Laravel read it, or in a form, as Rack does.
            ("POST", "/api/v3/projects/1?_method=DELETE", "", ""),
            ("POST", "/api/v3/projects/1?a&%5fmethod=DELETE", "", ""),
            ("POST", "/api/v3/projects/1?.method=DELETE", "", ""),
            ("GET", "/api/v3/projects/1?_method=DELETE", "", ""),
            ("POST", "/api/v3/projects/1?_method=PATCH", patch, ""),
            ("POST", PATH, form, "a=1&_method=DELETE"),
            ("POST", PATH, &format!("{form}{patch}"), "a=1&_method=DELETE"),
        ] {
            let answer = ask(&gateway, method, target, lines, body);
            assert_eq!(answer.status, 400, "{config:?}: {method} {target} {lines}{body}");
            seen += 1;
        }
    }
    assert_eq!(seen, 58);
    let forwarded: Vec<_> = upstream.seen().into_iter().filter(|seen| seen.body.ends_with(b"DELETE")).collect();
    assert_eq!(forwarded.len(), 0);
    // Similar names are unrelated headers and parameters.
    let gateway = Gateway::start(upstream.address, "");
    upstream.forget();
    for (target, lines) in [
        (PATH, "X-HTTP-Method-Overrides: PATCH\n"),
        (PATH, "X-HTTP-Method-Overridden: PATCH\n"),
        ("/api/v3/projects/1?method=DELETE&__method=x&_methods=y&-method=z", ""),
    ] {
        assert_eq!(ask(&gateway, "POST", target, lines, "").status, 200, "{target} {lines}");
        assert_eq!(upstream.only().target, target);
        upstream.forget();
    }
}

#[test]
fn without_judge_one_known_method_is_refused_too() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    for method in ["GET", "POST", "PATCH", "DELETE"] {
        let answer = ask(&gateway, "POST", PATH, &format!("X-HTTP-Method-Override: {method}\n"), "");
        assert_eq!((answer.status, answer.text()), (400, "{\"message\":\"400 Bad Request\"}".into()));
    }
    assert_eq!(upstream.seen().len(), 0);
}

/// Scopes and routes both use the judged method.
#[test]
fn scopes_and_routes_see_the_judged_method() {
    let upstream = Upstream::start();
    let token = |name: &str, scope: &str| {
        format!("[[token]]\nsha256 = \"{}\"\nuser = \"{name}\"\nscopes = [\"{scope}\"]\n", sha256_hex(name))
    };
    let tokens =
        [token("poster-token-1", "poster"), token("patcher-token", "patcher"), token("reader-token-1", "reader")];
    let config = format!(
        "{JUDGE}[[scope]]\nname = \"poster\"\nmethods = [\"POST\"]\n[[scope]]\nname = \"patcher\"\nmethods = [\"PATCH\"]\n\
         [[scope]]\nname = \"reader\"\nmethods = [\"GET\", \"HEAD\"]\n\
         [[route]]\npath = \"/open/x\"\nmethods = [\"POST\"]\nauth = \"none\"\nreason = \"a test\"\n\
         [[route]]\npath = \"/open/*\"\nmethods = [\"PATCH\"]\n"
    );
    let gateway = Gateway::start_with_tokens(upstream.address, &tokens.concat(), &config);
    let ask = |token: &str, path: &str, method: &str| {
        let more = if method.is_empty() { String::new() } else { format!("X-HTTP-Method-Override: {method}\n") };
        let token = if token.is_empty() { String::new() } else { format!("PRIVATE-TOKEN: {token}\n") };
        gateway.ask(&format!("POST {path} HTTP/1.1\nHost: h\n{token}{more}\n")).status
    };
    let mut seen = 0;
    for (token, path, method, status) in [
        ("poster-token-1", PATH, "", 200),
        ("poster-token-1", PATH, "POST", 200),
        ("poster-token-1", PATH, "PATCH", 403),
        ("poster-token-1", PATH, "DELETE", 403),
        ("poster-token-1", PATH, "GET", 403),
        ("patcher-token", PATH, "", 403),
        ("patcher-token", PATH, "PATCH", 200),
        ("patcher-token", PATH, "PUT", 403),
        ("reader-token-1", PATH, "GET", 200),
        ("reader-token-1", PATH, "PATCH", 403),
        ("", "/open/x", "", 200),
        ("", "/open/x", "PATCH", 401),
        ("", "/open/x", "DELETE", 404),
        ("patcher-token", "/open/x", "PATCH", 200),
        ("", PATH, "OPTIONS", 401),
    ] {
        assert_eq!(ask(token, path, method), status, "{token} {path} {method}");
        seen += 1;
    }
    assert_eq!(seen, 15);
    let refused = gateway.access_log().into_iter().find(|line| line["status"] == 403 && line["method"] == "DELETE");
    assert_eq!(refused.unwrap()["method_override"], true);
}

/// A preflight is a real OPTIONS, never an overridden method.
#[test]
fn an_override_makes_no_preflight() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, &format!("[api]\ncors_preflight = true\n{JUDGE}"));
    let more = "Origin: http://x\nAccess-Control-Request-Method: GET\nX-HTTP-Method-Override: OPTIONS\n";
    let answer = gateway.ask(&format!("POST {PATH} HTTP/1.1\nHost: h\n{more}\n"));
    assert_eq!((answer.status, upstream.seen().len()), (401, 0));
}

/// A GET by override has the page bounds of a GET.
#[test]
fn pages_are_bounded_when_the_judged_method_lists() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, JUDGE);
    for (method, expected) in
        [("GET", "?page=1&per_page=100"), ("PATCH", "?page=0&per_page=5000"), ("POST", "?page=0&per_page=5000")]
    {
        let target = "/api/v3/projects?page=0&per_page=5000";
        assert_eq!(ask(&gateway, "POST", target, &format!("X-HTTP-Method-Override: {method}\n"), "").status, 200);
        assert_eq!(upstream.only().target, format!("/api/v3/projects{expected}"), "{method}");
        upstream.forget();
    }
    // The body of the POST is checked like any POST's.
    for lines in ["", "Content-Type: application/x-www-form-urlencoded\n"] {
        let lines = format!("{lines}X-HTTP-Method-Override: GET\n");
        assert_eq!(ask(&gateway, "POST", "/api/v3/projects", &lines, "private_token=x").status, 401);
    }
}

/// Web page routes may use overrides, unless another route applies to the method.
#[test]
fn a_web_page_is_no_way_around_a_route_for_some_methods() {
    let upstream = Upstream::start();
    for config in ["", JUDGE] {
        let config = format!(
            "{config}[[route]]\npath = \"/\"\nauth = \"none\"\nreason = \"web pages\"\n\
             [[route]]\npath = \"/admin/*\"\nmethods = [\"DELETE\"]\n"
        );
        let gateway = Gateway::start(upstream.address, &config);
        let ask =
            |target: &str, lines: &str| gateway.ask(&format!("POST {target} HTTP/1.1\nHost: h\n{lines}\n")).status;
        for (target, lines, status) in [
            ("/users/1", "X-HTTP-Method-Override: DELETE\n", 200),
            ("/users/1?_method=DELETE", "", 200),
            ("/admin/users/1", "", 200),
            ("/admin/users/1", "X-HTTP-Method-Override: PUT\n", 400),
            ("/admin/users/1", "X-Method-Override: DELETE\n", 400),
            ("/admin/users/1?_method=DELETE", "", 400),
        ] {
            assert_eq!(ask(target, lines), status, "{config} {target} {lines}");
        }
        let deleted = ask("/admin/users/1", "X-HTTP-Method-Override: DELETE\n");
        assert!(matches!(deleted, 400 | 401), "{deleted}");
    }
}

/// Rack::MethodOverride, as in Rails, runs the method that was judged.
#[test]
fn rack_runs_the_judged_method() {
    let puma = Puma::start("rack_probe.ru", "unused=nobody");
    let gateway = Gateway::start(puma.address, JUDGE);
    let form = "Content-Type: application/x-www-form-urlencoded\n";
    for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] {
        let answer = ask(&gateway, "POST", PATH, &format!("{form}X-HTTP-Method-Override: {method}\n"), "title=x");
        let body: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!((answer.status, body["method"].as_str()), (200, Some(method)), "{body}");
        assert_eq!(body["effective"].as_str(), Some(GOOD));
    }
}
