//! Where tokens are kept. A store speaks of tokens and never of HTTP; what it can't tell is an error and never an answer.

pub mod chain;
pub mod credential;
mod examine;
mod feed;
pub mod file;
#[cfg(test)]
pub(crate) mod fleet_tests;
pub mod introspect;
mod json;
mod lookups;
pub mod portable;
pub mod postgres;
mod problems;
pub mod query;
mod record;
pub mod redis;
mod scopes;
mod settings;
pub mod sqlite;
pub mod terms;
mod tls;
pub mod values;

pub use examine::{Finding, FindingSeverity};
pub use lookups::{Lane, LookupLimits};
pub use portable::ShownRecord;
pub use scopes::shared_scopes;
pub use settings::{Bound, MissingStore, NamedStore, StoreSettings};
pub use tls::{Place, Secret, TlsMode, TlsSettings, system_authorities};
pub use values::{parse_time, rfc3339};

use crate::problem::Problem;
use crate::telemetry::metrics::StoreMetrics;
use async_trait::async_trait;
use credential::{Credential, Digest};
use futures_util::future::join_all;
use query::TokenQuery;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};
use terms::TokenTerms;

/// How long a connection for lookups is kept while nothing is asked on it: shorter than the 350 s and more after which devices
/// in between forget it. One connection stays.
pub const IDLE: Duration = Duration::from_secs(300);

/// What a store keeps about a token. Times are unix seconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRecord {
    pub digest: Digest,
    pub user: String,
    pub scopes: Vec<String>,
    pub description: String,
    pub created: u64,
    /// Not valid before.
    pub not_before: Option<u64>,
    pub expires: Option<u64>,
    pub revoked: Option<u64>,
    /// The user may not do anything, whatever token they show.
    pub blocked: bool,
    /// A rotation has put another token in this one's place; both work until this one expires.
    pub superseded: Option<u64>,
    /// The token in whose place this one came.
    pub replaces: Option<Digest>,
    pub last_used: Option<u64>,
    /// How it may be used; `None`: without bounds.
    pub terms: Option<Arc<TokenTerms>>,
}

impl TokenRecord {
    /// A token without any bounds.
    pub fn new(digest: Digest, user: impl Into<String>) -> Self {
        Self {
            digest,
            user: user.into(),
            scopes: Vec::new(),
            description: String::new(),
            created: 0,
            not_before: None,
            expires: None,
            revoked: None,
            blocked: false,
            superseded: None,
            replaces: None,
            last_used: None,
            terms: None,
        }
    }
}

impl TokenRecord {
    /// When a rotation `at` this time ends the token: at `end`, or at its own end if that comes first. A token that is
    /// over already, or was rotated before, has nothing to hand on.
    pub fn rotated_out(&self, at: u64, end: u64) -> Result<u64, AdminError> {
        if self.revoked.is_some() || self.superseded.is_some() || self.expires.is_some_and(|own| own <= at) {
            return Err(AdminError::Ended);
        }
        Ok(self.expires.map_or(end, |own| own.min(end)))
    }
}

/// A store that can't tell whether a token is valid. Never read as "no such token".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    #[error("the token store can't be reached: {0}")]
    Unavailable(String),
    /// The user that tollgate connects as may not do this.
    #[error("the token store denies it: {0}")]
    Denied(String),
    #[error("the token store takes no writes: {0}")]
    ReadOnly(String),
    /// For whatever token: tables are missing or of another version, or a query cannot be run.
    #[error("the token store cannot be used as it is: {0}")]
    Unusable(String),
    #[error("the token store did not answer in time")]
    Timeout,
    #[error("the token store has too many lookups under way")]
    Overloaded,
    #[error("the token store failed too often and is left alone for a moment")]
    CircuitOpen,
    #[error("the token store answered something that is no token record: {0}")]
    Garbage(String),
}

impl StoreError {
    /// The same, about a part of the store: its server, or what was asked of it.
    #[must_use]
    fn at(self, place: &dyn std::fmt::Display) -> Self {
        let at = |what: String| format!("{place}: {what}");
        match self {
            Self::Unavailable(what) => Self::Unavailable(at(what)),
            Self::Denied(what) => Self::Denied(at(what)),
            Self::ReadOnly(what) => Self::ReadOnly(at(what)),
            Self::Unusable(what) => Self::Unusable(at(what)),
            Self::Garbage(what) => Self::Garbage(at(what)),
            Self::Timeout | Self::Overloaded | Self::CircuitOpen => self,
        }
    }

