//! Records as text for moving them between stores: the command line's JSON output, and the input of an import. All
//! fields of a record are included, so that a list of one store can be imported into another without loss. The input
//! may contain tokens: errors name the place and the reason, and never quote it.

use super::record::{self, RecordField, RecordSource, Unsaid};
use super::values::{LATEST, check_description, check_scope, check_user, parse_time, rfc3339};
use super::{AdminError, TokenRecord};
use crate::request::token::MAX_TOKEN_BYTES;
use crate::store::credential::Digest;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use std::io::BufRead;

/// A record as printed by the command line.
#[derive(Serialize)]
pub struct ShownRecord {
    pub id: String,
    pub sha256: String,
    pub user: String,
    pub scopes: Vec<String>,
    pub description: String,
    pub created: String,
    pub not_before: Option<String>,
    pub expires: Option<String>,
    pub revoked: Option<String>,
    pub blocked: bool,
    pub superseded: Option<String>,
    /// The id of that token.
    pub replaces: Option<String>,
    /// The complete digest.
    pub replaces_sha256: Option<String>,
    pub last_used: Option<String>,
    pub plan: Option<String>,
    pub rate: Option<String>,
    pub networks: Vec<String>,
    pub methods: Vec<String>,
}

impl From<&TokenRecord> for ShownRecord {
    fn from(record: &TokenRecord) -> Self {
        let said = record.terms.as_deref().map(|terms| terms.said().clone()).unwrap_or_default();
        let stated = |text: String| Some(text).filter(|text| !text.is_empty());
        Self {
            id: record.digest.id().to_string(),
            sha256: record.digest.to_hex(),
            user: record.user.clone(),
            scopes: record.scopes.clone(),
            description: record.description.clone(),
            created: rfc3339(record.created),
            not_before: record.not_before.map(rfc3339),
            expires: record.expires.map(rfc3339),
            revoked: record.revoked.map(rfc3339),
            blocked: record.blocked,
            superseded: record.superseded.map(rfc3339),
            replaces: record.replaces.map(|digest| digest.id().to_string()),
            replaces_sha256: record.replaces.map(Digest::to_hex),
            last_used: record.last_used.map(rfc3339),
            plan: stated(said.plan),
            rate: stated(said.rate),
            networks: said.networks,
            methods: said.methods,
        }
    }
}

/// Maximum number of errors that are listed; of the rest only the number is reported.
const NAMED: usize = 20;
/// Longer entries are errors.
const LONGEST: usize = 1024 * 1024;

/// Reads records from an input: one JSON object per line, or one array of objects over any number of lines. After the
/// first error it reads to the end to find all others, returns them as one error, and then no more records.
pub struct Reading<R> {
    source: RecordLines<R>,
    now: u64,
    bad: Bad,
    read: u64,
    over: bool,
}

impl<R: BufRead> Reading<R> {
    /// `now` is the creation time for tokens without one, in Unix seconds.
    pub fn new(input: R, now: u64) -> Self {
        let source = RecordLines { input, place: LinePlace { line: 1, column: 1 }, format: None };
        Self { source, now, bad: Bad::default(), read: 0, over: false }
    }

    /// The number of entries so far, including invalid ones.
    pub fn entries(&self) -> u64 {
        self.read
    }

    fn entry(&mut self) -> Result<Option<TokenRecord>, Stop> {
        let Some(entry) = self.source.next()? else { return Ok(None) };
        self.read += 1;
        let text = std::str::from_utf8(&entry.bytes).map_err(|error| {
            let place = entry.place.behind(&entry.bytes[..error.valid_up_to()]);
            Stop::Bad(EntryError { place, key: None, why: "is no UTF-8".into() })
        })?;
        record(text, self.now).map(Some).map_err(|(offset, key, why)| {
            let place = entry.place.behind(text.as_bytes().get(..offset).unwrap_or_default());
            Stop::Bad(EntryError { place, key, why })
        })
    }
}

