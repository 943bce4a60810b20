//! Properties of the choice of servers, over generated pools: seeded, so that a failure can be repeated.

use super::tests::{REFUSED, metrics, settings};
use super::*;
use std::collections::{BTreeMap, BTreeSet};

pub(super) type Random = fastrand::Rng;

const SECOND: Duration = Duration::from_secs(1);

pub(super) fn build(settings: &UpstreamSettings, now: Instant) -> Arc<Upstream> {
    Upstream::build(settings, Vec::new(), None, &metrics(), now).0
}

/// Servers with these weights; 0 stands for a backup.
pub(super) fn weighted(weights: &[u32], balance: Balance) -> UpstreamSettings {
    let mut settings = UpstreamSettings { balance, ..settings(&[]) };
    let listed = |(index, weight): (usize, &u32)| ListedServer {
        address: ServerAddress::Tcp(format!("127.0.0.1:{}", index + 1)),
        weight: (*weight).max(1),
        backup: *weight == 0,
    };
    settings.servers = weights.iter().enumerate().map(listed).collect();
    settings
}

fn by_user() -> Balance {
    Balance::Hash(HashBy::User)
}

pub(super) fn balances() -> [Balance; 3] {
    [Balance::RoundRobin, Balance::LeastRequests, by_user()]
}

pub(super) fn keyed(pool: &Upstream, key: Option<u64>) -> Tries {
    let mut tries = Tries::default();
    if let Some(key) = key {
        tries.keyed(Some(pool.key_of(&key.to_le_bytes())));
    }
    tries
}

/// Its place in the configuration.
pub(super) fn place(server: &Server) -> usize {
    server.label().rsplit(':').next().unwrap().parse::<usize>().unwrap() - 1
}

/// A request that is with its server.
pub(super) fn begun(pool: &Upstream, key: Option<u64>, now: Instant) -> (usize, Tries) {
    let mut tries = keyed(pool, key);
    let pick = pool.pick(&mut tries, now).unwrap();
    (place(&pick.server), tries)
}

fn served(pool: &Upstream, key: Option<u64>, now: Instant) -> usize {
    let (place, mut tries) = begun(pool, key, now);
    pool.answered(&mut tries, 200, now);
    place
}

/// How many of so many requests each server gets, one after the other.
fn counts(pool: &Upstream, servers: usize, requests: u64, now: Instant) -> Vec<u64> {
    let mut counts = vec![0; servers];
    (0..requests).for_each(|key| counts[served(pool, Some(key), now)] += 1);
    counts
}

pub(super) fn go_down(pool: &Upstream, place: usize, now: Instant) {
    pool.members()[place].server.asks();
    assert!(pool.members()[place].server.failed(REFUSED, now, now).is_some());
    pool.noted(true, now);
}

fn come_back(pool: &Upstream, place: usize, now: Instant) {
    assert!(pool.seen(&pool.members()[place].server, Ok(()), now).is_some());
}

#[test]
fn one_after_the_other_requests_are_spread_by_weight() {
    let (now, mut random) = (Instant::now(), Random::with_seed(1));
    for _ in 0..100 {
        let weights: Vec<u32> = (0..random.usize(1..9)).map(|_| random.u32(1..20)).collect();
        let total = u64::from(weights.iter().sum::<u32>());
        let pool = build(&weighted(&weights, Balance::RoundRobin), now);
        let expected: Vec<u64> = weights.iter().map(|weight| u64::from(*weight) * 5).collect();
        assert_eq!(counts(&pool, weights.len(), total * 5, now), expected, "{weights:?}");
        let pool = build(&weighted(&weights, Balance::LeastRequests), now);
        for (got, weight) in counts(&pool, weights.len(), total * 500, now).into_iter().zip(&weights) {
            let expected = 500.0 * f64::from(*weight);
            assert!((got as f64 - expected).abs() < 6.0 * expected.sqrt(), "{weights:?}: {weight} got {got}");
        }
    }
}

