//! The embedded stores: file and SQLite.

use super::*;
use std::path::PathBuf;
use tollgate::store::file::{FileAdmin, FileStore};
use tollgate::store::sqlite::{SqliteAdmin, SqliteStore};
use tollgate::store::{LookupLimits, StoreError};
use tollgate::telemetry::metrics::Metrics;

fn clock() -> tollgate::clock::Now {
    tollgate::edge::now()
}

fn open(path: &std::path::Path) -> Result<FileStore, String> {
    let opened = FileStore::open(path, Arc::new(Metrics::new("test").unwrap().store("file")), clock);
    opened.map_err(|error| error.to_string())
}

/// The events of a store within some time.
async fn heard_within(store: &dyn TokenStore, time: Duration) -> Vec<Event> {
    let events = Mutex::new(Vec::new());
    drop(tokio::time::timeout(time, store.follow(&|event| events.lock().push(event))).await);
    // Without probes.
    events.into_inner().into_iter().filter(|event| !matches!(event, Event::Alive { .. } | Event::Unheard(..))).collect()
}

struct FileSubject {
    path: PathBuf,
    _folder: Folder,
}

impl FileSubject {
    fn new(name: &str) -> Self {
        let folder = Folder::new(&format!("contract-{name}"));
        Self { path: folder.file(name), _folder: folder }
    }
}

#[async_trait]
impl Subject for FileSubject {
    fn name(&self) -> &'static str {
        "file"
    }

    fn features(&self) -> Features {
        Features {
            hears: true,
            keeps_all: true,
            is_ours: true,
            waits: false,
            has_server: false,
            spoils: false,
            tells_why: true,
        }
    }

    async fn admin(&self) -> Box<dyn TokenAdmin> {
        let mut admin = FileAdmin::new(&self.path);
        if !self.path.exists() {
            // A gateway needs an existing file.
            admin.import(&mut std::iter::empty()).await.unwrap();
        }
        Box::new(admin)
    }

    fn open(&self) -> Arc<dyn TokenStore> {
        let store = open(&self.path).unwrap();
        Arc::new(Prompt { store, path: self.path.clone() })
    }

    async fn spoil(&self, _token: &str) {
        unreachable!("a file is valid as a whole or not at all")
    }

    async fn fault(&self, _fault: Fault) {
        unreachable!("there is no server")
    }
}

/// A file store that reads the current file before each answer, because the suite looks up a token right after a write.
struct Prompt {
    store: FileStore,
    path: PathBuf,
}

#[async_trait]
impl TokenStore for Prompt {
    fn lookup_limits(&self) -> LookupLimits {
        LookupLimits { at_once: 1, tokens: 1 }
    }

    async fn lookup(&self, credential: &Credential) -> Result<Option<TokenRecord>, StoreError> {
        open(&self.path).unwrap().lookup(credential).await
    }

    async fn follow(&self, heard: tollgate::store::Heard<'_>) {
        self.store.follow(heard).await;
    }
}

struct SqliteSubject {
    folder: Folder,
}

impl SqliteSubject {
    fn path(&self) -> PathBuf {
        self.folder.file("tokens")
    }
}

#[async_trait]
impl Subject for SqliteSubject {
    fn name(&self) -> &'static str {
        "sqlite"
    }

    fn features(&self) -> Features {
        Features {
            hears: true,
            keeps_all: true,
            is_ours: true,
            waits: true,
            has_server: false,
            spoils: true,
            tells_why: true,
        }
    }

    async fn admin(&self) -> Box<dyn TokenAdmin> {
        Box::new(SqliteAdmin::open(&self.path()).unwrap())
    }

    fn open(&self) -> Arc<dyn TokenStore> {
        Arc::new(SqliteStore::start(&self.path()).unwrap())
    }

    async fn spoil(&self, token: &str) {
        spoil(&self.path(), token);
    }

    async fn fault(&self, _fault: Fault) {
        unreachable!("there is no server")
    }
}

/// Replaces a user's name by bytes that are not UTF-8.
fn spoil(path: &std::path::Path, token: &str) {
    let db = rusqlite::Connection::open(path).unwrap();
    db.execute_batch("PRAGMA writable_schema = on; UPDATE sqlite_schema SET sql = replace(sql, ' STRICT,', '')")
        .unwrap();
    drop(db);
    let db = rusqlite::Connection::open(path).unwrap();
    let digest = Digest::of(token.as_bytes());
    assert_eq!(db.execute("UPDATE token SET user = x'ff00ff' WHERE digest = ?1", [digest.as_bytes()]).unwrap(), 1);
}

