//! The command line for people and scripts: what is printed, what is not, and exit codes. The effects of the token commands
//! are in `cli/tokens.rs`.

mod start;
mod tokens;

use crate::harness::*;
use crate::servers::postgres::Postgres;
use crate::stores::{Backing, PostgresOwn, RedisOwn};
use crate::support::*;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const USAGE: i32 = 64;
const UPSTREAM: &str = "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n";

/// A folder with a configuration for each kind of store.
struct Place {
    folder: Folder,
    kind: &'static str,
}

impl Place {
    fn new(kind: &'static str) -> Self {
        let folder = Folder::new("test");
        let place = Self { folder, kind };
        let (kind, path) = place.store();
        place.folder.write("tollgate.toml", &format!("{UPSTREAM}[store]\nkind = \"{kind}\"\npath = \"{path}\"\n"));
        place
    }

    /// The configuration's `kind`, and the file.
    fn store(&self) -> (&'static str, &'static str) {
        match self.kind {
            "sqlite" => ("sqlite", "tokens.db"),
            "json" => ("file", "tokens.json"),
            _ => ("file", "tokens.toml"),
        }
    }

    /// Every store that is a file.
    fn all() -> [Self; 3] {
        [Self::new("sqlite"), Self::new("file"), Self::new("json")]
    }

    fn both() -> [Self; 2] {
        [Self::new("sqlite"), Self::new("file")]
    }

    fn command(&self, command: &[&str], arguments: &[&str]) -> Command {
        let mut tollgate = tollgate();
        tollgate.args(command).arg("--config").arg(self.folder.0.join("tollgate.toml")).args(arguments);
        tollgate
    }

    fn token(&self, command: &str, arguments: &[&str]) -> Output {
        run(&mut self.command(&["token", command], arguments))
    }

    /// Runs a command that must succeed, and returns its output.
    fn ok(&self, command: &str, arguments: &[&str]) -> String {
        let output = self.token(command, arguments);
        assert_eq!(output.status.code(), Some(0), "{} {command}: {}", self.kind, stderr(&output));
        stdout(&output)
    }

