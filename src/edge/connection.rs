//! The life of one client connection: read a head, ask the pipeline, then either write the refusal or hand the request
//! to a lane with a head that holds exactly what the pipeline decided. This is the one place where requests come in,
//! whichever lane they go out by.

use super::client::{After, ClientStream, Head, HeadLimits};
use super::crowd::Crowd;
use super::exchange::{End, Exchange};
use super::listener::{ListenerState, Welcomed};
use super::proxied::{Handed, ProxiedLane};
use super::recheck::{self, Recheck};
use super::socket::Socket;
use super::ticket::{OwnToken, Ticket};
use super::verdict::Allowed;
use super::workers::Serve;
use super::{Lifecycle, Snapshot, http1, http2, verdict};
use crate::forward::{Http1Head, Plan, request_id};
use crate::hex;
use crate::identity::Mode;
use crate::pipeline::{Admission, Pending, Verdict};
use crate::reply::cors::CorsGrant;
use crate::reply::{Cause, Envelope, Http1Answer, Refusal};
use crate::request::origin::{Arrival, Origin};
use crate::request::verdict::VerdictFault;
use crate::request::view::{FieldKind, Framing, Method, RequestView, Version};
use crate::request::{RequestFault, head};
use crate::telemetry::access_log::By;
use crate::telemetry::metrics::ConnectionLimit;
use crate::telemetry::outage::LogThrottle;
use arc_swap::ArcSwap;
use bytes::{Bytes, BytesMut};
use pingora::apps::HttpServerApp as _;
use pingora::protocols::http::{ServerSession, date::get_cached_date};
use pingora::proxy::HttpProxy;
use pingora::server::ShutdownWatch;
use std::pin::pin;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::Instant;
use tokio::select;
use tokio::time::sleep;

/// Serves the API listeners.
pub(super) struct Gate {
    pub(super) snapshot: Arc<ArcSwap<Snapshot>>,
    /// The framework's lane in place of our own: only for tests that compare the two.
    pub(super) framework: Option<Arc<HttpProxy<ProxiedLane>>>,
    pub(super) lifecycle: Arc<Lifecycle>,
    pub(super) crowd: Arc<Crowd>,
    /// One line for many HTTP/2 connections that were closed.
    pub(super) floods: LogThrottle,
    /// Tells the framework's lane of the end of the process.
    pub(super) shutdown: ShutdownWatch,
}

impl Serve for Gate {
    async fn serve(self: Arc<Self>, socket: Socket, listener: Arc<ListenerState>, _guard: impl Send + 'static) {
        let (metrics, limits) = {
            let snapshot = self.snapshot.load();
            (Arc::clone(&snapshot.metrics), snapshot.settings.connections)
        };
        let _open = metrics.connection_opened();
        if !self.crowd.has_room(limits, metrics.open_connections()) {
            return metrics.listeners().limited(ConnectionLimit::Total);
        }
        let welcomed = match listener.is_plain() {
            true => {
                let arrival = Arrival::of(socket.peer());
                Some(Welcomed { socket, arrival, http2: false })
            }
            // In a box: every connection would pay for its size.
            false => Box::pin(listener.welcome(socket, Arc::clone(&metrics))).await,
        };
        let client = welcomed.as_ref().and_then(|welcomed| welcomed.arrival.nearest());
        let _present = match self.crowd.enter(limits, client) {
            Ok(present) => present,
            Err(limit) => return metrics.listeners().limited(limit),
        };
        match welcomed {
            None => {}
            Some(Welcomed { socket, arrival, http2: true }) => {
                Box::pin(http2::serve(self, socket, BytesMut::new(), arrival)).await;
            }
            Some(Welcomed { socket, arrival, http2: false }) => {
                if let Some((socket, ahead, arrival)) = self.converse(socket, arrival, listener.settings.http2).await {
                    Box::pin(http2::serve(self, socket, ahead, arrival)).await;
                }
            }
        }
    }
}

