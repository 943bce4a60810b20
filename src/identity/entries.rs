//! The bounded table of valid tokens, in shards that are locked one at a time. When it is full, the entry that was used the
//! longest ago among a few chosen at random makes room. It takes a fraction of the memory of a general cache, and a lookup is
//! one lock that is free nearly always. Knows no time and no policy.

use crate::store::credential::Digest;
use foldhash::quality::RandomState;
use indexmap::IndexMap;
use parking_lot::{Mutex, MutexGuard};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A power of two. Many, so that workers rarely meet at one.
const SHARDS: usize = 128;
/// How many entries are compared when one has to go. Redis finds 5 enough to be near the least recently used one.
const SAMPLES: usize = 6;

/// An entry that can make room for others.
pub(super) trait Evictable {
    /// Grows with each use, at any resolution.
    fn last_used(&self) -> u64;
}

pub(super) struct Entries<V> {
    shards: Box<[Mutex<Shard<V>>]>,
    capacity: u64,
    count: AtomicU64,
}

// The hasher has a random key, because colliding tokens could be computed for a fixed one.
type Shard<V> = IndexMap<Digest, Arc<V>, RandomState>;

impl<V: Evictable> Entries<V> {
    pub(super) fn new(capacity: u64) -> Self {
        let hasher = RandomState::default();
        let shards = (0..SHARDS).map(|_| Mutex::new(Shard::with_hasher(hasher.clone()))).collect();
        Self { shards, capacity, count: AtomicU64::new(0) }
    }

    pub(super) fn get(&self, digest: &Digest) -> Option<Arc<V>> {
        self.shard(digest).get(digest).map(Arc::clone)
    }

    /// Inserts or replaces an entry. Returns the one that had to make room for it, which may be lost.
    pub(super) fn insert(&self, digest: Digest, entry: Arc<V>) -> Option<(Digest, Arc<V>)> {
        let replaced = self.shard(&digest).insert(digest, entry);
        if replaced.is_some() || self.count.fetch_add(1, Ordering::Relaxed) < self.capacity {
            return None;
        }
        // Nearly always from the same shard. No two locks at once.
        let first = digest.bucket(SHARDS);
        let mut places = (0..SHARDS).map(|step| &self.shards[(first + step) % SHARDS]);
        let evicted = places.find_map(|shard| take_oldest(&mut shard.lock(), &digest));
        if evicted.is_some() {
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
        evicted
    }

    pub(super) fn remove(&self, digest: &Digest) -> Option<Arc<V>> {
        let removed = self.shard(digest).swap_remove(digest);
        if removed.is_some() {
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
        removed
    }

    pub(super) fn clear(&self) {
        for shard in &self.shards {
            // Freed behind the lock.
            let cleared = {
                let mut shard = shard.lock();
                let empty = Shard::with_hasher(shard.hasher().clone());
                std::mem::replace(&mut *shard, empty)
            };
            self.count.fetch_sub(cleared.len() as u64, Ordering::Relaxed);
        }
    }

    /// Goes through all entries, with one shard locked at a time: entries that come or go meanwhile may be missed, and the
    /// closure must not use this table.
    pub(super) fn for_each(&self, mut visit: impl FnMut(&Digest, &Arc<V>)) {
        for shard in &self.shards {
            shard.lock().iter().for_each(|(digest, entry)| visit(digest, entry));
        }
    }

    pub(super) fn len(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    fn shard(&self, digest: &Digest) -> MutexGuard<'_, Shard<V>> {
        self.shards[digest.bucket(SHARDS)].lock()
    }
}

/// Takes the oldest of a few, but not the one that they have to make room for.
fn take_oldest<V: Evictable>(shard: &mut Shard<V>, new: &Digest) -> Option<(Digest, Arc<V>)> {
    let length = shard.len();
    let samples = (0..SAMPLES.min(length)).map(|sample| match length <= SAMPLES {
        true => sample,
        false => fastrand::usize(..length),
    });
    let others = samples.filter_map(|at| {
        shard.get_index(at).filter(|(digest, _)| *digest != new).map(|(_, entry)| (entry.last_used(), at))
    });
    let (_, oldest) = others.min()?;
    shard.swap_remove_index(oldest)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Used(u64);

    impl Evictable for Used {
        fn last_used(&self) -> u64 {
            self.0
        }
    }

    fn key(number: u64) -> Digest {
        Digest::of(&number.to_be_bytes())
    }

    #[test]
    fn it_never_holds_more_than_its_capacity_and_never_gives_up_what_was_just_put_in() {
        for capacity in [1, 2, 7, 1_000] {
            let entries = Entries::new(capacity);
            for number in 0..3_000 {
                let evicted = entries.insert(key(number), Arc::new(Used(number)));
                assert_eq!(evicted.is_some(), number >= capacity, "{capacity}, {number}");
                assert!(entries.get(&key(number)).is_some());
                assert!(entries.len() <= capacity);
            }
            let (mut seen, total) = (0, entries.len());
            entries.for_each(|_, _| seen += 1);
            assert_eq!((seen, total), (capacity, capacity));
        }
    }

    #[test]
    fn replacing_evicts_nobody_and_removing_makes_room() {
        let entries = Entries::new(2);
        assert!(entries.insert(key(1), Arc::new(Used(1))).is_none());
        assert!(entries.insert(key(2), Arc::new(Used(2))).is_none());
        assert!(entries.insert(key(1), Arc::new(Used(3))).is_none());
        assert_eq!(entries.remove(&key(1)).map(|entry| entry.0), Some(3));
        assert!(entries.remove(&key(1)).is_none() && entries.len() == 1);
        assert!(entries.insert(key(3), Arc::new(Used(4))).is_none());
        entries.clear();
        assert!(entries.len() == 0 && entries.get(&key(2)).is_none() && entries.get(&key(3)).is_none());
    }

    #[test]
    fn those_in_use_stay() {
        const CAPACITY: u64 = 10_000;
        let entries = Entries::new(CAPACITY);
        // Every fifth one is used again and again, the others once.
        (0..CAPACITY).for_each(|number| {
            let used = if number % 5 == 0 { u64::MAX } else { number };
            entries.insert(key(number), Arc::new(Used(used)));
        });
        for number in CAPACITY..2 * CAPACITY {
            entries.insert(key(number), Arc::new(Used(number)));
        }
        let kept = (0..CAPACITY).filter(|number| number % 5 == 0 && entries.get(&key(*number)).is_some()).count();
        assert!(kept as u64 > CAPACITY / 5 * 99 / 100, "{kept} of {}", CAPACITY / 5);
    }

    #[test]
    fn it_counts_right_when_many_threads_write() {
        let entries = Entries::new(500);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let entries = &entries;
                scope.spawn(move || {
                    for number in 0..5_000 {
                        entries.insert(key(thread * 3_000 + number), Arc::new(Used(number)));
                        if number % 3 == 0 {
                            entries.remove(&key(number));
                        }
                    }
                });
            }
        });
        let mut seen = 0;
        entries.for_each(|_, _| seen += 1);
        assert!(entries.len() == seen && seen <= 500, "{seen} of {}", entries.len());
    }
}
