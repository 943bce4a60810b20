//! Section 5 of the contract, for HTTP/1.1: what is said of the client, what ends here, how bodies stream, and what is
//! done when a backend is gone or breaks off.

use crate::harness::*;
use crate::servers::HINT;
use crate::servers::http::{HttpServer, Step};
use crate::servers::nginx::nginx;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

const TARGET: &str = "/api/v3/projects";
const MEGABYTE: usize = 1024 * 1024;

/// A GET with the good token.
fn get(target: &str, headers: &str) -> String {
    format!("GET {target} HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: {GOOD}\n{headers}\n")
}

fn post(headers: &str) -> String {
    format!("POST {TARGET} HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: {GOOD}\n{headers}\n")
}

/// `[[upstream]]` with several servers.
fn servers(addresses: &[SocketAddr]) -> String {
    let list: Vec<String> = addresses.iter().map(|address| format!("\"{address}\"")).collect();
    format!("[[upstream]]\nname = \"api\"\nservers = [{}]\n", list.join(", "))
}

/// Reads up to the end of a head and gives it back, with what came behind it.
fn read_head(socket: &mut impl std::io::Read) -> Option<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let mut piece = [0; 4096];
    loop {
        if let Some(at) = find(&bytes, b"\r\n\r\n") {
            let rest = bytes.split_off(at + 4);
            return Some((String::from_utf8(bytes).unwrap(), rest));
        }
        match socket.read(&mut piece) {
            Ok(n @ 1..) => bytes.extend_from_slice(&piece[..n]),
            _ => return None,
        }
    }
}

// --- What is said of the client ---

#[test]
fn forwarded_headers_of_an_untrusted_client_are_dropped() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let lies = "X-Forwarded-For: 6.6.6.6\nx-forwarded-for: 7.7.7.7\nX-Forwarded-Proto: https\nX-Forwarded-Host: evil.test\n\
                X-Forwarded-Port: 6666\nX-Forwarded-Server: evil\nX-Forwarded-Prefix: /evil\nForwarded: for=6.6.6.6\n\
                X-Real-IP: 6.6.6.6\nX-Client-IP: 6.6.6.6\nX_Forwarded_For: 6.6.6.6\nX-Forwarded_For: 6.6.6.6\n";
    assert_eq!(gateway.ask(&get(TARGET, lies).replace("h.test", "h.test:8443")).status, 200);
    let seen = upstream.only();
    assert_eq!(seen.header("X-Forwarded-For"), Some("127.0.0.1"));
    assert_eq!(seen.header("X-Forwarded-Proto"), Some("http"));
    assert_eq!(seen.header("X-Forwarded-Host"), Some("h.test:8443"));
    assert_eq!(seen.header("X-Forwarded-Port"), Some("8443"));
    assert!(!["6.6.6.6", "7.7.7.7", "evil"].iter().any(|lie| seen.head.contains(lie)), "{}", seen.head);
    eventually("the log line", || gateway.access_log().len() == 1);
    assert_eq!(gateway.access_log()[0]["client"].as_str(), Some("127.0.0.1"));
}

#[test]
fn forwarded_headers_of_a_trusted_proxy_are_believed() {
    let upstream = Upstream::start();
    let config = "[server]\nlisten = [\"@LISTEN@\"]\nthreads = 1\ntrusted_proxies = [\"127.0.0.1\", \"10.0.0.0/8\"]\n";
    let gateway = Gateway::start(upstream.address, config);
    for (index, (headers, chain, client)) in [
        ("", "127.0.0.1", "127.0.0.1"),
        ("X-Forwarded-For: 192.0.2.7\n", "192.0.2.7, 127.0.0.1", "192.0.2.7"),
        // The nearest hop that is no proxy of ours: what stands before it is hearsay.
        ("X-Forwarded-For: 6.6.6.6, 192.0.2.7, 10.1.2.3\n", "6.6.6.6, 192.0.2.7, 10.1.2.3, 127.0.0.1", "192.0.2.7"),
        ("X-Forwarded-For: 192.0.2.7\nX-Forwarded-For: 10.1.2.3\n", "192.0.2.7, 10.1.2.3, 127.0.0.1", "192.0.2.7"),
        ("X-Forwarded-For: 2001:db8::1\n", "2001:db8::1, 127.0.0.1", "2001:db8::1"),
        ("X-Forwarded-For: 10.9.9.9, 10.1.2.3\n", "10.9.9.9, 10.1.2.3, 127.0.0.1", "10.9.9.9"),
        // What is no address ends the reading, whether the client wrote it or the nearest proxy.
        ("X-Forwarded-For: unknown, 192.0.2.7\n", "192.0.2.7, 127.0.0.1", "192.0.2.7"),
        ("X-Forwarded-For: 6.6.6.6, _hidden, 192.0.2.7, 10.1.2.3\n", "192.0.2.7, 10.1.2.3, 127.0.0.1", "192.0.2.7"),
        ("X-Forwarded-For: <junk>\nX-Forwarded-For: 192.0.2.7\n", "192.0.2.7, 127.0.0.1", "192.0.2.7"),
        ("X-Forwarded-For: 192.0.2.7, unknown\n", "127.0.0.1", "127.0.0.1"),
        ("X-Forwarded-For: 192.0.2.7,\n", "127.0.0.1", "127.0.0.1"),
        ("X-Forwarded-For: 192.0.2.7:4711\n", "192.0.2.7, 127.0.0.1", "192.0.2.7"),
        ("X-Forwarded-For: [2001:db8::1]:4711, ::ffff:10.1.2.3\n", "2001:db8::1, 10.1.2.3, 127.0.0.1", "2001:db8::1"),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(gateway.ask(&get(TARGET, headers)).status, 200, "{headers}");
        assert_eq!(upstream.only().header("X-Forwarded-For"), Some(chain), "{headers}");
        upstream.forget();
        eventually("the log line", || gateway.access_log().len() == index + 1);
        assert_eq!(gateway.access_log()[index]["client"].as_str(), Some(client), "{headers}");
    }
    let told = "X-Forwarded-Proto: https\nX-Forwarded-Host: git.test\nForwarded: for=6.6.6.6\nX-Real-IP: 6.6.6.6\n";
    gateway.ask(&get(TARGET, told));
    let seen = upstream.only();
    assert_eq!(seen.header("X-Forwarded-Proto"), Some("https"));
    assert_eq!(seen.header("X-Forwarded-Host"), Some("git.test"));
    assert_eq!(seen.header("X-Forwarded-Port"), Some("443"));
    assert_eq!((seen.header("Forwarded"), seen.header("X-Real-IP")), (None, None), "only one set of them is kept");
    upstream.forget();
    for (told, scheme) in [
        ("X-Forwarded-Proto: HTTPS\n", "https"),
        ("X-Forwarded-Proto: wss\n", "https"),
        ("X-Forwarded-Proto: ws\n", "http"),
        ("X-Forwarded-Proto: https, https\n", "https"),
        ("X-Forwarded-Proto: https\nx-forwarded-proto: https\n", "https"),
        ("X-Forwarded-Proto: https, http\n", "http"),
        ("X-Forwarded-Proto: http\nX-Forwarded-Proto: https\n", "http"),
    ] {
        gateway.ask(&get(TARGET, told));
        assert_eq!(upstream.only().header("X-Forwarded-Proto"), Some(scheme), "{told}");
        upstream.forget();
    }
    let nonsense = "X-Forwarded-Proto: gopher\nX-Forwarded-Host: a b\nX-Forwarded-Port: x\n";
    gateway.ask(&get(TARGET, nonsense));
    let seen = upstream.only();
    assert_eq!(
        (seen.header("X-Forwarded-Proto"), seen.header("X-Forwarded-Host"), seen.header("X-Forwarded-Port")),
        (Some("http"), Some("h.test"), Some("80"))
    );
}

