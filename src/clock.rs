//! The time, and the one place that reads the clocks. Knows nothing else.

use nix::time::{ClockId, clock_gettime};
use std::time::{Duration, SystemTime};

/// A moment, read once for each request. Stages take it as an argument, so that tests own the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Milliseconds of a clock that only goes forward, from an arbitrary start: for lifetimes. It goes on while the
    /// process is stopped and while the machine is suspended.
    pub mono_ms: u64,
    /// Unix milliseconds: for dates in records and logs.
    pub unix_ms: u64,
}

/// Reads both clocks.
pub fn now() -> Now {
    // Not `Instant`, whose clock stands still while the machine is suspended: what was known before would seem young.
    // Every Linux since 2.6.39 has this one.
    let mono = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
    let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Now { mono_ms: mono.as_millis() as u64, unix_ms: unix.as_millis() as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_counts_since_the_machine_was_started() {
        let before = now();
        let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
        let seconds: f64 = uptime.split(' ').next().unwrap().parse().unwrap();
        let after = now();
        // /proc/uptime is the same clock, cut to hundredths.
        let uptime = (seconds * 1000.0) as u64;
        assert!((before.mono_ms - 10..=after.mono_ms + 10).contains(&uptime), "{before:?} {uptime} {after:?}");
        assert!(before.mono_ms <= after.mono_ms && before.mono_ms > 0);
    }
}
