//! The ledger of one exchange: what was asked, what became of it, who answered. Counted and logged in one place, once, when
//! it is dropped, whatever ended it: an answer, a refusal, a client that went away, a task that was cancelled. It decides
//! nothing and writes to no socket.

use super::Snapshot;
use super::peers::Peers;
use super::spans::SpanNotes;
use crate::clock::Now;
use crate::forward::Plan;
use crate::pipeline::{Facts, Pipeline};
use crate::policy::{GuessCount, PolicyFault};
use crate::reply::{Cause, LimitFields, Refusal, UpstreamFault};
use crate::request::origin::{Arrival, TlsArrival, network_of};
use crate::request::route::{Canary, CanaryBy, RequestTimeout, Route};
use crate::request::trace::TraceContext;
use crate::request::verdict::VerdictSource;
use crate::request::view::{Method, RequestView};
use crate::store::credential::Digest;
use crate::telemetry::access_log::{AccessLogEntry, By, Upstreamed};
use crate::telemetry::exemplars::ExemplarIds;
use crate::telemetry::guess_metrics::GuessResult;
use crate::telemetry::heavy_hitters::RequestSample;
use crate::telemetry::metrics::{AuthResult, Clamp, Guard, UpstreamError};
use crate::telemetry::spans::ExchangeSpans;
use crate::upstream::{FailedTry, HashBy, NoServer, Pick, Server, Tries};
use bytes::Bytes;
use std::future::poll_fn;
use std::net::IpAddr;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// An odd number that spreads neighbours over all bits: 2^64 by the golden ratio.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

pub(super) struct Exchange {
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) now: Now,
    pub(super) request_id: String,
    /// It came over HTTP/2.
    http2: bool,
    /// The connection ends with it.
    pub(super) is_last: bool,
    pub(super) trace: Option<TraceContext>,
    pub(super) facts: Facts,
    /// Where the request is sent in place of an answer.
    elsewhere: Option<Box<[u8]>>,
    /// What the answer says of limits; `None`: nothing.
    limit_fields: Option<Box<LimitFields>>,
    /// Of the client's connection.
    tls: Option<Arc<TlsArrival>>,
    /// The request's head as it came; the places below are in it. Empty when it could not be read.
    pub(super) head: Bytes,
    started: Instant,
    logged: Option<LogPlaces>,
    /// `None`: no spans of it are exported.
    spans: Option<Box<SpanNotes>>,
    /// Which `[[upstream]]` serves it; `None` if the pipeline has not permitted it, or another proxy forwards it.
    pub(super) pool: Option<usize>,
    /// Another proxy asks, and forwards it by itself.
    pub(super) asker: Option<Asker>,
    /// The one that serves it if `pool` is a canary that cannot.
    main_pool: Option<usize>,
    ending: Ending,
    upstream: UpstreamSide,
    _in_flight: Guard,
}

/// A proxy that asks about a request of its client.
#[derive(Clone, Copy)]
pub(super) struct Asker {
    pub(super) source: VerdictSource,
    /// It asks with HEAD, whatever its client's method is.
    pub(super) head_only: bool,
    /// It was told to forward the request.
    pub(super) allowed: bool,
}

/// How it ended.
#[derive(Default)]
struct Ending {
    refusal: Option<Refusal>,
    /// Why it failed behind the verdict, where no refusal says so.
    reason: Option<&'static str>,
    /// `None`: aborted, by the end of the process or by an internal error.
    end: Option<(End, Instant)>,
}

/// What a client got.
pub(super) struct End {
    /// Of the final response; 0: none was sent.
    pub(super) status: u16,
    /// Who sent it.
    pub(super) by: Option<By>,
    /// Of the request's body; of its head if the request was refused and the body not read.
    pub(super) bytes_received: u64,
    pub(super) bytes_sent: u64,
    /// Something failed on the way.
    pub(super) failed: bool,
}

