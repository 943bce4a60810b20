//! The logs when their reader is blocked, when the disk is full, when files are rotated, and during outages: requests never
//! wait, and every line is complete or counted as lost.

use crate::harness::*;
use crate::servers::Folder;
use crate::support::*;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A full pipe, so that the next write blocks. Nothing is read from the returned reader.
fn full_pipe() -> (std::io::PipeReader, std::io::PipeWriter) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    // The default capacity of a pipe on Linux.
    writer.write_all(&[b'\n'; 64 * 1024]).unwrap();
    (reader, writer)
}

fn lost(gateway: &Gateway, log: &str) -> f64 {
    gateway.metric(&format!("tollgate_log_lines_dropped_total{{log=\"{log}\"}}"))
}

/// Many concurrent clients, each on its own connection. Returns the time of the slowest response.
fn load(gateway: &Gateway, clients: usize, each: usize, request: impl Fn(usize) -> (String, u16) + Sync) -> Duration {
    let request = &request;
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..clients)
            .map(|client| {
                scope.spawn(move || {
                    let (mut connection, mut slowest) = (gateway.client(), Duration::ZERO);
                    for index in 0..each {
                        let (head, status) = request(client * each + index);
                        let sent = Instant::now();
                        connection.send_head(&head);
                        let answer = connection.answer();
                        assert_eq!(answer.status, status, "{head}");
                        slowest = slowest.max(sent.elapsed());
                        if answer.header("Connection") == Some("close") {
                            connection = gateway.client();
                        }
                    }
                    slowest
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).max().unwrap()
    })
}

/// The lines of the process log that contain all of these texts.
fn lines_with(gateway: &Gateway, words: &[&str]) -> Vec<String> {
    let log = gateway.process_log();
    log.lines().filter(|line| words.iter().all(|word| line.contains(word))).map(str::to_owned).collect()
}

fn config(gateway: &Gateway) -> std::path::PathBuf {
    gateway.folder.0.join("tollgate.toml")
}

// ---- Blocked readers ----

#[test]
fn blocked_stderr_and_stdout_do_not_stop_the_gateway() {
    // Nothing listens there: every exchange fails.
    let upstream = format!("127.0.0.1:{}", free_port()).parse().unwrap();
    let (_errors, stderr) = full_pipe();
    let (_lines, stdout) = full_pipe();
    let mut gateway = Gateway::start_with(upstream, "[log]\naccess = \"stdout\"\n", |command| {
        command.stdout(stdout).stderr(stderr);
    });
    // More than the queue holds, and more failed exchanges than once stopped the gateway.
    let slowest = load(&gateway, 8, 1_500, |index| match index % 4 {
        0 => (get(GOOD, "/api/v3/user"), 502),
        _ => (get(BAD, "/api/v3/user"), 401),
    });
    assert!(slowest < 3 * SECOND, "a request waited {slowest:?} for a log");
    let access = lost(&gateway, "access");
    assert!((1_000.0..12_000.0).contains(&access), "{access} of 12000 lines were lost");
    // Signals and admin requests work as well.
    for signal in ["USR1", "HUP"] {
        gateway.signal(signal);
    }
    assert_eq!(gateway.admin_post("/reload").status, 200);
    assert_eq!(gateway.admin_post("/cache/forget").status, 200);
    assert_eq!(gateway.admin_get("/readyz").unwrap().status, 200);
    let asked = Instant::now();
    gateway.signal("TERM");
    assert_eq!(gateway.ended().code(), Some(0));
    assert!(asked.elapsed() < 6 * SECOND, "took {:?} to stop", asked.elapsed());
}

