//! Every metric of tollgate, with its help text. Labels are enums or configured names, never a client's bytes, so that
//! no client can mint a series. Series that a request touches are resolved once, at start.

use super::exemplars::{ExemplarIds, ExemplarSlots};
use super::guess_metrics::GuessMetrics;
use super::heavy_hitters::HeavyHitters;
use super::history::{MOST_REASONS, TrafficHistory, TrafficTotals, TrafficWindow, quantile};
use super::limit_metrics::{LimitFamilies, LimitMetrics};
pub use super::listener_metrics::{ConnectionLimit, HandshakeResult, ListenerMetrics};
use super::openmetrics;
use super::process_metrics::ProcessMetrics;
use super::server_metrics::ServerFamilies;
pub use super::server_metrics::{AdaptiveReading, ServerMetrics};
use super::share_metrics::{ShareFamilies, ShareMetrics};
use super::store_metrics::StoreFamilies;
pub use super::store_metrics::{StoreMetrics, StoreReading};
use parking_lot::Mutex;
use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{
    Counter, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder,
};
use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// From well under a cache miss on SQLite to a backend's slowest page.
pub(super) const LATENCY_SECONDS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
/// With the one of those that took longer.
pub(super) const LATENCY_BUCKETS: usize = LATENCY_SECONDS.len() + 1;
const REQUEST_DURATION: &str = "tollgate_request_duration_seconds";
const ROUTE: &str = "route";
pub const METHODS: [&str; 8] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "other"];
pub(super) const STATUS_CLASSES: [&str; 6] = ["none", "1xx", "2xx", "3xx", "4xx", "5xx"];

macro_rules! labels {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_doc])* $variant),* }

        impl $name {
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),* }
            }
        }
    };
}

pub(super) use labels;

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
    TokenSource { None = "none", Header = "header", Query = "query", Bearer = "bearer", Basic = "basic", Several = "several" }
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
        Connect = "connect", ConnectTimeout = "connect_timeout", Timeout = "timeout", TryTimeout = "try_timeout",
        RequestTimeout = "request_timeout", Closed = "closed", Malformed = "malformed", NoServer = "no_server",
        QueueFull = "queue_full", QueueTimeout = "queue_timeout", TlsUntrusted = "tls_untrusted", TlsName = "tls_name",
        TlsExpired = "tls_expired", TlsHandshake = "tls_handshake", NoHttp2 = "no_http2", Other = "other",
    }
}

labels! {
    /// What became of spans: the collector took them; it was away or refused them; the queue for it was full.
    SpanResult { Exported = "exported", Failed = "failed", Dropped = "dropped" }
}

labels! {
    /// Why the admin listener refused a request before it looked at what it asks for.
    AdminDenial {
        Host = "host", Origin = "origin", NoToken = "no_token", WrongToken = "wrong_token", ReadOnly = "read_only",
        ContentType = "content_type", MetricsOnly = "metrics_only",
    }
}

/// All series. Made once; reloads keep it.
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    duration: HistogramVec,
    /// Those of all routes that there have been.
    routes: Mutex<HashMap<String, Arc<RouteMetrics>>>,
    history: TrafficHistory,
    refusals: RefusalMetrics,
    admin_denials: Vec<IntCounter>,
    in_flight: IntGauge,
    connections: IntGauge,
    auth: IntCounterVec,
    /// The series of nearly all requests, by source: valid ones, and unknown tokens.
    auth_common: [[OnceLock<IntCounter>; TokenSource::ALL.len()]; 2],
    exchanges_ended: IntCounterVec,
    slow_bodies: IntCounterVec,
    cache_lookups: Vec<IntCounter>,
    cache_entries: IntGaugeVec,
    stores: Arc<StoreFamilies>,
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
    upstream_retries_refused: IntCounterVec,
    upstream_passed_on: IntCounterVec,
    upstream_waiting: IntGaugeVec,
    servers: Arc<ServerFamilies>,
    listeners: ListenerMetrics,
    limits: LimitFamilies,
    shares: ShareFamilies,
    guessing: GuessMetrics,
    heavy_hitters: HeavyHitters,
    process: ProcessMetrics,
    /// Access log, process log.
    log_dropped: [IntCounter; 3],
    panics: IntCounter,
    spans: Vec<IntCounter>,
    reloads: IntCounterVec,
    config_loaded: IntGauge,
    ready: IntGauge,
}

