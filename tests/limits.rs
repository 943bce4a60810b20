//! Limits by amount and by address, from outside: what a client gets, what is counted, and what is not taken away from others.

use crate::harness::*;
use crate::support::{get, stdout};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;

const TARGET: &str = "/api/v3/projects";

fn limit(keys: &str) -> String {
    format!("[[limit]]\nname = \"l\"\n{keys}\n")
}

/// As many statuses as requests, one after the other.
pub fn statuses(gateway: &Gateway, token: &str, count: usize) -> Vec<u16> {
    let mut client = gateway.client();
    let ask = |_| {
        client.send_head(&get(token, TARGET));
        client.answer().status
    };
    (0..count).map(ask).collect()
}

fn counted(gateway: &Gateway, name: &str, result: &str) -> f64 {
    gateway.metric(&format!("tollgate_limit_requests_total{{limit=\"{name}\",result=\"{result}\"}}"))
}

/// With the lines of all requests that were answered.
fn log_of(gateway: &Gateway) -> Vec<serde_json::Value> {
    // Waits until they are counted.
    gateway.metrics();
    gateway.access_log()
}

fn unix_now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}

#[test]
fn who_sends_too_much_gets_429_with_the_time_to_wait_and_nobody_else_does() {
    let upstream = Upstream::start();
    // One in twenty seconds: nothing flows in while the test runs.
    let gateway = Gateway::start(upstream.address, &limit("rate = \"180/h\"\nburst = 3\ncost = { write = 2 }"));
    let mut client = gateway.client();
    for _ in 0..3 {
        client.send_head(&get(GOOD, TARGET));
        let answer = client.answer();
        assert_eq!(answer.status, 200);
        // A Go client takes the first answer with this field for its own speed.
        let told = answer.headers.iter().find(|(name, _)| name.to_lowercase().starts_with("ratelimit"));
        assert_eq!(told, None);
    }
    client.send_head(&get(GOOD, TARGET));
    let answer = client.answer();
    assert_eq!((answer.status, answer.text().as_str()), (429, "{\"message\":\"429 Too Many Requests\"}"));
    let field = |name: &str| answer.header(name).unwrap_or_else(|| panic!("{name}: {answer:?}")).to_owned();
    let (wait, reset) = (field("Retry-After"), field("RateLimit-Reset"));
    assert!((18..=20).contains(&wait.parse::<u64>().unwrap()), "{wait}");
    assert!((unix_now() + 17..=unix_now() + 21).contains(&reset.parse().unwrap()), "{reset}");
    assert_eq!((field("RateLimit-Limit"), field("RateLimit-Remaining")), ("3".into(), "0".into()));
    assert_eq!((field("Content-Type"), field("Cache-Control")), ("application/json".into(), "no-store".into()));
    // HEAD has the same head and no body; a write has to wait for twice as much.
    client.send_head(&format!("HEAD {TARGET} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\n\n"));
    let head = client.answer_to("HEAD").unwrap();
    assert_eq!((head.status, head.body.len()), (429, 0));
    client.send_head(&format!("POST {TARGET} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\nContent-Length: 0\n\n"));
    let write = client.answer();
    assert!((36..=40).contains(&write.header("Retry-After").unwrap().parse::<u64>().unwrap()), "{write:?}");
    assert_eq!(statuses(&gateway, OTHER, 4), [200, 200, 200, 429]);
    assert_eq!(upstream.seen().len(), 6);
    assert_eq!((counted(&gateway, "l", "allowed"), counted(&gateway, "l", "refused")), (6.0, 4.0));
    let log = log_of(&gateway);
    assert_eq!((log[3]["reason"].as_str(), log[3]["limit"].as_str()), (Some("limit_rate"), Some("l")));
    assert_eq!((log[3]["by"].as_str(), log[3]["user"].as_str()), (Some("gate"), Some("user-0001")));
    assert!(log[0]["limit"].is_null());
}

