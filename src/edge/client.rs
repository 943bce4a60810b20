//! One client connection, read by rules of our own: the head of a request within a deadline and a size, its body to
//! the byte where it ends, and nothing beyond. The framework reads through this and so never sees a byte of a next
//! request, of a body that is framed in doubt, or of a tunnel that no backend has agreed to.

use super::http2::SharedWindow;
use super::patience::{Flag, Timer};
use super::socket::{Socket, SocketReader, SocketWriter, give_back};
use crate::request::chunked::ChunkedBody;
use crate::request::head::{self, HeadFault};
use crate::request::origin::Arrival;
use crate::request::view::Framing;
use crate::request::{Limits, RequestFault};
use async_trait::async_trait;
use bytes::{Buf as _, Bytes, BytesMut};
use pingora::protocols::raw_connect::ProxyDigest;
use pingora::protocols::{
    GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, TimingDigest, UniqueID,
    UniqueIDType,
};
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::time::timeout;

/// What one read asks the socket for. A request's head nearly always fits.
const READ_BYTES: usize = 4 * 1024;
/// The same, for a body.
const BODY_BYTES: usize = 32 * 1024;
/// Bytes of a next request that may pile up while the current one is served.
const MAX_AHEAD_BYTES: usize = 64 * 1024;
const DRAIN_TIME: Duration = Duration::from_secs(5);
/// How long, and how much, a connection is still read after the last answer, so that a client that is still sending
/// gets to see the answer and not a reset.
const LINGER_TIME: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 1024 * 1024;

pub(super) struct ClientStream {
    /// `None` once the connection has been handed to a lingering close.
    socket: Option<Socket>,
    /// Read from the socket and not yet taken.
    ahead: BytesMut,
    body: RemainingBody,
    arrival: Arrival,
    served: u64,
    timer: Timer,
}

/// What of the stream belongs to the current request.
#[derive(Debug)]
enum RemainingBody {
    Length(u64),
    Chunked(ChunkedBody),
    /// Nothing more, unless the backend agrees to a tunnel and the flag is raised.
    Ended(Option<Arc<AtomicBool>>),
}

/// What becomes of a connection after an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    /// It can have another request.
    Next,
    /// It ends so that the client sees the last answer.
    Close,
    /// It ends so that nobody takes what was written for a whole answer.
    Reset,
    /// There is nobody to say anything to.
    Drop,
}

/// How long the next request of a connection may take to begin once the process is on its way to the end. A client that was
/// not told of the end by its last response may have sent one already.
const NEXT_WHILE_DRAINING: Duration = Duration::from_secs(1);

/// A deadline has passed.
struct TimedOut;

/// How long and how large a head may be.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeadLimits {
    pub(super) header_bytes: usize,
    pub(super) target_bytes: usize,
    /// From the first byte (on a new connection: from the accept) to the last.
    pub(super) header_timeout: Duration,
    /// Between two requests.
    pub(super) idle_timeout: Duration,
}

impl HeadLimits {
    /// Whether a whole head is within the limits, and if not, why.
    pub(super) fn judge(&self, head: &[u8]) -> Option<Head> {
        (head.len() > self.header_bytes).then(|| self.too_large(head))
    }

    fn too_large(&self, head: &[u8]) -> Head {
        match Limits::refuse_size(self.target_bytes, head) {
            RequestFault::TargetTooLong => Head::TargetTooLong,
            _ => Head::TooLarge,
        }
    }
}

pub(super) enum Head {
    /// A whole head, its empty line included, of whatever size.
    Complete(Bytes),
    TooLarge,
    TargetTooLong,
    TooSlow,
    Malformed(HeadFault),
    /// The client closed the connection or was idle for too long. No response is sent.
    Closed,
}

impl ClientStream {
    pub(super) fn new(socket: Socket, arrival: Arrival) -> Self {
        Self {
            socket: Some(socket),
            ahead: BytesMut::new(),
            body: RemainingBody::Ended(None),
            arrival,
            served: 0,
            timer: Timer::default(),
        }
    }

