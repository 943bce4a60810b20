//! Faults of a backend, and what a client sees of each: the table of docs/faults.md, which `make faults-table` prints.

use crate::harness::{Client, GOOD, Gateway, free_port};
use crate::servers::http::HttpServer;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// What a backend does about a request, one after the other. Behind the last it ends the connection: by a reset if it has not
/// read all of the request.
#[derive(Clone, Copy)]
enum Act {
    /// The request to its end; without this, all but the last byte of its head.
    Read,
    Send(&'static str),
    /// A byte each so many milliseconds.
    Trickle(u64, &'static str),
    /// So many bytes in a header field.
    Fill(usize),
    /// Until the gateway ends the connection.
    Hang,
    /// The next request is answered. Only as the last one.
    Serve,
}

use Act::{Fill, Hang, Read, Send, Serve, Trickle};

/// The request comes on a connection that has carried one before. On a new one it is answered.
const KEPT: bool = true;
const NEW: bool = false;

const HELLO: &str = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";
const TIMEOUT: Duration = Duration::from_millis(300);

/// Fault, on which connection, what the backend does, what GET and POST then are answered; how often the backend was asked is said
/// where it was not once.
#[rustfmt::skip]
const FAULTS: &[(&str, bool, &[Act], &str, &str)] = &[
    ("resets the connection when the request comes", NEW, &[], "502", "502"),
    ("closes it after the request", NEW, &[Read], "502", "502"),
    ("resets a kept connection when the next request comes", KEPT, &[], "200, asked 2 times", "502"),
    ("closes a kept connection when the next request has come", KEPT, &[Read], "200, asked 2 times", "502"),
    ("takes the request and is silent", NEW, &[Read, Hang], "504", "504"),
    ("is silent within the head of its answer", NEW, &[Read, Send("HTTP/1.1 200 OK\r\nX: "), Hang], "504", "504"),
    ("is silent within the body", NEW, &[Read, Send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello"), Hang], "200, cut", "200, cut"),
    ("sends a byte each 20 ms", NEW, &[Read, Trickle(20, HELLO), Serve], "200", "200"),
    ("closes within the head", NEW, &[Read, Send("HTTP/1.1 200 OK\r\nContent-")], "502", "502"),
    ("closes between head and body", NEW, &[Read, Send("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")], "200, cut", "200, cut"),
    ("closes within the body", NEW, &[Read, Send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")], "200, cut", "200, cut"),
    ("closes within a chunk", NEW, &[Read, Send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\na\r\nhello")], "200, cut", "200, cut"),
    ("closes before the last chunk", NEW, &[Read, Send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")], "200, cut", "200, cut"),
    ("closes after a whole answer that ends with the connection", NEW, &[Read, Send("HTTP/1.1 200 OK\r\n\r\nhello")], "200", "200"),
    ("sends bytes that are no HTTP", NEW, &[Read, Send("SSH-2.0-OpenSSH_9.6\r\n"), Hang], "502", "502"),
    ("sends a chunk size that is none, right behind its head", NEW, &[Read, Send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n"), Hang], "502", "502"),
    ("sends a head of 1 MB", NEW, &[Read, Send("HTTP/1.1 200 OK\r\n"), Fill(1_000_000), Hang], "502", "502"),
    ("says two lengths", NEW, &[Read, Send("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!"), Hang], "502", "502"),
    ("says a length and chunks", NEW, &[Read, Send("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"), Hang], "502", "502"),
    ("sends more than its length", NEW, &[Read, Send("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello!"), Hang], "502", "502"),
    ("sends a body behind 204", NEW, &[Read, Send("HTTP/1.1 204 No Content\r\n\r\nhello"), Hang], "502", "502"),
    ("sends 103 and then its answer", NEW, &[Read, Send("HTTP/1.1 103 Early Hints\r\nLink: </s>\r\n\r\n"), Send(HELLO), Serve], "103, 200", "103, 200"),
    ("closes after 103", NEW, &[Read, Send("HTTP/1.1 103 Early Hints\r\nLink: </s>\r\n\r\n")], "103, 502", "103, 502"),
    ("sends 101 that nobody asked for", NEW, &[Read, Send("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n"), Hang], "502", "502"),
];

/// Of a POST whose client has not sent all: it waits for an answer with half of the body.
const EARLY: &[(&str, &[Act], &str)] = &[
    ("answers before it has read the request's body", &[Send(HELLO), Hang], "200"),
    (
        "refuses the body and resets the connection",
        &[Send("HTTP/1.1 413 Too Large\r\nContent-Length: 5\r\nConnection: close\r\n\r\nlarge")],
        "413",
    ),
    ("resets the connection within the request's body", &[], "502"),
];

fn backend(acts: &'static [Act], kept: bool, asked: &Arc<AtomicUsize>) -> HttpServer {
    let asked = Arc::clone(asked);
    HttpServer::start_raw(move |mut socket| {
        for nth in 0.. {
            let Some(head) = read_head_but_a_byte(&mut socket) else { return };
            let warm = head.contains("/warm");
            if !warm {
                asked.fetch_add(1, SeqCst);
            }
            if warm || (kept && nth == 0) {
                read_rest(&mut socket, &head);
                let _ = socket.write_all(HELLO.as_bytes());
                continue;
            }
            acts.iter().for_each(|act| play(*act, &mut socket, &head));
            if !matches!(acts, [.., Serve]) {
                return;
            }
        }
    })
}

fn play(act: Act, socket: &mut TcpStream, head: &str) {
    // The gateway may have given up before all is sent.
    let _: std::io::Result<()> = match act {
        Send(text) => socket.write_all(text.as_bytes()),
        Fill(length) => socket.write_all(&[&b"X: "[..], &vec![b'a'; length]].concat()),
        Trickle(pause, text) => text.bytes().try_for_each(|byte| {
            std::thread::sleep(Duration::from_millis(pause));
            socket.write_all(&[byte])
        }),
        Read => {
            read_rest(socket, head);
            Ok(())
        }
        Serve => Ok(()),
        Hang => {
            while socket.read(&mut [0; 4096]).is_ok_and(|count| count > 0) {}
            Ok(())
        }
    };
}

fn read_head_but_a_byte(socket: &mut TcpStream) -> Option<String> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r") {
        if socket.read(&mut byte).unwrap_or(0) == 0 {
            return None;
        }
        head.push(byte[0]);
    }
    Some(String::from_utf8_lossy(&head).to_ascii_lowercase())
}

fn read_rest(socket: &mut TcpStream, head: &str) {
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.trim().parse().ok()).unwrap_or(0);
    let _ = socket.read_exact(&mut vec![0; 1 + length]);
}

fn gateway(backend: SocketAddr) -> Gateway {
    let upstream = format!(
        "[[upstream]]\nname = \"api\"\nservers = [\"{backend}\"]\nconnect_timeout = \"300ms\"\nread_timeout = \"300ms\"\n"
    );
    Gateway::start(backend, &upstream)
}

fn send(client: &mut Client, method: &str, path: &str, body: &str, length: usize) {
    let framing = match method {
        "POST" => format!("Content-Type: application/octet-stream\nContent-Length: {length}\n"),
        _ => String::new(),
    };
    client.send_head(&format!("{method} /api/v3/{path} HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: {GOOD}\n{framing}\n"));
    client.send(body.as_bytes());
}

/// Statuses in their order, and whether the last answer was cut.
fn answers(client: &mut Client, method: &str) -> String {
    let mut statuses = Vec::new();
    loop {
        let Some(answer) = client.any_answer(method) else { return "nothing".into() };
        statuses.push(answer.status.to_string());
        if answer.status >= 200 {
            statuses.extend(answer.cut.then(|| "cut".into()));
            return statuses.join(", ");
        }
    }
}

fn seen(acts: &'static [Act], kept: bool, method: &str, body: &str, length: usize) -> String {
    let asked = Arc::new(AtomicUsize::new(0));
    let backend = backend(acts, kept, &asked);
    let gateway = gateway(backend.address());
    if kept {
        let mut client = gateway.client();
        send(&mut client, "GET", "warm", "", 0);
        assert_eq!(answers(&mut client, "GET"), "200");
    }
    let (mut client, began) = (gateway.client(), Instant::now());
    send(&mut client, method, "asked", body, length);
    let seen = answers(&mut client, method);
    assert_eq!(seen.contains("504"), seen.contains("504") && began.elapsed() >= TIMEOUT, "a timeout that was none");
    // The next client gets its own answer, whatever this one got.
    let mut next = gateway.client();
    send(&mut next, "GET", "warm", "", 0);
    assert_eq!(answers(&mut next, "GET"), "200", "after {seen}");
    match asked.load(SeqCst) {
        1 => seen,
        count => format!("{seen}, asked {count} times"),
    }
}

/// A server that is stopped by a signal: the kernel takes connections for it.
fn stopped() -> (String, String) {
    let port = free_port();
    let program = "import http.server, sys\nclass H(http.server.BaseHTTPRequestHandler):\n protocol_version = 'HTTP/1.1'\n \
                   def do_GET(self):\n  self.send_response(200)\n  self.send_header('Content-Length', '0')\n  self.end_headers()\n \
                   def log_message(self, *_):\n  pass\nhttp.server.ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), H).serve_forever()";
    let mut server = Command::new("/usr/bin/python3")
        .args(["-c", program, &port.to_string()])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let signal = |name: &str| {
        assert!(Command::new("kill").args([name, &server.id().to_string()]).status().unwrap().success());
    };
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    crate::harness::eventually("the server listens", || TcpStream::connect(address).is_ok());
    let gateway = gateway(address);
    let ask = |method: &str| {
        let mut client = gateway.client();
        send(&mut client, method, "asked", "", 0);
        answers(&mut client, method)
    };
    assert_eq!(ask("GET"), "200");
    signal("-STOP");
    let seen = (ask("GET"), ask("POST"));
    signal("-CONT");
    crate::harness::eventually("it answers again", || ask("GET") == "200");
    drop(server.kill());
    drop(server.wait());
    seen
}

#[test]
fn every_fault_of_a_backend_has_its_answer() {
    let nobody = gateway(SocketAddr::from(([127, 0, 0, 1], free_port())));
    let refused = ["GET", "POST"].map(|method| {
        let mut client = nobody.client();
        send(&mut client, method, "asked", "", 0);
        answers(&mut client, method)
    });
    println!("| the backend | GET | POST |\n|---|---|---|");
    let (mut rows, mut wrong) = (Vec::new(), Vec::new());
    let mut row = |fault: &str, get: (&str, &str), post: (&str, &str)| {
        if get.0 != get.1 || post.0 != post.1 {
            wrong.push(format!("{fault}: GET {get:?}, POST {post:?} (seen, expected)"));
        }
        let row = format!("| {fault} | {} | {} |", get.0, post.0);
        println!("{row}");
        rows.push(row);
    };
    row("refuses connections", (&refused[0], "502"), (&refused[1], "502"));
    for (fault, kept, acts, get, post) in FAULTS {
        let saw = ["GET", "POST"].map(|method| {
            let body = if method == "POST" { "12345" } else { "" };
            seen(acts, *kept, method, body, body.len())
        });
        row(fault, (&saw[0], get), (&saw[1], post));
    }
    for (fault, acts, post) in EARLY {
        let saw = seen(acts, NEW, "POST", &"x".repeat(500), 1_000);
        row(fault, ("-", "-"), (&saw, post));
    }
    let (get, post) = stopped();
    row("is stopped (SIGSTOP)", (&get, "504"), (&post, "504"));
    assert!(wrong.is_empty(), "{wrong:#?}");
    let table = include_str!("../docs/faults.md").split("\n## ").next().unwrap();
    let missing: Vec<_> = rows.iter().filter(|row| !table.contains(row.as_str())).collect();
    assert!(missing.is_empty(), "docs/faults.md has no {missing:#?}");
    assert_eq!(
        table.lines().filter(|line| line.starts_with("| ")).count(),
        rows.len() + 1,
        "docs/faults.md has other rows"
    );
}
