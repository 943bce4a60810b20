//! The embedded store: one SQLite file, made on first use, shared between the running gateway and the command line.
//! Every change of a record leaves a row in `change`, by trigger, so that a running gateway sees it whoever made it.

mod admin;
mod follow;
mod look;

pub use admin::SqliteAdmin;
pub(super) use look::unusable;

use super::record::{self, RecordField, RecordSource, Unsaid};
use super::{Heard, LookupLimits, Mark, StoreError, TokenRecord, TokenStore, feed};
use crate::problem::Problem;
use crate::store::credential::{Credential, Digest};
use async_trait::async_trait;
use rusqlite::types::Type;
use rusqlite::{Connection, OpenFlags, OptionalExtension as _, Row, params};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;
use tokio::sync::oneshot;

/// What `PRAGMA user_version` says of a database that this version made.
const SCHEMA_VERSION: i64 = MIGRATIONS.len() as i64;
/// Lookups that may wait for a reader.
const QUEUE: usize = 1_024;
/// Writes that may wait: last uses in slices, and signs of life.
const WRITE_QUEUE: usize = 16;
/// SQLite reads of one row take microseconds; two threads keep one slow page from holding up the rest.
const READERS: usize = 2;
/// Of more tokens than this it is not told which of them changed behind a mark: looking up all is no dearer then.
const MOST_TOLD: usize = 100_000;
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);

/// Each takes a database from the version of its place to the next.
const MIGRATIONS: [&str; 3] = [SCHEMA, ROTATION_AND_REPLICAS, TERMS];

const SCHEMA: &str = "
    CREATE TABLE token (
        digest      BLOB PRIMARY KEY CHECK (length(digest) = 32),
        user        TEXT NOT NULL,
        scopes      TEXT NOT NULL DEFAULT '',
        description TEXT NOT NULL DEFAULT '',
        created     INTEGER NOT NULL,
        expires     INTEGER,
        revoked     INTEGER,
        last_used   INTEGER
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE change (
        seq    INTEGER PRIMARY KEY AUTOINCREMENT,
        digest BLOB NOT NULL,
        at_ms  INTEGER NOT NULL DEFAULT (CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER))
    ) STRICT;
    CREATE TRIGGER token_added AFTER INSERT ON token BEGIN INSERT INTO change (digest) VALUES (new.digest); END;
    CREATE TRIGGER token_removed AFTER DELETE ON token BEGIN INSERT INTO change (digest) VALUES (old.digest); END;
    CREATE TRIGGER token_altered AFTER UPDATE OF digest, user, scopes, expires, revoked ON token BEGIN
        INSERT INTO change (digest) VALUES (old.digest);
        INSERT INTO change (digest) SELECT new.digest WHERE new.digest <> old.digest;
    END;
";

const ROTATION_AND_REPLICAS: &str = "
    ALTER TABLE token ADD COLUMN not_before INTEGER;
    ALTER TABLE token ADD COLUMN blocked INTEGER NOT NULL DEFAULT 0 CHECK (blocked IN (0, 1));
    ALTER TABLE token ADD COLUMN superseded INTEGER;
    ALTER TABLE token ADD COLUMN replaces BLOB CHECK (replaces IS NULL OR length(replaces) = 32);
    CREATE INDEX token_user ON token (user);
    DROP TRIGGER token_altered;
    CREATE TRIGGER token_altered
        AFTER UPDATE OF digest, user, scopes, not_before, expires, revoked, blocked, superseded, replaces ON token BEGIN
        INSERT INTO change (digest) VALUES (old.digest);
        INSERT INTO change (digest) SELECT new.digest WHERE new.digest <> old.digest;
    END;
    CREATE TABLE replica (
        id      TEXT PRIMARY KEY,
        name    TEXT NOT NULL,
        applied INTEGER NOT NULL,
        seen_ms INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
";

const TERMS: &str = "
    ALTER TABLE token ADD COLUMN plan TEXT NOT NULL DEFAULT '';
    ALTER TABLE token ADD COLUMN rate TEXT NOT NULL DEFAULT '';
    ALTER TABLE token ADD COLUMN networks TEXT NOT NULL DEFAULT '';
    ALTER TABLE token ADD COLUMN methods TEXT NOT NULL DEFAULT '';
    DROP TRIGGER token_altered;
    CREATE TRIGGER token_altered
        AFTER UPDATE OF digest, user, scopes, not_before, expires, revoked, blocked, superseded, replaces, plan, rate,
            networks, methods ON token BEGIN
        INSERT INTO change (digest) VALUES (old.digest);
        INSERT INTO change (digest) SELECT new.digest WHERE new.digest <> old.digest;
    END;
";

/// The digest, and the fields of a record in their order.
const COLUMNS: &str = "digest, user, scopes, description, created, not_before, expires, revoked, blocked, superseded, \
                       replaces, last_used, plan, rate, networks, methods";

/// Now, by the clock that `change` is written with.
const NOW_MS: &str = "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)";

/// Opens the database, making it when it is not there.
pub fn open(path: &Path) -> Result<Connection, DatabaseError> {
    let failed = |why| DatabaseError { path: path.into(), why };
    if !path.exists() {
        // Made with the mode that it keeps: nobody else may ever read it.
        let made = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        if let Err(error) = made
            && error.kind() != std::io::ErrorKind::AlreadyExists
        {
            return Err(failed(error.into()));
        }
    }
    let mut db = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)
        .map_err(|error| failed(error.into()))?;
    prepare(&mut db).map_err(failed)?;
    Ok(db)
}

