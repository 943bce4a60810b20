//! HTTP/2 from clients. A connection carries many requests; each is written down as the HTTP/1 that it would have been, and
//! judged and carried by the code that does that for HTTP/1; the bytes of its answer become frames again. Nothing about a
//! request is decided here, and nothing that could be read in two ways gets through: what comes out is read by the same strict
//! grammar as what comes from a socket.

use super::connection::Gate;
use super::frame_watch::{Cut, FrameWatch};
use super::socket::Socket;
use crate::reply::answer::{AnswerKind, AnswerView as _};
use crate::reply::head::{AnswerBody, AnswerHead, MAX_HEAD_BYTES, end_of_head};
use crate::request::chunked::ChunkedBody;
use crate::request::origin::Arrival;
use crate::request::seeded::{self, Rule};
use bytes::{Bytes, BytesMut};
use h2::server::{Builder, Connection, SendResponse};
use h2::{Reason, RecvStream, SendStream};
use http::header::{COOKIE, HOST};
use http::request::Parts;
use http::{HeaderName, HeaderValue, Method, Response, StatusCode};
use parking_lot::Mutex;
use std::future::poll_fn;
use std::io::{self, IoSlice, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::time::timeout;

/// Requests of one connection at the same time.
const MAX_STREAMS: u32 = 128;
/// Requests of one connection that may still be at work after the client has given them up.
const MAX_TASKS: usize = 2 * MAX_STREAMS as usize;
/// What a client may send of one body before it is taken, and of all bodies of a connection.
const STREAM_WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = 256 * 1024;
/// What is kept of an answer until the client takes it.
const SEND_BUFFER: usize = 64 * 1024;
/// Fields beyond the limits of the configuration, which are judged like those of HTTP/1, as far as that.
const FIELDS_BEYOND: u32 = 16 * 1024;
/// How often idle connections and unfinished heads are looked for.
const LOOK: Duration = Duration::from_secs(1);
/// How long a client may not know that its stream is over: what it still sends to it is no attack.
const STILL_SENT: Duration = Duration::from_secs(10);
/// How long a connection that was told to end may stay.
const LAST_FRAMES: Duration = Duration::from_secs(1);

/// The first line of HTTP/2's preface, which no HTTP/1 client sends.
pub(super) const PREFACE_HEAD: &[u8] = b"PRI * HTTP/2.0\r\n\r\n";

/// Serves a connection to its end. `ahead` was read from it already.
pub(super) async fn serve(gate: Arc<Gate>, socket: Socket, ahead: BytesMut, arrival: Arrival) {
    let arrival = Arrival { http2: true, ..arrival };
    let limits = gate.head_limits();
    let watch = FrameWatch::new(socket, ahead);
    let cut = watch.cut();
    let fields = u32::try_from(limits.header_bytes).unwrap_or(u32::MAX).saturating_add(FIELDS_BEYOND);
    let handshake = Builder::new()
        .max_concurrent_streams(MAX_STREAMS)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buffer_size(SEND_BUFFER)
        .max_header_list_size(fields)
        .max_local_error_reset_streams(Some(MAX_STREAMS as usize))
        .max_concurrent_reset_streams(MAX_STREAMS as usize)
        .reset_stream_duration(STILL_SENT)
        .handshake(watch);
    // A client that does not get on with it is gone.
    let Ok(Ok(connection)) = timeout(limits.header_timeout, handshake).await else { return };
    let (tasks, window) = (Arc::default(), SharedWindow::default());
    Conversation { gate, arrival, cut, connection, tasks, window, idle_since: Instant::now() }.run().await;
}

struct Conversation {
    gate: Arc<Gate>,
    arrival: Arrival,
    cut: Arc<Cut>,
    connection: Connection<FrameWatch<Socket>, Bytes>,
    /// Requests at work.
    tasks: Arc<AtomicUsize>,
    window: SharedWindow,
    idle_since: Instant,
}

/// What all bodies of a connection have to share: the room for bytes that nobody has taken yet. Bodies that are not being read
/// may fill it, and then the client cannot send any other one either.
#[derive(Clone, Debug, Default)]
pub(super) struct SharedWindow(Arc<UnreadBodies>);

#[derive(Debug, Default)]
struct UnreadBodies {
    /// Bodies that are not at their end, and that nobody waits for.
    count: AtomicUsize,
    /// When there were last so many that they could fill the window.
    freed: Mutex<Option<Instant>>,
}

/// Bodies that fill the window if none of them is read.
const BODIES_THAT_FILL: usize = (CONNECTION_WINDOW / STREAM_WINDOW) as usize;

impl SharedWindow {
    fn not_read(&self) {
        self.0.count.fetch_add(1, Ordering::Relaxed);
    }

    fn read(&self) {
        if self.0.count.fetch_sub(1, Ordering::Relaxed) == BODIES_THAT_FILL {
            *self.0.freed.lock() = Some(Instant::now());
        }
    }

    /// The client may be unable to send for what the gateway does not read.
    pub(super) fn is_held_back(&self) -> bool {
        self.0.count.load(Ordering::Relaxed) >= BODIES_THAT_FILL
    }

    /// Since when it is able to again.
    pub(super) fn freed(&self) -> Option<Instant> {
        *self.0.freed.lock()
    }
}

/// One request at work.
struct Working(Arc<AtomicUsize>);

impl Drop for Working {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Conversation {
    async fn run(mut self) {
        let gate = Arc::clone(&self.gate);
        let cut = Arc::clone(&self.cut);
        let mut look = tokio::time::interval(LOOK);
        let mut told_to_end: Option<Instant> = None;
        loop {
            tokio::select! {
                next = self.connection.accept() => match next {
                    Some(Ok((request, respond))) => self.begin(request, respond),
                    // Ended, by either side.
                    Some(Err(_)) | None => return,
                },
                () = gate.lifecycle.draining(), if told_to_end.is_none() => {
                    self.connection.graceful_shutdown();
                    told_to_end = Some(Instant::now());
                }
                frame = cut.flooded() => {
                    gate.flooded(frame, &self.arrival);
                    return self.end(Reason::ENHANCE_YOUR_CALM).await;
                }
                _ = look.tick() => {
                    let limits = gate.head_limits();
                    let now = Instant::now();
                    if self.tasks.load(Ordering::Relaxed) > 0 {
                        self.idle_since = now;
                    }
                    let idle = now.saturating_duration_since(self.idle_since);
                    if cut.head_begun().is_some_and(|begun| now.saturating_duration_since(begun) > limits.header_timeout) {
                        gate.flooded("unfinished_head", &self.arrival);
                        return self.end(Reason::ENHANCE_YOUR_CALM).await;
                    }
                    // GOAWAY has been sent, nothing is at work, and the client does not close.
                    if told_to_end.is_some_and(|told| now.saturating_duration_since(told).min(idle) > LAST_FRAMES) {
                        return self.end(Reason::NO_ERROR).await;
                    }
                    if told_to_end.is_none() && idle > limits.idle_timeout {
                        self.connection.graceful_shutdown();
                        told_to_end = Some(now);
                    }
                }
            }
        }
    }

    /// A request has come.
    fn begin(&mut self, request: http::Request<RecvStream>, mut respond: SendResponse<Bytes>) {
        self.idle_since = Instant::now();
        if self.tasks.load(Ordering::Relaxed) >= MAX_TASKS {
            return respond.send_reset(Reason::REFUSED_STREAM);
        }
        let (parts, body) = request.into_parts();
        let Some(head) = written_head(&parts, body.is_end_stream()) else {
            return respond.send_reset(Reason::PROTOCOL_ERROR);
        };
        let body_state = match parts.headers.contains_key(http::header::CONTENT_LENGTH) || body.is_end_stream() {
            true => BodyBytes::Plain,
            false => BodyBytes::Chunked,
        };
        let stream = Http2Stream {
            request: RequestSide::new(head, body, body_state, self.window.clone()),
            answer: Mutex::new(AnswerSide::new(respond, parts.method == Method::HEAD)),
        };
        self.tasks.fetch_add(1, Ordering::Relaxed);
        let working = Working(Arc::clone(&self.tasks));
        let (gate, arrival) = (Arc::clone(&self.gate), self.arrival.clone());
        tokio::spawn(async move {
            gate.converse(Socket::ClientHttp2(Box::new(stream)), arrival, false).await;
            drop(working);
        });
    }

    /// Says why, and does not wait for long.
    async fn end(mut self, reason: Reason) {
        self.connection.abrupt_shutdown(reason);
        let _ = timeout(LAST_FRAMES, poll_fn(|cx| self.connection.poll_closed(cx))).await;
    }
}

/// The head as HTTP/1 has it. `None`: it holds what HTTP/2 does not allow and the library lets pass.
pub(super) fn written_head(parts: &Parts, ended: bool) -> Option<Vec<u8>> {
    let mut head = Vec::with_capacity(512);
    let authority = parts.uri.authority().map(|authority| authority.as_str());
    let target = match parts.uri.path_and_query() {
        _ if parts.method == Method::CONNECT => authority?,
        Some(target) => target.as_str(),
        None => return None,
    };
    for part in [parts.method.as_str(), " ", target, " HTTP/1.1\r\n"] {
        head.extend_from_slice(part.as_bytes());
    }
    let mut field = |name: &[u8], value: &[u8]| {
        for part in [name, b": ", value, b"\r\n"] {
            head.extend_from_slice(part);
        }
    };
    if let Some(authority) = authority {
        field(b"host", authority.as_bytes());
    }
    for (name, value) in &parts.headers {
        let value = value.as_bytes();
        let blank = |byte: Option<&u8>| byte.is_some_and(|byte| matches!(byte, b' ' | b'\t'));
        if (blank(value.first()) || blank(value.last())) && !seeded::off(Rule::Http2Blanks) {
            return None;
        }
        match *name {
            // The same thing twice is allowed; another one is a second Host, which the grammar refuses.
            HOST if authority.is_some_and(|authority| authority.as_bytes() == value) => {}
            // Written below, in one piece.
            COOKIE => {}
            _ => field(name.as_str().as_bytes(), value),
        }
    }
    let cookies: Vec<&[u8]> = parts.headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if !cookies.is_empty() {
        field(b"cookie", &cookies.join(&b"; "[..]));
    }
    if !ended && !parts.headers.contains_key(http::header::CONTENT_LENGTH) {
        field(b"transfer-encoding", b"chunked");
    }
    head.extend_from_slice(b"\r\n");
    Some(head)
}

/// One request and its answer, as a socket that speaks HTTP/1.
pub(super) struct Http2Stream {
    request: RequestSide,
    /// Both directions of one task use it, so nobody waits for the lock.
    answer: Mutex<AnswerSide>,
}

impl std::fmt::Debug for Http2Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Http2Stream")
    }
}

