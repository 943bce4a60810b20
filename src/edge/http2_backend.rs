//! HTTP/2 to backends: connections that the requests of one worker share, and each request as a stream that its lane uses like a
//! connection over HTTP/1. What is asked was written by `forward` and is translated word for word or not at all; a response
//! becomes the bytes that it would have been over HTTP/1, and is judged as those are.

use super::backend::transport;
use super::peers::Peers;
use super::secure::{self, BackendTls};
use super::socket::Socket;
use crate::reply::head::end_of_head;
use crate::request::chunked::ChunkedBody;
use crate::telemetry::metrics::UpstreamError;
use crate::upstream::Server;
use bytes::{Bytes, BytesMut};
use foldhash::fast::RandomState;
use h2::client::{Connection, ResponseFuture, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use http::header::{self, HeaderName, HeaderValue};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, Method, Request, Response, Uri};
use parking_lot::Mutex;
use std::cell::RefCell;
use std::collections::HashMap;
use std::future::{Future as _, poll_fn};
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};
use tokio::time::timeout_at;

/// Requests that share one connection, if the backend lets so many; further ones get another connection.
const MOST_STREAMS: usize = 100;
/// What a backend may send of one response before it is taken: so much of it waits here for a slow client.
const STREAM_WINDOW: u32 = 64 * 1024;
/// The same for all responses of a connection: one that is not taken must not stop the others.
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * 100;
/// Fields of a response; `reply` has a limit for the head that is made of them.
const MOST_FIELD_BYTES: u32 = 64 * 1024;
/// How often connections are looked for that have been unused for too long, or have ended.
const SWEPT_EVERY: Duration = Duration::from_secs(1);

/// A connection of one worker.
struct SharedConnection {
    send: SendRequest<Bytes>,
    scheme: Scheme,
    /// What it was made with. `None`: plain text.
    tls: Option<Arc<BackendTls>>,
    address: Option<SocketAddr>,
    made: Instant,
    idle: Duration,
    state: Arc<ConnectionState>,
}

struct ConnectionState {
    streams: AtomicUsize,
    /// It gets no further streams.
    retired: AtomicBool,
    unused_since: Mutex<Instant>,
}

#[derive(Default)]
struct ServerLinks {
    links: Vec<SharedConnection>,
    /// Held by the one who makes a connection; the others wait for it.
    making: Arc<tokio::sync::Mutex<()>>,
}

thread_local! {
    /// By the number of the server.
    static LINKS: RefCell<HashMap<u64, ServerLinks, RandomState>> = RefCell::default();
    static SWEPT: RefCell<bool> = const { RefCell::new(false) };
}

/// A stream on a connection that this worker has, if there is room on one that was made with the trust that is asked for now.
/// `since`: it was not made before.
pub(super) fn shared(server: &Server, peers: &Peers, since: Option<Instant>) -> Option<Socket> {
    LINKS.with_borrow_mut(|all| {
        let links = &mut all.get_mut(&server.number())?.links;
        links.retain_mut(SharedConnection::goes_on);
        let is_there = |link: &&SharedConnection| link.address.is_none_or(|address| server.listens_at(address));
        let is_new = |link: &&SharedConnection| since.is_none_or(|since| link.made >= since);
        let mut fitting = links.iter().filter(is_there).filter(is_new);
        fitting.find(|link| link.is_trusted_by(peers) && link.has_room()).map(SharedConnection::stream)
    })
}

/// A stream on a connection that may be new. `fresh`: that is new, as those which are there may be dead. Says whether it was
/// made for another request.
pub(super) async fn connect(
    server: &Server,
    peers: &Peers,
    fresh: bool,
    greeting: &[u8],
    time: Duration,
) -> Result<(Socket, bool), UpstreamError> {
    let now = Instant::now();
    let end = tokio::time::Instant::from_std(now + time);
    if !greeting.is_empty() {
        // It says which client it is for, and carries no other one's request.
        return Ok((SharedConnection::make(server, peers, None, greeting, end).await?.stream(), false));
    }
    let making = LINKS.with_borrow_mut(|all| Arc::clone(&all.entry(server.number()).or_default().making));
    let _making = timeout_at(end, making.lock()).await.map_err(|_| UpstreamError::ConnectTimeout)?;
    // Somebody else may have made one meanwhile: many may wait after one connection with all of them was lost.
    if let Some(socket) = shared(server, peers, fresh.then_some(now)) {
        return Ok((socket, true));
    }
    let link = SharedConnection::make(server, peers, None, b"", end).await?;
    let socket = link.stream();
    LINKS.with_borrow_mut(|all| all.entry(server.number()).or_default().links.push(link));
    if !SWEPT.replace(true) {
        tokio::spawn(sweep());
    }
    Ok((socket, false))
}

