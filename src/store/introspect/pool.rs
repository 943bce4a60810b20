//! Kept connections to one endpoint, and one exchange over one of them. Knows HTTP and no tokens.
//!
//! No task drives a connection: whoever asks polls it along with its own request, so a request that is given up takes
//! its half-used connection with it, and nothing outlives the pool. A connection is used on the runtime that it was
//! made on, as another one may not poll its socket, or be gone.

use super::endpoint::{Endpoint, Stream};
use crate::telemetry::metrics::StoreMetrics;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body as _, Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::HeaderMap;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::{Handle, Id};

/// Less than the 20 s after which Puma closes: a connection that is closed under a request costs a second attempt.
const IDLE: Duration = Duration::from_secs(15);
/// Longest body that is read.
pub(super) const BODY_BYTES: usize = 64 * 1024;
/// Head of an answer.
const HEAD_BYTES: usize = 32 * 1024;

pub(super) struct Pool {
    endpoint: Endpoint,
    http: http1::Builder,
    most: usize,
    kept: Mutex<Kept>,
    metrics: Arc<StoreMetrics>,
}

#[derive(Default)]
struct Kept {
    /// The one given back last is the last.
    idle: Vec<Idle>,
    in_use: usize,
}

struct Idle {
    connection: Connection,
    runtime: Id,
    since: Instant,
}

pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Body,
}

#[derive(Debug)]
pub(super) enum Body {
    Whole(Vec<u8>),
    TooLong,
    Cut,
    /// Nobody wanted it.
    Unread,
}

/// Why there is no answer, for people.
pub(super) type Trouble = String;

impl Pool {
    /// The caller sees to it that there are no more than `most` exchanges at once.
    pub(super) fn new(endpoint: Endpoint, most: usize, metrics: Arc<StoreMetrics>) -> Self {
        let mut http = http1::Builder::new();
        http.max_buf_size(HEAD_BYTES).max_headers(100);
        metrics.connections(0, 0, most);
        Self { endpoint, http, most, kept: Mutex::default(), metrics }
    }

    /// Sends a request, which must be one that may arrive twice: over a kept connection that turns out closed it is
    /// sent again over a new one. The body is read where the status makes it `wanted`. `patience` is for what is not worth
    /// the whole time that the caller has.
    pub(super) async fn exchange(
        &self,
        request: Request<Full<Bytes>>,
        patience: Duration,
        wanted: impl Fn(StatusCode) -> bool,
    ) -> Result<Answer, Trouble> {
        let runtime = Handle::try_current().map_err(|error| error.to_string())?.id();
        let mut lease = Lease { pool: self, runtime, connection: None, counted: false };
        if let Some(connection) = lease.reuse().await
            && let Ok(response) = connection.send(request.clone()).await
        {
            return Ok(lease.finish(response, patience, wanted).await);
        }
        lease.connection = None;
        let place = &self.endpoint.place;
        let stream =
            self.endpoint.connect(patience).await.map_err(|error| format!("connecting to {place}: {error}"))?;
        let failed = |error: hyper::Error| format!("{place} gave no answer in HTTP: {}", innermost(&error));
        let connection = lease.connection.insert(Connection::new(&self.http, stream).await.map_err(failed)?);
        let response = connection.send(request).await.map_err(failed)?;
        Ok(lease.finish(response, patience, wanted).await)
    }

    /// Closes what has been idle for too long.
    pub(super) fn sweep(&self) {
        let now = Instant::now();
        let mut kept = self.kept.lock();
        let old: Vec<_> = kept.idle.extract_if(.., |idle| now.duration_since(idle.since) >= IDLE).collect();
        self.show(&kept);
        drop(kept);
        drop(old);
    }

    fn show(&self, kept: &Kept) {
        self.metrics.connections(kept.idle.len() + kept.in_use, kept.in_use, self.most);
    }
}

/// A place for one connection. Given up, it takes its connection with it.
struct Lease<'p> {
    pool: &'p Pool,
    runtime: Id,
    connection: Option<Connection>,
    counted: bool,
}