/// A socket for both families shows an IPv4 peer as `::ffff:a.b.c.d`: the networks of the configuration, the log and the
/// backend know it as `a.b.c.d`.
#[test]
fn an_ipv4_peer_on_an_ipv6_socket_is_an_ipv4_peer() {
    let upstream = Upstream::start();
    let (front, networks) = (free_port(), ["127.0.0.0/8", "::ffff:127.0.0.0/104"]);
    for network in networks {
        let config = format!(
            "[server]\nlisten = [\"@LISTEN@\", \"[::]:{front}\"]\nthreads = 1\ntrusted_proxies = [\"{network}\"]\n"
        );
        let gateway = Gateway::start(upstream.address, &config);
        for (headers, chain, client) in
            [("", "127.0.0.1", "127.0.0.1"), ("X-Forwarded-For: 192.0.2.7\n", "192.0.2.7, 127.0.0.1", "192.0.2.7")]
        {
            let lines = gateway.access_log().len();
            let mut socket = Client::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, front)));
            socket.send_head(&get(TARGET, headers));
            assert_eq!(socket.answer().status, 200);
            assert_eq!(upstream.only().header("X-Forwarded-For"), Some(chain), "{network} {headers}");
            upstream.forget();
            eventually("the log line", || gateway.access_log().len() == lines + 1);
            assert_eq!(gateway.access_log()[lines]["client"].as_str(), Some(client), "{network} {headers}");
        }
    }
}

#[test]
fn a_request_id_is_taken_or_made_forwarded_answered_and_logged() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let (longest, too_long) = ("a".repeat(128), "a".repeat(129));
    let cases = [
        ("", None),
        ("X-Request-Id: abc-123_X\n", Some("abc-123_X")),
        (&format!("x-request-id: {longest}\n"), Some(longest.as_str())),
        (&format!("X-Request-Id: {too_long}\n"), None),
        ("X-Request-Id:\n", None),
        ("X-Request-Id: a b\n", None),
        ("X-Request-Id: \"x\"\n", None),
        ("X-Request-Id: caf\u{e9}\n", None),
        ("X-Request-Id: one\nX-Request-Id: two\n", None),
        ("X_Request_Id: one\n", None),
    ];
    let mut made = std::collections::HashSet::new();
    for (index, (headers, taken)) in cases.into_iter().enumerate() {
        let answer = gateway.ask(&get(TARGET, headers));
        let id = answer.header("X-Request-Id").unwrap().to_owned();
        match taken {
            Some(taken) => assert_eq!(id, taken),
            None => assert!(id.len() >= 16 && !headers.contains(&id) && made.insert(id.clone()), "{headers}: {id}"),
        }
        assert_eq!(upstream.only().header("X-Request-Id"), Some(id.as_str()), "{headers}");
        upstream.forget();
        eventually("the log line", || gateway.access_log().len() == index + 1);
        assert_eq!(gateway.access_log()[index]["request_id"].as_str(), Some(id.as_str()));
    }
    // A refusal has one as well, and a backend's own does not take its place.
    let refused = gateway.ask(&format!("GET {TARGET} HTTP/1.1\nHost: h\nX-Request-Id: mine\n\n"));
    assert_eq!((refused.status, refused.header("X-Request-Id")), (401, Some("mine")));
    let other =
        Upstream::answering(|_| Reply::raw("HTTP/1.1 200 OK\r\nX-Request-Id: theirs\r\nContent-Length: 0\r\n\r\n"));
    let gateway = Gateway::start(other.address, "");
    assert_eq!(gateway.ask(&get(TARGET, "X-Request-Id: mine\n")).header("X-Request-Id"), Some("mine"));
}

// --- What ends here ---

#[test]
fn hop_by_hop_headers_of_a_request_end_here() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let headers = "Connection: keep-alive, X-Mine\nX-Mine: 1\nKeep-Alive: timeout=5\nProxy-Connection: keep-alive\n\
                   Proxy-Authorization: Basic eDp5\nTE: trailers\nTrailer: X\nUpgrade: h2c\nHTTP2-Settings: AAA\nX-Kept: 1\n";
    assert_eq!(gateway.ask(&get(TARGET, headers)).status, 200);
    let seen = upstream.only();
    for name in [
        "X-Mine",
        "Keep-Alive",
        "Proxy-Connection",
        "Proxy-Authorization",
        "TE",
        "Trailer",
        "Upgrade",
        "HTTP2-Settings",
    ] {
        assert_eq!(seen.header(name), None, "{name}");
    }
    assert!(seen.header("Connection").is_none_or(|value| value == "keep-alive"), "{}", seen.head);
    assert_eq!((seen.header("X-Kept"), seen.header("Host")), (Some("1"), Some("h.test")));
}

/// A backend that got a request without what tollgate said of it would judge another request than tollgate did.
#[test]
fn connection_takes_away_nothing_that_tollgate_set_or_judged() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "[token]\nforward = \"both\"\n");
    let names = [
        "PRIVATE-TOKEN",
        "X-Tollgate-User",
        "X-Tollgate-Token-Id",
        "X-Forwarded-For",
        "X-Forwarded-Proto",
        "X-Forwarded-Host",
        "X-Forwarded-Port",
        "X-Request-Id",
        "Host",
        "Content-Length",
        "Content-Type",
    ];
    for name in names {
        for spelling in [name.to_owned(), name.to_lowercase(), format!("close, {name}")] {
            let request =
                post(&format!("Connection: {spelling}\nContent-Type: text/plain\nContent-Length: 2\n")) + "hi";
            let answer = gateway.ask(&request);
            if answer.status == 400 {
                // Refusing such a request is just as good.
                assert_eq!(upstream.seen().len(), 0);
                continue;
            }
            assert_eq!(answer.status, 200, "{spelling}");
            let seen = upstream.only();
            for kept in names {
                assert!(seen.header(kept).is_some(), "Connection: {spelling} took {kept} away: {}", seen.head);
            }
            assert_eq!(seen.body, b"hi");
            upstream.forget();
        }
    }
}

#[test]
fn hop_by_hop_and_internal_headers_of_an_answer_end_here() {
    let upstream = Upstream::answering(|_| {
        Reply::raw(
            "HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Theirs\r\nX-Theirs: 1\r\nKeep-Alive: timeout=5\r\n\
             Proxy-Connection: keep-alive\r\nTrailer: X\r\nTE: x\r\nUpgrade: h2c\r\nX-Sendfile: /etc/passwd\r\n\
             X-Accel-Redirect: /secret\r\nGitlab-Workhorse-Send-Data: x\r\nX-Kept: 1\r\nSet-Cookie: a=1\r\n\
             Set-Cookie: b=2\r\nContent-Length: 2\r\n\r\nhi",
        )
    });
    let gateway = Gateway::start(upstream.address, "");
    let answer = gateway.get(TARGET);
    assert_eq!((answer.status, answer.text()), (200, "hi".into()));
    for name in [
        "X-Theirs",
        "Keep-Alive",
        "Proxy-Connection",
        "Trailer",
        "TE",
        "Upgrade",
        "X-Sendfile",
        "X-Accel-Redirect",
        "Gitlab-Workhorse-Send-Data",
    ] {
        assert_eq!(answer.header(name), None, "{name}");
    }
    assert_eq!(answer.header("X-Kept"), Some("1"));
    let cookies: Vec<_> =
        answer.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case("set-cookie")).map(|(_, v)| v.as_str()).collect();
    assert_eq!(cookies, ["a=1", "b=2"]);
}

