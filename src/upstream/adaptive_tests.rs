//! The adaptive limit before simulated servers, in virtual time and seeded; and what a pool counts and samples.

use super::adaptive::AdaptiveLimit;
use super::pool_tests::{Random, weighted};
use super::queue_tests::{Waiter, Woken};
use super::tests::{REFUSED, metrics, settings};
use super::*;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

const SECOND: u64 = 1_000_000;
/// A server of the simulation takes so many microseconds for a request.
const SERVICE: f64 = 20_000.0;
const BOUNDS: AdaptiveBounds = AdaptiveBounds { least: 2, most: 1_000 };

/// A server that works on some requests at once, in the order in which they came; further ones queue there.
struct Simulated {
    limit: AdaptiveLimit,
    start: Instant,
    random: Random,
    now: u64,
    /// When each of those that work is done with what it has.
    workers: Vec<u64>,
    service: f64,
    /// Times are as random as those of requests that come by chance, or all the same.
    varied: bool,
    /// A share of requests that take two seconds, in which they keep no worker.
    polls: f64,
    /// When requests end, and when they were sent.
    ends: BinaryHeap<Reverse<(u64, u64)>>,
    waiting: Vec<u64>,
    tally: Tally,
}

/// What was seen in a stretch of time.
#[derive(Debug, Default)]
struct Tally {
    served: u64,
    /// The limit, at each answer.
    limits: Vec<u32>,
    /// From the queue to the answer.
    times: Vec<u64>,
}

impl Tally {
    fn mean_limit(&self) -> f64 {
        self.limits.iter().map(|limit| f64::from(*limit)).sum::<f64>() / self.limits.len().max(1) as f64
    }

    fn least_limit(&self) -> u32 {
        self.limits.iter().copied().min().unwrap_or(0)
    }
}

impl Simulated {
    fn of(workers: usize, varied: bool, seed: u64) -> Self {
        fastrand::seed(seed);
        let start = Instant::now();
        Self {
            limit: AdaptiveLimit::new(start),
            start,
            random: Random::with_seed(seed),
            now: 0,
            workers: vec![0; workers],
            service: SERVICE,
            varied,
            polls: 0.0,
            ends: BinaryHeap::new(),
            waiting: Vec::new(),
            tally: Tally::default(),
        }
    }

    fn at(&self, micros: u64) -> Instant {
        self.start + Duration::from_micros(micros)
    }

    /// Requests that its workers can do in a second.
    fn capacity(&self) -> f64 {
        self.workers.len() as f64 * SECOND as f64 / self.service
    }

    fn chance(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.random.f64()).ln()
    }

    fn send(&mut self) {
        while !self.waiting.is_empty() && self.limit.takes(BOUNDS) {
            self.waiting.remove(0);
            let end = if self.random.f64() < self.polls {
                self.now + 2 * SECOND
            } else {
                let takes = if self.varied { self.chance(self.service) } else { self.service };
                let worker = self.workers.iter_mut().min().unwrap();
                *worker = self.now.max(*worker) + takes as u64;
                *worker
            };
            self.ends.push(Reverse((end, self.now)));
        }
    }

    /// Requests come by chance, so many a second, and wait in a queue for 100. What is seen in the last so many seconds.
    fn run(&mut self, rate: f64, seconds: u64, seen: u64) -> Tally {
        let until = self.now + seconds * SECOND;
        let mut arrival = self.now;
        self.tally = Tally::default();
        while self.now < until {
            let end = self.ends.peek().map_or(u64::MAX, |Reverse((end, _))| *end);
            if end < arrival {
                self.ends.pop().into_iter().for_each(|Reverse((end, asked))| {
                    self.now = end;
                    self.limit.sampled(BOUNDS, self.at(asked), self.at(end));
                    self.limit.leaves();
                    if end >= until - seen * SECOND {
                        self.tally.served += 1;
                        self.tally.limits.push(self.limit.reading(BOUNDS).limit);
                        self.tally.times.push(end - asked);
                    }
                });
            } else {
                self.now = arrival;
                if self.waiting.len() < 100 {
                    self.waiting.push(arrival);
                }
                arrival += self.chance(SECOND as f64 / rate).max(1.0) as u64;
            }
            self.send();
        }
        std::mem::take(&mut self.tally)
    }

    /// The same, with so much more than it can do.
    fn overload(&mut self, times: f64, seconds: u64, seen: u64) -> Tally {
        self.run(self.capacity() * times, seconds, seen)
    }
}

