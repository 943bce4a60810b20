//! 1 WHAT IS ASKED. Turns a request into the facts that the later stages need, or into a [`RequestFault`].
//! Pure: no clock, no I/O, no identity. It must not know who the caller is or how the response looks.

/// A table of the bytes for which a `const fn` holds: one load for each byte of a head.
macro_rules! byte_set {
    ($holds:ident) => {{
        let mut set = [false; 256];
        let mut byte = 0;
        while byte < set.len() {
            set[byte] = $holds(byte as u8);
            byte += 1;
        }
        set
    }};
}

pub mod body;
pub mod chunked;
pub mod head;
pub mod host;
pub mod origin;
pub mod page;
pub mod proxy_protocol;
pub mod query;
mod readings;
pub mod route;
pub mod routes;
pub(crate) mod seeded;
pub mod target;
pub mod token;
pub mod trace;
pub mod verdict;
pub mod view;

use crate::problem::Problem;
use crate::telemetry::metrics::TokenSource;
use body::{BodyFault, BodyHead, BodyRules, BodyScanner};
use head::HeadFault;
use origin::TrustedProxies;
use page::{Clamped, Pagination};
use query::{Edits, Key, Names, ParamAction};
use route::{Auth, Route};
use routes::{OtherReadings, Routes};
use seeded::Rule;
use std::borrow::Cow;
use std::sync::Arc;
use target::TargetFault;
use token::{OtherKind, Presented, TakesBasic, TokenFault, TokenRules};
use verdict::VerdictFault;
use view::{Field, FieldKind, Framing, Method, RequestView};

/// The only method override header that `method_override = "judge"` accepts: the one that Rack reads.
pub const METHOD_OVERRIDE: &str = "X-HTTP-Method-Override";

/// All settings for judging a request by its own bytes.
#[derive(Clone, Debug)]
pub struct Rules {
    pub limits: Limits,
    pub routes: Routes,
    /// CORS preflights pass without a token.
    pub cors_preflight: bool,
    pub token: TokenRules,
    pub names: Names,
    pub method_override: MethodOverride,
    pub ambiguous_paths: AmbiguousPaths,
    pub switches: Switches,
    /// Peers whose X-Forwarded-* fields are accepted.
    pub trusted_proxies: TrustedProxies,
    pub pagination: Pagination,
    /// `None`: bodies are not checked, because the backend trusts only the header that tollgate sets.
    pub body: Option<Arc<BodyRules>>,
}

#[derive(Clone, Debug)]
pub struct Limits {
    /// The head of a request, including its request line.
    pub header_bytes: usize,
    pub target_bytes: usize,
}

impl Limits {
    /// The framework does not support longer targets.
    const LARGEST_TARGET: usize = 60 * 1024;
    const LARGEST_HEADER: usize = 512 * 1024;
    const SMALLEST: usize = 256;

    /// Why a head is refused that is larger than `header_bytes`, or as large and not at its end.
    pub fn refuse_size(target_bytes: usize, head: &[u8]) -> RequestFault {
        let line = memchr::memchr(b'\n', head).unwrap_or(head.len());
        if line > target_bytes.saturating_add(64) { RequestFault::TargetTooLong } else { RequestFault::HeaderTooLarge }
    }

    /// Keys of `[limits]`.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        for (key, value, largest) in [
            ("header_bytes", self.header_bytes, Self::LARGEST_HEADER),
            ("target_bytes", self.target_bytes, Self::LARGEST_TARGET),
        ] {
            if !(Self::SMALLEST..=largest).contains(&value) {
                let instead = format!("use a size from \"{}B\" to \"{}KiB\"", Self::SMALLEST, largest / 1024);
                problems.push(Problem::error(key, "is out of range", instead));
            }
        }
        if self.target_bytes > self.header_bytes {
            let (what, instead) =
                ("is more than header_bytes", "the target is a part of the head: use less here or more there");
            problems.push(Problem::error("target_bytes", what, instead).with("header_bytes"));
        }
        problems
    }
}

