//! Writes the head of a permitted request, field by field, into a sink: the bytes of HTTP/1 or the fields of HTTP/2. One
//! request line, clean fields, one framing, one credential. It must never write a field that `plan` does not let pass.

use super::plan::{Passes, Plan};
use super::{BackendCredential, ForwardRules};
use crate::request::METHOD_OVERRIDE;
use crate::request::origin::Origin;
use crate::request::token::BasicUser;
use crate::request::trace::TraceContext;
use crate::request::verdict::OVERWRITTEN;
use crate::request::view::{FieldKind, Framing, Method, RequestView};
use http::{HeaderMap, HeaderName, HeaderValue};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use smallvec::SmallVec;
use std::borrow::Cow;
use std::io::Write as _;
use std::net::IpAddr;

/// Takes the fields of a head in their order.
pub trait FieldSink {
    /// A field that goes from end to end.
    fn field(&mut self, name: &[u8], value: &[u8]);

    /// The same, with a value that is not at hand as a whole.
    fn field_by(&mut self, name: &[u8], write_value: impl FnOnce(&mut Vec<u8>)) {
        let mut value = Vec::with_capacity(64);
        write_value(&mut value);
        self.field(name, &value);
    }

    /// A field about this connection or its framing, which HTTP/2 says in another way.
    fn connection_field(&mut self, name: &[u8], value: &[u8]);
}

/// Takes a request.
pub trait RequestSink: FieldSink {
    /// Comes first. The target is written by the caller.
    fn request(&mut self, method: &[u8], write_target: impl FnOnce(&mut Vec<u8>));

    /// Comes last.
    fn end(&mut self);
}

/// Writes HTTP/1.1, whatever version the client speaks.
pub struct Http1Head<'o>(pub &'o mut Vec<u8>);

impl FieldSink for Http1Head<'_> {
    #[inline]
    fn field(&mut self, name: &[u8], value: &[u8]) {
        self.0.reserve(name.len() + value.len() + 4);
        self.0.extend_from_slice(name);
        self.0.extend_from_slice(b": ");
        self.0.extend_from_slice(value);
        self.0.extend_from_slice(b"\r\n");
    }

    fn field_by(&mut self, name: &[u8], write_value: impl FnOnce(&mut Vec<u8>)) {
        self.0.extend_from_slice(name);
        self.0.extend_from_slice(b": ");
        write_value(self.0);
        self.0.extend_from_slice(b"\r\n");
    }

    fn connection_field(&mut self, name: &[u8], value: &[u8]) {
        self.field(name, value);
    }
}

impl RequestSink for Http1Head<'_> {
    fn request(&mut self, method: &[u8], write_target: impl FnOnce(&mut Vec<u8>)) {
        self.0.extend_from_slice(method);
        self.0.push(b' ');
        write_target(self.0);
        self.0.extend_from_slice(b" HTTP/1.1\r\n");
    }

    fn end(&mut self) {
        self.0.extend_from_slice(b"\r\n");
    }
}

/// Collects what HTTP/2 sends: pseudo fields beside a map of fields with names in lower case.
#[derive(Debug, Default)]
pub struct Http2Head {
    pub method: Vec<u8>,
    pub path: Vec<u8>,
    pub fields: HeaderMap,
    /// A field that the map cannot hold: the request must not be sent without it.
    pub incomplete: bool,
}

impl FieldSink for Http2Head {
    fn field(&mut self, name: &[u8], value: &[u8]) {
        match (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
            (Ok(name), Ok(value)) => self.incomplete |= self.fields.try_append(name, value).is_err(),
            _ => self.incomplete = true,
        }
    }

    fn connection_field(&mut self, _name: &[u8], _value: &[u8]) {}
}

impl RequestSink for Http2Head {
    fn request(&mut self, method: &[u8], write_target: impl FnOnce(&mut Vec<u8>)) {
        self.method = method.to_vec();
        write_target(&mut self.path);
    }

    fn end(&mut self) {}
}

