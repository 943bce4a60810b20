//! One bucket of a limit: a rate with a burst (GCRA), a quota of the calendar in UTC, requests in flight. Pure integers; the
//! time is an argument. It must not know whose bucket it is, nor how many there are.

use super::limit_table::TableBucket;
use crate::clock::Now;

const DAY_MS: u64 = 24 * 60 * 60 * 1000;

/// How much is allowed: of a `[[limit]]`, and later of a plan or of a token's record. A bucket is always asked with the same
/// amounts: its state is counted in units of the rate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimitAmounts {
    pub rate: Option<RefillRate>,
    pub quota: Option<CalendarQuota>,
    /// Requests in flight.
    pub concurrency: Option<u32>,
}

/// So many requests in a time, and at most a burst of them at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefillRate {
    requests: u64,
    period_ms: u64,
    burst: u64,
    /// As it was written: requests, and their time in seconds.
    stated: (u64, u64),
}

/// So many requests in each period of the calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CalendarQuota {
    pub requests: u64,
    pub period: CalendarPeriod,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CalendarPeriod {
    Day,
    Month,
}

/// Which amount was exceeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LimitedBy {
    Rate,
    Quota,
    Concurrency,
    /// The limit is counted by a store, which does not answer.
    Store,
}

/// Why a bucket does not have what a request costs, and after what time it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shortage {
    pub by: LimitedBy,
    pub wait_ms: u64,
}

/// What is left in a bucket, and after what time it is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BucketLevel {
    pub remaining: u64,
    pub full_in_ms: u64,
}

/// The state, 24 bytes. All zeros is a full bucket.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LimitBucket {
    /// When the bucket is full again (the theoretical arrival time), in units: a millisecond has as many as there are
    /// requests in the rate's period, and a request costs as many as the period has milliseconds. So nothing is ever rounded.
    full_at: u64,
    /// The period of the calendar, and the count in it ([`COUNT_BITS`]).
    used: u64,
    in_flight: u32,
}

const COUNT_BITS: u32 = 40;
const COUNT: u64 = (1 << COUNT_BITS) - 1;

impl RefillRate {
    /// With more requests, or a longer period, the units of some hundred years would not fit into 64 bits.
    pub const MOST_REQUESTS: u64 = 1_000_000;
    pub const MOST_BURST: u64 = 1_000_000;

    pub fn new(requests: u64, period_ms: u64, burst: u64) -> Self {
        let common = greatest_divisor(requests, period_ms).max(1);
        let stated = (requests, period_ms / 1_000);
        Self { requests: requests / common, period_ms: period_ms / common, burst, stated }
    }

    pub fn burst(&self) -> u64 {
        self.burst
    }

    /// Requests, and the milliseconds that they have.
    pub(super) fn parts(&self) -> (u64, u64) {
        (self.requests, self.period_ms)
    }

    /// The time in milliseconds in which so many requests flow in, rounded up.
    pub(super) fn fills_in(&self, requests: u64) -> u64 {
        self.units(requests).div_ceil(self.requests.max(1))
    }

    /// The requests of a time, rounded up.
    pub fn requests_in(&self, time_ms: u64) -> u64 {
        self.requests.saturating_mul(time_ms).div_ceil(self.period_ms.max(1))
    }

    /// Whether the burst is so small that the steps of the clock, of a millisecond, would cost requests that are due.
    pub fn is_too_fine(&self) -> bool {
        let in_step = self.requests_in(1);
        self.requests.saturating_mul(10) > self.period_ms && self.burst <= in_step
    }

    fn units(&self, requests: u64) -> u64 {
        requests.saturating_mul(self.period_ms)
    }

    fn now(&self, now: Now) -> u64 {
        now.mono_ms.saturating_mul(self.requests)
    }

    /// What is owed: the units until the bucket is full.
    fn debt(&self, bucket: &LimitBucket, now: Now) -> u64 {
        bucket.full_at.saturating_sub(self.now(now))
    }
}

