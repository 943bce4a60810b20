//! The admin listener: real health checks, access, reloads that report what is not in force, and metrics that are correct
//! immediately.

use crate::harness::*;
use crate::support::*;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// The response to a raw request, until the connection ends or the timeout.
fn raw(address: SocketAddr, bytes: &[u8]) -> String {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    drop(socket.read_to_end(&mut answer));
    String::from_utf8_lossy(&answer).into_owned()
}

fn admin(gateway: &Gateway, head: &str) -> Answer {
    let mut client = Client::connect(gateway.admin);
    client.send_head(head);
    client.answer()
}

/// `tollgate reload` with the gateway's configuration file.
fn reload(gateway: &Gateway, more: &[&str]) -> Output {
    run(tollgate().args(["reload", "--config"]).arg(gateway.folder.0.join("tollgate.toml")).args(more))
}

fn said(output: &Output) -> (Option<i32>, String) {
    (output.status.code(), stdout(output) + &stderr(output))
}

fn known(gateway: &Gateway) -> f64 {
    gateway.metric("tollgate_store_lookups_total{result=\"found\",store=\"file\"}")
}

// ---- Health checks ----

#[test]
fn health_checks_without_a_host_are_answered() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let mut seen = 0;
    for (request, status) in [
        // HAProxy's `option httpchk`, by default and with a URI.
        ("OPTIONS / HTTP/1.0\r\n\r\n", "200 OK"),
        ("GET /healthz HTTP/1.0\r\n\r\n", "200 OK"),
        ("HEAD /readyz HTTP/1.0\r\n\r\n", "200 OK"),
        ("GET /readyz HTTP/1.0\r\nUser-Agent: check\r\nConnection: close\r\n\r\n", "200 OK"),
        ("GET /metrics HTTP/1.0\r\n\r\n", "200 OK"),
        ("OPTIONS / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n", "200 OK"),
        ("GET /nowhere HTTP/1.0\r\n\r\n", "404 Not Found"),
        // A Host field is checked.
        ("GET /healthz HTTP/1.0\r\nHost: evil.example\r\n\r\n", "403 Forbidden"),
        ("GET /healthz HTTP/1.0\r\nhost : localhost\r\n\r\n", "400 Bad Request"),
        ("GET /healthz HTTP/1.1\r\n\r\n", "400 Bad Request"),
    ] {
        let answer = raw(gateway.admin, request.as_bytes());
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{request:?}: {answer:?}");
        assert!(answer.contains("\r\nConnection: close\r\n"), "{answer:?}");
        seen += 1;
    }
    assert_eq!(seen, 10);
}

#[test]
fn what_is_no_request_gets_an_answer() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let long = "x".repeat(20_000);
    let mut seen = 0;
    for (request, status) in [
        ("nonsense\r\n\r\n".to_owned(), 400),
        ("GET /healthz\r\n\r\n".into(), 400),
        ("GET /healthz HTTP/2.0\r\nHost: localhost\r\n\r\n".into(), 400),
        ("GET /healthz HTTP/1.1\nHost: localhost\n\n".into(), 400),
        ("GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n".into(), 400),
        ("GET /healthz HTTP/1.1\r\nHost: localhost\r\n folded\r\n\r\n".into(), 400),
        ("POST /reload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1, 2\r\n\r\n".into(), 400),
        ("\u{16}\u{3}\u{1}\u{0}\u{a5}".into(), 400),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into(), 400),
        (format!("GET /{long} HTTP/1.1\r\nHost: localhost\r\n\r\n"), 414),
        (format!("GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: {long}\r\n\r\n"), 431),
    ] {
        let answer = raw(gateway.admin, request.as_bytes());
        let start: String = request.chars().take(60).collect();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{start:?}: {answer:?}");
        assert!(answer.contains("Connection: close") && !answer.ends_with("\r\n\r\n"), "{start:?}: {answer:?}");
        seen += 1;
    }
    assert_eq!(seen, 11);
    assert_eq!(gateway.admin_get("/healthz").unwrap().status, 200);
}

