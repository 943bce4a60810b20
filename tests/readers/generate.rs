//! Generates requests by grammar and by mutation. It knows how applications parse, and nothing about tollgate's rules:
//! any form, JSON or multipart body that some parser accepts may occur, with any combination of method, type, charset
//! and framing.

use super::encode;
use super::names;
use super::random::Random;
use super::{json, multipart};
use crate::harness::{BAD, GOOD, OTHER};

/// One request, in pieces so that it can be reduced.
#[derive(Clone)]
pub struct Case {
    pub id: usize,
    pub method: &'static str,
    pub path: &'static str,
    pub query: Option<Vec<u8>>,
    /// Whole lines, without their ends.
    pub headers: Vec<Vec<u8>>,
    pub body: Option<Vec<u8>>,
    /// Sizes of the chunks; `None` for a Content-Length.
    pub chunks: Option<Vec<usize>>,
    /// No parameter with another name has a token as its value, so the forwarded query must not contain one at all.
    pub no_token_may_stay: bool,
}

impl Case {
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = format!("{} {}", self.method, self.path).into_bytes();
        if let Some(query) = &self.query {
            out.push(b'?');
            out.extend(query);
        }
        out.extend(format!(" HTTP/1.1\r\nHost: h.test\r\nX-Request-Id: case-{}\r\n", self.id).into_bytes());
        for line in &self.headers {
            out.extend(line);
            out.extend(b"\r\n");
        }
        match (&self.body, &self.chunks) {
            (None, _) => out.extend(b"\r\n"),
            (Some(body), None) => {
                out.extend(format!("Content-Length: {}\r\n\r\n", body.len()).into_bytes());
                out.extend(body);
            }
            (Some(body), Some(sizes)) => {
                out.extend(b"Transfer-Encoding: chunked\r\n\r\n");
                let mut rest = body.as_slice();
                // The rest goes into one chunk, because Puma refuses large bodies in small chunks.
                for size in sizes.iter().chain([&usize::MAX]).filter(|size| **size > 0) {
                    let (piece, later) = rest.split_at(rest.len().min(*size));
                    rest = later;
                    if piece.is_empty() {
                        break;
                    }
                    out.extend(format!("{:x}\r\n", piece.len()).into_bytes());
                    out.extend(piece);
                    out.extend(b"\r\n");
                }
                out.extend(b"0\r\n\r\n");
            }
        }
        out
    }

    pub fn is_listing(&self) -> bool {
        matches!(self.method, "GET" | "HEAD")
    }
}

/// Names of headers that some application reads as the token.
const HEADERS: &[&str] =
    &["PRIVATE-TOKEN", "PRIVATE-TOKEN", "private-token", "Private-Token", "pRIVATE-tOKEN", "PRIVATE-TOKEN"];
const ALIASES: &[&str] = &[
    "PRIVATE_TOKEN",
    "Private_Token",
    "PRIVATE.TOKEN",
    "HTTP_PRIVATE_TOKEN",
    "HTTP-PRIVATE-TOKEN",
    "X-PRIVATE-TOKEN",
    "PRIVATE~TOKEN",
    "PRIVATE-TOKEN-",
    "PRIVATE_TOKEN_",
    "PRIVATE-TOKENS",
];
const PLAIN: &[&str] = &[
    "a=1",
    "b=%41",
    "c",
    "d=",
    "labels[]=x",
    "h[y]=1",
    "",
    "=",
    "=x",
    "e=%C3%A4",
    "f=1=2",
    "g=a+b",
    "i=%252F",
    "%6A=1",
];

const FORM: &str = "application/x-www-form-urlencoded";
const JSON: &str = "application/json";
const JSONS: &[&str] = &[
    "application/vnd.api+json",
    "text/json",
    "application/json-seq",
    "application/x-ndjson",
    "application/problem+json",
    "application/json5",
    "text/x-json",
    "application/jsonrequest",
    "application/csp-report",
    "x/json",
];
const OPAQUE: &[&str] = &[
    "text/plain",
    "application/octet-stream",
    "image/png",
    "text/html",
    "application/x-git-upload-pack-request",
    "application/zip",
    "*/*",
    "x",
    "x/y",
    "application/",
    "/json",
    "none",
];

