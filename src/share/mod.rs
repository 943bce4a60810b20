//! What the replicas of a gateway share: how much of a limit is left for a key, and how many replicas there are. A store keeps
//! it, and its clock decides; a replica leases parts of it ahead. It must not know whose request it is, nor what a key stands
//! for: keys arrive here as keyed hashes.

mod account;
mod engine;
#[cfg(test)]
mod model;
mod postgres;
mod redis;

pub use account::{LeaseRefusal, RefusedBy};
pub use engine::{LeaseEngine, LeaseKey, LeaseLack, LeaseOutcome, LeasePart, LeaseTake, LeaseWait};

use crate::problem::Problem;
use crate::store::credential::Digest;
use crate::store::postgres::PostgresSettings;
use crate::store::redis::{RedisSettings, Topology};
use crate::store::{Secret, StoreError};
use crate::telemetry::metrics::StoreMetrics;
use async_trait::async_trait;
use std::sync::Arc;
use std::time::Duration;

/// How long what was leased is kept for a replica that says nothing. After that it counts as used: the replica may have used it
/// and then ended.
pub const LEASE: Duration = Duration::from_secs(2);
/// How often a replica says that it is there, and for how long that counts.
pub const BEAT: Duration = Duration::from_secs(2);
pub const BEATS_COUNT: Duration = Duration::from_secs(10);

/// `[shared_limits]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedLimitSettings {
    pub store: ShareStoreSettings,
    /// How long a request waits for its lease.
    pub timeout: Duration,
    pub when_gone: WhenGone,
    /// What the names of keys are hashed with; the same for all replicas. `None`: the names of the limits alone.
    pub secret: Option<Secret>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ShareStoreSettings {
    Redis(Box<RedisSettings>),
    Postgres(Box<PostgresSettings>),
}

/// What holds while the store does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenGone {
    /// A replica gives its share of the limit, by the last known number of replicas.
    Local,
    /// Nothing is limited.
    Open,
    /// Nothing passes.
    Closed,
}

/// How much of a key is allowed. An argument of every request to the store: keys of one limit may have different amounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SharedAmounts {
    pub rate: Option<SharedRate>,
    pub quota: Option<SharedQuota>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SharedRate {
    pub requests: u64,
    pub period_ms: u64,
    pub burst: u64,
}

/// So many in each day or month of the calendar in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SharedQuota {
    pub requests: u64,
    pub monthly: bool,
}

/// What a replica says and wants of one key. All of it is done at once, or nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseRequest {
    /// As it is named in the store, without the prefix of all.
    pub key: Arc<str>,
    pub amounts: SharedAmounts,
    /// Used since the last time, of what was leased ahead.
    pub used: u64,
    /// What it keeps of that; the rest is given back. `None`: another request of the same message has said so.
    pub keeps: Option<u64>,
    /// So many requests of this cost wait. They are counted as far as there is room.
    pub cost: u64,
    pub count: u64,
    /// To be leased ahead if all of those pass.
    pub ahead: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeaseAnswer {
    pub passed: u64,
    /// Leased ahead.
    pub ahead: u64,
    /// After which time the next of those that wait would pass; 0 if all did.
    pub wait_ms: u64,
    /// It is the quota that is used up.
    pub by_quota: bool,
    pub rate_left: u64,
    pub quota_left: u64,
}

/// Where it is kept. Every operation is one round trip.
#[async_trait]
pub trait ShareStore: Send + Sync {
    /// An answer to each request. Those for one key stand in their order.
    async fn lease(&self, replica: &str, requests: &[LeaseRequest]) -> Result<Vec<LeaseAnswer>, StoreError>;

    /// Says that the replica is there. Comes back with the number of replicas.
    async fn beat(&self, replica: &str) -> Result<u64, StoreError>;

    async fn leave(&self, replica: &str) -> Result<(), StoreError>;

    /// Whether the store can be used as it is. Changes nothing.
    async fn examine(&self) -> Result<(), StoreError>;
}

