//! Bodies: what tollgate lets pass, no reader finds a token in.

use crate::heads::body_rules;
use crate::spellings::{decoded, pairs, reads_as};
use bytes::Bytes;
use futures_util::FutureExt as _;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use tollgate::request::body::{BodyFault, BodyHead, BodyScanner};

/// What a body may not name, in a POST.
const FORBIDDEN: [&[u8]; 6] = [b"private_token", b"sudo", b"access_token", b"bearer_token", b"job_token", b"_method"];

/// From this length on, form names are judged by what follows their padding.
const LONG_NAME: usize = 256;

fn scanned(content_type: Option<&[u8]>, body: &[u8], size: usize) -> Result<(), BodyFault> {
    let head = BodyHead { content_type, coded: false, is_post: true, lists: false };
    let (mut scanner, _) = BodyScanner::new(&head, body_rules());
    body.chunks(size.max(1)).try_for_each(|piece| scanner.feed(piece))?;
    scanner.finish()
}

/// The verdict, which must not depend on where the pieces end.
fn verdict(content_type: Option<&[u8]>, body: &[u8], size: u8) -> Result<(), BodyFault> {
    let whole = scanned(content_type, body, body.len());
    for size in [1, usize::from(size)] {
        assert_eq!(scanned(content_type, body, size).is_ok(), whole.is_ok(), "in pieces of {size}");
    }
    whole
}

fn is_forbidden(name: &[u8]) -> bool {
    FORBIDDEN.iter().any(|known| reads_as(name, known))
}

pub fn form(data: &[u8]) {
    let Some((size, body)) = data.split_first() else { return };
    let verdict = verdict(Some(b"application/x-www-form-urlencoded"), body, *size);
    let found = pairs(body).any(|pair| is_forbidden(&decoded(pair).0));
    let by_the_crate = form_urlencoded::parse(body).any(|(name, _)| is_forbidden(name.as_bytes()));
    match verdict {
        Ok(()) => assert!(!found && !by_the_crate, "a reader finds what passed"),
        // It may be JSON as well, to some. Of a name longer than any, single bytes of a byte order mark are passed over too.
        Err(BodyFault::Field(_)) if !body.contains(&b'{') && !pairs(body).any(|pair| pair.len() >= LONG_NAME) => {
            assert!(found, "no reader finds what was refused");
        }
        Err(_) => {}
    }
}

/// The names of the fields, by another author's reader. `Err`: not a whole body.
fn names_by_multer(body: &[u8], boundary: &str) -> Result<Vec<String>, String> {
    let stream = futures_util::stream::iter([Ok::<_, std::io::Error>(Bytes::copy_from_slice(body))]);
    let mut fields = multer::Multipart::new(stream, boundary);
    let mut names = Vec::new();
    loop {
        match fields.next_field().now_or_never() {
            Some(Ok(Some(field))) => names.extend(field.name().map(str::to_owned)),
            Some(Ok(None)) => return Ok(names),
            Some(Err(error)) => return Err(error.to_string()),
            None => return Err("it waits for more".into()),
        }
    }
}

pub fn multipart(data: &[u8]) {
    let Some((size, body)) = data.split_first() else { return };
    let verdict = verdict(Some(b"multipart/form-data; boundary=bb"), body, *size);
    if verdict.is_err() || body.is_empty() {
        return;
    }
    let names = names_by_multer(body, "bb");
    match &names {
        Ok(names) => {
            assert!(!names.iter().any(|name| is_forbidden(name.as_bytes())), "multer finds a field: {names:?}")
        }
        Err(why) => assert!(is_stricter(body, why), "multer does not read it: {why}"),
    }
    // A reader that trusts nothing but the delimiter at the beginning of a line, the field's name wherever it stands in one, as
    // Rack does, and `name="` behind a blank.
    let text = [b"\r\n", body].concat();
    for part in find_all(&text, b"\r\n--bb").skip(1) {
        let head_end = part.windows(4).position(|four| four == b"\r\n\r\n").unwrap_or(part.len());
        for line in find_all(&part[..head_end], b"\r\n") {
            let lower = line.to_ascii_lowercase();
            if positions(&lower, b"content-disposition").next().is_none() {
                continue;
            }
            for at in positions(&lower, b"; name=\"") {
                let name = line[at + 8..].split(|b| *b == b'"').next().unwrap_or_default();
                assert!(!is_forbidden(name), "a part is named {}", String::from_utf8_lossy(name));
            }
        }
    }
}

