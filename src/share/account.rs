//! What one replica holds of one key: credit that was leased ahead, what was used of it, and what the store said last. Pure;
//! the time is an argument. It must not know how the store is asked.

use super::{LEASE, LeaseAnswer, SharedAmounts};
use crate::clock::Now;

/// Credit is not used in the last part of its time: the store's clock may run a little faster than this one.
const MARGIN_MS: u64 = 100;
/// A key without requests for so long gives its credit back.
const IDLE_MS: u64 = 500;
/// What was used is told to the store after this at the latest: until then it does not begin to flow off.
const REPORT_MS: u64 = 300;
/// The key is asked so soon again: more is leased ahead.
const BUSY_MS: u64 = 200;
/// A "no" of the store is believed for so long at most: other replicas give back what they do not use.
const BELIEVED_MS: u64 = 1_000;
/// A share of the burst, or of the quota, that all replicas together lease ahead at most.
const AHEAD: u64 = 10;
const DAY_MS: u64 = 24 * 60 * 60 * 1_000;

/// Why a request of a shared limit does not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseRefusal {
    pub by: RefusedBy,
    pub wait_ms: u64,
    pub remaining: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusedBy {
    Rate,
    Quota,
    /// The store does not answer, and nothing may pass then.
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AccountTake {
    /// In this epoch of reports.
    Taken(u32),
    Refused(LeaseRefusal),
    /// The store has to be asked.
    Lacks,
}

/// What is said to the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Report {
    pub(super) used: u64,
    pub(super) keeps: u64,
    pub(super) ahead: u64,
}

#[derive(Clone, Debug, Default)]
pub(super) struct LeaseAccount {
    left: u64,
    /// Of what was leased ahead, not told to the store yet.
    used: u64,
    /// Counts the reports: what was taken before one cannot be put back.
    epoch: u32,
    /// `left` counts until then.
    expires_at: u64,
    /// How much is to be leased ahead; 1: nothing.
    slice: u64,
    touched_at: u64,
    asked_at: u64,
    /// A message is on its way.
    pub(super) asked: bool,
    refused: Option<KnownRefusal>,
    /// What is left, as the store said last.
    rate_left: Option<u64>,
    quota_left: Option<u64>,
    local: LocalShare,
}

/// What the store refused.
#[derive(Clone, Copy, Debug)]
struct KnownRefusal {
    cost: u64,
    /// Not asked again before.
    until: u64,
    passes_at: u64,
    by: RefusedBy,
    remaining: u64,
}

/// What this replica gave while the store did not answer.
#[derive(Clone, Copy, Debug, Default)]
struct LocalShare {
    /// Which outage it is about.
    outage: u32,
    debt: u64,
    at: u64,
    used: u64,
    day: u64,
}

impl LeaseAccount {
    fn expire(&mut self, now: Now) {
        // While a message is on its way, the store may have kept it for longer.
        if now.mono_ms < self.expires_at || self.asked {
            return;
        }
        if self.left > 0 {
            self.slice /= 2;
        }
        // The store counts all of it as used from then on.
        (self.left, self.used) = (0, 0);
    }

    /// Takes from what was leased.
    pub(super) fn take(&mut self, cost: u64, now: Now) -> AccountTake {
        self.touched_at = now.mono_ms;
        self.expire(now);
        if self.left >= cost && now.mono_ms < self.expires_at {
            self.left -= cost;
            self.used += cost;
            return AccountTake::Taken(self.epoch);
        }
        self.known_refusal(cost, now).map_or(AccountTake::Lacks, AccountTake::Refused)
    }

    /// What is known of a request without asking the store, and without taking anything.
    pub(super) fn known_refusal(&self, cost: u64, now: Now) -> Option<LeaseRefusal> {
        if self.left >= cost && now.mono_ms < self.expires_at {
            return None;
        }
        let known = self.refused.filter(|known| cost >= known.cost && now.mono_ms < known.until)?;
        let wait_ms = known.passes_at.saturating_sub(now.mono_ms).max(1);
        Some(LeaseRefusal { by: known.by, wait_ms, remaining: known.remaining })
    }