    fn json(&self, command: &str, arguments: &[&str]) -> serde_json::Value {
        let text = self.ok(command, &[arguments, &["--json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// The same with something on standard input.
    fn with_input(&self, command: &str, arguments: &[&str], input: &str) -> Output {
        let mut child = self
            .command(&["token", command], arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    }

    fn section(&self) -> String {
        let (kind, path) = self.store();
        format!("[store]\nkind = \"{kind}\"\npath = \"{}\"\n", self.folder.0.join(path).display())
    }
}

fn all(output: &Output) -> String {
    stdout(output) + &stderr(output)
}

fn check(text: &str) -> Output {
    let folder = Folder::new("test");
    run(tollgate().args(["check", "--config"]).arg(folder.write("tollgate.toml", text)))
}

// ---- check and example-config ----

#[test]
fn check_says_ok_and_what_can_be_reached_without_a_token() {
    let output = check(UPSTREAM);
    assert_eq!(output.status.code(), Some(0), "{}", all(&output));
    assert!(stdout(&output).contains("nothing can be reached without a token"), "{}", all(&output));
    let open =
        "[[route]]\npath = \"/api/v3/session\"\nmethods = [\"POST\"]\nauth = \"none\"\nreason = \"log in here\"\n";
    let output = check(&format!("[api]\ncors_preflight = true\n{UPSTREAM}{open}"));
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{}", all(&output));
    let line = text.lines().find(|line| line.contains("/api/v3/session")).unwrap_or_else(|| panic!("{text}"));
    assert!(line.contains("POST") && line.contains("log in here"), "{line}");
    assert!(text.contains("CORS preflight"), "{text}");
}

#[test]
fn check_names_every_problem_with_its_key_and_its_line() {
    let text = "[server]\n\
                listen = [\"nonsense\"]\n\
                thread = 3\n\
                [token]\n\
                forward = \"maybe\"\n\
                header = \"Cookie\"\n\
                [cache]\n\
                positive_ttl = 60\n\
                positive_capacity = 0\n\
                [pagination]\n\
                max_per_page = 5\n\
                [limits]\n\
                header_bytes = \"1KiB\"\n\
                target_bytes = \"2KiB\"\n\
                [colour]\n\
                [[upstream]]\n\
                servers = []\n\
                [[route]]\n\
                path = \"/a/\"\n\
                [[route]]\n\
                path = \"/b\"\n\
                auth = \"none\"\n\
                upstream = \"nobody\"\n";
    let folder = Folder::new("test");
    let file = folder.write("tollgate.toml", text);
    let output = run(tollgate().args(["check", "--config"]).arg(&file));
    assert_eq!(output.status.code(), Some(USAGE), "{}", all(&output));
    assert_eq!(stdout(&output), "");
    let said = stderr(&output);
    for (line, key) in [
        ("2:11", "server.listen: is not an address to listen on, found \"nonsense\"; write it like \"127.0.0.1:8080\""),
        ("3:1", "server.thread: is not a known key; did you mean `threads`?"),
        (
            "5:11",
            "token.forward: is not allowed here, found \"maybe\"; use one of: \"token\", \"identity\", \"both\", \"none\"",
        ),
        ("6:10", "token.header: is a header with another meaning"),
        ("8:16", "cache.positive_ttl: must be a time with its unit, found 60"),
        ("9:21", "cache.positive_capacity: must not be 0"),
        ("11:16", "pagination.max_per_page: is less than default_per_page"),
        ("14:16", "limits.target_bytes: is more than header_bytes (see"),
        ("15:2", "colour: is not a known section; use one of: server, listener, admin"),
        ("16:1", "upstream[0].name: is missing"),
        ("17:11", "upstream[0].servers: is empty, found []"),
        ("19:8", "route[0].path: "),
        ("20:1", "route[1].reason: is missing"),
    ] {
        let place = format!("{}:{line}: {key}", file.display());
        assert!(said.lines().any(|said| said.starts_with(&place)), "{place} is not among\n{said}");
    }
    // Without the upstream's name, the route's upstream cannot be checked.
    assert!(said.ends_with("\n13 errors\n"), "{said}");
    // Each problem is reported once.
    let output = check(&format!("{UPSTREAM}[store]\nkind = \"stone\"\n"));
    assert_eq!(output.status.code(), Some(USAGE));
    assert!(stderr(&output).ends_with("\n1 error\n") && stderr(&output).contains("\"sqlite\""), "{}", all(&output));
    for text in ["", "this is = not = toml", "[server"] {
        let output = check(text);
        assert_eq!(output.status.code(), Some(USAGE), "{text:?}: {}", all(&output));
    }
    let nowhere = run(tollgate().args(["check", "--config", "/nowhere/tollgate.toml"]));
    assert_eq!(nowhere.status.code(), Some(USAGE), "{}", all(&nowhere));
    assert!(stderr(&nowhere).contains("/nowhere/tollgate.toml"));
}

/// A folder with the kinds of files that a configuration can name.
fn surroundings() -> Folder {
    let folder = Folder::new("test");
    for (name, text) in [("broken.toml", "broken"), ("broken.json", "{"), ("good.toml", "token = []\n"), ("empty", "")]
    {
        folder.write(name, text);
    }
    folder.write("word", "S3CRET-word\n");
    std::fs::create_dir(folder.0.join("folder")).unwrap();
    std::os::unix::fs::symlink(folder.0.join("nowhere"), folder.0.join("dangling")).unwrap();
    folder
}

/// Whether a gateway starts with a configuration, so that its API listener accepts connections, and its output.
fn starts(config: &std::path::Path, listen: &str) -> (bool, String) {
    let log = config.with_file_name("stderr");
    let mut command = tollgate();
    command.args(["run", "--config"]).arg(config).stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = command.stderr(std::fs::File::create(&log).unwrap()).spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    let started = loop {
        if let Some(status) = child.try_wait().unwrap() {
            assert_ne!(status.code(), Some(0), "it ended by itself");
            break false;
        }
        if std::net::TcpStream::connect(listen).is_ok() {
            break true;
        }
        assert!(Instant::now() < deadline, "neither started nor ended: {}", std::fs::read_to_string(&log).unwrap());
        std::thread::sleep(Duration::from_millis(10));
    };
    // It may have ended already.
    let _: std::io::Result<()> = child.kill();
    child.wait().unwrap();
    (started, std::fs::read_to_string(&log).unwrap())
}

/// `check` fails if and only if a start fails. `@` is the folder; the second column is a part of the output of `check`, the
/// third whether a gateway starts.
#[test]
fn check_and_run_agree() {
    let rows = [
        ("", "ok", true),
        // The log.
        (
            "[log]\naccess = \"nowhere/access.log\"\n",
            "log.access: @/nowhere/access.log cannot be written: there is no folder",
            false,
        ),
        ("[log]\naccess = \"good.toml/access.log\"\n", "log.access", false),
        ("[log]\naccess = \"folder\"\n", "log.access", false),
        ("[log]\naccess = \"\"\n", "log.access: is empty", false),
        ("[log]\naccess = \"dangling/access.log\"\n", "log.access", false),
        ("[log]\naccess = \"folder/access.log\"\n", "ok", true),
        ("[log]\naccess = \"dangling\"\n", "ok", true),
        ("[log]\naccess = \"empty\"\n", "ok", true),
        ("[log]\naccess = \"/dev/null\"\n", "ok", true),
        ("[log]\naccess = \"off\"\n", "ok", true),
        // The snapshot: without one, a gateway starts.
        ("[cache]\nsnapshot = \"nowhere/cache\"\n", "warning: cache.snapshot: cannot be written", true),
        ("[cache]\nsnapshot = \"folder\"\n", "warning: cache.snapshot", true),
        ("[cache]\nsnapshot = \"cache\"\n", "ok", true),
        // Files of stores.
        ("[store]\nkind = \"file\"\npath = \"nowhere.toml\"\n", "store.path: @/nowhere.toml: No such file", false),
        ("[store]\nkind = \"file\"\npath = \"broken.toml\"\n", "store.path: @/broken.toml: line 1: ", false),
        ("[store]\nkind = \"file\"\npath = \"broken.json\"\n", "store.path: @/broken.json: line 1: ", false),
        ("[store]\nkind = \"file\"\npath = \"good.json\"\n", "store.path", false),
        ("[store]\nkind = \"file\"\npath = \"folder\"\n", "store.path", false),
        ("[store]\nkind = \"file\"\npath = \"dangling\"\n", "store.path", false),
        ("[store]\nkind = \"file\"\npath = \"good.toml\"\n", "ok", true),
        ("[store]\nkind = \"file\"\npath = \"empty\"\n", "store.path: @/empty: the file is empty", false),
        ("[[store]]\n[[store]]\nkind = \"file\"\npath = \"broken.toml\"\n", "store[1].path: @/broken.toml", false),
        (
            "[store]\npath = \"nowhere/tokens.db\"\n",
            "store.path: @/nowhere/tokens.db: there is no folder @/nowhere",
            false,
        ),
        ("[store]\npath = \"good.toml/tokens.db\"\n", "store.path", false),
        ("[store]\npath = \"good.toml\"\n", "store.path: @/good.toml: is not an SQLite database", false),
        ("[store]\npath = \"folder\"\n", "store.path: @/folder: is a folder", false),
        ("[store]\npath = \"dangling\"\n", "store.path", false),
        ("[store]\npath = \"empty\"\n", "ok", true),
        ("[store]\npath = \"folder/new.db\"\n", "ok", true),
        // Settings of stores, and servers that are down, with which a gateway starts.
        (
            "[store]\nkind = \"postgres\"\nurl = \"host=127.0.0.1 port=1 user=u dbname=d\"\n",
            "warning: store.url: cannot be used now",
            true,
        ),
        (
            "[store]\nkind = \"postgres\"\nurl = \"host=127.0.0.1 port=1 user=u dbname=d\"\nschema = \"pg_tokens\"\n",
            "store.schema: ",
            false,
        ),
        (
            "[store]\nkind = \"postgres\"\nurl = \"host=127.0.0.1 port=1 user=u\"\npassword_file = \"nowhere\"\n",
            "store.password_file: cannot be read",
            false,
        ),
        (
            "[store]\nkind = \"postgres\"\nurl = \"host=127.0.0.1 port=1 user=u\"\npassword_file = \"empty\"\n",
            "store.password_file: names an empty file",
            false,
        ),
        (
            "[store]\nkind = \"redis\"\nservers = [\"127.0.0.1:1\"]\n",
            "warning: store.servers: cannot be used now",
            true,
        ),
        (
            "[store]\nkind = \"redis\"\nservers = [\"127.0.0.1:1\"]\npassword_file = \"word\"\n",
            "warning: store.servers",
            true,
        ),
        ("[store]\nkind = \"redis\"\nservers = [\"127.0.0.1:1\"]\nusername = \"u\"\n", "store.username: ", false),
        (
            "[store]\nkind = \"redis\"\ntopology = \"sentinel\"\nservers = [\"127.0.0.1:1\"]\nmaster = \"\"\n",
            "store.master: ",
            false,
        ),
        ("[store]\nkind = \"redis\"\nservers = [\"127.0.0.1:1\"]\nchannel = \"\"\n", "store.channel: ", false),
        ("[store]\nkind = \"redis\"\nservers = [\"r.invalid:1\"]\ntls_ca = \"nowhere.pem\"\n", "store.tls_ca: ", false),
        ("[store]\nkind = \"introspection\"\n", "warning: store.endpoint: cannot be used now", true),
        (
            "[store]\nkind = \"introspection\"\nendpoint = \"https://no-such-name.invalid/user\"\n",
            "warning: store.endpoint",
            true,
        ),
        ("[store]\nkind = \"introspection\"\nendpoint = \"http://127.0.0.1:99999/user\"\n", "store.endpoint: ", false),
        ("[store]\nkind = \"introspection\"\nmode = \"rfc7662\"\n", "store.client_id: is missing", false),
        ("[store]\nkind = \"introspection\"\nunknown_statuses = [200]\n", "store.unknown_statuses: ", false),
        // Listeners.
        (
            "[server]\nlisten = [\"LISTEN\", \"192.0.2.1:8080\"]\n",
            "server.listen: 192.0.2.1:8080 cannot be bound",
            false,
        ),
        ("[server]\nlisten = [\"[2001:db8::1]:8080\"]\n", "server.listen", false),
        ("[admin]\nlisten = \"192.0.2.1:9090\"\n", "admin.listen: 192.0.2.1:9090 cannot be bound", false),
        ("[server]\nlisten = [\"127.0.0.1:0\"]\n", "server.listen: has port 0", false),
        ("[admin]\nlisten = \"[::1]:0\"\n", "admin.listen: has port 0", false),
        ("[server]\nlisten = [\"LISTEN\", \"0.0.0.0:PORT\"]\n", "server.listen: 0.0.0.0:PORT cannot be bound", false),
        ("[server]\nlisten = [\"[::]:PORT\", \"LISTEN\"]\n", "server.listen: LISTEN cannot be bound", false),
        ("[admin]\nlisten = \"0.0.0.0:PORT\"\n", "admin.listen: 0.0.0.0:PORT cannot be bound", false),
        ("[admin]\nlisten = \"LISTEN\"\n", "admin.listen: repeats the address of another listener", false),
        ("[server]\nlisten = []\n", "server.listen: is empty", false),
        ("[server]\nlisten = [\"unix:@/nowhere/api.sock\"]\n", "cannot be bound: there is no folder @/nowhere", false),
        ("[server]\nlisten = [\"unix:@/good.toml/api.sock\"]\n", "cannot be bound", false),
        ("[server]\nlisten = [\"unix:@/good.toml\"]\n", "cannot be bound: a file exists at this path", false),
        ("[server]\nlisten = [\"unix:@/LONG\"]\n", "is the path of a socket with more than 107 bytes", false),
        ("[server]\nlisten = [\"LISTEN\", \"unix:@/api.sock\"]\n", "ok", true),
        ("[server]\nthreads = 513\n", "server.threads: is out of range", false),
        // Upstreams.
        (
            "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\", \"no-such-name.invalid:80\"]\n",
            "warning: upstream[0].servers: no-such-name.invalid:80 cannot be resolved",
            true,
        ),
        ("[[upstream]]\nname = \"api\"\nservers = [\"unix:/LONG\"]\n", "upstream[0].servers", false),
        ("[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:0\"]\n", "upstream[0].servers", false),
        ("[[upstream]]\nname = \"api\"\nservers = [\"localhost:1\", \"[::1]:1\", \"unix:/nowhere\"]\n", "ok", true),
        ("[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\ncheck = \"ping\"\n", "upstream[0].check", false),
        (
            "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\ncheck = \"http\"\ncheck_path = \"a b\"\n",
            "upstream[0].check_path: is not the path of a request",
            false,
        ),
        (
            "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\ncheck = \"tcp\"\ncheck_port = 70000\n",
            "upstream[0].check_port: is out of range",
            false,
        ),
        (
            "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\nfailure_statuses = [503, 200]\n",
            "upstream[0].failure_statuses: is out of range",
            false,
        ),
        (
            "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\npanic_below = 101\n",
            "upstream[0].panic_below: is out of range",
            false,
        ),
        // Rules.
        (
            "[token]\nbody = \"ignore\"\nmethod_override = \"judge\"\n",
            "token.method_override: does not go with body",
            false,
        ),
        ("[token]\nbody = \"ignore\"\n", "warning: token.body", true),
        ("[token]\nmethod_override = \"judge\"\n", "ok", true),
        ("[api]\nprefixes = [\"/a\", \"/a\"]\n", "warning: api.prefixes: is in the list twice", true),
        ("[limits]\nheader_bytes = \"1KiB\"\nheader_bytes = \"2KiB\"\n", "`header_bytes` is in the file twice", false),
    ];
    let mut read = 0;
    for (text, part, starting) in rows {
        read += 1;
        let folder = surroundings();
        let port = free_port();
        let listen = format!("127.0.0.1:{port}");
        let at = folder.0.display().to_string();
        let fill = |text: &str| {
            let text = text.replace('@', &at).replace("LISTEN", &listen).replace("PORT", &port.to_string());
            text.replace("LONG", &"x".repeat(120))
        };
        let sections = [
            ("[server]", format!("listen = [\"{listen}\"]\nthreads = 1\n")),
            ("[admin]", "listen = \"none\"\n".into()),
            ("[[upstream]]", "name = \"api\"\nservers = [\"127.0.0.1:1\"]\n".into()),
        ];
        let own = sections
            .iter()
            .filter(|(header, _)| !text.contains(header))
            .map(|(header, body)| format!("{header}\n{body}"));
        let config = folder.write("tollgate.toml", &(own.collect::<String>() + &fill(text)));
        let before = listing(&folder);
        let checked = run(tollgate().args(["check", "--config"]).arg(&config));
        let said = all(&checked);
        assert_eq!(listing(&folder), before, "{text}: a check makes nothing");
        assert_eq!(checked.status.code(), Some(if starting { 0 } else { USAGE }), "{text}: {said}");
        assert!(said.contains(&fill(part)), "{text}: {said}");
        assert!(!said.contains("S3CRET"), "{text}: {said}");
        let (started, log) = starts(&config, &listen);
        assert_eq!(started, starting, "{text}: {log}");
        // Both report the error in the same words.
        if !started {
            assert!(log.contains(&fill(part)), "{text}: {log}");
        }
    }
    assert_eq!(read, rows.len());
}

fn listing(folder: &Folder) -> Vec<String> {
    let entries = std::fs::read_dir(&folder.0).unwrap().map(|entry| entry.unwrap());
    let mut names: Vec<_> =
        entries.map(|entry| format!("{:?} {:?}", entry.file_name(), entry.metadata().unwrap().len())).collect();
    names.sort();
    names
}

#[test]
fn check_beside_a_running_gateway_and_without_the_network() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let config = gateway.folder.0.join("tollgate.toml");
    // The gateway's own addresses are in use, and so are its token file and log.
    let checked = run(tollgate().args(["check", "--config"]).arg(&config));
    assert_eq!(checked.status.code(), Some(0), "{}", all(&checked));
    assert_eq!(stdout(&checked).matches("this is expected while the gateway runs").count(), 2, "{}", all(&checked));
    let second = run(tollgate().args(["run", "--config"]).arg(&config));
    assert_eq!(second.status.code(), Some(1), "{}", all(&second));
    assert!(stderr(&second).contains(&format!("{} cannot be bound", gateway.address)), "{}", all(&second));
    assert_eq!(gateway.get("/api/v3/user").status, 200);
    // Names are not resolved with --offline.
    let text = "[[upstream]]\nname = \"api\"\nservers = [\"no-such-name.invalid:80\"]\n";
    let folder = Folder::new("test");
    let config = folder.write("tollgate.toml", text);
    let online = run(tollgate().args(["check", "--config"]).arg(&config));
    let offline = run(tollgate().args(["check", "--offline", "--config"]).arg(&config));
    assert_eq!((online.status.code(), offline.status.code()), (Some(0), Some(0)), "{}{}", all(&online), all(&offline));
    assert!(all(&online).contains("cannot be resolved") && !all(&offline).contains("cannot be resolved"));
}

/// A healthy server causes no output; one that refuses the connection is a warning, because a gateway would start.
#[test]
fn check_asks_the_servers_of_stores() {
    let folder = Folder::new("test");
    let check = |section: &str, more: &[&str]| {
        let file = folder.write("tollgate.toml", &format!("{UPSTREAM}{section}"));
        let output = run(tollgate().args(["check", "--config"]).arg(file).args(more));
        assert_eq!(output.status.code(), Some(0), "{}", all(&output));
        stdout(&output)
    };
    let stores: [Box<dyn Backing>; 2] = [Box::new(PostgresOwn::new()), Box::new(RedisOwn::new())];
    for store in stores {
        let said = check(&store.section(), &[]);
        assert!(!said.contains("warning") && said.contains(": ok\n"), "{}: {said}", store.name());
    }
    let bare = Postgres::start();
    let section = |url: &str| format!("[store]\nkind = \"postgres\"\nurl = \"{url}\"\n");
    for (what, url) in
        [("tables that were never made", bare.url("postgres")), ("no such database", bare.url("nowhere"))]
    {
        let said = check(&section(&url), &[]);
        assert!(said.contains("warning: store.url: cannot be used now: "), "{what}: {said}");
        assert!(!check(&section(&url), &["--offline"]).contains("warning"), "{what}: it was asked without the network");
    }
}

#[test]
fn check_in_json_is_one_object_a_problem() {
    let folder = Folder::new("test");
    let check = |text: &str| {
        let output = run(tollgate().args(["check", "--json", "--config"]).arg(folder.write("tollgate.toml", text)));
        let lines =
            stdout(&output).lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<serde_json::Value>>();
        assert_eq!(stderr(&output), "");
        (output.status.code(), lines)
    };
    assert_eq!(check(UPSTREAM), (Some(0), Vec::new()));
    let (code, found) = check(&format!("{UPSTREAM}[token]\nbody = \"ignore\"\n"));
    assert_eq!((code, found.len(), found[0]["severity"].as_str()), (Some(0), 1, Some("warning")));
    let (code, found) =
        check(&format!("{UPSTREAM}[token]\nbody = \"ignore\"\nmethod_override = \"judge\"\nforward = 1\n"));
    let keys: Vec<_> = found
        .iter()
        .map(|found| (found["line"].as_u64(), found["column"].as_u64(), found["key"].as_str().unwrap()))
        .collect();
    assert_eq!(
        (code, keys),
        (
            Some(USAGE),
            vec![
                (Some(5), Some(8), "token.body"),
                (Some(6), Some(19), "token.method_override"),
                (Some(7), Some(11), "token.forward")
            ]
        )
    );
    assert_eq!(found[1]["related"], serde_json::json!({ "file": found[1]["file"], "line": 5, "column": 8 }));
    let fields: Vec<_> = found[2].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(fields, ["file", "line", "column", "key", "severity", "message", "found", "instead", "related"]);
}

#[test]
fn a_reload_reports_every_problem_with_its_place_and_changes_nothing() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "[pagination]\nmax_per_page = 100\n");
    let config = gateway.folder.0.join("tollgate.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let broken = text.replace("max_per_page = 100", "max_per_page = 5").replace("access.log", "nowhere/access.log");
    let long = format!("servers = [\"unix:/{}\", \"", "x".repeat(120));
    let broken = broken.replace("servers = [\"", &long);
    assert_ne!(broken, text);
    std::fs::write(&config, broken).unwrap();
    let reloaded = run(tollgate().args(["reload", "--config"]).arg(&config));
    let said = all(&reloaded);
    assert_eq!(reloaded.status.code(), Some(1), "{said}");
    for part in ["log.access: ", "upstream[0].servers: is the path of a socket", "pagination.max_per_page: is less"] {
        let line = said.lines().find(|line| line.contains(part)).unwrap_or_else(|| panic!("{part}: {said}"));
        assert!(line.contains("tollgate.toml:"), "{line}");
    }
    let mut client = Client::connect(gateway.admin);
    client.send_head("POST /reload HTTP/1.1\nHost: localhost\nAccept: application/json\n\n");
    let body: serde_json::Value = serde_json::from_slice(&client.answer().body).unwrap();
    assert_eq!(body["errors"].as_array().map(Vec::len), Some(3), "{body}");
    // The same lines as `check`.
    let checked = run(tollgate().args(["check", "--config"]).arg(&config));
    for error in body["errors"].as_array().unwrap() {
        assert!(stderr(&checked).lines().any(|line| line == error), "{error}: {}", stderr(&checked));
    }
    assert_eq!(gateway.get("/api/v3/projects?per_page=90").status, 200);
    assert_eq!(upstream.only().target, "/api/v3/projects?per_page=90", "a reload that failed is in force");
}

#[test]
fn run_says_what_it_serves() {
    let upstream = Upstream::start();
    let open = "[[route]]\npath = \"/api/v3/session\"\nmethods = [\"POST\"]\nauth = \"none\"\nreason = \"log in\"\n[api]\ncors_preflight = true\n";
    let gateway = Gateway::start(upstream.address, open);
    // Another thread writes it, perhaps after the gateway is ready.
    eventually("the last line", || gateway.process_log().contains("] paths without a token: "));
    let log = gateway.process_log();
    for line in [
        format!(
            "] tollgate {}, configuration {}",
            env!("CARGO_PKG_VERSION"),
            gateway.folder.0.join("tollgate.toml").display()
        ),
        format!("] listeners: {}; admin listener: {}\n", gateway.address, gateway.admin),
        format!("] upstreams: api ({})\n", upstream.address),
        "] token stores: file\n".to_owned(),
        "] paths without a token: /api/v3/session (POST), every path (CORS preflights)\n".to_owned(),
    ] {
        assert!(log.contains(&line), "{line}: {log}");
    }
}

#[test]
fn the_example_is_generated_and_right() {
    let output = run(tollgate().arg("example-config"));
    assert_eq!(output.status.code(), Some(0));
    let example = stdout(&output);
    let checked = check(&example);
    assert_eq!(checked.status.code(), Some(0), "{}", all(&checked));
    for section in ["[server]", "[admin]", "[[upstream]]", "[token]", "[[store]]", "[cache]", "[log]"] {
        assert!(example.lines().any(|line| line == section), "{section}");
    }
    for (options, kept) in [
        (&[][..], "config/tollgate.example.toml"),
        (&["--schema"], "config/tollgate.schema.json"),
        (&["--markdown"], "docs/configuration.md"),
    ] {
        let output = run(tollgate().arg("example-config").args(options));
        let text = std::fs::read_to_string(repository(kept)).unwrap();
        assert!(text == stdout(&output), "{kept} is not what the code says: run `make example`");
    }
}

// ---- token ----

#[test]
fn create_prints_a_token_once_and_it_works() {
    for place in Place::both() {
        let upstream = Upstream::start();
        let output = place.token("create", &["--user", "alice", "--scope", "api", "--description", "for tests"]);
        assert_eq!(output.status.code(), Some(0), "{}", all(&output));
        let token = stdout(&output).trim_end().to_owned();
        assert!(token.starts_with("tg-") && token.len() == 41 && !token.contains(char::is_whitespace), "{token}");
        // The token is the only output, for scripts, and is not stored anywhere.
        assert!(!stderr(&output).contains(&token));
        let id = sha256_hex(&token)[..12].to_owned();
        assert!(stderr(&output).contains(&id), "{}", stderr(&output));
        for entry in std::fs::read_dir(&place.folder.0).unwrap() {
            let path = entry.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            assert!(find(&bytes, token.as_bytes()).is_none(), "the token rests in {}", path.display());
        }
        for (command, arguments) in [("list", &[][..]), ("show", &[id.as_str()][..])] {
            for arguments in [arguments.to_vec(), [arguments, &["--json"]].concat()] {
                let text = place.ok(command, &arguments);
                assert!(text.contains(&id) && text.contains("alice") && !text.contains(&token), "{text}");
            }
        }
        let created = place.json("create", &["--user", "bob", "--expires", "90days"]);
        let second = created["token"].as_str().unwrap().to_owned();
        assert_eq!((created["user"].as_str(), created["id"].as_str()), (Some("bob"), Some(&sha256_hex(&second)[..12])));
        assert!(created["expires"].as_str().is_some_and(|time| time.ends_with('Z')), "{created}");

        let gateway = Gateway::start(upstream.address, &place.section());
        for good in [&token, &second] {
            let answer = gateway.ask(&format!("GET /api/v3/user HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {good}\n\n"));
            assert_eq!(answer.status, 200, "{}", place.kind);
        }
    }
}

#[test]
fn list_and_show_tell_all_but_the_token() {
    for place in Place::both() {
        assert_eq!(place.json("list", &[]), serde_json::json!([]));
        let created = place.json(
            "create",
            &["--user", "alice", "--scope", "api", "--scope", "read_user", "--description", "a\u{1b}[2J\nb"],
        );
        let token = created["token"].as_str().unwrap();
        let listed = place.json("list", &[]);
        assert_eq!(listed.as_array().unwrap().len(), 1);
        for shown in [listed[0].clone(), place.json("show", &[created["id"].as_str().unwrap()])] {
            assert_eq!(shown["sha256"].as_str(), Some(sha256_hex(token).as_str()), "{}", place.kind);
            assert_eq!(shown["scopes"], serde_json::json!(["api", "read_user"]));
            assert_eq!((shown["revoked"].is_null(), shown["token"].is_null()), (true, true));
        }
        // By the token itself, which must not be on a command line.
        let output = place.with_input("show", &["-", "--json"], &format!("{token}\n"));
        let shown: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
        assert_eq!(shown["id"], created["id"]);
        // Contents of the store cannot control the terminal.
        for text in [place.ok("list", &[]), place.ok("show", &[created["id"].as_str().unwrap()])] {
            assert!(!text.contains('\u{1b}') && text.contains("active"), "{text:?}");
        }
        for (id, why) in [("abcdef012345", "no such token"), ("abc", "6 to 64"), ("nothexnothex", "6 to 64")] {
            let output = place.token("show", &[id]);
            assert_eq!(output.status.code(), Some(1), "{id}");
            assert!(stderr(&output).contains(why), "{}", stderr(&output));
        }
        // A token that was given instead of the id must not be in the error message.
        let output = place.token("show", &[token]);
        assert_eq!(output.status.code(), Some(1));
        assert!(!all(&output).contains(token), "{}", all(&output));
    }
}

#[test]
fn revoke_ends_a_token_and_says_when_it_was_ended_before() {
    for place in Place::both() {
        let upstream = Upstream::start();
        let created = place.json("create", &["--user", "alice"]);
        let (token, id) = (created["token"].as_str().unwrap(), created["id"].as_str().unwrap());
        let keep = place.json("create", &["--user", "bob"])["token"].as_str().unwrap().to_owned();
        let said = place.ok("revoke", &[id]);
        assert!(said.contains("is revoked") && said.contains(id) && !said.contains(token), "{said}");
        assert!(place.ok("revoke", &[id]).contains("was revoked before"));
        assert!(place.json("revoke", &[id])["revoked"].is_string());
        assert!(place.ok("list", &[]).lines().any(|line| line.contains(id) && line.contains("revoked")));
        let by_token = place.json("create", &["--user", "carol"])["token"].as_str().unwrap().to_owned();
        assert_eq!(place.with_input("revoke", &["-"], &by_token).status.code(), Some(0));
        assert_eq!(place.token("revoke", &["abcdef012345"]).status.code(), Some(1));
        let gateway = Gateway::start(upstream.address, &place.section());
        for (token, wanted) in [(token, 401), (by_token.as_str(), 401), (keep.as_str(), 200)] {
            let answer = gateway.ask(&format!("GET /api/v3/user HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {token}\n\n"));
            assert_eq!(answer.status, wanted, "{}", place.kind);
        }
    }
}

#[test]
fn import_takes_a_hundred_thousand_lines_in_less_than_ten_seconds() {
    let lines: String = (0..100_000).map(|n| format!("{{\"token\":\"import-{n:06}\",\"user\":\"u{n}\"}}\n")).collect();
    let folder = Folder::new("test");
    let file = folder.write("many.jsonl", &lines);
    let file = file.to_str().unwrap();
    // The fastest of three, to exclude other load on the machine.
    let mut times = Vec::new();
    let place = loop {
        let place = Place::new("sqlite");
        let started = Instant::now();
        let said = place.json("import", &[file]);
        times.push(started.elapsed());
        let counts = ["read", "imported", "known"].map(|key| said[key].as_u64().unwrap());
        assert_eq!(counts, [100_000, 100_000, 0]);
        if times.len() == 3 || times.iter().any(|time| *time < Duration::from_secs(10)) {
            break place;
        }
    };
    println!("100,000 lines in {times:?}");
    assert!(times.iter().any(|time| *time < Duration::from_secs(10)), "{times:?}");
    // The second time nothing is new.
    let again = place.ok("import", &[file]);
    assert!(again.contains("0 tokens imported, 100000 known before"), "{again}");
    let shown = place.json("show", &[&sha256_hex("import-054321")]);
    assert_eq!(shown["user"].as_str(), Some("u54321"));
}

#[test]
fn import_reads_tokens_digests_and_standard_input() {
    for place in Place::both() {
        let lines = format!(
            "{{\"token\":\"plain-one\",\"user\":\"a\",\"scopes\":[\"api\"],\"description\":\"d\"}}\n\n\
             {{\"sha256\":\"{}\",\"user\":\"b\",\"expires\":\"2099-01-01T00:00:00Z\"}}\n",
            sha256_hex("plain-two")
        );
        let output = place.with_input("import", &["-"], &lines);
        assert_eq!(output.status.code(), Some(0), "{}", all(&output));
        assert!(stdout(&output).starts_with("2 tokens imported"), "{}", all(&output));
        for (token, user) in [("plain-one", "a"), ("plain-two", "b")] {
            assert_eq!(place.json("show", &[&sha256_hex(token)])["user"].as_str(), Some(user));
        }
    }
}

#[test]
fn a_bad_line_stops_the_import_and_nothing_is_imported_nor_quoted() {
    for place in Place::both() {
        place.json("create", &["--user", "before"]);
        for bad in [
            "S3CRET-token-on-its-own",
            "{\"token\":\"S3CRET x\",\"user\":\"u\"}",
            "{\"token\":\"S3CRET\"}",
            "{\"token\":\"S3CRET\",\"user\":\"u\",\"S3CRET\":1}",
            "{\"sha256\":\"S3CRET\",\"user\":\"u\"}",
            "{\"token\":\"S3CRET\",\"user\":\"u\",\"expires\":\"S3CRET\"}",
            "{\"token\":\"S3CRET\",\"user\":7}",
            "[\"S3CRET\",\"S3CRET\"]",
        ] {
            let lines = format!(
                "{{\"token\":\"first-S3CRET\",\"user\":\"u\"}}\n{bad}\n{{\"token\":\"last-S3CRET\",\"user\":\"u\"}}\n"
            );
            let output = place.with_input("import", &["-"], &lines);
            assert_eq!(output.status.code(), Some(1), "{bad}: {}", all(&output));
            assert!(stderr(&output).contains("line 2"), "{bad}: {}", all(&output));
            assert!(!all(&output).contains("S3CRET"), "{bad}: {}", all(&output));
            assert_eq!(place.json("list", &[]).as_array().unwrap().len(), 1, "{}: something was imported", place.kind);
        }
    }
    let place = Place::new("sqlite");
    assert_eq!(place.token("import", &["/nowhere/tokens.jsonl"]).status.code(), Some(1));
}

#[test]
fn a_store_of_ones_own_is_nobody_elses_to_read() {
    use std::os::unix::fs::PermissionsExt as _;
    for place in Place::both() {
        place.json("create", &["--user", "alice"]);
        for entry in std::fs::read_dir(&place.folder.0).unwrap() {
            let path = entry.unwrap().path();
            if path.file_name().unwrap().to_str().unwrap().starts_with("tokens") {
                let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
                assert_eq!(mode, 0o600, "{}", path.display());
            }
        }
    }
}

#[test]
fn usage_errors_exit_with_64_and_help_with_0() {
    let place = Place::new("sqlite");
    let config = place.folder.0.join("tollgate.toml");
    let config = config.to_str().unwrap();
    for arguments in [
        &[][..],
        &["nonsense"],
        &["run"],
        &["run", "--nonsense"],
        &["check"],
        &["demo", "--listen", "nowhere"],
        &["token"],
        &["token", "create", "--config", config],
        &["token", "create", "--config", config, "--user", "u", "--expires", "yesterday"],
        &["token", "create", "--config", config, "--user", "u", "--expires", "2001-01-01"],
        &["token", "create", "--config", config, "--user", "u", "--scope", "two words"],
        &["token", "show", "--config", config],
        &["token", "revoke", "--config", config],
        &["run", "--config", "/nowhere/tollgate.toml"],
        &["token", "list", "--config", "/nowhere/tollgate.toml"],
    ] {
        let output = run(tollgate().args(arguments));
        assert_eq!(output.status.code(), Some(USAGE), "{arguments:?}: {}", all(&output));
        assert!(!stderr(&output).is_empty() && stdout(&output).is_empty(), "{arguments:?}");
    }
    for arguments in [&["--help"][..], &["--version"], &["token", "--help"], &["run", "--help"]] {
        let output = run(tollgate().args(arguments));
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert!(!stdout(&output).is_empty());
    }
    assert_eq!(place.json("list", &[]), serde_json::json!([]), "a refused command made a token");
}

#[test]
fn who_stops_reading_ends_no_command_but_a_new_token_must_be_read() {
    // A pipe with a closed reader, as in `| head`.
    let closed = || {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        writer
    };
    let full = || std::fs::File::options().write(true).open("/dev/full").unwrap();
    for place in Place::both() {
        let id = place.json("create", &["--user", "u"])["id"].as_str().unwrap().to_owned();
        for (command, arguments) in [("list", &[][..]), ("show", &[&*id]), ("revoke", &[&*id])] {
            let output = run(place.command(&["token", command], arguments).stdout(closed()));
            assert_eq!((output.status.code(), &*stderr(&output)), (Some(0), ""), "{} {command}", place.kind);
        }
        assert!(place.ok("show", &[&id]).contains("revoked"), "{}", place.kind);
        let output = run(place.command(&["token", "list"], &[]).stdout(full()));
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains("standard output: No space left"), "{}", stderr(&output));
        for (command, arguments) in [
            (&["token", "list"][..], &["--json"][..]),
            (&["token", "show"], &[&*id]),
            (&["token", "prune"], &["--ended-before", "1s"]),
            (&["check"], &["--offline"]),
            (&["routes"], &[]),
        ] {
            let output = run(place.command(command, arguments).stdout(full()));
            assert_eq!(output.status.code(), Some(1), "{} {command:?}", place.kind);
            assert!(stderr(&output).contains("standard output: No space left"), "{command:?}: {}", stderr(&output));
        }
        for sink in [Stdio::from(closed()), full().into()] {
            let output = run(place.command(&["token", "create"], &["--user", "u"]).stdout(sink));
            assert_eq!(output.status.code(), Some(1));
            assert!(stderr(&output).contains("revoke it"), "{}", stderr(&output));
        }
    }
}

#[test]
fn a_port_that_is_taken_or_a_store_that_is_broken_ends_the_start_with_1_and_says_why() {
    let place = Place::new("file");
    place.folder.write("tokens.toml", "broken");
    let output = run(&mut place.command(&["run"], &[]));
    assert_eq!(output.status.code(), Some(1), "{}", all(&output));
    assert!(stderr(&output).contains("store"), "{}", all(&output));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let text =
        format!("[server]\nlisten = [\"{}\"]\n[admin]\nlisten = \"none\"\n{UPSTREAM}", taken.local_addr().unwrap());
    let folder = Folder::new("test");
    let config = folder.write("tollgate.toml", &text);
    let log = std::fs::File::create(folder.0.join("log")).unwrap();
    let mut child = tollgate().args(["run", "--config"]).arg(config).stdin(Stdio::null()).stderr(log).spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break Some(status),
            None if Instant::now() > deadline => break None,
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    drop(child.kill());
    drop(child.wait());
    let said = std::fs::read_to_string(folder.0.join("log")).unwrap();
    let status = status.unwrap_or_else(|| panic!("a gateway without its listener stays: {said}"));
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains(&taken.local_addr().unwrap().to_string()), "{said}");
}

// ---- demo ----

/// The demo, ended when it is dropped.
struct Demo(std::process::Child);

impl Drop for Demo {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn every_line_that_the_demo_prints_works_as_it_says() {
    let listen = format!("127.0.0.1:{}", free_port());
    let folder = Folder::new("test");
    let log = std::fs::File::create(folder.0.join("stderr")).unwrap();
    let mut command = tollgate();
    command.args(["demo", "--listen", &listen]).env("TMPDIR", &folder.0).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut demo = Demo(command.stderr(log).spawn().unwrap());
    // Until the last line: the pipe stays open until the demo ends.
    let mut printed = String::new();
    let mut out = BufReader::new(demo.0.stdout.take().unwrap());
    while !printed.lines().any(|line| line.contains("/metrics")) {
        assert!(out.read_line(&mut printed).unwrap() > 0, "the demo ended: {printed}");
    }
    let lines: Vec<&str> = printed.lines().map(str::trim).filter(|line| line.starts_with("curl ")).collect();
    assert_eq!(lines.len(), 6, "{printed}");
    eventually("the demo listens", || std::net::TcpStream::connect(&listen).is_ok());
    let answers: Vec<String> = lines
        .iter()
        .map(|line| {
            let output = run(Command::new("sh").args(["-c", line]));
            assert!(output.status.success(), "{line}: {}; {HINT}", stderr(&output));
            stdout(&output)
        })
        .collect();
    let token = printed.split(['\'', ' ', '?', '=']).find(|word| word.starts_with("tg-")).unwrap();
    for (answer, status) in answers.iter().zip(["200", "200", "401", "200", "201"]) {
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    }
    assert!(answers[0].contains("\"username\":\"demo\"") && answers[1].contains("\"id\":7"), "{answers:?}");
    assert!(answers[2].ends_with("{\"message\":\"401 Unauthorized\"}"), "{}", answers[2]);
    assert!(answers[3].contains("X-Per-Page: 100"), "the backend was asked for more: {}", answers[3]);
    assert!(answers[4].contains("\"title\":\"Hello\""), "{}", answers[4]);
    assert!(answers[5].contains("tollgate_pagination_clamps_total{parameter=\"per_page\"} 1"), "{}", answers[5]);
    assert!(answers.iter().all(|answer| !answer.contains(token)), "an answer holds the token");

