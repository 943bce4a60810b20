//! HTTP/2 over TLS by clients that nobody here wrote: httpx, Node, Go, curl and nghttp, with a certificate of `tollgate cert
//! self-signed`. Each asks, is refused, uploads, asks much at once, and goes on when its gateway is replaced by another.

use crate::harness::*;
use crate::servers::Folder;
use crate::support::*;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Output, Stdio};

const SLOW_PATH: &str = "/api/v3/slow";
/// Requests that are under way while the gateway is told to end.
const SLOW: usize = 20;

struct Setup {
    upstream: Upstream,
    latch: Latch,
    /// The TLS listener's, of each gateway in turn.
    address: SocketAddr,
    folder: Folder,
    gateway: Option<Gateway>,
}

impl Setup {
    fn new() -> Self {
        let folder = Folder::new("test");
        let made = run(tollgate()
            .args(["cert", "self-signed", "--name", "localhost", "--name", "127.0.0.1", "--out"])
            .arg(&folder.0));
        assert!(made.status.success(), "{}", stderr(&made));
        let latch = Latch::default();
        let held = latch.clone();
        let upstream = Upstream::answering(move |seen| match seen.target.split('?').next() {
            Some(SLOW_PATH) => {
                held.wait();
                Reply::ok("ok")
            }
            Some("/api/v3/size") => Reply::ok(&seen.body.len().to_string()),
            _ => Reply::ok("ok"),
        });
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let mut setup = Self { upstream, latch, address, folder, gateway: None };
        setup.gateway = Some(setup.start());
        setup
    }

    fn certificate(&self) -> String {
        self.folder.0.join("localhost.pem").display().to_string()
    }

    fn start(&self) -> Gateway {
        let (chain, key) = (self.certificate(), self.folder.0.join("localhost.key"));
        let listener = format!(
            "[[listener]]\naddress = \"{}\"\ncertificates = [{{ chain = \"{chain}\", key = \"{}\" }}]\n",
            self.address,
            key.display()
        );
        Gateway::start(self.upstream.address, &listener)
    }

    fn url(&self, path: &str) -> String {
        format!("https://{}{path}", self.address)
    }

