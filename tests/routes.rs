//! Routes: which upstream serves a request, and the options that a route carries. On both lanes, with real sockets.

use crate::harness::{Answer, Client, GOOD, Gateway, OTHER, Upstream, eventually, free_port, sha256_hex};
use crate::servers::http::{Reply, Step};
use std::net::SocketAddr;
use std::process::{Command, Stdio};

/// Selects the framework's lane (src/edge/server.rs).
const FRAMEWORK: &str = "TOLLGATE_TEST_FRAMEWORK_LANE";

fn start(framework: bool, upstream: SocketAddr, more: &str) -> Gateway {
    Gateway::start_with(upstream, more, |command| {
        if framework {
            command.env(FRAMEWORK, "1");
        }
    })
}

/// The lane of tollgate's own, and the framework's.
fn on_both_lanes(upstream: SocketAddr, more: &str, test: impl Fn(&Gateway)) {
    [false, true].into_iter().for_each(|framework| test(&start(framework, upstream, more)));
}

/// The access log, once it has so many lines: a request is logged a moment behind its answer.
fn lines(gateway: &Gateway, count: usize) -> Vec<serde_json::Value> {
    let mut lines = Vec::new();
    eventually("the requests are logged", || {
        lines = gateway.access_log();
        lines.len() >= count
    });
    lines
}

fn pools(pools: &[(&str, SocketAddr)]) -> String {
    let pool =
        |(name, address): &(&str, SocketAddr)| format!("[[upstream]]\nname = \"{name}\"\nservers = [\"{address}\"]\n");
    pools.iter().map(pool).collect()
}

fn head(line: &str, host: &str, more: &str) -> String {
    format!("{line} HTTP/1.1\nHost: {host}\nPRIVATE-TOKEN: {GOOD}\n{more}\n")
}

fn get(gateway: &Gateway, host: &str, path: &str) -> Answer {
    gateway.ask(&head(&format!("GET {path}"), host, ""))
}

#[test]
fn a_host_has_routes_of_its_own_and_opens_no_path_of_another_route() {
    let (one, other) = (Upstream::answering(|_| Reply::ok("one")), Upstream::answering(|_| Reply::ok("other")));
    let more = pools(&[("one", one.address), ("other", other.address)])
        + "[[route]]\npath = \"/api/v3/*\"\nhosts = [\"b.test\", \"*.c.test\"]\nupstream = \"other\"\n\
           [[route]]\npath = \"/\"\nhosts = [\"www.test\"]\nauth = \"none\"\nreason = \"pages\"\n";
    on_both_lanes(one.address, &more, |gateway| {
        for (host, expected) in [
            ("a.test", "one"),
            ("b.test", "other"),
            ("B.Test.:8080", "other"),
            ("x.b.test", "one"),
            ("c.test", "one"),
            ("x.y.c.test", "other"),
            ("www.test", "one"),
        ] {
            assert_eq!(get(gateway, host, "/api/v3/x").text(), expected, "{host}");
        }
        let without_token = |host: &str, path: &str| gateway.ask(&format!("GET {path} HTTP/1.1\nHost: {host}\n\n"));
        assert_eq!(without_token("www.test", "/pages").status, 200);
        assert_eq!(without_token("other.test", "/pages").status, 404);
        for host in ["www.test", "WWW.test.", "www.test:80"] {
            assert_eq!(without_token(host, "/api/v3/x").status, 401, "the client chose {host}");
        }
        // The other spelling of the name is forwarded as it came.
        assert!(other.seen().iter().any(|seen| seen.header("Host") == Some("B.Test.:8080")));
        other.forget();
    });
}

