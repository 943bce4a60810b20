//! From `[[store]]` to each store's own settings: secrets read from their files, TLS as the address asks for, and what goes
//! with what.

use super::File;
use super::file::{
    self, BoundAs, IntrospectionMode, PostgresPreset, RedisChangesBy, RedisTopology, StoreSection, Tls, UpstreamAddress,
};
use super::resolve::Gather;
use super::text_file;
use crate::problem::Problem;
use crate::share::{ShareStoreSettings, SharedLimitSettings, WhenGone};
use crate::store::introspect::{IntrospectMode, IntrospectSettings};
use crate::store::postgres::{self, Bind, PostgresSettings, Source};
use crate::store::redis::{RedisChanges, RedisSettings, Topology};
use crate::store::{IDLE, NamedStore, Place, Secret, StoreSettings, TlsMode, TlsSettings};
use crate::tls::PemFile;
use crate::upstream::{ServerAddress, UpstreamSettings};
use std::path::Path;
use std::time::Duration;

impl Gather<'_, '_> {
    pub(super) fn stores(&mut self, file: &File, folder: &Path, upstreams: &[UpstreamSettings]) -> Vec<NamedStore> {
        let mut stores: Vec<NamedStore> = Vec::new();
        for store in &file.stores {
            let at = SectionContext { section: store.at(), folder };
            let (kind_name, name, timeout, kind) = match store {
                StoreSection::Sqlite(s) => {
                    ("sqlite", &s.name, s.timeout, StoreSettings::Sqlite(folder.join(&s.path.0)))
                }
                StoreSection::File(s) => ("file", &s.name, s.timeout, StoreSettings::File(folder.join(&s.path.0))),
                StoreSection::Postgres(s) => {
                    ("postgres", &s.name, s.timeout, StoreSettings::Postgres(Box::new(self.postgres(s, &at))))
                }
                StoreSection::Redis(s) => {
                    ("redis", &s.name, s.timeout, StoreSettings::Redis(Box::new(self.redis(s, &at))))
                }
                StoreSection::Introspection(s) => {
                    let settings = Box::new(self.introspection(s, &at, file, upstreams));
                    ("introspection", &s.name, s.timeout, StoreSettings::Introspection(settings))
                }
            };
            let name = if name.is_empty() { kind_name.to_owned() } else { name.clone() };
            if let Some(first) = stores.iter().position(|other| other.name == name) {
                let what = format!("\"{name}\" is the name of an earlier store: metrics could not tell them apart");
                let problem = Problem::error("name", what, "give each [[store]] a name");
                self.places.report(at.section, problem, Some(format!("{}.name", file.stores[first].at())));
            }
            self.all(
                at.section,
                Problem::too_short("timeout", timeout, Duration::from_millis(1)).into_iter().collect(),
            );
            self.all(at.section, kind.problems());
            stores.push(NamedStore { name, timeout, kind });
        }
        stores
    }

    fn postgres(&mut self, s: &file::PostgresSection, at: &SectionContext<'_>) -> PostgresSettings {
        let auto = postgres::tls_auto(&s.url);
        let secret = self.secret(at, "db_key_base_file", &s.db_key_base_file).unwrap_or_default();
        if s.preset != PostgresPreset::Custom && !s.lookup.trim().is_empty() {
            let instead = "remove it, or use preset = \"custom\"";
            self.store_problem(at, "lookup", "goes with preset = \"custom\" only", instead);
        }
        let source = match s.preset {
            PostgresPreset::Tollgate => Source::Own { schema: s.schema.0.clone() },
            PostgresPreset::GitlabLegacy => Source::GitlabLegacy,
            PostgresPreset::GitlabPat => Source::GitlabPat,
            PostgresPreset::GitlabPatDigest => Source::GitlabPatDigest(secret),
            PostgresPreset::Custom => Source::Lookup {
                sql: s.lookup.trim().trim_end_matches(';').into(),
                bind: match s.digest {
                    BoundAs::Plain => Bind::Plain,
                    BoundAs::Sha256Hex => Bind::Sha256Hex,
                    BoundAs::Sha256Base64 => Bind::Sha256Base64,
                    BoundAs::Gitlab => Bind::Gitlab(secret),
                },
            },
        };
        PostgresSettings {
            url: Secret::new(&s.url),
            password: self.secret(at, "password_file", &s.password_file),
            tls: self.tls(at, s.tls, auto, [&s.tls_ca, &s.tls_cert, &s.tls_key]),
            connections: count(s.connections),
            source,
            channel: s.notify.then(|| s.channel.0.clone()),
            default_scopes: s.scopes.clone(),
            timeout: s.timeout,
            idle: IDLE,
        }
    }