#[test]
fn http2_has_the_same_buckets() {
    let upstream = Upstream::start();
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
    let more = format!("{}[[listener]]\naddress = \"{at}\"\n", limit("rate = \"60/h\"\nburst = 3"));
    let gateway = Gateway::start(upstream.address, &more);
    let curl = || {
        let token = format!("PRIVATE-TOKEN: {GOOD}");
        let args = ["-sS", "-i", "--max-time", "20", "--http2-prior-knowledge", "-H", &token];
        stdout(&Command::new("curl").args(args).arg(format!("http://{at}{TARGET}")).output().unwrap())
    };
    assert!(curl().starts_with("HTTP/2 200"));
    let [_, _, refused] = [(); 3].map(|()| curl());
    assert!(refused.starts_with("HTTP/2 429"), "{refused}");
    assert!(refused.contains("\nretry-after: ") && refused.contains("\nratelimit-limit: 1\r\n"), "{refused}");
    assert!(refused.ends_with("{\"message\":\"429 Too Many Requests\"}"), "{refused}");
    drop(gateway);
}

#[test]
fn a_bad_token_is_a_bad_token_and_uses_up_nothing_of_others() {
    let upstream = Upstream::start();
    let all = "[[limit]]\nname = \"all\"\nkey = []\nrate = \"60/h\"\nburst = 3\n";
    let gateway = Gateway::start(upstream.address, all);
    assert_eq!(statuses(&gateway, BAD, 20), [401; 20]);
    let missing = gateway.ask(&format!("GET {TARGET} HTTP/1.1\nHost: h\n\n"));
    assert_eq!(missing.status, 401);
    assert_eq!(statuses(&gateway, GOOD, 4), [200, 200, 200, 429]);
    assert_eq!(statuses(&gateway, BAD, 1), [401], "also when the limit is used up");
    assert_eq!(counted(&gateway, "all", "allowed"), 3.0);
}

#[test]
fn an_address_is_limited_before_its_token_is_looked_up() {
    let upstream = Upstream::start();
    let more = format!(
        "[server]\nlisten = [\"@LISTEN@\"]\ntrusted_proxies = [\"127.0.0.1\"]\n{}",
        limit("key = [\"address\"]\nrate = \"60/h\"\nburst = 5\nprefix_v4 = 24")
    );
    let gateway = Gateway::start(upstream.address, &more);
    let ask = |address: &str, token: &str| {
        gateway.ask(&format!("GET {TARGET} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {token}\nX-Forwarded-For: {address}\n\n"))
    };
    // Each token is unknown, and another one: those that count must have been looked up, and no others.
    let statuses: Vec<_> = (0..20).map(|n| ask(&format!("192.0.2.{n}"), &format!("{BAD}-{n}")).status).collect();
    assert_eq!((&statuses[..5], &statuses[5..]), (&[401; 5][..], &[429; 15][..]));
    assert_eq!(gateway.metric("tollgate_cache_lookups_total{result=\"miss\"}"), 5.0);
    assert_eq!(ask("192.0.2.77", GOOD).status, 429);
    assert_eq!(ask("192.0.3.1", GOOD).status, 200, "another network");
    assert_eq!(ask("2001:db8::1", GOOD).status, 200);
    // Connections end in any order.
    let log = log_of(&gateway);
    let line = log.iter().find(|line| line["client"] == "192.0.2.5").unwrap();
    assert_eq!(line["reason"].as_str(), Some("limit_rate"));
    assert_eq!(line["token"].as_str(), Some(&sha256_hex(&format!("{BAD}-5"))[..12]));
}

