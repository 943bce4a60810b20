//! Every refusal reason in words: what it means and what to do. The one table of these texts; `docs/operations.md` has the same
//! rows, and a test compares them. It must not know a request.

/// A reason of a refusal, as people read it. The texts are Markdown, as in the documentation.
#[derive(Debug)]
pub struct ReasonText {
    /// As [`crate::reply::Refusal::reason`] has it.
    pub reason: &'static str,
    pub status: u16,
    pub means: &'static str,
    pub advice: &'static str,
}

const fn row(reason: &'static str, status: u16, means: &'static str, advice: &'static str) -> ReasonText {
    ReasonText { reason, status, means, advice }
}

/// What the access log says in place of a refusal reason.
const OTHERS: [(&str, &str, &str); 4] = [
    (
        "ok",
        "nothing was refused, and nothing failed in tollgate",
        "if the status is an error, the backend answered with it: look there",
    ),
    (
        "aborted",
        "the process ended before the request did",
        "look at the process log around the time: a shutdown, a crash or the end of `shutdown_grace`",
    ),
    (
        "client_gone",
        "the client closed the connection first",
        "its own timeout? `duration_ms` says after what time; `upstream_duration_ms` how much of that was the backend's",
    ),
    (
        "failed",
        "an error after the response had begun; the connection was closed so that the client can detect it",
        "`upstream_status` and the process log say which side failed",
    ),
];

