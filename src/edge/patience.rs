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
