//! What answers say of the client's limits, as the IETF's draft has it (draft-ietf-httpapi-ratelimit-headers): `RateLimit` with
//! what is left of each limit, and `RateLimit-Policy` with what it allows. Pure.

use crate::identity::Principal;
use crate::policy::{LimitFact, LimitFacts, RequestLimits};
use std::fmt::Write as _;

/// The values of both fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitFields {
    left: String,
    policy: String,
}

impl LimitFields {
    /// `None`: answers say nothing, or no limit applied that refuses anything.
    pub fn of(limits: &RequestLimits, facts: &LimitFacts, principal: Option<&Principal>) -> Option<Self> {
        if !limits.are_told() || facts.is_empty() {
            return None;
        }
        let mut fields = Self { left: String::new(), policy: String::new() };
        // A limit that refuses nobody is nothing to hold back for.
        let holds = |fact: &&LimitFact| limits.settings(fact.limit).is_some_and(|settings| !settings.dry_run);
        for fact in facts.iter().filter(holds) {
            fields.add(limits, fact, principal);
        }
        (!fields.left.is_empty()).then_some(fields)
    }

    fn add(&mut self, limits: &RequestLimits, fact: &LimitFact, principal: Option<&Principal>) {
        let Some(amounts) = limits.amounts(fact.limit, principal) else { return };
        let name = limits.name(fact.limit);
        let between = if self.left.is_empty() { "" } else { ", " };
        // Nothing can fail that is written to a string.
        let _ = write!(self.left, "{between}\"{name}\";r={}", fact.remaining);
        let _ = match (amounts.stated(), amounts.concurrency) {
            (Some((requests, seconds)), _) => {
                let _ = write!(self.left, ";t={}", fact.full_in);
                write!(self.policy, "{between}\"{name}\";q={requests};w={seconds}")
            }
            (None, most) => {
                write!(self.policy, "{between}\"{name}\";q={};qu=\"concurrent-requests\"", most.unwrap_or(0))
            }
        };
    }

    pub fn fields(&self) -> [(&'static str, &str); 2] {
        [("RateLimit", &self.left), ("RateLimit-Policy", &self.policy)]
    }
}
