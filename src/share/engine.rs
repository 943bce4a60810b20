//! One replica's leases: takes from what it holds, asks the store for more, and decides while the store does not answer. Requests
//! that wait for one key share a message, and several keys are asked in one. It must not know how the store keeps anything.
//!
//! What was leased ahead is set aside in the store until it is used, given back or over, and does not flow off meanwhile. So never
//! more gets through than one bucket would let through, and what is missing is at most what lies unused in leases.

use super::account::{AccountTake, LeaseAccount, LeaseRefusal, RefusedBy, Report};
use super::{BEAT, LeaseAnswer, LeaseRequest, ShareStore, SharedAmounts, WhenGone, said};
use crate::clock::Now;
use crate::store::StoreError;
use crate::telemetry::outage::Outage;
use crate::telemetry::share_metrics::ShareMetrics;
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use siphasher::sip::SipHasher13;
use std::collections::HashMap;
use std::hash::{Hash as _, Hasher as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, oneshot};
use tokio_util::sync::CancellationToken;

/// Locks for the accounts.
const SHARDS: usize = 32;
/// Keys of one message, and messages on their way.
const KEYS: usize = 64;
const MESSAGES: usize = 4;
/// Requests that may wait for one key.
const WAITING: usize = 4_096;
/// How often accounts are looked through.
const SWEEP: Duration = Duration::from_millis(100);
/// After a failure, the store is tried again after this.
const PAUSE_MS: u64 = 500;
/// How long a replica that ends takes to give back what it holds.
const ENDING: Duration = Duration::from_secs(1);
/// How long requests that came before a reload are still asked for by what it replaced.
const LINGERING: Duration = Duration::from_secs(3);

/// Whose budget it is.
#[derive(Clone, Debug)]
pub struct LeaseKey {
    pub limit: Arc<str>,
    /// The hash of what the key stands for, the same on all replicas.
    pub hash: u64,
    pub amounts: SharedAmounts,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseTake {
    Taken(LeasePart),
    Refused(LeaseRefusal),
    /// The store has to be asked: [`LeaseEngine::enqueue`].
    Lacks,
}

/// What was taken, to be put back if the request does not pass for another reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeasePart {
    id: u64,
    cost: u64,
    /// `None`: it cannot be put back.
    epoch: Option<u32>,
}

/// A request that has to wait for its lease.
#[derive(Clone, Debug)]
pub struct LeaseLack {
    pub key: LeaseKey,
    pub cost: u64,
}

/// What the wait came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseOutcome {
    /// It is counted.
    Paid,
    Refused(LeaseRefusal),
}

/// The place of a request among those that wait. One whose place is dropped is counted all the same.
pub struct LeaseWait {
    engine: Arc<LeaseEngine>,
    lack: LeaseLack,
    state: LeaseWaitState,
}

enum LeaseWaitState {
    Decided(LeaseOutcome),
    Waiting(oneshot::Receiver<LeaseOutcome>),
}

pub struct LeaseEngine {
    store: Arc<dyn ShareStore>,
    timeout: Duration,
    when_gone: WhenGone,
    replica: String,
    clock: Box<dyn Fn() -> Now + Send + Sync>,
    shards: Vec<Mutex<HashMap<u64, KeyAccount>>>,
    /// Keys that may have an account. Beyond, all others have one together.
    most: AtomicUsize,
    /// Keys about which the store is to be asked.
    asks: Mutex<Vec<u64>>,
    has_asks: Notify,
    replicas: AtomicU64,
    /// The store does not answer.
    gone: AtomicBool,
    outage: AtomicU32,
    /// By the monotonic clock.
    try_again_at: AtomicU64,
    logged: Outage,
    metrics: ShareMetrics,
    started: AtomicBool,
    /// It leases nothing ahead any more.
    retired: CancellationToken,
    /// Nobody comes any more.
    closed: CancellationToken,
    /// It does not ask any more.
    ended: CancellationToken,
    gave_back: CancellationToken,
}

struct KeyAccount {
    key: LeaseKey,
    /// Its name in the store.
    name: Arc<str>,
    account: LeaseAccount,
    waiting: Vec<LeaseWaiter>,
    /// It stands among those that the store is to be asked about.
    queued: bool,
}

struct LeaseWaiter {
    cost: u64,
    done: oneshot::Sender<LeaseOutcome>,
}

