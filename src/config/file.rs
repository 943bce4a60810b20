//! The file: every section and key with its default. The comments here are the reference; `config/tollgate.example.toml`
//! is generated from them.

use super::section::{Bytes, Fraction, InvalidValue, Ratio, Section, Setting, invalid, section, text, words};
use crate::edge::Listen;
use crate::policy::{CalendarPeriod, CalendarQuota, LimitCosts, LimitKeyPart, RefillRate};
use crate::request::host::HostPattern;
use crate::request::route::{HeaderEdits, Pattern};
use crate::request::token::BasicUsers;
use crate::request::view::Method;
use crate::store::credential::Digest;
use crate::store::terms::parse_rate;
use crate::telemetry::datagrams::SyslogAddress;
use crate::upstream::{AdaptiveBounds, HashBy, ListedServer, MaxRequests, ServerAddress};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use toml::de::DeValue;

section! {
    /// Where tollgate accepts API requests.
    ServerSection {
        /// Addresses to listen on: `"address:port"`, or `"unix:/path"` for a socket file (mode 0660).
        listen: Vec<ListenAddress> = r#"["127.0.0.1:8080"]"#,
        /// Worker threads. 0: one for each core.
        threads: u64 = "0",
        /// Networks of the proxies in front of tollgate whose X-Forwarded-* headers are believed, like `"10.0.0.0/8"`,
        /// and `"unix"` for peers on a Unix socket. These headers are removed from all other requests.
        trusted_proxies: Vec<Proxy> = "[]",
        /// How long requests are served as before after SIGTERM, while /readyz of the admin listener says 503 already, so that
        /// balancers and Kubernetes send new ones elsewhere. Use more than the interval of their health checks.
        drain_delay: Duration = r#""0s""#,
        /// How long requests in flight may continue after that. The listeners are closed by then, and each connection ends with
        /// its next response.
        shutdown_grace: Duration = r#""25s""#,
        /// Reload when this configuration file changes, as `tollgate reload` does.
        watch: bool = "false",
        /// Let the kernel hold tollgate to the files that it needs, with Landlock (Linux 5.13): "off", "on" (nothing is served
        /// without) or "try" (with a warning where the kernel cannot). `tollgate check` lists the files. A configuration that
        /// needs others takes effect with a restart: docs/security.md.
        sandbox: SandboxWord = r#""off""#,
    }
}

section! {
    /// A listener with more than an address: TLS, HTTP/2, the PROXY protocol. With any of these, [server] listen is empty
    /// unless it is set.
    ListenerSection {
        /// `"address:port"`, or `"unix:/path"` for a socket file (mode 0660).
        address: ListenAddress = r#"!"127.0.0.1:8443""#,
        /// PEM files, relative to the folder of this configuration: the certificate followed by its intermediates, and its
        /// private key. With any of these, the listener speaks TLS. Clients get the certificate for the name that they ask
        /// for (SNI), otherwise the first one. A reload reads the files again; so does tollgate by itself when they change.
        certificates: Vec<CertificateText> = "[]",
        /// "intermediate" (TLS 1.2 and 1.3) or "modern" (TLS 1.3 only), as Mozilla recommends.
        tls: TlsVersions = r#""intermediate""#,
        /// Certificate authorities for certificates of clients, a PEM file; empty for none. The subject of a client's
        /// certificate is in the access log, and the backend gets it as X-Tollgate-Client-Certificate.
        client_ca: String = r#""""#,
        /// With `client_ca`: "required" (a client without a certificate cannot connect) or "optional".
        client_certificate: ClientCertificate = r#""required""#,
        /// Speak HTTP/2 as well: with TLS, with clients that choose it; otherwise with those that begin with its preface.
        http2: bool = "true",
        /// Networks of load balancers that begin their connections with a PROXY protocol header (version 1 or 2), like
        /// `"10.0.0.0/8"`, and `"unix"` for peers on a Unix socket. With any of these, the header is mandatory, and other peers
        /// are closed.
        proxy_protocol: Vec<Proxy> = "[]",
        /// Time for the PROXY protocol header and the TLS handshake together.
        handshake_timeout: Duration = r#""10s""#,
        /// Without certificates: the port, like 443, for redirects (308) of GET and HEAD to the same URL with https, or "none".
        /// Requests with a token, which has been sent in plain text by then, and those of other methods get 403.
        redirect_to_https: Option<u64> = r#""none""#,
        /// "forward" (requests go to the backend) or "verdict" (other proxies ask whether they may forward a request; see
        /// docs/verdict.md). "verdict" needs [token] forward = "identity" and body = "ignore".
        mode: ListenerMode = r#""forward""#,
        /// With mode = "verdict": which proxy asks. "nginx" (auth_request, with X-Original-Method, X-Original-URI and
        /// X-Original-Host), "forwarded" (forward_auth of Caddy and Traefik: X-Forwarded-*), "envoy" (ext_authz over HTTP).
        source: VerdictSourceWord = r#""none""#,
        /// With mode = "verdict" and TCP: addresses and networks of the proxies that may ask; all others are closed.
        peers: Vec<Proxy> = "[]",
        /// With source = "envoy": its `path_prefix`; empty for none.
        path_prefix: String = r#""""#,
        /// With certificates: send Strict-Transport-Security with this time in every response, or "none". Browsers then use
        /// https alone for this host, on every port.
        hsts: Option<Duration> = r#""none""#,
    }
}

section! {
    /// Metrics, health and reload, for operators only.
    AdminSection {
        /// One address, `"unix:/path"` for a socket file (mode 0660), or "none". GET / has a page for browsers. Without a token,
        /// a listener that is neither on a loopback address nor a socket file only reads: reloads and other changes get 403.
        listen: Option<ListenAddress> = r#""127.0.0.1:9090""#,
        /// SHA-256 in hex of a token that this listener asks for, or "none": `Authorization: Bearer TOKEN`, or the token as the
        /// password of Basic with any user name. /healthz and /readyz need none. It is sent in plain text. The commands of
        /// tollgate take it by --admin-token-file or TOLLGATE_ADMIN_TOKEN.
        token_sha256: Option<Sha256Text> = r#""none""#,
        /// An address of its own for GET /metrics, /healthz and /readyz, without a token and without anything else; or "none".
        metrics_listen: Option<ListenAddress> = r#""none""#,
        /// Host names that both listeners answer to, besides IP addresses and localhost; for example
        /// `"tollgate.internal"` if Prometheus scrapes that name. Requests with any other Host get 403, so that a web
        /// page cannot reach the listener through a name of its own.
        hosts: Vec<HostName> = "[]",
        /// Log of what the admin listener and signals change, one JSON object for each change: "off", "stdout", "stderr",
        /// "syslog", "journald", or a file (relative to the folder of this configuration). Never with tokens or values.
        audit: String = r#""off""#,
    }
}

section! {
    /// What tollgate is responsible for.
    ApiSection {
        /// Everything at and below these paths needs a valid token. Everything else is 404, unless a [[route]] says
        /// otherwise.
        prefixes: Vec<Prefix> = r#"["/api/v3"]"#,
        /// A path that servers read in two ways, with an escaped `/`, `%`, `?` or `#`, or with a `;`: "pass" or "refuse" (400).
        /// GitLab needs `group%2Fproject`. Use "refuse" for a backend that decodes a path before it looks for what it names
        /// (Django, PHP behind nginx): there it could be another one than [[route]], [[scope]] and [[limit]] here took it for.
        /// Refused with "pass" as well: a path that another reading gives a narrower and stricter [[route]].
        ambiguous_paths: AmbiguousPathsWord = r#""pass""#,
        /// Let CORS preflights (OPTIONS with Origin and Access-Control-Request-Method) pass without a token: browsers
        /// never send one with them.
        cors_preflight: bool = "false",
        /// Origins whose pages may read the responses that tollgate itself generates (401, 404, 502 …), like
        /// `"https://app.example"`, exactly as a browser sends them; or `"*"` alone for every page. Such responses get
        /// Access-Control-Allow-Origin and the exposed headers, but never a permission to send credentials. Responses
        /// of the backend are not changed.
        cors_origins: Vec<String> = "[]",
        /// The meaning of scopes: "none" (a valid token may do everything, unless there are [[scope]] entries) or
        /// "gitlab" (`api` everything, `read_api` GET and HEAD, `read_user` GET under `/user` and `/users`, `sudo`
        /// acting as other users).
        scopes: ScopePreset = r#""none""#,
    }
}

section! {
    /// What a scope allows, in addition to [api] scopes. If there are any of these, a token needs a scope for every
    /// request.
    ScopeSection {
        /// The name of the scope, as tokens carry it. It may be in several entries.
        name: String = r#"!"api""#,
        /// The methods that it allows …
        methods: Vec<MethodName> = r#"["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]"#,
        /// … on paths that match these patterns: `:name` is any one segment, a final `*` everything below, `/` alone
        /// every path.
        paths: Vec<RoutePattern> = r#"["/"]"#,
        /// Allows acting as another user, if [token] sudo = "allow".
        sudo: bool = "false",
    }
}

