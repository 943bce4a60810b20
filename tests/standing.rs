//! What goes on when its token ends: downloads, uploads, waiting requests and tunnels. Each within the store's bound, and
//! nobody else's.

use crate::harness::{Client, Gateway, Latch, Upstream, eventually, sha256_hex};
use crate::servers::http::{HttpServer, Reply};
use crate::support::{Store, stderr};
use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

const TARGET: &str = "/api/v3/projects";
/// The store's bound, and what a busy machine may add.
const BOUND: Duration = Duration::from_millis(1_500);
/// An exchange of this age is watched.
const WATCHED: Duration = Duration::from_millis(1_200);

fn request(method: &str, token: &str, fields: &str) -> String {
    format!("{method} {TARGET} HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: {token}\n{fields}\n")
}

/// A backend that sends a byte of an endless answer each 20 ms, and echoes in a tunnel.
fn endless() -> (HttpServer, Arc<AtomicBool>) {
    let done = Arc::new(AtomicBool::new(false));
    let ends = Arc::clone(&done);
    let server = HttpServer::start_raw(move |mut socket| {
        let (mut head, mut byte) = (Vec::new(), [0]);
        while !head.ends_with(b"\r\n\r\n") {
            if socket.read(&mut byte).unwrap_or(0) == 0 {
                return;
            }
            head.push(byte[0]);
        }
        if head.windows(9).any(|part| part.eq_ignore_ascii_case(b"websocket")) {
            let switching = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n";
            let _ = socket.write_all(switching.as_bytes());
            while socket.read(&mut byte).unwrap_or(0) > 0 && socket.write_all(&byte).is_ok() {}
            return;
        }
        let _ = socket.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
        while !ends.load(SeqCst) {
            if socket.write_all(b"1\r\nx\r\n").is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = socket.write_all(b"0\r\n\r\n");
    });
    (server, done)
}

fn revoke(store: &Store, token: &str) -> Instant {
    let output = store.token(&["revoke"], &[&sha256_hex(token)[..12]]);
    assert!(output.status.success(), "{}", stderr(&output));
    Instant::now()
}

/// Reads until the connection ends; says what came, and after how long.
fn to_the_end(client: &mut Client, since: Instant) -> (Vec<u8>, Duration) {
    let mut all = Vec::new();
    while let Some(bytes) = client.next_bytes() {
        all.extend(bytes);
    }
    (all, since.elapsed())
}

fn reasons(gateway: &Gateway) -> Vec<String> {
    gateway.access_log().iter().map(|line| line["reason"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_revoked_token_ends_what_goes_on() {
    let (backend, done) = endless();
    let store = Store::with([("stays-valid-0001", "bob")]);
    let gateway = Gateway::start(backend.address(), &store.section());
    let token = store.create("alice");
    let ask = |head: &str| {
        let mut client = gateway.client();
        client.send_head(head);
        client
    };
    let mut download = ask(&request("GET", &token, ""));
    let mut other = ask(&request("GET", "stays-valid-0001", ""));
    let handshake = "Connection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Version: 13\nSec-WebSocket-Key: dGhl\n";
    let mut tunnel = ask(&request("GET", &token, handshake));
    assert_eq!(tunnel.answer_to("HEAD").unwrap().status, 101);
    tunnel.send(b"ping");
    assert_eq!(tunnel.read_exactly(4), b"ping");
    std::thread::sleep(WATCHED);
    let revoked = revoke(&store, &token);
    let (got, after) = to_the_end(&mut download, revoked);
    assert!(got.starts_with(b"HTTP/1.1 200 ") && !got.ends_with(b"0\r\n\r\n"), "{}", String::from_utf8_lossy(&got));
    assert!(after < BOUND, "the download went on for {after:?}");
    let (_, after) = to_the_end(&mut tunnel, revoked);
    assert!(after < BOUND, "the tunnel went on for {after:?}");
    // Another one's goes on to its end.
    std::thread::sleep(Duration::from_millis(500));
    done.store(true, SeqCst);
    assert!(other.answer().body.len() > 20);
    eventually("all are logged", || reasons(&gateway).len() == 3);
    assert_eq!(reasons(&gateway).iter().filter(|reason| *reason == "revoked").count(), 2, "{:?}", reasons(&gateway));
    assert_eq!(gateway.metric("tollgate_exchanges_ended_total{reason=\"revoked\"}"), 2.0);
}

#[test]
fn a_revoked_token_ends_an_upload_and_a_request_that_waits() {
    let latch = Latch::default();
    let held = latch.clone();
    let upstream = Upstream::answering(move |_| {
        held.wait();
        Reply::ok("{}")
    });
    let store = Store::with([("stays-valid-0001", "bob")]);
    let gateway = Gateway::start(upstream.address, &store.section());
    let token = store.create("alice");
    let mut waiting = gateway.client();
    waiting.send_head(&request("GET", &token, ""));
    let mut upload = gateway.client();
    upload.send_head(&request("POST", &token, "Content-Type: application/octet-stream\nContent-Length: 1000000\n"));
    upload.send(&[b'x'; 1000]);
    std::thread::sleep(WATCHED);
    let revoked = revoke(&store, &token);
    for client in [&mut waiting, &mut upload] {
        let answer = client.answer();
        assert_eq!((answer.status, answer.text().as_str()), (401, "{\"message\":\"401 Unauthorized\"}"));
        assert!(revoked.elapsed() < BOUND, "{:?}", revoked.elapsed());
    }
    latch.open();
    assert_eq!(gateway.metric("tollgate_exchanges_ended_total{reason=\"revoked\"}"), 2.0);
}

/// No store tells of the end of a token's own time.
#[test]
fn an_expired_token_ends_what_goes_on() {
    let (backend, _done) = endless();
    let end = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() + 3;
    let store = Store::imported(&format!("{{\"token\":\"ends-soon-0001\",\"user\":\"alice\",\"expires\":{end}}}\n"));
    let gateway = Gateway::start(backend.address(), &store.section());
    let mut download = gateway.client();
    download.send_head(&request("GET", "ends-soon-0001", ""));
    let (got, after) = to_the_end(&mut download, Instant::now());
    assert!(got.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&got));
    assert!(after > Duration::from_secs(1) && after < Duration::from_secs(3) + BOUND, "{after:?}");
    eventually("it is logged", || reasons(&gateway) == ["expired"]);
}

/// The stores of the configuration in force are asked, not those that permitted the request.
#[test]
fn a_reload_that_puts_another_store_in_place_ends_what_that_one_does_not_know() {
    let (backend, _done) = endless();
    let (store, other) = (Store::with([("only-in-one-0001", "alice")]), Store::with([("only-in-other-1", "bob")]));
    let gateway = Gateway::start(backend.address(), &store.section());
    let mut download = gateway.client();
    download.send_head(&request("GET", "only-in-one-0001", ""));
    std::thread::sleep(WATCHED);
    gateway.rewrite(|config| config.replace(&store.section(), &other.section()));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    let (_, after) = to_the_end(&mut download, Instant::now());
    assert!(after < Duration::from_secs(1) + BOUND, "{after:?}");
    eventually("it is logged", || reasons(&gateway) == ["unknown"]);
}