/// One message, and whom its answers are for.
pub(super) struct LeaseBatch {
    requests: Vec<LeaseRequest>,
    parts: Vec<BatchPart>,
    sent: Now,
}

struct BatchPart {
    id: u64,
    report: Option<Report>,
    waiters: Vec<LeaseWaiter>,
}

impl std::fmt::Debug for LeaseEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LeaseEngine").field("when_gone", &self.when_gone).finish_non_exhaustive()
    }
}

impl LeaseKey {
    /// Its account here. Other amounts are another account.
    fn id(&self) -> u64 {
        let mut hash = SipHasher13::new_with_keys(self.hash, 0);
        self.limit.hash(&mut hash);
        self.amounts.hash(&mut hash);
        hash.finish()
    }

    /// Its name in the store. Other amounts begin anew: the store counts in units of the rate.
    fn name(&self) -> Arc<str> {
        let [flow, cost, burst, quota, monthly] = self.amounts.numbers();
        let amounts = format!("{flow}/{cost}+{burst}q{quota}{}", if monthly > 0 { "m" } else { "d" });
        format!("{}:{:016x}:{amounts}", self.limit, self.hash).into()
    }

    /// The one that keys without an account of their own have together.
    fn shared(&self) -> Self {
        Self { hash: 0, ..self.clone() }
    }
}

impl LeaseEngine {
    pub fn new(
        store: Arc<dyn ShareStore>,
        timeout: Duration,
        when_gone: WhenGone,
        metrics: ShareMetrics,
        clock: impl Fn() -> Now + Send + Sync + 'static,
    ) -> Arc<Self> {
        metrics.replicas(1);
        metrics.there(true);
        Arc::new(Self {
            store,
            timeout,
            when_gone,
            replica: format!("{:016x}", fastrand::u64(..)),
            clock: Box::new(clock),
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            most: AtomicUsize::new(usize::MAX),
            asks: Mutex::default(),
            has_asks: Notify::new(),
            replicas: AtomicU64::new(1),
            gone: AtomicBool::new(false),
            outage: AtomicU32::new(0),
            try_again_at: AtomicU64::new(0),
            logged: Outage::default(),
            metrics,
            started: AtomicBool::new(false),
            retired: CancellationToken::new(),
            closed: CancellationToken::new(),
            ended: CancellationToken::new(),
            gave_back: CancellationToken::new(),
        })
    }

    /// Bounds the number of accounts.
    pub fn keep_at_most(&self, keys: usize) {
        self.most.store(keys, Ordering::Relaxed);
    }

    fn shard(&self, id: u64) -> Option<&Mutex<HashMap<u64, KeyAccount>>> {
        self.shards.get(id as usize % SHARDS)
    }

    /// Works with the account of a key. The second argument is its id.
    fn with<T>(&self, key: &LeaseKey, work: impl FnOnce(&mut KeyAccount, u64) -> T) -> Option<T> {
        let id = key.id();
        let mut shard = self.shard(id)?.lock();
        if let Some(known) = shard.get_mut(&id) {
            return Some(work(known, id));
        }
        if shard.len() < self.most.load(Ordering::Relaxed).div_ceil(SHARDS).max(1) {
            return Some(work(shard.entry(id).or_insert_with(|| KeyAccount::new(key)), id));
        }
        drop(shard);
        let key = key.shared();
        let id = key.id();
        let mut shard = self.shard(id)?.lock();
        Some(work(shard.entry(id).or_insert_with(|| KeyAccount::new(&key)), id))
    }

    /// Takes what a request costs from what is leased.
    pub fn take(&self, key: &LeaseKey, cost: u64, now: Now) -> LeaseTake {
        let taken = self.with(key, |entry, id| match entry.account.take(cost, now) {
            AccountTake::Taken(epoch) => {
                if entry.account.runs_low() && !self.is_gone() {
                    self.queue(entry, id);
                }
                LeaseTake::Taken(LeasePart { id, cost, epoch: Some(epoch) })
            }
            AccountTake::Refused(refusal) if !self.is_gone() => LeaseTake::Refused(refusal),
            AccountTake::Refused(_) | AccountTake::Lacks => match self.is_gone() {
                true => self.decide_alone(entry, cost, now).into(),
                false => LeaseTake::Lacks,
            },
        });
        taken.unwrap_or(LeaseTake::Lacks)
    }

