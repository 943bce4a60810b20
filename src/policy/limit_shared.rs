//! Limits that replicas share: a request is counted by what this replica has leased of them. It must not know how a lease is got: what
//! is lacking is told, and the pipeline waits for it.

use super::*;
use crate::share::{
    LeaseEngine, LeaseKey, LeaseLack, LeaseOutcome, LeasePart, LeaseRefusal, LeaseTake, RefusedBy, SharedAmounts,
    SharedQuota, SharedRate,
};

/// A running limit's place among what replicas share.
#[derive(Debug)]
pub(super) struct SharedLimit {
    engine: Arc<LeaseEngine>,
    name: Arc<str>,
}

impl SharedLimit {
    /// Whether the other one has the same leases.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.name == other.name && Arc::ptr_eq(&self.engine, &other.engine)
    }
}

/// Requests that a limit has to be asked for elsewhere.
#[derive(Debug, Default)]
pub struct LeasesLacking {
    pub lacks: Vec<LimitLack>,
    /// Counted already, by other limits.
    pub paid: PaidLeases,
}

#[derive(Debug)]
pub struct LimitLack {
    pub limit: u16,
    pub engine: Arc<LeaseEngine>,
    pub lack: LeaseLack,
    /// Its "no" refuses nothing.
    pub dry_run: bool,
}

/// What the wait for leases came to, by limit: these are not asked again.
pub type PaidLeases = Vec<(u16, LeaseOutcome)>;

/// What a request took of shared limits, or lacks.
#[derive(Debug, Default)]
pub(super) struct SharedTaken {
    /// Only of the early stage.
    leases: Vec<TakenLease>,
    lacking: Option<LeasesLacking>,
}

/// What a request took of a lease.
#[derive(Clone, Copy, Debug)]
struct TakenLease {
    limit: u16,
    part: LeasePart,
}

impl From<LimitAmounts> for SharedAmounts {
    fn from(amounts: LimitAmounts) -> Self {
        let rate = amounts.rate.map(|rate| {
            let (requests, period_ms) = rate.parts();
            SharedRate { requests, period_ms, burst: rate.burst() }
        });
        let quota = amounts.quota.map(|quota| SharedQuota {
            requests: quota.requests,
            monthly: quota.period == super::super::limit_bucket::CalendarPeriod::Month,
        });
        Self { rate, quota }
    }
}

impl LimitsTaken {
    /// Leases have to be waited for first: nothing was taken but of other leases.
    pub fn lacks(&self) -> bool {
        self.0.as_ref().is_some_and(|kept| kept.shared.lacking.is_some())
    }

    /// What has to be waited for.
    pub fn into_lacking(self) -> Option<LeasesLacking> {
        self.0.and_then(|kept| kept.shared.lacking)
    }
}

impl RequestLimits {
    /// Counts the limits that are marked so together with other replicas. `seed` says what the keys of a limit are hashed with.
    #[must_use]
    pub fn sharing(mut self, engine: &Arc<LeaseEngine>, seed: impl Fn(&str) -> (u64, u64)) -> Self {
        for limit in self.limits.iter_mut().filter_map(Arc::get_mut).filter(|limit| limit.settings.shared) {
            limit.seed = seed(&limit.settings.name);
            limit.shared = Some(SharedLimit { engine: Arc::clone(engine), name: limit.settings.name.as_str().into() });
        }
        self.engine = Some(Arc::clone(engine));
        self
    }

    /// So many keys are counted together with other replicas.
    pub fn shared_keys(&self) -> usize {
        let shared = self.limits.iter().filter(|limit| limit.settings.shared);
        shared.map(|limit| if limit.settings.buckets.key.is_empty() { 1 } else { limit.settings.buckets.most }).sum()
    }

    /// What shared limits are asked by.
    pub fn engine(&self) -> Option<&Arc<LeaseEngine>> {
        self.engine.as_ref()
    }

