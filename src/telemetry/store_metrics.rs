//! The series of token stores. They go with the last user of a store's name, so that no alert fires for a store that a reload
//! removed. Knows no store.

use super::metrics::{Families, quantile_of};
use parking_lot::Mutex;
use prometheus::core::Collector;
use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// A lookup in an embedded store takes microseconds, in a remote one milliseconds.
const STORE_SECONDS: &[f64] = &[0.00001, 0.00005, 0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0];
/// Around the promise of one second.
const LAG_SECONDS: &[f64] = &[0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 30.0, 60.0];

const RESULTS: [&str; 2] = ["unknown", "found"];
const CONNECTION_STATES: [&str; 3] = ["open", "in_use", "most"];

/// Every family with the label `store`.
pub(super) struct StoreFamilies {
    duration: HistogramVec,
    lookups: IntCounterVec,
    waiting: IntGaugeVec,
    errors: IntCounterVec,
    connections: IntGaugeVec,
    subscribed: IntGaugeVec,
    unheard: IntGaugeVec,
    losses: IntCounterVec,
    server: IntGaugeVec,
    /// Of each user of a name.
    servers: Mutex<Vec<(String, String)>>,
    writable: IntGaugeVec,
    breaker_open: IntGaugeVec,
    file_current: IntGaugeVec,
    rechecks: IntCounterVec,
    evicted: IntCounterVec,
    lag: HistogramVec,
    /// Users of each name: the store that a reload replaces ends after its successor began.
    users: Mutex<HashMap<String, usize>>,
}

impl StoreFamilies {
    pub(super) fn new(families: &Families<'_>) -> Result<Self, prometheus::Error> {
        Ok(Self {
            duration: families.histograms(
                "tollgate_store_lookup_duration_seconds",
                "Duration of answered token store lookups, without the wait for their turn.",
                &["store"],
                STORE_SECONDS,
            )?,
            lookups: families.counters(
                "tollgate_store_lookups_total",
                "Lookups answered by the token store, by whether the token was found.",
                &["store", "result"],
            )?,
            waiting: families.gauges(
                "tollgate_store_lookups_waiting",
                "Lookups that wait for their turn at the token store.",
                &["store"],
            )?,
            connections: families.gauges(
                "tollgate_store_connections",
                "Connections to the token store: open, in use, and the maximum.",
                &["store", "state"],
            )?,
            subscribed: families.gauges(
                "tollgate_store_subscribed",
                "1 while change notifications arrive from the token store, 0 while they do not.",
                &["store"],
            )?,
            unheard: families.gauges(
                "tollgate_store_subscription_problem",
                "1 while change notifications do not arrive from the token store, by cause.",
                &["store", "cause"],
            )?,
            losses: families.counters(
                "tollgate_store_subscription_losses_total",
                "Times that change notifications stopped arriving.",
                &["store"],
            )?,
            server: families.gauges(
                "tollgate_store_server_info",
                "1 for each server that change notifications are heard from and lookups go to.",
                &["store", "server"],
            )?,
            writable: families.gauges(
                "tollgate_store_writable",
                "1 while the token store's server takes writes, 0 while it does not and no token can be revoked.",
                &["store"],
            )?,
            breaker_open: families.gauges(
                "tollgate_store_breaker_open",
                "1 while the circuit breaker of the token store is open.",
                &["store"],
            )?,
            file_current: families.gauges(
                "tollgate_store_file_current",
                "1 while the current token file is in use, 0 while it is invalid or missing and an earlier one is.",
                &["store"],
            )?,
            rechecks: families.counters(
                "tollgate_store_rechecks_total",
                "Times that all cached tokens of a store had to be looked up again because changes may have been missed.",
                &["store"],
            )?,
            evicted: families.counters(
                "tollgate_store_evicted_keys_total",
                "Keys that the token store's server removed to make room, seen by this gateway.",
                &["store"],
            )?,
            errors: families.counters(
                "tollgate_store_errors_total",
                "Lookups that the token store failed to answer.",
                &["store", "kind"],
            )?,
            lag: families.histograms(
                "tollgate_revocation_lag_seconds",
                "Time from a token's change in the store to its effect in this gateway.",
                &["store"],
                LAG_SECONDS,
            )?,
            servers: Mutex::default(),
            users: Mutex::default(),
        })
    }

