//! Holds a multipart body to one grammar: the one that the real clients use, and that all readers take in the same way.
//! CRLF only; the delimiter stands nowhere but between parts; each part has one `Content-Disposition: form-data` with one
//! `name`. Where readers still differ, every name that one of them would find is judged.

use super::super::head::is_token_byte;
use super::super::query::form_decode;
use super::{BodyFault, Judge};
use memchr::memmem::{self, Finder};

/// The header block of one part.
const MAX_PART_HEAD_BYTES: usize = 16 * 1024;
const MAX_PART_FIELDS: usize = 32;
/// How much of a chunk is joined to what was kept from the one before.
const JOIN: usize = 256;

#[derive(Clone, Debug)]
pub(super) struct Multipart {
    /// `--` and the boundary.
    delimiter: Finder<'static>,
    place: Place,
    /// Bytes that can't be judged before more have come: a part's head, or the end of a content.
    kept: Vec<u8>,
    /// How much of a head was searched for its end.
    searched: usize,
    has_begun: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Before the first delimiter, which only one CRLF may precede.
    Start,
    BehindDelimiter,
    PartHead,
    Content,
    /// Behind the last delimiter, where one or two CRLF may follow.
    End,
}

const AMBIGUOUS: Result<Option<usize>, BodyFault> = Err(BodyFault::Ambiguous);

impl Multipart {
    pub(super) fn new(boundary: &[u8]) -> Self {
        let delimiter = Finder::new(&[b"--", boundary].concat()).into_owned();
        Self { delimiter, place: Place::Start, kept: Vec::new(), searched: 0, has_begun: false }
    }

