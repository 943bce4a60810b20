//! Parses the head of a backend's HTTP/1 answer by a grammar that leaves no doubt where the answer ends. Pure. It must never
//! repair anything: what deviates becomes a 502, because the client might read it in another way.

use super::UpstreamFault;
use super::answer::{AnswerName, AnswerView};
use crate::request::head::{content_length, empty_line, is_text_in_lines, is_token_byte, trim_blanks};
use crate::request::seeded::{self, Rule};
use smallvec::SmallVec;
use std::ops::Range;

/// Size of a head with all its fields. Backends stay far below; nginx takes 4 to 8 KiB by default.
pub const MAX_HEAD_BYTES: usize = 64 * 1024;
const MAX_FIELDS: usize = 256;

/// A whole head, walked over once: where each field stands, and what it is.
pub struct AnswerHead<'b> {
    head: &'b [u8],
    status: u16,
    http11: bool,
    fields: SmallVec<[FieldPlace; 24]>,
    /// What Connection and the version say.
    keep_alive: bool,
    framing: Declared,
}

/// Where a field stands in its head, which is shorter than [`MAX_HEAD_BYTES`].
#[derive(Clone, Copy)]
struct FieldPlace {
    name: AnswerName,
    start: u32,
    colon: u32,
    /// Behind the end of its line.
    end: u32,
    /// The line is as tollgate would write it: a value, one blank in front of it, none behind.
    is_plain: bool,
}

/// One field of a head.
pub struct AnswerField<'b> {
    pub name: AnswerName,
    /// Where its line stands in the head.
    pub place: Range<usize>,
    /// The line as it came, with its end.
    pub is_plain: bool,
    line: &'b [u8],
    colon: usize,
}

/// How the head says that its body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Declared {
    Nothing,
    Length(u64),
    Chunked,
}

/// Where the body of an answer ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnswerBody {
    Empty,
    Length(u64),
    Chunked,
    /// With the connection.
    UntilClose,
}

/// The end of the head, its empty line included. The first `scanned` bytes are known not to contain it.
pub fn end_of_head(bytes: &[u8], scanned: usize) -> Option<usize> {
    let start = scanned.saturating_sub(3);
    empty_line(bytes.get(start..)?).map(|at| start + at)
}

impl<'b> AnswerHead<'b> {
    /// Parses a complete head.
    pub fn parse(head: &'b [u8]) -> Result<Self, UpstreamFault> {
        parse(head).ok_or(UpstreamFault::Malformed)
    }

    pub fn fields(&self) -> impl Iterator<Item = AnswerField<'b>> {
        self.fields.iter().map(|place| self.field(place))
    }

    fn field(&self, known: &FieldPlace) -> AnswerField<'b> {
        let (place, colon) = (known.start as usize..known.end as usize, (known.colon - known.start) as usize);
        let line = self.part(place.clone());
        AnswerField { name: known.name, is_plain: known.is_plain, line, place, colon }
    }

    /// A part of the head as it came.
    pub fn part(&self, place: Range<usize>) -> &'b [u8] {
        self.head.get(place).unwrap_or_default()
    }

    /// Whether the backend lets the connection be used again, once the body has ended.
    pub fn keep_alive(&self) -> bool {
        self.keep_alive
    }

    /// Where the body ends, if the head was judged to be in no doubt.
    pub fn body(&self, asked_for_head: bool) -> AnswerBody {
        match self.framing {
            _ if asked_for_head || matches!(self.status, 100..=199 | 204 | 304) => AnswerBody::Empty,
            Declared::Length(0) => AnswerBody::Empty,
            Declared::Length(length) => AnswerBody::Length(length),
            Declared::Chunked => AnswerBody::Chunked,
            Declared::Nothing => AnswerBody::UntilClose,
        }
    }
}

impl<'b> AnswerField<'b> {
    /// The name as it came.
    pub fn spelling(&self) -> &'b [u8] {
        &self.line[..self.colon]
    }

    pub fn value(&self) -> &'b [u8] {
        // Behind the colon, without CR and LF.
        trim_blanks(&self.line[self.colon + 1..self.line.len() - 2])
    }
}

