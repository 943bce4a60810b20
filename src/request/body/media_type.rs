//! Parses a Content-Type strictly: one `type/subtype`, each parameter once. A type that some backend parses into
//! parameters is forwarded in one spelling, so that every backend sees the type and boundary that the body was judged
//! by.

use super::super::head::{is_token_byte, trim_blanks};
use super::super::seeded::{self, Rule};
use super::BodyFault;
use smallvec::SmallVec;

/// RFC 2046.
const MAX_BOUNDARY_BYTES: usize = 70;

/// How a body of this type is parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Form,
    Multipart {
        boundary: Vec<u8>,
    },
    Json,
    /// Text: without parameters, but some backends look for them in it.
    Text,
    /// No parameters to any backend except early Grape, which parses everything as JSON.
    Opaque,
    /// Does not follow the grammar, and no backend could read a known type from it: handled like no type.
    Unclear,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MediaType {
    pub(super) kind: Kind,
    /// The value to forward; `None` for the client's own bytes.
    pub(super) canonical: Option<Vec<u8>>,
}

/// The words by which backends recognise the types that they parse. Some search for them anywhere in the value.
const FORM: &[u8] = b"urlencoded";
const MULTIPART: &[u8] = b"multipart";
const JSON: &[u8] = b"json";
const WORDS: [&[u8]; 5] = [FORM, MULTIPART, JSON, b"form-data", b"x-www-form"];

/// The value has no blanks at its ends and is not empty.
pub(super) fn parse(value: &[u8]) -> Result<MediaType, BodyFault> {
    let lower = value.to_ascii_lowercase();
    let claims = WORDS.iter().any(|word| contains(&lower, word));
    let Some(parsed) = Parsed::of(value) else {
        // Parsers strip or stop at unusual blanks, commas and other bytes.
        return if claims && !seeded::off(Rule::TypeGrammar) {
            Err(BodyFault::Type)
        } else {
            Ok(MediaType { kind: Kind::Unclear, canonical: None })
        };
    };
    if contains(&lower, b"utf-7") && !seeded::off(Rule::Charset) {
        return Err(BodyFault::Charset);
    }
    let essence = parsed.essence.to_ascii_lowercase();
    let is = |word: &[u8]| contains(&essence, word);
    if !claims {
        let kind = if essence.starts_with(b"text/") || is(b"xml") { Kind::Text } else { Kind::Opaque };
        return Ok(MediaType { kind, canonical: None });
    }
    // A list of documents is not one JSON document. Its first document is scanned all the same.
    let lists = is(b"ndjson") || is(b"json-seq") || is(b"jsonl");
    let kind = match (is(MULTIPART), is(FORM), is(JSON)) {
        (true, false, false) if essence.starts_with(b"multipart/") => {
            Kind::Multipart { boundary: parsed.boundary().ok_or(BodyFault::Type)?.to_vec() }
        }
        (false, true, false) => Kind::Form,
        (false, false, true) => Kind::Json,
        _ => return Err(BodyFault::Type),
    };
    parsed.check(&kind)?;
    let canonical = parsed.canonical(&essence);
    Ok(MediaType { kind: if lists { Kind::Text } else { kind }, canonical: (canonical != value).then_some(canonical) })
}

fn contains(text: &[u8], word: &[u8]) -> bool {
    memchr::memmem::find(text, word).is_some()
}

/// A value that follows RFC 9110's grammar, except that a boundary may lack the quotes it needs.
struct Parsed<'a> {
    essence: &'a [u8],
    params: SmallVec<[(&'a [u8], &'a [u8]); 2]>,
}

impl<'a> Parsed<'a> {
    fn of(value: &'a [u8]) -> Option<Self> {
        let (essence, mut rest) = value.split_at(memchr::memchr(b';', value).unwrap_or(value.len()));
        let essence = trim_blanks(essence);
        let slash = memchr::memchr(b'/', essence)?;
        if !is_token(&essence[..slash]) || !is_token(&essence[slash + 1..]) {
            return None;
        }
        let mut params: SmallVec<[(&[u8], &[u8]); 2]> = SmallVec::new();
        // `rest` is empty or begins with `;`. A `;` without a parameter is legal.
        while let [b';', after @ ..] = rest {
            rest = skip_blanks(after);
            if matches!(rest, [] | [b';', ..]) {
                continue;
            }
            let equals = memchr::memchr(b'=', rest)?;
            let name = &rest[..equals];
            if !is_token(name) || params.iter().any(|(known, _)| known.eq_ignore_ascii_case(name)) {
                return None;
            }
            let value;
            (value, rest) = parameter_value(name, &rest[equals + 1..])?;
            params.push((name, value));
            rest = skip_blanks(rest);
        }
        rest.is_empty().then_some(Self { essence, params })
    }

