//! 2 WHO ASKS. Validates tokens: from the cache, else by a lookup in the store, one at a time per token. A cache hit is
//! synchronous. "Unknown token" and "the store failed" never merge, and a failing store never lets a request pass.

mod cache;
mod cache_file;
mod entries;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod principal;
mod watch;

pub use cache::CacheSettings;
pub use cache_file::problems as snapshot_problems;
pub use principal::{Invalid, Principal, TokenStatus, judge};
pub use watch::TokenWatch;

use crate::clock::{LATE, Now};
use crate::store::chain::{Chain, Link};
use crate::store::credential::{Credential, Digest, DigestPrefix};
use crate::store::{Event, Lane, Mark, Named, StoreError};
use crate::telemetry::metrics::{CacheResult, Metrics, StoreMetrics};
use crate::telemetry::outage::LogThrottle;
use cache::{Cache, Cached, Learned, Stale};
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::time::timeout_at;
use watch::TokenWatches;

/// Whether a check may change any state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A request is served: a lookup or a refresh may be started, and the use is recorded.
    Serve,
    /// The result is only reported: reads the cache as it is, and changes nothing.
    Observe,
}

/// The token could not be checked: the store failed, and the cache has no usable entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CannotTell {
    /// The store is down or too slow.
    Store,
    /// The store's record of this token cannot be read.
    Record,
    /// Too many lookups are in progress, or the token changes faster than it can be looked up.
    Busy,
    /// A lookup would be needed, which [`Mode::Observe`] does not start.
    NotAsked,
}

/// Lookups in progress, or waiting for their turn, for tokens without a cache entry. Beyond it callers get 503 immediately:
/// whoever guesses must not take all memory. Tokens with an entry have no such limit, as there is one lookup for each.
const MAX_STRANGERS: usize = 8_192;
/// The same for refreshes in the background. One that is not started is tried again with the next request.
const MAX_REFRESHES: usize = 512;
/// How often a lookup is attempted if the token changes meanwhile.
const MAX_ATTEMPTS: usize = 4;
/// A power of two. Many, so that lookups of different tokens rarely share a lock.
const FLIGHT_SHARDS: usize = 64;
/// For this long after a failed lookup, callers with a stale cache entry do not wait for another lookup to fail.
const AILING_MS: u64 = 5_000;
/// For this long a known caller waits for a lookup when a store's subscription fell silent. If none is answered meanwhile,
/// the store counts as failing, and nobody waits any more.
const SILENT: Duration = Duration::from_secs(1);
/// The bound on the effect of a change, for stores with change notifications: cache entries may be used for this long
/// after the last confirmation of the subscription.
const PROMISE_MS: u64 = 1_000;
/// How often this process records that it is running.
const PULSE: Duration = Duration::from_millis(200);

/// Validates tokens. One per chain of stores; kept across reloads while its settings do not change.
pub struct Authenticator {
    inner: Arc<Inner>,
    snapshot: Option<CacheFile>,
}

/// Where the cache is saved across a restart.
struct CacheFile {
    path: PathBuf,
    /// Identifies the stores that the entries are from.
    origin: String,
}

struct Inner {
    chain: Chain,
    cache: Cache,
    /// Lookups in progress. A change of a token takes the same lock as the end of its lookup, so that either the change
    /// finds the flight and invalidates it, or the lookup's result is in the cache and the change removes it.
    flights: [Mutex<HashMap<Digest, Arc<Flight>>>; FLIGHT_SHARDS],
    /// Told of every change behind the cache: who is woken finds none of it there any more.
    watched: Arc<TokenWatches>,
    strangers: AtomicUsize,
    refreshes: AtomicUsize,
    /// Until this monotonic millisecond the store counts as failing; 0 after any successful lookup.
    ailing_until: AtomicU64,
    /// A subscription fell silent, and no lookup was answered since. It may be the subscription only, or this machine that is
    /// too busy to read: by itself it is no reason to use entries that are in doubt.
    suspected: AtomicBool,
    /// Wakes known callers who wait for a lookup: a store is suspected, or counts as failing.
    silent: Notify,
    /// What each store has said of its changes.
    hearing: Mutex<Vec<Hearing>>,
    pulse: Pulse,
    /// The stores' marks from the cache file, until the stores have reported what changed since.
    unconfirmed: Mutex<Option<Vec<Option<Mark>>>>,
    /// For the message about lookups that were repeatedly overtaken by changes.
    overtaken: LogThrottle,
    metrics: Arc<Metrics>,
    clock: fn() -> Now,
}

