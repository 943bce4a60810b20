//! The main lane: pingora-proxy carries a permitted request to a backend and the answer back. What goes upstream was
//! written before the framework saw the request; here are the choice of a server, the watch over the body, what must not
//! leave in the answer, and what is said when the backend fails.

use super::{Lifecycle, Snapshot};
use crate::Now;
use crate::policy::Permit;
use crate::reply::answer::{self, AnswerKind, Credentials, Fate, UrlField};
use crate::reply::cors::CorsGrant;
use crate::reply::{Cause, Refusal, UpstreamFault};
use crate::request::body::BodyScanner;
use crate::request::head;
use crate::request::view::Method;
use crate::request::{self};
use crate::telemetry::access_log::Entry;
use crate::telemetry::metrics::{Guard, TokenSource, UpstreamError};
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
use std::borrow::Cow;
use std::net::IpAddr;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often one request is tried, on one server after the other.
pub(super) const MAX_ATTEMPTS: usize = 3;
/// Pause that a client may make within a body.
const BODY_READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Interim answers to one request. A backend that sends more keeps a client busy and never answers.
const MAX_INTERIM_ANSWERS: usize = 64;
/// Time for the backend or the client to take a piece of body.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// The right to use the main lane, with all that is needed until the log line. Made by `connection` from a plan, so
/// that no request gets here without a permit.
pub(super) struct Ticket {
    pub(super) route: Option<usize>,
    pub(super) permit: Permit,
    pub(super) body: Option<BodyScanner>,
    pub(super) keep_alive: bool,
    pub(super) http10: bool,
    /// The token came in the query, and the client is to be told.
    pub(super) deprecated: bool,
    pub(super) method: Method,
    /// The method stands in X-HTTP-Method-Override; the request line says POST.
    pub(super) overridden: bool,
    pub(super) source: TokenSource,
    pub(super) client: Option<IpAddr>,
    /// The request's head as it came; the places below are in it.
    pub(super) head: Bytes,
    /// Must not leave in the answer.
    pub(super) token: Option<OwnToken>,
    pub(super) log: Option<LogFacts>,
    /// Whether a page may read what is said when the backend fails.
    pub(super) grant: CorsGrant,
    pub(super) request_id: String,
    /// Raised when the backend has agreed to a WebSocket. `None`: the client asked for none.
    pub(super) tunnel: Option<Arc<AtomicBool>>,
    pub(super) now: Now,
    pub(super) started: Instant,
    pub(super) _in_flight: Guard,
    pub(super) snapshot: Arc<Snapshot>,
}

/// What of the request's head only the log needs.
pub(super) struct LogFacts {
    pub(super) target: Place,
    pub(super) user_agent: Place,
}

/// Where in the request's head something stands: cheaper than a slice that keeps the head alive by itself.
#[derive(Clone, Copy)]
pub(super) struct Place {
    start: u32,
    length: u32,
}

impl Place {
    /// Takes a part of the head.
    pub(super) fn of(part: &[u8], head: &[u8]) -> Self {
        let start = part.as_ptr().addr().wrapping_sub(head.as_ptr().addr());
        // What is no part of a head, which the configuration keeps below 1 MiB, is nowhere.
        Self { start: u32::try_from(start).unwrap_or(u32::MAX), length: u32::try_from(part.len()).unwrap_or(u32::MAX) }
    }

    fn within(self, head: &[u8]) -> &[u8] {
        head.get(self.start as usize..).and_then(|rest| rest.get(..self.length as usize)).unwrap_or_default()
    }
}

/// The token of a request. Its type prints nothing, and it lives as long as the exchange.
pub(super) enum OwnToken {
    InHead(Place),
    /// It was written with escapes.
    Decoded(Box<[u8]>),
}

impl OwnToken {
    pub(super) fn of(token: Cow<'_, [u8]>, head: &[u8]) -> Self {
        match token {
            Cow::Borrowed(token) => Self::InHead(Place::of(token, head)),
            Cow::Owned(token) => Self::Decoded(token.into()),
        }
    }
}

impl Ticket {
    fn token(&self) -> Option<&[u8]> {
        self.token.as_ref().map(|token| match token {
            OwnToken::InHead(place) => place.within(&self.head),
            OwnToken::Decoded(token) => token,
        })
    }
}

pub(super) struct MainLane {
    pub(super) lifecycle: Arc<Lifecycle>,
}

/// One request on the main lane.
#[derive(Default)]
pub(super) struct Exchange {
    ticket: Option<Box<Ticket>>,
    attempts: usize,
    interim_answers: usize,
    /// This attempt's own walk over the body: a retry sends the body again.
    scanner: Option<BodyScanner>,
    body_bytes: u64,
    asked_upstream: Option<Instant>,
    /// Why the exchange was broken off by us.
    broken_off: Option<Cause>,
    reason: Option<&'static str>,
}

