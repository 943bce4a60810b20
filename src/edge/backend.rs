//! Connections to backends over HTTP/1: made, kept by the worker that uses them, and looked at before they are used again.
//! It must not know what is asked over them.

use super::dial::dial;
use super::http2_backend::{self, StreamFate};
use super::peers::Peers;
use super::secure::BackendTls;
use super::socket::{Socket, give_back};
use crate::telemetry::metrics::UpstreamError;
use crate::upstream::{Server, ServerAddress};
use bytes::BytesMut;
use foldhash::fast::RandomState;
use std::cell::RefCell;
use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead as _, AsyncWriteExt as _, ReadBuf};
use tokio::net::UnixStream;
use tokio::time::timeout_at;

/// Unused connections of one worker to one server.
const MAX_KEPT: usize = 1_024;
/// How often connections are looked for that have been unused for too long or were closed by their backend.
const SWEPT_EVERY: Duration = Duration::from_secs(1);

/// A connection to a backend.
pub(super) struct BackendConnection {
    pub(super) socket: Socket,
    /// Read and not yet taken.
    pub(super) buffer: BytesMut,
    /// Which of the server's addresses it goes to. `None`: a Unix socket.
    address: Option<SocketAddr>,
    /// What it was made with. `None`: plain text.
    tls: Option<Arc<BackendTls>>,
}

struct KeptConnection {
    connection: BackendConnection,
    until: Instant,
}

thread_local! {
    static KEPT: RefCell<Pool> = RefCell::new(Pool::default());
}

#[derive(Default)]
struct Pool {
    /// By the number of the server, which no client chooses.
    servers: HashMap<u64, Vec<KeptConnection>, RandomState>,
    swept: bool,
}

impl BackendConnection {
    /// The connection that was used last of those that this worker keeps, that is still good, and that was made with the trust
    /// that is asked for now.
    pub(super) fn kept(server: &Server, peers: &Peers, now: Instant) -> Option<Self> {
        if peers.http2 {
            return http2_backend::shared(server, peers, None).map(Self::stream);
        }
        KEPT.with_borrow_mut(|pool| {
            let kept = pool.servers.get_mut(&server.number())?;
            while let Some(KeptConnection { mut connection, until }) = kept.pop() {
                // The server's name may have other addresses by now.
                let is_there = connection.address.is_none_or(|address| server.listens_at(address));
                if until > now && is_there && connection.is_trusted_by(peers) && connection.is_silent() {
                    return Some(connection);
                }
            }
            None
        })
    }

    fn is_trusted_by(&self, peers: &Peers) -> bool {
        BackendTls::is_same(self.tls.as_ref(), peers.tls.as_ref())
    }

    /// One that was made now, or, over HTTP/2, has just been made for another request: `true` says that. `fresh`: it has to be
    /// a new one. `greeting`: what goes before everything else.
    pub(super) async fn connect(
        server: &Server,
        peers: &Peers,
        fresh: bool,
        greeting: &[u8],
        time: Duration,
    ) -> Result<(Self, bool), UpstreamError> {
        if peers.http2 {
            // Large, and not for every request.
            let connected = Box::pin(http2_backend::connect(server, peers, fresh, greeting, time));
            return connected.await.map(|(socket, reused)| (Self::stream(socket), reused));
        }
        let (socket, address) = transport(server, peers, None, greeting, time).await?;
        Ok((Self { socket, buffer: BytesMut::new(), address, tls: peers.tls.clone() }, false))
    }

    /// A stream of a connection, which is kept elsewhere.
    fn stream(socket: Socket) -> Self {
        Self { socket, buffer: BytesMut::new(), address: None, tls: None }
    }

    /// What else is known of a failure on it.
    pub(super) fn fate(&self) -> StreamFate {
        match &self.socket {
            Socket::BackendHttp2(stream) => stream.fate(),
            // Each connection has one request only.
            _ => StreamFate { lost_connection: true, ..StreamFate::default() },
        }
    }

    /// Nothing came on it for too long: nobody else is to wait in the same way.
    pub(super) fn is_silent_for_too_long(&self) {
        if let Socket::BackendHttp2(stream) = &self.socket {
            stream.retire_connection();
        }
    }

