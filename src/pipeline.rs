//! THE PATH. Every request goes through [`Pipeline::admit`], whichever lane it came on: what is asked, who asks, may
//! they, where to. Returns a decision and what was learned on the way; it counts nothing and writes nothing. With a token
//! that is in the cache it is synchronous from end to end.

use crate::clock::Now;
use crate::forward::{self, ForwardRules, Plan};
use crate::identity::{Authenticator, CannotTell, Checked, Mode, PendingLookup, Principal, TokenStatus};
use crate::policy::{
    GuessCount, GuessGuard, GuessRefusal, GuessTurn, GuessVerdict, LeasesLacking, LimitFacts, LimitLack, LimitStage,
    LimitSubject, LimitsTaken, PaidLeases, Permit, Policy, PolicyFault, RequestLimits,
};
use crate::reply::cors::Cors;
use crate::reply::{Cause, Refusal};
use crate::request::origin::Origin;
use crate::request::page::Clamped;
use crate::request::route::Auth;
use crate::request::view::{Framing, Method, RequestView};
use crate::request::{self, Examined, RequestFault};
use crate::share::LeaseOutcome;
use crate::store::credential::Digest;
use crate::telemetry::metrics::{CacheResult, TokenSource};
use smallvec::SmallVec;
use std::net::IpAddr;
use std::sync::Arc;

/// Everything that decides on requests, built from one configuration and never changed.
pub struct Pipeline {
    pub rules: request::Rules,
    pub policy: Policy,
    pub forward: ForwardRules,
    pub cors: Cors,
    pub authenticator: Arc<Authenticator>,
    pub limits: RequestLimits,
    pub guessing: GuessGuard,
}

#[expect(clippy::large_enum_variant, reason = "a box would cost the common case an allocation")]
pub enum Verdict<'r> {
    Forward(Plan<'r>),
    Refuse(Refusal),
}

/// What was learned of a request on its way to the verdict, for the log and the metrics. Decides nothing.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Whom the log and limits call the client; `None` behind a Unix socket.
    pub client: Option<IpAddr>,
    /// The route's place in the table; `None`: the request got to none.
    pub route: Option<usize>,
    /// The method that was judged.
    pub method: Method,
    /// It stands in X-HTTP-Method-Override; the request line says POST.
    pub overridden: bool,
    /// Where tokens stand in the request.
    pub source: TokenSource,
    pub query_token: bool,
    /// The one token that was presented. It may not have been validated.
    pub token: Option<Digest>,
    pub principal: Option<Arc<Principal>>,
    /// What the cache knew of the token, where it was asked.
    pub cache: Option<CacheResult>,
    pub clamped: Clamped,
    /// What the limits made of it.
    pub limits: LimitFacts,
    /// It took a turn at the token store, because its address guesses.
    pub took_turn: bool,
    /// What its failed token meant for its address.
    pub guess: GuessCount,
}

impl Facts {
    /// Of a request that no stage has looked at.
    pub fn none(method: Method, client: Option<IpAddr>) -> Self {
        Self {
            client,
            route: None,
            method,
            overridden: false,
            source: TokenSource::None,
            query_token: false,
            token: None,
            principal: None,
            cache: None,
            clamped: Clamped::default(),
            limits: LimitFacts::new(),
            took_turn: false,
            guess: GuessCount::Not,
        }
    }

    fn of(examined: &Examined<'_>, origin: &Origin<'_>) -> Self {
        let presented = examined.presented.as_ref();
        Self {
            route: Some(examined.route.index),
            overridden: examined.overridden,
            source: presented.map_or(TokenSource::None, |presented| presented.source),
            query_token: presented.is_some_and(|presented| presented.in_query),
            clamped: examined.clamped,
            ..Self::none(examined.method, origin.client)
        }
    }
}

/// A verdict, or the need to wait for the store.
pub enum Admission<'r> {
    Decided(Verdict<'r>, Facts),
    /// Never with [`Mode::Observe`].
    Waiting(Pending<'r>),
}

/// A request that waits for the token store, or for leases of limits that replicas share.
pub struct Pending<'r> {
    pipeline: &'r Pipeline,
    examined: Examined<'r>,
    facts: Facts,
    waiting: Awaited,
    limited: Limited,
}

/// What a request waits for.
enum Awaited {
    Lookup(PendingLookup),
    /// Its address's turn at the token store.
    Turn(GuessTurn),
    /// Leases: all else is decided.
    Lease(Permit, LeasesLacking),
}

