//! Notices changes of a SQLite database, whoever makes them, and a file that was replaced; keeps this gateway in the
//! database's register.

use super::super::feed::{Begun, ChangeSource, Coverage, Inbox, Loss, Message, Pace, Subscription};
use super::super::{Change, Mark, Named, StoreError, replica_name};
use super::{Question, Replica, SqliteStore, inode, last_seq, mark, open_existing, time_of};
use crate::store::credential::Digest;
use async_trait::async_trait;
use parking_lot::Mutex;
use rusqlite::Connection;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;
use tokio::sync::oneshot;

/// How often a running gateway asks whether anything changed; bounds the time that a revoked token still works.
const POLL: Duration = Duration::from_millis(100);
/// How often a gateway says that it is there.
const HEARTBEAT: Duration = Duration::from_secs(3);

pub(super) struct SqliteChanges<'a> {
    store: &'a SqliteStore,
    watcher: Arc<Mutex<Watcher>>,
    replica: Replica,
}

impl<'a> SqliteChanges<'a> {
    pub(super) fn of(store: &'a SqliteStore) -> Self {
        let replica = Replica { id: format!("{:016x}", fastrand::u64(..)), name: replica_name() };
        let watcher = Watcher { path: store.path.clone(), opened: None };
        Self { store, watcher: Arc::new(Mutex::new(watcher)), replica }
    }
}

#[async_trait]
impl<'a> ChangeSource for SqliteChanges<'a> {
    type Subscription = Watched<'a>;

    fn label(&self) -> String {
        self.store.path.display().to_string()
    }

    fn pace(&self) -> Pace {
        // A look waits for a disk, or for a lock.
        Pace { beat: POLL, silence: None, upkeep: Some(HEARTBEAT) }
    }

    async fn begin(&mut self, inbox: Inbox<i64>) -> Result<Begun<Watched<'a>>, Loss> {
        let (seq, mark) = on_watcher(&self.watcher, Watcher::begin).await?;
        // All that was written before counts as taken in.
        inbox.put(Message::Wait(seq));
        let watched = Watched {
            store: self.store,
            watcher: Arc::clone(&self.watcher),
            replica: self.replica.clone(),
            inbox,
            applied: AtomicI64::new(0),
            registered: AtomicBool::new(true),
        };
        Ok(Begun { mark: Some(mark), ..Begun::new(watched) })
    }

    fn sign_off(&mut self) {
        if self.store.is_unregistered.load(Ordering::Relaxed) {
            return;
        }
        // With a full queue it counts as gone after a while, as a process does that is killed.
        let _ = self.store.writes.try_send(Question::Gone(self.replica.clone()));
    }
}

pub(super) struct Watched<'a> {
    store: &'a SqliteStore,
    watcher: Arc<Mutex<Watcher>>,
    replica: Replica,
    inbox: Inbox<i64>,
    /// The number of the last change that has taken effect.
    applied: AtomicI64,
    /// Whether the register took the last entry.
    registered: AtomicBool,
}

impl Watched<'_> {
    /// Says in the register that this gateway is there, and how far it has taken in changes.
    async fn register(&self) {
        if self.store.is_unregistered.load(Ordering::Relaxed) {
            return;
        }
        let (reply, answer) = oneshot::channel();
        let applied = self.applied.load(Ordering::Relaxed);
        let entered = self.store.ask(Question::Alive(self.replica.clone(), applied, reply), answer).await;
        let before = self.registered.swap(entered.is_ok(), Ordering::Relaxed);
        if let Err(error) = entered
            && before
        {
            log::warn!("`token revoke --wait` can't see this gateway: {error}");
        }
    }
}

#[async_trait]
impl Subscription for Watched<'_> {
    /// The number of a change.
    type Wait = i64;

    async fn beat(&self) -> Result<Option<Mark>, Loss> {
        let Looked { everything, changes, seq, mark } = on_watcher(&self.watcher, Watcher::look).await?;
        if everything || !changes.is_empty() {
            self.inbox.put(if everything { Message::Everything } else { Message::Changed(changes) });
            self.inbox.put(Message::Wait(seq));
        }
        Ok(Some(mark))
    }

    async fn upkeep(&self) -> Result<Option<Coverage>, Loss> {
        self.register().await;
        Ok(None)
    }

    async fn confirm(&self, waits: &mut Vec<i64>) -> Result<(), Loss> {
        if let Some(last) = waits.drain(..).max() {
            self.applied.fetch_max(last, Ordering::Relaxed);
        }
        // What the register does not take now, it is told with the next heartbeat.
        self.register().await;
        Ok(())
    }
}

