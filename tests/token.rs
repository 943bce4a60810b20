//! Tokens: where they are accepted, what is refused, and what the backend gets.

use crate::harness::*;

const PATH: &str = "/api/v3/projects";

fn get(target: &str, headers: &str) -> String {
    format!("GET {target} HTTP/1.1\nHost: h.test\n{headers}\n")
}

fn post(headers: &str, body: &str) -> String {
    format!("POST {PATH} HTTP/1.1\nHost: h.test\n{headers}Content-Length: {}\n\n{body}", body.len())
}

/// A request whose body is sent unchanged, with or without CRLF.
fn post_bytes(headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("POST {PATH} HTTP/1.1\nHost: h.test\n{headers}Content-Length: {}\n\n", body.len());
    [head.replace('\n', "\r\n").as_bytes(), body].concat()
}

fn ask_bytes(gateway: &Gateway, bytes: &[u8]) -> Answer {
    let mut client = gateway.client();
    client.send(bytes);
    client.answer()
}

fn chunked(pieces: &[&str]) -> String {
    let chunks: String = pieces.iter().map(|piece| format!("{:x}\r\n{piece}\r\n", piece.len())).collect();
    format!("{chunks}0\r\n\r\n")
}

/// A response without the two fields that differ in each response.
fn look(answer: &Answer) -> String {
    let fields: Vec<String> = answer
        .headers
        .iter()
        .map(|(name, value)| match name.to_ascii_lowercase().as_str() {
            "date" | "x-request-id" => format!("{name}: *"),
            _ => format!("{name}: {value}"),
        })
        .collect();
    format!("{}\n{}\n\n{}", answer.status, fields.join("\n"), answer.text())
}

/// Every request must get 401 and must not reach the backend.
fn all_refused(gateway: &Gateway, upstream: &Upstream, requests: &[String]) {
    for request in requests {
        let answer = gateway.ask(request);
        assert_eq!((answer.status, answer.text()), (401, "{\"message\":\"401 Unauthorized\"}".into()), "{request}");
        assert_eq!(upstream.seen().len(), 0, "{request}");
    }
}

/// Every request must reach the backend as `target`, with the good token in its header and no other token.
fn all_pass(gateway: &Gateway, upstream: &Upstream, requests: &[(String, &str)]) {
    for (request, target) in requests {
        let answer = gateway.ask(request);
        assert_eq!(answer.status, 200, "{request}");
        let seen = upstream.only();
        assert_eq!((seen.target.as_str(), seen.header("PRIVATE-TOKEN")), (*target, Some(GOOD)), "{request}");
        assert_eq!(seen.head.matches(GOOD).count(), 1, "{request} became {}", seen.head);
        upstream.forget();
    }
}

#[test]
fn one_token_is_taken_from_header_query_or_bearer() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let escaped = GOOD.replace('-', "%2D");
    all_pass(
        &gateway,
        &upstream,
        &[
            (get(PATH, &format!("PRIVATE-TOKEN: {GOOD}\n")), PATH),
            (get(PATH, &format!("private-token: {GOOD}\n")), PATH),
            (get(PATH, &format!("pRiVaTe-ToKeN:{GOOD}\n")), PATH),
            (get(PATH, &format!("PRIVATE-TOKEN: \t {GOOD} \t\n")), PATH),
            (get(PATH, &format!("Authorization: Bearer {GOOD}\n")), PATH),
            (get(PATH, &format!("authorization: bearer   {GOOD}\n")), PATH),
            (get(&format!("{PATH}?private_token={GOOD}"), ""), PATH),
            (get(&format!("{PATH}?private_token={escaped}"), ""), PATH),
            (get(&format!("{PATH}?a=1&private_token={GOOD}&b=%41"), ""), "/api/v3/projects?a=1&b=%41"),
            (get(&format!("{PATH}?private_token={GOOD}&b="), ""), "/api/v3/projects?b="),
            (get(&format!("{PATH}?a&private_token={GOOD}"), ""), "/api/v3/projects?a"),
        ],
    );
}

#[test]
fn the_same_token_several_times_is_one_token() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let query = format!("{PATH}?private_token={GOOD}");
    let header = format!("PRIVATE-TOKEN: {GOOD}\n");
    let bearer = format!("Authorization: Bearer {GOOD}\n");
    all_pass(
        &gateway,
        &upstream,
        &[
            (get(&query, &header), PATH),
            (get(&query, &bearer), PATH),
            (get(PATH, &format!("{header}{bearer}")), PATH),
            (get(PATH, &format!("{header}private-token: {GOOD}\n")), PATH),
            (get(&format!("{query}&private_token={GOOD}"), &format!("{header}{bearer}")), PATH),
            (get(&format!("{query}&x=1&private%5Ftoken={GOOD}").replace("%5F", "_"), ""), "/api/v3/projects?x=1"),
        ],
    );
}

#[test]
fn two_different_tokens_anywhere_are_refused() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let sources = |token: &str| {
        [
            (String::new(), format!("PRIVATE-TOKEN: {token}\n")),
            (format!("&private_token={token}"), String::new()),
            (String::new(), format!("Authorization: Bearer {token}\n")),
        ]
    };
    let mut requests = Vec::new();
    // A valid token with another valid one, an unknown one and an empty one, in either order.
    for other in [OTHER, BAD, "", &GOOD.to_uppercase()] {
        for (query, header) in sources(GOOD) {
            for (other_query, other_header) in sources(other) {
                requests.push(get(&format!("{PATH}?x=1{query}{other_query}"), &format!("{header}{other_header}")));
                requests.push(get(&format!("{PATH}?x=1{other_query}{query}"), &format!("{other_header}{header}")));
            }
        }
    }
    // Without `=`, Rack reads nil.
    requests.push(get(&format!("{PATH}?private_token"), &format!("PRIVATE-TOKEN: {GOOD}\n")));
    all_refused(&gateway, &upstream, &requests);
}

