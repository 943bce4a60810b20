//! Gateways on real token stores: what callers see when a store fails, and how long a revoked token works. `make faults`
//! and `make revocations` run the long forms and print tables; CI runs the short ones. `contract/` is the suite that runs
//! every store in this process, against its real server.

mod alerts;
mod commands;
mod contract;
mod crowd;
mod documents;
mod failover;
mod faults;
mod frozen;
mod places;
mod reloads;
mod revocation;

use crate::harness::*;
use crate::servers::http::{HttpServer, Reply};
use crate::servers::postgres::Postgres;
use crate::servers::redis::{Options, Redis};
use crate::servers::{Fault, Server as _};
use crate::support::{get, run, stderr};
use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// The documented bound: within this time a recovered store is used again, and a revocation takes effect if the store
/// notifies of changes.
pub const BOUND: Duration = Duration::from_secs(1);

/// A store that the tests can fill, and into which they can inject faults.
pub trait Backing {
    fn name(&self) -> &'static str;
    /// The section that makes a gateway use it.
    fn section(&self) -> String;
    fn add(&mut self, tokens: &[String]);
    /// Returns once the store has stored it.
    fn revoke(&self, token: &str);
    /// Whether nobody keeps writers out at the moment, as a gateway does with SQLite that was stopped in the middle of a write.
    fn takes_writes(&self) -> bool {
        true
    }
    /// Makes all changes so far older than the period that is re-read after a restart from a snapshot.
    fn age(&self) {}
    /// Whether it notifies of changes.
    fn hears(&self) -> bool;
    /// `false`: this fault does not apply.
    fn inject(&mut self, fault: Fault) -> bool;
}

/// All kinds.
pub fn all() -> Vec<fn() -> Box<dyn Backing>> {
    vec![
        || Box::new(Embedded::new("sqlite")),
        || Box::new(Embedded::new("file")),
        || Box::new(PostgresOwn::new()),
        || Box::new(PostgresGitlab::new()),
        || Box::new(RedisOwn::new()),
        || Box::new(Introspected::new()),
    ]
}

const UPSTREAM: &str = "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n";

/// A configuration for the command line.
struct Config {
    path: PathBuf,
    folder: Folder,
}

impl Config {
    fn new(section: &str) -> Self {
        let folder = Folder::new("test");
        Self { path: folder.write("store.toml", &format!("{section}{UPSTREAM}")), folder }
    }

    /// `tollgate COMMAND … --config FILE ARGUMENTS`
    fn tollgate(&self, command: &[&str], arguments: &[&str]) -> Result<(), String> {
        let output = run(tollgate().args(command).arg("--config").arg(&self.path).args(arguments));
        if output.status.success() { Ok(()) } else { Err(stderr(&output)) }
    }

    fn import(&self, tokens: &[String]) {
        let lines = tokens.iter().map(|token| format!("{{\"token\":\"{token}\",\"user\":\"user-of-{token}\"}}\n"));
        let file = self.folder.write("tokens.jsonl", &lines.collect::<String>());
        self.tollgate(&["token", "import"], &[file.to_str().unwrap()]).unwrap();
    }

    /// Retries when its connection was cut.
    fn revoke(&self, token: &str) {
        for _ in 0..20 {
            match self.tollgate(&["token", "revoke"], &[&sha256_hex(token)]) {
                Ok(()) => return,
                Err(why) => assert!(!why.contains("no such token"), "{why}"),
            }
        }
        panic!("{token} could not be revoked");
    }
}

/// SQLite or a TOML file: stopped by renaming the file.
struct Embedded {
    kind: &'static str,
    path: PathBuf,
    config: Config,
}

impl Embedded {
    fn new(kind: &'static str) -> Self {
        let config = Config::new(&format!("[store]\nkind = \"{kind}\"\npath = \"tokens\"\n"));
        Self { kind, path: config.folder.0.join("tokens"), config }
    }

    fn move_all(&self, from: &str, to: &str) {
        for suffix in ["", "-wal", "-shm"] {
            let at = |place: &str| format!("{}{suffix}{place}", self.path.display());
            drop(std::fs::rename(at(from), at(to)));
        }
    }
}

