//! From the servers of an upstream to what the framework connects to, and what the log says of them. Names are resolved here,
//! before a snapshot goes live and then in the background, never on a request's way. The framework keeps the connections.

use super::dial::{self, Dialer};
use super::secure::BackendTls;
use crate::forward::{PROXY_LOCAL, proxy_header};
use crate::problem::Problem;
use crate::telemetry::metrics::{Metrics, UpstreamError};
use crate::telemetry::outage::Recovery;
use crate::upstream::{
    ListedServer, Pick, ResolvedName, Server, ServerAddress, ServerChange, Upstream, UpstreamSettings,
};
use pingora::upstreams::peer::{HttpPeer, HttpUpstreamRequestPolicy};
use std::net::{IpAddr, ToSocketAddrs as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// An upstream as this snapshot reaches it: the pool may be older than the snapshot, the timeouts are the snapshot's own.
pub(super) struct Peers {
    pub(super) upstream: Arc<Upstream>,
    pub(super) timeouts: UpstreamTimeouts,
    /// How its connections are protected. `None`: plain text.
    pub(super) tls: Option<Arc<BackendTls>>,
    /// HTTP/2 is spoken.
    pub(super) http2: bool,
    /// Each connection begins with the client's address, and is that client's alone.
    pub(super) send_proxy: bool,
}

/// How long a server may take.
#[derive(Clone, Copy)]
pub(super) struct UpstreamTimeouts {
    pub(super) connect: Duration,
    /// Between two pieces of an answer, and to its first.
    pub(super) read: Duration,
    /// To the first byte of an answer, where that is less.
    pub(super) per_try: Option<Duration>,
    /// For the whole exchange.
    pub(super) request: Option<Duration>,
    /// How long an unused connection is kept.
    pub(super) idle: Duration,
    /// How long a request waits for a server with room.
    pub(super) queue: Duration,
}

/// Resolves the servers' names. May block for as long as resolving takes.
fn resolve(settings: &UpstreamSettings) -> Vec<ResolvedName> {
    let resolve = |name: &str| {
        let found = name.to_socket_addrs().map_or_else(|_| Vec::new(), dial::in_order);
        ResolvedName { name: name.to_owned(), addresses: found }
    };
    settings.names().map(resolve).collect()
}

/// The servers whose names cannot be resolved: they get no request until they can. May block for as long as resolving takes.
/// Keys of an `[[upstream]]`.
pub fn unresolved(settings: &UpstreamSettings) -> Vec<Problem> {
    let problem = |(index, ListedServer { address: server, .. }): (usize, &ListedServer)| {
        let why = match server.name()?.to_socket_addrs() {
            Ok(mut addresses) => addresses.next().is_none().then(|| "it has no address".to_owned())?,
            Err(error) => error.to_string(),
        };
        let what = format!("{server} cannot be resolved: {why}");
        let instead = "use a name that this machine can resolve, or an IP address";
        Some(Problem::warning("servers", what, instead).element(index))
    };
    settings.servers.iter().enumerate().filter_map(problem).collect()
}

impl Peers {
    /// Resolves the names. A pool that runs already goes on, or hands over the state of its servers.
    pub(super) fn build(settings: &UpstreamSettings, running: &[Arc<Self>], metrics: &Arc<Metrics>) -> Self {
        let running = running.iter().find(|known| known.upstream.name() == settings.name);
        let names = resolve(settings);
        let pool = running.map(|running| &running.upstream);
        let (upstream, changes) = Upstream::build(settings, names, pool, metrics, Instant::now());
        let tls = running.and_then(|running| running.tls.as_ref());
        let tls = settings.tls.as_ref().map(|settings| BackendTls::of(settings, tls));
        let timeouts = UpstreamTimeouts {
            connect: settings.connect_timeout,
            read: settings.read_timeout,
            per_try: settings.per_try_timeout,
            request: settings.request_timeout,
            idle: settings.idle_timeout,
            queue: settings.queue_timeout,
        };
        let peers = Self { upstream, timeouts, tls, http2: settings.http2, send_proxy: settings.send_proxy };
        changes.iter().for_each(|change| peers.log(change));
        peers
    }

    /// What a connection begins with that carries a client's requests.
    pub(super) fn greeting(&self, client: Option<IpAddr>) -> Vec<u8> {
        if self.send_proxy { proxy_header(client) } else { Vec::new() }
    }

    /// The same for a connection of tollgate's own.
    pub(super) fn own_greeting(&self) -> &'static [u8] {
        if self.send_proxy { &PROXY_LOCAL } else { b"" }
    }

    /// A request failed with its last attempt. Each stands in the access log; this is the line as an outage begins.
    pub(super) fn request_failed(&self, kind: UpstreamError, request_id: &str) {
        if self.upstream.request_failed(Instant::now()).is_some() {
            let (name, kind) = (self.upstream.name(), kind.as_str());
            log::warn!("upstream {name}: requests are failing, the first one with `{kind}`: request {request_id}");
        }
    }

    /// Requests are answered again.
    pub(super) fn recovered(&self, over: &Recovery) {
        let (name, failures, seconds) = (self.upstream.name(), over.failures, over.lasted.as_secs_f64());
        log::warn!("upstream {name}: answers again; {failures} requests failed in {seconds:.1} s");
    }

    /// A server went down or came back.
    pub(super) fn log(&self, change: &ServerChange) {
        let (name, server, reason) = (self.upstream.name(), &change.server, change.reason.as_str());
        match change.back_after {
            None => log::warn!("upstream {name}: server {server} is down: {reason}"),
            Some(time) => log::warn!("upstream {name}: server {server} is up again after {:.1} s", time.as_secs_f64()),
        }
    }

    /// How to reach a server. `None`: it has no address, or must be spoken to in a way that the framework's lane cannot.
    pub(super) fn peer(&self, pick: &Pick, read_timeout: Option<Duration>) -> Option<HttpPeer> {
        if self.tls.is_some() || self.http2 || self.send_proxy {
            log::error!(
                "upstream {}: the framework's lane speaks no TLS, HTTP/2 or PROXY protocol",
                self.upstream.name()
            );
            return None;
        }
        let mut peer = match pick.server.address() {
            ServerAddress::Unix(path) => HttpPeer::new_uds(path, false, String::new()).ok()?,
            ServerAddress::Tcp(_) => self.tcp_peer(&pick.server)?,
        };
        let options = &mut peer.options;
        options.connection_timeout = Some(self.timeouts.connect);
        options.total_connection_timeout = Some(self.timeouts.connect);
        options.read_timeout = read_timeout;
        options.write_timeout = Some(self.timeouts.read);
        options.idle_timeout = Some(self.timeouts.idle);
        // The head was written by `forward`, which has taken out all that ends here.
        options.http_upstream_request_policy = HttpUpstreamRequestPolicy::preserve();
        if pick.fresh {
            // No kept connection has this key, and this one is not kept.
            peer.group_key = 1;
            peer.options.idle_timeout = Some(Duration::ZERO);
        }
        Some(peer)
    }

    /// The framework looks for a kept connection to the first address, so that is the one which was connected to last.
    fn tcp_peer(&self, server: &Arc<Server>) -> Option<HttpPeer> {
        let mut addresses = server.addresses();
        let mut peer = HttpPeer::new(addresses.next()?, false, String::new());
        if addresses.next().is_some() {
            peer.options.custom_l4 =
                Some(Arc::new(Dialer { server: Arc::clone(server), limit: self.timeouts.connect }));
        }
        Some(peer)
    }
}