    fn boundary(&self) -> Option<&'a [u8]> {
        let (_, boundary) = self.params.iter().find(|(name, _)| name.eq_ignore_ascii_case(b"boundary"))?;
        let blank_at_end = boundary.first() == Some(&b' ') || boundary.last() == Some(&b' ');
        let fits = (1..=MAX_BOUNDARY_BYTES).contains(&boundary.len()) && boundary.iter().all(|b| is_boundary_byte(*b));
        (fits && !blank_at_end).then_some(boundary)
    }

    /// Restricts the parameters of a parsed type to those that all parsers read in the same way.
    fn check(&self, kind: &Kind) -> Result<(), BodyFault> {
        let own: &[u8] = match kind {
            Kind::Json => JSON,
            _ => b"",
        };
        for (name, value) in &self.params {
            if name.eq_ignore_ascii_case(b"boundary") && matches!(kind, Kind::Multipart { .. }) {
                continue;
            }
            let is_charset = name.eq_ignore_ascii_case(b"charset");
            // Rack cuts at `,` and `;` inside quotes too; others decode escapes and `name*`.
            let plain = |byte: &u8| (b' '..0x7f).contains(byte) && !matches!(byte, b'"' | b'\\' | b',' | b';');
            let says = |word: &&[u8]| {
                *word != own
                    && (contains(&name.to_ascii_lowercase(), word) || contains(&value.to_ascii_lowercase(), word))
            };
            let strange = name.contains(&b'*') || !value.iter().all(plain) || WORDS.iter().any(says);
            if strange || (!is_charset && matches!(kind, Kind::Multipart { .. })) {
                return Err(BodyFault::Type);
            }
            if is_charset && !holds_ascii(&value.to_ascii_lowercase()) && !seeded::off(Rule::Charset) {
                return Err(BodyFault::Charset);
            }
        }
        Ok(())
    }

    fn canonical(&self, essence: &[u8]) -> Vec<u8> {
        let mut out = essence.to_vec();
        for (name, value) in &self.params {
            out.extend_from_slice(b"; ");
            out.extend(name.iter().map(u8::to_ascii_lowercase));
            out.push(b'=');
            if is_token(value) {
                out.extend_from_slice(value);
            } else {
                out.push(b'"');
                out.extend_from_slice(value);
                out.push(b'"');
            }
        }
        out
    }
}

/// A parameter's value without its quotes, and the rest of the text. Escapes inside quotes are not decoded.
fn parameter_value<'a>(name: &[u8], text: &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
    if let Some(quoted) = text.strip_prefix(b"\"") {
        let mut at = 0;
        loop {
            match quoted.get(at)? {
                b'"' => return Some((&quoted[..at], &quoted[at + 1..])),
                b'\\' => at += 2,
                _ => at += 1,
            }
        }
    }
    let end = memchr::memchr(b';', text).unwrap_or(text.len());
    let mut value = &text[..end];
    while let [front @ .., b' ' | b'\t'] = value {
        value = front;
    }
    // Old clients do not quote a boundary that needs quotes. The forwarded value has them.
    let unquoted_boundary = name.eq_ignore_ascii_case(b"boundary") && value.iter().all(|b| is_boundary_byte(*b));
    (is_token(value) || (unquoted_boundary && !value.is_empty())).then_some((value, &text[end..]))
}

fn skip_blanks(mut text: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] = text {
        text = rest;
    }
    text
}

fn is_token(text: &[u8]) -> bool {
    !text.is_empty() && text.iter().all(|b| is_token_byte(*b))
}

/// RFC 2046 without the comma, at which Rack cuts, and with `*`, which a widely copied Android code snippet uses.
const fn is_boundary_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(byte, b'\'' | b'(' | b')' | b'+' | b'_' | b'-' | b'.' | b'/' | b':' | b'=' | b'?' | b'*' | b' ')
}

/// Charsets that encode ASCII as itself and nothing else as ASCII. The name is in lower case.
fn holds_ascii(charset: &[u8]) -> bool {
    let digits_after = |prefix: &str, most: usize| {
        let digits = charset.strip_prefix(prefix.as_bytes()).unwrap_or_default();
        (1..=most).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit)
    };
    matches!(charset, b"utf-8" | b"utf8" | b"us-ascii" | b"ascii" | b"latin1")
        || digits_after("iso-8859-", 2)
        || digits_after("windows-125", 1)
        || digits_after("cp125", 1)
}