impl LimitAmounts {
    /// So many requests in so many seconds, as it was written; of the rate if there is one.
    pub fn stated(&self) -> Option<(u64, u64)> {
        let quota = self.quota.map(|quota| (quota.requests, quota.period.as_ms() / 1_000));
        self.rate.map(|rate| rate.stated).or(quota)
    }
}

fn greatest_divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { greatest_divisor(b, a % b) }
}

impl CalendarQuota {
    pub const MOST_REQUESTS: u64 = COUNT;

    /// What is used of the current period, and the number of that period.
    fn used(&self, bucket: &LimitBucket, now: Now) -> (u64, u64) {
        let (period, counted) = (self.period.number(now.unix_ms), bucket.used >> COUNT_BITS);
        // A clock that was set back by a little must not give the quota anew; one that was far ahead must not keep it.
        let period = if counted == period + 1 { counted } else { period };
        (period, if counted == period { bucket.used & COUNT } else { 0 })
    }
}

impl CalendarPeriod {
    /// Days since 1970, or months since the year 0.
    fn number(self, unix_ms: u64) -> u64 {
        let days = unix_ms / DAY_MS;
        match self {
            Self::Day => days,
            Self::Month => month_of(days),
        }
    }

    /// The time to the beginning of the next period.
    pub(super) fn rest_ms(self, unix_ms: u64) -> u64 {
        let next = self.number(unix_ms) + 1;
        let begins = match self {
            Self::Day => next,
            Self::Month => first_day_of(next),
        };
        begins.saturating_mul(DAY_MS).saturating_sub(unix_ms)
    }

    pub(super) const fn as_ms(self) -> u64 {
        match self {
            Self::Day => DAY_MS,
            Self::Month => 30 * DAY_MS,
        }
    }
}

