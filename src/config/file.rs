//! The file: every section and key with its default. The comments here are the reference; `config/tollgate.example.toml`
//! is generated from them.

use super::section::{Bytes, Setting, Wrong, section, words, wrong};
use crate::edge::{Listen, ServerAddress};
use crate::request::route::Pattern;
use crate::request::view::Method;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use toml::de::DeValue;

section! {
    /// Where tollgate serves the API.
    Server {
        /// Addresses to listen on: `"address:port"`, or `"unix:/path"` for a socket file (mode 0660).
        listen: Vec<ListenAddress> = r#"["127.0.0.1:8080"]"#,
        /// Worker threads. 0 means one for each core.
        threads: u64 = "0",
        /// Networks of proxies in front of tollgate whose X-Forwarded-* headers are believed, like `"10.0.0.0/8"`, and
        /// `"unix"` for peers on a Unix socket. From everybody else these headers are dropped.
        trusted_proxies: Vec<Proxy> = "[]",
        /// How long requests in flight may take after SIGTERM. New ones get 503 meanwhile.
        shutdown_grace: Duration = r#""25s""#,
    }
}

section! {
    /// Metrics, health and reload, for the operator only.
    Admin {
        /// One address, which must not be reachable from outside, or "none". There is no password.
        listen: Option<ListenAddress> = r#""127.0.0.1:9090""#,
    }
}

section! {
    /// What tollgate is responsible for.
    Api {
        /// Everything at and under these paths needs a valid token; everything else is 404, unless a [[route]] says
        /// otherwise.
        prefixes: Vec<Prefix> = r#"["/api/v3"]"#,
        /// Let CORS preflights (OPTIONS with Origin and Access-Control-Request-Method) pass without a token, as
        /// browsers never send one with them.
        cors_preflight: bool = "false",
    }
}

section! {
    /// How a token comes in, and what the backend gets instead.
    Token {
        /// The header that carries the token; letter case does not matter.
        header: HeaderName = r#""PRIVATE-TOKEN""#,
        /// The query parameter that carries it.
        query: ParameterName = r#""private_token""#,
        /// Take `Authorization: Bearer TOKEN` as well. The Ruby client sends longer tokens this way.
        bearer: bool = "true",
        /// What happens to a request whose body has a field that Rack would take for a credential. There a body
        /// outranks query and header, so the backend would act for somebody that tollgate never checked. "refuse"
        /// looks into form, multipart and JSON bodies as they pass. "ignore" is for backends that read the token from
        /// the header alone.
        body: BodyPolicy = r#""refuse""#,
        /// What tells the backend who asks: "token" (the token header), "identity" (X-Tollgate-User,
        /// X-Tollgate-Token-Id, X-Tollgate-Scopes), "both" or "none".
        forward: Forward = r#""token""#,
        /// Acting as another user through `sudo` or SUDO: "refuse" (403) or "allow".
        sudo: Switch = r#""refuse""#,
        /// `access_token` and `bearer_token` parameters: "refuse" (401) or "allow".
        access_token: Switch = r#""refuse""#,
        /// `job_token` parameters: "refuse" (401) or "allow". With "refuse", JOB-TOKEN, DEPLOY-TOKEN and BUILD-TOKEN
        /// headers are taken out.
        job_token: Switch = r#""refuse""#,
        /// The Cookie header, in which a Rails session may hide: "strip" or "allow".
        cookies: Strip = r#""strip""#,
        /// Authorization headers that carry no token: "strip" or "allow".
        authorization: Strip = r#""strip""#,
        /// Answer requests that carry their token in the query with a `Deprecation` header.
        query_deprecation: bool = "false",
    }
}

section! {
    /// Where tokens are looked up. `tollgate token` writes there.
    Store {
        /// "sqlite" (made on first use) or "file" (TOML with SHA-256 digests, read again when it changes).
        kind: StoreKind = r#""sqlite""#,
        /// The file, relative to this configuration's folder.
        path: FilePath = r#""tollgate.db""#,
        /// How long a look-up may take.
        timeout: Duration = r#""2s""#,
    }
}

section! {
    /// How long an answer of the store is believed. Changes in the store take effect at once all the same.
    Cache {
        /// For valid tokens. Those in use are looked up anew in the background before their time is over.
        positive_ttl: Duration = r#""60s""#,
        /// For everything else.
        negative_ttl: Duration = r#""10s""#,
        /// How much longer a valid token is believed while the store can't be asked.
        stale_if_error: Duration = r#""10m""#,
        /// Valid tokens in memory, about 300 bytes each.
        positive_capacity: u64 = "100000",
        /// Invalid ones, in a space of their own, about 200 bytes each.
        negative_capacity: u64 = "100000",
    }
}