impl Http2Stream {
    pub(super) fn split(&mut self) -> (Http2Reader<'_>, Http2Writer<'_>) {
        (Http2Reader { request: &mut self.request, answer: &self.answer }, Http2Writer(&self.answer))
    }

    pub(super) fn shared_window(&self) -> SharedWindow {
        self.request.window.clone()
    }

    /// Reads on behind the answer, for a while and up to a number of bytes, and lets the client send no more then. Some clients
    /// take a stream that is reset at once for one that has failed, and do not show its answer.
    pub(super) async fn linger(mut self: Box<Self>, time: Duration, most: usize) {
        self.reset_when_dropped();
        let read_on = async {
            let mut left = most;
            while left > 0 {
                let Some(Ok(data)) = poll_fn(|cx| self.request.poll_data(cx)).await else { return };
                left = left.saturating_sub(data.len().max(1));
            }
            poll_fn(|cx| self.answer.lock().poll_reset(cx)).await;
        };
        // After the time-out or before: the stream ends here.
        let _ = timeout(time, read_on).await;
    }

    /// Nobody may take what was written for a whole answer.
    pub(super) fn reset_when_dropped(&self) {
        self.answer.lock().reset(Reason::INTERNAL_ERROR);
    }

    pub(super) fn poll_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.answer.lock().poll_write(cx, bytes)
    }
}