/// A request's series, resolved for one route so that the hot path looks nothing up.
pub struct RouteMetrics {
    /// By method and status class.
    requests: Vec<IntCounter>,
    duration: Histogram,
    exemplars: ExemplarSlots,
}

impl RouteMetrics {
    /// `ids` is asked once in a while, for a request that is to stand for others.
    pub fn count<'r>(
        &self,
        method: usize,
        status: u16,
        took: Duration,
        ended_unix_ms: u64,
        ids: impl FnOnce() -> Option<ExemplarIds<'r>>,
    ) {
        let class = usize::from(status / 100).min(STATUS_CLASSES.len() - 1);
        if let Some(counter) = self.requests.get(method * STATUS_CLASSES.len() + class) {
            counter.inc();
        }
        let seconds = took.as_secs_f64();
        self.duration.observe(seconds);
        self.exemplars.offer(seconds, ended_unix_ms, ids);
    }
}

/// Requests that tollgate answered itself.
struct RefusalMetrics {
    series: IntCounterVec,
    /// By reason, as they came up: their number has a bound in the source.
    known: Mutex<Vec<(&'static str, u16, IntCounter)>>,
    /// The most frequent ones, so that a flood of them looks nothing up.
    common: [OnceLock<IntCounter>; 2],
}

impl RefusalMetrics {
    fn count(&self, status: u16, reason: &'static str) {
        let series = || {
            let series = self.series.with_label_values(&[&status.to_string(), reason]);
            let mut known = self.known.lock();
            if !known.iter().any(|(name, known, _)| (*name, *known) == (reason, status)) {
                known.push((reason, status, series.clone()));
            }
            series
        };
        match reason {
            "unknown" => self.common[0].get_or_init(series).inc(),
            "missing" => self.common[1].get_or_init(series).inc(),
            _ => series().inc(),
        }
    }
}

/// Counts one down when the exchange or connection ends, however it ends.
pub struct Guard(IntGauge);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// OpenMetrics knows no other counters: one with another name could only be told as something else.
fn ends_in_total(name: &str) -> Result<&str, prometheus::Error> {
    if name.ends_with("_total") {
        return Ok(name);
    }
    Err(prometheus::Error::Msg(format!("the name of the counter {name} does not end in _total")))
}

/// Makes and registers metrics.
pub(super) struct Families<'a>(pub(super) &'a Registry);

impl Families<'_> {
    fn registered<M: Collector + Clone + 'static>(&self, metric: M) -> Result<M, prometheus::Error> {
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    pub(super) fn counter(&self, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
        self.registered(IntCounter::new(ends_in_total(name)?, help)?)
    }

    pub(super) fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, prometheus::Error> {
        self.registered(IntCounterVec::new(Opts::new(ends_in_total(name)?, help), labels)?)
    }

    pub(super) fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
        self.registered(IntGauge::new(name, help)?)
    }

    pub(super) fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, prometheus::Error> {
        self.registered(IntGaugeVec::new(Opts::new(name, help), labels)?)
    }

    pub(super) fn float_gauge(&self, name: &str, help: &str) -> Result<Gauge, prometheus::Error> {
        self.registered(Gauge::new(name, help)?)
    }

    pub(super) fn float_counter(&self, name: &str, help: &str) -> Result<Counter, prometheus::Error> {
        self.registered(Counter::new(ends_in_total(name)?, help)?)
    }

    pub(super) fn float_gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<GaugeVec, prometheus::Error> {
        self.registered(GaugeVec::new(Opts::new(name, help), labels)?)
    }

    pub(super) fn histograms(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        buckets: &[f64],
    ) -> Result<HistogramVec, prometheus::Error> {
        self.registered(HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels)?)
    }
}