impl Gate {
    /// Requests and their answers, one after the other. With `http2`, a connection that begins with its preface comes back.
    pub(super) async fn converse(
        &self,
        socket: Socket,
        arrival: Arrival,
        mut http2: bool,
    ) -> Option<(Socket, BytesMut, Arrival)> {
        let mut client = ClientStream::new(socket, arrival);
        let mut draining = pin!(self.lifecycle.draining());
        loop {
            let head = client.read_head(|| self.snapshot.load().head_limits(), draining.as_mut()).await;
            // Never before the wait: it may take minutes, and what a reload closed meanwhile must be closed.
            let snapshot = self.snapshot.load_full();
            let (bytes, fault) = match head {
                Head::Complete(bytes) if http2 && bytes == http2::PREFACE_HEAD => return client.into_parts(&bytes),
                Head::Complete(bytes) => {
                    let fault = snapshot.head_limits().judge(&bytes);
                    (bytes, fault)
                }
                Head::Closed => return None,
                fault => (Bytes::new(), Some(fault)),
            };
            http2 = false;
            let mut exchange = Exchange::begin(snapshot, client.arrival(), bytes.clone());
            exchange.asker = client.arrival().verdict.as_ref().map(|rules| verdict::asker(rules));
            exchange.is_last = client.is_last(exchange.snapshot.settings.connections.requests);
            let after = match fault {
                None => self.exchange(&mut client, bytes, exchange).await,
                Some(fault) => refuse_unread(&mut client, exchange, unread(&fault)).await,
            };
            client.end(after).await;
            if after != After::Next {
                return None;
            }
        }
    }

    pub(super) fn head_limits(&self) -> HeadLimits {
        self.snapshot.load().head_limits()
    }

    /// A connection is ended because of its frames.
    pub(super) fn flooded(&self, frame: &'static str, arrival: &Arrival) {
        self.snapshot.load().metrics.listeners().http2_flood(frame);
        if let Some(suppressed) = self.floods.due(Instant::now()) {
            let peer = arrival.nearest().map_or_else(|| "a Unix socket".to_owned(), |ip| ip.to_string());
            log::warn!(
                "an HTTP/2 connection from {peer} was closed: {frame} flood ({suppressed} more since the last line)"
            );
        }
    }
}

/// Why a head that could not be taken whole is refused.
fn unread(head: &Head) -> RequestFault {
    match head {
        Head::TooLarge => RequestFault::HeaderTooLarge,
        Head::TargetTooLong => RequestFault::TargetTooLong,
        Head::TooSlow => RequestFault::HeaderTimeout,
        Head::Malformed(fault) => (*fault).into(),
        Head::Complete(_) | Head::Closed => RequestFault::Head(head::HeadFault::RequestLine),
    }
}

/// What was decided on a request, with all that is needed to carry it out: neither the request's view nor the pipeline's
/// own state waits for a backend.
enum Judged {
    Permitted {
        head: Vec<u8>,
        ticket: Ticket,
    },
    Refused(Refused),
    /// Another proxy may forward it.
    Allowed(Allowed),
    /// The head is no request.
    Unreadable(Box<Exchange>, RequestFault),
    /// The client has gone before its turn at the token store.
    Gone(Box<Exchange>),
}

/// An answer of tollgate's own.
struct Refused {
    exchange: Box<Exchange>,
    refusal: Refusal,
    answer: Vec<u8>,
    close: bool,
    /// What the client still sends.
    body: Framing,
}

/// A request that waits for the token store.
struct Undecided<'r> {
    gate: &'r Gate,
    view: RequestView<'r>,
    origin: Origin<'r>,
    exchange: Box<Exchange>,
    pending: Pending<'r>,
}

impl Gate {
    /// One request and its answer. It is counted and logged when this comes back.
    async fn exchange(&self, client: &mut ClientStream, bytes: Bytes, exchange: Box<Exchange>) -> After {
        let snapshot = Arc::clone(&exchange.snapshot);
        let judged = match self.judge(client.arrival(), &snapshot, &bytes, exchange) {
            Ok(judged) => judged,
            // In a box of its own, which few requests need: every connection pays for the largest state of this.
            Err(undecided) => Box::pin(undecided.verdict(client)).await,
        };
        match judged {
            Judged::Permitted { head, mut ticket } => {
                client.begin_body(ticket.framing, ticket.tunnel.clone());
                match &self.framework {
                    None => http1::carry(client, &head, &mut ticket, self).await,
                    Some(lane) => Box::pin(self.proxied(lane, client, head, ticket)).await,
                }
            }
            Judged::Refused(refused) => refuse(client, refused).await,
            Judged::Allowed(allowed) => allowed.tell(client).await,
            Judged::Unreadable(exchange, fault) => refuse_unread(client, exchange, fault).await,
            Judged::Gone(mut exchange) => {
                exchange.client_gone();
                exchange.over(End { status: 0, by: None, bytes_received: 0, bytes_sent: 0, failed: true });
                After::Drop
            }
        }
    }