section! {
    /// How clients send their token, and what the backend receives instead.
    TokenSection {
        /// The header that carries the token. Letter case does not matter.
        header: HeaderName = r#""PRIVATE-TOKEN""#,
        /// The query parameter that carries the token.
        query: ParameterName = r#""private_token""#,
        /// Also accept `Authorization: Bearer TOKEN`. The Ruby client sends tokens of more than 20 characters this way.
        bearer: bool = "true",
        /// The longest token, in bytes: 1 to 2048. Longer ones get 401.
        max_bytes: u64 = "255",
        /// On routes with `basic = true`, also accept a token as the password of HTTP Basic, for pip, twine, npm, Terraform and
        /// git, with these user names: "none" (off), "any" (the backend gets the token's user instead), "user" (the token's
        /// own user), or a list like `["oauth2", "__token__"]`, which go on as they are. With forward = "token" or "both", such
        /// a token goes on as Basic in place of the token header.
        basic: BasicUsersText = r#""none""#,
        /// Requests whose body has a field that Rack would take for a credential. In Rack, the body takes precedence
        /// over query and header, so the backend would act for a user whom tollgate did not check. "refuse" reads form,
        /// multipart and JSON bodies while they pass, and refuses those that backends could read in different ways.
        /// "ignore" is for backends that read the token from the header only.
        body: BodyPolicy = r#""refuse""#,
        /// Bodies without a Content-Type. "watch": forward unchanged, and check in every way that a backend could read
        /// them (as a form if it is a POST, and as JSON). "refuse": 400. "octet-stream": forward as
        /// `application/octet-stream`, which no backend reads as a form, and check as JSON.
        untyped_body: Untyped = r#""watch""#,
        /// POST requests with X-HTTP-Method-Override. "refuse": 400. "judge": treat the request as the method in the
        /// header (routes, scopes, pages), and forward the header. Use "judge" only if the backend obeys this header
        /// (Rack::MethodOverride in Rails, Symfony): another backend would run a POST where a GET was permitted.
        /// gitlab4j sends PATCH this way. Needs body = "refuse".
        method_override: OverridePolicy = r#""refuse""#,
        /// How the backend learns who the user is: "token" (the token header), "identity" (X-Tollgate-User,
        /// X-Tollgate-Token-Id, X-Tollgate-Scopes), "both" or "none".
        forward: Forward = r#""token""#,
        /// Acting as another user with `sudo` or SUDO: "refuse" (403) or "allow".
        sudo: Switch = r#""refuse""#,
        /// `access_token` and `bearer_token` parameters: "refuse" (401) or "allow".
        access_token: Switch = r#""refuse""#,
        /// `job_token` parameters: "refuse" (401) or "allow". With "refuse", JOB-TOKEN, DEPLOY-TOKEN and BUILD-TOKEN
        /// headers are removed. With "allow", they pass unchecked beside a valid token, and the backend decides which of the
        /// two it acts for. A [[route]] can let them pass in place of a token instead: `unchecked`.
        job_token: Switch = r#""refuse""#,
        /// The Cookie header, which may carry a Rails session: "strip" or "allow".
        cookies: Strip = r#""strip""#,
        /// Authorization headers without a token: "strip" or "allow".
        authorization: Strip = r#""strip""#,
        /// Headers that make some backends use another path or user than the one that tollgate checked, like
        /// X-Original-URL, X-Rewrite-URL, Remote-User, X-WebAuth-User or X-SSL-Client-Cert: "strip" or "allow".
        /// docs/security.md has the list.
        path_and_user_headers: Strip = r#""strip""#,
        /// Add a `Deprecation` header to responses if the token was in the query.
        query_deprecation: bool = "false",
    }
}

section! {
    /// Where tokens are looked up. If there are several [[store]], they are asked in order: the first that knows the
    /// token decides. A store that fails ends the lookup with 503. Without any [[store]], SQLite is used. `tollgate
    /// token` writes to the first writable store, or to the one named with `--store`.
    SqliteSection {
        /// An embedded database, created on first use.
        kind: StoreKind = r#""sqlite""#,
        /// Name in metrics, logs and `--store`; empty for the kind.
        name: String = r#""""#,
        /// Path of the file, relative to the folder of this configuration.
        path: FilePath = r#""tollgate.db""#,
        /// Timeout of a lookup.
        timeout: Duration = r#""2s""#,
    }
}

section! {
    /// A file of SHA-256 digests: TOML, or JSON if its name ends in .json. It is read again when it changes.
    FileSection {
        /// Edited by hand or written by configuration management.
        kind: StoreKind = r#""file""#,
        /// Name in metrics, logs and `--store`; empty for the kind.
        name: String = r#""""#,
        /// Path of the file, relative to the folder of this configuration.
        path: FilePath = r#""tokens.toml""#,
        /// Timeout of a lookup.
        timeout: Duration = r#""2s""#,
    }
}

section! {
    /// PostgreSQL: tollgate's own schema (created by `tollgate store migrate`), GitLab's tables, or any other table.
    PostgresSection {
        /// Can be shared by several gateways.
        kind: StoreKind = r#""postgres""#,
        /// Name in metrics, logs and `--store`; empty for the kind.
        name: String = r#""""#,
        /// `postgres://user@host/database`, or keywords like `host=/run/postgresql dbname=gitlab user=tollgate`. If
        /// there are several hosts, lookups use the primary server. Environment variables (PGHOST) and .pgpass are not
        /// read.
        url: String = r#"!"host=/run/postgresql""#,
        /// File with the password; empty for none, or if it is in the URL.
        password_file: String = r#""""#,
        /// "auto" (plain text if every host and hostaddr in `url` is a loopback address, localhost or a Unix socket,
        /// otherwise "verify-full"), "disable", "require" (encrypted, certificate not verified), "verify-ca" or
        /// "verify-full". Never falls back to plain text.
        tls: Tls = r#""auto""#,
        /// Trusted certificate authorities, a PEM file; empty for those of the system.
        tls_ca: String = r#""""#,
        /// Client certificate, a PEM file, if the server asks for one.
        tls_cert: String = r#""""#,
        /// Private key of `tls_cert`.
        tls_key: String = r#""""#,
        /// Where the tokens are: "tollgate" (its own tables), "gitlab-legacy" (users.authentication_token),
        /// "gitlab-pat" (personal_access_tokens.token), "gitlab-pat-digest" (personal_access_tokens.token_digest) or
        /// "custom".
        preset: PostgresPreset = r#""tollgate""#,
        /// The schema of tollgate's own tables.
        schema: Identifier = r#""tollgate""#,
        /// With "custom": a query with $1 for the token. Columns by name: `user`, and optionally `scopes`,
        /// `expires_at`, `not_before`, `revoked`, `blocked`. It runs with search_path = pg_catalog, pg_temp: qualify
        /// tables and functions with their schema, like `public.people`.
        lookup: String = r#""""#,
        /// With "custom": what $1 is. "plain", "sha256-hex", "sha256-base64", or "gitlab" (base64 of the SHA-256 of the
        /// token followed by the first 32 characters of db_key_base).
        digest: BoundAs = r#""sha256-hex""#,
        /// File with GitLab's db_key_base, for "gitlab-pat-digest" and for digest = "gitlab".
        db_key_base_file: String = r#""""#,
        /// Scopes of tokens whose row has none.
        scopes: Vec<String> = "[]",
        /// Receive change notifications through LISTEN/NOTIFY. Tables other than tollgate's own need triggers for them
        /// (`tollgate store install-triggers`); without triggers a revoked token works for up to [cache] positive_ttl.
        notify: bool = "true",
        /// The channel of the notifications. For tollgate's own tables, only `tollgate store migrate` changes it, for
        /// all gateways: they listen on the channel that the triggers use.
        channel: Identifier = r#""tollgate_change""#,
        /// Connections for lookups. One more receives notifications.
        connections: u64 = "8",
        /// Timeout of a lookup.
        timeout: Duration = r#""2s""#,
    }
}

