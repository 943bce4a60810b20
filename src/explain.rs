//! The path, told: what each stage saw of a request and what it decided, the setting behind it, what would go upstream or be
//! answered, and what another token, scope or method would change. It asks the stages themselves, in mode Observe, and judges
//! nothing by a rule of its own. It must never show a token, start a lookup, or take anything from a limit.

mod mask;
mod reasons;

pub use reasons::{REASONS, REASONS_PAGE, ReasonText, texts};

use crate::clock::Now;
use crate::forward::{BackendCredential, Http1Head, Plan, request_id};
use crate::identity::{CannotTell, Invalid, Mode, Principal, TokenStatus, judge};
use crate::pipeline::{Admission, Facts, Pipeline, Verdict};
use crate::policy::{LimitResult, PolicyFault};
use crate::reply::cors::CorsGrant;
use crate::reply::{Cause, Envelope, Http1Answer, LimitFields, Refusal};
use crate::request::body::judge_piece;
use crate::request::chunked::ChunkedBody;
use crate::request::head::{self, HeadFault};
use crate::request::origin::{Arrival, Origin};
use crate::request::page::PageRules;
use crate::request::query::{self, Edits, Key, ParamAction};
use crate::request::route::{Auth, Methods, Route};
use crate::request::routes::OtherReadings;
use crate::request::token::{bearer, is_token_header};
use crate::request::trace::{NewIds, TraceContext};
use crate::request::view::{Field, FieldKind, Framing, Method, RequestView};
use crate::request::{self, AmbiguousPaths, Examined, Limits, MethodOverride, RequestFault};
use crate::store::TokenRecord;
use crate::store::credential::Digest;
use mask::{Made, Mask};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::num::{NonZeroU64, NonZeroU128};

/// Where the rules stand in the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RulePlaces {
    places: HashMap<String, String>,
}

impl RulePlaces {
    /// Takes `FILE:LINE` of each key, as `limit[0].rate` or `token.bearer`.
    pub fn new(places: impl Iterator<Item = (String, String)>) -> Self {
        Self { places: places.collect() }
    }

    /// `FILE:LINE` of a key. `None`: no file has it, and its default holds.
    pub fn of(&self, key: &str) -> Option<String> {
        self.places.get(key).cloned()
    }

    /// How many `[[name]]` there are.
    fn count(&self, name: &str) -> usize {
        (0..).take_while(|index| self.places.contains_key(&format!("{name}[{index}]"))).count()
    }
}

/// What a request is judged by.
pub struct ExplainWorld<'w> {
    pub pipeline: &'w Pipeline,
    pub places: &'w RulePlaces,
    /// As the configuration lists them.
    pub upstreams: Vec<ToldUpstream>,
    /// A running gateway: its cache and its limits are those of its clients.
    pub running: bool,
}

/// An `[[upstream]]`.
#[derive(Clone, Debug, Default)]
pub struct ToldUpstream {
    pub name: String,
    /// In words: addresses, and whether they are up where that is known.
    pub servers: Vec<String>,
    /// False where it is not known, too.
    pub http2: bool,
}

/// What is asked about.
pub struct ExplainQuestion<'q> {
    /// As a client sends it, head and body. What follows the first request is left alone.
    pub bytes: &'q [u8],
    /// How it comes.
    pub arrival: Arrival,
    pub witness: Witness,
    pub now: Now,
}

/// Who says what the request's token is.
#[derive(Clone, Debug, Default)]
pub enum Witness {
    /// The cache as it is. No store is asked.
    #[default]
    Cache,
    /// It is taken to be valid, and this user's.
    Assumed { user: String, scopes: Vec<String> },
    /// A store was asked.
    Store(Result<TokenStatus, CannotTell>),
}

/// All that is told of one request. For programs: names and types stay as they are; docs/explain.md describes them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Explanation {
    /// `forward`, `refuse`, `unknown` (the store was not asked), or `incomplete` (not all of the request is there).
    pub verdict: String,
    /// What the client gets of tollgate itself. Absent if the backend answers, or nobody knows.
    pub status: Option<u16>,
    /// As the access log has it; `ok` for a request that is forwarded.
    pub reason: String,
    pub means: String,
    pub advice: String,
    /// As it came, without secrets.
    pub request: String,
    pub method: String,
    pub route: String,
    pub source: String,
    /// Of the token: the first 12 hex digits of its SHA-256.
    pub token: Option<String>,
    pub user: Option<String>,
    /// Whether the token store was asked.
    pub store_asked: bool,
    pub stages: Vec<ToldStage>,
    pub upstream: Option<ToldForward>,
    pub answer: Option<String>,
    pub what_if: Vec<WhatIf>,
    pub notes: Vec<String>,
}

/// What one stage saw and decided.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ToldStage {
    pub stage: String,
    /// `passed`, `refused`, `unknown`, or `not reached`.
    pub outcome: String,
    pub saw: Vec<String>,
    pub decided: String,
    pub rules: Vec<ToldRule>,
}

/// A setting, and where it is written.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ToldRule {
    pub key: String,
    /// What is in force.
    pub value: String,
    /// `FILE:LINE`; absent: the default.
    pub place: Option<String>,
}

/// What would go upstream.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ToldForward {
    pub upstream: String,
    pub servers: Vec<String>,
    /// The backend is known to speak HTTP/2: the head goes as its fields.
    pub http2: bool,
    /// Byte for byte but for secrets and what is made anew for each request.
    pub head: String,
    /// Of the body, which goes on as it is.
    pub body_bytes: u64,
    /// In chunks.
    pub chunked: bool,
    /// Header fields that were left out for their name.
    pub fields_dropped: usize,
}

/// What another token or method would change.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct WhatIf {
    pub change: String,
    pub verdict: String,
    pub status: Option<u16>,
    pub reason: String,
    pub upstream: Option<String>,
    /// It is as it was.
    pub same: bool,
}

/// The stages in the order in which they judge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum PathStage {
    Head,
    Size,
    Origin,
    Target,
    Route,
    Query,
    Token,
    Page,
    Body,
    Identity,
    Policy,
    Limits,
    Forward,
}

