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

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&size[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
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
