//! Every refusal: its status, what the client reads, and the reason that only the log and the metric get.
//! One match without a wildcard, so that a new fault anywhere does not compile until it has an answer here.

use super::cors::{Cors, CorsGrant};
use super::limit_fields::LimitFields;
use crate::forward::{FieldSink, Http1Head, Plan};
use crate::identity::{CannotTell, Invalid};
use crate::policy::{Excess, LimitedBy, PolicyFault};
use crate::request::RequestFault;
use crate::request::body::BodyFault;
use crate::request::head::HeadFault;
use crate::request::query::Key;
use crate::request::route::Methods;
use crate::request::target::TargetFault;
use crate::request::token::TokenFault;
use crate::request::verdict::{VerdictFault, VerdictSource};
use crate::telemetry::metrics::AuthResult;

/// Why a request is not answered by the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    Request(RequestFault),
    Identity(Invalid),
    /// The token store can't tell.
    CannotTell(CannotTell),
    Policy(PolicyFault),
    Upstream(UpstreamFault),
    /// Came in plain text, and may come again over TLS.
    Redirect,
    /// Came in plain text with what should not have, or in a way that cannot be sent elsewhere.
    PlainText,
    /// Shutting down.
    Draining,
    /// A bug of ours.
    Bug,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpstreamFault {
    /// No connection, or one that broke before an answer.
    Broken,
    /// An answer that can't be framed or parsed in one way.
    Malformed,
    TimedOut,
    /// The whole exchange took too long.
    Overdue,
    /// None that could be tried.
    Absent,
    /// All servers are busy, and so many requests are waiting.
    QueueFull,
    /// All servers were busy for too long.
    QueueTimeout,
}

/// The client's no.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    cause: Cause,
}

impl From<Cause> for Refusal {
    fn from(cause: Cause) -> Self {
        Self { cause }
    }
}

/// What an answer says beside the refusal itself.
#[derive(Clone, Copy, Debug)]
pub struct Envelope<'a> {
    /// `Date`, as RFC 9110 has it.
    pub date: &'a str,
    pub request_id: &'a str,
    pub cors: &'a Cors,
    pub grant: CorsGrant,
    /// The value of Strict-Transport-Security.
    pub hsts: Option<&'a str>,
    /// What is left of the client's limits, where answers say so.
    pub limits: Option<&'a LimitFields>,
    /// Where the client is sent, if it is.
    pub location: Option<&'a [u8]>,
    /// The route takes a token as the password of HTTP Basic as well.
    pub basic: bool,
    /// It goes to another proxy, which asked about a request.
    pub asker: Option<VerdictSource>,
}

/// The status of an answer, for a proxy that asked about a request and does not take every one.
const fn status_for(asker: VerdictSource, status: u16) -> u16 {
    match (asker, status) {
        // Anything else is an error of its own to nginx, and 500 to the client.
        (VerdictSource::Nginx, 401 | 403) => status,
        (VerdictSource::Nginx, _) => 403,
        (VerdictSource::Forwarded | VerdictSource::Envoy, _) => status,
    }
}

/// Where the real status is.
const VERDICT_STATUS: &[u8] = b"X-Tollgate-Status";

/// Says to another proxy that it may forward the request that it asked about, and for whom. It has to forward what it asked about,
/// unchanged: nothing else is allowed.
pub fn allow(plan: &Plan<'_>, envelope: &Envelope<'_>, sink: &mut impl AnswerSink) {
    sink.status(200, phrase(200));
    sink.field(b"Date", envelope.date.as_bytes());
    sink.field(b"Content-Length", b"0");
    sink.field(b"Cache-Control", b"no-store");
    plan.write_verdict(sink);
    sink.field(VERDICT_STATUS, b"200");
    for (name, value) in envelope.limits.into_iter().flat_map(LimitFields::fields) {
        sink.field(name.as_bytes(), value.as_bytes());
    }
    sink.field(b"X-Request-Id", envelope.request_id.as_bytes());
    sink.body(b"");
}

