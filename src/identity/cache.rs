//! What was learned about tokens, and for how long it may be believed. Knows no store and no clock: time is an argument.
//! Good and bad tokens have separate budgets, so that no flood of guesses can evict a valid caller.

use super::Mode;
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
    /// Entries, about 550 bytes each (measured by benches/scale.py).
    pub positive_capacity: u64,
    /// Entries, about 200 bytes each.
    pub negative_capacity: u64,
}

impl CacheSettings {
    /// What is believed for longer deserves a second look.
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
                "a revoked token works for as long, where the store tells of no changes",
            ),
            (
                "negative_ttl",
                self.negative_ttl,
                "a new token is refused for as long, where the store tells of no changes",
            ),
            ("stale_if_error", self.stale_if_error, "a revoked token works for as long, while the store is down"),
        ] {
            if time >= Self::LONG {
                let what = format!("is a day or more: {what}");
                problems.push(Problem::warning(key, what, "use seconds, minutes or hours"));
            }
        }
        problems
    }
}

/// What the cache has to say.
pub(super) enum Cached {
    Fresh {
        answer: TokenStatus,
        /// It is time to ask the store again, in the background.
        refresh: bool,
    },
    /// Must not be believed while the store can be asked; good enough while it can't.
    Stale(Stale),
    Nothing,
}

/// A valid answer of an earlier time.
#[derive(Clone)]
pub(super) struct Stale {
    pub(super) principal: Arc<Principal>,
    /// A change of this token may have been missed: only a store that is down excuses believing it, not a busy one.
    pub(super) doubtful: bool,
    /// It is time to ask the store again.
    pub(super) refresh: bool,
}

/// A valid token. Times are milliseconds of [`Now::mono_ms`].
struct Positive {
    principal: Arc<Principal>,
    refresh_at: AtomicU64,
    /// [`DOUBTFUL`]: not to be believed before the store was asked.
    fresh_until: AtomicU64,
    stale_until: u64,
    last_used: AtomicU64,
    /// What stores call this token; empty for nearly all of them.
    handles: Box<[Digest]>,
    /// Believed until then even if changes may have been missed: the store was asked just before.
    sure_until: u64,
    /// From a snapshot: fresh for so long, once the store has said that the token did not change meanwhile.
    vouchable_until: u64,
}

#[derive(Clone)]
struct Negative {
    why: Invalid,
    until: u64,
}

pub(super) struct Cache {
    settings: CacheSettings,
    positive: Bounded<Digest, Arc<Positive>, RandomState>,
    negative: Bounded<Digest, Negative, RandomState>,
    /// Until this monotonic millisecond no change can have been missed, as the stores have shown that they still tell of
    /// them. Past it, and at 0, answers are good for a moment only. [`u64::MAX`]: no store tells of changes.
    heard_until: AtomicU64,
    /// Word of changes has stopped coming.
    deaf: AtomicBool,
    uses: Uses,
}

/// Uses that no store was told of yet, beside those that stand with the entries of the cache.
#[derive(Default)]
struct Uses {
    /// Later uses are still to be told, in unix milliseconds.
    told_until: AtomicU64,
    /// Of tokens whose entries are gone: their records changed, and they may never be used again.
    left: Mutex<HashMap<Digest, u64>>,
}

/// Uses of tokens that left the cache; those of more are lost.
const USES_LEFT: usize = 100_000;
/// Uses that are told again when a store could not take them. One that never takes any costs no more than this.
const USES_RETRIED: usize = 10_000;

impl Uses {
    fn is_untold(&self, at: u64) -> bool {
        at > 0 && at >= self.told_until.load(Ordering::Relaxed)
    }

    fn keep(&self, digest: Digest, at: u64) {
        let mut left = self.left.lock();
        if left.len() < USES_LEFT || left.contains_key(&digest) {
            let last = left.entry(digest).or_default();
            *last = at.max(*last);
        }
    }
}

/// What a look-up found, and how long that may hold.
pub(super) struct Learned<'a> {
    pub(super) answer: &'a TokenStatus,
    /// When the answer changes by itself, in unix milliseconds: a token that is not valid yet.
    pub(super) until_unix_ms: Option<u64>,
    pub(super) handles: Vec<Digest>,
    /// When the store was asked, in monotonic milliseconds.
    pub(super) asked_ms: u64,
}

/// An entry as a snapshot keeps it. Times are unix milliseconds.
pub(super) struct SavedEntry {
    pub(super) digest: Digest,
    pub(super) principal: Arc<Principal>,
    pub(super) fresh_until: u64,
    pub(super) stale_until: u64,
    pub(super) handles: Vec<Digest>,
}

