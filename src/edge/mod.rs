//! Where sockets are. The only folder that names pingora: it listens, hands requests to the pipeline, carries out what
//! the pipeline decided, and writes to clients and backends. It decides nothing about a request itself.

mod admin;
mod backend;
mod client;
mod connection;
mod dial;
mod exchange;
mod health;
mod http1;
mod http2_backend;
mod listen;
mod log_levels;
mod patience;
mod peers;
mod proxied;
mod recheck;
mod secure;
mod server;
mod socket;
mod ticket;
mod workers;

pub use crate::clock::now;
pub use listen::{AddressInUse, Listen, ServerSettings};
pub use log_levels::FRAMEWORK_LOG_LEVELS;
pub use peers::unresolved;
pub use server::{Rebuild, Rebuilt, Running, ServeError, serve};

use crate::pipeline::Pipeline;
use crate::problem::Problem;
use crate::request::view::Method;
use crate::telemetry::access_log::AccessLog;
use crate::telemetry::metrics::{Metrics, RouteMetrics};
use crate::upstream::UpstreamSettings;
use client::HeadLimits;
use peers::Peers;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::Notify;

/// The whole running configuration. A request takes one at its start and keeps it to its log line; a reload puts
/// another in its place.
pub struct Snapshot {
    pub pipeline: Pipeline,
    pub metrics: Arc<Metrics>,
    /// In the configuration's order, by which routes name them.
    upstreams: Vec<Arc<Peers>>,
    timeouts: Timeouts,
    log: AccessLog,
    /// Names that the admin listener answers to.
    admin_hosts: Vec<String>,
    /// One for each route, and one for requests that got to none.
    route_metrics: Vec<RouteMetrics>,
    unrouted: RouteMetrics,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For the whole head of a request, from its first byte.
    pub header: Duration,
    /// Between two requests on one connection.
    pub idle: Duration,
}

impl Timeouts {
    /// Keys of `[limits]`.
    pub fn problems(&self) -> Vec<Problem> {
        let least = Duration::from_millis(100);
        let all = [("header_timeout", self.header), ("idle_timeout", self.idle)];
        all.into_iter().filter_map(|(key, time)| Problem::too_short(key, time, least)).collect()
    }
}

impl Snapshot {
    /// Resolves the upstreams' addresses, which may block. Pools of the running snapshot go on where they did not change.
    pub fn build(
        pipeline: Pipeline,
        metrics: Arc<Metrics>,
        upstreams: &[UpstreamSettings],
        timeouts: Timeouts,
        log: AccessLog,
        admin_hosts: Vec<String>,
        running: Option<&Self>,
    ) -> Self {
        let running = running.map_or(&[][..], |running| &running.upstreams);
        let build = |settings: &UpstreamSettings| Arc::new(Peers::build(settings, running, &metrics));
        let upstreams = upstreams.iter().map(build).collect();
        let route_metrics = pipeline.rules.routes.iter().map(|route| metrics.route(&route.name)).collect();
        let unrouted = metrics.route("none");
        Self { pipeline, metrics, upstreams, timeouts, log, admin_hosts, route_metrics, unrouted }
    }

    fn head_limits(&self) -> HeadLimits {
        let limits = &self.pipeline.rules.limits;
        HeadLimits {
            header_bytes: limits.header_bytes,
            target_bytes: limits.target_bytes,
            header_timeout: self.timeouts.header,
            idle_timeout: self.timeouts.idle,
        }
    }

    fn route_name(&self, index: Option<usize>) -> &str {
        index.and_then(|index| self.pipeline.rules.routes.get(index)).map_or("none", |route| &route.name)
    }

    /// An upstream by its place in the configuration.
    fn pool(&self, place: Option<usize>) -> Option<&Peers> {
        self.upstreams.get(place?).map(|peers| &**peers)
    }

    fn count(&self, route: Option<usize>, method: Method, status: u16, took: Duration) {
        let series = route.and_then(|index| self.route_metrics.get(index)).unwrap_or(&self.unrouted);
        series.count(method.index(), status, took);
    }
}

/// Whether new requests are taken.
#[derive(Default)]
pub struct Lifecycle {
    draining: AtomicBool,
    begun: Notify,
}

impl Lifecycle {
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    fn drain(&self) {
        self.draining.store(true, Ordering::Release);
        self.begun.notify_waiters();
    }

    /// Comes back when draining has begun.
    async fn draining(&self) {
        let begun = self.begun.notified();
        tokio::pin!(begun);
        begun.as_mut().enable();
        if !self.is_draining() {
            begun.await;
        }
    }
}