/// Opens a database that must be there and ours. A running gateway never makes one: an empty file that a broken restore
/// or a full disk leaves in its place is no store without tokens, but one that can't tell.
fn open_existing(path: &Path) -> Result<Connection, DatabaseError> {
    let opened = || {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let db = Connection::open_with_flags(path, flags)?;
        db.busy_timeout(BUSY_TIMEOUT)?;
        no_temporary_files(&db)?;
        // What a gateway writes, last uses and signs of life, may be lost with the power.
        db.pragma_update(None, "synchronous", "normal")?;
        match db.pragma_query_value(None, "user_version", |row| row.get(0))? {
            SCHEMA_VERSION => Ok(db),
            other => Err(Unusable::Version(other)),
        }
    };
    opened().map_err(|why| DatabaseError { path: path.into(), why })
}

/// A database that cannot be used, and why.
#[derive(Debug, thiserror::Error)]
#[error("{}: {why}", path.display())]
pub struct DatabaseError {
    path: PathBuf,
    why: Unusable,
}

impl DatabaseError {
    pub(super) fn problem(&self) -> Problem {
        let instead = "name a database that tollgate may write to, or a file that it may create";
        Problem::error("path", self.to_string(), instead)
    }
}

impl From<DatabaseError> for StoreError {
    fn from(error: DatabaseError) -> Self {
        Self::Unavailable(error.to_string())
    }
}

#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Sql(#[from] rusqlite::Error),
    #[error("made by a newer tollgate (schema {0}, this one knows {SCHEMA_VERSION})")]
    Newer(i64),
    #[error("schema {0} where {SCHEMA_VERSION} is needed")]
    Version(i64),
    #[error("the file is gone")]
    Gone,
    #[error("is a folder")]
    Folder,
    #[error("is not an SQLite database")]
    Foreign,
    /// It cannot be written to, or not be made.
    #[error("{0}")]
    NotWritable(String),
    #[error("no thread: {0}")]
    Thread(std::io::Error),
}

/// What does not fit into a page cache stays in memory: there may be no folder for anything else.
fn no_temporary_files(db: &Connection) -> rusqlite::Result<()> {
    db.pragma_update(None, "temp_store", "memory")
}

fn prepare(db: &mut Connection) -> Result<(), Unusable> {
    db.busy_timeout(BUSY_TIMEOUT)?;
    no_temporary_files(db)?;
    db.pragma_update(None, "journal_mode", "wal")?;
    // A revocation that was reported as done must survive a power cut.
    db.pragma_update(None, "synchronous", "full")?;
    let transaction = db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    let version: i64 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if version > SCHEMA_VERSION {
        return Err(Unusable::Newer(version));
    }
    for migration in MIGRATIONS.iter().skip(usize::try_from(version).unwrap_or(0)) {
        transaction.execute_batch(migration)?;
    }
    transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    transaction.commit()?;
    Ok(())
}