/// A request for which nothing lacks but leases.
struct Unpaid<'r> {
    permit: Permit,
    examined: Examined<'r>,
    limited: Limited,
    lacking: LeasesLacking,
}

/// What became of a request's limits.
#[expect(clippy::large_enum_variant, reason = "a box would cost the common case an allocation")]
enum Settled<'r> {
    Verdict(Verdict<'r>),
    Unpaid(Box<Unpaid<'r>>),
}

/// What a request's limits are asked with, and have given so far.
struct Limited {
    now: Now,
    mode: Mode,
    headers: SmallVec<[u64; 2]>,
    /// Taken before the token store was asked.
    early: Option<Box<LimitsTaken>>,
    /// Of limits that replicas share; `None` until one has to be waited for.
    leases: Option<Box<LimitedLeases>>,
}

#[derive(Default)]
struct LimitedLeases {
    /// Of limits by address: they have to be waited for before the token store.
    lacking: Option<LeasesLacking>,
    /// What those said that were waited for.
    paid: PaidLeases,
}

impl Pipeline {
    /// Judges a request in plain text that should come over TLS. Nothing that was sent with a credential is sent elsewhere: who
    /// listened has it already, and the client should learn that it is wrong.
    pub fn redirect<'r>(&'r self, view: &RequestView<'r>) -> Cause {
        let is_asked =
            |examined: &Examined<'_>| !matches!(examined.route.auth, Auth::None { .. }) || view.query().is_none();
        let can_come_again = matches!(view.method, Method::Get | Method::Head) && view.body == Framing::Empty;
        match request::examine(view, &self.rules) {
            // A route without a look-up was not asked whether there is a token in the query.
            Ok(examined) if can_come_again && examined.presented.is_none() && is_asked(&examined) => Cause::Redirect,
            Err(refused) if can_come_again && refused.fault == RequestFault::TokenMissing => Cause::Redirect,
            Err(refused) => match Refusal::from(Cause::Request(refused.fault)) {
                refusal if refusal.auth_result().is_some() => Cause::PlainText,
                refusal => refusal.cause(),
            },
            Ok(_) => Cause::PlainText,
        }
    }

    /// Where a request in plain text is sent to: the same place on another port, with https.
    pub fn elsewhere(view: &RequestView<'_>, port: u16) -> Box<[u8]> {
        let host = view.host.strip_suffix(port_of(view.host)).unwrap_or(view.host);
        let port = if port == 443 { String::new() } else { format!(":{port}") };
        [b"https://", host, port.as_bytes(), view.target].concat().into()
    }

    /// Judges a request that came from an origin.
    pub fn admit<'r>(&'r self, view: &RequestView<'r>, origin: &Origin<'_>, now: Now, mode: Mode) -> Admission<'r> {
        let may_look_up = |digest: &Digest, turn: &mut GuessVerdict| {
            *turn = self.guessing.turn(origin.client, digest, now);
            matches!(turn, GuessVerdict::Free)
        };
        self.admit_by(view, origin, now, mode, |token, digest, turn| {
            self.authenticator.check_if(token, digest, now, mode, || may_look_up(digest, turn))
        })
    }

    /// Judges a request as [`Self::admit`] does in [`Mode::Observe`], as if this were known of its token. For those who tell what
    /// would become of a request, and never for one that is served: what it permits rests on an assumption.
    pub fn suppose<'r>(
        &'r self,
        view: &RequestView<'r>,
        origin: &Origin<'_>,
        now: Now,
        status: &TokenStatus,
    ) -> (Verdict<'r>, Facts) {
        let known = |_: &[u8], _: &Digest, _: &mut GuessVerdict| Checked::Known(status.clone(), CacheResult::Miss);
        match self.admit_by(view, origin, now, Mode::Observe, known) {
            Admission::Decided(verdict, facts) => (verdict, Facts { cache: None, ..facts }),
            // Nothing is waited for by who only observes.
            Admission::Waiting(pending) => (Verdict::Refuse(Cause::Bug.into()), pending.facts),
        }
    }

    /// `check` says what is known of a token, and may say that it has to take a turn before it is looked up.
    #[inline]
    fn admit_by<'r>(
        &'r self,
        view: &RequestView<'r>,
        origin: &Origin<'_>,
        now: Now,
        mode: Mode,
        check: impl FnOnce(&[u8], &Digest, &mut GuessVerdict) -> Checked,
    ) -> Admission<'r> {
        if !self.policy.addresses.admit(origin.client) {
            return refused(PolicyFault::Address, Facts::none(view.method, origin.client));
        }
        let examined = match request::examine(view, &self.rules) {
            Ok(examined) => examined,
            Err(refused) => {
                let facts = Facts {
                    route: refused.route.map(|route| route.index),
                    source: refused.source,
                    query_token: refused.query_token,
                    token: refused.presented.map(|presented| Digest::of(&presented.value)),
                    overridden: refused.method != view.method,
                    ..Facts::none(refused.method, origin.client)
                };
                return Admission::Decided(Verdict::Refuse(Cause::Request(refused.fault).into()), facts);
            }
        };
        let mut facts = Facts::of(&examined, origin);
        if !examined.route.addresses.admit(origin.client) {
            return refused(PolicyFault::Address, facts);
        }
        let headers = self.limits.header_keys(view);
        let limited = Limited { now, mode, headers, early: None, leases: None };
        let Some(presented) = &examined.presented else {
            let settled = self.settle(examined, None, limited, &mut facts);
            return self.admission(settled, facts);
        };
        let digest = Digest::of(&presented.value);
        facts.token = Some(digest);
        // Whose address is over its limit makes no work for the token store.
        let early = self.limits.has_early(examined.route.index);
        if early {
            let subject = limited.subject(&examined, facts.client, Some(&digest), None);
            let mut said = LimitFacts::new();
            if let Err(excess) = self.limits.check(&subject, LimitStage::Early, now, &mut said) {
                return refused(PolicyFault::Limit(excess), Facts { limits: said, ..facts });
            }
        }
        let mut turn = GuessVerdict::Free;
        let answer = match check(&presented.value, &digest, &mut turn) {
            Checked::Known(answer, result) => {
                facts.cache = Some(result);
                Ok(answer)
            }
            Checked::Waiting(lookup) => {
                facts.cache = Some(CacheResult::Miss);
                return self.wait(Awaited::Lookup(lookup), examined, facts, limited);
            }
            Checked::NotAsked => match turn {
                GuessVerdict::Free => Err(CannotTell::NotAsked),
                GuessVerdict::Turn(turn) => return self.wait(Awaited::Turn(turn), examined, facts, limited),
                GuessVerdict::Refused(refusal) => {
                    let verdict = self.refuse(guessing(refusal), &examined, &limited, &mut facts);
                    return Admission::Decided(verdict, facts);
                }
            },
        };
        let settled = self.answered(examined, answer, limited, &mut facts, now);
        self.admission(settled, facts)
    }

    fn admission<'r>(&'r self, settled: Settled<'r>, facts: Facts) -> Admission<'r> {
        match settled {
            Settled::Verdict(verdict) => Admission::Decided(verdict, facts),
            Settled::Unpaid(unpaid) => {
                let Unpaid { permit, examined, limited, lacking } = *unpaid;
                let waiting = Awaited::Lease(permit, lacking);
                Admission::Waiting(Pending { pipeline: self, examined, facts, waiting, limited })
            }
        }
    }

    fn wait<'r>(
        &'r self,
        awaited: Awaited,
        examined: Examined<'r>,
        mut facts: Facts,
        mut limited: Limited,
    ) -> Admission<'r> {
        facts.took_turn = matches!(awaited, Awaited::Turn(_));
        if self.limits.has_early(examined.route.index) {
            // Counted before the wait: else any number could wait at once.
            match self.take(&limited, &examined, &mut facts, LimitStage::Early) {
                Ok(taken) if taken.lacks() => {
                    limited.leases.get_or_insert_default().lacking = taken.into_lacking();
                }
                Ok(taken) => limited.early = Some(Box::new(taken)),
                Err(fault) => return refused(fault, facts),
            }
        }
        Admission::Waiting(Pending { pipeline: self, examined, facts, waiting: awaited, limited })
    }

    fn answered<'r>(
        &'r self,
        examined: Examined<'r>,
        answer: Result<TokenStatus, CannotTell>,
        limited: Limited,
        facts: &mut Facts,
        now: Now,
    ) -> Settled<'r> {
        let cause = match answer {
            Ok(TokenStatus::Valid(principal)) => {
                facts.principal = Some(Arc::clone(&principal));
                return self.settle(examined, Some(principal), limited, facts);
            }
            Ok(TokenStatus::Invalid(why)) => {
                if let (Mode::Serve, Some(digest)) = (limited.mode, &facts.token) {
                    facts.guess = self.guessing.failed(facts.client, digest, why, now);
                }
                Cause::Identity(why)
            }
            Err(why) => Cause::CannotTell(why),
        };
        Settled::Verdict(self.refuse(cause, &examined, &limited, facts))
    }

    /// Asks the policy and the limits, and plans what goes upstream.
    fn settle<'r>(
        &'r self,
        examined: Examined<'r>,
        principal: Option<Arc<Principal>>,
        limited: Limited,
        facts: &mut Facts,
    ) -> Settled<'r> {
        match self.policy.decide(&examined, principal, facts.client) {
            Ok(permit) => self.within_limits(permit, examined, limited, facts),
            Err(fault) => Settled::Verdict(self.refuse(Cause::Policy(fault), &examined, &limited, facts)),
        }
    }

    /// Asks the limits, and plans what goes upstream.
    fn within_limits<'r>(
        &'r self,
        mut permit: Permit,
        examined: Examined<'r>,
        mut limited: Limited,
        facts: &mut Facts,
    ) -> Settled<'r> {
        if !self.limits.is_empty() {
            let early = limited.early.take();
            let stage = if early.is_some() { LimitStage::Late } else { LimitStage::Both };
            match self.take(&limited, &examined, facts, stage) {
                Ok(taken) if taken.lacks() => {
                    limited.early = early;
                    let lacking = taken.into_lacking().unwrap_or_default();
                    return Settled::Unpaid(Box::new(Unpaid { permit, examined, limited, lacking }));
                }
                Ok(taken) => {
                    permit.keep(taken);
                    if let Some(early) = early {
                        permit.keep(*early);
                    }
                }
                Err(fault) => {
                    if let Some(early) = early {
                        self.limits.give_back(&early, limited.now);
                    }
                    return Settled::Verdict(Verdict::Refuse(Cause::Policy(fault).into()));
                }
            }
        }
        Settled::Verdict(Verdict::Forward(forward::plan(permit, examined)))
    }

    /// Refuses a request for another reason than a limit. The limits of its address count it: guessing is what they bound.
    fn refuse<'r>(&self, cause: Cause, examined: &Examined<'_>, limited: &Limited, facts: &mut Facts) -> Verdict<'r> {
        let counted = limited.early.is_some() || !self.limits.has_early(examined.route.index);
        match counted {
            true => Verdict::Refuse(cause.into()),
            false => match self.take(limited, examined, facts, LimitStage::Early) {
                Ok(taken) => {
                    // Counted by the store without being waited for: it is refused in any case.
                    for LimitLack { engine, lack, .. } in taken.into_lacking().unwrap_or_default().lacks {
                        drop(engine.enqueue(lack));
                    }
                    Verdict::Refuse(cause.into())
                }
                Err(fault) => Verdict::Refuse(Cause::Policy(fault).into()),
            },
        }
    }

    /// Takes from the limits what the request costs, and notes what they said.
    fn take(
        &self,
        limited: &Limited,
        examined: &Examined<'_>,
        facts: &mut Facts,
        stage: LimitStage,
    ) -> Result<LimitsTaken, PolicyFault> {
        let Facts { client, token, principal, limits, .. } = facts;
        let subject = limited.subject(examined, *client, token.as_ref(), principal.as_deref());
        let taken = match limited.mode {
            Mode::Serve => {
                let paid = limited.leases.as_ref().map_or(&[][..], |leases| &leases.paid);
                self.limits.take(&subject, stage, limited.now, paid, limits)
            }
            Mode::Observe => self.limits.check(&subject, stage, limited.now, limits),
        };
        taken.map_err(PolicyFault::Limit)
    }
}