    /// One store's series, resolved once.
    pub(super) fn store(self: &Arc<Self>, name: &str) -> StoreMetrics {
        *self.users.lock().entry(name.to_owned()).or_default() += 1;
        StoreMetrics {
            name: name.into(),
            duration: self.duration.with_label_values(&[name]),
            lookups: RESULTS.map(|result| self.lookups.with_label_values(&[name, result])),
            waiting: self.waiting.with_label_values(&[name]),
            rechecks: self.rechecks.with_label_values(&[name]),
            lag: self.lag.with_label_values(&[name]),
            failed: Mutex::default(),
            unheard: Mutex::default(),
            servers: Mutex::default(),
            families: Arc::clone(self),
        }
    }

    /// What the series of a name say.
    pub(super) fn reading(&self, name: &str) -> StoreReading {
        let of = |family: &IntGaugeVec, label: &str| labelled(family, name, label);
        let first = |family: &IntGaugeVec| of(family, "").first().map(|(_, value)| *value);
        let count = |family: &IntCounterVec, label: &str| labelled(family, name, label);
        let seconds = |family: &HistogramVec, bounds: &[f64]| {
            // The series of a store that is in use are there.
            let series = family.with_label_values(&[name]);
            let of = |share| quantile_of(&series, bounds, share);
            (series.get_sample_count(), of(0.5), of(0.99))
        };
        StoreReading {
            subscribed: first(&self.subscribed).map(|value| value != 0),
            problem: of(&self.unheard, "cause").into_iter().find(|(_, value)| *value != 0).map(|(cause, _)| cause),
            losses: count(&self.losses, "").first().map_or(0, |(_, value)| *value),
            rechecks: count(&self.rechecks, "").first().map_or(0, |(_, value)| *value),
            servers: of(&self.server, "server").into_iter().map(|(server, _)| server).collect(),
            writable: first(&self.writable).map(|value| value != 0),
            breaker_open: first(&self.breaker_open).is_some_and(|value| value != 0),
            file_current: first(&self.file_current).map(|value| value != 0),
            waiting: first(&self.waiting).unwrap_or(0),
            connections: of(&self.connections, "state"),
            lookups: count(&self.lookups, "result"),
            errors: count(&self.errors, "kind"),
            lookup_seconds: seconds(&self.duration, STORE_SECONDS),
            revocation_lag_seconds: seconds(&self.lag, LAG_SECONDS),
        }
    }

    /// One user fewer. The series of a name that nobody uses are removed.
    fn leave(&self, name: &str, failed: &[&'static str]) {
        let mut users = self.users.lock();
        let left = users.get(name).map_or(0, |count| count - 1);
        if left > 0 {
            users.insert(name.to_owned(), left);
            return;
        }
        users.remove(name);
        // One that was never there cannot be removed, which is no error.
        let store = [name];
        let _ = self.duration.remove_label_values(&store);
        let _ = self.lag.remove_label_values(&store);
        for family in [&self.waiting, &self.subscribed, &self.writable, &self.breaker_open, &self.file_current] {
            let _ = family.remove_label_values(&store);
        }
        for family in [&self.losses, &self.rechecks, &self.evicted] {
            let _ = family.remove_label_values(&store);
        }
        for result in RESULTS {
            let _ = self.lookups.remove_label_values(&[name, result]);
        }
        for kind in failed {
            let _ = self.errors.remove_label_values(&[name, kind]);
        }
        for state in CONNECTION_STATES {
            let _ = self.connections.remove_label_values(&[name, state]);
        }
    }
}

/// What the series of a store say at the moment.
pub struct StoreReading {
    /// `None`: it sends no change notifications.
    pub subscribed: Option<bool>,
    /// Why none arrive.
    pub problem: Option<String>,
    pub losses: u64,
    pub rechecks: u64,
    pub servers: Vec<String>,
    pub writable: Option<bool>,
    pub breaker_open: bool,
    pub file_current: Option<bool>,
    pub waiting: u64,
    pub connections: Vec<(String, u64)>,
    pub lookups: Vec<(String, u64)>,
    pub errors: Vec<(String, u64)>,
    /// How many, the middle one, and the slowest of a hundred.
    pub lookup_seconds: (u64, Option<f64>, Option<f64>),
    pub revocation_lag_seconds: (u64, Option<f64>, Option<f64>),
}

/// The values of a store's series, by another label.
fn labelled(family: &impl Collector, store: &str, label: &str) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    for metric in family.collect().iter().flat_map(|family| family.get_metric()) {
        let value_of = |name: &str| metric.get_label().iter().find(|pair| pair.name() == name).map(|pair| pair.value());
        if value_of("store") != Some(store) {
            continue;
        }
        let value = metric.get_counter().get_value().max(metric.get_gauge().get_value());
        found.push((value_of(label).unwrap_or_default().to_owned(), value as u64));
    }
    found.sort();
    found
}

