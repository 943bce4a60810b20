//! The tables of attacks once more, over HTTP/2: each request that can be said in it gets the verdict that it gets over HTTP/1,
//! or differs for a reason that has a name here. Frames and field blocks are written by hand, without a check of anything.

use super::{Case, Scene, expand, judge_request, tables};
use crate::harness::{PATIENCE, Seen, find, free_port};
use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};

/// What a case asks, apart from how HTTP/1 frames it.
struct Asked {
    method: Vec<u8>,
    target: Vec<u8>,
    /// Names in lower case.
    fields: Vec<(Vec<u8>, Vec<u8>)>,
    body: Vec<u8>,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Status(u16),
    /// The stream or the connection was ended without an answer.
    Ended,
}

/// Takes a case apart. `Err`: why HTTP/2 has no words for it.
fn asked(case: &Case) -> Result<Asked, &'static str> {
    // As over HTTP/1, where some rows count fields.
    let bytes = expand(&case.text.replace("<H>", "<H>X-Case: 0\n"));
    if case.half_close || case.answers.is_empty() {
        return Err("a request that is cut");
    }
    let end = find(&bytes, b"\r\n\r\n").ok_or("no end of the head")?;
    let (head, rest) = (&bytes[..end], &bytes[end + 4..]);
    let mut lines = split(head, b"\r\n").into_iter();
    let line: Vec<&[u8]> = lines.next().unwrap_or_default().split(|byte| *byte == b' ').collect();
    let [method, target, b"HTTP/1.1"] = line[..] else {
        return Err("a request line of HTTP/1's own, or another version");
    };
    if !(target.starts_with(b"/") || target == b"*") {
        return Err("a target that is no path");
    }
    let (mut fields, mut framing) = (Vec::new(), Vec::new());
    for line in lines {
        let colon = line.iter().position(|byte| *byte == b':').ok_or("a line that is no field")?;
        let (name, value) = (line[..colon].to_ascii_lowercase(), trim(&line[colon + 1..]).to_vec());
        if name.is_empty() || name.contains(&b' ') || name.contains(&b'\t') {
            return Err("a line that is no field");
        }
        if name == b"transfer-encoding" || name == b"content-length" {
            framing.push((name.clone(), value.clone()));
        }
        fields.push((name, value));
    }
    let body = match &framing[..] {
        [] if rest.is_empty() => Vec::new(),
        [(name, length)] if name == b"content-length" && *length == rest.len().to_string().into_bytes() => {
            rest.to_vec()
        }
        [(name, coding)] if name == b"transfer-encoding" && coding == b"chunked" => {
            fields.retain(|(name, _)| name != b"transfer-encoding");
            unchunked(rest).ok_or("a framing of HTTP/1's own")?
        }
        _ => return Err("a framing of HTTP/1's own, or more than one request"),
    };
    Ok(Asked { method: method.to_vec(), target: target.to_vec(), fields, body })
}

/// Without the blanks that HTTP/1 allows around a value.
fn trim(value: &[u8]) -> &[u8] {
    let blank = |byte: &u8| matches!(byte, b' ' | b'\t');
    let start = value.iter().position(|byte| !blank(byte)).unwrap_or(value.len());
    let end = value.iter().rposition(|byte| !blank(byte)).map_or(start, |last| last + 1);
    &value[start..end]
}

fn split<'b>(bytes: &'b [u8], at: &[u8]) -> Vec<&'b [u8]> {
    let (mut parts, mut rest) = (Vec::new(), bytes);
    while let Some(end) = find(rest, at) {
        parts.push(&rest[..end]);
        rest = &rest[end + at.len()..];
    }
    parts.push(rest);
    parts
}

/// `None`: anything but plain chunks and their end.
fn unchunked(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = find(rest, b"\r\n")?;
        let digits = std::str::from_utf8(&rest[..line]).ok()?;
        if digits.len() > 16 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        let size = usize::from_str_radix(digits, 16).ok()?;
        rest = &rest[line + 2..];
        body.extend_from_slice(rest.get(..size)?);
        rest = rest.get(size..)?.strip_prefix(b"\r\n")?;
        if size == 0 {
            return rest.is_empty().then_some(body);
        }
    }
}

