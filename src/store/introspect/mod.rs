//! HTTP introspection: looks a token up by a request with the token, or about it (RFC 7662). Knows nothing of client
//! requests. The token is sent to the configured address only: no redirects, no proxies, no cookies.

mod answer;
mod breaker;
mod endpoint;
mod pool;

use super::{Credential, Heard, LookupLimits, Secret, StoreError, TlsSettings, TokenRecord, TokenStore};
use crate::problem::Problem;
use crate::request::token::MAX_TOKEN_BYTES;
use crate::telemetry::metrics::StoreMetrics;
use answer::{Shape, doubt, garbage, is_json};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use breaker::{Breaker, Outcome, Pass, Turn};
use endpoint::Endpoint;
use form_urlencoded::byte_serialize;
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderName, HeaderValue, RETRY_AFTER, USER_AGENT};
use hyper::{Method, Request, StatusCode};
use parking_lot::Mutex;
use pool::{Answer, BODY_BYTES, Body, HttpPool};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, SemaphorePermit};

#[derive(Clone, PartialEq, Eq)]
pub struct IntrospectSettings {
    /// `http://` or `https://`, or `unix:/path/to/socket:/path`.
    pub url: String,
    /// Allows `http://` to another machine: every token is then sent in plain text.
    pub insecure_http: bool,
    pub mode: IntrospectMode,
    /// JSON pointers (RFC 6901); the first that finds a string or a number is used.
    pub user: Vec<String>,
    /// A JSON pointer to a list of strings, or to one string of words. Empty: responses have no scopes.
    pub scopes: String,
    /// For responses without scopes.
    pub default_scopes: Vec<String>,
    pub tls: TlsSettings,
    /// Maximum number of concurrent requests, and of connections.
    pub connections: usize,
    /// Consecutive failures that open the circuit breaker.
    pub breaker_failures: u32,
    /// How long it stays open before one request may try again.
    pub breaker_pause: Duration,
}

impl fmt::Debug for IntrospectSettings {
    /// Without the URL, whose query may contain a key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IntrospectSettings").field("mode", &self.mode).field("tls", &self.tls).finish_non_exhaustive()
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IntrospectMode {
    /// GET with the token in this header: 200 means valid, and these statuses mean "no such token" if they are the
    /// endpoint's own.
    User { header: String, unknown: Vec<u16> },
    /// RFC 7662: POST of a form; `active` says.
    Rfc7662 { client_id: String, client_secret: Secret },
}

/// By endpoint and `connections`.
static PERMITS: Mutex<BTreeMap<(String, usize), Weak<Semaphore>>> = Mutex::new(BTreeMap::new());

/// The requests that an endpoint may get at once: from all stores that ask it, like the one that a reload replaces and its
/// successor, and not from each.
fn permits_of(url: &str, connections: usize) -> Arc<Semaphore> {
    let mut all = PERMITS.lock();
    all.retain(|_, permits| permits.strong_count() > 0);
    let key = (url.to_owned(), connections);
    if let Some(permits) = all.get(&key).and_then(Weak::upgrade) {
        return permits;
    }
    let permits = Arc::new(Semaphore::new(connections.min(Semaphore::MAX_PERMITS)));
    all.insert(key, Arc::downgrade(&permits));
    permits
}

pub struct IntrospectStore {
    /// The request without the token.
    request: Request<()>,
    /// The header for the token; `None`: in the body.
    header: Option<HeaderName>,
    shape: Shape,
    unknown: Vec<StatusCode>,
    pool: HttpPool,
    connections: usize,
    permits: Arc<Semaphore>,
    timeout: Duration,
    breaker: Mutex<Breaker>,
    metrics: Arc<StoreMetrics>,
}

impl IntrospectStore {
    /// Does not connect yet. `timeout` is the caller's.
    pub fn new(settings: IntrospectSettings, timeout: Duration, metrics: Arc<StoreMetrics>) -> Result<Self, Problem> {
        let endpoint = Endpoint::new(&settings.url, settings.insecure_http, &settings.tls)?;
        Problem::first_error(settings.problems_but_endpoint())?;
        let mut request = Request::new(());
        *request.uri_mut() = endpoint.path.clone().into();
        let headers = request.headers_mut();
        headers.insert(HOST, endpoint.host.clone());
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        headers.insert(USER_AGENT, HeaderValue::from_static(concat!("tollgate/", env!("CARGO_PKG_VERSION"))));
        let mut unknown = Vec::new();
        let header = match &settings.mode {
            IntrospectMode::User { header, unknown: statuses } => {
                unknown = unknown_statuses(statuses)?;
                Some(token_header(header)?)
            }
            IntrospectMode::Rfc7662 { client_id, client_secret } => {
                headers.insert(AUTHORIZATION, basic(client_id, client_secret)?);
                headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
                *request.method_mut() = Method::POST;
                None
            }
        };
        metrics.breaker_open(false);
        Ok(Self {
            request,
            shape: Shape {
                rfc7662: header.is_none(),
                user: settings.user,
                scopes: Some(settings.scopes).filter(|pointer| !pointer.is_empty()),
                default_scopes: settings.default_scopes,
            },
            header,
            unknown,
            pool: HttpPool::new(endpoint, settings.connections, Arc::clone(&metrics)),
            connections: settings.connections,
            permits: permits_of(&settings.url, settings.connections),
            timeout,
            breaker: Mutex::new(Breaker::new(settings.breaker_failures, settings.breaker_pause)),
            metrics,
        })
    }