/// Many requests at one time, which take as long as their server needs for them: each has 4 workers for each point of weight.
#[test]
fn many_at_one_time_are_spread_by_weight() {
    for balance in [Balance::RoundRobin, Balance::LeastRequests] {
        let (mut now, mut random) = (Instant::now(), Random::with_seed(2));
        let weights = [1, 2, 4];
        let pool = build(&weighted(&weights, balance.clone()), now);
        let (mut running, mut counts): (Vec<Vec<Tries>>, _) = ((0..3).map(|_| Vec::new()).collect(), [0; 3]);
        for _ in 0..2_000 {
            for _ in 0..7 {
                let (place, tries) = begun(&pool, None, now);
                counts[place] += 1;
                running[place].push(tries);
            }
            now += Duration::from_millis(1);
            for (place, running) in running.iter_mut().enumerate() {
                for _ in 0..(weights[place] as usize * random.usize(0..3)).min(running.len()) {
                    let mut tries = running.swap_remove(random.usize(0..running.len()));
                    pool.answered(&mut tries, 200, now);
                }
            }
        }
        for (count, weight) in counts.iter().zip(weights) {
            let share = f64::from(*count) / f64::from(weight) / 2_000.0;
            assert!((0.8..1.2).contains(&share), "{balance:?}: {counts:?}");
        }
    }
}

/// Of servers that take different times, the slow one gets less: that is what the choice by requests in flight is for.
#[test]
fn the_choice_by_requests_in_flight_avoids_a_slow_server() {
    let mut now = Instant::now();
    let share_of_the_slow_one = |balance| {
        let pool = build(&weighted(&[1, 1, 1], balance), now);
        let (mut running, mut counts): (Vec<(u32, usize, Tries)>, _) = (Vec::new(), [0; 3]);
        for step in 0..1_000 {
            for _ in 0..3 {
                let (place, tries) = begun(&pool, None, now);
                counts[place] += 1;
                running.push((step + if place == 0 { 20 } else { 2 }, place, tries));
            }
            now += Duration::from_millis(1);
            for (_, _, tries) in running.iter_mut().filter(|(end, ..)| *end <= step) {
                pool.answered(tries, 200, now);
            }
            running.retain(|(end, ..)| *end > step);
        }
        counts[0] as f64 / 3_000.0
    };
    let [in_turn, by_requests] = [Balance::RoundRobin, Balance::LeastRequests].map(share_of_the_slow_one);
    assert!(by_requests < 0.12 && in_turn > 2.0 * by_requests, "in turn {in_turn}, by requests {by_requests}");
}

/// Whatever is down, and however servers are chosen: each one is tried once, the last one too.
#[test]
fn no_server_is_tried_twice_and_none_is_passed_over_for_ever() {
    let (now, mut random) = (Instant::now(), Random::with_seed(3));
    for case in 0..300 {
        let weights: Vec<u32> = (0..random.usize(1..9)).map(|_| random.u32(0..5)).collect();
        let balance = balances()[random.usize(0..3)].clone();
        let pool = build(&weighted(&weights, balance.clone()), now);
        for place in 0..weights.len() {
            if random.bool() {
                served(&pool, Some(random.u64(..)), now);
            }
            if random.bool() {
                go_down(&pool, place, now);
            }
        }
        for _ in 0..4 {
            let mut tries = keyed(&pool, random.bool().then(|| random.u64(..)));
            let mut tried = Vec::new();
            while let Ok(pick) = pool.pick(&mut tries, now) {
                tried.push(place(&pick.server));
                if !pool.failed(&mut tries, REFUSED, false, now).again {
                    break;
                }
            }
            let distinct: BTreeSet<_> = tried.iter().collect();
            assert!(tried.len() == weights.len() && distinct.len() == tried.len(), "{case} {balance:?}: {tried:?}");
        }
        let left: u32 = pool.members().iter().map(|member| member.server.in_flight()).sum();
        assert_eq!(left, 0, "requests that have ended are in flight nowhere");
    }
}

