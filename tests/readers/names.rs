//! Spellings of watched parameter names that one parser may read and another may miss. Names are generated in decoded
//! form and then encoded for their place, so that every variation occurs in every place.

use super::random::Random;
use crate::harness::{BAD, OTHER};

/// The watched names, by weight.
const WATCHED: &[&str] = &[
    "private_token",
    "private_token",
    "private_token",
    "private_token",
    "private_token",
    "sudo",
    "_method",
    "_method",
    "access_token",
    "bearer_token",
    "job_token",
    "page",
    "per_page",
    "per_page",
];

/// Bytes that some parser strips, cuts at, folds or uses as a separator.
const PIECES: &[&[u8]] = &[
    b" ",
    b"\t",
    b"\n",
    b"\r",
    b"\x0b",
    b"\x0c",
    b"\0",
    b"\x00100abc",
    b"\x01",
    b"\x1f",
    b"\x7f",
    b"[",
    b"]",
    b"[]",
    b"[x]",
    b"[0]",
    b"][",
    b".",
    b"-",
    b"_",
    b"+",
    b"'",
    b"\"",
    b"\\",
    b"/",
    b":",
    b"*",
    b"%",
    b"%20",
    b"%00",
    b"%5f",
    b"&",
    b"=",
    b";",
    b",",
    b"\xc2\xa0",
    b"\xef\xbb\xbf",
    b"\xe3\x80\x80",
    b"\xc2\x85",
    b"\xe2\x80\xa8",
    b"\xe2\x80\x8b",
    b"\xc2\xad",
    b"\xff",
    b"\xa0",
    b"\xe0",
    b"\xc1\x9f",
];

pub fn watched(random: &mut Random) -> &'static str {
    random.pick(WATCHED)
}

/// A watched name, or a variation of it.
pub fn decoded(random: &mut Random) -> Vec<u8> {
    let mut name = watched(random).as_bytes().to_vec();
    let changes = [0, 0, 0, 0, 1, 1, 1, 1, 1, 2][random.below(10)];
    for _ in 0..changes {
        change(&mut name, random);
    }
    name
}

fn change(name: &mut Vec<u8>, random: &mut Random) {
    let place = random.below(name.len() + 1);
    let at = random.pick(&[0, name.len(), name.len(), place]);
    match random.below(12) {
        0..=4 => drop(name.splice(at..at, random.pick(PIECES).iter().copied())),
        5 => {
            if let Some(underscore) = name.iter().position(|b| *b == b'_') {
                let with: &[u8] = random.pick(&[
                    &b"."[..],
                    b" ",
                    b"[",
                    b"+",
                    b"-",
                    b"]",
                    b"\t",
                    b"\0",
                    b"%5f",
                    b"__",
                    b"\xef\xbc\xbf",
                ]);
                name.splice(underscore..=underscore, with.iter().copied());
            }
        }
        6 => name.make_ascii_uppercase(),
        7 => name.iter_mut().for_each(|b| {
            if random.one_in(3) {
                b.make_ascii_uppercase();
            }
        }),
        8 => {
            let whole = String::from_utf8_lossy(name).into_owned();
            let wrapped = match random.below(8) {
                0 => format!("[{whole}]"),
                1 => format!("x[{whole}]"),
                2 => format!("[{whole}"),
                3 => format!("{whole}]"),
                4 => format!("'{whole}'"),
                5 => format!("\"{whole}\""),
                6 => format!("<{whole}>"),
                _ => format!("x&{whole}"),
            };
            *name = wrapped.into_bytes();
        }
        // U+017F and U+212A fold to these letters.
        9 => {
            let text = String::from_utf8_lossy(name).replacen('s', "\u{17f}", 1).replacen('k', "\u{212a}", 1);
            *name = text.into_bytes();
        }
        10 if !name.is_empty() => drop(name.remove(at.min(name.len() - 1))),
        _ => name.extend(random.pick(&[&b"[]"[..], b"[x]", b"[x][y]", b"[", b"[]x", b"\0x", b"=1"])),
    }
}

/// A value for a watched name.
pub fn value(name: &[u8], random: &mut Random) -> String {
    let lower = String::from_utf8_lossy(name).to_ascii_lowercase();
    if lower.contains("page") {
        random.pick(NUMBERS).to_owned()
    } else if lower.contains("method") {
        random.pick(&["DELETE", "PUT", "delete", "PATCH"]).to_owned()
    } else if lower.contains("sudo") {
        "root".into()
    } else {
        random.pick(&[OTHER, BAD, BAD]).to_owned()
    }
}