impl Rules {
    /// Keys of `[token]`.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = self.token.problems();
        if self.body.is_none() {
            let what = "lets a body carry another token than the one that is judged, to a backend that reads it there";
            let instead = "use \"refuse\", unless the backend reads the token from the header alone";
            problems.push(Problem::warning("body", what, instead));
            if self.method_override == MethodOverride::Judge {
                let what =
                    "does not go with body = \"ignore\": a field _method in a body would name another method unseen";
                let instead = "use method_override = \"refuse\" or body = \"refuse\"";
                problems.push(Problem::error("method_override", what, instead).with("body"));
            }
        }
        problems
    }
}

/// What to do with a POST that asks to be run as another method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MethodOverride {
    Refuse,
    /// Judge it as that method and forward the override: for backends that obey X-HTTP-Method-Override.
    Judge,
}

/// What to do with a path that a server could read in another way than routes, scopes and limits do: with an escaped slash, `%`,
/// `?` or `#`, or with a `;`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AmbiguousPaths {
    /// GitLab takes `group%2Fproject` as one segment. Refused only if another reading has a stricter route.
    Pass,
    Refuse,
}

/// Credentials of other kinds, and impersonation. Off means refused or removed, never passed by accident.
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
    /// Authorization with a scheme other than Bearer.
    pub authorization: bool,
    /// Headers by which some backends choose a path or a user.
    pub path_and_user_headers: bool,
}

/// Why a request is refused on account of its own bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestFault {
    Head(HeadFault),
    Target(TargetFault),
    MethodNotAllowed,
    /// X-HTTP-Method-Override or a similar header, or `_method` in the query.
    MethodOverride,
    /// A query together with a Content-Type whose charset makes Django decode the query differently.
    QueryCharset,
    TargetTooLong,
    HeaderTooLarge,
    HeaderTimeout,
    /// The client paused for too long within the body.
    BodyTimeout,
    /// The client sent less of the body than the least rate.
    BodyTooSlow,
    BodyTooLarge,
    NoRoute,
    PastDepth,
    /// The route needs a token and the request has none.
    TokenMissing,
    Token(TokenFault),
    /// The route does not accept a token in the query.
    QueryToken,
    /// `access_token`, `bearer_token` or `job_token` while their switch is off.
    OtherCredential,
    Body(BodyFault),
    /// Another proxy asks about a request in a way, or about one, that cannot be answered.
    Verdict(VerdictFault),
}

impl From<HeadFault> for RequestFault {
    fn from(fault: HeadFault) -> Self {
        Self::Head(fault)
    }
}

impl From<BodyFault> for RequestFault {
    fn from(fault: BodyFault) -> Self {
        Self::Body(fault)
    }
}

/// What a request asks for, as far as its own bytes tell.
#[derive(Debug)]
pub struct Examined<'r> {
    pub route: &'r Route,
    /// The method that is judged.
    pub method: Method,
    /// The request is a POST with this method in X-HTTP-Method-Override, which must reach the backend.
    pub overridden: bool,
    /// The path in the form that routes and scopes are matched on.
    pub canonical: Cow<'r, [u8]>,
    /// Whether a token is needed: the route's setting, except for a CORS preflight, and for a path that others read as one of a
    /// route that needs it.
    pub auth: Auth,
    /// The token to validate. `None` only where the route lets a request pass without one.
    pub presented: Option<Presented<'r>>,
    /// The changes to make to the query before it is forwarded.
    pub edits: Edits,
    pub clamped: Clamped,
    /// The request asks to act as another user, which needs its own permission.
    pub asks_sudo: bool,
    /// A credential of another kind stands in the token's place, which the route leaves to the backend to check.
    pub other: Option<OtherKind>,
    pub body: Option<BodyScanner>,
    /// The Content-Type to forward, where it is not the client's own.
    pub content_type: Option<Vec<u8>>,
}

/// A fault, with what was known of the request by then, for the log and the metrics.
#[derive(Debug)]
pub struct RejectedRequest<'r> {
    pub fault: RequestFault,
    pub route: Option<&'r Route>,
    /// The method that was judged.
    pub method: Method,
    /// Where tokens were found, well-formed or not.
    pub source: TokenSource,
    /// The query had a token parameter, in any spelling.
    pub query_token: bool,
    /// The one token, if there is exactly one and it is well-formed. Not validated.
    pub presented: Option<Presented<'r>>,
}

