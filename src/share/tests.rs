//! Tests of leases: several replicas on one store in memory, with clocks that the test sets. Never more gets through than one
//! bucket would let through, whatever happens to messages; and what is missing lies unused in leases.

use super::engine::{LeaseEngine, LeaseKey, LeaseLack, LeaseOutcome, LeaseTake, LeaseWait};
use super::model::{ModelStore, Weather};
use super::{RefusedBy, SharedAmounts, SharedQuota, SharedRate, WhenGone};
use crate::clock::Now;
use crate::telemetry::metrics::Metrics;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Some day at noon.
const NOON_MS: u64 = 20_000 * 86_400_000 + 43_200_000;

struct Fleet {
    store: Arc<ModelStore>,
    now_ms: Arc<AtomicU64>,
    engines: Vec<Arc<LeaseEngine>>,
}

fn amounts(requests: u64, period_ms: u64, burst: u64) -> SharedAmounts {
    SharedAmounts { rate: Some(SharedRate { requests, period_ms, burst }), quota: None }
}

fn quota(requests: u64) -> SharedAmounts {
    SharedAmounts { rate: None, quota: Some(SharedQuota { requests, monthly: false }) }
}

fn key(hash: u64, amounts: SharedAmounts) -> LeaseKey {
    LeaseKey { limit: "l".into(), hash, amounts }
}

impl Fleet {
    /// The replicas' clocks have nothing to do with each other: their machines were started at other times, and one of them
    /// has the time of day wrong by an hour.
    async fn new(replicas: u64, when_gone: WhenGone) -> Self {
        let (store, now_ms) = (Arc::new(ModelStore::default()), Arc::new(AtomicU64::new(0)));
        let metrics = Metrics::new("").unwrap();
        let engine = |place: u64| {
            let now_ms = Arc::clone(&now_ms);
            let clock = move || {
                let now = now_ms.load(Ordering::Relaxed);
                let wrong = if place == 1 { 3_600_000 } else { 0 };
                Now { mono_ms: 1_000_000 * (place + 1) + now, unix_ms: NOON_MS + wrong + now }
            };
            let store = Arc::clone(&store) as Arc<dyn super::ShareStore>;
            LeaseEngine::new(store, Duration::from_secs(3_600), when_gone, metrics.share("model"), clock)
        };
        let engines: Vec<_> = (0..replicas).map(engine).collect();
        let fleet = Self { store, now_ms, engines };
        fleet.pass(0);
        // So that each knows the number of all.
        for _ in 0..2 {
            for engine in &fleet.engines {
                engine.beat().await;
            }
        }
        fleet
    }

    fn pass(&self, ms: u64) {
        let now = self.now_ms.fetch_add(ms, Ordering::Relaxed) + ms;
        self.store.now_us.store((NOON_MS + now) * 1_000, Ordering::Relaxed);
    }

    fn now(&self) -> u64 {
        self.now_ms.load(Ordering::Relaxed)
    }

    /// One request, with its wait for the store.
    async fn asks(&self, place: usize, key: &LeaseKey, cost: u64) -> LeaseOutcome {
        let engine = &self.engines[place];
        match engine.take(key, cost, engine.now()) {
            LeaseTake::Taken(_) => LeaseOutcome::Paid,
            LeaseTake::Refused(refusal) => LeaseOutcome::Refused(refusal),
            LeaseTake::Lacks => {
                let wait = engine.enqueue(LeaseLack { key: key.clone(), cost });
                engine.turn().await;
                wait.outcome().await
            }
        }
    }

    async fn passes(&self, place: usize, key: &LeaseKey) -> bool {
        self.asks(place, key, 1).await == LeaseOutcome::Paid
    }

    async fn turn_all(&self) {
        for engine in &self.engines {
            engine.turn().await;
        }
    }

    /// Those for which the store was gone try it again.
    async fn turn_back(&self) {
        for engine in self.engines.iter().filter(|engine| engine.is_gone()) {
            engine.beat().await;
        }
    }

    fn held(&self) -> u64 {
        self.store.keys.lock().values().map(|bucket| bucket.held()).sum()
    }
}

/// What one bucket would let through.
struct Ideal {
    debt: u64,
    at: u64,
    /// What flows in while a message is on its way.
    late_ms: u64,
    passed: u64,
    rate: SharedRate,
}

impl Ideal {
    fn new(rate: SharedRate, late_ms: u64) -> Self {
        Self { debt: 0, at: 0, late_ms, passed: 0, rate }
    }

