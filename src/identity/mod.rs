//! 2 WHO ASKS. Cache, then one look-up per token at a time, then the store. A cache hit is synchronous.
//! Unknown and cannot-tell never merge, and a store that can't tell never opens the gate.

mod cache;
mod cache_file;
mod principal;

pub use cache::CacheSettings;
pub use cache_file::problems as snapshot_problems;
pub use principal::{Invalid, Principal, TokenStatus, judge};

use crate::clock::Now;
use crate::store::chain::Chain;
use crate::store::credential::{Credential, Digest, DigestPrefix};
use crate::store::{Event, Mark, Named, StoreError};
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

/// Whether asking for a verdict may change anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A request is served: a look-up may be started, a refresh claimed, a use noted.
    Serve,
    /// Somebody asks what would happen: only what is known at this moment is looked at, and nothing changes.
    Observe,
}

/// The store can't tell, and nothing is known from before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CannotTell {
    /// It is down, too slow, or answered nonsense.
    Store,
    /// More look-ups are under way than there may be, or a token changes faster than it can be looked up.
    Busy,
    /// [`Mode::Observe`] asks no store.
    NotAsked,
}

/// Look-ups under way at once; beyond them callers get 503 at once instead of a place in a queue without end.
const MAX_LOOKUPS: usize = 1_024;
/// Of these, what nobody waits for may take up so many: refreshing what is known never keeps newcomers out.
const MAX_REFRESHES: usize = MAX_LOOKUPS / 2;
/// And tokens of which nothing is known so many: a flood of guesses never keeps known callers out.
const MAX_STRANGERS: usize = MAX_LOOKUPS / 4 * 3;
/// A look-up that was overtaken by a change is repeated this often.
const MAX_ATTEMPTS: usize = 4;
/// A power of two: flights of different tokens seldom share a lock.
const FLIGHT_SHARDS: usize = 64;
/// For so long behind a failed look-up, callers with a known identity don't wait to see the store fail again.
const AILING_MS: u64 = 5_000;
/// A change takes effect within this time where the store tells of changes: what is known counts for no longer behind the
/// last sign that it does.
const PROMISE_MS: u64 = 1_000;
/// How often this process notes that it runs.
const PULSE: Duration = Duration::from_millis(200);

/// Validates tokens. One for each chain of stores; lives across reloads as long as its settings do.
pub struct Authenticator {
    inner: Arc<Inner>,
    snapshot: Option<CacheFile>,
}

/// Where the cache is kept over a restart.
struct CacheFile {
    path: PathBuf,
    /// Which stores it is of.
    origin: String,
}

struct Inner {
    chain: Chain,
    cache: Cache,
    /// Look-ups under way. A change of a token takes the same lock as the end of its look-up, so that either the
    /// change sees the flight and taints it, or the look-up's result is in the cache for the change to remove.
    flights: [Mutex<HashMap<Digest, Arc<Flight>>>; FLIGHT_SHARDS],
    lookups: AtomicUsize,
    /// Until this monotonic millisecond the store is taken to be failing; 0 behind any answer of it.
    ailing_until: AtomicU64,
    /// What each store has said of its changes.
    hearing: Mutex<Vec<Hearing>>,
    pulse: Pulse,
    /// The stores' marks from a snapshot that waits for them to vouch for it.
    unvouched: Mutex<Option<Vec<Option<Mark>>>>,
    /// Look-ups that changes overtook again and again.
    overtaken: LogThrottle,
    metrics: Arc<Metrics>,
    clock: fn() -> Now,
}

/// Whether a store tells of its changes.
enum Hearing {
    /// It has not said yet; nothing counts for longer than while it doesn't.
    NotYet,
    /// All that changed before `since`, in monotonic milliseconds, was told.
    Yes {
        since: u64,
        mark: Option<Mark>,
    },
    Lost,
    /// Nobody tells of changes, and nothing is promised.
    Never,
}

impl Hearing {
    /// Until when no change of any of these stores can have been missed.
    fn until(all: &[Self]) -> u64 {
        let until = |hearing: &Self| match hearing {
            Self::NotYet | Self::Lost => 0,
            Self::Yes { since, .. } => since.saturating_add(PROMISE_MS),
            Self::Never => u64::MAX,
        };
        all.iter().map(until).min().unwrap_or(u64::MAX)
    }
}

