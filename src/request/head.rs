//! Parses the head of an HTTP/1 request by a grammar so strict that no two parsers can disagree on it.
//! Pure: bytes in, a [`RequestView`] or the reason for a refusal out. It must never repair anything: whatever deviates
//! from the grammar is refused, because the next parser might repair it differently.

use super::seeded::{self, Rule};
use super::view::{Field, FieldKind, Fields, Framing, Method, RequestView, Version};
use memchr::memmem::Finder;
use std::sync::LazyLock;

/// Requests with more fields are refused with 431. HAProxy's default is 101.
pub const MAX_FIELDS: usize = 128;

/// Requests with more options in Connection are refused: clients need few, and each costs a comparison per field.
const MAX_CONNECTION_OPTIONS: usize = 16;

/// Empty lines to skip before a request line; RFC 9112 section 2.2 asks for at least one.
const MAX_LEADING_EMPTY_LINES: usize = 2;

/// Why a head cannot be read in exactly one way. The names are log reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadFault {
    #[error("the request line is not METHOD SP TARGET SP HTTP/1.x")]
    RequestLine,
    #[error("a header line is not NAME: VALUE terminated by CRLF")]
    FieldLine,
    #[error("Host is missing, repeated or malformed")]
    Host,
    #[error("Content-Length or Transfer-Encoding is ambiguous or malformed")]
    Framing,
    #[error("Connection is malformed or has too many options")]
    Connection,
    #[error("Expect has a value other than 100-continue")]
    Expect,
    #[error("more than one Content-Type")]
    ContentType,
    #[error("too many header fields")]
    TooManyFields,
}

/// Where the head ends (after its empty line), if it is complete. The first `scanned` bytes are known not to contain
/// the end.
pub fn end_of_head(bytes: &[u8], scanned: usize) -> Option<usize> {
    // Empty lines before the request line do not end the head. Counting them is cheap: there are few, or it is refused.
    let start = leading_empty_lines(bytes).max(scanned.saturating_sub(3));
    empty_line(bytes.get(start..)?).map(|at| start + at)
}

/// Behind the first empty line that follows another line.
pub(crate) fn empty_line(bytes: &[u8]) -> Option<usize> {
    // Made once: it costs more than a search in a small head.
    static END: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\r\n\r\n"));
    END.find(bytes).map(|at| at + 4)
}

/// Whether every byte is one of a value or of a line's end, and CR and LF stand nowhere but together. Without branches, so that
/// it looks at many bytes at once.
pub(crate) fn is_text_in_lines(head: &[u8]) -> bool {
    let ([first, behind @ ..], [before @ .., last]) = (head, head) else { return true };
    let is_other = |b: &u8| !is_value_byte(*b) & (*b != b'\r') & (*b != b'\n');
    let torn = before.iter().zip(behind).fold(false, |torn, (a, b)| torn | ((*a == b'\r') != (*b == b'\n')));
    !torn && *first != b'\n' && *last != b'\r' && !head.iter().fold(false, |found, b| found | is_other(b))
}

/// Whether the bytes received so far cannot become a valid head, so that there is no point in waiting for more: they do
/// not begin with a method, or a line ends without CR. The first `scanned` bytes have been checked before.
pub fn is_invalid_prefix(bytes: &[u8], scanned: usize) -> bool {
    let leading = leading_empty_lines(bytes);
    let begins_well = match &bytes[leading..] {
        [] | [b'\r'] => true,
        [first, ..] => is_token_byte(*first),
    };
    let from = scanned.max(leading).min(bytes.len());
    let mut ends = memchr::memchr_iter(b'\n', &bytes[from..]).map(|at| from + at);
    !begins_well || ends.any(|at| at == 0 || bytes[at - 1] != b'\r')
}

/// Whether an unparsable head asks for HEAD, as far as its beginning tells. The response must then have no body, or the
/// client would read the body as the beginning of the next response.
pub fn asks_for_head(read: &[u8]) -> bool {
    let start = read.iter().position(|b| !matches!(b, b'\r' | b'\n')).unwrap_or(read.len());
    let method = read[start..].split(|b| !is_token_byte(*b)).next();
    method == Some(b"HEAD")
}

