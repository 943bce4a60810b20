//! `admin.audit`: every change through the admin listener and by signals, who made it, and what came of it.

use crate::harness::*;
use crate::support::*;
use serde_json::{Value, json};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;

fn entries(gateway: &Gateway, file: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(gateway.folder.0.join(file)).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

/// The next entry, without its time.
struct Told<'g>(&'g Gateway, usize);

impl Told<'_> {
    fn next(&mut self) -> Value {
        eventually("an entry", || entries(self.0, "audit.log").len() > self.1);
        let mut entry = entries(self.0, "audit.log").remove(self.1);
        self.1 += 1;
        let time = entry.as_object_mut().unwrap().remove("time").unwrap();
        assert!(humantime::parse_rfc3339(time.as_str().unwrap()).is_ok(), "{time}");
        entry
    }
}

fn audited(upstream: &Upstream, more: &str) -> Gateway {
    let gateway = Gateway::start(upstream.address, more);
    gateway.rewrite(|text| text.replace("[admin]\n", "[admin]\naudit = \"audit.log\"\n"));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    gateway
}

#[test]
fn every_change_is_written_down_with_who_made_it() {
    let upstream = Upstream::start();
    let mut gateway = audited(&upstream, "");
    let mut told = Told(&gateway, 0);
    let by = |action: &str, result: &str, rest: Value| {
        let mut entry = json!({"source": "admin", "client": "127.0.0.1", "action": action, "result": result});
        entry.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        entry
    };
    // The reload that switched it on.
    assert_eq!(told.next(), by("reload", "ok", json!({"applied": ["admin.audit"], "restart_needed": []})));
    // The cache.
    assert_eq!(status(&gateway, GOOD), 200);
    let id = &sha256_hex(GOOD)[..12];
    gateway.admin_post(&format!("/cache/forget?sha256={}", sha256_hex(GOOD)));
    assert_eq!(told.next(), by("cache_forget", "ok", json!({"token": id, "removed": 1})));
    gateway.admin_post(&format!("/cache/forget?sha256={id}"));
    assert_eq!(told.next(), by("cache_forget", "unchanged", json!({"token": id, "removed": 0})));
    gateway.admin_post("/cache/forget");
    assert_eq!(told.next(), by("cache_forget", "ok", json!({"tokens": "all"})));
    assert_eq!(gateway.admin_post(&format!("/cache/forget?token={GOOD}")).status, 400);
    assert_eq!(told.next(), by("cache_forget", "refused", json!({})));
    // Servers.
    let server = upstream.address.to_string();
    let place = format!("/upstreams/api/servers/{server}");
    let known = json!({"upstream": "api", "server": server, "in_flight": 0});
    for (word, result) in [("drain", "ok"), ("drain", "unchanged"), ("undrain", "ok")] {
        assert_eq!(gateway.admin_post(&format!("{place}/{word}")).status, 200);
        assert_eq!(told.next(), by(word, result, known.clone()));
    }
    assert_eq!(gateway.admin_post(&format!("/upstreams/{GOOD}/servers/x/drain")).status, 404);
    assert_eq!(told.next(), by("drain", "refused", json!({})));
    // What changes nothing is no change.
    gateway.admin_get("/status").unwrap();
    gateway.admin_get("/reload").unwrap();
    // Signals and reloads, key by key.
    gateway.signal("USR1");
    let signal = |name: &str, action: &str, rest: Value| {
        let mut entry = json!({"source": "signal", "signal": name, "action": action, "result": "ok"});
        entry.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        entry
    };
    assert_eq!(told.next(), signal("SIGUSR1", "reopen_logs", json!({})));
    gateway.rewrite(|text| text.replace("threads = 1", "threads = 2") + "[pagination]\nmax_per_page = 50\n");
    gateway.signal("HUP");
    let keys = json!({"applied": ["pagination.max_per_page"], "restart_needed": ["server.threads"]});
    assert_eq!(told.next(), signal("SIGHUP", "reload", keys));
    gateway.rewrite(|text| text.replace("max_per_page = 50", "max_per_page = \"many\""));
    assert_eq!(gateway.admin_post("/reload").status, 500);
    let failed = told.next();
    assert_eq!((failed["action"].as_str(), failed["result"].as_str()), (Some("reload"), Some("failed")));
    assert!(failed["errors"][0].as_str().unwrap().contains("pagination.max_per_page"), "{failed}");
    let count = told.1;
    gateway.signal("TERM");
    assert_eq!(gateway.ended().code(), Some(0));
    let all = entries(&gateway, "audit.log");
    assert_eq!(
        (all.len(), all[count]["action"].as_str(), all[count]["signal"].as_str()),
        (count + 2, Some("stop"), Some("SIGTERM"))
    );
    let last = all[count + 1].as_object().unwrap();
    assert_eq!((&last["source"], &last["action"]), (&json!("process"), &json!("stopped")));
    assert_eq!((&last["result"], &last["aborted"]), (&json!("ok"), &json!(0)));
    let text = std::fs::read_to_string(gateway.folder.0.join("audit.log")).unwrap();
    assert!(!text.contains(GOOD), "a token is in the audit log");
}