/// What came of asking a backend.
#[derive(Default)]
struct UpstreamSide {
    tries: Tries,
    status: Option<u16>,
    took: Option<Duration>,
    fields_dropped: usize,
}

/// What of the request's head only the log needs.
struct LogPlaces {
    method: HeadSlice,
    target: HeadSlice,
    user_agent: HeadSlice,
}

/// Where in the request's head something stands: cheaper than a slice that keeps the head alive by itself.
#[derive(Clone, Copy)]
pub(super) struct HeadSlice {
    start: u32,
    length: u32,
}

impl HeadSlice {
    /// Takes a part of the head.
    pub(super) fn of(part: &[u8], head: &[u8]) -> Self {
        let start = part.as_ptr().addr().wrapping_sub(head.as_ptr().addr());
        // What is no part of a head, which the configuration keeps below 1 MiB, is nowhere.
        Self { start: u32::try_from(start).unwrap_or(u32::MAX), length: u32::try_from(part.len()).unwrap_or(u32::MAX) }
    }

    pub(super) fn within(self, head: &[u8]) -> &[u8] {
        head.get(self.start as usize..).and_then(|rest| rest.get(..self.length as usize)).unwrap_or_default()
    }
}

impl Exchange {
    /// An exchange whose request has just come, or has come as far as it ever will. In a box, as it is handed on many times.
    pub(super) fn begin(snapshot: Arc<Snapshot>, arrival: &Arrival, head: Bytes) -> Box<Self> {
        let in_flight = snapshot.metrics.request_started();
        Box::new(Self {
            snapshot,
            now: super::now(),
            request_id: String::new(),
            http2: arrival.http2,
            is_last: false,
            trace: None,
            facts: Facts::none(Method::Other, arrival.nearest()),
            elsewhere: None,
            limit_fields: None,
            tls: arrival.tls.clone(),
            head,
            started: Instant::now(),
            logged: None,
            spans: None,
            pool: None,
            asker: None,
            main_pool: None,
            ending: Ending::default(),
            upstream: UpstreamSide::default(),
            _in_flight: in_flight,
        })
    }

    /// The head was read as a request of this client.
    pub(super) fn is_asked(&mut self, view: &RequestView<'_>, client: Option<IpAddr>, request_id: String) {
        self.request_id = request_id;
        self.trace = TraceContext::begin(self.snapshot.pipeline.forward.trace, view, || self.snapshot.new_trace_ids());
        if self.snapshot.spans.is_on() {
            self.spans = self.trace.filter(TraceContext::is_sampled).map(|_| Box::default());
        }
        self.facts = Facts::none(view.method, client);
        self.logged = self.snapshot.log.is_on().then(|| LogPlaces {
            method: HeadSlice::of(view.method_bytes, &self.head),
            target: HeadSlice::of(view.target, &self.head),
            user_agent: HeadSlice::of(user_agent(view), &self.head),
        });
    }

    /// It may be sent to the same place on another port, with https.
    pub(super) fn redirects(&mut self, view: &RequestView<'_>, port: u16) {
        self.elsewhere = Some(Pipeline::elsewhere(view, port));
    }

    pub(super) fn elsewhere(&self) -> Option<Box<[u8]>> {
        self.elsewhere.clone()
    }

    /// The value of Strict-Transport-Security in its answer.
    pub(super) fn hsts(&self) -> Option<&str> {
        self.tls.as_ref()?.hsts.as_deref()
    }

    /// Takes over what the pipeline knows so far.
    pub(super) fn learned(&mut self, facts: Facts) {
        self.note(SpanNotes::learned);
        let limits = &self.snapshot.pipeline.limits;
        self.limit_fields = LimitFields::of(limits, &facts.limits, facts.principal.as_deref()).map(Box::new);
        self.facts = facts;
    }

    /// What the answer says of the client's limits.
    pub(super) fn limit_fields(&self) -> Option<&LimitFields> {
        self.limit_fields.as_deref()
    }

