//! Redis and Valkey: one key per token, `<prefix><64 hex digits of its SHA-256>`, with a JSON object or a hash as its value.
//! A key that is missing, or whose TTL has expired, is an unknown token; a value that cannot be parsed is an error. Knows
//! nothing of HTTP.
//!
//! The permissions of an ACL user, for `prefix = "tollgate:"` and channel `tollgate:changes`:
//!
//! | for | permissions |
//! |---|---|
//! | lookups | `~tollgate:* +get +hgetall` |
//! | subscription to a channel | `&tollgate:changes +subscribe +ping +role +time +zadd +zrem +zrangebyscore +sadd +expire` |
//! | keyspace notifications | `&__keyspace@0__:* +psubscribe +ping +role +config\|get` |
//! | either of them | `+client\|tracking`, for notifications of FLUSHALL and FLUSHDB |
//! | sentinels, cluster | `+role`; `+cluster\|slots +cluster\|info`; `+select` for another database than 0 |
//! | the command line | the above and `+eval +set +hset +hget +scan +exists +publish +smembers +zremrangebyscore +del` |
//!
//! Some conditions cannot be detected and are left to the operator: a database that was flushed or restored empty reports every
//! token as unknown, and there are no notifications of SWAPDB (publish `*`). A replica serves old data while its master is gone unless `replica-serve-stale-data` is `no`; a subscription detects the
//! lost link, lookups alone do not. A gateway without write access (a read-only replica, missing permissions) cannot be
//! registered, so `revoke --wait` does not wait for it; its log says so.

mod admin;
mod commands;
mod examine;
mod follow;
mod link;
mod record;

pub use admin::RedisAdmin;
pub use commands::RedisCommands;
pub use follow::KEYSPACE_EVENTS;

use super::{Heard, LookupLimits, Secret, StoreError, StoreMetrics, TlsMode, TlsSettings, TokenRecord, TokenStore};
use crate::problem::Problem;
use crate::store::credential::{Credential, Digest};
use async_trait::async_trait;
use link::{Address, Connector, RedisPool, server_failed};
use record::Stored;
use redis::Value;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::watch;

/// Lookups under way at once, and the tokens that each may be for: 1,024 tokens.
const LOOKUPS: LookupLimits = LookupLimits { at_once: 64, tokens: 16 };
/// How long a lookup may take while one of a cluster's masters is missing: the library tries it again for longer, and callers
/// whose tokens are known wait meanwhile.
const LOST_ANSWER: Duration = Duration::from_millis(500);
/// How often a key is read again if its type changes meanwhile.
const ATTEMPTS: usize = 3;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisSettings {
    /// `host:port` or `unix:/path`: one server, or the sentinels, or some nodes of the cluster.
    pub servers: Vec<String>,
    pub topology: Topology,
    pub database: i64,
    /// An ACL user; `None`: the default one.
    pub username: Option<String>,
    pub password: Option<Secret>,
    /// No effect on a Unix socket. A cluster supports `Disable` and `VerifyFull` only.
    pub tls: TlsSettings,
    /// Before the 64 hex digits of a token's SHA-256.
    pub prefix: String,
    pub changes: RedisChanges,
    /// Connections for lookups; one more is for change notifications.
    pub connections: usize,
    /// How long a connection for lookups is kept while nothing is asked on it.
    pub idle: Duration,
    /// For records without scopes.
    pub default_scopes: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Topology {
    Single,
    /// The name of the master that the sentinels watch.
    Sentinel {
        master: String,
    },
    Cluster,
}

/// The kind of change notifications.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RedisChanges {
    /// Messages on this channel, sent by `tollgate token`: `<64 hex digits> <Unix milliseconds>`, or `*` for all
    /// tokens.
    Channel(String),
    /// Keyspace notifications, which the server sends for every writer. Not for clusters.
    Keyspace,
    /// No notifications.
    None,
}

impl RedisSettings {
    /// Everything that is wrong with these settings, without connecting to anything.
    pub fn problems(&self) -> Vec<Problem> {
        self.problems_but_tls().into_iter().chain(self.tls.problems()).collect()
    }