    /// Asks a shared limit, and then the rest. On the way back, what was taken is put back if another limit refuses.
    pub(super) fn ask_shared(
        &self,
        (next, rest): (&LimitUse, &[LimitUse]),
        limit: &RunningLimit,
        shared: &SharedLimit,
        (key, cost): (u64, u64),
        (amounts, odd): (&LimitAmounts, bool),
        asked: &mut Asked<'_, '_>,
    ) {
        let number = next.limit;
        let key = LeaseKey { limit: Arc::clone(&shared.name), hash: key, amounts: (*amounts).into() };
        let now = asked.now;
        let known = asked.paid.iter().find(|(paid, _)| *paid == number).map(|(_, outcome)| *outcome);
        let (mut part, mut is_lacking) = (None, false);
        let refusal = match (known, asked.takes) {
            (Some(LeaseOutcome::Paid), _) => None,
            (Some(LeaseOutcome::Refused(refusal)), _) => Some(refusal),
            (None, false) => shared.engine.peek(&key, cost, now),
            (None, true) => match shared.engine.take(&key, cost, now) {
                LeaseTake::Taken(taken) => {
                    part = Some(taken);
                    None
                }
                LeaseTake::Refused(refusal) => Some(refusal),
                LeaseTake::Lacks => {
                    is_lacking = true;
                    let lack = LeaseLack { key: key.clone(), cost };
                    let (engine, dry_run) = (Arc::clone(&shared.engine), limit.settings.dry_run);
                    let lack = LimitLack { limit: number, engine, lack, dry_run };
                    asked.taken.0.get_or_insert_default().shared.lacking.get_or_insert_default().lacks.push(lack);
                    None
                }
            },
        };
        let result = match refusal {
            None => LimitResult::Allowed,
            Some(_) if limit.settings.dry_run => LimitResult::DryRun,
            Some(refusal) => {
                asked.exceeds(refusal.wait_ms, || excess(&refusal, number, amounts, now));
                LimitResult::Refused
            }
        };
        let mut fact = LimitFact { limit: number, result, shared: false, odd, remaining: 0, full_in: 0 };
        if self.told {
            fact.remaining = refusal.map_or_else(|| shared.engine.remaining(&key), |refusal| refusal.remaining);
            fact.full_in = match amounts.rate {
                Some(rate) => rate.fills_in(rate.burst().saturating_sub(fact.remaining)).div_ceil(1_000),
                None => amounts.quota.map_or(0, |quota| quota.period.rest_ms(now.unix_ms).div_ceil(1_000)),
            };
        }
        asked.facts.push(fact);
        self.ask_rest(rest, asked);
        if asked.excess.is_some() {
            // What the store was told of stays counted.
            if let Some(part) = part {
                shared.engine.put_back(part, now);
            }
            return;
        }
        let is_early = asked.stage == LimitStage::Early;
        match (asked.taken.0.as_mut().and_then(|kept| kept.shared.lacking.as_mut()), part) {
            // It is not asked again when the others have come: each says one thing to a request.
            (Some(lacking), _) if !is_lacking => {
                let outcome = refusal.map_or(LeaseOutcome::Paid, LeaseOutcome::Refused);
                lacking.paid.push((number, outcome));
            }
            (None, Some(part)) if is_early => {
                let taken = TakenLease { limit: next.limit, part };
                asked.taken.0.get_or_insert_default().shared.leases.push(taken);
            }
            _ => {}
        }
    }

    /// Puts back what an early stage took of leases, when a later one refuses.
    pub(super) fn give_back_leases(&self, taken: &LimitsTaken, now: Now) {
        for taken in taken.0.iter().flat_map(|kept| &kept.shared.leases) {
            if let Some(shared) = self.limits.get(usize::from(taken.limit)).and_then(|limit| limit.shared.as_ref()) {
                shared.engine.put_back(taken.part, now);
            }
        }
    }
}

/// What the client is told of a refusal.
fn excess(refusal: &LeaseRefusal, limit: u16, amounts: &LimitAmounts, now: Now) -> Excess {
    let by = match refusal.by {
        RefusedBy::Rate => LimitedBy::Rate,
        RefusedBy::Quota => LimitedBy::Quota,
        RefusedBy::Gone => LimitedBy::Store,
    };
    Excess {
        limit,
        by,
        retry_after: refusal.wait_ms.div_ceil(1_000).max(1),
        // Rounded up, as the wait is: who waits until then must not be early.
        reset: now.unix_ms.saturating_add(refusal.wait_ms.max(1)).div_ceil(1_000),
        per_minute: amounts.per_minute(by),
        remaining: refusal.remaining,
    }
}
