//! Operating a running gateway: stop, reload, changes of tokens, failures of the store and the log, and monitoring.

use crate::harness::*;
use crate::support::*;
use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Responds to `/…slow` when the latch opens, to everything else immediately.
fn slow_upstream() -> (Upstream, Latch) {
    Upstream::holding(|seen| seen.target.ends_with("slow"), "{\"ok\":true}")
}

/// Clients with requests in flight, which the upstream has received and not answered.
fn in_flight(gateway: &Gateway, upstream: &Upstream, count: usize) -> Vec<Client> {
    let mut clients: Vec<_> = (0..count).map(|_| gateway.client()).collect();
    clients.iter_mut().for_each(|client| client.send_head(&get(GOOD, "/api/v3/slow")));
    eventually("all slow requests are at the upstream", || upstream.seen().len() == count);
    clients
}

fn reloads(gateway: &Gateway, result: &str) -> f64 {
    gateway.metric(&format!("tollgate_config_reloads_total{{result=\"{result}\"}}"))
}

// ---- Shutdown ----

fn a_stop_loses_nothing(signal: &str) {
    let (upstream, latch) = slow_upstream();
    let mut gateway = Gateway::start(upstream.address, "");
    let mut clients = in_flight(&gateway, &upstream, 8);
    // Idle persistent connections get no response, and end long before the grace period does.
    let mut idle = gateway.client();
    idle.send_head(&get(GOOD, "/api/v3/user"));
    assert_eq!(idle.answer().status, 200);

    gateway.signal(signal);
    eventually("draining is seen from outside", || gateway.admin_get("/readyz").is_some_and(|a| a.status == 503));
    assert_eq!(gateway.metric("tollgate_ready"), 0.0);
    assert!(idle.is_closed_within(PATIENCE), "an idle connection stays open during the drain");
    latch.open();
    for client in &mut clients {
        let answer = client.answer();
        assert_eq!((answer.status, answer.text().as_str(), answer.cut), (200, "{\"ok\":true}", false));
    }
    // Less than the grace period, so that a request which is never counted as done is detected.
    let ended = gateway.try_ended(2 * PATIENCE).and_then(|status| status.code());
    assert_eq!(ended, Some(0), "{}", gateway.process_log());
    assert_eq!(gateway.access_log().iter().filter(|line| line["status"] == 200).count(), 9, "the log lost lines");
}

#[test]
fn sigterm_loses_no_request_in_flight() {
    a_stop_loses_nothing("TERM");
}

#[test]
fn sigint_loses_no_request_in_flight() {
    a_stop_loses_nothing("INT");
}

#[test]
fn during_the_drain_the_listeners_are_closed_and_accepted_connections_are_served() {
    // The drain lasts until the test has checked everything.
    let (upstream, latch) = slow_upstream();
    let gateway = Gateway::start(upstream.address, "");
    let mut clients = in_flight(&gateway, &upstream, 1);
    // Connections without a request: one asks in time, one asks for nothing, one is told that its token is bad.
    let [mut late, mut silent, mut refused, mut kept] = [(); 4].map(|()| gateway.client());
    // Its last answer did not say that the connection ends: its next request may be on its way.
    kept.send_head(&get(GOOD, "/api/v3/user"));
    assert_eq!(kept.answer().header("Connection"), None);
    eventually("they are accepted", || gateway.metric("tollgate_connections") >= 5.0);
    gateway.signal("TERM");
    eventually("the listener is closed", || gateway.process_log().contains("listeners closed"));
    assert!(Client::try_connect(gateway.address).is_none());
    late.send_head(&get(GOOD, "/api/v3/user"));
    refused.send_head(&get(BAD, "/api/v3/user"));
    kept.send_head(&get(GOOD, "/api/v3/user"));
    for (client, status) in [(&mut late, 200), (&mut refused, 401), (&mut kept, 200)] {
        let answer = client.answer();
        assert_eq!((answer.status, answer.header("Connection")), (status, Some("close")));
        assert!(client.is_closed_within(PATIENCE));
    }
    assert!(silent.is_closed_within(PATIENCE), "a connection without a request holds up the end");
    latch.open();
    assert_eq!((clients[0].answer().status, upstream.seen().len()), (200, 4));
}