#[test]
fn what_is_no_token_is_refused() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let long = "a".repeat(256);
    let mut requests = vec![get(PATH, ""), get(PATH, &format!("Authorization: Basic {GOOD}\n"))];
    for token in ["", " ", BAD, "good token", &format!("{GOOD} {GOOD}"), "caf\u{e9}", &long, &format!("\"{GOOD}\"")] {
        requests.push(get(PATH, &format!("PRIVATE-TOKEN: {token}\n")));
        requests.push(get(PATH, &format!("Authorization: Bearer {token}\n")));
    }
    // The query is decoded once, and not trimmed or case-folded.
    let cased = GOOD.to_uppercase();
    let (space, plus) = (format!("%20{GOOD}"), format!("{GOOD}+"));
    let (twice, newline, nul) = (GOOD.replace('-', "%252D"), format!("{GOOD}%0A"), format!("{GOOD}%00"));
    for value in ["", "%20", "+", BAD, &cased, &space, &plus, &twice, &newline, &nul, &long, "%C3%A9"] {
        requests.push(get(&format!("{PATH}?private_token={value}"), ""));
    }
    requests.push(get(&format!("{PATH}?private_token"), ""));
    requests.push(get(PATH, &format!("PRIVATE-TOKEN: {cased}\n")));
    requests.push(get(PATH, "Authorization: Bearer\n"));
    requests.push(get(PATH, &format!("Authorization: Bearer{GOOD}\n")));
    all_refused(&gateway, &upstream, &requests);
}

#[test]
fn tokens_may_have_up_to_255_bytes() {
    let upstream = Upstream::start();
    let (longest, too_long) = ("a".repeat(255), "a".repeat(256));
    let tokens: String = [&longest, &too_long]
        .iter()
        .map(|token| format!("[[token]]\nsha256 = \"{}\"\nuser = \"u{}\"\n", sha256_hex(token), token.len()))
        .collect();
    let gateway = Gateway::start_with_tokens(upstream.address, &tokens, "");
    assert_eq!(gateway.ask(&get(PATH, &format!("PRIVATE-TOKEN: {longest}\n"))).status, 200);
    // It is refused although the store has it.
    assert_eq!(gateway.ask(&get(PATH, &format!("PRIVATE-TOKEN: {too_long}\n"))).status, 401);
    assert_eq!(gateway.ask(&get(&format!("{PATH}?private_token={too_long}"), "")).status, 401);
}

#[test]
fn bearer_is_no_source_when_it_is_switched_off() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "[token]\nbearer = false\n");
    all_refused(&gateway, &upstream, &[get(PATH, &format!("Authorization: Bearer {GOOD}\n"))]);
    // So it cannot conflict; it is an ordinary Authorization, and removed as such.
    let beside = get(PATH, &format!("PRIVATE-TOKEN: {GOOD}\nAuthorization: Bearer {OTHER}\n"));
    assert_eq!(gateway.ask(&beside).status, 200);
    let seen = upstream.only();
    assert_eq!((seen.header("PRIVATE-TOKEN"), seen.header("Authorization")), (Some(GOOD), None));
}

/// Rack versions differ in these names, so they are refused together with the same good token and alone.
#[test]
fn query_names_that_rack_reads_as_the_token_are_refused() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let mut requests = Vec::new();
    for query in [
        "%70rivate_token=@",
        "private%5ftoken=@",
        "%5Bprivate_token%5D=@",
        "[private_token]=@",
        "[private_token=@",
        "private_token]=@",
        "]private_token=@",
        "private_token[]=@",
        "private_token[x]=@",
        "private_token[x][y]=@",
        "private_token%5B%5D=@",
        "x=1;private_token=@",
        "private_token=@;x=1",
        ";private_token=@",
        "x=1&+private_token=@",
        "x=1&%20private_token=@",
        "x=1&%09private_token=@",
        "private_token+=@",
        "private_token%20=@",
        "%70rivate_token",
        "private_token[]",
    ] {
        let target = format!("{PATH}?{}", query.replace('@', GOOD));
        requests.push(get(&target, ""));
        requests.push(get(&target, &format!("PRIVATE-TOKEN: {GOOD}\n")));
        requests.push(get(&target.replace(GOOD, OTHER), &format!("PRIVATE-TOKEN: {GOOD}\n")));
        requests.push(get(&format!("{target}&private_token={GOOD}"), ""));
    }
    all_refused(&gateway, &upstream, &requests);
}

#[test]
fn other_query_names_are_the_backends_business() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    for query in ["PRIVATE_TOKEN=x", "private-token=x", "xprivate_token=x", "private_token2=x", "private%255Ftoken=x"] {
        let target = format!("{PATH}?{query}");
        assert_eq!(gateway.ask(&get(&target, "")).status, 401, "{query} alone is no credential");
        assert_eq!(gateway.get(&target).status, 200, "{query}");
        assert_eq!(upstream.only().target, target);
        upstream.forget();
    }
}

#[test]
fn an_alias_of_the_token_header_is_never_a_credential_and_never_forwarded() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    for alias in [
        "PRIVATE_TOKEN",
        "Private_Token",
        "PRIVATE.TOKEN",
        "private_token",
        "PRIVATE~TOKEN",
        "PRIVATE|TOKEN",
        "PRIVATE'TOKEN",
    ] {
        all_refused(&gateway, &upstream, &[get(PATH, &format!("{alias}: {GOOD}\n"))]);
        // Not a conflict either: it is ignored.
        let beside = get(PATH, &format!("{alias}: {OTHER}\nPRIVATE-TOKEN: {GOOD}\n"));
        assert_eq!(gateway.ask(&beside).status, 200, "{alias}");
        let seen = upstream.only();
        assert!(!seen.head.contains(OTHER) && seen.header(alias).is_none(), "{}", seen.head);
        upstream.forget();
    }
}

#[test]
fn a_configured_header_and_parameter_follow_the_same_rules() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "[token]\nheader = \"X-Api-Key\"\nquery = \"api_key\"\n");
    for request in [get(PATH, &format!("x-api-key: {GOOD}\n")), get(&format!("{PATH}?api_key={GOOD}"), "")] {
        assert_eq!(gateway.ask(&request).status, 200, "{request}");
        let seen = upstream.only();
        assert_eq!((seen.target.as_str(), seen.header("X-Api-Key")), (PATH, Some(GOOD)));
        upstream.forget();
    }
    all_refused(
        &gateway,
        &upstream,
        &[
            get(PATH, &format!("X_Api_Key: {GOOD}\n")),
            get(PATH, &format!("PRIVATE-TOKEN: {GOOD}\n")),
            get(&format!("{PATH}?api%5Fkey={GOOD}"), ""),
            get(&format!("{PATH}?api_key={OTHER}"), &format!("X-Api-Key: {GOOD}\n")),
        ],
    );
}