    /// Asks the pipeline. `Err`: the token store has to be waited for.
    fn judge<'r>(
        &'r self,
        arrival: &Arrival,
        snapshot: &'r Snapshot,
        bytes: &'r [u8],
        mut exchange: Box<Exchange>,
    ) -> Result<Judged, Box<Undecided<'r>>> {
        let mut view = match head::parse(bytes) {
            Ok(view) => view,
            Err(fault) => return Ok(Judged::Unreadable(exchange, fault.into())),
        };
        let mut unclear = None;
        if let Some(rules) = &arrival.verdict {
            unclear = verdict::take_question(&mut view, rules, &snapshot.pipeline.rules, &mut exchange);
        }
        let origin = Origin::of(&view, arrival, &snapshot.pipeline.rules.trusted_proxies);
        let id = request_id(&view).map_or_else(new_request_id, str::to_owned);
        exchange.is_asked(&view, origin.client, id);
        if let Some(fault) = unclear {
            return Ok(self.settle(exchange, &view, &origin, Verdict::Refuse(Cause::Request(fault).into())));
        }
        if let Some(port) = arrival.redirect {
            let cause = snapshot.pipeline.redirect(&view);
            exchange.redirects(&view, port);
            return Ok(self.settle(exchange, &view, &origin, Verdict::Refuse(cause.into())));
        }
        match snapshot.pipeline.admit(&view, &origin, exchange.now, Mode::Serve) {
            Admission::Decided(verdict, facts) => {
                exchange.learned(facts);
                Ok(self.settle(exchange, &view, &origin, verdict))
            }
            Admission::Waiting(pending) => {
                // The client may be gone before the store answers.
                exchange.learned(pending.facts().clone());
                exchange.asks_store();
                Err(Box::new(Undecided { gate: self, view, origin, exchange, pending }))
            }
        }
    }

    /// The framework finds a backend and moves the bytes.
    async fn proxied(
        &self,
        lane: &Arc<HttpProxy<ProxiedLane>>,
        client: &mut ClientStream,
        mut head: Vec<u8>,
        ticket: Ticket,
    ) -> After {
        // The framework tells by this what the client understands.
        if ticket.http10
            && let Some(end) = memchr::memmem::find(&head, b"1.1\r\n")
        {
            head[end + 2] = b'0';
        }
        let recheck = Recheck::of(&ticket, &self.snapshot);
        let ended = Arc::new(OnceLock::new());
        let watched = async {
            sleep(recheck::AFTER).await;
            let cause = recheck::ended(recheck).await;
            // Before the framework's work is dropped, which closes both ends.
            let _ = ended.set(cause);
        };
        let mut session = ServerSession::new_http1(Box::new(client.take()));
        session.set_connection_user_context(Some(Box::new(Handed { ticket, ended: Arc::clone(&ended) })));
        session.set_pipelined_prefix(BytesMut::from(Bytes::from(head)));
        let reusable = select! {
            biased;
            reusable = lane.process_new_http(session, &self.shutdown) => reusable,
            () = watched => None,
        };
        let Some(reusable) = reusable else { return After::Drop };
        let (stream, _) = reusable.consume();
        match stream.into_any().downcast::<ClientStream>() {
            Ok(reusable) => {
                *client = *reusable;
                After::Next
            }
            Err(_) => After::Drop,
        }
    }
}

/// Answers a request whose head could not be read, and closes the connection. The response may not reach the client.
async fn refuse_unread(client: &mut ClientStream, mut exchange: Box<Exchange>, fault: RequestFault) -> After {
    exchange.request_id = new_request_id();
    let refusal = Refusal::from(Cause::Request(fault));
    let read = if exchange.head.is_empty() { client.unread() } else { &exchange.head };
    let grant = exchange.snapshot.pipeline.cors.grant(head::origins_of_unparsed(read));
    let bytes = render(refusal, head::asks_for_head(read), true, &exchange, grant);
    // The client may have closed the connection; the request is logged either way.
    let _ = client.write(&bytes).await;
    exchange.refused(refusal);
    exchange.over(End {
        status: refusal.status(),
        by: Some(By::Gate),
        bytes_received: 0,
        bytes_sent: bytes.len() as u64,
        failed: false,
    });
    After::Close
}

impl Undecided<'_> {
    /// Who has gone before its turn at the token store leaves it to others. What is looked up is waited for in any case: a guess
    /// counts, whether its client waits for the answer or not.
    async fn verdict(self: Box<Self>, client: &mut ClientStream) -> Judged {
        let Self { gate, view, origin, mut exchange, mut pending } = *self;
        let gone = async {
            if let Some((mut reader, ..)) = client.split() {
                // Who said that this is its last request may close its side and wait for the answer.
                reader.wait_for_end(!view.keep_alive).await;
            }
        };
        select! {
            biased;
            () = pending.turn() => {}
            () = gone => return Judged::Gone(exchange),
        }
        let (verdict, facts) = pending.verdict().await;
        exchange.learned(facts);
        gate.settle(exchange, &view, &origin, verdict)
    }
}