#[test]
fn a_route_has_a_body_limit_of_its_own() {
    let upstream = Upstream::start();
    let more = "[limits]\nbody_bytes = \"1KiB\"\n\
                [[route]]\npath = \"/api/v3/small\"\nbody_bytes = \"10B\"\n\
                [[route]]\npath = \"/api/v3/large\"\nbody_bytes = \"none\"\n";
    on_both_lanes(upstream.address, more, |gateway| {
        let post = |path: &str, length: usize, chunked: bool| {
            let body = "x".repeat(length);
            let (framing, bytes) = match chunked {
                true => ("Transfer-Encoding: chunked".into(), format!("{length:x}\r\n{body}\r\n0\r\n\r\n")),
                false => (format!("Content-Length: {length}"), body),
            };
            let mut client = gateway.client();
            let head = head(&format!("POST {path}"), "h", &format!("Content-Type: text/plain\n{framing}\n"));
            client.send(&[head.replace('\n', "\r\n").into_bytes(), bytes.into_bytes()].concat());
            client.answer().status
        };
        for chunked in [false, true] {
            for (path, length, status) in [
                ("/api/v3/small", 10, 200),
                ("/api/v3/small", 11, 413),
                ("/api/v3/x", 1024, 200),
                ("/api/v3/x", 1025, 413),
                ("/api/v3/large", 100_000, 200),
            ] {
                assert_eq!(post(path, length, chunked), status, "{path} {length} {chunked}");
            }
        }
        let whole = upstream.seen().into_iter().filter(|seen| seen.complete).map(|seen| seen.body.len());
        assert_eq!(whole.collect::<Vec<_>>(), [10, 1024, 100_000, 10, 1024, 100_000], "never as if whole");
        upstream.forget();
    });
}

#[test]
fn a_route_has_a_read_timeout_of_its_own() {
    let more = "[[route]]\npath = \"/api/v3/quick\"\nread_timeout = \"200ms\"\n";
    for framework in [false, true] {
        let (upstream, latch) = Upstream::holding(|_| true, "late");
        let gateway = start(framework, upstream.address, more);
        let mut patient = gateway.client();
        patient.send_head(&head("GET /api/v3/patient", "h", ""));
        let quick = gateway.ask(&head("POST /api/v3/quick", "h", ""));
        assert_eq!(quick.status, 504);
        assert_eq!(lines(&gateway, 1)[0]["reason"], "upstream_timeout");
        latch.open();
        assert_eq!(patient.answer().text(), "late");
    }
}

#[test]
fn a_route_has_a_request_timeout_of_its_own() {
    let (upstream, latch) = Upstream::holding(|seen| !seen.target.ends_with("now"), "late");
    let more = format!(
        "[[upstream]]\nname = \"api\"\nservers = [\"{}\"]\nrequest_timeout = \"400ms\"\n\
         [[route]]\npath = \"/api/v3/quick\"\nrequest_timeout = \"200ms\"\n\
         [[route]]\npath = \"/api/v3/export\"\nrequest_timeout = \"none\"\n",
        upstream.address
    );
    let gateway = Gateway::start(upstream.address, &more);
    let mut waiting: Vec<Client> = Vec::new();
    for path in ["export", "other", "quick"] {
        let mut client = gateway.client();
        client.send_head(&head(&format!("GET /api/v3/{path}"), "h", ""));
        waiting.push(client);
    }
    // The last one that was sent is the first one that is over.
    assert_eq!(waiting.pop().unwrap().answer().status, 504);
    assert_eq!(waiting.pop().unwrap().answer().status, 504);
    let log = lines(&gateway, 2);
    let over: Vec<_> =
        log.iter().map(|line| (line["path"].as_str().unwrap(), line["reason"].as_str().unwrap())).collect();
    let late = "upstream_request_timeout";
    assert_eq!(over, [("/api/v3/quick", late), ("/api/v3/other", late)]);
    latch.open();
    assert_eq!(waiting.pop().unwrap().answer().text(), "late");
}

