//! Attacks must not leave secrets in logs and metrics, break log lines, or add metric series.

use super::{End, Scene, Talk, expand};
use crate::harness::*;
use std::time::Duration;

/// A token in every place where a client might put it. `<BAD>` stands for a revoked token.
#[rustfmt::skip]
const LEAKS: &[(&str, &str)] = &[
    ("/api/v3/projects",                                   "PRIVATE-TOKEN: <GOOD>\n"),
    ("/api/v3/projects",                                   "PRIVATE-TOKEN: <BAD>\n"),
    ("/api/v3/projects",                                   "PRIVATE_TOKEN: <GOOD>\n"),
    ("/api/v3/projects",                                   "Authorization: Bearer <GOOD>\n"),
    ("/api/v3/projects",                                   "Cookie: private_token=<GOOD>\n"),
    ("/api/v3/projects",                                   "<T>Referer: http://h.test/?private_token=<GOOD>\n"),
    ("/api/v3/projects",                                   "<T>X-Request-Id: private_token=<GOOD>\n"),
    ("/api/v3/projects?private_token=<GOOD>",              ""),
    ("/api/v3/projects?private_token=<BAD>",               ""),
    ("/api/v3/projects?private_token=<GOOD>",              "PRIVATE-TOKEN: <BAD>\n"),
    ("/api/v3/projects?private%5Ftoken=<GOOD>",            ""),
    ("/api/v3/projects?[private_token]=<GOOD>",            ""),
    ("/api/v3/projects?private_token[]=<GOOD>",            ""),
    ("/api/v3/projects?x=1;private_token=<GOOD>",          ""),
    ("/api/v3/projects?PRIVATE_TOKEN=<GOOD>",              ""),
    ("/api/v3/projects?private-token=<GOOD>",              ""),
    ("/api/v3/projects?access_token=<GOOD>",               ""),
    ("/api/v3/projects?job_token=<GOOD>",                  ""),
    ("/api/v3/projects?token=<GOOD>",                      ""),
    ("/api/v3/projects?private_token=<GOOD>&a=%zz",        ""),
    ("/api/v3/../projects?private_token=<GOOD>",           ""),
    ("/api/v3/projects?url=http%3A%2F%2Fh%2F%3Fprivate_token%3D<GOOD>", ""),
    ("/nowhere?private_token=<GOOD>",                      ""),
    ("/api/v3/projects;private_token=<GOOD>",              ""),
    ("/api/v3/projects/?private_token=<GOOD>#a",           ""),
    ("/api/v3/projects#private_token=<GOOD>",              ""),
    ("/api/v3/projects&private_token=<GOOD>",              ""),
    ("/api/v3/projects%3Fprivate_token=<GOOD>",            ""),
    ("/api/v3/projects%3fprivate_token%3d<GOOD>",          ""),
    ("/api/v3/projects/private_token=<GOOD>",              ""),
    ("http://h.test/api/v3/projects?private_token=<GOOD>", ""),
    ("http://evil.test/api/v3/projects?private_token=<GOOD>", ""),
    ("http://<GOOD>:x@h.test/api/v3/projects",             ""),
    ("/api/v3/projects?private_token=<GOOD> HTTP/1.1 x",   ""),
];

/// No token is logged, also when the backend is down.
#[test]
fn no_token_is_written_down() {
    let scene = Scene::new("");
    for method in ["GET", "POST", "PURGE"] {
        for (target, lines) in LEAKS {
            let text = format!("{method} {target} HTTP/1.1\n<H>{lines}\n");
            Talk::with(scene.gateway.address, &expand(&text), 1, End::AsSaid, false);
        }
    }
    let mut problems = scene.written();

    let gone = Gateway::start(std::net::SocketAddr::from(([127, 0, 0, 1], free_port())), "");
    for (target, lines) in LEAKS {
        Talk::with(gone.address, &expand(&format!("GET {target} HTTP/1.1\n<H>{lines}\n")), 1, End::AsSaid, false);
    }
    let gone = Scene { gateway: gone, upstream: Upstream::start() };
    problems.extend(gone.written());
    problems.sort();
    problems.dedup_by_key(|problem| problem.split("\"path\"").nth(1).unwrap_or_default().to_owned());
    assert!(problems.is_empty(), "{} problems\n  {}", problems.len(), problems.join("\n  "));
}