    /// Metric label.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Unavailable(_) | Self::Denied(_) | Self::ReadOnly(_) => "unavailable",
            Self::Unusable(_) => "unusable",
            Self::Timeout => "timeout",
            Self::Overloaded => "overloaded",
            Self::CircuitOpen => "circuit_open",
            Self::Garbage(_) => "garbage",
        }
    }
}

/// What a store tells a gateway of its own accord.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// These records changed, or may have.
    Changed(Vec<Change>),
    /// A sign of life: all that changed before `asked_ms`, by [`crate::clock`], was told and has taken effect. Said again and
    /// again, at least twice a second, by a store that tells of changes: what is known counts for a second behind it.
    Alive {
        asked_ms: u64,
        /// How far that is, where the store keeps a list of changes.
        mark: Option<Mark>,
    },
    /// Nobody tells of changes here, so that nothing is promised.
    Untold,
    /// The server seems to have stopped to answer: nothing arrived on the subscription, which says little of lookups. Said
    /// before [`Event::Deaf`].
    Silent,
    /// Change notifications no longer arrive: an answer is good for a moment only.
    Deaf,
    /// Why they do not arrive at this moment, for a metric and for people. Said again whenever that was tried.
    Unheard(Unheard, String),
    /// Change notifications arrive from now on. What happened before is unknown, so everything must be looked up again.
    /// Also said when a store changed as a whole.
    Hearing,
}

/// Why change notifications do not arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unheard {
    Unavailable,
    Timeout,
    Denied,
    /// The server is a standby, or a replica.
    Standby,
    /// Nothing in the tables tells of changes.
    NoTriggers,
    Garbage,
    /// More arrives than is taken in.
    Overrun,
    /// A master of a cluster cannot be reached.
    Incomplete,
}

impl Unheard {
    /// Metric label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unavailable => "unavailable",
            Self::Timeout => "timeout",
            Self::Denied => "denied",
            Self::Standby => "standby",
            Self::NoTriggers => "no_triggers",
            Self::Garbage => "garbage",
            Self::Overrun => "overrun",
            Self::Incomplete => "incomplete",
        }
    }
}

/// A place in a store's list of changes, in the store's own terms: by its clock and its order, and not by a gateway's.
pub type Mark = String;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    pub token: Named,
    /// Unix milliseconds by the store's clock.
    pub at_ms: u64,
}

/// How a store names a token whose record changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Named {
    Token(Digest),
    /// By what [`TokenStore::handle`] says, for a store whose keys don't give away the token's own digest.
    Handle(Digest),
}

/// Takes events. Returns once what it was told has taken effect, so that a store may confirm it.
pub type Heard<'a> = &'a (dyn Fn(Event) + Send + Sync);

/// Looking up, which every store can do.
#[async_trait]
pub trait TokenStore: Send + Sync {
    /// The record behind a token, also when it is revoked or expired: the caller judges. `Ok(None)` says that there is
    /// no such token, and must never be said in doubt: the caller refuses, and remembers. Doubt is an error: the
    /// caller then goes on with what it knew, or answers 503. An error wrongly given costs a retry; a record wrongly
    /// given is an open gate. The caller gives up after the store's timeout and drops the future.
    async fn lookup(&self, credential: &Credential) -> Result<Option<TokenRecord>, StoreError>;

    /// The same for several tokens: one answer for each, in their order. They share the store's timeout.
    async fn lookup_many(&self, credentials: &[&Credential]) -> Vec<Result<Option<TokenRecord>, StoreError>> {
        join_all(credentials.iter().map(|credential| self.lookup(credential))).await
    }

    /// The record, from a store that has all tokens in memory and knows them to be current. It has no handles, and is asked
    /// for every token that is not known to be valid: nothing is gained by keeping its answer. `None`: [`Self::lookup`] must be
    /// asked.
    fn lookup_at_once(&self, _token: &Digest) -> Option<Option<TokenRecord>> {
        None
    }

    /// How many lookups it can take at once, and of how many tokens each. Others wait for their turn.
    fn lookup_limits(&self) -> LookupLimits;

    /// The store's own name for a token, where [`Named::Handle`] is used.
    fn handle(&self, _credential: &Credential) -> Option<Digest> {
        None
    }

    /// Whether [`Self::follow`] will say something. Until it does, an answer is good for a moment only.
    fn tells_changes(&self) -> bool {
        false
    }

    /// Before [`Self::follow`]: whoever follows confirms nothing, and does not stand in the register of gateways.
    fn stay_unregistered(&self) {}