#[test]
fn everything_else_passes_as_it_is() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let headers = "Accept: */*\nACCEPT-Language: de, en;q=0.5\nIf-None-Match: \"x\"\nX-Twice: 1\nX-Twice: 2\nX-Empty:\n\
                   User-Agent: curl/8 (x; y)\nRange: bytes=0-1\nX-Bytes: caf\u{e9}\n";
    let target = "/api/v3/projects/group%2Fproject/issues/;x=1/%C3%A9?labels[]=a&q=%2B+%26&&x";
    assert_eq!(gateway.ask(&get(target, headers)).status, 200);
    let seen = upstream.only();
    assert_eq!((seen.target.as_str(), seen.header("Host")), (target, Some("h.test")));
    assert_eq!(seen.all("X-Twice"), ["1", "2"]);
    for (name, value) in [
        ("Accept", "*/*"),
        ("Accept-Language", "de, en;q=0.5"),
        ("If-None-Match", "\"x\""),
        ("User-Agent", "curl/8 (x; y)"),
        ("Range", "bytes=0-1"),
        ("X-Bytes", "caf\u{e9}"),
        ("X-Empty", ""),
    ] {
        assert_eq!(seen.header(name), Some(value));
    }
    assert!(seen.head.contains("ACCEPT-Language"), "a name's own spelling is kept: {}", seen.head);
}

#[test]
fn an_absolute_target_is_forwarded_in_origin_form() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    assert_eq!(gateway.ask(&get("http://h.test/api/v3/projects?page=2", "")).status, 200);
    assert_eq!(upstream.only().target, "/api/v3/projects?page=2");
}

// --- Bodies ---

#[test]
fn bodies_of_both_framings_pass_both_ways() {
    let upstream = Upstream::answering(|seen| {
        let body = String::from_utf8(seen.body.clone()).unwrap();
        match seen.target.as_str() {
            "/api/v3/chunked" => {
                let chunks: String = body
                    .as_bytes()
                    .chunks(7)
                    .map(|piece| format!("{:X}\r\n{}\r\n", piece.len(), String::from_utf8_lossy(piece)))
                    .collect();
                Reply::raw(format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}0\r\n\r\n"))
            }
            _ => Reply::ok(&body),
        }
    });
    let gateway = Gateway::start(upstream.address, "");
    let mut client = gateway.client();
    let long = "0123456789".repeat(5000);
    for body in ["", "x", "hello world", &long] {
        for target in ["/api/v3/length", "/api/v3/chunked"] {
            let head =
                format!("POST {target} HTTP/1.1\r\nHost: h\r\nPRIVATE-TOKEN: {GOOD}\r\nContent-Type: text/plain\r\n");
            let chunks: String = body
                .as_bytes()
                .chunks(1000)
                .map(|piece| format!("{:x};ext=1\r\n{}\r\n", piece.len(), String::from_utf8_lossy(piece)))
                .collect();
            for (framing, request) in [
                ("length", format!("{head}Content-Length: {}\r\n\r\n{body}", body.len())),
                ("chunked", format!("{head}Transfer-Encoding: chunked\r\n\r\n{chunks}0\r\n\r\n")),
            ] {
                // All on one connection: each ends where it should, or the next one would fail.
                client.send(request.as_bytes());
                let answer = client.answer();
                assert_eq!((answer.status, answer.cut), (200, false), "{framing} {target}");
                assert_eq!(answer.text(), body, "{framing} {target}");
                let seen = upstream.only();
                let expected = (framing == "chunked").then_some("chunked");
                assert_eq!(seen.header("Transfer-Encoding"), expected, "{framing} {target}");
                upstream.forget();
            }
        }
    }
}

/// The client takes nothing for a while, so that whatever is not held back piles up in the gateway.
#[test]
fn a_large_answer_streams_in_bounded_memory() {
    let size = 64 * MEGABYTE;
    let upstream = Upstream::answering(move |_| {
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n");
        Reply::raw(head).then(Step::Send(vec![b'x'; size]))
    });
    let gateway = Gateway::start(upstream.address, "");
    assert_eq!(gateway.ask("GET /other HTTP/1.1\nHost: h\n\n").status, 404);
    let before = gateway.memory();
    let mut client = gateway.client();
    client.send_head(&get(TARGET, ""));
    let (mut total, mut peak) = (0, 0);
    let mut piece = vec![0; 256 * 1024];
    let mut head = Vec::new();
    std::thread::sleep(Duration::from_millis(500));
    while total < size {
        peak = peak.max(gateway.memory());
        let n = client.socket.read(&mut piece).unwrap();
        assert!(n > 0, "cut after {total} bytes");
        if head.is_empty() {
            head = piece[..n].to_vec();
            total = n - find(&head, b"\r\n\r\n").unwrap() - 4;
        } else {
            total += n;
        }
    }
    assert_eq!(total, size);
    let grown = peak.saturating_sub(before) / MEGABYTE as u64;
    assert!(grown < 4, "grown by {grown} MB for an answer of 64");
}

/// The backend takes nothing for a while.
#[test]
fn a_large_request_streams_in_bounded_memory() {
    let size = 64 * MEGABYTE;
    let (go, wait) = mpsc::channel::<()>();
    let wait = std::sync::Mutex::new(wait);
    let upstream = HttpServer::start_raw(move |mut socket| {
        let Some((_, rest)) = read_head(&mut socket) else { return };
        wait.lock().unwrap().recv().unwrap();
        let mut total = rest.len();
        let mut piece = vec![0; 256 * 1024];
        while total < size {
            match socket.read(&mut piece) {
                Ok(n @ 1..) => total += n,
                _ => return,
            }
        }
        let body = total.to_string();
        socket
            .write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).as_bytes())
            .unwrap();
    });
    // The scanner has work to do as well: a form is looked through to its end.
    for content_type in ["application/octet-stream", "application/x-www-form-urlencoded"] {
        let gateway = Gateway::start(upstream.address(), "");
        assert_eq!(gateway.ask("GET /other HTTP/1.1\nHost: h\n\n").status, 404);
        let before = gateway.memory();
        let mut client = gateway.client();
        client.send_head(&post(&format!("Content-Type: {content_type}\nContent-Length: {size}\n")));
        let sender = {
            let mut socket = client.socket.try_clone().unwrap();
            std::thread::spawn(move || {
                let piece = vec![b'x'; 256 * 1024];
                (0..size / piece.len()).for_each(|_| socket.write_all(&piece).unwrap());
            })
        };
        std::thread::sleep(Duration::from_millis(500));
        let mut peak = gateway.memory();
        go.send(()).unwrap();
        while !sender.is_finished() {
            peak = peak.max(gateway.memory());
            std::thread::sleep(Duration::from_millis(5));
        }
        sender.join().unwrap();
        let answer = client.answer();
        assert_eq!((answer.status, answer.text()), (200, size.to_string()), "{content_type}");
        let grown = peak.saturating_sub(before) / MEGABYTE as u64;
        assert!(grown < 4, "grown by {grown} MB for a body of 64, {content_type}");
    }
}

/// Bytes of an answer go on as they come, not when all of it is there.
#[test]
fn an_answer_is_passed_on_while_it_is_still_coming() {
    let (go, wait) = mpsc::channel::<()>();
    let wait = std::sync::Mutex::new(wait);
    let upstream = HttpServer::start_raw(move |mut socket| {
        if read_head(&mut socket).is_none() {
            return;
        }
        socket.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n").unwrap();
        wait.lock().unwrap().recv().unwrap();
        socket.write_all(b"4\r\nlast\r\n0\r\n\r\n").unwrap();
    });
    let gateway = Gateway::start(upstream.address(), "");
    let mut client = gateway.client();
    client.send_head(&get(TARGET, ""));
    let mut early = Vec::new();
    let mut piece = [0; 4096];
    while find(&early, b"first").is_none() {
        let n = client.socket.read(&mut piece).expect("the first part, before the backend has sent the last");
        assert!(n > 0);
        early.extend_from_slice(&piece[..n]);
    }
    go.send(()).unwrap();
    while find(&early, b"0\r\n\r\n").is_none() {
        let n = client.socket.read(&mut piece).unwrap();
        assert!(n > 0);
        early.extend_from_slice(&piece[..n]);
    }
    assert!(find(&early, b"last").is_some());
}