#[test]
fn a_token_in_a_cookie_a_fragment_or_a_matrix_parameter_is_no_credential() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    for (target, headers, status) in [
        (PATH.to_owned(), format!("Cookie: private_token={GOOD}\n"), 401),
        (format!("{PATH};private_token={GOOD}"), String::new(), 401),
        (format!("{PATH}#private_token={GOOD}"), String::new(), 400),
        (format!("{PATH}?x=1#private_token={GOOD}"), String::new(), 400),
    ] {
        assert_eq!(gateway.ask(&get(&target, &headers)).status, status, "{target} {headers}");
    }
    assert_eq!(upstream.seen().len(), 0);
    // With a valid token: no conflict, and the cookie is not forwarded.
    let answer = gateway.ask(&get(PATH, &format!("Cookie: private_token={OTHER}\nPRIVATE-TOKEN: {GOOD}\n")));
    assert_eq!((answer.status, upstream.only().header("Cookie")), (200, None));
}

#[test]
fn a_token_in_a_trailer_is_no_credential_and_is_not_forwarded() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let request = |headers: &str, token: &str| {
        format!(
            "POST {PATH} HTTP/1.1\nHost: h\n{headers}Content-Type: text/plain\nTransfer-Encoding: chunked\n\
             Trailer: PRIVATE-TOKEN\n\n3\nabc\n0\nPRIVATE-TOKEN: {token}\nX-Tollgate-User: root\n\n"
        )
    };
    all_refused(&gateway, &upstream, &[request("", GOOD)]);
    // The strict upstream fails the test if the trailers are forwarded.
    assert_eq!(gateway.ask(&request(&format!("PRIVATE-TOKEN: {GOOD}\n"), OTHER)).status, 200);
    let seen = upstream.only();
    assert_eq!(
        (seen.body.as_slice(), seen.header("PRIVATE-TOKEN"), seen.header("Trailer")),
        (&b"abc"[..], Some(GOOD), None)
    );
}

/// Content-Type and body of requests for which Rack would act for another user.
fn bodies_with_a_token() -> Vec<(&'static str, String)> {
    let form = "application/x-www-form-urlencoded";
    let multipart = "multipart/form-data; boundary=XX";
    let part = |head: &str| {
        format!(
            "--XX\r\nContent-Disposition: form-data; name=\"title\"\r\n\r\nhello\r\n--XX\r\n{head}\r\n\r\n{OTHER}\r\n--XX--\r\n"
        )
    };
    let mut bodies = vec![
        (form, format!("private_token={OTHER}")),
        (form, format!("title=hello&private_token={OTHER}&x=1")),
        (form, format!("title=hello;private_token={OTHER}")),
        (form, format!("a=1&%70rivate%5ftoken={OTHER}")),
        (form, format!("a=1&[private_token]={OTHER}")),
        (form, format!("a=1&private_token[]={OTHER}")),
        (form, format!("a=1&+private_token={OTHER}")),
        // The same token as in the header is another source, and refused like any other.
        (form, format!("private_token={GOOD}")),
        (form, "a=1&private_token".into()),
        ("", format!("a=1&private_token={OTHER}")),
        ("application/json", format!("{{\"private_token\":\"{OTHER}\"}}")),
        ("application/json", format!("{{\"a\":{{\"b\":[\"}}\"]}},\"private_token\":\"{OTHER}\"}}")),
        ("application/json; charset=utf-8", format!(" {{\"private\\u005ftoken\":\"{OTHER}\"}}")),
        ("application/vnd.api+json", format!("{{\"a\":1,\"private_token\":\"{OTHER}\"}}")),
    ];
    for head in [
        "Content-Disposition: form-data; name=\"private_token\"",
        "content-disposition: form-data; name=private_token",
        "Content-Disposition: form-data; filename=\"a\"; name=\"private_token\"",
        "Content-Disposition: form-data; name=\"private_token[]\"",
        "Content-Disposition: form-data; name=\"[private_token]\"",
    ] {
        bodies.push((multipart, part(head)));
    }
    bodies
}

fn type_line(content_type: &str) -> String {
    if content_type.is_empty() { String::new() } else { format!("Content-Type: {content_type}\n") }
}

#[test]
fn a_token_field_in_a_body_is_refused_and_the_upstream_request_aborted() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    for (content_type, body) in bodies_with_a_token() {
        let headers = format!("PRIVATE-TOKEN: {GOOD}\n{}", type_line(content_type));
        let with_length = post_bytes(&headers, body.as_bytes());
        let in_chunks = format!("POST {PATH} HTTP/1.1\nHost: h\n{headers}Transfer-Encoding: chunked\n\n");
        let (first, rest) = body.split_at(body.len() / 2);
        let in_chunks = in_chunks.replace('\n', "\r\n") + &chunked(&[first, rest]);
        for request in [with_length, in_chunks.into_bytes()] {
            let answer = ask_bytes(&gateway, &request);
            let what = format!("{content_type}: {body}");
            assert_eq!((answer.status, answer.text()), (401, "{\"message\":\"401 Unauthorized\"}".into()), "{what}");
        }
    }
    // A later request has reached the backend: the earlier ones will not.
    assert_eq!(gateway.get("/api/v3/last").status, 200);
    let complete: Vec<_> = upstream.seen().into_iter().filter(|seen| seen.complete).map(|seen| seen.target).collect();
    assert_eq!(complete, ["/api/v3/last"]);
}