/// Reads [`COLUMNS`].
fn record(row: &Row<'_>) -> rusqlite::Result<TokenRecord> {
    record::read(Digest::from_bytes(row.get(0)?), row, &Unsaid::NOTHING)
}

impl RecordSource for Row<'_> {
    type Error = rusqlite::Error;

    fn text(&self, field: RecordField) -> rusqlite::Result<Option<String>> {
        self.get(field.column())
    }

    fn words(&self, field: RecordField) -> rusqlite::Result<Option<Vec<String>>> {
        let text = self.text(field)?;
        Ok(text.map(|text| text.split_whitespace().map(str::to_owned).collect()))
    }

    fn time(&self, field: RecordField) -> rusqlite::Result<Option<u64>> {
        let seconds: Option<i64> = self.get(field.column())?;
        Ok(seconds.map(|seconds| u64::try_from(seconds).unwrap_or(0)))
    }

    fn flag(&self, field: RecordField) -> rusqlite::Result<Option<bool>> {
        self.get(field.column())
    }

    fn digest(&self, field: RecordField) -> rusqlite::Result<Option<Digest>> {
        Ok(self.get::<_, Option<[u8; 32]>>(field.column())?.map(Digest::from_bytes))
    }

    fn wrong(&self, field: RecordField, what: &'static str) -> rusqlite::Error {
        let why = format!("{}: {what}", field.name()).into();
        rusqlite::Error::FromSqlConversionFailure(field.column(), Type::Text, why)
    }

    fn missing(&self, field: RecordField) -> rusqlite::Error {
        rusqlite::Error::InvalidColumnType(field.column(), field.name().into(), Type::Null)
    }
}

/// The store of a running gateway: a few threads of its own, because SQLite blocks.
pub struct SqliteStore {
    path: PathBuf,
    questions: SyncSender<Question>,
    /// What is written has a thread of its own: one that waits for the lock of a writer keeps no lookup waiting.
    writes: SyncSender<Question>,
    is_unregistered: AtomicBool,
}

/// This process in the register of gateways.
#[derive(Clone)]
struct Replica {
    id: String,
    name: String,
}

enum Question {
    Lookup(Digest, oneshot::Sender<Result<Option<TokenRecord>, StoreError>>),
    NoteUses(Vec<(Digest, u64)>, oneshot::Sender<Result<(), StoreError>>),
    ChangedSince(Mark, oneshot::Sender<Result<Option<Vec<Digest>>, StoreError>>),
    /// This gateway ends: nobody need wait for it.
    Gone(Replica),
    /// This gateway is there, and has taken in changes up to a number.
    Alive(Replica, i64, oneshot::Sender<Result<(), StoreError>>),
}

impl SqliteStore {
    pub fn start(path: &Path) -> Result<Self, DatabaseError> {
        // Made or brought up to date here, where somebody sees what is wrong: whoever opens it later wants it to be there.
        open(path)?;
        let serving = |queue: usize, threads: std::ops::Range<usize>| -> Result<_, DatabaseError> {
            let (questions, inbox) = sync_channel(queue);
            let inbox = std::sync::Arc::new(parking_lot::Mutex::new(inbox));
            for index in threads {
                let reader = Reader { path: path.into(), db: None };
                let inbox = std::sync::Arc::clone(&inbox);
                spawn(&format!("sqlite-{index}"), move || reader.serve(&inbox))
                    .map_err(|error| DatabaseError { path: path.into(), why: Unusable::Thread(error) })?;
            }
            Ok(questions)
        };
        let (questions, writes) = (serving(QUEUE, 0..READERS)?, serving(WRITE_QUEUE, READERS..READERS + 1)?);
        Ok(Self { path: path.into(), questions, writes, is_unregistered: AtomicBool::new(false) })
    }

    async fn ask<T>(
        &self,
        question: Question,
        answer: oneshot::Receiver<Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let thread = match question {
            Question::Lookup(..) | Question::ChangedSince(..) => &self.questions,
            Question::NoteUses(..) | Question::Alive(..) | Question::Gone(..) => &self.writes,
        };
        thread.try_send(question).map_err(|error| match error {
            TrySendError::Full(_) => StoreError::Overloaded,
            TrySendError::Disconnected(_) => StoreError::Unavailable("its threads have ended".into()),
        })?;
        answer.await.unwrap_or_else(|_| Err(StoreError::Unavailable("its thread gave up".into())))
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new().name(name.into()).spawn(work).map(drop)
}

#[async_trait]
impl TokenStore for SqliteStore {
    fn lookup_limits(&self) -> LookupLimits {
        LookupLimits { at_once: 2 * READERS, tokens: QUEUE / (4 * READERS) }
    }

