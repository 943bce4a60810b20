//! Tables of bodies and types: what passes, what is found, what is refused. Every body is split into chunks in many
//! ways.

use super::*;

fn rules(untyped: UntypedBody) -> Arc<BodyRules> {
    let forbidden = [Key::Token, Key::AccessToken, Key::JobToken, Key::Sudo, Key::Method]
        .into_iter()
        .fold(KeySet::default(), KeySet::with);
    Arc::new(BodyRules { names: Names { token: "private_token".into() }, forbidden, untyped })
}

fn head(content_type: Option<&[u8]>) -> BodyHead<'_> {
    BodyHead { content_type, coded: false, is_post: true, lists: false }
}

fn run<'a>(scanner: &BodyScanner, chunks: impl Iterator<Item = &'a [u8]>) -> Result<(), BodyFault> {
    let mut scanner = scanner.clone();
    for chunk in chunks {
        scanner.feed(chunk)?;
    }
    scanner.finish()
}

/// The result under this head, which must not depend on how the body is split into chunks.
fn judged(head: &BodyHead<'_>, body: &[u8]) -> Result<(), BodyFault> {
    let (scanner, _) = BodyScanner::new(head, rules(UntypedBody::Watch));
    let whole = run(&scanner, std::iter::once(body));
    let text = || String::from_utf8_lossy(&body[..body.len().min(300)]).into_owned();
    for size in [1, 2, 3, 7] {
        assert_eq!(run(&scanner, body.chunks(size)), whole, "in chunks of {size}: {}", text());
    }
    if body.len() < 1500 {
        for at in 0..=body.len() {
            assert_eq!(run(&scanner, [&body[..at], &body[at..]].into_iter()), whole, "cut at {at}: {}", text());
        }
    }
    let mut random = Random(body.len() as u64);
    for _ in 0..20 {
        let mut cuts: Vec<usize> = (0..5).map(|_| random.below(body.len() + 1)).collect();
        cuts.extend([0, body.len()]);
        cuts.sort_unstable();
        let pieces = cuts.windows(2).map(|ends| &body[ends[0]..ends[1]]);
        assert_eq!(run(&scanner, pieces), whole, "cut at {cuts:?}: {}", text());
    }
    whole
}

fn verdict(content_type: &str, body: impl AsRef<[u8]>) -> Result<(), BodyFault> {
    judged(&head(Some(content_type.as_bytes())), body.as_ref())
}

/// Xorshift: the same sequence in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }
}

const FOUND: Result<(), BodyFault> = Err(BodyFault::Field(Key::Token));
const AMBIGUOUS: Result<(), BodyFault> = Err(BodyFault::Ambiguous);

/// Found by the fuzz target: of a name longer than any, what was left behind its padding was judged in another way if it came in pieces.
#[test]
fn long_padding_is_judged_the_same_in_pieces() {
    const FORM: &str = "application/x-www-form-urlencoded";
    let padded = |padding: &[u8], length: usize| {
        let padding: Vec<u8> = padding.iter().copied().cycle().take(length).collect();
        [padding.as_slice(), b"private_token=x"].concat()
    };
    assert_eq!(verdict(FORM, padded(b"]]\xbf\xbf]", 300)), FOUND);
    // No reader passes over single bytes of a byte order mark.
    assert_eq!(verdict(FORM, padded(b"]]\xbf\xbf]", 100)), Ok(()));
    let (mut random, mut found) = (Random(7), 0);
    for _ in 0..200 {
        let parts: [&[u8]; 8] = [b"]", b"%5b", b"%0c", b"\xbf", b"%ef%bb%bf", b"+", b"x", b"\0"];
        let mut body = Vec::new();
        let length = 200 + random.below(500);
        while body.len() < length {
            // Nearly always padding.
            let part = parts[random.below(parts.len())];
            body.extend_from_slice(if part == b"x" && random.below(200) > 0 { b"[" } else { part });
        }
        body.extend_from_slice(b"private_token=x");
        found += usize::from(verdict(FORM, body) == FOUND);
    }
    assert!((20..200).contains(&found), "{found}");
}

/// What real clients sent: the head of the request and its body without chunk framing.
fn captures() -> Vec<(String, Vec<u8>)> {
    let mut rest: &[u8] = include_bytes!("../../../tests/bodies/captures");
    let mut found = Vec::new();
    while !rest.is_empty() {
        let end = memchr::memchr(b'\n', rest).unwrap();
        let line = std::str::from_utf8(&rest[..end]).unwrap().strip_prefix("#### ").unwrap();
        let (name, length) = line.split_once(' ').unwrap();
        let length: usize = length.parse().unwrap();
        found.push((name.to_owned(), rest[end + 1..end + 1 + length].to_vec()));
        rest = &rest[end + 1 + length + 1..];
    }
    found
}

/// Names of the real requests that are refused. `tests/bodies/refused.tsv` has the reasons. Their field and file names
/// are unusual: with ordinary names, none of these clients is refused.
fn refused_knowingly() -> Vec<String> {
    let text = include_str!("../../../tests/bodies/refused.tsv");
    text.lines().map(|line| line.split_once('\t').unwrap().0.to_owned()).collect()
}