/// Whether this process ran all the time, or was stopped, or its machine was. What was under way then is old.
#[derive(Default)]
struct Pulse {
    /// Monotonic milliseconds; 0: nobody has begun to note.
    last: AtomicU64,
    /// The end of the last standstill.
    woke: AtomicU64,
}

impl Pulse {
    /// Notes that it runs. Returns how long it did not, if that is too long.
    fn beat(&self, now: Now) -> Option<Duration> {
        let last = self.last.swap(now.mono_ms, Ordering::Relaxed);
        let gap = now.mono_ms.saturating_sub(last);
        if last == 0 || gap <= PROMISE_MS {
            return None;
        }
        self.woke.store(now.mono_ms, Ordering::Relaxed);
        Some(Duration::from_millis(gap))
    }

    /// Whether it stood still since a monotonic millisecond, as far as that matters.
    fn stood_still_since(&self, mono_ms: u64, now: Now) -> bool {
        let too_long = |since: u64| now.mono_ms.saturating_sub(since) > PROMISE_MS;
        let last = self.last.load(Ordering::Relaxed);
        last != 0 && too_long(mono_ms) && (too_long(last) || self.woke.load(Ordering::Relaxed) > mono_ms)
    }
}

/// One look-up that any number of callers wait for.
#[derive(Default)]
struct Flight {
    /// The token changed while the store was asked: what it answered may be from before.
    tainted: AtomicBool,
    /// What stores call the token.
    handles: Vec<Digest>,
    outcome: OnceLock<Result<TokenStatus, CannotTell>>,
    landed: Notify,
}

/// What can be said at once.
pub enum Checked {
    Known(TokenStatus, CacheResult),
    /// The store must be asked.
    Waiting(Waiting),
    /// The store would have to be asked, which [`Mode::Observe`] does not do.
    NotAsked,
}

/// A caller that waits for a look-up.
pub struct Waiting {
    flight: Arc<Flight>,
    stale: Option<Stale>,
    inner: Arc<Inner>,
}

impl Authenticator {
    pub fn new(chain: Chain, settings: CacheSettings, metrics: Arc<Metrics>, clock: fn() -> Now) -> Self {
        let unheard = |hears: bool| if hears { Hearing::NotYet } else { Hearing::Never };
        let hearing: Vec<_> = chain.links().iter().map(|link| unheard(link.store.tells_changes())).collect();
        let cache = Cache::new(settings);
        cache.hear_until(Hearing::until(&hearing));
        let inner = Inner {
            chain,
            cache,
            flights: std::array::from_fn(|_| Mutex::default()),
            lookups: AtomicUsize::new(0),
            ailing_until: AtomicU64::new(0),
            hearing: Mutex::new(hearing),
            pulse: Pulse::default(),
            unvouched: Mutex::default(),
            overtaken: LogThrottle::default(),
            metrics,
            clock,
        };
        Self { inner: Arc::new(inner), snapshot: None }
    }

    /// Synchronous for every token that is in the cache. The digest is the token's own.
    pub fn check(&self, token: &[u8], digest: &Digest, now: Now, mode: Mode) -> Checked {
        match self.inner.cache.get(digest, now, mode) {
            Cached::Fresh { answer, refresh } => {
                if refresh {
                    self.inner.join(Credential::new(token, *digest), MAX_REFRESHES);
                }
                let result = match answer {
                    TokenStatus::Valid(_) => CacheResult::PositiveHit,
                    TokenStatus::Invalid(_) => CacheResult::NegativeHit,
                };
                Checked::Known(answer, result)
            }
            // The store has just failed: nobody waits to see it fail again, and somebody finds out when it is back.
            Cached::Stale(stale) if self.inner.is_ailing(now) => {
                if stale.refresh {
                    self.inner.join(Credential::new(token, *digest), MAX_REFRESHES);
                }
                Checked::Known(TokenStatus::Valid(stale.principal), CacheResult::Stale)
            }
            _ if mode == Mode::Observe => Checked::NotAsked,
            stale_or_nothing => {
                let stale = match stale_or_nothing {
                    Cached::Stale(stale) => Some(stale),
                    _ => None,
                };
                let most = if stale.is_some() { MAX_LOOKUPS } else { MAX_STRANGERS };
                let flight = self.inner.join(Credential::new(token, *digest), most);
                Checked::Waiting(Waiting { flight, stale, inner: Arc::clone(&self.inner) })
            }
        }
    }