impl Refusal {
    pub const fn cause(&self) -> Cause {
        self.cause
    }

    pub const fn status(&self) -> u16 {
        self.terms().0
    }

    /// Log field and metric label.
    pub const fn reason(&self) -> &'static str {
        self.terms().1
    }

    /// A framing doubt or an unread rest that can't be told from a next request: nothing may follow on the connection.
    pub const fn must_close(&self) -> bool {
        match self.cause {
            Cause::Request(fault) => matches!(
                fault,
                RequestFault::Head(_)
                    | RequestFault::HeaderTooLarge
                    | RequestFault::HeaderTimeout
                    | RequestFault::BodyTimeout
                    | RequestFault::BodyTooSlow
                    | RequestFault::Body(_)
            ),
            Cause::Draining | Cause::PlainText | Cause::Bug => true,
            Cause::Identity(_) | Cause::CannotTell(_) | Cause::Policy(_) | Cause::Upstream(_) | Cause::Redirect => {
                false
            }
        }
    }

    /// The client did not send its body fast enough.
    pub const fn is_of_slow_body(&self) -> bool {
        matches!(self.cause, Cause::Request(RequestFault::BodyTimeout | RequestFault::BodyTooSlow))
    }

    /// How the verdict counts, when it is one about a credential.
    pub const fn auth_result(&self) -> Option<AuthResult> {
        match (self.cause, self.status()) {
            (Cause::CannotTell(_), _) => Some(AuthResult::Unavailable),
            (Cause::Request(_) | Cause::Identity(_) | Cause::Policy(_), 401 | 403) => Some(AuthResult::Refused),
            _ => None,
        }
    }

    const fn terms(&self) -> (u16, &'static str) {
        use RequestFault as R;
        match self.cause {
            Cause::Request(R::Head(fault)) => match fault {
                HeadFault::RequestLine => (400, "request_line"),
                HeadFault::FieldLine => (400, "field_line"),
                HeadFault::Host => (400, "host"),
                HeadFault::Framing => (400, "framing"),
                HeadFault::Connection => (400, "connection_header"),
                HeadFault::Expect => (400, "expect"),
                HeadFault::ContentType => (400, "content_type"),
                HeadFault::TooManyFields => (431, "too_many_fields"),
            },
            Cause::Request(R::Target(fault)) => (
                400,
                match fault {
                    TargetFault::IllegalByte => "target_byte",
                    TargetFault::BadEscape => "target_escape",
                    TargetFault::DotSegment => "dot_segment",
                    TargetFault::Backslash => "backslash",
                    TargetFault::ControlByte => "control_byte",
                    TargetFault::Fragment => "fragment",
                    TargetFault::PrefixSpelling => "prefix_spelling",
                    TargetFault::AmbiguousPath => "ambiguous_path",
                },
            ),
            Cause::Request(R::MethodOverride) => (400, "method_override"),
            Cause::Request(R::PastDepth) => (400, "page_depth"),
            Cause::Request(R::Verdict(fault)) => (
                400,
                match fault {
                    VerdictFault::Field => "verdict_field",
                    VerdictFault::Value => "verdict_value",
                    VerdictFault::Body => "verdict_body",
                    VerdictFault::Strange => "verdict_strange",
                    VerdictFault::Change => "verdict_change",
                },
            ),
            Cause::Request(R::TokenMissing) => (401, "missing"),
            Cause::Request(R::Token(fault)) => (
                401,
                match fault {
                    TokenFault::Empty => "empty",
                    TokenFault::TooLong => "too_long",
                    TokenFault::BadByte => "bad_byte",
                    TokenFault::Conflict => "conflict",
                    TokenFault::Spelling => "spelling",
                    TokenFault::Basic => "basic",
                    TokenFault::BasicUser => "basic_user",
                },
            ),
            Cause::Request(R::QueryToken) => (401, "query_token"),
            Cause::Request(R::OtherCredential) => (401, "other_credential"),
            Cause::Request(R::Body(fault)) => match fault {
                BodyFault::Field(Key::Sudo) => (403, "body_sudo"),
                BodyFault::Field(Key::Method) => (400, "body_method"),
                BodyFault::Field(Key::Token | Key::AccessToken | Key::JobToken) => (401, "body"),
                BodyFault::Field(Key::Page | Key::PerPage) => (400, "body_page"),
                BodyFault::Type => (400, "body_type"),
                BodyFault::Untyped => (400, "body_untyped"),
                BodyFault::Ambiguous => (400, "body_ambiguous"),
                BodyFault::Charset => (415, "body_charset"),
                BodyFault::Coding => (415, "body_coding"),
            },
            Cause::Identity(Invalid::Unknown) => (401, "unknown"),
            Cause::Identity(Invalid::Expired) => (401, "expired"),
            Cause::Identity(Invalid::NotYetValid) => (401, "not_yet_valid"),
            Cause::Identity(Invalid::Revoked) => (401, "revoked"),
            Cause::Identity(Invalid::Blocked) => (401, "blocked"),
            Cause::Policy(PolicyFault::NoIdentity) => (401, "no_identity"),
            Cause::Policy(PolicyFault::BasicUser) => (401, "basic_user"),
            Cause::Policy(PolicyFault::Sudo) => (403, "sudo"),
            Cause::Policy(PolicyFault::Scope) => (403, "scope"),
            Cause::Policy(PolicyFault::SudoScope) => (403, "sudo_scope"),
            Cause::Policy(PolicyFault::Address) => (403, "address"),
            Cause::Policy(PolicyFault::TokenNetwork) => (403, "token_network"),
            Cause::Policy(PolicyFault::TokenMethod) => (403, "token_method"),
            Cause::Policy(PolicyFault::Limit(Excess { by: LimitedBy::Rate, .. })) => (429, "limit_rate"),
            Cause::Policy(PolicyFault::Limit(Excess { by: LimitedBy::Quota, .. })) => (429, "limit_quota"),
            Cause::Policy(PolicyFault::Limit(Excess { by: LimitedBy::Concurrency, .. })) => (429, "limit_concurrency"),
            Cause::Policy(PolicyFault::Limit(Excess { by: LimitedBy::Store, .. })) => (503, "limit_store"),
            Cause::Policy(PolicyFault::Guessing(_)) => (429, "guessing"),
            Cause::Request(R::NoRoute) => (404, "no_route"),
            Cause::Request(R::MethodNotAllowed) => (405, "method"),
            Cause::Request(R::HeaderTimeout) => (408, "header_timeout"),
            Cause::Request(R::BodyTimeout) => (408, "body_timeout"),
            Cause::Request(R::BodyTooSlow) => (408, "body_rate"),
            Cause::Request(R::QueryCharset) => (415, "query_charset"),
            Cause::Request(R::BodyTooLarge) => (413, "body_size"),
            Cause::Request(R::TargetTooLong) => (414, "target_size"),
            Cause::Request(R::HeaderTooLarge) => (431, "header_size"),
            Cause::Bug => (500, "bug"),
            Cause::Upstream(UpstreamFault::Broken) => (502, "upstream_broken"),
            Cause::Upstream(UpstreamFault::Malformed) => (502, "upstream_malformed"),
            Cause::Upstream(UpstreamFault::Absent) => (503, "upstream_absent"),
            Cause::Upstream(UpstreamFault::QueueFull) => (503, "upstream_queue_full"),
            Cause::Upstream(UpstreamFault::QueueTimeout) => (503, "upstream_queue_timeout"),
            Cause::CannotTell(CannotTell::Store) => (503, "store"),
            Cause::CannotTell(CannotTell::Record) => (503, "store_record"),
            Cause::CannotTell(CannotTell::Busy) => (503, "store_busy"),
            Cause::CannotTell(CannotTell::NotAsked) => (503, "store_not_asked"),
            Cause::Redirect => (308, "redirect_to_https"),
            Cause::PlainText => (403, "plain_http"),
            Cause::Draining => (503, "draining"),
            Cause::Upstream(UpstreamFault::TimedOut) => (504, "upstream_timeout"),
            Cause::Upstream(UpstreamFault::Overdue) => (504, "upstream_request_timeout"),
        }
    }

    /// Says the whole answer, in the same order on every lane: the order of fields must not tell which rule was hit.
    pub fn render(&self, envelope: &Envelope<'_>, sink: &mut impl AnswerSink) {
        let (status, body) = (self.status(), body(self.status()));
        let said = envelope.asker.map_or(status, |asker| status_for(asker, status));
        sink.status(said, phrase(said));
        sink.field(b"Date", envelope.date.as_bytes());
        sink.field(b"Content-Type", b"application/json");
        sink.field_by(b"Content-Length", |out| decimal(body.len(), out));
        sink.field(b"Cache-Control", b"no-store");
        match status {
            401 => {
                sink.field(b"WWW-Authenticate", b"Bearer realm=\"api\"");
                if envelope.basic {
                    sink.field(b"WWW-Authenticate", b"Basic realm=\"api\", charset=\"UTF-8\"");
                }
            }
            405 => {
                let methods: Vec<_> = Methods::ALL.names().collect();
                sink.field(b"Allow", methods.join(", ").as_bytes());
            }
            503 => sink.field(b"Retry-After", b"1"),
            _ => {}
        }
        if envelope.asker.is_some() {
            number_field(VERDICT_STATUS, status.into(), sink);
        }
        if let Cause::Policy(PolicyFault::Limit(excess)) = self.cause
            && status == 429
        {
            excess_fields(&excess, sink);
        }
        if let Cause::Policy(PolicyFault::Guessing(refusal)) = self.cause {
            number_field(b"Retry-After", refusal.retry_after, sink);
        }
        for (name, value) in envelope.limits.into_iter().flat_map(LimitFields::fields) {
            sink.field(name.as_bytes(), value.as_bytes());
        }
        if let Some(location) = envelope.location {
            sink.field(b"Location", location);
        }
        if let Some(hsts) = envelope.hsts {
            sink.field(b"Strict-Transport-Security", hsts.as_bytes());
        }
        for (name, value) in envelope.cors.fields(envelope.grant) {
            sink.field(name.as_bytes(), value.as_bytes());
        }
        sink.field(b"X-Request-Id", envelope.request_id.as_bytes());
        sink.body(body.as_bytes());
    }
}

