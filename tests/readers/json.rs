//! JSON, and what some parser accepts as JSON: comments, byte order marks, unquoted names, several documents,
//! duplicates, wide characters.

use super::encode;
use super::names;
use super::random::Random;

/// A document, mostly an object with a watched name in it.
pub fn document(random: &mut Random) -> Vec<u8> {
    let mut out = Vec::new();
    let mut gap = Gap { comments: random.odd() };
    if random.odd() {
        let front: &[u8] = random.pick(&[
            &b"\xef\xbb\xbf"[..],
            b"\x1e",
            b"\0",
            b"\x0b",
            b"\x0c",
            b"\xc2\xa0",
            b" \r\n\t",
            b"\n\n",
            b",",
            b"\xff\xfe",
            b")]}',\n",
            b"while(1);",
            b"for(;;);",
            b"x=",
            b"#\n",
            b"--\n",
            b"null\n",
            b"0",
            b"\"\"",
            b"[]\n",
            b"/**/",
            b"//\n",
            b"<!-- -->",
        ]);
        out.extend(front);
    }
    gap.write(&mut out, random);
    match random.below(24) {
        0 => {
            out.extend(b"[");
            object(&mut out, &mut gap, random);
            out.extend(b"]");
        }
        1 => out.extend_from_slice(random.pick(&[
            &b"null"[..],
            b"true",
            b"1",
            b"\"private_token\"",
            b"[]",
            b"{}",
            b"",
            b"NaN",
            b"[\"private_token\",\"x\"]",
            b"{\"a\":{\"private_token\":1}}",
        ])),
        2 => {
            object(&mut out, &mut gap, random);
            out.extend_from_slice(random.pick(&[&b""[..], b"\n", b",", b" ", b"\0", b"/"]));
            object(&mut out, &mut gap, random);
        }
        _ => object(&mut out, &mut gap, random),
    }
    gap.write(&mut out, random);
    if random.odd() {
        out.extend_from_slice(random.pick(&[
            &b"\n"[..],
            b"\0",
            b";",
            b"}",
            b"]",
            b",",
            b"x",
            b"//",
            b"/*",
            b"\x1a",
            b"\xff",
        ]));
    }
    if random.odd() && random.one_in(3) {
        let cut = random.below(out.len() + 1);
        out.truncate(cut);
    }
    if random.one_in(60) || random.odd() && random.one_in(4) {
        let charset = random.pick(&["utf-16le", "utf-16be", "utf-32le", "utf-16", "utf-7", "utf-8-sig"]);
        return encode::in_charset(&out, charset, random);
    }
    out
}

/// Blanks between tokens, and comments if this document has any.
struct Gap {
    comments: bool,
}

impl Gap {
    fn write(&mut self, out: &mut Vec<u8>, random: &mut Random) {
        if random.one_in(6) {
            out.extend_from_slice(random.pick(&[&b" "[..], b"\n", b"\r\n", b"\t", b"  "]));
        }
        if self.comments && random.one_in(4) {
            let comment: &[u8] = random.pick(&[
                &b"/**/"[..],
                b"/*\"*/",
                b"/*{*/",
                b"/*}*/",
                b"/* // */",
                b"//\n",
                b"//\"\n",
                b"// */\n",
                b"//\r",
                b"/***/",
                b"/*/*/",
                b"/*\n*/",
                b"#\n",
                b"/",
                b"/*",
                b"//}\n",
                b"/*\\*/",
            ]);
            out.extend(comment);
        }
        if random.odd() && random.one_in(4) {
            out.extend_from_slice(random.pick(&[
                &b"\x0b"[..],
                b"\x0c",
                b"\0",
                b"\xc2\xa0",
                b"\xe2\x80\xa8",
                b"\xef\xbb\xbf",
                b"\x08",
            ]));
        }
    }
}