    /// What is known to be refused, without asking or taking anything.
    pub fn peek(&self, key: &LeaseKey, cost: u64, now: Now) -> Option<LeaseRefusal> {
        if self.is_gone() {
            return None;
        }
        let id = key.id();
        let shard = self.shard(id)?.lock();
        shard.get(&id)?.account.known_refusal(cost, now)
    }

    /// Whether the store refused the last request for a key: then others need not be counted before it is asked again.
    pub fn is_doubtful(&self, key: &LeaseKey) -> bool {
        let id = key.id();
        let known = self.shard(id).and_then(|shard| shard.lock().get(&id).map(|entry| entry.account.is_doubtful()));
        known.unwrap_or(false)
    }

    /// What is left for a key, as far as it is known here.
    pub fn remaining(&self, key: &LeaseKey) -> u64 {
        let id = key.id();
        self.shard(id).and_then(|shard| shard.lock().get(&id).map(|entry| entry.account.remaining())).unwrap_or(0)
    }

    /// Puts back what was taken for a request that does not pass after all. What was told to the store meanwhile stays counted.
    pub fn put_back(&self, part: LeasePart, now: Now) {
        if let Some(epoch) = part.epoch
            && let Some(shard) = self.shard(part.id)
            && let Some(entry) = shard.lock().get_mut(&part.id)
        {
            entry.account.put_back(part.cost, epoch, now);
        }
    }

    /// Lines a request up for the store's answer.
    pub fn enqueue(self: &Arc<Self>, lack: LeaseLack) -> LeaseWait {
        let now = (self.clock)();
        let cost = lack.cost;
        let state = self.with(&lack.key, |entry, id| {
            if self.is_gone() || entry.waiting.len() >= WAITING || self.ended.is_cancelled() {
                return LeaseWaitState::Decided(self.decide_alone(entry, cost, now));
            }
            // It may have come meanwhile.
            match entry.account.take(cost, now) {
                AccountTake::Taken(_) => return LeaseWaitState::Decided(LeaseOutcome::Paid),
                AccountTake::Refused(refusal) => return LeaseWaitState::Decided(LeaseOutcome::Refused(refusal)),
                AccountTake::Lacks => {}
            }
            let (done, wait) = oneshot::channel();
            entry.waiting.push(LeaseWaiter { cost, done });
            if !entry.account.asked {
                self.queue(entry, id);
            }
            LeaseWaitState::Waiting(wait)
        });
        let state = state.unwrap_or(LeaseWaitState::Decided(LeaseOutcome::Paid));
        LeaseWait { engine: Arc::clone(self), lack, state }
    }

    /// Without the store.
    fn decide_alone(&self, entry: &mut KeyAccount, cost: u64, now: Now) -> LeaseOutcome {
        let outage = self.outage.load(Ordering::Relaxed);
        match self.when_gone {
            WhenGone::Open => LeaseOutcome::Paid,
            WhenGone::Closed => {
                LeaseOutcome::Refused(LeaseRefusal { by: RefusedBy::Gone, wait_ms: 1_000, remaining: 0 })
            }
            WhenGone::Local => {
                let replicas = self.replicas.load(Ordering::Relaxed);
                match entry.account.take_local(&entry.key.amounts, cost, replicas, outage, now) {
                    Ok(()) => LeaseOutcome::Paid,
                    Err(refusal) => LeaseOutcome::Refused(refusal),
                }
            }
        }
    }

    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// With the account locked.
    fn queue(&self, entry: &mut KeyAccount, id: u64) {
        if !std::mem::replace(&mut entry.queued, true) {
            self.asks.lock().push(id);
            self.has_asks.notify_one();
        }
    }

    /// Begins to ask the store, on the runtime that this is called on. Once.
    pub fn start(self: &Arc<Self>) {
        if !self.started.swap(true, Ordering::AcqRel) {
            tokio::spawn(Arc::clone(self).run());
        }
    }

    /// Another engine has taken its place: gives back what is leased, and asks for those only who came before. If these decided
    /// without the store, each change would let more through than is allowed.
    pub fn retire(&self) {
        self.retired.cancel();
    }

