//! How long each direction of an exchange may wait, with one timer for a whole connection. It must not know for what.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::time::Sleep;

/// Something that two directions of one task know of each other. They never run at once, so this costs what a plain field
/// does; an atomic one may move to another thread with its task.
#[derive(Debug, Default)]
pub(super) struct Flag(AtomicBool);

impl Flag {
    pub(super) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn set(&self, value: bool) {
        self.0.store(value, Ordering::Relaxed);
    }
}

/// The same, for a number.
#[derive(Debug, Default)]
pub(super) struct Count(AtomicU64);

impl Count {
    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    pub(super) fn add(&self, bytes: usize) {
        self.set(self.get() + bytes as u64);
    }
}

/// How long one direction may wait since it last got on. The clock is read only when it has to wait.
#[derive(Debug, Default)]
pub(super) struct Patience {
    /// In microseconds; 0: for ever.
    at_most: Count,
    /// In microseconds since the first instant, and one more; 0: it has not had to wait yet.
    since: Count,
}

impl Patience {
    /// A new wait begins.
    pub(super) fn begin(&self, at_most: Duration) {
        self.at_most.set(u64::try_from(at_most.as_micros()).unwrap_or(u64::MAX / 2).max(1));
        self.since.set(0);
    }

    /// The time up to now does not count.
    pub(super) fn rest(&self) {
        self.since.set(0);
    }

    /// What follows may take for ever.
    pub(super) fn end(&self) {
        self.at_most.set(0);
    }

    /// How long it has had to wait since the wait began.
    pub(super) fn waited(&self, first: Instant, now: impl FnOnce() -> Instant) -> Duration {
        match self.since.get() {
            0 => Duration::ZERO,
            since => now().saturating_duration_since(first).saturating_sub(Duration::from_micros(since)),
        }
    }

    /// The time up to then does not count.
    pub(super) fn rest_until(&self, first: Instant, then: Instant) {
        let then = u64::try_from(then.saturating_duration_since(first).as_micros()).unwrap_or(u64::MAX / 2) + 1;
        if self.since.get() > 0 {
            self.since.set(self.since.get().max(then));
        }
    }

    /// When the wait is over, counted from the first instant.
    pub(super) fn deadline(&self, first: Instant, now: impl FnOnce() -> Instant) -> Option<Instant> {
        let at_most = self.at_most.get();
        if at_most == 0 {
            return None;
        }
        if self.since.get() == 0 {
            let passed = now().saturating_duration_since(first).as_micros();
            self.since.set(u64::try_from(passed).unwrap_or(u64::MAX / 2) + 1);
        }
        Some(first + Duration::from_micros(self.since.get() + at_most))
    }
}

/// The least rate of a body, and how long it may come slower than that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodyRate {
    /// A second. `None`: any rate will do.
    pub bytes: Option<u64>,
    pub grace: Duration,
}

/// How long a sender may still be waited for: each byte that it sends buys the time that it may take at the least rate, and a
/// wait uses it up. What is not a wait costs nothing: neither the time in which nobody reads nor that in which bytes are there.
#[derive(Debug)]
pub(super) struct WaitCredit {
    rate: BodyRate,
    /// In microseconds.
    left: Count,
    most: u64,
}

impl WaitCredit {
    /// More than `most`, or than the grace, cannot be saved up.
    pub(super) fn new(rate: BodyRate, most: Duration) -> Self {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let credit = Self { rate, left: Count::default(), most: micros(most.max(rate.grace)) };
        credit.left.set(micros(rate.grace));
        credit
    }

    /// `None`: as long as it takes.
    pub(super) fn left(&self) -> Option<Duration> {
        self.rate.bytes.map(|_| Duration::from_micros(self.left.get()))
    }

    pub(super) fn received(&self, bytes: usize, waited: Duration) {
        let Some(rate) = self.rate.bytes else { return };
        let bought = (bytes as u64).saturating_mul(1_000_000) / rate.max(1);
        let waited = u64::try_from(waited.as_micros()).unwrap_or(u64::MAX);
        self.left.set(self.left.get().saturating_sub(waited).saturating_add(bought).min(self.most));
    }
}

/// One timer, armed anew only when it would fire too late. Deadlines mostly move on without it.
#[derive(Default)]
pub(super) struct Timer(Option<Pin<Box<Sleep>>>);

impl Timer {
    /// Ready when the deadline has passed.
    pub(super) fn poll_passed(&mut self, cx: &mut Context<'_>, deadline: Instant) -> Poll<()> {
        let at = tokio::time::Instant::from_std(deadline);
        let sleep = self.0.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
        if sleep.deadline() > at {
            sleep.as_mut().reset(at);
        }
        while sleep.as_mut().poll(cx).is_ready() {
            if sleep.deadline() >= at {
                // A timer that has fired must be armed before it is asked again.
                self.0 = None;
                return Poll::Ready(());
            }
            sleep.as_mut().reset(at);
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn credit(bytes: Option<u64>) -> WaitCredit {
        WaitCredit::new(BodyRate { bytes, grace: 20 * SECOND }, 60 * SECOND)
    }

    #[test]
    fn each_byte_buys_time_and_each_wait_uses_it_up() {
        let credit = credit(Some(500));
        assert_eq!(credit.left(), Some(20 * SECOND));
        // As fast as it has to be: for ever.
        (0..100).for_each(|_| credit.received(500, SECOND));
        assert_eq!(credit.left(), Some(20 * SECOND));
        // Half as fast: for twice the grace.
        (0..39).for_each(|_| credit.received(250, SECOND));
        assert_eq!(credit.left(), Some(SECOND / 2));
        credit.received(1, 2 * SECOND);
        assert_eq!(credit.left(), Some(Duration::from_millis(2)));
    }

    #[test]
    fn what_is_saved_up_is_bounded() {
        let saved = credit(Some(500));
        saved.received(1 << 40, Duration::ZERO);
        assert_eq!(saved.left(), Some(60 * SECOND));
        let long = WaitCredit::new(BodyRate { bytes: Some(1), grace: 600 * SECOND }, 60 * SECOND);
        long.received(1_000, Duration::ZERO);
        assert_eq!(long.left(), Some(600 * SECOND), "a longer grace is kept");
        let none = credit(None);
        none.received(0, 1_000 * SECOND);
        assert_eq!(none.left(), None);
    }

    #[test]
    fn only_the_wait_itself_is_measured() {
        let first = Instant::now();
        let at = |seconds: u32| first + seconds * SECOND;
        let patience = Patience::default();
        patience.begin(10 * SECOND);
        assert_eq!(patience.waited(first, || at(5)), Duration::ZERO, "it has not had to wait");
        // Times are kept in microseconds, and 0 stands for none.
        assert_eq!(patience.deadline(first, || at(5)).map(|end| end.duration_since(first).as_secs()), Some(15));
        assert_eq!(patience.waited(first, || at(8)).as_secs(), 2);
        patience.rest_until(first, at(7));
        assert_eq!(patience.waited(first, || at(8)).as_secs(), 0);
        assert_eq!(patience.deadline(first, || at(8)).map(|end| end.duration_since(first).as_secs()), Some(17));
        patience.rest_until(first, at(3));
        assert_eq!(
            patience.deadline(first, || at(8)).map(|end| end.duration_since(first).as_secs()),
            Some(17),
            "never back"
        );
    }
}