    fn redis(&mut self, s: &file::RedisSection, at: &SectionContext<'_>) -> RedisSettings {
        let servers: Vec<String> = s.servers.iter().map(|UpstreamAddress(server)| server.to_string()).collect();
        let auto = TlsMode::auto(s.servers.iter().map(|UpstreamAddress(server)| match server {
            ServerAddress::Unix(_) => Place::Socket,
            ServerAddress::Tcp(address) => Place::of_host(address.rsplit_once(':').map_or(address, |(host, _)| host)),
        }));
        let password = self.secret(at, "password_file", &s.password_file);
        if password.is_none() && !s.password_file.is_empty() {
            // That it is missing has been said already.
            self.places.spoil(format!("{}.username", at.section));
        }
        RedisSettings {
            servers,
            topology: match s.topology {
                RedisTopology::Single => Topology::Single,
                RedisTopology::Sentinel => Topology::Sentinel { master: s.master.clone() },
                RedisTopology::Cluster => Topology::Cluster,
            },
            database: i64::try_from(s.database).unwrap_or(i64::MAX),
            username: Some(s.username.clone()).filter(|name| !name.is_empty()),
            password,
            tls: self.tls(at, s.tls, auto, [&s.tls_ca, &s.tls_cert, &s.tls_key]),
            prefix: s.prefix.clone(),
            changes: match s.changes {
                RedisChangesBy::Channel => RedisChanges::Channel(s.channel.clone()),
                RedisChangesBy::Keyspace => RedisChanges::Keyspace,
                RedisChangesBy::None => RedisChanges::None,
            },
            connections: count(s.connections),
            idle: IDLE,
            default_scopes: s.scopes.clone(),
        }
    }

    /// `None`: replicas share no limits.
    pub(super) fn shared_limits(&mut self, file: &File, folder: &Path) -> Option<SharedLimitSettings> {
        let s = &file.shared_limits;
        let at = SectionContext { section: &s.at, folder };
        let shared = file.limit.iter().find(|limit| limit.shared);
        let guesses = file.guessing.shared && file.guessing.failures.is_some();
        let store = match s.store {
            file::SharedStore::None => {
                if let Some(limit) = shared {
                    let problem = Problem::error("shared", "needs a store", "set store in [shared_limits]");
                    self.places.add(&limit.at, problem);
                }
                if guesses {
                    let problem = Problem::error("shared", "needs a store", "set store in [shared_limits]");
                    self.places.add("guessing", problem);
                }
                return None;
            }
            file::SharedStore::Redis => ShareStoreSettings::Redis(Box::new(self.redis(
                &file::RedisSection {
                    kind: file::StoreKind::Redis,
                    name: String::new(),
                    servers: s.servers.clone(),
                    topology: s.topology,
                    master: s.master.clone(),
                    database: s.database,
                    username: s.username.clone(),
                    password_file: s.password_file.clone(),
                    tls: s.tls,
                    tls_ca: s.tls_ca.clone(),
                    tls_cert: s.tls_cert.clone(),
                    tls_key: s.tls_key.clone(),
                    prefix: s.prefix.clone(),
                    scopes: Vec::new(),
                    changes: RedisChangesBy::None,
                    channel: String::new(),
                    connections: s.connections,
                    timeout: s.timeout,
                    at: s.at.clone(),
                },
                &at,
            ))),
            file::SharedStore::Postgres => ShareStoreSettings::Postgres(Box::new(PostgresSettings {
                url: Secret::new(&s.url),
                password: self.secret(&at, "password_file", &s.password_file),
                tls: self.tls(&at, s.tls, postgres::tls_auto(&s.url), [&s.tls_ca, &s.tls_cert, &s.tls_key]),
                connections: count(s.connections),
                source: Source::Own { schema: s.schema.0.clone() },
                channel: None,
                default_scopes: Vec::new(),
                timeout: s.timeout,
                idle: IDLE,
            })),
        };
        let secret = self.secret(&at, "secret_file", &s.secret_file);
        let when_gone = match s.when_gone {
            file::WhenGoneWord::Local => WhenGone::Local,
            file::WhenGoneWord::Open => WhenGone::Open,
            file::WhenGoneWord::Closed => WhenGone::Closed,
        };
        let settings = SharedLimitSettings { store, timeout: s.timeout, when_gone, secret };
        self.all(at.section, settings.problems());
        if shared.is_none() && !guesses {
            let what = "is of no use: no [[limit]] has shared = true, nor has [guessing]";
            let problem = Problem::warning("store", what, "set it there");
            self.places.add(at.section, problem);
        }
        Some(settings)
    }