/// When the client may come again, as GitLab says it: its clients wait by these.
fn excess_fields(excess: &Excess, sink: &mut impl AnswerSink) {
    let mut field = |name: &[u8], value: u64| number_field(name, value, sink);
    field(b"Retry-After", excess.retry_after);
    if let Some(per_minute) = excess.per_minute {
        field(b"RateLimit-Limit", per_minute);
        field(b"RateLimit-Remaining", excess.remaining);
        field(b"RateLimit-Reset", excess.reset);
    }
}

fn number_field(name: &[u8], value: u64, sink: &mut impl AnswerSink) {
    sink.field_by(name, |out| decimal(usize::try_from(value).unwrap_or(usize::MAX), out));
}

/// Takes an answer of tollgate's own.
pub trait AnswerSink: FieldSink {
    /// Comes first.
    fn status(&mut self, status: u16, phrase: &'static str);

    /// Comes last.
    fn body(&mut self, body: &[u8]);
}

/// Writes an answer in HTTP/1.1.
pub struct Http1Answer<'o> {
    pub out: &'o mut Vec<u8>,
    /// HEAD: the head of the answer only.
    pub head_only: bool,
    /// The connection ends behind the answer.
    pub close: bool,
}

impl FieldSink for Http1Answer<'_> {
    fn field(&mut self, name: &[u8], value: &[u8]) {
        Http1Head(self.out).field(name, value);
    }

    fn field_by(&mut self, name: &[u8], write_value: impl FnOnce(&mut Vec<u8>)) {
        Http1Head(self.out).field_by(name, write_value);
    }

    fn connection_field(&mut self, name: &[u8], value: &[u8]) {
        self.field(name, value);
    }
}