section! {
    /// Redis or Valkey. Each token has a key: the prefix and the SHA-256 of the token in hex. The value is JSON or a
    /// hash.
    RedisSection {
        /// Can be shared by several gateways.
        kind: StoreKind = r#""redis""#,
        /// Name in metrics, logs and `--store`; empty for the kind.
        name: String = r#""""#,
        /// `"host:port"` or `"unix:/path"`: the server, the sentinels, or some nodes of the cluster.
        servers: Vec<UpstreamAddress> = r#"["127.0.0.1:6379"]"#,
        /// "single", "sentinel" or "cluster".
        topology: RedisTopology = r#""single""#,
        /// The name of the master that the sentinels monitor.
        master: String = r#""mymaster""#,
        /// The number of the database.
        database: u64 = "0",
        /// An ACL user; empty for the default user.
        username: String = r#""""#,
        /// File with the password; empty for none.
        password_file: String = r#""""#,
        /// "auto" (plain text to loopback addresses and Unix sockets, otherwise "verify-full"), "disable", "require"
        /// (encrypted, certificate not verified), "verify-ca" or "verify-full". Never falls back to plain text.
        tls: Tls = r#""auto""#,
        /// Trusted certificate authorities, a PEM file; empty for those of the system.
        tls_ca: String = r#""""#,
        /// Client certificate, a PEM file, if the server asks for one.
        tls_cert: String = r#""""#,
        /// Private key of `tls_cert`.
        tls_key: String = r#""""#,
        /// The part of the key before the 64 hex digits.
        prefix: String = r#""tollgate:token:""#,
        /// Scopes of tokens whose value has none.
        scopes: Vec<String> = "[]",
        /// Source of change notifications: "channel" (messages from `tollgate token`), "keyspace" (notifications of the
        /// server, whoever made the change; needs notify-keyspace-events with K, g, $, h and x) or "none".
        changes: RedisChangesBy = r#""channel""#,
        /// The channel of the messages.
        channel: String = r#""tollgate:change""#,
        /// Connections for lookups. One more receives notifications.
        connections: u64 = "4",
        /// Timeout of a lookup.
        timeout: Duration = r#""2s""#,
    }
}

section! {
    /// HTTP introspection: ask the backend itself whom a token belongs to. Needs no migration. A revoked token works
    /// for up to [cache] positive_ttl.
    IntrospectionSection {
        /// For backends whose tokens cannot be read in another way.
        kind: StoreKind = r#""introspection""#,
        /// Name in metrics, logs and `--store`; empty for the kind.
        name: String = r#""""#,
        /// `http://`, `https://`, or `unix:/path/of/socket:/path`; empty for `/user` below the first prefix on the
        /// first upstream.
        endpoint: String = r#""""#,
        /// true: allow `http://` to another machine. Every token, valid or not, is then sent over the network in plain
        /// text. A warning is logged at each start.
        insecure_http: bool = "false",
        /// "user" (GET with the token: 200 means valid) or "rfc7662" (OAuth 2.0 token introspection).
        mode: IntrospectionMode = r#""user""#,
        /// With "user": statuses that mean that the token does not exist. All but 401 count only with a JSON object as
        /// body and without Retry-After, so that a response of a firewall or rate limiter is not mistaken for one of
        /// the endpoint.
        unknown_statuses: Vec<u64> = "[401, 403]",
        /// Where the response has the user name: JSON pointers. The first that finds a string or a number is used.
        user: Vec<String> = r#"["/username", "/login", "/sub", "/email"]"#,
        /// Where the response has the scopes: a JSON pointer.
        scopes_at: String = r#""/scope""#,
        /// Scopes if the response has none.
        scopes: Vec<String> = "[]",
        /// With "rfc7662": the client id of tollgate at the endpoint.
        client_id: String = r#""""#,
        /// File with the client secret.
        client_secret_file: String = r#""""#,
        /// "auto" (plain text to loopback addresses and Unix sockets, otherwise "verify-full"), "disable", "require"
        /// (encrypted, certificate not verified), "verify-ca" or "verify-full". Never falls back to plain text.
        tls: Tls = r#""auto""#,
        /// Trusted certificate authorities, a PEM file; empty for those of the system.
        tls_ca: String = r#""""#,
        /// Client certificate, a PEM file, if the server asks for one.
        tls_cert: String = r#""""#,
        /// Private key of `tls_cert`.
        tls_key: String = r#""""#,
        /// Concurrent requests.
        connections: u64 = "32",
        /// After this many consecutive failures, no more requests are sent for a while.
        breaker_failures: u64 = "5",
        /// How long; then one request tries again. Callers whose token is not cached wait at most this long for an
        /// endpoint that has recovered.
        breaker_pause: Duration = r#""500ms""#,
        /// Timeout of a lookup.
        timeout: Duration = r#""2s""#,
    }
}

section! {
    /// How long results of lookups are used. Changes that a store notifies take effect at once nevertheless.
    CacheSection {
        /// Valid tokens. Those in use are looked up again in the background before they expire.
        positive_ttl: Duration = r#""60s""#,
        /// All others.
        negative_ttl: Duration = r#""10s""#,
        /// How much longer a valid token is accepted while the store cannot be asked.
        stale_if_error: Duration = r#""10m""#,
        /// Valid tokens in memory, about 300 bytes each.
        positive_capacity: u64 = "100000",
        /// Invalid tokens in memory, counted separately, about 200 bytes each.
        negative_capacity: u64 = "100000",
        /// File that keeps the valid tokens (digests only) over a restart, relative to the folder of this
        /// configuration; empty for none. Its entries are used once the stores have reported what changed since, which
        /// SQLite and tollgate's own tables can do; otherwise only while a store is down.
        snapshot: String = r#""""#,
    }
}

section! {
    /// Bounds for `page` and `per_page`, on GET and HEAD under the prefixes.
    PaginationSection {
        /// Replaces a `per_page` that is zero, negative or not a number.
        default_per_page: u64 = "20",
        /// The highest `per_page`, or "none". Never above 2147483647.
        max_per_page: Option<u64> = "100",
        /// The lowest `page`.
        first_page: u64 = "1",
        /// The highest `page`, or "none". Never above 2147483647.
        max_page: Option<u64> = r#""none""#,
        /// A `page` above max_page: "clamp" (use max_page) or "refuse" (400).
        beyond_max_page: Beyond = r#""clamp""#,
        /// Add `page` and `per_page` to requests that have none.
        inject_defaults: bool = "false",
    }
}

section! {
    /// Other bounds for some paths. The first entry that matches is used. What is not set is as in [pagination].
    PaginationRouteSection {
        /// A path pattern: `:name` is any one segment, a final `*` everything below.
        path: RoutePattern = r#"!"/""#,
        /// false: these paths have no pages, and their queries are not changed.
        enabled: bool = "true",
        /// The lowest `page`.
        first_page: Inherited<u64> = r#""inherit""#,
        /// Replaces a `per_page` that is zero, negative or not a number.
        default_per_page: Inherited<u64> = r#""inherit""#,
        /// The highest `per_page`, or "none".
        max_per_page: Inherited<Option<u64>> = r#""inherit""#,
    }
}

section! {
    /// Limits for clients.
    LimitsSection {
        /// The request head. A larger one gets 431.
        header_bytes: Bytes = r#""32KiB""#,
        /// Path and query. Longer ones get 414.
        target_bytes: Bytes = r#""8KiB""#,
        /// The request body, or "none". A larger one gets 413. A [[route]] can have a limit of its own.
        body_bytes: Option<Bytes> = r#""none""#,
        /// Time for the whole request head, from its first byte. A slower one gets 408.
        header_timeout: Duration = r#""10s""#,
        /// The least rate of a request body, in bytes a second: "1B" to "1GiB", or "none". A body that is slower gets 408. Time
        /// in which the backend takes nothing does not count. 500B is what Apache asks for (mod_reqtimeout, MinRate=500).
        body_rate: Option<Bytes> = r#""500B""#,
        /// How much longer than at that rate a body may take: at least "1s". Bytes that come faster are counted for later waits, up
        /// to a minute. A pause within a body may not be longer than a minute in any case.
        body_grace: Duration = r#""20s""#,
        /// How long a connection may stay open without a request.
        idle_timeout: Duration = r#""75s""#,
        /// Connections of all clients together, or "none". Further ones are closed before their first byte. In any case, a quarter
        /// of the open files that the process may have (LimitNOFILE) is kept for backends, stores and the admin listener.
        connections: Option<u64> = r#""none""#,
        /// Connections from one IPv4 address, or one IPv6 network of 64 bits, or "none". With the PROXY protocol, the address is
        /// the one that the balancer says.
        connections_per_address: Option<u64> = r#""none""#,
        /// Requests on one HTTP/1 connection, which ends with the last response; or "none".
        requests_per_connection: Option<u64> = r#""none""#,
        /// Networks whose clients are let in, like `"10.0.0.0/8"`, and `"unix"` for peers on a Unix socket; with any of these, all
        /// other addresses get 403. The client's address is the one in the access log. A [[route]] can have lists of its own.
        allow: Vec<Proxy> = "[]",
        /// Networks whose clients get 403, whatever `allow` says.
        deny: Vec<Proxy> = "[]",
        /// Tell clients what is left of their limits in every response, with the fields `RateLimit` and `RateLimit-Policy` of
        /// the IETF's draft.
        rate_limit_fields: bool = "false",
    }
}