#[test]
fn backups_serve_only_while_no_other_server_is_up() {
    let now = Instant::now();
    for balance in balances() {
        let pool = build(&weighted(&[1, 0, 2, 0], balance), now);
        let who = || counts(&pool, 4, 60, now).iter().map(|count| *count > 0).collect::<Vec<_>>();
        assert_eq!(who(), [true, false, true, false]);
        go_down(&pool, 0, now);
        assert_eq!(who(), [false, false, true, false]);
        go_down(&pool, 2, now);
        assert_eq!(who(), [false, true, false, true]);
        go_down(&pool, 1, now);
        go_down(&pool, 3, now);
        let (mut tries, mut tried) = (Tries::default(), BTreeSet::new());
        while let Ok(pick) = pool.pick(&mut tries, now) {
            tried.insert(place(&pick.server));
            pool.failed(&mut tries, REFUSED, false, now);
        }
        assert_eq!(tried.len(), 4, "if all are down, all are used");
        come_back(&pool, 2, now + SECOND);
        assert_eq!(who(), [false, false, true, false]);
    }
}

/// A request that was failed by all servers that are up gets to a backup before it gets to servers that are down.
#[test]
fn the_next_try_goes_to_a_backup_that_is_up() {
    let now = Instant::now();
    let pool = build(&weighted(&[1, 1, 0], Balance::RoundRobin), now);
    go_down(&pool, 0, now);
    let (first, mut tries) = begun(&pool, None, now);
    // One failure of this kind does not make it down.
    let closed = FailedTry::Exchange { kept: false, error: UpstreamError::Closed };
    assert!(first == 1 && pool.failed(&mut tries, closed, true, now).again);
    assert_eq!(place(&pool.pick(&mut tries, now).unwrap().server), 2);
}

#[test]
fn a_server_that_comes_back_is_given_more_and_more() {
    let start = Instant::now();
    for (weights, balance) in
        [([1, 1], Balance::RoundRobin), ([4, 2], Balance::RoundRobin), ([1, 1], Balance::LeastRequests)]
    {
        let whole = f64::from(weights[0]) / f64::from(weights[0] + weights[1]);
        let settings = UpstreamSettings { slow_start: Some(10 * SECOND), ..weighted(&weights, balance) };
        let pool = build(&settings, start);
        let share = |now| {
            // As the gateway does every 100 ms.
            pool.looks(now);
            counts(&pool, 2, 6_600, now)[0] as f64 / 6_600.0
        };
        assert!((share(start) - whole).abs() < 0.03, "a server of a pool that begins has its weight");
        go_down(&pool, 0, start);
        assert!(share(start) < 0.001);
        let back = start + SECOND;
        come_back(&pool, 0, back);
        let shares: Vec<f64> = (0..=10).map(|second| share(back + second * SECOND)).collect();
        let tenth = 0.1 * whole / (1.0 - whole + 0.1 * whole);
        assert!((shares[0] - tenth).abs() < 0.03, "{shares:?}");
        assert!(shares.windows(2).all(|pair| pair[0] < pair[1] + 0.02), "{shares:?}");
        assert!((shares[10] - whole).abs() < 0.03 && shares[5] < 0.9 * whole, "{shares:?}");
    }
}

