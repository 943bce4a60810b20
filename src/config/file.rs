//! The file: every section and key with its default. The comments here are the reference; `config/tollgate.example.toml`
//! is generated from them.

use super::section::{Bytes, Section, Setting, Wrong, section, text, words, wrong};
use crate::edge::Listen;
use crate::request::route::Pattern;
use crate::request::view::Method;
use crate::upstream::ServerAddress;
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
        /// Names by which it may be asked, besides IP addresses and localhost, like `"tollgate.internal"` where Prometheus
        /// scrapes that name. Any other Host gets 403, so that no web page can reach it under a name of its own.
        hosts: Vec<HostName> = "[]",
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
        /// Origins whose pages may read the answers that tollgate gives itself (401, 404, 502 …), like
        /// `"https://app.example"`, exactly as a browser writes them; or `"*"` alone for every page. They get
        /// Access-Control-Allow-Origin and the exposed headers, never a permission to send credentials along. For its own
        /// answers the backend says so itself.
        cors_origins: Vec<String> = "[]",
        /// What scopes mean: "none" (a valid token may do everything, unless there are [[scope]] entries) or "gitlab" (`api`
        /// everything, `read_api` GET and HEAD, `read_user` GET under `/user` and `/users`, `sudo` acting as others).
        scopes: ScopePreset = r#""none""#,
    }
}

section! {
    /// What a scope allows, in addition to what [api] scopes says. With any of these, a token needs a scope for all it does.
    Scope {
        /// The scope, as tokens carry it. May stand in several entries.
        name: String = r#"!"api""#,
        /// These methods …
        methods: Vec<MethodName> = r#"["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]"#,
        /// … on paths of these patterns: `:name` is any one segment, a final `*` everything below, `/` alone every path.
        paths: Vec<RoutePattern> = r#"["/"]"#,
        /// Lets act as another user, where [token] sudo allows it at all.
        sudo: bool = "false",
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
        /// reads form, multipart and JSON bodies as they pass, and refuses those that backends read in different ways.
        /// "ignore" is for backends that read the token from the header alone.
        body: BodyPolicy = r#""refuse""#,
        /// A body without a Content-Type. "watch": every backend's reading of it is watched, as a form where it is a
        /// POST and as JSON, and it is forwarded as it came. "refuse": 400. "octet-stream": forwarded as
        /// `application/octet-stream`, which nobody takes for a form, and watched as JSON.
        untyped_body: Untyped = r#""watch""#,
        /// A POST with X-HTTP-Method-Override: "refuse" (400), or "judge" it as the method that the header names (routes,
        /// scopes, pages) and pass the header on. Only for a backend that obeys this header (Rack::MethodOverride, as in
        /// Rails; Symfony): another one would run a POST where a GET was permitted. gitlab4j sends PATCH this way.
        method_override: MethodOverride = r#""refuse""#,
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
        /// Headers by which some backends choose another path or user than the one that was judged, like X-Original-URL,
        /// X-Rewrite-URL, Remote-User, X-WebAuth-User or X-SSL-Client-Cert: "strip" or "allow". docs/security.md has the list.
        path_and_user_headers: Strip = r#""strip""#,
        /// Answer requests that carry their token in the query with a `Deprecation` header.
        query_deprecation: bool = "false",
    }
}

section! {
    /// Where tokens are looked up. Several [[store]] are asked in their order: the first that knows a token wins, and one
    /// that can't tell ends the look-up with 503. Without any, SQLite. `tollgate token` writes to the first one that can
    /// be written, or to the one that `--store` names.
    SqliteStore {
        /// Embedded, made on first use.
        kind: StoreKind = r#""sqlite""#,
        /// Its name in metrics, logs and `--store`; empty for its kind.
        name: String = r#""""#,
        /// The file, relative to this configuration's folder.
        path: FilePath = r#""tollgate.db""#,
        /// How long a look-up may take.
        timeout: Duration = r#""2s""#,
    }
}

section! {
    /// A file of SHA-256 digests, TOML or (when its name ends in .json) JSON, read again when it changes.
    FileStore {
        /// For people and configuration management.
        kind: StoreKind = r#""file""#,
        /// Its name in metrics, logs and `--store`; empty for its kind.
        name: String = r#""""#,
        /// The file, relative to this configuration's folder.
        path: FilePath = r#""tokens.toml""#,
        /// How long a look-up may take.
        timeout: Duration = r#""2s""#,
    }
}