    /// The token store has to be waited for.
    pub(super) fn asks_store(&mut self) {
        self.note(SpanNotes::asks_store);
    }

    fn note(&mut self, note: impl FnOnce(&mut SpanNotes)) {
        if let Some(spans) = &mut self.spans {
            note(spans);
        }
    }

    /// The pipeline has permitted it. `fields_dropped`: header fields that were not forwarded for their name.
    pub(super) fn permitted(&mut self, view: &RequestView<'_>, plan: &Plan<'_>, fields_dropped: usize) {
        self.upstream.fields_dropped = fields_dropped;
        self.pool = Some(plan.upstream);
        if let Some(canary) = plan.canary
            && self.is_for(canary)
        {
            (self.pool, self.main_pool) = (Some(canary.upstream), Some(plan.upstream));
            if self.snapshot.pool(self.pool).is_none_or(|peers| !peers.upstream.is_up()) {
                self.leave_canary();
            }
        }
        let key = self.key(Some(view));
        self.upstream.tries.keyed(key);
    }

    /// Who asks, for a fair order of those that wait: a token, else a client's address or its network.
    fn caller(&self) -> u64 {
        match (&self.facts.token, self.facts.client.map(network_of)) {
            (Some(token), _) => token.spread(),
            (None, Some(IpAddr::V4(ip))) => u64::from(ip.to_bits()).wrapping_mul(SPREAD),
            (None, Some(IpAddr::V6(ip))) => ((ip.to_bits() >> 64) as u64).wrapping_mul(SPREAD),
            (None, None) => 0,
        }
    }

    /// The request's place among the servers of its pool, if it has one. Without its head's view, what a header says is not at
    /// hand: the servers take turns.
    fn key(&self, view: Option<&RequestView<'_>>) -> Option<u64> {
        let peers = self.snapshot.pool(self.pool)?;
        let key = match peers.upstream.hash_by()? {
            HashBy::User => self.user()?,
            HashBy::Token => self.token()?,
            HashBy::Header(name) => field(view?, name)?,
            HashBy::Cookie(name) => cookie(field(view?, "cookie")?, name.as_bytes())?,
        };
        Some(peers.upstream.key_of(key))
    }

    fn is_permitted(&self) -> bool {
        self.pool.is_some() || self.asker.is_some_and(|asker| asker.allowed)
    }

    fn user(&self) -> Option<&[u8]> {
        self.facts.principal.as_ref().map(|principal| principal.user().as_bytes())
    }

    fn token(&self) -> Option<&[u8]> {
        self.facts.token.as_ref().map(|digest| digest.as_bytes().as_slice())
    }

    fn is_for(&self, canary: &Canary) -> bool {
        match canary.by {
            CanaryBy::User => self.user().is_some_and(|user| canary.takes(user)),
            CanaryBy::Token => self.token().is_some_and(|token| canary.takes(token)),
            CanaryBy::Request => canary.takes_place(fastrand::u64(..)),
        }
    }

    /// The canary has no server for the request: the main upstream gets it. False: it is there already.
    fn leave_canary(&mut self) -> bool {
        let Some(main) = self.main_pool.take() else { return false };
        if let Some(peers) = self.snapshot.pool(self.pool) {
            peers.upstream.passed_on();
        }
        self.pool = Some(main);
        // The other one stood for a place among the canary's servers.
        let key = self.key(None);
        self.upstream.tries.keyed(key);
        true
    }

