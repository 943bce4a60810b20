//! Clients that guess tokens. Each address has a budget of failed tokens; while it has used it up, its tokens that are not in the
//! cache take turns at the token store, a few a second, and those for whom the next turn is too far away are refused. Pure; the
//! time is an argument. It must not know a token's value, nor whether a store answers from memory.
//!
//! Tokens that are cached as valid never get here. What it costs others of the same address is a wait, so that one program
//! behind an office's address locks nobody out.

use super::limit_bucket::{LimitAmounts, LimitBucket, RefillRate};
use super::limit_table::{LimitTable, TableBucket};
use crate::clock::Now;
use crate::identity::Invalid;
use crate::problem::Problem;
use crate::request::origin::{AddressList, network_of};
use crate::share::{LeaseEngine, LeaseKey, LeaseLack, LeaseTake, RefusedBy};
use crate::store::credential::Digest;
use ipnet::IpNet;
use parking_lot::Mutex;
use siphasher::sip::SipHasher13;
use std::collections::BTreeMap;
use std::hash::Hasher as _;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// So many addresses have a record of their own: about 25 MiB when all of them are in use.
const ADDRESSES: usize = 65_536;
/// So many requests may wait for a turn, of all addresses together.
const MOST_WAITING: usize = 4_096;
/// And of one address.
const MOST_WAITING_OF_ONE: u32 = 256;
/// The failed tokens of an address that are recognised when they come again.
const RECENT: usize = 8;
/// A failed token that comes again and again counts once in this time. So do all tokens together that were valid before.
const COUNTED_AGAIN_MS: u64 = 60_000;
/// What is shared between replicas. No `[[limit]]` can have this name.
const SHARED_NAME: &str = "[guessing]";
/// So many addresses have a budget of their own among replicas; further ones share theirs.
const SHARED_ADDRESSES: usize = 16_384;
/// No Retry-After gets beyond a day.
const MOST_DOUBLINGS: u32 = 24;

/// `[guessing]`, if it is switched on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuessSettings {
    /// Failed tokens that an address has at once, and again after `per`.
    pub failures: u64,
    pub per: Duration,
    /// The first pause, and the longest one.
    pub pause: Duration,
    pub longest_pause: Duration,
    /// Turns at the token store in a second, of an address in a pause.
    pub lookups: u64,
    /// The longest wait for a turn.
    pub wait: Duration,
    /// Addresses that are not counted.
    pub allow: AddressList,
    /// The budget is for all replicas together.
    pub shared: bool,
}

