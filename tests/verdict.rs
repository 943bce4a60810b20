//! Verdicts for other proxies (`[[listener]] mode = "verdict"`): what is asked and answered, byte by byte, and the same behind
//! nginx, Caddy and Envoy with the configurations that docs/verdict.md recommends. The backend must only ever see what the
//! gateway has allowed, for whom it has allowed it.

use crate::harness::*;
use crate::servers::nginx::nginx;
use crate::support::*;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

/// The gateway's side, with a verdict listener on a port of its own.
struct Asked {
    gateway: Gateway,
    verdicts: SocketAddr,
}

/// A route that needs no token, one where it is optional, and limits; all others need one.
const ROUTES: &str = "[[route]]\npath = \"/api/v4/open/*\"\nauth = \"none\"\nreason = \"a test\"\n\
                      [[route]]\npath = \"/api/v4/maybe\"\nauth = \"optional\"\nreason = \"a test\"\n\
                      [[route]]\npath = \"/api/v4/limited\"\n\
                      [[route]]\npath = \"/api/v4/read\"\nmethods = [\"GET\"]\nauth = \"none\"\nreason = \"a test\"\n\
                      [[limit]]\nname = \"l\"\nrate = \"1/h\"\nroutes = [\"/api/v4/limited\"]\n";

impl Asked {
    fn by(source: &str) -> Self {
        Self::with(source, "peers = [\"127.0.0.1\"]\n")
    }

    /// On the configuration that the documents have, with other places.
    fn with(source: &str, listener: &str) -> Self {
        let text = std::fs::read_to_string(repository("config/verdict/tollgate.toml")).unwrap();
        let section = |header: &str| {
            let from = text.find(&format!("\n{header}\n")).unwrap() + 1;
            text[from..].split("\n[").next().unwrap().to_owned() + "\n"
        };
        let port = free_port();
        let verdicts = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let listener =
            format!("[[listener]]\naddress = \"{verdicts}\"\nmode = \"verdict\"\nsource = \"{source}\"\n{listener}");
        let server = section("[server]").replace("[server]\n", "[server]\nlisten = [\"@LISTEN@\"]\n");
        let more = [listener, server, section("[token]"), section("[api]"), ROUTES.to_owned()].concat();
        // Nothing is forwarded: there is no backend.
        let gateway = Gateway::start(SocketAddr::from((Ipv4Addr::LOCALHOST, 1)), &more);
        eventually("the verdict listener is open", || TcpStream::connect(verdicts).is_ok());
        Self { gateway, verdicts }
    }

    fn ask(&self, head: &str) -> Answer {
        let mut client = Client::connect(self.verdicts);
        client.send_head(head);
        client.answer_to(head.split(' ').next().unwrap()).unwrap()
    }

    /// The line of the access log about a question.
    fn logged(&self, answer: &Answer) -> serde_json::Value {
        let id = answer.header("X-Request-Id").unwrap();
        let line = || self.gateway.written_access_log().into_iter().find(|line| line["request_id"] == id);
        eventually("it is logged", || line().is_some());
        line().unwrap()
    }

    /// As nginx asks.
    fn nginx(&self, method: &str, target: &str, lines: &str) -> Answer {
        self.ask(&format!(
            "GET / HTTP/1.1\nHost: tollgate\nX-Original-Method: {method}\nX-Original-URI: {target}\nX-Original-Host: h\n{lines}\n"
        ))
    }
}

const FIELDS: [&str; 4] =
    ["X-Tollgate-User", "X-Tollgate-Token-Id", "X-Tollgate-Scopes", "X-Tollgate-Client-Certificate"];

fn identity(answer: &Answer) -> [Option<&str>; 4] {
    FIELDS.map(|name| answer.header(name))
}

fn token() -> String {
    format!("PRIVATE-TOKEN: {GOOD}\n")
}