section! {
    /// How many requests a token, a user, an address … may send. Those beyond get 429. Every limit that applies counts the
    /// request, or none does if one of them refuses it. Each gateway counts for itself, unless the limit is shared.
    LimitSection {
        /// Name in metrics, logs and response fields.
        name: String = r#"!"per-token""#,
        /// Whom a bucket is for: "token", "user", "address", "route", "scope" (the first of `scopes` that the token has),
        /// "header:NAME", or several of them together; `[]`: one bucket for all. A request that has no token is not counted by
        /// a limit for tokens. A limit by address, without token, user and scope, is asked before the token is looked up.
        key: Vec<LimitKeyText> = r#"["token"]"#,
        /// Requests in a time, like "10/s", "600/min" or "5000/h"; or "none", if there is a quota or concurrency.
        rate: Option<RateText> = r#"!"600/min""#,
        /// So many requests at once, after a time without any. "none": as many as the rate has in its time.
        burst: Option<u64> = r#""none""#,
        /// Requests in a day or a month of the calendar (UTC), like "10000/day", or "none". A restart forgets what was used.
        quota: Option<QuotaText> = r#""none""#,
        /// Requests in flight at the same time, WebSockets included; or "none".
        concurrency: Option<u64> = r#""none""#,
        /// What a request counts as, if not 1, like `{ write = 5, GET = 2, "/api/v3/search" = 10 }`: by path of a [[route]], else by
        /// method, else "read" (GET, HEAD, OPTIONS) or "write" (all others). 0: not counted.
        cost: LimitCostText = "{}",
        /// The routes that it is for, by `path` of a [[route]], or a prefix with `/*`; empty for all.
        routes: Vec<String> = "[]",
        /// The methods that it is for.
        methods: Vec<MethodName> = r#"["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]"#,
        /// Only for tokens with one of these scopes; empty for all.
        scopes: Vec<String> = "[]",
        /// Only for these users; empty for all.
        users: Vec<String> = "[]",
        /// Tokens whose record names a plan have the amounts of that [plan.NAME] instead, and a token with a rate of its own has
        /// that rate. The amounts here are for all others, and for plans that are not configured. For keys by token or user.
        plans: bool = "false",
        /// Bits of an IPv4 address that stand for it in a key.
        prefix_v4: u64 = "32",
        /// Bits of an IPv6 address.
        prefix_v6: u64 = "64",
        /// How many keys have a bucket of their own, up to 64 bytes each. While all of them are in use, new ones share one bucket.
        buckets: u64 = "65536",
        /// Count what would be refused, and refuse nothing.
        dry_run: bool = "false",
        /// All gateways with the same [shared_limits] count together: the rate and the quota are for all of them.
        shared: bool = "false",
    }
}

section! {
    /// Where gateways count together for each [[limit]], and for [guessing], with `shared = true`. All of them need the same
    /// settings here and there, but for addresses and passwords.
    SharedLimitsSection {
        /// "redis" (Redis 6 or later, or Valkey), "postgres" or "none".
        store: SharedStore = r#""none""#,
        /// Redis: `"host:port"` or `"unix:/path"`: the server or the sentinels.
        servers: Vec<UpstreamAddress> = r#"["127.0.0.1:6379"]"#,
        /// Redis: "single" or "sentinel".
        topology: RedisTopology = r#""single""#,
        /// Redis: the name of the master that the sentinels monitor.
        master: String = r#""mymaster""#,
        /// Redis: the number of the database.
        database: u64 = "0",
        /// Redis: an ACL user; empty for the default user.
        username: String = r#""""#,
        /// Redis: what the names of all keys begin with.
        prefix: String = r#""tollgate:limit:""#,
        /// PostgreSQL: `"postgres://user@host:port/database"`, or libpq's keywords.
        url: String = r#""postgres://tollgate@127.0.0.1:5432/tollgate""#,
        /// PostgreSQL: the schema of the tables, which are made if they are not there.
        schema: Identifier = r#""tollgate""#,
        /// File with the password; empty for none.
        password_file: String = r#""""#,
        /// "auto" (plain text to loopback addresses and Unix sockets, otherwise "verify-full"), "disable", "require"
        /// (encrypted, certificate not verified), "verify-ca" or "verify-full". Never falls back to plain text.
        tls: Tls = r#""auto""#,
        /// Trusted certificate authorities, a PEM file; empty for those of the system.
        tls_ca: String = r#""""#,
        /// Client certificate, a PEM file, if the server asks for one.
        tls_cert: String = r#""""#,
        /// Private key of `tls_cert`.
        tls_key: String = r#""""#,
        /// File with a secret, the same for all gateways, by which the names of keys are hashed. Without one, whoever reads the
        /// store can find out by trying which addresses and users have sent requests.
        secret_file: String = r#""""#,
        /// Connections to the store.
        connections: u64 = "2",
        /// How long a request waits for its lease. After that, `when_gone` decides.
        timeout: Duration = r#""200ms""#,
        /// While the store does not answer: "local" (each gateway gives its share of the limit, by the last known number of
        /// gateways), "open" (nothing is limited) or "closed" (503).
        when_gone: WhenGoneWord = r#""local""#,
    }
}

section! {
    /// For tokens whose record names this plan (`tollgate token create --plan gold`). Its amounts take the place of all amounts
    /// of a [[limit]] that says `plans = true`.
    PlanSection {
        /// As in a [[limit]]; "none", if there is a quota, concurrency, or a weight only.
        rate: Option<RateText> = r#""none""#,
        /// As in a [[limit]].
        burst: Option<u64> = r#""none""#,
        /// As in a [[limit]].
        quota: Option<QuotaText> = r#""none""#,
        /// As in a [[limit]].
        concurrency: Option<u64> = r#""none""#,
        /// In the queue of an upstream whose servers are busy (`queue_order = "fair"`), a token of this plan may have asked so
        /// many times as much as one without a plan before it comes behind it: 1 to 1000.
        weight: u64 = "1",
    }
}

section! {
    /// Clients that guess tokens, by address (IPv6: by network of 64 bits). From one that has sent too many failed tokens,
    /// those that are cached as valid pass as before; others take turns at the token store, and some get 429.
    GuessingSection {
        /// So many failed tokens an address may send at once, and again in each `per`: 10 to 1000000; or "none". A token that
        /// fails again and again counts once a minute; one that was valid before, as well; a missing one does not.
        failures: Option<u64> = r#""none""#,
        /// The time after which the budget is whole again: "1s" to "1h".
        per: Duration = r#""1m""#,
        /// How long the first pause takes. Each further one takes twice as long as the one before.
        pause: Duration = r#""10s""#,
        /// How long a pause can become.
        longest_pause: Duration = r#""5m""#,
        /// Lookups of unknown tokens in a second, for an address in a pause: 1 to 1000.
        lookups: u64 = "10",
        /// How long a request may wait for its turn; if it would have to wait for longer, it gets 429. "0s" to "1m".
        wait: Duration = r#""5s""#,
        /// Networks that are never counted, like that of an office: `"192.0.2.0/24"`.
        allow: Vec<Proxy> = "[]",
        /// All gateways with the same [shared_limits] count together: `failures` is for all of them.
        shared: bool = "false",
    }
}