/// Encodes a name or a value for a query or a form.
pub fn form_encoded(bytes: &[u8], in_query: bool, random: &mut Random) -> Vec<u8> {
    let mut out = Vec::new();
    let raw_brackets = random.one_in(2);
    let often = if random.one_in(4) { 4 } else { 60 };
    for byte in bytes {
        let raw = match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' | b'.' | b'*' => !random.one_in(often),
            b'[' | b']' => raw_brackets,
            b' ' if random.one_in(2) => {
                out.push(b'+');
                continue;
            }
            b'\'' | b':' | b'/' | b',' | b'!' | b'~' => random.one_in(2),
            b'&' | b'=' | b'%' | b'+' => random.one_in(20),
            b'#' | b';' => !in_query && random.one_in(2),
            _ => !in_query && random.one_in(3),
        };
        if raw {
            out.push(*byte);
        } else if random.one_in(2) {
            out.extend(format!("%{byte:02X}").into_bytes());
        } else {
            out.extend(format!("%{byte:02x}").into_bytes());
        }
    }
    if random.odd() {
        let at = random.below(out.len() + 1);
        out.splice(at..at, random.pick(&[&b"%"[..], b"%0", b"%zz", b"%u005f", b"%%", b"%C3", b"%00"]).iter().copied());
    }
    out
}

/// Names in a query that Rack reads as the token, or variations of them.
pub const TOKEN_KEYS: &[&str] = &[
    "private_token",
    "private_token",
    "private_token",
    "%70rivate_token",
    "private%5Ftoken",
    "private%5ftoken",
    "[private_token]",
    "[private_token",
    "private_token]",
    "]private_token",
    "[[private_token]]",
    "%5Bprivate_token%5D",
    "private_token[]",
    "private_token[x]",
    "private_token[",
    "private_token[]x",
    "private_token%5B%5D",
    "+private_token",
    "private_token+",
    "%20private_token",
    "%09private_token",
    "private_token%0a",
    "private_token%00",
    "private_token%00100abc",
    "private.token",
    "private+token",
    "private[token",
];

/// Similar names: different parameters to every parser, forwarded unchanged.
pub const OTHER_KEYS: &[&str] = &[
    "PRIVATE_TOKEN",
    "Private_Token",
    "private-token",
    "private_token.x",
    "private%255Ftoken",
    "?private_token",
    "private_token%3D",
    "%26private_token",
    "x%3Bprivate_token",
    "xprivate_token",
    "private_tokens",
    "private__token",
    "+[private_token]",
    "%20[private_token",
    "private%C2%A0_token",
    "token",
];

pub const PAGE_KEYS: &[&str] = &[
    "page",
    "page",
    "page",
    "per_page",
    "per_page",
    "per_page",
    "per%5Fpage",
    "%70age",
    "[page]",
    "[per_page]",
    "per_page]",
    "page]",
    "page[]",
    "per_page[]",
    "per_page[x]",
    "page[x][y]",
    "page[",
    "per_page[",
    "+page",
    "per_page+",
    "per_page%00",
    "per_page%00x",
    "per.page",
    "per+page",
    "per[page",
    "Per_Page",
    "per-page",
    "PAGE",
];

pub const NUMBERS: &[&str] = &[
    "0",
    "1",
    "2",
    "20",
    "99",
    "100",
    "101",
    "5000",
    "-1",
    "-100",
    "+5",
    "%2B5",
    "%2b500",
    "%205",
    "%20500",
    "+500",
    "%0a7",
    "%0b700",
    "%0c700",
    "%00700",
    "%A0700",
    "%C2%A0700",
    "5abc",
    "500abc",
    "abc",
    "",
    "1e9",
    "0x10",
    "010",
    "0500",
    "1_0",
    "1_000",
    "1__000",
    "_5",
    "500_",
    "5.9",
    "500.0",
    "2147483647",
    "2147483648",
    "4294967297",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775809",
    "999999999999999999999999999999",
    "%31%30%31",
    "%EF%BC%95",
    "%D9%A5",
    "%ff",
    "100%20",
    "100,5",
    "100=5",
    "--5",
    "-0",
    "5%26per_page",
    "[5]",
];
