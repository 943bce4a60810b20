//! The request as every stage sees it: borrowed bytes in the order received. Knows no header map, no framework and no
//! configuration, so that any lane can build one, from raw slices or from a parsed request.

use smallvec::SmallVec;

/// The request as the client sent it, checked for its form only.
#[derive(Debug)]
pub struct RequestView<'a> {
    pub method: Method,
    /// The method's own spelling, for the request line and the log.
    pub method_bytes: &'a [u8],
    /// Path and query in origin-form; `*` and authority-form are kept for the stages to refuse.
    pub target: &'a [u8],
    pub version: Version,
    /// The value of Host, checked for its form.
    pub host: &'a [u8],
    pub fields: Fields<'a>,
    pub body: Framing,
    /// Whether the client allows the connection to be reused after this exchange.
    pub keep_alive: bool,
    /// The client waits for `100 Continue` before it sends the body.
    pub expects_continue: bool,
    /// A WebSocket handshake: GET, HTTP/1.1, no body, `Connection: upgrade` and `Upgrade: websocket`.
    pub websocket: bool,
}

/// Few requests have more fields than this; longer lists move to the heap.
pub type Fields<'a> = SmallVec<[Field<'a>; 24]>;

#[derive(Clone, Copy)]
pub struct Field<'a> {
    pub name: &'a [u8],
    pub value: &'a [u8],
    pub kind: FieldKind,
}

impl std::fmt::Debug for Field<'_> {
    /// A value may be a credential, so only the name and the kind are printed.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({:?})", String::from_utf8_lossy(self.name), self.kind)
    }
}

impl<'a> RequestView<'a> {
    pub fn path(&self) -> &'a [u8] {
        split_target(self.target).0
    }

    pub fn query(&self) -> Option<&'a [u8]> {
        split_target(self.target).1
    }

    pub fn fields_of(&self, kind: FieldKind) -> impl Iterator<Item = &Field<'a>> {
        self.fields.iter().filter(move |field| field.kind == kind)
    }
}

/// A target's path, and its query when there is a `?`.
pub fn split_target(target: &[u8]) -> (&[u8], Option<&[u8]>) {
    match memchr::memchr(b'?', target) {
        Some(at) => (&target[..at], Some(&target[at + 1..])),
        None => (target, None),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    Get,
    Head,
    Post,
    Put,
    Patch,
    Delete,
    Options,
    /// Anything else, CONNECT and TRACE included: never forwarded.
    Other,
}

impl Method {
    pub const FORWARDED: [Self; 7] =
        [Self::Get, Self::Head, Self::Post, Self::Put, Self::Patch, Self::Delete, Self::Options];

    pub fn of(name: &[u8]) -> Self {
        match name {
            b"GET" => Self::Get,
            b"HEAD" => Self::Head,
            b"POST" => Self::Post,
            b"PUT" => Self::Put,
            b"PATCH" => Self::Patch,
            b"DELETE" => Self::Delete,
            b"OPTIONS" => Self::Options,
            _ => Self::Other,
        }
    }

    /// The name, or `other` for methods that are not forwarded: a client must not be able to create metric label
    /// values.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Head => "HEAD",
            Self::Post => "POST",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
            Self::Delete => "DELETE",
            Self::Options => "OPTIONS",
            Self::Other => "other",
        }
    }

    pub const fn index(self) -> usize {
        self as usize
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    Http10,
    Http11,
}

/// How the end of the request's body is determined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    Empty,
    Length(u64),
    Chunked,
}

impl Framing {
    /// Unread bodies up to this size are skipped, so that the connection can be reused.
    const MOST_SKIPPED: u64 = 64 * 1024;

    /// Whether an unread body can be skipped so that the next request can be read.
    pub const fn can_be_skipped(self, expects_continue: bool) -> bool {
        match self {
            Self::Empty => true,
            // A client that waits for 100 may send the body or not: what comes next can't be told.
            Self::Length(length) => !expects_continue && length <= Self::MOST_SKIPPED,
            Self::Chunked => false,
        }
    }
}

