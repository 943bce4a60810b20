//! Watches a request's body go by for fields that Rack or Grape would take for a credential, because a body parameter
//! outranks the query and the header there. Pure, fed chunk by chunk, and of bounded memory: a name is kept, a value never.
//! Where parsers differ it takes the widest reading: a field that any of them would find is found.

use super::query::{Key, Names};
use super::target::escape;
use std::sync::Arc;

/// Names longer than this are cut: what would make them ours stands at their beginning.
const MAX_NAME_BYTES: usize = 256;
/// The header block of one part of a multipart body.
const MAX_PART_HEAD_BYTES: usize = 16 * 1024;
/// RFC 2046 allows 70 bytes.
const MAX_BOUNDARY_BYTES: usize = 256;

/// What must not stand in a body.
#[derive(Clone, Debug)]
pub struct BodyRules {
    pub names: Names,
    pub forbidden: Vec<Key>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyFault {
    /// A field that the backend would read instead of what tollgate judged.
    Field(Key),
    /// A body that parsers of its type read differently.
    Ambiguous,
}

/// Follows one body.
#[derive(Clone, Debug)]
pub struct BodyScanner {
    rules: Arc<BodyRules>,
    state: State,
}

#[derive(Clone, Debug)]
enum State {
    Form(Form),
    Multipart(Multipart),
    Json(Json),
}

impl BodyScanner {
    /// Chooses how to read by Content-Type, as Rack does: forms also when there is none, and JSON for everything else,
    /// because early Grape reads any body as JSON.
    pub fn new(content_type: Option<&[u8]>, rules: Arc<BodyRules>) -> Result<Self, BodyFault> {
        let content_type = content_type.unwrap_or_default();
        let media_type = content_type.split(|b| matches!(b, b';' | b',')).next().unwrap_or_default();
        let media_type = media_type.trim_ascii().to_ascii_lowercase();
        let state = match media_type.as_slice() {
            b"" | b"application/x-www-form-urlencoded" => State::Form(Form::default()),
            multipart if multipart.starts_with(b"multipart/") => match boundary(content_type)? {
                Some(boundary) => State::Multipart(Multipart::new(boundary)),
                None => State::Form(Form::default()),
            },
            other => State::Json(Json::new(memchr::memmem::find(other, b"json").is_some())),
        };
        Ok(Self { rules, state })
    }

    /// Reads the next bytes. After an error the request must not reach the backend whole.
    pub fn feed(&mut self, chunk: &[u8]) -> Result<(), BodyFault> {
        match &mut self.state {
            State::Form(form) => form.feed(chunk, &self.rules),
            State::Multipart(multipart) => multipart.feed(chunk, &self.rules),
            State::Json(json) => json.feed(chunk, &self.rules),
        }
    }

    /// Must be called before the last byte goes on: a name may end with the body.
    pub fn finish(&mut self) -> Result<(), BodyFault> {
        match &mut self.state {
            State::Form(form) => form.end_name(&self.rules),
            State::Multipart(multipart) => multipart.finish(&self.rules),
            State::Json(_) => Ok(()),
        }
    }
}

impl BodyRules {
    fn check_encoded(&self, name: &[u8]) -> Result<(), BodyFault> {
        self.refuse(self.names.key_of(name).map(|(key, _)| key))
    }

    fn check_plain(&self, name: &[u8]) -> Result<(), BodyFault> {
        self.refuse(self.names.key_of_decoded(name).map(|(key, _)| key))
    }

    fn refuse(&self, key: Option<Key>) -> Result<(), BodyFault> {
        match key {
            Some(key) if self.forbidden.contains(&key) => Err(BodyFault::Field(key)),
            _ => Ok(()),
        }
    }
}

/// `name=value` split at `&` and, as Rack 1.5 and older do, at `;`.
#[derive(Clone, Debug, Default)]
struct Form {
    name: Vec<u8>,
    in_value: bool,
}

impl Form {
    fn feed(&mut self, chunk: &[u8], rules: &BodyRules) -> Result<(), BodyFault> {
        let mut rest = chunk;
        while !rest.is_empty() {
            if self.in_value {
                let Some(at) = memchr::memchr2(b'&', b';', rest) else { return Ok(()) };
                self.in_value = false;
                self.name.clear();
                rest = &rest[at + 1..];
                continue;
            }
            let end = memchr::memchr3(b'&', b';', b'=', rest);
            self.extend_name(&rest[..end.unwrap_or(rest.len())], rules)?;
            let Some(at) = end else { return Ok(()) };
            self.end_name(rules)?;
            self.in_value = rest[at] == b'=';
            rest = &rest[at + 1..];
        }
        Ok(())
    }

