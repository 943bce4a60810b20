//! Multipart bodies: parts that name a field in every way that some parser accepts, and boundaries that parsers extract
//! differently from the type.

use super::names;
use super::random::Random;

pub fn boundary(random: &mut Random) -> Vec<u8> {
    let plain: &[&[u8]] = &[
        b"B",
        b"XX",
        b"----WebKitFormBoundaryAbC123",
        b"------------------------4ebf00fbcf09",
        b"aB",
        b"9051914041544843365972754266",
    ];
    let odd: &[&[u8]] = &[
        b"a b",
        b" B",
        b"B ",
        b"B\tC",
        b"a;b",
        b"a,b",
        b"a\"b",
        b"a\\b",
        b"'B'",
        b"*****",
        b"===B===",
        b"a=b",
        b"a/b:c?d",
        b"(a)",
        b"<a>",
        b"a@b",
        b"--",
        b"-",
        b"",
        b"\xc3\xa4",
        b"%41",
        b"a+b_c.d",
        b"boundary=B",
        b"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    ];
    let usual = random.pick(plain);
    random.usually(usual, odd).to_vec()
}

/// The Content-Type for a boundary, or a variation of it.
pub fn content_type(boundary: &[u8], random: &mut Random) -> Vec<u8> {
    let kind = random.usually(
        "multipart/form-data",
        &[
            "multipart/mixed",
            "multipart/related",
            "Multipart/form-data",
            "multipart/form-data,",
            "multipart/x",
            "multipart/alternative",
            "multipart",
        ],
    );
    let b = String::from_utf8_lossy(boundary).into_owned();
    let needs_quotes = !boundary.iter().all(|c| c.is_ascii_alphanumeric() || b"'+_.-=*".contains(c));
    let usual =
        if needs_quotes && !random.one_in(3) { format!("; boundary=\"{b}\"") } else { format!("; boundary={b}") };
    let parameter = if !random.odd() {
        usual
    } else {
        match random.below(26) {
            0 => format!("; boundary=\"{b}\""),
            1 => format!("; Boundary={b}"),
            2 => format!("; BOUNDARY={b}"),
            3 => format!("; boundary ={b}"),
            4 => format!("; boundary= {b}"),
            5 => format!("; boundary=\" {b}\""),
            6 => format!("; boundary=\"{b} \""),
            7 => format!("; boundary*=utf-8''{b}"),
            8 => format!("; boundary*0={b}"),
            9 => format!("; boundary*0={b}; boundary*1=x"),
            10 => format!("; boundary=x; boundary={b}"),
            11 => format!("; boundary={b}; boundary=x"),
            12 => format!(", boundary={b}"),
            13 => format!(" boundary={b}"),
            14 => format!(";boundary={b}"),
            15 => format!("; boundary='{b}'"),
            16 => format!("; boundary=\"{b}"),
            17 => format!("; boundary={b}\""),
            18 => format!("; x=\"; boundary=x\"; boundary={b}"),
            19 => format!("; x=\"; boundary={b}\"; boundary=x"),
            20 => format!("; xboundary=x; boundary={b}"),
            21 => format!("; boundary=\"\\{b}\""),
            22 => format!("; charset=utf-8; boundary={b}"),
            23 => format!("; boundary={b}; charset=utf-8"),
            24 => String::new(),
            _ => format!(";; boundary={b}"),
        }
    };
    [kind.as_bytes(), parameter.as_bytes()].concat()
}

/// A body for a boundary. Sometimes the boundary itself is truncated, as some parser would do.
pub fn body(boundary: &[u8], random: &mut Random) -> Vec<u8> {
    let mut used = boundary.to_vec();
    if random.odd() {
        let cut = |at: Option<usize>, used: &mut Vec<u8>| used.truncate(at.unwrap_or(used.len()));
        match random.below(6) {
            0 => cut(used.iter().position(|b| b" ;,\"\t".contains(b)), &mut used),
            1 => used = used.trim_ascii().to_vec(),
            2 => used.make_ascii_lowercase(),
            3 => used.retain(|b| *b != b'\\' && *b != b'"'),
            4 => used.retain(|b| *b != b'\''),
            _ => used = boundary.trim_ascii_start().to_vec(),
        }
    }
    let mut out = Vec::new();
    if random.odd() {
        let front: &[u8] = random.pick(&[
            &b"\r\n"[..],
            b"\n",
            b"preamble\r\n",
            b"preamble",
            b"\r\n\r\n",
            b"--x\r\n",
            b"Content-Disposition: form-data; name=\"private_token\"\r\n\r\nx\r\n",
            b"{\"private_token\":\"x\"}\r\n",
            b"private_token=x&",
        ]);
        out.extend(front);
    }
    // Parts that only a parser that truncates the boundary finds.
    let cut = used.iter().position(|b| b" ;,\"\t()/:=?".contains(b)).filter(|at| *at > 0).map(|at| used[..at].to_vec());
    let mut hidden = cut.filter(|_| random.one_in(2)).map(|cut| {
        let part = b"\r\nContent-Disposition: form-data; name=\"private_token\"\r\n\r\nbad-token-9999\r\n--";
        [b"\r\n--", cut.as_slice(), part, &cut, b"--\r\n"].concat()
    });
    let line = Line { usual: random.usually(b"\r\n", &[b"\n", b"\r"]) };
    let count = 1 + random.below(3);
    let special = random.below(count + 1);
    for index in 0..count {
        delimiter(&mut out, &used, random);
        let name =
            if index == special { names::decoded(random) } else { random.pick(&["a", "title", "file", "l[]"]).into() };
        part(&mut out, &name, &line, &used, hidden.take(), random);
    }
    if !(random.odd() && random.one_in(2)) {
        out.extend(b"--");
        out.extend(&used);
        out.extend_from_slice(random.usually(
            b"--\r\n",
            &[b"--", b"--\r\n\r\n", b"--\n", b"", b"\r\n", b"-\r\n", b"-- \r\n", b"--x\r\n", b"--\0"],
        ));
    }
    if random.odd() {
        match random.below(4) {
            0 => out.extend(b"epilogue"),
            1 => out.extend(b"\r\nContent-Disposition: form-data; name=\"private_token\"\r\n\r\nx\r\n"),
            2 => out.extend(b"&private_token=x"),
            _ => {
                out.extend(b"--");
                out.extend(&used);
                out.extend(b"\r\nContent-Disposition: form-data; name=\"private_token\"\r\n\r\nbad-token-9999\r\n--");
                out.extend(&used);
                out.extend(b"--\r\n");
            }
        }
    }
    out
}

fn delimiter(out: &mut Vec<u8>, boundary: &[u8], random: &mut Random) {
    out.extend_from_slice(random.usually(b"--", &[b"-", b"---", b" --", b"--\t", b"x--"]));
    out.extend(boundary);
    out.extend_from_slice(random.usually(
        b"\r\n",
        &[b"\n", b" \r\n", b"\t\r\n", b"\r\r\n", b"x\r\n", b"--\r\n", b"\r", b"\0\r\n", b"\r\n\r\n", b""],
    ));
}

/// The usual line end of a part.
struct Line {
    usual: &'static [u8],
}

impl Line {
    fn end(&self, random: &mut Random) -> &'static [u8] {
        if random.odd() && random.one_in(4) {
            random.pick(&[b"\n", b"\r", b"\r\r\n", b"\n\r", b"\0\r\n", b" \r\n", b"\x0b"])
        } else {
            self.usual
        }
    }
}

