//! The buckets of one limit, by key, in memory of a fixed size. Only a bucket that is as good as new makes room for another
//! one, so that nobody gets more by being forgotten; while all are in use, newcomers share one bucket. It must not know what a
//! key stands for, nor what a bucket counts.

use crate::clock::Now;
use parking_lot::{Mutex, MutexGuard};

/// So many buckets share a lock, about.
const SHARD: usize = 1_024;
const MOST_SHARDS: usize = 64;
/// A search that found all buckets of a shard in use is not repeated before this, unless one becomes idle earlier.
const SEARCH_AGAIN_MS: u64 = 1_000;

/// What is kept for a key.
pub(super) trait TableBucket: Copy + Default {
    /// What all buckets of a table have in common.
    type Terms;

    /// When the bucket is as good as a new one, by the monotonic clock.
    fn idle_at(&self, terms: &Self::Terms, now: Now) -> u64;
}

#[derive(Debug)]
pub(super) struct LimitTable<B> {
    shards: Box<[Mutex<LimitShard<B>>]>,
    /// Bits of a key that are not those of its shard.
    shift: u32,
    /// For keys that have no bucket of their own.
    shared: Mutex<B>,
}

/// A bucket that is locked, alone or with its neighbours.
pub(super) struct LockedBucket<'t, B> {
    shard: MutexGuard<'t, LimitShard<B>>,
    at: usize,
    shared: Option<MutexGuard<'t, B>>,
}

impl<B> LockedBucket<'_, B> {
    pub(super) fn get(&mut self) -> Option<&mut B> {
        match &mut self.shared {
            Some(shared) => Some(shared),
            None => self.shard.slots.get_mut(self.at).map(|slot| &mut slot.bucket),
        }
    }

    /// It is the one of the newcomers.
    pub(super) fn is_shared(&self) -> bool {
        self.shared.is_some()
    }
}

/// Open addressing with linear probing: a key stands in the first free slot from its own place on.
#[derive(Debug)]
struct LimitShard<B> {
    /// A power of two, of which a third stays free: a search always comes to an end, and soon. They double until there are `most`
    /// buckets, so that a table takes what is in use.
    slots: Box<[LimitSlot<B>]>,
    most: usize,
    occupied: usize,
    /// Where the search for an idle bucket goes on.
    hand: usize,
    /// All buckets are in use until then, by the monotonic clock.
    full_until: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct LimitSlot<B> {
    /// 0: free.
    key: u64,
    bucket: B,
}

/// Buckets of a shard that there is room for at once.
const FIRST_BUCKETS: usize = 16;

/// The slots for so many buckets.
fn slots(buckets: usize) -> usize {
    (buckets + buckets / 2 + 1).next_power_of_two()
}

/// Keys are spread evenly; none is 0.
fn key(hash: u64) -> u64 {
    hash.max(1)
}

impl<B: TableBucket> LimitTable<B> {
    pub(super) fn new(buckets: usize) -> Self {
        let shards = (buckets / SHARD).clamp(1, MOST_SHARDS).next_power_of_two();
        let most = buckets.div_ceil(shards).max(1);
        let shard = || LimitShard {
            slots: vec![LimitSlot::default(); slots(most.min(FIRST_BUCKETS))].into(),
            most,
            occupied: 0,
            hand: 0,
            full_until: 0,
        };
        Self {
            shards: (0..shards).map(|_| Mutex::new(shard())).collect(),
            shift: 64 - shards.trailing_zeros(),
            shared: Mutex::default(),
        }
    }

    fn shard(&self, key: u64) -> Option<&Mutex<LimitShard<B>>> {
        // With one shard there is nothing to shift by.
        self.shards.get(key.checked_shr(self.shift).unwrap_or(0) as usize)
    }

    /// The bucket of a key. Locks are taken by place: of limits in their order, and of one limit the shared bucket last.
    #[inline(always)]
    pub(super) fn lock(&self, hash: u64, terms: &B::Terms, now: Now) -> Option<LockedBucket<'_, B>> {
        let key = key(hash);
        let mut shard = self.shard(key)?.lock();
        match shard.find(key) {
            Ok(at) => Some(LockedBucket { shard, at, shared: None }),
            Err(free) => match shard.insert(key, free, terms, now) {
                Some(at) => Some(LockedBucket { shard, at, shared: None }),
                None => Some(LockedBucket { shard, at: 0, shared: Some(self.shared.lock()) }),
            },
        }
    }

