//! The lane of HTTP/1 on both sides: sends a permitted request to a server of its upstream, and the answer back. Both bodies
//! move at the same time, each through one buffer. What goes upstream was written by `forward`, what must not leave in an
//! answer is said by `reply::answer`; here are the connections, the watch over the body, and what is said when a side fails.

use super::Snapshot;
use super::backend::BackendConnection;
use super::client::{After, BodyEnd, ClientReader, ClientStream};
use super::connection::Gate;
use super::exchange::End;
use super::http2::SharedWindow;
use super::patience::{Count, Flag, Patience, Timer, WaitCredit};
use super::peers::Peers;
use super::recheck::{self, Recheck, Standing};
use super::secure;
use super::socket::{SocketReader, SocketWriter};
use super::ticket::Ticket;
use crate::forward::{FieldSink as _, Http1Head};
use crate::reply::answer::{self, AnswerEdit, AnswerKind, AnswerName, AnswerView as _, Credentials};
use crate::reply::head::{AnswerBody, AnswerHead, MAX_HEAD_BYTES, end_of_head};
use crate::reply::{Cause, LimitFields, Refusal, UpstreamFault};
use crate::request::RequestFault;
use crate::request::body::{BodyScanner, judge_piece};
use crate::request::chunked::{ChunkFault, ChunkedBody};
use crate::request::head::HeadFault;
use crate::request::route::HeaderEdits;
use crate::request::view::{Framing, Method};
use crate::telemetry::access_log::By;
use crate::telemetry::metrics::UpstreamError;
use crate::upstream::{FailedTry, NoServer, Pick};
use arc_swap::ArcSwap;
use bytes::{Buf as _, BytesMut};
use pingora::protocols::http::date::get_cached_date;
use std::future::poll_fn;
use std::io::{IoSlice, Write as _};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

/// Pause that a client may make within a body.
pub(super) const BODY_READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Time for the backend or the client to take a piece of body.
pub(super) const WRITE_TIMEOUT: Duration = Duration::from_secs(60);
/// What one read from a backend asks for: a head and a small body; bodies that go on.
const HEAD_BYTES: usize = 4 * 1024;
/// Most heads of answers fit.
const HEAD_CAPACITY: usize = 1024;
const BODY_BYTES: usize = 32 * 1024;

/// Why an attempt ended without a whole answer.
#[derive(Clone, Copy, Debug)]
enum Breakage {
    /// There is nobody to answer.
    ClientGone,
    /// The request's own fault, found while its body was passing.
    Request(RequestFault),
    /// The token gives no right any more.
    Token(Cause),
    Backend(UpstreamFault, UpstreamError),
}

impl Breakage {
    const CLOSED: Self = Self::Backend(UpstreamFault::Broken, UpstreamError::Closed);
    const UNSPEAKABLE: Self = Self::Request(RequestFault::Head(HeadFault::RequestLine));
    const REFUSED: Self = Self::Backend(UpstreamFault::Broken, UpstreamError::TlsHandshake);
    const MALFORMED: Self = Self::Backend(UpstreamFault::Malformed, UpstreamError::Malformed);
    const TIMED_OUT: Self = Self::Backend(UpstreamFault::TimedOut, UpstreamError::Timeout);
    const TRY_TIMED_OUT: Self = Self::Backend(UpstreamFault::TimedOut, UpstreamError::TryTimeout);
    const OVERDUE: Self = Self::Backend(UpstreamFault::Overdue, UpstreamError::RequestTimeout);
}

/// How far an attempt has got: what each direction knows of the other.
struct Transfer {
    started: Instant,
    /// Something of the request went to the backend.
    begun: Flag,
    /// The request went to its end.
    sent: Flag,
    body_sent: Count,
    /// The client waits for an interim answer before it sends its body.
    expecting: Flag,
    /// A byte of an answer has come.
    heard: Flag,
    /// The final answer's status, once its head goes to the client; 0 before.
    status: Count,
    body_written: Count,
    /// The client sent more ahead than is kept.
    flooded: Flag,
    /// The upload waits for the client, not for the backend.
    client_is_due: Flag,
    upload: Patience,
    /// How long the client's body may still be waited for.
    credit: WaitCredit,
    /// What else the client has to wait for before it can send.
    window: Option<SharedWindow>,
    /// The download waits for the backend, not for the client.
    backend_is_due: Flag,
    download: Patience,
    /// The first byte of an answer may take no longer.
    per_try: Option<Duration>,
    /// When the whole exchange has to be over.
    end: Option<Instant>,
}

