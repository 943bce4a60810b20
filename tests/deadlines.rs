//! Documented times: that a change of the tokens takes effect, and that no request waits for the log. `make test` runs these
//! alone, so that other tests do not affect them.

use crate::harness::*;
use crate::support::*;
use std::io::Read as _;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long this process did not get the CPU, measured by a thread that sleeps for 10 ms and sums up the excess. The
/// documented times hold for a gateway that can run.
pub struct Stalls {
    millis: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
}

impl Stalls {
    pub fn watch() -> Self {
        let (millis, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (counted, ended) = (Arc::clone(&millis), Arc::clone(&over));
        std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                let asleep = Instant::now();
                std::thread::sleep(Duration::from_millis(10));
                counted.fetch_add((asleep.elapsed().as_millis() as u64).saturating_sub(15), Ordering::Relaxed);
            }
        });
        Self { millis, over }
    }

    pub fn so_far(&self) -> Duration {
        Duration::from_millis(self.millis.load(Ordering::Relaxed))
    }
}

impl Drop for Stalls {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// Sends requests until the status is the wanted one, and returns how long after a moment the last request was sent that got
/// another one, minus the time without the CPU. The first right response is not the measure, because it may take time.
fn last_outdated(gateway: &Gateway, token: &str, wanted: u16, since: Instant) -> Duration {
    let stalls = Stalls::watch();
    let mut outdated = Duration::ZERO;
    eventually(&format!("{token} gets {wanted}"), || {
        let sent = since.elapsed();
        let right = status(gateway, token) == wanted;
        if !right {
            outdated = sent.saturating_sub(stalls.so_far());
        }
        right
    });
    outdated
}

#[test]
fn an_edited_token_file_takes_effect_within_a_second_and_a_broken_one_does_not() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let entry = |token: &str| format!("[[token]]\nsha256 = \"{}\"\nuser = \"u\"\n", sha256_hex(token));
    let within_a_second = |what: &str, token: &str, wanted: u16| {
        let lag = last_outdated(&gateway, token, wanted, Instant::now());
        assert!(lag <= SECOND, "{what}: after {lag:?}");
    };
    // Both are cached, one as valid and one as unknown.
    assert_eq!((status(&gateway, GOOD), status(&gateway, "brand-new")), (200, 401));
    gateway.folder.write("tokens.toml", &entry("brand-new"));
    within_a_second("an added token works", "brand-new", 200);
    within_a_second("a removed token does not", GOOD, 401);
    let revoked = entry("brand-new") + "revoked = true\n" + &entry(GOOD);
    // Like an editor: a new file replaces the old one.
    let new = gateway.folder.write("tokens.new", &revoked);
    std::fs::rename(new, gateway.folder.0.join("tokens.toml")).unwrap();
    within_a_second("a revoked token does not work", "brand-new", 401);
    within_a_second("a token that is back does", GOOD, 200);

    let is_current = || gateway.metric("tollgate_store_file_current{store=\"file\"}") == 1.0;
    assert!(is_current());
    let complaints = || gateway.process_log().matches("is kept as it was before").count();
    for broken in ["[[token]]\nsha256 = \"12\"\nuser = \"u\"\n", "secret-pasted-here", "[[token]]\nuser = \"u\"\n"] {
        let before = complaints();
        gateway.folder.write("tokens.toml", broken);
        eventually("the broken file was read", || complaints() > before);
        assert_eq!((status(&gateway, GOOD), status(&gateway, "brand-new")), (200, 401), "{broken}");
        assert!(!is_current(), "the metric does not show the broken file: {broken}");
    }
    assert!(!gateway.process_log().contains("secret-pasted"), "the log quotes the file");
    let before = complaints();
    std::fs::remove_file(gateway.folder.0.join("tokens.toml")).unwrap();
    eventually("the missing file was detected", || complaints() > before);
    assert_eq!((status(&gateway, GOOD), status(&gateway, "brand-new")), (200, 401), "without a file");
    gateway.folder.write("tokens.toml", &entry(OTHER));
    within_a_second("the next good file holds", GOOD, 401);
    within_a_second("the next good file holds", OTHER, 200);
    assert!(is_current());
}