#[test]
fn a_client_that_waits_for_100_gets_one_from_the_backend() {
    let (go, seen_before) = mpsc::channel();
    let go = std::sync::Mutex::new(go);
    let upstream = HttpServer::start_raw(move |mut socket| {
        let Some((head, mut body)) = read_head(&mut socket) else { return };
        go.lock().unwrap().send((head, body.len())).unwrap();
        socket.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").unwrap();
        let mut piece = [0; 16];
        while body.len() < 5 {
            match socket.read(&mut piece) {
                Ok(n @ 1..) => body.extend_from_slice(&piece[..n]),
                _ => return,
            }
        }
        socket.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n").unwrap();
        socket.write_all(&body).unwrap();
    });
    let gateway = Gateway::start(upstream.address(), "");
    let mut client = gateway.client();
    client.send_head(&post("Expect: 100-continue\nContent-Type: text/plain\nContent-Length: 5\n"));
    assert_eq!(client.any_answer("POST").unwrap().status, 100);
    client.send(b"hello");
    let answer = client.answer();
    assert_eq!((answer.status, answer.text()), (200, "hello".into()));
    let (head, early) = seen_before.recv_timeout(PATIENCE).unwrap();
    assert!(head.to_lowercase().contains("\r\nexpect: 100-continue\r\n"), "{head}");
    assert_eq!(early, 0, "no byte of the body came before the 100");
}

/// RFC 9110 10.1.1: the backend may say no instead. What comes next can't be told from the body, and is never served.
#[test]
fn nothing_is_served_behind_a_no_instead_of_100() {
    let heads = std::sync::Arc::new(AtomicUsize::new(0));
    let counted = std::sync::Arc::clone(&heads);
    // Says no as soon as it has the head; the strict upstream would wait for the body.
    let upstream = HttpServer::start_raw(move |mut socket| {
        while read_head(&mut socket).is_some() {
            counted.fetch_add(1, Ordering::Relaxed);
            drop(socket.write_all(b"HTTP/1.1 417 No\r\nContent-Length: 0\r\n\r\n"));
        }
    });
    let gateway = Gateway::start(upstream.address(), "");
    let mut client = gateway.client();
    client.send_head(&post("Expect: 100-continue\nContent-Type: text/plain\nContent-Length: 100\n"));
    let answer = client.answer();
    assert_eq!((answer.status, answer.header("Connection")), (417, Some("close")));
    // As long as the body that was announced, and then one more request.
    client.send(&[b'x'; 100]);
    client.send_head(&get("/api/v3/next", ""));
    assert!(client.is_closed_within(PATIENCE));
    assert_eq!(heads.load(Ordering::Relaxed), 1);
}