section! {
    /// PostgreSQL: tollgate's own schema (`tollgate store migrate` makes it), GitLab's tables, or any other.
    PostgresStore {
        /// Also for several gateways that share their tokens.
        kind: StoreKind = r#""postgres""#,
        /// Its name in metrics, logs and `--store`; empty for its kind.
        name: String = r#""""#,
        /// `postgres://user@host/database`, or keywords like `host=/run/postgresql dbname=gitlab user=tollgate`. Of several
        /// hosts, look-ups go to the primary server. No environment variables (PGHOST) and no .pgpass.
        url: String = r#"!"host=/run/postgresql""#,
        /// A file with the password; empty for none, or one in the URL.
        password_file: String = r#""""#,
        /// "auto" (plain text if every host and hostaddr of `url` is a loopback address, localhost or a Unix socket, else
        /// "verify-full"), "disable", "require" (encrypted, to whomever), "verify-ca" or "verify-full". Never falls back to
        /// plain text.
        tls: Tls = r#""auto""#,
        /// The authorities to trust, a PEM file; empty for the system's.
        tls_ca: String = r#""""#,
        /// A certificate of tollgate's own, if the other side asks for one: a PEM file.
        tls_cert: String = r#""""#,
        /// The key of `tls_cert`.
        tls_key: String = r#""""#,
        /// Where the tokens are: "tollgate" (its own tables), "gitlab-legacy" (users.authentication_token), "gitlab-pat"
        /// (personal_access_tokens.token), "gitlab-pat-digest" (personal_access_tokens.token_digest) or "custom".
        preset: PostgresPreset = r#""tollgate""#,
        /// The schema of tollgate's own tables.
        schema: Identifier = r#""tollgate""#,
        /// With "custom": a query with $1 for the token. Columns by name: `user`, and if wanted `scopes`, `expires_at`,
        /// `not_before`, `revoked`, `blocked`. It runs with search_path = pg_catalog, pg_temp: write tables and functions
        /// with their schema, like `public.people`.
        lookup: String = r#""""#,
        /// With "custom": what $1 is. "plain", "sha256-hex", "sha256-base64", or "gitlab" (base64 of the SHA-256 over the
        /// token and the first 32 characters of db_key_base).
        digest: BoundAs = r#""sha256-hex""#,
        /// A file with GitLab's db_key_base, for "gitlab-pat-digest" and for digest = "gitlab".
        db_key_base_file: String = r#""""#,
        /// Scopes of tokens whose row names none.
        scopes: Vec<String> = "[]",
        /// Hear of changes through LISTEN/NOTIFY. Tables that are not tollgate's own need triggers for that
        /// (`tollgate store install-triggers`); without them a revoked token works for up to [cache] positive_ttl.
        notify: bool = "true",
        /// The channel that triggers tell on. In tollgate's own tables it is changed for all by `tollgate store migrate`
        /// alone, and gateways listen where the triggers tell.
        channel: Identifier = r#""tollgate_change""#,
        /// Connections for look-ups. One more hears of changes.
        connections: u64 = "8",
        /// How long a look-up may take.
        timeout: Duration = r#""2s""#,
    }
}

section! {
    /// Redis or Valkey: a key for each token, the prefix and its SHA-256 in hex; the value is JSON or a hash.
    RedisStore {
        /// Also for several gateways that share their tokens.
        kind: StoreKind = r#""redis""#,
        /// Its name in metrics, logs and `--store`; empty for its kind.
        name: String = r#""""#,
        /// `"host:port"` or `"unix:/path"`: the server, or the sentinels, or some nodes of the cluster.
        servers: Vec<UpstreamAddress> = r#"["127.0.0.1:6379"]"#,
        /// "single", "sentinel" or "cluster".
        topology: RedisTopology = r#""single""#,
        /// The name of the master that the sentinels watch.
        master: String = r#""mymaster""#,
        /// The number of the database.
        database: u64 = "0",
        /// An ACL user; empty for the default one.
        username: String = r#""""#,
        /// A file with the password; empty for none.
        password_file: String = r#""""#,
        /// "auto" (nothing to loopback addresses and Unix sockets, "verify-full" to everywhere else), "disable",
        /// "require" (encrypted, to whomever), "verify-ca" or "verify-full". Never falls back to plain text.
        tls: Tls = r#""auto""#,
        /// The authorities to trust, a PEM file; empty for the system's.
        tls_ca: String = r#""""#,
        /// A certificate of tollgate's own, if the other side asks for one: a PEM file.
        tls_cert: String = r#""""#,
        /// The key of `tls_cert`.
        tls_key: String = r#""""#,
        /// Before the 64 hex digits.
        prefix: String = r#""tollgate:token:""#,
        /// Scopes of tokens whose value names none.
        scopes: Vec<String> = "[]",
        /// How changes become known: "channel" (messages that `tollgate token` sends), "keyspace" (notifications of the
        /// server, whoever made the change; needs notify-keyspace-events with K, g, $, h and x) or "none".
        changes: RedisChangesBy = r#""channel""#,
        /// The channel.
        channel: String = r#""tollgate:change""#,
        /// Connections for look-ups. One more hears of changes.
        connections: u64 = "4",
        /// How long a look-up may take.
        timeout: Duration = r#""2s""#,
    }
}

