//! From what the file says to the settings that the stages declare. Each stage says what is wrong with its own; here is
//! what one section says about another.

use super::file::{self, AuthMode, Beyond, BodyPolicy, Forward, QueryToken, ScopePreset, Strip, Switch, TrustedPeer};
use super::places::Places;
use super::section::{nearest, suggestion};
use super::{Diagnostic, Document, Expansions, File};
use crate::edge::{
    AdminSettings, BodyRate, CertificateFiles, ConnectionLimits, EdgeSettings, Listen, ListenerSettings,
    ListenerTlsSettings, SandboxMode, ServerSettings, ShutdownTimes, Timeouts, TlsProfile, VerdictSettings,
};
use crate::forward::{BackendCredential, ForwardRules};
use crate::identity::CacheSettings;
use crate::policy::{
    BucketSettings, GuessSettings, LimitAmounts, LimitKeyPart, LimitPlan, LimitScope, LimitSettings, PlanWeights,
    Policy, RefillRate, ScopeRule, Scopes,
};
use crate::problem::Problem;
use crate::reply::answer;
use crate::reply::cors::Cors;
use crate::request::body::{BodyRules, KeySet, UntypedBody};
use crate::request::origin::{AddressList, AddressRules, TrustedProxies, canonical_network};
use crate::request::page::{PageRules, Pagination, TooDeep};
use crate::request::query::{Key, Names};
use crate::request::route::{
    Auth, Canary, CanaryBy, Methods, Pattern, PrefixRewrite, RequestTimeout, Route, RouteTimeouts, ScopePool,
};
use crate::request::routes::Routes;
use crate::request::token::{BasicUsers, OtherKind, TokenRules};
use crate::request::trace::TraceMode;
use crate::request::verdict::{VerdictRules, VerdictSource};
use crate::request::view::Method;
use crate::request::{AmbiguousPaths, Limits, MethodOverride, Rules, Switches};
use crate::sandbox::Extent;
use crate::share::SharedLimitSettings;
use crate::store::NamedStore;
use crate::store::terms::check_plan;
use crate::telemetry::lines::LogTarget;
use crate::telemetry::spans::OtlpSettings;
use crate::tls::{Authorities, PemFile, SystemAuthorities, TLS, TLS_CA, TLS_CERT, TLS_KEY};
use crate::upstream::{Balance, CheckSettings, HttpCheck, QueueOrder, RetryLimits, UpstreamSettings, UpstreamTls};
use log::LevelFilter;
use std::cell::LazyCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

/// Everything that is configured, checked.
#[derive(Clone, Debug)]
pub struct Settings {
    pub server: ServerSettings,
    pub rules: Rules,
    pub policy: Policy,
    pub limits: Vec<LimitSettings>,
    pub plans: Vec<LimitPlan>,
    /// `None`: replicas share none of them.
    pub shared_limits: Option<SharedLimitSettings>,
    /// `None`: nobody is watched for guessing.
    pub guessing: Option<GuessSettings>,
    /// Answers say what is left of them.
    pub limit_fields: bool,
    pub forward: ForwardRules,
    pub cors: Cors,
    pub stores: Vec<NamedStore>,
    /// Where the cache is kept over a restart.
    pub snapshot: Option<PathBuf>,
    pub cache: CacheSettings,
    pub upstreams: Vec<UpstreamSettings>,
    pub edge: EdgeSettings,
    pub access_log: LogTarget,
    pub audit_log: LogTarget,
    /// `None`: no spans are exported.
    pub otlp: Option<OtlpSettings>,
    pub level: LevelFilter,
    /// What is allowed and dangerous, for people: said at every start and reload, and by `check`.
    pub warnings: Vec<Diagnostic>,
    /// What the file says, to name what a reload changes.
    pub document: Document,
    /// What stood in the file for something else, which people must not be shown.
    pub expansions: Expansions,
    /// The files that all this was read from, each with its key and why.
    pub(super) read_from: Vec<ReadFrom>,
}

/// A file, or a folder with files, that the configuration is read from.
#[derive(Clone, Debug)]
pub(super) struct ReadFrom {
    pub(super) key: String,
    pub(super) path: PathBuf,
    pub(super) extent: Extent,
}

impl Settings {
    /// Whether any limit, or the budget of those who guess, is counted together with other gateways.
    pub fn shares_limits(&self) -> bool {
        let guesses = self.guessing.as_ref().is_some_and(|guessing| guessing.shared);
        self.shared_limits.is_some() && (guesses || self.limits.iter().any(|limit| limit.shared))
    }
}

