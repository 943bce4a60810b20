//! The servers behind an upstream, taken in turn. Addresses are resolved before a snapshot goes live, never on a
//! request's way. The framework keeps the connections.

use crate::telemetry::metrics::{UpstreamError, UpstreamMetrics};
use crate::telemetry::outage::Outage;
use pingora::upstreams::peer::{HttpPeer, HttpUpstreamRequestPolicy};
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// One `[[upstream]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamSettings {
    pub name: String,
    pub servers: Vec<ServerAddress>,
    pub connect_timeout: Duration,
    pub read_timeout: Duration,
    /// How long an unused connection is kept; below the backend's own keep-alive time.
    pub idle_timeout: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerAddress {
    /// `host:port`.
    Tcp(String),
    /// A path.
    Unix(String),
}

impl std::fmt::Display for ServerAddress {
    /// As the configuration writes it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{path}"),
        }
    }
}

pub(super) struct Upstream {
    pub(super) name: String,
    pub(super) metrics: UpstreamMetrics,
    peers: Vec<HttpPeer>,
    next: AtomicUsize,
    outage: Outage,
}

impl Upstream {
    /// Resolves all addresses; a name with several stands for several servers.
    pub(super) fn resolve(settings: &UpstreamSettings, metrics: UpstreamMetrics) -> Result<Self, String> {
        let mut peers = Vec::new();
        for server in &settings.servers {
            match server {
                ServerAddress::Tcp(address) => {
                    let resolved: Vec<SocketAddr> =
                        address.to_socket_addrs().map_err(|error| format!("{address}: {error}"))?.collect();
                    if resolved.is_empty() {
                        return Err(format!("{address} has no address"));
                    }
                    peers.extend(resolved.into_iter().map(|address| HttpPeer::new(address, false, String::new())));
                }
                ServerAddress::Unix(path) => {
                    peers.push(
                        HttpPeer::new_uds(path, false, String::new()).map_err(|error| format!("{path}: {error}"))?,
                    );
                }
            }
        }
        for peer in &mut peers {
            let options = &mut peer.options;
            options.connection_timeout = Some(settings.connect_timeout);
            options.total_connection_timeout = Some(settings.connect_timeout);
            options.read_timeout = Some(settings.read_timeout);
            options.write_timeout = Some(settings.read_timeout);
            options.idle_timeout = Some(settings.idle_timeout);
            // The head was written by `forward`, which has taken out all that ends here.
            options.http_upstream_request_policy = HttpUpstreamRequestPolicy::preserve();
        }
        Ok(Self { name: settings.name.clone(), metrics, peers, next: AtomicUsize::new(0), outage: Outage::default() })
    }

    /// The next server in turn. A tunnel may be silent for as long as it likes.
    pub(super) fn next(&self, tunnel: bool) -> Option<HttpPeer> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let mut peer = self.peers.get(turn % self.peers.len().max(1))?.clone();
        if tunnel {
            peer.options.read_timeout = None;
        }
        Some(peer)
    }

    /// An exchange failed. Each one is counted and stands in the access log; here is a line as the trouble begins.
    pub(super) fn failed(&self, kind: UpstreamError, request_id: &str) {
        self.metrics.failed(kind);
        if self.outage.failed(Instant::now()).is_some() {
            let (name, kind) = (&self.name, kind.as_str());
            log::warn!(
                "upstream {name}: exchanges fail from now on, the first one with `{kind}`: request {request_id}"
            );
        }
    }

    /// A server that was asked at this time has answered.
    pub(super) fn answered(&self, asked: Instant) {
        let now = Instant::now();
        self.metrics.answered(now.saturating_duration_since(asked));
        if let Some(over) = self.outage.succeeded(asked, now) {
            let (failures, lasted) = (over.failures, over.lasted);
            log::warn!("upstream {}: answers again; {failures} exchanges failed in {lasted:.1?}", self.name);
        }
    }
}
