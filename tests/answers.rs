//! Section 2 of the contract: what tollgate answers itself, in which form, and what becomes of the connection.

use crate::harness::*;
use crate::lanes::not_named;
use crate::servers::http::HttpServer;
use std::io::{Read as _, Write as _};
use std::time::Duration;

const TARGET: &str = "/api/v3/projects";

fn head(request_line: &str, headers: &str) -> Vec<u8> {
    format!("{request_line}\nHost: h.test\nPRIVATE-TOKEN: {GOOD}\n{headers}\n").replace('\n', "\r\n").into_bytes()
}

fn get(target: &str, headers: &str) -> Vec<u8> {
    head(&format!("GET {target} HTTP/1.1"), headers)
}

fn ask(gateway: &Gateway, bytes: &[u8]) -> Answer {
    let mut client = gateway.client();
    client.send(bytes);
    client.answer()
}

/// The form that every answer of tollgate's own has.
fn assert_own(answer: &Answer, status: u16, reason: &str, what: &str) {
    let body = format!("{{\"message\":\"{status} {reason}\"}}");
    assert_eq!((answer.status, answer.text()), (status, body.clone()), "{what}");
    assert_eq!(answer.header("Content-Type"), Some("application/json"), "{what}");
    assert_eq!(answer.header("Content-Length"), Some(body.len().to_string().as_str()), "{what}");
    assert_eq!(answer.header("Transfer-Encoding"), None, "{what}");
    assert!(answer.header("X-Request-Id").is_some_and(|id| !id.is_empty()), "{what}");
    assert!(!answer.cut, "{what}");
}

fn is_close(answer: &Answer) -> bool {
    answer.header("Connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
}

#[test]
fn malformed_heads_and_ambiguous_targets_are_400() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let targets = [
        "/api/v3/../admin",
        "/api/v3/./projects",
        "/api/v3/%2e%2e/admin",
        "/api/v3/.%2E/admin",
        "/api/v3/..;x/admin",
        "/api/v3/a%2F..%2Fb",
        "/api/v3/..%2fadmin",
        "/api/v3/..",
        "/api/v3/.",
        "/api/v3/a\\b",
        "/api/v3/a%5cb",
        "/api/v3/a%00",
        "/api/v3/a%0d%0aX:%20y",
        "/api/v3/a%09",
        "/api/v3/a%7f",
        "/api/v3/projects#x",
        "/api/v3/projects?a#x",
        "/api/v3/a<b>",
        "/api/v3/a\"b",
        "/api/v3/\u{e9}",
        "/api/v3/a%zz",
        "/api/v3/a%4",
        "/api/v3/%c0%ae%c0%ae/admin",
        "/api/v3/projects?a=%zz",
        "/api/v3/projects?a=%u0041",
        "/api/v3/projects?a=%",
        "/api/v3/projects?a=\"",
        "/api/v3/projects?a=<b",
        "/api/v3/projects?a=\u{7f}",
    ];
    let mut requests: Vec<(String, Vec<u8>)> =
        targets.iter().map(|target| ((*target).to_owned(), get(target, ""))).collect();
    let token = format!("PRIVATE-TOKEN: {GOOD}\r\n");
    for (what, bytes) in [
        ("no Host", format!("GET {TARGET} HTTP/1.1\r\n{token}\r\n")),
        ("two Hosts", format!("GET {TARGET} HTTP/1.1\r\nHost: h\r\nHost: h\r\n{token}\r\n")),
        ("two different Hosts", format!("GET {TARGET} HTTP/1.1\r\nHost: a\r\nHost: b\r\n{token}\r\n")),
        ("empty Host", format!("GET {TARGET} HTTP/1.1\r\nHost:\r\n{token}\r\n")),
        ("Host with a path", format!("GET {TARGET} HTTP/1.1\r\nHost: h/x\r\n{token}\r\n")),
        ("Host with userinfo", format!("GET {TARGET} HTTP/1.1\r\nHost: u@h\r\n{token}\r\n")),
        ("Host list", format!("GET {TARGET} HTTP/1.1\r\nHost: a, b\r\n{token}\r\n")),
        ("Host with a bad port", format!("GET {TARGET} HTTP/1.1\r\nHost: h:99999\r\n{token}\r\n")),
        ("another authority", format!("GET http://other{TARGET} HTTP/1.1\r\nHost: h\r\n{token}\r\n")),
        ("no slash", format!("GET api/v3 HTTP/1.1\r\nHost: h\r\n{token}\r\n")),
        ("HTTP/0.9", format!("GET {TARGET}\r\n\r\n")),
        ("HTTP/1.2", format!("GET {TARGET} HTTP/1.2\r\nHost: h\r\n{token}\r\n")),
        ("HTTP/2.0", format!("GET {TARGET} HTTP/2.0\r\nHost: h\r\n{token}\r\n")),
        ("http/1.1", format!("GET {TARGET} http/1.1\r\nHost: h\r\n{token}\r\n")),
        ("two spaces", format!("GET  {TARGET} HTTP/1.1\r\nHost: h\r\n{token}\r\n")),
        ("tab", format!("GET\t{TARGET} HTTP/1.1\r\nHost: h\r\n{token}\r\n")),
        ("space in the target", format!("GET {TARGET} x HTTP/1.1\r\nHost: h\r\n{token}\r\n")),
        ("space before the colon", format!("GET {TARGET} HTTP/1.1\r\nHost: h\r\n{token}X : y\r\n\r\n")),
        ("folded line", format!("GET {TARGET} HTTP/1.1\r\nHost: h\r\n{token}X: a\r\n b\r\n\r\n")),
        ("no colon", format!("GET {TARGET} HTTP/1.1\r\nHost: h\r\n{token}X\r\n\r\n")),
        ("no name", format!("GET {TARGET} HTTP/1.1\r\nHost: h\r\n{token}: x\r\n\r\n")),
        ("bare LF", format!("GET {TARGET} HTTP/1.1\r\nHost: h\n{token}\r\n")),
        ("bare CR", format!("GET {TARGET} HTTP/1.1\r\nHost: h\r\n{token}X: a\rb\r\n\r\n")),
        ("NUL", format!("GET {TARGET} HTTP/1.1\r\nHost: h\r\n{token}X: a\0b\r\n\r\n")),
        ("DEL", format!("GET {TARGET} HTTP/1.1\r\nHost: h\r\n{token}X: a\u{7f}b\r\n\r\n")),
        (
            "a method override",
            format!("POST {TARGET} HTTP/1.1\r\nHost: h\r\n{token}X-HTTP-Method-Override: DELETE\r\n\r\n"),
        ),
        ("TLS", "\u{16}\u{3}\u{1}\u{2}".into()),
        ("HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into()),
    ] {
        requests.push((what.into(), bytes.into_bytes()));
    }
    for (what, request) in &requests {
        assert_own(&ask(&gateway, request), 400, "Bad Request", what);
    }
    assert_eq!(upstream.seen().len(), 0);
}

/// Framing that two parsers could read differently: nothing that follows on the connection may be served.
#[test]
fn doubtful_framing_is_400_and_the_end_of_the_connection() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let smuggled = String::from_utf8(get("/api/v3/smuggled", "")).unwrap();
    for framing in [
        "Content-Length: 0\r\nContent-Length: 0",
        "Content-Length: 1\r\nContent-Length: 2",
        "Content-Length: 0, 0",
        "Content-Length: +0",
        "Content-Length: -1",
        "Content-Length: 00",
        "Content-Length: 0x0",
        "Content-Length: 1 0",
        "Content-Length:",
        "Content-Length: 99999999999999999999",
        "Content-Length: 0\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 0",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: chunked, chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: \"chunked\"",
        "Transfer-Encoding:",
        "Transfer_Encoding: chunked",
        "Content_Length: 5",
    ] {
        for method in ["GET", "POST"] {
            let mut client = gateway.client();
            let head = format!("{method} {TARGET} HTTP/1.1\r\nHost: h\r\nPRIVATE-TOKEN: {GOOD}\r\n{framing}\r\n\r\n");
            client.send(format!("{head}0\r\n\r\n{smuggled}").as_bytes());
            let answer = client.answer();
            assert_own(&answer, 400, "Bad Request", framing);
            assert!(is_close(&answer), "{framing}");
            assert!(client.is_closed_within(PATIENCE), "{framing}");
        }
    }
    assert_eq!(upstream.seen().len(), 0);
}

