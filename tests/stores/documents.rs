//! The commands of docs/ run as they stand there, by bash, against real servers: a block that is not run fails the test.
//! What the ACL lines and GRANTs are enough for, and what the commands print, is tested elsewhere.

use super::{Folder, UPSTREAM};
use crate::harness::*;
use crate::servers::postgres::Postgres;
use crate::servers::redis::{Options, Redis};
use crate::servers::repository;
use crate::support::{get, stderr, stdout};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::process::{Command, Stdio};

/// The fenced blocks of a page that are not run yet, without those that deploy/check.sh compares with files or checks.
struct Page {
    name: &'static str,
    blocks: Vec<String>,
    run: usize,
}

impl Page {
    fn read(name: &'static str) -> Self {
        let text = std::fs::read_to_string(repository(name)).unwrap();
        let (mut blocks, mut open) = (Vec::new(), None::<String>);
        for line in text.lines() {
            match (&mut open, line.strip_prefix("```")) {
                (None, Some(language)) => open = Some(format!("{language}\n")),
                (Some(block), Some("")) => {
                    blocks.push(std::mem::take(block));
                    open = None;
                }
                (Some(block), _) => *block += &format!("{line}\n"),
                (None, None) => {}
            }
        }
        assert!(open.is_none(), "{name}: a block does not end");
        blocks.retain(|block| !["toml\n", "json\n", "promql\n"].iter().any(|language| block.starts_with(language)));
        Self { name, blocks, run: 0 }
    }

    /// The first block in which this stands.
    fn take(&mut self, part: &str) -> String {
        let at = self.blocks.iter().position(|block| block.contains(part));
        let block = self.blocks.remove(at.unwrap_or_else(|| panic!("{}: no block with {part:?} is left", self.name)));
        self.run += 1;
        block.split_once('\n').unwrap().1.to_owned()
    }

    /// A block that is no command, or that nothing here can run.
    fn pass_over(&mut self, part: &str) {
        self.take(part);
        self.run -= 1;
    }

    #[track_caller]
    fn is_done(&self, run: usize) {
        assert!(self.blocks.is_empty(), "{}: blocks that are not run: {:#?}", self.name, self.blocks);
        assert_eq!(self.run, run, "{}", self.name);
    }
}

/// A folder in which blocks are run, with the programs that they call in front of all others.
struct Desk {
    folder: Folder,
}

impl Desk {
    fn new() -> Self {
        let desk = Self { folder: Folder::new("desk") };
        std::fs::create_dir(desk.folder.file("bin")).unwrap();
        desk.program("tollgate", &format!("exec '{}' \"$@\"", env!("CARGO_BIN_EXE_tollgate")));
        desk
    }

