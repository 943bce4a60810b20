//! The embedded store: one SQLite file, made on first use, shared between the running gateway and the command line.
//! Every change of a record leaves a row in `change`, by trigger, so that a running gateway sees it whoever made it.

use super::{AdminError, Changes, StoreError, TokenAdmin, TokenRecord, TokenStore};
use crate::identity::credential::{Credential, Digest};
use async_trait::async_trait;
use rusqlite::{Connection, OpenFlags, OptionalExtension as _, Row, params};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};
use tokio::sync::{Mutex, mpsc, oneshot};

/// What `PRAGMA user_version` says of a database that this version made.
const SCHEMA_VERSION: i64 = 1;
/// Look-ups that may wait for a reader.
const QUEUE: usize = 1_024;
/// SQLite reads of one row take microseconds; two threads keep one slow page from holding up the rest.
const READERS: usize = 2;
/// How often a running gateway asks whether anything changed; bounds the time that a revoked token still works.
const POLL: Duration = Duration::from_millis(100);
/// How often it looks whether the file was replaced by another one.
const REPLACED_POLL: Duration = Duration::from_secs(1);
/// Rows of `change` are kept this long. A gateway that was away longer forgets everything instead.
const CHANGES_KEPT_MS: i64 = 3_600_000;
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);

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
    PRAGMA user_version = 1;
";

const COLUMNS: &str = "digest, user, scopes, description, created, expires, revoked, last_used";

/// Opens the database, making it when it is not there.
pub fn open(path: &Path) -> Result<Connection, String> {
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    if !path.exists() {
        // Made with the mode that it keeps: nobody else may ever read it.
        let made = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        if let Err(error) = made
            && error.kind() != std::io::ErrorKind::AlreadyExists
        {
            return Err(failed(&error));
        }
    }
    let mut db = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)
        .map_err(|error| failed(&error))?;
    prepare(&mut db).map_err(|error| failed(&error))?;
    Ok(db)
}

/// Opens a database that must be there and ours. A running gateway never makes one: an empty file that a broken restore
/// or a full disk leaves in its place is no store without tokens, but one that can't tell.
fn open_existing(path: &Path) -> Result<Connection, String> {
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = Connection::open_with_flags(path, flags).map_err(|error| failed(&error))?;
    db.busy_timeout(BUSY_TIMEOUT).map_err(|error| failed(&error))?;
    match db.pragma_query_value(None, "user_version", |row| row.get(0)) {
        Ok(SCHEMA_VERSION) => Ok(db),
        Ok(other) => Err(failed(&format!("schema {other} where {SCHEMA_VERSION} is needed"))),
        Err(error) => Err(failed(&error)),
    }
}

fn prepare(db: &mut Connection) -> Result<(), Box<dyn std::error::Error>> {
    db.busy_timeout(BUSY_TIMEOUT)?;
    db.pragma_update(None, "journal_mode", "wal")?;
    // A revocation that was reported as done must survive a power cut.
    db.pragma_update(None, "synchronous", "full")?;
    let transaction = db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    let version: i64 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
    match version {
        0 => transaction.execute_batch(SCHEMA)?,
        SCHEMA_VERSION => {}
        newer => {
            return Err(format!("made by a newer tollgate (schema {newer}, this one knows {SCHEMA_VERSION})").into());
        }
    }
    transaction.commit()?;
    Ok(())
}

fn record(row: &Row<'_>) -> rusqlite::Result<TokenRecord> {
    let time = |value: Option<i64>| value.map(|seconds| u64::try_from(seconds).unwrap_or(0));
    let scopes: String = row.get(2)?;
    Ok(TokenRecord {
        digest: Digest::from_bytes(row.get(0)?),
        user: row.get(1)?,
        scopes: scopes.split_whitespace().map(str::to_owned).collect(),
        description: row.get(3)?,
        created: time(Some(row.get(4)?)).unwrap_or(0),
        expires: time(row.get(5)?),
        revoked: time(row.get(6)?),
        last_used: time(row.get(7)?),
    })
}

/// The store of a running gateway: a few threads of its own, because SQLite blocks.
pub struct SqliteStore {
    questions: SyncSender<Question>,
    changes: Mutex<mpsc::Receiver<Changes>>,
}

enum Question {
    Lookup(Digest, oneshot::Sender<Result<Option<TokenRecord>, StoreError>>),
    NoteUses(Vec<(Digest, u64)>, oneshot::Sender<Result<(), StoreError>>),
}

