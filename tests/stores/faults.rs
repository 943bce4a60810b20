//! Store × fault → what callers see. Every part asserts what is documented and prints what was measured.

use super::{BOUND, Backing, Caller, all, setting};
use crate::harness::*;
use crate::servers::Fault;
use crate::support::get;
use std::time::{Duration, Instant};

/// Callers with cached tokens, which stay active.
const CALLERS: usize = 100;

fn tokens(kind: &str, count: usize) -> Vec<String> {
    (0..count).map(|number| format!("{kind}-{number:04}")).collect()
}

fn row(store: &dyn Backing, fault: &str, observed: &str) {
    println!("| {} | {fault} | {observed} |", store.name());
}

fn percentile(times: &mut [Duration], share: f64) -> Duration {
    times.sort();
    times[((times.len() - 1) as f64 * share) as usize]
}

/// A gateway whose cache entries expire within seconds, so that every store is asked during the fault.
fn gateway(store: &dyn Backing, upstream: &Upstream, ttl: &str) -> Gateway {
    let more = format!(
        "{}[cache]\npositive_ttl = \"{ttl}\"\nnegative_ttl = \"1s\"\nstale_if_error = \"5m\"\n[log]\naccess = \"off\"\n",
        store.section()
    );
    Gateway::start(upstream.address, &more)
}

/// How long a revocation may take. If the store does not notify of changes, this is `positive_ttl`, a second here, and some
/// tolerance.
fn bound(store: &dyn Backing) -> Duration {
    if store.hears() { BOUND } else { BOUND + BOUND / 2 }
}

fn lookups(gateway: &Gateway, store: &dyn Backing) -> f64 {
    let name = store.name();
    let count =
        |result: &str| gateway.metric(&format!("tollgate_store_lookups_total{{result=\"{result}\",store=\"{name}\"}}"));
    count("found") + count("unknown")
}

/// Down: cached callers are served, all others get 503. Recovery: immediate, without a burst of lookups.
fn down_and_back(make: fn() -> Box<dyn Backing>) {
    let mut store = make();
    let (known, cold) = (tokens("known", CALLERS), tokens("cold", 50));
    store.add(&known);
    store.add(&cold);
    let upstream = Upstream::start();
    let gateway = gateway(&*store, &upstream, "1s");
    let mut caller = Caller::of(&gateway);
    for token in &known {
        assert_eq!(caller.status(token), 200, "{}: {token}", store.name());
    }
    assert_eq!(caller.status("nobody"), 401);

    store.inject(Fault::Stop);
    // After `positive_ttl` the store is asked, and fails.
    std::thread::sleep(Duration::from_millis(1_300));
    let mut times = Vec::new();
    for round in 0..3 {
        for token in &known {
            let before = Instant::now();
            assert_eq!(caller.status(token), 200, "{}: {token} in round {round} of the fault", store.name());
            times.push(before.elapsed());
        }
    }
    let keeps_its_table = store.name() == "file";
    let (unknown, newcomer) = (caller.ask("nobody"), caller.ask(&cold[0]));
    if keeps_its_table {
        // The last state of the file is used, as documented.
        assert_eq!((unknown.status, newcomer.status), (401, 200));
    } else {
        for answer in [&unknown, &newcomer] {
            assert_eq!(answer.status, 503, "{}", store.name());
            assert_eq!(answer.header("Retry-After"), Some("1"));
        }
    }
    let p99 = percentile(&mut times, 0.99);
    row(
        &*store,
        "stopped",
        &format!(
            "{}/{} requests with cached tokens 200 (p99 {p99:.1?}); unknown token {}; valid but uncached token {}",
            times.len(),
            times.len(),
            unknown.status,
            newcomer.status
        ),
    );

    store.inject(Fault::Start);
    let back = Instant::now();
    eventually("the store answers again", || caller.status(&cold[1]) == 200);
    let recovered = back.elapsed();
    let before = lookups(&gateway, &*store);
    let second = Instant::now();
    let mut asked = 0;
    while second.elapsed() < Duration::from_secs(1) {
        for token in &known {
            assert_eq!(caller.status(token), 200, "{}: {token} after the fault", store.name());
            asked += 1;
        }
    }
    let rush = lookups(&gateway, &*store) - before;
    // Each caller may be looked up once when the store answers and once when change notifications arrive again; between these,
    // answers are cached for less than a second. The number of requests does not matter.
    assert!(rush <= 4.0 * CALLERS as f64, "{}: {rush} lookups for {CALLERS} callers", store.name());
    assert_eq!(caller.status("nobody"), 401);
    assert!(recovered < BOUND, "{}: {recovered:?}", store.name());
    row(
        &*store,
        "started again",
        &format!(
            "uncached token 200 after {recovered:.0?}; {rush} lookups in the first second for {asked} requests with {CALLERS} tokens"
        ),
    );
}