#[test]
fn what_real_clients_send() {
    let captures = captures();
    assert_eq!(captures.len(), 763);
    let mut refused = Vec::new();
    for (name, bytes) in &captures {
        let end = memchr::memmem::find(bytes, b"\r\n\r\n").unwrap();
        let (lines, body) = (&bytes[..end], &bytes[end + 4..]);
        let field = |wanted: &str| {
            let mut fields = lines.split(|b| *b == b'\n').filter_map(|line| {
                let (name, value) = line.split_at(memchr::memchr(b':', line)?);
                name.eq_ignore_ascii_case(wanted.as_bytes()).then(|| value[1..].trim_ascii())
            });
            fields.next()
        };
        let head = BodyHead {
            content_type: field("content-type"),
            coded: field("content-encoding").is_some(),
            is_post: lines.starts_with(b"POST"),
            lists: false,
        };
        if judged(&head, body).is_err() {
            refused.push(name.as_str());
        }
    }
    let mut expected = refused_knowingly();
    expected.sort_unstable();
    refused.sort_unstable();
    assert_eq!(refused, expected);
}

/// The type that is forwarded, or the fault of any body under it.
fn forwarded(content_type: &str) -> Result<String, BodyFault> {
    let (scanner, canonical) = BodyScanner::new(&head(Some(content_type.as_bytes())), rules(UntypedBody::Watch));
    let same = || content_type.as_bytes().to_vec();
    scanner.fault().map_or_else(|| Ok(String::from_utf8(canonical.unwrap_or_else(same)).unwrap()), Err)
}

#[test]
fn readable_types_are_forwarded_in_one_spelling() {
    for (sent, forwarded_as) in [
        ("application/x-www-form-urlencoded", "application/x-www-form-urlencoded"),
        ("Application/X-WWW-Form-URLEncoded;Charset=UTF-8", "application/x-www-form-urlencoded; charset=UTF-8"),
        ("application/x-www-form-urlencoded ; charset=\"utf-8\"", "application/x-www-form-urlencoded; charset=utf-8"),
        ("application/json;", "application/json"),
        ("application/JSON; ; charset=utf-8;", "application/json; charset=utf-8"),
        ("text/json", "text/json"),
        ("application/vnd.git-lfs+json; charset=utf-8", "application/vnd.git-lfs+json; charset=utf-8"),
        (
            "application/ld+json; profile=\"https://h.test/json x\"",
            "application/ld+json; profile=\"https://h.test/json x\"",
        ),
        (
            "application/vnd.elasticsearch+json; compatible-with=8",
            "application/vnd.elasticsearch+json; compatible-with=8",
        ),
        ("multipart/form-data; boundary=b", "multipart/form-data; boundary=b"),
        ("Multipart/Form-Data;BOUNDARY=aB", "multipart/form-data; boundary=aB"),
        ("multipart/form-data; boundary=\"b\"", "multipart/form-data; boundary=b"),
        ("multipart/form-data; boundary=\"a b:c\"", "multipart/form-data; boundary=\"a b:c\""),
        ("multipart/form-data; boundary=a b:c", "multipart/form-data; boundary=\"a b:c\""),
        ("multipart/form-data; boundary====1===", "multipart/form-data; boundary=\"===1===\""),
        ("multipart/form-data;boundary=*****", "multipart/form-data; boundary=*****"),
        ("multipart/form-data; charset=ISO-8859-1; boundary=b", "multipart/form-data; charset=ISO-8859-1; boundary=b"),
        (
            "multipart/form-data; boundary=b ;charset=windows-1252",
            "multipart/form-data; boundary=b; charset=windows-1252",
        ),
        (
            "multipart/form-data; boundary=Upload----11/27/2026 23:21:37",
            "multipart/form-data; boundary=\"Upload----11/27/2026 23:21:37\"",
        ),
        ("multipart/mixed; boundary=b", "multipart/mixed; boundary=b"),
        // Types that no backend parses into parameters are forwarded byte for byte.
        ("text/plain;charset=UTF-8", "text/plain;charset=UTF-8"),
        ("Text/HTML;Charset=x", "Text/HTML;Charset=x"),
        ("image/PNG", "image/PNG"),
        ("application/x-git-upload-pack-request", "application/x-git-upload-pack-request"),
        ("text/plain; charset=utf-16le", "text/plain; charset=utf-16le"),
        ("application/octet-stream; boundary=x", "application/octet-stream; boundary=x"),
        // Types that no backend recognises are scanned like a missing one.
        ("text", "text"),
        ("*/*, text/plain", "*/*, text/plain"),
        ("image/png;q", "image/png;q"),
    ] {
        assert_eq!(forwarded(sent), Ok(forwarded_as.to_owned()), "{sent}");
    }
    let long = format!("multipart/form-data; boundary={}", "b".repeat(71));
    for (content_type, fault) in [
        ("multipart/form-data", BodyFault::Type),
        ("multipart/form-data; boundary=", BodyFault::Type),
        ("multipart/form-data; boundary=\"\"", BodyFault::Type),
        ("multipart/form-data; boundary= b", BodyFault::Type),
        ("multipart/form-data; boundary=\" b\"", BodyFault::Type),
        ("multipart/form-data; boundary=\"b \"", BodyFault::Type),
        ("multipart/form-data; boundary =b", BodyFault::Type),
        ("multipart/form-data; boundary=b; boundary=c", BodyFault::Type),
        ("multipart/form-data; boundary=b; Boundary=b", BodyFault::Type),
        ("multipart/form-data; boundary*=utf-8''b", BodyFault::Type),
        ("multipart/form-data; boundary=b; boundary*=utf-8''c", BodyFault::Type),
        ("multipart/form-data; boundary*0=b", BodyFault::Type),
        ("multipart/form-data; boundary=b; x=\"boundary=c\"", BodyFault::Type),
        ("multipart/form-data; xboundary=c; boundary=b", BodyFault::Type),
        ("multipart/form-data; boundary=\"b", BodyFault::Type),
        ("multipart/form-data; boundary=\"a\\b\"", BodyFault::Type),
        ("multipart/form-data; boundary=\"a;b\"", BodyFault::Type),
        ("multipart/form-data; boundary=a,b", BodyFault::Type),
        ("multipart/form-data; boundary=\"a,b\"", BodyFault::Type),
        ("multipart/form-data, boundary=b", BodyFault::Type),
        ("multipart/form-data boundary=b", BodyFault::Type),
        ("multipart/form-data; boundary=b\u{a0}", BodyFault::Type),
        ("\u{a0}multipart/form-data; boundary=b", BodyFault::Type),
        (&long, BodyFault::Type),
        ("x-multipart/form-data; boundary=b", BodyFault::Type),
        ("application/multipart; boundary=b", BodyFault::Type),
        ("application/x-www-form-urlencoded, text/plain", BodyFault::Type),
        ("text/plain, application/x-www-form-urlencoded", BodyFault::Type),
        ("application/x-www-form-urlencoded\u{a0}", BodyFault::Type),
        ("application/x-www-form-urlencoded charset=utf-8", BodyFault::Type),
        ("application/x-www-form-urlencoded;charset", BodyFault::Type),
        ("application/x-www-form-urlencoded; charset=utf-8; charset=utf-8", BodyFault::Type),
        ("application/x-www-form-urlencoded; charset*=utf-8''utf-16", BodyFault::Type),
        ("application/x-www-form-urlencoded; x=multipart; boundary=b", BodyFault::Type),
        ("application / json", BodyFault::Type),
        ("application/json, application/json", BodyFault::Type),
        ("/json", BodyFault::Type),
        ("json", BodyFault::Type),
        ("application/json; x=urlencoded", BodyFault::Type),
        ("image/png; x=json", BodyFault::Type),
        ("application/json; charset=utf-16", BodyFault::Charset),
        ("application/json; charset=UTF-7", BodyFault::Charset),
        ("application/json; charset=\"utf-32le\"", BodyFault::Charset),
        ("application/x-www-form-urlencoded; charset=utf-16be", BodyFault::Charset),
        ("application/x-www-form-urlencoded; charset=shift_jis", BodyFault::Charset),
        ("application/x-www-form-urlencoded; charset=x", BodyFault::Charset),
        ("multipart/form-data; boundary=b; charset=utf-7", BodyFault::Charset),
        ("text/plain; charset=utf-7", BodyFault::Charset),
    ] {
        assert_eq!(forwarded(content_type), Err(fault), "{content_type}");
        assert_eq!(verdict(content_type, ""), Ok(()), "an empty body: {content_type}");
        assert_eq!(verdict(content_type, "x"), Err(fault), "{content_type}");
    }
}