/// Judges a request by its own bytes.
pub fn examine<'r>(view: &RequestView<'r>, rules: &'r Rules) -> Result<Examined<'r>, RejectedRequest<'r>> {
    let asked = rules.method_asked(view);
    let method = asked.unwrap_or(view.method);
    let early = |fault| rules.refused(fault, view, None, method);
    if view.method == Method::Other {
        return Err(early(RequestFault::MethodNotAllowed));
    }
    if view.target.len() > rules.limits.target_bytes {
        return Err(early(RequestFault::TargetTooLong));
    }
    target::check(view.target).map_err(|fault| early(RequestFault::Target(fault)))?;
    seeded::trip(view.path());
    let canonical = target::canonical(view.path());
    let found = rules.routes.find(method, view.host, &canonical).and_then(|index| rules.routes.get(index));
    let route = found.ok_or_else(|| early(RequestFault::NoRoute))?;
    let is_refused = rules.ambiguous_paths == AmbiguousPaths::Refuse && readings::is_equivocal(&canonical);
    let auth = match rules.routes.other_readings(route, method, view.host, &canonical) {
        OtherReadings::AsOpen if !is_refused => route.auth,
        OtherReadings::WithToken(_) if !is_refused => Auth::Required,
        _ => {
            let fault = RequestFault::Target(TargetFault::AmbiguousPath);
            return Err(rules.refused(fault, view, Some(route), method));
        }
    };
    rules
        .examine_on(route, auth, view, asked, canonical)
        .map_err(|fault| rules.refused(fault, view, Some(route), method))
}