    /// Puts back what a request took that did not pass after all.
    pub(super) fn put_back(&mut self, cost: u64, epoch: u32, now: Now) {
        if self.epoch == epoch && now.mono_ms < self.expires_at && self.used >= cost {
            self.used -= cost;
            self.left += cost;
        }
    }

    /// Whether more is to be leased before it is needed.
    pub(super) fn runs_low(&self) -> bool {
        !self.asked && self.slice > 1 && self.left < self.slice / 2
    }

    /// What is left for the client, about.
    pub(super) fn remaining(&self) -> u64 {
        self.rate_left.or(self.quota_left).unwrap_or(0).saturating_add(self.left)
    }

    #[cfg(test)]
    pub(super) fn quota_left(&self) -> Option<u64> {
        self.quota_left
    }

    /// What is to be said to the store now. `waiting`: whether requests wait for its answer.
    pub(super) fn report(&mut self, amounts: &SharedAmounts, replicas: u64, waiting: bool, now: Now) -> Report {
        self.expire(now);
        let is_idle = !waiting && now.mono_ms >= self.touched_at.saturating_add(IDLE_MS);
        if is_idle {
            if self.left > 0 {
                self.slice /= 2;
            }
            self.left = 0;
        } else if waiting || self.runs_low() {
            let since = now.mono_ms.saturating_sub(self.asked_at);
            let most = self.most_ahead(amounts, replicas);
            self.slice = match since {
                _ if self.asked_at == 0 => 1,
                ..BUSY_MS => self.slice.saturating_mul(2),
                BUSY_MS..IDLE_MS => self.slice,
                _ => self.slice / 2,
            };
            self.slice = self.slice.min(most).max(1);
            self.asked_at = now.mono_ms;
        }
        self.epoch = self.epoch.wrapping_add(1);
        self.asked = true;
        let ahead = if is_idle || self.slice <= 1 { 0 } else { self.slice.saturating_sub(self.left) };
        Report { used: std::mem::take(&mut self.used), keeps: self.left, ahead }
    }

    /// All replicas together must not keep much of a key from the one that needs it.
    fn most_ahead(&self, amounts: &SharedAmounts, replicas: u64) -> u64 {
        let part = |all: u64| all / AHEAD / replicas.max(1);
        let rate = amounts.rate.map(|rate| part(rate.burst));
        let quota = amounts.quota.map(|quota| part(self.quota_left.unwrap_or(quota.requests)));
        rate.into_iter().chain(quota).min().unwrap_or(1)
    }

    /// The store has answered what was said at `sent`.
    pub(super) fn answered(&mut self, keeps: u64, answer: &LeaseAnswer, amounts: &SharedAmounts, sent: Now) {
        // What was used meanwhile is in `used`, and was in what it kept.
        let holds = keeps.saturating_add(answer.ahead);
        if holds > 0 {
            self.expires_at = (sent.mono_ms + LEASE.as_millis() as u64).saturating_sub(MARGIN_MS);
        }
        self.left = self.left.saturating_add(answer.ahead);
        self.rate_left = amounts.rate.map(|_| answer.rate_left);
        self.quota_left = amounts.quota.map(|_| answer.quota_left);
    }

    /// The store has refused a request of this cost.
    pub(super) fn refuse(
        &mut self,
        cost: u64,
        answer: &LeaseAnswer,
        amounts: &SharedAmounts,
        now: Now,
    ) -> LeaseRefusal {
        let by = if answer.by_quota || amounts.rate.is_none() { RefusedBy::Quota } else { RefusedBy::Rate };
        let remaining = if by == RefusedBy::Rate { answer.rate_left } else { answer.quota_left };
        let wait_ms = answer.wait_ms.max(1);
        let until = now.mono_ms + wait_ms.min(BELIEVED_MS);
        let passes_at = now.mono_ms.saturating_add(wait_ms);
        self.refused = Some(KnownRefusal { cost, until, passes_at, by, remaining });
        LeaseRefusal { by, wait_ms, remaining }
    }