impl Plan<'_> {
    /// Writes the request's head as the upstream gets it. Returns how many fields were dropped for their name.
    pub fn write_head(
        &self,
        view: &RequestView<'_>,
        rules: &ForwardRules,
        origin: &Origin<'_>,
        request_id: &str,
        trace: Option<&TraceContext>,
        sink: &mut impl RequestSink,
    ) -> usize {
        sink.request(view.method_bytes, |target| match &self.route.rewrite {
            None if self.edits.is_empty() => target.extend_from_slice(view.target),
            None => self.edits.write_target(view.path(), view.query(), target),
            Some(rewrite) => {
                // `examine` has refused every other path.
                let rest = rewrite.rest(view.path()).unwrap_or_default();
                rewrite.write_prefix(rest, target);
                self.edits.write_target(rest, view.query(), target);
            }
        });
        sink.field(b"Host", view.host);

        let nominated = nominated(view);
        let own = &self.route.request_headers;
        let edits = !own.is_empty();
        let mut dropped = 0;
        // The type by which the body is judged, where the client spelled it in another way or gave none.
        if let Some(content_type) = &self.content_type {
            sink.field(b"Content-Type", content_type);
        }
        for field in &view.fields {
            if field.kind == FieldKind::ContentType && self.content_type.is_some() {
                continue;
            }
            // Connection can only take away what no stage has judged and tollgate does not write: without its
            // Content-Type, for one, a body would be read in another way than it was watched.
            let ends_here =
                field.kind == FieldKind::EndToEnd && nominated.iter().any(|name| name.eq_ignore_ascii_case(field.name));
            if edits && own.takes_out(field.name) {
                continue;
            }
            match self.passes(field, rules) {
                Passes::Yes if !ends_here => sink.field(field.name, field.value),
                Passes::NoAndCounted => dropped += 1,
                Passes::Yes | Passes::No => {}
            }
        }
        if self.overridden {
            // The backend must run the method that was judged.
            sink.field(METHOD_OVERRIDE.as_bytes(), self.method.as_str().as_bytes());
        }
        own.set.iter().for_each(|(name, value)| sink.field(name.as_bytes(), value.as_bytes()));
        self.write_identity(rules, sink);
        if let Some(subject) = origin.tls.as_ref().and_then(|tls| tls.subject.as_deref()) {
            text(sink, b"X-Tollgate-Client-Certificate", subject);
        }
        write_origin(origin, sink);
        sink.field(b"X-Request-Id", request_id.as_bytes());
        if let Some(trace) = trace {
            write_trace(view, trace, sink);
        }
        match view.body {
            // A method that usually has a body says that it has none; other requests say nothing, as they came.
            Framing::Empty if matches!(view.method, Method::Post | Method::Put | Method::Patch) => {
                sink.field(b"Content-Length", b"0")
            }
            Framing::Empty => {}
            Framing::Length(length) => sink.field(b"Content-Length", length.to_string().as_bytes()),
            Framing::Chunked => sink.connection_field(b"Transfer-Encoding", b"chunked"),
        }
        if view.expects_continue {
            sink.connection_field(b"Expect", b"100-continue");
        }
        if view.websocket {
            sink.connection_field(b"Connection", b"Upgrade");
            sink.connection_field(b"Upgrade", b"websocket");
        }
        sink.end();
        dropped
    }

    fn write_identity(&self, rules: &ForwardRules, sink: &mut impl FieldSink) {
        if let Some(presented) = &self.presented
            && matches!(rules.credential, BackendCredential::Token | BackendCredential::Both)
        {
            match (&presented.basic, self.permit.principal()) {
                // Backends that take Basic read nothing else, like that of git. The policy has seen that there is a name.
                (Some(basic), Some(principal)) => {
                    if let Some(user) = basic.upstream(principal.user()) {
                        let credentials = BasicUser::credentials(user, &presented.value);
                        sink.field(b"Authorization", [b"Basic ", credentials.as_bytes()].concat().as_slice());
                    }
                }
                _ => sink.field(rules.token.header.as_bytes(), &presented.value),
            }
        }
        if let Some(principal) = self.permit.principal()
            && matches!(rules.credential, BackendCredential::Identity | BackendCredential::Both)
        {
            text(sink, b"X-Tollgate-User", principal.user());
            sink.field(b"X-Tollgate-Token-Id", principal.token().as_str().as_bytes());
            if !principal.scopes().is_empty() {
                text(sink, b"X-Tollgate-Scopes", &principal.scopes().join(" "));
            }
        }
    }
}