/// The state of the subscription to a store's changes.
enum Hearing {
    /// Not established yet; results are cached for a moment only.
    NotYet,
    /// All changes before `since`, in monotonic milliseconds, have been received.
    Yes {
        since: u64,
        mark: Option<Mark>,
    },
    Lost,
    /// The store has no change notifications, and there is no bound on revocations.
    Never,
}

impl Hearing {
    /// Until when no change in any of these stores can have been missed.
    fn until(all: &[Self]) -> u64 {
        let until = |hearing: &Self| match hearing {
            Self::NotYet | Self::Lost => 0,
            Self::Yes { since, .. } => since.saturating_add(PROMISE_MS),
            Self::Never => u64::MAX,
        };
        all.iter().map(until).min().unwrap_or(u64::MAX)
    }
}

/// Detects that this process, or its machine, was stopped for a while. Results of lookups that were in progress are
/// then outdated.
#[derive(Default)]
struct Pulse {
    /// Monotonic milliseconds; 0: not started.
    last: AtomicU64,
    /// The end of the last interruption.
    woke: AtomicU64,
}

impl Pulse {
    /// Records that the process is running. Returns the duration of an interruption, if it was too long.
    fn beat(&self, now: Now) -> Option<Duration> {
        let last = self.last.swap(now.mono_ms, Ordering::Relaxed);
        let gap = now.mono_ms.saturating_sub(last);
        if last == 0 || gap <= PROMISE_MS {
            return None;
        }
        self.woke.store(now.mono_ms, Ordering::Relaxed);
        Some(Duration::from_millis(gap))
    }

    /// Whether the process was interrupted for too long since a monotonic millisecond.
    fn was_interrupted_since(&self, mono_ms: u64, now: Now) -> bool {
        let too_long = |since: u64| now.mono_ms.saturating_sub(since) > PROMISE_MS;
        let last = self.last.load(Ordering::Relaxed);
        last != 0 && too_long(mono_ms) && (too_long(last) || self.woke.load(Ordering::Relaxed) > mono_ms)
    }
}

/// A single flight: one lookup that any number of callers wait for.
#[derive(Default)]
struct Flight {
    /// The token changed during the lookup, so the result may be outdated.
    invalidated: AtomicBool,
    /// The stores' own identifiers of the token.
    handles: Vec<Digest>,
    outcome: OnceLock<Result<TokenStatus, CannotTell>>,
    completed: Notify,
}

/// The result of a check, without waiting.
pub enum Checked {
    Known(TokenStatus, CacheResult),
    /// A lookup is in progress.
    Waiting(PendingLookup),
    /// A lookup would be needed, which [`Mode::Observe`] does not start, or the caller of [`Authenticator::check_if`].
    NotAsked,
}

/// A caller that waits for a lookup.
pub struct PendingLookup {
    digest: Digest,
    flight: Arc<Flight>,
    stale: Option<Stale>,
    inner: Arc<Inner>,
}