/// A chunked body is judged while it passes: the backend must not get it whole, and nothing behind it is a request.
#[test]
fn doubtful_chunks_are_400_and_the_end_of_the_connection() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let smuggled = String::from_utf8(get("/api/v3/smuggled", "")).unwrap();
    for body in [
        "x\r\n",
        "\r\n",
        " 3\r\nabc\r\n0\r\n\r\n",
        "3 \r\nabc\r\n0\r\n\r\n",
        "0x3\r\nabc\r\n0\r\n\r\n",
        "+3\r\nabc\r\n0\r\n\r\n",
        "3\nabc\n0\n\n",
        "3\r\nabcX\r\n0\r\n\r\n",
        "3\r\nabc\n0\r\n\r\n",
        "3;a\nb\r\nabc\r\n0\r\n\r\n",
        "ffffffffffffffffff\r\nabc",
        "3\r\nabc\r\n0\r\nX\r\n\r\n",
        "3\r\nabc\r\n0\r\n X: y\r\n\r\n",
        "3\r\nabc\r\n-0\r\n\r\n",
    ] {
        let mut client = gateway.client();
        let head = "POST /api/v3/projects HTTP/1.1";
        client.send(&[&head_of(head)[..], body.as_bytes(), smuggled.as_bytes()].concat());
        let answer = client.answer();
        assert_own(&answer, 400, "Bad Request", body);
        assert!(is_close(&answer) && client.is_closed_within(PATIENCE), "{body:?}");
    }
    assert_eq!(gateway.get("/api/v3/last").status, 200);
    let complete: Vec<_> = upstream.seen().into_iter().filter(|seen| seen.complete).map(|seen| seen.target).collect();
    assert_eq!(complete, ["/api/v3/last"]);
}

fn head_of(request_line: &str) -> Vec<u8> {
    head(request_line, "Content-Type: text/plain\nTransfer-Encoding: chunked\n")
}