    pub(super) fn feed(&mut self, chunk: &[u8], judge: Judge<'_>) -> Result<(), BodyFault> {
        self.has_begun = true;
        let mut rest = chunk;
        let mut kept = std::mem::take(&mut self.kept);
        loop {
            if kept.is_empty() {
                match self.step(rest, judge)? {
                    Some(used) => rest = &rest[used..],
                    None => {
                        kept.extend_from_slice(rest);
                        break;
                    }
                }
                continue;
            }
            let old = kept.len();
            let (now, later) = rest.split_at(rest.len().min(JOIN));
            kept.extend_from_slice(now);
            match self.step(&kept, judge)? {
                Some(used) if used >= old => {
                    kept.clear();
                    rest = &rest[used - old..];
                }
                Some(used) => {
                    kept.drain(..used);
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
        self.kept = kept;
        Ok(())
    }

    pub(super) fn finish(&self) -> Result<(), BodyFault> {
        let ended = self.place == Place::End && matches!(self.kept.as_slice(), b"" | b"\r\n" | b"\r\n\r\n");
        if ended || !self.has_begun { Ok(()) } else { Err(BodyFault::Ambiguous) }
    }

    /// Reads on in `data` and says how many bytes are done with; `None` when more are needed first.
    fn step(&mut self, data: &[u8], judge: Judge<'_>) -> Result<Option<usize>, BodyFault> {
        let delimiter = self.delimiter.needle();
        match self.place {
            Place::Start => {
                let lead = match data {
                    [] | [b'\r'] => return Ok(None),
                    [b'\r', b'\n', ..] => 2,
                    _ => 0,
                };
                let seen = &data[lead..];
                if !seen.starts_with(&delimiter[..delimiter.len().min(seen.len())]) {
                    return AMBIGUOUS;
                }
                if seen.len() < delimiter.len() {
                    return Ok(None);
                }
                self.place = Place::BehindDelimiter;
                Ok(Some(lead + delimiter.len()))
            }
            Place::BehindDelimiter => {
                self.place = match data {
                    [] | [b'\r'] | [b'-'] => return Ok(None),
                    [b'\r', b'\n', ..] => Place::PartHead,
                    [b'-', b'-', ..] => Place::End,
                    _ => return AMBIGUOUS,
                };
                self.searched = 0;
                Ok(Some(2))
            }
            Place::PartHead => match memmem::find(&data[self.searched..], b"\r\n\r\n") {
                Some(at) if self.searched + at <= MAX_PART_HEAD_BYTES => {
                    let end = self.searched + at;
                    let head = &data[..end];
                    if self.delimiter.find(head).is_some() {
                        return AMBIGUOUS;
                    }
                    judge_head(head, judge)?;
                    self.place = Place::Content;
                    Ok(Some(end + 4))
                }
                None if data.len() <= MAX_PART_HEAD_BYTES + 3 => {
                    self.searched = data.len().saturating_sub(3);
                    Ok(None)
                }
                _ => AMBIGUOUS,
            },
            Place::Content => match self.delimiter.find(data) {
                // The CRLF in front is the content's end and never that of the part's head.
                Some(at) if at >= 2 && &data[at - 2..at] == b"\r\n" => {
                    self.place = Place::BehindDelimiter;
                    Ok(Some(at + delimiter.len()))
                }
                Some(_) => AMBIGUOUS,
                None => Ok(data.len().checked_sub(delimiter.len() + 1).filter(|spent| *spent > 0)),
            },
            Place::End => {
                if !b"\r\n\r\n".starts_with(data) {
                    return AMBIGUOUS;
                }
                Ok(None)
            }
        }
    }
}

/// The fields of a part that readers take a name from.
#[derive(Default)]
struct PartHead<'a> {
    disposition: Option<&'a [u8]>,
    content_type: Option<&'a [u8]>,
}

/// Holds a part's head to the grammar and judges its name.
fn judge_head(head: &[u8], judge: Judge<'_>) -> Result<(), BodyFault> {
    let mut part = PartHead::default();
    let mut names: smallvec::SmallVec<[&[u8]; 8]> = smallvec::SmallVec::new();
    let mut rest = Some(head);
    while let Some(text) = rest {
        let (line, later) = match memchr::memchr(b'\r', text) {
            Some(at) => (&text[..at], Some(text[at + 1..].strip_prefix(b"\n").ok_or(BodyFault::Ambiguous)?)),
            None => (text, None),
        };
        rest = later;
        let colon = memchr::memchr(b':', line).ok_or(BodyFault::Ambiguous)?;
        let (name, value) = (&line[..colon], &line[colon + 1..]);
        let plain = value.iter().fold(true, |plain, b| plain & ((*b >= b' ' && *b != 0x7f) || *b == b'\t'));
        let known = names.iter().any(|known| known.eq_ignore_ascii_case(name));
        if name.is_empty()
            || !name.iter().all(|b| is_token_byte(*b))
            || !plain
            || known
            || names.len() == MAX_PART_FIELDS
        {
            return Err(BodyFault::Ambiguous);
        }
        names.push(name);
        if name.eq_ignore_ascii_case(b"content-disposition") {
            part.disposition = Some(value);
        } else if name.eq_ignore_ascii_case(b"content-type") {
            part.content_type = Some(value);
        }
    }
    // Rack looks for that text anywhere in the head.
    if texts(head, b"content-disposition").count() != 1 {
        return Err(BodyFault::Ambiguous);
    }
    let value = part.disposition.ok_or(BodyFault::Ambiguous)?;
    let disposition = Disposition::parse(value).ok_or(BodyFault::Ambiguous)?;
    disposition.judge(value, judge)?;
    if disposition.is_named_otherwise(value) {
        // Rack then names the field after what it finds first of these.
        for at in texts(head, b"content-id:") {
            let value = &head[at + b"content-id:".len()..];
            let value = value[..memchr::memchr(b'\r', value).unwrap_or(value.len())].trim_ascii();
            judge.plain(value)?;
            judge.plain(value.strip_prefix(b"<").and_then(|id| id.strip_suffix(b">")).unwrap_or(value))?;
        }
        disposition.judge_filenames(judge)?;
        judge.plain(part.content_type.unwrap_or_default().trim_ascii())?;
    }
    Ok(())
}

/// Where a text with a `-` in it stands, in any letter case.
fn texts<'a>(haystack: &'a [u8], text: &'static [u8]) -> impl Iterator<Item = usize> + 'a {
    let dash = memchr::memchr(b'-', text).unwrap_or_default();
    memchr::memchr_iter(b'-', haystack).filter_map(move |at| {
        let start = at.checked_sub(dash)?;
        haystack.get(start..start + text.len()).filter(|found| found.eq_ignore_ascii_case(text)).map(|_| start)
    })
}

/// The value of a Content-Disposition, parsed.
#[derive(Default)]
struct Disposition<'a> {
    name: &'a [u8],
    /// Where the parameter `name` stands in the value.
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
                _ => return None,
            }
            if seen & bit != 0 {
                return None;
            }
            seen |= bit;
            rest = skip_spaces(rest);
        }
        (!found.name.is_empty() && names_once(value)).then_some(found)
    }

    /// Judges the name, and what Rack 1 and old 2 would take for it: the last `name=` behind a blank, in a file name too.
    fn judge(&self, value: &[u8], judge: Judge<'_>) -> Result<(), BodyFault> {
        judge.plain(self.name)?;
        // Flask and multer decode escapes in a name.
        if self.name.contains(&b'%') {
            judge.encoded(self.name)?;
        }
        for equals in memchr::memchr_iter(b'=', value) {
            let before = &value[..equals];
            let is_name = before.len() > 4 && before[before.len() - 4..].eq_ignore_ascii_case(b"name");
            if is_name && before[before.len() - 5].is_ascii_whitespace() {
                let text = &value[equals + 1..];
                let text = text.strip_prefix(b"\"").unwrap_or(text);
                judge.plain(&text[..memchr::memchr2(b'"', b';', text).unwrap_or(text.len())])?;
            }
        }
        Ok(())
    }

    /// Rack 2 finds no name behind a `:`, and Rack 1 none without a blank before it.
    fn is_named_otherwise(&self, value: &[u8]) -> bool {
        let before = &value[..self.name_at];
        before.contains(&b':') || !before.ends_with(b" ")
    }

    fn judge_filenames(&self, judge: Judge<'_>) -> Result<(), BodyFault> {
        if let Some(filename) = self.filename {
            judge.plain(filename)?;
            judge.encoded(filename)?;
            judge.plain(&filename[..memchr::memchr(b'"', filename).unwrap_or(filename.len())])?;
            let unescaped: Vec<u8> = filename.iter().copied().filter(|b| *b != b'\\').collect();
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

/// A parameter's value as a token or in quotes without escapes, and what follows.
fn plain_value(text: &[u8]) -> Option<(&[u8], &[u8])> {
    if let Some(quoted) = text.strip_prefix(b"\"") {
        let end = memchr::memchr2(b'"', b'\\', quoted)?;
        return (quoted[end] == b'"').then_some((&quoted[..end], &quoted[end + 1..]));
    }
    let end = text.iter().position(|b| !is_token_byte(*b)).unwrap_or(text.len());
    (end > 0).then(|| text.split_at(end))
}

/// A file name: as above, or in quotes with escapes. Clients leave quotes and backslashes in it as they are: where no
/// other parameter can follow, that is the same to all readers.
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

/// Whether `; name=` stands in the value only once: readers differ in where a quoted value ends.
fn names_once(value: &[u8]) -> bool {
    let mut count = 0;
    for at in memchr::memchr_iter(b';', value) {
        let text = value[at + 1..].trim_ascii_start();
        let Some(behind) = text.get(4..).filter(|_| text[..4].eq_ignore_ascii_case(b"name")) else { continue };
        let behind = behind.trim_ascii_start();
        let behind = behind.strip_prefix(b"*").unwrap_or(behind).trim_ascii_start();
        count += usize::from(behind.starts_with(b"="));
    }
    count == 1
}

fn skip_spaces(mut text: &[u8]) -> &[u8] {
    while let [b' ', rest @ ..] = text {
        text = rest;
    }
    text
}