impl Metrics {
    /// Fails only if two metrics here have one name, or a counter's does not end in `_total`.
    pub fn new(version: &str) -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let families = Families(&registry);
        let requests = families.counters(
            "tollgate_requests_total",
            "Requests by route, method and status class (none: the client left before a response).",
            &["route", "method", "status"],
        )?;
        let auth = families.counters(
            "tollgate_auth_total",
            "Authentication results by reason and token source. The reason is `ok` for valid tokens.",
            &["result", "reason", "source"],
        )?;
        let cache =
            families.counters("tollgate_cache_lookups_total", "Lookups in the token cache by result.", &["result"])?;
        let admin_denials = families.counters(
            "tollgate_admin_denials_total",
            "Requests that the admin listener or the metrics listener refused, by reason.",
            &["reason"],
        )?;
        let rotated = families.counters(
            "tollgate_rotated_token_requests_total",
            "Requests with a token that was replaced (old) or created (new) by a rotation.",
            &["generation"],
        )?;
        let clamps = families.counters(
            "tollgate_pagination_clamps_total",
            "Page parameters that were clamped.",
            &["parameter"],
        )?;
        let log_dropped = families.counters(
            "tollgate_log_lines_dropped_total",
            "Log lines dropped because the reader was too slow or the disk was full.",
            &["log"],
        )?;
        let spans = families.counters(
            "tollgate_trace_spans_total",
            "Spans that were to be exported to the OTLP collector.",
            &["result"],
        )?;
        let build = families.gauges("tollgate_build_info", "1, with the version as label.", &["version"])?;
        build.with_label_values(&[version]).set(1);
        // It is entered before there are metrics, and never left.
        let sandboxed = "1 if the kernel holds this process to the files that it needs: [server] sandbox.";
        families.gauge("tollgate_sandboxed", sandboxed)?.set(i64::from(crate::sandbox::current().is_some()));