/// A field is found wherever the body is split into packets.
#[test]
fn a_token_field_is_found_across_tcp_segments() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    for (content_type, body) in [
        ("application/x-www-form-urlencoded", format!("a=1&private_token={OTHER}")),
        ("application/json", format!("{{\"a\":1,\"private_token\":\"{OTHER}\"}}")),
        (
            "multipart/form-data; boundary=XX",
            format!("--XX\r\nContent-Disposition: form-data; name=\"private_token\"\r\n\r\n{OTHER}\r\n--XX--\r\n"),
        ),
    ] {
        let mut client = gateway.client();
        client.send_head(&format!(
            "POST {PATH} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\nContent-Type: {content_type}\nContent-Length: {}\n\n",
            body.len()
        ));
        // The response may arrive, and the connection end, before everything is sent.
        for byte in body.as_bytes() {
            if std::io::Write::write_all(&mut client.socket, &[*byte]).is_err() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert_eq!(client.answer().status, 401, "{content_type}");
    }
    assert!(upstream.seen().iter().all(|seen| !seen.complete), "{:?}", upstream.seen());
}

#[test]
fn bodies_without_a_token_field_pass_byte_for_byte() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    for (content_type, body) in [
        ("application/x-www-form-urlencoded", "title=private_token%3D1&b=%26private_token%3D2"),
        ("application/x-www-form-urlencoded", "PRIVATE_TOKEN=1&xprivate_token=2"),
        ("application/json", "{\"a\":{\"private_token\":1},\"b\":\"private_token\"}"),
        ("application/json", "[{\"private_token\":1}]"),
        (
            "multipart/form-data; boundary=XX",
            "--XX\r\nContent-Disposition: form-data; name=\"f\"; filename=\"private_token\"\r\n\r\nprivate_token=1\r\n--XX--\r\n",
        ),
        ("application/octet-stream", "private_token=1&private_token=2"),
    ] {
        let headers = format!("PRIVATE-TOKEN: {GOOD}\nContent-Type: {content_type}\n");
        let answer = ask_bytes(&gateway, &post_bytes(&headers, body.as_bytes()));
        assert_eq!(answer.status, 200, "{content_type}: {body}");
        assert_eq!(String::from_utf8_lossy(&upstream.only().body), body);
        upstream.forget();
    }
}

#[test]
fn bodies_are_not_looked_at_when_told_so() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "[token]\nbody = \"ignore\"\n");
    for (content_type, body) in bodies_with_a_token() {
        let headers = format!("PRIVATE-TOKEN: {GOOD}\n{}", type_line(content_type));
        assert_eq!(ask_bytes(&gateway, &post_bytes(&headers, body.as_bytes())).status, 200, "{content_type}: {body}");
        assert_eq!(String::from_utf8_lossy(&upstream.only().body), body);
        upstream.forget();
    }
}

#[test]
fn access_and_bearer_token_parameters_are_a_switch_of_their_own() {
    let upstream = Upstream::start();
    let header = format!("PRIVATE-TOKEN: {GOOD}\n");
    // The head of a request with a refused body may reach the backend late, so each gets its own backend.
    let aside = Upstream::start();
    let judging_bodies = Gateway::start(aside.address, "");
    let closed = Gateway::start(upstream.address, "");
    let open = Gateway::start(upstream.address, "[token]\naccess_token = \"allow\"\n");
    for name in ["access_token", "bearer_token"] {
        let target = format!("{PATH}?a=1&{name}={OTHER}");
        let mut requests = vec![get(&target, &header), get(&target, "")];
        for spelling in [format!("[{name}]"), format!("{name}[]"), name.replace('_', "%5F"), format!("+{name}")] {
            requests.push(get(&format!("{PATH}?a=1&{spelling}={GOOD}"), &header));
        }
        all_refused(&closed, &upstream, &requests);
        let body = ask_bytes(&judging_bodies, &post_bytes(&header, format!("{name}={OTHER}").as_bytes()));
        assert_eq!(body.status, 401, "{name} in a form");

        assert_eq!(open.ask(&get(&target, &header)).status, 200);
        assert_eq!(upstream.only().target, target, "allowed and forwarded unchanged");
        upstream.forget();
        assert_eq!(open.ask(&get(&target, "")).status, 401, "{name} alone does not stand for the token");
        assert_eq!(open.ask(&post(&header, &format!("{name}={OTHER}"))).status, 200);
        upstream.forget();
    }
}

#[test]
fn job_tokens_are_a_switch_of_their_own() {
    let upstream = Upstream::start();
    let header = format!("PRIVATE-TOKEN: {GOOD}\n");
    let aside = Upstream::start();
    let judging_bodies = Gateway::start(aside.address, "");
    let closed = Gateway::start(upstream.address, "");
    let open = Gateway::start(upstream.address, "[token]\njob_token = \"allow\"\n");
    let target = format!("{PATH}?job_token=x");
    all_refused(&closed, &upstream, &[get(&target, &header), get(&target, "")]);
    assert_eq!(ask_bytes(&judging_bodies, &post_bytes(&header, b"job_token=x")).status, 401);
    assert_eq!(open.ask(&get(&target, &header)).status, 200);
    assert_eq!(upstream.only().target, target);
    upstream.forget();
    for name in ["JOB-TOKEN", "Deploy-Token", "build-token"] {
        all_refused(&closed, &upstream, &[get(PATH, &format!("{name}: {GOOD}\n"))]);
        let request = get(PATH, &format!("{header}{name}: secret\n{}: secret\n", name.replace('-', "_")));
        for (gateway, forwarded) in [(&closed, None), (&open, Some("secret"))] {
            assert_eq!(gateway.ask(&request).status, 200, "{name}");
            let seen = upstream.only();
            assert_eq!(seen.header(name), forwarded);
            assert_eq!(seen.header(&name.replace('-', "_")), None, "a spelling that CGI reads as {name}");
            upstream.forget();
        }
    }
}

