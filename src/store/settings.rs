//! The kinds of stores: the one place that says how each is opened for reading and for writing, and what it promises. It must
//! not know what a gateway makes of a record, nor what a command prints.

use super::file::{FileAdmin, FileStore};
use super::introspect::{IntrospectSettings, IntrospectStore};
use super::postgres::{PostgresAdmin, PostgresSettings, PostgresStore, Source};
use super::redis::{RedisAdmin, RedisChanges, RedisSettings, RedisStore};
use super::sqlite::{SqliteAdmin, SqliteStore};
use super::{AdminError, TlsSettings, TokenAdmin, TokenStore};
use crate::clock::Now;
use crate::problem::Problem;
use crate::telemetry::metrics::StoreMetrics;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// One store of a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedStore {
    /// Label of metrics and logs.
    pub name: String,
    /// How long a lookup may take.
    pub timeout: Duration,
    pub kind: StoreSettings,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreSettings {
    Sqlite(PathBuf),
    File(PathBuf),
    Postgres(Box<PostgresSettings>),
    Redis(Box<RedisSettings>),
    Introspection(Box<IntrospectSettings>),
}

/// How long a token that was revoked in the store can still be accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// The store sends change notifications: within a second.
    Notified,
    /// It does once `tollgate store install-triggers` has been run.
    NotifiedWithTriggers,
    /// It sends none: as long as a cached answer is used.
    CacheLifetime,
}

/// What becomes of an embedded database that does not exist yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MissingStore {
    Create,
    /// It reads as empty. A command that only reads, or changes what exists, must not leave one behind.
    ReadEmpty,
}

impl StoreSettings {
    /// Opens the store as a running gateway uses it. A remote one connects with its first lookup.
    pub fn open(
        &self,
        timeout: Duration,
        metrics: Arc<StoreMetrics>,
        clock: fn() -> Now,
    ) -> Result<Arc<dyn TokenStore>, Problem> {
        Ok(match self.clone() {
            Self::Sqlite(path) => Arc::new(SqliteStore::start(&path).map_err(|error| error.problem())?),
            Self::File(path) => Arc::new(FileStore::open(&path, metrics, clock).map_err(|error| error.problem())?),
            Self::Postgres(settings) => Arc::new(PostgresStore::new(*settings, metrics)?),
            Self::Redis(settings) => Arc::new(RedisStore::new(*settings, metrics)?),
            Self::Introspection(settings) => Arc::new(IntrospectStore::new(*settings, timeout, metrics)?),
        })
    }

    /// Whether tollgate writes to this kind of store; tokens of the others are made and ended where they come from.
    pub fn is_writable(&self) -> bool {
        match self {
            Self::Sqlite(_) | Self::File(_) | Self::Redis(_) => true,
            Self::Postgres(settings) => matches!(settings.source, Source::Own { .. }),
            Self::Introspection(_) => false,
        }
    }

    /// Opens the store for the command line. `None`: it is read-only for tollgate.
    pub async fn admin(&self, missing: MissingStore) -> Result<Option<Box<dyn TokenAdmin>>, AdminError> {
        if !self.is_writable() {
            return Ok(None);
        }
        Ok(match self {
            Self::Sqlite(path) if missing == MissingStore::ReadEmpty && is_absent(path) => {
                Some(Box::new(SqliteAdmin::empty()?))
            }
            Self::Sqlite(path) => Some(Box::new(SqliteAdmin::open(path)?)),
            Self::File(path) => Some(Box::new(FileAdmin::new(path))),
            Self::Postgres(settings) => Some(Box::new(PostgresAdmin::open(settings).await?)),
            Self::Redis(settings) => Some(Box::new(RedisAdmin::open(settings).await?)),
            Self::Introspection(_) => None,
        })
    }

    /// Which records are meant, and how they are read: what a cache may be taken over by. Not how they are reached, by whom,
    /// or how fast. Only to be compared or hashed, never shown: it may hold a key.
    pub fn records(&self) -> String {
        match self {
            Self::Sqlite(path) => format!("sqlite {}", path.display()),
            Self::File(path) => format!("file {}", path.display()),
            Self::Postgres(settings) => settings.records(),
            Self::Redis(settings) => settings.records(),
            Self::Introspection(settings) => settings.records(),
        }
    }

    pub fn bound(&self) -> Bound {
        match self {
            Self::Sqlite(_) | Self::File(_) => Bound::Notified,
            Self::Postgres(settings) if settings.channel.is_none() => Bound::CacheLifetime,
            Self::Postgres(settings) if matches!(settings.source, Source::Own { .. }) => Bound::Notified,
            Self::Postgres(_) => Bound::NotifiedWithTriggers,
            Self::Redis(settings) if settings.changes == RedisChanges::None => Bound::CacheLifetime,
            Self::Redis(_) => Bound::Notified,
            Self::Introspection(_) => Bound::CacheLifetime,
        }
    }

