//! From what the file says to the settings that the stages declare. Here is what one key says about another.

use super::file::{
    self, Auth as FileAuth, Beyond, BodyPolicy, Forward, QueryToken, ScopePreset, Strip, Switch, TrustedPeer,
};
use super::section::{Problem, closest};
use super::{Document, File};
use crate::edge::{ServerSettings, Timeouts};
use crate::forward::{BackendCredential, ForwardRules};
use crate::identity::CacheSettings;
use crate::policy::{Policy, ScopeRule, Scopes};
use crate::reply::cors::{Cors, wrong_origin};
use crate::request::body::{BodyRules, KeySet, UntypedBody};
use crate::request::origin::TrustedProxies;
use crate::request::page::{HIGHEST, PageRules, Pagination, TooDeep};
use crate::request::query::{Key, Names};
use crate::request::route::{Auth, Methods, Pattern, Route, Routes};
use crate::request::token::TokenRules;
use crate::request::view::Method;
use crate::request::{Limits, MethodOverride, Rules, Switches};
use crate::store::NamedStore;
use crate::upstream::UpstreamSettings;
use ipnet::{IpNet, Ipv4Net};
use log::LevelFilter;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Everything that is configured, checked.
#[derive(Clone, Debug)]
pub struct Settings {
    pub server: ServerSettings,
    /// Names that the admin listener answers to, in lower case.
    pub admin_hosts: Vec<String>,
    pub rules: Rules,
    pub policy: Policy,
    pub forward: ForwardRules,
    pub cors: Cors,
    pub stores: Vec<NamedStore>,
    /// Where the cache is kept over a restart.
    pub snapshot: Option<PathBuf>,
    pub cache: CacheSettings,
    pub upstreams: Vec<UpstreamSettings>,
    pub timeouts: Timeouts,
    pub access_log: LogTarget,
    pub level: LevelFilter,
    /// What is allowed and dangerous, for people: said at every start and reload, and by `check`.
    pub warnings: Vec<String>,
    /// What the file says, to name what a reload changes.
    pub document: Document,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogTarget {
    Off,
    Stdout,
    File(PathBuf),
}

/// pingora and the http crate can't take a longer target.
const LARGEST_TARGET: u64 = 60 * 1024;
const LARGEST_HEADER: u64 = 512 * 1024;

pub(super) fn resolve(file: &File, document: Document, folder: &Path, problems: &mut Vec<Problem>) -> Settings {
    let mut check = Check { problems, warnings: Vec::new() };
    let switches = Switches {
        sudo: file.token.sudo == Switch::Allow,
        access_token: file.token.access_token == Switch::Allow,
        job_token: file.token.job_token == Switch::Allow,
        cookies: file.token.cookies == Strip::Allow,
        authorization: file.token.authorization == Strip::Allow,
        path_and_user_headers: file.token.path_and_user_headers == Strip::Allow,
    };
    let token = TokenRules { header: file.token.header.0.clone(), bearer: file.token.bearer };
    let names = Names { token: file.token.query.0.clone() };
    let upstreams = check.upstreams(&file.upstreams);
    let rules = Rules {
        limits: check.limits(&file.limits),
        routes: check.routes(file, &upstreams),
        cors_preflight: file.api.cors_preflight,
        token: token.clone(),
        names: names.clone(),
        method_override: match file.token.method_override {
            file::MethodOverride::Refuse => MethodOverride::Refuse,
            file::MethodOverride::Judge => MethodOverride::Judge,
        },
        switches,
        trusted_proxies: trusted(&file.server.trusted_proxies),
        pagination: check.pagination(file),
        body: (file.token.body == BodyPolicy::Refuse)
            .then(|| Arc::new(body_rules(names, switches, file.token.untyped_body))),
    };
    Settings {
        server: check.server(file),
        admin_hosts: file.admin.hosts.iter().map(|host| host.0.clone()).collect(),
        rules,
        forward: ForwardRules {
            credential: match file.token.forward {
                Forward::Token => BackendCredential::Token,
                Forward::Identity => BackendCredential::Identity,
                Forward::Both => BackendCredential::Both,
                Forward::None => BackendCredential::None,
            },
            token,
            switches,
            deprecate_query_token: file.token.query_deprecation,
        },
        cors: check.cors(&file.api),
        policy: Policy { switches, scopes: check.scopes(file) },
        stores: check.stores(file, folder, &upstreams),
        snapshot: Some(&file.cache.snapshot).filter(|path| !path.is_empty()).map(|path| folder.join(path)),
        cache: check.cache(&file.cache),
        upstreams,
        timeouts: Timeouts { header: file.limits.header_timeout, idle: file.limits.idle_timeout },
        access_log: match file.log.access.as_str() {
            "off" => LogTarget::Off,
            "stdout" => LogTarget::Stdout,
            path => LogTarget::File(folder.join(path)),
        },
        level: match file.log.level {
            file::Level::Error => LevelFilter::Error,
            file::Level::Warn => LevelFilter::Warn,
            file::Level::Info => LevelFilter::Info,
        },
        warnings: check.warnings,
        document,
    }
}

pub(super) struct Check<'p> {
    problems: &'p mut Vec<Problem>,
    warnings: Vec<String>,
}