#[test]
fn haproxy_takes_a_gateway_that_drains_out() {
    let (upstream, latch) = Upstream::holding(|seen| seen.target.ends_with("slow"), "{}");
    let mut gateway = Gateway::start(upstream.address, "");
    let mut slow = gateway.client();
    slow.send_head(&get(GOOD, "/api/v3/slow"));
    eventually("the request is at the upstream", || upstream.seen().len() == 1);
    let folder = Folder::new("test");
    let stats = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
    let port = gateway.admin.port();
    let check = |option: &str, name: &str| {
        format!(
            "backend {name}\n  {option}\n  server one {} check port {port} addr 127.0.0.1 inter 100ms fall 1 rise 1\n",
            gateway.address
        )
    };
    let config = folder.write(
        "haproxy.cfg",
        &format!(
            "global\n  maxconn 100\ndefaults\n  mode http\n  timeout connect 5s\n  timeout client 5s\n  timeout server 5s\n\
             listen stats\n  bind {stats}\n  stats enable\n  stats uri /\n{}{}",
            check("option httpchk", "plain"),
            check("option httpchk GET /readyz", "ready"),
        ),
    );
    let mut haproxy = Command::new("haproxy")
        .args(["-db", "-f"])
        .arg(config)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("haproxy can't be started: {error}; {HINT}"));
    let state = |name: &str| {
        let csv = raw(stats, b"GET /;csv HTTP/1.0\r\n\r\n");
        let line = csv.lines().find(|line| line.starts_with(&format!("{name},one,"))).unwrap_or_default().to_owned();
        // `check_status` shows that a response was evaluated, not only a connection.
        let field = |index: usize| line.split(',').nth(index).unwrap_or_default().to_owned();
        (field(17), field(36))
    };
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        eventually("HAProxy listens", || TcpStream::connect(stats).is_ok());
        for name in ["plain", "ready"] {
            eventually("up", || state(name) == ("UP".into(), "L7OK".into()));
        }
        gateway.signal("TERM");
        for name in ["plain", "ready"] {
            eventually("down", || state(name) == ("DOWN".into(), "L7STS".into()));
        }
    }));
    drop(haproxy.kill());
    drop(haproxy.wait());
    ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    latch.open();
    assert_eq!(slow.answer().status, 200);
    gateway.ended();
}

// ---- Access ----

#[test]
fn names_are_configured_and_reloaded() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let status = |host: &str| admin(&gateway, &format!("GET /metrics HTTP/1.1\nHost: {host}\n\n")).status;
    let answer = admin(&gateway, "GET /metrics HTTP/1.1\nHost: tollgate.internal:9090\n\n");
    assert!(answer.status == 403 && answer.text().contains("[admin] hosts"), "{}", answer.text());
    gateway.rewrite(|text| text.replace("[admin]\n", "[admin]\nhosts = [\"Tollgate.internal\", \"tollgate\"]\n"));
    assert_eq!(said(&reload(&gateway, &[])), (Some(0), "reloaded; changed and in force: admin.hosts\n".into()));
    for host in ["tollgate.internal", "TOLLGATE.INTERNAL:9090", "tollgate", "tollgate.internal.", "localhost"] {
        assert_eq!(status(host), 200, "{host}");
    }
    for host in ["evil.example", "tollgate.internal.evil.example", "a.tollgate", "tollgate.example"] {
        assert_eq!(status(host), 403, "{host}");
    }
    for wrong in ["http://tollgate", "tollgate:9090", "*.internal", "", "a..b", "a b"] {
        gateway.rewrite(|text| {
            let rest: String = text.lines().filter(|l| !l.starts_with("hosts")).map(|l| format!("{l}\n")).collect();
            rest.replace("[admin]\n", &format!("[admin]\nhosts = [\"{wrong}\"]\n"))
        });
        let (code, said) = said(&reload(&gateway, &[]));
        assert!(code == Some(1) && said.contains("admin.hosts") && said.contains("nothing changed"), "{wrong}: {said}");
    }
}

