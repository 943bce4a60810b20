//! WHO SERVES. The servers behind each `[[upstream]]`: which one is next, and how they have been doing. Pure: no socket, no
//! name resolution, no clock of its own. A pool outlives every reload that does not change its servers. It must not know
//! what is asked of a server, nor by which connection.

use crate::problem::{Problem, socket_path_too_long};
use crate::telemetry::metrics::{UpstreamError, UpstreamMetrics};
use crate::telemetry::outage::{Outage, Recovery};
use std::fmt;
use std::net::SocketAddr;
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

impl UpstreamSettings {
    /// Keys of an `[[upstream]]`.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.name.is_empty() {
            problems.push(Problem::error("name", "is empty", "write it like \"api\""));
        }
        if self.servers.is_empty() {
            problems.push(Problem::error("servers", "is empty", "write it like [\"127.0.0.1:3000\"]"));
        }
        for (index, server) in self.servers.iter().enumerate() {
            if let ServerAddress::Unix(path) = server
                && let Some(what) = socket_path_too_long(path)
            {
                problems.push(Problem::error("servers", what, "use a shorter path").element(index));
            }
        }
        let least = Duration::from_millis(1);
        problems.extend(Problem::too_short("connect_timeout", self.connect_timeout, least));
        problems.extend(Problem::too_short("read_timeout", self.read_timeout, least));
        problems
    }
}

/// A server as the configuration names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerAddress {
    /// `host:port`.
    Tcp(String),
    /// A path.
    Unix(String),
}

impl fmt::Display for ServerAddress {
    /// As the configuration writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{path}"),
        }
    }
}

/// Where one server listens, its name resolved.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ResolvedAddress {
    Tcp(SocketAddr),
    Unix(String),
}

impl fmt::Display for ResolvedAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{path}"),
        }
    }
}

#[derive(Debug)]
pub struct Server {
    address: ResolvedAddress,
    /// The address as logs print it, formatted once.
    label: String,
}

impl Server {
    pub fn address(&self) -> &ResolvedAddress {
        &self.address
    }

    pub fn label(&self) -> &str {
        &self.label
    }
}

/// The servers of one `[[upstream]]`, taken in turn, and their state.
pub struct Upstream {
    name: String,
    servers: Vec<Server>,
    turn: AtomicUsize,
    outage: Outage,
    metrics: UpstreamMetrics,
}

impl Upstream {
    pub fn new(name: &str, addresses: Vec<ResolvedAddress>, metrics: UpstreamMetrics) -> Self {
        let server = |address: ResolvedAddress| Server { label: address.to_string(), address };
        Self {
            name: name.into(),
            servers: addresses.into_iter().map(server).collect(),
            turn: AtomicUsize::new(0),
            outage: Outage::default(),
            metrics,
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn servers(&self) -> &[Server] {
        &self.servers
    }

    /// Whether a pool of this name and these servers is this one, so that its state is kept across a reload.
    pub fn is(&self, name: &str, addresses: &[ResolvedAddress]) -> bool {
        self.name == name && self.servers.iter().map(Server::address).eq(addresses)
    }

    /// The place of the next server in turn; `None` when there is none.
    pub fn next(&self) -> Option<usize> {
        self.turn.fetch_add(1, Ordering::Relaxed).checked_rem(self.servers.len())
    }

    /// A connection to a server is established.
    pub fn connected(&self, reused: bool) {
        self.metrics.connected(reused);
    }

    /// A request is tried again.
    pub fn retried(&self) {
        self.metrics.retried();
    }

    /// One attempt failed. Another one may follow, so that the client notices nothing.
    pub fn attempt_failed(&self, kind: UpstreamError) {
        self.metrics.failed(kind);
    }

    /// A request failed with its last attempt. `Some`: the log should say that an outage begins.
    pub fn request_failed(&self, now: Instant) -> Option<u64> {
        self.outage.failed(now)
    }

    /// A server that was asked at a time has answered. `Some`: the log should say that the outage is over.
    pub fn answered(&self, asked: Instant, now: Instant) -> Option<Recovery> {
        self.metrics.answered(now.saturating_duration_since(asked));
        self.outage.succeeded(asked, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::metrics::Metrics;

    fn upstream(addresses: &[&str]) -> Upstream {
        let address = |text: &&str| match text.strip_prefix("unix:") {
            Some(path) => ResolvedAddress::Unix(path.into()),
            None => ResolvedAddress::Tcp(text.parse().unwrap()),
        };
        let addresses = addresses.iter().map(address).collect();
        Upstream::new("api", addresses, Metrics::new("test").unwrap().upstream("api"))
    }

    #[test]
    fn servers_take_turns() {
        let two = upstream(&["127.0.0.1:1", "unix:/run/app.sock"]);
        let turns: Vec<_> = (0..4).map(|_| two.next().map(|index| two.servers()[index].label().to_owned())).collect();
        let expected = ["127.0.0.1:1", "unix:/run/app.sock", "127.0.0.1:1", "unix:/run/app.sock"];
        assert_eq!(turns, expected.map(|label| Some(label.to_owned())));
        assert_eq!(upstream(&[]).next(), None);
    }

    #[test]
    fn a_pool_is_known_again_by_its_name_and_its_servers() {
        let pool = upstream(&["127.0.0.1:1", "[::1]:1"]);
        let addresses: Vec<_> = pool.servers().iter().map(|server| server.address().clone()).collect();
        assert!(pool.is("api", &addresses));
        assert!(!pool.is("web", &addresses), "another name");
        assert!(!pool.is("api", &addresses[..1]), "one server fewer");
        let turned: Vec<_> = addresses.into_iter().rev().collect();
        assert!(!pool.is("api", &turned), "another order: the turns would mean other servers");
    }
}