pub(super) fn resolve(file: &File, document: Document, folder: &Path, places: &mut Places<'_>) -> Settings {
    let switches = Switches {
        sudo: file.token.sudo == Switch::Allow,
        access_token: file.token.access_token == Switch::Allow,
        job_token: file.token.job_token == Switch::Allow,
        cookies: file.token.cookies == Strip::Allow,
        authorization: file.token.authorization == Strip::Allow,
        path_and_user_headers: file.token.path_and_user_headers == Strip::Allow,
    };
    let token = TokenRules {
        header: file.token.header.0.clone(),
        bearer: file.token.bearer,
        // One that is too large for its type is out of range, which is checked later.
        max_bytes: usize::try_from(file.token.max_bytes).unwrap_or(usize::MAX),
        basic: file.token.basic.0.clone(),
    };
    let names = Names { token: file.token.query.0.clone() };
    let forward = ForwardRules {
        credential: match file.token.forward {
            Forward::Token => BackendCredential::Token,
            Forward::Identity => BackendCredential::Identity,
            Forward::Both => BackendCredential::Both,
            Forward::None => BackendCredential::None,
        },
        token: token.clone(),
        switches,
        deprecate_query_token: file.token.query_deprecation,
        trace: match file.trace.context {
            file::TraceFields::Pass => TraceMode::Pass,
            file::TraceFields::Make => TraceMode::Make,
            file::TraceFields::Restart => TraceMode::Restart,
            file::TraceFields::Drop => TraceMode::Drop,
        },
    };
    let mut gather = Gather { places };
    let upstreams = gather.upstreams(&file.upstreams, folder);
    let rules = Rules {
        limits: Limits {
            header_bytes: usize::try_from(file.limits.header_bytes.0).unwrap_or(usize::MAX),
            target_bytes: usize::try_from(file.limits.target_bytes.0).unwrap_or(usize::MAX),
        },
        routes: gather.routes(file, &upstreams, &forward),
        cors_preflight: file.api.cors_preflight,
        token,
        names: names.clone(),
        method_override: match file.token.method_override {
            file::OverridePolicy::Refuse => MethodOverride::Refuse,
            file::OverridePolicy::Judge => MethodOverride::Judge,
        },
        ambiguous_paths: match file.api.ambiguous_paths {
            file::AmbiguousPathsWord::Pass => AmbiguousPaths::Pass,
            file::AmbiguousPathsWord::Refuse => AmbiguousPaths::Refuse,
        },
        switches,
        trusted_proxies: trusted(&file.server.trusted_proxies),
        pagination: gather.pagination(file),
        body: (file.token.body == BodyPolicy::Refuse)
            .then(|| Arc::new(body_rules(names, switches, file.token.untyped_body))),
    };
    gather.all("limits", rules.limits.problems());
    gather.all("token", rules.problems());
    let server = gather.server(file, folder);
    let timeouts = Timeouts { header: file.limits.header_timeout, idle: file.limits.idle_timeout };
    gather.all("limits", timeouts.problems());
    let connections = ConnectionLimits {
        total: file.limits.connections,
        per_address: file.limits.connections_per_address,
        requests: file.limits.requests_per_connection,
    };
    gather.all("limits", connections.problems());
    let body_rate = BodyRate { bytes: file.limits.body_rate.map(|size| size.0), grace: file.limits.body_grace };
    gather.all("limits", body_rate.problems());
    let addresses = AddressRules { allow: listed(&file.limits.allow), deny: listed(&file.limits.deny) };
    gather.all("limits", addresses.problems());
    let plans = gather.plans(file);
    let weights = file.plans.iter().map(|(name, plan)| (name.clone(), plan.weight));
    let limits = gather.limits(file, &plans, &rules.routes);
    let shared_limits = gather.shared_limits(file, folder);
    let guessing = gather.guessing(file);
    gather.all("server", rules.trusted_proxies.problems());
    let cache = CacheSettings {
        positive_ttl: file.cache.positive_ttl,
        negative_ttl: file.cache.negative_ttl,
        stale_if_error: file.cache.stale_if_error,
        positive_capacity: file.cache.positive_capacity,
        negative_capacity: file.cache.negative_capacity,
    };
    gather.all("cache", cache.problems());
    let cors = Cors::new(&file.api.cors_origins);
    gather.all("api", cors.problems());
    if file.log.access.is_empty() {
        let instead = "write \"stdout\", \"stderr\", \"off\", \"syslog\", \"journald\" or the path of a file";
        gather.places.add("log", Problem::error("access", "is empty", instead));
    }
    if file.admin.audit.is_empty() {
        let instead = "write \"off\", \"stdout\", \"stderr\", \"syslog\", \"journald\" or the path of a file";
        gather.places.add("admin", Problem::error("audit", "is empty", instead));
    }
    if file.trace.otlp.is_some() && !forward.trace.makes_spans() {
        let problem = Problem::error("otlp", "needs spans of tollgate's own", "set context = \"make\" or \"restart\"");
        gather.places.add("trace", problem.with("context"));
    }
    let log_target = |text: &str| match text {
        "off" => LogTarget::Off,
        "stdout" => LogTarget::Stdout,
        "stderr" => LogTarget::Stderr,
        "syslog" => LogTarget::Syslog(file.log.syslog.0.clone()),
        "journald" => LogTarget::Journal(folder.join(&file.log.journald.0)),
        path => LogTarget::File(folder.join(path)),
    };
    let audit_log = log_target(&file.admin.audit);
    if matches!(&audit_log, LogTarget::File(path) if log_target(&file.log.access) == LogTarget::File(path.clone())) {
        let problem = Problem::error("audit", "is the file of log.access", "give each log its own file");
        gather.places.add("admin", problem);
    }
    let rule_places = gather.places.known();
    Settings {
        server,
        rules,
        forward,
        cors,
        policy: Policy { switches, scopes: gather.scopes(file), addresses, weights: PlanWeights::new(weights) },
        limits,
        plans,
        shared_limits,
        guessing,
        limit_fields: file.limits.rate_limit_fields,
        stores: gather.stores(file, folder, &upstreams),
        snapshot: Some(&file.cache.snapshot).filter(|path| !path.is_empty()).map(|path| folder.join(path)),
        cache,
        upstreams,
        edge: EdgeSettings {
            timeouts,
            shutdown: ShutdownTimes { drain_delay: file.server.drain_delay, grace: file.server.shutdown_grace },
            connections,
            body_rate,
            places: Arc::new(rule_places),
            admin: AdminSettings {
                hosts: file.admin.hosts.iter().map(|host| host.0.clone()).collect(),
                token: file.admin.token_sha256.as_ref().map(|digest| digest.0),
                listen: file.admin.listen.as_ref().map(|address| address.0.clone()),
                shown: Arc::default(),
            },
        },
        access_log: log_target(&file.log.access),
        audit_log,
        otlp: file.trace.otlp.as_ref().map(|collector| OtlpSettings {
            authority: collector.0.authority.clone(),
            path: collector.0.path.clone(),
            per_million: file.trace.sample.per_million,
        }),
        level: match file.log.level {
            file::Level::Error => LevelFilter::Error,
            file::Level::Warn => LevelFilter::Warn,
            file::Level::Info => LevelFilter::Info,
        },
        warnings: Vec::new(),
        document,
        expansions: Expansions::default(),
        read_from: Vec::new(),
    }
}

