//! Notices changes of a SQLite database, whoever makes them, and a file that was replaced.

use super::{Noticed, inode, last_seq, mark, open_existing, time_of};
use crate::store::credential::Digest;
use crate::store::{Change, Event, Named};
use rusqlite::Connection;
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::mpsc;

/// How often a running gateway asks whether anything changed; bounds the time that a revoked token still works.
const POLL: Duration = Duration::from_millis(100);

/// Notices what others write. `PRAGMA data_version` costs a read of shared memory while nothing happens.
pub(super) struct Watcher {
    path: PathBuf,
    db: Option<Connection>,
    inode: Option<u64>,
    data_version: i64,
    seq: i64,
    /// Of the change with this number, if it is still there.
    at_ms: Option<i64>,
}

impl Watcher {
    pub(super) fn new(path: PathBuf, db: Connection) -> rusqlite::Result<Self> {
        let (data_version, seq) = (data_version(&db)?, last_seq(&db)?);
        let at_ms = time_of(&db, seq)?;
        let inode = inode(&path);
        Ok(Self { path, db: Some(db), inode, data_version, seq, at_ms })
    }

    pub(super) fn watch(mut self, told: &mpsc::Sender<Noticed>) {
        // The first look is for all that was written before, so that its number can be confirmed.
        if told.blocking_send((Event::Hearing, self.seq)).is_err() {
            return;
        }
        // Looked at right away, so that a gateway that ends soon leaves a snapshot with a mark.
        loop {
            let asked_ms = crate::clock::now().mono_ms;
            let changes = match &self.db {
                // What is read from a file that was replaced is no longer the store.
                Some(_) if inode(&self.path) == self.inode => self.look(),
                _ => self.reopen(),
            };
            let looked = changes.is_ok();
            let event = changes.unwrap_or_else(|error| {
                let lost = self.db.take().is_some();
                if lost {
                    log::error!("{}: changes can't be followed, trying again: {error}", self.path.display());
                }
                lost.then_some(Event::Deaf)
            });
            if let Some(event) = event
                && told.blocking_send((event, self.seq)).is_err()
            {
                return;
            }
            if looked {
                // With no room for it the next one will do.
                drop(told.try_send((Event::Alive { asked_ms, mark: Some(mark(self.seq, self.at_ms)) }, self.seq)));
            }
            std::thread::sleep(POLL);
            if told.is_closed() {
                return;
            }
        }
    }

    fn look(&mut self) -> Result<Option<Event>, String> {
        let Some(db) = &self.db else { return Ok(None) };
        let text = |error: rusqlite::Error| error.to_string();
        let version = data_version(db).map_err(text)?;
        if version == self.data_version {
            return Ok(None);
        }
        self.data_version = version;
        let first: Option<i64> = db.query_row("SELECT min(seq) FROM change", [], |row| row.get(0)).map_err(text)?;
        if first.is_some_and(|first| first > self.seq + 1) {
            self.seq = last_seq(db).map_err(text)?;
            self.at_ms = time_of(db, self.seq).map_err(text)?;
            return Ok(Some(Event::Hearing));
        }
        let mut query =
            db.prepare_cached("SELECT seq, digest, at_ms FROM change WHERE seq > ?1 ORDER BY seq").map_err(text)?;
        let rows = query
            .query_map([self.seq], |row| Ok((row.get::<_, i64>(0)?, row.get(1)?, row.get::<_, i64>(2)?)))
            .map_err(text)?;
        let mut tokens = Vec::new();
        for row in rows {
            let (seq, digest, at_ms) = row.map_err(text)?;
            (self.seq, self.at_ms) = (seq, Some(at_ms));
            let token = Named::Token(Digest::from_bytes(digest));
            tokens.push(Change { token, at_ms: u64::try_from(at_ms).unwrap_or(0) });
        }
        Ok(if tokens.is_empty() { None } else { Some(Event::Changed(tokens)) })
    }

    /// Another file, or the same one after an error: whatever happened meanwhile was missed.
    fn reopen(&mut self) -> Result<Option<Event>, String> {
        let Some(inode) = inode(&self.path) else { return Err("the file is gone".into()) };
        let db = open_existing(&self.path)?;
        let fresh = Self::new(self.path.clone(), db).map_err(|error| error.to_string())?;
        *self = Self { inode: Some(inode), ..fresh };
        Ok(Some(Event::Hearing))
    }
}

fn data_version(db: &Connection) -> rusqlite::Result<i64> {
    db.pragma_query_value(None, "data_version", |row| row.get(0))
}