impl GuessSettings {
    /// Keys of `[guessing]`.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        problems.extend(Problem::out_of_range("failures", self.failures, 10..=1_000_000));
        problems.extend(Problem::out_of_range("lookups", self.lookups, 1..=1_000));
        for (key, time, least, most) in [
            ("per", self.per, 1, 3_600),
            ("pause", self.pause, 1, 86_400),
            ("longest_pause", self.longest_pause, 1, 86_400),
            ("wait", self.wait, 0, 60),
        ] {
            if time < Duration::from_secs(least) || time > Duration::from_secs(most) {
                let text = |seconds| humantime::format_duration(Duration::from_secs(seconds));
                let instead = format!("use \"{}\" to \"{}\"", text(least), text(most));
                problems.push(Problem::error(key, "is out of range", instead));
            }
        }
        if self.pause > self.longest_pause {
            let what = "is longer than the longest pause";
            problems.push(Problem::error("pause", what, "use less here, or more there").with("longest_pause"));
        }
        problems
    }

    fn amounts(&self) -> LimitAmounts {
        let rate = RefillRate::new(self.failures, millis(self.per), self.failures);
        LimitAmounts { rate: Some(rate), ..LimitAmounts::default() }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Watches who guesses, or nobody.
#[derive(Debug, Default)]
pub struct GuessGuard(Option<RunningGuessGuard>);

#[derive(Debug)]
struct RunningGuessGuard {
    settings: GuessSettings,
    terms: GuessTerms,
    state: Arc<GuessState>,
    /// `None`: this process counts for itself.
    shared: Option<SharedGuesses>,
}

/// Where the failed tokens of an address are counted beside this process. It is not waited for: what another replica has counted is
/// known with the next failed token.
#[derive(Debug)]
struct SharedGuesses {
    engine: Arc<LeaseEngine>,
    name: Arc<str>,
    seed: (u64, u64),
}

/// What a reload keeps.
#[derive(Debug)]
struct GuessState {
    table: LimitTable<GuessRecord>,
    /// Addresses cannot be chosen to meet in one record.
    seed: (u64, u64),
    /// Addresses with an episode. While there are none, nobody has to wait for a turn and no record is looked for.
    active: AtomicUsize,
    waiting: AtomicUsize,
    /// The turns that are waited for, by address and token: requests with the same token have the same one.
    lined_up: Mutex<BTreeMap<(u64, u64), LinedUp>>,
}

/// A turn at the token store, in microseconds of the monotonic clock, and the requests that wait for it.
#[derive(Clone, Copy, Debug)]
struct LinedUp {
    turn_us: u64,
    waiting: u32,
}

#[derive(Debug)]
struct GuessTerms {
    amounts: LimitAmounts,
}

/// What is known of an address that has sent failed tokens.
#[derive(Clone, Copy, Debug, Default)]
struct GuessRecord {
    budget: LimitBucket,
    recent: RecentFailures,
    /// Begins with the failed token that the budget had no room for, and ends when the budget is whole again.
    episode: Option<OpenEpisode>,
}

/// Failed tokens that have counted, by a part of their digests. Two that look the same are taken for the same one.
#[derive(Clone, Copy, Debug, Default)]
struct RecentFailures {
    marks: [u32; RECENT],
    /// When the first of them came; they are forgotten together.
    since_ms: u64,
    /// When a token that was valid before has counted.
    known_ms: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
struct OpenEpisode {
    counts: GuessEpisode,
    paused_until_ms: u64,
    /// Microseconds of the monotonic clock.
    next_turn_us: u64,
    /// Requests that wait for a turn.
    waiting: u32,
}

/// A time in which an address has sent too many failed tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuessEpisode {
    /// The address, or the IPv6 network of 64 bits.
    pub network: IpNet,
    pub began: Now,
    /// Failed tokens beyond the budget.
    pub failures: u64,
    /// Requests that took a turn at the token store.
    pub turns: u64,
    /// Requests that got 429.
    pub refused: u64,
    pub pauses: u32,
    /// Seconds until the pause is over.
    pub retry_after: u64,
}

/// Whether a token that is not in the cache may be looked up.
#[derive(Debug)]
pub enum GuessVerdict {
    Free,
    /// When its turn has come.
    Turn(GuessTurn),
    Refused(GuessRefusal),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuessRefusal {
    /// Whole seconds, 1 or more.
    pub retry_after: u64,
}

/// A place among those who wait, given back when it is dropped. So is the turn, if it has not come and nobody else waits for it.
#[derive(Debug)]
pub struct GuessTurn {
    pub wait: Duration,
    has_come: bool,
    /// Address and token.
    key: (u64, u64),
    turn_us: u64,
    /// The time that a turn takes.
    step_us: u64,
    state: Arc<GuessState>,
}

impl GuessTurn {
    /// The token is looked up now.
    pub fn has_come(&mut self) {
        (self.has_come, self.wait) = (true, Duration::ZERO);
    }
}

impl Drop for GuessTurn {
    fn drop(&mut self) {
        let state = &self.state;
        state.waiting.fetch_sub(1, Ordering::Relaxed);
        let was_last = state.leave(self.key, self.turn_us);
        state.table.with_known(self.key.0, |record| {
            let Some(episode) = &mut record.episode else { return };
            episode.waiting = episode.waiting.saturating_sub(1);
            if was_last && !self.has_come {
                // Those behind it keep theirs; a newcomer gets one that is sooner by as much.
                episode.next_turn_us = episode.next_turn_us.saturating_sub(self.step_us);
            }
        });
    }
}

/// What a failed token meant for its address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuessCount {
    /// Nobody watches, or it has counted before.
    Not,
    Counted,
    /// All records are in use: the address is not watched.
    Untracked,
    /// An episode has begun.
    Began(Box<GuessEpisode>),
}

impl TableBucket for GuessRecord {
    type Terms = GuessTerms;

    fn idle_at(&self, terms: &GuessTerms, now: Now) -> u64 {
        // An episode is ended by [`GuessGuard::ended`] only, which tells of it.
        if self.episode.is_some() { u64::MAX } else { self.budget.idle_at(&terms.amounts, now) }
    }
}

impl RecentFailures {
    /// Whether a failed token counts, and remembers that it has.
    fn counts(&mut self, digest: &Digest, why: Invalid, now: Now) -> bool {
        if why != Invalid::Unknown {
            let again = self.known_ms.is_none_or(|last| now.mono_ms.saturating_sub(last) >= COUNTED_AGAIN_MS);
            if again {
                self.known_ms = Some(now.mono_ms);
            }
            return again;
        }
        let [a, b, c, d, place, ..] = digest.as_bytes();
        // 0 is an empty place.
        let mark = u32::from_ne_bytes([*a, *b, *c, *d]).max(1);
        if now.mono_ms.saturating_sub(self.since_ms) >= COUNTED_AGAIN_MS {
            (self.marks, self.since_ms) = ([0; RECENT], now.mono_ms);
        }
        if self.marks.contains(&mark) {
            return false;
        }
        let free = self.marks.iter().position(|mark| *mark == 0).unwrap_or(usize::from(*place) % RECENT);
        if let Some(slot) = self.marks.get_mut(free) {
            *slot = mark;
        }
        true
    }
}

impl GuessGuard {
    /// Takes over what is known of addresses, if it still means the same. `seed` makes random numbers.
    pub fn new(settings: Option<&GuessSettings>, running: Option<&Self>, mut seed: impl FnMut() -> u64) -> Self {
        Self(settings.map(|settings| {
            let kept = running.and_then(|running| running.0.as_ref());
            let kept =
                kept.filter(|kept| (kept.settings.failures, kept.settings.per) == (settings.failures, settings.per));
            let state = kept.map_or_else(
                || {
                    Arc::new(GuessState {
                        table: LimitTable::new(ADDRESSES),
                        seed: (seed(), seed()),
                        active: AtomicUsize::new(0),
                        waiting: AtomicUsize::new(0),
                        lined_up: Mutex::default(),
                    })
                },
                |kept| Arc::clone(&kept.state),
            );
            let terms = GuessTerms { amounts: settings.amounts() };
            RunningGuessGuard { settings: settings.clone(), terms, state, shared: None }
        }))
    }

    /// Counts together with other replicas, if that is configured. `seed` says what addresses are hashed with there, by the name of
    /// what is counted.
    #[must_use]
    pub fn sharing(mut self, engine: &Arc<LeaseEngine>, seed: impl Fn(&str) -> (u64, u64)) -> Self {
        if let Some(guard) = self.0.as_mut().filter(|guard| guard.settings.shared) {
            let seed = seed(SHARED_NAME);
            guard.shared = Some(SharedGuesses { engine: Arc::clone(engine), name: SHARED_NAME.into(), seed });
        }
        self
    }

    /// So many addresses are counted together with other replicas.
    pub fn shared_keys(&self) -> usize {
        self.0.as_ref().filter(|guard| guard.settings.shared).map_or(0, |_| SHARED_ADDRESSES)
    }

    /// Addresses with an episode that is forgotten by going over to this one.
    pub fn forgets(&self, running: &Self) -> usize {
        let is_kept =
            |before: &RunningGuessGuard| self.0.as_ref().is_some_and(|guard| Arc::ptr_eq(&guard.state, &before.state));
        if running.0.as_ref().is_none_or(is_kept) { 0 } else { running.active() }
    }

    pub fn settings(&self) -> Option<&GuessSettings> {
        self.0.as_ref().map(|guard| &guard.settings)
    }

    /// Addresses with an episode.
    pub fn active(&self) -> usize {
        self.0.as_ref().map_or(0, |guard| guard.state.active.load(Ordering::Relaxed))
    }

    /// Whether the client's token, which is not in the cache, may be looked up.
    pub fn turn(&self, client: Option<IpAddr>, digest: &Digest, now: Now) -> GuessVerdict {
        let (Some(guard), Some(client)) = (&self.0, client) else { return GuessVerdict::Free };
        if guard.state.active.load(Ordering::Relaxed) == 0 || guard.settings.allow.has(Some(client)) {
            return GuessVerdict::Free;
        }
        let (key, _) = guard.state.key(client);
        let verdict = guard.state.table.with_known(key, |record| guard.turn_of(record, (key, digest.spread()), now));
        verdict.flatten().unwrap_or(GuessVerdict::Free)
    }

    /// A token of the client has failed.
    pub fn failed(&self, client: Option<IpAddr>, digest: &Digest, why: Invalid, now: Now) -> GuessCount {
        let (Some(guard), Some(client)) = (&self.0, client) else { return GuessCount::Not };
        if guard.settings.allow.has(Some(client)) {
            return GuessCount::Not;
        }
        let (key, network) = guard.state.key(client);
        let Some(mut locked) = guard.state.table.lock(key, &guard.terms, now) else { return GuessCount::Not };
        // Who has many networks can fill the table. Those who then have no record must not pay for it.
        if locked.is_shared() {
            return GuessCount::Untracked;
        }
        let Some(record) = locked.get() else { return GuessCount::Not };
        let (counted, fits) = guard.count(record, network, digest, why, now);
        drop(locked);
        let shared = guard.shared.as_ref().filter(|_| counted != GuessCount::Not);
        // What was over the budget here has been noted; the other replicas are to know of it as well.
        if shared.is_some_and(|shared| shared.is_used_up(network, &guard.terms.amounts, now)) && fits {
            return guard.state.table.with_known(key, |record| guard.exceeded(record, network, now)).unwrap_or(counted);
        }
        counted
    }

    /// Episodes that are over, which they are with this.
    pub fn ended(&self, now: Now) -> Vec<GuessEpisode> {
        let mut ended = Vec::new();
        let Some(guard) = self.0.as_ref().filter(|guard| guard.state.active.load(Ordering::Relaxed) > 0) else {
            return ended;
        };
        guard.state.table.for_each(|record| {
            let is_over = |episode: &OpenEpisode| {
                now.mono_ms >= episode.paused_until_ms
                    && record.budget.idle_at(&guard.terms.amounts, now) <= now.mono_ms
            };
            if record.episode.as_ref().is_some_and(is_over) {
                ended.extend(record.episode.take().map(|episode| episode.counts));
            }
        });
        guard.state.active.fetch_sub(ended.len(), Ordering::Relaxed);
        ended
    }

    /// The episodes that go on.
    pub fn episodes(&self, now: Now) -> Vec<GuessEpisode> {
        let mut all = Vec::new();
        if let Some(guard) = &self.0 {
            guard.state.table.for_each(|record| all.extend(record.episode.map(|episode| episode.seen(now))));
        }
        all
    }

    /// Forgets what is known of an address and its network, or of all. Returns the episodes that are ended by it.
    pub fn lift(&self, client: Option<IpAddr>, now: Now) -> Vec<GuessEpisode> {
        let mut lifted = Vec::new();
        let Some(guard) = &self.0 else { return lifted };
        let mut forget = |record: &mut GuessRecord| {
            lifted.extend(record.episode.map(|episode| episode.seen(now)));
            *record = GuessRecord::default();
        };
        match client {
            Some(client) => {
                guard.state.table.with_known(guard.state.key(client).0, forget);
            }
            None => guard.state.table.for_each(&mut forget),
        }
        guard.state.active.fetch_sub(lifted.len(), Ordering::Relaxed);
        lifted
    }
}

impl GuessState {
    /// The place of an address, and what it stands for.
    fn key(&self, client: IpAddr) -> (u64, IpNet) {
        let network = network_of(client);
        let bits = if network.is_ipv4() { 32 } else { 64 };
        (hash_of(self.seed, network), IpNet::new(network, bits).unwrap_or(network.into()))
    }
}

impl GuessState {
    /// The turn that a token of an address waits for already.
    fn turn_of_same(&self, key: (u64, u64), now_us: u64) -> Option<u64> {
        self.lined_up.lock().get(&key).map(|known| known.turn_us).filter(|turn_us| *turn_us > now_us)
    }

    fn line_up(&self, key: (u64, u64), turn_us: u64) {
        let mut all = self.lined_up.lock();
        let known = all.entry(key).or_insert(LinedUp { turn_us, waiting: 0 });
        if known.turn_us != turn_us {
            // Those of a turn that has come.
            *known = LinedUp { turn_us, waiting: 0 };
        }
        known.waiting += 1;
    }

    /// Whether nobody else waits for this turn.
    fn leave(&self, key: (u64, u64), turn_us: u64) -> bool {
        let mut all = self.lined_up.lock();
        let Some(known) = all.get_mut(&key).filter(|known| known.turn_us == turn_us) else { return false };
        known.waiting = known.waiting.saturating_sub(1);
        let was_last = known.waiting == 0;
        if was_last {
            all.remove(&key);
        }
        was_last
    }
}

/// Of the address that stands for a network.
fn hash_of(seed: (u64, u64), network: IpAddr) -> u64 {
    let mut hash = SipHasher13::new_with_keys(seed.0, seed.1);
    match network {
        IpAddr::V4(ip) => hash.write_u32(ip.to_bits()),
        IpAddr::V6(ip) => hash.write_u128(ip.to_bits()),
    }
    hash.finish()
}

impl RunningGuessGuard {
    /// `None`: the address is in no pause.
    fn turn_of(&self, record: &mut GuessRecord, key: (u64, u64), now: Now) -> Option<GuessVerdict> {
        let episode = record.episode.as_mut().filter(|episode| now.mono_ms < episode.paused_until_ms)?;
        let now_us = now.mono_ms.saturating_mul(1_000);
        let step_us = 1_000_000 / self.settings.lookups.max(1);
        let same = self.state.turn_of_same(key, now_us);
        let turn_us = same.unwrap_or_else(|| episode.next_turn_us.max(now_us));
        let wait = Duration::from_micros(turn_us - now_us);
        if wait <= self.settings.wait && episode.waiting < MOST_WAITING_OF_ONE && self.enters() {
            if same.is_none() {
                episode.next_turn_us = turn_us.saturating_add(step_us);
            }
            episode.waiting += 1;
            episode.counts.turns += 1;
            self.state.line_up(key, turn_us);
            let state = Arc::clone(&self.state);
            return Some(GuessVerdict::Turn(GuessTurn { wait, has_come: false, key, turn_us, step_us, state }));
        }
        episode.counts.refused += 1;
        let retry_after = episode.seen(now).retry_after.max(1);
        Some(GuessVerdict::Refused(GuessRefusal { retry_after }))
    }

    /// Takes a place among those who wait, if there is one.
    fn enters(&self) -> bool {
        let waiting = &self.state.waiting;
        let enter = |count: usize| (count < MOST_WAITING).then_some(count + 1);
        waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, enter).is_ok()
    }

    /// Also whether the budget had room for it.
    fn count(
        &self,
        record: &mut GuessRecord,
        network: IpNet,
        digest: &Digest,
        why: Invalid,
        now: Now,
    ) -> (GuessCount, bool) {
        if !record.recent.counts(digest, why, now) {
            return (GuessCount::Not, true);
        }
        let amounts = &self.terms.amounts;
        if record.budget.check(amounts, 1, now).is_ok() {
            record.budget.take(amounts, 1, now);
            return (GuessCount::Counted, true);
        }
        (self.exceeded(record, network, now), false)
    }

    /// There is no room for a failed token.
    fn exceeded(&self, record: &mut GuessRecord, network: IpNet, now: Now) -> GuessCount {
        let begins = record.episode.is_none();
        let episode = record.episode.get_or_insert(OpenEpisode {
            counts: GuessEpisode { network, began: now, failures: 0, turns: 0, refused: 0, pauses: 0, retry_after: 0 },
            paused_until_ms: 0,
            next_turn_us: 0,
            waiting: 0,
        });
        episode.counts.failures += 1;
        if now.mono_ms >= episode.paused_until_ms {
            let doubled = 1_u64 << episode.counts.pauses.min(MOST_DOUBLINGS);
            let pause = millis(self.settings.pause).saturating_mul(doubled).min(millis(self.settings.longest_pause));
            episode.paused_until_ms = now.mono_ms.saturating_add(pause);
            episode.counts.pauses += 1;
        }
        if !begins {
            return GuessCount::Counted;
        }
        self.state.active.fetch_add(1, Ordering::Relaxed);
        GuessCount::Began(Box::new(episode.seen(now)))
    }
}