    async fn lookup(&self, credential: &Credential) -> Result<Option<TokenRecord>, StoreError> {
        let (reply, answer) = oneshot::channel();
        self.ask(Question::Lookup(*credential.digest(), reply), answer).await
    }

    fn tells_changes(&self) -> bool {
        true
    }

    fn stay_unregistered(&self) {
        self.is_unregistered.store(true, Ordering::Relaxed);
    }

    async fn follow(&self, heard: Heard<'_>) {
        feed::follow(follow::SqliteChanges::of(self), crate::clock::now, heard).await;
    }

    async fn changed_since(&self, mark: &str) -> Result<Option<Vec<Digest>>, StoreError> {
        let (reply, answer) = oneshot::channel();
        self.ask(Question::ChangedSince(mark.into(), reply), answer).await
    }

    async fn note_uses(&self, uses: Vec<(Digest, u64)>) -> Result<(), StoreError> {
        let (reply, answer) = oneshot::channel();
        self.ask(Question::NoteUses(uses, reply), answer).await
    }
}

/// Answers questions on a connection of its own, which it opens anew after any error.
struct Reader {
    path: PathBuf,
    db: Option<(Connection, u64)>,
}

impl Reader {
    fn serve(mut self, inbox: &parking_lot::Mutex<Receiver<Question>>) {
        loop {
            let question = inbox.lock().recv();
            match question {
                Ok(Question::Lookup(digest, reply)) => {
                    // Nobody waits any more when the send fails.
                    let _ = reply.send(self.run(|db| lookup(db, &digest)));
                }
                Ok(Question::NoteUses(uses, reply)) => {
                    let _ = reply.send(self.run(|db| note_uses(db, &uses)));
                }
                Ok(Question::ChangedSince(since, reply)) => {
                    let _ = reply.send(self.run(|db| changed_since(db, &since)));
                }
                Ok(Question::Gone(replica)) => {
                    // It counts as gone after a while anyway.
                    let _ = self.run(|db| gone(db, &replica));
                }
                Ok(Question::Alive(replica, applied, reply)) => {
                    let _ = reply.send(self.run(|db| alive(db, &replica, applied)));
                }
                Err(_) => return,
            }
        }
    }

    fn run<T>(&mut self, work: impl FnOnce(&mut Connection) -> rusqlite::Result<T>) -> Result<T, StoreError> {
        let inode = inode(&self.path);
        let (mut db, opened) = match self.db.take() {
            // The file was replaced or removed: what this connection reads is no longer the store.
            Some((db, opened)) if Some(opened) == inode => (db, opened),
            _ => match inode {
                Some(inode) => (open_existing(&self.path)?, inode),
                None => return Err(DatabaseError { path: self.path.clone(), why: Unusable::Gone }.into()),
            },
        };
        let result = work(&mut db).map_err(StoreError::from);
        if result.is_ok() {
            self.db = Some((db, opened));
        }
        result
    }
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        match error {
            rusqlite::Error::FromSqlConversionFailure(..) | rusqlite::Error::InvalidColumnType(..) => {
                Self::Garbage(error.to_string())
            }
            error => Self::Unavailable(error.to_string()),
        }
    }
}

fn inode(path: &Path) -> Option<u64> {
    std::fs::metadata(path).ok().map(|meta| meta.ino())
}

fn lookup(db: &Connection, digest: &Digest) -> rusqlite::Result<Option<TokenRecord>> {
    db.prepare_cached(&format!("SELECT {COLUMNS} FROM token WHERE digest = ?1"))?
        .query_row([digest.as_bytes()], record)
        .optional()
}

fn note_uses(db: &mut Connection, uses: &[(Digest, u64)]) -> rusqlite::Result<()> {
    let transaction = db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    {
        let mut update = transaction.prepare_cached(
            "UPDATE token SET last_used = ?2 WHERE digest = ?1 AND (last_used IS NULL OR last_used < ?2)",
        )?;
        for (digest, at) in uses {
            update.execute(params![digest.as_bytes(), (at / 1000) as i64])?;
        }
    }
    transaction.commit()
}