impl Transfer {
    fn begin(now: Instant, ticket: &Ticket, per_try: Option<Duration>, window: Option<SharedWindow>) -> Self {
        let rate = ticket.exchange.snapshot.settings.body_rate;
        let progress = Self {
            started: now,
            begun: Flag::default(),
            sent: Flag::default(),
            body_sent: Count::default(),
            expecting: Flag::default(),
            heard: Flag::default(),
            status: Count::default(),
            body_written: Count::default(),
            flooded: Flag::default(),
            client_is_due: Flag::default(),
            upload: Patience::default(),
            credit: WaitCredit::new(rate, BODY_READ_TIMEOUT),
            window,
            backend_is_due: Flag::default(),
            download: Patience::default(),
            per_try,
            end: ticket.exchange.deadline(),
        };
        progress.expecting.set(ticket.expects_continue);
        progress
    }

    /// When the exchange has to be over, or one side has let the other one wait for too long; and what that means.
    fn deadline(&self) -> Option<(Instant, Breakage)> {
        match (self.pause_deadline(), self.end) {
            (Some(pause), Some(end)) if pause.0 <= end => Some(pause),
            (_, Some(end)) => Some((end, Breakage::OVERDUE)),
            (pause, None) => pause,
        }
    }

    /// When one side has let the other one wait for too long, and what that means. A client that waits for 100 need not send,
    /// and a backend need not answer before it has the request.
    fn pause_deadline(&self) -> Option<(Instant, Breakage)> {
        let mut now = None;
        let mut clock = || *now.get_or_insert_with(Instant::now);
        let up = if self.client_is_due.is_set() && self.expecting.is_set() {
            self.upload.rest();
            None
        } else {
            self.forgive_held_back();
            self.upload.deadline(self.started, &mut clock)
        };
        let down = if self.backend_is_due.is_set() && !self.sent.is_set() && !self.expecting.is_set() {
            self.download.rest();
            None
        } else {
            self.download.deadline(self.started, &mut clock)
        };
        if let Some(up) = up
            && down.is_none_or(|down| up <= down)
        {
            return Some((up, if self.client_is_due.is_set() { self.slow_client() } else { Breakage::TIMED_OUT }));
        }
        let slow = match (self.backend_is_due.is_set(), self.heard.is_set() || self.per_try.is_none()) {
            (false, _) => Breakage::ClientGone,
            (true, true) => Breakage::TIMED_OUT,
            (true, false) => Breakage::TRY_TIMED_OUT,
        };
        down.map(|down| (down, slow))
    }

    /// A client that cannot send because the gateway does not read is not slow.
    fn forgive_held_back(&self) {
        let Some(window) = self.window.as_ref().filter(|_| self.client_is_due.is_set()) else { return };
        if window.is_held_back() {
            self.upload.rest();
        } else if let Some(freed) = window.freed() {
            self.upload.rest_until(self.started, freed);
        }
    }

    /// What it means that the client was waited for in vain.
    fn slow_client(&self) -> Breakage {
        let is_pause = self.credit.left().is_none_or(|left| left >= BODY_READ_TIMEOUT);
        Breakage::Request(if is_pause { RequestFault::BodyTimeout } else { RequestFault::BodyTooSlow })
    }

    fn status(&self) -> Option<u16> {
        u16::try_from(self.status.get()).ok().filter(|status| *status > 0)
    }

    fn waits_for_client_body(&self) {
        self.client_is_due.set(true);
        self.upload.begin(self.credit.left().map_or(BODY_READ_TIMEOUT, |left| left.min(BODY_READ_TIMEOUT)));
    }

    fn client_sent(&self, bytes: usize) {
        self.credit.received(bytes, self.upload.waited(self.started, Instant::now));
    }

    fn waits_for_backend_to_take(&self) {
        self.client_is_due.set(false);
        self.upload.begin(WRITE_TIMEOUT);
    }

    fn waits_for_answer(&self, at_most: Duration) {
        self.backend_is_due.set(true);
        self.download.begin(self.per_try.filter(|_| !self.heard.is_set()).unwrap_or(at_most));
    }

    fn waits_for_client_to_take(&self) {
        self.backend_is_due.set(false);
        self.download.begin(WRITE_TIMEOUT);
    }
}

/// How a whole answer has ended.
enum Answered {
    /// Both connections can be used again, as far as the answer says.
    Whole { backend_reusable: bool, client_reusable: bool },
    /// The backend has agreed to a tunnel.
    Switched,
}

