//! Formats of few bytes: chunks and the PROXY protocol.

use httparse::{EMPTY_HEADER, Status};
use std::net::IpAddr;
use tollgate::request::chunked::ChunkedBody;
use tollgate::request::proxy_protocol::{self, BINARY_PREFIX, ProxyVersion};

/// The data of a chunked body and how long it was. `None`: it is not over.
type Whole = Option<(Vec<u8>, usize)>;

fn in_pieces(body: &[u8], size: usize) -> Result<Whole, ()> {
    let (mut walk, mut data, mut taken) = (ChunkedBody::default(), Vec::new(), 0);
    for piece in body.chunks(size.max(1)) {
        let mut rest = piece;
        while !rest.is_empty() && !walk.is_done() {
            let run = walk.next_data(rest).map_err(|_| ())?;
            assert!(run.start <= run.end_of_run && run.end_of_run <= rest.len(), "a run outside of the bytes");
            assert!(run.end_of_run > 0, "no step forward");
            data.extend_from_slice(&rest[run.start..run.end_of_run]);
            taken += run.end_of_run;
            rest = &rest[run.end_of_run..];
        }
        if walk.is_done() {
            return Ok(Some((data, taken)));
        }
    }
    Ok(None)
}

/// The grammar of RFC 9112, of whole bodies only, without a limit.
fn by_the_grammar(body: &[u8]) -> Option<(Vec<u8>, usize)> {
    let (mut data, mut at) = (Vec::new(), 0);
    let line = |from: usize| {
        let length = body[from..].windows(2).position(|two| two == b"\r\n")?;
        let line = &body[from..from + length];
        let plain = line.iter().all(|b| *b == b'\t' || (*b >= 0x20 && *b != 0x7f));
        plain.then_some((line, from + length + 2))
    };
    loop {
        let (size, behind) = line(at)?;
        let digits = size.split(|b| *b == b';').next()?;
        let legal = !digits.is_empty() && digits.iter().all(u8::is_ascii_hexdigit);
        let extension = size[digits.len()..].is_ascii();
        let size = usize::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok().filter(|_| legal && extension)?;
        at = behind;
        if size == 0 {
            break;
        }
        data.extend_from_slice(body.get(at..at.checked_add(size)?)?);
        at += size;
        if body.get(at..at + 2)? != b"\r\n" {
            return None;
        }
        at += 2;
    }
    loop {
        let (field, behind) = line(at)?;
        at = behind;
        if field.is_empty() {
            return Some((data, at));
        }
        let colon = field.iter().position(|b| *b == b':')?;
        let token = |b: &u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(b);
        if colon == 0 || !field[..colon].iter().all(token) {
            return None;
        }
    }
}

/// The same by httparse, as a backend may.
fn by_httparse(body: &[u8]) -> Option<(Vec<u8>, usize)> {
    let (mut data, mut at) = (Vec::new(), 0);
    loop {
        let Ok(Status::Complete((length, size))) = httparse::parse_chunk_size(&body[at..]) else { return None };
        at += length;
        let size = usize::try_from(size).ok()?;
        if size == 0 {
            break;
        }
        data.extend_from_slice(body.get(at..at.checked_add(size)?)?);
        at += size + 2;
    }
    let mut fields = [EMPTY_HEADER; 4096];
    let Ok(Status::Complete((length, _))) = httparse::parse_headers(body.get(at..)?, &mut fields) else { return None };
    Some((data, at + length))
}

pub fn chunks(data: &[u8]) {
    let Some((size, body)) = data.split_first() else { return };
    let whole = in_pieces(body, body.len());
    for size in [1, usize::from(*size)] {
        assert_eq!(in_pieces(body, size), whole, "the same body in pieces of {size}");
    }
    let grammar = by_the_grammar(body);
    match whole {
        Ok(Some(read)) => {
            assert_eq!(grammar.as_ref(), Some(&read), "not by the grammar");
            assert_eq!(by_httparse(body), Some(read), "httparse reads another body");
        }
        // What is longer than the limits is refused.
        Ok(None) | Err(()) => {
            let small = body.len() < 256 && !body.windows(15).any(|run| run.iter().all(u8::is_ascii_hexdigit));
            assert!(grammar.is_none() || !small, "a good body is refused");
        }
    }
}

pub fn proxy(data: &[u8]) {
    if data.len() < proxy_protocol::SHORTEST {
        return;
    }
    match proxy_protocol::version(&data[..proxy_protocol::SHORTEST]) {
        Err(_) => {
            let known = ppp::v1::Header::try_from(data).is_ok() || ppp::v2::Header::try_from(data).is_ok();
            assert!(!known, "a header is taken for none");
        }
        Ok(ProxyVersion::Line) => line(data),
        Ok(ProxyVersion::Binary) => binary(data),
    }
}

/// Version 1.
fn line(data: &[u8]) {
    let Some(end) = data.windows(2).position(|two| two == b"\r\n").map(|at| at + 2) else { return };
    let bytes = &data[..end.min(proxy_protocol::LONGEST_LINE)];
    let ours = proxy_protocol::line(bytes);
    let theirs = ppp::v1::Header::try_from(bytes).map(|header| header.addresses);
    let source = match theirs {
        Ok(ppp::v1::Addresses::Tcp4(addresses)) => Some(Some(IpAddr::from(addresses.source_address))),
        Ok(ppp::v1::Addresses::Tcp6(addresses)) => Some(Some(IpAddr::from(addresses.source_address).to_canonical())),
        Ok(ppp::v1::Addresses::Unknown) => Some(None),
        Err(_) => None,
    };
    // A bare CR ends the line to the other reader.
    let plain = !bytes[..bytes.len() - 2].contains(&b'\r');
    match (ours, source) {
        (Ok(None), _) => assert!(bytes.starts_with(b"PROXY UNKNOWN"), "no client"),
        (Ok(ours), theirs) => assert_eq!(Some(ours), theirs, "another address"),
        (Err(_), Some(Some(_))) => assert!(!plain || bytes.contains(&b'+'), "a good line is refused"),
        (Err(_), _) => {}
    }
}

/// Version 2.
fn binary(data: &[u8]) {
    let Some(prefix) = data.first_chunk::<BINARY_PREFIX>() else { return };
    let Ok(length) = proxy_protocol::binary_length(prefix) else { return };
    let Some(rest) = data.get(BINARY_PREFIX..BINARY_PREFIX + length) else { return };
    let ours = proxy_protocol::binary(prefix, rest);
    let theirs = ppp::v2::Header::try_from(&data[..BINARY_PREFIX + length]);
    let Ok(header) = theirs else {
        assert!(!matches!(ours, Ok(Some(_))), "an address where the other reader finds none");
        return;
    };
    let source = match (header.command, header.addresses) {
        (ppp::v2::Command::Local, _) => None,
        (_, ppp::v2::Addresses::IPv4(addresses)) => Some(IpAddr::from(addresses.source_address)),
        (_, ppp::v2::Addresses::IPv6(addresses)) => Some(IpAddr::from(addresses.source_address).to_canonical()),
        _ => None,
    };
    let whole = header.tlvs().all(|extension| extension.is_ok());
    match ours {
        Ok(ours) => {
            assert_eq!(ours, source, "another address");
            assert!(ours.is_none() || whole, "a cut extension");
        }
        Err(_) => {
            let stream = header.protocol == ppp::v2::Protocol::Stream;
            assert!(!(stream && whole && source.is_some()), "a good header is refused");
        }
    }
}
