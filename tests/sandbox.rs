//! `[server] sandbox`: the kernel holds the process to the files that its configuration names. What is inside works as without,
//! what is outside is refused to each of its threads, and a reload or an upgrade that needs more says so.

use crate::harness::*;
use crate::servers::tls::Authority;
use crate::stores;
use crate::support::*;
use landlock::{ABI, Access as _, AccessFs, PathBeneath, PathFd, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// The section of the harness, with the sandbox.
fn section(mode: &str) -> String {
    format!("[server]\nlisten = [\"@LISTEN@\"]\nthreads = 1\nsandbox = \"{mode}\"\n")
}

fn status_of(gateway: &Gateway) -> serde_json::Value {
    serde_json::from_str(&gateway.admin_get("/status").unwrap().text()).unwrap()
}

fn no_new_privileges(task: &Path) -> bool {
    std::fs::read_to_string(task.join("status")).unwrap().lines().any(|line| line == "NoNewPrivs:\t1")
}

/// Puts a link that leads outside in a file's place, as an attacker within the process could not do better.
fn lead_outside(path: &Path, outside: &Folder) {
    let target = outside.file(path.file_name().unwrap().to_str().unwrap());
    std::fs::rename(path, &target).unwrap();
    symlink(&target, path).unwrap();
}

/// The same is done without the sandbox, where all of it works: what is refused is refused by the sandbox.
#[test]
fn no_thread_opens_what_lies_outside() {
    let authority = Authority::new();
    for mode in ["off", "on"] {
        let held = mode == "on";
        let (upstream, outside, port) = (Upstream::start(), Folder::new("outside"), free_port());
        let folder = Folder::new("certificates");
        let pair = (folder.file("a.pem"), folder.file("a.key"));
        let put = |from: &(PathBuf, PathBuf)| {
            std::fs::copy(&from.0, &pair.0).unwrap();
            std::fs::copy(&from.1, &pair.1).unwrap();
        };
        put(&authority.issue_named("old", "DNS:a.test", 2));
        let certificates = format!("{{ chain = \"{}\", key = \"{}\" }}", pair.0.display(), pair.1.display());
        let listener = format!("[[listener]]\naddress = \"127.0.0.1:{port}\"\ncertificates = [{certificates}]\n");
        let gateway = Gateway::start(upstream.address, &format!("{}{listener}", section(mode)));
        assert_eq!(status(&gateway, GOOD), 200);

        // What the kernel needs for it is inherited by threads from the one that starts them, and only by these.
        let tasks: Vec<_> = std::fs::read_dir(format!("/proc/{}/task", gateway.pid())).unwrap().flatten().collect();
        assert!(tasks.len() >= 6, "{} threads", tasks.len());
        assert_eq!(
            tasks.iter().filter(|task| no_new_privileges(&task.path())).count(),
            if held { tasks.len() } else { 0 }
        );
        assert_eq!(status_of(&gateway)["sandbox"], mode);
        assert_eq!(gateway.metric("tollgate_sandboxed"), f64::from(u8::from(held)));

        // The thread of a store.
        let tokens = gateway.folder.file("tokens.toml");
        lead_outside(&tokens, &outside);
        let entry = format!("[[token]]\nsha256 = \"{}\"\nuser = \"new\"\n", sha256_hex(BAD));
        std::fs::write(outside.file("tokens.toml"), &entry).unwrap();
        if held {
            eventually("the store cannot read it", || gateway.process_log().contains("Permission denied"));
            assert_eq!(
                (status(&gateway, GOOD), status(&gateway, BAD)),
                (200, 401),
                "what it read before stays in force"
            );
        } else {
            eventually("the store reads it", || status(&gateway, BAD) == 200);
        }
        // That of a log, when it is reopened.
        let log = gateway.folder.file("access.log");
        lead_outside(&log, &outside);
        std::fs::remove_file(outside.file("access.log")).unwrap();
        gateway.signal("USR1");
        let said = if held { "access log not reopened" } else { "access log reopened" };
        eventually(said, || gateway.process_log().contains(said));
        assert_eq!(outside.file("access.log").exists(), !held);
        // That which looks after certificates.
        put(&authority.issue_named("new", "DNS:a.test", 2));
        lead_outside(&pair.0, &outside);
        lead_outside(&pair.1, &outside);
        let said = if held { "certificates not reloaded" } else { "certificates reloaded" };
        eventually(said, || gateway.process_log().contains(said));
        // And that of a reload.
        let config = gateway.folder.file("tollgate.toml");
        lead_outside(&config, &outside);
        let answer = gateway.admin_post("/reload");
        assert_eq!(answer.status == 200, !held, "{}", answer.text());
        assert_eq!(answer.text().contains("restart tollgate"), held, "{}", answer.text());
    }
}

#[test]
fn every_store_serves_in_the_sandbox_and_hears_of_revocations() {
    let mut seen = Vec::new();
    for start in stores::all() {
        let mut store = start();
        let token = format!("sandboxed-token-of-{}", store.name());
        store.add(std::slice::from_ref(&token));
        let upstream = Upstream::start();
        let gateway = Gateway::start(upstream.address, &format!("{}{}", section("on"), store.section()));
        assert_eq!(status(&gateway, &token), 200, "{}: {}", store.name(), gateway.process_log());
        if store.hears() {
            let series = "tollgate_store_subscribed{";
            eventually("it follows the store", || {
                gateway.metrics().lines().any(|line| line.starts_with(series) && line.ends_with(" 1"))
            });
            store.revoke(&token);
            eventually("the revocation takes effect", || status(&gateway, &token) == 401);
        }
        let log = gateway.process_log();
        assert!(!log.contains("Permission denied"), "{}: {log}", store.name());
        seen.push(store.name());
    }
    assert!(seen.len() >= 6, "{seen:?}");
}

/// Each of these names a file in a folder that the process was not allowed.
#[test]
fn a_reload_that_needs_more_says_so_and_changes_nothing() {
    let (upstream, outside) = (Upstream::start(), Folder::new("outside"));
    let authority = Authority::new();
    let pair = authority.issue_named("new", "DNS:a.test", 2);
    outside.write("value", "1s\n");
    outside.write("more.toml", "[limits]\nidle_timeout = \"3s\"\n");
    outside.write("tokens.toml", "token = []\n");
    let at = |name: &str| outside.file(name).display().to_string();
    let gateway = Gateway::start(upstream.address, &section("on"));
    let whole = std::fs::read_to_string(gateway.folder.file("tollgate.toml")).unwrap();
    let listener = |more: &str| format!("{whole}[[listener]]\n{more}\n");
    let cases = [
        (whole.replace("\"access.log\"", &format!("\"{}\"", at("access.log"))), "log.access", at("access.log")),
        (whole.replace("\"tokens.toml\"", &format!("\"{}\"", at("tokens.toml"))), "path", at("tokens.toml")),
        (
            whole.replace("sandbox =", &format!("drain_delay = \"${{file:{}}}\"\nsandbox =", at("value"))),
            "server.drain_delay",
            at("value"),
        ),
        (format!("include = [\"{}\"]\n{whole}", at("more.toml")), "include", at("more.toml")),
        (
            format!("include = [\"{}/*.toml\"]\n{whole}", outside.0.display()),
            "include",
            outside.0.display().to_string(),
        ),
        (listener(&format!("address = \"unix:{}\"", at("api.sock"))), "listener[0].address", at("api.sock")),
        (
            listener(&format!(
                "address = \"127.0.0.1:{}\"\ncertificates = [{{ chain = \"{}\", key = \"{}\" }}]",
                free_port(),
                pair.0.display(),
                pair.1.display()
            )),
            "listener[0].certificates",
            pair.0.display().to_string(),
        ),
        (format!("{whole}[cache]\nsnapshot = \"{}\"\n", at("cache")), "cache.snapshot", at("cache")),
        (
            whole.replace("[[upstream]]", &format!("[[upstream]]\ntls = true\ntls_ca = \"{}\"", pair.0.display())),
            "upstream[0].tls_ca",
            pair.0.display().to_string(),
        ),
    ];
    assert_eq!(cases.len(), 9);
    for (text, key, path) in &cases {
        assert_ne!(text, &whole, "{key}");
        // With what could be applied, which must not be.
        std::fs::write(gateway.folder.file("tollgate.toml"), format!("{text}[api]\nprefixes = [\"/changed\"]\n"))
            .unwrap();
        let answer = gateway.admin_post("/reload");
        let said = answer.text();
        let parts = ["outside of the sandbox", key, path, "restart tollgate"];
        let is_named = said.lines().any(|line| parts.iter().all(|part| line.contains(part)));
        assert_eq!(answer.status, 500, "{key}: {said}");
        assert!(is_named, "{key}: {said}");
        assert!(!said.contains("Permission denied"), "{key}: an echo: {said}");
        assert_eq!(status(&gateway, GOOD), 200, "{key}: it was applied by halves");
    }
    // What is inside is taken, and so are files that are new there.
    gateway.folder.write("value", "1s\n");
    gateway.folder.write("more.toml", "[limits]\nidle_timeout = \"3s\"\n");
    let inside =
        whole.replace("sandbox =", "drain_delay = \"${file:value}\"\nsandbox =").replace("access.log", "other.log");
    std::fs::write(gateway.folder.file("tollgate.toml"), format!("include = [\"*.d.toml\", \"more.toml\"]\n{inside}"))
        .unwrap();
    let answer = gateway.admin_post("/reload");
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(
        answer.text().contains("server.drain_delay") && gateway.folder.file("other.log").exists(),
        "{}",
        answer.text()
    );
    std::fs::write(gateway.folder.file("tollgate.toml"), inside.replace("\"on\"", "\"off\"")).unwrap();
    let answer = gateway.admin_post("/reload");
    assert!(answer.status == 200 && answer.text().contains("server.sandbox"), "{}", answer.text());
    assert_eq!(status_of(&gateway)["sandbox"], "on", "nothing leaves it");
}

/// A gateway without a store has a database beside its configuration, which this one may not write to.
#[test]
fn what_stands_in_for_a_mistake_is_not_said_to_need_a_restart() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, &format!("{}[log]\naccess = \"stdout\"\n", section("on")));
    let whole = std::fs::read_to_string(gateway.folder.file("tollgate.toml")).unwrap();
    gateway.rewrite(|text| text.replace("[store]", "[stor]"));
    let said = gateway.admin_post("/reload").text();
    assert!(said.contains("did you mean `store`") && !said.contains("sandbox"), "{said}");
    // Where it is meant, it is.
    let none = whole.replace("[store]\nkind = \"file\"\npath = \"tokens.toml\"\n", "");
    assert_ne!(none, whole);
    std::fs::write(gateway.folder.file("tollgate.toml"), none).unwrap();
    let said = gateway.admin_post("/reload").text();
    assert!(said.contains("store[0].path") && said.contains("restart tollgate"), "{said}");
}

