//! How many requests a pool may send again: a share of all requests, and so many a second. Without this bound, a backend that
//! begins to fail under load would get up to four times that load. Looked at only when a try has failed. It must not know why.

use parking_lot::Mutex;
use std::time::Instant;

/// Repeats that can be saved up, in seconds of the floor; and at least so many.
const SECONDS_SAVED: f64 = 10.0;
const LEAST_SAVED: f64 = 10.0;

/// Keys of an `[[upstream]]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryLimits {
    /// Repeats for a thousand requests.
    pub per_thousand: u32,
    /// Repeats a second in any case.
    pub floor: u32,
}

impl RetryLimits {
    fn most_saved(self) -> f64 {
        (f64::from(self.floor) * SECONDS_SAVED).max(LEAST_SAVED)
    }
}

/// Outlives a reload.
#[derive(Default)]
pub(super) struct RetryBudget(Mutex<Option<Savings>>);

struct Savings {
    repeats: f64,
    /// When it was looked at last, and how many requests there had been.
    at: Instant,
    requests: usize,
}

impl RetryBudget {
    /// Whether one more request may be sent again. `requests`: how many there have been.
    pub(super) fn take(&self, limits: RetryLimits, requests: usize, now: Instant) -> bool {
        let mut savings = self.0.lock();
        let savings = savings.get_or_insert(Savings { repeats: limits.most_saved(), at: now, requests });
        let seconds = now.saturating_duration_since(savings.at).as_secs_f64();
        let asked = requests.saturating_sub(savings.requests) as f64;
        let earned = asked * f64::from(limits.per_thousand) / 1000.0 + seconds * f64::from(limits.floor);
        savings.repeats = (savings.repeats + earned).min(limits.most_saved());
        (savings.at, savings.requests) = (now, requests);
        let may = savings.repeats >= 1.0;
        if may {
            savings.repeats -= 1.0;
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// Over any time, no more than what was saved, the share of the requests, and the floor.
    #[test]
    fn repeats_are_a_share_of_the_requests_and_so_many_a_second() {
        let mut random = fastrand::Rng::with_seed(21);
        for _ in 0..100 {
            let limits = RetryLimits { per_thousand: random.u32(0..500), floor: random.u32(0..20) };
            let (start, budget) = (Instant::now(), RetryBudget::default());
            let (mut now, mut requests, mut granted, mut refused) = (start, 0, 0, 0);
            for _ in 0..5_000 {
                now += Duration::from_millis(random.u64(0..3));
                requests += random.usize(0..3);
                match budget.take(limits, requests, now) {
                    true => granted += 1,
                    false => refused += 1,
                }
            }
            let share = f64::from(limits.per_thousand) / 1000.0 * requests as f64;
            let earned = share + (now - start).as_secs_f64() * f64::from(limits.floor) + limits.most_saved();
            assert!(f64::from(granted) <= earned, "{limits:?}: {granted} of {earned}");
            assert!(refused == 0 || f64::from(granted) > earned - 2.0, "{limits:?}: {granted} of {earned}");
        }
    }

    #[test]
    fn what_is_not_used_is_saved_only_for_a_while() {
        let limits = RetryLimits { per_thousand: 200, floor: 10 };
        let (start, budget) = (Instant::now(), RetryBudget::default());
        assert!(budget.take(limits, 0, start));
        let later = start + Duration::from_secs(3_600);
        let granted = (0..1_000).filter(|_| budget.take(limits, 1_000_000, later)).count();
        assert_eq!(granted, 100);
    }
}