impl Authenticator {
    pub fn new(chain: Chain, settings: CacheSettings, metrics: Arc<Metrics>, clock: fn() -> Now) -> Self {
        let begin = |link: &Arc<Link>| {
            if !link.store.tells_changes() {
                return Hearing::Never;
            }
            link.metrics.subscribing();
            Hearing::NotYet
        };
        let hearing: Vec<_> = chain.links().iter().map(begin).collect();
        let cache = Cache::new(settings);
        cache.hear_until(Hearing::until(&hearing));
        let inner = Inner {
            chain,
            cache,
            flights: std::array::from_fn(|_| Mutex::default()),
            watched: Arc::default(),
            strangers: AtomicUsize::new(0),
            refreshes: AtomicUsize::new(0),
            ailing_until: AtomicU64::new(0),
            suspected: AtomicBool::new(false),
            silent: Notify::new(),
            hearing: Mutex::new(hearing),
            pulse: Pulse::default(),
            unconfirmed: Mutex::default(),
            overtaken: LogThrottle::default(),
            metrics,
            clock,
        };
        Self { inner: Arc::new(inner), snapshot: None }
    }

    /// Synchronous for every token that is in the cache. The digest is the token's own.
    pub fn check(&self, token: &[u8], digest: &Digest, now: Now, mode: Mode) -> Checked {
        self.check_if(token, digest, now, mode, || true)
    }

    /// The same, but asks first whether a token may be looked up that the cache does not know, and whose lookup is not in
    /// progress. If not: [`Checked::NotAsked`].
    pub fn check_if(
        &self,
        token: &[u8],
        digest: &Digest,
        now: Now,
        mode: Mode,
        may_look_up: impl FnOnce() -> bool,
    ) -> Checked {
        match self.inner.cache.get(digest, now, mode) {
            Cached::Fresh { answer, refresh } => {
                if refresh {
                    self.inner.join(token, digest, Reason::Refresh);
                }
                let result = match answer {
                    TokenStatus::Valid(_) => CacheResult::PositiveHit,
                    TokenStatus::Invalid(_) => CacheResult::NegativeHit,
                };
                Checked::Known(answer, result)
            }
            // The store has just failed: callers do not wait for it to fail again, and a background lookup probes it.
            Cached::Stale(stale) if self.inner.is_ailing(now) => {
                if stale.refresh {
                    self.inner.join(token, digest, Reason::Refresh);
                }
                Checked::Known(TokenStatus::Valid(stale.principal), CacheResult::Stale)
            }
            _ if mode == Mode::Observe => Checked::NotAsked,
            stale_or_nothing => {
                let was_known = matches!(stale_or_nothing, Cached::Stale(_));
                if !was_known && !self.inner.is_in_flight(digest) && !may_look_up() {
                    return Checked::NotAsked;
                }
                if let Some(answer) = self.inner.look_up_at_once(digest, was_known, now) {
                    return Checked::Known(answer, CacheResult::Miss);
                }
                let stale = match stale_or_nothing {
                    Cached::Stale(stale) => Some(stale),
                    _ => None,
                };
                let reason = if stale.is_some() { Reason::Stale } else { Reason::Stranger };
                let flight = self.inner.join(token, digest, reason);
                Checked::Waiting(PendingLookup { digest: *digest, flight, stale, inner: Arc::clone(&self.inner) })
            }
        }
    }

    /// The time, for those who have waited.
    pub fn now(&self) -> Now {
        (self.inner.clock)()
    }

    /// Tells of changes of one token until it is dropped. They are changes of the cache: [`Self::check`] says what has come
    /// of them.
    pub fn watch(&self, digest: &Digest) -> TokenWatch {
        self.inner.watched.watch(digest)
    }

    /// Removes a token from the cache, and invalidates a lookup in progress.
    pub fn forget(&self, digest: &Digest) {
        self.inner.forget(digest);
    }

    /// Removes all tokens whose digest has this prefix, and returns how many were in the cache.
    pub fn forget_prefix(&self, prefix: &DigestPrefix) -> usize {
        self.inner.invalidate_flights(|digest, _| digest.begins_with(prefix));
        let forgotten = self.inner.cache.forget_prefix(prefix);
        self.inner.watched.all_changed();
        forgotten
    }

    pub fn forget_all(&self) {
        self.inner.invalidate_flights(|_, _| true);
        self.inner.cache.forget_all();
        self.inner.watched.all_changed();
    }

