//! What a request is to every stage: borrowed bytes in the order they came. Knows no header map, no framework and no
//! configuration, so that any lane can make one, from raw slices or from a parsed request alike.

use smallvec::SmallVec;

/// The request as the client sent it, checked for form and nothing else.
#[derive(Debug)]
pub struct RequestView<'a> {
    pub method: Method,
    /// The method's own spelling, for the request line and the log.
    pub method_bytes: &'a [u8],
    /// Path and query in origin-form; `*` and an authority are left as they are for the stages to refuse.
    pub target: &'a [u8],
    pub version: Version,
    /// The value of Host, of legal form.
    pub host: &'a [u8],
    pub fields: Fields<'a>,
    pub body: Framing,
    /// Whether the client lets the connection live on after this exchange.
    pub keep_alive: bool,
    /// The client waits for `100 Continue` before it sends the body.
    pub expects_continue: bool,
    /// A WebSocket handshake: GET, HTTP/1.1, no body, `Connection: upgrade` and `Upgrade: websocket`.
    pub websocket: bool,
}

/// A request seldom has more fields than this; the rest go to the heap.
pub type Fields<'a> = SmallVec<[Field<'a>; 24]>;

#[derive(Clone, Copy)]
pub struct Field<'a> {
    pub name: &'a [u8],
    pub value: &'a [u8],
    pub kind: FieldKind,
}

impl std::fmt::Debug for Field<'_> {
    /// A value may be a credential: only the name and the kind are printed.
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

    /// The name, and `other` for what is not forwarded: a client must not be able to mint label values.
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

/// How the end of the request's body is known. There is no third way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    Empty,
    Length(u64),
    Chunked,
}

/// What a field is to a gateway, told from its name once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldKind {
    /// The client's and the backend's own business: forwarded as it is.
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
    /// X-Forwarded-For, the one that a trusted proxy may hand over as a list.
    ForwardedFor,
    ForwardedProto,
    ForwardedHost,
    ForwardedPort,
    /// Every other way to say where a request came from: Forwarded, X-Real-IP, other X-Forwarded-*.
    Forwarded,
    RequestId,
    Sudo,
    /// JOB-TOKEN, DEPLOY-TOKEN, BUILD-TOKEN: credentials of other kinds.
    OtherToken,
    /// X-HTTP-Method-Override and its kin: another method than the one judged.
    MethodOverride,
    /// X-Tollgate-*: ours to say, never the client's.
    Identity,
    /// Headers that only a server behind the gateway may say to another: X-Sendfile-Type, X-Accel-*, Gitlab-Workhorse*.
    Internal,
    /// A name with a byte other than a letter, a digit or `-`. CGI folds `_` (and some servers `.`) into `-`, so the
    /// backend could read it as any other header: never forwarded.
    Alias,
}

impl FieldKind {
    pub(crate) fn of(name: &[u8]) -> Self {
        use FieldKind as K;
        if !name.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'-') {
            return K::Alias;
        }
        let is = |known: &str| name.eq_ignore_ascii_case(known.as_bytes());
        let starts =
            |prefix: &str| name.get(..prefix.len()).is_some_and(|head| head.eq_ignore_ascii_case(prefix.as_bytes()));
        // The first letter decides which few names are worth comparing.
        match name.first().map_or(0, u8::to_ascii_lowercase) {
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
            b'g' if starts("gitlab-workhorse") => K::Internal,
            b'h' if is("host") => K::Host,
            b'h' if is("http2-settings") => K::HopByHop,
            b'j' if is("job-token") => K::OtherToken,
            b'k' if is("keep-alive") => K::HopByHop,
            b'o' if is("origin") => K::Origin,
            // `Proxy` becomes HTTP_PROXY for a CGI program.
            b'p' if starts("proxy-") || is("proxy") => K::HopByHop,
            b's' if is("sudo") => K::Sudo,
            b't' if is("transfer-encoding") => K::TransferEncoding,
            b't' if is("te") || is("trailer") => K::HopByHop,
            b't' if is("true-client-ip") => K::Forwarded,
            b'u' if is("upgrade") => K::Upgrade,
            b'x' if starts("x-forwarded-") => match () {
                () if is("x-forwarded-for") => K::ForwardedFor,
                () if is("x-forwarded-proto") => K::ForwardedProto,
                () if is("x-forwarded-host") => K::ForwardedHost,
                () if is("x-forwarded-port") => K::ForwardedPort,
                () => K::Forwarded,
            },
            b'x' if is("x-request-id") => K::RequestId,
            b'x' if starts("x-tollgate-") => K::Identity,
            b'x' if is("x-real-ip") || is("x-client-ip") || is("x-cluster-client-ip") => K::Forwarded,
            b'x' if is("x-http-method-override") || is("x-http-method") || is("x-method-override") => K::MethodOverride,
            b'x' if is("x-sendfile-type") || starts("x-accel-") => K::Internal,
            _ => K::EndToEnd,
        }
    }
}