#[rustfmt::skip]
pub const REASONS: &[ReasonText] = &[
    // 400, 431, 408, 413, 414: the request itself
    row("request_line", 400, "not `METHOD SP TARGET SP HTTP/1.x`, a bare LF, TLS or HTTP/2 spoken to a plain port, or an absolute target that is not http(s)",
        "bytes of a TLS handshake: the client uses https on a plain-text port"),
    row("field_line", 400, "a header line that is not `Name: value` terminated by CRLF: blank before the colon, folded, control bytes, bare CR or LF",
        "fix the client"),
    row("host", 400, "Host is missing (also in HTTP/1.0), repeated, malformed, or differs from the one in an absolute target",
        "a health check without Host? configure one"),
    row("framing", 400, "Content-Length or Transfer-Encoding is ambiguous or malformed (both, repeated, list, sign, leading zero, another coding, HTTP/1.0 with chunks), or a chunked body is malformed",
        "fix the client; many from one address: attempted request smuggling"),
    row("connection_header", 400, "Connection is malformed or has more than 16 options",
        "fix the client"),
    row("expect", 400, "Expect has a value other than 100-continue, or is repeated",
        "fix the client"),
    row("content_type", 400, "Content-Type is repeated",
        "fix the client"),
    row("too_many_fields", 431, "more than 128 header fields",
        "a proxy in front that adds headers in a loop?"),
    row("target_byte", 400, "a byte that is not allowed in the path or query (space, `\"`, `<`, unencoded non-ASCII, …), or escapes that are not valid UTF-8",
        "the client must percent-encode"),
    row("target_escape", 400, "`%` without two hex digits",
        "the client must write `%25`"),
    row("dot_segment", 400, "`.` or `..` as a segment, raw or encoded, also next to `%2F` or before `;`",
        "a client that does not normalise paths, or a traversal attempt"),
    row("backslash", 400, "a raw or encoded backslash in the path",
        "a client that does not normalise paths, or a traversal attempt"),
    row("control_byte", 400, "an encoded control byte in the path",
        "a client that does not normalise paths, or a traversal attempt"),
    row("prefix_spelling", 400, "a path whose prefix [is replaced](#routes), spelled in another way than the route's (escapes, `//`)",
        "fix the client, or give the path a route without `rewrite_prefix`"),
    row("ambiguous_path", 400, "a path that another server [could read](#routes) as one of a narrower route with a stricter `auth`, `allow` or `deny`; with `[api] ambiguous_paths = \"refuse\"` any with an escaped `/`, `%`, `?` or `#`, or with a `;`",
        "an attempt to get around a route. A client that must send such paths needs a route that is as strict as the one beside it"),
    row("fragment", 400, "a `#` in the target",
        "fix the client"),
    row("method_override", 400, "X-HTTP-Method-Override or a similar header, or `_method` in the query: the backend would run a different method than the one judged",
        "the client must send the method itself; see `[token] method_override`"),
    row("page_depth", 400, "`page` greater than `max_page` with `beyond_max_page = \"refuse\"`",
        "raise `max_page`, or narrow the client's query"),
    row("verdict_field", 400, "a proxy asks ([verdict.md](verdict.md)) without a field that says what is asked for, or with one twice",
        "compare its configuration with the one there; is `source` right?"),
    row("verdict_value", 400, "such a field is no method, path or host; with \"envoy\", the path does not begin with `path_prefix`",
        "compare the proxy's configuration with the one in [verdict.md](verdict.md); is `source` right?"),
    row("verdict_body", 400, "the question has a body",
        "the proxy must ask without (`proxy_pass_request_body off`)"),
    row("verdict_strange", 400, "the client sent a field that tollgate would remove in the path, and cannot from beside it",
        "put tollgate in the path, or have the proxy remove it before it asks"),
    row("verdict_change", 400, "the query would have to be changed, for its page parameters",
        "narrow the client's query, or `[[pagination.route]] enabled = false`"),
    row("body_method", 400, "a `_method` field in the body: as `method_override`",
        "the client must send the method itself; see `[token] method_override`"),
    row("body_ambiguous", 400, "a body that does not follow the grammar of its type ([security.md](security.md#bodies)), so that backends would read it in different ways",
        "fix the client; `token.body = \"ignore\"` only if the backend reads tokens from the header alone"),
    row("body_type", 400, "a Content-Type that only some backends accept as form, multipart or JSON: two boundaries or none, a list of types, a repeated parameter",
        "fix the client; `token.body = \"ignore\"` only if the backend reads tokens from the header alone"),
    row("body_untyped", 400, "a body without a Content-Type, with `token.untyped_body = \"refuse\"`",
        "the client must send a Content-Type"),
    row("body_page", 400, "`page` or `per_page` in the body of a GET or HEAD, which Rack would use instead of the one in the query",
        "the client must use the query"),
    row("header_timeout", 408, "the request head was not complete within `header_timeout`",
        "slow network, or slowloris. Many at once: check `tollgate_connections`"),
    row("body_timeout", 408, "60s without a byte of the body",
        "slow or dead client"),
    row("body_rate", 408, "the body came slower than `[limits] body_rate` for longer than `body_grace` ([edge.md](edge.md#slow-clients))",
        "slow network, a client that makes its body as it goes, or slowloris. Many at once: `tollgate_slow_bodies_total`, then the log by `client`"),
    row("body_size", 413, "the body is larger than `body_bytes`",
        "raise it if the upload is legitimate"),
    row("query_charset", 415, "a query together with a Content-Type whose charset is not known to encode ASCII as itself: some backends decode the query by it",
        "the client must use UTF-8, or send its parameters in a body"),
    row("target_size", 414, "the target is longer than `target_bytes`",
        "raise it up to 60 KiB, or send the parameters in a body"),
    row("body_charset", 415, "a form, multipart or JSON in a charset other than UTF-8, US-ASCII, ISO-8859-x or windows-125x",
        "send UTF-8"),
    row("body_coding", 415, "Content-Encoding on a form, multipart, JSON or text, or on a body without a type",
        "send it uncompressed"),
    row("header_size", 431, "the request head is larger than `header_bytes`",
        "large cookies? raise it up to 512 KiB"),
    // 401 and 403: the credential
    row("missing", 401, "the route needs a token and the request has none",
        "a path that should be open needs a `[[route]]`"),
    row("empty", 401, "a token header, parameter or Bearer without a value",
        "a variable in a script is not set?"),
    row("too_long", 401, "the token is longer than `[token] max_bytes`",
        "another kind of credential (a JWT?), or raise it up to 2048"),
    row("basic", 401, "`Authorization: Basic` on a route with `basic = true` that is not strict base64 of one user name, a colon and a token",
        "fix the client"),
    row("basic_user", 401, "a user name that `[token] basic` does not accept, or that is not the token's user",
        "the name that clients of this kind send has to be in the list; with \"any\", a user whose name has a colon cannot use Basic"),
    row("bad_byte", 401, "a byte outside visible ASCII, after decoding once; `+` in a query is a space",
        "a token copied with a blank or a line end"),
    row("conflict", 401, "two different tokens in one request",
        "the client sends an old one besides the new one: often from `.netrc` or a default header"),
    row("spelling", 401, "a query name that only some parsers read as the token's: `private%5Ftoken`, `private_token[]`, `private.token`, after a `;`",
        "fix the client; else an attempted bypass"),
    row("query_token", 401, "a token in the query of a route with `query_token = \"refuse\"`",
        "the client must use the header"),
    row("other_credential", 401, "`access_token`, `bearer_token` or `job_token` in the query while not allowed",
        "`[token] access_token` or `job_token = \"allow\"`, after reading [security.md](security.md)"),
    row("body", 401, "a token field in the body, which the backend would use instead of the one judged",
        "the client must use the header"),
    row("unknown", 401, "the store has no such token",
        "`tollgate token show --config … -` with the token on standard input. All callers at once: is it the right store?"),
    row("expired", 401, "the token, or the overlap of its rotation, has expired",
        "a new token; after a rotation, the one that `tollgate token rotate` printed"),
    row("not_yet_valid", 401, "its `not_before` is in the future",
        "wait, or create one without. Many at once: is a clock wrong?"),
    row("revoked", 401, "it was revoked",
        "a new token; many requests: a leaked token is still in use"),
    row("blocked", 401, "its user is blocked, in tollgate's store or, with GitLab's tables and introspection, there (`state` is not `active`)",
        "`tollgate token unblock`, or unblock the user in the other system. All users at once: the query or the backend's `state` changed"),
    row("no_identity", 401, "the route needs an identity and there is none; should not occur",
        "report it with the log line"),
    row("sudo", 403, "`sudo` or SUDO with `token.sudo = \"refuse\"`",
        "`\"allow\"`, if the backend is to decide"),
    row("scope", 403, "the token is valid, but none of its scopes allows this method on this path",
        "`tollgate token show` lists its scopes; `[[scope]]` and `[api] scopes` define what they allow. Many after a reload: with any `[[scope]]`, a token without scopes is allowed nothing"),
    row("sudo_scope", 403, "`sudo` is allowed here, but by none of the token's scopes",
        "a token with a scope that has `sudo`"),
    row("body_sudo", 403, "`sudo` in a body with `token.sudo = \"refuse\"`",
        "`\"allow\"`, if the backend is to decide"),
    row("address", 403, "the client's address is not in `allow`, or in `deny`, of `[limits]` or of the route",
        "`client` in the log line is the address that was judged: behind a proxy, is that in `trusted_proxies`? [limits.md](limits.md#addresses)"),
    row("token_network", 403, "the token's record names networks, and the client's address is in none of them",
        "`tollgate token show` lists them; `client` in the log line is the address that was judged. A peer of a Unix socket has none. [limits.md](limits.md#networks-and-methods-of-a-token)"),
    row("token_method", 403, "the token's record names methods, and this is none of them",
        "`tollgate token show` lists them"),
    row("plain_http", 403, "a token, or a method other than GET and HEAD, on a listener with `redirect_to_https`",
        "the client's URL begins with `http://`: the token has been sent in plain text, so replace it"),
    // 308, 404, 405
    row("no_route", 404, "outside the prefixes and every `[[route]]` with this method",
        "a missing prefix or route; else scanners"),
    row("redirect_to_https", 308, "a request without a token on a listener with `redirect_to_https`",
        "nothing, if it is a browser"),
    row("method", 405, "not GET HEAD POST PUT PATCH DELETE OPTIONS",
        "scanners; WebDAV is not supported"),
    // 429: limits
    row("limit_rate", 429, "more requests than `rate` and `burst` allow",
        "a client in a loop? else a higher rate, or a limit of its own for these `users`"),
    row("limit_quota", 429, "the `quota` of the day or the month is used up",
        "wait for midnight UTC, or a higher quota; a restart forgets what was used"),
    row("guessing", 429, "too many failed tokens came from this address, this token is not in the cache, and the address's turns at the store are taken for longer than `wait` ([guessing](limits.md#guessing)); no `limit` in the line",
        "`GET /guessing`. Is it an office or a proxy? `allow`, or `trusted_proxies`, so that tollgate sees the clients' own addresses; `POST /guessing/lift?client=ADDRESS`"),
    row("limit_concurrency", 429, "as many requests of this key in flight as `concurrency` allows",
        "downloads and WebSockets count to their end. Is the backend slow?"),
    // 5xx: tollgate, its store or the upstream
    row("limit_store", 503, "a [shared limit](limits.md#shared-limits) with `when_gone = \"closed\"` applies, and its store does not answer; `limit` in the line",
        "TollgateSharedLimitsGone"),
    row("bug", 500, "an internal error of tollgate",
        "report it, with the journal around the time. It affects one request"),
    row("upstream_broken", 502, "no connection to any server that was tried, or it closed before a response",
        "is the backend up, is the address right? `kind` in `tollgate_upstream_errors_total`: `connect`, the connection was refused; `closed`, the backend closed it; `tls_…`, see [TLS to servers](#tls-to-servers). Occasional `closed` on POST: the backend's keep-alive timeout is shorter than `upstream.idle_timeout`"),
    row("upstream_malformed", 502, "an ambiguous response: two lengths, length and chunks, another coding, malformed syntax, a 101 that was not requested",
        "capture it; fix the backend, or a proxy in between"),
    row("upstream_absent", 503, "no server of the upstream has an address",
        "`tollgate check` names those that cannot be resolved; the name server, `/etc/hosts`"),
    row("upstream_queue_full", 503, "all servers have `max_requests` in flight, and `queue` requests are waiting",
        "more load than the backend may have: more servers, a higher `max_requests` if they can take it (or [`\"adaptive\"`](#an-adaptive-limit)); or one that has become slow: `tollgate_upstream_duration_seconds`"),
    row("upstream_queue_timeout", 503, "all servers have `max_requests` in flight, and the request has waited for `queue_timeout`",
        "more load than the backend may have: more servers, a higher `max_requests` if they can take it (or [`\"adaptive\"`](#an-adaptive-limit)); or one that has become slow: `tollgate_upstream_duration_seconds`"),
    row("store", 503, "the store cannot answer, and the cache has no entry within `stale_if_error`",
        "the journal has the error, `tollgate_store_errors_total` the store. SQLite: disk, permissions (`ls -l` of the database, its `-wal` and `-shm`: all must belong to the service), a file that was moved, or replaced by an empty one. PostgreSQL, Redis: can they be reached from here, with this user? Tables that are missing: `tollgate store migrate`; of a newer version: upgrade tollgate"),
    row("store_record", 503, "the store's record of this token cannot be read, and the cache has no entry within `stale_if_error`",
        "the journal names the token's id and what is wrong"),
    row("store_busy", 503, "a lookup found no place at the store within its `timeout`, 8192 lookups of tokens without a cache entry were in progress or waiting, or a token changed repeatedly while it was looked up",
        "a flood of unknown tokens, a slow store, or a restart without a snapshot. `tollgate_store_lookup_duration_seconds` distinguishes a slow store from a flood"),
    row("store_not_asked", 503, "the request was only observed, and the cache has no entry for its token. Never occurs for a client's request",
        "report it if it is in the access log"),
    row("draining", 503, "a WebSocket was cut because the gateway is shutting down; status 101 in its line",
        "expected during a restart"),
    row("upstream_timeout", 504, "no connection within `connect_timeout`, or no byte within `read_timeout` or `per_try_timeout`",
        "the backend hangs; for slow endpoints, a longer `read_timeout`"),
    row("upstream_request_timeout", 504, "the exchange took longer than `request_timeout`: the queue, all tries, the client's body and the response together",
        "`upstream_duration_ms` and `attempts` in the same line; slow uploads or downloads need a longer time"),
];