/// A number with a prefix of 7 bits, and the bytes that it counts.
fn string(bytes: &[u8], out: &mut Vec<u8>) {
    let mut length = bytes.len();
    if length < 127 {
        out.push(length as u8);
    } else {
        out.push(127);
        length -= 127;
        while length >= 128 {
            out.push((length % 128 + 128) as u8);
            length /= 128;
        }
        out.push(length as u8);
    }
    out.extend_from_slice(bytes);
}

fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let stream: &[u8] = if kind == 4 { &[0; 4] } else { &[0, 0, 0, 1] };
    [&size[1..], &[kind, flags], stream, payload].concat()
}

impl Asked {
    fn bytes(&self) -> Vec<u8> {
        let mut block = Vec::new();
        let mut field = |name: &[u8], value: &[u8]| {
            block.push(0);
            string(name, &mut block);
            string(value, &mut block);
        };
        let authority = self.fields.iter().position(|(name, _)| name == b"host");
        field(b":method", &self.method);
        field(b":scheme", b"http");
        field(b":path", &self.target);
        authority.iter().for_each(|at| field(b":authority", &self.fields[*at].1));
        let others = self.fields.iter().enumerate().filter(|(at, _)| Some(*at) != authority);
        others.for_each(|(_, (name, value))| field(name, value));
        let mut out = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        out.extend(frame(4, 0, b""));
        let end_stream = u8::from(self.body.is_empty());
        let pieces: Vec<&[u8]> = block.chunks(16_384).collect();
        for (at, piece) in pieces.iter().enumerate() {
            let end_headers = if at + 1 == pieces.len() { 4 } else { 0 };
            let (kind, flags) = if at == 0 { (1, end_stream) } else { (9, 0) };
            out.extend(frame(kind, flags | end_headers, piece));
        }
        let pieces: Vec<&[u8]> = self.body.chunks(16_384).collect();
        for (at, piece) in pieces.iter().enumerate() {
            out.extend(frame(0, u8::from(at + 1 == pieces.len()), piece));
        }
        out
    }

    fn has(&self, name: &[u8]) -> bool {
        self.fields.iter().any(|(known, _)| known == name)
    }

    /// RFC 9113, 8.2.2: malformed, whatever the value.
    fn has_connection_field(&self) -> bool {
        let names: [&[u8]; 5] = [b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"];
        let te = |(name, value): &(Vec<u8>, Vec<u8>)| name == b"te" && value != b"trailers";
        names.iter().any(|name| self.has(name)) || self.fields.iter().any(te)
    }

    fn repeats_authority(&self) -> bool {
        let hosts: Vec<_> = self.fields.iter().filter(|(name, _)| name == b"host").collect();
        hosts.len() > 1 && hosts.iter().all(|host| *host == hosts[0])
    }

    fn ask(&self, at: SocketAddr) -> Outcome {
        let mut socket = TcpStream::connect(at).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut writer = socket.try_clone().unwrap();
        let bytes = self.bytes();
        std::thread::scope(|scope| {
            // It may be ended before all is sent.
            scope.spawn(move || drop(writer.write_all(&bytes)));
            let (mut buffer, mut status) = (Vec::new(), None);
            loop {
                while let Some((kind, flags, payload)) = next(&mut buffer) {
                    match kind {
                        1 => status = Some(status_of(&payload)).filter(|status| *status >= 200).or(status),
                        3 | 7 => return status.map_or(Outcome::Ended, Outcome::Status),
                        _ => {}
                    }
                    if matches!(kind, 0 | 1) && flags & 1 != 0 {
                        return Outcome::Status(status.unwrap());
                    }
                }
                let mut piece = [0; 16_384];
                match socket.read(&mut piece) {
                    Ok(n @ 1..) => buffer.extend_from_slice(&piece[..n]),
                    Err(error)
                        if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) =>
                    {
                        panic!("nothing comes for {:?}", String::from_utf8_lossy(&self.target));
                    }
                    _ => return status.map_or(Outcome::Ended, Outcome::Status),
                }
            }
        })
    }
}