    /// What [`Self::lock`] would give, and whether it is the one of the newcomers. Makes no bucket, and takes nobody's place.
    pub(super) fn peek(&self, hash: u64, terms: &B::Terms, now: Now) -> Option<(B, bool)> {
        let key = key(hash);
        let shard = self.shard(key)?.lock();
        match shard.find(key) {
            Ok(at) => shard.slots.get(at).map(|slot| (slot.bucket, false)),
            Err(_) if shard.occupied < shard.most => Some((B::default(), false)),
            Err(_) if (0..shard.slots.len()).any(|at| shard.is_idle(at, terms, now)) => Some((B::default(), false)),
            Err(_) => Some((*self.shared.lock(), true)),
        }
    }

    /// The bucket of a key that has something in it.
    pub(super) fn change(&self, hash: u64, shared: bool, change: impl FnOnce(&mut B)) {
        if shared {
            return change(&mut self.shared.lock());
        }
        let key = key(hash);
        let Some(shard) = self.shard(key) else { return };
        let mut shard = shard.lock();
        // It may be idle by now.
        shard.full_until = 0;
        if let Ok(at) = shard.find(key)
            && let Some(slot) = shard.slots.get_mut(at)
        {
            change(&mut slot.bucket);
        }
    }

    /// Looks at the bucket of a key, if it has one of its own.
    pub(super) fn with_known<T>(&self, hash: u64, look: impl FnOnce(&mut B) -> T) -> Option<T> {
        let key = key(hash);
        let mut shard = self.shard(key)?.lock();
        let at = shard.find(key).ok()?;
        shard.slots.get_mut(at).map(|slot| look(&mut slot.bucket))
    }

    /// Goes through all buckets but the shared one, with one shard locked at a time.
    pub(super) fn for_each(&self, mut change: impl FnMut(&mut B)) {
        for shard in &self.shards {
            let mut shard = shard.lock();
            // Some may be idle by now.
            shard.full_until = 0;
            shard.slots.iter_mut().filter(|slot| slot.key != 0).for_each(|slot| change(&mut slot.bucket));
        }
    }
}

impl<B: TableBucket> LimitShard<B> {
    fn mask(&self) -> usize {
        self.slots.len() - 1
    }

    fn key_at(&self, at: usize) -> u64 {
        self.slots.get(at).map_or(0, |slot| slot.key)
    }

    /// The slot of a key, or the free one where the search for it ended.
    #[inline]
    fn find(&self, key: u64) -> Result<usize, usize> {
        let mut at = key as usize & self.mask();
        loop {
            match self.key_at(at) {
                found if found == key => return Ok(at),
                0 => return Err(at),
                _ => at = (at + 1) & self.mask(),
            }
        }
    }

    /// Makes a bucket for a key that has none. `None`: all are in use.
    #[cold]
    fn insert(&mut self, key: u64, free: usize, terms: &B::Terms, now: Now) -> Option<usize> {
        // An idle one that stands in the way of the key gives its place.
        let mut at = key as usize & self.mask();
        while at != free {
            if self.is_idle(at, terms, now) {
                return self.put(key, at);
            }
            at = (at + 1) & self.mask();
        }
        if self.occupied < self.most {
            self.occupied += 1;
            if slots(self.occupied) <= self.slots.len() {
                return self.put(key, free);
            }
            self.grow();
            let free = self.find(key).err()?;
            return self.put(key, free);
        }
        let idle = self.next_idle(terms, now)?;
        self.remove(idle);
        // The removal may have moved others into the way.
        let free = self.find(key).err()?;
        self.occupied += 1;
        self.put(key, free)
    }

