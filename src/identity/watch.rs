//! Who waits for changes of a token: exchanges that go on for longer than an answer of the cache is worth. It must not know
//! what changed, nor whether the token is valid.

use crate::store::credential::Digest;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use tokio::sync::{Notify, futures::Notified};

/// The tokens that are watched.
#[derive(Default)]
pub(super) struct TokenWatches(Mutex<HashMap<Digest, Arc<Notify>>>);

impl TokenWatches {
    pub(super) fn watch(self: &Arc<Self>, digest: &Digest) -> TokenWatch {
        let changed = Arc::clone(self.0.lock().entry(*digest).or_default());
        TokenWatch { all: Arc::clone(self), digest: *digest, changed }
    }

    /// One token may have changed.
    pub(super) fn changed(&self, digest: &Digest) {
        if let Some(changed) = self.0.lock().get(digest) {
            changed.notify_waiters();
        }
    }

    /// Any of them may have.
    pub(super) fn all_changed(&self) {
        self.0.lock().values().for_each(|changed| changed.notify_waiters());
    }
}

/// Tells of changes of one token.
pub struct TokenWatch {
    all: Arc<TokenWatches>,
    digest: Digest,
    changed: Arc<Notify>,
}

impl TokenWatch {
    /// Comes back when the token may have changed since this was called, once the future is enabled.
    pub fn changed(&self) -> Notified<'_> {
        self.changed.notified()
    }
}

impl Drop for TokenWatch {
    fn drop(&mut self) {
        let mut all = self.all.0.lock();
        // The map's own and this one: there is no other, as they are made under the lock.
        if Arc::strong_count(&self.changed) <= 2 {
            all.remove(&self.digest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::task::{Context, Waker};

    fn is_woken(future: std::pin::Pin<&mut Notified<'_>>) -> bool {
        future.poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn a_change_wakes_those_who_watch_that_token() {
        let all = Arc::new(TokenWatches::default());
        let (one, other) = (Digest::of(b"one"), Digest::of(b"other"));
        let (first, second, third) = (all.watch(&one), all.watch(&one), all.watch(&other));
        let (mut a, mut b, mut c) = (pin!(first.changed()), pin!(second.changed()), pin!(third.changed()));
        a.as_mut().enable();
        b.as_mut().enable();
        c.as_mut().enable();
        all.changed(&one);
        assert!(is_woken(a) && is_woken(b) && !is_woken(c.as_mut()));
        all.all_changed();
        assert!(is_woken(c));
    }

    #[test]
    fn a_token_that_nobody_watches_takes_no_memory() {
        let all = Arc::new(TokenWatches::default());
        let digest = Digest::of(b"one");
        let (first, second) = (all.watch(&digest), all.watch(&digest));
        drop(first);
        assert_eq!(all.0.lock().len(), 1);
        drop(second);
        assert!(all.0.lock().is_empty());
    }
}