impl Backing for Embedded {
    fn name(&self) -> &'static str {
        self.kind
    }

    fn section(&self) -> String {
        format!("[store]\nkind = \"{}\"\npath = \"{}\"\ntimeout = \"1s\"\n", self.kind, self.path.display())
    }

    fn add(&mut self, tokens: &[String]) {
        self.config.import(tokens);
    }

    fn revoke(&self, token: &str) {
        self.config.revoke(token);
    }

    fn takes_writes(&self) -> bool {
        let is_free = || {
            let db = rusqlite::Connection::open(&self.path).unwrap();
            db.busy_timeout(Duration::from_millis(50)).unwrap();
            db.execute_batch("BEGIN IMMEDIATE; ROLLBACK").is_ok()
        };
        self.kind != "sqlite" || is_free()
    }

    fn age(&self) {
        if self.kind == "sqlite" {
            let db = rusqlite::Connection::open(&self.path).unwrap();
            db.execute("UPDATE change SET at_ms = at_ms - 600000", []).unwrap();
        }
    }

    fn hears(&self) -> bool {
        true
    }

    fn inject(&mut self, fault: Fault) -> bool {
        match fault {
            Fault::Stop => self.move_all("", ".aside"),
            Fault::Start => self.move_all(".aside", ""),
            _ => return false,
        }
        true
    }
}

/// tollgate's own tables.
pub struct PostgresOwn {
    server: Postgres,
    config: Config,
    runtime: tokio::runtime::Runtime,
    /// Kept open for revocations, until it is cut.
    session: Mutex<Option<tokio_postgres::Client>>,
}

impl PostgresOwn {
    pub fn new() -> Self {
        let server = Postgres::start();
        let config = Config::new(&Self::section_for(&server));
        config.tollgate(&["store", "migrate"], &[]).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        Self { server, config, runtime, session: Mutex::new(None) }
    }

    /// Like any program that writes to the table: the triggers notify, not the command line.
    async fn end(
        &self,
        session: &mut Option<tokio_postgres::Client>,
        token: &str,
    ) -> Result<(), tokio_postgres::Error> {
        let client = match session.take() {
            Some(client) => client,
            None => {
                let (client, driver) =
                    tokio_postgres::connect(&self.server.url("postgres"), tokio_postgres::NoTls).await?;
                tokio::spawn(async move { drop(driver.await) });
                client
            }
        };
        let sql = format!("UPDATE tollgate.token SET revoked = 1760000000 WHERE digest = '\\x{}'", sha256_hex(token));
        assert_eq!(client.execute(&sql, &[]).await?, 1);
        *session = Some(client);
        Ok(())
    }

    fn section_for(server: &Postgres) -> String {
        format!("[store]\nkind = \"postgres\"\nurl = \"{}\"\ntimeout = \"1s\"\n", server.url("postgres"))
    }
}

impl Backing for PostgresOwn {
    fn name(&self) -> &'static str {
        "postgres"
    }

    fn section(&self) -> String {
        Self::section_for(&self.server)
    }

    fn add(&mut self, tokens: &[String]) {
        self.config.import(tokens);
    }

    fn revoke(&self, token: &str) {
        let mut session = self.session.lock().unwrap();
        while let Err(cut) = self.runtime.block_on(self.end(&mut session, token)) {
            assert!(cut.as_db_error().is_none_or(|error| error.code().code().starts_with("57")), "{cut:?}");
        }
    }

    fn age(&self) {
        self.server.psql("postgres", "UPDATE tollgate.change SET at_ms = at_ms - 600000");
    }

    fn hears(&self) -> bool {
        true
    }

    fn inject(&mut self, fault: Fault) -> bool {
        self.server.inject(fault);
        true
    }
}

/// GitLab's own tables, with the triggers for change notifications.
struct PostgresGitlab {
    server: Postgres,
    section: String,
}

impl PostgresGitlab {
    fn new() -> Self {
        let server = Postgres::start();
        server.psql(
            "postgres",
            "CREATE TABLE users (id int PRIMARY KEY, username text NOT NULL, state text NOT NULL DEFAULT 'active');
             CREATE TABLE personal_access_tokens (id serial PRIMARY KEY, user_id int NOT NULL, token text UNIQUE NOT NULL,
                 revoked boolean DEFAULT false, expires_at timestamp, scopes text NOT NULL DEFAULT E'---\\n- api\\n');
             INSERT INTO users (id, username) VALUES (1, 'root')",
        );
        let section = format!(
            "[store]\nkind = \"postgres\"\nname = \"gitlab-pat\"\npreset = \"gitlab-pat\"\nurl = \"{}\"\ntimeout = \"1s\"\n",
            server.url("postgres")
        );
        Config::new(&section).tollgate(&["store", "install-triggers"], &[]).unwrap();
        Self { server, section }
    }
}