        Ok(Self {
            duration: families.histograms(
                REQUEST_DURATION,
                "Time from the request head to the end of the response, by route.",
                &[ROUTE],
                LATENCY_SECONDS,
            )?,
            routes: Mutex::default(),
            history: TrafficHistory::default(),
            refusals: RefusalMetrics {
                series: families.counters(
                    "tollgate_refusals_total",
                    "Requests that tollgate answered itself, by status and reason.",
                    &["status", "reason"],
                )?,
                known: Mutex::default(),
                common: Default::default(),
            },
            admin_denials: AdminDenial::ALL.iter().map(|d| admin_denials.with_label_values(&[d.as_str()])).collect(),
            in_flight: families.gauge("tollgate_requests_in_flight", "Requests in progress.")?,
            connections: families.gauge("tollgate_connections", "Open client connections.")?,
            exchanges_ended: families.counters(
                "tollgate_exchanges_ended_total",
                "Requests that were in progress for more than a second when their token stopped being valid, by reason.",
                &["reason"],
            )?,
            slow_bodies: families.counters(
                "tollgate_slow_bodies_total",
                "Requests that were ended because their body came too slowly, by reason.",
                &["reason"],
            )?,
            auth_common: Default::default(),
            cache_lookups: CacheResult::ALL.iter().map(|r| cache.with_label_values(&[r.as_str()])).collect(),
            cache_entries: families.gauges("tollgate_cache_entries", "Tokens in the cache.", &["kind"])?,
            stores: Arc::new(StoreFamilies::new(&families)?),
            servers: Arc::new(ServerFamilies::new(&families)?),
            listeners: ListenerMetrics::new(&families)?,
            limits: LimitFamilies::new(&families)?,
            shares: ShareFamilies::new(&families)?,
            guessing: GuessMetrics::new(&families)?,
            heavy_hitters: HeavyHitters::new(&families, Instant::now())?,
            process: ProcessMetrics::new(&families)?,
            lookups_refused: families
                .counter("tollgate_lookups_refused_total", "Lookups refused because too many were in progress.")?,
            rotated: Generation::ALL.iter().map(|g| rotated.with_label_values(&[g.as_str()])).collect(),
            clamps: Clamp::ALL.iter().map(|c| clamps.with_label_values(&[c.as_str()])).collect(),
            method_overrides: families.counter(
                "tollgate_method_overrides_total",
                "Permitted POST requests that were judged as the method in X-HTTP-Method-Override.",
            )?,
            query_tokens: families
                .counter("tollgate_query_tokens_total", "Requests with a token in the query string.")?,
            dropped_fields: families.counter(
                "tollgate_dropped_headers_total",
                "Request headers that were not forwarded because their name is ambiguous or selects a path or a user.",
            )?,
            upstream_duration: families.histograms(
                "tollgate_upstream_duration_seconds",
                "Time from choosing an upstream server to the head of its response.",
                &["upstream"],
                LATENCY_SECONDS,
            )?,
            upstream_connects: families.counters(
                "tollgate_upstream_connects_total",
                "Upstream connections used, by whether they were new.",
                &["upstream", "connection"],
            )?,
            upstream_errors: families.counters(
                "tollgate_upstream_errors_total",
                "Failed attempts to get a response from an upstream, also if a retry succeeded.",
                &["upstream", "kind"],
            )?,
            upstream_retries: families.counters(
                "tollgate_upstream_retries_total",
                "Attempts after the first one.",
                &["upstream"],
            )?,
            upstream_retries_refused: families.counters(
                "tollgate_upstream_retries_refused_total",
                "Requests that failed because the retry budget was spent.",
                &["upstream"],
            )?,
            upstream_passed_on: families.counters(
                "tollgate_upstream_canary_fallbacks_total",
                "Requests for this upstream as a canary that went to the main one, because it had no server for them.",
                &["upstream"],
            )?,
            upstream_waiting: families.gauges(
                "tollgate_upstream_requests_waiting",
                "Requests that wait in the queue for a server with room.",
                &["upstream"],
            )?,
            spans: SpanResult::ALL.iter().map(|r| spans.with_label_values(&[r.as_str()])).collect(),
            panics: families.counter(
                "tollgate_panics_total",
                "Panics. One within a request ends its connection, and nothing else; each is a bug.",
            )?,
            log_dropped: ["access", "process", "audit"].map(|log| log_dropped.with_label_values(&[log])),
            reloads: families.counters(
                "tollgate_config_reloads_total",
                "Configuration reloads by result.",
                &["result"],
            )?,
            config_loaded: families.gauge(
                "tollgate_config_loaded_timestamp_seconds",
                "Time at which the running configuration was loaded.",
            )?,
            ready: families.gauge("tollgate_ready", "1 while requests are accepted, 0 while draining.")?,
            requests,
            auth,
            registry,
        })
    }

    pub fn route(&self, name: &str) -> Arc<RouteMetrics> {
        let make = || {
            let series = METHODS.iter().flat_map(|method| {
                STATUS_CLASSES.iter().map(|class| self.requests.with_label_values(&[name, method, class]))
            });
            Arc::new(RouteMetrics {
                requests: series.collect(),
                duration: self.duration.with_label_values(&[name]),
                exemplars: ExemplarSlots::default(),
            })
        };
        Arc::clone(self.routes.lock().entry(name.to_owned()).or_insert_with(make))
    }

    /// A request that tollgate answered itself, and the client got that answer.
    pub fn refused(&self, status: u16, reason: &'static str) {
        self.refusals.count(status, reason);
    }

    /// A request that the admin listener or the one for metrics refused.
    pub fn admin_denied(&self, denial: AdminDenial) {
        if let Some(counter) = self.admin_denials.get(denial as usize) {
            counter.inc();
        }
    }

    /// Reads the counters, for the windows of the last time. To be called every few seconds.
    pub fn sample_traffic(&self, mono_ms: u64) {
        let mut totals = TrafficTotals::<u64>::default();
        // Before the requests: a refusal is counted behind its request.
        for (index, (_, status, counter)) in self.refusals.known.lock().iter().enumerate() {
            let (class, count) = (usize::from(status / 100).min(STATUS_CLASSES.len() - 1), counter.get());
            totals.refused[class] += count;
            totals.reasons[index.min(MOST_REASONS - 1)] += count;
        }
        for route in self.routes.lock().values() {
            for (index, counter) in route.requests.iter().enumerate() {
                totals.statuses[index % STATUS_CLASSES.len()] += counter.get();
            }
            add_buckets(&route.duration, &mut totals.took);
        }
        self.history.note(totals, mono_ms);
    }

    /// The last 15 minutes and 24 hours.
    pub fn traffic(&self, mono_ms: u64) -> [TrafficWindow; 2] {
        self.sample_traffic(mono_ms);
        self.history.windows(mono_ms)
    }

    /// Reasons of refusals, in the order of [`TrafficTotals::reasons`], with their status.
    pub fn refusal_reasons(&self) -> Vec<(&'static str, u16)> {
        self.refusals.known.lock().iter().map(|(reason, status, _)| (*reason, *status)).collect()
    }

    /// How often the cache gave each of its results.
    pub fn cache_results(&self) -> Vec<(CacheResult, u64)> {
        CacheResult::ALL.iter().zip(&self.cache_lookups).map(|(result, counter)| (*result, counter.get())).collect()
    }

    /// What a limit has made of requests: allowed, refused, dry run, and those that had no bucket of their own.
    pub fn limit_counts(&self, name: &str) -> [u64; 4] {
        self.limits.of(name).counts()
    }

    /// Certificates of listeners: the listener, the first name, and when it ends.
    pub fn certificate_ends(&self) -> Vec<(String, String, u64)> {
        self.listeners.certificate_ends()
    }

    /// What the series of a store say.
    pub fn store_reading(&self, name: &str) -> StoreReading {
        self.stores.reading(name)
    }

    /// Those of one limit.
    pub fn limit(&self, name: &str) -> LimitMetrics {
        self.limits.of(name)
    }

    /// Those about limits that replicas share, by the kind of their store.
    pub fn share(&self, store: &str) -> ShareMetrics {
        self.shares.of(store)
    }

    pub fn forget_share(&self, store: &str) {
        self.shares.forget(store);
    }

    /// Those about addresses that guess tokens.
    pub fn guessing(&self) -> &GuessMetrics {
        &self.guessing
    }

    pub fn heavy_hitters(&self) -> &HeavyHitters {
        &self.heavy_hitters
    }

    pub fn request_started(&self) -> Guard {
        self.in_flight.inc();
        Guard(self.in_flight.clone())
    }

    /// Those about connections.
    pub fn listeners(&self) -> &ListenerMetrics {
        &self.listeners
    }

    pub fn requests_in_flight(&self) -> i64 {
        self.in_flight.get()
    }

    pub fn connection_opened(&self) -> Guard {
        self.connections.inc();
        Guard(self.connections.clone())
    }

    pub fn open_connections(&self) -> i64 {
        self.connections.get()
    }

    pub fn auth(&self, result: AuthResult, reason: &'static str, source: TokenSource) {
        let series = || self.auth.with_label_values(&[result.as_str(), reason, source.as_str()]);
        let common = match (result, reason) {
            (AuthResult::Valid, "ok") => &self.auth_common[0],
            (AuthResult::Refused, "unknown") => &self.auth_common[1],
            _ => return series().inc(),
        };
        common[source as usize].get_or_init(series).inc();
    }

    /// The token of an exchange stopped being valid while it went on.
    pub fn exchange_ended(&self, reason: &'static str) {
        self.exchanges_ended.with_label_values(&[reason]).inc();
    }

    /// A body was not waited for any longer.
    pub fn slow_body(&self, reason: &'static str) {
        self.slow_bodies.with_label_values(&[reason]).inc();
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

    /// One store's series. They are removed with the last one of this name.
    pub fn store(&self, name: &str) -> StoreMetrics {
        self.stores.store(name)
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
            retries_refused: self.upstream_retries_refused.with_label_values(&[name]),
            passed_on: self.upstream_passed_on.with_label_values(&[name]),
            waiting: self.upstream_waiting.with_label_values(&[name]),
        }
    }

    /// One server's series. They are removed with the last one of this name.
    pub fn server(&self, upstream: &str, server: &str) -> ServerMetrics {
        self.servers.server(upstream, server)
    }

    pub fn access_log_lost(&self, lines: u64) {
        self.log_dropped[0].inc_by(lines);
    }

    pub fn spans(&self, result: SpanResult, count: u64) {
        self.spans[result as usize].inc_by(count);
    }

    pub fn audit_log_lost(&self, lines: u64) {
        self.log_dropped[2].inc_by(lines);
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

    /// The text that Prometheus scrapes, in its format 0.0.4.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.gather())
    }

    /// The same in OpenMetrics, with exemplars.
    pub fn render_openmetrics(&self) -> String {
        openmetrics::encode(&self.gather(), |family, metric, bucket| {
            let route = metric.get_label().iter().find(|label| family == REQUEST_DURATION && label.name() == ROUTE)?;
            self.routes.lock().get(route.value())?.exemplars.get(bucket)
        })
    }

    fn gather(&self) -> Vec<MetricFamily> {
        // The process log is there before any metric is.
        let process = &self.log_dropped[1];
        process.inc_by(super::process_log::lost().saturating_sub(process.get()));
        self.panics.inc_by(super::process_log::panics().saturating_sub(self.panics.get()));
        self.heavy_hitters.publish(Instant::now());
        self.process.publish();
        self.registry.gather()
    }
}