    fn passes(&mut self, cost: u64, now: u64, what: &str) {
        let SharedRate { requests, period_ms, burst } = self.rate;
        self.debt = self.debt.saturating_sub((now - self.at) * requests) + cost * period_ms;
        self.at = now;
        self.passed += cost;
        let most = burst * period_ms + self.late_ms * requests;
        assert!(self.debt <= most, "{what}: more than is due at {now}: {} of {most}", self.debt);
    }
}

/// Messages on their way, and requests that wait.
struct Traffic<'f> {
    fleet: &'f Fleet,
    messages: Vec<BoxFuture<'f, ()>>,
    waits: Vec<(u64, BoxFuture<'f, LeaseOutcome>)>,
}

impl<'f> Traffic<'f> {
    fn new(fleet: &'f Fleet) -> Self {
        Self { fleet, messages: Vec::new(), waits: Vec::new() }
    }

    fn request(&mut self, place: usize, key: &LeaseKey, cost: u64, ideal: &mut Ideal, what: &str) {
        let engine = &self.fleet.engines[place];
        match engine.take(key, cost, engine.now()) {
            LeaseTake::Taken(_) => ideal.passes(cost, self.fleet.now(), what),
            LeaseTake::Refused(_) => {}
            LeaseTake::Lacks => {
                let wait = engine.enqueue(LeaseLack { key: key.clone(), cost });
                self.waits.push((cost, Box::pin(LeaseWait::outcome(wait))));
            }
        }
    }

    /// Everything gets on by a step.
    async fn step(&mut self, ideal: &mut Ideal, what: &str) {
        // Else the runtime finds that this task has done enough, and nothing gets on.
        tokio::task::yield_now().await;
        for engine in &self.fleet.engines {
            if self.fleet.now() % 16 < 3 {
                engine.sweep();
            }
            while let Some(batch) = engine.next_batch() {
                self.messages.push(Box::pin(engine.send(batch)));
            }
        }
        self.messages.retain_mut(|message| message.now_or_never().is_none());
        let now = self.fleet.now();
        self.waits.retain_mut(|(cost, wait)| match wait.now_or_never() {
            Some(LeaseOutcome::Paid) => {
                ideal.passes(*cost, now, what);
                false
            }
            Some(LeaseOutcome::Refused(_)) => false,
            None => true,
        });
    }
}

#[tokio::test]
async fn never_more_than_is_due_gets_through_whatever_happens_to_messages() {
    let mut lost = 0;
    for (replicas, delay, weather) in [
        (1, 0, Weather::Fine),
        (3, 0, Weather::Fine),
        (10, 0, Weather::Fine),
        (3, 3, Weather::Fine),
        (10, 3, Weather::Fine),
        (3, 2, Weather::Lost),
        (3, 2, Weather::Unanswered),
    ] {
        for seed in 0..3 {
            let what = format!("{replicas} replicas, {delay}, {weather:?}, {seed}");
            let fleet = Fleet::new(replicas, WhenGone::Closed).await;
            fleet.store.delay.store(delay, Ordering::Relaxed);
            let rate = SharedRate { requests: 500, period_ms: 1_000, burst: 400 };
            let key = key(7, SharedAmounts { rate: Some(rate), quota: None });
            let mut random = fastrand::Rng::with_seed(seed);
            // A message waits for up to so many steps in each direction, and a step is up to 3 ms.
            let mut ideal = Ideal::new(rate, 2 * delay * 3 + if delay > 0 { 3 } else { 0 });
            let mut traffic = Traffic::new(&fleet);
            for step in 0..2_000 {
                fleet.pass(random.u64(0..=3));
                // Sometimes a lot, sometimes nothing: so that leases grow, lie idle, are given back and run out.
                let busy = (step / 300 + seed as usize) % 3;
                for _ in 0..[0, 1, 6][busy] {
                    let cost = if random.u8(..) < 40 { 3 } else { 1 };
                    traffic.request(random.usize(0..replicas as usize), &key, cost, &mut ideal, &what);
                }
                if weather != Weather::Fine {
                    let bad = random.u8(..) < 10;
                    *fleet.store.weather.lock() = if bad { weather } else { Weather::Fine };
                    if bad {
                        lost += 1;
                    } else if random.u8(..) < 30 {
                        fleet.turn_back().await;
                    }
                }
                traffic.step(&mut ideal, &what).await;
            }
            assert!(ideal.passed > 600, "{what}: {}", ideal.passed);
        }
    }
    assert!(lost > 50, "{lost}");
}