    fn problems_but_tls(&self) -> Vec<Problem> {
        let addresses: Vec<_> = self.servers.iter().map(|text| Address::parse(text)).collect();
        let unusable = addresses.iter().enumerate();
        let mut found: Vec<_> =
            unusable.filter_map(|(index, address)| Some(address.as_ref().err()?.clone().element(index))).collect();
        let mut wrong = |key, what, instead| found.push(Problem::error(key, what, instead));
        let is_cluster = self.topology == Topology::Cluster;
        if addresses.is_empty() {
            wrong("servers", "is empty: must name at least one server", "write it like [\"127.0.0.1:6379\"]");
        }
        match &self.topology {
            Topology::Single if addresses.len() > 1 => {
                let instead = "name one, or use topology = \"sentinel\" or \"cluster\"";
                wrong("servers", "names several servers, and must be one for topology = \"single\"", instead);
            }
            Topology::Sentinel { master } if master.is_empty() => {
                wrong("master", "is missing", "write the name under which the sentinels watch the master");
            }
            Topology::Sentinel { .. } | Topology::Cluster
                if addresses.iter().any(|address| matches!(address, Ok(Address::Unix(_)))) =>
            {
                wrong("servers", "a sentinel or a cluster's node is not reached by a unix socket", "write HOST:PORT");
            }
            _ => {}
        }
        if is_cluster && self.database != 0 {
            wrong("database", "a cluster has only database 0", "remove it");
        }
        if is_cluster && self.changes == RedisChanges::Keyspace {
            let what = "a cluster has no keyspace notifications that one subscriber gets";
            wrong("changes", what, "use changes = \"channel\"");
        }
        if matches!(&self.changes, RedisChanges::Channel(name) if name.is_empty()) {
            wrong("channel", "must not be empty", "write it like \"tollgate:change\"");
        }
        if self.prefix.is_empty() || self.prefix.contains(|c: char| !c.is_ascii_graphic() || "*?[]\\{}".contains(c)) {
            let what = "must have visible characters other than *?[]\\{} only";
            wrong("prefix", what, "write it like \"tollgate:token:\"");
        }
        if self.username.is_some() && self.password.is_none() {
            wrong("username", "is of no use without a password", "set password_file, or remove it");
        }
        found.extend(Problem::connections(self.connections));
        if is_cluster && matches!(self.tls.mode, TlsMode::Require | TlsMode::VerifyCa) {
            found.push(link::half_checked_cluster());
        }
        found
    }

    /// Which records are meant: see [`super::StoreSettings::records`]. The servers' order does not matter.
    pub(super) fn records(&self) -> String {
        let mut servers = self.servers.clone();
        servers.sort_unstable();
        let Self { topology, database, prefix, default_scopes, .. } = self;
        format!("redis {servers:?} {topology:?} {database} {prefix:?} {default_scopes:?}")
    }

    /// What building a store checks first. TLS is not among it: its certificates are read when they are put to use.
    fn check(&self) -> Result<(), Problem> {
        Problem::first_error(self.problems_but_tls())
    }
}

/// The names of keys. Those without a token end in a word, which cannot be confused with 64 hex digits.
#[derive(Clone)]
struct Keys {
    prefix: String,
}

impl Keys {
    fn token(&self, digest: &Digest) -> String {
        format!("{}{}", self.prefix, digest.to_hex())
    }

    fn digest(&self, key: &str) -> Option<Digest> {
        let hex = key.strip_prefix(&self.prefix)?;
        // An upper-case spelling is a different key, which lookups never use.
        Digest::from_hex(hex).filter(|digest| digest.to_hex() == hex)
    }

    /// A glob for all keys that begin with the prefix and these digits.
    fn pattern(&self, hex: &str) -> String {
        let mut pattern = String::new();
        for letter in self.prefix.chars() {
            if matches!(letter, '*' | '?' | '[' | ']' | '\\' | '^' | '-') {
                pattern.push('\\');
            }
            pattern.push(letter);
        }
        pattern + hex + "*"
    }

    /// A sorted set: the running gateways, by their last heartbeat.
    fn replicas(&self) -> String {
        format!("{}replicas", self.prefix)
    }

    /// A sorted set: the pending confirmations, by their start.
    fn waits(&self) -> String {
        format!("{}waits", self.prefix)
    }

    /// A prefix without keys.
    fn unused(&self) -> String {
        format!("{}unused:", self.prefix)
    }

    /// A set: the gateways that confirmed.
    fn confirmed(&self, wait: &str) -> String {
        format!("{}confirmed:{wait}", self.prefix)
    }
}

pub struct RedisStore {
    settings: RedisSettings,
    keys: Keys,
    connector: Arc<Connector>,
    pool: Arc<RedisPool>,
    /// Whether the subscription of a cluster is lost.
    lost: watch::Sender<bool>,
    warnings: Arc<follow::RedisWarnings>,
    metrics: Arc<StoreMetrics>,
    /// It confirms nothing, and nobody waits for it.
    is_unregistered: AtomicBool,
}

impl RedisStore {
    /// Checks the settings. Does not connect.
    pub fn new(settings: RedisSettings, metrics: Arc<StoreMetrics>) -> Result<Self, Problem> {
        let connector = Arc::new(Connector::new(&settings)?);
        let pool = RedisPool::new(Arc::clone(&connector), settings.connections, Arc::clone(&metrics));
        Ok(Self {
            keys: Keys { prefix: settings.prefix.clone() },
            connector,
            pool: Arc::new(pool),
            lost: watch::Sender::new(false),
            warnings: Arc::default(),
            metrics,
            settings,
            is_unregistered: AtomicBool::new(false),
        })
    }
}

#[async_trait]
impl TokenStore for RedisStore {
    /// Commands of many lookups share a connection.
    fn lookup_limits(&self) -> LookupLimits {
        LOOKUPS
    }

