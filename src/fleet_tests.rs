//! A fleet of gateways on one store, simulated: the real authenticator, feed, limits, guard against guessing and pools, each
//! gateway in a runtime with a clock of its own, while the store is away, slow or silent, notifications are late or lost, gateways
//! stand still or restart, and a standby without the last writes takes over. What the contract promises is checked at every
//! answer. A seed says all of it, and the same seed does the same again.
//!
//! `make fleet` runs a thousand seeds. One alone: `TOLLGATE_FLEET_SEED=7 cargo test --lib fleet_tests::many`.
//!
//! What is not in it: sockets, the stores' own protocols, and clocks that run at different speeds.

use crate::identity::{Authenticator, CacheSettings, CannotTell, Checked, Invalid, Mode, Principal, TokenStatus};
use crate::policy::{
    BucketSettings, GuessCount, GuessGuard, GuessSettings, GuessVerdict, LimitAmounts, LimitCosts, LimitFacts,
    LimitKeyPart, LimitScope, LimitSettings, LimitStage, LimitSubject, RefillRate, RequestLimits,
};
use crate::request::origin::AddressList;
use crate::request::route::{Methods, Pattern, Route};
use crate::request::routes::Routes;
use crate::request::view::Method;
use crate::store::chain::{Chain, Link};
use crate::store::credential::Digest;
use crate::store::fleet_tests::{
    AskedLookup, CentralStore, FaultTime, LinkFault, LinkedStore, SimClock, clock, run_by, world_ms,
};
use crate::telemetry::metrics::{CacheResult, Metrics, UpstreamError};
use crate::upstream::{
    Balance, CheckFault, FailedTry, MaxRequests, NoServer, Tries, Upstream, UpstreamSettings, settings_for_tests,
};
use futures_util::poll;
use parking_lot::Mutex;
use std::future::poll_fn;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio::time::{sleep, sleep_until, timeout};

/// The simulation goes on by so much; messages and requests come in between.
const STEP_MS: u64 = 20;
/// The bound on revocations of a store that notifies, and what the steps and the way to the store add.
const PROMISE_MS: u64 = 1_000;
const MARGIN_MS: u64 = 90;
/// Of a lookup.
const TIMEOUT_MS: u64 = 2_000;
/// So long behind a fault of its way to the store, a gateway may still count the store as failing: a lookup that timed out, and
/// the time for which it is remembered.
const AFTERMATH_MS: u64 = TIMEOUT_MS + 5_000 + 1_500;
const TOKENS: usize = 12;
const SLICE_MS: u64 = 100;
const GUESSER: &str = "192.0.2.66";

/// What a seed says.
struct Plan {
    seed: u64,
    replicas: usize,
    until: u64,
    notified: bool,
    cache: CacheSettings,
    /// A second, and at once.
    rate: u64,
    burst: u64,
    max_requests: u32,
    guarded: bool,
    /// Every token is asked for by every gateway, over and over.
    crowded: bool,
    /// All tokens are valid at the start.
    all_valid: bool,
    /// Chances in a thousand, for each step.
    write: u64,
    cut: u64,
    freeze: u64,
    restart: u64,
    /// When a standby takes over, how long that takes, and how much was not yet there.
    failover: Option<(u64, u64, u64)>,
    faults: Vec<Vec<FaultTime>>,
}

impl Plan {
    fn of(seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed ^ 0x0066_6c65_6574);
        let (replicas, until) = match seed % 100 {
            99 => (100, 12_000),
            24 | 49 | 74 => (20, 16_000),
            _ => (random.usize(3..6), random.u64(20_000..36_000)),
        };
        let notified = random.u8(0..4) > 0;
        let ms = |least: u64, most: u64, random: &mut fastrand::Rng| Duration::from_millis(random.u64(least..most));
        let cache = CacheSettings {
            positive_ttl: ms(2_000, if notified { 20_000 } else { 6_000 }, &mut random),
            negative_ttl: ms(500, 4_000, &mut random),
            stale_if_error: ms(0, 12_000, &mut random),
            positive_capacity: if random.u8(0..5) == 0 { 4 } else { 1_000 },
            negative_capacity: 10_000,
        };
        let mut faults = vec![Vec::new(); replicas];
        let fault = |random: &mut fastrand::Rng| {
            let from = random.u64(3_000..until.saturating_sub(2_000));
            let kind = match random.u8(0..4) {
                0 => LinkFault::Refused,
                1 => LinkFault::Silent,
                2 => LinkFault::Slow(random.u64(20..300)),
                _ => LinkFault::Slow(random.u64(300..2_500)),
            };
            FaultTime { from, until: from + random.u64(50..6_000), fault: kind }
        };
        // Of the store, then of single gateways' links; in some seeds there is none.
        for _ in 0..random.usize(0..3) {
            let fault = fault(&mut random);
            faults.iter_mut().for_each(|all| all.push(fault));
        }
        for _ in 0..random.usize(0..3) {
            let replica = random.usize(0..replicas);
            faults[replica].push(fault(&mut random));
        }
        let failover = (random.u8(0..4) == 0).then(|| {
            let at = random.u64(4_000..until - 5_000) / STEP_MS * STEP_MS;
            (at, random.u64(100..3_000), random.u64(50..2_000))
        });
        if let Some((at, takes, _)) = failover {
            let away = FaultTime { from: at, until: at + takes, fault: LinkFault::Refused };
            faults.iter_mut().for_each(|all| all.push(away));
        }
        let chance = |most: u64, random: &mut fastrand::Rng| if random.bool() { random.u64(0..most) } else { 0 };
        Self {
            seed,
            replicas,
            until,
            notified,
            cache,
            rate: random.u64(1..8),
            burst: random.u64(1..20),
            max_requests: random.u32(1..4),
            guarded: seed % 8 == 3,
            crowded: false,
            all_valid: false,
            write: random.u64(5..60),
            cut: chance(8, &mut random),
            freeze: chance(4, &mut random),
            restart: chance(3, &mut random),
            failover,
            faults,
        }
    }

    /// Whether a gateway's way to the store was well all the time, with what a fault before it leaves behind.
    fn is_calm(&self, replica: usize, from: u64, until: u64) -> bool {
        let from = from.saturating_sub(AFTERMATH_MS);
        self.faults[replica].iter().all(|time| time.until < from || until < time.from)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Valid,
    Invalid,
    Unavailable(CannotTell),
    /// The guard against guessing did not let it be looked up.
    Guessing,
    /// Its gateway ended.
    Gone,
}