/// An empty store of each kind.
pub fn kinds() -> Vec<(&'static str, Box<dyn Subject>)> {
    vec![
        ("toml", Box::new(FileSubject::new("tokens.toml"))),
        ("json", Box::new(FileSubject::new("tokens.json"))),
        ("sqlite", Box::new(SqliteSubject { folder: Folder::new("contract-sqlite") })),
    ]
}

#[tokio::test]
async fn file_holds_the_contract() {
    run(&FileSubject::new("tokens.toml")).await;
}

#[tokio::test]
async fn json_file_holds_the_contract() {
    run(&FileSubject::new("tokens.json")).await;
}

#[tokio::test]
async fn sqlite_restores_by_any_clock() {
    restored_by_any_clock(&SqliteSubject { folder: Folder::new("restored") }, || {}).await;
}

#[tokio::test]
async fn sqlite_holds_the_contract() {
    run(&SqliteSubject { folder: Folder::new("contract-sqlite") }).await;
}

#[tokio::test]
async fn a_broken_file_changes_nothing() {
    let folder = Folder::new("broken-file");
    let path = folder.file("tokens");
    FileAdmin::new(&path).create(&record("known")).await.unwrap();
    let good = std::fs::read_to_string(&path).unwrap();
    let metrics = Metrics::new("test").unwrap();
    let store = FileStore::open(&path, Arc::new(metrics.store("file")), clock).unwrap();
    let is_current = |yes: u8| metrics.render().unwrap().contains(&format!("file_current{{store=\"file\"}} {yes}\n"));
    assert!(is_current(1));
    for (broken, part) in [
        ("[[token]]\nsha256 = \"12\"\nuser = \"a\"\n", "token[0].sha256: must be 64 hex digits"),
        ("[[token]]\nuser = \"a\"\n", "missing field"),
        ("[[token]]\nsha256 = \"S3CRET", "line 2"),
        (&format!("{good}{good}"), "stands in the file twice"),
        (&good.replace("created", "expires").replace("2023-", "20x3-"), "must be a time like"),
        (&good.replace("user", "usr"), "unknown field"),
        ("", "the file is empty"),
        ("\n \n", "the file is empty"),
    ] {
        let why = open(&folder.file("other")).err().unwrap();
        assert!(why.contains("No such file"), "{why}");
        std::fs::write(folder.file("broken"), broken).unwrap();
        let why = open(&folder.file("broken")).err().unwrap();
        assert!(why.contains(part) && !why.contains("S3CRET"), "{why}");
    }
    let zoned = good.replace("2023-11-14T22:13:20Z", "2023-11-15T00:13:20+02:00");
    assert_ne!(zoned, good);
    std::fs::write(folder.file("zoned"), zoned).unwrap();
    let zoned = open(&folder.file("zoned")).unwrap();
    assert_eq!(lookup(&zoned, b"known").await, Some(record("known")), "an offset is part of a time");
    // A writer that does not replace the file atomically leaves an empty one for a moment.
    for broken in ["[[token]]\nnonsense", ""] {
        std::fs::write(&path, broken).unwrap();
        assert_eq!(
            heard_within(&store, Duration::from_millis(700)).await,
            [Event::Hearing],
            "{broken:?} is not a change"
        );
        assert!(is_current(0), "the metric does not show the broken file");
        assert_eq!(lookup(&store, b"known").await, Some(record("known")));
    }
    std::fs::remove_file(&path).unwrap();
    assert_eq!(
        heard_within(&store, Duration::from_millis(700)).await,
        [Event::Hearing],
        "a missing file is not a change"
    );
    assert!(is_current(0));
    assert!(lookup(&store, b"known").await.is_some());
    // An empty list of tokens invalidates all of them.
    std::fs::write(&path, "token = []\n").unwrap();
    for _ in 0..10 {
        if lookup(&store, b"known").await.is_some() {
            heard_within(&store, Duration::from_millis(700)).await;
        }
    }
    assert_eq!(lookup(&store, b"known").await, None);
    assert!(is_current(1));
}