#[test]
fn a_route_sets_and_removes_headers_on_both_sides() {
    let upstream = Upstream::answering(|seen| {
        let early = "HTTP/1.1 103 Early Hints\r\nX-Powered-By: Rails\r\nX-Early: 1\r\n\r\n";
        let last = "HTTP/1.1 200 OK\r\nX-Powered-By: Rails\r\nx-frame-options: A\r\nX-Frame-Options: B\r\nX-Kept: 1\r\n\
                    Content-Length: 2\r\n\r\nok";
        Reply::raw(if seen.target.ends_with("early") { [early, last].concat() } else { last.into() })
    });
    let more = "[[route]]\npath = \"/api/v3/*\"\n\
                [route.request_headers]\nset = { \"X-Site\" = \"main, 1\" }\nremove = [\"accept-encoding\"]\n\
                [route.response_headers]\nset = { \"X-Frame-Options\" = \"DENY\", \"X-New\" = \"n\" }\nremove = [\"x-powered-by\"]\n\
                [[route]]\npath = \"/api/v3/plain\"\n";
    on_both_lanes(upstream.address, more, |gateway| {
        let fields = "Accept-Encoding: gzip\nACCEPT-ENCODING: br\nx-site: mine\nX-SITE: mine\nX_Site: mine\nX.Site: mine\n\
                      Connection: X-Site\nX-Other: kept\n";
        let answer = gateway.ask(&head("GET /api/v3/x", "h", fields));
        let seen = upstream.only();
        assert_eq!(seen.all("X-Site"), ["main, 1"], "not even by Connection");
        assert_eq!(seen.all("Accept-Encoding"), [""; 0]);
        assert_eq!(seen.header("X-Other"), Some("kept"));
        assert!(!seen.head.contains("mine"), "{}", seen.head);
        assert_eq!(answer.header("X-Frame-Options"), Some("DENY"));
        assert_eq!((answer.header("X-New"), answer.header("X-Kept")), (Some("n"), Some("1")));
        assert_eq!(answer.header("X-Powered-By"), None);
        assert_eq!(answer.text(), "ok");

        let mut client = gateway.client();
        client.send_head(&head("GET /api/v3/early", "h", ""));
        let interim = client.any_answer("GET").unwrap();
        assert_eq!((interim.status, interim.header("X-Early")), (103, Some("1")));
        assert_eq!((interim.header("X-Powered-By"), interim.header("X-New")), (None, None));
        assert_eq!(client.answer().header("X-New"), Some("n"));

        // Neither on another route, nor in what tollgate says itself.
        assert_eq!(get(gateway, "h", "/api/v3/plain").header("X-Powered-By"), Some("Rails"));
        let refused = gateway.ask("GET /api/v3/x HTTP/1.1\nHost: h\n\n");
        assert_eq!((refused.status, refused.header("X-New")), (401, None));
        upstream.forget();
    });
}

/// Reads pairs of targets as sent and as forwarded, and says where the segments behind the prefix or the query differ.
const INDEPENDENT_READER: &str = r#"
import json, sys
from urllib.parse import urlsplit, unquote_to_bytes
old, new = b"/api/v3".split(b"/"), sys.argv[1].encode().rstrip(b"/").split(b"/")
def read(target):
    parts = urlsplit("http://h" + target)
    assert parts.netloc == "h" and urlsplit(target).netloc == "", target
    return [unquote_to_bytes(segment) for segment in parts.path.split("/")], parts.query
for sent, forwarded in json.load(sys.stdin):
    (before, query), (after, same) = read(sent), read(forwarded)
    assert before[:3] == old, sent
    rest = before[3:]
    if after != new + (rest or ([b""] if new == [b""] else [])) or query != same:
        print(sent, forwarded)
"#;

