//! The cache of lookup results, and how long each may be used. Knows no store and no clock: time is an argument.
//! Valid and invalid tokens have separate capacities, so that a flood of guesses cannot evict valid tokens.

use super::Mode;
use super::entries::{Entries, Evictable};
use super::principal::{Invalid, Principal, TokenStatus};
use crate::clock::Now;
use crate::problem::Problem;
use crate::store::credential::{Digest, DigestPrefix};
use foldhash::quality::RandomState;
use moka::sync::Cache as Bounded;
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheSettings {
    pub positive_ttl: Duration,
    pub negative_ttl: Duration,
    pub stale_if_error: Duration,
    /// In entries, of about 300 bytes each (measured by benches/scale.py).
    pub positive_capacity: u64,
    /// In entries, of about 200 bytes each.
    pub negative_capacity: u64,
}

impl CacheSettings {
    /// Longer times get a warning.
    const LONG: Duration = Duration::from_secs(24 * 3600);

    /// Keys of `[cache]`.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        for (key, capacity) in
            [("positive_capacity", self.positive_capacity), ("negative_capacity", self.negative_capacity)]
        {
            if capacity == 0 {
                let what = "must not be 0: the store would be asked for every single request";
                problems.push(Problem::error(key, what, "use a number like 100000"));
            }
        }
        problems.extend(Problem::too_short("positive_ttl", self.positive_ttl, Duration::from_secs(1)));
        problems.extend(Problem::too_short("negative_ttl", self.negative_ttl, Duration::from_millis(100)));
        for (key, time, what) in [
            (
                "positive_ttl",
                self.positive_ttl,
                "a revoked token works for as long if the store sends no change notifications",
            ),
            (
                "negative_ttl",
                self.negative_ttl,
                "a new token is refused for as long if the store sends no change notifications",
            ),
            ("stale_if_error", self.stale_if_error, "a revoked token works for as long while the store is down"),
        ] {
            if time >= Self::LONG {
                let what = format!("is a day or more: {what}");
                problems.push(Problem::warning(key, what, "use seconds, minutes or hours"));
            }
        }
        problems
    }
}

/// The result of a cache lookup.
pub(super) enum Cached {
    Fresh {
        answer: TokenStatus,
        /// The caller must start a lookup in the background.
        refresh: bool,
    },
    /// Must not be used unless the store fails.
    Stale(Stale),
    Nothing,
}

/// An earlier valid result.
#[derive(Clone)]
pub(super) struct Stale {
    pub(super) principal: Arc<Principal>,
    /// A change of this token may have been missed: it may be used if the store is down, but not if it is only busy.
    pub(super) doubtful: bool,
    /// The caller must start a lookup.
    pub(super) refresh: bool,
}

/// The entry of a valid token. Times are milliseconds of [`Now::mono_ms`].
struct Positive {
    principal: Arc<Principal>,
    refresh_at: AtomicU64,
    /// [`DOUBTFUL`]: not to be used before a new lookup.
    fresh_until: AtomicU64,
    stale_until: u64,
    last_used: AtomicU64,
    /// The stores' own identifiers of this token; empty for most stores.
    handles: Box<[Digest]>,
    /// Usable until then even if changes may have been missed, because of a recent lookup.
    certain_until: u64,
    /// From the cache file: fresh until then, once the store has confirmed that the token did not change meanwhile.
    confirmable_until: u64,
}

#[derive(Clone)]
struct Negative {
    why: Invalid,
    until: u64,
}

pub(super) struct Cache {
    settings: CacheSettings,
    positive: Entries<Positive>,
    negative: Bounded<Digest, Negative, RandomState>,
    /// Until this monotonic millisecond no change can have been missed, because the subscriptions to all stores were
    /// confirmed. After it, and at 0, results are cached for a moment only. [`u64::MAX`]: no store has notifications.
    heard_until: AtomicU64,
    /// The subscription to a store is lost.
    deaf: AtomicBool,
    uses: Uses,
}

/// Token uses that are not yet written to a store, besides those recorded in the cache's entries.
#[derive(Default)]
struct Uses {
    /// Uses up to this Unix millisecond have been taken for writing.
    taken_until: AtomicU64,
    /// Last uses of tokens whose entries were removed.
    left: Mutex<HashMap<Digest, u64>>,
}

/// Maximum number of removed tokens whose last use is kept; further ones are lost.
const MAX_REMOVED_USES: usize = 100_000;
/// Maximum number of uses that are kept for a retry when a store could not write them. Bounds the cost of a store that
/// never can.
const MAX_RETRIED_USES: usize = 10_000;

impl Uses {
    fn is_pending(&self, at: u64) -> bool {
        at > 0 && at >= self.taken_until.load(Ordering::Relaxed)
    }

