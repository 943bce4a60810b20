//! 1 WHAT IS ASKED. Turns a request into what the later stages need to know of it, or into a [`Fault`].
//! Pure: no clock, no I/O, no identity. It must not know who asks, nor what becomes of the answer.

pub mod body;
pub mod chunked;
pub mod head;
pub mod origin;
pub mod page;
pub mod query;
pub mod route;
pub mod target;
pub mod token;
pub mod view;

use body::{BodyFault, BodyHead, BodyRules, BodyScanner};
use head::HeadFault;
use page::{Clamped, Pagination};
use query::{Edits, Fate, Key, Names};
use route::{Auth, Route, Routes};
use std::borrow::Cow;
use std::sync::Arc;
use target::TargetFault;
use token::{Presented, TokenFault, TokenRules};
use view::{Field, FieldKind, Framing, Method, RequestView};

/// Everything that is configured about judging a request by its own bytes.
#[derive(Clone, Debug)]
pub struct Rules {
    pub limits: Limits,
    pub routes: Routes,
    /// CORS preflights pass without a token.
    pub cors_preflight: bool,
    pub token: TokenRules,
    pub names: Names,
    pub switches: Switches,
    pub pagination: Pagination,
    /// `None`: bodies are not looked at, because the backend trusts only the header that tollgate sets.
    pub body: Option<Arc<BodyRules>>,
}

#[derive(Clone, Debug)]
pub struct Limits {
    /// The head of a request, its request line included.
    pub header_bytes: usize,
    pub target_bytes: usize,
    /// `None`: any length.
    pub body_bytes: Option<u64>,
}

/// Credentials of other kinds, and impersonation. Off means refused or taken out, never passed by accident.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Switches {
    /// `sudo` parameter and `SUDO` header.
    pub sudo: bool,
    /// `access_token` and `bearer_token` parameters.
    pub access_token: bool,
    /// `job_token` parameter; JOB-TOKEN, DEPLOY-TOKEN and BUILD-TOKEN headers.
    pub job_token: bool,
    /// Cookie header: Rails may hold a session in it.
    pub cookies: bool,
    /// Authorization with another scheme than Bearer.
    pub authorization: bool,
    /// Headers by which some backends choose a path or a user.
    pub path_and_user_headers: bool,
}

/// Why a request can't be taken further, from its own bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Head(HeadFault),
    Target(TargetFault),
    MethodNotAllowed,
    /// X-HTTP-Method-Override and its kin.
    MethodOverride,
    TargetTooLong,
    HeaderTooLarge,
    HeaderTimeout,
    /// The client made too long a pause within the body.
    BodyTimeout,
    BodyTooLarge,
    NoRoute,
    PastDepth,
    /// A token is needed and none came.
    TokenMissing,
    Token(TokenFault),
    /// The route takes no token in the query.
    QueryToken,
    /// `access_token`, `bearer_token` or `job_token` while their switch is off.
    OtherCredential,
    Body(BodyFault),
}

impl From<HeadFault> for Fault {
    fn from(fault: HeadFault) -> Self {
        Self::Head(fault)
    }
}

impl From<BodyFault> for Fault {
    fn from(fault: BodyFault) -> Self {
        Self::Body(fault)
    }
}

/// What is asked, as far as it can be told without asking who asks.
#[derive(Debug)]
pub struct Examined<'r> {
    /// The route, and its name for logs and metrics.
    pub route: &'r Route,
    pub method: Method,
    /// The path as routes and scopes are found by.
    pub canonical: Cow<'r, [u8]>,
    /// Whether a token is needed: the route's own answer, unless this is a preflight.
    pub auth: Auth,
    /// The token to validate. `None` only where the route lets a request pass without one.
    pub presented: Option<Presented<'r>>,
    /// How the query changes on the way upstream.
    pub edits: Edits,
    pub clamped: Clamped,
    /// The request asks to act as somebody else, which needs a permission of its own.
    pub asks_sudo: bool,
    pub body: Option<BodyScanner>,
    /// The Content-Type to forward, where it is not the client's own.
    pub content_type: Option<Vec<u8>>,
}

/// Where a request stood when it was refused, for the log and the metrics.
#[derive(Debug)]
pub struct Refused<'r> {
    pub fault: Fault,
    pub route: Option<&'r Route>,
    /// A token stood in the query, in whatever spelling.
    pub query_token: bool,
}