/// A stream on a connection of its own, for a check.
pub(super) async fn connect_alone(
    server: &Server,
    peers: &Peers,
    port: Option<u16>,
    greeting: &[u8],
    time: Duration,
) -> Result<Socket, UpstreamError> {
    let end = tokio::time::Instant::now() + time;
    Ok(SharedConnection::make(server, peers, port, greeting, end).await?.stream())
}

async fn sweep() {
    loop {
        tokio::time::sleep(SWEPT_EVERY).await;
        let now = Instant::now();
        LINKS.with_borrow_mut(|all| {
            all.retain(|_, server| {
                server.links.retain_mut(|link| link.goes_on() && !link.is_unused(now));
                !server.links.is_empty() || Arc::strong_count(&server.making) > 1
            });
        });
    }
}

impl SharedConnection {
    async fn make(
        server: &Server,
        peers: &Peers,
        port: Option<u16>,
        greeting: &[u8],
        end: tokio::time::Instant,
    ) -> Result<Self, UpstreamError> {
        let left = end.saturating_duration_since(tokio::time::Instant::now());
        let (socket, address) = transport(server, peers, port, greeting, left).await?;
        let send = timeout_at(end, Box::pin(begin(socket))).await.unwrap_or(Err(UpstreamError::ConnectTimeout))?;
        let state = ConnectionState {
            streams: AtomicUsize::new(0),
            retired: AtomicBool::new(false),
            unused_since: Mutex::new(Instant::now()),
        };
        Ok(Self {
            send,
            scheme: if peers.tls.is_some() { Scheme::HTTPS } else { Scheme::HTTP },
            tls: peers.tls.clone(),
            address,
            made: Instant::now(),
            idle: peers.timeouts.idle,
            state: Arc::new(state),
        })
    }

    fn is_trusted_by(&self, peers: &Peers) -> bool {
        BackendTls::is_same(self.tls.as_ref(), peers.tls.as_ref())
    }

    /// Whether new streams can be opened: the backend has neither ended the connection nor said that it will.
    fn goes_on(&mut self) -> bool {
        let mut is_ended =
            || matches!(self.send.poll_ready(&mut Context::from_waker(Waker::noop())), Poll::Ready(Err(_)));
        !self.state.retired.load(Relaxed) && !is_ended()
    }

    fn has_room(&self) -> bool {
        self.state.streams.load(Relaxed) < self.send.current_max_send_streams().min(MOST_STREAMS)
    }

    fn is_unused(&self, now: Instant) -> bool {
        let unused = now.saturating_duration_since(*self.state.unused_since.lock());
        self.state.streams.load(Relaxed) == 0 && unused > self.idle
    }

    fn stream(&self) -> Socket {
        self.state.streams.fetch_add(1, Relaxed);
        Socket::BackendHttp2(Box::new(BackendStream {
            state: Mutex::new(StreamState {
                send: Some(self.send.clone()),
                scheme: self.scheme.clone(),
                head: Vec::new(),
                upload: None,
                sending: Sending::Head,
                receiving: Receiving::NotAsked(None),
                unread: BytesMut::new(),
                fate: StreamFate::default(),
            }),
            link: Arc::clone(&self.state),
        }))
    }
}

