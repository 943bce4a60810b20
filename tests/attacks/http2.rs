//! The attacks over HTTP/2, by frames made here by hand: a client that sends fields no library would send. Whatever is refused
//! over HTTP/1 is refused here as well.

use super::{Case, Scene, expand, judge_request, tables};
use crate::harness::*;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};

pub(super) type Fields = Vec<(Vec<u8>, Vec<u8>)>;

/// An address for a listener that speaks HTTP/2 without TLS, and its section.
pub(super) fn listener() -> (SocketAddr, String) {
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
    (at, format!("[[listener]]\naddress = \"{at}\"\n"))
}

fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&size[1..], &[kind, flags, 0, 0, 0, u8::from(kind != 4)], payload].concat()
}

/// A field as a literal that is not indexed, without Huffman coding (RFC 7541, 6.2.2).
fn literal((name, value): &(Vec<u8>, Vec<u8>)) -> Vec<u8> {
    let text = |text: &[u8]| {
        let mut out = Vec::new();
        match text.len() {
            short @ 0..127 => out.push(u8::try_from(short).unwrap()),
            long => {
                out.push(127);
                let mut rest = long - 127;
                while rest >= 128 {
                    out.push(u8::try_from(rest % 128).unwrap() | 128);
                    rest /= 128;
                }
                out.push(u8::try_from(rest).unwrap());
            }
        }
        out.extend(text);
        out
    };
    [vec![0], text(name), text(value)].concat()
}

/// The status in a block of fields, of which it is the first. The gateway's first block on a connection cannot refer to
/// earlier ones.
fn status_of(block: &[u8]) -> Option<u16> {
    let [first, rest @ ..] = block else { return None };
    match first {
        0x88..=0x8e => Some([200, 204, 206, 304, 400, 404, 500][usize::from(first - 0x88)]),
        // A literal with the name of entry 8, coded by Huffman: 0, 1 and 2 have 5 bits, the other digits 6.
        0x48 | 0x08 | 0x18 => {
            let length = usize::from(rest.first()? & 0x7f);
            let text = rest.get(1..=length)?;
            if rest[0] & 0x80 == 0 {
                return std::str::from_utf8(text).ok()?.parse().ok();
            }
            let bits: String = text.iter().map(|byte| format!("{byte:08b}")).collect();
            let (mut at, mut status) = (0, 0);
            for _ in 0..3 {
                let number = |width: usize| u16::from_str_radix(bits.get(at..at + width)?, 2).ok();
                let (digit, width) = match number(5)? {
                    digit @ 0..=2 => (digit, 5),
                    _ => (number(6)?.checked_sub(22)?, 6),
                };
                status = status * 10 + digit;
                at += width;
            }
            Some(status)
        }
        _ => None,
    }
}

/// Sends one request on a connection of its own, and returns the final status; `None` if the stream or the connection was
/// reset. `body`: pieces of DATA, none for a head that ends the stream.
pub(super) fn ask(at: SocketAddr, fields: &Fields, body: &[&[u8]]) -> Option<u16> {
    let mut socket = TcpStream::connect(at).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.set_nodelay(true).unwrap();
    let block: Vec<u8> = fields.iter().flat_map(literal).collect();
    let mut bytes = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(4, 0, b"")].concat();
    let mut pieces = block.chunks(16_384).peekable();
    let mut kind = 1;
    while let Some(piece) = pieces.next() {
        let ends = if pieces.peek().is_none() { 4 } else { 0 };
        bytes.extend(frame(kind, ends | u8::from(kind == 1 && body.is_empty()), piece));
        kind = 9;
    }
    for (index, piece) in body.iter().enumerate() {
        bytes.extend(frame(0, u8::from(index + 1 == body.len()), piece));
    }
    // It may be closed meanwhile.
    let _: std::io::Result<()> = socket.write_all(&bytes);
    let (mut buffer, mut piece) = (Vec::new(), [0; 16 * 1024]);
    loop {
        while buffer.len() >= 9 {
            let length = u32::from_be_bytes([0, buffer[0], buffer[1], buffer[2]]) as usize;
            if buffer.len() < 9 + length {
                break;
            }
            let taken: Vec<u8> = buffer.drain(..9 + length).collect();
            match taken[3] {
                1 => match status_of(&taken[9..]) {
                    // Interim ones are followed by blocks that may refer to it; no test here asks for any.
                    Some(status) if status >= 200 => return Some(status),
                    other => panic!("not a status: {other:?} in {:?}", &taken[9..]),
                },
                3 | 7 => return None,
                _ => {}
            }
        }
        match socket.read(&mut piece) {
            Ok(0) => return None,
            Ok(n) => buffer.extend_from_slice(&piece[..n]),
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                panic!("no answer over HTTP/2 to {fields:?}");
            }
            Err(_) => return None,
        }
    }
}

/// The fields of a request without any surprise.
pub(super) fn fields(method: &str, target: &str, lines: &[(&str, &str)]) -> Fields {
    let pseudo = [(":method", method), (":scheme", "http"), (":path", target), (":authority", "h.test")];
    let lines = lines.iter().map(|(name, value)| (name.to_ascii_lowercase(), (*value).to_owned()));
    let pseudo = pseudo.map(|(name, value)| (name.to_owned(), value.to_owned())).into_iter();
    pseudo.chain(lines).map(|(name, value)| (name.into_bytes(), value.into_bytes())).collect()
}

