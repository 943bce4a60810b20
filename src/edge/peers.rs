//! From the servers of an upstream to what the framework connects to. Names are resolved here, before a snapshot goes live
//! and never on a request's way. The framework keeps the connections.

use crate::problem::Problem;
use crate::telemetry::metrics::{Metrics, UpstreamError};
use crate::upstream::{ResolvedAddress, ServerAddress, Upstream, UpstreamSettings};
use pingora::upstreams::peer::{HttpPeer, HttpUpstreamRequestPolicy};
use std::net::ToSocketAddrs as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Why an upstream cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    #[error("upstream \"{upstream}\": {server}: {error}")]
    Unresolved { upstream: String, server: String, error: std::io::Error },
    #[error("upstream \"{upstream}\": {server} has no address")]
    NoAddress { upstream: String, server: String },
    #[error("upstream \"{upstream}\": {server}: {error}")]
    Socket { upstream: String, server: String, error: Box<pingora::Error> },
}

/// An upstream as this snapshot reaches it: the pool may be older than the snapshot, the timeouts are the snapshot's own.
pub(super) struct Peers {
    pub(super) upstream: Arc<Upstream>,
    /// One for each server of the pool, in its order.
    templates: Vec<HttpPeer>,
    pub(super) timeouts: UpstreamTimeouts,
}

/// How long a server may take.
#[derive(Clone, Copy)]
pub(super) struct UpstreamTimeouts {
    pub(super) connect: Duration,
    /// Between two pieces of an answer, and to its first.
    pub(super) read: Duration,
    /// How long an unused connection is kept.
    pub(super) idle: Duration,
}

/// Resolves the servers' names; each address of a name is a server. May block.
pub fn resolve(settings: &UpstreamSettings) -> Result<Vec<ResolvedAddress>, ResolveError> {
    let mut resolved = Vec::new();
    for server in &settings.servers {
        match server {
            ServerAddress::Tcp(address) => {
                let (upstream, server) = (settings.name.clone(), address.clone());
                let before = resolved.len();
                match address.to_socket_addrs() {
                    Ok(addresses) => resolved.extend(addresses.map(ResolvedAddress::Tcp)),
                    Err(error) => return Err(ResolveError::Unresolved { upstream, server, error }),
                }
                if resolved.len() == before {
                    return Err(ResolveError::NoAddress { upstream, server });
                }
            }
            ServerAddress::Unix(path) => resolved.push(ResolvedAddress::Unix(path.clone())),
        }
    }
    Ok(resolved)
}

/// The servers whose names cannot be resolved. May block for as long as resolving takes. Keys of an `[[upstream]]`.
pub fn unresolved(settings: &UpstreamSettings) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (index, server) in settings.servers.iter().enumerate() {
        let only = UpstreamSettings { servers: vec![server.clone()], ..settings.clone() };
        let why = match resolve(&only) {
            Ok(_) | Err(ResolveError::Socket { .. }) => continue,
            Err(ResolveError::Unresolved { error, .. }) => error.to_string(),
            Err(ResolveError::NoAddress { .. }) => "it has no address".into(),
        };
        let what = format!("{server} cannot be resolved: {why}");
        problems.push(
            Problem::error("servers", what, "use a name that this machine can resolve, or an IP address")
                .element(index),
        );
    }
    problems
}

impl Peers {
    /// Resolves the addresses. A pool that runs already goes on, if it is of the same name and servers.
    pub(super) fn build(
        settings: &UpstreamSettings,
        running: &[Self],
        metrics: &Metrics,
    ) -> Result<Self, ResolveError> {
        let addresses = resolve(settings)?;
        let known = running.iter().map(|peers| &peers.upstream).find(|known| known.is(&settings.name, &addresses));
        let upstream = known.map_or_else(
            || Arc::new(Upstream::new(&settings.name, addresses, metrics.upstream(&settings.name))),
            Arc::clone,
        );
        let template = |address: &ResolvedAddress| {
            let mut peer = match address {
                ResolvedAddress::Tcp(socket) => HttpPeer::new(*socket, false, String::new()),
                ResolvedAddress::Unix(path) => HttpPeer::new_uds(path, false, String::new()).map_err(|error| {
                    ResolveError::Socket { upstream: settings.name.clone(), server: address.to_string(), error }
                })?,
            };
            let options = &mut peer.options;
            options.connection_timeout = Some(settings.connect_timeout);
            options.total_connection_timeout = Some(settings.connect_timeout);
            options.read_timeout = Some(settings.read_timeout);
            options.write_timeout = Some(settings.read_timeout);
            options.idle_timeout = Some(settings.idle_timeout);
            // The head was written by `forward`, which has taken out all that ends here.
            options.http_upstream_request_policy = HttpUpstreamRequestPolicy::preserve();
            Ok(peer)
        };
        let templates = upstream.servers().iter().map(|server| template(server.address())).collect::<Result<_, _>>()?;
        let timeouts = UpstreamTimeouts {
            connect: settings.connect_timeout,
            read: settings.read_timeout,
            idle: settings.idle_timeout,
        };
        Ok(Self { upstream, templates, timeouts })
    }

    /// A request failed with its last attempt. Each stands in the access log; this is the line as an outage begins.
    pub(super) fn request_failed(&self, kind: UpstreamError, request_id: &str) {
        if self.upstream.request_failed(Instant::now()).is_some() {
            let (name, kind) = (self.upstream.name(), kind.as_str());
            log::warn!("upstream {name}: requests are failing, the first one with `{kind}`: request {request_id}");
        }
    }

    /// A server that was asked at this time has answered.
    pub(super) fn answered(&self, asked: Instant, now: Instant) {
        if let Some(over) = self.upstream.answered(asked, now) {
            let (name, failures, seconds) = (self.upstream.name(), over.failures, over.lasted.as_secs_f64());
            log::warn!("upstream {name}: answers again; {failures} requests failed in {seconds:.1} s");
        }
    }

    /// A server by its place in the pool. A tunnel has no read timeout.
    pub(super) fn peer(&self, server: usize, tunnel: bool) -> Option<HttpPeer> {
        let mut peer = self.templates.get(server)?.clone();
        if tunnel {
            peer.options.read_timeout = None;
        }
        Some(peer)
    }
}