#[test]
fn a_key_keeps_its_server_and_keys_are_spread_by_weight() {
    let (now, mut random) = (Instant::now(), Random::with_seed(4));
    for _ in 0..30 {
        let weights: Vec<u32> = (0..random.usize(2..12)).map(|_| random.u32(1..5)).collect();
        let pool = build(&weighted(&weights, by_user()), now);
        let owners: Vec<usize> = (0..4_000).map(|key| served(&pool, Some(key), now)).collect();
        assert!((0..4_000).all(|key| served(&pool, Some(key), now) == owners[key as usize]));
        let total = f64::from(weights.iter().sum::<u32>());
        for (place, weight) in weights.iter().enumerate() {
            let got = owners.iter().filter(|owner| **owner == place).count() as f64 / 4_000.0;
            let fair = f64::from(*weight) / total;
            assert!((0.6 * fair..1.5 * fair).contains(&got), "{weights:?}: {place} got {got} of {fair}");
        }
        // Another gateway, in which the servers were up and down in another order.
        let other = build(&weighted(&weights, by_user()), now);
        go_down(&other, 0, now);
        come_back(&other, 0, now + SECOND);
        assert!((0..4_000).all(|key| served(&other, Some(key), now + SECOND) == owners[key as usize]));
        let name = UpstreamSettings { name: "other".into(), ..weighted(&weights, by_user()) };
        let elsewhere = build(&name, now);
        let same = (0..4_000).filter(|key| served(&elsewhere, Some(*key), now) == owners[*key as usize]).count();
        assert!(same < 3_500, "another pool has another order: {same}");
    }
}

#[test]
fn only_the_keys_of_a_server_that_goes_move() {
    let (now, mut random) = (Instant::now(), Random::with_seed(5));
    for _ in 0..30 {
        let weights: Vec<u32> = (0..random.usize(2..12)).map(|_| random.u32(1..5)).collect();
        let pool = build(&weighted(&weights, by_user()), now);
        let before: Vec<usize> = (0..3_000).map(|key| served(&pool, Some(key), now)).collect();
        let gone = random.usize(0..weights.len());
        go_down(&pool, gone, now);
        let after: Vec<usize> = (0..3_000).map(|key| served(&pool, Some(key), now)).collect();
        for (was, is) in before.iter().zip(&after) {
            assert!(
                is != &gone && (was == is || was == &gone),
                "{weights:?}: moved from {was} to {is}, {gone} is down"
            );
        }
        // To all of the others, not to one neighbour.
        if weights.len() > 3 {
            let heirs: BTreeSet<_> =
                before.iter().zip(&after).filter(|(was, _)| **was == gone).map(|(_, is)| is).collect();
            assert_eq!(heirs.len(), weights.len() - 1, "{weights:?}");
        }
        // The same if it is removed by a reload: the others have nearly the points that they had.
        let mut fewer = weighted(&weights, by_user());
        fewer.servers.remove(gone);
        let fewer = build(&fewer, now);
        let moved = (0..3_000)
            .filter(|key| before[*key as usize] != gone && served(&fewer, Some(*key), now) != before[*key as usize]);
        let moved = moved.count();
        assert!(moved <= 3_000 * 12 / 100, "{weights:?}: {moved} keys of other servers moved");
    }
}

/// However few keys there are, no server has more than 1.25 times its part of the requests, rounded up.
#[test]
fn a_hot_key_does_not_drown_its_server() {
    let (now, mut random) = (Instant::now(), Random::with_seed(6));
    for _ in 0..50 {
        let weights: Vec<u32> = (0..random.usize(2..8)).map(|_| random.u32(1..4)).collect();
        let (keys, total) = (random.u64(1..4), f64::from(weights.iter().sum::<u32>()));
        let pool = build(&weighted(&weights, by_user()), now);
        let mut running: Vec<(usize, Tries)> = Vec::new();
        for _ in 0..400 {
            if !running.is_empty() && random.u8(..) < 100 {
                running.swap_remove(random.usize(0..running.len()));
            }
            let (place, mut tries) = begun(&pool, Some(random.u64(0..keys)), now);
            pool.answered(&mut tries, 200, now);
            running.push((place, tries));
            let load = running.iter().filter(|(other, _)| *other == place).count() as f64;
            let bound = (1.25 * running.len() as f64 * f64::from(weights[place]) / total).ceil();
            assert!(load <= bound, "{weights:?}: {place} has {load} of {}, bound {bound}", running.len());
        }
    }
}