    /// The connection as it was before `head` was read from it. `None`: it has ended.
    pub(super) fn into_parts(mut self, head: &[u8]) -> Option<(Socket, BytesMut, Arrival)> {
        let socket = self.socket.take()?;
        let mut ahead = BytesMut::from(head);
        ahead.extend_from_slice(&self.ahead);
        self.ahead.clear();
        Some((socket, ahead, self.arrival.clone()))
    }

    /// Whether it has had so many requests, the current one included.
    pub(super) fn is_last(&self, most: Option<u64>) -> bool {
        most.is_some_and(|most| self.served >= most)
    }

    /// How the connection came.
    pub(super) fn arrival(&self) -> &Arrival {
        &self.arrival
    }

    /// Reads the head of the next request. `stop` shortens the wait for a request that has not begun. The limits are asked for
    /// again and again, as a reload may change them during the wait: times are those that hold when they begin to run,
    /// sizes those that hold when the bytes are there. A whole head may still be too large: [`HeadLimits::judge`].
    pub(super) async fn read_head(
        &mut self,
        limits: impl Fn() -> HeadLimits,
        mut stop: Pin<&mut impl Future<Output = ()>>,
    ) -> Head {
        let mut scanned = 0;
        let first = self.served == 0;
        let (mut deadline, mut stopping) = (None, false);
        loop {
            let begun = !self.ahead.is_empty();
            if begun && let Some(bytes) = self.take_head(scanned) {
                self.served += 1;
                return Head::Complete(bytes);
            }
            let limits = limits();
            if begun && let Some(head) = self.judge_unfinished(&limits, scanned) {
                return head;
            }
            scanned = self.ahead.len();
            give_back(&mut self.ahead);
            let is_read = poll_fn(|cx| {
                if let Poll::Ready(read) = self.poll_fill(cx) {
                    return Poll::Ready(Ok(matches!(read, Ok(1..))));
                }
                let time = if begun || first { limits.header_timeout } else { limits.idle_timeout };
                // A request may be on its way, which is served.
                if !begun && !stopping && stop.as_mut().poll(cx).is_ready() {
                    stopping = true;
                    let soon = Instant::now() + NEXT_WHILE_DRAINING;
                    deadline = Some(deadline.map_or(soon, |deadline: Instant| deadline.min(soon)));
                }
                let deadline = *deadline.get_or_insert_with(|| Instant::now() + time);
                self.timer.poll_passed(cx, deadline).map(|()| Err(TimedOut))
            });
            match is_read.await {
                Ok(true) => {}
                Ok(false) => return Head::Closed,
                Err(TimedOut) if begun => return Head::TooSlow,
                Err(TimedOut) => return Head::Closed,
            }
            if !begun && !first {
                // The wait for a request is over; the time for its head begins.
                deadline = None;
            }
        }
    }

    /// The head, when all of it is there.
    fn take_head(&mut self, scanned: usize) -> Option<Bytes> {
        let end = head::end_of_head(&self.ahead, scanned)?;
        Some(self.ahead.split_to(end).freeze())
    }

    /// Why a head that has not ended will never be taken.
    fn judge_unfinished(&self, limits: &HeadLimits, scanned: usize) -> Option<Head> {
        if self.ahead.len() >= limits.header_bytes {
            return Some(limits.too_large(&self.ahead));
        }
        head::is_invalid_prefix(&self.ahead, scanned).then_some(Head::Malformed(HeadFault::RequestLine))
    }

    /// What was read of a head that was not taken.
    pub(super) fn unread(&self) -> &[u8] {
        &self.ahead
    }

    async fn fill(&mut self) -> io::Result<usize> {
        poll_fn(|cx| self.poll_fill(cx)).await
    }

    /// Sets what the next reads may give out.
    pub(super) fn begin_body(&mut self, framing: Framing, tunnel: Option<Arc<AtomicBool>>) {
        self.body = match framing {
            Framing::Empty => RemainingBody::Ended(tunnel),
            Framing::Length(length) => RemainingBody::Length(length),
            Framing::Chunked => RemainingBody::Chunked(ChunkedBody::default()),
        };
    }

    /// Whether an unread body can be skipped so that the next request can be read.
    pub(super) fn can_skip(framing: Framing, expects_continue: bool) -> bool {
        framing.can_be_skipped(expects_continue)
    }

