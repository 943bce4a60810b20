//! A reload is in force for every request whose head is complete after it, on any connection: idle persistent ones, new
//! ones, and those with a partly received head. Stricter and less strict configurations.

use crate::harness::*;
use std::fmt::Write as _;

/// Persistent connections that each wait for their next request.
const CONNECTIONS: usize = 24;
const TARGET: &str = "/api/v3/projects";

fn with(token: &str, target: &str, headers: &str) -> String {
    format!("GET {target} HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: {token}\n{headers}\n")
}

fn without_token(target: &str) -> String {
    format!("GET {target} HTTP/1.1\nHost: h.test\n\n")
}

/// Clients with an idle persistent connection after a response, and clients that have sent a part of a head. The gateway has
/// read all of that and waits: a snapshot that it took before the wait would be an old one.
struct Crowd {
    kept: Vec<Client>,
    half: Vec<(Client, String)>,
}

impl Crowd {
    /// `next` is the request that each of them will send; the second group has sent half of it.
    fn gather(gateway: &Gateway, next: &str) -> Self {
        let mut kept: Vec<_> = (0..CONNECTIONS).map(|_| gateway.client()).collect();
        for client in &mut kept {
            client.send_head(&with(GOOD, "/api/v3/warm-up", ""));
            assert_eq!(client.answer().status, 200);
        }
        let next = next.replace('\n', "\r\n");
        let half = (0..CONNECTIONS)
            .map(|index| {
                let mut client = gateway.client();
                // Cut at any position, also within the final empty line and after a complete request.
                if index % 2 == 0 {
                    client.send_head(&with(GOOD, "/api/v3/warm-up", ""));
                    assert_eq!(client.answer().status, 200);
                }
                let cut = 1 + (next.len() - 2) * index / (CONNECTIONS - 1);
                client.send(&next.as_bytes()[..cut]);
                (client, next[cut..].to_owned())
            })
            .collect();
        eventually("the gateway has all connections", || {
            gateway.metric("tollgate_connections") >= (2 * CONNECTIONS) as f64
        });
        Self { kept, half }
    }

    /// The responses to the request that all of them send now.
    fn ask(self, next: &str) -> Vec<Answer> {
        let Self { mut kept, mut half } = self;
        kept.iter_mut().for_each(|client| client.send_head(next));
        half.iter_mut().for_each(|(client, rest)| client.send(rest.as_bytes()));
        let answers = kept.iter_mut().chain(half.iter_mut().map(|(client, _)| client)).map(Client::answer);
        let answers: Vec<_> = answers.collect();
        assert_eq!(answers.len(), 2 * CONNECTIONS);
        answers
    }
}

/// The responses to requests that are completed after a reload from one configuration to another.
fn after_reload(upstream: &Upstream, before: &str, after: &str, next: &str) -> Vec<Answer> {
    let gateway = Gateway::start(upstream.address, before);
    let crowd = Crowd::gather(&gateway, next);
    reload(&gateway, before, after);
    upstream.forget();
    let answers = crowd.ask(next);
    // The same on a new connection.
    assert_eq!(gateway.ask(next).status, answers[0].status, "another status on a new connection");
    answers
}

