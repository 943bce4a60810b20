//! Where sockets are. The only folder that names pingora: it listens, hands requests to the pipeline, carries out what
//! the pipeline decided, and writes to clients and backends. It decides nothing about a request itself.

mod admin;
mod backend;
mod client;
mod connection;
mod crowd;
mod dial;
mod drain;
mod exchange;
mod file_watch;
mod frame_watch;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod health;
mod http1;
mod http2;
mod http2_backend;
mod listen;
mod listener;
mod listeners;
mod listening;
mod log_levels;
mod notify;
mod patience;
mod peers;
mod proxied;
mod recheck;
mod reloader;
mod secure;
mod server;
mod signals;
mod socket;
mod spans;
mod ticket;
mod tls;
mod upgrade;
mod verdict;
mod workers;

pub use crate::clock::now;
pub use crowd::ConnectionLimits;
pub use file_watch::ListFiles;
pub use listen::{AddressInUse, Listen, ListenerSettings, SandboxMode, ServerSettings, VerdictSettings};
pub use listening::PassedSockets;
pub use log_levels::FRAMEWORK_LOG_LEVELS;
pub use patience::BodyRate;
pub use peers::unresolved;
pub use server::{Rebuild, Rebuilt, Running, ServeError, serve};
pub use tls::{CertificateFiles, ListenerTlsSettings, TlsProfile};
pub use upgrade::{Predecessor, Successors, program};

use crate::admin::{AdminAccess, ShownConfig};
use crate::clock::Now;
use crate::explain::RulePlaces;
use crate::pipeline::{Facts, Pipeline};
use crate::policy::{GuessEpisode, LimitFacts, LimitResult, MOST_OWN_RATES, OddKind, OddTerms};
use crate::problem::Problem;
use crate::request::trace::NewIds;
use crate::store::credential::Digest;
use crate::telemetry::access_log::AccessLog;
use crate::telemetry::audit_log::{AuditLog, AuditSource, AuditedAction};
use crate::telemetry::limit_metrics::{LimitCount, LimitMetrics};
use crate::telemetry::metrics::{Metrics, RouteMetrics};
use crate::telemetry::spans::SpanExporter;
use crate::upstream::UpstreamSettings;
use client::HeadLimits;
use peers::Peers;
use std::num::{NonZeroU64, NonZeroU128};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// The whole running configuration. A request takes one at its start and keeps it to its log line; a reload puts
/// another in its place.
pub struct Snapshot {
    pub pipeline: Pipeline,
    pub metrics: Arc<Metrics>,
    /// In the configuration's order, by which routes name them.
    upstreams: Vec<Arc<Peers>>,
    settings: EdgeSettings,
    log: AccessLog,
    audit: AuditLog,
    spans: SpanExporter,
    /// One for each route, and one for requests that got to none.
    route_metrics: Vec<Arc<RouteMetrics>>,
    unrouted: Arc<RouteMetrics>,
    /// One for each limit.
    limit_metrics: Vec<LimitMetrics>,
}

/// What a reload changes for the connections, besides the listeners themselves.
#[derive(Clone, Debug)]
pub struct EdgeSettings {
    pub timeouts: Timeouts,
    pub shutdown: ShutdownTimes,
    pub connections: ConnectionLimits,
    pub body_rate: BodyRate,
    /// Where the rules are written that requests are judged by.
    pub places: Arc<RulePlaces>,
    pub admin: AdminSettings,
}

/// What a reload changes for the admin listener, and what it shows.
#[derive(Clone, Debug)]
pub struct AdminSettings {
    /// Names that it answers to, in lower case.
    pub hosts: Vec<String>,
    /// The SHA-256 of the token that it asks for.
    pub token: Option<Digest>,
    /// Where it is. Every other listener that leads to it has metrics and health only.
    pub listen: Option<Listen>,
    pub shown: Arc<ShownConfig>,
}

impl AdminSettings {
    /// What those who come over a listener may do.
    fn access(&self, address: &Listen) -> AdminAccess {
        match &self.listen {
            Some(own) if own == address && (own.is_local() || self.token.is_some()) => AdminAccess::Full,
            Some(own) if own == address => AdminAccess::ReadOnly,
            _ => AdminAccess::MetricsOnly,
        }
    }
}