/// Says hello and waits for the backend's settings, without which it may be no HTTP/2 at all.
async fn begin(socket: Socket) -> Result<SendRequest<Bytes>, UpstreamError> {
    let handshake = h2::client::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(MOST_FIELD_BYTES)
        // Unknown until it says so.
        .initial_max_send_streams(0)
        .enable_push(false)
        .handshake::<_, Bytes>(socket);
    let fault = |error: h2::Error| match error.get_io() {
        Some(error) if secure::is_alert(error) => UpstreamError::TlsHandshake,
        _ => UpstreamError::NoHttp2,
    };
    let (send, mut connection): (_, Connection<Socket, Bytes>) = handshake.await.map_err(fault)?;
    poll_fn(|cx| match Pin::new(&mut connection).poll(cx) {
        Poll::Ready(Err(error)) => Poll::Ready(Err(fault(error))),
        Poll::Ready(Ok(())) => Poll::Ready(Err(UpstreamError::NoHttp2)),
        Poll::Pending if connection.max_concurrent_send_streams() > 0 => Poll::Ready(Ok(())),
        Poll::Pending => Poll::Pending,
    })
    .await?;
    // Ends with the last one who can open streams, and with the last stream. How it ends is told to each stream.
    tokio::spawn(async move { drop(connection.await) });
    Ok(send)
}

/// A request and its response, which read and write like those of HTTP/1.
pub(super) struct BackendStream {
    /// One task uses both directions, so nobody waits for the lock.
    state: Mutex<StreamState>,
    link: Arc<ConnectionState>,
}

impl std::fmt::Debug for BackendStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HTTP/2 stream")
    }
}

impl Drop for BackendStream {
    fn drop(&mut self) {
        if self.link.streams.fetch_sub(1, Relaxed) == 1 {
            *self.link.unused_since.lock() = Instant::now();
        }
    }
}

struct StreamState {
    /// Until the request is sent.
    send: Option<SendRequest<Bytes>>,
    scheme: Scheme,
    /// The request's head, as far as it has come.
    head: Vec<u8>,
    /// Where its body goes.
    upload: Option<SendStream<Bytes>>,
    sending: Sending,
    receiving: Receiving,
    /// Of the response, for those who read less than there is.
    unread: BytesMut,
    fate: StreamFate,
}

/// What a failure says beyond that there was one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct StreamFate {
    /// The connection failed, not the request.
    pub(super) lost_connection: bool,
    /// The backend has said that it did nothing about the request.
    pub(super) unprocessed: bool,
    /// The request cannot be said in HTTP/2.
    pub(super) unspeakable: bool,
    /// The response breaks the rules of HTTP/2.
    pub(super) malformed: bool,
}

enum Sending {
    Head,
    /// So much of the body is left.
    Length(u64),
    Chunked(ChunkedBody),
    Done,
}

enum Receiving {
    NotAsked(Option<Waker>),
    Waiting { response: ResponseFuture, to_head: bool },
    Body { body: RecvStream, chunked: bool },
    Ended,
    Failed,
}

impl BackendStream {
    pub(super) fn fate(&self) -> StreamFate {
        self.state.lock().fate
    }

    /// The connection gets no further streams. Those that it has go on.
    pub(super) fn retire_connection(&self) {
        self.link.retired.store(true, Relaxed);
    }

    /// Takes bytes of a request as over HTTP/1.
    pub(super) fn poll_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut state = self.state.lock();
        let written = ready!(state.poll_write(cx, bytes));
        if written.is_err() {
            self.failed(&mut state);
        }
        Poll::Ready(written)
    }

    /// Adds bytes of the response as over HTTP/1. 0: it has ended.
    pub(super) fn poll_fill(&self, cx: &mut Context<'_>, buffer: &mut BytesMut) -> Poll<io::Result<usize>> {
        let mut state = self.state.lock();
        let read = ready!(state.poll_fill(cx, buffer));
        if read.is_err() {
            self.failed(&mut state);
        }
        Poll::Ready(read)
    }

    /// The same for those who have room for less.
    pub(super) fn poll_read(&self, cx: &mut Context<'_>, out: &mut tokio::io::ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut unread = std::mem::take(&mut self.state.lock().unread);
        let read = if unread.is_empty() { self.poll_fill(cx, &mut unread) } else { Poll::Ready(Ok(0)) };
        let length = unread.len().min(out.remaining());
        out.put_slice(&unread.split_to(length));
        self.state.lock().unread = unread;
        ready!(read)?;
        Poll::Ready(Ok(()))
    }

    fn failed(&self, state: &mut StreamState) {
        if state.fate.lost_connection {
            self.retire_connection();
        }
    }
}