    /// Skips a body. False when the connection is of no further use.
    pub(super) async fn skip_body(&mut self, framing: Framing) -> bool {
        let Framing::Length(mut left) = framing else { return framing == Framing::Empty };
        let skip = async {
            loop {
                let take = usize::try_from(left).unwrap_or(usize::MAX).min(self.ahead.len());
                self.ahead.advance(take);
                left -= take as u64;
                if left == 0 {
                    return true;
                }
                if !matches!(self.fill().await, Ok(1..)) {
                    return false;
                }
            }
        };
        timeout(DRAIN_TIME, skip).await.unwrap_or(false)
    }

    /// Writes an answer of our own in one go.
    pub(super) async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Self { socket, timer, .. } = self;
        let Some(socket) = socket else { return Err(io::ErrorKind::NotConnected.into()) };
        let mut write = pin!(async {
            socket.write_all(bytes).await?;
            socket.flush().await
        });
        // Made only when the client does not take the bytes at once.
        let mut deadline = None;
        poll_fn(|cx| {
            if let Poll::Ready(written) = write.as_mut().poll(cx) {
                return Poll::Ready(written);
            }
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + DRAIN_TIME);
            timer.poll_passed(cx, deadline).map(|()| Err(io::ErrorKind::TimedOut.into()))
        })
        .await
    }

    /// What its body has to share with others before it can be sent.
    pub(super) fn shared_window(&self) -> Option<SharedWindow> {
        match &self.socket {
            Some(Socket::ClientHttp2(stream)) => Some(stream.shared_window()),
            _ => None,
        }
    }

    /// Both directions at once, for the lane of our own.
    pub(super) fn split(&mut self) -> Option<(ClientReader<'_>, SocketWriter<'_>, &mut Timer)> {
        let Self { socket, ahead, body, timer, .. } = self;
        let (socket, writer) = socket.as_mut()?.split();
        Some((ClientReader { socket, ahead, body }, writer, timer))
    }

    /// Whether the body is whole and untouched, so that it can be sent once more.
    pub(super) fn body_is_at_hand(&self, framing: Framing) -> bool {
        match (framing, &self.body) {
            (Framing::Empty, _) => true,
            (Framing::Length(all), RemainingBody::Length(left)) => *left == all && self.ahead.len() as u64 >= all,
            _ => false,
        }
    }

    /// Takes away a body that was sent from where it lies. Whether the connection is at the end of the request.
    pub(super) fn end_body(&mut self) -> bool {
        if let RemainingBody::Length(left) = self.body
            && let Ok(left) = usize::try_from(left)
            && left <= self.ahead.len()
        {
            self.ahead.advance(left);
            self.body = RemainingBody::Ended(None);
        }
        matches!(self.body, RemainingBody::Ended(_))
    }

    /// Ends the connection, if it has to end.
    pub(super) async fn end(&mut self, after: After) {
        if after == After::Next {
            return;
        }
        // What was read is of no use any more, and a flood of such connections would hold it for the whole linger.
        self.ahead = BytesMut::new();
        let Some(socket) = self.socket.take() else { return };
        match after {
            After::Close => linger(socket).await,
            After::Reset => socket.reset_when_dropped(),
            After::Next | After::Drop => {}
        }
    }

    /// Takes the connection and leaves one that is over.
    pub(super) fn take(&mut self) -> Self {
        let over = Self {
            socket: None,
            ahead: BytesMut::new(),
            body: RemainingBody::Ended(None),
            arrival: self.arrival.clone(),
            served: self.served,
            timer: Timer::default(),
        };
        std::mem::replace(self, over)
    }
}

/// The client's bytes, while its answer is written.
pub(super) struct ClientReader<'c> {
    socket: SocketReader<'c>,
    ahead: &'c mut BytesMut,
    body: &'c mut RemainingBody,
}

/// A piece of a body, as it lies in what was read.
#[derive(Debug)]
pub(super) struct BodyPiece {
    start: usize,
    end: usize,
    /// What comes behind it is known to be no part of the body.
    pub(super) last: bool,
}