struct RequestSide {
    /// Until it is read.
    head: Option<Vec<u8>>,
    body: RecvStream,
    bytes: BodyBytes,
    window: SharedWindow,
    /// Somebody waits for the body, or it is over.
    is_read: bool,
}

impl RequestSide {
    fn new(head: Vec<u8>, body: RecvStream, bytes: BodyBytes, window: SharedWindow) -> Self {
        let is_read = body.is_end_stream();
        if !is_read {
            window.not_read();
        }
        Self { head: Some(head), body, bytes, window, is_read }
    }

    fn set_read(&mut self, is_read: bool) {
        if std::mem::replace(&mut self.is_read, is_read) != is_read {
            if is_read { self.window.read() } else { self.window.not_read() }
        }
    }

    /// The next piece of the body, which the client may replace at once. `None`: the body is over.
    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        let polled = self.body.poll_data(cx);
        self.set_read(!matches!(polled, Poll::Ready(Some(Ok(_)))));
        Poll::Ready(ready!(polled).map(|data| {
            let data = data.map_err(io::Error::other)?;
            self.body.flow_control().release_capacity(data.len()).map_err(io::Error::other)?;
            Ok(data)
        }))
    }
}

impl Drop for RequestSide {
    /// What nobody has read is given back.
    fn drop(&mut self) {
        self.set_read(true);
    }
}