/// What a reason of the access log means, and what to do. `None`: it is none.
pub fn texts(reason: &str) -> Option<(String, String)> {
    let known = REASONS.iter().find(|row| row.reason == reason).map(|row| (row.means, row.advice));
    let other = || OTHERS.iter().find(|(name, ..)| *name == reason).map(|(_, means, advice)| (*means, *advice));
    known.or_else(other).map(|(means, advice)| (plain(means), plain(advice)))
}

/// Where the documentation has a reason.
pub const REASONS_PAGE: &str = "docs/operations.md#every-refusal-reason";

/// Markdown without its links: what they are called, and the page if it is another one.
fn plain(text: &str) -> String {
    let (mut out, mut rest) = (String::new(), text);
    while let Some(close) = rest.find("](") {
        let (before, behind) = (&rest[..close], &rest[close + 2..]);
        let (Some(open), Some((target, behind))) = (before.rfind('['), behind.split_once(')')) else { break };
        let name = &before[open + 1..];
        out.push_str(&before[..open]);
        // Links within the page, and those whose name is the page.
        match target.starts_with('#') || target.starts_with(name) {
            true => out.push_str(name),
            false => out.push_str(&format!("{name} (docs/{target})")),
        }
        rest = behind;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// The reasons and statuses that refusals have, as the source says them.
    fn in_the_source() -> BTreeMap<String, u16> {
        let source = include_str!("../reply/refusal.rs");
        let terms = source.split("const fn terms").nth(1).unwrap().split("\n    }\n").next().unwrap();
        let mut found = BTreeMap::new();
        let mut shared = 0;
        for line in terms.lines() {
            let number = line.split(|c: char| !c.is_ascii_digit()).find(|word| word.len() == 3);
            shared = number.map_or(shared, |number| number.parse().unwrap());
            for word in line.split('"').skip(1).step_by(2) {
                found.insert(word.to_owned(), shared);
            }
        }
        found
    }

    #[test]
    fn every_refusal_has_a_text() {
        let source = in_the_source();
        assert!(source.len() >= 60, "only {} reasons were found", source.len());
        let table: BTreeMap<String, u16> = REASONS.iter().map(|row| (row.reason.to_owned(), row.status)).collect();
        assert_eq!((table.len(), &table), (REASONS.len(), &source));
        for row in REASONS {
            assert!(row.means.len() > 10 && row.advice.len() > 2, "{}", row.reason);
        }
    }

    #[test]
    fn the_documentation_has_the_same_rows() {
        let page = include_str!("../../docs/operations.md");
        let said: Vec<&str> = page.lines().filter(|line| line.starts_with("| `")).collect();
        for ReasonText { reason, status, means, advice } in REASONS {
            let row = format!("| `{reason}` | {status} | {means} | {advice} |");
            assert!(said.contains(&row.as_str()), "docs/operations.md has no such row:\n{row}");
        }
    }

    #[test]
    fn links_become_words() {
        assert_eq!(plain("see [edge.md](edge.md#slow) or [TLS](#tls)."), "see edge.md or TLS.");
        assert_eq!(plain("`a[b]`, [here](x.md)"), "`a[b]`, here (docs/x.md)");
        assert!(REASONS.iter().all(|row| !plain(row.advice).contains("](") && !plain(row.means).contains("](")));
    }
}