/// Without the blanks that HTTP/1 allows around a value.
fn trimmed(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}

/// Whether a case that HTTP/1 refuses may pass over HTTP/2, and why that is harmless.
fn is_no_longer_ambiguous(case: &Case, fields: &Fields) -> bool {
    // The library cuts a fragment off before anything sees the target. What is judged is what is forwarded, without it.
    let is_fragment = fields.iter().any(|(name, value)| name == b":path" && value.contains(&b'#'));
    // A Host that equals the authority is what gateways from HTTP/1 send (RFC 9113, 8.3.1).
    is_fragment || case.name == "Host twice the same"
}

/// A request of the tables as HTTP/2 would carry it, if it is one request of which each line is a field. The first Host
/// becomes the authority; more of them stay fields. What follows the head is the body.
fn translated(case: &Case, number: usize) -> Option<(Fields, Vec<u8>)> {
    let bytes = expand(&case.text.replace("<H>", &format!("<H>X-Case: {number}\n")));
    let end = find(&bytes, b"\r\n\r\n")?;
    let (head, body) = (&bytes[..end], bytes[end + 4..].to_vec());
    let mut lines: Vec<&[u8]> = Vec::new();
    let mut rest = head;
    while let Some(at) = find(rest, b"\r\n") {
        lines.push(&rest[..at]);
        rest = &rest[at + 2..];
    }
    lines.push(rest);
    let words: Vec<&[u8]> = lines.first()?.split(|byte| *byte == b' ').collect();
    let [method, target, b"HTTP/1.1"] = words[..] else { return None };
    let mut host = None;
    let mut fields = Fields::new();
    for line in &lines[1..] {
        let colon = line.iter().position(|byte| *byte == b':')?;
        let (name, value) = (line[..colon].to_ascii_lowercase(), trimmed(&line[colon + 1..]).to_vec());
        if name == b"host" && host.is_none() {
            host = Some(value);
        } else {
            fields.push((name, value));
        }
    }
    let mut all: Fields = vec![
        (b":method".to_vec(), method.to_vec()),
        (b":scheme".to_vec(), b"http".to_vec()),
        (b":path".to_vec(), target.to_vec()),
    ];
    all.extend(host.map(|host| (b":authority".to_vec(), host)));
    all.extend(fields);
    (all.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>() < 60_000).then_some((all, body))
}

/// Every case of the tables that HTTP/2 can express at all: nothing that is refused over HTTP/1 passes here, and what passes
/// reaches the backend as clean.
#[test]
fn nothing_gets_further_by_http2_than_by_http1() {
    let (at, section) = listener();
    let scene = Scene::new(&section);
    let (mut tried, mut passed, mut problems) = (0, 0, Vec::new());
    for (number, case) in tables::all().iter().enumerate() {
        let [expected] = case.answers[..] else { continue };
        let Some((fields, body)) = translated(case, number) else { continue };
        tried += 1;
        scene.upstream.forget();
        let pieces: Vec<&[u8]> = body.chunks(16_000).collect();
        let status = ask(at, &fields, &pieces);
        let seen = scene.upstream.seen();
        let mut own = Vec::new();
        seen.iter().for_each(|seen| judge_request(seen, &mut own));
        let whole = seen.iter().filter(|seen| seen.complete).count();
        if status == Some(200) {
            passed += 1;
            let forwarded = seen.last().map(|seen| seen.target.clone()).unwrap_or_default();
            if is_no_longer_ambiguous(case, &fields) {
                // The part before the fragment is judged as any target, so that no dots are left either.
                let path = String::from_utf8_lossy(&fields[2].1).into_owned();
                let before = path.split('#').next().unwrap_or_default();
                if !before.starts_with(&forwarded) || forwarded.contains("..") {
                    own.push(format!("{forwarded:?} at the backend"));
                }
            } else if expected != 200 {
                own.push(format!("200 instead of {expected}"));
            }
            if let Some(target) = &case.target
                && seen.last().is_none_or(|seen| seen.target.as_bytes() != expand(target))
            {
                own.push(format!("not {target:?} at the backend: {seen:?}"));
            }
        }
        if whole != usize::from(status == Some(200)) {
            own.push(format!("{status:?}, and {whole} whole requests at the backend"));
        }
        if status.is_some_and(|status| status >= 500) {
            own.push(format!("a server error: {status:?}"));
        }
        problems.extend(own.into_iter().map(|what| format!("{}, {}: {what}", case.class, case.name)));
    }
    problems.extend(scene.canary());
    problems.extend(scene.written());
    println!("{tried} of {} cases over HTTP/2, {passed} passed", tables::all().len());
    assert!(tried > 900 && passed > 150, "{tried} tried, {passed} passed");
    assert!(problems.is_empty(), "{} problems\n  {}", problems.len(), problems.join("\n  "));
}

#[test]
fn the_status_is_read_as_the_field_coding_says() {
    assert_eq!(status_of(&[0x88]), Some(200));
    assert_eq!(status_of(&[0x8c, 0x61]), Some(400));
    // RFC 7541, C.6.1 and C.6.2: 302 and 307.
    assert_eq!(status_of(&[0x48, 0x82, 0x64, 0x02]), Some(302));
    assert_eq!(status_of(&[0x48, 0x83, 0x64, 0x0e, 0xff]), Some(307));
    assert_eq!(status_of(&[0x48, 0x03, b'4', b'0', b'1']), Some(401));
    assert_eq!(status_of(&[0x82]), None);
}