    /// The process ends, and nobody comes any more: gives back what is leased, and waits until it is.
    pub async fn end(&self) {
        self.retire();
        self.closed.cancel();
        if self.started.load(Ordering::Acquire) {
            let _ = tokio::time::timeout(2 * ENDING, self.gave_back.cancelled()).await;
        }
    }

    async fn run(self: Arc<Self>) {
        let mut sweep = tokio::time::interval(SWEEP);
        sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut beat = tokio::time::interval(BEAT);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut under_way: FuturesUnordered<BoxFuture<'_, ()>> = FuturesUnordered::new();
        let mut beating: FuturesUnordered<BoxFuture<'_, ()>> = FuturesUnordered::new();
        loop {
            tokio::select! {
                biased;
                () = self.retired.cancelled() => break,
                Some(()) = under_way.next(), if !under_way.is_empty() => {}
                Some(()) = beating.next(), if !beating.is_empty() => {}
                () = self.has_asks.notified(), if under_way.len() < MESSAGES => {}
                _ = beat.tick(), if beating.is_empty() => beating.push(Box::pin(self.beat())),
                _ = sweep.tick() => {
                    self.sweep();
                    if self.is_gone() && beating.is_empty() && self.may_try_again() {
                        beating.push(Box::pin(self.beat()));
                    }
                }
            }
            while under_way.len() < MESSAGES
                && let Some(batch) = self.next_batch()
            {
                under_way.push(Box::pin(self.send(batch)));
            }
        }
        drop(beating);
        self.end_accounts();
        let lingers = async {
            loop {
                while under_way.len() < MESSAGES
                    && let Some(batch) = self.next_batch()
                {
                    under_way.push(Box::pin(self.send(batch)));
                }
                if under_way.is_empty() && self.closed.is_cancelled() {
                    return;
                }
                tokio::select! {
                    biased;
                    Some(()) = under_way.next(), if !under_way.is_empty() => {}
                    () = self.has_asks.notified(), if under_way.len() < MESSAGES => {}
                    _ = sweep.tick() => self.sweep(),
                    () = self.closed.cancelled(), if !self.closed.is_cancelled() => {}
                }
            }
        };
        let _ = tokio::time::timeout(LINGERING, lingers).await;
        drop(under_way);
        self.ended.cancel();
        let _ = tokio::time::timeout(ENDING, self.give_back()).await;
        self.gave_back.cancel();
    }

    pub(super) fn may_try_again(&self) -> bool {
        (self.clock)().mono_ms >= self.try_again_at.load(Ordering::Relaxed)
    }

    /// Finds accounts that the store is to be told of, and forgets those that hold nothing.
    pub(super) fn sweep(&self) {
        let now = (self.clock)();
        let outage = self.is_gone().then(|| self.outage.load(Ordering::Relaxed));
        for shard in &self.shards {
            shard.lock().retain(|id, entry| {
                if outage.is_none() && entry.account.is_due(now) {
                    self.queue(entry, *id);
                }
                let is_idle = entry.account.is_idle(&entry.key.amounts, outage, now);
                entry.queued || !entry.waiting.is_empty() || !is_idle
            });
        }
    }

    pub(super) fn next_batch(&self) -> Option<LeaseBatch> {
        let now = (self.clock)();
        let replicas = self.replicas.load(Ordering::Relaxed);
        let leases_ahead = !self.retired.is_cancelled();
        let mut all: Vec<(LeaseRequest, BatchPart)> = Vec::new();
        while all.is_empty() {
            let ids: Vec<u64> = {
                let mut asks = self.asks.lock();
                let count = asks.len().min(KEYS);
                asks.drain(..count).collect()
            };
            if ids.is_empty() {
                return None;
            }
            for id in ids {
                let Some(shard) = self.shard(id) else { continue };
                let mut shard = shard.lock();
                let Some(entry) = shard.get_mut(&id) else { continue };
                entry.queued = false;
                // One message at a time: what waits meanwhile is asked with its end.
                if !entry.account.asked {
                    entry.fill(id, replicas, leases_ahead, now, &mut all);
                }
            }
        }
        // In one order for all replicas, so that two of them cannot wait for each other in the store.
        all.sort_by(|(one, _), (other, _)| one.key.cmp(&other.key));
        let (requests, parts): (Vec<_>, Vec<_>) = all.into_iter().unzip();
        Some(LeaseBatch { requests, parts, sent: now })
    }