#[test]
fn every_permission_names_who_it_is_for_and_every_refusal_its_status() {
    let asked = Asked::by("nginx");
    let id = &sha256_hex(GOOD)[..12];
    let allowed = asked.nginx("GET", "/api/v4/user?a=%2F&per_page=50", &token());
    assert_eq!((allowed.status, allowed.header("X-Tollgate-Status")), (200, Some("200")));
    assert_eq!(identity(&allowed), [Some("user-0001"), Some(id), Some(""), Some("")]);
    assert_eq!((allowed.header("Content-Length"), allowed.header("Cache-Control")), (Some("0"), Some("no-store")));
    // Whatever the client claims to be: all fields are there, and empty.
    let claims = "X-Tollgate-User: root\nX-Tollgate-User: root\nX-Tollgate-Scopes: api\n";
    for target in ["/api/v4/open/x", "/api/v4/maybe"] {
        let anonymous = asked.nginx("GET", target, claims);
        assert_eq!((anonymous.status, identity(&anonymous)), (200, [Some(""); 4]), "{target}");
    }
    assert_eq!(identity(&asked.nginx("GET", "/api/v4/maybe", &(token() + claims)))[0], Some("user-0001"));
    let mut seen = 0;
    for (method, target, lines, status, reason) in [
        ("GET", "/api/v4/user", "", 401, "missing"),
        ("GET", "/api/v4/user", "PRIVATE-TOKEN: bad-token-9999\n", 401, "unknown"),
        ("GET", "/api/v4/user", "PRIVATE-TOKEN: good-token-0001\nPRIVATE-TOKEN: good-token-0002\n", 401, "conflict"),
        ("GET", "/api/v4/user?private_token=good-token-0001", "", 401, "query_token"),
        ("GET", "/api/v4/user?private%5Ftoken=good-token-0001", "PRIVATE-TOKEN: good-token-0001\n", 401, "query_token"),
        ("GET", "/api/v4/open/x?private_token=good-token-0001", "", 401, "query_token"),
        ("GET", "/elsewhere", "PRIVATE-TOKEN: good-token-0001\n", 404, "no_route"),
        ("GET", "/api/v4/open/../user", "", 400, "dot_segment"),
        ("GET", "/api/v4/open/..%2fuser", "", 400, "dot_segment"),
        ("GET", "/api/v4/open/%2e%2e/user", "", 400, "dot_segment"),
        ("GET", "/api/v4/open;/../user", "", 400, "dot_segment"),
        ("GET", "/api%2Fv4/open/x", "", 404, "no_route"),
        ("POST", "/api/v4/read", "", 401, "missing"),
        ("POST", "/api/v4/read", "X-HTTP-Method-Override: GET\n", 400, "method_override"),
        ("TRACE", "/api/v4/open/x", "", 405, "method"),
        // Nothing can be clamped here.
        ("GET", "/api/v4/users?per_page=5000", "PRIVATE-TOKEN: good-token-0001\n", 400, "verdict_change"),
        ("GET", "/api/v4/users?page=1;page=2", "PRIVATE-TOKEN: good-token-0001\n", 400, "verdict_change"),
        // Nor taken out.
        ("GET", "/api/v4/open/x", "X_Tollgate_User: root\n", 400, "verdict_strange"),
        ("GET", "/api/v4/open/x", "X.Tollgate.User: root\n", 400, "verdict_strange"),
        ("GET", "/api/v4/open/x", "X-Tollgate-Other: root\n", 400, "verdict_strange"),
        ("GET", "/api/v4/open/x", "X-Rewrite-URL: /api/v4/user\n", 400, "verdict_strange"),
        ("GET", "/api/v4/open/x", "X-Original-URL: /api/v4/user\n", 400, "verdict_strange"),
        ("GET", "/api/v4/open/x", "Remote-User: root\n", 400, "verdict_strange"),
        ("GET", "/api/v4/open/x", "SUDO: root\n", 400, "verdict_strange"),
        ("GET", "/api/v4/user", "JOB-TOKEN: x\nPRIVATE-TOKEN: good-token-0001\n", 400, "verdict_strange"),
        ("GET", "/api/v4/user?sudo=root", "PRIVATE-TOKEN: good-token-0001\n", 403, "sudo"),
        ("GET", "/api/v4/user?job_token=x", "PRIVATE-TOKEN: good-token-0001\n", 401, "other_credential"),
        ("GET", "http://h/api/v4/open/x", "", 400, "verdict_value"),
        ("GET", "*", "", 400, "verdict_value"),
        ("get", "/api/v4/open/x", "", 400, "verdict_value"),
        ("GET", "/api/v4/open/x", "X-Original-URI: /api/v4/open/x\n", 400, "verdict_field"),
        ("GET", "/api/v4/open/x", "x-original-method: GET\n", 400, "verdict_field"),
        ("GET", "/api/v4/open/x", "X-Original-Host: h\n", 400, "verdict_field"),
        ("GET", "", "", 400, "verdict_field"),
        ("GET", "/api/v4/open/x", "Content-Length: 1\n", 400, "verdict_body"),
    ] {
        let answer = asked.nginx(method, target, lines);
        // auth_request understands no other status.
        let shown = if status == 401 { 401 } else { 403 };
        let real = answer.header("X-Tollgate-Status").map(|text| text.parse().unwrap());
        assert_eq!((answer.status, real), (shown, Some(status)), "{method} {target} {lines}");
        assert_eq!(answer.header("X-Tollgate-User"), None);
        assert_eq!(asked.logged(&answer)["reason"], reason, "{method} {target} {lines}");
        seen += 1;
    }
    for name in ["Method", "URI", "Host"] {
        let all = "X-Original-Method: GET\nX-Original-URI: /api/v4/open/x\nX-Original-Host: h\n";
        let without: String = all.lines().filter(|line| !line.contains(name)).map(|line| format!("{line}\n")).collect();
        let answer = asked.ask(&format!("GET / HTTP/1.1\nHost: tollgate\n{without}\n"));
        assert_eq!(answer.header("X-Tollgate-Status"), Some("400"), "{name}");
        seen += 1;
    }
    assert_eq!(seen, 38);
    let gone = asked.ask("GET / HTTP/1.1\nHost: tollgate\nbroken\n\n");
    assert_eq!((gone.status, gone.header("X-Tollgate-Status")), (403, Some("400")));
    // One gate: the same limits, log lines and metrics as for all requests.
    assert_eq!(asked.nginx("GET", "/api/v4/limited", &token()).status, 200);
    let limited = asked.nginx("GET", "/api/v4/limited", &token());
    assert_eq!((limited.status, limited.header("X-Tollgate-Status")), (403, Some("429")));
    assert!(limited.header("Retry-After").unwrap().parse::<u64>().unwrap() > 60);
    assert_eq!(asked.gateway.metric("tollgate_limit_requests_total{limit=\"l\",result=\"refused\"}"), 1.0);
    assert!(asked.gateway.metric("tollgate_auth_total{reason=\"ok\",result=\"valid\",source=\"header\"}") >= 2.0);
    let line = asked.logged(&allowed);
    assert_eq!((&line["method"], &line["status"], &line["by"]), (&"GET".into(), &200.into(), &"gate".into()), "{line}");
    assert_eq!(
        (&line["path"], &line["query"], &line["client"]),
        (&"/api/v4/user".into(), &"a=%2F&per_page=50".into(), &"127.0.0.1".into()),
        "{line}"
    );
    // Its answer to HEAD has a body all the same, because the proxy asks with GET.
    assert_eq!(asked.nginx("HEAD", "/api/v4/user", "").text(), "{\"message\":\"401 Unauthorized\"}");
}

