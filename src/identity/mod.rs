//! 2 WHO ASKS. Cache, then one look-up per token at a time, then the store. A cache hit is synchronous.
//! Unknown and cannot-tell never merge, and a store that can't tell never opens the gate.

mod cache;
pub mod credential;
mod principal;
pub mod store;

pub use cache::{Answer, CacheSettings};
pub use principal::{Invalid, Principal};

use crate::Now;
use crate::telemetry::metrics::{CacheResult, Metrics};
use cache::{Cache, Cached};
use credential::{Credential, Digest};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use store::{Changes, StoreError, TokenStore};
use tokio::sync::Notify;

/// The store can't tell, and nothing is known from before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CannotTell;

/// Look-ups under way at once; beyond them callers get 503 at once instead of a place in a queue without end.
const MAX_LOOKUPS: usize = 1_024;
/// A look-up that was overtaken by a change is repeated this often.
const MAX_ATTEMPTS: usize = 4;
/// A power of two: flights of different tokens seldom share a lock.
const FLIGHT_SHARDS: usize = 64;

/// Validates tokens. One for each store; lives across reloads as long as its settings do.
pub struct Authenticator {
    inner: Arc<Inner>,
}

struct Inner {
    store: Arc<dyn TokenStore>,
    cache: Cache,
    /// Look-ups under way. A change of a token takes the same lock as the end of its look-up, so that either the
    /// change sees the flight and taints it, or the look-up's result is in the cache for the change to remove.
    flights: [Mutex<HashMap<Digest, Arc<Flight>>>; FLIGHT_SHARDS],
    lookups: AtomicUsize,
    timeout: Duration,
    metrics: Arc<Metrics>,
    clock: fn() -> Now,
}

/// One look-up that any number of callers wait for.
#[derive(Default)]
struct Flight {
    /// The token changed while the store was asked: what it answered may be from before.
    tainted: AtomicBool,
    outcome: OnceLock<Result<Answer, CannotTell>>,
    landed: Notify,
}

/// What can be said at once.
pub enum Checked {
    Known(Answer),
    /// The store must be asked.
    Waiting(Waiting),
}

/// A caller that waits for a look-up.
pub struct Waiting {
    flight: Arc<Flight>,
    stale: Option<Arc<Principal>>,
    metrics: Arc<Metrics>,
}

impl Authenticator {
    pub fn new(
        store: Arc<dyn TokenStore>,
        settings: CacheSettings,
        timeout: Duration,
        metrics: Arc<Metrics>,
        clock: fn() -> Now,
    ) -> Self {
        let flights = std::array::from_fn(|_| Mutex::default());
        let cache = Cache::new(settings);
        Self { inner: Arc::new(Inner { store, cache, flights, lookups: AtomicUsize::new(0), timeout, metrics, clock }) }
    }

    /// Synchronous for every token that is in the cache.
    pub fn check(&self, token: &[u8], now: Now) -> Checked {
        let digest = Digest::of(token);
        match self.inner.cache.get(&digest, now) {
            Cached::Answer { answer, refresh } => {
                if refresh {
                    self.inner.join(Credential::new(token, digest));
                }
                self.inner.metrics.cache_lookup(match answer {
                    Answer::Valid(_) => CacheResult::PositiveHit,
                    Answer::Invalid(_) => CacheResult::NegativeHit,
                });
                Checked::Known(answer)
            }
            stale_or_nothing => {
                self.inner.metrics.cache_lookup(CacheResult::Miss);
                let stale = match stale_or_nothing {
                    Cached::Stale(principal) => Some(principal),
                    _ => None,
                };
                let flight = self.inner.join(Credential::new(token, digest));
                Checked::Waiting(Waiting { flight, stale, metrics: Arc::clone(&self.inner.metrics) })
            }
        }
    }

    /// Forgets what is known about a token, a look-up under way included.
    pub fn forget(&self, digest: &Digest) {
        self.inner.forget(digest);
    }

    pub fn forget_all(&self) {
        self.inner.forget_all();
    }

    /// Valid and invalid entries in the cache.
    pub fn cache_sizes(&self) -> (u64, u64) {
        self.inner.cache.sizes()
    }

    /// Follows the store's changes for as long as it is polled.
    pub async fn follow_changes(&self) {
        loop {
            let changes = self.inner.store.changes().await;
            self.inner.apply(changes);
        }
    }

    /// Tells the store which tokens were used since a time in unix milliseconds.
    pub async fn flush_uses(&self, since: u64) {
        let uses = self.inner.cache.used_since(since);
        if !uses.is_empty()
            && let Err(error) = self.inner.store.note_uses(uses).await
        {
            log::warn!("last uses of tokens were not recorded: {error}");
        }
    }

    pub fn store_kind(&self) -> &'static str {
        self.inner.store.kind()
    }
}