impl<R: BufRead> Iterator for Reading<R> {
    type Item = Result<TokenRecord, AdminError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.over {
            match self.entry() {
                Ok(Some(record)) if self.bad.count == 0 => return Some(Ok(record)),
                Ok(Some(_)) => {}
                Ok(None) => self.over = true,
                Err(Stop::Bad(error)) => self.bad.note(&error),
                Err(Stop::End(error)) => {
                    self.bad.note(&error);
                    self.over = true;
                }
                Err(Stop::Input(error)) => {
                    self.over = true;
                    return Some(Err(AdminError::Input(format!("the input can't be read: {error}"))));
                }
            }
        }
        let bad = std::mem::take(&mut self.bad);
        (bad.count > 0).then(|| Err(AdminError::Input(bad.say())))
    }
}

/// Why an entry is not a valid record.
enum Stop {
    /// The next entry can be read.
    Bad(EntryError),
    /// The beginning of the next entry is unknown.
    End(EntryError),
    Input(std::io::Error),
}

impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Self {
        Self::Input(error)
    }
}

struct EntryError {
    place: LinePlace,
    key: Option<&'static str>,
    why: String,
}

#[derive(Default)]
struct Bad {
    named: Vec<String>,
    count: usize,
}

impl Bad {
    fn note(&mut self, error: &EntryError) {
        self.count += 1;
        if self.named.len() < NAMED {
            let LinePlace { line, column } = error.place;
            let key = error.key.map_or(String::new(), |key| format!("{key}: "));
            self.named.push(format!("line {line}, column {column}: {key}{}", error.why));
        }
    }

    fn say(&self) -> String {
        let entries = if self.count == 1 { "one entry is wrong" } else { "entries are wrong" };
        let count = if self.count == 1 { String::new() } else { format!("{} ", self.count) };
        let mut text = format!("nothing was imported: {count}{entries}\n{}", self.named.join("\n"));
        if self.count > self.named.len() {
            text += &format!("\nand {} more", self.count - self.named.len());
        }
        text
    }
}

/// Counted in characters, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct LinePlace {
    line: u64,
    column: u64,
}

impl LinePlace {
    fn step(&mut self, byte: u8) {
        match byte {
            b'\n' => *self = Self { line: self.line + 1, column: 1 },
            // A UTF-8 continuation byte is not a new character.
            0x80..=0xbf => {}
            _ => self.column += 1,
        }
    }

    fn behind(mut self, bytes: &[u8]) -> Self {
        bytes.iter().for_each(|byte| self.step(*byte));
        self
    }
}

/// Splits an input into the texts of its entries.
struct RecordLines<R> {
    input: R,
    place: LinePlace,
    format: Option<InputFormat>,
}

#[derive(Clone, Copy)]
enum InputFormat {
    Lines,
    Array,
    /// After the end of an array.
    Done,
}

struct EntryText {
    bytes: Vec<u8>,
    place: LinePlace,
}

impl<R: BufRead> RecordLines<R> {
    fn next(&mut self) -> Result<Option<EntryText>, Stop> {
        let format = match self.format {
            Some(format) => format,
            None => {
                for byte in b"\xef\xbb\xbf" {
                    // A byte order mark, which some systems write first; a partial one is not JSON either.
                    if self.peek()? == Some(*byte) {
                        self.input.consume(1);
                    }
                }
                self.skip_blanks()?;
                let format = if self.peek()? == Some(b'[') { InputFormat::Array } else { InputFormat::Lines };
                if matches!(format, InputFormat::Array) {
                    self.take()?;
                }
                *self.format.insert(format)
            }
        };
        match format {
            InputFormat::Lines => self.line(),
            InputFormat::Array => self.element(),
            InputFormat::Done => {
                self.skip_blanks()?;
                match self.peek()? {
                    None => Ok(None),
                    Some(_) => Err(self.end("there is text behind the end of the array")),
                }
            }
        }
    }

