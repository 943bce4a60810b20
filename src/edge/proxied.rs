//! The lane through pingora-proxy: it carries a permitted request to a backend and the answer back. What goes upstream was
//! written before the framework saw the request; here are the choice of a server, the watch over the body, and what is
//! said when the backend fails. What must not leave in an answer is said by `reply::answer`.

use super::Lifecycle;
use super::exchange::{End, Exchange};
use super::http1::{BODY_READ_TIMEOUT, WRITE_TIMEOUT};
use super::ticket::Ticket;
use crate::forward::FieldSink;
use crate::reply::answer::{self, AnswerEdit, AnswerKind, AnswerName, AnswerView};
use crate::reply::{AnswerSink, Cause, Envelope, Refusal, UpstreamFault};
use crate::request::body::BodyScanner;
use crate::request::view::{Framing, Method};
use crate::request::{RequestFault, head};
use crate::telemetry::access_log::By;
use crate::telemetry::metrics::UpstreamError;
use crate::upstream::{FailedTry, NoServer};
use async_trait::async_trait;
use bytes::Bytes;
use http::Version;
use http::header::{self, HeaderName};
use pingora::http::ResponseHeader;
use pingora::modules::http::HttpModules;
use pingora::protocols::Digest;
use pingora::protocols::http::date::get_cached_date;
use pingora::proxy::{FailToProxy, ProxyHttp, Session};
use pingora::upstreams::peer::HttpPeer;
use pingora::{Error, ErrorSource, ErrorType, Result};
use smallvec::SmallVec;
use std::any::Any;
use std::os::fd::RawFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

pub(super) struct ProxiedLane {
    pub(super) lifecycle: Arc<Lifecycle>,
}

/// What a connection hands to the framework with a request.
pub(super) struct Handed {
    pub(super) ticket: Ticket,
    /// Why the exchange had to end: set before the framework's work on it is dropped.
    pub(super) ended: Arc<OnceLock<Cause>>,
}

/// One request on its way through the framework.
#[derive(Default)]
pub(super) struct Transit {
    ticket: Option<Box<Ticket>>,
    ended: Arc<OnceLock<Cause>>,
    interim_answers: usize,
    /// This attempt's own walk over the body: a retry sends the body again.
    scanner: Option<BodyScanner>,
    body_bytes: u64,
    /// Why the exchange was broken off by us.
    broken_off: Option<Cause>,
    /// The answer is tollgate's own.
    refused: bool,
}

impl Transit {
    fn ticket(&mut self) -> Result<&mut Ticket> {
        self.ticket.as_deref_mut().ok_or_else(no_ticket)
    }

    fn exchange(&mut self) -> Result<&mut Exchange> {
        Ok(&mut self.ticket()?.exchange)
    }

    /// Ends the exchange for a reason of ours; `fail_to_proxy` then says so to the client.
    fn break_off<T>(&mut self, cause: Cause) -> Result<T> {
        self.broken_off = Some(cause);
        Err(Error::new(ErrorType::Custom("broken off")))
    }
}

impl Drop for Transit {
    /// With a ticket only if the framework did not get to the end of the request.
    fn drop(&mut self) {
        if let (Some(ticket), Some(cause)) = (&mut self.ticket, self.ended.get()) {
            let refusal = Refusal::from(*cause);
            ticket.exchange.lost_its_token(refusal);
            ticket.exchange.refused(refusal);
        }
    }
}

/// Never made: `connection` hands over a ticket with each request.
fn no_ticket() -> Box<Error> {
    Error::explain(ErrorType::InternalError, "a request without a ticket")
}

#[async_trait]
impl ProxyHttp for ProxiedLane {
    type CTX = Transit;

    fn new_ctx(&self) -> Transit {
        Transit::default()
    }

    /// None: the default ones cost allocations for a compression that is never on.
    fn init_downstream_modules(&self, _modules: &mut HttpModules) {}

    /// The framework's name for it is "reuse"; it is how a connection hands something to a request, and `connection` does
    /// so for every single one.
    fn on_connection_reuse(&self, session: &mut Session, ctx: &mut Transit, handed: Box<dyn Any + Send + Sync>) {
        let Ok(handed) = handed.downcast::<Handed>() else { return };
        let Handed { ticket, ended } = *handed;
        // The wait for the next head is ours, so this only says whether there will be one.
        session.set_keepalive(ticket.keep_alive.then_some(60));
        // The framework's own defaults hold for a connection's first request only: set them each time.
        session.set_read_timeout(ticket.tunnel.is_none().then_some(BODY_READ_TIMEOUT));
        session.set_write_timeout(Some(WRITE_TIMEOUT));
        session.set_total_drain_timeout(Some(Duration::from_secs(5)));
        // HTTP/1.0 knows no interim answers.
        session.set_ignore_info_resp(ticket.http10);
        (ctx.ticket, ctx.ended) = (Some(Box::new(ticket)), ended);
    }

