//! The commands that list and change tokens, on real stores.

use super::{Backing, Config, Embedded, PostgresGitlab, PostgresOwn, RedisOwn};
use crate::harness::*;
use crate::servers::postgres::Postgres;
use crate::support::{run, stderr, stdout};
use std::io::Read as _;
use std::process::{Command, Output, Stdio};

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

/// One record that somebody wrote by hand and nobody can read: it is named, and the rest is done.
#[test]
fn a_record_that_cannot_be_read_keeps_no_command_from_the_others() {
    let mut store = RedisOwn::new();
    store.add(&["one".into(), "two".into()]);
    let key = format!("tollgate:token:{}", sha256_hex("by hand"));
    store.server.cli(&["HSET", &key, "user", "ann", "revoked", "1"]);
    let id = &sha256_hex("by hand")[..12];
    let token =
        |arguments: &[&str]| run(tollgate().arg("token").args(arguments).arg("--config").arg(&store.config.path));
    let listed = token(&["list"]);
    assert_eq!(code(&listed), 0);
    assert_eq!(stdout(&listed).lines().count(), 3, "{}", stdout(&listed));
    assert!(stderr(&listed).contains(id) && stderr(&listed).contains("revoked"), "{}", stderr(&listed));
    let json: serde_json::Value = serde_json::from_str(&stdout(&token(&["list", "--json"]))).unwrap();
    assert_eq!(json.as_array().unwrap().len(), 2);
    for command in ["block", "unblock"] {
        let done = token(&[command, "user-of-one"]);
        assert_eq!(code(&done), 1, "it may be a token of that user");
        assert!(stdout(&done).contains("1 token of user-of-one"), "{}", stdout(&done));
        assert!(stderr(&done).contains(id), "{}", stderr(&done));
    }
    let shown = token(&["show", id]);
    assert_eq!(code(&shown), 1);
    assert!(stderr(&shown).contains("revoked"), "{}", stderr(&shown));
}

/// In a chain, a token is found in the store that has it, as a gateway finds it.
#[test]
fn commands_find_a_token_in_the_store_of_a_chain_that_has_it() {
    let (mut first, mut second) = (Embedded::new("sqlite"), RedisOwn::new());
    first.add(&["in-both".into(), "in-first".into()]);
    second.add(&["in-both".into(), "in-second".into()]);
    let named = |section: String, name: &str| section.replace("[store]", &format!("[[store]]\nname = \"{name}\""));
    let backend = "[[store]]\nname = \"backend\"\nkind = \"introspection\"\nendpoint = \"http://127.0.0.1:1/user\"\n";
    let chain = format!("{}{}{backend}", named(first.section(), "own"), named(second.section(), "shared"));
    let config = Config::new(&chain);
    let token = |arguments: &[&str]| run(tollgate().arg("token").args(arguments).arg("--config").arg(&config.path));
    for (name, store) in [("in-both", "own"), ("in-first", "own"), ("in-second", "shared")] {
        let shown = token(&["show", &sha256_hex(name)[..12]]);
        assert_eq!(code(&shown), 0, "{}", stderr(&shown));
        assert!(stdout(&shown).contains(&format!("store        {store}\n")), "{name}: {}", stdout(&shown));
    }
    let missing = token(&["show", &sha256_hex("nowhere")[..12]]);
    assert_eq!(code(&missing), 1);
    assert!(
        stderr(&missing).contains("no such token in store own or shared; not asked: backend"),
        "{}",
        stderr(&missing)
    );
    assert_eq!(code(&token(&["show", &sha256_hex("in-both")[..12], "--store", "shared"])), 0);
    assert_eq!(code(&token(&["show", &sha256_hex("in-first")[..12], "--store", "shared"])), 1);
    assert_eq!(code(&token(&["revoke", &sha256_hex("in-second")])), 0);
    let key = format!("tollgate:token:{}", sha256_hex("in-second"));
    assert!(second.server.cli(&["GET", &key]).contains("revoked"));
}

/// What a command prints, and its highest memory in KiB, by what the kernel says of ended children.
fn output_and_memory(config: &Config, token: &[&str]) -> (String, u64) {
    let script = "import resource, subprocess, sys\n\
        subprocess.run(sys.argv[1:], check=True)\n\
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)";
    let mut command = Command::new("python3");
    command.args(["-c", script, env!("CARGO_BIN_EXE_tollgate"), "token"]).args(token).arg("--config").arg(&config.path);
    let said = stdout(&run(&mut command));
    let (printed, kib) = said.trim_end().rsplit_once('\n').unwrap_or_else(|| panic!("{said}"));
    (printed.to_owned(), kib.parse().unwrap())
}

