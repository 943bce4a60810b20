//! The series that every Prometheus exporter has of its own process, by their usual names. Linux only, as tollgate is. Read at
//! a scrape; what /proc does not tell keeps its last value.

use super::metrics::Families;
use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage};
use prometheus::{Counter, IntGauge};
use std::time::{SystemTime, UNIX_EPOCH};

pub(super) struct ProcessMetrics {
    cpu: Counter,
    open_fds: IntGauge,
    max_fds: IntGauge,
    virtual_memory: IntGauge,
    resident_memory: IntGauge,
    threads: IntGauge,
}

impl ProcessMetrics {
    /// The process starts now, as far as the series tell.
    pub(super) fn new(families: &Families<'_>) -> Result<Self, prometheus::Error> {
        let started = families.float_gauge("process_start_time_seconds", "When the process started, in Unix time.")?;
        started.set(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64()));
        Ok(Self {
            cpu: families
                .float_counter("process_cpu_seconds_total", "CPU time of the process, in user space and kernel.")?,
            open_fds: families.gauge("process_open_fds", "Open file descriptors.")?,
            max_fds: families.gauge("process_max_fds", "Most file descriptors that the process may open.")?,
            virtual_memory: families.gauge("process_virtual_memory_bytes", "Virtual memory of the process.")?,
            resident_memory: families.gauge("process_resident_memory_bytes", "Resident memory of the process.")?,
            threads: families.gauge("process_threads", "Threads of the process.")?,
        })
    }

    pub(super) fn publish(&self) {
        if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
            let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
            let used = seconds(usage.user_time()) + seconds(usage.system_time());
            self.cpu.inc_by((used - self.cpu.get()).max(0.0));
        }
        if let Ok((soft, _)) = getrlimit(Resource::RLIMIT_NOFILE) {
            self.max_fds.set(i64::try_from(soft).unwrap_or(i64::MAX));
        }
        if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
            // The folder itself is open while it is read.
            self.open_fds.set(i64::try_from(open.count().saturating_sub(1)).unwrap_or(i64::MAX));
        }
        let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return };
        for (name, gauge, unit) in [
            ("VmSize:", &self.virtual_memory, 1024),
            ("VmRSS:", &self.resident_memory, 1024),
            ("Threads:", &self.threads, 1),
        ] {
            if let Some(value) = field(&status, name) {
                gauge.set(value.saturating_mul(unit));
            }
        }
    }
}

/// The number in a line of /proc/self/status. Its unit is always kB, where there is one.
fn field(status: &str, name: &str) -> Option<i64> {
    status.lines().find_map(|line| line.strip_prefix(name))?.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus::{Registry, TextEncoder};

    #[test]
    fn the_process_is_told_by_its_usual_series() {
        let registry = Registry::new();
        let metrics = ProcessMetrics::new(&Families(&registry)).unwrap();
        let _open = std::fs::File::open("/proc/self/status").unwrap();
        metrics.publish();
        let text = TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        let value = |name: &str| -> f64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
        };
        assert!(value("process_open_fds") >= 4.0 && value("process_max_fds") >= value("process_open_fds"));
        assert!(value("process_resident_memory_bytes") > 1e6, "a unit is wrong");
        assert!(value("process_virtual_memory_bytes") >= value("process_resident_memory_bytes"));
        assert!(value("process_threads") >= 2.0 && value("process_cpu_seconds_total") > 0.0);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        assert!((now - value("process_start_time_seconds")).abs() < 60.0);
    }

    #[test]
    fn a_line_that_is_not_there_is_no_zero() {
        assert_eq!(field("VmRSS:\t  2048 kB\nThreads:\t3\n", "VmRSS:"), Some(2048));
        assert_eq!(field("VmRSS:\t  2048 kB\nThreads:\t3\n", "Threads:"), Some(3));
        assert_eq!(field("Threads:\t3\n", "VmRSS:"), None);
        assert_eq!(field("Threads:\tmany\n", "Threads:"), None);
    }
}