pub(super) struct Gather<'g, 't> {
    pub(super) places: &'g mut Places<'t>,
}

impl Gather<'_, '_> {
    pub(super) fn all(&mut self, section: &str, problems: Vec<Problem>) {
        problems.into_iter().for_each(|problem| self.places.add(section, problem));
    }

    fn server(&mut self, file: &File, folder: &Path) -> ServerSettings {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads =
            if file.server.threads == 0 { cores } else { usize::try_from(file.server.threads).unwrap_or(cores) };
        // The default is for those who name no listener at all.
        let short =
            if file.listeners.is_empty() || self.places.has("server.listen") { &file.server.listen[..] } else { &[] };
        let mut listeners: Vec<_> = short.iter().map(|address| ListenerSettings::plain(address.0.clone())).collect();
        for listener in &file.listeners {
            let settings = listener_settings(listener, folder);
            self.all(&listener.at, settings.problems(SystemTime::now()));
            self.all(&listener.at, verdict_problems(listener, file));
            if settings.tls.is_none() && !listener.client_ca.is_empty() {
                let problem = Problem::error("client_ca", "goes with certificates only", "remove it");
                self.places.add(&listener.at, problem.with("certificates"));
            }
            listeners.push(settings);
        }
        let server = ServerSettings {
            short: short.len(),
            listeners,
            admin: file.admin.listen.as_ref().map(|address| address.0.clone()),
            admin_token: file.admin.token_sha256.is_some(),
            metrics: file.admin.metrics_listen.as_ref().map(|address| address.0.clone()),
            threads,
            watch: file.server.watch,
            sandbox: match file.server.sandbox {
                file::SandboxWord::Off => SandboxMode::Off,
                file::SandboxWord::Try => SandboxMode::Try,
                file::SandboxWord::On => SandboxMode::On,
            },
        };
        self.all("", server.problems());
        server
    }

    fn upstreams(&mut self, upstreams: &[file::UpstreamSection], folder: &Path) -> Vec<UpstreamSettings> {
        if upstreams.is_empty() {
            let instead = "write [[upstream]] with name = \"api\" and servers = [\"127.0.0.1:3000\"]";
            self.places.add("", Problem::error("upstream", "is missing: there is no backend to forward to", instead));
        }
        let mut all: Vec<UpstreamSettings> = Vec::new();
        // Read once, when it is first asked for.
        let system: LazyCell<SystemAuthorities> = LazyCell::new(SystemAuthorities::load);
        for upstream in upstreams {
            let settings = UpstreamSettings {
                name: upstream.name.clone(),
                servers: upstream.servers.clone(),
                expand: upstream.expand,
                balance: match upstream.balance {
                    file::BalanceBy::RoundRobin => Balance::RoundRobin,
                    file::BalanceBy::LeastRequests => Balance::LeastRequests,
                    file::BalanceBy::Hash => Balance::Hash(upstream.hash.0.clone()),
                },
                slow_start: upstream.slow_start,
                max_requests: upstream.max_requests,
                queue: usize::try_from(upstream.queue).unwrap_or(usize::MAX),
                queue_order: match upstream.queue_order {
                    file::QueueOrderWord::Fair => QueueOrder::Fair,
                    file::QueueOrderWord::Arrival => QueueOrder::Arrival,
                },
                queue_timeout: upstream.queue_timeout,
                resolve_interval: upstream.resolve_interval,
                check: check(upstream),
                failure_statuses: upstream.failure_statuses.iter().map(|value| status(*value)).collect(),
                failure_latency: upstream.failure_latency,
                panic_below: upstream.panic_below,
                retries: upstream.retry_budget.map(|share| RetryLimits {
                    per_thousand: share.per_thousand,
                    floor: u32::try_from(upstream.retry_floor).unwrap_or(u32::MAX),
                }),
                per_try_timeout: upstream.per_try_timeout,
                request_timeout: upstream.request_timeout,
                connect_timeout: upstream.connect_timeout,
                read_timeout: upstream.read_timeout,
                idle_timeout: upstream.idle_timeout,
                tls: self.upstream_tls(upstream, folder, &system),
                http2: upstream.http == 2,
                send_proxy: upstream.send_proxy,
            };
            self.all(&upstream.at, settings.problems());
            self.all(&upstream.at, Problem::out_of_range("http", upstream.http, 1..=2).into_iter().collect());
            if let Some(first) = all.iter().position(|other| other.name == upstream.name) {
                let problem =
                    Problem::error("name", "is the name of an earlier [[upstream]]", "give each its own name");
                self.places.report(&upstream.at, problem, Some(format!("{}.name", upstreams[first].at)));
            }
            all.push(settings);
        }
        all
    }