    /// Forgets what is known about a token, a look-up under way included.
    pub fn forget(&self, digest: &Digest) {
        self.inner.forget(digest);
    }

    /// Forgets all tokens whose digest begins so, and says how many were known.
    pub fn forget_prefix(&self, prefix: &DigestPrefix) -> usize {
        self.inner.taint_flights(|digest, _| digest.begins_with(prefix));
        self.inner.cache.forget_prefix(prefix)
    }

    pub fn forget_all(&self) {
        self.inner.taint_flights(|_, _| true);
        self.inner.cache.forget_all();
    }

    /// Valid and invalid entries in the cache.
    pub fn cache_sizes(&self) -> (u64, u64) {
        self.inner.cache.sizes()
    }

    /// Follows the stores' changes until it is dropped.
    pub async fn follow_changes(&self) {
        let hears = Notify::new();
        let heard = |link: usize, event: Event| {
            let hearing = event == Event::Hearing;
            self.inner.apply(link, event);
            if hearing {
                hears.notify_one();
            }
        };
        let vouch = async {
            loop {
                hears.notified().await;
                self.inner.vouch_for_snapshot().await;
            }
        };
        let pulse = async {
            let mut ticks = tokio::time::interval(PULSE);
            loop {
                ticks.tick().await;
                if let Some(gap) = self.inner.pulse.beat((self.inner.clock)()) {
                    log::warn!(
                        "nothing was done for {gap:?}: was the process stopped, or the machine suspended or overloaded?"
                    );
                }
            }
        };
        tokio::join!(self.inner.chain.follow(&heard), vouch, pulse);
    }

    /// Tells the stores which tokens were used since the last time. What a store could not take is told again then.
    pub async fn flush_uses(&self) {
        let uses = self.inner.cache.take_uses((self.inner.clock)());
        if !uses.is_empty() && !self.inner.chain.note_uses(&uses).await {
            self.inner.cache.untold_uses(uses);
        }
    }

    /// The stores' names, in their order.
    pub fn store_names(&self) -> String {
        self.inner.chain.names()
    }

    /// How far each store had told of its changes.
    pub fn marks(&self) -> Vec<Option<Mark>> {
        self.inner.marks()
    }

    /// Whether no change can have been missed, of the stores that tell of them.
    pub fn hears(&self, now: Now) -> bool {
        self.inner.cache.hears(now)
    }

    /// Keeps what is known of valid tokens in a file, and begins with what stands there: believed once the stores have
    /// named all that changed since, and otherwise only while a store can't be asked. A file that is missing, damaged,
    /// of other stores, or that somebody else could have written is left alone.
    #[must_use]
    pub fn with_snapshot(mut self, path: &Path, origin: &str) -> Self {
        let now = (self.inner.clock)();
        match cache_file::read(path, origin, now.unix_ms) {
            Ok((marks, kept)) => {
                log::info!("{}: {} tokens are known from before", path.display(), kept.len());
                kept.into_iter().for_each(|entry| self.inner.cache.restore(entry, now));
                *self.inner.unvouched.lock() = Some(marks);
            }
            Err(why) => log::warn!("no snapshot of the token cache: {why}"),
        }
        self.snapshot = Some(CacheFile { path: path.into(), origin: origin.into() });
        self
    }

    /// Writes the snapshot, if there is to be one. Blocks for as long as the disk takes.
    pub fn save(&self) {
        let Some(CacheFile { path, origin }) = &self.snapshot else { return };
        let now = (self.inner.clock)();
        // The marks first: whatever changes behind them is asked for at the start.
        let marks = self.inner.marks();
        if let Err(why) = cache_file::write(path, origin, now.unix_ms, &marks, &self.inner.cache.kept(now)) {
            log::error!("the snapshot of the token cache was not written: {why}");
        }
    }
}

impl Waiting {
    /// The store's answer; the last known valid one when the store can't tell; else the caller must be refused.
    pub async fn answer(self) -> (Result<TokenStatus, CannotTell>, CacheResult) {
        let outcome = self.flight.landing().await;
        match (outcome, self.stale) {
            (Err(why), Some(stale)) if self.inner.excuses(why, &stale) => {
                (Ok(TokenStatus::Valid(stale.principal)), CacheResult::Stale)
            }
            (outcome, _) => (outcome, CacheResult::Miss),
        }
    }
}