#[test]
fn other_proxies_get_the_status_itself_and_their_fields_are_all_needed() {
    let asked = Asked::by("forwarded");
    let all = [
        "X-Forwarded-Method: GET\n",
        "X-Forwarded-Uri: /api/v4/user\n",
        "X-Forwarded-Host: h\n",
        "X-Forwarded-Proto: http\n",
        "X-Forwarded-For: 192.0.2.7\n",
    ];
    let ask = |lines: &str| asked.ask(&format!("GET / HTTP/1.1\nHost: tollgate\n{lines}{}\n", token()));
    let answer = ask(&all.concat());
    assert_eq!(identity(&answer)[0], Some("user-0001"));
    assert_eq!(asked.logged(&answer)["client"], "192.0.2.7");
    for missing in 0..all.len() {
        let some: String =
            all.iter().enumerate().filter(|(index, _)| *index != missing).map(|(_, line)| *line).collect();
        assert_eq!(ask(&some).status, 400, "{some}");
        assert_eq!(ask(&(all.concat() + all[missing])).status, 400, "{}", all[missing]);
    }
    // What another kind of proxy would say means nothing here.
    let nginx = "X-Original-Method: GET\nX-Original-URI: /api/v4/user\nX-Original-Host: h\n";
    assert_eq!((ask(nginx).status, ask(&(all.concat() + nginx)).status), (400, 400));
    let post = all.concat().replace("GET", "POST").replace("/user", "/read");
    assert_eq!(asked.ask(&format!("GET / HTTP/1.1\nHost: t\n{post}\n")).status, 401);

    let asked = Asked::with("envoy", "peers = [\"127.0.0.0/8\"]\npath_prefix = \"/verdict\"\n");
    let ask = |line: &str, lines: &str| asked.ask(&format!("{line} HTTP/1.1\nHost: h\n{lines}\n"));
    assert_eq!(identity(&ask("GET /verdict/api/v4/user", &token()))[0], Some("user-0001"));
    assert_eq!(ask("HEAD /verdict/api/v4/user", &token()).status, 200);
    assert_eq!(ask("HEAD /verdict/api/v4/user", "").status, 401);
    for (line, status) in [
        ("POST /verdict/api/v4/read", 401),
        ("GET /api/v4/user", 400),
        ("GET /verdictapi/v4/user", 400),
        ("GET /verdict", 400),
        ("GET /x/../verdict/api/v4/user", 400),
        ("GET /verdict/api/v4/users?per_page=5000", 400),
        ("GET /verdict/api/v4/user?private_token=good-token-0001", 401),
        ("GET /verdict/elsewhere", 404),
    ] {
        let lines = if line.starts_with("POST") { String::new() } else { token() };
        assert_eq!(ask(line, &lines).status, status, "{line}");
    }
    assert_eq!(
        (ask("GET /verdict/api/v4/limited", &token()).status, ask("GET /verdict/api/v4/limited", &token()).status),
        (200, 429)
    );
}