    fn introspection(
        &mut self,
        s: &file::IntrospectionSection,
        at: &SectionContext<'_>,
        file: &File,
        upstreams: &[UpstreamSettings],
    ) -> IntrospectSettings {
        let prefix = file.api.prefixes.first().map_or("", |prefix| prefix.0.trim_end_matches('/'));
        let server = upstreams.first().and_then(|upstream| upstream.servers.first());
        if s.endpoint.is_empty() && upstreams.first().is_some_and(|upstream| upstream.tls.is_some()) {
            // The store has TLS settings of its own; tokens must not go there in plain text by a default.
            let what = "is missing: the first [[upstream]] speaks TLS, so there is no default";
            self.store_problem(at, "endpoint", what, "write it like \"https://backend.example/api/v3/user\"");
        }
        let url = match (s.endpoint.as_str(), server.map(|server| &server.address)) {
            ("", Some(ServerAddress::Tcp(address))) => format!("http://{address}{prefix}/user"),
            ("", Some(ServerAddress::Unix(path))) => format!("unix:{path}:{prefix}/user"),
            (endpoint, _) => endpoint.to_owned(),
        };
        if url.is_empty() {
            // Without a server of an upstream there is no default; that it is missing is reported elsewhere.
            self.places.spoil(format!("{}.endpoint", at.section));
        }
        let client_secret = self.secret(at, "client_secret_file", &s.client_secret_file).unwrap_or_default();
        if s.mode == IntrospectionMode::Rfc7662 && s.endpoint.is_empty() {
            self.store_problem(
                at,
                "endpoint",
                "is missing: mode = \"rfc7662\" needs it",
                "set it as the server gave it",
            );
        }
        let auto = match url.starts_with("https://") {
            true => TlsMode::VerifyFull,
            false if s.insecure_http => TlsMode::Disable,
            false => TlsMode::Local,
        };
        IntrospectSettings {
            url,
            insecure_http: s.insecure_http,
            mode: match s.mode {
                IntrospectionMode::User => IntrospectMode::User {
                    header: file.token.header.0.clone(),
                    unknown: s.unknown_statuses.iter().map(|status| u16::try_from(*status).unwrap_or(0)).collect(),
                },
                IntrospectionMode::Rfc7662 => IntrospectMode::Rfc7662 { client_id: s.client_id.clone(), client_secret },
            },
            user: s.user.clone(),
            scopes: s.scopes_at.clone(),
            default_scopes: s.scopes.clone(),
            tls: self.tls(at, s.tls, auto, [&s.tls_ca, &s.tls_cert, &s.tls_key]),
            connections: count(s.connections),
            breaker_failures: u32::try_from(s.breaker_failures).unwrap_or(u32::MAX),
            breaker_pause: s.breaker_pause,
        }
    }

    fn store_problem(
        &mut self,
        at: &SectionContext<'_>,
        key: &'static str,
        what: impl Into<String>,
        instead: impl Into<String>,
    ) {
        self.places.add(at.section, Problem::error(key, what, instead));
    }

    /// The first line of a file; `None` when no file is named.
    fn secret(&mut self, at: &SectionContext<'_>, key: &'static str, path: &str) -> Option<Secret> {
        if path.is_empty() {
            return None;
        }
        let path = at.folder.join(path);
        self.places.secrets.push((format!("{}.{key}", at.section), path.clone()));
        match text_file::read(&path, text_file::SECRET) {
            Ok(text) if !text.lines().next().unwrap_or_default().is_empty() => {
                Some(Secret::new(text.lines().next().unwrap_or_default()))
            }
            Ok(_) => {
                self.store_problem(at, key, "names an empty file", "its first line must be the secret");
                None
            }
            Err(why) => {
                self.store_problem(at, key, why, "name a file whose first line is the secret");
                None
            }
        }
    }

    fn tls(&mut self, at: &SectionContext<'_>, mode: Tls, auto: TlsMode, [ca, cert, key]: [&String; 3]) -> TlsSettings {
        let file =
            |text: &String| Some(text).filter(|text| !text.is_empty()).map(|text| PemFile::from(at.folder.join(text)));
        if cert.is_empty() != key.is_empty() {
            self.store_problem(at, "tls_cert", "and tls_key go together", "name both files, or neither");
        }
        TlsSettings {
            mode: match mode {
                Tls::Auto => auto,
                Tls::VerifyFull => TlsMode::VerifyFull,
                Tls::Disable => TlsMode::Disable,
                Tls::Require => TlsMode::Require,
                Tls::VerifyCa => TlsMode::VerifyCa,
            },
            ca: file(ca),
            client: file(cert).zip(file(key)),
        }
    }
}

fn count(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// The section that is read, and the folder that its paths are relative to.
struct SectionContext<'a> {
    section: &'a str,
    folder: &'a Path,
}