    fn line(&mut self) -> Result<Option<EntryText>, Stop> {
        self.skip_blanks()?;
        let (mut bytes, place) = (Vec::new(), self.place);
        let mut long = false;
        while let Some(byte) = self.take()? {
            match byte {
                b'\n' => break,
                _ if bytes.len() >= LONGEST => long = true,
                _ => bytes.push(byte),
            }
        }
        if long {
            return Err(Stop::Bad(EntryError { place, key: None, why: "is longer than 1 MiB".into() }));
        }
        Ok((!bytes.is_empty()).then_some(EntryText { bytes, place }))
    }

    fn element(&mut self) -> Result<Option<EntryText>, Stop> {
        loop {
            self.skip_blanks()?;
            match self.peek()? {
                Some(b',') => {
                    self.take()?;
                }
                _ => break,
            }
        }
        if self.peek()? == Some(b']') {
            self.take()?;
            self.format = Some(InputFormat::Done);
            return self.next();
        }
        let (mut bytes, place) = (Vec::new(), self.place);
        let (mut depth, mut in_text, mut escaped) = (0_usize, false, false);
        loop {
            let Some(byte) = self.peek()? else {
                return Err(self.end("the array does not end: the input is cut off"));
            };
            match byte {
                _ if escaped => escaped = false,
                b'\\' if in_text => escaped = true,
                b'"' => in_text = !in_text,
                _ if in_text => {}
                b',' | b']' if depth == 0 => return Ok(Some(EntryText { bytes, place })),
                b'{' | b'[' => depth += 1,
                b'}' | b']' => depth = depth.saturating_sub(1),
                _ => {}
            }
            if bytes.len() >= LONGEST {
                return Err(Stop::End(EntryError { place, key: None, why: "is longer than 1 MiB".into() }));
            }
            bytes.push(byte);
            self.take()?;
        }
    }

    fn end(&self, why: &str) -> Stop {
        Stop::End(EntryError { place: self.place, key: None, why: why.into() })
    }

    fn skip_blanks(&mut self) -> Result<(), Stop> {
        while self.peek()?.is_some_and(|byte| byte.is_ascii_whitespace()) {
            self.take()?;
        }
        Ok(())
    }

    fn peek(&mut self) -> std::io::Result<Option<u8>> {
        loop {
            match self.input.fill_buf() {
                Ok(buffer) => return Ok(buffer.first().copied()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn take(&mut self) -> std::io::Result<Option<u8>> {
        let byte = self.peek()?;
        if let Some(byte) = byte {
            self.place.step(byte);
            self.input.consume(1);
        }
        Ok(byte)
    }
}

/// What an entry may have besides the fields of a record: what a list shows of the digest, and a token instead of it.
const ALSO: [&str; 4] = ["token", "sha256", "id", "replaces_sha256"];

fn keys() -> impl Iterator<Item = &'static str> {
    ALSO.into_iter().chain(RecordField::ALL.into_iter().map(RecordField::name))
}

/// The fields of one object, each with the text of its value.
struct RawFields<'a>(Vec<(String, &'a RawValue)>);

impl<'de> Deserialize<'de> for RawFields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = RawFields<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry::<String, &'de RawValue>()? {
                    fields.push(field);
                }
                Ok(RawFields(fields))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

