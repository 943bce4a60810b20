//! THE PATH. Every request goes through [`Pipeline::admit`], whichever lane it came on: what is asked, who asks, may
//! they, where to. Returns a decision and writes to nothing but counters. With a token that is in the cache it is
//! synchronous from end to end.

use crate::Now;
use crate::forward::{self, ForwardRules, Plan};
use crate::identity::{Authenticator, CannotTell, Checked, Principal, TokenStatus, Waiting};
use crate::policy::Policy;
use crate::reply::cors::Cors;
use crate::reply::{Cause, Refusal};
use crate::request::route::Route;
use crate::request::token::TokenLocation;
use crate::request::view::{Method, RequestView};
use crate::request::{self, Examined};
use crate::store::credential::{Digest, TokenId};
use crate::telemetry::metrics::{AuthResult, Clamp, Metrics, TokenSource};
use std::sync::Arc;

/// Everything that decides on requests, built from one configuration and never changed.
pub struct Pipeline {
    pub rules: request::Rules,
    pub policy: Policy,
    pub forward: ForwardRules,
    pub cors: Cors,
    pub authenticator: Arc<Authenticator>,
    pub metrics: Arc<Metrics>,
}

#[expect(clippy::large_enum_variant, reason = "a box would cost the common case an allocation")]
pub enum Verdict<'r> {
    Forward(Plan<'r>),
    Refuse(Refused<'r>),
}

/// A no, with what the log wants to know.
#[derive(Debug)]
pub struct Refused<'r> {
    pub refusal: Refusal,
    pub route: Option<&'r Route>,
    /// The method that was judged.
    pub method: Method,
    pub token: Option<TokenId>,
    pub source: TokenSource,
}

/// A verdict, or the need to ask the store for one.
pub enum Admission<'r> {
    Decided(Verdict<'r>),
    Waiting(Pending<'r>),
}

/// A request that waits for the token store.
pub struct Pending<'r> {
    pipeline: &'r Pipeline,
    examined: Examined<'r>,
    digest: Digest,
    waiting: Waiting,
}

impl Pipeline {
    /// Judges a request.
    pub fn admit<'r>(&'r self, view: &RequestView<'r>, now: Now) -> Admission<'r> {
        let examined = match request::examine(view, &self.rules) {
            Ok(examined) => examined,
            Err(refused) => {
                let source = if refused.query_token { TokenSource::Query } else { TokenSource::None };
                if refused.query_token {
                    self.metrics.query_token();
                }
                return Admission::Decided(self.refuse(
                    Cause::Request(refused.fault).into(),
                    refused.route,
                    refused.method,
                    None,
                    source,
                ));
            }
        };
        let Some(presented) = &examined.presented else {
            return Admission::Decided(self.settle(examined, None));
        };
        if presented.in_query {
            self.metrics.query_token();
        }
        let digest = Digest::of(&presented.value);
        match self.authenticator.check(&presented.value, &digest, now) {
            Checked::Known(answer) => Admission::Decided(self.answered(examined, &digest, Ok(answer))),
            Checked::Waiting(waiting) => Admission::Waiting(Pending { pipeline: self, examined, digest, waiting }),
        }
    }

    fn answered<'r>(
        &'r self,
        examined: Examined<'r>,
        digest: &Digest,
        answer: Result<TokenStatus, CannotTell>,
    ) -> Verdict<'r> {
        let cause = match answer {
            Ok(TokenStatus::Valid(principal)) => return self.settle(examined, Some(principal)),
            Ok(TokenStatus::Invalid(why)) => Cause::Identity(why),
            Err(why) => Cause::CannotTell(why),
        };
        self.refuse(cause.into(), Some(examined.route), examined.method, Some(digest.id()), source(&examined))
    }

    /// Asks the policy and plans what goes upstream.
    fn settle<'r>(&'r self, examined: Examined<'r>, principal: Option<Arc<Principal>>) -> Verdict<'r> {
        let result = if principal.is_some() { AuthResult::Valid } else { AuthResult::Anonymous };
        let token = principal.as_deref().map(Principal::token);
        let method = examined.method;
        match self.policy.decide(&examined, principal) {
            Ok(permit) => {
                self.metrics.auth(result, "ok", source(&examined));
                if let Some(generation) = permit.principal().and_then(|principal| principal.generation()) {
                    self.metrics.rotated(generation);
                }
                if examined.clamped.page {
                    self.metrics.clamped(Clamp::Page);
                }
                if examined.clamped.per_page {
                    self.metrics.clamped(Clamp::PerPage);
                }
                if examined.overridden {
                    self.metrics.method_overridden();
                }
                Verdict::Forward(forward::plan(permit, examined))
            }
            Err(fault) => {
                self.refuse(Cause::Policy(fault).into(), Some(examined.route), method, token, source(&examined))
            }
        }
    }

    fn refuse<'r>(
        &self,
        refusal: Refusal,
        route: Option<&'r Route>,
        method: Method,
        token: Option<TokenId>,
        source: TokenSource,
    ) -> Verdict<'r> {
        if let Some(result) = refusal.auth_result() {
            self.metrics.auth(result, refusal.reason(), source);
        }
        Verdict::Refuse(Refused { refusal, route, method, token, source })
    }
}

impl<'r> Pending<'r> {
    /// Waits for the store and goes on from there.
    pub async fn verdict(self) -> Verdict<'r> {
        let answer = self.waiting.answer().await;
        self.pipeline.answered(self.examined, &self.digest, answer)
    }
}

/// The source as metrics and logs name it.
pub fn source(examined: &Examined<'_>) -> TokenSource {
    source_label(examined.presented.as_ref().map(|presented| presented.source))
}

pub fn source_label(source: Option<TokenLocation>) -> TokenSource {
    match source {
        None => TokenSource::None,
        Some(TokenLocation::Header) => TokenSource::Header,
        Some(TokenLocation::Query) => TokenSource::Query,
        Some(TokenLocation::Bearer) => TokenSource::Bearer,
        Some(TokenLocation::Several) => TokenSource::Several,
    }
}