#[test]
fn what_one_limit_refuses_the_others_do_not_count() {
    let upstream = Upstream::start();
    let limits = "[[limit]]\nname = \"address\"\nkey = [\"address\"]\nrate = \"60/h\"\nburst = 7\n\
                  [[limit]]\nname = \"token\"\nrate = \"60/h\"\nburst = 2\n\
                  [[limit]]\nname = \"all\"\nkey = []\nrate = \"60/h\"\nburst = 50\n";
    let gateway = Gateway::start(upstream.address, limits);
    let mut first = vec![429; 40];
    first[..2].fill(200);
    assert_eq!(statuses(&gateway, GOOD, 40), first);
    assert_eq!(statuses(&gateway, OTHER, 3), [200, 200, 429]);
    // A token that has to be looked up: its address is asked before, and gets back what it gave.
    for _ in 0..5 {
        assert_eq!(gateway.admin_post("/cache/forget").status, 200);
        assert_eq!(statuses(&gateway, GOOD, 1), [429]);
    }
    // 3 of 7 are left for whoever comes from here; unknown tokens take them.
    assert_eq!(statuses(&gateway, BAD, 5), [401, 401, 401, 429, 429]);
    for (name, allowed, refused) in [("address", 7.0, 2.0), ("token", 4.0, 44.0), ("all", 4.0, 0.0)] {
        assert_eq!(
            (counted(&gateway, name, "allowed"), counted(&gateway, name, "refused")),
            (allowed, refused),
            "{name}"
        );
    }
}

#[test]
fn a_dry_run_counts_and_refuses_nothing() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, &limit("rate = \"60/h\"\nburst = 2\ndry_run = true"));
    assert_eq!(statuses(&gateway, GOOD, 5), [200; 5]);
    assert_eq!((counted(&gateway, "l", "allowed"), counted(&gateway, "l", "dry_run")), (2.0, 3.0));
    let log = log_of(&gateway);
    assert_eq!((log[4]["reason"].as_str(), log[4]["limit_dry_run"].as_str()), (Some("ok"), Some("l")));
    assert!(log[1]["limit_dry_run"].is_null() && log[4]["limit"].is_null());
}

#[test]
fn places_of_requests_in_flight_are_free_when_their_clients_are_gone() {
    let (upstream, latch) = Upstream::holding(|seen| seen.target.ends_with("/slow"), "done");
    let gateway = Gateway::start(upstream.address, &limit("rate = \"none\"\nconcurrency = 2"));
    let slow = || {
        let mut client = gateway.client();
        client.send_head(&get(GOOD, "/api/v3/slow"));
        client
    };
    let held = [slow(), slow()];
    eventually("both are at the backend", || upstream.seen().len() == 2);
    let refused = gateway.ask(&get(GOOD, TARGET));
    assert_eq!((refused.status, refused.header("Retry-After")), (429, Some("1")));
    assert_eq!(refused.header("RateLimit-Limit"), None, "there is no number for a minute");
    assert_eq!(gateway.ask(&get(OTHER, TARGET)).status, 200);
    drop(held);
    eventually("the places are free", || gateway.ask(&get(GOOD, TARGET)).status == 200);
    // Also of one that ends well.
    let mut client = gateway.client();
    for _ in 0..10 {
        client.send_head(&get(GOOD, TARGET));
        assert_eq!(client.answer().status, 200);
    }
    let log = log_of(&gateway);
    assert!(log.iter().any(|line| line["reason"] == "limit_concurrency" && line["limit"] == "l"), "{log:?}");
    latch.open();
}

#[test]
fn quotas_refuse_to_the_end_of_the_day_or_the_month() {
    let upstream = Upstream::start();
    for (quota, longest, per_minute) in [("2/day", 86_400, "1"), ("2/month", 31 * 86_400, "1")] {
        let gateway = Gateway::start(upstream.address, &limit(&format!("rate = \"none\"\nquota = \"{quota}\"")));
        assert_eq!(statuses(&gateway, GOOD, 2), [200, 200]);
        let answer = gateway.get(TARGET);
        let number = |name: &str| answer.header(name).unwrap().parse::<u64>().unwrap();
        assert_eq!((answer.status, answer.header("RateLimit-Limit")), (429, Some(per_minute)));
        let (wait, reset) = (number("Retry-After"), number("RateLimit-Reset"));
        assert!((1..=longest).contains(&wait), "{wait}");
        assert_eq!(reset % 86_400, 0, "midnight in UTC");
        assert_eq!(log_of(&gateway)[2]["reason"], "limit_quota");
    }
}