    /// Lets the client run, and puts another gateway into the place of its own once the backend has so many of these requests.
    fn replaced_under(mut self, mut client: Child, path: &str, count: usize) -> Output {
        let deadline = std::time::Instant::now() + 3 * PATIENCE;
        let seen = |setup: &Self| setup.upstream.seen().iter().filter(|seen| seen.target.starts_with(path)).count();
        while seen(&self) < count {
            let ended = client.try_wait().unwrap().is_some() || std::time::Instant::now() > deadline;
            if ended {
                drop(client.kill());
                let output = client.wait_with_output().unwrap();
                panic!("{} requests for {path}: {}{}", seen(&self), stdout(&output), stderr(&output));
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let mut first = self.gateway.take().unwrap();
        if path != SLOW_PATH {
            eventually("it is answered", || first.metric("tollgate_requests_in_flight") == 0.0);
        }
        first.signal("TERM");
        eventually("the listener is closed", || Client::try_connect(self.address).is_none());
        let second = self.start();
        self.latch.open();
        // Who waits to be told reads to the end of this.
        drop(client.stdin.take());
        let ended = first.try_ended(2 * PATIENCE).and_then(|status| status.code());
        assert_eq!(ended, Some(0), "{}", first.process_log());
        assert!(!first.process_log().contains("aborted"), "{}", first.process_log());
        let output = client.wait_with_output().unwrap();
        assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
        drop(second);
        output
    }
}

fn started(command: &mut Command) -> Child {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
        .spawn()
        .unwrap_or_else(|error| panic!("{} cannot be started: {error}; {HINT}", command.get_program().display()))
}

/// A script with all of the checks in it.
fn passes(command: &mut Command) {
    let setup = Setup::new();
    command.args([&setup.url(""), GOOD, BAD, &setup.certificate(), &SLOW.to_string()]);
    let output = setup.replaced_under(started(command), SLOW_PATH, SLOW);
    assert_eq!(stdout(&output), format!("{} passed\n", 3 + 100 + SLOW + 1), "{}", stderr(&output));
}

#[test]
fn httpx_works_over_http2_and_goes_on_when_its_gateway_is_replaced() {
    let venv = std::env::var_os("TOLLGATE_PY_VENV").map_or_else(|| repository("target/py-clients"), Into::into);
    let setup = Setup::new();
    let mut command = Command::new(venv.join("bin/python"));
    command.arg("-B").arg(repository("tests/clients/http2_httpx.py"));
    command.args([&setup.url(""), GOOD, BAD, &setup.certificate()]);
    // Between two requests: its library takes a connection for closed after GOAWAY, whatever is under way on it.
    let output = setup.replaced_under(started(&mut command), "/api/v3/ready", 1);
    assert_eq!(stdout(&output), "105 passed\n", "{}", stderr(&output));
}

#[test]
fn node_works_over_http2_and_goes_on_when_its_gateway_is_replaced() {
    passes(Command::new("node").arg(repository("tests/clients/http2_node.js")));
}

#[test]
fn go_works_over_http2_and_goes_on_when_its_gateway_is_replaced() {
    passes(&mut Command::new(repository("target/readers/http2-go")));
}

#[test]
fn curl_works_over_http2_and_goes_on_when_its_gateway_is_replaced() {
    let setup = Setup::new();
    let body = setup.folder.0.join("body");
    std::fs::write(&body, vec![0; 1 << 20]).unwrap();
    let curl = |token: &str, more: &[&str]| {
        let mut command = Command::new("curl");
        command.args(["-sS", "--http2", "--max-time", "30", "--cacert", &setup.certificate()]);
        command.args([
            "-H",
            &format!("PRIVATE-TOKEN: {token}"),
            "-w",
            " %{http_code} %{http_version} %{num_connects}\n",
        ]);
        command.args(more);
        command
    };
    let said = |token: &str, more: &[&str]| stdout(&run(&mut curl(token, more)));
    assert_eq!(said(GOOD, &[&setup.url("/api/v3/x")]), "ok 200 2 1\n");
    assert_eq!(said(BAD, &[&setup.url("/api/v3/x")]), "{\"message\":\"401 Unauthorized\"} 401 2 1\n");
    let typed = ["-H", "Content-Type: application/octet-stream", "--data-binary", &format!("@{}", body.display())];
    assert_eq!(said(GOOD, &[&typed[..], &[&setup.url("/api/v3/size")]].concat()), "1048576 200 2 1\n");
    let parallel = said(GOOD, &["-Z", "--parallel-max", "100", &setup.url("/api/v3/x?n=[1-100]")]);
    let count = |what: &str| parallel.matches(what).count();
    assert_eq!((count(" 200 2 "), count("ok")), (100, 100), "{parallel}");
    // One after the other: the second one needs a connection of its own, since the first one's had GOAWAY.
    let client = started(&mut curl(GOOD, &[&setup.url(SLOW_PATH), &setup.url("/api/v3/x")]));
    assert_eq!(stdout(&setup.replaced_under(client, SLOW_PATH, 1)), "ok 200 2 1\nok 200 2 1\n");
}

/// It asks over one connection, and knows no other after that one's GOAWAY.
#[test]
fn nghttp_works_over_http2_and_is_served_to_the_end() {
    let setup = Setup::new();
    let body = setup.folder.0.join("body");
    std::fs::write(&body, vec![0; 1 << 20]).unwrap();
    let nghttp = |token: &str, more: &[&str], path: &str| {
        let mut command = Command::new("nghttp");
        command.args(["-t", "30", "-H", &format!("private-token: {token}")]).args(more).arg(setup.url(path));
        command
    };
    let said = |token: &str, more: &[&str], path: &str| stdout(&run(&mut nghttp(token, more, path)));
    assert_eq!(said(GOOD, &[], "/api/v3/x"), "ok");
    assert_eq!(said(BAD, &[], "/api/v3/x"), "{\"message\":\"401 Unauthorized\"}");
    let typed = ["-H", "content-type: application/octet-stream", "-d", &body.display().to_string()];
    assert_eq!(said(GOOD, &typed, "/api/v3/size"), "1048576");
    assert_eq!(said(GOOD, &["-m", "100"], "/api/v3/x"), "ok".repeat(100));
    let client = started(&mut nghttp(GOOD, &["-m", &SLOW.to_string()], SLOW_PATH));
    assert_eq!(stdout(&setup.replaced_under(client, SLOW_PATH, SLOW)), "ok".repeat(SLOW));
}