    pub(super) async fn send(&self, batch: LeaseBatch) {
        if self.is_gone() {
            return self.failed(batch, None);
        }
        let begun = Instant::now();
        let asked = tokio::time::timeout(self.timeout, self.store.lease(&self.replica, &batch.requests)).await;
        match asked.unwrap_or(Err(StoreError::Timeout)) {
            Ok(answers) if answers.len() == batch.requests.len() => {
                self.metrics.answered(batch.requests.len(), begun.elapsed());
                self.is_there(begun);
                self.settle(batch, &answers);
            }
            Ok(_) => self.failed(batch, Some(StoreError::Garbage("an answer is missing".into()))),
            Err(error) => self.failed(batch, Some(error)),
        }
    }

    fn settle(&self, batch: LeaseBatch, answers: &[LeaseAnswer]) {
        let now = (self.clock)();
        for ((request, part), answer) in batch.requests.iter().zip(batch.parts).zip(answers) {
            let Some(shard) = self.shard(part.id) else { continue };
            let mut shard = shard.lock();
            let Some(entry) = shard.get_mut(&part.id) else { continue };
            if let Some(report) = part.report {
                entry.account.answered(report.keeps, answer, &request.amounts, batch.sent);
                entry.account.asked = false;
            }
            let mut passed = answer.passed;
            let mut refusal = None;
            if passed > 0 && passed == request.count {
                entry.account.passed();
            }
            for waiter in part.waiters {
                let outcome = match passed.checked_sub(1) {
                    Some(rest) => {
                        passed = rest;
                        LeaseOutcome::Paid
                    }
                    None => LeaseOutcome::Refused(
                        *refusal
                            .get_or_insert_with(|| entry.account.refuse(waiter.cost, answer, &request.amounts, now)),
                    ),
                };
                // Whoever is gone by now stays counted.
                let _ = waiter.done.send(outcome);
            }
            if !entry.waiting.is_empty() && !entry.account.asked {
                self.queue(entry, part.id);
            }
        }
    }

    /// `None`: it was not asked.
    fn failed(&self, batch: LeaseBatch, error: Option<StoreError>) {
        if let Some(error) = error {
            self.metrics.failed();
            self.is_gone_with(&error);
        }
        let now = (self.clock)();
        for part in batch.parts {
            let Some(shard) = self.shard(part.id) else { continue };
            let mut shard = shard.lock();
            let Some(entry) = shard.get_mut(&part.id) else { continue };
            if let Some(report) = part.report {
                entry.account.unanswered(report.used);
            }
            // Those who came meanwhile, too.
            for waiter in part.waiters.into_iter().chain(std::mem::take(&mut entry.waiting)) {
                let _ = waiter.done.send(self.decide_alone(entry, waiter.cost, now));
            }
        }
    }

    pub(super) async fn beat(&self) {
        let begun = Instant::now();
        // A new connection takes longer than a question.
        let time = self.timeout.max(Duration::from_secs(1));
        let asked = tokio::time::timeout(time, self.store.beat(&self.replica)).await;
        match asked.unwrap_or(Err(StoreError::Timeout)) {
            Ok(replicas) => {
                self.replicas.store(replicas.max(1), Ordering::Relaxed);
                self.metrics.replicas(replicas.max(1));
                self.is_there(begun);
            }
            Err(error) => {
                self.metrics.failed();
                self.is_gone_with(&error);
            }
        }
    }

    fn is_there(&self, begun: Instant) {
        if let Some(over) = self.logged.succeeded(begun, Instant::now()) {
            let lasted = humantime::format_duration(Duration::from_millis(over.lasted.as_millis() as u64));
            log::info!("shared limits: the store answers again after {lasted}: limits are counted together again");
        }
        if self.gone.swap(false, Ordering::AcqRel) {
            self.metrics.there(true);
        }
    }

    fn is_gone_with(&self, error: &StoreError) {
        self.try_again_at.store((self.clock)().mono_ms + PAUSE_MS, Ordering::Relaxed);
        if !self.gone.swap(true, Ordering::AcqRel) {
            self.outage.fetch_add(1, Ordering::AcqRel);
            self.metrics.there(false);
        }
        if self.logged.failed(Instant::now()).is_some() {
            let replicas = self.replicas.load(Ordering::Relaxed);
            let what = match self.when_gone {
                WhenGone::Local => format!("until it answers, this gateway gives one part in {replicas} of each limit"),
                WhenGone::Open => "until it answers, they limit nothing".into(),
                WhenGone::Closed => "until it answers, requests that they apply to get 503".into(),
            };
            log::warn!("shared limits: the store does not answer: {}: {what}", said(error));
        }
    }