/// As Kubernetes mounts a ConfigMap or a Secret: each file is a link into `..data`, which is a link to a folder of this version.
#[test]
fn a_mounted_folder_that_is_replaced_is_read_by_a_reload() {
    let upstream = Upstream::start();
    let mount = Folder::new("mount");
    let publish = |version: &str, prefix: &str| {
        std::fs::create_dir(mount.file(version)).unwrap();
        std::fs::write(mount.file(version).join("prefix"), format!("{prefix}\n")).unwrap();
        symlink(version, mount.file("next")).unwrap();
        std::fs::rename(mount.file("next"), mount.file("..data")).unwrap();
    };
    publish("..1", "/api/v3");
    symlink("..data/prefix", mount.file("prefix")).unwrap();
    let more = format!("[api]\nprefixes = [\"${{file:{}}}\"]\n", mount.file("prefix").display());
    let gateway = Gateway::start(upstream.address, &format!("{}{more}", section("on")));
    assert_eq!(status(&gateway, GOOD), 200);
    publish("..2", "/other");
    std::fs::remove_dir_all(mount.file("..1")).unwrap();
    let answer = gateway.admin_post("/reload");
    assert_eq!((answer.status, status(&gateway, GOOD)), (200, 404), "{}", answer.text());
    assert_eq!(gateway.get("/other/user").status, 200);
}