/// The values of Origin in an unparsable head. Only lines in the form that browsers write, since only browsers use
/// CORS.
pub fn origins_of_unparsed(read: &[u8]) -> impl Iterator<Item = &[u8]> {
    read.split(|b| *b == b'\n').skip(1).filter_map(|line| {
        let (line, at) = (line.strip_suffix(b"\r")?, memchr::memchr(b':', line)?);
        line[..at].eq_ignore_ascii_case(b"origin").then(|| trim_blanks(&line[at + 1..]))
    })
}

fn leading_empty_lines(bytes: &[u8]) -> usize {
    let mut at = 0;
    while at < 2 * MAX_LEADING_EMPTY_LINES && bytes.get(at..at + 2) == Some(b"\r\n") {
        at += 2;
    }
    at
}

/// Parses a complete head, including its final empty line.
pub fn parse(head: &[u8]) -> Result<RequestView<'_>, HeadFault> {
    let is_text = is_text_in_lines(head);
    let mut rest = &head[leading_empty_lines(head)..];
    let (method_bytes, target, version) = request_line(next_line(&mut rest).ok_or(HeadFault::RequestLine)?)?;

    let mut fields = Fields::new();
    loop {
        let line = next_line(&mut rest).ok_or(HeadFault::FieldLine)?;
        if line.is_empty() {
            break;
        }
        if fields.len() == MAX_FIELDS {
            return Err(HeadFault::TooManyFields);
        }
        fields.push(field(line, is_text)?);
    }

    let facts = Gathered::gather(&fields, version)?;
    let method = Method::of(method_bytes);
    let (target, host) = reduce_target(method, target, facts.host)?;
    let websocket = facts.upgrade_option
        && facts.websocket
        && method == Method::Get
        && version == Version::Http11
        && facts.body == Framing::Empty;
    Ok(RequestView {
        method,
        method_bytes,
        target,
        version,
        host,
        body: facts.body,
        keep_alive: match version {
            // The bytes after a CONNECT were meant for a tunnel.
            Version::Http11 => !facts.close_option && method_bytes != b"CONNECT",
            Version::Http10 => facts.keep_alive_option && !facts.close_option,
        },
        expects_continue: facts.expects_continue && version == Version::Http11 && facts.body != Framing::Empty,
        websocket,
        fields,
    })
}

/// Takes one line, which must end in CRLF. A CR elsewhere is refused where the line is parsed.
fn next_line<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let end = memchr::memchr(b'\n', rest)?;
    let line = rest[..end].strip_suffix(b"\r")?;
    *rest = &rest[end + 1..];
    Some(line)
}

fn request_line(line: &[u8]) -> Result<(&[u8], &[u8], Version), HeadFault> {
    let first = memchr::memchr(b' ', line).ok_or(HeadFault::RequestLine)?;
    let last = memchr::memrchr(b' ', line).ok_or(HeadFault::RequestLine)?;
    if first == last {
        return Err(HeadFault::RequestLine);
    }
    let (method, target) = (&line[..first], &line[first + 1..last]);
    let version = match &line[last + 1..] {
        b"HTTP/1.1" => Version::Http11,
        b"HTTP/1.0" => Version::Http10,
        _ => return Err(HeadFault::RequestLine),
    };
    // `target` checks the bytes of the target; here it only must not contain a blank or a CR.
    let one_word = !target.is_empty() && !target.contains(&b' ') && !target.contains(&b'\r');
    if method.is_empty() || !method.iter().all(|b| is_token_byte(*b)) || !one_word {
        return Err(HeadFault::RequestLine);
    }
    Ok((method, target, version))
}

/// `is_text`: all values of the head are known to have legal bytes only.
fn field(line: &[u8], is_text: bool) -> Result<Field<'_>, HeadFault> {
    // A line that begins with a blank (obs-fold) does not begin with a token byte, so it is refused here as well.
    let colon = line.iter().position(|b| !is_token_byte(*b)).ok_or(HeadFault::FieldLine)?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    let is_legal = is_text || value.iter().all(|b| is_value_byte(*b));
    if name.is_empty() || line[colon] != b':' || !is_legal {
        return Err(HeadFault::FieldLine);
    }
    Ok(Field { name, value: trim_blanks(value), kind: FieldKind::of(name) })
}

/// What the fields together specify about the message and the connection.
struct Gathered<'a> {
    host: &'a [u8],
    body: Framing,
    close_option: bool,
    keep_alive_option: bool,
    upgrade_option: bool,
    websocket: bool,
    expects_continue: bool,
}