#[test]
fn unauthorized_says_so_and_is_never_stored() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let answer = gateway.ask(&format!("GET {TARGET} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {BAD}\n\n"));
    assert_own(&answer, 401, "Unauthorized", "an unknown token");
    assert_eq!(answer.header("Cache-Control"), Some("no-store"));
    assert!(answer.header("WWW-Authenticate").is_some_and(|value| !value.is_empty()));
}

#[test]
fn a_valid_token_that_may_not_is_403() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    assert_own(&ask(&gateway, &get(&format!("{TARGET}?sudo=root"), "")), 403, "Forbidden", "sudo");
}

#[test]
fn anything_outside_the_prefixes_is_404() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    for target in [
        "/",
        "/api",
        "/api/",
        "/api/v3x",
        "/api/v3.x",
        "/api/v4/projects",
        "/API/v3/projects",
        "/api/V3",
        "/users/sign_in",
        "/api%2Fv3/projects",
        "/x/api/v3",
        "/metrics",
        "/readyz",
    ] {
        assert_own(&ask(&gateway, &get(target, "")), 404, "Not Found", target);
    }
    assert_eq!(upstream.seen().len(), 0);
    for target in ["/api/v3", "/api/v3/", "/api/v3/x", "/api/v3?x=1"] {
        assert_eq!(gateway.get(target).status, 200, "{target}");
    }
}

#[test]
fn configured_prefixes_take_the_place_of_the_default() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "[api]\nprefixes = [\"/gitlab/api/v3\", \"/api/v4\"]\n");
    for (target, status) in
        [("/gitlab/api/v3/projects", 200), ("/api/v4", 200), ("/api/v3/projects", 404), ("/gitlab", 404)]
    {
        assert_eq!(gateway.get(target).status, status, "{target}");
    }
    assert_eq!(gateway.ask("GET /api/v4/x HTTP/1.1\nHost: h\n\n").status, 401, "each of them needs a token");
}

#[test]
fn other_methods_are_405_and_told_which_are_allowed() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    for line in [
        format!("TRACE {TARGET} HTTP/1.1"),
        "CONNECT h.test:443 HTTP/1.1".into(),
        format!("PROPFIND {TARGET} HTTP/1.1"),
        format!("get {TARGET} HTTP/1.1"),
        format!("PURGE {TARGET} HTTP/1.1"),
        format!("GETX {TARGET} HTTP/1.1"),
    ] {
        let answer = ask(&gateway, &head(&line, ""));
        assert_own(&answer, 405, "Method Not Allowed", &line);
        let allowed: Vec<&str> = answer.header("Allow").unwrap().split(", ").collect();
        assert_eq!(allowed, ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"], "{line}");
    }
    assert_eq!(upstream.seen().len(), 0);
    for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] {
        assert_eq!(ask(&gateway, &head(&format!("{method} {TARGET} HTTP/1.1"), "")).status, 200, "{method}");
        assert_eq!(upstream.only().method, method);
        upstream.forget();
    }
}

#[test]
fn a_head_that_takes_too_long_is_408() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "[limits]\nheader_timeout = \"300ms\"\nidle_timeout = \"400ms\"\n");
    // Stalled, and one byte at a time: the deadline is for the whole head.
    let mut stalled = gateway.client();
    stalled.send(b"GET /api/v3/projects HTTP/1.1\r\nHost: h");
    let answer = stalled.answer();
    assert_own(&answer, 408, "Request Timeout", "a stalled head");
    assert!(is_close(&answer) && stalled.is_closed_within(PATIENCE));

    let mut dripping = gateway.client();
    let begun = std::time::Instant::now();
    for byte in get(TARGET, &format!("X: {}\n", "a".repeat(1000))) {
        if dripping.socket.write_all(&[byte]).is_err() || begun.elapsed() > PATIENCE / 2 {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
        dripping.socket.set_nonblocking(true).unwrap();
        let answered = dripping.socket.peek(&mut [0]).is_ok();
        dripping.socket.set_nonblocking(false).unwrap();
        if answered {
            break;
        }
    }
    assert_own(&dripping.answer(), 408, "Request Timeout", "a dripping head");

    // A connection without a request has nothing to be answered.
    let mut idle = gateway.client();
    idle.send(&get(TARGET, ""));
    assert_eq!(idle.answer().status, 200);
    assert!(idle.is_closed_within(PATIENCE), "no bytes at all, then the end");
    assert_eq!(upstream.seen().len(), 1);
}

#[test]
fn a_body_over_the_limit_is_413() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "[limits]\nbody_bytes = \"1KiB\"\n");
    let (fits, over) = ("x".repeat(1024), "x".repeat(1025));
    let by_length = |body: &str| {
        let headers = format!("Content-Type: text/plain\nContent-Length: {}\n", body.len());
        [head("POST /api/v3/x HTTP/1.1", &headers), body.as_bytes().to_vec()].concat()
    };
    let by_chunks = |body: &str| {
        let chunks: String = body
            .as_bytes()
            .chunks(100)
            .map(|piece| format!("{:x}\r\n{}\r\n", piece.len(), String::from_utf8_lossy(piece)))
            .collect();
        [head_of("POST /api/v3/x HTTP/1.1"), format!("{chunks}0\r\n\r\n").into_bytes()].concat()
    };
    for (what, request) in [("by length", by_length(&over)), ("by chunks", by_chunks(&over))] {
        assert_own(&ask(&gateway, &request), 413, "Request Entity Too Large", what);
    }
    for (what, request) in [("by length", by_length(&fits)), ("by chunks", by_chunks(&fits))] {
        assert_eq!(ask(&gateway, &request).status, 200, "{what}");
    }
    // A length alone is enough to say no: not a byte of the body is waited for.
    let announced = head("POST /api/v3/x HTTP/1.1", "Content-Length: 9999999\n");
    assert_own(&ask(&gateway, &announced), 413, "Request Entity Too Large", "announced");
    let whole: Vec<_> = upstream.seen().into_iter().filter(|seen| seen.complete).map(|seen| seen.body.len()).collect();
    assert_eq!(whole, [1024, 1024]);
}