impl SqliteStore {
    pub fn start(path: &Path) -> Result<Self, String> {
        let watched = open(path)?;
        let watcher = Watcher::new(path.into(), watched).map_err(|error| format!("{}: {error}", path.display()))?;
        let (questions, inbox) = sync_channel(QUEUE);
        let inbox = std::sync::Arc::new(parking_lot::Mutex::new(inbox));
        for index in 0..READERS {
            let reader = Reader { path: path.into(), db: None };
            let inbox = std::sync::Arc::clone(&inbox);
            spawn(&format!("sqlite-{index}"), move || reader.serve(&inbox))?;
        }
        let (told, changes) = mpsc::channel(16);
        spawn("sqlite-watch", move || watcher.watch(&told))?;
        Ok(Self { questions, changes: Mutex::new(changes) })
    }

    async fn ask<T>(
        &self,
        question: Question,
        answer: oneshot::Receiver<Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        self.questions.try_send(question).map_err(|error| match error {
            TrySendError::Full(_) => StoreError::Overloaded,
            TrySendError::Disconnected(_) => StoreError::Unavailable("its threads have ended".into()),
        })?;
        answer.await.unwrap_or_else(|_| Err(StoreError::Unavailable("its thread gave up".into())))
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), String> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(work)
        .map(drop)
        .map_err(|error| format!("no thread for {name}: {error}"))
}

#[async_trait]
impl TokenStore for SqliteStore {
    fn kind(&self) -> &'static str {
        "sqlite"
    }

    async fn lookup(&self, credential: &Credential) -> Result<Option<TokenRecord>, StoreError> {
        let (reply, answer) = oneshot::channel();
        self.ask(Question::Lookup(*credential.digest(), reply), answer).await
    }

    async fn changes(&self) -> Changes {
        match self.changes.lock().await.recv().await {
            Some(changes) => changes,
            None => std::future::pending().await,
        }
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
                    drop(reply.send(self.run(|db| lookup(db, &digest))));
                }
                Ok(Question::NoteUses(uses, reply)) => drop(reply.send(self.run(|db| note_uses(db, &uses)))),
                Err(_) => return,
            }
        }
    }

    fn run<T>(&mut self, work: impl FnOnce(&mut Connection) -> rusqlite::Result<T>) -> Result<T, StoreError> {
        let unavailable = |error: &dyn std::fmt::Display| StoreError::Unavailable(error.to_string());
        let inode = inode(&self.path);
        let (mut db, opened) = match self.db.take() {
            // The file was replaced or removed: what this connection reads is no longer the store.
            Some((db, opened)) if Some(opened) == inode => (db, opened),
            _ => match inode {
                Some(inode) => (open_existing(&self.path).map_err(|error| unavailable(&error))?, inode),
                None => return Err(unavailable(&format!("{} is gone", self.path.display()))),
            },
        };
        let result = work(&mut db).map_err(|error| match error {
            rusqlite::Error::FromSqlConversionFailure(..) | rusqlite::Error::InvalidColumnType(..) => {
                StoreError::Garbage(error.to_string())
            }
            error => unavailable(&error),
        });
        if result.is_ok() {
            self.db = Some((db, opened));
        }
        result
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
    let transaction = db.transaction()?;
    {
        let mut update = transaction.prepare_cached("UPDATE token SET last_used = ?2 WHERE digest = ?1")?;
        for (digest, at) in uses {
            update.execute(params![digest.as_bytes(), (at / 1000) as i64])?;
        }
    }
    transaction.commit()
}

/// Notices what others write. `PRAGMA data_version` costs a read of shared memory while nothing happens.
struct Watcher {
    path: PathBuf,
    db: Option<Connection>,
    inode: Option<u64>,
    data_version: i64,
    seq: i64,
}

impl Watcher {
    fn new(path: PathBuf, db: Connection) -> rusqlite::Result<Self> {
        let (data_version, seq) = (data_version(&db)?, last_seq(&db)?);
        let inode = inode(&path);
        Ok(Self { path, db: Some(db), inode, data_version, seq })
    }

    fn watch(mut self, told: &mpsc::Sender<Changes>) {
        let mut looked_for_replacement = Instant::now();
        loop {
            std::thread::sleep(POLL);
            if told.is_closed() {
                return;
            }
            let replaced = looked_for_replacement.elapsed() >= REPLACED_POLL && {
                looked_for_replacement = Instant::now();
                inode(&self.path) != self.inode
            };
            let changes = match &self.db {
                Some(_) if !replaced => self.look(),
                _ => self.reopen(),
            };
            let changes = changes.unwrap_or_else(|error| {
                log::error!("{}: changes can't be followed, trying again: {error}", self.path.display());
                self.db = None;
                None
            });
            if let Some(changes) = changes
                && told.blocking_send(changes).is_err()
            {
                return;
            }
        }
    }