section! {
    /// A backend. Requests are distributed to its servers in turn. A request goes to the first [[upstream]] unless its
    /// route names another one.
    UpstreamSection {
        /// Name in metrics, logs and routes.
        name: String = r#"!"api""#,
        /// `"host:port"` or `"unix:/path"`. A server that refuses connections or does not answer is left alone and looked
        /// at in the background until it is back; if all are down, all are used.
        /// An entry can also say `{ address = "host:port", weight = 3, backup = true }`: a server gets requests as its
        /// weight (1 to 100, else 1) is to those of the others, and a backup only while no other server is up.
        servers: Vec<ListedServer> = "![]",
        /// Speak TLS with the servers. Their certificates are verified, for the host name in `servers`. An IP address needs
        /// `tls_name`, and a Unix socket has no TLS. Checks speak TLS as well.
        tls: bool = "false",
        /// With TLS: a PEM file of the authorities that the servers' certificates are from. Empty: the system's.
        tls_ca: String = r#""""#,
        /// With TLS: a PEM file of a client certificate, for servers that ask for one.
        tls_cert: String = r#""""#,
        /// The PEM file of its key.
        tls_key: String = r#""""#,
        /// With TLS: the name that the servers are asked for (SNI) and their certificates verified for. Empty: the host name
        /// in `servers`.
        tls_name: String = r#""""#,
        /// With TLS: take any certificate. Whoever can put themselves between tollgate and the servers then gets the tokens
        /// of all clients. Warned about at every start, reload and check.
        insecure_skip_verify: bool = "false",
        /// The version of HTTP to speak with the servers: 1 or 2. HTTP/2 is negotiated over TLS (ALPN) and else presumed; a
        /// server that does not speak it is down. Up to 100 requests share a connection, or fewer if the server says so.
        /// WebSockets need 1.
        http: u64 = "1",
        /// Begin each connection with the client's address, in a header of the PROXY protocol, version 2. Such a connection
        /// carries one request only, which costs more. Servers that do not expect the header fail.
        send_proxy: bool = "false",
        /// A name with several addresses is one server, reached at whichever address answers. With `true`, each address
        /// is a server of its own.
        expand: bool = "false",
        /// How the server of a request is chosen: "round_robin" (in turn), "least_requests" (of two at random, the one with
        /// fewer requests in flight for its weight) or "hash" (requests with the same key go to the same server while it
        /// is up and has no more than 1.25 times its part of the requests in flight).
        balance: BalanceBy = r#""round_robin""#,
        /// With "hash": the key. "user", "token", "header:NAME" or "cookie:NAME". Requests without it go to the servers in
        /// turn.
        hash: HashKey = r#""user""#,
        /// A server that comes back gets a tenth of its weight first, and all of it after this time; or "none". It does not
        /// go with balance = "hash".
        slow_start: Option<Duration> = r#""none""#,
        /// Most requests in flight to one server, to the end of their responses; or "none". Further requests wait in a
        /// queue. "adaptive" finds the number by how long the server takes to answer, and counts requests up to the heads of
        /// their responses. `{ least = 2, most = 1000 }` is the same with bounds, of which these are the defaults.
        max_requests: Option<MaxRequests> = r#""none""#,
        /// Most requests that wait while all servers have `max_requests`. Further ones get 503.
        queue: u64 = "100",
        /// Which of them is next: "fair" (that of the caller who asks least, by token, else by client address; in a full queue,
        /// those of callers who ask most are refused) or "arrival".
        queue_order: QueueOrderWord = r#""fair""#,
        /// The longest time that a request waits. After that the client gets 503.
        queue_timeout: Duration = r#""5s""#,
        /// How often the names in `servers` are resolved again.
        resolve_interval: Duration = r#""30s""#,
        /// Active checks of every server: "none", "tcp" (a connection) or "http" (GET, without a token). A server that
        /// fails `check_failures` of them in a row, or the first one, gets no requests until `check_successes` in a row
        /// have passed.
        check: CheckKind = r#""none""#,
        /// With "http": the path and query.
        check_path: String = r#""/""#,
        /// With "http": the statuses of a healthy server.
        check_statuses: Vec<u64> = "[200]",
        /// With "http": what has to be in the first 64 KiB of the response's body; empty for anything.
        check_body: String = r#""""#,
        /// Another port for checks; "none" for the server's own.
        check_port: Option<u64> = r#""none""#,
        /// The time between two checks, up to a quarter longer or shorter.
        check_interval: Duration = r#""5s""#,
        /// Timeout of a check.
        check_timeout: Duration = r#""2s""#,
        /// Failed checks in a row after which a server is down.
        check_failures: u64 = "3",
        /// Passed checks in a row after which it is up again.
        check_successes: u64 = "2",
        /// Statuses of responses, like 502 or 503, of which three in a row make a server down. Anyone with a token for a
        /// URL that fails in this way can take servers away.
        failure_statuses: Vec<u64> = "[]",
        /// The same for responses that take longer to begin; or "none".
        failure_latency: Option<Duration> = r#""none""#,
        /// If fewer than this percentage of the servers are up, all are used: those that are left could not carry the
        /// load. 0: if none is up.
        panic_below: u64 = "0",
        /// How many requests may be sent again after a try that failed, as a share of all requests; "none" for no bound.
        /// Repeats after a refused connection do not count.
        retry_budget: Option<Fraction> = "0.2",
        /// So many may be sent again each second in any case. Ten seconds of it can be saved up.
        retry_floor: u64 = "10",
        /// Timeout of a connection attempt. Another server is tried after it, up to three times; then the client gets
        /// 504. The addresses of one name share it.
        connect_timeout: Duration = r#""2s""#,
        /// The longest pause between two parts of a response. After that the client gets 504.
        read_timeout: Duration = r#""60s""#,
        /// The longest time from the end of the request to the first byte of the response, or "none" for read_timeout. After
        /// that, another server is tried if the request can be repeated safely; the client gets 504 if not.
        per_try_timeout: Option<Duration> = r#""none""#,
        /// The longest time for the whole exchange, all tries, waits and both bodies included; or "none". After that the
        /// client gets 504, or its connection is closed if the response has begun. Not for WebSockets.
        request_timeout: Option<Duration> = r#""none""#,
        /// How long an unused connection is kept. It must be shorter than the backend's own keep-alive time (20s in
        /// Puma).
        idle_timeout: Duration = r#""15s""#,
    }
}

section! {
    /// A path with rules of its own. The most specific path applies, wherever it is in the file; of several with the same
    /// path, the one with the most specific host.
    RouteSection {
        /// A path pattern: `:name` is any one segment, a final `*` everything below, `/` alone every path.
        path: RoutePattern = r#"!"/""#,
        /// The hosts that the rules apply to, without port: names, and `"*.example.com"` for every name below one. Empty for
        /// every host. Clients can send any Host: one that no route with this path names gets the rules of a wider route.
        hosts: Vec<RouteHost> = "[]",
        /// The methods that the rules apply to.
        methods: Vec<MethodName> = r#"["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]"#,
        /// "required", "optional" (requests without a token are forwarded; a token that is present must be valid) or
        /// "none" (no lookup, and tokens are removed).
        auth: AuthMode = r#""required""#,
        /// Why these paths can be reached without a token. Needed for "optional" and "none"; `tollgate check` lists it.
        reason: String = r#""""#,
        /// Tokens in the query: "accept" or "refuse" (401).
        query_token: QueryToken = r#""accept""#,
        /// With auth = "none": do not remove tokens, for a backend that checks them itself.
        pass_token: bool = "false",
        /// Accept a token as the password of HTTP Basic as well, with the user names in [token] basic; 401 then offers Basic.
        basic: bool = "false",
        /// Credentials that may stand in the token's place, and that tollgate forwards without checking them: "job_token"
        /// (JOB-TOKEN, `job_token` in the query, and with `basic = true` the password of the user `gitlab-ci-token`) and
        /// "deploy_token" (DEPLOY-TOKEN). Beside a token, two of them, and fields of bodies get 401. Needs a `reason`.
        unchecked: Vec<OtherCredential> = "[]",
        /// The name of the [[upstream]] for these requests; empty for the first one.
        upstream: String = r#""""#,
        /// Other upstreams for tokens with a scope, like `[{ scope = "admin_api", upstream = "admin" }]`, or a
        /// `[[route.pool]]` for each. The first one whose scope the token has serves the request.
        pool: Vec<PoolText> = "[]",
        /// A share of the requests for another upstream, like `{ upstream = "next", share = 0.05, by = "user" }`, or "none".
        /// by: "user" and "token" (each stays on one side, and a growing share only moves more of them to the canary) or
        /// "request". Requests that have no such key, or for which the canary has no server, go to `upstream`. Not for
        /// those that go to a `pool`.
        canary: Option<CanaryText> = r#""none""#,
        /// Networks whose clients are let in, besides what [limits] says; with any of these, others get 403.
        allow: Vec<Proxy> = "[]",
        /// Networks whose clients get 403, whatever `allow` says.
        deny: Vec<Proxy> = "[]",
        /// The largest request body, or "none". "inherit": as in [limits].
        body_bytes: Inherited<Option<Bytes>> = r#""inherit""#,
        /// The longest pause between two parts of a response. "inherit": as in the [[upstream]].
        read_timeout: Inherited<Duration> = r#""inherit""#,
        /// The longest time for the whole exchange, or "none". "inherit": as in the [[upstream]].
        request_timeout: Inherited<Option<Duration>> = r#""inherit""#,
        /// What the backend gets in place of the literal beginning of `path` (up to the first `:name` or `*`), or "none". What is
        /// behind it is forwarded byte for byte. A beginning that is spelled in another way (`/%61pi`, `//`) gets 400. Responses
        /// are not changed, so a `Location` has the backend's own prefix.
        rewrite_prefix: Option<Prefix> = r#""none""#,
        /// Fields of the request as the backend gets it: those in `set` take the place of what the client sent, those in
        /// `remove` go. Not for credentials, and not for fields that tollgate writes or judges itself.
        request_headers: HeaderEdits = "{ set = {}, remove = [] }",
        /// The same for the backend's response. Responses of tollgate itself are not changed.
        response_headers: HeaderEdits = "{ set = {}, remove = [] }",
    }
}

section! {
    /// Distributed traces (W3C Trace Context).
    TraceSection {
        /// The fields `traceparent` and `tracestate`: "pass" (a client's go to the backend as they came), "make" (the same, with
        /// a span of tollgate's own in between; a request without a trace begins one), "restart" (every request begins a
        /// trace: for clients who must not choose ids and sampling) or "drop". A malformed or repeated traceparent is
        /// removed together with tracestate.
        context: TraceFields = r#""pass""#,
        /// Collector that spans are sent to by OTLP over HTTP (JSON, without TLS), like `"http://127.0.0.1:4318/v1/traces"`, or
        /// "none". With context "make" or "restart" only.
        otlp: Option<CollectorUrl> = r#""none""#,
        /// The share of traces begun here that are recorded. One that a client began is recorded if its sampled flag says so.
        sample: Ratio = "1.0",
    }
}