#[test]
fn a_reader_that_continues_gets_whole_lines_and_the_number_of_missing_ones() {
    use std::io::Read as _;
    let upstream = Upstream::start();
    let (mut reader, stdout) = full_pipe();
    let gateway = Gateway::start_with(upstream.address, "[log]\naccess = \"stdout\"\n", |command| {
        command.stdout(stdout);
    });
    load(&gateway, 4, 3_000, |_| (get(BAD, "/api/v3/user"), 401));
    let missing = lost(&gateway, "access");
    assert!(missing > 0.0);
    let text = Arc::new(std::sync::Mutex::new(Vec::new()));
    let read = Arc::clone(&text);
    std::thread::spawn(move || {
        let mut piece = [0; 64 * 1024];
        while let Ok(n @ 1..) = reader.read(&mut piece) {
            read.lock().unwrap().extend_from_slice(&piece[..n]);
        }
    });
    let whole = || String::from_utf8(text.lock().unwrap().clone()).unwrap().lines().filter(|l| !l.is_empty()).count();
    eventually("queued lines are written", || whole() as f64 + lost(&gateway, "access") >= 12_000.0);
    assert_eq!(whole() as f64 + lost(&gateway, "access"), 12_000.0);
    let text = String::from_utf8(text.lock().unwrap().clone()).unwrap();
    for line in text.lines().filter(|line| !line.is_empty()) {
        serde_json::from_str::<serde_json::Value>(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    }
    eventually("the loss is logged", || !lines_with(&gateway, &["access log lost", "too slow"]).is_empty());
}

// ---- Full disks ----

#[test]
fn a_full_device_loses_every_line_of_both_logs_and_counts_them() {
    let upstream = Upstream::start();
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut gateway = Gateway::start_with(upstream.address, "[log]\naccess = \"/dev/full\"\n", |command| {
        command.stderr(full());
    });
    load(&gateway, 8, 100, |_| (get(GOOD, "/api/v3/user"), 200));
    eventually("every line is counted", || lost(&gateway, "access") >= 800.0);
    assert_eq!(lost(&gateway, "access"), 800.0);
    assert!(lost(&gateway, "process") >= 1.0, "{}", lost(&gateway, "process"));
    gateway.signal("TERM");
    assert_eq!(gateway.ended().code(), Some(0));
}

#[test]
fn a_full_disk_has_whole_lines_and_writing_continues_when_there_is_space() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let limit = |bytes: &str| {
        let pid = gateway.pid().to_string();
        let output = run(Command::new("prlimit").args(["--pid", &pid, &format!("--fsize={bytes}:unlimited")]));
        assert!(output.status.success(), "{}", stderr(&output));
    };
    // Within a line, as on a full disk.
    limit("20011");
    load(&gateway, 8, 50, |_| (get(GOOD, "/api/v3/user"), 200));
    let path = gateway.folder.0.join("access.log");
    let text = || std::fs::read_to_string(&path).unwrap();
    let kept = || text().lines().count() as f64;
    eventually("every line is written or counted", || kept() + lost(&gateway, "access") >= 400.0);
    assert_eq!(kept() + lost(&gateway, "access"), 400.0);
    assert!(kept() > 10.0 && lost(&gateway, "access") > 100.0, "{} kept", kept());
    assert!(text().ends_with('\n') && text().len() <= 20_011, "the last line is incomplete");
    gateway.access_log();
    eventually("it is logged once", || lines_with(&gateway, &["access log cannot be written"]).len() == 1);
    // Space is freed.
    limit("unlimited");
    let before = kept();
    load(&gateway, 1, 10, |_| (get(GOOD, "/api/v3/user"), 200));
    eventually("lines are written again", || kept() == before + 10.0);
    gateway.access_log();
    let lost_lines = format!("{} lines were lost", lost(&gateway, "access"));
    eventually("the end is logged", || lines_with(&gateway, &["access log is written again", &lost_lines]).len() == 1);
}

#[test]
fn an_incomplete_line_of_a_killed_process_is_not_joined_with_the_next() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    status(&gateway, GOOD);
    eventually("one line", || gateway.access_log().len() == 1);
    let path = gateway.folder.0.join("access.log");
    std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"time\":\"20").unwrap();
    gateway.signal("USR1");
    eventually("reopened", || gateway.process_log().contains("reopened"));
    status(&gateway, GOOD);
    eventually("the next line is on its own", || {
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<_> = text.lines().collect();
        lines.len() == 3 && serde_json::from_str::<serde_json::Value>(lines[2]).is_ok()
    });
}

// ---- Outages ----

#[test]
fn a_store_outage_with_guessed_tokens_is_a_line_when_it_begins_and_one_when_it_ends() {
    let upstream = Upstream::start();
    let store = Store::with([(GOOD, "alice")]);
    let gateway = Gateway::start(upstream.address, &store.section());
    assert_eq!(status(&gateway, GOOD), 200);
    let away = store.path.with_extension("away");
    std::fs::rename(&store.path, &away).unwrap();
    eventually("the store is gone", || status(&gateway, BAD) == 503);
    load(&gateway, 8, 250, |index| (get(&format!("guess-{index:08}"), "/api/v3/user"), 503));
    let about = |gateway: &Gateway| lines_with(gateway, &["store sqlite", "lookup"]);
    eventually("the beginning is logged", || !about(&gateway).is_empty());
    assert_eq!(about(&gateway).len(), 1, "{}", gateway.process_log());
    let errors = gateway.metric("tollgate_store_errors_total{kind=\"unavailable\",store=\"sqlite\"}");
    assert!(errors >= 2_000.0, "{errors}");
    std::fs::rename(&away, &store.path).unwrap();
    eventually("the store is back", || status(&gateway, "another-guess") == 401);
    eventually("the end is logged", || about(&gateway).len() == 2);
    let end = about(&gateway).remove(1);
    let failed = end.split("answers again; ").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<f64>().ok());
    assert!(failed.is_some_and(|failed| failed >= errors), "{end}");
    assert!(!gateway.process_log().contains("guess-"), "a token is in the log");
}

