//! Pagination: how `page` and `per_page` are forwarded, and what `Link` and `Location` may contain.

use crate::harness::*;

const PATH: &str = "/api/v3/projects";

/// The query that the backend gets.
fn forwarded(gateway: &Gateway, upstream: &Upstream, method: &str, path: &str, query: &str) -> String {
    let mut client = gateway.client();
    client.send_head(&format!("{method} {path}{query} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\n\n"));
    let answer = client.answer_to(method).unwrap();
    assert_eq!(answer.status, 200, "{method} {path}{query}");
    let target = upstream.only().target;
    upstream.forget();
    target.strip_prefix(path).unwrap_or_else(|| panic!("the path was changed: {target}")).to_owned()
}

/// Each query must reach the backend in the given form.
fn table(config: &str, path: &str, rows: &[(&str, &str)]) {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, config);
    for (query, expected) in rows {
        for method in ["GET", "HEAD"] {
            assert_eq!(forwarded(&gateway, &upstream, method, path, query), *expected, "{method} {query}");
        }
    }
}

#[test]
fn per_page_is_kept_within_its_bounds() {
    table(
        "",
        PATH,
        &[
            ("?per_page=100", "?per_page=100"),
            ("?per_page=101", "?per_page=100"),
            ("?per_page=99999999999999999999999", "?per_page=100"),
            ("?per_page=1", "?per_page=1"),
            ("?per_page=0", "?per_page=20"),
            ("?per_page=-1", "?per_page=20"),
            ("?per_page=all", "?per_page=20"),
            ("?per_page=", "?per_page=20"),
            ("?per_page", "?per_page=20"),
            ("?per_page=0x50", "?per_page=20"),
        ],
    );
}

#[test]
fn page_is_kept_within_its_bounds() {
    table(
        "",
        PATH,
        &[
            ("?page=1", "?page=1"),
            ("?page=7", "?page=7"),
            ("?page=0", "?page=1"),
            ("?page=-7", "?page=1"),
            ("?page=abc", "?page=1"),
            ("?page=", "?page=1"),
            ("?page", "?page=1"),
        ],
    );
}

/// Like Ruby's `to_i`: both must read the same number.
#[test]
fn a_number_with_junk_is_read_as_the_backend_reads_it() {
    table(
        "",
        PATH,
        &[
            ("?per_page=50abc", "?per_page=50"),
            ("?per_page=500abc", "?per_page=100"),
            ("?per_page=5.9", "?per_page=5"),
            ("?per_page=%2B5", "?per_page=5"),
            ("?per_page=+5", "?per_page=5"),
            ("?per_page=%20%0A5", "?per_page=5"),
            ("?per_page=5_0", "?per_page=50"),
            ("?per_page=5_000", "?per_page=100"),
            ("?per_page=5__0", "?per_page=5"),
            ("?per_page=007", "?per_page=7"),
            ("?per_page=1e3", "?per_page=1"),
            ("?per_page=%35%30%30", "?per_page=100"),
            ("?page=3rd", "?page=3"),
            ("?page=-3rd", "?page=1"),
            ("?page=2%00", "?page=2"),
        ],
    );
}

#[test]
fn what_needs_no_change_is_forwarded_byte_for_byte_and_in_place() {
    let rows = [
        "",
        "?",
        "?x",
        "?page=2&per_page=50",
        "?a=1&page=2&b=%41%7e&per_page=50&c=+",
        "?per_page=50&&page=2&",
        "?=&a==b&page=2",
        "?labels[]=a&labels[]=b&page=2",
        "?Page=-1&PER_PAGE=5000&per-page=5000&xpage=0&page2=0",
        "?q=page%3D0%26per_page%3D5000",
    ];
    table("", PATH, &rows.map(|query| (query, query)));
    // The rest of the query does not change.
    table(
        "",
        PATH,
        &[
            ("?a=%41&per_page=5000&b=+;c", "?a=%41&per_page=100&b=+;c"),
            ("?z=1&page=0", "?z=1&page=1"),
            ("?page=0&z", "?page=1&z"),
            ("?a=1;per_page=5000", "?a=1;per_page=100"),
        ],
    );
}