impl AnswerView for AnswerHead<'_> {
    fn status(&self) -> u16 {
        self.status
    }

    fn knows_chunks(&self) -> bool {
        self.http11
    }

    fn known_fields(&self) -> impl Iterator<Item = (AnswerName, &[u8], &[u8])> {
        let known = self.fields.iter().filter(|place| place.name != AnswerName::Other);
        known.map(|place| {
            let field = self.field(place);
            (field.name, field.spelling(), field.value())
        })
    }
}

fn parse(head: &[u8]) -> Option<AnswerHead<'_>> {
    // From here on, a line ends where LF stands, and CR is in front of it.
    if head.len() > MAX_HEAD_BYTES || !(is_text_in_lines(head) || seeded::off(Rule::AnswerText)) {
        return None;
    }
    let line_end = memchr::memchr(b'\n', head)?;
    let (status, http11) = status_line(head[..line_end].strip_suffix(b"\r")?)?;
    let fields = SmallVec::new();
    let mut answer = AnswerHead { head, status, http11, fields, keep_alive: http11, framing: Declared::Nothing };
    let mut at = line_end + 1;
    loop {
        let rest = &head[at..];
        if rest.starts_with(b"\r\n") {
            return (rest.len() == 2).then_some(answer);
        }
        // A folded line begins with a blank, which no name does.
        let mut colon = 0;
        while is_token_byte(*rest.get(colon)?) {
            colon += 1;
        }
        if colon == 0 || rest[colon] != b':' || answer.fields.len() == MAX_FIELDS {
            return None;
        }
        let length = colon + memchr::memchr(b'\n', &rest[colon..])? + 1;
        let name = AnswerName::of(&rest[..colon]);
        let is_plain = is_plain(&rest[colon + 1..length - 2]);
        // They fit, as the head is short.
        let (start, colon, end) = (at as u32, (at + colon) as u32, (at + length) as u32);
        let place = FieldPlace { name, start, colon, end, is_plain };
        if name != AnswerName::Other {
            answer.note(&answer.field(&place));
        }
        answer.fields.push(place);
        at += length;
    }
}

/// What stands behind the colon is one blank and a value without blanks around it.
fn is_plain(behind: &[u8]) -> bool {
    let is_blank = |b: &u8| matches!(b, b' ' | b'\t');
    matches!(behind, [b' ', first, ..] if !is_blank(first)) && !behind.last().is_some_and(is_blank)
}

impl AnswerHead<'_> {
    /// What a field says of the body's end and of the connection.
    fn note(&mut self, field: &AnswerField<'_>) {
        match field.name {
            // `judge` refuses what is malformed or there twice.
            AnswerName::ContentLength => {
                self.framing = content_length(field.value()).map_or(self.framing, Declared::Length);
            }
            AnswerName::TransferEncoding => self.framing = Declared::Chunked,
            AnswerName::Connection => {
                let mut options = field.value().split(|b| *b == b',').map(trim_blanks);
                self.keep_alive &= !options.any(|option| option.eq_ignore_ascii_case(b"close"));
            }
            _ => {}
        }
    }
}

/// `HTTP/1.x SP 3DIGIT [SP text]`. The text is not passed on.
fn status_line(line: &[u8]) -> Option<(u16, bool)> {
    let http11 = match line.get(..9)? {
        b"HTTP/1.1 " => true,
        b"HTTP/1.0 " => false,
        _ => return None,
    };
    let [a @ b'1'..=b'9', b @ b'0'..=b'9', c @ b'0'..=b'9', rest @ ..] = &line[9..] else { return None };
    let text = rest.first().is_none_or(|first| *first == b' ');
    let digit = |b: &u8| u16::from(*b - b'0');
    text.then_some((digit(a) * 100 + digit(b) * 10 + digit(c), http11))
}

#[cfg(test)]
mod tests {
    use super::super::answer::{AnswerKind, judge};
    use super::*;

    fn read(head: &str) -> Option<(u16, AnswerBody, bool)> {
        let head = AnswerHead::parse(head.as_bytes()).ok()?;
        judge(&head, false, 0).ok()?;
        Some((head.status, head.body(false), head.keep_alive()))
    }