    fn keep(&self, digest: Digest, at: u64) {
        let mut left = self.left.lock();
        if left.len() < MAX_REMOVED_USES || left.contains_key(&digest) {
            let last = left.entry(digest).or_default();
            *last = at.max(*last);
        }
    }
}

/// The result of a lookup, and how long it may be used.
pub(super) struct Learned<'a> {
    pub(super) answer: &'a TokenStatus,
    /// When the status changes by itself, in Unix milliseconds: for a token that is not valid yet.
    pub(super) until_unix_ms: Option<u64>,
    pub(super) handles: Vec<Digest>,
    /// When the lookup began, in monotonic milliseconds.
    pub(super) asked_ms: u64,
}

/// An entry in the cache file. Times are Unix milliseconds.
pub(super) struct SavedEntry {
    pub(super) digest: Digest,
    pub(super) principal: Arc<Principal>,
    pub(super) fresh_until: u64,
    pub(super) stale_until: u64,
    pub(super) handles: Vec<Digest>,
}

/// After this share of its lifetime, an entry in use is refreshed in the background.
const REFRESH_AFTER: f64 = 0.75;
/// Lifetimes are shortened at random by up to this share, so that entries created together do not expire together.
const JITTER: f64 = 0.10;
/// A background lookup that failed or has not completed is repeated after this.
const REFRESH_RETRY_MS: u64 = 1_000;
/// Resolution of recorded uses.
const LAST_USED_STEP_MS: u64 = 60_000;
/// A value of `fresh_until`: a change of the token may have been missed.
const DOUBTFUL: u64 = 0;
/// How long a result is used while the subscription is lost. The bound on revocations of one second holds then, too;
/// the remainder is for the lookup.
const DEAF_TTL: Duration = Duration::from_millis(700);

impl Cache {
    pub(super) fn new(settings: CacheSettings) -> Self {
        let positive = Entries::new(settings.positive_capacity);
        // The hasher has a random key, because colliding tokens could be computed for a fixed one.
        let negative =
            Bounded::builder().max_capacity(settings.negative_capacity).build_with_hasher(RandomState::default());
        let (heard_until, deaf) = (AtomicU64::new(u64::MAX), AtomicBool::new(false));
        Self { settings, positive, negative, heard_until, deaf, uses: Uses::default() }
    }

    /// What is known of a token. With [`Mode::Observe`], asking leaves no trace.
    pub(super) fn get(&self, digest: &Digest, now: Now, mode: Mode) -> Cached {
        // Before the entry: a change is taken in before the confirmation of all that was told until then. The other way
        // round, an entry from before a revocation would meet the confirmation from behind it.
        let hears = self.hears(now);
        if let Some(entry) = self.positive.get(digest) {
            return entry.get(now, hears, mode);
        }
        match self.negative.get(digest) {
            Some(entry) if now.mono_ms < entry.until => {
                Cached::Fresh { answer: TokenStatus::Invalid(entry.why), refresh: false }
            }
            _ => Cached::Nothing,
        }
    }

    /// Whether a stale entry is still there, and still may be used if the store fails.
    pub(super) fn holds(&self, digest: &Digest, stale: &Stale, now: Now) -> bool {
        let same =
            |entry: Arc<Positive>| Arc::ptr_eq(&entry.principal, &stale.principal) && now.mono_ms < entry.stale_until;
        self.positive.get(digest).is_some_and(same) && stale.principal.in_force(now)
    }

    /// Stores a result. `random` is a number in 0..1 that sets the jitter.
    pub(super) fn put(&self, digest: Digest, learned: Learned<'_>, now: Now, random: f64) {
        let most = if self.hears(now) { Duration::MAX } else { DEAF_TTL };
        let lifetime = |ttl: Duration| (ttl.min(most).as_millis() as f64 * (1.0 - JITTER * random)) as u64;
        match learned.answer {
            TokenStatus::Valid(principal) => {
                let ttl = lifetime(self.settings.positive_ttl);
                let fresh_until = now.mono_ms + ttl;
                let entry = Positive {
                    principal: Arc::clone(principal),
                    refresh_at: AtomicU64::new(now.mono_ms + (ttl as f64 * REFRESH_AFTER) as u64),
                    fresh_until: AtomicU64::new(fresh_until),
                    stale_until: fresh_until + self.settings.stale_if_error.as_millis() as u64,
                    last_used: AtomicU64::new(now.unix_ms),
                    handles: learned.handles.into(),
                    certain_until: learned.asked_ms + DEAF_TTL.as_millis() as u64,
                    confirmable_until: 0,
                };
                self.insert(digest, entry);
                self.negative.invalidate(&digest);
            }
            TokenStatus::Invalid(why) => {
                self.drop_positive(&digest);
                let ends = learned.until_unix_ms.map_or(u64::MAX, |end| end.saturating_sub(now.unix_ms));
                let until = now.mono_ms + lifetime(self.settings.negative_ttl).min(ends);
                self.negative.insert(digest, Negative { why: *why, until });
            }
        }
    }

