//! Whether a path that passed as an open one is a guarded one for a real server: each reports the path that its application's routes
//! are matched with. `no_spelling_leads_from_an_open_route_into_a_guarded_one` has the spellings that were thought of; here they
//! are generated.

use super::backends::{Kind, Reader};
use super::random::Random;
use super::{SEED, number};
use crate::harness::*;

/// Paths for each application.
const PATHS: u64 = 4_000;

const ROUTES: &str = "[[route]]\npath = \"/\"\nauth = \"none\"\nreason = \"a test\"\n\
    [[route]]\npath = \"/api/v3/open/*\"\nauth = \"none\"\nreason = \"a test\"\n\
    [[route]]\npath = \"/api/v3/open/secret/*\"\n[[route]]\npath = \"/api/v3/open/group/secret\"\n\
    [[route]]\npath = \"/api/v3/may/*\"\nauth = \"optional\"\nreason = \"a test\"\n[[route]]\npath = \"/api/v3/may/not\"\n";

/// Whether an application has something at this path that the routes above guard.
fn is_guarded(path: &str) -> bool {
    let path = path.trim_end_matches('/');
    let below = |prefix: &str| path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    below("/api/v3/projects")
        || below("/api/v3/open/secret")
        || ["/api/v3/open/group/secret", "/api/v3/may/not"].contains(&path)
}

fn path(random: &mut Random) -> String {
    let starts = [
        "/api/v3/open/secret/x",
        "/api/v3/open/secret",
        "/api/v3/open/group/secret",
        "/api/v3/may/not",
        "/api/v3/projects",
    ];
    let mut path = starts[random.below(starts.len())].to_owned();
    for _ in 0..=random.below(3) {
        let at = 1 + random.below(path.len() - 1);
        let byte = path.as_bytes()[at];
        let put = [
            "%2F", "%2f", "%252F", ";", ";x", "%3B", "%3bx", "%3F", "%23", "//", "/./", "/x/../", "%5C", "\\", "/%2e/",
            "x", "%25",
        ];
        match random.below(4) {
            0 => path.insert_str(at, put[random.below(put.len())]),
            1 if byte == b'/' => path.replace_range(at..=at, put[random.below(put.len())]),
            2 if byte.is_ascii_alphabetic() => {
                let spelled = [byte.to_ascii_uppercase() as char, byte as char][random.below(2)];
                let spelled =
                    [spelled.to_string(), format!("%{:02x}", spelled as u32), format!("%25{:02X}", spelled as u32)];
                path.replace_range(at..=at, &spelled[random.below(3)]);
            }
            _ => path.push_str(["", ".json", "/", ";a=b", "%2F", "?x=/api/v3/open", "%20"][random.below(7)]),
        }
    }
    path
}

fn compare(kind: Kind) {
    let seed = number("TOLLGATE_READER_SEED", SEED) ^ 0x7061_7468;
    let reader = Reader::start(kind);
    let gateway = Gateway::start(reader.address, ROUTES);
    let mut random = Random::new(seed);
    let (mut refused, mut passed) = (0, 0);
    let mut client = Client::connect(gateway.address);
    for number in 0..PATHS {
        let path = path(&mut random);
        client.send_head(&format!("GET {path} HTTP/1.1\nHost: h.test\n\n"));
        let Some(answer) = client.answer_to("GET") else { panic!("{kind:?}: no answer to {path}") };
        if answer.header("Connection") == Some("close") {
            client = Client::connect(gateway.address);
        }
        match answer.header("X-Path") {
            None => refused += 1,
            Some(seen) => {
                passed += 1;
                assert!(!is_guarded(seen), "{kind:?} is asked for {seen} by {path} (path {number}, seed {seed})");
            }
        }
    }
    println!("{kind:?}: {passed} passed, {refused} refused");
    assert!(passed > PATHS / 50 && refused > PATHS / 4, "{kind:?}: {passed} passed, {refused} refused");
}

#[test]
fn no_application_is_asked_for_a_guarded_path_without_a_token() {
    for kind in [Kind::Rack, Kind::Grape, Kind::Php, Kind::Django, Kind::Flask, Kind::Express, Kind::Go] {
        compare(kind);
    }
}