#[test]
fn an_origin_must_be_the_listeners_own() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let own = gateway.admin;
    let reloads = || gateway.metric("tollgate_config_reloads_total{result=\"ok\"}");
    let before = reloads();
    let mut seen = 0;
    for origin in [
        "null".to_owned(),
        "https://evil.example".into(),
        format!("https://{own}"),
        format!("http://localhost:{}", own.port()),
        format!("http://127.0.0.1:{}", own.port().wrapping_add(1)),
        format!("http://{own}.evil.example"),
        format!("http://{own}/"),
        format!("http://{own}\nOrigin: null"),
    ] {
        for line in ["GET /status", "POST /reload", "POST /cache/forget", "OPTIONS /"] {
            let answer = admin(&gateway, &format!("{line} HTTP/1.1\nHost: {own}\nOrigin: {origin}\n\n"));
            assert_eq!(answer.status, 403, "{line} from {origin}");
            seen += 1;
        }
    }
    assert_eq!((seen, reloads()), (32, before));
    for line in ["GET /status", "POST /reload"] {
        let answer = admin(&gateway, &format!("{line} HTTP/1.1\nHost: {own}\nOrigin: http://{own}\n\n"));
        assert_eq!(answer.status, 200, "{line}");
    }
}

#[test]
fn what_changes_something_is_post_only() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let reloads = || gateway.metric("tollgate_config_reloads_total{result=\"ok\"}");
    let before = reloads();
    let mut seen = 0;
    for method in ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"] {
        for path in ["/reload", "/cache/forget", "/cache/forget?id=000000000000"] {
            let answer = admin(&gateway, &format!("{method} {path} HTTP/1.1\nHost: localhost\n\n"));
            assert_eq!((answer.status, answer.header("Allow")), (405, Some("POST")), "{method} {path}");
            seen += 1;
        }
    }
    for path in ["/metrics", "/status", "/readyz", "/healthz"] {
        let answer = admin(&gateway, &format!("POST {path} HTTP/1.1\nHost: localhost\n\n"));
        assert_eq!((answer.status, answer.header("Allow")), (405, Some("GET, HEAD")), "{path}");
        seen += 1;
    }
    assert_eq!((seen, reloads()), (22, before));
}

#[test]
fn forgetting_takes_the_logs_digits() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    assert_eq!((status(&gateway, GOOD), status(&gateway, OTHER), status(&gateway, BAD)), (200, 200, 401));
    eventually("three lines", || gateway.access_log().len() == 3);
    let id = gateway.access_log()[0]["token"].as_str().unwrap().to_owned();
    assert_eq!((id.len(), known(&gateway)), (12, 2.0));
    let whole = sha256_hex(GOOD);
    for (index, query) in [
        format!("id={id}"),
        format!("token={id}"),
        format!("sha256={id}"),
        format!("sha256={}", id.to_uppercase()),
        format!("sha256={}", &whole[..40]),
        format!("sha256={whole}"),
    ]
    .iter()
    .enumerate()
    {
        let answer = gateway.admin_post(&format!("/cache/forget?{query}"));
        assert_eq!(
            (answer.status, answer.text().starts_with("1 token removed")),
            (200, true),
            "{query}: {}",
            answer.text()
        );
        assert_eq!((status(&gateway, GOOD), status(&gateway, OTHER)), (200, 200));
        assert_eq!(known(&gateway), 3.0 + index as f64, "{query}");
    }
    // An unknown token is removed from the cache as well.
    let unknown = || gateway.metric("tollgate_store_lookups_total{result=\"unknown\",store=\"file\"}");
    assert_eq!(unknown(), 1.0);
    assert_eq!(gateway.admin_post(&format!("/cache/forget?id={}", &sha256_hex(BAD)[..12])).status, 200);
    assert_eq!((status(&gateway, BAD), unknown()), (401, 2.0));
    let answer = gateway.admin_post("/cache/forget?id=000000000000");
    assert!(answer.status == 200 && answer.text().contains("no such token"), "{}", answer.text());
    let mut seen = 0;
    for wrong in [
        "",
        "id=",
        "id=12345",
        "id=00000000000g",
        "id=0000000000000000&x=1",
        "x=000000000000",
        GOOD,
        &format!("id={GOOD}"),
    ] {
        let answer = gateway.admin_post(&format!("/cache/forget?{wrong}"));
        assert!(answer.status == 400 && answer.text().contains("?sha256="), "{wrong}: {}", answer.text());
        seen += 1;
    }
    assert_eq!((seen, known(&gateway)), (8, 8.0));
}

// ---- Reloads ----