impl Flight {
    async fn landing(&self) -> Result<TokenStatus, CannotTell> {
        loop {
            let landed = self.landed.notified();
            if let Some(outcome) = self.outcome.get() {
                return outcome.clone();
            }
            landed.await;
        }
    }

    fn land(&self, outcome: Result<TokenStatus, CannotTell>) {
        // A second landing changes nothing: the first outcome stands.
        let _: Result<(), _> = self.outcome.set(outcome);
        self.landed.notify_waiters();
    }
}

impl Inner {
    fn shard(&self, digest: &Digest) -> &Mutex<HashMap<Digest, Arc<Flight>>> {
        &self.flights[digest.bucket(FLIGHT_SHARDS)]
    }

    /// Joins the look-up that is under way for this token, or starts one if fewer than `most` are.
    fn join(self: &Arc<Self>, credential: Credential, most: usize) -> Arc<Flight> {
        let mut shard = self.shard(credential.digest()).lock();
        if let Some(flight) = shard.get(credential.digest()) {
            return Arc::clone(flight);
        }
        let flight = Arc::new(Flight { handles: self.chain.handles(&credential), ..Flight::default() });
        if self.lookups.fetch_add(1, Ordering::Relaxed) >= most {
            self.lookups.fetch_sub(1, Ordering::Relaxed);
            self.metrics.lookup_refused();
            flight.land(Err(CannotTell::Busy));
            return flight;
        }
        shard.insert(*credential.digest(), Arc::clone(&flight));
        drop(shard);
        // A task of its own: the caller that started it may go away while others wait.
        let pilot = Pilot { inner: Arc::clone(self), credential, flight: Arc::clone(&flight) };
        tokio::spawn(pilot.fly());
        flight
    }

    /// Whether what was known may be believed although the store was not heard. A store that is busy is no excuse where
    /// a change may have been missed; unless word of changes does not come either, which is what a store that is down
    /// looks like before the first look-up has failed.
    fn excuses(&self, why: CannotTell, stale: &Stale) -> bool {
        match why {
            CannotTell::Store => true,
            CannotTell::NotAsked => false,
            CannotTell::Busy => !stale.doubtful || self.cache.is_deaf(),
        }
    }

    /// Remembers whether the store answers. One that is busy, or has one bad record, is not down.
    fn note_health(&self, error: Option<&StoreError>, now: Now) {
        let until = match error {
            None => 0,
            Some(StoreError::Unavailable(_) | StoreError::Timeout | StoreError::CircuitOpen) => now.mono_ms + AILING_MS,
            Some(StoreError::Overloaded | StoreError::Garbage(_)) => return,
        };
        self.ailing_until.store(until, Ordering::Relaxed);
    }

    fn is_ailing(&self, now: Now) -> bool {
        let until = self.ailing_until.load(Ordering::Relaxed);
        now.mono_ms < until && !self.pulse.stood_still_since(until.saturating_sub(AILING_MS), now)
    }