/// What became of one request.
#[derive(Clone, Copy, Debug)]
struct Outcome {
    replica: usize,
    token: Option<usize>,
    asked: u64,
    decided: u64,
    told: Told,
    stale: bool,
    /// By the clock of the gateway, if its limit let it through.
    admitted: Option<u64>,
}

/// One request on its way: whatever ends it, there is an outcome.
struct Ticket {
    outcome: Outcome,
    outcomes: Arc<Mutex<Vec<Outcome>>>,
}

impl Ticket {
    fn tell(&mut self, told: Told, stale: bool) {
        (self.outcome.told, self.outcome.stale, self.outcome.decided) = (told, stale, world_ms());
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.outcomes.lock().push(self.outcome);
    }
}

/// What one process has.
struct Parts {
    authenticator: Authenticator,
    limits: RequestLimits,
    guard: GuessGuard,
    pool: Arc<Upstream>,
    /// Requests that wait for a server.
    waiting: AtomicUsize,
    max_requests: u32,
    /// When the simulation began, for the pool.
    began: Instant,
    /// Until then the first server refuses connections, in the simulation's time.
    server_down: Mutex<(u64, u64)>,
}

impl Parts {
    fn instant(&self) -> Instant {
        self.began + Duration::from_millis(world_ms())
    }
}

struct Replica {
    process: Option<(Runtime, Arc<Parts>, SimClock)>,
    frozen_until: u64,
    down_until: u64,
    /// Its last start, cut, standstill.
    unrest: u64,
    /// As the rate is defined, by the gateway's clock: what is left, and when that was, for each token.
    reference: Vec<(f64, u64)>,
    looked_up: Vec<Option<u64>>,
    /// Lookups of tokens that nobody has.
    strangers: u64,
}

/// What a run has seen.
#[derive(Debug, Default)]
struct Seen {
    trace: u64,
    requests: u64,
    valid: u64,
    refused_limit: u64,
    unavailable: u64,
    stale: u64,
    gone: u64,
    lookups: u64,
    writes: u64,
    /// The longest time for which a revoked token was good, in milliseconds: with the store well, and in a fault.
    worst_calm: u64,
    worst_fault: u64,
    /// The same in a fault, without stale entries, beyond what is promised for a store that is well.
    worst_beyond: u64,
    queued: u64,
    /// Lookups in each step of [`SLICE_MS`].
    slices: Vec<u64>,
}

fn metrics() -> &'static Arc<Metrics> {
    static ALL: OnceLock<Arc<Metrics>> = OnceLock::new();
    ALL.get_or_init(|| Arc::new(Metrics::new("test").unwrap()))
}

fn token_text(place: usize) -> Vec<u8> {
    format!("token-{place:04}").into_bytes()
}

fn digest_of(place: usize) -> Digest {
    Digest::of(&token_text(place))
}

struct Fleet {
    plan: Plan,
    random: fastrand::Rng,
    central: Arc<CentralStore>,
    replicas: Vec<Replica>,
    outcomes: Arc<Mutex<Vec<Outcome>>>,
    /// Revoked tokens that all are asked for when the promise is due.
    probes: Vec<(u64, usize)>,
    seen: Seen,
    now: u64,
    began: Instant,
    asked: u64,
    number: u64,
}

impl Fleet {
    fn new(seed: u64) -> Self {
        Self::of(Plan::of(seed))
    }