    assert!(run(Command::new("kill").args(["-INT", &demo.0.id().to_string()])).status.success());
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = demo.0.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < deadline, "SIGINT does not end the demo");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(status.code(), Some(0));
    let said = std::fs::read_to_string(folder.0.join("stderr")).unwrap();
    assert!(!said.contains(token), "{said}");
    // Nothing is left, including the token store.
    let left: Vec<_> = std::fs::read_dir(&folder.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["stderr"]);
}

#[test]
fn a_demo_without_its_port_says_so_and_ends_with_1() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = run(tollgate().args(["demo", "--listen", &address]));
    assert_eq!(output.status.code(), Some(1), "{}", all(&output));
    assert!(stderr(&output).contains(&address) && stderr(&output).contains("--listen"), "{}", all(&output));
    assert!(!stdout(&output).contains("tg-"));
}

#[test]
fn a_certificate_of_ones_own_serves_its_names_and_replaces_nothing() {
    let folder = Folder::new("cert");
    let make = |names: &[&str]| {
        let mut command = tollgate();
        command.args(["cert", "self-signed", "--out"]).arg(&folder.0);
        command.args(names.iter().flat_map(|name| ["--name", name]));
        run(&mut command)
    };
    let made = make(&["api.test", "*.api.test", "127.0.0.1", "::1"]);
    assert!(made.status.success(), "{}", stderr(&made));
    let (pem, key) = (folder.0.join("api.test.pem"), folder.0.join("api.test.key"));
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&key).unwrap().permissions());
    assert_eq!((stdout(&made).lines().count(), mode & 0o777), (2, 0o600));
    let text = run(Command::new("openssl").args(["x509", "-noout", "-text", "-in"]).arg(&pem));
    let names = "DNS:api.test, DNS:*.api.test, IP Address:127.0.0.1, IP Address:0:0:0:0:0:0:0:1";
    assert!(stdout(&text).contains(names), "{}", stdout(&text));
    let before = std::fs::read(&key).unwrap();
    let again = make(&["api.test"]);
    assert!(again.status.code() == Some(1) && stderr(&again).contains("exists"), "{}", stderr(&again));
    assert_eq!(std::fs::read(&key).unwrap(), before);
    for name in ["a b", "", "../x", "a..b"] {
        assert_eq!(make(&[name]).status.code(), Some(64), "{name:?}");
    }
    // It is one that a listener takes.
    let config = folder.write(
        "c.toml",
        "[[listener]]\naddress = \"127.0.0.1:1\"\ncertificates = [{ chain = \"api.test.pem\", key = \"api.test.key\" }]\n\
         [[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n",
    );
    let checked = run(tollgate().args(["check", "--offline", "--config"]).arg(config));
    assert!(checked.status.success(), "{}", stderr(&checked));
}
