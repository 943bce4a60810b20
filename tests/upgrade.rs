//! Another binary in place of the running one, while clients go on; and sockets that systemd opened.

use crate::harness::*;
use crate::support::*;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A process that no test is the parent of. It ends with this.
struct Orphan(u32);

impl Orphan {
    fn is_alive(&self) -> bool {
        is_alive(self.0)
    }

    fn signal(&self, name: &str) {
        let _ = Command::new("kill").args([format!("-{name}"), self.0.to_string()]).stderr(Stdio::null()).status();
    }
}

/// A zombie has ended: whoever collects orphans here may take its time.
fn is_alive(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !status.is_empty() && !status.contains(") Z ")
}

impl Drop for Orphan {
    fn drop(&mut self) {
        self.signal("KILL");
    }
}

/// What the admin listener says of an upgrade, as JSON.
fn upgrade(gateway: &Gateway) -> serde_json::Value {
    let mut client = Client::connect(gateway.admin);
    client.socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    client.send_head("POST /upgrade HTTP/1.1\nHost: localhost\nAccept: application/json\nContent-Length: 0\n\n");
    serde_json::from_slice(&client.answer().body).unwrap()
}

/// The process that serves after an upgrade, which must succeed.
fn upgraded(gateway: &Gateway) -> Orphan {
    let answer = upgrade(gateway);
    assert_eq!(answer["result"], "upgraded", "{answer}\n{}", gateway.process_log());
    Orphan(answer["pid"].as_u64().unwrap().try_into().unwrap())
}