impl<'a> Gathered<'a> {
    fn gather(fields: &Fields<'a>, version: Version) -> Result<Self, HeadFault> {
        let (mut host, mut length, mut chunked) = (None, None, false);
        let (mut content_type, mut options, mut expect) = (false, 0, None);
        let mut facts = Gathered {
            host: b"",
            body: Framing::Empty,
            close_option: false,
            keep_alive_option: false,
            upgrade_option: false,
            websocket: false,
            expects_continue: false,
        };
        for field in fields {
            match field.kind {
                FieldKind::Host if (host.replace(field.value).is_some() || !is_host(field.value)) => {
                    return Err(HeadFault::Host);
                }
                FieldKind::ContentLength if length.replace(content_length(field.value)?).is_some() => {
                    return Err(HeadFault::Framing);
                }
                FieldKind::TransferEncoding => {
                    if chunked || !field.value.eq_ignore_ascii_case(b"chunked") {
                        return Err(HeadFault::Framing);
                    }
                    chunked = true;
                }
                // Another spelling of a framing header, which some servers accept as one.
                FieldKind::Alias if is_framing_alias(field.name) => return Err(HeadFault::Framing),
                FieldKind::Connection => {
                    for option in field.value.split(|b| *b == b',').map(trim_blanks) {
                        options += 1;
                        if options > MAX_CONNECTION_OPTIONS || !option.iter().all(|b| is_token_byte(*b)) {
                            return Err(HeadFault::Connection);
                        }
                        facts.close_option |= option.eq_ignore_ascii_case(b"close");
                        facts.keep_alive_option |= option.eq_ignore_ascii_case(b"keep-alive");
                        facts.upgrade_option |= option.eq_ignore_ascii_case(b"upgrade");
                    }
                }
                FieldKind::Upgrade => facts.websocket |= field.value.eq_ignore_ascii_case(b"websocket"),
                FieldKind::Expect => {
                    if expect.replace(()).is_some() || !field.value.eq_ignore_ascii_case(b"100-continue") {
                        return Err(HeadFault::Expect);
                    }
                    facts.expects_continue = true;
                }
                FieldKind::ContentType => {
                    if content_type {
                        return Err(HeadFault::ContentType);
                    }
                    content_type = true;
                }
                _ => {}
            }
        }
        facts.host = host.ok_or(HeadFault::Host)?;
        facts.body = match (length, chunked) {
            (None, false) | (Some(0), false) => Framing::Empty,
            (Some(n), false) => Framing::Length(n),
            (None, true) if version == Version::Http11 => Framing::Chunked,
            (Some(length), true) if seeded::off(Rule::BothFramings) => Framing::Length(length),
            _ => return Err(HeadFault::Framing),
        };
        Ok(facts)
    }
}

/// Digits without sign, list or leading zero, and few enough not to overflow a 63-bit counter.
pub(crate) fn content_length(value: &[u8]) -> Result<u64, HeadFault> {
    let plain =
        matches!(value, [b'0'] | [b'1'..=b'9', ..]) && value.len() <= 18 && value.iter().all(u8::is_ascii_digit);
    if !plain {
        return Err(HeadFault::Framing);
    }
    Ok(value.iter().fold(0, |n, digit| n * 10 + u64::from(digit - b'0')))
}

fn is_framing_alias(name: &[u8]) -> bool {
    let reads_as = |known: &[u8]| {
        name.len() == known.len()
            && name
                .iter()
                .zip(known)
                .all(|(a, b)| a.eq_ignore_ascii_case(b) || (*b == b'-' && !a.is_ascii_alphanumeric()))
    };
    reads_as(b"content-length") || reads_as(b"transfer-encoding")
}

/// Turns absolute-form into origin-form if its authority equals Host.
fn reduce_target<'a>(method: Method, target: &'a [u8], host: &'a [u8]) -> Result<(&'a [u8], &'a [u8]), HeadFault> {
    if target[0] == b'/' || method == Method::Other || (method == Method::Options && target == b"*") {
        return Ok((target, host));
    }
    let scheme_end = memchr::memmem::find(target, b"://").ok_or(HeadFault::RequestLine)?;
    let scheme = &target[..scheme_end];
    if !scheme.eq_ignore_ascii_case(b"http") && !scheme.eq_ignore_ascii_case(b"https") {
        return Err(HeadFault::RequestLine);
    }
    let rest = &target[scheme_end + 3..];
    // An absolute target without a path (`http://host?x`) would have to be repaired, so it is refused.
    let path = memchr::memchr(b'/', rest).ok_or(HeadFault::RequestLine)?;
    if !rest[..path].eq_ignore_ascii_case(host) {
        return Err(HeadFault::Host);
    }
    Ok((&rest[path..], host))
}