/// What a header field means to the gateway, classified once by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldKind {
    /// Meant for the backend: forwarded unchanged.
    EndToEnd,
    Host,
    ContentLength,
    TransferEncoding,
    Connection,
    /// Named by the RFCs as ending at the next hop: Keep-Alive, Proxy-*, TE, Trailer, HTTP2-Settings.
    HopByHop,
    Upgrade,
    Expect,
    Authorization,
    Cookie,
    ContentType,
    Origin,
    PreflightMethod,
    /// X-Forwarded-For: a list, which a trusted proxy may send in several lines.
    ForwardedFor,
    ForwardedProto,
    ForwardedHost,
    ForwardedPort,
    /// Every other field that states where a request came from: Forwarded, X-Real-IP, other X-Forwarded-*.
    Forwarded,
    RequestId,
    /// W3C Trace Context.
    TraceParent,
    TraceState,
    Sudo,
    /// JOB-TOKEN, DEPLOY-TOKEN, BUILD-TOKEN: credentials of other kinds.
    OtherToken,
    /// X-HTTP-Method-Override and similar: a method other than the one in the request line.
    MethodOverride,
    /// X-Tollgate-*: set by tollgate only, never accepted from a client.
    Identity,
    /// Headers used between servers behind the gateway: X-Sendfile-Type, X-Accel-*, Gitlab-Workhorse*.
    Internal,
    /// Some backends take a path, host, method or user from it, which would not be the one that was judged here.
    PathOrUser,
    /// A name with a byte other than a letter, a digit or `-`. CGI folds `_` (and some servers `.`) into `-`, so the
    /// backend could read it as any other header: never forwarded.
    Alias,
}

/// Letters, digits and `-`. A table, because every byte of every field name is looked up.
const PLAIN: [bool; 256] = {
    let mut plain = [false; 256];
    let mut byte = 0;
    while byte < plain.len() {
        plain[byte] = (byte as u8).is_ascii_alphanumeric() || byte as u8 == b'-';
        byte += 1;
    }
    plain
};

impl FieldKind {
    pub(crate) fn of(name: &[u8]) -> Self {
        use FieldKind as K;
        if !name.iter().all(|b| PLAIN[usize::from(*b)]) {
            return K::Alias;
        }
        let is = |known: &str| is(name, known);
        // The first letter selects the few names to compare with.
        let kind = match name.first().map_or(0, u8::to_ascii_lowercase) {
            b'a' if is("authorization") => K::Authorization,
            b'a' if is("access-control-request-method") => K::PreflightMethod,
            b'b' if is("build-token") => K::OtherToken,
            b'c' if is("connection") => K::Connection,
            b'c' if is("content-length") => K::ContentLength,
            b'c' if is("content-type") => K::ContentType,
            b'c' if is("cookie") => K::Cookie,
            b'c' if is("client-ip") || is("cf-connecting-ip") => K::Forwarded,
            b'd' if is("deploy-token") => K::OtherToken,
            b'e' if is("expect") => K::Expect,
            b'f' if is("forwarded") => K::Forwarded,
            b'g' if starts(name, "gitlab-workhorse") => K::Internal,
            b'h' if is("host") => K::Host,
            b'h' if is("http2-settings") => K::HopByHop,
            b'j' if is("job-token") => K::OtherToken,
            b'k' if is("keep-alive") => K::HopByHop,
            b'o' if is("origin") => K::Origin,
            // `Proxy` becomes HTTP_PROXY for a CGI program.
            b'p' if starts(name, "proxy-") || is("proxy") => K::HopByHop,
            b's' if is("sudo") => K::Sudo,
            b't' if is("transfer-encoding") => K::TransferEncoding,
            b't' if is("te") || is("trailer") => K::HopByHop,
            b't' if is("true-client-ip") => K::Forwarded,
            b't' if is("traceparent") => K::TraceParent,
            b't' if is("tracestate") => K::TraceState,
            b'u' if is("upgrade") => K::Upgrade,
            b'x' => Self::of_x(name),
            _ => K::EndToEnd,
        };
        if kind == K::EndToEnd && chooses_path_or_user(name) { K::PathOrUser } else { kind }
    }

