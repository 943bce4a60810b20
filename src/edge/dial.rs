//! Makes a connection to a server that may have several addresses, IPv4 and IPv6, in the manner of RFC 8305: the next address
//! is tried when one has failed or is slow, and the first connection wins. It must not know what the connection is for.

use crate::upstream::Server;
use async_trait::async_trait;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use pingora::connectors::L4Connect;
use pingora::protocols::l4::socket::SocketAddr as FrameworkAddress;
use pingora::protocols::l4::stream::Stream;
use pingora::{Error, ErrorType};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;

/// How long one address is waited for before the next one is tried beside it (RFC 8305, section 5).
const HEAD_START: Duration = Duration::from_millis(250);

/// Addresses in the order in which they are to be tried: families take turns, beginning with the resolver's first choice.
pub(super) fn in_order(addresses: impl Iterator<Item = SocketAddr>) -> Vec<SocketAddr> {
    let mut all: Vec<SocketAddr> = Vec::new();
    addresses.for_each(|address| {
        if !all.contains(&address) {
            all.push(address);
        }
    });
    let first_is_ipv6 = all.first().is_some_and(SocketAddr::is_ipv6);
    let (first, second): (Vec<_>, Vec<_>) = all.into_iter().partition(|address| address.is_ipv6() == first_is_ipv6);
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    let mut ordered = Vec::new();
    loop {
        let pair = [first.next(), second.next()];
        if pair.iter().all(Option::is_none) {
            return ordered;
        }
        ordered.extend(pair.into_iter().flatten());
    }
}

/// Connects to one of the server's addresses; `port`: to another port there.
pub(super) async fn dial(server: &Server, port: Option<u16>, limit: Duration) -> io::Result<(TcpStream, SocketAddr)> {
    let at = |address: SocketAddr| SocketAddr::new(address.ip(), port.unwrap_or(address.port()));
    let race = race(server.addresses().map(at));
    let timed_out = |_| io::Error::new(io::ErrorKind::TimedOut, "no connection in time");
    let connected = tokio::time::timeout(limit, race).await.map_err(timed_out)??;
    server.prefer(connected.1);
    Ok(connected)
}

async fn race(mut addresses: impl Iterator<Item = SocketAddr>) -> io::Result<(TcpStream, SocketAddr)> {
    let mut running = FuturesUnordered::new();
    let mut error = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    loop {
        let next = addresses.next();
        let is_last = next.is_none();
        if let Some(address) = next {
            running.push(async move { TcpStream::connect(address).await.map(|socket| (socket, address)) });
        }
        let head_start = async {
            match is_last {
                true => std::future::pending().await,
                false => tokio::time::sleep(HEAD_START).await,
            }
        };
        tokio::select! {
            ended = running.next() => match ended {
                Some(Ok(won)) => return Ok(won),
                Some(Err(why)) => error = why,
                None => return Err(error),
            },
            () = head_start => {}
        }
    }
}

/// For the framework, which knows one address of a server.
#[derive(Clone)]
pub(super) struct Dialer {
    pub(super) server: Arc<Server>,
    pub(super) limit: Duration,
}

impl std::fmt::Debug for Dialer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.server.label())
    }
}

#[async_trait]
impl L4Connect for Dialer {
    async fn connect(&self, _address: &FrameworkAddress) -> pingora::Result<Stream> {
        dial(&self.server, None, self.limit).await.map(|(socket, _)| Stream::from(socket)).map_err(|error| {
            let kind = match error.kind() {
                io::ErrorKind::TimedOut => ErrorType::ConnectTimedout,
                io::ErrorKind::ConnectionRefused => ErrorType::ConnectRefused,
                _ => ErrorType::ConnectError,
            };
            Error::because(kind, "connecting", error)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, Ipv6Addr};
    use tokio::net::TcpListener;

    #[test]
    fn families_take_turns() {
        let parse = |all: &[&str]| all.iter().map(|text| text.parse().unwrap()).collect::<Vec<SocketAddr>>();
        let found = parse(&["[::1]:1", "[::2]:1", "[::1]:1", "1.1.1.1:1", "[::3]:1", "2.2.2.2:1"]);
        let expected = parse(&["[::1]:1", "1.1.1.1:1", "[::2]:1", "2.2.2.2:1", "[::3]:1"]);
        assert_eq!(in_order(found.into_iter()), expected);
        assert_eq!(in_order(std::iter::empty()), []);
    }

    #[tokio::test]
    async fn the_first_connection_wins_and_a_refused_one_costs_nothing() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let good = listener.local_addr().unwrap();
        let refusing = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).await.unwrap().local_addr().unwrap();
        let begun = std::time::Instant::now();
        assert_eq!(race([refusing, good].into_iter()).await.unwrap().1, good);
        assert!(begun.elapsed() < HEAD_START, "{:?}", begun.elapsed());
        let failed = race([refusing].into_iter()).await.unwrap_err();
        assert_eq!(failed.kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(race(std::iter::empty()).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    /// A listener whose queue is full does not answer SYNs.
    #[tokio::test]
    async fn a_silent_address_costs_its_head_start() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let good = listener.local_addr().unwrap();
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let full = socket.listen(0).unwrap();
        let silent = full.local_addr().unwrap();
        let mut queued = Vec::new();
        while let Ok(socket) = tokio::time::timeout(HEAD_START, TcpStream::connect(silent)).await {
            queued.push(socket.unwrap());
        }
        let begun = std::time::Instant::now();
        assert_eq!(race([silent, good].into_iter()).await.unwrap().1, good);
        assert!((HEAD_START..HEAD_START * 4).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    }
}