    /// How far each store had told of its changes.
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
            flight.tainted.store(true, Ordering::Relaxed);
        }
        self.cache.forget(digest);
    }

    /// Says of some look-ups under way that what they find may be from before now. One lock at a time: a look-up that
    /// is not seen here because it has landed has put its result into the cache before its lock was taken, so that a
    /// walk over the cache behind this finds it; one that is begun meanwhile asks the store behind the change.
    fn taint_flights(&self, concerned: impl Fn(&Digest, &Flight) -> bool) {
        for shard in &self.flights {
            for (digest, flight) in shard.lock().iter() {
                if concerned(digest, flight) {
                    flight.tainted.store(true, Ordering::Relaxed);
                }
            }
        }
    }

    fn forget_handles(&self, handles: &HashSet<Digest>) {
        self.taint_flights(|_, flight| flight.handles.iter().any(|handle| handles.contains(handle)));
        self.cache.forget_handles(handles);
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
                        Named::Handle(handle) => drop(handles.insert(handle)),
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
            Event::Deaf => {
                log::error!(
                    "store {name}: word of changes does not come; answers count for less than a second until it does"
                );
                self.hearing_changed(link, metrics, Hearing::Lost);
            }
            Event::Hearing => {
                log::info!("store {name}: word of changes comes; all tokens are looked up anew");
                let since = (self.clock)().mono_ms;
                self.hearing_changed(link, metrics, Hearing::Yes { since, mark: None });
            }
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

    /// All that changed before was told, so that what is known counts for a while longer.
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
            // It can be reached: whatever failed before is no excuse any more.
            self.ailing_until.store(0, Ordering::Relaxed);
        }
        // First the shorter lifetimes and then the doubt, so that nothing that lands between gets the longer ones.
        self.cache.set_deaf(all.iter().any(|hearing| matches!(hearing, Hearing::Lost)));
        self.cache.hear_until(Hearing::until(&all));
        self.taint_flights(|_, _| true);
        self.cache.doubt_all();
        metrics.subscribed(hears);
        metrics.rechecked();
    }

    /// Believes a snapshot as far as the stores can say what changed since it was taken. Word of changes comes by now,
    /// so that nothing slips through between.
    async fn vouch_for_snapshot(&self) {
        // Before all stores tell of changes, one could slip through between.
        if Hearing::until(&self.hearing.lock()) == 0 {
            return;
        }
        let Some(marks) = self.unvouched.lock().take() else { return };
        match self.chain.changed_since(&marks).await {
            Ok(Some(changed)) => {
                changed.iter().for_each(|digest| self.forget(digest));
                self.cache.vouch_all((self.clock)());
                log::info!(
                    "the snapshot of the token cache holds, but for {} tokens that changed since",
                    changed.len()
                );
            }
            Ok(None) => {
                log::info!("no store says what changed since the snapshot: it serves only while a store is down")
            }
            Err(error) => log::warn!("the snapshot serves only while a store is down: {error}"),
        }
    }
}

/// Carries one look-up through. Dropped early (a panic, the runtime's end), it lands as cannot-tell.
struct Pilot {
    inner: Arc<Inner>,
    credential: Credential,
    flight: Arc<Flight>,
}

impl Pilot {
    async fn fly(self) {
        let mut stood_still = false;
        for _ in 0..MAX_ATTEMPTS {
            let asked_ms = (self.inner.clock)().mono_ms;
            let result = self.inner.chain.lookup(&self.credential).await;
            let mut shard = self.inner.shard(self.credential.digest()).lock();
            if self.flight.tainted.swap(false, Ordering::Relaxed) {
                continue;
            }
            let now = (self.inner.clock)();
            // The answer, or that there was none, is from before.
            if !stood_still && self.inner.pulse.stood_still_since(asked_ms, now) {
                stood_still = true;
                continue;
            }
            self.inner.note_health(result.as_ref().err(), now);
            let outcome = match result {
                Ok(record) => {
                    let (answer, until_unix_ms) = judge(record.as_ref(), self.credential.digest(), now);
                    let handles = self.flight.handles.clone();
                    let learned = Learned { answer: &answer, until_unix_ms, handles, asked_ms };
                    self.inner.cache.put(*self.credential.digest(), learned, now, fastrand::f64());
                    Ok(answer)
                }
                Err(StoreError::Overloaded) => Err(CannotTell::Busy),
                Err(_) => Err(CannotTell::Store),
            };
            shard.remove(self.credential.digest());
            drop(shard);
            self.flight.land(outcome);
            return;
        }
        if let Some(more) = self.inner.overtaken.due(Instant::now()) {
            let token = self.credential.digest().id();
            log::warn!(
                "token {token} changed {MAX_ATTEMPTS} times while it was looked up; its callers get 503 ({more} more \
                 like it since this was said last)"
            );
        }
        self.flight.land(Err(CannotTell::Busy));
    }
}

impl Drop for Pilot {
    fn drop(&mut self) {
        self.inner.lookups.fetch_sub(1, Ordering::Relaxed);
        let mut shard = self.inner.shard(self.credential.digest()).lock();
        if shard.get(self.credential.digest()).is_some_and(|flight| Arc::ptr_eq(flight, &self.flight)) {
            shard.remove(self.credential.digest());
        }
        drop(shard);
        self.flight.land(Err(CannotTell::Store));
    }
}

#[cfg(test)]
mod tests;