    fn upstream_tls(
        &mut self,
        upstream: &file::UpstreamSection,
        folder: &Path,
        system: &LazyCell<SystemAuthorities>,
    ) -> Option<UpstreamTls> {
        let file =
            |text: &String| Some(text).filter(|text| !text.is_empty()).map(|text| PemFile::from(folder.join(text)));
        let (ca, cert, key) = (&upstream.tls_ca, &upstream.tls_cert, &upstream.tls_key);
        if !upstream.tls {
            // Whoever names a certificate does not mean plain text.
            let named = [(TLS_CA, ca), (TLS_CERT, cert), (TLS_KEY, key), ("tls_name", &upstream.tls_name)];
            let named = named.into_iter().filter(|(_, text)| !text.is_empty()).map(|(key, _)| key);
            for key in named.chain(upstream.insecure_skip_verify.then_some("insecure_skip_verify")) {
                let problem = Problem::error(key, "goes with tls = true only", "set tls = true, or remove it");
                self.places.add(&upstream.at, problem.with(TLS));
            }
            return None;
        }
        if cert.is_empty() != key.is_empty() {
            let problem = Problem::error(TLS_CERT, "and tls_key go together", "name both files, or neither");
            self.places.add(&upstream.at, problem);
        }
        if upstream.insecure_skip_verify && !ca.is_empty() {
            let what = "is not used with insecure_skip_verify = true";
            let problem = Problem::error(TLS_CA, what, "remove one of them");
            self.places.add(&upstream.at, problem.with("insecure_skip_verify"));
        }
        let authorities = || file(ca).map_or_else(|| Authorities::System((**system).clone()), Authorities::File);
        Some(UpstreamTls {
            authorities: (!upstream.insecure_skip_verify).then(authorities),
            client: file(cert).zip(file(key)),
            name: Some(&upstream.tls_name).filter(|name| !name.is_empty()).cloned(),
            http2: upstream.http == 2,
        })
    }

