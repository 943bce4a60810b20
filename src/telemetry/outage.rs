//! Limits repeated log messages: an outage is logged once when it begins and once when it ends, however many requests
//! fail meanwhile. Time is an argument.

use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Shortest interval between two outages that are logged, for something that fails intermittently.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Tracks whether something is failing at the moment.
#[derive(Default)]
pub struct Outage {
    /// Read without the lock on every success.
    failing: AtomicBool,
    state: Mutex<OutageState>,
}

#[derive(Default)]
struct OutageState {
    began: Option<Instant>,
    /// The beginning was logged, so the end must be.
    logged: bool,
    logged_at: Option<Instant>,
    /// Failures since the last end that was logged.
    failures: u64,
}

/// The end of an outage.
#[derive(Debug, PartialEq, Eq)]
pub struct Recovery {
    pub failures: u64,
    pub lasted: Duration,
}

impl Outage {
    /// Records a failure. `Some`: log it; the number counts the failures since the last logged recovery.
    pub fn failed(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock();
        state.failures += 1;
        state.began.get_or_insert(now);
        self.failing.store(true, Ordering::Relaxed);
        let quiet = state.logged_at.is_none_or(|logged| now.saturating_duration_since(logged) >= LOG_INTERVAL);
        if state.logged || !quiet {
            return None;
        }
        (state.logged, state.logged_at) = (true, Some(now));
        Some(state.failures)
    }

    /// Records the success of an operation. `Some`: log the recovery. The success of an operation that was started
    /// before the outage began does not end it.
    pub fn succeeded(&self, begun: Instant, now: Instant) -> Option<Recovery> {
        if !self.failing.load(Ordering::Relaxed) {
            return None;
        }
        let mut state = self.state.lock();
        let began = state.began.filter(|began| begun > *began)?;
        self.failing.store(false, Ordering::Relaxed);
        state.began = None;
        if !std::mem::take(&mut state.logged) {
            return None;
        }
        state.logged_at = Some(now);
        let failures = std::mem::take(&mut state.failures);
        Some(Recovery { failures, lasted: now.saturating_duration_since(began) })
    }
}

/// Allows a message once a minute, and counts how often it was suppressed.
#[derive(Default)]
pub struct LogThrottle(Mutex<(Option<Instant>, u64)>);

impl LogThrottle {
    const PAUSE: Duration = Duration::from_secs(60);

    /// `Some`: log the message; the number counts how often it was suppressed since the last time.
    pub fn due(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock();
        let (last, suppressed) = &mut *state;
        if last.is_some_and(|last| now.saturating_duration_since(last) < Self::PAUSE) {
            *suppressed += 1;
            return None;
        }
        *last = Some(now);
        Some(std::mem::take(suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn an_outage_is_two_lines_however_many_requests_fail() {
        let (outage, start) = (Outage::default(), Instant::now());
        assert_eq!(outage.succeeded(start, start + MS), None, "nothing failed yet");
        assert_eq!(outage.failed(start + 2 * MS), Some(1));
        for more in 0..5_000 {
            assert_eq!(outage.failed(start + (3 + more) * MS), None);
        }
        // The success of an operation from before.
        assert_eq!(outage.succeeded(start + MS, start + 6_000 * MS), None);
        let over = outage.succeeded(start + 6_001 * MS, start + 6_002 * MS);
        assert_eq!(over, Some(Recovery { failures: 5_001, lasted: 6_000 * MS }));
        // Failures shortly after the recovery are not logged.
        assert_eq!(outage.failed(start + 6_003 * MS), None);
        assert_eq!(outage.succeeded(start + 6_004 * MS, start + 6_005 * MS), None);
        // The next outage is, and its count includes them.
        assert_eq!(outage.failed(start + 60_000 * MS), Some(2));
        let over = outage.succeeded(start + 60_001 * MS, start + 60_002 * MS);
        assert_eq!(over, Some(Recovery { failures: 2, lasted: 2 * MS }));
    }

    #[test]
    fn intermittent_failures_are_logged_every_ten_seconds_at_most() {
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
    fn a_throttle_counts_what_it_suppresses() {
        let (throttle, start) = (LogThrottle::default(), Instant::now());
        assert_eq!(throttle.due(start), Some(0));
        assert_eq!((throttle.due(start + MS), throttle.due(start + 59_999 * MS)), (None, None));
        assert_eq!(throttle.due(start + 60_000 * MS), Some(2));
        assert_eq!(throttle.due(start + 120_000 * MS), Some(0));
    }
}
