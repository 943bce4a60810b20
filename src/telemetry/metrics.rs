//! Every metric of tollgate, with its help text. Labels are enums or configured names, never a client's bytes, so that
//! no client can mint a series. Series that a request touches are resolved once, at start.

use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};
use prometheus::{HistogramTimer, TextEncoder};
use std::time::Duration;

/// From well under a cache miss on SQLite to a backend's slowest page.
const LATENCY_SECONDS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
/// A lookup in an embedded store takes microseconds, in a remote one milliseconds.
const STORE_SECONDS: &[f64] = &[0.00001, 0.00005, 0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0];
/// Around the promise of one second.
const LAG_SECONDS: &[f64] = &[0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 30.0, 60.0];

pub const METHODS: [&str; 8] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "other"];
const STATUS_CLASSES: [&str; 6] = ["none", "1xx", "2xx", "3xx", "4xx", "5xx"];

macro_rules! labels {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $text:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($variant),* }

        impl $name {
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),* }
            }
        }
    };
}

labels! {
    /// What the cache said.
    CacheResult { PositiveHit = "hit", NegativeHit = "negative_hit", Miss = "miss", Stale = "stale" }
}
labels! {
    /// How a token was judged.
    AuthResult { Valid = "valid", Refused = "refused", Anonymous = "anonymous", Unavailable = "unavailable" }
}
labels! {
    /// Where the token stood.
    TokenSource { None = "none", Header = "header", Query = "query", Bearer = "bearer", Several = "several" }
}
labels! {
    /// Which side of a rotation a token stands on.
    Generation { Old = "old", New = "new" }
}
labels! {
    /// Which page parameter was changed.
    Clamp { Page = "page", PerPage = "per_page" }
}
labels! {
    /// How an exchange with an upstream ended when it did not end well.
    UpstreamError {
        Connect = "connect", ConnectTimeout = "connect_timeout", Timeout = "timeout", Closed = "closed",
        Malformed = "malformed", NoServer = "no_server", Other = "other",
    }
}

/// All series. Made once; reloads keep it.
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    duration: HistogramVec,
    in_flight: IntGauge,
    connections: IntGauge,
    auth: IntCounterVec,
    auth_valid_header: IntCounter,
    cache_lookups: Vec<IntCounter>,
    cache_entries: IntGaugeVec,
    store_duration: HistogramVec,
    store_lookups: IntCounterVec,
    store_errors: IntCounterVec,
    store_connections: IntGaugeVec,
    store_subscribed: IntGaugeVec,
    store_subscription_losses: IntCounterVec,
    store_breaker_open: IntGaugeVec,
    store_file_current: IntGaugeVec,
    store_rechecks: IntCounterVec,
    revocation_lag: HistogramVec,
    rotated: Vec<IntCounter>,
    lookups_refused: IntCounter,
    clamps: Vec<IntCounter>,
    query_tokens: IntCounter,
    method_overrides: IntCounter,
    dropped_fields: IntCounter,
    upstream_duration: HistogramVec,
    upstream_connects: IntCounterVec,
    upstream_errors: IntCounterVec,
    upstream_retries: IntCounterVec,
    /// Access log, process log.
    log_dropped: [IntCounter; 2],
    reloads: IntCounterVec,
    config_loaded: IntGauge,
    ready: IntGauge,
}

/// A request's series, resolved for one route so that the hot path looks nothing up.
pub struct RouteMetrics {
    /// By method and status class.
    requests: Vec<IntCounter>,
    duration: Histogram,
}

impl RouteMetrics {
    pub fn count(&self, method: usize, status: u16, took: Duration) {
        let class = usize::from(status / 100).min(STATUS_CLASSES.len() - 1);
        if let Some(counter) = self.requests.get(method * STATUS_CLASSES.len() + class) {
            counter.inc();
        }
        self.duration.observe(took.as_secs_f64());
    }
}