/// The position in the text, the key, and the error.
type RecordError = (usize, Option<&'static str>, String);

fn record(text: &str, now: u64) -> Result<TokenRecord, RecordError> {
    let RawFields(fields) = serde_json::from_str(text).map_err(|error| match text.trim_start().starts_with('{') {
        true => (offset(text, error.line(), error.column()), None, "the JSON breaks off or is malformed here".into()),
        false => (0, None, "must be a JSON object, with user, and token or sha256".to_owned()),
    })?;
    let mut entry = EntryFields { text, fields: Vec::with_capacity(fields.len()) };
    for (name, value) in fields {
        let at = entry.offset(value);
        let Some(key) = keys().find(|key| *key == name) else {
            return Err((at, None, format!("its key is not one of {}", keys().collect::<Vec<_>>().join(", "))));
        };
        if entry.fields.iter().any(|(known, _)| *known == key) {
            return Err((at, Some(key), "stands there twice".into()));
        }
        entry.fields.push((key, value));
    }
    entry.record(now)
}

/// The byte offset for a parser's line and column, both counted from 1.
fn offset(text: &str, line: usize, column: usize) -> usize {
    let begin: usize = text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum();
    let mut at = (begin + column.saturating_sub(1)).min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

struct EntryFields<'a> {
    text: &'a str,
    fields: Vec<(&'static str, &'a RawValue)>,
}

impl<'a> EntryFields<'a> {
    /// The offset of a value, which is a slice of the text.
    fn offset(&self, value: &RawValue) -> usize {
        (value.get().as_ptr() as usize).saturating_sub(self.text.as_ptr() as usize).min(self.text.len())
    }

    /// A list contains `null` for absent values.
    fn value(&self, key: &'static str) -> Option<&'a RawValue> {
        let (_, value) = self.fields.iter().find(|(known, _)| *known == key)?;
        Some(*value).filter(|value| value.get() != "null")
    }

    fn wrong(&self, key: &'static str, why: impl Into<String>) -> RecordError {
        (self.value(key).map_or(0, |value| self.offset(value)), Some(key), why.into())
    }

    fn read<T: Deserialize<'a>>(&self, key: &'static str, what: &str) -> Result<Option<T>, RecordError> {
        let read = |value: &'a RawValue| serde_json::from_str(value.get());
        self.value(key).map(read).transpose().map_err(|_| self.wrong(key, format!("must be {what}")))
    }

    fn string(&self, key: &'static str) -> Result<Option<String>, RecordError> {
        self.read(key, "a text")
    }

    fn token(&self) -> Result<Digest, RecordError> {
        let token = self.string("token")?;
        let hex = self.string("sha256")?;
        let of_token = match &token {
            Some(token) if !is_token(token.as_bytes()) => {
                return Err(self.wrong("token", "must be 1 to 2048 visible ASCII characters"));
            }
            token => token.as_ref().map(|token| Digest::of(token.as_bytes())),
        };
        let named = hex
            .map(|hex| Digest::from_hex(&hex).ok_or_else(|| self.wrong("sha256", "must be 64 hex digits")))
            .transpose()?;
        match (of_token, named) {
            (Some(token), Some(named)) if token != named => Err(self.wrong("sha256", "is not the one of token")),
            (Some(digest), _) | (None, Some(digest)) => Ok(digest),
            (None, None) => Err((0, None, "give token or sha256".into())),
        }
    }

    fn record(&self, now: u64) -> Result<TokenRecord, RecordError> {
        let digest = self.token()?;
        if self.string("id")?.is_some_and(|id| !names(&id, &digest)) {
            return Err(self.wrong("id", "is not the one of this token"));
        }
        let source = AtImport { entry: self, now };
        record::read(digest, &source, &Unsaid { scopes: &[], created: now })
    }
}

/// An entry at the time of its import.
struct AtImport<'a> {
    entry: &'a EntryFields<'a>,
    now: u64,
}