#[test]
fn coded_bodies() {
    let coded = |content_type: Option<&str>| {
        let head = BodyHead { coded: true, ..head(content_type.map(str::as_bytes)) };
        assert_eq!(judged(&head, b""), Ok(()));
        judged(&head, b"\x1f\x8b\x08")
    };
    for content_type in [
        None,
        Some(""),
        Some("text"),
        Some("text/plain"),
        Some("application/xml"),
        Some("application/json"),
        Some("application/x-www-form-urlencoded"),
        Some("multipart/form-data; boundary=b"),
    ] {
        assert_eq!(coded(content_type), Err(BodyFault::Coding), "{content_type:?}");
    }
    for content_type in ["application/x-git-upload-pack-request", "image/png", "application/x-protobuf"] {
        assert_eq!(coded(Some(content_type)), Ok(()), "{content_type}");
    }
}

#[test]
fn bodies_without_a_type() {
    let judge = |untyped, is_post, body: &[u8]| {
        let (scanner, forwarded) = BodyScanner::new(&BodyHead { is_post, ..head(None) }, rules(untyped));
        (run(&scanner, std::iter::once(body)), forwarded.map(|value| String::from_utf8(value).unwrap()))
    };
    let form = b"a=1&private_token=B";
    let json = b" /* x */ {\"private_token\":\"B\"}";
    let file = b"\x7fELF\0\0&private_token=\xff";
    let stream = || Some("application/octet-stream".to_owned());
    use UntypedBody::{OctetStream, Refuse, Watch};
    assert_eq!(judge(Watch, true, form), (FOUND, None));
    assert_eq!(judge(Watch, false, form), (Ok(()), None));
    assert_eq!(judge(Watch, true, json), (FOUND, None));
    assert_eq!(judge(Watch, false, json), (FOUND, None));
    assert_eq!(judge(Watch, false, file), (Ok(()), None));
    assert_eq!(judge(OctetStream, true, form), (Ok(()), stream()));
    assert_eq!(judge(OctetStream, true, json), (FOUND, stream()));
    assert_eq!(judge(OctetStream, false, json), (FOUND, stream()));
    assert_eq!(judge(OctetStream, false, file), (Ok(()), stream()));
    for is_post in [true, false] {
        assert_eq!(judge(Refuse, is_post, file), (Err(BodyFault::Untyped), None));
        assert_eq!(judge(Refuse, is_post, b""), (Ok(()), None));
    }
}

#[test]
fn pages_in_the_body_of_a_list() {
    for (content_type, body, key) in [
        ("application/x-www-form-urlencoded", "a=1&per_page=9999", Key::PerPage),
        ("application/x-www-form-urlencoded", "page[]=9", Key::Page),
        ("application/json", "{\"page\":9}", Key::Page),
        ("text/plain", "{\"per_page\":9}", Key::PerPage),
        (
            "multipart/form-data; boundary=b",
            "--b\r\nContent-Disposition: form-data; name=page\r\n\r\n9\r\n--b--",
            Key::Page,
        ),
    ] {
        let head = BodyHead { lists: true, is_post: false, ..head(Some(content_type.as_bytes())) };
        assert_eq!(judged(&head, body.as_bytes()), Err(BodyFault::Field(key)), "{content_type}: {body}");
        assert_eq!(verdict(content_type, body), Ok(()), "{content_type}: {body}");
    }
}