/// Why a body cannot be read on.
#[derive(Debug)]
pub(super) enum BodyEnd {
    Gone,
    Malformed,
}

impl ClientReader<'_> {
    /// The next piece of the body; it stays where it is until it is consumed. `None`: the body is over.
    pub(super) async fn piece(&mut self) -> Result<Option<BodyPiece>, BodyEnd> {
        loop {
            let length = self.ahead.len();
            match self.body {
                RemainingBody::Ended(_) => return Ok(None),
                RemainingBody::Length(left) if length > 0 => {
                    let end = length.min(usize::try_from(*left).unwrap_or(usize::MAX));
                    return Ok(Some(BodyPiece { start: 0, end, last: end as u64 == *left }));
                }
                RemainingBody::Chunked(walk) if length > 0 => {
                    let run = walk.next_data(self.ahead).map_err(|_| BodyEnd::Malformed)?;
                    if run.start < run.end_of_run {
                        return Ok(Some(BodyPiece { start: run.start, end: run.end_of_run, last: false }));
                    }
                    self.ahead.advance(run.end_of_run);
                    if walk.is_done() {
                        *self.body = RemainingBody::Ended(None);
                        return Ok(None);
                    }
                }
                RemainingBody::Length(_) | RemainingBody::Chunked(_) => {}
            }
            if !matches!(self.fill(BODY_BYTES).await, Ok(1..)) {
                return Err(BodyEnd::Gone);
            }
        }
    }

    pub(super) fn bytes(&self, piece: &BodyPiece) -> &[u8] {
        &self.ahead[piece.start..piece.end]
    }

    pub(super) fn consume(&mut self, piece: &BodyPiece) {
        self.ahead.advance(piece.end);
        if let RemainingBody::Length(left) = self.body {
            *left -= (piece.end - piece.start) as u64;
            if *left == 0 {
                *self.body = RemainingBody::Ended(None);
            }
        }
    }

    /// The whole body, if it lies here already or is empty.
    pub(super) fn whole(&self) -> Option<BodyPiece> {
        match &*self.body {
            RemainingBody::Ended(_) => Some(BodyPiece { start: 0, end: 0, last: true }),
            RemainingBody::Length(left) if self.ahead.len() as u64 >= *left => {
                Some(BodyPiece { start: 0, end: usize::try_from(*left).ok()?, last: true })
            }
            _ => None,
        }
    }

    /// Comes back when the client has gone, before anything of its body is taken. What it sends meanwhile is kept, up to a limit.
    pub(super) async fn wait_for_end(&mut self, may_half_close: bool) {
        while self.ahead.len() < MAX_AHEAD_BYTES {
            match self.fill(READ_BYTES).await {
                Ok(0) if may_half_close => break,
                Ok(1..) => {}
                Ok(0) | Err(_) => return,
            }
        }
        std::future::pending().await
    }

    /// Comes back when the client has gone. What it sends meanwhile is kept for its next request; what is too much for that
    /// is dropped, and `flooded` says so.
    pub(super) async fn watch(&mut self, flooded: &Flag) {
        loop {
            if self.ahead.len() >= MAX_AHEAD_BYTES {
                flooded.set(true);
                self.ahead.clear();
            }
            if !matches!(self.fill(READ_BYTES).await, Ok(1..)) {
                return;
            }
        }
    }

    /// Reads what comes next, whatever it is.
    pub(super) async fn tunnelled(&mut self) -> Option<BytesMut> {
        if self.ahead.is_empty() && !matches!(self.fill(BODY_BYTES).await, Ok(1..)) {
            return None;
        }
        Some(self.ahead.split())
    }

    async fn fill(&mut self, bytes: usize) -> io::Result<usize> {
        poll_fn(|cx| self.socket.poll_fill(cx, self.ahead, bytes)).await
    }
}

/// Says that nothing more will come, and reads on for a short while.
async fn linger(mut socket: Socket) {
    if let Socket::ClientHttp2(stream) = socket {
        return stream.linger(LINGER_TIME, LINGER_BYTES).await;
    }
    let read_on = async {
        if socket.shutdown().await.is_err() {
            return;
        }
        let mut scrap = [0; 2048];
        let mut left = LINGER_BYTES;
        while let Ok(n @ 1..) = socket.read(&mut scrap).await {
            left = left.saturating_sub(n);
            if left == 0 {
                return;
            }
        }
    };
    // After the time-out or before: the connection ends here.
    let _ = timeout(LINGER_TIME, read_on).await;
}