    /// Valid and invalid entries in the cache.
    pub fn cache_sizes(&self) -> (u64, u64) {
        self.inner.cache.sizes()
    }

    /// Applies the stores' changes to the cache until the future is dropped.
    pub async fn follow_changes(&self) {
        let hears = Notify::new();
        let heard = |link: usize, event: Event| {
            let hearing = event == Event::Hearing;
            self.inner.apply(link, event);
            if hearing {
                hears.notify_one();
            }
        };
        let confirm = async {
            loop {
                hears.notified().await;
                self.inner.confirm_restored().await;
            }
        };
        let pulse = async {
            let mut ticks = tokio::time::interval(PULSE);
            loop {
                ticks.tick().await;
                if let Some(gap) = self.inner.pulse.beat((self.inner.clock)()) {
                    log::warn!(
                        "the process was not running for {}: it was stopped, or the machine was suspended or overloaded",
                        humantime::format_duration(gap)
                    );
                }
            }
        };
        tokio::join!(self.inner.chain.follow(&heard), confirm, pulse);
    }

    /// Writes the last uses of tokens to the stores. Uses that could not be written are retried with the next call.
    pub async fn flush_uses(&self) {
        let uses = self.inner.cache.take_uses((self.inner.clock)());
        if !uses.is_empty() && !self.inner.chain.note_uses(&uses).await {
            self.inner.cache.return_uses(uses);
        }
    }

    /// The names of the stores, in their order.
    pub fn store_names(&self) -> String {
        self.inner.chain.names()
    }

    /// The same, one by one.
    pub fn stores(&self) -> impl Iterator<Item = &str> {
        self.inner.chain.links().iter().map(|link| link.name.as_str())
    }

    /// The position in each store's list of changes.
    pub fn marks(&self) -> Vec<Option<Mark>> {
        self.inner.marks()
    }

    /// Whether no change can have been missed, in the stores that have notifications.
    pub fn hears(&self, now: Now) -> bool {
        self.inner.cache.hears(now)
    }

    /// Saves the cache's valid entries to a file, and loads those that are there. They are used once the stores have
    /// reported all changes since, and until then only while a store fails. A file that is missing, damaged, from other
    /// stores, or writable for other users is ignored.
    #[must_use]
    pub fn with_snapshot(self, path: &Path, origin: &str) -> Self {
        let now = (self.inner.clock)();
        match cache_file::read(path, origin, now.unix_ms) {
            Ok((marks, kept)) => {
                log::info!("{}: {} tokens restored from the cache snapshot", path.display(), kept.len());
                kept.into_iter().for_each(|entry| self.inner.cache.restore(entry, now));
                *self.inner.unconfirmed.lock() = Some(marks);
            }
            Err(why) => log::warn!("starting without a cache snapshot: {why}"),
        }
        self.saving_to(path, origin)
    }

    /// Saves the cache's valid entries to a file.
    #[must_use]
    pub fn saving_to(mut self, path: &Path, origin: &str) -> Self {
        self.snapshot = Some(CacheFile { path: path.into(), origin: origin.into() });
        self
    }

    /// Begins with the entries of another one, of the same records in the same order: a reload changed how they are reached.
    /// As with those of a file, they are used once the stores have reported all changes since, and until then only while a
    /// store fails. Without notifications no change is waited for, and they go on as they are.
    #[must_use]
    pub fn taking_over(self, before: &Self) -> Self {
        let now = (self.inner.clock)();
        // The marks first, as in `save`.
        let marks = before.inner.marks();
        before.inner.cache.saved_entries(now).into_iter().for_each(|entry| self.inner.cache.restore(entry, now));
        if self.inner.hearing.lock().iter().all(|hearing| matches!(hearing, Hearing::Never)) {
            self.inner.cache.confirm_all(now);
        } else {
            *self.inner.unconfirmed.lock() = Some(marks);
        }
        self
    }