/// Adds a histogram's counts, which the library gives as sums of all buckets before.
pub(super) fn add_buckets(histogram: &Histogram, counts: &mut [u64]) {
    let metric = prometheus::core::Metric::metric(histogram);
    let read = metric.get_histogram();
    let mut before = 0;
    let uppers = read.get_bucket().iter().map(|bucket| bucket.cumulative_count());
    for (count, upto) in counts.iter_mut().zip(uppers.chain([read.get_sample_count()])) {
        *count += upto.saturating_sub(before);
        before = before.max(upto);
    }
}

/// A quantile of a histogram since the process began, in seconds.
pub(super) fn quantile_of(histogram: &Histogram, bounds: &[f64], share: f64) -> Option<f64> {
    let mut counts = vec![0; bounds.len() + 1];
    add_buckets(histogram, &mut counts);
    quantile(bounds, &counts, share)
}

/// One upstream's series.
pub struct UpstreamMetrics {
    duration: Histogram,
    connects: [IntCounter; 2],
    errors: Vec<IntCounter>,
    retries: IntCounter,
    retries_refused: IntCounter,
    passed_on: IntCounter,
    waiting: IntGauge,
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

    pub fn waiting(&self, requests: usize) {
        self.waiting.set(i64::try_from(requests).unwrap_or(i64::MAX));
    }