    fn request_for(&self, token: &[u8]) -> Result<Request<Full<Bytes>>, StoreError> {
        let mut body = Bytes::new();
        let mut request = self.request.clone();
        match &self.header {
            None => {
                let token: String = byte_serialize(token).collect();
                body = format!("token={token}&token_type_hint=access_token").into();
            }
            Some(header) => {
                let scheme: &[u8] = if *header == AUTHORIZATION { b"Bearer " } else { b"" };
                let mut value = HeaderValue::from_bytes(&[scheme, token].concat())
                    .map_err(|_| StoreError::Unavailable("the token can't be sent".into()))?;
                value.set_sensitive(true);
                request.headers_mut().insert(header, value);
            }
        }
        Ok(request.map(|()| Full::new(body)))
    }

    async fn permit(&self) -> Result<SemaphorePermit<'_>, StoreError> {
        // Only the lookups of another generation are waited for: those of this one have their own queue.
        match tokio::time::timeout(self.timeout / 2, self.permits.acquire()).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_)) | Err(_) => Err(StoreError::Overloaded),
        }
    }

    fn judge(&self, answer: &Answer, credential: &Credential) -> Result<Option<TokenRecord>, StoreError> {
        match answer.status {
            StatusCode::OK => {
                let mut kinds = answer.headers.get_all(CONTENT_TYPE).iter();
                if !matches!((kinds.next(), kinds.next()), (Some(kind), None) if is_json(kind.as_bytes())) {
                    return Err(garbage("a 200 whose Content-Type is not application/json: is it a page for people?"));
                }
                match &answer.body {
                    Body::Whole(body) => self.shape.read(body, *credential.digest()),
                    Body::TooLong => Err(garbage(format!("a body of more than {BODY_BYTES} bytes"))),
                    Body::Cut | Body::Unread => Err(garbage("a body that was cut off")),
                }
            }
            status if self.unknown.contains(&status) => {
                let body = match &answer.body {
                    Body::Whole(body) => Some(body.as_slice()),
                    Body::TooLong | Body::Cut | Body::Unread => None,
                };
                match doubt(status, &answer.headers, body) {
                    None => Ok(None),
                    Some(why) => Err(garbage(format!("answered {}, and {why}", status.as_u16()))),
                }
            }
            status => Err(StoreError::Unavailable(format!("answered {}: {}", status.as_u16(), self.advice(status)))),
        }
    }

    fn advice(&self, status: StatusCode) -> &'static str {
        match status.as_u16() {
            401 | 403 if self.shape.rfc7662 => "it refuses tollgate itself: check client_id and client_secret_file",
            401 | 403 => "that is none of unknown_statuses: see its own log",
            300..=399 => "redirects are not followed: set the endpoint to where it leads",
            404 | 405 | 410 => "check the path of the endpoint, and the mode",
            407 | 511 => "a proxy stands between: the endpoint must be reached directly",
            429 => "it limits how often it is asked: exempt tollgate's address",
            400..=499 => "it does not understand the question: check endpoint and mode",
            500..=599 => "see its own log",
            _ => "that is neither yes nor no: check endpoint and mode",
        }
    }

    /// Failures to respond open the breaker. An invalid response does not: an HTML page or one malformed user must not
    /// affect other callers, and causes no delay.
    fn outcome(answered: &Result<Answer, StoreError>) -> Outcome {
        match answered {
            Ok(answer) if answer.status.is_server_error() => Outcome::Failed,
            // A rate limit.
            Ok(answer) if answer.status.is_client_error() && answer.headers.contains_key(RETRY_AFTER) => {
                Outcome::Failed
            }
            Ok(Answer { status: StatusCode::TOO_MANY_REQUESTS, .. } | Answer { body: Body::Cut, .. }) | Err(_) => {
                Outcome::Failed
            }
            Ok(_) => Outcome::Answered,
        }
    }
}