    /// Writes the cache file, if one is configured. Blocks on the disk.
    pub fn save(&self) {
        let Some(CacheFile { path, origin }) = &self.snapshot else { return };
        let now = (self.inner.clock)();
        // The marks first: changes after them are requested at the next start.
        let marks = self.inner.marks();
        if let Err(why) = cache_file::write(path, origin, now.unix_ms, &marks, &self.inner.cache.saved_entries(now)) {
            log::error!("the cache snapshot was not written: {why}");
        }
    }
}

impl PendingLookup {
    /// The result of the lookup; if it fails, the stale cache entry if it may be used; else the caller must be refused.
    pub async fn answer(self) -> (Result<TokenStatus, CannotTell>, CacheResult) {
        let outcome = match &self.stale {
            None => self.flight.outcome().await,
            Some(_) => tokio::select! {
                biased;
                outcome = self.flight.outcome() => outcome,
                () = self.inner.falls_silent() => Err(CannotTell::Store),
            },
        };
        match (outcome, self.stale) {
            // A change that was told meanwhile has removed the entry: what it said is known to be outdated.
            (Err(why), Some(stale))
                if self.inner.excuses(why, &stale)
                    && self.inner.cache.holds(&self.digest, &stale, (self.inner.clock)()) =>
            {
                (Ok(TokenStatus::Valid(stale.principal)), CacheResult::Stale)
            }
            (outcome, _) => (outcome, CacheResult::Miss),
        }
    }
}

impl Flight {
    async fn outcome(&self) -> Result<TokenStatus, CannotTell> {
        loop {
            let completed = self.completed.notified();
            if let Some(outcome) = self.outcome.get() {
                return outcome.clone();
            }
            completed.await;
        }
    }

    fn complete(&self, outcome: Result<TokenStatus, CannotTell>) {
        // Fails if there is an outcome already, which then stands.
        let _: Result<(), _> = self.outcome.set(outcome);
        self.completed.notify_waiters();
    }
}

impl Inner {
    fn shard(&self, digest: &Digest) -> &Mutex<HashMap<Digest, Arc<Flight>>> {
        &self.flights[digest.bucket(FLIGHT_SHARDS)]
    }

    fn is_in_flight(&self, digest: &Digest) -> bool {
        self.shard(digest).lock().contains_key(digest)
    }

    /// Joins the lookup in progress for this token, or starts one, unless too many of its kind are in progress.
    fn join(self: &Arc<Self>, token: &[u8], digest: &Digest, reason: Reason) -> Arc<Flight> {
        let mut shard = self.shard(digest).lock();
        if let Some(flight) = shard.get(digest) {
            return Arc::clone(flight);
        }
        let Some(counted) = self.count(reason) else {
            drop(shard);
            self.metrics.lookup_refused();
            let refused = Flight::default();
            refused.complete(Err(CannotTell::Busy));
            return Arc::new(refused);
        };
        let credential = Arc::new(Credential::new(token, *digest));
        let flight = Arc::new(Flight { handles: self.chain.handles(&credential), ..Flight::default() });
        shard.insert(*digest, Arc::clone(&flight));
        drop(shard);
        // A separate task, because the caller that started it may disconnect while others wait.
        let task = LookupTask { credential, flight: Arc::clone(&flight), counted };
        tokio::spawn(task.run());
        flight
    }

    /// Asks stores that answer from memory. `None`: they do not, or a lookup is in progress. Those who are unknown to them are
    /// not kept in the cache: it would cost more than to ask again.
    fn look_up_at_once(&self, digest: &Digest, was_known: bool, now: Now) -> Option<TokenStatus> {
        // As at the end of a lookup: no change comes between the answer and its place in the cache.
        let flights = self.shard(digest).lock();
        if flights.contains_key(digest) {
            return None;
        }
        let record = self.chain.lookup_at_once(digest)?;
        let (answer, until_unix_ms) = judge(record.as_ref(), digest, now);
        if was_known || matches!(answer, TokenStatus::Valid(_)) {
            let learned = Learned { answer: &answer, until_unix_ms, handles: Vec::new(), asked_ms: now.mono_ms };
            self.cache.put(*digest, learned, now, fastrand::f64());
        }
        Some(answer)
    }

