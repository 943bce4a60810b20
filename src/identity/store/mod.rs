//! Where tokens are kept. A store speaks of tokens and never of HTTP; what it can't tell is an error and never an answer.

pub mod file;
pub mod sqlite;

#[cfg(test)]
mod contract;

use super::credential::{Credential, Digest};
use async_trait::async_trait;
use serde::Serialize;

/// What a store keeps about a token. Times are unix seconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRecord {
    pub digest: Digest,
    pub user: String,
    pub scopes: Vec<String>,
    pub description: String,
    pub created: u64,
    pub expires: Option<u64>,
    pub revoked: Option<u64>,
    pub last_used: Option<u64>,
}

/// A store that can't tell whether a token is valid. Never read as "no such token".
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the token store can't be reached: {0}")]
    Unavailable(String),
    #[error("the token store did not answer in time")]
    Timeout,
    #[error("the token store has too many look-ups under way")]
    Overloaded,
    #[error("the token store answered something that is no token record: {0}")]
    Garbage(String),
}

impl StoreError {
    /// Metric label.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Unavailable(_) => "unavailable",
            Self::Timeout => "timeout",
            Self::Overloaded => "overloaded",
            Self::Garbage(_) => "garbage",
        }
    }
}

/// Tokens whose records changed, or that may have.
#[derive(Debug, PartialEq, Eq)]
pub enum Changes {
    /// Each with the unix millisecond of its change.
    Tokens(Vec<(Digest, u64)>),
    /// The store can't say which: all that was learned must be learned anew.
    Everything,
}

/// Looking up, which every store can do.
#[async_trait]
pub trait TokenStore: Send + Sync {
    /// Label of metrics and logs.
    fn kind(&self) -> &'static str;

    /// The record behind a token, also when it is revoked or expired: the caller judges. `Ok(None)` says that there is
    /// no such token, and must never be said in doubt: the caller refuses, and remembers. Doubt is an error: the
    /// caller then goes on with what it knew, or answers 503. An error wrongly given costs a retry; a record wrongly
    /// given is an open gate.
    async fn lookup(&self, credential: &Credential) -> Result<Option<TokenRecord>, StoreError>;

    /// Waits until records change. Stores that can't tell never return.
    async fn changes(&self) -> Changes {
        std::future::pending().await
    }

    /// Notes when tokens were last used, in unix milliseconds. Coarse, in the background, and allowed to be lost.
    async fn note_uses(&self, _uses: Vec<(Digest, u64)>) -> Result<(), StoreError> {
        Ok(())
    }
}

/// Writing, which only stores of our own can do. Used by the command line, never by the gateway.
pub trait TokenAdmin {
    /// Fails for a digest that is there already.
    fn create(&mut self, record: &TokenRecord) -> Result<(), AdminError>;
    /// Adds many at once and skips those that are there already. Returns how many were new.
    fn import(&mut self, records: &mut dyn Iterator<Item = Result<TokenRecord, AdminError>>)
    -> Result<u64, AdminError>;
    /// Newest first.
    fn list(&self) -> Result<Vec<TokenRecord>, AdminError>;
    /// All tokens whose digest begins with these hex digits.
    fn find(&self, hex_prefix: &str) -> Result<Vec<TokenRecord>, AdminError>;
    /// Ends a token. Returns false when it was revoked before.
    fn revoke(&mut self, digest: &Digest, at: u64) -> Result<bool, AdminError>;
}

#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    #[error("a token with this digest is there already")]
    Exists,
    #[error("no such token")]
    Missing,
    #[error("line {0}: {1}")]
    Line(u64, String),
    #[error("{0}")]
    Store(String),
}

/// A record as the command line shows it.
#[derive(Serialize)]
pub struct ShownRecord {
    pub id: String,
    pub sha256: String,
    pub user: String,
    pub scopes: Vec<String>,
    pub description: String,
    pub created: String,
    pub expires: Option<String>,
    pub revoked: Option<String>,
    pub last_used: Option<String>,
}

impl From<&TokenRecord> for ShownRecord {
    fn from(record: &TokenRecord) -> Self {
        Self {
            id: record.digest.id().to_string(),
            sha256: record.digest.to_hex(),
            user: record.user.clone(),
            scopes: record.scopes.clone(),
            description: record.description.clone(),
            created: rfc3339(record.created),
            expires: record.expires.map(rfc3339),
            revoked: record.revoked.map(rfc3339),
            last_used: record.last_used.map(rfc3339),
        }
    }
}

/// `2026-01-31T12:00:00Z` for unix seconds.
pub fn rfc3339(seconds: u64) -> String {
    let time = std::time::UNIX_EPOCH.checked_add(std::time::Duration::from_secs(seconds));
    time.map_or_else(|| "out of range".into(), |time| humantime::format_rfc3339_seconds(time).to_string())
}

/// Unix seconds for `2026-01-31T12:00:00Z` or `2026-01-31`.
pub fn parse_time(text: &str) -> Option<u64> {
    let time = humantime::parse_rfc3339_weak(text).or_else(|_| humantime::parse_rfc3339(&format!("{text}T00:00:00Z")));
    Some(time.ok()?.duration_since(std::time::UNIX_EPOCH).ok()?.as_secs())
}