impl Drop for ClientStream {
    /// The framework drops a connection that it is done with. With unread bytes in it, the kernel would send a reset,
    /// which can destroy the answer on its way to the client.
    fn drop(&mut self) {
        let unread = !self.ahead.is_empty() || !matches!(self.body, RemainingBody::Ended(_));
        if unread
            && let Some(socket) = self.socket.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(linger(socket));
        }
    }
}

impl AsyncRead for ClientStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let ended_or_tunnel = match &this.body {
            RemainingBody::Ended(Some(tunnel)) => Some(tunnel.load(Ordering::Acquire)),
            RemainingBody::Ended(None) => Some(false),
            RemainingBody::Length(_) | RemainingBody::Chunked(_) => None,
        };
        match ended_or_tunnel {
            Some(false) => return this.poll_end(cx),
            Some(true) if this.ahead.is_empty() => return this.poll_socket(cx, out),
            _ => {}
        }
        if this.ahead.is_empty() && ready!(this.poll_fill(cx))? == 0 {
            return Poll::Ready(Ok(()));
        }
        let take = match &mut this.body {
            RemainingBody::Ended(_) => this.ahead.len().min(out.remaining()),
            RemainingBody::Length(left) => {
                let take = this.ahead.len().min(out.remaining()).min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= take as u64;
                if *left == 0 {
                    this.body = RemainingBody::Ended(None);
                }
                take
            }
            RemainingBody::Chunked(walk) => {
                let offer = &this.ahead[..this.ahead.len().min(out.remaining())];
                let take = walk.advance(offer).map_err(|fault| io::Error::new(io::ErrorKind::InvalidData, fault))?;
                if walk.is_done() {
                    this.body = RemainingBody::Ended(None);
                }
                take
            }
        };
        out.put_slice(&this.ahead[..take]);
        this.ahead.advance(take);
        Poll::Ready(Ok(()))
    }
}

impl ClientStream {
    /// The body is over: only the client's going away is told. What comes meanwhile is kept for the next request.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.ahead.len() < MAX_AHEAD_BYTES {
            if ready!(self.poll_fill(cx))? == 0 {
                return Poll::Ready(Ok(()));
            }
        }
        // Enough is waiting. Nobody needs to wake this up: the framework looks again when the answer goes on.
        Poll::Pending
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let Some(socket) = &mut self.socket else { return Poll::Ready(Ok(0)) };
        socket.split().0.poll_fill(cx, &mut self.ahead, READ_BYTES)
    }

    fn poll_socket(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.socket {
            Some(socket) => Pin::new(socket).poll_read(cx, out),
            None => Poll::Ready(Ok(())),
        }
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().socket {
            Some(socket) => Pin::new(socket).poll_write(cx, bytes),
            None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().socket {
            Some(socket) => Pin::new(socket).poll_flush(cx),
            None => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().socket {
            Some(socket) => Pin::new(socket).poll_shutdown(cx),
            None => Poll::Ready(Ok(())),
        }
    }
}

impl std::fmt::Debug for ClientStream {
    /// What was read may be a credential: only sizes are printed.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ClientStream({} bytes ahead, body {:?})", self.ahead.len(), self.body)
    }
}

#[async_trait]
impl Shutdown for ClientStream {
    async fn shutdown(&mut self) {
        if let Some(socket) = &mut self.socket {
            // It may be closed already.
            let _ = socket.shutdown().await;
        }
    }
}

impl UniqueID for ClientStream {
    fn id(&self) -> UniqueIDType {
        self.socket.as_ref().map_or(-1, |socket| socket.id())
    }
}

impl Ssl for ClientStream {}

#[async_trait]
impl Peek for ClientStream {}

impl GetTimingDigest for ClientStream {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        Vec::new()
    }
}

impl GetProxyDigest for ClientStream {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        None
    }
}

impl GetSocketDigest for ClientStream {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        None
    }
}