/// Carries the request out and answers it.
pub(super) async fn carry(client: &mut ClientStream, head: &[u8], ticket: &mut Ticket, gate: &Gate) -> After {
    let snapshot = Arc::clone(&ticket.exchange.snapshot);
    loop {
        let Some(peers) = snapshot.pool(ticket.exchange.pool) else {
            return refuse(client, ticket, Cause::Bug.into(), 0).await;
        };
        let picked = match ticket.exchange.pick() {
            Err(NoServer::Busy) => match Box::pin(wait_for_server(client, ticket, &gate.snapshot)).await {
                Ok(picked) => picked,
                Err(broken) => {
                    let nothing = Transfer::begin(Instant::now(), ticket, None, None);
                    return end_broken(client, ticket, &nothing, broken).await;
                }
            },
            picked => picked,
        };
        let Pick { server, fresh } = match picked {
            Ok(pick) => pick,
            Err(why) => {
                let fault = ticket.exchange.no_server(why);
                return refuse(client, ticket, Cause::Upstream(fault).into(), 0).await;
            }
        };
        if peers.upstream.is_adaptive() && !client.body_is_at_hand(ticket.framing) {
            ticket.exchange.streams_body();
        }
        let now = Instant::now();
        // A connection that says which client it is for carries no other one's request.
        let kept = if fresh || peers.send_proxy { None } else { BackendConnection::kept(&server, peers, now) };
        let connected = match kept {
            Some(kept) => Ok((kept, true)),
            None => {
                let left = ticket.exchange.deadline().map(|end| end.saturating_duration_since(now));
                let time = peers.timeouts.connect.min(left.unwrap_or(Duration::MAX));
                let greeting = peers.greeting(ticket.exchange.facts.client);
                BackendConnection::connect(&server, peers, fresh, &greeting, time).await
            }
        };
        let (mut backend, reused) = match connected {
            Ok(connected) => connected,
            Err(_) if ticket.exchange.deadline().is_some_and(|end| end <= Instant::now()) => {
                ticket.exchange.overdue();
                return refuse(client, ticket, Cause::Upstream(UpstreamFault::Overdue).into(), 0).await;
            }
            Err(kind) => {
                // Nothing of the request was sent.
                if ticket.exchange.try_failed(FailedTry::Connect(kind), true) {
                    continue;
                }
                ticket.exchange.upstream_failed(kind);
                let timed_out = kind == UpstreamError::ConnectTimeout;
                let fault = if timed_out { UpstreamFault::TimedOut } else { UpstreamFault::Broken };
                return refuse(client, ticket, Cause::Upstream(fault).into(), 0).await;
            }
        };
        ticket.exchange.connected(reused);
        // A route's own time for a response may be less.
        let per_try = peers.timeouts.per_try.filter(|time| *time < ticket.exchange.read_timeout(peers));
        let progress = Transfer::begin(now, ticket, per_try, client.shared_window());
        let result = attempt(client, &mut backend, head, ticket, peers, &progress, gate).await;
        match result {
            Ok(Answered::Switched) => {
                let standing = Recheck::of(ticket, &gate.snapshot);
                return match tunnel(client, &mut backend, &progress, standing, gate.lifecycle.draining()).await {
                    None => {
                        over(ticket, &progress, false);
                        After::Close
                    }
                    Some(cause) => end_broken(client, ticket, &progress, Breakage::Token(cause)).await,
                };
            }
            Ok(Answered::Whole { backend_reusable, client_reusable }) => {
                let sent = progress.sent.is_set() && client.end_body();
                let now = over(ticket, &progress, false);
                if backend_reusable && sent && backend.buffer.is_empty() && !peers.send_proxy {
                    backend.keep(&server, peers.timeouts.idle, now);
                }
                let goes_on = client_reusable && sent && !progress.flooded.is_set();
                return if goes_on { After::Next } else { After::Close };
            }
            Err(broken) => {
                let fate = backend.fate();
                if let Breakage::Backend(_, UpstreamError::Timeout | UpstreamError::TryTimeout) = broken {
                    backend.is_silent_for_too_long();
                }
                drop(backend);
                let broken = match broken {
                    // No other server could be told it either, and this one is not to blame.
                    Breakage::Backend(..) if fate.unspeakable => Breakage::UNSPEAKABLE,
                    Breakage::Backend(..) if fate.malformed => Breakage::MALFORMED,
                    broken => broken,
                };
                let kind = match broken {
                    Breakage::Backend(UpstreamFault::Overdue, _) => {
                        ticket.exchange.overdue();
                        return end_broken(client, ticket, &progress, broken).await;
                    }
                    Breakage::Backend(_, kind) => kind,
                    _ => return end_broken(client, ticket, &progress, broken).await,
                };
                let is_lost = matches!(
                    kind,
                    UpstreamError::Closed
                        | UpstreamError::Timeout
                        | UpstreamError::TryTimeout
                        | UpstreamError::TlsHandshake
                );
                let lost = is_lost && !progress.heard.is_set();
                let repeatable = lost
                    && (!progress.begun.is_set() || fate.unprocessed || is_idempotent(ticket.method))
                    && client.body_is_at_hand(ticket.framing);
                let kept = reused && fate.lost_connection;
                if ticket.exchange.try_failed(FailedTry::Exchange { kept, error: kind }, repeatable) {
                    continue;
                }
                ticket.exchange.upstream_failed(kind);
                return end_broken(client, ticket, &progress, broken).await;
            }
        }
    }
}

