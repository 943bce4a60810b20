//! Checks a multipart body against the grammar that real clients use and that all known parsers read in the same way:
//! CRLF only, the delimiter only between parts, and in each part one `Content-Disposition: form-data` with one `name`.
//! Where parsers still differ, every name that one of them would find is checked.

use super::super::head::is_token_byte;
use super::super::query::form_decode;
use super::super::seeded::{self, Rule};
use super::{BodyFault, Judge};
use memchr::memmem::Finder;
use smallvec::SmallVec;

/// The header block of one part.
const MAX_PART_HEAD_BYTES: usize = 16 * 1024;
const MAX_PART_FIELDS: usize = 16;
/// Occurrences of `name=` in one disposition. Ordinary clients have one; a file name may contain more.
const MAX_NAMES: usize = 4;
/// How much of a chunk is appended at a time to what was buffered from the chunk before.
const JOIN: usize = 256;

#[derive(Clone, Debug)]
pub(super) struct Multipart {
    /// `--` and the boundary.
    delimiter: Finder<'static>,
    words: Words,
    state: MultipartState,
    /// Bytes that cannot be judged before more arrive: the head of a part, or the end of its content.
    pending: Vec<u8>,
    /// How much of a part's head has been searched for its end.
    searched: usize,
    has_begun: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MultipartState {
    /// Before the first delimiter, which only one CRLF may precede.
    Start,
    AfterDelimiter,
    PartHead,
    Content,
    /// After the last delimiter, where one or two CRLF may follow.
    End,
}

const AMBIGUOUS: Result<Option<usize>, BodyFault> = Err(BodyFault::Ambiguous);

impl Multipart {
    pub(super) fn new(boundary: &[u8]) -> Self {
        let delimiter = Finder::new(&[b"--", boundary].concat()).into_owned();
        Self {
            delimiter,
            words: Words::new(),
            state: MultipartState::Start,
            pending: Vec::new(),
            searched: 0,
            has_begun: false,
        }
    }

    pub(super) fn feed(&mut self, chunk: &[u8], judge: Judge<'_>) -> Result<(), BodyFault> {
        self.has_begun = true;
        let mut rest = chunk;
        let mut pending = std::mem::take(&mut self.pending);
        loop {
            if pending.is_empty() {
                match self.step(rest, judge)? {
                    Some(used) => rest = &rest[used..],
                    None => {
                        pending.extend_from_slice(rest);
                        break;
                    }
                }
                continue;
            }
            let old = pending.len();
            let (now, later) = rest.split_at(rest.len().min(JOIN));
            pending.extend_from_slice(now);
            match self.step(&pending, judge)? {
                Some(used) if used >= old => {
                    pending.clear();
                    rest = &rest[used - old..];
                }
                Some(used) => {
                    pending.drain(..used);
                    rest = later;
                }
                None => {
                    rest = later;
                    if rest.is_empty() {
                        break;
                    }
                }
            }
        }
        self.pending = pending;
        Ok(())
    }

    pub(super) fn finish(&self) -> Result<(), BodyFault> {
        let ended = self.state == MultipartState::End && matches!(self.pending.as_slice(), b"" | b"\r\n" | b"\r\n\r\n");
        if ended || !self.has_begun { Ok(()) } else { Err(BodyFault::Ambiguous) }
    }

