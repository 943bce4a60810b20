//! Requests that wait because every server of their pool has as many as it may have: in order of arrival, each woken when it is
//! its turn to look for a server again. It must not know servers, nor how long a request may wait.
//!
//! No waiter is lost: it stands in the queue before it looks for a server, and whoever makes room, or leaves the queue for
//! whatever reason, wakes the next one after that.

use parking_lot::Mutex;
use std::collections::VecDeque;
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
    waiting: VecDeque<QueuedRequest>,
}

struct QueuedRequest {
    number: u64,
    /// A server failed it, which it does not try again: what it cannot use may be good for those behind it.
    is_repeat: bool,
    waker: Waker,
}

/// A place in the queue. It ends when this is dropped.
pub(super) struct QueuePlace {
    queue: Arc<Queue>,
    number: u64,
}

impl Queue {
    pub(super) fn waiting(&self) -> usize {
        self.waiting.load(SeqCst)
    }

    /// `None`: so many are waiting already.
    pub(super) fn enter(self: &Arc<Self>, most: usize, is_repeat: bool, waker: &Waker) -> Option<QueuePlace> {
        let mut line = self.line.lock();
        if line.waiting.len() >= most {
            return None;
        }
        let number = line.next_number;
        line.next_number += 1;
        line.waiting.push_back(QueuedRequest { number, is_repeat, waker: waker.clone() });
        self.waiting.store(line.waiting.len(), SeqCst);
        Some(QueuePlace { queue: Arc::clone(self), number })
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
        for request in &self.waiting {
            request.waker.wake_by_ref();
            if !request.is_repeat {
                return;
            }
        }
    }
}

impl QueuePlace {
    /// Whether it may look for a server. If not, the waker is called when it may.
    pub(super) fn is_its_turn(&self, waker: &Waker) -> bool {
        let mut line = self.queue.line.lock();
        let Ok(place) = line.waiting.binary_search_by_key(&self.number, |request| request.number) else { return true };
        line.waiting[place].waker.clone_from(waker);
        line.waiting.range(..place).all(|ahead| ahead.is_repeat)
    }
}

impl Drop for QueuePlace {
    fn drop(&mut self) {
        let mut line = self.queue.line.lock();
        if let Ok(place) = line.waiting.binary_search_by_key(&self.number, |request| request.number) {
            line.waiting.remove(place);
        }
        self.queue.waiting.store(line.waiting.len(), SeqCst);
        line.wake();
    }
}