#[test]
fn forms() {
    let form = "application/x-www-form-urlencoded";
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
        "private_token\0=B",
        "private_token\0",
        "private_token%00x",
        "private.token=B",
        "private+token=B",
        "private[token=B",
        "\u{feff}private_token=B",
        "private%5Ftoken%5B%5D=B",
        "&&;;=&==&private_token&",
        "{\"a\":1}&private_token=B",
    ] {
        assert_eq!(verdict(form, body), FOUND, "{body}");
        assert_eq!(verdict("Application/X-WWW-Form-URLEncoded; charset=utf-8", body), FOUND, "{body}");
    }
    for padded in [
        format!("{}private_token={}", "%5B[+".repeat(500), "x".repeat(9000)),
        format!("{}private_token", "%5B".repeat(86)),
        format!("{}private_token", " ".repeat(255)),
        format!("{}private_token", " ".repeat(256)),
        format!("{}private_token=", "%20".repeat(85)),
        format!("private_token[{}]=1", "x".repeat(9000)),
        format!("{}&private_token=1", "x".repeat(9000)),
        format!("{}=&private_token=1", "x".repeat(256)),
    ] {
        assert_eq!(verdict(form, &padded), FOUND, "{padded}");
    }
    for body in [
        "title=private_token=B",
        "a=%26private_token%3DB",
        "PRIVATE_TOKEN=B",
        "xprivate_token=B",
        "a=1&b",
        "\u{fffd}\0\x01&%zz&%",
        "{\"a\":\"&private-token=1\"}",
        "[{\"private_token\":1}]",
    ] {
        assert_eq!(verdict(form, body), Ok(()), "{body}");
    }
    assert_eq!(verdict(form, "x".repeat(100_000)), Ok(()));
    assert_eq!(verdict(form, "&".repeat(100_000)), Ok(()));
    // JSON sent by `curl -d`, which early Grape parses whatever the type says.
    assert_eq!(verdict(form, "{\"a\":\"&\",\"private_token\":1}"), FOUND);
    for (body, key) in
        [("a=1&sudo=root", Key::Sudo), ("_method=delete", Key::Method), ("access_token=x", Key::AccessToken)]
    {
        assert_eq!(verdict(form, body), Err(BodyFault::Field(key)));
    }
}

#[test]
fn json_objects() {
    for body in [
        r#"{"private_token":"B"}"#,
        r#"{"a":{"b":[1,"}"]},"private_token":null}"#,
        r#"{"private\u005ftoken":"B"}"#,
        r#"{"\p\u0072ivate_token":1}"#,
        r#"{"\u0070rivate_token":1}"#,
        // Go takes any letter case, and folds these letters.
        r#"{"Private_TOKEN":1}"#,
        "{\"private_to\u{212a}en\":1}",
        r#"{"private_to\u212aen":1}"#,
        r#"{"\u0050rivate_token":1}"#,
        r#"{"private_token\u0000x":1}"#,
        r#"{"\u0070\u0072\u0069\u0076\u0061\u0074\u0065\u005F\u0074\u006f\u006b\u0065\u006e":1}"#,
        r#" {"a":"\"","private_token":1}"#,
        r#"{"title":"x","title":"y","private_token":"B""#,
        r#"{"a":NaN,"b":-Infinity,"c":-0.5e+7,"d":true,"private_token":1}"#,
        r#"{"a\\":1,"private_token":1}"#,
        r#"{"\\\"":"\\","private_token":1}"#,
        "{\"a\":\"line\nfeed\",\"private_token\":1}",
    ] {
        assert_eq!(verdict("application/json", body), FOUND, "{body}");
        assert_eq!(verdict("application/merge-patch+json; charset=utf-8", body), FOUND, "{body}");
        assert_eq!(verdict("text/plain", body), FOUND, "{body}");
        assert_eq!(judged(&head(None), body.as_bytes()), FOUND, "{body}");
    }
    for body in [
        r#"{"a":{"private_token":1}}"#,
        r#"{"a":"private_token"}"#,
        r#"[{"private_token":1}]"#,
        r#"[["private_token",1]]"#,
        r#"{"a":[{"private_token":1},"private_token"],"b":{"c":{}},"d":[[]]}"#,
        "{}",
        "[]",
        " { } \r\n\t",
        "",
        "  ",
        "null",
        "true",
        "0",
        "-12.5E-3",
        "\"private_token\"",
        "NaN",
        "[1,-1,0.5,1e9,\"\\u00e9\\n\"]",
        r#"{"Private-Token":1,"prıvate_token":2}"#,
    ] {
        assert_eq!(verdict("application/json", body), Ok(()), "{body}");
        assert_eq!(verdict("text/plain", body), Ok(()), "{body}");
    }
}