/// After this share of its lifetime an entry that is in use is looked up anew in the background.
const REFRESH_AFTER: f64 = 0.75;
/// Lifetimes are shortened at random by up to this share, so that entries of one moment don't end in one moment.
const JITTER: f64 = 0.10;
/// A background look-up that failed, or has not come back, is tried again after this.
const REFRESH_RETRY_MS: u64 = 1_000;
/// Uses are recorded no finer than this.
const LAST_USED_STEP_MS: u64 = 60_000;
/// No time at all, where the end of one stands: a change of the token may have been missed.
const DOUBTFUL: u64 = 0;
/// How long an answer is believed while word of changes does not come. A revocation is promised to hold within a second
/// then, too: what is left of it goes to the look-up.
const DEAF_TTL: Duration = Duration::from_millis(700);

impl Cache {
    pub(super) fn new(settings: CacheSettings) -> Self {
        // The hasher is keyed at random, as tokens that collide can be computed for a fixed one.
        let positive =
            Bounded::builder().max_capacity(settings.positive_capacity).build_with_hasher(RandomState::default());
        let negative =
            Bounded::builder().max_capacity(settings.negative_capacity).build_with_hasher(RandomState::default());
        let (heard_until, deaf) = (AtomicU64::new(u64::MAX), AtomicBool::new(false));
        Self { settings, positive, negative, heard_until, deaf, uses: Uses::default() }
    }

    /// What is known of a token. With [`Mode::Observe`], asking leaves no trace.
    pub(super) fn get(&self, digest: &Digest, now: Now, mode: Mode) -> Cached {
        if let Some(entry) = self.positive.get(digest) {
            return entry.say(now, self.hears(now), mode);
        }
        match self.negative.get(digest) {
            Some(entry) if now.mono_ms < entry.until => {
                Cached::Fresh { answer: TokenStatus::Invalid(entry.why), refresh: false }
            }
            _ => Cached::Nothing,
        }
    }