    fn program(&self, name: &str, script: &str) {
        let path = self.folder.write(&format!("bin/{name}"), &format!("#!/bin/bash\n{script}\n"));
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Commands of psql, as superuser.
    fn with_postgres(&self, server: &Postgres) {
        let (socket, port) = (server.socket().display(), server.port());
        let real = "$(type -ap psql | sed -n 2p)";
        self.program(
            "psql",
            &format!("exec {real} -X -q -v ON_ERROR_STOP=1 -h '{socket}' -p {port} -U postgres \"$@\""),
        );
    }

    /// An error reply fails the command.
    fn with_redis(&self, server: &Redis) {
        let real = "$(type -ap redis-cli | sed -n 2p)";
        self.program("redis-cli", &format!("exec {real} -e -p {} \"$@\"", server.port));
    }

    fn configure(&self, file: &str, stores: &str) {
        self.folder.write(file, &format!("{stores}{UPSTREAM}"));
    }

    /// Runs a block, with `token` in its environment. Standard output and error.
    #[track_caller]
    fn run(&self, block: &str) -> (String, String) {
        let path = format!("{}:{}", self.folder.file("bin").display(), std::env::var("PATH").unwrap());
        let output = Command::new("bash")
            .args(["-e", "-o", "pipefail", "-c", block])
            .current_dir(&self.folder.0)
            .env("PATH", path)
            .env("token", "T0KEN-of-the-block")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let (out, err) = (stdout(&output), stderr(&output));
        assert!(output.status.success(), "{block}\n{out}{err}");
        (out, err)
    }

    /// Tokens whose ids are those of the documents.
    fn import(&self, config: &str, ids: &[&str]) {
        let line = |id: &&str| format!("{{\"sha256\":\"{id:0<64}\",\"user\":\"user of {id}\"}}\n");
        self.folder.write("ids.jsonl", &ids.iter().map(line).collect::<String>());
        self.run(&format!("tollgate token import --config {config} ids.jsonl"));
    }
}

#[test]
fn the_commands_on_stores_run_as_they_stand() {
    let mut page = Page::read("docs/stores.md");
    let server = Postgres::start();
    for database in ["tollgate", "gitlabhq_production", "people"] {
        server.create_database(database);
    }
    let own = format!("[store]\nkind = \"postgres\"\nurl = \"{}\"\n", server.url("tollgate"));
    let desk = Desk::new();
    desk.with_postgres(&server);
    desk.configure("tollgate.toml", &own);
    desk.configure("old.toml", &own);
    desk.configure("new.toml", "[store]\npath = \"new.db\"\n");
    let (created, _) = desk.run(&page.take("tollgate store migrate"));
    assert!(created.lines().any(|line| line.starts_with("tg-")), "{created}");
    desk.run("for role in migrator gateway commands auditor; do psql postgres -c \"CREATE ROLE $role LOGIN\"; done");
    desk.folder.write("grants.sql", &page.take("TO migrator"));
    desk.run("psql tollgate -f grants.sql");
    let (found, _) = desk.run(&page.take("tollgate store check"));
    assert!(found.contains("0 errors"), "{found}");
    desk.import("tollgate.toml", &["5f2b8c0e91aa"]);
    let (rotated, _) = desk.run(&page.take("tollgate token rotate"));
    assert!(rotated.contains("tg-") && rotated.contains("alice are blocked"), "{rotated}");
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, &own);
    eventually("it is registered", || server.psql("tollgate", "SELECT count(*) FROM tollgate.replica") == "1");
    let (_, confirmed) = desk.run(&page.take("tollgate token revoke"));
    assert!(confirmed.contains("confirmed by 1 "), "{confirmed}");
    drop(gateway);
    let (imported, _) = desk.run(&page.take("tollgate token import"));
    let count = server.psql("tollgate", "SELECT count(*) FROM tollgate.token");
    assert!(imported.starts_with(&format!("{count} tokens imported")), "{imported}");

    let triggers = "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'tollgate%'";
    server.psql(
        "gitlabhq_production",
        "CREATE TABLE users (id int PRIMARY KEY, username text, state text, authentication_token text);
         CREATE TABLE personal_access_tokens (id int, user_id int, token text UNIQUE, revoked boolean, expires_at timestamp,
             scopes text)",
    );
    desk.folder.write("grants.sql", &(page.take("authentication_token") + &page.take("public.personal_access_tokens")));
    desk.run("psql gitlabhq_production -f grants.sql");
    let store = |database: &str, more: &str| {
        format!("[store]\nkind = \"postgres\"\nurl = \"{}\"\n{more}\n", server.url(database))
    };
    desk.configure("tollgate.toml", &store("gitlabhq_production", "preset = \"gitlab-pat\""));
    desk.run(&page.take("psql gitlabhq_production"));
    assert_ne!(server.psql("gitlabhq_production", triggers), "0");
    server.psql("people", "CREATE TABLE api_tokens (token_sha256 text UNIQUE, person_id int, revoked_at timestamptz)");
    let lookup = "SELECT 'ann' AS \\\"user\\\" FROM public.api_tokens WHERE token_sha256 = $1";
    let custom = format!("preset = \"custom\"\ndigest = \"sha256-hex\"\nlookup = \"{lookup}\"");
    desk.configure("tollgate.toml", &store("people", &custom));
    desk.run(&page.take("psql people"));
    assert_ne!(server.psql("people", triggers), "0");

    let server = Redis::start(&Options::default());
    desk.with_redis(&server);
    desk.configure("tollgate.toml", &format!("[store]\nkind = \"redis\"\nservers = [\"{}\"]\n", server.address()));
    let (set, by_hand) = (page.take("redis-cli SET"), page.take("redis-cli TYPE"));
    let (hash, show) =
        (page.take("redis-cli HSET"), "printf %s \"$token\" | tollgate token show --config tollgate.toml -");
    for write in [set, hash] {
        desk.run(&write);
        let (shown, _) = desk.run(show);
        assert!(
            shown.contains("user         alice\n") && shown.contains("expires      2030-12-31T23:59:59Z"),
            "{shown}"
        );
        let (read, _) = desk.run(&by_hand);
        assert!(read.contains("alice"), "{read}");
        server.cli(&["FLUSHALL"]);
    }
    for user in ["gateway ", "gateway-keyspace ", "admin ", "auditor "] {
        let rule = page.take(&format!("ACL SETUSER {user}"));
        desk.folder.write("rule", &rule);
        desk.run("redis-cli < rule");
    }
    assert_eq!(server.cli(&["ACL", "USERS"]).lines().count(), 5);
    page.is_done(17);
}