/// The case of a seed and a number, wherever it runs. `captured` are bodies of real clients with their types.
pub fn case(seed: u64, id: usize, captured: &[(Vec<u8>, Vec<u8>)]) -> Case {
    Random::new(seed ^ ((id as u64) << 20)).make(|random| any_case(id, random, captured))
}

fn any_case(id: usize, random: &mut Random, captured: &[(Vec<u8>, Vec<u8>)]) -> Case {
    match random.below(20) {
        0..=4 => query_case(id, random),
        5..=7 => body_case(id, random, Kind::Form),
        8..=11 => body_case(id, random, Kind::Json),
        12..=16 => body_case(id, random, Kind::Multipart),
        17 if !captured.is_empty() => captured_case(id, random, captured),
        17 | 18 => body_case(id, random, Kind::Other),
        _ => charset_case(id, random),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Form,
    Json,
    Multipart,
    Other,
}

/// Mostly without a body: these cases are about the query and the headers.
fn query_case(id: usize, random: &mut Random) -> Case {
    let mut no_token_may_stay = true;
    let mut query = Vec::new();
    for index in 0..random.below(6) {
        if index > 0 {
            query.extend_from_slice(random.pick(&[&b"&"[..], b"&", b"&", b"&", b"&", b"&", b"&", b"&&", b";", b"&;"]));
        }
        query.extend(parameter(random, &mut no_token_may_stay));
    }
    if random.one_in(400) {
        query.extend(format!("&long={}", "x".repeat(9_000)).into_bytes());
    }
    if random.one_in(60) {
        let bad = ["&z=%", "&z=%4", "&z=%zz", "&%gg", "&z=#private_token=x", "&z=\"", "&z=<x>", "&z=\\"];
        query.extend_from_slice(random.pick(&bad).as_bytes());
    }
    let mut headers = Vec::new();
    if !random.one_in(4) {
        let value = token_value(random);
        let (before, after) = (random.pick(&[" ", " ", " ", "", "\t", "  "]), random.pick(&["", "", "", " ", "\t "]));
        headers.push(format!("{}:{before}{value}{after}", random.pick(HEADERS)));
    }
    if random.one_in(12) {
        headers.push(format!("{}: {}", random.pick(HEADERS), token_value(random)));
    }
    if random.one_in(8) {
        headers.push(format!("{}: decoy", random.pick(ALIASES)));
    }
    if random.one_in(8) {
        let scheme = random.pick(&["Bearer ", "bearer  ", "BEARER\t"]);
        headers.push(format!("Authorization: {scheme}{}", token_value(random)));
    }
    if random.one_in(200) {
        headers.push(
            random.pick(&[" folded: x", "PRIVATE-TOKEN : x", "a b: c", "no-colon", ": x", "PRIVATE-TOKEN\t: x"]).into(),
        );
    }
    let mut headers: Vec<Vec<u8>> = headers.into_iter().map(String::into_bytes).collect();
    if random.one_in(12) {
        headers.push(override_header(random));
    }
    if random.one_in(20) {
        headers.push(content_type_line(
            &format!("text/plain; charset={}", random.pick(encode::CHARSETS)).into_bytes(),
            random,
        ));
    }
    let query = if query.is_empty() && random.one_in(2) { None } else { Some(query) };
    let method = random.pick(&["GET", "GET", "GET", "GET", "GET", "GET", "HEAD", "POST", "DELETE", "PUT"]);
    let path = random.pick(&["/api/v3/projects", "/api/v3/projects", "/api/v3/a/b.json", "/api/v3/", "/api/v3//x"]);
    Case { id, method, path, query, headers, body: None, chunks: None, no_token_may_stay }
}

fn token_value(random: &mut Random) -> &'static str {
    match random.below(20) {
        0..=12 => GOOD,
        13 => OTHER,
        14 => BAD,
        15 => "good%2Dtoken%2D0001",
        16 => "",
        17 => "good-token-0001%20",
        18 => "Good-Token-0001",
        _ => "%67ood-token-0001",
    }
}

