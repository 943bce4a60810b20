//! Bodies through the real binary: captures of real clients are forwarded byte for byte, and each kind of fault gets its
//! response, with a length and in chunks, on new connections and persistent ones.
//! `bodies/captures` holds what some 60 clients sent: `#### NAME BYTES`, then the request's head and its body without
//! chunks.

use crate::harness::*;

const PATH: &str = "/api/v3/projects";

pub fn captures() -> Vec<(&'static str, &'static [u8])> {
    let mut rest: &[u8] = include_bytes!("bodies/captures");
    let mut found = Vec::new();
    while !rest.is_empty() {
        let end = find(rest, b"\n").unwrap();
        let line = std::str::from_utf8(&rest[..end]).unwrap().strip_prefix("#### ").unwrap();
        let (name, length) = line.split_once(' ').unwrap();
        let (request, later) = rest[end + 1..].split_at(length.parse().unwrap());
        found.push((name, request));
        rest = &later[1..];
    }
    found
}

/// A request with additional fields and a body, with a length or in chunks of 7 bytes.
fn request(method: &str, fields: &str, body: &[u8], in_chunks: bool) -> Vec<u8> {
    let head = format!("{method} {PATH} HTTP/1.1\r\nHost: h.test\r\nPRIVATE-TOKEN: {GOOD}\r\n{fields}");
    if !in_chunks {
        return [format!("{head}Content-Length: {}\r\n\r\n", body.len()).as_bytes(), body].concat();
    }
    let mut bytes = format!("{head}Transfer-Encoding: chunked\r\n\r\n").into_bytes();
    for chunk in body.chunks(7) {
        bytes.extend(format!("{:x}\r\n", chunk.len()).bytes());
        bytes.extend_from_slice(chunk);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"0\r\n\r\n");
    bytes
}

fn ask(gateway: &Gateway, bytes: &[u8]) -> Answer {
    let mut client = gateway.client();
    // The response may arrive, and the connection end, before everything is sent.
    let _ = std::io::Write::write_all(&mut client.socket, bytes);
    client.answer()
}

/// Bodies of real clients are forwarded with their type or an equivalent one; the unit test has the names and reasons of
/// the others.
#[test]
fn what_real_clients_send_passes_byte_for_byte() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let (mut passed, mut refused, mut none) = (0, Vec::new(), 0);
    for (name, bytes) in captures() {
        let end = find(bytes, b"\r\n\r\n").unwrap();
        let (head, body) = (std::str::from_utf8(&bytes[..end]).unwrap(), &bytes[end + 4..]);
        let mut lines = head.split("\r\n");
        let method = lines.next().unwrap().split(' ').next().unwrap();
        if method == "bDELETE" {
            // Node sent a body without framing: its first byte is the next request's.
            none += 1;
            continue;
        }
        let kept = |line: &&str| {
            let name = line.split(':').next().unwrap().to_ascii_lowercase();
            ["content-type", "content-encoding", "content-range", "accept", "user-agent"].contains(&name.as_str())
        };
        let fields: String = lines.filter(kept).map(|line| format!("{line}\r\n")).collect();
        let mut client = gateway.client();
        let _ = std::io::Write::write_all(&mut client.socket, &request(method, &fields, body, name.len() % 2 == 0));
        match client.answer_to(method).unwrap().status {
            200 if method == "HEAD" => passed += 1,
            200 => {
                // The head of a request with a refused body may arrive late.
                let seen: Vec<_> = upstream.seen().into_iter().filter(|seen| seen.complete).collect();
                assert_eq!(seen.len(), 1, "{name}");
                assert_eq!(seen[0].body, body, "{name}");
                passed += 1;
            }
            400 | 415 => refused.push(name),
            status => panic!("{name}: {status}"),
        }
        upstream.forget();
    }
    assert_eq!((passed, refused.len(), none), (709, 53, 1), "{refused:?}");
}