/// A user of very many tokens is blocked without holding them all.
#[test]
fn a_user_of_many_tokens_is_blocked_in_bounded_memory() {
    const COUNT: usize = 60_000;
    let stores: [Box<dyn Backing>; 3] =
        [Box::new(PostgresOwn::new()), Box::new(RedisOwn::new()), Box::new(Embedded::new("sqlite"))];
    for store in stores {
        let config = Config::new(&store.section());
        let line = |number| format!("{{\"token\":\"token-{number}\",\"user\":\"service\"}}\n");
        let file = config.folder.write("tokens.jsonl", &(0..COUNT).map(line).collect::<String>());
        config.tollgate(&["token", "import"], &[file.to_str().unwrap()]).unwrap();
        for (command, done) in [("block", "are blocked"), ("unblock", "work again")] {
            let (printed, kib) = output_and_memory(&config, &[command, "service"]);
            assert_eq!(printed, format!("{COUNT} tokens of service {done}"));
            println!("| {} | {command} of {COUNT} | {:.0} MiB |", store.name(), kib as f64 / 1024.0);
            assert!(kib < 64 * 1024, "{}: {kib} KiB", store.name());
        }
    }
}

/// A list of many is printed as it is read, and ends when nobody reads any more.
#[test]
fn a_long_list_is_printed_in_bounded_memory() {
    let count = super::setting("TOLLGATE_LIST_TOKENS", 100_000);
    let tokens: Vec<String> = (0..count).map(|number| format!("token-{number:07}")).collect();
    let stores: [Box<dyn Backing>; 2] = [Box::new(PostgresOwn::new()), Box::new(RedisOwn::new())];
    for mut store in stores {
        store.add(&tokens);
        let config = Config::new(&store.section());
        let binary = env!("CARGO_BIN_EXE_tollgate");
        let (printed, kib) = output_and_memory(&config, &["list"]);
        assert_eq!(printed.lines().count(), count + 1, "{}", store.name());
        println!("| {} | list of {count} | {:.0} MiB |", store.name(), kib as f64 / 1024.0);
        assert!(kib < 64 * 1024, "{}: {kib} KiB", store.name());
        let script = format!("'{binary}' token list --config '{}' | head -3", config.path.display());
        let begun = run(Command::new("bash").args(["-o", "pipefail", "-c", &script]));
        assert_eq!(stdout(&begun).lines().count(), 3);
        assert_eq!((code(&begun), stderr(&begun)), (0, String::new()), "{}", store.name());
        // Redis has to read all of them to find one.
        let said = stdout(&run(&mut on_a_terminal(&config, "out", &["block", "user-of-token-0000007"])));
        let counts =
            store.name() != "redis" || said.contains("blocking the user's tokens: ") && said.contains(" tokens, ");
        assert!(counts, "{said:?}");
    }
}

/// Runs a command with standard error on a terminal and standard output in a file. Prints what the terminal gets.
const ON_A_TERMINAL: &str = "import os, subprocess, sys\n\
    terminal, error = os.openpty()\n\
    child = subprocess.Popen(sys.argv[2:], stdout=open(sys.argv[1], 'wb'), stderr=error)\n\
    os.close(error)\n\
    try:\n    \
        while said := os.read(terminal, 4096): os.write(1, said)\n\
    except OSError: pass\n\
    sys.exit(child.wait())";

fn on_a_terminal(config: &Config, output: &str, token: &[&str]) -> Command {
    let mut command = Command::new("python3");
    command.args(["-c", ON_A_TERMINAL]).arg(config.folder.file(output)).args([env!("CARGO_BIN_EXE_tollgate"), "token"]);
    command.args(token).arg("--config").arg(&config.path);
    command
}

#[test]
fn a_command_that_takes_long_says_so_on_a_terminal_and_nowhere_else() {
    let mut store = PostgresOwn::new();
    store.add(&["one".into()]);
    let config = Config::new(&store.section());
    let (locked, driver) =
        store.runtime.block_on(tokio_postgres::connect(&store.server.url("postgres"), tokio_postgres::NoTls)).unwrap();
    store.runtime.spawn(driver);
    store.runtime.block_on(locked.batch_execute("BEGIN; LOCK TABLE tollgate.token")).unwrap();
    let block = ["block", "user-of-one"];
    let mut piped = tollgate();
    piped.arg("token").args(block).arg("--config").arg(&config.path).stdout(Stdio::piped()).stderr(Stdio::piped());
    let piped = piped.spawn().unwrap();
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
    eventually("it waits", || store.server.psql("postgres", waiting) == "1");
    let mut shown = on_a_terminal(&config, "out", &block).stdout(Stdio::piped()).spawn().unwrap();
    let (mut said, mut bytes) = (String::new(), [0; 4096]);
    let mut terminal = shown.stdout.take().unwrap();
    while !said.contains("blocking the user's tokens: 1 s") {
        let read = terminal.read(&mut bytes).unwrap();
        assert!(read > 0, "{said:?}");
        said.push_str(std::str::from_utf8(&bytes[..read]).unwrap());
    }
    store.runtime.block_on(locked.batch_execute("ROLLBACK")).unwrap();
    let mut rest = String::new();
    terminal.read_to_string(&mut rest).unwrap();
    assert!(shown.wait().unwrap().success());
    let said = said + &rest;
    assert!(said.ends_with("\r\u{1b}[K"), "the line is removed: {said:?}");
    assert!(said.matches('\r').count() < 20, "a few times a second: {said:?}");
    let silent = piped.wait_with_output().unwrap();
    assert_eq!((code(&silent), stderr(&silent)), (0, String::new()));
    for output in [stdout(&silent), std::fs::read_to_string(config.folder.file("out")).unwrap()] {
        assert!(output.starts_with("1 token of user-of-one is blocked"), "{output}");
    }
}