/// Not standard JSON. Where the type does not say JSON, a body that no parser accepts as JSON passes.
#[test]
fn a_configured_name_with_capitals_counts_in_any_letter_case() {
    let rules = Arc::new(BodyRules {
        names: Names { token: "Api_Key".into() },
        forbidden: KeySet::default().with(Key::Token),
        untyped: UntypedBody::Watch,
    });
    let judged = |body: &str| {
        let (scanner, _) = BodyScanner::new(&head(Some(b"application/json")), Arc::clone(&rules));
        run(&scanner, std::iter::once(body.as_bytes()))
    };
    for key in ["Api_Key", "api_key", "API_KEY", r"api_\u004bey", "Api_\u{212a}ey"] {
        assert_eq!(judged(&format!("{{\"{key}\":1}}")), Err(BodyFault::Field(Key::Token)), "{key}");
    }
    assert_eq!(judged(r#"{"api-key":1,"apikey":1}"#), Ok(()));
}

#[test]
fn json_that_is_none() {
    for body in [
        "private_token=B",
        "token=x&private_token=B",
        "nonsense",
        "nul",
        "nullx",
        "tru",
        "1x",
        "01",
        "-",
        "1.",
        ".5",
        "+1",
        "1e",
        "'a'",
        "{'a':1}",
        "{a:1}",
        "{\"a\" 1}",
        "{\"a\":1 \"b\":2}",
        "{\"a\":1}}",
        "{\"a\":1} x",
        "[1,2",
        "[1 2]",
        "[1}",
        "{\"a\":1]",
        "{\"a\":[}",
        "{\"a\":1",
        "{\"a",
        "{\"a\\",
        "[",
        "{",
        "{1:2}",
        "{\"a\":}",
        "\u{1}{}",
        "\\",
        "<a/>",
    ] {
        assert_eq!(verdict("application/json", body), AMBIGUOUS, "{body}");
        assert_eq!(verdict("text/plain", body), Ok(()), "{body}");
    }
    // Some parser reads these as an object, so they are scanned even if the type does not say JSON.
    for body in [
        "{/*\"*/\"private_token\":1}",
        "{\"a\":1/*\"*/,\"private_token\":1}",
        "{\"a\":1//\"\n,\"private_token\":1}",
        "{\"a\":1//\"\r\n,\"private_token\":1}",
        "/**/ //\n{\"a\":/***/1/* * / */,\"private_token\":1}",
        "//}\n{\"private_token\":1}",
        "{\"a\":1,,\"private_token\":1}",
        "{,\"private_token\":1}",
        "\u{b}{\u{c}\"private_token\":1}",
        // yajl parses one document after the other, and the last one counts.
        "{\"a\":1}{\"private_token\":1}",
        "{}[1] 1-2 null\"x\"/**/true{\"private_token\":1}",
        "[{\"a\":1}]\n{\"private_token\":1}",
        "{\"a\":[1,],\"b\":{\"c\":1,},\"private_token\":1}",
        "{\"a\":nan,\"b\":.5,\"c\":0x1F,\"private_token\":1}",
        "\u{feff}{\"private_token\":1}",
        "\u{feff} /**/{\"private_token\":1}",
    ] {
        assert_eq!(verdict("application/json", body), AMBIGUOUS, "{body}");
        assert_eq!(verdict("text/plain", body), FOUND, "{body}");
        assert_eq!(judged(&head(None), body.as_bytes()), FOUND, "{body}");
    }
    // yajl returns the innermost open object of a truncated document.
    for body in [
        "{\"a\":{\"private_token\":1",
        "[{\"private\\u005ftoken\":1,\"b\":[1,",
        "{\"a\":[{\"private_token\":{\"b\"",
        "{\"a\":{\"private_token\":1}, // x",
    ] {
        assert_eq!(verdict("application/json", body), AMBIGUOUS, "{body}");
        assert_eq!(verdict("text/plain", body), FOUND, "{body}");
    }
    // Parsers differ in where these comments end.
    for body in
        ["{//\r\"private_token\":1}", "{//\u{c}\"private_token\":1}", "{//\0\"a\":1}", "{\"a\":1}//x\r", "//x\0\n{}"]
    {
        let over = body.starts_with("{\"a\":1}");
        assert_eq!(verdict("application/json", body), AMBIGUOUS, "{body:?}");
        assert_eq!(verdict("text/plain", body), if over { Ok(()) } else { AMBIGUOUS }, "{body:?}");
    }
    assert_eq!(verdict("application/json", "{\"\u{17f}udo\":1}"), Err(BodyFault::Field(Key::Sudo)));
    assert_eq!(verdict("application/json", "[".repeat(16_385)), AMBIGUOUS);
    assert_eq!(verdict("text/plain", format!("{{\"a\":{}", "[".repeat(16_384))), AMBIGUOUS);
    let deep = format!("{{\"a\":{}{},\"private_token\":1}}", "[{\"a\":".repeat(500), "1}]".repeat(500));
    assert_eq!(verdict("application/json", &deep), AMBIGUOUS);
    let nested = format!("{{\"a\":{}1{},\"private_token\":1}}", "[{\"a\":".repeat(500), "}]".repeat(500));
    assert_eq!(verdict("application/json", &nested), FOUND);
    assert_eq!(verdict("application/x-ndjson", "{\"a\":1}\n{\"a\":2}\n"), Ok(()));
    assert_eq!(verdict("application/x-ndjson", "{\"private_token\":1}\n{}\n"), FOUND);
}

#[test]
fn json_in_other_encodings() {
    let text = "{\"\u{122}\u{2200}\":1,\"private_token\":1}";
    let utf16: Vec<u16> = text.encode_utf16().collect();
    let little: Vec<u8> = utf16.iter().flat_map(|unit| unit.to_le_bytes()).collect();
    let big: Vec<u8> = utf16.iter().flat_map(|unit| unit.to_be_bytes()).collect();
    let wide_little: Vec<u8> = text.chars().flat_map(|letter| u32::from(letter).to_le_bytes()).collect();
    let wide_big: Vec<u8> = text.chars().flat_map(|letter| u32::from(letter).to_be_bytes()).collect();
    for (mark, body) in
        [(&b"\xff\xfe"[..], little), (b"\xfe\xff", big), (b"\xff\xfe\0\0", wide_little), (b"\0\0\xfe\xff", wide_big)]
    {
        for body in [body.clone(), [mark, &body].concat()] {
            assert_eq!(verdict("text/plain", &body), FOUND, "{body:?}");
            assert_eq!(verdict("application/json", &body), AMBIGUOUS, "{body:?}");
        }
    }
    for body in [
        &b"\0\0\0\x20ftypisom{\"private_token\":1}"[..],
        b"\xff\xfe<\0h\0t\0m\0l\0",
        b"\0",
        b"\xff\xd8\xff\xe0",
        b"\xef\xbb\xbf",
    ] {
        assert_eq!(verdict("video/mp4", body), Ok(()), "{body:?}");
    }
    assert_eq!(verdict("application/json", "\u{feff}{}"), AMBIGUOUS);
    assert_eq!(verdict("application/json", "\u{feff}"), AMBIGUOUS);
}

const PARTS: &str = "multipart/form-data; boundary=aB";

/// A body of one ordinary part and one with this head.
fn part(head: &str) -> String {
    format!("--aB\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n1\r\n--aB\r\n{head}\r\n\r\nvalue\r\n--aB--\r\n")
}

fn disposition(parameters: &str) -> String {
    part(&format!("Content-Disposition: form-data; {parameters}"))
}

#[test]
fn the_frame_of_a_multipart_body() {
    let head = "Content-Disposition: form-data; name=\"x\"";
    for body in [
        "",
        "--aB--",
        "--aB--\r\n",
        "\r\n--aB--\r\n",
        &format!("--aB\r\n{head}\r\n\r\n\r\n--aB--"),
        &format!("--aB\r\n{head}\r\n\r\nx\r\n--aB--"),
        &format!("--aB\r\n{head}\r\n\r\nx\r\n--aB--\r\n"),
        &format!("--aB\r\n{head}\r\n\r\nx\r\n--aB--\r\n\r\n"),
        &format!("\r\n--aB\r\n{head}\r\n\r\nx\r\n--aB--\r\n"),
        &format!("--aB\r\n{head}\r\n\r\n\r\n-\r\n--\r\n--a\r\n--AB\r\n- -aB\r\n\r\n--aB--\r\n"),
        &format!("--aB\r\n{head}\r\n\r\n\r\r\n\n\r\n--aB\r\n{head}\r\n\r\n\r\n--aB--\r\n"),
        &format!("--aB\r\n{head}\r\n\r\n{}\r\n--aB--", "\r\n--a".repeat(3000)),
        &format!("--aB\r\n{head}\r\n\r\nname=\"private_token\"\r\n--aB--\r\n"),
    ] {
        assert_eq!(verdict(PARTS, body), Ok(()), "{body}");
        assert_eq!(verdict("multipart/mixed; boundary=\"aB\"", body), Ok(()), "{body}");
    }
    for body in [
        "x",
        "\r\n",
        "\r\n\r\n--aB--",
        "\n--aB--",
        " --aB--",
        "--aB",
        "--aB\r\n",
        "--aB-",
        "--aB--x",
        "--aB--\r",
        "--aB--\n",
        "--aB--\r\n\r",
        "--aB--\r\n\r\n\r\n",
        "--aB--\r\n--aB--",
        "--aB \r\n",
        "--aB\n",
        "--aBc--",
        "--ab--",
        "private_token=B",
        &format!("preamble\r\n--aB\r\n{head}\r\n\r\nx\r\n--aB--"),
        &format!("--aB\r\n{head}\r\n\r\n--aB--"),
        &format!("--aB\r\n{head}\r\n\r\nx--aB--"),
        &format!("--aB\r\n{head}\r\n\r\nx\n--aB--"),
        &format!("--aB\r\n{head}\r\n\r\nx\r--aB--"),
        &format!("--aB\r\n{head}\r\n\r\nx\r\n---aB--"),
        &format!("--aB\r\n{head}\r\n\r\nx\r\n--aB"),
        &format!("--aB\r\n{head}\r\n\r\nx\r\n--aB--epilogue"),
        &format!("--aB\r\n{head}\r\n\r\nx\r\n--aB--\r\n--aB\r\n{head}\r\n\r\nx\r\n--aB--"),
        &format!("--aB\r\n{head}\r\n\r\nx\r\n--aBx\r\n--aB--"),
        &format!("--aB\r\n{head}\r\n\r\nx"),
        &format!("--aB\r\n{head}\r\n"),
        &format!("--aB\r\n\r\n{head}\r\n\r\nx\r\n--aB--"),
        &format!("--aB\r\n{head}\r\nX: --aB\r\n\r\nx\r\n--aB--"),
        &format!("--aB\r\n{}: x\r\n{head}\r\n\r\nx\r\n--aB--", "x".repeat(20_000)),
        &format!("--aB\r\nX: {}", "x".repeat(20_000)),
    ] {
        assert_eq!(verdict(PARTS, body), AMBIGUOUS, "{body}");
    }
    // Boundaries that look like something else.
    for boundary in ["-", "--", "-a-", "a--", "===1===", "*****", "a b", &"b".repeat(70)] {
        let content_type = format!("multipart/form-data; boundary=\"{boundary}\"");
        let body = |name: &str| {
            format!("--{boundary}\r\nContent-Disposition: form-data; name={name}\r\n\r\n\r\n--{boundary}--\r\n")
        };
        assert_eq!(verdict(&content_type, body("a")), Ok(()), "{boundary}");
        assert_eq!(verdict(&content_type, body("private_token")), FOUND, "{boundary}");
    }
}

#[test]
fn names_of_parts() {
    for head in [
        "Content-Disposition: form-data; name=\"private_token\"",
        "content-disposition:form-data;name=private_token",
        "CONTENT-DISPOSITION:  form-data  ;  name=\"private_token\" ; ",
        "Content-Disposition: form-data; filename=\"x\"; name=\"private_token\"",
        "Content-Disposition: form-data; name=\"private_token\"; filename=\"x\"",
        "Content-Disposition: form-data; name=\"private_token\"; filename=x; filename*=utf-8''x",
        "Content-Disposition: form-data; size=12; name=private_token",
        "Content-Disposition: form-data; name=\"[private_token]\"",
        "Content-Disposition: form-data; name=\"private_token[x]\"",
        "Content-Disposition: form-data; name=\"private_token[]\"",
        "Content-Disposition: form-data; name=\" private_token\"",
        "Content-Disposition: form-data; name=\"private.token\"",
        "Content-Disposition: form-data; name=private.token",
        "Content-Disposition: form-data; name=\"private token\"",
        "Content-Disposition: form-data; name=\"private%5Ftoken\"",
        "Content-Type: text/plain\r\nContent-Disposition: form-data; name=\"private_token\"\r\nX-Y: \tz",
        // Rack 3 takes the one after a raw quote, Formidable the first one.
        "Content-Disposition: form-data; name=\"a\"; filename=\"x\"name=\"private_token\"\"",
        "Content-Disposition: form-data; filename=\"name=private_token\"; name=\"a\"",
        "Content-Disposition: form-data; filename=\"name=private_token{x\"; name=\"a\"",
        "Content-Disposition: form-data; filename=\"name=private_token@x\"; name=\"a\"",
        "Content-Disposition: form-data; filename=\"x-name=private_token y\"; name=\"a\"",
        // Old Rack takes what follows a blank and `name=`, wherever it occurs.
        "Content-Disposition: form-data; name=\"a\"; filename=\"x name=private_token\"",
        "Content-Disposition: form-data; name=\"a\"; filename=\"x\" name=\"private_token\"",
        "Content-Disposition: form-data; name=\"a\"; filename=\"x\" name=\"private\\_token\"",
        "Content-Disposition: form-data; name=\"a\"; filename=\"x name=private_token name=\"",
        "Content-Disposition: form-data;name=\"a\"; filename=\"private_token\"",
        "Content-Disposition: form-data;name=\"a\"\r\nContent-ID: private_token",
        "Content-Disposition: form-data;name=\"a\"\r\nContent-ID: <private_token>",
        // Rack 2 takes the file's name if a `:` precedes `name`.
        "Content-Disposition: form-data; filename=\"private_token\"; modification-date=\"Fri, 27 Nov 2026 23:21:37 GMT\"; size=12; name=\"file\"",
        "Content-Disposition: form-data; filename=\"private%5ftoken[]\"; modification-date=\"23:21\"; name=\"file\"",
        "Content-Disposition: form-data; filename=\"private\\_token\"; modification-date=\"23:21\"; name=\"file\"",
        "Content-Disposition: form-data; filename*=utf-8''private%5Ftoken; modification-date=\"23:21\"; name=\"file\"",
        "Content-Disposition: form-data; modification-date=\"23:21\"; name=\"file\"\r\nContent-Type: private_token",
        "Content-Disposition: form-data; modification-date=\"23:21\"; name=\"file\"\r\nX-Content-ID: private_token",
    ] {
        assert_eq!(verdict(PARTS, part(head)), FOUND, "{head}");
        assert_eq!(verdict("multipart/related; boundary=aB", part(head)), FOUND, "{head}");
    }
    for parameters in [
        "name=\"b\"",
        "name=b",
        "name=\"l[]\"",
        "name=\"h[k]\"",
        "name=\":action\"",
        "name=\"sp ace\"",
        "name=\"\u{fc}\"",
        "name=\"a%22b\"",
        "name=\"=?utf-8?B?w6Q=?=\"",
        "name=\"a\";",
        "name=\"file\"; filename=\"private_token\"",
        "name=\"file\"; filename=\"\"",
        "name=\"file\"; filename=\"semi;colon name.txt\"",
        "name=\"file\"; filename=\"q\\\"uote.txt\"",
        "name=\"file\"; filename=\"q\\\"u;ote.txt\"",
        "name=\"file\"; filename=\"q\"uote.txt\"",
        "name=\"file\"; filename=\"\"q\"\"",
        "name=\"file\"; filename=\"C:\\dir\\x.txt\"",
        "name=\"file\"; filename=\"trail\\\"",
        "name=\"file\"; filename=\"a: b, c\"",
        "name=\"file\"; filename=x.txt; filename*=utf-8''%C3%A4",
        "filename=\"x.txt\"; modification-date=\"Fri, 27 Nov 2026 23:21:37 GMT\"; size=12; name=\"file\"",
        "name=\"file\"; filename=\"x\"; modification-date=\"23:21\"; read-date=\"23:21\"",
        "name=\"file\"; filename=\"its name=x.txt\"",
        "name=\"file\"; filename=\"name=1, name=2, name=3\"",
        "name=\"file\"; filename=\"filename=private_token, surname=private_token\"",
    ] {
        assert_eq!(verdict(PARTS, disposition(parameters)), Ok(()), "{parameters}");
    }
    for parameters in [
        "",
        "filename=\"x\"",
        "name=\"\"",
        "name=",
        "name",
        "NAME=\"b\"",
        "name = \"b\"",
        "name= \"b\"",
        "name*=utf-8''private_token",
        "name=\"b\"; name*=utf-8''private_token",
        "name*0=private_token",
        "name=\"b\"; name=\"private_token\"",
        "name=\"private\\_token\"",
        "name=\"b\\\"",
        "name=\"b\"c\"",
        "name=\"b",
        "name='b'",
        "name=\"'b'\"",
        "name=l[]",
        "name=\"a;b\"",
        "name=\"a; name=private_token\"",
        "name=\"b\", name=\"c\"",
        "name=\"b\" name=\"private_token\"",
        "name=\"b\"; x=y",
        "name=\"b\"; filename=\"x\"; filename=\"y\"",
        "name=\"a\"; filename=\"u; name=private_token; x\"",
        "name=\"a\"; filename=\"u;NAME* =private_token\"",
        "name=\"a\"; filename=\"u\"; name=\"private_token\"",
        "name=\"a\"; filename=\"q\"uo;te.txt\"",
        "name=\"a\"; filename=\"trail\\\"; size=1",
        "filename=\"q\"uote.txt\"; name=\"a\"",
        "filename=\"trail\\\"; name=\"a\"",
        "name=\"a\"; filename=\"x",
        "name=\"a\"; filename=x y",
        "name=\"a\";; filename=x",
        "name=\"file\"; filename=\"name=1, name=2, name=3, name=4\"",
        "\tname=\"a\"",
    ] {
        assert_eq!(verdict(PARTS, disposition(parameters)), AMBIGUOUS, "{parameters}");
    }
    for head in [
        "",
        "X: y",
        "Content-Type: private_token",
        "Content-ID: private_token",
        "Content-Disposition: attachment; name=\"a\"",
        "Content-Disposition: form-data",
        "Content-Disposition : form-data; name=\"a\"",
        " Content-Disposition: form-data; name=\"a\"",
        "Content-Disposition: form-data;\r\n name=\"a\"",
        "Content-Disposition: form-data; name=\"a\"\r\n x",
        "Content-Disposition: form-data; name=\"a\"\nX: y",
        "Content-Disposition: form-data; name=\"a\"\rX: y",
        "X: y\nContent-Disposition: form-data; name=\"a\"",
        "Content-Disposition: form-data; name=\"a\"\r\nContent-Disposition: form-data; name=\"a\"",
        "X-Content-Disposition: form-data; name=\"b\"\r\nContent-Disposition: form-data; name=\"a\"",
        "X: Content-Disposition: form-data; name=\"b\"\r\nContent-Disposition: form-data; name=\"a\"",
        "Content-Disposition: form-data; name=\"a\"; filename=\"content-disposition: x\"",
        "Content-Disposition: form-data; name=\"a\"\r\nX",
        "Content-Disposition: form-data; name=\"a\"\r\nX: y\r\nx: z",
        "Content-Disposition: form-data; name=\"a\"\r\n: y",
        "Content-Disposition: form-data; name=\"a\"\r\nX Y: z",
        "Content-Disposition: form-data; name=\"a\0\"",
        "Content-Disposition: form-data; name=\"a\"; filename=\"x\ny\"",
        "Content-Disposition: form-data; name=\"a\"; filename=\"x\x7fy\"",
    ] {
        assert_eq!(verdict(PARTS, part(head)), AMBIGUOUS, "{head:?}");
    }
}

/// An unquoted value is a token. A boundary alone may have more, because old clients send it so.
#[test]
fn values_of_parameters_without_quotes() {
    for (content_type, sent) in [
        ("application/json; charset=a/b", Err(BodyFault::Type)),
        ("multipart/form-data; charset=a/b; boundary=x", Err(BodyFault::Type)),
        ("multipart/form-data; boundary=", Err(BodyFault::Type)),
        ("multipart/form-data; boundary=a@b", Err(BodyFault::Type)),
        ("multipart/form-data; boundary=a/b", Ok("multipart/form-data; boundary=\"a/b\"")),
        ("multipart/form-data; Boundary=a/b \t", Ok("multipart/form-data; boundary=\"a/b\"")),
    ] {
        assert_eq!(forwarded(content_type).as_deref().map_err(|fault| *fault), sent, "{content_type}");
    }
}

/// Ruby reads an unknown escape as the letter itself, and the known ones are no letters of a name.
#[test]
fn escapes_within_names() {
    for (name, found) in [
        (r"privat\e_token", FOUND),
        (r"private\_token", FOUND),
        (r"private_toke\u006e", FOUND),
        (r"private_toke\n", Ok(())),
        (r"p\rivate_token", Ok(())),
        (r"priva\te_token", Ok(())),
    ] {
        let body = format!("{{\"{name}\":\"x\"}}");
        assert_eq!(verdict("application/json", &body), found, "{body}");
    }
}

#[test]
fn a_body_has_its_limit_and_not_a_byte_more() {
    for (before, piece, fits) in [(0, "12345", true), (0, "123456", false), (3, "12", true), (3, "123", false)] {
        let judged = judge_piece(&mut None, Some(5), before, piece.as_bytes(), true);
        assert_eq!(judged, if fits { Ok(()) } else { Err(RequestFault::BodyTooLarge) }, "{before} and {piece}");
    }
    assert_eq!(judge_piece(&mut None, None, u64::MAX - 5, b"12345", true), Ok(()));
    // What is too large is not read any more, and what stands in it is judged at its end at the latest.
    let (scanner, _) = BodyScanner::new(&head(Some(b"application/json")), rules(UntypedBody::Watch));
    let mut scanner = Some(scanner);
    assert_eq!(judge_piece(&mut scanner, Some(9), 0, b"{\"a\":1", false), Ok(()));
    let ended = judge_piece(&mut scanner, Some(9), 6, b"", true);
    assert!(matches!(ended, Err(RequestFault::Body(_))), "{ended:?}");
}