section! {
    /// Logs. They never contain tokens.
    LogSection {
        /// Access log, one JSON object for each request: "stdout", "stderr", "off", "syslog", "journald", or a file (relative to
        /// the folder of this configuration).
        access: String = r#""stdout""#,
        /// Where "syslog" sends lines, as RFC 5424: `"unix:/path"` of a datagram socket, or `"host:port"` for UDP.
        syslog: SyslogTarget = r#""unix:/dev/log""#,
        /// The socket of "journald".
        journald: FilePath = r#""/run/systemd/journal/socket""#,
        /// Level of the process log on stderr: "error", "warn" or "info".
        level: Level = r#""info""#,
    }
}

words! { SandboxWord { Off = "off", Try = "try", On = "on" } }
words! { BodyPolicy { Refuse = "refuse", Ignore = "ignore" } }
words! { Untyped { Watch = "watch", Refuse = "refuse", OctetStream = "octet-stream" } }
words! { Forward { Token = "token", Identity = "identity", Both = "both", None = "none" } }
words! { ListenerMode { Forward = "forward", Verdict = "verdict" } }
words! { VerdictSourceWord { None = "none", Nginx = "nginx", Forwarded = "forwarded", Envoy = "envoy" } }
words! { OtherCredential { JobToken = "job_token", DeployToken = "deploy_token" } }
words! { OverridePolicy { Refuse = "refuse", Judge = "judge" } }
words! { AmbiguousPathsWord { Pass = "pass", Refuse = "refuse" } }
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
words! { AuthMode { Required = "required", Optional = "optional", None = "none" } }
words! { QueryToken { Accept = "accept", Refuse = "refuse" } }
words! { CheckKind { None = "none", Tcp = "tcp", Http = "http" } }
words! { QueueOrderWord { Fair = "fair", Arrival = "arrival" } }
words! { BalanceBy { RoundRobin = "round_robin", LeastRequests = "least_requests", Hash = "hash" } }
words! { TlsVersions { Intermediate = "intermediate", Modern = "modern" } }
words! { ClientCertificate { Required = "required", Optional = "optional" } }
words! { CanaryKey { User = "user", Token = "token", Request = "request" } }
words! { TraceFields { Pass = "pass", Make = "make", Restart = "restart", Drop = "drop" } }
words! { SharedStore { None = "none", Redis = "redis", Postgres = "postgres" } }
words! { WhenGoneWord { Local = "local", Open = "open", Closed = "closed" } }
words! { Level { Error = "error", Warn = "warn", Info = "info" } }

macro_rules! settings {
    ($($(#[$doc:meta])* $name:ident($inner:ty) = $read:expr;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug)]
        pub(crate) struct $name(pub(crate) $inner);

        impl Setting for $name {
            fn read(value: &DeValue<'_>) -> Result<Self, Vec<InvalidValue>> {
                let read: fn(&str) -> Result<$inner, InvalidValue> = $read;
                text(value).and_then(read).map(Self).map_err(|invalid| vec![invalid])
            }

            fn schema() -> Value {
                json!({ "type": "string" })
            }
        }
    )*};
}

settings! {
    Sha256Text(Digest) = |text| Digest::from_hex(text).ok_or_else(|| {
        // What stands there may be the token itself: it is not repeated.
        invalid("is not a SHA-256 in 64 hex digits", "write what `printf %s \"$TOKEN\" | sha256sum` prints, never the token itself")
    });
    ListenAddress(Listen) = |text| match text.strip_prefix("unix:") {
        Some(path) if path.starts_with('/') => Ok(Listen::Unix(path.into(), 0o660)),
        Some(_) => Err(invalid("a socket's path must be absolute", "write it like \"unix:/run/tollgate/api.sock\"")),
        None => match text.parse::<SocketAddr>() {
            Ok(_) => Ok(Listen::Tcp(text.into())),
            Err(_) => Err(invalid("is not an address to listen on", "write it like \"127.0.0.1:8080\", \"[::]:8080\" or \"unix:/path\"")),
        },
    };
    SyslogTarget(SyslogAddress) = |text| {
        let instead = "write it like \"unix:/dev/log\" or \"loghost:514\"";
        match (text.strip_prefix("unix:"), text.rsplit_once(':')) {
            (Some(path), _) if path.starts_with('/') => Ok(SyslogAddress::Unix(path.into())),
            (Some(_), _) => Err(invalid("a socket's path must be absolute", instead)),
            (None, Some((host, port))) if !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0) && !text.contains('/') => {
                Ok(SyslogAddress::Udp(text.into()))
            }
            (None, _) => Err(invalid("is not the address of a syslog daemon", instead)),
        }
    };
    CollectorUrl(CollectorPlace) = |text| {
        let instead = "write it like \"http://127.0.0.1:4318/v1/traces\"";
        let url = match text.parse::<http::Uri>() {
            Ok(url) if url.scheme_str() == Some("https") => {
                return Err(invalid("has TLS, which tollgate does not speak to a collector", "use a collector on this machine, which sends on by TLS"));
            }
            Ok(url) if url.scheme_str() == Some("http") => url,
            _ => return Err(invalid("is not the URL of a collector", instead)),
        };
        match url.authority() {
            Some(authority) if authority.port_u16().is_some_and(|port| port > 0) && !authority.as_str().contains('@') => {
                let path = url.path_and_query().map_or("/", |path| path.as_str());
                let path = if path == "/" { "/v1/traces" } else { path };
                Ok(CollectorPlace { authority: authority.as_str().into(), path: path.into() })
            }
            _ => Err(invalid("must have a host and a port", instead)),
        }
    };
    UpstreamAddress(ServerAddress) = |text| {
        let instead = "write it like \"127.0.0.1:3000\", \"backend:3000\" or \"unix:/path\"";
        match (text.strip_prefix("unix:"), text.rsplit_once(':')) {
            (Some(path), _) if path.starts_with('/') => Ok(ServerAddress::Unix(path.into())),
            (Some(_), _) => Err(invalid("a socket's path must be absolute", instead)),
            (None, Some((host, port))) if !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0) && !text.contains('/') => {
                Ok(ServerAddress::Tcp(text.into()))
            }
            (None, _) => Err(invalid("is not the address of a server", instead)),
        }
    };
    HashKey(HashBy) = |text| {
        let name = |name: &str| {
            let plain = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b));
            plain.then(|| name.to_owned())
        };
        let named = |kind: &str| text.strip_prefix(kind).and_then(name);
        match (text, named("header:"), named("cookie:")) {
            ("user", ..) => Ok(HashBy::User),
            ("token", ..) => Ok(HashBy::Token),
            (_, Some(header), _) => Ok(HashBy::Header(header)),
            (_, _, Some(cookie)) => Ok(HashBy::Cookie(cookie)),
            _ => Err(invalid("is nothing to choose a server by", "use \"user\", \"token\", \"header:NAME\" or \"cookie:NAME\"")),
        }
    };
    LimitKeyText(LimitKeyPart) = |text| {
        let plain = |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        match (text, text.strip_prefix("header:")) {
            ("token", _) => Ok(LimitKeyPart::Token),
            ("user", _) => Ok(LimitKeyPart::User),
            ("address", _) => Ok(LimitKeyPart::Address),
            ("route", _) => Ok(LimitKeyPart::Route),
            ("scope", _) => Ok(LimitKeyPart::Scope),
            (_, Some(name)) if plain(name) => Ok(LimitKeyPart::Header(name.into())),
            ("header", _) | (_, Some(_)) => Err(invalid("is without the name of a header", "write it like \"header:X-Tenant\"")),
            _ => Err(invalid("is nothing to count by", "use \"token\", \"user\", \"address\", \"route\", \"scope\" or \"header:NAME\"")),
        }
    };
    RateText((u64, u64)) = |text| {
        let like = "write it like \"10/s\", \"600/min\" or \"5000/h\"";
        if text.split_once('/').is_some_and(|(_, unit)| matches!(unit.trim(), "day" | "month")) {
            return Err(invalid("is a quota", "use `quota` for days and months; a rate is by \"s\", \"min\" or \"h\""));
        }
        match parse_rate(text) {
            Some((count @ 1..=RefillRate::MOST_REQUESTS, period_ms)) => Ok((count, period_ms)),
            Some(_) => Err(invalid("is out of range", format!("use 1 to {} requests", RefillRate::MOST_REQUESTS))),
            None => Err(invalid("is not a rate", like)),
        }
    };
    QuotaText(CalendarQuota) = |text| {
        let like = "write it like \"10000/day\" or \"200000/month\"";
        let (count, unit) = text.split_once('/').ok_or_else(|| invalid("is not a quota", like))?;
        let period = match unit.trim() {
            "day" => CalendarPeriod::Day,
            "month" => CalendarPeriod::Month,
            _ => return Err(invalid("is not a quota", like)),
        };
        match count.trim().parse() {
            Ok(requests @ 1..=CalendarQuota::MOST_REQUESTS) => Ok(CalendarQuota { requests, period }),
            Ok(_) => Err(invalid("is out of range", format!("use 1 to {} requests", CalendarQuota::MOST_REQUESTS))),
            Err(_) => Err(invalid("is not a quota", like)),
        }
    };
    Proxy(TrustedPeer) = |text| match (text, text.parse::<ipnet::IpNet>(), text.parse::<std::net::IpAddr>()) {
        ("unix", ..) => Ok(TrustedPeer::Unix),
        (_, Ok(network), _) => Ok(TrustedPeer::Network(network)),
        (_, _, Ok(ip)) => Ok(TrustedPeer::Network(ip.into())),
        _ => Err(invalid("is not a network", "write it like \"10.0.0.0/8\", \"192.0.2.1\" or \"unix\"")),
    };
    Prefix(String) = |text| match Pattern::subtree(text) {
        Ok(_) if !text.contains([':', '*']) => Ok(text.into()),
        Ok(_) => Err(invalid("must be a plain path", "put patterns into a [[route]]")),
        Err(error) => Err(invalid(error.to_string(), "write it like \"/api/v3\"")),
    };
    RoutePattern(PatternText) = |text| match text.parse::<Pattern>() {
        Ok(pattern) => Ok(PatternText { text: text.into(), pattern }),
        Err(error) => Err(invalid(error.to_string(), "write it like \"/api/v3/projects/:id/issues\" or \"/api/v3/templates/*\"")),
    };
    RouteHost(HostPattern) = |text| match text.parse::<HostPattern>() {
        Ok(pattern) => Ok(pattern),
        Err(error) => Err(invalid(error.to_string(), "write a name alone, without scheme or port, like \"api.example.com\" or \"*.example.com\"")),
    };
    MethodName(Method) = |text| match Method::of(text.as_bytes()) {
        Method::Other => Err(invalid("is not a method that is forwarded", "use GET, HEAD, POST, PUT, PATCH, DELETE or OPTIONS")),
        method => Ok(method),
    };
    HeaderName(String) = |text| {
        let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        let taken = ["host", "connection", "content-length", "content-type", "transfer-encoding", "upgrade", "expect", "cookie", "authorization"];
        match plain {
            true if !taken.contains(&text.to_ascii_lowercase().as_str()) => Ok(text.into()),
            true => Err(invalid("is a header with another meaning", "write it like \"PRIVATE-TOKEN\"; for Authorization there is token.bearer")),
            false => Err(invalid("must have letters, digits and `-` only", "write it like \"PRIVATE-TOKEN\"")),
        }
    };
    ParameterName(String) = |text| {
        let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        match plain {
            true if !["page", "per_page", "sudo", "_method"].contains(&text) => Ok(text.into()),
            true => Err(invalid("is a parameter with another meaning", "write it like \"private_token\"")),
            false => Err(invalid("must have letters, digits and `_` only", "write it like \"private_token\"")),
        }
    };
    HostName(String) = |text| {
        let name = text.strip_suffix('.').unwrap_or(text);
        let plain = |label: &str| !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
        match name.split('.').all(plain) && name.len() <= 253 {
            true => Ok(name.to_ascii_lowercase()),
            false => Err(invalid("is not a host name", "write a name alone, without scheme, port or `*`, like \"tollgate.internal\"")),
        }
    };
    Identifier(String) = |text| {
        let plain = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        match plain && text.len() <= 63 && text.starts_with(|c: char| !c.is_ascii_digit()) {
            true => Ok(text.into()),
            false => Err(invalid("must have lower-case letters, digits and `_` only, and not begin with a digit", "write it like \"tollgate\"")),
        }
    };
    FilePath(PathBuf) = |text| match text {
        "" => Err(invalid("is empty", "write the path of a file")),
        _ => Ok(text.into()),
    };
}