/// How the rest of a request is written down.
#[derive(Clone, Copy, PartialEq, Eq)]
enum BodyBytes {
    /// As it comes: the head says its length.
    Plain,
    Chunked,
    /// It is over.
    Ended,
}

pub(super) struct Http2Reader<'s> {
    request: &'s mut RequestSide,
    answer: &'s Mutex<AnswerSide>,
}

impl Http2Reader<'_> {
    /// Puts what comes next into the buffer. 0: the client has given the request up, or has the whole answer.
    pub(super) fn poll_fill(&mut self, cx: &mut Context<'_>, buffer: &mut BytesMut) -> Poll<io::Result<usize>> {
        if let Some(head) = self.request.head.take() {
            buffer.extend_from_slice(&head);
            return Poll::Ready(Ok(head.len()));
        }
        while self.request.bytes != BodyBytes::Ended {
            let data = match ready!(self.request.poll_data(cx)) {
                Some(Ok(data)) => data,
                Some(Err(error)) => return Poll::Ready(Err(error)),
                None => {
                    let chunked = self.request.bytes == BodyBytes::Chunked;
                    self.request.bytes = BodyBytes::Ended;
                    if chunked {
                        buffer.extend_from_slice(b"0\r\n\r\n");
                        return Poll::Ready(Ok(5));
                    }
                    break;
                }
            };
            if data.is_empty() {
                continue;
            }
            let before = buffer.len();
            if self.request.bytes == BodyBytes::Plain {
                buffer.extend_from_slice(&data);
            } else {
                let mut size = [0; 20];
                let mut rest = &mut size[..];
                // It has room for every number.
                let _ = write!(rest, "{:x}\r\n", data.len());
                let left = rest.len();
                buffer.extend_from_slice(&size[..size.len() - left]);
                buffer.extend_from_slice(&data);
                buffer.extend_from_slice(b"\r\n");
            }
            return Poll::Ready(Ok(buffer.len() - before));
        }
        self.answer.lock().poll_gone(cx).map(|()| Ok(0))
    }
}

/// Takes the answer as HTTP/1.
pub(super) struct Http2Writer<'s>(&'s Mutex<AnswerSide>);

impl Http2Writer<'_> {
    pub(super) async fn write_all(&mut self, slices: &[IoSlice<'_>], written: &mut u64) -> io::Result<()> {
        for slice in slices {
            let mut rest: &[u8] = slice;
            while !rest.is_empty() {
                let taken = poll_fn(|cx| self.0.lock().poll_write(cx, rest)).await?;
                *written += taken as u64;
                rest = &rest[taken..];
            }
        }
        Ok(())
    }

    /// What is not whole by now will never be.
    pub(super) fn shutdown(&mut self) {
        self.0.lock().reset(Reason::INTERNAL_ERROR);
    }
}

/// Turns HTTP/1 back to frames. What is written comes from this process: anything that is not as it writes it is a bug, and
/// ends the stream.
struct AnswerSide {
    /// Until the final head.
    respond: Option<SendResponse<Bytes>>,
    /// From then on.
    send: Option<SendStream<Bytes>>,
    asked_for_head: bool,
    /// Of a head that is not whole.
    head: Vec<u8>,
    rest: AnswerRest,
}

/// What is still to be written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum AnswerRest {
    Head,
    Length(u64),
    Chunked(ChunkedBody),
    Nothing,
}

impl AnswerSide {
    fn new(respond: SendResponse<Bytes>, asked_for_head: bool) -> Self {
        Self { respond: Some(respond), send: None, asked_for_head, head: Vec::new(), rest: AnswerRest::Head }
    }