#[test]
fn it_finds_what_a_server_can_do_within_a_factor_of_two() {
    for varied in [false, true] {
        for (seed, workers) in [(1, 4), (2, 8), (3, 32), (4, 100)] {
            for offered in [1.5, 3.0] {
                let mut server = Simulated::of(workers, varied, seed);
                let tally = server.overload(offered, 90, 45);
                let (limit, goodput) = (tally.mean_limit(), tally.served as f64 / 45.0 / server.capacity());
                let knee = workers as f64;
                assert!((knee / 2.0..=knee * 2.0).contains(&limit), "{workers} {varied} {offered}: {limit}");
                assert!(goodput > 0.9, "{workers} {varied} {offered}: {goodput}");
            }
        }
    }
}

#[test]
fn it_follows_a_server_that_can_do_half_and_then_all_again() {
    for (seed, varied) in [(1, false), (2, true), (3, true)] {
        let mut server = Simulated::of(32, varied, seed);
        let all = server.overload(2.0, 60, 20).mean_limit();
        server.workers.truncate(16);
        let half = server.overload(4.0, 40, 20);
        assert!(half.mean_limit() < 0.75 * all && half.mean_limit() <= 32.0, "{} of {all}", half.mean_limit());
        server.workers.resize(32, server.now);
        let again = server.overload(2.0, 40, 20);
        assert!(again.mean_limit() > 0.75 * all, "{} of {all}", again.mean_limit());
        assert!(again.served as f64 > 0.9 * 20.0 * server.capacity(), "{again:?}");
    }
}

/// What is slow by itself, not for the load, costs no throughput for long: a probe sees that it is so.
#[test]
fn it_learns_that_a_server_has_become_slower_or_quicker() {
    for (seed, workers) in [(1, 8), (2, 100)] {
        let mut server = Simulated::of(workers, true, seed);
        server.overload(2.0, 60, 1);
        for service in [4.0 * SERVICE, SERVICE] {
            server.service = service;
            let tally = server.overload(2.0, 60, 30);
            let goodput = tally.served as f64 / 30.0 / server.capacity();
            assert!(goodput > 0.85, "{workers} workers of {service}: {goodput}");
            assert!(tally.mean_limit() <= 2.2 * workers as f64, "{workers} of {service}: {}", tally.mean_limit());
        }
    }
}

#[test]
fn one_request_that_hangs_changes_nothing() {
    let mut server = Simulated::of(8, true, 7);
    let before = server.overload(2.0, 30, 10);
    // It was sent at the beginning, and ends now.
    assert!(server.limit.takes(BOUNDS) || !server.waiting.is_empty());
    server.limit.sampled(BOUNDS, server.at(0), server.at(server.now));
    let after = server.overload(2.0, 10, 10);
    assert!(after.mean_limit() > 0.8 * before.mean_limit(), "{} {}", after.mean_limit(), before.mean_limit());
    assert!(after.least_limit() > BOUNDS.least, "{}", after.least_limit());
}

/// A tenth of the requests are long polls: they need places, and say nothing about the load.
#[test]
fn long_polls_among_others_do_not_press_the_limit() {
    let mut server = Simulated::of(8, true, 8);
    server.polls = 0.1;
    let tally = server.overload(1.0, 180, 30);
    // 40 a second of two seconds each, besides the 8.
    assert!(tally.mean_limit() > 70.0, "{}", tally.mean_limit());
    assert!(tally.served as f64 > 0.8 * 30.0 * server.capacity(), "{}", tally.served);
}