#[test]
fn strangers_are_closed_and_a_socket_file_is_for_its_owner() {
    let asked = Asked::with("nginx", "peers = [\"127.0.0.2\", \"10.0.0.0/8\"]\n");
    let mut client = Client::connect(asked.verdicts);
    // It may be closed before this is sent.
    let _ = std::io::Write::write_all(&mut client.socket, b"GET / HTTP/1.1\r\nHost: t\r\n\r\n");
    assert!(client.is_closed_within(PATIENCE));
    eventually("it is counted", || asked.gateway.metric("tollgate_handshakes_total{result=\"stranger\"}") >= 1.0);
    assert!(asked.gateway.process_log().contains("its network is not in peers"), "{}", asked.gateway.process_log());
    assert!(asked.gateway.access_log().is_empty());

    let folder = Folder::new("test");
    let path = folder.0.join("v.sock");
    let listener =
        format!("[[listener]]\naddress = \"unix:{}\"\nmode = \"verdict\"\nsource = \"nginx\"\n", path.display());
    let server = "[server]\nlisten = [\"@LISTEN@\"]\n[token]\nforward = \"identity\"\nbody = \"ignore\"\n[api]\nprefixes = [\"/api/v4\"]\n";
    let _gateway = Gateway::start(SocketAddr::from((Ipv4Addr::LOCALHOST, 1)), &(listener + server));
    let mut socket = UnixStream::connect(&path).unwrap();
    let request = format!(
        "GET / HTTP/1.1\r\nHost: t\r\nConnection: close\r\nX-Original-Method: GET\r\nX-Original-URI: /api/v4/x\r\nX-Original-Host: h\r\n\
         PRIVATE-TOKEN: {GOOD}\r\n\r\n"
    );
    std::io::Write::write_all(&mut socket, request.as_bytes()).unwrap();
    let mut text = String::new();
    std::io::Read::read_to_string(&mut socket, &mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.contains("X-Tollgate-User: user-0001\r\n"), "{text}");
}