fn object(out: &mut Vec<u8>, gap: &mut Gap, random: &mut Random) {
    out.push(b'{');
    let count = 1 + random.below(4);
    let special = random.below(count + 1);
    for index in 0..count {
        if index > 0 || random.odd() && random.one_in(6) {
            out.extend_from_slice(random.usually(b",", &[b",,", b";", b"", b"\n", b":", b"}{", b"},{"]));
        }
        gap.write(out, random);
        let name =
            if index == special { names::decoded(random) } else { random.pick(&["a", "title", "b", "x y", ""]).into() };
        key(out, &name, random);
        gap.write(out, random);
        out.extend_from_slice(random.usually(b":", &[b"=>", b"=", b"::", b"", b": :"]));
        gap.write(out, random);
        if index == special {
            let value = names::value(&name, random);
            match random.below(10) {
                0 => out.extend(format!("[\"{value}\"]").into_bytes()),
                1 => out.extend(format!("{{\"x\":\"{value}\"}}").into_bytes()),
                2 => out.extend_from_slice(random.pick(&[&b"null"[..], b"1", b"9999", b"true", b"-1e9", b"\"\""])),
                _ => out.extend(format!("\"{value}\"").into_bytes()),
            }
        } else {
            plain_value(out, 0, random);
        }
        gap.write(out, random);
    }
    if random.odd() && random.one_in(3) {
        out.extend_from_slice(random.pick(&[&b","[..], b"", b"]", b"}}"]));
    }
    out.push(b'}');
}

/// A name as a JSON string, or as something that some parser accepts as one.
fn key(out: &mut Vec<u8>, name: &[u8], random: &mut Random) {
    let quote: &[u8] = random.usually(b"\"", &[b"'", b"", b"`", b"\\\""]);
    out.extend(quote);
    let escape = random.pick(&[0, 0, 0, 0, 3, 1]);
    for byte in name {
        match byte {
            b'"' | b'\\' => out.extend([b'\\', *byte]),
            0..=0x1f if !random.one_in(3) => out.extend(format!("\\u{byte:04x}").into_bytes()),
            b'a'..=b'z' | b'_' if escape > 0 && random.one_in(escape) => match random.below(12) {
                0 => out.extend(format!("\\u{byte:04X}").into_bytes()),
                1 if random.odd() => out.extend(format!("\\x{byte:02x}").into_bytes()),
                2 if random.odd() => out.extend(format!("\\U0000{byte:04x}").into_bytes()),
                3 if random.odd() => out.extend([b'\\', *byte]),
                4 if random.odd() => out.extend(format!("\\u{{{byte:x}}}").into_bytes()),
                5 if random.odd() => out.extend(format!("\\{byte:03o}").into_bytes()),
                _ => out.extend(format!("\\u{byte:04x}").into_bytes()),
            },
            _ => out.push(*byte),
        }
    }
    if random.odd() && random.one_in(3) {
        let tail: &[u8] =
            random.pick(&[&b"\\u0000"[..], b"\\ud800", b"\\", b"\\u00", b"\\ud83d\\ude00", b"\n", b"\\\n", b"\xff"]);
        out.extend(tail);
    }
    out.extend(quote);
}

fn plain_value(out: &mut Vec<u8>, depth: usize, random: &mut Random) {
    let odd: &[&[u8]] = &[
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"01",
        b"+1",
        b".5",
        b"1.",
        b"0x10",
        b"1e",
        b"undefined",
        b"'x'",
        b"\"\\\"",
        b"\"\\\\\"",
        b"\"\\\\\\\"\"",
        b"\"\n\"",
        b"\"\\u12\"",
        b"\"\xff\"",
        b"\"\\'\"",
        b"\"//\"",
        b"\"/*\"",
        b"nul",
        b"new Date()",
        b"/x/",
        b"",
        b"\"a\" \"b\"",
        b"\"\\ud800\"",
        b"\"\0\"",
        b"}",
        b"]",
        b"[}",
        b"{]",
    ];
    if random.odd() {
        return out.extend_from_slice(random.pick(odd));
    }
    match random.below(9) {
        0 => out.extend(b"1"),
        1 => out.extend(b"-1.5e+3"),
        2 => out.extend(b"true"),
        3 => out.extend(b"null"),
        4 if depth < 3 => {
            out.push(b'[');
            plain_value(out, depth + 1, random);
            out.push(b']');
        }
        5 if depth < 3 => {
            out.extend_from_slice(random.pick(&[&b"{\"k\":"[..], b"{\"private_token\":"]));
            plain_value(out, depth + 1, random);
            out.push(b'}');
        }
        6 if random.one_in(40) => {
            let levels = 90 + random.below(500);
            out.extend(b"[".repeat(levels));
            out.extend(b"]".repeat(levels));
        }
        7 if random.one_in(60) => {
            out.push(b'"');
            out.extend(b"x".repeat(5_000 + random.below(70_000)));
            out.push(b'"');
        }
        _ => out.extend_from_slice(random.pick(&[
            &b"\"x\""[..],
            b"\"\"",
            b"\"private_token\"",
            b"\"{\\\"private_token\\\":1}\"",
            b"\"\xc3\xa4\"",
        ])),
    }
}