    fn look(&mut self) -> Result<Option<Changes>, String> {
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
            return Ok(Some(Changes::Everything));
        }
        let mut query =
            db.prepare_cached("SELECT seq, digest, at_ms FROM change WHERE seq > ?1 ORDER BY seq").map_err(text)?;
        let rows = query
            .query_map([self.seq], |row| Ok((row.get::<_, i64>(0)?, row.get(1)?, row.get::<_, i64>(2)?)))
            .map_err(text)?;
        let mut tokens = Vec::new();
        for row in rows {
            let (seq, digest, at_ms) = row.map_err(text)?;
            self.seq = seq;
            tokens.push((Digest::from_bytes(digest), u64::try_from(at_ms).unwrap_or(0)));
        }
        Ok(if tokens.is_empty() { None } else { Some(Changes::Tokens(tokens)) })
    }

    /// Another file, or the same one after an error: whatever happened meanwhile was missed.
    fn reopen(&mut self) -> Result<Option<Changes>, String> {
        let Some(inode) = inode(&self.path) else { return Err("the file is gone".into()) };
        let db = open_existing(&self.path)?;
        let fresh = Self::new(self.path.clone(), db).map_err(|error| error.to_string())?;
        *self = Self { inode: Some(inode), ..fresh };
        Ok(Some(Changes::Everything))
    }
}

fn data_version(db: &Connection) -> rusqlite::Result<i64> {
    db.pragma_query_value(None, "data_version", |row| row.get(0))
}

/// The highest number ever given, also when the rows are gone.
fn last_seq(db: &Connection) -> rusqlite::Result<i64> {
    let seq = db.query_row("SELECT seq FROM sqlite_sequence WHERE name = 'change'", [], |row| row.get(0)).optional()?;
    Ok(seq.unwrap_or(0))
}

/// The store as the command line writes to it.
pub struct SqliteAdmin {
    db: Connection,
}

impl SqliteAdmin {
    pub fn open(path: &Path) -> Result<Self, AdminError> {
        let db = open(path).map_err(AdminError::Store)?;
        let oldest = "DELETE FROM change WHERE at_ms < CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER) - ?1";
        db.execute(oldest, [CHANGES_KEPT_MS])?;
        Ok(Self { db })
    }
}

impl From<rusqlite::Error> for AdminError {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::ConstraintViolation) => Self::Exists,
            _ => Self::Store(error.to_string()),
        }
    }
}

const INSERT: &str = "INSERT INTO token (digest, user, scopes, description, created, expires, revoked)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";

fn insert(statement: &mut rusqlite::CachedStatement<'_>, record: &TokenRecord) -> rusqlite::Result<usize> {
    let time = |seconds: u64| i64::try_from(seconds).unwrap_or(i64::MAX);
    statement.execute(params![
        record.digest.as_bytes(),
        record.user,
        record.scopes.join(" "),
        record.description,
        time(record.created),
        record.expires.map(time),
        record.revoked.map(time),
    ])
}

impl TokenAdmin for SqliteAdmin {
    fn create(&mut self, record: &TokenRecord) -> Result<(), AdminError> {
        insert(&mut self.db.prepare_cached(INSERT)?, record)?;
        Ok(())
    }

    fn import(
        &mut self,
        records: &mut dyn Iterator<Item = Result<TokenRecord, AdminError>>,
    ) -> Result<u64, AdminError> {
        let transaction = self.db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let mut new = 0;
        {
            let mut statement = transaction.prepare_cached(&format!("{INSERT} ON CONFLICT DO NOTHING"))?;
            for record in records {
                new += insert(&mut statement, &record?)? as u64;
            }
        }
        transaction.commit()?;
        Ok(new)
    }

    fn list(&self) -> Result<Vec<TokenRecord>, AdminError> {
        let mut query = self.db.prepare(&format!("SELECT {COLUMNS} FROM token ORDER BY created DESC, digest"))?;
        let records = query.query_map([], record)?.collect::<Result<_, _>>()?;
        Ok(records)
    }

    fn find(&self, hex_prefix: &str) -> Result<Vec<TokenRecord>, AdminError> {
        // The digests that begin with the prefix are a range of the primary key.
        let bound = |filler: char| {
            let hex: String = hex_prefix.chars().chain(std::iter::repeat(filler)).take(64).collect();
            Digest::from_hex(&hex).ok_or(AdminError::Missing)
        };
        let range = "WHERE digest BETWEEN ?1 AND ?2 LIMIT 100";
        let mut query = self.db.prepare(&format!("SELECT {COLUMNS} FROM token {range}"))?;
        let records =
            query.query_map([bound('0')?.as_bytes(), bound('f')?.as_bytes()], record)?.collect::<Result<_, _>>()?;
        Ok(records)
    }

    fn revoke(&mut self, digest: &Digest, at: u64) -> Result<bool, AdminError> {
        let changed = self.db.execute(
            "UPDATE token SET revoked = ?2 WHERE digest = ?1 AND revoked IS NULL",
            params![digest.as_bytes(), i64::try_from(at).unwrap_or(i64::MAX)],
        )?;
        if changed == 0 && lookup(&self.db, digest)?.is_none() {
            return Err(AdminError::Missing);
        }
        Ok(changed == 1)
    }
}