/// The port of a host, with its colon; empty if it has none.
fn port_of(host: &[u8]) -> &[u8] {
    let colon = memchr::memrchr(b':', host).filter(|at| host[at + 1..].iter().all(u8::is_ascii_digit));
    colon.map_or(b"", |at| &host[at..])
}

fn guessing(refusal: GuessRefusal) -> Cause {
    Cause::Policy(PolicyFault::Guessing(refusal))
}

/// Before any stage that could have taken something.
fn refused<'r>(fault: PolicyFault, facts: Facts) -> Admission<'r> {
    Admission::Decided(Verdict::Refuse(Cause::Policy(fault).into()), facts)
}

impl Limited {
    fn subject<'a>(
        &'a self,
        examined: &'a Examined<'_>,
        client: Option<IpAddr>,
        token: Option<&'a Digest>,
        principal: Option<&'a Principal>,
    ) -> LimitSubject<'a> {
        LimitSubject {
            route: examined.route.index,
            route_name: &examined.route.name,
            method: examined.method,
            client,
            token,
            principal,
            headers: &self.headers,
        }
    }
}

impl<'r> Pending<'r> {
    /// What is known before the store has answered: for a client that does not wait so long.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Waits for the turn at the token store, if there is one to wait for. Nothing was asked before.
    pub async fn turn(&mut self) {
        if let Awaited::Turn(turn) = &mut self.waiting {
            tokio::time::sleep(turn.wait).await;
            turn.has_come();
        }
    }