    #[test]
    fn an_answer_ends_in_one_way() {
        for (head, expected) in [
            ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", Some((200, AnswerBody::Length(5), true))),
            ("HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", Some((200, AnswerBody::Empty, true))),
            ("HTTP/1.1 200 \r\ntransfer-encoding:chunked\r\n\r\n", Some((200, AnswerBody::Chunked, true))),
            ("HTTP/1.1 200 OK\r\n\r\n", Some((200, AnswerBody::UntilClose, true))),
            ("HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n", Some((200, AnswerBody::Length(5), false))),
            (
                "HTTP/1.1 204 No\r\nContent-Length: 5\r\nConnection: x, Close\r\n\r\n",
                Some((204, AnswerBody::Empty, false)),
            ),
            ("HTTP/1.1 304 No\r\nContent-Length: 5\r\n\r\n", Some((304, AnswerBody::Empty, true))),
            // In doubt.
            ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", None),
            ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n", None),
            ("HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\n", None),
            ("HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\n", None),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", None),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", None),
            ("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", None),
            // Not this grammar.
            ("HTTP/1.1 200 OK\nContent-Length: 5\r\n\r\n", None),
            ("HTTP/1.1 200 OK\r\nContent-Length: 5\n\r\n", None),
            ("HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n", None),
            ("HTTP/1.1 200 OK\r\nA : b\r\n\r\n", None),
            ("HTTP/1.1 200 OK\r\n: b\r\n\r\n", None),
            ("HTTP/1.1 200 OK\r\nA\r\n\r\n", None),
            ("HTTP/1.1 200 OK\r\nA: b\rc\r\n\r\n", None),
            ("HTTP/1.1 200 OK\r\nA: b\0\r\n\r\n", None),
            ("HTTP/1.1 20 OK\r\n\r\n", None),
            ("HTTP/1.1 2000 OK\r\n\r\n", None),
            ("HTTP/1.1 099 OK\r\n\r\n", None),
            ("HTTP/1.1  200 OK\r\n\r\n", None),
            ("HTTP/1.1 200OK\r\n\r\n", None),
            ("HTTP/2.0 200 OK\r\n\r\n", None),
            ("http/1.1 200 OK\r\n\r\n", None),
            ("ICY 200 OK\r\n\r\n", None),
            ("\r\nHTTP/1.1 200 OK\r\n\r\n", None),
        ] {
            assert_eq!(read(head), expected, "{head:?}");
        }
        let many = |count: usize| format!("HTTP/1.1 200 OK\r\n{}\r\n", "A: b\r\n".repeat(count));
        assert!(read(&many(MAX_FIELDS)).is_some() && read(&many(MAX_FIELDS + 1)).is_none());
    }

    #[test]
    fn a_line_is_plain_when_tollgate_would_write_it_so() {
        let head = b"HTTP/1.1 200 OK\r\nA: b\r\nB:c\r\nC:  d\r\nD: e \r\nE: \r\nF:\r\nG: h i\r\nH:\t\r\n\r\n";
        let parsed = AnswerHead::parse(head).unwrap_or_else(|fault| panic!("{fault:?}"));
        let seen: Vec<_> = parsed.fields().map(|field| (field.spelling(), field.value(), field.is_plain)).collect();
        let expected: [(&[u8], &[u8], bool); 8] = [
            (b"A", b"b", true),
            (b"B", b"c", false),
            (b"C", b"d", false),
            (b"D", b"e", false),
            (b"E", b"", false),
            (b"F", b"", false),
            (b"G", b"h i", true),
            (b"H", b"", false),
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn head_has_no_body_whatever_it_says() {
        let head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        let parsed = AnswerHead::parse(head).unwrap_or_else(|fault| panic!("{fault:?}"));
        assert_eq!((parsed.body(true), parsed.body(false)), (AnswerBody::Empty, AnswerBody::Chunked));
        assert_eq!(judge(&parsed, false, 0), Ok(AnswerKind::Final));
    }
}