fn part(out: &mut Vec<u8>, name: &[u8], line: &Line, boundary: &[u8], hidden: Option<Vec<u8>>, random: &mut Random) {
    let mut lines = Vec::new();
    if !(random.odd() && random.one_in(3)) {
        lines.push(disposition(name, line, random));
    }
    if random.one_in(4) {
        let value: &[u8] = random.usually(
            b"text/plain",
            &[
                b"private_token",
                b"application/json",
                b"text/plain; charset=utf-16",
                b"text/plain; charset=utf-7",
                b"multipart/mixed; boundary=C",
                b"null",
                b"",
                b"text/plain; name=\"private_token\"",
                b"message/rfc822",
                b"application/x-www-form-urlencoded",
                b"private_token[]",
            ],
        );
        lines.push([b"Content-Type: ", value].concat());
    }
    if random.odd() && random.one_in(2) {
        lines.push(extra_line(name, random));
    }
    if random.one_in(4) {
        lines.reverse();
    }
    for text in lines {
        out.extend(text);
        out.extend(line.end(random));
    }
    out.extend(line.end(random));
    match hidden {
        Some(hidden) => out.extend(hidden),
        None => content(out, name, boundary, random),
    }
    out.extend(line.end(random));
}

/// Lines that name the field instead of the disposition, or in addition to it.
fn extra_line(name: &[u8], random: &mut Random) -> Vec<u8> {
    let name = String::from_utf8_lossy(name).into_owned();
    let text = match random.below(18) {
        0 => format!("Content-ID: {name}"),
        1 => format!("Content-ID: <{name}>"),
        2 => format!("Content-Id:\r\n {name}"),
        3 => format!("Content-Disposition: form-data; name=\"{name}\""),
        4 => format!("X-Content-Disposition: form-data; name=\"{name}\""),
        5 => format!("X: Content-Disposition: form-data; name=\"{name}\""),
        6 => format!("Content-Disposition : form-data; name=\"{name}\""),
        7 => format!(" Content-Disposition: form-data; name=\"{name}\""),
        8 => format!("Content-Location: {name}"),
        9 => format!("Content-Description: x; name=\"{name}\""),
        10 => "Content-Transfer-Encoding: base64".into(),
        11 => "Content-Transfer-Encoding: quoted-printable".into(),
        12 => format!("name=\"{name}\""),
        13 => format!("Content-Type: x/y; name=\"{name}\""),
        14 => "Content-Length: 1".into(),
        15 => "no colon".into(),
        16 => ": x".into(),
        _ => format!("X-Y: {}", "y".repeat(random.pick(&[10, 5_000, 20_000]))),
    };
    text.into_bytes()
}

