//! What holds if something went wrong nevertheless: memory does not get to a disk or to another process, files are not for
//! everyone, a panic costs one connection, and deep or large input is refused by every parser instead of ending the process.

use crate::harness::*;
use crate::servers::http::{HttpServer, Reply as ServerReply};
use crate::support::{Store, stderr, stdout};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).permissions().mode() & 0o777
}

/// Tokens of requests in flight are in memory. The kernel gives the files of a process that must not be dumped to root, and
/// its memory to nobody else.
#[test]
fn memory_gets_into_no_core_dump() {
    let upstream = Upstream::start();
    let is_root = std::fs::metadata("/proc/self").unwrap().uid() == 0;
    let more = "[log]\naccess = \"stdout\"\n";
    let gateway = Gateway::start_with(upstream.address, more, |command| {
        let config = PathBuf::from(command.get_args().last().unwrap());
        if is_root {
            // As a user whose processes' files would be his own otherwise.
            std::fs::set_permissions(config.parent().unwrap(), std::fs::Permissions::from_mode(0o755)).unwrap();
            command.uid(65_534).gid(65_534);
        }
    });
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", gateway.pid())).unwrap();
    let core: Vec<&str> =
        limits.lines().find(|line| line.starts_with("Max core")).unwrap().split_whitespace().collect();
    assert_eq!(core[4..6], ["0", "0"], "{limits}");
    let status = std::fs::read_to_string(format!("/proc/{}/status", gateway.pid())).unwrap();
    let user = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap().split_whitespace().next().unwrap();
    assert_ne!(user, "0", "{status}");
    let memory = std::fs::metadata(format!("/proc/{}/mem", gateway.pid())).unwrap();
    assert_eq!(memory.uid(), 0, "its memory can be read by its user");
    assert_eq!(gateway.get("/api/v3/projects").status, 200);
}

/// Whatever the umask is: callers, tokens and cached identities are not for other users of the machine.
#[test]
fn files_are_not_for_everyone() {
    let upstream = Upstream::start();
    let store = Store::with([("token-of-ann-0001", "ann")]);
    let folder = Folder::new("test");
    let at = |name: &str| folder.0.join(name);
    let more = format!(
        "[server]\nlisten = [\"@LISTEN@\", \"unix:{}\"]\nthreads = 1\n[cache]\nsnapshot = \"{}\"\n{}",
        at("api.sock").display(),
        at("cache").display(),
        store.section()
    );
    let mut shell = Command::new("sh");
    shell.args(["-c", "umask 0; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_tollgate")]);
    let mut gateway = Gateway::start_program(shell, upstream.address, &more);
    assert_eq!(gateway.ask("GET /api/v3/a HTTP/1.1\nHost: h\nPRIVATE-TOKEN: token-of-ann-0001\n\n").status, 200);
    eventually("it is logged", || !gateway.access_log().is_empty());
    let log = gateway.folder.0.join("access.log");
    assert_eq!((mode(&log), mode(&at("api.sock"))), (0o640, 0o660));
    // A log that was moved is made anew with the same mode.
    std::fs::rename(&log, at("moved")).unwrap();
    gateway.signal("USR1");
    eventually("it is made anew", || log.exists());
    assert_eq!(mode(&log), 0o640);
    for name in ["tokens.db", "tokens.db-wal", "tokens.db-shm"] {
        let path = store.path.with_file_name(name);
        assert!(!path.exists() || mode(&path) == 0o600, "{name} has {:o}", mode(&path));
    }
    eventually("it follows the store", || gateway.metric("tollgate_store_subscribed{store=\"sqlite\"}") == 1.0);
    gateway.signal("TERM");
    assert!(gateway.ended().success());
    assert_eq!(mode(&at("cache")), 0o600);
}