/// Judges a request by its own bytes.
pub fn examine<'r>(view: &RequestView<'r>, rules: &'r Rules) -> Result<Examined<'r>, Refused<'r>> {
    let early = |fault| Refused { fault, route: None, query_token: false };
    if view.method == Method::Other {
        return Err(early(Fault::MethodNotAllowed));
    }
    if view.target.len() > rules.limits.target_bytes {
        return Err(early(Fault::TargetTooLong));
    }
    target::check(view.target).map_err(|fault| early(Fault::Target(fault)))?;
    let canonical = target::canonical(view.path());
    let found = rules.routes.find(view.method, &canonical).and_then(|index| rules.routes.get(index));
    let route = found.ok_or_else(|| early(Fault::NoRoute))?;
    rules.examine_on(route, view, canonical).map_err(|fault| {
        let scan = query::scan(view.query().unwrap_or_default(), &rules.names);
        let query_token = scan.params.iter().any(|param| param.key == Key::Token);
        Refused { fault, route: Some(route), query_token }
    })
}

impl Rules {
    fn examine_on<'r>(
        &self,
        route: &'r Route,
        view: &RequestView<'r>,
        canonical: Cow<'r, [u8]>,
    ) -> Result<Examined<'r>, Fault> {
        let web_page = route.is_web_page();
        if !web_page && view.fields_of(FieldKind::MethodOverride).next().is_some() {
            return Err(Fault::MethodOverride);
        }
        if let (Framing::Length(length), Some(limit)) = (view.body, self.limits.body_bytes)
            && length > limit
        {
            return Err(Fault::BodyTooLarge);
        }

        let query = view.query().unwrap_or_default();
        let scan = query::scan(query, &self.names);
        let auth =
            if self.cors_preflight && is_preflight(view) { Auth::None { pass_token: false } } else { route.auth };
        let passes_tokens = matches!(auth, Auth::None { pass_token: true });
        let presented = match auth {
            Auth::None { .. } => None,
            Auth::Required | Auth::Optional => {
                if scan.params.iter().any(|param| self.is_refused_credential(param.key)) {
                    return Err(Fault::OtherCredential);
                }
                token::find(view, &scan, &self.token).map_err(Fault::Token)?
            }
        };
        match &presented {
            None if auth == Auth::Required => return Err(Fault::TokenMissing),
            Some(found) if route.refuse_query_token && found.in_query => return Err(Fault::QueryToken),
            _ => {}
        }

        let mut fates: smallvec::SmallVec<[Fate; 4]> = smallvec::smallvec![Fate::Keep; scan.params.len()];
        if !passes_tokens {
            for (param, fate) in scan.params.iter().zip(&mut fates) {
                if param.key == Key::Token || self.is_refused_credential(param.key) {
                    *fate = Fate::Drop;
                }
            }
        }
        let lists = !web_page && matches!(view.method, Method::Get | Method::Head);
        let (mut clamped, mut append) = Default::default();
        let page_rules = if lists { self.pagination.rules_for(&canonical) } else { None };
        if let Some(rules) = page_rules {
            (clamped, append) = page::settle(&scan, &mut fates, rules).map_err(|_| Fault::PastDepth)?;
        }
        let mut edits = Edits::plan(&scan, &fates, query.len());
        append.into_iter().for_each(|(key, number)| edits.append(key, number));

        let asks_sudo =
            scan.params.iter().any(|p| p.key == Key::Sudo) || view.fields_of(FieldKind::Sudo).next().is_some();
        let (body, content_type) = match &self.body {
            Some(rules) if view.body != Framing::Empty && !passes_tokens && !web_page => {
                let head = BodyHead {
                    content_type: view.fields_of(FieldKind::ContentType).next().map(|field| field.value),
                    coded: view.fields.iter().any(is_coding),
                    is_post: view.method_bytes == b"POST",
                    lists: page_rules.is_some(),
                };
                let (scanner, content_type) = BodyScanner::new(&head, Arc::clone(rules));
                // Chunks may turn out to hold nothing: those are told when the first byte comes.
                if let (Framing::Length(_), Some(fault)) = (view.body, scanner.fault()) {
                    return Err(fault.into());
                }
                (Some(scanner), content_type)
            }
            _ => (None, None),
        };
        Ok(Examined {
            route,
            method: view.method,
            canonical,
            auth,
            presented,
            edits,
            clamped,
            asks_sudo,
            body,
            content_type,
        })
    }

    fn is_refused_credential(&self, key: Key) -> bool {
        match key {
            Key::AccessToken => !self.switches.access_token,
            Key::JobToken => !self.switches.job_token,
            Key::Token | Key::Page | Key::PerPage | Key::Sudo | Key::Method => false,
        }
    }
}

/// A Content-Encoding that changes the bytes.
fn is_coding(field: &Field<'_>) -> bool {
    field.name.eq_ignore_ascii_case(b"content-encoding")
        && !field.value.is_empty()
        && !field.value.eq_ignore_ascii_case(b"identity")
}

/// A CORS preflight: a browser sends it before the real request, and never with a credential.
fn is_preflight(view: &RequestView<'_>) -> bool {
    view.method == Method::Options
        && view.body == Framing::Empty
        && view.fields_of(FieldKind::Origin).next().is_some()
        && view.fields_of(FieldKind::PreflightMethod).next().is_some()
}
