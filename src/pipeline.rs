//! THE PATH. Every request goes through [`Pipeline::admit`], whichever lane it came on: what is asked, who asks, may
//! they, where to. Returns a decision and what was learned on the way; it counts nothing and writes nothing. With a token
//! that is in the cache it is synchronous from end to end.

use crate::clock::Now;
use crate::forward::{self, ForwardRules, Plan};
use crate::identity::{Authenticator, CannotTell, Checked, Mode, PendingLookup, Principal, TokenStatus};
use crate::policy::Policy;
use crate::reply::cors::Cors;
use crate::reply::{Cause, Refusal};
use crate::request::origin::Origin;
use crate::request::page::Clamped;
use crate::request::route::Auth;
use crate::request::view::{Framing, Method, RequestView};
use crate::request::{self, Examined, RequestFault};
use crate::store::credential::Digest;
use crate::telemetry::metrics::{CacheResult, TokenSource};
use std::net::IpAddr;
use std::sync::Arc;

/// Everything that decides on requests, built from one configuration and never changed.
pub struct Pipeline {
    pub rules: request::Rules,
    pub policy: Policy,
    pub forward: ForwardRules,
    pub cors: Cors,
    pub authenticator: Arc<Authenticator>,
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

/// A request that waits for the token store.
pub struct Pending<'r> {
    pipeline: &'r Pipeline,
    examined: Examined<'r>,
    facts: Facts,
    waiting: PendingLookup,
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

    /// Judges a request that came from an origin.
    pub fn admit<'r>(&'r self, view: &RequestView<'r>, origin: &Origin<'_>, now: Now, mode: Mode) -> Admission<'r> {
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
        let Some(presented) = &examined.presented else {
            return Admission::Decided(self.settle(examined, None), facts);
        };
        let digest = Digest::of(&presented.value);
        facts.token = Some(digest);
        let checked = self.authenticator.check(&presented.value, &digest, now, mode);
        let answer = match checked {
            Checked::Known(answer, result) => {
                facts.cache = Some(result);
                Ok(answer)
            }
            Checked::Waiting(waiting) => {
                facts.cache = Some(CacheResult::Miss);
                return Admission::Waiting(Pending { pipeline: self, examined, facts, waiting });
            }
            Checked::NotAsked => Err(CannotTell::NotAsked),
        };
        let verdict = self.answered(examined, answer, &mut facts);
        Admission::Decided(verdict, facts)
    }

    fn answered<'r>(
        &'r self,
        examined: Examined<'r>,
        answer: Result<TokenStatus, CannotTell>,
        facts: &mut Facts,
    ) -> Verdict<'r> {
        match answer {
            Ok(TokenStatus::Valid(principal)) => {
                facts.principal = Some(Arc::clone(&principal));
                self.settle(examined, Some(principal))
            }
            Ok(TokenStatus::Invalid(why)) => Verdict::Refuse(Cause::Identity(why).into()),
            Err(why) => Verdict::Refuse(Cause::CannotTell(why).into()),
        }
    }

    /// Asks the policy and plans what goes upstream.
    fn settle<'r>(&'r self, examined: Examined<'r>, principal: Option<Arc<Principal>>) -> Verdict<'r> {
        match self.policy.decide(&examined, principal) {
            Ok(permit) => Verdict::Forward(forward::plan(permit, examined)),
            Err(fault) => Verdict::Refuse(Cause::Policy(fault).into()),
        }
    }
}

impl<'r> Pending<'r> {
    /// What is known before the store has answered: for a client that does not wait so long.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Waits for the store and goes on from there.
    pub async fn verdict(self) -> (Verdict<'r>, Facts) {
        let Self { pipeline, examined, mut facts, waiting } = self;
        let (answer, result) = waiting.answer().await;
        facts.cache = Some(result);
        let verdict = pipeline.answered(examined, answer, &mut facts);
        (verdict, facts)
    }
}