#[tokio::test]
async fn the_command_line_keeps_what_people_wrote() {
    let folder = Folder::new("file-text");
    let path = folder.file("tokens");
    let text = format!(
        "# mine\n[[token]] # first\nsha256 = \"{}\" # the digest\nuser = \"a\"\n",
        Digest::of(b"t").to_hex().to_uppercase()
    );
    std::fs::write(&path, &text).unwrap();
    let mut admin = FileAdmin::new(&path);
    assert!(admin.revoke(&Digest::of(b"t"), 1_700_000_000).await.unwrap());
    let after = std::fs::read_to_string(&path).unwrap();
    assert!(
        after.contains("# mine")
            && after.contains("# the digest")
            && after.contains("revoked = \"2023-11-14T22:13:20Z\""),
        "{after}"
    );
}

#[tokio::test]
async fn a_database_that_is_gone_cannot_tell() {
    let folder = Folder::new("gone");
    let path = folder.file("tokens");
    SqliteAdmin::open(&path).unwrap().create(&record("known")).await.unwrap();
    let store: Arc<dyn TokenStore> = Arc::new(SqliteStore::start(&path).unwrap());
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    assert!(lookup(&*store, b"known").await.is_some());
    let removed = Instant::now();
    for suffix in ["", "-wal", "-shm"] {
        drop(std::fs::remove_file(format!("{}{suffix}", path.display())));
    }
    let answer = store.lookup(&Credential::new(b"nobody", Digest::of(b"nobody"))).await;
    assert!(matches!(answer, Err(StoreError::Unavailable(_))), "{answer:?}");
    // Another database replaces it: everything may have changed.
    SqliteAdmin::open(&path).unwrap().create(&record("newcomer")).await.unwrap();
    ear.hearing(removed).await;
    assert!(lookup(&*store, b"known").await.is_none() && lookup(&*store, b"newcomer").await.is_some());
}

#[tokio::test]
async fn no_database_is_no_answer() {
    let folder = Folder::new("no-database");
    let path = folder.file("tokens");
    std::fs::write(&path, "this is not a database, but long enough to be read".repeat(50)).unwrap();
    assert!(SqliteStore::start(&path).err().unwrap().to_string().contains("not a database"));
    let newer = folder.file("newer");
    tollgate::store::sqlite::open(&newer).unwrap().pragma_update(None, "user_version", 99).unwrap();
    assert!(SqliteStore::start(&newer).err().unwrap().to_string().contains("made by a newer tollgate"));
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&newer).unwrap()) & 0o777;
    assert_eq!(mode, 0o600, "other users must not read the digests");
}

/// The first release's schema.
const FIRST_SCHEMA: &str = "
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

#[tokio::test]
async fn an_older_database_is_brought_up_to_date() {
    let folder = Folder::new("older");
    let path = folder.file("tokens");
    let db = rusqlite::Connection::open(&path).unwrap();
    db.execute_batch(FIRST_SCHEMA).unwrap();
    db.pragma_update(None, "user_version", 1).unwrap();
    let known = Digest::of(b"known");
    db.execute("INSERT INTO token (digest, user, created) VALUES (?1, 'a', 5)", [known.as_bytes()]).unwrap();
    drop(db);
    let store = SqliteStore::start(&path).unwrap();
    assert_eq!(lookup(&store, b"known").await, Some(TokenRecord { created: 5, ..TokenRecord::new(known, "a") }));
    let mut admin = SqliteAdmin::open(&path).unwrap();
    admin.rotate(&known, &record("next"), 10, 20).await.unwrap();
    assert_eq!(lookup(&store, b"known").await.unwrap().superseded, Some(10));
    let bound = TokenRecord { terms: terms("gold", "9/s", &["10.0.0.0/8"], &["GET"]), ..record("bound") };
    admin.create(&bound).await.unwrap();
    assert_eq!(lookup(&store, b"bound").await, Some(bound));
    // The operator's own statement on each of them is a change that gateways are told of.
    let db = rusqlite::Connection::open(&path).unwrap();
    let changes = || db.query_row("SELECT count(*) FROM change", [], |row| row.get::<_, i64>(0)).unwrap();
    for set in ["plan = 'free'", "rate = '1/s'", "networks = '192.0.2.1 ::1'", "methods = 'POST'"] {
        let before = changes();
        assert_eq!(db.execute(&format!("UPDATE token SET {set} WHERE user = 'a'"), []), Ok(1), "{set}");
        assert_eq!(changes(), before + 1, "{set}");
    }
    let known = lookup(&store, b"known").await.unwrap();
    assert_eq!(known.terms, terms("free", "1/s", &["192.0.2.1", "::1"], &["POST"]));
    // What cannot be understood is no missing bound.
    db.execute("UPDATE token SET networks = 'everywhere'", []).unwrap();
    assert!(matches!(ask(&store, b"known").await, Err(StoreError::Garbage(why)) if why.contains("networks")));
}