/// A process that no test is the parent of.
struct Successor(u32);

impl Drop for Successor {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-KILL", &self.0.to_string()]).stderr(Stdio::null()).status();
    }
}

/// The kernel nests 16: what is started then is in that of the process before it.
#[test]
fn upgrades_go_on_when_the_kernel_nests_no_more() {
    let (upstream, outside) = (Upstream::start(), Folder::new("outside"));
    let gateway = Gateway::start(upstream.address, &section("on"));
    // Of the process that was replaced last, which may still take a connection, the answer is that it ends.
    let ask = || {
        loop {
            let Some(mut client) = Client::try_connect(gateway.admin) else { continue };
            client.socket.set_read_timeout(Some(6 * PATIENCE)).unwrap();
            client
                .send_head("POST /upgrade HTTP/1.1\nHost: localhost\nAccept: application/json\nContent-Length: 0\n\n");
            let Some(answer) = client.try_answer() else { continue };
            let answer = serde_json::from_slice::<serde_json::Value>(&answer.body).unwrap();
            if !answer.to_string().contains("this process is ending") {
                return answer;
            }
        }
    };
    let mut last = None;
    let upgrade = |last: &mut Option<Successor>| {
        let answer = ask();
        assert_eq!(answer["result"], "upgraded", "{answer}\n{}", gateway.process_log());
        *last = Some(Successor(answer["pid"].as_u64().unwrap().try_into().unwrap()));
    };
    let warnings = || gateway.process_log().lines().filter(|line| line.contains("nests no more")).count();
    let whole = std::fs::read_to_string(gateway.folder.file("tollgate.toml")).unwrap();
    let needs_more = || {
        gateway
            .rewrite(|text| text.replace("\"access.log\"", &format!("\"{}\"", outside.file("access.log").display())));
        let answer = ask();
        let said = answer.to_string();
        assert_eq!(answer["result"], "failed", "{said}");
        assert!(said.contains("log.access") && said.contains("restart tollgate"), "{said}");
        std::fs::write(gateway.folder.file("tollgate.toml"), &whole).unwrap();
        assert_eq!(status(&gateway, GOOD), 200, "the old process serves");
    };
    for _ in 1..16 {
        upgrade(&mut last);
    }
    assert_eq!(warnings(), 0, "{}", gateway.process_log());
    needs_more();
    for count in 1..=2 {
        upgrade(&mut last);
        assert_eq!(warnings(), count, "one for each process");
    }
    let pid = last.as_ref().unwrap().0;
    assert_eq!((status(&gateway, GOOD), status_of(&gateway)["sandbox"].as_str()), (200, Some("on")));
    assert!(no_new_privileges(Path::new(&format!("/proc/{pid}"))));
    // It knows what it is held to, and is held to it.
    needs_more();
    let tokens = gateway.folder.file("tokens.toml");
    lead_outside(&tokens, &outside);
    std::fs::write(outside.file("tokens.toml"), "").unwrap();
    eventually("the store cannot read it", || gateway.process_log().contains("Permission denied"));
    assert_eq!(status(&gateway, GOOD), 200);
}