#[test]
fn each_fault_of_a_body_has_its_answer() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    const MULTIPART: &str = "Content-Type: multipart/form-data; boundary=b\r\n";
    const JSON: &str = "Content-Type: application/json\r\n";
    const FORM: &str = "Content-Type: application/x-www-form-urlencoded\r\n";
    let part = |head: &str| format!("--b\r\n{head}\r\n\r\nx\r\n--b--\r\n");
    let unsupported = "{\"message\":\"415 Unsupported Media Type\"}";
    let bad = "{\"message\":\"400 Bad Request\"}";
    let unauthorized = "{\"message\":\"401 Unauthorized\"}";
    let rows = [
        ("POST", MULTIPART.to_owned(), part("X: y"), 400, bad, "body_ambiguous"),
        (
            "PUT",
            MULTIPART.to_owned(),
            part("Content-Disposition: form-data; name*=utf-8''x"),
            400,
            bad,
            "body_ambiguous",
        ),
        (
            "POST",
            MULTIPART.to_owned(),
            part("Content-Disposition: form-data; name=private_token"),
            401,
            unauthorized,
            "body",
        ),
        ("POST", "Content-Type: multipart/form-data\r\n".into(), "x".into(), 400, bad, "body_type"),
        (
            "POST",
            "Content-Type: multipart/form-data; boundary=b; boundary=c\r\n".into(),
            "x".into(),
            400,
            bad,
            "body_type",
        ),
        (
            "POST",
            "Content-Type: application/json; charset=utf-16\r\n".into(),
            "{}".into(),
            415,
            unsupported,
            "body_charset",
        ),
        ("PATCH", format!("{FORM}Content-Encoding: gzip\r\n"), "a=1".into(), 415, unsupported, "body_coding"),
        ("POST", "Content-Encoding: deflate\r\n".into(), "a=1".into(), 415, unsupported, "body_coding"),
        ("PUT", JSON.to_owned(), "\u{feff}{}".into(), 400, bad, "body_ambiguous"),
        ("DELETE", JSON.to_owned(), "{\"a\":1".into(), 400, bad, "body_ambiguous"),
        ("PUT", String::new(), "/* x */{\"private_token\":1}".into(), 401, unauthorized, "body"),
        ("POST", String::new(), "a=1&private_token=x".into(), 401, unauthorized, "body"),
        ("GET", FORM.to_owned(), "per_page=9999".into(), 400, bad, "body_page"),
        ("HEAD", JSON.to_owned(), "{\"page\":9}".into(), 400, "", "body_page"),
        ("GET", MULTIPART.to_owned(), part("Content-Disposition: form-data; name=page"), 400, bad, "body_page"),
    ];
    let count = rows.len();
    for (method, fields, body, status, says, reason) in rows {
        for in_chunks in [false, true] {
            let mut client = gateway.client();
            let _ =
                std::io::Write::write_all(&mut client.socket, &request(method, &fields, body.as_bytes(), in_chunks));
            let answer = client.answer_to(method).unwrap();
            let what = format!("{method} {fields}{body}");
            assert_eq!((answer.status, answer.text().as_str()), (status, says), "{what}");
            assert_eq!(answer.header("Content-Type"), Some("application/json"), "{what}");
            assert_eq!(answer.header("Connection"), Some("close"), "{what}");
        }
        let said = || gateway.access_log().iter().filter(|line| line["reason"] == reason).count() >= 2;
        eventually(reason, said);
    }
    assert_eq!(gateway.get("/api/v3/last").status, 200);
    assert!(upstream.seen().iter().filter(|seen| seen.complete).all(|seen| seen.target == "/api/v3/last"));
    eventually("every line", || gateway.access_log().len() == 2 * count + 1);
}

/// Several requests on one connection: the verdict on a body affects its request only.
#[test]
fn a_type_with_an_empty_body_passes_on_a_kept_connection() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let mut client = gateway.client();
    let mut asked = 0;
    for content_type in [
        "multipart/form-data",
        "application/json; charset=utf-16",
        "application/x-www-form-urlencoded, text/plain",
        "application/json",
        "application/x-www-form-urlencoded",
        "",
    ] {
        for method in ["GET", "POST", "PUT", "DELETE"] {
            for in_chunks in [false, true] {
                client.send(&request(method, &format!("Content-Type: {content_type}\r\n"), b"", in_chunks));
                assert_eq!(client.answer().status, 200, "{method} {content_type}");
                asked += 1;
            }
        }
    }
    assert_eq!(asked, 48);
    assert_eq!(upstream.seen().len(), asked);
}

#[test]
fn every_reader_sees_the_type_that_was_judged() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    for (sent, forwarded) in [
        ("Multipart/Form-Data;Boundary=\"b\"", "multipart/form-data; boundary=b"),
        ("multipart/form-data; boundary=b ;CHARSET=utf-8", "multipart/form-data; boundary=b; charset=utf-8"),
        ("text/PLAIN;x", "text/PLAIN;x"),
        ("Image/PNG", "Image/PNG"),
    ] {
        let body = b"--b\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n1\r\n--b--\r\n";
        let answer = ask(&gateway, &request("POST", &format!("content-type: {sent}\r\n"), body, false));
        assert_eq!(answer.status, 200, "{sent}");
        let seen = upstream.only();
        assert_eq!((seen.all("Content-Type"), seen.body.as_slice()), (vec![forwarded], &body[..]), "{sent}");
        upstream.forget();
    }
}

#[test]
fn bodies_without_a_type_as_configured() {
    let file = b"\x7fELF\0&private_token=1;x";
    for (mode, method, fields, body, status, forwarded) in [
        ("watch", "PUT", "", &file[..], 200, None),
        ("watch", "PATCH", "", file, 200, None),
        ("watch", "POST", "", b"a=1&b=2", 200, None),
        ("watch", "POST", "", b"a=1&private_token=1", 401, None),
        ("watch", "PUT", "", b"{\"private_token\":1}", 401, None),
        ("watch", "POST", "Content-Type:\r\n", b"private_token=1", 401, None),
        ("refuse", "PUT", "", file, 400, None),
        ("refuse", "POST", "Content-Type:\r\n", b"a=1", 400, None),
        ("refuse", "POST", "", b"", 200, None),
        ("refuse", "POST", "Content-Type: text/plain\r\n", b"a=1", 200, Some("text/plain")),
        ("octet-stream", "PUT", "", file, 200, Some("application/octet-stream")),
        ("octet-stream", "POST", "", b"a=1&private_token=1", 200, Some("application/octet-stream")),
        ("octet-stream", "POST", "Content-Type:\r\n", b"a=1", 200, Some("application/octet-stream")),
        ("octet-stream", "POST", "", b"//\n{\"private_token\":1}", 401, None),
        ("octet-stream", "POST", "", b"", 200, None),
    ] {
        let upstream = Upstream::start();
        let gateway = Gateway::start(upstream.address, &format!("[token]\nuntyped_body = \"{mode}\"\n"));
        let bytes = request(method, fields, body, false);
        let answer = ask(&gateway, &bytes);
        let what = format!("{mode}: {method} {fields}{}", String::from_utf8_lossy(body));
        assert_eq!(answer.status, status, "{what}");
        if status == 200 {
            let seen = upstream.only();
            let typed = seen.all("Content-Type");
            assert!(typed.len() <= 1 && seen.body == body, "{what}");
            assert_eq!(typed.first().copied().filter(|value| !value.is_empty()), forwarded, "{what}");
        }
    }
}
