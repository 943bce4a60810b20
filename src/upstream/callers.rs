//! How much each caller has asked of a pool of late, in memory of a fixed size: a count-min sketch whose counts are halved again
//! and again. It never says too little; who shares all places with a busy caller is taken for one. Pure: time is an argument. It
//! must not know who a caller is.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

const ROWS: usize = 4;
/// A power of two. With so many, who asks for nothing is taken for one who asks for a thousandth of all.
const WIDTH: usize = 1_024;
/// After this time, a request counts half.
const HALF_LIFE: Duration = Duration::from_secs(5);

pub(super) struct Callers {
    counts: Box<[[AtomicU32; WIDTH]; ROWS]>,
    began: Instant,
    /// How often the counts have been halved.
    halved: AtomicU64,
}

/// How much a caller asks: each step is twice as much as the one before. Those of one step are equals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct CallerRank(u32);

impl Callers {
    pub(super) fn new(now: Instant) -> Self {
        let row = || std::array::from_fn(|_| AtomicU32::new(0));
        Self { counts: Box::new(std::array::from_fn(|_| row())), began: now, halved: AtomicU64::new(0) }
    }

    /// Counts a request. `caller`: a number that is spread evenly. `weight`: it may ask so many times as much as others of its rank.
    pub(super) fn asks(&self, caller: u64, weight: u32, now: Instant) -> CallerRank {
        self.forget(now);
        let places = self.counts.iter().enumerate().map(|(row, counts)| {
            // Each row takes other bits.
            let place = (caller >> (16 * row)) as usize % WIDTH;
            counts.get(place).map_or(0, |count| count.fetch_add(1, Relaxed).saturating_add(1))
        });
        CallerRank((places.min().unwrap_or(0) / weight.max(1)).checked_ilog2().unwrap_or(0))
    }

    fn forget(&self, now: Instant) {
        let due = (now.saturating_duration_since(self.began).as_secs_f64() / HALF_LIFE.as_secs_f64()) as u64;
        let halved = self.halved.load(Relaxed);
        if due <= halved || self.halved.compare_exchange(halved, due, Relaxed, Relaxed).is_err() {
            return;
        }
        let shift = u32::try_from(due - halved).unwrap_or(u32::MAX);
        for count in self.counts.iter().flatten() {
            // A request that is counted at the same time may be lost, or count twice.
            count.store(count.load(Relaxed).checked_shr(shift).unwrap_or(0), Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Spread evenly.
    fn number(caller: u64) -> u64 {
        let mut hash = caller.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        hash ^ (hash >> 31)
    }

    #[test]
    fn who_asks_fifty_times_as_much_stands_out_among_a_thousand() {
        let start = Instant::now();
        let callers = Callers::new(start);
        let (mut busy, mut others) = (CallerRank::default(), CallerRank::default());
        // A minute of ten requests a second of each, and 500 of one.
        for tick in 0..600u64 {
            let now = start + Duration::from_millis(100) * u32::try_from(tick).unwrap();
            (0..50).for_each(|_| busy = callers.asks(number(0), 1, now));
            let all = (1..=1_000).map(|caller| callers.asks(number(caller), 1, now));
            others = all.max().unwrap();
        }
        assert!(busy.0 >= others.0 + 3, "{busy:?} {others:?}");
    }

    #[test]
    fn what_was_is_forgotten() {
        let start = Instant::now();
        let callers = Callers::new(start);
        let last = (0..1_000).map(|_| callers.asks(number(7), 1, start)).last();
        assert_eq!(last, Some(CallerRank(9)));
        assert_eq!(callers.asks(number(7), 1, start), CallerRank(9));
        assert_eq!(callers.asks(number(7), 1, start + HALF_LIFE), CallerRank(8));
        assert_eq!(callers.asks(number(7), 1, start + 3 * HALF_LIFE), CallerRank(6));
        assert_eq!(callers.asks(number(7), 1, start + 100 * HALF_LIFE), CallerRank(0));
        // A clock that is behind changes nothing.
        assert_eq!(callers.asks(number(7), 1, start), CallerRank(1));
    }

    #[test]
    fn a_weight_of_four_is_two_steps() {
        let start = Instant::now();
        let callers = Callers::new(start);
        let last = |weight: u32, caller: u64, times: u32| {
            (0..times).map(|_| callers.asks(number(caller), weight, start)).last()
        };
        assert_eq!(last(1, 1, 1_000), Some(CallerRank(9)));
        assert_eq!(last(4, 2, 1_000), Some(CallerRank(7)));
        // It is as far back as others when it has asked four times as much, and no further forward than the first.
        assert_eq!(last(4, 3, 4_000), Some(CallerRank(9)));
        assert_eq!((last(4, 4, 1), last(0, 5, 1)), (Some(CallerRank(0)), Some(CallerRank(0))));
    }

    #[test]
    fn no_caller_is_told_that_it_asks_less_than_it_does() {
        let start = Instant::now();
        let callers = Callers::new(start);
        let mut random = fastrand::Rng::with_seed(5);
        let mut asked = std::collections::HashMap::<u64, u32>::new();
        for _ in 0..100_000 {
            let caller = number(random.u64(0..3_000));
            let count = asked.entry(caller).or_default();
            *count += 1;
            assert!(callers.asks(caller, 1, start).0 >= count.ilog2());
        }
    }
}