    /// Twice as many slots.
    fn grow(&mut self) {
        let slots = vec![LimitSlot::default(); self.slots.len() * 2].into();
        let before = std::mem::replace(&mut self.slots, slots);
        self.hand = 0;
        for slot in before.into_iter().filter(|slot| slot.key != 0) {
            if let Err(free) = self.find(slot.key)
                && let Some(place) = self.slots.get_mut(free)
            {
                *place = slot;
            }
        }
    }

    fn put(&mut self, key: u64, at: usize) -> Option<usize> {
        *self.slots.get_mut(at)? = LimitSlot { key, bucket: B::default() };
        Some(at)
    }

    fn is_idle(&self, at: usize, terms: &B::Terms, now: Now) -> bool {
        self.slots.get(at).is_some_and(|slot| slot.key != 0 && slot.bucket.idle_at(terms, now) <= now.mono_ms)
    }

    /// Goes round once. That no bucket is idle is remembered, so that many newcomers cost no search each.
    fn next_idle(&mut self, terms: &B::Terms, now: Now) -> Option<usize> {
        if now.mono_ms < self.full_until {
            return None;
        }
        let mut earliest = now.mono_ms.saturating_add(SEARCH_AGAIN_MS);
        for step in 0..self.slots.len() {
            let at = (self.hand + step) & self.mask();
            let Some(slot) = self.slots.get(at).filter(|slot| slot.key != 0) else { continue };
            let idle_at = slot.bucket.idle_at(terms, now);
            if idle_at <= now.mono_ms {
                self.hand = (at + 1) & self.mask();
                return Some(at);
            }
            earliest = earliest.min(idle_at);
        }
        self.full_until = earliest;
        None
    }