    /// The server for the next try. With [`NoServer::Busy`] the request can wait for one with [`Self::queued`].
    pub(super) fn pick(&mut self) -> Result<Pick, NoServer> {
        (self.upstream.status, self.upstream.took) = (None, None);
        loop {
            let peers = self.snapshot.pool(self.pool).ok_or(NoServer::Absent)?;
            if peers.upstream.ranks_callers() {
                let weight = self.snapshot.pipeline.policy.weights.of(self.facts.principal.as_deref());
                self.upstream.tries.called_by(self.caller(), weight);
            }
            match peers.upstream.pick(&mut self.upstream.tries, Instant::now()) {
                Err(NoServer::Absent) if self.leave_canary() => {}
                picked => {
                    self.note_pick(&picked);
                    return picked;
                }
            }
        }
    }

    /// The backend gets the body as the client sends it.
    pub(super) fn streams_body(&mut self) {
        self.upstream.tries.streams_body();
    }

    fn note_pick(&mut self, picked: &Result<Pick, NoServer>) {
        if let Ok(pick) = picked {
            self.note(|spans| spans.tries(&pick.server));
        }
    }

    pub(super) fn route(&self) -> Option<&Route> {
        self.facts.route.and_then(|index| self.snapshot.pipeline.rules.routes.get(index))
    }

    /// The largest body that the request may have.
    pub(super) fn body_limit(&self) -> Option<u64> {
        self.route()?.body_bytes
    }

