//! Changes of the file: each beat looks whether it changed, and takes it in if so.

use super::super::Mark;
use super::super::feed::{Begun, ChangeSource, Inbox, Loss, Message, Pace, Subscription};
use super::{FileStore, POLL};
use async_trait::async_trait;
use std::convert::Infallible;

pub(super) struct FileChanges<'a>(pub(super) &'a FileStore);

#[async_trait]
impl<'a> ChangeSource for FileChanges<'a> {
    type Subscription = Looks<'a>;

    fn label(&self) -> String {
        self.0.path.display().to_string()
    }

    fn pace(&self) -> Pace {
        // A big file takes its time to be read.
        Pace { beat: POLL, silence: None, upkeep: None }
    }

    async fn begin(&mut self, inbox: Inbox<Infallible>) -> Result<Begun<Looks<'a>>, Loss> {
        Ok(Begun::new(Looks { store: self.0, inbox }))
    }
}

pub(super) struct Looks<'a> {
    store: &'a FileStore,
    inbox: Inbox<Infallible>,
}

#[async_trait]
impl Subscription for Looks<'_> {
    /// Nobody can be waited for: the file keeps no register.
    type Wait = Infallible;

    async fn beat(&self) -> Result<Option<Mark>, Loss> {
        self.store.look().await;
        let changes = std::mem::take(&mut *self.store.untold.lock());
        if !changes.is_empty() {
            self.inbox.put(Message::Changed(changes));
        }
        Ok(None)
    }
}