    /// Frees a slot, and moves up those behind it whose search would end there.
    fn remove(&mut self, at: usize) {
        let (mut hole, mut next) = (at, (at + 1) & self.mask());
        while let Some(slot) = self.slots.get(next).copied().filter(|slot| slot.key != 0) {
            let own = slot.key as usize & self.mask();
            let (from_own, from_hole) = (next.wrapping_sub(own) & self.mask(), next.wrapping_sub(hole) & self.mask());
            if from_own >= from_hole {
                if let Some(place) = self.slots.get_mut(hole) {
                    *place = slot;
                }
                hole = next;
            }
            next = (next + 1) & self.mask();
        }
        if let Some(place) = self.slots.get_mut(hole) {
            *place = LimitSlot::default();
        }
        self.occupied -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::super::limit_bucket::{LimitAmounts, LimitBucket, RefillRate};
    use super::*;
    use std::collections::HashMap;

    fn at(mono_ms: u64) -> Now {
        Now { mono_ms, unix_ms: mono_ms }
    }

    fn amounts(burst: u64) -> LimitAmounts {
        LimitAmounts { rate: Some(RefillRate::new(1, 1_000, burst)), ..LimitAmounts::default() }
    }

    /// Takes one: whether it was there, and whether the bucket is the shared one.
    fn ask(table: &LimitTable<LimitBucket>, key: u64, amounts: &LimitAmounts, now: Now) -> (bool, bool) {
        let mut locked = table.lock(key, amounts, now).unwrap();
        let shared = locked.is_shared();
        let bucket = locked.get().unwrap();
        let fits = bucket.check(amounts, 1, now).is_ok();
        if fits {
            bucket.take(amounts, 1, now);
        }
        (fits, shared)
    }

    #[test]
    fn newcomers_share_one_bucket_while_all_are_in_use() {
        let (table, amounts) = (LimitTable::new(100), amounts(2));
        for key in 1..=100 {
            assert_eq!(ask(&table, key, &amounts, at(10)), (true, false), "{key}");
        }
        let all: Vec<_> = (101..=110).map(|key| ask(&table, key, &amounts, at(10))).collect();
        assert_eq!(all.iter().filter(|(fits, _)| *fits).count(), 2, "a burst for all of them together");
        assert!(all.iter().all(|(_, shared)| *shared));
        // Those who have a bucket keep it, with what is in it.
        assert_eq!((1..=100).filter(|key| ask(&table, *key, &amounts, at(10)) == (true, false)).count(), 100);
        assert_eq!((1..=100).filter(|key| ask(&table, *key, &amounts, at(10)) == (false, false)).count(), 100);
        // Full again after two seconds, and not before: then newcomers take the places.
        assert_eq!(ask(&table, 111, &amounts, at(2_009)), (true, true));
        for key in 201..=300 {
            assert_eq!(ask(&table, key, &amounts, at(2_010)), (true, false), "{key}");
        }
        assert!(ask(&table, 301, &amounts, at(2_010)).1);
        assert_eq!(table.shards.iter().map(|shard| shard.lock().occupied).sum::<usize>(), 100);
    }

    #[test]
    fn who_looks_sees_what_a_request_would_get_and_takes_no_place() {
        let (table, amounts) = (LimitTable::<LimitBucket>::new(100), amounts(2));
        let occupied = || table.shards.iter().map(|shard| shard.lock().occupied).sum::<usize>();
        let fits = |key, now| {
            let (bucket, shared) = table.peek(key, &amounts, now).unwrap();
            (bucket.check(&amounts, 1, now).is_ok(), shared)
        };
        for key in 1..=60 {
            ask(&table, key, &amounts, at(10));
        }
        (1..=1_000).for_each(|key| assert_eq!(fits(key, at(10)), (true, false), "{key}"));
        assert_eq!(occupied(), 60);
        ask(&table, 7, &amounts, at(10));
        assert_eq!(fits(7, at(10)), (false, false));
        (61..=100).for_each(|key| assert!(ask(&table, key, &amounts, at(10)).0));
        // All are in use: a newcomer would get the shared bucket, and behind that somebody's place.
        assert_eq!(fits(999, at(10)), (true, true));
        assert_eq!((ask(&table, 998, &amounts, at(10)).0, ask(&table, 997, &amounts, at(10)).0), (true, true));
        assert_eq!(fits(999, at(10)), (false, true));
        assert_eq!(fits(999, at(5_000)), (true, false));
        assert_eq!((1..=100).filter(|key| fits(*key, at(10)).0).count(), 99);
    }

    #[test]
    fn a_table_takes_memory_for_what_is_in_use() {
        let (table, amounts) = (LimitTable::new(1 << 24), amounts(2));
        let slots = || table.shards.iter().map(|shard| shard.lock().slots.len()).sum::<usize>();
        assert_eq!(slots(), 64 * 32);
        let mut random = fastrand::Rng::with_seed(9);
        let keys: Vec<u64> = (0..50_000).map(|_| random.u64(1..)).collect();
        keys.iter().for_each(|key| assert_eq!(ask(&table, *key, &amounts, at(10)), (true, false), "{key}"));
        assert!((75_000..=300_000).contains(&slots()), "{}", slots());
        // Nobody was forgotten on the way.
        keys.iter().for_each(|key| assert_eq!(ask(&table, *key, &amounts, at(10)), (true, false), "{key}"));
        keys.iter().for_each(|key| assert_eq!(ask(&table, *key, &amounts, at(10)), (false, false), "{key}"));
    }

    #[test]
    fn one_bucket_that_becomes_idle_is_found_at_once() {
        let (table, amounts) = (LimitTable::new(50), amounts(100));
        for key in 1..=50 {
            let taken = if key == 17 { 1 } else { 60 };
            (0..taken).for_each(|_| assert!(ask(&table, key, &amounts, at(0)).0));
        }
        assert!(ask(&table, 99, &amounts, at(0)).1);
        assert!(ask(&table, 99, &amounts, at(999)).1);
        assert!(!ask(&table, 99, &amounts, at(1_000)).1);
    }

    #[test]
    fn a_bucket_with_a_request_in_flight_stays() {
        let amounts = LimitAmounts { concurrency: Some(1), ..LimitAmounts::default() };
        let table = LimitTable::new(1);
        assert_eq!(ask(&table, 7, &amounts, at(0)), (true, false));
        assert_eq!(ask(&table, 8, &amounts, at(100_000)), (true, true));
        assert_eq!(ask(&table, 9, &amounts, at(100_000)), (false, true));
        table.change(7, false, LimitBucket::release);
        assert_eq!(ask(&table, 9, &amounts, at(100_000)), (true, false));
        table.change(8, true, LimitBucket::release);
        assert_eq!(ask(&table, 8, &amounts, at(100_000)), (true, true));
    }

    /// Against a map that forgets nothing, with keys that collide.
    #[test]
    fn a_table_tells_the_same_as_a_map_as_long_as_there_is_room() {
        let (table, amounts) = (LimitTable::new(64), amounts(3));
        let mut model: HashMap<u64, LimitBucket> = HashMap::new();
        let (mut random, mut now, mut evicted) = (fastrand::Rng::with_seed(7), 0, 0);
        for _ in 0..50_000 {
            now += random.u64(0..40);
            // All within a few slots, around the end of the table.
            let key = (random.u64(0..400) << 8) | ((120 + random.u64(0..16)) % 128);
            let known = model.entry(key.max(1)).or_default();
            let expected = known.check(&amounts, 1, at(now)).is_ok();
            let occupied = table.shards[0].lock().occupied;
            let (fits, shared) = ask(&table, key, &amounts, at(now));
            evicted += usize::from(occupied == 64);
            if shared {
                let live = model.values().filter(|bucket| bucket.idle_at(&amounts, at(now)) > now).count();
                assert!(live >= 64, "{live} in use");
                // Not counted in its own bucket.
                continue;
            }
            assert_eq!(fits, expected, "{key} at {now}");
            if fits {
                model.entry(key.max(1)).or_default().take(&amounts, 1, at(now));
            }
        }
        assert!(evicted > 1_000, "{evicted}");
    }

    /// Threads with more keys than there are buckets: no key gets more from a bucket of its own than is due to it, however often
    /// it made room and came back, and all that have none together no more than one.
    #[test]
    fn threads_get_no_more_than_is_due_while_buckets_make_room() {
        use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
        const KEYS: u64 = 60;
        const END: u64 = 20_000;
        let (mut made_room, mut refusals) = (0, 0);
        for seed in 0..8 {
            let mut random = fastrand::Rng::with_seed(seed);
            // One unit a second, and bursts that take their time to come back.
            let (burst, buckets) = (random.u64(1..5), random.usize(16..40));
            let (table, amounts) = (LimitTable::new(buckets), amounts(burst));
            let own: Vec<AtomicU64> = (0..KEYS).map(|_| AtomicU64::new(0)).collect();
            let (shared, refused, time) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
            std::thread::scope(|scope| {
                for thread in 0..4 {
                    let (table, amounts, own, shared, refused, time) =
                        (&table, &amounts, &own, &shared, &refused, &time);
                    scope.spawn(move || {
                        let mut random = fastrand::Rng::with_seed(seed * 10 + thread);
                        loop {
                            // Each reads the time for itself, so that some ask with one that is over.
                            let now = time.load(SeqCst);
                            if now >= END {
                                return;
                            }
                            // Some ask all the time, others now and then.
                            let key = random.u64(0..KEYS) * random.u64(0..KEYS) / KEYS;
                            match ask(table, (key + 1) << 8, amounts, at(now)) {
                                (true, false) => own[key as usize].fetch_add(1, SeqCst),
                                (true, true) => shared.fetch_add(1, SeqCst),
                                (false, _) => refused.fetch_add(1, SeqCst),
                            };
                            if random.u8(0..8) == 0 {
                                time.fetch_add(random.u64(0..40), SeqCst);
                            }
                        }
                    });
                }
            });
            let due = burst + time.load(SeqCst) / 1_000;
            for (key, admitted) in own.iter().enumerate() {
                let admitted = admitted.load(SeqCst);
                assert!(admitted <= due, "seed {seed}: {admitted} of {due} for {key}");
            }
            assert!(shared.load(SeqCst) <= due, "seed {seed}: {} of {due} shared", shared.load(SeqCst));
            made_room += own.iter().filter(|own| own.load(SeqCst) > 0).count().saturating_sub(buckets);
            refusals += refused.load(SeqCst);
            let held: usize = table.shards.iter().map(|shard| shard.lock().occupied).sum();
            assert!(held <= buckets, "seed {seed}: {held} of {buckets}");
        }
        assert!(made_room > 20 && refusals > 1_000, "{made_room} keys more than buckets, {refusals} refused");
    }
}