#[test]
fn requests_are_served_as_before_during_the_drain_delay() {
    let upstream = Upstream::start();
    let more = "[server]\nlisten = [\"@LISTEN@\"]\ndrain_delay = \"10m\"\n";
    let mut gateway = Gateway::start(upstream.address, more);
    let mut kept = gateway.client();
    kept.send_head(&get(GOOD, "/api/v3/user"));
    assert_eq!(kept.answer().status, 200);
    // The delay is as the last reload says.
    gateway.rewrite(|text| text.replace("\"10m\"", "\"1500ms\""));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    let asked = Instant::now();
    gateway.signal("TERM");
    eventually("balancers are told", || gateway.admin_get("/readyz").is_some_and(|answer| answer.status == 503));
    assert_eq!(gateway.metric("tollgate_ready"), 0.0);
    for client in [&mut kept, &mut gateway.client()] {
        client.send_head(&get(GOOD, "/api/v3/user"));
        let answer = client.answer();
        assert_eq!((answer.status, answer.header("Connection")), (200, None), "as before");
    }
    assert!(kept.is_closed_within(PATIENCE), "an idle connection ends behind the delay");
    assert_eq!(gateway.try_ended(2 * PATIENCE).and_then(|status| status.code()), Some(0), "{}", gateway.process_log());
    assert!(asked.elapsed() >= Duration::from_millis(1500), "ended after {:?}", asked.elapsed());
}

#[test]
fn a_client_that_is_busy_is_told_of_the_stop_and_loses_no_request() {
    let (upstream, latch) = slow_upstream();
    let mut gateway = Gateway::start(upstream.address, "");
    // A request in flight, so that the drain lasts during the load.
    let mut slow = in_flight(&gateway, &upstream, 1);
    let workers: Vec<_> = (0..8)
        .map(|_| {
            let mut client = gateway.client();
            std::thread::spawn(move || {
                let mut answered = 0;
                let request = get(GOOD, "/api/v3/user").replace('\n', "\r\n");
                loop {
                    let answer = match client.socket.write_all(request.as_bytes()) {
                        Ok(()) => client.try_answer(),
                        Err(_) => None,
                    };
                    let answer = answer.expect("the connection ended before an answer said that it would");
                    assert_eq!(answer.status, 200);
                    answered += 1;
                    if answer.header("Connection") == Some("close") {
                        return answered;
                    }
                }
            })
        })
        .collect();
    eventually("there is a load", || upstream.seen().len() > 200);
    gateway.signal("TERM");
    let total: usize = workers.into_iter().map(|worker| worker.join().expect("a request was lost")).sum();
    latch.open();
    assert_eq!(slow[0].answer().status, 200);
    assert_eq!(gateway.try_ended(2 * PATIENCE).and_then(|status| status.code()), Some(0), "{}", gateway.process_log());
    let forwarded = upstream.seen().iter().filter(|seen| seen.complete).count();
    assert_eq!(forwarded, total + 1, "requests at the upstream whose answers nobody got");
}

#[test]
fn a_stop_ends_the_process_every_time_and_leaves_no_flood_of_errors() {
    let upstream = Upstream::start();
    // A race between the listeners and the end of their runtime needs several workers and a connection that has just ended.
    // It does not happen each time, hence the number of attempts.
    let more = "[server]\nlisten = [\"@LISTEN@\"]\nthreads = 4\n";
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                for signal in ["TERM", "INT", "TERM", "INT"] {
                    let mut gateway = Gateway::start(upstream.address, more);
                    assert_eq!(status(&gateway, GOOD), 200);
                    gateway.signal(signal);
                    let status = gateway.try_ended(2 * PATIENCE);
                    // Not the whole log, which may be gigabytes.
                    let log = std::fs::File::open(gateway.folder.0.join("process.log")).unwrap();
                    let mut said = String::new();
                    log.take(4_000).read_to_string(&mut said).unwrap();
                    drop(std::fs::remove_file(gateway.folder.0.join("process.log")));
                    assert_eq!(status.and_then(|status| status.code()), Some(0), "SIG{signal}: {said}");
                    assert!(!said.contains("ERROR"), "SIG{signal}: {said}");
                }
            });
        }
    });
}

