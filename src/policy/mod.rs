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
    BucketSettings, Excess, InFlight, LeasesLacking, LimitCosts, LimitFact, LimitFacts, LimitKeyPart, LimitLack,
    LimitPlan, LimitResult, LimitScope, LimitSettings, LimitStage, LimitSubject, LimitsTaken, MOST_OWN_RATES, OddKind,
    OddTerms, PaidLeases, RequestLimits,
};
pub use limit_bucket::{CalendarPeriod, CalendarQuota, LimitAmounts, LimitedBy, RefillRate};
pub use scope::{ScopeRule, Scopes};
pub use weight::PlanWeights;

use crate::identity::Principal;
use crate::request::origin::AddressRules;
use crate::request::route::Auth;
use crate::request::view::Method;
use crate::request::{Examined, Switches};
use std::net::IpAddr;
use std::sync::Arc;

/// The right to have one request forwarded, and for whom.
#[derive(Debug)]
pub struct Permit {
    principal: Option<Arc<Principal>>,
    /// Its places among the requests in flight of its limits, which end with it.
    taken: LimitsTaken,
}

impl Permit {
    /// `None` on a route that lets requests pass without a token.
    pub fn principal(&self) -> Option<&Arc<Principal>> {
        self.principal.as_ref()
    }

    /// Keeps places as long as the request goes on.
    pub fn keep(&mut self, taken: LimitsTaken) {
        self.taken.join(taken);
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
                Ok(Permit { principal, taken: LimitsTaken::default() })
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
        Ok(Permit { principal, taken: LimitsTaken::default() })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Now;
    use crate::config::{Probe, parse};
    use crate::identity::{TokenStatus, judge};
    use crate::request::{examine, head};
    use crate::store::TokenRecord;
    use crate::store::credential::Digest;
    use crate::store::terms::{SaidTerms, TokenTerms};

    fn principal(scopes: &[&str], networks: &[&str], methods: &[&str]) -> Arc<Principal> {
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let said = SaidTerms { networks: owned(networks), methods: owned(methods), ..SaidTerms::default() };
        let digest = Digest::of(b"t");
        let mut record = TokenRecord::new(digest, "ann");
        record.scopes = owned(scopes);
        record.terms = TokenTerms::of(said).unwrap();
        match judge(Some(&record), &digest, Now { mono_ms: 0, unix_ms: 1_700_000_000_000 }) {
            (TokenStatus::Valid(principal), _) => principal,
            (TokenStatus::Invalid(why), _) => panic!("{why:?}"),
        }
    }

    #[test]
    fn who_may_do_what() {
        let scope = "[[scope]]\nname = \"api\"\n[[scope]]\nname = \"read\"\nmethods = [\"GET\"]\n[[scope]]\nname = \"sudo\"\nsudo = true\n";
        let open = "[[route]]\npath = \"/api/v3/open/*\"\nauth = \"optional\"\nreason = \"r\"\n";
        let sudo = "[token]\nsudo = \"allow\"\n";
        let (with, both) = (format!("{scope}{open}"), format!("{sudo}{scope}"));
        let any = || Some(principal(&["api"], &[], &[]));
        let bound = || Some(principal(&["api"], &["10.0.0.0/8"], &["GET"]));
        let t = "PRIVATE-TOKEN: t";
        for (config, request, known, client, expected) in [
            ("", "GET /api/v3/a", any(), [10, 0, 0, 1], Ok(true)),
            ("", "GET /api/v3/a", None, [10, 0, 0, 1], Err(PolicyFault::NoIdentity)),
            (open, "GET /api/v3/open/a", None, [10, 0, 0, 1], Err(PolicyFault::NoIdentity)),
            (open, "GET /api/v3/open/a without", None, [10, 0, 0, 1], Ok(false)),
            // By the token's own record.
            ("", "GET /api/v3/a", bound(), [10, 0, 0, 1], Ok(true)),
            ("", "GET /api/v3/a", bound(), [11, 0, 0, 1], Err(PolicyFault::TokenNetwork)),
            ("", "POST /api/v3/a", bound(), [10, 0, 0, 1], Err(PolicyFault::TokenMethod)),
            // As somebody else.
            ("", "GET /api/v3/a?sudo=root", any(), [10, 0, 0, 1], Err(PolicyFault::Sudo)),
            (sudo, "GET /api/v3/a?sudo=root", any(), [10, 0, 0, 1], Ok(true)),
            (&both, "GET /api/v3/a?sudo=root", any(), [10, 0, 0, 1], Err(PolicyFault::SudoScope)),
            (&both, "GET /api/v3/a", any(), [10, 0, 0, 1], Ok(true)),
            (&both, "GET /api/v3/a?sudo=root", Some(principal(&["api", "sudo"], &[], &[])), [10, 0, 0, 1], Ok(true)),
            // By scope.
            (&with, "POST /api/v3/a", any(), [10, 0, 0, 1], Ok(true)),
            (&with, "POST /api/v3/a", Some(principal(&["read"], &[], &[])), [10, 0, 0, 1], Err(PolicyFault::Scope)),
            (&with, "GET /api/v3/a", Some(principal(&["read"], &[], &[])), [10, 0, 0, 1], Ok(true)),
            (&with, "GET /api/v3/a", Some(principal(&[], &[], &[])), [10, 0, 0, 1], Err(PolicyFault::Scope)),
        ] {
            let parts = "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n[[store]]\nkind = \"file\"\npath = \"t.toml\"\n";
            let settings =
                parse(&format!("{config}\n{parts}"), "/nonexistent/tollgate.toml".as_ref(), Probe::Settings).unwrap();
            let token = if request.ends_with(" without") { "X: y" } else { t };
            let line = request.trim_end_matches(" without");
            let bytes = format!("{line} HTTP/1.1\r\nHost: h\r\n{token}\r\n\r\n");
            let view = head::parse(bytes.as_bytes()).unwrap();
            let examined = examine(&view, &settings.rules).unwrap();
            let decided = settings.policy.decide(&examined, known, Some(client.into()));
            assert_eq!(decided.map(|permit| permit.principal().is_some()), expected, "{config} {request}");
        }
    }
}