/// Runs with a configuration that needs nothing but its folder, to the end or until it serves.
fn started(mode: &str, before: impl FnOnce(&mut Command) -> &mut Command) -> (Folder, Command) {
    let folder = Folder::new("test");
    let text = format!(
        "[server]\nlisten = [\"127.0.0.1:{}\"]\nsandbox = \"{mode}\"\n[admin]\nlisten = \"none\"\n\
         [[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n",
        free_port()
    );
    let config = folder.write("tollgate.toml", &text);
    let mut command = tollgate();
    before(&mut command).args(["run", "--config"]).arg(config).stdin(Stdio::null()).stdout(Stdio::null());
    (folder, command)
}

/// A kernel whose Landlock is switched off, or a container runtime that refuses it: what `python3` lets the kernel answer to the
/// system call that begins it.
fn without_landlock(answer: &str, command: &Command) -> Command {
    let script = "
import ctypes, os, struct, sys
answer = {'ENOSYS': 38, 'EOPNOTSUPP': 95, 'EPERM': 1}[sys.argv[1]]
code = [(0x20, 0, 0, 0), (0x15, 0, 1, 444), (0x06, 0, 0, 0x50000 | answer), (0x06, 0, 0, 0x7fff0000)]
program = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *step) for step in code))
class Program(ctypes.Structure):
    _fields_ = [('len', ctypes.c_ushort), ('filter', ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(len(code), ctypes.addressof(program)))) == 0, ctypes.get_errno()