/// The next frame in a buffer: kind, flags and payload.
fn next(buffer: &mut Vec<u8>) -> Option<(u8, u8, Vec<u8>)> {
    let [a, b, c, kind, flags, ..] = buffer[..] else { return None };
    let size = u32::from_be_bytes([0, a, b, c]) as usize;
    if buffer.len() < 9 + size {
        return None;
    }
    let payload = buffer[9..9 + size].to_vec();
    buffer.drain(..9 + size);
    Some((kind, flags, payload))
}

/// `:status` of a connection's first field block, which it begins with: from the static table, or three digits in huffman code.
fn status_of(block: &[u8]) -> u16 {
    match block {
        [indexed @ 0x88..=0x8e, ..] => [200, 204, 206, 304, 400, 404, 500][usize::from(indexed - 0x88)],
        [0x48 | 0x08, length, rest @ ..] if length & 0x80 == 0 => {
            std::str::from_utf8(&rest[..usize::from(*length)]).unwrap().parse().unwrap()
        }
        [0x48 | 0x08, length, rest @ ..] => {
            let bits: String = rest[..usize::from(length & 0x7f)].iter().map(|byte| format!("{byte:08b}")).collect();
            let (mut number, mut at) = (0, 0);
            for _ in 0..3 {
                // 0, 1 and 2 have five bits, the others six, from 3 on in their order.
                let (digit, taken) = match u16::from_str_radix(&bits[at..at + 5], 2).unwrap() {
                    digit @ 0..=2 => (digit, 5),
                    _ => (u16::from_str_radix(&bits[at..at + 6], 2).unwrap() - 0b01_1001 + 3, 6),
                };
                (number, at) = (number * 10 + digit, at + taken);
            }
            number
        }
        _ => panic!("no status: {block:?}"),
    }
}

/// Why HTTP/2 may say something else. `None`: it may not.
fn difference(case: &Case, asked: &Asked, got: Outcome) -> Option<&'static str> {
    let http1 = case.answers[0];
    match got {
        Outcome::Status(status) if status == http1 => Some("the same"),
        Outcome::Ended if asked.has_connection_field() => Some("a field about the connection is malformed (8.2.2)"),
        Outcome::Ended if http1 == 400 => Some("400, and malformed in HTTP/2: the stream ends"),
        Outcome::Ended | Outcome::Status(431) if matches!(http1, 414 | 431) => {
            Some("414 or 431, and more than the library takes: 431, or the stream ends")
        }
        _ if asked.repeats_authority() => Some("Host may repeat the authority (8.3.1)"),
        _ if http1 == 400 && asked.target.contains(&b'#') => Some("the library cuts fragments off"),
        _ => None,
    }
}

#[test]
fn over_http2_every_case_has_the_verdict_that_it_has_over_http1() {
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
    let scene = Scene::new(&format!("[[listener]]\naddress = \"{at}\"\n"));
    let (mut counts, mut failures) = (BTreeMap::<&str, usize>::new(), Vec::new());
    for case in tables::all() {
        let asked = match asked(&case) {
            Ok(asked) => asked,
            Err(why) => {
                *counts.entry(why).or_default() += 1;
                continue;
            }
        };
        scene.upstream.forget();
        let got = asked.ask(at);
        let difference = difference(&case, &asked, got);
        *counts.entry(difference.unwrap_or("no reason")).or_default() += 1;
        let mut problems = Vec::new();
        if difference.is_none() {
            problems.push(format!("{got:?} instead of {}", case.answers[0]));
        }
        let seen: Vec<Seen> = scene.upstream.seen();
        seen.iter().for_each(|seen| judge_request(seen, &mut problems));
        let whole = seen.iter().filter(|seen| seen.complete).count();
        if whole != usize::from(got == Outcome::Status(200)) {
            problems.push(format!("{whole} whole requests at the backend"));
        }
        failures.extend(problems.into_iter().map(|problem| format!("{}, {}: {problem}", case.class, case.name)));
    }
    failures.extend(scene.upstream.violations());
    failures.extend(scene.canary());
    failures.extend(scene.written());
    println!("{counts:#?}");
    assert!(counts["the same"] >= 650, "{counts:#?}");
    assert!(failures.is_empty(), "{} problems\n  {}", failures.len(), failures.join("\n  "));
}