/// A query parameter, and whether it may contain token bytes that tollgate need not remove.
fn parameter(random: &mut Random, no_token_may_stay: &mut bool) -> Vec<u8> {
    let text = match random.below(24) {
        0..=3 => {
            let mut key = random.pick(&names::TOKEN_KEYS[..3]).to_owned();
            if random.one_in(3) {
                key = random.pick(names::TOKEN_KEYS).to_owned();
            }
            if random.one_in(12) {
                // A fragment at a random place in the name: what Rack makes of it is not predicted here.
                let at = random.below(key.len() + 1);
                let piece =
                    random.pick(&["[", "]", "%5B", "%5d", "%20", "+", "%00", "%5f", ".", "_", "%26", "%3b", "[]"]);
                if key.is_char_boundary(at) && !key[..at].ends_with(['%']) && !key[..at.max(1) - 1].ends_with('%') {
                    key.insert_str(at, piece);
                    *no_token_may_stay = false;
                }
            }
            match random.below(8) {
                0 => key,
                _ => format!("{key}={}", token_value(random)),
            }
        }
        4 => format!("{}=decoy", random.pick(names::OTHER_KEYS)),
        5..=13 => {
            let key = random.pick(names::PAGE_KEYS);
            if random.one_in(20) { key.to_owned() } else { format!("{key}={}", random.pick(names::NUMBERS)) }
        }
        14 if random.one_in(6) => {
            format!("{}=decoy", random.pick(&["access_token", "bearer_token", "job_token", "sudo", "_method"]))
        }
        15..=17 if random.one_in(2) => {
            let name = names::decoded(random);
            // The value is not a token: a parameter that no application reads may stay.
            let value = if name.to_ascii_lowercase().ends_with(b"page") { "9999" } else { "decoy" };
            return [names::form_encoded(&name, true, random), format!("={value}").into_bytes()].concat();
        }
        _ => random.pick(PLAIN).to_owned(),
    };
    text.into_bytes()
}

fn override_header(random: &mut Random) -> Vec<u8> {
    let name = random.pick(&[
        "X-HTTP-Method-Override",
        "X-HTTP-Method-Override",
        "x-http-method-override",
        "X_HTTP_Method_Override",
        "X.HTTP.Method.Override",
        "X-HTTP-Method",
        "X-Method-Override",
        "X-Http_Method-Override",
    ]);
    let value = random.pick(&["DELETE", "PUT", "delete", "PATCH", "GET", "POST", "", "DELETE, PUT", "X"]);
    format!("{name}: {value}").into_bytes()
}

fn body_case(id: usize, random: &mut Random, kind: Kind) -> Case {
    let boundary = multipart::boundary(random);
    let mut body = match kind {
        Kind::Form => form(random),
        Kind::Json => json::document(random),
        Kind::Multipart => multipart::body(&boundary, random),
        Kind::Other => match random.below(4) {
            0 => form(random),
            1 => json::document(random),
            2 => b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR private_token=x&page=5".to_vec(),
            _ => Vec::new(),
        },
    };
    let mut kind_of_type = kind;
    if random.one_in(12) {
        kind_of_type = random.pick(&[Kind::Form, Kind::Json, Kind::Multipart, Kind::Other]);
    }
    let mut content_type: Option<Vec<u8>> = match kind_of_type {
        Kind::Multipart => Some(multipart::content_type(&boundary, random)),
        Kind::Form => {
            Some(random.usually(FORM, &["application/x-www-form-urlencoded2", "x-www-form-urlencoded"]).into())
        }
        Kind::Json => Some(random.usually(JSON, JSONS).into()),
        Kind::Other if random.one_in(2) => None,
        Kind::Other => Some(random.pick(OPAQUE).into()),
    };
    if random.one_in(12) {
        content_type = random.pick(&[None, None, Some(&b""[..])]).map(<[u8]>::to_vec);
    }
    if random.one_in(25) {
        mutate(&mut body, random);
    }
    if let Some(text) = &mut content_type {
        spell(text, random);
    }
    let mut case = Case {
        id,
        method: random.pick(&[
            "POST", "POST", "POST", "POST", "POST", "POST", "POST", "POST", "PUT", "PUT", "PUT", "PATCH", "PATCH",
            "DELETE", "DELETE", "GET", "GET", "GET", "HEAD", "OPTIONS",
        ]),
        path: random.pick(&["/api/v3/projects", "/api/v3/projects/1/uploads", "/api/v3/x.json"]),
        query: None,
        headers: vec![format!("PRIVATE-TOKEN: {GOOD}").into_bytes()],
        body: Some(body),
        chunks: None,
        no_token_may_stay: true,
    };
    if let Some(text) = content_type {
        case.headers.push(content_type_line(&text, random));
        if random.odd() && random.one_in(3) {
            case.headers.push(content_type_line(random.pick(&[FORM, JSON, "text/plain"]).as_bytes(), random));
        }
    }
    if random.one_in(8) {
        let mut query = parameter(random, &mut case.no_token_may_stay);
        if random.one_in(3) {
            query = [query, b"&".to_vec(), parameter(random, &mut case.no_token_may_stay)].concat();
        }
        case.query = Some(query);
    }
    if random.one_in(40) || random.odd() && random.one_in(4) {
        code(&mut case, random);
    }
    if random.one_in(40) {
        case.headers.push(override_header(random));
    }
    if random.odd() && random.one_in(3) {
        let line: &[u8] = random.pick(&[
            &b"Cookie: private_token=bad-token-9999; page=5000"[..],
            b"SUDO: root",
            b"PRIVATE_TOKEN: bad-token-9999",
            b"MIME-Version: 1.0",
            b"Content-Disposition: form-data; name=\"private_token\"",
            b"Content-ID: private_token",
            b"Content-Transfer-Encoding: base64",
            b"X-Content-Type: application/json",
            b"Content_Type: application/json",
            b"Content-Language: en",
            b"Accept: application/xml",
            b"Connection: Content-Type",
        ]);
        case.headers.push(line.to_vec());
    }
    if random.one_in(4) {
        let most = random.pick(&[3, 80, 80, 80]);
        case.chunks = Some((0..=random.below(4)).map(|_| 1 + random.below(most)).collect());
    }
    case
}

