//! Series about limits that replicas share. There are none without a store for them.

use super::metrics::Families;
use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};
use std::time::Duration;

/// A round trip in one machine room.
const SHARE_SECONDS: &[f64] = &[0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0];

pub(super) struct ShareFamilies {
    messages: IntCounterVec,
    keys: IntCounterVec,
    duration: HistogramVec,
    replicas: IntGaugeVec,
    there: IntGaugeVec,
}

/// Those of one store.
#[derive(Clone)]
pub struct ShareMetrics {
    answered: IntCounter,
    failed: IntCounter,
    keys: IntCounter,
    duration: Histogram,
    replicas: IntGauge,
    there: IntGauge,
}

impl ShareFamilies {
    pub(super) fn new(families: &Families<'_>) -> Result<Self, prometheus::Error> {
        Ok(Self {
            messages: families.counters(
                "tollgate_shared_limits_messages_total",
                "Messages to the store of shared limits, by result (answered, failed).",
                &["store", "result"],
            )?,
            keys: families.counters(
                "tollgate_shared_limits_leases_total",
                "Leases that the store of shared limits was asked for.",
                &["store"],
            )?,
            duration: families.histograms(
                "tollgate_shared_limits_duration_seconds",
                "Duration of answered messages to the store of shared limits.",
                &["store"],
                SHARE_SECONDS,
            )?,
            replicas: families.gauges(
                "tollgate_shared_limits_replicas",
                "Replicas that share limits, as this one knows them.",
                &["store"],
            )?,
            there: families.gauges(
                "tollgate_shared_limits_up",
                "1 while the store of shared limits answers, 0 while it does not and when_gone decides.",
                &["store"],
            )?,
        })
    }

    pub(super) fn of(&self, store: &str) -> ShareMetrics {
        ShareMetrics {
            answered: self.messages.with_label_values(&[store, "answered"]),
            failed: self.messages.with_label_values(&[store, "failed"]),
            keys: self.keys.with_label_values(&[store]),
            duration: self.duration.with_label_values(&[store]),
            replicas: self.replicas.with_label_values(&[store]),
            there: self.there.with_label_values(&[store]),
        }
    }

    /// No alert fires for a store that a reload removed.
    pub(super) fn forget(&self, store: &str) {
        // They may never have been there.
        let _ = self.replicas.remove_label_values(&[store]);
        let _ = self.there.remove_label_values(&[store]);
    }
}

impl ShareMetrics {
    pub fn answered(&self, keys: usize, duration: Duration) {
        self.answered.inc();
        self.keys.inc_by(keys as u64);
        self.duration.observe(duration.as_secs_f64());
    }

    pub fn failed(&self) {
        self.failed.inc();
    }

    pub fn replicas(&self, count: u64) {
        self.replicas.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    pub fn there(&self, there: bool) {
        self.there.set(there.into());
    }
}