impl Backing for PostgresGitlab {
    fn name(&self) -> &'static str {
        "gitlab-pat"
    }

    fn section(&self) -> String {
        self.section.clone()
    }

    fn add(&mut self, tokens: &[String]) {
        let rows: Vec<_> = tokens.iter().map(|token| format!("(1, '{token}')")).collect();
        let sql = format!("INSERT INTO personal_access_tokens (user_id, token) VALUES {}", rows.join(", "));
        self.server.psql("postgres", &sql);
    }

    fn revoke(&self, token: &str) {
        let sql = format!("UPDATE personal_access_tokens SET revoked = true WHERE token = '{token}'");
        while self.server.try_psql("postgres", &sql).is_err() {}
    }

    fn hears(&self) -> bool {
        true
    }

    fn inject(&mut self, fault: Fault) -> bool {
        self.server.inject(fault);
        true
    }
}

pub struct RedisOwn {
    server: Redis,
    config: Config,
}

impl RedisOwn {
    pub fn new() -> Self {
        let server = Redis::start(&Options { durable: true, ..Options::default() });
        let config = Config::new(&Self::section_for(&server));
        Self { server, config }
    }

    fn section_for(server: &Redis) -> String {
        format!("[store]\nkind = \"redis\"\nservers = [\"{}\"]\ntimeout = \"1s\"\n", server.address())
    }
}

impl Backing for RedisOwn {
    fn name(&self) -> &'static str {
        "redis"
    }

    fn section(&self) -> String {
        Self::section_for(&self.server)
    }

    fn add(&mut self, tokens: &[String]) {
        self.config.import(tokens);
    }

    fn revoke(&self, token: &str) {
        self.config.revoke(token);
    }

    fn hears(&self) -> bool {
        true
    }

    fn inject(&mut self, fault: Fault) -> bool {
        self.server.inject(fault);
        true
    }
}

/// An introspection endpoint.
struct Introspected {
    server: HttpServer,
    users: Arc<Mutex<HashMap<String, bool>>>,
}

impl Introspected {
    fn new() -> Self {
        let users: Arc<Mutex<HashMap<String, bool>>> = Arc::default();
        let known = Arc::clone(&users);
        let server = HttpServer::start(move |asked| match known.lock().unwrap().get(&asked.header("private-token")) {
            Some(true) => Reply::json("{\"username\":\"root\",\"state\":\"active\"}"),
            _ => Reply::status(401),
        });
        Self { server, users }
    }
}

impl Backing for Introspected {
    fn name(&self) -> &'static str {
        "introspection"
    }

    fn section(&self) -> String {
        let endpoint = self.server.url("/api/v3/user");
        format!("[store]\nkind = \"introspection\"\nendpoint = \"{endpoint}\"\ntimeout = \"1s\"\n")
    }

    fn add(&mut self, tokens: &[String]) {
        self.users.lock().unwrap().extend(tokens.iter().map(|token| (token.clone(), true)));
    }

    fn revoke(&self, token: &str) {
        self.users.lock().unwrap().insert(token.into(), false);
    }

    fn hears(&self) -> bool {
        false
    }

    fn inject(&mut self, fault: Fault) -> bool {
        self.server.inject(fault);
        true
    }
}

/// A persistent connection for requests with different tokens, reopened when it was closed.
pub struct Caller {
    address: std::net::SocketAddr,
    client: Option<Client>,
}

impl Caller {
    pub fn of(gateway: &Gateway) -> Self {
        Self { address: gateway.address, client: None }
    }

    pub fn ask(&mut self, token: &str) -> Answer {
        let client = self.client.get_or_insert_with(|| Client::connect(self.address));
        client.send_head(&get(token, "/api/v3/user"));
        let answer = client.answer();
        if answer.header("Connection").is_some_and(|value| value.eq_ignore_ascii_case("close")) {
            self.client = None;
        }
        answer
    }

    pub fn status(&mut self, token: &str) -> u16 {
        self.ask(token).status
    }
}

/// The servers that the metrics name, whatever the store.
pub fn servers_in_use(gateway: &Gateway) -> BTreeSet<String> {
    let metrics = gateway.metrics();
    let series = metrics.lines().filter_map(|line| line.strip_prefix("tollgate_store_server_info{server=\""));
    series.map(|rest| rest.split('"').next().unwrap().to_owned()).collect()
}

/// A number from the environment, for the long forms.
pub fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}