#[test]
fn it_does_not_grow_while_nobody_needs_more() {
    let mut server = Simulated::of(100, false, 9);
    let first = server.limit.limit(BOUNDS);
    let tally = server.overload(0.05, 60, 60);
    assert!(tally.limits.iter().all(|limit| *limit == first), "{:?}", tally.limits.iter().max());
    // As soon as somebody does, it grows.
    let tally = server.overload(0.5, 60, 30);
    assert!(tally.served as f64 > 0.95 * 30.0 * 0.5 * server.capacity(), "{}", tally.served);
}

#[test]
fn failures_bring_it_down_step_by_step_and_answers_up_again() {
    let start = Instant::now();
    let limit = AdaptiveLimit::new(start);
    let before = limit.limit(BOUNDS);
    // Many that were sent at one time count once.
    (0..100).for_each(|_| limit.failed(BOUNDS, start, start + Duration::from_millis(10)));
    assert_eq!(limit.limit(BOUNDS), before * 9 / 10);
    for second in 1..100 {
        let now = start + Duration::from_secs(second);
        limit.failed(BOUNDS, now, now);
        assert!(limit.limit(BOUNDS) >= BOUNDS.least);
    }
    assert_eq!(limit.limit(BOUNDS), BOUNDS.least);
    let mut server = Simulated::of(8, true, 10);
    server.limit = limit;
    server.now = 200 * SECOND;
    server.start = start;
    let tally = server.overload(2.0, 60, 30);
    assert!(tally.served as f64 > 0.9 * 30.0 * server.capacity(), "{}", tally.served);
}

/// Clients that do not wait for what takes too long leave no answers to be sampled.
#[test]
fn requests_that_are_given_up_late_count() {
    let start = Instant::now();
    let at = |micros: u64| start + Duration::from_micros(micros);
    let limit = AdaptiveLimit::new(start);
    let took = |time: u64, until: u64, give_up: bool| {
        for nth in 0..400_u64 {
            while limit.takes(BOUNDS) {}
            let asked = until + nth * 5_000;
            match give_up {
                true => limit.given_up(BOUNDS, at(asked), at(asked + time)),
                false => limit.sampled(BOUNDS, at(asked), at(asked + time)),
            }
        }
        let _ = (0..limit.limit(BOUNDS)).map(|_| limit.leaves()).count();
    };
    took(20_000, 0, false);
    let before = limit.reading(BOUNDS);
    took(10_000, 10 * SECOND, true);
    assert_eq!(limit.reading(BOUNDS).samples, before.samples, "who gives up soon says nothing");
    took(500_000, 20 * SECOND, true);
    let after = limit.reading(BOUNDS);
    assert!(after.samples > before.samples && after.limit < before.limit, "{before:?} {after:?}");
}

#[test]
fn a_server_that_comes_back_begins_with_few() {
    let mut server = Simulated::of(100, true, 11);
    assert!(server.overload(2.0, 60, 10).mean_limit() > 90.0);
    server.limit.begins_anew(server.at(server.now));
    assert_eq!(server.limit.limit(BOUNDS), 20);
    assert!(server.overload(2.0, 60, 10).mean_limit() > 90.0);
}

/// Whatever comes, it stays within its bounds, which a reload may change, and no more wait than it says.
#[test]
fn it_stays_within_its_bounds() {
    let mut random = Random::with_seed(12);
    for case in 0..200 {
        let start = Instant::now();
        let limit = AdaptiveLimit::new(start);
        let (mut awaited, mut micros) = (0_u32, 0_u64);
        let least = random.u32(1..50);
        let mut bounds = AdaptiveBounds { least, most: least + random.u32(0..100) };
        for step in 0..3_000 {
            let (step_bits, age_bits) = (random.u32(1..21), random.u32(1..25));
            micros += random.u64(0..1 << step_bits);
            let now = start + Duration::from_micros(micros);
            let asked = start + Duration::from_micros(micros.saturating_sub(random.u64(0..1 << age_bits)));
            match random.u8(0..100) {
                0..50 => {
                    let took = limit.takes(bounds);
                    assert_eq!(took, awaited < limit.limit(bounds), "case {case}, step {step}");
                    awaited += u32::from(took);
                }
                50..96 if awaited > 0 => {
                    match random.u8(0..4) {
                        0 => limit.given_up(bounds, asked, now),
                        _ => limit.sampled(bounds, asked, now),
                    }
                    limit.leaves();
                    awaited -= 1;
                }
                96 | 97 => limit.failed(bounds, asked, now),
                98 => limit.begins_anew(now),
                99 if random.u8(0..10) == 0 => bounds.most = bounds.least + random.u32(0..100),
                _ => {}
            }
            let (in_force, reading) = (limit.limit(bounds), limit.reading(bounds).limit);
            let within = |limit: u32| (bounds.least..=bounds.most).contains(&limit);
            assert!(within(in_force) && within(reading), "case {case}, step {step}: {in_force} {reading} {bounds:?}");
        }
    }
}