impl StreamState {
    fn fail(&mut self, error: h2::Error) -> io::Error {
        let is_refused = error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM);
        self.fate.lost_connection = !error.is_reset() || is_refused;
        self.fate.malformed = error.is_reset() && error.is_library();
        // Told for those only that are beyond the last one which the backend looks at.
        self.fate.unprocessed = error.is_remote() && (is_refused || error.is_go_away());
        io::Error::other(error)
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.sending {
            _ if bytes.is_empty() => Poll::Ready(Ok(0)),
            Sending::Head => {
                let before = self.head.len();
                self.head.extend_from_slice(bytes);
                let Some(end) = end_of_head(&self.head, before.saturating_sub(3)) else {
                    return Poll::Ready(Ok(bytes.len()));
                };
                self.head.truncate(end);
                Poll::Ready(self.ask().map(|()| end - before))
            }
            Sending::Length(left) => {
                let most = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                let sent = ready!(self.poll_send(cx, &bytes[..most], most as u64 == left))?;
                let left = left - sent as u64;
                self.sending = if left == 0 { Sending::Done } else { Sending::Length(left) };
                Poll::Ready(Ok(sent))
            }
            Sending::Chunked(walk) => {
                let malformed = |_| io::Error::from(ErrorKind::InvalidData);
                let mut ahead = walk;
                let run = ahead.next_data(bytes).map_err(malformed)?;
                if ahead.is_done() {
                    self.end_upload()?;
                    return Poll::Ready(Ok(run.end_of_run));
                }
                let mut taken = run.end_of_run;
                if run.start < run.end_of_run {
                    taken = run.start + ready!(self.poll_send(cx, &bytes[run.start..run.end_of_run], false))?;
                }
                let mut walk = walk;
                walk.advance(&bytes[..taken]).map_err(malformed)?;
                self.sending = Sending::Chunked(walk);
                Poll::Ready(Ok(taken))
            }
            Sending::Done => Poll::Ready(Err(ErrorKind::BrokenPipe.into())),
        }
    }

    /// Sends as much of the data as the backend takes now.
    fn poll_send(&mut self, cx: &mut Context<'_>, data: &[u8], last: bool) -> Poll<io::Result<usize>> {
        let Some(upload) = &mut self.upload else { return Poll::Ready(Err(ErrorKind::BrokenPipe.into())) };
        upload.reserve_capacity(data.len());
        while upload.capacity() == 0 {
            match ready!(upload.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(self.fail(error))),
                // It takes nothing more. Why not is told with the response, or in place of it.
                None => return Poll::Ready(Err(ErrorKind::BrokenPipe.into())),
            }
        }
        let length = data.len().min(upload.capacity());
        let sent = upload.send_data(Bytes::copy_from_slice(&data[..length]), last && length == data.len());
        Poll::Ready(sent.map(|()| length).map_err(|error| self.fail(error)))
    }

    fn end_upload(&mut self) -> io::Result<()> {
        self.sending = Sending::Done;
        let ended = self.upload.as_mut().map_or(Ok(()), |upload| upload.send_data(Bytes::new(), true));
        ended.map_err(|error| self.fail(error))
    }

    /// Sends the request whose head has come.
    fn ask(&mut self) -> io::Result<()> {
        let asked = Asking::read(&self.head, self.scheme.clone());
        let (Some(Asking { request, sending }), Some(mut send)) = (asked, self.send.take()) else {
            self.fate.unspeakable = true;
            self.begin_receiving(Receiving::Failed);
            return Err(ErrorKind::InvalidInput.into());
        };
        let to_head = request.method() == Method::HEAD;
        match send.send_request(request, matches!(sending, Sending::Done)) {
            Ok((response, upload)) => {
                (self.upload, self.sending) = (Some(upload), sending);
                self.head = Vec::new();
                self.begin_receiving(Receiving::Waiting { response, to_head });
                Ok(())
            }
            Err(error) => {
                self.begin_receiving(Receiving::Failed);
                let error = self.fail(error);
                // Whatever the reason, it was not sent.
                self.fate.unprocessed = true;
                Err(error)
            }
        }
    }

    fn begin_receiving(&mut self, receiving: Receiving) {
        if let Receiving::NotAsked(Some(waker)) = std::mem::replace(&mut self.receiving, receiving) {
            waker.wake();
        }
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>, buffer: &mut BytesMut) -> Poll<io::Result<usize>> {
        let before = buffer.len();
        loop {
            match &mut self.receiving {
                Receiving::NotAsked(waker) => {
                    *waker = Some(cx.waker().clone());
                    return Poll::Pending;
                }
                Receiving::Waiting { response, to_head } => {
                    let to_head = *to_head;
                    if let Poll::Ready(Some(interim)) = response.poll_informational(cx) {
                        let interim = interim.map_err(|error| self.fail(error))?;
                        write_head(&interim, None, buffer);
                        break;
                    }
                    let answered = ready!(Pin::new(response).poll(cx)).map_err(|error| self.fail(error))?;
                    let (parts, body) = answered.into_parts();
                    let has_length = parts.headers.contains_key(header::CONTENT_LENGTH);
                    // What ends where over HTTP/1, as far as the backend has not said so.
                    let framing = match body.is_end_stream() {
                        _ if to_head || has_length || matches!(parts.status.as_u16(), 204 | 304) => None,
                        true => Some((header::CONTENT_LENGTH, "0")),
                        false => Some((header::TRANSFER_ENCODING, "chunked")),
                    };
                    let chunked = matches!(&framing, Some((name, _)) if *name == header::TRANSFER_ENCODING);
                    write_head(&Response::from_parts(parts, ()), framing, buffer);
                    self.receiving = if to_head { Receiving::Ended } else { Receiving::Body { body, chunked } };
                    break;
                }
                Receiving::Body { body, chunked } => {
                    let chunked = *chunked;
                    match ready!(body.poll_data(cx)) {
                        Some(Ok(data)) if data.is_empty() => continue,
                        Some(Ok(data)) => {
                            // It lies in this buffer now, which takes no more until it is empty.
                            body.flow_control().release_capacity(data.len()).map_err(io::Error::other)?;
                            if chunked {
                                buffer.extend_from_slice(format!("{:x}\r\n", data.len()).as_bytes());
                            }
                            buffer.extend_from_slice(&data);
                            if chunked {
                                buffer.extend_from_slice(b"\r\n");
                            }
                            break;
                        }
                        Some(Err(error)) => return Poll::Ready(Err(self.fail(error))),
                        None => {
                            // Trailers end here.
                            ready!(body.poll_trailers(cx)).map_err(|error| self.fail(error))?;
                            self.receiving = Receiving::Ended;
                            if chunked {
                                buffer.extend_from_slice(b"0\r\n\r\n");
                            }
                            break;
                        }
                    }
                }
                Receiving::Ended => break,
                Receiving::Failed => return Poll::Ready(Err(ErrorKind::BrokenPipe.into())),
            }
        }
        Poll::Ready(Ok(buffer.len() - before))
    }
}