    /// Keeps the beginning of the name, without the brackets and blanks that parsers strip before it.
    fn extend_name(&mut self, mut bytes: &[u8], rules: &BodyRules) -> Result<(), BodyFault> {
        while !bytes.is_empty() {
            let room = MAX_NAME_BYTES - self.name.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.name.extend_from_slice(now);
            bytes = later;
            let padding = padding_len(&self.name);
            self.name.drain(..padding);
            if self.name.len() == MAX_NAME_BYTES {
                return rules.check_encoded(&self.name);
            }
        }
        Ok(())
    }

    fn end_name(&mut self, rules: &BodyRules) -> Result<(), BodyFault> {
        let verdict = if self.in_value { Ok(()) } else { rules.check_encoded(&self.name) };
        self.name.clear();
        verdict
    }
}

/// How many bytes at the beginning of an encoded name are stripped by one parser or another.
fn padding_len(name: &[u8]) -> usize {
    let strips = |byte: u8| matches!(byte, b'[' | b']' | b'+' | b' ' | 0 | 9..=13);
    let mut at = 0;
    while let Some(byte) = name.get(at) {
        at += match (byte, escape(&name[at + 1..])) {
            (b'%', Some(decoded)) if decoded != b'+' && strips(decoded) => 3,
            (b'%', _) => break,
            (byte, _) if strips(*byte) => 1,
            _ => break,
        };
    }
    at
}

/// The boundary of a multipart type, when there is one.
fn boundary(content_type: &[u8]) -> Result<Option<&[u8]>, BodyFault> {
    let lower = content_type.to_ascii_lowercase();
    let mut places = memchr::memmem::find_iter(&lower, b"boundary=");
    let Some(place) = places.next() else { return Ok(None) };
    let value = &content_type[place + b"boundary=".len()..];
    let value = value.strip_prefix(b"\"").unwrap_or(value);
    let end = value.iter().position(|b| matches!(b, b'"' | b';' | b',')).unwrap_or(value.len());
    let value = value[..end].trim_ascii();
    if places.next().is_some() || value.is_empty() || value.len() > MAX_BOUNDARY_BYTES {
        return Err(BodyFault::Ambiguous);
    }
    Ok(Some(value))
}

/// Looks at the header block behind every delimiter, wherever the delimiter stands.
#[derive(Clone, Debug)]
struct Multipart {
    delimiter: Vec<u8>,
    /// The end of what was seen, in which a delimiter may have begun; or the part's head so far.
    kept: Vec<u8>,
    in_head: bool,
}

impl Multipart {
    fn new(boundary: &[u8]) -> Self {
        Self { delimiter: [b"--", boundary].concat(), kept: Vec::new(), in_head: false }
    }

    fn feed(&mut self, chunk: &[u8], rules: &BodyRules) -> Result<(), BodyFault> {
        // Slices of bounded size keep `kept` small whatever the size of the chunk.
        for piece in chunk.chunks(4096) {
            self.kept.extend_from_slice(piece);
            while self.step(rules)? {}
        }
        Ok(())
    }

    /// Goes on by one delimiter or one head; false when more bytes are needed.
    fn step(&mut self, rules: &BodyRules) -> Result<bool, BodyFault> {
        if self.in_head {
            let ends = [&b"\r\n\r\n"[..], b"\n\n", b"\n\r\n"];
            let end =
                ends.iter().filter_map(|end| memchr::memmem::find(&self.kept, end).map(|at| at + end.len())).min();
            let Some(end) = end else {
                return if self.kept.len() > MAX_PART_HEAD_BYTES { Err(BodyFault::Ambiguous) } else { Ok(false) };
            };
            check_part_head(&self.kept[..end], rules)?;
            self.in_head = false;
            self.kept.drain(..end);
            return Ok(true);
        }
        match memchr::memmem::find(&self.kept, &self.delimiter) {
            Some(at) => {
                self.kept.drain(..at + self.delimiter.len());
                self.in_head = true;
                Ok(true)
            }
            None => {
                let spent = self.kept.len().saturating_sub(self.delimiter.len());
                self.kept.drain(..spent);
                Ok(false)
            }
        }
    }

