//! Limits that gateways share, on real servers: what gets through against what is due, for 1, 3 and 10 replicas; a store that is
//! killed and comes back; a replica whose clock is wrong; and what stands in the store. Prints a table.
//!
//! TOLLGATE_EXACTNESS_SECONDS (1) makes it longer.

use crate::harness::*;
use crate::limits::statuses;
use crate::servers::Server;
use crate::servers::postgres::Postgres;
use crate::servers::redis::{Options, Redis};
use crate::support::{get, run, stdout};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tollgate::clock::{self, Now};
use tollgate::share::{
    LeaseEngine, LeaseKey, LeaseLack, LeaseOutcome, LeaseRequest, LeaseTake, ShareStore, SharedAmounts, SharedQuota,
    SharedRate, WhenGone,
};
use tollgate::telemetry::metrics::Metrics;
use tollgate::{config, share};

const RATE: u64 = 500;
const BURST: u64 = 50;
const TARGET: &str = "/api/v3/projects";

/// A server, and the section that names it.
struct Shared {
    kind: &'static str,
    server: Box<dyn Server>,
    section: String,
}

impl Shared {
    fn redis() -> Self {
        let server = Redis::start(&Options::default());
        let section =
            format!("[shared_limits]\nstore = \"redis\"\nservers = [\"{}\"]\ntimeout = \"1s\"\n", server.address());
        Self { kind: "redis", server: Box::new(server), section }
    }

    fn postgres() -> Self {
        let server = Postgres::start();
        let section =
            format!("[shared_limits]\nstore = \"postgres\"\nurl = \"{}\"\ntimeout = \"1s\"\n", server.url("postgres"));
        Self { kind: "postgres", server: Box::new(server), section }
    }

    fn all() -> [fn() -> Self; 2] {
        [Self::redis, Self::postgres]
    }

    /// As a gateway opens it.
    fn open(&self) -> Arc<dyn ShareStore> {
        let text = format!(
            "{}[[limit]]\nname = \"l\"\nrate = \"1/s\"\nshared = true\n[[upstream]]\nname = \"a\"\nservers = [\"127.0.0.1:9\"]\n",
            self.section
        );
        let settings = config::parse(&text, std::path::Path::new("/tollgate.toml"), config::Probe::Settings);
        let settings = settings.unwrap_or_else(|problems| panic!("{problems:?}"));
        let metrics = Metrics::new("").unwrap().store("shared_limits");
        settings.shared_limits.unwrap().open(Arc::new(metrics)).unwrap()
    }
}