/// Waits in the queue of the upstream, for as long as there is a client and its token gives it the right to.
async fn wait_for_server(
    client: &mut ClientStream,
    ticket: &mut Ticket,
    live: &ArcSwap<Snapshot>,
) -> Result<Result<Pick, NoServer>, Breakage> {
    let ended = recheck::ended(Recheck::of(ticket, live));
    let (mut reader, ..) = client.split().ok_or(Breakage::ClientGone)?;
    // Who said that this is its last request may close its side and wait for the answer.
    let gone = reader.wait_for_end(!ticket.keep_alive);
    tokio::select! {
        biased;
        cause = ended => Err(Breakage::Token(cause)),
        () = gone => Err(Breakage::ClientGone),
        picked = ticket.exchange.queued() => Ok(picked),
    }
}

const fn is_idempotent(method: Method) -> bool {
    matches!(method, Method::Get | Method::Head | Method::Put | Method::Delete | Method::Options)
}

/// Says to the client what can still be said.
async fn end_broken(client: &mut ClientStream, ticket: &mut Ticket, progress: &Transfer, broken: Breakage) -> After {
    let cause = match broken {
        Breakage::ClientGone => {
            ticket.exchange.client_gone();
            over(ticket, progress, true);
            return After::Drop;
        }
        Breakage::Request(fault) => Cause::Request(fault),
        Breakage::Token(cause) => {
            ticket.exchange.lost_its_token(cause.into());
            cause
        }
        Breakage::Backend(fault, _) => Cause::Upstream(fault),
    };
    if progress.status().is_some() {
        // With a part of the answer out, only a broken connection tells the client that the rest is missing.
        ticket.exchange.refused(cause.into());
        over(ticket, progress, true);
        return After::Reset;
    }
    refuse(client, ticket, cause.into(), progress.body_sent.get()).await
}

/// Answers instead of the backend, and ends the connection: its next bytes may be of a body that nobody wants.
async fn refuse(client: &mut ClientStream, ticket: &mut Ticket, refusal: Refusal, received: u64) -> After {
    let head_only = ticket.method == Method::Head;
    let answer = super::connection::render(refusal, head_only, true, &ticket.exchange, ticket.grant);
    // The client may have closed the connection; the request is logged either way.
    let _ = client.write(&answer).await;
    ticket.exchange.refused(refusal);
    ticket.exchange.over(End {
        status: refusal.status(),
        by: Some(By::Gate),
        bytes_received: received,
        bytes_sent: answer.len() as u64,
        failed: true,
    });
    After::Close
}

/// What the client got of the backend's answer. Returns when the exchange was over.
fn over(ticket: &mut Ticket, progress: &Transfer, failed: bool) -> Instant {
    let status = progress.status();
    ticket.exchange.over(End {
        status: status.unwrap_or(0),
        by: status.map(|_| By::Backend),
        bytes_received: progress.body_sent.get(),
        bytes_sent: progress.body_written.get(),
        failed,
    })
}

/// One request over one connection.
async fn attempt(
    client: &mut ClientStream,
    backend: &mut BackendConnection,
    head: &[u8],
    ticket: &mut Ticket,
    peers: &Peers,
    progress: &Transfer,
    gate: &Gate,
) -> Result<Answered, Breakage> {
    let Some((reader, mut writer, timer)) = client.split() else { return Err(Breakage::ClientGone) };
    let standing = Standing::since(progress.started, Recheck::of(ticket, &gate.snapshot));
    let BackendConnection { socket, buffer, .. } = backend;
    let (from_backend, to_backend) = socket.split();
    let upload = Upload {
        client: reader,
        backend: to_backend,
        scanner: ticket.body.clone(),
        limit: ticket.exchange.body_limit(),
        chunked: ticket.framing == Framing::Chunked,
        // Who said that this is its last request may close its side and wait for the answer.
        may_half_close: !ticket.keep_alive,
        progress,
    };
    let read_timeout = ticket.exchange.read_timeout(peers);
    let download =
        Download { backend: from_backend, buffer, client: &mut writer, ticket, read_timeout, progress, gate };
    drive(upload.run(head), download.run(), timer, progress, standing).await
}

