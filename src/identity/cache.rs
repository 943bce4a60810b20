//! What was learned about tokens, and for how long it may be believed. Knows no store and no clock: time is an argument.
//! Good and bad tokens have separate budgets, so that no flood of guesses can evict a valid caller.

use super::credential::Digest;
use super::principal::{Invalid, Principal};
use crate::Now;
use moka::sync::Cache as Bounded;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheSettings {
    pub positive_ttl: Duration,
    pub negative_ttl: Duration,
    pub stale_if_error: Duration,
    /// Entries, about 300 bytes each.
    pub positive_capacity: u64,
    /// Entries, about 200 bytes each.
    pub negative_capacity: u64,
}

/// What is known about a token.
#[derive(Clone, Debug)]
pub enum Answer {
    Valid(Arc<Principal>),
    Invalid(Invalid),
}

/// What the cache has to say.
pub(super) enum Cached {
    Answer {
        answer: Answer,
        /// It is time to ask the store again, in the background.
        refresh: bool,
    },
    /// Too old to be believed while the store can be asked; good enough while it can't.
    Stale(Arc<Principal>),
    Nothing,
}

/// A valid token. Times are milliseconds of [`Now::mono_ms`].
struct Positive {
    principal: Arc<Principal>,
    refresh_at: AtomicU64,
    fresh_until: u64,
    stale_until: u64,
    last_used: AtomicU64,
}

#[derive(Clone)]
struct Negative {
    why: Invalid,
    until: u64,
}

pub(super) struct Cache {
    settings: CacheSettings,
    positive: Bounded<Digest, Arc<Positive>>,
    negative: Bounded<Digest, Negative>,
}

/// After this share of its lifetime an entry that is in use is looked up anew in the background.
const REFRESH_AFTER: f64 = 0.75;
/// Lifetimes are shortened at random by up to this share, so that entries of one moment don't end in one moment.
const JITTER: f64 = 0.10;
/// A background look-up that failed, or has not come back, is tried again after this.
const REFRESH_RETRY_MS: u64 = 1_000;
/// Uses are recorded no finer than this.
const LAST_USED_STEP_MS: u64 = 60_000;

impl Cache {
    pub(super) fn new(settings: CacheSettings) -> Self {
        let positive = Bounded::builder().max_capacity(settings.positive_capacity).build();
        let negative = Bounded::builder().max_capacity(settings.negative_capacity).build();
        Self { settings, positive, negative }
    }

    pub(super) fn get(&self, digest: &Digest, now: Now) -> Cached {
        if let Some(entry) = self.positive.get(digest) {
            if !entry.principal.in_force(now) {
                return Cached::Answer { answer: Answer::Invalid(Invalid::Expired), refresh: false };
            }
            if now.mono_ms >= entry.fresh_until {
                let usable = now.mono_ms < entry.stale_until;
                return if usable { Cached::Stale(Arc::clone(&entry.principal)) } else { Cached::Nothing };
            }
            // A plain load in nearly all cases: nobody writes to a shared line for each request.
            if now.unix_ms >= entry.last_used.load(Ordering::Relaxed) + LAST_USED_STEP_MS {
                entry.last_used.store(now.unix_ms, Ordering::Relaxed);
            }
            let due = entry.refresh_at.load(Ordering::Relaxed);
            let refresh = now.mono_ms >= due
                && entry
                    .refresh_at
                    .compare_exchange(due, now.mono_ms + REFRESH_RETRY_MS, Ordering::Relaxed, Ordering::Relaxed)
                    .is_ok();
            return Cached::Answer { answer: Answer::Valid(Arc::clone(&entry.principal)), refresh };
        }
        match self.negative.get(digest) {
            Some(entry) if now.mono_ms < entry.until => {
                Cached::Answer { answer: Answer::Invalid(entry.why), refresh: false }
            }
            _ => Cached::Nothing,
        }
    }

    /// Believes an answer from now on. `random` is a number in 0..1 that sets the jitter.
    pub(super) fn put(&self, digest: Digest, answer: &Answer, now: Now, random: f64) {
        let lifetime = |ttl: Duration| (ttl.as_millis() as f64 * (1.0 - JITTER * random)) as u64;
        match answer {
            Answer::Valid(principal) => {
                let ttl = lifetime(self.settings.positive_ttl);
                let fresh_until = now.mono_ms + ttl;
                let entry = Positive {
                    principal: Arc::clone(principal),
                    refresh_at: AtomicU64::new(now.mono_ms + (ttl as f64 * REFRESH_AFTER) as u64),
                    fresh_until,
                    stale_until: fresh_until + self.settings.stale_if_error.as_millis() as u64,
                    last_used: AtomicU64::new(now.unix_ms),
                };
                self.positive.insert(digest, Arc::new(entry));
                self.negative.invalidate(&digest);
            }
            Answer::Invalid(why) => {
                self.positive.invalidate(&digest);
                let until = now.mono_ms + lifetime(self.settings.negative_ttl);
                self.negative.insert(digest, Negative { why: *why, until });
            }
        }
    }

    pub(super) fn forget(&self, digest: &Digest) {
        self.positive.invalidate(digest);
        self.negative.invalidate(digest);
    }

    pub(super) fn forget_all(&self) {
        self.positive.invalidate_all();
        self.negative.invalidate_all();
    }

    /// Tokens used since a time, with the time of a recent use, both in unix milliseconds.
    pub(super) fn used_since(&self, unix_ms: u64) -> Vec<(Digest, u64)> {
        let recent = |entry: &Positive| Some(entry.last_used.load(Ordering::Relaxed)).filter(|at| *at >= unix_ms);
        self.positive.iter().filter_map(|(digest, entry)| Some((*digest, recent(&entry)?))).collect()
    }

    /// Does now what moka does in its own time: evict down to the capacity.
    #[cfg(test)]
    pub(super) fn run_pending(&self) {
        self.positive.run_pending_tasks();
        self.negative.run_pending_tasks();
    }

    /// Valid and invalid entries.
    pub(super) fn sizes(&self) -> (u64, u64) {
        (self.positive.entry_count(), self.negative.entry_count())
    }
}