    /// Waits for what lacks, and goes on from there.
    pub async fn verdict(mut self) -> (Verdict<'r>, Facts) {
        self.turn().await;
        let Self { pipeline, examined, mut facts, waiting, mut limited } = self;
        let settled = match waiting {
            Awaited::Lease(permit, lacking) => Settled::Unpaid(Box::new(Unpaid { permit, examined, limited, lacking })),
            waiting => {
                if let Some(lacking) = limited.leases.as_mut().and_then(|leases| leases.lacking.take()) {
                    limited.wait_for(lacking, pipeline).await;
                    match pipeline.take(&limited, &examined, &mut facts, LimitStage::Early) {
                        Ok(taken) => limited.early = Some(Box::new(taken)),
                        Err(fault) => return (Verdict::Refuse(Cause::Policy(fault).into()), facts),
                    }
                }
                let answer = pipeline.awaited(waiting, &examined, &mut facts).await;
                pipeline.answered(examined, answer, limited, &mut facts, pipeline.authenticator.now())
            }
        };
        let unpaid = match settled {
            Settled::Verdict(verdict) => return (verdict, facts),
            Settled::Unpaid(unpaid) => unpaid,
        };
        let Unpaid { permit, examined, mut limited, lacking } = *unpaid;
        limited.wait_for(lacking, pipeline).await;
        match pipeline.within_limits(permit, examined, limited, &mut facts) {
            Settled::Verdict(verdict) => (verdict, facts),
            // Every shared limit has said something.
            Settled::Unpaid(_) => (Verdict::Refuse(Cause::Bug.into()), facts),
        }
    }
}