#[test]
fn a_second_signal_ends_at_once() {
    let (upstream, _closed) = slow_upstream();
    let mut gateway = Gateway::start(upstream.address, "");
    let _clients = in_flight(&gateway, &upstream, 2);
    gateway.signal("TERM");
    eventually("draining", || gateway.admin_get("/readyz").is_some_and(|answer| answer.status == 503));
    let asked = Instant::now();
    gateway.signal("TERM");
    gateway.ended();
    assert!(asked.elapsed() < 3 * SECOND, "took {:?}", asked.elapsed());
    assert!(gateway.process_log().contains("shutting down immediately"), "{}", gateway.process_log());
}

#[test]
fn the_grace_period_bounds_the_drain() {
    let (upstream, _closed) = slow_upstream();
    let more = "[server]\nlisten = [\"@LISTEN@\"]\nthreads = 1\nshutdown_grace = \"1s\"\n";
    let mut gateway = Gateway::start(upstream.address, more);
    gateway.rewrite(|text| text.replace("[admin]\n", "[admin]\naudit = \"audit.log\"\n"));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    let mut clients = in_flight(&gateway, &upstream, 2);
    let asked = Instant::now();
    gateway.signal("TERM");
    assert_eq!(gateway.ended().code(), Some(0));
    let took = asked.elapsed();
    assert!((SECOND..4 * SECOND).contains(&took), "took {took:?}");
    assert!(clients[0].try_answer().is_none(), "an answer to a request that was cut off");
    told_of_aborted_requests(&gateway, 2);
}

/// No scrape sees it, so the logs have to tell; by the same expressions as docs/operations.md gives for alerts.
fn told_of_aborted_requests(gateway: &Gateway, aborted: usize) {
    let page = std::fs::read_to_string(repository("docs/operations.md")).unwrap();
    let told = format!("{aborted} requests are aborted");
    assert!(gateway.process_log().contains(&told), "{}", gateway.process_log());
    assert!(page.contains("[1-9][0-9]* requests are aborted"), "the page has an expression for this line");
    let audit = std::fs::read_to_string(gateway.folder.0.join("audit.log")).unwrap();
    let last: serde_json::Value = serde_json::from_str(audit.lines().last().unwrap()).unwrap();
    assert_eq!(
        (&last["action"], &last["result"], &last["aborted"]),
        (&"stopped".into(), &"failed".into(), &aborted.into())
    );
    let lines = gateway.written_access_log();
    let cut = lines.iter().filter(|line| line["reason"] == "aborted" && line["status"] == 0).count();
    assert_eq!(cut, aborted, "{lines:?}");
}

// ---- Reloading ----