#[test]
fn what_is_behind_a_replaced_prefix_reads_as_it_was_judged() {
    let tails = ["", "/", "/a", "//a", "/a%2Fb", "/%61", "/a/.x", "/a;b=c", "/a%20b", "/@h/x", "/a:80", "/x%3Fy"];
    let queries = ["", "?", "?a=1&b", "?per_page=5", "?url=http://h//x", "?a=%2F../"];
    for new in ["/internal/api", "/"] {
        let upstream = Upstream::start();
        let more = format!("[[route]]\npath = \"/api/v3/*\"\nrewrite_prefix = \"{new}\"\n");
        for framework in [false, true] {
            let gateway = start(framework, upstream.address, &more);
            let (mut sent, mut refused) = (Vec::new(), 0);
            for prefix in ["/api/v3", "/api/v3", "/%61pi/v3", "//api/v3", "/api//v3"] {
                for (one, two) in tails.iter().flat_map(|one| tails.map(|two| (*one, two))) {
                    let target = format!("{prefix}{one}{two}{}", queries[(one.len() * 3 + two.len()) % queries.len()]);
                    let is_spelled = prefix == "/api/v3" && !(new == "/" && target.starts_with("/api/v3//"));
                    let status = gateway.get(&target).status;
                    assert_eq!(status, if is_spelled { 200 } else { 400 }, "{target}");
                    if is_spelled { sent.push(target) } else { refused += 1 }
                }
            }
            let seen: Vec<String> = upstream.seen().into_iter().map(|seen| seen.target).collect();
            assert_eq!(seen.len(), sent.len());
            assert!(sent.len() > 200 && refused > 400, "{} {refused}", sent.len());
            let pairs: Vec<_> = sent.iter().zip(&seen).collect();
            let mut reader = Command::new("python3")
                .args(["-c", INDEPENDENT_READER, new])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            serde_json::to_writer(reader.stdin.take().unwrap(), &pairs).unwrap();
            let read = reader.wait_with_output().unwrap();
            assert!(read.status.success());
            assert_eq!(String::from_utf8_lossy(&read.stdout), "");
            upstream.forget();
        }
    }
}

#[test]
fn a_replaced_prefix_changes_nothing_else() {
    let location = Reply::new(302, &[("Location", "http://h/internal/api/y")], "");
    let upstream = Upstream::answering(move |_| location.clone());
    let more = "[[route]]\npath = \"/api/v3/*\"\nrewrite_prefix = \"/internal/api\"\n";
    on_both_lanes(upstream.address, more, |gateway| {
        let target = format!("/api/v3/projects?private_token={GOOD}&per_page=9999&x=%41");
        let answer = gateway.ask(&format!("GET {target} HTTP/1.1\nHost: h\n\n"));
        assert_eq!(upstream.only().target, "/internal/api/projects?per_page=100&x=%41");
        assert_eq!(answer.header("Location"), Some("http://h/internal/api/y"));
        let log = lines(gateway, 1);
        assert_eq!((&log[0]["path"], &log[0]["route"]), (&"/api/v3/projects".into(), &"/api/v3/*".into()));
        upstream.forget();
        gateway.get("/api//v3/projects");
        assert_eq!(lines(gateway, 2)[1]["reason"], "prefix_spelling");
        assert_eq!(upstream.seen().len(), 0);
    });
}

#[test]
fn a_scope_of_the_token_chooses_the_upstream() {
    let all = ["main", "admin", "reports"].map(|name| (name, Upstream::answering(move |_| Reply::ok(name))));
    let token = |token: &str, scopes: &str| {
        format!("[[token]]\nsha256 = \"{}\"\nuser = \"u\"\nscopes = [{scopes}]\n", sha256_hex(token))
    };
    let tokens = token("plain-token-0001", "")
        + &token("admin-token-0001", "\"x\", \"admin\"")
        + &token("both-tokens-0001", "\"reports\", \"admin\"")
        + &token("prefix-token-001", "\"admin2\"");
    let more = pools(&all.each_ref().map(|(name, upstream)| (*name, upstream.address)))
        + "[[route]]\npath = \"/api/v3/*\"\nauth = \"optional\"\nreason = \"public\"\n\
           canary = { upstream = \"reports\", share = 0, by = \"token\" }\n\
           [[route.pool]]\nscope = \"admin\"\nupstream = \"admin\"\n\
           [[route.pool]]\nscope = \"reports\"\nupstream = \"reports\"\n";
    let gateway = Gateway::start_with_tokens(all[0].1.address, &tokens, &more);
    for (before, (token, expected)) in [
        ("plain-token-0001", "main"),
        ("admin-token-0001", "admin"),
        ("both-tokens-0001", "admin"),
        ("prefix-token-001", "main"),
    ]
    .into_iter()
    .enumerate()
    {
        let answer = gateway.ask(&format!("GET /api/v3/x HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {token}\n\n"));
        assert_eq!(answer.text(), expected, "{token}");
        assert_eq!(lines(&gateway, before + 1)[before]["upstream"], expected);
    }
    assert_eq!(gateway.ask("GET /api/v3/x HTTP/1.1\nHost: h\n\n").text(), "main", "without a token");
    let unknown = gateway.ask("GET /api/v3/x HTTP/1.1\nHost: h\nPRIVATE-TOKEN: unknown-token-1\n\n");
    assert_eq!(unknown.status, 401);
}

