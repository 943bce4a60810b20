//! The attacks, by class. A row is the part that differs; the function around it adds the rest.

use super::{BAD, Case, GOOD, OTHER, expand};

const OK: &[u16] = &[200];
const BAD_REQUEST: &[u16] = &[400];
const UNAUTHORIZED: &[u16] = &[401];

/// All cases.
pub(super) fn all() -> Vec<Case> {
    [
        credential_position(),
        query_differential(),
        token_value(),
        header_differential(),
        hop_by_hop(),
        path_confusion(),
        host_and_form(),
        framing_length(),
        framing_coding(),
        framing_chunks(),
        version(),
        pipelining(),
        syntax_and_limits(),
        body_credential(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// GET of a target, with header lines besides Host.
fn get(target: &str, lines: &str) -> String {
    format!("GET {target} HTTP/1.1\n<H>{lines}\n")
}

/// POST with a good token, with these header lines and the bytes after the head.
fn post(lines: &str, rest: &str) -> String {
    format!("POST <P> HTTP/1.1\n<H><T>{lines}\n{rest}")
}

/// A name for a row without one: what it sends, truncated.
fn named(text: &str) -> String {
    let text: String = text.escape_debug().collect();
    if text.chars().count() <= 90 { text } else { format!("{}...", text.chars().take(87).collect::<String>()) }
}

/// The token's position: query, header lines, and the status.
#[rustfmt::skip]
fn credential_position() -> Vec<Case> {
    let rows: &[(&str, &str, &str, &[u16])] = &[
        ("a good header",                         "",                                  "PRIVATE-TOKEN: <GOOD>\n", OK),
        ("a bad header",                          "",                                  "PRIVATE-TOKEN: <BAD>\n", UNAUTHORIZED),
        ("no token",                              "",                                  "", UNAUTHORIZED),
        ("a good query",                          "?private_token=<GOOD>",             "", OK),
        ("a bad query",                           "?private_token=<BAD>",              "", UNAUTHORIZED),
        ("the same in query and header",          "?private_token=<GOOD>",             "<T>", OK),
        ("peer: kong-9946 bad query beside a good header", "?private_token=<BAD>",     "<T>", UNAUTHORIZED),
        ("good query beside a bad header",        "?private_token=<GOOD>",             "PRIVATE-TOKEN: <BAD>\n", UNAUTHORIZED),
        ("two valid ones in query and header",    "?private_token=<OTHER>",            "<T>", UNAUTHORIZED),
        ("the same header twice",                 "",                                  "<T><T>", OK),
        ("peer: CVE-2021-32777 good header, then bad", "",                             "<T>PRIVATE-TOKEN: <BAD>\n", UNAUTHORIZED),
        ("peer: CVE-2026-26308 bad header, then good", "",                             "PRIVATE-TOKEN: <BAD>\n<T>", UNAUTHORIZED),
        ("two valid headers",                     "",                                  "<T>PRIVATE-TOKEN: <OTHER>\n", UNAUTHORIZED),
        ("a hundred equal headers",               "",                                  "<PRIVATE-TOKEN: good-token-0001\n*100>", OK),
        ("a list in one header",                  "",                                  "PRIVATE-TOKEN: <GOOD>, <BAD>\n", UNAUTHORIZED),
        ("a list of the same token twice",           "",                                  "PRIVATE-TOKEN: <GOOD>,<GOOD>\n", UNAUTHORIZED),
        ("peer: apisix-13529 good key, then bad key", "?private_token=<GOOD>&private_token=<BAD>", "", UNAUTHORIZED),
        ("bad key, then good key",                "?private_token=<BAD>&private_token=<GOOD>", "", UNAUTHORIZED),
        ("the same key twice",                    "?private_token=<GOOD>&private_token=<GOOD>", "", OK),
        ("an empty key beside a good header",     "?private_token=&x=1",               "<T>", UNAUTHORIZED),
        ("a bare key beside a good header",       "?private_token",                    "<T>", UNAUTHORIZED),
        ("an empty header beside a good query",   "?private_token=<GOOD>",             "PRIVATE-TOKEN:\n", UNAUTHORIZED),
        ("a good header and an empty one",        "",                                  "<T>PRIVATE-TOKEN: \n", UNAUTHORIZED),
        ("only blanks as token",                   "",                                  "PRIVATE-TOKEN: \t  \n", UNAUTHORIZED),
        ("blanks around a token",                 "",                                  "PRIVATE-TOKEN:  \t <GOOD> \t \n", OK),
        ("no blank before a token",               "",                                  "PRIVATE-TOKEN:<GOOD>\n", OK),
        ("small letters",                         "",                                  "private-token: <GOOD>\n", OK),
        ("mixed letters, two values",             "",                                  "pRiVaTe-ToKeN: <GOOD>\nPRIVATE-TOKEN: <BAD>\n", UNAUTHORIZED),
        ("a good bearer",                         "",                                  "Authorization: Bearer <GOOD>\n", OK),
        ("a good bearer in small letters",        "",                                  "authorization: bearer   <GOOD>\n", OK),
        ("a bad bearer",                          "",                                  "Authorization: Bearer <BAD>\n", UNAUTHORIZED),
        ("a bad bearer beside a good header",     "",                                  "<T>Authorization: Bearer <BAD>\n", UNAUTHORIZED),
        ("an empty bearer beside a good header",  "",                                  "<T>Authorization: Bearer\n", UNAUTHORIZED),
        ("two bearers",                           "",                                  "Authorization: Bearer <GOOD>\nAuthorization: Bearer <OTHER>\n", UNAUTHORIZED),
        ("a bearer list",                         "",                                  "Authorization: Bearer <GOOD>, Bearer <BAD>\n", UNAUTHORIZED),
        ("another scheme with the token",         "",                                  "Authorization: Token <GOOD>\n", UNAUTHORIZED),
        ("a scheme without a blank",              "",                                  "Authorization: Bearer<GOOD>\n", UNAUTHORIZED),
        ("basic with the token as user",          "",                                  "Authorization: Basic Z29vZC10b2tlbi0wMDAxOg==\n", UNAUTHORIZED),
        ("basic beside a good header",            "",                                  "<T>Authorization: Basic ZXZpbDpldmls\n", OK),
        ("peer: CVE-2022-29226 a session cookie",  "",                                 "Cookie: private_token=<GOOD>; _gitlab_session=abc\n", UNAUTHORIZED),
        ("a cookie beside a good header",         "",                                  "<T>Cookie: private_token=evil\n", OK),
        ("X-PRIVATE-TOKEN",                       "",                                  "X-PRIVATE-TOKEN: <GOOD>\n", UNAUTHORIZED),
        ("Proxy-Authorization",                   "",                                  "Proxy-Authorization: Bearer <GOOD>\n", UNAUTHORIZED),
        ("JOB-TOKEN",                             "",                                  "JOB-TOKEN: <GOOD>\n", UNAUTHORIZED),
        ("JOB-TOKEN beside a good header",        "",                                  "<T>JOB-TOKEN: evil\nDEPLOY-TOKEN: evil\nBuild-Token: evil\n", OK),
        ("access_token",                          "?access_token=<GOOD>",              "", UNAUTHORIZED),
        ("access_token beside a good header",     "?access_token=<GOOD>",              "<T>", UNAUTHORIZED),
        ("job_token beside a good header",        "?job_token=x",                      "<T>", UNAUTHORIZED),
        ("bearer_token beside a good header",     "?bearer_token=x",                   "<T>", UNAUTHORIZED),
        ("sudo",                                  "?sudo=root",                        "<T>", &[403]),
        ("sudo in brackets",                      "?[sudo]=root",                      "<T>", &[403]),
        ("sudo, encoded",                         "?%73udo=root",                      "<T>", &[403]),
        ("SUDO header",                           "",                                  "<T>SUDO: root\n", &[403]),
        ("sudo without a token",                  "?sudo=root",                        "", UNAUTHORIZED),
        ("a matrix parameter",                    ";private_token=x",                  "", UNAUTHORIZED),
        ("peer: CVE-2026-34457 a health check's name", "",                             "User-Agent: kube-probe/1.27\nUser-Agent: GoogleHC/1.0\n", UNAUTHORIZED),
        ("peer: CVE-2021-27306 anonymous consumer headers", "",                        "X-Anonymous-Consumer: true\nX-Consumer-Username: root\nX-Credential-Identifier: root\n", UNAUTHORIZED),
        ("peer: CVE-2024-45410 identity headers from the client", "",                       "X-Forwarded-User: root\nX-Auth-Request-User: root\nX-Tollgate-User: root\nConnection: X-Forwarded-User, X-Tollgate-User\n", UNAUTHORIZED),
        ("peer: CVE-2026-62386 a token in the query is not forwarded", "?a=1&private_token=<GOOD>&b=2", "", OK),
    ];
    rows.iter()
        .map(|(name, query, lines, answers)| {
            Case::new("credential_position", *name, get(&format!("<P>{query}"), lines), answers)
        })
        .collect()
}

/// Queries that parsers read differently.
#[rustfmt::skip]
fn query_differential() -> Vec<Case> {
    // Names that some version of Rack reads as the token.
    const DISGUISES: &[&str] = &[
        "private%5Ftoken", "private%5ftoken", "%70rivate_token", "%70%72%69%76%61%74%65%5f%74%6f%6b%65%6e", "private_toke%6E",
        "[private_token]", "]private_token", "private_token]", "[[private_token]]", "][private_token", "private_token]]]",
        "private_token[]", "private_token[x]", "private_token[][]", "private_token[", "private_token[[", "private_token]x",
        "%5Bprivate_token%5D", "private_token%5B%5D", "private_token%5Bx%5D", "%5dprivate_token", "[private%5Ftoken]",
        "+private_token", "%20private_token", "private_token+", "private_token%20", "%09private_token", "%0aprivate_token", "private_token%0d%0a", "private_token%00", "+]private_token",
        // PHP truncates at NUL and replaces dots, spaces and an unmatched bracket.
        "private_token%00100abc", "private_token%00[x", "private.token", "private%2Etoken", "private+token", "private%20token", "private[token", "private%5Btoken", "+private.token", "private.token[]", "private+token[x]", "private.token%00x",
        "x=1;private_token", ";private_token", "x;+private_token",
    ];
    let mut cases = Vec::new();
    for disguise in DISGUISES {
        let alone = format!("<P>?{disguise}=<GOOD>");
        cases.push(Case::new("query_differential", format!("{disguise} alone"), get(&alone, ""), UNAUTHORIZED));
        let beside = format!("<P>?{disguise}=<OTHER>");
        cases.push(Case::new("query_differential", format!("{disguise} beside a header"), get(&beside, "<T>"), UNAUTHORIZED));
    }
    // How a query is forwarded: without the token, otherwise byte for byte.
    let passing: &[(&str, &str, &str)] = &[
        ("?private_token=<GOOD>",                        "", "<P>"),
        ("?private_token=good%2Dtoken%2d0001",           "", "<P>"),
        ("?private_token=%67ood-token-0001&a",           "", "<P>?a"),
        ("?a=1&private_token=<GOOD>&b=2",                "", "<P>?a=1&b=2"),
        ("?&private_token=<GOOD>",                       "", "<P>"),
        ("?&&private_token=<GOOD>&&b",                   "", "<P>?&&&b"),
        ("?private_token=<GOOD>&",                       "", "<P>"),
        ("?private_token=<GOOD>&private_token=<GOOD>&private_token=<GOOD>", "<T>", "<P>"),
        ("?a=1;b=2&private_token=<GOOD>",                "", "<P>?a=1;b=2"),
        ("?a=%41&b=+&c=%2B&d==&e?&f=/../&private_token=<GOOD>", "", "<P>?a=%41&b=+&c=%2B&d==&e?&f=/../"),
        ("?",                                            "<T>", "<P>?"),
        ("??a",                                          "<T>", "<P>??a"),
        ("?PRIVATE_TOKEN=x&Private_Token=y",             "<T>", "<P>?PRIVATE_TOKEN=x&Private_Token=y"),
        ("?private-token=x&private.token.x=y",           "<T>", "<P>?private-token=x&private.token.x=y"),
        ("?private_token.=x&.private_token=y&_private_token=z", "<T>", "<P>?private_token.=x&.private_token=y&_private_token=z"),
        ("?a=`b`\\{c}|d^[e]",                            "<T>", "<P>?a=`b`\\{c}|d^[e]"),
        ("?private%255Ftoken=x",                         "<T>", "<P>?private%255Ftoken=x"),
        ("?a[private_token]=x",                          "<T>", "<P>?a[private_token]=x"),
        ("?%3Fprivate_token=x",                          "<T>", "<P>?%3Fprivate_token=x"),
        ("?x=%26private_token%3Dy",                      "<T>", "<P>?x=%26private_token%3Dy"),
        ("?xprivate_token=x&private_tokenx=y",           "<T>", "<P>?xprivate_token=x&private_tokenx=y"),
        ("?private_token%3Dx",                           "<T>", "<P>?private_token%3Dx"),
        ("?private_token%26x=1",                         "<T>", "<P>?private_token%26x=1"),
    ];
    for (query, lines, target) in passing {
        let case = Case::new("query_differential", format!("passes: {query}"), get(&format!("<P>{query}"), lines), OK);
        cases.push(case.seen_as(target));
    }
    let refused: &[(&str, &str, &[u16])] = &[
        ("?private_token=<GOOD>;",             "",    UNAUTHORIZED),
        ("?private_token=<GOOD>;x=1",          "",    UNAUTHORIZED),
        ("?private_token=x;private_token=<GOOD>", "", UNAUTHORIZED),
        ("?private_token==<GOOD>",             "",    UNAUTHORIZED),
        ("?private_token=<GOOD>=",             "",    UNAUTHORIZED),
        ("?private_token=+<GOOD>",             "",    UNAUTHORIZED),
        ("?private_token=<GOOD>%00",           "",    UNAUTHORIZED),
        ("?private_token=<GOOD>%0a",           "",    UNAUTHORIZED),
        ("?private_token=%2567ood-token-0001", "",    UNAUTHORIZED),
        ("?private_token=good+token+0001",     "",    UNAUTHORIZED),
        ("?private_token=<GOOD>&private_token","",    UNAUTHORIZED),
        ("?private_token=<GOOD>&[private_token]=<GOOD>", "", UNAUTHORIZED),
        ("?PRIVATE_TOKEN=<GOOD>",              "",    UNAUTHORIZED),
        ("?private_token=%zz",                 "<T>", BAD_REQUEST),
        ("?private_token=%",                   "<T>", BAD_REQUEST),
        ("?a=%4",                              "<T>", BAD_REQUEST),
        ("?private_token=<GOOD>#x",            "",    BAD_REQUEST),
        ("?a=\"b\"",                           "<T>", BAD_REQUEST),
        ("?a=<x3c>b<x3e>",                     "<T>", BAD_REQUEST),
        ("?a=é",                               "<T>", BAD_REQUEST),
    ];
    for (query, lines, answers) in refused {
        cases.push(Case::new("query_differential", format!("refused: {query} {lines}"), get(&format!("<P>{query}"), lines), answers));
    }
    cases
}

/// Values of the token.
#[rustfmt::skip]
fn token_value() -> Vec<Case> {
    let digest = crate::harness::sha256_hex(GOOD);
    let mut values: Vec<(String, &[u16])> = [
        "GOOD-TOKEN-0001", "Good-token-0001", "good-token-000", "ood-token-0001", "good-token-0001a",
        "\"good-token-0001\"", "'good-token-0001'", "good-token-0001 x", "x good-token-0001", "good-token-0001;", "good-token-0001:",
        "good-token-0001, good-token-0001", "good token 0001", "good\ttoken-0001", "good_token_0001", "good.token.0001",
        "%67ood-token-0001", "good%2Dtoken%2D0001", "good-token-0001%00", "good-token-0001%20", "Bearer good-token-0001",
        "good-token-000*", "*", "%", "_", "null", "undefined", "0", "true", "[]", "{}", "' OR '1'='1", "good-token-0001'--",
        "../good-token-0001", "user-0001", "good-token-0001\\", "good-token-0001/", "good\u{ad}-token-0001",
        "good-token-000\u{b9}", "\u{a0}good-token-0001", "good-token-0001\u{85}", "Z29vZC10b2tlbi0wMDAx", "sha256:good-token-0001",
    ]
    .into_iter()
    .map(|value| (value.to_owned(), UNAUTHORIZED))
    .collect();
    values.push((digest.clone(), UNAUTHORIZED));
    values.push((digest[..12].into(), UNAUTHORIZED));
    values.push((digest.to_uppercase(), UNAUTHORIZED));
    let mut cases: Vec<Case> = values
        .iter()
        .map(|(value, answers)| {
            Case::new("token_value", format!("header: {}", named(value)), get("<P>", &format!("PRIVATE-TOKEN: {value}\n")), answers)
        })
        .collect();
    let rows: &[(&str, &str, &[u16])] = &[
        ("255 bytes",                                     "PRIVATE-TOKEN: <a*255>\n", UNAUTHORIZED),
        ("256 bytes",                                     "PRIVATE-TOKEN: <a*256>\n", UNAUTHORIZED),
        ("20 kB",                                         "PRIVATE-TOKEN: <a*20000>\n", UNAUTHORIZED),
        ("a good token with a long tail",                 "PRIVATE-TOKEN: <GOOD><a*300>\n", UNAUTHORIZED),
        ("20 kB of bearer",                               "Authorization: Bearer <a*20000>\n", UNAUTHORIZED),
        ("peer: tyk-2963 a good token and a byte",        "PRIVATE-TOKEN: <GOOD>x\n", UNAUTHORIZED),
        ("peer: CVE-2026-77281 a template",               "X: <GOOD>\nPRIVATE-TOKEN: {http.request.header.X}\n", UNAUTHORIZED),
        ("peer: apisix-13667 a reference to a secret",    "PRIVATE-TOKEN: $ENV://TOKEN\n", UNAUTHORIZED),
        ("peer: CVE-2023-27488 bytes that are no UTF-8",  "PRIVATE-TOKEN: \u{ff}\u{fe}<GOOD>\n", UNAUTHORIZED),
        ("no UTF-8 in another header of a bad request",   "PRIVATE-TOKEN: <BAD>\nX-Name: \u{ff}\u{c0}\u{80}\n", UNAUTHORIZED),
        ("no UTF-8 in another header of a good request",  "<T>X-Name: \u{ff}\u{c0}\u{80}\n", OK),
        ("peer: CVE-2019-9900 a NUL behind the token",    "PRIVATE-TOKEN: <GOOD><x00><BAD>\n", BAD_REQUEST),
        ("a NUL before the token",                        "PRIVATE-TOKEN: <x00><GOOD>\n", BAD_REQUEST),
        ("a CR within",                                   "PRIVATE-TOKEN: <GOOD><CR><BAD>\n", BAD_REQUEST),
        ("a vertical tab behind",                         "PRIVATE-TOKEN: <GOOD><x0b>\n", BAD_REQUEST),
        ("a form feed before",                            "PRIVATE-TOKEN: <x0c><GOOD>\n", BAD_REQUEST),
        ("DEL behind",                                    "PRIVATE-TOKEN: <GOOD><x7f>\n", BAD_REQUEST),
        ("a folded value",                                "PRIVATE-TOKEN: good-\n token-0001\n", BAD_REQUEST),
        ("a folded value that begins on the second line", "PRIVATE-TOKEN:\n <GOOD>\n", BAD_REQUEST),
    ];
    cases.extend(rows.iter().map(|(name, lines, answers)| Case::new("token_value", *name, get("<P>", lines), answers)));
    cases
}

/// Headers that a backend might read as a different one.
#[rustfmt::skip]
fn header_differential() -> Vec<Case> {
    const TWINS: &[&str] = &[
        "PRIVATE_TOKEN", "private_token", "Private_Token", "PRIVATE.TOKEN", "private.token", "PRIVATE~TOKEN", "PRIVATE!TOKEN",
        "PRIVATE+TOKEN", "PRIVATE*TOKEN", "PRIVATE|TOKEN", "PRIVATE^TOKEN", "PRIVATE`TOKEN", "PRIVATE'TOKEN", "PRIVATE$TOKEN",
        "PRIVATE%TOKEN", "PRIVATE&TOKEN", "PRIVATE#TOKEN", "HTTP_PRIVATE_TOKEN", "HTTP-PRIVATE-TOKEN", "_PRIVATE_TOKEN", "PRIVATE_TOKEN_", "PRIVATE-TOKEN_", "PRIVATE--TOKEN",
    ];
    let mut cases = Vec::new();
    for twin in TWINS {
        cases.push(Case::new("header_differential", format!("{twin} alone"), get("<P>", &format!("{twin}: <GOOD>\n")), UNAUTHORIZED));
        // Two of them are not read as the token by any backend, and are forwarded.
        if !twin.contains("--") && !twin.starts_with("HTTP-") {
            cases.push(Case::new("header_differential", format!("{twin} behind the token"), get("<P>", &format!("<T>{twin}: <BAD>\n")), OK));
            cases.push(Case::new("header_differential", format!("{twin} before the token"), get("<P>", &format!("{twin}: <BAD>\n<T>")), OK));
        }
    }
    // A client must not send these: dropped in any spelling.
    let dropped: &[(&str, &str)] = &[
        ("peer: CVE-2026-35051 X-Forwarded-Prefix",       "X-Forwarded-Prefix: /evil\n"),
        ("peer: CVE-2026-39858 X_Forwarded_Proto",        "X_Forwarded_Proto: evil\n"),
        ("peer: GHSA-x677-9fxg-v5c5 identity with dots",  "X.Tollgate.User: evil\nX_Tollgate_User: evil\n"),
        ("peer: CVE-2026-54764 X-Forwarded-Port",         "X-Forwarded-Port: 7\n"),
        ("peer: CVE-2025-64484 X_Forwarded_User",         "X_Forwarded_User: evil\nX-Forwarded_User: evil\n"),
        ("peer: oauth2-proxy-3506 no trusted proxies",    "X-Forwarded-For: 192.0.2.9\nX-Forwarded-Host: evil.test\n"),
        ("peer: GHSA-vhr5-ggp3-qq85 X-Forwarded-Proto",   "X-Forwarded-Proto: https\n"),
        ("peer: CVE-2024-45806 a loopback peer is not a proxy", "X-Forwarded-For: 10.0.0.1\n"),
        ("X-Forwarded-For twice",                         "X-Forwarded-For: 6.6.6.6\nX-Forwarded-For: evil\n"),
        ("X_Forwarded_For",                               "X_Forwarded_For: evil\nX.Forwarded.For: evil\n"),
        ("X-Forwarded-User and Email",                    "X-Forwarded-User: evil\nX-Forwarded-Email: evil\nX-Forwarded-Groups: evil\n"),
        ("X-Forwarded-Scheme and Ssl",                    "X-Forwarded-Scheme: evil\nX-Forwarded-Ssl: evil\n"),
        ("X-Forwarded-Server and By",                     "X-Forwarded-Server: evil\nX-Forwarded-By: evil\n"),
        ("Forwarded",                                     "Forwarded: for=evil;host=evil;proto=https\n"),
        ("X-Real-IP",                                     "X-Real-IP: evil\nX_Real_IP: evil\n"),
        ("X-Client-IP",                                   "X-Client-IP: evil\n"),
        ("Client-IP, which Rails believes",               "Client-IP: evil\n"),
        ("X-Tollgate-User",                               "X-Tollgate-User: evil\nx-tollgate-user: evil\n"),
        ("X-Tollgate-Scopes and Token-Id",                "X-Tollgate-Scopes: evil\nX-Tollgate-Token-Id: evil\nX-Tollgate-Anything: evil\n"),
        ("Host_",                                         "Host_: evil\nHOST.: evil\n"),
        ("Content_Type",                                  "Content_Type: evil\nContent.Type: evil\n"),
        ("Authorization by another name",                 "Author_ization: evil\nAUTHORIZATION_: evil\n"),
        ("a session cookie",                              "Cookie: _gitlab_session=evil\nCookie: evil=1\n"),
        ("Sudo by another name",                          "SUDO_: evil\nS.UDO: evil\n"),
        ("httpoxy",                                       "Proxy: http://evil\n"),
        ("X-Sendfile headers",             "X-Sendfile-Type: evil\nX-Accel-Mapping: evil\nX-Accel-Redirect: evil\n"),
        ("headers of Workhorse",                   "Gitlab-Workhorse-Api-Request: evil\nGitlab-Workhorse: evil\n"),
        ("an invalid id",                            "X-Request-Id: evil evil\n"),
        ("two ids",                                       "X-Request-Id: evil1\nX-Request-Id: evil2\n"),
        ("an id with a line",                             "X-Request-Id: evil%0d%0a\"}\n"),
        ("an id of 129 letters",                          "X-Request-Id: <evil*33>\n"),
    ];
    cases.extend(dropped.iter().map(|(name, lines)| {
        Case::new("header_differential", *name, get("<P>", &format!("<T>{lines}")), OK)
    }));
    // The decision is made on the request line, not on headers about it.
    let told: &[(&str, &str, &[u16])] = &[
        ("peer: CVE-2026-40575 a path in a header", "X-Forwarded-Uri: /api/v3/public\nX-Original-URI: /public\n", UNAUTHORIZED),
        ("peer: CVE-2023-27487 X-Envoy-Original-Path", "x-envoy-original-path: /public\nx-envoy-internal: true\n", UNAUTHORIZED),
        ("peer: gitlab-method-override a method in a header", "<T>X-HTTP-Method-Override: DELETE\n", BAD_REQUEST),
        ("X-HTTP-Method",                                  "<T>X-HTTP-Method: DELETE\n", BAD_REQUEST),
        ("X-Method-Override",                              "<T>x-method-override: DELETE\n", BAD_REQUEST),
        ("X-Rewrite-URL without a token",                  "X-Original-URL: /public\nX-Rewrite-URL: /public\nX-Original-Method: OPTIONS\n", UNAUTHORIZED),
        ("a preflight's headers on a GET",                 "Origin: http://h.test\nAccess-Control-Request-Method: GET\n", UNAUTHORIZED),
    ];
    cases.extend(told.iter().map(|(name, lines, answers)| Case::new("header_differential", *name, get("<P>", lines), answers)));
    cases.push(Case::new("header_differential", "a preflight, which the default does not open",
        "OPTIONS <P> HTTP/1.1\n<H>Origin: http://h.test\nAccess-Control-Request-Method: GET\n\n", UNAUTHORIZED));
    cases.push(Case::new("header_differential", "peer: CVE-2026-88004 a token in the trailer",
        post("Transfer-Encoding: chunked\nTrailer: PRIVATE-TOKEN\n", "0\nPRIVATE-TOKEN: <BAD>\nX-Tollgate-User: evil\n\n"), OK));
    cases.push(Case::new("header_differential", "a token in the trailer alone",
        "POST <P> HTTP/1.1\n<H>Transfer-Encoding: chunked\nTrailer: PRIVATE-TOKEN\n\n0\nPRIVATE-TOKEN: <GOOD>\n\n", UNAUTHORIZED).closed());
    cases
}

/// Connection, Upgrade and other hop-by-hop fields.
#[rustfmt::skip]
fn hop_by_hop() -> Vec<Case> {
    let rows: &[(&str, &str, &[u16])] = &[
        ("PRIVATE-TOKEN",                                   "Connection: PRIVATE-TOKEN\n", OK),
        ("peer: GHSA-92mv-8f8w-wq52 the token in small letters", "connection: private-token\nCONNECTION: Private-Token\n", OK),
        ("the token in a list with empty members",          "Connection: keep-alive,\tPRIVATE-TOKEN ,,\n", OK),
        ("the token's alias",                               "Connection: PRIVATE_TOKEN\nPRIVATE_TOKEN: evil\n", OK),
        ("peer: GHSA-62c8-mh53-4cqv what the gateway writes", "Connection: X-Forwarded-For, X-Forwarded-Proto, X-Forwarded-Host, X-Forwarded-Port, X-Real-IP, X-Request-Id\n", OK),
        ("Host",                                            "Connection: Host\n", OK),
        ("Connection itself",                               "Connection: Connection\n", OK),
        ("cookies",                                         "Connection: Cookie, Authorization\nCookie: evil\n", OK),
        ("a field of the client",                         "Connection: X-Mine\nX-Mine: evil\n", OK),
        ("sixteen options",                                 "Connection: <a, *15>a\n", OK),
        ("seventeen options",                               "Connection: <a, *16>a\n", BAD_REQUEST),
        ("seventeen headers",                               "<Connection: a\n*17>", BAD_REQUEST),
        ("a quoted option",                                 "Connection: \"PRIVATE-TOKEN\"\n", BAD_REQUEST),
        ("a pseudo header",                                 "Connection: :authority\n", BAD_REQUEST),
        ("an option with a blank",                          "Connection: PRIVATE TOKEN\n", BAD_REQUEST),
        ("an option that is not ASCII",                      "Connection: \u{e9}\n", BAD_REQUEST),
        ("all the hop-by-hop fields",                       "Keep-Alive: timeout=5\nProxy-Connection: keep-alive\nProxy-Authorization: Basic Zm9v\nProxy-Authenticate: x\nTE: trailers, deflate\nTrailer: X-T\n", OK),
        ("h2c",                                             "Connection: Upgrade, HTTP2-Settings\nUpgrade: h2c\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\n", OK),
        ("an upgrade to anything",                          "Connection: Upgrade\nUpgrade: anything\n", OK),
        ("an upgrade to two things",                        "Connection: Upgrade\nUpgrade: h2c, websocket\n", OK),
        ("an upgrade without the option",                   "Upgrade: websocket\n", OK),
    ];
    let mut cases: Vec<Case> = rows
        .iter()
        .map(|(name, lines, answers)| Case::new("hop_by_hop", *name, get("<P>", &format!("<T>{lines}")), answers))
        .collect();
    let websocket = "Connection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\nSec-WebSocket-Version: 13\n";
    cases.extend([
        Case::new("hop_by_hop", "the query's token and its header's name", get("<P>?private_token=<GOOD>", "Connection: PRIVATE-TOKEN\n"), OK).seen_as("<P>"),
        Case::new("hop_by_hop", "a bad token and its header's name", get("<P>", "PRIVATE-TOKEN: <BAD>\nConnection: PRIVATE-TOKEN\n"), UNAUTHORIZED),
        Case::new("hop_by_hop", "peer: pingap-215 an upgrade without a token", get("<P>", websocket), UNAUTHORIZED),
        Case::new("hop_by_hop", "an upgrade with a bad token", get("<P>", &format!("PRIVATE-TOKEN: <BAD>\n{websocket}")), UNAUTHORIZED),
        // The backend of these tests responds to the upgrade with a plain 200, so what follows is an ordinary request.
        Case::new("hop_by_hop", "peer: RUSTSEC-2026-0033 a request after an upgrade that is not accepted",
            get("<P>", &format!("<T>{websocket}")) + "GET <P>/second HTTP/1.1\n<H>PRIVATE-TOKEN: <BAD>\n\n", &[200, 401]).seen_as("<P>"),
        Case::new("hop_by_hop", "peer: CVE-2026-73548 bytes after an upgrade that is not accepted",
            get("<P>", &format!("<T>{websocket}")) + "<x81><x85>evil", &[200, 400]).closed(),
        Case::new("hop_by_hop", "an upgrade with a body", post(&format!("{websocket}Content-Length: <LEN>\n"), "<SMUGGLED>"), OK),
        Case::new("hop_by_hop", "an upgrade with a chunked body", post(&format!("{websocket}Transfer-Encoding: chunked\n"), "<HEX>\n<SMUGGLED>\n0\n\n"), OK),
        Case::new("hop_by_hop", "Content-Length", post("Connection: Content-Length\nContent-Length: <LEN>\n", "<SMUGGLED>"), OK),
        Case::new("hop_by_hop", "Transfer-Encoding", post("Connection: Transfer-Encoding\nTransfer-Encoding: chunked\n", "<HEX>\n<SMUGGLED>\n0\n\n"), OK),
        Case::new("hop_by_hop", "Expect", post("Connection: Expect\nExpect: 100-continue\nContent-Length: 2\n", "ab"), OK),
        Case::new("hop_by_hop", "close, with further bytes", get("<P>", "<T>Connection: close, PRIVATE-TOKEN\n") + "<SMUGGLED>", OK).closed(),
    ]);
    cases
}

/// Paths that two servers resolve differently. All with a good token.
#[rustfmt::skip]
fn path_confusion() -> Vec<Case> {
    const NOT_FOUND: &[u16] = &[404];
    let rows: &[(&str, &[u16])] = &[
        // Dot segments.
        ("/api/v3/../admin", BAD_REQUEST), ("/api/v3/./projects", BAD_REQUEST), ("/api/v3/..", BAD_REQUEST), ("/api/v3/.", BAD_REQUEST),
        ("/../api/v3/projects", BAD_REQUEST), ("/./api/v3/projects", BAD_REQUEST), ("/x/../api/v3/projects", BAD_REQUEST),
        ("/api/v3/%2e%2e/admin", BAD_REQUEST), ("/api/v3/%2E%2E/admin", BAD_REQUEST), ("/api/v3/.%2e/admin", BAD_REQUEST), ("/api/v3/%2e./admin", BAD_REQUEST),
        ("/api/v3/%2e", BAD_REQUEST), ("/api/v3/x/%2e%2e", BAD_REQUEST), ("/api/v3/x/..?a", BAD_REQUEST),
        ("/api/v3/..;/admin", BAD_REQUEST), ("/api/v3/..;x=1/admin", BAD_REQUEST), ("/api/v3/.;/admin", BAD_REQUEST), ("/api/v3/..%3b/admin", BAD_REQUEST),
        ("/api/v3/%2e%2e;/admin", BAD_REQUEST), ("/api/v3//..//admin", BAD_REQUEST),
        ("/api/v3/x%2f..%2fadmin", BAD_REQUEST), ("/api/v3/x%2F%2e%2e%2Fadmin", BAD_REQUEST), ("/api/v3/..%2fadmin", BAD_REQUEST), ("/api/v3/..%2Fadmin", BAD_REQUEST),
        ("/api/v3/<../*50>etc/passwd", BAD_REQUEST),
        // Not dot segments, although similar.
        ("/api/v3/...", OK), ("/api/v3/.git", OK), ("/api/v3/..git", OK), ("/api/v3/a../b", OK), ("/api/v3/a.b..c", OK), ("/api/v3/x?a=/../b", OK), ("/api/v3/x?../..", OK),
        ("/api/v3/%252e%252e/x", OK),
        // Slashes.
        ("//api/v3/projects", OK), ("/api//v3/projects", OK), ("/api/v3//projects", OK), ("/api/v3/projects//", OK), ("///api/v3/projects", OK),
        ("/api/v3/group%2Fproject", OK), ("/api/v3/group%2fproject", OK), ("/api%2fv3/projects", NOT_FOUND), ("/api/v3%2fprojects", NOT_FOUND), ("/%2fapi/v3/projects", NOT_FOUND),
        ("/api/v3/a\\b", BAD_REQUEST), ("/api/v3/..\\admin", BAD_REQUEST), ("\\api\\v3\\projects", BAD_REQUEST), ("/api/v3/a%5cb", BAD_REQUEST), ("/api/v3/..%5Cadmin", BAD_REQUEST),
        // Prefixes.
        ("/api/v3", OK), ("/api/v3/", OK), ("/api/v3.json", OK), ("/api/v3x", NOT_FOUND), ("/api/v3;x/projects", NOT_FOUND), ("/api/v3,x/projects", NOT_FOUND),
        ("/API/V3/projects", NOT_FOUND), ("/api/V3/projects", NOT_FOUND), ("/", NOT_FOUND), ("/admin", NOT_FOUND), ("/api", NOT_FOUND), ("/api/v4/projects", NOT_FOUND),
        ("/admin?/api/v3/projects", NOT_FOUND), ("/admin;/api/v3/projects", NOT_FOUND), ("/metrics", NOT_FOUND), ("/healthz", NOT_FOUND), ("/readyz", NOT_FOUND), ("/admin/reload", NOT_FOUND),
        ("/%61pi/v3/projects", OK), ("/%61%70%69/%76%33/projects", OK), ("/ap%69/v3/projects", OK),
        // Parameters, fragments, escapes.
        ("/api/v3/projects;x=1", OK), ("/api/v3/projects;private_token=x", OK), ("/api/v3/a;b/c;d", OK),
        ("/api/v3/projects#x", BAD_REQUEST), ("/api/v3/projects?a#x", BAD_REQUEST), ("/api/v3/#/../admin", BAD_REQUEST), ("/api/v3/a%23b", OK), ("/api/v3/a%3Fb", OK), ("/api/v3/a%25b", OK), ("/api/v3/a%3Bb", OK),
        ("/api/v3/%", BAD_REQUEST), ("/api/v3/%2", BAD_REQUEST), ("/api/v3/%zz", BAD_REQUEST), ("/api/v3/%2g", BAD_REQUEST), ("/api/v3/%u002e%u002e/x", BAD_REQUEST), ("/api/v3/%%32%65", BAD_REQUEST),
        ("/api/v3/a%00b", BAD_REQUEST), ("/api/v3/a%0ab", BAD_REQUEST), ("/api/v3/a%0d%0aevil:%20x", BAD_REQUEST), ("/api/v3/a%09b", BAD_REQUEST), ("/api/v3/a%7fb", BAD_REQUEST), ("/api/v3/..%00/x", BAD_REQUEST),
        // UTF-8: accepted as escapes, except overlong forms of `.` and `/`; refused as raw bytes.
        ("/api/v3/caf%C3%A9", OK), ("/api/v3/%E2%82%AC", OK), ("/api/v3/%c0%ae%c0%ae/x", BAD_REQUEST), ("/api/v3/x%c0%af..", BAD_REQUEST), ("/api/v3/%c1%9c", BAD_REQUEST),
        ("/api/v3/%e0%80%ae%e0%80%ae/x", BAD_REQUEST), ("/api/v3/%f0%80%80%af", BAD_REQUEST), ("/api/v3/%ff", BAD_REQUEST), ("/api/v3/\u{c3}\u{a9}", BAD_REQUEST), ("/api/v3/\u{ff}", BAD_REQUEST),
        // Bytes that browsers do not encode in a path, and bytes that are not allowed in a target.
        ("/api/v3/a|b", OK), ("/api/v3/a^b", OK), ("/api/v3/a[b]", OK), ("/api/v3/[..]/x", OK), ("/api/v3/..|/x", OK), ("/api/v3/a[/../b]", BAD_REQUEST),
        ("/api/v3/a<x3c>b", BAD_REQUEST), ("/api/v3/a<x3e>b", BAD_REQUEST), ("/api/v3/a\"b", BAD_REQUEST), ("/api/v3/a{b", BAD_REQUEST), ("/api/v3/a}b", BAD_REQUEST),
        ("/api/v3/a`b", BAD_REQUEST), ("/api/v3/a\tb", BAD_REQUEST), ("/api/v3/a<x00>b", BAD_REQUEST), ("/api/v3/a<x7f>b", BAD_REQUEST), ("/api/v3/a b", BAD_REQUEST),
        ("/api/v3/a<x0b>b", BAD_REQUEST), ("/api/v3/a<x01>b", BAD_REQUEST),
    ];
    let mut cases: Vec<Case> = rows
        .iter()
        .map(|(target, answers)| {
            let case = Case::new("path_confusion", named(target), get(target, "<T>"), answers);
            // Accepted paths are forwarded byte for byte.
            if *answers == OK { case.seen_as(target) } else { case }
        })
        .collect();
    let peers: &[(&str, &str, &str, &[u16])] = &[
        ("GHSA-xf64-8mw2-4gr2 dots behind a prefix",            "/api/v3/x/../../admin", "<T>", BAD_REQUEST),
        ("CVE-2026-40912 the prefix in escapes",                "/api%2Fv3/../admin", "<T>", BAD_REQUEST),
        ("CVE-2025-66490 encoded separators, without a token",  "/api/v3/a%2Fb%3Bc%25%3F%23", "", UNAUTHORIZED),
        ("CVE-2025-66490 an encoded NUL",                       "/api/v3/a%00", "", BAD_REQUEST),
        ("CVE-2023-47106 a fragment",                           "/api/v3/projects#/public", "", BAD_REQUEST),
        ("CVE-2026-41059 a fragment that widens",               "/admin#/api/v3/projects", "<T>", BAD_REQUEST),
        ("CVE-2021-32779 a fragment behind the path",           "/api/v3/projects#evil", "<T>", BAD_REQUEST),
        ("CVE-2023-45539 a fragment before an ending",          "/api/v3/projects#.png", "", BAD_REQUEST),
        ("CVE-2026-27587 letters of a prefix in escapes",       "/%41PI/v3/projects", "<T>", &[404]),
        ("caddy-4407 two slashes without a token",              "//api//v3//projects", "", UNAUTHORIZED),
        ("GHSA-m8m5-v4jf-3wcm ..%2f",                           "/api/v3/public%2f..%2fadmin", "", BAD_REQUEST),
        ("GHSA-qrp7-cvwr-j2c6 a backslash",                     "/api/v3/public\\..\\admin", "", BAD_REQUEST),
        ("CVE-2026-27590 letters whose lower case is longer",    "/api/v3/%C4%B0%C8%BA/x", "", UNAUTHORIZED),
        ("GHSA-7rh7-c77v-6434 a public path in the query",      "/api/v3/admin?x=/public", "", UNAUTHORIZED),
        ("GHSA-p224-6x5r-fjpm a public path and dots",          "/public/../api/v3/projects", "", BAD_REQUEST),
        ("CVE-2019-9901 dots without a token",                  "/api/v3/projects/..", "", BAD_REQUEST),
        ("CVE-2026-42272 %2f in small letters",                 "/api/v3/group%2fproject", "", UNAUTHORIZED),
        ("CVE-2026-42272 %2F in capitals",                      "/api/v3/group%2Fproject", "", UNAUTHORIZED),
        ("CVE-2021-29492 %5C",                                  "/api/v3/a%5Cb", "", BAD_REQUEST),
        ("kong-6821 a path that is not normalized",                 "/x/./../api/v3/projects", "", BAD_REQUEST),
        ("CVE-2021-43557 several slashes before a blocked path",        "////api/v3/projects", "", UNAUTHORIZED),
        ("CVE-2026-73511 a parameter in a segment",             "/api/v3/projects;x", "", UNAUTHORIZED),
        ("CVE-2026-73511 a parameter in the prefix",            "/api/v3;x/projects", "", &[404]),
        ("CVE-2025-24030 the admin listener's paths",           "/api/v3/../metrics", "<T>", BAD_REQUEST),
    ];
    cases.extend(peers.iter().map(|(name, target, lines, answers)| {
        Case::new("path_confusion", format!("peer: {name}"), get(target, lines), answers)
    }));
    cases
}

/// Host, absolute-form, and other ways to specify an authority.
#[rustfmt::skip]
fn host_and_form() -> Vec<Case> {
    let rows: &[(&str, &str, &[u16], &str)] = &[
        ("absolute-form",                               "GET http://h.test<P> HTTP/1.1\n<H><T>\n", OK, "<P>"),
        ("absolute-form with capitals",                 "GET HTTP://H.TEST<P> HTTP/1.1\n<H><T>\n", OK, "<P>"),
        ("peer: CVE-2023-35944 a scheme of mixed letters", "GET htTps://h.test<P> HTTP/1.1\n<H>\n", UNAUTHORIZED, ""),
        ("absolute-form without a token",               "GET http://h.test<P> HTTP/1.1\n<H>\n", UNAUTHORIZED, ""),
        ("absolute-form with a query token",            "GET http://h.test<P>?private_token=<GOOD> HTTP/1.1\n<H>\n", OK, "<P>"),
        ("absolute-form with a disguised token",        "GET http://h.test<P>?private%5Ftoken=<BAD> HTTP/1.1\n<H><T>\n", UNAUTHORIZED, ""),
        ("absolute-form to another port",               "GET http://127.0.0.1:<SSRF><P> HTTP/1.1\n<H><T>\n", BAD_REQUEST, ""),
        ("absolute-form and Host to another port",      "GET http://127.0.0.1:<SSRF><P> HTTP/1.1\nHost: 127.0.0.1:<SSRF>\n<T>\n", OK, "<P>"),
        ("absolute-form to another host",               "GET http://evil.test<P> HTTP/1.1\n<H><T>\n", BAD_REQUEST, ""),
        ("absolute-form with a user",                   "GET http://user:pw@h.test<P> HTTP/1.1\n<H><T>\n", BAD_REQUEST, ""),
        ("absolute-form with Host as the user",         "GET http://h.test@127.0.0.1:<SSRF><P> HTTP/1.1\n<H><T>\n", BAD_REQUEST, ""),
        ("absolute-form without a path",                "GET http://h.test HTTP/1.1\n<H><T>\n", BAD_REQUEST, ""),
        ("absolute-form with a query only",             "GET http://h.test?x HTTP/1.1\n<H><T>\n", BAD_REQUEST, ""),
        ("absolute-form without a host",                "GET http://<P> HTTP/1.1\n<H><T>\n", BAD_REQUEST, ""),
        ("absolute-form with dots",                     "GET http://h.test/api/v3/../admin HTTP/1.1\n<H><T>\n", BAD_REQUEST, ""),
        ("ftp",                                         "GET ftp://h.test<P> HTTP/1.1\n<H><T>\n", BAD_REQUEST, ""),
        ("file",                                        "GET file:///etc/passwd HTTP/1.1\n<H><T>\n", BAD_REQUEST, ""),
        ("peer: CVE-2026-33186 a target without a slash", "GET api/v3/projects HTTP/1.1\n<H><T>\n", BAD_REQUEST, ""),
        ("a target that begins with @",                 "GET @127.0.0.1:<SSRF>/x HTTP/1.1\n<H><T>\n", BAD_REQUEST, ""),
        ("a target that begins with :",                 "GET :80<P> HTTP/1.1\n<H><T>\n", BAD_REQUEST, ""),
        ("a target that is a query",                    "GET ?private_token=x HTTP/1.1\n<H><T>\n", BAD_REQUEST, ""),
        ("a target that is a star",                     "GET * HTTP/1.1\n<H><T>\n", BAD_REQUEST, ""),
        ("peer: CVE-2026-73547 OPTIONS *",              "OPTIONS * HTTP/1.1\n<H><T>\n", &[404], ""),
        ("two slashes and an authority",                     "GET //127.0.0.1:<SSRF>/x HTTP/1.1\n<H><T>\n", &[404], ""),
        ("authority-form with GET",                     "GET 127.0.0.1:<SSRF> HTTP/1.1\n<H><T>\n", BAD_REQUEST, ""),
        ("CONNECT without a token",                     "CONNECT 127.0.0.1:<SSRF> HTTP/1.1\n<H>\n", &[405], ""),
        ("CONNECT in absolute-form",                    "CONNECT http://127.0.0.1:<SSRF>/ HTTP/1.1\n<H><T>\n", &[405], ""),
        ("Host twice",                                  "GET <P> HTTP/1.1\nHost: a\nHost: b\n<T>\n", BAD_REQUEST, ""),
        ("Host twice the same",                         "GET <P> HTTP/1.1\n<H><H><T>\n", BAD_REQUEST, ""),
        ("no Host",                                     "GET <P> HTTP/1.1\n<T>\n", BAD_REQUEST, ""),
        ("no Host in HTTP/1.0",                         "GET <P> HTTP/1.0\n<T>\n", BAD_REQUEST, ""),
        ("absolute-form for a Host",                    "GET http://h.test<P> HTTP/1.1\n<T>\n", BAD_REQUEST, ""),
        ("a blank before the colon of Host",            "GET <P> HTTP/1.1\nHost : h.test\n<T>\n", BAD_REQUEST, ""),
        ("X-Forwarded-Host",                            "GET <P> HTTP/1.1\n<H><T>X-Forwarded-Host: evil.test\nX-Host: x\nX-Forwarded-Server: evil\n\n", OK, "<P>"),
    ];
    let mut cases: Vec<Case> = rows
        .iter()
        .map(|(name, text, answers, target)| {
            let case = Case::new("host_and_form", *name, *text, answers);
            let case = if target.is_empty() { case } else { case.seen_as(target) };
            if *answers == BAD_REQUEST && *name != "absolute-form with dots" { case.closed() } else { case }
        })
        .collect();
    cases.push(Case::new("host_and_form", "peer: traefik-3.7.9 CONNECT and what it would tunnel",
        "CONNECT 127.0.0.1:<SSRF> HTTP/1.1\n<H><T>\n<SMUGGLED>", &[405]).closed());
    let hosts: &[(&str, &[u16])] = &[
        ("", BAD_REQUEST), ("h.test@evil.test", BAD_REQUEST), ("evil.test/x", BAD_REQUEST), ("evil.test?x", BAD_REQUEST), ("evil.test#x", BAD_REQUEST), ("evil.test, h.test", BAD_REQUEST),
        ("ev il.test", BAD_REQUEST), ("h.test:99999", BAD_REQUEST), ("h.test:", BAD_REQUEST), ("h.test:80:80", BAD_REQUEST), ("h.test:x", BAD_REQUEST), ("h.test:-1", BAD_REQUEST), (":80", BAD_REQUEST),
        ("[::1", BAD_REQUEST), ("[::1]x", BAD_REQUEST), ("[evil]", BAD_REQUEST), ("::1", BAD_REQUEST), ("h.test<x00>.evil", BAD_REQUEST), ("h.test\\evil", BAD_REQUEST), ("h%2etest", BAD_REQUEST),
        ("http://h.test", BAD_REQUEST), ("h\u{e9}.test", BAD_REQUEST), ("h.test\"", BAD_REQUEST), ("${jndi}", BAD_REQUEST),
        ("[::1]", OK), ("[::1]:8080", OK), ("h.test:8080", OK), ("127.0.0.1:<SSRF>", OK), ("under_score.test", OK), ("<a*5000>", OK),
    ];
    for (host, answers) in hosts {
        let case = Case::new("host_and_form", format!("Host: {}", named(host)), format!("GET <P> HTTP/1.1\nHost: {host}\n<T>\n"), answers);
        cases.push(if *answers == OK { case } else { case.closed() });
    }
    cases
}

/// Content-Length, alone and with Transfer-Encoding. A request follows the head, which must not be read as one.
#[rustfmt::skip]
fn framing_length() -> Vec<Case> {
    let doubtful: &[&str] = &[
        "Content-Length: 5\nContent-Length: 5\n", "Content-Length: 5\nContent-Length: <LEN>\n", "Content-Length: <LEN>\nContent-Length: 5\n",
        "Content-Length: 0\ncontent-length: <LEN>\n", "Content-Length: \nContent-Length: <LEN>\n",
        "Content-Length: 5, 5\n", "Content-Length: 5, <LEN>\n", "Content-Length: 5,\n", "Content-Length: ,5\n",
        "Content-Length: +5\n", "Content-Length: -5\n", "Content-Length: -0\n", "Content-Length: 5.0\n", "Content-Length: 5e0\n", "Content-Length: 0x5\n", "Content-Length: 0b101\n", "Content-Length: 0o5\n",
        "Content-Length: 5 5\n", "Content-Length: 5_0\n", "Content-Length: 5Z\n", "Content-Length: \u{a0}5\n", "Content-Length: 5<x00>\n", "Content-Length: <x0b>5\n", "Content-Length: 5<x0c>\n",
        "Content-Length: 05\n", "Content-Length: 00\n", "Content-Length: \"5\"\n", "Content-Length: 5;q=1\n", "Content-Length: \u{ef}\u{bc}\u{95}\n", "Content-Length: abc\n", "Content-Length: chunked\n",
        "Content-Length: 18446744073709551621\n", "Content-Length: 9223372036854775808\n", "Content-Length: 99999999999999999999999\n", "Content-Length: <0*300>5\n",
        "Content-Length : 5\n", "Content-Length\t: 5\n", " Content-Length: 5\n", "Content-Length 5\n", "Content-Length: 5\n 5\n", "X: y\n Content-Length: 5\n",
        "Content_Length: 5\n", "Content.Length: 5\n", "CONTENT~LENGTH: 5\n",
        "Content-Length: <LEN>\nTransfer-Encoding: chunked\n", "Transfer-Encoding: chunked\nContent-Length: 4\n", "Content-Length: 0\nTransfer-Encoding: chunked\n",
        "Content-Length: 5\nTransfer-Encoding: identity\n", "Content-Length: 5\nTransfer-Encoding:\n", "Content-Length: 5\nTransfer_Encoding: chunked\n",
        "Connection: Content-Length\nContent-Length: 5\nTransfer-Encoding: chunked\n",
    ];
    let mut cases: Vec<Case> = doubtful
        .iter()
        .map(|lines| Case::new("framing_length", named(lines), post(lines, "0\n\n<SMUGGLED>"), BAD_REQUEST).closed())
        .collect();
    cases.extend([
        Case::new("framing_length", "peer: CVE-2023-40225 an empty length", post("Content-Length:\n", "<SMUGGLED>"), BAD_REQUEST).closed(),
        Case::new("framing_length", "blanks around the length", post("Content-Length: \t 5 \t\n", "12345"), OK),
        Case::new("framing_length", "no blank before the length", post("content-LENGTH:5\n", "12345"), OK),
        Case::new("framing_length", "the length covers a request", post("Content-Length: <LEN>\n", "<SMUGGLED>"), OK),
        Case::new("framing_length", "no length: what follows is a request", post("", "GET <P> HTTP/1.1\n<H>PRIVATE-TOKEN: <BAD>\n\n"), &[200, 401]),
        Case::new("framing_length", "a GET with a body", get("<P>", "<T>Content-Length: <LEN>\n") + "<SMUGGLED>", OK),
        Case::new("framing_length", "a HEAD with a body", "HEAD <P> HTTP/1.1\n<H><T>Content-Length: <LEN>\n\n<SMUGGLED>", OK),
        Case::new("framing_length", "a DELETE with a body", "DELETE <P> HTTP/1.1\n<H><T>Content-Length: <LEN>\n\n<SMUGGLED>", OK),
        Case::new("framing_length", "an OPTIONS with a body", "OPTIONS <P> HTTP/1.1\n<H><T>Content-Length: <LEN>\n\n<SMUGGLED>", OK),
        Case::new("framing_length", "a body that is cut", post("Content-Length: 100\n", "short"), &[]).half_closed(),
        Case::new("framing_length", "a body of 4 GiB that is cut", post("Content-Length: 4294967301\n", "12345"), &[]).half_closed(),
    ]);
    cases
}

/// Transfer-Encoding in variants, none of which may be used as framing.
#[rustfmt::skip]
fn framing_coding() -> Vec<Case> {
    let doubtful: &[&str] = &[
        "Transfer-Encoding:\n", "Transfer-Encoding: ,\n", "Transfer-Encoding: identity\n", "Transfer-Encoding: gzip\n", "Transfer-Encoding: xchunked\n", "Transfer-Encoding: chunkedx\n", "Transfer-Encoding: chunke\n",
        "Transfer-Encoding: chunked, chunked\n", "Transfer-Encoding: chunked, identity\n", "Transfer-Encoding: identity, chunked\n", "Transfer-Encoding: gzip, chunked\n", "Transfer-Encoding: chunked, gzip\n",
        "Transfer-Encoding: chunked,\n", "Transfer-Encoding: ,chunked\n", "Transfer-Encoding: chunked;q=1\n", "Transfer-Encoding: chunked ; a\n", "Transfer-Encoding: \"chunked\"\n", "Transfer-Encoding: 'chunked'\n",
        "Transfer-Encoding: chunked\nTransfer-Encoding: chunked\n", "Transfer-Encoding: chunked\nTransfer-Encoding: identity\n", "Transfer-Encoding: identity\nTransfer-Encoding: chunked\n", "Transfer-Encoding: chunked\ntransfer-encoding:\n",
        "Transfer-Encoding: <x0b>chunked\n", "Transfer-Encoding: chunked<x0c>\n", "Transfer-Encoding: chunked<x00>\n", "Transfer-Encoding: <x00>chunked\n", "Transfer-Encoding: \u{a0}chunked\n", "Transfer-Encoding: chunked\u{85}\n", "Transfer-Encoding: chunked<x7f>\n",
        "Transfer-Encoding: chun<CR>ked\n", "Transfer-Encoding: chunked<CR>\n", "Transfer-Encoding:\n chunked\n", "Transfer-Encoding: chunked\n x\n", "Transfer-Encoding: x\n chunked\n",
        "Transfer-Encoding : chunked\n", "Transfer-Encoding\t: chunked\n", "Transfer-Encoding<x0b>: chunked\n", "Transfer-Encoding<x00>: chunked\n", " Transfer-Encoding: chunked\n", "\tTransfer-Encoding: chunked\n",
        "Transfer Encoding: chunked\n", "Transfer-Encoding chunked\n", "Transfer_Encoding: chunked\n", "Transfer.Encoding: chunked\n", "TRANSFER~ENCODING: chunked\n", "Transfer-\u{e9}ncoding: chunked\n",
        "X: y<LF>Transfer-Encoding: chunked\n", "X: y<CR>Transfer-Encoding: chunked\n", ":\nTransfer-Encoding: chunked\n",
    ];
    let mut cases: Vec<Case> = doubtful
        .iter()
        .map(|lines| Case::new("framing_coding", named(lines), post(lines, "0\n\n<SMUGGLED>"), BAD_REQUEST).closed())
        .collect();
    for lines in ["Transfer-Encoding: chunked\n", "transfer-encoding:CHUNKED\n", "TRANSFER-ENCODING: \t Chunked \t\n"] {
        cases.push(Case::new("framing_coding", format!("plain: {}", named(lines)), post(lines, "<HEX>\n<SMUGGLED>\n0\n\n"), OK));
    }
    // Other headers with similar names: the body is empty, and what follows is not a request.
    for lines in ["TransferEncoding: chunked\n", "X-Transfer-Encoding: chunked\n", "Transfer--Encoding: chunked\n"] {
        cases.push(Case::new("framing_coding", format!("no coding: {}", named(lines)), post(lines, "0\n\n<SMUGGLED>"), &[200, 400]).closed());
    }
    cases
}

/// Chunked bodies. A malformed one may be forwarded in part, but is never completed at the backend.
#[rustfmt::skip]
fn framing_chunks() -> Vec<Case> {
    let broken: &[(&str, &str)] = &[
        ("an empty size",               "\n\n<SMUGGLED>"),
        ("an empty size behind a chunk","5\nhello\n\n\n<SMUGGLED>"),
        ("an extension without a size", ";a=b\nhello\n0\n\n<SMUGGLED>"),
        ("LF behind the size",          "5<LF>hello\n0\n\n"),
        ("CR behind the size",          "5<CR>hello\n0\n\n"),
        ("CR CR LF behind the size",    "5<CR>\nhello\n0\n\n"),
        ("LF in an extension",          "5;a<LF>b\nhello\n0\n\n"),
        ("CR in an extension",          "5;a<CR>b\nhello\n0\n\n"),
        ("NUL in an extension",         "5;a<x00>b\nhello\n0\n\n"),
        ("a long extension",            "5;<a*300>\nhello\n0\n\n"),
        ("LF behind the data",          "5\nhello<LF>0\n\n<SMUGGLED>"),
        ("CR behind the data",          "5\nhello<CR>0\n\n<SMUGGLED>"),
        ("nothing behind the data",     "5\nhello0\n\n<SMUGGLED>"),
        ("two bytes behind the data",   "5\nhelloXX0\n\n<SMUGGLED>"),
        ("data too long",               "5\nhello!\n0\n\n<SMUGGLED>"),
        ("data too short",              "6\nhello\n0\n\n<SMUGGLED>"),
        ("a blank before the size",     " 5\nhello\n0\n\n"),
        ("a blank behind the size",     "5 \nhello\n0\n\n"),
        ("a tab behind the size",       "5\t;a\nhello\n0\n\n"),
        ("0x",                          "0x5\nhello\n0\n\n"),
        ("a plus",                      "+5\nhello\n0\n\n"),
        ("a minus",                     "-5\nhello\n0\n\n"),
        ("minus zero",                  "-0\n\n<SMUGGLED>"),
        ("an underscore",               "5_0\nhello\n0\n\n"),
        ("not a hex digit",                "g\nhello\n0\n\n"),
        ("a comma",                     "5,5\nhello\n0\n\n"),
        ("a point",                     "5.0\nhello\n0\n\n"),
        ("fifteen digits",              "fffffffffffffff\nhello\n0\n\n"),
        ("2^64 + 5",                    "10000000000000005\nhello\n0\n\n<SMUGGLED>"),
        ("2^32 + 5, cut",               "100000005\nhello\n0\n\n"),
        ("many zeros",                  "<0*5000>5\nhello\n0\n\n"),
        ("wide digits",                 "\u{ef}\u{bc}\u{95}\nhello\n0\n\n"),
        ("LF ends the body",            "0\n<LF><SMUGGLED>"),
        ("LF behind the last size",     "0<LF><LF><SMUGGLED>"),
        ("data behind the last chunk",  "0\nhello\n0\n\n"),
        ("a trailer without a colon",   "0\nX\n\n<SMUGGLED>"),
        ("a trailer without a name",    "0\n: x\n\n<SMUGGLED>"),
        ("a trailer with a blank",      "0\nX : y\n\n<SMUGGLED>"),
        ("a folded trailer",            "0\nX: y\n z\n\n<SMUGGLED>"),
        ("a trailer that begins with a blank", "0\n X: y\n\n<SMUGGLED>"),
        ("LF in a trailer",             "0\nX: y<LF>Z: w\n\n<SMUGGLED>"),
        ("NUL in a trailer",            "0\nX: <x00>\n\n<SMUGGLED>"),
        ("a trailer bomb",              "0\n<X: yyyyyyyyyyyyyyyyyyyyyyyyyy\n*1000>\n"),
        ("no chunk at all",             "<SMUGGLED>"),
    ];
    let mut cases: Vec<Case> = broken
        .iter()
        .map(|(name, body)| {
            let case = Case::new("framing_chunks", *name, post("Transfer-Encoding: chunked\n", body), BAD_REQUEST).closed();
            // Valid so far, but incomplete.
            if name.ends_with("cut") { Case { answers: Vec::new(), ..case }.half_closed() } else { case }
        })
        .collect();
    let fine: &[(&str, &str)] = &[
        ("no data",                     "0\n\n"),
        ("one byte at a time",          "1\na\n1\nb\n1\nc\n0\n\n"),
        ("capitals",                    "A\n0123456789\n0\n\n"),
        ("small letters",               "a\n0123456789\n0\n\n"),
        ("leading zeros",               "00005\nhello\n0000\n\n"),
        ("extensions",                  "5;a;b=c;d=\"e;f\"\nhello\n0;x\n\n"),
        ("trailers are dropped",        "5\nhello\n0\nX-Evil: evil\nContent-Length: 999\nTransfer-Encoding: evil\n\n"),
        ("a request in the data",       "<HEX>\n<SMUGGLED>\n0\n\n"),
        ("a last chunk in the data",    "5\n0\n\n\n0\n\n"),
    ];
    cases.extend(fine.iter().map(|(name, body)| {
        Case::new("framing_chunks", format!("fine: {name}"), post("Transfer-Encoding: chunked\n", body), OK)
    }));
    cases.push(Case::new("framing_chunks", "a request behind the body is another request",
        post("Transfer-Encoding: chunked\n", "5\nhello\n0\n\nGET <P>/second HTTP/1.1\n<H><T>\n"), &[200, 200]).seen_as("<P>/second"));
    cases.push(Case::new("framing_chunks", "a body that is cut", post("Transfer-Encoding: chunked\n", "5\nhello\n"), &[]).half_closed());
    cases.push(Case::new("framing_chunks", "a body that is cut in its last line", post("Transfer-Encoding: chunked\n", "5\nhello\n0\n"), &[]).half_closed());
    cases.push(Case::new("framing_chunks", "a bad token and a broken body",
        "POST <P> HTTP/1.1\n<H>PRIVATE-TOKEN: <BAD>\nTransfer-Encoding: chunked\n\n\n\n<SMUGGLED>", UNAUTHORIZED).closed());
    cases
}

#[rustfmt::skip]
fn version() -> Vec<Case> {
    let doubtful: &[&str] = &[
        "HTTP/1.2", "HTTP/1.10", "HTTP/1.01", "HTTP/01.1", "HTTP/1.", "HTTP/1", "HTTP/.1", "HTTP/11", "HTTP/0.9", "HTTP/2", "HTTP/2.0", "HTTP/3.0", "HTTP/9.9", "HTTP/1.1.1", "HTTP/-1.1", "HTTP/+1.1",
        "HTTP/4294967297.1", "http/1.1", "Http/1.1", "HTP/1.1", "HTTP/1,1", "HTTP 1.1", "HTTP /1.1", "HTTP/ 1.1", "HTTP/1.1 ", "HTTP/1.1\t", "HTTP/1.1<x00>", "HTTPS/1.1", "RTSP/1.0", "HTTP/\u{b9}.1", "HTTP/1.1<CR>",
    ];
    let mut cases: Vec<Case> = doubtful
        .iter()
        .map(|version| Case::new("version", named(version), format!("GET <P> {version}\n<H><T>\n<SMUGGLED>"), BAD_REQUEST).closed())
        .collect();
    cases.extend([
        Case::new("version", "none", "GET <P>\n<H><T>\n", BAD_REQUEST).closed(),
        Case::new("version", "none, and nothing else", "GET <P>\n\n", BAD_REQUEST).closed(),
        Case::new("version", "none after a blank", "GET <P> \n<H><T>\n", BAD_REQUEST).closed(),
        Case::new("version", "HTTP/1.0 closes the connection", "GET <P> HTTP/1.0\n<H><T>\n<SMUGGLED>", OK).closed(),
        Case::new("version", "HTTP/1.0 with keep-alive", "GET <P> HTTP/1.0\n<H><T>Connection: keep-alive\n\nGET <P> HTTP/1.0\n<H>PRIVATE-TOKEN: <BAD>\n\n", &[200, 401]).closed(),
        Case::new("version", "HTTP/1.0 with keep-alive and close", "GET <P> HTTP/1.0\n<H><T>Connection: keep-alive, close\n\n<SMUGGLED>", OK).closed(),
        Case::new("version", "HTTP/1.0 with a length", "POST <P> HTTP/1.0\n<H><T>Content-Length: <LEN>\n\n<SMUGGLED>", OK).closed(),
        Case::new("version", "peer: RUSTSEC-2026-0034 HTTP/1.0 with chunks", "POST <P> HTTP/1.0\n<H><T>Transfer-Encoding: chunked\n\n0\n\n<SMUGGLED>", BAD_REQUEST).closed(),
        Case::new("version", "HTTP/1.0 with a body without a length", "POST <P> HTTP/1.0\n<H><T>\n<SMUGGLED>", OK).closed(),
        Case::new("version", "HTTP/1.0 with Expect", "POST <P> HTTP/1.0\n<H><T>Content-Length: 2\nExpect: 100-continue\n\nab", OK).closed(),
        Case::new("version", "HTTP/1.0 with an upgrade", "GET <P> HTTP/1.0\n<H><T>Connection: Upgrade, keep-alive\nUpgrade: websocket\n\n", OK),
    ]);
    cases
}

/// Several requests on one connection: none may affect the next.
#[rustfmt::skip]
fn pipelining() -> Vec<Case> {
    let good = |n: u32| format!("GET <P>?n={n} HTTP/1.1\n<H><T>\n");
    let bad = |n: u32| format!("GET <P>?n={n} HTTP/1.1\n<H>PRIVATE-TOKEN: <BAD>\n\n");
    let none = |n: u32| format!("GET <P>?n={n} HTTP/1.1\n<H>\n");
    let refused = |lines: &str, rest: &str| format!("POST <P> HTTP/1.1\n<H>PRIVATE-TOKEN: <BAD>\n{lines}\n{rest}");
    vec![
        Case::new("pipelining", "good, then bad", good(1) + &bad(2), &[200, 401]).seen_as("<P>?n=1"),
        Case::new("pipelining", "bad, then good", bad(1) + &good(2), &[401, 200]).seen_as("<P>?n=2"),
        Case::new("pipelining", "good, none, good", good(1) + &none(2) + &good(3), &[200, 401, 200]),
        Case::new("pipelining", "a good one gives no access to the next", good(1) + &none(2) + &none(3), &[200, 401, 401]),
        Case::new("pipelining", "two hundred without a token", format!("<{}*200>", none(1)), &[401; 200]),
        Case::new("pipelining", "fifty good ones", format!("<{}*50>", good(1)), &[200; 50]),
        Case::new("pipelining", "one with close, and another one", format!("GET <P> HTTP/1.1\n<H><T>Connection: close\n\n{}", good(1)), OK).closed(),
        Case::new("pipelining", "a refused one with close, and another one", format!("GET <P> HTTP/1.1\n<H>Connection: close\n\n{}", good(1)), UNAUTHORIZED).closed(),
        Case::new("pipelining", "a malformed one, and another one", format!("GET <P>  HTTP/1.1\n<H><T>\n{}", good(1)), BAD_REQUEST).closed(),
        Case::new("pipelining", "a refused path, and another request", format!("GET /api/v3/.. HTTP/1.1\n<H><T>\n{}", good(1)), &[400, 200]),
        Case::new("pipelining", "no route, and another request", format!("GET /x HTTP/1.1\n<H><T>\n{}", good(1)), &[404, 200]),
        Case::new("pipelining", "peer: RUSTSEC-2025-0037 a body that is refused unread", refused("Content-Length: <LEN>\n", "<SMUGGLED>"), UNAUTHORIZED),
        Case::new("pipelining", "peer: CVE-2019-20372 a body that is refused unread, and another request", refused("Content-Length: <LEN>\n", "<SMUGGLED>") + &good(1), &[401, 200]).seen_as("<P>?n=1"),
        Case::new("pipelining", "a chunked body that is refused unread", refused("Transfer-Encoding: chunked\n", "<HEX>\n<SMUGGLED>\n0\n\n"), UNAUTHORIZED).closed(),
        Case::new("pipelining", "64 KiB that are refused unread", refused("Content-Length: 65536\n", "<a*65536>") + &good(1), &[401, 200]),
        Case::new("pipelining", "more than 64 KiB that are refused unread", refused("Content-Length: 65537\n", "<a*65537><SMUGGLED>"), UNAUTHORIZED).closed(),
        Case::new("pipelining", "2 MB that are refused unread", refused("Content-Length: 2000000\n", "<a*2000000><SMUGGLED>"), UNAUTHORIZED).closed(),
        Case::new("pipelining", "a refused one that waits for 100", refused("Content-Length: <LEN>\nExpect: 100-continue\n", ""), UNAUTHORIZED).closed(),
        Case::new("pipelining", "a refused one that does not wait for 100", refused("Content-Length: <LEN>\nExpect: 100-continue\n", "<SMUGGLED>"), UNAUTHORIZED).closed(),
        Case::new("pipelining", "a good one that does not wait for 100", post("Content-Length: <LEN>\nExpect: 100-continue\n", "<SMUGGLED>"), OK),
        Case::new("pipelining", "another expectation", post("Content-Length: 2\nExpect: x\n", "ab"), BAD_REQUEST).closed(),
        Case::new("pipelining", "two expectations", post("Content-Length: 2\nExpect: 100-continue\nExpect: 100-continue\n", "ab"), BAD_REQUEST).closed(),
        Case::new("pipelining", "an expectation in a list", post("Content-Length: 2\nExpect: 100-continue, x\n", "ab"), BAD_REQUEST).closed(),
        Case::new("pipelining", "HEAD, then GET", format!("HEAD <P> HTTP/1.1\n<H><T>\n{}", good(1)), &[200, 200]).seen_as("<P>?n=1"),
        Case::new("pipelining", "a refused HEAD, then GET", format!("HEAD <P> HTTP/1.1\n<H>\n{}", good(1)), &[401, 200]),
        Case::new("pipelining", "two empty lines before a request", format!("\n\n{}", good(1)), OK),
        Case::new("pipelining", "three empty lines before a request", format!("\n\n\n{}", good(1)), BAD_REQUEST).closed(),
        Case::new("pipelining", "5,000 empty lines", format!("<\n*5000>{}", good(1)), BAD_REQUEST).closed(),
        Case::new("pipelining", "an empty line between requests", format!("{}\n{}", good(1), bad(2)), &[200, 401]),
        Case::new("pipelining", "half a head, and the end", "GET <P> HTTP/1.1\n<H><T>X-Junk: 1", &[]).half_closed(),
        Case::new("pipelining", "a head without its last line, and the end", "GET <P> HTTP/1.1\n<H><T>", &[]).half_closed(),
        Case::new("pipelining", "HTTP/2 with prior knowledge", "PRI * HTTP/2.0\n\nSM\n\n<SMUGGLED>", BAD_REQUEST).closed(),
    ]
}

#[rustfmt::skip]
fn syntax_and_limits() -> Vec<Case> {
    // Malformed header lines, each after a good token.
    let lines: &[(&str, &str)] = &[
        ("a bare LF",                        "X: y<LF>"),
        ("a fold with a blank",              "X: a\n b\n"),
        ("a fold with a tab",                "X: a\n\tb\n"),
        ("NUL in a value",                   "X: a<x00>b\n"),
        ("CR in a value",                    "X: a<CR>b\n"),
        ("a control byte in a value",        "X: a<x01>b\n"),
        ("ESC in a value",                   "X: <x1b>[31m\n"),
        ("DEL in a value",                   "X: a<x7f>b\n"),
        ("NUL in a name",                    "X<x00>: b\n"),
        ("a blank in a name",                "X Y: b\n"),
        ("a blank behind a name",            "X : b\n"),
        ("a name beyond ASCII",              "X\u{e9}: b\n"),
        ("brackets in a name",               "X(y): b\n"),
        ("a quote in a name",                "\"X\": b\n"),
        ("a slash in a name",                "X/Y: b\n"),
        ("an at sign in a name",             "X@Y: b\n"),
        ("no colon",                         "no-colon-line\n"),
        ("peer: CVE-2023-25725 no name",     ": x\nX: y\n"),
        ("two Content-Types",                "Content-Type: a/b\nContent-Type: c/d\n"),
        ("a line of blanks",                 "   \n"),
    ];
    let mut cases: Vec<Case> = lines
        .iter()
        .map(|(name, lines)| Case::new("syntax_and_limits", *name, get("<P>", &format!("<T>{lines}")), BAD_REQUEST).closed())
        .collect();
    // Malformed request lines.
    let starts: &[(&str, &str)] = &[
        ("LF for CRLF",                      "GET <P> HTTP/1.1<LF>Host: h.test<LF>PRIVATE-TOKEN: <GOOD><LF><LF>"),
        ("CR for CRLF",                      "GET <P> HTTP/1.1<CR>Host: h.test<CR>PRIVATE-TOKEN: <GOOD>\n\n"),
        ("two blanks before the target",     "GET  <P> HTTP/1.1\n<H><T>\n"),
        ("two blanks behind the target",     "GET <P>  HTTP/1.1\n<H><T>\n"),
        ("tabs for blanks",                  "GET\t<P>\tHTTP/1.1\n<H><T>\n"),
        ("a blank before the method",        " GET <P> HTTP/1.1\n<H><T>\n"),
        ("no method",                        " <P> HTTP/1.1\n<H><T>\n"),
        ("NUL before the method",            "<x00>GET <P> HTTP/1.1\n<H><T>\n"),
        ("NUL in the method",                "G<x00>T <P> HTTP/1.1\n<H><T>\n"),
        ("a blank in the method",            "G ET <P> HTTP/1.1\n<H><T>\n"),
        ("separators in the method",         "G=\"(e),[T];?\" <P> HTTP/1.1\n<H><T>\n"),
        ("a method beyond ASCII",            "G\u{c9}T <P> HTTP/1.1\n<H><T>\n"),
        ("a colon behind the method",        "GET: <P> HTTP/1.1\n<H><T>\n"),
        ("a header first",                   "<H><T>GET <P> HTTP/1.1\n\n"),
        ("a target that ends in LF",         "GET /<LF>HTTP/1.1\n<H><T>\n"),
        ("TLS",                              "<x16><x03><x01><x02><x00><x01><x00><x01><xfc><x03><x03>"),
        ("bytes beyond ASCII",               "\u{80}\u{81}\u{82}\n\n"),
        ("SSH",                              "SSH-2.0-OpenSSH_9.0\n\n"),
        ("SMTP",                             "HELO evil\n\n"),
        ("PROXY",                            "PROXY TCP4 6.6.6.6 7.7.7.7 1 2\nGET <P> HTTP/1.1\n<H><T>\n"),
        ("PROXY, version 2",                 "\n\n<x00>\n<x51>UIT<LF>!<x11><x00><x0c>"),
        ("a UTF-8 mark first",               "\u{ef}\u{bb}\u{bf}GET <P> HTTP/1.1\n<H><T>\n"),
    ];
    cases.extend(starts.iter().map(|(name, text)| Case::new("syntax_and_limits", *name, *text, BAD_REQUEST).closed()));
    for method in ["GETT", "get", "Get", "TRACE", "TRACK", "PRI", "PROPFIND", "PURGE", "DEBUG", "QUERY", "M-SEARCH", "!#$%&'*+.^_`|~-", "<A*5000>"] {
        cases.push(Case::new("syntax_and_limits", format!("method {}", named(method)), format!("{method} <P> HTTP/1.1\n<H><T>\n"), &[405]));
    }
    let limits: &[(&str, &str, &[u16], bool)] = &[
        ("128 fields",  "GET <P> HTTP/1.1\n<H><T><X: y\n*125>\n", OK, false),
        ("129 fields",  "GET <P> HTTP/1.1\n<H><T><X: y\n*126>\n", &[431], true),
        ("2,000 fields",                           "GET <P> HTTP/1.1\n<H><T><X: y\n*2000>\n", &[431], true),
        ("20,000 fields",                          "GET <P> HTTP/1.1\n<H><T><X: y\n*20000>\n", &[431], true),
        ("a field of 30 kB",                       "GET <P> HTTP/1.1\n<H><T>X: <a*30000>\n\n", OK, false),
        ("a field of 70 kB",                       "GET <P> HTTP/1.1\n<H><T>X: <a*70000>\n\n", &[431], true),
        ("a field of 1.2 MB",                      "GET <P> HTTP/1.1\n<H><T>X: <a*1200000>\n\n", &[431], true),
        ("a name of 70 kB",                        "GET <P> HTTP/1.1\n<H><T><a*70000>: y\n\n", &[431], true),
        // 270 bytes: in 8 bits the length is 14, that of Content-Length. Who believed it would read the next request as a body.
        ("peer: CVE-2021-40346 a name of 270 bytes", "GET <P>?n=1 HTTP/1.1\n<H><T>Content-Length<a*256>: 8\n\nGET <P>?n=2 HTTP/1.1\n<H><T>\n", &[200, 200], false),
        ("a target of 8 KiB",                      "GET <P>?<a*8175> HTTP/1.1\n<H><T>\n", OK, false),
        ("a target of 8 KiB and a byte",           "GET <P>?<a*8176> HTTP/1.1\n<H><T>\n", &[414], false),
        ("a target of 70 kB",                      "GET <P>?<a*70000> HTTP/1.1\n<H><T>\n", &[414], true),
        ("a method of 70 kB",                      "<A*70000> <P> HTTP/1.1\n<H><T>\n", &[414], true),
        ("a thousand query parameters",            "GET <P>?<a=1&*1000> HTTP/1.1\n<H><T>\n", OK, false),
        ("a thousand tokens",                      "GET <P>?<private_token=x&*500> HTTP/1.1\n<H><T>\n", UNAUTHORIZED, false),
        ("a thousand ranges",                      "GET <P> HTTP/1.1\n<H><T>Range: bytes=<0-,*1000>0-\n\n", OK, false),
        ("a thousand encodings",                   "GET <P> HTTP/1.1\n<H><T>Accept-Encoding: gzip<, gzip*1000>\n\n", OK, false),
        ("Max-Forwards",                           "OPTIONS <P> HTTP/1.1\n<H><T>Max-Forwards: 0\n\n", OK, false),
    ];
    for (name, text, answers, closed) in limits {
        let case = Case::new("syntax_and_limits", *name, *text, answers);
        cases.push(if *closed { case.closed() } else { case });
    }
    cases
}

/// Body parameters that take precedence over the header in a backend.
#[rustfmt::skip]
fn body_credential() -> Vec<Case> {
    const FORM: &str = "Content-Type: application/x-www-form-urlencoded\n";
    const JSON: &str = "Content-Type: application/json\n";
    const PARTS: &str = "Content-Type: multipart/form-data; boundary=b\n";
    const TEXT: &str = "Content-Type: text/plain\n";
    let part = |disposition: &str| format!("--b\nContent-Disposition: form-data; {disposition}\n\n<OTHER>\n--b--\n");
    let mut rows: Vec<(&str, String, String, &[u16])> = vec![
        ("a form",                               FORM.into(), "private_token=<BAD>".into(), UNAUTHORIZED),
        ("a form with a valid token",            FORM.into(), "private_token=<OTHER>".into(), UNAUTHORIZED),
        ("a form with the same token",           FORM.into(), "private_token=<GOOD>".into(), UNAUTHORIZED),
        ("a form, in the middle",                FORM.into(), "a=1&private_token=<OTHER>&b=2".into(), UNAUTHORIZED),
        ("a form, behind a semicolon",           FORM.into(), "a=1;private_token=<OTHER>".into(), UNAUTHORIZED),
        ("a form, behind a bare name and a semicolon", FORM.into(), "a;private_token=<OTHER>".into(), UNAUTHORIZED),
        ("a form, the bare name at the end",     FORM.into(), "a=1&private_token".into(), UNAUTHORIZED),
        ("a form, encoded",                      FORM.into(), "private%5Ftoken=<OTHER>".into(), UNAUTHORIZED),
        ("a form, in brackets",                  FORM.into(), "[private_token]=<OTHER>".into(), UNAUTHORIZED),
        ("a form, an array",                     FORM.into(), "private_token[]=<OTHER>".into(), UNAUTHORIZED),
        ("a form, behind a blank",               FORM.into(), "a=1& private_token=<OTHER>".into(), UNAUTHORIZED),
        ("a form, behind a plus",                FORM.into(), "a=1&+private_token=<OTHER>".into(), UNAUTHORIZED),
        ("a form, after 60,000 bytes",                   FORM.into(), "a=<x*60000>&private_token=<OTHER>".into(), UNAUTHORIZED),
        ("a form, behind a long name",           FORM.into(), "<[*5000>private_token=<OTHER>".into(), UNAUTHORIZED),
        ("a form of capitals",                   "Content-Type: APPLICATION/X-WWW-FORM-URLENCODED\n".into(), "private_token=<OTHER>".into(), UNAUTHORIZED),
        ("a form with a charset",                "Content-Type: application/x-www-form-urlencoded; charset=utf-8\n".into(), "private_token=<OTHER>".into(), UNAUTHORIZED),
        ("a form with a comma",                  "Content-Type: application/x-www-form-urlencoded, text/plain\n".into(), "private_token=<OTHER>".into(), BAD_REQUEST),
        ("no type",                              String::new(), "private_token=<OTHER>".into(), UNAUTHORIZED),
        ("an empty type",                        "Content-Type:\n".into(), "private_token=<OTHER>".into(), UNAUTHORIZED),
        ("a form's type that Connection names",  format!("{FORM}Connection: Content-Type
"), "private_token=<OTHER>".into(), UNAUTHORIZED),
        ("text's type that Connection names",    format!("{TEXT}Connection: content-type
"), "private_token=x".into(), OK),
        ("Content_Type",               "Content_Type: text/plain\n".into(), "private_token=<OTHER>".into(), UNAUTHORIZED),
        ("access_token",                         FORM.into(), "access_token=x".into(), UNAUTHORIZED),
        ("job_token",                            FORM.into(), "job_token=x".into(), UNAUTHORIZED),
        ("bearer_token",                         FORM.into(), "bearer_token=x".into(), UNAUTHORIZED),
        ("sudo",                                 FORM.into(), "sudo=root".into(), &[403]),
        ("peer: gitlab-method-override _method", FORM.into(), "_method=DELETE".into(), BAD_REQUEST),
        ("JSON",                                 JSON.into(), "{\"private_token\":\"<BAD>\"}".into(), UNAUTHORIZED),
        ("JSON, behind others",                  JSON.into(), "{\"a\":{\"b\":[1,\"}\"]}, \"private_token\" : \"<OTHER>\"}".into(), UNAUTHORIZED),
        ("JSON, escaped",                        JSON.into(), "{\"private\\u005Ftoken\":\"<OTHER>\"}".into(), UNAUTHORIZED),
        ("JSON, escaped without need",           JSON.into(), "{\"\\private_token\":\"<OTHER>\"}".into(), UNAUTHORIZED),
        ("peer: CVE-2022-25757 JSON, a key twice", JSON.into(), "{\"private_token\":\"<GOOD>\",\"private_token\":\"<OTHER>\"}".into(), UNAUTHORIZED),
        ("JSON with a mark",                     JSON.into(), "\u{ef}\u{bb}\u{bf}{\"private_token\":\"<OTHER>\"}".into(), BAD_REQUEST),
        ("JSON with a comment",                  JSON.into(), "{/*\"*/\"private_token\":\"<OTHER>\"}".into(), BAD_REQUEST),
        ("JSON in UTF-16",                       JSON.into(), "{<x00>\"<x00>a<x00>\"<x00>".into(), BAD_REQUEST),
        ("malformed JSON",                    JSON.into(), "private_token=<OTHER>".into(), BAD_REQUEST),
        ("JSON, an array",                       JSON.into(), "[{\"a\":1}]".into(), OK),
        ("JSON, nested",                         JSON.into(), "{\"a\":{\"private_token\":\"x\"}}".into(), OK),
        ("peer: CVE-2026-0958 JSON by another type", "Content-Type: application/vnd.api+json\n".into(), "{\"private_token\":\"<OTHER>\"}".into(), UNAUTHORIZED),
        ("JSON as text",                         TEXT.into(), "{\"private_token\":\"<OTHER>\"}".into(), UNAUTHORIZED),
        ("JSON and sudo",                        JSON.into(), "{\"sudo\":\"root\"}".into(), &[403]),
        ("a part",                               PARTS.into(), part("name=\"private_token\""), UNAUTHORIZED),
        ("a part, unquoted",                     PARTS.into(), part("name=private_token"), UNAUTHORIZED),
        ("a part, escaped",                      PARTS.into(), part("name=\"private\\_token\""), BAD_REQUEST),
        ("a part, an array",                     PARTS.into(), part("name=\"private_token[]\""), UNAUTHORIZED),
        ("a part, two names",                    PARTS.into(), part("name=\"a\"; name=\"private_token\""), BAD_REQUEST),
        ("a part, blanks around the equals sign",PARTS.into(), part("name = \"private_token\""), BAD_REQUEST),
        ("a part, capitals",                     PARTS.into(), part("NAME=\"private_token\""), BAD_REQUEST),
        ("a part of a file",                     PARTS.into(), part("name=\"private_token\"; filename=\"x\""), UNAUTHORIZED),
        ("a part named by Content-ID",    PARTS.into(), "--b\nContent-ID: <x3c>private_token<x3e>\n\n<OTHER>\n--b--\n".into(), BAD_REQUEST),
        ("a part with LF lines",                 PARTS.into(), "--b<LF>Content-Disposition: form-data; name=\"private_token\"<LF><LF><OTHER><LF>--b--<LF>".into(), BAD_REQUEST),
        ("a part behind a preamble",             PARTS.into(), format!("x\n{}", part("name=\"private_token\"")), BAD_REQUEST),
        ("the second part",                      PARTS.into(), format!("--b\nContent-Disposition: form-data; name=\"a\"\n\n1\n{}", part("name=\"private_token\"")), UNAUTHORIZED),
        ("a part with a quoted boundary",        "Content-Type: multipart/form-data; boundary=\"b\"\n".into(), part("name=\"private_token\""), UNAUTHORIZED),
        ("two boundaries",                       "Content-Type: multipart/form-data; boundary=x; boundary=b\n".into(), part("name=\"private_token\""), BAD_REQUEST),
        ("another multipart",                    "Content-Type: multipart/mixed; boundary=b\n".into(), part("name=\"private_token\""), UNAUTHORIZED),
        ("a part head of 40 kB",                 PARTS.into(), "--b\nX: <a*40000>\nContent-Disposition: form-data; name=\"private_token\"\n\nx\n--b--\n".into(), BAD_REQUEST),
        ("fine: a form",                         FORM.into(), "a=private_token&xprivate_token=1&PRIVATE_TOKEN=2".into(), OK),
        ("fine: a part",                         PARTS.into(), part("name=\"a\"; filename=\"private_token\"").replace("<OTHER>", "private_token=1"), OK),
        ("fine: text",                           TEXT.into(), "private_token=1".into(), OK),
        ("fine: bytes",                          "Content-Type: application/octet-stream\n".into(), "<x00><x01>\u{ff}private_token=1".into(), OK),
    ];
    rows.push(("JSON as text in UTF-16", TEXT.into(), "{\"private_token\":\"x\"}".chars().map(|c| format!("{c}<x00>")).collect(), UNAUTHORIZED));
    let mut cases = Vec::new();
    for (name, lines, body, answers) in rows {
        let bytes = expand(&body);
        let mut with_length = Case::new("body_credential", name, post(&format!("{lines}Content-Length: {}\n", bytes.len()), &body), answers);
        // Each body also in chunks, split within the name.
        let (front, back) = chunked(&body);
        let text = post(&format!("{lines}Transfer-Encoding: chunked\n"), &format!("{front}{back}0\n\n"));
        let mut in_chunks = Case::new("body_credential", format!("{name}, in chunks"), text, answers);
        if answers != OK {
            with_length = with_length.closed();
            in_chunks = in_chunks.closed();
        }
        cases.extend([with_length, in_chunks]);
    }
    cases.push(Case::new("body_credential", "a form for the only credential",
        "POST <P> HTTP/1.1\n<H>Content-Type: application/x-www-form-urlencoded\nContent-Length: 29\n\nprivate_token=good-token-0001", UNAUTHORIZED));
    cases.push(Case::new("body_credential", "a form in a GET",
        get("<P>", "<T>Content-Type: application/x-www-form-urlencoded\nContent-Length: 15\n") + "private_token=x", UNAUTHORIZED).closed());
    cases.push(Case::new("body_credential", "peer: CVE-2022-29266 a response does not repeat what was sent",
        get("<P>?private_token=<BAD>", "PRIVATE-TOKEN: <BAD>\nAuthorization: Bearer <BAD>\n"), UNAUTHORIZED));
    cases
}

/// A body's text as two chunks, split within the first relevant name.
fn chunked(body: &str) -> (String, String) {
    let at = ["private", "sudo", "_method", "token"].iter().find_map(|word| Some(body.find(word)? + 2)).unwrap_or(0);
    let chunk = |text: &str| match expand(text).len() {
        0 => String::new(),
        length => format!("{length:x}\n{text}\n"),
    };
    let (front, back) = body.split_at(at);
    (chunk(front), chunk(back))
}

#[test]
fn tokens_are_what_the_tables_say() {
    assert_eq!(expand("<GOOD><OTHER><BAD>"), [GOOD, OTHER, BAD].concat().into_bytes());
}