fn a_reload_takes_effect(reload: impl Fn(&Gateway)) {
    let (upstream, latch) = slow_upstream();
    let gateway = Gateway::start(upstream.address, "[pagination]\nmax_per_page = 100\n");
    let mut kept = gateway.client();
    let mut per_page = |asked: &str| {
        upstream.forget();
        kept.send_head(&get(GOOD, &format!("/api/v3/projects?per_page={asked}")));
        assert_eq!(kept.answer().status, 200);
        upstream.only().target
    };
    assert_eq!(per_page("5000"), "/api/v3/projects?per_page=100");
    let mut slow = gateway.client();
    slow.send_head(&get(GOOD, "/api/v3/slow"));
    eventually("the slow request is at the upstream", || upstream.seen().len() == 2);

    let before = reloads(&gateway, "ok");
    gateway.rewrite(|text| text.replace("max_per_page = 100", "max_per_page = 50"));
    reload(&gateway);
    eventually("the reload was counted", || reloads(&gateway, "ok") == before + 1.0);
    // The request that the wait below sends may be the last one with the old configuration, the next one is not.
    latch.open();
    assert_eq!(slow.answer().status, 200, "a reload broke a request in flight");
    assert_eq!(per_page("0"), "/api/v3/projects?per_page=20");
    assert_eq!(per_page("5000"), "/api/v3/projects?per_page=50", "on the same connection as before the reload");

    // A broken configuration changes nothing.
    let failed = reloads(&gateway, "failed");
    gateway.rewrite(|text| text.replace("max_per_page = 50", "max_per_page = 70\nmax_per_pag = 1"));
    reload(&gateway);
    eventually("the failed reload was counted", || reloads(&gateway, "failed") == failed + 1.0);
    assert_eq!(reloads(&gateway, "ok"), before + 1.0);
    assert_eq!(per_page("0"), "/api/v3/projects?per_page=20");
    assert_eq!(per_page("5000"), "/api/v3/projects?per_page=50");
    eventually("the log names the key", || {
        let log = gateway.process_log();
        log.contains("pagination.max_per_pag") && log.contains("did you mean `max_per_page`")
    });
    assert_eq!(gateway.admin_get("/readyz").unwrap().status, 200);
}

#[test]
fn sighup_takes_a_new_configuration_and_refuses_a_broken_one() {
    a_reload_takes_effect(|gateway| gateway.signal("HUP"));
}

#[test]
fn post_reload_takes_a_new_configuration_and_refuses_a_broken_one() {
    a_reload_takes_effect(|gateway| {
        let answer = gateway.admin_post("/reload");
        match answer.status {
            200 => assert_eq!(answer.text(), "reloaded; changed and in force: pagination.max_per_page\n"),
            _ => {
                assert_eq!(answer.status, 500);
                assert!(
                    answer.text().contains("nothing changed") && answer.text().contains("max_per_pag"),
                    "{answer:?}"
                );
            }
        }
    });
}

#[test]
fn every_part_that_can_break_leaves_a_reload_without_effect() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    for (what, change, named) in [
        ("a store", ("path = \"tokens.toml\"", "path = \"nowhere.toml\""), "nowhere.toml"),
        ("an upstream", ("servers = [\"", "servers = [\"does-not-exist.invalid:0\", \""), "does-not-exist.invalid"),
        ("a log", ("access = \"access.log\"", "access = \"no/such/folder/x.log\""), "log.access"),
        ("TOML", ("[[upstream]]", "[[upstream"), "tollgate.toml:11:11: is not TOML"),
    ] {
        gateway.rewrite(|text| text.replace(change.0, change.1));
        let answer = gateway.admin_post("/reload");
        assert_eq!(answer.status, 500, "{what}");
        assert!(answer.text().contains(named), "{what}: {}", answer.text());
        assert_eq!((status(&gateway, GOOD), status(&gateway, BAD)), (200, 401), "{what}");
        gateway.rewrite(|text| text.replace(change.1, change.0));
    }
    assert_eq!(gateway.admin_post("/reload").status, 200);
    eventually("all requests are in the one log", || gateway.access_log().len() == 8);
}

#[test]
fn what_needs_a_restart_is_said_and_left_as_it_is() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    gateway.rewrite(|text| text.replace("threads = 1", "threads = 2"));
    let answer = gateway.admin_post("/reload");
    assert!(answer.status == 200 && answer.text().contains("restart"), "{}", answer.text());
    eventually("the log names the key", || {
        let log = gateway.process_log();
        log.lines().any(|line| line.contains("server.threads") && line.contains("restart"))
    });
    assert_eq!(status(&gateway, GOOD), 200);
    let workers = |name: &str| name.starts_with("worker-");
    let threads = std::fs::read_dir(format!("/proc/{}/task", gateway.pid())).unwrap();
    let names = threads.map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap());
    assert_eq!(names.filter(|name| workers(name)).count(), 1);
}