#[test]
fn a_token_made_while_the_gateway_runs_works_at_once_although_it_was_refused_before() {
    let upstream = Upstream::start();
    let store = Store::with([(GOOD, "alice")]);
    // So long that only the change notification can replace the answer.
    let gateway = Gateway::start(upstream.address, &(store.section() + "[cache]\nnegative_ttl = \"1h\"\n"));
    assert_eq!((status(&gateway, "to-be-made"), status(&gateway, "to-be-made")), (401, 401));
    assert!(gateway.metric("tollgate_cache_lookups_total{result=\"negative_hit\"}") >= 1.0);
    let folder = Folder::new("test");
    let lines = folder.write("one.jsonl", "{\"token\":\"to-be-made\",\"user\":\"bob\"}\n");
    let output = store.token(&["import"], &[lines.to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    let lag = last_outdated(&gateway, "to-be-made", 200, Instant::now());
    assert!(lag <= SECOND, "after {lag:?}");
    let created = store.create("carol");
    let lag = last_outdated(&gateway, &created, 200, Instant::now());
    assert!(lag <= SECOND, "after {lag:?}");
}

#[test]
fn twenty_revocations_are_seen_within_a_second_each_and_the_metric_says_so() {
    let upstream = Upstream::start();
    let store = Store::with([(GOOD, "alice")]);
    let gateway = Gateway::start(upstream.address, &(store.section() + "[cache]\npositive_ttl = \"1h\"\n"));
    let tokens: Vec<_> = (0..20).map(|index| store.create(&format!("user-{index}"))).collect();
    let lag = |part: &str| gateway.metric(&format!("tollgate_revocation_lag_seconds_{part}{{store=\"sqlite\"}}"));
    let bucket =
        |le: &str| gateway.metric(&format!("tollgate_revocation_lag_seconds_bucket{{store=\"sqlite\",le=\"{le}\"}}"));
    eventually("the new tokens were detected", || lag("count") == 20.0);
    let (all, quick, slow) = (lag("count"), bucket("1"), bucket("5"));
    let stalls = Stalls::watch();
    let mut slowest = Duration::ZERO;
    for token in &tokens {
        assert_eq!(status(&gateway, token), 200);
        let output = store.token(&["revoke"], &[&sha256_hex(token)[..12]]);
        let revoked = Instant::now();
        assert!(output.status.success(), "{}", stderr(&output));
        slowest = slowest.max(last_outdated(&gateway, token, 401, revoked));
    }
    println!("slowest of 20 revocations: {slowest:?}");
    assert!(slowest <= SECOND, "{slowest:?}");
    assert_eq!(lag("count") - all, 20.0, "revocations that the metric did not count");
    let in_time = if stalls.so_far() < SECOND / 4 { bucket("1") - quick } else { bucket("5") - slow };
    assert_eq!(in_time, 20.0, "revocations that took longer than a second");
    assert!(lag("sum") > 0.0);
    assert_eq!(status(&gateway, GOOD), 200);
}

#[test]
fn a_blocked_log_loses_lines_and_counts_them_but_does_not_stall_requests() {
    let upstream = Upstream::start();
    let folder = Folder::new("test");
    let fifo = folder.0.join("log.fifo");
    assert!(run(Command::new("mkfifo").arg(&fifo)).status.success());
    // Open at this end, and not read.
    let mut reader = std::fs::OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
    let more = format!("[log]\naccess = \"{}\"\n", fifo.display());
    let mut gateway = Gateway::start(upstream.address, &more);
    let mut client = gateway.client();
    let mut slowest = Duration::ZERO;
    // More than the pipe and the queue hold. Refusals are logged like all requests.
    for _ in 0..10_000 {
        let sent = Instant::now();
        client.send_head(&get(BAD, "/api/v3/user"));
        assert_eq!(client.answer().status, 401);
        slowest = slowest.max(sent.elapsed());
    }
    assert!(slowest < SECOND, "a request waited {slowest:?} for the log");
    assert!(
        gateway.metric("tollgate_log_lines_dropped_total{log=\"access\"}") > 0.0,
        "nothing was dropped, so nothing was blocked"
    );
    // Then complete lines are read.
    let mut piece = vec![0; 32 * 1024];
    let n = reader.read(&mut piece).unwrap();
    let text = String::from_utf8_lossy(&piece[..n]).into_owned();
    let line = text.lines().next().unwrap();
    serde_json::from_str::<serde_json::Value>(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    // The shutdown does not wait for the log either.
    let asked = Instant::now();
    gateway.signal("TERM");
    assert_eq!(gateway.ended().code(), Some(0));
    assert!(asked.elapsed() < 5 * SECOND, "took {:?} to stop", asked.elapsed());
}