/// The header with its name in some spelling.
fn content_type_line(value: &[u8], random: &mut Random) -> Vec<u8> {
    let name = random.usually("Content-Type", &["content-type", "Content-type", "CONTENT-TYPE"]);
    let blank = random.usually(" ", &["", "\t", "  "]);
    [name.as_bytes(), b":", blank.as_bytes(), value].concat()
}

/// Another spelling of a type: the same to some parsers, and a different type to others.
fn spell(text: &mut Vec<u8>, random: &mut Random) {
    if random.odd() {
        match random.below(3) {
            0 => text.make_ascii_uppercase(),
            1 => text.iter_mut().for_each(|b| {
                if random.one_in(3) {
                    b.make_ascii_uppercase();
                }
            }),
            _ => text.iter_mut().take(1).for_each(|b| b.make_ascii_uppercase()),
        }
    }
    if random.odd() {
        let front: &[u8] = random.pick(&[
            &b"\xc2\xa0"[..],
            b"\xa0",
            b"\t",
            b"\x0b",
            b"text/plain, ",
            b"text/plain; ",
            b",",
            b";",
            b"\"",
            b"x",
            b"/",
        ]);
        text.splice(0..0, front.iter().copied());
    }
    if random.odd() {
        let end = text.iter().position(|b| *b == b';').unwrap_or(text.len());
        let behind: &[u8] = random.pick(&[
            &b" "[..],
            b"\t",
            b"\xc2\xa0",
            b"\xa0",
            b",",
            b", text/plain",
            b" x",
            b"/x",
            b"+xml",
            b"+json",
            b"\"",
            b"*",
        ]);
        text.splice(end..end, behind.iter().copied());
    }
    if random.odd() {
        let slash = text.iter().position(|b| *b == b'/').unwrap_or(0);
        let between: &[u8] = random.pick(&[&b" "[..], b"/", b"x-", b"\t", b"\xa0"]);
        text.splice(slash..slash, between.iter().copied());
    }
    let charset = random.pick(encode::CHARSETS);
    let more: &[u8] = random.pick(&[
        &b";"[..],
        b"; ;",
        b"; charset",
        b"; charset=",
        b"; charset=utf-8",
        b"; charset=\"utf-8\"",
        b"; charset='utf-8'",
        b"; CHARSET=UTF-8",
        b"; charset=utf-8; charset=utf-7",
        b"; charset=utf-7; charset=utf-8",
        b"; charset*=utf-8''utf-7",
        b"; charset = utf-7",
        b"; x=\"; charset=utf-7",
        b"; x=\"\\\"; charset=utf-7\"",
        b"; x=y",
        b"; q=1",
        b" charset=utf-8",
        b", charset=utf-8",
        b"; boundary=x",
    ]);
    if random.one_in(12) {
        text.extend(format!("; charset={charset}").into_bytes());
    } else if random.odd() {
        text.extend(more);
    } else if random.one_in(6) {
        text.extend_from_slice(random.pick(&[
            &b"; charset=utf-8"[..],
            b"; charset=UTF-8",
            b";charset=utf-8",
            b"; charset=\"utf-8\"",
        ]));
    }
}