#[test]
fn repeated_keys_collapse_to_the_last_and_structures_are_dropped() {
    table(
        "",
        PATH,
        &[
            ("?per_page=5&per_page=6", "?per_page=6"),
            ("?per_page=5&x=1&per_page=6000", "?x=1&per_page=100"),
            ("?page=2&page=3&page=4&per_page=5", "?page=4&per_page=5"),
            ("?page[]=2", ""),
            ("?a=1&page[]=2&b=2", "?a=1&b=2"),
            ("?per_page[x]=5000&page=2", "?page=2"),
            ("?per_page%5B%5D=5000", ""),
            ("?per_page=5&per_page[]=5000", "?per_page=5"),
            ("?per%5Fpage=5000", "?per_page=100"),
            ("?%70age=0", "?page=1"),
            ("?per_page=5&%70er_page=5000", "?per_page=100"),
        ],
    );
}

/// Names that PHP rewrites to the key, or with a leading blank: Rack reads another key, so they are dropped and do not
/// replace the one that Rack reads.
#[test]
fn names_that_other_readers_fold_into_a_page_are_dropped() {
    table(
        "",
        PATH,
        &[
            ("?per.page=5000", ""),
            ("?per+page=5000&x=1", "?x=1"),
            ("?per%5Bpage=5000", ""),
            ("?per_page=5&per.page=5000", "?per_page=5"),
            ("?page%20=5000&page=2", "?page=2"),
            ("?+page=9&%20per_page=5000&a", "?a"),
            ("?page%00abc=99999999999999999999", ""),
            ("?page%00;x=5000", "?x=5000"),
            // Only Rack ends a number at `;`.
            ("?per_page=5;x=1", "?per_page=5&x=1"),
            ("?per_page=5000;page=0;x=1", "?per_page=100&page=1&x=1"),
            ("?page.x=9&per_page.=5000&perpage=5000", "?page.x=9&per_page.=5000&perpage=5000"),
        ],
    );
}

#[test]
fn no_page_is_above_the_integers_of_a_backend() {
    let deep = "[pagination]\nmax_page = 9000000000000000000\nmax_per_page = \"none\"\n";
    table(
        deep,
        PATH,
        &[
            ("?page=2147483647", "?page=2147483647"),
            ("?page=2147483648", "?page=2147483647"),
            ("?page=9223372036854775808&per_page=9223372036854775808", "?page=2147483647&per_page=2147483647"),
        ],
    );
    table("", PATH, &[("?page=2147483648", "?page=2147483647"), ("?page=99999999999999999999", "?page=2147483647")]);
    table("[pagination]\nmax_page = 7\n", PATH, &[("?page=2147483648", "?page=7")]);
}

#[test]
fn absent_parameters_stay_absent_unless_injected() {
    let config = "[pagination]\ninject_defaults = true\n";
    table("", PATH, &[("", ""), ("?x=1", "?x=1"), ("?page=2", "?page=2"), ("?per_page=7", "?per_page=7")]);
    table(
        config,
        PATH,
        &[
            ("", "?page=1&per_page=20"),
            ("?x=1", "?x=1&page=1&per_page=20"),
            ("?page=3", "?page=3&per_page=20"),
            ("?per_page=7", "?per_page=7&page=1"),
            ("?page=3&per_page=7", "?page=3&per_page=7"),
            ("?page[]=3&per_page=7", "?per_page=7&page=1"),
        ],
    );
}

#[test]
fn bounds_can_be_configured() {
    let config = "[pagination]\nfirst_page = 0\ndefault_per_page = 10\nmax_per_page = 50\n";
    table(
        config,
        PATH,
        &[
            ("?page=0", "?page=0"),
            ("?page=-1", "?page=0"),
            ("?page=x", "?page=0"),
            ("?per_page=0", "?per_page=10"),
            ("?per_page=51", "?per_page=50"),
        ],
    );
    table(
        "[pagination]\nmax_per_page = \"none\"\n",
        PATH,
        &[("?per_page=5000", "?per_page=5000"), ("?per_page=0", "?per_page=20")],
    );
}

