//! Checks that a request target is unambiguous, and computes the canonical path that routes are matched on.
//! Pure. The client's own bytes are forwarded; the canonical form is used for matching only.

use super::seeded::{self, Rule};
use super::view::split_target;
use std::borrow::Cow;

/// Why the backend could read a target differently. The names are log reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetFault {
    #[error("a byte that is illegal in a target")]
    IllegalByte,
    #[error("a `%` that is not followed by two hex digits")]
    BadEscape,
    #[error("a raw or encoded dot segment in the path")]
    DotSegment,
    #[error("a raw or encoded backslash in the path")]
    Backslash,
    #[error("an encoded control byte in the path")]
    ControlByte,
    #[error("a fragment")]
    Fragment,
    #[error("a prefix that is to be replaced, in another spelling than the route's")]
    PrefixSpelling,
    #[error("a path that another server could read as one with a stricter route")]
    AmbiguousPath,
}

/// Refuses every target that two parsers could split, decode or resolve differently.
pub fn check(target: &[u8]) -> Result<(), TargetFault> {
    let (path, query) = split_target(target);
    check_path(path)?;
    query.map_or(Ok(()), check_query)
}

fn check_path(path: &[u8]) -> Result<(), TargetFault> {
    let mut segment = DotCheck::default();
    let mut rest = path;
    while let [byte, tail @ ..] = rest {
        rest = tail;
        match byte {
            _ if PLAIN_IN_PATH[usize::from(*byte)] => segment.other = true,
            b'%' => {
                let decoded = escape(tail).ok_or(TargetFault::BadEscape)?;
                rest = &tail[2..];
                match decoded {
                    b'\\' => return Err(TargetFault::Backslash),
                    0..=0x1f | 0x7f => return Err(TargetFault::ControlByte),
                    // Bytes that never occur in UTF-8. The first two, and longer forms whose second byte is too low,
                    // could be an overlong `.` or `/`.
                    0xc0 | 0xc1 | 0xf5..=0xff => return Err(TargetFault::IllegalByte),
                    0xe0 | 0xf0 if is_overlong(decoded, rest) => return Err(TargetFault::IllegalByte),
                    b'.' if seeded::off(Rule::EscapedDots) => segment.other = true,
                    // An encoded slash is legal inside a project path (`group%2Fproject`). It ends a segment here,
                    // because some servers decode it before they resolve dot segments.
                    _ => segment.push(decoded)?,
                }
            }
            b'\\' => return Err(TargetFault::Backslash),
            b'#' => return Err(TargetFault::Fragment),
            _ if is_path_byte(*byte) => segment.push(*byte)?,
            _ => return Err(TargetFault::IllegalByte),
        }
    }
    segment.end()
}

/// Whether an encoded lead byte begins an overlong UTF-8 sequence.
fn is_overlong(lead: u8, rest: &[u8]) -> bool {
    let second = rest.strip_prefix(b"%").and_then(escape);
    second.is_some_and(|byte| (0x80..if lead == 0xe0 { 0xa0 } else { 0x90 }).contains(&byte))
}

/// Finds segments that are `.` or `..`, also with a parameter after them (`..;x`).
#[derive(Default)]
struct DotCheck {
    dots: usize,
    other: bool,
}

impl DotCheck {
    fn push(&mut self, byte: u8) -> Result<(), TargetFault> {
        match byte {
            b'/' => {
                self.end()?;
                *self = Self::default();
            }
            b';' => self.end()?,
            b'.' => self.dots += 1,
            _ => self.other = true,
        }
        Ok(())
    }

    fn end(&self) -> Result<(), TargetFault> {
        if !self.other && matches!(self.dots, 1 | 2) { Err(TargetFault::DotSegment) } else { Ok(()) }
    }
}

fn check_query(query: &[u8]) -> Result<(), TargetFault> {
    let mut rest = query;
    while let [byte, tail @ ..] = rest {
        rest = tail;
        match byte {
            b'%' => {
                escape(tail).ok_or(TargetFault::BadEscape)?;
                rest = &tail[2..];
            }
            b'#' => return Err(TargetFault::Fragment),
            _ if QUERY[usize::from(*byte)] => {}
            _ => return Err(TargetFault::IllegalByte),
        }
    }
    Ok(())
}

static PLAIN_IN_PATH: [bool; 256] = byte_set!(is_plain_in_path);
static QUERY: [bool; 256] = byte_set!(is_query_byte);

/// The bytes of a path that stand for themselves and neither end a segment nor make a dot segment.
const fn is_plain_in_path(byte: u8) -> bool {
    is_path_byte(byte) && !matches!(byte, b'/' | b'.' | b';')
}