    /// The store has let all pass.
    pub(super) fn passed(&mut self) {
        self.refused = None;
    }

    /// Whether the last answer was a "no".
    pub(super) fn is_doubtful(&self) -> bool {
        self.refused.is_some()
    }

    /// The store has not answered. What it was told may count twice, which is too much rather than too little.
    pub(super) fn unanswered(&mut self, used: u64) {
        self.asked = false;
        self.used = self.used.saturating_add(used);
    }

    /// Whether the store is to be told something though no request asks for it.
    pub(super) fn is_due(&self, now: Now) -> bool {
        if self.asked || (self.left == 0 && self.used == 0) || now.mono_ms >= self.expires_at {
            return false;
        }
        let soon = now.mono_ms.saturating_add(IDLE_MS) >= self.expires_at;
        let unsaid = self.used > 0 && now.mono_ms >= self.asked_at.saturating_add(REPORT_MS);
        soon || unsaid || now.mono_ms >= self.touched_at.saturating_add(IDLE_MS)
    }

    /// Gives everything back with the next report.
    pub(super) fn end(&mut self) {
        (self.touched_at, self.slice) = (0, 1);
    }

    /// Whether nothing would be lost with it.
    pub(super) fn is_idle(&self, amounts: &SharedAmounts, outage: Option<u32>, now: Now) -> bool {
        let holds = now.mono_ms < self.expires_at && (self.left > 0 || self.used > 0);
        let believes = self.refused.is_some_and(|known| now.mono_ms < known.until);
        let gives = outage.is_some_and(|outage| {
            self.local.outage == outage && (self.local.used > 0 || self.local.debt_at(amounts, now) > 0)
        });
        let since = now.mono_ms.saturating_sub(self.touched_at);
        !self.asked && !holds && !believes && !gives && since >= 2 * IDLE_MS
    }

    /// Takes from this replica's share of the limit, which it gives while the store does not answer.
    pub(super) fn take_local(
        &mut self,
        amounts: &SharedAmounts,
        cost: u64,
        replicas: u64,
        outage: u32,
        now: Now,
    ) -> Result<(), LeaseRefusal> {
        self.touched_at = now.mono_ms;
        let day = now.unix_ms / DAY_MS;
        if self.local.outage != outage {
            self.local = LocalShare { outage, at: now.mono_ms, day, ..LocalShare::default() };
        }
        let replicas = replicas.max(1);
        let debt = self.local.debt_at(amounts, now);
        let mut owed = 0;
        if let Some(rate) = amounts.rate {
            // A request costs as many times more as there are replicas: so nothing is rounded, and the burst stays one number.
            let units = cost.saturating_mul(rate.period_ms).saturating_mul(replicas);
            owed = debt.saturating_add(units);
            let room = rate.burst.saturating_mul(rate.period_ms).max(units);
            if owed > room {
                let wait_ms = (owed - room).div_ceil(rate.requests.max(1)).max(1);
                return Err(LeaseRefusal { by: RefusedBy::Rate, wait_ms, remaining: 0 });
            }
        }
        if let Some(quota) = amounts.quota {
            if !quota.monthly && self.local.day != day {
                (self.local.day, self.local.used, self.quota_left) = (day, 0, None);
            }
            let share = self.quota_left.unwrap_or(quota.requests) / replicas;
            if self.local.used.saturating_add(cost) > share {
                let wait_ms = DAY_MS - now.unix_ms % DAY_MS;
                return Err(LeaseRefusal {
                    by: RefusedBy::Quota,
                    wait_ms,
                    remaining: share - self.local.used.min(share),
                });
            }
            self.local.used += cost;
        }
        (self.local.debt, self.local.at) = (owed, now.mono_ms);
        Ok(())
    }
}

impl LocalShare {
    fn debt_at(&self, amounts: &SharedAmounts, now: Now) -> u64 {
        let flow = amounts.rate.map_or(0, |rate| rate.requests);
        self.debt.saturating_sub(now.mono_ms.saturating_sub(self.at).saturating_mul(flow))
    }
}
