//! 4 WHERE AND HOW. Says what goes upstream, and writes its head: one request line, clean fields, one framing, one
//! credential. Pure. It must never forward a byte that decides who the backend acts for and that no stage has judged.

use crate::identity::Principal;
use crate::policy::Permit;
use crate::request::body::BodyScanner;
use crate::request::origin::{Origin, TrustedProxies};
use crate::request::page::Clamped;
use crate::request::query::Edits;
use crate::request::route::{Auth, Route};
use crate::request::seeded::{self, Rule};
use crate::request::token::{Presented, TokenRules, bearer, is_token_header};
use crate::request::view::{Field, FieldKind, Framing, Method, RequestView, Version};
use crate::request::{Examined, METHOD_OVERRIDE, Switches};
use smallvec::SmallVec;
use std::net::IpAddr;
use std::sync::Arc;

/// What is configured about forwarding.
#[derive(Clone, Debug)]
pub struct ForwardRules {
    pub credential: Credential,
    pub token: TokenRules,
    pub switches: Switches,
    pub trusted: TrustedProxies,
    /// Answer a query token with a `Deprecation` header.
    pub deprecate_query_token: bool,
}

/// What tells the backend who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Credential {
    /// The validated token, in the token header.
    Token,
    /// X-Tollgate-User, X-Tollgate-Token-Id and X-Tollgate-Scopes.
    Identity,
    Both,
    None,
}

/// Carries out a permit: what becomes of one request on its way upstream.
#[derive(Debug)]
pub struct Plan<'r> {
    pub route: &'r Route,
    /// The method that was judged.
    pub method: Method,
    /// It stands in X-HTTP-Method-Override.
    pub overridden: bool,
    auth: Auth,
    pub permit: Permit,
    pub presented: Option<Presented<'r>>,
    pub edits: Edits,
    pub clamped: Clamped,
    pub body: Option<BodyScanner>,
    content_type: Option<Vec<u8>>,
}

pub fn plan<'r>(permit: Permit, examined: Examined<'r>) -> Plan<'r> {
    let Examined {
        route,
        method,
        overridden,
        auth,
        presented,
        edits,
        clamped,
        asks_sudo: _,
        body,
        content_type,
        canonical: _,
    } = examined;
    Plan { route, method, overridden, auth, permit, presented, edits, clamped, body, content_type }
}

/// X-Request-Id as Rails takes it: letters, digits, `_` and `-`; longer ones are replaced.
pub fn request_id<'a>(view: &RequestView<'a>) -> Option<&'a str> {
    let mut ids = view.fields_of(FieldKind::RequestId);
    let id = ids.next().filter(|_| ids.next().is_none())?.value;
    let legal =
        (1..=128).contains(&id.len()) && id.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
    std::str::from_utf8(id).ok().filter(|_| legal)
}