#[derive(Clone, Debug)]
pub(crate) struct CollectorPlace {
    pub(crate) authority: String,
    pub(crate) path: String,
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
    fn read(value: &DeValue<'_>) -> Result<Self, Vec<InvalidValue>> {
        if value.as_str() == Some("inherit") {
            return Ok(Self(None));
        }
        T::read(value).map(|value| Self(Some(value)))
    }

    fn schema() -> Value {
        json!({ "anyOf": [{ "const": "inherit" }, T::schema()] })
    }
}

/// One of the kinds.
#[derive(Clone, Debug)]
pub(crate) enum StoreSection {
    Sqlite(SqliteSection),
    File(FileSection),
    Postgres(PostgresSection),
    Redis(RedisSection),
    Introspection(IntrospectionSection),
}

impl StoreSection {
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
            Some(Ok(StoreKind::File)) => Self::File(FileSection::read(section)),
            Some(Ok(StoreKind::Postgres)) => Self::Postgres(PostgresSection::read(section)),
            Some(Ok(StoreKind::Redis)) => Self::Redis(RedisSection::read(section)),
            Some(Ok(StoreKind::Introspection)) => Self::Introspection(IntrospectionSection::read(section)),
            Some(Ok(StoreKind::Sqlite)) | None => Self::Sqlite(SqliteSection::read(section)),
            Some(Err(_)) => {
                // Which keys it may have is not known: the kind is reported, and nothing else of it.
                let _: StoreKind = section.field("kind", r#""sqlite""#);
                section.places.spoil(section.name.clone());
                section.table = None;
                Self::Sqlite(SqliteSection::read(section))
            }
        }
    }
}

impl Setting for HeaderEdits {
    fn read(value: &DeValue<'_>) -> Result<Self, Vec<InvalidValue>> {
        let like = "write it like { set = { \"X-Site\" = \"main\" }, remove = [\"X-Debug\"] }";
        let table = value.as_table().ok_or_else(|| vec![invalid("must be a table", like)])?;
        let mut edits = Self::default();
        for (key, value) in table.iter() {
            match (key.get_ref().as_ref(), value.get_ref().as_table()) {
                ("set", Some(fields)) => {
                    for (name, value) in fields.iter() {
                        let value = text(value.get_ref()).map_err(|invalid| vec![invalid])?;
                        edits.set.push((name.get_ref().to_string(), value.to_owned()));
                    }
                }
                ("remove", _) => edits.remove = Vec::read(value.get_ref()).map_err(whole)?,
                ("set", None) => return Err(vec![invalid("set: must be a table", like)]),
                (key, _) => return Err(vec![invalid(format!("has the unknown key `{key}`"), "use set and remove")]),
            }
        }
        Ok(edits)
    }

    fn schema() -> Value {
        let fields = json!({ "type": "object", "additionalProperties": { "type": "string" } });
        json!({ "type": "object", "properties": { "set": fields, "remove": Vec::<String>::schema() }, "additionalProperties": false })
    }
}

/// User names of HTTP Basic.
#[derive(Clone, Debug)]
pub(crate) struct BasicUsersText(pub(crate) BasicUsers);

impl Setting for BasicUsersText {
    fn read(value: &DeValue<'_>) -> Result<Self, Vec<InvalidValue>> {
        let like = "write \"none\", \"any\", \"user\", or a list of names like [\"oauth2\"]";
        match (value.as_str(), value.as_array()) {
            (Some("none"), _) => Ok(Self(BasicUsers::Nobody)),
            (Some("any"), _) => Ok(Self(BasicUsers::Any)),
            (Some("user"), _) => Ok(Self(BasicUsers::Own)),
            (None, Some(_)) => Vec::read(value).map(BasicUsers::Listed).map(Self),
            _ => Err(vec![invalid("is not allowed here", like)]),
        }
    }

    fn schema() -> Value {
        json!({ "anyOf": [{ "enum": ["none", "any", "user"] }, Vec::<String>::schema()] })
    }
}

/// What requests count as.
#[derive(Clone, Debug)]
pub(crate) struct LimitCostText(pub(crate) LimitCosts);