    fn of(plan: Plan) -> Self {
        let seed = plan.seed;
        // The jitter of lifetimes and pauses, and what makes room in the cache. What all fleets share is made before it.
        metrics();
        fastrand::seed(seed);
        let mut random = fastrand::Rng::with_seed(seed);
        let tokens = (0..TOKENS).map(|place| (digest_of(place), random.u8(0..3) > 0 || plan.all_valid)).collect();
        let central = CentralStore::new(seed, tokens, plan.faults.clone());
        let replica = || Replica {
            process: None,
            frozen_until: 0,
            down_until: 0,
            unrest: 0,
            reference: Vec::new(),
            looked_up: vec![None; TOKENS],
            strangers: 0,
        };
        let replicas = (0..plan.replicas).map(|_| replica()).collect();
        Self {
            plan,
            random,
            central,
            replicas,
            outcomes: Arc::default(),
            probes: Vec::new(),
            seen: Seen { trace: 0xcbf2_9ce4_8422_2325, ..Seen::default() },
            now: 0,
            began: Instant::now(),
            asked: 0,
            number: 0,
        }
    }

    fn note(&mut self, what: u64) {
        self.seen.trace = (self.seen.trace ^ what).wrapping_mul(0x0100_0000_01b3).rotate_left(5);
    }

    fn fail(&self, what: &str) -> ! {
        panic!(
            "seed {} at {} ms ({}): {what}\nalone: TOLLGATE_FLEET_SEED={} cargo test --lib fleet_tests::many",
            self.plan.seed,
            self.now,
            if self.plan.notified { "notified" } else { "polled" },
            self.plan.seed
        );
    }