impl SharedAmounts {
    /// The rate in whole numbers: what a request costs, and how much of that flows off in a microsecond.
    pub(crate) fn units(&self) -> Option<(u64, u64, u64)> {
        let SharedRate { requests, period_ms, burst } = self.rate?;
        let period_us = period_ms.saturating_mul(1_000);
        let common = greatest_divisor(requests, period_us).max(1);
        Some((period_us / common, requests / common, burst))
    }

    /// The same as numbers of a message: requests and period of the rate, burst, quota, whether by month. 0 for none.
    pub(crate) fn numbers(&self) -> [u64; 5] {
        let (cost, flow, burst) = self.units().unwrap_or((1, 1, 0));
        let quota = self.quota.map_or(0, |quota| quota.requests);
        [flow, cost, burst, quota, self.quota.is_some_and(|quota| quota.monthly).into()]
    }
}

fn greatest_divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { greatest_divisor(b, a % b) }
}

impl SharedLimitSettings {
    /// Keys of `[shared_limits]`.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = match &self.store {
            ShareStoreSettings::Redis(settings) => {
                let mut problems = settings.problems();
                if settings.topology == Topology::Cluster {
                    let instead = "use \"single\" or \"sentinel\"";
                    problems.push(Problem::error("topology", "a cluster cannot keep shared limits", instead));
                }
                problems
            }
            ShareStoreSettings::Postgres(settings) => settings.problems(),
        };
        problems.extend(Problem::too_short("timeout", self.timeout, Duration::from_millis(5)));
        if self.timeout > Duration::from_secs(1) {
            let what = "is longer than what is leased is kept for";
            problems.push(Problem::error("timeout", what, "use \"1s\" or less"));
        }
        problems
    }

    /// Of logs and metrics.
    pub fn kind(&self) -> &'static str {
        match self.store {
            ShareStoreSettings::Redis(_) => "redis",
            ShareStoreSettings::Postgres(_) => "postgres",
        }
    }

    /// Connects with the first question.
    pub fn open(&self, metrics: Arc<StoreMetrics>) -> Result<Arc<dyn ShareStore>, Problem> {
        Ok(match &self.store {
            ShareStoreSettings::Redis(settings) => Arc::new(redis::RedisShare::new(settings, metrics)?),
            ShareStoreSettings::Postgres(settings) => Arc::new(postgres::PostgresShare::new(settings)?),
        })
    }

    /// What the keys of a limit are hashed with. All replicas compute the same: the first 16 bytes of the SHA-256 of the secret, a
    /// zero byte and the limit's name.
    pub fn seed(&self, limit: &str) -> (u64, u64) {
        let secret = self.secret.as_ref().map_or("", Secret::expose);
        let digest = Digest::of(format!("{secret}\0{limit}").as_bytes());
        let word = |at: usize| {
            let bytes = digest.as_bytes().iter().skip(at).take(8);
            bytes.fold(0, |word: u64, byte| word << 8 | u64::from(*byte))
        };
        (word(0), word(8))
    }

    /// Whether the store can be used, for `check`.
    pub async fn probe(&self, metrics: Arc<StoreMetrics>) -> Vec<Problem> {
        let store = match self.open(metrics) {
            Ok(store) => store,
            Err(problem) => return vec![problem],
        };
        // The first question opens a connection.
        match tokio::time::timeout(Duration::from_secs(2), store.examine()).await.unwrap_or(Err(StoreError::Timeout)) {
            Ok(()) => Vec::new(),
            Err(error) => {
                let what = format!("cannot keep the shared limits: {}", said(&error));
                vec![Problem::warning("store", what, "see docs/limits.md, \"Shared limits\"")]
            }
        }
    }
}

/// An error of the stores' connections, which speaks of tokens, in words for this one.
pub(crate) fn said(error: &StoreError) -> String {
    match error {
        StoreError::Unavailable(what)
        | StoreError::Denied(what)
        | StoreError::ReadOnly(what)
        | StoreError::Unusable(what)
        | StoreError::Garbage(what) => what.clone(),
        StoreError::Timeout => "no answer in time".into(),
        StoreError::Overloaded | StoreError::CircuitOpen => "too much is under way".into(),
    }
}

#[cfg(test)]
mod counting_tests;
#[cfg(test)]
mod tests;