    fn routes(&mut self, file: &File, upstreams: &[UpstreamSettings], forward: &ForwardRules) -> Routes {
        let mut routes: Vec<Route> = Vec::new();
        let body_bytes = file.limits.body_bytes.map(|size| size.0);
        for route in &file.routes {
            let mut named = |key: &'static str, element: Option<usize>, name: &str| {
                let place = upstreams.iter().position(|upstream| upstream.name == name);
                if place.is_none() {
                    let names = || upstreams.iter().map(|upstream| upstream.name.as_str());
                    let instead = suggestion(nearest(name, names()), names());
                    let what = match key {
                        "upstream" => "is not the name of an [[upstream]]".to_owned(),
                        _ => format!("upstream: `{}` is not the name of an [[upstream]]", name.escape_debug()),
                    };
                    // One of them may have a name that could not be read.
                    let unread = file.upstreams.iter().map(|upstream| format!("{}.name", upstream.at));
                    let echo = unread.chain(["upstream".to_owned()]).find(|path| self.places.is_broken(path));
                    self.places.report(&route.at, Problem { element, ..Problem::error(key, what, instead) }, echo);
                }
                // One that is unknown is an error, whatever stands in for it.
                place.unwrap_or(0)
            };
            // Without a name, the first one.
            let upstream = if route.upstream.is_empty() { 0 } else { named("upstream", None, &route.upstream) };
            let mut pools = Vec::new();
            for (index, pool) in route.pool.iter().enumerate() {
                let upstream = named("pool", Some(index), &pool.upstream);
                pools.push(ScopePool { scope: pool.scope.clone(), upstream });
            }
            let canary = route.canary.as_ref().map(|canary| {
                let by = match canary.by {
                    file::CanaryKey::User => CanaryBy::User,
                    file::CanaryKey::Token => CanaryBy::Token,
                    file::CanaryKey::Request => CanaryBy::Request,
                };
                Canary::new(named("canary", None, &canary.upstream), &canary.upstream, by, canary.share)
            });
            let settings = Route {
                at: route.at.clone(),
                hosts: route.hosts.iter().map(|host| host.0.clone()).collect(),
                methods: Methods::only(route.methods.iter().map(|method| method.0)),
                auth: match route.auth {
                    AuthMode::Required => Auth::Required,
                    AuthMode::Optional => Auth::Optional,
                    AuthMode::None => Auth::None { pass_token: route.pass_token },
                },
                reason: route.reason.trim().into(),
                addresses: AddressRules { allow: listed(&route.allow), deny: listed(&route.deny) },
                refuse_query_token: route.query_token == QueryToken::Refuse,
                basic: route.basic,
                unchecked: route.unchecked.iter().map(other_kind).collect(),
                upstream,
                pools,
                canary,
                body_bytes: route.body_bytes.0.map_or(body_bytes, |own| own.map(|size| size.0)),
                timeouts: RouteTimeouts {
                    read: route.read_timeout.0,
                    request: route
                        .request_timeout
                        .0
                        .map(|own| own.map_or(RequestTimeout::Never, RequestTimeout::After)),
                },
                rewrite: route.rewrite_prefix.as_ref().map(|to| PrefixRewrite::new(&route.path.0.pattern, &to.0)),
                request_headers: route.request_headers.clone(),
                response_headers: route.response_headers.clone(),
                ..Route::new(route.path.0.pattern.clone(), route.path.0.text.clone())
            };
            self.all(&route.at, settings.problems());
            self.all(&route.at, forward.problems_of(&settings));
            self.all(&route.at, answer::problems_of(&settings));
            if route.pass_token && route.auth != AuthMode::None {
                let problem = Problem::error("pass_token", "goes with auth = \"none\" only", "remove it");
                self.places.add(&route.at, problem.with("auth"));
            }
            if route.basic && file.token.basic.0 == BasicUsers::Nobody {
                let what = "accepts tokens with user names of [token] basic, which is \"none\"";
                let problem = Problem::error("basic", what, "write \"any\", \"user\" or a list of names there");
                self.places.add(&route.at, problem);
            }
            let first = routes.iter().position(|other| other.answers_the_same(&settings));
            if let Some(first) = first {
                let what = "is in an earlier [[route]] for the same method and host";
                let first = format!("{}.path", file.routes[first].at);
                self.places.report(&route.at, Problem::error("path", what, "join the two"), Some(first));
            }
            routes.push(settings);
        }
        if file.api.prefixes.is_empty() && routes.is_empty() {
            let what = "is empty, and there is no [[route]]: everything would be 404";
            self.places.add("api", Problem::error("prefixes", what, "write it like [\"/api/v3\"]"));
        }
        for (index, prefix) in file.api.prefixes.iter().enumerate() {
            let Ok(pattern) = Pattern::subtree(&prefix.0) else { continue };
            let plain = |prefix: &str| prefix.trim_end_matches('/').to_owned();
            let first = file.api.prefixes[..index].iter().position(|other| plain(&other.0) == plain(&prefix.0));
            if let Some(first) = first {
                let problem = Problem::warning("prefixes", "is in the list twice", "remove one of them");
                self.places.add("api", problem.element(index).repeats("prefixes", first));
            }
            routes.push(Route {
                at: format!("api.prefixes[{index}]"),
                body_bytes,
                ..Route::new(pattern, format!("{}/*", plain(&prefix.0)))
            });
        }
        // A [[route]] for a whole prefix comes first in the stable order, and so stands in the prefix's place.
        Routes::new(routes)
    }

    fn guessing(&mut self, file: &File) -> Option<GuessSettings> {
        let section = &file.guessing;
        let allow = listed(&section.allow);
        let Some(failures) = section.failures else {
            if allow != AddressList::default() {
                let what = "has networks, and `failures` is \"none\": no address is counted";
                let problem = Problem::warning("allow", what, "write a number there, or remove the networks");
                self.places.add("guessing", problem.with("failures"));
            }
            if section.shared {
                let problem =
                    Problem::warning("shared", "is of no use: `failures` is \"none\"", "write a number there");
                self.places.add("guessing", problem.with("failures"));
            }
            return None;
        };
        if allow.unix_peers {
            let instead = "remove it: peers of Unix sockets have no address, and are never counted";
            self.places.add("guessing", Problem::warning("allow", "has \"unix\"", instead));
        }
        let settings = GuessSettings {
            failures,
            per: section.per,
            pause: section.pause,
            longest_pause: section.longest_pause,
            lookups: section.lookups,
            wait: section.wait,
            allow,
            shared: section.shared,
        };
        self.all("guessing", settings.problems());
        Some(settings)
    }

    /// A burst, of a limit or a plan.
    fn burst(&mut self, at: &str, burst: Option<u64>, has_rate: bool) {
        if burst.is_some() && !has_rate {
            let problem = Problem::error("burst", "goes with a rate", "write rate as well, or remove it");
            self.places.add(at, problem.with("rate"));
        }
        match burst {
            Some(0) => {
                let problem = Problem::error("burst", "is 0: nothing would pass", "use 1 or more, or \"none\"");
                self.places.add(at, problem);
            }
            Some(burst) => {
                let problem = Problem::out_of_range("burst", burst, 1..=RefillRate::MOST_BURST);
                self.all(at, problem.into_iter().collect());
            }
            None => {}
        }
    }

    fn plans(&mut self, file: &File) -> Vec<LimitPlan> {
        const MOST: usize = 64;
        let mut plans = Vec::new();
        for (name, plan) in &file.plans {
            let amounts = amounts(plan.rate.as_ref(), plan.burst, plan.quota.as_ref(), plan.concurrency);
            if let Err(what) = check_plan(name) {
                self.places
                    .add(&plan.at, Problem::error("rate", format!("is of a plan whose name {what}"), "rename it"));
            }
            let is_used = file.limit.iter().any(|limit| limit.plans);
            let weighs = plan.weight != 1;
            self.all(
                &plan.at,
                Problem::out_of_range("weight", plan.weight, 1..=PlanWeights::MOST).into_iter().collect(),
            );
            if amounts == LimitAmounts::default() && is_used && !weighs {
                let what = "is missing, and so are quota, concurrency and a weight: the plan says nothing";
                self.places.add(&plan.at, Problem::error("rate", what, "write one of them, or remove the plan"));
            }
            if amounts == LimitAmounts::default() && !is_used && !weighs {
                let what = "is missing, and so are quota, concurrency and a weight: the plan says nothing";
                self.places.add(&plan.at, Problem::warning("rate", what, "write one of them, or remove the plan"));
            }
            if amounts.concurrency == Some(0) {
                let problem = Problem::error("concurrency", "is 0: nothing would pass", "use 1 or more, or \"none\"");
                self.places.add(&plan.at, problem);
            }
            self.burst(&plan.at, plan.burst, plan.rate.is_some());
            if let Some(rate) = amounts.rate.filter(|rate| rate.burst() > 0 && rate.is_too_fine()) {
                let what = "is no more than the rate has within a millisecond, a step of the clock: not all that is due would pass";
                let instead = format!("use {} or more", rate.requests_in(1) + 1);
                self.places.add(&plan.at, Problem::error("burst", what, instead).with("rate"));
            }
            if !is_used && amounts != LimitAmounts::default() {
                let what = "is of a plan, and no [[limit]] says `plans = true`: it limits nothing";
                let problem = Problem::warning("rate", what, "add it to a [[limit]], or remove the plan");
                self.places.add(&plan.at, problem);
            }
            plans.push(LimitPlan { name: name.clone(), amounts });
        }
        if plans.len() > MOST {
            self.places.add("", Problem::error("plan", "is there too often", format!("use {MOST} or fewer")));
        }
        plans
    }

    fn limits(&mut self, file: &File, plans: &[LimitPlan], routes: &Routes) -> Vec<LimitSettings> {
        const MOST: usize = 64;
        /// More of it is said.
        const BUCKETS_BYTES: usize = 1 << 30;
        let mut limits: Vec<LimitSettings> = Vec::new();
        for limit in &file.limit {
            let narrow = |bits: u64| u8::try_from(bits).unwrap_or(u8::MAX);
            let settings = LimitSettings {
                name: limit.name.clone(),
                buckets: BucketSettings {
                    key: limit.key.iter().map(|part| part.0.clone()).collect(),
                    prefix_v4: narrow(limit.prefix_v4),
                    prefix_v6: narrow(limit.prefix_v6),
                    amounts: amounts(limit.rate.as_ref(), limit.burst, limit.quota.as_ref(), limit.concurrency),
                    plans: limit.plans.then(|| plans.to_vec()),
                    most: usize::try_from(limit.buckets).unwrap_or(usize::MAX),
                },
                applies: LimitScope {
                    routes: limit.routes.clone(),
                    methods: Methods::only(limit.methods.iter().map(|method| method.0)),
                    scopes: limit.scopes.clone(),
                    users: limit.users.clone(),
                },
                costs: limit.cost.0.clone(),
                dry_run: limit.dry_run,
                shared: limit.shared,
            };
            self.all(&limit.at, settings.problems());
            self.burst(&limit.at, limit.burst, limit.rate.is_some());
            if let Some(first) = limits.iter().position(|other| other.name == settings.name) {
                let first = format!("{}.name", file.limit[first].at);
                let problem = Problem::error("name", "is the name of an earlier [[limit]]", "use another name");
                self.places.report(&limit.at, problem, Some(first));
            }
            self.limit_routes(limit, &settings, routes);
            limits.push(settings);
        }
        if limits.len() > MOST {
            self.places.add("", Problem::error("limit", "is there too often", format!("use {MOST} or fewer")));
        }
        let all = limits.iter().map(LimitSettings::bytes).fold(0, usize::saturating_add);
        if let Some(place) =
            (0..limits.len()).max_by_key(|place| limits[*place].bytes()).filter(|_| all > BUCKETS_BYTES)
        {
            let what = format!("comes to {} MiB for all limits and plans, once all are in use", all >> 20);
            let instead = "use as many as there are keys in the time that a bucket takes to fill";
            self.places.add(&file.limit[place].at, Problem::warning("buckets", what, instead));
        }
        limits
    }

    /// What a limit says about routes.
    fn limit_routes(&mut self, limit: &file::LimitSection, settings: &LimitSettings, routes: &Routes) {
        let known = |name: &str| routes.iter().any(|route| route.name == name);
        let names = || routes.iter().map(|route| route.name.as_str());
        let mut unknown = false;
        for (index, name) in settings.applies.routes.iter().enumerate().filter(|(_, name)| !known(name)) {
            let instead = suggestion(nearest(name, names()), names());
            let problem = Problem::error("routes", "is not the path of a route", instead).element(index);
            self.places.add(&limit.at, problem);
            unknown = true;
        }
        for (name, _) in settings.costs.routes.iter().filter(|(name, _)| !known(name)) {
            let what = format!("`{}` is not the path of a route", name.escape_debug());
            self.places.add(&limit.at, Problem::error("cost", what, suggestion(nearest(name, names()), names())));
            unknown = true;
        }
        let LimitScope { methods, scopes, users, .. } = &settings.applies;
        // Those who are only known by a token.
        let by_identity =
            |part: &LimitKeyPart| matches!(part, LimitKeyPart::Token | LimitKeyPart::User | LimitKeyPart::Scope);
        let needs_token = !scopes.is_empty() || !users.is_empty() || settings.buckets.key.iter().any(by_identity);
        let matches = |route: &Route| {
            let is_meant = settings.applies.routes.is_empty() || settings.applies.routes.contains(&route.name);
            let counts = |method: &Method| {
                methods.has(*method) && route.methods.has(*method) && settings.costs.of(&route.name, *method) > 0
            };
            is_meant
                && Method::FORWARDED.iter().any(counts)
                && !(needs_token && matches!(route.auth, Auth::None { .. }))
        };
        if !unknown && *methods != Methods::only([]) && settings.costs.highest() > 0 && !routes.iter().any(matches) {
            let key = if settings.applies.routes.is_empty() { "methods" } else { "routes" };
            let what = "match no request: the routes have other methods, no token to count by, or a cost of 0";
            self.places.add(&limit.at, Problem::error(key, what, "see the [[route]] entries"));
        }
    }

    /// `None` when a valid token may do everything.
    fn scopes(&mut self, file: &File) -> Option<Scopes> {
        let mut rules = Vec::new();
        if file.api.scopes == ScopePreset::Gitlab {
            rules.extend(gitlab_scopes(&file.api.prefixes));
        }
        for scope in &file.scopes {
            let rule = ScopeRule {
                scope: scope.name.clone(),
                methods: Methods::only(scope.methods.iter().map(|method| method.0)),
                paths: scope.paths.iter().map(|path| path.0.pattern.clone()).collect(),
                sudo: scope.sudo,
            };
            self.all(&scope.at, rule.problems());
            rules.push(rule);
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
        let general = default.problems();
        let mut overrides = Vec::new();
        for route in &file.pagination_routes {
            let rules = PageRules {
                first_page: route.first_page.0.unwrap_or(default.first_page),
                default_per_page: route.default_per_page.0.unwrap_or(default.default_per_page),
                max_per_page: route.max_per_page.0.unwrap_or(default.max_per_page),
                ..default.clone()
            };
            // What it has from the section above is that section's to say.
            let own = rules.problems().into_iter().filter(|problem| !general.contains(problem));
            self.all(&route.at, own.collect());
            overrides.push((route.path.0.pattern.clone(), route.enabled.then_some(rules)));
        }
        self.all(&section.at, general);
        Pagination { default, overrides }
    }
}

