//! Vulnerabilities of other gateways. `peers.tsv` names for each one the test that holds it here: a case of the tables, a test
//! elsewhere, or one of this file, which has those that take a configuration or a store of their own. What is about a request is
//! tried at every way in: both lanes of HTTP/1, and HTTP/2. Where tollgate lacks the feature, the test shows that it is refused.

use super::http2::{self, Fields};
use super::{CLASSES, tables};
use crate::harness::*;
use crate::listeners::{announce, binary, offer};
use crate::servers::http::{HttpServer, Reply as ServerReply};
use crate::support::{Store, stderr, stdout};
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// A way into a gateway.
struct Entry {
    gateway: Gateway,
    name: &'static str,
    http2: Option<SocketAddr>,
}

impl Entry {
    /// The status; 0 for a connection or stream that was reset.
    fn ask(&self, method: &str, target: &str, lines: &[(&str, &str)]) -> u16 {
        self.ask_host("h.test", method, target, lines)
    }

    fn ask_host(&self, host: &str, method: &str, target: &str, lines: &[(&str, &str)]) -> u16 {
        if let Some(at) = self.http2 {
            let mut fields = http2::fields(method, target, lines);
            fields[3].1 = host.into();
            return http2::ask(at, &fields, &[]).unwrap_or(0);
        }
        let mut client = self.gateway.client();
        let lines: String = lines.iter().map(|(name, value)| format!("{name}: {value}\n")).collect();
        client.send_head(&format!("{method} {target} HTTP/1.1\nHost: {host}\n{lines}\n"));
        client.answer_to(method).map_or(0, |answer| answer.status)
    }
}

/// Runs a check at each way in, with a gateway of its own; `more` is TOML, and `tokens` a token file.
fn at_each_entry(upstream: &Upstream, tokens: Option<&str>, more: &str, check: impl Fn(&Entry)) {
    for (name, framework, over_http2) in
        [("the own lane", false, false), ("the framework's lane", true, false), ("HTTP/2", false, true)]
    {
        let (at, section) = http2::listener();
        let more = if over_http2 { format!("{more}{section}") } else { more.to_owned() };
        let gateway = Gateway::start_on_lane_with(framework, upstream.address, tokens, &more);
        println!("{name}");
        upstream.forget();
        check(&Entry { gateway, name, http2: over_http2.then_some(at) });
    }
}

const T: (&str, &str) = ("PRIVATE-TOKEN", GOOD);
const TARGET: &str = "/api/v3/projects";

/// A line of a token file.
fn token(token: &str, more: &str) -> String {
    format!("[[token]]\nsha256 = \"{}\"\nuser = \"user-of-it\"\n{more}\n", sha256_hex(token))
}