/// peer: CVE-2024-45808. One request, one line, whatever the client writes.
#[test]
fn every_request_is_one_line_of_the_log() {
    #[rustfmt::skip]
    let cases: &[(&str, &str)] = &[
        ("GET /api/v3/a%22b HTTP/1.1\n<H><T>\n", "a quote in the path"),
        ("GET /api/v3/a'b(c)*d HTTP/1.1\n<H><T>\n", "signs in the path"),
        ("GET /api/v3/a?b={\"x\"} HTTP/1.1\n<H><T>\n", "a quote in the query"),
        ("GET /api/v3/a?b={|}[]^%22%0a%0d%00%E2%80%A8 HTTP/1.1\n<H><T>\n", "escapes in the query"),
        ("GET /api/v3/a%0a{%22status%22:200} HTTP/1.1\n<H><T>\n", "a line in the path"),
        ("GET /api/v3/a\" HTTP/1.1\n<H><T>\n", "a raw quote in the path"),
        ("GET /api/v3/\u{e2}\u{80}\u{a8}\u{ff} HTTP/1.1\n<H><T>\n", "raw bytes in the path"),
        ("GET /api/v3/a\\ HTTP/1.1\n<H><T>\n", "a backslash in the path"),
        ("GET /api/v3/<a*5000> HTTP/1.1\n<H><T>\n", "a long path"),
        ("GET /api/v3/<%E2%82%AC*500> HTTP/1.1\n<H><T>\n", "a path that is cut within a character"),
        ("!#$%&'*+-.^_`|~ /api/v3/x HTTP/1.1\n<H><T>\n", "signs in the method"),
        ("<A*20000> /api/v3/x HTTP/1.1\n<H><T>\n", "a long method"),
        ("GET <P> HTTP/1.1\n<H><T>User-Agent: \",\"status\":200}{\n\n", "JSON in the client's name"),
        ("GET <P> HTTP/1.1\n<H><T>User-Agent: \\\\\" \\n \\u0000\n\n", "backslashes in the client's name"),
        ("GET <P> HTTP/1.1\n<H><T>User-Agent: \u{ff}\u{fe}\u{e2}\u{80}\u{a8}\t\u{85}\n\n", "bytes in the client's name"),
        ("GET <P> HTTP/1.1\n<H><T>User-Agent: <\u{c3}\u{a9}*10000>\n\n", "a long name"),
        ("GET <P> HTTP/1.1\n<H><T>User-Agent: a\nUser-Agent: b\n\n", "two names"),
        ("GET <P> HTTP/1.1\n<H><T>X-Request-Id: \"}{\"\n\n", "JSON for an id"),
        ("GET <P> HTTP/1.1\n<H><T>X-Request-Id: <a*5000>\n\n", "a long id"),
        ("GET <P> HTTP/1.1\nHost: h.test\nX-Forwarded-For: \"}{\"\n<T>\n", "JSON for an address"),
        ("GET <P> HTTP/1.1\n<H>PRIVATE-TOKEN: \"}{\"\n\n", "JSON for a token"),
        ("garbage\n\n", "no request at all"),
        ("GET <P> HTTP/1.1\n<H><T>X: a<x00>b\n\n", "NUL in a field"),
    ];
    let scene = Scene::new("");
    for (text, name) in cases {
        let before = scene.gateway.access_log().len();
        Talk::with(scene.gateway.address, &expand(text), 1, End::AsSaid, false);
        eventually(name, || scene.gateway.access_log().len() > before);
        std::thread::sleep(Duration::from_millis(10));
        let lines = scene.gateway.access_log();
        assert_eq!(lines.len(), before + 1, "{name}");
        let line = lines.last().unwrap();
        let keys: Vec<&String> = line.as_object().unwrap().keys().collect();
        for key in ["time", "request_id", "client", "method", "path", "route", "status", "reason", "source"] {
            assert!(keys.iter().any(|known| *known == key), "{name}: no {key} in {line}");
        }
        assert!(line.to_string().len() < 20_000, "{name}: a line of {} bytes", line.to_string().len());
    }
    let log = std::fs::read(scene.gateway.folder.0.join("access.log")).unwrap();
    assert!(
        log.iter().all(|byte| *byte == b'\n' || (0x20..0x7f).contains(byte)),
        "the log holds more than visible ASCII"
    );
}

/// A thousand methods, paths, hosts, names, ids and tokens add no metric series.
#[test]
fn clients_mint_no_metrics() {
    let scene = Scene::new("");
    let series = || {
        let metrics = scene.gateway.metrics();
        let mut names: Vec<String> = metrics
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.rsplit_once(' '))
            .map(|(name, _)| name.to_owned())
            .collect();
        names.sort();
        names
    };
    let flood = |numbers: std::ops::Range<u32>| {
        let mut client = scene.gateway.client();
        for n in numbers {
            for head in [
                format!(
                    "GET /api/v3/path{n}?query{n}={n} HTTP/1.1\nHost: h{n}.test\nPRIVATE-TOKEN: {GOOD}\nUser-Agent: ua{n}\nX-Request-Id: id{n}\n\n"
                ),
                format!("GET /elsewhere{n} HTTP/1.1\nHost: h{n}.test\n\n"),
                format!("METHOD{n} /api/v3/path{n} HTTP/1.1\nHost: h{n}.test\n\n"),
                format!("GET /api/v3/path{n} HTTP/1.1\nHost: h{n}.test\nPRIVATE-TOKEN: token-{n}\n\n"),
                format!("GET /api/v3/{n}/../x HTTP/1.1\nHost: h{n}.test\n\n"),
            ] {
                client.send_head(&head);
                client.answer();
            }
        }
    };
    flood(0..3);
    let before = series();
    flood(3..1003);
    assert_eq!(series(), before);
    let metrics = scene.gateway.metrics();
    for word in ["path5", "h5.test", "METHOD5", "elsewhere", "ua5", "id5", "token-5"] {
        assert!(!metrics.contains(word), "{word} is in the metrics");
    }
}
