//! What becomes of one permitted request: which of its fields go on, and which credential the backend gets. It decides;
//! `head` writes. It must never let a byte pass that decides who the backend acts for and that no stage has judged.

use super::ForwardRules;
use crate::policy::Permit;
use crate::request::Examined;
use crate::request::body::BodyScanner;
use crate::request::query::Edits;
use crate::request::route::{Auth, Canary, Route};
use crate::request::seeded::{self, Rule};
use crate::request::token::{OtherKind, Presented, bearer, is_basic, is_token_header};
use crate::request::view::{Field, FieldKind, Method, RequestView};

/// Carries out a permit. There is none without one.
#[derive(Debug)]
pub struct Plan<'r> {
    pub route: &'r Route,
    /// The method that was judged.
    pub method: Method,
    /// It stands in X-HTTP-Method-Override.
    pub overridden: bool,
    pub permit: Permit,
    pub presented: Option<Presented<'r>>,
    pub body: Option<BodyScanner>,
    pub(super) edits: Edits,
    pub(super) content_type: Option<Vec<u8>>,
    auth: Auth,
    /// Goes on in the token's place.
    other: Option<OtherKind>,
    /// Which `[[upstream]]` serves it, but for the route's canary.
    pub upstream: usize,
    /// It may take the request.
    pub canary: Option<&'r Canary>,
}

pub fn plan(permit: Permit, examined: Examined<'_>) -> Plan<'_> {
    let Examined {
        route,
        method,
        overridden,
        auth,
        presented,
        edits,
        clamped: _,
        asks_sudo: _,
        other,
        body,
        content_type,
        canonical: _,
    } = examined;
    let held = permit.principal().map_or(&[][..], |principal| principal.scopes());
    let by_scope = route.pools.iter().find(|pool| held.contains(&pool.scope));
    let (upstream, canary) = by_scope.map_or((route.upstream, route.canary.as_ref()), |pool| (pool.upstream, None));
    Plan { route, method, overridden, permit, presented, body, edits, content_type, auth, other, upstream, canary }
}

/// X-Request-Id as Rails takes it: letters, digits, `_` and `-`; longer ones are replaced.
pub fn request_id<'a>(view: &RequestView<'a>) -> Option<&'a str> {
    let mut ids = view.fields_of(FieldKind::RequestId);
    let id = ids.next().filter(|_| ids.next().is_none())?.value;
    let legal =
        (1..=128).contains(&id.len()) && id.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
    std::str::from_utf8(id).ok().filter(|_| legal)
}

pub(super) enum Passes {
    Yes,
    No,
    /// Some backend might read the name as a different one, or choose a path or a user by it.
    NoAndCounted,
}

impl Plan<'_> {
    /// Whether the token stands in the query string, where it leaks.
    pub fn from_query(&self) -> bool {
        self.presented.as_ref().is_some_and(|found| found.in_query)
    }

    /// Whether the backend would get the target as the client sent it.
    pub fn keeps_target(&self) -> bool {
        self.edits.is_empty()
    }

    /// Whether a client's field goes on. Everything that says who asks, where from or how long is ours to write.
    pub(super) fn passes(&self, field: &Field<'_>, rules: &ForwardRules) -> Passes {
        let passes_tokens = matches!(self.auth, Auth::None { pass_token: true });
        let web_page = self.route.is_web_page();
        let open = passes_tokens || web_page;
        let passes = match field.kind {
            FieldKind::Alias => return Passes::NoAndCounted,
            _ if is_token_header(field.name, &rules.token) => passes_tokens,
            FieldKind::EndToEnd | FieldKind::ContentType | FieldKind::Origin | FieldKind::PreflightMethod => true,
            FieldKind::Authorization => {
                let is_token = (rules.token.bearer && bearer(field.value).is_some())
                    || (self.route.basic && is_basic(field.value));
                // With a job's token in the place of the token, Basic is that one's: `examine` has refused every other.
                let is_jobs = self.other == Some(OtherKind::Job) && self.route.basic && is_basic(field.value);
                if is_jobs {
                    true
                } else if is_token {
                    passes_tokens
                } else {
                    open || rules.switches.authorization
                }
            }
            FieldKind::Cookie => open || rules.switches.cookies,
            FieldKind::OtherToken => {
                passes_tokens || rules.switches.job_token || self.other.is_some_and(|other| other.is_header(field.name))
            }
            FieldKind::Sudo => passes_tokens || (rules.switches.sudo && self.permit.principal().is_some()),
            // On no route without the switch: an open one would let anybody choose.
            FieldKind::PathOrUser if !rules.switches.path_and_user_headers => return Passes::NoAndCounted,
            FieldKind::PathOrUser => true,
            // Refused or judged elsewhere; a web page's form may use it.
            FieldKind::MethodOverride => web_page || seeded::off(Rule::MethodOverride),
            FieldKind::Host
            | FieldKind::ContentLength
            | FieldKind::TransferEncoding
            | FieldKind::Connection
            | FieldKind::HopByHop
            | FieldKind::Upgrade
            | FieldKind::Expect
            | FieldKind::ForwardedFor
            | FieldKind::ForwardedProto
            | FieldKind::ForwardedHost
            | FieldKind::ForwardedPort
            | FieldKind::Forwarded
            | FieldKind::RequestId
            | FieldKind::TraceParent
            | FieldKind::TraceState
            | FieldKind::Identity
            | FieldKind::Internal => false,
        };
        if passes { Passes::Yes } else { Passes::No }
    }
}