#[test]
fn a_reload_says_which_keys_take_a_restart() {
    let upstream = Upstream::start();
    let more = "[server]\nlisten = [\"@LISTEN@\"]\nthreads = 1\n[pagination]\nmax_per_page = 100\n";
    let gateway = Gateway::start(upstream.address, more);
    assert_eq!(
        said(&reload(&gateway, &[])),
        (Some(0), "reloaded; no settings changed that can take effect without a restart\n".into())
    );
    let original = std::fs::read_to_string(gateway.folder.0.join("tollgate.toml")).unwrap();
    let mut seen = 0;
    for (from, to, restart) in
        [("threads = 1", "threads = 2", "server.threads"), ("threads = 1", "threads = 1\nwatch = true", "server.watch")]
    {
        gateway.rewrite(|_| original.replace(from, to).replace("max_per_page = 100", "max_per_page = 50"));
        let answer = gateway.admin_post("/reload");
        assert_eq!(answer.status, 200);
        assert!(answer.text().contains("restart") && answer.text().contains(restart), "{}", answer.text());
        let address = gateway.admin.to_string();
        let (code, text) = said(&reload(&gateway, &["--admin", &address]));
        assert_eq!(code, Some(2), "{text}");
        assert!(text.contains(&format!("not in force until a restart: {restart}\n")), "{text}");
        eventually("the log says so too", || {
            let log = gateway.process_log();
            log.lines().last().is_some_and(|line| line.contains(restart) && line.contains("restart"))
        });
        // Changed back: no restart is needed.
        gateway.rewrite(|_| original.clone());
        let answer = gateway.admin_post("/reload");
        assert_eq!(answer.status, 200, "{}", answer.text());
        seen += 1;
    }
    assert_eq!(seen, 2);
}

#[test]
fn a_reload_that_fails_says_why_and_that_nothing_changed() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "[pagination]\nmax_per_page = 100\n");
    let original = std::fs::read_to_string(gateway.folder.0.join("tollgate.toml")).unwrap();
    for (from, to, code, named) in [
        ("max_per_page = 100", "max_per_pag = 1", 1, "pagination.max_per_pag"),
        ("path = \"tokens.toml\"", "path = \"nowhere.toml\"", 1, "nowhere.toml"),
        ("[[upstream]]", "[[upstream", 64, "is not TOML"),
    ] {
        gateway.rewrite(|_| original.replace(from, to));
        let (ended, text) = said(&reload(&gateway, &[]));
        assert_eq!(ended, Some(code), "{text}");
        assert!(text.contains("nothing changed") && text.contains(named), "{text}");
        let mut client = Client::connect(gateway.admin);
        client.send_head("POST /reload HTTP/1.1\nHost: localhost\nAccept: application/json\n\n");
        let answer = client.answer();
        let body: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!((answer.status, body["result"].as_str()), (500, Some("failed")));
        assert_eq!(body["applied"].as_array().map(Vec::len), Some(0));
        assert!(!body["errors"].as_array().unwrap().is_empty());
    }
    // Nothing listens, another program listens, and no admin listener.
    gateway.rewrite(|_| original.clone());
    let nobody = format!("127.0.0.1:{}", free_port());
    let (code, text) = said(&reload(&gateway, &["--admin", &nobody]));
    assert!(code == Some(1) && text.contains("nothing changed") && text.contains(&nobody), "{text}");
    let (code, text) = said(&reload(&gateway, &["--admin", &gateway.address.to_string()]));
    assert!(code == Some(1) && text.contains("404"), "{text}");
    gateway.rewrite(|text| text.replace(&format!("listen = \"{}\"", gateway.admin), "listen = \"none\""));
    let (code, text) = said(&reload(&gateway, &[]));
    assert!(code == Some(64) && text.contains("SIGHUP"), "{text}");
    let (code, _) = said(&reload(&gateway, &["--admin", "nonsense"]));
    assert_eq!(code, Some(64));
}