section! {
    /// HTTP introspection: the backend itself is asked who a token belongs to. Needs no migration; a revoked token works
    /// for up to [cache] positive_ttl.
    IntrospectionStore {
        /// Where nothing else can be read.
        kind: StoreKind = r#""introspection""#,
        /// Its name in metrics, logs and `--store`; empty for its kind.
        name: String = r#""""#,
        /// `http://`, `https://`, or `unix:/path/of/socket:/path`; empty for `/user` below the first prefix on the first
        /// upstream.
        endpoint: String = r#""""#,
        /// true: `http://` may lead to another machine. Every token, valid or not, then travels over the network in plain
        /// text, for whoever listens there to use; each start says so.
        insecure_http: bool = "false",
        /// "user" (GET with the token: 200 is valid) or "rfc7662" (OAuth 2.0 token introspection).
        mode: IntrospectionMode = r#""user""#,
        /// With "user": the statuses that mean that there is no such token. Other than 401 they must come with an object
        /// in JSON, and none with Retry-After: what a firewall or a rate limiter says is no word of the endpoint's.
        unknown_statuses: Vec<u64> = "[401, 403]",
        /// Where the answer names the user: JSON pointers, the first that finds a text or number.
        user: Vec<String> = r#"["/username", "/login", "/sub", "/email"]"#,
        /// Where the answer names scopes: a JSON pointer.
        scopes_at: String = r#""/scope""#,
        /// Scopes when the answer names none.
        scopes: Vec<String> = "[]",
        /// With "rfc7662": who tollgate is to the endpoint.
        client_id: String = r#""""#,
        /// A file with its secret.
        client_secret_file: String = r#""""#,
        /// "auto" (nothing to loopback addresses and Unix sockets, "verify-full" to everywhere else), "disable",
        /// "require" (encrypted, to whomever), "verify-ca" or "verify-full". Never falls back to plain text.
        tls: Tls = r#""auto""#,
        /// The authorities to trust, a PEM file; empty for the system's.
        tls_ca: String = r#""""#,
        /// A certificate of tollgate's own, if the other side asks for one: a PEM file.
        tls_cert: String = r#""""#,
        /// The key of `tls_cert`.
        tls_key: String = r#""""#,
        /// Requests under way at once.
        connections: u64 = "32",
        /// So many failures in a row, and the endpoint is left alone.
        breaker_failures: u64 = "5",
        /// For so long; then one request tries. So long callers that are not cached wait, at most, for an endpoint that
        /// is back.
        breaker_pause: Duration = r#""500ms""#,
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
        /// Valid tokens in memory, about 550 bytes each.
        positive_capacity: u64 = "100000",
        /// Invalid ones, in a space of their own, about 200 bytes each.
        negative_capacity: u64 = "100000",
        /// A file that keeps what is known of valid tokens (digests only) over a restart, relative to this
        /// configuration's folder; empty for none. Believed once the stores have said what changed meanwhile, which
        /// SQLite and tollgate's own tables can; else only while a store is down.
        snapshot: String = r#""""#,
    }
}