#[test]
fn a_request_without_a_key_takes_turns() {
    let now = Instant::now();
    let pool = build(&weighted(&[1, 1, 1], by_user()), now);
    let turns: Vec<usize> = (0..6).map(|_| served(&pool, None, now)).collect();
    assert_eq!(turns, [0, 1, 2, 0, 1, 2]);
}

/// A pool whose servers take requests and break off: what is sent again is bounded, over a reload too, and counted.
#[test]
fn repeats_are_bounded_and_those_that_are_not_made_are_counted() {
    let (now, metrics) = (Instant::now(), metrics());
    let limits = RetryLimits { per_thousand: 200, floor: 1 };
    let settings = UpstreamSettings { retries: Some(limits), ..weighted(&[1, 1, 1, 1], Balance::RoundRobin) };
    let pool = Upstream::build(&settings, Vec::new(), None, &metrics, now).0;
    let ask = |pool: &Upstream, failure| {
        let mut tries = Tries::default();
        while pool.pick(&mut tries, now).is_ok() && pool.failed(&mut tries, failure, true, now).again {}
        tries.count() - 1
    };
    let closed = FailedTry::Exchange { kept: false, error: UpstreamError::Closed };
    let first: usize = (0..1_000).map(|_| ask(&pool, closed)).sum();
    // 10 saved, and a fifth of the requests, for which repeats count as well.
    assert!((200..=10 + 300).contains(&first), "{first}");
    let slower = UpstreamSettings { expand: true, ..settings };
    let reloaded = Upstream::build(&slower, Vec::new(), Some(&pool), &metrics, now).0;
    assert!(!Arc::ptr_eq(&pool, &reloaded));
    assert_eq!(ask(&reloaded, closed) + ask(&reloaded, closed), 0, "a reload gives nothing");
    assert_eq!(ask(&reloaded, REFUSED), 3, "a refused connection costs nothing");
    let text = metrics.render().unwrap();
    let refused =
        text.lines().find_map(|line| line.strip_prefix("tollgate_upstream_retries_refused_total{upstream=\"api\"} "));
    assert!(refused.unwrap().parse::<usize>().unwrap() >= 700, "{refused:?}");
}

/// It is no try: nothing is taken from the budget for it, and it is sent again when the budget is spent.
#[test]
fn a_kept_connection_that_was_dead_costs_no_budget() {
    let now = Instant::now();
    // Nothing is earned: there are the ten repeats of the start, and no more.
    let limits = RetryLimits { per_thousand: 0, floor: 0 };
    let pool = build(&UpstreamSettings { retries: Some(limits), ..weighted(&[1, 1], Balance::RoundRobin) }, now);
    let again = |failure| {
        let (_, mut tries) = begun(&pool, None, now);
        pool.failed(&mut tries, failure, true, now).again
    };
    let dead = FailedTry::Exchange { kept: true, error: UpstreamError::Closed };
    // Takes no server away, and costs.
    let late = FailedTry::Exchange { kept: false, error: UpstreamError::TryTimeout };
    assert!((0..30).all(|_| again(dead)));
    assert_eq!((0..30).filter(|_| again(late)).count(), 10);
    assert!((0..30).all(|_| again(dead) && !again(late)));
}

#[test]
fn a_slow_first_byte_takes_no_server_away() {
    let now = Instant::now();
    let pool = build(&weighted(&[1, 1], Balance::RoundRobin), now);
    (0..4).for_each(|_| assert!(served(&pool, None, now) < 2));
    let late = FailedTry::Exchange { kept: false, error: UpstreamError::TryTimeout };
    for _ in 0..20 {
        let (first, mut tries) = begun(&pool, None, now);
        assert!(pool.failed(&mut tries, late, true, now).again);
        assert_ne!(place(&pool.pick(&mut tries, now).unwrap().server), first);
        pool.answered(&mut tries, 200, now);
    }
    assert!(pool.members().iter().all(|member| member.server.is_up()));
}