    fn count(self: &Arc<Self>, reason: Reason) -> Option<CountedLookup> {
        let counted = CountedLookup { inner: Arc::clone(self), reason };
        match counted.counter() {
            Some((counter, most)) if counter.fetch_add(1, Ordering::Relaxed) >= most => None,
            _ => Some(counted),
        }
    }

    /// Whether a stale entry may be used although the lookup failed. If the store is only busy and a change may have
    /// been missed, it may not, unless the subscription is lost as well: then the store is probably down, even if no
    /// lookup has failed yet.
    fn excuses(&self, why: CannotTell, stale: &Stale) -> bool {
        match why {
            CannotTell::Store | CannotTell::Record => true,
            CannotTell::NotAsked => false,
            CannotTell::Busy => !stale.doubtful || self.cache.is_deaf(),
        }
    }

    /// Returns once a store that is suspected counts as failing, as no lookup was answered for [`SILENT`].
    async fn falls_silent(&self) {
        loop {
            let woken = self.silent.notified();
            if self.is_ailing((self.clock)()) {
                return;
            }
            if !self.suspected.load(Ordering::Relaxed) {
                woken.await;
                continue;
            }
            let due = tokio::time::Instant::now() + SILENT;
            let waited = timeout_at(due, woken).await.is_err();
            if waited && due.elapsed() <= LATE && self.suspected.load(Ordering::Relaxed) {
                self.note_health(Some(&StoreError::Timeout), (self.clock)());
                self.silent.notify_waiters();
            }
        }
    }

    /// Records whether the store works. A store that is busy, or has one invalid record, is not down.
    fn note_health(&self, error: Option<&StoreError>, now: Now) {
        let until = match error {
            None => {
                self.suspected.store(false, Ordering::Relaxed);
                0
            }
            Some(
                StoreError::Unavailable(_)
                | StoreError::Denied(_)
                | StoreError::ReadOnly(_)
                | StoreError::Unusable(_)
                | StoreError::Timeout
                | StoreError::CircuitOpen,
            ) => now.mono_ms + AILING_MS,
            Some(StoreError::Overloaded | StoreError::Garbage(_)) => return,
        };
        self.ailing_until.store(until, Ordering::Relaxed);
    }

    fn is_ailing(&self, now: Now) -> bool {
        let until = self.ailing_until.load(Ordering::Relaxed);
        now.mono_ms < until && !self.pulse.was_interrupted_since(until.saturating_sub(AILING_MS), now)
    }

    /// The position in each store's list of changes.
    fn marks(&self) -> Vec<Option<Mark>> {
        let mark = |hearing: &Hearing| match hearing {
            Hearing::Yes { mark, .. } => mark.clone(),
            Hearing::NotYet | Hearing::Lost | Hearing::Never => None,
        };
        self.hearing.lock().iter().map(mark).collect()
    }

    fn forget(&self, digest: &Digest) {
        let shard = self.shard(digest).lock();
        if let Some(flight) = shard.get(digest) {
            flight.invalidated.store(true, Ordering::Relaxed);
        }
        self.cache.forget(digest);
        drop(shard);
        self.watched.changed(digest);
    }

    /// Invalidates some of the lookups in progress. One lock at a time: a lookup that completed before its lock was
    /// taken here has put its result into the cache, so a subsequent iteration over the cache finds it; a lookup that
    /// starts meanwhile reads the store after the change.
    fn invalidate_flights(&self, concerned: impl Fn(&Digest, &Flight) -> bool) {
        for shard in &self.flights {
            for (digest, flight) in shard.lock().iter() {
                if concerned(digest, flight) {
                    flight.invalidated.store(true, Ordering::Relaxed);
                }
            }
        }
    }

    fn forget_handles(&self, handles: &HashSet<Digest>) {
        self.invalidate_flights(|_, flight| flight.handles.iter().any(|handle| handles.contains(handle)));
        self.cache.forget_handles(handles);
        self.watched.all_changed();
    }