/// Not responding: cached callers are served, others are refused within the store's timeout and not queued without limit.
fn silent(make: fn() -> Box<dyn Backing>) {
    let mut store = make();
    let known = tokens("known", CALLERS);
    store.add(&known);
    store.add(&["cold".into()]);
    let upstream = Upstream::start();
    let gateway = gateway(&*store, &upstream, "6s");
    let mut caller = Caller::of(&gateway);
    let mut measure = |time: Duration| {
        let (mut times, until) = (Vec::new(), Instant::now() + time);
        while Instant::now() < until {
            for token in &known {
                let before = Instant::now();
                assert_eq!(caller.status(token), 200, "{token}");
                times.push(before.elapsed());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        (times.len(), percentile(&mut times, 0.99))
    };
    measure(Duration::from_millis(200));
    let (_, quiet) = measure(Duration::from_secs(1));
    if !store.inject(Fault::Freeze) {
        return;
    }
    // More than the limit of concurrent lookups.
    let address = gateway.address;
    let crowd = setting("TOLLGATE_FAULT_CROWD", 200);
    let burst = std::thread::spawn(move || {
        let mut clients: Vec<_> = (0..crowd).map(|_| Client::connect(address)).collect();
        let before = Instant::now();
        for (number, client) in clients.iter_mut().enumerate() {
            client.send_head(&get(&format!("stranger-{number}"), "/api/v3/user"));
        }
        let statuses: Vec<u16> = clients.iter_mut().map(|client| client.answer().status).collect();
        (statuses, before.elapsed())
    });
    // The entries become stale and are refreshed meanwhile.
    let (requests, slow) = measure(Duration::from_secs(9));
    let (statuses, took) = burst.join().unwrap();
    assert!(statuses.iter().all(|status| *status == 503), "{}: {statuses:?}", store.name());
    assert!(took < Duration::from_secs(4), "{}: {took:?}", store.name());
    assert!(
        slow < quiet * 10 + Duration::from_millis(50),
        "{}: p99 {slow:?}, and {quiet:?} before the fault",
        store.name()
    );
    row(
        &*store,
        "unresponsive",
        &format!(
            "{requests} requests with cached tokens 200, p99 {slow:.1?} ({quiet:.1?} before); {crowd} unknown tokens at once: all 503 within {took:.1?}"
        ),
    );
    store.inject(Fault::Thaw);
    let back = Instant::now();
    eventually("the store answers again", || Caller::of(&gateway).status("cold") == 200);
    row(&*store, "responsive again", &format!("uncached token 200 after {:.0?}", back.elapsed()));
}

/// Connections cut: a revocation immediately after the cut is not lost.
fn cut(make: fn() -> Box<dyn Backing>) {
    let mut store = make();
    let rounds = setting("TOLLGATE_FAULT_ROUNDS", 5);
    let known = tokens("known", rounds);
    store.add(&known);
    let upstream = Upstream::start();
    let gateway = gateway(&*store, &upstream, if store.hears() { "5m" } else { "1s" });
    let mut caller = Caller::of(&gateway);
    let mut worst = Duration::ZERO;
    for token in &known {
        assert_eq!(caller.status(token), 200);
        if !store.inject(Fault::Cut) {
            return;
        }
        store.revoke(token);
        let revoked = Instant::now();
        eventually("revoked", || caller.status(token) != 200);
        worst = worst.max(revoked.elapsed());
    }
    assert!(worst < bound(&*store), "{}: {worst:?}", store.name());
    row(
        &*store,
        "connections cut",
        &format!("a revocation immediately afterwards takes effect within {worst:.0?} (worst of {rounds})"),
    );
}

/// Restarted: a revocation before the gateway has reconnected is not lost.
fn restarted(make: fn() -> Box<dyn Backing>) {
    let mut store = make();
    store.add(&tokens("known", 2));
    let upstream = Upstream::start();
    let gateway = gateway(&*store, &upstream, if store.hears() { "5m" } else { "1s" });
    let mut caller = Caller::of(&gateway);
    assert_eq!((caller.status("known-0000"), caller.status("known-0001")), (200, 200));
    store.inject(Fault::Stop);
    // Long enough that the gateway waits between two attempts.
    std::thread::sleep(Duration::from_millis(700));
    store.inject(Fault::Start);
    store.revoke("known-0000");
    let revoked = Instant::now();
    eventually("revoked", || caller.status("known-0000") == 401);
    let lag = revoked.elapsed();
    assert!(lag < bound(&*store), "{}: {lag:?}", store.name());
    assert_eq!(caller.status("known-0001"), 200);
    row(
        &*store,
        "restarted",
        &format!("a revocation before the gateway has reconnected takes effect within {lag:.0?}"),
    );
}

#[test]
fn a_store_that_is_down_lets_the_known_go_on_and_nobody_else_in() {
    all().into_iter().for_each(down_and_back);
}

#[test]
fn a_silent_store_is_not_noticed_by_cached_callers() {
    all().into_iter().for_each(silent);
}

#[test]
fn a_cut_connection_loses_no_revocation() {
    all().into_iter().for_each(cut);
}

#[test]
fn a_restart_loses_no_revocation() {
    all().into_iter().for_each(restarted);
}

/// The gateway restarted: with a snapshot it looks up none of the tokens that were cached, except those that changed
/// meanwhile.
fn gateway_restarted(make: fn() -> Box<dyn Backing>) {
    let mut store = make();
    let known = tokens("known", CALLERS);
    store.add(&known);
    store.age();
    let upstream = Upstream::start();
    let keep = Folder::new("test");
    let mut observed = Vec::new();
    for with_snapshot in [false, true] {
        let snapshot = keep.0.join("cache");
        let path = if with_snapshot { snapshot.display().to_string() } else { String::new() };
        let start = || {
            let more = format!(
                "{}[cache]\npositive_ttl = \"5m\"\nsnapshot = \"{path}\"\n[log]\naccess = \"off\"\n",
                store.section()
            );
            let gateway = Gateway::start(upstream.address, &more);
            // All tokens that were cached before are looked up again then.
            let follows = || !store.hears() || gateway.process_log().contains("change notifications are arriving");
            eventually("the store is followed", follows);
            gateway
        };
        let mut first = start();
        let mut caller = Caller::of(&first);
        let revoked = usize::from(with_snapshot);
        for token in &known[revoked..] {
            assert_eq!(caller.status(token), 200);
        }
        first.signal("TERM");
        assert!(first.ended().success());
        store.revoke(&known[revoked]);
        let second = start();
        // At the start the store is asked once what has changed.
        let asked = with_snapshot && store.hears();
        let logged = ["earlier cache entries are in use", "cannot report what changed meanwhile"];
        let is_logged = || logged.iter().any(|line| second.process_log().contains(line));
        eventually("the store is asked", || !asked || is_logged());
        let mut caller = Caller::of(&second);
        for (index, token) in known.iter().enumerate() {
            let expected = if index <= revoked { 401 } else { 200 };
            assert_eq!(caller.status(token), expected, "{}: {token}", store.name());
        }
        observed.push(lookups(&second, &*store));
    }
    let vouches = ["sqlite", "postgres"].contains(&store.name());
    if vouches {
        assert!(observed[1] <= 2.0, "{}: {observed:?}", store.name());
    }
    row(
        &*store,
        "gateway restarted",
        &format!(
            "{CALLERS} tokens: {} lookups without a snapshot, {} with one; a token revoked meanwhile 401",
            observed[0], observed[1]
        ),
    );
}

#[test]
fn a_restart_of_the_gateway_does_not_rush_the_store() {
    all().into_iter().for_each(gateway_restarted);
}