    /// Believes an answer from now on. `random` is a number in 0..1 that sets the jitter.
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
                    sure_until: learned.asked_ms + DEAF_TTL.as_millis() as u64,
                    vouchable_until: 0,
                };
                self.positive.insert(digest, Arc::new(entry));
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

    /// Takes a valid token's entry away, and not its use with it.
    fn drop_positive(&self, digest: &Digest) {
        if let Some(entry) = self.positive.remove(digest) {
            let used = entry.last_used.load(Ordering::Relaxed);
            if self.uses.is_untold(used) {
                self.uses.keep(*digest, used);
            }
        }
    }

    pub(super) fn forget_all(&self) {
        for (digest, used) in self.untold() {
            self.uses.keep(digest, used);
        }
        self.positive.invalidate_all();
        self.negative.invalidate_all();
    }

    /// Forgets valid tokens by what stores call them. Goes through all entries, once for any number of handles.
    pub(super) fn forget_handles(&self, handles: &HashSet<Digest>) {
        for (digest, entry) in &self.positive {
            if entry.handles.iter().any(|handle| handles.contains(handle)) {
                self.drop_positive(digest.as_ref());
            }
        }
    }

    /// Forgets what begins so, and says how many entries that were. Goes through all of them.
    pub(super) fn forget_prefix(&self, prefix: &DigestPrefix) -> usize {
        let valid = self.positive.iter().map(|(digest, _)| *digest).filter(|digest| digest.begins_with(prefix));
        let invalid = self.negative.iter().map(|(digest, _)| *digest).filter(|digest| digest.begins_with(prefix));
        let found: HashSet<Digest> = valid.chain(invalid).collect();
        found.iter().for_each(|digest| self.forget(digest));
        found.len()
    }

    /// Lets nothing be believed before the store was asked, except while it can't be. What is put in meanwhile stays:
    /// callers see to it that it is from behind whatever was missed.
    pub(super) fn doubt_all(&self) {
        for (_, entry) in &self.positive {
            entry.fresh_until.store(DOUBTFUL, Ordering::Relaxed);
            // While the store fails, each entry in use goes on asking for itself.
            entry.refresh_at.store(0, Ordering::Relaxed);
        }
        self.negative.invalidate_all();
    }

    /// Until when no change can have been missed.
    pub(super) fn hear_until(&self, mono_ms: u64) {
        self.heard_until.store(mono_ms, Ordering::Relaxed);
    }

    /// Whether no change can have been missed.
    pub(super) fn hears(&self, now: Now) -> bool {
        now.mono_ms < self.heard_until.load(Ordering::Relaxed)
    }

    pub(super) fn set_deaf(&self, deaf: bool) {
        self.deaf.store(deaf, Ordering::Relaxed);
    }

    pub(super) fn is_deaf(&self) -> bool {
        self.deaf.load(Ordering::Relaxed)
    }

    fn untold(&self) -> Vec<(Digest, u64)> {
        let used =
            |entry: &Positive| Some(entry.last_used.load(Ordering::Relaxed)).filter(|at| self.uses.is_untold(*at));
        self.positive.iter().filter_map(|(digest, entry)| Some((*digest, used(&entry)?))).collect()
    }

    /// Tokens that were used since this was asked before, with the time of a recent use, in unix milliseconds. Whoever
    /// can't pass them on gives them back with [`Cache::untold_uses`].
    pub(super) fn take_uses(&self, now: Now) -> Vec<(Digest, u64)> {
        let mut uses = std::mem::take(&mut *self.uses.left.lock());
        for (digest, used) in self.untold() {
            let last = uses.entry(digest).or_default();
            *last = used.max(*last);
        }
        self.uses.told_until.store(now.unix_ms, Ordering::Relaxed);
        uses.into_iter().collect()
    }

    pub(super) fn untold_uses(&self, uses: Vec<(Digest, u64)>) {
        uses.into_iter().take(USES_RETRIED).for_each(|(digest, used)| self.uses.keep(digest, used));
    }

    /// The valid entries that may be worth something after a restart.
    pub(super) fn kept(&self, now: Now) -> Vec<SavedEntry> {
        let unix = |mono: u64| now.unix_ms.saturating_sub(now.mono_ms).saturating_add(mono);
        let keep = |digest: Digest, entry: Arc<Positive>| {
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
        self.positive.iter().filter_map(|(digest, entry)| keep(*digest, entry)).collect()
    }

    /// Takes an entry from a snapshot: doubtful, until [`Cache::vouch_all`].
    pub(super) fn restore(&self, kept: SavedEntry, now: Now) {
        // No entry lives longer than one that is learned now would.
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
            sure_until: 0,
            vouchable_until: mono(kept.fresh_until).min(longest(self.settings.positive_ttl)),
        };
        self.positive.insert(kept.digest, Arc::new(entry));
    }

    /// Believes what came from a snapshot and is still there: the store has named all that changed, and those are gone.
    pub(super) fn vouch_all(&self, now: Now) {
        for (_, entry) in &self.positive {
            if entry.vouchable_until > now.mono_ms {
                entry.refresh_at.store(entry.vouchable_until, Ordering::Relaxed);
                entry.fresh_until.store(entry.vouchable_until, Ordering::Relaxed);
            }
        }
    }

    /// Does now what moka does in its own time: take in what was written, evict down to the capacity, and count.
    pub(super) fn run_pending(&self) {
        self.positive.run_pending_tasks();
        self.negative.run_pending_tasks();
    }

    /// Valid and invalid entries, as they are now.
    pub(super) fn sizes(&self) -> (u64, u64) {
        self.run_pending();
        (self.positive.entry_count(), self.negative.entry_count())
    }
}

impl Positive {
    /// `hears`: no change can have been missed.
    fn say(&self, now: Now, hears: bool, mode: Mode) -> Cached {
        let serves = mode == Mode::Serve;
        let fresh_until = self.fresh_until.load(Ordering::Relaxed);
        let certain = hears || now.mono_ms < self.sure_until;
        let fresh = certain && now.mono_ms < fresh_until;
        if !self.principal.in_force(now) {
            // Its own end came; the store is asked again in its time, as it may have been put off.
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
        // A plain load in nearly all cases: nobody writes to a shared line for each request.
        if serves && now.unix_ms >= self.last_used.load(Ordering::Relaxed) + LAST_USED_STEP_MS {
            self.last_used.store(now.unix_ms, Ordering::Relaxed);
        }
        let refresh = serves && self.claim_refresh(now, false);
        Cached::Fresh { answer: TokenStatus::Valid(Arc::clone(&self.principal)), refresh }
    }

    /// Whether the store should be asked now. Says yes to one caller, and to the next one no sooner than after a pause.
    /// `early`: its time need not have come.
    fn claim_refresh(&self, now: Now, early: bool) -> bool {
        let due = self.refresh_at.load(Ordering::Relaxed);
        let next = now.mono_ms + REFRESH_RETRY_MS;
        (now.mono_ms >= due || early && due > next)
            && self.refresh_at.compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}