#[test]
fn sudo_is_a_switch_of_its_own() {
    let upstream = Upstream::start();
    let header = format!("PRIVATE-TOKEN: {GOOD}\n");
    let closed = Gateway::start(upstream.address, "");
    let open = Gateway::start(upstream.address, "[token]\nsudo = \"allow\"\n");
    for (query, field) in [
        ("?sudo=root", ""),
        ("", "SUDO: root\n"),
        ("", "sudo: root\n"),
        ("?[sudo]=root", ""),
        ("?%73udo=root", ""),
        ("?sudo[]=root", ""),
        ("?x=1;sudo=root", ""),
    ] {
        let request = get(&format!("{PATH}{query}"), &format!("{header}{field}"));
        let answer = closed.ask(&request);
        assert_eq!((answer.status, upstream.seen().len()), (403, 0), "{request}");
        assert_eq!(open.ask(&request).status, 200, "{request}");
        let seen = upstream.only();
        assert_eq!(seen.target, format!("{PATH}{query}"));
        assert_eq!(seen.header("sudo").is_some(), !field.is_empty());
        upstream.forget();
    }
    // A 403 must not reveal what the token may do.
    assert_eq!(closed.ask(&get(&format!("{PATH}?sudo=root"), &format!("PRIVATE-TOKEN: {BAD}\n"))).status, 401);
    assert_eq!(ask_bytes(&closed, &post_bytes(&header, b"sudo=root")).status, 403);
    assert!(upstream.seen().iter().all(|seen| !seen.complete));
}

#[test]
fn cookies_and_other_authorization_are_stripped_unless_allowed() {
    let upstream = Upstream::start();
    let request = get(PATH, &format!("PRIVATE-TOKEN: {GOOD}\nCookie: _gitlab_session=1\nAuthorization: Basic eDp5\n"));
    for (config, cookie, authorization) in [
        ("", None, None),
        ("[token]\ncookies = \"allow\"\n", Some("_gitlab_session=1"), None),
        ("[token]\nauthorization = \"allow\"\n", None, Some("Basic eDp5")),
    ] {
        let gateway = Gateway::start(upstream.address, config);
        assert_eq!(gateway.ask(&request).status, 200, "{config}");
        let seen = upstream.only();
        assert_eq!((seen.header("Cookie"), seen.header("Authorization")), (cookie, authorization), "{config}");
        upstream.forget();
    }
    // A Bearer token is forwarded as the single credential, also if other schemes are forwarded.
    let gateway = Gateway::start(upstream.address, "[token]\nauthorization = \"allow\"\n");
    assert_eq!(gateway.ask(&get(PATH, &format!("Authorization: Bearer {GOOD}\n"))).status, 200);
    let seen = upstream.only();
    assert_eq!((seen.header("PRIVATE-TOKEN"), seen.header("Authorization")), (Some(GOOD), None));
}

/// Every refusal of a credential is the same response to the client.
#[test]
fn refusals_of_a_credential_look_the_same() {
    let upstream = Upstream::start();
    let tokens = format!(
        "[[token]]\nsha256 = \"{}\"\nuser = \"good\"\n[[token]]\nsha256 = \"{}\"\nuser = \"gone\"\nexpires = \"2001-01-01T00:00:00Z\"\n",
        sha256_hex(GOOD),
        sha256_hex(OTHER)
    );
    let config = "[[route]]\npath = \"/api/v3/strict\"\nquery_token = \"refuse\"\n";
    let gateway = Gateway::start_with_tokens(upstream.address, &tokens, config);
    let header = format!("PRIVATE-TOKEN: {GOOD}\n");
    let cases = [
        ("missing", PATH.to_owned(), String::new()),
        ("empty", PATH.into(), "PRIVATE-TOKEN:\n".into()),
        ("unknown", PATH.into(), format!("PRIVATE-TOKEN: {BAD}\n")),
        ("expired", PATH.into(), format!("PRIVATE-TOKEN: {OTHER}\n")),
        ("too long", PATH.into(), format!("PRIVATE-TOKEN: {}\n", "a".repeat(300))),
        ("bad byte", PATH.into(), "PRIVATE-TOKEN: a b\n".into()),
        ("conflict", format!("{PATH}?private_token={BAD}"), header.clone()),
        ("spelling", format!("{PATH}?[private_token]={GOOD}"), String::new()),
        ("other credential", format!("{PATH}?access_token={GOOD}"), header.clone()),
        ("query refused", format!("/api/v3/strict?private_token={GOOD}"), String::new()),
        ("unknown bearer", PATH.into(), format!("Authorization: Bearer {BAD}\n")),
        ("alias", PATH.into(), format!("PRIVATE_TOKEN: {GOOD}\n")),
    ];
    for close in ["", "Connection: close\n"] {
        let expected = look(&gateway.ask(&get(PATH, close)));
        for (what, target, headers) in &cases {
            assert_eq!(look(&gateway.ask(&get(target, &format!("{headers}{close}")))), expected, "{what}");
        }
    }
    // A body is checked while it is forwarded; the connection ends with the response.
    let expected = look(&gateway.ask(&get(PATH, "Connection: close\n")));
    let body = look(&gateway.ask(&post(&format!("{header}Connection: close\n"), &format!("private_token={OTHER}"))));
    assert_eq!(body, expected, "a field in the body");
}

#[test]
fn the_backend_sees_the_credential_that_is_configured() {
    let upstream = Upstream::start();
    for (forward, token, identity) in
        [("token", true, false), ("identity", false, true), ("both", true, true), ("none", false, false)]
    {
        let gateway = Gateway::start(upstream.address, &format!("[token]\nforward = \"{forward}\"\n"));
        for request in [
            get(PATH, &format!("PRIVATE-TOKEN: {GOOD}\n")),
            get(&format!("{PATH}?private_token={GOOD}"), ""),
            get(PATH, &format!("Authorization: Bearer {GOOD}\n")),
        ] {
            assert_eq!(gateway.ask(&request).status, 200, "{forward}");
            let seen = upstream.only();
            assert_eq!(seen.header("PRIVATE-TOKEN"), token.then_some(GOOD), "{forward}");
            assert_eq!(seen.header("X-Tollgate-User"), identity.then_some("user-0001"), "{forward}");
            let id = &sha256_hex(GOOD)[..12];
            assert_eq!(seen.header("X-Tollgate-Token-Id"), identity.then_some(id), "{forward}");
            assert_eq!(seen.head.matches(GOOD).count(), usize::from(token), "{forward}: {}", seen.head);
            assert_eq!(seen.target, PATH);
            upstream.forget();
        }
    }
}

