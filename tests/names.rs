//! Parameter names that are nearly those of a token, another credential or a page: `names.tsv` has the interpretation of
//! seven real parsers, and tollgate must handle a name if one of them reads it so, and ignore it if none does.
//!
//! The table was generated with Rack 2.2.22, PHP 8.2.36 (`parse_str`), qs 6.17 (Express), Node 20's `querystring`,
//! Django 5.2, Werkzeug 3.1 (Flask) and Go 1.19 (`url.ParseQuery`) for each name followed by `=V`. Columns: the name in
//! the query, the parameter that it is read as, and the parsers that do so. `nobody` with a parameter means that only other
//! versions or parsers read it so, by stripping blanks or NUL, and that tollgate handles it as well.

use crate::harness::*;
use crate::support::Puma;

const PATH: &str = "/api/v3/projects";

struct Row {
    name: &'static str,
    /// `None`: an unrelated name.
    stands_for: Option<&'static str>,
    readers: &'static str,
}

fn rows() -> Vec<Row> {
    let row = |line: &'static str| {
        let [name, stands_for, readers] = line.split('\t').collect::<Vec<_>>().try_into().unwrap();
        Row { name, stands_for: Some(stands_for).filter(|name| *name != "-"), readers }
    };
    let rows: Vec<_> = include_str!("names.tsv").lines().map(row).collect();
    assert_eq!(rows.len(), 418);
    for reader in ["rack", "php", "qs"] {
        let read = rows.iter().filter(|row| row.readers == "all" || row.readers.split(' ').any(|name| name == reader));
        assert!(read.count() > 50, "{reader}");
    }
    rows
}

/// A request for each name, in a query and in a form.
pub(crate) fn requests() -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for Row { name, .. } in rows() {
        let head = format!("GET {PATH}?a=1&{name}=9000&b=%41 HTTP/1.1\r\nHost: h\r\nPRIVATE-TOKEN: {GOOD}\r\n\r\n");
        all.push((format!("query {name}"), head.into_bytes()));
        let body = format!("a=1&{name}=9000");
        let form = format!(
            "POST {PATH} HTTP/1.1\r\nHost: h\r\nPRIVATE-TOKEN: {GOOD}\r\n\
             Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        all.push((format!("form {name}"), form.into_bytes()));
    }
    all
}

fn ask(gateway: &Gateway, query: &str) -> u16 {
    gateway.ask(&format!("GET {PATH}?{query} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\n\n")).status
}

/// The status for a query parameter of this meaning; `None` if it is forwarded within bounds.
fn answer_to(stands_for: &str) -> Option<u16> {
    match stands_for {
        "private_token" | "access_token" => Some(401),
        "sudo" => Some(403),
        "_method" => Some(400),
        _ => None,
    }
}

#[test]
fn a_name_is_judged_in_a_query_when_one_reader_knows_it() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let (mut refused, mut bounded, mut passed) = (0, 0, 0);
    for Row { name, stands_for, readers } in rows() {
        // The exact name of the token with the right value is the only accepted spelling.
        let (query, rest) = (format!("a=1&{name}=9000&b=%41"), "a=1&b=%41");
        let status = ask(&gateway, &query);
        let seen = upstream.seen();
        upstream.forget();
        match stands_for.map(answer_to) {
            Some(Some(expected)) => {
                assert_eq!((status, seen.len()), (expected, 0), "{name}, read by {readers}");
                refused += 1;
            }
            Some(None) => {
                let bounded_to = if stands_for == Some("page") { "page=9000" } else { "per_page=100" };
                let query = seen[0].target.split_once('?').unwrap().1;
                assert_eq!(status, 200);
                assert!(
                    query == rest || query == format!("a=1&{bounded_to}&b=%41"),
                    "{name}, read by {readers}: {query}"
                );
                bounded += 1;
            }
            None => {
                assert_eq!(status, 200, "{name} has no meaning");
                assert_eq!(seen[0].target, format!("{PATH}?{query}"), "{name} has no meaning");
                passed += 1;
            }
        }
    }
    assert_eq!((refused, bounded, passed), REFUSED_BOUNDED_PASSED);
}

const REFUSED_BOUNDED_PASSED: (usize, usize, usize) = (123, 57, 238);

