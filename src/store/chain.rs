//! The configured stores, in their order: the first that knows a token decides, and one that fails ends the lookup. A
//! failure never falls through to the next store, because a token that is revoked in the failed one could be valid
//! there.

use super::{Event, Mark, StoreError, TokenRecord, TokenStore};
use crate::store::credential::{Credential, Digest};
use crate::telemetry::metrics::StoreMetrics;
use crate::telemetry::outage::{LogThrottle, Outage};
use futures_util::future::join_all;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub struct Link {
    /// Label of metrics and logs.
    pub name: String,
    pub store: Arc<dyn TokenStore>,
    /// Limit for the duration of a lookup.
    pub timeout: Duration,
    pub metrics: Arc<StoreMetrics>,
    failures: FailureLog,
}

/// Limits the messages about failed lookups.
#[derive(Default)]
struct FailureLog {
    /// The store itself fails, for every token.
    outage: Outage,
    /// A single record is invalid.
    garbage: LogThrottle,
}

/// Uses of tokens are written to a store in batches of this size with a pause after each, so that a revocation waiting
/// for the store's lock never has to wait for all of them.
const USES_AT_ONCE: usize = 500;
const USES_PAUSE: Duration = Duration::from_millis(25);

pub struct Chain {
    links: Vec<Link>,
}

impl Chain {
    pub fn new(links: Vec<Link>) -> Self {
        Self { links }
    }

    pub fn links(&self) -> &[Link] {
        &self.links
    }

    /// The names in their order, for people.
    pub fn names(&self) -> String {
        self.links.iter().map(|link| link.name.as_str()).collect::<Vec<_>>().join(", ")
    }

    pub(crate) async fn lookup(&self, credential: &Credential) -> Result<Option<TokenRecord>, StoreError> {
        for link in &self.links {
            if let Some(record) = link.lookup(credential).await? {
                return Ok(Some(record));
            }
        }
        Ok(None)
    }

    /// The stores' own identifiers of a token.
    pub(crate) fn handles(&self, credential: &Credential) -> Vec<Digest> {
        self.links.iter().filter_map(|link| link.store.handle(credential)).collect()
    }

    /// Follows all stores. `heard` is told which link speaks.
    pub(crate) async fn follow(&self, heard: &(dyn Fn(usize, Event) + Send + Sync)) {
        join_all(self.links.iter().enumerate().map(|(index, link)| async move {
            link.store.follow(&|event| heard(index, event)).await;
        }))
        .await;
    }

    /// `None` if one of the stores cannot report its changes.
    pub(crate) async fn changed_since(&self, marks: &[Option<Mark>]) -> Result<Option<Vec<Digest>>, StoreError> {
        let mut changed = Vec::new();
        for (index, link) in self.links.iter().enumerate() {
            let Some(Some(mark)) = marks.get(index) else { return Ok(None) };
            match link.store.changed_since(mark).await? {
                Some(more) => changed.extend(more),
                None => return Ok(None),
            }
        }
        Ok(Some(changed))
    }

    /// Passes the uses to every store; a store ignores tokens that it does not have. Returns whether all stores wrote
    /// them.
    pub(crate) async fn note_uses(&self, uses: &[(Digest, u64)]) -> bool {
        let mut all = true;
        for link in &self.links {
            for (index, slice) in uses.chunks(USES_AT_ONCE).enumerate() {
                if index > 0 {
                    tokio::time::sleep(USES_PAUSE).await;
                }
                if let Err(error) = link.store.note_uses(slice.to_vec()).await {
                    let lost = uses.len() - index * USES_AT_ONCE;
                    log::warn!("store {}: last uses of {lost} tokens were not recorded: {error}", link.name);
                    all = false;
                    break;
                }
            }
        }
        all
    }
}

impl Link {
    pub fn new(name: String, store: Arc<dyn TokenStore>, timeout: Duration, metrics: Arc<StoreMetrics>) -> Self {
        Self { name, store, timeout, metrics, failures: FailureLog::default() }
    }

    async fn lookup(&self, credential: &Credential) -> Result<Option<TokenRecord>, StoreError> {
        let (timer, began) = (self.metrics.lookup_started(), Instant::now());
        let lookup = tokio::time::timeout(self.timeout, self.store.lookup(credential)).await;
        let result = lookup.unwrap_or(Err(StoreError::Timeout));
        drop(timer);
        match &result {
            Ok(found) => {
                self.metrics.answered(found.is_some());
                self.works(began);
            }
            Err(error) => {
                self.metrics.failed(error.kind());
                self.fails(error, credential);
            }
        }
        result
    }

    /// Logs the beginning of an outage once, not for each token that is presented meanwhile.
    fn fails(&self, error: &StoreError, credential: &Credential) {
        let (now, name, token) = (Instant::now(), &self.name, credential.digest().id());
        if let StoreError::Garbage(_) = error {
            if let Some(more) = self.failures.garbage.due(now) {
                log::warn!("store {name}: token {token}: {error} ({more} similar messages suppressed)");
            }
        } else if self.failures.outage.failed(now).is_some() {
            log::warn!("store {name}: lookups fail from now on, the first one for token {token}: {error}");
        }
    }

    fn works(&self, began: Instant) {
        if let Some(over) = self.failures.outage.succeeded(began, Instant::now()) {
            let (failures, lasted) = (over.failures, over.lasted);
            log::warn!("store {}: answers again; {failures} lookups failed in {lasted:.1?}", self.name);
        }
    }
}