/// The month of a day since 1970, in the Gregorian calendar: Howard Hinnant's `civil_from_days`.
fn month_of(days: u64) -> u64 {
    // Years begin in March there, so that the leap day is the last one.
    let since_0 = days + 719_468;
    let (era, of_era) = (since_0 / 146_097, since_0 % 146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let from_march = (5 * of_year + 2) / 153;
    (era * 400 + year) * 12 + from_march + 2
}

/// The first day of a month, the same backwards.
fn first_day_of(month: u64) -> u64 {
    let from_march = month.saturating_sub(2);
    let (year, from_march) = (from_march / 12, from_march % 12);
    let (era, of_era) = (year / 400, year % 400);
    let of_year = (153 * from_march + 2) / 5;
    (era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year).saturating_sub(719_468)
}

impl LimitBucket {
    /// Whether a request of this cost fits, in all amounts; if not, what takes the longest.
    #[inline]
    pub(super) fn check(&self, amounts: &LimitAmounts, cost: u64, now: Now) -> Result<(), Shortage> {
        let mut shortage: Option<Shortage> = None;
        let mut lacks = |by, wait_ms| {
            if shortage.is_none_or(|known| known.wait_ms < wait_ms) {
                shortage = Some(Shortage { by, wait_ms });
            }
        };
        if let Some(rate) = &amounts.rate {
            let (owed, room) = (rate.debt(self, now).saturating_add(rate.units(cost)), rate.units(rate.burst));
            if owed > room {
                lacks(LimitedBy::Rate, (owed - room).div_ceil(rate.requests.max(1)));
            }
        }
        if let Some(quota) = &amounts.quota
            && quota.used(self, now).1.saturating_add(cost) > quota.requests
        {
            lacks(LimitedBy::Quota, quota.period.rest_ms(now.unix_ms));
        }
        if amounts.concurrency.is_some_and(|most| self.in_flight >= most) {
            lacks(LimitedBy::Concurrency, 0);
        }
        shortage.map_or(Ok(()), Err)
    }

    /// Takes what a request costs, which was checked under the same lock.
    #[inline]
    pub(super) fn take(&mut self, amounts: &LimitAmounts, cost: u64, now: Now) {
        if let Some(rate) = &amounts.rate {
            self.full_at = self.full_at.max(rate.now(now)).saturating_add(rate.units(cost));
        }
        if let Some(quota) = &amounts.quota {
            let (period, used) = quota.used(self, now);
            self.used = period << COUNT_BITS | used.saturating_add(cost).min(COUNT);
        }
        if amounts.concurrency.is_some() {
            self.in_flight = self.in_flight.saturating_add(1);
        }
    }

    /// Checks and takes in one step, if there is nothing but a rate. `false`: there is more, or it does not fit; nothing was taken.
    #[inline(always)]
    pub(super) fn takes_of_rate_alone(&mut self, amounts: &LimitAmounts, cost: u64, now: Now) -> bool {
        let LimitAmounts { rate: Some(rate), quota: None, concurrency: None } = amounts else { return false };
        let now = rate.now(now);
        let full_at = self.full_at.max(now).checked_add(rate.units(cost));
        match full_at.filter(|full_at| full_at - now <= rate.units(rate.burst)) {
            Some(full_at) => {
                self.full_at = full_at;
                true
            }
            None => false,
        }
    }

    /// Undoes a take, from the state `before` it to the state `after` it. The rate is given back only if nobody took since:
    /// what has flowed in meanwhile may be the same as what was taken, and a bucket must never have more than it is due.
    pub(super) fn give_back(&mut self, cost: u64, before: &Self, after: &Self) {
        if self.full_at == after.full_at {
            self.full_at = before.full_at;
        }
        if self.used >> COUNT_BITS == after.used >> COUNT_BITS {
            self.used -= cost.min(self.used & COUNT);
        }
    }

    /// A request is over.
    pub(super) fn release(&mut self) {
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    /// What is left of the amount that was exceeded.
    pub(super) fn remaining(&self, by: LimitedBy, amounts: &LimitAmounts, now: Now) -> u64 {
        let alone = match by {
            LimitedBy::Quota => LimitAmounts { quota: amounts.quota, ..LimitAmounts::default() },
            LimitedBy::Rate | LimitedBy::Concurrency | LimitedBy::Store => *amounts,
        };
        self.level(&alone, now).remaining
    }

    /// Of the rate if there is one, else of the quota, else of the requests in flight.
    pub(super) fn level(&self, amounts: &LimitAmounts, now: Now) -> BucketLevel {
        if let Some(rate) = &amounts.rate {
            let debt = rate.debt(self, now);
            let remaining = rate.units(rate.burst).saturating_sub(debt) / rate.period_ms.max(1);
            return BucketLevel { remaining, full_in_ms: debt.div_ceil(rate.requests.max(1)) };
        }
        if let Some(quota) = &amounts.quota {
            let remaining = quota.requests.saturating_sub(quota.used(self, now).1);
            return BucketLevel { remaining, full_in_ms: quota.period.rest_ms(now.unix_ms) };
        }
        let remaining = amounts.concurrency.unwrap_or(0).saturating_sub(self.in_flight);
        BucketLevel { remaining: remaining.into(), full_in_ms: 0 }
    }
}

impl TableBucket for LimitBucket {
    type Terms = LimitAmounts;

    /// When it will be as good as new, by the monotonic clock, if no request is in flight; one that is so already is idle, and
    /// may make room for another.
    fn idle_at(&self, amounts: &LimitAmounts, now: Now) -> u64 {
        if self.in_flight > 0 {
            return u64::MAX;
        }
        let rate = amounts.rate.map_or(0, |rate| rate.debt(self, now).div_ceil(rate.requests.max(1)));
        let quota = amounts.quota.filter(|quota| quota.used(self, now).1 > 0);
        let quota = quota.map_or(0, |quota| quota.period.rest_ms(now.unix_ms));
        now.mono_ms.saturating_add(rate.max(quota))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(mono_ms: u64) -> Now {
        Now { mono_ms, unix_ms: mono_ms }
    }

    fn rate(requests: u64, period_ms: u64, burst: u64) -> LimitAmounts {
        LimitAmounts { rate: Some(RefillRate::new(requests, period_ms, burst)), ..LimitAmounts::default() }
    }

    fn asks(bucket: &mut LimitBucket, amounts: &LimitAmounts, cost: u64, now: Now) -> Result<(), u64> {
        bucket.check(amounts, cost, now).map_err(|shortage| shortage.wait_ms)?;
        bucket.take(amounts, cost, now);
        Ok(())
    }

    /// Also where the numbers end.
    #[test]
    fn taking_of_a_rate_alone_is_the_same() {
        let mut random = fastrand::Rng::with_seed(3);
        let (mut fitted, mut lacked, mut others) = (0, 0, 0);
        for _ in 0..2_000 {
            let (requests, period_ms, burst) = (random.u64(1..2_000), random.u64(1..100_000), random.u64(1..50));
            let amounts = LimitAmounts {
                rate: (random.u8(0..8) > 0).then(|| RefillRate::new(requests, period_ms, burst)),
                quota: (random.u8(0..8) == 0).then_some(CalendarQuota { requests: 40, period: CalendarPeriod::Day }),
                concurrency: (random.u8(0..8) == 0).then_some(30),
            };
            let (mut one, mut two) = (LimitBucket::default(), LimitBucket::default());
            let is_end = random.u8(0..8) == 0;
            let mut now = if is_end { u64::MAX / requests - 10_000 } else { random.u64(0..1 << 40) };
            for _ in 0..40 {
                now = now.saturating_add(random.u64(0..period_ms / requests + 2));
                let cost = random.u64(0..4);
                let is_taken = one.takes_of_rate_alone(&amounts, cost, at(now));
                let fits = two.check(&amounts, cost, at(now)).is_ok();
                let is_rate_alone = (amounts.quota, amounts.concurrency) == (None, None) && amounts.rate.is_some();
                match (is_rate_alone, fits) {
                    (true, true) => fitted += 1,
                    (true, false) => lacked += 1,
                    _ => others += 1,
                }
                // It leaves to the other way what is more than the numbers hold.
                assert!(is_taken == (is_rate_alone && fits) || (is_end && !is_taken), "{amounts:?} {now}");
                if fits {
                    two.take(&amounts, cost, at(now));
                    if !is_taken {
                        one.take(&amounts, cost, at(now));
                    }
                }
                let state = |bucket: &LimitBucket| (bucket.full_at, bucket.used, bucket.in_flight);
                assert_eq!(state(&one), state(&two), "{amounts:?} {now}");
            }
        }
        assert!(fitted.min(lacked).min(others) > 8_000, "{fitted} {lacked} {others}");
    }

    #[test]
    fn a_rate_is_exact_to_the_last_request() {
        // Odd rates on purpose: an interval in whole nanoseconds would drift.
        for (requests, period, burst) in [(600, 60_000, 10), (7, 60_000, 3), (1, 3_600_000, 1), (99_983, 1_000, 120)] {
            let amounts = rate(requests, period, burst);
            let (mut bucket, mut admitted) = (LimitBucket::default(), 0u64);
            // The machine has been up for ten years.
            let start = 10 * 365 * DAY_MS;
            for tick in 0..=20_000u64 {
                // As many as there is room for, so that nothing is left to flow over.
                while admitted < 500_000 && asks(&mut bucket, &amounts, 1, at(start + tick)).is_ok() {
                    admitted += 1;
                }
                if admitted < 500_000 {
                    assert_eq!(admitted, burst + tick * requests / period, "{requests}/{period} after {tick} ms");
                }
            }
        }
    }

    #[test]
    fn the_wait_that_is_said_is_the_shortest_that_is_enough() {
        let amounts = rate(7, 60_000, 3);
        for cost in 1..=3 {
            let mut bucket = LimitBucket::default();
            assert_eq!(asks(&mut bucket, &amounts, 3, at(1_000)), Ok(()));
            let wait = asks(&mut bucket, &amounts, cost, at(1_000)).unwrap_err();
            assert_eq!(wait, (cost * 60_000).div_ceil(7));
            assert!(bucket.check(&amounts, cost, at(1_000 + wait - 1)).is_err());
            assert_eq!(bucket.check(&amounts, cost, at(1_000 + wait)), Ok(()));
        }
    }

    #[test]
    fn a_bucket_never_holds_more_than_its_burst() {
        let amounts = rate(10, 1_000, 5);
        let mut bucket = LimitBucket::default();
        for start in [0, 1_000_000, 50_000_000] {
            let admitted = (0..100).filter(|_| asks(&mut bucket, &amounts, 1, at(start)).is_ok()).count();
            assert_eq!(admitted, 5);
        }
        assert_eq!(bucket.level(&amounts, at(50_000_000)), BucketLevel { remaining: 0, full_in_ms: 500 });
        assert_eq!(bucket.level(&amounts, at(50_000_250)), BucketLevel { remaining: 2, full_in_ms: 250 });
        assert_eq!(bucket.idle_at(&amounts, at(50_000_250)), 50_000_500);
    }

    #[test]
    fn quotas_follow_the_calendar() {
        let quota = |requests, period| LimitAmounts {
            quota: Some(CalendarQuota { requests, period }),
            ..LimitAmounts::default()
        };
        let (day, month) = (quota(10, CalendarPeriod::Day), quota(10, CalendarPeriod::Month));
        // 2028-02-28T23:59:59.999Z, in a leap year.
        let last = Now { mono_ms: 5, unix_ms: 1_835_395_199_999 };
        let after = |ms: u64| Now { mono_ms: 5 + ms, unix_ms: last.unix_ms + ms };
        let mut bucket = LimitBucket::default();
        assert_eq!(asks(&mut bucket, &day, 10, last), Ok(()));
        assert_eq!(asks(&mut bucket, &day, 1, last), Err(1));
        assert_eq!(asks(&mut bucket, &day, 10, after(1)), Ok(()));
        assert_eq!(asks(&mut bucket, &day, 1, after(1)), Err(DAY_MS));
        // A clock that is set back gives nothing anew; one that was a year ahead is forgotten.
        assert!(asks(&mut bucket, &day, 1, last).is_err());
        assert_eq!(asks(&mut bucket, &day, 10, after(365 * DAY_MS)), Ok(()));
        assert_eq!(asks(&mut bucket, &day, 1, after(2)), Ok(()));

        let mut bucket = LimitBucket::default();
        assert_eq!(asks(&mut bucket, &month, 9, last), Ok(()));
        assert_eq!(asks(&mut bucket, &month, 2, last), Err(DAY_MS + 1));
        assert_eq!(asks(&mut bucket, &month, 1, after(DAY_MS)), Ok(()));
        assert_eq!(asks(&mut bucket, &month, 10, after(DAY_MS + 1)), Ok(()));
        assert_eq!(asks(&mut bucket, &month, 1, after(DAY_MS + 1)), Err(31 * DAY_MS));
    }

    #[test]
    fn months_are_those_of_the_calendar() {
        // Lengths of four centuries, leap years included.
        let mut day = 0;
        for year in 1970u64..2370 {
            let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
            let lengths = [31, if leap { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
            for (month, length) in lengths.into_iter().enumerate() {
                let number = year * 12 + month as u64;
                assert_eq!((month_of(day), month_of(day + length - 1)), (number, number), "{year}-{month}");
                assert_eq!(first_day_of(number), day);
                day += length;
            }
        }
    }

    #[test]
    fn what_is_given_back_is_never_more_than_what_is_due() {
        let amounts = LimitAmounts {
            quota: Some(CalendarQuota { requests: 100, period: CalendarPeriod::Day }),
            ..rate(10, 1_000, 5)
        };
        let mut bucket = LimitBucket::default();
        let before = bucket;
        bucket.take(&amounts, 3, at(1_000));
        let after = bucket;
        bucket.give_back(3, &before, &after);
        assert_eq!((bucket.level(&amounts, at(1_000)).remaining, bucket.used & COUNT), (5, 0));
        // Somebody else took meanwhile, when the bucket was full again: nothing is given back of the rate.
        bucket.take(&amounts, 3, at(1_000));
        bucket.take(&amounts, 3, at(1_300));
        bucket.give_back(3, &before, &after);
        assert_eq!((bucket.level(&amounts, at(1_300)).remaining, bucket.used & COUNT), (2, 3));
    }
}