/// Threads that sample at one time end each window once, and lose no place.
#[test]
fn threads_share_it() {
    let start = Instant::now();
    let limit = AdaptiveLimit::new(start);
    std::thread::scope(|scope| {
        for thread in 0..8_u64 {
            let limit = &limit;
            scope.spawn(move || {
                for nth in 0..20_000_u64 {
                    let now = start + Duration::from_micros(20_000 + nth * 100 + thread);
                    if limit.takes(BOUNDS) {
                        limit.sampled(BOUNDS, now - Duration::from_millis(20), now);
                        limit.leaves();
                    }
                }
            });
        }
    });
    let reading = limit.reading(BOUNDS);
    assert!(reading.samples > 100_000, "{reading:?}");
    let unloaded = reading.unloaded.unwrap().as_secs_f64();
    assert!((0.018..0.022).contains(&unloaded), "{reading:?}");
    assert!((0..reading.limit).all(|_| limit.takes(BOUNDS)) && !limit.takes(BOUNDS));
}

// In a pool.

fn adaptive(least: u32, most: u32) -> UpstreamSettings {
    let max_requests = Some(MaxRequests::Adaptive(AdaptiveBounds { least, most }));
    UpstreamSettings { max_requests, queue: 10, ..settings(&["127.0.0.1:1"]) }
}

fn built(settings: &UpstreamSettings, running: Option<&Arc<Upstream>>, now: Instant) -> Arc<Upstream> {
    Upstream::build(settings, Vec::new(), running, &metrics(), now).0
}

fn reading(pool: &Upstream) -> AdaptiveReading {
    pool.limit_of(&pool.members()[0].server).1.unwrap()
}

#[test]
fn requests_count_to_their_heads_and_only_good_answers_are_samples() {
    let now = Instant::now();
    let pool = built(&adaptive(1, 1), None, now);
    let begin = || {
        let mut tries = Tries::default();
        pool.pick(&mut tries, now).map(|_| tries)
    };
    let mut kept = Vec::new();
    for (status, samples, is_over) in [
        (100, 0, false),
        (103, 0, false),
        (200, 1, true),
        (304, 1, true),
        (101, 0, true),
        (404, 0, true),
        (503, 0, true),
    ] {
        let before = reading(&pool).samples;
        let mut tries = begin().unwrap();
        assert!(begin().is_err(), "there is room for one");
        pool.answered(&mut tries, status, now);
        assert_eq!(reading(&pool).samples - before, samples, "{status}");
        let next = begin();
        assert_eq!(next.is_ok(), is_over, "{status}");
        drop(next);
        // A later head ends what an interim one did not; nothing is counted twice.
        pool.answered(&mut tries, 200, now);
        assert_eq!(reading(&pool).samples - before, samples, "{status}");
        assert!(begin().is_ok() && begin().is_ok(), "{status}");
        // Streams and tunnels stay for ever and keep no place.
        kept.push(tries);
    }
    assert_eq!(pool.members()[0].server.in_flight(), 7);
    // A body that the client is still sending makes any time.
    let before = reading(&pool).samples;
    let mut tries = begin().unwrap();
    tries.streams_body();
    pool.answered(&mut tries, 200, now);
    assert_eq!(reading(&pool).samples, before);
    drop(tries);
    // Each way to end gives the place back.
    drop(begin().unwrap());
    begin().unwrap().given_up(now);
    let mut failed = begin().unwrap();
    pool.failed(&mut failed, REFUSED, true, now);
    assert!(begin().is_ok());
    let mut dead = begin().unwrap();
    let kept_one = FailedTry::Exchange { kept: true, error: UpstreamError::Closed };
    assert!(pool.failed(&mut dead, kept_one, true, now).again);
    assert!(begin().is_err(), "it is sent to the same server once more");
    pool.pick(&mut dead, now).unwrap();
    assert!(begin().is_err(), "and counts once");
    pool.answered(&mut dead, 200, now);
    assert!(begin().is_ok());
    drop((kept, failed, dead));
    assert_eq!(pool.members()[0].server.in_flight(), 0);
}