/// What multer alone refuses: heads that are no UTF-8 or that httparse refuses.
fn is_stricter(body: &[u8], why: &str) -> bool {
    !body.is_ascii() || why.contains("header") || body.iter().any(|b| matches!(b, 0..=8 | 11 | 12 | 14..=31 | 127))
}

fn positions<'a>(text: &'a [u8], word: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
    (0..text.len()).filter(move |at| text[*at..].starts_with(word))
}

fn find_all<'a>(text: &'a [u8], separator: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
    let mut starts: Vec<usize> = positions(text, separator).map(|at| at + separator.len()).collect();
    starts.insert(0, 0);
    let ends: Vec<usize> = starts.iter().skip(1).map(|at| at - separator.len()).chain([text.len()]).collect();
    starts.into_iter().zip(ends).map(move |(start, end)| &text[start..end])
}

/// The keys of an object, all of them, in their order.
struct Keys(Vec<String>);

impl<'de> Deserialize<'de> for Keys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Keys;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Keys, A::Error> {
                let mut keys = Vec::new();
                while let Some((key, IgnoredAny)) = map.next_entry::<String, IgnoredAny>()? {
                    keys.push(key);
                }
                Ok(Keys(keys))
            }
        }
        deserializer.deserialize_map(Read)
    }
}

pub fn json(data: &[u8]) {
    let Some(([kind, size], body)) = data.split_first_chunk::<2>() else { return };
    let types: [Option<&[u8]>; 6] = [
        Some(b"application/json"),
        None,
        Some(b"text/plain"),
        Some(b"application/octet-stream"),
        Some(b"application/x-www-form-urlencoded"),
        Some(b"application/vnd.api+json; charset=utf-8"),
    ];
    let content_type = types[usize::from(*kind) % types.len()];
    let verdict = verdict(content_type, body, *size);
    if let Ok(Keys(keys)) = serde_json::from_slice(body) {
        let in_any_case = |key: &String| is_forbidden(key.as_bytes()) || key.eq_ignore_ascii_case("private_token");
        let found = keys.iter().any(in_any_case);
        match verdict {
            Ok(()) => assert!(!found, "serde_json finds what passed: {keys:?}"),
            // Keys of inner objects matter where a body may be cut, and a form is read as one too.
            Err(BodyFault::Field(_)) if content_type == Some(b"application/json") => {
                assert!(
                    found || keys.iter().any(|key| !key.is_ascii()),
                    "serde_json does not find what was refused: {keys:?}"
                );
            }
            Err(_) => {}
        }
    }
    let claimed = content_type.is_some_and(|value| value.ends_with(b"json") || value.ends_with(b"utf-8"));
    if claimed && verdict.is_ok() && std::str::from_utf8(body).is_ok_and(|text| !text.trim().is_empty()) {
        let read = serde_json::from_slice::<IgnoredAny>(body);
        let text = String::from_utf8_lossy(body);
        // Words that Ruby and Python read as numbers, comments that Ruby skips, control bytes that some read. What is escaped
        // in a value is not looked at: a text that ends within `\\u12` passes.
        let lenient = ["NaN", "Infinity", "/", "\\u"].iter().any(|word| text.contains(word));
        if let Err(error) = read {
            let within = ["control character", "escape", "surrogate", "recursion", "number out of range"];
            let allowed = lenient || within.iter().any(|what| error.to_string().contains(what));
            assert!(allowed, "serde_json does not read what passed: {error}");
        }
    }
}