#[tokio::test]
async fn what_is_missing_lies_unused_in_leases() {
    for replicas in [1, 3, 10] {
        let fleet = Fleet::new(replicas, WhenGone::Closed).await;
        let rate = SharedRate { requests: 500, period_ms: 1_000, burst: 400 };
        let key = key(7, SharedAmounts { rate: Some(rate), quota: None });
        let (mut ideal, mut traffic) = (Ideal::new(rate, 0), Traffic::new(&fleet));
        const END: u64 = 4_000;
        for now in 0..=END {
            for place in 0..replicas as usize {
                for _ in 0..8 {
                    traffic.request(place, &key, 1, &mut ideal, "busy");
                }
            }
            traffic.step(&mut ideal, "busy").await;
            if now < END {
                fleet.pass(1);
            }
        }
        let (passed, due) = (ideal.passed, rate.burst + END * rate.requests / rate.period_ms);
        let missing = due - passed;
        // And what has flowed in since each was told to wait, in whole milliseconds.
        assert!(missing <= rate.burst / 10 + replicas, "{replicas}: {passed} of {due}");
        assert!(fleet.held() <= rate.burst / 10, "{}", fleet.held());
        let messages = fleet.store.messages.load(Ordering::Relaxed);
        assert!(messages <= 2_200 * replicas, "{replicas} replicas: {messages} messages");
    }
}

/// A client that keeps to the rate is never refused, whichever replica it comes to, though each may hold a part.
#[tokio::test]
async fn who_keeps_to_the_rate_is_not_refused() {
    for (amounts, every_ms) in
        [(amounts(1, 1_000, 1), 1_000), (amounts(100, 1_000, 100), 10), (amounts(60, 60_000, 60), 1_000)]
    {
        let fleet = Fleet::new(3, WhenGone::Closed).await;
        let key = key(7, amounts);
        for turn in 0..300 {
            assert!(fleet.passes(turn % 3, &key).await, "{turn} of {amounts:?}");
            fleet.pass(every_ms);
            fleet.turn_all().await;
        }
    }
}

#[tokio::test]
async fn a_busy_key_is_leased_ahead_and_a_rare_one_is_not() {
    let fleet = Fleet::new(2, WhenGone::Closed).await;
    let (busy, rare) = (key(1, amounts(1_000, 1_000, 1_000)), key(2, amounts(1_000, 1_000, 1_000)));
    let messages = || fleet.store.messages.load(Ordering::Relaxed);
    for _ in 0..1_000 {
        assert!(fleet.passes(0, &busy).await);
        fleet.pass(2);
        fleet.engines[0].turn().await;
    }
    assert!(messages() < 150, "{} messages for 1000 requests", messages());
    assert!((1..=50).contains(&fleet.held()), "{} of a burst of 1000 for one of two replicas", fleet.held());
    for _ in 0..30 {
        fleet.pass(100);
        fleet.turn_all().await;
    }
    let before = messages();
    for _ in 0..5 {
        assert!(fleet.passes(1, &rare).await);
        fleet.pass(700);
    }
    assert!(messages() - before >= 5);
    assert_eq!(fleet.store.keys.lock().values().filter(|bucket| bucket.held() > 0).count(), 0);
}

#[tokio::test]
async fn unused_leases_come_back_and_those_of_a_dead_replica_count_as_used() {
    let amounts = SharedAmounts { quota: quota(1_000).quota, ..amounts(1_000, 1_000, 1_000) };
    for dies in [false, true] {
        let fleet = Fleet::new(2, WhenGone::Closed).await;
        let key = key(1, amounts);
        let mut passed = 0;
        for _ in 0..100 {
            passed += u64::from(fleet.passes(0, &key).await);
            fleet.pass(1);
            fleet.engines[0].turn().await;
        }
        let held = fleet.held();
        assert!(passed == 100 && held > 5, "{passed} {held}");
        for _ in 0..30 {
            fleet.pass(100);
            if !dies {
                fleet.engines[0].turn().await;
            }
        }
        assert!(fleet.passes(1, &key).await);
        fleet.engines[1].turn().await;
        let left = fleet.engines[1].quota_left(&key).unwrap();
        match dies {
            false => assert_eq!((fleet.held(), left), (0, 1_000 - 101)),
            // What it had not told of, and what it had not used.
            true => assert!((1_000 - 101 - held..1_000 - 101).contains(&left), "{left}"),
        }
    }
}

