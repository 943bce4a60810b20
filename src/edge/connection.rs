//! The life of one client connection: read a head, ask the pipeline, then either write the refusal or hand the request
//! to the main lane with a head that holds exactly what the pipeline decided. This is the one place where requests
//! come in, whichever lane they go out by.

use super::client::{ClientStream, Head};
use super::proxy::{LogFacts, MainLane, OwnToken, Place, Ticket};
use super::{Lifecycle, Snapshot};
use crate::Now;
use crate::forward::{Plan, request_id};
use crate::pipeline::{Admission, Refused, Verdict, source_label};
use crate::reply::cors::CorsGrant;
use crate::reply::{Cause, Envelope, Refusal};
use crate::request;
use crate::request::head;
use crate::request::origin::Origin;
use crate::request::view::{FieldKind, Method, RequestView, Version};
use crate::telemetry::access_log::Entry;
use crate::telemetry::metrics::{Guard, TokenSource};
use arc_swap::ArcSwap;
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use pingora::apps::{HttpServerApp as _, ServerApp};
use pingora::protocols::Stream;
use pingora::protocols::http::{ServerSession, date::get_cached_date};
use pingora::proxy::HttpProxy;
use pingora::server::ShutdownWatch;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// Serves the API listeners.
pub(super) struct Gate {
    pub(super) snapshot: Arc<ArcSwap<Snapshot>>,
    pub(super) lane: Arc<HttpProxy<MainLane>>,
    pub(super) lifecycle: Arc<Lifecycle>,
}

#[async_trait]
impl ServerApp for Gate {
    async fn process_new(self: &Arc<Self>, socket: Stream, shutdown: &ShutdownWatch) -> Option<Stream> {
        let _open = self.snapshot.load().pipeline.metrics.connection_opened();
        let mut client = ClientStream::new(socket);
        loop {
            let head = client.read_head(|| self.snapshot.load().head_limits(), self.lifecycle.draining()).await;
            // Never before the wait: it may take minutes, and what a reload closed meanwhile must be closed.
            let snapshot = self.snapshot.load_full();
            let arrival = Arrival::new(&snapshot);
            match head {
                Head::Complete(bytes) => match snapshot.head_limits().judge(&bytes) {
                    None => client = self.exchange(client, bytes, arrival, snapshot, shutdown).await?,
                    Some(fault) => {
                        arrival.refuse_unread(client, &snapshot, unread(&fault), Some(&bytes)).await;
                        break;
                    }
                },
                Head::Closed => break,
                fault => {
                    arrival.refuse_unread(client, &snapshot, unread(&fault), None).await;
                    break;
                }
            }
        }
        None
    }
}

/// Why a head that could not be taken whole is refused.
fn unread(head: &Head) -> request::Fault {
    match head {
        Head::TooLarge => request::Fault::HeaderTooLarge,
        Head::TargetTooLong => request::Fault::TargetTooLong,
        Head::TooSlow => request::Fault::HeaderTimeout,
        Head::Malformed(fault) => (*fault).into(),
        Head::Complete(_) | Head::Closed => request::Fault::Head(head::HeadFault::RequestLine),
    }
}