#[test]
fn a_reload_keeps_the_buckets_of_limits_that_stay_and_says_so() {
    let upstream = Upstream::start();
    let token = "[[limit]]\nname = \"kept\"\nrate = \"60/h\"\nburst = 3\n";
    let user = "[[limit]]\nname = \"changed\"\nkey = [\"user\"]\nrate = \"60/h\"\nburst = 3\n";
    let gateway = Gateway::start(upstream.address, &format!("{token}{user}"));
    assert_eq!(statuses(&gateway, GOOD, 2), [200, 200]);
    gateway.rewrite(|text| text.replace("key = [\"user\"]\nrate = \"60/h\"", "key = [\"user\"]\nrate = \"61/h\""));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    eventually("the log says what is kept", || {
        let log = gateway.process_log();
        let says = |line: &str| log.contains(line);
        says("limits that keep their buckets: kept\n") && says("limits that begin with full buckets: changed\n")
    });
    assert_eq!(statuses(&gateway, GOOD, 2), [200, 429]);
    assert_eq!(log_of(&gateway).last().unwrap()["limit"], "kept");
}

#[test]
fn addresses_are_let_in_or_kept_out() {
    let upstream = Upstream::start();
    let more = "[server]\nlisten = [\"@LISTEN@\"]\ntrusted_proxies = [\"127.0.0.1\"]\n\
                [limits]\nallow = [\"10.0.0.0/8\", \"2001:db8::/32\"]\ndeny = [\"10.6.6.0/24\"]\n\
                [[route]]\npath = \"/api/v3/admin/*\"\nallow = [\"10.1.0.0/16\"]\n";
    let gateway = Gateway::start(upstream.address, more);
    let ask = |address: &str, target: &str, token: &str| {
        let chain = if address.is_empty() { String::new() } else { format!("X-Forwarded-For: {address}\n") };
        gateway.ask(&format!("GET {target} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {token}\n{chain}\n"))
    };
    for (address, target, status) in [
        ("10.2.3.4", TARGET, 200),
        ("10.1.3.4", "/api/v3/admin/users", 200),
        ("10.2.3.4", "/api/v3/admin/users", 403),
        ("10.6.6.1", TARGET, 403),
        ("::ffff:10.6.6.1", TARGET, 403),
        ("::ffff:10.6.7.1", TARGET, 200),
        ("2001:db8::1", TARGET, 200),
        ("2001:db9::1", TARGET, 403),
        ("192.0.2.1", TARGET, 403),
        ("192.0.2.1, 10.1.1.1", TARGET, 200),
        // The proxy itself.
        ("", TARGET, 403),
    ] {
        let answer = ask(address, target, GOOD);
        assert_eq!(answer.status, status, "{address} {target}");
        if status == 403 {
            assert_eq!(answer.text(), "{\"message\":\"403 Forbidden\"}");
        }
    }
    // Nothing is told about tokens to those who are kept out, and nothing looked up.
    assert_eq!(ask("192.0.2.1", TARGET, BAD).status, 403);
    assert_eq!(ask("10.1.1.1", TARGET, BAD).status, 401);
    assert_eq!(ask("192.0.2.1", "/elsewhere", GOOD).status, 403);
    let log = log_of(&gateway);
    let refused: Vec<_> = log.iter().filter(|line| line["status"] == 403).map(|line| line["reason"].as_str()).collect();
    assert_eq!(refused, [Some("address"); 8]);
    assert_eq!(upstream.seen().len(), 5);
}

