//! The PROXY protocol, versions 1 and 2 (haproxy.org/download/3.0/doc/proxy-protocol.txt): the client's address, as a load
//! balancer says it at the start of a connection. Pure: who may send it, and how it is read, is decided elsewhere.

use super::seeded::{self, Rule};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// No header is shorter, of either version: so much can be read without taking anything that belongs to the client.
pub const SHORTEST: usize = 15;
/// Version 1 is one line: with its CRLF.
pub const LONGEST_LINE: usize = 107;
/// What version 2 begins with: signature, command, family, length.
pub const BINARY_PREFIX: usize = 16;
/// Addresses and extensions of version 2. More than any sender writes.
pub const LONGEST_BINARY: usize = 2048;

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

/// How to read on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyVersion {
    Line,
    Binary,
}

/// Why a connection does not begin with a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProxyFault {
    #[error("it does not begin with a PROXY protocol header")]
    Missing,
    #[error("the PROXY protocol header is malformed")]
    Malformed,
    #[error("the PROXY protocol header is too long")]
    TooLong,
}

/// The version, from the first [`SHORTEST`] bytes.
pub fn version(start: &[u8]) -> Result<ProxyVersion, ProxyFault> {
    match () {
        () if start.starts_with(SIGNATURE) => Ok(ProxyVersion::Binary),
        () if start.starts_with(b"PROXY ") => Ok(ProxyVersion::Line),
        () => Err(ProxyFault::Missing),
    }
}

/// A whole line of version 1, with its CRLF. `None`: the sender does not know the client, and the socket's address counts.
pub fn line(line: &[u8]) -> Result<Option<IpAddr>, ProxyFault> {
    let text =
        line.strip_suffix(b"\r\n").and_then(|line| std::str::from_utf8(line).ok()).ok_or(ProxyFault::Malformed)?;
    let mut words = text.split(' ');
    let (Some("PROXY"), Some(family)) = (words.next(), words.next()) else { return Err(ProxyFault::Malformed) };
    if family == "UNKNOWN" {
        // The rest of the line is to be ignored.
        return Ok(None);
    }
    let mut next = || words.next().ok_or(ProxyFault::Malformed);
    let (source, destination) = (next()?, next()?);
    let ports = [next()?, next()?];
    if (words.next().is_some() && !seeded::off(Rule::ProxyLineEnd)) || !ports.into_iter().all(is_port) {
        return Err(ProxyFault::Malformed);
    }
    let read = |text: &str| match family {
        "TCP4" => text.parse::<Ipv4Addr>().ok().map(IpAddr::from),
        "TCP6" => text.parse::<Ipv6Addr>().ok().map(IpAddr::from),
        _ => None,
    };
    match (read(source), read(destination)) {
        (Some(source), Some(_)) => Ok(Some(source.to_canonical())),
        _ => Err(ProxyFault::Malformed),
    }
}

/// Decimal, without a sign or a leading zero, as the protocol demands.
fn is_port(text: &str) -> bool {
    let plain = !text.is_empty() && text.len() <= 5 && text.bytes().all(|b| b.is_ascii_digit());
    plain && (text == "0" || !text.starts_with('0')) && text.parse::<u16>().is_ok()
}

/// How many bytes come behind the first [`BINARY_PREFIX`] of version 2.
pub fn binary_length(prefix: &[u8; BINARY_PREFIX]) -> Result<usize, ProxyFault> {
    if !prefix.starts_with(SIGNATURE) || prefix[12] >> 4 != 2 {
        return Err(ProxyFault::Malformed);
    }
    let length = usize::from(u16::from_be_bytes([prefix[14], prefix[15]]));
    if length > LONGEST_BINARY { Err(ProxyFault::TooLong) } else { Ok(length) }
}

/// A whole header of version 2. `None`: the sender speaks for itself (LOCAL), or the client has no address, and the socket's
/// address counts.
pub fn binary(prefix: &[u8; BINARY_PREFIX], rest: &[u8]) -> Result<Option<IpAddr>, ProxyFault> {
    if binary_length(prefix)? != rest.len() {
        return Err(ProxyFault::Malformed);
    }
    match prefix[12] & 0x0F {
        // LOCAL: what follows is to be ignored.
        0 => return Ok(None),
        1 => {}
        _ => return Err(ProxyFault::Malformed),
    }
    let (address, extensions): (Option<IpAddr>, &[u8]) = match prefix[13] {
        // Unspecified.
        0x00 => return Ok(None),
        // TCP over IPv4, over IPv6, a Unix stream.
        0x11 => {
            let (address, rest) = rest.split_at_checked(12).ok_or(ProxyFault::Malformed)?;
            let octets: [u8; 4] = address[..4].try_into().map_err(|_| ProxyFault::Malformed)?;
            (Some(Ipv4Addr::from(octets).into()), rest)
        }
        0x21 => {
            let (address, rest) = rest.split_at_checked(36).ok_or(ProxyFault::Malformed)?;
            let octets: [u8; 16] = address[..16].try_into().map_err(|_| ProxyFault::Malformed)?;
            (Some(IpAddr::from(octets).to_canonical()), rest)
        }
        0x31 => (None, rest.split_at_checked(216).ok_or(ProxyFault::Malformed)?.1),
        _ => return Err(ProxyFault::Malformed),
    };
    if extensions_are_whole(extensions) { Ok(address) } else { Err(ProxyFault::Malformed) }
}