#[test]
fn a_reload_is_asked_for_on_a_socket_file_as_well() {
    let upstream = Upstream::start();
    let folder = Folder::new("test");
    let socket = folder.0.join("admin.sock");
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
    folder.write("tokens.toml", "token = []\n");
    let text = format!(
        "[server]\nlisten = [\"{listen}\"]\nthreads = 1\n[admin]\nlisten = \"unix:{}\"\n[store]\nkind = \"file\"\n\
         path = \"tokens.toml\"\n[log]\naccess = \"off\"\n[[upstream]]\nname = \"api\"\nservers = [\"{}\"]\n",
        socket.display(),
        upstream.address
    );
    let config = folder.write("tollgate.toml", &text);
    let mut child = Serving::start(&config);
    eventually("it serves", || UnixStream::connect(&socket).is_ok() && TcpStream::connect(listen).is_ok());
    std::fs::write(&config, text.replace("access = \"off\"", "access = \"stdout\"")).unwrap();
    let output = run(tollgate().args(["reload", "--config"]).arg(&config));
    assert_eq!(said(&output), (Some(0), "reloaded; changed and in force: log.access\n".into()));
    std::fs::write(&config, text.replace("threads = 1", "threads = 2")).unwrap();
    let output = run(tollgate().args(["reload", "--admin"]).arg(format!("unix:{}", socket.display())));
    assert_eq!(output.status.code(), Some(2), "{}", said(&output).1);
    child.end();
    assert!(!socket.exists(), "the socket file is left behind");
}

#[test]
fn a_reload_that_takes_its_time_holds_up_nothing() {
    let upstream = Upstream::start();
    let store = Store::with([(GOOD, "alice"), (OTHER, "bob")]);
    let gateway = Gateway::start_with_tokens(upstream.address, "token = []\n", &store.section());
    let file = "\n[[store]]\nkind = \"file\"\npath = \"tokens.toml\"\n";
    gateway.rewrite(|text| text.replace("[store]", "[[store]]") + file);
    assert_eq!(gateway.admin_post("/reload").status, 200);
    assert_eq!((status(&gateway, GOOD), status(&gateway, OTHER)), (200, 200));
    // A file that blocks its reader, like one on a network file system that does not respond.
    let at = |name: &str| gateway.folder.0.join(name);
    assert!(run(Command::new("mkfifo").arg(at("fifo"))).status.success());
    std::fs::hard_link(at("fifo"), at("its-other-end")).unwrap();
    std::fs::rename(at("fifo"), at("tokens.toml")).unwrap();
    gateway.rewrite(|text| text.replace("[[upstream]]", "[cache]\npositive_ttl = \"50s\"\n[[upstream]]"));
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| gateway.admin_post("/reload"));
        // The other store is followed, and everything else works.
        let revoked = store.token(&["revoke"], &[&sha256_hex(OTHER)[..12]]);
        assert!(revoked.status.success(), "{}", stderr(&revoked));
        eventually("the revocation holds", || status(&gateway, OTHER) == 401);
        assert_eq!(gateway.admin_get("/healthz").unwrap().status, 200);
        gateway.signal("USR1");
        eventually("the log is reopened", || gateway.process_log().contains("reopened"));
        assert!(!asking.is_finished(), "the reload did not wait");
        gateway.folder.write("whole", "token = []\n");
        std::fs::rename(at("whole"), at("tokens.toml")).unwrap();
        // Ends the reader's wait, with or without data.
        let mut end = std::fs::OpenOptions::new().read(true).write(true).open(at("its-other-end")).unwrap();
        end.write_all(b"token = []\n").unwrap();
        std::thread::sleep(SECOND);
        drop(end);
        let answer = asking.join().unwrap();
        assert!(answer.status == 200 || answer.text().contains("nothing changed"), "{}", answer.text());
    });
    assert_eq!(gateway.admin_post("/reload").status, 200);
    assert_eq!((status(&gateway, GOOD), status(&gateway, OTHER)), (200, 401));
}

// ---- Socket files ----

/// `tollgate run` without the harness.
struct Serving(std::process::Child);

impl Serving {
    fn start(config: &Path) -> Self {
        let log = std::fs::File::create(config.with_file_name("process.log")).unwrap();
        let mut command = tollgate();
        command.args(["run", "--config"]).arg(config).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        Self(command.spawn().unwrap())
    }