impl AnswerSink for Http1Answer<'_> {
    fn status(&mut self, status: u16, phrase: &'static str) {
        self.out.extend_from_slice(b"HTTP/1.1 ");
        decimal(status.into(), self.out);
        for part in [" ", phrase, "\r\n"] {
            self.out.extend_from_slice(part.as_bytes());
        }
    }

    fn body(&mut self, body: &[u8]) {
        self.connection_field(b"Connection", if self.close { b"close" } else { b"keep-alive" });
        self.out.extend_from_slice(b"\r\n");
        if !self.head_only {
            self.out.extend_from_slice(body);
        }
    }
}

/// Writes a number without a string of its own.
fn decimal(mut number: usize, out: &mut Vec<u8>) {
    let begin = out.len();
    loop {
        out.push(b'0' + (number % 10) as u8);
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out[begin..].reverse();
}

/// Declares the reason phrase and the body of each status that tollgate answers itself; the last one stands for the others.
macro_rules! answers {
    ($($status:literal $phrase:literal),* ; $other:literal $other_phrase:literal) => {
        const fn phrase(status: u16) -> &'static str {
            match status {
                $($status => $phrase,)*
                _ => $other_phrase,
            }
        }

        const fn body(status: u16) -> &'static str {
            match status {
                $($status => concat!("{\"message\":\"", $status, " ", $phrase, "\"}"),)*
                _ => concat!("{\"message\":\"", $other, " ", $other_phrase, "\"}"),
            }
        }
    };
}
answers! {
    200 "OK",
    308 "Permanent Redirect",
    400 "Bad Request",
    401 "Unauthorized",
    403 "Forbidden",
    404 "Not Found",
    405 "Method Not Allowed",
    408 "Request Timeout",
    413 "Request Entity Too Large",
    414 "URI Too Long",
    415 "Unsupported Media Type",
    429 "Too Many Requests",
    431 "Request Header Fields Too Large",
    502 "Bad Gateway",
    503 "Service Unavailable",
    504 "Gateway Timeout";
    500 "Internal Server Error"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(cause: Cause, head_only: bool, close: bool) -> String {
        let mut out = Vec::new();
        let (cors, grant) = (&Cors::Off, CorsGrant::Off);
        let (hsts, limits, location) = (None, None, None);
        let envelope =
            Envelope { date: "D", request_id: "id", cors, grant, hsts, limits, location, basic: false, asker: None };
        Refusal::from(cause).render(&envelope, &mut Http1Answer { out: &mut out, head_only, close });
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn refusals_of_a_credential_look_the_same() {
        let unknown = written(Cause::Identity(Invalid::Unknown), false, false);
        assert!(unknown.ends_with("\r\n\r\n{\"message\":\"401 Unauthorized\"}"), "{unknown}");
        assert!(unknown.contains("Content-Length: 30\r\n") && unknown.contains("Cache-Control: no-store\r\n"));
        assert!(unknown.contains("WWW-Authenticate: "));
        for cause in [
            Cause::Identity(Invalid::Expired),
            Cause::Identity(Invalid::Revoked),
            Cause::Request(RequestFault::TokenMissing),
            Cause::Request(RequestFault::Token(TokenFault::Conflict)),
            Cause::Request(RequestFault::Token(TokenFault::Spelling)),
            Cause::Request(RequestFault::Body(BodyFault::Field(Key::Token))),
            Cause::Policy(PolicyFault::NoIdentity),
        ] {
            assert_eq!(written(cause, false, false), unknown, "{cause:?}");
        }
    }

    #[test]
    fn what_is_said_about_bodies() {
        let fields =
            [Key::Token, Key::AccessToken, Key::JobToken].map(|key| (BodyFault::Field(key), "401 Unauthorized"));
        let others = [
            (BodyFault::Field(Key::Sudo), "403 Forbidden"),
            (BodyFault::Field(Key::Method), "400 Bad Request"),
            (BodyFault::Field(Key::Page), "400 Bad Request"),
            (BodyFault::Field(Key::PerPage), "400 Bad Request"),
            (BodyFault::Type, "400 Bad Request"),
            (BodyFault::Untyped, "400 Bad Request"),
            (BodyFault::Ambiguous, "400 Bad Request"),
            (BodyFault::Charset, "415 Unsupported Media Type"),
            (BodyFault::Coding, "415 Unsupported Media Type"),
        ];
        for (fault, says) in fields.into_iter().chain(others) {
            let text = written(Cause::Request(fault.into()), false, true);
            assert!(text.starts_with(&format!("HTTP/1.1 {says}\r\n")), "{fault:?}: {text}");
            assert!(text.ends_with(&format!("\r\n\r\n{{\"message\":\"{says}\"}}")), "{fault:?}: {text}");
        }
    }

    #[test]
    fn heads_and_lengths() {
        assert!(written(Cause::CannotTell(CannotTell::Store), true, true).ends_with("Connection: close\r\n\r\n"));
        for cause in [
            Cause::CannotTell(CannotTell::Store),
            Cause::Bug,
            Cause::Request(RequestFault::NoRoute),
            Cause::Request(RequestFault::HeaderTooLarge),
        ] {
            let text = written(cause, false, false);
            let (head, body) = text.split_once("\r\n\r\n").unwrap();
            assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{text}");
        }
        assert!(
            written(Cause::Request(RequestFault::MethodNotAllowed), false, false)
                .contains("Allow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS\r\n")
        );
        assert!(written(Cause::CannotTell(CannotTell::Store), false, false).contains("Retry-After: 1\r\n"));
    }

    #[test]
    fn what_follows_from_a_refusal() {
        use RequestFault as R;
        let (close, slow, refused, unavailable) =
            ((true, false), (true, true), Some(AuthResult::Refused), Some(AuthResult::Unavailable));
        let goes_on = (false, false);
        for (cause, status, reason, (must_close, is_slow), auth_result) in [
            (Cause::Request(R::Head(HeadFault::Framing)), 400, "framing", close, None),
            (Cause::Request(R::HeaderTooLarge), 431, "header_size", close, None),
            (Cause::Request(R::HeaderTimeout), 408, "header_timeout", close, None),
            (Cause::Request(R::BodyTimeout), 408, "body_timeout", slow, None),
            (Cause::Request(R::BodyTooSlow), 408, "body_rate", slow, None),
            (Cause::Request(R::Body(BodyFault::Field(Key::Token))), 401, "body", close, refused),
            (Cause::Request(R::TokenMissing), 401, "missing", goes_on, refused),
            (Cause::Request(R::NoRoute), 404, "no_route", goes_on, None),
            (Cause::Identity(Invalid::Blocked), 401, "blocked", goes_on, refused),
            (Cause::CannotTell(CannotTell::Store), 503, "store", goes_on, unavailable),
            (Cause::Policy(PolicyFault::Scope), 403, "scope", goes_on, refused),
            (Cause::Upstream(UpstreamFault::Broken), 502, "upstream_broken", goes_on, None),
            (Cause::Redirect, 308, "redirect_to_https", goes_on, None),
            (Cause::PlainText, 403, "plain_http", close, None),
            (Cause::Draining, 503, "draining", close, None),
            (Cause::Bug, 500, "bug", close, None),
        ] {
            let refusal = Refusal::from(cause);
            assert_eq!((refusal.cause(), refusal.status(), refusal.reason()), (cause, status, reason));
            assert_eq!((refusal.must_close(), refusal.is_of_slow_body()), (must_close, is_slow), "{cause:?}");
            assert_eq!(refusal.auth_result(), auth_result, "{cause:?}");
        }
    }
}