    /// The same for names that begin with `X-`, selected by the letter after it.
    fn of_x(name: &[u8]) -> Self {
        use FieldKind as K;
        let is = |known: &str| is(name, known);
        let starts = |prefix: &str| starts(name, prefix);
        match name.get(2).map_or(0, u8::to_ascii_lowercase) {
            b'a' if starts("x-accel-") => K::Internal,
            b'c' if is("x-client-ip") || is("x-cluster-client-ip") => K::Forwarded,
            b'f' if starts("x-forwarded-") => match () {
                () if is("x-forwarded-for") => K::ForwardedFor,
                () if is("x-forwarded-proto") => K::ForwardedProto,
                () if is("x-forwarded-host") => K::ForwardedHost,
                () if is("x-forwarded-port") => K::ForwardedPort,
                () if is("x-forwarded-user") || is("x-forwarded-email") || is("x-forwarded-groups") => K::PathOrUser,
                () if is("x-forwarded-preferred-username") || is("x-forwarded-login") => K::PathOrUser,
                () => K::Forwarded,
            },
            b'h' if is("x-http-method-override") || is("x-http-method") => K::MethodOverride,
            b'm' if is("x-method-override") => K::MethodOverride,
            b'r' if is("x-request-id") => K::RequestId,
            b'r' if is("x-real-ip") => K::Forwarded,
            b's' if is("x-sendfile-type") => K::Internal,
            b't' if starts("x-tollgate-") => K::Identity,
            _ => K::EndToEnd,
        }
    }
}

fn is(name: &[u8], known: &str) -> bool {
    name.eq_ignore_ascii_case(known.as_bytes())
}

fn starts(name: &[u8], prefix: &str) -> bool {
    name.get(..prefix.len()).is_some_and(|head| head.eq_ignore_ascii_case(prefix.as_bytes()))
}

/// Whether some known backend, framework or login proxy takes a path, host, method or user from a field of this name.
fn chooses_path_or_user(name: &[u8]) -> bool {
    let (rest, known) = match name {
        [b'x' | b'X', b'-', rest @ ..] => (rest, choosing_behind_x(rest)),
        _ => (name, choosing(name)),
    };
    known.iter().any(|known| match known.strip_suffix('*') {
        Some(prefix) => starts(rest, prefix),
        None => is(rest, known),
    })
}

/// The known names with the same first letter as this one. A `*` at the end matches any suffix.
const fn choosing(name: &[u8]) -> &'static [&'static str] {
    let [first, ..] = name else { return &[] };
    match first.to_ascii_lowercase() {
        // Django's documentation of its RemoteUserMiddleware.
        b'a' => &["authuser", "auth-user"],
        b'b' => &["base-url"],
        // RFC 9440; Cloudflare Access.
        b'c' => &["client-cert*", "cf-access-*"],
        // Shibboleth; Elasticsearch.
        b'e' => &["eppn", "es-security-runas-user"],
        // Exchange, and products that adopted it.
        b'f' => &["front-end-https"],
        b'h' => &["http-url"],
        // Kubernetes; IBM WebSEAL.
        b'i' => &["impersonate-*", "iv-user", "iv-groups", "iv-creds"],
        // Oracle's login servers; mod_auth_openidc.
        b'o' => &["oam-*", "osso-*", "oidc-*"],
        // Authelia, and software that sets REMOTE_USER from a field.
        b'r' => &["remote-*", "request-uri", "request-url"],
        // Client certificates as forwarded by TLS servers; SiteMinder, Spring's default; Shibboleth.
        b's' => &["ssl-*", "sm-*", "smuser", "shib-*", "script-name"],
        b't' => &["tailscale-*"],
        _ => &[],
    }
}