    fn end(&mut self) {
        run(Command::new("kill").args(["-TERM", &self.0.id().to_string()]));
        eventually("it ends", || self.0.try_wait().unwrap().is_some());
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn a_path_that_is_no_dead_socket_is_never_replaced() {
    let folder = Folder::new("test");
    folder.write("tokens.toml", "token = []\n");
    std::fs::create_dir(folder.0.join("folder")).unwrap();
    folder.write("precious", "precious");
    folder.write("empty", "");
    std::os::unix::fs::symlink(folder.0.join("precious"), folder.0.join("link")).unwrap();
    let live = UnixListener::bind(folder.0.join("live")).unwrap();
    drop(UnixListener::bind(folder.0.join("dead")).unwrap());
    let config = |name: &str, admin: bool| {
        let (tcp, unix) = (format!("127.0.0.1:{}", free_port()), format!("unix:{}", folder.0.join(name).display()));
        let (listen, admin) = if admin { (tcp, unix) } else { (unix, tcp) };
        folder.write(
            "tollgate.toml",
            &format!(
                "[server]\nlisten = [\"{listen}\"]\nthreads = 1\n[admin]\nlisten = \"{admin}\"\n[store]\n\
                 kind = \"file\"\npath = \"tokens.toml\"\n[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n"
            ),
        )
    };
    let mut seen = 0;
    for name in ["precious", "empty", "folder", "link", "live", "no/such/folder/x"] {
        for admin in [false, true] {
            let config = config(name, admin);
            let output = run(tollgate().args(["run", "--config"]).arg(&config));
            let text = stderr(&output);
            assert_eq!(output.status.code(), Some(1), "{name}: {text}");
            assert!(text.contains("cannot be bound") && text.contains(name.trim_end_matches("/x")), "{name}: {text}");
            // A socket in use may be the gateway's own.
            let checked = run(tollgate().args(["check", "--config"]).arg(&config));
            assert_eq!(
                checked.status.code(),
                Some(if name == "live" { 0 } else { 64 }),
                "{name}: {}",
                stderr(&checked)
            );
            seen += 1;
        }
    }
    assert_eq!(seen, 12);
    assert_eq!(std::fs::read_to_string(folder.0.join("precious")).unwrap(), "precious");
    assert!(folder.0.join("empty").is_file() && folder.0.join("folder").is_dir() && folder.0.join("link").is_symlink());
    assert!(UnixStream::connect(folder.0.join("live")).is_ok());
    drop(live);
    // An unused one is replaced, and removed when the gateway ends.
    for name in ["dead", "live", "new"] {
        let mut gateway = Serving::start(&config(name, false));
        eventually("it serves", || UnixStream::connect(folder.0.join(name)).is_ok());
        gateway.end();
        assert!(!folder.0.join(name).exists(), "{name}");
    }
}

#[test]
fn a_socket_that_another_process_took_over_is_left_to_it() {
    let folder = Folder::new("test");
    folder.write("tokens.toml", "token = []\n");
    let socket = folder.0.join("api.sock");
    let config = folder.write(
        "tollgate.toml",
        &format!(
            "[server]\nlisten = [\"unix:{}\"]\nthreads = 1\n[admin]\nlisten = \"none\"\n[store]\nkind = \"file\"\n\
             path = \"tokens.toml\"\n[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n",
            socket.display()
        ),
    );
    let mut gateway = Serving::start(&config);
    eventually("it serves", || UnixStream::connect(&socket).is_ok());
    std::fs::remove_file(&socket).unwrap();
    let _other = UnixListener::bind(&socket).unwrap();
    gateway.end();
    assert!(UnixStream::connect(&socket).is_ok(), "the other process's socket is gone");
}

// ---- Metrics ----

#[test]
fn cache_entries_are_right_at_once() {
    let upstream = Upstream::start();
    let store = Store::with([(GOOD, "alice"), (OTHER, "bob")]);
    // However long a machine takes for a thousand requests, none of these entries may end meanwhile.
    let gateway = Gateway::start(upstream.address, &(store.section() + "[cache]\nnegative_ttl = \"1h\"\n"));
    let entries = |kind: &str| gateway.metric(&format!("tollgate_cache_entries{{kind=\"{kind}\"}}"));
    let json = |gateway: &Gateway| -> serde_json::Value {
        serde_json::from_slice(&gateway.admin_get("/status").unwrap().body).unwrap()
    };
    assert_eq!((status(&gateway, GOOD), entries("positive"), entries("negative")), (200, 1.0, 0.0));
    assert_eq!((status(&gateway, BAD), entries("positive"), entries("negative")), (401, 1.0, 1.0));
    assert_eq!((status(&gateway, OTHER), json(&gateway)["cache"]["valid"].as_u64()), (200, Some(2)));
    let mut client = gateway.client();
    for guess in 0..1_000 {
        client.send_head(&get(&format!("guess-{guess:06}"), "/api/v3/user"));
        assert_eq!(client.answer().status, 401);
    }
    assert_eq!(entries("negative"), 1_001.0);
    assert_eq!(gateway.admin_post(&format!("/cache/forget?id={}", &sha256_hex(GOOD)[..12])).status, 200);
    assert_eq!(entries("positive"), 1.0);
    assert_eq!(gateway.admin_post("/cache/forget").status, 200);
    assert_eq!((entries("positive"), entries("negative")), (0.0, 0.0));
}

/// A file's tokens are in memory: who is unknown there is not kept besides.
#[test]
fn unknown_tokens_of_a_file_are_asked_for_each_time() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let asked =
        |result: &str| gateway.metric(&format!("tollgate_store_lookups_total{{result=\"{result}\",store=\"file\"}}"));
    for _ in 0..3 {
        assert_eq!((status(&gateway, BAD), status(&gateway, GOOD)), (401, 200));
    }
    assert_eq!((asked("unknown"), asked("found")), (3.0, 1.0));
    assert_eq!(gateway.metric("tollgate_cache_entries{kind=\"negative\"}"), 0.0);
}

#[test]
fn a_stale_answer_is_counted_once() {
    let upstream = Upstream::start();
    let store = Store::with([(GOOD, "alice")]);
    let cache = "[cache]\npositive_ttl = \"1s\"\nstale_if_error = \"1h\"\n";
    let gateway = Gateway::start(upstream.address, &(store.section() + cache));
    let counts = || {
        ["hit", "negative_hit", "miss", "stale"]
            .map(|result| gateway.metric(&format!("tollgate_cache_lookups_total{{result=\"{result}\"}}")))
    };
    let mut sent = 0.0;
    let mut ask = || {
        sent += 1.0;
        assert_eq!(status(&gateway, GOOD), 200);
        sent
    };
    ask();
    std::fs::rename(&store.path, store.path.with_extension("away")).unwrap();
    // Fresh, then stale after a failed lookup, then stale without waiting for a lookup.
    eventually("stale answers", || {
        ask();
        counts()[3] >= 20.0
    });
    let [hit, negative, miss, stale] = counts();
    assert_eq!((hit + negative + miss + stale, negative), (ask() - 1.0, 0.0), "{:?}", counts());
    assert!(miss <= 3.0, "{:?}", counts());
}

#[test]
fn who_makes_the_traffic_is_listed() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let mut client = gateway.client();
    for (token, times) in [(GOOD, 5), (BAD, 3)] {
        for _ in 0..times {
            client.send_head(&get(token, "/api/v3/projects"));
            client.answer();
        }
    }
    let top = |query: &str| admin(&gateway, &format!("GET /top{query} HTTP/1.1\nHost: localhost\n\n"));
    let read = || serde_json::from_str::<serde_json::Value>(&top("").text()).unwrap();
    // The last one may still be on its way into the sample.
    eventually("eight requests", || read()["all"]["requests"] == 8);
    let list = |of: &str, by: &str| read()[of][by].clone();
    assert_eq!(list("tokens", "by_requests").as_array().unwrap().len(), 2);
    assert_eq!(list("tokens", "by_requests")[0]["token"], sha256_hex(GOOD)[..12]);
    assert_eq!(list("users", "by_requests")[0]["requests"], 5);
    let refused = list("tokens", "by_refusals");
    assert_eq!((refused.as_array().unwrap().len(), &refused[0]["refusals"]), (1, &3.into()));
    assert_eq!(list("clients", "by_requests")[0]["client"], "127.0.0.1");
    assert!(list("routes", "by_backend_time")[0]["backend_seconds"].as_f64().unwrap() > 0.0);
    assert_eq!(top("?seconds=600&n=1").status, 200);
    for wrong in ["?seconds=0", "?n=101", "?x=1", "?seconds", "?n=-1"] {
        assert_eq!(top(wrong).status, 400, "{wrong}");
    }
    let text = read().to_string();
    assert!(!text.contains(GOOD) && !text.contains(BAD), "{text}");
}