#[test]
fn a_reload_opens_a_rotated_log_anew() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let (log, rotated) = (gateway.folder.0.join("access.log"), gateway.folder.0.join("access.log.1"));
    status(&gateway, GOOD);
    eventually("one line", || gateway.access_log().len() == 1);
    std::fs::rename(&log, &rotated).unwrap();
    assert_eq!(gateway.admin_post("/reload").status, 200);
    status(&gateway, GOOD);
    eventually("a line in the new file", || gateway.access_log().len() == 1);
    assert_eq!(std::fs::read_to_string(rotated).unwrap().lines().count(), 1);
}

// ---- Store failures ----

/// A gateway whose store is about to fail: [`GOOD`] is cached and soon stale, [`OTHER`] is in the store and not cached,
/// [`BAD`] is unknown.
fn before_the_breakdown(upstream: &Upstream) -> (Store, Gateway) {
    let store = Store::with([(GOOD, "alice"), (OTHER, "bob")]);
    let cache = "[cache]\npositive_ttl = \"1s\"\nnegative_ttl = \"100ms\"\nstale_if_error = \"1h\"\n";
    let gateway = Gateway::start(upstream.address, &(store.section() + cache));
    assert_eq!(status(&gateway, GOOD), 200);
    (store, gateway)
}

fn remove(store: &Store) {
    for ending in ["", "-wal", "-shm"] {
        drop(std::fs::remove_file(format!("{}{ending}", store.path.display())));
    }
}