    async fn upstream_peer(&self, _session: &mut Session, ctx: &mut Transit) -> Result<Box<HttpPeer>> {
        let ticket = ctx.ticket()?;
        let scanner = ticket.body.clone();
        let exchange = &mut ticket.exchange;
        // Read once more, as it costs nothing here.
        if ticket.framing != Framing::Empty {
            exchange.streams_body();
        }
        let pick = match exchange.pick() {
            Err(NoServer::Busy) => exchange.queued().await,
            pick => pick,
        };
        let read = |peers| exchange.read_timeout(peers);
        let peers = exchange.snapshot.pool(exchange.pool);
        let peer = pick.and_then(|pick| {
            let peer = peers.and_then(|peers| peers.peer(&pick, Some(read(peers)).filter(|_| ticket.tunnel.is_none())));
            peer.ok_or(NoServer::Absent)
        });
        ctx.scanner = scanner;
        ctx.body_bytes = 0;
        match peer {
            Ok(peer) => Ok(Box::new(peer)),
            Err(why) => {
                let fault = ctx.exchange()?.no_server(why);
                ctx.break_off(Cause::Upstream(fault))
            }
        }
    }

    async fn connected_to_upstream(
        &self,
        _session: &mut Session,
        reused: bool,
        _peer: &HttpPeer,
        _fd: RawFd,
        _digest: Option<&Digest>,
        ctx: &mut Transit,
    ) -> Result<()> {
        ctx.exchange()?.connected(reused);
        Ok(())
    }

    /// Sees every piece of the body before it goes on, and stops what the backend must not get whole.
    async fn request_body_filter(
        &self,
        session: &mut Session,
        body: &mut Option<Bytes>,
        end_of_stream: bool,
        ctx: &mut Transit,
    ) -> Result<()> {
        if session.was_upgraded() {
            return Ok(());
        }
        // An empty last piece would be written as a second end of a chunked body.
        if end_of_stream && body.as_ref().is_some_and(Bytes::is_empty) {
            *body = None;
        }
        let piece = body.as_deref().unwrap_or_default();
        ctx.body_bytes += piece.len() as u64;
        let limit = ctx.exchange()?.body_limit();
        if limit.is_some_and(|limit| ctx.body_bytes > limit) {
            return ctx.break_off(Cause::Request(RequestFault::BodyTooLarge));
        }
        if let Some(scanner) = &mut ctx.scanner {
            let verdict = scanner.feed(piece).and_then(|()| if end_of_stream { scanner.finish() } else { Ok(()) });
            if let Err(fault) = verdict {
                return ctx.break_off(Cause::Request(RequestFault::Body(fault)));
            }
        }
        Ok(())
    }

    /// Refuses an answer whose end could be read in two ways, before any of it is passed on.
    async fn upstream_response_filter(
        &self,
        _session: &mut Session,
        answer: &mut ResponseHeader,
        ctx: &mut Transit,
    ) -> Result<()> {
        let interim = ctx.interim_answers;
        let ticket = ctx.ticket()?;
        ticket.exchange.answered(answer.status.as_u16());
        match answer::judge(&Received(answer), ticket.tunnel.is_some(), interim) {
            Ok(kind) => {
                ctx.interim_answers += usize::from(kind == AnswerKind::Interim);
                Ok(())
            }
            Err(fault) => ctx.break_off(Cause::Upstream(fault)),
        }
    }

