//! A query, as a backend gets it: no token, page numbers within bounds, and nothing else changed.

use crate::heads::SETTINGS;
use crate::spellings::{decoded, pairs, reads_as};
use std::sync::LazyLock;
use tollgate::request::{Rules, examine, head, target};

const TOKEN: &str = "good-token-0001";
/// The names that are taken out, changed or refused.
const KNOWN: [&[u8]; 8] =
    [b"private_token", b"page", b"per_page", b"sudo", b"access_token", b"bearer_token", b"job_token", b"_method"];

/// With missing page parameters added.
static WITH_DEFAULTS: LazyLock<Rules> = LazyLock::new(|| {
    let mut rules = SETTINGS.rules.clone();
    rules.pagination.default.inject_defaults = true;
    rules
});

fn is_known(pair: &[u8]) -> bool {
    KNOWN.iter().any(|known| reads_as(&decoded(pair).0, known))
}

fn head_of(target: &[u8], token: bool) -> Vec<u8> {
    let mut head = b"GET ".to_vec();
    head.extend_from_slice(target);
    head.extend_from_slice(b" HTTP/1.1\r\nHost: h\r\n");
    if token {
        head.extend_from_slice(format!("PRIVATE-TOKEN: {TOKEN}\r\n").as_bytes());
    }
    head.extend_from_slice(b"\r\n");
    head
}

/// The number that readers take a pair of this name for. A reader that splits at `&` alone may see none where others see one.
fn number(query: &[u8], known: &[u8]) -> Option<u64> {
    let read = |separators: &[u8]| -> Option<u64> {
        let pairs = query.split(|b| separators.contains(b)).map(decoded);
        let values: Vec<Vec<u8>> = pairs.filter(|(name, _)| reads_as(name, known)).map(|(_, value)| value).collect();
        assert!(values.len() <= 1, "{} stands there twice", String::from_utf8_lossy(known));
        let value = String::from_utf8(values.into_iter().next()?).expect("a value of bytes");
        let number: u64 = value.parse().expect("no number");
        assert_eq!(number.to_string(), value, "no plain number");
        Some(number)
    };
    let (narrow, wide) = (read(b"&;"), read(b"&"));
    assert!(wide.is_none() || wide == narrow, "readers see different numbers of {}", String::from_utf8_lossy(known));
    narrow
}

pub fn edited(data: &[u8]) {
    let Some((options, query)) = data.split_first() else { return };
    let token = options & 1 == 0;
    let mut line = b"/api/v3/projects?".to_vec();
    line.extend_from_slice(query);
    if target::check(&line).is_err() {
        return;
    }
    let bytes = head_of(&line, token);
    let Ok(view) = head::parse(&bytes) else { return };
    let rules = if options & 2 == 0 { &SETTINGS.rules } else { &*WITH_DEFAULTS };
    let Ok(examined) = examine(&view, rules) else { return };
    let presented = examined.presented.as_ref().expect("no token, and not refused");
    // Whoever reads the query decodes the one token that was judged.
    for pair in pairs(query) {
        let (name, value) = decoded(pair);
        assert!(!reads_as(&name, b"private_token") || value == *presented.value, "another token passes");
    }
    assert!(!token || *presented.value == *TOKEN.as_bytes(), "not the token of the header");

    let mut out = Vec::new();
    examined.edits.write_target(view.path(), view.query(), &mut out);
    target::check(&out).expect("an illegal target was written");
    let written = out.strip_prefix(b"/api/v3/projects").expect("another path");
    let written = written.strip_prefix(b"?").unwrap_or(written);
    for pair in pairs(written) {
        assert!(!reads_as(&decoded(pair).0, b"private_token"), "a token is left");
    }
    // The same by a reader of another author.
    for (name, _) in form_urlencoded::parse(written) {
        assert_ne!(name, "private_token", "a token is left");
    }
    assert!(number(written, b"per_page").is_none_or(|number| (1..=100).contains(&number)), "per_page is out of bounds");
    assert!(
        number(written, b"page").is_none_or(|number| (1..=i32::MAX as u64).contains(&number)),
        "page is out of bounds"
    );
    let others = |query: &[u8]| -> Vec<Vec<u8>> {
        let pairs = query.split(|b| matches!(b, b'&' | b';'));
        pairs.filter(|pair| !pair.is_empty() && !is_known(pair)).map(<[u8]>::to_vec).collect()
    };
    assert_eq!(others(written), others(query), "another pair was changed");

    let bytes = head_of(&out, true);
    let view = head::parse(&bytes).expect("what was written cannot be read");
    let again = examine(&view, rules).expect("what was written is refused");
    assert!(again.edits.is_empty(), "what was written changes again");
}