impl Check<'_> {
    pub(super) fn warning(&mut self, what: String) {
        self.warnings.push(what);
    }

    pub(super) fn problem(
        &mut self,
        line: usize,
        key: impl Into<String>,
        why: impl Into<String>,
        instead: impl Into<String>,
    ) {
        self.problems.push(Problem { line, key: key.into(), why: why.into(), instead: instead.into() });
    }

    pub(super) fn at_least(&mut self, value: Duration, least: Duration, line: usize, key: &str) -> Duration {
        if value < least {
            self.problem(line, key, format!("{value:?} is too short"), format!("at least {least:?}"));
        }
        value
    }

    fn server(&mut self, file: &File) -> ServerSettings {
        if file.server.listen.is_empty() {
            self.problem(
                file.server.line,
                "server.listen",
                "is empty: nobody could reach the API",
                "like [\"127.0.0.1:8080\"]",
            );
        }
        let listen: Vec<_> = file.server.listen.iter().map(|address| address.0.clone()).collect();
        let admin = file.admin.listen.as_ref().map(|address| address.0.clone());
        for (index, address) in listen.iter().enumerate() {
            if listen[..index].contains(address) || admin.as_ref() == Some(address) {
                self.problem(
                    file.server.line,
                    "server.listen",
                    "an address stands there twice",
                    "also counting admin.listen",
                );
            }
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        if file.server.threads > 512 {
            self.problem(file.server.line, "server.threads", "is more than 512", "0 means one for each core");
        }
        let threads =
            if file.server.threads == 0 { cores } else { usize::try_from(file.server.threads).unwrap_or(cores) };
        ServerSettings { listen, admin, threads, grace: file.server.shutdown_grace }
    }

    fn cors(&mut self, api: &file::Api) -> Cors {
        match api.cors_origins.as_slice() {
            [] => Cors::Off,
            [all] if all == "*" => Cors::Anybody,
            origins => {
                let mut wrong = |why: String, instead| self.problem(api.line, "api.cors_origins", why, instead);
                for (index, origin) in origins.iter().enumerate() {
                    if origin == "*" {
                        wrong(
                            "has \"*\" beside other origins".into(),
                            "\"*\" alone lets every page read, or name each origin",
                        );
                    } else if let Some((why, instead)) = wrong_origin(origin) {
                        wrong(why, instead);
                    } else if origins[..index].contains(origin) {
                        wrong(format!("\"{origin}\" stands there twice"), "once is enough");
                    }
                }
                Cors::Origins(origins.iter().map(|origin| origin.as_str().into()).collect())
            }
        }
    }

    fn limits(&mut self, limits: &file::Limits) -> Limits {
        let mut size = |key: &str, value: u64, largest: u64| {
            if value < 256 || value > largest {
                self.problem(limits.line, key, "is out of range", format!("from 256B to {}KiB", largest / 1024));
            }
            usize::try_from(value.clamp(256, largest)).unwrap_or(256)
        };
        let header_bytes = size("limits.header_bytes", limits.header_bytes.0, LARGEST_HEADER);
        let target_bytes = size("limits.target_bytes", limits.target_bytes.0, LARGEST_TARGET);
        if target_bytes > header_bytes {
            self.problem(
                limits.line,
                "limits.target_bytes",
                "is more than limits.header_bytes",
                "the target is a part of the head",
            );
        }
        self.at_least(limits.header_timeout, Duration::from_millis(100), limits.line, "limits.header_timeout");
        self.at_least(limits.idle_timeout, Duration::from_millis(100), limits.line, "limits.idle_timeout");
        Limits { header_bytes, target_bytes, body_bytes: limits.body_bytes.map(|size| size.0) }
    }

    fn cache(&mut self, cache: &file::Cache) -> CacheSettings {
        if cache.positive_capacity == 0 || cache.negative_capacity == 0 {
            let why = "0 would ask the store for every single request";
            self.problem(cache.line, "cache.positive_capacity, cache.negative_capacity", why, "like 100000");
        }
        self.at_least(cache.positive_ttl, Duration::from_secs(1), cache.line, "cache.positive_ttl");
        self.at_least(cache.negative_ttl, Duration::from_millis(100), cache.line, "cache.negative_ttl");
        CacheSettings {
            positive_ttl: cache.positive_ttl,
            negative_ttl: cache.negative_ttl,
            stale_if_error: cache.stale_if_error,
            positive_capacity: cache.positive_capacity,
            negative_capacity: cache.negative_capacity,
        }
    }

    fn upstreams(&mut self, upstreams: &[file::Upstream]) -> Vec<UpstreamSettings> {
        if upstreams.is_empty() {
            let instead = "write [[upstream]] with name = \"api\" and servers = [\"127.0.0.1:3000\"]";
            self.problem(0, "upstream", "is missing: there is no backend to forward to", instead);
        }
        for (index, upstream) in upstreams.iter().enumerate() {
            let key = |name: &str| format!("upstream[{index}].{name}");
            if upstream.servers.is_empty() {
                self.problem(upstream.line, key("servers"), "is empty", "like [\"127.0.0.1:3000\"]");
            }
            if upstream.name.is_empty() || upstreams[..index].iter().any(|other| other.name == upstream.name) {
                self.problem(upstream.line, key("name"), "must be there, and only once", "like \"api\"");
            }
            self.at_least(upstream.connect_timeout, Duration::from_millis(1), upstream.line, &key("connect_timeout"));
            self.at_least(upstream.read_timeout, Duration::from_millis(1), upstream.line, &key("read_timeout"));
        }
        let settings = |upstream: &file::Upstream| UpstreamSettings {
            name: upstream.name.clone(),
            servers: upstream.servers.iter().map(|server| server.0.clone()).collect(),
            connect_timeout: upstream.connect_timeout,
            read_timeout: upstream.read_timeout,
            idle_timeout: upstream.idle_timeout,
        };
        upstreams.iter().map(settings).collect()
    }

    fn routes(&mut self, file: &File, upstreams: &[UpstreamSettings]) -> Routes {
        let mut routes: Vec<Route> = Vec::new();
        for (index, route) in file.routes.iter().enumerate() {
            let key = |name: &str| format!("route[{index}].{name}");
            let auth = match route.auth {
                FileAuth::Required => Auth::Required,
                FileAuth::Optional => Auth::Optional,
                FileAuth::None => Auth::None { pass_token: route.pass_token },
            };
            if auth != Auth::Required && route.reason.trim().is_empty() {
                let why = "is missing: this route can be reached without a token";
                self.problem(route.line, key("reason"), why, "write why, for whoever reads `tollgate check` in a year");
            }
            if route.pass_token && route.auth != FileAuth::None {
                self.problem(route.line, key("pass_token"), "goes with auth = \"none\" only", "take it out");
            }
            let named = upstreams.iter().position(|upstream| upstream.name == route.upstream);
            if !route.upstream.is_empty() && named.is_none() {
                let instead = closest(&route.upstream, upstreams.iter().map(|upstream| upstream.name.as_str()));
                self.problem(
                    route.line,
                    key("upstream"),
                    format!("there is no upstream \"{}\"", route.upstream),
                    instead,
                );
            }
            let methods = Methods::only(route.methods.iter().map(|method| method.0));
            if route.methods.is_empty() {
                self.problem(
                    route.line,
                    key("methods"),
                    "is empty: the route would match nothing",
                    "leave it out for all",
                );
            }
            let pattern = route.path.0.pattern.clone();
            if routes.iter().any(|other| other.pattern == pattern && other.methods.overlaps(methods)) {
                self.problem(route.line, key("path"), "stands in another route for the same method", "join the two");
            }
            routes.push(Route {
                pattern,
                name: route.path.0.text.clone(),
                methods,
                auth,
                reason: route.reason.trim().into(),
                refuse_query_token: route.query_token == QueryToken::Refuse,
                // Without a name, the first one.
                upstream: named.unwrap_or(0),
                index: 0,
            });
        }
        if file.api.prefixes.is_empty() && routes.is_empty() {
            self.problem(
                file.api.line,
                "api.prefixes",
                "is empty, and there is no [[route]]: everything would be 404",
                "like [\"/api/v3\"]",
            );
        }
        for prefix in &file.api.prefixes {
            let Ok(pattern) = Pattern::subtree(&prefix.0) else { continue };
            let name = format!("{}/*", prefix.0.trim_end_matches('/'));
            routes.push(Route {
                pattern,
                name,
                methods: Methods::ALL,
                auth: Auth::Required,
                reason: String::new(),
                refuse_query_token: false,
                upstream: 0,
                index: 0,
            });
        }
        // A [[route]] for a whole prefix comes first in the stable order, and so stands in the prefix's place.
        Routes::new(routes)
    }

    /// `None` when a valid token may do everything.
    fn scopes(&mut self, file: &File) -> Option<Scopes> {
        let mut rules = Vec::new();
        if file.api.scopes == ScopePreset::Gitlab {
            rules.extend(gitlab_scopes(&file.api.prefixes));
        }
        for (index, scope) in file.scopes.iter().enumerate() {
            if scope.name.is_empty() || scope.name.contains(char::is_whitespace) {
                self.problem(scope.line, format!("scope[{index}].name"), "must be one word", "like \"read_api\"");
            }
            rules.push(ScopeRule {
                scope: scope.name.clone(),
                methods: Methods::only(scope.methods.iter().map(|method| method.0)),
                paths: scope.paths.iter().map(|path| path.0.pattern.clone()).collect(),
                sudo: scope.sudo,
            });
        }
        (!rules.is_empty()).then(|| Scopes::new(rules))
    }

    fn pagination(&mut self, file: &File) -> Pagination {
        let section = &file.pagination;
        let default = PageRules {
            first_page: section.first_page,
            default_per_page: section.default_per_page,
            max_per_page: section.max_per_page,
            max_page: section.max_page,
            too_deep: match section.beyond_max_page {
                Beyond::Clamp => TooDeep::Clamp,
                Beyond::Refuse => TooDeep::Refuse,
            },
            inject_defaults: section.inject_defaults,
        };
        self.page_rules(&default, section.line, "pagination");
        let mut overrides = Vec::new();
        for (index, route) in file.pagination_routes.iter().enumerate() {
            let rules = PageRules {
                first_page: route.first_page.0.unwrap_or(default.first_page),
                default_per_page: route.default_per_page.0.unwrap_or(default.default_per_page),
                max_per_page: route.max_per_page.0.unwrap_or(default.max_per_page),
                ..default.clone()
            };
            self.page_rules(&rules, route.line, &format!("pagination.route[{index}]"));
            overrides.push((route.path.0.pattern.clone(), route.enabled.then_some(rules)));
        }
        Pagination { default, overrides }
    }

    fn page_rules(&mut self, rules: &PageRules, line: usize, key: &str) {
        if rules.default_per_page == 0 || rules.max_per_page.is_some_and(|max| max < rules.default_per_page) {
            let instead = "from 1 to max_per_page";
            self.problem(line, format!("{key}.default_per_page"), "is out of range", instead);
        }
        if rules.first_page > HIGHEST || rules.default_per_page > HIGHEST {
            let key = format!("{key}.first_page, {key}.default_per_page");
            self.problem(
                line,
                key,
                "is out of range",
                format!("at most {HIGHEST}, the highest number that is forwarded"),
            );
        }
        if rules.max_page.is_some_and(|max| max < rules.first_page) {
            self.problem(line, format!("{key}.max_page"), "is below first_page", "no page would be left");
        }
    }
}