/// Type, length and value, one after the other.
fn extensions_are_whole(mut rest: &[u8]) -> bool {
    while let [_, high, low, behind @ ..] = rest {
        match behind.split_at_checked(usize::from(u16::from_be_bytes([*high, *low]))) {
            Some((_, next)) => rest = next,
            None => return false,
        }
    }
    rest.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(command: u8, family: u8, length: u16) -> [u8; BINARY_PREFIX] {
        let mut prefix = [0; BINARY_PREFIX];
        prefix[..12].copy_from_slice(SIGNATURE);
        (prefix[12], prefix[13]) = (command, family);
        prefix[14..].copy_from_slice(&length.to_be_bytes());
        prefix
    }

    #[test]
    fn lines_are_read_by_the_grammar_alone() {
        let address = |text: &str| Some(text.parse::<IpAddr>().unwrap());
        for (text, read) in [
            ("PROXY TCP4 192.0.2.7 10.0.0.1 50000 443", Ok(address("192.0.2.7"))),
            ("PROXY TCP6 2001:db8::7 2001:db8::1 0 65535", Ok(address("2001:db8::7"))),
            ("PROXY TCP6 ::ffff:192.0.2.7 ::1 1 2", Ok(address("192.0.2.7"))),
            ("PROXY UNKNOWN", Ok(None)),
            ("PROXY UNKNOWN anything 1 2 3 at all", Ok(None)),
            ("PROXY", Err(())),
            ("PROXY TCP4 192.0.2.7 10.0.0.1 50000", Err(())),
            ("PROXY TCP4 192.0.2.7 10.0.0.1 50000 443 x", Err(())),
            ("PROXY TCP4 192.0.2.7 10.0.0.1 50000 443 ", Err(())),
            ("PROXY  TCP4 192.0.2.7 10.0.0.1 50000 443", Err(())),
            ("PROXY TCP4 192.0.2.7 10.0.0.1 050 443", Err(())),
            ("PROXY TCP4 192.0.2.7 10.0.0.1 +50 443", Err(())),
            ("PROXY TCP4 192.0.2.7 10.0.0.1 65536 443", Err(())),
            ("PROXY TCP4 192.0.02.7 10.0.0.1 5 443", Err(())),
            ("PROXY TCP4 2001:db8::7 2001:db8::1 5 443", Err(())),
            ("PROXY TCP6 192.0.2.7 10.0.0.1 5 443", Err(())),
            ("PROXY UDP4 192.0.2.7 10.0.0.1 5 443", Err(())),
            ("proxy TCP4 192.0.2.7 10.0.0.1 5 443", Err(())),
        ] {
            assert_eq!(line(format!("{text}\r\n").as_bytes()).map_err(|_| ()), read, "{text}");
            assert!(line(format!("{text}\n").as_bytes()).is_err() && line(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn binary_headers_are_read_by_the_grammar_alone() {
        let v4 = [192, 0, 2, 7, 10, 0, 0, 1, 0xC3, 0x50, 1, 0xBB];
        let read = |command, family, rest: &[u8]| {
            binary(&prefix(command, family, u16::try_from(rest.len()).unwrap()), rest).map_err(|_| ())
        };
        let client = Some("192.0.2.7".parse::<IpAddr>().unwrap());
        assert_eq!(read(0x21, 0x11, &v4), Ok(client));
        assert_eq!(read(0x21, 0x11, &[&v4[..], &[4, 0, 2, 9, 9], &[3, 0, 0]].concat()), Ok(client), "extensions");
        for broken in [&[4, 0, 3, 9, 9][..], &[4], &[4, 0]] {
            assert_eq!(read(0x21, 0x11, &[&v4[..], broken].concat()), Err(()), "a cut extension");
        }
        let mut v6 = [0; 36];
        v6[..16].copy_from_slice(&"2001:db8::7".parse::<Ipv6Addr>().unwrap().octets());
        assert_eq!(read(0x21, 0x21, &v6), Ok(Some("2001:db8::7".parse().unwrap())));
        v6[..16].copy_from_slice(&"::ffff:192.0.2.7".parse::<Ipv6Addr>().unwrap().octets());
        assert_eq!(read(0x21, 0x21, &v6), Ok(client));
        // LOCAL, unspecified and a Unix stream say nothing of an address.
        assert_eq!((read(0x20, 0x11, &v4), read(0x20, 0, &[]), read(0x21, 0, &[1, 2])), (Ok(None), Ok(None), Ok(None)));
        assert_eq!((read(0x21, 0x31, &[0; 216]), read(0x21, 0x31, &[0; 215])), (Ok(None), Err(())));
        // Another version, another command, datagrams, unknown families, too few bytes.
        for (command, family) in
            [(0x11, 0x11), (0x31, 0x11), (0x22, 0x11), (0x21, 0x12), (0x21, 0x22), (0x21, 0x41), (0x21, 1)]
        {
            assert_eq!(read(command, family, &v4), Err(()), "{command:x} {family:x}");
        }
        assert_eq!((read(0x21, 0x11, &v4[..11]), read(0x21, 0x21, &v6[..35])), (Err(()), Err(())));
        assert_eq!(binary(&prefix(0x21, 0x11, 13), &v4), Err(ProxyFault::Malformed), "another length than it says");
        assert_eq!(binary_length(&prefix(0x21, 0x11, 2049)), Err(ProxyFault::TooLong));
    }

    #[test]
    fn the_shortest_headers_tell_their_version() {
        assert_eq!(b"PROXY UNKNOWN\r\n".len(), SHORTEST);
        assert_eq!(version(b"PROXY UNKNOWN\r\n"), Ok(ProxyVersion::Line));
        assert_eq!(version(&prefix(0x20, 0, 0)), Ok(ProxyVersion::Binary));
        for other in [
            &b"GET / HTTP/1.1\r"[..],
            b"PROXYTCP4 1.1.1",
            b"\r\n\r\n\0\r\nQUIT\r..",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03....",
        ] {
            assert_eq!(version(other), Err(ProxyFault::Missing));
        }
    }
}