impl Gate {
    /// One request and its answer. Gives the connection back when it can go on.
    async fn exchange(
        &self,
        mut client: ClientStream,
        bytes: Bytes,
        arrival: Arrival,
        snapshot: Arc<Snapshot>,
        shutdown: &ShutdownWatch,
    ) -> Option<ClientStream> {
        let view = match head::parse(&bytes) {
            Ok(view) => view,
            Err(fault) => {
                arrival.refuse_unread(client, &snapshot, fault.into(), Some(&bytes)).await;
                return None;
            }
        };
        let origin = Origin::of(&view, client.peer(), &snapshot.pipeline.forward.trusted);
        let id = request_id(&view).map_or_else(new_request_id, str::to_owned);

        let verdict = if self.lifecycle.is_draining() {
            let refusal = Cause::Draining.into();
            Verdict::Refuse(Refused {
                refusal,
                route: None,
                method: view.method,
                token: None,
                source: TokenSource::None,
            })
        } else {
            match snapshot.pipeline.admit(&view, arrival.now) {
                Admission::Decided(verdict) => verdict,
                Admission::Waiting(pending) => pending.verdict().await,
            }
        };
        match verdict {
            Verdict::Refuse(refused) => arrival.refuse(client, &snapshot, &view, &bytes, &refused, &origin, &id).await,
            Verdict::Forward(plan) => {
                let tunnel = view.websocket.then(|| Arc::new(AtomicBool::new(false)));
                let mut head = Vec::with_capacity(bytes.len() + 256);
                let dropped = plan.write_head(&view, &snapshot.pipeline.forward, &origin, &id, &mut head);
                snapshot.pipeline.metrics.fields_dropped(dropped);
                client.begin_body(view.body, tunnel.clone());
                let ticket = arrival.ticket(plan, &view, &bytes, &origin, id, tunnel, Arc::clone(&snapshot));
                self.forward(client, head, ticket, shutdown).await
            }
        }
    }

    /// The main lane: the framework finds a backend and moves the bytes.
    async fn forward(
        &self,
        client: ClientStream,
        head: Vec<u8>,
        ticket: Ticket,
        shutdown: &ShutdownWatch,
    ) -> Option<ClientStream> {
        let mut session = ServerSession::new_http1(Box::new(client));
        session.set_connection_user_context(Some(Box::new(ticket)));
        session.set_pipelined_prefix(BytesMut::from(Bytes::from(head)));
        let reusable = self.lane.process_new_http(session, shutdown).await?;
        let (stream, _) = reusable.consume();
        stream.into_any().downcast::<ClientStream>().ok().map(|client| *client)
    }
}

/// When a request came, and that it is being served.
struct Arrival {
    now: Now,
    started: Instant,
    in_flight: Guard,
}

impl Arrival {
    fn new(snapshot: &Snapshot) -> Self {
        Self { now: super::now(), started: Instant::now(), in_flight: snapshot.pipeline.metrics.request_started() }
    }

    /// Answers a request whose head could not be read, and ends the connection. `whole` is the head if it came to its end.
    /// Whoever sent it may not get to see the answer.
    async fn refuse_unread(
        self,
        mut client: ClientStream,
        snapshot: &Snapshot,
        fault: request::Fault,
        whole: Option<&Bytes>,
    ) {
        let refusal = Refusal::from(Cause::Request(fault));
        let id = new_request_id();
        let read = whole.map_or(client.unread(), |head| head);
        let grant = snapshot.pipeline.cors.grant(head::origins_of_unparsed(read));
        let bytes = render(refusal, head::asks_for_head(read), true, &id, snapshot, grant);
        let peer = client.peer();
        // A client that is gone reads nothing; the log line below says all that is left to say.
        drop(client.write(&bytes).await);
        snapshot.count(None, Method::Other, refusal.status(), self.started.elapsed());
        snapshot.log.write(&Entry {
            unix_ms: self.now.unix_ms,
            request_id: &id,
            client: peer,
            method: b"-",
            route: "none",
            status: refusal.status(),
            reason: refusal.reason(),
            source: TokenSource::None.as_str(),
            duration: self.started.elapsed(),
            bytes_sent: bytes.len() as u64,
            ..Entry::default()
        });
        client.close().await;
    }