    fn boot(&mut self, replica: usize) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let start = runtime.block_on(async { tokio::time::Instant::now() });
        // Nobody's clock agrees with another one's.
        let clocks = SimClock {
            start,
            booted: self.now,
            mono_offset: 1_000_000 + self.random.u64(0..1_000_000_000),
            unix_offset: 1_800_000_000_000 - 300_000 + self.random.u64(0..600_000),
        };
        let store = LinkedStore { central: Arc::clone(&self.central), replica, tells_changes: self.plan.notified };
        let series = Arc::new(metrics().store("simulated"));
        let link = Link::new("simulated".into(), Arc::new(store), Duration::from_millis(TIMEOUT_MS), series);
        let chain = Chain::new(vec![link]);
        let guessing = self.plan.guarded && replica == 0;
        let guess_settings = guess_settings();
        let seeds = self.random.u64(..);
        let parts = Arc::new(Parts {
            authenticator: Authenticator::new(chain, self.plan.cache.clone(), Arc::clone(metrics()), clock),
            limits: limits(self.plan.rate, self.plan.burst, seeds),
            guard: GuessGuard::new(guessing.then_some(&guess_settings), None, || seeds),
            pool: Upstream::build(&pool(self.plan.max_requests), Vec::new(), None, metrics(), self.began).0,
            waiting: AtomicUsize::new(0),
            max_requests: self.plan.max_requests,
            began: self.began,
            server_down: Mutex::default(),
        });
        let following = Arc::clone(&parts);
        runtime.spawn(async move { following.authenticator.follow_changes().await });
        let state = &mut self.replicas[replica];
        state.process = Some((runtime, parts, clocks));
        state.unrest = self.now;
        // What it admitted before is forgotten with the process.
        state.reference = vec![(self.plan.burst as f64, 0); TOKENS];
        state.looked_up = vec![None; TOKENS];
        state.strangers = 0;
    }

    fn run(mut self) -> Seen {
        for replica in 0..self.plan.replicas {
            self.boot(replica);
        }
        while self.now < self.plan.until {
            self.central.step(self.now);
            self.probes.retain(|(due, _)| *due >= self.now);
            self.strike();
            self.write();
            for replica in 0..self.plan.replicas {
                self.run_replica(replica, true);
            }
            self.judge_all();
            self.now += STEP_MS;
        }
        // Whoever still waits has its answer by now.
        let faults = self.plan.faults.iter().flatten().map(|time| time.until);
        let standstills = self.replicas.iter().map(|replica| replica.frozen_until);
        let end = faults.chain(standstills).max().unwrap_or(0).max(self.now) + 4_000;
        while self.now < end {
            self.central.step(self.now);
            for replica in 0..self.plan.replicas {
                self.run_replica(replica, false);
            }
            self.judge_all();
            self.now += STEP_MS;
        }
        if self.seen.requests != self.asked {
            self.fail(&format!("{} of {} requests have an end", self.seen.requests, self.asked));
        }
        for (replica, state) in self.replicas.iter().enumerate() {
            let Some((_, parts, _)) = &state.process else { continue };
            let in_flight: u32 = parts.pool.members().iter().map(|member| member.server.in_flight()).sum();
            if in_flight > 0 || parts.waiting.load(SeqCst) > 0 {
                self.fail(&format!("gateway {replica}: {in_flight} requests are with servers for ever"));
            }
        }
        for replica in &mut self.replicas {
            end_process(replica);
        }
        self.seen
    }

    /// What happens to gateways and connections.
    fn strike(&mut self) {
        for replica in 0..self.plan.replicas {
            let now = self.now;
            if self.replicas[replica].process.is_none() && self.replicas[replica].down_until <= now {
                self.boot(replica);
            }
            let quiet = now < 1_000 || self.replicas[replica].frozen_until > now;
            if quiet || self.replicas[replica].process.is_none() {
                continue;
            }
            let (dice, random) = (self.random.u64(0..10_000), &mut self.random);
            let (cut, freeze, restart) = (self.plan.cut, self.plan.freeze, self.plan.restart);
            if dice < cut {
                self.central.cut(replica, random.bool());
                self.replicas[replica].unrest = now;
            } else if dice < cut + freeze {
                let time = random.u64(20..5_000);
                self.replicas[replica].frozen_until = now + time;
            } else if dice < cut + freeze + restart {
                self.replicas[replica].down_until = now + random.u64(0..2_000);
                let told = self.outcomes.lock().len();
                end_process(&mut self.replicas[replica]);
                // The runtime drops its tasks by their numbers, and those count the tasks of all tests in this process.
                self.outcomes.lock()[told..].sort_by_key(|outcome| (outcome.asked, outcome.token));
            } else if dice < cut + freeze + restart + 20
                && let Some((_, parts, _)) = &self.replicas[replica].process
            {
                *parts.server_down.lock() = (now, now + random.u64(50..3_000));
            }
        }
        if let Some((at, _, missing)) = self.plan.failover
            && at == self.now
        {
            let lost = self.central.lose_writes(at.saturating_sub(missing));
            self.note(lost as u64);
        }
    }

    fn write(&mut self) {
        // Nobody can write while the store is away, or silent, for all.
        let is_away = |replica: &Vec<FaultTime>| {
            let stops = |time: &FaultTime| !matches!(time.fault, LinkFault::Slow(_));
            replica.iter().any(|time| (time.from..time.until).contains(&self.now) && stops(time))
        };
        if self.plan.faults.iter().all(is_away) || self.random.u64(0..1_000) >= self.plan.write {
            return;
        }
        let token = self.random.usize(0..TOKENS);
        let is_valid = self.central.with_token(token, |token| token.at(u64::MAX).1);
        self.central.commit(token, !is_valid);
        self.seen.writes += 1;
        if is_valid {
            let bound = if self.plan.notified { PROMISE_MS } else { self.plan.cache.positive_ttl.as_millis() as u64 };
            let due = (self.now + bound + MARGIN_MS).next_multiple_of(STEP_MS) + STEP_MS;
            self.probes.push((due, token));
        }
    }

    /// One gateway lives through one step, with the requests that come meanwhile.
    fn run_replica(&mut self, replica: usize, asks: bool) {
        let now = self.now;
        if self.replicas[replica].frozen_until > now {
            return;
        }
        let Some((runtime, parts, clocks)) = self.replicas[replica].process.take() else { return };
        let mut requests: Vec<(Option<usize>, Vec<u8>, &str)> = Vec::new();
        if asks {
            let many = if self.plan.replicas > 10 { 8 } else { 3 };
            if self.plan.crowded {
                let token = (now / STEP_MS) as usize % TOKENS;
                requests.push((Some(token), token_text(token), "192.0.2.1"));
            } else if self.random.u8(0..many) == 0 {
                // Some tokens are used all the time.
                let token = self.random.usize(0..TOKENS).min(self.random.usize(0..TOKENS));
                requests.push((Some(token), token_text(token), "192.0.2.1"));
            }
            let due = self.probes.iter().filter(|(at, _)| *at == now);
            requests.extend(due.map(|(_, token)| (Some(*token), token_text(*token), "192.0.2.1")));
            let guesses = self.random.u8(0..100) == 0 && !self.plan.crowded;
            if guesses || self.plan.guarded && replica == 0 {
                self.number += 1;
                requests.push((None, format!("guess-{}", self.number).into_bytes(), GUESSER));
            }
        }
        self.asked += requests.len() as u64;
        let first = self.random.bool();
        run_by(clocks);
        let behind = runtime.block_on(async {
            let target = clocks.start + Duration::from_millis(now + STEP_MS - clocks.booted);
            let behind = now.saturating_sub(world_ms());
            let come = || {
                for (token, text, client) in requests {
                    serve(&parts, &self.outcomes, replica, token, text, client.parse().unwrap());
                }
            };
            if behind > STEP_MS {
                // It stood still: all its timers are late, and some requests come before it has noticed anything.
                let mut gone_on = pin!(tokio::time::advance(Duration::from_millis(behind)));
                let began = poll!(gone_on.as_mut());
                if first {
                    come();
                    if began.is_pending() {
                        gone_on.await;
                    }
                } else {
                    if began.is_pending() {
                        gone_on.await;
                    }
                    come();
                }
            } else {
                come();
            }
            if now.is_multiple_of(500) {
                parts.guard.ended(clock());
                let (from, until) = *parts.server_down.lock();
                let is_down = (from..until).contains(&world_ms());
                for (server, _) in parts.pool.looks(parts.instant()) {
                    let is_first = server.label().ends_with(":1");
                    let found = if is_first && is_down { Err(CheckFault::Connect) } else { Ok(()) };
                    parts.pool.seen(&server, found, parts.instant());
                }
            }
            sleep_until(target).await;
            // Those who were woken at the same moment come to what they were woken for.
            for _ in 0..8 {
                tokio::task::yield_now().await;
            }
            behind
        });
        if behind > STEP_MS {
            self.replicas[replica].unrest = now;
        }
        let members = parts.pool.members();
        let most = members.iter().map(|member| member.server.in_flight()).max().unwrap_or(0);
        if most > parts.max_requests {
            self.fail(&format!("gateway {replica}: {most} requests at a server that may have {}", parts.max_requests));
        }
        let waiting = parts.waiting.load(SeqCst);
        let mut up = members.iter().filter(|member| member.server.is_up());
        if waiting > 0 && up.any(|member| member.server.in_flight() < parts.max_requests) {
            self.fail(&format!("gateway {replica}: {waiting} wait for a server that has room"));
        }
        self.seen.queued += waiting as u64;
        let (valid, invalid) = if now.is_multiple_of(500) { parts.authenticator.cache_sizes() } else { (0, 0) };
        let settings = &self.plan.cache;
        if valid > settings.positive_capacity || invalid > settings.negative_capacity {
            self.fail(&format!("gateway {replica}: {valid} and {invalid} entries"));
        }
        self.replicas[replica].process = Some((runtime, parts, clocks));
    }

    fn judge_all(&mut self) {
        for lookup in self.central.take_asked() {
            self.seen.lookups += 1;
            let slice = (lookup.at / SLICE_MS) as usize;
            self.seen.slices.resize(self.seen.slices.len().max(slice + 1), 0);
            self.seen.slices[slice] += 1;
            self.judge_lookup(lookup);
        }
        let outcomes = std::mem::take(&mut *self.outcomes.lock());
        for outcome in outcomes {
            self.judge(outcome);
        }
    }

    fn judge_lookup(&mut self, lookup: AskedLookup) {
        let AskedLookup { replica, digest, at, in_progress } = lookup;
        self.note(at << 8 | replica as u64);
        // One that was given up in a batch goes on until the batch ends, within the time of a lookup.
        let most = if self.plan.is_calm(replica, at, at) { 1 } else { 2 };
        if in_progress > most {
            self.fail(&format!("gateway {replica}: {in_progress} lookups of {digest:?} at once"));
        }
        let Some(token) = (0..TOKENS).find(|token| digest_of(*token) == digest) else {
            self.replicas[replica].strangers += 1;
            let settings = guess_settings();
            // The budget, what flows in, the turns, and the requests that were at the store when the pause began.
            let most = settings.failures
                + at * settings.failures / settings.per.as_millis() as u64
                + settings.lookups * (at / 1_000 + 2)
                + 250;
            let counts = self.plan.guarded && replica == 0 && self.plan.is_calm(replica, 0, at);
            if counts && self.replicas[replica].strangers > most {
                self.fail(&format!("{} lookups of {most} for one who guesses", self.replicas[replica].strangers));
            }
            return;
        };
        let before = self.replicas[replica].looked_up[token].replace(at);
        let Some(before) = before else { return };
        let (changed, valid) = self.central.with_token(token, |token| token.at(at));
        let settings = &self.plan.cache;
        let ttl = if valid { settings.positive_ttl.mul_f64(0.75 * 0.9) } else { settings.negative_ttl.mul_f64(0.9) };
        let since = before.saturating_sub(2_000);
        let is_calm = self.plan.is_calm(replica, since, at)
            && self.replicas[replica].unrest < since
            && changed < since
            && settings.positive_capacity > TOKENS as u64;
        // In step with the promise: not once for each request.
        if is_calm && at - before + 2 * STEP_MS < ttl.as_millis() as u64 {
            let gap = at - before;
            self.fail(&format!("gateway {replica}: token {token} was looked up again after {gap} ms, of {ttl:?}"));
        }
    }

    fn judge(&mut self, outcome: Outcome) {
        let Outcome { replica, token, asked, decided, told, stale, admitted } = outcome;
        self.seen.requests += 1;
        let code = match told {
            Told::Valid => 1,
            Told::Invalid => 2,
            Told::Unavailable(why) => 3 + why as u64,
            Told::Guessing => 8,
            Told::Gone => 9,
        };
        self.note(asked << 32 | decided << 12 | (replica as u64) << 5 | code);
        self.note(admitted.unwrap_or(0));
        match told {
            Told::Valid => self.seen.valid += 1,
            Told::Unavailable(_) => self.seen.unavailable += 1,
            Told::Gone => self.seen.gone += 1,
            Told::Invalid | Told::Guessing => {}
        }
        self.seen.stale += u64::from(stale);
        let Some(token) = token else {
            if told == Told::Valid {
                self.fail("a token that nobody has is valid");
            }
            return;
        };
        let (changed, is_valid) = self.central.with_token(token, |token| token.at(decided));
        let what = format!("gateway {replica}, token {token}, {outcome:?}, changed at {changed}");
        let ms = |time: Duration| time.as_millis() as u64;
        let settings = &self.plan.cache;
        let (ttl, negative, excused) =
            (ms(settings.positive_ttl), ms(settings.negative_ttl), ms(settings.stale_if_error));
        let is_calm = self.plan.is_calm(replica, changed, decided);
        if told == Told::Valid && !is_valid {
            let lag = decided - changed;
            let promise = if self.plan.notified { PROMISE_MS } else { ttl };
            // Where a fault is, a lookup may have taken all its time; and a stale entry is for faults only.
            let bound = match (is_calm, stale) {
                (true, _) => promise,
                (false, false) => promise + TIMEOUT_MS,
                (false, true) => ttl + excused + TIMEOUT_MS,
            };
            if lag > bound + MARGIN_MS {
                self.fail(&format!("a revoked token was good for {lag} ms, of {bound}: {what}"));
            }
            let worst = if is_calm { &mut self.seen.worst_calm } else { &mut self.seen.worst_fault };
            *worst = lag.max(*worst);
            if !stale {
                self.seen.worst_beyond = lag.saturating_sub(promise).max(self.seen.worst_beyond);
            }
        }
        if stale && self.plan.is_calm(replica, decided, decided) {
            self.fail(&format!("an old answer was used while the store was well: {what}"));
        }
        let known_for = if self.plan.notified { PROMISE_MS } else { negative };
        let since = asked.saturating_sub(known_for + MARGIN_MS + 1);
        let is_due = is_valid && changed < since && self.plan.is_calm(replica, since, decided);
        if is_due && !matches!(told, Told::Valid | Told::Gone) {
            self.fail(&format!("a valid token was refused while the store was well: {what}"));
        }
        if let Some(at) = admitted {
            let (left, before) = self.replicas[replica].reference[token];
            let flowed = at.saturating_sub(before) as f64 * self.plan.rate as f64 / 1_000.0;
            let left = (left + flowed).min(self.plan.burst as f64) - 1.0;
            if left < -1e-6 {
                self.fail(&format!("more than {}/s and {}: {what}", self.plan.rate, self.plan.burst));
            }
            self.replicas[replica].reference[token] = (left, at);
        } else if told == Told::Valid {
            self.seen.refused_limit += 1;
        }
    }
}