    /// What is leased is due to be given back.
    fn end_accounts(&self) {
        let now = (self.clock)();
        for shard in &self.shards {
            for (id, entry) in shard.lock().iter_mut() {
                entry.account.end();
                if entry.account.is_due(now) {
                    self.queue(entry, *id);
                }
            }
        }
    }

    /// Gives back what is leased, and answers nobody.
    async fn give_back(&self) {
        for shard in &self.shards {
            for entry in shard.lock().values_mut() {
                // The last message may have been dropped on its way.
                entry.account.asked = false;
                // Nobody answers those who wait: they decide alone.
                entry.waiting.clear();
            }
        }
        self.end_accounts();
        while let Some(batch) = self.next_batch() {
            self.send(batch).await;
        }
        if !self.is_gone() {
            let _ = self.store.leave(&self.replica).await;
        }
    }
}

impl KeyAccount {
    fn new(key: &LeaseKey) -> Self {
        Self {
            name: key.name(),
            key: key.clone(),
            account: LeaseAccount::default(),
            waiting: Vec::new(),
            queued: false,
        }
    }

    /// What is to be asked about the key: one request for each cost that waits.
    fn fill(&mut self, id: u64, replicas: u64, leases_ahead: bool, now: Now, all: &mut Vec<(LeaseRequest, BatchPart)>) {
        let mut waiting = std::mem::take(&mut self.waiting);
        let report = self.account.report(&self.key.amounts, replicas, !waiting.is_empty(), now);
        let mut first = Some(report);
        loop {
            let cost = waiting.first().map_or(0, |waiter| waiter.cost);
            let (waiters, rest): (Vec<_>, Vec<_>) = waiting.into_iter().partition(|waiter| waiter.cost == cost);
            waiting = rest;
            let own = first.take();
            let request = LeaseRequest {
                key: Arc::clone(&self.name),
                amounts: self.key.amounts,
                used: own.map_or(0, |report| report.used),
                keeps: own.map(|report| report.keeps),
                cost,
                count: waiters.len() as u64,
                // With several, it is leased ahead before the others have theirs: too little for them at most.
                ahead: own.filter(|_| leases_ahead).map_or(0, |report| report.ahead),
            };
            all.push((request, BatchPart { id, report: own, waiters }));
            if waiting.is_empty() {
                return;
            }
        }
    }
}

impl From<LeaseOutcome> for LeaseTake {
    fn from(outcome: LeaseOutcome) -> Self {
        match outcome {
            LeaseOutcome::Paid => Self::Taken(LeasePart { id: 0, cost: 0, epoch: None }),
            LeaseOutcome::Refused(refusal) => Self::Refused(refusal),
        }
    }
}

impl LeaseWait {
    /// Waits for the store, and not for longer than is configured.
    pub async fn outcome(self) -> LeaseOutcome {
        let Self { engine, lack, state } = self;
        let answer = match state {
            LeaseWaitState::Decided(outcome) => return outcome,
            LeaseWaitState::Waiting(wait) => tokio::time::timeout(engine.timeout, wait).await,
        };
        match answer {
            Ok(Ok(outcome)) => outcome,
            _ => {
                let now = (engine.clock)();
                let alone = engine.with(&lack.key, |entry, _| engine.decide_alone(entry, lack.cost, now));
                alone.unwrap_or(LeaseOutcome::Paid)
            }
        }
    }
}

/// For tests with a clock of their own.
#[cfg(test)]
impl LeaseEngine {
    pub(super) fn now(&self) -> Now {
        (self.clock)()
    }

    /// Everything that is due at this moment.
    pub(super) async fn turn(&self) {
        self.sweep();
        if self.is_gone() && self.may_try_again() {
            self.beat().await;
        }
        while let Some(batch) = self.next_batch() {
            self.send(batch).await;
        }
    }

    pub(super) fn accounts(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }

    pub(super) fn quota_left(&self, key: &LeaseKey) -> Option<u64> {
        let id = key.id();
        self.shard(id)?.lock().get(&id)?.account.quota_left()
    }
}