impl Rules {
    /// Adds what the log wants to know of a refused request. Computed only here: most requests are not refused.
    fn refused<'r>(
        &self,
        fault: RequestFault,
        view: &RequestView<'r>,
        route: Option<&'r Route>,
        method: Method,
    ) -> RejectedRequest<'r> {
        let scan = query::scan(view.query().unwrap_or_default(), &self.names);
        let takes = route.map_or_else(TakesBasic::default, Route::takes_basic);
        let (source, query_token) = token::sources(view, &scan, &self.token, takes.token);
        let presented = token::find(view, &scan, &self.token, takes).ok().flatten();
        RejectedRequest { fault, route, method, source, query_token, presented }
    }

    /// The method to judge by: the request's own, or the one named by its override header where that is accepted. HEAD
    /// is never accepted: servers differ in whether the response to such a POST has a body, so its end is ambiguous.
    fn method_asked(&self, view: &RequestView<'_>) -> Result<Method, RequestFault> {
        let mut overrides = view.fields_of(FieldKind::MethodOverride);
        let Some(field) = overrides.next().filter(|_| !seeded::off(Rule::MethodOverride)) else {
            return Ok(view.method);
        };
        let takes = self.method_override == MethodOverride::Judge
            && view.method == Method::Post
            && overrides.next().is_none()
            && field.name.eq_ignore_ascii_case(METHOD_OVERRIDE.as_bytes());
        match Method::of(field.value) {
            Method::Other | Method::Head => Err(RequestFault::MethodOverride),
            method if takes => Ok(method),
            _ => Err(RequestFault::MethodOverride),
        }
    }

    fn examine_on<'r>(
        &self,
        route: &'r Route,
        auth: Auth,
        view: &RequestView<'r>,
        asked: Result<Method, RequestFault>,
        canonical: Cow<'r, [u8]>,
    ) -> Result<Examined<'r>, RequestFault> {
        let web_page = route.is_web_page();
        let query = view.query().unwrap_or_default();
        let scan = query::scan(query, &self.names);
        let overrides = view.fields_of(FieldKind::MethodOverride).next().is_some();
        let in_query = scan.params.iter().any(|param| param.key == Key::Method);
        let (method, overridden) = match web_page {
            // If another route covers some methods of this path, the override would bypass that route.
            true if (overrides || in_query) && !self.is_web_page_for_all(view.host, &canonical) => {
                return Err(RequestFault::MethodOverride);
            }
            true => (view.method, false),
            false if in_query && !seeded::off(Rule::QueryMethod) => return Err(RequestFault::MethodOverride),
            false => (asked?, overrides && !seeded::off(Rule::MethodOverride)),
        };
        if route.rewrite.as_ref().is_some_and(|rewrite| rewrite.rest(view.path()).is_none()) {
            return Err(RequestFault::Target(TargetFault::PrefixSpelling));
        }
        if let (Framing::Length(length), Some(limit)) = (view.body, route.body_bytes)
            && length > limit
        {
            return Err(RequestFault::BodyTooLarge);
        }

        if !web_page
            && !query.is_empty()
            && !seeded::off(Rule::QueryCharset)
            && view.fields_of(FieldKind::ContentType).any(|field| !query::is_read_as_ascii(field.value))
        {
            return Err(RequestFault::QueryCharset);
        }
        let mut auth = if self.cors_preflight && is_preflight(view) { Auth::None { pass_token: false } } else { auth };
        let passes_tokens = matches!(auth, Auth::None { pass_token: true });
        let takes = route.takes_basic();
        let mut other = None;
        let presented = match auth {
            Auth::None { .. } => None,
            Auth::Required | Auth::Optional => {
                if scan.params.iter().any(|param| self.is_refused_credential(param.key, route)) {
                    return Err(RequestFault::OtherCredential);
                }
                let presented = token::find(view, &scan, &self.token, takes).map_err(RequestFault::Token)?;
                if !route.unchecked.is_empty() {
                    other = token::other(view, &scan, &route.unchecked, takes, self.token.max_bytes)
                        .map_err(RequestFault::Token)?;
                }
                match (&presented, other) {
                    // Which of the two the backend acts for is its own choice, and not the one that was checked.
                    (Some(_), Some(_)) => return Err(RequestFault::Token(TokenFault::Conflict)),
                    (None, Some(_)) => auth = Auth::Optional,
                    (_, None) => {}
                }
                presented
            }
        };
        match &presented {
            None if auth == Auth::Required => return Err(RequestFault::TokenMissing),
            Some(found) if route.refuse_query_token && found.in_query => return Err(RequestFault::QueryToken),
            _ => {}
        }

        let mut actions: smallvec::SmallVec<[ParamAction; 4]> =
            smallvec::smallvec![ParamAction::Keep; scan.params.len()];
        if !passes_tokens && !seeded::off(Rule::QueryToken) {
            for (param, action) in scan.params.iter().zip(&mut actions) {
                if param.key == Key::Token || self.is_refused_credential(param.key, route) {
                    *action = ParamAction::Drop;
                }
            }
        }
        let lists = !web_page && matches!(method, Method::Get | Method::Head);
        let (mut clamped, mut append) = Default::default();
        let page_rules = if lists { self.pagination.rules_for(&canonical) } else { None };
        if let Some(rules) = page_rules.filter(|_| !seeded::off(Rule::PageBounds)) {
            (clamped, append) = page::settle(&scan, &mut actions, rules, query).map_err(|_| RequestFault::PastDepth)?;
        }
        let mut edits = Edits::plan(&scan, &actions, query.len());
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
                // A chunked body may turn out to be empty, so its fault is reported with the first byte.
                if let (Framing::Length(_), Some(fault)) = (view.body, scanner.fault()) {
                    return Err(fault.into());
                }
                (Some(scanner), content_type)
            }
            _ => (None, None),
        };
        Ok(Examined {
            route,
            method,
            overridden,
            canonical,
            auth,
            presented,
            edits,
            clamped,
            asks_sudo,
            other,
            body,
            content_type,
        })
    }

    /// Whether the path is passed through as a web page for every method.
    fn is_web_page_for_all(&self, host: &[u8], canonical: &[u8]) -> bool {
        Method::FORWARDED.into_iter().all(|method| {
            let found = self.routes.find(method, host, canonical).and_then(|index| self.routes.get(index));
            found.is_some_and(Route::is_web_page)
        })
    }

    fn is_refused_credential(&self, key: Key, route: &Route) -> bool {
        match key {
            Key::AccessToken => !self.switches.access_token,
            Key::JobToken => !self.switches.job_token && !route.unchecked.contains(&OtherKind::Job),
            Key::Token | Key::Page | Key::PerPage | Key::Sudo | Key::Method => false,
        }
    }
}

/// A Content-Encoding other than `identity`.
fn is_coding(field: &Field<'_>) -> bool {
    field.name.eq_ignore_ascii_case(b"content-encoding")
        && !field.value.is_empty()
        && !field.value.eq_ignore_ascii_case(b"identity")
}

