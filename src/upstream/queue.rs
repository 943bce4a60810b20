//! Requests that wait because every server of their pool has as many as it may have: in order of rank and of arrival, each woken
//! when it is its turn to look for a server again. It must not know servers, nor how long a request may wait.
//!
//! No waiter is lost: it stands in the queue before it looks for a server, and whoever makes room, or leaves the queue for
//! whatever reason, wakes the next one after that.

use super::callers::CallerRank;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::task::Waker;

/// Outlives a reload, as the requests in it do.
#[derive(Default)]
pub(super) struct Queue {
    /// As many as are in line; read without the lock. The order of this and of what servers have is what no waiter gets lost by.
    waiting: AtomicUsize,
    line: Mutex<Line>,
}

#[derive(Default)]
struct Line {
    next_number: u64,
    waiting: BTreeMap<LinePosition, QueuedRequest>,
}

/// Those who ask less come first, and among equals those who came first.
type LinePosition = (CallerRank, u64);

struct QueuedRequest {
    /// A server failed it, which it does not try again: what it cannot use may be good for those behind it.
    is_repeat: bool,
    waker: Waker,
}

/// A place in the queue. It ends when this is dropped.
pub(super) struct QueuePlace {
    queue: Arc<Queue>,
    position: LinePosition,
}

/// What a request in the queue may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QueueTurn {
    /// Look for a server.
    Now,
    /// Wait for its waker.
    Later,
    /// Give up: the queue was full, and somebody came who asks less.
    Displaced,
}

impl Queue {
    pub(super) fn waiting(&self) -> usize {
        self.waiting.load(SeqCst)
    }

    /// `None`: so many are waiting already, of callers who ask no more.
    pub(super) fn enter(
        self: &Arc<Self>,
        most: usize,
        rank: CallerRank,
        is_repeat: bool,
        waker: &Waker,
    ) -> Option<QueuePlace> {
        let mut line = self.line.lock();
        if line.waiting.len() >= most && !line.displace(rank) {
            return None;
        }
        let position = (rank, line.next_number);
        line.next_number += 1;
        line.waiting.insert(position, QueuedRequest { is_repeat, waker: waker.clone() });
        self.waiting.store(line.waiting.len(), SeqCst);
        Some(QueuePlace { queue: Arc::clone(self), position })
    }

    /// There may be room: who is first looks again.
    pub(super) fn wake(&self) {
        if self.waiting() > 0 {
            self.line.lock().wake();
        }
    }
}

impl Line {
    fn wake(&self) {
        for request in self.waiting.values() {
            request.waker.wake_by_ref();
            if !request.is_repeat {
                return;
            }
        }
    }

    /// Takes the last one out who asks more. One that a server has had is left: it has waited before.
    fn displace(&mut self, rank: CallerRank) -> bool {
        let more = self.waiting.iter().rev().take_while(|((other, _), _)| *other > rank);
        let last = more.into_iter().find(|(_, request)| !request.is_repeat).map(|(position, _)| *position);
        let displaced = last.and_then(|position| self.waiting.remove(&position));
        displaced.is_some_and(|request| {
            request.waker.wake();
            true
        })
    }
}

impl QueuePlace {
    /// If it is later, the waker is called when that changes.
    pub(super) fn turn(&self, waker: &Waker) -> QueueTurn {
        let mut line = self.queue.line.lock();
        let Some(own) = line.waiting.get_mut(&self.position) else { return QueueTurn::Displaced };
        own.waker.clone_from(waker);
        match line.waiting.range(..self.position).all(|(_, ahead)| ahead.is_repeat) {
            true => QueueTurn::Now,
            false => QueueTurn::Later,
        }
    }
}

impl Drop for QueuePlace {
    fn drop(&mut self) {
        let mut line = self.queue.line.lock();
        line.waiting.remove(&self.position);
        self.queue.waiting.store(line.waiting.len(), SeqCst);
        line.wake();
    }
}
