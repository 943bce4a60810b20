//! 3 MAY THEY. Decides whether an identity may do what is asked. Pure. A [`Permit`] can only be made here, and nothing
//! is forwarded without one.

mod guessing;
mod limit;
mod limit_bucket;
mod limit_table;
mod scope;
mod weight;

pub use guessing::{GuessCount, GuessEpisode, GuessGuard, GuessRefusal, GuessSettings, GuessTurn, GuessVerdict};
pub use limit::{
    BucketSettings, Excess, InFlight, LeasesLacking, LimitCosts, LimitExceeded, LimitFact, LimitFacts, LimitKeyPart,
    LimitLack, LimitPlan, LimitResult, LimitScope, LimitSettings, LimitStage, LimitSubject, LimitsTaken,
    MOST_OWN_RATES, OddKind, OddTerms, PaidLeases, RequestLimits,
};
pub use limit_bucket::{CalendarPeriod, CalendarQuota, LimitAmounts, LimitedBy, RefillRate};
pub use scope::{ScopeRule, Scopes};
pub use weight::PlanWeights;

use crate::identity::Principal;
use crate::request::origin::AddressRules;
use crate::request::route::Auth;
use crate::request::view::Method;
use crate::request::{Examined, Switches};
use smallvec::SmallVec;
use std::net::IpAddr;
use std::sync::Arc;

/// The right to have one request forwarded, and for whom.
#[derive(Debug)]
pub struct Permit {
    principal: Option<Arc<Principal>>,
    /// Its place among the requests in flight of its limits, which ends with it.
    in_flight: SmallVec<[InFlight; 1]>,
}

impl Permit {
    /// `None` on a route that lets requests pass without a token.
    pub fn principal(&self) -> Option<&Arc<Principal>> {
        self.principal.as_ref()
    }

    /// Keeps places as long as the request goes on.
    pub fn keep(&mut self, in_flight: SmallVec<[InFlight; 1]>) {
        // Nearly always there are none, and those of one stage only otherwise.
        if self.in_flight.is_empty() {
            self.in_flight = in_flight;
        } else {
            self.in_flight.extend(in_flight);
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyFault {
    /// The route needs an identity and there is none.
    NoIdentity,
    /// Acting as somebody else is switched off.
    Sudo,
    /// None of the token's scopes allows this method on this path.
    Scope,
    /// None of the token's scopes allows acting as somebody else.
    SudoScope,
    /// Nobody from this address is let in.
    Address,
    /// The token's record names networks, and the client is in none of them.
    TokenNetwork,
    /// The token's record names methods, and this is none of them.
    TokenMethod,
    /// The token came as the password of HTTP Basic, with the name of another user than its own.
    BasicUser,
    Limit(Excess),
    /// Too many failed tokens came from this address, and this one would have to be looked up.
    Guessing(GuessRefusal),
}

/// What a valid token may do.
#[derive(Clone, Debug)]
pub struct Policy {
    pub switches: Switches,
    /// `None`: a valid token may do everything.
    pub scopes: Option<Scopes>,
    /// On every route.
    pub addresses: AddressRules,
    /// Where requests wait for a server.
    pub weights: PlanWeights,
}

impl Policy {
    /// Takes the client as [`crate::request::origin::Origin`] says it.
    pub fn decide(
        &self,
        examined: &Examined<'_>,
        principal: Option<Arc<Principal>>,
        client: Option<IpAddr>,
    ) -> Result<Permit, PolicyFault> {
        let needed = examined.auth == Auth::Required || examined.presented.is_some();
        let Some(known) = &principal else {
            return if needed {
                Err(PolicyFault::NoIdentity)
            } else if examined.other.is_some() && examined.asks_sudo && !self.switches.sudo {
                Err(PolicyFault::Sudo)
            } else {
                Ok(Permit { principal, in_flight: SmallVec::new() })
            };
        };
        within_terms(known, client, examined.method)?;
        let basic = examined.presented.as_ref().and_then(|presented| presented.basic.as_ref());
        if basic.is_some_and(|basic| basic.upstream(known.user()).is_none()) {
            return Err(PolicyFault::BasicUser);
        }
        // Without an identity a `sudo` means nothing to a backend that trusts ours; with one it would change it.
        if examined.asks_sudo && !self.switches.sudo {
            return Err(PolicyFault::Sudo);
        }
        if let Some(scopes) = &self.scopes {
            if !scopes.allow(known.scopes(), examined.method, &examined.canonical) {
                return Err(PolicyFault::Scope);
            }
            if examined.asks_sudo && !scopes.allow_sudo(known.scopes()) {
                return Err(PolicyFault::SudoScope);
            }
        }
        Ok(Permit { principal, in_flight: SmallVec::new() })
    }
}

/// Whether a token may be used from there and with this method, by its own record. Asked again while an exchange goes on.
pub fn within_terms(principal: &Principal, client: Option<IpAddr>, method: Method) -> Result<(), PolicyFault> {
    match principal.terms() {
        Some(terms) if !terms.allow_client(client) => Err(PolicyFault::TokenNetwork),
        Some(terms) if !terms.allow_method(method) => Err(PolicyFault::TokenMethod),
        _ => Ok(()),
    }
}