/// What `check` says about a configuration, and `run` too: it must end by itself, without having served.
fn refused_at_start(config: &str) -> String {
    let folder = Folder::new("test");
    let upstream = "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n";
    let listen = format!("[server]\nlisten = [\"127.0.0.1:{}\"]\n[admin]\nlisten = \"none\"\n", free_port());
    let own = if config.contains("[[upstream]]") { String::new() } else { upstream.to_owned() };
    let path = folder.write("tollgate.toml", &format!("{listen}{own}{config}"));
    let checked = tollgate().args(["check", "--config"]).arg(&path).output().unwrap();
    assert!(!checked.status.success(), "`check` accepts {config}");
    let mut child = tollgate()
        .args(["run", "--config"])
        .arg(&path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    let ended = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if Instant::now() > deadline {
            break None;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    if ended.is_none() {
        drop(child.kill());
        drop(child.wait());
    }
    assert!(ended.is_some_and(|status| !status.success()), "`run` serves with {config}");
    stderr(&checked)
}

#[test]
fn every_known_bypass_has_its_test() {
    let rows: Vec<Vec<&str>> =
        include_str!("peers.tsv").lines().skip(1).map(|line| line.split('\t').collect()).collect();
    assert_eq!(rows.len(), 91);
    let cases = tables::all();
    let mut problems = Vec::new();
    let (mut named, mut by_case) = (0, 0);
    for (index, row) in rows.iter().enumerate() {
        let [number, peer, source, what, test, case] = row[..] else { panic!("not six fields: {row:?}") };
        assert_eq!(number, (index + 1).to_string());
        assert!(!peer.is_empty() && !source.is_empty() && what.len() > 15, "{row:?}");
        let (module, function) = test.rsplit_once("::").unwrap();
        if let Some(class) =
            module.eq("attacks").then(|| CLASSES.iter().find(|(class, _)| *class == function)).flatten()
        {
            by_case += 1;
            let known = cases.iter().any(|known| {
                known.class == class.0 && known.name.starts_with("peer: ") && known.name[6..].starts_with(case)
            });
            if case.is_empty() || !known {
                problems.push(format!("{number}: no case {case:?} in {test}"));
            }
            continue;
        }
        named += 1;
        for test in test.split(' ') {
            let (module, function) = test.rsplit_once("::").unwrap();
            let path = format!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/{}"), module.replace("::", "/"));
            let text = std::fs::read_to_string(format!("{path}.rs"))
                .or_else(|_| std::fs::read_to_string(format!("{path}/mod.rs")))
                .unwrap_or_default();
            if !text.contains(&format!("#[test]\nfn {function}() {{\n")) || !case.is_empty() {
                problems.push(format!("{number}: no test {test}"));
            }
        }
    }
    println!("{by_case} by a case of the tables, {named} by a test of their own");
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    // And no case of the tables or of this file bears the name of a peer that the list does not know; this one is no bypass.
    let beyond = ["CVE-2024-45410"];
    for case in cases.iter().filter_map(|case| case.name.strip_prefix("peer: ")) {
        let known = rows.iter().any(|row| !row[5].is_empty() && case.starts_with(row[5]))
            || rows.iter().any(|row| row[2].split([' ', ',']).any(|source| case.starts_with(source)))
            || beyond.iter().any(|name| case.starts_with(name));
        assert!(known, "{case} is not in peers.tsv");
    }
}

/// Traefik CVE-2024-52003: a client's X-Forwarded-Prefix became the beginning of a redirect. Here it is removed even behind a
/// proxy that is trusted, and no answer of tollgate has it.
#[test]
fn a_clients_prefix_gets_into_no_redirect() {
    let upstream = Upstream::start();
    let lines = [("X-Forwarded-Prefix", "//evil.test"), ("X-Forwarded-Host", "evil.test"), T];
    at_each_entry(&upstream, None, "", |entry| {
        assert_eq!(entry.ask("GET", TARGET, &lines), 200);
        assert!(!upstream.only().head.contains("evil"), "{}", upstream.only().head);
    });
    let at = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let section = format!("[[listener]]\naddress = \"{at}\"\nredirect_to_https = 8443\n");
    let _gateway = Gateway::start(upstream.address, &section);
    let mut client = Client::connect(at);
    client.send_head(&format!(
        "GET {TARGET} HTTP/1.1\nHost: h.test\nX-Forwarded-Prefix: //evil.test\nX-Forwarded-Host: evil.test\n\n"
    ));
    let answer = client.answer();
    assert_eq!((answer.status, answer.header("Location")), (308, Some("https://h.test:8443/api/v3/projects")));
    let trusting = "[server]\nlisten = [\"@LISTEN@\"]\nthreads = 1\ntrusted_proxies = [\"127.0.0.0/8\"]\n[api]\nprefixes = [\"/api/v3\"]\n";
    let gateway = Gateway::start(upstream.address, trusting);
    upstream.forget();
    gateway.ask(&format!(
        "GET {TARGET} HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: {GOOD}\nX-Forwarded-For: 192.0.2.1\nX-Forwarded-Prefix: /evil\n\n"
    ));
    assert!(!upstream.only().head.contains("evil"), "{}", upstream.only().head);
    assert!(upstream.only().header("X-Forwarded-For").is_some_and(|list| list.starts_with("192.0.2.1")));
}

/// Traefik CVE-2026-65600: a rewritten path climbed out of the new prefix.
#[test]
fn a_rewritten_path_never_climbs() {
    let upstream = Upstream::start();
    let more = "[[route]]\npath = \"/api/v3/pub/*\"\nrewrite_prefix = \"/inner/public\"\nauth = \"none\"\nreason = \"a test\"\n";
    at_each_entry(&upstream, None, more, |entry| {
        assert_eq!(entry.ask("GET", "/api/v3/pub/a", &[]), 200);
        assert_eq!(upstream.only().target, "/inner/public/a");
        upstream.forget();
        for tail in [
            "/..",
            "/../admin",
            "/%2e%2e/admin",
            "/.%2E/admin",
            "/a/../../admin",
            "/..%2fadmin",
            "/..%2Fadmin",
            "/%2e%2e%2fadmin",
            "/..;/admin",
            "/..;x=1/admin",
            "/..\\admin",
            "/..%5cadmin",
            "/a%2f..%2f..%2fadmin",
            "/./../admin",
            "//../admin",
            "/..%00/admin",
            "/..?/admin",
            "%2f..%2fadmin",
            "../admin",
            "..%2fadmin",
            "/..#",
        ] {
            let status = entry.ask("GET", &format!("/api/v3/pub{tail}"), &[]);
            assert!([0, 400, 401].contains(&status), "{}: {tail}: {status}", entry.name);
        }
        assert_eq!(upstream.seen().len(), 0, "{}", entry.name);
    });
}

/// Traefik CVE-2025-66490, Caddy CVE-2026-27587 and CVE-2026-27590, oauth2-proxy CVE-2026-40575 and GHSA-7rh7-c77v-6434, heimdall
/// CVE-2026-42272, Envoy CVE-2021-29492 and CVE-2026-73511: a path was open by one reading, and what the backend served was guarded.
#[test]
fn no_spelling_leads_from_an_open_route_into_a_guarded_one() {
    let upstream = Upstream::start();
    let open = "auth = \"none\"\nreason = \"a test\"\n";
    let more = format!(
        "[[route]]\npath = \"/\"\n{open}[[route]]\npath = \"/api/v3/open/*\"\n{open}\
         [[route]]\npath = \"/api/v3/open/secret/*\"\n[[route]]\npath = \"/api/v3/open/group/secret\"\n\
         [[route]]\npath = \"/api/v3/may/*\"\nauth = \"optional\"\nreason = \"a test\"\n[[route]]\npath = \"/api/v3/may/not\"\n"
    );
    let guarded = [
        "/api/v3/projects",
        "/api/v3/projects?x=/api/v3/open/x",
        "/api/v3/open/secret",
        "/api/v3/open/secret/a",
        "/api/v3/open/secret.json",
        "/api/v3/open//secret",
        "/api/v3/open/%73ecret",
        "/api/v3/open/secret?/api/v3/open/x",
        "/api/v3/may/not",
        "/api/v3/may/no%74",
    ];
    let spelled = [
        "/api/v3/open/secret%2Fa",
        "/api/v3/open/secret%2fa",
        "/api/v3/open/secret;x",
        "/api/v3/open/secret;x/a",
        "/api/v3/open/secret%3Bx/a",
        "/api/v3/open/secret%3bx",
        "/api/v3/open/secret%3Fx",
        "/api/v3/open/secret%23x",
        "/api/v3/open/Secret",
        "/api/v3/open/%53ECRET",
        "/api/v3/open/%2573ecret",
        "/api/v3/open/secret%252Fa",
        "/api/v3/open%2Fsecret",
        "/api/v3/open/group%2Fsecret",
        "/api/v3/open/group%2fsecret",
        "/api/v3/open/group%2F%2Fsecret",
        "/api/v3/open/group%252fsecret",
        "/api/v3/open/group;x%2Fsecret",
        "/api/v3/open/x/%252e%252e/secret",
        "/api/v3/open/x%5C..%5Csecret",
        "/api/v3/open/..;/projects",
        "/API/v3/projects",
        "/%41PI/v3/projects",
        "/api%2Fv3/projects",
        "/api%2fv3%2fprojects",
        "/api;x/v3/projects",
        "/api/v3;x/projects",
        "/api/V3;x/projects",
        "/%2Fapi/v3/projects",
        "/api/v3%3F/projects",
    ];
    let passes = [
        "/login",
        "/Group/Project",
        "/x%2Fapi/v3;y%25",
        "/api/v3/open/x",
        "/api/v3/open/A%2Fb;c=%25%3F%23",
        "/api/v3/open/%C4%B0%C8%BA/x",
        "/api/v3/may/x%2Fy",
    ];
    at_each_entry(&upstream, None, &more, |entry| {
        for target in passes {
            assert_eq!(entry.ask("GET", target, &[]), 200, "{}: {target}", entry.name);
            assert_eq!(upstream.only().target, target);
            upstream.forget();
        }
        for target in guarded {
            let told =
                ["X-Forwarded-Uri", "X-Original-URI", "X-Original-URL", "X-Rewrite-URL", "X-Envoy-Original-Path"];
            let told = told.map(|name| (name, "/api/v3/open/x"));
            assert_eq!(entry.ask("GET", target, &[]), 401, "{}: {target}", entry.name);
            assert_eq!(entry.ask("GET", target, &told), 401, "{}: {target}", entry.name);
        }
        for target in spelled {
            let status = entry.ask("GET", target, &[]);
            assert!([0, 400, 401].contains(&status), "{}: {target}: {status}", entry.name);
        }
        // Where a token may come, it takes the place of the answer that the path is not clear.
        for target in ["/api/v3/may/not;x", "/api/v3/may/no%2574", "/api/v3/may/NOT"] {
            assert_eq!(entry.ask("GET", target, &[]), 401, "{}: {target}", entry.name);
            assert_eq!(upstream.seen().len(), 0, "{}: {target}", entry.name);
            assert_eq!(entry.ask("GET", target, &[T]), 200, "{}: {target} with a token", entry.name);
            upstream.forget();
        }
        assert_eq!(upstream.seen().len(), 0, "{}", entry.name);
    });
}

/// APISIX #13667: a reference to a secret that was not there was itself the secret.
#[test]
fn a_reference_that_leads_nowhere_is_no_secret() {
    for reference in ["${env:TOLLGATE_IS_NOT_SET}", "${file:/does/not/exist}"] {
        let said =
            refused_at_start(&format!("[store]\nkind = \"redis\"\nurl = \"redis://:{reference}@127.0.0.1:1\"\n"));
        assert!(said.contains("TOLLGATE_IS_NOT_SET") || said.contains("/does/not/exist"), "{said}");
    }
    // What stands for no reference is what it is: somebody's token, and no other.
    let upstream = Upstream::start();
    let tokens = token("$ENV://TOKEN-OF-ANN", "");
    at_each_entry(&upstream, Some(&tokens), "", |entry| {
        for (sent, status) in [("$ENV://TOKEN-OF-ANN", 200), ("$ENV://TOKEN-OF-BEN", 401), ("TOKEN-OF-ANN", 401)] {
            assert_eq!(entry.ask("GET", TARGET, &[("PRIVATE-TOKEN", sent)]), status, "{}: {sent}", entry.name);
        }
    });
}

/// Caddy GHSA-7r4p-vjf4-gxv4 and APISIX #13590: a client's identity field stayed if there was nothing to write in its place.
#[test]
fn a_clients_identity_fields_go_also_if_nothing_replaces_them() {
    let upstream = Upstream::start();
    let lines = [
        ("X-Tollgate-Scopes", "evil"),
        ("X-Tollgate-User", "evil"),
        ("X-Tollgate-Token-Id", "evil"),
        ("X-Tollgate-Other", "evil"),
        ("X_Tollgate_Scopes", "evil"),
        ("X-Consumer-Labels", "evil"),
        ("X-Consumer-Username", "evil"),
    ];
    let with_token = [&lines[..], &[T]].concat();
    let routes = "[[route]]\npath = \"/api/v3/open\"\nauth = \"none\"\nreason = \"a test\"\n\
                  [[route]]\npath = \"/api/v3/may\"\nauth = \"optional\"\nreason = \"a test\"\n";
    for (forward, written) in [("identity", 1), ("both", 1), ("token", 0), ("none", 0)] {
        let more = format!("[token]\nforward = \"{forward}\"\n{routes}");
        at_each_entry(&upstream, None, &more, |entry| {
            for (target, lines, user) in [
                (TARGET, &with_token[..], written),
                ("/api/v3/may", &with_token[..], written),
                ("/api/v3/may", &lines[..], 0),
                ("/api/v3/open", &lines[..], 0),
                ("/api/v3/open", &with_token[..], 0),
            ] {
                upstream.forget();
                assert_eq!(entry.ask("GET", target, lines), 200, "{} {forward} {target}", entry.name);
                let seen = upstream.only();
                assert!(!seen.head.contains("evil"), "{} {forward}: {}", entry.name, seen.head);
                assert_eq!(seen.all("X-Tollgate-User").len(), user, "{} {forward} {target}", entry.name);
            }
        });
    }
}

/// APISIX #13468: the credential was forwarded when a request passed as an anonymous one.
#[test]
fn a_route_without_a_check_gets_no_credential() {
    let upstream = Upstream::start();
    let more = "[[route]]\npath = \"/api/v3/open\"\nauth = \"none\"\nreason = \"a test\"\n";
    at_each_entry(&upstream, None, more, |entry| {
        let bearer = format!("Bearer {GOOD}");
        let cookie = format!("private_token={GOOD}");
        for (target, lines) in [
            ("/api/v3/open".to_owned(), &[T][..]),
            (format!("/api/v3/open?private_token={GOOD}"), &[]),
            (format!("/api/v3/open?a=1&private_token={GOOD}&b"), &[T]),
            ("/api/v3/open".to_owned(), &[("Authorization", bearer.as_str())]),
            ("/api/v3/open".to_owned(), &[("Cookie", cookie.as_str())]),
            ("/api/v3/open".to_owned(), &[("PRIVATE_TOKEN", GOOD), ("Proxy-Authorization", bearer.as_str())]),
        ] {
            upstream.forget();
            assert_eq!(entry.ask("GET", &target, lines), 200, "{} {target}", entry.name);
            assert!(!upstream.only().head.contains(GOOD), "{}: {}", entry.name, upstream.only().head);
        }
    });
}

/// APISIX #13529: two consumers had one key, and the last one that was loaded counted.
#[test]
fn a_token_belongs_to_one_record() {
    let upstream = "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n";
    let folder = Folder::new("test");
    folder.write("tokens.toml", &(token("a-token-of-two", "") + &token("a-token-of-two", "scopes = [\"api\"]")));
    let file = folder.write("file.toml", &format!("[store]\nkind = \"file\"\npath = \"tokens.toml\"\n{upstream}"));
    let checked = tollgate().args(["check", "--config"]).arg(file).output().unwrap();
    assert!(!checked.status.success() && stderr(&checked).contains("stands in the file twice"), "{}", stderr(&checked));

    let store = Store::with([("a-token-of-two", "ann")]);
    let lines = folder.write("tokens.jsonl", "{\"token\":\"a-token-of-two\",\"user\":\"ben\"}\n");
    let imported = store.token(&["import"], &[lines.to_str().unwrap()]);
    assert!(!imported.status.success() && stderr(&imported).contains("belongs to \"ann\""), "{}", stderr(&imported));
    let listed = stdout(&store.token(&["list"], &[]));
    assert!(listed.contains(" ann ") && !listed.contains(" ben "), "{listed}");
}

/// Caddy CVE-2026-27588: with more than a hundred hosts, another way of comparing them minded letter case.
#[test]
fn hosts_are_compared_alike_however_many_there_are() {
    let upstream = Upstream::start();
    for count in [1, 2, 99, 100, 101, 150, 300] {
        let hosts: Vec<String> = (0..count).map(|n| format!("\"open{n}.test\"")).collect();
        let more = format!(
            "[[route]]\npath = \"/api/v3/open\"\nhosts = [{}]\nauth = \"none\"\nreason = \"a test\"\n\
             [[route]]\npath = \"/api/v3/open\"\n",
            hosts.join(", ")
        );
        let last = count - 1;
        at_each_entry(&upstream, None, &more, |entry| {
            for (host, status) in [
                (format!("open{last}.test"), 200),
                (format!("OPEN{last}.TEST"), 200),
                (format!("oPeN{last}.tEsT:80"), 200),
                (format!("open{count}.test"), 401),
                (format!("OPEN{count}.test"), 401),
                (format!("open{last}.test.evil.test"), 401),
                (format!("evil.open{last}.test"), 401),
                (format!("xopen{last}.test"), 401),
            ] {
                let got = entry.ask_host(&host, "GET", "/api/v3/open", &[]);
                assert_eq!(got, status, "{}: {count} hosts, {host}", entry.name);
            }
        });
    }
}

/// oauth2-proxy CVE-2026-40574: an identity was judged by how it ends. Scopes and users are compared as a whole.
#[test]
fn scopes_are_compared_as_a_whole() {
    let upstream = Upstream::start();
    let scopes = ["xapi", "api@evil", "read_api.api", "API", "evil@x@api", "read_api:api", "api.", "api/read_api"];
    let name = |index: usize| format!("token-with-scope-{index}");
    let mut tokens: String =
        scopes.iter().enumerate().map(|(at, scope)| token(&name(at), &format!("scopes = [\"{scope}\"]"))).collect();
    tokens.push_str(&token("token-of-the-api", "scopes = [\"api\"]"));
    at_each_entry(&upstream, Some(&tokens), "[api]\nscopes = \"gitlab\"\n", |entry| {
        assert_eq!(entry.ask("GET", TARGET, &[("PRIVATE-TOKEN", "token-of-the-api")]), 200);
        for (index, scope) in scopes.iter().enumerate() {
            let status = entry.ask("GET", TARGET, &[("PRIVATE-TOKEN", &name(index))]);
            assert_eq!(status, 403, "{}: {scope}", entry.name);
        }
        assert_eq!(upstream.seen().len(), 1);
    });
}

/// Oathkeeper CVE-2021-32701: a token in the cache skipped the check of its scopes.
#[test]
fn a_cached_token_is_judged_again_for_each_request() {
    let upstream = Upstream::start();
    let store = Store::imported("{\"token\":\"reader-token-0001\",\"user\":\"ann\",\"scopes\":[\"read_api\"]}\n");
    let more = format!("[api]\nscopes = \"gitlab\"\n{}", store.section());
    at_each_entry(&upstream, None, &more, |entry| {
        let line = [("PRIVATE-TOKEN", "reader-token-0001")];
        eventually("it follows the store", || {
            entry.gateway.metric("tollgate_store_subscribed{store=\"sqlite\"}") == 1.0
        });
        for (method, status) in [("GET", 200), ("DELETE", 403), ("GET", 200), ("DELETE", 403), ("HEAD", 200)] {
            assert_eq!(entry.ask(method, TARGET, &line), status, "{}: {method}", entry.name);
        }
        let lookups = entry.gateway.metric("tollgate_store_lookups_total{result=\"found\",store=\"sqlite\"}");
        assert_eq!((lookups, upstream.seen().len()), (1.0, 3), "{}", entry.name);
    });
}

/// Oathkeeper GHSA-4mq7-pvjg-xp2r: the cache did not know which endpoint had answered.
#[test]
fn what_one_store_said_counts_for_no_other() {
    let endpoints = ["200", "401"].map(|status| {
        HttpServer::start(move |_| match status {
            "200" => ServerReply::json("{\"username\":\"ann\",\"state\":\"active\"}"),
            _ => ServerReply::status(401),
        })
    });
    let [yes, no] = [&endpoints[0], &endpoints[1]].map(|server| server.url("/api/v3/user"));
    let upstream = Upstream::start();
    let more = format!("[store]\nkind = \"introspection\"\nendpoint = \"{yes}\"\n");
    at_each_entry(&upstream, None, &more, |entry| {
        let ask = || entry.ask("GET", TARGET, &[T]);
        assert_eq!((ask(), ask()), (200, 200), "{}", entry.name);
        entry.gateway.rewrite(|text| text.replace(&yes, &no));
        assert_eq!(entry.gateway.admin_post("/reload").status, 200);
        assert_eq!(ask(), 401, "{}: the other endpoint", entry.name);
        entry.gateway.rewrite(|text| text.replace(&no, &yes));
        assert_eq!(entry.gateway.admin_post("/reload").status, 200);
        assert_eq!(ask(), 200, "{}: back again", entry.name);
    });
}

/// Envoy CVE-2024-23324: after a malformed TLV of the PROXY protocol, requests passed without a check.
#[test]
fn a_malformed_proxy_header_opens_nothing() {
    let upstream = Upstream::start();
    let at = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let gateway = Gateway::start(
        upstream.address,
        &format!("[[listener]]\naddress = \"{at}\"\nproxy_protocol = [\"127.0.0.1\"]\n"),
    );
    let v4 = [192, 0, 2, 7, 10, 0, 0, 1, 1, 2, 3, 4];
    let v6 = [0x20; 36];
    let long = |tlv: &[u8]| [&v4[..], tlv].concat();
    let mut answered = 0;
    for (name, header) in [
        ("a TLV longer than the header", binary(1, 0x11, &long(&[1, 0xff, 0xff]))),
        ("half a TLV", binary(1, 0x11, &long(&[1, 0]))),
        ("an authority that is no text", binary(1, 0x11, &long(&[2, 0, 2, 0xff, 0xfe]))),
        ("an empty TLV of an unknown type", binary(1, 0x11, &long(&[0xee, 0, 0]))),
        ("a checksum that is wrong", binary(1, 0x11, &long(&[3, 0, 4, 1, 2, 3, 4]))),
        ("a TLS part cut short", binary(1, 0x11, &long(&[0x20, 0, 3, 7, 0, 0]))),
        ("a subject in a TLS part", binary(1, 0x11, &long(b"\x20\x00\x0e\x07\x00\x00\x00\x00\x22\x00\x04root\x00"))),
        ("an unknown version", {
            let mut header = binary(1, 0x11, &v4);
            header[12] = 0x31;
            header
        }),
        ("an unknown command", binary(7, 0x11, &v4)),
        ("a family that is short of its address", binary(1, 0x21, &v4)),
        ("addresses of 65,535 bytes", binary(1, 0x21, &[&v6[..], &vec![0; 65_499]].concat())),
    ] {
        for (line, least) in [("", 401), ("PRIVATE-TOKEN: bad-token-9999\r\n", 401), ("X: y\r\n", 401)] {
            let mut client = announce(at, &header);
            offer(&mut client, format!("GET {TARGET} HTTP/1.1\r\nHost: h\r\n{line}\r\n").as_bytes());
            let status = client.try_answer().map(|answer| answer.status);
            assert!(status.is_none_or(|status| status == least || status == 400), "{name}: {status:?}");
            answered += usize::from(status.is_some());
        }
    }
    println!("{answered} of 33 were read on");
    assert_eq!(upstream.seen().len(), 0);
    assert_eq!(gateway.get(TARGET).status, 200);
}

/// Envoy CVE-2023-27491 and HAProxy CVE-2026-33555: fields and lengths that HTTP/2 can carry and HTTP/1 reads in another way.
#[test]
fn nothing_malformed_gets_from_http2_into_http1() {
    let upstream = Upstream::start();
    let (at, section) = http2::listener();
    let gateway = Gateway::start(upstream.address, &section);
    let with = |more: &[(&[u8], &[u8])]| -> Fields {
        let mut fields = http2::fields("POST", TARGET, &[T, ("content-type", "application/octet-stream")]);
        fields.extend(more.iter().map(|(name, value)| (name.to_vec(), value.to_vec())));
        fields
    };
    let evil: &[(&[u8], &[u8])] = &[
        (b"X-Evil", b"a"),
        (b"x evil", b"a"),
        (b"x:evil", b"a"),
        (b":evil", b"a"),
        (b"", b"evil"),
        (b"x\r\nevil", b"a"),
        (b"x\0evil", b"a"),
        (b"x\x80evil", b"a"),
        (b"x", b"a\r\nevil: b"),
        (b"x", b"a\nevil: b"),
        (b"x", b"evil\0"),
        (b"x", b"evil\r"),
        (b":path", b"/evil"),
        (b":method", b"EVIL"),
        (b"transfer-encoding", b"chunked"),
        (b"connection", b"evil"),
        (b"keep-alive", b"evil"),
        (b"proxy-connection", b"evil"),
        (b"upgrade", b"evil"),
        (b"te", b"evil"),
        (b"host", b"evil.test"),
        (b"content-length", b"5"),
        (b"content-length", b"1"),
        (b"content-length", b"+2"),
        (b"content-length", b"2, 2"),
        (b"content-length", b"18446744073709551618"),
    ];
    let mut number = 0;
    for field in evil {
        for body in [&[] as &[&[u8]], &[b"ab"], &[b"a", b"b"]] {
            number += 1;
            let case = number.to_string();
            let status = http2::ask(at, &with(&[(b"x-case", case.as_bytes()), *field]), body);
            // One that was broken off may be seen only later.
            let mut seen = upstream.seen();
            seen.retain(|seen| seen.complete && seen.header("X-Case") == Some(&case));
            assert!(!seen.iter().any(|seen| seen.head.to_ascii_lowercase().contains("evil")), "{field:?}: {seen:?}");
            // A body that is longer than it says is whole for the backend with its first frame, if it is whole by then.
            if field.0 == b"content-length" && (field.1, body.len()) != (b"1", 2) {
                assert_ne!(status, Some(200), "{field:?} {body:?}");
                assert_eq!(seen.len(), 0, "{field:?} {body:?}: {seen:?}");
            }
            assert!(seen.iter().all(|seen| seen.body.len() <= body.concat().len()), "{field:?} {body:?}: {seen:?}");
        }
    }
    for length in [&b"2"[..], b"0"] {
        let body: &[&[u8]] = if length == b"2" { &[b"a", b"b"] } else { &[] };
        assert_eq!(http2::ask(at, &with(&[(b"content-length", length)]), body), Some(200), "{length:?}");
    }
    assert_eq!(upstream.violations(), Vec::<String>::new());
    assert_eq!(gateway.get(TARGET).status, 200);
}

/// Envoy Gateway CVE-2025-30157: a refusal went through the filters for a backend's answers again, and that ended the process.
#[test]
fn a_refusal_passes_no_filter_of_answers() {
    let upstream = Upstream::start();
    let more = "[[route]]\npath = \"/api/v3/*\"\nresponse_headers = { set = { X-Filtered = \"yes\" } }\n";
    at_each_entry(&upstream, None, more, |entry| {
        for round in 1..=20 {
            assert_eq!(entry.ask("GET", TARGET, &[]), 401, "{}", entry.name);
            // It is counted at its end, which may be a moment behind its answer.
            eventually("it is logged", || entry.gateway.access_log().len() >= round);
            assert_eq!(entry.gateway.access_log().len(), round, "{}: one line for each", entry.name);
        }
        assert_eq!(upstream.seen().len(), 0);
        if entry.http2.is_none() {
            let refused = entry.gateway.ask(&format!("GET {TARGET} HTTP/1.1\nHost: h.test\n\n"));
            assert_eq!(refused.header("X-Filtered"), None, "{}", entry.name);
            assert_eq!(refused.header("Content-Type"), Some("application/json"), "{}", entry.name);
            assert_eq!(entry.gateway.get(TARGET).header("X-Filtered"), Some("yes"), "{}", entry.name);
        }
    });
}

/// pingora-cache CVE-2026-2836 and pingap's key_auth step: an answer was kept, and given to who may not have it. tollgate keeps
/// no answers.
#[test]
fn no_answer_is_kept_for_another_request() {
    let cached = ServerReply::new(200, &[("Cache-Control", "public, max-age=3600"), ("ETag", "\"1\"")], "the answer");
    let upstream = Upstream::answering(move |_| cached.clone());
    at_each_entry(&upstream, None, "", |entry| {
        for (host, lines, status) in [
            ("a.test", &[T][..], 200),
            ("b.test", &[T], 200),
            ("a.test", &[("PRIVATE-TOKEN", OTHER)], 200),
            ("a.test", &[("PRIVATE-TOKEN", BAD)], 401),
            ("a.test", &[], 401),
            ("a.test", &[("Cache-Control", "only-if-cached"), ("If-None-Match", "\"1\"")], 401),
            ("a.test", &[T, ("Cache-Control", "only-if-cached")], 200),
        ] {
            assert_eq!(entry.ask_host(host, "GET", TARGET, lines), status, "{} {host} {lines:?}", entry.name);
        }
        let hosts: Vec<_> =
            upstream.seen().iter().map(|seen| seen.header("Host").unwrap_or_default().to_owned()).collect();
        assert_eq!(hosts, ["a.test", "b.test", "a.test", "a.test"], "{}", entry.name);
        upstream.forget();
    });
}

/// HAProxy 0aeae2305: a length was cut to 16 bits, and the rest of a body was read as something else.
#[test]
fn lengths_hold_beyond_16_bits() {
    let upstream = Upstream::answering(|seen| ServerReply::ok(&seen.body.len().to_string()));
    let (at, section) = http2::listener();
    let gateway = Gateway::start(upstream.address, &section);
    let framework = Gateway::start_on_lane(true, upstream.address);
    for size in [65_534, 65_535, 65_536, 65_537, 131_072, 131_073, 1_048_577] {
        let body = vec![b'x'; size];
        for gateway in [&gateway, &framework] {
            let head = |framing: &str| {
                format!(
                    "POST {TARGET} HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: {GOOD}\nContent-Type: application/octet-stream\n{framing}\n\n"
                )
            };
            let mut client = gateway.client();
            for chunked in [false, true] {
                if chunked {
                    client.send_head(&head("Transfer-Encoding: chunked"));
                    client.send(&[format!("{size:x}\r\n").as_bytes(), &body[..], b"\r\n0\r\n\r\n"].concat());
                } else {
                    client.send_head(&head(&format!("Content-Length: {size}")));
                    client.send(&body);
                }
                let answer = client.answer();
                assert_eq!((answer.status, answer.text()), (200, size.to_string()), "chunked: {chunked}");
            }
        }
        let file = gateway.folder.0.join("body");
        std::fs::write(&file, &body).unwrap();
        let output = std::process::Command::new("curl")
            .args(["-sS", "--max-time", "20", "--http2-prior-knowledge", "-H", &format!("PRIVATE-TOKEN: {GOOD}")])
            .args(["-H", "Content-Type: application/octet-stream", "--data-binary", &format!("@{}", file.display())])
            .arg(format!("http://{at}{TARGET}"))
            .output()
            .unwrap();
        assert_eq!(stdout(&output), size.to_string(), "HTTP/2: {}", stderr(&output));
    }
    // Values and targets as well: one that is too long is refused, and never cut.
    for size in [65_535_usize, 65_536, 65_537, 65_536 + 15] {
        upstream.forget();
        for gateway in [&gateway, &framework] {
            let answer = gateway.ask(&format!(
                "GET {TARGET} HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: {}{GOOD}\n\n",
                "x".repeat(size - GOOD.len())
            ));
            assert!((400..500).contains(&answer.status), "{size}: {}", answer.status);
        }
        let long = format!("{GOOD}{}", "x".repeat(size - GOOD.len()));
        let status = http2::ask(at, &http2::fields("GET", TARGET, &[("PRIVATE-TOKEN", &long)]), &[]);
        assert_ne!(status, Some(200), "{size}");
        assert_eq!(upstream.seen().len(), 0);
    }
}

/// ingress-nginx CVE-2026-24513: a backend for error pages turned the 401 into a 200. There is no such setting, and what a
/// backend answers elsewhere changes no refusal.
#[test]
fn nothing_changes_the_status_of_a_refusal() {
    for section in ["api", "server", "log", "limits", "[route]"] {
        for key in ["error_page", "error_pages", "custom_errors", "error_backend", "error_body", "errors"] {
            let path = if section == "[route]" { "path = \"/api/v3/*\"\n" } else { "" };
            let config = format!("[{section}]\n{path}{key} = \"http://127.0.0.1/\"\n");
            if section == "server" {
                continue;
            }
            assert!(refused_at_start(&config).contains(key), "{config}");
        }
    }
    let upstream = Upstream::answering(|_| ServerReply::new(200, &[("X-Code", "200"), ("Status", "200 OK")], "fine"));
    at_each_entry(&upstream, None, "", |entry| {
        assert_eq!(entry.ask("GET", TARGET, &[T]), 200);
        for lines in [
            &[][..],
            &[("X-Code", "200"), ("X-Original-URI", "/"), ("X-Format", "text/html")],
            &[("Accept", "text/html"), ("X-Ingress-Name", "a"), ("Status", "200")],
        ] {
            assert_eq!(entry.ask("GET", TARGET, lines), 401, "{}", entry.name);
        }
    });
}

/// ingress-nginx#8256: an address of the endpoint that could not be used left everything open.
#[test]
fn an_endpoint_that_cannot_be_asked_opens_nothing() {
    for endpoint in
        ["not a url", "http://", "ftp://127.0.0.1/x", "http://127.0.0.1:99999/", "//h/x", "http://u:p@127.0.0.1/"]
    {
        let said = refused_at_start(&format!("[store]\nkind = \"introspection\"\nendpoint = \"{endpoint}\"\n"));
        assert!(said.contains("endpoint"), "{endpoint}: {said}");
    }
    for kind in ["", "none", "null", "anonymous"] {
        refused_at_start(&format!("[store]\nkind = \"{kind}\"\n"));
    }
    // One where nobody is, one that redirects, and one that says yes in a way that is not the agreed one.
    let upstream = Upstream::start();
    let nobody = format!("http://127.0.0.1:{}/", free_port());
    let endpoints: Vec<HttpServer> = [
        ServerReply::new(302, &[("Location", "/ok")], ""),
        ServerReply::new(204, &[], ""),
        ServerReply::new(200, &[("Content-Type", "text/html")], "<html>"),
        ServerReply::json("{}"),
        ServerReply::json("[]"),
        ServerReply::json("null"),
        ServerReply::status(500),
    ]
    .into_iter()
    .map(|reply| HttpServer::start(move |_| reply.clone()))
    .collect();
    for url in endpoints.iter().map(|server| server.url("/user")).chain([nobody]) {
        let more = format!("[store]\nkind = \"introspection\"\nendpoint = \"{url}\"\ntimeout = \"1s\"\n");
        let gateway = Gateway::start(upstream.address, &more);
        let status = gateway.get(TARGET).status;
        assert!([401, 503].contains(&status), "{url}: {status}");
    }
    assert_eq!(upstream.seen().len(), 0);
}

/// ingress-nginx#8644, APISIX CVE-2022-24112: what is asked beside a request must not be led by the client. The endpoint is
/// asked for the token, and gets nothing else of the request.
#[test]
fn the_endpoint_gets_the_token_and_nothing_else_of_a_client() {
    let endpoint = HttpServer::start(|_| ServerReply::json("{\"username\":\"ann\",\"state\":\"active\"}"));
    let upstream = Upstream::start();
    let more = format!("[store]\nkind = \"introspection\"\nendpoint = \"{}\"\n", endpoint.url("/api/v3/user"));
    at_each_entry(&upstream, None, &more, |entry| {
        endpoint.forget();
        let lines = [
            T,
            ("X-Forwarded-Uri", "/evil"),
            ("X-Original-URL", "/evil"),
            ("X-Real-IP", "127.0.0.1"),
            ("Cookie", "evil=1"),
            ("X-Custom", "evil"),
            ("User-Agent", "evil"),
            ("X-Request-Id", "evil"),
        ];
        assert_eq!(entry.ask("DELETE", "/api/v3/evil?evil=1", &lines), 200, "{}", entry.name);
        let asked: Vec<_> =
            endpoint.asked().into_iter().filter(|asked| asked.header("private-token") == GOOD).collect();
        assert_eq!(asked.len(), 1, "{}: {asked:?}", entry.name);
        assert_eq!((asked[0].method.as_str(), asked[0].target.as_str()), ("GET", "/api/v3/user"), "{}", entry.name);
        assert!(asked[0].body.is_empty() && !format!("{asked:?}").contains("evil"), "{}: {asked:?}", entry.name);
    });
}

/// APISIX CVE-2022-24112: a request for a batch of requests let a client write the address that counted.
#[test]
fn there_is_no_request_within_a_request() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let inner = format!(
        "{{\"headers\":{{\"X-Real-IP\":\"127.0.0.1\"}},\"pipeline\":[{{\"method\":\"POST\",\"path\":\"/reload\"}},\
         {{\"method\":\"GET\",\"path\":\"{TARGET}\"}}]}}"
    );
    let reloads = |gateway: &Gateway| gateway.process_log().matches("configuration reloaded").count();
    for (target, status) in [("/apisix/batch-requests", 404), ("/batch", 404), ("/$batch", 404), ("/api/v3/batch", 200)]
    {
        let answer = gateway.ask(&format!(
            "POST {target} HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: {GOOD}\nX-Real-IP: 127.0.0.1\nX-Forwarded-For: 127.0.0.1\nContent-Type: application/json\nContent-Length: {}\n\n{inner}",
            inner.len()
        ));
        assert_eq!(answer.status, status, "{target}");
    }
    // The one under the prefix went to the backend as the one request that it is.
    assert_eq!((upstream.only().target.as_str(), reloads(&gateway)), ("/api/v3/batch", 0));
}

/// docker-kong CVE-2020-11710: the admin API was on every address. Ours is on loopback unless the operator says otherwise, and
/// then `check` warns.
#[test]
fn the_admin_listener_is_on_loopback_by_default() {
    let folder = Folder::new("test");
    let upstream = "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n";
    let check = |text: &str| {
        let path =
            folder.write("tollgate.toml", &format!("{upstream}[store]\nkind = \"sqlite\"\npath = \"x.db\"\n{text}"));
        let output = tollgate().args(["check", "--config"]).arg(path).output().unwrap();
        stdout(&output) + &stderr(&output)
    };
    for address in ["0.0.0.0:9090", "[::]:9090", "192.0.2.1:9090"] {
        assert!(check(&format!("[admin]\nlisten = \"{address}\"\n")).contains("can be reached from other networks"));
    }
    assert!(!check("").contains("can be reached from other networks"));
    let example = stdout(&tollgate().arg("example-config").output().unwrap());
    assert!(example.contains("[admin]\n") && example.contains("\nlisten = \"127.0.0.1:9090\"\n"), "{example}");
    // Where a running one listens, as the kernel says it: nowhere but on loopback.
    let backend = Upstream::start();
    let gateway = Gateway::start(backend.address, "");
    let sockets = std::fs::read_to_string(format!("/proc/{}/net/tcp", gateway.pid())).unwrap();
    let admin = format!(":{:04X} 00000000:0000 0A", gateway.admin.port());
    let at: Vec<&str> = sockets.lines().filter(|line| line.contains(&admin)).collect();
    assert!(at.len() == 1 && at[0].contains(&format!("0100007F{admin}")), "{at:?}");
}

/// APISIX CVE-2020-13945: an admin key that everyone knew. There is no key and no token that is not made by the operator.
#[test]
fn no_credential_is_built_in() {
    let upstream = Upstream::start();
    let example = stdout(&tollgate().arg("example-config").output().unwrap());
    let words = example.split(|c: char| c.is_whitespace() || "\"`,=()[]".contains(c)).filter(|word| word.len() >= 4);
    let mut guesses: Vec<String> = words.map(str::to_owned).collect();
    guesses.extend(
        [
            "edd1c9f034335f136f87ad84b625c8f1",
            "4054f7cf07e344346cd3f287985e76a2",
            "admin",
            "root",
            "password",
            "changeme",
            "secret",
            "token",
            "default",
            "tollgate",
            "test",
            "5iveL!fe",
            "none",
            "null",
            "true",
            "tg-",
            "demo",
        ]
        .map(str::to_owned),
    );
    guesses.sort();
    guesses.dedup();
    assert!(guesses.len() > 300, "{}", guesses.len());
    let gateway = Gateway::start(upstream.address, "[store]\nkind = \"sqlite\"\npath = \"tokens.db\"\n");
    let mut client = gateway.client();
    for guess in guesses.iter().filter(|guess| guess.bytes().all(|byte| byte.is_ascii_graphic())) {
        client.send_head(&format!("GET {TARGET} HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: {guess}\n\n"));
        assert_eq!(client.answer().status, 401, "{guess}");
    }
    assert_eq!(upstream.seen().len(), 0);
    let config = gateway.folder.0.join("tollgate.toml");
    let listed = tollgate().args(["token", "list", "--config"]).arg(config).output().unwrap();
    assert!(listed.status.success() && stdout(&listed).lines().count() <= 1, "{}", stdout(&listed));
}

/// APISIX jwt-auth: what a user wrote into a record took the place of what decides. Names within other values, and names that
/// occur twice, decide nothing.
#[test]
fn what_users_write_about_themselves_decides_nothing() {
    let upstream = Upstream::start();
    for (body, may) in [
        ("{\"active\":true,\"username\":\"ann\"}", true),
        ("{\"active\":false,\"username\":\"ann\"}", false),
        ("{\"username\":\"ann\"}", false),
        ("{\"username\":\"ann\",\"profile\":{\"active\":true}}", false),
        ("{\"active\":false,\"username\":\"ann\",\"bio\":\"\\\",\\\"active\\\":true,\\\"x\\\":\\\"\"}", false),
        ("{\"active\":false,\"username\":\"ann\",\"active\":true}", false),
        ("{\"active\":true,\"username\":\"ann\",\"active\":false}", false),
        ("{\"active\":\"true\",\"username\":\"ann\"}", false),
        ("{\"active\":1,\"username\":\"ann\"}", false),
        ("{\"Active\":true,\"username\":\"ann\"}", false),
        ("{\"\\u0061ctive\":false,\"active\":true,\"username\":\"ann\"}", false),
        ("{\"active\":true,\"username\":\"ann\",\"exp\":1}", false),
        ("{\"active\":true,\"username\":\"ann\",\"exp\":1,\"exp\":99999999999}", false),
        ("{\"active\":true,\"username\":\"ann\",\"profile\":{\"exp\":1}}", true),
        ("{\"active\":true,\"username\":\"ann\\r\\nX-Evil: 1\"}", false),
    ] {
        let endpoint = HttpServer::start(move |_| ServerReply::json(body));
        let folder = Folder::new("test");
        let secret = folder.write("secret", "a secret\n").display().to_string();
        let more = format!(
            "[token]\nforward = \"identity\"\n[store]\nkind = \"introspection\"\nmode = \"rfc7662\"\nclient_id = \"tollgate\"\nclient_secret_file = \"{secret}\"\nendpoint = \"{}\"\n",
            endpoint.url("/introspect")
        );
        let gateway = Gateway::start(upstream.address, &more);
        upstream.forget();
        let status = gateway.get(TARGET).status;
        assert!(if may { status == 200 } else { [401, 503].contains(&status) }, "{body}: {status}");
        assert_eq!(upstream.seen().len(), usize::from(may), "{body}");
        assert!(upstream.seen().iter().all(|seen| !seen.head.contains("Evil")));
    }
}

/// Tyk PR #7671: a token could be derived from what everyone may see. Neither the digest nor the id nor the user is a token.
#[test]
fn what_is_public_about_a_token_is_no_token() {
    let upstream = Upstream::start();
    let digest = sha256_hex(GOOD);
    let bytes: Vec<u8> = (0..64).step_by(2).map(|at| u8::from_str_radix(&digest[at..at + 2], 16).unwrap()).collect();
    use base64::Engine as _;
    let mut public = vec![
        digest.clone(),
        digest.to_ascii_uppercase(),
        digest[..12].to_owned(),
        format!("sha256:{digest}"),
        format!("tg-{}", &digest[..12]),
        base64::engine::general_purpose::STANDARD.encode(&bytes),
        base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(&bytes),
        sha256_hex(&digest),
        "user-0001".to_owned(),
    ];
    // As it would be if the digest were cut, or compared without case.
    public.extend([GOOD.to_ascii_uppercase(), GOOD[..GOOD.len() - 1].to_owned(), format!("{GOOD}0"), GOOD.repeat(2)]);
    at_each_entry(&upstream, None, "", |entry| {
        assert_eq!(entry.ask("GET", TARGET, &[T]), 200);
        for guess in &public {
            assert_eq!(entry.ask("GET", TARGET, &[("PRIVATE-TOKEN", guess)]), 401, "{}: {guess}", entry.name);
        }
        assert_eq!(upstream.seen().len(), 1);
    });
}

/// Tyk a3adb936b: requests changed one cached entry at a time, and the process ended.
#[test]
fn one_token_is_used_by_many_while_it_is_forgotten() {
    let upstream = Upstream::start();
    let store = Store::with([("token-of-everyone", "ann")]);
    let listen = "[server]\nlisten = [\"@LISTEN@\"]\nthreads = 2\n";
    let gateway = Gateway::start(upstream.address, &format!("{listen}{}", store.section()));
    let id = &sha256_hex("token-of-everyone")[..12];
    let passed = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                let mut client = gateway.client();
                for n in 0..150 {
                    client.send_head(&format!(
                        "GET {TARGET}?n={n} HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: token-of-everyone\n\n"
                    ));
                    // A lookup that was overtaken by changes four times says that it cannot tell.
                    let status = client.answer().status;
                    assert!([200, 503].contains(&status), "{status}");
                    passed.fetch_add(usize::from(status == 200), std::sync::atomic::Ordering::Relaxed);
                }
            });
        }
        for _ in 0..60 {
            assert_eq!(gateway.admin_post(&format!("/cache/forget?sha256={id}")).status, 200);
        }
    });
    let passed = passed.into_inner();
    assert!(passed == upstream.seen().len() && passed > 450, "{passed} of 900 passed, {} seen", upstream.seen().len());
    let request = format!("GET {TARGET} HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: token-of-everyone\n\n");
    assert_eq!(gateway.ask(&request).status, 200);
    assert!(!gateway.process_log().contains("panic"), "{}", gateway.process_log());
}

