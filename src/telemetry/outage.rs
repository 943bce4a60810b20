//! When to say that something fails: once as it begins and once as it ends, however many requests meet it. Time is an
//! argument.

use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What fails and works by turns is told no more often than this.
const TOLD_EVERY: Duration = Duration::from_secs(10);

/// Whether something fails at the moment.
#[derive(Default)]
pub struct Outage {
    /// Read without the lock by everything that works.
    failing: AtomicBool,
    state: Mutex<OutageState>,
}

#[derive(Default)]
struct OutageState {
    began: Option<Instant>,
    /// The beginning was said, so the end will be.
    told: bool,
    told_at: Option<Instant>,
    /// Failures since the last end that was said.
    failures: u64,
}

/// An outage that is over.
#[derive(Debug, PartialEq, Eq)]
pub struct Recovery {
    pub failures: u64,
    pub lasted: Duration,
}

impl Outage {
    /// Something failed. `Some`: say so; it is the failure of this number that was not told of.
    pub fn failed(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock();
        state.failures += 1;
        state.began.get_or_insert(now);
        self.failing.store(true, Ordering::Relaxed);
        let quiet = state.told_at.is_none_or(|told| now.saturating_duration_since(told) >= TOLD_EVERY);
        if state.told || !quiet {
            return None;
        }
        (state.told, state.told_at) = (true, Some(now));
        Some(state.failures)
    }

    /// Something that was begun at a time has worked. `Some`: say that it works again. What was begun before the outage
    /// proves nothing.
    pub fn succeeded(&self, begun: Instant, now: Instant) -> Option<Recovery> {
        if !self.failing.load(Ordering::Relaxed) {
            return None;
        }
        let mut state = self.state.lock();
        let began = state.began.filter(|began| begun > *began)?;
        self.failing.store(false, Ordering::Relaxed);
        state.began = None;
        if !std::mem::take(&mut state.told) {
            return None;
        }
        state.told_at = Some(now);
        let failures = std::mem::take(&mut state.failures);
        Some(Recovery { failures, lasted: now.saturating_duration_since(began) })
    }
}

/// What may be said once a minute, with a count of how often it could have been.
#[derive(Default)]
pub struct LogThrottle(Mutex<(Option<Instant>, u64)>);

impl LogThrottle {
    const PAUSE: Duration = Duration::from_secs(60);

    /// `Some`: say it; so often it was not said since the last time.
    pub fn due(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock();
        let (last, unsaid) = &mut *state;
        if last.is_some_and(|last| now.saturating_duration_since(last) < Self::PAUSE) {
            *unsaid += 1;
            return None;
        }
        *last = Some(now);
        Some(std::mem::take(unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn an_outage_is_two_lines_however_many_meet_it() {
        let (outage, start) = (Outage::default(), Instant::now());
        assert_eq!(outage.succeeded(start, start + MS), None, "nothing failed yet");
        assert_eq!(outage.failed(start + 2 * MS), Some(1));
        for more in 0..5_000 {
            assert_eq!(outage.failed(start + (3 + more) * MS), None);
        }
        // An answer to a question from before.
        assert_eq!(outage.succeeded(start + MS, start + 6_000 * MS), None);
        let over = outage.succeeded(start + 6_001 * MS, start + 6_002 * MS);
        assert_eq!(over, Some(Recovery { failures: 5_001, lasted: 6_000 * MS }));
        // Stragglers of the same outage say nothing.
        assert_eq!(outage.failed(start + 6_003 * MS), None);
        assert_eq!(outage.succeeded(start + 6_004 * MS, start + 6_005 * MS), None);
        // The next one does, and remembers them.
        assert_eq!(outage.failed(start + 60_000 * MS), Some(2));
        let over = outage.succeeded(start + 60_001 * MS, start + 60_002 * MS);
        assert_eq!(over, Some(Recovery { failures: 2, lasted: 2 * MS }));
    }

    #[test]
    fn what_fails_by_turns_is_told_every_ten_seconds_at_most() {
        let (outage, start) = (Outage::default(), Instant::now());
        let mut lines = 0;
        for turn in 0..60_000 {
            let at = start + turn * MS;
            lines += match turn % 2 {
                0 => u32::from(outage.failed(at).is_some()),
                _ => u32::from(outage.succeeded(at, at).is_some()),
            };
        }
        assert!((10..=13).contains(&lines), "{lines} lines in a minute");
    }

    #[test]
    fn seldom_counts_what_it_keeps_back() {
        let (seldom, start) = (LogThrottle::default(), Instant::now());
        assert_eq!(seldom.due(start), Some(0));
        assert_eq!((seldom.due(start + MS), seldom.due(start + 59_999 * MS)), (None, None));
        assert_eq!(seldom.due(start + 60_000 * MS), Some(2));
        assert_eq!(seldom.due(start + 120_000 * MS), Some(0));
    }
}
