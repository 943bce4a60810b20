//! Series about limits. Their labels are names from the configuration.

use super::metrics::{Families, labels};
use prometheus::{IntCounter, IntCounterVec};

labels! {
    /// What a limit made of a request.
    LimitCount { Allowed = "allowed", Refused = "refused", DryRun = "dry_run" }
}

pub(super) struct LimitFamilies {
    requests: IntCounterVec,
    shared: IntCounterVec,
}

/// Those of one limit, resolved at start so that a request looks nothing up.
pub struct LimitMetrics {
    requests: Vec<IntCounter>,
    shared: IntCounter,
}

impl LimitFamilies {
    pub(super) fn new(families: &Families<'_>) -> Result<Self, prometheus::Error> {
        Ok(Self {
            requests: families.counters(
                "tollgate_limit_requests_total",
                "Requests that a limit applied to, by result (dry_run: it would have been refused).",
                &["limit", "result"],
            )?,
            shared: families.counters(
                "tollgate_limit_shared_bucket_total",
                "Requests that had no bucket of their own, because all buckets of the limit were in use.",
                &["limit"],
            )?,
        })
    }

    pub(super) fn of(&self, name: &str) -> LimitMetrics {
        let series = LimitCount::ALL.iter().map(|result| self.requests.with_label_values(&[name, result.as_str()]));
        LimitMetrics { requests: series.collect(), shared: self.shared.with_label_values(&[name]) }
    }
}

impl LimitMetrics {
    pub fn count(&self, result: LimitCount) {
        if let Some(counter) = self.requests.get(result as usize) {
            counter.inc();
        }
    }

    pub fn shared(&self) {
        self.shared.inc();
    }

    /// By result, and last those without a bucket of their own.
    pub(super) fn counts(&self) -> [u64; 4] {
        let of = |result: LimitCount| self.requests.get(result as usize).map_or(0, IntCounter::get);
        [of(LimitCount::Allowed), of(LimitCount::Refused), of(LimitCount::DryRun), self.shared.get()]
    }
}
