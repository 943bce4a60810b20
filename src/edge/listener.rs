//! One listener, and what a connection goes through before it can speak HTTP: the PROXY protocol, then TLS, within one
//! deadline. It must not know what is said after that.

use super::listen::ListenerSettings;
use super::socket::Socket;
use super::tls::{HandshakeFault, ListenerTls};
use crate::problem::Problem;
use crate::request::origin::{Arrival, TlsArrival};
use crate::request::proxy_protocol::{
    BINARY_PREFIX, LONGEST_BINARY, LONGEST_LINE, ProxyFault, ProxyVersion, SHORTEST, binary, binary_length, line,
    version,
};
use crate::telemetry::metrics::{HandshakeResult, Metrics};
use crate::telemetry::outage::LogThrottle;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;
use tokio::io::AsyncReadExt as _;

/// A listener as it is configured now. A reload puts another in its place; connections keep theirs.
pub(super) struct ListenerState {
    pub(super) settings: ListenerSettings,
    tls: Option<ListenerTls>,
    complaints: LogThrottle,
}

/// A connection that may begin to speak HTTP.
pub(super) struct Welcomed {
    pub(super) socket: Socket,
    pub(super) arrival: Arrival,
    /// The client has chosen HTTP/2.
    pub(super) http2: bool,
}

/// Why a connection ended before it began.
enum Turned {
    Proxy(ProxyFault),
    NotFromABalancer,
    /// A proxy that is not known may not ask.
    NotAPeer,
    Handshake(HandshakeFault),
    /// The client is gone.
    Gone,
}

impl From<io::Error> for Turned {
    fn from(_: io::Error) -> Self {
        Self::Gone
    }
}

impl ListenerState {
    pub(super) fn new(settings: ListenerSettings) -> Result<Self, Problem> {
        let tls = settings.tls.as_ref().map(ListenerTls::new).transpose()?;
        Ok(Self { settings, tls, complaints: LogThrottle::default() })
    }

    pub(super) fn tls(&self) -> Option<&ListenerTls> {
        self.tls.as_ref()
    }

    /// Whether a connection can be used as it is.
    pub(super) fn is_plain(&self) -> bool {
        self.tls.is_none()
            && self.settings.proxy_protocol.is_none()
            && self.settings.redirect.is_none()
            && self.settings.verdict.is_none()
    }

    /// What comes before HTTP. `None`: the connection has been closed, and counted.
    pub(super) async fn welcome(&self, socket: Socket, metrics: Arc<Metrics>) -> Option<Welcomed> {
        let peer = socket.peer();
        let result = match tokio::time::timeout(self.settings.handshake_timeout, self.prepare(socket, peer)).await {
            Ok(Ok(welcomed)) => {
                if self.tls.is_some() || self.settings.proxy_protocol.is_some() {
                    metrics.listeners().handshake(HandshakeResult::Ok);
                }
                return Some(welcomed);
            }
            Ok(Err(Turned::Handshake(HandshakeFault { result, error }))) => {
                self.complain(peer, &format!("the TLS handshake failed: {error}"));
                result
            }
            Ok(Err(Turned::Proxy(fault))) => {
                self.complain(peer, &fault.to_string());
                HandshakeResult::ProxyProtocol
            }
            Ok(Err(Turned::NotFromABalancer)) => {
                self.complain(peer, "its network is not in proxy_protocol");
                HandshakeResult::ProxyProtocol
            }
            Ok(Err(Turned::NotAPeer)) => {
                self.complain(peer, "its network is not in peers");
                HandshakeResult::Stranger
            }
            Ok(Err(Turned::Gone)) => HandshakeResult::Closed,
            Err(_) => HandshakeResult::TimedOut,
        };
        metrics.listeners().handshake(result);
        None
    }

    /// A balancer or a client that is configured in another way is worth a line, but a flood must not fill the disk.
    fn complain(&self, peer: Option<IpAddr>, why: &str) {
        if let Some(suppressed) = self.complaints.due(Instant::now()) {
            let peer = peer.map_or_else(|| "a Unix socket".to_owned(), |ip| ip.to_string());
            let address = &self.settings.address;
            log::warn!(
                "listener {address}: a connection from {peer} was closed: {why} ({suppressed} more since the last line)"
            );
        }
    }

    async fn prepare(&self, mut socket: Socket, peer: Option<IpAddr>) -> Result<Welcomed, Turned> {
        let mut arrival = Arrival { redirect: self.settings.redirect, ..Arrival::of(peer) };
        if let Some(verdict) = &self.settings.verdict {
            // Whoever may ask could find out which tokens are good.
            if !verdict.peers.trusts(peer.map(|ip| ip.to_canonical())) {
                return Err(Turned::NotAPeer);
            }
            arrival.verdict = Some(Arc::clone(&verdict.rules));
        }
        if let Some(balancers) = &self.settings.proxy_protocol {
            if !balancers.trusts(peer) {
                return Err(Turned::NotFromABalancer);
            }
            arrival.announced = announced(&mut socket).await?;
        }
        match (&self.tls, socket) {
            (Some(tls), Socket::Tcp(socket)) => {
                let encrypted = tls.accept(socket).await.map_err(Turned::Handshake)?;
                let hsts = self.settings.hsts.map(|time| format!("max-age={}", time.as_secs()));
                arrival.tls = Some(Arc::new(TlsArrival { subject: encrypted.subject, hsts }));
                Ok(Welcomed { socket: encrypted.socket, arrival, http2: encrypted.http2 })
            }
            // The settings have no TLS on a Unix socket.
            (_, socket) => Ok(Welcomed { socket, arrival, http2: false }),
        }
    }
}

/// Reads a header of the PROXY protocol to its last byte, and nothing behind it.
async fn announced(socket: &mut Socket) -> Result<Option<IpAddr>, Turned> {
    let mut start = [0; SHORTEST];
    socket.read_exact(&mut start).await?;
    match version(&start).map_err(Turned::Proxy)? {
        ProxyVersion::Line => {
            let mut read = start.to_vec();
            while !read.ends_with(b"\n") {
                if read.len() >= LONGEST_LINE {
                    return Err(Turned::Proxy(ProxyFault::TooLong));
                }
                read.push(socket.read_u8().await?);
            }
            line(&read).map_err(Turned::Proxy)
        }
        ProxyVersion::Binary => {
            let mut prefix = [0; BINARY_PREFIX];
            prefix[..SHORTEST].copy_from_slice(&start);
            prefix[SHORTEST] = socket.read_u8().await?;
            let length = binary_length(&prefix).map_err(Turned::Proxy)?;
            let mut rest = [0; LONGEST_BINARY];
            socket.read_exact(&mut rest[..length]).await?;
            binary(&prefix, &rest[..length]).map_err(Turned::Proxy)
        }
    }
}
