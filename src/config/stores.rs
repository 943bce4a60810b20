//! From `[[store]]` to each store's own settings: secrets read from their files, TLS as the address asks for, and what goes
//! with what.

use super::File;
use super::file::{
    self, BoundAs, IntrospectionMode, PostgresPreset, RedisChangesBy, RedisTopology, Store, Tls, UpstreamAddress,
};
use super::resolve::Check;
use crate::store::introspect::{self, IntrospectMode, IntrospectSettings};
use crate::store::postgres::{self, Bind, PostgresSettings, Source};
use crate::store::redis::{RedisChanges, RedisSettings, Topology};
use crate::store::{NamedStore, PemFile, Place, Secret, StoreSettings, TlsMode, TlsSettings};
use crate::upstream::{ServerAddress, UpstreamSettings};
use std::path::Path;
use std::time::Duration;

impl Check<'_> {
    pub(super) fn stores(&mut self, file: &File, folder: &Path, upstreams: &[UpstreamSettings]) -> Vec<NamedStore> {
        let mut stores: Vec<NamedStore> = Vec::new();
        for (index, store) in file.stores.iter().enumerate() {
            let mut at = Entry { index, only: file.stores.len() == 1, line: 0, folder };
            let (kind_name, name, line, timeout, kind) = match store {
                Store::Sqlite(s) => {
                    ("sqlite", &s.name, s.line, s.timeout, StoreSettings::Sqlite(folder.join(&s.path.0)))
                }
                Store::File(s) => ("file", &s.name, s.line, s.timeout, StoreSettings::File(folder.join(&s.path.0))),
                Store::Postgres(s) => {
                    at.line = s.line;
                    ("postgres", &s.name, s.line, s.timeout, StoreSettings::Postgres(Box::new(self.postgres(s, &at))))
                }
                Store::Redis(s) => {
                    at.line = s.line;
                    ("redis", &s.name, s.line, s.timeout, StoreSettings::Redis(Box::new(self.redis(s, &at))))
                }
                Store::Introspection(s) => {
                    at.line = s.line;
                    let settings = Box::new(self.introspection(s, &at, file, upstreams));
                    ("introspection", &s.name, s.line, s.timeout, StoreSettings::Introspection(settings))
                }
            };
            at.line = line;
            let name = if name.is_empty() { kind_name.to_owned() } else { name.clone() };
            if stores.iter().any(|other| other.name == name) {
                let why = format!("\"{name}\" stands there twice: metrics could not tell them apart");
                self.problem(line, at.key("name"), why, "give each [[store]] a name");
            }
            self.at_least(timeout, Duration::from_millis(1), line, &at.key("timeout"));
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
            let instead = "the secret stands in GitLab's config/secrets.yml, or /etc/gitlab/gitlab-secrets.json";
            self.problem(at.line, at.key("db_key_base_file"), "is missing: the digests hold a part of it", instead);
        }
        if needs_secret && gitlab_secret.as_ref().is_some_and(|secret| secret.expose().chars().count() < 32) {
            let why = "holds fewer than 32 characters: that is no db_key_base";
            self.problem(at.line, at.key("db_key_base_file"), why, "the value alone, without its name or quotes");
        }
        let secret = gitlab_secret.unwrap_or_default();
        if (s.preset == PostgresPreset::Custom) == s.lookup.trim().is_empty() {
            let (why, instead) = match s.preset {
                PostgresPreset::Custom => ("is missing", "like \"SELECT login AS user FROM people WHERE token = $1\""),
                _ => ("goes with preset = \"custom\" only", "take it out, or write preset = \"custom\""),
            };
            self.problem(at.line, at.key("lookup"), why, instead);
        } else if s.preset == PostgresPreset::Custom && !s.lookup.contains("$1") {
            self.problem(
                at.line,
                at.key("lookup"),
                "has no $1: it would find a row for whatever token",
                "… WHERE token = $1",
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
            let instead = "like \"postgres://user@host:5432/database\", with the password in password_file";
            self.problem(at.line, at.key("url"), why, instead);
        }
        settings
    }

    fn redis(&mut self, s: &file::RedisStore, at: &Entry<'_>) -> RedisSettings {
        let servers: Vec<String> = s.servers.iter().map(|UpstreamAddress(server)| server.to_string()).collect();
        if servers.is_empty() {
            self.problem(at.line, at.key("servers"), "is empty", "like [\"127.0.0.1:6379\"]");
        }
        if servers.iter().any(|server| server.contains('@')) {
            let instead = "username and password_file are settings of their own";
            self.problem(at.line, at.key("servers"), "must not hold a user or a password", instead);
        }
        if s.topology == RedisTopology::Single && servers.len() > 1 {
            let instead = "topology = \"sentinel\" or \"cluster\" take several";
            self.problem(at.line, at.key("servers"), "are several where one is asked", instead);
        }
        if s.topology == RedisTopology::Cluster && (s.database != 0 || s.changes == RedisChangesBy::Keyspace) {
            let why = "a cluster has database 0 only, and no keyspace notifications that one subscriber could hear";
            self.problem(at.line, at.key("topology"), why, "database = 0, changes = \"channel\"");
        }
        if s.prefix.is_empty() || s.prefix.contains(|c: char| !c.is_ascii_graphic() || "*?[]\\{}".contains(c)) {
            let why = "must be there, of visible characters other than *?[]\\{}";
            self.problem(at.line, at.key("prefix"), why, "like \"tollgate:token:\"");
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
        // Without an upstream there is no default; that it is missing is said elsewhere.
        let unasked = url.is_empty() && upstreams.is_empty();
        let known = ["http://", "https://", "unix:/"].iter().any(|scheme| url.starts_with(scheme));
        if !unasked && !known {
            let instead = "like \"http://127.0.0.1:3000/api/v3/user\"";
            self.problem(at.line, at.key("endpoint"), "is no address that can be asked", instead);
        }
        let client_secret = self.secret(at, "client_secret_file", &s.client_secret_file).unwrap_or_default();
        if s.mode == IntrospectionMode::Rfc7662 && (s.endpoint.is_empty() || s.client_id.is_empty()) {
            self.problem(
                at.line,
                at.key("mode"),
                "\"rfc7662\" needs endpoint and client_id",
                "as the server gave them",
            );
        }
        for pointer in s.user.iter().chain([&s.scopes_at]) {
            if !pointer.is_empty() && !pointer.starts_with('/') {
                let why = format!("\"{pointer}\" is no JSON pointer");
                self.problem(at.line, at.key("user"), why, "like \"/username\"");
            }
        }
        if s.user.is_empty() || s.breaker_failures == 0 || s.breaker_failures > 1_000 {
            let why = "user must name a field, and breaker_failures be from 1 to 1000";
            self.problem(at.line, at.key("user"), why, "leave them out for the defaults");
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
                Ok(Some(place)) => self.warning(format!(
                    "{}: EVERY TOKEN TRAVELS IN PLAIN TEXT to {place}, as insecure_http says; whoever listens on the way \
                     can use them",
                    at.key("endpoint")
                )),
                Err(why) => {
                    let (key, why) = match why.split_once(": ") {
                        Some(("unknown_statuses", why)) => ("unknown_statuses", why),
                        Some(("url", why)) => ("endpoint", why),
                        _ => ("endpoint", why.as_str()),
                    };
                    self.problem(at.line, at.key(key), why, "");
                }
            }
        }
        settings
    }

    fn connections(&mut self, at: &Entry<'_>, count: u64) -> usize {
        if count == 0 || count > 1_000 {
            self.problem(at.line, at.key("connections"), "is out of range", "from 1 to 1000");
        }
        usize::try_from(count.clamp(1, 1_000)).unwrap_or(1)
    }

    /// The first line of a file; `None` when no file is named.
    fn secret(&mut self, at: &Entry<'_>, key: &str, path: &str) -> Option<Secret> {
        if path.is_empty() {
            return None;
        }
        match std::fs::read_to_string(at.folder.join(path)) {
            Ok(text) if !text.lines().next().unwrap_or_default().is_empty() => {
                Some(Secret::new(text.lines().next().unwrap_or_default()))
            }
            Ok(_) => {
                self.problem(at.line, at.key(key), "names an empty file", "its first line is the secret");
                None
            }
            Err(error) => {
                self.problem(at.line, at.key(key), format!("can't be read: {error}"), "its first line is the secret");
                None
            }
        }
    }

    fn tls(&mut self, at: &Entry<'_>, mode: Tls, auto: TlsMode, [ca, cert, key]: [&String; 3]) -> TlsSettings {
        let file =
            |text: &String| Some(text).filter(|text| !text.is_empty()).map(|text| PemFile::from(at.folder.join(text)));
        if cert.is_empty() != key.is_empty() {
            self.problem(at.line, at.key("tls_cert"), "and tls_key go together", "name both files, or none");
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
            self.problem(at.line, at.key("tls"), why, "PEM files that tollgate may read");
        }
        settings
    }
}

/// Where a problem stands.
struct Entry<'a> {
    index: usize,
    only: bool,
    line: usize,
    folder: &'a Path,
}

impl Entry<'_> {
    fn key(&self, key: &str) -> String {
        if self.only { format!("store.{key}") } else { format!("store[{}].{key}", self.index) }
    }
}