/// What is written of the traffic and of changes.
#[derive(Clone)]
pub struct Logs {
    pub access: AccessLog,
    pub audit: AuditLog,
    pub spans: SpanExporter,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For the whole head of a request, from its first byte.
    pub header: Duration,
    /// Between two requests on one connection.
    pub idle: Duration,
}

/// A second.
const MOST_BODY_RATE: u64 = 1 << 30;

impl Timeouts {
    /// Keys of `[limits]`.
    pub fn problems(&self) -> Vec<Problem> {
        let least = Duration::from_millis(100);
        let all = [("header_timeout", self.header), ("idle_timeout", self.idle)];
        all.into_iter().filter_map(|(key, time)| Problem::too_short(key, time, least)).collect()
    }
}

impl BodyRate {
    /// Keys of `[limits]`.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems: Vec<Problem> =
            Problem::too_short("body_grace", self.grace, Duration::from_secs(1)).into_iter().collect();
        if self.bytes.is_some_and(|bytes| !(1..=MOST_BODY_RATE).contains(&bytes)) {
            let instead = "use \"1B\" to \"1GiB\", or \"none\"";
            problems.push(Problem::error("body_rate", "is no rate that a client can keep", instead));
        }
        problems
    }
}

impl Snapshot {
    /// Resolves the upstreams' addresses, which may block. Pools of the running snapshot go on where they did not change.
    pub fn build(
        pipeline: Pipeline,
        metrics: Arc<Metrics>,
        upstreams: &[UpstreamSettings],
        settings: EdgeSettings,
        logs: Logs,
        running: Option<&Self>,
    ) -> Self {
        let Logs { access: log, audit, spans } = logs;
        let running = running.map_or(&[][..], |running| &running.upstreams);
        let build = |settings: &UpstreamSettings| Arc::new(Peers::build(settings, running, &metrics));
        let upstreams = upstreams.iter().map(build).collect();
        let route_metrics = pipeline.rules.routes.iter().map(|route| metrics.route(&route.name)).collect();
        let unrouted = metrics.route("none");
        let limit_metrics = pipeline.limits.names().map(|name| metrics.limit(name)).collect();
        Self { pipeline, metrics, upstreams, settings, log, audit, spans, route_metrics, unrouted, limit_metrics }
    }

    fn head_limits(&self) -> HeadLimits {
        let limits = &self.pipeline.rules.limits;
        HeadLimits {
            header_bytes: limits.header_bytes,
            target_bytes: limits.target_bytes,
            header_timeout: self.settings.timeouts.header,
            idle_timeout: self.settings.timeouts.idle,
        }
    }

    fn route_name(&self, index: Option<usize>) -> &str {
        index.and_then(|index| self.pipeline.rules.routes.get(index)).map_or("none", |route| &route.name)
    }

    /// Writes down a change. One that replaced the snapshot stands in the log of either, so that a log that is switched off or on
    /// says by whom.
    fn audit(&self, next: &Self, source: AuditSource, action: &AuditedAction) {
        let unix_ms = now().unix_ms;
        self.audit.write(unix_ms, source, action);
        if !self.audit.is_same(&next.audit) {
            next.audit.write(unix_ms, source, action);
        }
    }

    /// An upstream by its place in the configuration.
    fn pool(&self, place: Option<usize>) -> Option<&Peers> {
        self.upstreams.get(place?).map(|peers| &**peers)
    }

    /// For a trace that begins with a request, and for tollgate's span in it.
    fn new_trace_ids(&self) -> NewIds {
        NewIds {
            // One in 2^64 is zero, and gets the next best.
            trace_id: NonZeroU128::new(fastrand::u128(..)).unwrap_or(NonZeroU128::MIN),
            span: new_span_id(),
            sampled: self.spans.samples(|| fastrand::u32(..1_000_000)),
        }
    }

    fn count_limits(&self, facts: &LimitFacts) {
        for fact in facts {
            let Some(series) = self.limit_metrics.get(usize::from(fact.limit)) else { continue };
            series.count(match fact.result {
                LimitResult::Allowed => LimitCount::Allowed,
                LimitResult::Refused => LimitCount::Refused,
                LimitResult::DryRun => LimitCount::DryRun,
            });
            if fact.shared {
                series.shared();
            }
            if fact.odd {
                self.say_odd_terms();
            }
        }
    }