impl Plan<'_> {
    /// Whether the token stands in the query string, where it leaks.
    pub fn from_query(&self) -> bool {
        self.presented.as_ref().is_some_and(|found| found.in_query)
    }

    /// Writes the request's head as the upstream gets it. Returns how many fields were dropped for their name.
    pub fn write_head(
        &self,
        view: &RequestView<'_>,
        rules: &ForwardRules,
        origin: &Origin<'_>,
        request_id: &str,
        out: &mut Vec<u8>,
    ) -> usize {
        out.extend_from_slice(view.method_bytes);
        out.push(b' ');
        if self.edits.is_empty() {
            out.extend_from_slice(view.target);
        } else {
            self.edits.write_target(view.path(), view.query(), out);
        }
        let version: &[u8] = if view.version == Version::Http10 { b" HTTP/1.0\r\n" } else { b" HTTP/1.1\r\n" };
        out.extend_from_slice(version);
        put(out, "Host", view.host);

        let nominated = nominated(view);
        let mut dropped = 0;
        // The type by which the body is judged, where the client spelled it in another way or gave none.
        if let Some(content_type) = &self.content_type {
            put(out, "Content-Type", content_type);
        }
        for field in &view.fields {
            if field.kind == FieldKind::ContentType && self.content_type.is_some() {
                continue;
            }
            // Connection can only take away what no stage has judged and tollgate does not write: without its
            // Content-Type, for one, a body would be read in another way than it was watched.
            let ends_here =
                field.kind == FieldKind::EndToEnd && nominated.iter().any(|name| name.eq_ignore_ascii_case(field.name));
            match self.passes(field, rules) {
                Passes::Yes if !ends_here => {
                    out.extend_from_slice(field.name);
                    out.extend_from_slice(b": ");
                    out.extend_from_slice(field.value);
                    out.extend_from_slice(b"\r\n");
                }
                Passes::NoAndCounted => dropped += 1,
                Passes::Yes | Passes::No => {}
            }
        }
        if self.overridden {
            // The backend must run the method that was judged.
            put(out, METHOD_OVERRIDE, self.method.as_str().as_bytes());
        }
        self.write_identity(rules, out);
        write_origin(origin, out);
        put(out, "X-Request-Id", request_id.as_bytes());
        match view.body {
            // A method that usually has a body says that it has none; other requests say nothing, as they came.
            Framing::Empty if matches!(view.method, Method::Post | Method::Put | Method::Patch) => {
                put(out, "Content-Length", b"0")
            }
            Framing::Empty => {}
            Framing::Length(length) => put(out, "Content-Length", length.to_string().as_bytes()),
            Framing::Chunked => put(out, "Transfer-Encoding", b"chunked"),
        }
        if view.expects_continue {
            put(out, "Expect", b"100-continue");
        }
        if view.websocket {
            out.extend_from_slice(b"Connection: Upgrade\r\nUpgrade: websocket\r\n");
        }
        out.extend_from_slice(b"\r\n");
        dropped
    }

    /// Whether a client's field goes on. Everything that says who asks, where from or how long is ours to write.
    fn passes(&self, field: &Field<'_>, rules: &ForwardRules) -> Passes {
        let passes_tokens = matches!(self.auth, Auth::None { pass_token: true });
        let web_page = self.route.is_web_page();
        let open = passes_tokens || web_page;
        let passes = match field.kind {
            FieldKind::Alias => return Passes::NoAndCounted,
            _ if is_token_header(field.name, &rules.token) => passes_tokens,
            FieldKind::EndToEnd | FieldKind::ContentType | FieldKind::Origin | FieldKind::PreflightMethod => true,
            FieldKind::Authorization => {
                let is_token = rules.token.bearer && bearer(field.value).is_some();
                if is_token { passes_tokens } else { open || rules.switches.authorization }
            }
            FieldKind::Cookie => open || rules.switches.cookies,
            FieldKind::OtherToken => passes_tokens || rules.switches.job_token,
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
            | FieldKind::Identity
            | FieldKind::Internal => false,
        };
        if passes { Passes::Yes } else { Passes::No }
    }

    fn write_identity(&self, rules: &ForwardRules, out: &mut Vec<u8>) {
        if let Some(presented) = &self.presented
            && matches!(rules.credential, Credential::Token | Credential::Both)
        {
            put(out, &rules.token.header, &presented.value);
        }
        if let Some(principal) = self.permit.principal()
            && matches!(rules.credential, Credential::Identity | Credential::Both)
        {
            put_text(out, "X-Tollgate-User", principal.user());
            put(out, "X-Tollgate-Token-Id", principal.token().as_str().as_bytes());
            if !principal.scopes().is_empty() {
                put_text(out, "X-Tollgate-Scopes", &principal.scopes().join(" "));
            }
        }
    }

    pub fn principal(&self) -> Option<&Arc<Principal>> {
        self.permit.principal()
    }
}

enum Passes {
    Yes,
    No,
    /// Some backend might read the name as a different one, or choose a path or a user by it.
    NoAndCounted,
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

fn write_origin(origin: &Origin<'_>, out: &mut Vec<u8>) {
    let mut separator: &[u8] = b"X-Forwarded-For: ";
    for ip in origin.chain() {
        out.extend_from_slice(separator);
        write_ip(ip, out);
        separator = b", ";
    }
    if separator == b", " {
        out.extend_from_slice(b"\r\n");
    }
    put(out, "X-Forwarded-Proto", origin.scheme().as_bytes());
    put(out, "X-Forwarded-Host", origin.host());
    put(out, "X-Forwarded-Port", origin.port());
}

fn write_ip(ip: IpAddr, out: &mut Vec<u8>) {
    use std::io::Write as _;
    // Writing to a Vec can't fail.
    drop(write!(out, "{ip}"));
}

fn put(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// Text from a store, which may hold anything: what is not visible ASCII is percent-encoded.
fn put_text(out: &mut Vec<u8>, name: &str, text: &str) {
    let mut value = Vec::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'%' | 0..=0x1f | 0x7f.. => value.extend_from_slice(format!("%{byte:02X}").as_bytes()),
            _ => value.push(byte),
        }
    }
    put(out, name, value.trim_ascii());
}