#[test]
fn a_reload_keeps_what_was_learned() {
    let start = Instant::now();
    let pool = built(&adaptive(1, 100), None, start);
    for second in 1..10 {
        let now = start + Duration::from_secs(second);
        let mut tries = Tries::default();
        pool.pick(&mut tries, now).unwrap();
        pool.failed(&mut tries, FailedTry::Connect(UpstreamError::ConnectTimeout), false, now);
    }
    let learned = reading(&pool).limit;
    assert!(learned < 20, "{learned}");
    let other = UpstreamSettings { queue: 20, ..adaptive(1, 100) };
    let next = built(&other, Some(&pool), start + Duration::from_secs(10));
    assert!(!Arc::ptr_eq(&pool, &next));
    assert_eq!(reading(&next).limit, learned);
    let bounded = built(&adaptive(1, 3), Some(&next), start + Duration::from_secs(10));
    assert_eq!(reading(&bounded).limit, 3);
    // Requests that began under one kind of bound end under another.
    let (mut tries, now) = (Tries::default(), start + Duration::from_secs(11));
    bounded.pick(&mut tries, now).unwrap();
    let fixed = built(&UpstreamSettings { max_requests: Some(MaxRequests::Fixed(1)), ..other }, Some(&bounded), now);
    let mut late = Tries::default();
    assert!(matches!(fixed.pick(&mut late, now), Err(NoServer::Busy)));
    bounded.answered(&mut tries, 200, now);
    drop(tries);
    fixed.pick(&mut late, now).unwrap();
    assert_eq!(fixed.limit_of(&fixed.members()[0].server).0, Some(1));
}

