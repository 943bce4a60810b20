//! Pooled connections to one endpoint, and one exchange over a connection. Knows HTTP and no tokens.
//!
//! No task drives a connection: the request polls it, so a cancelled request drops its partially used connection, and
//! nothing outlives the pool. A connection is used on the runtime that opened it, because another one may not poll its
//! socket, or may have been shut down.

use super::super::StoreError;
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
use tokio::runtime::{Handle, Id, TryCurrentError};

/// Less than the 20 s after which Puma closes a connection: one that is closed during a request costs a second attempt.
const IDLE: Duration = Duration::from_secs(15);
/// Maximum length of a body.
pub(super) const BODY_BYTES: usize = 64 * 1024;
/// Maximum size of a response head.
const HEAD_BYTES: usize = 32 * 1024;

pub(super) struct HttpPool {
    endpoint: Endpoint,
    http: http1::Builder,
    most: usize,
    kept: Mutex<Kept>,
    metrics: Arc<StoreMetrics>,
}

#[derive(Default)]
struct Kept {
    /// The most recently returned one is the last.
    idle: Vec<Idle>,
    in_use: usize,
}

struct Idle {
    connection: HttpConnection,
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

impl HttpPool {
    /// The caller must ensure that there are at most `most` exchanges at once.
    pub(super) fn new(endpoint: Endpoint, most: usize, metrics: Arc<StoreMetrics>) -> Self {
        let mut http = http1::Builder::new();
        http.max_buf_size(HEAD_BYTES).max_headers(100);
        metrics.connections(0, 0, most);
        Self { endpoint, http, most, kept: Mutex::default(), metrics }
    }

    /// Sends a request, which must be idempotent: if a pooled connection turns out to be closed, it is sent again over
    /// a new one. The body is read if the status makes it `wanted`. `patience` limits steps that must not use up the
    /// caller's whole timeout.
    pub(super) async fn exchange(
        &self,
        request: Request<Full<Bytes>>,
        patience: Duration,
        wanted: impl Fn(StatusCode) -> bool,
    ) -> Result<Answer, StoreError> {
        let unavailable = |error: TryCurrentError| StoreError::Unavailable(error.to_string());
        let runtime = Handle::try_current().map_err(unavailable)?.id();
        let mut lease = HttpLease { pool: self, runtime, connection: None, counted: false };
        if let Some(connection) = lease.reuse().await
            && let Ok(response) = connection.send(request.clone()).await
        {
            return Ok(lease.finish(response, patience, wanted).await);
        }
        lease.connection = None;
        let place = &self.endpoint.place;
        let stream = self.endpoint.connect(patience).await;
        let stream = stream.map_err(|error| StoreError::Unavailable(format!("connecting to {place}: {error}")))?;
        let failed = |error: hyper::Error| {
            StoreError::Unavailable(format!("{place} gave no answer in HTTP: {}", innermost(&error)))
        };
        let connection = lease.connection.insert(HttpConnection::new(&self.http, stream).await.map_err(failed)?);
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

/// A slot for one connection. If it is dropped, its connection is closed.
struct HttpLease<'p> {
    pool: &'p HttpPool,
    runtime: Id,
    connection: Option<HttpConnection>,
    counted: bool,
}

impl HttpLease<'_> {
    /// Takes a pooled connection that is still open, and closes those that are not.
    async fn reuse(&mut self) -> Option<&mut HttpConnection> {
        loop {
            let taken = self.take();
            let Some(mut connection) = taken else { break };
            if connection.is_usable().await {
                return Some(self.connection.insert(connection));
            }
        }
        None
    }

    /// Takes a pooled connection of this runtime; if there is none, makes room for a new one.
    fn take(&mut self) -> Option<HttpConnection> {
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

    /// Reads the rest of a response, and returns the connection to the pool if its framing is unambiguous.
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
            // Only so that the connection can be reused.
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

impl Drop for HttpLease<'_> {
    fn drop(&mut self) {
        // Closed before its slot is released.
        self.connection = None;
        if self.counted {
            let mut kept = self.pool.kept.lock();
            kept.in_use -= 1;
            self.pool.show(&kept);
        }
    }
}

type HttpDriver = http1::Connection<TokioIo<Box<dyn Stream>>, Full<Bytes>>;

struct HttpConnection {
    sender: http1::SendRequest<Full<Bytes>>,
    /// `None`: closed.
    driver: Option<HttpDriver>,
}

impl HttpConnection {
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
                // Trailers are ignored.
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

    /// Whether it can be used, as far as known: not closed, and no unexpected bytes received.
    async fn is_alive(&mut self) -> bool {
        drive(&mut self.driver, std::future::ready(())).await;
        self.driver.is_some() && self.sender.is_ready()
    }

    /// The same, after checking the socket. Bytes that are there now could otherwise be taken as the response to the
    /// next request; bytes that arrive later cannot be distinguished from it, as with any reused connection.
    async fn is_usable(&mut self) -> bool {
        // The runtime polls sockets for readiness while its tasks yield.
        self.is_alive().await && {
            tokio::task::yield_now().await;
            self.is_alive().await
        }
    }
}

/// Runs a future on a connection while driving the connection.
async fn drive<T>(driver: &mut Option<HttpDriver>, work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    std::future::poll_fn(|cx| {
        if let Some(running) = driver
            && Pin::new(running).poll(cx).is_ready()
        {
            *driver = None;
        }
        let done = work.as_mut().poll(cx);
        // Requests made by the future are sent immediately.
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

/// The innermost error; the outer ones add nothing.
fn innermost(error: &hyper::Error) -> String {
    let mut innermost: &dyn std::error::Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}