/// Writes the head of a response as over HTTP/1. Neither names nor values can hold what would end a line.
fn write_head(response: &Response<()>, framing: Option<(HeaderName, &str)>, out: &mut BytesMut) {
    out.extend_from_slice(b"HTTP/1.1 ");
    out.extend_from_slice(response.status().as_str().as_bytes());
    out.extend_from_slice(b" \r\n");
    let all = response.headers().iter().map(|(name, value)| (name, value.as_bytes()));
    let own = framing.as_ref().map(|(name, value)| (name, value.as_bytes()));
    for (name, value) in all.chain(own) {
        out.extend_from_slice(name.as_str().as_bytes());
        out.extend_from_slice(b": ");
        out.extend_from_slice(value);
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b"\r\n");
}

/// A request as HTTP/2 says it.
struct Asking {
    request: Request<()>,
    sending: Sending,
}

impl Asking {
    /// From a head that `forward` has written. `None`: not every byte of it can be said.
    fn read(head: &[u8], scheme: Scheme) -> Option<Self> {
        let mut lines = head.strip_suffix(b"\r\n\r\n")?.split(|byte| *byte == b'\n').map(|line| line.trim_ascii_end());
        let line = lines.next()?.strip_suffix(b" HTTP/1.1")?;
        let (method, target) = line.split_at(memchr::memchr(b' ', line)?);
        let target = &target[1..];
        let path = PathAndQuery::try_from(target).ok().filter(|path| path.as_str().as_bytes() == target)?;
        let (mut fields, mut authority, mut sending) = (HeaderMap::new(), None, Sending::Done);
        for line in lines {
            let (name, value) = line.split_at(memchr::memchr(b':', line)?);
            let value = value[1..].trim_ascii_start();
            match HeaderName::from_bytes(name).ok()? {
                header::HOST => {
                    authority = Authority::try_from(value).ok().filter(|host| host.as_str().as_bytes() == value)
                }
                // It is about a connection, and HTTP/2 says it in another way. An upgrade is not asked for.
                header::TRANSFER_ENCODING => sending = Sending::Chunked(ChunkedBody::default()),
                header::CONNECTION | header::UPGRADE => {}
                name => {
                    if name == header::CONTENT_LENGTH {
                        let length = std::str::from_utf8(value).ok()?.parse().ok()?;
                        sending = if length == 0 { Sending::Done } else { Sending::Length(length) };
                    }
                    fields.try_append(name, HeaderValue::from_bytes(value).ok()?).ok()?;
                }
            }
        }
        let uri = Uri::builder().scheme(scheme).authority(authority?).path_and_query(path).build().ok()?;
        let mut request = Request::builder().method(method).uri(uri).body(()).ok()?;
        *request.headers_mut() = fields;
        Some(Self { request, sending })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::head;

    /// Every byte that a target or a host may have, as `request` lets it pass.
    #[test]
    fn what_is_permitted_can_be_said_in_http2() {
        let mut said = 0;
        let mut try_one = |target: &[u8], host: &str| {
            let mut bytes = b"GET ".to_vec();
            bytes.extend_from_slice(target);
            bytes.extend_from_slice(format!(" HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes());
            let permitted = head::parse(&bytes).is_ok() && crate::request::target::check(target).is_ok();
            if permitted {
                let asking = Asking::read(&bytes, Scheme::HTTPS);
                let asking = asking.unwrap_or_else(|| panic!("{:?} {host}", String::from_utf8_lossy(target)));
                let uri = asking.request.uri();
                assert_eq!(uri.path_and_query().unwrap().as_str().as_bytes(), target);
                assert_eq!(uri.authority().unwrap().as_str(), host);
                said += 1;
            }
        };
        for byte in 0..=255_u8 {
            try_one(&[b"/a", &[byte][..], b"b"].concat(), "h.test");
            try_one(&[b"/a?x=", &[byte][..], b"b"].concat(), "h.test");
            try_one(&[b"/", &[byte][..]].concat(), "h.test");
        }
        for host in ["h", "h.test:8080", "[::1]", "[::1]:80", "10.0.0.1", "a_b", "a.b.", "-", "h:0", "_", "1"] {
            try_one(b"/a", host);
        }
        for target in [&b"//a"[..], b"/", b"/?", b"/a//b/", b"/a?b?c", b"/%2F%C3%A9", b"/a|b^c[d]?{`\\}"] {
            try_one(target, "h.test");
        }
        assert!(said > 200, "{said}");
    }

    #[test]
    fn a_head_is_said_word_for_word() {
        let head =
            b"POST /api/v3/x?a=%20b HTTP/1.1\r\nHost: H.test:80\r\nPRIVATE-TOKEN: t\xc3\xb6k\r\nX-A: 1\r\nx-a: 2\r\n\
                     Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 7\r\n\r\n";
        let Asking { request, sending } = Asking::read(head, Scheme::HTTP).unwrap();
        assert_eq!(
            (request.method().as_str(), request.uri().to_string().as_str()),
            ("POST", "http://H.test:80/api/v3/x?a=%20b")
        );
        assert!(matches!(sending, Sending::Length(7)));
        let fields: Vec<_> = request.headers().iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
        let expected: [(&str, &[u8]); 4] =
            [("private-token", b"t\xc3\xb6k"), ("x-a", b"1"), ("x-a", b"2"), ("content-length", b"7")];
        assert_eq!(fields, expected);
        for head in [
            "GET /a HTTP/1.1\r\n\r\n",
            "GET /a HTTP/1.0\r\nHost: h\r\n\r\n",
            "GET /a HTTP/1.1\r\nHost: h\r\nX Y: 1\r\n\r\n",
            "GET /a HTTP/1.1\r\nHost: h\r\nX: \x01\r\n\r\n",
            "GET /a\"b HTTP/1.1\r\nHost: a b\r\n\r\n",
            "GET /<a> HTTP/1.1\r\nHost: h\r\n\r\n",
        ] {
            assert!(Asking::read(head.as_bytes(), Scheme::HTTP).is_none(), "{head:?}");
        }
    }
}