section! {
    /// Bounds for `page` and `per_page`, on GET and HEAD under the prefixes.
    Pagination {
        /// What stands for a `per_page` of zero, below zero, or that is no number.
        default_per_page: u64 = "20",
        /// The highest `per_page`, or "none". Never above 2147483647.
        max_per_page: Option<u64> = "100",
        /// The lowest `page`.
        first_page: u64 = "1",
        /// The highest `page`, or "none". Never above 2147483647.
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
        /// For the connection. After that it is tried again, three times in all, on whichever server is next; then 504.
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
words! { Untyped { Watch = "watch", Refuse = "refuse", OctetStream = "octet-stream" } }
words! { Forward { Token = "token", Identity = "identity", Both = "both", None = "none" } }
words! { MethodOverride { Refuse = "refuse", Judge = "judge" } }
words! { Switch { Refuse = "refuse", Allow = "allow" } }
words! { Strip { Strip = "strip", Allow = "allow" } }
words! { ScopePreset { None = "none", Gitlab = "gitlab" } }
words! {
    StoreKind {
        Sqlite = "sqlite", File = "file", Postgres = "postgres", Redis = "redis", Introspection = "introspection",
    }
}
words! {
    Tls {
        Auto = "auto", Disable = "disable", Require = "require", VerifyCa = "verify-ca", VerifyFull = "verify-full",
    }
}
words! {
    PostgresPreset {
        Tollgate = "tollgate", GitlabLegacy = "gitlab-legacy", GitlabPat = "gitlab-pat",
        GitlabPatDigest = "gitlab-pat-digest", Custom = "custom",
    }
}
words! {
    BoundAs { Plain = "plain", Sha256Hex = "sha256-hex", Sha256Base64 = "sha256-base64", Gitlab = "gitlab" }
}
words! { RedisTopology { Single = "single", Sentinel = "sentinel", Cluster = "cluster" } }
words! { RedisChangesBy { Channel = "channel", Keyspace = "keyspace", None = "none" } }
words! { IntrospectionMode { User = "user", Rfc7662 = "rfc7662" } }
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
            fn read(value: &DeValue<'_>) -> Result<Self, Vec<Wrong>> {
                let read: fn(&str) -> Result<$inner, Wrong> = $read;
                text(value).and_then(read).map(Self).map_err(|wrong| vec![wrong])
            }
        }
    )*};
}