impl Lease<'_> {
    /// Takes a kept connection that still lives; the others that are found dead are closed.
    async fn reuse(&mut self) -> Option<&mut Connection> {
        loop {
            let taken = self.take();
            let Some(mut connection) = taken else { break };
            if connection.is_usable().await {
                return Some(self.connection.insert(connection));
            }
        }
        None
    }

    /// Takes a kept connection of this runtime, and makes room for a new one when there is none.
    fn take(&mut self) -> Option<Connection> {
        let now = Instant::now();
        let mut kept = self.pool.kept.lock();
        if !self.counted {
            self.counted = true;
            kept.in_use += 1;
        }
        let of_ours = |idle: &Idle| idle.runtime == self.runtime && now.duration_since(idle.since) < IDLE;
        let found = kept.idle.iter().rposition(of_ours).map(|index| kept.idle.remove(index).connection);
        let mut closed = Vec::new();
        while !kept.idle.is_empty() && kept.idle.len() + kept.in_use > self.pool.most {
            closed.push(kept.idle.remove(0));
        }
        self.pool.show(&kept);
        drop(kept);
        found
    }

    /// Reads the rest of an answer and gives the connection back if nothing is in doubt.
    async fn finish(
        mut self,
        response: Response<Incoming>,
        patience: Duration,
        wanted: impl Fn(StatusCode) -> bool,
    ) -> Answer {
        let (head, body) = response.into_parts();
        let Some(connection) = &mut self.connection else {
            return Answer { status: head.status, headers: head.headers, body: Body::Cut };
        };
        let body = if wanted(head.status) {
            connection.read(body).await
        } else {
            // Only so that the connection can be kept.
            match tokio::time::timeout(patience, connection.read(body)).await {
                Ok(Body::Whole(_)) => Body::Whole(Vec::new()),
                _ => Body::Unread,
            }
        };
        if matches!(body, Body::Whole(_)) && connection.is_alive().await {
            self.give_back();
        }
        Answer { status: head.status, headers: head.headers, body }
    }

    fn give_back(&mut self) {
        if let Some(connection) = self.connection.take() {
            let mut kept = self.pool.kept.lock();
            kept.idle.push(Idle { connection, runtime: self.runtime, since: Instant::now() });
            kept.in_use -= 1;
            self.counted = false;
            self.pool.show(&kept);
        }
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        // Closed before its place is free.
        self.connection = None;
        if self.counted {
            let mut kept = self.pool.kept.lock();
            kept.in_use -= 1;
            self.pool.show(&kept);
        }
    }
}

type Driver = http1::Connection<TokioIo<Box<dyn Stream>>, Full<Bytes>>;

struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    /// `None`: closed.
    driver: Option<Driver>,
}

impl Connection {
    async fn new(http: &http1::Builder, stream: Box<dyn Stream>) -> Result<Self, hyper::Error> {
        let (sender, driver) = http.handshake(TokioIo::new(stream)).await?;
        Ok(Self { sender, driver: Some(driver) })
    }

    async fn send(&mut self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, hyper::Error> {
        let sender = &mut self.sender;
        drive(&mut self.driver, async {
            sender.ready().await?;
            sender.send_request(request).await
        })
        .await
    }

    async fn read(&mut self, mut body: Incoming) -> Body {
        if body.size_hint().lower() > BODY_BYTES as u64 {
            return Body::TooLong;
        }
        drive(&mut self.driver, async {
            let mut whole = Vec::new();
            while let Some(frame) = body.frame().await {
                let Ok(frame) = frame else { return Body::Cut };
                // Trailers say nothing that we ask for.
                let Some(data) = frame.data_ref() else { continue };
                if whole.len() + data.len() > BODY_BYTES {
                    return Body::TooLong;
                }
                whole.extend_from_slice(data);
            }
            Body::Whole(whole)
        })
        .await
    }

    /// Whether it can take a request as far as is known: not closed, and nothing came that nobody asked for.
    async fn is_alive(&mut self) -> bool {
        drive(&mut self.driver, std::future::ready(())).await;
        self.driver.is_some() && self.sender.is_ready()
    }

    /// The same, after a look at the socket. What lies there now could otherwise pass for the next request's answer; what
    /// comes later can't be told from it, which is in the nature of kept connections.
    async fn is_usable(&mut self) -> bool {
        // The runtime learns which sockets have something to read while its tasks are at rest.
        self.is_alive().await && {
            tokio::task::yield_now().await;
            self.is_alive().await
        }
    }
}

/// Does some work on a connection while keeping the connection itself going.
async fn drive<T>(driver: &mut Option<Driver>, work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    std::future::poll_fn(|cx| {
        if let Some(running) = driver
            && Pin::new(running).poll(cx).is_ready()
        {
            *driver = None;
        }
        let done = work.as_mut().poll(cx);
        // What the work asked for begins at once.
        if done.is_pending()
            && let Some(running) = driver
            && Pin::new(running).poll(cx).is_ready()
        {
            *driver = None;
            return work.as_mut().poll(cx);
        }
        done
    })
    .await
}

/// What went wrong in the end; the layers around it add nothing.
fn innermost(error: &hyper::Error) -> String {
    let mut innermost: &dyn std::error::Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}