/// What GitLab's own scopes allow there (8.15 to 11; doc/user/profile/personal_access_tokens.md of later versions).
fn gitlab_scopes(prefixes: &[file::Prefix]) -> Vec<ScopeRule> {
    let rule = |scope: &str, methods, paths| ScopeRule { scope: scope.into(), methods, paths, sudo: false };
    let below = |paths: [&str; 2]| {
        let all =
            prefixes.iter().flat_map(|prefix| paths.map(|path| format!("{}{path}", prefix.0.trim_end_matches('/'))));
        all.filter_map(|path| Pattern::subtree(&path).ok()).collect()
    };
    vec![
        rule("api", Methods::ALL, vec![Pattern::everything()]),
        rule("read_api", Methods::only([Method::Get, Method::Head]), vec![Pattern::everything()]),
        rule("read_user", Methods::only([Method::Get]), below(["/user", "/users"])),
        ScopeRule { sudo: true, ..rule("sudo", Methods::only([]), Vec::new()) },
    ]
}

/// What a body must not hold: every credential that is not allowed, and another method than the one that was judged.
fn body_rules(names: Names, switches: Switches, untyped: file::Untyped) -> BodyRules {
    let always = KeySet::default().with(Key::Token).with(Key::Method);
    let off =
        [(switches.sudo, Key::Sudo), (switches.access_token, Key::AccessToken), (switches.job_token, Key::JobToken)];
    let forbidden =
        off.into_iter().filter(|(allowed, _)| !allowed).fold(always, |forbidden, (_, key)| forbidden.with(key));
    let untyped = match untyped {
        file::Untyped::Watch => UntypedBody::Watch,
        file::Untyped::Refuse => UntypedBody::Refuse,
        file::Untyped::OctetStream => UntypedBody::OctetStream,
    };
    BodyRules { names, forbidden, untyped }
}

fn trusted(peers: &[file::Proxy]) -> TrustedProxies {
    let mut trusted = TrustedProxies::default();
    for peer in peers {
        match &peer.0 {
            TrustedPeer::Network(network) => trusted.networks.push(canonical(*network)),
            TrustedPeer::Unix => trusted.unix_peers = true,
        }
    }
    trusted
}

/// IPv4 written as IPv6 is IPv4, as are the addresses that are looked for in it.
fn canonical(network: IpNet) -> IpNet {
    match network {
        IpNet::V6(v6) if v6.prefix_len() >= 96 => {
            let v4 = v6.addr().to_ipv4_mapped().and_then(|ip| Ipv4Net::new(ip, v6.prefix_len() - 96).ok());
            v4.map_or(network, IpNet::V4)
        }
        _ => network,
    }
}