#[test]
fn an_upstream_outage_is_a_line_when_it_begins_and_one_when_it_ends() {
    let broken = Arc::new(AtomicBool::new(true));
    let breaks = Arc::clone(&broken);
    let upstream = Upstream::answering(move |_| match breaks.load(Ordering::SeqCst) {
        true => Reply::raw("").then_close(),
        false => Reply::ok("{}"),
    });
    let gateway = Gateway::start(upstream.address, "");
    load(&gateway, 8, 50, |_| (get(GOOD, "/api/v3/user"), 502));
    // Lines about the one server stand beside those about the whole upstream.
    let about = |gateway: &Gateway| {
        let mut lines = lines_with(gateway, &["upstream api"]);
        lines.retain(|line| !line.contains(": server "));
        lines
    };
    eventually("the beginning is logged", || !about(&gateway).is_empty());
    assert_eq!(about(&gateway).len(), 1, "{}", gateway.process_log());
    let failed = gateway.metric("tollgate_upstream_errors_total{kind=\"closed\",upstream=\"api\"}");
    assert_eq!(failed, 400.0);
    broken.store(false, Ordering::SeqCst);
    load(&gateway, 2, 10, |_| (get(GOOD, "/api/v3/user"), 200));
    eventually("the end is logged", || about(&gateway).len() == 2);
    assert!(about(&gateway)[1].contains("400 requests failed"), "{}", gateway.process_log());
}

// ---- Times ----

#[test]
fn lines_have_a_time_unless_they_go_to_the_journal() {
    let upstream = Upstream::start();
    let timed = |line: &str| {
        let time = line.strip_prefix('[').and_then(|rest| rest.split(' ').next()).unwrap_or_default();
        time.len() == 24 && time.starts_with("20") && time.ends_with('Z') && time.contains('T')
    };
    let log = |variable: &dyn Fn(&std::fs::Metadata) -> Option<String>| {
        let gateway = Gateway::start_with(upstream.address, "", |command| {
            let path = std::path::Path::new(command.get_args().last().unwrap()).with_file_name("process.log");
            match variable(&std::fs::metadata(path).unwrap()) {
                Some(text) => command.env("JOURNAL_STREAM", text),
                None => command.env_remove("JOURNAL_STREAM"),
            };
        });
        eventually("a line", || gateway.process_log().contains("paths without a token"));
        gateway.process_log()
    };
    let plain = log(&|_| None);
    assert!(plain.lines().all(timed), "{plain}");
    let journal = log(&|meta| Some(format!("{}:{}", meta.dev(), meta.ino())));
    assert!(!journal.lines().any(timed), "{journal}");
    // Inherited from a process with another standard error.
    let other = log(&|meta| Some(format!("{}:{}", meta.dev(), meta.ino() + 1)));
    assert!(other.lines().all(timed), "{other}");
}

// ---- Rotated files ----

fn a_rotated_log_is_reopened(reopen: impl Fn(&Gateway)) {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let log = gateway.folder.0.join("access.log");
    // Like logrotate, several times, with requests all the time.
    let stop = AtomicBool::new(false);
    let (sent, rotations) = std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let (mut client, mut sent) = (gateway.client(), 0);
            while !stop.load(Ordering::SeqCst) {
                client.send_head(&get(GOOD, "/api/v3/user"));
                assert_eq!(client.answer().status, 200);
                sent += 1;
            }
            sent
        });
        let mut rotations = 0;
        for number in 1..=3 {
            eventually("lines in the file", || log.exists() && std::fs::metadata(&log).unwrap().len() > 0);
            std::fs::rename(&log, gateway.folder.0.join(format!("access.log.{number}"))).unwrap();
            reopen(&gateway);
            eventually("the file exists again", || log.exists());
            rotations += 1;
        }
        stop.store(true, Ordering::SeqCst);
        (worker.join().unwrap(), rotations)
    });
    let lines = || {
        let files = std::fs::read_dir(&gateway.folder.0).unwrap().flatten().map(|entry| entry.path());
        let logs: Vec<_> = files.filter(|path| path.to_string_lossy().contains("access.log")).collect();
        let text: String = logs.iter().map(|path| std::fs::read_to_string(path).unwrap()).collect();
        text.lines().for_each(|line| drop(serde_json::from_str::<serde_json::Value>(line).unwrap()));
        (logs.len(), text.lines().count())
    };
    eventually("every request is in one of the files", || lines().1 >= sent);
    assert_eq!((lines(), lost(&gateway, "access")), ((rotations + 1, sent), 0.0));
}