#[test]
fn identity_headers_of_a_client_are_removed_in_every_spelling() {
    let upstream = Upstream::start();
    let spellings = [
        "X-Tollgate-User",
        "x-tollgate-user",
        "X-TOLLGATE-TOKEN-ID",
        "X-Tollgate-Scopes",
        "X-Tollgate-Anything",
        "X_Tollgate_User",
        "X-Tollgate_User",
        "X.Tollgate.User",
        "x_tollgate-user",
    ];
    let lines: String = spellings.iter().map(|name| format!("{name}: root\n")).collect();
    let request = get(PATH, &format!("PRIVATE-TOKEN: {GOOD}\n{lines}"));
    for forward in ["token", "identity", "both", "none"] {
        let gateway = Gateway::start(upstream.address, &format!("[token]\nforward = \"{forward}\"\n"));
        assert_eq!(gateway.ask(&request).status, 200);
        let seen = upstream.only();
        assert!(!seen.head.contains("root"), "{forward}: {}", seen.head);
        upstream.forget();
    }
    // Also without a lookup.
    let config = "[[route]]\npath = \"/api/v3/open\"\nauth = \"none\"\nreason = \"test\"\npass_token = true\n";
    let gateway = Gateway::start(upstream.address, config);
    assert_eq!(gateway.ask(&get("/api/v3/open", &lines)).status, 200);
    assert!(!upstream.only().head.contains("root"));
}

#[test]
fn an_optional_route_judges_a_token_that_is_there() {
    let upstream = Upstream::start();
    let config = "[[route]]\npath = \"/api/v3/open\"\nauth = \"optional\"\nreason = \"test\"\n";
    let gateway = Gateway::start(upstream.address, config);
    let open = "/api/v3/open";
    assert_eq!(gateway.ask(&get(open, "")).status, 200);
    assert_eq!(upstream.only().header("PRIVATE-TOKEN"), None);
    upstream.forget();
    all_pass(
        &gateway,
        &upstream,
        &[
            (get(open, &format!("PRIVATE-TOKEN: {GOOD}\n")), open),
            (get(&format!("{open}?private_token={GOOD}"), ""), open),
        ],
    );
    all_refused(
        &gateway,
        &upstream,
        &[
            get(open, &format!("PRIVATE-TOKEN: {BAD}\n")),
            get(open, "PRIVATE-TOKEN:\n"),
            get(&format!("{open}?private_token={BAD}"), ""),
            get(&format!("{open}?private_token="), ""),
            get(&format!("{open}?[private_token]={GOOD}"), ""),
            get(&format!("{open}?access_token={GOOD}"), ""),
            get(&format!("{open}?private_token={OTHER}"), &format!("PRIVATE-TOKEN: {GOOD}\n")),
            // The route is this path with all methods, without the paths below it.
            get("/api/v3/open/below", ""),
            get("/api/v3/opened", ""),
        ],
    );
}

#[test]
fn a_route_without_auth_strips_every_token_source() {
    let upstream = Upstream::start();
    let config = "[[route]]\npath = \"/api/v3/open\"\nauth = \"none\"\nreason = \"test\"\n";
    let gateway = Gateway::start(upstream.address, config);
    for token in [GOOD, BAD] {
        let request = get(
            &format!(
                "/api/v3/open?a=1&private_token={token}&[private_token]={token}&access_token={token}&job_token={token}&b=2"
            ),
            &format!(
                "PRIVATE-TOKEN: {token}\nAuthorization: Bearer {token}\nCookie: s={token}\nJOB-TOKEN: {token}\nSUDO: root\nPRIVATE_TOKEN: {token}\n"
            ),
        );
        assert_eq!(gateway.ask(&request).status, 200);
        let seen = upstream.only();
        assert_eq!(seen.target, "/api/v3/open?a=1&b=2");
        assert!(!seen.head.contains(token) && seen.header("SUDO").is_none(), "{}", seen.head);
        upstream.forget();
    }
    assert_eq!(gateway.metric("tollgate_cache_lookups_total{result=\"miss\"}"), 0.0, "nothing is looked up");
}

#[test]
fn a_route_may_leave_tokens_to_the_backend() {
    let upstream = Upstream::start();
    let config = "[[route]]\npath = \"/api/v3/open\"\nauth = \"none\"\nreason = \"test\"\npass_token = true\n";
    let gateway = Gateway::start(upstream.address, config);
    let target = format!("/api/v3/open?private_token={BAD}&x=1");
    assert_eq!(gateway.ask(&get(&target, &format!("PRIVATE-TOKEN: {OTHER}\n"))).status, 200);
    let seen = upstream.only();
    assert_eq!((seen.target.as_str(), seen.header("PRIVATE-TOKEN")), (target.as_str(), Some(OTHER)));
    upstream.forget();
    all_refused(&gateway, &upstream, &[get(PATH, &format!("PRIVATE-TOKEN: {BAD}\n"))]);
}

#[test]
fn the_narrowest_route_decides_for_its_methods_only() {
    let upstream = Upstream::start();
    let config = "[[route]]\npath = \"/api/v3/session\"\nmethods = [\"POST\"]\nauth = \"none\"\nreason = \"login\"\n\
                  [[route]]\npath = \"/api/v3/open/*\"\nauth = \"none\"\nreason = \"test\"\n\
                  [[route]]\npath = \"/api/v3/open/closed\"\n";
    let gateway = Gateway::start(upstream.address, config);
    for (method, target, status) in [
        ("POST", "/api/v3/session", 200),
        ("POST", "/api/v3/session/", 200),
        ("POST", "/api/v3//session.json", 200),
        ("GET", "/api/v3/session", 401),
        ("PUT", "/api/v3/session", 401),
        ("POST", "/api/v3/session/x", 401),
        ("POST", "/api/v3/Session", 401),
        ("GET", "/api/v3/open/x/y", 200),
        ("GET", "/api/v3/open", 200),
        ("GET", "/api/v3/open/closed", 401),
        ("GET", "/api/v3/open//closed/", 401),
        ("GET", "/api/v3/open/%63losed.json", 401),
        ("GET", "/api/v3/openx", 401),
    ] {
        let answer = gateway.ask(&format!("{method} {target} HTTP/1.1\nHost: h\n\n"));
        assert_eq!(answer.status, status, "{method} {target}");
    }
}

