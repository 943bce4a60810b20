//! Clients that guess tokens, from outside: what they get, what it costs the token store, and that nobody who is behind the same
//! address has to suffer for it. Addresses are played by X-Forwarded-For through a trusted proxy.
//!
//! TOLLGATE_GUESSES (2,000) and TOLLGATE_GUESSES_PER_SECOND (2,000) make the measurement longer or faster.

use crate::harness::*;
use crate::support::*;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const TARGET: &str = "/api/v3/projects";
const BEHIND_PROXY: &str = "[server]\nlisten = [\"@LISTEN@\"]\ntrusted_proxies = [\"127.0.0.1\"]\nthreads = 2\n";

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

fn head(from: &str, token: &str) -> String {
    format!("GET {TARGET} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {token}\nX-Forwarded-For: {from}\n\n")
}

fn ask(gateway: &Gateway, from: &str, token: &str) -> Answer {
    gateway.ask(&head(from, token))
}

fn looked_up(gateway: &Gateway) -> f64 {
    gateway.metric("tollgate_cache_lookups_total{result=\"miss\"}")
}

fn listed(gateway: &Gateway) -> serde_json::Value {
    serde_json::from_str(&gateway.admin_get("/guessing").unwrap().text()).unwrap()
}

/// Sends different tokens, one after the other, until the gateway has noticed.
fn guess_until_noticed(gateway: &Gateway, from: &str) {
    let mut client = gateway.client();
    for guess in 0..100_000 {
        client.send_head(&head(from, &format!("guess-{guess}")));
        if client.answer().status == 429 || listed(gateway)["addresses"] == 1 {
            return;
        }
    }
    panic!("100000 guesses were not noticed");
}

#[test]
fn beyond_the_budget_unknown_tokens_get_429_and_cached_ones_pass() {
    let upstream = Upstream::start();
    let guessing =
        "[guessing]\nfailures = 10\nper = \"1h\"\npause = \"1h\"\nlongest_pause = \"1h\"\nlookups = 1\nwait = \"0s\"\n";
    let gateway = Gateway::start(upstream.address, &format!("{BEHIND_PROXY}{guessing}"));
    let office = "192.0.2.1";
    assert_eq!(ask(&gateway, office, GOOD).status, 200);
    for guess in 0..11 {
        assert_eq!(ask(&gateway, office, &format!("guess-{guess}")).status, 401);
        // No token is no guess, nor is one that can't be any.
        assert_eq!(gateway.ask(&format!("GET {TARGET} HTTP/1.1\nHost: h\nX-Forwarded-For: {office}\n\n")).status, 401);
    }
    // One a second has a turn at the store.
    let refused = (0..50).map(|n| ask(&gateway, office, &format!("more-{n}"))).find(|answer| answer.status == 429);
    let refused = refused.expect("all of 50 were looked up");
    assert_eq!(refused.text(), "{\"message\":\"429 Too Many Requests\"}");
    let wait: u64 = refused.header("Retry-After").unwrap().parse().unwrap();
    assert!((3_500..=3_600).contains(&wait), "{wait}");
    assert_eq!(refused.header("RateLimit-Limit"), None);
    let before = looked_up(&gateway);
    assert_eq!(ask(&gateway, office, GOOD).status, 200, "it is in the cache");
    assert_eq!(ask(&gateway, "192.0.2.2", &format!("{BAD}x")).status, 401, "another address");
    assert_eq!(looked_up(&gateway), before + 1.0);
    // It was valid before, and gets its turn in the end.
    eventually("a token that is not in the cache has its turn", || ask(&gateway, office, OTHER).status == 200);

    let log = gateway.access_log();
    let line = log.iter().find(|line| line["status"] == 429).unwrap();
    assert_eq!((line["reason"].as_str(), line["client"].as_str()), (Some("guessing"), Some(office)));
    assert_eq!(gateway.metric("tollgate_guessing_episodes_total"), 1.0);
    assert!(gateway.metric("tollgate_guessing_requests_total{result=\"refused\"}") >= 1.0);
    assert_eq!(gateway.process_log().matches("client 192.0.2.1: more than 10 failed tokens in 1h").count(), 1);
    let list = listed(&gateway);
    assert_eq!((&list["addresses"], &list["clients"][0]["client"]), (&1.into(), &office.into()), "{list}");

    // The operator lifts it.
    assert_eq!(gateway.admin_post("/guessing/lift?client=office").status, 400);
    assert!(gateway.admin_post("/guessing/lift?client=192.0.2.7").text().contains("\"addresses\": 0"));
    assert!(gateway.admin_post("/guessing/lift?client=192.0.2.1").text().contains("\"addresses\": 1"));
    assert_eq!(listed(&gateway)["addresses"], 0);
    assert!((0..5).all(|n| ask(&gateway, office, &format!("again-{n}")).status == 401));
    assert_eq!(gateway.process_log().matches("client 192.0.2.1 may send failed tokens again").count(), 1);
}