    /// Processes `data` and returns how many bytes are done; `None` if more are needed first.
    fn step(&mut self, data: &[u8], judge: Judge<'_>) -> Result<Option<usize>, BodyFault> {
        let delimiter = self.delimiter.needle();
        match self.state {
            MultipartState::Start => {
                let lead = match data {
                    [] | [b'\r'] => return Ok(None),
                    [b'\r', b'\n', ..] => 2,
                    _ => 0,
                };
                let seen = &data[lead..];
                if !seen.starts_with(&delimiter[..delimiter.len().min(seen.len())]) {
                    if seeded::off(Rule::PartStart) {
                        self.state = MultipartState::Content;
                        return Ok(Some(0));
                    }
                    return AMBIGUOUS;
                }
                if seen.len() < delimiter.len() {
                    return Ok(None);
                }
                self.state = MultipartState::AfterDelimiter;
                Ok(Some(lead + delimiter.len()))
            }
            MultipartState::AfterDelimiter => {
                self.state = match data {
                    [] | [b'\r'] | [b'-'] => return Ok(None),
                    [b'\r', b'\n', ..] => MultipartState::PartHead,
                    [b'-', b'-', ..] => MultipartState::End,
                    _ => return AMBIGUOUS,
                };
                self.searched = 0;
                Ok(Some(2))
            }
            MultipartState::PartHead => match self.words.blank_line.find(&data[self.searched..]) {
                Some(at) if self.searched + at <= MAX_PART_HEAD_BYTES => {
                    let end = self.searched + at;
                    let head = &data[..end];
                    if self.delimiter.find(head).is_some() {
                        return AMBIGUOUS;
                    }
                    self.words.judge_head(head, judge)?;
                    self.state = MultipartState::Content;
                    Ok(Some(end + 4))
                }
                None if data.len() <= MAX_PART_HEAD_BYTES + 3 => {
                    self.searched = data.len().saturating_sub(3);
                    Ok(None)
                }
                _ => AMBIGUOUS,
            },
            MultipartState::Content => match self.delimiter.find(data) {
                // The CRLF before the delimiter ends the content, and is never the one that ends the part's head.
                Some(at) if at >= 2 && &data[at - 2..at] == b"\r\n" => {
                    self.state = MultipartState::AfterDelimiter;
                    Ok(Some(at + delimiter.len()))
                }
                Some(at) if seeded::off(Rule::Delimiter) => Ok(Some(at + delimiter.len())),
                Some(_) => AMBIGUOUS,
                None => Ok(data.len().checked_sub(delimiter.len() + 1).filter(|spent| *spent > 0)),
            },
            MultipartState::End => {
                if seeded::off(Rule::PartEnd) {
                    return Ok(Some(data.len()).filter(|length| *length > 0));
                }
                if !b"\r\n\r\n".starts_with(data) {
                    return AMBIGUOUS;
                }
                Ok(None)
            }
        }
    }
}

/// The search patterns for the head of a part, and a buffer for the head in lower case.
#[derive(Clone, Debug)]
struct Words {
    blank_line: Finder<'static>,
    disposition: Finder<'static>,
    id: Finder<'static>,
    name: Finder<'static>,
    lower: Vec<u8>,
}

impl Words {
    fn new() -> Self {
        Self {
            blank_line: Finder::new(b"\r\n\r\n"),
            disposition: Finder::new(b"content-disposition"),
            id: Finder::new(b"content-id:"),
            name: Finder::new(b"name"),
            lower: Vec::new(),
        }
    }

    /// Checks a part's head against the grammar, and its name.
    fn judge_head(&mut self, head: &[u8], judge: Judge<'_>) -> Result<(), BodyFault> {
        let (mut value, mut content_type) = (None, &b""[..]);
        let mut names: SmallVec<[&[u8]; MAX_PART_FIELDS]> = SmallVec::new();
        let mut rest = Some(head);
        while let Some(text) = rest {
            let line;
            (line, rest) = match memchr::memchr(b'\r', text) {
                Some(at) => (&text[..at], Some(text[at + 1..].strip_prefix(b"\n").ok_or(BodyFault::Ambiguous)?)),
                None => (text, None),
            };
            let field = field(line).filter(|_| names.len() < MAX_PART_FIELDS).ok_or(BodyFault::Ambiguous)?;
            if names.iter().any(|known| known.eq_ignore_ascii_case(field.0)) {
                return Err(BodyFault::Ambiguous);
            }
            names.push(field.0);
            if field.0.eq_ignore_ascii_case(b"content-disposition") {
                value = Some(field.1);
            } else if field.0.eq_ignore_ascii_case(b"content-type") {
                content_type = field.1.trim_ascii();
            }
        }
        let value = value.ok_or(BodyFault::Ambiguous)?;
        self.lower.clear();
        self.lower.extend(value.iter().map(u8::to_ascii_lowercase));
        let positions = self.name_positions(value).ok_or(BodyFault::Ambiguous)?;
        let disposition = Disposition::parse(value).ok_or(BodyFault::Ambiguous)?;
        disposition.judge(judge)?;
        for at in positions.into_iter().filter(|at| *at != disposition.name_at + b"name=".len()) {
            if seeded::off(Rule::PartName) {
                break;
            }
            let text = &value[at..];
            let run = &text[..text.iter().position(|b| !is_rack_token_byte(*b)).unwrap_or(text.len())];
            judge.plain(run)?;
            // Formidable ends it at these as well.
            judge.plain(&run[..memchr::memchr3(b'@', b'{', b'}', run).unwrap_or(run.len())])?;
            let name = rack1_value(text);
            judge.plain(name)?;
            if name.contains(&b'\\') {
                judge.plain(&without_backslashes(name))?;
            }
        }
        // Rack searches for this text anywhere in the head.
        self.lower.clear();
        self.lower.extend(head.iter().map(u8::to_ascii_lowercase));
        if self.disposition.find_iter(&self.lower).take(2).count() != 1 {
            return Err(BodyFault::Ambiguous);
        }
        if disposition.is_unnamed_to_rack(value) {
            // Rack then takes the first of these as the field's name.
            for at in self.id.find_iter(&self.lower) {
                let value = &head[at + b"content-id:".len()..];
                let value = value[..memchr::memchr(b'\r', value).unwrap_or(value.len())].trim_ascii();
                judge.plain(value)?;
                judge.plain(value.strip_prefix(b"<").and_then(|id| id.strip_suffix(b">")).unwrap_or(value))?;
            }
            disposition.judge_filenames(judge)?;
            judge.plain(content_type)?;
        }
        Ok(())
    }