/// In the build of the seeded faults, which panics on a path: its client gets no response, and everyone else is served.
#[test]
fn a_panic_costs_one_connection() {
    let binary = PathBuf::from(env!("CARGO_BIN_EXE_tollgate")).with_file_name("tollgate-seeded");
    assert!(binary.exists(), "run `cargo build --locked --features seeded-faults --bin tollgate-seeded`");
    for framework in [false, true] {
        let upstream = Upstream::start();
        let mut program = Command::new(&binary);
        program.env("TOLLGATE_SEEDED_FAULT", "Panic");
        if framework {
            program.env(FRAMEWORK_LANE, "1");
        }
        let gateway = Gateway::start_as(program, upstream.address);
        let mut beside = gateway.client();
        let ask = format!("GET /api/v3/a HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: {GOOD}\n\n");
        for count in 1..=30 {
            let mut client = gateway.client();
            client.send_head(&ask.replace("/a ", "/seeded-panic "));
            let answer = client.try_answer();
            assert!(answer.is_none_or(|answer| answer.status == 500), "framework: {framework}");
            beside.send_head(&ask);
            assert_eq!(beside.answer().status, 200, "beside panic {count}, framework: {framework}");
        }
        assert_eq!(gateway.metric("tollgate_panics_total"), 30.0);
        assert_eq!(gateway.metric("tollgate_requests_in_flight"), 0.0);
        assert!(gateway.process_log().contains("a seeded panic"));
        assert!(!gateway.process_log().contains(GOOD));
    }
}