/// A host name or address with an optional port. Stricter than RFC 3986: no escapes, no sub-delimiters, no userinfo.
pub(super) fn is_host(value: &[u8]) -> bool {
    let (name, port) = if let Some(inner) = value.strip_prefix(b"[") {
        let Some(end) = memchr::memchr(b']', inner) else { return false };
        let address = std::str::from_utf8(&inner[..end]).ok().and_then(|text| text.parse::<std::net::Ipv6Addr>().ok());
        if address.is_none() {
            return false;
        }
        (&value[..end + 2], &value[end + 2..])
    } else {
        value.split_at(memchr::memchr(b':', value).unwrap_or(value.len()))
    };
    let plain = name.starts_with(b"[") || name.iter().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(b));
    let port_ok = match port {
        [] => true,
        [b':', digits @ ..] => {
            std::str::from_utf8(digits).is_ok_and(|d| d.bytes().all(|b| b.is_ascii_digit()) && d.parse::<u16>().is_ok())
        }
        _ => false,
    };
    !name.is_empty() && plain && port_ok
}

/// Removes optional white space as defined by RFC 9110: space and tab only.
pub(crate) fn trim_blanks(mut bytes: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] = bytes {
        bytes = rest;
    }
    while let [rest @ .., b' ' | b'\t'] = bytes {
        bytes = rest;
    }
    bytes
}

#[inline]
pub(crate) fn is_token_byte(byte: u8) -> bool {
    static TOKEN: [bool; 256] = byte_set!(is_tchar);
    TOKEN[usize::from(byte)]
}

/// RFC 9110 `tchar`.
const fn is_tchar(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(
            byte,
            b'!' | b'#' | b'$' | b'%' | b'&' | b'\'' | b'*' | b'+' | b'-' | b'.' | b'^' | b'_' | b'`' | b'|' | b'~'
        )
}