impl Exchange {
    fn ticket(&self) -> Result<&Ticket> {
        self.ticket.as_deref().ok_or_else(|| Error::explain(ErrorType::InternalError, "a request without a ticket"))
    }

    /// Ends the exchange for a reason of ours; `fail_to_proxy` then says so to the client.
    fn break_off<T>(&mut self, cause: Cause) -> Result<T> {
        self.broken_off = Some(cause);
        Err(Error::new(ErrorType::Custom("broken off")))
    }
}

#[async_trait]
impl ProxyHttp for MainLane {
    type CTX = Exchange;

    fn new_ctx(&self) -> Exchange {
        Exchange::default()
    }

    /// None: the default ones cost allocations for a compression that is never on.
    fn init_downstream_modules(&self, _modules: &mut HttpModules) {}

    /// The framework's name for it is "reuse"; it is how a connection hands something to a request, and `connection` does
    /// so for every single one.
    fn on_connection_reuse(&self, session: &mut Session, ctx: &mut Exchange, handed: Box<dyn Any + Send + Sync>) {
        let Ok(ticket) = handed.downcast::<Ticket>() else { return };
        // The wait for the next head is ours, so this only says whether there will be one.
        session.set_keepalive(ticket.keep_alive.then_some(60));
        // The framework's own defaults hold for a connection's first request only: set them each time.
        session.set_read_timeout(ticket.tunnel.is_none().then_some(BODY_READ_TIMEOUT));
        session.set_write_timeout(Some(WRITE_TIMEOUT));
        session.set_total_drain_timeout(Some(Duration::from_secs(5)));
        // HTTP/1.0 knows no interim answers.
        session.set_ignore_info_resp(ticket.http10);
        ctx.ticket = Some(ticket);
    }

    async fn upstream_peer(&self, _session: &mut Session, ctx: &mut Exchange) -> Result<Box<HttpPeer>> {
        let ticket = ctx.ticket()?;
        let upstream = ticket.snapshot.upstream(ticket.route);
        let peer = upstream.and_then(|peers| peers.peer(peers.upstream.next()?, ticket.tunnel.is_some()));
        if ctx.attempts > 0
            && let Some(upstream) = upstream
        {
            upstream.upstream.retried();
        }
        ctx.scanner = ticket.body.clone();
        ctx.attempts += 1;
        ctx.body_bytes = 0;
        ctx.asked_upstream = Some(Instant::now());
        match peer {
            Some(peer) => Ok(Box::new(peer)),
            None => ctx.break_off(Cause::Upstream(UpstreamFault::Absent)),
        }
    }

    async fn connected_to_upstream(
        &self,
        _session: &mut Session,
        reused: bool,
        _peer: &HttpPeer,
        _fd: RawFd,
        _digest: Option<&Digest>,
        ctx: &mut Exchange,
    ) -> Result<()> {
        let ticket = ctx.ticket()?;
        if let Some(upstream) = ticket.snapshot.upstream(ticket.route) {
            upstream.upstream.connected(reused);
        }
        Ok(())
    }

    /// Sees every piece of the body before it goes on, and stops what the backend must not get whole.
    async fn request_body_filter(
        &self,
        session: &mut Session,
        body: &mut Option<Bytes>,
        end_of_stream: bool,
        ctx: &mut Exchange,
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
        let limit = ctx.ticket()?.snapshot.pipeline.rules.limits.body_bytes;
        if limit.is_some_and(|limit| ctx.body_bytes > limit) {
            return ctx.break_off(Cause::Request(request::Fault::BodyTooLarge));
        }
        if let Some(scanner) = &mut ctx.scanner {
            let verdict = scanner.feed(piece).and_then(|()| if end_of_stream { scanner.finish() } else { Ok(()) });
            if let Err(fault) = verdict {
                return ctx.break_off(Cause::Request(request::Fault::Body(fault)));
            }
        }
        Ok(())
    }

