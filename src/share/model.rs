//! A store of shared limits in memory, with a clock that a test sets: what the script in Redis and the function in PostgreSQL
//! compute, in Rust. Answers can be lost on their way, in either direction.

use super::{LEASE, LeaseAnswer, LeaseRequest, ShareStore};
use crate::store::StoreError;
use async_trait::async_trait;
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const DAY_US: u64 = 86_400_000_000;

/// What becomes of messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Weather {
    #[default]
    Fine,
    /// It does not arrive.
    Lost,
    /// It is carried out, and the answer is lost.
    Unanswered,
}

#[derive(Default)]
pub(super) struct ModelStore {
    pub(super) now_us: AtomicU64,
    pub(super) weather: Mutex<Weather>,
    pub(super) messages: AtomicU64,
    /// A message, or its answer, is polled up to so many times before it arrives.
    pub(super) delay: AtomicU64,
    random: Mutex<fastrand::Rng>,
    pub(super) keys: Mutex<HashMap<Arc<str>, ModelBucket>>,
    replicas: Mutex<BTreeMap<String, u64>>,
}

#[derive(Default)]
pub(super) struct ModelBucket {
    debt: u128,
    seen: u64,
    spent: u64,
    period: u64,
    leases: BTreeMap<String, (u64, u64)>,
}

impl ModelBucket {
    pub(super) fn held(&self) -> u64 {
        self.leases.values().map(|(held, _)| held).sum()
    }

    fn lease(&mut self, now: u64, replica: &str, request: &LeaseRequest) -> LeaseAnswer {
        let (unit, flow, burst) = request.amounts.units().unwrap_or((1, 1, 0));
        let (unit, flow) = (u128::from(unit), u128::from(flow));
        let quota = request.amounts.quota.map_or(0, |quota| quota.requests);
        self.debt = self.debt.saturating_sub(u128::from(now.saturating_sub(self.seen)) * flow);
        self.seen = now;
        if self.period != now / DAY_US {
            (self.period, self.spent) = (now / DAY_US, 0);
        }
        let mut own = 0;
        self.leases.retain(|name, (held, ends)| {
            if *ends <= now {
                self.debt += u128::from(*held) * unit;
                self.spent += *held;
            } else if name == replica {
                own = *held;
            }
            *ends > now && name != replica
        });
        let others = self.held();
        let told = request.used.min(own);
        self.debt += u128::from(told) * unit;
        self.spent += told;
        own = request.keeps.unwrap_or(own - told);
        let full = u128::from(burst) * unit;
        let mut room = u64::MAX;
        if burst > 0 {
            room = room.min((full.saturating_sub(self.debt) / unit) as u64).saturating_sub(others + own);
        }
        if quota > 0 {
            room = room.min(quota.saturating_sub(self.spent + others + own));
        }
        let passed = room.checked_div(request.cost).map_or(0, |most| most.min(request.count));
        self.debt += u128::from(passed * request.cost) * unit;
        self.spent += passed * request.cost;
        room -= passed * request.cost;
        let ahead = if passed == request.count { request.ahead.min(room) } else { 0 };
        own += ahead;
        let (mut wait, mut by_quota) = (0, false);
        if passed < request.count {
            if burst > 0 {
                let owed = self.debt + u128::from(others + own + request.cost) * unit;
                wait = owed.saturating_sub(full).div_ceil(flow) as u64;
            }
            if quota > 0 && quota.saturating_sub(self.spent + others + own) < request.cost {
                let rest = DAY_US - now % DAY_US;
                let longer = if quota >= self.spent + request.cost { LEASE.as_micros() as u64 } else { rest };
                (wait, by_quota) = if longer > wait { (longer, true) } else { (wait, by_quota) };
            }
            wait = wait.max(1);
        }
        if own > 0 {
            self.leases.insert(replica.to_owned(), (own, now + LEASE.as_micros() as u64));
        }
        if passed > 0 || ahead > 0 {
            assert!(
                burst == 0 || self.debt + u128::from(others + own) * unit <= full,
                "the store gave what it has not"
            );
        }
        let left = (full.saturating_sub(self.debt) / unit) as u64;
        LeaseAnswer {
            passed,
            ahead,
            wait_ms: wait.div_ceil(1_000),
            by_quota,
            rate_left: left.saturating_sub(others + own),
            quota_left: quota.saturating_sub(self.spent + others + own),
        }
    }
}

#[async_trait]
impl ShareStore for ModelStore {
    async fn lease(&self, replica: &str, requests: &[LeaseRequest]) -> Result<Vec<LeaseAnswer>, StoreError> {
        self.messages.fetch_add(1, Ordering::Relaxed);
        // The message, and then its answer, are on their way while others go on.
        let (there, back) = {
            let (mut random, most) = (self.random.lock(), self.delay.load(Ordering::Relaxed));
            (random.u64(0..=most), random.u64(0..=most))
        };
        for _ in 0..there {
            tokio::task::yield_now().await;
        }
        let answers = self.carry_out(replica, requests);
        for _ in 0..back {
            tokio::task::yield_now().await;
        }
        answers
    }

    async fn beat(&self, replica: &str) -> Result<u64, StoreError> {
        if *self.weather.lock() != Weather::Fine {
            return Err(StoreError::Timeout);
        }
        let mut replicas = self.replicas.lock();
        replicas.insert(replica.to_owned(), self.now_us.load(Ordering::Relaxed));
        Ok(replicas.len() as u64)
    }

    async fn leave(&self, replica: &str) -> Result<(), StoreError> {
        self.replicas.lock().remove(replica);
        Ok(())
    }

    async fn examine(&self) -> Result<(), StoreError> {
        Ok(())
    }
}

impl ModelStore {
    pub(super) fn replicas(&self) -> usize {
        self.replicas.lock().len()
    }

    fn carry_out(&self, replica: &str, requests: &[LeaseRequest]) -> Result<Vec<LeaseAnswer>, StoreError> {
        let weather = *self.weather.lock();
        if weather == Weather::Lost {
            return Err(StoreError::Timeout);
        }
        let now = self.now_us.load(Ordering::Relaxed);
        let mut keys = self.keys.lock();
        let answer =
            |request: &LeaseRequest| keys.entry(Arc::clone(&request.key)).or_default().lease(now, replica, request);
        let answers = requests.iter().map(answer).collect();
        if weather == Weather::Unanswered { Err(StoreError::Timeout) } else { Ok(answers) }
    }
}