#[test]
fn a_way_around_the_token_needs_a_reason_and_is_listed() {
    let folder = Folder::new("test");
    let check = |route: &str| {
        let upstream = "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n";
        let config = folder.write("c.toml", &format!("{upstream}[[route]]\npath = \"/api/v3/open\"\n{route}"));
        let output = tollgate().args(["check", "--config"]).arg(config).output().unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        (output.status.success(), said)
    };
    for auth in ["optional", "none"] {
        let (ok, said) = check(&format!("auth = \"{auth}\"\n"));
        assert!(!ok && said.contains("reason"), "{said}");
        let (ok, said) = check(&format!("auth = \"{auth}\"\nreason = \"  \"\n"));
        assert!(!ok && said.contains("reason"), "blanks are no reason: {said}");
        let (ok, said) = check(&format!("auth = \"{auth}\"\nreason = \"because of the test\"\n"));
        assert!(ok && said.contains("/api/v3/open") && said.contains("because of the test"), "{said}");
    }
    let (ok, said) = check("");
    assert!(ok && !said.contains("/api/v3/open"), "a route with a token is none to list: {said}");
}

#[test]
fn a_cors_preflight_passes_only_where_it_is_opened() {
    let upstream = Upstream::start();
    let closed = Gateway::start(upstream.address, "");
    let open = Gateway::start(upstream.address, "[api]\ncors_preflight = true\n");
    let preflight = "Origin: http://app.test\nAccess-Control-Request-Method: GET\n";
    let request = |method: &str, headers: &str| format!("{method} {PATH} HTTP/1.1\nHost: h\n{headers}\n");
    all_refused(&closed, &upstream, &[request("OPTIONS", preflight)]);
    all_refused(
        &open,
        &upstream,
        &[
            request("OPTIONS", ""),
            request("OPTIONS", "Origin: http://app.test\n"),
            request("OPTIONS", "Access-Control-Request-Method: GET\n"),
            request("GET", preflight),
            request("POST", preflight),
            request("OPTIONS", "Origin: http://app.test\nAccess_Control_Request_Method: GET\n"),
            format!("OPTIONS {PATH} HTTP/1.1\nHost: h\n{preflight}Content-Length: 3\n\nabc"),
        ],
    );
    assert_eq!(open.ask(&request("OPTIONS", preflight)).status, 200);
    let seen = upstream.only();
    assert_eq!((seen.method.as_str(), seen.header("Origin")), ("OPTIONS", Some("http://app.test")));
    upstream.forget();
    // Other fields are removed, and there is no preflight outside the API.
    let laden = format!(
        "OPTIONS {PATH}?private_token={BAD} HTTP/1.1\nHost: h\n{preflight}PRIVATE-TOKEN: {OTHER}\nCookie: a=b\nAuthorization: Bearer {BAD}\n\n"
    );
    assert_eq!(open.ask(&laden).status, 200);
    let seen = upstream.only();
    let leftovers = [BAD, OTHER, "a=b"].iter().filter(|trace| seen.head.contains(**trace)).count();
    assert_eq!((seen.target.as_str(), leftovers), (PATH, 0), "{}", seen.head);
    upstream.forget();
    assert_eq!(open.ask(&format!("OPTIONS /other HTTP/1.1\nHost: h\n{preflight}\n")).status, 404);
}

#[test]
fn a_route_can_refuse_query_tokens() {
    let upstream = Upstream::start();
    let config = "[[route]]\npath = \"/api/v3/strict/*\"\nquery_token = \"refuse\"\n";
    let gateway = Gateway::start(upstream.address, config);
    all_pass(
        &gateway,
        &upstream,
        &[
            (get("/api/v3/strict/x", &format!("PRIVATE-TOKEN: {GOOD}\n")), "/api/v3/strict/x"),
            (get("/api/v3/strict/x", &format!("Authorization: Bearer {GOOD}\n")), "/api/v3/strict/x"),
            (get(&format!("{PATH}?private_token={GOOD}"), ""), PATH),
        ],
    );
    all_refused(&gateway, &upstream, &[get(&format!("/api/v3/strict/x?private_token={GOOD}"), "")]);
}

/// A query token has leaked also if the request has a header token.
#[test]
fn a_query_token_beside_the_same_header_counts_as_a_query_token() {
    let upstream = Upstream::start();
    let config =
        "[token]\nquery_deprecation = true\n[[route]]\npath = \"/api/v3/strict/*\"\nquery_token = \"refuse\"\n";
    let gateway = Gateway::start(upstream.address, config);
    let header = format!("PRIVATE-TOKEN: {GOOD}\n");
    let answer = gateway.ask(&get(&format!("{PATH}?private_token={GOOD}"), &header));
    let deprecated = answer.header("Deprecation").is_some();
    let counted = gateway.metric("tollgate_query_tokens_total");
    let strict = gateway.ask(&get(&format!("/api/v3/strict/x?private_token={GOOD}"), &header)).status;
    assert_eq!((deprecated, counted, strict), (true, 1.0, 401));
}

#[test]
fn a_query_token_is_counted_and_deprecated_when_told_so() {
    let upstream = Upstream::start();
    for (config, deprecated) in [("", false), ("[token]\nquery_deprecation = true\n", true)] {
        let gateway = Gateway::start(upstream.address, config);
        let header = gateway.get(PATH);
        assert_eq!((header.status, header.header("Deprecation")), (200, None));
        assert_eq!(gateway.metric("tollgate_query_tokens_total"), 0.0);
        let query = gateway.ask(&get(&format!("{PATH}?private_token={GOOD}"), ""));
        assert_eq!((query.status, query.header("Deprecation").is_some()), (200, deprecated), "{config}");
        assert_eq!(gateway.metric("tollgate_query_tokens_total"), 1.0);
    }
}