/// Runs both directions until the answer is whole, something broke, or the token gives no right any more.
async fn drive(
    upload: impl Future<Output = Result<(), Breakage>>,
    download: impl Future<Output = Result<Answered, Breakage>>,
    timer: &mut Timer,
    progress: &Transfer,
    mut standing: Standing<'_>,
) -> Result<Answered, Breakage> {
    let (mut upload, mut download) = (pin!(upload), pin!(download));
    let mut uploading = true;
    poll_fn(|cx| {
        if uploading && let Poll::Ready(result) = upload.as_mut().poll(cx) {
            uploading = false;
            progress.upload.end();
            match result {
                // The backend takes nothing more, but it may have answered before.
                Ok(()) | Err(Breakage::Backend(UpstreamFault::Broken, _)) => {}
                Err(broken) => return Poll::Ready(Err(broken)),
            }
        }
        if let Poll::Ready(result) = download.as_mut().poll(cx) {
            return Poll::Ready(result);
        }
        if let Poll::Ready(cause) = standing.poll_ended(cx) {
            return Poll::Ready(Err(Breakage::Token(cause)));
        }
        let (deadline, due) = (progress.deadline(), standing.due());
        if let Some((deadline, broken)) = deadline
            && due.is_none_or(|due| deadline <= due)
        {
            return timer.poll_passed(cx, deadline).map(|()| Err(broken));
        }
        if let Some(due) = due
            && timer.poll_passed(cx, due).is_ready()
        {
            standing.begin();
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    })
    .await
}

/// The request, on its way to the backend.
struct Upload<'u> {
    client: ClientReader<'u>,
    backend: SocketWriter<'u>,
    /// This attempt's own walk over the body: a repeated request sends it again.
    scanner: Option<BodyScanner>,
    limit: Option<u64>,
    chunked: bool,
    may_half_close: bool,
    progress: &'u Transfer,
}

impl Upload<'_> {
    /// Comes back when there is no client any more; a client that may half-close is not one that has gone.
    async fn run(mut self, head: &[u8]) -> Result<(), Breakage> {
        // It may be ended in the midst of a write: what is not known to be unsent was sent.
        self.progress.begun.set(true);
        let sent = self.send(head).await;
        self.progress.begun.set(self.backend.is_used());
        sent?;
        self.progress.sent.set(true);
        self.progress.upload.end();
        self.client.watch(&self.progress.flooded).await;
        if self.may_half_close { Ok(()) } else { Err(Breakage::ClientGone) }
    }

    async fn send(&mut self, head: &[u8]) -> Result<(), Breakage> {
        // A body that is here goes with the head, and stays here until there is an answer.
        if let Some(piece) = self.client.whole() {
            let body = self.client.bytes(&piece);
            judge(&mut self.scanner, self.limit, 0, body, true)?;
            self.progress.waits_for_backend_to_take();
            let written = self.backend.write_all(&mut [IoSlice::new(head), IoSlice::new(body)]).await;
            self.progress.body_sent.add(body.len());
            return written.map_err(|_| Breakage::CLOSED);
        }
        self.write(&mut [IoSlice::new(head)]).await?;
        loop {
            self.progress.waits_for_client_body();
            let piece = self.client.piece().await.map_err(|end| match end {
                BodyEnd::Gone => Breakage::ClientGone,
                BodyEnd::Malformed => Breakage::Request(RequestFault::Head(HeadFault::Framing)),
            })?;
            self.progress.expecting.set(false);
            let Some(piece) = piece else {
                if self.chunked {
                    judge(&mut self.scanner, self.limit, self.progress.body_sent.get(), b"", true)?;
                    self.write(&mut [IoSlice::new(LAST_CHUNK)]).await?;
                }
                return Ok(());
            };
            let body = self.client.bytes(&piece);
            self.progress.client_sent(body.len());
            judge(&mut self.scanner, self.limit, self.progress.body_sent.get(), body, piece.last)?;
            self.progress.waits_for_backend_to_take();
            let mut size = ChunkSize::default();
            let written = if self.chunked {
                let all = &mut [IoSlice::new(size.of(body.len())), IoSlice::new(body), IoSlice::new(b"\r\n")];
                self.backend.write_all(all).await
            } else {
                self.backend.write_all(&mut [IoSlice::new(body)]).await
            };
            written.map_err(|_| Breakage::CLOSED)?;
            self.progress.body_sent.add(body.len());
            self.client.consume(&piece);
        }
    }

    async fn write(&mut self, slices: &mut [IoSlice<'_>]) -> Result<(), Breakage> {
        self.progress.waits_for_backend_to_take();
        self.backend.write_all(slices).await.map_err(|_| Breakage::CLOSED)
    }
}

const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

/// Looks at a piece of the body before the backend gets it, and stops what it must not get whole.
fn judge(
    scanner: &mut Option<BodyScanner>,
    limit: Option<u64>,
    before: u64,
    piece: &[u8],
    last: bool,
) -> Result<(), Breakage> {
    judge_piece(scanner, limit, before, piece, last).map_err(Breakage::Request)
}

/// Room for the line before a chunk: 16 digits and its end.
#[derive(Default)]
struct ChunkSize([u8; 18]);

impl ChunkSize {
    fn of(&mut self, length: usize) -> &[u8] {
        let mut rest = &mut self.0[..];
        // It fits.
        let _ = write!(rest, "{length:x}\r\n");
        let written = 18 - rest.len();
        &self.0[..written]
    }
}