impl RecordSource for AtImport<'_> {
    type Error = RecordError;

    fn text(&self, field: RecordField) -> Result<Option<String>, RecordError> {
        let text = self.entry.string(field.name())?;
        let check = if field == RecordField::User { check_user } else { check_description };
        text.as_deref().map_or(Ok(()), check).map_err(|why| self.entry.wrong(field.name(), why))?;
        Ok(text)
    }

    fn words(&self, field: RecordField) -> Result<Option<Vec<String>>, RecordError> {
        let words: Option<Vec<String>> = self.entry.read(field.name(), "a list of texts")?;
        match words.iter().flatten().find_map(|word| check_scope(word).err()) {
            Some(why) => Err(self.entry.wrong(field.name(), format!("each {why}"))),
            None => Ok(words),
        }
    }

    fn time(&self, field: RecordField) -> Result<Option<u64>, RecordError> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Time {
            Seconds(u64),
            Text(String),
        }
        let what = "a time like 2026-12-31T23:59:59Z";
        let seconds = match self.entry.read(field.name(), what)? {
            None => return Ok(None),
            Some(Time::Seconds(seconds)) => Some(seconds).filter(|seconds| *seconds <= LATEST),
            Some(Time::Text(text)) => parse_time(&text),
        };
        seconds.map(Some).ok_or_else(|| self.entry.wrong(field.name(), format!("must be {what}")))
    }

    fn flag(&self, field: RecordField) -> Result<Option<bool>, RecordError> {
        self.entry.read(field.name(), "true or false")
    }

    fn digest(&self, field: RecordField) -> Result<Option<Digest>, RecordError> {
        let whole =
            |key, hex: &str| Digest::from_hex(hex).ok_or_else(|| self.entry.wrong(key, "must be 64 hex digits"));
        let short = self.entry.string(field.name())?;
        match (self.entry.string("replaces_sha256")?, short) {
            (Some(hex), short) => {
                let digest = whole("replaces_sha256", &hex)?;
                match short {
                    Some(short) if !names(&short, &digest) => {
                        Err(self.entry.wrong(field.name(), "is not the one of replaces_sha256"))
                    }
                    _ => Ok(Some(digest)),
                }
            }
            (None, Some(hex)) => whole(field.name(), &hex).map(Some),
            (None, None) => Ok(None),
        }
    }

    fn revoked(&self) -> Result<Option<u64>, RecordError> {
        match self.entry.value(RecordField::Revoked.name()).map(RawValue::get) {
            // The time of the revocation is unknown, so the current time is used.
            Some("true") => Ok(Some(self.now)),
            Some("false") => Ok(None),
            _ => self.time(RecordField::Revoked),
        }
    }

    fn wrong(&self, field: RecordField, what: &'static str) -> RecordError {
        self.entry.wrong(field.name(), what)
    }

    fn missing(&self, field: RecordField) -> RecordError {
        (0, Some(field.name()), "is missing".into())
    }
}

/// Whether a gateway could be configured to accept this as a token.
pub fn is_token(bytes: &[u8]) -> bool {
    (1..=MAX_TOKEN_BYTES).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
}