/// A body with a Content-Encoding that is or is not applied.
fn code(case: &mut Case, random: &mut Random) {
    let coding = random.pick(&[
        "gzip",
        "gzip",
        "deflate",
        "GZIP",
        "x-gzip",
        "identity",
        "br",
        "gzip, identity",
        "identity, gzip",
        "gzip,",
        "zstd",
        "",
        "utf-8",
    ]);
    let body = case.body.clone().unwrap_or_default();
    if random.one_in(4) {
        // Declared but not applied.
    } else if coding.to_ascii_lowercase().contains("gzip") {
        case.body = Some(encode::gzip(&body));
    } else if coding == "deflate" {
        case.body = Some(encode::deflate(&body));
    }
    let name = random.usually("Content-Encoding", &["content-encoding", "Content_Encoding"]);
    case.headers.push(format!("{name}: {coding}").into_bytes());
    if random.one_in(10) {
        case.headers.push(format!("Content-Encoding: {}", random.pick(&["gzip", "identity", ""])).into_bytes());
    }
}

/// A declared charset, with or without a body, with the watched names encoded in it.
fn charset_case(id: usize, random: &mut Random) -> Case {
    let charset = random.pick(encode::CHARSETS);
    let name = names::watched(random);
    let value = names::value(name.as_bytes(), random);
    let kind = random.pick(&[FORM, FORM, JSON, JSON, "text/plain", "image/png", "multipart/form-data; boundary=b", ""]);
    let text = match kind {
        JSON => format!("{{\"a\":1,\"{name}\":\"{value}\"}}"),
        kind if kind.starts_with("multipart") => {
            format!("--b\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n--b--\r\n")
        }
        _ if random.one_in(3) => format!("{{\"{name}\":\"{value}\"}}"),
        _ => format!("a=1&{name}={value}"),
    };
    let coded = |text: &str, random: &mut Random| {
        let plain = random.one_in(6);
        if plain { text.as_bytes().to_vec() } else { encode::in_charset(text.as_bytes(), charset, random) }
    };
    let mut query = None;
    if random.one_in(2) {
        let name = coded(name, random);
        // Everything except letters as escapes: parsers decode them first.
        let escaped: String = name
            .iter()
            .map(|b| if b.is_ascii_alphanumeric() { char::from(*b).to_string() } else { format!("%{b:02X}") })
            .collect();
        query = Some(format!("{escaped}={value}").into_bytes());
    }
    let body = if random.one_in(3) { None } else { Some(coded(&text, random)) };
    let parameter = match random.below(8) {
        0 => format!("; charset=\"{charset}\""),
        1 => format!(";Charset={charset}"),
        2 => String::new(),
        3 => format!("; charset={charset}; charset=utf-8"),
        _ => format!("; charset={charset}"),
    };
    let mut headers = vec![format!("PRIVATE-TOKEN: {GOOD}").into_bytes()];
    if !(kind.is_empty() && random.one_in(2)) {
        headers.push(format!("Content-Type: {kind}{parameter}").into_bytes());
    }
    let method = random.pick(&["POST", "POST", "GET", "PUT", "DELETE", "HEAD"]);
    Case { id, method, path: "/api/v3/projects", query, headers, body, chunks: None, no_token_may_stay: true }
}