impl PathStage {
    const ALL: [Self; 13] = [
        Self::Head,
        Self::Size,
        Self::Origin,
        Self::Target,
        Self::Route,
        Self::Query,
        Self::Token,
        Self::Page,
        Self::Body,
        Self::Identity,
        Self::Policy,
        Self::Limits,
        Self::Forward,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Head => "head",
            Self::Size => "size",
            Self::Origin => "origin",
            Self::Target => "target",
            Self::Route => "route",
            Self::Query => "query",
            Self::Token => "token",
            Self::Page => "page",
            Self::Body => "body",
            Self::Identity => "identity",
            Self::Policy => "policy",
            Self::Limits => "limits",
            Self::Forward => "forward",
        }
    }

    /// Which stage says such a no.
    const fn of(cause: &Cause, has_route: bool) -> Self {
        use RequestFault as R;
        match cause {
            Cause::Request(fault) => match fault {
                R::Head(_) => Self::Head,
                R::HeaderTimeout => Self::Head,
                R::TargetTooLong | R::HeaderTooLarge => Self::Size,
                R::Target(
                    request::target::TargetFault::PrefixSpelling | request::target::TargetFault::AmbiguousPath,
                ) => Self::Route,
                // Only what another proxy asks is refused so, and that is not explained.
                R::Target(_) | R::MethodNotAllowed | R::Verdict(_) => Self::Target,
                R::NoRoute => Self::Route,
                R::MethodOverride | R::QueryCharset => Self::Query,
                R::TokenMissing | R::Token(_) | R::QueryToken | R::OtherCredential => Self::Token,
                R::PastDepth => Self::Page,
                R::Body(_) | R::BodyTooLarge | R::BodyTimeout | R::BodyTooSlow => Self::Body,
            },
            Cause::Identity(_) | Cause::CannotTell(_) => Self::Identity,
            Cause::Policy(fault) => match fault {
                PolicyFault::Address if !has_route => Self::Origin,
                PolicyFault::Address => Self::Route,
                PolicyFault::Guessing(_) => Self::Identity,
                PolicyFault::Limit(_) => Self::Limits,
                PolicyFault::NoIdentity
                | PolicyFault::BasicUser
                | PolicyFault::Sudo
                | PolicyFault::Scope
                | PolicyFault::SudoScope
                | PolicyFault::TokenNetwork
                | PolicyFault::TokenMethod => Self::Policy,
            },
            Cause::Redirect | Cause::PlainText => Self::Origin,
            Cause::Upstream(_) | Cause::Draining | Cause::Bug => Self::Forward,
        }
    }
}

/// Tells what would become of a request.
pub fn explain(world: &ExplainWorld<'_>, question: &ExplainQuestion<'_>) -> Explanation {
    let rules = &world.pipeline.rules;
    let bytes = question.bytes;
    let end = match head::end_of_head(bytes, 0) {
        Some(end) if end > rules.limits.header_bytes => {
            return unreadable(world, bytes, Limits::refuse_size(rules.limits.target_bytes, bytes));
        }
        Some(end) => end,
        None if bytes.len() >= rules.limits.header_bytes => {
            return unreadable(world, bytes, Limits::refuse_size(rules.limits.target_bytes, bytes));
        }
        None if head::is_invalid_prefix(bytes, 0) => {
            return unreadable(world, bytes, HeadFault::RequestLine.into());
        }
        None => return incomplete(bytes),
    };
    match head::parse(&bytes[..end]) {
        Ok(view) => Telling { world, question, view: &view, head: &bytes[..end], rest: &bytes[end..] }.told(),
        Err(fault) => unreadable(world, bytes, fault.into()),
    }
}

/// The head has not come to its end.
fn incomplete(bytes: &[u8]) -> Explanation {
    let cause = Cause::Request(RequestFault::HeaderTimeout);
    let refusal = Refusal::from(cause);
    let (means, advice) = texts(refusal.reason()).unwrap_or_default();
    Explanation {
        verdict: "incomplete".into(),
        status: Some(refusal.status()),
        reason: refusal.reason().into(),
        means,
        advice,
        request: format!("{} bytes without the empty line that ends a head", bytes.len()),
        notes: vec!["the gateway waits for the rest of the head, for [limits] header_timeout at most".into()],
        ..Explanation::default()
    }
}

/// The bytes are no request that is taken.
fn unreadable(world: &ExplainWorld<'_>, bytes: &[u8], fault: RequestFault) -> Explanation {
    let cause = Cause::Request(fault);
    let refusal = Refusal::from(cause);
    let (means, advice) = texts(refusal.reason()).unwrap_or_default();
    let grant = world.pipeline.cors.grant(head::origins_of_unparsed(bytes));
    let answer = rendered(refusal, &envelope(world, grant), head::asks_for_head(bytes), true);
    let refused = PathStage::of(&cause, false);
    let stages = PathStage::ALL.into_iter().map(|stage| {
        let mut told =
            ToldStage { stage: stage.name().into(), outcome: outcome(stage, Some(refused)), ..Default::default() };
        if stage == refused {
            told.saw.push(format!("{} bytes", bytes.len()));
            told.decided = match fault {
                RequestFault::Head(fault) => fault.to_string(),
                _ => means.clone(),
            };
            told.rules = size_rules(world);
        }
        told
    });
    Explanation {
        verdict: "refuse".into(),
        status: Some(refusal.status()),
        reason: refusal.reason().into(),
        request: "bytes that are not taken for a request".into(),
        method: "-".into(),
        route: "none".into(),
        source: "none".into(),
        stages: stages.collect(),
        answer: Some(answer),
        means,
        advice,
        ..Explanation::default()
    }
}

fn outcome(stage: PathStage, refused: Option<PathStage>) -> String {
    match refused {
        Some(refused) if stage == refused => "refused",
        Some(refused) if stage > refused => "not reached",
        _ => "passed",
    }
    .into()
}

fn rule(world: &ExplainWorld<'_>, key: impl Into<String>, value: impl ToString) -> ToldRule {
    let key = key.into();
    ToldRule { place: world.places.of(&key), key, value: value.to_string() }
}

fn size_rules(world: &ExplainWorld<'_>) -> Vec<ToldRule> {
    let limits = &world.pipeline.rules.limits;
    vec![
        rule(world, "limits.header_bytes", limits.header_bytes),
        rule(world, "limits.target_bytes", limits.target_bytes),
    ]
}

/// What an answer of tollgate's own has besides the refusal, of a request of which nothing is known.
fn envelope<'a>(world: &'a ExplainWorld<'_>, grant: CorsGrant) -> Envelope<'a> {
    Envelope {
        date: "<made for each request, 29 bytes>",
        request_id: "<made for each request, 32 bytes>",
        cors: &world.pipeline.cors,
        grant,
        hsts: None,
        limits: None,
        location: None,
        basic: false,
        asker: None,
    }
}