    fn finish(&mut self, rules: &BodyRules) -> Result<(), BodyFault> {
        if self.in_head { check_part_head(&self.kept, rules) } else { Ok(()) }
    }
}

/// Looks for every `name=` of a part's head, and for Content-ID, which Rack takes when there is no name.
fn check_part_head(head: &[u8], rules: &BodyRules) -> Result<(), BodyFault> {
    let lower = head.to_ascii_lowercase();
    for place in memchr::memmem::find_iter(&lower, b"name") {
        let before = place.checked_sub(1).map(|at| lower[at]);
        if before.is_some_and(|b| b.is_ascii_alphanumeric()) {
            continue; // filename
        }
        let rest = head[place + 4..].trim_ascii_start();
        let rest = rest.strip_prefix(b"*").unwrap_or(rest).trim_ascii_start();
        if let Some(value) = rest.strip_prefix(b"=") {
            let name = parameter_value(value.trim_ascii_start());
            rules.check_plain(&name)?;
            rules.check_encoded(&name)?;
        }
    }
    for place in memchr::memmem::find_iter(&lower, b"content-id") {
        let Some(value) = head[place + 10..].trim_ascii_start().strip_prefix(b":") else { continue };
        let end = value.iter().position(|b| matches!(b, b'\r' | b'\n')).unwrap_or(value.len());
        let value = value[..end].trim_ascii();
        rules.check_plain(value.strip_prefix(b"<").and_then(|v| v.strip_suffix(b">")).unwrap_or(value))?;
    }
    Ok(())
}

/// A parameter's value, unquoted and with `\x` read as `x`.
fn parameter_value(text: &[u8]) -> Vec<u8> {
    let (quoted, text) = text.strip_prefix(b"\"").map_or((false, text), |rest| (true, rest));
    let mut value = Vec::new();
    let mut bytes = text.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' if quoted => value.extend(bytes.next()),
            b'"' if quoted => break,
            b';' | b' ' | b'\t' | b'\r' | b'\n' if !quoted => break,
            _ => value.push(*byte),
        }
        if value.len() > MAX_NAME_BYTES {
            break;
        }
    }
    value
}

/// Follows the keys of a top-level object. Nested keys are not parameters.
#[derive(Clone, Debug)]
struct Json {
    /// The type says JSON: then what is no plain JSON is refused. Otherwise it is simply none, and left alone.
    declared: bool,
    place: Place,
    depth: usize,
    key: Vec<u8>,
    /// The text of an escape under way, behind its backslash.
    escape: Option<Vec<u8>>,
    seen: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Start,
    /// Inside the object, before a key.
    BeforeKey,
    InKey,
    /// Behind a key, or inside a value.
    Value,
    InString,
    /// No parameters here, or none any more.
    Done,
}

impl Json {
    fn new(declared: bool) -> Self {
        Self { declared, place: Place::Start, depth: 0, key: Vec::new(), escape: None, seen: 0 }
    }

    fn feed(&mut self, chunk: &[u8], rules: &BodyRules) -> Result<(), BodyFault> {
        for byte in chunk {
            if self.place == Place::Done {
                return Ok(());
            }
            self.seen = self.seen.saturating_add(1);
            // UTF-16 and UTF-32 have a NUL here; old Ruby parsers detect and decode them. Where the type says JSON that is
            // refused; elsewhere it is read like them, and binary files go by.
            if *byte == 0 && self.seen <= 4 && self.declared {
                return Err(BodyFault::Ambiguous);
            }
            if *byte == 0 || (self.seen <= 2 && matches!(byte, 0xfe | 0xff)) {
                continue;
            }
            self.step(*byte, rules)?;
        }
        Ok(())
    }

    fn step(&mut self, byte: u8, rules: &BodyRules) -> Result<(), BodyFault> {
        match (self.place, byte) {
            (Place::InKey | Place::InString, _) => return self.in_string(byte, rules),
            (_, b' ' | b'\t' | b'\r' | b'\n') => {}
            (Place::Start, 0xef | 0xbb | 0xbf) if self.seen <= 3 => {}
            (Place::Start, b'{') => {
                self.depth = 1;
                self.place = Place::BeforeKey;
            }
            (Place::Start, b'[' | b'"' | b'-' | b'0'..=b'9' | b't' | b'f' | b'n') => self.place = Place::Done,
            (Place::BeforeKey, b'"') => {
                self.key.clear();
                self.place = Place::InKey;
            }
            (Place::BeforeKey, b'}') => self.place = Place::Done,
            (Place::BeforeKey, b',') => {}
            (Place::Value, b'"') => self.place = Place::InString,
            (Place::Value, b'{' | b'[') => self.depth = self.depth.saturating_add(1),
            (Place::Value, b'}' | b']') => {
                self.depth -= 1;
                if self.depth == 0 {
                    self.place = Place::Done;
                }
            }
            (Place::Value, b',') if self.depth == 1 => self.place = Place::BeforeKey,
            // Ruby's parsers skip comments, in which a quote would lead us astray. Plain JSON has none.
            (Place::Start | Place::BeforeKey, _) | (Place::Value, b'/') => return self.not_json(),
            (Place::Value | Place::Done, _) => {}
        }
        Ok(())
    }

