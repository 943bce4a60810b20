//! The life of one client connection: read a head, ask the pipeline, then either write the refusal or hand the request
//! to a lane with a head that holds exactly what the pipeline decided. This is the one place where requests come in,
//! whichever lane they go out by.

use super::client::{After, ClientStream, Head};
use super::exchange::{End, Exchange};
use super::http1;
use super::proxied::ProxiedLane;
use super::socket::Socket;
use super::ticket::{OwnToken, Ticket};
use super::workers::Serve;
use super::{Lifecycle, Snapshot};
use crate::forward::{Http1Head, Plan, request_id};
use crate::identity::Mode;
use crate::pipeline::{Admission, Facts, Verdict};
use crate::reply::cors::CorsGrant;
use crate::reply::{Cause, Envelope, Http1Answer, Refusal};
use crate::request::origin::Origin;
use crate::request::view::{FieldKind, Method, RequestView, Version};
use crate::request::{RequestFault, head};
use crate::telemetry::access_log::By;
use arc_swap::ArcSwap;
use bytes::{Bytes, BytesMut};
use pingora::apps::HttpServerApp as _;
use pingora::protocols::http::{ServerSession, date::get_cached_date};
use pingora::proxy::HttpProxy;
use pingora::server::ShutdownWatch;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Serves the API listeners.
pub(super) struct Gate {
    pub(super) snapshot: Arc<ArcSwap<Snapshot>>,
    /// The framework's lane in place of our own: only for tests that compare the two.
    pub(super) framework: Option<Arc<HttpProxy<ProxiedLane>>>,
    pub(super) lifecycle: Arc<Lifecycle>,
    /// Tells the framework's lane of the end of the process.
    pub(super) shutdown: ShutdownWatch,
}

impl Serve for Gate {
    async fn serve(self: Arc<Self>, socket: Socket) {
        let _open = self.snapshot.load().metrics.connection_opened();
        let mut client = ClientStream::new(socket);
        let mut draining = pin!(self.lifecycle.draining());
        loop {
            let head = client.read_head(|| self.snapshot.load().head_limits(), draining.as_mut()).await;
            // Never before the wait: it may take minutes, and what a reload closed meanwhile must be closed.
            let snapshot = self.snapshot.load_full();
            let (bytes, fault) = match head {
                Head::Complete(bytes) => {
                    let fault = snapshot.head_limits().judge(&bytes);
                    (bytes, fault)
                }
                Head::Closed => break,
                fault => (Bytes::new(), Some(fault)),
            };
            let exchange = Exchange::begin(snapshot, client.peer(), bytes.clone());
            let after = match fault {
                None => self.exchange(&mut client, bytes, exchange).await,
                Some(fault) => refuse_unread(&mut client, exchange, unread(&fault)).await,
            };
            client.end(after).await;
            if after != After::Next {
                break;
            }
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

impl Gate {
    /// One request and its answer. It is counted and logged when this comes back.
    async fn exchange(&self, client: &mut ClientStream, bytes: Bytes, mut exchange: Exchange) -> After {
        let snapshot = Arc::clone(&exchange.snapshot);
        let view = match head::parse(&bytes) {
            Ok(view) => view,
            Err(fault) => return refuse_unread(client, exchange, fault.into()).await,
        };
        let origin = Origin::of(&view, client.peer(), &snapshot.pipeline.rules.trusted_proxies);
        let id = request_id(&view).map_or_else(new_request_id, str::to_owned);
        exchange.is_asked(&view, origin.client, id);

        let (verdict, facts) = if self.lifecycle.is_draining() {
            (Verdict::Refuse(Cause::Draining.into()), Facts::none(view.method, origin.client))
        } else {
            match snapshot.pipeline.admit(&view, &origin, exchange.now, Mode::Serve) {
                Admission::Decided(verdict, facts) => (verdict, facts),
                Admission::Waiting(pending) => {
                    // The client may be gone before the store answers.
                    exchange.learned(pending.facts().clone());
                    pending.verdict().await
                }
            }
        };
        exchange.learned(facts);
        match verdict {
            Verdict::Refuse(refusal) => refuse(client, exchange, &view, refusal).await,
            Verdict::Forward(plan) => {
                let tunnel = view.websocket.then(|| Arc::new(AtomicBool::new(false)));
                let mut head = Vec::with_capacity(bytes.len() + 256);
                let (rules, sink) = (&snapshot.pipeline.forward, &mut Http1Head(&mut head));
                let dropped = plan.write_head(&view, rules, &origin, &exchange.request_id, sink);
                exchange.permitted(dropped);
                client.begin_body(view.body, tunnel.clone());
                let mut ticket = ticket(exchange, plan, &view, tunnel);
                match &self.framework {
                    None => http1::carry(client, &head, &mut ticket, &self.lifecycle).await,
                    Some(lane) => self.proxied(lane, client, head, ticket).await,
                }
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
        let mut session = ServerSession::new_http1(Box::new(client.take()));
        session.set_connection_user_context(Some(Box::new(ticket)));
        session.set_pipelined_prefix(BytesMut::from(Bytes::from(head)));
        let Some(reusable) = lane.process_new_http(session, &self.shutdown).await else { return After::Drop };
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
async fn refuse_unread(client: &mut ClientStream, mut exchange: Exchange, fault: RequestFault) -> After {
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

/// Answers a request that was refused.
async fn refuse(client: &mut ClientStream, mut exchange: Exchange, view: &RequestView<'_>, refusal: Refusal) -> After {
    let close = refusal.must_close() || !view.keep_alive || !ClientStream::can_skip(view.body, view.expects_continue);
    let answer = render(refusal, view.method == Method::Head, close, &exchange, grant(view, &exchange.snapshot));
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
    if close || !written || !client.skip_body(view.body).await { After::Close } else { After::Next }
}

/// The right to use a lane: the one place where a ticket is made, from a plan.
fn ticket(exchange: Exchange, plan: Plan<'_>, view: &RequestView<'_>, tunnel: Option<Arc<AtomicBool>>) -> Ticket {
    let from_query = plan.from_query();
    Ticket {
        token: plan.presented.map(|presented| OwnToken::of(presented.value, &exchange.head)),
        grant: grant(view, &exchange.snapshot),
        body: plan.body,
        method: view.method,
        framing: view.body,
        expects_continue: view.expects_continue,
        keep_alive: view.keep_alive,
        http10: view.version == Version::Http10,
        deprecated: from_query && exchange.snapshot.pipeline.forward.deprecate_query_token,
        tunnel,
        _permit: plan.permit,
        exchange,
    }
}

pub(super) fn render(refusal: Refusal, head_only: bool, close: bool, exchange: &Exchange, grant: CorsGrant) -> Vec<u8> {
    let date = get_cached_date();
    let date = date.to_str().unwrap_or_default();
    let mut out = Vec::with_capacity(384);
    let cors = &exchange.snapshot.pipeline.cors;
    let envelope = Envelope { date, request_id: &exchange.request_id, cors, grant };
    refusal.render(&envelope, &mut Http1Answer { out: &mut out, head_only, close });
    out
}

/// Whether the page that sent a request may read an answer of tollgate's own.
fn grant(view: &RequestView<'_>, snapshot: &Snapshot) -> CorsGrant {
    snapshot.pipeline.cors.grant(view.fields_of(FieldKind::Origin).map(|field| field.value))
}

/// 128 random bits in hex.
pub(super) fn new_request_id() -> String {
    data_encoding::HEXLOWER.encode(&fastrand::u128(..).to_be_bytes())
}