/// The same for a configured token name; the default name has no meaning then.
#[test]
fn a_configured_name_is_judged_in_the_same_spellings() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "[token]\nquery = \"api_key\"\n");
    let mut seen = 0;
    for Row { name, stands_for, readers } in rows() {
        if !(name.contains("private") && name.contains("token")) {
            continue;
        }
        let other = name.replace("private", "api").replace("token", "key");
        let expected = if stands_for.is_some() { 401 } else { 200 };
        assert_eq!(ask(&gateway, &format!("{other}=x")), expected, "{other}, as {name} is read by {readers}");
        assert_eq!(ask(&gateway, &format!("{name}=x")), 200, "{name}");
        seen += 1;
    }
    assert!(seen > 100, "{seen}");
}

/// A configured token name that is also the name of another credential is the token's.
#[test]
fn a_configured_name_outranks_the_names_of_other_credentials() {
    let upstream = Upstream::start();
    for name in ["access_token", "job_token"] {
        let gateway = Gateway::start(upstream.address, &format!("[token]\nquery = \"{name}\"\n"));
        assert_eq!(gateway.ask(&format!("GET {PATH}?{name}={GOOD} HTTP/1.1\nHost: h\n\n")).status, 200, "{name}");
        assert_eq!(upstream.only().target, PATH);
        upstream.forget();
        assert_eq!(ask(&gateway, &format!("{name}={BAD}")), 401);
    }
}

#[test]
fn a_name_is_judged_in_a_form_when_one_reader_knows_it() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let (mut refused, mut passed) = (0, 0);
    for Row { name, stands_for, readers } in rows() {
        let body = format!("a=1&{name}=9000&b=%41");
        let status = gateway
            .ask(&format!(
                "POST {PATH} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\nContent-Type: application/x-www-form-urlencoded\nContent-Length: {}\n\n{body}",
                body.len()
            ))
            .status;
        match stands_for.and_then(answer_to) {
            Some(expected) => {
                assert_eq!(status, expected, "{name}, read by {readers}");
                refused += 1;
            }
            None => {
                assert_eq!(status, 200, "{name}, read by {readers}");
                passed += 1;
            }
        }
    }
    assert_eq!(refused + passed, rows().len());
    assert!(refused > 100 && passed > 100, "{refused} and {passed}");
}

/// body-parser (Express) removes a byte order mark before a form.
#[test]
fn a_byte_order_mark_hides_no_name_of_a_form() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    for (body, status) in [("\u{feff}private_token=x", 401), ("\u{feff}sudo=x", 403), ("\u{feff}title=x", 200)] {
        let answer = gateway.ask(&format!(
            "POST {PATH} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\nContent-Type: application/x-www-form-urlencoded\nContent-Length: {}\n\n{body}",
            body.len()
        ));
        assert_eq!(answer.status, status, "{body:?}");
    }
}