/// What matters of a head that is on its way.
struct TakenHead {
    status: u16,
    kind: AnswerKind,
    body: AnswerBody,
    backend_reusable: bool,
    client_reusable: bool,
}

/// The answer, on its way to the client.
struct Download<'d> {
    backend: SocketReader<'d>,
    buffer: &'d mut BytesMut,
    client: &'d mut SocketWriter<'d>,
    ticket: &'d mut Ticket,
    read_timeout: Duration,
    progress: &'d Transfer,
    gate: &'d Gate,
}

impl Download<'_> {
    async fn run(mut self) -> Result<Answered, Breakage> {
        let mut out = Vec::with_capacity(HEAD_CAPACITY);
        let mut interim = 0;
        loop {
            let end = self.read_head().await?;
            let answer = self.take_head(end, interim, &mut out)?;
            match answer.kind {
                AnswerKind::Interim => {
                    interim += 1;
                    self.progress.expecting.set(false);
                    // HTTP/1.0 knows no interim answers.
                    if !self.ticket.http10 {
                        self.write(&mut [IoSlice::new(&out)]).await?;
                    }
                }
                AnswerKind::Switching => {
                    self.write(&mut [IoSlice::new(&out)]).await?;
                    self.progress.status.set(101);
                    return Ok(Answered::Switched);
                }
                AnswerKind::Final => {
                    self.body(&out, &answer).await?;
                    let TakenHead { backend_reusable, client_reusable, .. } = answer;
                    return Ok(Answered::Whole { backend_reusable, client_reusable });
                }
            }
        }
    }

    /// Takes a whole head from the buffer, judges it, and writes what the client gets into `out`.
    fn take_head(&mut self, end: usize, interim: usize, out: &mut Vec<u8>) -> Result<TakenHead, Breakage> {
        let head = AnswerHead::parse(&self.buffer[..end]).map_err(|_| Breakage::MALFORMED)?;
        let status = head.status();
        self.ticket.exchange.answered(status);
        let kind = answer::judge(&head, self.ticket.tunnel.is_some(), interim).map_err(|_| Breakage::MALFORMED)?;
        let body = head.body(self.ticket.method == Method::Head);
        // An answer that does not wait for the end of the request ends the connection with it.
        let client_reusable = self.ticket.keep_alive
            && self.progress.sent.is_set()
            && !self.gate.lifecycle.is_draining()
            && !(self.ticket.http10 && matches!(body, AnswerBody::Chunked | AnswerBody::UntilClose));
        out.clear();
        let to = ClientSide {
            credentials: self.ticket.credentials(),
            response_headers: self.ticket.response_headers(),
            http10: self.ticket.http10,
            deprecated: self.ticket.deprecated,
            hsts: self.ticket.exchange.hsts(),
            limits: self.ticket.exchange.limit_fields(),
            request_id: &self.ticket.exchange.request_id,
            reusable: client_reusable,
        };
        write_head(out, &head, kind, body, &to);
        let backend_reusable = head.keep_alive() && body != AnswerBody::UntilClose;
        drop(head);
        self.buffer.advance(end);
        Ok(TakenHead { status, kind, body, backend_reusable, client_reusable })
    }

    /// Reads until a head is whole; says where it ends.
    async fn read_head(&mut self) -> Result<usize, Breakage> {
        let mut scanned = 0;
        loop {
            if let Some(end) = end_of_head(self.buffer, scanned) {
                return if end <= MAX_HEAD_BYTES { Ok(end) } else { Err(Breakage::MALFORMED) };
            }
            scanned = self.buffer.len();
            // What is no head is not waited for to its end.
            if scanned >= MAX_HEAD_BYTES || !b"HTTP/1.".starts_with(&self.buffer[..scanned.min(7)]) {
                return Err(Breakage::MALFORMED);
            }
            if !self.fill(HEAD_BYTES).await? {
                return Err(Breakage::CLOSED);
            }
            self.progress.heard.set(true);
        }
    }

    /// Passes the body on. The head goes out with its first bytes.
    async fn body(&mut self, head: &[u8], answer: &TakenHead) -> Result<(), Breakage> {
        let (status, mut head) = (answer.status, Some(head));
        match answer.body {
            // Some backends send the body to HEAD as well. All readers agree that it is none; it goes with the connection.
            AnswerBody::Empty if self.buffer.is_empty() || self.ticket.method == Method::Head => {
                self.pass(&mut head, status, 0, None).await
            }
            // Whose answer is that?
            AnswerBody::Empty => Err(Breakage::MALFORMED),
            AnswerBody::Length(length) => {
                let mut left = length;
                loop {
                    let here = self.buffer.len();
                    if here as u64 > left {
                        return Err(Breakage::MALFORMED);
                    }
                    self.pass(&mut head, status, here, None).await?;
                    self.buffer.clear();
                    left -= here as u64;
                    if left == 0 {
                        return Ok(());
                    }
                    if !self.fill(usize::try_from(left).unwrap_or(BODY_BYTES).min(BODY_BYTES)).await? {
                        return Err(Breakage::CLOSED);
                    }
                }
            }
            AnswerBody::Chunked => {
                let mut walk = ChunkedBody::default();
                loop {
                    let (data, consumed) = join_data(&mut walk, self.buffer).map_err(|_| Breakage::MALFORMED)?;
                    let done = walk.is_done();
                    if done && consumed < self.buffer.len() {
                        return Err(Breakage::MALFORMED);
                    }
                    self.pass(&mut head, status, data, Some(done)).await?;
                    self.buffer.advance(consumed);
                    if done {
                        return Ok(());
                    }
                    if !self.fill(BODY_BYTES).await? {
                        return Err(Breakage::CLOSED);
                    }
                }
            }
            AnswerBody::UntilClose => loop {
                let here = self.buffer.len();
                self.pass(&mut head, status, here, Some(false)).await?;
                self.buffer.clear();
                if !self.fill(BODY_BYTES).await? {
                    return self.pass(&mut head, status, 0, Some(true)).await;
                }
            },
        }
    }

    /// Writes the head, if it has not gone out, and a piece of the body from the front of the buffer. `chunk`: the client gets
    /// chunks, and whether this is the last one.
    async fn pass(
        &mut self,
        head: &mut Option<&[u8]>,
        status: u16,
        length: usize,
        chunk: Option<bool>,
    ) -> Result<(), Breakage> {
        let data = &self.buffer[..length];
        // HTTP/1.0 knows no chunks: the end of the connection ends the body.
        let chunk = chunk.filter(|_| !self.ticket.http10);
        let mut size = ChunkSize::default();
        let (before, behind): (&[u8], &[u8]) = match chunk {
            None => (b"", b""),
            Some(last) if length == 0 => (b"", if last { LAST_CHUNK } else { b"" }),
            Some(last) => (size.of(length), if last { b"\r\n0\r\n\r\n" } else { b"\r\n" }),
        };
        let first = head.take();
        if first.is_none() && length == 0 && behind.is_empty() {
            return Ok(());
        }
        if first.is_some() {
            // From here on, a failure can only be shown by a broken connection.
            self.progress.status.set(u64::from(status));
        }
        let all = [first.unwrap_or_default(), before, data, behind];
        self.progress.waits_for_client_to_take();
        let written = self.client.write_all(&mut all.map(IoSlice::new)).await;
        self.progress.body_written.add(length);
        written.map_err(|_| Breakage::ClientGone)
    }

    async fn write(&mut self, slices: &mut [IoSlice<'_>]) -> Result<(), Breakage> {
        self.progress.waits_for_client_to_take();
        self.client.write_all(slices).await.map_err(|_| Breakage::ClientGone)
    }

    /// Reads on. False: the backend has closed the connection.
    async fn fill(&mut self, room: usize) -> Result<bool, Breakage> {
        self.progress.waits_for_answer(self.read_timeout);
        let read = poll_fn(|cx| self.backend.poll_fill(cx, self.buffer, room)).await;
        // A reset is no end of a body, nor is one that TLS did not announce.
        read.map(|bytes| bytes > 0).map_err(|error| match secure::is_alert(&error) && !self.progress.heard.is_set() {
            true => Breakage::REFUSED,
            false => Breakage::CLOSED,
        })
    }
}