#[test]
fn a_set_up_that_could_be_got_around_does_not_load() {
    let folder = Folder::new("test");
    let check = |text: &str| {
        let path =
            folder.write("c.toml", &format!("{text}[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:3000\"]\n"));
        let output = run(tollgate().args(["check", "--offline", "--config"]).arg(path));
        (output.status.success(), stdout(&output) + &stderr(&output))
    };
    let listener =
        format!("[[listener]]\naddress = \"127.0.0.1:{}\"\nmode = \"verdict\"\nsource = \"nginx\"\n", free_port());
    let (token, peers) = ("[token]\nforward = \"identity\"\nbody = \"ignore\"\n", "peers = [\"127.0.0.1\"]\n");
    let unix = "[[listener]]\naddress = \"unix:/tmp/v.sock\"\nmode = \"verdict\"\nsource = \"nginx\"\n";
    assert!(check(&format!("{listener}{peers}{token}")).0);
    assert!(check(&format!("{unix}{token}")).0);
    let mut seen = 0;
    for (text, says) in [
        (format!("{listener}{token}"), "listener[0].peers: is empty"),
        (format!("{listener}peers = [\"0.0.0.0/0\"]\n{token}"), "lets everybody ask"),
        (format!("{unix}{peers}{token}"), "listener[0].peers: is for TCP"),
        (format!("{listener}{peers}"), "[token] forward = \"identity\""),
        (
            format!("{listener}{peers}[token]\nbody = \"ignore\"\nforward = \"both\"\n"),
            "[token] forward = \"identity\"",
        ),
        (format!("{listener}{peers}[token]\nforward = \"identity\"\n"), "[token] body = \"ignore\""),
        (format!("{}{peers}{token}", listener.replace("source = \"nginx\"\n", "")), "listener[0].source: is missing"),
        (format!("{listener}{peers}path_prefix = \"/x\"\n{token}"), "goes with source = \"envoy\" only"),
        (format!("{listener}{peers}redirect_to_https = 443\n{token}"), "goes with mode = \"forward\" only"),
        (
            "[[listener]]\naddress = \"127.0.0.1:8081\"\nsource = \"nginx\"\n".into(),
            "goes with mode = \"verdict\" only",
        ),
    ] {
        let (is_right, said) = check(&text);
        assert!(!is_right && said.contains(says), "{says}: {said}");
        seen += 1;
    }
    assert_eq!(seen, 10);
}

/// A proxy in front of a backend, with a configuration of config/verdict; ended by its pid.
struct Proxy {
    address: SocketAddr,
    child: Child,
    upstream: Upstream,
    asked: Asked,
    folder: Folder,
}