/// Ends a process: what it was about to do is gone.
fn end_process(replica: &mut Replica) {
    if let Some((runtime, parts, clocks)) = replica.process.take() {
        run_by(clocks);
        drop(parts);
        drop(runtime);
    }
}

fn guess_settings() -> GuessSettings {
    GuessSettings {
        failures: 20,
        per: Duration::from_secs(10),
        pause: Duration::from_secs(30),
        longest_pause: Duration::from_secs(60),
        lookups: 5,
        wait: Duration::from_secs(1),
        allow: AddressList { networks: Vec::new(), unix_peers: false },
        shared: false,
    }
}

fn limits(rate: u64, burst: u64, seed: u64) -> RequestLimits {
    let rate = RefillRate::new(rate, 1_000, burst);
    let settings = LimitSettings {
        name: "token".into(),
        buckets: BucketSettings {
            key: vec![LimitKeyPart::Token],
            prefix_v4: 32,
            prefix_v6: 64,
            amounts: LimitAmounts { rate: Some(rate), ..LimitAmounts::default() },
            plans: None,
            most: 200,
        },
        applies: LimitScope { routes: Vec::new(), methods: Methods::ALL, scopes: Vec::new(), users: Vec::new() },
        costs: LimitCosts::default(),
        dry_run: false,
        shared: false,
    };
    let routes = Routes::new(vec![Route::new("/*".parse::<Pattern>().unwrap(), "/*".into())]);
    RequestLimits::new(&[settings], false, &routes, None, || seed)
}