os.execv(sys.argv[2], sys.argv[2:])
";
    let mut python = Command::new("python3");
    python.args(["-c", script, answer]).arg(command.get_program()).args(command.get_args()).stdin(Stdio::null());
    python
}

/// Ends it as soon as it has said something about the sandbox.
fn said_of_the_sandbox(command: &mut Command) -> (Option<i32>, String) {
    use std::io::{BufRead as _, BufReader};
    let mut child =
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap_or_else(|error| panic!("{error}; {HINT}"));
    let lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut said = String::new();
    for line in lines.map_while(Result::ok) {
        said = format!("{said}{line}\n");
        // Served, or not.
        if line.contains("paths without a token") {
            let _ = child.kill();
        }
    }
    (child.wait().unwrap().code(), said)
}

#[test]
fn without_landlock_on_does_not_start_and_try_does() {
    for answer in ["ENOSYS", "EOPNOTSUPP", "EPERM"] {
        let (_folder, command) = started("on", |command| command);
        let (code, said) = said_of_the_sandbox(&mut without_landlock(answer, &command));
        assert_eq!(code, Some(1), "{answer}: {said}");
        assert!(
            said.contains("server.sandbox") && said.contains("Landlock") && said.contains("\"try\""),
            "{answer}: {said}"
        );
        let (_folder, command) = started("try", |command| command);
        let (code, said) = said_of_the_sandbox(&mut without_landlock(answer, &command));
        assert_eq!(code, None, "{answer}: it serves, and was ended: {said}");
        let warnings: Vec<_> = said.lines().filter(|line| line.contains("WARN")).collect();
        assert!(warnings.len() == 1 && warnings[0].contains("sandbox"), "{answer}: {said}");
    }
}

/// Started where 16 are nested already, as deep within containers: there is no sandbox of its own, and none that it knows.
#[test]
fn where_others_have_nested_16_on_does_not_start() {
    let run = |mode: &str| {
        let (_folder, mut command) = started(mode, |command| command);
        // Landlock holds for the thread that enters, and for the processes that it starts.
        std::thread::spawn(move || {
            for _ in 0..16 {
                let all = AccessFs::from_all(ABI::V1);
                let ruleset = Ruleset::default().handle_access(all).unwrap().create().unwrap();
                let rule = PathBeneath::new(PathFd::new("/").unwrap(), all);
                ruleset.add_rule(rule).unwrap().restrict_self().unwrap();
            }
            said_of_the_sandbox(&mut command)
        })
        .join()
        .unwrap()
    };
    let (code, said) = run("on");
    assert!(code == Some(1) && said.contains("server.sandbox"), "{code:?} {said}");
    let (code, said) = run("try");
    assert!(code.is_none() && said.contains("WARN") && said.contains("sandbox: there is none"), "{code:?} {said}");
}