impl Gate {
    /// Writes down what a verdict means for this request.
    fn settle(
        &self,
        mut exchange: Box<Exchange>,
        view: &RequestView<'_>,
        origin: &Origin<'_>,
        verdict: Verdict<'_>,
    ) -> Judged {
        match verdict {
            Verdict::Refuse(refusal) => {
                let close = refusal.must_close()
                    || !view.keep_alive
                    || !ClientStream::can_skip(view.body, view.expects_continue)
                    || exchange.is_last
                    || self.lifecycle.is_draining();
                let grant = grant(view, &exchange.snapshot);
                let head_only = exchange.asker.map_or(view.method == Method::Head, |asker| asker.head_only);
                let answer = render(refusal, head_only, close, &exchange, grant);
                Judged::Refused(Refused { exchange, refusal, answer, close, body: view.body })
            }
            Verdict::Forward(plan) if exchange.asker.is_some() => match plan.keeps_target() {
                true => {
                    let close = !view.keep_alive || exchange.is_last || self.lifecycle.is_draining();
                    Judged::Allowed(Allowed::new(exchange, &plan, close))
                }
                false => {
                    let fault = RequestFault::Verdict(VerdictFault::Change);
                    self.settle(exchange, view, origin, Verdict::Refuse(Cause::Request(fault).into()))
                }
            },
            Verdict::Forward(plan) => {
                let mut head = Vec::with_capacity(exchange.head.len() + 256);
                let (rules, sink) = (&exchange.snapshot.pipeline.forward, &mut Http1Head(&mut head));
                let dropped = plan.write_head(view, rules, origin, &exchange.request_id, exchange.trace.as_ref(), sink);
                exchange.permitted(view, &plan, dropped);
                Judged::Permitted { head, ticket: ticket(exchange, plan, view) }
            }
        }
    }
}

/// Answers a request that was refused.
async fn refuse(client: &mut ClientStream, refused: Refused) -> After {
    let Refused { mut exchange, refusal, answer, close, body } = refused;
    let written = client.write(&answer).await.is_ok();
    exchange.refused(refusal);
    exchange.over(End {
        status: refusal.status(),
        by: Some(By::Gate),
        bytes_received: exchange.head.len() as u64,
        bytes_sent: answer.len() as u64,
        failed: false,
    });
    // Counted and logged before the rest of its body is waited for.
    drop(exchange);
    if close || !written || !client.skip_body(body).await { After::Close } else { After::Next }
}

/// The right to use a lane: the one place where a ticket is made, from a plan.
fn ticket(exchange: Box<Exchange>, plan: Plan<'_>, view: &RequestView<'_>) -> Ticket {
    let from_query = plan.from_query();
    Ticket {
        token: plan.presented.map(|presented| OwnToken::of(presented.value, &exchange.head)),
        grant: grant(view, &exchange.snapshot),
        body: plan.body,
        method: view.method,
        framing: view.body,
        expects_continue: view.expects_continue,
        keep_alive: view.keep_alive && !exchange.is_last,
        http10: view.version == Version::Http10,
        deprecated: from_query && exchange.snapshot.pipeline.forward.deprecate_query_token,
        tunnel: view.websocket.then(|| Arc::new(AtomicBool::new(false))),
        _permit: plan.permit,
        exchange,
    }
}

pub(super) fn render(refusal: Refusal, head_only: bool, close: bool, exchange: &Exchange, grant: CorsGrant) -> Vec<u8> {
    let date = get_cached_date();
    let date = date.to_str().unwrap_or_default();
    let mut out = Vec::with_capacity(384);
    let cors = &exchange.snapshot.pipeline.cors;
    let location = (refusal.cause() == Cause::Redirect).then(|| exchange.elsewhere()).flatten();
    let envelope = Envelope {
        date,
        request_id: &exchange.request_id,
        cors,
        grant,
        hsts: exchange.hsts(),
        limits: exchange.limit_fields(),
        location: location.as_deref(),
        basic: exchange.route().is_some_and(|route| route.basic),
        asker: exchange.asker.map(|asker| asker.source),
    };
    refusal.render(&envelope, &mut Http1Answer { out: &mut out, head_only, close });
    out
}

/// Whether the page that sent a request may read an answer of tollgate's own.
fn grant(view: &RequestView<'_>, snapshot: &Snapshot) -> CorsGrant {
    snapshot.pipeline.cors.grant(view.fields_of(FieldKind::Origin).map(|field| field.value))
}

/// 128 random bits in hex.
pub(super) fn new_request_id() -> String {
    hex::encode(&fastrand::u128(..).to_be_bytes())
}