#[async_trait::async_trait]
impl TokenStore for IntrospectStore {
    /// One request each.
    fn lookup_limits(&self) -> LookupLimits {
        LookupLimits { at_once: self.connections, tokens: 1 }
    }

    async fn lookup(&self, credential: &Credential) -> Result<Option<TokenRecord>, StoreError> {
        let begun = Instant::now();
        if !is_sendable(credential.expose_secret()) {
            return Ok(None);
        }
        if self.breaker.lock().is_open(begun) {
            return Err(StoreError::CircuitOpen);
        }
        let permit = self.permit().await?;
        // Other requests may have failed while this one waited.
        let pass = self.breaker.lock().admit(Instant::now()).ok_or(StoreError::CircuitOpen)?;
        let attempt = Attempt { store: self, pass: Some(pass), begun };
        let request = self.request_for(credential.expose_secret())?;
        // For a 401 the status is sufficient.
        let wanted =
            |status| status == StatusCode::OK || status != StatusCode::UNAUTHORIZED && self.unknown.contains(&status);
        let exchange = self.pool.exchange(request, self.timeout / 8, wanted);
        let deadline = tokio::time::Instant::from_std(begun + self.timeout);
        let answered = tokio::time::timeout_at(deadline, exchange).await;
        drop(permit);
        let Ok(answered) = answered else {
            attempt.ended(Outcome::Failed);
            return Err(StoreError::Timeout);
        };
        attempt.ended(Self::outcome(&answered));
        self.judge(&answered?, credential)
    }

    /// There are no change notifications; a revocation takes effect with the next lookup. This task only closes idle
    /// connections.
    async fn follow(&self, _heard: Heard<'_>) {
        loop {
            tokio::time::sleep(Duration::from_secs(5)).await;
            self.pool.sweep();
        }
    }
}

/// A lookup admitted by the breaker. If it is dropped early, it still reports to the breaker.
struct Attempt<'s> {
    store: &'s IntrospectStore,
    pass: Option<Pass>,
    begun: Instant,
}

impl Attempt<'_> {
    fn ended(mut self, outcome: Outcome) {
        self.tell(outcome);
    }

    fn tell(&mut self, outcome: Outcome) {
        let Some(pass) = self.pass.take() else { return };
        let mut breaker = self.store.breaker.lock();
        let turn = breaker.ended(pass, outcome, Instant::now());
        // Under the lock, so that the gauge has the breaker's final state.
        match turn {
            Turn::None => {}
            Turn::Opened | Turn::Closed => self.store.metrics.breaker_open(turn == Turn::Opened),
        }
        drop(breaker);
        match turn {
            Turn::None => {}
            Turn::Opened => log::warn!("introspection: the endpoint fails and is left alone for a moment"),
            Turn::Closed => log::info!("introspection: the endpoint answers again"),
        }
    }
}

impl Drop for Attempt<'_> {
    /// The caller's timeout and this one expire at about the same time. A lookup that is cancelled much earlier (by a
    /// shutdown of the runtime) says nothing about the endpoint.
    fn drop(&mut self) {
        let late = self.begun.elapsed() >= self.store.timeout * 3 / 4;
        self.tell(if late { Outcome::Failed } else { Outcome::Abandoned });
    }
}

impl IntrospectSettings {
    /// Everything that is wrong with these settings, and a warning of what they give away. Connects to nothing.
    pub fn problems(&self) -> Vec<Problem> {
        let mut found = Vec::new();
        match Endpoint::new(&self.url, self.insecure_http, &self.tls) {
            Ok(Endpoint { leaks: true, place, .. }) => {
                let what = format!(
                    "EVERY TOKEN TRAVELS IN PLAIN TEXT to {place}, as insecure_http says; whoever listens on the way can use \
                     them"
                );
                found.push(Problem::warning("endpoint", what, "use https://"));
            }
            Ok(_) => {}
            Err(problem) => found.push(problem),
        }
        found.extend(self.problems_but_endpoint());
        found.extend(self.tls.problems());
        found
    }