#[test]
fn the_draft_fields_are_in_every_answer_where_they_are_switched_on() {
    let own = [("RateLimit", "\"own\";r=1"), ("RateLimit-Limit", "9")];
    let upstream = Upstream::answering(move |_| Reply::new(200, &own, "{}"));
    let more = "[limits]\nrate_limit_fields = true\n\
                [[limit]]\nname = \"rate\"\nrate = \"60/min\"\nburst = 10\n\
                [[limit]]\nname = \"day\"\nkey = [\"user\"]\nrate = \"none\"\nquota = \"100/day\"\n\
                [[limit]]\nname = \"now\"\nkey = [\"address\"]\nrate = \"none\"\nconcurrency = 5\n";
    let gateway = Gateway::start(upstream.address, more);
    let answer = gateway.get(TARGET);
    assert_eq!(
        answer.header("RateLimit-Policy"),
        Some("\"rate\";q=60;w=60, \"day\";q=100;w=86400, \"now\";q=5;qu=\"concurrent-requests\"")
    );
    let left = answer.header("RateLimit").unwrap();
    assert!(left.starts_with("\"rate\";r=9;t=1, \"day\";r=99;t=") && left.ends_with(", \"now\";r=4"), "{left}");
    assert_eq!(answer.header("RateLimit-Limit"), Some("9"), "the backend's own");
    // Of a bad token, only what is known before.
    let bad = gateway.ask(&get(BAD, TARGET));
    assert_eq!((bad.status, bad.header("RateLimit")), (401, Some("\"now\";r=4")));
    let refused = (0..100).map(|_| gateway.get(TARGET)).find(|answer| answer.status == 429).unwrap();
    let left = refused.header("RateLimit").unwrap();
    assert!(left.starts_with("\"rate\";r=0;t=10"), "{left}");
    assert_eq!(refused.header("RateLimit-Limit"), Some("60"));
}

#[test]
fn routes_have_limits_of_their_own() {
    let upstream = Upstream::start();
    let more = "[[route]]\npath = \"/api/v3/search\"\n\
                [[limit]]\nname = \"search\"\nkey = [\"user\", \"route\"]\nrate = \"60/h\"\nburst = 4\n\
                routes = [\"/api/v3/search\"]\nusers = [\"user-0001\"]\ncost = { \"/api/v3/search\" = 2 }\n";
    let gateway = Gateway::start(upstream.address, more);
    let ask = |token: &str, target: &str| gateway.ask(&get(token, target)).status;
    let mine: Vec<_> = (0..3).map(|_| ask(GOOD, "/api/v3/search")).collect();
    assert_eq!(mine, [200, 200, 429]);
    assert_eq!(ask(GOOD, "/api/v3//search"), 429, "in any spelling");
    assert!((0..10).all(|_| ask(OTHER, "/api/v3/search") == 200 && ask(GOOD, TARGET) == 200));
}

/// An entry of the token file, with these keys.
fn bound(token: &str, keys: &str) -> String {
    format!("[[token]]\nsha256 = \"{}\"\nuser = \"user-{}\"\n{keys}\n", sha256_hex(token), &token[11..])
}

const PROXIED: &str = "[server]\nlisten = [\"@LISTEN@\"]\nthreads = 1\ntrusted_proxies = [\"127.0.0.1/32\"]\n";