fn reload(gateway: &Gateway, before: &str, after: &str) {
    let path = gateway.folder.0.join("tollgate.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, after) = [before, after].map(|more| more.replace("@LISTEN@", &gateway.address.to_string())).into();
    assert!(text.ends_with(&before), "{text}");
    std::fs::write(&path, text.replace(&before, "") + &after).unwrap();
    let answer = gateway.admin_post("/reload");
    assert_eq!(answer.status, 200, "{}", answer.text());
}

fn statuses(answers: &[Answer]) -> Vec<u16> {
    let mut statuses: Vec<_> = answers.iter().map(|answer| answer.status).collect();
    statuses.dedup();
    statuses
}

const OPEN: &str = "[[route]]\npath = \"/api/v3/open/*\"\nauth = \"none\"\nreason = \"a test\"\n";
const SHUT: &str = "[log]\naccess = \"access.log\"\n";

#[test]
fn a_route_that_is_closed_is_closed_for_kept_connections() {
    let upstream = Upstream::start();
    let next = without_token("/api/v3/open/x");
    let (open, shut) = (format!("{SHUT}{OPEN}"), SHUT);
    assert_eq!(statuses(&after_reload(&upstream, &open, shut, &next)), [401]);
    assert_eq!(upstream.seen().len(), 0, "a request was handled with the old configuration");
    assert_eq!(statuses(&after_reload(&upstream, shut, &open, &next)), [200]);
    assert_eq!(upstream.seen().len(), 2 * CONNECTIONS + 1);
}

#[test]
fn a_token_that_is_gone_is_gone_for_kept_connections() {
    let upstream = Upstream::start();
    let folder = Folder::new("test");
    let record = |token: &str| format!("[[token]]\nsha256 = \"{}\"\nuser = \"u\"\n", sha256_hex(token));
    let both = folder.write("both.toml", &(record(GOOD) + &record(OTHER)));
    let one = folder.write("one.toml", &record(GOOD));
    let store = |path: &std::path::Path| format!("[store]\nkind = \"file\"\npath = \"{}\"\n", path.display());
    let next = with(OTHER, TARGET, "");
    assert_eq!(statuses(&after_reload(&upstream, &store(&both), &store(&one), &next)), [401]);
    assert_eq!(upstream.seen().len(), 0);
    assert_eq!(statuses(&after_reload(&upstream, &store(&one), &store(&both), &next)), [200]);
}

#[test]
fn proxies_that_are_no_longer_trusted_are_not_believed_by_kept_connections() {
    let upstream = Upstream::start();
    let server = "[server]\nlisten = [\"@LISTEN@\"]\nthreads = 1\n";
    let trusting = format!("{server}trusted_proxies = [\"127.0.0.1\"]\n");
    let next = with(GOOD, TARGET, "X-Forwarded-For: 192.0.2.7\n");
    for (before, after, chain) in
        [(trusting.as_str(), server, "127.0.0.1"), (server, trusting.as_str(), "192.0.2.7, 127.0.0.1")]
    {
        assert_eq!(statuses(&after_reload(&upstream, before, after, &next)), [200]);
        let seen = upstream.seen();
        assert_eq!(seen.len(), 2 * CONNECTIONS + 1);
        for seen in seen {
            assert_eq!(seen.header("X-Forwarded-For"), Some(chain));
        }
    }
}

#[test]
fn limits_are_those_in_force_when_the_head_is_complete() {
    let upstream = Upstream::start();
    let limits =
        |header: &str, target: &str| format!("[limits]\nheader_bytes = \"{header}\"\ntarget_bytes = \"{target}\"\n");
    let (low, high) = (limits("2KiB", "1KiB"), limits("64KiB", "16KiB"));
    let long_head = with(GOOD, TARGET, &format!("X: {}\n", "a".repeat(6_000)));
    let long_target = with(GOOD, &format!("{TARGET}?q={}", "a".repeat(1_500)), "");
    for (next, refused) in [(&long_head, 431), (&long_target, 414)] {
        assert_eq!(statuses(&after_reload(&upstream, &high, &low, next)), [refused]);
        assert_eq!(upstream.seen().len(), 0);
    }
    // Raised limits apply to heads that are not refused yet, so nothing of these heads is sent before the reload.
    let gateway = Gateway::start(upstream.address, &low);
    for next in [&long_head, &long_target] {
        let mut kept: Vec<_> = (0..CONNECTIONS).map(|_| gateway.client()).collect();
        for (index, client) in kept.iter_mut().enumerate() {
            client.send_head(&with(GOOD, TARGET, ""));
            assert_eq!(client.answer().status, 200);
            client.send(&next.as_bytes()[..index]);
        }
        reload(&gateway, &low, &high);
        for (index, client) in kept.iter_mut().enumerate() {
            // In two pieces, the first of which is already larger than the old limit.
            let rest = next[index..].replace('\n', "\r\n");
            let (first, last) = rest.as_bytes().split_at(rest.len() - 20);
            client.send(first);
            client.send(last);
            assert_eq!(client.answer().status, 200);
        }
        reload(&gateway, &high, &low);
    }
}

#[test]
fn the_log_and_the_upstream_are_the_new_ones_for_kept_connections() {
    let (old, new) = (Upstream::start(), Upstream::start());
    let config = |upstream: &Upstream, log: &str| {
        format!("[log]\naccess = \"{log}\"\n[[upstream]]\nname = \"api\"\nservers = [\"{}\"]\n", upstream.address)
    };
    let (before, after) = (config(&old, "access.log"), config(&new, "second.log"));
    let gateway = Gateway::start(old.address, &before);
    let next = with(GOOD, TARGET, "");
    let crowd = Crowd::gather(&gateway, &next);
    eventually("the log is whole", || gateway.access_log().len() == CONNECTIONS + CONNECTIONS / 2);
    reload(&gateway, &before, &after);
    old.forget();
    assert_eq!(statuses(&crowd.ask(&next)), [200]);
    assert_eq!((old.seen().len(), new.seen().len()), (0, 2 * CONNECTIONS));
    let lines = || std::fs::read_to_string(gateway.folder.0.join("second.log")).unwrap_or_default().lines().count();
    eventually("the new log has them", || lines() == 2 * CONNECTIONS);
    assert_eq!(gateway.access_log().len(), CONNECTIONS + CONNECTIONS / 2, "the old log was still written");
}

/// A request in flight keeps its configuration; the next one on the same connection gets the new one.
#[test]
fn a_pipelined_request_is_judged_by_the_rules_of_its_own_time() {
    let (upstream, latch) = Upstream::holding(|seen| seen.target.ends_with("slow"), "{\"ok\":true}");
    let open = format!("{SHUT}{OPEN}");
    let gateway = Gateway::start(upstream.address, &open);
    let mut clients: Vec<_> = (0..CONNECTIONS).map(|_| gateway.client()).collect();
    for client in &mut clients {
        // The second head is incomplete, cut within its last line.
        let (first, second) = (without_token("/api/v3/open/slow"), without_token("/api/v3/open/x"));
        client.send_head(&(first + &second[..second.len() - 1]));
    }
    eventually("the slow ones are at the upstream", || upstream.seen().len() == CONNECTIONS);
    reload(&gateway, &open, SHUT);
    latch.open();
    for client in &mut clients {
        client.send(b"\r\n");
        assert_eq!(client.answer().status, 200, "a request in flight");
        assert_eq!(client.answer().status, 401, "the next one");
    }
    assert_eq!(upstream.seen().len(), CONNECTIONS);
}

/// Many clients send requests while reloads open and close a route: after the response to a reload, no request is handled
/// with an older configuration.
#[test]
fn reloads_hold_under_load() {
    let upstream = Upstream::start();
    let open = format!("{SHUT}{OPEN}");
    let gateway = Gateway::start(upstream.address, SHUT);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    let mut client = gateway.client();
                    let mut asked = 0;
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        client.send_head(&with(GOOD, TARGET, ""));
                        assert_eq!(client.answer().status, 200, "a request that no reload affects");
                        asked += 1;
                    }
                    asked
                })
            })
            .collect();
        let mut watcher = gateway.client();
        let mut found = String::new();
        let (mut before, mut after, mut expected) = (SHUT, open.as_str(), 200);
        for turn in 0..20 {
            reload(&gateway, before, after);
            watcher.send_head(&without_token("/api/v3/open/x"));
            let status = watcher.answer().status;
            if status != expected {
                writeln!(found, "turn {turn}: {status} instead of {expected}").unwrap();
            }
            (before, after, expected) = (after, before, if expected == 200 { 401 } else { 200 });
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let asked: usize = workers.into_iter().map(|worker| worker.join().unwrap()).sum();
        assert!(asked > 100, "only {asked} requests during the reloads");
        assert_eq!(found, "");
    });
}

/// The state of servers survives a reload: the round robin continues, and an outage that began before a reload ends after it.
#[test]
fn pools_go_on_behind_a_reload() {
    let upstreams = [Upstream::start(), Upstream::start()];
    let servers = upstreams.each_ref().map(|upstream| format!("\"{}\"", upstream.address)).join(", ");
    let pool = |idle: &str| format!("[[upstream]]\nname = \"api\"\nservers = [{servers}]\nidle_timeout = \"{idle}\"\n");
    let gateway = Gateway::start(upstreams[0].address, &pool("4s"));
    let timeouts = ["4s", "5s"];
    for turn in 0..6 {
        assert_eq!(gateway.get("/api/v3/user").status, 200);
        reload(&gateway, &pool(timeouts[turn % 2]), &pool(timeouts[(turn + 1) % 2]));
    }
    assert_eq!(upstreams.each_ref().map(|upstream| upstream.seen().len()), [3, 3]);
}
