//! The time. The only place that reads the clocks.

use nix::time::{ClockId, clock_gettime};
use std::time::{Duration, SystemTime};

/// A point in time, read once per request. Stages take it as an argument, so that tests control it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Milliseconds of a monotonic clock, for lifetimes. It continues while the process is stopped and while the
    /// machine is suspended.
    pub mono_ms: u64,
    /// Milliseconds since the Unix epoch, for dates in records and logs.
    pub unix_ms: u64,
}

/// A timer that fires later than this shows that this process did not run in time: what it waited for may have arrived, and
/// lie unread.
pub const LATE: Duration = Duration::from_millis(100);

/// Reads both clocks.
pub fn now() -> Now {
    // Not `Instant`: its clock (CLOCK_MONOTONIC) stops while the machine is suspended, so cache entries would live too
    // long. CLOCK_BOOTTIME exists since Linux 2.6.39.
    let mono = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
    let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Now { mono_ms: mono.as_millis() as u64, unix_ms: unix.as_millis() as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_counts_from_the_boot_of_the_machine() {
        let before = now();
        let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
        let seconds: f64 = uptime.split(' ').next().unwrap().parse().unwrap();
        let after = now();
        // /proc/uptime shows the same clock, in hundredths of a second.
        let uptime = (seconds * 1000.0) as u64;
        assert!((before.mono_ms - 10..=after.mono_ms + 10).contains(&uptime), "{before:?} {uptime} {after:?}");
        assert!(before.mono_ms <= after.mono_ms && before.mono_ms > 0);
    }
}