    async fn response_filter(
        &self,
        session: &mut Session,
        answer: &mut ResponseHeader,
        ctx: &mut Transit,
    ) -> Result<()> {
        let ticket = ctx.ticket()?;
        let kind = AnswerKind::of(answer.status.as_u16());
        clean(answer, kind, ticket)?;
        if kind == AnswerKind::Interim {
            return Ok(());
        }
        if self.lifecycle.is_draining() {
            session.set_keepalive(None);
        }
        for (name, value) in ticket.own_fields() {
            answer.insert_header(name, value)?;
        }
        if ticket.http10 && answer.headers.contains_key(header::TRANSFER_ENCODING) {
            // HTTP/1.0 knows no chunks: the end of the connection ends the body.
            answer.remove_header(&header::TRANSFER_ENCODING);
            session.set_keepalive(None);
        }
        if kind == AnswerKind::Switching
            && let Some(tunnel) = &ticket.tunnel
        {
            tunnel.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// A connection that could not be made has carried nothing: any request may be tried on the next server.
    fn fail_to_connect(
        &self,
        _session: &mut Session,
        _peer: &HttpPeer,
        ctx: &mut Transit,
        mut error: Box<Error>,
    ) -> Box<Error> {
        let failure = FailedTry::Connect(kind_of(&error));
        let again = ctx.exchange().is_ok_and(|exchange| exchange.try_failed(failure, true));
        error.set_retry(again);
        error
    }

    /// Only a request that may be repeated, whole in memory, and of whose answer nothing has come.
    fn error_while_proxy(
        &self,
        _peer: &HttpPeer,
        session: &mut Session,
        mut error: Box<Error>,
        ctx: &mut Transit,
        reused: bool,
    ) -> Box<Error> {
        let cause = ctx.broken_off.or_else(|| cause_of(&error));
        let failed = match cause {
            Some(Cause::Upstream(_)) => Some(kind_of(&error)),
            _ => None,
        };
        let lost = matches!(failed, Some(UpstreamError::Closed | UpstreamError::Timeout));
        let whole = !session.as_ref().retry_buffer_truncated() && session.response_written().is_none();
        let repeatable = lost && whole && session.req_header().method.is_idempotent();
        let again = failed.is_some_and(|kind| {
            let failure = FailedTry::Exchange { kept: reused, error: kind };
            ctx.exchange().is_ok_and(|exchange| exchange.try_failed(failure, repeatable))
        });
        error.set_retry(again);
        error
    }

    async fn fail_to_proxy(&self, session: &mut Session, error: &Error, ctx: &mut Transit) -> FailToProxy {
        let gone = FailToProxy { error_code: 0, can_reuse_downstream: false };
        let Some(cause) = ctx.broken_off.or_else(|| cause_of(error)) else {
            if let Ok(exchange) = ctx.exchange() {
                exchange.client_gone();
            }
            return gone;
        };
        let refusal = Refusal::from(cause);
        if let Ok(exchange) = ctx.exchange() {
            exchange.refused(refusal);
        }
        if let Cause::Upstream(UpstreamFault::Broken | UpstreamFault::Malformed | UpstreamFault::TimedOut) = cause
            && let Ok(exchange) = ctx.exchange()
        {
            exchange.upstream_failed(kind_of(error));
        }
        // With a part of the answer out, only a broken connection tells the client that the rest is missing.
        if session.response_written().is_some_and(|answer| !answer.status.is_informational()) {
            return gone;
        }
        session.set_keepalive(None);
        ctx.refused = true;
        match write_refusal(session, refusal, ctx.ticket.as_deref()).await {
            Ok(()) => FailToProxy { error_code: refusal.status(), can_reuse_downstream: false },
            Err(_) => gone,
        }
    }

    /// The end of the exchange; dropping the ticket counts and logs it.
    async fn logging(&self, session: &mut Session, error: Option<&Error>, ctx: &mut Transit) {
        let Some(mut ticket) = ctx.ticket.take() else { return };
        let status = session.response_written().map_or(0, |answer| answer.status.as_u16());
        let by = if ctx.refused { By::Gate } else { By::Backend };
        ticket.exchange.over(End {
            status,
            by: Some(by).filter(|_| status != 0),
            bytes_received: session.body_bytes_read() as u64,
            bytes_sent: session.body_bytes_sent() as u64,
            failed: error.is_some(),
        });
    }

    /// `fail_to_proxy` has said what there is to say.
    fn suppress_error_log(&self, _session: &Session, _ctx: &Transit, _error: &Error) -> bool {
        true
    }

    /// The default one is the path and the query, token and all.
    fn request_summary(&self, _session: &Session, ctx: &Transit) -> String {
        ctx.ticket.as_ref().map_or_else(String::new, |ticket| format!("request {}", ticket.exchange.request_id))
    }
}

/// The framework's head of an answer.
struct Received<'a>(&'a ResponseHeader);

impl AnswerView for Received<'_> {
    fn status(&self) -> u16 {
        self.0.status.as_u16()
    }

    fn knows_chunks(&self) -> bool {
        self.0.version == Version::HTTP_11
    }

    fn known_fields(&self) -> impl Iterator<Item = (AnswerName, &[u8], &[u8])> {
        self.0.headers.iter().map(|(name, value)| {
            let name = name.as_str().as_bytes();
            (AnswerName::of(name), name, value.as_bytes())
        })
    }
}