/// Only a process that replaces another believes the variable.
#[test]
fn nobody_else_says_what_a_process_is_held_to() {
    let (_folder, mut command) = started("off", |command| command.env("TOLLGATE_SANDBOX", "nonsense"));
    let (code, said) = said_of_the_sandbox(&mut command);
    assert!(code.is_none() && !said.contains("sandbox"), "{said}");
}

fn check(folder: &Folder, more: &[&str]) -> Output {
    run(tollgate().arg("check").args(more).arg("--offline").arg(folder.file("tollgate.toml")))
}

#[test]
fn check_lists_what_is_allowed() {
    let (folder, _) = started("on", |command| command);
    folder.write("tokens.toml", "token = []\n");
    let text = std::fs::read_to_string(folder.file("tollgate.toml")).unwrap();
    folder.write(
        "tollgate.toml",
        &format!("{text}[store]\nkind = \"file\"\npath = \"tokens.toml\"\n[log]\naccess = \"access.log\"\n"),
    );
    let output = check(&folder, &[]);
    let said = stdout(&output);
    let own = std::fs::canonicalize(&folder.0).unwrap().display().to_string();
    for (access, why) in [("read", "the configuration"), ("write", "log.access")] {
        let line =
            said.lines().find(|line| line.contains(&format!("{own}  ")) && line.trim_start().starts_with(access));
        assert!(line.is_some_and(|line| line.contains(why)), "{access}: {said}");
    }
    assert!(said.contains("tollgate upgrade") && said.contains("names of servers"), "{said}");
    let json: Vec<serde_json::Value> =
        stdout(&check(&folder, &["--json"])).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let rules = json.last().unwrap()["sandbox"].as_array().unwrap();
    assert_eq!(rules.len(), said.lines().skip_while(|line| !line.starts_with("the sandbox allows")).count() - 1);
    assert!(rules.iter().any(|rule| rule["access"] == "write" && rule["path"] == own.as_str()), "{rules:?}");
    // Without it, there is nothing to say.
    folder.write("tollgate.toml", &text.replace("\"on\"", "\"off\""));
    assert!(
        !stdout(&check(&folder, &[])).contains("sandbox") && !stdout(&check(&folder, &["--json"])).contains("sandbox")
    );
}

/// What opens a file while a gateway runs has to be among its needs: `src/config/needs.rs`. A file of the source that begins to
/// is added here by who has looked.
#[test]
fn who_opens_files_is_known() {
    const OPENING: [&str; 12] = [
        "File::open",
        "File::create",
        "OpenOptions",
        "fs::read",
        "fs::write",
        "fs::create",
        "read_dir",
        "Listener::bind(path",
        "NamedTempFile",
        "tempfile::Builder",
        "Command::new",
        "open_with_flags",
    ];
    let root = repository("src");
    let mut files = Vec::new();
    let mut folders = vec![root.clone()];
    let mut read = 0;
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            let name = path.strip_prefix(&root).unwrap().display().to_string();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            read += 1;
            // The command line runs in no sandbox.
            if name.starts_with("cli/") || name.ends_with("tests.rs") {
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
            if OPENING.iter().any(|word| code.contains(word)) {
                files.push(name);
            }
        }
    }
    files.sort();
    assert!(read > 200, "only {read} files were read");
    assert_eq!(
        files,
        [
            "config/text_file.rs",
            "edge/listening.rs",
            "edge/upgrade.rs",
            "identity/cache_file.rs",
            "sandbox.rs",
            "store/file/admin.rs",
            "store/file/mod.rs",
            "store/mod.rs",
            "store/sqlite/look.rs",
            "store/sqlite/mod.rs",
            "telemetry/datagrams.rs",
            "telemetry/lines.rs",
            "telemetry/process_metrics.rs",
            "telemetry/spans.rs",
            "tls.rs",
        ]
    );
}