    pub(super) fn forget(&self, digest: &Digest) {
        self.drop_positive(digest);
        self.negative.invalidate(digest);
    }

    fn insert(&self, digest: Digest, entry: Positive) {
        if let Some((evicted, entry)) = self.positive.insert(digest, Arc::new(entry)) {
            self.keep_use(&evicted, &entry);
        }
    }

    /// Removes a valid token's entry, but keeps its last use.
    fn drop_positive(&self, digest: &Digest) {
        if let Some(entry) = self.positive.remove(digest) {
            self.keep_use(digest, &entry);
        }
    }

    fn keep_use(&self, digest: &Digest, entry: &Positive) {
        let used = entry.last_used();
        if self.uses.is_pending(used) {
            self.uses.keep(*digest, used);
        }
    }

    pub(super) fn forget_all(&self) {
        for (digest, used) in self.pending_uses() {
            self.uses.keep(digest, used);
        }
        self.positive.clear();
        self.negative.invalidate_all();
    }

    /// Removes valid tokens by the stores' identifiers. Iterates over all entries once, for any number of handles.
    pub(super) fn forget_handles(&self, handles: &HashSet<Digest>) {
        let mut found = Vec::new();
        self.positive.for_each(|digest, entry| {
            if entry.handles.iter().any(|handle| handles.contains(handle)) {
                found.push(*digest);
            }
        });
        found.iter().for_each(|digest| self.drop_positive(digest));
    }

    /// Removes the entries whose digest has this prefix, and returns their number. Iterates over all entries.
    pub(super) fn forget_prefix(&self, prefix: &DigestPrefix) -> usize {
        let invalid = self.negative.iter().map(|(digest, _)| *digest).filter(|digest| digest.begins_with(prefix));
        let mut found: HashSet<Digest> = invalid.collect();
        self.positive.for_each(|digest, _| {
            if digest.begins_with(prefix) {
                found.insert(*digest);
            }
        });
        found.iter().for_each(|digest| self.forget(digest));
        found.len()
    }

    /// Marks all entries as not to be used before a new lookup, unless the store fails. Entries inserted meanwhile are
    /// not marked: the caller must ensure that they are from lookups after whatever was missed.
    pub(super) fn doubt_all(&self) {
        self.positive.for_each(|_, entry| {
            entry.fresh_until.store(DOUBTFUL, Ordering::Relaxed);
            // Due immediately: while the store fails, each entry in use continues to request its own refresh.
            entry.refresh_at.store(0, Ordering::Relaxed);
        });
        self.negative.invalidate_all();
    }

    /// Until when no change can have been missed.
    pub(super) fn hear_until(&self, mono_ms: u64) {
        // Who sees it sees the changes before it.
        self.heard_until.store(mono_ms, Ordering::Release);
    }

    /// Whether no change can have been missed.
    pub(super) fn hears(&self, now: Now) -> bool {
        now.mono_ms < self.heard_until.load(Ordering::Acquire)
    }

    pub(super) fn set_deaf(&self, deaf: bool) {
        self.deaf.store(deaf, Ordering::Relaxed);
    }

    pub(super) fn is_deaf(&self) -> bool {
        self.deaf.load(Ordering::Relaxed)
    }

    fn pending_uses(&self) -> Vec<(Digest, u64)> {
        let mut pending = Vec::new();
        self.positive.for_each(|digest, entry| {
            if self.uses.is_pending(entry.last_used()) {
                pending.push((*digest, entry.last_used()));
            }
        });
        pending
    }

    /// Takes the tokens used since the last call, with the time of a recent use in Unix milliseconds. If they cannot be
    /// written, give them back with [`Cache::return_uses`].
    pub(super) fn take_uses(&self, now: Now) -> Vec<(Digest, u64)> {
        let mut uses = std::mem::take(&mut *self.uses.left.lock());
        for (digest, used) in self.pending_uses() {
            let last = uses.entry(digest).or_default();
            *last = used.max(*last);
        }
        self.uses.taken_until.store(now.unix_ms, Ordering::Relaxed);
        uses.into_iter().collect()
    }

    pub(super) fn return_uses(&self, uses: Vec<(Digest, u64)>) {
        uses.into_iter().take(MAX_RETRIED_USES).for_each(|(digest, used)| self.uses.keep(digest, used));
    }