fn pool(max_requests: u32) -> UpstreamSettings {
    UpstreamSettings {
        balance: Balance::LeastRequests,
        max_requests: Some(MaxRequests::Fixed(max_requests)),
        queue: 5,
        ..settings_for_tests(&["127.0.0.1:1", "127.0.0.1:2"])
    }
}

/// One request, as the pipeline and the lanes treat it.
fn serve(
    parts: &Arc<Parts>,
    outcomes: &Arc<Mutex<Vec<Outcome>>>,
    replica: usize,
    token: Option<usize>,
    text: Vec<u8>,
    client: IpAddr,
) {
    let (asked, digest) = (world_ms(), Digest::of(&text));
    let outcome = Outcome { replica, token, asked, decided: asked, told: Told::Gone, stale: false, admitted: None };
    let mut ticket = Ticket { outcome, outcomes: Arc::clone(outcomes) };
    let mut turn = GuessVerdict::Free;
    let checked = parts.authenticator.check_if(&text, &digest, clock(), Mode::Serve, || {
        turn = parts.guard.turn(Some(client), &digest, clock());
        matches!(turn, GuessVerdict::Free)
    });
    let parts = Arc::clone(parts);
    match (checked, turn) {
        // A hit is answered at once.
        (Checked::Known(answer, result), _) => {
            let stale = result == CacheResult::Stale;
            if let Some(principal) = identified(&parts, &mut ticket, Ok(answer), stale, client, &digest) {
                tokio::spawn(async move { forward(&parts, ticket, &principal, digest, client).await });
            }
        }
        (Checked::Waiting(waiting), _) => {
            tokio::spawn(async move {
                let (answer, result) = waiting.answer().await;
                let stale = result == CacheResult::Stale;
                if let Some(principal) = identified(&parts, &mut ticket, answer, stale, client, &digest) {
                    forward(&parts, ticket, &principal, digest, client).await;
                }
            });
        }
        (Checked::NotAsked, GuessVerdict::Turn(mut turn)) => {
            tokio::spawn(async move {
                sleep(turn.wait).await;
                turn.has_come();
                drop(turn);
                let answer = match parts.authenticator.check(&text, &digest, clock(), Mode::Serve) {
                    Checked::Known(answer, result) => (Ok(answer), result),
                    Checked::Waiting(waiting) => waiting.answer().await,
                    Checked::NotAsked => (Err(CannotTell::NotAsked), CacheResult::Miss),
                };
                let stale = answer.1 == CacheResult::Stale;
                if let Some(principal) = identified(&parts, &mut ticket, answer.0, stale, client, &digest) {
                    forward(&parts, ticket, &principal, digest, client).await;
                }
            });
        }
        (Checked::NotAsked, _) => ticket.tell(Told::Guessing, false),
    }
}