impl Proxy {
    fn start(source: &str, file: &str, command: impl FnOnce(&Folder, &str) -> Command) -> Self {
        let (asked, upstream) = (Asked::by(source), Upstream::start());
        let folder = Folder::new("test");
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let text = std::fs::read_to_string(repository("config/verdict").join(file)).unwrap();
        let mut seen = 0;
        let mut put = |text: String, from: &str, to: String| {
            assert!(text.contains(from), "{file}: {from}");
            seen += 1;
            text.replace(from, &to)
        };
        let text = put(text, "8080", address.port().to_string());
        let text = put(text, "8081", asked.verdicts.port().to_string());
        let text = put(text, "3000", upstream.address.port().to_string());
        let mut command = command(&folder, &text);
        let log = std::fs::File::create(folder.0.join("log")).unwrap();
        let child = command
            .current_dir(&folder.0)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("{} cannot be started: {error}; {HINT}", command.get_program().display()));
        let mut proxy = Self { address, child, upstream, asked, folder };
        eventually("the proxy listens", || {
            let ended = proxy.child.try_wait().unwrap();
            assert!(ended.is_none(), "the proxy ended: {}", proxy.log());
            TcpStream::connect(address).is_ok()
        });
        proxy
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.0.join("log")).unwrap_or_default()
    }

    /// The answer, and what the backend saw, if anything.
    fn ask(&self, method: &str, target: &str, lines: &str) -> (Answer, Option<Seen>) {
        self.upstream.forget();
        let mut client = Client::connect(self.address);
        client.send_head(&format!("{method} {target} HTTP/1.1\nHost: h.test\n{lines}\n"));
        let answer = client.answer_to(method).unwrap();
        let mut seen = self.upstream.seen();
        assert!(seen.len() < 2, "{seen:?}");
        (answer, seen.pop())
    }

    /// What holds behind every proxy.
    fn holds(&self) {
        let forged = "X-Tollgate-User: root\nX-Tollgate-User: root\nX-Tollgate-Scopes: api\nX-Tollgate-Token-Id: x\n\
                      X-Tollgate-Client-Certificate: CN=root\nX-Original-URI: /api/v4/open/x\nX-Original-URI: /api/v4/open/y\n\
                      X-Original-Method: GET\nX-Original-Host: a\nX-Forwarded-Uri: /api/v4/open/x\nX-Forwarded-Method: GET\n\
                      X-Forwarded-Host: a\nX-Forwarded-Proto: https\n";
        let is_none = |seen: &Seen, name: &str| seen.header(name).unwrap_or_default().is_empty();
        // Who asks is who the token says, and what is asked for reaches the backend as it came.
        let mut answered = 0;
        for (method, target) in [
            ("GET", "/api/v4/user"),
            ("POST", "/api/v4/projects/group%2Fproject/issues?a[]=1&b=%2F%25&per_page=5000"),
            ("GET", "/api/v4//projects//1"),
            ("GET", "/api/v4/projects/1/repository/files/a%2Fb.rb/raw?ref=a+b&per_page=50"),
            ("DELETE", "/api/v4/x;y=1/%E4%BD%A0"),
            ("GET", "/%61pi/v4/user"),
        ] {
            let (answer, seen) = self.ask(method, target, &format!("{}Cookie: _session=x\n", token()));
            assert_eq!(answer.status, 200, "{method} {target}: {} {}", answer.text(), self.log());
            let seen = seen.unwrap();
            assert_eq!((seen.method.as_str(), seen.target.as_str()), (method, target));
            assert_eq!(seen.header("X-Tollgate-User"), Some("user-0001"), "{}", seen.head);
            assert!(
                ["PRIVATE-TOKEN", "Authorization", "Cookie"].iter().all(|name| seen.header(name).is_none()),
                "{}",
                seen.head
            );
            answered += 1;
        }
        assert_eq!(answered, 6);
        // A client that claims to be somebody is overwritten, or refused where a field of another proxy is no proxy's here.
        let own: String =
            forged.lines().filter(|line| line.starts_with("X-Tollgate")).map(|line| format!("{line}\n")).collect();
        let (answer, seen) = self.ask("GET", "/api/v4/user", &(token() + &own));
        let seen = seen.unwrap_or_else(|| panic!("{answer:?} {}", self.log()));
        assert_eq!((answer.status, seen.header("X-Tollgate-User")), (200, Some("user-0001")));
        assert_eq!(seen.header("X-Tollgate-Token-Id"), Some(&sha256_hex(GOOD)[..12]));
        assert!(
            is_none(&seen, "X-Tollgate-Scopes") && is_none(&seen, "X-Tollgate-Client-Certificate"),
            "{}",
            seen.head
        );
        // Connection takes away nothing that says who asks, and for what.
        let (answer, seen) = self.ask(
            "GET",
            "/api/v4/user",
            &format!("{}Connection: keep-alive, X-Tollgate-User, X-Tollgate-Token-Id\n", token()),
        );
        let seen = seen.unwrap_or_else(|| panic!("{answer:?}"));
        assert_eq!(
            (seen.header("X-Tollgate-User"), seen.header("X-Tollgate-Token-Id")),
            (Some("user-0001"), Some(&sha256_hex(GOOD)[..12]))
        );
        for target in ["/api/v4/open/x", "/api/v4/maybe"] {
            let (answer, seen) = self.ask("GET", target, &own);
            let seen = seen.unwrap_or_else(|| panic!("{target} {answer:?}"));
            assert!(answer.status == 200 && FIELDS.iter().all(|name| is_none(&seen, name)), "{}", seen.head);
        }
        for lines in [forged.to_owned(), format!("PRIVATE-TOKEN: {BAD}\n{own}"), String::new(), own.clone()] {
            let (answer, seen) = self.ask("GET", "/api/v4/user", &lines);
            assert!((answer.status == 401 || answer.status == 400) && seen.is_none(), "{lines} {answer:?} {seen:?}");
        }
        // What tollgate would have to take out, bound or read in one way.
        let mut refused = 0;
        for (method, target, lines, status) in [
            ("GET", "/api/v4/user", "", 401),
            ("GET", "/api/v4/user?private_token=good-token-0001", "", 401),
            ("GET", "/api/v4/open/x?private_token=good-token-0001", "", 401),
            ("GET", "/api/v4/users?per_page=5000", "PRIVATE-TOKEN: good-token-0001\n", 400),
            ("GET", "/api/v4/user", "PRIVATE-TOKEN: good-token-0001\nPRIVATE-TOKEN: good-token-0002\n", 401),
            ("POST", "/api/v4/read", "", 401),
            ("POST", "/api/v4/read", "X-HTTP-Method-Override: GET\n", 400),
            ("GET", "/api/v4/open/x", "X-Rewrite-URL: /api/v4/user\n", 400),
            ("GET", "/elsewhere", "PRIVATE-TOKEN: good-token-0001\n", 404),
        ] {
            let (answer, seen) = self.ask(method, target, lines);
            assert!(answer.status == status && seen.is_none(), "{method} {target} {lines}: {answer:?} {seen:?}");
            refused += 1;
        }
        // Paths that somebody may read as another one: whoever forwards one of them forwards what was judged.
        for target in [
            "/api/v4/open/../user",
            "/api/v4/open/..%2fuser",
            "/api/v4/open%2f..%2fuser",
            "/api/v4/open/%2e%2e/user",
            "/api/v4/open/.%2E/user",
            "/api/v4/open;/../user",
            "/api/v4/open/..;/user",
            "/api/v4/open/..\\user",
            "/api/v4/open/%5c..%5cuser",
            "/api/v4/open/%252e%252e/user",
            "//api/v4/user",
            "/api/v4/./user",
            "/api%2Fv4/user",
            "/api/v4/open/x/%00/user",
            "/API/v4/user",
            "/tollgate-verdict",
            "/api/v4/open/x/..",
            "/open/../api/v4/user",
        ] {
            let (answer, seen) = self.ask("GET", target, "");
            match seen {
                // Open as it stands, to all who do not decode twice.
                Some(seen) => {
                    assert!(seen.target == target && target == "/api/v4/open/%252e%252e/user", "{target}: {seen:?}")
                }
                None => assert!((400..=404).contains(&answer.status), "{target}: {answer:?}"),
            }
            refused += 1;
        }
        assert_eq!(refused, 27);
        let (_, seen) = self.ask("GET", "/api/v4/open/x", "X_Tollgate_User: root\n");
        assert!(seen.is_none_or(|seen| !seen.head.contains("root")));
        // A limit's refusal says when to come again, and a store that is down is no permission.
        assert_eq!(self.ask("GET", "/api/v4/limited", &token()).0.status, 200);
        let (answer, seen) = self.ask("GET", "/api/v4/limited", &token());
        assert!(answer.status == 429 && seen.is_none(), "{answer:?}");
        assert!(answer.header("Retry-After").unwrap().parse::<u64>().unwrap() > 60);
        let (answer, _) = self.ask("GET", "/api/v4/user", "");
        assert_eq!((answer.status, answer.text().as_str()), (401, "{\"message\":\"401 Unauthorized\"}"));
        assert!(
            answer
                .headers
                .iter()
                .any(|(name, value)| name.eq_ignore_ascii_case("www-authenticate") && value.contains("Bearer")),
            "{answer:?}"
        );
        // Bodies pass by.
        let body = "x".repeat(100_000);
        let lines = format!("{}Content-Type: text/plain\nContent-Length: {}\n", token(), body.len());
        self.upstream.forget();
        let mut client = Client::connect(self.address);
        client.send(format!("POST /api/v4/x HTTP/1.1\nHost: h\n{lines}\n").replace('\n', "\r\n").as_bytes());
        client.send(body.as_bytes());
        assert_eq!((client.answer().status, self.upstream.only().body.len()), (200, body.len()));
    }

    /// Without the gateway nothing is forwarded.
    fn fails_closed(mut self) {
        self.asked.gateway.signal("KILL");
        self.asked.gateway.ended();
        let (answer, seen) = self.ask("GET", "/api/v4/user", &token());
        assert!(answer.status >= 500 && seen.is_none(), "{answer:?} {seen:?}");
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[test]
fn nginx_forwards_what_was_allowed_for_whom_it_was_allowed() {
    let proxy = Proxy::start("nginx", "nginx.conf", nginx);
    proxy.holds();
    proxy.fails_closed();
}

#[test]
fn caddy_forwards_what_was_allowed_for_whom_it_was_allowed() {
    let proxy = Proxy::start("forwarded", "Caddyfile", |folder, text| {
        let path = folder.write("Caddyfile", text);
        let mut command = Command::new("caddy");
        command.env("HOME", &folder.0).env("XDG_DATA_HOME", &folder.0).env("XDG_CONFIG_HOME", &folder.0);
        command.args(["run", "--adapter", "caddyfile", "--config"]).arg(path);
        command
    });
    proxy.holds();
    proxy.fails_closed();
}

#[test]
fn envoy_forwards_what_was_allowed_for_whom_it_was_allowed() {
    let proxy = Proxy::start("envoy", "envoy.yaml", |folder, text| {
        let path = folder.write("envoy.yaml", text);
        let mut command = Command::new(repository("target/peers/envoy/envoy/_bin/envoy"));
        command.args(["--concurrency", "1", "--log-level", "error", "--disable-hot-restart", "-c"]).arg(path);
        command
    });
    proxy.holds();
    proxy.fails_closed();
}