    /// The positions of the values after `name=` in a disposition, whose lower-case copy is in `lower`. Some parser
    /// takes each of them as the name, even within a file name: Rack 1 the last one after a blank, Rack 3 one after a
    /// raw quote, Formidable the first one. Parsers differ most in where a quoted value ends, so exactly one may follow
    /// a `;`.
    fn name_positions(&self, value: &[u8]) -> Option<SmallVec<[usize; MAX_NAMES]>> {
        let mut found = SmallVec::new();
        let mut parameters = 0;
        for at in self.name.find_iter(&self.lower) {
            let before = &value[..at];
            if before.last().is_none_or(|b| b.is_ascii_alphanumeric() || *b == b'_') {
                continue;
            }
            let after = &value[at + b"name".len()..];
            let loose = skip_blanks(after);
            let loose = skip_blanks(loose.strip_prefix(b"*").unwrap_or(loose));
            if loose.first() != Some(&b'=') {
                continue;
            }
            parameters += usize::from(ends_in_semicolon(before));
            if found.len() == MAX_NAMES {
                return None;
            }
            found.push(value.len() - loose.len() + 1);
        }
        (parameters == 1 || seeded::off(Rule::PartName)).then_some(found)
    }
}

/// A token byte as Rack defines it.
fn is_rack_token_byte(byte: u8) -> bool {
    byte > b' ' && !br#"()<>,;:\"/[]?="#.contains(&byte)
}

/// The value after `name=`, as Rack 1.4 delimits it.
fn rack1_value(text: &[u8]) -> &[u8] {
    let text = text.strip_prefix(b"\"").unwrap_or(text);
    &text[..memchr::memchr2(b'"', b';', text).unwrap_or(text.len())]
}

/// The name and value of one header line.
fn field(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let (name, value) = line.split_at(memchr::memchr(b':', line)?);
    let value = &value[1..];
    let plain = value.iter().fold(true, |plain, b| plain & ((*b >= b' ' && *b != 0x7f) || *b == b'\t'));
    (plain && !name.is_empty() && name.iter().all(|b| is_token_byte(*b))).then_some((name, value))
}

/// The value of a Content-Disposition, parsed.
#[derive(Default)]
struct Disposition<'a> {
    name: &'a [u8],
    /// Position of the parameter `name` in the value.
    name_at: usize,
    filename: Option<&'a [u8]>,
    extended_filename: Option<&'a [u8]>,
}