    /// Refuses an answer whose end could be read in two ways, before any of it is passed on.
    async fn upstream_response_filter(
        &self,
        _session: &mut Session,
        answer: &mut ResponseHeader,
        ctx: &mut Exchange,
    ) -> Result<()> {
        let asked = ctx.asked_upstream.take();
        let ticket = ctx.ticket()?;
        let wants_tunnel = ticket.tunnel.is_some();
        if let (Some(upstream), Some(asked)) = (ticket.snapshot.upstream(ticket.route), asked) {
            upstream.answered(asked);
        }
        let mut lengths = answer.headers.get_all(header::CONTENT_LENGTH).iter();
        let plain_length = lengths.next().is_none_or(|value| head::content_length(value.as_bytes()).is_ok());
        let mut codings = answer.headers.get_all(header::TRANSFER_ENCODING).iter();
        let plain_coding = codings.next().is_none_or(|value| value.as_bytes().eq_ignore_ascii_case(b"chunked"));
        let doubtful = !plain_length || !plain_coding || lengths.next().is_some() || codings.next().is_some();
        // Chunks came with HTTP/1.1: who sends them under the older name may mean something else.
        let doubtful =
            doubtful || (answer.version != Version::HTTP_11 && answer.headers.contains_key(header::TRANSFER_ENCODING));
        let kind = AnswerKind::of(answer.status.as_u16());
        let unasked = kind == AnswerKind::Switching && !wants_tunnel;
        ctx.interim_answers += usize::from(kind == AnswerKind::Interim);
        if doubtful || unasked || ctx.interim_answers > MAX_INTERIM_ANSWERS {
            return ctx.break_off(Cause::Upstream(UpstreamFault::Malformed));
        }
        Ok(())
    }

