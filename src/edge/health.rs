//! What is done about servers in the background: checks, looks at those that are down, and names that are resolved again. When and
//! what is said by `upstream`; here it is carried out.

use super::Snapshot;
use super::backend::connect_alone;
use super::dial;
use super::peers::Peers;
use super::socket::Socket;
use crate::upstream::{self, CheckFault, CheckSettings, Look, ResolvedName, Server, ServerAddress};
use arc_swap::ArcSwap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// How often the servers are asked whether it is time for something.
const TICK: Duration = Duration::from_millis(100);
/// How long a server that is down may take to answer a look.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// How much of a response a check reads.
const MOST_OF_A_RESPONSE: usize = 64 * 1024;

/// Runs as long as the process.
pub(super) async fn run(snapshot: Arc<ArcSwap<Snapshot>>) {
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        begin_what_is_due(&snapshot.load_full());
    }
}

fn begin_what_is_due(snapshot: &Snapshot) {
    for peers in &snapshot.upstreams {
        for (server, what) in peers.upstream.looks(Instant::now()) {
            let peers = Arc::clone(peers);
            tokio::spawn(async move {
                let found = look(&peers, &server, what).await;
                let change = peers.upstream.seen(&server, found, Instant::now());
                change.iter().for_each(|change| peers.log(change));
            });
        }
        let names = peers.upstream.names(Instant::now());
        if !names.is_empty() {
            let peers = Arc::clone(peers);
            tokio::spawn(async move {
                let found = futures_util::future::join_all(names.into_iter().map(resolve)).await;
                let changes = peers.upstream.resolved(found, Instant::now());
                changes.iter().for_each(|change| peers.log(change));
            });
        }
    }
}

/// The system's resolver, on a thread of its own.
async fn resolve(name: String) -> ResolvedName {
    let addresses = tokio::net::lookup_host(&name).await.map_or_else(|_| Vec::new(), dial::in_order);
    ResolvedName { name, addresses }
}

async fn look(peers: &Peers, server: &Server, what: Look) -> Result<(), CheckFault> {
    let check = peers.upstream.check().filter(|_| what == Look::Check);
    let (connect_within, whole) = match check {
        Some(check) => (check.timeout, check.timeout),
        None => (peers.timeouts.connect, peers.timeouts.connect + peers.timeouts.read.min(ANSWER_WITHIN)),
    };
    let look = async {
        let greeting = peers.own_greeting();
        let port = check.and_then(|check| check.port);
        let socket = connect_alone(server, peers, port, greeting, connect_within).await?;
        see(server, what, check, socket).await
    };
    tokio::time::timeout(whole, look).await.unwrap_or(Err(CheckFault::Timeout))
}

/// Neither request carries a credential. Without a check, any response will do: whoever writes one is alive.
async fn see(server: &Server, what: Look, check: Option<&CheckSettings>, mut socket: Socket) -> Result<(), CheckFault> {
    let http = check.and_then(|check| check.http.as_ref());
    if http.is_none() && what != Look::Answer {
        return Ok(());
    }
    let host = match server.address() {
        ServerAddress::Tcp(address) => address,
        ServerAddress::Unix(_) => "localhost",
    };
    let line = http.map_or_else(|| "OPTIONS /".to_owned(), |http| format!("GET {}", http.path));
    let request = format!("{line} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: tollgate\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.map_err(|_| CheckFault::Closed)?;
    socket.flush().await.map_err(|_| CheckFault::Closed)?;
    let mut response = Vec::new();
    loop {
        let read = socket.read_buf(&mut response).await.map_err(|_| CheckFault::Closed)?;
        let whole = read == 0 || response.len() >= MOST_OF_A_RESPONSE;
        let verdict = match http {
            Some(http) => upstream::verdict(http, &response, whole),
            None if response.starts_with(b"HTTP/") => Some(Ok(())),
            None => (whole || response.len() >= 5).then_some(Err(CheckFault::Closed)),
        };
        if let Some(verdict) = verdict {
            return verdict;
        }
    }
}
