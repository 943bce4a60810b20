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
}