    /// When the exchange has to be over.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.route()?.timeouts.request {
            None => Some(self.started + self.snapshot.pool(self.pool)?.timeouts.request?),
            Some(RequestTimeout::After(time)) => Some(self.started + time),
            Some(RequestTimeout::Never) => None,
        }
    }

    /// How long a server may pause within its answer.
    pub(super) fn read_timeout(&self, peers: &Peers) -> Duration {
        self.route().and_then(|route| route.timeouts.read).unwrap_or(peers.timeouts.read)
    }

    /// The exchange took too long.
    pub(super) fn overdue(&self) {
        if let Some(peers) = self.snapshot.pool(self.pool) {
            peers.upstream.error(UpstreamError::RequestTimeout);
        }
    }

    /// Waits in the queue of the upstream.
    pub(super) async fn queued(&mut self) -> Result<Pick, NoServer> {
        let peers = self.snapshot.pool(self.pool).ok_or(NoServer::Absent)?;
        let longest = Instant::now() + peers.timeouts.queue;
        let until = self.deadline().map_or(longest, |deadline| deadline.min(longest));
        let tries = &mut self.upstream.tries;
        let picked = poll_fn(|cx| peers.upstream.poll_pick(tries, cx.waker(), Instant::now()));
        let picked = tokio::time::timeout_at(until.into(), picked).await;
        self.upstream.tries.leave_queue();
        let picked = picked.unwrap_or(Err(NoServer::QueueTimeout));
        self.note_pick(&picked);
        picked
    }

    /// There is no server for the request: what the client is told.
    pub(super) fn no_server(&mut self, why: NoServer) -> UpstreamFault {
        let (fault, kind) = match why {
            NoServer::Absent => (UpstreamFault::Absent, UpstreamError::NoServer),
            NoServer::Busy | NoServer::QueueFull => (UpstreamFault::QueueFull, UpstreamError::QueueFull),
            NoServer::QueueTimeout => (UpstreamFault::QueueTimeout, UpstreamError::QueueTimeout),
        };
        if let Some(peers) = self.snapshot.pool(self.pool) {
            peers.upstream.error(kind);
        }
        if why == NoServer::Absent {
            self.upstream_failed(kind);
        }
        fault
    }

    /// A connection to the server is established.
    pub(super) fn connected(&self, reused: bool) {
        if let Some(peers) = self.snapshot.pool(self.pool) {
            peers.upstream.connected(reused);
        }
    }

    /// The server has sent the head of a response, interim or final.
    pub(super) fn answered(&mut self, status: u16) {
        if let Some(peers) = self.snapshot.pool(self.pool) {
            let (took, recovery, change) = peers.upstream.answered(&mut self.upstream.tries, status, Instant::now());
            self.upstream.took = self.upstream.took.or(took);
            recovery.iter().for_each(|over| peers.recovered(over));
            change.iter().for_each(|change| peers.log(change));
        }
        self.upstream.status = Some(status);
        self.note(|spans| spans.answered(status));
    }

    /// A try failed, and nothing of an answer has reached the client. Whether [`Self::pick`] has another server.
    /// `repeatable`: sending the request twice does no harm, and all of it that was sent is at hand.
    pub(super) fn try_failed(&mut self, failure: FailedTry, repeatable: bool) -> bool {
        let (FailedTry::Connect(error) | FailedTry::Exchange { error, .. }) = failure;
        self.note(|spans| spans.failed(error.as_str()));
        let Some(peers) = self.snapshot.pool(self.pool) else { return false };
        let after = peers.upstream.failed(&mut self.upstream.tries, failure, repeatable, Instant::now());
        after.change.iter().for_each(|change| peers.log(change));
        after.again || (after.exhausted && self.leave_canary())
    }

    /// The request failed for what a server did, or because there is none.
    pub(super) fn upstream_failed(&mut self, kind: UpstreamError) {
        if let Some(peers) = self.snapshot.pool(self.pool) {
            peers.request_failed(kind, &self.request_id);
        }
    }

    /// Refused by tollgate, at whatever stage. Whether the client gets to read it is said by [`Self::over`].
    pub(super) fn refused(&mut self, refusal: Refusal) {
        self.ending.refusal = Some(refusal);
    }

    /// Its token stopped being valid while it went on. Where an answer has begun, only the log and this tell of it.
    pub(super) fn lost_its_token(&mut self, refusal: Refusal) {
        self.snapshot.metrics.exchange_ended(refusal.reason());
    }

    /// The client has gone before its answer was whole.
    pub(super) fn client_gone(&mut self) {
        self.ending.reason = Some("client_gone");
    }

    /// The exchange is complete; this is what the client got. Returns when that was.
    pub(super) fn over(&mut self, end: End) -> Instant {
        if end.failed && self.ending.refusal.is_none() {
            self.ending.reason = self.ending.reason.or(Some("failed"));
        }
        let now = Instant::now();
        self.ending.end = Some((end, now));
        now
    }

    fn end(&self) -> Option<&End> {
        self.ending.end.as_ref().map(|(end, _)| end)
    }

    fn reason(&self) -> &'static str {
        match (self.ending.reason, self.ending.refusal) {
            (Some(reason), _) => reason,
            (None, Some(refusal)) => refusal.reason(),
            (None, None) if self.ending.end.is_some() => "ok",
            (None, None) => "aborted",
        }
    }

    /// The limit that refused it.
    fn limit(&self) -> Option<&str> {
        match self.ending.refusal?.cause() {
            Cause::Policy(PolicyFault::Limit(excess)) => Some(self.snapshot.pipeline.limits.name(excess.limit)),
            _ => None,
        }
    }

    /// One verdict for each request that a stage has judged.
    fn count(&self, took: Duration) {
        let (metrics, facts) = (&self.snapshot.metrics, &self.facts);
        let status = self.end().map_or(0, |end| end.status);
        let took_ms = took.as_secs().saturating_mul(1000).saturating_add(took.subsec_millis().into());
        let ended_unix_ms = self.now.unix_ms.saturating_add(took_ms);
        let series = self.snapshot.route_metrics(facts.route);
        series.count(facts.method.index(), status, took, ended_unix_ms, || self.exemplar_ids());
        if let (Some(refusal), Some(end)) = (self.ending.refusal, self.end())
            && end.status == refusal.status()
        {
            metrics.refused(end.status, refusal.reason());
        }
        if let Some(result) = facts.cache {
            metrics.cache_lookup(result);
        }
        if facts.query_token {
            metrics.query_token();
        }
        if let Some(refusal) = self.ending.refusal.filter(Refusal::is_of_slow_body) {
            metrics.slow_body(refusal.reason());
        }
        self.snapshot.count_limits(&facts.limits);
        self.count_guess();
        let refused = self.ending.refusal.and_then(|refusal| Some((refusal.auth_result()?, refusal.reason())));
        match refused {
            Some((result, reason)) => metrics.auth(result, reason, facts.source),
            None if self.is_permitted() => {
                let result = if facts.principal.is_some() { AuthResult::Valid } else { AuthResult::Anonymous };
                metrics.auth(result, "ok", facts.source);
            }
            None => {}
        }
        if !self.is_permitted() {
            return;
        }
        if let Some(generation) = facts.principal.as_ref().and_then(|principal| principal.generation()) {
            metrics.rotated(generation);
        }
        if facts.clamped.page {
            metrics.clamped(Clamp::Page);
        }
        if facts.clamped.per_page {
            metrics.clamped(Clamp::PerPage);
        }
        if facts.overridden {
            metrics.method_overridden();
        }
        metrics.fields_dropped(self.upstream.fields_dropped);
    }

    /// What leads from a point in a plot to this request. More people see the metrics than the access log: an id that is a token,
    /// as clients that mix up two fields send it, must never get there.
    fn exemplar_ids(&self) -> Option<ExemplarIds<'_>> {
        let id = self.request_id.as_bytes();
        let may_be_token = match &self.facts.token {
            Some(token) => *token == Digest::of(id),
            // Nobody has found a token: whatever stands in the head a second time may be one.
            None => memchr::memmem::find_iter(&self.head, id).nth(1).is_some(),
        };
        if id.is_empty() || may_be_token {
            return None;
        }
        // Of a trace that is not recorded there is nothing to be found.
        let trace = self.trace.as_ref().filter(|trace| trace.is_sampled());
        Some(ExemplarIds { request_id: &self.request_id, trace_id: trace.map(TraceContext::trace_id_hex) })
    }

    fn count_guess(&self) {
        let (series, facts) = (self.snapshot.metrics.guessing(), &self.facts);
        match self.ending.refusal.map(|refusal| refusal.cause()) {
            Some(Cause::Policy(PolicyFault::Guessing(_))) => series.request(GuessResult::Refused),
            _ if facts.took_turn => series.request(GuessResult::Waited),
            _ => {}
        }
        match &facts.guess {
            GuessCount::Not => {}
            GuessCount::Untracked => series.untracked(),
            GuessCount::Counted => series.failed(),
            GuessCount::Began(episode) => {
                series.failed();
                series.began();
                self.snapshot.say_guessing(episode);
            }
        }
    }

    /// Notes it for the ranking of who makes the traffic, if it is in the sample.
    fn note_hitter(&self, ended: Instant) {
        self.snapshot.metrics.heavy_hitters().note(ended, fastrand::f32, || {
            let (facts, end) = (&self.facts, self.end());
            RequestSample {
                token: facts.token.map(|digest| digest.id().into()),
                user: facts.principal.as_ref().map(|principal| principal.user().into()),
                client: facts.client.map(network_of),
                route: self.snapshot.route_name(facts.route).into(),
                bytes: end.map_or(0, |end| end.bytes_received.saturating_add(end.bytes_sent)),
                refused: self.ending.refusal.is_some(),
                backend: self.upstream.took.unwrap_or_default(),
            }
        });
    }

    fn log(&self, took: Duration) {
        let snapshot = &self.snapshot;
        let (facts, ending, head) = (&self.facts, &self.ending, &self.head);
        let target = self.logged.as_ref().map_or(&b""[..], |places| places.target.within(head));
        let end = self.end();
        // A target that was refused for its form is not taken apart for the log.
        let path_only = ending.refusal.is_some_and(|refusal| refusal.status() == 400) && !self.is_permitted();
        let path = memchr::memchr(b'?', target).map_or(target, |at| &target[..at]);
        let method = match &self.logged {
            None => b"-",
            Some(_) if facts.overridden || facts.method != Method::Other => facts.method.as_str().as_bytes(),
            Some(places) => places.method.within(head),
        };
        let token = facts.token.map(|digest| digest.id());
        let peers = snapshot.pool(self.pool);
        snapshot.log.write(&AccessLogEntry {
            unix_ms: self.now.unix_ms,
            request_id: &self.request_id,
            trace_id: self.trace.as_ref().map(TraceContext::trace_id_hex),
            client: facts.client,
            method,
            overridden: facts.overridden,
            target: if path_only { path } else { target },
            route: snapshot.route_name(facts.route),
            status: end.map_or(0, |end| end.status),
            by: end.and_then(|end| end.by),
            reason: self.reason(),
            limit: self.limit(),
            limit_dry_run: snapshot.dry_run_limit(facts),
            source: facts.source.as_str(),
            token: token.as_ref().map(|token| token.as_str()),
            user: facts.principal.as_ref().map(|principal| principal.user()),
            http2: self.http2,
            client_certificate: self.tls.as_ref().and_then(|tls| tls.subject.as_deref()),
            upstream: peers.map(|peers| Upstreamed {
                name: peers.upstream.name(),
                server: self.upstream.tries.last().map(Server::label),
                status: self.upstream.status,
                took: self.upstream.took,
                attempts: self.upstream.tries.count(),
            }),
            duration: took,
            bytes_received: end.map_or(0, |end| end.bytes_received),
            bytes_sent: end.map_or(0, |end| end.bytes_sent),
            user_agent: self.logged.as_ref().map_or(b"", |places| places.user_agent.within(head)),
        });
    }
}

