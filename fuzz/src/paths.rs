//! Paths: one canonical form for all spellings of a path, and one route for all of them.

use std::sync::LazyLock;
use tollgate::request::route::{Methods, Route};
use tollgate::request::routes::Routes;
use tollgate::request::target::{canonical, check};
use tollgate::request::view::Method;

static ROUTES: LazyLock<Routes> = LazyLock::new(|| {
    let route = |path: &str, methods: Methods, host: Option<&str>| {
        let mut route = Route::new(path.parse().expect("a pattern"), path.to_owned());
        route.methods = methods;
        route.hosts = host.into_iter().map(|host| host.parse().expect("a host")).collect();
        route
    };
    let get = Methods::only([Method::Get]);
    Routes::new(vec![
        route("/api/v3/*", Methods::ALL, None),
        route("/api/v3/user", get, None),
        route("/api/v3/user", Methods::ALL, Some("*.a.test")),
        route("/api/v3/projects/:id/*", Methods::ALL, None),
        route("/api/v3/projects/:id/repository", get, Some("b.a.test")),
        route("/api/v3/projects/group%2Fproject/*", Methods::ALL, None),
        route("/open/*", get, None),
        route("/", get, Some("web.test")),
    ])
});

/// Another spelling of a path that every backend reads as the same, chosen by `seed`.
fn respelled(path: &[u8], mut seed: u32) -> Vec<u8> {
    let mut draw = |of: u32| {
        seed ^= seed << 13;
        seed ^= seed >> 17;
        seed ^= seed << 5;
        seed % of == 0
    };
    let mut out = Vec::new();
    let mut rest = path;
    while let [byte, tail @ ..] = rest {
        rest = tail;
        match byte {
            b'/' if draw(4) => out.extend_from_slice(b"//"),
            b'%' => {
                let digits = &tail[..2];
                rest = &tail[2..];
                let lower = draw(2);
                out.push(b'%');
                out.extend(digits.iter().map(|b| if lower { b.to_ascii_lowercase() } else { b.to_ascii_uppercase() }));
            }
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'~' | b'.' if draw(4) => {
                let text = format!("%{byte:02X}");
                out.extend_from_slice(if draw(2) { text.to_ascii_lowercase() } else { text }.as_bytes());
            }
            _ => out.push(*byte),
        }
    }
    if draw(4) && !out.ends_with(b"/") {
        out.extend_from_slice(b".json");
    }
    if draw(4) {
        out.push(b'/');
    }
    out
}

fn form_of(path: &[u8]) -> Vec<u8> {
    canonical(path).into_owned()
}

fn hold(path: &[u8], seed: u32) {
    let form = form_of(path);
    assert_eq!(form_of(&form), form, "not canonical twice");
    assert!(check(&form).is_ok(), "an illegal canonical path");
    assert!(form.len() <= path.len() && form.starts_with(b"/"), "a strange canonical path");
    // Decoded once, as backends do, no segment leads upwards, not even with a parameter behind it.
    let once: Vec<u8> = percent_encoding::percent_decode(path).collect();
    for text in [path, &form, &once] {
        for segment in text.split(|b| matches!(b, b'/' | b'\\')) {
            let name = segment.split(|b| *b == b';').next().unwrap_or_default();
            assert!(!matches!(name, b"." | b".."), "a dot segment");
        }
    }
    assert!(!once.iter().any(|b| b.is_ascii_control()), "a control byte");
    // A browser's parser resolves nothing either.
    let text = format!("http://h{}", String::from_utf8_lossy(path));
    let url = url::Url::parse(&text).expect("no URL");
    let slashes = |text: &[u8]| text.iter().filter(|b| **b == b'/').count();
    assert_eq!(slashes(url.path().as_bytes()), slashes(path), "a browser reads another path: {}", url.path());
    assert_eq!(url.host_str(), Some("h"), "a browser reads another host");

    let other = respelled(path, seed);
    assert!(check(&other).is_ok(), "another spelling is refused: {}", String::from_utf8_lossy(&other));
    assert_eq!(form_of(&other), form, "two forms of one path: {}", String::from_utf8_lossy(&other));

    for method in [Method::Get, Method::Post] {
        for host in [&b"h"[..], b"B.A.test:8080", b"web.test."] {
            let found = ROUTES.find(method, host, &form).and_then(|index| ROUTES.get(index)).map(|route| &route.name);
            let same = ROUTES.find(method, host, &canonical(&other)).and_then(|index| ROUTES.get(index));
            assert_eq!(found, same.map(|route| &route.name), "two routes for one path");
            // The first one of the table that matches, looked for one by one.
            let name = String::from_utf8_lossy(host).to_ascii_lowercase();
            let name = name.split(':').next().unwrap_or_default().trim_end_matches('.').to_owned();
            let fits = |route: &&Route| {
                let hosts = route.hosts.iter().map(ToString::to_string).any(|host| match host.strip_prefix('*') {
                    Some(end) => name.ends_with(end),
                    None => name == host,
                });
                route.pattern.matches(&form) && route.methods.has(method) && (hosts || route.hosts.is_empty())
            };
            let fitting: Vec<&Route> = ROUTES.iter().filter(fits).collect();
            // The first pattern; of its routes, the one for a host.
            let first = fitting.first().map(|route| &route.pattern);
            let of_first = fitting.iter().filter(|route| Some(&route.pattern) == first);
            let expected = of_first.min_by_key(|route| route.hosts.is_empty()).map(|route| &route.name);
            assert_eq!(found, expected, "another route than one by one");
        }
    }
}

pub fn canonical_paths(data: &[u8]) {
    let Some((seed, path)) = data.split_first_chunk::<2>() else { return };
    if path.first() != Some(&b'/') || path.contains(&b'?') || check(path).is_err() {
        return;
    }
    hold(path, u32::from(u16::from_le_bytes(*seed)) + 1);
}