impl Pipeline {
    /// What the token store says.
    async fn awaited(
        &self,
        waiting: Awaited,
        examined: &Examined<'_>,
        facts: &mut Facts,
    ) -> Result<TokenStatus, CannotTell> {
        let checked = match (waiting, &examined.presented, &facts.token) {
            (Awaited::Lookup(lookup), ..) => Checked::Waiting(lookup),
            (Awaited::Turn(_turn), Some(presented), Some(digest)) => {
                self.authenticator.check(&presented.value, digest, self.authenticator.now(), Mode::Serve)
            }
            // Who presents no token waits for none.
            (Awaited::Turn(_) | Awaited::Lease(..), ..) => Checked::NotAsked,
        };
        match checked {
            Checked::Waiting(lookup) => {
                let (answer, result) = lookup.answer().await;
                facts.cache = Some(result);
                answer
            }
            Checked::Known(answer, result) => {
                facts.cache = Some(result);
                Ok(answer)
            }
            Checked::NotAsked => Err(CannotTell::NotAsked),
        }
    }
}

impl Limited {
    /// Waits for leases, of all limits at once. Limits that refused before are asked alone at first: what the others would count for
    /// a request that is refused is lost.
    async fn wait_for(&mut self, lacking: LeasesLacking, pipeline: &Pipeline) {
        let paid = &mut self.leases.get_or_insert_default().paid;
        paid.extend(lacking.paid);
        let (doubtful, others): (Vec<_>, Vec<_>) =
            lacking.lacks.into_iter().partition(|lack| lack.engine.is_doubtful(&lack.lack.key));
        for lacks in [doubtful, others] {
            // All of them are in line before the first is waited for.
            let line_up = |lack: LimitLack| (lack.limit, lack.dry_run, lack.engine.enqueue(lack.lack));
            let waits: Vec<_> = lacks.into_iter().map(line_up).collect();
            let mut refused = false;
            for (limit, dry_run, wait) in waits {
                let outcome = wait.outcome().await;
                refused |= !dry_run && outcome != LeaseOutcome::Paid;
                paid.push((limit, outcome));
            }
            if refused {
                break;
            }
        }
        self.now = pipeline.authenticator.now();
    }
}