section! {
    /// Bounds for `page` and `per_page`, on GET and HEAD under the prefixes.
    Pagination {
        /// What stands for a `per_page` of zero, below zero, or that is no number.
        default_per_page: u64 = "20",
        /// The highest `per_page`, or "none".
        max_per_page: Option<u64> = "100",
        /// The lowest `page`.
        first_page: u64 = "1",
        /// The highest `page`, or "none".
        max_page: Option<u64> = r#""none""#,
        /// What happens to a `page` past it: "clamp" or "refuse" (400).
        beyond_max_page: Beyond = r#""clamp""#,
        /// Add `page` and `per_page` to requests that have none.
        inject_defaults: bool = "false",
    }
}

section! {
    /// Other bounds for some paths; the first entry that matches counts. What is not said is as in [pagination].
    PaginationRoute {
        /// A path pattern: `:name` is any one segment, a final `*` everything below.
        path: RoutePattern = r#"!"/""#,
        /// false: these paths have no pages, and nothing of theirs is changed.
        enabled: bool = "true",
        /// The lowest `page`.
        first_page: Inherited<u64> = r#""inherit""#,
        /// What stands for a `per_page` that is no good.
        default_per_page: Inherited<u64> = r#""inherit""#,
        /// The highest `per_page`, or "none".
        max_per_page: Inherited<Option<u64>> = r#""inherit""#,
    }
}

section! {
    /// What a client may take up.
    Limits {
        /// The head of a request; more is 431.
        header_bytes: Bytes = r#""32KiB""#,
        /// Path and query; more is 414.
        target_bytes: Bytes = r#""8KiB""#,
        /// A body, or "none"; more is 413.
        body_bytes: Option<Bytes> = r#""none""#,
        /// For the whole head of a request, from its first byte; longer is 408.
        header_timeout: Duration = r#""10s""#,
        /// For a connection without a request.
        idle_timeout: Duration = r#""75s""#,
    }
}

section! {
    /// A backend. Its servers are taken in turn. Requests go to the first one, unless their [[route]] names another.
    Upstream {
        /// Its name in metrics, logs and routes.
        name: String = r#"!"api""#,
        /// `"host:port"` or `"unix:/path"`. Names are resolved at start and at each reload.
        servers: Vec<UpstreamAddress> = "![]",
        /// For the connection; longer is tried on the next server, and then 504.
        connect_timeout: Duration = r#""2s""#,
        /// Between two pieces of an answer; longer is 504.
        read_timeout: Duration = r#""60s""#,
        /// How long an unused connection is kept. Must be below the backend's own keep-alive time (Puma's is 20s).
        idle_timeout: Duration = r#""15s""#,
    }
}

section! {
    /// A path with rules of its own. The narrowest pattern counts, wherever it stands in the file.
    Route {
        /// A path pattern: `:name` is any one segment, a final `*` everything below, `/` alone every path.
        path: RoutePattern = r#"!"/""#,
        /// For these methods only.
        methods: Vec<MethodName> = r#"["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]"#,
        /// "required", "optional" (no token: forwarded without one; a token that is there must be valid) or "none"
        /// (nothing is looked up, and tokens are taken out).
        auth: Auth = r#""required""#,
        /// Why these paths may be reached without a token. Needed for "optional" and "none"; `tollgate check` lists it.
        reason: String = r#""""#,
        /// Tokens in the query: "accept" or "refuse" (401).
        query_token: QueryToken = r#""accept""#,
        /// With auth = "none": leave tokens in, for a backend that checks them itself.
        pass_token: bool = "false",
        /// The [[upstream]] that serves it; empty for the first one.
        upstream: String = r#""""#,
    }
}

section! {
    /// What is written down. Tokens never are.
    Log {
        /// One JSON object a request: "stdout", "off", or a file (relative to this configuration's folder).
        access: String = r#""stdout""#,
        /// What tollgate says of itself, on stderr: "error", "warn" or "info".
        level: Level = r#""info""#,
    }
}

words! { BodyPolicy { Refuse = "refuse", Ignore = "ignore" } }
words! { Forward { Token = "token", Identity = "identity", Both = "both", None = "none" } }
words! { Switch { Refuse = "refuse", Allow = "allow" } }
words! { Strip { Strip = "strip", Allow = "allow" } }
words! { StoreKind { Sqlite = "sqlite", File = "file" } }
words! { Beyond { Clamp = "clamp", Refuse = "refuse" } }
words! { Auth { Required = "required", Optional = "optional", None = "none" } }
words! { QueryToken { Accept = "accept", Refuse = "refuse" } }
words! { Level { Error = "error", Warn = "warn", Info = "info" } }

