//! `tollgate store check`: what an operator can find out about a store before the night in which it matters. Asks the store as a
//! gateway does, by a token that nobody has and by following its changes for a moment, and each kind of server for the
//! settings that decide whether the promise holds. Changes no token, makes no database, and is no gateway that others wait for.

use super::credential::{Credential, Digest};
use super::{Event, NamedStore, StoreError, StoreSettings, TokenStore};
use crate::clock::Now;
use crate::telemetry::metrics::StoreMetrics;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc;

/// How long change notifications may take to begin.
const SUBSCRIBING: Duration = Duration::from_secs(5);
/// Of the server's clock and this machine's.
const CLOCKS_APART: Duration = Duration::from_secs(1);

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FindingSeverity {
    Fine,
    /// It works, and something may go wrong.
    Warning,
    Error,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub severity: FindingSeverity,
    pub what: String,
    /// What mends it; empty if nothing has to be.
    pub mend: String,
}

impl Finding {
    pub(super) fn fine(what: impl Into<String>) -> Self {
        Self { severity: FindingSeverity::Fine, what: what.into(), mend: String::new() }
    }

    pub(super) fn warning(what: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { severity: FindingSeverity::Warning, what: what.into(), mend: mend.into() }
    }

    pub(super) fn error(what: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { severity: FindingSeverity::Error, what: what.into(), mend: mend.into() }
    }

    /// What could not be found out.
    pub(super) fn unknown(what: &str, error: &StoreError, mend: impl Into<String>) -> Self {
        Self::warning(format!("{what} cannot be read: {error}"), mend)
    }

    /// The difference between a server's clock, in Unix milliseconds, and this machine's. `asked` and now bound when it was
    /// read.
    pub(super) fn clock(server_ms: u64, asked: SystemTime) -> Self {
        let unix = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let (server, before, after) = (Duration::from_millis(server_ms), unix(asked), unix(SystemTime::now()));
        let apart = before.saturating_sub(server).max(server.saturating_sub(after));
        if apart > CLOCKS_APART {
            let what = format!("the clocks of the server and of this machine differ by {apart:.1?}");
            return Self::warning(
                what,
                "synchronise both (`chronyc tracking`): times of validity are by the gateways' clocks, and the metric of the \
                 revocation lag is wrong",
            );
        }
        Self::fine("the clocks of the server and of this machine agree")
    }
}

impl NamedStore {
    /// Everything that is to be said of the store, the good as well.
    pub async fn examine(&self, metrics: Arc<StoreMetrics>, clock: fn() -> Now) -> Vec<Finding> {
        if let StoreSettings::Sqlite(path) = &self.kind
            && !path.exists()
        {
            let what = format!("{} is not there: every token is unknown", path.display());
            return vec![Finding::warning(what, "start a gateway, or create a token: either makes it")];
        }
        let store = match self.kind.open(self.timeout, metrics, clock) {
            Ok(store) => store,
            Err(problem) => return vec![Finding::error(problem.to_string(), "")],
        };
        store.stay_unregistered();
        let mut found = vec![self.looks_up(&*store).await];
        found.push(hears(&*store).await);
        match &self.kind {
            StoreSettings::Postgres(settings) => found.extend(settings.examine().await),
            StoreSettings::Redis(settings) => found.extend(settings.examine().await),
            StoreSettings::Sqlite(_) | StoreSettings::File(_) | StoreSettings::Introspection(_) => {}
        }
        found
    }

    /// A lookup of a token that nobody has proves the connection, the rights and the tables.
    async fn looks_up(&self, store: &dyn TokenStore) -> Finding {
        let token = format!("tg-nobody-{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..));
        let credential = Credential::new(token.as_bytes(), Digest::of(token.as_bytes()));
        let begun = Instant::now();
        let answer = tokio::time::timeout(self.timeout, store.lookup(&credential)).await;
        match answer.unwrap_or(Err(StoreError::Timeout)) {
            Ok(None) => Finding::fine(format!("lookups are answered (the first after {:.0?})", begun.elapsed())),
            Ok(Some(_)) => Finding::error("a token that nobody has is known", "correct the query, or the endpoint"),
            Err(error) => Finding::error(format!("lookups fail: {error}"), ""),
        }
    }
}

/// Follows the store until it says whether it notifies of changes.
async fn hears(store: &dyn TokenStore) -> Finding {
    if !store.tells_changes() {
        let what = "there are no change notifications: a revoked token works for up to positive_ttl";
        return Finding::fine(what);
    }
    let (said, mut events) = mpsc::unbounded_channel();
    let begun = Instant::now();
    let heard = move |event: Event| drop(said.send(event));
    let mut last = None;
    let outcome = async {
        while let Some(event) = events.recv().await {
            match event {
                Event::Hearing => return Finding::fine(format!("changes are heard after {:.0?}", begun.elapsed())),
                Event::Unheard(_, why) => last = Some(why),
                _ => {}
            }
        }
        Finding::error("following changes has ended", "")
    };
    let found = tokio::select! {
        biased;
        found = tokio::time::timeout(SUBSCRIBING, outcome) => found,
        () = store.follow(&heard) => return Finding::error("following changes has ended", ""),
    };
    found.unwrap_or_else(|_| {
        let why = last.unwrap_or_else(|| format!("nothing was heard within {SUBSCRIBING:?}"));
        Finding::error(format!("changes are not heard: {why}"), "")
    })
}