/// `tollgate store check`, its exit code and what it printed.
/// On a machine that is too busy to accept a connection in time, the check says so, and nothing of the store: it is asked again.
fn check(section: &str) -> (i32, String) {
    let config = Config::new(section);
    let ask = || {
        let checked = run(tollgate().args(["store", "check", "--config"]).arg(&config.path));
        (code(&checked), stdout(&checked))
    };
    let in_time = |(_, said): &(i32, String)| !said.contains(": no answer within ");
    (0..2).map(|_| ask()).find(in_time).unwrap_or_else(ask)
}

#[track_caller]
fn finds(section: &str, how: &str, parts: &[&str]) {
    let (code, said) = check(section);
    let line = said.lines().find(|line| line.starts_with(how) && parts.iter().all(|part| line.contains(part)));
    assert!(line.is_some(), "no line {how} with {parts:?}: {said}");
    assert_eq!(code, i32::from(said.contains("\nerror: ") || said.starts_with("error: ")), "{said}");
}

#[test]
fn a_check_of_a_store_finds_what_breaks_its_promise_in_postgres() {
    let store = PostgresOwn::new();
    let section = store.section();
    let (healthy, said) = check(&section);
    assert!(healthy == 0 && said.ends_with("0 errors, 0 warnings\n") && said.contains("changes are heard"), "{said}");
    assert_eq!(store.server.psql("postgres", "SELECT count(*) FROM tollgate.replica"), "0", "it is no gateway");
    let replace = "CREATE OR REPLACE FUNCTION tollgate.token_altered() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'";
    store.server.psql("postgres", replace);
    finds(
        &section,
        "error",
        &["not heard", "function \"tollgate\".token_altered is not as it was made", "store migrate"],
    );
    Config::new(&section).tollgate(&["store", "migrate"], &[]).unwrap();
    // A user with nothing, and with everything but one right.
    store.server.psql("postgres", "CREATE ROLE gateway LOGIN");
    let of_gateway = section.replace("postgres://postgres@", "postgres://gateway@");
    finds(&of_gateway, "error", &["lookups fail", "permission denied"]);
    finds(&of_gateway, "error", &["no right to use the schema tollgate", "GRANT USAGE"]);
    store.server.psql(
        "postgres",
        "GRANT USAGE ON SCHEMA tollgate TO gateway; GRANT SELECT ON ALL TABLES IN SCHEMA tollgate TO gateway;
         GRANT INSERT, UPDATE ON tollgate.replica, tollgate.confirmation TO gateway;
         GRANT DELETE ON tollgate.change, tollgate.replica, tollgate.wait TO gateway",
    );
    finds(&of_gateway, "warning", &["last used", "GRANT UPDATE (last_used) ON tollgate.token"]);
    finds(&of_gateway, "ok", &["changes are heard"]);
    let standby = store.server.standby();
    let of_standby = PostgresOwn::section_for(&standby);
    finds(&of_standby, "error", &["a standby", "name the primary in url"]);
    finds(&of_standby, "error", &["changes are not heard", "standby"]);
    finds(&PostgresOwn::section_for(&Postgres::start()), "error", &["lookups fail", "tollgate store migrate"]);
}

#[test]
fn a_check_of_a_store_makes_no_database_and_is_no_gateway() {
    let store = Embedded::new("sqlite");
    finds(&store.section(), "warning", &["is not there", "start a gateway"]);
    assert!(!store.path.exists());
    store.config.import(&["known".into()]);
    finds(&store.section(), "ok", &["changes are heard"]);
    let db = rusqlite::Connection::open(&store.path).unwrap();
    let gateways: i64 = db.query_row("SELECT count(*) FROM replica", [], |row| row.get(0)).unwrap();
    assert_eq!(gateways, 0);
}

