//! Slow clients and large requests: they are cut off as configured, cost little until then, and no input takes more CPU
//! time than is proportional to its length.

use crate::harness::*;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

const LIMITS: &str = "[limits]\nheader_timeout = \"2s\"\nidle_timeout = \"4s\"\n";
const HEADER_TIMEOUT: Duration = Duration::from_secs(2);
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// How a slow client continues.
enum Pace {
    /// A piece every so often.
    Drip(&'static [u8], Duration),
    Silence,
}

const BYTES: Pace = Pace::Drip(b"a", Duration::from_millis(100));
const LINES: Pace = Pace::Drip(b"X: y\r\n", Duration::from_millis(500));

/// Sends a start, continues slowly, and returns when the gateway closed the connection and what it sent.
fn cut_after(mut socket: TcpStream, start: &[u8], pace: Pace) -> (Duration, String) {
    socket.write_all(start).unwrap();
    let began = Instant::now();
    let (piece, pause) = match pace {
        Pace::Drip(piece, pause) => (piece, pause),
        Pace::Silence => (&b""[..], Duration::from_millis(50)),
    };
    socket.set_read_timeout(Some(pause)).unwrap();
    let mut said = Vec::new();
    loop {
        assert!(began.elapsed() < PATIENCE, "still open after {PATIENCE:?}: {:?}", String::from_utf8_lossy(&said));
        let mut buffer = [0; 4096];
        match socket.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => said.extend_from_slice(&buffer[..n]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                if socket.write_all(piece).is_err() {
                    break;
                }
            }
            Err(_) => break,
        }
    }
    (began.elapsed(), String::from_utf8(said).unwrap())
}

fn assert_about(what: &str, took: Duration, expected: Duration) {
    let difference = took.abs_diff(expected);
    assert!(difference < Duration::from_secs(1), "{what}: cut after {took:?} instead of {expected:?}");
}

/// A connection that has had one request answered.
fn used(gateway: &Gateway) -> TcpStream {
    let mut client = gateway.client();
    client.send_head(&format!("GET /api/v3/x HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\n\n"));
    assert_eq!(client.answer().status, 200);
    client.socket
}

#[test]
fn slow_heads_are_cut_at_the_deadline() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, LIMITS);
    let head = b"GET /api/v3/x HTTP/1.1\r\nHost: h\r\nX: ";
    let lines = b"GET /api/v3/x HTTP/1.1\r\nHost: h\r\n";
    let fresh = || TcpStream::connect(gateway.address).unwrap();
    type Start<'a> = (&'a str, TcpStream, &'a [u8], Pace, Duration, bool);
    let cases: Vec<Start<'_>> = vec![
        ("a byte at a time", fresh(), head, BYTES, HEADER_TIMEOUT, true),
        ("a method, a byte at a time", fresh(), b"G", BYTES, HEADER_TIMEOUT, true),
        ("a line at a time", fresh(), lines, LINES, HEADER_TIMEOUT, true),
        ("half a head and silence", fresh(), lines, Pace::Silence, HEADER_TIMEOUT, true),
        ("empty lines and silence", fresh(), b"\r\n", Pace::Silence, HEADER_TIMEOUT, true),
        ("no byte at all", fresh(), b"", Pace::Silence, HEADER_TIMEOUT, false),
        ("later, a byte at a time", used(&gateway), head, BYTES, HEADER_TIMEOUT, true),
        ("later, a line at a time", used(&gateway), lines, LINES, HEADER_TIMEOUT, true),
        ("later, half a head and silence", used(&gateway), lines, Pace::Silence, HEADER_TIMEOUT, true),
        ("idle between requests", used(&gateway), b"", Pace::Silence, IDLE_TIMEOUT, false),
    ];
    std::thread::scope(|scope| {
        for (name, socket, start, pace, expected, answered) in cases {
            scope.spawn(move || {
                let (took, said) = cut_after(socket, start, pace);
                assert_about(name, took, expected);
                if answered {
                    assert!(
                        said.starts_with("HTTP/1.1 408 ") && said.contains("Connection: close"),
                        "{name}: {said:?}"
                    );
                } else {
                    assert_eq!(said, "", "{name}");
                }
            });
        }
        // Other clients are served meanwhile.
        scope.spawn(|| {
            for _ in 0..20 {
                let began = Instant::now();
                assert_eq!(gateway.get("/api/v3/x").status, 200);
                assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
                std::thread::sleep(Duration::from_millis(100));
            }
        });
    });
}

/// The head's deadline must not apply to a slow body.
#[test]
fn a_slow_body_outlives_the_head_deadline() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, LIMITS);
    let mut client = gateway.client();
    client.send_head(&format!("POST /api/v3/x HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\nContent-Length: 6\n\n"));
    for byte in b"hello!" {
        std::thread::sleep(Duration::from_millis(500));
        client.send(&[*byte]);
    }
    assert_eq!(client.answer().status, 200);
    assert_eq!(upstream.only().body, b"hello!");
}