/// Ends a command that takes too long, and says how it ended.
fn bounded(command: &mut Command) -> Output {
    let started = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > 3 * PATIENCE {
            drop(child.kill());
            drop(child.wait());
            panic!("{command:?} did not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

const DEEP: usize = 100_000;

/// A file that is nested beyond reason is an error with a place, and neither a stack that overflows nor a machine that swaps.
#[test]
fn deep_files_are_errors() {
    let folder = Folder::new("test");
    let upstream = "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n";
    let deep = [
        ("arrays", format!("x = {}{}\n", "[".repeat(DEEP), "]".repeat(DEEP))),
        ("open arrays", format!("x = {}", "[".repeat(DEEP))),
        ("tables", format!("x = {}1{}\n", "{a=".repeat(DEEP), "}".repeat(DEEP))),
        ("open tables", format!("x = {}", "{a=".repeat(DEEP))),
        ("dotted keys", format!("x{} = 1\n", ".a".repeat(DEEP))),
        ("a dotted header", format!("[x{}]\ny = 1\n", ".a".repeat(DEEP))),
        ("an array of tables", format!("[[x{}]]\ny = 1\n", ".a".repeat(DEEP))),
        ("a long value", format!("x = \"{}\"\n", "a".repeat(20 * DEEP))),
    ];
    for (name, text) in &deep {
        let config = folder.write("tollgate.toml", &format!("{text}\n{upstream}"));
        let output = bounded(tollgate().args(["check", "--config"]).arg(&config));
        assert_eq!(output.status.code(), Some(64), "{name} in the configuration: {:?}", output.status);
        assert!(stderr(&output).len() < 10_000, "{name}: {} bytes are said", stderr(&output).len());
        // The token file has the same syntax and another parser.
        folder.write("tokens.toml", text);
        let store = "[store]\nkind = \"file\"\npath = \"tokens.toml\"\n";
        let config = folder.write("store.toml", &format!("{store}{upstream}"));
        for command in [&["check"][..], &["token", "list"], &["token", "create", "--user", "a"]] {
            let output = bounded(tollgate().args(command).arg("--config").arg(&config));
            assert!(matches!(output.status.code(), Some(1 | 64)), "{name}, {command:?}: {:?}", output.status);
            assert!(stderr(&output).len() < 10_000, "{name}: {} bytes are said", stderr(&output).len());
        }
    }
    let config = folder.write("import.toml", &format!("[store]\nkind = \"sqlite\"\npath = \"tokens.db\"\n{upstream}"));
    for line in [
        "[".repeat(DEEP),
        format!("{{\"token\":\"a-token-0001\",\"user\":\"a\",\"x\":{}{}}}", "[".repeat(DEEP), "]".repeat(DEEP)),
        "{\"user\":".repeat(DEEP),
    ] {
        let lines = folder.write("tokens.jsonl", &format!("{line}\n"));
        let output = bounded(tollgate().args(["token", "import", "--config"]).arg(&config).arg(lines));
        assert!(matches!(output.status.code(), Some(1 | 64)), "{:?}", output.status);
        assert!(stderr(&output).len() < 10_000);
    }
}

/// Bodies that are nested as deep as a body can be are refused or passed, in bounded memory, and the next request is served.
#[test]
fn deep_bodies_cost_nothing() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let before = gateway.memory();
    let million = 1_000_000;
    let nested = |depth: usize| {
        let mut text = String::new();
        for n in 0..depth {
            text.push_str(&format!("--b{n}\r\nContent-Type: multipart/mixed; boundary=b{}\r\n\r\n", n + 1));
        }
        text
    };
    let json = "application/json";
    for (name, kind, body) in [
        ("open arrays", json, "[".repeat(million)),
        ("arrays", json, format!("{}{}", "[".repeat(million), "]".repeat(million))),
        ("open objects", json, "{\"a\":".repeat(million)),
        ("arrays within objects", json, "{\"a\":[".repeat(million / 2)),
        ("a long number", json, "1".repeat(million)),
        ("a long name", json, format!("{{\"{}\":1}}", "a".repeat(million))),
        ("many names", json, format!("{{{}\"z\":1}}", "\"a\":1,".repeat(million / 4))),
        ("parts within parts", "multipart/form-data; boundary=b0", nested(5_000)),
        (
            "many parts",
            "multipart/form-data; boundary=b",
            "--b\r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n".repeat(50_000),
        ),
        (
            "a long field of a part",
            "multipart/form-data; boundary=b",
            format!("--b\r\nX: {}\r\n\r\n", "a".repeat(million)),
        ),
        ("brackets", "application/x-www-form-urlencoded", format!("a{}=1", "[a]".repeat(million / 3))),
        ("many fields", "application/x-www-form-urlencoded", "a=1&".repeat(million / 4)),
        ("escapes", "application/x-www-form-urlencoded", "%25".repeat(million / 3)),
    ] {
        let head = format!(
            "POST /api/v3/x HTTP/1.1\r\nHost: h.test\r\nPRIVATE-TOKEN: {GOOD}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        let started = Instant::now();
        let mut client = gateway.client();
        // It may be refused and closed before all is sent.
        let _: std::io::Result<()> = std::io::Write::write_all(&mut client.socket, head.as_bytes());
        let _: std::io::Result<()> = std::io::Write::write_all(&mut client.socket, body.as_bytes());
        let mut answer = Vec::new();
        let _: std::io::Result<usize> = std::io::Read::read(&mut std::io::Read::take(&client.socket, 64), {
            answer.resize(64, 0);
            &mut answer
        });
        let said = String::from_utf8_lossy(&answer).into_owned();
        assert!(
            said.starts_with("HTTP/1.1 200") || said.starts_with("HTTP/1.1 4") || said.starts_with('\0'),
            "{name}: {said}"
        );
        assert!(started.elapsed() < PATIENCE, "{name}: {:?}", started.elapsed());
        assert_eq!(gateway.get("/api/v3/projects").status, 200, "behind {name}");
    }
    let query = format!("/api/v3/x?a{}=1", "[a]".repeat(2_000));
    assert!([200, 414].contains(&gateway.get(&query).status));
    let grown = gateway.memory().saturating_sub(before);
    assert!(grown < 24 * 1024 * 1024, "{grown} bytes more");
    assert!(!gateway.process_log().contains("panic"), "{}", gateway.process_log());
}

/// An endpoint that answers with something deep or endless is a store that fails: 503, and nothing else.
#[test]
fn deep_answers_of_an_endpoint_are_failures() {
    let upstream = Upstream::start();
    for body in [
        "[".repeat(DEEP),
        format!("{{\"username\":\"ann\",\"x\":{}{}}}", "[".repeat(DEEP), "]".repeat(DEEP)),
        "{\"a\":".repeat(DEEP),
        format!("{{\"username\":\"{}\"}}", "a".repeat(5_000_000)),
    ] {
        let endpoint = HttpServer::start(move |_| ServerReply::json(&body));
        let more = format!("[store]\nkind = \"introspection\"\nendpoint = \"{}\"\n", endpoint.url("/user"));
        let gateway = Gateway::start(upstream.address, &more);
        let before = gateway.memory();
        assert_eq!(gateway.get("/api/v3/projects").status, 503);
        assert!(gateway.memory().saturating_sub(before) < 16 * 1024 * 1024);
    }
    assert_eq!(upstream.seen().len(), 0);
    assert_eq!(stdout(&tollgate().arg("--version").output().unwrap()).lines().count(), 1);
}