impl Plan<'_> {
    /// Says who asks to a proxy that forwards by itself: every field of [`OVERWRITTEN`], empty where there is nothing to say, so that
    /// the proxy overwrites what a client sent under its name.
    pub fn write_verdict(&self, sink: &mut impl FieldSink) {
        let principal = self.permit.principal();
        let [user, token_id, scopes, certificate] = OVERWRITTEN;
        text(sink, user.as_bytes(), principal.map_or("", |principal| principal.user()));
        let token = principal.map(|principal| principal.token());
        sink.field(token_id.as_bytes(), token.as_ref().map_or(b"", |token| token.as_str().as_bytes()));
        text(sink, scopes.as_bytes(), &principal.map_or(String::new(), |principal| principal.scopes().join(" ")));
        sink.field(certificate.as_bytes(), b"");
    }
}

/// The fields that Connection names, which end here. What tollgate writes itself is written anyway.
fn nominated<'a>(view: &RequestView<'a>) -> SmallVec<[&'a [u8]; 4]> {
    let is_field = |option: &&[u8]| {
        !option.is_empty() && !option.eq_ignore_ascii_case(b"close") && !option.eq_ignore_ascii_case(b"keep-alive")
    };
    view.fields_of(FieldKind::Connection)
        .flat_map(|field| field.value.split(|b| *b == b','))
        .map(<[u8]>::trim_ascii)
        .filter(is_field)
        .collect()
}

fn write_origin(origin: &Origin<'_>, sink: &mut impl FieldSink) {
    let mut chain = origin.chain().peekable();
    if chain.peek().is_some() {
        sink.field_by(b"X-Forwarded-For", |out| {
            let mut separator: &[u8] = b"";
            for ip in chain {
                out.extend_from_slice(separator);
                write_ip(ip, out);
                separator = b", ";
            }
        });
    }
    sink.field(b"X-Forwarded-Proto", origin.scheme().as_bytes());
    sink.field(b"X-Forwarded-Host", origin.host());
    sink.field(b"X-Forwarded-Port", origin.port());
}

/// A state goes with the trace that it was sent with, and with no other one.
fn write_trace(view: &RequestView<'_>, trace: &TraceContext, sink: &mut impl FieldSink) {
    sink.field_by(b"traceparent", |out| trace.write(out));
    if trace.goes_on() {
        view.fields_of(FieldKind::TraceState).for_each(|field| sink.field(b"tracestate", field.value));
    }
}

/// The common form without the formatter, which costs more than all the rest of a field.
fn write_ip(ip: IpAddr, out: &mut Vec<u8>) {
    let IpAddr::V4(ip) = ip else {
        // Writing to memory cannot fail.
        let _ = write!(out, "{ip}");
        return;
    };
    for (place, byte) in ip.octets().into_iter().enumerate() {
        if place > 0 {
            out.push(b'.');
        }
        if byte >= 100 {
            out.push(b'0' + byte / 100);
        }
        if byte >= 10 {
            out.push(b'0' + byte / 10 % 10);
        }
        out.push(b'0' + byte % 10);
    }
}