#[test]
fn the_reason_of_a_refusal_goes_to_metric_and_log_only() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let answer = gateway.ask(&get(&format!("{PATH}?private_token={OTHER}"), &format!("PRIVATE-TOKEN: {GOOD}\n")));
    assert!(!look(&answer).contains("conflict"));
    eventually("the log line", || gateway.access_log().len() == 1);
    let line = &gateway.access_log()[0];
    assert_eq!((line["status"].as_u64(), line["reason"].as_str()), (Some(401), Some("conflict")), "{line}");
    let refused: f64 = gateway
        .metrics()
        .lines()
        .filter(|line| line.starts_with("tollgate_auth_total{reason=\"conflict\",result=\"refused\""))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
        .sum();
    assert_eq!(refused, 1.0);
    // A token that was looked up is logged by the first digits of its digest.
    gateway.get(PATH);
    eventually("the log line", || gateway.access_log().len() == 2);
    assert_eq!(gateway.access_log()[1]["token"].as_str(), Some(&sha256_hex(GOOD)[..12]));
}

/// Two valid ones and an unknown one. They have no word like "token" by which the log could recognise a secret.
const SECRETS: [&str; 3] = ["qX7-1111aaaa", "zP9-2222bbbb", "vK3-3333cccc"];

fn start_with_secrets(upstream: &Upstream, config: &str) -> Gateway {
    let tokens: String = SECRETS[..2]
        .iter()
        .map(|secret| format!("[[token]]\nsha256 = \"{}\"\nuser = \"u-{}\"\n", sha256_hex(secret), &secret[..3]))
        .collect();
    Gateway::start_with_tokens(upstream.address, &tokens, config)
}

/// Everything that the gateway has written to its logs.
fn everything_written(gateway: &Gateway) -> String {
    let stdout = std::fs::read_to_string(gateway.folder.0.join("stdout.log")).unwrap();
    let access = std::fs::read_to_string(gateway.folder.0.join("access.log")).unwrap();
    format!("{access}\n{stdout}\n{}\n{}", gateway.process_log(), gateway.metrics())
}

/// Sends one request after the other, and returns after which one a token was in a log.
fn leak(gateway: &Gateway, requests: &[Vec<u8>]) -> Option<String> {
    requests.iter().enumerate().find_map(|(index, request)| {
        let mut client = gateway.client();
        client.send(request);
        client.try_answer();
        eventually("the log line", || gateway.access_log().len() == index + 1);
        let written = everything_written(gateway);
        let leaked = SECRETS.iter().any(|token| written.contains(token));
        leaked.then(|| String::from_utf8_lossy(request).lines().next().unwrap_or_default().to_owned())
    })
}

#[test]
fn tokens_are_written_nowhere() {
    // A backend that returns the token, like GitLab 8.5 in Link, and breaks off one request.
    let upstream = Upstream::answering(|seen| match seen.target.as_str() {
        "/api/v3/broken" => Reply::raw("").then_close(),
        "/api/v3/odd" => Reply::raw("HTTP/1.1 200 @\r\nX: @\r\nContent-Length: x@\r\n\r\n".replace('@', SECRETS[0])),
        _ => Reply::ok("{}"),
    });
    let gateway = start_with_secrets(&upstream, "");
    let known = SECRETS[0];
    let mut requests = Vec::new();
    for token in SECRETS {
        for (target, headers) in [
            (PATH.to_owned(), format!("PRIVATE-TOKEN: {token}\n")),
            (PATH.into(), format!("Authorization: Bearer {token}\nCookie: a={token}\nJOB-TOKEN: {token}\n")),
            (format!("{PATH}?private_token={token}"), String::new()),
            (format!("{PATH}?a=1&private%5Ftoken={token}&b=2"), String::new()),
            (format!("{PATH}?[private_token]={token}"), String::new()),
            (format!("{PATH}?x=1;private_token={token}"), String::new()),
            (format!("{PATH}?private_token[]={token}"), String::new()),
            (format!("{PATH}?access_token={token}&job_token={token}"), String::new()),
            (format!("{PATH}?PRIVATE_TOKEN={token}"), String::new()),
            (format!("{PATH}?url=http%3A%2F%2Fx%3Fprivate_token%3D{token}"), String::new()),
            (format!("{PATH};private_token={token}"), format!("PRIVATE-TOKEN: {known}\n")),
            (format!("{PATH}?private_token={token}&bad=%zz"), String::new()),
            (format!("/elsewhere?private_token={token}"), String::new()),
            (format!("/api/v3/broken?private_token={token}"), String::new()),
            (format!("/api/v3/odd?private_token={token}"), String::new()),
            (PATH.into(), format!("PRIVATE-TOKEN: {token} {token}\n")),
        ] {
            requests.push(get(&target, &headers).replace('\n', "\r\n").into_bytes());
        }
        requests.push(post_bytes(&format!("PRIVATE-TOKEN: {known}\n"), format!("private_token={token}").as_bytes()));
        requests.push(format!("GET {PATH}?private_token={token} HTTP/1.1\r\n\r\n").into_bytes());
        requests.push(format!("GET {PATH} HTTP/1.1\r\nHost: h\r\nPRIVATE-TOKEN {token}\r\n\r\n").into_bytes());
    }
    assert_eq!(leak(&gateway, &requests), None);
}

/// Common mistakes: the parameter appended to the path, a fragment, or an encoded `=`.
#[test]
fn a_token_parameter_in_the_wrong_place_is_written_nowhere() {
    let upstream = Upstream::start();
    let gateway = |target: &str| {
        let gateway = start_with_secrets(&upstream, "");
        let target = format!("{PATH}{}", target.replace('@', SECRETS[2]));
        leak(&gateway, &[get(&target, "").replace('\n', "\r\n").into_bytes()])
    };
    let leaks: Vec<String> = [
        "&private_token=@",
        "#private_token=@",
        "?x=1#private_token=@",
        "%3Fprivate_token=@",
        "%3Fprivate_token%3D@",
        "%3Bprivate_token=@",
        "/private_token=@",
        "?private_token%3D@",
        "?private_token:@",
    ]
    .into_iter()
    .filter_map(gateway)
    .collect();
    assert_eq!(leaks, Vec::<String>::new());
}

#[test]
fn a_configured_token_parameter_is_cut_out_of_the_log() {
    let upstream = Upstream::start();
    let gateway = start_with_secrets(&upstream, "[token]\nquery = \"apikey\"\n");
    let request = |token: &str| get(&format!("{PATH}?apikey={token}"), "").replace('\n', "\r\n").into_bytes();
    assert_eq!(leak(&gateway, &SECRETS.map(request)), None);
}
