//! Clients that guess tokens, from outside: what they get, what it costs the token store, and that nobody who is behind the same
//! address has to suffer for it. Addresses are played by X-Forwarded-For through a trusted proxy.
//!
//! TOLLGATE_GUESSES (2,000) and TOLLGATE_GUESSES_PER_SECOND (2,000) make the measurement longer or faster.

use crate::harness::*;
use crate::servers::redis::{Options, Redis};
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

/// Whether the gateway has noticed that an address guesses. IPv6 addresses are listed by their network.
fn guesses(gateway: &Gateway, from: &str) -> bool {
    let network = |from: &str| from.rsplit_once("::").map_or(from.to_owned(), |(network, _)| format!("{network}::/64"));
    let list = listed(gateway);
    list["clients"].as_array().unwrap().iter().any(|client| client["client"] == network(from).as_str())
}

/// Sends different tokens, one after the other, until the gateway has noticed.
fn guess_until_noticed(gateway: &Gateway, from: &str) {
    let mut client = gateway.client();
    for guess in 0..100_000 {
        client.send_head(&head(from, &format!("guess-{guess}")));
        if client.answer().status == 429 || guesses(gateway, from) {
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

/// Clients that do not wait for their turn leave it to those who do, and are logged as gone.
#[test]
fn who_does_not_wait_takes_no_turn_from_those_who_do() {
    let upstream = Upstream::start();
    let guessing = "[guessing]\nfailures = 10\nper = \"1h\"\npause = \"1h\"\nlongest_pause = \"1h\"\nlookups = 2\nwait = \"20s\"\n";
    let gateway = Gateway::start(upstream.address, &format!("{BEHIND_PROXY}{guessing}"));
    let office = "192.0.2.1";
    guess_until_noticed(&gateway, office);
    // Thirty turns, which are fifteen seconds.
    let mut gone: Vec<Client> = (0..30)
        .map(|n| {
            let mut client = gateway.client();
            client.send_head(&head(office, &format!("impatient-{n}")));
            client
        })
        .collect();
    eventually("they wait", || listed(&gateway)["clients"][0]["turns"].as_u64().is_some_and(|turns| turns >= 30));
    gone.clear();
    eventually("they are logged as gone", || {
        gateway.access_log().iter().filter(|line| line["reason"] == "client_gone").count() >= 27
    });
    let (lookups, began) = (looked_up(&gateway), Instant::now());
    assert_eq!(ask(&gateway, office, OTHER).status, 200);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert!(looked_up(&gateway) - lookups < 5.0, "what nobody waits for is not looked up");
}

#[test]
fn the_command_line_lists_who_guesses_and_lifts_it() {
    let upstream = Upstream::start();
    let says = |gateway: &Gateway, arguments: &[&str]| {
        let admin = gateway.admin.to_string();
        let output = tollgate().arg("guessing").args(arguments).args(["--admin", &admin]).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    };
    let unwatched = Gateway::start(upstream.address, BEHIND_PROXY);
    assert!(says(&unwatched, &["list"]).1.contains("no [guessing] in the configuration"));

    let guessing = "[guessing]\nfailures = 10\nper = \"1h\"\npause = \"1h\"\nlongest_pause = \"1h\"\nwait = \"0s\"\n";
    let gateway = Gateway::start(upstream.address, &format!("{BEHIND_PROXY}{guessing}"));
    assert_eq!(says(&gateway, &["list"]), (0, "no address guesses tokens at the moment\n".into(), String::new()));
    guess_until_noticed(&gateway, "192.0.2.7");
    guess_until_noticed(&gateway, "2001:db8:1:2::5");
    eventually("both are listed", || listed(&gateway)["addresses"] == 2);
    let (code, text, _) = says(&gateway, &["list"]);
    assert!(code == 0 && text.contains("  192.0.2.7 ") && text.contains("  2001:db8:1:2::/64 "), "{text}");
    let list: serde_json::Value = serde_json::from_str(&says(&gateway, &["list", "--json"]).1).unwrap();
    assert_eq!((&list["addresses"], &list["watching"]), (&2.into(), &true.into()));

    // An address that is not there, as after a slip of the finger, is no success.
    let (code, out, error) = says(&gateway, &["lift", "192.0.2.8"]);
    assert!(code == 1 && out.is_empty() && error.contains("192.0.2.8 does not guess at the moment"), "{error}");
    for wrong in [&["lift"][..], &["lift", "office"], &["lift", "192.0.2.7", "--all"]] {
        assert_eq!(says(&gateway, wrong).0, 64, "{wrong:?}");
    }
    assert_eq!(listed(&gateway)["addresses"], 2);
    let lifted = says(&gateway, &["lift", "2001:db8:1:2::9"]);
    assert_eq!(lifted, (0, "2001:db8:1:2::9 may send failed tokens again\n".into(), String::new()));
    assert_eq!(listed(&gateway)["clients"][0]["client"], "192.0.2.7");
    assert_eq!(says(&gateway, &["lift", "--all"]).1, "1 address may send failed tokens again\n");
    assert_eq!(says(&gateway, &["lift", "--all"]).1, "no address guesses tokens at the moment\n");
    assert_eq!(ask(&gateway, "192.0.2.7", "one-more").status, 401);
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

/// So many requests on four connections at an even rate, so that what is measured is not how few processors this machine has, and
/// meanwhile those of a caller. Its times, and how many of the others got 429.
fn beside(
    gateway: &Gateway,
    count: u64,
    rate: u64,
    caller: &str,
    request: impl Fn(u64) -> String + Sync,
) -> (Vec<Duration>, u64) {
    const LANES: u64 = 4;
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let lane = |lane: u64| {
            let request = &request;
            move || {
                let (mut client, mut refused, begun) = (gateway.client(), 0_u64, Instant::now());
                for number in (lane..count).step_by(LANES as usize) {
                    let due = Duration::from_secs_f64(number as f64 / rate as f64);
                    std::thread::sleep(due.saturating_sub(begun.elapsed()));
                    client.send_head(&request(number));
                    refused += u64::from(client.answer().status == 429);
                }
                refused
            }
        };
        let lanes: Vec<_> = (0..LANES).map(|number| scope.spawn(lane(number))).collect();
        let called = scope.spawn(|| call(gateway, caller, GOOD, || over.load(Ordering::Relaxed)));
        let refused: Vec<_> = lanes.into_iter().map(|lane| lane.join()).collect();
        over.store(true, Ordering::Relaxed);
        (called.join().unwrap(), refused.into_iter().map(Result::unwrap).sum())
    })
}

/// In rounds of two seconds at most, in which the caller is alone, then beside valid requests, then beside guesses: what else this machine
/// does meanwhile slows all three. The last row counts in a Redis as well, and says what reached it.
#[test]
fn guesses_from_one_and_from_many_addresses() {
    let (guesses, rate) = (number("TOLLGATE_GUESSES", 2_000), number("TOLLGATE_GUESSES_PER_SECOND", 2_000));
    let rounds = guesses.div_ceil(2 * rate);
    println!(
        "| guesses | addresses | p99 alone | p99 beside as many valid requests | p99 beside guesses | lookups | 429 | \
         calls of Redis | memory |\n|---|---|---|---|---|---|---|---|---|"
    );
    for (addresses, is_shared) in [(1, false), (10_000, false), (10_000, true)] {
        let upstream = Upstream::start();
        let store = Store::with([(GOOD, "u"), (OTHER, "v")]);
        let redis = is_shared.then(|| Redis::start(&Options::default()));
        let shared = redis.as_ref().map_or_else(String::new, |redis| {
            format!("shared = true\n[shared_limits]\nstore = \"redis\"\nservers = [\"{}\"]\n", redis.address())
        });
        let settings =
            format!("[log]\naccess = \"off\"\n[guessing]\nfailures = 100\nwait = \"0s\"\n{shared}{}", store.section());
        let gateway = Gateway::start(upstream.address, &format!("{BEHIND_PROXY}{settings}"));
        let address = |number: u64| format!("10.0.{}.{}", number / 250, 1 + number % 250);
        for token in [GOOD, OTHER] {
            assert_eq!(ask(&gateway, &address(0), token).status, 200);
        }
        let (memory, lookups) = (gateway.memory(), looked_up(&gateway));
        let (mut alone, mut usual, mut during) = (Vec::new(), Vec::new(), Vec::new());
        let (mut refused, mut sent) = (0, 0);
        for round in 0..rounds {
            let count = (guesses - sent).min(2 * rate);
            let until = Instant::now() + Duration::from_secs_f64(count as f64 / rate as f64);
            alone.extend(call(&gateway, &address(0), GOOD, || Instant::now() > until));
            // What the same number of requests costs a caller without anybody guessing.
            let valid = |number: u64| head(&address((sent + number) % addresses), OTHER);
            let (times, none) = beside(&gateway, count, rate, &address(0), valid);
            assert_eq!(none, 0, "in round {round}");
            usual.extend(times);
            let guess = |number: u64| head(&address((sent + number) % addresses), &format!("guess-{}", sent + number));
            let (times, more) = beside(&gateway, count, rate, &address(0), guess);
            during.extend(times);
            (refused, sent) = (refused + more, sent + count);
        }
        let (grown, lookups) = (gateway.memory().saturating_sub(memory), looked_up(&gateway) - lookups);
        // As the store's script is called, by its sum or, once, by its text.
        let of = |line: &str| line.split(['=', ',']).nth(1)?.parse::<u64>().ok();
        let calls = redis.as_ref().map_or(0, |redis| {
            let stats = redis.cli(&["info", "commandstats"]);
            stats.lines().filter(|line| line.starts_with("cmdstat_eval")).filter_map(of).sum()
        });
        println!(
            "| {guesses} | {addresses}{} | {:?} | {:?} | {:?} | {lookups} | {refused} | {calls} | +{:.1} MiB |",
            if is_shared { ", shared" } else { "" },
            percentile(&mut alone, 99),
            percentile(&mut usual, 99),
            percentile(&mut during, 99),
            grown as f64 / 1024.0 / 1024.0
        );
        assert!(grown <= 64 * 1024 * 1024, "{grown}");
        // Those of the two valid tokens are among them, once in each of the minutes that this lasts.
        let again = lookups as u64 + refused - guesses;
        assert!(again <= rounds, "{lookups} {refused}");
        assert!(calls <= lookups as u64 && (calls > 0) == is_shared, "{calls}");
        if addresses == 1 {
            assert!(refused > 0 || guesses < 1_000, "{lookups}");
        }
    }
}