    pub fn passed_on(&self) {
        self.passed_on.inc();
    }

    pub fn retry_refused(&self) {
        self.retries_refused.inc();
    }

    pub fn retried(&self) {
        self.retries.inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_that_openmetrics_cannot_tell_is_not_made() {
        let registry = Registry::new();
        let families = Families(&registry);
        for name in ["a", "a_totals", "a_total_b"] {
            assert!(families.counter(name, "h").is_err(), "{name}");
            assert!(families.counters(name, "h", &["l"]).is_err(), "{name}");
            assert!(families.float_counter(name, "h").is_err(), "{name}");
        }
        families.counter("a_total", "h").unwrap();
    }

    #[test]
    fn an_exemplar_stands_beside_the_latency_of_its_route_alone() {
        let metrics = Metrics::new("test").unwrap();
        let ids = ExemplarIds { request_id: "r-1", trace_id: Some(*b"0123456789abcdef0123456789abcdef") };
        metrics.route("/a").count(0, 200, Duration::from_millis(3), 1_790_000_000_250, || Some(ids));
        metrics.route("/b").count(0, 200, Duration::from_millis(3), 1_790_000_000_250, || None);
        metrics.upstream("/a").answered(Duration::from_millis(3));
        let text = metrics.render_openmetrics();
        let with: Vec<&str> = text.lines().filter(|line| line.contains(" # {")).collect();
        assert_eq!(
            with,
            ["tollgate_request_duration_seconds_bucket{route=\"/a\",le=\"0.005\"} 1 # {request_id=\"r-1\",\
              trace_id=\"0123456789abcdef0123456789abcdef\"} 0.003 1790000000.250"]
        );
        assert!(text.ends_with("\n# EOF\n") && !metrics.render().unwrap().contains("r-1"));
    }

    #[test]
    fn every_metric_has_its_own_name_and_help() {
        let metrics = Metrics::new("test").unwrap();
        metrics.route("/api/v3/*").count(0, 200, Duration::ZERO, 0, || None);
        metrics.auth(AuthResult::Refused, "unknown", TokenSource::Query);
        let text = metrics.render().unwrap();
        assert!(
            text.contains("tollgate_requests_total{method=\"GET\",route=\"/api/v3/*\",status=\"2xx\"} 1"),
            "{text}"
        );
        assert!(text.contains("tollgate_auth_total{reason=\"unknown\",result=\"refused\",source=\"query\"} 1"));
    }
}