#[test]
fn a_canary_gets_its_share() {
    let (main, next) = (Upstream::answering(|_| Reply::ok("main")), Upstream::answering(|_| Reply::ok("next")));
    let route = |path: &str, share: &str, by: &str| {
        format!(
            "[[route]]\npath = \"/api/v3/{path}\"\ncanary = {{ upstream = \"next\", share = {share}, by = \"{by}\" }}\n"
        )
    };
    let more = pools(&[("main", main.address), ("next", next.address)])
        + &["user", "token", "request"].map(|by| route(&format!("none/{by}"), "0", by) + &route(&format!("all/{by}"), "1.0", by)).concat()
        // user-0001 stands at 0.79 of the canary `next`, and user-0002 at 0.49.
        + &route("some", "0.6", "user")
        + &route("half", "0.5", "request");
    on_both_lanes(main.address, &more, |gateway| {
        for (before, by) in ["user", "token", "request"].into_iter().enumerate() {
            assert_eq!(gateway.get(&format!("/api/v3/none/{by}")).text(), "main", "{by}");
            assert_eq!(gateway.get(&format!("/api/v3/all/{by}")).text(), "next", "{by}");
            assert_eq!(lines(gateway, 2 * before + 2)[2 * before + 1]["upstream"], "next");
        }
        for _ in 0..3 {
            let of = |token: &str| {
                gateway.ask(&format!("GET /api/v3/some HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {token}\n\n")).text()
            };
            assert_eq!((of(GOOD).as_str(), of(OTHER).as_str()), ("main", "next"));
        }
        let mut client = gateway.client();
        let mut half = || {
            client.send_head(&head("GET /api/v3/half", "h", ""));
            client.answer().text()
        };
        let next = (0..400).filter(|_| half() == "next").count();
        assert!((120..280).contains(&next), "{next} of 400: eight standard deviations off");
    });
}

#[test]
fn what_a_canary_has_no_server_for_goes_to_the_main_upstream() {
    let main = Upstream::answering(|_| Reply::ok("main"));
    let nobody = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let broken = Upstream::answering(|_| Reply(vec![Step::Close]));
    let more = pools(&[("main", main.address), ("next", nobody), ("broken", broken.address)])
        + "[[route]]\npath = \"/api/v3/*\"\ncanary = { upstream = \"next\", share = 1, by = \"request\" }\n\
           [[route]]\npath = \"/api/v3/broken\"\ncanary = { upstream = \"broken\", share = 1, by = \"request\" }\n";
    on_both_lanes(main.address, &more, |gateway| {
        for number in 1..=5 {
            let answer = gateway.ask(&head("POST /api/v3/x", "h", ""));
            assert_eq!((answer.status, answer.text().as_str()), (200, "main"), "request {number}");
        }
        assert_eq!(gateway.metric("tollgate_upstream_canary_fallbacks_total{upstream=\"next\"}"), 5.0);
        let log = lines(gateway, 5);
        let tries: Vec<_> = log.iter().map(|line| (&line["upstream"], line["attempts"].as_u64().unwrap())).collect();
        let main = &serde_json::Value::from("main");
        // The first one was refused there; the others were not tried while it is down.
        assert_eq!(tries, [(main, 2), (main, 1), (main, 1), (main, 1), (main, 1)]);
        // What may have been done is not done again.
        assert_eq!(gateway.ask(&head("POST /api/v3/broken", "h", "")).status, 502);
        assert_eq!(gateway.get("/api/v3/broken").text(), "main");
    });
}