fn a_broken_store_is_never_a_no_and_never_a_yes(break_it: impl Fn(&Store)) {
    let upstream = Upstream::start();
    let (store, gateway) = before_the_breakdown(&upstream);
    let whole = std::fs::read(&store.path).unwrap();
    break_it(&store);
    let stale = || gateway.metric("tollgate_cache_lookups_total{result=\"stale\"}");
    let until = Instant::now() + 4 * SECOND;
    let mut codes = std::collections::BTreeSet::new();
    while Instant::now() < until {
        assert_eq!(status(&gateway, GOOD), 200, "a known token while the store is broken");
        codes.insert(("in the store", status(&gateway, OTHER)));
        codes.insert(("nowhere", status(&gateway, BAD)));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(codes.into_iter().collect::<Vec<_>>(), [("in the store", 503), ("nowhere", 503)]);
    assert!(stale() > 0.0, "the known token was never judged by its last answer");
    assert!(gateway.metrics().contains("tollgate_store_errors_total{"), "no store error was counted");
    assert_eq!(gateway.ask(&get(BAD, "/api/v3/user")).header("Retry-After"), Some("1"));
    // The store has recovered.
    remove(&store);
    let new = store.path.with_extension("new");
    std::fs::write(&new, whole).unwrap();
    std::fs::rename(new, &store.path).unwrap();
    eventually("the store answers again", || status(&gateway, OTHER) == 200 && status(&gateway, BAD) == 401);
    assert_eq!(status(&gateway, GOOD), 200);
}

#[test]
fn a_deleted_database_gives_503_to_the_unknown_and_the_last_answer_to_the_known() {
    a_broken_store_is_never_a_no_and_never_a_yes(remove);
}

#[test]
fn a_database_without_its_main_file_gives_503_too() {
    a_broken_store_is_never_a_no_and_never_a_yes(|store| std::fs::remove_file(&store.path).unwrap());
}

#[test]
fn a_database_replaced_by_garbage_gives_503_to_the_unknown_and_the_last_answer_to_the_known() {
    a_broken_store_is_never_a_no_and_never_a_yes(|store| {
        let garbage = store.path.with_extension("garbage");
        std::fs::write(&garbage, vec![b'x'; 100_000]).unwrap();
        remove(store);
        std::fs::rename(garbage, &store.path).unwrap();
    });
}

#[test]
fn a_database_replaced_by_an_empty_file_is_not_a_store_without_tokens() {
    a_broken_store_is_never_a_no_and_never_a_yes(|store| {
        let empty = store.path.with_extension("empty");
        std::fs::write(&empty, "").unwrap();
        remove(store);
        std::fs::rename(empty, &store.path).unwrap();
    });
}

#[test]
fn a_database_replaced_by_another_one_is_the_store_from_then_on() {
    let upstream = Upstream::start();
    let store = Store::with([(GOOD, "alice")]);
    let gateway = Gateway::start(upstream.address, &(store.section() + "[cache]\npositive_ttl = \"1h\"\n"));
    assert_eq!((status(&gateway, GOOD), status(&gateway, OTHER)), (200, 401));
    let another = Store::with([(OTHER, "bob")]);
    remove(&store);
    std::fs::rename(&another.path, &store.path).unwrap();
    let replaced = Instant::now();
    eventually("the other database holds", || status(&gateway, OTHER) == 200 && status(&gateway, GOOD) == 401);
    assert!(replaced.elapsed() < 3 * SECOND, "after {:?}", replaced.elapsed());
}

// ---- Monitoring ----

#[test]
fn promtool_finds_nothing_wrong_with_the_metrics() {
    let upstream = Upstream::start();
    let store = Store::with([(GOOD, "alice")]);
    let gateway = Gateway::start(upstream.address, &store.section());
    // At least one sample in every family with labels.
    gateway.get("/api/v3/projects?page=0&per_page=5000");
    gateway.ask(&format!("GET /api/v3/x?private_token={BAD} HTTP/1.1\nHost: h\nPRIVATE_TOKEN: x\n\n"));
    store.create("bob");
    eventually("a lag was measured", || gateway.metrics().contains("tollgate_revocation_lag_seconds_count"));
    let metrics = gateway.metrics();
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("promtool can't be started: {error}; {HINT}"));
    promtool.stdin.take().unwrap().write_all(metrics.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
    assert_eq!(stdout(&output) + &stderr(&output), "", "promtool has remarks");
    // No client's data in a label.
    assert!(!metrics.contains(BAD) && !metrics.contains(GOOD) && !metrics.contains("h.test"));
}

#[test]
fn the_admin_listener_refuses_a_foreign_host() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let before = reloads(&gateway, "ok");
    for host in ["evil.example", "evil.example:9090", "127.0.0.1.evil.example", "localhost.evil.example"] {
        for line in ["GET /metrics", "GET /status", "POST /reload", "POST /cache/forget"] {
            let mut client = Client::connect(gateway.admin);
            client.send_head(&format!("{line} HTTP/1.1\nHost: {host}\n\n"));
            assert_eq!(client.answer().status, 403, "{line} for {host}");
        }
    }
    assert_eq!(reloads(&gateway, "ok"), before, "a foreign page made the gateway reload");
    for host in ["localhost", "127.0.0.1", "[::1]:9090", "LOCALHOST:1"] {
        let mut client = Client::connect(gateway.admin);
        client.send_head(&format!("GET /healthz HTTP/1.1\nHost: {host}\n\n"));
        assert_eq!(client.answer().status, 200, "{host}");
    }
}

#[test]
fn admin_paths_are_not_served_on_the_api_listener_nor_the_api_on_the_admin_listener() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let before = reloads(&gateway, "ok");
    for path in ["/", "/metrics", "/healthz", "/readyz", "/status", "/upstreams", "/reload", "/cache/forget"] {
        for method in ["GET", "POST"] {
            let answer = gateway.ask(&format!("{method} {path} HTTP/1.1\nHost: localhost\nPRIVATE-TOKEN: {GOOD}\n\n"));
            assert_eq!((answer.status, answer.text().as_str()), (404, "{\"message\":\"404 Not Found\"}"), "{path}");
        }
    }
    assert_eq!(reloads(&gateway, "ok"), before);
    assert_eq!(gateway.admin_get("/api/v3/user").unwrap().status, 404);
    assert_eq!(upstream.seen().len(), 0);
}

