//! HTTP introspection: looks a token up by a request with the token, or about it (RFC 7662). Knows nothing of client
//! requests. The token is sent to the configured address only: no redirects, no proxies, no cookies.

mod answer;
mod breaker;
mod endpoint;
mod pool;

use super::{Credential, Heard, Secret, StoreError, TlsSettings, TokenRecord, TokenStore};
use crate::request::token::MAX_TOKEN_BYTES;
use crate::telemetry::metrics::StoreMetrics;
use answer::{Shape, doubt, garbage, is_json};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use breaker::{Breaker, Outcome, Pass, Turn};
use endpoint::Endpoint;
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderName, HeaderValue, RETRY_AFTER, USER_AGENT};
use hyper::{Method, Request, StatusCode};
use parking_lot::Mutex;
use pool::{Answer, BODY_BYTES, Body, HttpPool};
use std::fmt;
use std::sync::Arc;
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

pub struct IntrospectStore {
    /// The request without the token.
    request: Request<()>,
    /// The header for the token; `None`: in the body.
    header: Option<HeaderName>,
    shape: Shape,
    unknown: Vec<StatusCode>,
    pool: HttpPool,
    permits: Semaphore,
    timeout: Duration,
    breaker: Mutex<Breaker>,
    metrics: Arc<StoreMetrics>,
}

impl IntrospectStore {
    /// Does not connect yet. `timeout` is the caller's.
    pub fn new(settings: IntrospectSettings, timeout: Duration, metrics: Arc<StoreMetrics>) -> Result<Self, String> {
        let endpoint = Endpoint::new(&settings.url, settings.insecure_http, &settings.tls)?;
        for pointer in &settings.user {
            if !pointer.starts_with('/') {
                return Err(format!("user: {pointer} is no JSON pointer, like /username"));
            }
        }
        if settings.user.is_empty() || settings.connections == 0 || settings.breaker_failures == 0 {
            return Err("user must name a field, connections and breaker_failures must be 1 or more".into());
        }
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
                if client_id.is_empty() {
                    return Err("client_id is empty: tollgate must say who asks".into());
                }
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
            permits: Semaphore::new(settings.connections.min(Semaphore::MAX_PERMITS)),
            timeout,
            breaker: Mutex::new(Breaker::new(settings.breaker_failures, settings.breaker_pause)),
            metrics,
        })
    }

    fn request_for(&self, token: &[u8]) -> Result<Request<Full<Bytes>>, String> {
        let mut body = Bytes::new();
        let mut request = self.request.clone();
        match &self.header {
            None => {
                let mut form = String::from("token=");
                form_encode(token, &mut form);
                form.push_str("&token_type_hint=access_token");
                body = form.into();
            }
            Some(header) => {
                let scheme: &[u8] = if *header == AUTHORIZATION { b"Bearer " } else { b"" };
                let mut value = HeaderValue::from_bytes(&[scheme, token].concat())
                    .map_err(|_| "the token can't be sent".to_owned())?;
                value.set_sensitive(true);
                request.headers_mut().insert(header, value);
            }
        }
        Ok(request.map(|()| Full::new(body)))
    }

    async fn permit(&self) -> Result<SemaphorePermit<'_>, StoreError> {
        match tokio::time::timeout(self.timeout / 4, self.permits.acquire()).await {
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
    fn outcome(answered: &Result<Answer, String>) -> Outcome {
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
        let request = self.request_for(credential.expose_secret()).map_err(StoreError::Unavailable)?;
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
        self.judge(&answered.map_err(StoreError::Unavailable)?, credential)
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

/// What is wrong with where tokens are to be asked for, or how; with the place, should it be a safe one only because
/// somebody said so.
pub fn check_url(settings: &IntrospectSettings) -> Result<Option<String>, String> {
    let endpoint = Endpoint::new(&settings.url, settings.insecure_http, &settings.tls)?;
    if let IntrospectMode::User { unknown, .. } = &settings.mode {
        unknown_statuses(unknown)?;
    }
    Ok(endpoint.leaks.then_some(endpoint.place))
}

/// The statuses that can mean "no such token". All others have a fixed meaning in HTTP.
fn unknown_statuses(statuses: &[u16]) -> Result<Vec<StatusCode>, String> {
    let fits = |status: &u16| (400..500).contains(status) && ![407, 408, 421, 425, 429].contains(status);
    if statuses.is_empty() || !statuses.iter().all(fits) {
        return Err(
            "unknown_statuses: must be statuses from 400 to 499 that speak of the token, like [401, 403]".into()
        );
    }
    statuses.iter().map(|status| StatusCode::from_u16(*status).map_err(|error| error.to_string())).collect()
}

/// Other bytes cannot be part of a token, because they cannot be sent unchanged.
fn is_sendable(token: &[u8]) -> bool {
    (1..=MAX_TOKEN_BYTES).contains(&token.len()) && token.iter().all(u8::is_ascii_graphic)
}

fn token_header(name: &str) -> Result<HeaderName, String> {
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
    let header = HeaderName::from_bytes(name.as_bytes()).map_err(|_| format!("{name} can't be a header's name"))?;
    if TAKEN.contains(&header.as_str()) { Err(format!("{name} can't hold a token")) } else { Ok(header) }
}

/// RFC 6749, 2.3.1: both are form-encoded before they are concatenated.
fn basic(client_id: &str, client_secret: &Secret) -> Result<HeaderValue, String> {
    let mut pair = String::new();
    form_encode(client_id.as_bytes(), &mut pair);
    pair.push(':');
    form_encode(client_secret.expose().as_bytes(), &mut pair);
    let mut value = HeaderValue::from_str(&format!("Basic {}", STANDARD.encode(pair)))
        .map_err(|_| "client_id or client_secret can't be sent".to_owned())?;
    value.set_sensitive(true);
    Ok(value)
}

/// `application/x-www-form-urlencoded`.
fn form_encode(bytes: &[u8], out: &mut String) {
    for &byte in bytes {
        match byte {
            b' ' => out.push('+'),
            b'*' | b'-' | b'.' | b'_' => out.push(char::from(byte)),
            _ if byte.is_ascii_alphanumeric() => out.push(char::from(byte)),
            _ => {
                out.push('%');
                for digit in [byte >> 4, byte & 15] {
                    out.push(char::from(b"0123456789ABCDEF"[usize::from(digit)]));
                }
            }
        }
    }
}