    fn in_string(&mut self, byte: u8, rules: &BodyRules) -> Result<(), BodyFault> {
        if let Some(escape) = &mut self.escape {
            escape.push(byte);
            let Some(decoded) = unescape(escape) else { return Ok(()) };
            self.escape = None;
            self.push_key(&decoded);
            return Ok(());
        }
        match (byte, self.place) {
            (b'\\', _) => self.escape = Some(Vec::new()),
            (b'"', Place::InKey) => {
                self.place = Place::Value;
                return rules.check_plain(&self.key);
            }
            (b'"', _) => self.place = Place::Value,
            (_, Place::InKey) => self.push_key(&[byte]),
            _ => {}
        }
        Ok(())
    }

    fn push_key(&mut self, bytes: &[u8]) {
        if self.place == Place::InKey && self.key.len() < MAX_NAME_BYTES {
            self.key.extend_from_slice(bytes);
        }
    }

    fn not_json(&mut self) -> Result<(), BodyFault> {
        self.place = Place::Done;
        if self.declared { Err(BodyFault::Ambiguous) } else { Ok(()) }
    }
}

/// What an escape stands for, once it is whole. Ruby reads an unknown one as its own letter.
fn unescape(escape: &[u8]) -> Option<Vec<u8>> {
    match escape {
        [b'u', digits @ ..] if digits.len() < 4 => None,
        [b'u', digits @ ..] => {
            let code = std::str::from_utf8(digits).ok().and_then(|text| u32::from_str_radix(text, 16).ok());
            let letter = code.and_then(char::from_u32).unwrap_or(char::REPLACEMENT_CHARACTER);
            Some(letter.encode_utf8(&mut [0; 4]).as_bytes().to_vec())
        }
        [letter] => Some(vec![*letter]),
        _ => Some(Vec::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Arc<BodyRules> {
        let forbidden = vec![Key::Token, Key::AccessToken, Key::JobToken, Key::Sudo, Key::Method];
        Arc::new(BodyRules { names: Names { token: "private_token".into() }, forbidden })
    }

    /// The verdict, the same however the body is cut into chunks.
    fn verdict(content_type: Option<&str>, body: &[u8]) -> Result<(), BodyFault> {
        let run = |size: usize| {
            let mut scanner = BodyScanner::new(content_type.map(str::as_bytes), rules())?;
            body.chunks(size).try_for_each(|chunk| scanner.feed(chunk))?;
            scanner.finish()
        };
        let whole = run(body.len().max(1));
        for size in [1, 2, 3, 7] {
            assert_eq!(run(size), whole, "in chunks of {size}: {}", String::from_utf8_lossy(body));
        }
        whole
    }

    const FOUND: Result<(), BodyFault> = Err(BodyFault::Field(Key::Token));

    #[test]
    fn forms() {
        let form = Some("application/x-www-form-urlencoded");
        for body in [
            "private_token=B",
            "a=1&private_token=B",
            "a=1;private_token=B",
            "x=1&  private_token=B",
            "%70rivate_token=B",
            "[private_token]=B",
            "private_token[]=B",
            "private_token[x][y]=B",
            "private_token",
            "a=1&private_token",
            "private_token\n=B",
            "private%5Ftoken%5B%5D=B",
        ] {
            assert_eq!(verdict(form, body.as_bytes()), FOUND, "{body}");
            assert_eq!(verdict(None, body.as_bytes()), FOUND, "{body}");
            assert_eq!(
                verdict(Some("APPLICATION/X-WWW-FORM-URLENCODED; charset=utf-8"), body.as_bytes()),
                FOUND,
                "{body}"
            );
            assert_eq!(
                verdict(Some("application/x-www-form-urlencoded, text/plain"), body.as_bytes()),
                FOUND,
                "{body}"
            );
        }
        let padded = format!("{}private_token={}", "%5B[+".repeat(500), "x".repeat(9000));
        assert_eq!(verdict(form, padded.as_bytes()), FOUND);
        let deep = format!("private_token[{}]=1", "x".repeat(9000));
        assert_eq!(verdict(form, deep.as_bytes()), FOUND);
        for body in ["title=private_token=B", "a=%26private_token%3DB", "PRIVATE_TOKEN=B", "xprivate_token=B", "a=1&b"]
        {
            assert_eq!(verdict(form, body.as_bytes()), Ok(()), "{body}");
        }
        assert_eq!(verdict(form, "x".repeat(100_000).as_bytes()), Ok(()));
        assert_eq!(verdict(form, b"a=1&sudo=root"), Err(BodyFault::Field(Key::Sudo)));
        assert_eq!(verdict(form, b"_method=delete"), Err(BodyFault::Field(Key::Method)));
        assert_eq!(verdict(form, b"access_token=x"), Err(BodyFault::Field(Key::AccessToken)));
    }

    #[test]
    fn json_objects() {
        let json = Some("application/json");
        for body in [
            r#"{"private_token":"B"}"#,
            r#"{"a":{"b":[1,"}"]},"private_token":null}"#,
            r#"{"private\u005ftoken":"B"}"#,
            r#"{"\p\u0072ivate_token":1}"#,
            r#" {"a":"\"","private_token":1}"#,
            "\u{feff}{\"private_token\":1}",
            r#"{"title":"x","title":"y","private_token":"B""#,
        ] {
            assert_eq!(verdict(json, body.as_bytes()), FOUND, "{body}");
            assert_eq!(verdict(Some("text/plain"), body.as_bytes()), FOUND, "{body}");
        }
        for body in [
            r#"{"a":{"private_token":1}}"#,
            r#"{"a":"private_token"}"#,
            r#"[{"private_token":1}]"#,
            "{}",
            "",
            "null",
            r#"{"Private_Token":1}"#,
        ] {
            assert_eq!(verdict(json, body.as_bytes()), Ok(()), "{body}");
        }
        for body in
            [&b"{/*\"*/\"private_token\":1}"[..], b"{\"a\":1/*\"*/,\"private_token\":1}", b"{\0\"\0p\0", b"{'a':1}"]
        {
            assert_eq!(verdict(json, body), Err(BodyFault::Ambiguous), "{}", String::from_utf8_lossy(body));
            assert_eq!(verdict(Some("application/octet-stream"), body), Ok(()));
        }
    }

    #[test]
    fn multipart_bodies() {
        let kind = Some("multipart/form-data; boundary=\"aB\"");
        let part = |head: &str| {
            format!(
                "--aB\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n1\r\n--aB\r\n{head}\r\n\r\nvalue\r\n--aB--\r\n"
            )
        };
        for head in [
            "Content-Disposition: form-data; name=\"private_token\"",
            "content-disposition:form-data;name=private_token",
            "Content-Disposition: form-data; filename=\"x\"; name=\"private_token\"",
            "Content-Id: private_token",
            "Content-Disposition: form-data; name=\"[private_token]\"",
            "Content-Disposition: form-data; name=\"private\\_token\"",
            "Content-Disposition: form-data;\r\n name=\"private_token[x]\"",
            "Content-ID: <private_token>",
        ] {
            assert_eq!(verdict(kind, part(head).as_bytes()), FOUND, "{head}");
            assert_eq!(verdict(Some("multipart/related; boundary=aB"), part(head).as_bytes()), FOUND, "{head}");
        }
        for head in
            ["Content-Disposition: form-data; name=\"file\"; filename=\"private_token\"", "Content-Type: text/plain"]
        {
            assert_eq!(verdict(kind, part(head).as_bytes()), Ok(()), "{head}");
        }
        let text = part("Content-Disposition: form-data; name=\"b\"").replace("value", "name=\"private_token\"");
        assert_eq!(verdict(kind, text.as_bytes()), Ok(()));
        assert_eq!(verdict(Some("multipart/form-data; boundary=a; boundary=b"), b""), Err(BodyFault::Ambiguous));
        assert_eq!(verdict(Some("multipart/form-data"), b"private_token=1"), FOUND);
        assert_eq!(verdict(kind, format!("--aB\r\n{}", "x".repeat(20_000)).as_bytes()), Err(BodyFault::Ambiguous));
    }
}