fn identified(
    parts: &Parts,
    ticket: &mut Ticket,
    answer: Result<TokenStatus, CannotTell>,
    stale: bool,
    client: IpAddr,
    digest: &Digest,
) -> Option<Arc<Principal>> {
    match answer {
        Ok(TokenStatus::Valid(principal)) => {
            ticket.tell(Told::Valid, stale);
            Some(principal)
        }
        Ok(TokenStatus::Invalid(why)) => {
            if why == Invalid::Unknown {
                let _: GuessCount = parts.guard.failed(Some(client), digest, why, clock());
            }
            ticket.tell(Told::Invalid, stale);
            None
        }
        Err(why) => {
            ticket.tell(Told::Unavailable(why), stale);
            None
        }
    }
}

async fn forward(parts: &Parts, mut ticket: Ticket, principal: &Principal, digest: Digest, client: IpAddr) {
    let subject = LimitSubject {
        route: 0,
        route_name: "/*",
        method: Method::Get,
        client: Some(client),
        token: Some(&digest),
        principal: Some(principal),
        headers: &[],
    };
    let now = clock();
    if parts.limits.take(&subject, LimitStage::Both, now, &[], &mut LimitFacts::new()).is_err() {
        return;
    }
    ticket.outcome.admitted = Some(now.mono_ms);
    let serving = Duration::from_millis(20 + digest.spread().wrapping_add(world_ms()) % 400);
    drop(ticket);
    let mut tries = Tries::default();
    tries.called_by(digest.spread(), 1);
    loop {
        let mut picked = parts.pool.pick(&mut tries, parts.instant());
        if let Err(NoServer::Busy) = picked {
            // One that was failed by a server waits for the other one.
            let _waits = (tries.count() == 0).then(|| Waits::begin(&parts.waiting));
            let turn = poll_fn(|cx| parts.pool.poll_pick(&mut tries, cx.waker(), parts.instant()));
            picked = timeout(Duration::from_secs(1), turn).await.unwrap_or(Err(NoServer::QueueTimeout));
            tries.leave_queue();
        }
        let Ok(pick) = picked else { return };
        let (from, until) = *parts.server_down.lock();
        if pick.server.label().ends_with(":1") && (from..until).contains(&world_ms()) {
            let refused = FailedTry::Connect(UpstreamError::Connect);
            if parts.pool.failed(&mut tries, refused, true, parts.instant()).again {
                continue;
            }
            return;
        }
        sleep(serving).await;
        parts.pool.answered(&mut tries, 200, parts.instant());
        return;
    }
}

/// Counts a request that waits for a server.
struct Waits<'a>(&'a AtomicUsize);

