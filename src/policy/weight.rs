//! How much a caller may ask, beside others, before it comes behind them where requests wait: by the plan of its token. Pure. It
//! must not know the queue.

use crate::identity::Principal;

/// The weights of plans that have one.
#[derive(Clone, Debug, Default)]
pub struct PlanWeights(Vec<(String, u32)>);

impl PlanWeights {
    pub const MOST: u64 = 1_000;

    pub fn new(weights: impl Iterator<Item = (String, u64)>) -> Self {
        let narrow = |(plan, weight)| Some((plan, u32::try_from(weight).ok().filter(|weight| *weight > 1)?));
        Self(weights.filter_map(narrow).collect())
    }

    /// Of whoever asks: 1 without a token, without a plan, and with one that is not configured.
    pub fn of(&self, principal: Option<&Principal>) -> u32 {
        if self.0.is_empty() {
            return 1;
        }
        let plan = principal.and_then(|principal| principal.terms()?.plan());
        let known = plan.and_then(|plan| self.0.iter().find(|(name, _)| name == plan));
        known.map_or(1, |(_, weight)| *weight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Now;
    use crate::identity::{TokenStatus, judge};
    use crate::store::TokenRecord;
    use crate::store::credential::Digest;
    use crate::store::terms::{SaidTerms, TokenTerms};

    #[test]
    fn a_plan_weighs_what_it_says_and_all_else_weighs_one() {
        let weights = PlanWeights::new([("gold".to_owned(), 4), ("free".to_owned(), 1)].into_iter());
        let (digest, now) = (Digest::of(b"t"), Now { mono_ms: 0, unix_ms: 1_700_000_000_000 });
        for (plan, expected) in [("gold", 4), ("free", 1), ("gone", 1), ("", 1)] {
            let terms = TokenTerms::of(SaidTerms { plan: plan.into(), ..SaidTerms::default() }).unwrap();
            let record = TokenRecord { terms, ..TokenRecord::new(digest, "a") };
            let (TokenStatus::Valid(principal), _) = judge(Some(&record), &digest, now) else { panic!("{plan}") };
            assert_eq!(weights.of(Some(&principal)), expected, "{plan}");
        }
        assert_eq!((weights.of(None), PlanWeights::default().of(None)), (1, 1));
    }
}