#[test]
fn a_long_target_is_414_and_a_long_head_431() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "[limits]\ntarget_bytes = \"1KiB\"\nheader_bytes = \"4KiB\"\n");
    let target = |length: usize| format!("{TARGET}?q={}", "a".repeat(length - TARGET.len() - 3));
    assert_eq!(ask(&gateway, &get(&target(1024), "")).status, 200);
    assert_own(&ask(&gateway, &get(&target(1025), "")), 414, "URI Too Long", "one too many");
    // Longer than the whole head may be, and without an end in sight.
    assert_own(&ask(&gateway, &get(&target(10_000), "")), 414, "URI Too Long", "very long");

    let phrase = "Request Header Fields Too Large";
    assert_eq!(ask(&gateway, &get(TARGET, &format!("X: {}\n", "a".repeat(3000)))).status, 200);
    assert_own(&ask(&gateway, &get(TARGET, &format!("X: {}\n", "a".repeat(5000)))), 431, phrase, "one long line");
    assert_own(&ask(&gateway, &get(TARGET, &"X: y\n".repeat(600))), 431, phrase, "many lines");
    assert_own(&ask(&gateway, &get(TARGET, &"X: y\n".repeat(200))), 431, phrase, "too many lines");
    let mut endless = gateway.client();
    endless.send(format!("GET {TARGET} HTTP/1.1\r\nX: {}", "a".repeat(5000)).as_bytes());
    let answer = endless.answer();
    assert_own(&answer, 431, phrase, "without an end");
    assert!(is_close(&answer));
}

