//! Bodies in the charsets and codings that some application decodes: as much of each as ASCII names, JSON and forms
//! need.

use super::random::Random;
use base64::Engine as _;

/// Charsets to declare for a body, by weight; not all of them change its bytes.
pub const CHARSETS: &[&str] = &[
    "utf-7",
    "utf-7",
    "UTF-7",
    "utf-16",
    "utf-16",
    "utf-16le",
    "utf-16be",
    "utf-32",
    "utf-32le",
    "utf8",
    "UTF_8",
    "utf-8-sig",
    "iso-8859-1",
    "latin1",
    "windows-1252",
    "us-ascii",
    "cp037",
    "cp037",
    "ebcdic-cp-us",
    "unicode_escape",
    "raw_unicode_escape",
    "punycode",
    "idna",
    "hz",
    "iso-2022-jp",
    "shift_jis",
    "gbk",
    "big5",
    "rot13",
    "hex",
    "x",
    "",
];

/// A text in a charset; unchanged if the charset is a superset of ASCII.
pub fn in_charset(text: &[u8], charset: &str, random: &mut Random) -> Vec<u8> {
    let wide =
        |unit: fn(u8) -> Vec<u8>, mark: &[u8]| [mark.to_vec(), text.iter().flat_map(|b| unit(*b)).collect()].concat();
    let marked = random.one_in(2);
    match charset.to_ascii_lowercase().as_str() {
        "utf-7" => utf7(text, random),
        "utf-16" | "utf-16le" => wide(|b| vec![b, 0], if marked { b"\xff\xfe" } else { b"" }),
        "utf-16be" => wide(|b| vec![0, b], if marked { b"\xfe\xff" } else { b"" }),
        "utf-32" | "utf-32le" => wide(|b| vec![b, 0, 0, 0], if marked { b"\xff\xfe\0\0" } else { b"" }),
        "utf-8-sig" => [b"\xef\xbb\xbf", text].concat(),
        "cp037" | "ebcdic-cp-us" => text.iter().map(|b| ebcdic(*b)).collect(),
        "unicode_escape" | "raw_unicode_escape" => {
            let piece = |b: &u8| if *b == b'_' { b"\\u005f".to_vec() } else { vec![*b] };
            text.iter().flat_map(piece).collect()
        }
        "hex" => text.iter().flat_map(|b| format!("{b:02x}").into_bytes()).collect(),
        _ => text.to_vec(),
    }
}

/// Some letters in modified base64, the underscores always.
fn utf7(text: &[u8], random: &mut Random) -> Vec<u8> {
    let mut out = Vec::new();
    for byte in text {
        if *byte == b'_' || (byte.is_ascii_alphabetic() && random.one_in(20)) {
            let code = base64::engine::general_purpose::STANDARD_NO_PAD.encode([0, *byte]);
            out.extend(format!("+{code}-").into_bytes());
        } else {
            out.push(*byte);
        }
    }
    out
}

fn ebcdic(byte: u8) -> u8 {
    match byte {
        b'a'..=b'i' => byte - b'a' + 0x81,
        b'j'..=b'r' => byte - b'j' + 0x91,
        b's'..=b'z' => byte - b's' + 0xa2,
        b'A'..=b'I' => byte - b'A' + 0xc1,
        b'J'..=b'R' => byte - b'J' + 0xd1,
        b'S'..=b'Z' => byte - b'S' + 0xe2,
        b'0'..=b'9' => byte - b'0' + 0xf0,
        b'_' => 0x6d,
        b'=' => 0x7e,
        b'&' => 0x50,
        b'"' => 0x7f,
        b'{' => 0xc0,
        b'}' => 0xd0,
        b':' => 0x7a,
        b',' => 0x6b,
        b'-' => 0x60,
        b' ' => 0x40,
        other => other,
    }
}

/// A gzip file with one stored block.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = b"\x1f\x8b\x08\0\0\0\0\0\0\xff".to_vec();
    stored(bytes, &mut out);
    let mut crc = !0_u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        }
    }
    out.extend((!crc).to_le_bytes());
    out.extend((bytes.len() as u32).to_le_bytes());
    out
}

/// A zlib stream with one stored block, which HTTP calls deflate.
pub fn deflate(bytes: &[u8]) -> Vec<u8> {
    let mut out = b"\x78\x01".to_vec();
    stored(bytes, &mut out);
    let (mut a, mut b) = (1_u32, 0_u32);
    for byte in bytes {
        a = (a + u32::from(*byte)) % 65521;
        b = (b + a) % 65521;
    }
    out.extend(((b << 16) | a).to_be_bytes());
    out
}

fn stored(bytes: &[u8], out: &mut Vec<u8>) {
    let mut pieces = bytes.chunks(60_000).peekable();
    if pieces.peek().is_none() {
        out.extend(b"\x01\0\0\xff\xff");
    }
    while let Some(piece) = pieces.next() {
        let length = piece.len() as u16;
        out.push(u8::from(pieces.peek().is_none()));
        out.extend(length.to_le_bytes());
        out.extend((!length).to_le_bytes());
        out.extend(piece);
    }
}