/// A recorded request of a real client, with some bytes changed.
fn captured_case(id: usize, random: &mut Random, captured: &[(Vec<u8>, Vec<u8>)]) -> Case {
    let (content_type, body) = &captured[random.below(captured.len())];
    let (mut content_type, mut body) = (content_type.clone(), body.clone());
    for _ in 0..random.below(3) {
        mutate(&mut body, random);
    }
    if random.one_in(2) {
        // Replaces a quoted name by a watched one.
        let name = names::decoded(random);
        let places: Vec<usize> = memchr::memmem::find_iter(&body, b"name=\"").map(|at| at + 6).collect();
        if !places.is_empty() {
            let start = random.pick(&places);
            let end = body[start..].iter().position(|b| *b == b'"').map_or(body.len(), |at| start + at);
            body.splice(start..end, name);
        }
    }
    spell(&mut content_type, random);
    let mut headers = vec![format!("PRIVATE-TOKEN: {GOOD}").into_bytes()];
    if !content_type.is_empty() {
        headers.push([b"Content-Type: ", content_type.as_slice()].concat());
    }
    let method = random.pick(&["POST", "POST", "POST", "PUT", "PATCH", "GET"]);
    Case {
        id,
        method,
        path: "/api/v3/projects",
        query: None,
        headers,
        body: Some(body),
        chunks: None,
        no_token_may_stay: true,
    }
}

/// The pairs of a form.
fn form(random: &mut Random) -> Vec<u8> {
    if random.one_in(20) {
        return json::document(random);
    }
    let mut out = Vec::new();
    if random.odd() {
        out.extend_from_slice(random.pick(&[
            &b"\xef\xbb\xbf"[..],
            b" ",
            b"\r\n",
            b"\n",
            b"?",
            b"&",
            b"\0",
            b"\t",
            b"#",
            b"&&&",
        ]));
    }
    let count = 1 + random.below(5);
    let special = random.below(count + 1);
    for index in 0..count {
        if index > 0 {
            out.extend_from_slice(
                random.usually(b"&", &[b";", b"&&", b"&;", b",", b"\n", b"\r\n", b"& ", b"&amp;", b"\0", b"|", b"?"]),
            );
        }
        if index != special {
            out.extend_from_slice(random.pick(PLAIN).as_bytes());
            continue;
        }
        let name = names::decoded(random);
        out.extend(names::form_encoded(&name, false, random));
        if !random.one_in(12) {
            out.extend_from_slice(random.usually(b"=", &[b":", b"%3D", b"==", b" =", b"= ", b"\0="]));
            out.extend(names::value(&name, random).into_bytes());
        }
    }
    if random.odd() {
        out.extend_from_slice(random.pick(&[&b"\r\n"[..], b"\0", b"&", b"=", b"%", b";", b"\n\n"]));
    }
    if random.one_in(150) {
        let filler = format!("z={}&", "x".repeat(20_000 + random.below(60_000)));
        out.splice(0..0, filler.into_bytes());
    }
    out
}

/// Fragments that are special to some parser.
const DICTIONARY: &[&[u8]] = &[
    b"\r\n",
    b"\n",
    b"\r",
    b"\0",
    b"--",
    b"\"",
    b"'",
    b"\\",
    b";",
    b":",
    b"=",
    b"*",
    b" ",
    b"\t",
    b"%",
    b"&",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b"/*",
    b"*/",
    b"//",
    b"#",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xa0",
    b"private_token",
    b"&private_token=x&",
    b",\"private_token\":\"x\",",
    b"{\"private_token\":\"x\"}",
    b"name=private_token",
    b"; name=\"private_token\"",
    b"; name*=utf-8''private_token",
    b"Content-Disposition: form-data; name=\"private_token\"\r\n",
    b"\r\nContent-Disposition: form-data; name=\"private_token\"\r\n\r\nx\r\n",
    b"Content-ID: private_token\r\n",
    b"Content-Type: private_token\r\n",
];

/// One change at the level of bytes.
pub fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    let at = random.below(bytes.len() + 1);
    let end = (at + 1 + random.below(8)).min(bytes.len());
    match random.below(6) {
        0 | 1 => drop(bytes.splice(at..at, random.pick(DICTIONARY).iter().copied())),
        2 => drop(bytes.splice(at..end, random.pick(DICTIONARY).iter().copied())),
        3 => drop(bytes.drain(at..end)),
        4 => {
            let copy = bytes[at..end].to_vec();
            bytes.splice(at..at, copy);
        }
        _ => {
            if at < bytes.len() {
                bytes[at] = random.below(256) as u8;
            }
        }
    }
}
