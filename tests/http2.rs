//! HTTP/2 from clients that nobody here wrote: frames by hand with the hpack package, and curl. What is refused never reaches
//! the backend, floods are cut, and a shutdown loses nothing.

use crate::harness::{Client, GOOD, Gateway, Reply, Upstream, eventually, free_port};
use crate::support::{stderr, stdout};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Command, Output};
use std::time::Duration;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

fn gateway(upstream: &Upstream, more: &str) -> (Gateway, SocketAddr) {
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
    (Gateway::start(upstream.address, &format!("{more}[[listener]]\naddress = \"{at}\"\n")), at)
}

fn curl(at: SocketAddr, target: &str, more: &[&str]) -> Output {
    let mut command = Command::new("curl");
    command.args(["-sS", "--max-time", "20", "--http2-prior-knowledge", "-H", &format!("PRIVATE-TOKEN: {GOOD}")]);
    command
        .args(["-w", "\n%{http_code} %{http_version}"])
        .args(more)
        .arg(format!("http://{at}{target}"))
        .output()
        .unwrap()
}

fn last_line(output: &Output) -> String {
    stdout(output).lines().last().unwrap_or_default().to_owned()
}

#[test]
fn every_case_of_rfc_9113_is_answered_as_it_says() {
    let upstream = Upstream::start();
    let (gateway, at) = gateway(&upstream, "[limits]\nbody_bytes = \"1MiB\"\n");
    let python = std::env::var("TOLLGATE_PY_VENV").unwrap_or_else(|_| "target/py-clients".into());
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/http2/frames.py");
    let output = Command::new(format!("{python}/bin/python"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args([script, &at.port().to_string(), GOOD])
        .output()
        .unwrap();
    let said = stdout(&output);
    println!("{said}");
    assert!(output.status.success(), "{said}{}", stderr(&output));
    let number = |name: &str| -> usize {
        let summary = said.lines().last().unwrap_or_default();
        let word = summary.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        word.and_then(|word| word.parse().ok()).unwrap_or_else(|| panic!("{name}: {summary}"))
    };
    assert_eq!((number("cases"), number("failed")), (103, 0));
    eventually("all has ended", || gateway.metric("tollgate_requests_in_flight") == 0.0);
    let (seen, least) = (upstream.seen().len(), number("forwarded"));
    assert!((least..=least + number("undecided")).contains(&seen), "{seen} requests at the backend, {least} expected");
    assert_eq!(upstream.violations(), Vec::<String>::new());
    let cookies: Vec<_> = upstream.seen().iter().filter_map(|seen| seen.header("Cookie").map(str::to_owned)).collect();
    assert_eq!(cookies, Vec::<String>::new(), "cookies are stripped by default");
}

#[test]
fn bodies_answers_and_refusals_are_those_of_http1() {
    let upstream = Upstream::answering(|seen| match seen.target.as_str() {
        "/api/v3/large" => Reply::ok(&"x".repeat(3_000_000)),
        "/api/v3/late" => Reply::ok("late").after(Duration::from_millis(300)),
        _ => Reply::ok(&seen.body.len().to_string()),
    });
    let (gateway, at) = gateway(&upstream, "");
    let large = curl(at, "/api/v3/large", &[]);
    assert_eq!((last_line(&large).as_str(), large.stdout.len()), ("200 2", 3_000_006));
    assert_eq!(last_line(&curl(at, "/api/v3/late", &["-I"])), "200 2", "HEAD");
    let file = gateway.folder.0.join("body");
    for size in [0, 1, 5_000_000] {
        std::fs::write(&file, vec![b'x'; size]).unwrap();
        let from = format!("@{}", file.display());
        let answer = curl(at, "/api/v3/up", &["-H", "Content-Type: application/octet-stream", "--data-binary", &from]);
        assert_eq!(stdout(&answer), format!("{size}\n200 2"), "{}", stderr(&answer));
    }
    for (more, status) in [
        (&["-H", "PRIVATE-TOKEN: another"][..], 401),
        (&["-d", "private_token=another"], 401),
        (&["-H", "Sudo: root"], 403),
        (&["-X", "PURGE"], 405),
    ] {
        assert_eq!(last_line(&curl(at, "/api/v3/x", more)), format!("{status} 2"), "{more:?}");
    }
}

#[test]
fn a_client_that_gives_up_ends_the_work_for_it() {
    let (upstream, _closed) = Upstream::holding(|_| true, "never");
    let (gateway, at) = gateway(&upstream, "");
    let url = "/api/v3/projects";
    let gone = curl(at, url, &["--max-time", "1"]);
    assert_eq!(gone.status.code(), Some(28), "{}", stderr(&gone));
    eventually("the request has ended", || gateway.metric("tollgate_requests_in_flight") == 0.0);
    let line = gateway.access_log().pop().unwrap();
    assert_eq!((line["reason"].as_str(), line["protocol"].as_str()), (Some("client_gone"), Some("HTTP/2")));
}

#[test]
fn a_shutdown_serves_what_is_open() {
    let (upstream, latch) = Upstream::holding(|_| true, "done");
    let (mut gateway, at) = gateway(&upstream, "");
    let waiting = std::thread::spawn(move || curl(at, "/api/v3/projects", &[]));
    eventually("it is under way", || upstream.seen().len() == 1);
    gateway.signal("TERM");
    eventually("the listener is closed", || Client::try_connect(at).is_none());
    latch.open();
    let answer = waiting.join().unwrap();
    assert_eq!(stdout(&answer), "done\n200 2", "{}", stderr(&answer));
    let ended = gateway.try_ended(crate::harness::PATIENCE).and_then(|status| status.code());
    assert_eq!(ended, Some(0), "{}", gateway.process_log());
}

pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&size[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The head of a GET with a token.
pub(crate) fn get_head(path: &str, token: &str) -> Vec<u8> {
    let indexed = |name: u8, value: &str| [&[name, u8::try_from(value.len()).unwrap()], value.as_bytes()].concat();
    [vec![0x82, 0x86], indexed(0x04, path), indexed(0x01, "h.test"), literal("private-token", token)].concat()
}

/// `:method GET`, `:scheme http`, a path and an authority, without huffman or the dynamic table.
fn head() -> Vec<u8> {
    let literal = |name: u8, value: &str| [&[name, u8::try_from(value.len()).unwrap()], value.as_bytes()].concat();
    [vec![0x82, 0x86], literal(0x04, "/api/v3/projects"), literal(0x01, "h.test")].concat()
}

#[test]
fn floods_are_cut_and_counted_while_others_are_served() {
    let upstream = Upstream::start();
    let (gateway, at) = gateway(&upstream, "[limits]\nheader_timeout = \"1s\"\n");
    let before = gateway.memory();
    let reset = |n: u32| [frame(1, 5, n, &head()), frame(3, 0, n, &[0, 0, 0, 8])].concat();
    let open = frame(1, 0, 1, &head()[..3]);
    let floods: [(&str, Vec<u8>); 7] = [
        ("ping", frame(6, 0, 0, b"12345678").repeat(3_000)),
        ("settings", frame(4, 0, 0, b"").repeat(1_000)),
        ("priority", frame(2, 0, 3, &[0, 0, 0, 0, 1]).repeat(3_000)),
        ("rst_stream", (0..3_000).flat_map(|n| reset(2 * n + 1)).collect()),
        ("empty_data", [frame(1, 4, 1, &head()), frame(0, 0, 1, b"").repeat(2_000)].concat()),
        ("unknown", frame(0x55, 0, 0, b"x").repeat(1_000)),
        ("unfinished_head", open.clone()),
    ];
    let mut seen = 0;
    for (kind, bytes) in floods {
        let mut socket = TcpStream::connect(at).unwrap();
        socket.set_read_timeout(Some(crate::harness::PATIENCE)).unwrap();
        socket.write_all(PREFACE).unwrap();
        // It may be closed meanwhile.
        let _ = socket.write_all(&bytes);
        let (mut last, mut buffer) = (Vec::new(), [0; 65_536]);
        let ended = loop {
            match socket.read(&mut buffer) {
                Ok(0) => break true,
                Ok(n) => last = buffer[..n].to_vec(),
                Err(error) => {
                    break !matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut);
                }
            }
        };
        assert!(ended, "{kind}: the connection is not cut, {last:?}");
        assert_eq!(last_line(&curl(at, "/api/v3/projects", &[])), "200 2", "behind {kind}");
        let counted = format!("tollgate_http2_floods_total{{frame=\"{kind}\"}}");
        // The library has a bound of its own for some, and may be first.
        let text = gateway.metrics();
        assert!(
            text.contains(&counted) || matches!(kind, "rst_stream" | "empty_data"),
            "{kind} is not counted: {text}"
        );
        seen += 1;
    }
    assert_eq!(seen, 7);
    assert!(gateway.metric("tollgate_connections_limited_total{limit=\"http2_flood\"}") >= 5.0);
    let grown = gateway.memory().saturating_sub(before);
    assert!(grown < 20 * 1024 * 1024, "{grown} bytes more");
    assert!(gateway.process_log().contains("flood"));
}

#[test]
fn a_client_that_takes_nothing_holds_little_and_not_for_ever() {
    let upstream = Upstream::answering(|_| Reply::ok(&"x".repeat(5_000_000)));
    let (gateway, at) = gateway(&upstream, "");
    let before = gateway.memory();
    let literal = |name: &str, value: &str| {
        [
            &[0, u8::try_from(name.len()).unwrap()],
            name.as_bytes(),
            &[u8::try_from(value.len()).unwrap()],
            value.as_bytes(),
        ]
        .concat()
    };
    let asked = [head(), literal("private-token", GOOD)].concat();
    let sockets: Vec<_> = (0..4)
        .map(|_| {
            let mut socket = TcpStream::connect(at).unwrap();
            // INITIAL_WINDOW_SIZE 0: no byte of any body can be sent.
            socket.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
            socket.write_all(&frame(4, 0, 0, &[0, 4, 0, 0, 0, 0])).unwrap();
            (0..50).for_each(|n| socket.write_all(&frame(1, 5, 2 * n + 1, &asked)).unwrap());
            socket
        })
        .collect();
    eventually("all are at the backend", || upstream.seen().len() == 200);
    assert_eq!(last_line(&curl(at, "/api/v3/projects", &[])), "200 2");
    let each = gateway.memory().saturating_sub(before) / 200;
    assert!(each < 150 * 1024, "{each} bytes for each stream that takes nothing");
    drop(sockets);
    eventually("they are gone with their connections", || gateway.metric("tollgate_requests_in_flight") == 0.0);
}

/// A literal field without huffman or the dynamic table.
fn literal(name: &str, value: &str) -> Vec<u8> {
    let length = |text: &str| u8::try_from(text.len()).unwrap();
    [&[0, length(name)], name.as_bytes(), &[length(value)], value.as_bytes()].concat()
}

/// The head of a POST, whose body follows.
fn post_head(path: &str) -> Vec<u8> {
    let indexed = |name: u8, value: &str| [&[name, u8::try_from(value.len()).unwrap()], value.as_bytes()].concat();
    let plain = [vec![0x83, 0x86], indexed(0x04, path), indexed(0x01, "h.test")].concat();
    [plain, literal("private-token", GOOD), literal("content-type", "application/octet-stream")].concat()
}

/// One connection by hand: reads frames, and keeps them.
pub(crate) struct Frames {
    socket: TcpStream,
    buffer: Vec<u8>,
}

impl Frames {
    pub(crate) fn connect(at: SocketAddr) -> Self {
        let mut socket = TcpStream::connect(at).unwrap();
        socket.set_nodelay(true).unwrap();
        socket.set_read_timeout(Some(crate::harness::PATIENCE)).unwrap();
        socket.write_all(PREFACE).unwrap();
        let mut frames = Self { socket, buffer: Vec::new() };
        // The windows are those of the gateway's SETTINGS once they are acknowledged.
        while !matches!(frames.next(), Some((4, 0, ..))) {}
        frames.send(&frame(4, 1, 0, b""));
        frames
    }

    pub(crate) fn send(&mut self, frame: &[u8]) {
        self.socket.write_all(frame).unwrap();
    }

    /// The next frame: its kind, flags, stream and payload. `None`: the connection has ended, or nothing comes.
    pub(crate) fn next(&mut self) -> Option<(u8, u8, u32, Vec<u8>)> {
        loop {
            if let [a, b, c, kind, flags, stream @ ..] = &self.buffer[..]
                && let (Some(stream), size) = (stream.first_chunk(), u32::from_be_bytes([0, *a, *b, *c]) as usize)
                && self.buffer.len() >= 9 + size
            {
                let (kind, flags, stream) = (*kind, *flags, u32::from_be_bytes(*stream));
                let payload = self.buffer[9..9 + size].to_vec();
                self.buffer.drain(..9 + size);
                return Some((kind, flags, stream, payload));
            }
            let mut piece = [0; 16_384];
            match self.socket.read(&mut piece) {
                Ok(n @ 1..) => self.buffer.extend_from_slice(&piece[..n]),
                _ => return None,
            }
        }
    }

    /// The body of a stream's answer, to its end.
    pub(crate) fn body(&mut self, wanted: u32) -> String {
        let mut body = Vec::new();
        while let Some((kind, flags, stream, payload)) = self.next() {
            if stream == wanted && kind == 0 {
                body.extend(payload);
            }
            if stream == wanted && matches!(kind, 0 | 1) && flags & 1 != 0 {
                return String::from_utf8(body).unwrap();
            }
            assert!(stream != wanted || kind != 3, "the stream is reset: {body:?}");
        }
        panic!("no whole answer for stream {wanted}");
    }
}

const RATE: &str = "[limits]\nbody_rate = \"500B\"\nbody_grace = \"1s\"\n";

#[test]
fn a_stream_below_the_least_rate_ends_and_the_others_go_on() {
    let upstream = Upstream::start();
    let (gateway, at) = gateway(&upstream, RATE);
    let mut client = Frames::connect(at);
    client.send(&frame(1, 4, 1, &post_head("/api/v3/slow")));
    client.send(&frame(1, 4, 3, &post_head("/api/v3/quick")));
    let began = std::time::Instant::now();
    let is_logged = || gateway.access_log().iter().any(|line| line["reason"] == "body_rate");
    while !is_logged() {
        assert!(began.elapsed() < crate::harness::PATIENCE, "not refused");
        // Fast enough for its own sake, and no help to the other one.
        client.send(&frame(0, 0, 3, &[b'x'; 200]));
        client.send(&frame(0, 0, 1, b"0123456789"));
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!((1..3).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    assert_eq!(client.body(1), "{\"message\":\"408 Request Timeout\"}");
    client.send(&frame(0, 1, 3, b"x"));
    assert_eq!(client.body(3), "{\"ok\":true}");
    assert_eq!(gateway.metric("tollgate_slow_bodies_total{reason=\"body_rate\"}"), 1.0);
}

/// Four bodies that nobody reads fill the window of the connection: the fifth one cannot be sent, and is not slow.
#[test]
fn a_body_that_is_held_back_by_others_is_not_slow() {
    let (upstream, latch) = Upstream::holding(|seen| seen.target == "/api/v3/held", "ok");
    let other = Upstream::start();
    let more = format!(
        "{RATE}[[route]]\npath = \"/api/v3/other\"\nupstream = \"b\"\n\
         [[upstream]]\nname = \"api\"\nservers = [\"{}\"]\nmax_requests = 1\nqueue_timeout = \"9s\"\n\
         [[upstream]]\nname = \"b\"\nservers = [\"{}\"]\n",
        upstream.address, other.address
    );
    let (gateway, at) = gateway(&upstream, &more);
    let mut client = Frames::connect(at);
    client.send(&frame(1, 5, 1, &get_head("/api/v3/held", GOOD)));
    eventually("the only place is taken", || upstream.seen().len() == 1);
    let waiting = [3, 5, 7, 9];
    for stream in waiting {
        client.send(&frame(1, 4, stream, &post_head("/api/v3/waiting")));
        (0..4).for_each(|_| client.send(&frame(0, 0, stream, &[b'x'; 16_384])));
    }
    client.send(&frame(1, 4, 11, &post_head("/api/v3/other")));
    eventually("the fifth is at its backend", || other.seen().len() == 1);
    std::thread::sleep(Duration::from_secs(3));
    latch.open();
    // A real client would wait for WINDOW_UPDATE; this one gives the gateway a moment, as a slow network would.
    std::thread::sleep(Duration::from_millis(500));
    client.send(&frame(0, 1, 11, b"x"));
    waiting.iter().for_each(|stream| client.send(&frame(0, 1, *stream, b"")));
    assert_eq!(client.body(11), "{\"ok\":true}");
    assert_eq!(gateway.metric("tollgate_slow_bodies_total{reason=\"body_rate\"}"), 0.0);
}

/// A client that is told to stop while it sends has to see why.
#[test]
fn the_answer_to_an_upload_that_is_refused_is_seen() {
    let upstream = Upstream::start();
    let (gateway, at) = gateway(&upstream, "[limits]\nbody_bytes = \"1MiB\"\n");
    let file = gateway.folder.0.join("body");
    std::fs::write(&file, vec![b'x'; 5_000_000]).unwrap();
    let file = file.to_str().unwrap();
    let typed = ["-H", "Content-Type: application/octet-stream"];
    for (more, answer) in [
        (&["-T", file][..], "{\"message\":\"413 Request Entity Too Large\"}\n413 2"),
        (&["-T", file, "-H", "Content-Length:"], "{\"message\":\"413 Request Entity Too Large\"}\n413 2"),
        (
            &["-T", file, "-H", "Content-Length:", "-H", "PRIVATE-TOKEN: another"],
            "{\"message\":\"401 Unauthorized\"}\n401 2",
        ),
        (
            &["-X", "POST", "-T", file, "-H", "Content-Length:", "-H", "Sudo: root"],
            "{\"message\":\"403 Forbidden\"}\n403 2",
        ),
    ] {
        for _ in 0..5 {
            let output = curl(at, "/api/v3/up", &[&typed, more].concat());
            assert_eq!((stdout(&output).as_str(), output.status.code()), (answer, Some(0)), "{}", stderr(&output));
        }
    }
}

/// Bytes that are on their way to streams which have just been reset are no attack, however many streams they are.
#[test]
fn what_is_still_sent_to_streams_that_were_answered_early_costs_nobody_the_connection() {
    let upstream = Upstream::start();
    let (_gateway, at) = gateway(&upstream, "");
    let mut client = Frames::connect(at);
    let streams: Vec<u32> = (0..120).map(|number| 2 * number + 1).collect();
    // Outside of the prefix: refused without a look at the body.
    streams.iter().for_each(|stream| client.send(&frame(1, 4, *stream, &post_head("/elsewhere"))));
    let mut reset = 0;
    while reset < streams.len() {
        match client.next() {
            Some((3, _, _, code)) => {
                assert_eq!(code, [0; 4], "NO_ERROR");
                reset += 1;
            }
            Some((7, ..)) | None => panic!("the connection ends after {reset} streams"),
            Some(_) => {}
        }
    }
    // A client far away, or on a slow line, does not know of it for a while.
    for pause in [0, 1_200, 0, 0] {
        std::thread::sleep(Duration::from_millis(pause));
        streams.iter().for_each(|stream| client.send(&frame(0, 0, *stream, b"x")));
    }
    client.send(&frame(1, 5, 1_001, &get_head("/api/v3/user", GOOD)));
    assert_eq!(client.body(1_001), "{\"ok\":true}");
}

#[test]
fn early_hints_pass_as_over_http1() {
    let upstream = Upstream::answering(|_| {
        Reply::raw(format!(
            "HTTP/1.1 103 Early Hints\r\nLink: </a.css?private_token={GOOD}&x=1>; rel=preload\r\n\r\n\
             HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody"
        ))
    });
    let (gateway, at) = gateway(&upstream, "");
    let answer = curl(at, "/api/v3/projects", &["-v"]);
    assert_eq!(stdout(&answer), "body\n200 2");
    let said = stderr(&answer);
    let hints = said.find("< HTTP/2 103").expect(&said);
    assert!(said.find("< HTTP/2 200").is_some_and(|last| last > hints), "{said}");
    assert!(said.contains("< link: </a.css?x=1>; rel=preload"), "{said}");
    // The client's own request is in there as well.
    assert!(!said.lines().any(|line| line.starts_with("< ") && line.contains(GOOD)), "{said}");
    let http1 = gateway.ask(&format!("GET /api/v3/projects HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\n\n"));
    assert_eq!((http1.status, http1.text().as_str()), (200, "body"));
}

/// RFC 8441 is not offered, and Upgrade does not exist.
#[test]
fn websockets_are_refused_and_the_connection_goes_on() {
    let upstream = Upstream::start();
    let (_gateway, at) = gateway(&upstream, "");
    let mut client = Frames::connect(at);
    let plain = get_head("/api/v3/socket", GOOD);
    let connect = [&[0x02, 7], &b"CONNECT"[..], &literal(":protocol", "websocket"), &plain[1..]].concat();
    client.send(&frame(1, 4, 1, &connect));
    let upgrade = [plain, literal("connection", "upgrade"), literal("upgrade", "websocket")].concat();
    client.send(&frame(1, 5, 3, &upgrade));
    let mut ended = Vec::new();
    while ended.len() < 2 {
        let (kind, flags, stream, payload) = client.next().expect("the connection goes on");
        assert!(kind != 7, "GOAWAY");
        // 200 would be 0x88.
        assert!(kind != 1 || payload[0] != 0x88, "accepted");
        if (kind == 3 || matches!(kind, 0 | 1) && flags & 1 != 0) && !ended.contains(&stream) {
            ended.push(stream);
        }
    }
    assert_eq!(upstream.seen().len(), 0);
    client.send(&frame(1, 5, 5, &get_head("/api/v3/projects", GOOD)));
    assert_eq!(client.body(5), "{\"ok\":true}");
}