/// The store's position in its list of changes, from a probe after all changes so far.
async fn mark_of(store: &Arc<dyn TokenStore>) -> String {
    let (told, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let asked = clock().mono_ms;
    let listen = |event| {
        if let Event::Alive { asked_ms, mark: Some(mark) } = event
            && asked_ms >= asked
        {
            drop(told.send(mark));
        }
    };
    tokio::select! {
        () = store.follow(&listen) => panic!("the store stopped following"),
        mark = tokio::time::timeout(PATIENCE, heard.recv()) => mark.unwrap().unwrap(),
    }
}

#[tokio::test]
async fn what_changed_behind_a_mark_is_told_as_long_as_the_list_is_whole() {
    let folder = Folder::new("since");
    let path = folder.file("tokens");
    let start = || -> Arc<dyn TokenStore> { Arc::new(SqliteStore::start(&path).unwrap()) };
    let mut admin = SqliteAdmin::open(&path).unwrap();
    let store = start();
    let empty = mark_of(&store).await;
    assert_eq!(store.changed_since(&empty).await.unwrap(), Some(vec![]));
    admin.create(&record("known")).await.unwrap();
    admin.create(&record("other")).await.unwrap();
    let both = store.changed_since(&empty).await.unwrap().unwrap();
    assert_eq!(both.len(), 2);
    let mark = mark_of(&start()).await;
    assert_eq!(store.changed_since(&mark).await.unwrap(), Some(vec![]));
    admin.revoke(&Digest::of(b"known"), 1).await.unwrap();
    // A writer's clock that is hours off has no effect: only the order counts.
    let db = rusqlite::Connection::open(&path).unwrap();
    for hours in [-5, 5] {
        db.execute("UPDATE change SET at_ms = at_ms + ?1 WHERE seq = 3", [hours * 3_600_000]).unwrap();
        assert_eq!(store.changed_since(&mark).await.unwrap(), Some(vec![Digest::of(b"known")]));
    }
    // Deleted rows: the one of the mark is not needed, later ones are.
    db.execute("DELETE FROM change WHERE seq <= 2", []).unwrap();
    assert_eq!(store.changed_since(&mark).await.unwrap(), Some(vec![Digest::of(b"known")]));
    assert_eq!(store.changed_since(&empty).await.unwrap(), None);
    db.execute("DELETE FROM change", []).unwrap();
    assert_eq!(store.changed_since(&mark).await.unwrap(), None);
    let last = mark_of(&start()).await;
    assert_eq!((last.as_str(), store.changed_since(&last).await.unwrap()), ("3", Some(vec![])));
    // A database restored from a backup has its own list.
    admin.revoke(&Digest::of(b"other"), 1).await.unwrap();
    for foreign in ["4 1", "9 1700000000000", "9", "", "x", "-"] {
        assert_eq!(store.changed_since(foreign).await.unwrap(), None, "{foreign:?}");
    }
}

#[tokio::test]
async fn uses_are_noted_without_being_changes() {
    let folder = Folder::new("uses");
    let path = folder.file("tokens");
    let mut admin = SqliteAdmin::open(&path).unwrap();
    admin.create(&record("known")).await.unwrap();
    let store = SqliteStore::start(&path).unwrap();
    store.note_uses(vec![(Digest::of(b"known"), 1_700_000_060_000)]).await.unwrap();
    assert_eq!(admin.list().await.unwrap()[0].last_used, Some(1_700_000_060));
    assert_eq!(heard_within(&store, Duration::from_millis(500)).await, [Event::Hearing]);
}