/// The bytes of an answer of tollgate's own.
fn rendered(refusal: Refusal, envelope: &Envelope<'_>, head_only: bool, close: bool) -> String {
    let mut out = Vec::new();
    refusal.render(envelope, &mut Http1Answer { out: &mut out, head_only, close });
    String::from_utf8_lossy(&out).into_owned()
}

/// One readable request, and what is asked of it.
struct Telling<'t, 'v> {
    world: &'v ExplainWorld<'v>,
    question: &'v ExplainQuestion<'v>,
    view: &'t RequestView<'v>,
    head: &'v [u8],
    /// What came behind the head.
    rest: &'v [u8],
}

/// What the pipeline says of a request, its body included.
struct FullVerdict<'r> {
    facts: Facts,
    /// `None`: it is forwarded.
    cause: Option<Cause>,
    plan: Option<Plan<'r>>,
    /// The fault is in the body, which the backend gets a part of.
    in_body: bool,
    /// Of the body, as far as it is there.
    body_bytes: u64,
    body_ends: bool,
}

impl FullVerdict<'_> {
    fn verdict(&self) -> &'static str {
        match self.cause {
            None => "forward",
            Some(Cause::CannotTell(CannotTell::NotAsked)) => "unknown",
            Some(_) => "refuse",
        }
    }

    fn refusal(&self) -> Option<Refusal> {
        self.cause.map(Refusal::from).filter(|_| self.verdict() == "refuse")
    }

    fn reason(&self) -> &'static str {
        match self.cause {
            None => "ok",
            Some(cause) => Refusal::from(cause).reason(),
        }
    }
}

impl<'v> Telling<'_, 'v> {
    fn told(&self) -> Explanation {
        let (world, question, view) = (self.world, self.question, self.view);
        let pipeline = world.pipeline;
        let origin = Origin::of(view, &question.arrival, &pipeline.rules.trusted_proxies);
        let examined = request::examine(view, &pipeline.rules);
        let status = self.status(examined.as_ref().ok());
        let judged = self.judge(view, &origin, status.as_ref());
        let mut mask = Mask::of(Some(view), &pipeline.rules.token, &pipeline.rules.names);
        let presented = match &examined {
            Ok(examined) => examined.presented.as_ref(),
            Err(rejected) => rejected.presented.as_ref(),
        };
        if let Some(presented) = presented {
            mask.knows(&presented.value, Digest::of(&presented.value).id());
        }
        let (means, advice) = match judged.verdict() {
            "unknown" => (
                "nobody has said whether the token is valid".into(),
                "send the request once, so that the cache knows the token; or say whose it is (`--as`, `as`)".into(),
            ),
            _ => texts(judged.reason()).unwrap_or_default(),
        };
        let facts = &judged.facts;
        let route = facts.route.and_then(|index| pipeline.rules.routes.get(index));
        let mut told = Explanation {
            verdict: judged.verdict().into(),
            status: judged.refusal().map(|refusal| refusal.status()),
            reason: judged.reason().into(),
            means,
            advice,
            request: format!("{} {}", mask::text(view.method_bytes), mask.target(view.target)),
            method: facts.method.as_str().into(),
            route: route.map_or("none", |route| &route.name).into(),
            source: facts.source.as_str().into(),
            token: facts.token.map(|digest| digest.id().to_string()),
            user: facts.principal.as_ref().map(|principal| principal.user().into()),
            store_asked: matches!(question.witness, Witness::Store(_)),
            upstream: judged.plan.as_ref().map(|plan| self.forwarded(plan, &judged, &origin, &mask)),
            answer: judged.refusal().map(|refusal| self.answered(refusal, &judged)),
            notes: self.notes(&judged),
            ..Explanation::default()
        };
        let teller = StageTeller {
            telling: self,
            judged: &judged,
            examined: examined.as_ref().ok(),
            origin: &origin,
            route,
            mask: &mask,
        };
        told.stages = PathStage::ALL.into_iter().map(|stage| teller.stage(stage)).collect();
        told.what_if = self.what_if(&judged, &origin);
        told
    }

    /// What is assumed or known of the token. `None`: the cache is asked.
    fn status(&self, examined: Option<&Examined<'_>>) -> Option<TokenStatus> {
        match &self.question.witness {
            Witness::Cache | Witness::Store(Err(_)) => None,
            Witness::Store(Ok(status)) => Some(status.clone()),
            Witness::Assumed { user, scopes } => {
                let presented = examined.and_then(|examined| examined.presented.as_ref());
                let digest = presented.map_or(Digest::of(b""), |presented| Digest::of(&presented.value));
                Some(assumed(digest, user, scopes, self.question.now))
            }
        }
    }

    fn judge<'r>(&self, view: &RequestView<'r>, origin: &Origin<'_>, status: Option<&TokenStatus>) -> FullVerdict<'r>
    where
        'v: 'r,
    {
        let (question, pipeline) = (self.question, self.world.pipeline);
        if question.arrival.redirect.is_some() {
            let cause = Some(pipeline.redirect(view));
            let facts = Facts::none(view.method, origin.client);
            return FullVerdict { facts, cause, plan: None, in_body: false, body_bytes: 0, body_ends: true };
        }
        let (verdict, facts) = match status {
            Some(status) => pipeline.suppose(view, origin, question.now, status),
            None => match pipeline.admit(view, origin, question.now, Mode::Observe) {
                Admission::Decided(verdict, facts) => (verdict, facts),
                // Nothing is waited for by who only observes.
                Admission::Waiting(pending) => (Verdict::Refuse(Cause::Bug.into()), pending.facts().clone()),
            },
        };
        let nothing = FullVerdict { facts, cause: None, plan: None, in_body: false, body_bytes: 0, body_ends: true };
        match verdict {
            Verdict::Refuse(refusal) => {
                let cause = match (refusal.cause(), &question.witness) {
                    (Cause::CannotTell(CannotTell::NotAsked), Witness::Store(Err(why))) => Cause::CannotTell(*why),
                    (cause, _) => cause,
                };
                FullVerdict { cause: Some(cause), ..nothing }
            }
            Verdict::Forward(plan) => {
                let mut body = BodyWalk { rest: self.rest, bytes: 0, ends: false };
                let fault = body.walk(view.body, &plan).err();
                let (body_bytes, body_ends) = (body.bytes, body.ends);
                let (in_body, cause) = (fault.is_some(), fault.map(Cause::Request));
                FullVerdict { plan: Some(plan), cause, in_body, body_bytes, body_ends, ..nothing }
            }
        }
    }

    fn forwarded(
        &self,
        plan: &Plan<'_>,
        judged: &FullVerdict<'_>,
        origin: &Origin<'_>,
        mask: &Mask<'_>,
    ) -> ToldForward {
        let Self { world, view, .. } = self;
        let rules = &world.pipeline.forward;
        let own_id = request_id(view);
        // Ids of the right length: what is made for each request is not told.
        let ids = || NewIds { trace_id: NonZeroU128::MIN, span: NonZeroU64::MIN, sampled: false };
        let trace = TraceContext::begin(rules.trace, view, ids);
        let made = Made { request_id: own_id.is_none(), trace: rules.trace.makes_spans() };
        let mut head = Vec::new();
        let id = own_id.unwrap_or("00000000000000000000000000000000");
        let fields_dropped = plan.write_head(view, rules, origin, id, trace.as_ref(), &mut Http1Head(&mut head));
        let upstream = world.upstreams.get(plan.upstream).cloned().unwrap_or_default();
        ToldForward {
            upstream: upstream.name,
            servers: upstream.servers,
            http2: upstream.http2,
            head: mask.head(&head, made),
            body_bytes: judged.body_bytes,
            chunked: view.body == Framing::Chunked,
            fields_dropped,
        }
    }

    fn answered(&self, refusal: Refusal, judged: &FullVerdict<'_>) -> String {
        let Self { world, question, view, .. } = self;
        let pipeline = world.pipeline;
        let close = judged.in_body
            || refusal.must_close()
            || !view.keep_alive
            || !view.body.can_be_skipped(view.expects_continue);
        let grant = pipeline.cors.grant(view.fields_of(FieldKind::Origin).map(|field| field.value));
        let facts = &judged.facts;
        let limits = LimitFields::of(&pipeline.limits, &facts.limits, facts.principal.as_deref());
        let hsts = question.arrival.tls.as_ref().and_then(|tls| tls.hsts.as_deref());
        let port = question.arrival.redirect.filter(|_| refusal.cause() == Cause::Redirect);
        let location = port.map(|port| Pipeline::elsewhere(view, port));
        let head_only = view.method == Method::Head;
        let plain = envelope(world, grant);
        let envelope = Envelope {
            request_id: request_id(view).unwrap_or(plain.request_id),
            hsts,
            limits: limits.as_ref(),
            location: location.as_deref(),
            basic: facts.route.and_then(|index| pipeline.rules.routes.get(index)).is_some_and(|route| route.basic),
            ..plain
        };
        rendered(refusal, &envelope, head_only, close)
    }

    fn notes(&self, judged: &FullVerdict<'_>) -> Vec<String> {
        let mut notes = Vec::new();
        if judged.verdict() == "unknown" {
            let why =
                if self.world.running { "the token is not in the gateway's cache" } else { "there is no gateway" };
            notes.push(format!("{why}, and the store was not asked: below is what each answer of it would mean"));
        }
        if !self.world.running {
            notes.push(
                "without a running gateway: nobody has used anything of a limit yet, and no server is known to be down"
                    .into(),
            );
        }
        if !judged.body_ends {
            notes.push(format!("the body is not whole: {} bytes of it are there", judged.body_bytes));
        }
        if let (Framing::Empty, Some(_), [_, ..]) = (self.view.body, &judged.plan, self.rest) {
            notes.push(format!(
                "{} bytes behind the request are not a part of it: they would be read as the next one",
                self.rest.len()
            ));
        }
        notes
    }
}