fn disposition(name: &[u8], line: &Line, random: &mut Random) -> Vec<u8> {
    let header = random.usually(
        "Content-Disposition: ",
        &[
            "content-disposition: ",
            "CONTENT-DISPOSITION:",
            "Content-Disposition:",
            "Content-Disposition : ",
            "Content-Disposition:\t",
            "Content-Disposition:\r\n ",
            "Content_Disposition: ",
            "Content-Disposition; ",
        ],
    );
    let kind = random.usually(
        "form-data",
        &[
            "attachment",
            "FORM-DATA",
            "form-data;",
            "",
            "mixed",
            "form data",
            "\"form-data\"",
            "form-data,",
            "x=\"; name=a\"",
        ],
    );
    let mut out = [header.as_bytes(), kind.as_bytes()].concat();
    let mut parameters = vec![name_parameter(name, random)];
    if random.one_in(3) {
        parameters.push(file_parameter(name, random));
    }
    if random.odd() {
        parameters.push(
            random
                .pick(&[
                    &b"size=12"[..],
                    b"modification-date=\"Fri, 27 Nov 2026 23:21:37 GMT\"",
                    b"x=y",
                    b"name=\"a\"",
                    b"name=a",
                    b"name=\"\"",
                    b"filename=\"\"",
                    b"name",
                    b"=x",
                    b"x=\"\\\"",
                    b"x=\"\"; y",
                    b"x='\"'",
                ])
                .to_vec(),
        );
    }
    if random.odd() {
        let again = name_parameter(name, random);
        parameters.push(again);
    }
    let turn = random.below(parameters.len());
    if random.one_in(3) {
        parameters.rotate_left(turn);
    }
    for parameter in parameters {
        if random.odd() && random.one_in(3) {
            out.extend(random.pick(&[&b";"[..], b" ; ", b";\t", b",", b" ", b";;", b"; ;"]));
        } else if random.odd() && random.one_in(3) {
            out.extend([&b";"[..], line.end(random), random.pick(&[&b" "[..], b"\t", b""])].concat());
        } else {
            out.extend(b"; ");
        }
        out.extend(parameter);
    }
    if random.odd() {
        out.extend_from_slice(random.pick(&[
            &b";"[..],
            b" ",
            b"\t",
            b";;",
            b"; x",
            b"\"",
            b"\0",
            b"; name=\"private_token",
        ]));
    }
    out
}