impl<'a> Waits<'a> {
    fn begin(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, SeqCst);
        Self(waiting)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

fn number_from(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

/// A thousand seeds by `make fleet`; a few in the ordinary tests.
#[test]
fn many_seeds_keep_the_promises() {
    let seeds: Vec<u64> = match number_from("TOLLGATE_FLEET_SEED") {
        Some(seed) => vec![seed],
        None => (0..number_from("TOLLGATE_FLEET_SEEDS").unwrap_or(25)).collect(),
    };
    let (next, all, began) = (AtomicUsize::new(0), Mutex::new(Vec::new()), Instant::now());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |count| count.get().min(4)) {
            scope.spawn(|| {
                while let Some(seed) = seeds.get(next.fetch_add(1, SeqCst)) {
                    let seen = Fleet::new(*seed).run();
                    all.lock().push((*seed, Plan::of(*seed), seen));
                }
            });
        }
    });
    let all = all.into_inner();
    let sum = |of: fn(&Seen) -> u64| all.iter().map(|(_, _, seen)| of(seen)).sum::<u64>();
    let most = |notified: bool, of: fn(&Seen) -> u64| {
        all.iter().filter(|(_, plan, _)| plan.notified == notified).map(|(_, _, seen)| of(seen)).max().unwrap_or(0)
    };
    let simulated: u64 = all.iter().map(|(_, plan, _)| plan.until * plan.replicas as u64).sum();
    let figures = format!(
        "| seeds | {} |\n| gateways x simulated time | {} s |\n| real time | {} s |\n| requests | {} |\n\
         | forwarded | {} |\n| refused by a limit | {} |\n| 503 | {} |\n| answered by a stale entry | {} |\n\
         | lost with a gateway | {} |\n| lookups | {} |\n| writes to the store | {} |\n\
         | longest use of a revoked token, notified, store well | {} ms |\n\
         | longest use of a revoked token, notified, store faulty | {} ms |\n\
         | longest use of a revoked token, polled, store well | {} ms |\n\
         | beyond the bound in a fault, without stale entries | {} ms notified, {} ms polled |",
        all.len(),
        simulated / 1_000,
        began.elapsed().as_secs(),
        sum(|seen| seen.requests),
        sum(|seen| seen.valid) - sum(|seen| seen.refused_limit),
        sum(|seen| seen.refused_limit),
        sum(|seen| seen.unavailable),
        sum(|seen| seen.stale),
        sum(|seen| seen.gone),
        sum(|seen| seen.lookups),
        sum(|seen| seen.writes),
        most(true, |seen| seen.worst_calm),
        most(true, |seen| seen.worst_fault),
        most(false, |seen| seen.worst_calm),
        most(true, |seen| seen.worst_beyond),
        most(false, |seen| seen.worst_beyond),
    );
    eprintln!("{figures}");
    // What is judged has happened.
    if seeds.len() > 20 {
        assert!(sum(|seen| seen.stale) > 0 && sum(|seen| seen.unavailable) > 0 && sum(|seen| seen.gone) > 0);
        assert!(sum(|seen| seen.refused_limit) > 0 && sum(|seen| seen.queued) > 0);
        assert!(most(true, |seen| seen.worst_calm) > 0);
    }
}

#[test]
fn a_seed_does_the_same_again() {
    // One with a guard against guessing, one with an end of a process, one with twenty gateways.
    let seeds = [1, 3, 7, 24];
    let mut traces = std::collections::BTreeSet::new();
    for seed in seeds {
        let (first, second) = (Fleet::new(seed).run(), Fleet::new(seed).run());
        assert_eq!(
            (first.trace, first.requests, first.lookups),
            (second.trace, second.requests, second.lookups),
            "seed {seed} is not the same again"
        );
        traces.insert(first.trace);
    }
    assert_eq!(traces.len(), seeds.len());
}

/// Gateways whose callers go on while the store is away for five seconds, and then comes back. One lookup for each token
/// and gateway, however many callers there are; and nobody who was known is refused meanwhile.
#[test]
fn a_store_that_comes_back_is_asked_once_for_each_token_and_gateway() {
    for (fault, seed) in [(LinkFault::Refused, 1), (LinkFault::Silent, 2)] {
        let replicas = if number_from("TOLLGATE_FLEET_SEEDS").is_some() { 100 } else { 20 };
        let (from, until) = (4_000, 9_000);
        let cache = CacheSettings {
            positive_ttl: Duration::from_secs(60),
            negative_ttl: Duration::from_secs(10),
            stale_if_error: Duration::from_secs(600),
            positive_capacity: 1_000,
            negative_capacity: 1_000,
        };
        let plan = Plan {
            seed,
            replicas,
            until: 12_000,
            notified: true,
            cache,
            rate: 1_000,
            burst: 1_000,
            max_requests: 1_000,
            guarded: false,
            crowded: true,
            all_valid: true,
            write: 0,
            cut: 0,
            freeze: 0,
            restart: 0,
            failover: None,
            faults: vec![vec![FaultTime { from, until, fault }]; replicas],
        };
        let seen = Fleet::of(plan).run();
        let between = |from: u64, until: u64| -> u64 {
            seen.slices
                .iter()
                .enumerate()
                .filter(|(at, _)| (from..until).contains(&(*at as u64 * SLICE_MS)))
                .map(|(_, lookups)| *lookups)
                .sum()
        };
        let pairs = (replicas * TOKENS) as u64;
        let (start, well, away) = (between(0, 2_000), between(2_000, from), between(from, until));
        let (back, busiest) =
            (between(until, 12_000), seen.slices[(until / SLICE_MS) as usize..].iter().max().unwrap());
        let row = format!(
            "| {fault:?} for 5 s | {replicas} x {TOKENS} | {start} | {well} | {away} | {back} | {busiest} | {} | {} |",
            seen.unavailable, seen.stale
        );
        eprintln!("{row}");
        // At a start, answers are good for 0.7 s until the subscription is there, and all are looked up again then.
        assert!(start <= 2 * pairs && well == 0, "{start} lookups at the start, {well} later");
        // One try a second for each.
        assert!(away >= pairs && away <= 7 * pairs, "{away} lookups while the store was away");
        assert!((pairs..=2 * pairs).contains(&back), "{back} lookups when it came back");
        assert_eq!((seen.unavailable, seen.stale > 0), (0, true));
    }
}