/// A CORS preflight: a browser sends it before the actual request, always without credentials.
fn is_preflight(view: &RequestView<'_>) -> bool {
    view.method == Method::Options
        && view.body == Framing::Empty
        && view.fields_of(FieldKind::Origin).next().is_some()
        && view.fields_of(FieldKind::PreflightMethod).next().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Probe, parse};

    /// The rules of a configuration, and all requests under it with what becomes of each: the fault, or what was found.
    fn examined(config: &str, requests: &[(&str, &str)]) {
        let parts = "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n[[store]]\nkind = \"file\"\npath = \"t.toml\"\n";
        let settings =
            parse(&format!("{config}\n{parts}"), "/nonexistent/tollgate.toml".as_ref(), Probe::Settings).unwrap();
        let mut wrong = Vec::new();
        for (request, expected) in requests {
            let head =
                format!("{}\r\n\r\n", request.replacen(" | ", " HTTP/1.1\r\nHost: h\r\n", 1).replace(" | ", "\r\n"));
            let view = head::parse(head.as_bytes()).unwrap();
            let found = match examine(&view, &settings.rules) {
                Ok(found) => {
                    let mut target = Vec::new();
                    found.edits.write_target(view.path(), view.query(), &mut target);
                    let mut facts = vec![String::from_utf8(target).unwrap(), format!("{:?}", found.method)];
                    facts.extend(found.presented.map(|token| format!("{:?}", token.source)));
                    let yes = [
                        (found.overridden, "overridden"),
                        (found.auth == Auth::Required, "required"),
                        (found.asks_sudo, "sudo"),
                        (found.clamped.page, "page"),
                        (found.clamped.per_page, "per_page"),
                        (found.body.is_some(), "body"),
                    ];
                    facts.extend(yes.into_iter().filter(|(holds, _)| *holds).map(|(_, word)| word.to_owned()));
                    facts.join(" ")
                }
                Err(refused) => {
                    format!("{:?} {:?} {:?} {}", refused.fault, refused.method, refused.source, refused.query_token)
                }
            };
            if found != *expected {
                wrong.push((*request, found, *expected));
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    #[test]
    fn what_a_request_asks_for() {
        let t = "PRIVATE-TOKEN: t";
        let line = |text: &str| text.replace("| T", &format!("| {t}"));
        let table = [
            ("GET /api/v3/a | T", "/api/v3/a Get Header required"),
            ("GET /api/v3/a | Authorization: Bearer t", "/api/v3/a Get Bearer required"),
            ("GET /api/v3/a?private_token=t | X: y", "/api/v3/a Get Query required"),
            ("GET /api/v3/a?x=1&private_token=t&y | X: y", "/api/v3/a?x=1&y Get Query required"),
            ("GET /api/v3/a | X: y", "TokenMissing Get None false"),
            ("GET /api/v3/a | T | Authorization: Bearer u", "Token(Conflict) Get Several false"),
            ("GET /api/v3/a?private_token=u | T", "Token(Conflict) Get Several true"),
            ("GET /other | T", "NoRoute Get Header false"),
            ("BREW /api/v3/a | T", "MethodNotAllowed Other Header false"),
            // Other credentials, and acting as somebody else.
            ("GET /api/v3/a?access_token=u | T", "OtherCredential Get Header false"),
            ("GET /api/v3/a?job_token=u | T", "OtherCredential Get Header false"),
            ("GET /api/v3/a?sudo=root | T", "/api/v3/a?sudo=root Get Header required sudo"),
            ("GET /api/v3/a | T | Sudo: root", "/api/v3/a Get Header required sudo"),
            // Another method.
            ("GET /api/v3/a?_method=PUT | T", "MethodOverride Get Header false"),
            ("POST /api/v3/a | T | X-HTTP-Method-Override: PUT", "MethodOverride Post Header false"),
            // Pages: lists only.
            ("GET /api/v3/a?per_page=500 | T", "/api/v3/a?per_page=100 Get Header required per_page"),
            ("HEAD /api/v3/a?page=0 | T", "/api/v3/a?page=1 Head Header required page"),
            ("POST /api/v3/a?per_page=500 | T", "/api/v3/a?per_page=500 Post Header required"),
            // Queries beside a type that changes their names.
            ("GET /api/v3/a?x=1 | T | Content-Type: text/plain; charset=utf-16", "QueryCharset Get Header false"),
            ("GET /api/v3/a | T | Content-Type: text/plain; charset=utf-16", "/api/v3/a Get Header required"),
            ("GET /api/v3/a?x=1 | T | Content-Type: text/plain; charset=utf-8", "/api/v3/a?x=1 Get Header required"),
            // Bodies.
            ("POST /api/v3/a | T | Content-Length: 3", "/api/v3/a Post Header required body"),
            ("POST /api/v3/a | T | Content-Length: 3 | Content-Type: image/png", "/api/v3/a Post Header required body"),
            (
                "POST /api/v3/a | T | Content-Length: 3 | Content-Type: application/json; charset=a/b",
                "Body(Type) Post Header false",
            ),
            (
                "POST /api/v3/a | T | Content-Length: 3 | Content-Type: application/json | Content-Encoding: gzip",
                "Body(Coding) Post Header false",
            ),
            (
                "POST /api/v3/a | T | Content-Length: 3 | Content-Type: application/json | Content-Encoding: Identity",
                "/api/v3/a Post Header required body",
            ),
            (
                "POST /api/v3/a | T | Content-Length: 3 | Content-Type: application/json | Content-Encoding:",
                "/api/v3/a Post Header required body",
            ),
            (
                "POST /api/v3/a | T | Content-Length: 3 | Content-Type: application/json | X-Encoding: gzip",
                "/api/v3/a Post Header required body",
            ),
            // A preflight is one only if the configuration says so.
            (
                "OPTIONS /api/v3/a | Origin: https://a | Access-Control-Request-Method: PUT",
                "TokenMissing Options None false",
            ),
        ]
        .map(|(request, expected)| (line(request), expected));
        let table: Vec<(&str, &str)> = table.iter().map(|(request, expected)| (request.as_str(), *expected)).collect();
        examined("", &table);
    }

    #[test]
    fn what_a_configuration_lets_a_request_ask_for() {
        examined(
            "[api]\ncors_preflight = true\n[token]\nmethod_override = \"judge\"\naccess_token = \"allow\"\n[limits]\ntarget_bytes = \"256B\"",
            &[
                // A preflight is a request without credentials, with both fields and without a body.
                ("OPTIONS /api/v3/a | Origin: o | Access-Control-Request-Method: PUT", "/api/v3/a Options"),
                (
                    "OPTIONS /api/v3/a?private_token=t | Origin: o | Access-Control-Request-Method: PUT",
                    "/api/v3/a Options",
                ),
                ("OPTIONS /api/v3/a | Origin: o", "TokenMissing Options None false"),
                ("OPTIONS /api/v3/a | Access-Control-Request-Method: PUT", "TokenMissing Options None false"),
                (
                    "OPTIONS /api/v3/a | Origin: o | Access-Control-Request-Method: PUT | Content-Length: 1",
                    "TokenMissing Options None false",
                ),
                ("GET /api/v3/a | Origin: o | Access-Control-Request-Method: PUT", "TokenMissing Get None false"),
                // The method that is judged is the one that runs.
                (
                    "POST /api/v3/a | PRIVATE-TOKEN: t | X-HTTP-Method-Override: DELETE",
                    "/api/v3/a Delete Header overridden required",
                ),
                (
                    "POST /api/v3/a | PRIVATE-TOKEN: t | X-HTTP-Method-Override: HEAD",
                    "MethodOverride Post Header false",
                ),
                (
                    "POST /api/v3/a | PRIVATE-TOKEN: t | X-HTTP-Method-Override: BREW",
                    "MethodOverride Post Header false",
                ),
                (
                    "PUT /api/v3/a | PRIVATE-TOKEN: t | X-HTTP-Method-Override: DELETE",
                    "MethodOverride Put Header false",
                ),
                ("POST /api/v3/a | PRIVATE-TOKEN: t | X-Method-Override: DELETE", "MethodOverride Post Header false"),
                (
                    "POST /api/v3/a | PRIVATE-TOKEN: t | X-HTTP-Method-Override: DELETE | X-HTTP-Method-Override: DELETE",
                    "MethodOverride Post Header false",
                ),
                ("POST /api/v3/a?_method=PUT | PRIVATE-TOKEN: t", "MethodOverride Post Header false"),
                // One switch opens one credential.
                ("GET /api/v3/a?access_token=u | PRIVATE-TOKEN: t", "/api/v3/a?access_token=u Get Header required"),
                ("GET /api/v3/a?job_token=u | PRIVATE-TOKEN: t", "OtherCredential Get Header false"),
            ],
        );
        let long = format!("GET /api/v3/{} | PRIVATE-TOKEN: t", "a".repeat(256 - "/api/v3/".len()));
        let fits = format!("{} Get Header required", &long[4..260]);
        let longer = long.replacen("/a", "/aa", 1);
        examined("[limits]\ntarget_bytes = \"256B\"", &[(&long, &fits), (&longer, "TargetTooLong Get Header false")]);
    }

    #[test]
    fn what_a_route_lets_a_request_ask_for() {
        let routes = "[[route]]\npath = \"/api/v3/open/*\"\nauth = \"none\"\nreason = \"r\"\n\
             [[route]]\npath = \"/api/v3/own/*\"\nauth = \"none\"\npass_token = true\nreason = \"r\"\n\
             [[route]]\npath = \"/api/v3/either/*\"\nauth = \"optional\"\nreason = \"r\"\n\
             [[route]]\npath = \"/api/v3/small/*\"\nquery_token = \"refuse\"\nbody_bytes = \"5B\"\n\
             [[route]]\npath = \"/api/v3/moved/*\"\nrewrite_prefix = \"/m\"\n\
             [[route]]\npath = \"/\"\nauth = \"none\"\nreason = \"r\"\n";
        examined(
            routes,
            &[
                ("GET /api/v3/open/a?private_token=t&x | X: y", "/api/v3/open/a?x Get"),
                ("GET /api/v3/open/a?access_token=t | X: y", "/api/v3/open/a Get"),
                ("GET /api/v3/own/a?private_token=t&x | X: y", "/api/v3/own/a?private_token=t&x Get"),
                ("POST /api/v3/own/a | Content-Length: 1", "/api/v3/own/a Post"),
                ("POST /api/v3/open/a | Content-Length: 1", "/api/v3/open/a Post body"),
                ("GET /api/v3/either/a | X: y", "/api/v3/either/a Get"),
                ("GET /api/v3/either/a | PRIVATE-TOKEN: t", "/api/v3/either/a Get Header"),
                ("GET /api/v3/either/a?access_token=t | X: y", "OtherCredential Get None false"),
                ("GET /api/v3/small/a?private_token=t | X: y", "QueryToken Get Query true"),
                ("GET /api/v3/small/a?private_token=t | PRIVATE-TOKEN: t", "QueryToken Get Several true"),
                (
                    "POST /api/v3/small/a | PRIVATE-TOKEN: t | Content-Length: 5",
                    "/api/v3/small/a Post Header required body",
                ),
                ("POST /api/v3/small/a | PRIVATE-TOKEN: t | Content-Length: 6", "BodyTooLarge Post Header false"),
                ("GET /api/v3/moved/a | PRIVATE-TOKEN: t", "/api/v3/moved/a Get Header required"),
                ("GET /api/v3//moved/a | PRIVATE-TOKEN: t", "Target(PrefixSpelling) Get Header false"),
                // What a browser sends to a page goes on as it is.
                ("GET /page?per_page=500&_method=PUT | X: y", "/page?per_page=500&_method=PUT Get"),
                ("POST /page?x | Content-Length: 3 | Content-Type: text/plain; charset=utf-16", "/page?x Post"),
                ("POST /page | X-HTTP-Method-Override: PUT", "/page Post"),
            ],
        );
        // A page for some methods alone is none for a request that asks for others.
        let some = "[[route]]\npath = \"/\"\nmethods = [\"GET\", \"POST\"]\nauth = \"none\"\nreason = \"r\"\n";
        examined(
            some,
            &[
                ("POST /page | X-HTTP-Method-Override: GET", "MethodOverride Post None false"),
                ("GET /page?_method=PUT | X: y", "MethodOverride Get None false"),
                ("GET /page | X: y", "/page Get"),
            ],
        );
    }
}