#[test]
fn what_does_not_fit_together_is_said() {
    let problems = |settings: &UpstreamSettings| {
        settings.problems().into_iter().map(|problem| (problem.key, problem.what)).collect::<BTreeMap<_, _>>()
    };
    assert!(problems(&weighted(&[1, 100, 0], by_user())).is_empty());
    assert_eq!(problems(&weighted(&[0, 0], by_user()))["servers"], "has backups only");
    assert_eq!(problems(&weighted(&[1, 101], by_user()))["servers"], "has a weight out of range");
    let ramp = |time, balance| UpstreamSettings { slow_start: Some(time), ..weighted(&[1, 1], balance) };
    assert!(problems(&ramp(SECOND, Balance::LeastRequests)).is_empty());
    assert_eq!(problems(&ramp(SECOND / 2, Balance::RoundRobin))["slow_start"], "is too short");
    assert!(problems(&ramp(SECOND, by_user()))["slow_start"].contains("balance"));
    let per_try = |time| UpstreamSettings { per_try_timeout: Some(time), ..weighted(&[1], Balance::RoundRobin) };
    assert!(problems(&per_try(SECOND)).is_empty());
    assert!(problems(&per_try(60 * SECOND))["per_try_timeout"].contains("read_timeout"));
}

#[test]
fn a_drained_server_gets_nothing_whatever_else_is_wrong() {
    let now = Instant::now();
    for balance in balances() {
        let pool = build(&weighted(&[1, 1, 0], balance), now);
        let drain = |place: usize, drained| pool.drain(&format!("127.0.0.1:{}", place + 1), drained, now).unwrap().1;
        let who = || counts(&pool, 3, 60, now).iter().map(|count| *count > 0).collect::<Vec<_>>();
        assert!(drain(0, true) && !drain(0, true), "once is enough");
        assert_eq!(who(), [false, true, false]);
        for seconds in [10, 20] {
            assert!(pool.looks(now + seconds * SECOND).is_empty(), "it is well, and nobody has to look");
        }
        // A backup takes over for a drained server as for one that is down.
        go_down(&pool, 1, now);
        assert_eq!(who(), [false, false, true]);
        go_down(&pool, 2, now);
        let (mut tries, mut tried) = (Tries::default(), BTreeSet::new());
        while let Ok(pick) = pool.pick(&mut tries, now) {
            tried.insert(place(&pick.server));
            pool.failed(&mut tries, REFUSED, false, now);
        }
        assert_eq!(tried, BTreeSet::from([1, 2]));
        // What happens to it meanwhile does not end it.
        go_down(&pool, 0, now);
        come_back(&pool, 0, now + SECOND);
        assert!(!pool.members()[0].server.is_up() && pool.members()[0].server.state().down.is_none());
        assert!(drain(0, false));
        assert_eq!(who(), [true, false, false]);
    }
    assert!(build(&weighted(&[1], Balance::RoundRobin), now).drain("127.0.0.1:2", true, now).is_none());
}

/// After a drain a server ramps up as after an outage.
#[test]
fn a_drain_ends_with_a_slow_start() {
    let now = Instant::now();
    let settings = UpstreamSettings { slow_start: Some(10 * SECOND), ..weighted(&[1, 1], Balance::RoundRobin) };
    let pool = build(&settings, now);
    pool.drain("127.0.0.1:1", true, now);
    assert_eq!(counts(&pool, 2, 22, now), [0, 22]);
    pool.drain("127.0.0.1:1", false, now);
    assert_eq!(counts(&pool, 2, 22, now), [2, 20]);
}

#[test]
fn an_outage_is_told_once_until_requests_are_answered_again() {
    let now = Instant::now();
    let pool = build(&weighted(&[1], Balance::RoundRobin), now);
    assert_eq!(pool.request_failed(now), Some(1));
    assert_eq!(pool.request_failed(now), None);
}