/// One token store's series. Those that not every store has appear with their first value.
pub struct StoreMetrics {
    name: String,
    duration: Histogram,
    /// By [`RESULTS`].
    lookups: [IntCounter; 2],
    waiting: IntGauge,
    rechecks: IntCounter,
    lag: Histogram,
    /// The kinds of errors that have a series.
    failed: Mutex<Vec<&'static str>>,
    /// Why no notifications arrive.
    unheard: Mutex<Option<&'static str>>,
    /// The servers in use.
    servers: Mutex<Vec<String>>,
    families: Arc<StoreFamilies>,
}

impl Drop for StoreMetrics {
    fn drop(&mut self) {
        self.unheard(None);
        self.servers(Vec::new());
        self.families.leave(&self.name, self.failed.get_mut());
    }
}

impl StoreMetrics {
    pub fn answered(&self, found: bool, took: Duration) {
        self.duration.observe(took.as_secs_f64());
        self.lookups[usize::from(found)].inc();
    }

    /// One that is not answered has no duration: that a store is down does not make it slow.
    pub fn failed(&self, kind: &'static str) {
        self.families.errors.with_label_values(&[self.name.as_str(), kind]).inc();
        let mut failed = self.failed.lock();
        if !failed.contains(&kind) {
            failed.push(kind);
        }
    }

    /// Lookups that wait for their turn.
    pub fn waiting(&self, lookups: usize) {
        self.waiting.set(gauge_value(lookups));
    }

    /// Connections: open, in use, and the most there may be.
    pub fn connections(&self, open: usize, in_use: usize, most: usize) {
        for (state, count) in CONNECTION_STATES.into_iter().zip([open, in_use, most]) {
            self.families.connections.with_label_values(&[self.name.as_str(), state]).set(gauge_value(count));
        }
    }

    /// Change notifications are expected, and do not arrive yet.
    pub fn subscribing(&self) {
        self.families.subscribed.with_label_values(&[&self.name]);
    }

    /// The cause for which no change notifications arrive.
    pub fn unheard(&self, cause: Option<&'static str>) {
        let mut last = self.unheard.lock();
        if *last == cause {
            return;
        }
        if let Some(last) = *last {
            let _ = self.families.unheard.remove_label_values(&[self.name.as_str(), last]);
        }
        if let Some(cause) = cause {
            self.families.unheard.with_label_values(&[self.name.as_str(), cause]).set(1);
        }
        *last = cause;
    }

    /// The servers in use: one, or the masters of a cluster.
    pub fn servers(&self, places: Vec<String>) {
        let (mut last, mut servers) = (self.servers.lock(), self.families.servers.lock());
        for place in &places {
            self.families.server.with_label_values(&[&self.name, place]).set(1);
            servers.push((self.name.clone(), place.clone()));
        }
        for place in std::mem::replace(&mut *last, places) {
            let gone = (self.name.clone(), place);
            if let Some(at) = servers.iter().position(|server| *server == gone) {
                servers.swap_remove(at);
            }
            // The store of a reload may be on the same server.
            if !servers.contains(&gone) {
                let _ = self.families.server.remove_label_values(&[gone.0.as_str(), gone.1.as_str()]);
            }
        }
    }