/// RFC 3986 `pchar` and `/`, and the bytes that browsers leave unencoded besides (WHATWG URL standard): nginx, HAProxy
/// and Puma accept them, and none of them is a separator.
const fn is_path_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(byte, b'!' | b'$' | b'&'..=b'/' | b':' | b';' | b'=' | b'@' | b'_' | b'~')
        || is_raw_in_paths(byte)
}

/// The bytes of a path that browsers send unencoded and other clients encode.
const fn is_raw_in_paths(byte: u8) -> bool {
    matches!(byte, b'[' | b']' | b'|' | b'^')
}

/// The same for a query, where RFC 3986 allows `?` and browsers leave the others unencoded.
const fn is_query_byte(byte: u8) -> bool {
    is_path_byte(byte) || matches!(byte, b'?' | b'\\' | b'`' | b'{' | b'}')
}

/// The byte that two hex digits stand for.
pub(crate) fn escape(digits: &[u8]) -> Option<u8> {
    let hex = |digit: &u8| (*digit as char).to_digit(16);
    match digits {
        [high, low, ..] => Some((hex(high)? * 16 + hex(low)?) as u8),
        _ => None,
    }
}

/// Whether a path holds a byte that backends treat the same raw and encoded while [`canonical`] does not. Patterns must
/// not contain one in either form.
pub(super) fn has_two_forms(path: &[u8]) -> bool {
    let encoded = |at: usize, byte: u8| byte == b'%' && escape(&path[at + 1..]).is_some_and(is_raw_in_paths);
    path.iter().enumerate().any(|(at, byte)| is_raw_in_paths(*byte) || encoded(at, *byte))
}

/// The form that routes are matched on: escapes of unreserved characters decoded, other escapes in upper case, repeated
/// slashes merged, trailing slash and `.json` removed. Backends treat all these spellings as one endpoint.
pub fn canonical(path: &[u8]) -> Cow<'_, [u8]> {
    let plain = memchr::memchr(b'%', path).is_none() && memchr::memmem::find(path, b"//").is_none();
    let mut path = if plain { Cow::Borrowed(path) } else { Cow::Owned(decode_and_squeeze(path)) };
    loop {
        let cut = match path.as_ref() {
            [b'/'] => return path,
            [rest @ .., b'/'] => rest.len(),
            [rest @ .., b'.', b'j', b's', b'o', b'n'] if ends_in_a_name(rest) => rest.len(),
            _ => return path,
        };
        match &mut path {
            Cow::Borrowed(bytes) => *bytes = &bytes[..cut],
            Cow::Owned(bytes) => bytes.truncate(cut),
        }
    }
}

/// Whether something would be left of the last segment without its `.json`, and no dot segment: not even for whoever reads an
/// escaped slash as one, or leaves out a parameter. Escapes are in capitals by now.
fn ends_in_a_name(path: &[u8]) -> bool {
    // From the end, and not beyond the first byte that is neither: it is asked for each ending of many.
    let (mut rest, mut dots, mut empty) = (path, 0, true);
    loop {
        rest = match rest {
            [before @ .., b'.'] => {
                dots += 1;
                before
            }
            [before @ .., b';'] | [before @ .., b'%', b'3', b'B'] => before,
            [] | [.., b'/'] => return !empty && !matches!(dots, 1 | 2),
            [.., b'%', b'2', b'F'] | [.., b'%', b'5', b'C'] => return !matches!(dots, 1 | 2),
            _ => return true,
        };
        empty = false;
    }
}