/// A token of this user that is in force.
fn assumed(digest: Digest, user: &str, scopes: &[String], now: Now) -> TokenStatus {
    let record = TokenRecord { scopes: scopes.to_vec(), ..TokenRecord::new(digest, user) };
    judge(Some(&record), &digest, now).0
}

/// Reads a body as the lanes do: to the byte where it ends, and no fault later than they would find it.
struct BodyWalk<'b> {
    rest: &'b [u8],
    bytes: u64,
    ends: bool,
}

impl BodyWalk<'_> {
    fn walk(&mut self, framing: Framing, plan: &Plan<'_>) -> Result<(), RequestFault> {
        let (mut scanner, limit) = (plan.body.clone(), plan.route.body_bytes);
        match framing {
            Framing::Empty => self.ends = true,
            Framing::Length(length) => {
                let end = self.rest.len().min(usize::try_from(length).unwrap_or(usize::MAX));
                self.ends = end as u64 == length;
                self.bytes = end as u64;
                judge_piece(&mut scanner, limit, 0, &self.rest[..end], self.ends)?;
            }
            Framing::Chunked => {
                let (mut chunks, mut rest) = (ChunkedBody::default(), self.rest);
                while !rest.is_empty() && !chunks.is_done() {
                    let run = chunks.next_data(rest).map_err(|_| RequestFault::Head(HeadFault::Framing))?;
                    let piece = &rest[run.start..run.end_of_run];
                    judge_piece(&mut scanner, limit, self.bytes, piece, false)?;
                    self.bytes += piece.len() as u64;
                    rest = &rest[run.end_of_run..];
                }
                self.ends = chunks.is_done();
                if self.ends {
                    judge_piece(&mut scanner, limit, self.bytes, b"", true)?;
                }
            }
        }
        Ok(())
    }
}

/// Another request, which differs from the one that is told of.
struct Variant {
    target: Vec<u8>,
    /// Puts a token into the header.
    token: Option<Vec<u8>>,
}