fn listener_settings(listener: &file::ListenerSection, folder: &Path) -> ListenerSettings {
    let pem = |path: &str| PemFile::from(folder.join(path));
    let certificates: Vec<_> = listener
        .certificates
        .iter()
        .map(|files| CertificateFiles { chain: pem(&files.chain), key: pem(&files.key) })
        .collect();
    let tls = (!certificates.is_empty()).then(|| ListenerTlsSettings {
        certificates,
        client_ca: (!listener.client_ca.is_empty()).then(|| pem(&listener.client_ca)),
        client_optional: listener.client_certificate == file::ClientCertificate::Optional,
        profile: match listener.tls {
            file::TlsVersions::Intermediate => TlsProfile::Intermediate,
            file::TlsVersions::Modern => TlsProfile::Modern,
        },
        http2: listener.http2,
    });
    ListenerSettings {
        address: listener.address.0.clone(),
        tls,
        http2: listener.http2,
        proxy_protocol: (!listener.proxy_protocol.is_empty()).then(|| trusted(&listener.proxy_protocol)),
        handshake_timeout: listener.handshake_timeout,
        redirect: listener.redirect_to_https.map(|port| u16::try_from(port).unwrap_or(0)),
        hsts: listener.hsts,
        verdict: verdict_settings(listener),
    }
}