/// Opens connections that each send this much of a head and stop, and returns how much resident memory one of them costs.
/// The allocator requests memory in megabytes, so that the first connections are not measured.
fn cost_of_unfinished(gateway: &Gateway, length: usize, connections: u64) -> (u64, Vec<Client>) {
    let head = [&b"GET /api/v3/x HTTP/1.1\r\nHost: h\r\nX: "[..], &vec![b'a'; length]].concat();
    let mut clients = Vec::new();
    let mut open = |count: u64| {
        let mut most = 0;
        for _ in 0..count {
            let mut client = gateway.client();
            // The gateway may stop reading long before everything is sent.
            let _: std::io::Result<()> = client.socket.write_all(&head);
            clients.push(client);
            most = most.max(gateway.memory());
        }
        std::thread::sleep(Duration::from_millis(200));
        most.max(gateway.memory())
    };
    let before = open(50);
    let after = open(connections);
    (after.saturating_sub(before) / connections, clients)
}

/// Heads of 900 KB that never end, fifty and then two hundred more: refused, at little cost.
#[test]
fn unfinished_heads_cost_little() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let (each, clients) = cost_of_unfinished(&gateway, 900 * 1024, 200);
    assert!(each < 64 * 1024, "{each} bytes for each connection");
    for mut client in clients {
        let mut said = Vec::new();
        // A reset is accepted as well: the connection must be closed.
        let _: std::io::Result<usize> = client.socket.read_to_end(&mut said);
        let said = String::from_utf8_lossy(&said);
        assert!(said.is_empty() || said.starts_with("HTTP/1.1 431 "), "{said}");
    }
    assert_eq!(gateway.get("/api/v3/x").status, 200);
    assert_eq!(upstream.seen().len(), 1);
}

/// The same for heads just below the limit: a connection costs about as much as it may send.
#[test]
fn heads_below_the_limit_cost_about_the_limit() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let (each, clients) = cost_of_unfinished(&gateway, 31 * 1024, 200);
    assert!(each < 128 * 1024, "{each} bytes for each connection");
    assert_eq!(gateway.get("/api/v3/x").status, 200);
    assert_eq!(clients.len(), 250);
}

/// Twice the input may take twice the time, not four times.
#[test]
fn time_grows_with_length_and_not_faster() {
    const HALF: usize = 14 * 1024;
    let upstream = Upstream::start();
    let limits = "[limits]\nheader_bytes = \"64KiB\"\ntarget_bytes = \"40KiB\"\n";
    let gateway = Gateway::start(upstream.address, limits);
    // Without a token, so that only the examination is measured; the whole request is read.
    let shapes: &[(&str, &str, &str)] = &[
        ("ampersands", "/api/v3/x?", "&"),
        ("semicolons", "/api/v3/x?", ";"),
        ("brackets", "/api/v3/x?", "["),
        ("closing brackets", "/api/v3/x?private_token", "]"),
        ("escaped percent signs", "/api/v3/x?", "%25"),
        ("escaped letters", "/api/v3/", "%61"),
        ("tokens", "/api/v3/x?", "private_token=x&"),
        ("pages", "/api/v3/x?", "page=1&"),
        ("disguises", "/api/v3/x?", "[private%5Ftoken]=x&"),
        ("slashes", "/api/v3/", "/"),
        ("steps up", "/api/v3/", "../"),
        ("no steps up", "/api/v3/", ".../"),
        ("endings", "/api/v3/x", ".json"),
        ("parameters", "/api/v3/x", ";a"),
    ];
    let mut client = gateway.client();
    // CPU time, which other processes do not affect.
    let mut cost = |head: &str| {
        let bytes = head.replace('\n', "\r\n");
        let before = gateway.cpu_time();
        for _ in 0..60 {
            client.send(bytes.as_bytes());
            let answer = client.answer();
            assert!(matches!(answer.status, 400 | 401), "{}", answer.status);
        }
        gateway.cpu_time().saturating_sub(before).as_secs_f64()
    };
    let mut failures = Vec::new();
    let mut compare = |name: &str, once: &str, twice: &str| {
        // A single measurement may be off because of cold caches: up to three attempts.
        let ratios: Vec<f64> = (0..3).map(|_| cost(twice) / cost(once)).take_while_inclusive(3.0).collect();
        if ratios.iter().all(|ratio| *ratio >= 3.0) {
            failures.push(format!("{name}: {ratios:?}"));
        }
    };
    for (name, start, piece) in shapes {
        let head =
            |length: usize| format!("GET {start}{} HTTP/1.1\nHost: h\n\n", piece.repeat((length / piece.len()).max(1)));
        compare(name, &head(HALF), &head(2 * HALF));
    }
    let fields = |count: usize| format!("GET /api/v3/x HTTP/1.1\nHost: h\n{}\n", "Connection: a\n".repeat(count));
    compare("options", &fields(8), &fields(16));
    let fields = |count: usize| {
        format!("GET /api/v3/x HTTP/1.1\nHost: h\n{}\n", format!("PRIVATE_TOKEN: {}\n", "a".repeat(200)).repeat(count))
    };
    compare("fields", &fields(60), &fields(120));
    assert!(failures.is_empty(), "{failures:?}");
}