/// Django decodes a query with the charset of the request's Content-Type, whatever the method and the type. Django 5.2 read
/// each row up to the empty line as `private_token`.
#[test]
fn a_charset_that_changes_the_query_is_refused() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let mut refused = 0;
    for (content_type, query) in [
        ("text/plain; charset=utf-7", "private+AF8-token=x"),
        ("text/plain; charset=utf-7", "private%2BAF8-token=x"),
        ("x; charset=unicode_escape", "private%5C137token=x"),
        ("; charset=unicode_escape", "private\\137token=x"),
        ("a/b; charset=iso-2022-jp", "%1B%28Jprivate_token=x"),
        ("a/b; charset=utf-8-sig", "%EF%BB%BFprivate_token%20=x"),
        ("a/b; charset*=utf-8''utf-7", "private%2BAF8-token=x"),
        ("a/b; Charset=\"utf-7\"", "private%2BAF8-token=x"),
        ("a/b; charset=\"utf-8\"; charset=utf-7", "private%2BAF8-token=x"),
        ("a/b; charset=UTF7", "private%2BAF8-token=x"),
        ("a/b; charset =utf-7", "private%2BAF8-token=x"),
        ("a/b; charset\u{a0}=utf-7", "private%2BAF8-token=x"),
        ("a/b; charset= utf-7", "private%2BAF8-token=x"),
        // Other codecs of Python that decode other bytes to ASCII.
        ("a/b; charset=hz", "x=1"),
        ("a/b; charset=cp037", "x=1"),
        ("a/b; charset=utf-16", "x=1"),
        ("a/b; charset=UTF-32LE", "x=1"),
        ("a/b; charset=punycode", "x=1"),
        ("a/b; charset=raw_unicode_escape", "x=1"),
        ("a/b; charset=iso-2022-kr", "x=1"),
        ("a/b; charset=", "x=1"),
    ] {
        for method in ["GET", "POST", "DELETE"] {
            let head =
                format!("{method} {PATH}?{query} HTTP/1.1\r\nHost: h\r\nPRIVATE-TOKEN: {GOOD}\r\nContent-Type: ");
            let type_bytes = content_type.chars().map(|c| c as u8).collect::<Vec<u8>>();
            let mut client = gateway.client();
            client.send(&[head.as_bytes(), &type_bytes, b"\r\n\r\n"].concat());
            let status = client.answer().status;
            // A refusal because of the type is accepted as well.
            assert!(matches!(status, 400 | 401 | 415), "{content_type} {query}: {status}");
            refused += 1;
        }
    }
    assert_eq!((refused, upstream.seen().len()), (63, 0));
    for content_type in [
        "text/plain; charset=utf-8",
        "application/json;charset=UTF-8",
        "text/plain; charset=\"us-ascii\"",
        "application/json; charset=ISO-8859-1",
        "text/html; charset=windows-1252",
        "text/csv; charset=Shift_JIS",
        "text/x-charset-test",
        "application/json",
    ] {
        let target = format!("{PATH}?a=1&b=%2BAF8-");
        let head = format!("GET {target} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\nContent-Type: {content_type}\n\n");
        assert_eq!(gateway.ask(&head).status, 200, "{content_type}");
        assert_eq!(upstream.only().target, target);
        upstream.forget();
    }
    // Without a query there is nothing to decode.
    let head =
        format!("GET {PATH} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\nContent-Type: text/plain; charset=utf-16\n\n");
    assert_eq!(gateway.ask(&head).status, 200);
}

/// Browsers do not encode these (WHATWG URL); a real Puma accepts them, and they arrive byte for byte.
#[test]
fn what_browsers_send_raw_gets_to_a_real_puma() {
    let puma = Puma::start("rack_probe.ru", "unused=nobody");
    let gateway = Gateway::start(puma.address, "");
    let mut client = gateway.client();
    let mut seen = 0;
    for (place, bytes) in [("path", "[]|^!$&'()*+,;=:@~"), ("query", "[]|^\\`{}!$'()*+,:@/?~")] {
        for byte in bytes.chars() {
            let (path, query) = match place {
                "path" => (format!("/api/v3/a{byte}b"), "x=1".to_owned()),
                _ => ("/api/v3/a".to_owned(), format!("x=a{byte}b&y{byte}=1")),
            };
            client.send_head(&format!("GET {path}?{query} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\n\n"));
            let answer = client.answer();
            let body: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
            assert_eq!(answer.status, 200, "{byte} in a {place}: {body}");
            assert_eq!((body["path"].as_str(), body["query"].as_str()), (Some(&*path), Some(&*query)));
            seen += 1;
        }
    }
    assert_eq!(seen, 18 + 21);
    let lines = gateway.access_log();
    assert!(lines.iter().any(|line| line["query"] == "x=a\\b&y\\=1"), "the log escapes what JSON must");
    assert!(lines.iter().any(|line| line["path"] == "/api/v3/a[b"));
}

/// Raw and encoded they are the same path to a backend, so scopes and routes must match both.
#[test]
fn raw_bytes_of_browsers_get_around_no_scope() {
    let upstream = Upstream::start();
    let token = format!("[[token]]\nsha256 = \"{}\"\nuser = \"x\"\nscopes = [\"read_user\"]\n", sha256_hex(GOOD));
    let gateway = Gateway::start_with_tokens(upstream.address, &token, "[api]\nscopes = \"gitlab\"\n");
    for byte in ["[", "]", "|", "^", "%5B", "%5d", "%7C", "%5E"] {
        for (path, status) in [
            (format!("/api/v3/user/{byte}"), 200),
            (format!("/api/v3/user{byte}"), 403),
            (format!("/api/v3/{byte}/user"), 403),
            (format!("/api/v3{byte}/user"), 404),
            (format!("/api/v3/user/{byte}/../x"), 400),
        ] {
            assert_eq!(gateway.get(&path).status, status, "{path}");
        }
    }
}