#[test]
fn a_token_is_good_only_from_its_networks_and_with_its_methods() {
    let upstream = Upstream::start();
    let tokens = bound(GOOD, "networks = [\"10.0.0.0/8\", \"2001:db8::/32\"]\nmethods = [\"GET\", \"HEAD\"]")
        + &bound(OTHER, "");
    let gateway = Gateway::start_with_tokens(upstream.address, &tokens, PROXIED);
    let ask = |token: &str, method: &str, from: &str| {
        let head = format!("{method} {TARGET} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {token}\nX-Forwarded-For: {from}\n");
        gateway.ask(&(head + if method == "GET" { "\n" } else { "Content-Length: 0\n\n" }))
    };
    for (token, method, from, wanted) in [
        (GOOD, "GET", "10.1.2.3", 200),
        (GOOD, "GET", "::ffff:10.1.2.3", 200),
        (GOOD, "GET", "2001:db8::7", 200),
        (GOOD, "GET", "11.1.2.3", 403),
        // The rightmost address that is no proxy's: what a client says of itself does not count.
        (GOOD, "GET", "10.1.2.3, 11.1.2.3", 403),
        (GOOD, "POST", "10.1.2.3", 403),
        (GOOD, "POST", "11.1.2.3", 403),
        (OTHER, "POST", "11.1.2.3", 200),
    ] {
        let answer = ask(token, method, from);
        assert_eq!(answer.status, wanted, "{method} from {from}");
        if wanted == 403 {
            assert_eq!(answer.text(), "{\"message\":\"403 Forbidden\"}");
        }
    }
    assert_eq!(upstream.seen().len(), 4);
    let reasons: Vec<_> =
        log_of(&gateway).iter().filter_map(|line| line["reason"].as_str().map(str::to_owned)).collect();
    let reasons: Vec<_> = reasons.iter().filter(|reason| *reason != "ok").collect();
    assert_eq!(reasons, ["token_network", "token_network", "token_method", "token_network"]);
}

#[test]
fn a_peer_without_an_address_is_in_no_network() {
    use std::io::{Read as _, Write as _};
    let upstream = Upstream::start();
    let folder = Folder::new("unix");
    let socket = folder.0.join("s");
    let server = format!("[server]\nlisten = [\"@LISTEN@\", \"unix:{}\"]\nthreads = 1\n", socket.display());
    let tokens = bound(GOOD, "networks = [\"0.0.0.0/0\", \"::/0\"]") + &bound(OTHER, "");
    let gateway = Gateway::start_with_tokens(upstream.address, &tokens, &server);
    let ask = |token: &str| {
        let mut peer = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        peer.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
        write!(peer, "GET {TARGET} HTTP/1.1\r\nHost: h\r\nConnection: close\r\nPRIVATE-TOKEN: {token}\r\n\r\n")
            .unwrap();
        let mut answer = [0; 12];
        peer.read_exact(&mut answer).unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    };
    assert_eq!((ask(GOOD).as_str(), ask(OTHER).as_str()), ("HTTP/1.1 403", "HTTP/1.1 200"));
    assert_eq!(statuses(&gateway, GOOD, 1), [200]);
}

#[test]
fn a_changed_record_takes_effect_on_a_cached_token() {
    let upstream = Upstream::start();
    let gateway = Gateway::start_with_tokens(upstream.address, &bound(GOOD, "networks = [\"127.0.0.0/8\"]"), "");
    assert_eq!(statuses(&gateway, GOOD, 2), [200, 200]);
    gateway.folder.write("tokens.toml", &bound(GOOD, "networks = [\"10.0.0.0/8\"]"));
    eventually("the token is refused", || statuses(&gateway, GOOD, 1) == [403]);
    gateway.folder.write("tokens.toml", &bound(GOOD, "methods = [\"POST\"]"));
    eventually("for its method", || {
        statuses(&gateway, GOOD, 1) == [403] && log_of(&gateway).last().unwrap()["reason"] == "token_method"
    });
    gateway.folder.write("tokens.toml", &bound(GOOD, ""));
    eventually("the token is good again", || statuses(&gateway, GOOD, 1) == [200]);
}

