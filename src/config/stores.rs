//! From `[[store]]` to each store's own settings: secrets read from their files, TLS as the address asks for, and what goes
//! with what.

use super::File;
use super::file::{
    self, BoundAs, IntrospectionMode, PostgresPreset, RedisChangesBy, RedisTopology, Store, Tls, UpstreamAddress,
};
use super::resolve::Gather;
use crate::problem::Problem;
use crate::store::introspect::{self, IntrospectMode, IntrospectSettings};
use crate::store::postgres::{self, Bind, PostgresSettings, Source};
use crate::store::redis::{RedisChanges, RedisSettings, Topology};
use crate::store::{NamedStore, PemFile, Place, Secret, StoreSettings, TlsMode, TlsSettings};
use crate::upstream::{ServerAddress, UpstreamSettings};
use std::path::Path;
use std::time::Duration;

impl Gather<'_, '_> {
    pub(super) fn stores(&mut self, file: &File, folder: &Path, upstreams: &[UpstreamSettings]) -> Vec<NamedStore> {
        let mut stores: Vec<NamedStore> = Vec::new();
        for store in &file.stores {
            let at = Entry { section: store.at(), folder };
            let (kind_name, name, timeout, kind) = match store {
                Store::Sqlite(s) => ("sqlite", &s.name, s.timeout, StoreSettings::Sqlite(folder.join(&s.path.0))),
                Store::File(s) => ("file", &s.name, s.timeout, StoreSettings::File(folder.join(&s.path.0))),
                Store::Postgres(s) => {
                    ("postgres", &s.name, s.timeout, StoreSettings::Postgres(Box::new(self.postgres(s, &at))))
                }
                Store::Redis(s) => ("redis", &s.name, s.timeout, StoreSettings::Redis(Box::new(self.redis(s, &at)))),
                Store::Introspection(s) => {
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
            stores.push(NamedStore { name, timeout, kind });
        }
        stores
    }

    fn postgres(&mut self, s: &file::PostgresStore, at: &Entry<'_>) -> PostgresSettings {
        let auto = postgres::tls_auto(&s.url).unwrap_or(TlsMode::Local);
        let gitlab_secret = self.secret(at, "db_key_base_file", &s.db_key_base_file);
        let needs_secret = s.preset == PostgresPreset::GitlabPatDigest
            || s.preset == PostgresPreset::Custom && s.digest == BoundAs::Gitlab;
        if needs_secret && gitlab_secret.is_none() && s.db_key_base_file.is_empty() {
            let instead =
                "name a file with the secret from GitLab's config/secrets.yml or /etc/gitlab/gitlab-secrets.json";
            self.store_problem(at, "db_key_base_file", "is missing: the digests hold a part of it", instead);
        }
        if needs_secret && gitlab_secret.as_ref().is_some_and(|secret| secret.expose().chars().count() < 32) {
            let why = "names a file with fewer than 32 characters, which is not a db_key_base";
            self.store_problem(
                at,
                "db_key_base_file",
                why,
                "write the value alone into it, without its name or quotes",
            );
        }
        let secret = gitlab_secret.unwrap_or_default();
        if (s.preset == PostgresPreset::Custom) == s.lookup.trim().is_empty() {
            let (why, instead) = match s.preset {
                PostgresPreset::Custom => {
                    ("is missing", "write it like \"SELECT login AS user FROM people WHERE token = $1\"")
                }
                _ => ("goes with preset = \"custom\" only", "remove it, or use preset = \"custom\""),
            };
            self.store_problem(at, "lookup", why, instead);
        } else if s.preset == PostgresPreset::Custom && !s.lookup.contains("$1") {
            self.store_problem(
                at,
                "lookup",
                "has no $1: it would find a row for whatever token",
                "write it like \"… WHERE token = $1\"",
            );
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
        let settings = PostgresSettings {
            url: Secret::new(&s.url),
            password: self.secret(at, "password_file", &s.password_file),
            tls: self.tls(at, s.tls, auto, [&s.tls_ca, &s.tls_cert, &s.tls_key]),
            connections: self.connections(at, s.connections),
            source,
            channel: s.notify.then(|| s.channel.0.clone()),
            default_scopes: s.scopes.clone(),
            timeout: s.timeout,
        };
        if let Err(why) = postgres::check_url(&settings) {
            let instead = "write it like \"postgres://user@host:5432/database\", with the password in password_file";
            self.store_problem(at, "url", why, instead);
        }
        settings
    }

    fn redis(&mut self, s: &file::RedisStore, at: &Entry<'_>) -> RedisSettings {
        let servers: Vec<String> = s.servers.iter().map(|UpstreamAddress(server)| server.to_string()).collect();
        if servers.is_empty() {
            self.store_problem(at, "servers", "is empty", "write it like [\"127.0.0.1:6379\"]");
        }
        if servers.iter().any(|server| server.contains('@')) {
            let instead = "use username and password_file";
            self.store_problem(at, "servers", "must not hold a user or a password", instead);
        }
        if s.topology == RedisTopology::Single && servers.len() > 1 {
            let instead = "name one, or use topology = \"sentinel\" or \"cluster\"";
            self.store_problem(at, "servers", "names several servers for topology = \"single\"", instead);
        }
        if s.topology == RedisTopology::Cluster && (s.database != 0 || s.changes == RedisChangesBy::Keyspace) {
            let why = "does not go with these: a cluster has database 0 only, and no keyspace notifications that one subscriber gets";
            self.store_problem(at, "topology", why, "use database = 0 and changes = \"channel\"");
        }
        if s.prefix.is_empty() || s.prefix.contains(|c: char| !c.is_ascii_graphic() || "*?[]\\{}".contains(c)) {
            let why = "must have visible characters other than *?[]\\{} only";
            self.store_problem(at, "prefix", why, "write it like \"tollgate:token:\"");
        }
        let auto = TlsMode::auto(s.servers.iter().map(|UpstreamAddress(server)| match server {
            ServerAddress::Unix(_) => Place::Socket,
            ServerAddress::Tcp(address) => Place::of_host(address.rsplit_once(':').map_or(address, |(host, _)| host)),
        }));
        RedisSettings {
            servers,
            topology: match s.topology {
                RedisTopology::Single => Topology::Single,
                RedisTopology::Sentinel => Topology::Sentinel { master: s.master.clone() },
                RedisTopology::Cluster => Topology::Cluster,
            },
            database: i64::try_from(s.database).unwrap_or(i64::MAX),
            username: Some(s.username.clone()).filter(|name| !name.is_empty()),
            password: self.secret(at, "password_file", &s.password_file),
            tls: self.tls(at, s.tls, auto, [&s.tls_ca, &s.tls_cert, &s.tls_key]),
            prefix: s.prefix.clone(),
            changes: match s.changes {
                RedisChangesBy::Channel => RedisChanges::Channel(s.channel.clone()),
                RedisChangesBy::Keyspace => RedisChanges::Keyspace,
                RedisChangesBy::None => RedisChanges::None,
            },
            connections: self.connections(at, s.connections),
            default_scopes: s.scopes.clone(),
        }
    }

    fn introspection(
        &mut self,
        s: &file::IntrospectionStore,
        at: &Entry<'_>,
        file: &File,
        upstreams: &[UpstreamSettings],
    ) -> IntrospectSettings {
        let prefix = file.api.prefixes.first().map_or("", |prefix| prefix.0.trim_end_matches('/'));
        let server = upstreams.first().and_then(|upstream| upstream.servers.first());
        let url = match (s.endpoint.as_str(), server) {
            ("", Some(ServerAddress::Tcp(address))) => format!("http://{address}{prefix}/user"),
            ("", Some(ServerAddress::Unix(path))) => format!("unix:{path}:{prefix}/user"),
            (endpoint, _) => endpoint.to_owned(),
        };
        // Without a server of an upstream there is no default; that it is missing is reported elsewhere.
        let unasked = url.is_empty();
        let known = ["http://", "https://", "unix:/"].iter().any(|scheme| url.starts_with(scheme));
        if !unasked && !known {
            let instead = "write it like \"http://127.0.0.1:3000/api/v3/user\"";
            self.store_problem(at, "endpoint", "is not an address that can be asked", instead);
        }
        let client_secret = self.secret(at, "client_secret_file", &s.client_secret_file).unwrap_or_default();
        if s.mode == IntrospectionMode::Rfc7662 && (s.endpoint.is_empty() || s.client_id.is_empty()) {
            self.store_problem(
                at,
                "mode",
                "\"rfc7662\" needs endpoint and client_id",
                "set them as the server gave them",
            );
        }
        let pointer = |text: &str| text.is_empty() || text.starts_with('/');
        for (index, _) in s.user.iter().enumerate().filter(|(_, text)| !pointer(text)) {
            let problem = Problem::error("user", "is not a JSON pointer", "write it like \"/username\"");
            self.places.add(at.section, problem.element(index));
        }
        if !pointer(&s.scopes_at) {
            self.store_problem(at, "scopes_at", "is not a JSON pointer", "write it like \"/scope\"");
        }
        if s.user.is_empty() {
            self.store_problem(at, "user", "is empty", "remove it for the default");
        }
        if s.breaker_failures == 0 || s.breaker_failures > 1_000 {
            self.store_problem(at, "breaker_failures", "is out of range", "use a number from 1 to 1000");
        }
        let auto = match url.starts_with("https://") {
            true => TlsMode::VerifyFull,
            false if s.insecure_http => TlsMode::Disable,
            false => TlsMode::Local,
        };
        let settings = IntrospectSettings {
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
            connections: self.connections(at, s.connections),
            breaker_failures: u32::try_from(s.breaker_failures).unwrap_or(u32::MAX),
            breaker_pause: s.breaker_pause,
        };
        if !unasked && known {
            match introspect::check_url(&settings) {
                Ok(None) => {}
                Ok(Some(place)) => {
                    let what = format!(
                        "EVERY TOKEN TRAVELS IN PLAIN TEXT to {place}, as insecure_http says; whoever listens on the way can \
                         use them"
                    );
                    self.places.add(at.section, Problem::warning("endpoint", what, "use https://"));
                }
                Err(why) => {
                    let (key, why) = match why.split_once(": ") {
                        Some(("unknown_statuses", why)) => ("unknown_statuses", why),
                        Some(("url", why)) => ("endpoint", why),
                        _ => ("endpoint", why.as_str()),
                    };
                    self.store_problem(at, key, why, "");
                }
            }
        }
        settings
    }

    fn connections(&mut self, at: &Entry<'_>, count: u64) -> usize {
        if count == 0 || count > 1_000 {
            self.store_problem(at, "connections", "is out of range", "use a number from 1 to 1000");
        }
        usize::try_from(count.clamp(1, 1_000)).unwrap_or(1)
    }

    fn store_problem(
        &mut self,
        at: &Entry<'_>,
        key: &'static str,
        what: impl Into<String>,
        instead: impl Into<String>,
    ) {
        self.places.add(at.section, Problem::error(key, what, instead));
    }

    /// The first line of a file; `None` when no file is named.
    fn secret(&mut self, at: &Entry<'_>, key: &'static str, path: &str) -> Option<Secret> {
        if path.is_empty() {
            return None;
        }
        match std::fs::read_to_string(at.folder.join(path)) {
            Ok(text) if !text.lines().next().unwrap_or_default().is_empty() => {
                Some(Secret::new(text.lines().next().unwrap_or_default()))
            }
            Ok(_) => {
                self.store_problem(at, key, "names an empty file", "its first line must be the secret");
                None
            }
            Err(error) => {
                self.store_problem(
                    at,
                    key,
                    format!("cannot be read: {error}"),
                    "name a file whose first line is the secret",
                );
                None
            }
        }
    }

    fn tls(&mut self, at: &Entry<'_>, mode: Tls, auto: TlsMode, [ca, cert, key]: [&String; 3]) -> TlsSettings {
        let file =
            |text: &String| Some(text).filter(|text| !text.is_empty()).map(|text| PemFile::from(at.folder.join(text)));
        if cert.is_empty() != key.is_empty() {
            self.store_problem(at, "tls_cert", "and tls_key go together", "name both files, or neither");
        }
        let settings = TlsSettings {
            mode: match mode {
                Tls::Auto => auto,
                Tls::VerifyFull => TlsMode::VerifyFull,
                Tls::Disable => TlsMode::Disable,
                Tls::Require => TlsMode::Require,
                Tls::VerifyCa => TlsMode::VerifyCa,
            },
            ca: file(ca),
            client: file(cert).zip(file(key)),
        };
        if let Err(why) = settings.client_config() {
            let named = |text: &String| !text.is_empty() && why.starts_with(&*at.folder.join(text).to_string_lossy());
            let files = [("tls_ca", ca), ("tls_cert", cert), ("tls_key", key)];
            let key = files.into_iter().find(|(_, text)| named(text)).map_or("tls", |(key, _)| key);
            self.store_problem(at, key, why, "name PEM files that tollgate may read");
        }
        settings
    }
}

/// The section that is read.
struct Entry<'a> {
    section: &'a str,
    folder: &'a Path,
}