macro_rules! settings {
    ($($(#[$doc:meta])* $name:ident($inner:ty) = $read:expr;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug)]
        pub(crate) struct $name(pub(crate) $inner);

        impl Setting for $name {
            fn read(value: &DeValue<'_>) -> Result<Self, Wrong> {
                let text = value.as_str().ok_or_else(|| wrong("must be a text in quotes", ""))?;
                let read: fn(&str) -> Result<$inner, Wrong> = $read;
                read(text).map(Self)
            }
        }
    )*};
}

settings! {
    ListenAddress(Listen) = |text| match text.strip_prefix("unix:") {
        Some(path) if path.starts_with('/') => Ok(Listen::Unix(path.into(), 0o660)),
        Some(_) => Err(wrong("a socket's path must be absolute", "like \"unix:/run/tollgate/api.sock\"")),
        None => match text.parse::<SocketAddr>() {
            Ok(_) => Ok(Listen::Tcp(text.into())),
            Err(_) => Err(wrong(format!("\"{text}\" is no address to listen on"), "like \"127.0.0.1:8080\", \"[::]:8080\" or \"unix:/path\"")),
        },
    };
    UpstreamAddress(ServerAddress) = |text| {
        let instead = "like \"127.0.0.1:3000\", \"backend:3000\" or \"unix:/path\"";
        match (text.strip_prefix("unix:"), text.rsplit_once(':')) {
            (Some(path), _) if path.starts_with('/') => Ok(ServerAddress::Unix(path.into())),
            (Some(_), _) => Err(wrong("a socket's path must be absolute", instead)),
            (None, Some((host, port))) if !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0) && !text.contains('/') => {
                Ok(ServerAddress::Tcp(text.into()))
            }
            (None, _) => Err(wrong(format!("\"{text}\" is no address of a server"), instead)),
        }
    };
    Proxy(TrustedPeer) = |text| match (text, text.parse::<ipnet::IpNet>(), text.parse::<std::net::IpAddr>()) {
        ("unix", ..) => Ok(TrustedPeer::Unix),
        (_, Ok(network), _) => Ok(TrustedPeer::Network(network)),
        (_, _, Ok(ip)) => Ok(TrustedPeer::Network(ip.into())),
        _ => Err(wrong(format!("\"{text}\" is no network"), "like \"10.0.0.0/8\", \"192.0.2.1\" or \"unix\"")),
    };
    Prefix(String) = |text| match Pattern::subtree(text) {
        Ok(_) if !text.contains([':', '*']) => Ok(text.into()),
        Ok(_) => Err(wrong("a prefix is a plain path", "put patterns into a [[route]]")),
        Err(error) => Err(wrong(error.to_string(), "like \"/api/v3\"")),
    };
    RoutePattern(PatternText) = |text| match text.parse::<Pattern>() {
        Ok(pattern) => Ok(PatternText { text: text.into(), pattern }),
        Err(error) => Err(wrong(error.to_string(), "like \"/api/v3/projects/:id/issues\" or \"/api/v3/templates/*\"")),
    };
    MethodName(Method) = |text| match Method::of(text.as_bytes()) {
        Method::Other => Err(wrong(format!("\"{text}\" is no method that is forwarded"), "GET, HEAD, POST, PUT, PATCH, DELETE or OPTIONS")),
        method => Ok(method),
    };
    HeaderName(String) = |text| {
        let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        let taken = ["host", "connection", "content-length", "content-type", "transfer-encoding", "upgrade", "expect", "cookie", "authorization"];
        match plain {
            true if !taken.contains(&text.to_ascii_lowercase().as_str()) => Ok(text.into()),
            true => Err(wrong(format!("{text} has a meaning of its own"), "like \"PRIVATE-TOKEN\"; Bearer has its own switch")),
            false => Err(wrong("a header's name has letters, digits and `-` only", "like \"PRIVATE-TOKEN\"")),
        }
    };
    ParameterName(String) = |text| {
        let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        match plain {
            true if !["page", "per_page", "sudo"].contains(&text) => Ok(text.into()),
            true => Err(wrong(format!("{text} has a meaning of its own"), "like \"private_token\"")),
            false => Err(wrong("a parameter's name has letters, digits and `_` only", "like \"private_token\"")),
        }
    };
    FilePath(PathBuf) = |text| match text {
        "" => Err(wrong("is empty", "like \"tollgate.db\"")),
        _ => Ok(text.into()),
    };
}

#[derive(Clone, Debug)]
pub(crate) struct PatternText {
    pub(crate) text: String,
    pub(crate) pattern: Pattern,
}

#[derive(Clone, Debug)]
pub(crate) enum TrustedPeer {
    Network(ipnet::IpNet),
    Unix,
}

/// `"inherit"`: as in the section above.
#[derive(Clone, Debug)]
pub(crate) struct Inherited<T>(pub(crate) Option<T>);

impl<T: Setting> Setting for Inherited<T> {
    fn read(value: &DeValue<'_>) -> Result<Self, Wrong> {
        if value.as_str() == Some("inherit") {
            return Ok(Self(None));
        }
        T::read(value).map(|value| Self(Some(value)))
    }
}