    /// Takes at least one byte of those, or waits for room.
    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.rest {
            AnswerRest::Head => Poll::Ready(self.write_head(bytes)),
            AnswerRest::Length(left) => {
                let most = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                let taken = ready!(self.poll_room(cx, most))?;
                let left = left - taken as u64;
                self.send(&bytes[..taken], left == 0)?;
                self.rest = if left == 0 { AnswerRest::Nothing } else { AnswerRest::Length(left) };
                Poll::Ready(Ok(taken))
            }
            AnswerRest::Chunked(walk) => self.poll_write_chunked(cx, walk, bytes),
            AnswerRest::Nothing => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
        }
    }

    fn poll_write_chunked(&mut self, cx: &mut Context<'_>, walk: ChunkedBody, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut next = walk;
        let run = next.next_data(bytes).map_err(io::Error::other)?;
        let mut taken = run.end_of_run;
        if run.start < run.end_of_run {
            let room = ready!(self.poll_room(cx, run.end_of_run - run.start))?;
            taken = run.start + room;
            next = walk;
            next.next_data(&bytes[..taken]).map_err(io::Error::other)?;
            self.send(&bytes[run.start..taken], false)?;
        } else if next.is_done() {
            self.send(&[], true)?;
            self.rest = AnswerRest::Nothing;
            return Poll::Ready(Ok(taken));
        }
        self.rest = AnswerRest::Chunked(next);
        Poll::Ready(Ok(taken))
    }

    /// How many bytes the client can take now, of those that are there.
    fn poll_room(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<io::Result<usize>> {
        let Some(send) = &mut self.send else { return Poll::Ready(Err(io::ErrorKind::NotConnected.into())) };
        send.reserve_capacity(wanted);
        while send.capacity() == 0 {
            match ready!(send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            }
        }
        Poll::Ready(Ok(send.capacity().min(wanted)))
    }

    fn send(&mut self, data: &[u8], last: bool) -> io::Result<()> {
        let send = self.send.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        send.send_data(Bytes::copy_from_slice(data), last).map_err(io::Error::other)
    }

    fn write_head(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let before = self.head.len();
        self.head.extend_from_slice(bytes);
        let Some(end) = end_of_head(&self.head, before) else {
            return if self.head.len() > 2 * MAX_HEAD_BYTES {
                Err(io::ErrorKind::InvalidData.into())
            } else {
                Ok(bytes.len())
            };
        };
        self.head.truncate(end);
        let head = std::mem::take(&mut self.head);
        let malformed = || io::Error::from(io::ErrorKind::InvalidData);
        let parsed = AnswerHead::parse(&head).map_err(|_| malformed())?;
        let mut answer = Response::new(());
        *answer.status_mut() = StatusCode::from_u16(parsed.status()).map_err(|_| malformed())?;
        for field in parsed.fields() {
            if is_about_the_connection(field.spelling()) {
                continue;
            }
            let name = HeaderName::from_bytes(field.spelling()).map_err(|_| malformed())?;
            let value = HeaderValue::from_bytes(field.value()).map_err(|_| malformed())?;
            answer.headers_mut().try_append(name, value).map_err(|_| malformed())?;
        }
        match AnswerKind::of(parsed.status()) {
            AnswerKind::Interim => {
                let respond = self.respond.as_mut().ok_or_else(malformed)?;
                // The client may have gone; the final answer will show it.
                let _ = respond.send_informational(answer);
            }
            // No request over HTTP/2 asks for it.
            AnswerKind::Switching => return Err(malformed()),
            AnswerKind::Final => {
                let rest = match parsed.body(self.asked_for_head) {
                    AnswerBody::Empty | AnswerBody::Length(0) => AnswerRest::Nothing,
                    AnswerBody::Length(length) => AnswerRest::Length(length),
                    AnswerBody::Chunked => AnswerRest::Chunked(ChunkedBody::default()),
                    AnswerBody::UntilClose => return Err(malformed()),
                };
                let mut respond = self.respond.take().ok_or_else(malformed)?;
                let send = respond.send_response(answer, rest == AnswerRest::Nothing).map_err(io::Error::other)?;
                (self.send, self.rest) = (Some(send), rest);
            }
        }
        Ok(end - before)
    }

    /// Ready when nothing can be written any more, or needs to be.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match (&mut self.respond, &mut self.send) {
            _ if self.rest == AnswerRest::Nothing => Poll::Ready(()),
            (Some(respond), _) => respond.poll_reset(cx).map(drop),
            (None, Some(send)) => send.poll_reset(cx).map(drop),
            (None, None) => Poll::Ready(()),
        }
    }

    /// Ready when the client has given the stream up, behind its answer.
    fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.send.as_mut().map_or(Poll::Ready(()), |send| send.poll_reset(cx).map(drop))
    }

    fn reset(&mut self, reason: Reason) {
        if self.rest == AnswerRest::Nothing {
            return;
        }
        self.rest = AnswerRest::Nothing;
        match (&mut self.respond, &mut self.send) {
            (Some(respond), _) => respond.send_reset(reason),
            (None, Some(send)) => send.send_reset(reason),
            (None, None) => {}
        }
    }
}

/// What HTTP/2 says in other ways.
fn is_about_the_connection(name: &[u8]) -> bool {
    [&b"connection"[..], b"transfer-encoding", b"keep-alive", b"proxy-connection", b"upgrade"]
        .iter()
        .any(|known| known.eq_ignore_ascii_case(name))
}