fn name_parameter(name: &[u8], random: &mut Random) -> Vec<u8> {
    let mut quoted = Vec::new();
    let pairs = random.odd();
    for byte in name {
        match byte {
            b'"' if random.one_in(2) => quoted.extend(b"%22"),
            b'"' | b'\\' if random.one_in(2) => quoted.extend([b'\\', *byte]),
            b'_' if pairs && random.one_in(2) => quoted.extend(b"\\_"),
            b'_' if pairs && random.one_in(3) => quoted.extend(b"%5f"),
            _ => quoted.push(*byte),
        }
    }
    let escaped: Vec<u8> = name
        .iter()
        .flat_map(|b| if b.is_ascii_alphanumeric() { vec![*b] } else { format!("%{b:02x}").into_bytes() })
        .collect();
    if !random.odd() {
        return [b"name=\"", quoted.as_slice(), b"\""].concat();
    }
    match random.below(22) {
        0 => [b"name=", name].concat(),
        1 => [b"name='", name, b"'"].concat(),
        2 => [b"name*=utf-8''", escaped.as_slice()].concat(),
        3 => [b"name*=UTF-8'en'", escaped.as_slice()].concat(),
        4 => [b"name*=", name].concat(),
        5 => {
            let (front, back) = name.split_at(name.len() / 2);
            [b"name*0=\"", front, b"\"; name*1=\"", back, b"\""].concat()
        }
        6 => {
            let (front, back) = escaped.split_at(0);
            [b"name*0*=utf-8''", front, back].concat()
        }
        7 => [b"NAME=\"", quoted.as_slice(), b"\""].concat(),
        8 => [b"Name=\"", quoted.as_slice(), b"\""].concat(),
        9 => [b"name =\"", quoted.as_slice(), b"\""].concat(),
        10 => [b"name= \"", quoted.as_slice(), b"\""].concat(),
        11 => [b"name=\"", quoted.as_slice()].concat(),
        12 => [b"name=", quoted.as_slice(), b"\""].concat(),
        13 => [b"name=\" ", quoted.as_slice(), b" \""].concat(),
        14 => [b"name=\"a\" ", quoted.as_slice()].concat(),
        15 => [b"name=\"=?utf-8?Q?", quoted.as_slice(), b"?=\""].concat(),
        16 => [b"name=\"\"; name=\"", quoted.as_slice(), b"\""].concat(),
        17 => [b"name=\"a\"; name=\"", quoted.as_slice(), b"\""].concat(),
        18 => [b"name=\"", quoted.as_slice(), b"\"; name=\"a\""].concat(),
        19 => [b"xname=\"a\"; name=\"", quoted.as_slice(), b"\""].concat(),
        20 => [b"name=\"a\"; name*=utf-8''", escaped.as_slice()].concat(),
        _ => [b"name=\"", quoted.as_slice(), b"\" x"].concat(),
    }
}

fn file_parameter(name: &[u8], random: &mut Random) -> Vec<u8> {
    let file = random.usually(
        "x.txt",
        &[
            "private_token",
            "x; name=\"private_token\"; y",
            "x; name=private_token; y",
            "x\"; name=\"private_token",
            "C:\\dir\\x",
            "x\\",
            "x\\\"; name=\\\"private_token",
            "",
            "a\"b",
            "a;b",
            "x: y; name=private_token",
            "%22; name=%22private_token",
            "\u{e4}",
        ],
    );
    let mut out = match random.usually(0, &[1, 2, 3, 4, 5]) {
        0 => format!("filename=\"{file}\""),
        1 => format!("filename={file}"),
        2 => "filename*=utf-8''x".into(),
        3 => format!("filename='{file}'"),
        4 => format!("Filename=\"{file}\""),
        _ => format!("filename=\"x\"; filename=\"{file}\""),
    }
    .into_bytes();
    if random.odd() && random.one_in(4) {
        out = [b"filename=\"", name, b"\""].concat();
    }
    out
}

fn content(out: &mut Vec<u8>, name: &[u8], boundary: &[u8], random: &mut Random) {
    if random.odd() {
        let hidden = [&b"Content-Disposition: form-data; name=\"private_token\"\r\n\r\nbad-token-9999"[..]].concat();
        match random.below(8) {
            0 => out.extend([b"x--", boundary, b"\r\n", &hidden].concat()),
            1 => out.extend([b"x\n--", boundary, b"\n", &hidden].concat()),
            2 => out.extend([b"x\r--", boundary, b"\r\n", &hidden].concat()),
            3 => out.extend([b"x\r\n--", boundary, b"x\r\n", &hidden].concat()),
            4 => out.extend([b"x\r\n--", boundary, b" \r\n", &hidden].concat()),
            5 => out.extend([b"--", boundary, b"--\r\n--", boundary, b"\r\n", &hidden].concat()),
            6 => out.extend(
                [b"--C\r\nContent-Disposition: form-data; name=\"", name, b"\"\r\n\r\nx\r\n--C--\r\n"].concat(),
            ),
            _ => out.extend(b"name=\"private_token\""),
        }
        return;
    }
    match random.below(12) {
        0 => {}
        1 => out.extend(b"\x89PNG\r\n\x1a\n\0\0"),
        2 if random.one_in(20) => out.extend(b"y".repeat(3_000 + random.below(70_000))),
        3 => out.extend(b"a\r\nb\r\n"),
        _ => out.extend(names::value(name, random).into_bytes()),
    }
}