impl Setting for LimitCostText {
    fn read(value: &DeValue<'_>) -> Result<Self, Vec<InvalidValue>> {
        let like = "write it like { write = 5, GET = 2, \"/api/v3/search\" = 10 }";
        let table = value.as_table().ok_or_else(|| vec![invalid("must be a table", like)])?;
        let is_read = |method: Method| matches!(method, Method::Get | Method::Head | Method::Options);
        let mut costs = LimitCosts::default();
        // By kind first: a method says more.
        for by_kind in [true, false] {
            for (key, value) in table.iter() {
                let key = key.get_ref().as_ref();
                let cost = u64::read(value.get_ref()).ok().and_then(|cost| u32::try_from(cost).ok());
                let cost =
                    cost.ok_or_else(|| vec![invalid(format!("{key}: must be a whole number, 0 or more"), like)])?;
                let mut set = |holds: &dyn Fn(Method) -> bool| {
                    let all = Method::FORWARDED.into_iter().filter(|method| holds(*method));
                    all.for_each(|method| {
                        costs.methods.iter_mut().skip(method.index()).take(1).for_each(|own| *own = cost)
                    });
                };
                match (key, Method::of(key.as_bytes())) {
                    ("read", _) if by_kind => set(&is_read),
                    ("write", _) if by_kind => set(&|method| !is_read(method)),
                    ("read" | "write", _) => {}
                    (path, _) if path.starts_with('/') && by_kind => costs.routes.push((path.to_owned(), cost)),
                    (path, _) if path.starts_with('/') => {}
                    (_, Method::Other) => {
                        let what = format!("has the key `{key}`, which is no method and no path");
                        return Err(vec![invalid(what, like)]);
                    }
                    (_, named) if !by_kind => set(&|method| method == named),
                    _ => {}
                }
            }
        }
        Ok(Self(costs))
    }

    fn schema() -> Value {
        json!({ "type": "object", "additionalProperties": u64::schema() })
    }
}

/// A certificate of a listener.
#[derive(Clone, Debug)]
pub(crate) struct CertificateText {
    pub(crate) chain: String,
    pub(crate) key: String,
}

impl Setting for CertificateText {
    fn read(value: &DeValue<'_>) -> Result<Self, Vec<InvalidValue>> {
        let like = "write it like { chain = \"api.pem\", key = \"api.key\" }";
        let [chain, key] = entries(value, ["chain", "key"], like)?;
        Ok(Self { chain: String::read(chain)?, key: String::read(key)? })
    }

    fn schema() -> Value {
        json!({ "type": "object", "properties": { "chain": String::schema(), "key": String::schema() }, "required": ["chain", "key"], "additionalProperties": false })
    }
}

/// An entry of a route's list of pools.
#[derive(Clone, Debug)]
pub(crate) struct PoolText {
    pub(crate) scope: String,
    pub(crate) upstream: String,
}

impl Setting for PoolText {
    fn read(value: &DeValue<'_>) -> Result<Self, Vec<InvalidValue>> {
        let like = "write it like { scope = \"admin_api\", upstream = \"admin\" }";
        let [scope, upstream] = entries(value, ["scope", "upstream"], like)?;
        let word = |value: &DeValue<'_>| match text(value) {
            Ok(word) if !word.is_empty() && !word.contains(char::is_whitespace) => Ok(word.to_owned()),
            Ok(_) => Err(vec![invalid("scope: must be one word", like)]),
            Err(invalid) => Err(vec![invalid]),
        };
        Ok(Self { scope: word(scope)?, upstream: String::read(upstream)? })
    }

    fn schema() -> Value {
        json!({ "type": "object", "properties": { "scope": String::schema(), "upstream": String::schema() }, "required": ["scope", "upstream"], "additionalProperties": false })
    }
}

#[derive(Clone, Debug)]
pub(crate) struct CanaryText {
    pub(crate) upstream: String,
    pub(crate) share: f64,
    pub(crate) by: CanaryKey,
}

impl Setting for CanaryText {
    fn read(value: &DeValue<'_>) -> Result<Self, Vec<InvalidValue>> {
        let like = "write it like { upstream = \"next\", share = 0.05, by = \"user\" }";
        let [upstream, share, by] = entries(value, ["upstream", "share", "by"], like)?;
        let number =
            share.as_float().map(|number| number.as_str()).or(share.as_integer().map(|number| number.as_str()));
        let share = number.and_then(|text| text.parse::<f64>().ok()).filter(|share| (0.0..=1.0).contains(share));
        let share = share.ok_or_else(|| vec![invalid("share: must be a number from 0 to 1", like)])?;
        let by = CanaryKey::read(by)
            .map_err(|_| vec![invalid("by: is not allowed here", "use one of: \"user\", \"token\", \"request\"")])?;
        Ok(Self { upstream: String::read(upstream)?, share, by })
    }

    fn schema() -> Value {
        let share = json!({ "type": "number", "minimum": 0, "maximum": 1 });
        json!({ "type": "object", "properties": { "upstream": String::schema(), "share": share, "by": CanaryKey::schema() }, "required": ["upstream", "share", "by"], "additionalProperties": false })
    }
}

/// The values of a table that has these keys and no others.
fn entries<'v, 't, const N: usize>(
    value: &'v DeValue<'t>,
    keys: [&str; N],
    like: &str,
) -> Result<[&'v DeValue<'t>; N], Vec<InvalidValue>> {
    let table = value.as_table().ok_or_else(|| vec![invalid("must be a table", like)])?;
    let unknown = table.iter().map(|(key, _)| key.get_ref().as_ref()).find(|key| !keys.contains(key));
    if let Some(key) = unknown {
        return Err(vec![invalid(format!("has the unknown key `{key}`"), like)]);
    }
    let mut found = [value; N];
    for (place, key) in keys.into_iter().enumerate() {
        let value = table.get(key).ok_or_else(|| vec![invalid(format!("has no `{key}`"), like)])?;
        found[place] = value.get_ref();
    }
    Ok(found)
}

/// Of a list within a value: no element of the value itself.
fn whole(all: Vec<InvalidValue>) -> Vec<InvalidValue> {
    all.into_iter().map(|invalid| InvalidValue { element: None, ..invalid }).collect()
}

/// A number, "adaptive", or the bounds of that.
impl Setting for MaxRequests {
    fn read(value: &DeValue<'_>) -> Result<Self, Vec<InvalidValue>> {
        let like = "write it like 50, \"adaptive\" or { least = 2, most = 1000 }";
        // One that is too large for its type is out of range, which is checked later.
        let number = |value| u64::read(value).map(|number| u32::try_from(number).unwrap_or(u32::MAX));
        let mut bounds = AdaptiveBounds::default();
        let Some(table) = value.as_table() else {
            return match value.as_str() {
                Some("adaptive") => Ok(Self::Adaptive(bounds)),
                _ => {
                    number(value).map(Self::Fixed).map_err(|_| vec![invalid("must be a number or \"adaptive\"", like)])
                }
            };
        };
        for (key, value) in table.iter() {
            let within = |invalid: InvalidValue| InvalidValue {
                what: format!("{}: {}", key.get_ref(), invalid.what),
                ..invalid
            };
            let read = match key.get_ref().as_ref() {
                "least" => number(value.get_ref()).map(|least| bounds.least = least),
                "most" => number(value.get_ref()).map(|most| bounds.most = most),
                key => return Err(vec![invalid(format!("has the unknown key `{key}`"), like)]),
            };
            read.map_err(|all| all.into_iter().map(within).collect::<Vec<_>>())?;
        }
        Ok(Self::Adaptive(bounds))
    }

    fn schema() -> Value {
        let bounds = json!({ "least": u64::schema(), "most": u64::schema() });
        json!({ "anyOf": [{ "const": "adaptive" }, u64::schema(), { "type": "object", "properties": bounds, "additionalProperties": false }] })
    }
}

/// An address, or a table with more about the server.
impl Setting for ListedServer {
    fn read(value: &DeValue<'_>) -> Result<Self, Vec<InvalidValue>> {
        let plain = |address: UpstreamAddress| Self { address: address.0, weight: 1, backup: false };
        let Some(table) = value.as_table() else { return UpstreamAddress::read(value).map(plain) };
        let Some(address) = table.get("address") else {
            return Err(vec![invalid("has no address", "write it like { address = \"127.0.0.1:3000\", weight = 2 }")]);
        };
        let mut listed = plain(UpstreamAddress::read(address.get_ref())?);
        for (key, value) in table.iter() {
            let read = match key.get_ref().as_ref() {
                "address" => Ok(()),
                // One that is too large for its type is out of range, which is checked later.
                "weight" => {
                    u64::read(value.get_ref()).map(|weight| listed.weight = u32::try_from(weight).unwrap_or(u32::MAX))
                }
                "backup" => bool::read(value.get_ref()).map(|backup| listed.backup = backup),
                key => Err(vec![invalid(format!("has the unknown key `{key}`"), "use address, weight and backup")]),
            };
            let within = |invalid: InvalidValue| InvalidValue {
                what: format!("{}: {}", key.get_ref(), invalid.what),
                ..invalid
            };
            read.map_err(|all| all.into_iter().map(within).collect::<Vec<_>>())?;
        }
        Ok(listed)
    }

    fn schema() -> Value {
        let more = json!({ "address": String::schema(), "weight": u64::schema(), "backup": bool::schema() });
        json!({ "anyOf": [String::schema(), { "type": "object", "properties": more, "required": ["address"], "additionalProperties": false }] })
    }
}