#[test]
fn sigusr1_reopens_the_log_and_nothing_else() {
    a_rotated_log_is_reopened(|gateway| gateway.signal("USR1"));
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let reloads = || gateway.metric("tollgate_config_reloads_total{result=\"ok\"}");
    let before = reloads();
    gateway.signal("USR1");
    eventually("reopened", || gateway.process_log().contains("reopened"));
    assert_eq!(reloads(), before, "SIGUSR1 reloads the configuration");
}

#[test]
fn sighup_reopens_the_log_even_if_the_reload_fails() {
    a_rotated_log_is_reopened(|gateway| gateway.signal("HUP"));
    for broken in
        ["[server", "[pagination]\nmax_per_pag = 1\n", "[[store]]\nkind = \"file\"\npath = \"nowhere.toml\"\n"]
    {
        a_rotated_log_is_reopened(|gateway| {
            std::fs::write(config(gateway), broken).unwrap();
            gateway.signal("HUP");
        });
    }
    a_rotated_log_is_reopened(|gateway| {
        std::fs::remove_file(config(gateway)).ok();
        gateway.signal("HUP");
    });
}

#[test]
fn a_log_that_cannot_be_reopened_stays_open_and_an_error_is_logged() {
    let upstream = Upstream::start();
    let folder = Folder::new("test");
    let logs = folder.0.join("logs");
    std::fs::create_dir(&logs).unwrap();
    let more = format!("[log]\naccess = \"{}\"\n", logs.join("access.log").display());
    let gateway = Gateway::start(upstream.address, &more);
    let moved = folder.0.join("moved");
    std::fs::rename(&logs, &moved).unwrap();
    gateway.signal("USR1");
    eventually("the error is logged", || !lines_with(&gateway, &["access log not reopened"]).is_empty());
    let answer = gateway.admin_post("/reload");
    assert!(answer.status == 500 && answer.text().contains("log.access"), "{}", answer.text());
    assert_eq!(status(&gateway, GOOD), 200);
    let lines = || std::fs::read_to_string(moved.join("access.log")).unwrap().lines().count();
    eventually("the line is in the file that was open", || lines() == 1);
    std::fs::create_dir(&logs).unwrap();
    assert_eq!(gateway.admin_post("/reload").status, 200);
    assert_eq!(status(&gateway, GOOD), 200);
    eventually("the new file has its line", || {
        std::fs::read_to_string(logs.join("access.log")).unwrap().lines().count() == 1
    });
}

#[test]
fn a_blocked_log_does_not_keep_a_reload_from_taking_effect() {
    let upstream = Upstream::start();
    let folder = Folder::new("test");
    let fifo = folder.0.join("fifo");
    assert!(run(Command::new("mkfifo").arg(&fifo)).status.success());
    // Nothing reads from it.
    let more = format!("[log]\naccess = \"{}\"\n[pagination]\nmax_per_page = 100\n", fifo.display());
    let gateway = Gateway::start(upstream.address, &more);
    load(&gateway, 4, 500, |_| (get(GOOD, "/api/v3/projects?per_page=1000"), 200));
    assert!(upstream.seen().iter().all(|seen| seen.target.ends_with("per_page=100")));
    let text = std::fs::read_to_string(config(&gateway)).unwrap();
    std::fs::write(config(&gateway), text.replace("max_per_page = 100", "max_per_page = 50")).unwrap();
    let answer = gateway.admin_post("/reload");
    assert_eq!(
        (answer.status, answer.text().as_str()),
        (200, "reloaded; changed and in force: pagination.max_per_page\n")
    );
    upstream.forget();
    assert_eq!(gateway.get("/api/v3/projects?per_page=1000").status, 200);
    assert_eq!(upstream.only().target, "/api/v3/projects?per_page=50");
    eventually("it is logged", || !lines_with(&gateway, &["access log is blocked"]).is_empty());
}

// ---- Syslog and the journal ----