impl<'v> Telling<'_, 'v> {
    fn what_if(&self, base: &FullVerdict<'_>, origin: &Origin<'_>) -> Vec<WhatIf> {
        if self.question.arrival.redirect.is_some() {
            return Vec::new();
        }
        let pipeline = self.world.pipeline;
        let mut all = Vec::new();
        let bare = Variant { target: self.without_tokens(), token: None };
        if base.facts.source != crate::telemetry::metrics::TokenSource::None {
            all.push(self.supposed("without a token", &bare, None, self.view.method, base, origin));
        }
        let opens = base.facts.route.and_then(|index| pipeline.rules.routes.get(index));
        if opens.is_some_and(|route| !matches!(route.auth, Auth::None { .. })) {
            let any = Variant { token: Some(b"another-token".to_vec()), ..bare };
            let digest = Digest::of(b"another-token");
            let mut with = |change: &str, status: TokenStatus| {
                all.push(self.supposed(change, &any, Some(&status), self.view.method, base, origin));
            };
            with("with one token, in the header alone, that no store knows", TokenStatus::Invalid(Invalid::Unknown));
            let (user, now) = ("somebody", self.question.now);
            let scopes = known_scopes(self.world.pipeline);
            with("with a valid token without scopes", assumed(digest, user, &[], now));
            for scope in &scopes {
                let change = format!("with a valid token of scope {scope}");
                with(&change, assumed(digest, user, std::slice::from_ref(scope), now));
            }
        }
        for method in Method::FORWARDED.into_iter().filter(|method| *method != self.view.method) {
            all.push(self.with_method(method, base, origin));
        }
        all
    }

    /// The target without the parameters that carry tokens.
    fn without_tokens(&self) -> Vec<u8> {
        let query = self.view.query().unwrap_or_default();
        let scan = query::scan(query, &self.world.pipeline.rules.names);
        let action = |key| if key == Key::Token { ParamAction::Drop } else { ParamAction::Keep };
        let actions: Vec<_> = scan.params.iter().map(|param| action(param.key)).collect();
        let mut target = Vec::new();
        let edits = Edits::plan(&scan, &actions, query.len());
        edits.write_target(self.view.path(), self.view.query(), &mut target);
        target
    }

    /// The same request, with other tokens.
    fn supposed(
        &self,
        change: &str,
        variant: &Variant,
        status: Option<&TokenStatus>,
        method: Method,
        base: &FullVerdict<'_>,
        origin: &Origin<'_>,
    ) -> WhatIf {
        let rules = &self.world.pipeline.rules.token;
        let is_token = |field: &&Field<'_>| {
            let is_bearer = field.kind == FieldKind::Authorization && rules.bearer && bearer(field.value).is_some();
            field.kind != FieldKind::Alias && (is_bearer || is_token_header(field.name, rules))
        };
        let name = rules.header.as_bytes();
        let mut fields: request::view::Fields<'_> =
            self.view.fields.iter().filter(|field| !is_token(field)).map(|field| Field { ..*field }).collect();
        if let Some(token) = &variant.token {
            fields.push(Field { name, value: token, kind: FieldKind::EndToEnd });
        }
        let view = RequestView { target: &variant.target, fields, method, ..copy_of(self.view) };
        let judged = self.judge(&view, origin, status);
        self.what(change.into(), &judged, base)
    }

    fn with_method(&self, method: Method, base: &FullVerdict<'_>, origin: &Origin<'_>) -> WhatIf {
        let view = RequestView { method, method_bytes: method.as_str().as_bytes(), ..copy_of(self.view) };
        let examined = request::examine(&view, &self.world.pipeline.rules);
        let mut change = format!("with {}", method.as_str());
        let mut status = self.status(examined.as_ref().ok());
        if base.verdict() == "unknown" {
            change.push_str(" and a valid token of every scope");
            status = Some(assumed(Digest::of(b""), "somebody", &known_scopes(self.world.pipeline), self.question.now));
        }
        let judged = self.judge(&view, origin, status.as_ref());
        self.what(change, &judged, base)
    }

    fn what(&self, change: String, judged: &FullVerdict<'_>, base: &FullVerdict<'_>) -> WhatIf {
        let upstream = |judged: &FullVerdict<'_>| {
            judged.plan.as_ref().filter(|_| judged.cause.is_none()).map(|plan| plan.upstream)
        };
        let name = |place: usize| self.world.upstreams.get(place).map(|upstream| upstream.name.clone());
        WhatIf {
            change,
            verdict: judged.verdict().into(),
            status: judged.refusal().map(|refusal| refusal.status()),
            reason: judged.reason().into(),
            upstream: upstream(judged).and_then(name),
            same: judged.cause == base.cause && upstream(judged) == upstream(base),
        }
    }
}

/// All scopes that a configuration knows.
pub fn known_scopes(pipeline: &Pipeline) -> Vec<String> {
    let of_rules = pipeline.policy.scopes.iter().flat_map(|scopes| scopes.rules()).map(|rule| &rule.scope);
    let of_pools = pipeline.rules.routes.iter().flat_map(|route| &route.pools).map(|pool| &pool.scope);
    let mut all: Vec<String> = Vec::new();
    for scope in of_rules.chain(of_pools) {
        if !all.contains(scope) {
            all.push(scope.clone());
        }
    }
    all
}

/// A view that can have parts which live for a shorter time.
fn copy_of<'s, 'v: 's>(view: &RequestView<'v>) -> RequestView<'s> {
    RequestView {
        method: view.method,
        method_bytes: view.method_bytes,
        target: view.target,
        version: view.version,
        host: view.host,
        fields: view.fields.iter().map(|field| Field { ..*field }).collect(),
        body: view.body,
        keep_alive: view.keep_alive,
        expects_continue: view.expects_continue,
        websocket: view.websocket,
    }
}

/// Says what the stages saw.
struct StageTeller<'s, 't, 'v> {
    telling: &'s Telling<'t, 'v>,
    judged: &'s FullVerdict<'s>,
    /// `None`: the request was refused by its own bytes.
    examined: Option<&'s Examined<'s>>,
    origin: &'s Origin<'s>,
    route: Option<&'s Route>,
    mask: &'s Mask<'s>,
}

