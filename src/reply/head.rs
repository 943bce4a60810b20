//! Parses the head of a backend's HTTP/1 answer by a grammar that leaves no doubt where the answer ends. Pure. It must never
//! repair anything: what deviates becomes a 502, because the client might read it in another way.

use super::UpstreamFault;
use super::answer::AnswerView;
use crate::request::head::{content_length, empty_line, is_text_in_lines, is_token_byte, trim_blanks};
use smallvec::SmallVec;

/// Size of a head with all its fields. Backends stay far below; nginx takes 4 to 8 KiB by default.
pub const MAX_HEAD_BYTES: usize = 64 * 1024;
const MAX_FIELDS: usize = 256;

/// A whole head. Names are kept as they came, for the client, and in lower case, for those who look at them.
pub struct AnswerHead<'b> {
    status: u16,
    http11: bool,
    fields: SmallVec<[AnswerField<'b>; 32]>,
    /// What Connection and the version say.
    keep_alive: bool,
    framing: Declared,
}

#[derive(Clone, Copy)]
pub struct AnswerField<'b> {
    pub name: &'b [u8],
    pub value: &'b [u8],
    /// The line as it came, with its end.
    line: &'b [u8],
    lower: &'b [u8],
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
    /// Parses a complete head. `lower` takes the bytes in lower case.
    pub fn parse(head: &'b [u8], lower: &'b mut Vec<u8>) -> Result<Self, UpstreamFault> {
        lower.clear();
        lower.extend_from_slice(head);
        lower.make_ascii_lowercase();
        parse(head, lower).ok_or(UpstreamFault::Malformed)
    }

    pub fn fields(&self) -> impl Iterator<Item = &AnswerField<'b>> {
        self.fields.iter()
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
    /// The whole line, if it is as tollgate would write it: one blank behind the colon, none at the end.
    pub fn plain_line(&self) -> Option<&'b [u8]> {
        let is_plain = self.line.len() == self.name.len() + self.value.len() + 4 && !self.value.is_empty();
        (is_plain && self.line[self.name.len() + 1] == b' ').then_some(self.line)
    }

    /// The name in lower case.
    pub fn lower(&self) -> &'b [u8] {
        self.lower
    }
}

impl AnswerView for AnswerHead<'_> {
    fn status(&self) -> u16 {
        self.status
    }

    fn knows_chunks(&self) -> bool {
        self.http11
    }

    fn fields(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.fields.iter().map(|field| (field.lower, field.value))
    }
}

fn parse<'b>(head: &'b [u8], lower: &'b [u8]) -> Option<AnswerHead<'b>> {
    if !is_text_in_lines(head) {
        return None;
    }
    let line_end = memchr::memchr(b'\n', head)?;
    let (status, http11) = status_line(head[..line_end].strip_suffix(b"\r")?)?;
    let mut answer =
        AnswerHead { status, http11, fields: SmallVec::new(), keep_alive: http11, framing: Declared::Nothing };
    let mut at = line_end + 1;
    loop {
        let end = at + memchr::memchr(b'\n', &head[at..])?;
        let line = head[at..end].strip_suffix(b"\r")?;
        if line.is_empty() {
            return (end + 1 == head.len()).then_some(answer);
        }
        let colon = memchr::memchr(b':', line)?;
        let (name, value) = (&line[..colon], &line[colon + 1..]);
        // A folded line begins with a blank, which no name does.
        if name.is_empty() || !name.iter().all(|b| is_token_byte(*b)) || answer.fields.len() == MAX_FIELDS {
            return None;
        }
        let line = &head[at..=end];
        let field = AnswerField { name, value: trim_blanks(value), line, lower: &lower[at..at + colon] };
        match field.lower {
            // `judge` refuses what is malformed or there twice.
            b"content-length" => answer.framing = content_length(field.value).map_or(answer.framing, Declared::Length),
            b"transfer-encoding" => answer.framing = Declared::Chunked,
            b"connection" => {
                for option in field.value.split(|b| *b == b',').map(trim_blanks) {
                    if option.eq_ignore_ascii_case(b"close") {
                        answer.keep_alive = false;
                    }
                }
            }
            _ => {}
        }
        answer.fields.push(field);
        at = end + 1;
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
        let mut lower = Vec::new();
        let head = AnswerHead::parse(head.as_bytes(), &mut lower).ok()?;
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
    fn head_has_no_body_whatever_it_says() {
        let mut lower = Vec::new();
        let head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        let parsed = AnswerHead::parse(head, &mut lower).unwrap_or_else(|fault| panic!("{fault:?}"));
        assert_eq!((parsed.body(true), parsed.body(false)), (AnswerBody::Empty, AnswerBody::Chunked));
        assert_eq!(judge(&parsed, false, 0), Ok(AnswerKind::Final));
    }
}