#[test]
fn a_token_has_the_amounts_of_its_plan_or_a_rate_of_its_own() {
    let upstream = Upstream::start();
    let tokens = [
        "plan = \"gold\"",
        "plan = \"gone\"",
        "rate = \"60/h burst 2\"",
        "",
        "plan = \"gold\"\nrate = \"60/h burst 1\"",
    ];
    let name = |index: usize| format!("token-of-plan-{index}");
    let file: String = tokens.iter().enumerate().map(|(index, keys)| bound(&name(index), keys)).collect();
    let more = limit("rate = \"60/h\"\nburst = 3\nplans = true") + "[plan.gold]\nrate = \"60/h\"\nburst = 5\n";
    let gateway = Gateway::start_with_tokens(upstream.address, &file, &more);
    for (index, passed) in [(0, 5), (1, 3), (2, 2), (3, 3), (4, 1)] {
        let statuses = statuses(&gateway, &name(index), 7);
        let wanted: Vec<u16> = (0..7).map(|at| if at < passed { 200 } else { 429 }).collect();
        assert_eq!(statuses, wanted, "{}", tokens[index]);
    }
}

/// Also those of the plan are told, and an unknown plan is logged once, whatever is sent.
#[test]
fn an_unknown_plan_is_logged_once_and_has_the_limits_own_amounts() {
    let upstream = Upstream::start();
    let name = |index: usize| format!("token-of-plan-{index}");
    let tokens: String = ["plan = \"gold\"", "plan = \"gone\"", "plan = \"gone\""]
        .iter()
        .enumerate()
        .map(|(index, keys)| bound(&name(index), keys))
        .collect();
    let more = "[limits]\nrate_limit_fields = true\n".to_owned()
        + &limit("rate = \"60/h\"\nburst = 3\nplans = true")
        + "[[limit]]\nname = \"other\"\nrate = \"90/h\"\nplans = true\nkey = [\"user\"]\n[plan.gold]\nrate = \"120/h\"\nburst = 5\n";
    let gateway = Gateway::start_with_tokens(upstream.address, &tokens, &more);
    let policy = |token: &str| {
        let mut client = gateway.client();
        client.send_head(&get(token, TARGET));
        client.answer().header("RateLimit-Policy").unwrap().to_owned()
    };
    assert_eq!(policy(&name(0)), "\"l\";q=120;w=3600, \"other\";q=120;w=3600");
    assert_eq!(policy(&name(1)), "\"l\";q=60;w=3600, \"other\";q=90;w=3600");
    assert_eq!(statuses(&gateway, &name(1), 3), [200, 200, 429]);
    assert_eq!(statuses(&gateway, &name(2), 4), [200, 200, 200, 429]);
    gateway.metrics();
    let said = |log: &str| log.matches("there is no [plan.gone]").count();
    eventually("it is logged", || said(&gateway.process_log()) > 0);
    assert_eq!(said(&gateway.process_log()), 1, "{}", gateway.process_log());
    let log = gateway.process_log();
    let id = &sha256_hex(&name(1))[..12];
    assert!(log.contains(&format!("token {id}: there is no")) && !log.contains(&name(1)), "{log}");
}

#[test]
fn the_method_that_a_token_may_use_is_the_one_that_the_backend_acts_on() {
    let upstream = Upstream::start();
    let tokens = bound(GOOD, "methods = [\"POST\"]") + &bound(OTHER, "methods = [\"DELETE\"]");
    let gateway = Gateway::start_with_tokens(upstream.address, &tokens, "[token]\nmethod_override = \"judge\"\n");
    let ask = |token: &str| {
        let fields = format!("PRIVATE-TOKEN: {token}\nX-HTTP-Method-Override: DELETE\nContent-Length: 0\n");
        gateway.ask(&format!("POST {TARGET} HTTP/1.1\nHost: h\n{fields}\n")).status
    };
    assert_eq!((ask(GOOD), ask(OTHER)), (403, 200));
}

