//! A circuit breaker: after a number of consecutive failures the endpoint gets no requests for a while, then one lookup
//! probes it. Pure: the time is an argument.

use std::time::{Duration, Instant};

#[derive(Debug)]
pub(super) struct Breaker {
    most: u32,
    pause: Duration,
    state: BreakerState,
    /// Counts the changes of `state`. Outcomes of requests admitted before the last change are ignored.
    era: u64,
}

#[derive(Debug)]
enum BreakerState {
    /// With the number of failures since the last success.
    Closed(u32),
    Open {
        until: Instant,
    },
    /// One lookup is probing the endpoint.
    Trial,
}

/// Permission for a request. Its holder must report the outcome.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Pass {
    era: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The endpoint responded, whatever the response was.
    Answered,
    Failed,
    /// Cancelled before a result.
    Abandoned,
}

/// How an outcome changed the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    None,
    Opened,
    Closed,
}

impl Breaker {
    pub(super) const fn new(most: u32, pause: Duration) -> Self {
        Self { most, pause, state: BreakerState::Closed(0), era: 0 }
    }

    /// Whether [`Self::admit`] would admit a request, without using up the probe.
    pub(super) fn is_open(&self, now: Instant) -> bool {
        match self.state {
            BreakerState::Closed(_) => false,
            BreakerState::Open { until } => now < until,
            BreakerState::Trial => true,
        }
    }

    /// `None`: do not send a request.
    pub(super) fn admit(&mut self, now: Instant) -> Option<Pass> {
        if self.is_open(now) {
            return None;
        }
        if matches!(self.state, BreakerState::Open { .. }) {
            self.turn(BreakerState::Trial);
        }
        Some(Pass { era: self.era })
    }

    #[expect(clippy::needless_pass_by_value, reason = "a pass is used up")]
    pub(super) fn ended(&mut self, pass: Pass, outcome: Outcome, now: Instant) -> Turn {
        if pass.era != self.era {
            return Turn::None;
        }
        match (&mut self.state, outcome) {
            (BreakerState::Closed(failures), Outcome::Answered) => *failures = 0,
            (BreakerState::Closed(failures), Outcome::Failed) => {
                *failures += 1;
                if *failures >= self.most {
                    self.turn(BreakerState::Open { until: now + self.pause });
                    return Turn::Opened;
                }
            }
            (BreakerState::Trial, Outcome::Answered) => {
                self.turn(BreakerState::Closed(0));
                return Turn::Closed;
            }
            (BreakerState::Trial, Outcome::Failed) => self.turn(BreakerState::Open { until: now + self.pause }),
            // The next request may probe immediately.
            (BreakerState::Trial, Outcome::Abandoned) => self.turn(BreakerState::Open { until: now }),
            (BreakerState::Closed(_), Outcome::Abandoned) | (BreakerState::Open { .. }, _) => {}
        }
        Turn::None
    }

    const fn turn(&mut self, state: BreakerState) {
        self.state = state;
        self.era += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAUSE: Duration = Duration::from_secs(5);

    /// A breaker that three failures open, and the time.
    fn breaker() -> (Breaker, Instant) {
        (Breaker::new(3, PAUSE), Instant::now())
    }

    fn fail(breaker: &mut Breaker, times: u32, now: Instant) -> Turn {
        let mut turn = Turn::None;
        for _ in 0..times {
            let pass = breaker.admit(now).unwrap();
            turn = breaker.ended(pass, Outcome::Failed, now);
        }
        turn
    }

    #[test]
    fn failures_in_a_row_open_it() {
        let (mut breaker, now) = breaker();
        assert_eq!(fail(&mut breaker, 2, now), Turn::None);
        let pass = breaker.admit(now).unwrap();
        assert_eq!(breaker.ended(pass, Outcome::Answered, now), Turn::None);
        assert_eq!(fail(&mut breaker, 2, now), Turn::None, "a success in between starts the count anew");
        let pass = breaker.admit(now).unwrap();
        assert_eq!(breaker.ended(pass, Outcome::Abandoned, now), Turn::None, "says nothing");
        assert_eq!(fail(&mut breaker, 1, now), Turn::Opened);
        assert!(breaker.admit(now).is_none() && breaker.admit(now + PAUSE - Duration::from_millis(1)).is_none());
    }

    #[test]
    fn after_the_pause_exactly_one_tries() {
        let (mut breaker, now) = breaker();
        fail(&mut breaker, 3, now);
        let later = now + PAUSE;
        assert!(!breaker.is_open(later), "asking takes no place");
        let trial = breaker.admit(later).unwrap();
        assert!(breaker.admit(later).is_none() && breaker.is_open(later + 10 * PAUSE));
        assert_eq!(breaker.ended(trial, Outcome::Answered, later), Turn::Closed);
        assert!(breaker.admit(later).is_some());
        assert_eq!(fail(&mut breaker, 2, later), Turn::None, "the count began anew");
    }

    #[test]
    fn a_failed_trial_opens_it_again() {
        let (mut breaker, now) = breaker();
        fail(&mut breaker, 3, now);
        let trial = breaker.admit(now + PAUSE).unwrap();
        assert_eq!(breaker.ended(trial, Outcome::Failed, now + PAUSE), Turn::None);
        assert!(breaker.admit(now + 2 * PAUSE - Duration::from_millis(1)).is_none());
        assert!(breaker.admit(now + 2 * PAUSE).is_some());
    }

    #[test]
    fn a_trial_that_was_given_up_leaves_its_place_to_the_next() {
        let (mut breaker, now) = breaker();
        fail(&mut breaker, 3, now);
        let trial = breaker.admit(now + PAUSE).unwrap();
        breaker.ended(trial, Outcome::Abandoned, now + PAUSE);
        let next = breaker.admit(now + PAUSE).unwrap();
        assert!(breaker.admit(now + PAUSE).is_none());
        assert_eq!(breaker.ended(next, Outcome::Answered, now + PAUSE), Turn::Closed);
    }

    #[test]
    fn what_was_asked_before_says_nothing_about_now() {
        let (mut breaker, now) = breaker();
        let [early, earlier, earliest] = [(); 3].map(|()| breaker.admit(now).unwrap());
        fail(&mut breaker, 3, now);
        assert_eq!(breaker.ended(earliest, Outcome::Answered, now), Turn::None);
        assert!(breaker.is_open(now), "a late answer does not close it");
        let trial = breaker.admit(now + PAUSE).unwrap();
        breaker.ended(earlier, Outcome::Failed, now + PAUSE);
        assert_eq!(breaker.ended(trial, Outcome::Answered, now + PAUSE), Turn::Closed);
        breaker.ended(early, Outcome::Failed, now + PAUSE);
        assert_eq!(fail(&mut breaker, 2, now + PAUSE), Turn::None, "nor does a late failure count");
    }
}