impl SharedGuesses {
    /// Counts a failed token of a network. Whether all replicas together have counted as many as the budget has: a store that does
    /// not answer says nothing of an address.
    fn is_used_up(&self, network: IpNet, amounts: &LimitAmounts, now: Now) -> bool {
        let hash = hash_of(self.seed, network.addr());
        let key = LeaseKey { limit: Arc::clone(&self.name), hash, amounts: (*amounts).into() };
        match self.engine.take(&key, 1, now) {
            LeaseTake::Taken(_) => false,
            LeaseTake::Refused(refusal) => refusal.by == RefusedBy::Rate,
            LeaseTake::Lacks => {
                drop(self.engine.enqueue(LeaseLack { key, cost: 1 }));
                false
            }
        }
    }
}

impl GuessEpisode {
    /// A network of one address is said as the address.
    pub fn name(network: &IpNet) -> String {
        if network.prefix_len() == network.max_prefix_len() { network.addr().to_string() } else { network.to_string() }
    }

    /// What there is to say of it at its end.
    pub fn end(&self, why: &str, now: Now) -> String {
        let lasted = Duration::from_secs(now.mono_ms.saturating_sub(self.began.mono_ms) / 1_000);
        format!(
            "client {} {why}, after {}: {} failed tokens beyond its budget, {} requests waited for a turn, {} got 429",
            Self::name(&self.network),
            humantime::format_duration(lasted),
            self.failures,
            self.turns,
            self.refused
        )
    }
}

impl OpenEpisode {
    fn seen(&self, now: Now) -> GuessEpisode {
        let retry_after = self.paused_until_ms.saturating_sub(now.mono_ms).div_ceil(1_000);
        GuessEpisode { retry_after, ..self.counts }
    }
}

#[cfg(test)]
#[path = "guessing_tests.rs"]
mod tests;