#[test]
fn a_broken_upstream_is_502() {
    for framework in [false, true] {
        let nobody = format!("127.0.0.1:{}", free_port()).parse().unwrap();
        let answer = Gateway::start_on_lane(framework, nobody).get(TARGET);
        assert_own(&answer, 502, "Bad Gateway", "connection refused");
    }
    let mut passed = Vec::new();
    for (what, bytes) in [
        ("closed without an answer", &b""[..]),
        ("half a head", b"HTTP/1.1 200 OK\r\nContent-Le"),
        ("not HTTP", b"SSH-2.0-OpenSSH_9.6\r\n"),
        ("no status", b"HTTP/1.1\r\n\r\n"),
        ("a line without a colon", b"HTTP/1.1 200 OK\r\nContent-Length\r\n\r\nhi"),
        ("two lengths", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nhix"),
        ("the same length twice", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nhi"),
        ("a list of lengths", b"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nhi"),
        ("a length that is none", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nhi"),
        ("a signed length", b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nhi"),
        ("a negative length", b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nhi"),
        ("another coding", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nhi"),
        ("two codings", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"),
        (
            "both framings",
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        ),
        ("a blank behind a name", b"HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\nhi"),
        ("a bare LF", b"HTTP/1.1 200 OK\nContent-Length: 2\n\nhi"),
        ("a folded line", b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 2\r\n\r\nhi"),
        ("bytes behind the end", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhix"),
        ("bytes behind no body", b"HTTP/1.1 204 No Content\r\n\r\nx"),
        ("bytes behind the last chunk", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nx"),
        ("unrequested 101", b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nhi"),
    ] {
        for framework in [false, true] {
            let upstream = HttpServer::answering_once(bytes);
            let gateway = Gateway::start_on_lane(framework, upstream.address());
            // Read as it is: what is passed on may be more than the client can frame.
            let mut client = gateway.client();
            client.send(&get(TARGET, "Connection: close\n"));
            let mut answer = Vec::new();
            drop(client.socket.read_to_end(&mut answer));
            let answer = String::from_utf8_lossy(&answer).into_owned();
            let right =
                answer.starts_with("HTTP/1.1 502 ") && answer.ends_with("\r\n\r\n{\"message\":\"502 Bad Gateway\"}");
            let problems = if right { Vec::new() } else { vec![answer] };
            let problems = if framework { not_named(what, problems) } else { problems };
            passed.extend(problems.into_iter().map(|answer| (what, framework, answer)));
        }
    }
    assert!(passed.is_empty(), "not 502: {passed:#?}");
}

/// Bytes behind the end of an answer belong to nobody: they must never be taken for the answer to a next request.
#[test]
fn surplus_bytes_of_an_upstream_never_answer_another_request() {
    let count = std::sync::atomic::AtomicUsize::new(0);
    let upstream = Upstream::answering(move |seen| {
        if seen.target.ends_with("/surplus") {
            let poison = "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison";
            return Reply::raw(format!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi{poison}"));
        }
        Reply::ok(&format!("{}", count.fetch_add(1, std::sync::atomic::Ordering::Relaxed)))
    });
    let gateway = Gateway::start(upstream.address, "");
    for turn in 0..10 {
        let mut client = gateway.client();
        client.send(&get("/api/v3/surplus", ""));
        let first = client.answer();
        assert_eq!(first.status, 502, "{}", first.text());
        let next = gateway.get(TARGET);
        assert_eq!((next.status, next.text()), (200, turn.to_string()));
    }
}

#[test]
fn an_upstream_that_is_too_slow_is_504() {
    let upstream = Upstream::answering(|_| Reply::ok("late").after(Duration::from_secs(3)));
    let servers =
        format!("[[upstream]]\nname = \"api\"\nservers = [\"{}\"]\nread_timeout = \"200ms\"\n", upstream.address);
    let gateway = Gateway::start(upstream.address, &servers);
    assert_own(&gateway.get(TARGET), 504, "Gateway Timeout", "no answer in time");
    assert_eq!(upstream.seen().len(), 1, "what may have been done is not tried again");
}

#[test]
fn a_request_that_had_begun_before_the_shutdown_is_served() {
    let (upstream, latch) = Upstream::holding(|_| true, "done");
    let gateway = Gateway::start(upstream.address, "");
    let mut busy = gateway.client();
    busy.send(&get(TARGET, ""));
    eventually("the request is under way", || upstream.seen().len() == 1);
    let mut waiting = gateway.client();
    waiting.send(b"GET /api/v3/projects HTTP/1.1\r\n");
    eventually("the connection is taken", || gateway.metric("tollgate_connections") >= 2.0);
    gateway.signal("TERM");
    // Once it is said, it holds.
    eventually("the signal is seen", || gateway.process_log().contains("listeners closed"));
    waiting.send(format!("Host: h\r\nPRIVATE-TOKEN: {GOOD}\r\n\r\n").as_bytes());
    eventually("the second is under way as well", || upstream.seen().len() == 2);
    latch.open();
    let [first, second] = [&mut busy, &mut waiting].map(Client::answer);
    assert_eq!((first.text(), second.text()), ("done".into(), "done".into()));
    assert_eq!(second.header("Connection"), Some("close"));
}

#[test]
fn a_refusal_of_head_has_a_head_only() {
    let nobody = format!("127.0.0.1:{}", free_port()).parse().unwrap();
    let gateway = Gateway::start(nobody, "[limits]\ntarget_bytes = \"1KiB\"\n");
    let long = format!("{TARGET}?{}", "a".repeat(2000));
    for (what, target, token, status) in [
        ("400", "/api/v3/../x", GOOD, 400),
        ("401", TARGET, BAD, 401),
        ("403", "/api/v3/x?sudo=root", GOOD, 403),
        ("404", "/other", GOOD, 404),
        ("414", &long, GOOD, 414),
        ("502", TARGET, GOOD, 502),
    ] {
        let request = |method: &str| format!("{method} {target} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {token}\n\n");
        let body = gateway.ask(&request("GET"));
        assert_eq!(body.status, status, "{what}");
        let mut client = gateway.client();
        client.send_head(&request("HEAD"));
        let answer = client.answer_to("HEAD").unwrap();
        assert_eq!(answer.status, status, "{what}");
        assert_eq!(answer.header("Content-Length"), body.header("Content-Length"), "{what}");
        // Nothing follows: the next answer begins with its own status line.
        if is_close(&answer) {
            assert!(client.is_closed_within(PATIENCE), "{what}");
        } else {
            client.send_head("GET /other HTTP/1.1\nHost: h\n\n");
            assert_eq!(client.answer().status, 404, "{what}");
        }
    }
}

/// Each request on a connection is judged on its own, whatever the one before it was.
#[test]
fn a_refusal_keeps_the_connection_when_that_is_safe() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let refused =
        |headers: &str, body: &str| format!("POST {TARGET} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {BAD}\n{headers}\n{body}");
    let mut client = gateway.client();
    let small = "x".repeat(10_000);
    for (what, request, status) in [
        ("no body", refused("", ""), 401),
        ("a small body", refused("Content-Length: 5\n", "hello"), 401),
        ("a larger body", refused("Content-Length: 10000\n", &small), 401),
        ("no route", "GET /other HTTP/1.1\nHost: h\n\n".into(), 404),
        ("sudo", format!("GET {TARGET}?sudo=x HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\n\n"), 403),
        ("a method", format!("PURGE {TARGET} HTTP/1.1\nHost: h\n\n"), 405),
        ("no token", format!("GET {TARGET} HTTP/1.1\nHost: h\n\n"), 401),
    ] {
        client.send_head(&request);
        let answer = client.answer();
        assert_eq!((answer.status, is_close(&answer)), (status, false), "{what}");
        client.send(&get("/api/v3/good", ""));
        assert_eq!(client.answer().status, 200, "after {what}");
        assert_eq!(upstream.only().target, "/api/v3/good", "after {what}");
        upstream.forget();
        client.send_head(&format!("GET /api/v3/good HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {BAD}\n\n"));
        assert_eq!(client.answer().status, 401, "a good request before it vouches for nothing");
        assert_eq!(upstream.seen().len(), 0);
    }
}

/// Requests that come all at once are answered in their order, the refused among them.
#[test]
fn pipelined_requests_are_judged_one_by_one() {
    let upstream = Upstream::answering(|seen| Reply::ok(&seen.target));
    let gateway = Gateway::start(upstream.address, "");
    let with =
        |token: &str, target: &str| format!("GET {target} HTTP/1.1\r\nHost: h\r\nPRIVATE-TOKEN: {token}\r\n\r\n");
    let body = "GET /api/v3/inner HTTP/1.1\r\nHost: h\r\n\r\n";
    let posted = format!(
        "POST /api/v3/e HTTP/1.1\r\nHost: h\r\nPRIVATE-TOKEN: {BAD}\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let all = [
        with(GOOD, "/api/v3/a"),
        with(BAD, "/api/v3/b"),
        with(OTHER, "/api/v3/c"),
        with("", "/api/v3/d"),
        posted,
        with(GOOD, "/api/v3/f"),
    ];
    let mut client = gateway.client();
    client.send(all.concat().as_bytes());
    let refused = "{\"message\":\"401 Unauthorized\"}";
    for expected in ["/api/v3/a", refused, "/api/v3/c", refused, refused, "/api/v3/f"] {
        assert_eq!(client.answer().text(), expected);
    }
    let who: Vec<_> = upstream
        .seen()
        .iter()
        .map(|seen| (seen.target.clone(), seen.header("PRIVATE-TOKEN").unwrap().to_owned()))
        .collect();
    let expected = [("/api/v3/a", GOOD), ("/api/v3/c", OTHER), ("/api/v3/f", GOOD)];
    assert_eq!(who, expected.map(|(target, token)| (target.to_owned(), token.to_owned())));
}

/// An unread body that is large, of unknown length or not sent yet can't be told from a next request.
#[test]
fn a_refusal_closes_the_connection_when_it_is_not_safe() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let smuggled = String::from_utf8(get("/api/v3/smuggled", "")).unwrap();
    for (what, headers, version) in [
        ("a large body", "Content-Length: 10000000\r\n", "1.1"),
        ("chunks", "Transfer-Encoding: chunked\r\n", "1.1"),
        ("100-continue", "Content-Length: 5\r\nExpect: 100-continue\r\n", "1.1"),
        ("asked to", "Connection: close\r\n", "1.1"),
        ("HTTP/1.0", "", "1.0"),
    ] {
        let mut client = gateway.client();
        client.send(
            format!("POST {TARGET} HTTP/{version}\r\nHost: h\r\nPRIVATE-TOKEN: {BAD}\r\n{headers}\r\n{smuggled}")
                .as_bytes(),
        );
        // Not even a 100 comes first.
        let answer = client.any_answer("POST").unwrap();
        assert_own(&answer, 401, "Unauthorized", what);
        assert!(is_close(&answer) && client.is_closed_within(PATIENCE), "{what}");
    }
    assert_eq!(upstream.seen().len(), 0);
}

/// The answer must arrive although the client has not finished sending, and does not stop.
#[test]
fn a_client_that_is_still_sending_gets_to_see_the_refusal() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    for _ in 0..10 {
        let mut client = gateway.client();
        client.send_head(&format!("POST {TARGET} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {BAD}\nContent-Length: 900000\n\n"));
        client.send(&vec![b'x'; 900_000]);
        assert_eq!(client.answer().status, 401);
    }
}

#[test]
fn refusals_reveal_nothing_of_the_machine() {
    let port = free_port();
    let gateway = Gateway::start(format!("127.0.0.1:{port}").parse().unwrap(), "");
    for request in [get(TARGET, ""), get("/other", ""), get(&format!("{TARGET}?[private_token]={BAD}"), "")] {
        let answer = ask(&gateway, &request);
        let all = format!("{:?} {}", answer.headers, answer.text());
        for secret in [GOOD, BAD, "127.0.0.1", &port.to_string(), "/tmp", "tollgate-test"] {
            assert!(!all.contains(secret), "{secret} in {all}");
        }
    }
}

/// Sends bytes, and reads all that comes until the connection ends.
fn everything(gateway: &Gateway, bytes: &[u8]) -> String {
    let mut client = gateway.client();
    client.send(bytes);
    let mut answer = Vec::new();
    client.socket.read_to_end(&mut answer).unwrap();
    String::from_utf8(answer).unwrap()
}

/// Not even where the head could not be read: what follows would be the client's next answer.
#[test]
fn head_gets_no_body_whatever_is_wrong() {
    let upstream = Upstream::answering(|seen| match seen.target.as_str() {
        "/api/v3/slow" => Reply::ok("late").after(Duration::from_secs(1)),
        "/api/v3/broken" => Reply::raw("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nhix"),
        "/api/v3/interim" => Reply::raw("HTTP/1.1 103 Early Hints\r\n\r\nnonsense\r\n\r\n"),
        _ => Reply::raw("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi").then_close(),
    });
    let config = format!(
        "[limits]\ntarget_bytes = \"1KiB\"\nheader_bytes = \"4KiB\"\nbody_bytes = \"1KiB\"\nheader_timeout = \"300ms\"\n\
         [[upstream]]\nname = \"api\"\nservers = [\"{}\"]\nread_timeout = \"200ms\"\n",
        upstream.address
    );
    let gateway = Gateway::start(upstream.address, &config);
    let token = format!("Host: h\r\nPRIVATE-TOKEN: {GOOD}\r\nConnection: close\r\n");
    let long = "a".repeat(5_000);
    let cases = [
        (400, format!("HEAD {TARGET} HTTP/1.1\r\n\r\n")),
        (400, format!("HEAD {TARGET} HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")),
        (400, format!("HEAD  {TARGET} HTTP/1.1\r\n{token}\r\n")),
        (400, format!("HEAD {TARGET} HTTP/2.0\r\n{token}\r\n")),
        (400, format!("HEAD {TARGET}\r\n\r\n")),
        (400, format!("HEAD {TARGET} x HTTP/1.1\r\n{token}\r\n")),
        (400, format!("HEAD\t{TARGET} HTTP/1.1\r\n{token}\r\n")),
        (400, format!("\r\nHEAD {TARGET} HTTP/1.1\r\n{token}X : y\r\n\r\n")),
        (400, format!("HEAD {TARGET} HTTP/1.1\r\n{token}X: a\nY: b\r\n\r\n")),
        (400, format!("HEAD {TARGET} HTTP/1.1\n{token}\r\n")),
        (400, format!("HEAD {TARGET} HTTP/1.1\r\n{token}Content-Length: 1\r\nContent-Length: 2\r\n\r\nx")),
        (400, format!("HEAD {TARGET} HTTP/1.1\r\n{token}Transfer-Encoding: gzip\r\n\r\n")),
        (400, format!("HEAD /api/v3/../x HTTP/1.1\r\n{token}\r\n")),
        (400, format!("HEAD http://other{TARGET} HTTP/1.1\r\n{token}\r\n")),
        (401, format!("HEAD {TARGET} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")),
        (401, format!("HEAD {TARGET} HTTP/1.0\r\nHost: h\r\n\r\n")),
        (403, format!("HEAD {TARGET}?sudo=x HTTP/1.1\r\n{token}\r\n")),
        (404, format!("HEAD /other HTTP/1.1\r\n{token}\r\n")),
        (408, "HEAD /api/v3/x HTTP/1.1\r\nHost".into()),
        (408, "HEAD".into()),
        (413, format!("HEAD {TARGET} HTTP/1.1\r\n{token}Content-Length: 9999\r\n\r\n")),
        (414, format!("HEAD {TARGET}?{long} HTTP/1.1\r\n{token}\r\n")),
        (414, format!("HEAD {TARGET}?{} HTTP/1.1\r\n{token}\r\n", &long[..2_000])),
        (431, format!("HEAD {TARGET} HTTP/1.1\r\n{token}X: {long}\r\n\r\n")),
        (431, format!("HEAD {TARGET} HTTP/1.1\r\n{token}X: {long}")),
        (431, format!("HEAD {TARGET} HTTP/1.1\r\n{token}{}\r\n", "X: y\r\n".repeat(200))),
        (502, format!("HEAD /api/v3/broken HTTP/1.1\r\n{token}\r\n")),
        (504, format!("HEAD /api/v3/slow HTTP/1.1\r\n{token}\r\n")),
        (200, format!("HEAD {TARGET} HTTP/1.1\r\n{token}\r\n")),
        (200, format!("HEAD {TARGET} HTTP/1.0\r\n{token}\r\n")),
    ];
    for (status, request) in &cases {
        let answer = everything(&gateway, request.as_bytes());
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{request:?}: {answer:?}"));
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{request:?}: {head}");
        assert_eq!(body, "", "{request:?}");
        assert!(head.contains("\r\nContent-Length: ") || *status == 200, "{request:?}: {head}");
    }
    // Every other method gets it.
    let mut seen = 0;
    for (status, request) in cases.iter().filter(|(status, _)| (400..500).contains(status)) {
        let other = request.replacen("HEAD", "GET", 1);
        let answer = everything(&gateway, other.as_bytes());
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{other:?}: {head}");
        assert!(body.starts_with(&format!("{{\"message\":\"{status} ")), "{other:?}: {body}");
        seen += 1;
    }
    assert_eq!(seen, 26);
    let interim = everything(&gateway, format!("HEAD /api/v3/interim HTTP/1.1\r\n{token}\r\n").as_bytes());
    assert!(interim.contains("HTTP/1.1 502 ") && interim.ends_with("\r\n\r\n"), "{interim}");
}

/// Names, and the order in which a page could tell anything from them.
fn cors_fields(answer: &Answer) -> (Option<&str>, Option<&str>, bool) {
    assert_eq!(answer.header("Access-Control-Allow-Credentials"), None);
    let exposed = answer.header("Access-Control-Expose-Headers");
    let exposes = exposed.is_some_and(|list| {
        let list: Vec<_> = list.split(", ").collect();
        ["Link", "X-Total", "X-Request-Id", "Retry-After", "WWW-Authenticate"].iter().all(|name| list.contains(name))
    });
    (answer.header("Access-Control-Allow-Origin"), answer.header("Vary"), exposes)
}

/// GitLab answers its own 401 to pages of other origins; a page can't read an answer that does not say that it may.
#[test]
fn pages_of_configured_origins_may_read_what_tollgate_answers_itself() {
    let upstream = Upstream::answering(|seen| match seen.target.as_str() {
        "/api/v3/slow" => Reply::ok("late").after(Duration::from_secs(1)),
        "/api/v3/broken" => Reply::raw("").then_close(),
        "/api/v3/theirs" => Reply::raw(
            "HTTP/1.1 200 OK\r\nAccess-Control-Allow-Origin: https://theirs.example\r\nVary: Accept\r\nContent-Length: 0\r\n\r\n",
        ),
        _ => Reply::ok("{}"),
    });
    let rest = format!(
        "[limits]\ntarget_bytes = \"1KiB\"\nheader_bytes = \"4KiB\"\nbody_bytes = \"1KiB\"\nheader_timeout = \"300ms\"\n\
         [[upstream]]\nname = \"api\"\nservers = [\"{}\"]\nread_timeout = \"200ms\"\n",
        upstream.address
    );
    let (app, long) = ("https://app.example", "a".repeat(5_000));
    let requests = [
        (400, "GET /api/v3/../x HTTP/1.1\nHost: h\n@\n".to_owned()),
        (400, format!("GET {TARGET} HTTP/1.1\nHost: h\n@X : y\n\n")),
        (400, format!("GET {TARGET} HTTP/1.1\n@\n")),
        (401, format!("GET {TARGET} HTTP/1.1\nHost: h\n@\n")),
        (401, format!("GET {TARGET} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {BAD}\n@\n")),
        (
            401,
            format!(
                "POST {TARGET} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\n@Content-Type: application/x-www-form-urlencoded\nContent-Length: 15\n\nprivate_token=x"
            ),
        ),
        (401, format!("HEAD {TARGET} HTTP/1.1\nHost: h\n@\n")),
        (401, format!("OPTIONS {TARGET} HTTP/1.1\nHost: h\n@Access-Control-Request-Method: GET\n\n")),
        (403, format!("GET {TARGET}?sudo=x HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\n@\n")),
        (404, "GET /other HTTP/1.1\nHost: h\n@\n".to_owned()),
        (405, format!("PURGE {TARGET} HTTP/1.1\nHost: h\n@\n")),
        (408, format!("GET {TARGET} HTTP/1.1\nHost: h\n@X: y")),
        (413, format!("POST {TARGET} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\n@Content-Length: 9999\n\n")),
        (414, format!("GET {TARGET}?{} HTTP/1.1\nHost: h\n@\n", &long[..2_000])),
        (431, format!("GET {TARGET} HTTP/1.1\nHost: h\n@X: {long}\n\n")),
        (502, format!("GET /api/v3/broken HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\n@\n")),
        (504, format!("GET /api/v3/slow HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\n@\n")),
    ];
    let ask = |gateway: &Gateway, request: &str, origin: &str| {
        let mut client = gateway.client();
        client.send_head(&request.replace('@', origin));
        client.answer_to(request.split(' ').next().unwrap()).unwrap()
    };
    let listed = format!("[api]\ncors_origins = [\"http://localhost:3000\", \"{app}\"]\n{rest}");
    let gateway = Gateway::start(upstream.address, &listed);
    for (status, request) in &requests {
        let answer = ask(&gateway, request, &format!("Origin: {app}\n"));
        assert_eq!(answer.status, *status, "{request}");
        assert_eq!(cors_fields(&answer), (Some(app), Some("Origin"), true), "{request}");
        for origin in [
            "",
            "Origin: null\n",
            "Origin: https://evil.example\n",
            "Origin: https://app.example.evil\n",
            "Origin: *\n",
        ] {
            let answer = ask(&gateway, request, origin);
            assert_eq!(answer.status, *status, "{origin}{request}");
            assert_eq!(cors_fields(&answer), (None, Some("Origin"), false), "{origin}{request}");
        }
    }
    assert_eq!(
        cors_fields(&ask(&gateway, &requests[3].1, "Origin: http://localhost:3000\n")).0,
        Some("http://localhost:3000")
    );
    // An answer of the backend's is the backend's.
    let passed = format!("GET {TARGET} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\n@\n");
    assert_eq!(cors_fields(&ask(&gateway, &passed, &format!("Origin: {app}\n"))), (None, None, false));
    let theirs = passed.replace(TARGET, "/api/v3/theirs");
    let answer = ask(&gateway, &theirs, &format!("Origin: {app}\n"));
    assert_eq!((cors_fields(&answer).0, answer.header("Vary")), (Some("https://theirs.example"), Some("Accept")));

    let gateway = Gateway::start(upstream.address, &format!("[api]\ncors_origins = [\"*\"]\n{rest}"));
    for (status, request) in &requests {
        for origin in ["Origin: https://any.example\n", "Origin: null\n"] {
            let answer = ask(&gateway, request, origin);
            assert_eq!(
                (answer.status, cors_fields(&answer)),
                (*status, (Some("*"), Some("Origin"), true)),
                "{request}"
            );
        }
    }
    // Nothing of all this without the setting.
    let gateway = Gateway::start(upstream.address, &rest);
    for (status, request) in &requests {
        let answer = ask(&gateway, request, &format!("Origin: {app}\n"));
        assert_eq!((answer.status, cors_fields(&answer)), (*status, (None, None, false)), "{request}");
    }
}