    async fn response_filter(
        &self,
        session: &mut Session,
        answer: &mut ResponseHeader,
        ctx: &mut Exchange,
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
        answer.insert_header("X-Request-Id", ticket.request_id.as_str())?;
        if ticket.deprecated {
            answer.insert_header("Deprecation", "true")?;
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
        ctx: &mut Exchange,
        mut error: Box<Error>,
    ) -> Box<Error> {
        error.set_retry(ctx.attempts < MAX_ATTEMPTS);
        error
    }

    /// Only a request that may be repeated, whole in memory, and that found its pooled connection closed.
    fn error_while_proxy(
        &self,
        _peer: &HttpPeer,
        session: &mut Session,
        mut error: Box<Error>,
        ctx: &mut Exchange,
        reused: bool,
    ) -> Box<Error> {
        let repeatable = session.req_header().method.is_idempotent() && !session.as_ref().retry_buffer_truncated();
        if repeatable && ctx.broken_off.is_none() && ctx.attempts < MAX_ATTEMPTS && session.response_written().is_none()
        {
            error.retry.decide_reuse(reused);
        } else {
            error.set_retry(false);
        }
        error
    }

    async fn fail_to_proxy(&self, session: &mut Session, error: &Error, ctx: &mut Exchange) -> FailToProxy {
        let gone = FailToProxy { error_code: 0, can_reuse_downstream: false };
        let Some(cause) = ctx.broken_off.or_else(|| cause_of(error)) else {
            ctx.reason = Some("client_gone");
            return gone;
        };
        let refusal = Refusal::from(cause);
        ctx.reason = Some(refusal.reason());
        if let Some(ticket) = &ctx.ticket {
            if let Some(result) = refusal.auth_result() {
                ticket.snapshot.pipeline.metrics.auth(result, refusal.reason(), ticket.source);
            }
            if let (Cause::Upstream(_), Some(upstream)) = (cause, ticket.snapshot.upstream(ticket.route)) {
                upstream.failed(kind_of(error), &ticket.request_id);
            }
        }
        // With a part of the answer out, only a broken connection tells the client that the rest is missing.
        if session.response_written().is_some_and(|answer| !answer.status.is_informational()) {
            return gone;
        }
        session.set_keepalive(None);
        match write_refusal(session, refusal, ctx.ticket.as_deref()).await {
            Ok(()) => FailToProxy { error_code: refusal.status(), can_reuse_downstream: false },
            Err(_) => gone,
        }
    }

    async fn logging(&self, session: &mut Session, error: Option<&Error>, ctx: &mut Exchange) {
        let Some(ticket) = ctx.ticket.take() else { return };
        let snapshot = &ticket.snapshot;
        let took = ticket.started.elapsed();
        let status = session.response_written().map_or(0, |answer| answer.status.as_u16());
        snapshot.count_index(ticket.route, ticket.method, status, took);
        let Some(facts) = &ticket.log else { return };
        let principal = ticket.permit.principal();
        let token = principal.map(|principal| principal.token());
        snapshot.log.write(&Entry {
            unix_ms: ticket.now.unix_ms,
            request_id: &ticket.request_id,
            client: ticket.client,
            method: ticket.method.as_str().as_bytes(),
            overridden: ticket.overridden,
            target: facts.target.within(&ticket.head),
            route: snapshot.route_name(ticket.route),
            status,
            reason: ctx.reason.unwrap_or(if error.is_some() { "failed" } else { "ok" }),
            source: ticket.source.as_str(),
            token: token.as_ref().map(|token| token.as_str()),
            user: principal.map(|principal| principal.user()),
            upstream: snapshot.upstream(ticket.route).map(|peers| peers.upstream.name()),
            duration: took,
            bytes_received: session.body_bytes_read() as u64,
            bytes_sent: session.body_bytes_sent() as u64,
            user_agent: facts.user_agent.within(&ticket.head),
        });
    }

    /// `fail_to_proxy` has said what there is to say.
    fn suppress_error_log(&self, _session: &Session, _ctx: &Exchange, _error: &Error) -> bool {
        true
    }

    /// The default one is the path and the query, token and all.
    fn request_summary(&self, _session: &Session, ctx: &Exchange) -> String {
        ctx.ticket.as_ref().map_or_else(String::new, |ticket| format!("request {}", ticket.request_id))
    }
}

/// Takes out what ends here, what servers behind the gateway say to each other, and credentials in URLs. Looks at every
/// field once: most answers have nothing to take out. The status line is tollgate's own, not the backend's text.
fn clean(answer: &mut ResponseHeader, kind: AnswerKind, ticket: &Ticket) -> Result<()> {
    answer.set_version(Version::HTTP_11);
    answer.set_reason_phrase(None)?;
    let mut unwanted: SmallVec<[HeaderName; 4]> = SmallVec::new();
    let mut urls: SmallVec<[UrlField; 4]> = SmallVec::new();
    let mut nominates = false;
    for name in answer.headers.keys() {
        match answer::fate(name.as_str(), kind) {
            Fate::Keep => {}
            Fate::Drop => unwanted.push(name.clone()),
            Fate::Clean(field) => urls.push(field),
            Fate::Nominates => nominates = true,
        }
    }
    if nominates && kind != AnswerKind::Switching {
        let options =
            answer.headers.get_all(header::CONNECTION).iter().flat_map(|value| value.as_bytes().split(|b| *b == b','));
        let names = options.filter_map(|option| HeaderName::from_bytes(option.trim_ascii()).ok());
        unwanted.extend(names.filter(|name| answer::may_nominate(name.as_str())));
        // For a final answer, the framework writes its own.
        unwanted.push(header::CONNECTION);
    }
    for name in unwanted {
        answer.remove_header(&name);
    }
    if urls.is_empty() {
        return Ok(());
    }
    let rules = &ticket.snapshot.pipeline.rules;
    let route = ticket.route.and_then(|index| rules.routes.get(index));
    let credentials = Credentials {
        names: &rules.names,
        token: ticket.token(),
        fragments_pass: route.is_some_and(|route| route.is_web_page()),
    };
    for field in urls {
        let values = answer.headers.get_all(field.name());
        let clean: SmallVec<[Option<Vec<u8>>; 2]> =
            values.iter().map(|value| answer::without_credentials(value.as_bytes(), field, &credentials)).collect();
        if clean.iter().all(Option::is_none) {
            continue;
        }
        let values: SmallVec<[Vec<u8>; 2]> =
            values.iter().zip(clean).map(|(value, clean)| clean.unwrap_or_else(|| value.as_bytes().to_vec())).collect();
        answer.remove_header(field.name());
        for value in values {
            answer.append_header(field.name(), value)?;
        }
    }
    Ok(())
}

async fn write_refusal(session: &mut Session, refusal: Refusal, ticket: Option<&Ticket>) -> Result<()> {
    let mut head = ResponseHeader::build(refusal.status(), Some(12))?;
    // First, as in the refusals that `connection` writes: the order of fields must not tell which rule was hit.
    head.insert_header("Date", get_cached_date())?;
    for (name, value) in refusal.fields() {
        head.insert_header(name, value)?;
    }
    if let Some(ticket) = ticket {
        for (name, value) in ticket.snapshot.pipeline.cors.fields(ticket.grant) {
            head.insert_header(name, value)?;
        }
    }
    head.insert_header("X-Request-Id", ticket.map_or("", |ticket| &ticket.request_id))?;
    session.write_response_header(Box::new(head), false).await?;
    let has_body = ticket.is_none_or(|ticket| ticket.method != Method::Head);
    let body = has_body.then(|| Bytes::from(refusal.body()));
    session.write_response_body(body, true).await
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
        (ErrorSource::Downstream, T::ReadTimedout) => Some(Cause::Request(request::Fault::BodyTimeout)),
        (ErrorSource::Downstream, _) if malformed_body() => {
            Some(Cause::Request(request::Fault::Head(head::HeadFault::Framing)))
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