#[test]
fn a_check_of_a_store_finds_missing_triggers() {
    let store = PostgresGitlab::new();
    finds(&store.section(), "ok", &["changes are heard"]);
    finds(
        &format!("{}channel = \"another\"\n", store.section()),
        "error",
        &["not heard", "another", "install-triggers"],
    );
    store.server.psql("postgres", "DROP SCHEMA tollgate CASCADE");
    finds(&store.section(), "error", &["not heard", "no triggers", "install-triggers"]);
}

/// What was installed can be removed, and what would be run can be read before.
#[test]
fn triggers_are_removed_as_they_were_made_and_migrations_can_be_read() {
    let gitlab = PostgresGitlab::new();
    let config = Config::new(&gitlab.section());
    let objects = "SELECT (SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'tollgate%') || ' ' || \
        (SELECT count(*) FROM pg_namespace WHERE nspname = 'tollgate')";
    assert_ne!(gitlab.server.psql("postgres", objects).trim(), "0 0");
    for _ in 0..2 {
        config.tollgate(&["store", "uninstall-triggers"], &[]).unwrap();
        assert_eq!(gitlab.server.psql("postgres", objects).trim(), "0 0", "nothing is left");
    }
    finds(&gitlab.section(), "error", &["install-triggers"]);
    config.tollgate(&["store", "install-triggers"], &[]).unwrap();
    finds(&gitlab.section(), "ok", &["changes are heard"]);

    let server = Postgres::start();
    let section = PostgresOwn::section_for(&server);
    let config = Config::new(&section);
    let print = || stdout(&run(tollgate().args(["store", "migrate", "--print", "--config"]).arg(&config.path)));
    let sql = print();
    let file = config.folder.write("migrate.sql", &sql);
    assert!(server.psql("postgres", "SELECT count(*) FROM pg_namespace WHERE nspname = 'tollgate'").contains('0'));
    server.psql("postgres", &std::fs::read_to_string(file).unwrap());
    assert_eq!(print().trim(), "-- there is nothing to do");
    finds(&section, "ok", &["changes are heard"]);
    server.psql("postgres", "ALTER TABLE tollgate.token DISABLE TRIGGER tollgate_altered");
    finds(&section, "error", &["changes are not heard", "tollgate_altered", "is off"]);
    server.psql("postgres", &print());
    finds(&section, "ok", &["changes are heard"]);
    let moved = Config::new(&format!("{section}channel = \"another\"\n"));
    let sql = stdout(&run(tollgate().args(["store", "migrate", "--print", "--config"]).arg(&moved.path)));
    server.psql("postgres", &sql);
    assert!(server.psql("postgres", "SELECT channel FROM tollgate.version").contains("another"));
}

#[test]
fn a_check_of_a_store_finds_what_breaks_its_promise_in_redis() {
    let store = RedisOwn::new();
    let section = store.section();
    store.server.cli(&["CONFIG", "RESETSTAT"]);
    let (healthy, said) = check(&section);
    assert!(healthy == 0 && said.ends_with("0 errors, 0 warnings\n") && said.contains("noeviction"), "{said}");
    let commands = store.server.cli(&["INFO", "commandstats"]);
    assert!(
        commands.contains("cmdstat_subscribe") && !commands.contains("cmdstat_zadd"),
        "it is no gateway: {commands}"
    );
    let set = |setting: &str, value: &str| store.server.cli(&["CONFIG", "SET", setting, value]);
    set("maxmemory-policy", "allkeys-lru");
    finds(&section, "warning", &["allkeys-lru", "maxmemory is 0 now"]);
    set("maxmemory", "100mb");
    finds(&section, "error", &["allkeys-lru", "evicted", "CONFIG SET maxmemory-policy noeviction"]);
    set("maxmemory-policy", "noeviction");
    set("appendonly", "no");
    set("save", "60 1");
    finds(&section, "warning", &["since the last save", "CONFIG SET appendonly yes"]);
    set("save", "");
    finds(&section, "error", &["a restart loses every token"]);
    set("appendonly", "yes");
    let keyspace = format!("{section}changes = \"keyspace\"\n");
    set("notify-keyspace-events", "Kg$hx");
    finds(&keyspace, "error", &["without e", "CONFIG SET notify-keyspace-events Kg$hxe"]);
    set("notify-keyspace-events", "KEA");
    finds(&keyspace, "ok", &["notify-keyspace-events is"]);
    store.server.cli(&["ACL", "SETUSER", "gateway", "on", "nopass", "~*", "&*", "+@all", "-config|get", "-time"]);
    let password = Config::new("");
    let file = password.folder.write("password", "anything");
    let user = format!("{section}username = \"gateway\"\npassword_file = \"{}\"\n", file.display());
    finds(&user, "warning", &["maxmemory-policy cannot be read", "+config|get"]);
    finds(&user, "warning", &["clock", "grant +time"]);
}