/// Who waits is woken when the limit lets more through.
#[test]
fn a_waiter_gets_the_place_of_a_head() {
    struct Noted(AtomicUsize);
    impl std::task::Wake for Noted {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let now = Instant::now();
    let max_requests = Some(MaxRequests::Adaptive(AdaptiveBounds { least: 1, most: 1 }));
    let pool = built(&UpstreamSettings { max_requests, queue: 10, ..weighted(&[1], Balance::RoundRobin) }, None, now);
    let (mut first, mut second) = (Tries::default(), Tries::default());
    pool.pick(&mut first, now).unwrap();
    assert!(matches!(pool.pick(&mut second, now), Err(NoServer::Busy)));
    let noted = Arc::new(Noted(0.into()));
    let waker = Waker::from(Arc::clone(&noted));
    assert!(pool.poll_pick(&mut second, &waker, now).is_pending());
    pool.answered(&mut first, 200, now);
    assert!(noted.0.load(Ordering::SeqCst) > 0, "nobody was woken");
    assert!(matches!(pool.poll_pick(&mut second, &waker, now), Poll::Ready(Ok(_))));
}

/// What became of the requests of those who ask little: how many were served, how many refused, and in milliseconds the time
/// of 99 in 100, from when they came.
#[derive(Debug, Default)]
struct Crowd {
    served: usize,
    refused: usize,
    p99: u64,
}

/// Twenty seconds at a server that works on 8 requests of 20 to 60 ms at once, the last ten of which count: 20 callers with 4
/// requests a second, and one with so many more.
fn crowd(max_requests: MaxRequests, busy_each_second: u64) -> Crowd {
    fastrand::seed(5);
    let (start, mut random) = (Instant::now(), Random::with_seed(5));
    let settings =
        UpstreamSettings { max_requests: Some(max_requests), queue: 40, ..weighted(&[1], Balance::RoundRobin) };
    let pool = built(&settings, None, start);
    let mut workers = [0_u64; 8];
    let (mut running, mut waiting) = (Vec::<(u64, u64, u32, Tries)>::new(), Vec::<(u64, Waiter)>::new());
    let (mut crowd, mut times) = (Crowd::default(), Vec::new());
    let spread = |caller: u32| u64::from(caller + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for tick in 0..20_000_u64 {
        let now = start + Duration::from_millis(tick);
        let mut sent = |came: u64, caller: u32, tries: Tries| {
            let worker = workers.iter_mut().min().unwrap();
            *worker = tick.max(*worker) + random.u64(20..=60);
            (*worker, came, caller, tries)
        };
        let (ended, left) = running.into_iter().partition(|(ends, ..)| *ends <= tick);
        running = left;
        for (ends, came, caller, mut tries) in ended {
            pool.answered(&mut tries, 200, now);
            if caller > 0 && came >= 10_000 {
                crowd.served += 1;
                times.push(ends - came);
            }
        }
        let busy = busy_each_second * (tick + 1) / 1_000 - busy_each_second * tick / 1_000;
        let others = (1..=20).filter(|caller| (tick + u64::from(*caller) * 12).is_multiple_of(250));
        for caller in std::iter::repeat_n(0, busy as usize).chain(others) {
            let mut tries = Tries::default();
            tries.called_by(spread(caller), 1);
            match pool.pick(&mut tries, now) {
                Ok(_) => running.push(sent(tick, caller, tries)),
                Err(NoServer::Busy) => {
                    waiting.push((tick, Waiter { number: caller, tries, woken: Arc::new(Woken(true.into())) }));
                }
                Err(why) => panic!("{why:?}"),
            }
        }
        while let Some(index) = waiting.iter().position(|(_, waiter)| waiter.woken.0.swap(false, Ordering::SeqCst)) {
            let (_, waiter) = &mut waiting[index];
            let waker = Waker::from(Arc::clone(&waiter.woken));
            match pool.poll_pick(&mut waiter.tries, &waker, now) {
                Poll::Pending => {}
                Poll::Ready(Ok(_)) => {
                    let (came, waiter) = waiting.remove(index);
                    running.push(sent(came, waiter.number, waiter.tries));
                }
                Poll::Ready(Err(why)) => {
                    assert_eq!(why, NoServer::QueueFull);
                    let (came, waiter) = waiting.remove(index);
                    crowd.refused += usize::from(waiter.number > 0 && came >= 10_000);
                }
            }
        }
    }
    times.sort_unstable();
    crowd.p99 = times[times.len() * 99 / 100];
    crowd
}

#[test]
fn one_caller_who_asks_fifty_times_as_much_costs_the_others_next_to_nothing_before_an_adaptive_limit() {
    let adaptive = MaxRequests::Adaptive(BOUNDS);
    let alone = crowd(adaptive, 0);
    // 80 requests a second, where 200 fit, and 200 and 1,000 more.
    for busy_each_second in [200, 1_000] {
        let beside = crowd(adaptive, busy_each_second);
        assert!(2 * beside.p99 <= 3 * alone.p99 && beside.refused == 0 && beside.served >= 790, "{alone:?} {beside:?}");
    }
    // With a limit that is too high, the server's own queue is everybody's.
    let beside = crowd(MaxRequests::Fixed(60), 1_000);
    assert!(beside.p99 > 3 * alone.p99, "{beside:?}");
}

/// Nobody has asked for as much as it lets through, so that it is not what holds anybody back.
#[test]
fn a_limit_that_nobody_has_met_is_not_pinned() {
    assert!(!AdaptiveLimit::new(Instant::now()).reading(BOUNDS).is_pinned);
}