#[tokio::test]
async fn a_quota_is_used_up_to_the_last_request() {
    let fleet = Fleet::new(3, WhenGone::Closed).await;
    let key = key(1, quota(300));
    let mut passed = 0;
    for turn in 0..6_000 {
        passed += usize::from(fleet.passes(turn % 3, &key).await);
        fleet.pass(2);
        if turn % 20 == 0 {
            fleet.turn_all().await;
        }
    }
    assert_eq!(passed, 300);
    // Until midnight by the store's clock: that of the second replica is ahead by an hour.
    for place in 0..3 {
        let LeaseOutcome::Refused(refusal) = fleet.asks(place, &key, 1).await else { panic!("{place}") };
        let rest = 43_200_000 - fleet.now();
        assert!(refusal.by == RefusedBy::Quota && refusal.wait_ms.abs_diff(rest) <= 1_000, "{refusal:?} {rest}");
    }
    fleet.pass(43_200_000);
    assert!(fleet.passes(0, &key).await);
}

#[tokio::test]
async fn a_refusal_is_remembered_so_that_the_store_is_not_asked_for_each() {
    let fleet = Fleet::new(2, WhenGone::Closed).await;
    let key = key(1, amounts(1, 1_000, 5));
    for _ in 0..5 {
        assert!(fleet.passes(0, &key).await);
    }
    let before = fleet.store.messages.load(Ordering::Relaxed);
    for _ in 0..1_000 {
        let LeaseOutcome::Refused(refusal) = fleet.asks(0, &key, 1).await else { panic!("more than the burst") };
        assert_eq!((refusal.by, refusal.wait_ms), (RefusedBy::Rate, 1_000));
    }
    assert_eq!(fleet.store.messages.load(Ordering::Relaxed) - before, 1);
    // Whoever has not asked does not know.
    assert_eq!(fleet.engines[1].peek(&key, 1, fleet.engines[1].now()), None);
    assert!(fleet.engines[0].peek(&key, 1, fleet.engines[0].now()).is_some());
    fleet.pass(1_000);
    assert!(fleet.passes(0, &key).await);
}

#[tokio::test]
async fn while_the_store_is_gone_the_setting_decides_and_nobody_waits() {
    let amounts = amounts(10, 1_000, 30);
    for (when_gone, at_once, in_ten_seconds) in
        [(WhenGone::Local, 30, 99), (WhenGone::Open, 300, 300_000), (WhenGone::Closed, 0, 0)]
    {
        let fleet = Fleet::new(3, when_gone).await;
        let key = key(1, amounts);
        for place in 0..3 {
            assert!(fleet.passes(place, &key).await);
        }
        *fleet.store.weather.lock() = Weather::Lost;
        let before = fleet.store.messages.load(Ordering::Relaxed);
        let mut passed = 0;
        for turn in 0..300 {
            passed += usize::from(fleet.passes(turn % 3, &key).await);
        }
        assert_eq!(passed, at_once, "{when_gone:?}");
        assert!(fleet.engines.iter().all(|engine| engine.is_gone()));
        // One try each, and no more: the others do not wait for the store.
        assert_eq!(fleet.store.messages.load(Ordering::Relaxed) - before, 3);
        let mut passed = 0;
        for _ in 0..1_000 {
            fleet.pass(10);
            for turn in 0..300 {
                passed += usize::from(fleet.passes(turn % 3, &key).await);
            }
        }
        assert_eq!(passed, in_ten_seconds, "{when_gone:?}");
        if when_gone == WhenGone::Closed {
            let LeaseOutcome::Refused(refusal) = fleet.asks(0, &key, 1).await else { panic!() };
            assert_eq!(refusal.by, RefusedBy::Gone);
        }
        *fleet.store.weather.lock() = Weather::Fine;
        fleet.pass(1_000);
        fleet.turn_all().await;
        assert!(fleet.engines.iter().all(|engine| !engine.is_gone()));
        // As if there had been nothing: what passed alone is not told to the store.
        let mut passed = 0;
        for turn in 0..300 {
            passed += usize::from(fleet.passes(turn % 3, &key).await);
        }
        assert_eq!(passed, 30, "{when_gone:?}");
    }
}

#[tokio::test]
async fn a_share_of_a_quota_is_of_what_was_left() {
    let fleet = Fleet::new(2, WhenGone::Local).await;
    let key = key(1, quota(100));
    for turn in 0..40 {
        assert!(fleet.passes(turn % 2, &key).await);
    }
    fleet.turn_all().await;
    *fleet.store.weather.lock() = Weather::Lost;
    let mut passed = 0;
    for turn in 0..200 {
        passed += usize::from(fleet.passes(turn % 2, &key).await);
    }
    // Each goes by what it heard last, and has its leases besides.
    assert!((55..=65).contains(&passed), "{passed} of 60");
}