impl<'a> Disposition<'a> {
    fn parse(value: &'a [u8]) -> Option<Self> {
        let mut found = Self::default();
        let mut rest = skip_spaces(value);
        let kind = rest.get(..b"form-data".len())?;
        if !kind.eq_ignore_ascii_case(b"form-data") {
            return None;
        }
        rest = skip_spaces(&rest[kind.len()..]);
        let mut seen = 0_u8;
        while !rest.is_empty() {
            rest = skip_spaces(rest.strip_prefix(b";")?);
            // Some clients end the list with a `;`.
            if rest.is_empty() {
                break;
            }
            let at = value.len() - rest.len();
            let equals = memchr::memchr(b'=', rest)?;
            let (key, text) = (&rest[..equals], &rest[equals + 1..]);
            let (bit, parameter);
            match key {
                b"name" => {
                    (bit, (parameter, rest)) = (1, plain_value(text)?);
                    (found.name, found.name_at) = (parameter, at);
                    let quoted_twice = parameter.first().is_none_or(|b| *b == b'\'');
                    if quoted_twice || parameter.contains(&b';') {
                        return None;
                    }
                }
                b"filename" => {
                    (bit, (parameter, rest)) = (2, file_name(text)?);
                    found.filename = Some(parameter);
                }
                b"filename*" => {
                    (bit, (parameter, rest)) = (4, plain_value(text)?);
                    found.extended_filename = Some(parameter);
                }
                b"modification-date" => (bit, (_, rest)) = (8, plain_value(text)?),
                b"read-date" => (bit, (_, rest)) = (16, plain_value(text)?),
                b"creation-date" => (bit, (_, rest)) = (32, plain_value(text)?),
                b"size" => (bit, (_, rest)) = (64, plain_value(text)?),
                _ if seeded::off(Rule::PartName) => (bit, (_, rest)) = (0, plain_value(text)?),
                _ => return None,
            }
            if seen & bit != 0 && !seeded::off(Rule::PartName) {
                return None;
            }
            seen |= bit;
            rest = skip_spaces(rest);
        }
        (!found.name.is_empty()).then_some(found)
    }

    fn judge(&self, judge: Judge<'_>) -> Result<(), BodyFault> {
        judge.plain(self.name)?;
        // Flask and multer decode escapes in a name.
        if self.name.contains(&b'%') { judge.encoded(self.name) } else { Ok(()) }
    }

    /// Whether Rack does not find the name: Rack 2 finds none after a `:`, Rack 1 none without a blank before it.
    fn is_unnamed_to_rack(&self, value: &[u8]) -> bool {
        let before = &value[..self.name_at];
        before.contains(&b':') || !before.ends_with(b" ")
    }

    fn judge_filenames(&self, judge: Judge<'_>) -> Result<(), BodyFault> {
        if let Some(filename) = self.filename {
            judge.plain(filename)?;
            judge.encoded(filename)?;
            judge.plain(&filename[..memchr::memchr(b'"', filename).unwrap_or(filename.len())])?;
            let unescaped = without_backslashes(filename);
            judge.plain(&unescaped)?;
            judge.encoded(&unescaped)?;
        }
        if let Some(extended) = self.extended_filename {
            let text = extended.rsplit(|b| *b == b'\'').next().unwrap_or_default();
            judge.plain(text)?;
            judge.plain(&form_decode(text))?;
        }
        Ok(())
    }
}

/// A parameter's value, a token or quoted without escapes, and the rest of the text.
fn plain_value(text: &[u8]) -> Option<(&[u8], &[u8])> {
    if let Some(quoted) = text.strip_prefix(b"\"") {
        let end = memchr::memchr2(b'"', b'\\', quoted)?;
        return (quoted[end] == b'"').then_some((&quoted[..end], &quoted[end + 1..]));
    }
    let end = text.iter().position(|b| !is_token_byte(*b)).unwrap_or(text.len());
    (end > 0).then(|| text.split_at(end))
}

/// A file name: as above, or quoted with escapes. Some clients do not escape quotes and backslashes in it; if no other
/// parameter can follow, all parsers read it in the same way.
fn file_name(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let Some(quoted) = text.strip_prefix(b"\"") else { return plain_value(text) };
    let mut at = 0;
    let escaped = loop {
        match quoted.get(at) {
            None => break None,
            Some(b'"') => break Some((&quoted[..at], &quoted[at + 1..])),
            Some(b'\\') => at += 2,
            Some(_) => at += 1,
        }
    };
    if let Some((name, rest)) = escaped
        && matches!(skip_spaces(rest), [] | [b';', ..])
    {
        return Some((name, rest));
    }
    let last = !quoted.contains(&b';');
    let name = quoted.trim_ascii_end().strip_suffix(b"\"")?;
    last.then_some((name, b""))
}

fn without_backslashes(text: &[u8]) -> Vec<u8> {
    text.iter().copied().filter(|b| *b != b'\\').collect()
}

fn ends_in_semicolon(text: &[u8]) -> bool {
    text.iter().rev().find(|b| !matches!(b, b' ' | b'\t')) == Some(&b';')
}

fn skip_blanks(mut text: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] = text {
        text = rest;
    }
    text
}

fn skip_spaces(mut text: &[u8]) -> &[u8] {
    while let [b' ', rest @ ..] = text {
        text = rest;
    }
    text
}