/// The service's installation, into a folder instead of `/`.
#[test]
fn the_commands_on_operations_run_as_they_stand() {
    let mut page = Page::read("docs/operations.md");
    let desk = Desk::new();
    let root = desk.folder.file("root");
    std::fs::create_dir_all(desk.folder.file("target/dist")).unwrap();
    symlink(env!("CARGO_BIN_EXE_tollgate"), desk.folder.file("target/dist/tollgate")).unwrap();
    for name in ["deploy", "config"] {
        symlink(repository(name), desk.folder.file(name)).unwrap();
    }
    for folder in ["usr/bin", "usr/lib/sysusers.d", "etc/systemd/system"] {
        std::fs::create_dir_all(root.join(folder)).unwrap();
    }
    let in_root = format!(
        "arguments=()\nfor argument; do [[ $argument == /* ]] && argument='{}'$argument; arguments+=(\"$argument\"); done\n",
        root.display()
    );
    desk.program("install", &format!("{in_root}exec /usr/bin/install \"${{arguments[@]}}\""));
    desk.program("tollgate", &format!("{in_root}exec '{}/usr/bin/tollgate' \"${{arguments[@]}}\"", root.display()));
    desk.program("systemd-sysusers", &format!("exec /usr/bin/systemd-sysusers --root='{}'", root.display()));
    // There is no systemd to ask; what a reload would read is in its place, and enabling makes links.
    let enable = format!("exec /usr/bin/systemctl --root='{}' enable \"$3\"", root.display());
    desk.program(
        "systemctl",
        &format!("[ \"$*\" = daemon-reload ] && exit\n[ \"$1 $2\" = 'enable --now' ] && {enable}\nexit 1"),
    );
    desk.run(&page.take("install -m 0755"));
    desk.run(&page.take("systemctl daemon-reload"));
    let linked = std::fs::read_link(root.join("etc/systemd/system/multi-user.target.wants/tollgate.service"));
    assert_eq!(linked.unwrap(), std::path::Path::new("/etc/systemd/system/tollgate.service"));
    let users = std::fs::read_to_string(root.join("etc/passwd")).unwrap();
    assert!(users.contains("tollgate:"), "{users}");
    page.pass_over("docker run");
    page.pass_over("tollgate.toml:6:11: token.forward");
    page.pass_over("/var/log/tollgate/*.log {");
    // tests/monitoring.rs asks for the same, and has other programs read it.
    page.pass_over("Accept: application/openmetrics-text");
    page.is_done(2);
}

#[test]
fn the_commands_on_logs_and_moves_run_as_they_stand() {
    let mut page = Page::read("docs/backup.md");
    let server = Postgres::start();
    let desk = Desk::new();
    let new = format!("[[store]]\nname = \"new\"\nkind = \"postgres\"\nurl = \"{}\"\n", server.url("postgres"));
    desk.configure("move.toml", &format!("[[store]]\nname = \"old\"\nkind = \"sqlite\"\npath = \"old.db\"\n{new}"));
    desk.import("move.toml", &["345d1637f9b9", "5f2b8c0e91aa"]);
    let (moved, _) = desk.run(&page.take("tollgate store migrate"));
    assert!(moved.contains("2 tokens imported"), "{moved}");
    page.is_done(1);

    let mut page = Page::read("docs/monitoring.md");
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let mut client = Client::connect(gateway.address);
    for token in [GOOD, "nobody"] {
        client.send_head(&get(token, "/api/v3/projects?page=2"));
        client.answer();
    }
    eventually("both are logged", || gateway.access_log().len() == 2);
    std::fs::copy(gateway.folder.file("access.log"), desk.folder.file("access.log")).unwrap();
    desk.configure("tollgate.toml", "[store]\npath = \"old.db\"\n");
    let blocks = page.blocks.len();
    for _ in 0..blocks {
        let (said, _) = desk.run(&page.take(""));
        assert!(!said.contains("null"), "a field has another name: {said}");
    }
    page.is_done(6);
}