/// Pomerium CVE-2024-47616, Envoy Gateway CVE-2025-24030: a token for one API opened another, and the metrics' port led to the
/// admin API. What a caller may reach and what the operator may reach have no path in common.
#[test]
fn a_callers_token_opens_nothing_of_the_operators() {
    let upstream = Upstream::start();
    let operators = [
        "/",
        "/metrics",
        "/healthz",
        "/readyz",
        "/status",
        "/upstreams",
        "/reload",
        "/upgrade",
        "/cache/forget",
        "//metrics",
        "/%6detrics",
        "/metrics/",
        "/debug/pprof",
        "/admin",
    ];
    at_each_entry(&upstream, None, "", |entry| {
        for target in operators {
            for method in ["GET", "POST"] {
                let status =
                    entry.ask(method, target, &[T, ("X-Forwarded-For", "127.0.0.1"), ("Forwarded", "for=127.0.0.1")]);
                assert_eq!(status, 404, "{}: {method} {target}", entry.name);
            }
        }
        assert_eq!(upstream.seen().len(), 0, "{}", entry.name);
    });
    let gateway = Gateway::start(upstream.address, "");
    let admin = |method: &str, target: &str| {
        let mut client = Client::connect(gateway.admin);
        client.send_head(&format!(
            "{method} {target} HTTP/1.1\nHost: localhost\nPRIVATE-TOKEN: {GOOD}\nConnection: close\nContent-Length: 0\n\n"
        ));
        client.answer_to(method).map_or(0, |answer| answer.status)
    };
    for target in [
        TARGET,
        "/api/v3/user",
        "/metrics/../reload",
        "/metrics/%2e%2e/reload",
        "/metrics;/reload",
        "/metrics%2freload",
        "/metrics/reload",
        "//reload",
        "/reload/",
        "/RELOAD",
        "/debug/pprof",
        "/config_dump",
        "/metrics/..;/reload",
    ] {
        for method in ["GET", "POST"] {
            let status = admin(method, target);
            assert!([400, 404].contains(&status), "{method} {target}: {status}");
        }
    }
    assert_eq!(admin("GET", "/metrics"), 200);
    assert_eq!(admin("POST", "/metrics"), 405);
    assert_eq!(admin("GET", "/reload"), 405);
    assert_eq!(upstream.seen().len(), 0);
    assert_eq!(gateway.process_log().matches("configuration reloaded").count(), 0);
}

/// Pomerium CVE-2021-41230: a change of what a user may was not seen until the next login.
#[test]
fn a_changed_record_counts_for_connections_that_are_open() {
    let upstream = Upstream::start();
    let tokens = token("token-that-changes", "scopes = [\"api\"]");
    at_each_entry(&upstream, Some(&tokens), "[api]\nscopes = \"gitlab\"\n", |entry| {
        let mut kept = entry.gateway.client();
        let mut over_kept = || {
            kept.send_head(&format!("DELETE {TARGET}/1 HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: token-that-changes\n\n"));
            kept.answer().status
        };
        let fresh = || entry.ask("DELETE", "/api/v3/projects/1", &[("PRIVATE-TOKEN", "token-that-changes")]);
        assert_eq!((over_kept(), fresh()), (200, 200), "{}", entry.name);
        entry.gateway.folder.write("tokens.toml", &tokens.replace("\"api\"", "\"read_api\""));
        eventually("the change counts", || over_kept() == 403 && fresh() == 403);
        entry.gateway.folder.write("tokens.toml", &tokens.replace("user-of-it", "another"));
        eventually("back again", || over_kept() == 200 && fresh() == 200);
    });
}