    /// Tells of changes until it is dropped, connections lost and found again included. A store that can hear of
    /// changes says first whether it does; one that can't never says anything.
    async fn follow(&self, _heard: Heard<'_>) {
        std::future::pending().await
    }

    /// Which tokens changed behind a mark. `None`: the store keeps no such list, or not for so long.
    async fn changed_since(&self, _mark: &str) -> Result<Option<Vec<Digest>>, StoreError> {
        Ok(None)
    }

    /// Notes when tokens were last used, in unix milliseconds. Coarse, in the background, and allowed to be lost.
    async fn note_uses(&self, _uses: Vec<(Digest, u64)>) -> Result<(), StoreError> {
        Ok(())
    }
}

/// Records on their way in; the first error ends an import.
pub type Records<'a> = &'a mut (dyn Iterator<Item = Result<TokenRecord, AdminError>> + Send);

/// Takes records one by one; its first error ends what was to be visited.
pub type Visitor<'a> = &'a mut (dyn FnMut(TokenRecord) -> Result<(), AdminError> + Send);

/// Writing, which only stores of our own can do. Used by the command line, never by the gateway.
#[async_trait]
pub trait TokenAdmin: Send {
    /// Fails for a digest that is there already.
    async fn create(&mut self, record: &TokenRecord) -> Result<(), AdminError>;
    /// Adds many at once. Those that are there already stay as they are. All or nothing.
    async fn import(&mut self, records: Records<'_>) -> Result<Imported, AdminError>;
    /// Newest first, in memory.
    async fn list(&mut self) -> Result<Vec<TokenRecord>, AdminError>;
    /// Newest first, one after the other: for stores of any size.
    async fn visit(&mut self, each: Visitor<'_>) -> Result<(), AdminError> {
        self.select(&TokenQuery::default(), each).await
    }
    /// The same for those that a query takes, in its order.
    async fn select(&mut self, query: &TokenQuery, each: Visitor<'_>) -> Result<(), AdminError> {
        query.arrange(self.list().await?).into_iter().try_for_each(each)
    }
    /// Counts the records that it reads or changes there, where it has to read all of them to find some.
    fn count_into(&mut self, _count: Arc<AtomicU64>) {}
    /// Takes the records that were found since the last call and could not be read, with what is wrong with each. They are
    /// left out of what was returned, and unchanged.
    fn take_unreadable(&mut self) -> Vec<String> {
        Vec::new()
    }
    /// All tokens whose digest begins with these hex digits, up to 100.
    async fn find(&mut self, hex_prefix: &str) -> Result<Vec<TokenRecord>, AdminError>;
    /// All tokens of a user, newest first.
    async fn of_user(&mut self, user: &str) -> Result<Vec<TokenRecord>, AdminError> {
        Ok(self.list().await?.into_iter().filter(|record| record.user == user).collect())
    }
    /// All tokens of a user, one after the other, in no order.
    async fn visit_user(&mut self, user: &str, each: Visitor<'_>) -> Result<(), AdminError> {
        self.of_user(user).await?.into_iter().try_for_each(each)
    }
    /// The users of whom a token is blocked.
    async fn blocked_users(&mut self) -> Result<BTreeSet<String>, AdminError> {
        Ok(self.list().await?.into_iter().filter(|record| record.blocked).map(|record| record.user).collect())
    }
    /// Whether gateways note in this store when a token was used. Where they don't, no time says nothing.
    fn notes_uses(&self) -> bool {
        false
    }
    /// Ends a token. Returns false when it was revoked before.
    async fn revoke(&mut self, digest: &Digest, at: u64) -> Result<bool, AdminError>;
    /// Ends all tokens of a user. Returns how many were not revoked before.
    async fn revoke_user(&mut self, user: &str, at: u64) -> Result<u64, AdminError> {
        let mut revoked = 0;
        for record in self.of_user(user).await? {
            revoked += u64::from(self.revoke(&record.digest, at).await?);
        }
        Ok(revoked)
    }
    /// Removes those of these records that the query takes at that moment, as if the tokens had never been. Returns how many
    /// there were. Nobody may have changed a record between the judgement and its removal.
    async fn remove(&mut self, _digests: &[Digest], _still: &TokenQuery) -> Result<u64, AdminError> {
        Err(AdminError::Store("records of this store cannot be removed".into()))
    }
    /// Puts `next` in the place of another token, which is superseded `at` and expires at `end`, or at its own end if
    /// that comes first. Both or neither.
    async fn rotate(&mut self, old: &Digest, next: &TokenRecord, at: u64, end: u64) -> Result<(), AdminError>;
    /// Blocks a user's tokens, or no longer. Returns how many changed.
    async fn block(&mut self, user: &str, blocked: bool) -> Result<u64, AdminError>;
    /// The same, for users of any number of tokens: passes on each as it was before and, read again, as it is now.
    async fn block_each(
        &mut self,
        user: &str,
        blocked: bool,
        before: Visitor<'_>,
        now: Visitor<'_>,
    ) -> Result<u64, AdminError> {
        self.visit_user(user, before).await?;
        let changed = self.block(user, blocked).await?;
        self.visit_user(user, now).await?;
        Ok(changed)
    }
    /// Waits until every gateway that runs on this store has taken in all that was written before. Returns the names of
    /// those that did; fails with the names of those that did not within the time.
    async fn wait(&mut self, timeout: Duration) -> Result<Vec<String>, AdminError>;
}

#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    #[error("a token with this digest is there already")]
    Exists,
    #[error("no such token")]
    Missing,
    #[error("the token is revoked or over: there is nothing to rotate")]
    Ended,
    #[error("no confirmation within {waited:?} from: {}", missing.join(", "))]
    Unconfirmed { missing: Vec<String>, waited: Duration },
    #[error("{0} keeps no register of the gateways that use it: nothing can be waited for")]
    NoRegister(&'static str),
    /// What was to be imported.
    #[error("{0}")]
    Input(String),
    /// One record, and what is wrong with it.
    #[error("{0}")]
    Unreadable(String),
    #[error("{0}")]
    Store(String),
}

impl From<StoreError> for AdminError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Garbage(what) => Self::Unreadable(what),
            error => Self::Store(error.to_string()),
        }
    }
}