/// A field value's bytes: no control byte except tab. Bytes of 0x80 and above are legal and opaque.
const fn is_value_byte(byte: u8) -> bool {
    (byte == b'\t') | ((byte >= 0x20) & (byte != 0x7f))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(lines: &str) -> Vec<u8> {
        lines.replace('\n', "\r\n").into_bytes()
    }

    fn fault(lines: &str) -> Option<HeadFault> {
        parse(&head(lines)).err()
    }

    #[test]
    fn a_plain_request() {
        let bytes = head("GET /api/v3/projects?page=2 HTTP/1.1\nHost: h.test:80\nPRIVATE-TOKEN: \t a \t\n\n");
        let view = parse(&bytes).unwrap();
        assert_eq!(
            (view.method, view.path(), view.query()),
            (Method::Get, &b"/api/v3/projects"[..], Some(&b"page=2"[..]))
        );
        assert_eq!((view.body, view.keep_alive, view.websocket), (Framing::Empty, true, false));
        assert_eq!(view.fields[1].value, b"a");
        assert!(!format!("{view:?}").contains(": a"));
    }

    #[test]
    fn framing_in_doubt_is_refused() {
        for lines in [
            "Content-Length: 6\nContent-Length: 6",
            "Content-Length: 6, 6",
            "Content-Length: 06",
            "Content-Length: +6",
            "Content-Length: -6",
            "Content-Length:",
            "Content-Length: 0x6",
            "Content-Length: 6 6",
            "Content-Length: 18446744073709551622",
            "Content-Length: 6\nTransfer-Encoding: chunked",
            "Content-Length: 0\nTransfer-Encoding: chunked",
            "Transfer-Encoding: xchunked",
            "Transfer-Encoding: identity",
            "Transfer-Encoding: gzip, chunked",
            "Transfer-Encoding: chunked\nTransfer-Encoding: chunked",
            "Transfer-Encoding:",
            "Transfer_Encoding: chunked",
            "Content_Length: 6",
            "Content.Length: 6",
        ] {
            assert_eq!(fault(&format!("POST / HTTP/1.1\nHost: h\n{lines}\n\n")), Some(HeadFault::Framing), "{lines}");
        }
        assert_eq!(fault("POST / HTTP/1.0\nHost: h\nTransfer-Encoding: chunked\n\n"), Some(HeadFault::Framing));
        assert_eq!(
            parse(&head("POST / HTTP/1.1\nHost: h\ntransfer-encoding: Chunked\n\n")).unwrap().body,
            Framing::Chunked
        );
        assert_eq!(parse(&head("POST / HTTP/1.1\nHost: h\nContent-Length: 6 \n\n")).unwrap().body, Framing::Length(6));
    }

    #[test]
    fn one_wellformed_host() {
        for host in
            ["", "a@b", "a/b", "a, b", "a b", "h:99999", "h:", "[::1", "[::1]x", "[zz]", "h:8x", "a%41", "a?b", "a#b"]
        {
            assert_eq!(fault(&format!("GET / HTTP/1.1\nHost: {host}\n\n")), Some(HeadFault::Host), "{host}");
        }
        for host in ["h", "h.test:8080", "[::1]:80", "10.0.0.1", "a_b"] {
            assert_eq!(fault(&format!("GET / HTTP/1.1\nHost: {host}\n\n")), None, "{host}");
        }
        assert_eq!(fault("GET / HTTP/1.1\n\n"), Some(HeadFault::Host));
        assert_eq!(fault("GET / HTTP/1.0\n\n"), Some(HeadFault::Host));
        assert_eq!(fault("GET / HTTP/1.1\nHost: h\nHost: h\n\n"), Some(HeadFault::Host));
    }

    #[test]
    fn absolute_form_only_for_ourselves() {
        let bytes = head("GET HTTP://H.test/api?x HTTP/1.1\nHost: h.test\n\n");
        assert_eq!(parse(&bytes).unwrap().target, b"/api?x");
        for (target, expected) in [
            ("http://evil/", HeadFault::Host),
            ("http://u@h.test/", HeadFault::Host),
            ("ftp://h.test/", HeadFault::RequestLine),
            ("@h.test/", HeadFault::RequestLine),
            ("api", HeadFault::RequestLine),
            ("http://h.test", HeadFault::RequestLine),
        ] {
            assert_eq!(fault(&format!("GET {target} HTTP/1.1\nHost: h.test\n\n")), Some(expected), "{target}");
        }
    }

    #[test]
    fn malformed_lines() {
        for line in [
            "GET  / HTTP/1.1",
            "GET / HTTP/1.1 ",
            "GET / HTTP/1.2",
            "GET / HTTP/2.0",
            "GET / http/1.1",
            "GET /",
            "GET / ",
            " GET / HTTP/1.1",
            "GET /\tHTTP/1.1",
            "G\u{0}T / HTTP/1.1",
            "G ET / HTTP/1.1",
            "GET / HTTP/1.10",
        ] {
            assert_eq!(fault(&format!("{line}\nHost: h\n\n")), Some(HeadFault::RequestLine), "{line}");
        }
        for line in ["X : y", ": y", "X", " X: y", "X: a\u{0}b", "X: a\rb", "X(y): b", "X: \u{7f}"] {
            assert_eq!(fault(&format!("GET / HTTP/1.1\nHost: h\n{line}\n\n")), Some(HeadFault::FieldLine), "{line:?}");
        }
        assert_eq!(parse(b"GET / HTTP/1.1\nHost: h\n\n").err(), Some(HeadFault::RequestLine));
        assert_eq!(parse(b"GET / HTTP/1.1\r\nHost: h\nX: y\r\n\r\n").err(), Some(HeadFault::FieldLine));
        let many = format!("GET / HTTP/1.1\nHost: h\n{}\n", "X: y\n".repeat(MAX_FIELDS));
        assert_eq!(fault(&many), Some(HeadFault::TooManyFields));
    }

    #[test]
    fn text_in_lines_has_whole_line_ends_and_no_control_bytes() {
        let pieces: [&[u8]; 8] = [b"\r", b"\n", b"\r\n", b"a", b"\t", b"\0", b"\x7f", b"\xff"];
        let slowly = |bytes: &[u8]| {
            let rest = bytes.split(|b| *b == b'\n').collect::<Vec<_>>();
            rest.iter().enumerate().all(|(at, line)| {
                let line = if at + 1 < rest.len() { line.strip_suffix(b"\r") } else { Some(*line) };
                line.is_some_and(|line| line.iter().all(|b| is_value_byte(*b)))
            })
        };
        let mut seen = 0;
        for number in 0..8_usize.pow(6) {
            let bytes = (0..6).map(|place| pieces[number / 8_usize.pow(place) % 8]).collect::<Vec<_>>().concat();
            assert_eq!(is_text_in_lines(&bytes), slowly(&bytes), "{bytes:?}");
            seen += 1;
        }
        assert_eq!((seen, is_text_in_lines(b"")), (262_144, true));
    }

    #[test]
    fn what_the_connection_may_ask() {
        let view = |lines: &str| {
            let bytes = head(lines).leak();
            parse(bytes).unwrap()
        };
        assert!(!view("GET / HTTP/1.1\nHost: h\nConnection: x, Close\n\n").keep_alive);
        assert!(!view("GET / HTTP/1.0\nHost: h\n\n").keep_alive);
        assert!(view("GET / HTTP/1.0\nHost: h\nConnection: keep-alive\n\n").keep_alive);
        assert!(view("GET / HTTP/1.1\nHost: h\nConnection: Upgrade\nUpgrade: websocket\n\n").websocket);
        assert!(!view("GET / HTTP/1.1\nHost: h\nConnection: Upgrade\nUpgrade: h2c\n\n").websocket);
        assert!(
            !view("POST / HTTP/1.1\nHost: h\nConnection: Upgrade\nUpgrade: websocket\nContent-Length: 1\n\n").websocket
        );
        assert_eq!(fault("GET / HTTP/1.1\nHost: h\nConnection: \"PRIVATE-TOKEN\"\n\n"), Some(HeadFault::Connection));
        assert_eq!(fault("GET / HTTP/1.1\nHost: h\nConnection: :authority\n\n"), Some(HeadFault::Connection));
        assert_eq!(fault("POST / HTTP/1.1\nHost: h\nExpect: x 100-continue\n\n"), Some(HeadFault::Expect));
        assert_eq!(
            fault("POST / HTTP/1.1\nHost: h\nContent-Type: a/b\nContent-Type: a/b\n\n"),
            Some(HeadFault::ContentType)
        );
    }

    #[test]
    fn what_can_be_told_of_a_head_that_is_none() {
        for read in [
            "HEAD / HTTP/1.1\r\nHost",
            "\r\n\r\n\nHEAD x",
            "HEAD\t/",
            "HEAD  / HTTP/1.1",
            "HEAD",
            "HEAD\r\n",
            "HEAD /\0",
        ] {
            assert!(asks_for_head(read.as_bytes()), "{read:?}");
        }
        for read in ["", "GET HEAD", "head /", "HEADER / HTTP/1.1", "HEAD-X /", " HEAD /", "\r\n", "HE"] {
            assert!(!asks_for_head(read.as_bytes()), "{read:?}");
        }
        let origins = |read: &'static str| origins_of_unparsed(read.as_bytes()).collect::<Vec<_>>();
        assert_eq!(origins("GET / HTTP/1.1\r\nHost: h\r\nORIGIN: \thttps://a.test \r\nX"), [b"https://a.test"]);
        assert_eq!(origins("GET / HTTP/1.1\r\nOrigin: a\r\norigin:b\r\n\r\n"), [b"a", b"b"]);
        // Incomplete, or not an Origin field.
        for read in
            ["Origin: a\r\n", "GET / HTTP/1.1\r\nOrigin: https://a.te", "G\r\nX-Origin: a\r\n", "G\r\nOrigin : a\r\n"]
        {
            assert_eq!(origins(read), Vec::<&[u8]>::new(), "{read:?}");
        }
    }

    #[test]
    fn the_end_of_a_head() {
        assert_eq!(end_of_head(b"GET / HTTP/1.1\r\n\r\nrest", 0), Some(18));
        assert_eq!(end_of_head(b"GET / HTTP/1.1\r\n\r", 0), None);
        assert_eq!(end_of_head(b"\r\n\r\nGET / HTTP/1.1\r\n\r\n", 0), Some(22));
        for bytes in [&b"\x16\x03\x01"[..], b"GET / HTTP/1.1\nHost", b"\r\n\r\n\r\n", b"GET / HTTP/1.1\r\nX: y\n\r\n"] {
            assert!(is_invalid_prefix(bytes, 0), "{}", String::from_utf8_lossy(bytes));
        }
        for bytes in [&b""[..], b"\r", b"\r\nGET / HTTP/1.1\r\nHo", b"GET / HTTP/1.1\r\nHost: h\r"] {
            assert!(!is_invalid_prefix(bytes, 0), "{}", String::from_utf8_lossy(bytes));
        }
    }
}