impl Exchange {
    fn export(&self, notes: &SpanNotes, ended: Instant) {
        let (snapshot, facts) = (&self.snapshot, &self.facts);
        let Some((trace, own)) = self.trace.and_then(|trace| Some((trace, trace.span?))) else { return };
        let reason = self.reason();
        let failure = Some(reason).filter(|reason| *reason != "ok");
        snapshot.spans.push(Box::new(ExchangeSpans {
            trace_id: trace.trace_id.get(),
            parent: trace.parent.map(NonZeroU64::get),
            id: super::new_span_id().get(),
            began_unix_ns: self.now.unix_ms.saturating_mul(1_000_000),
            took: ended.saturating_duration_since(self.started),
            method: facts.method.as_str(),
            route: snapshot.route_name(facts.route).to_owned(),
            request_id: self.request_id.clone(),
            client: facts.client,
            status: self.end().map_or(0, |end| end.status),
            reason,
            upstream: snapshot.pool(self.pool).map(|peers| peers.upstream.name().to_owned()),
            waits: notes.waits(self.started, ended, own, failure),
        }));
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let ended = self.ending.end.as_ref().map_or_else(Instant::now, |(_, ended)| *ended);
        let took = ended.saturating_duration_since(self.started);
        self.upstream.tries.given_up(ended);
        self.count(took);
        self.note_hitter(ended);
        if self.snapshot.log.is_on() {
            self.log(took);
        }
        if let Some(notes) = &self.spans {
            self.export(notes, ended);
        }
    }
}

/// The value of a cookie.
fn cookie<'a>(cookies: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    cookies.split(|byte| *byte == b';').find_map(|pair| pair.trim_ascii().strip_prefix(name)?.strip_prefix(b"="))
}

/// The client's own name for itself; empty when it has none.
fn user_agent<'a>(view: &RequestView<'a>) -> &'a [u8] {
    field(view, "user-agent").unwrap_or(&view.target[..0])
}

/// The value of the first field of a name.
fn field<'a>(view: &RequestView<'a>, name: &str) -> Option<&'a [u8]> {
    let named = view.fields.iter().find(|field| field.name.eq_ignore_ascii_case(name.as_bytes()));
    named.map(|field| field.value)
}