#[test]
fn the_command_line_makes_tokens_with_terms_and_says_what_is_in_vain() {
    let store = crate::support::Store::imported("");
    let create = |arguments: &[&str]| store.token(&["create"], &[&["--user", "a"][..], arguments].concat());
    for (arguments, why) in [
        (["--plan", "a b"], "--plan \"a b\" must be a plan's name"),
        (["--rate", "600"], "--rate \"600\" must be a rate"),
        (["--network", "10.0.0.0/33"], "--network \"10.0.0.0/33\" must be"),
        (["--method", "GET,get"], "--method \"get\" must be of GET"),
    ] {
        let output = create(&arguments);
        assert!(!output.status.success() && crate::support::stderr(&output).contains(why), "{output:?}");
    }
    let all = [
        "--plan",
        "gold",
        "--rate",
        "600/min burst 9",
        "--network",
        "10.0.0.0/8",
        "--network",
        "::1",
        "--method",
        "GET,HEAD",
    ];
    let made = create(&all);
    assert!(
        made.status.success() && crate::support::stderr(&made).contains("note: there is no [plan.gold]"),
        "{made:?}"
    );
    let token = stdout(&made).trim().to_owned();
    let shown = stdout(&store.token(&["show"], &[&sha256_hex(&token)[..12]]));
    for line in [
        "plan         gold",
        "rate         600/min burst 9",
        "(there is no [plan.gold]",
        "networks     10.0.0.0/8 ::1",
        "methods      GET HEAD",
    ] {
        assert!(shown.contains(line), "{line}: {shown}");
    }
    let listed = stdout(&store.token(&["list"], &["--wide"]));
    assert!(listed.lines().next().unwrap().contains("  TERMS"), "{listed}");
    let terms = "plan=gold rate=600/min burst=9 networks=10.0.0.0/8,::1 methods=GET,HEAD";
    assert!(listed.contains(terms), "{listed}");
    let json: serde_json::Value = serde_json::from_str(&stdout(&store.token(&["list"], &["--json"]))).unwrap();
    let of_token = json.as_array().unwrap().iter().find(|entry| entry["sha256"] == sha256_hex(&token)).unwrap();
    assert_eq!((&of_token["plan"], &of_token["rate"]), (&"gold".into(), &"600/min burst 9".into()));
    assert_eq!(of_token["networks"], serde_json::json!(["10.0.0.0/8", "::1"]));
    assert_eq!(of_token["methods"], serde_json::json!(["GET", "HEAD"]));
    // What is exported is imported with its terms; and a record that is there with others is named.
    let copy = crate::support::Store::imported(&format!("{of_token}\n"));
    let plain = format!("{{\"sha256\":\"{}\",\"user\":\"a\"}}\n", sha256_hex(&token));
    let other = crate::support::Store::imported(&plain);
    let free: serde_json::Value = serde_json::from_str(&stdout(&other.token(&["list"], &["--json"]))).unwrap();
    assert_eq!(free[0]["plan"], serde_json::Value::Null);
    assert_eq!((&free[0]["networks"], &free[0]["methods"]), (&serde_json::json!([]), &serde_json::json!([])));
    assert!(stdout(&other.token(&["list"], &[])).lines().nth(1).unwrap().contains(" -  "));
    let copied: serde_json::Value = serde_json::from_str(&stdout(&copy.token(&["list"], &["--json"]))).unwrap();
    assert_eq!(copied[0], *of_token);
    let folder = Folder::new("lines");
    let lines = folder.write("tokens.jsonl", &format!("{of_token}\n"));
    let differs = other.token(&["import"], &[lines.to_str().unwrap()]);
    let why = crate::support::stderr(&differs);
    assert!(!differs.status.success() && why.contains("has another plan, rate, networks or methods"), "{why}");
    // A rotation is no way out of them.
    let next = store.token(&["rotate"], &[&sha256_hex(&token)[..12]]);
    let next = stdout(&store.token(&["show"], &[&sha256_hex(stdout(&next).trim())[..12]]));
    for line in
        ["networks     10.0.0.0/8 ::1", "plan         gold", "rate         600/min burst 9", "methods      GET HEAD"]
    {
        assert!(next.contains(line), "{line}: {next}");
    }
    // From the embedded store, and from outside.
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, &store.section());
    assert_eq!(statuses(&gateway, &token, 1), [403]);
}