    /// The valid entries that may be useful after a restart.
    pub(super) fn saved_entries(&self, now: Now) -> Vec<SavedEntry> {
        let unix = |mono: u64| now.unix_ms.saturating_sub(now.mono_ms).saturating_add(mono);
        let keep = |digest: Digest, entry: &Positive| {
            let useful = entry.principal.in_force(now) && now.mono_ms < entry.stale_until;
            let fresh_until = entry.fresh_until.load(Ordering::Relaxed);
            useful.then(|| SavedEntry {
                digest,
                principal: Arc::clone(&entry.principal),
                fresh_until: if fresh_until == DOUBTFUL { 0 } else { unix(fresh_until) },
                stale_until: unix(entry.stale_until),
                handles: entry.handles.to_vec(),
            })
        };
        let mut saved = Vec::new();
        self.positive.for_each(|digest, entry| saved.extend(keep(*digest, entry)));
        saved
    }

    /// Inserts an entry from the cache file: doubtful until [`Cache::confirm_all`].
    pub(super) fn restore(&self, kept: SavedEntry, now: Now) {
        // No entry may live longer than one that is looked up now.
        let longest = |ttl: Duration| now.mono_ms + ttl.as_millis() as u64;
        let mono = |unix: u64| now.mono_ms + unix.saturating_sub(now.unix_ms);
        let entry = Positive {
            principal: kept.principal,
            refresh_at: AtomicU64::new(0),
            fresh_until: AtomicU64::new(DOUBTFUL),
            stale_until: mono(kept.stale_until)
                .min(longest(self.settings.positive_ttl.saturating_add(self.settings.stale_if_error))),
            last_used: AtomicU64::new(0),
            handles: kept.handles.into(),
            certain_until: 0,
            confirmable_until: mono(kept.fresh_until).min(longest(self.settings.positive_ttl)),
        };
        self.insert(kept.digest, entry);
    }

    /// Makes the remaining entries from the cache file fresh. The store has listed all changes since, and the caller
    /// has removed those tokens.
    pub(super) fn confirm_all(&self, now: Now) {
        self.positive.for_each(|_, entry| {
            if entry.confirmable_until > now.mono_ms {
                entry.refresh_at.store(entry.confirmable_until, Ordering::Relaxed);
                entry.fresh_until.store(entry.confirmable_until, Ordering::Relaxed);
            }
        });
    }

    /// The current numbers of valid and invalid entries.
    pub(super) fn sizes(&self) -> (u64, u64) {
        // Applies what was written meanwhile, and evicts down to the capacity.
        self.negative.run_pending_tasks();
        (self.positive.len(), self.negative.entry_count())
    }
}

impl Evictable for Positive {
    fn last_used(&self) -> u64 {
        self.last_used.load(Ordering::Relaxed)
    }
}

impl Positive {
    /// `hears`: no change can have been missed.
    fn get(&self, now: Now, hears: bool, mode: Mode) -> Cached {
        let serves = mode == Mode::Serve;
        let fresh_until = self.fresh_until.load(Ordering::Relaxed);
        let certain = hears || now.mono_ms < self.certain_until;
        let fresh = certain && now.mono_ms < fresh_until;
        if !self.principal.in_force(now) {
            // The token has expired. It is looked up again when the entry expires, because its expiry may have been
            // extended.
            return match fresh {
                true => Cached::Fresh { answer: TokenStatus::Invalid(Invalid::Expired), refresh: false },
                false => Cached::Nothing,
            };
        }
        if !fresh {
            if now.mono_ms >= self.stale_until {
                return Cached::Nothing;
            }
            let doubtful = !certain || fresh_until == DOUBTFUL;
            let refresh = serves && self.claim_refresh(now, doubtful);
            return Cached::Stale(Stale { principal: Arc::clone(&self.principal), doubtful, refresh });
        }
        // Only a load in nearly all cases, so that requests do not contend for the cache line.
        if serves && now.unix_ms >= self.last_used.load(Ordering::Relaxed) + LAST_USED_STEP_MS {
            self.last_used.store(now.unix_ms, Ordering::Relaxed);
        }
        let refresh = serves && self.claim_refresh(now, false);
        Cached::Fresh { answer: TokenStatus::Valid(Arc::clone(&self.principal)), refresh }
    }

    /// Whether the caller must start a refresh. True for one caller, and for the next one only after a pause. `early`:
    /// also before the refresh is due.
    fn claim_refresh(&self, now: Now, early: bool) -> bool {
        let due = self.refresh_at.load(Ordering::Relaxed);
        let next = now.mono_ms + REFRESH_RETRY_MS;
        (now.mono_ms >= due || early && due > next)
            && self.refresh_at.compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}