/// The same for the part after `X-`.
const fn choosing_behind_x(rest: &[u8]) -> &'static [&'static str] {
    let [first, ..] = rest else { return &[] };
    match first.to_ascii_lowercase() {
        // oauth2-proxy, Keycloak's gatekeeper, CouchDB, Kong, authentik, Amazon's and Google's gateways, IIS.
        b'a' => &[
            "auth-request-*",
            "auth-user*",
            "auth-email",
            "auth-name",
            "auth-group*",
            "auth-role*",
            "auth-subject",
            "auth-remote-user",
            "auth-couchdb-*",
            "authenticated*",
            "authentik-*",
            "anonymous-consumer",
            "amzn-oidc-*",
            "amzn-mtls-*",
            "apigateway-api-userinfo",
            "arr-clientcert",
            "arr-ssl",
        ],
        b'b' => &["backend-host", "backend-url"],
        // Kong; Puppet and others that read a client certificate from a field.
        b'c' => &[
            "consumer-*",
            "credential-*",
            "client-cert*",
            "clientcert*",
            "client-dn",
            "client-verify",
            "client-s-dn",
            "client-i-dn",
        ],
        b'd' => &["destination-url"],
        // Envoy; Google's Extensible Service Proxy.
        b'e' => &["envoy-original-*", "endpoint-api-userinfo", "email"],
        // Google's Identity-Aware Proxy.
        b'g' => &["goog-authenticated-*", "goog-iap-jwt-assertion", "grafana-user"],
        // IIS's rewriting modules, and products that adopted their names.
        b'h' => &["http-*", "host", "host-override"],
        b'i' => &["impersonate*", "invoke-*"],
        b'j' => &["jwt-assertion", "jwt-payload"],
        b'l' => &["login"],
        // Next.js, where the second one skips the middleware; Azure's login.
        b'm' => &["matched-path", "middleware-*", "ms-client-principal*", "ms-token-*"],
        b'n' => &["now-route-matches"],
        // Symfony, Zend, IIS, Drupal, nginx's examples of auth_request: -URL, -URI, -Path, -Host, -Method.
        b'o' => &["original-*", "override-*"],
        // Pomerium; mod_wsgi's documentation; NiFi; Presto.
        b'p' => &["pomerium-*", "proxy-*", "proxiedentitieschain", "path-info", "presto-user"],
        // Rewriters; Jenkins, Kubernetes and others that take REMOTE_USER from a field; Traefik.
        b'r' => &["rewrite-*", "remote-*", "request-uri", "request-url", "replaced-path"],
        b's' => &["ssl-*", "sso-*", "scheme", "script-name"],
        b't' => &["tls-client-*", "trusted-*", "trino-user"],
        // Oathkeeper, APISIX, and services behind gateways in general.
        b'u' => &[
            "user",
            "user-id",
            "user-name",
            "user-email",
            "user-login",
            "user-role*",
            "user-group*",
            "username",
            "userid",
            "userinfo",
            "uri",
            "url-scheme",
        ],
        b'v' => &["verified-user"],
        // Grafana, Gitea.
        b'w' => &["webauth-*"],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_by_which_a_backend_chooses() {
        for name in [
            "X-Original-URL",
            "x-original-uri",
            "X-ORIGINAL-HOST",
            "X-Original-Method",
            "X-Rewrite-URL",
            "X-Override-URL",
            "X-HTTP-DestinationURL",
            "X-HTTP-Path-Override",
            "X-HTTP-Host-Override",
            "X-Host",
            "X-Script-Name",
            "Request-URI",
            "X-Matched-Path",
            "X-Middleware-Subrequest",
            "X-Envoy-Original-Path",
            "X-Replaced-Path",
            "X-Proxy-URL",
            "X-Scheme",
            "Remote-User",
            "REMOTE-GROUPS",
            "X-Remote-User",
            "X-Remote-Group",
            "X-Remote-Extra-Scopes",
            "X-Forwarded-User",
            "X-Forwarded-Email",
            "X-Auth-Request-User",
            "X-Auth-Request-Access-Token",
            "X-Auth-Username",
            "X-WebAuth-User",
            "X-WEBAUTH-EMAIL",
            "X-Authenticated-User",
            "X-Authenticated-Userid",
            "X-Authentik-Username",
            "X-Consumer-Username",
            "X-Credential-Identifier",
            "X-Goog-Authenticated-User-Email",
            "X-Amzn-Oidc-Identity",
            "X-MS-Client-Principal-Name",
            "X-User",
            "X-Userinfo",
            "X-Trusted-User",
            "X-SSO-User",
            "Impersonate-User",
            "Impersonate-Extra-x",
            "Authuser",
            "SM-User",
            "iv-user",
            "OAM-Remote-User",
            "Tailscale-User-Login",
            "Cf-Access-Authenticated-User-Email",
            "Shib-Session-Id",
            "X-SSL-Client-Cert",
            "X-SSL-Client-Verify",
            "SSL-Client-S-DN",
            "SSL-CLIENT-CERT",
            "Client-Cert",
            "Client-Cert-Chain",
            "X-Client-Cert",
            "X-Client-DN",
            "X-Client-Verify",
            "X-TLS-Client-Cert",
            "X-ARR-ClientCert",
            "es-security-runas-user",
        ] {
            assert_eq!(FieldKind::of(name.as_bytes()), FieldKind::PathOrUser, "{name}");
        }
        for name in [
            "Accept",
            "Accept-Language",
            "User-Agent",
            "Range",
            "If-None-Match",
            "Referer",
            "Cache-Control",
            "Pragma",
            "DNT",
            "Sec-Fetch-Mode",
            "Sec-WebSocket-Key",
            "X-Requested-With",
            "X-CSRF-Token",
            "X-User-Agent",
            "X-Client-Version",
            "X-Client-Id",
            "X-Client-Data",
            "X-Auth-Token",
            "X-Gitlab-Event",
            "X-Trace",
            "X-B3-TraceId",
            "X-Correlation-ID",
            "X-Hub-Signature",
            "X-Atlassian-Token",
            "X",
            "X-",
            "R",
            "Remote",
            "Origin-Agent-Cluster",
            "Prefer",
            "Priority",
            "Signature",
            "Save-Data",
            "Service-Worker",
            "Upload-Offset",
            "Content-Disposition",
            "Content-MD5",
        ] {
            assert_eq!(FieldKind::of(name.as_bytes()), FieldKind::EndToEnd, "{name}");
        }
        for (name, kind) in [
            ("TraceParent", FieldKind::TraceParent),
            ("tracestate", FieldKind::TraceState),
            ("x-HTTP-Method-Override", FieldKind::MethodOverride),
            ("X-HTTP-Method", FieldKind::MethodOverride),
            ("X-Method-Override", FieldKind::MethodOverride),
            ("X-Forwarded-Prefix", FieldKind::Forwarded),
            ("X-Real-IP", FieldKind::Forwarded),
            ("X-Client-IP", FieldKind::Forwarded),
            ("X-Cluster-Client-IP", FieldKind::Forwarded),
            ("X-Accel-Redirect", FieldKind::Internal),
            ("X-Sendfile-Type", FieldKind::Internal),
            ("X-Tollgate-User", FieldKind::Identity),
            ("X-Request-Id", FieldKind::RequestId),
            ("X_Original_URL", FieldKind::Alias),
        ] {
            assert_eq!(FieldKind::of(name.as_bytes()), kind, "{name}");
        }
    }

    #[test]
    fn every_name_has_its_kind_in_any_letter_case() {
        use FieldKind as K;
        let mut seen = 0;
        for (names, kind) in [
            ("Authorization", K::Authorization),
            ("Access-Control-Request-Method", K::PreflightMethod),
            ("Build-Token JOB-TOKEN Deploy-Token", K::OtherToken),
            ("Connection", K::Connection),
            ("Content-Length", K::ContentLength),
            ("Content-Type", K::ContentType),
            ("Cookie", K::Cookie),
            ("Client-IP CF-Connecting-IP Forwarded True-Client-IP X-Client-IP X-Cluster-Client-IP", K::Forwarded),
            ("X-Forwarded-Server X-Forwarded- X-Real-IP", K::Forwarded),
            ("Expect", K::Expect),
            ("Gitlab-Workhorse Gitlab-Workhorse-Api-Request X-Accel-Redirect X-Sendfile-Type", K::Internal),
            ("Host", K::Host),
            ("HTTP2-Settings Keep-Alive Proxy Proxy-Connection Proxy-Authorization TE Trailer", K::HopByHop),
            ("Origin", K::Origin),
            ("Sudo", K::Sudo),
            ("Transfer-Encoding", K::TransferEncoding),
            ("traceparent", K::TraceParent),
            ("tracestate", K::TraceState),
            ("Upgrade", K::Upgrade),
            ("X-Forwarded-For", K::ForwardedFor),
            ("X-Forwarded-Proto", K::ForwardedProto),
            ("X-Forwarded-Host", K::ForwardedHost),
            ("X-Forwarded-Port", K::ForwardedPort),
            ("X-Forwarded-User X-Forwarded-Email X-Forwarded-Groups", K::PathOrUser),
            ("X-Forwarded-Preferred-Username X-Forwarded-Login", K::PathOrUser),
            ("X-HTTP-Method-Override X-HTTP-Method X-Method-Override", K::MethodOverride),
            ("X-Request-Id", K::RequestId),
            ("X-Tollgate-User X-Tollgate-", K::Identity),
            ("Proxied Gitlab-Work X-Accel XX-Forwarded-For X-Tollgate Hosts Costs Te-a Xa-Real-IP", K::EndToEnd),
            ("Content_Length X.Forwarded.For Host_ X_Tollgate_User", K::Alias),
        ] {
            for name in names.split(' ') {
                for spelled in [name.to_owned(), name.to_lowercase(), name.to_uppercase()] {
                    assert_eq!(FieldKind::of(spelled.as_bytes()), kind, "{spelled}");
                }
                seen += 1;
            }
        }
        assert_eq!(seen, 65);
    }
}