    fn apply(&self, link: usize, event: Event) {
        let Some((name, metrics)) = self.chain.links().get(link).map(|link| (&link.name, &link.metrics)) else {
            return;
        };
        match event {
            Event::Changed(changes) => {
                let mut handles = HashSet::new();
                for change in &changes {
                    match change.token {
                        Named::Token(digest) => self.forget(&digest),
                        Named::Handle(handle) => {
                            handles.insert(handle);
                        }
                    }
                }
                if !handles.is_empty() {
                    self.forget_handles(&handles);
                }
                let now = (self.clock)().unix_ms;
                for change in changes {
                    metrics.revocation_lag(Duration::from_millis(now.saturating_sub(change.at_ms)));
                }
            }
            // Known callers need not wait for lookups to fail, which takes longer.
            Event::Silent => {
                self.suspected.store(true, Ordering::Relaxed);
                self.silent.notify_waiters();
            }
            Event::Deaf => {
                log::error!(
                    "store {name}: change notifications are not arriving; cached answers are trusted for less than a \
                     second until they do"
                );
                self.hearing_changed(link, metrics, Hearing::Lost);
            }
            Event::Hearing => {
                log::info!("store {name}: change notifications are arriving; all tokens are looked up again");
                let since = (self.clock)().mono_ms;
                self.hearing_changed(link, metrics, Hearing::Yes { since, mark: None });
            }
            Event::Unheard(cause, _) => metrics.unheard(Some(cause.as_str())),
            Event::Alive { asked_ms, mark } => self.alive(link, asked_ms, mark),
            Event::Untold => {
                let mut all = self.hearing.lock();
                if let Some(hearing) = all.get_mut(link) {
                    *hearing = Hearing::Never;
                }
                self.cache.hear_until(Hearing::until(&all));
            }
        }
    }

    /// The subscription was confirmed: cache entries may be used for a while longer.
    fn alive(&self, link: usize, asked_ms: u64, told: Option<Mark>) {
        let mut all = self.hearing.lock();
        if let Some(Hearing::Yes { since, mark }) = all.get_mut(link) {
            *since = asked_ms.max(*since);
            *mark = told;
        }
        self.cache.hear_until(Hearing::until(&all));
    }

    fn hearing_changed(&self, link: usize, metrics: &StoreMetrics, now: Hearing) {
        let hears = matches!(now, Hearing::Yes { .. });
        let mut all = self.hearing.lock();
        if let Some(hearing) = all.get_mut(link) {
            *hearing = now;
        }
        if hears {
            // The store can be reached, so earlier failures do not count any more.
            self.suspected.store(false, Ordering::Relaxed);
            self.ailing_until.store(0, Ordering::Relaxed);
        }
        // Shorten the lifetimes before marking the entries, so that no lookup that completes in between gets a longer
        // one.
        self.cache.set_deaf(all.iter().any(|hearing| matches!(hearing, Hearing::Lost)));
        self.cache.hear_until(Hearing::until(&all));
        self.invalidate_flights(|_, _| true);
        self.cache.doubt_all();
        self.watched.all_changed();
        metrics.subscribed(hears);
        metrics.rechecked();
    }

    /// Trusts the restored entries as far as the stores can list what changed since they were saved. The subscriptions are
    /// established by now, so that no change is missed in between.
    async fn confirm_restored(&self) {
        // Until the subscriptions to all stores are established, a change could be missed.
        if Hearing::until(&self.hearing.lock()) == 0 {
            return;
        }
        let Some(marks) = self.unconfirmed.lock().take() else { return };
        match self.chain.changed_since(&marks).await {
            Ok(Some(changed)) => {
                changed.iter().for_each(|digest| self.forget(digest));
                self.cache.confirm_all((self.clock)());
                log::info!("earlier cache entries are in use, except for {} tokens that changed since", changed.len());
            }
            Ok(None) => {
                log::info!(
                    "the stores cannot report what changed meanwhile: earlier cache entries are used only while a store is down"
                )
            }
            Err(error) => log::warn!("earlier cache entries are used only while a store is down: {error}"),
        }
    }
}