/// The settings do not allow for opening the store.
impl From<Problem> for AdminError {
    fn from(problem: Problem) -> Self {
        Self::Store(problem.to_string())
    }
}

/// What an import did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Imported {
    /// Tokens that were not there before.
    pub new: u64,
    /// Tokens that were there, and of which the input says something else that matters.
    pub differing: Differing,
}

/// Known tokens that an import found to be other than it says: they stay as they are, and somebody must be told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differing {
    /// The first of them, for people.
    pub named: Vec<String>,
    pub count: u64,
}

impl Differing {
    const NAMED: usize = 20;

    /// Notes a token that is another's here, or that works here and should not by what the input says.
    pub fn compare(&mut self, known: &TokenRecord, given: &TokenRecord) {
        let ends = |record: &TokenRecord| record.expires.unwrap_or(u64::MAX);
        let how = if known.user != given.user {
            format!("belongs to {:?} here, and to {:?} in the input", known.user, given.user)
        } else if known.revoked.is_none() && given.revoked.is_some() {
            "is revoked in the input, and not here".into()
        } else if !known.blocked && given.blocked {
            "is blocked in the input, and not here".into()
        } else if ends(known) > ends(given) {
            "ends sooner by the input than here".into()
        } else if given.terms.is_some() && known.terms != given.terms {
            "has another plan, rate, networks or methods in the input than here".into()
        } else {
            return;
        };
        self.count += 1;
        if self.named.len() < Self::NAMED {
            self.named.push(format!("token {} {how}", known.digest.id()));
        }
    }
}

/// Waiting for gateways to confirm what was written.
struct Confirmations {
    waited: Duration,
    deadline: Instant,
}

impl Confirmations {
    /// Between two looks at who has confirmed.
    const POLL: Duration = Duration::from_millis(20);

    fn within(waited: Duration) -> Self {
        Self { waited, deadline: Instant::now() + waited }
    }

    /// What [`TokenAdmin::wait`] answers, given the gateways that run and whether each has confirmed. `None`, after a
    /// moment: look again.
    async fn outcome(&self, replicas: Vec<(String, bool)>) -> Option<Result<Vec<String>, AdminError>> {
        let missing: Vec<_> = replicas.iter().filter(|(_, done)| !done).map(|(name, _)| name.clone()).collect();
        if missing.is_empty() {
            return Some(Ok(replicas.into_iter().map(|(name, _)| name).collect()));
        }
        if Instant::now() >= self.deadline {
            return Some(Err(AdminError::Unconfirmed { missing, waited: self.waited }));
        }
        tokio::time::sleep(Self::POLL).await;
        None
    }
}

/// What this process is called in a store's register of gateways: its machine and its number there.
pub fn replica_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}:{}", host.trim(), std::process::id())
}

/// A gateway that a store has not seen for so long is gone: nobody waits for it.
pub const REPLICA_GONE: Duration = Duration::from_secs(10);
