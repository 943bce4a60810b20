//! Connections to backends over HTTP/1: made, kept by the worker that uses them, and looked at before they are used again.
//! It must not know what is asked over them.

use super::dial::dial;
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
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead as _, ReadBuf};
use tokio::net::UnixStream;

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
    /// The connection that was used last of those that this worker keeps and that is still good.
    pub(super) fn kept(server: &Server, now: Instant) -> Option<Self> {
        KEPT.with_borrow_mut(|pool| {
            let kept = pool.servers.get_mut(&server.number())?;
            while let Some(KeptConnection { mut connection, until }) = kept.pop() {
                // The server's name may have other addresses by now.
                let is_there = connection.address.is_none_or(|address| server.listens_at(address));
                if until > now && is_there && connection.is_silent() {
                    return Some(connection);
                }
            }
            None
        })
    }

    pub(super) async fn connect(server: &Server, time: Duration) -> Result<Self, UpstreamError> {
        let connected = match server.address() {
            ServerAddress::Tcp(_) => dial(server, None, time).await.map(|(socket, address)| {
                // If it fails, the connection has ended already.
                let _ = socket.set_nodelay(true);
                (Socket::Tcp(socket), Some(address))
            }),
            ServerAddress::Unix(path) => match tokio::time::timeout(time, UnixStream::connect(path)).await {
                Ok(connected) => connected.map(|socket| (Socket::Unix(socket), None)),
                Err(_) => Err(ErrorKind::TimedOut.into()),
            },
        };
        let (socket, address) = connected.map_err(|error| match error.kind() {
            ErrorKind::TimedOut => UpstreamError::ConnectTimeout,
            _ => UpstreamError::Connect,
        })?;
        Ok(Self { socket, buffer: BytesMut::new(), address })
    }

    /// Gives the connection back to this worker, for as long as it may stay unused.
    pub(super) fn keep(mut self, server: &Server, idle: Duration, now: Instant) {
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