/// Moves the data of chunks together at the front. Gives its length, and how much of the buffer it came from.
fn join_data(walk: &mut ChunkedBody, buffer: &mut [u8]) -> Result<(usize, usize), ChunkFault> {
    let (mut data, mut consumed) = (0, 0);
    loop {
        let run = walk.next_data(&buffer[consumed..])?;
        let (start, end) = (consumed + run.start, consumed + run.end_of_run);
        buffer.copy_within(start..end, data);
        data += end - start;
        consumed = end;
        if start == end {
            return Ok((data, consumed));
        }
    }
}

/// What the head of an answer depends on beside the backend's.
pub(super) struct ClientSide<'t> {
    pub(super) credentials: Credentials<'t>,
    pub(super) response_headers: &'t HeaderEdits,
    pub(super) http10: bool,
    pub(super) deprecated: bool,
    pub(super) hsts: Option<&'t str>,
    pub(super) limits: Option<&'t LimitFields>,
    pub(super) request_id: &'t str,
    /// The connection stays.
    pub(super) reusable: bool,
}

/// Writes the head as the client gets it: a status line of our own, the fields that may leave, and one end of the body.
pub(super) fn write_head(
    out: &mut Vec<u8>,
    head: &AnswerHead<'_>,
    kind: AnswerKind,
    body: AnswerBody,
    to: &ClientSide<'_>,
) {
    let status = head.status();
    let phrase = http::StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason());
    let digit = |of: u16| b'0' + (status / of % 10) as u8;
    out.extend_from_slice(b"HTTP/1.1 ");
    out.extend_from_slice(&[digit(100), digit(10), digit(1), b' ']);
    out.extend_from_slice(phrase.unwrap_or_default().as_bytes());
    out.extend_from_slice(b"\r\n");
    let edits = answer::edits(head, kind, &to.credentials, to.response_headers);
    let mut has_date = false;
    // Lines that are as they should be stand side by side mostly, and are copied together.
    let mut run = 0..0;
    for field in head.fields() {
        if field.name == AnswerName::Other && field.is_plain && edits.is_empty() && field.place.start == run.end {
            run.end = field.place.end;
            continue;
        }
        let ends_here = match field.name {
            AnswerName::Date => {
                has_date = true;
                false
            }
            // 204 has none of both, 304 has no body that could be chunked.
            AnswerName::ContentLength => status == 204,
            AnswerName::TransferEncoding => matches!(status, 204 | 304) || to.http10,
            // tollgate's own stands in its place.
            AnswerName::RequestId => kind == AnswerKind::Final,
            AnswerName::Deprecation => to.deprecated,
            AnswerName::LimitFields => to.limits.is_some(),
            AnswerName::StrictTransportSecurity => to.hsts.is_some(),
            _ => false,
        };
        let edited = edits.iter().any(|edit| match edit {
            AnswerEdit::Remove(removed) => removed.eq_ignore_ascii_case(field.spelling()),
            AnswerEdit::Replace(replaced, _) => replaced.as_bytes().eq_ignore_ascii_case(field.spelling()),
        });
        if ends_here || edited {
            continue;
        }
        if !field.is_plain || field.place.start != run.end {
            out.extend_from_slice(head.part(run));
            run = field.place.start..field.place.start;
        }
        if field.is_plain {
            run.end = field.place.end;
        } else {
            Http1Head(out).field(field.spelling(), field.value());
        }
    }
    out.extend_from_slice(head.part(run));
    let mut sink = Http1Head(out);
    for edit in &edits {
        if let AnswerEdit::Replace(name, values) = edit {
            values.iter().for_each(|value| sink.field(name.as_bytes(), value));
        }
    }
    if kind == AnswerKind::Final {
        for (name, value) in answer::own_fields(to.request_id, to.deprecated, to.hsts, to.limits) {
            sink.field(name.as_bytes(), value.as_bytes());
        }
        if !has_date && let Ok(date) = get_cached_date().to_str() {
            sink.field(b"Date", date.as_bytes());
        }
        if body == AnswerBody::UntilClose && !to.http10 {
            sink.field(b"Transfer-Encoding", b"chunked");
        }
        if !to.reusable {
            sink.field(b"Connection", b"close");
        } else if to.http10 {
            sink.field(b"Connection", b"keep-alive");
        }
    }
    out.extend_from_slice(b"\r\n");
}