#[tokio::test]
async fn memory_is_bounded_and_idle_keys_are_forgotten() {
    let fleet = Fleet::new(1, WhenGone::Closed).await;
    fleet.engines[0].keep_at_most(320);
    let mut passed = 0;
    for hash in 1..=2_000 {
        passed += usize::from(fleet.passes(0, &key(hash, amounts(1, 60_000, 2))).await);
    }
    assert!(fleet.engines[0].accounts() <= 320 + 32, "{}", fleet.engines[0].accounts());
    // The others have one bucket together.
    assert!((300..=322).contains(&passed), "{passed}");
    for _ in 0..40 {
        fleet.pass(100);
        fleet.turn_all().await;
    }
    assert_eq!(fleet.engines[0].accounts(), 0);
}

#[tokio::test]
async fn what_is_put_back_can_be_used_again_and_is_not_counted() {
    let fleet = Fleet::new(1, WhenGone::Closed).await;
    let quoted = key(1, quota(100));
    let engine = &fleet.engines[0];
    while fleet.held() < 4 {
        assert!(fleet.passes(0, &quoted).await);
        engine.turn().await;
    }
    for _ in 0..1_000 {
        let LeaseTake::Taken(part) = engine.take(&quoted, 1, engine.now()) else { panic!("it holds enough") };
        engine.put_back(part, engine.now());
    }
    let mut passed = 0;
    for turn in 0..2_000 {
        passed += usize::from(fleet.passes(0, &quoted).await);
        fleet.pass(if turn % 50 == 0 { 700 } else { 1 });
        engine.turn().await;
    }
    assert!((90..=100).contains(&passed), "{passed}");
    // Told to the store meanwhile: it stays counted.
    let other = key(2, amounts(1_000, 1_000, 1_000));
    let mut part = None;
    for _ in 0..50 {
        fleet.pass(1);
        assert!(fleet.passes(0, &other).await);
        engine.turn().await;
        if let LeaseTake::Taken(taken) = engine.take(&other, 1, engine.now()) {
            part = Some(taken);
            break;
        }
    }
    fleet.pass(400);
    engine.turn().await;
    let left = engine.remaining(&other);
    engine.put_back(part.unwrap(), engine.now());
    assert_eq!(engine.remaining(&other), left);
}

#[tokio::test]
async fn a_replica_that_ends_gives_everything_back_and_is_not_counted_any_more() {
    let fleet = Fleet::new(2, WhenGone::Closed).await;
    let key = key(1, amounts(1_000, 1_000, 1_000));
    for _ in 0..100 {
        assert!(fleet.passes(0, &key).await);
        fleet.pass(1);
        fleet.engines[0].turn().await;
    }
    assert!(fleet.held() > 5);
    fleet.engines[0].start();
    fleet.engines[0].end().await;
    assert_eq!((fleet.held(), fleet.store.replicas()), (0, 1));
}

/// As after a reload that changes where is counted: who waits, or comes late, is still counted by the store.
#[tokio::test(start_paused = true)]
async fn who_came_before_the_engine_was_replaced_does_not_decide_alone() {
    let fleet = Fleet::new(2, WhenGone::Local).await;
    let key = key(1, amounts(1, 100_000, 10));
    let [old, new] = [&fleet.engines[0], &fleet.engines[1]];
    let waits = |engine: &Arc<LeaseEngine>, count: usize| -> Vec<LeaseWait> {
        let lack = || LeaseLack { key: key.clone(), cost: 1 };
        (0..count).map(|_| engine.enqueue(lack())).collect()
    };
    fleet.store.delay.store(3, Ordering::Relaxed);
    old.start();
    let first = waits(old, 4);
    // Their message is on its way.
    tokio::task::yield_now().await;
    let second = waits(old, 4);
    old.retire();
    let third = waits(old, 4);
    new.start();
    let others = waits(new, 12);
    let mut paid = 0;
    for wait in first.into_iter().chain(second).chain(third).chain(others) {
        paid += usize::from(wait.outcome().await == LeaseOutcome::Paid);
    }
    assert_eq!(paid, 10);
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(fleet.held(), 0, "what it leased ahead is given back");
    // Then it asks no more.
    let before = fleet.store.messages.load(Ordering::Relaxed);
    drop(waits(old, 1));
    assert_eq!(fleet.store.messages.load(Ordering::Relaxed), before);
}