    async fn lookup(&self, credential: &Credential) -> Result<Option<TokenRecord>, StoreError> {
        if self.settings.topology != Topology::Cluster {
            return self.record(credential).await;
        }
        let mut lost = self.lost.subscribe();
        let too_long = async {
            let _ = lost.wait_for(|lost| *lost).await;
            tokio::time::sleep(LOST_ANSWER).await;
        };
        tokio::select! {
            record = self.record(credential) => record,
            () = too_long => Err(StoreError::Timeout),
        }
    }

    fn tells_changes(&self) -> bool {
        self.settings.changes != RedisChanges::None
    }

    fn stay_unregistered(&self) {
        self.is_unregistered.store(true, Ordering::Relaxed);
    }

    async fn follow(&self, heard: Heard<'_>) {
        tokio::join!(follow::follow(self, heard), self.pool.shrink(self.settings.idle));
    }

    // `changed_since` is not implemented: other programs write here too, keys expire, and a failover may lose writes.
    // Only looking everything up again is safe.
}

impl RedisStore {
    async fn record(&self, credential: &Credential) -> Result<Option<TokenRecord>, StoreError> {
        let digest = *credential.digest();
        let key = self.keys.token(&digest);
        let questions = questions(&self.settings.topology, &key);
        for _ in 0..ATTEMPTS {
            let mut answers: Vec<Value> = Vec::with_capacity(2);
            for question in &questions {
                if is_open(&answers) {
                    answers.extend(self.pool.ask::<Vec<Value>>(question).await?);
                }
            }
            match stored(&answers, digest)? {
                Found::Record(stored) => {
                    let record = stored.parse(digest, &self.settings.default_scopes);
                    return record.map(Some).map_err(|wrong| wrong.of(digest));
                }
                Found::Nothing => return Ok(None),
                Found::Changing => {}
            }
        }
        Err(StoreError::Unavailable(format!("token {}: the key changed repeatedly while it was read", digest.id())))
    }
}

/// The commands for a key: GET and HGETALL in one round trip, one of which fails with WRONGTYPE. In a cluster one after
/// the other, and the second only if [`is_open`]: while a slot is migrated, a node accepts one command at a time.
fn questions(topology: &Topology, key: &str) -> Vec<redis::Pipeline> {
    let mut both = redis::Pipeline::new();
    both.ignore_errors();
    if *topology != Topology::Cluster {
        read(&mut both, key);
        return vec![both];
    }
    let mut hash = both.clone();
    both.cmd("GET").arg(key);
    hash.cmd("HGETALL").arg(key);
    vec![both, hash]
}

fn read(pipe: &mut redis::Pipeline, key: &str) {
    pipe.cmd("GET").arg(key).cmd("HGETALL").arg(key);
}

/// Whether there is more to ask.
fn is_open(answers: &[Value]) -> bool {
    answers.last().is_none_or(is_wrong_type)
}

fn is_wrong_type(value: &Value) -> bool {
    matches!(value, Value::ServerError(error) if error.code() == "WRONGTYPE")
}

enum Found {
    Record(Stored),
    Nothing,
    /// The key changed between the two commands.
    Changing,
}

/// Interprets the replies to the [`questions`]. The result is "no such token" only if the server says so.
fn stored(answers: &[Value], digest: Digest) -> Result<Found, StoreError> {
    let garbage = |what: &str| Err(StoreError::Garbage(format!("token {}: {what}", digest.id())));
    match answers {
        [Value::BulkString(text), ..] => match String::from_utf8(text.clone()) {
            Ok(text) => Ok(Found::Record(Stored::Json(text))),
            Err(_) => garbage("the key's text is no UTF-8"),
        },
        [get, hash] if is_wrong_type(get) && is_wrong_type(hash) => garbage("the key holds neither a text nor a hash"),
        [Value::Nil] => Ok(Found::Nothing),
        [Value::Nil, hash] if is_wrong_type(hash) => Ok(Found::Changing),
        [Value::ServerError(error), ..] if error.code() != "WRONGTYPE" => Err(server_failed(error)),
        [_, Value::ServerError(error)] => Err(server_failed(error)),
        [_, hash @ (Value::Array(_) | Value::Map(_))] => {
            let Ok(fields) = redis::from_redis_value::<Vec<(Vec<u8>, Vec<u8>)>>(hash.clone()) else {
                return garbage("the hash can't be understood");
            };
            if fields.is_empty() {
                return Ok(Found::Nothing);
            }
            let text = |bytes: Vec<u8>| String::from_utf8(bytes).ok();
            // Fields of other programs may have any bytes; only tollgate's must be text.
            let fields = fields
                .into_iter()
                .filter_map(|(name, value)| Some((text(name)?, text(value).unwrap_or(NO_TEXT.into()))));
            Ok(Found::Record(Stored::Hash(fields.collect())))
        }
        _ => Err(StoreError::Unavailable("the server's answer can't be understood".into())),
    }
}

/// Replaces bytes that are not text; not valid in any of tollgate's fields.
const NO_TEXT: &str = "\u{fffd}";
