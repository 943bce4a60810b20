//! Redis, with records as JSON and as hashes, and its special features.

use super::*;
use crate::servers::redis::{Cluster, Options, Redis, Watched};
use crate::servers::tls::Authority;
use tollgate::store::query::TokenQuery;
use tollgate::store::redis::{KEYSPACE_EVENTS, RedisAdmin, RedisChanges, RedisSettings, RedisStore, Topology};
use tollgate::store::{IDLE, Imported, Records, Secret, TlsMode, TlsSettings, Visitor};
use tollgate::telemetry::metrics::{Metrics, StoreMetrics};

const CHANNEL: &str = "tollgate:changes";

fn metrics() -> Arc<StoreMetrics> {
    Arc::new(Metrics::new("test").unwrap().store("redis"))
}

fn settings(servers: &[String]) -> RedisSettings {
    RedisSettings {
        servers: servers.to_vec(),
        topology: Topology::Single,
        database: 0,
        username: None,
        password: None,
        tls: TlsSettings { mode: TlsMode::Disable, ca: None, client: None },
        prefix: "tollgate:".into(),
        changes: RedisChanges::Channel(CHANNEL.into()),
        connections: 2,
        idle: IDLE,
        default_scopes: vec!["default".into()],
    }
}

fn open(settings: &RedisSettings) -> Arc<dyn TokenStore> {
    Arc::new(RedisStore::new(settings.clone(), metrics()).unwrap())
}

async fn admin(settings: &RedisSettings) -> RedisAdmin {
    RedisAdmin::open(settings).await.unwrap()
}

fn key(token: &str) -> String {
    format!("tollgate:{}", Digest::of(token.as_bytes()).to_hex())
}

struct RedisSubject {
    server: Mutex<Redis>,
    settings: RedisSettings,
    /// Records are hashes that another program writes.
    hashes: bool,
}

impl RedisSubject {
    fn new(hashes: bool) -> Self {
        let config: &[&str] = if hashes { &["notify-keyspace-events Kg$hx"] } else { &[] };
        let server = Redis::start(&Options { durable: true, config, ..Options::default() });
        let mut settings = settings(&[server.address()]);
        if hashes {
            settings.changes = RedisChanges::Keyspace;
        }
        Self { server: Mutex::new(server), settings, hashes }
    }
}

#[async_trait]
impl Subject for RedisSubject {
    fn name(&self) -> &'static str {
        if self.hashes { "redis hashes" } else { "redis" }
    }

    fn features(&self) -> Features {
        Features {
            hears: true,
            keeps_all: true,
            is_ours: true,
            waits: !self.hashes,
            has_server: true,
            spoils: true,
            tells_why: true,
        }
    }

    async fn admin(&self) -> Box<dyn TokenAdmin> {
        let admin = admin(&self.settings).await;
        if self.hashes { Box::new(HashAdmin { admin, port: self.server.lock().port }) } else { Box::new(admin) }
    }

    fn open(&self) -> Arc<dyn TokenStore> {
        open(&self.settings)
    }

    async fn spoil(&self, token: &str) {
        let server = self.server.lock();
        server.cli(&["DEL", &key(token)]);
        server.cli(&["SET", &key(token), "S3CRET"]);
    }

    async fn fault(&self, fault: Fault) {
        self.server.lock().inject(fault);
    }
}

/// Another program that stores its tokens as hashes, using redis-cli.
struct HashAdmin {
    admin: RedisAdmin,
    port: u16,
}