/// Carries out what `reply::answer` says. The status line is tollgate's own, not the backend's text.
fn clean(answer: &mut ResponseHeader, kind: AnswerKind, ticket: &Ticket) -> Result<()> {
    answer.set_version(Version::HTTP_11);
    answer.set_reason_phrase(None)?;
    let view = Received(answer);
    let edits = answer::edits(&view, kind, &ticket.credentials(), ticket.response_headers());
    let mut removed: SmallVec<[HeaderName; 4]> = SmallVec::new();
    let mut replaced: Vec<(String, Vec<Vec<u8>>)> = Vec::new();
    for edit in edits {
        match edit {
            // What is no name is no field of this head either.
            AnswerEdit::Remove(name) => removed.extend(HeaderName::from_bytes(name).ok()),
            AnswerEdit::Replace(name, values) => replaced.push((name.to_owned(), values)),
        }
    }
    for name in removed {
        answer.remove_header(&name);
    }
    for (name, values) in replaced {
        answer.remove_header(name.as_str());
        for value in values {
            answer.append_header(name.clone(), value)?;
        }
    }
    Ok(())
}

/// A refusal as the framework writes it.
struct FrameworkAnswer {
    head: Result<ResponseHeader>,
    body: Bytes,
}

impl FieldSink for FrameworkAnswer {
    fn field(&mut self, name: &[u8], value: &[u8]) {
        if let Ok(head) = &mut self.head
            && let Err(error) = String::from_utf8(name.to_vec())
                .map_err(|_| Error::new(ErrorType::InvalidHTTPHeader))
                .and_then(|name| head.insert_header(name, value))
        {
            self.head = Err(error);
        }
    }

    /// The framework writes its own.
    fn connection_field(&mut self, _name: &[u8], _value: &[u8]) {}
}

impl AnswerSink for FrameworkAnswer {
    fn status(&mut self, status: u16, _phrase: &'static str) {
        self.head = ResponseHeader::build(status, Some(12));
    }

    fn body(&mut self, body: &[u8]) {
        self.body = Bytes::copy_from_slice(body);
    }
}

async fn write_refusal(session: &mut Session, refusal: Refusal, ticket: Option<&Ticket>) -> Result<()> {
    let ticket = ticket.ok_or_else(no_ticket)?;
    let date = get_cached_date();
    let envelope = Envelope {
        date: date.to_str().unwrap_or_default(),
        request_id: &ticket.exchange.request_id,
        cors: &ticket.exchange.snapshot.pipeline.cors,
        grant: ticket.grant,
        hsts: ticket.exchange.hsts(),
        limits: ticket.exchange.limit_fields(),
        location: None,
        basic: ticket.exchange.route().is_some_and(|route| route.basic),
        // Nothing of what another proxy asks about comes here.
        asker: None,
    };
    let mut answer = FrameworkAnswer { head: Err(no_ticket()), body: Bytes::new() };
    refusal.render(&envelope, &mut answer);
    session.write_response_header(Box::new(answer.head?), false).await?;
    let has_body = ticket.exchange.facts.method != Method::Head;
    session.write_response_body(has_body.then_some(answer.body), true).await
}

/// What a failure of the framework means to the client; `None` when there is no client any more.
fn cause_of(error: &Error) -> Option<Cause> {
    use ErrorType as T;
    let malformed_body = || {
        let root = error.root_cause().downcast_ref::<std::io::Error>();
        root.is_some_and(|error| error.kind() == std::io::ErrorKind::InvalidData)
    };
    match (error.esource(), error.etype()) {
        (ErrorSource::Upstream, T::ConnectTimedout | T::ReadTimedout | T::WriteTimedout | T::TLSHandshakeTimedout) => {
            Some(Cause::Upstream(UpstreamFault::TimedOut))
        }
        (ErrorSource::Upstream, T::InvalidHTTPHeader | T::H1Error) => Some(Cause::Upstream(UpstreamFault::Malformed)),
        (ErrorSource::Upstream, _) => Some(Cause::Upstream(UpstreamFault::Broken)),
        (ErrorSource::Downstream, T::ReadTimedout) => Some(Cause::Request(RequestFault::BodyTimeout)),
        (ErrorSource::Downstream, _) if malformed_body() => {
            Some(Cause::Request(RequestFault::Head(head::HeadFault::Framing)))
        }
        (ErrorSource::Downstream, _) => None,
        (ErrorSource::Internal | ErrorSource::Unset, _) => Some(Cause::Bug),
    }
}

fn kind_of(error: &Error) -> UpstreamError {
    use ErrorType as T;
    match error.etype() {
        T::ConnectTimedout => UpstreamError::ConnectTimeout,
        T::ConnectRefused | T::ConnectNoRoute | T::ConnectError | T::SocketError => UpstreamError::Connect,
        T::ReadTimedout | T::WriteTimedout => UpstreamError::Timeout,
        T::ConnectionClosed | T::ReadError | T::WriteError => UpstreamError::Closed,
        T::InvalidHTTPHeader | T::H1Error | T::Custom(_) => UpstreamError::Malformed,
        _ => UpstreamError::Other,
    }
}
