//! The configured stores, in their order: the first that knows a token decides, and one that fails ends the lookup. A
//! failure never falls through to the next store, because a token that is revoked in the failed one could be valid
//! there.

use super::lookups::{Lane, LookedUp, LookupQueue, LookupTurn, WaitingLookup};
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
    /// Limit for the duration of a lookup, the wait for its turn included.
    pub timeout: Duration,
    pub metrics: Arc<StoreMetrics>,
    queue: LookupQueue,
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
    links: Vec<Arc<Link>>,
}

impl Chain {
    pub fn new(links: Vec<Link>) -> Self {
        Self { links: links.into_iter().map(Arc::new).collect() }
    }

    pub fn links(&self) -> &[Arc<Link>] {
        &self.links
    }

    /// The names in their order, for people.
    pub fn names(&self) -> String {
        self.links.iter().map(|link| link.name.as_str()).collect::<Vec<_>>().join(", ")
    }

    pub(crate) async fn lookup(
        &self,
        credential: &Arc<Credential>,
        lane: Lane,
    ) -> Result<Option<TokenRecord>, StoreError> {
        for link in &self.links {
            if let Some(record) = link.lookup(credential, lane).await? {
                return Ok(Some(record));
            }
        }
        Ok(None)
    }

    /// The same for stores that answer from memory. `None`: one of them does not.
    pub(crate) fn lookup_at_once(&self, token: &Digest) -> Option<Option<TokenRecord>> {
        for link in &self.links {
            let found = link.store.lookup_at_once(token)?;
            link.metrics.answered(found.is_some(), Duration::ZERO);
            if found.is_some() {
                return Some(found);
            }
        }
        Some(None)
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
        let queue = LookupQueue::new(store.lookup_limits());
        Self { name, store, timeout, metrics, queue, failures: FailureLog::default() }
    }

    /// At once if the store has a place; else in its turn, together with others that wait.
    async fn lookup(self: &Arc<Self>, credential: &Arc<Credential>, lane: Lane) -> LookedUp {
        match self.queue.enter(credential, lane) {
            LookupTurn::Now => {
                let _place = LookupPlace(Arc::clone(self));
                let began = Instant::now();
                let answer = tokio::time::timeout(self.timeout, self.store.lookup(credential)).await;
                let answer = answer.unwrap_or(Err(StoreError::Timeout));
                self.note(credential, &answer, began);
                answer
            }
            LookupTurn::Later(answer) => {
                self.metrics.waiting(self.queue.waiting());
                match tokio::time::timeout(self.timeout, answer).await {
                    Ok(Ok(answer)) => answer,
                    Ok(Err(_)) => Err(StoreError::Unavailable("the lookup was given up".into())),
                    Err(_) => {
                        let late = Err(StoreError::Overloaded);
                        self.note(credential, &late, Instant::now());
                        late
                    }
                }
            }
        }
    }

    /// Looks up several tokens at once.
    async fn lookup_many(&self, batch: Vec<WaitingLookup>) {
        let began = Instant::now();
        let credentials: Vec<&Credential> = batch.iter().map(|waiting| &*waiting.credential).collect();
        let mut answers = match tokio::time::timeout(self.timeout, self.store.lookup_many(&credentials)).await {
            Ok(answers) => answers.into_iter(),
            Err(_) => vec![Err(StoreError::Timeout); batch.len()].into_iter(),
        };
        for WaitingLookup { credential, reply } in batch {
            // One for each, by what a store promises.
            let answer = answers.next().unwrap_or_else(|| Err(StoreError::Unavailable("it gave no answer".into())));
            self.note(&credential, &answer, began);
            // Nobody may wait any more.
            let _ = reply.send(answer);
        }
    }

    fn note(&self, credential: &Credential, answer: &LookedUp, began: Instant) {
        match answer {
            Ok(found) => {
                self.metrics.answered(found.is_some(), began.elapsed());
                self.works(began);
            }
            Err(error) => {
                self.metrics.failed(error.kind());
                self.fails(error, credential);
            }
        }
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

/// A place among the lookups that are under way. Whichever way a lookup ends, those who wait come next.
struct LookupPlace(Arc<Link>);

impl Drop for LookupPlace {
    fn drop(&mut self) {
        let batch = self.0.queue.next();
        if batch.is_empty() {
            return;
        }
        let link = Arc::clone(&self.0);
        // Without a runtime everything ends, and the place is of no use to anybody: it is only made when this runs, so that
        // it is not passed on and on by those who are dropped one within the other.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                let place = Self(link);
                place.0.metrics.waiting(place.0.queue.waiting());
                place.0.lookup_many(batch).await;
            });
        }
    }
}