#[test]
fn the_end_of_an_episode_is_told_once() {
    let upstream = Upstream::start();
    let guessing = "[guessing]\nfailures = 10\nper = \"1s\"\npause = \"1s\"\nlongest_pause = \"1s\"\n";
    let gateway = Gateway::start(upstream.address, &format!("{BEHIND_PROXY}{guessing}"));
    guess_until_noticed(&gateway, "192.0.2.1");
    let ended = || gateway.process_log().matches("client 192.0.2.1 has stopped sending failed tokens, after").count();
    eventually("the end is told", || ended() > 0);
    assert_eq!((ended(), listed(&gateway)["addresses"].as_u64()), (1, Some(0)));
    eventually("the gauge follows", || gateway.metric("tollgate_guessing_addresses") == 0.0);
}

#[test]
fn a_program_with_an_old_token_locks_nobody_out() {
    let upstream = Upstream::start();
    let tokens: Vec<String> = (0..50).map(|number| format!("office-token-{number:04}")).collect();
    let store = Store::with(tokens.iter().map(|token| (token.as_str(), "u")));
    let guessing = "[guessing]\nfailures = 10\n[cache]\nnegative_ttl = \"100ms\"\n";
    let gateway = Gateway::start(upstream.address, &format!("{BEHIND_PROXY}{guessing}{}", store.section()));
    let (done, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut script = gateway.client();
            while !done.load(Ordering::Relaxed) {
                script.send_head(&head("192.0.2.1", BAD));
                assert_eq!(script.answer().status, 401);
                sent.fetch_add(1, Ordering::Relaxed);
            }
        });
        // More than the budget, and the store has been asked for it more often than the budget, too.
        eventually("the program is known", || sent.load(Ordering::Relaxed) > 50 && looked_up(&gateway) > 15.0);
        let statuses: Vec<u16> = tokens.iter().map(|token| ask(&gateway, "192.0.2.1", token).status).collect();
        done.store(true, Ordering::Relaxed);
        assert_eq!(statuses, [200; 50]);
    });
    assert_eq!(gateway.metric("tollgate_guessing_episodes_total"), 0.0);
}

/// What the callers of one kind have waited, from the shortest to the longest.
fn waits(gateway: &Gateway, tokens: &[String]) -> Vec<Duration> {
    let mut waits: Vec<_> = std::thread::scope(|scope| {
        let callers: Vec<_> = tokens
            .iter()
            .map(|token| {
                scope.spawn(move || {
                    let begun = Instant::now();
                    (ask(gateway, "192.0.2.1", token).status, begun.elapsed())
                })
            })
            .collect();
        callers
            .into_iter()
            .map(|caller| {
                let (status, wait) = caller.join().unwrap();
                assert_eq!(status, 200);
                wait
            })
            .collect()
    });
    waits.sort_unstable();
    waits
}

#[test]
fn behind_the_address_of_one_who_guesses_all_get_through() {
    let upstream = Upstream::start();
    let tokens: Vec<String> = (0..50).map(|number| format!("office-token-{number:04}")).collect();
    let (known, new) = tokens.split_at(25);
    let store = Store::with(tokens.iter().map(|token| (token.as_str(), "u")));
    let guessing = "[guessing]\nfailures = 10\nper = \"1h\"\npause = \"1m\"\n";
    let gateway = Gateway::start(upstream.address, &format!("{BEHIND_PROXY}{guessing}{}", store.section()));
    waits(&gateway, known);
    guess_until_noticed(&gateway, "192.0.2.1");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut script = gateway.client();
            for guess in 0.. {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                script.send_head(&head("192.0.2.1", &format!("script-{guess}")));
                let status = script.answer().status;
                assert!(status == 401 || status == 429, "{status}");
            }
        });
        let (known, new) = (waits(&gateway, known), waits(&gateway, new));
        done.store(true, Ordering::Relaxed);
        println!(
            "| 25 callers with a token in the cache | {:?} | {:?} |\n| 25 callers with a new one | {:?} | {:?} |",
            known[12], known[24], new[12], new[24]
        );
        assert!(known[24] < Duration::from_secs(2), "{known:?}");
        // 25 turns and those of the script, ten a second.
        assert!(new[24] > Duration::from_secs(1) && new[24] < Duration::from_secs(6), "{new:?}");
    });
}