    /// Gives the connection back to this worker, for as long as it may stay unused.
    pub(super) fn keep(mut self, server: &Server, idle: Duration, now: Instant) {
        if let Socket::BackendHttp2(_) = self.socket {
            return;
        }
        give_back(&mut self.buffer);
        let kept = KeptConnection { connection: self, until: now + idle };
        KEPT.with_borrow_mut(|pool| {
            match pool.servers.get_mut(&server.number()) {
                Some(all) if all.len() < MAX_KEPT => all.push(kept),
                Some(_) => {}
                None => drop(pool.servers.insert(server.number(), vec![kept])),
            }
            if !pool.swept {
                pool.swept = true;
                tokio::spawn(sweep());
            }
        });
    }

    /// Whether the backend has neither closed the connection nor sent what nobody asked for. Asks what the event loop knows
    /// already.
    fn is_silent(&mut self) -> bool {
        let mut byte = [0];
        let mut read = ReadBuf::new(&mut byte);
        let look = Pin::new(&mut self.socket).poll_read(&mut Context::from_waker(Waker::noop()), &mut read);
        matches!(look, Poll::Pending)
    }
}

/// A connection of its own for a check. `port`: to another one than the server's.
pub(super) async fn connect_alone(
    server: &Server,
    peers: &Peers,
    port: Option<u16>,
    greeting: &[u8],
    time: Duration,
) -> Result<Socket, UpstreamError> {
    match peers.http2 {
        true => http2_backend::connect_alone(server, peers, port, greeting, time).await,
        false => transport(server, peers, port, greeting, time).await.map(|(socket, _)| socket),
    }
}

/// What HTTP is spoken over: TLS included, where that is asked for. All of it together takes no longer than `time`.
pub(super) async fn transport(
    server: &Server,
    peers: &Peers,
    port: Option<u16>,
    greeting: &[u8],
    time: Duration,
) -> Result<(Socket, Option<SocketAddr>), UpstreamError> {
    let end = tokio::time::Instant::now() + time;
    let connected = match server.address() {
        ServerAddress::Tcp(_) => dial(server, port, time).await.map(|(socket, address)| {
            // If it fails, the connection has ended already.
            let _ = socket.set_nodelay(true);
            (Socket::Tcp(socket), Some(address))
        }),
        ServerAddress::Unix(path) => match timeout_at(end, UnixStream::connect(path)).await {
            Ok(connected) => connected.map(|socket| (Socket::Unix(socket), None)),
            Err(_) => Err(ErrorKind::TimedOut.into()),
        },
    };
    let (socket, address) = connected.map_err(|error| match error.kind() {
        ErrorKind::TimedOut => UpstreamError::ConnectTimeout,
        _ => UpstreamError::Connect,
    })?;
    if greeting.is_empty() && peers.tls.is_none() {
        return Ok((socket, address));
    }
    // Rare and large: it must not make every request larger.
    let begun = Box::pin(timeout_at(end, begin(socket, server, peers, greeting)));
    Ok((begun.await.unwrap_or(Err(UpstreamError::ConnectTimeout))?, address))
}

/// What goes over a new connection before the first request.
async fn begin(mut socket: Socket, server: &Server, peers: &Peers, greeting: &[u8]) -> Result<Socket, UpstreamError> {
    socket.write_all(greeting).await.map_err(|_| UpstreamError::Connect)?;
    match (&peers.tls, socket) {
        (None, socket) => Ok(socket),
        (Some(tls), Socket::Tcp(socket)) => tls.handshake(server, socket).await,
        // The configuration refuses TLS over a Unix socket; nothing goes out in plain text instead.
        (Some(_), _) => Err(UpstreamError::TlsHandshake),
    }
}

/// Closes kept connections of this worker in time, also when there are no requests.
async fn sweep() {
    loop {
        tokio::time::sleep(SWEPT_EVERY).await;
        let now = Instant::now();
        KEPT.with_borrow_mut(|pool| {
            pool.servers.retain(|_, all| {
                all.retain_mut(|kept| kept.until > now && kept.connection.is_silent());
                !all.is_empty()
            });
        });
    }
}