#[test]
fn every_request_leaves_one_json_line_that_says_who_what_and_how_and_no_token() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let long = "x".repeat(300);
    for head in [
        format!(
            "GET /api/v3/projects?page=2&private_token={GOOD}&x=1 HTTP/1.1\nHost: h\nUser-Agent: \"a\\b\u{e9}\"\n\n"
        ),
        format!("GET /api/v3/projects HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {BAD}\nX-Request-Id: my-id_1\n\n"),
        format!("GET /api/v3/projects?private%5Ftoken={GOOD};a HTTP/1.1\nHost: h\n\n"),
        format!("GET /api/v3/projects?private_token={GOOD}&z=% HTTP/1.1\nHost: h\n\n"),
        format!("GET /elsewhere;private_token={GOOD}/x HTTP/1.1\nHost: h\n\n"),
        format!("GET /api/v3/p HTTP/1.1\nHost: h\nAuthorization: Bearer {GOOD}{long}\n\n"),
        format!("POST /api/v3/p HTTP/1.1\nHost: h\nAuthorization: Bearer {OTHER}\nContent-Length: 3\n\na=1"),
        format!("NONSENSE {GOOD}\n\n"),
    ] {
        let lines = gateway.access_log().len();
        gateway.ask(&head);
        // A line is written after the response, and could be written after the next one's.
        eventually("one more line", || gateway.access_log().len() == lines + 1);
    }
    let text = std::fs::read_to_string(gateway.folder.0.join("access.log")).unwrap();
    for secret in [GOOD, OTHER, BAD] {
        assert!(!text.contains(secret), "{text}");
        assert!(!gateway.process_log().contains(secret), "{}", gateway.process_log());
    }
    let lines = gateway.access_log();
    for line in &lines {
        for key in ["time", "request_id", "client", "method", "route", "status", "reason", "source", "duration_ms"] {
            assert!(!line[key].is_null(), "{key} is missing: {line}");
        }
        assert_eq!(line["client"], "127.0.0.1");
        assert!(line["bytes_sent"].is_u64() && line["bytes_received"].is_u64() && line["duration_ms"].is_number());
    }
    let ok = &lines[0];
    assert_eq!(
        (&ok["method"], &ok["path"], &ok["route"]),
        (&"GET".into(), &"/api/v3/projects".into(), &"/api/v3/*".into())
    );
    assert_eq!((&ok["status"], &ok["reason"], &ok["source"]), (&200.into(), &"ok".into(), &"query".into()));
    assert_eq!((&ok["user"], &ok["upstream"]), (&"user-0001".into(), &"api".into()));
    assert_eq!(ok["token"].as_str(), Some(&sha256_hex(GOOD)[..12]));
    assert!(ok["query"].as_str().unwrap().contains("page=2"), "{ok}");
    assert_eq!((&lines[1]["request_id"], &lines[1]["status"]), (&"my-id_1".into(), &401.into()));
    assert_eq!((&lines[1]["reason"], &lines[1]["source"]), (&"unknown".into(), &"header".into()));
    assert_eq!(lines[1]["token"].as_str(), Some(&sha256_hex(BAD)[..12]));
    let statuses: Vec<_> = lines.iter().map(|line| line["status"].as_u64().unwrap()).collect();
    assert_eq!(statuses, [200, 401, 401, 400, 404, 401, 200, 400]);
    assert_eq!((&lines[6]["source"], &lines[6]["user"]), (&"bearer".into(), &"user-0002".into()));
}

#[test]
fn a_full_log_does_not_stall_requests() {
    let upstream = Upstream::start();
    let mut gateway = Gateway::start(upstream.address, "[log]\naccess = \"/dev/full\"\n");
    let mut client = gateway.client();
    let started = Instant::now();
    for _ in 0..500 {
        client.send_head(&get(GOOD, "/api/v3/user"));
        assert_eq!(client.answer().status, 200);
    }
    assert!(started.elapsed() < PATIENCE, "{:?}", started.elapsed());
    eventually("the operator is told", || gateway.process_log().contains("access log cannot be written"));
    gateway.signal("TERM");
    assert_eq!(gateway.ended().code(), Some(0));
}