fn seconds() -> u64 {
    std::env::var("TOLLGATE_EXACTNESS_SECONDS").map_or(1, |text| text.parse().unwrap())
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn row(kind: &str, replicas: u64, what: &str, requests: u64, due: f64, passed: u64) {
    let difference = 100.0 * (passed as f64 - due) / due;
    println!("| {kind} | {replicas} | {what} | {requests} | {due:.1} | {passed} | {difference:+.2} % |");
}

fn request(key: &str, amounts: SharedAmounts) -> LeaseRequest {
    LeaseRequest { key: key.into(), amounts, used: 0, keeps: Some(0), cost: 1, count: 1, ahead: 0 }
}

/// The script and the function say the same of what is asked of them.
#[test]
fn every_store_counts_as_it_is_described() {
    for shared in Shared::all().map(|start| start()) {
        let (kind, store) = (shared.kind, shared.open());
        runtime().block_on(async {
            store.examine().await.unwrap();
            // One in 100 seconds: nothing flows in meanwhile.
            let slow = |burst| SharedAmounts {
                rate: Some(SharedRate { requests: 1, period_ms: 100_000, burst }),
                quota: None,
            };
            let ask = async |replica: &str, request: &LeaseRequest| {
                let answers = store.lease(replica, std::slice::from_ref(request)).await;
                answers.unwrap_or_else(|error| panic!("{kind}: {error}"))[0]
            };
            // Some of many that wait pass, and what is asked ahead is given behind them.
            let many = LeaseRequest { count: 4, ahead: 9, ..request("a", slow(10)) };
            let answer = ask("one", &many).await;
            assert_eq!((answer.passed, answer.ahead, answer.wait_ms, answer.rate_left), (4, 6, 0, 0), "{kind}");
            let refused = ask("two", &request("a", slow(10))).await;
            assert_eq!((refused.passed, refused.ahead), (0, 0), "{kind}");
            // Four are owed and six are held: the next one flows in after 100 seconds.
            assert!((99_000..=100_000).contains(&refused.wait_ms), "{kind}: {refused:?}");
            // Two were used, one is kept, three come back.
            let told = LeaseRequest { used: 2, keeps: Some(1), count: 0, ..request("a", slow(10)) };
            assert_eq!(ask("one", &told).await.rate_left, 3, "{kind}");
            let rest = LeaseRequest { cost: 2, count: 5, ..request("a", slow(10)) };
            let answer = ask("two", &rest).await;
            assert_eq!((answer.passed, answer.rate_left), (1, 1), "{kind}: one of cost 2 of 3");
            // What nobody tells of any more counts as used.
            tokio::time::sleep(share::LEASE + Duration::from_millis(50)).await;
            assert_eq!(ask("two", &LeaseRequest { count: 0, ..rest.clone() }).await.rate_left, 1, "{kind}");
            let late = LeaseRequest { used: 1, keeps: Some(0), count: 0, ..request("a", slow(10)) };
            assert_eq!(ask("one", &late).await.rate_left, 1, "{kind}: it was counted already");
            // Two requests for one key in one message, and another key.
            let pair = [
                LeaseRequest { count: 3, ..request("b", slow(5)) },
                LeaseRequest { keeps: None, cost: 3, ..request("b", slow(5)) },
                request("c", slow(5)),
            ];
            let answers = store.lease("one", &pair).await.unwrap();
            assert_eq!(answers.iter().map(|answer| answer.passed).collect::<Vec<_>>(), [3, 0, 1], "{kind}");
            // Quotas of the calendar.
            for monthly in [false, true] {
                let amounts = SharedAmounts { rate: None, quota: Some(SharedQuota { requests: 3, monthly }) };
                let all = LeaseRequest { count: 5, ..request(if monthly { "m" } else { "d" }, amounts) };
                let answer = ask("one", &all).await;
                let day = 86_400_000 - clock::now().unix_ms % 86_400_000;
                assert_eq!((answer.passed, answer.by_quota, answer.quota_left), (3, true, 0), "{kind}");
                match monthly {
                    false => assert!(answer.wait_ms.abs_diff(day) < 5_000, "{kind}: {answer:?}"),
                    true => {
                        // At the beginning of a day, in less than a month.
                        assert_eq!((answer.wait_ms + 5_000 - day) % 86_400_000 / 10_000, 0, "{kind}: {answer:?}");
                        assert!((day - 5_000..=31 * 86_400_000).contains(&answer.wait_ms), "{kind}: {answer:?}");
                    }
                }
            }
            assert_eq!((store.beat("one").await.unwrap(), store.beat("two").await.unwrap()), (1, 2), "{kind}");
            store.leave("one").await.unwrap();
            assert_eq!(store.beat("two").await.unwrap(), 1, "{kind}");
        });
    }
}

/// Engines in this process, each with several requests at a time that come as fast as they can.
async fn crowd(shared: &Shared, replicas: u64, is_skewed: bool, time: Duration) -> (u64, u64, Duration) {
    let metrics = Metrics::new("").unwrap();
    let amounts =
        SharedAmounts { rate: Some(SharedRate { requests: RATE, period_ms: 1_000, burst: BURST }), quota: None };
    let key = LeaseKey { limit: "l".into(), hash: fastrand::u64(..), amounts };
    let engine = |place: u64| {
        let wrong = if is_skewed && place == 0 { 3_600_000 } else { 0 };
        let clock = move || {
            let Now { mono_ms, unix_ms } = clock::now();
            Now { mono_ms: mono_ms + wrong, unix_ms: unix_ms + wrong }
        };
        let patience = Duration::from_secs(1);
        LeaseEngine::new(shared.open(), patience, WhenGone::Closed, metrics.share(shared.kind), clock)
    };
    let engines: Vec<_> = (0..replicas).map(engine).collect();
    engines.iter().for_each(LeaseEngine::start);
    // The first connection takes a while.
    for engine in &engines {
        let wait = engine.enqueue(LeaseLack { key: LeaseKey { hash: 1, ..key.clone() }, cost: 1 });
        assert_eq!(wait.outcome().await, LeaseOutcome::Paid);
    }
    let (passed, requests) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let begun = Instant::now();
    let callers = engines.iter().enumerate().flat_map(|(place, engine)| (0..8).map(move |_| (place, engine)));
    let tasks: Vec<_> = callers
        .map(|(place, engine)| {
            let (engine, key) = (Arc::clone(engine), key.clone());
            let (passed, requests) = (Arc::clone(&passed), Arc::clone(&requests));
            let wrong = if is_skewed && place == 0 { 3_600_000 } else { 0 };
            tokio::spawn(async move {
                while begun.elapsed() < time {
                    let now = clock::now();
                    let now = Now { mono_ms: now.mono_ms + wrong, unix_ms: now.unix_ms + wrong };
                    let is_paid = match engine.take(&key, 1, now) {
                        LeaseTake::Taken(_) => true,
                        LeaseTake::Refused(_) => false,
                        LeaseTake::Lacks => {
                            let wait = engine.enqueue(LeaseLack { key: key.clone(), cost: 1 });
                            wait.outcome().await == LeaseOutcome::Paid
                        }
                    };
                    requests.fetch_add(1, Ordering::Relaxed);
                    passed.fetch_add(is_paid.into(), Ordering::Relaxed);
                    if !is_paid {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let lasted = begun.elapsed();
    for engine in engines {
        engine.end().await;
    }
    (requests.load(Ordering::Relaxed), passed.load(Ordering::Relaxed), lasted)
}

#[test]
fn replicas_together_let_through_what_is_allowed() {
    println!("| store | replicas | | requests | due | got through | difference |\n|---|---|---|---|---|---|---|");
    for shared in Shared::all().map(|start| start()) {
        for (replicas, is_skewed) in [(1, false), (3, false), (10, false), (3, true)] {
            let time = Duration::from_secs(seconds());
            let (requests, passed, lasted) = runtime().block_on(crowd(&shared, replicas, is_skewed, time));
            let due = BURST as f64 + RATE as f64 * lasted.as_secs_f64();
            let what = if is_skewed { "the clock of one is ahead by an hour" } else { "" };
            row(shared.kind, replicas, what, requests, due, passed);
            assert!(passed as f64 <= due, "{}, {replicas}: {passed} of {due}", shared.kind);
            assert!(passed as f64 >= 0.8 * due, "{}, {replicas}: {passed} of {due}", shared.kind);
        }
    }
}

fn limit(keys: &str) -> String {
    format!("[[limit]]\nname = \"l\"\nshared = true\n{keys}\n")
}

fn passed(statuses: &[u16]) -> usize {
    assert!(statuses.iter().all(|status| [200, 429].contains(status)), "{statuses:?}");
    statuses.iter().filter(|status| **status == 200).count()
}

fn replicas(gateway: &Gateway, kind: &str) -> f64 {
    gateway.metric(&format!("tollgate_shared_limits_replicas{{store=\"{kind}\"}}"))
}

#[test]
fn gateways_count_together() {
    for shared in Shared::all().map(|start| start()) {
        let upstream = Upstream::start();
        // One in a minute: nothing flows in while the test runs.
        let more = format!(
            "{}{}[[limit]]\nname = \"quota\"\nkey = []\nrate = \"none\"\nquota = \"45/day\"\nshared = true\n\
             [[limit]]\nname = \"dry\"\nrate = \"60/min\"\nburst = 2\nshared = true\ndry_run = true\n",
            shared.section,
            limit("rate = \"60/h\"\nburst = 30")
        );
        let gateways: Vec<_> = (0..3).map(|_| Gateway::start(upstream.address, &more)).collect();
        for gateway in &gateways {
            eventually("all gateways are counted", || replicas(gateway, shared.kind) == 3.0);
        }
        // Everything that one gateway may give comes from whichever is asked.
        let all: Vec<u16> = (0..20).flat_map(|turn| statuses(&gateways[turn % 3], GOOD, 2)).collect();
        assert_eq!(passed(&all), 30, "{}", shared.kind);
        assert_eq!(all[..25], [200; 25], "{}: what is there is not refused: {all:?}", shared.kind);
        // Another token has its own, and the quota is for both: all of its parts come back that lay in leases.
        eventually("the quota is used up", || passed(&statuses(&gateways[1], OTHER, 1)) == 0);
        // For each gateway, the first request that the rate refuses may have been counted by the quota.
        assert!((42..=45).contains(&upstream.seen().len()), "{}: {}", shared.kind, upstream.seen().len());
        // 429 says what is left and when to come again.
        let answer = gateways[0].ask(&get(GOOD, TARGET));
        assert_eq!(answer.status, 429);
        assert!(answer.header("Retry-After").unwrap().parse::<u64>().unwrap() > 30, "{answer:?}");
        // A gateway that ends is counted no more, and what it had is with the others.
        let mut gateways = gateways.into_iter();
        let mut first = gateways.next().unwrap();
        first.signal("TERM");
        assert!(first.ended().success());
        let rest: Vec<_> = gateways.collect();
        eventually("two are left", || replicas(&rest[0], shared.kind) == 2.0);
    }
}

/// Sends so many tokens that nobody has, until the gateway holds the address for one that guesses: how many it took.
fn guesses_until_noticed(gateway: &Gateway, name: &str, most: usize) -> usize {
    let mut client = gateway.client();
    for guess in 0..most {
        client.send_head(&get(&format!("{name}-{guess:08}"), TARGET));
        assert_eq!(client.answer().status, 401, "{name}");
        if gateway.metric("tollgate_guessing_episodes_total") > 0.0 {
            return guess + 1;
        }
    }
    most
}

#[test]
fn gateways_count_failed_tokens_together() {
    for shared in Shared::all().map(|start| start()) {
        let upstream = Upstream::start();
        let guessing = "[guessing]\nfailures = 60\nper = \"1h\"\nwait = \"0s\"\nshared = true\n";
        let more = format!("{}{guessing}", shared.section);
        let gateways: Vec<_> = (0..2).map(|_| Gateway::start(upstream.address, &more)).collect();
        for gateway in &gateways {
            eventually("both gateways are counted", || replicas(gateway, shared.kind) == 2.0);
        }
        assert_eq!(guesses_until_noticed(&gateways[0], "first", 50), 50, "{}", shared.kind);
        // Alone, it would take 61.
        let second = guesses_until_noticed(&gateways[1], "second", 61);
        assert!((2..=30).contains(&second), "{}: {second}", shared.kind);
        // A token that is known passes at both, and the first one learns of it as soon as somebody guesses there.
        assert!(gateways.iter().all(|gateway| statuses(gateway, GOOD, 1) == [200]));
        let first = guesses_until_noticed(&gateways[0], "again", 61);
        assert!(first <= 10, "{}: {first}", shared.kind);
    }
}

/// So many gateways with one limit that they share, which all know of each other.
fn limiting(shared: &Shared, upstream: &Upstream, count: usize) -> Vec<Gateway> {
    let limit = limit(&format!("rate = \"{RATE}/s\"\nburst = {BURST}"));
    let more = format!("{}[log]\naccess = \"off\"\n{limit}", shared.section);
    let gateways: Vec<_> = (0..count).map(|_| Gateway::start(upstream.address, &more)).collect();
    for gateway in &gateways {
        eventually("all gateways are counted", || replicas(gateway, shared.kind) == count as f64);
    }
    gateways
}

/// One request after the other on a connection: how many there were, and how many got through.
fn ask_until(gateway: &Gateway, is_over: impl Fn() -> bool) -> (u64, u64) {
    let (mut client, mut all, mut through) = (gateway.client(), 0, 0);
    while !is_over() {
        client.send_head(&get(GOOD, TARGET));
        let status = client.answer().status;
        assert!([200, 429].contains(&status), "{status}");
        (all, through) = (all + 1, through + u64::from(status == 200));
    }
    (all, through)
}

fn sum_of(counts: impl Iterator<Item = (u64, u64)>) -> (u64, u64) {
    counts.fold((0, 0), |(all, through), one| (all + one.0, through + one.1))
}

#[test]
fn gateways_under_load_let_through_what_is_allowed() {
    println!("| store | replicas | | requests | due | got through | difference |\n|---|---|---|---|---|---|---|");
    for shared in Shared::all().map(|start| start()) {
        let upstream = Upstream::start();
        let gateways = limiting(&shared, &upstream, 3);
        let begun = Instant::now();
        let until = begun + Duration::from_secs(seconds());
        let (all, through) = std::thread::scope(|scope| {
            let clients: Vec<_> = (0..12)
                .map(|client| {
                    let gateway = &gateways[client % 3];
                    scope.spawn(move || ask_until(gateway, || Instant::now() >= until))
                })
                .collect();
            sum_of(clients.into_iter().map(|client| client.join().unwrap()))
        });
        let due = BURST as f64 + RATE as f64 * begun.elapsed().as_secs_f64();
        row(shared.kind, 3, "gateways", all, due, through);
        assert!(through as f64 <= due, "{through} of {due}");
        // A machine that is busy otherwise sends too little.
        assert!((all as f64) < 4.0 * due || through as f64 >= 0.8 * due, "{through} of {due}, {all} requests");
        assert_eq!(upstream.seen().len() as u64, through);
    }
}

/// What is changed alternately: something else, and where the gateway counts, after which its leases begin anew.
#[test]
fn reloads_under_load_let_through_no_more_than_is_allowed() {
    for shared in Shared::all().map(|start| start()) {
        let upstream = Upstream::start();
        let gateways = limiting(&shared, &upstream, 2);
        let (begun, over) = (Instant::now(), AtomicBool::new(false));
        let (all, through, reloads) = std::thread::scope(|scope| {
            let clients: Vec<_> = (0..8)
                .map(|client| {
                    let (gateway, over) = (&gateways[client % 2], &over);
                    let is_over = || over.load(Ordering::Relaxed) || begun.elapsed() >= Duration::from_secs(60);
                    scope.spawn(move || ask_until(gateway, is_over))
                })
                .collect();
            let mut reloads = 0;
            while reloads < 8 || begun.elapsed() < Duration::from_secs(seconds()) {
                let gateway = &gateways[reloads % 2];
                let (old, new) = match reloads / 2 % 4 {
                    0 => ("burst = 50", "dry_run = false\nburst = 50"),
                    1 => ("timeout = \"1s\"", "timeout = \"900ms\""),
                    2 => ("dry_run = false\n", ""),
                    _ => ("timeout = \"900ms\"", "timeout = \"1s\""),
                };
                gateway.rewrite(|text| text.replace(old, new));
                let answer = gateway.admin_post("/reload");
                assert_eq!(answer.status, 200, "{}", answer.text());
                reloads += 1;
                std::thread::sleep(Duration::from_millis(150));
            }
            over.store(true, Ordering::Relaxed);
            let (all, through) = sum_of(clients.into_iter().map(|client| client.join().unwrap()));
            (all, through, reloads)
        });
        let due = BURST as f64 + RATE as f64 * begun.elapsed().as_secs_f64();
        println!("| {}, {reloads} reloads | {all} | {due:.1} | {through} |", shared.kind);
        assert!(through as f64 <= due, "{}: {through} of {due}", shared.kind);
        assert!((all as f64) < 4.0 * due || through as f64 >= 0.5 * due, "{}: {through} of {due}", shared.kind);
        assert_eq!(upstream.seen().len() as u64, through);
    }
}

#[test]
fn while_the_store_is_gone_the_setting_decides_and_afterwards_the_store_again() {
    for mut shared in Shared::all().map(|start| start()) {
        let upstream = Upstream::start();
        let start = |when_gone: &str, name: &str| {
            let section = format!("{}when_gone = \"{when_gone}\"\n", shared.section);
            let limit = format!("[[limit]]\nname = \"{name}\"\nrate = \"60/h\"\nburst = 20\nshared = true\n");
            Gateway::start(upstream.address, &(section + &limit))
        };
        let local = [start("local", "local"), start("local", "local")];
        let (open, closed) = (start("open", "open"), start("closed", "closed"));
        let all = || local.iter().chain([&open, &closed]);
        for gateway in all() {
            eventually("all gateways are counted", || replicas(gateway, shared.kind) == 4.0);
            assert_eq!(passed(&statuses(gateway, GOOD, 2)), 2);
        }
        let up = |gateway: &Gateway| gateway.metric(&format!("tollgate_shared_limits_up{{store=\"{}\"}}", shared.kind));
        shared.server.stop();
        for gateway in all() {
            eventually("the outage is noticed", || up(gateway) == 0.0);
        }
        // Each of four has a quarter of the burst of 20.
        assert_eq!(local.each_ref().map(|gateway| passed(&statuses(gateway, GOOD, 12))), [5, 5], "{}", shared.kind);
        assert_eq!(passed(&statuses(&open, GOOD, 50)), 50, "{}", shared.kind);
        assert_eq!(statuses(&closed, GOOD, 3), [503; 3], "{}", shared.kind);
        let refused = closed.ask(&get(GOOD, TARGET));
        assert_eq!((refused.status, refused.header("Retry-After")), (503, Some("1")));
        closed.metrics();
        let line = closed.access_log().pop().unwrap();
        assert_eq!((&line["reason"], &line["limit"]), (&"limit_store".into(), &"closed".into()), "{line}");
        // Nobody waits for a store that is known to be gone.
        let begun = Instant::now();
        statuses(&open, OTHER, 50);
        assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
        shared.server.start_again();
        for gateway in all() {
            eventually("it is used again", || up(gateway) == 1.0);
        }
        // Its data may be gone with it: no more than a burst in any case.
        let after: Vec<_> = (0..30).flat_map(|turn| statuses(&local[turn % 2], GOOD, 2)).collect();
        assert!(passed(&after) <= 20, "{}: {after:?}", shared.kind);
        assert!(passed(&statuses(&closed, GOOD, 30)) <= 20, "{}", shared.kind);
        for gateway in all() {
            let log = gateway.process_log();
            let lines = |what: &str| log.lines().filter(|line| line.contains(what)).count();
            assert_eq!((lines("the store does not answer"), lines("the store answers again")), (1, 1), "{log}");
            assert!(!log.contains("the token store"), "{log}");
        }
    }
}

#[test]
fn a_store_that_hangs_keeps_no_request_for_longer_than_the_timeout() {
    for shared in Shared::all().map(|start| start()) {
        let upstream = Upstream::start();
        let more =
            format!("{}{}", shared.section.replace("1s", "150ms"), limit("rate = \"100000/s\"\nkey = [\"address\"]"));
        let gateway = Gateway::start(upstream.address, &more);
        assert_eq!(statuses(&gateway, GOOD, 3), [200; 3]);
        shared.server.freeze();
        // By address: a token that has to be looked up waits for its lease first, and a cached one as well.
        let over = AtomicBool::new(false);
        let longest = std::thread::scope(|scope| {
            let clients: Vec<_> = [GOOD, OTHER]
                .map(|token| {
                    let (gateway, over) = (&gateway, &over);
                    scope.spawn(move || {
                        let mut longest = Duration::ZERO;
                        let until = Instant::now() + Duration::from_secs(3);
                        while !over.load(Ordering::Relaxed) && Instant::now() < until {
                            let begun = Instant::now();
                            assert_eq!(statuses(gateway, token, 1), [200]);
                            longest = longest.max(begun.elapsed());
                        }
                        longest
                    })
                })
                .into_iter()
                .collect();
            clients.into_iter().map(|client| client.join().unwrap()).max().unwrap()
        });
        shared.server.thaw();
        assert!(longest >= Duration::from_millis(100), "{}: nobody waited: {longest:?}", shared.kind);
        assert!(longest < Duration::from_millis(1_500), "{}: {longest:?}", shared.kind);
        let up = format!("tollgate_shared_limits_up{{store=\"{}\"}}", shared.kind);
        eventually("it is used again", || gateway.metric(&up) == 1.0);
    }
}

/// Neither a token's digest nor an address, and nothing for ever.
#[test]
fn keys_in_the_store_are_hashes_that_expire() {
    let server = Redis::start(&Options::default());
    let (upstream, secret) = (Upstream::start(), Folder::new("secret"));
    let secret = secret.write("secret", "a-secret-of-the-fleet\n");
    let keys = |more: &str| {
        server.cli(&["FLUSHALL"]);
        let limits = "[[limit]]\nname = \"by-token\"\nrate = \"60/min\"\nshared = true\n\
            [[limit]]\nname = \"by-address\"\nkey = [\"address\"]\nrate = \"60/min\"\nshared = true\n";
        let section = format!("[shared_limits]\nstore = \"redis\"\nservers = [\"{}\"]\n{more}", server.address());
        let gateway = Gateway::start(upstream.address, &(section + limits));
        assert_eq!(statuses(&gateway, GOOD, 2), [200, 200]);
        let mut keys: Vec<String> = server
            .cli(&["KEYS", "tollgate:limit:by-*"])
            .lines()
            .map(str::to_owned)
            .filter(|key| !key.is_empty())
            .collect();
        keys.sort();
        assert_eq!(keys.len(), 2, "{keys:?}");
        for key in &keys {
            let ttl: i64 = server.cli(&["PTTL", key]).trim().parse().unwrap();
            assert!((1..=70_000).contains(&ttl), "{key}: {ttl}");
        }
        keys
    };
    let (plain, again) = (keys(""), keys(""));
    let secret = keys(&format!("secret_file = \"{}\"\n", secret.display()));
    // All gateways, and one that was restarted, compute the same; without the secret nobody does.
    assert_eq!(plain, again);
    assert!(plain.iter().all(|key| !secret.contains(key)), "{plain:?} {secret:?}");
    let digest = sha256_hex(GOOD);
    for key in plain.iter().chain(&secret) {
        let hash = key.split(':').nth(3).unwrap();
        assert_eq!(hash.len(), 16, "{key}");
        assert!(!digest.contains(hash) && !digest.contains(&hash[..8]) && !key.contains("127"), "{key}");
    }
}

#[test]
fn a_check_says_when_the_store_cannot_be_used() {
    let shared = Shared::redis();
    let folder = Folder::new("check");
    let rest = "[[limit]]\nname = \"l\"\nrate = \"9/s\"\nshared = true\n[[upstream]]\nname = \"a\"\nservers = [\"127.0.0.1:9\"]\n";
    let check = |section: &str, arguments: &[&str]| {
        let path = folder.write("tollgate.toml", &format!("{section}{rest}"));
        let output = run(tollgate().arg("check").arg("--config").arg(path).args(arguments));
        (output.status.success(), stdout(&output) + &crate::support::stderr(&output))
    };
    let (fine, said) = check(&shared.section, &[]);
    assert!(fine && !said.contains("shared_limits"), "{said}");
    let gone = format!("[shared_limits]\nstore = \"redis\"\nservers = [\"127.0.0.1:{}\"]\n", free_port());
    let (fine, said) = check(&gone, &[]);
    assert!(fine && said.contains("shared_limits.store: cannot keep the shared limits"), "{said}");
    let (fine, said) = check(&gone, &["--offline"]);
    assert!(fine && !said.contains("shared_limits"), "{said}");
}

#[test]
fn a_reload_keeps_what_was_used_and_takes_another_store() {
    let (upstream, one, other) = (Upstream::start(), Shared::redis(), Shared::redis());
    let gateway = Gateway::start(upstream.address, &format!("{}{}", one.section, limit("rate = \"60/h\"\nburst = 20")));
    assert_eq!(passed(&statuses(&gateway, GOOD, 15)), 15);
    gateway.rewrite(|text| text.replace("burst = 20", "burst = 20\ncost = { write = 2 }"));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    assert_eq!(passed(&statuses(&gateway, GOOD, 15)), 5);
    let servers = |shared: &Shared| shared.section.lines().nth(2).unwrap().to_owned();
    gateway.rewrite(|text| text.replace(&servers(&one), &servers(&other)));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    assert_eq!(passed(&statuses(&gateway, GOOD, 25)), 20, "the other store knows nothing");
    gateway.rewrite(|text| text.replace("shared = true", "shared = false"));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    assert_eq!(passed(&statuses(&gateway, GOOD, 25)), 20, "it counts for itself");
    assert!(!gateway.metrics().contains("tollgate_shared_limits_up{"), "no alert for what is not there");
}