/// The time of a request that is in this place of a hundred.
fn percentile(times: &mut [Duration], percent: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() * percent / 100).min(times.len() - 1)]
}

/// Requests with a token in the cache on a connection, 200 a second, until this is over.
fn call(gateway: &Gateway, from: &str, token: &str, over: impl Fn() -> bool) -> Vec<Duration> {
    let (mut client, mut times) = (gateway.client(), Vec::new());
    while !over() {
        let begun = Instant::now();
        client.send_head(&head(from, token));
        assert_eq!(client.answer().status, 200);
        times.push(begun.elapsed());
        std::thread::sleep(Duration::from_millis(5));
    }
    times
}

#[test]
fn guesses_from_one_and_from_many_addresses() {
    const GUESSERS: u64 = 4;
    let (guesses, rate) = (number("TOLLGATE_GUESSES", 2_000), number("TOLLGATE_GUESSES_PER_SECOND", 2_000));
    println!("| guesses | addresses | p99 before | during | lookups | 429 | memory |\n|---|---|---|---|---|---|---|");
    for addresses in [1, 10_000] {
        let upstream = Upstream::start();
        let store = Store::with([(GOOD, "u"), (OTHER, "v")]);
        let settings = "[guessing]\nfailures = 100\nwait = \"0s\"\n[log]\naccess = \"off\"\n";
        let gateway = Gateway::start(upstream.address, &format!("{BEHIND_PROXY}{settings}{}", store.section()));
        let address = |number: u64| format!("10.0.{}.{}", number / 250, 1 + number % 250);
        let until = Instant::now() + Duration::from_secs(2);
        let mut before = call(&gateway, &address(0), GOOD, || Instant::now() > until);
        let (memory, lookups, over) = (gateway.memory(), looked_up(&gateway), AtomicBool::new(false));
        let (mut during, refused) = std::thread::scope(|scope| {
            let guesser = |lane: u64| {
                let (gateway, address) = (&gateway, &address);
                move || {
                    let (mut client, mut refused, begun) = (gateway.client(), 0_u64, Instant::now());
                    for number in (lane..guesses).step_by(GUESSERS as usize) {
                        // At an even rate: what is measured is not how few processors this machine has.
                        let due = Duration::from_secs_f64(number as f64 / rate as f64);
                        std::thread::sleep(due.saturating_sub(begun.elapsed()));
                        client.send_head(&head(&address(number % addresses), &format!("guess-{number}")));
                        refused += u64::from(client.answer().status == 429);
                    }
                    refused
                }
            };
            let guessers: Vec<_> = (0..GUESSERS).map(|lane| scope.spawn(guesser(lane))).collect();
            let caller = scope.spawn(|| call(&gateway, &address(0), GOOD, || over.load(Ordering::Relaxed)));
            let refused: u64 = guessers.into_iter().map(|guesser| guesser.join().unwrap()).sum();
            over.store(true, Ordering::Relaxed);
            (caller.join().unwrap(), refused)
        });
        let (grown, lookups) = (gateway.memory().saturating_sub(memory), looked_up(&gateway) - lookups);
        println!(
            "| {guesses} | {addresses} | {:?} | {:?} | {lookups} | {refused} | +{:.1} MiB |",
            percentile(&mut before, 99),
            percentile(&mut during, 99),
            grown as f64 / 1024.0 / 1024.0
        );
        assert!(grown <= 64 * 1024 * 1024, "{grown}");
        assert_eq!(lookups as u64 + refused, guesses);
        if addresses == 1 {
            assert!(refused > 0 || guesses < 1_000, "{lookups}");
        }
    }
}
