//! What tollgate judges against what Rack reads: tens of thousands of odd requests go through the gateway to a plain
//! Rack application behind Puma that tells what it made of them. Not one of them may act for somebody else than the
//! token that was validated, leave a token in the query, or get around the bounds of a page.

use crate::harness::*;
use crate::support::*;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const CONNECTIONS: usize = 4;

/// A generator with a seed that is printed, so that a failure can be had again (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn pick<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.below(of.len())]
    }
}

/// Names that are the token to Rack, or nearly.
const TOKEN_KEYS: &[&str] = &[
    "private_token",
    "private_token",
    "private_token",
    "%70rivate_token",
    "private%5Ftoken",
    "private%5ftoken",
    "[private_token]",
    "[private_token",
    "private_token]",
    "]private_token",
    "[[private_token]]",
    "%5Bprivate_token%5D",
    "private_token[]",
    "private_token[x]",
    "private_token[",
    "private_token[]x",
    "private_token%5B%5D",
    "+private_token",
    "private_token+",
    "%20private_token",
    "%09private_token",
    "private_token%0a",
    // To PHP, not to Rack.
    "private_token%00",
    "private_token%00100abc",
    "private.token",
    "private+token",
    "private[token",
];
/// Names that only look like it: they are other parameters to everybody, and go on as they are.
const OTHER_KEYS: &[&str] = &[
    "PRIVATE_TOKEN",
    "Private_Token",
    "private-token",
    "private_token.x",
    ".private_token",
    "private%255Ftoken",
    "?private_token",
    "private_token%3D",
    "%26private_token",
    "x%3Bprivate_token",
    "xprivate_token",
    "private_tokens",
    "private__token",
    "+[private_token]",
    "%20[private_token",
    "private%C2%A0_token",
    "token",
];
const PAGE_KEYS: &[&str] = &[
    "page",
    "page",
    "page",
    "per_page",
    "per_page",
    "per_page",
    "per%5Fpage",
    "%70age",
    "[page]",
    "[per_page]",
    "per_page]",
    "page]",
    "page[]",
    "per_page[]",
    "per_page[x]",
    "page[x][y]",
    "page[",
    "per_page[",
    "+page",
    "per_page+",
    "per_page%00",
    "per_page%00x",
    "per.page",
    "per+page[]",
    "Per_Page",
    "per-page",
    "PAGE",
];
const NUMBERS: &[&str] = &[
    "0",
    "1",
    "2",
    "20",
    "99",
    "100",
    "101",
    "5000",
    "-1",
    "-100",
    "+5",
    "%2B5",
    "%2b500",
    "%205",
    "%20500",
    "+500",
    "%0a7",
    "%0b700",
    "%0c700",
    "%00700",
    "%A0700",
    "%C2%A0700",
    "5abc",
    "500abc",
    "abc",
    "",
    "1e9",
    "0x10",
    "010",
    "0500",
    "1_0",
    "1_000",
    "1__000",
    "_5",
    "500_",
    "5.9",
    "500.0",
    "2147483647",
    "2147483648",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775809",
    "999999999999999999999999999999",
    "%31%30%31",
    "%EF%BC%95",
    "%D9%A5",
    "%ff",
    "100%20",
    "100,5",
    "100=5",
    "--5",
    "-0",
    "5%26per_page",
    "[5]",
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
/// Names of headers that are the token to somebody.
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

struct Case {
    id: usize,
    request: String,
    /// A name that is no token's holds no token either, so its bytes can't be in the forwarded query at all.
    no_token_may_stay: bool,
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

/// A parameter, and whether it may bring token bytes along that tollgate has no business with.
fn parameter(random: &mut Random, mutated: &mut bool) -> String {
    match random.below(20) {
        0..=3 => {
            let mut key = random.pick(&TOKEN_KEYS[..3]).to_owned();
            if random.one_in(3) {
                key = random.pick(TOKEN_KEYS).to_owned();
            }
            if random.one_in(12) {
                // A piece of another alphabet anywhere in the name: nobody knows beforehand what that is to Rack.
                let at = random.below(key.len() + 1);
                let piece =
                    random.pick(&["[", "]", "%5B", "%5d", "%20", "+", "%00", "%5f", ".", "_", "%26", "%3b", "[]"]);
                if key.is_char_boundary(at) && !key[..at].ends_with(['%']) && !key[..at.max(1) - 1].ends_with('%') {
                    key.insert_str(at, piece);
                    *mutated = true;
                }
            }
            match random.below(8) {
                0 => key,
                _ => format!("{key}={}", token_value(random)),
            }
        }
        4 => format!("{}=decoy", random.pick(OTHER_KEYS)),
        5..=13 => {
            let key = random.pick(PAGE_KEYS);
            if random.one_in(20) { key.to_owned() } else { format!("{key}={}", random.pick(NUMBERS)) }
        }
        14 if random.one_in(6) => format!("{}=decoy", random.pick(&["access_token", "bearer_token", "job_token"])),
        _ => random.pick(PLAIN).to_owned(),
    }
}

fn case(id: usize, random: &mut Random) -> Case {
    let mut mutated = false;
    let mut query = String::new();
    for index in 0..random.below(6) {
        if index > 0 {
            query += random.pick(&["&", "&", "&", "&", "&", "&", "&", "&&", ";", "&;"]);
        }
        query += &parameter(random, &mut mutated);
    }
    if random.one_in(400) {
        query += &format!("&long={}", "x".repeat(9_000));
    }
    if random.one_in(60) {
        query += random.pick(&["&z=%", "&z=%4", "&z=%zz", "&%gg", "&z=#private_token=x", "&z=\"", "&z=<x>", "&z=\\"]);
    }
    let mut headers = String::new();
    if !random.one_in(4) {
        let value = token_value(random);
        let (before, after) = (random.pick(&[" ", " ", " ", "", "\t", "  "]), random.pick(&["", "", "", " ", "\t "]));
        headers += &format!("{}:{before}{value}{after}\r\n", random.pick(HEADERS));
    }
    if random.one_in(12) {
        headers += &format!("{}: {}\r\n", random.pick(HEADERS), token_value(random));
    }
    if random.one_in(8) {
        headers += &format!("{}: decoy\r\n", random.pick(ALIASES));
    }
    if random.one_in(8) {
        headers +=
            &format!("Authorization: {}{}\r\n", random.pick(&["Bearer ", "bearer  ", "BEARER\t"]), token_value(random));
    }
    if random.one_in(200) {
        headers += random.pick(&[" folded: x\r\n", "PRIVATE-TOKEN : x\r\n", "a b: c\r\n", "no-colon\r\n", ": x\r\n"]);
    }
    let path = random.pick(&["/api/v3/projects", "/api/v3/projects", "/api/v3/a/b.json", "/api/v3/", "/api/v3//x"]);
    let query = if query.is_empty() && random.one_in(2) { query } else { format!("?{query}") };
    let request = format!("GET {path}{query} HTTP/1.1\r\nHost: h.test\r\nX-Request-Id: case-{id}\r\n{headers}\r\n");
    Case { id, request, no_token_may_stay: !mutated }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// What one forwarded request became at the backend.
struct Forwarded {
    /// `None` when Rack raised.
    effective: Option<String>,
}

/// Compares what came back with what must hold. `Err` says what does not.
fn judge(case: &Case, answer: &Answer) -> Result<Option<Forwarded>, String> {
    let body: serde_json::Value = serde_json::from_slice(&answer.body).map_err(|error| error.to_string())?;
    if answer.status != 200 {
        let expected = matches!(answer.status, 400 | 401 | 414);
        // Puma refuses what it can't parse with a text of its own: nothing of the kind may get to it.
        let ours = body["message"].as_str().is_some_and(|text| text.starts_with(&answer.status.to_string()));
        return if expected && ours { Ok(None) } else { Err(format!("refused with {}", answer.status)) };
    }
    let want = |what: &str, holds: bool| if holds { Ok(()) } else { Err(format!("{what}: {body}")) };
    if !body["error"].is_null() && !case.no_token_may_stay {
        // Two names that nobody foresaw are a scalar and a hash to Rack: the backend refuses, and acts for nobody.
        want("Rack raised and acts all the same", body["effective"].is_null())?;
        return Ok(Some(Forwarded { effective: None }));
    }
    want("Rack raised on the parameters", body["error"].is_null())?;
    want("the query holds a token", body["param"].is_null())?;
    let effective = body["effective"].as_str().unwrap_or_default();
    want("the backend acts for a token nobody validated", effective == GOOD || effective == OTHER)?;
    want("another header than the one credential", body["header"] == body["effective"])?;
    want("an Authorization header was passed", body["authorization"].is_null())?;
    want("another credential was passed", body["access_token"].is_null() && body["bearer_token"].is_null())?;
    let query = body["query"].as_str().unwrap_or_default();
    if case.no_token_may_stay {
        want("token bytes in the query", !query.contains(GOOD) && !query.contains(OTHER) && !query.contains("0001"))?;
    }
    let (page, per_page) = (body["page_i"].as_i64(), body["per_page_i"].as_i64());
    want("no number for page", page.is_some_and(|page| page >= 1))?;
    want("no number for per_page", per_page.is_some_and(|n| (1..=100).contains(&n)))?;
    // The probe caps per_page as GitLab does; a backend without that cap reads the raw value.
    let raw = body["per_page"].as_str().map(|text| (text, text.parse::<u64>()));
    want("per_page is not plain", raw.is_none_or(|(_, number)| number.is_ok_and(|n| (1..=100).contains(&n))))?;
    let raw = body["page"].as_str().map(|text| (text, text.parse::<u64>()));
    want("page is not plain", raw.is_none_or(|(_, number)| number.is_ok_and(|n| n >= 1)))?;
    Ok(Some(Forwarded { effective: Some(effective.to_owned()) }))
}

#[test]
fn the_backend_acts_for_the_validated_token_whatever_the_spelling() {
    let (count, seed) = (number("TOLLGATE_RACK_CASES", 20_000) as usize, number("TOLLGATE_RACK_SEED", 20_151_122));
    println!("TOLLGATE_RACK_CASES={count} TOLLGATE_RACK_SEED={seed}");
    let started = std::time::Instant::now();
    let puma = Puma::start("rack_probe.ru", "unused=nobody");
    let gateway = Gateway::start(puma.address, "");
    let address = gateway.address;
    let next = Arc::new(AtomicUsize::new(0));
    let workers: Vec<_> = (0..CONNECTIONS)
        .map(|_| {
            let next = Arc::clone(&next);
            std::thread::spawn(move || {
                let mut client = Client::connect(address);
                let (mut forwarded, mut refused, mut wrong) = (HashMap::new(), HashMap::new(), Vec::new());
                loop {
                    let id = next.fetch_add(1, Ordering::Relaxed);
                    if id >= count {
                        return (forwarded, refused, wrong);
                    }
                    // Each case has a seed of its own, so that it does not matter which connection sends it.
                    let case = case(id, &mut Random(seed ^ ((id as u64) << 20)));
                    client.send(case.request.as_bytes());
                    let answer = client.answer();
                    match judge(&case, &answer) {
                        Ok(Some(seen)) => drop(forwarded.insert(case.id, seen)),
                        Ok(None) => *refused.entry(answer.status).or_insert(0_usize) += 1,
                        Err(why) => wrong.push(format!("{why}\n{:?}", case.request)),
                    }
                    if answer.header("Connection") == Some("close") {
                        client = Client::connect(address);
                    }
                }
            })
        })
        .collect();
    let (mut forwarded, mut refused, mut wrong) = (HashMap::new(), HashMap::new(), Vec::new());
    for worker in workers {
        let (f, r, w) = worker.join().unwrap();
        forwarded.extend(f);
        r.into_iter().for_each(|(status, n)| *refused.entry(status).or_insert(0) += n);
        wrong.extend(w);
    }
    // What tollgate validated is in its log, as the digest's first digits: the same token as the backend's.
    let log = gateway.folder.0.join("access.log");
    eventually("every request is in the log", || std::fs::read(&log).unwrap().split(|b| *b == b'\n').count() > count);
    for line in gateway.access_log() {
        let id = line["request_id"].as_str().and_then(|id| id.strip_prefix("case-")).and_then(|id| id.parse().ok());
        let Some(Forwarded { effective: Some(token) }) = id.and_then(|id: usize| forwarded.get(&id)) else { continue };
        if line["token"].as_str() != Some(&sha256_hex(token)[..12]) {
            wrong.push(format!("validated {}, acted for {token}", line["token"]));
        }
    }
    let refusals: usize = refused.values().sum();
    println!("{} forwarded, {refusals} refused {refused:?}, {:.1?}", forwarded.len(), started.elapsed());
    assert!(wrong.is_empty(), "seed {seed}: {} of {count}\n{}", wrong.len(), wrong[..wrong.len().min(10)].join("\n"));
    assert_eq!(forwarded.len() + refusals, count);
    // Otherwise the generator has degenerated and the test says little.
    assert!(forwarded.len() >= count / 10 && refusals >= count / 10, "{} and {refusals}", forwarded.len());
}