impl HashAdmin {
    /// Returns how many were new.
    fn write(&self, records: &[TokenRecord]) -> u64 {
        use std::io::Write as _;
        let mut cli = std::process::Command::new("redis-cli")
            .args(["-p", &self.port.to_string(), "--no-raw"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = cli.stdin.take().unwrap();
        let mut commands = String::new();
        for record in records {
            let script = "if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end redis.call('HSET', KEYS[1], unpack(ARGV)) return 1";
            let time = |time: Option<u64>| time.map_or(String::new(), |time| time.to_string());
            let hex = record.digest.to_hex();
            commands += &format!("EVAL {script:?} 1 tollgate:{hex}");
            let scopes = record.scopes.join(" ");
            let replaces = record.replaces.map_or(String::new(), Digest::to_hex);
            for (name, value) in [
                ("user", record.user.clone()),
                ("scopes", scopes),
                ("description", record.description.clone()),
                ("created", record.created.to_string()),
                ("not_before", time(record.not_before)),
                ("expires", time(record.expires)),
                // Second 1 stands for no known time.
                ("revoked", if record.revoked == Some(1) { "true".into() } else { time(record.revoked) }),
                ("blocked", u8::from(record.blocked).to_string()),
                ("superseded", time(record.superseded)),
                ("replaces", replaces),
                ("last_used", time(record.last_used)),
            ] {
                commands += &format!(" {name} \"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""));
            }
            commands.push('\n');
        }
        let writer = std::thread::spawn(move || stdin.write_all(commands.as_bytes()));
        let output = cli.wait_with_output().unwrap();
        writer.join().unwrap().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(text.matches("(integer)").count(), records.len(), "{text}");
        text.matches("(integer) 1").count() as u64
    }
}

#[async_trait]
impl TokenAdmin for HashAdmin {
    async fn create(&mut self, record: &TokenRecord) -> Result<(), AdminError> {
        if self.write(std::slice::from_ref(record)) == 1 { Ok(()) } else { Err(AdminError::Exists) }
    }
    async fn import(&mut self, records: Records<'_>) -> Result<Imported, AdminError> {
        let records = records.collect::<Result<Vec<_>, _>>()?;
        let mut imported = Imported::default();
        for records in records.chunks(500) {
            imported.new += self.write(records);
            for record in records {
                for known in self.admin.find(&record.digest.to_hex()).await? {
                    imported.differing.compare(&known, record);
                }
            }
        }
        Ok(imported)
    }
    async fn list(&mut self) -> Result<Vec<TokenRecord>, AdminError> {
        self.admin.list().await
    }
    async fn find(&mut self, hex_prefix: &str) -> Result<Vec<TokenRecord>, AdminError> {
        self.admin.find(hex_prefix).await
    }
    async fn revoke(&mut self, digest: &Digest, at: u64) -> Result<bool, AdminError> {
        self.admin.revoke(digest, at).await
    }
    async fn revoke_user(&mut self, user: &str, at: u64) -> Result<u64, AdminError> {
        self.admin.revoke_user(user, at).await
    }
    async fn select(&mut self, query: &TokenQuery, each: Visitor<'_>) -> Result<(), AdminError> {
        self.admin.select(query, each).await
    }
    async fn remove(&mut self, digests: &[Digest], still: &TokenQuery) -> Result<u64, AdminError> {
        self.admin.remove(digests, still).await
    }
    async fn rotate(&mut self, old: &Digest, next: &TokenRecord, at: u64, end: u64) -> Result<(), AdminError> {
        self.admin.rotate(old, next, at, end).await
    }
    async fn block(&mut self, user: &str, blocked: bool) -> Result<u64, AdminError> {
        self.admin.block(user, blocked).await
    }
    async fn wait(&mut self, timeout: Duration) -> Result<Vec<String>, AdminError> {
        self.admin.wait(timeout).await
    }
}

/// An empty store with records as tollgate writes them.
pub fn kind() -> (&'static str, Box<dyn Subject>) {
    ("redis", Box::new(RedisSubject::new(false)))
}

#[tokio::test]
async fn redis_holds_the_contract() {
    run(&RedisSubject::new(false)).await;
}

#[tokio::test]
async fn redis_hashes_hold_the_contract() {
    run(&RedisSubject::new(true)).await;
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let base = settings(&["127.0.0.1:6379".into()]);
    let with = |change: fn(&mut RedisSettings)| {
        let mut settings = base.clone();
        change(&mut settings);
        RedisStore::new(settings, metrics()).err()
    };
    assert_eq!(with(|_| {}), None, "valid settings; no connection is made");
    for (why, part) in [
        (with(|s| s.servers.clear()), "at least one"),
        (with(|s| s.servers = vec!["redis://u:S3CRET@h:1".into()]), "HOST:PORT"),
        (with(|s| s.servers = vec!["S3CRET".into()]), "HOST:PORT"),
        (with(|s| s.servers = vec!["a:1".into(), "b:1".into()]), "must be one"),
        (with(|s| s.username = Some("S3CRET".into())), "without a password"),
        (with(|s| (s.topology, s.changes) = (Topology::Cluster, RedisChanges::Keyspace)), "changes = \"channel\""),
        (with(|s| (s.topology, s.database) = (Topology::Cluster, 1)), "only database 0"),
        (with(|s| (s.topology, s.tls.mode) = (Topology::Cluster, TlsMode::VerifyCa)), "verify-full"),
        (with(|s| (s.topology, s.servers) = (Topology::Cluster, vec!["unix:/x".into()])), "unix socket"),
        (
            with(|s| (s.tls.mode, s.tls.ca) = (TlsMode::VerifyFull, Some(std::path::PathBuf::from("/nowhere").into()))),
            "/nowhere",
        ),
    ] {
        let why = why.unwrap().to_string();
        assert!(why.contains(part) && !why.contains("S3CRET"), "{why}");
    }
    let secret = RedisSettings { password: Some(Secret::new("S3CRET")), ..base };
    assert!(!format!("{secret:?}").contains("S3CRET"));
}

#[tokio::test]
async fn an_acl_user_needs_only_what_is_documented() {
    let server = Redis::start(&Options {
        users: &[
            "user reader on >S3CRET ~tollgate:* +get +hgetall",
            "user gateway on >S3CRET ~tollgate:* &tollgate:changes +get +hgetall +subscribe +ping +role +time +zadd +zrem \
             +zrangebyscore +sadd +expire +client|tracking",
            "user older on >S3CRET ~tollgate:* &tollgate:changes +get +hgetall +subscribe +ping +role +time +zadd +zrem \
             +zrangebyscore +sadd +expire",
            "user admin on >S3CRET ~tollgate:* &tollgate:changes +get +hgetall +time +zadd +zrangebyscore +expire +eval +set \
             +hset +hget +scan +exists +publish +smembers +zremrangebyscore +del",
            "user nobody on >S3CRET ~other:* +get +hgetall",
        ],
        ..Options::default()
    });
    let of = |user: &str, password: &str| RedisSettings {
        username: Some(user.into()),
        password: Some(Secret::new(password)),
        ..settings(&[server.address()])
    };
    let mut admin = admin(&of("admin", "S3CRET")).await;
    admin.create(&record("known")).await.unwrap();
    let reader = open(&of("reader", "S3CRET"));
    assert_eq!(lookup(&*reader, b"known").await, Some(record("known")));
    assert_eq!(lookup(&*reader, b"nobody").await, None);

    let store = open(&of("gateway", "S3CRET"));
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    let before = Instant::now();
    admin.rotate(&Digest::of(b"known"), &record("next"), 1_760_000_000, 1_760_000_100).await.unwrap();
    ear.change_of(before, &*store, "next").await;
    assert_eq!(admin.wait(PATIENCE).await.unwrap().len(), 1);
    assert_eq!(admin.block(&record("next").user, true).await.unwrap(), 1);
    assert_eq!(admin.list().await.unwrap().len(), 2);
    assert!(admin.revoke(&Digest::of(b"next"), 1_760_000_000).await.unwrap());

    // Permissions from before FLUSHALL was detected: everything else works.
    let store = open(&of("older", "S3CRET"));
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    let before = Instant::now();
    assert!(admin.revoke(&Digest::of(b"known"), 1_760_000_000).await.unwrap());
    ear.change_of(before, &*store, "known").await;

    for (user, password, expected) in [
        ("nobody", "S3CRET", StoreError::Denied("NOPERM".into())),
        ("reader", "wr0ng-S3CRET", StoreError::Unavailable("check username and password".into())),
        ("stranger", "S3CRET", StoreError::Unavailable("check username and password".into())),
    ] {
        let why = ask(&*open(&of(user, password)), b"known").await.unwrap_err();
        match (&why, &expected) {
            (StoreError::Denied(what), StoreError::Denied(part))
            | (StoreError::Unavailable(what), StoreError::Unavailable(part)) => assert!(what.contains(part), "{why}"),
            _ => panic!("{user}: {why:?}"),
        }
        assert!(!format!("{why:?}").contains("S3CRET") && !why.to_string().contains(&key("known")), "{why}");
    }
}

#[tokio::test]
async fn the_server_is_checked() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let server = Redis::start(&Options { tls: Some(&authority), ..Options::default() });
    admin(&settings(&[server.address()])).await.create(&record("known")).await.unwrap();
    let of = |host: &str, mode, ca: &Authority| RedisSettings {
        tls: TlsSettings { mode, ca: Some(ca.ca().into()), client: None },
        ..settings(&[format!("{host}:{}", server.tls_port)])
    };
    for (host, mode, ca) in [
        ("127.0.0.1", TlsMode::VerifyFull, &authority),
        ("localhost", TlsMode::VerifyFull, &authority),
        ("127.0.0.2", TlsMode::VerifyCa, &authority),
        ("127.0.0.1", TlsMode::Require, &stranger),
    ] {
        if host == "127.0.0.2" {
            server.cli(&["CONFIG", "SET", "bind", "127.0.0.1 127.0.0.2"]);
        }
        let store = open(&of(host, mode, ca));
        assert_eq!(lookup(&*store, b"known").await, Some(record("known")), "{host} {mode:?}");
        let begin = Instant::now();
        Ear::on(&store).hearing(begin).await;
    }
    for (host, mode, ca) in [
        ("127.0.0.1", TlsMode::VerifyFull, &stranger),
        ("127.0.0.1", TlsMode::VerifyCa, &stranger),
        ("127.0.0.2", TlsMode::VerifyFull, &authority),
    ] {
        let why = ask(&*open(&of(host, mode, ca)), b"known").await.unwrap_err();
        assert!(
            matches!(&why, StoreError::Unavailable(what) if what.contains("certificate")),
            "{host} {mode:?}: {why}"
        );
    }
}

/// `tls = "auto"` with all servers on this machine means plain text, and then every address must be on this machine, also
/// those that sentinels or cluster nodes name. 0.0.0.0 reaches this machine, so that a connection would succeed.
#[tokio::test]
async fn plain_text_goes_to_this_machine_only_whoever_names_the_address() {
    let here = TlsSettings { mode: TlsMode::Local, ca: None, client: None };
    let server = Redis::start(&Options::default());
    admin(&settings(&[server.address()])).await.create(&record("known")).await.unwrap();
    let sentinel = Redis::sentinel(server.port);
    sentinel.cli(&["SENTINEL", "MONITOR", "elsewhere", "0.0.0.0", &server.port.to_string(), "1"]);
    let mut seen = 0;
    for (master, tls, works) in [
        ("main", here.clone(), true),
        ("elsewhere", here.clone(), false),
        ("elsewhere", TlsSettings { mode: TlsMode::Disable, ..here.clone() }, true),
    ] {
        seen += 1;
        let topology = Topology::Sentinel { master: master.into() };
        let store = open(&RedisSettings { topology, tls, ..settings(&[sentinel.address()]) });
        let begin = Instant::now();
        let ear = Ear::on(&store);
        match works {
            true => {
                assert_eq!(lookup(&*store, b"known").await, Some(record("known")), "{master}");
                ear.hearing(begin).await;
            }
            false => {
                let why = ask(&*store, b"known").await.unwrap_err().to_string();
                assert!(why.contains("0.0.0.0") && why.contains("is another machine"), "{why}");
                ear.heard(begin, "deafness", |event| *event == Event::Deaf).await;
            }
        }
    }
    assert_eq!(seen, 3);
    // Also without name resolution.
    let mut elsewhere = RedisSettings { tls: here.clone(), ..settings(&[format!("0.0.0.0:{}", server.port)]) };
    assert!(ask(&*open(&elsewhere), b"known").await.unwrap_err().to_string().contains("is another machine"));
    elsewhere.tls.mode = TlsMode::Disable;
    assert!(ask(&*open(&elsewhere), b"known").await.is_ok());

    let cluster = Cluster::start();
    let here = RedisSettings { topology: Topology::Cluster, tls: here, ..settings(&[cluster.nodes[0].address()]) };
    admin(&here).await.create(&record("known")).await.unwrap();
    assert_eq!(lookup(&*open(&here), b"known").await, Some(record("known")));
}

#[tokio::test]
async fn unix_sockets_and_databases() {
    let server = Redis::start(&Options::default());
    let there = settings(&[format!("unix:{}", server.socket().display())]);
    let third = RedisSettings { database: 3, ..there.clone() };
    admin(&there).await.create(&record("known")).await.unwrap();
    assert!(lookup(&*open(&there), b"known").await.is_some());
    assert_eq!(lookup(&*open(&third), b"known").await, None);
    let gone = ask(&*open(&settings(&["unix:/nowhere/redis".into()])), b"known").await;
    assert!(matches!(&gone, Err(StoreError::Unavailable(what)) if what.contains("/nowhere/redis")), "{gone:?}");
    let none = ask(&*open(&RedisSettings { database: 99, ..there }), b"known").await;
    assert!(matches!(&none, Err(StoreError::Unavailable(_))), "{none:?}");
}

#[tokio::test]
async fn values_that_make_no_sense_are_no_answer() {
    let server = Redis::start(&Options::default());
    let store = open(&settings(&[server.address()]));
    let set = |command: &[&str]| {
        server.cli(&["DEL", &key("known")]);
        server.cli(&[&[command[0], &key("known")], &command[1..]].concat());
    };
    for (command, part) in [
        (&["RPUSH", "S3CRET"][..], "neither a text nor a hash"),
        (&["SET", "S3CRET"], "no JSON"),
        (&["SET", ""], "no JSON"),
        (&["SET", r#"{"user":"a","expires":"S3CRET"}"#], "expires"),
        (&["HSET", "x_name", "S3CRET"], "user"),
        (&["HSET", "user", "a", "expires_at", "S3CRET"], "expires_at"),
        (&["SET", r#"{"user":"a","expires_at":"S3CRET"}"#], "expires_at"),
        (&["SET", r#"{"user":"a","revoked":true,"revoked":false}"#], "a key twice"),
        (&["HSET", "user", "a", "revoked", "S3CRET"], "revoked"),
    ] {
        set(command);
        let why = ask(&*store, b"known").await.unwrap_err();
        let id = Digest::of(b"known").id();
        assert!(
            matches!(&why, StoreError::Garbage(what) if what.contains(part) && what.contains(id.as_str())),
            "{why}"
        );
        assert!(!why.to_string().contains("S3CRET"), "{why}");
    }
    set(&["HSET", "user", "a"]);
    assert_eq!(lookup(&*store, b"known").await.unwrap().scopes, ["default"]);
    server.cli(&["FLUSHALL"]);
    assert_eq!(lookup(&*store, b"known").await, None, "the database is empty: the token is unknown");
    set(&["HSET", "user", "a"]);
    server.cli(&["PEXPIRE", &key("known"), "1"]);
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(lookup(&*store, b"known").await, None, "the key has expired");
}

/// `HSET key user x revoked 1`, by hand.
#[tokio::test]
async fn a_record_that_cannot_be_read_is_named_and_left_out() {
    let server = Redis::start(&Options::default());
    let mut admin = admin(&settings(&[server.address()])).await;
    for token in ["one", "two"] {
        admin.create(&record(token)).await.unwrap();
    }
    server.cli(&["HSET", &key("by hand"), "user", "ann", "revoked", "1"]);
    let id = Digest::of(b"by hand").id().to_string();
    let named = |admin: &mut RedisAdmin| {
        let unreadable = admin.take_unreadable();
        assert!(matches!(&unreadable[..], [what] if what.contains(&id) && what.contains("revoked")), "{unreadable:?}");
    };
    assert_eq!(admin.list().await.unwrap().len(), 2);
    named(&mut admin);
    let mut visited = Vec::new();
    let mut each = |record: TokenRecord| {
        visited.push(record.digest);
        Ok(())
    };
    admin.visit(&mut each).await.unwrap();
    assert_eq!(visited.len(), 2);
    named(&mut admin);
    assert_eq!(admin.block(&record("one").user, true).await.unwrap(), 2);
    named(&mut admin);
    assert_eq!(admin.blocked_users().await.unwrap().len(), 1);
    named(&mut admin);
    assert!(admin.find(&Digest::of(b"by hand").to_hex()).await.unwrap_err().to_string().contains("revoked"));
    assert!(admin.take_unreadable().is_empty());
}

/// One command for each record, and no record of another user read any further: the time is the server's.
#[tokio::test]
async fn a_user_is_blocked_among_a_hundred_thousand_tokens() {
    const TOKENS: u64 = 100_000;
    let server = Redis::start(&Options::default());
    let mut admin = admin(&settings(&[server.address()])).await;
    let fill = r#"for i = 1, ARGV[1] do
        local key, user = 'tollgate:' .. string.format('%064x', i), 'user-' .. i % 5000 .. '.'
        if i % 50000 == 7 then redis.call('HSET', key, 'user', user, 'created', i)
        else redis.call('SET', key, '{"user":"' .. user .. '","scopes":["api"],"created":' .. i .. '}') end end"#;
    server.cli(&["EVAL", fill, "0", &TOKENS.to_string()]);
    // An escape in a name is read as what it means.
    server.cli(&["SET", &key("escaped"), r#"{"user":"user\u002d7."}"#]);
    server.cli(&["CONFIG", "RESETSTAT"]);
    let begin = Instant::now();
    assert_eq!(admin.block("user-7.", true).await.unwrap(), TOKENS / 5_000 + 1);
    let took = begin.elapsed();
    let calls = |command: &str| -> u64 {
        let stats = server.cli(&["INFO", "commandstats"]);
        let line = stats.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{command}:calls=")));
        line.map_or(0, |line| line.split(',').next().unwrap().parse().unwrap())
    };
    assert!(calls("get") < TOKENS + 100 && calls("hgetall") < 100, "{} {}", calls("get"), calls("hgetall"));
    assert!(calls("scan") < 100, "{}", calls("scan"));
    let blocked = admin.of_user("user-7.").await.unwrap();
    assert!(blocked.len() as u64 == TOKENS / 5_000 + 1 && blocked.iter().all(|record| record.blocked));
    assert_eq!(admin.blocked_users().await.unwrap().len(), 1);
    let (mut visited, mut last) = (0, u64::MAX);
    let mut each = |record: TokenRecord| {
        assert!(record.created <= last, "newest first");
        (visited, last) = (visited + 1, record.created);
        Ok(())
    };
    admin.visit(&mut each).await.unwrap();
    assert_eq!(visited, TOKENS + 1);
    println!("redis: a user of {TOKENS} tokens is blocked within {took:.1?}");
    assert!(begin.elapsed() < Duration::from_secs(15), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn an_edit_keeps_the_end_of_a_key_and_what_others_wrote() {
    let server = Redis::start(&Options::default());
    let mut admin = admin(&settings(&[server.address()])).await;
    server.cli(&["SET", &key("json"), r#"{"user":"a","x_theirs":[1]}"#, "EX", "1000"]);
    server.cli(&["HSET", &key("hash"), "user", "a", "x_theirs", "1"]);
    for token in ["json", "hash"] {
        assert!(admin.revoke(&Digest::of(token.as_bytes()), 1_760_000_000).await.unwrap());
    }
    let json = server.cli(&["GET", &key("json")]);
    assert!(json.contains(r#""x_theirs":[1]"#) && json.contains(r#""revoked":1760000000"#), "{json}");
    assert!(server.cli(&["TTL", &key("json")]).parse::<i64>().unwrap() > 900);
    assert_eq!(server.cli(&["HMGET", &key("hash"), "x_theirs", "revoked"]), "1\n1760000000");
}

#[tokio::test]
async fn foreign_writers_are_heard_by_the_keyspace() {
    let server = Redis::start(&Options::default());
    let store = open(&RedisSettings { changes: RedisChanges::Keyspace, ..settings(&[server.address()]) });
    let begin = Instant::now();
    let ear = Ear::on(&store);
    // The server does not send keyspace notifications, and the gateway must not enable them itself.
    ear.heard(begin, "deafness", |event| *event == Event::Deaf).await;
    server.cli(&["CONFIG", "SET", "notify-keyspace-events", "Kg$hx"]);
    ear.hearing(begin).await;
    let key = key("known");
    for command in [
        &["SET", &key, "{}"][..],
        &["DEL", &key],
        &["HSET", &key, "user", "a"],
        &["EXPIRE", &key, "1000"],
        &["PEXPIRE", &key, "50"],
        &["HSET", &key, "user", "b"],
        &["RENAME", &key, "elsewhere"],
    ] {
        let before = Instant::now();
        server.cli(command);
        ear.change_of(before, &*store, "known").await;
        if command[0] == "PEXPIRE" {
            tokio::time::sleep(Duration::from_millis(30)).await;
            let ended = Instant::now();
            // The server expires the key some time later.
            ear.change_of(ended, &*store, "known").await;
        }
    }
    server.cli(&["SET", "tollgate:replicas-of-others", "x"]);
    let before = Instant::now();
    server.cli(&["CONFIG", "SET", "notify-keyspace-events", ""]);
    ear.heard(before, "deafness", |event| *event == Event::Deaf).await;
}

#[tokio::test]
async fn a_flush_is_heard_of() {
    let server = Redis::start(&Options::default());
    server.cli(&["CONFIG", "SET", "notify-keyspace-events", "Kg$hx"]);
    for changes in [RedisChanges::Channel(CHANNEL.into()), RedisChanges::Keyspace] {
        let store = open(&RedisSettings { changes, ..settings(&[server.address()]) });
        let begin = Instant::now();
        let ear = Ear::on(&store);
        ear.hearing(begin).await;
        for command in [&["FLUSHALL"][..], &["FLUSHALL", "ASYNC"], &["FLUSHDB"]] {
            server.cli(&["SET", &key("known"), "{}"]);
            let before = Instant::now();
            server.cli(command);
            ear.hearing(before).await;
        }
    }
}

#[tokio::test]
async fn messages_by_hand() {
    let server = Redis::start(&Options::default());
    let store = open(&settings(&[server.address()]));
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    for message in ["*", "what is this", "* 1700000000000"] {
        let before = Instant::now();
        server.cli(&["PUBLISH", CHANNEL, message]);
        ear.hearing(before).await;
    }
    let before = Instant::now();
    server.cli(&["PUBLISH", CHANNEL, &format!("{} 1700000000000", Digest::of(b"known").to_hex())]);
    ear.change_of(before, &*store, "known").await;
}

#[tokio::test]
async fn a_gateway_that_does_not_confirm_is_named() {
    let server = Redis::start(&Options::default());
    let settings = settings(&[server.address()]);
    let mut admin = admin(&settings).await;
    assert_eq!(admin.wait(PATIENCE).await.unwrap(), Vec::<String>::new(), "no gateway is running");
    let [one, two] = [open(&settings), open(&settings)];
    let begin = Instant::now();
    let (ear, other) = (Ear::on(&one), Ear::on(&two));
    ear.hearing(begin).await;
    other.hearing(begin).await;
    assert_eq!(admin.wait(PATIENCE).await.unwrap().len(), 2);
    let now = server.cli(&["TIME"]).lines().next().unwrap().to_owned() + "000";
    server.cli(&["ZADD", "tollgate:replicas", &now, "ghost:1/0"]);
    let before = Instant::now();
    match admin.wait(Duration::from_millis(300)).await {
        Err(AdminError::Unconfirmed { missing, .. }) => assert_eq!(missing, ["ghost:1/0"]),
        other => panic!("{other:?}"),
    }
    assert!(before.elapsed() < Duration::from_secs(3));
    // A gateway that has signed off is not waited for.
    server.cli(&["ZREM", "tollgate:replicas", "ghost:1/0"]);
    drop(other);
    let deadline = Instant::now() + Duration::from_secs(5);
    while server.cli(&["ZCARD", "tollgate:replicas"]) != "1" {
        assert!(Instant::now() < deadline, "it is still registered");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(admin.wait(PATIENCE).await.unwrap().len(), 1);
}

#[tokio::test]
async fn sentinels_lead_to_the_new_master() {
    let mut watched = Watched::start();
    let settings =
        RedisSettings { topology: Topology::Sentinel { master: "main".into() }, ..settings(&watched.addresses()) };
    let mut writer = admin(&settings).await;
    writer.create(&record("known")).await.unwrap();
    let store = open(&settings);
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    assert!(lookup(&*store, b"known").await.is_some());
    crate::servers::eventually("the replica has it", || watched.replica.cli(&["EXISTS", &key("known")]) == "1");

    let before = Instant::now();
    watched.master.stop();
    let deaf = ear.heard(before, "deafness", |event| *event == Event::Deaf).await - before;
    let failed = ask(&*store, b"known").await;
    assert!(!matches!(failed, Ok(None)), "{failed:?}");
    recovers(&*store, "sentinel").await;
    let answered = before.elapsed();
    let heard = ear.hearing(before).await - before;
    println!(
        "sentinel: after the master was killed: subscription lost {deaf:?}, lookups {answered:?}, subscription {heard:?}"
    );
    let mut writer = admin(&settings).await;
    let before = Instant::now();
    writer.revoke(&Digest::of(b"known"), 1_760_000_000).await.unwrap();
    ear.change_of(before, &*store, "known").await;
    assert!(lookup(&*store, b"known").await.unwrap().revoked.is_some(), "written to the new master");

    // The old master restarts, is a master for a moment, and is made a replica.
    watched.master.start_again();
    recovers(&*store, "sentinel").await;
    assert!(lookup(&*store, b"known").await.unwrap().revoked.is_some());
    let unknown = RedisSettings { topology: Topology::Sentinel { master: "other".into() }, ..settings };
    let why = ask(&*open(&unknown), b"known").await.unwrap_err();
    assert!(why.to_string().contains("watches no such master"), "{why}");
}

/// The first of three sentinels hangs: neither a start nor a lost connection waits for it.
#[tokio::test]
async fn a_frozen_sentinel_keeps_nobody_waiting() {
    let watched = Watched::start();
    let settings =
        RedisSettings { topology: Topology::Sentinel { master: "main".into() }, ..settings(&watched.addresses()) };
    admin(&settings).await.create(&record("known")).await.unwrap();
    watched.sentinels[0].freeze();
    let store = open(&settings);
    let begin = Instant::now();
    let ear = Ear::on(&store);
    let heard = ear.hearing(begin).await - begin;
    assert!(lookup(&*store, b"known").await.is_some());
    println!("sentinel: with the first one frozen: hears after {heard:.1?}, answers after {:.1?}", begin.elapsed());
    // Each connection that waited for it would take a second more.
    assert!(heard < LAG && begin.elapsed() < LAG, "{heard:?}");
    let before = Instant::now();
    watched.master.cut();
    assert!(ear.hearing(before).await - before < LAG);
    watched.sentinels[0].thaw();
}

/// A server that takes no writes cannot enter a gateway in the register; it is heard nevertheless, and the log has the cause.
#[tokio::test]
async fn a_server_that_takes_no_writes_is_heard() {
    // A user without +role probes by PING, which a server that cannot save refuses.
    let users = ["user no-role on >S3CRET ~* &* +@all -role"];
    let server = Redis::start(&Options { users: &users, ..Options::default() });
    let settings = settings(&[server.address()]);
    let no_role =
        RedisSettings { username: Some("no-role".into()), password: Some(Secret::new("S3CRET")), ..settings.clone() };
    let mut writer = admin(&settings).await;
    writer.create(&record("known")).await.unwrap();
    let stores = [open(&settings), open(&no_role)];
    let begin = Instant::now();
    let ears = stores.each_ref().map(Ear::on);
    for ear in &ears {
        ear.hearing(begin).await;
    }
    // A folder in the place of the file that is to be written.
    let unwritable = server.socket().with_file_name("dump.rdb");
    let save = async |status: &str| {
        server.cli(&["BGSAVE"]);
        let ended = format!("rdb_last_bgsave_status:{status}");
        until("the save has ended", || server.cli(&["INFO", "persistence"]).contains(&ended)).await;
    };
    let set = |name: &str, value: &str| drop(server.cli(&["CONFIG", "SET", name, value]));
    for code in ["OOM", "NOREPLICAS", "MISCONF"] {
        match code {
            "OOM" => set("maxmemory", "1"),
            "NOREPLICAS" => set("min-replicas-to-write", "1"),
            _ => {
                std::fs::create_dir(&unwritable).unwrap();
                set("save", "3600 1000000");
                save("err").await;
            }
        }
        let why = writer.create(&record("more")).await.unwrap_err().to_string();
        assert!(why.contains(code), "{why}");
        let before = Instant::now();
        server.cut();
        for (ear, store) in ears.iter().zip(&stores) {
            assert!(ear.hearing(before).await - before < LAG, "{code}");
            assert!(lookup(&**store, b"known").await.is_some());
        }
        match code {
            "OOM" => set("maxmemory", "0"),
            "NOREPLICAS" => set("min-replicas-to-write", "0"),
            _ => {
                std::fs::remove_dir(&unwritable).unwrap();
                save("ok").await;
            }
        }
        writer = admin(&settings).await;
        // They are in the register again within a second.
        let (mut waited, before) = (Vec::new(), Instant::now());
        while waited.len() < 2 && before.elapsed() < PATIENCE {
            waited = writer.wait(PATIENCE).await.unwrap();
        }
        assert_eq!(waited.len(), 2, "{code}");
    }
}

/// Connections that a burst of lookups opened are closed, and one stays.
#[tokio::test]
async fn a_pool_shrinks_after_a_burst() {
    const IDLE: Duration = Duration::from_secs(2);
    let server = Redis::start(&Options::default());
    let settings = RedisSettings { connections: 4, idle: IDLE, ..settings(&[server.address()]) };
    admin(&settings).await.create(&record("known")).await.unwrap();
    let store = open(&settings);
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    let clients = || server.cli(&["CLIENT", "LIST"]).lines().filter(|line| line.contains(" name=tollgate-")).count();
    let known = credential(b"known");
    let burst = || futures_util::future::join_all((0..8).map(|_| store.lookup(&known)));
    assert!(burst().await.iter().all(|answer| matches!(answer, Ok(Some(_)))));
    assert_eq!(clients(), 5, "and one that follows changes");
    let before = Instant::now();
    until("one stays", || {
        let left = clients();
        assert!(left == 5 || before.elapsed() > IDLE / 2, "{left} after {:?}", before.elapsed());
        left == 2
    })
    .await;
    assert!(burst().await.iter().all(|answer| matches!(answer, Ok(Some(_)))));
}

/// The ACL rules of docs/stores.md, as they stand there: what each is for works, on a server that allows nothing else.
#[tokio::test]
async fn the_documented_acl_rules_are_enough() {
    let document = std::fs::read_to_string("docs/stores.md").unwrap();
    assert!(document.contains(&format!("`notify-keyspace-events` with `{KEYSPACE_EVENTS}`")));
    let rules: Vec<&str> = document.lines().filter(|line| line.starts_with("ACL SETUSER ")).collect();
    let server = Redis::start(&Options::default());
    server.cli(&["CONFIG", "SET", "notify-keyspace-events", KEYSPACE_EVENTS]);
    let mut users = Vec::new();
    for rule in &rules {
        let words: Vec<String> = rule.replace(">PASSWORD", ">S3CRET").split(' ').map(str::to_owned).collect();
        server.cli(&words.iter().map(String::as_str).collect::<Vec<_>>());
        users.push(words[2].clone());
    }
    assert_eq!(users, ["gateway", "gateway-keyspace", "admin", "auditor"]);
    let of = |user: &str, changes| RedisSettings {
        username: Some(user.into()),
        password: Some(Secret::new("S3CRET")),
        changes,
        prefix: "tollgate:token:".into(),
        ..settings(&[server.address()])
    };
    let channel = || RedisChanges::Channel("tollgate:change".into());
    let mut writer = admin(&of("admin", channel())).await;
    writer.create(&record("known")).await.unwrap();
    let mut records = ["one", "two"].into_iter().map(|token| Ok(record(token)));
    assert_eq!(writer.import(&mut records).await.unwrap().new, 2);
    let mut gateways = Vec::new();
    for (user, changes) in [("gateway", channel()), ("gateway-keyspace", RedisChanges::Keyspace)] {
        let store = open(&of(user, changes));
        let begin = Instant::now();
        let ear = Ear::on(&store);
        ear.hearing(begin).await;
        assert!(lookup(&*store, b"known").await.is_some(), "{user}");
        gateways.push((user, store, ear));
    }
    let clients = server.cli(&["CLIENT", "LIST"]);
    let named = |user: &str| {
        clients
            .lines()
            .filter(|line| line.contains(&format!(" user={user} ")))
            .all(|line| line.contains(" name=tollgate-"))
    };
    assert!(named("gateway") && named("gateway-keyspace"), "{clients}");
    let before = Instant::now();
    assert!(writer.revoke(&Digest::of(b"known"), 1_760_000_000).await.unwrap());
    assert_eq!(writer.wait(PATIENCE).await.unwrap().len(), 1, "the one of the channel");
    for (user, store, ear) in &gateways {
        ear.change_of(before, &**store, "known").await;
        assert!(lookup(&**store, b"known").await.unwrap().revoked.is_some(), "{user}");
    }
    writer.rotate(&Digest::of(b"one"), &record("next"), 1_760_000_000, 1_960_000_000).await.unwrap();
    assert!(writer.block(&record("two").user, true).await.unwrap() > 0);
    let before = Instant::now();
    server.cli(&["FLUSHALL"]);
    for (user, _, ear) in &gateways {
        ear.heard(before, user, |event| *event == Event::Hearing).await;
    }
    writer.create(&record("known")).await.unwrap();
    let mut auditor = admin(&of("auditor", channel())).await;
    assert_eq!(auditor.list().await.unwrap().len(), 1);
    assert_eq!(auditor.find(&Digest::of(b"known").to_hex()[..12]).await.unwrap().len(), 1);
    assert!(auditor.revoke(&Digest::of(b"known"), 1_760_000_000).await.unwrap_err().to_string().contains("NOPERM"));
}

/// The commands of docs/stores.md for reading by hand, as they stand there.
#[test]
fn records_are_read_by_hand_as_documented() {
    let document = std::fs::read_to_string("docs/stores.md").unwrap();
    let begin = document.find("Reading by hand").expect("a section");
    let block = document[begin..].split("```").nth(1).unwrap().strip_prefix("sh\n").unwrap();
    let server = Redis::start(&Options::default());
    server.cli(&["SET", &format!("tollgate:token:{}", Digest::of(b"json").to_hex()), "{\"user\":\"ann\"}"]);
    server.cli(&["HSET", &format!("tollgate:token:{}", Digest::of(b"hash").to_hex()), "user", "bob"]);
    for (token, user) in [("json", "ann"), ("hash", "bob")] {
        let script = format!("redis-cli() {{ command redis-cli -p {} \"$@\"; }}\ntoken={token}\n{block}", server.port);
        let output = std::process::Command::new("bash").args(["-ec", &script]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(said.contains(user), "{token}: {said}");
        for other in ["json", "hash"] {
            assert!(said.contains(&Digest::of(other.as_bytes()).to_hex()), "all are listed: {said}");
        }
    }
}

#[tokio::test]
async fn a_cluster_is_one_store() {
    let cluster = Cluster::start();
    // One node is enough to find the others.
    let settings = RedisSettings { topology: Topology::Cluster, ..settings(&[cluster.nodes[0].address()]) };
    let mut writer = admin(&settings).await;
    let store = open(&settings);
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    let tokens: Vec<_> = (0..200).map(|number| format!("token-{number}")).collect();
    let mut records = tokens.iter().map(|token| Ok(record(token)));
    assert_eq!(writer.import(&mut records).await.unwrap().new, 200);
    for token in &tokens {
        assert_eq!(lookup(&*store, token.as_bytes()).await, Some(record(token)));
        assert_eq!(lookup(&*store, format!("no {token}").as_bytes()).await, None);
    }
    let counts: Vec<u32> = cluster.nodes.iter().map(|node| node.cli(&["DBSIZE"]).parse().unwrap()).collect();
    assert!(counts.iter().all(|count| *count > 20), "{counts:?}");
    assert_eq!(writer.list().await.unwrap().len(), 200);
    assert_eq!(writer.find(&Digest::of(b"token-7").to_hex()[..12]).await.unwrap(), [record("token-7")]);

    let before = Instant::now();
    for token in &tokens[..20] {
        assert!(writer.revoke(&Digest::of(token.as_bytes()), 1_760_000_000).await.unwrap());
        ear.change_of(before, &*store, token).await;
    }
    let before = Instant::now();
    assert!(matches!(
        writer.rotate(&Digest::of(b"token-50"), &record("token-51"), 1_760_000_000, 1_900_000_000).await,
        Err(AdminError::Exists)
    ));
    writer.rotate(&Digest::of(b"token-50"), &record("next"), 1_760_000_000, 1_900_000_000).await.unwrap();
    ear.change_of(before, &*store, "next").await;
    assert_eq!(lookup(&*store, b"token-50").await.unwrap().superseded, Some(1_760_000_000));
    assert_eq!(writer.wait(PATIENCE).await.unwrap().len(), 1);

    // A slot is migrated: the old node answers MOVED, and the lookup succeeds.
    let slot = cluster.nodes[0].cli(&["CLUSTER", "KEYSLOT", &key("next")]);
    let owner = cluster.nodes.iter().position(|node| node.cli(&["CLUSTER", "COUNTKEYSINSLOT", &slot]) != "0").unwrap();
    let (from, to) = (&cluster.nodes[owner], &cluster.nodes[(owner + 1) % 3]);
    let (from_id, to_id) = (from.cli(&["CLUSTER", "MYID"]), to.cli(&["CLUSTER", "MYID"]));
    to.cli(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &from_id]);
    from.cli(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &to_id]);
    assert!(lookup(&*store, b"next").await.is_some(), "during the migration");
    from.cli(&["MIGRATE", "127.0.0.1", &to.port.to_string(), &key("next"), "0", "5000"]);
    recovers_to(&*store, "next").await;
    // The command line meets ASK here.
    let count = writer.list().await.unwrap().len();
    assert_eq!(count, 201, "every key once, wherever it is");
    let mut visited = 0;
    let mut each = |_| {
        visited += 1;
        Ok(())
    };
    writer.visit(&mut each).await.unwrap();
    assert_eq!(visited, count);
    assert_eq!(writer.find(&Digest::of(b"next").to_hex()[..12]).await.unwrap().len(), 1);
    let user = record("next").user;
    let of_user = writer.of_user(&user).await.unwrap().len() as u64;
    assert_eq!(writer.block(&user, true).await.unwrap(), of_user);
    assert_eq!(writer.block(&user, false).await.unwrap(), of_user);
    assert!(writer.take_unreadable().is_empty());
    for node in [to, from] {
        node.cli(&["CLUSTER", "SETSLOT", &slot, "NODE", &to_id]);
    }
    recovers_to(&*store, "next").await;
    assert!(writer.revoke(&Digest::of(b"next"), 1_760_000_000).await.unwrap());
}

/// The cluster's bus promises nothing: a message that it loses is reported to nobody.
#[tokio::test]
async fn a_cluster_whose_bus_loses_messages_loses_no_change() {
    let mut cluster = Cluster::start();
    let settings = RedisSettings { topology: Topology::Cluster, ..settings(&[cluster.nodes[0].address()]) };
    let mut writer = admin(&settings).await;
    let tokens: Vec<_> = (0..60).map(|number| format!("token-{number}")).collect();
    writer.import(&mut tokens.iter().map(|token| Ok(record(token)))).await.unwrap();
    let store = open(&settings);
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    Cluster::lose_messages_between(&cluster.nodes);
    let owner = |nodes: &[Redis], token: &str| {
        nodes.iter().position(|node| !node.try_cli(&["EXISTS", &key(token)]).starts_with("MOVED")).unwrap()
    };
    let (mut of_each, mut lags) = ([0; 3], Vec::new());
    for token in &tokens[..24] {
        of_each[owner(&cluster.nodes, token)] += 1;
        let before = Instant::now();
        assert!(writer.revoke(&Digest::of(token.as_bytes()), 1_760_000_000).await.unwrap());
        lags.push(ear.change_of(before, &*store, token).await - before);
        assert!(lags.iter().all(|lag| *lag < Duration::from_secs(1)), "{lags:?}");
    }
    assert!(of_each.iter().all(|count| *count > 0), "{of_each:?}");
    println!("cluster: a revocation without the bus is heard within {:?}", lags.iter().max().unwrap());
    assert_eq!(writer.wait(PATIENCE).await.unwrap().len(), 1);

    // A wait that one master has not published is no proof that its changes have arrived.
    let wait = |node: &Redis| node.cli(&["PUBLISH", CHANNEL, "wait abc"]);
    cluster.nodes[..2].iter().for_each(|node| drop(wait(node)));
    for token in &tokens[24..30] {
        let before = Instant::now();
        assert!(writer.revoke(&Digest::of(token.as_bytes()), 1_760_000_000).await.unwrap());
        ear.change_of(before, &*store, token).await;
    }
    let confirmed = |nodes: &[Redis]| {
        nodes
            .iter()
            .map(|node| node.try_cli(&["SCARD", "tollgate:confirmed:abc"]))
            .find(|count| !count.contains("MOVED"))
    };
    // Another wait is confirmed behind it.
    assert_eq!(writer.wait(PATIENCE).await.unwrap().len(), 1);
    assert_eq!(confirmed(&cluster.nodes).as_deref(), Some("0"));
    // Whoever waits says it again and again.
    until("all have published it", || {
        cluster.nodes.iter().for_each(|node| drop(wait(node)));
        confirmed(&cluster.nodes).as_deref() == Some("1")
    })
    .await;

    // A new master is subscribed to as soon as it has a slot.
    let new = Cluster::node();
    let (known, bus) = (&cluster.nodes[0], cluster.nodes[0].cli(&["CONFIG", "GET", "cluster-port"]));
    let bus = bus.lines().last().unwrap();
    new.cli(&["CLUSTER", "MEET", "127.0.0.1", &known.port.to_string(), bus]);
    cluster.nodes.push(new);
    for node in &cluster.nodes {
        until("all know each other", || {
            let info = node.cli(&["CLUSTER", "INFO"]);
            info.contains("cluster_known_nodes:4") && info.contains("cluster_state:ok")
        })
        .await;
    }
    let token = &tokens[40];
    let (from, to) = (&cluster.nodes[owner(&cluster.nodes[..3], token)], &cluster.nodes[3]);
    let slot = from.cli(&["CLUSTER", "KEYSLOT", &key(token)]);
    let (from_id, to_id) = (from.cli(&["CLUSTER", "MYID"]), to.cli(&["CLUSTER", "MYID"]));
    let before = Instant::now();
    to.cli(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &from_id]);
    from.cli(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &to_id]);
    from.cli(&["MIGRATE", "127.0.0.1", &to.port.to_string(), &key(token), "0", "5000"]);
    for node in [to, from] {
        node.cli(&["CLUSTER", "SETSLOT", &slot, "NODE", &to_id]);
    }
    ear.heard(before, "deafness", |event| *event == Event::Deaf).await;
    ear.hearing(before).await;
    Cluster::lose_messages_between(&cluster.nodes);
    let before = Instant::now();
    assert!(writer.revoke(&Digest::of(token.as_bytes()), 1_760_000_000).await.unwrap());
    assert!(ear.change_of(before, &*store, token).await - before < Duration::from_secs(1));
    assert_eq!(writer.wait(PATIENCE).await.unwrap().len(), 1);

    // Without one of the masters, nothing is promised.
    let before = Instant::now();
    cluster.nodes[3].freeze();
    let deaf = ear.heard(before, "deafness", |event| *event == Event::Deaf).await - before;
    println!("cluster: a frozen master is noticed within {deaf:?}");
    cluster.nodes[3].thaw();
    ear.hearing(before).await;
}

/// Meanwhile, gateways go on.
async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn recovers_to(store: &dyn TokenStore, token: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask(store, token.as_bytes()).await {
            Ok(Some(_)) => return,
            Ok(None) => panic!("{token}: answered \"unknown\" during the migration"),
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_look_up_that_is_dropped_harms_no_other() {
    let server = Redis::start(&Options::default());
    let settings = settings(&[server.address()]);
    let mut writer = admin(&settings).await;
    let of = |number: usize| TokenRecord { user: format!("user {number}"), ..record(&format!("token-{number}")) };
    writer.import(&mut (0..500).map(|number| Ok(of(number)))).await.unwrap();
    let store = open(&settings);
    let mut answered = 0;
    for round in 0..4_000_u64 {
        let number = usize::try_from(round).unwrap() % 500;
        let limit = Duration::from_micros(round % 97);
        let token = format!("token-{number}");
        let credential = credential(token.as_bytes());
        if let Ok(found) = tokio::time::timeout(limit, store.lookup(&credential)).await {
            assert_eq!(found.unwrap(), Some(of(number)));
            answered += 1;
        }
    }
    for number in 0..500 {
        assert_eq!(lookup(&*store, format!("token-{number}").as_bytes()).await, Some(of(number)));
    }
    assert!(answered < 4_000, "no lookup was cancelled");
}

#[tokio::test]
async fn nothing_outlives_a_store_and_a_store_outlives_a_runtime() {
    let server = Redis::start(&Options::default());
    let settings = settings(&[server.address()]);
    admin(&settings).await.create(&record("known")).await.unwrap();
    let store = open(&settings);
    // Its connections belong to a runtime that ends before the store.
    let (other, ended) = (Arc::clone(&store), std::thread::spawn);
    let thread = ended(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            for _ in 0..4 {
                assert!(lookup(&*other, b"known").await.is_some());
            }
        });
    });
    thread.join().unwrap();
    for _ in 0..4 {
        assert!(lookup(&*store, b"known").await.is_some(), "without a failure");
    }
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    drop((ear, store));
    let deadline = Instant::now() + Duration::from_secs(5);
    while server.cli(&["CLIENT", "LIST"]).lines().count() > 1 {
        assert!(Instant::now() < deadline, "{}", server.cli(&["CLIENT", "LIST"]));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Prints the figures of the documentation.
#[tokio::test]
async fn figures() {
    let server = Redis::start(&Options { durable: true, ..Options::default() });
    let settings = settings(&[server.address()]);
    let mut writer = admin(&settings).await;
    let store = open(&settings);
    let before = Instant::now();
    let mut records = (0..20_000).map(|number| Ok(record(&format!("token-{number}"))));
    assert_eq!(writer.import(&mut records).await.unwrap().new, 20_000);
    println!("import: {:.0} rows/s", 20_000.0 / before.elapsed().as_secs_f64());
    let mut times = Vec::new();
    for number in 0..5_000 {
        let before = Instant::now();
        assert!(lookup(&*store, format!("token-{number}").as_bytes()).await.is_some());
        times.push(before.elapsed());
    }
    times.sort();
    println!("lookup, one at a time: p50 {:?}, p99 {:?}", times[2_500], times[4_950]);
    let before = Instant::now();
    let tokens: Vec<_> = (0..20_000).map(|number| format!("token-{number}")).collect();
    for tokens in tokens.chunks(64) {
        let found = futures_util::future::join_all(tokens.iter().map(|token| ask(&*store, token.as_bytes()))).await;
        assert!(found.iter().all(|found| matches!(found, Ok(Some(_)))));
    }
    println!("lookups, 64 at a time: {:.0}/s", 20_000.0 / before.elapsed().as_secs_f64());
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    let mut lags = Vec::new();
    for number in 0..300 {
        let (before, token) = (Instant::now(), format!("token-{number}"));
        writer.revoke(&Digest::of(token.as_bytes()), 1_760_000_000).await.unwrap();
        lags.push(ear.change_of(before, &*store, &token).await - before);
    }
    lags.sort();
    println!("revocation until notified: p50 {:?}, p99 {:?}", lags[150], lags[296]);
    let (mut noticed, mut again) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        let before = Instant::now();
        server.freeze();
        noticed.push(ear.heard(before, "deafness", |event| *event == Event::Deaf).await - before);
        server.thaw();
        ear.hearing(before).await;
        let before = Instant::now();
        server.cut();
        let cut = Instant::now();
        again.push(ear.hearing(before).await.saturating_duration_since(cut));
    }
    noticed.sort();
    again.sort();
    println!("a frozen server is detected after {:?} to {:?}", noticed[0], noticed[4]);
    println!("a cut connection is subscribed again after {:?} to {:?}", again[0], again[4]);
    assert!(noticed[4] < LAG * 2 && again[4] < LAG, "{noticed:?} {again:?}");
}
