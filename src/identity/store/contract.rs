//! What every store must hold, run against each of them with the same table. A store brings a way to open it and the
//! writing side that fills it.

use super::{AdminError, Changes, TokenAdmin, TokenRecord, TokenStore};
use crate::identity::credential::{Credential, Digest};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// A folder that is gone when the test is over.
pub(super) struct Folder(PathBuf);

impl Folder {
    pub(super) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("tollgate-store-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// How to get at a kind of store.
pub(super) struct Kind {
    pub(super) name: &'static str,
    pub(super) admin: fn(&Path) -> Box<dyn TokenAdmin>,
    pub(super) open: fn(&Path) -> Arc<dyn TokenStore>,
}

fn record(token: &str) -> TokenRecord {
    TokenRecord {
        digest: Digest::of(token.as_bytes()),
        user: format!("user of {}", token.len()),
        scopes: vec!["api".into(), "read_user".into()],
        description: "quote \" backslash \\ newline-free é".into(),
        created: 1_700_000_000,
        expires: None,
        revoked: None,
        last_used: None,
    }
}

async fn lookup(store: &dyn TokenStore, token: &[u8]) -> Option<TokenRecord> {
    store.lookup(&Credential::new(token, Digest::of(token))).await.unwrap()
}

/// Runs the whole table.
pub(super) async fn run(kind: &Kind) {
    let folder = Folder::new(kind.name);
    let path = folder.file("tokens");
    let mut admin = (kind.admin)(&path);
    let longest = "x".repeat(255);
    for token in ["known", &longest] {
        admin.create(&record(token)).unwrap();
    }
    admin
        .create(&TokenRecord { expires: Some(1_800_000_000), revoked: Some(1_750_000_000), ..record("ended") })
        .unwrap();
    let store = (kind.open)(&path);

    // What was put in comes out.
    assert_eq!(lookup(&*store, b"known").await, Some(record("known")), "{}", kind.name);
    assert_eq!(lookup(&*store, longest.as_bytes()).await, Some(record(&longest)));
    let ended = lookup(&*store, b"ended").await.unwrap();
    assert_eq!(
        (ended.expires, ended.revoked),
        (Some(1_800_000_000), Some(1_750_000_000)),
        "the caller judges, not the store"
    );

    // What was not put in does not: no prefix, no case, no trimming, no pattern, whatever the bytes.
    for token in [&b"knowN"[..], b"know", b"known ", b" known", b"", b"%", b"' OR 1=1 --", b"\xff\xfe", &[b'y'; 10_000]]
    {
        assert_eq!(lookup(&*store, token).await, None, "{}", String::from_utf8_lossy(token));
    }

    // Writing.
    assert!(matches!(admin.create(&record("known")), Err(AdminError::Exists)));
    assert!(matches!(admin.revoke(&Digest::of(b"nobody"), 1), Err(AdminError::Missing)));
    let id = Digest::of(b"known").to_hex();
    assert_eq!(admin.find(&id[..12]).unwrap(), [record("known")]);
    assert_eq!(admin.find(&Digest::of(b"nobody").to_hex()[..12]).unwrap(), []);
    assert_eq!(admin.list().unwrap().len(), 3);

    // A broken import changes nothing; a good one skips what is known.
    let mut broken = [Ok(record("new")), Err(AdminError::Line(2, "broken".into()))].into_iter();
    assert!(matches!(admin.import(&mut broken), Err(AdminError::Line(2, _))));
    assert_eq!(admin.list().unwrap().len(), 3);
    let mut good = ["known", "new", "newer"].into_iter().map(|token| Ok(record(token)));
    assert_eq!(admin.import(&mut good).unwrap(), 2);
    noticed(&*store, "new").await;

    // A revocation is told, and so is what was done by another hand meanwhile.
    assert!(admin.revoke(&Digest::of(b"known"), 1_760_000_000).unwrap());
    assert!(!admin.revoke(&Digest::of(b"known"), 1_770_000_000).unwrap(), "the first one counts");
    noticed(&*store, "known").await;
    assert_eq!(lookup(&*store, b"known").await.unwrap().revoked, Some(1_760_000_000));
}

/// Waits until the store says that a token changed.
pub(super) async fn noticed(store: &dyn TokenStore, token: &str) {
    let digest = Digest::of(token.as_bytes());
    let seen = async {
        loop {
            match store.changes().await {
                Changes::Everything => return,
                Changes::Tokens(tokens) if tokens.iter().any(|(changed, _)| *changed == digest) => return,
                Changes::Tokens(_) => {}
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(5), seen)
        .await
        .unwrap_or_else(|_| panic!("{token}: no word of the change"));
}

mod stores {
    use super::super::StoreError;
    use super::super::file::{FileAdmin, FileStore};
    use super::super::sqlite::{SqliteAdmin, SqliteStore};
    use super::*;

    fn clock() -> crate::Now {
        crate::edge::now()
    }

    const FILE: Kind = Kind {
        name: "file",
        admin: |path| Box::new(FileAdmin::new(path)),
        open: |path| Arc::new(FileStore::open(path, clock).unwrap()),
    };
    const SQLITE: Kind = Kind {
        name: "sqlite",
        admin: |path| Box::new(SqliteAdmin::open(path).unwrap()),
        open: |path| Arc::new(SqliteStore::start(path).unwrap()),
    };

    #[tokio::test]
    async fn file_holds_the_contract() {
        run(&FILE).await;
    }

    #[tokio::test]
    async fn sqlite_holds_the_contract() {
        run(&SQLITE).await;
    }

    #[tokio::test]
    async fn a_broken_file_changes_nothing() {
        let folder = Folder::new("broken-file");
        let path = folder.file("tokens");
        FileAdmin::new(&path).create(&record("known")).unwrap();
        let good = std::fs::read_to_string(&path).unwrap();
        let store = FileStore::open(&path, clock).unwrap();
        for (broken, part) in [
            ("[[token]]\nsha256 = \"12\"\nuser = \"a\"\n", "token[0].sha256: must be 64 hex digits"),
            ("[[token]]\nuser = \"a\"\n", "missing field"),
            ("[[token]]\nsha256 = \"S3CRET", "line 2"),
            (&format!("{good}{good}"), "stands in the file twice"),
            (&good.replace("created", "expires").replace("2023-", "20x3-"), "must be a time like"),
            (&good.replace("user", "usr"), "unknown field"),
        ] {
            let why = FileStore::open(&folder.file("other"), clock).err().unwrap();
            assert!(why.contains("No such file"), "{why}");
            std::fs::write(folder.file("broken"), broken).unwrap();
            let why = FileStore::open(&folder.file("broken"), clock).err().unwrap();
            assert!(why.contains(part) && !why.contains("S3CRET"), "{why}");
        }
        std::fs::write(&path, "[[token]]\nnonsense").unwrap();
        let change = tokio::time::timeout(Duration::from_millis(700), store.changes()).await;
        assert!(change.is_err(), "a broken file is no change: {change:?}");
        assert_eq!(lookup(&store, b"known").await, Some(record("known")));
        std::fs::remove_file(&path).unwrap();
        let change = tokio::time::timeout(Duration::from_millis(700), store.changes()).await;
        assert!(change.is_err() && lookup(&store, b"known").await.is_some(), "nor is a missing one");
    }

    #[test]
    fn the_command_line_keeps_what_people_wrote() {
        let folder = Folder::new("file-text");
        let path = folder.file("tokens");
        let text = format!(
            "# mine\n[[token]] # first\nsha256 = \"{}\" # the digest\nuser = \"a\"\n",
            Digest::of(b"t").to_hex().to_uppercase()
        );
        std::fs::write(&path, &text).unwrap();
        let mut admin = FileAdmin::new(&path);
        assert!(admin.revoke(&Digest::of(b"t"), 1_700_000_000).unwrap());
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
        SqliteAdmin::open(&path).unwrap().create(&record("known")).unwrap();
        let store = SqliteStore::start(&path).unwrap();
        assert!(lookup(&store, b"known").await.is_some());
        for suffix in ["", "-wal", "-shm"] {
            drop(std::fs::remove_file(format!("{}{suffix}", path.display())));
        }
        let answer = store.lookup(&Credential::new(b"nobody", Digest::of(b"nobody"))).await;
        assert!(matches!(answer, Err(StoreError::Unavailable(_))), "{answer:?}");
        // Another database takes its place: everything may have changed.
        SqliteAdmin::open(&path).unwrap().create(&record("newcomer")).unwrap();
        noticed(&store, "newcomer").await;
        assert!(lookup(&store, b"known").await.is_none() && lookup(&store, b"newcomer").await.is_some());
    }

    #[tokio::test]
    async fn no_database_is_no_answer() {
        let folder = Folder::new("no-database");
        let path = folder.file("tokens");
        std::fs::write(&path, "this is no database, but long enough to be looked at".repeat(50)).unwrap();
        assert!(SqliteStore::start(&path).err().unwrap().contains("not a database"));
        let newer = folder.file("newer");
        super::super::sqlite::open(&newer).unwrap().pragma_update(None, "user_version", 99).unwrap();
        assert!(SqliteStore::start(&newer).err().unwrap().contains("made by a newer tollgate"));
        let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&newer).unwrap()) & 0o777;
        assert_eq!(mode, 0o600, "nobody else may read the digests");
    }

    #[tokio::test]
    async fn rows_that_make_no_sense_are_no_answer() {
        let folder = Folder::new("garbage");
        let path = folder.file("tokens");
        SqliteAdmin::open(&path).unwrap().create(&record("known")).unwrap();
        let db = rusqlite::Connection::open(&path).unwrap();
        db.execute_batch("PRAGMA writable_schema = on; UPDATE sqlite_schema SET sql = replace(sql, ' STRICT,', '')")
            .unwrap();
        drop(db);
        let db = rusqlite::Connection::open(&path).unwrap();
        db.execute("UPDATE token SET user = x'ff00ff'", []).unwrap();
        let store = SqliteStore::start(&path).unwrap();
        let answer = store.lookup(&Credential::new(b"known", Digest::of(b"known"))).await;
        assert!(matches!(answer, Err(StoreError::Garbage(_))), "{answer:?}");
    }

    #[tokio::test]
    async fn uses_are_noted_without_being_changes() {
        let folder = Folder::new("uses");
        let path = folder.file("tokens");
        let mut admin = SqliteAdmin::open(&path).unwrap();
        admin.create(&record("known")).unwrap();
        let store = SqliteStore::start(&path).unwrap();
        store.note_uses(vec![(Digest::of(b"known"), 1_700_000_060_000)]).await.unwrap();
        assert_eq!(admin.list().unwrap()[0].last_used, Some(1_700_000_060));
        let change = tokio::time::timeout(Duration::from_millis(500), store.changes()).await;
        assert!(change.is_err(), "{change:?}");
    }
}
