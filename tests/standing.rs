//! What goes on when its token ends: downloads, uploads, waiting requests and tunnels. Each within the store's bound, and
//! nobody else's.

use crate::harness::{Client, FRAMEWORK_LANE, Gateway, Latch, PATIENCE, Upstream, eventually, sha256_hex};
use crate::http2::{Frames, frame, get_head};
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

const HANDSHAKE: &str = "Connection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Version: 13\nSec-WebSocket-Key: dGhl\n";
const UPLOAD: &str = "Content-Type: application/octet-stream\nContent-Length: 1000000\n";

fn request(method: &str, token: &str, fields: &str) -> String {
    format!("{method} {TARGET} HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: {token}\n{fields}\n")
}

/// A backend that sends a byte of an endless answer each 20 ms, echoes in a tunnel, and reads what is posted without an answer.
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
        if head.starts_with(b"POST ") {
            while socket.read(&mut [0; 4096]).unwrap_or(0) > 0 {}
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

/// Reads until the connection ends, or for so long; says what came, and after how long.
fn to_the_end(client: &mut Client, since: Instant) -> (Vec<u8>, Duration) {
    let mut all = Vec::new();
    while since.elapsed() < PATIENCE
        && let Some(bytes) = client.next_bytes()
    {
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
    let mut tunnel = ask(&request("GET", &token, HANDSHAKE));
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

/// The streams of one connection have tokens of their own.
#[test]
fn over_http2_a_revoked_token_ends_its_streams_and_no_others() {
    let (backend, done) = endless();
    let store = Store::with([("stays-valid-0001", "bob")]);
    let at = std::net::SocketAddr::from((std::net::Ipv4Addr::LOCALHOST, crate::harness::free_port()));
    let gateway = Gateway::start(backend.address(), &format!("{}[[listener]]\naddress = \"{at}\"\n", store.section()));
    let token = store.create("alice");
    let mut client = Frames::connect(at);
    client.send(&frame(1, 5, 1, &get_head(TARGET, &token)));
    client.send(&frame(1, 5, 3, &get_head(TARGET, "stays-valid-0001")));
    // Both have to be under way when the token ends.
    let mut begun = [false; 2];
    while begun != [true; 2] {
        let (kind, _, stream, _) = client.next().expect("both answers begin");
        begun[usize::from(stream == 3)] |= kind == 0;
    }
    std::thread::sleep(WATCHED);
    let revoked = revoke(&store, &token);
    let reset = loop {
        let (kind, flags, stream, payload) = client.next().expect("the connection goes on");
        assert!(kind != 7 && (kind != 0 || flags & 1 == 0), "no whole answer, no GOAWAY");
        if kind == 3 {
            break (stream, payload);
        }
    };
    assert!(revoked.elapsed() < BOUND, "the download went on for {:?}", revoked.elapsed());
    assert_eq!(reset, (1, vec![0, 0, 0, 2]), "INTERNAL_ERROR, so that nobody takes it for whole");
    // The other one goes on, and comes to its end.
    for _ in 0..5 {
        let (kind, _, stream, _) = client.next().expect("the connection goes on");
        assert_eq!((kind, stream), (0, 3));
    }
    done.store(true, SeqCst);
    drop(client.body(3));
    eventually("all are logged", || reasons(&gateway).len() == 2);
    assert_eq!(reasons(&gateway), ["revoked", "ok"]);
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
    upload.send_head(&request("POST", &token, UPLOAD));
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

/// A record that says where its token may be used from, and with which methods, ends what goes on elsewhere and otherwise.
#[test]
fn new_networks_and_methods_end_what_goes_on() {
    let entry =
        |token: &str, keys: &str| format!("[[token]]\nsha256 = \"{}\"\nuser = \"a\"\n{keys}\n", sha256_hex(token));
    let (far, reads, free) = ("token-that-is-far", "token-that-reads", "token-that-is-free");
    let all = |far_keys: &str, reads_keys: &str, free_keys: &str| {
        entry(far, far_keys) + &entry(reads, reads_keys) + &entry(free, free_keys)
    };
    for framework in [false, true] {
        let (backend, done) = endless();
        let gateway = Gateway::start_on_lane_with(framework, backend.address(), Some(&all("", "", "")), "");
        let begin = |token: &str| {
            let mut client = gateway.client();
            client.send_head(&request("GET", token, ""));
            client
        };
        let (mut far, mut reads, mut free) = (begin(far), begin(reads), begin(free));
        std::thread::sleep(WATCHED);
        // A plan and a rate are for the next request; of those networks and methods, this request is.
        let tokens = all(
            "networks = [\"10.0.0.0/8\"]",
            "methods = [\"POST\"]",
            "plan = \"gold\"\nrate = \"1/h\"\nnetworks = [\"127.0.0.0/8\"]\nmethods = [\"GET\"]",
        );
        gateway.folder.write("tokens.toml", &tokens);
        let changed = Instant::now();
        for client in [&mut far, &mut reads] {
            let (got, after) = to_the_end(client, changed);
            assert!(
                got.starts_with(b"HTTP/1.1 200 ") && !got.ends_with(b"0\r\n\r\n"),
                "{}",
                String::from_utf8_lossy(&got)
            );
            assert!(after < BOUND, "it went on for {after:?}");
        }
        std::thread::sleep(Duration::from_millis(500));
        done.store(true, SeqCst);
        assert!(free.answer().body.len() > 20);
        eventually("all are logged", || reasons(&gateway).len() == 3);
        let mut found = reasons(&gateway);
        found.sort();
        assert_eq!(found, ["ok", "token_method", "token_network"]);
    }
}

/// Downloads, uploads and tunnels of eight clients, with two tokens of one user who is blocked.
#[test]
fn a_blocked_user_loses_all_that_goes_on() {
    for framework in [false, true] {
        let (backend, done) = endless();
        let store = Store::with([("stays-valid-0001", "bob")]);
        let gateway = Gateway::start_with(backend.address(), &store.section(), |command| {
            if framework {
                command.env(FRAMEWORK_LANE, "1");
            }
        });
        let tokens = [store.create("alice"), store.create("alice")];
        let clients: Vec<Client> = (0..8)
            .map(|number| {
                let (mut client, token) = (gateway.client(), &tokens[number % 2]);
                match number % 3 {
                    0 => client.send_head(&request("GET", token, "")),
                    1 => client.send_head(&request("POST", token, UPLOAD)),
                    _ => {
                        client.send_head(&request("GET", token, HANDSHAKE));
                        assert_eq!(client.answer_to("HEAD").unwrap().status, 101);
                        client.send(b"ping");
                        assert_eq!(client.read_exactly(4), b"ping");
                    }
                }
                client
            })
            .collect();
        let mut other = gateway.client();
        other.send_head(&request("GET", "stays-valid-0001", ""));
        std::thread::sleep(WATCHED);
        let output = store.token(&["block"], &["alice"]);
        assert!(output.status.success(), "{}", stderr(&output));
        let blocked = Instant::now();
        let ends: Vec<_> = clients
            .into_iter()
            .enumerate()
            .map(|(number, mut client)| {
                std::thread::spawn(move || match number % 3 {
                    // With its refusal, where there is one, the connection is not over yet.
                    1 => (client.next_bytes().unwrap_or_default(), blocked.elapsed()),
                    _ => to_the_end(&mut client, blocked),
                })
            })
            .collect();
        for (number, end) in ends.into_iter().enumerate() {
            let (got, after) = end.join().unwrap();
            let text = String::from_utf8_lossy(&got);
            assert!(after < BOUND, "framework: {framework}, client {number} went on for {after:?}");
            match number % 3 {
                0 => assert!(text.starts_with("HTTP/1.1 200 ") && !text.ends_with("0\r\n\r\n"), "{text}"),
                // The framework's lane ends the connection without a word.
                1 => assert!(text.starts_with("HTTP/1.1 401 ") || (framework && text.is_empty()), "{text}"),
                _ => assert!(text.is_empty(), "{text}"),
            }
        }
        done.store(true, SeqCst);
        assert!(other.answer().body.len() > 20);
        eventually("all are logged", || reasons(&gateway).len() == 9);
        let blocked = reasons(&gateway).iter().filter(|reason| *reason == "blocked").count();
        assert_eq!(blocked, 8, "framework: {framework}, {:?}", reasons(&gateway));
        assert_eq!(gateway.metric("tollgate_exchanges_ended_total{reason=\"blocked\"}"), 8.0);
    }
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