/// SQLite blocks, and so may the disk.
async fn on_watcher<T: Send + 'static>(
    watcher: &Arc<Mutex<Watcher>>,
    work: fn(&mut Watcher) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let watcher = Arc::clone(watcher);
    let done = tokio::task::spawn_blocking(move || work(&mut watcher.lock())).await;
    done.unwrap_or_else(|error| Err(StoreError::Unavailable(format!("it was not looked at: {error}"))))
}

/// Notices what others write. `PRAGMA data_version` costs a read of shared memory while nothing happens.
struct Watcher {
    path: PathBuf,
    opened: Option<Opened>,
}

/// What a look found.
struct Looked {
    everything: bool,
    changes: Vec<Change>,
    /// The number of the last change, and its mark.
    seq: i64,
    mark: Mark,
}

struct Opened {
    db: Connection,
    inode: u64,
    data_version: i64,
    seq: i64,
    /// Of the change with this number, if it is still there.
    at_ms: Option<i64>,
}

fn gone() -> StoreError {
    StoreError::Unavailable("the file is gone".into())
}

impl Watcher {
    /// Opens the file that is there now. Returns the number of its last change, and its mark: what happened before is
    /// unknown.
    fn begin(&mut self) -> Result<(i64, Mark), StoreError> {
        self.opened = None;
        let Some(inode) = inode(&self.path) else { return Err(gone()) };
        let db = open_existing(&self.path)?;
        let opened = Opened::at_end(db, inode)?;
        let opened = self.opened.insert(opened);
        Ok((opened.seq, mark(opened.seq, opened.at_ms)))
    }

    fn look(&mut self) -> Result<Looked, StoreError> {
        let (everything, changes) = match &mut self.opened {
            // What is read from a file that was replaced is no longer the store.
            Some(opened) if inode(&self.path) == Some(opened.inode) => match opened.look()? {
                Some(changes) => (false, changes),
                None => (true, Vec::new()),
            },
            _ => self.begin().map(|_| (true, Vec::new()))?,
        };
        let opened = self.opened.as_ref().ok_or_else(gone)?;
        Ok(Looked { everything, changes, seq: opened.seq, mark: mark(opened.seq, opened.at_ms) })
    }
}

impl Opened {
    fn at_end(db: Connection, inode: u64) -> rusqlite::Result<Self> {
        let (data_version, seq) = (data_version(&db)?, last_seq(&db)?);
        let at_ms = time_of(&db, seq)?;
        Ok(Self { db, inode, data_version, seq, at_ms })
    }

    /// What changed since the last look. `None`: that is unknown, because the list of changes does not go back so far.
    fn look(&mut self) -> rusqlite::Result<Option<Vec<Change>>> {
        let version = data_version(&self.db)?;
        if version == self.data_version {
            return Ok(Some(Vec::new()));
        }
        self.data_version = version;
        let first: Option<i64> = self.db.query_row("SELECT min(seq) FROM change", [], |row| row.get(0))?;
        if first.is_some_and(|first| first > self.seq + 1) {
            self.seq = last_seq(&self.db)?;
            self.at_ms = time_of(&self.db, self.seq)?;
            return Ok(None);
        }
        let mut query = self.db.prepare_cached("SELECT seq, digest, at_ms FROM change WHERE seq > ?1 ORDER BY seq")?;
        let rows =
            query.query_map([self.seq], |row| Ok((row.get::<_, i64>(0)?, row.get(1)?, row.get::<_, i64>(2)?)))?;
        let mut changes = Vec::new();
        for row in rows {
            let (seq, digest, at_ms) = row?;
            (self.seq, self.at_ms) = (seq, Some(at_ms));
            let token = Named::Token(Digest::from_bytes(digest));
            changes.push(Change { token, at_ms: u64::try_from(at_ms).unwrap_or(0) });
        }
        Ok(Some(changes))
    }
}

fn data_version(db: &Connection) -> rusqlite::Result<i64> {
    db.pragma_query_value(None, "data_version", |row| row.get(0))
}