fn received(socket: &UnixDatagram) -> Option<String> {
    let mut buffer = vec![0; 64 * 1024];
    socket.set_read_timeout(Some(5 * SECOND)).unwrap();
    socket.recv(&mut buffer).ok().map(|length| String::from_utf8(buffer[..length].to_vec()).unwrap())
}

/// The JSON object in what a socket got.
fn object(text: &str) -> serde_json::Value {
    let (start, end) = (text.find('{').unwrap(), text.rfind('}').unwrap());
    serde_json::from_str(&text[start..=end]).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn the_access_log_goes_to_a_syslog_socket_that_may_go_and_come_back() {
    let (upstream, folder) = (Upstream::start(), Folder::new("syslog"));
    let path = folder.0.join("log");
    let more = format!("[log]\naccess = \"syslog\"\nsyslog = \"unix:{}\"\n", path.display());
    // A gateway starts without it, and `check` says so.
    let gateway = Gateway::start(upstream.address, &more);
    let check = || {
        let path = config(&gateway);
        let output = run(tollgate().args(["check", "--offline", "--config"]).arg(path));
        assert!(output.status.success(), "{}", stderr(&output));
        stdout(&output) + &stderr(&output)
    };
    assert!(check().contains("log.syslog"), "{}", check());
    assert_eq!(status(&gateway, GOOD), 200);
    eventually("a line without a reader is counted", || lost(&gateway, "access") == 1.0);
    let socket = UnixDatagram::bind(&path).unwrap();
    std::thread::sleep(SECOND / 5);
    assert!(!check().contains("log.syslog"), "{}", check());
    assert_eq!(status(&gateway, BAD), 401);
    let text = received(&socket).unwrap();
    assert!(text.starts_with("<30>1 20"), "{text}");
    assert!(text.contains(&format!(" tollgate {} access - {{", gateway.pid())), "{text}");
    assert_eq!((object(&text)["status"].as_u64(), object(&text)["reason"].as_str()), (Some(401), Some("unknown")));
    // The daemon is restarted.
    drop(socket);
    std::fs::remove_file(&path).unwrap();
    assert_eq!(status(&gateway, GOOD), 200);
    eventually("a lost line is counted", || lost(&gateway, "access") == 2.0);
    let socket = UnixDatagram::bind(&path).unwrap();
    std::thread::sleep(SECOND / 5);
    assert_eq!(status(&gateway, GOOD), 200);
    assert_eq!(object(&received(&socket).unwrap())["status"], 200);
    eventually("it is said", || !lines_with(&gateway, &["access log is written again", "lines were lost"]).is_empty());
    // Nobody reads: requests do not wait, and a stop neither.
    let slowest = load(&gateway, 4, 500, |_| (get(GOOD, "/api/v3/user"), 200));
    assert!(slowest < 3 * SECOND, "{slowest:?}");
    let mut gateway = gateway;
    let asked = Instant::now();
    gateway.signal("TERM");
    assert_eq!(gateway.ended().code(), Some(0));
    assert!(asked.elapsed() < 6 * SECOND, "{:?}", asked.elapsed());
}

#[test]
fn a_reload_moves_the_access_log_to_the_journal() {
    let (upstream, folder) = (Upstream::start(), Folder::new("journal"));
    let path = folder.0.join("socket");
    let socket = UnixDatagram::bind(&path).unwrap();
    let gateway = Gateway::start(upstream.address, "");
    let journal = format!("access = \"journald\"\njournald = \"{}\"", path.display());
    gateway.rewrite(|text| text.replace("access = \"access.log\"", &journal));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    for _ in 0..20 {
        gateway.ask(&format!("GET /api/v3/user HTTP/1.1\nHost: t\nPRIVATE-TOKEN: {GOOD}\nX-Request-Id: j-1\n\n"));
    }
    gateway.ask(&format!("GET /api/v3/x?{} HTTP/1.1\nHost: t\n\n", "%22".repeat(1_500)));
    for _ in 0..20 {
        let text = received(&socket).unwrap();
        assert!(text.starts_with("MESSAGE={\"time\":"), "{text}");
        assert!(text.ends_with("}\nPRIORITY=6\nSYSLOG_FACILITY=3\nSYSLOG_IDENTIFIER=tollgate\nTOLLGATE_LOG=access\n"));
        assert_eq!((text.lines().count(), object(&text)["request_id"].as_str()), (5, Some("j-1")));
    }
    assert_eq!(object(&received(&socket).unwrap())["status"], 401);
    assert_eq!(lost(&gateway, "access"), 0.0);
}