/// With no source, which is an error, any one stands in.
fn verdict_settings(listener: &file::ListenerSection) -> Option<VerdictSettings> {
    let source = match (listener.mode, listener.source) {
        (file::ListenerMode::Forward, _) => return None,
        (_, file::VerdictSourceWord::Nginx) => VerdictSource::Nginx,
        (_, file::VerdictSourceWord::Forwarded) => VerdictSource::Forwarded,
        (_, file::VerdictSourceWord::Envoy | file::VerdictSourceWord::None) => VerdictSource::Envoy,
    };
    let rules = Arc::new(VerdictRules { source, path_prefix: listener.path_prefix.clone() });
    // Whoever can open a socket file may ask.
    let unix_peers = matches!(listener.address.0, Listen::Unix(..));
    Some(VerdictSettings { rules, peers: TrustedProxies { unix_peers, ..trusted(&listener.peers) } })
}

/// What a listener for verdicts says about the rest of the file.
fn verdict_problems(listener: &file::ListenerSection, file: &File) -> Vec<Problem> {
    use file::{ListenerMode, VerdictSourceWord};
    let mut problems = Vec::new();
    if listener.mode == ListenerMode::Forward {
        let used = [
            ("source", listener.source != VerdictSourceWord::None),
            ("peers", !listener.peers.is_empty()),
            ("path_prefix", !listener.path_prefix.is_empty()),
        ];
        for (key, _) in used.into_iter().filter(|(_, used)| *used) {
            problems.push(Problem::error(
                key,
                "goes with mode = \"verdict\" only",
                "remove it, or set mode = \"verdict\"",
            ));
        }
        return problems;
    }
    if listener.source == VerdictSourceWord::None {
        problems.push(Problem::error(
            "source",
            "is missing: which proxy asks is never guessed",
            "write \"nginx\", \"forwarded\" or \"envoy\"",
        ));
    }
    if !listener.peers.is_empty() && file.server.trusted_proxies.is_empty() {
        let what =
            "are not in [server] trusted_proxies: limits, address lists and the log take the proxy for the client";
        let instead = "add them there, if they write X-Forwarded-For";
        problems.push(Problem::warning("peers", what, instead));
    }
    if file.token.forward != Forward::Identity {
        let what = "\"verdict\" cannot take the token or a client's own credentials out of a request";
        problems.push(Problem::error(
            "mode",
            what,
            "set [token] forward = \"identity\", for a backend that acts for X-Tollgate-User alone",
        ));
    }
    if file.token.body != BodyPolicy::Ignore {
        let what = "\"verdict\" cannot look into bodies, where some backends read a token";
        problems.push(Problem::error(
            "mode",
            what,
            "set [token] body = \"ignore\", for a backend that reads no credential there",
        ));
    }
    problems
}