impl StageTeller<'_, '_, '_> {
    fn stage(&self, stage: PathStage) -> ToldStage {
        let judged = self.judged;
        let refused = judged.cause.as_ref().map(|cause| PathStage::of(cause, judged.facts.route.is_some()));
        let mut told =
            ToldStage { stage: stage.name().into(), outcome: outcome(stage, refused), ..ToldStage::default() };
        // A body is read while it passes, behind all other stages.
        if judged.in_body && stage > PathStage::Body {
            told.outcome = "passed".into();
        }
        // Limits by address are asked before the token store.
        let is_early = matches!(judged.cause, Some(Cause::Policy(PolicyFault::Limit(_))));
        if is_early && judged.facts.principal.is_none() && judged.facts.token.is_some() && stage == PathStage::Identity
        {
            told.outcome = "not reached".into();
        }
        if told.outcome == "refused" && judged.verdict() == "unknown" {
            told.outcome = "unknown".into();
        }
        match stage {
            PathStage::Head => self.head(&mut told),
            PathStage::Size => self.size(&mut told),
            PathStage::Origin => self.origin(&mut told),
            PathStage::Target => self.target(&mut told),
            PathStage::Route => self.route(&mut told),
            PathStage::Query => self.query(&mut told),
            PathStage::Token => self.token(&mut told),
            PathStage::Page => self.page(&mut told),
            PathStage::Body => self.body(&mut told),
            PathStage::Identity => self.identity(&mut told),
            PathStage::Policy => self.policy(&mut told),
            PathStage::Limits => self.limits(&mut told),
            PathStage::Forward => self.forward(&mut told),
        }
        match told.outcome.as_str() {
            "not reached" => {
                told.decided = String::new();
                told.saw.clear();
                told.rules.clear();
            }
            "refused" => {
                let (means, _) = texts(judged.reason()).unwrap_or_default();
                told.decided = format!("{}: {means}", judged.reason());
            }
            _ => {}
        }
        told
    }

    fn rule(&self, key: impl Into<String>, value: impl ToString) -> ToldRule {
        rule(self.telling.world, key, value)
    }

    fn pipeline(&self) -> &Pipeline {
        self.telling.world.pipeline
    }

    fn head(&self, told: &mut ToldStage) {
        let view = self.telling.view;
        let body = match view.body {
            Framing::Empty => "no body".to_owned(),
            Framing::Length(length) => format!("a body of {length} bytes"),
            Framing::Chunked => "a body in chunks".to_owned(),
        };
        told.saw.push(format!(
            "{} {}, {} header fields, {body}",
            mask::text(view.method_bytes),
            self.mask.target(view.target),
            view.fields.len()
        ));
        if view.websocket {
            told.saw.push("a WebSocket handshake".into());
        }
        told.decided = "can be read in one way only".into();
    }

    fn size(&self, told: &mut ToldStage) {
        let (head, target) = (self.telling.head.len(), self.telling.view.target.len());
        told.saw.push(format!("a head of {head} bytes, a target of {target}"));
        told.decided = "within the limits".into();
        told.rules = size_rules(self.telling.world);
    }

    fn origin(&self, told: &mut ToldStage) {
        let (origin, arrival) = (self.origin, &self.telling.question.arrival);
        let peer = arrival.peer.map_or("a Unix socket".to_owned(), |ip| ip.to_string());
        let client = origin.client.map_or("a Unix socket".to_owned(), |ip| ip.to_string());
        told.saw.push(format!(
            "from {peer}, {}, host {}",
            if arrival.tls.is_some() { "over TLS" } else { "in plain text" },
            mask::text(self.telling.view.host)
        ));
        let proxies = &self.pipeline().rules.trusted_proxies;
        told.decided = match proxies.trusts(arrival.peer.map(|ip| ip.to_canonical())) {
            true => format!(
                "the client is {client}, as a trusted proxy says; {}://{}",
                origin.scheme(),
                mask::text(origin.host())
            ),
            false => format!("the client is {client}; X-Forwarded-* of this peer are not believed"),
        };
        let networks: Vec<_> = proxies.networks.iter().map(ToString::to_string).collect();
        told.rules.push(self.rule("server.trusted_proxies", list(&networks)));
        let addresses = &self.pipeline().policy.addresses;
        for (key, list) in [("limits.allow", &addresses.allow), ("limits.deny", &addresses.deny)] {
            if *list != Default::default() {
                let networks: Vec<_> = list.networks.iter().map(ToString::to_string).collect();
                told.rules.push(self.rule(key, networks.join(", ")));
            }
        }
    }

    fn target(&self, told: &mut ToldStage) {
        let view = self.telling.view;
        told.saw.push(format!("path {}", self.mask.path(view.path())));
        if let Some(examined) = self.examined
            && examined.canonical != view.path()
        {
            told.saw.push(format!("matched as {}", self.mask.path(&examined.canonical)));
        }
        told.decided = format!("{} on a path that backends read in one way", view.method.as_str());
    }

    fn route(&self, told: &mut ToldStage) {
        let Some(route) = self.route else {
            let prefixes = self.telling.world.places.of("api.prefixes");
            told.saw.push("no route with this path, host and method".into());
            told.rules.push(ToldRule { key: "api.prefixes".into(), value: self.route_names(), place: prefixes });
            return;
        };
        told.saw.push(format!("{} on {}", methods(route.methods), hosts(route)));
        told.decided = format!("route {}, {}", route.name, auth_text(route.auth));
        told.rules.push(self.rule(route.at.as_str(), &route.name));
        if route.auth != Auth::Required {
            told.rules.push(self.rule(format!("{}.reason", route.at), &route.reason));
        }
        let examined = self.examined.map(|examined| examined.auth);
        if matches!(examined, Some(Auth::None { .. })) && examined != Some(route.auth) {
            told.decided.push_str(", but no token for a CORS preflight");
            told.rules.push(self.rule("api.cors_preflight", true));
        }
        if !matches!(examined, Some(Auth::None { .. })) {
            self.other_readings(route, told);
        }
        for (key, list) in [("allow", &route.addresses.allow), ("deny", &route.addresses.deny)] {
            if *list != Default::default() {
                let networks: Vec<_> = list.networks.iter().map(ToString::to_string).collect();
                told.rules.push(self.rule(format!("{}.{key}", route.at), networks.join(", ")));
            }
        }
    }

    /// What other servers could make of the path.
    fn other_readings(&self, route: &Route, told: &mut ToldStage) {
        let (view, rules) = (self.telling.view, &self.pipeline().rules);
        let path = request::target::canonical(view.path());
        let stricter = match rules.routes.other_readings(route, self.judged.facts.method, view.host, &path) {
            OtherReadings::AsOpen if rules.ambiguous_paths == AmbiguousPaths::Refuse => {
                told.rules.push(self.rule("api.ambiguous_paths", "refuse"));
                return;
            }
            OtherReadings::AsOpen => return,
            OtherReadings::Guarded(None) => {
                told.saw.push("another server could read a dot segment in it".into());
                return;
            }
            OtherReadings::WithToken(stricter) => {
                told.decided.push_str(", but needed for what another server could read");
                stricter
            }
            OtherReadings::Guarded(Some(stricter)) => stricter,
        };
        told.saw.push(format!("another server could read a path of {}, {}", stricter.name, auth_text(stricter.auth)));
        told.rules.push(self.rule(stricter.at.as_str(), &stricter.name));
    }

    fn route_names(&self) -> String {
        let names: Vec<_> = self.pipeline().rules.routes.iter().map(|route| route.name.as_str()).take(8).collect();
        format!("routes: {}", names.join(", "))
    }

    fn query(&self, told: &mut ToldStage) {
        let rules = &self.pipeline().rules;
        let query = self.telling.view.query().unwrap_or_default();
        let scan = query::scan(query, &rules.names);
        for param in &scan.params {
            let name = query.get(param.range.clone()).and_then(|piece| piece.split(|b| *b == b'=').next());
            let name = self.mask.path(name.unwrap_or_default());
            told.saw.push(format!("`{name}`, which backends may read as {}", key_name(param.key, &rules.names.token)));
        }
        if scan.params.is_empty() {
            told.saw.push(if query.is_empty() { "no query".into() } else { "no parameter that matters here".into() });
        }
        let value = match rules.method_override {
            MethodOverride::Refuse => "refuse",
            MethodOverride::Judge => "judge",
        };
        if self.judged.facts.overridden {
            told.saw.push(format!("a POST that is to be run as {}", self.judged.facts.method.as_str()));
        }
        told.rules.push(self.rule("token.method_override", value));
        told.decided = match self.examined {
            Some(examined) if !examined.edits.is_empty() => "forwarded without tokens and with the page numbers below",
            _ => "forwarded byte for byte",
        }
        .into();
    }

    fn token(&self, told: &mut ToldStage) {
        let (rules, facts) = (&self.pipeline().rules.token, &self.judged.facts);
        let view = self.telling.view;
        told.saw.push(match facts.source.as_str() {
            "none" => format!("none in {}, Authorization or the query", rules.header),
            source => format!("in: {source}"),
        });
        if let Some(token) = facts.token {
            told.saw.push(format!("one token, id {}", token.id()));
        }
        let aliases = view.fields_of(FieldKind::Alias).filter(|field| folds_to(field.name, &rules.header)).count();
        if aliases > 0 {
            told.saw.push(format!("{aliases} fields whose name is nearly that of the token header: never a token"));
        }
        if view.fields_of(FieldKind::Authorization).any(|field| bearer(field.value).is_none()) {
            told.saw.push("Authorization with another scheme than Bearer: never a token".into());
        }
        told.decided = match (self.examined.map(|examined| examined.auth), facts.token) {
            (Some(Auth::None { pass_token: true }), _) => "not looked at: the backend checks tokens itself",
            (Some(Auth::None { pass_token: false }), _) => "not looked at, and taken out",
            (_, Some(_)) => "one token, to be validated",
            (_, None) => "none, and none is needed",
        }
        .into();
        told.rules.push(self.rule("token.header", &rules.header));
        told.rules.push(self.rule("token.query", &self.pipeline().rules.names.token));
        told.rules.push(self.rule("token.bearer", rules.bearer));
        if let Some(route) = self.route.filter(|route| route.refuse_query_token) {
            told.rules.push(self.rule(format!("{}.query_token", route.at), "refuse"));
        }
    }

    fn page(&self, told: &mut ToldStage) {
        let (pagination, facts) = (&self.pipeline().rules.pagination, &self.judged.facts);
        let lists = matches!(facts.method, Method::Get | Method::Head) && self.route.is_some_and(|r| !r.is_web_page());
        let path = request::target::canonical(self.telling.view.path());
        let (at, rules) = match pagination.overriding(&path) {
            Some(place) => (format!("pagination.route[{place}]"), pagination.rules_for(&path)),
            None => ("pagination".to_owned(), pagination.rules_for(&path)),
        };
        let Some(rules) = rules.filter(|_| lists) else {
            told.decided = "not a list: page parameters are left alone".into();
            if lists {
                told.rules.push(self.rule(at, "enabled = false"));
            }
            return;
        };
        let PageRules { first_page, default_per_page, max_per_page, .. } = rules;
        let most = max_per_page.map_or("none".into(), |most| most.to_string());
        told.decided = match (facts.clamped.page, facts.clamped.per_page) {
            (false, false) => "within bounds",
            (true, false) => "page is brought within bounds",
            (false, true) => "per_page is brought within bounds",
            (true, true) => "page and per_page are brought within bounds",
        }
        .into();
        let value = format!("first_page {first_page}, default_per_page {default_per_page}, max_per_page {most}");
        told.rules.push(self.rule(at, value));
    }

    fn body(&self, told: &mut ToldStage) {
        let (view, judged) = (self.telling.view, self.judged);
        let types: Vec<_> = view.fields_of(FieldKind::ContentType).map(|field| mask::text(field.value)).collect();
        told.saw.push(match (view.body, types.as_slice()) {
            (Framing::Empty, _) => "no body".into(),
            (_, []) => "a body without a Content-Type".to_owned(),
            (_, types) => format!("a body of type {}", types.join(", ")),
        });
        if view.body != Framing::Empty && judged.plan.is_some() {
            let whole = if judged.body_ends { "" } else { ", which is not all of it" };
            told.saw.push(format!("{} bytes of it{whole}", judged.body_bytes));
        }
        told.decided = match (view.body, self.examined.map(|examined| examined.body.is_some())) {
            (Framing::Empty, _) => "nothing to read",
            (_, Some(true)) if judged.plan.is_some() => {
                "holds no field that a backend would use in place of what was judged"
            }
            (_, Some(true)) => {
                "of a type that can be read; its content is read while it passes, behind all other stages"
            }
            (_, _) => "not read",
        }
        .into();
        if let Some(examined) = self.examined
            && let Some(content_type) = &examined.content_type
        {
            told.saw.push(format!("forwarded with Content-Type: {}", mask::text(content_type)));
        }
        let check = if self.pipeline().rules.body.is_some() { "refuse" } else { "ignore" };
        told.rules.push(self.rule("token.body", check));
        if let Some(route) = self.route {
            let own = format!("{}.body_bytes", route.at);
            let key = if self.telling.world.places.of(&own).is_some() { own } else { "limits.body_bytes".into() };
            told.rules.push(self.rule(key, route.body_bytes.map_or("none".into(), |bytes| bytes.to_string())));
        }
    }

    fn identity(&self, told: &mut ToldStage) {
        let (facts, question) = (&self.judged.facts, self.telling.question);
        let asked = match (&question.witness, self.telling.world.running) {
            _ if facts.token.is_none() => "there is no token to ask about",
            (Witness::Cache, true) => "the cache was looked at; the store was not asked",
            (Witness::Cache, false) => "the store was not asked",
            (Witness::Assumed { .. }, _) => "taken to be valid, as you said; nobody was asked",
            (Witness::Store(_), _) => "the store was asked",
        };
        told.saw.push(asked.into());
        told.decided = match (&facts.principal, self.judged.cause) {
            (Some(principal), _) => principal_text(principal),
            (None, Some(Cause::CannotTell(CannotTell::NotAsked))) => {
                "whether the token is valid is not known here".into()
            }
            (None, _) => "nobody".into(),
        };
        told.rules.push(self.rule("store", self.pipeline().authenticator.store_names()));
        if self.telling.world.places.of("store").is_none() {
            let first = self.telling.world.places.of("store[0]");
            told.rules.iter_mut().for_each(|rule| rule.place.clone_from(&first));
        }
    }

    fn policy(&self, told: &mut ToldStage) {
        let policy = &self.pipeline().policy;
        let (Some(principal), Some(examined)) = (&self.judged.facts.principal, self.examined) else {
            told.decided = "nothing to ask without an identity".into();
            return;
        };
        if let Some(terms) = principal.terms() {
            let said = terms.said();
            for (what, words) in [("networks", &said.networks), ("methods", &said.methods)] {
                if !words.is_empty() {
                    told.saw.push(format!("the token's record has {what} {}", words.join(", ")));
                }
            }
        }
        if examined.asks_sudo {
            told.saw.push("asks to act as another user".into());
            told.rules.push(self.rule("token.sudo", if policy.switches.sudo { "allow" } else { "refuse" }));
        }
        let Some(scopes) = &policy.scopes else {
            told.decided = "no scopes are configured: a valid token may do everything".into();
            told.rules.push(self.rule("api.scopes", "none"));
            return;
        };
        told.saw.push(format!("scopes of the token: {}", list(principal.scopes())));
        let allowing: Vec<_> = scopes.allowing(principal.scopes(), examined.method, &examined.canonical).collect();
        let preset = scopes.rules().len().saturating_sub(self.telling.world.places.count("scope"));
        let key = |place: usize| match place.checked_sub(preset) {
            Some(own) => format!("scope[{own}]"),
            None => "api.scopes".into(),
        };
        for place in &allowing {
            let name = scopes.rules().get(*place).map_or("", |rule| &rule.scope);
            told.rules.push(self.rule(key(*place), name));
        }
        if allowing.is_empty() {
            for (place, known) in scopes.rules().iter().enumerate() {
                if known.methods.has(examined.method) && known.paths.iter().any(|p| p.matches(&examined.canonical)) {
                    told.rules.push(self.rule(key(place), format!("{} would allow it", known.scope)));
                }
            }
        }
        told.decided = "a scope of the token allows this method on this path".into();
    }

    fn limits(&self, told: &mut ToldStage) {
        let limits = &self.pipeline().limits;
        let facts = &self.judged.facts.limits;
        for fact in facts {
            let name = limits.name(fact.limit);
            let what = match fact.result {
                LimitResult::Allowed => "has room",
                LimitResult::Refused => "is used up",
                LimitResult::DryRun => "is used up, and only counts (dry_run)",
            };
            told.saw.push(format!("limit {name} {what}"));
            told.rules.push(self.rule(format!("limit[{}]", fact.limit), name));
        }
        if let Some(Cause::Policy(PolicyFault::Limit(excess))) = self.judged.cause {
            told.saw.push(format!("the client may come again in {} s", excess.retry_after));
        }
        told.decided = match (limits.is_empty(), facts.is_empty()) {
            (true, _) => "there are no limits",
            (false, true) => "no limit is for this request",
            (false, false) => "within all of them; nothing was taken",
        }
        .into();
    }

    fn forward(&self, told: &mut ToldStage) {
        let Some(plan) = &self.judged.plan else { return };
        let world = self.telling.world;
        let upstream = world.upstreams.get(plan.upstream);
        told.decided = format!("goes to upstream {}", upstream.map_or("", |upstream| &upstream.name));
        if let Some(upstream) = upstream {
            told.saw.push(format!("servers: {}", list(&upstream.servers)));
        }
        if let Some(canary) = plan.canary {
            let name = world.upstreams.get(canary.upstream).map_or("", |upstream| &upstream.name);
            told.decided.push_str(&format!(", a share of such requests to {name}"));
            told.rules.push(self.rule(format!("{}.canary", plan.route.at), name));
        }
        if self.judged.in_body {
            told.decided.push_str("; broken off when the fault in the body was found");
        }
        told.rules
            .push(self.rule(format!("upstream[{}]", plan.upstream), upstream.map_or("", |upstream| &upstream.name)));
        let credential = match world.pipeline.forward.credential {
            BackendCredential::Token => "token",
            BackendCredential::Identity => "identity",
            BackendCredential::Both => "both",
            BackendCredential::None => "none",
        };
        told.rules.push(self.rule("token.forward", credential));
    }
}