settings! {
    ListenAddress(Listen) = |text| match text.strip_prefix("unix:") {
        Some(path) if path.starts_with('/') => Ok(Listen::Unix(path.into(), 0o660)),
        Some(_) => Err(wrong("a socket's path must be absolute", "write it like \"unix:/run/tollgate/api.sock\"")),
        None => match text.parse::<SocketAddr>() {
            Ok(_) => Ok(Listen::Tcp(text.into())),
            Err(_) => Err(wrong("is not an address to listen on", "write it like \"127.0.0.1:8080\", \"[::]:8080\" or \"unix:/path\"")),
        },
    };
    UpstreamAddress(ServerAddress) = |text| {
        let instead = "write it like \"127.0.0.1:3000\", \"backend:3000\" or \"unix:/path\"";
        match (text.strip_prefix("unix:"), text.rsplit_once(':')) {
            (Some(path), _) if path.starts_with('/') => Ok(ServerAddress::Unix(path.into())),
            (Some(_), _) => Err(wrong("a socket's path must be absolute", instead)),
            (None, Some((host, port))) if !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0) && !text.contains('/') => {
                Ok(ServerAddress::Tcp(text.into()))
            }
            (None, _) => Err(wrong("is not the address of a server", instead)),
        }
    };
    Proxy(TrustedPeer) = |text| match (text, text.parse::<ipnet::IpNet>(), text.parse::<std::net::IpAddr>()) {
        ("unix", ..) => Ok(TrustedPeer::Unix),
        (_, Ok(network), _) => Ok(TrustedPeer::Network(network)),
        (_, _, Ok(ip)) => Ok(TrustedPeer::Network(ip.into())),
        _ => Err(wrong("is not a network", "write it like \"10.0.0.0/8\", \"192.0.2.1\" or \"unix\"")),
    };
    Prefix(String) = |text| match Pattern::subtree(text) {
        Ok(_) if !text.contains([':', '*']) => Ok(text.into()),
        Ok(_) => Err(wrong("must be a plain path", "put patterns into a [[route]]")),
        Err(error) => Err(wrong(error.to_string(), "write it like \"/api/v3\"")),
    };
    RoutePattern(PatternText) = |text| match text.parse::<Pattern>() {
        Ok(pattern) => Ok(PatternText { text: text.into(), pattern }),
        Err(error) => Err(wrong(error.to_string(), "write it like \"/api/v3/projects/:id/issues\" or \"/api/v3/templates/*\"")),
    };
    MethodName(Method) = |text| match Method::of(text.as_bytes()) {
        Method::Other => Err(wrong("is not a method that is forwarded", "use GET, HEAD, POST, PUT, PATCH, DELETE or OPTIONS")),
        method => Ok(method),
    };
    HeaderName(String) = |text| {
        let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        let taken = ["host", "connection", "content-length", "content-type", "transfer-encoding", "upgrade", "expect", "cookie", "authorization"];
        match plain {
            true if !taken.contains(&text.to_ascii_lowercase().as_str()) => Ok(text.into()),
            true => Err(wrong("is a header with another meaning", "write it like \"PRIVATE-TOKEN\"; for Authorization there is token.bearer")),
            false => Err(wrong("must have letters, digits and `-` only", "write it like \"PRIVATE-TOKEN\"")),
        }
    };
    ParameterName(String) = |text| {
        let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        match plain {
            true if !["page", "per_page", "sudo", "_method"].contains(&text) => Ok(text.into()),
            true => Err(wrong("is a parameter with another meaning", "write it like \"private_token\"")),
            false => Err(wrong("must have letters, digits and `_` only", "write it like \"private_token\"")),
        }
    };
    HostName(String) = |text| {
        let name = text.strip_suffix('.').unwrap_or(text);
        let plain = |label: &str| !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
        match name.split('.').all(plain) && name.len() <= 253 {
            true => Ok(name.to_ascii_lowercase()),
            false => Err(wrong("is not a host name", "write a name alone, without scheme, port or `*`, like \"tollgate.internal\"")),
        }
    };
    Identifier(String) = |text| {
        let plain = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        match plain && text.len() <= 63 && text.starts_with(|c: char| !c.is_ascii_digit()) {
            true => Ok(text.into()),
            false => Err(wrong("must have lower-case letters, digits and `_` only, and not begin with a digit", "write it like \"tollgate\"")),
        }
    };
    FilePath(PathBuf) = |text| match text {
        "" => Err(wrong("is empty", "write the path of a file")),
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
    fn read(value: &DeValue<'_>) -> Result<Self, Vec<Wrong>> {
        if value.as_str() == Some("inherit") {
            return Ok(Self(None));
        }
        T::read(value).map(|value| Self(Some(value)))
    }
}

/// One of the kinds.
#[derive(Clone, Debug)]
pub(crate) enum Store {
    Sqlite(SqliteStore),
    File(FileStore),
    Postgres(PostgresStore),
    Redis(RedisStore),
    Introspection(IntrospectionStore),
}

impl Store {
    /// What the section is called in problems.
    pub(crate) fn at(&self) -> &str {
        match self {
            Self::Sqlite(store) => &store.at,
            Self::File(store) => &store.at,
            Self::Postgres(store) => &store.at,
            Self::Redis(store) => &store.at,
            Self::Introspection(store) => &store.at,
        }
    }

    /// Reads the keys that the kind has.
    pub(crate) fn read(section: &mut Section<'_, '_>) -> Self {
        let kind = section.table.and_then(|table| table.iter().find(|(name, _)| name.get_ref() == "kind"));
        match kind.map(|(_, value)| StoreKind::read(value.get_ref())) {
            Some(Ok(StoreKind::File)) => Self::File(FileStore::read(section)),
            Some(Ok(StoreKind::Postgres)) => Self::Postgres(PostgresStore::read(section)),
            Some(Ok(StoreKind::Redis)) => Self::Redis(RedisStore::read(section)),
            Some(Ok(StoreKind::Introspection)) => Self::Introspection(IntrospectionStore::read(section)),
            Some(Ok(StoreKind::Sqlite)) | None => Self::Sqlite(SqliteStore::read(section)),
            Some(Err(_)) => {
                // Which keys it may have is not known: the kind is reported, and nothing else of it.
                let _: StoreKind = section.field("kind", r#""sqlite""#);
                section.places.spoil(section.name.clone());
                section.table = None;
                Self::Sqlite(SqliteStore::read(section))
            }
        }
    }
}