/// Why a token is looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    /// Its entry may be used, and will not be for long.
    Refresh,
    /// Its entry may not be used, or only if the store fails.
    Stale,
    /// It has no entry.
    Stranger,
}

impl Reason {
    const fn lane(self) -> Lane {
        match self {
            Self::Refresh | Self::Stale => Lane::Known,
            Self::Stranger => Lane::Stranger,
        }
    }
}

/// A lookup that counts among those of its kind until it is dropped.
struct CountedLookup {
    inner: Arc<Inner>,
    reason: Reason,
}

impl CountedLookup {
    /// The counter of its kind, and the limit.
    fn counter(&self) -> Option<(&AtomicUsize, usize)> {
        match self.reason {
            Reason::Refresh => Some((&self.inner.refreshes, MAX_REFRESHES)),
            Reason::Stale => None,
            Reason::Stranger => Some((&self.inner.strangers, MAX_STRANGERS)),
        }
    }
}

impl Drop for CountedLookup {
    fn drop(&mut self) {
        if let Some((counter, _)) = self.counter() {
            counter.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Performs one lookup. If it is dropped early (by a panic, or a shutdown of the runtime), the lookup fails.
struct LookupTask {
    credential: Arc<Credential>,
    flight: Arc<Flight>,
    counted: CountedLookup,
}

impl LookupTask {
    async fn run(self) {
        let (inner, mut was_interrupted) = (&self.counted.inner, false);
        for _ in 0..MAX_ATTEMPTS {
            let asked_ms = (inner.clock)().mono_ms;
            let result = inner.chain.lookup(&self.credential, self.counted.reason.lane()).await;
            let mut shard = inner.shard(self.credential.digest()).lock();
            // A failure that took its time is none the better for a change meanwhile, and its caller has waited enough.
            let took_all_time = matches!(result, Err(StoreError::Timeout | StoreError::Overloaded));
            if self.flight.invalidated.swap(false, Ordering::Relaxed) && !took_all_time {
                continue;
            }
            let now = (inner.clock)();
            // The result, or the failure, is outdated.
            if !was_interrupted && inner.pulse.was_interrupted_since(asked_ms, now) {
                was_interrupted = true;
                continue;
            }
            inner.note_health(result.as_ref().err(), now);
            let outcome = match result {
                Ok(record) => {
                    let (answer, until_unix_ms) = judge(record.as_ref(), self.credential.digest(), now);
                    let handles = self.flight.handles.clone();
                    let learned = Learned { answer: &answer, until_unix_ms, handles, asked_ms };
                    inner.cache.put(*self.credential.digest(), learned, now, fastrand::f64());
                    Ok(answer)
                }
                Err(StoreError::Overloaded) => Err(CannotTell::Busy),
                Err(StoreError::Garbage(_)) => Err(CannotTell::Record),
                Err(_) => Err(CannotTell::Store),
            };
            shard.remove(self.credential.digest());
            drop(shard);
            self.flight.complete(outcome);
            return;
        }
        if let Some(more) = inner.overtaken.due(Instant::now()) {
            let token = self.credential.digest().id();
            log::warn!(
                "token {token} changed {MAX_ATTEMPTS} times while it was looked up; its callers get 503 ({more} similar \
                 messages suppressed)"
            );
        }
        self.flight.complete(Err(CannotTell::Busy));
    }
}

impl Drop for LookupTask {
    fn drop(&mut self) {
        let mut shard = self.counted.inner.shard(self.credential.digest()).lock();
        if shard.get(self.credential.digest()).is_some_and(|flight| Arc::ptr_eq(flight, &self.flight)) {
            shard.remove(self.credential.digest());
        }
        drop(shard);
        self.flight.complete(Err(CannotTell::Store));
    }
}

#[cfg(test)]
mod race_tests;

#[cfg(test)]
mod tests;
