//! Series about clients that guess tokens. Never an address in a label.

use super::metrics::{Families, labels};
use prometheus::{IntCounter, IntGauge};

labels! {
    /// What became of a request whose token was not in the cache, and whose address guesses.
    GuessResult { Waited = "waited", Refused = "refused" }
}

pub struct GuessMetrics {
    failures: IntCounter,
    untracked: IntCounter,
    episodes: IntCounter,
    active: IntGauge,
    requests: Vec<IntCounter>,
}

impl GuessMetrics {
    pub(super) fn new(families: &Families<'_>) -> Result<Self, prometheus::Error> {
        let requests = families.counters(
            "tollgate_guessing_requests_total",
            "Requests with a token that was not in the cache, from addresses that guess, by result.",
            &["result"],
        )?;
        Ok(Self {
            failures: families
                .counter("tollgate_guessing_failures_total", "Failed tokens that counted for their address.")?,
            untracked: families.counter(
                "tollgate_guessing_untracked_total",
                "Failed tokens that counted for nobody, because too many addresses were watched.",
            )?,
            episodes: families.counter("tollgate_guessing_episodes_total", "Addresses that began to guess tokens.")?,
            active: families.gauge("tollgate_guessing_addresses", "Addresses that guess tokens at the moment.")?,
            requests: GuessResult::ALL.iter().map(|r| requests.with_label_values(&[r.as_str()])).collect(),
        })
    }

    pub fn failed(&self) {
        self.failures.inc();
    }

    pub fn untracked(&self) {
        self.untracked.inc();
    }

    pub fn began(&self) {
        self.episodes.inc();
    }

    pub fn active(&self, addresses: usize) {
        self.active.set(i64::try_from(addresses).unwrap_or(i64::MAX));
    }

    pub fn request(&self, result: GuessResult) {
        if let Some(counter) = self.requests.get(result as usize) {
            counter.inc();
        }
    }
}