    /// Which answers are meant: see [`super::StoreSettings::records`].
    pub(super) fn records(&self) -> String {
        let Self { url, mode, user, scopes, default_scopes, .. } = self;
        format!("introspection {url:?} {mode:?} {user:?} {scopes:?} {default_scopes:?}")
    }

    /// Without those of the address and of TLS, which show when the endpoint is made from them.
    fn problems_but_endpoint(&self) -> Vec<Problem> {
        let mut found = Vec::new();
        let pointer = |key, text: &str| {
            let wrong = || Problem::error(key, "is not a JSON pointer", "write it like \"/username\"");
            (!text.starts_with('/')).then(wrong)
        };
        match &self.mode {
            IntrospectMode::User { header, unknown } => {
                found.extend(unknown_statuses(unknown).err());
                found.extend(token_header(header).err());
            }
            IntrospectMode::Rfc7662 { client_id, .. } if client_id.is_empty() => {
                let what = "is missing: the server must know who asks";
                found.push(Problem::error("client_id", what, "set it as the server gave it"));
            }
            IntrospectMode::Rfc7662 { client_id, client_secret } => found.extend(basic(client_id, client_secret).err()),
        }
        if self.user.is_empty() {
            found.push(Problem::error("user", "is empty", "remove it for the default"));
        }
        let users = self.user.iter().enumerate();
        found.extend(users.filter_map(|(index, text)| Some(pointer("user", text)?.element(index))));
        if !self.scopes.is_empty() {
            found.extend(pointer("scopes_at", &self.scopes));
        }
        found.extend(Problem::out_of_range("breaker_failures", u64::from(self.breaker_failures), 1..=1_000));
        found.extend(Problem::connections(self.connections));
        found
    }
}

/// The statuses that can mean "no such token". All others have a fixed meaning in HTTP.
fn unknown_statuses(statuses: &[u16]) -> Result<Vec<StatusCode>, Problem> {
    let wrong = || {
        let what = "must be statuses from 400 to 499 that speak of the token";
        Problem::error("unknown_statuses", what, "write them like [401, 403]")
    };
    let fits = |status: &u16| (400..500).contains(status) && ![407, 408, 421, 425, 429].contains(status);
    if statuses.is_empty() || !statuses.iter().all(fits) {
        return Err(wrong());
    }
    statuses.iter().map(|status| StatusCode::from_u16(*status).map_err(|_| wrong())).collect()
}

/// Other bytes cannot be part of a token, because they cannot be sent unchanged.
fn is_sendable(token: &[u8]) -> bool {
    (1..=MAX_TOKEN_BYTES).contains(&token.len()) && token.iter().all(u8::is_ascii_graphic)
}

fn token_header(name: &str) -> Result<HeaderName, Problem> {
    const TAKEN: [&str; 10] = [
        "host",
        "accept",
        "user-agent",
        "connection",
        "content-length",
        "content-type",
        "transfer-encoding",
        "te",
        "upgrade",
        "expect",
    ];
    let wrong = |why: &str| {
        let what = format!("tokens are asked for in the header that token.header names, and {name} {why}");
        Problem::error("mode", what, "name another header in token.header, like \"PRIVATE-TOKEN\"")
    };
    let header = HeaderName::from_bytes(name.as_bytes()).map_err(|_| wrong("can't be a header's name"))?;
    if TAKEN.contains(&header.as_str()) { Err(wrong("can't hold a token")) } else { Ok(header) }
}

/// RFC 6749, 2.3.1: both are form-encoded before they are concatenated.
fn basic(client_id: &str, client_secret: &Secret) -> Result<HeaderValue, Problem> {
    let encoded = |text: &str| byte_serialize(text.as_bytes()).collect::<String>();
    let pair = format!("{}:{}", encoded(client_id), encoded(client_secret.expose()));
    let mut value = HeaderValue::from_str(&format!("Basic {}", STANDARD.encode(pair))).map_err(|_| {
        Problem::error("client_id", "cannot be sent with its secret", "set them as the server gave them")
    })?;
    value.set_sensitive(true);
    Ok(value)
}
