//! The request that another proxy holds and asks about. The proxy forwards it by itself, so nothing can be taken out of it,
//! bounded or read here: what would have to be is refused. Pure. It must never guess which proxy asks, or what a field that is
//! missing or doubled would have said.

use super::query::{self, Key};
use super::view::{Field, FieldKind, Framing, Method, RequestView};
use super::{RequestFault, Rules, head};

/// Which proxy asks, and so where it says what it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VerdictSource {
    /// `auth_request`, with X-Original-Method, X-Original-URI and X-Original-Host as docs/verdict.md has them.
    Nginx,
    /// `forward_auth` of Caddy and Traefik: X-Forwarded-Method, -Uri, -Host, -Proto and -For, which they write themselves.
    Forwarded,
    /// `ext_authz` of Envoy: the method, path and host of the request that asks are the client's own.
    Envoy,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerdictRules {
    pub source: VerdictSource,
    /// With [`VerdictSource::Envoy`]: what it writes in front of the path.
    pub path_prefix: String,
}

/// Why there is no verdict on what a proxy asks about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VerdictFault {
    /// A field that has to say what is asked for is not there, or is there twice.
    Field,
    /// It says something that is no method, target or host.
    Value,
    /// The request that asks has a body.
    Body,
    /// The client sent a field that would be removed if the request came through here.
    Strange,
    /// The query would be changed if the request came through here: page parameters are out of bounds.
    Change,
}

/// What is asked for.
struct Wording<'a> {
    method: &'a [u8],
    target: &'a [u8],
    host: &'a [u8],
}

const NGINX: [&str; 3] = ["X-Original-Method", "X-Original-URI", "X-Original-Host"];
const FORWARDED: [&str; 5] =
    ["X-Forwarded-Method", "X-Forwarded-Uri", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-For"];

/// Fields that every permission has, so that the proxy overwrites a client's.
pub const OVERWRITTEN: [&str; 4] =
    ["X-Tollgate-User", "X-Tollgate-Token-Id", "X-Tollgate-Scopes", "X-Tollgate-Client-Certificate"];

impl VerdictRules {
    /// The request that is asked about, as the pipeline judges it. Its body is not seen.
    pub fn asked<'a>(&self, view: &RequestView<'a>, rules: &Rules) -> Result<RequestView<'a>, RequestFault> {
        let Wording { method, target, host } = self.question(view).map_err(RequestFault::Verdict)?;
        if view.body != Framing::Empty {
            return Err(RequestFault::Verdict(VerdictFault::Body));
        }
        if view.fields.iter().any(|field| self.is_strange(field, rules)) {
            return Err(RequestFault::Verdict(VerdictFault::Strange));
        }
        let asked = RequestView {
            method: Method::of(method),
            method_bytes: method,
            target,
            version: view.version,
            host,
            fields: view.fields.clone(),
            body: Framing::Empty,
            keep_alive: view.keep_alive,
            expects_continue: false,
            websocket: false,
        };
        let scan = query::scan(asked.query().unwrap_or_default(), &rules.names);
        // It would go on to the backend, and into its log.
        if scan.params.iter().any(|param| param.key == Key::Token) {
            return Err(RequestFault::QueryToken);
        }
        Ok(asked)
    }

    fn question<'a>(&self, view: &RequestView<'a>) -> Result<Wording<'a>, VerdictFault> {
        let (method, target, host) = match self.source {
            VerdictSource::Nginx => {
                let [method, target, host] = NGINX.map(|name| only(view, name));
                (method?, target?, host?)
            }
            VerdictSource::Forwarded => {
                let [method, target, host, scheme, client] = FORWARDED.map(|name| only(view, name));
                // Read with the origin.
                scheme.and(client)?;
                (method?, target?, host?)
            }
            VerdictSource::Envoy => {
                let target = view.target.strip_prefix(self.path_prefix.as_bytes()).ok_or(VerdictFault::Value)?;
                (view.method_bytes, target, view.host)
            }
        };
        let is_token = !method.is_empty() && method.iter().all(u8::is_ascii_uppercase);
        if !is_token || !target.starts_with(b"/") || !head::is_host(host) {
            return Err(VerdictFault::Value);
        }
        Ok(Wording { method, target, host })
    }

    /// Whether a field of the client's would not reach the backend if the request came through here, and could mean something to it.
    fn is_strange(&self, field: &Field<'_>, rules: &Rules) -> bool {
        let asks = match self.source {
            VerdictSource::Nginx => &NGINX[..],
            VerdictSource::Forwarded => &FORWARDED,
            VerdictSource::Envoy => &[],
        };
        let is_one_of = |names: &[&str]| names.iter().any(|name| field.name.eq_ignore_ascii_case(name.as_bytes()));
        let kind = match field.kind {
            // Backends that take it for another name take it for this one.
            FieldKind::Alias => {
                let plain = |b: &u8| if b.is_ascii_alphanumeric() { *b } else { b'-' };
                let folded: Vec<u8> = field.name.iter().map(plain).collect();
                let kind = FieldKind::of(&folded);
                let is_token = folded.eq_ignore_ascii_case(rules.token.header.as_bytes());
                return is_token || kind != FieldKind::EndToEnd;
            }
            kind => kind,
        };
        match kind {
            FieldKind::Identity => !is_one_of(&OVERWRITTEN),
            FieldKind::PathOrUser => !rules.switches.path_and_user_headers && !is_one_of(asks),
            FieldKind::OtherToken => !rules.switches.job_token,
            FieldKind::Sudo => !rules.switches.sudo,
            FieldKind::Internal => true,
            _ => false,
        }
    }
}

/// The value of the one field of this name.
fn only<'a>(view: &RequestView<'a>, name: &str) -> Result<&'a [u8], VerdictFault> {
    let mut found = view.fields.iter().filter(|field| field.name.eq_ignore_ascii_case(name.as_bytes()));
    match (found.next(), found.next()) {
        (Some(field), None) if !field.value.is_empty() => Ok(field.value),
        _ => Err(VerdictFault::Field),
    }
}