fn decode_and_squeeze(path: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path;
    while let [byte, tail @ ..] = rest {
        rest = tail;
        match (byte, escape(tail)) {
            (b'%', Some(decoded)) if decoded.is_ascii_alphanumeric() || b"-._~".contains(&decoded) => {
                out.push(decoded);
                rest = &tail[2..];
            }
            (b'%', Some(_)) => {
                out.push(b'%');
                let in_capitals = |b: &u8| if seeded::off(Rule::EscapeCase) { *b } else { b.to_ascii_uppercase() };
                out.extend(tail[..2].iter().map(in_capitals));
                rest = &tail[2..];
            }
            (b'/', _) if out.last() == Some(&b'/') => {}
            _ => out.push(*byte),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ambiguous_targets() {
        use TargetFault::*;
        for (target, fault) in [
            ("/api/../x", DotSegment),
            ("/api/./x", DotSegment),
            ("/api/%2e%2E/x", DotSegment),
            ("/api/.%2e", DotSegment),
            ("/api/..;/x", DotSegment),
            ("/api/..;a=b/x", DotSegment),
            ("/a%2F..%2Fb", DotSegment),
            ("/..%2fx", DotSegment),
            ("/x/..", DotSegment),
            ("/.", DotSegment),
            ("/a\\b", Backslash),
            ("/a%5cb", Backslash),
            ("/a%5Cb", Backslash),
            ("/a%00", ControlByte),
            ("/a%0d%0aX:y", ControlByte),
            ("/a%7f", ControlByte),
            ("/a#b", Fragment),
            ("/a?b#c", Fragment),
            ("/a%zz", BadEscape),
            ("/a%", BadEscape),
            ("/a?b=%u0041", BadEscape),
            ("/a?%2", BadEscape),
            ("/a\u{7f}", IllegalByte),
            ("/a\"", IllegalByte),
            ("/a<b>", IllegalByte),
            ("/\u{e9}", IllegalByte),
            ("/a?x=\"", IllegalByte),
            ("/%c0%ae%c0%ae/", IllegalByte),
            ("/a`b", IllegalByte),
            ("/a{b}", IllegalByte),
            ("/a[b]\\c", Backslash),
            ("/a?x=<b>", IllegalByte),
            ("/a?x=\u{e9}", IllegalByte),
            ("/a[/../b]", DotSegment),
            ("/%e0%80%ae", IllegalByte),
            ("/%f0%80%80%af", IllegalByte),
        ] {
            assert_eq!(check(target.as_bytes()), Err(fault), "{target}");
        }
        for target in [
            "/api/v3/projects/group%2Fproject",
            "/a/...",
            "/a..b/.c",
            "/a;b=c",
            "//a//b/",
            "/a?labels[]=x&q=%0a%5c..",
            "/%C3%A9t%C3%A9",
            "/a?x=../..",
            "/a%252e%252e",
            "/a?",
            "/projects/1/repository/files?file_path=a%2Fb",
            "/a[b]/c|d^e",
            "/a?x=[b]|c^d\\e`f{g}",
        ] {
            assert_eq!(check(target.as_bytes()), Ok(()), "{target}");
        }
    }

    /// The bytes from 0x21 to 0x7e, without letters and digits, that Node 20's `new URL()` (WHATWG URL standard) leaves
    /// unencoded in a target. It turns `\\` in a path into `/`.
    #[test]
    fn what_browsers_send_raw_passes() {
        const PATH: &[u8] = b"!$%&'()*+,-./:;=@[]^_|~";
        const QUERY: &[u8] = b"!$%&()*+,-./:;=?@[\\]^_`{|}~";
        let mut seen = 0;
        for byte in (0x21..=0x7e).filter(|b: &u8| !b.is_ascii_alphanumeric() && !b"%?#".contains(b)) {
            let passes = |before: &[u8]| check(&[before, b"a", &[byte], b"b"].concat()).is_ok();
            assert_eq!(passes(b"/"), PATH.contains(&byte), "{} in a path", byte as char);
            // Clients other than browsers send `'` unencoded in a query, as RFC 3986 allows.
            assert_eq!(passes(b"/?"), QUERY.contains(&byte) || byte == b'\'', "{} in a query", byte as char);
            seen += 1;
        }
        assert_eq!(seen, 29);
        for byte in (0..=0x20).chain(0x7f..=0xff) {
            for before in [&b"/a"[..], b"/a?"] {
                assert!(check(&[before, &[byte]].concat()).is_err(), "{byte:#x}");
            }
        }
    }

    #[test]
    fn one_form_for_matching() {
        for (path, expected) in [
            ("/api/v3/session", "/api/v3/session"),
            ("/api//v3/session/", "/api/v3/session"),
            ("//api/v3//", "/api/v3"),
            ("/api/v3/%73ession.json", "/api/v3/session"),
            ("/", "/"),
            // Found by the fuzz target `path`: a canonical path holds no dot segment.
            ("/a/..json", "/a/..json"),
            ("/a%2f..json", "/a%2F..json"),
            ("/a%2F...json", "/a%2F...json"),
            ("/a%5c..json", "/a%5C..json"),
            ("/a%2f.json", "/a%2F"),
            ("/a/b..json", "/a/b."),
            ("/;...json", "/;...json"),
            ("/a/%3b..json", "/a/%3B..json"),
            ("/a/x;..json", "/a/x;."),
            ("/a/;.json", "/a/;"),
            ("/a/...json.json/", "/a/...json"),
            ("///", "/"),
            ("/a%2Fb", "/a%2Fb"),
            ("/a%2fb%c3%A4", "/a%2Fb%C3%A4"),
            ("/a[b]|c^", "/a[b]|c^"),
            ("/a/.json", "/a/.json"),
            ("/a.json/", "/a"),
            ("/A", "/A"),
        ] {
            assert_eq!(canonical(path.as_bytes()), expected.as_bytes(), "{path}");
        }
    }
}
