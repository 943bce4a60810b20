//! PostgreSQL: tollgate's own tables, GitLab's and others', and their special features.

use super::*;
use crate::servers::pgbouncer::PgBouncer;
use crate::servers::postgres::Postgres;
use crate::servers::tls::Authority;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use tollgate::store::postgres::{
    Bind, PostgresAdmin, PostgresSettings, PostgresStore, Source, run_triggers_sql, triggers_sql,
};
use tollgate::store::{IDLE, Imported, Records, Secret, TlsMode, TlsSettings};

const PLAIN: TlsSettings = TlsSettings { mode: TlsMode::Disable, ca: None, client: None };

fn key_base() -> Secret {
    Secret::new("k".repeat(64))
}

fn own() -> Source {
    Source::Own { schema: "tollgate".into() }
}

fn settings(server: &Postgres, source: Source) -> PostgresSettings {
    PostgresSettings {
        url: Secret::new(server.url("postgres")),
        password: None,
        tls: PLAIN,
        connections: 8,
        source,
        channel: Some("tollgate_change".into()),
        default_scopes: vec![],
        timeout: TIMEOUT,
        idle: IDLE,
    }
}

/// A writer, after creating the tables.
async fn writer(settings: &PostgresSettings) -> PostgresAdmin {
    PostgresAdmin::migrate(settings).await.unwrap();
    PostgresAdmin::open(settings).await.unwrap()
}

fn open(settings: PostgresSettings) -> Arc<dyn TokenStore> {
    let metrics = Arc::new(tollgate::telemetry::metrics::Metrics::new("test").unwrap().store("postgres"));
    Arc::new(PostgresStore::new(settings, metrics).unwrap())
}

fn refused(settings: PostgresSettings) -> String {
    let metrics = Arc::new(tollgate::telemetry::metrics::Metrics::new("test").unwrap().store("postgres"));
    PostgresStore::new(settings, metrics).err().unwrap().to_string()
}

struct Own(Mutex<Postgres>);

#[async_trait]
impl Subject for Own {
    fn name(&self) -> &'static str {
        "postgres"
    }

    fn features(&self) -> Features {
        Features {
            hears: true,
            keeps_all: true,
            is_ours: true,
            waits: true,
            has_server: true,
            spoils: true,
            tells_why: true,
        }
    }

    async fn admin(&self) -> Box<dyn TokenAdmin> {
        let settings = settings(&self.0.lock(), own());
        Box::new(writer(&settings).await)
    }

    fn open(&self) -> Arc<dyn TokenStore> {
        open(settings(&self.0.lock(), own()))
    }

    async fn spoil(&self, token: &str) {
        let digest = Digest::of(token.as_bytes()).to_hex();
        let sql =
            "ALTER TABLE tollgate.token DROP CONSTRAINT token_user_check; UPDATE tollgate.token SET \"user\" = ''";
        self.0.lock().psql("postgres", &format!("{sql} WHERE digest = '\\x{digest}'"));
    }

    async fn fault(&self, fault: Fault) {
        self.0.lock().inject(fault);
    }
}

/// tollgate's own tables, empty.
pub fn kind() -> (&'static str, Box<dyn Subject>) {
    ("postgres", Box::new(Own(Mutex::new(Postgres::start()))))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn own_tables_restore_by_any_clock() {
    let own = Own(Mutex::new(Postgres::start()));
    let age = || drop(own.0.lock().psql("postgres", "UPDATE tollgate.change SET at_ms = at_ms - 600000"));
    restored_by_any_clock(&own, age).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn own_tables_hold_the_contract() {
    run(&Own(Mutex::new(Postgres::start()))).await;
}

/// Another program's tables.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Foreign {
    Legacy,
    Pat,
    PatDigest,
    Hex,
    Base64,
}

impl Foreign {
    const TABLES: &'static str = "
        CREATE TABLE users (id serial PRIMARY KEY, username varchar, authentication_token varchar UNIQUE,
            state varchar DEFAULT 'active', updated_at timestamp);
        CREATE TABLE personal_access_tokens (id serial PRIMARY KEY, user_id integer NOT NULL REFERENCES users ON DELETE CASCADE,
            token varchar UNIQUE, token_digest varchar UNIQUE, revoked boolean DEFAULT false, expires_at timestamp,
            last_used_at timestamp, scopes varchar DEFAULT E'--- []\\n');
        CREATE TABLE keys (digest char(64) UNIQUE, base64 text UNIQUE, login text, scopes jsonb, expires bigint,
            starts timestamptz, revoked_at timestamptz, blocked boolean NOT NULL DEFAULT false, note text);
    ";

    const fn name(self) -> &'static str {
        match self {
            Self::Legacy => "gitlab-legacy",
            Self::Pat => "gitlab-pat",
            Self::PatDigest => "gitlab-pat-digest",
            Self::Hex => "custom-hex",
            Self::Base64 => "custom-base64",
        }
    }

    fn source(self) -> Source {
        let custom = |column: &str, bind| Source::Lookup {
            sql: format!(
                "SELECT login AS user, scopes, expires AS expires_at, starts AS not_before, revoked_at AS revoked, blocked, \
                note FROM public.keys WHERE {column} = $1"
            ),
            bind,
        };
        match self {
            Self::Legacy => Source::GitlabLegacy,
            Self::Pat => Source::GitlabPat,
            Self::PatDigest => Source::GitlabPatDigest(key_base()),
            Self::Hex => custom("digest", Bind::Sha256Hex),
            Self::Base64 => custom("base64", Bind::Sha256Base64),
        }
    }

    fn triggers(self, settings: &PostgresSettings) -> String {
        let column = match self {
            Self::Hex => Some("digest"),
            Self::Base64 => Some("base64"),
            _ => None,
        };
        triggers_sql(settings, column.map(|column| ("keys".to_owned(), column.to_owned())).as_ref()).unwrap()
    }

    fn insert(self, token: &str, record: &TokenRecord) -> Result<String, AdminError> {
        let no_place = || Err(AdminError::Store(NO_PLACE.into()));
        let time = |time: Option<u64>| time.map_or("NULL".into(), |time| format!("to_timestamp({time})"));
        let user = &record.user;
        let state = if record.blocked { "blocked" } else { "active" };
        let is_gitlab = !matches!(self, Self::Hex | Self::Base64);
        if is_gitlab && record.not_before.is_some()
            || self == Self::Legacy && (record.expires.is_some() || record.revoked.is_some())
        {
            return no_place();
        }
        Ok(match self {
            Self::Legacy => format!(
                "INSERT INTO users (username, authentication_token, state) VALUES ('{user}', '{token}', '{state}')"
            ),
            Self::Pat | Self::PatDigest => {
                let (column, value) = match self {
                    Self::Pat => ("token", token.to_owned()),
                    _ => ("token_digest", gitlab_digest(token)),
                };
                format!(
                    "WITH u AS (INSERT INTO users (username, state) VALUES ('{user}', '{state}') RETURNING id) \
                    INSERT INTO personal_access_tokens (user_id, {column}, revoked, expires_at, scopes) \
                    SELECT id, '{value}', {}, {} AT TIME ZONE 'UTC', E'---\\n- api\\n- read_user\\n' FROM u",
                    record.revoked.is_some(),
                    time(record.expires),
                )
            }
            Self::Hex | Self::Base64 => format!(
                "INSERT INTO keys VALUES ('{}', '{}', '{user}', '[\"api\", \"read_user\"]', {}, {}, {}, {}, 'n')",
                record.digest.to_hex(),
                BASE64.encode(record.digest.as_bytes()),
                record.expires.map_or("NULL".into(), |time| time.to_string()),
                time(record.not_before),
                time(record.revoked),
                record.blocked,
            ),
        })
    }

    /// `WHERE` this is the row of a token.
    fn is(self, token: &str) -> String {
        match self {
            Self::Legacy => format!("authentication_token = '{token}'"),
            Self::Pat => format!("token = '{token}'"),
            Self::PatDigest => format!("token_digest = '{}'", gitlab_digest(token)),
            Self::Hex | Self::Base64 => format!("digest = '{}'", Digest::of(token.as_bytes()).to_hex()),
        }
    }

    fn revoke(self, token: &str) -> String {
        let is = self.is(token);
        match self {
            Self::Legacy => format!("UPDATE users SET authentication_token = 'new-' || id WHERE {is}"),
            Self::Pat | Self::PatDigest => format!("UPDATE personal_access_tokens SET revoked = true WHERE {is}"),
            Self::Hex | Self::Base64 => format!("UPDATE keys SET revoked_at = now() WHERE {is}"),
        }
    }

    fn nameless(self, token: &str) -> String {
        let is = self.is(token);
        match self {
            Self::Legacy => format!("UPDATE users SET username = NULL WHERE {is}"),
            Self::Pat | Self::PatDigest => format!(
                "UPDATE users SET username = '' WHERE id = (SELECT user_id FROM personal_access_tokens WHERE {is})"
            ),
            Self::Hex | Self::Base64 => format!("UPDATE keys SET scopes = '{{}}' WHERE {is}"),
        }
    }
}

fn gitlab_digest(token: &str) -> String {
    let text = format!("{token}{}", "k".repeat(32));
    BASE64.encode(Digest::of(text.as_bytes()).as_bytes())
}

#[test]
fn gitlab_digests_are_gitlabs() {
    assert_eq!(gitlab_digest("TOKEN"), "MZRJsAHKPNWLul8gyWIC7seu2tnRrgtbhiUIHTrGvqc=");
}

/// The token for a digest, of those that the suite uses.
fn token_of(digest: &Digest) -> String {
    let mut tokens: Vec<String> =
        ["known", "in-force", "ends-later", "began", "expired", "revoked", "not-yet", "blocked"]
            .into_iter()
            .chain(["both", "spoiled"])
            .map(str::to_owned)
            .collect();
    tokens.push("x".repeat(255));
    tokens.extend((0..20).map(|round| format!("heard-{round}")));
    tokens.into_iter().find(|token| Digest::of(token.as_bytes()) == *digest).expect("add the token to this list")
}

struct ForeignSubject {
    server: Arc<Mutex<Postgres>>,
    kind: Foreign,
}

impl ForeignSubject {
    async fn new(kind: Foreign) -> Self {
        Self::on(Postgres::start(), kind).await
    }

    async fn on(server: Postgres, kind: Foreign) -> Self {
        server.psql("postgres", Foreign::TABLES);
        let settings = settings(&server, kind.source());
        // Must be repeatable.
        for _ in 0..2 {
            run_triggers_sql(&settings, &kind.triggers(&settings)).await.unwrap();
        }
        Self { server: Arc::new(Mutex::new(server)), kind }
    }
}

/// Writes to another program's table as that program would.
struct ForeignAdmin {
    server: Arc<Mutex<Postgres>>,
    kind: Foreign,
}

#[async_trait]
impl TokenAdmin for ForeignAdmin {
    async fn create(&mut self, record: &TokenRecord) -> Result<(), AdminError> {
        let sql = self.kind.insert(&token_of(&record.digest), record)?;
        self.server.lock().try_psql("postgres", &sql).map(drop).map_err(|why| match why.contains("duplicate key") {
            true => AdminError::Exists,
            false => AdminError::Store(why),
        })
    }
    async fn revoke(&mut self, digest: &Digest, _: u64) -> Result<bool, AdminError> {
        self.server.lock().psql("postgres", &self.kind.revoke(&token_of(digest)));
        Ok(true)
    }
    async fn import(&mut self, _: Records<'_>) -> Result<Imported, AdminError> {
        unreachable!()
    }
    async fn list(&mut self) -> Result<Vec<TokenRecord>, AdminError> {
        unreachable!()
    }
    async fn find(&mut self, _: &str) -> Result<Vec<TokenRecord>, AdminError> {
        unreachable!()
    }
    async fn rotate(&mut self, _: &Digest, _: &TokenRecord, _: u64, _: u64) -> Result<(), AdminError> {
        unreachable!()
    }
    async fn block(&mut self, _: &str, _: bool) -> Result<u64, AdminError> {
        unreachable!()
    }
    async fn wait(&mut self, _: Duration) -> Result<Vec<String>, AdminError> {
        unreachable!()
    }
}