/// The command line's words and exit code.
fn command(gateway: &Gateway) -> (Option<i32>, String) {
    let output = tollgate().args(["upgrade", "--admin", &gateway.admin.to_string()]).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

/// The gateway from a copy of the binary, which a test can replace.
fn from_a_copy(folder: &Folder) -> (PathBuf, Command) {
    let copy = folder.0.join("tollgate-copy");
    std::fs::copy(tollgate().get_program(), &copy).unwrap();
    let program = Command::new(&copy);
    (copy, program)
}

/// Puts an executable script in the place of a binary, as a package manager does.
fn replace(binary: &std::path::Path, script: &str) {
    use std::os::unix::fs::PermissionsExt as _;
    let next = binary.with_extension("next");
    std::fs::write(&next, script).unwrap();
    std::fs::set_permissions(&next, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::rename(&next, binary).unwrap();
}

/// Asks again and again, and counts what was not answered right. A connection whose last answer announced its end is replaced.
fn ask_until(done: &AtomicBool, kept: bool, address: std::net::SocketAddr) -> (usize, Vec<String>) {
    let (mut asked, mut failed, mut open) = (0, Vec::new(), None);
    // A test that fails must not keep its clients.
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done.load(Ordering::Relaxed) && Instant::now() < deadline {
        let mut client = open.take().unwrap_or_else(|| Client::connect(address));
        asked += 1;
        let head = get(GOOD, "/api/v3/user").replace('\n', "\r\n");
        let sent = client.socket.write_all(head.as_bytes());
        match sent.ok().and_then(|()| client.try_answer()) {
            Some(answer) if answer.status == 200 && !answer.cut => {
                if kept && answer.header("connection") != Some("close") {
                    open = Some(client);
                }
            }
            other => failed.push(format!("request {asked}: {other:?}")),
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    (asked, failed)
}

#[test]
fn clients_notice_nothing_of_upgrades() {
    let (upstream, latch) = Upstream::holding(|seen| seen.target.ends_with("slow"), "{\"ok\":true}");
    let mut gateway = Gateway::start(upstream.address, "");
    let mut slow = gateway.client();
    slow.send_head(&get(GOOD, "/api/v3/slow"));
    eventually("the slow request is at the upstream", || upstream.seen().len() == 1);

    let (done, address) = (AtomicBool::new(false), gateway.address);
    let (asked, last) = std::thread::scope(|scope| {
        let load: Vec<_> = [true, true, true, false, false]
            .map(|kept| {
                scope.spawn({
                    let done = &done;
                    move || ask_until(done, kept, address)
                })
            })
            .into();
        let mut processes: Vec<Orphan> = Vec::new();
        for _ in 0..3 {
            // In the middle of the load, not beside it.
            let seen = upstream.seen().len();
            eventually("requests arrive", || upstream.seen().len() >= seen + 50);
            processes.push(upgraded(&gateway));
        }
        let seen = upstream.seen().len();
        eventually("requests arrive after the last upgrade", || upstream.seen().len() >= seen + 50);
        done.store(true, Ordering::Relaxed);
        let (asked, failed): (Vec<_>, Vec<_>) = load.into_iter().map(|thread| thread.join().unwrap()).unzip();
        assert_eq!(failed.concat(), Vec::<String>::new());
        let last = processes.pop().unwrap();
        for process in processes {
            eventually("a process in between ends when it has no connection", || !process.is_alive());
        }
        (asked.iter().sum::<usize>(), last)
    });
    assert!(asked > 200, "{asked}");
    // The first process still has a request.
    assert!(is_alive(gateway.pid()), "it ended with a request in flight");
    latch.open();
    assert_eq!(slow.answer().text(), "{\"ok\":true}");
    assert_eq!(gateway.ended().code(), Some(0), "{}", gateway.process_log());
    assert_eq!(gateway.get("/api/v3/user").status, 200, "the last process serves");
    last.signal("TERM");
    eventually("the last process ends", || !last.is_alive());
    let log = gateway.process_log();
    assert!(!log.contains("ERROR") && !log.contains("WARN"), "{log}");
}

#[test]
fn an_upgrade_that_fails_changes_nothing_and_says_why() {
    let upstream = Upstream::start();
    let folder = Folder::new("upgrade");
    let (copy, program) = from_a_copy(&folder);
    let mut gateway = Gateway::start_program(program, upstream.address, "");
    let refused = |gateway: &mut Gateway, why: &str| {
        let (code, said) = command(gateway);
        assert!(code == Some(1) && said.contains("nothing changed") && said.contains(why), "{code:?} {said}");
        assert_eq!(gateway.client_asks(), 200, "the old process serves");
        assert!(gateway.process_log().contains("not upgraded, this process goes on"));
    };
    let whole = std::fs::read_to_string(gateway.folder.0.join("tollgate.toml")).unwrap();
    gateway.rewrite(|text| text.replace("[server]", "[sever]"));
    refused(&mut gateway, "sever");
    // A store that does not answer: the running process has a cache of tokens, and its successor would have none.
    let dead = free_port();
    gateway.rewrite(|_| {
        whole.replace(
            "kind = \"file\"\npath = \"tokens.toml\"",
            &format!("kind = \"redis\"\nurl = \"redis://127.0.0.1:{dead}\""),
        )
    });
    refused(&mut gateway, "cannot be used now");
    gateway.rewrite(|_| {
        whole.replace(
            "kind = \"file\"\npath = \"tokens.toml\"",
            &format!("kind = \"introspection\"\nendpoint = \"http://127.0.0.1:{dead}/user\""),
        )
    });
    refused(&mut gateway, "cannot be used now");
    gateway.rewrite(|_| whole.clone());
    replace(&copy, "#!/bin/sh\nexit 3\n");
    refused(&mut gateway, "exit status: 3");
    replace(&copy, "#!/bin/sh\nkill -9 $$\n");
    refused(&mut gateway, "signal: 9");
    // One that knows nothing of upgrades, and keeps its standard input.
    replace(&copy, "#!/bin/sh\nsleep 0.2\nexit 0\n");
    refused(&mut gateway, "exit status: 0");
    std::fs::remove_file(&copy).unwrap();
    refused(&mut gateway, "cannot be started");
    // And then it works.
    std::fs::copy(tollgate().get_program(), &copy).unwrap();
    let (code, said) = command(&gateway);
    assert_eq!(code, Some(0), "{said}");
    let next = Orphan(said.split(' ').nth(2).unwrap().parse().unwrap());
    assert_eq!(gateway.ended().code(), Some(0));
    assert_eq!(gateway.client_asks(), 200);
    assert!(next.is_alive());
}

#[test]
fn an_upgrade_takes_the_configuration_and_the_listeners_as_they_are_then() {
    let upstream = Upstream::start();
    let folder = Folder::new("upgrade-sockets");
    let (kept, gone) = (folder.0.join("kept.sock"), folder.0.join("gone.sock"));
    let more = format!(
        "[server]\nlisten = [\"@LISTEN@\", \"unix:{}\", \"unix:{}\"]\nthreads = 1\n",
        kept.display(),
        gone.display()
    );
    let mut gateway = Gateway::start(upstream.address, &more);
    let added = free_port();
    let instead = format!("\"127.0.0.1:{added}\"");
    gateway.rewrite(|text| {
        text.replace(&format!("\"unix:{}\"", gone.display()), &instead).replace("threads = 1", "threads = 2")
    });
    let next = upgraded(&gateway);
    assert_eq!(gateway.ended().code(), Some(0), "{}", gateway.process_log());
    assert_eq!(unix_status(&kept), "HTTP/1.1 200");
    assert!(Client::try_connect(([127, 0, 0, 1], added).into()).is_some(), "the new listener");
    eventually("the socket file of the one that is gone is removed", || UnixStream::connect(&gone).is_err());
    // threads = 2 needs a restart, and this is one.
    let workers = std::fs::read_dir(format!("/proc/{}/task", next.0)).unwrap().flatten();
    let names = workers.map(|task| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default());
    assert_eq!(names.filter(|name| name.starts_with("worker-")).count(), 2);
    next.signal("TERM");
    eventually("it ends", || !next.is_alive());
    assert!(!kept.exists(), "its socket file is removed by the last process");
}

#[test]
fn sigusr2_upgrades_and_the_service_manager_follows() {
    let upstream = Upstream::start();
    let folder = Folder::new("upgrade-notify");
    let path = folder.0.join("notify.sock");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let next = || {
        let mut buffer = [0; 1024];
        let length = socket.recv(&mut buffer).unwrap();
        std::str::from_utf8(&buffer[..length]).unwrap().to_owned()
    };
    let mut gateway = Gateway::start_with(upstream.address, "", |command| {
        command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "200000").env_remove("WATCHDOG_PID");
    });
    gateway.rewrite(|text| text.replace("[admin]\n", "[admin]\naudit = \"audit.log\"\n"));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    gateway.signal("USR2");
    let mut seen = Vec::new();
    let pid = loop {
        let message = next();
        if let Some(pid) = message.strip_prefix("MAINPID=") {
            break pid.parse().unwrap();
        }
        seen.push(message);
    };
    let process = Orphan(pid);
    let expected =
        |message: &String| ["READY=1", "RELOADING=1", "WATCHDOG=1"].iter().any(|word| message.starts_with(word));
    assert!(seen.iter().all(expected), "{seen:?}");
    assert_eq!(gateway.ended().code(), Some(0));
    // The old process says nothing of its end, which would be taken for the service's; the new one feeds the watchdog.
    for _ in 0..5 {
        let message = next();
        assert!(message == "WATCHDOG=1" || message.starts_with("READY=1"), "{message}");
    }
    let audit = std::fs::read_to_string(gateway.folder.0.join("audit.log")).unwrap();
    let line = audit.lines().find(|line| line.contains("\"upgrade\"")).unwrap();
    assert!(line.contains("SIGUSR2") && line.contains(&format!("\"pid\":{pid}")), "{line}");
    drop(process);
}

/// The status line of a request over a unix socket.
fn unix_status(path: &std::path::Path) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(get(GOOD, "/api/v3/user").replace('\n', "\r\n").as_bytes()).unwrap();
    let mut start = [0; 12];
    stream.read_exact(&mut start).unwrap();
    String::from_utf8_lossy(&start).into_owned()
}

/// A gateway that Debian's systemd-socket-activate starts when the first connection arrives.
struct Activated(std::process::Child);

impl Activated {
    fn start(sockets: &[String], config: &std::path::Path) -> Self {
        let mut command = Command::new("systemd-socket-activate");
        for socket in sockets {
            command.args(["-l", socket]);
        }
        let log = std::fs::File::create(config.with_extension("log")).unwrap();
        command.arg(tollgate().get_program()).args(["run", "--config"]).arg(config);
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap())
    }
}

impl Drop for Activated {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn sockets_of_systemd_are_used_and_stay() {
    let upstream = Upstream::start();
    let folder = Folder::new("activated");
    let (port, admin, other) = (free_port(), free_port(), free_port());
    let path = folder.0.join("api.sock");
    folder.write("tokens.toml", &format!("[[token]]\nsha256 = \"{}\"\nuser = \"u\"\n", sha256_hex(GOOD)));
    let text = format!(
        "[server]\nlisten = [\"127.0.0.1:{port}\", \"unix:{}\"]\nthreads = 1\n[admin]\nlisten = \"127.0.0.1:{admin}\"\n\
         [store]\nkind = \"file\"\npath = \"tokens.toml\"\n[log]\naccess = \"off\"\n\
         [[upstream]]\nname = \"api\"\nservers = [\"{}\"]\n",
        path.display(),
        upstream.address
    );
    let config = folder.write("tollgate.toml", &text);
    let sockets = [format!("127.0.0.1:{port}"), path.display().to_string()];
    let mut gateway = Activated::start(&sockets, &config);
    // The file is there a moment before somebody listens.
    eventually("systemd listens", || UnixStream::connect(&path).is_ok());
    // It waits in systemd's queue while the gateway starts.
    assert_eq!(unix_status(&path), "HTTP/1.1 200");
    let ask = || {
        let mut client = Client::connect(([127, 0, 0, 1], port).into());
        client.send_head(&get(GOOD, "/api/v3/user"));
        client.answer().status
    };
    assert_eq!(ask(), 200);
    let admin_says = |request: &str| {
        let mut client = Client::connect(([127, 0, 0, 1], admin).into());
        client.send_head(&format!("POST {request} HTTP/1.1\nHost: localhost\nContent-Length: 0\n\n"));
        client.answer()
    };
    // A listener that a reload closes may come back: systemd holds its socket.
    let unix = format!(", \"unix:{}\"", path.display());
    std::fs::write(&config, text.replace(&unix, "")).unwrap();
    assert_eq!(admin_says("/reload").status, 200);
    std::fs::write(&config, &text).unwrap();
    let back = admin_says("/reload");
    assert_eq!(back.status, 200, "{}", back.text());
    assert_eq!(unix_status(&path), "HTTP/1.1 200");
    // An upgrade passes them on, and says that they are systemd's.
    let upgraded = admin_says("/upgrade");
    assert_eq!(upgraded.status, 200, "{}", upgraded.text());
    let next = Orphan(upgraded.text().split(' ').nth(2).unwrap().parse().unwrap());
    eventually("the first process ends", || gateway.0.try_wait().unwrap().is_some());
    assert_eq!((ask(), unix_status(&path).as_str()), (200, "HTTP/1.1 200"));
    next.signal("TERM");
    eventually("it ends", || !next.is_alive());
    assert!(path.exists(), "the file is systemd's");

    // A socket that no listener has: connections would wait for ever.
    std::fs::remove_file(&path).unwrap();
    let mut gateway = Activated::start(&[sockets.as_slice(), &[format!("127.0.0.1:{other}")]].concat(), &config);
    eventually("systemd listens", || UnixStream::connect(&path).is_ok());
    eventually("the gateway does not start", || gateway.0.try_wait().unwrap().is_some());
    let log = std::fs::read_to_string(config.with_extension("log")).unwrap();
    assert!(log.contains(&format!("127.0.0.1:{other}")) && log.contains("LISTEN_FDS"), "{log}");
}

#[test]
fn whoever_sets_the_variable_without_the_socket_gets_an_error() {
    let output = tollgate()
        .args(["run", "--config", "config/minimal.toml"])
        .env("TOLLGATE_UPGRADE", "1")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("TOLLGATE_UPGRADE"), "{said}");
}

trait Asks {
    fn client_asks(&self) -> u16;
}

impl Asks for Gateway {
    /// The status of a good request on a new connection.
    fn client_asks(&self) -> u16 {
        self.ask(&get(GOOD, "/api/v3/user")).status
    }
}