#[test]
fn a_page_past_the_depth_is_clamped_or_refused() {
    table(
        "[pagination]\nmax_page = 50\n",
        PATH,
        &[("?page=50", "?page=50"), ("?page=51", "?page=50"), ("?page=99999999999999999999", "?page=50")],
    );
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "[pagination]\nmax_page = 50\nbeyond_max_page = \"refuse\"\n");
    assert_eq!(forwarded(&gateway, &upstream, "GET", PATH, "?page=50"), "?page=50");
    for query in ["?page=51", "?page=51abc", "?page=2&page=51", "?%70age=51"] {
        let answer = gateway.get(&format!("{PATH}{query}"));
        assert_eq!((answer.status, answer.text()), (400, "{\"message\":\"400 Bad Request\"}".into()), "{query}");
    }
    assert_eq!(upstream.seen().len(), 0);
    assert_eq!(forwarded(&gateway, &upstream, "GET", PATH, "?page=51&page=2"), "?page=2", "the last one is used");
}

#[test]
fn routes_can_override_the_bounds() {
    // GitLab's commits count pages from 0 and have no maximum.
    let config = "[[pagination.route]]\npath = \"/api/v3/projects/:id/repository/commits\"\nfirst_page = 0\nmax_per_page = \"none\"\n\
                  [[pagination.route]]\npath = \"/api/v3/raw/*\"\nenabled = false\n";
    let commits = "/api/v3/projects/group%2Fproject/repository/commits";
    table(
        config,
        commits,
        &[
            ("?page=0&per_page=5000", "?page=0&per_page=5000"),
            ("?page=-1", "?page=0"),
            ("?per_page=0", "?per_page=20"),
            ("?page=x&per_page=1&per_page=2", "?page=0&per_page=2"),
        ],
    );
    for (path, query) in
        [("/api/v3/raw/file", "?page=-1&per_page=5000&page[]=1"), ("/api/v3/raw", "?per_page=5&per_page=x")]
    {
        table(config, path, &[(query, query)]);
    }
    // Other spellings of the same endpoint get the same bounds, other endpoints the default ones.
    table(config, "/api/v3//projects/1/repository/%63ommits/", &[("?page=0&per_page=5000", "?page=0&per_page=5000")]);
    table(config, "/api/v3/projects/1/repository/commits.json", &[("?page=0", "?page=0")]);
    for path in ["/api/v3/projects/1/repository/commits/x", "/api/v3/projects/1/repository/tags", "/api/v3/rawx"] {
        table(config, path, &[("?page=0&per_page=5000", "?page=1&per_page=100")]);
    }
}

#[test]
fn other_methods_are_left_alone() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(
        upstream.address,
        "[pagination]\ninject_defaults = true\nmax_page = 5\nbeyond_max_page = \"refuse\"\n",
    );
    for method in ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"] {
        let query = "?page=-1&per_page=5000&page[]=9&page=99";
        assert_eq!(forwarded(&gateway, &upstream, method, PATH, query), query, "{method}");
        assert_eq!(forwarded(&gateway, &upstream, method, PATH, ""), "", "{method}");
    }
}

#[test]
fn the_token_is_cut_out_and_the_pages_are_bounded_in_one_go() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    for (query, expected) in [
        ("?private_token=@&per_page=5000", "?per_page=100"),
        ("?per_page=5000&private_token=@", "?per_page=100"),
        ("?a=%41&private_token=@&per_page=5000&b=2&private_token=@&page=0", "?a=%41&per_page=100&b=2&page=1"),
        ("?private_token=@&page[]=1", ""),
        ("?page[]=1&x&private_token=@", "?x"),
    ] {
        let query = query.replace('@', GOOD);
        assert_eq!(forwarded(&gateway, &upstream, "GET", PATH, &query), expected, "{query}");
    }
}