fn principal_text(principal: &Principal) -> String {
    let scopes =
        if principal.scopes().is_empty() { String::new() } else { format!(", scopes {}", list(principal.scopes())) };
    let plan = principal.terms().map(|terms| terms.said().plan.as_str()).filter(|plan| !plan.is_empty());
    let plan = plan.map_or(String::new(), |plan| format!(", plan {plan}"));
    format!("user {}, token {}{scopes}{plan}", principal.user(), principal.token())
}

fn list(words: &[String]) -> String {
    if words.is_empty() { "none".into() } else { words.join(", ") }
}

/// The methods of a route, in words.
pub fn methods(methods: Methods) -> String {
    match methods {
        Methods::ALL => "any method".into(),
        some => some.names().collect::<Vec<_>>().join(" "),
    }
}

/// The hosts of a route, in words.
pub fn hosts(route: &Route) -> String {
    let hosts: Vec<_> = route.hosts.iter().map(ToString::to_string).collect();
    if hosts.is_empty() { "any host".into() } else { hosts.join(", ") }
}

/// What a route asks of tokens, in words.
pub const fn auth_text(auth: Auth) -> &'static str {
    match auth {
        Auth::Required => "a token is required",
        Auth::Optional => "a token is optional",
        Auth::None { pass_token: false } => "no token",
        Auth::None { pass_token: true } => "the backend checks tokens itself",
    }
}

fn key_name(key: Key, token: &str) -> &str {
    match key {
        Key::Token => token,
        Key::Page => "page",
        Key::PerPage => "per_page",
        Key::Sudo => "sudo",
        Key::AccessToken => "access_token or bearer_token",
        Key::JobToken => "job_token",
        Key::Method => "_method",
    }
}

/// Whether CGI makes one name of two.
fn folds_to(name: &[u8], header: &str) -> bool {
    let fold = |byte: &u8| if byte.is_ascii_alphanumeric() { byte.to_ascii_lowercase() } else { b'_' };
    name.iter().map(fold).eq(header.as_bytes().iter().map(fold))
}