#[async_trait]
impl Subject for ForeignSubject {
    fn name(&self) -> &'static str {
        self.kind.name()
    }

    fn features(&self) -> Features {
        Features {
            hears: true,
            keeps_all: false,
            is_ours: false,
            waits: false,
            has_server: true,
            spoils: true,
            tells_why: true,
        }
    }

    async fn admin(&self) -> Box<dyn TokenAdmin> {
        Box::new(ForeignAdmin { server: Arc::clone(&self.server), kind: self.kind })
    }

    fn open(&self) -> Arc<dyn TokenStore> {
        open(settings(&self.server.lock(), self.kind.source()))
    }

    async fn spoil(&self, token: &str) {
        self.server.lock().psql("postgres", &self.kind.nameless(token));
    }

    async fn fault(&self, fault: Fault) {
        self.server.lock().inject(fault);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gitlab_legacy_holds_the_contract() {
    run(&ForeignSubject::new(Foreign::Legacy).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gitlab_pat_holds_the_contract() {
    run(&ForeignSubject::new(Foreign::Pat).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gitlab_pat_digest_holds_the_contract() {
    run(&ForeignSubject::new(Foreign::PatDigest).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn anybodys_hex_digests_hold_the_contract() {
    run(&ForeignSubject::new(Foreign::Hex).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn anybodys_base64_digests_hold_the_contract() {
    run(&ForeignSubject::new(Foreign::Base64).await).await;
}

#[tokio::test]
async fn gitlabs_rules_for_scopes_and_revocation() {
    let server = Postgres::start();
    server.psql("postgres", Foreign::TABLES);
    server.psql(
        "postgres",
        "INSERT INTO users (username, authentication_token) VALUES ('ann', 'legacy');
         INSERT INTO personal_access_tokens (user_id, token, revoked, scopes, expires_at) VALUES
            (1, 'null-revoked', NULL, NULL, NULL), (1, 'no-scopes', false, E'--- []\\n', NULL),
            (1, 'column', false, NULL, 'infinity'), (1, 'symbols', false, E'---\\n- :api\\n', '2100-01-01 00:00:00.5');",
    );
    let pat = open(settings(&server, Source::GitlabPat));
    let scopes = async |token: &str| lookup(&*pat, token.as_bytes()).await.unwrap().scopes;
    assert!(lookup(&*pat, b"null-revoked").await.unwrap().revoked.is_some(), "NULL means revoked");
    assert_eq!(scopes("no-scopes").await, Vec::<String>::new());
    assert_eq!(scopes("column").await, ["api"], "without scopes: GitLab's default");
    assert_eq!(scopes("symbols").await, ["api"]);
    assert_eq!(lookup(&*pat, b"column").await.unwrap().expires, None);
    assert_eq!(lookup(&*pat, b"symbols").await.unwrap().expires, Some(4_102_444_800));
    // GitLab before 8.15 has no such column.
    server.psql("postgres", "ALTER TABLE personal_access_tokens DROP COLUMN scopes");
    assert_eq!(scopes("column").await, ["api"]);
    let legacy = open(settings(&server, Source::GitlabLegacy));
    let found = lookup(&*legacy, b"legacy").await.unwrap();
    assert_eq!((found.user.as_str(), found.scopes), ("ann", vec!["api".to_owned()]));
}

#[tokio::test]
async fn a_schema_that_does_not_fit_cannot_tell() {
    let server = Postgres::start();
    let store = open(settings(&server, own()));
    let why = async |store: &dyn TokenStore| match ask(store, b"known").await {
        Err(StoreError::Unusable(why)) => why,
        other => panic!("{other:?}"),
    };
    assert!(why(&*store).await.contains("tollgate store migrate"), "no schema at all");
    let none = PostgresAdmin::open(&settings(&server, own())).await.err().unwrap().to_string();
    assert!(none.contains("tollgate store migrate"), "{none}");
    assert_eq!(PostgresAdmin::migrate(&settings(&server, own())).await.unwrap().version, 4);
    assert_eq!(PostgresAdmin::migrate(&settings(&server, own())).await.unwrap().version, 4, "repeated");
    assert_eq!(lookup(&*store, b"known").await, None);
    server.psql("postgres", "UPDATE tollgate.version SET version = 9");
    assert_eq!(lookup(&*store, b"known").await, None, "a newer schema that this version may read");
    server.psql("postgres", "UPDATE tollgate.version SET readers_from = 9");
    assert!(why(&*store).await.contains("newer tollgate"));
    let newer = PostgresAdmin::open(&settings(&server, own())).await.err().unwrap().to_string();
    assert!(newer.contains("newer tollgate"), "{newer}");
    server.psql("postgres", "UPDATE tollgate.version SET version = 0, readers_from = 0");
    assert!(why(&*store).await.contains("too old"));
    server.psql("postgres", "DELETE FROM tollgate.version");
    assert!(why(&*store).await.contains("version"));
    // Another program's table with that name.
    server.psql(
        "postgres",
        "DROP SCHEMA tollgate CASCADE; CREATE SCHEMA tollgate; CREATE TABLE tollgate.version (a int)",
    );
    let text = why(&*store).await;
    assert!(text.contains("42P01") && text.contains("tollgate store migrate"), "{text}");
    let ear = Ear::on(&store);
    ear.heard(Instant::now() - Duration::from_secs(60), "deafness", |event| *event == Event::Deaf).await;
}

/// The tables, functions and triggers as tollgate made them before tokens had terms.
fn make_schema_3(server: &Postgres) {
    let of = |name: &str| std::fs::read_to_string(crate::servers::repository("src/store/postgres").join(name)).unwrap();
    let mut triggers = of("triggers.sql");
    for row in ["", "OLD.", "NEW."] {
        let terms = format!(", {row}plan, {row}rate, {row}networks, {row}methods");
        assert!(triggers.contains(&terms));
        triggers = triggers.replace(&terms, "");
    }
    assert!(!triggers.contains("plan"));
    let sql = ["1.sql", "2.sql", "3.sql"].map(of).join(";") + &triggers;
    let sql = sql.replace("{schema}", "\"tollgate\"");
    server.psql("postgres", &format!("CREATE SCHEMA tollgate; {sql}; UPDATE tollgate.version SET version = 3"));
}

/// A gateway that is newer than the tables goes on, and through the migration; what the tables cannot keep is an error.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_without_terms_are_read_and_refuse_them() {
    let server = Postgres::start();
    make_schema_3(&server);
    let store = open(settings(&server, own()));
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    let mut admin = PostgresAdmin::open(&settings(&server, own())).await.unwrap();
    admin.create(&record("known")).await.unwrap();
    let mut lines = [record("imported"), record("known")].into_iter().map(Ok);
    assert_eq!(admin.import(&mut lines).await.unwrap().new, 1);
    assert_eq!(lookup(&*store, b"known").await, Some(record("known")));
    assert_eq!(lookup(&*store, b"nobody").await, None);
    // Several at a time are another statement.
    let several = [b"known".as_slice(), b"imported", b"nobody"].map(|token| lookup(&*store, token));
    let several = futures_util::future::join_all(several).await;
    assert_eq!(several, [Some(record("known")), Some(record("imported")), None]);
    assert_eq!(admin.list().await.unwrap().len(), 2);
    let bound = TokenRecord { terms: super::terms("gold", "", &["10.0.0.0/8"], &[]), ..record("bound") };
    let mut lines = [bound.clone()].into_iter().map(Ok);
    let imported = admin.import(&mut lines).await.err().map(|why| why.to_string());
    for why in [admin.create(&bound).await.unwrap_err().to_string(), imported.unwrap()] {
        assert!(why.contains("version 3") && why.contains("tollgate store migrate"), "{why}");
    }
    assert_eq!(lookup(&*store, b"bound").await, None);
    assert!(!ear.events().contains(&Event::Deaf), "{:?}", ear.events());
    // The store's statements are prepared by now.
    PostgresAdmin::migrate(&settings(&server, own())).await.unwrap();
    let mut admin = PostgresAdmin::open(&settings(&server, own())).await.unwrap();
    admin.create(&bound).await.unwrap();
    assert_eq!(lookup(&*store, b"bound").await, Some(bound));
    assert_eq!(lookup(&*store, b"known").await, Some(record("known")));
    assert_eq!(server.psql("postgres", "SELECT readers_from FROM tollgate.version"), "4");
    // The operator's own statement is heard.
    let before = Instant::now();
    let digest = Digest::of(b"known").to_hex();
    server.psql(
        "postgres",
        &format!("UPDATE tollgate.token SET networks = '{{192.0.2.1}}', rate = '9/s' WHERE digest = '\\x{digest}'"),
    );
    ear.change_of(before, &*store, "known").await;
    let wanted = TokenRecord { terms: super::terms("", "9/s", &["192.0.2.1"], &[]), ..record("known") };
    assert_eq!(lookup(&*store, b"known").await, Some(wanted));
    // What cannot be understood is no missing bound.
    server.psql("postgres", "UPDATE tollgate.token SET networks = '{everywhere}'");
    assert!(matches!(ask(&*store, b"known").await, Err(StoreError::Garbage(why)) if why.contains("networks must be")));
}

/// In the operator's own query, columns of these names are read, whatever form they have, or are an error.
#[tokio::test]
async fn an_operators_query_says_how_a_token_may_be_used() {
    let server = Postgres::start();
    let lookup_by = |sql: &str| Source::Lookup { sql: sql.into(), bind: Bind::Plain };
    server.psql(
        "postgres",
        "CREATE TABLE t (token text, who text, plan varchar(80), rate text, networks text[], methods jsonb, nets cidr[]);
         INSERT INTO t VALUES
            ('all', 'ann', 'gold', '600/min burst 5', '{10.0.0.0/8,2001:db8::/32}', '[\"GET\",\"HEAD\"]', '{10.0.0.0/8}'),
            ('none', 'ann', NULL, NULL, NULL, NULL, NULL), ('empty', 'ann', '', '', '{}', '[]', '{}'),
            ('else', 'ann', 'Gold, until 2027', '', '{}', '[]', '{}'), ('often', 'ann', '', 'often', '{}', '[]', '{}'),
            ('far', 'ann', '', '', '{far away}', '[]', '{}'), ('get', 'ann', '', '', '{}', '[\"get\"]', '{}'),
            ('null', 'ann', '', '', '{NULL}', '[]', '{}')",
    );
    let all = open(settings(&server, lookup_by("SELECT who AS user, t.* FROM public.t WHERE token = $1")));
    let said = |terms| TokenRecord { terms, ..TokenRecord::new(Digest::of(b""), "ann") }.terms;
    let found = async |token: &str| lookup(&*all, token.as_bytes()).await.unwrap().terms;
    let networks = ["10.0.0.0/8", "2001:db8::/32"];
    assert_eq!(found("all").await, said(super::terms("gold", "600/min burst 5", &networks, &["GET", "HEAD"])));
    assert_eq!((found("none").await, found("empty").await), (None, None));
    for (token, column) in [
        ("else", "column plan"),
        ("often", "column rate"),
        ("far", "column networks"),
        ("get", "column methods"),
        ("null", "text"),
    ] {
        match ask(&*all, token.as_bytes()).await {
            Err(StoreError::Garbage(why)) => assert!(why.contains(column) && !why.contains("2027"), "{token}: {why}"),
            other => panic!("{token}: {other:?}"),
        }
    }
    for (columns, wanted) in [
        (
            "'10.0.0.0/8 ::1'::text AS networks, 'GET'::text AS methods",
            super::terms("", "", &["10.0.0.0/8", "::1"], &["GET"]),
        ),
        ("nets::text[] AS networks", super::terms("", "", &["10.0.0.0/8"], &[])),
        // Another name is another column, as ever.
        ("plan AS billing, rate AS price", None),
    ] {
        let store = open(settings(
            &server,
            lookup_by(&format!("SELECT who AS user, {columns} FROM public.t WHERE token = $1")),
        ));
        assert_eq!(lookup(&*store, b"all").await.unwrap().terms, wanted, "{columns}");
    }
    for (columns, part) in [
        ("nets AS networks", "column networks of the lookup query is of type _cidr"),
        ("5 AS rate", "column rate of the lookup query is of type int4"),
        ("5 AS plan", "column plan of the lookup query is of type int4"),
        ("true AS methods", "column methods of the lookup query is of type bool"),
        ("plan, rate AS plan", "several columns plan"),
    ] {
        let store = open(settings(
            &server,
            lookup_by(&format!("SELECT who AS user, {columns} FROM public.t WHERE token = $1")),
        ));
        match ask(&*store, b"all").await {
            Err(StoreError::Unusable(why)) => assert!(why.contains(part), "{columns}: {why}"),
            other => panic!("{columns}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn migrations_at_the_same_time_make_one_schema() {
    let server = Postgres::start();
    let settings = settings(&server, own());
    let versions = futures_util::future::join_all((0..8).map(|_| PostgresAdmin::migrate(&settings))).await;
    for migrated in versions {
        assert_eq!(migrated.unwrap().version, 4);
    }
    assert_eq!(server.psql("postgres", "SELECT count(*) FROM tollgate.version"), "1");
}

#[tokio::test]
async fn queries_that_make_no_sense_are_no_answer() {
    let server = Postgres::start();
    server.psql(
        "postgres",
        "CREATE TABLE t (token text, who text, n integer, d date, raw bytea, stamp timestamptz, flag boolean);
         INSERT INTO t VALUES ('once', 'ann', 1, '2030-01-02', 'x', now(), NULL);
         INSERT INTO t VALUES ('twice', 'bob'), ('twice', 'eve')",
    );
    let lookup_by = |sql: &str| Source::Lookup { sql: sql.into(), bind: Bind::Plain };
    for (sql, token, part) in [
        ("SELECT who AS user FROM public.t WHERE token = $1", "twice", "two rows"),
        ("SELECT n AS user FROM public.t WHERE token = $1", "once", "cast it"),
        ("SELECT n AS user FROM public.t WHERE token = $1", "nobody", "cast it"),
        ("SELECT who FROM public.t WHERE token = $1", "once", "no column user"),
        ("SELECT who AS user, n AS revoked, n AS revoked_at FROM public.t WHERE token = $1", "once", "several columns"),
        ("SELECT who AS user, who AS expires_at FROM public.t WHERE token = $1", "nobody", "expires_at"),
        ("SELECT who AS user, n AS blocked FROM public.t WHERE token = $1", "nobody", "blocked"),
        ("SELECT who AS user, n AS scopes FROM public.t WHERE token = $1", "nobody", "scopes"),
        ("SELECT NULL::text AS user FROM public.t WHERE token = $1", "once", "without a user"),
        ("SELECT who AS user FROM public.t WHERE tokn = $1", "once", "42703"),
        ("SELECT who AS user FROM public.nowhere WHERE token = $1", "once", "42P01"),
        // A name without a schema is searched in the catalog only, and the error says so.
        ("SELECT who AS user FROM t WHERE token = $1", "once", "with their schema, like public.people"),
        ("SELECT who AS user FROM public.t WHERE token = hidden($1)", "once", "with their schema, like public.people"),
        ("SELECT who AS user FROM public.t WHERE raw = $1", "once", "42883"),
        ("SELECT who AS user FROM public.t WHERE n = $1::integer", "S3CRET", "22P02"),
        ("SELECT who AS user FROM public.t WHERE token = $1 OR n = 1", "once", "nobody has"),
        ("SELECT who AS user FROM public.t WHERE n = 1 -- $1", "once", "nobody has"),
        ("SELECT who AS user, 1700000000000 AS expires_at FROM public.t WHERE token = $1", "once", "milliseconds"),
        ("SELEC $1", "once", "42601"),
    ] {
        let store = open(settings(&server, lookup_by(sql)));
        for _ in 0..2 {
            // What is wrong with one token's record says nothing of the others.
            let is_one = ["two rows", "without a user", "22P02", "milliseconds"].contains(&part);
            match ask(&*store, token.as_bytes()).await {
                Err(StoreError::Garbage(why)) if is_one => {
                    assert!(why.contains(part) && !why.contains("S3CRET"), "{sql}: {why}");
                }
                Err(StoreError::Unusable(why)) if !is_one => {
                    assert!(why.contains(part) && !why.contains("S3CRET"), "{sql}: {why}");
                }
                other => panic!("{sql}: {other:?}"),
            }
        }
    }
    // NULL in columns that make a token valid or invalid.
    let sql = "SELECT who AS user, flag AS revoked, flag AS blocked, d AS expires_at, *, n AS surplus FROM public.t WHERE token = $1";
    let found = lookup(&*open(settings(&server, lookup_by(sql))), b"once").await.unwrap();
    assert!(found.revoked.is_some() && found.blocked);
    assert_eq!(found.expires, Some(1_893_542_400), "2030-01-02T00:00:00Z");
    // A change of the table is used by the next lookup.
    let store = open(settings(&server, lookup_by("SELECT who AS user, t.* FROM public.t WHERE token = $1")));
    assert!(lookup(&*store, b"once").await.is_some());
    server.psql("postgres", "ALTER TABLE t ADD COLUMN expires bigint DEFAULT 5, ADD COLUMN more text");
    assert_eq!(lookup(&*store, b"once").await.unwrap().expires, Some(5));

    for sql in ["SELECT 1", "SELECT $1, $2"] {
        assert!(refused(settings(&server, lookup_by(sql))).contains("exactly one parameter"));
    }
    let short = Source::GitlabPatDigest(Secret::new("short"));
    assert!(refused(settings(&server, short)).contains("db_key_base"));
    assert!(refused(settings(&server, Source::Own { schema: "Bad\"name".into() })).contains("schema"));
}

#[tokio::test]
async fn a_slow_query_ends_with_its_look_up() {
    let server = Postgres::start();
    server.psql(
        "postgres",
        "CREATE TABLE t (token text, who text); INSERT INTO t VALUES ('slow', 'ann'), ('known', 'ann')",
    );
    let sql = "SELECT who AS user FROM public.t WHERE token = $1 AND (token <> 'slow' OR pg_sleep(20) IS NOT NULL)";
    let source = Source::Lookup { sql: sql.into(), bind: Bind::Plain };
    let store =
        open(PostgresSettings { connections: 2, timeout: Duration::from_millis(400), ..settings(&server, source) });
    let sleeping = || server.psql("postgres", "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'");
    assert!(lookup(&*store, b"known").await.is_some());
    let before = Instant::now();
    assert_eq!(ask(&*store, b"slow").await, Err(StoreError::Timeout), "the server ends the query");
    assert!(before.elapsed() < TIMEOUT);
    // After the caller is gone, the server must not continue.
    for _ in 0..3 {
        drop(tokio::time::timeout(Duration::from_millis(50), store.lookup(&credential(b"slow"))).await);
        let before = Instant::now();
        assert!(lookup(&*store, b"known").await.is_some());
        assert!(
            before.elapsed() < Duration::from_millis(350),
            "waited behind a cancelled lookup: {:?}",
            before.elapsed()
        );
    }
    let deadline = Instant::now() + PATIENCE;
    while sleeping() != "0" {
        assert!(Instant::now() < deadline, "the server continues the query");
    }
    // All connections in use: reported soon, and as overload.
    let slow = [b"slow", b"slow"].map(|token| {
        let store = Arc::clone(&store);
        tokio::spawn(async move { ask(&*store, token).await })
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let before = Instant::now();
    assert_eq!(ask(&*store, b"known").await, Err(StoreError::Overloaded));
    assert!(before.elapsed() < Duration::from_millis(390), "{:?}", before.elapsed());
    for slow in slow {
        assert_eq!(slow.await.unwrap(), Err(StoreError::Timeout));
    }
    recovers(&*store, "postgres").await;
    let open: u32 = server
        .psql("postgres", "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'tollgate %'")
        .parse()
        .unwrap();
    assert!(open <= 2, "{open} connections");
}

/// Connections that a burst of lookups opened are closed, and one stays.
#[tokio::test]
async fn a_pool_shrinks_after_a_burst() {
    const IDLE: Duration = Duration::from_secs(2);
    let server = Postgres::start();
    let settings = PostgresSettings { idle: IDLE, ..settings(&server, own()) };
    writer(&settings).await.create(&record("known")).await.unwrap();
    let store = open(settings);
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    let sessions = || -> usize {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'tollgate %'";
        server.psql("postgres", sql).parse().unwrap()
    };
    let burst = || futures_util::future::join_all((0..8).map(|_| lookup(&*store, b"known")));
    assert!(burst().await.iter().all(Option::is_some));
    assert_eq!(sessions(), 9, "and one that follows changes");
    let before = Instant::now();
    soon("one stays", || {
        let left = sessions();
        assert!(left == 9 || before.elapsed() > IDLE / 2, "{left} after {:?}", before.elapsed());
        left == 2
    })
    .await;
    assert!(lookup(&*store, b"known").await.is_some());
    assert_eq!(sessions(), 2, "it is the one that is used");
    assert!(burst().await.iter().all(Option::is_some));
}

#[tokio::test]
async fn encryption_is_what_was_asked_for() {
    let server = Postgres::start_with_tls(Authority::new());
    let other = Authority::new();
    server.psql("postgres", "CREATE TABLE t (token text, who text); INSERT INTO t VALUES ('known', 'ann')");
    let source = Source::Lookup { sql: "SELECT who AS user FROM public.t WHERE token = $1".into(), bind: Bind::Plain };
    let with = |host: &str, mode, ca: Option<&Authority>| {
        let ca = ca.map(|ca| ca.ca().into());
        open(PostgresSettings {
            url: Secret::new(format!("postgres://postgres@{host}:{}/postgres", server.port())),
            tls: TlsSettings { mode, ca, client: None },
            ..settings(&server, source.clone())
        })
    };
    let good = server.authority();
    for (host, mode, ca, works) in [
        ("127.0.0.1", TlsMode::Require, None, true),
        ("127.0.0.1", TlsMode::VerifyCa, good, true),
        ("127.0.0.1", TlsMode::VerifyFull, good, true),
        ("localhost", TlsMode::VerifyFull, good, true),
        ("127.0.0.2", TlsMode::Require, None, false),
        ("127.0.0.1", TlsMode::Disable, None, false),
        ("127.0.0.1", TlsMode::VerifyCa, Some(&other), false),
        ("127.0.0.1", TlsMode::VerifyFull, Some(&other), false),
    ] {
        let answer = ask(&*with(host, mode, ca), b"known").await;
        match &answer {
            Ok(Some(_)) => assert!(works, "{host} {mode:?}"),
            Err(StoreError::Unavailable(_)) => assert!(!works, "{host} {mode:?}: {answer:?}"),
            other => panic!("{host} {mode:?}: {other:?}"),
        }
    }
    // A name that is not in the certificate; `hostaddr` gives the address and `host` the name.
    let named = |mode| {
        let url = format!("host=db.example hostaddr=127.0.0.1 port={} user=postgres dbname=postgres", server.port());
        let tls = TlsSettings { mode, ca: good.map(|good| good.ca().into()), client: None };
        open(PostgresSettings { url: Secret::new(url), tls, ..settings(&server, source.clone()) })
    };
    assert!(ask(&*named(TlsMode::VerifyCa), b"known").await.is_ok());
    let wrong = ask(&*named(TlsMode::VerifyFull), b"known").await.unwrap_err().to_string();
    assert!(wrong.contains("certificate"), "{wrong}");
    // `hostaddr` is the address, even if `host` is a socket's folder.
    let url = format!("host=/nowhere hostaddr=127.0.0.1 port={} user=postgres dbname=postgres", server.port());
    for (mode, works) in [(TlsMode::VerifyFull, true), (TlsMode::Disable, false)] {
        let tls = TlsSettings { mode, ca: good.map(|good| good.ca().into()), client: None };
        let store = open(PostgresSettings { url: Secret::new(&url), tls, ..settings(&server, source.clone()) });
        assert_eq!(ask(&*store, b"known").await.is_ok(), works, "{mode:?}");
    }
    // Nor another machine, if plain text is allowed on this one only.
    let url = Secret::new("host=10.255.255.1 user=postgres dbname=postgres");
    let tls = TlsSettings { mode: TlsMode::Local, ca: None, client: None };
    let before = Instant::now();
    let answer = ask(&*open(PostgresSettings { url, tls, ..settings(&server, source.clone()) }), b"known").await;
    assert!(matches!(&answer, Err(StoreError::Unavailable(why)) if why.contains("another machine")), "{answer:?}");
    assert!(before.elapsed() < Duration::from_millis(500), "no connection was attempted");
    // Nothing is sent in plain text to a server without TLS.
    let plain = Postgres::start();
    plain.psql("postgres", "CREATE TABLE t (token text, who text)");
    let tls = TlsSettings { mode: TlsMode::Require, ca: None, client: None };
    let answer = ask(&*open(PostgresSettings { tls, ..settings(&plain, source.clone()) }), b"known").await;
    assert!(matches!(&answer, Err(StoreError::Unavailable(why)) if why.contains("TLS")), "{answer:?}");
    // A Unix socket needs no TLS.
    let url = format!("host={} port={} user=postgres dbname=postgres", server.socket().display(), server.port());
    let tls = TlsSettings { mode: TlsMode::VerifyFull, ca: good.map(|good| good.ca().into()), client: None };
    let store = open(PostgresSettings { url: Secret::new(url), tls, ..settings(&server, source.clone()) });
    assert!(lookup(&*store, b"known").await.is_some());
    // Settings that contradict each other.
    let url = Secret::new("postgres://postgres@127.0.0.1/postgres?sslmode=require");
    assert!(refused(PostgresSettings { url, ..settings(&server, source.clone()) }).contains("sslmode"));
}

#[tokio::test]
async fn no_error_says_a_password() {
    let server = Postgres::start();
    server.psql("postgres", "CREATE USER guarded PASSWORD 'pa55-word'; CREATE TABLE t (token text, who text)");
    server.psql("postgres", "GRANT SELECT ON t TO guarded");
    let source = Source::Lookup { sql: "SELECT who AS user FROM public.t WHERE token = $1".into(), bind: Bind::Plain };
    let with = |password: &str, instead: Option<&str>| PostgresSettings {
        url: Secret::new(format!("postgres://guarded:{password}@127.0.0.1:{}/postgres", server.port())),
        password: instead.map(Secret::new),
        ..settings(&server, source.clone())
    };
    assert_eq!(ask(&*open(with("pa55-word", None)), b"t").await, Ok(None));
    assert_eq!(ask(&*open(with("S3CRET", Some("pa55-word"))), b"t").await, Ok(None), "the setting takes precedence");
    for settings in [with("S3CRET", None), with("pa55-word", Some("S3CRET"))] {
        let printed = format!("{settings:?}");
        let answer = ask(&*open(settings), b"t").await;
        assert!(matches!(&answer, Err(StoreError::Unavailable(why)) if why.contains("28P01")), "{answer:?}");
        assert!(!format!("{answer:?}{printed}").contains("S3CRET"), "{answer:?}{printed}");
    }
    for url in [
        "postgres://u:S3CRET@h:port/",
        "S3CRET",
        "user=a passwrd=S3CRET",
        "postgres://u:S3CRET@/db",
        "host=h port=S3CRET",
    ] {
        let why = refused(PostgresSettings { url: Secret::new(url), ..settings(&server, source.clone()) });
        assert!(why.starts_with("url: ") && !why.contains("S3CRET"), "{why}");
    }
}

#[tokio::test]
async fn missing_rights_are_named_as_such() {
    let server = Postgres::start();
    server.psql("postgres", "CREATE USER outsider PASSWORD 'pa55-word'; CREATE TABLE t (token text, who text)");
    let sql = "SELECT who AS user FROM public.t WHERE token = $1".into();
    let settings = PostgresSettings {
        url: Secret::new(format!("postgres://outsider:pa55-word@127.0.0.1:{}/postgres", server.port())),
        ..settings(&server, Source::Lookup { sql, bind: Bind::Plain })
    };
    let answer = ask(&*open(settings), b"some-token").await;
    assert!(
        matches!(&answer, Err(StoreError::Denied(why)) if why.contains("permission denied for table t")),
        "{answer:?}"
    );
    assert_eq!(answer.unwrap_err().kind(), "unavailable", "the store as a whole, and not one record");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn triggers_tell_of_all_that_matters_and_of_no_token() {
    let server = Postgres::start();
    server.psql("postgres", Foreign::TABLES);
    for kind in [Foreign::Legacy, Foreign::Pat, Foreign::PatDigest, Foreign::Hex] {
        let settings = settings(&server, kind.source());
        run_triggers_sql(&settings, &kind.triggers(&settings)).await.unwrap();
    }
    let (hex, listened) = (
        |text: &str| Digest::of(text.as_bytes()).to_hex(),
        |text: &str| {
            let handle = BASE64.decode(gitlab_digest(text)).unwrap();
            format!("h:{}", Digest::from_bytes(handle.try_into().unwrap()).to_hex())
        },
    );
    // The notifications of a statement, which psql prints after it.
    let told = |sql: &str| -> Vec<String> {
        let heard = server.psql("postgres", &format!("LISTEN tollgate_change; {sql}"));
        heard
            .lines()
            .filter_map(|line| Some(line.split_once("with payload \"")?.1.split_once('"')?.0.to_owned()))
            .map(|word| word.split(' ').next().unwrap().to_owned())
            .collect()
    };
    server.psql(
        "postgres",
        "INSERT INTO users (username, authentication_token) VALUES ('ann', 'T0KEN-ann'), ('bob', 'T0KEN-bob')",
    );
    let digest = gitlab_digest("T0KEN-two");
    let words = told(&format!(
        "INSERT INTO personal_access_tokens (user_id, token, token_digest) VALUES (1, 'T0KEN-one', NULL), (1, NULL, '{digest}')"
    ));
    assert_eq!(words, [hex("T0KEN-one"), listened("T0KEN-two")]);
    let mut ann = vec![hex("T0KEN-ann"), hex("T0KEN-one"), listened("T0KEN-two")];
    ann.sort();
    for (sql, expected) in [
        ("UPDATE users SET state = 'blocked' WHERE id = 1", ann.clone()),
        ("UPDATE users SET username = 'anne' WHERE id = 1", ann.clone()),
        ("UPDATE users SET updated_at = now() WHERE id = 1", vec![]),
        ("UPDATE users SET authentication_token = 'T0KEN-new' WHERE id = 2", vec![hex("T0KEN-bob"), hex("T0KEN-new")]),
        ("UPDATE personal_access_tokens SET revoked = true WHERE id = 1", vec![hex("T0KEN-one")]),
        ("UPDATE personal_access_tokens SET expires_at = now() WHERE id = 2", vec![listened("T0KEN-two")]),
        ("UPDATE personal_access_tokens SET last_used_at = now()", vec![]),
        ("UPDATE personal_access_tokens SET token = 'T0KEN-3' WHERE id = 1", vec![hex("T0KEN-one"), hex("T0KEN-3")]),
        ("DELETE FROM personal_access_tokens WHERE id = 1", vec![hex("T0KEN-3")]),
        ("DELETE FROM users WHERE id = 1", vec![hex("T0KEN-ann"), listened("T0KEN-two")]),
        ("INSERT INTO keys (digest) VALUES (upper(repeat('aB', 32))), ('no digest')", vec!["ab".repeat(32)]),
        ("TRUNCATE keys", vec!["*".into()]),
    ] {
        let mut words = told(sql);
        let mut expected = expected;
        words.sort();
        expected.sort();
        assert_eq!(words, expected, "{sql}");
        assert!(!words.join(" ").contains("T0KEN"));
    }
    // However many there are.
    let many = "INSERT INTO keys (digest) SELECT encode(sha256(n::text::bytea), 'hex') FROM generate_series(1, 5000) n";
    let words = told(many);
    assert!(words.len() == 5_000 && !words.contains(&"*".to_owned()), "{}", words.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn own_triggers_tell_whoever_changes_the_rows() {
    let server = Postgres::start();
    let mut admin = writer(&settings(&server, own())).await;
    let store = open(settings(&server, own()));
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    let before = Instant::now();
    admin.create(&record("known")).await.unwrap();
    let digest = Digest::of(b"known").to_hex();
    ear.change_of(before, &*store, "known").await;
    for sql in [
        format!("UPDATE tollgate.token SET blocked = true WHERE digest = '\\x{digest}'"),
        format!("UPDATE tollgate.token SET scopes = '{{a}}' WHERE digest = '\\x{digest}'"),
        format!("DELETE FROM tollgate.token WHERE digest = '\\x{digest}'"),
    ] {
        let before = Instant::now();
        server.psql("postgres", &sql);
        ear.change_of(before, &*store, "known").await;
    }
    let mark = |sql: &str| {
        server.psql("postgres", &format!("SELECT {sql} || ' ' || txid_snapshot_xmin(txid_current_snapshot())"))
    };
    let now = mark("(extract(epoch FROM clock_timestamp()) * 1000)::bigint");
    let earlier = |ms: &str| mark(&format!("(extract(epoch FROM clock_timestamp()) * 1000)::bigint - {ms}"));
    assert_eq!(store.changed_since(&earlier("60000")).await, Ok(None), "before the list of changes began");
    assert_eq!(store.changed_since(&now).await, Ok(Some(vec![Digest::of(b"known")])));
    assert_eq!(store.changed_since(&earlier("3600000")).await, Ok(None), "older than the list");
    for nonsense in ["", "1", "x y", "1 2 3"] {
        assert_eq!(store.changed_since(nonsense).await, Ok(None), "{nonsense:?}");
    }
    // A use is not a change; TRUNCATE is.
    let before = Instant::now();
    admin.create(&record("used")).await.unwrap();
    ear.change_of(before, &*store, "used").await;
    let heard = ear.events().len();
    store.note_uses(vec![(Digest::of(b"used"), 1_700_000_060_000)]).await.unwrap();
    store.note_uses(vec![(Digest::of(b"used"), 1_600_000_000_000)]).await.unwrap();
    assert_eq!(lookup(&*store, b"used").await.unwrap().last_used, Some(1_700_000_060), "never backwards");
    let before = Instant::now();
    server.psql("postgres", "TRUNCATE tollgate.token");
    ear.hearing(before).await;
    assert_eq!(ear.events().len(), heard + 1, "{:?}", ear.events());
    assert_eq!(store.changed_since(&now).await, Ok(None), "everything");
}

/// The position of a probe, and a transaction that began long before it and ends after it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mark_misses_no_transaction_that_had_not_ended() {
    let server = Postgres::start();
    let mut admin = writer(&settings(&server, own())).await;
    for token in ["early", "late", "never"] {
        admin.create(&record(token)).await.unwrap();
    }
    let digest = |token: &str| Digest::of(token.as_bytes());
    let update =
        |token: &str| format!("UPDATE tollgate.token SET revoked = 1 WHERE digest = '\\x{}'", digest(token).to_hex());
    let (client, driver) = tokio_postgres::connect(&server.url("postgres"), tokio_postgres::NoTls).await.unwrap();
    let driver = tokio::spawn(driver);
    client.batch_execute(&format!("BEGIN; SAVEPOINT a; {}", update("early"))).await.unwrap();
    let store = open(settings(&server, own()));
    let (told, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let following = tokio::spawn({
        let store = Arc::clone(&store);
        async move {
            store
                .follow(&move |event| {
                    if let Event::Alive { mark: Some(mark), .. } = event {
                        drop(told.send(mark));
                    }
                })
                .await;
        }
    });
    let mark = tokio::time::timeout(PATIENCE, heard.recv()).await.unwrap().unwrap();
    following.abort();
    server.psql("postgres", &update("late"));
    client.batch_execute("COMMIT").await.unwrap();
    // As if all changes were older than the minute that is always re-read.
    server.psql("postgres", "UPDATE tollgate.version SET since_ms = 0");
    let (at_ms, oldest) = mark.split_once(' ').unwrap();
    let skewed = format!("{} {oldest}", at_ms.parse::<u64>().unwrap() + 120_000);
    let mut changed = store.changed_since(&skewed).await.unwrap().unwrap();
    changed.retain(|found| *found != digest("never"));
    assert!(changed.contains(&digest("early")) && changed.contains(&digest("late")), "{changed:?}");
    assert_eq!(changed.len(), 2);
    driver.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn storms_and_losses_are_weathered() {
    let server = Postgres::start();
    let mut admin = writer(&settings(&server, own())).await;
    let store = open(settings(&server, own()));
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    // An import names its tokens: nobody has to doubt all others.
    let rows = 20_000;
    let mut records = (0..rows).map(|row| Ok(record(&format!("row-{row}"))));
    let before = Instant::now();
    assert_eq!(admin.import(&mut records).await.unwrap().new, rows);
    let took = before.elapsed();
    println!("{rows} rows imported in {took:?}");
    assert!(took < Duration::from_secs(20), "{took:?}");
    let count = || -> usize {
        ear.events().iter().map(|event| if let Event::Changed(changes) = event { changes.len() } else { 0 }).sum()
    };
    soon("all are named", || count() == 20_000).await;
    assert_eq!(ear.events().iter().filter(|event| **event == Event::Hearing).count(), 1);
    let imported = ear.events().len();
    // One statement per row: all notifications arrive, in few batches.
    let before = Instant::now();
    let storm = "DO $$ BEGIN FOR n IN 0..19999 LOOP UPDATE tollgate.token SET revoked = 1 \
        WHERE digest = sha256(('row-' || n)::bytea); END LOOP; END $$";
    server.psql("postgres", storm);
    ear.change_of(before, &*store, "row-19999").await;
    let events = ear.events().split_off(imported);
    let pieces = events.iter().filter(|event| matches!(event, Event::Changed(_))).count();
    let told: usize =
        events.iter().map(|event| if let Event::Changed(changes) = event { changes.len() } else { 0 }).sum();
    // Only on a very busy machine the subscription is lost, which is an event.
    assert!(told == 20_000 || events.contains(&Event::Deaf), "{told}");
    println!("20000 notifications in {pieces} batches, {:?} after the statement began", before.elapsed());
    assert!(pieces < 5_000, "{pieces}");
    // The connection is lost repeatedly.
    for _ in 0..5 {
        let before = Instant::now();
        server.cut();
        let cut = Instant::now();
        ear.heard(before, "deafness", |event| *event == Event::Deaf).await;
        let lag = ear.hearing(before).await.saturating_duration_since(cut);
        assert!(lag < LAG, "{lag:?}");
    }
    // An invalid notification from another program: everything may have changed.
    let before = Instant::now();
    server.psql("postgres", "NOTIFY tollgate_change, 'hello'");
    ear.hearing(before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_learns_who_did_not_hear() {
    let server = Postgres::start();
    let mut admin = writer(&settings(&server, own())).await;
    assert_eq!(admin.wait(Duration::from_secs(1)).await.unwrap(), Vec::<String>::new(), "no gateway is running");
    let stores = [open(settings(&server, own())), open(settings(&server, own()))];
    let begin = Instant::now();
    let mut ears: Vec<Ear> = stores.iter().map(Ear::on).collect();
    for ear in &ears {
        ear.hearing(begin).await;
    }
    assert_eq!(admin.wait(PATIENCE).await.unwrap().len(), 2);
    // A gateway ends without signing off: it is missing, and removed after a while.
    drop(ears.pop());
    soon("the other one leaves", || server.psql("postgres", "SELECT count(*) FROM tollgate.replica") == "1").await;
    server.psql("postgres", "INSERT INTO tollgate.replica (id, name) VALUES ('dead', 'dead')");
    match admin.wait(Duration::from_millis(300)).await {
        Err(AdminError::Unconfirmed { missing, .. }) => assert_eq!(missing, ["dead"]),
        other => panic!("{other:?}"),
    }
    let before = Instant::now();
    assert_eq!(admin.wait(PATIENCE).await.unwrap().len(), 1);
    assert!(before.elapsed() < Duration::from_secs(12), "{:?}", before.elapsed());
    // A gateway without a subscription confirms once it has one again.
    let waiting = {
        server.cut();
        PostgresAdmin::open(&settings(&server, own())).await.unwrap().wait(PATIENCE).await.unwrap()
    };
    assert_eq!(waiting.len(), 1);
    assert_eq!(server.psql("postgres", "SELECT count(*) FROM tollgate.wait"), "0", "no rows are left");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_triggers_nothing_is_promised() {
    let server = Postgres::start();
    server.psql("postgres", Foreign::TABLES);
    let settings = settings(&server, Source::GitlabPat);
    let store = open(settings.clone());
    let begin = Instant::now();
    let ear = Ear::on(&store);
    let channels = || server.psql("postgres", "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%tgname%'");
    let deadline = Instant::now() + PATIENCE;
    while channels() == "0" {
        assert!(Instant::now() < deadline, "it did not subscribe");
    }
    ear.heard(begin, "nothing to tell", |event| *event == Event::Untold).await;
    server.psql("postgres", "NOTIFY tollgate_change, '*'");
    server.cut();
    let is_silent = || ear.events().iter().all(|event| *event == Event::Untold);
    assert!(is_silent(), "{:?}", ear.events());
    // Triggers of another table do not count; the right ones are found once they exist.
    let legacy = PostgresSettings { source: Source::GitlabLegacy, ..settings.clone() };
    run_triggers_sql(&legacy, &Foreign::Legacy.triggers(&legacy)).await.unwrap();
    server.cut();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(is_silent(), "{:?}", ear.events());
    let before = Instant::now();
    run_triggers_sql(&settings, &Foreign::Pat.triggers(&settings)).await.unwrap();
    ear.hearing(before).await;
    let silent = open(PostgresSettings { channel: None, ..settings });
    let mute = tokio::time::timeout(Duration::from_millis(200), silent.follow(&|event| panic!("{event:?}"))).await;
    assert!(mute.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_answers_and_promises_nothing() {
    let primary = Postgres::start();
    let mut admin = writer(&settings(&primary, own())).await;
    admin.create(&record("known")).await.unwrap();
    let standby = primary.standby();
    let store = open(settings(&standby, own()));
    assert_eq!(lookup(&*store, b"known").await, Some(record("known")));
    assert_eq!(lookup(&*store, b"nobody").await, None);
    let use_of_known = vec![(Digest::of(b"known"), 1_700_000_000_000)];
    assert!(matches!(store.note_uses(use_of_known).await, Err(StoreError::Unavailable(why)) if why.contains("25006")));
    assert!(lookup(&*store, b"known").await.is_some());
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.heard(begin, "deafness", |event| *event == Event::Deaf).await;
    assert!(!ear.events().contains(&Event::Hearing));
    // Once it is the primary, its changes are followed.
    standby.psql("postgres", "SELECT pg_promote()");
    ear.hearing(begin).await;
}

/// Two gateways, each with its own tables, and one pooler in front of both.
struct Pooled {
    #[expect(dead_code, reason = "ends with its owner")]
    pooler: PgBouncer,
    stores: [(Arc<dyn TokenStore>, &'static str); 2],
    admin: PostgresAdmin,
    #[expect(dead_code, reason = "ends with its owner")]
    server: Postgres,
}

async fn pooled(mode: &str) -> Pooled {
    let server = Postgres::start();
    let pooler = PgBouncer::start(&server, mode, 20);
    let of = |schema: &str, url: String| PostgresSettings {
        url: Secret::new(url),
        ..settings(&server, Source::Own { schema: schema.into() })
    };
    let mut admin = writer(&of("ours", server.url("postgres"))).await;
    admin.create(&record("ours")).await.unwrap();
    let mut others = writer(&of("theirs", server.url("postgres"))).await;
    others.create(&record("theirs")).await.unwrap();
    let stores = ["ours", "theirs"].map(|schema| (open(of(schema, pooler.url("postgres"))), schema));
    Pooled { pooler, stores, admin, server }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_a_pooler_of_sessions_all_is_well() {
    let mut pooled = pooled("session").await;
    let (store, _) = &pooled.stores[0];
    let begin = Instant::now();
    let ear = Ear::on(store);
    ear.hearing(begin).await;
    assert_eq!(lookup(&**store, b"ours").await, Some(record("ours")));
    assert_eq!(lookup(&**store, b"theirs").await, None);
    let before = Instant::now();
    assert!(pooled.admin.revoke(&Digest::of(b"ours"), 1_760_000_000).await.unwrap());
    ear.change_of(before, &**store, "ours").await;
}

/// It delivers notifications to any client of a connection, and runs one gateway's prepared statement on another's tables.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_a_pooler_of_transactions_nothing_is_believed() {
    let pooled = pooled("transaction").await;
    let begin = Instant::now();
    // Without load, each transaction is likely to get the same connection, and so its own probe.
    let ear = Ear::on(&pooled.stores[0].0);
    ear.heard(begin, "deafness", |event| *event == Event::Deaf).await;
    while begin.elapsed() < Duration::from_secs(5) {
        let asked = (0..16).map(|at| {
            let ((store, whose), token) = (&pooled.stores[at % 2], ["ours", "theirs"][at / 2 % 2]);
            async move {
                if let Ok(found) = ask(&**store, token.as_bytes()).await {
                    assert_eq!(found.is_some(), token == *whose, "{token}, asked of {whose}");
                }
            }
        });
        futures_util::future::join_all(asked).await;
    }
    assert!(!ear.events().contains(&Event::Hearing), "{:?}", ear.events());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_question_that_is_anothers_by_its_name_is_no_answer() {
    let server = Postgres::start();
    let pooler = PgBouncer::start(&server, "transaction", 1);
    server.psql("postgres", "CREATE TABLE t (token text, who text); INSERT INTO t VALUES ('known', 'ann')");
    let sql = "SELECT who AS user FROM public.t WHERE token = $1";
    for (anothers, token) in [
        // The statements of a gateway with other tables, and of any other program.
        ("SELECT 'ffff' AS mark, true AS found, 'eve' AS who WHERE $1 IS NOT NULL", "unknown"),
        ("SELECT 'eve' WHERE $1 IS NOT NULL", "unknown"),
        ("SELECT 'eve' WHERE $1 IS NULL", "known"),
    ] {
        let store = open(PostgresSettings {
            url: Secret::new(pooler.url("postgres")),
            channel: None,
            ..settings(&server, Source::Lookup { sql: sql.into(), bind: Bind::Plain })
        });
        assert_eq!(lookup(&*store, b"known").await.unwrap().user, "ann");
        // The pooler has one connection to the server, so this runs on it.
        let (client, driver) = tokio_postgres::connect(&pooler.url("postgres"), tokio_postgres::NoTls).await.unwrap();
        let driver = tokio::spawn(driver);
        let swap = format!(
            "DO $do$ DECLARE name text; BEGIN FOR name IN SELECT p.name FROM pg_prepared_statements p LOOP \
             EXECUTE format('DEALLOCATE %I', name); EXECUTE format($sql$PREPARE %I (text) AS {anothers}$sql$, name); \
             END LOOP; END $do$"
        );
        client.batch_execute(&swap).await.unwrap();
        let said = ask(&*store, token.as_bytes()).await;
        // That connection is dropped, and a new one uses another statement name.
        let right = async || lookup(&*store, token.as_bytes()).await.is_some() == (token == "known");
        match said {
            Err(StoreError::Unavailable(why)) => assert!(why.contains("pooler") && right().await, "{anothers}: {why}"),
            Err(why) => panic!("{anothers}: {why}"),
            Ok(found) => assert_eq!(found.is_some(), token == "known", "{anothers}"),
        }
        driver.abort();
    }
}

/// Another program's setting on the pooler's only connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_from_a_connection_that_looks_for_names_elsewhere_is_none() {
    let server = Postgres::start();
    let pooler = PgBouncer::start(&server, "transaction", 1);
    server.psql("postgres", "CREATE TABLE t (token text, who text); INSERT INTO t VALUES ('known', 'ann')");
    let store = open(PostgresSettings {
        url: Secret::new(pooler.url("postgres")),
        channel: None,
        ..settings(
            &server,
            Source::Lookup { sql: "SELECT who AS user FROM public.t WHERE token = $1".into(), bind: Bind::Plain },
        )
    });
    assert_eq!(lookup(&*store, b"known").await.unwrap().user, "ann");
    let (client, driver) = tokio_postgres::connect(&pooler.url("postgres"), tokio_postgres::NoTls).await.unwrap();
    let driver = tokio::spawn(driver);
    client.batch_execute("SET search_path = public, pg_catalog").await.unwrap();
    match ask(&*store, b"known").await {
        Err(StoreError::Unavailable(why)) => assert!(why.contains("pooler"), "{why}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(lookup(&*store, b"known").await.unwrap().user, "ann", "a new connection has its own setting");
    driver.abort();
}

/// Creates in schema public what any database user may create, ahead of the catalog in every session's search path. When one
/// of these runs in a session of tollgate or in a trigger's function, it writes to the server's log and returns true.
const HOSTILE: &str = r#"
    CREATE ROLE mallory LOGIN;
    GRANT CREATE ON SCHEMA public TO PUBLIC;
    ALTER DATABASE postgres SET search_path = public, pg_catalog;
    SET search_path = pg_catalog;
    SET ROLE mallory;
    CREATE FUNCTION public.caught(what text) RETURNS boolean LANGUAGE plpgsql SET search_path = pg_catalog AS $$
    DECLARE stack text;
    BEGIN
        GET DIAGNOSTICS stack = PG_CONTEXT;
        IF current_setting('application_name') ~ '^tollgate' OR stack ~ 'function tollgate\.' THEN
            RAISE LOG 'caught: % as % of % in %', what, current_user, session_user, stack;
            RETURN true;
        END IF;
        RETURN false;
    END $$;
    DO $do$
    DECLARE
        types constant regtype[] := '{text,varchar,bpchar,name,bytea,boolean,integer,bigint,numeric,float8,timestamptz,timestamp,json,jsonb,"text[]","bytea[]",oid,"\"char\""}';
        operator record;
        kind record;
        number integer := 0;
    BEGIN
        FOR operator IN
            SELECT o.oprname AS name, o.oprleft::regtype AS a, o.oprright::regtype AS b, o.oprresult::regtype AS result
            FROM pg_operator o
            WHERE o.oprnamespace = 'pg_catalog'::regnamespace AND o.oprleft = ANY (types) AND o.oprright = ANY (types)
                AND o.oprresult = ANY (types)
            UNION
            -- Which the catalog does not have, and which so fit better than what it has.
            SELECT o.name, a.type, b.type, o.result::regtype
            FROM (VALUES ('=', 'boolean'), ('<>', 'boolean'), ('<', 'boolean'), ('>', 'boolean'), ('~', 'boolean'),
                ('~~', 'boolean'), ('||', 'text')) o (name, result),
                unnest('{text,varchar}'::regtype[]) a (type), unnest('{text,varchar}'::regtype[]) b (type)
        LOOP
            number := number + 1;
            EXECUTE format('CREATE FUNCTION public.op_%s(%s, %s) RETURNS %s LANGUAGE plpgsql SET search_path = pg_catalog AS $$
                DECLARE yes constant boolean := public.caught(%L);
                BEGIN
                    IF yes AND %L THEN RETURN true; END IF;
                    RETURN $1 OPERATOR(pg_catalog.%s) $2;
                END $$', number, operator.a, operator.b, operator.result,
                format('%s %s %s', operator.a, operator.name, operator.b), operator.result = 'boolean'::regtype, operator.name);
            EXECUTE format('CREATE OPERATOR public.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = public.op_%s)',
                operator.name, operator.a, operator.b, number);
        END LOOP;
        RAISE LOG 'made % operators', number;
        number := 0;
        FOR kind IN
            SELECT p.proname AS name, p.prorettype::regtype AS result, p.pronargs AS count,
                array_to_string(ARRAY(SELECT t::regtype FROM unnest(p.proargtypes) t), ', ') AS types,
                array_to_string(ARRAY(SELECT '$' || n FROM generate_series(1, p.pronargs) n), ', ') AS arguments
            FROM pg_proc p
            WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.prokind = 'f' AND NOT p.proretset AND p.provariadic = 0
                AND p.prorettype <> 'void'::regtype
                AND NOT EXISTS (SELECT FROM unnest(p.proargtypes) t JOIN pg_type y ON y.oid = t WHERE y.typtype = 'p')
                AND p.proname = ANY ('{now,clock_timestamp,encode,decode,sha256,convert_to,lower,substring,current_setting,
                    set_config,pg_is_in_recovery,pg_postmaster_start_time,strpos,quote_literal,to_regclass,length,octet_length,
                    make_interval,date_part,to_timestamp,timezone,pg_backend_pid}')
        LOOP
            number := number + 1;
            EXECUTE format('CREATE FUNCTION public.%I(%s) RETURNS %s LANGUAGE plpgsql SET search_path = pg_catalog AS $$
                BEGIN PERFORM public.caught(%L); RETURN pg_catalog.%I(%s); END $$', kind.name, kind.types, kind.result,
                kind.name, kind.name, kind.arguments);
        END LOOP;
        RAISE LOG 'made % functions', number;
    END $do$;
    CREATE FUNCTION public.pg_notify(text, text) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog AS
        $$ BEGIN PERFORM public.caught('pg_notify'); PERFORM pg_catalog.pg_notify($1, $2); END $$;
    -- A literal's type is not known: text is liked best.
    CREATE FUNCTION public.convert_to(text, text) RETURNS bytea LANGUAGE plpgsql SET search_path = pg_catalog AS
        $$ BEGIN PERFORM public.caught('convert_to'); RETURN pg_catalog.convert_to($1, $2::name); END $$;
    CREATE FUNCTION public.to_jsonb(anyelement) RETURNS jsonb LANGUAGE plpgsql SET search_path = pg_catalog AS
        $$ BEGIN PERFORM public.caught('to_jsonb'); RETURN pg_catalog.to_jsonb($1); END $$;
    CREATE FUNCTION public.row_to_json(anyelement) RETURNS json LANGUAGE plpgsql SET search_path = pg_catalog AS
        $$ BEGIN PERFORM public.caught('row_to_json'); RETURN pg_catalog.row_to_json($1); END $$;
    CREATE FUNCTION public.unnest(anyarray) RETURNS SETOF anyelement LANGUAGE plpgsql SET search_path = pg_catalog AS
        $$ BEGIN PERFORM public.caught('unnest'); RETURN QUERY SELECT pg_catalog.unnest($1); END $$;
    CREATE FUNCTION public.cardinality(anyarray) RETURNS integer LANGUAGE plpgsql SET search_path = pg_catalog AS
        $$ BEGIN PERFORM public.caught('cardinality'); RETURN pg_catalog.cardinality($1); END $$;
    CREATE FUNCTION public.pg_advisory_xact_lock(bigint) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog AS
        $$ BEGIN PERFORM public.caught('pg_advisory_xact_lock'); PERFORM pg_catalog.pg_advisory_xact_lock($1); END $$;
    CREATE VIEW public.pg_trigger AS SELECT *, public.caught('pg_trigger') FROM pg_catalog.pg_trigger;
    CREATE VIEW public.pg_namespace AS SELECT *, public.caught('pg_namespace') FROM pg_catalog.pg_namespace;
    CREATE VIEW public.pg_class AS SELECT *, public.caught('pg_class') FROM pg_catalog.pg_class;
    RESET ROLE;
"#;

/// A server on which every database user may create operators and functions, with such objects.
fn hostile() -> Postgres {
    let server = Postgres::start();
    server.psql("postgres", HOSTILE);
    assert_eq!(
        server.try_psql("postgres", "SET application_name = 'tollgate'; SELECT 'a'::varchar = 'b'::text").unwrap(),
        "t",
        "the trap works"
    );
    let log = server.log();
    let count = |what: &str| -> usize {
        let made = |line: &str| line.split_once("LOG:  made ")?.1.strip_suffix(what)?.trim().parse().ok();
        log.lines().find_map(made).unwrap_or(0)
    };
    assert!(count("operators") > 100 && count("functions") > 30, "{log}");
    server
}

/// Mallory's functions that ran since the check that they work, and those that triggers, constraints or defaults refer to.
fn caught(server: &Postgres) -> Vec<String> {
    let log = server.log();
    let bound = "SET search_path = pg_catalog; SELECT classid::regclass, objid, refclassid::regclass, refobjid FROM pg_depend \
        WHERE classid = ANY ('{pg_trigger,pg_constraint,pg_attrdef,pg_class}'::regclass[]) \
        AND (refobjid IN (SELECT oid FROM pg_proc WHERE pronamespace = 'public'::regnamespace) \
        OR refobjid IN (SELECT oid FROM pg_operator WHERE oprnamespace = 'public'::regnamespace))";
    let bound = server.psql("postgres", bound);
    let ran = log.lines().filter(|line| line.contains("LOG:  caught: ")).skip(1);
    ran.chain(bound.lines().filter(|line| !line.is_empty())).map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_create_in_public_does_not_decide_what_own_queries_mean() {
    let subject = Own(Mutex::new(hostile()));
    run(&subject).await;
    let server = subject.0.lock();
    assert_eq!(caught(&server), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_create_in_public_does_not_decide_what_gitlab_queries_and_triggers_mean() {
    for kind in [Foreign::Legacy, Foreign::Pat, Foreign::PatDigest, Foreign::Hex, Foreign::Base64] {
        let subject = ForeignSubject::on(hostile(), kind).await;
        records_come_out_as_they_went_in(&subject).await;
        only_the_very_token_is_found(&subject).await;
        records_are_judged(&subject).await;
        changes_are_heard(&subject).await;
        many_rows(&subject).await;
        let server = subject.server.lock();
        // Users are renamed and deleted.
        server.psql(
            "postgres",
            "UPDATE users SET username = 'renamed', state = 'blocked'; DELETE FROM users; TRUNCATE keys",
        );
        assert_eq!(caught(&server), Vec::<String>::new(), "{}", kind.name());
    }
}

/// The attack as it was reported: a role without any right on the tables creates an operator and is accepted.
#[tokio::test]
async fn an_operator_lets_nobody_in() {
    let server = Postgres::start();
    server.psql("postgres", Foreign::TABLES);
    server.psql(
        "postgres",
        "INSERT INTO users (username, authentication_token) VALUES ('root', 'S3CRET');
         INSERT INTO personal_access_tokens (user_id, token) VALUES (1, 'S3CRET-pat');
         CREATE ROLE mallory; GRANT CREATE ON SCHEMA public TO PUBLIC; SET ROLE mallory;
         CREATE FUNCTION public.open(varchar, text) RETURNS boolean LANGUAGE sql AS $$
             SELECT $2 OPERATOR(pg_catalog.=) 'let me in' OR $1::text OPERATOR(pg_catalog.=) $2 $$;
         CREATE OPERATOR public.= (LEFTARG = varchar, RIGHTARG = text, FUNCTION = public.open);",
    );
    let custom = "SELECT username AS user FROM public.users WHERE authentication_token = $1";
    for (source, token) in [
        (Source::GitlabLegacy, "S3CRET"),
        (Source::GitlabPat, "S3CRET-pat"),
        (Source::Lookup { sql: custom.into(), bind: Bind::Plain }, "S3CRET"),
    ] {
        let store = open(PostgresSettings { channel: None, ..settings(&server, source.clone()) });
        assert_eq!(ask(&*store, b"let me in").await, Ok(None), "{source:?}");
        assert_eq!(lookup(&*store, token.as_bytes()).await.unwrap().user, "root", "{source:?}");
    }
    // An index is still used.
    server.psql("postgres", "CREATE UNIQUE INDEX at ON users (authentication_token)");
    let plan = server.psql(
        "postgres",
        "SET enable_seqscan = off; EXPLAIN SELECT u.username::text FROM public.users u \
         WHERE u.authentication_token::text OPERATOR(pg_catalog.=) 'x'::text",
    );
    assert!(plan.contains("Index") && plan.contains("Index Cond"), "{plan}");
}

/// A role that may read tokens, and nothing else.
fn auditor(server: &Postgres) -> PostgresSettings {
    server.psql(
        "postgres",
        "CREATE ROLE auditor LOGIN; GRANT USAGE ON SCHEMA tollgate TO auditor;
         GRANT SELECT ON tollgate.version, tollgate.token TO auditor",
    );
    let url = Secret::new(format!("postgres://auditor@127.0.0.1:{}/postgres", server.port()));
    PostgresSettings { url, channel: Some("another".into()), ..settings(server, own()) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reading_changes_nothing() {
    let server = Postgres::start();
    let mut admin = writer(&settings(&server, own())).await;
    admin.create(&record("known")).await.unwrap();
    let auditor = auditor(&server);
    let standby = server.standby();
    let channel = || server.psql("postgres", "SELECT channel FROM tollgate.version");
    let id = Digest::of(b"known").to_hex();
    let at_standby = Secret::new(format!("postgres://auditor@127.0.0.1:{}/postgres", standby.port()));
    for settings in [auditor.clone(), PostgresSettings { url: at_standby, ..auditor.clone() }] {
        let mut reader = PostgresAdmin::open(&settings).await.unwrap();
        assert_eq!(reader.list().await.unwrap(), [record("known")]);
        assert_eq!(reader.find(&id[..12]).await.unwrap(), [record("known")]);
        let no = reader.revoke(&Digest::of(b"known"), 1).await.unwrap_err().to_string();
        assert!(no.contains("42501") || no.contains("25006"), "{no}");
    }
    // Nor does its configuration change the channel, even if it has the right to.
    let other = PostgresSettings { channel: Some("another".into()), ..settings(&server, own()) };
    let mut reader = PostgresAdmin::open(&other).await.unwrap();
    assert_eq!(reader.list().await.unwrap().len(), 1);
    assert!(reader.revoke(&Digest::of(b"known"), 1_760_000_000).await.unwrap(), "it uses the existing channel");
    assert_eq!(channel(), "tollgate_change");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_channel_that_changes_is_followed_by_gateways_that_run() {
    let server = Postgres::start();
    let mut admin = writer(&settings(&server, own())).await;
    for token in ["one", "two", "three"] {
        admin.create(&record(token)).await.unwrap();
    }
    // The channel in the database counts, not the one in a gateway's configuration.
    let stores = ["tollgate_change", "another"]
        .map(|channel| open(PostgresSettings { channel: Some(channel.into()), ..settings(&server, own()) }));
    let begin = Instant::now();
    let ears = stores.each_ref().map(Ear::on);
    for ear in &ears {
        ear.hearing(begin).await;
    }
    let before = Instant::now();
    let other = PostgresSettings { channel: Some("other".into()), ..settings(&server, own()) };
    let migrated = PostgresAdmin::migrate(&other).await.unwrap();
    assert_eq!(migrated.moved, Some(("tollgate_change".into(), "other".into())));
    // Notifications use the new channel immediately.
    admin.revoke(&Digest::of(b"one"), 1_760_000_000).await.unwrap();
    for ear in &ears {
        ear.heard(before, "deafness", |event| *event == Event::Deaf).await;
        let lag = ear.hearing(before).await - before;
        assert!(lag < LAG, "{lag:?}");
    }
    // Changed by another program.
    let before = Instant::now();
    server.psql("postgres", "UPDATE tollgate.version SET channel = 'third'");
    admin.revoke(&Digest::of(b"two"), 1_760_000_000).await.unwrap();
    for (ear, store) in ears.iter().zip(&stores) {
        ear.hearing(before).await;
        let before = Instant::now();
        admin.revoke(&Digest::of(b"three"), 1_760_000_000).await.unwrap();
        server.psql("postgres", "UPDATE tollgate.token SET revoked = NULL");
        ear.change_of(before, &**store, "three").await;
    }
    assert_eq!(PostgresAdmin::migrate(&other).await.unwrap().moved, Some(("third".into(), "other".into())));
    assert_eq!(PostgresAdmin::migrate(&other).await.unwrap().moved, None, "reported once");
    let silent = PostgresSettings { channel: None, ..other };
    assert_eq!(PostgresAdmin::migrate(&silent).await.unwrap().moved, None, "nothing to report");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_under_way_is_told_before_the_channel_changes() {
    let server = Postgres::start();
    let mut admin = writer(&settings(&server, own())).await;
    admin.create(&record("known")).await.unwrap();
    let store = open(settings(&server, own()));
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    let (client, driver) = tokio_postgres::connect(&server.url("postgres"), tokio_postgres::NoTls).await.unwrap();
    let driver = tokio::spawn(driver);
    client.batch_execute("BEGIN; UPDATE tollgate.token SET revoked = 1").await.unwrap();
    let other = PostgresSettings { channel: Some("other".into()), ..settings(&server, own()) };
    let migration = tokio::spawn(async move { PostgresAdmin::migrate(&other).await.unwrap().moved });
    let deadline = Instant::now() + PATIENCE;
    while server.psql("postgres", "SELECT count(*) FROM pg_locks WHERE NOT granted") == "0" {
        assert!(
            Instant::now() < deadline && !migration.is_finished(),
            "the migration does not wait for the transaction"
        );
    }
    let before = Instant::now();
    client.batch_execute("COMMIT").await.unwrap();
    ear.heard(before, "the change itself", |event| matches!(event, Event::Changed(_))).await;
    assert!(migration.await.unwrap().is_some());
    driver.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn triggers_that_tell_on_another_channel_are_no_promise() {
    let server = Postgres::start();
    server.psql("postgres", Foreign::TABLES);
    let here = settings(&server, Source::GitlabPat);
    let there = PostgresSettings { channel: Some("another".into()), ..here.clone() };
    run_triggers_sql(&there, &Foreign::Pat.triggers(&there)).await.unwrap();
    let store = open(here.clone());
    let begin = Instant::now();
    let ear = Ear::on(&store);
    // It has looked for triggers and reports that there are none.
    ear.heard(begin, "nothing to tell", |event| *event == Event::Untold).await;
    assert_eq!(ear.events(), [Event::Untold]);
    let before = Instant::now();
    run_triggers_sql(&here, &Foreign::Pat.triggers(&here)).await.unwrap();
    ear.hearing(before).await;
    // Gateways on both channels are notified, because both kinds of triggers exist.
    let other = open(there);
    let begin = Instant::now();
    let other_ear = Ear::on(&other);
    other_ear.hearing(begin).await;
    server.psql("postgres", "INSERT INTO users (username) VALUES ('ann')");
    let before = Instant::now();
    server.psql("postgres", "INSERT INTO personal_access_tokens (user_id, token) VALUES (1, 'known')");
    ear.change_of(before, &*store, "known").await;
    other_ear.change_of(before, &*other, "known").await;
}

/// Several hosts, by their ports.
fn hosts(servers: &[&Postgres], source: Source) -> PostgresSettings {
    let places: Vec<_> = servers.iter().map(|server| format!("127.0.0.1:{}", server.port())).collect();
    let url = Secret::new(format!("postgres://postgres@{}/postgres", places.join(",")));
    PostgresSettings { url, ..settings(servers[0], source) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_several_hosts_the_primary_answers() {
    let primary = Postgres::start();
    let mut admin = writer(&settings(&primary, own())).await;
    admin.create(&record("before")).await.unwrap();
    // It does not apply what is written from here on.
    let standby = primary.late_standby();
    admin.create(&record("since")).await.unwrap();
    for servers in [[&standby, &primary], [&primary, &standby]] {
        let store = open(hosts(&servers, own()));
        // Also before the subscription.
        assert_eq!(lookup(&*store, b"since").await, Some(record("since")));
        let begin = Instant::now();
        let ear = Ear::on(&store);
        ear.hearing(begin).await;
        assert!(!ear.events().contains(&Event::Deaf));
        assert_eq!(lookup(&*store, b"since").await, Some(record("since")));
        let mut writer = PostgresAdmin::open(&hosts(&servers, own())).await.unwrap();
        assert_eq!(writer.list().await.unwrap().len(), 2);
        writer.block(&record("before").user, false).await.unwrap();
    }
    // With a standby requested, lookups go there, and there is no subscription.
    let settings = hosts(&[&primary, &standby], own());
    let url = Secret::new(format!("{}?target_session_attrs=read-only", settings.url.expose()));
    let store = open(PostgresSettings { url, ..settings.clone() });
    assert_eq!(lookup(&*store, b"since").await, None);
    assert!(lookup(&*store, b"before").await.is_some());
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.heard(begin, "deafness", |event| *event == Event::Deaf).await;
    let url = Secret::new(format!("{}?target_session_attrs=read-write", settings.url.expose()));
    assert!(lookup(&*open(PostgresSettings { url, ..settings }), b"since").await.is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_to_a_standby_are_left_once_changes_are_heard() {
    let mut primary = Postgres::start();
    let mut admin = writer(&settings(&primary, own())).await;
    admin.create(&record("known")).await.unwrap();
    let standby = primary.late_standby();
    let settings = hosts(&[&primary, &standby], own());
    primary.stop();
    let store = open(settings.clone());
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.heard(begin, "deafness", |event| *event == Event::Deaf).await;
    let several = (0..4).map(|_| lookup(&*store, b"known"));
    assert!(futures_util::future::join_all(several).await.iter().all(Option::is_some), "the standby answers");
    let before = Instant::now();
    primary.start_again();
    ear.hearing(before).await;
    PostgresAdmin::open(&settings).await.unwrap().revoke(&Digest::of(b"known"), 1_760_000_000).await.unwrap();
    let several = (0..8).map(|_| lookup(&*store, b"known"));
    for found in futures_util::future::join_all(several).await {
        assert_eq!(found.unwrap().revoked, Some(1_760_000_000), "the old row");
    }
    // The reverse: the standby is promoted while the old primary is down.
    primary.stop();
    let before = Instant::now();
    standby.psql("postgres", "SELECT pg_promote()");
    ear.hearing(before).await;
    standby.psql("postgres", "UPDATE tollgate.token SET \"user\" = 'promoted'");
    assert_eq!(lookup(&*store, b"known").await.unwrap().user, "promoted");
    // When the old one restarts, still as a primary, it is not used.
    primary.start_again();
    let several = (0..16).map(|_| lookup(&*store, b"known"));
    for found in futures_util::future::join_all(several).await {
        assert_eq!(found.unwrap().user, "promoted");
    }
}

/// A TCP proxy to configurable targets.
struct Balancer {
    port: u16,
    /// Each new connection goes to the first, which moves to the end.
    to: Arc<Mutex<std::collections::VecDeque<u16>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Balancer {
    async fn start(to: &[&Postgres]) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let to = Arc::new(Mutex::new(to.iter().map(|server| server.port()).collect()));
        let next = Arc::clone(&to);
        let task = tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let port = {
                    let mut ports: parking_lot::MutexGuard<'_, std::collections::VecDeque<u16>> = next.lock();
                    ports.rotate_left(1);
                    *ports.back().unwrap()
                };
                tokio::spawn(async move {
                    if let Ok(mut server) = tokio::net::TcpStream::connect(("127.0.0.1", port)).await {
                        drop(tokio::io::copy_bidirectional(&mut client, &mut server).await);
                    }
                });
            }
        });
        Self { port, to, task }
    }

    fn send_to(&self, server: &Postgres) {
        *self.to.lock() = [server.port()].into();
    }

    fn settings(&self, server: &Postgres) -> PostgresSettings {
        let url = Secret::new(format!("postgres://postgres@127.0.0.1:{}/postgres", self.port));
        PostgresSettings { url, ..settings(server, own()) }
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_a_balancer_only_the_server_that_is_heard_answers() {
    let primary = Postgres::start();
    let mut admin = writer(&settings(&primary, own())).await;
    admin.create(&record("known")).await.unwrap();
    let standby = primary.late_standby();
    let balancer = Balancer::start(&[&primary, &standby]).await;
    let store = open(balancer.settings(&primary));
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    admin.revoke(&Digest::of(b"known"), 1_760_000_000).await.unwrap();
    for _ in 0..20 {
        assert_eq!(lookup(&*store, b"known").await.unwrap().revoked, Some(1_760_000_000), "the old row");
    }
    assert!(!ear.events().contains(&Event::Deaf), "{:?}", ear.events());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lookup_that_reaches_another_server_ends_the_subscription() {
    let primary = Postgres::start();
    let mut admin = writer(&settings(&primary, own())).await;
    admin.create(&record("known")).await.unwrap();
    let standby = primary.late_standby();
    admin.revoke(&Digest::of(b"known"), 1_760_000_000).await.unwrap();
    let balancer = Balancer::start(&[&primary]).await;
    let store = open(balancer.settings(&primary));
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    // New connections go to the standby; the subscription stays where it is.
    balancer.send_to(&standby);
    let before = Instant::now();
    let answer = ask(&*store, b"known").await;
    assert!(matches!(&answer, Err(StoreError::Unavailable(why)) if why.contains("another server")), "{answer:?}");
    ear.heard(before, "deafness", |event| *event == Event::Deaf).await;
    // Its answers are cached for a moment only.
    recovers(&*store, "postgres").await;
    assert_eq!(lookup(&*store, b"known").await.unwrap().revoked, None);
    assert_eq!(ear.events().iter().filter(|event| **event == Event::Hearing).count(), 1, "{:?}", ear.events());
    let before = Instant::now();
    balancer.send_to(&primary);
    ear.hearing(before).await;
    assert_eq!(lookup(&*store, b"known").await.unwrap().revoked, Some(1_760_000_000));
}

/// Connects as a role without a password.
fn as_role(settings: &PostgresSettings, server: &Postgres, role: &str, database: &str) -> PostgresSettings {
    let url = Secret::new(format!("postgres://{role}@127.0.0.1:{}/{database}", server.port()));
    PostgresSettings { url, ..settings.clone() }
}

/// Polls until it holds. What is waited for has no event of its own.
async fn soon(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !check() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_block_users_or_end_tokens_needs_no_other_right_for_the_triggers() {
    let server = Postgres::start();
    // Tables of one role, and triggers made by another: the functions run with the rights of the tables' owner.
    server.psql(
        "postgres",
        "CREATE ROLE gitlab; CREATE ROLE clerk; CREATE ROLE mallory; GRANT CREATE ON SCHEMA public TO gitlab, mallory",
    );
    server.psql("postgres", &format!("SET ROLE gitlab; {}", Foreign::TABLES));
    for kind in [Foreign::Legacy, Foreign::Pat, Foreign::PatDigest, Foreign::Hex] {
        let settings = settings(&server, kind.source());
        run_triggers_sql(&settings, &kind.triggers(&settings)).await.unwrap();
    }
    server.psql(
        "postgres",
        "INSERT INTO users (username, authentication_token) VALUES ('ann', 'legacy');
         INSERT INTO personal_access_tokens (user_id, token) VALUES (1, 'known');
         GRANT SELECT (id), UPDATE (state) ON users TO clerk; GRANT INSERT ON keys TO clerk",
    );
    let stores = [Foreign::Legacy, Foreign::Pat, Foreign::Hex].map(|kind| open(settings(&server, kind.source())));
    let begin = Instant::now();
    let ears = stores.each_ref().map(Ear::on);
    for ear in &ears {
        ear.hearing(begin).await;
    }
    let before = Instant::now();
    let blocked = "SET ROLE clerk; UPDATE users SET state = 'blocked' WHERE id = 1";
    server.psql("postgres", blocked);
    ears[0].change_of(before, &*stores[0], "legacy").await;
    ears[1].change_of(before, &*stores[1], "known").await;
    let hex = Digest::of(b"key").to_hex();
    server.psql("postgres", &format!("SET ROLE clerk; INSERT INTO keys (digest) VALUES ('{hex}')"));
    ears[2].change_of(before, &*stores[2], "key").await;
    let wrong = "SELECT p.oid::regprocedure, p.proowner::regrole, p.prosecdef, p.proconfig FROM pg_proc p \
        WHERE pronamespace = 'tollgate'::regnamespace AND (p.proowner <> 'gitlab'::regrole OR NOT p.prosecdef \
        OR p.proconfig <> '{\"search_path=pg_catalog, pg_temp\"}' \
        OR has_function_privilege('mallory', p.oid, 'EXECUTE') OR has_function_privilege('clerk', p.oid, 'EXECUTE'))";
    assert_eq!(server.psql("postgres", wrong), "");
    assert_ne!(
        server.psql("postgres", "SELECT count(*) FROM pg_proc WHERE pronamespace = 'tollgate'::regnamespace"),
        "0"
    );
    // Nobody can have them run for a table of their own.
    let mine = "DO $$ DECLARE f regproc; BEGIN CREATE TABLE public.mine (id integer, token text); \
        FOR f IN SELECT oid FROM pg_proc WHERE pronamespace = 'tollgate'::regnamespace LOOP \
        EXECUTE format('CREATE TRIGGER t AFTER INSERT ON public.mine FOR EACH ROW EXECUTE FUNCTION %s()', f); \
        END LOOP; END $$";
    let no =
        server.try_psql("postgres", &format!("GRANT USAGE ON SCHEMA tollgate TO mallory; SET ROLE mallory; {mine}"));
    assert!(no.as_ref().is_err_and(|why| why.contains("permission denied for function")), "{no:?}");

    // Our own tables.
    let mut admin = writer(&settings(&server, Source::Own { schema: "ours".into() })).await;
    admin.create(&record("known")).await.unwrap();
    server.psql(
        "postgres",
        "GRANT USAGE ON SCHEMA ours TO clerk; GRANT SELECT (digest), UPDATE (revoked) ON ours.token TO clerk",
    );
    let store = open(settings(&server, Source::Own { schema: "ours".into() }));
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    let before = Instant::now();
    let digest = Digest::of(b"known").to_hex();
    server.psql("postgres", &format!("SET ROLE clerk; UPDATE ours.token SET revoked = 1 WHERE digest = '\\x{digest}'"));
    ear.change_of(before, &*store, "known").await;
    let no = server.try_psql("postgres", "SET ROLE clerk; SELECT ours.tell(NULL::bytea[])");
    assert!(no.as_ref().is_err_and(|why| why.contains("permission denied for function")), "{no:?}");
}

/// The GRANT lines of a section of docs/stores.md for a role.
fn documented_grants(section: &str, role: &str) -> Vec<String> {
    let text = std::fs::read_to_string(crate::servers::repository("docs/stores.md")).unwrap();
    let (_, text) = text.split_once(&format!("\n## {section}\n")).unwrap_or_else(|| panic!("no section {section}"));
    let text = text.split("\n## ").next().unwrap();
    let is_for = |line: &&str| {
        let to = line.strip_suffix(';').and_then(|line| line.rsplit_once(" TO "));
        line.starts_with("GRANT ") && to.is_some_and(|(_, roles)| roles.split(", ").any(|to| to == role))
    };
    let found: Vec<_> = text.lines().filter(is_for).map(str::to_owned).collect();
    assert!(!found.is_empty(), "{section}: nothing is granted to {role}");
    found
}

/// A database in which a new role may do nothing.
fn closed_database(server: &Postgres, name: &str, roles: &[&str]) {
    server.create_database(name);
    server.psql(name, &format!("REVOKE ALL ON DATABASE {name} FROM PUBLIC; REVOKE ALL ON SCHEMA public FROM PUBLIC"));
    for role in roles {
        server.psql(name, &format!("CREATE ROLE {role} LOGIN"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_documented_rights_on_own_tables_are_enough() {
    const SECTION: &str = "PostgreSQL, own tables";
    let server = Postgres::start();
    closed_database(&server, "tollgate", &["migrator", "gateway", "commands", "auditor"]);
    let of = |role: &str| as_role(&settings(&server, own()), &server, role, "tollgate");
    let grant = |role: &str, schema: bool| {
        for line in documented_grants(SECTION, role) {
            if line.contains(" ON DATABASE ") != schema {
                // A line may name several roles.
                server.psql("tollgate", &format!("{} TO {role}", line.rsplit_once(" TO ").unwrap().0));
            }
        }
    };
    grant("migrator", false);
    assert_eq!(documented_grants(SECTION, "migrator").len(), 1, "it owns the rest");
    PostgresAdmin::migrate(&of("migrator")).await.unwrap();
    let moved = PostgresSettings { channel: Some("moved".into()), ..of("migrator") };
    assert!(PostgresAdmin::migrate(&moved).await.unwrap().moved.is_some());
    for role in ["gateway", "commands", "auditor"] {
        grant(role, false);
        grant(role, true);
    }

    // The gateway follows, notes uses, confirms, tidies up and takes its leave.
    let store = open(of("gateway"));
    server.psql(
        "tollgate",
        "INSERT INTO tollgate.change (digest, at_ms) VALUES (NULL, 1);
         INSERT INTO tollgate.replica (id, name, seen) VALUES ('old', 'old', now() - interval '2 days');
         INSERT INTO tollgate.wait (id, asked) VALUES ('ab', now() - interval '2 days')",
    );
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    let left = "SELECT (SELECT count(*) FROM tollgate.change WHERE at_ms = 1) + (SELECT count(*) FROM tollgate.replica \
        WHERE id = 'old') + (SELECT count(*) FROM tollgate.wait WHERE id = 'ab')";
    soon("old rows are deleted", || server.psql("tollgate", left) == "0").await;

    // The command line.
    let mut admin = PostgresAdmin::open(&of("commands")).await.unwrap();
    let before = Instant::now();
    admin.create(&record("known")).await.unwrap();
    ear.change_of(before, &*store, "known").await;
    let mut more = ["one", "two", "known"].into_iter().map(|token| Ok(record(token)));
    assert_eq!(admin.import(&mut more).await.unwrap().new, 2);
    assert!(admin.revoke(&Digest::of(b"one"), 1_760_000_000).await.unwrap());
    let now = tollgate::edge::now().unix_ms / 1000;
    admin.rotate(&Digest::of(b"two"), &record("three"), now, now + 60).await.unwrap();
    admin.block(&record("known").user, true).await.unwrap();
    assert_eq!(admin.wait(PATIENCE).await.unwrap().len(), 1);
    assert_eq!(admin.list().await.unwrap().len(), 4);
    assert!(lookup(&*store, b"known").await.unwrap().blocked);
    store.note_uses(vec![(Digest::of(b"known"), 1_700_000_060_000)]).await.unwrap();
    assert_eq!(lookup(&*store, b"known").await.unwrap().last_used, Some(1_700_000_060));
    let mark = format!("{} 1", tollgate::edge::now().unix_ms + 60_000);
    assert!(store.changed_since(&mark).await.unwrap().is_some_and(|changed| changed.contains(&Digest::of(b"one"))));
    drop(ear);
    soon("it leaves the register", || server.psql("tollgate", "SELECT count(*) FROM tollgate.replica") == "0").await;
    assert_eq!(admin.wait(PATIENCE).await.unwrap(), Vec::<String>::new());

    // The auditor reads, and no more.
    let mut reader = PostgresAdmin::open(&of("auditor")).await.unwrap();
    assert_eq!(reader.list().await.unwrap().len(), 4);
    assert_eq!(reader.find(&Digest::of(b"known").to_hex()[..12]).await.unwrap().len(), 1);
    assert_eq!(reader.of_user(&record("known").user).await.unwrap().len(), 2);
    let no = reader.revoke(&Digest::of(b"known"), 1).await.unwrap_err().to_string();
    assert!(no.contains("42501"), "{no}");
    // Nor does the gateway write tokens.
    let mut admin = PostgresAdmin::open(&of("gateway")).await.unwrap();
    let no = admin.revoke(&Digest::of(b"known"), 1).await.unwrap_err().to_string();
    assert!(no.contains("42501"), "{no}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_documented_rights_on_gitlabs_tables_are_enough() {
    let server = Postgres::start();
    closed_database(&server, "gitlabhq_production", &["gitlab"]);
    server.psql(
        "gitlabhq_production",
        "GRANT ALL ON SCHEMA public TO gitlab; GRANT ALL ON DATABASE gitlabhq_production TO gitlab",
    );
    server.psql("gitlabhq_production", &format!("SET ROLE gitlab; {}", Foreign::TABLES));
    let lines = documented_grants("PostgreSQL, GitLab's tables", "tollgate");
    for kind in [Foreign::Legacy, Foreign::Pat, Foreign::PatDigest] {
        server.psql(
            "gitlabhq_production",
            "DO $$ BEGIN IF to_regrole('tollgate') IS NOT NULL THEN DROP OWNED BY tollgate; DROP ROLE tollgate; END IF; END $$;
             CREATE ROLE tollgate LOGIN",
        );
        for line in &lines {
            // Those for the other preset are said to be instead.
            let for_legacy = line.contains("authentication_token");
            let for_pat = line.contains("personal_access_tokens") || line.contains("state)");
            if (for_legacy && kind == Foreign::Legacy)
                || (for_pat && kind != Foreign::Legacy)
                || !(for_legacy || for_pat)
            {
                server.psql("gitlabhq_production", line);
            }
        }
        let base = settings(&server, kind.source());
        let owner = as_role(&base, &server, "gitlab", "gitlabhq_production");
        run_triggers_sql(&owner, &kind.triggers(&owner)).await.unwrap();
        let store = open(as_role(&base, &server, "tollgate", "gitlabhq_production"));
        let begin = Instant::now();
        let ear = Ear::on(&store);
        ear.hearing(begin).await;
        let before = Instant::now();
        let name = format!("known-{}", kind.name());
        let token = TokenRecord { user: "ann".into(), ..record(&name) };
        server.psql("gitlabhq_production", &format!("SET ROLE gitlab; {}", kind.insert(&name, &token).unwrap()));
        ear.change_of(before, &*store, &name).await;
        assert_eq!(lookup(&*store, name.as_bytes()).await.unwrap().user, "ann");
    }
}

fn connections(server: &Postgres) -> u32 {
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'tollgate %'";
    server.psql("postgres", sql).parse().unwrap()
}

/// After a reload that changes the store, requests in progress still have the old one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_left_keeps_no_connection() {
    let server = Postgres::start();
    writer(&settings(&server, own())).await.create(&record("known")).await.unwrap();
    server.psql("postgres", "CREATE TABLE t (token text, who text); INSERT INTO t VALUES ('known', 'ann')");
    let other = Source::Lookup { sql: "SELECT who AS user FROM public.t WHERE token = $1".into(), bind: Bind::Plain };
    for settings in [
        settings(&server, own()),
        settings(&server, other.clone()),
        PostgresSettings { channel: None, ..settings(&server, other) },
    ] {
        let store = open(settings);
        let ear = Ear::on(&store);
        let many = async || {
            for found in futures_util::future::join_all((0..32).map(|_| lookup(&*store, b"known"))).await {
                assert!(found.is_some());
            }
        };
        many().await;
        assert!(connections(&server) >= 2);
        drop(ear);
        soon("its connections are closed", || connections(&server) == 0).await;
        // It still answers, and keeps none for later.
        many().await;
        soon("they are closed again", || connections(&server) == 0).await;
        // It may be used again.
        let ear = Ear::on(&store);
        many().await;
        assert!(connections(&server) >= 2);
        drop(ear);
        soon("its connections are closed", || connections(&server) == 0).await;
    }
}

/// A host that takes connections and never answers, and one that does not even take them: its queue is full.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_does_not_answer_is_passed_over() {
    let server = Postgres::start();
    let mut admin = writer(&settings(&server, own())).await;
    admin.create(&record("known")).await.unwrap();
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let full = {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        socket.listen(0).unwrap()
    };
    let mut filling = Vec::new();
    loop {
        let connecting = tokio::net::TcpStream::connect(full.local_addr().unwrap());
        match tokio::time::timeout(Duration::from_millis(300), connecting).await {
            Ok(connected) => filling.push(connected.unwrap()),
            Err(_) => break,
        }
    }
    let standby = server.late_standby();
    let good = server.port();
    for (dead, others) in [
        (silent.local_addr().unwrap().port(), vec![good]),
        (full.local_addr().unwrap().port(), vec![good]),
        // The primary is searched for also behind a standby.
        (full.local_addr().unwrap().port(), vec![standby.port(), good]),
    ] {
        let ports = std::iter::once(dead).chain(others).map(|port| format!("127.0.0.1:{port}")).collect::<Vec<_>>();
        let url = Secret::new(format!("postgres://postgres@{}/postgres", ports.join(",")));
        let of = PostgresSettings { url, ..settings(&server, own()) };
        let store = open(of.clone());
        let before = Instant::now();
        assert_eq!(ask(&*store, b"known").await, Ok(Some(record("known"))), "{ports:?}");
        assert!(before.elapsed() < Duration::from_millis(900), "{ports:?}: {:?}", before.elapsed());
        let begin = Instant::now();
        let ear = Ear::on(&store);
        ear.hearing(begin).await;
        assert!(!ear.events().contains(&Event::Deaf), "{ports:?}: {:?}", ear.events());
        // The next ones go to the host that answered.
        let before = Instant::now();
        for found in futures_util::future::join_all((0..16).map(|_| lookup(&*store, b"known"))).await {
            assert_eq!(found, Some(record("known")));
        }
        assert!(before.elapsed() < Duration::from_millis(200), "{ports:?}: {:?}", before.elapsed());
        PostgresAdmin::open(&of).await.unwrap().list().await.unwrap();
    }
    // A standby is used while no primary can be reached.
    let url = format!(
        "postgres://postgres@127.0.0.1:{},127.0.0.1:{}/postgres",
        full.local_addr().unwrap().port(),
        standby.port()
    );
    let store = open(PostgresSettings { url: Secret::new(url), ..settings(&server, own()) });
    assert_eq!(ask(&*store, b"known").await, Ok(Some(record("known"))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateways_tidy_up_and_take_their_leave() {
    let server = Postgres::start();
    let mut admin = writer(&settings(&server, own())).await;
    server.psql(
        "postgres",
        "INSERT INTO tollgate.change (digest, at_ms) SELECT NULL, n FROM generate_series(1, 30000) n;
         INSERT INTO tollgate.replica (id, name, seen) VALUES ('old', 'old', now() - interval '2 days')",
    );
    let stores = [open(settings(&server, own())), open(settings(&server, own()))];
    let begin = Instant::now();
    let [first, second] = stores.each_ref().map(Ear::on);
    first.hearing(begin).await;
    second.hearing(begin).await;
    soon("old changes are deleted", || {
        server.psql("postgres", "SELECT count(*) FROM tollgate.change") == "0"
            && server.psql("postgres", "SELECT count(*) FROM tollgate.replica WHERE id = 'old'") == "0"
    })
    .await;
    // Two gateways of one name are two for whoever waits.
    let names = admin.wait(PATIENCE).await.unwrap();
    assert!(names.len() == 2 && names[0] != names[1], "{names:?}");
    let name = tollgate::store::replica_name();
    assert!(names.iter().all(|named| named.starts_with(&name)), "{names:?}");
    // Nobody waits for one that has taken its leave.
    drop(second);
    soon("it leaves the register", || server.psql("postgres", "SELECT count(*) FROM tollgate.replica") == "1").await;
    assert_eq!(admin.wait(PATIENCE).await.unwrap(), [name], "the only one of its name");
}

/// The time of a change is that of its commit, and not that of its statement in a long transaction.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_transaction_is_no_lag() {
    let server = Postgres::start();
    writer(&settings(&server, own())).await.create(&record("known")).await.unwrap();
    server.psql("postgres", Foreign::TABLES);
    server.psql("postgres", "INSERT INTO keys (digest) VALUES (encode(sha256('known'), 'hex'))");
    let other = settings(&server, Foreign::Hex.source());
    run_triggers_sql(&other, &Foreign::Hex.triggers(&other)).await.unwrap();
    for (settings, sql) in [
        (settings(&server, own()), "UPDATE tollgate.token SET revoked = 1"),
        (other, "UPDATE keys SET revoked_at = now()"),
    ] {
        let store = open(settings);
        let begin = Instant::now();
        let ear = Ear::on(&store);
        ear.hearing(begin).await;
        let (client, driver) = tokio_postgres::connect(&server.url("postgres"), tokio_postgres::NoTls).await.unwrap();
        let driver = tokio::spawn(driver);
        client.batch_execute(&format!("BEGIN; {sql}; SELECT pg_sleep(3)")).await.unwrap();
        let committed_ms = tollgate::edge::now().unix_ms;
        let before = Instant::now();
        client.batch_execute("COMMIT").await.unwrap();
        ear.change_of(before, &*store, "known").await;
        let digest = Digest::of(b"known");
        let events = ear.events();
        let times: Vec<u64> = events
            .iter()
            .filter_map(|event| if let Event::Changed(changes) = event { Some(changes) } else { None })
            .flatten()
            .filter(|change| change.token == Named::Token(digest))
            .map(|change| change.at_ms)
            .collect();
        assert!(!times.is_empty());
        // Up to one beat too early, and so never a lag that is too small.
        for at_ms in times {
            assert!(at_ms + 1_500 > committed_ms, "{} ms before the commit", committed_ms - at_ms);
            assert!(at_ms <= tollgate::edge::now().unix_ms);
        }
        driver.abort();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_changes_of_one_statement_are_named_in_few_messages() {
    let server = Postgres::start();
    writer(&settings(&server, own())).await;
    let store = open(settings(&server, own()));
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    let beginning = ear.events().len();
    let row = "decode(repeat(lpad(to_hex(n), 8, '0'), 8), 'hex')";
    for sql in [
        format!("INSERT INTO tollgate.token (digest, \"user\") SELECT {row}, 'ann' FROM generate_series(1, 5003) n"),
        "UPDATE tollgate.token SET revoked = 1".into(),
        "DELETE FROM tollgate.token".into(),
    ] {
        let seen = ear.events().len();
        let said = server.psql("postgres", &format!("LISTEN tollgate_change; {sql}"));
        let words: Vec<_> =
            said.lines().filter_map(|line| line.split_once("with payload \"")).map(|(_, word)| word).collect();
        assert!(!words.is_empty() && words.len() < 200, "{} messages", words.len());
        assert!(words.iter().all(|word| word.len() < 8_000 && !word.starts_with('*')));
        let named = || -> std::collections::HashSet<[u8; 32]> {
            let events = ear.events();
            let changes = events[seen..].iter().filter_map(|event| match event {
                Event::Changed(changes) => Some(changes),
                _ => None,
            });
            changes
                .flatten()
                .map(|change| match change.token {
                    Named::Token(digest) | Named::Handle(digest) => *digest.as_bytes(),
                })
                .collect()
        };
        soon("all are named", || named().len() == 5_003).await;
    }
    let events = &ear.events()[beginning..];
    assert!(!events.contains(&Event::Hearing) && !events.contains(&Event::Deaf), "{:?}", events.len());
    // Nothing is said twice: by a message, and by the list of changes.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let told: usize =
        ear.events().iter().map(|event| if let Event::Changed(changes) = event { changes.len() } else { 0 }).sum();
    assert_eq!(told, 3 * 5_003);
}

/// Triggers that are switched off promise nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn triggers_that_are_off_tell_of_nothing() {
    let server = Postgres::start();
    let mut admin = writer(&settings(&server, own())).await;
    admin.create(&record("known")).await.unwrap();
    server.psql("postgres", Foreign::TABLES);
    let gitlab = settings(&server, Source::GitlabPat);
    run_triggers_sql(&gitlab, &Foreign::Pat.triggers(&gitlab)).await.unwrap();
    for (settings, table, like) in [
        (settings(&server, own()), "tollgate.token", "tollgate_altered"),
        (gitlab.clone(), "public.personal_access_tokens", "tollgate_altered_%"),
        (gitlab, "public.users", "tollgate_owner_%"),
    ] {
        let store = open(settings);
        let begin = Instant::now();
        let ear = Ear::on(&store);
        ear.hearing(begin).await;
        let names = server.psql(
            "postgres",
            &format!("SELECT tgname FROM pg_trigger WHERE tgrelid = '{table}'::regclass AND tgname LIKE '{like}'"),
        );
        for name in names.lines() {
            for how in ["DISABLE TRIGGER", "ENABLE REPLICA TRIGGER"] {
                let before = Instant::now();
                server.psql("postgres", &format!("ALTER TABLE {table} {how} {name}"));
                ear.heard(before, "deafness", |event| *event == Event::Deaf).await;
                let before = Instant::now();
                server.psql("postgres", &format!("ALTER TABLE {table} ENABLE ALWAYS TRIGGER {name}"));
                ear.hearing(before).await;
            }
        }
    }
    // From the start on.
    server.psql("postgres", "ALTER TABLE tollgate.token DISABLE TRIGGER ALL");
    let store = open(settings(&server, own()));
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.heard(begin, "deafness", |event| *event == Event::Deaf).await;
    assert!(!ear.events().contains(&Event::Hearing));
    // A migration puts things right.
    PostgresAdmin::migrate(&settings(&server, own())).await.unwrap();
    ear.hearing(begin).await;
    let before = Instant::now();
    admin.revoke(&Digest::of(b"known"), 1_760_000_000).await.unwrap();
    ear.change_of(before, &*store, "known").await;
}

/// Triggers that fire, and whose function somebody replaced by one that does nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn triggers_whose_function_was_replaced_tell_of_nothing() {
    let server = Postgres::start();
    writer(&settings(&server, own())).await;
    server.psql("postgres", Foreign::TABLES);
    let gitlab = settings(&server, Source::GitlabPat);
    let install = Foreign::Pat.triggers(&gitlab);
    run_triggers_sql(&gitlab, &install).await.unwrap();
    let functions = server.psql(
        "postgres",
        "SELECT p.oid::regprocedure FROM pg_proc p WHERE pronamespace = 'tollgate'::regnamespace ORDER BY 1",
    );
    assert_eq!(functions.lines().count(), 9, "{functions}");
    let (own, gitlab_store) = (open(settings(&server, own())), open(gitlab.clone()));
    let begin = Instant::now();
    let ears = [Ear::on(&own), Ear::on(&gitlab_store)];
    for ear in &ears {
        ear.hearing(begin).await;
    }
    for function in functions.lines() {
        let is_own = ["tell", "token_"].iter().any(|name| function.contains(name));
        let ear = &ears[usize::from(!is_own)];
        let (nothing, kind) = match function.contains("tell(") {
            true => ("BEGIN END", "void"),
            // It names the channel, as the true one does.
            false => ("BEGIN RETURN NULL; PERFORM pg_notify('tollgate_change', '*'); END", "trigger"),
        };
        let replace = server.psql("postgres", &format!("SELECT pg_get_function_arguments('{function}'::regprocedure)"));
        let name = function.split('(').next().unwrap();
        let before = Instant::now();
        server.psql(
            "postgres",
            &format!(
                "CREATE OR REPLACE FUNCTION {name}({replace}) RETURNS {kind} LANGUAGE plpgsql AS '{}'",
                nothing.replace('\'', "''")
            ),
        );
        ear.heard(before, "deafness", |event| *event == Event::Deaf).await;
        let before = Instant::now();
        if is_own {
            PostgresAdmin::migrate(&settings(&server, self::own())).await.unwrap();
        } else {
            run_triggers_sql(&gitlab, &install).await.unwrap();
        }
        ear.hearing(before).await;
    }
}

/// In a session like those that load a copy, triggers fire only if they are told to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn triggers_fire_for_whoever_loads_a_copy() {
    let server = Postgres::start();
    writer(&settings(&server, own())).await.create(&record("known")).await.unwrap();
    server.psql("postgres", Foreign::TABLES);
    let gitlab = settings(&server, Source::GitlabPat);
    run_triggers_sql(&gitlab, &Foreign::Pat.triggers(&gitlab)).await.unwrap();
    server.psql(
        "postgres",
        "INSERT INTO users (username) VALUES ('ann'); INSERT INTO personal_access_tokens (user_id, token) VALUES (1, 'known')",
    );
    for (settings, sql) in [
        (settings(&server, own()), "UPDATE tollgate.token SET revoked = 1"),
        (settings(&server, own()), "DELETE FROM tollgate.token"),
        (gitlab.clone(), "UPDATE personal_access_tokens SET revoked = true"),
        (gitlab, "UPDATE users SET state = 'blocked'"),
    ] {
        let store = open(settings);
        let begin = Instant::now();
        let ear = Ear::on(&store);
        ear.hearing(begin).await;
        let before = Instant::now();
        server.psql("postgres", &format!("SET session_replication_role = replica; {sql}"));
        ear.change_of(before, &*store, "known").await;
        assert!(ear.events().iter().any(|event| matches!(event, Event::Changed(_))), "{sql}: {:?}", ear.events());
    }
}

/// Logical replication applies changes row by row, in a session like those above.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_that_arrive_by_logical_replication_are_told() {
    let (mut from, to) = (Postgres::start(), Postgres::start());
    from.psql("postgres", "ALTER SYSTEM SET wal_level = logical");
    from.stop();
    from.start_again();
    let mut admin = writer(&settings(&from, own())).await;
    writer(&settings(&to, own())).await;
    for server in [&from, &to] {
        server.psql("postgres", Foreign::TABLES);
    }
    let gitlab = settings(&to, Source::GitlabPat);
    run_triggers_sql(&gitlab, &Foreign::Pat.triggers(&gitlab)).await.unwrap();
    from.psql("postgres", "CREATE PUBLICATION p FOR TABLE tollgate.token, users, personal_access_tokens");
    let at = format!("host={} port={} user=postgres dbname=postgres", from.socket().display(), from.port());
    admin.create(&record("known")).await.unwrap();
    from.psql(
        "postgres",
        "INSERT INTO users (username) VALUES ('ann'); INSERT INTO personal_access_tokens (user_id, token) VALUES (1, 'known')",
    );
    to.psql("postgres", &format!("CREATE SUBSCRIPTION s CONNECTION '{at}' PUBLICATION p"));
    let ready = "SELECT count(*) FROM pg_subscription_rel WHERE srsubstate = 'r'";
    soon("the copy is there", || to.psql("postgres", ready) == "3").await;
    let (own, gitlab) = (open(settings(&to, own())), open(gitlab));
    let begin = Instant::now();
    let [own_ear, gitlab_ear] = [&own, &gitlab].map(Ear::on);
    own_ear.hearing(begin).await;
    gitlab_ear.hearing(begin).await;
    let before = Instant::now();
    admin.revoke(&Digest::of(b"known"), 1_760_000_000).await.unwrap();
    own_ear.change_of(before, &*own, "known").await;
    assert_eq!(lookup(&*own, b"known").await.unwrap().revoked, Some(1_760_000_000));
    let before = Instant::now();
    from.psql("postgres", "UPDATE users SET state = 'blocked'");
    gitlab_ear.change_of(before, &*gitlab, "known").await;
    assert!(lookup(&*gitlab, b"known").await.unwrap().blocked);
    // Triggers that fire for ordinary sessions only are none there.
    let before = Instant::now();
    to.psql(
        "postgres",
        "DO $$ DECLARE t name; BEGIN FOR t IN SELECT tgname FROM pg_trigger WHERE tgrelid = 'users'::regclass
         AND tgname LIKE 'tollgate_owner_%' LOOP EXECUTE format('ALTER TABLE users ENABLE TRIGGER %I', t); END LOOP; END $$",
    );
    gitlab_ear.heard(before, "deafness", |event| *event == Event::Deaf).await;
    to.psql("postgres", "DROP SUBSCRIPTION s");
}

/// Has the server say that so much of its notification queue is in use.
fn queue_usage(server: &Postgres, usage: &str) {
    server.psql(
        "postgres",
        &format!(
            "SET allow_system_table_mods = on;
             DO $do$ BEGIN IF to_regproc('pg_catalog.pg_true_usage') IS NULL THEN
                 ALTER FUNCTION pg_catalog.pg_notification_queue_usage() RENAME TO pg_true_usage;
             END IF; END $do$;
             CREATE OR REPLACE FUNCTION pg_catalog.pg_notification_queue_usage() RETURNS double precision VOLATILE
                 LANGUAGE sql AS 'SELECT {usage}::double precision'"
        ),
    );
}

/// Nothing can be written to a full queue: whoever tries loses the transaction.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_of_notifications_fails_no_change_and_hides_none() {
    let server = Postgres::start();
    let mut admin = writer(&settings(&server, own())).await;
    for token in ["one", "two", "three"] {
        admin.create(&record(token)).await.unwrap();
    }
    server.psql("postgres", Foreign::TABLES);
    let gitlab = settings(&server, Foreign::Hex.source());
    run_triggers_sql(&gitlab, &Foreign::Hex.triggers(&gitlab)).await.unwrap();
    let hears = open(settings(&server, own()));
    let other = open(gitlab);
    let begin = Instant::now();
    let (ear, other_ear) = (Ear::on(&hears), Ear::on(&other));
    ear.hearing(begin).await;
    other_ear.hearing(begin).await;
    let before = Instant::now();
    queue_usage(&server, "0.9");
    // Where changes are told by notifications only, nothing is promised from here on.
    other_ear.heard(before, "deafness", |event| *event == Event::Deaf).await;
    // Of our own tables there is a list, which is read.
    let late = open(settings(&server, own()));
    let begin = Instant::now();
    let late_ear = Ear::on(&late);
    late_ear.hearing(begin).await;
    let sent = |sql: &str| server.psql("postgres", &format!("LISTEN tollgate_change; {sql}")).contains("with payload");
    let before = Instant::now();
    let one = format!("UPDATE tollgate.token SET revoked = 1 WHERE digest = '\\x{}'", Digest::of(b"one").to_hex());
    assert!(!sent(&one), "a notification");
    assert!(!sent("INSERT INTO keys (digest) VALUES (repeat('a', 64))"), "a notification");
    let at = [ear.change_of(before, &*hears, "one").await, late_ear.change_of(before, &*late, "one").await];
    for at in at {
        assert!(at - before < LAG, "{:?}", at - before);
    }
    let before = Instant::now();
    admin.revoke(&Digest::of(b"two"), 1_760_000_000).await.unwrap();
    ear.change_of(before, &*hears, "two").await;
    assert_eq!(admin.wait(PATIENCE).await.unwrap().len(), 2, "confirmed without a notification");
    // Once there is room, notifications are back for all.
    let before = Instant::now();
    queue_usage(&server, "0.0");
    other_ear.hearing(before).await;
    let before = Instant::now();
    assert!(sent(&one.replace("revoked = 1", "revoked = 2")), "no notification");
    late_ear.change_of(before, &*late, "one").await;
    for ear in [&ear, &late_ear] {
        assert!(!ear.events().contains(&Event::Deaf), "{:?}", ear.events());
        assert_eq!(ear.events().iter().filter(|event| **event == Event::Hearing).count(), 1, "{:?}", ear.events());
    }
}

/// Transaction ids are a server's to spend: it has to freeze old rows before it has spent two thousand million.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_without_work_spends_few_transaction_ids() {
    let server = Postgres::start();
    writer(&settings(&server, own())).await;
    let store = open(settings(&server, own()));
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    let next = || -> u64 {
        let sql = "SELECT txid_snapshot_xmax(txid_current_snapshot())";
        server.psql("postgres", sql).parse().unwrap()
    };
    let (first, since) = (next(), Instant::now());
    while since.elapsed() < Duration::from_secs(9) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let spent = next() - first;
    println!("{spent} transaction ids in {:?}", since.elapsed());
    // Every three seconds its row of the register, and every five an echo; each of them once more for good measure.
    assert!(spent <= 7, "{spent}");
}

/// Gateways are upgraded before the tables: those of the version before have no list of changes that could be read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_of_an_older_version_are_followed_and_migrated_under_gateways_that_run() {
    let server = Postgres::start();
    let made = ["1.sql", "2.sql"].map(|name| {
        let sql = std::fs::read_to_string(crate::servers::repository("src/store/postgres").join(name)).unwrap();
        sql.replace("{schema}", "\"tollgate\"")
    });
    server.psql(
        "postgres",
        &format!("CREATE SCHEMA tollgate; {}; UPDATE tollgate.version SET version = 2", made.join(";")),
    );
    let mut admin = PostgresAdmin::open(&settings(&server, own())).await.unwrap();
    for token in ["one", "two", "three"] {
        admin.create(&record(token)).await.unwrap();
    }
    let store = open(settings(&server, own()));
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    let before = Instant::now();
    admin.revoke(&Digest::of(b"one"), 1_760_000_000).await.unwrap();
    ear.change_of(before, &*store, "one").await;
    assert_eq!(admin.wait(PATIENCE).await.unwrap().len(), 1);
    let changed = async || {
        let mark = format!("{} 1", tollgate::edge::now().unix_ms + 60_000);
        store.changed_since(&mark).await.unwrap().unwrap()
    };
    assert!(changed().await.contains(&Digest::of(b"one")));
    assert!(!ear.events().contains(&Event::Deaf), "{:?}", ear.events());

    let before = Instant::now();
    assert_eq!(PostgresAdmin::migrate(&settings(&server, own())).await.unwrap().version, 4);
    ear.hearing(before).await;
    let before = Instant::now();
    admin.revoke(&Digest::of(b"two"), 1_760_000_000).await.unwrap();
    ear.change_of(before, &*store, "two").await;
    assert_eq!(admin.wait(PATIENCE).await.unwrap().len(), 1);
    let changed = changed().await;
    assert!(changed.contains(&Digest::of(b"one")) && changed.contains(&Digest::of(b"two")));
    // Without any notification.
    queue_usage(&server, "0.9");
    let before = Instant::now();
    admin.revoke(&Digest::of(b"three"), 1_760_000_000).await.unwrap();
    ear.change_of(before, &*store, "three").await;
}

/// In one transaction, so that there is no moment without tables, and no trigger fires.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_backup_is_noticed() {
    let server = Postgres::start();
    let mut admin = writer(&settings(&server, own())).await;
    admin.create(&record("known")).await.unwrap();
    let backup = std::process::Command::new("pg_dump")
        .args(["-U", "postgres", "-n", "tollgate", "-h", server.socket().to_str().unwrap()])
        .args(["-p", &server.port().to_string(), "--inserts", "postgres"])
        .output()
        .unwrap();
    // The command of psql's own that newer versions write is not SQL.
    let sql = String::from_utf8(backup.stdout).unwrap();
    let sql: Vec<_> = sql.lines().filter(|line| !line.starts_with('\\')).collect();
    admin.revoke(&Digest::of(b"known"), 1_760_000_000).await.unwrap();
    let store = open(settings(&server, own()));
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    let before = Instant::now();
    server.psql("postgres", &format!("BEGIN; DROP SCHEMA tollgate CASCADE; {}; COMMIT", sql.join("\n")));
    ear.hearing(before).await;
    assert_eq!(lookup(&*store, b"known").await, Some(record("known")));
    let before = Instant::now();
    admin.revoke(&Digest::of(b"known"), 1_760_000_000).await.unwrap();
    ear.change_of(before, &*store, "known").await;
}

/// Figures: `cargo test --release --lib postgres_figures -- --ignored --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "prints figures and judges nothing"]
async fn postgres_figures() {
    let server = Postgres::start();
    let mut admin = writer(&settings(&server, own())).await;
    let rows: u64 = std::env::var("ROWS").ok().and_then(|rows| rows.parse().ok()).unwrap_or(100_000);
    let mut records = (0..rows).map(|row| Ok(record(&format!("row-{row}"))));
    let before = Instant::now();
    admin.import(&mut records).await.unwrap();
    let took = before.elapsed();
    #[allow(clippy::cast_precision_loss)]
    let speed = rows as f64 / took.as_secs_f64();
    println!("import: {rows} rows in {took:?}, {speed:.0} rows/s");
    let store = open(settings(&server, own()));
    let quantiles = |what: &str, mut times: Vec<Duration>| {
        times.sort();
        let at = |part: usize| times[times.len() * part / 1000];
        println!("{what}: p50 {:?} p99 {:?} p99.9 {:?} ({} of them)", at(500), at(990), at(999), times.len());
    };
    let mut times = Vec::new();
    for row in 0..10_000 {
        let before = Instant::now();
        assert!(lookup(&*store, format!("row-{row}").as_bytes()).await.is_some());
        times.push(before.elapsed());
    }
    quantiles("lookup, one at a time", times);
    let before = Instant::now();
    let tasks: Vec<_> = (0..32)
        .map(|task| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let mut times = Vec::new();
                for row in 0..1_000 {
                    let before = Instant::now();
                    assert!(lookup(&*store, format!("row-{}", task * 1_000 + row).as_bytes()).await.is_some());
                    times.push(before.elapsed());
                }
                times
            })
        })
        .collect();
    let mut times = Vec::new();
    for task in tasks {
        times.extend(task.await.unwrap());
    }
    println!("32000 lookups by 32 tasks in {:?}", before.elapsed());
    quantiles("lookup, 32 tasks on 8 connections", times);
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    let mut times = Vec::new();
    for row in 0..1_000 {
        let token = format!("row-{row}");
        let before = Instant::now();
        admin.revoke(&Digest::of(token.as_bytes()), 1_760_000_000).await.unwrap();
        let found = loop {
            let told = |event: &Event| matches!(event, Event::Changed(changes) if changes.iter().any(|change| change.token == Named::Token(Digest::of(token.as_bytes()))));
            let at = ear.events.lock().iter().rev().take(5).find(|(_, event)| told(event)).map(|(at, _)| *at);
            match at {
                Some(at) => break at,
                None => tokio::time::sleep(Duration::from_micros(200)).await,
            }
        };
        times.push(found.saturating_duration_since(before));
    }
    quantiles("revocation, from the command to the gateway's ear", times);
}