/// Text from a store may contain anything: control and non-ASCII characters are percent-encoded, and so is `%`.
fn text(sink: &mut impl FieldSink, name: &[u8], text: &str) {
    const ENCODED: &AsciiSet = &CONTROLS.add(b'%');
    sink.field(name, Cow::from(utf8_percent_encode(text.trim_matches(' '), ENCODED)).as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Now;
    use crate::config::{Probe, parse};
    use crate::identity::{TokenStatus, judge};
    use crate::request::examine;
    use crate::request::origin::{Arrival, TlsArrival};
    use crate::request::trace::NewIds;
    use crate::store::TokenRecord;
    use crate::store::credential::Digest;

    #[test]
    fn addresses_are_written_as_the_formatter_writes_them() {
        let all = (0..=255_u8).map(|byte| IpAddr::from([byte, 255 - byte, byte / 2, 7]));
        let all = all.chain(["::1", "2001:db8::10.0.0.1", "::ffff:1.2.3.4"].map(|ip| ip.parse().unwrap()));
        let mut seen = 0;
        for ip in all {
            let mut out = Vec::new();
            write_ip(ip, &mut out);
            assert_eq!(String::from_utf8(out).unwrap(), ip.to_string());
            seen += 1;
        }
        assert_eq!(seen, 259);
    }

    /// Old and new gateways behind one backend must name a user in the same way.
    #[test]
    fn text_of_a_store_cannot_leave_its_field() {
        for (given, written) in [
            ("alice", "alice"),
            ("  a b  ", "a b"),
            ("100%", "100%25"),
            ("é\u{7f}", "%C3%A9%7F"),
            ("a\r\nX-Tollgate-User: root", "a%0D%0AX-Tollgate-User: root"),
            (" \t\0 ", "%09%00"),
            ("~!\"#$&'()*+,-./:;<=>?@[\\]^_`{|}", "~!\"#$&'()*+,-./:;<=>?@[\\]^_`{|}"),
            (" ", ""),
        ] {
            let mut out = Vec::new();
            text(&mut Http1Head(&mut out), b"X-Tollgate-User", given);
            assert_eq!(String::from_utf8(out).unwrap(), format!("X-Tollgate-User: {written}\r\n"), "{given:?}");
        }
    }

    /// A request as the backend gets it, whose token belongs to this user with these scopes, after its first line and without what
    /// every request gets.
    fn sent(config: &str, request: &str, scopes: &[&str]) -> (String, usize) {
        let parts = "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n[[store]]\nkind = \"file\"\npath = \"t.toml\"\n";
        let settings =
            parse(&format!("{config}\n{parts}"), "/nonexistent/tollgate.toml".as_ref(), Probe::Settings).unwrap();
        let head = request.replacen(" | ", " HTTP/1.1\r\nHost: h\r\n", 1).replace(" | ", "\r\n") + "\r\n\r\n";
        let view = crate::request::head::parse(head.as_bytes()).unwrap();
        let examined = examine(&view, &settings.rules).unwrap();
        let principal = examined.presented.as_ref().map(|presented| {
            let digest = Digest::of(&presented.value);
            let mut record = TokenRecord::new(digest, "ann");
            record.scopes = scopes.iter().map(|scope| (*scope).to_owned()).collect();
            match judge(Some(&record), &digest, Now { mono_ms: 0, unix_ms: 1_700_000_000_000 }) {
                (TokenStatus::Valid(principal), _) => principal,
                (TokenStatus::Invalid(why), _) => panic!("{why:?}"),
            }
        });
        let permit = settings.policy.decide(&examined, principal, None).unwrap();
        let plan = super::super::plan(permit, examined);
        assert_eq!(plan.from_query(), request.contains("private_token=t"));
        let tls = Some(std::sync::Arc::new(TlsArrival { subject: Some("CN=a".into()), hsts: None }));
        let arrival =
            Arrival { tls: tls.filter(|_| request.contains("X-Tls")), ..Arrival::of(Some([192, 0, 2, 1].into())) };
        let origin = Origin::of(&view, &arrival, &settings.rules.trusted_proxies);
        let ids = || NewIds { trace_id: 0xabc.try_into().unwrap(), span: 0xdef.try_into().unwrap(), sampled: true };
        let trace = TraceContext::begin(settings.forward.trace, &view, ids);
        let mut out = Vec::new();
        let dropped =
            plan.write_head(&view, &settings.forward, &origin, "id", trace.as_ref(), &mut Http1Head(&mut out));
        let written = out.split(|byte| *byte == b' ').nth(1).unwrap();
        let query = memchr::memchr(b'?', written).map(|at| &written[at + 1..]);
        assert_eq!(plan.keeps_target(), query == view.query(), "{request}");
        let text = String::from_utf8(out).unwrap().replace("\r\n", "|");
        let port = if arrival.tls.is_some() {
            "https|X-Forwarded-Host: h|X-Forwarded-Port: 443"
        } else {
            "http|X-Forwarded-Host: h|X-Forwarded-Port: 80"
        };
        let ours = format!("X-Forwarded-For: 192.0.2.1|X-Forwarded-Proto: {port}|X-Request-Id: id|");
        assert!(text.contains(&ours) && text.contains("Host: h|"), "{text}");
        (text.replace(&ours, "").replacen("Host: h|", "", 1).replace(" HTTP/1.1|", " "), dropped)
    }

    #[test]
    fn a_backend_gets_what_was_judged() {
        let trace = "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let identity = "X-Tollgate-User: ann|X-Tollgate-Token-Id: e3b98a4da31a|X-Tollgate-Scopes: api read|";
        let open = "[[route]]\npath = \"/api/v3/own/*\"\nauth = \"none\"\npass_token = true\nreason = \"r\"\n";
        let edits = "[[route]]\npath = \"/api/v3/e/*\"\nrewrite_prefix = \"/m\"\nrequest_headers = { set = { \"X-Set\" = \"1\" }, remove = [\"X-Gone\"] }\n";
        let all = "[token]\nsudo = \"allow\"\njob_token = \"allow\"\ncookies = \"allow\"\nauthorization = \"allow\"\npath_and_user_headers = \"allow\"\n";
        let many = "Authorization: Basic eA== | Cookie: c | JOB-TOKEN: j | X-Original-URL: /x | X_A: b";
        let t = "PRIVATE-TOKEN: t|";
        let mut wrong = Vec::new();
        for (config, request, expected, dropped) in [
            ("", "GET /api/v3/a | PRIVATE-TOKEN: t | A: b", format!("GET /api/v3/a A: b|{t}|"), 0),
            ("", "GET /api/v3/a?x&private_token=t | A: b", format!("GET /api/v3/a?x A: b|{t}|"), 0),
            ("", "GET /api/v3/a | Authorization: Bearer t", format!("GET /api/v3/a {t}|"), 0),
            (
                "[token]\nforward = \"identity\"",
                "GET /api/v3/a | PRIVATE-TOKEN: t",
                format!("GET /api/v3/a {identity}|"),
                0,
            ),
            (
                "[token]\nforward = \"both\"",
                "GET /api/v3/a | PRIVATE-TOKEN: t",
                format!("GET /api/v3/a {t}{identity}|"),
                0,
            ),
            ("[token]\nforward = \"none\"", "GET /api/v3/a | PRIVATE-TOKEN: t", "GET /api/v3/a |".into(), 0),
            // What says who asks is ours to write.
            (
                "",
                &format!("GET /api/v3/a | PRIVATE-TOKEN: t | X-Tollgate-User: root | {many}"),
                format!("GET /api/v3/a {t}|"),
                2,
            ),
            (
                all,
                &format!("GET /api/v3/a | PRIVATE-TOKEN: t | {many} | Sudo: s"),
                format!(
                    "GET /api/v3/a Authorization: Basic eA==|Cookie: c|JOB-TOKEN: j|X-Original-URL: /x|Sudo: s|{t}|"
                ),
                1,
            ),
            (
                open,
                &format!("GET /api/v3/own/a | PRIVATE-TOKEN: t | {many} | Sudo: s"),
                format!("GET /api/v3/own/a {t}Authorization: Basic eA==|Cookie: c|JOB-TOKEN: j|Sudo: s||"),
                2,
            ),
            (
                open,
                "GET /api/v3/own/a | Authorization: Bearer t",
                "GET /api/v3/own/a Authorization: Bearer t||".into(),
                0,
            ),
            // Connection takes away only what nobody judged.
            (
                "",
                "GET /api/v3/a | PRIVATE-TOKEN: t | A: b | C: d | Connection: a, close, keep-alive, , private-token | Close: e",
                format!("GET /api/v3/a C: d|Close: e|{t}|"),
                0,
            ),
            // A route's own changes.
            (
                edits,
                "GET /api/v3/e/a?x | PRIVATE-TOKEN: t | X-Set: 2 | X-Gone: 3 | X-Stays: 4",
                format!("GET /m/a?x X-Stays: 4|X-Set: 1|{t}|"),
                0,
            ),
            (edits, "GET /api/v3/e/a?x&private_token=t | A: b", format!("GET /m/a?x A: b|X-Set: 1|{t}|"), 0),
            // Bodies.
            ("", "POST /api/v3/a | PRIVATE-TOKEN: t", format!("POST /api/v3/a {t}Content-Length: 0||"), 0),
            ("", "DELETE /api/v3/a | PRIVATE-TOKEN: t", format!("DELETE /api/v3/a {t}|"), 0),
            (
                "",
                "PUT /api/v3/a | PRIVATE-TOKEN: t | Content-Type: Application/JSON;charset=UTF-8 | Content-Length: 7",
                format!("PUT /api/v3/a Content-Type: application/json; charset=UTF-8|{t}Content-Length: 7||"),
                0,
            ),
            (
                "",
                "PUT /api/v3/a | PRIVATE-TOKEN: t | Content-Type: image/png | Transfer-Encoding: chunked | Expect: 100-continue",
                format!("PUT /api/v3/a Content-Type: image/png|{t}Transfer-Encoding: chunked|Expect: 100-continue||"),
                0,
            ),
            (
                "",
                "GET /api/v3/a | PRIVATE-TOKEN: t | Connection: Upgrade | Upgrade: websocket",
                format!("GET /api/v3/a {t}Connection: Upgrade|Upgrade: websocket||"),
                0,
            ),
            (
                "[token]\nmethod_override = \"judge\"",
                "POST /api/v3/a | PRIVATE-TOKEN: t | X-HTTP-Method-Override: DELETE",
                format!("POST /api/v3/a X-HTTP-Method-Override: DELETE|{t}Content-Length: 0||"),
                0,
            ),
            // Traces and certificates.
            (
                "",
                &format!("GET /api/v3/a | PRIVATE-TOKEN: t | {trace} | tracestate: a=b"),
                format!("GET /api/v3/a {t}{trace}|tracestate: a=b||"),
                0,
            ),
            ("", "GET /api/v3/a | PRIVATE-TOKEN: t | tracestate: a=b", format!("GET /api/v3/a {t}|"), 0),
            (
                "",
                "GET /api/v3/a | PRIVATE-TOKEN: t | X-Tls: 1",
                format!("GET /api/v3/a X-Tls: 1|{t}X-Tollgate-Client-Certificate: CN=a||"),
                0,
            ),
        ] {
            // Every text ends with the empty line; some of them end with a field in front of it.
            let expected = expected.replace("||", "|").trim_end_matches('|').to_owned();
            let (text, count) = sent(config, request, &["api", "read"]);
            assert!(text.ends_with("||") || text.ends_with(" |"), "{text}");
            if (text.trim_end_matches('|'), count) != (expected.as_str(), dropped) {
                wrong.push((request.to_owned(), text, count, expected, dropped));
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
        assert!(!sent("[token]\nforward = \"both\"", "GET /api/v3/a | PRIVATE-TOKEN: t", &[]).0.contains("Scopes"));
    }

    #[test]
    fn what_a_route_may_change_of_a_head() {
        let parts = "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n[[store]]\nkind = \"file\"\npath = \"t.toml\"\n";
        let settings = parse(parts, "/nonexistent/tollgate.toml".as_ref(), Probe::Settings).unwrap();
        let mut route = crate::request::route::Route::new("/".parse().unwrap(), "/".into());
        for (name, why) in [
            ("X-Site", None),
            ("private-token", Some("carries the token")),
            ("Content-Language", Some("says how the body is to be read")),
            ("X-Original-URL", Some("chooses a path or a user")),
            ("Cookie", Some("has a key of its own in [token]")),
            ("Authorization", Some("has a key of its own in [token]")),
            ("traceparent", Some("has a key of its own: [trace] context")),
            ("TraceState", Some("has a key of its own: [trace] context")),
            ("Host", Some("is written or judged by tollgate")),
            ("X-Tollgate-User", Some("is written or judged by tollgate")),
        ] {
            route.request_headers.remove = vec![name.to_owned()];
            let problems = settings.forward.problems_of(&route);
            assert_eq!(problems.len(), usize::from(why.is_some()), "{name}");
            assert!(why.is_none_or(|why| format!("{problems:?}").contains(why)), "{name}: {problems:?}");
        }
    }
}
