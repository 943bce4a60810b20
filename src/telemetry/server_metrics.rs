//! The series of the servers behind the gateway. They go with the last user of a server's name, so that no alert fires for a
//! server that a reload or a changed name removed. Knows no server.

use super::metrics::Families;
use parking_lot::Mutex;
use prometheus::{GaugeVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// Every family with the labels `upstream` and `server`.
pub(super) struct ServerFamilies {
    up: IntGaugeVec,
    outages: IntCounterVec,
    in_flight: IntGaugeVec,
    draining: IntGaugeVec,
    limit: IntGaugeVec,
    limit_pinned: IntGaugeVec,
    unloaded: GaugeVec,
    samples: IntCounterVec,
    /// Users of each upstream and server: the pool that a reload replaces ends after its successor began.
    users: Mutex<HashMap<[String; 2], usize>>,
}

impl ServerFamilies {
    pub(super) fn new(families: &Families<'_>) -> Result<Self, prometheus::Error> {
        Ok(Self {
            up: families.gauges(
                "tollgate_upstream_server_up",
                "1 while the server is well, 0 while it is left alone.",
                &["upstream", "server"],
            )?,
            outages: families.counters(
                "tollgate_upstream_server_outages_total",
                "Times that the server was found to be down.",
                &["upstream", "server"],
            )?,
            in_flight: families.gauges(
                "tollgate_upstream_server_requests_in_flight",
                "Requests with the server, to the end of their responses.",
                &["upstream", "server"],
            )?,
            draining: families.gauges(
                "tollgate_upstream_server_draining",
                "1 while the server gets no new requests because an operator drains it.",
                &["upstream", "server"],
            )?,
            limit: families.gauges(
                "tollgate_upstream_server_limit",
                "Requests that may wait for the heads of their responses, where that is adaptive.",
                &["upstream", "server"],
            )?,
            limit_pinned: families.gauges(
                "tollgate_upstream_server_limit_pinned",
                "1 while an adaptive limit is the least that it may be, and used.",
                &["upstream", "server"],
            )?,
            unloaded: families.float_gauges(
                "tollgate_upstream_server_unloaded_seconds",
                "The middle time to a response of the server without load, as an adaptive limit knows it.",
                &["upstream", "server"],
            )?,
            samples: families.counters(
                "tollgate_upstream_server_limit_samples_total",
                "Responses that an adaptive limit was learned from.",
                &["upstream", "server"],
            )?,
            users: Mutex::default(),
        })
    }

    pub(super) fn server(self: &Arc<Self>, upstream: &str, server: &str) -> ServerMetrics {
        let labels = [upstream.to_owned(), server.to_owned()];
        *self.users.lock().entry(labels.clone()).or_default() += 1;
        let series = ServerMetrics {
            up: self.up.with_label_values(&labels),
            outages: self.outages.with_label_values(&labels),
            in_flight: self.in_flight.with_label_values(&labels),
            draining: self.draining.with_label_values(&labels),
            labels,
            families: Arc::clone(self),
        };
        series.up.set(1);
        series
    }

    /// Those that were never there cannot be removed, which is no error.
    fn forget_adaptive(&self, labels: &[String; 2]) {
        let _ = self.limit.remove_label_values(labels);
        let _ = self.limit_pinned.remove_label_values(labels);
        let _ = self.unloaded.remove_label_values(labels);
        let _ = self.samples.remove_label_values(labels);
    }
}

/// What an adaptive limit says of itself.
#[derive(Clone, Copy, Debug)]
pub struct AdaptiveReading {
    pub limit: u32,
    /// It is the least that it may be, and used.
    pub is_pinned: bool,
    /// The middle time to a response without load; `None`: not known yet.
    pub unloaded: Option<Duration>,
    pub samples: u64,
}

/// One server's series.
pub struct ServerMetrics {
    labels: [String; 2],
    up: IntGauge,
    outages: IntCounter,
    in_flight: IntGauge,
    draining: IntGauge,
    families: Arc<ServerFamilies>,
}

impl ServerMetrics {
    pub fn went_down(&self) {
        self.up.set(0);
        self.outages.inc();
    }

    pub fn in_flight(&self, requests: u32) {
        self.in_flight.set(requests.into());
    }

    pub fn draining(&self, drained: bool) {
        self.draining.set(drained.into());
    }

    /// `None`: it has no adaptive limit, and no series of one.
    pub fn adaptive(&self, reading: Option<AdaptiveReading>) {
        let Some(reading) = reading else {
            self.families.forget_adaptive(&self.labels);
            return;
        };
        self.families.limit.with_label_values(&self.labels).set(reading.limit.into());
        self.families.limit_pinned.with_label_values(&self.labels).set(reading.is_pinned.into());
        let samples = self.families.samples.with_label_values(&self.labels);
        samples.inc_by(reading.samples.saturating_sub(samples.get()));
        if let Some(unloaded) = reading.unloaded {
            self.families.unloaded.with_label_values(&self.labels).set(unloaded.as_secs_f64());
        }
    }

    pub fn came_back(&self) {
        self.up.set(1);
    }
}

impl Drop for ServerMetrics {
    fn drop(&mut self) {
        let mut users = self.families.users.lock();
        let left = users.get(&self.labels).map_or(0, |count| count - 1);
        if left > 0 {
            users.insert(self.labels.clone(), left);
            return;
        }
        users.remove(&self.labels);
        // One that was never there cannot be removed, which is no error.
        let _ = self.families.up.remove_label_values(&self.labels);
        let _ = self.families.outages.remove_label_values(&self.labels);
        let _ = self.families.in_flight.remove_label_values(&self.labels);
        let _ = self.families.draining.remove_label_values(&self.labels);
        self.families.forget_adaptive(&self.labels);
    }
}

#[cfg(test)]
mod tests {
    use super::super::metrics::Metrics;

    #[test]
    fn series_go_with_the_last_user_of_their_server() {
        let metrics = Metrics::new("test").unwrap();
        let (first, next) = (metrics.server("api", "a:1"), metrics.server("api", "a:1"));
        first.went_down();
        drop(first);
        let text = metrics.render().unwrap();
        assert!(text.contains("tollgate_upstream_server_up{server=\"a:1\",upstream=\"api\"} 0"), "{text}");
        assert!(text.contains("tollgate_upstream_server_outages_total{server=\"a:1\",upstream=\"api\"} 1"), "{text}");
        drop(next);
        assert!(!metrics.render().unwrap().contains("server=\"a:1\""), "{}", metrics.render().unwrap());
    }
}