/// Whether an id, or a longer prefix, matches this digest.
fn names(id: &str, digest: &Digest) -> bool {
    id.len() >= 6 && digest.to_hex().starts_with(&id.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::terms::{SaidTerms, TokenTerms};

    const NOW: u64 = 1_700_000_000;

    fn read(input: &str) -> Result<Vec<TokenRecord>, String> {
        Reading::new(input.as_bytes(), NOW).collect::<Result<_, _>>().map_err(|error| error.to_string())
    }

    fn full() -> TokenRecord {
        TokenRecord {
            scopes: vec!["api".into(), "read_user".into()],
            description: "two\nlines, \"quoted\" ] } \\ é".into(),
            created: 1_600_000_000,
            not_before: Some(1_600_000_001),
            expires: Some(1_800_000_000),
            revoked: Some(1_650_000_000),
            blocked: true,
            superseded: Some(1_640_000_000),
            replaces: Some(Digest::of(b"old")),
            last_used: Some(1_600_000_002),
            terms: TokenTerms::of(SaidTerms {
                plan: "gold".into(),
                rate: "600/min burst 10".into(),
                networks: vec!["10.0.0.0/8".into(), "2001:db8::/32".into()],
                methods: vec!["GET".into(), "HEAD".into()],
            })
            .unwrap(),
            ..TokenRecord::new(Digest::of(b"t"), "é, ü")
        }
    }

    #[test]
    fn what_is_shown_is_read_again() {
        let records = vec![full(), TokenRecord::new(Digest::of(b"bare"), "user")];
        let shown: Vec<_> = records.iter().map(ShownRecord::from).collect();
        let lines: String = shown.iter().map(|shown| serde_json::to_string(shown).unwrap() + "\n").collect();
        let array = serde_json::to_string(&shown).unwrap();
        let pretty = serde_json::to_string_pretty(&shown).unwrap();
        for text in [
            &lines,
            &array,
            &pretty,
            &format!("\u{feff}{array}"),
            &format!("\r\n {pretty}\r\n"),
            &lines.replace('\n', "\r\n\r\n"),
        ] {
            assert_eq!(read(text).as_ref(), Ok(&records), "{text}");
        }
        for empty in ["", "\n \n", "[]", " [ ] \n"] {
            assert_eq!(read(empty), Ok(vec![]), "{empty:?}");
        }
    }

    #[test]
    fn people_write_less_and_otherwise() {
        let digest = Digest::of(b"S3CRET");
        for line in [
            r#"{"user":"a","token":"S3CRET"}"#.to_owned(),
            format!(r#"{{"user":"a","sha256":"{}"}}"#, digest.to_hex().to_uppercase()),
            format!(r#"{{"sha256":"{}","token":"S3CRET","user":"a","expires":null}}"#, digest.to_hex()),
            r#"{"\u0075ser":"\u0061","token":"S3CRET","scopes":[],"description":"","blocked":false,"revoked":false}"#
                .to_owned(),
        ] {
            let expected = TokenRecord { created: NOW, ..TokenRecord::new(digest, "a") };
            assert_eq!(read(&line), Ok(vec![expected]), "{line}");
        }
        let line = r#"{"user":"a","token":"t","expires":1800000000,"revoked":true,"created":"2020-01-01"}"#;
        let record = read(line).unwrap().remove(0);
        assert_eq!((record.expires, record.revoked, record.created), (Some(1_800_000_000), Some(NOW), 1_577_836_800));
    }

    #[test]
    fn what_is_wrong_has_its_place_and_is_not_quoted() {
        let good = "{\"user\":\"a\",\"token\":\"t\"}\n";
        for (bad, place) in [
            (r#"S3CRET"#, "column 1: must be a JSON object"),
            (r#"["S3CRET"]"#, "column 1: must be a JSON object"),
            (r#""S3CRET""#, "column 1: must be a JSON object"),
            (r#"{"user":"a","token":"S3CRET x"}"#, "column 21: token: must be 1 to 2048 visible"),
            (r#"{"user":"a","token":""}"#, "column 21: token: must be 1 to 2048 visible"),
            (r#"{"token":"S3CRET"}"#, "column 1: user: is missing"),
            (r#"{"token":"S3CRET","user":null}"#, "column 1: user: is missing"),
            (r#"{"token":"S3CRET","user":7}"#, "column 26: user: must be a text"),
            (r#"{"token":"S3CRET","user":""}"#, "column 26: user: must not be empty"),
            (r#"{"token":"S3CRET","user":"a\u001bb"}"#, "column 26: user: must not hold control"),
            (r#"{"token":"S3CRET","user":" a"}"#, "column 26: user: must not begin"),
            (r#"{"user":"é","scopes":["a b"],"token":"t"}"#, "column 22: scopes: each must be one word"),
            (r#"{"user":"a","scopes":"api","token":"t"}"#, "column 22: scopes: must be a list"),
            (r#"{"user":"a","token":"t","description":"\u0000"}"#, "column 39: description: must not hold a NUL"),
            (r#"{"user":"a","token":"t","S3CRET":1}"#, "column 34: its key is not one of"),
            (r#"{"user":"a","token":"t","user":"b"}"#, "column 32: user: stands there twice"),
            (r#"{"user":"a","sha256":"S3CRET"}"#, "column 22: sha256: must be 64 hex"),
            (r#"{"user":"a","token":"S3CRET","sha256":"5f2b"}"#, "column 39: sha256: must be 64 hex"),
            (r#"{"user":"a"}"#, "column 1: give token or sha256"),
            (r#"{"user":"a","token":"t","expires":"S3CRET"}"#, "column 35: expires: must be a time"),
            (r#"{"user":"a","token":"t","expires":"2026-01-01T00:00:00+25:00"}"#, "column 35: expires: must be a time"),
            (r#"{"user":"a","token":"t","created":1800000000000}"#, "column 35: created: must be a time"),
            (r#"{"user":"a","token":"t","last_used":-1}"#, "column 37: last_used: must be a time"),
            (r#"{"user":"a","token":"t","revoked":"yes"}"#, "column 35: revoked: must be a time"),
            (r#"{"user":"a","token":"t","blocked":"yes"}"#, "column 35: blocked: must be true or false"),
            (r#"{"user":"a","token":"t","plan":"S3CRET x"}"#, "column 32: plan: must be a plan's name"),
            (r#"{"user":"a","token":"t","rate":"S3CRET"}"#, "column 32: rate: must be a rate"),
            (r#"{"user":"a","token":"t","networks":["S3CRET"]}"#, "column 36: networks: must be up to 64 networks"),
            (r#"{"user":"a","token":"t","methods":["S3CRET"]}"#, "column 35: methods: must be of GET"),
            (r#"{"user":"a","token":"t","id":"S3CRET"}"#, "column 30: id: is not the one"),
            (r#"{"user":"a","token":"t","replaces":"5f2b8c0e91aa"}"#, "column 36: replaces: must be 64 hex"),
            (r#"{"user":"a","token":"t""#, "the JSON breaks off or is malformed here"),
            (r#"{"user":"a","token":"t"} S3CRET"#, "column 26: the JSON breaks off"),
        ] {
            let unclosed = bad.starts_with('{') && !bad.contains('}');
            for (text, line) in [(format!("{good}{bad}\n{good}"), 2), (format!("[{good},\n{bad},\n{good}]"), 3)] {
                // In an array, the end of such an entry is unknown.
                if unclosed && line == 3 {
                    continue;
                }
                let why = read(&text).unwrap_err();
                assert!(why.contains(&format!("line {line}, ")) && why.contains(place), "{text}: {why}");
                assert!(why.starts_with("nothing was imported: one entry") && !why.contains("S3CRET"), "{text}: {why}");
            }
        }
        for (cut, place) in [
            ("[", "line 1, column 2: the array does not end"),
            ("[\n{\"user\":\"a\",\"token\":\"t\"},", "line 2, column 26: the array does not end"),
            ("[{\"user\":\"a", "line 1, column 12: the array does not end"),
            ("[] S3CRET", "line 1, column 4: there is text behind"),
            ("[]\n{\"user\":\"a\",\"token\":\"t\"}", "line 2, column 1: there is text behind"),
        ] {
            let why = read(cut).unwrap_err();
            assert!(why.contains(place) && !why.contains("S3CRET"), "{cut}: {why}");
        }
        assert!(Reading::new(&b"{\"user\":\"a\xff\",\"token\":\"t\"}"[..], NOW).next().unwrap().is_err());
        let long = format!("{{\"user\":\"a\",\"token\":\"t\",\"description\":\"{}\"}}\n{good}", "x".repeat(LONGEST));
        assert!(read(&long).unwrap_err().contains("line 1, column 1: is longer than 1 MiB"));
        assert!(read(&format!("[{long}]")).unwrap_err().contains("line 1, column 2: is longer than 1 MiB"));
    }

    #[test]
    fn twenty_are_named_and_the_rest_are_counted() {
        let lines: String = (0..50)
            .map(|n| {
                format!("{{\"user\":\"u\",\"token\":\"t{n}\",\"expires\":{}}}\n", if n % 2 == 0 { "1" } else { "-1" })
            })
            .collect();
        let why = read(&lines).unwrap_err();
        assert_eq!(why.lines().filter(|line| line.starts_with("line ")).count(), 20, "{why}");
        assert!(why.starts_with("nothing was imported: 25 entries are wrong\nline 2, column"), "{why}");
        assert!(why.ends_with("\nand 5 more"), "{why}");
        let mut reading = Reading::new(lines.as_bytes(), NOW);
        assert!(reading.next().unwrap().is_ok() && reading.next().unwrap().is_err() && reading.next().is_none());
        assert_eq!(reading.entries(), 50);
    }
}