/// Stops after the first one that is small enough.
trait TakeWhileInclusive: Iterator<Item = f64> + Sized {
    fn take_while_inclusive(self, limit: f64) -> impl Iterator<Item = f64> {
        let mut over = false;
        self.take_while(move |ratio| !std::mem::replace(&mut over, *ratio < limit))
    }
}

impl<I: Iterator<Item = f64>> TakeWhileInclusive for I {}

const RATE: &str = "[limits]\nbody_rate = \"500B\"\nbody_grace = \"1s\"\n";

fn upload(framing: &str) -> Vec<u8> {
    let head = format!(
        "POST /api/v3/x HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\nContent-Type: application/octet-stream\n{framing}\n\n"
    );
    head.replace('\n', "\r\n").into_bytes()
}

#[test]
fn bodies_below_the_least_rate_are_cut_and_counted() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, RATE);
    let every = Duration::from_millis(100);
    let (length, chunked) = (upload("Content-Length: 100000"), upload("Transfer-Encoding: chunked"));
    // 100 bytes a second use a second up in 1.25.
    let cases: [(&str, &[u8], Pace); 4] = [
        ("with a length", &length, Pace::Drip(b"0123456789", every)),
        ("in chunks", &chunked, Pace::Drip(b"A\r\n0123456789\r\n", every)),
        ("a chunk's length that goes on", &chunked, Pace::Drip(b"0", every)),
        ("nothing at all", &length, Pace::Silence),
    ];
    std::thread::scope(|scope| {
        for (name, start, pace) in cases {
            let socket = TcpStream::connect(gateway.address).unwrap();
            scope.spawn(move || {
                let (took, said) = cut_after(socket, start, pace);
                assert_about(name, took, Duration::from_millis(1_250));
                let refused = said.starts_with("HTTP/1.1 408 ") && said.contains("Connection: close");
                // What is no size of a chunk is found after 16 digits.
                assert!(refused || name.starts_with("a chunk's"), "{name}: {said:?}");
            });
        }
    });
    let reasons = || -> Vec<String> {
        gateway.access_log().iter().filter_map(|line| line["reason"].as_str().map(str::to_owned)).collect()
    };
    eventually("all are logged", || reasons().len() == 4);
    let slow = reasons().iter().filter(|reason| *reason == "body_rate").count();
    assert!(slow >= 3, "{:?}", reasons());
    assert_eq!(gateway.metric("tollgate_slow_bodies_total{reason=\"body_rate\"}"), slow as f64);
}

#[test]
fn bodies_above_the_least_rate_are_not_cut_and_may_pause_for_what_they_were_faster() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, RATE);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut steady = gateway.client();
            steady.send(&upload("Content-Length: 2800"));
            for _ in 0..40 {
                steady.send(&[b'x'; 70]);
                std::thread::sleep(Duration::from_millis(100));
            }
            assert_eq!(steady.answer().status, 200);
        });
        scope.spawn(|| {
            let mut pausing = gateway.client();
            pausing.send(&upload("Content-Length: 5001"));
            pausing.send(&[b'x'; 5000]);
            // Ten seconds were bought.
            std::thread::sleep(Duration::from_secs(4));
            pausing.send(b"x");
            assert_eq!(pausing.answer().status, 200);
        });
    });
    assert_eq!(gateway.metric("tollgate_slow_bodies_total{reason=\"body_rate\"}"), 0.0);
}

/// A backend that takes nothing makes every client slow.
#[test]
fn time_that_the_backend_takes_does_not_count_against_the_client() {
    const SIZE: usize = 32 << 20;
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let wait = std::sync::Mutex::new(wait);
    let upstream = crate::servers::http::HttpServer::start_raw(move |mut socket| {
        let mut piece = vec![0; 256 * 1024];
        let Ok(n @ 1..) = socket.read(&mut piece) else { return };
        let mut total = n - find(&piece[..n], b"\r\n\r\n").unwrap() - 4;
        let _: Result<(), _> = wait.lock().unwrap().recv_timeout(PATIENCE);
        while total < SIZE {
            match socket.read(&mut piece) {
                Ok(n @ 1..) => total += n,
                _ => return,
            }
        }
        let _: std::io::Result<()> = socket.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    });
    // A rate that is missed by far if the pause counts.
    let gateway = Gateway::start(upstream.address(), "[limits]\nbody_rate = \"64MiB\"\nbody_grace = \"1s\"\n");
    let mut client = gateway.client();
    client.send(&upload(&format!("Content-Length: {SIZE}")));
    let mut socket = client.socket.try_clone().unwrap();
    let sender = std::thread::spawn(move || {
        // It may be refused meanwhile, which is seen below.
        let mut send = |count: usize| (0..count).all(|_| socket.write_all(&[b'x'; 1 << 20]).is_ok());
        let most = send((SIZE >> 20) - 1);
        // A pause that the grace allows once, if nothing else has used it up.
        std::thread::sleep(Duration::from_millis(700));
        most && send(1)
    });
    std::thread::sleep(Duration::from_secs(4));
    assert!(!sender.is_finished(), "the backend holds nothing back");
    go.send(()).unwrap();
    assert_eq!(client.answer().status, 200);
    assert!(sender.join().unwrap());
}