#[test]
fn answers_without_a_body_have_none() {
    let upstream = Upstream::answering(|seen| match (seen.method.as_str(), seen.target.as_str()) {
        ("HEAD", "/api/v3/chunked") => Reply::raw("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        ("HEAD", _) => Reply::raw("HTTP/1.1 200 OK\r\nContent-Length: 12345\r\n\r\n"),
        (_, "/api/v3/204") => Reply::raw("HTTP/1.1 204 No Content\r\n\r\n"),
        (_, "/api/v3/304") => Reply::raw("HTTP/1.1 304 Not Modified\r\nETag: \"x\"\r\nContent-Length: 12345\r\n\r\n"),
        (_, "/api/v3/empty") => Reply::raw("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
        _ => Reply::ok("body"),
    });
    let gateway = Gateway::start(upstream.address, "");
    // All on one connection: a body that is not there would be waited for, one too many would spoil the next answer.
    let mut client = gateway.client();
    for (method, target, status, length) in [
        ("HEAD", "/api/v3/x", 200, Some("12345")),
        ("GET", "/api/v3/204", 204, None),
        ("HEAD", "/api/v3/chunked", 200, None),
        ("GET", "/api/v3/304", 304, Some("12345")),
        ("GET", "/api/v3/empty", 200, Some("0")),
        ("GET", "/api/v3/x", 200, Some("4")),
    ] {
        client.send_head(&format!("{method} {target} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\n\n"));
        let answer = client.answer_to(method).unwrap();
        assert_eq!(answer.status, status, "{method} {target}");
        if status != 304 {
            assert_eq!(answer.header("Content-Length"), length, "{method} {target}");
        }
        if status == 204 {
            assert_eq!(answer.header("Transfer-Encoding"), None);
        }
    }
}

#[test]
fn an_answer_that_ends_with_its_connection_gets_an_end_of_its_own() {
    let upstream = Upstream::answering(|_| Reply::raw("HTTP/1.1 200 OK\r\n\r\nuntil the end").then_close());
    let gateway = Gateway::start(upstream.address, "");
    let mut client = gateway.client();
    for _ in 0..2 {
        client.send_head(&get(TARGET, ""));
        let answer = client.answer();
        assert_eq!((answer.text(), answer.cut), ("until the end".into(), false));
        assert!(answer.header("Transfer-Encoding").is_some(), "or its end could not be told from a cut");
    }
}

#[test]
fn a_cut_answer_is_never_made_to_look_complete() {
    for (what, bytes) in [
        ("a length", &b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"[..]),
        ("chunks", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"),
        ("within a chunk", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nA\r\nhalf"),
        ("before the last line", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n0\r\n"),
        ("a bad chunk", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\nx\r\n"),
    ] {
        let upstream = HttpServer::answering_once(bytes);
        let gateway = Gateway::start(upstream.address(), "");
        let mut client = gateway.client();
        client.send_head(&get(TARGET, ""));
        let answer = client.answer();
        assert!(answer.status == 502 || answer.cut, "{what}: {answer:?}");
        assert!(client.is_closed_within(PATIENCE), "{what}");
    }
}

/// A reset is no end: without a length only the way the connection ended tells.
#[test]
fn a_reset_of_the_backend_is_not_the_end_of_an_answer() {
    let upstream = HttpServer::start_raw(|mut socket| {
        let mut first = [0];
        socket.read_exact(&mut first).unwrap();
        socket.write_all(b"HTTP/1.1 200 OK\r\n\r\nhalf").unwrap();
        std::thread::sleep(Duration::from_millis(200));
        // Closing with unread bytes makes the kernel send a reset.
    });
    let gateway = Gateway::start(upstream.address(), "");
    let answer = gateway.get(TARGET);
    assert!(answer.status == 502 || answer.cut, "{answer:?}");
}

/// HTTP/1.0 knows no chunks: the end of the connection ends the body.
#[test]
fn an_http_1_0_client_gets_no_chunks() {
    let upstream = Upstream::answering(|_| {
        Reply::raw("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n")
    });
    let gateway = Gateway::start(upstream.address, "");
    for keep_alive in ["", "Connection: keep-alive\r\n"] {
        let mut client = gateway.client();
        client
            .send(format!("GET {TARGET} HTTP/1.0\r\nHost: h\r\nPRIVATE-TOKEN: {GOOD}\r\n{keep_alive}\r\n").as_bytes());
        let mut answer = Vec::new();
        client.socket.read_to_end(&mut answer).expect("the connection ends behind the body");
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert_eq!(body, "hello world", "{answer}");
        assert!(head.contains(" 200 ") && !head.to_lowercase().contains("transfer-encoding"), "{answer}");
    }
    assert_eq!(upstream.seen().len(), 2, "the backend is asked in HTTP/1.1");
}

// --- Tunnels ---

const HANDSHAKE: &str = "Connection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Version: 13\nSec-WebSocket-Key: dGhl\n";
const SWITCHING: &str = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n";

#[test]
fn a_websocket_is_opened_after_the_same_checks() {
    let upstream = Upstream::answering(|_| Reply::raw(SWITCHING));
    let gateway = Gateway::start(upstream.address, "");
    let mut client = gateway.client();
    client.send_head(&get(&format!("{TARGET}?private_token={GOOD}"), HANDSHAKE));
    let answer = client.answer();
    assert_eq!(answer.status, 101);
    assert!(answer.header("Upgrade").is_some_and(|value| value.eq_ignore_ascii_case("websocket")));
    assert!(answer.header("Connection").is_some_and(|value| value.eq_ignore_ascii_case("upgrade")));
    let seen = upstream.only();
    assert_eq!((seen.target.as_str(), seen.header("PRIVATE-TOKEN")), (TARGET, Some(GOOD)));
    assert_eq!((seen.header("Upgrade"), seen.header("Connection")), (Some("websocket"), Some("Upgrade")));
    assert_eq!(seen.header("Sec-WebSocket-Key"), Some("dGhl"));
    // Whatever goes through is nobody's business, a request's look included.
    for piece in [&b"hello"[..], b"\x81\x05\0\xff", b"GET /api/v3/x HTTP/1.1\r\nHost: h\r\n\r\n", &[7; 100_000]] {
        client.send(piece);
        assert_eq!(client.read_exactly(piece.len()), piece);
    }
    client.finish_sending();
    assert!(client.is_closed_within(PATIENCE));
    upstream.forget();

    for headers in ["", "PRIVATE-TOKEN:\n", &format!("PRIVATE-TOKEN: {BAD}\n")] {
        let refused = gateway.ask(&format!("GET {TARGET} HTTP/1.1\nHost: h\n{headers}{HANDSHAKE}\n"));
        assert_eq!((refused.status, upstream.seen().len()), (401, 0), "{headers}");
    }
    assert_eq!(gateway.ask(&get("/cable", HANDSHAKE)).status, 404);
}

#[test]
fn a_101_that_nobody_asked_for_is_502() {
    let upstream = Upstream::answering(|_| Reply::raw(SWITCHING));
    let gateway = Gateway::start(upstream.address, "");
    for (what, request) in [
        ("plain", get(TARGET, "")),
        ("h2c", get(TARGET, "Connection: Upgrade\nUpgrade: h2c\n")),
        ("no Connection", get(TARGET, "Upgrade: websocket\n")),
        ("no Upgrade", get(TARGET, "Connection: Upgrade\n")),
        ("POST", post("Connection: Upgrade\nUpgrade: websocket\nContent-Length: 0\n")),
        ("with a body", post("Connection: Upgrade\nUpgrade: websocket\nContent-Length: 2\n") + "hi"),
    ] {
        let mut client = gateway.client();
        client.send_head(&request);
        assert_eq!(client.answer().status, 502, "{what}");
        let seen = upstream.only();
        assert_eq!((seen.header("Upgrade"), seen.header("Connection")), (None, None), "{what}");
        upstream.forget();
    }
}

/// A tunnel that the backend does not agree to must not carry a request past the checks.
#[test]
fn bytes_behind_a_handshake_wait_for_the_101() {
    let upstream = Upstream::answering(|seen| match seen.header("Upgrade") {
        Some(_) => {
            Reply::raw("HTTP/1.1 426 Upgrade Required\r\nContent-Length: 0\r\n\r\n").after(Duration::from_millis(300))
        }
        None => Reply::ok("x"),
    });
    let gateway = Gateway::start(upstream.address, "");
    let mut client = gateway.client();
    client.send_head(&get(TARGET, HANDSHAKE));
    client.send_head("GET /api/v3/smuggled HTTP/1.1\nHost: h\n\n");
    assert_eq!(client.answer().status, 426);
    // It was a request after all, and is judged as one; or the connection is over.
    if let Some(answer) = client.try_answer() {
        assert_eq!(answer.status, 401);
    }
    assert_eq!(upstream.only().target, TARGET);

    // Agreed to late: the bytes come through then, and not before.
    let (told, early) = mpsc::channel();
    let told = std::sync::Mutex::new(told);
    let upstream = HttpServer::start_raw(move |mut socket| {
        let Some((_, mut rest)) = read_head(&mut socket) else { return };
        socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let mut piece = [0; 64];
        if let Ok(n) = socket.read(&mut piece) {
            rest.extend_from_slice(&piece[..n]);
        }
        told.lock().unwrap().send(rest.len()).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.write_all(SWITCHING.as_bytes()).unwrap();
        let n = socket.read(&mut piece).unwrap();
        socket.write_all(&piece[..n]).unwrap();
    });
    let gateway = Gateway::start(upstream.address(), "");
    let mut client = gateway.client();
    client.send_head(&get(TARGET, HANDSHAKE));
    client.send(b"early");
    assert_eq!(client.answer().status, 101);
    assert_eq!(client.read_exactly(5), b"early");
    assert_eq!(early.recv_timeout(PATIENCE), Ok(0));
}

// --- Backends ---

#[test]
fn connections_to_the_backend_are_kept_and_shared() {
    let upstream = HttpServer::start(|_| Reply::ok("ok"));
    let gateway = Gateway::start(upstream.address(), "");
    for _ in 0..20 {
        assert_eq!(gateway.get(TARGET).text(), "ok");
    }
    assert_eq!(upstream.connections(), 1);
}

/// A backend that ends a kept connection instead of answering the second request on it.
fn upstream_with_dead_connections() -> HttpServer {
    HttpServer::start(|asked| match asked.nth {
        1 => Reply::ok("ok"),
        _ => Reply(vec![Step::Close]),
    })
}

fn methods(upstream: &HttpServer) -> Vec<String> {
    upstream.asked().into_iter().map(|asked| asked.method).collect()
}

#[test]
fn a_get_is_tried_again_when_a_kept_connection_turns_out_dead() {
    for method in ["GET", "OPTIONS"] {
        let upstream = upstream_with_dead_connections();
        let gateway = Gateway::start(upstream.address(), "");
        assert_eq!(gateway.get(TARGET).status, 200);
        let again = gateway.ask(&format!("{method} {TARGET} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\n\n"));
        assert_eq!((again.status, again.text()), (200, "ok".into()), "{method}");
        assert_eq!(methods(&upstream), ["GET", method, method]);
    }
}

/// The backend may have done the work before it broke off.
#[test]
fn a_post_is_never_sent_twice() {
    for (method, body) in [("POST", "Content-Length: 2\n\nhi"), ("POST", "\n"), ("PATCH", "Content-Length: 2\n\nhi")] {
        let upstream = upstream_with_dead_connections();
        let gateway = Gateway::start(upstream.address(), "");
        assert_eq!(gateway.get(TARGET).status, 200);
        let answer = gateway.ask(&format!("{method} {TARGET} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\n{body}"));
        assert_eq!(answer.status, 502, "{method}");
        assert_eq!(methods(&upstream), ["GET", method]);
    }
}

/// A fresh connection that breaks is no stale one: whoever broke it has got the request.
#[test]
fn nothing_is_tried_again_after_a_fresh_connection_broke() {
    let upstream = Upstream::answering(|_| Reply::raw("").then_close());
    let gateway = Gateway::start(upstream.address, "");
    assert_eq!(gateway.get(TARGET).status, 502);
    assert_eq!(upstream.seen().len(), 1);
}

#[test]
fn several_servers_are_taken_in_turn() {
    let upstreams = [Upstream::start(), Upstream::start(), Upstream::start()];
    let addresses = [upstreams[0].address, upstreams[1].address, upstreams[2].address];
    let gateway = Gateway::start(addresses[0], &servers(&addresses));
    for _ in 0..9 {
        assert_eq!(gateway.get(TARGET).status, 200);
    }
    assert_eq!(upstreams.each_ref().map(|upstream| upstream.seen().len()), [3, 3, 3]);
}

#[test]
fn a_server_that_refuses_connections_is_passed_over() {
    let upstream = Upstream::start();
    let dead = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
    let gateway = Gateway::start(upstream.address, &servers(&[dead, upstream.address]));
    for request in
        [get(TARGET, ""), post("Content-Length: 2\n") + "hi", post("Transfer-Encoding: chunked\n") + "2\nhi\n0\n\n"]
    {
        for _ in 0..4 {
            assert_eq!(
                gateway.ask(&request).status,
                200,
                "a connection that was refused has carried nothing: {request}"
            );
        }
    }
    assert_eq!(upstream.seen().len(), 12);
}

#[test]
fn a_route_has_the_upstream_that_it_names() {
    let (first, second) = (Upstream::start(), Upstream::start());
    let config = format!(
        "{}[[upstream]]\nname = \"other\"\nservers = [\"{}\"]\n[[route]]\npath = \"/api/v3/other/*\"\nupstream = \"other\"\n",
        servers(&[first.address]),
        second.address
    );
    let gateway = Gateway::start(first.address, &config);
    gateway.get(TARGET);
    gateway.get("/api/v3/other/x");
    assert_eq!((first.only().target.as_str(), second.only().target.as_str()), (TARGET, "/api/v3/other/x"));
    assert_eq!(gateway.ask("GET /api/v3/other/x HTTP/1.1\nHost: h\n\n").status, 401);
}

#[test]
fn a_backend_on_a_unix_socket() {
    let folder = Folder::new("test");
    let path = folder.0.join("api.sock");
    let upstream = HttpServer::start_unix(&path, |asked| Reply::ok(&asked.line));
    let config = format!("[[upstream]]\nname = \"api\"\nservers = [\"unix:{}\"]\n", path.display());
    let gateway = Gateway::start(SocketAddr::from((Ipv4Addr::LOCALHOST, 1)), &config);
    for _ in 0..3 {
        assert_eq!(gateway.get(TARGET).text(), format!("GET {TARGET} HTTP/1.1"));
    }
    // The socket's file goes, and nobody listens.
    drop(upstream);
    drop(std::fs::remove_file(&path));
    let gone = Gateway::start(SocketAddr::from((Ipv4Addr::LOCALHOST, 1)), &config).get(TARGET);
    assert_eq!(gone.status, 502);
    assert!(!gone.text().contains("api.sock"));
}

#[test]
fn a_listener_on_a_unix_socket() {
    use std::os::unix::fs::PermissionsExt as _;
    let upstream = Upstream::start();
    let folder = Folder::new("test");
    let path = folder.0.join("front.sock");
    for (trusted, chain) in [("", None), ("trusted_proxies = [\"unix\"]\n", Some("192.0.2.7"))] {
        let config = format!("[server]\nlisten = [\"@LISTEN@\", \"unix:{}\"]\nthreads = 1\n{trusted}", path.display());
        let gateway = Gateway::start(upstream.address, &config);
        eventually("the socket is there", || UnixStream::connect(&path).is_ok());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        let ask = |token: &str| {
            let mut socket = UnixStream::connect(&path).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            let request = format!(
                "GET {TARGET} HTTP/1.1\r\nHost: h\r\nPRIVATE-TOKEN: {token}\r\nX-Forwarded-For: 192.0.2.7\r\nConnection: close\r\n\r\n"
            );
            socket.write_all(request.as_bytes()).unwrap();
            let mut answer = String::new();
            socket.read_to_string(&mut answer).unwrap();
            answer
        };
        assert!(ask(GOOD).starts_with("HTTP/1.1 200 "));
        assert_eq!(upstream.only().header("X-Forwarded-For"), chain, "{trusted}");
        upstream.forget();
        assert!(ask(BAD).starts_with("HTTP/1.1 401 "));
        assert_eq!(upstream.seen().len(), 0);
        drop(gateway);
    }
}

/// A client that goes away must not leave a request running for nobody.
#[test]
fn a_client_that_goes_away_ends_its_request() {
    let (told, ended) = mpsc::channel();
    let told = std::sync::Mutex::new(told);
    let upstream = HttpServer::start_raw(move |mut socket| {
        if read_head(&mut socket).is_some() {
            // The gateway ends the connection while the backend still thinks.
            let n = socket.read(&mut [0; 16]).unwrap_or(0);
            told.lock().unwrap().send(n).unwrap();
        }
    });
    let gateway = Gateway::start(upstream.address(), "");
    let mut client = gateway.client();
    client.send_head(&get(TARGET, ""));
    eventually("it is under way", || gateway.metric("tollgate_requests_in_flight") >= 1.0);
    drop(client);
    assert_eq!(ended.recv_timeout(PATIENCE), Ok(0));
    eventually("nothing is in flight", || gateway.metric("tollgate_requests_in_flight") == 0.0);
}

/// A request body that its client cuts must not reach the backend as a whole one.
#[test]
fn a_cut_request_is_never_made_to_look_complete() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    for request in [
        post("Content-Type: text/plain\nContent-Length: 10\n") + "half",
        post("Content-Type: text/plain\nTransfer-Encoding: chunked\n") + "4\nhalf\n",
        post("Content-Type: text/plain\nTransfer-Encoding: chunked\n") + "4\nhalf\n0\n",
    ] {
        let mut client = gateway.client();
        client.send_head(&request);
        eventually("the backend has its head", || upstream.seen().len() == 1);
        client.finish_sending();
        assert!(client.try_answer().is_none_or(|answer| answer.status >= 400), "{request}");
        assert!(!upstream.only().complete, "{request}");
        upstream.forget();
    }
}

// --- What must not leave in an answer ---

const HINTS: &str = "HTTP/1.1 103 Early Hints\r\nLink: </p?private_token=good-token-0001&page=2>; rel=next\r\n\
    Link: </s/good%2Dtoken-0001>; rel=preload\r\nLocation: /l?next=%2Fp%3Fk%3Dgood-token-0001&x=1\r\n\
    Connection: keep-alive, X-Theirs\r\nX-Theirs: 1\r\nKeep-Alive: timeout=5\r\nUpgrade: h2c\r\nX-Sendfile: /etc/passwd\r\n\
    Gitlab-Workhorse-Send-Data: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\nX-Kept: 1\r\n\r\n";

#[test]
fn interim_answers_go_through_the_same_hygiene() {
    let upstream = Upstream::answering(|seen| {
        let interim = match seen.target.rsplit('/').next().unwrap() {
            "100" => {
                "HTTP/1.1 100 Continue please good-token-0001\r\nX-Accel-Redirect: /x\r\nContent-Length: 0\r\n\r\n"
                    .into()
            }
            "102" => "HTTP/1.1 102 Processing\r\nTransfer-Encoding: chunked\r\nX-Kept: 1\r\n\r\n".repeat(3),
            "103" => HINTS.to_owned(),
            "199" => HINTS.replace("103 Early Hints", "199 Whatever"),
            _ => "HTTP/1.1 100 Continue\r\n\r\n".to_owned() + HINTS + "HTTP/1.1 102 Processing\r\n\r\n" + HINTS,
        };
        Reply::raw(format!("{interim}HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
    });
    let gateway = Gateway::start(upstream.address, "");
    let mut client = gateway.client();
    for (kind, codes) in [
        ("100", &[100][..]),
        ("102", &[102, 102, 102]),
        ("103", &[103]),
        ("199", &[199]),
        ("all", &[100, 103, 102, 103]),
    ] {
        client.send_head(&get(&format!("/api/v3/{kind}"), ""));
        let mut seen = Vec::new();
        let last = loop {
            let answer = client.any_answer("GET").unwrap();
            if answer.status >= 200 {
                break answer;
            }
            for name in [
                "Connection",
                "X-Theirs",
                "Keep-Alive",
                "Upgrade",
                "X-Sendfile",
                "X-Accel-Redirect",
                "Gitlab-Workhorse-Send-Data",
                "Content-Length",
                "Transfer-Encoding",
            ] {
                assert_eq!(answer.header(name), None, "{kind}: {name} in {:?}", answer.headers);
            }
            let all = format!("{:?}", answer.headers);
            assert!(!all.contains("0001") && !all.contains("private_token"), "{all}");
            if matches!(answer.status, 103 | 199) {
                let links: Vec<_> =
                    answer.headers.iter().filter(|(name, _)| name == "Link").map(|(_, v)| v.as_str()).collect();
                assert_eq!(links, ["</p?page=2>; rel=next", "</s/redacted>; rel=preload"]);
                assert_eq!(answer.header("Location"), Some("/l?next=%2Fp&x=1"));
                assert_eq!(answer.header("X-Kept"), Some("1"));
            }
            seen.push(answer.status);
        };
        assert_eq!((seen.as_slice(), last.status, last.text().as_str()), (codes, 200, "ok"), "{kind}");
        assert!(last.header("X-Request-Id").is_some());
    }
    // RFC 9110 15.2: none for a client of HTTP/1.0, which would take it for the answer.
    for kind in ["100", "102", "103", "199", "all"] {
        for keep_alive in ["", "Connection: keep-alive\n"] {
            let mut old = gateway.client();
            old.send_head(&format!("GET /api/v3/{kind} HTTP/1.0\nHost: h\nPRIVATE-TOKEN: {GOOD}\n{keep_alive}\n"));
            let answer = old.any_answer("GET").unwrap();
            assert_eq!((answer.status, answer.text().as_str()), (200, "ok"), "{kind}");
        }
    }
}

/// Where a client of somebody else's reads them.
#[test]
fn curl_sees_a_clean_interim_answer() {
    let upstream =
        Upstream::answering(|_| Reply::raw(format!("{HINTS}HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")));
    let gateway = Gateway::start(upstream.address, "");
    let curl = |version: &str| {
        let output = std::process::Command::new("curl")
            .args([
                "-si",
                version,
                "-H",
                &format!("PRIVATE-TOKEN: {GOOD}"),
                &format!("http://{}{TARGET}", gateway.address),
            ])
            .output()
            .unwrap_or_else(|error| panic!("curl can't be started: {error}; {HINT}"));
        String::from_utf8(output.stdout).unwrap()
    };
    let modern = curl("--http1.1");
    assert!(modern.starts_with("HTTP/1.1 103 Early Hints\r\n") && modern.ends_with("\r\n\r\nok"), "{modern}");
    assert!(modern.contains("Link: </p?page=2>; rel=next\r\n") && !modern.contains("0001"), "{modern}");
    let old = curl("--http1.0");
    assert!(old.starts_with("HTTP/1.1 200 OK\r\n") && old.ends_with("\r\n\r\nok"), "{old}");
}

#[test]
fn interim_answers_have_an_end() {
    let upstream = Upstream::answering(|seen| {
        let count: usize = seen.target.rsplit('/').next().unwrap().parse().unwrap();
        let interim = "HTTP/1.1 102 Processing\r\n\r\n".repeat(count);
        Reply::raw(format!("{interim}HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
    });
    let gateway = Gateway::start(upstream.address, "");
    for (count, status) in [(0, 200), (1, 200), (20, 200), (5_000, 502)] {
        let mut client = gateway.client();
        client.send_head(&get(&format!("/api/v3/{count}"), ""));
        let mut interim = 0;
        let answer = loop {
            let answer = client.any_answer("GET").unwrap();
            if answer.status >= 200 {
                break answer;
            }
            interim += 1;
        };
        assert_eq!(answer.status, status, "{count}");
        assert!(interim <= 64 && (status != 200 || interim == count), "{interim} of {count}");
    }
    // The connection to the backend was not used again.
    assert_eq!(gateway.get("/api/v3/0").text(), "ok");
}

/// The status line is tollgate's own: a backend's reason phrase is text of its own making.
#[test]
fn a_status_line_says_nothing_of_the_backends() {
    for (answer, line) in [
        ("HTTP/1.1 200 good-token-0001\r\nContent-Length: 2\r\n\r\nhi", "HTTP/1.1 200 OK"),
        ("HTTP/1.0 404 Nothing\r\nContent-Length: 2\r\n\r\nhi", "HTTP/1.1 404 Not Found"),
        ("HTTP/1.1 299 Odd\r\nContent-Length: 2\r\n\r\nhi", "HTTP/1.1 299 "),
    ] {
        let upstream = HttpServer::answering_once(answer.as_bytes());
        let gateway = Gateway::start(upstream.address(), "");
        let mut client = gateway.client();
        client.send_head(&get(TARGET, "Connection: close\n"));
        let mut whole = String::new();
        client.socket.read_to_string(&mut whole).unwrap();
        assert_eq!(whole.split("\r\n").next(), Some(line), "{answer}");
        assert!(whole.ends_with("\r\n\r\nhi"), "{whole}");
    }
}

#[test]
fn urls_in_answers_lose_credentials_and_nothing_else() {
    let upstream = Upstream::answering(|seen| {
        // GitLab 8.5 and later: every parameter of the request, in every link. Here it is the client's header.
        let fields = seen.header("X-Answer").unwrap().replace('|', "\r\n");
        Reply::raw(format!("HTTP/1.1 200 OK\r\n{fields}\r\nContent-Length: 0\r\n\r\n"))
    });
    let gateway = Gateway::start(upstream.address, "");
    let next = "; rel=\"next\"";
    for (fields, name, expected) in [
        (format!("Link: <http://h/p?private_token=x&page=2>{next}"), "Link", format!("<http://h/p?page=2>{next}")),
        (format!("link: <http://h/p?key={GOOD}&page=2>{next}"), "Link", format!("<http://h/p?page=2>{next}")),
        (
            format!("Link: <http://h/p?search=private_token&page=2>{next}"),
            "Link",
            format!("<http://h/p?search=private_token&page=2>{next}"),
        ),
        (
            "Location: /l?return_to=%2Fp%3Fa%3Dgood%252Dtoken%252D0001".to_owned(),
            "Location",
            "/l?return_to=%2Fp".into(),
        ),
        (format!("Content-Location: /p?x=1&private_token={GOOD}"), "Content-Location", "/p?x=1".into()),
        (format!("Content-Location: /p/{GOOD}.json"), "Content-Location", "/p/redacted.json".into()),
        (format!("Refresh: 5; url=/p?private_token={GOOD}"), "Refresh", "5; url=/p".into()),
        (
            format!("Refresh: 0; url=\"/l?to=%2Fp%3Ftoken%3D{GOOD}%26page%3D2\""),
            "Refresh",
            "0; url=\"/l?to=%2Fp%3Fpage%3D2\"".into(),
        ),
        (format!("Location: http://h/p#{GOOD}"), "Location", "http://h/p#redacted".into()),
        (format!("X-Other: /p?private_token={GOOD}"), "X-Other", format!("/p?private_token={GOOD}")),
    ] {
        let answer_with = format!("X-Answer: {fields}\n");
        for request in [
            get(TARGET, &answer_with),
            format!("GET {TARGET}?private_token={GOOD} HTTP/1.1\nHost: h\n{answer_with}\n"),
            format!("GET {TARGET}?private_token=good%2Dtoken-0001 HTTP/1.1\nHost: h\n{answer_with}\n"),
            format!("GET {TARGET} HTTP/1.1\nHost: h\nAuthorization: Bearer {GOOD}\n{answer_with}\n"),
            format!("GET {TARGET}?private_token={GOOD} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\n{answer_with}\n"),
        ] {
            let answer = gateway.ask(&request);
            assert_eq!((answer.status, answer.header(name)), (200, Some(expected.as_str())), "{request}");
        }
    }
    // Several lines keep their number and order.
    let several = "X-Answer: Link: </a?private_token=x>; rel=a|X-Mid: 1|Link: </b>; rel=b\n";
    let links: Vec<_> =
        gateway.ask(&get(TARGET, several)).headers.into_iter().filter(|(name, _)| name == "Link").collect();
    assert_eq!(links, [("Link".into(), "</a>; rel=a".into()), ("Link".into(), "</b>; rel=b".to_owned())]);
}

/// Symfony, IIS and others take the path from the first kind, Django, Grafana, Jenkins and others the user from the second.
#[test]
fn fields_by_which_a_backend_chooses_a_path_or_a_user_are_dropped() {
    let upstream = Upstream::start();
    let names = [
        "X-Original-URL",
        "X-Rewrite-URL",
        "X-Original-URI",
        "X-Override-URL",
        "X-HTTP-DestinationURL",
        "X-Remote-User",
        "Remote-User",
        "REMOTE-USER",
        "X-Forwarded-User",
        "X-Auth-Request-User",
        "X-Auth-Request-Email",
        "x-webauth-user",
        "X-Authenticated-User",
        "X-SSL-Client-Cert",
        "SSL-Client-Verify",
        "X-Client-Cert",
        "Client-Cert",
        "Impersonate-User",
    ];
    let lines: String = names.iter().map(|name| format!("{name}: evil\n")).collect();
    let open = "[[route]]\npath = \"/\"\nauth = \"none\"\nreason = \"web pages\"\n\
                [[route]]\npath = \"/api/v3/own/*\"\nauth = \"none\"\npass_token = true\nreason = \"checks itself\"\n";
    let gateway = Gateway::start(upstream.address, open);
    let mut dropped = 0.0;
    for target in [TARGET, "/page", "/api/v3/own/x"] {
        for request in [get(target, &lines), get(target, &format!("Connection: {}\n{lines}", names[0]))] {
            assert_eq!(gateway.ask(&request).status, 200);
            let seen = upstream.only();
            assert!(!seen.head.contains("evil"), "{target}: {}", seen.head);
            upstream.forget();
            dropped += names.len() as f64;
            assert_eq!(gateway.metric("tollgate_dropped_headers_total"), dropped);
        }
    }
    let gateway = Gateway::start(upstream.address, &format!("[token]\npath_and_user_headers = \"allow\"\n{open}"));
    assert_eq!(gateway.ask(&get(TARGET, &lines)).status, 200);
    let seen = upstream.only();
    for name in names.iter().filter(|name| **name != "REMOTE-USER" && **name != "Remote-User") {
        assert_eq!(seen.header(name), Some("evil"), "{name}");
    }
    assert_eq!(seen.all("Remote-User"), ["evil", "evil"]);
    // Other spellings stay out, with the switch as without.
    upstream.forget();
    gateway.ask(&get(TARGET, "X_Original_URL: evil\nRemote_User: evil\nX-Forwarded-Prefix: evil\n"));
    assert!(!upstream.only().head.contains("evil"));
}

/// An nginx that appends to what the client claims, as most of its configurations do, and one more behind it. Ended when it
/// is dropped.
struct Nginx {
    address: SocketAddr,
    child: std::process::Child,
    _folder: Folder,
}

impl Nginx {
    fn before(gateway: SocketAddr) -> Self {
        let folder = Folder::new("test");
        let (outer, inner) = (free_port(), free_port());
        let server = |port: u16, next: String| {
            format!(
                "server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://{next}; proxy_http_version 1.1;\n\
                 proxy_set_header Host $http_host; proxy_set_header X-Forwarded-Proto HTTPS;\n\
                 proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for; }} }}\n"
            )
        };
        let config = format!(
            "events {{}}\nhttp {{\n{}{} }}\n",
            server(outer, format!("127.0.0.1:{inner}")),
            server(inner, gateway.to_string())
        );
        let child = nginx(&folder, &config)
            .stderr(std::fs::File::create(folder.0.join("stderr")).unwrap())
            .spawn()
            .unwrap_or_else(|error| panic!("nginx can't be started: {error}; {HINT}"));
        let nginx = Self { address: SocketAddr::from((Ipv4Addr::LOCALHOST, outer)), child, _folder: folder };
        eventually("nginx listens", || TcpStream::connect(nginx.address).is_ok());
        nginx
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[test]
fn a_client_behind_an_appending_nginx_can_neither_erase_nor_invent_itself() {
    let upstream = Upstream::start();
    let config = "[server]\nlisten = [\"@LISTEN@\"]\nthreads = 1\ntrusted_proxies = [\"127.0.0.1\"]\n";
    let gateway = Gateway::start(upstream.address, config);
    let nginx = Nginx::before(gateway.address);
    for (index, (claim, passed)) in [
        (None, ""),
        (Some("6.6.6.6"), "6.6.6.6, "),
        (Some("127.0.0.1"), "127.0.0.1, "),
        (Some("unknown"), ""),
        (Some("_hidden"), ""),
        (Some("<junk>"), ""),
        (Some("6.6.6.6, unknown"), ""),
        (Some("unknown, 6.6.6.6:1"), "6.6.6.6, "),
        (Some("6.6.6.6 7.7.7.7"), ""),
        (Some(","), ""),
        (Some("[::1"), ""),
        (Some("::ffff:6.6.6.6"), "6.6.6.6, "),
    ]
    .into_iter()
    .enumerate()
    {
        let mut curl = std::process::Command::new("curl");
        curl.args(["-s", "--interface", "127.0.0.9", "-H", &format!("PRIVATE-TOKEN: {GOOD}"), "-H", "Host: h.test"]);
        curl.arg(format!("http://{}{TARGET}", nginx.address));
        if let Some(claim) = claim {
            curl.args(["-H", &format!("X-Forwarded-For: {claim}")]);
        }
        let output = curl.output().unwrap_or_else(|error| panic!("curl can't be started: {error}; {HINT}"));
        assert_eq!(String::from_utf8_lossy(&output.stdout), "{\"ok\":true}", "{claim:?}");
        let seen = upstream.only();
        let chain = format!("{passed}127.0.0.9, 127.0.0.1, 127.0.0.1");
        assert_eq!(seen.header("X-Forwarded-For"), Some(chain.as_str()), "{claim:?}");
        assert_eq!((seen.header("X-Forwarded-Proto"), seen.header("X-Forwarded-Port")), (Some("https"), Some("443")));
        upstream.forget();
        eventually("the log line", || gateway.access_log().len() == index + 1);
        assert_eq!(gateway.access_log()[index]["client"].as_str(), Some("127.0.0.9"), "{claim:?}");
    }
}