    #[expect(clippy::too_many_arguments, reason = "what a log line wants to know; a struct for it would have one user")]
    async fn refuse(
        self,
        mut client: ClientStream,
        snapshot: &Snapshot,
        view: &RequestView<'_>,
        head: &Bytes,
        refused: &Refused<'_>,
        origin: &Origin<'_>,
        id: &str,
    ) -> Option<ClientStream> {
        let refusal = refused.refusal;
        let close =
            refusal.must_close() || !view.keep_alive || !ClientStream::can_skip(view.body, view.expects_continue);
        let answer = render(refusal, view.method == Method::Head, close, id, snapshot, grant(view, snapshot));
        let written = client.write(&answer).await.is_ok();
        let took = self.started.elapsed();
        snapshot.count(refused.route, refused.method, refusal.status(), took);
        if snapshot.log.is_on() {
            let overridden = refused.method != view.method;
            let token = refused.token;
            snapshot.log.write(&Entry {
                unix_ms: self.now.unix_ms,
                request_id: id,
                client: origin.client,
                method: if overridden { refused.method.as_str().as_bytes() } else { view.method_bytes },
                overridden,
                // A target that was refused for its form is not taken apart for the log.
                target: if refusal.status() == 400 { view.path() } else { view.target },
                route: refused.route.map_or("none", |route| &route.name),
                status: refusal.status(),
                reason: refusal.reason(),
                source: refused.source.as_str(),
                token: token.as_ref().map(|token| token.as_str()),
                duration: took,
                bytes_received: head.len() as u64,
                bytes_sent: answer.len() as u64,
                user_agent: user_agent(view),
                ..Entry::default()
            });
        }
        if close || !written || !client.skip_body(view.body).await {
            client.close().await;
            return None;
        }
        Some(client)
    }

    #[expect(clippy::too_many_arguments, reason = "the one place where a ticket is made")]
    fn ticket(
        self,
        plan: Plan<'_>,
        view: &RequestView<'_>,
        head: &Bytes,
        origin: &Origin<'_>,
        request_id: String,
        tunnel: Option<Arc<AtomicBool>>,
        snapshot: Arc<Snapshot>,
    ) -> Ticket {
        let route = Some(plan.route.index);
        let from_query = plan.from_query();
        let source = source_label(plan.presented.as_ref().map(|presented| presented.source));
        let token = plan.presented.map(|presented| OwnToken::of(presented.value, head));
        Ticket {
            route,
            permit: plan.permit,
            token,
            grant: grant(view, &snapshot),
            body: plan.body,
            keep_alive: view.keep_alive,
            http10: view.version == Version::Http10,
            deprecated: from_query && snapshot.pipeline.forward.deprecate_query_token,
            method: plan.method,
            overridden: plan.overridden,
            source,
            client: origin.client,
            log: snapshot.log.is_on().then(|| LogFacts {
                target: Place::of(view.target, head),
                user_agent: Place::of(user_agent(view), head),
            }),
            head: head.clone(),
            request_id,
            tunnel,
            now: self.now,
            started: self.started,
            _in_flight: self.in_flight,
            snapshot,
        }
    }
}

fn render(
    refusal: Refusal,
    head_only: bool,
    close: bool,
    request_id: &str,
    snapshot: &Snapshot,
    grant: CorsGrant,
) -> Vec<u8> {
    let date = get_cached_date();
    let date = date.to_str().unwrap_or_default();
    let mut out = Vec::with_capacity(384);
    refusal.write(&Envelope { head_only, close, date, request_id, cors: &snapshot.pipeline.cors, grant }, &mut out);
    out
}

/// Whether the page that sent a request may read an answer of tollgate's own.
fn grant(view: &RequestView<'_>, snapshot: &Snapshot) -> CorsGrant {
    snapshot.pipeline.cors.grant(view.fields_of(FieldKind::Origin).map(|field| field.value))
}

/// 128 random bits in hex.
pub(super) fn new_request_id() -> String {
    format!("{:032x}", fastrand::u128(..))
}

/// The client's own name for itself; empty when it has none.
fn user_agent<'a>(view: &RequestView<'a>) -> &'a [u8] {
    let named = view.fields.iter().find(|field| field.name.eq_ignore_ascii_case(b"user-agent"));
    named.map_or(&view.target[..0], |field| field.value)
}