/// A mark is the number of a change, and its time, so that it is known again: a database from a backup counts its own.
fn mark(seq: i64, at_ms: Option<i64>) -> Mark {
    at_ms.map_or_else(|| format!("{seq}"), |at_ms| format!("{seq} {at_ms}"))
}

fn time_of(db: &Connection, seq: i64) -> rusqlite::Result<Option<i64>> {
    db.query_row("SELECT at_ms FROM change WHERE seq = ?1", [seq], |row| row.get(0)).optional()
}

/// `None` when the list does not go back so far, or is another one.
fn changed_since(db: &mut Connection, mark: &str) -> rusqlite::Result<Option<Vec<Digest>>> {
    let mut numbers = mark.split(' ').map(str::parse::<i64>);
    let (Some(Ok(seq)), at_ms) = (numbers.next(), numbers.next().and_then(Result::ok)) else { return Ok(None) };
    // One state of the database for all questions.
    let db = db.transaction()?;
    let whole = match time_of(&db, seq)? {
        Some(found) => at_ms == Some(found),
        // Its row was dropped, or never there: nothing may be missing behind it.
        None => {
            let next: Option<i64> =
                db.query_row("SELECT min(seq) FROM change WHERE seq > ?1", [seq], |row| row.get(0))?;
            next.map_or(last_seq(&db)? == seq, |next| next == seq + 1)
        }
    };
    if !whole {
        return Ok(None);
    }
    let mut query = db.prepare_cached("SELECT DISTINCT digest FROM change WHERE seq > ?1 LIMIT ?2")?;
    let most = i64::try_from(MOST_TOLD).unwrap_or(i64::MAX) + 1;
    let digests = query.query_map([seq, most], |row| Ok(Digest::from_bytes(row.get(0)?)))?;
    let digests: Vec<_> = digests.collect::<Result<_, _>>()?;
    Ok((digests.len() <= MOST_TOLD).then_some(digests))
}

fn alive(db: &mut Connection, replica: &Replica, applied: i64) -> rusqlite::Result<()> {
    let sql = format!(
        "INSERT INTO replica (id, name, applied, seen_ms) VALUES (?1, ?2, ?3, {NOW_MS})
         ON CONFLICT (id) DO UPDATE SET applied = max(applied, excluded.applied), seen_ms = excluded.seen_ms"
    );
    db.prepare_cached(&sql)?.execute(params![replica.id, replica.name, applied]).map(drop)
}

fn gone(db: &mut Connection, replica: &Replica) -> rusqlite::Result<()> {
    db.prepare_cached("DELETE FROM replica WHERE id = ?1")?.execute([&replica.id]).map(drop)
}

/// The highest number ever given, also when the rows are gone.
fn last_seq(db: &Connection) -> rusqlite::Result<i64> {
    let seq = db.query_row("SELECT seq FROM sqlite_sequence WHERE name = 'change'", [], |row| row.get(0)).optional()?;
    Ok(seq.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use landlock::{
        ABI, Access as _, AccessFs, PathBeneath, PathFd, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _,
    };

    /// In a sandbox, and in a container whose root cannot be written to, there is no place for one.
    #[test]
    fn a_long_list_of_changes_needs_no_temporary_file() {
        const CHANGES: usize = MOST_TOLD - 1;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.db");
        let db = open(&path).unwrap();
        let many = "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < ?1)
                    INSERT INTO change (digest) SELECT randomblob(32) FROM n";
        db.execute(many, [i64::try_from(CHANGES).unwrap()]).unwrap();
        drop(db);
        // Landlock holds for the thread that enters.
        let told = std::thread::spawn(move || {
            let all = AccessFs::from_all(ABI::V5);
            let ruleset = Ruleset::default().handle_access(all).unwrap().create().unwrap();
            let own = PathBeneath::new(PathFd::new(folder.path()).unwrap(), all);
            ruleset.add_rule(own).unwrap().restrict_self().unwrap();
            let mut db = open_existing(&path).unwrap();
            changed_since(&mut db, "0").map(|digests| digests.map(|digests| digests.len()))
        });
        assert_eq!(told.join().unwrap().unwrap(), Some(CHANGES));
    }
}