const fn other_kind(word: &file::OtherCredential) -> OtherKind {
    match word {
        file::OtherCredential::JobToken => OtherKind::Job,
        file::OtherCredential::DeployToken => OtherKind::Deploy,
    }
}

/// One that is too large for its type is out of every range that is checked later.
fn status(value: u64) -> u16 {
    u16::try_from(value).unwrap_or(u16::MAX)
}

fn check(upstream: &file::UpstreamSection) -> Option<CheckSettings> {
    let http = HttpCheck {
        path: upstream.check_path.clone(),
        statuses: upstream.check_statuses.iter().map(|value| status(*value)).collect(),
        body: upstream.check_body.clone(),
    };
    Some(CheckSettings {
        http: match upstream.check {
            file::CheckKind::None => return None,
            file::CheckKind::Tcp => None,
            file::CheckKind::Http => Some(http),
        },
        port: upstream.check_port.map(|port| u16::try_from(port).unwrap_or(0)),
        interval: upstream.check_interval,
        timeout: upstream.check_timeout,
        failures: u32::try_from(upstream.check_failures).unwrap_or(u32::MAX),
        successes: u32::try_from(upstream.check_successes).unwrap_or(u32::MAX),
    })
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
    let AddressList { networks, unix_peers } = listed(peers);
    TrustedProxies { networks, unix_peers }
}

fn listed(peers: &[file::Proxy]) -> AddressList {
    let mut list = AddressList::default();
    for peer in peers {
        match &peer.0 {
            TrustedPeer::Network(network) => list.networks.push(canonical_network(*network)),
            TrustedPeer::Unix => list.unix_peers = true,
        }
    }
    list
}

/// The amounts of a limit or a plan.
fn amounts(
    rate: Option<&file::RateText>,
    burst: Option<u64>,
    quota: Option<&file::QuotaText>,
    concurrency: Option<u64>,
) -> LimitAmounts {
    LimitAmounts {
        rate: rate.map(|rate| {
            let (requests, period_ms) = rate.0;
            RefillRate::new(requests, period_ms, burst.unwrap_or(requests))
        }),
        quota: quota.map(|quota| quota.0),
        concurrency: concurrency.map(|most| u32::try_from(most).unwrap_or(u32::MAX)),
    }
}