#[test]
fn over_a_unix_socket_the_kernel_says_who_it_is() {
    let upstream = Upstream::start();
    let gateway = audited(&upstream, "");
    drop(gateway.admin_get("/readyz"));
    // The listener of a second gateway, with a socket.
    let folder = crate::servers::Folder::new("audit");
    let socket = folder.0.join("admin.sock");
    let more = format!(
        "[admin]\nlisten = \"unix:{}\"\naudit = \"{}\"\n",
        socket.display(),
        folder.0.join("audit.log").display()
    );
    let own = std::fs::read_to_string(gateway.folder.0.join("tollgate.toml")).unwrap();
    let port = free_port();
    let text = own.replace(&gateway.address.to_string(), &format!("127.0.0.1:{port}"));
    let (before, rest) = text.split_once("[admin]\n").unwrap();
    let after = &rest[rest.find("\n[").unwrap() + 1..];
    let config = gateway.folder.write("unix.toml", &format!("{before}{more}{after}"));
    let mut second =
        tollgate().args(["run", "--config"]).arg(&config).stderr(std::process::Stdio::null()).spawn().unwrap();
    eventually("it listens", || UnixStream::connect(&socket).is_ok());
    let mut client = UnixStream::connect(&socket).unwrap();
    client.write_all(b"POST /cache/forget HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let entry = || {
        let text = std::fs::read_to_string(folder.0.join("audit.log")).unwrap_or_default();
        let all: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert!(all.first().is_none_or(|first| first["action"] == "start" && first["source"] == "process"), "{all:?}");
        all.get(1).cloned()
    };
    eventually("the entry", || entry().is_some());
    drop(second.kill());
    drop(second.wait());
    let (entry, uid) = (entry().unwrap(), std::fs::metadata(&folder.0).unwrap().uid());
    assert_eq!((&entry["client_uid"], &entry["client_pid"]), (&uid.into(), &std::process::id().into()));
    assert_eq!((entry["source"].as_str(), entry["action"].as_str()), (Some("admin"), Some("cache_forget")));
}

#[test]
fn who_switches_it_off_stands_in_it_and_its_file_is_rotated() {
    let upstream = Upstream::start();
    let gateway = audited(&upstream, "");
    let mut told = Told(&gateway, 0);
    assert_eq!(told.next()["applied"], json!(["admin.audit"]));
    let (log, moved) = (gateway.folder.0.join("audit.log"), gateway.folder.0.join("audit.log.1"));
    std::fs::rename(&log, &moved).unwrap();
    gateway.signal("USR1");
    eventually("a new file", || log.exists());
    let mut told = Told(&gateway, 0);
    assert_eq!(told.next()["action"], "reopen_logs");
    gateway.rewrite(|text| text.replace("audit = \"audit.log\"\n", ""));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    assert_eq!(told.next()["applied"], json!(["admin.audit"]));
    gateway.admin_post("/cache/forget");
    std::thread::sleep(SECOND / 10);
    assert_eq!(entries(&gateway, "audit.log").len(), 2, "it is off");
    assert_eq!(gateway.metric("tollgate_log_lines_dropped_total{log=\"audit\"}"), 0.0);
    // A place that cannot be written is found before anything changes.
    gateway.rewrite(|text| text.replace("[admin]\n", "[admin]\naudit = \"no/such/folder/audit.log\"\n"));
    let answer = gateway.admin_post("/reload");
    assert!(answer.status == 500 && answer.text().contains("admin.audit"), "{}", answer.text());
}