    /// Whether the server takes writes. `None`: nobody tries.
    pub fn writable(&self, yes: Option<bool>) {
        let store = [self.name.as_str()];
        match yes {
            Some(yes) => self.families.writable.with_label_values(&store).set(i64::from(yes)),
            None => drop(self.families.writable.remove_label_values(&store)),
        }
    }

    pub fn subscribed(&self, yes: bool) {
        if yes {
            self.unheard(None);
        }
        let gauge = self.families.subscribed.with_label_values(&[&self.name]);
        let losses = self.families.losses.with_label_values(&[&self.name]);
        if !yes && gauge.get() != 0 {
            losses.inc();
        }
        gauge.set(i64::from(yes));
    }

    pub fn breaker_open(&self, open: bool) {
        self.families.breaker_open.with_label_values(&[&self.name]).set(i64::from(open));
    }

    /// Whether the token file holds as it stands.
    pub fn file_current(&self, yes: bool) {
        self.families.file_current.with_label_values(&[&self.name]).set(i64::from(yes));
    }

    pub fn evicted(&self, keys: u64) {
        self.families.evicted.with_label_values(&[&self.name]).inc_by(keys);
    }

    pub fn rechecked(&self) {
        self.rechecks.inc();
    }

    pub fn revocation_lag(&self, lag: Duration) {
        self.lag.observe(lag.as_secs_f64());
    }
}

fn gauge_value(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::metrics::Metrics;
    use super::*;

    /// A series of a removed store would go on to fire its alert until the next restart.
    #[test]
    fn series_go_with_the_last_user_of_their_name() {
        let metrics = Metrics::new("test").unwrap();
        let touch = |store: &StoreMetrics| {
            store.answered(true, Duration::ZERO);
            store.failed("timeout");
            store.waiting(3);
            store.connections(1, 1, 4);
            store.subscribed(true);
            store.subscribed(false);
            store.unheard(Some("timeout"));
            store.unheard(Some("denied"));
            store.servers(vec!["db-1:5432".into(), "db-2:5432".into()]);
            store.servers(vec!["db-2:5432".into(), "db-3:5432".into()]);
            store.writable(Some(false));
            store.breaker_open(true);
            store.file_current(false);
            store.rechecked();
            store.evicted(2);
            store.revocation_lag(Duration::ZERO);
        };
        let before = metrics.render().unwrap();
        let (first, next) = (metrics.store("a"), metrics.store("a"));
        touch(&first);
        drop(first);
        let text = metrics.render().unwrap();
        let families = text.lines().filter(|line| line.starts_with("# TYPE")).count()
            - before.lines().filter(|line| line.starts_with("# TYPE")).count();
        assert_eq!(families, 13, "the other store of this name goes on:\n{text}");
        touch(&next);
        let text = metrics.render().unwrap();
        let servers: Vec<&str> = text.lines().filter(|line| line.starts_with("tollgate_store_server_info{")).collect();
        assert!(servers.len() == 2 && servers.iter().all(|line| !line.contains("db-1")), "{servers:?}");
        assert!(
            text.contains("problem{cause=\"denied\",store=\"a\"} 1") && !text.contains("cause=\"timeout\""),
            "{text}"
        );
        drop(next);
        let (old, new) = (metrics.store("a"), metrics.store("a"));
        old.servers(vec!["db-1:5432".into()]);
        new.servers(vec!["db-1:5432".into()]);
        drop(old);
        assert!(metrics.render().unwrap().contains("server_info{server=\"db-1:5432\",store=\"a\"} 1"));
        drop(new);
        assert!(!metrics.render().unwrap().contains("store=\"a\""), "{}", metrics.render().unwrap());
    }
}