impl Waiting {
    /// The store's answer; the last known valid one when the store can't tell; else the caller must be refused.
    pub async fn answer(self) -> Result<Answer, CannotTell> {
        match (self.flight.landing().await, self.stale) {
            (Err(CannotTell), Some(principal)) => {
                self.metrics.cache_lookup(CacheResult::Stale);
                Ok(Answer::Valid(principal))
            }
            (outcome, _) => outcome,
        }
    }
}

impl Flight {
    async fn landing(&self) -> Result<Answer, CannotTell> {
        loop {
            let landed = self.landed.notified();
            if let Some(outcome) = self.outcome.get() {
                return outcome.clone();
            }
            landed.await;
        }
    }

    fn land(&self, outcome: Result<Answer, CannotTell>) {
        // A second landing changes nothing: the first outcome stands.
        let _: Result<(), _> = self.outcome.set(outcome);
        self.landed.notify_waiters();
    }
}

impl Inner {
    fn shard(&self, digest: &Digest) -> &Mutex<HashMap<Digest, Arc<Flight>>> {
        &self.flights[digest.bucket(FLIGHT_SHARDS)]
    }

    /// Joins the look-up that is under way for this token, or starts one.
    fn join(self: &Arc<Self>, credential: Credential) -> Arc<Flight> {
        let mut shard = self.shard(credential.digest()).lock();
        if let Some(flight) = shard.get(credential.digest()) {
            return Arc::clone(flight);
        }
        let flight = Arc::new(Flight::default());
        if self.lookups.fetch_add(1, Ordering::Relaxed) >= MAX_LOOKUPS {
            self.lookups.fetch_sub(1, Ordering::Relaxed);
            self.metrics.store_error(self.store.kind(), StoreError::Overloaded.kind());
            flight.land(Err(CannotTell));
            return flight;
        }
        shard.insert(*credential.digest(), Arc::clone(&flight));
        drop(shard);
        // A task of its own: the caller that started it may go away while others wait.
        let pilot = Pilot { inner: Arc::clone(self), credential, flight: Arc::clone(&flight) };
        tokio::spawn(pilot.fly());
        flight
    }

    fn forget(&self, digest: &Digest) {
        let shard = self.shard(digest).lock();
        if let Some(flight) = shard.get(digest) {
            flight.tainted.store(true, Ordering::Relaxed);
        }
        self.cache.forget(digest);
    }

    fn forget_all(&self) {
        let shards: Vec<_> = self.flights.iter().map(|shard| shard.lock()).collect();
        for flight in shards.iter().flat_map(|shard| shard.values()) {
            flight.tainted.store(true, Ordering::Relaxed);
        }
        self.cache.forget_all();
    }

    fn apply(&self, changes: Changes) {
        match changes {
            Changes::Tokens(tokens) => {
                for (digest, changed_at) in tokens {
                    self.forget(&digest);
                    let lag = (self.clock)().unix_ms.saturating_sub(changed_at);
                    self.metrics.revocation_lag(self.store.kind(), Duration::from_millis(lag));
                }
            }
            Changes::Everything => {
                log::info!("the {} store changed as a whole: every token is looked up anew", self.store.kind());
                self.forget_all();
            }
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
        for _ in 0..MAX_ATTEMPTS {
            let result = self.ask_store().await;
            let mut shard = self.inner.shard(self.credential.digest()).lock();
            if self.flight.tainted.swap(false, Ordering::Relaxed) {
                continue;
            }
            let now = (self.inner.clock)();
            let outcome = result.map(|record| {
                let principal = record
                    .ok_or(Invalid::Unknown)
                    .and_then(|record| Principal::from_record(&record, self.credential.digest(), now));
                principal.map_or_else(Answer::Invalid, |principal| Answer::Valid(Arc::new(principal)))
            });
            if let Ok(answer) = &outcome {
                self.inner.cache.put(*self.credential.digest(), answer, now, fastrand::f64());
            }
            shard.remove(self.credential.digest());
            drop(shard);
            self.flight.land(outcome.map_err(|_: StoreError| CannotTell));
            return;
        }
        log::warn!("a token changed {MAX_ATTEMPTS} times while it was looked up; its callers get 503");
    }

    async fn ask_store(&self) -> Result<Option<store::TokenRecord>, StoreError> {
        let kind = self.inner.store.kind();
        let timer = self.inner.metrics.store_timer(kind);
        let lookup = tokio::time::timeout(self.inner.timeout, self.inner.store.lookup(&self.credential)).await;
        let result = lookup.unwrap_or(Err(StoreError::Timeout));
        timer.observe_duration();
        if let Err(error) = &result {
            self.inner.metrics.store_error(kind, error.kind());
            log::warn!("token {}: {error}", self.credential.digest().id());
        }
        result
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
        self.flight.land(Err(CannotTell));
    }
}

#[cfg(test)]
mod tests;