/// Moves bytes both ways until both sides have ended. When one has, the other one gets a while. `Some`: it was ended because
/// of its token.
async fn tunnel(
    client: &mut ClientStream,
    backend: &mut BackendConnection,
    progress: &Transfer,
    recheck: Option<Recheck<'_>>,
    draining: impl Future<Output = ()>,
) -> Option<Cause> {
    let (mut from_client, mut to_client, _) = client.split()?;
    let BackendConnection { socket, buffer, .. } = backend;
    let (mut from_backend, mut to_backend) = socket.split();
    let mut up = pin!(async {
        while let Some(bytes) = from_client.tunnelled().await {
            if to_backend.write_all(&mut [IoSlice::new(&bytes)]).await.is_err() {
                return;
            }
            progress.body_sent.add(bytes.len());
        }
        // The backend may have gone.
        let _ = to_backend.shutdown().await;
    });
    let mut down = pin!(async {
        loop {
            if !buffer.is_empty() {
                if to_client.write_all(&mut [IoSlice::new(buffer)]).await.is_err() {
                    return;
                }
                progress.body_written.add(buffer.len());
                buffer.clear();
            }
            if !matches!(poll_fn(|cx| from_backend.poll_fill(cx, buffer, BODY_BYTES)).await, Ok(1..)) {
                break;
            }
        }
        // The client may have gone.
        let _ = to_client.shutdown().await;
    });
    let both = async {
        // Whichever side is left when its time is over ends with the tunnel.
        let _ = tokio::select! {
            () = &mut up => tokio::time::timeout(WRITE_TIMEOUT, down).await,
            () = &mut down => tokio::time::timeout(WRITE_TIMEOUT, up).await,
        };
    };
    tokio::select! {
        () = both => None,
        cause = recheck::ended(recheck) => Some(cause),
        () = draining => Some(Cause::Draining),
    }
}
