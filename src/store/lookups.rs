//! The lookups of one store: some are under way, the others wait for a place in the order in which they came, and are asked
//! in bulk. Bounds how many are under way, never how many wait: that is its callers' part. Knows no cache, no metric and no
//! clock.

use super::{StoreError, TokenRecord};
use crate::store::credential::Credential;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use tokio::sync::oneshot;

/// What a lookup says of one token.
pub(super) type LookedUp = Result<Option<TokenRecord>, StoreError>;

/// What a store can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LookupLimits {
    /// Lookups under way at once.
    pub at_once: usize,
    /// Tokens that one of them may be for.
    pub tokens: usize,
}

/// For whom a token is looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// A token with a cache entry. These come first: there are at most as many as entries, and each only once.
    Known,
    /// Anybody, who may be guessing. Every fourth place is theirs nevertheless.
    Stranger,
}

/// While both wait, one place in so many goes to a stranger.
const STRANGERS_SHARE: usize = 4;

pub(super) struct LookupQueue {
    limits: LookupLimits,
    state: Mutex<QueueState>,
}

#[derive(Default)]
struct QueueState {
    under_way: usize,
    known: VecDeque<WaitingLookup>,
    strangers: VecDeque<WaitingLookup>,
    /// Counts what was taken while both waited.
    taken: usize,
}

/// A lookup that waits for a place. Whoever gave up is not asked for.
pub(super) struct WaitingLookup {
    pub(super) credential: Arc<Credential>,
    pub(super) reply: oneshot::Sender<LookedUp>,
}

/// How a lookup begins.
pub(super) enum LookupTurn {
    /// At once. The place must be given back by [`LookupQueue::next`].
    Now,
    Later(oneshot::Receiver<LookedUp>),
}

impl LookupQueue {
    pub(super) fn new(limits: LookupLimits) -> Self {
        let limits = LookupLimits { at_once: limits.at_once.max(1), tokens: limits.tokens.max(1) };
        Self { limits, state: Mutex::default() }
    }

    /// Takes a place, if there is one and nobody waits for it; else waits.
    pub(super) fn enter(&self, credential: &Arc<Credential>, lane: Lane) -> LookupTurn {
        let mut state = self.state.lock();
        if state.under_way < self.limits.at_once {
            state.under_way += 1;
            return LookupTurn::Now;
        }
        let (sender, answer) = oneshot::channel();
        let waiting = WaitingLookup { credential: Arc::clone(credential), reply: sender };
        match lane {
            Lane::Known => state.known.push_back(waiting),
            Lane::Stranger => state.strangers.push_back(waiting),
        }
        LookupTurn::Later(answer)
    }

    /// Passes a place on to those who have waited longest. An empty list: nobody waits, and the place is free again.
    pub(super) fn next(&self) -> Vec<WaitingLookup> {
        let mut state = self.state.lock();
        let mut batch = Vec::new();
        while batch.len() < self.limits.tokens
            && let Some(waiting) = state.pop()
        {
            if !waiting.reply.is_closed() {
                batch.push(waiting);
            }
        }
        if batch.is_empty() {
            state.under_way -= 1;
        }
        batch
    }

    /// How many wait for a place.
    pub(super) fn waiting(&self) -> usize {
        let state = self.state.lock();
        state.known.len() + state.strangers.len()
    }
}

impl QueueState {
    fn pop(&mut self) -> Option<WaitingLookup> {
        if self.known.is_empty() || self.strangers.is_empty() {
            return self.known.pop_front().or_else(|| self.strangers.pop_front());
        }
        self.taken = self.taken.wrapping_add(1);
        if self.taken.is_multiple_of(STRANGERS_SHARE) { self.strangers.pop_front() } else { self.known.pop_front() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::credential::Digest;

    fn credential(name: &str) -> Arc<Credential> {
        Arc::new(Credential::new(name.as_bytes(), Digest::of(name.as_bytes())))
    }

    fn names(batch: &[WaitingLookup]) -> Vec<String> {
        batch.iter().map(|one| String::from_utf8(one.credential.expose_secret().to_vec()).unwrap()).collect()
    }

    #[test]
    fn who_came_first_is_asked_first_and_known_ones_before_strangers() {
        let queue = LookupQueue::new(LookupLimits { at_once: 1, tokens: 6 });
        assert!(matches!(queue.enter(&credential("now"), Lane::Stranger), LookupTurn::Now));
        let mut answers = Vec::new();
        for (lane, name) in [("s", "s1"), ("s", "s2"), ("k", "k1"), ("k", "k2"), ("s", "s3"), ("k", "k3"), ("k", "k4")]
        {
            let lane = if lane == "k" { Lane::Known } else { Lane::Stranger };
            let LookupTurn::Later(answer) = queue.enter(&credential(name), lane) else { panic!("there is one place") };
            answers.push(answer);
        }
        assert_eq!(queue.waiting(), 7);
        assert_eq!(names(&queue.next()), ["k1", "k2", "k3", "s1", "k4", "s2"]);
        assert_eq!(names(&queue.next()), ["s3"]);
        assert!(queue.next().is_empty(), "the place is free");
        assert!(matches!(queue.enter(&credential("again"), Lane::Known), LookupTurn::Now));
    }

    #[test]
    fn who_gave_up_takes_no_place() {
        let queue = LookupQueue::new(LookupLimits { at_once: 1, tokens: 1 });
        assert!(matches!(queue.enter(&credential("now"), Lane::Known), LookupTurn::Now));
        let turns: Vec<_> = ["a", "b"].map(|name| queue.enter(&credential(name), Lane::Known)).into();
        let mut turns = turns.into_iter();
        drop(turns.next());
        assert_eq!(names(&queue.next()), ["b"]);
    }
}