#[test]
fn clamps_are_counted() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    gateway.get(&format!("{PATH}?page=1&per_page=100"));
    gateway.get(&format!("{PATH}?page=0&per_page=5000"));
    gateway.get(&format!("{PATH}?per_page=5000"));
    let clamps = |parameter| gateway.metric(&format!("tollgate_pagination_clamps_total{{parameter=\"{parameter}\"}}"));
    assert_eq!((clamps("page"), clamps("per_page")), (1.0, 2.0));
}

/// GitLab 8.5 and later copies every parameter of the request into Link.
#[test]
fn link_and_location_never_carry_a_token_out() {
    for (value, expected) in [
        (
            "<http://h/p?page=2&per_page=20&private_token=@>; rel=\"next\", <http://h/p?private_token=@&page=1>; rel=\"first\"",
            "<http://h/p?page=2&per_page=20>; rel=\"next\", <http://h/p?page=1>; rel=\"first\"",
        ),
        ("<http://h/p?private_token=@>; rel=\"next\"", "<http://h/p>; rel=\"next\""),
        ("<http://h/p?x=1&private_token=@#f>; rel=\"next\"", "<http://h/p?x=1#f>; rel=\"next\""),
        ("http://h/p?private%5Ftoken=@&a=b", "http://h/p?a=b"),
        ("/p?access_token=@&private_token[]=@&[private_token]=@&job_token=@&z", "/p?z"),
        ("/p?a=1;private_token=@;b=2", "/p?a=1;b=2"),
        ("/p?page=2&x=private", "/p?page=2&x=private"),
    ] {
        let value = value.replace('@', GOOD);
        let upstream = Upstream::answering(move |_| {
            Reply::raw(format!(
                "HTTP/1.1 201 Created\r\nLink: {value}\r\nX-Total: 3\r\nLocation: {value}\r\nContent-Length: 0\r\n\r\n"
            ))
        });
        let gateway = Gateway::start(upstream.address, "");
        let answer = gateway.get(PATH);
        assert_eq!((answer.status, answer.header("X-Total")), (201, Some("3")));
        assert_eq!((answer.header("Link"), answer.header("Location")), (Some(expected), Some(expected)));
    }
}

/// The request's token is removed in any place, also without a parameter's name.
#[test]
fn link_and_location_never_carry_the_requests_own_token_out() {
    let upstream = Upstream::answering(|_| {
        Reply::raw("HTTP/1.1 302 Found\r\nLink: <http://h/p?url=%2Fx%3Fprivate_token%3D@&page=2>; rel=\"next\"\r\nLocation: http://h/login?next=/p%3Fprivate_token=@\r\nContent-Length: 0\r\n\r\n".replace('@', GOOD))
    });
    let gateway = Gateway::start(upstream.address, "");
    let answer = gateway.get(PATH);
    assert!(!format!("{:?}", answer.headers).contains(GOOD), "{:?}", answer.headers);
}

/// All lines of Link are checked, and those that need no change are not changed.
#[test]
fn several_link_lines_are_all_scrubbed() {
    let upstream = Upstream::answering(|_| {
        let lines = "Link: </p?page=2>; rel=\"next\"\r\nLink: </p?private_token=@&page=1>; rel=\"first\"\r\n";
        Reply::raw(format!("HTTP/1.1 200 OK\r\n{}Content-Length: 0\r\n\r\n", lines.replace('@', GOOD)))
    });
    let gateway = Gateway::start(upstream.address, "");
    let answer = gateway.get(PATH);
    let is_link = |name: &str| name.eq_ignore_ascii_case("Link");
    let links: Vec<_> =
        answer.headers.iter().filter(|(name, _)| is_link(name)).map(|(_, value)| value.as_str()).collect();
    assert_eq!(links, ["</p?page=2>; rel=\"next\"", "</p?page=1>; rel=\"first\""]);
}