    /// How the other side is checked, where there is one.
    pub fn tls(&self) -> Option<&TlsSettings> {
        match self {
            Self::Sqlite(_) | Self::File(_) => None,
            Self::Postgres(settings) => Some(&settings.tls),
            Self::Redis(settings) => Some(&settings.tls),
            Self::Introspection(settings) => Some(&settings.tls),
        }
    }
}

/// Whether a file does not exist in a folder that does. A path that cannot be examined, a dangling link and a missing folder
/// are not absence: opening them reports the error.
fn is_absent(path: &Path) -> bool {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    folder.is_dir() && std::fs::symlink_metadata(path).is_err_and(|error| error.kind() == ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::super::introspect::IntrospectMode;
    use super::super::redis::Topology;
    use super::super::{Secret, TlsMode};
    use super::*;

    /// A cache of other records would let tokens in that are none; one of the same is taken over.
    #[test]
    fn records_are_told_apart_by_what_says_which_are_meant() {
        let tls = || TlsSettings { mode: TlsMode::Disable, ca: None, client: None };
        let postgres = |url: &str| PostgresSettings {
            url: Secret::new(url),
            password: None,
            tls: tls(),
            connections: 4,
            timeout: Duration::from_secs(1),
            idle: super::super::IDLE,
            source: Source::Own { schema: "tollgate".into() },
            channel: Some("c".into()),
            default_scopes: Vec::new(),
        };
        let of = |settings: PostgresSettings| StoreSettings::Postgres(Box::new(settings)).records();
        let base = of(postgres("postgres://a@one/tokens"));
        let same = [
            postgres("postgres://a:secret@one/tokens?connect_timeout=3"),
            postgres("host=one user=a dbname=tokens port=5432"),
            PostgresSettings {
                password: Some(Secret::new("rotated")),
                connections: 9,
                timeout: Duration::from_secs(9),
                channel: Some("d".into()),
                ..postgres("postgres://a@one/tokens")
            },
        ];
        for settings in same {
            assert_eq!(of(settings), base);
        }
        let others = [
            postgres("postgres://a@two/tokens"),
            postgres("postgres://a@one:5433/tokens"),
            postgres("postgres://a@one/others"),
            postgres("postgres://b@one/tokens"),
            PostgresSettings { source: Source::GitlabPat, ..postgres("postgres://a@one/tokens") },
            PostgresSettings { default_scopes: vec!["api".into()], ..postgres("postgres://a@one/tokens") },
        ];
        for settings in others {
            assert_ne!(of(settings), base);
        }
        let redis = |prefix: &str, servers: &[&str], connections| {
            StoreSettings::Redis(Box::new(RedisSettings {
                servers: servers.iter().map(|text| (*text).to_owned()).collect(),
                topology: Topology::Single,
                database: 0,
                username: None,
                password: None,
                tls: tls(),
                prefix: prefix.into(),
                changes: RedisChanges::None,
                connections,
                idle: super::super::IDLE,
                default_scopes: Vec::new(),
            }))
            .records()
        };
        assert_eq!(redis("a:", &["x:1"], 1), redis("a:", &["x:1"], 2));
        assert_ne!(redis("a:", &["x:1"], 1), redis("b:", &["x:1"], 1));
        assert_ne!(redis("a:", &["x:1"], 1), redis("a:", &["y:1"], 1));
        let introspection = |url: &str, breaker_failures| {
            StoreSettings::Introspection(Box::new(IntrospectSettings {
                url: url.into(),
                insecure_http: false,
                mode: IntrospectMode::User { header: "PRIVATE-TOKEN".into(), unknown: vec![401] },
                user: vec!["/username".into()],
                scopes: String::new(),
                default_scopes: Vec::new(),
                tls: tls(),
                connections: 8,
                breaker_failures,
                breaker_pause: Duration::from_secs(1),
            }))
            .records()
        };
        assert_eq!(introspection("https://one/user", 1), introspection("https://one/user", 2));
        assert_ne!(introspection("https://one/user", 1), introspection("https://two/user", 1));
    }

    /// "No such token" about a database that is there but cannot be reached would hide tokens that still work.
    #[tokio::test]
    async fn only_a_database_that_does_not_exist_reads_as_empty() {
        let folder = tempfile::tempdir().unwrap();
        let new = folder.path().join("new");
        let mut empty = StoreSettings::Sqlite(new.clone()).admin(MissingStore::ReadEmpty).await.unwrap().unwrap();
        assert!(empty.list().await.unwrap().is_empty() && !new.exists());
        let dangling = folder.path().join("dangling");
        std::os::unix::fs::symlink(folder.path().join("gone"), &dangling).unwrap();
        let long = folder.path().join("x".repeat(300));
        let no_folder = folder.path().join("missing/tokens.db");
        for path in [dangling, long, no_folder] {
            let opened = StoreSettings::Sqlite(path.clone()).admin(MissingStore::ReadEmpty).await;
            assert!(opened.is_err(), "{}", path.display());
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
