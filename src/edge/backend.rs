//! Connections to backends over HTTP/1: made, kept by the worker that uses them, and looked at before they are used again.
//! It must not know what is asked over them.

use super::socket::Socket;
use crate::telemetry::metrics::UpstreamError;
use crate::upstream::ResolvedAddress;
use bytes::BytesMut;
use std::cell::RefCell;
use std::collections::HashMap;
use std::io::ErrorKind;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead as _, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// KeptConnection connections of one worker to one server.
const MAX_KEPT: usize = 1_024;
/// How often connections are looked for that have been unused for too long or were closed by their backend.
const SWEPT_EVERY: Duration = Duration::from_secs(1);

/// A connection to a backend.
pub(super) struct BackendConnection {
    pub(super) socket: Socket,
    /// Read and not yet taken.
    pub(super) buffer: BytesMut,
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
    servers: HashMap<ResolvedAddress, Vec<KeptConnection>>,
    swept: bool,
}

impl BackendConnection {
    /// The connection that was used last of those that this worker keeps and that is still good.
    pub(super) fn kept(address: &ResolvedAddress, now: Instant) -> Option<Self> {
        KEPT.with_borrow_mut(|pool| {
            let kept = pool.servers.get_mut(address)?;
            while let Some(KeptConnection { mut connection, until }) = kept.pop() {
                if until > now && connection.is_silent() {
                    return Some(connection);
                }
            }
            None
        })
    }

    pub(super) async fn connect(address: &ResolvedAddress, time: Duration) -> Result<Self, UpstreamError> {
        let connect = async {
            Ok(match address {
                ResolvedAddress::Tcp(address) => {
                    let socket = TcpStream::connect(address).await?;
                    // If it fails, the connection has ended already.
                    let _ = socket.set_nodelay(true);
                    Socket::Tcp(socket)
                }
                ResolvedAddress::Unix(path) => Socket::Unix(UnixStream::connect(path).await?),
            })
        };
        match tokio::time::timeout(time, connect).await {
            Ok(Ok(socket)) => Ok(Self { socket, buffer: BytesMut::new() }),
            Ok(Err(error)) => {
                let error: std::io::Error = error;
                let timed_out = error.kind() == ErrorKind::TimedOut;
                Err(if timed_out { UpstreamError::ConnectTimeout } else { UpstreamError::Connect })
            }
            Err(_) => Err(UpstreamError::ConnectTimeout),
        }
    }

    /// Gives the connection back to this worker, for as long as it may stay unused.
    pub(super) fn keep(mut self, address: &ResolvedAddress, idle: Duration, now: Instant) {
        // An idle connection holds no buffer.
        self.buffer = BytesMut::new();
        let kept = KeptConnection { connection: self, until: now + idle };
        KEPT.with_borrow_mut(|pool| {
            match pool.servers.get_mut(address) {
                Some(all) if all.len() < MAX_KEPT => all.push(kept),
                Some(_) => {}
                None => drop(pool.servers.insert(address.clone(), vec![kept])),
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