    /// A token's terms do not hold as its record has them.
    #[cold]
    fn say_odd_terms(&self) {
        for OddTerms { kind, name, token } in self.pipeline.limits.take_odd() {
            match kind {
                OddKind::UnknownPlan => log::warn!(
                    "token {token}: there is no [plan.{name}]: each limit's own amounts apply to tokens of this plan. This is logged \
                     once, and again after a reload"
                ),
                OddKind::TooManyRates => log::warn!(
                    "token {token}: limit {name} has {MOST_OWN_RATES} different rates of tokens already: a further one has the \
                     amounts of its plan, or the limit's own. This is logged once, and again after a reload"
                ),
            }
        }
    }

    /// An address has begun to guess.
    fn say_guessing(&self, episode: &GuessEpisode) {
        let Some(settings) = self.pipeline.guessing.settings() else { return };
        log::warn!(
            "client {}: more than {} failed tokens in {}; for now its tokens that are not in the cache are looked up at most {} \
             times a second, and further ones get 429",
            GuessEpisode::name(&episode.network),
            settings.failures,
            humantime::format_duration(settings.per),
            settings.lookups
        );
    }

    /// Ends the episodes of addresses that have stopped guessing.
    fn end_guessing(&self, now: Now) {
        let guessing = &self.pipeline.guessing;
        for episode in guessing.ended(now) {
            log::info!("{}", episode.end("has stopped sending failed tokens", now));
        }
        self.metrics.guessing().active(guessing.active());
    }

    /// The first limit that would have refused the request.
    fn dry_run_limit(&self, facts: &Facts) -> Option<&str> {
        let found = facts.limits.iter().find(|fact| fact.result == LimitResult::DryRun);
        found.map(|fact| self.pipeline.limits.name(fact.limit))
    }

    fn route_metrics(&self, route: Option<usize>) -> &RouteMetrics {
        route.and_then(|index| self.route_metrics.get(index)).unwrap_or(&self.unrouted)
    }
}

fn new_span_id() -> NonZeroU64 {
    NonZeroU64::new(fastrand::u64(..)).unwrap_or(NonZeroU64::MIN)
}

/// How far the process is on the way to its end.
#[derive(Default)]
pub struct Lifecycle {
    leaving: AtomicBool,
    draining: AtomicBool,
    begun: CancellationToken,
}

impl Lifecycle {
    /// Whether balancers should send requests here.
    fn is_ready(&self) -> bool {
        !self.leaving.load(Ordering::Acquire)
    }

    /// Balancers are told to send requests elsewhere; those that come are served as before.
    fn leave(&self) {
        self.leaving.store(true, Ordering::Release);
    }

    /// Whether each connection ends with its next answer.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    fn drain(&self) {
        self.draining.store(true, Ordering::Release);
        self.begun.cancel();
    }

    /// Comes back when draining has begun; may be asked again after that.
    fn draining(&self) -> impl Future<Output = ()> {
        self.begun.cancelled()
    }
}

/// How a shutdown goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShutdownTimes {
    /// For how long requests are served as before, while balancers learn that this gateway is leaving.
    pub drain_delay: Duration,
    /// How long requests in flight may take after that.
    pub grace: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_change_something_goes_by_the_listener_and_its_token() {
        let tcp = |text: &str| Listen::Tcp(text.into());
        let unix = Listen::Unix("/run/tollgate.sock".into(), 0o660);
        let token = Some(Digest::of(b"token"));
        for (listen, token, access) in [
            (tcp("127.0.0.1:9090"), None, AdminAccess::Full),
            (tcp("127.8.8.8:9090"), None, AdminAccess::Full),
            (tcp("[::1]:9090"), None, AdminAccess::Full),
            (tcp("[::ffff:127.0.0.1]:9090"), None, AdminAccess::Full),
            (unix, None, AdminAccess::Full),
            (tcp("0.0.0.0:9090"), None, AdminAccess::ReadOnly),
            (tcp("[::]:9090"), None, AdminAccess::ReadOnly),
            (tcp("10.0.0.5:9090"), None, AdminAccess::ReadOnly),
            (tcp("192.0.2.1:9090"), token, AdminAccess::Full),
        ] {
            let settings =
                AdminSettings { hosts: Vec::new(), token, listen: Some(listen.clone()), shown: Arc::default() };
            assert_eq!(settings.access(&listen), access, "{listen}");
            let elsewhere = settings.access(&tcp("127.0.0.1:9100"));
            assert_eq!(elsewhere, AdminAccess::MetricsOnly, "not the listener of {listen}");
        }
    }
}