/// Counts one down when the exchange or connection ends, however it ends.
pub struct Guard(IntGauge);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Metrics {
    /// Fails only if two metrics here have one name.
    pub fn new(version: &str) -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str| -> Result<IntCounter, prometheus::Error> {
            let metric = IntCounter::new(name, help)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let counters = |name: &str, help: &str, labels: &[&str]| -> Result<IntCounterVec, prometheus::Error> {
            let metric = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let gauge = |name: &str, help: &str| -> Result<IntGauge, prometheus::Error> {
            let metric = IntGauge::new(name, help)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let gauges = |name: &str, help: &str, labels: &[&str]| -> Result<IntGaugeVec, prometheus::Error> {
            let metric = IntGaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let histograms =
            |name: &str, help: &str, labels: &[&str], buckets: &[f64]| -> Result<HistogramVec, prometheus::Error> {
                let metric = HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels)?;
                registry.register(Box::new(metric.clone()))?;
                Ok(metric)
            };

        let requests = counters(
            "tollgate_requests_total",
            "Requests by route, method and status class (none: the client left before a response).",
            &["route", "method", "status"],
        )?;
        let auth = counters(
            "tollgate_auth_total",
            "Authentication results by reason and token source. The reason is `ok` for valid tokens.",
            &["result", "reason", "source"],
        )?;
        let cache = counters("tollgate_cache_lookups_total", "Lookups in the token cache by result.", &["result"])?;
        let rotated = counters(
            "tollgate_rotated_token_requests_total",
            "Requests with a token that was replaced (old) or created (new) by a rotation.",
            &["generation"],
        )?;
        let clamps =
            counters("tollgate_pagination_clamps_total", "Page parameters that were clamped.", &["parameter"])?;
        let log_dropped = counters(
            "tollgate_log_lines_dropped_total",
            "Log lines dropped because the reader was too slow or the disk was full.",
            &["log"],
        )?;
        let build = gauges("tollgate_build_info", "1, with the version as label.", &["version"])?;
        build.with_label_values(&[version]).set(1);

        Ok(Self {
            duration: histograms(
                "tollgate_request_duration_seconds",
                "Time from the request head to the end of the response, by route.",
                &["route"],
                LATENCY_SECONDS,
            )?,
            in_flight: gauge("tollgate_requests_in_flight", "Requests in progress.")?,
            connections: gauge("tollgate_connections", "Open client connections.")?,
            auth_valid_header: auth.with_label_values(&["valid", "ok", "header"]),
            cache_lookups: CacheResult::ALL.iter().map(|r| cache.with_label_values(&[r.as_str()])).collect(),
            cache_entries: gauges("tollgate_cache_entries", "Tokens in the cache.", &["kind"])?,
            store_duration: histograms(
                "tollgate_store_lookup_duration_seconds",
                "Duration of token store lookups.",
                &["store"],
                STORE_SECONDS,
            )?,
            store_lookups: counters(
                "tollgate_store_lookups_total",
                "Lookups answered by the token store, by whether the token was found.",
                &["store", "result"],
            )?,
            store_connections: gauges(
                "tollgate_store_connections",
                "Connections to the token store: open, in use, and the maximum.",
                &["store", "state"],
            )?,
            store_subscribed: gauges(
                "tollgate_store_subscribed",
                "1 while change notifications arrive from the token store, 0 while they do not.",
                &["store"],
            )?,
            store_subscription_losses: counters(
                "tollgate_store_subscription_losses_total",
                "Times that change notifications stopped arriving.",
                &["store"],
            )?,
            store_breaker_open: gauges(
                "tollgate_store_breaker_open",
                "1 while the circuit breaker of the token store is open.",
                &["store"],
            )?,
            store_file_current: gauges(
                "tollgate_store_file_current",
                "1 while the current token file is in use, 0 while it is invalid or missing and an earlier one is.",
                &["store"],
            )?,
            store_rechecks: counters(
                "tollgate_store_rechecks_total",
                "Times that all cached tokens of a store had to be looked up again because changes may have been missed.",
                &["store"],
            )?,
            store_errors: counters(
                "tollgate_store_errors_total",
                "Lookups that the token store failed to answer.",
                &["store", "kind"],
            )?,
            revocation_lag: histograms(
                "tollgate_revocation_lag_seconds",
                "Time from a token's change in the store to its effect in this gateway.",
                &["store"],
                LAG_SECONDS,
            )?,
            lookups_refused: counter(
                "tollgate_lookups_refused_total",
                "Lookups refused because too many were in progress.",
            )?,
            rotated: Generation::ALL.iter().map(|g| rotated.with_label_values(&[g.as_str()])).collect(),
            clamps: Clamp::ALL.iter().map(|c| clamps.with_label_values(&[c.as_str()])).collect(),
            method_overrides: counter(
                "tollgate_method_overrides_total",
                "Permitted POST requests that were judged as the method in X-HTTP-Method-Override.",
            )?,
            query_tokens: counter("tollgate_query_tokens_total", "Requests with a token in the query string.")?,
            dropped_fields: counter(
                "tollgate_dropped_headers_total",
                "Request headers that were not forwarded because their name is ambiguous or selects a path or a user.",
            )?,
            upstream_duration: histograms(
                "tollgate_upstream_duration_seconds",
                "Time from choosing an upstream server to the head of its response.",
                &["upstream"],
                LATENCY_SECONDS,
            )?,
            upstream_connects: counters(
                "tollgate_upstream_connects_total",
                "Upstream connections used, by whether they were new.",
                &["upstream", "connection"],
            )?,
            upstream_errors: counters(
                "tollgate_upstream_errors_total",
                "Failed attempts to get a response from an upstream, also if a retry succeeded.",
                &["upstream", "kind"],
            )?,
            upstream_retries: counters(
                "tollgate_upstream_retries_total",
                "Attempts after the first one.",
                &["upstream"],
            )?,
            log_dropped: ["access", "process"].map(|log| log_dropped.with_label_values(&[log])),
            reloads: counters("tollgate_config_reloads_total", "Configuration reloads by result.", &["result"])?,
            config_loaded: gauge(
                "tollgate_config_loaded_timestamp_seconds",
                "Time at which the running configuration was loaded.",
            )?,
            ready: gauge("tollgate_ready", "1 while requests are accepted, 0 while draining.")?,
            requests,
            auth,
            registry,
        })
    }

    pub fn route(&self, name: &str) -> RouteMetrics {
        let series = METHODS.iter().flat_map(|method| {
            STATUS_CLASSES.iter().map(|class| self.requests.with_label_values(&[name, method, class]))
        });
        RouteMetrics { requests: series.collect(), duration: self.duration.with_label_values(&[name]) }
    }

    pub fn request_started(&self) -> Guard {
        self.in_flight.inc();
        Guard(self.in_flight.clone())
    }

    pub fn requests_in_flight(&self) -> i64 {
        self.in_flight.get()
    }

    pub fn connection_opened(&self) -> Guard {
        self.connections.inc();
        Guard(self.connections.clone())
    }

    pub fn auth(&self, result: AuthResult, reason: &'static str, source: TokenSource) {
        if result == AuthResult::Valid && source == TokenSource::Header {
            self.auth_valid_header.inc();
        } else {
            self.auth.with_label_values(&[result.as_str(), reason, source.as_str()]).inc();
        }
    }

    pub fn method_overridden(&self) {
        self.method_overrides.inc();
    }

    pub fn query_token(&self) {
        self.query_tokens.inc();
    }

    pub fn cache_lookup(&self, result: CacheResult) {
        if let Some(counter) = self.cache_lookups.get(result as usize) {
            counter.inc();
        }
    }

    pub fn cache_entries(&self, valid: u64, invalid: u64) {
        for (kind, count) in [("positive", valid), ("negative", invalid)] {
            self.cache_entries.with_label_values(&[kind]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// One store's series, resolved once.
    pub fn store(&self, name: &str) -> StoreMetrics {
        StoreMetrics {
            name: name.into(),
            duration: self.store_duration.with_label_values(&[name]),
            lookups: ["unknown", "found"].map(|result| self.store_lookups.with_label_values(&[name, result])),
            errors: self.store_errors.clone(),
            connections: self.store_connections.clone(),
            subscribed: self.store_subscribed.clone(),
            losses: self.store_subscription_losses.clone(),
            breaker_open: self.store_breaker_open.clone(),
            file_current: self.store_file_current.clone(),
            rechecks: self.store_rechecks.with_label_values(&[name]),
            lag: self.revocation_lag.with_label_values(&[name]),
        }
    }

    pub fn lookup_refused(&self) {
        self.lookups_refused.inc();
    }

    pub fn rotated(&self, generation: Generation) {
        if let Some(counter) = self.rotated.get(generation as usize) {
            counter.inc();
        }
    }

    pub fn clamped(&self, parameter: Clamp) {
        if let Some(counter) = self.clamps.get(parameter as usize) {
            counter.inc();
        }
    }

    pub fn fields_dropped(&self, count: usize) {
        if count > 0 {
            self.dropped_fields.inc_by(count as u64);
        }
    }

    pub fn upstream(&self, name: &str) -> UpstreamMetrics {
        UpstreamMetrics {
            duration: self.upstream_duration.with_label_values(&[name]),
            connects: ["new", "reused"].map(|kind| self.upstream_connects.with_label_values(&[name, kind])),
            errors: UpstreamError::ALL
                .iter()
                .map(|e| self.upstream_errors.with_label_values(&[name, e.as_str()]))
                .collect(),
            retries: self.upstream_retries.with_label_values(&[name]),
        }
    }

    pub fn access_log_lost(&self, lines: u64) {
        self.log_dropped[0].inc_by(lines);
    }

    pub fn reloaded(&self, ok: bool, at_unix_seconds: u64) {
        self.reloads.with_label_values(&[if ok { "ok" } else { "failed" }]).inc();
        if ok {
            self.config_loaded.set(i64::try_from(at_unix_seconds).unwrap_or(i64::MAX));
        }
    }

    pub fn ready(&self, ready: bool) {
        self.ready.set(i64::from(ready));
    }

    /// The text that Prometheus scrapes.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        // The process log is there before any metric is.
        let process = &self.log_dropped[1];
        process.inc_by(super::process_log::lost().saturating_sub(process.get()));
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

/// One upstream's series.
pub struct UpstreamMetrics {
    duration: Histogram,
    connects: [IntCounter; 2],
    errors: Vec<IntCounter>,
    retries: IntCounter,
}

impl UpstreamMetrics {
    pub fn answered(&self, after: Duration) {
        self.duration.observe(after.as_secs_f64());
    }

    pub fn connected(&self, reused: bool) {
        self.connects[usize::from(reused)].inc();
    }

    pub fn failed(&self, error: UpstreamError) {
        if let Some(counter) = self.errors.get(error as usize) {
            counter.inc();
        }
    }

    pub fn retried(&self) {
        self.retries.inc();
    }
}

/// One token store's series. Those that not every store has appear with their first value.
pub struct StoreMetrics {
    name: String,
    duration: Histogram,
    /// Unknown, found.
    lookups: [IntCounter; 2],
    errors: IntCounterVec,
    connections: IntGaugeVec,
    subscribed: IntGaugeVec,
    losses: IntCounterVec,
    breaker_open: IntGaugeVec,
    file_current: IntGaugeVec,
    rechecks: IntCounter,
    lag: Histogram,
}

impl StoreMetrics {
    /// Observes the time until it is dropped.
    pub fn lookup_started(&self) -> HistogramTimer {
        self.duration.start_timer()
    }

    pub fn answered(&self, found: bool) {
        self.lookups[usize::from(found)].inc();
    }

    pub fn failed(&self, kind: &'static str) {
        self.errors.with_label_values(&[self.name.as_str(), kind]).inc();
    }

    /// Connections: open, in use, and the most there may be.
    pub fn connections(&self, open: usize, in_use: usize, most: usize) {
        for (state, count) in [("open", open), ("in_use", in_use), ("most", most)] {
            self.connections
                .with_label_values(&[self.name.as_str(), state])
                .set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    pub fn subscribed(&self, yes: bool) {
        let gauge = self.subscribed.with_label_values(&[&self.name]);
        let losses = self.losses.with_label_values(&[&self.name]);
        if !yes && gauge.get() != 0 {
            losses.inc();
        }
        gauge.set(i64::from(yes));
    }

    pub fn breaker_open(&self, open: bool) {
        self.breaker_open.with_label_values(&[&self.name]).set(i64::from(open));
    }

    /// Whether the token file holds as it stands.
    pub fn file_current(&self, yes: bool) {
        self.file_current.with_label_values(&[&self.name]).set(i64::from(yes));
    }

    pub fn rechecked(&self) {
        self.rechecks.inc();
    }

    pub fn revocation_lag(&self, lag: Duration) {
        self.lag.observe(lag.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_has_its_own_name_and_help() {
        let metrics = Metrics::new("test").unwrap();
        metrics.route("/api/v3/*").count(0, 200, Duration::ZERO);
        metrics.auth(AuthResult::Refused, "unknown", TokenSource::Query);
        let text = metrics.render().unwrap();
        assert!(
            text.contains("tollgate_requests_total{method=\"GET\",route=\"/api/v3/*\",status=\"2xx\"} 1"),
            "{text}"
        );
        assert!(text.contains("tollgate_auth_total{reason=\"unknown\",result=\"refused\",source=\"query\"} 1"));
    }
}
