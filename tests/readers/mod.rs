//! Compares what tollgate judges with what real applications read: thousands of unusual requests go through the gateway to
//! applications on Rack, Grape, PHP, Django, Flask, Express and Go, which report what they parsed. None of them may read a
//! token, another user, a method or a page that tollgate has not judged.
//!
//! TOLLGATE_READER_CASES   number of cases for each application
//! TOLLGATE_READER_SEED    printed with each run; the same seed generates the same cases
//! TOLLGATE_READER_CASE    runs this case only, and prints its result

mod backends;
mod encode;
mod generate;
mod json;
mod multipart;
mod names;
mod paths;
mod random;
mod replay;
mod seeded_faults;

use crate::harness::*;
use backends::{Kind, Reader};
use generate::Case;
use std::collections::{BTreeMap, HashMap};
use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

const CONNECTIONS: usize = 4;
const SEED: u64 = 20_261_128;
/// Cases for each application, in CI.
const CASES: u64 = 40_000;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// The result of one request.
enum Outcome {
    /// Forwarded, with the application's report.
    Forwarded(serde_json::Value),
    /// Refused by tollgate.
    Refused(u16),
    /// Refused by the application's server or framework, before it could report.
    ReaderError(u16),
    /// The connection was closed without a response, as a refusal may do while the client is still sending.
    Closed,
}

/// A connection to the gateway that is reopened when it was closed.
struct Sender {
    address: SocketAddr,
    client: Client,
}

impl Sender {
    fn new(address: SocketAddr) -> Self {
        Self { address, client: Client::connect(address) }
    }

    fn send(&mut self, case: &Case) -> Outcome {
        for attempt in 0..2 {
            // A refusal may arrive, and the connection be closed, before the last byte is sent: the response counts.
            drop(self.client.socket.write_all(&case.bytes()));
            let answer = self.client.answer_to(case.method);
            let ends = answer.as_ref().is_none_or(|answer| {
                answer.header("Connection") == Some("close") || (case.method == "HEAD" && answer.status >= 400)
            });
            if ends {
                self.client = Client::connect(self.address);
            }
            let Some(answer) = answer else {
                if attempt == 0 {
                    continue;
                }
                return Outcome::Closed;
            };
            if let Some(text) = answer.header("X-Seen") {
                let report = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
                return Outcome::Forwarded(report);
            }
            let body: Option<serde_json::Value> = serde_json::from_slice(&answer.body).ok();
            let ours = |body: &serde_json::Value| {
                body["message"].as_str().is_some_and(|text| text.starts_with(&answer.status.to_string()))
            };
            // Without a body the sender of the response is unknown; a 500 is the framework's.
            let by_tollgate = (case.method == "HEAD" && answer.status != 500) || body.as_ref().is_some_and(ours);
            return if by_tollgate { Outcome::Refused(answer.status) } else { Outcome::ReaderError(answer.status) };
        }
        Outcome::Closed
    }
}

/// What the application read and must not read; `None` if there is nothing. The same text for the same kind of fault.
fn wrong(case: &Case, report: &serde_json::Value) -> Option<String> {
    let header = report["h"].as_str();
    if !matches!(header, Some(GOOD | OTHER)) {
        return Some(format!("the header holds {}", report["h"]));
    }
    if let Some(other) = report["x"].get(0) {
        return Some(format!("another header says who acts, or how: {}", other[0]));
    }
    for seen in report["s"].as_array().into_iter().flatten() {
        let (source, name, value) =
            (seen[0].as_str().unwrap_or_default(), seen[1].as_str().unwrap_or_default(), &seen[2]);
        match name {
            "page" | "per_page" if !case.is_listing() => {}
            "page" | "per_page" if matches!(source, "query" | "params" | "request" | "values" | "value") => {
                let bound = if name == "page" { u64::from(i32::MAX.unsigned_abs()) } else { 100 };
                // An application that does not split at `;` sees the number before it, as do Ruby's and PHP's
                // conversions.
                let text = value.as_str().unwrap_or_default().split(';').next().unwrap_or_default();
                let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
                if !plain || !text.parse::<u64>().is_ok_and(|n| (1..=bound).contains(&n)) {
                    return Some(format!("{name} out of bounds in {source}"));
                }
            }
            // A method override that the application does not obey is an ordinary parameter.
            "_method" if report["m"] == case.method => {}
            _ => return Some(format!("{name} in {source}")),
        }
    }
    (report["m"] != case.method).then(|| "another method".to_owned())
}

#[derive(Default)]
struct Tally {
    forwarded: HashMap<usize, String>,
    refused: BTreeMap<u16, usize>,
    /// Forwarded, by what the application or its server reported.
    errors: usize,
    server_errors: BTreeMap<u16, usize>,
    closed: usize,
    /// Faults by kind: their number and the first ones.
    wrong: BTreeMap<String, (usize, Vec<(Case, String)>)>,
}

impl Tally {
    fn add_wrong(&mut self, what: String, case: Case, seen: String) {
        let (count, examples) = self.wrong.entry(what).or_default();
        *count += 1;
        if examples.len() < number("TOLLGATE_READER_EXAMPLES", 3) as usize {
            examples.push((case, seen));
        }
    }

    fn cases(&self) -> usize {
        let refused: usize = self.refused.values().sum();
        let server_errors: usize = self.server_errors.values().sum();
        self.forwarded.len() + refused + server_errors + self.closed
    }

    fn merge(&mut self, other: Self) {
        self.forwarded.extend(other.forwarded);
        other.refused.into_iter().for_each(|(status, n)| *self.refused.entry(status).or_insert(0) += n);
        other.server_errors.into_iter().for_each(|(status, n)| *self.server_errors.entry(status).or_insert(0) += n);
        self.errors += other.errors;
        self.closed += other.closed;
        for (what, (count, examples)) in other.wrong {
            let (known, list) = self.wrong.entry(what).or_default();
            *known += count;
            list.extend(examples);
        }
    }
}

/// Sends the cases of a seed through a gateway to its application.
fn run(reader: &Reader, gateway: &Gateway, seed: u64, count: usize, stop_at_first: bool) -> Tally {
    let (address, kind) = (gateway.address, reader.kind);
    reader.forget();
    let captured = Arc::new(captured());
    let (next, found) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let worker = || {
        let (captured, next, found) = (Arc::clone(&captured), Arc::clone(&next), Arc::clone(&found));
        std::thread::spawn(move || {
            let mut sender = Sender::new(address);
            let mut tally = Tally::default();
            loop {
                let id = next.fetch_add(1, Ordering::Relaxed);
                if id >= count || (stop_at_first && found.load(Ordering::Relaxed)) {
                    return tally;
                }
                // Each case has its own seed, so that the connection that sends it does not matter.
                let case = generate::case(seed, id, &captured);
                match sender.send(&case) {
                    Outcome::Forwarded(report) => {
                        if !report["e"].is_null() {
                            tally.errors += 1;
                        }
                        if let Some(what) = wrong(&case, &report) {
                            found.store(true, Ordering::Relaxed);
                            tally.add_wrong(what, case, report.to_string());
                        }
                        tally.forwarded.insert(id, report["h"].as_str().unwrap_or_default().to_owned());
                    }
                    Outcome::Refused(500) => tally.add_wrong("tollgate answers 500".into(), case, String::new()),
                    Outcome::Refused(status) => *tally.refused.entry(status).or_insert(0) += 1,
                    // Puma's own response: it could not parse the head or the framing.
                    Outcome::ReaderError(400) if kind == Kind::Rack => {
                        tally.add_wrong("Puma answers 400".into(), case, String::new());
                    }
                    Outcome::ReaderError(status) => *tally.server_errors.entry(status).or_insert(0) += 1,
                    Outcome::Closed => tally.closed += 1,
                }
            }
        })
    };
    let workers: Vec<_> = (0..CONNECTIONS).map(|_| worker()).collect();
    let mut tally = Tally::default();
    for worker in workers {
        tally.merge(worker.join().unwrap());
    }
    // Requests that tollgate aborted: what reached the application must be harmless, too.
    for line in reader.reports() {
        let id = line["id"].as_str().and_then(|id| id.strip_prefix("case-")).and_then(|id| id.parse::<usize>().ok());
        let Some(id) = id.filter(|id| *id < count && !tally.forwarded.contains_key(id)) else { continue };
        let case = generate::case(seed, id, &captured);
        if let Some(what) = wrong(&case, &line["r"]) {
            tally.add_wrong(format!("refused, and yet: {what}"), case, line["r"].to_string());
        }
    }
    tally
}

/// Reduces a request to the smallest one with the same fault.
fn shrunk(case: &Case, what: &str, address: SocketAddr) -> Case {
    let mut sender = Sender::new(address);
    let mut attempts = 0;
    let mut still = |smaller: &Case| {
        attempts += 1;
        attempts < 1500
            && matches!(sender.send(smaller), Outcome::Forwarded(report) if wrong(smaller, &report).as_deref() == Some(what))
    };
    let mut best = case.clone();
    let mut at = 0;
    while at < best.headers.len() {
        let mut smaller = best.clone();
        smaller.headers.remove(at);
        if still(&smaller) { best = smaller } else { at += 1 }
    }
    for change in [
        (|case: &mut Case| case.query = None) as fn(&mut Case),
        |case| case.body = None,
        |case| case.chunks = None,
        |case| case.path = "/api/v3/x",
        |case| case.method = "POST",
        |case| case.method = "GET",
    ] {
        let mut smaller = best.clone();
        change(&mut smaller);
        if still(&smaller) {
            best = smaller;
        }
    }
    // Removes halves, quarters and so on of the query, the body and each header, as long as the fault remains.
    let places = 2 + best.headers.len();
    for place in 0..places {
        fn field(case: &mut Case, place: usize) -> Option<&mut Vec<u8>> {
            match place {
                0 => case.body.as_mut(),
                1 => case.query.as_mut(),
                n => case.headers.get_mut(n - 2),
            }
        }
        let mut size = field(&mut best, place).map_or(0, |bytes| bytes.len());
        while size > 0 {
            let mut start = 0;
            while let Some(length) = field(&mut best, place).map(|bytes| bytes.len()).filter(|length| start < *length) {
                let mut smaller = best.clone();
                if let Some(bytes) = field(&mut smaller, place) {
                    bytes.drain(start..(start + size).min(length));
                }
                if still(&smaller) { best = smaller } else { start += size }
            }
            size /= 2;
        }
    }
    best
}

fn told(case: &Case) -> String {
    let bytes = case.bytes();
    let text = bytes.escape_ascii().to_string().replace("\\r\\n", "\\r\\n\n    ");
    if text.len() > 3000 { format!("    {} … {} bytes", &text[..3000], bytes.len()) } else { format!("    {text}") }
}

/// Bodies of real clients with their types, the input of mutation.
fn captured() -> Vec<(Vec<u8>, Vec<u8>)> {
    let captures = replay::captures().into_iter().filter(|capture| !capture.body.is_empty());
    captures.map(|capture| (capture.content_type.unwrap_or_default(), capture.body)).collect()
}

fn differ(kind: Kind) {
    let seed = number("TOLLGATE_READER_SEED", SEED) ^ ((kind as u64 + 1) << 56);
    let count = number("TOLLGATE_READER_CASES", CASES) as usize;
    let reader = Reader::start(kind);
    let gateway = Gateway::start(reader.address, "");
    if let Ok(id) = std::env::var("TOLLGATE_READER_CASE") {
        let case = generate::case(seed, id.parse().unwrap(), &captured());
        println!("{}", told(&case));
        match Sender::new(gateway.address).send(&case) {
            Outcome::Forwarded(report) => println!("forwarded: {report}\nwrong: {:?}", wrong(&case, &report)),
            Outcome::Refused(status) => println!("refused with {status}"),
            Outcome::ReaderError(status) => println!("the reader's server answers {status}"),
            Outcome::Closed => println!("closed"),
        }
        return;
    }
    println!("{kind:?}: TOLLGATE_READER_CASES={count} TOLLGATE_READER_SEED={}", number("TOLLGATE_READER_SEED", SEED));
    let started = std::time::Instant::now();
    let mut tally = run(&reader, &gateway, seed, count, false);

    // The token that tollgate validated is in its log, as the first digits of the digest, and must be the
    // application's.
    let log = gateway.folder.0.join("access.log");
    eventually("every forwarded request is in the log", || {
        std::fs::read(&log).unwrap().split(|b| *b == b'\n').count() > tally.forwarded.len()
    });
    for line in gateway.access_log() {
        let id = line["request_id"].as_str().and_then(|id| id.strip_prefix("case-")).and_then(|id| id.parse().ok());
        let Some((id, token)) = id.and_then(|id: usize| Some((id, tally.forwarded.get(&id)?))) else { continue };
        if line["token"].as_str() != Some(&sha256_hex(token)[..12]) {
            let seen = format!("validated {}, the header holds {token}", line["token"]);
            tally.add_wrong("another token than the validated one".into(), generate::case(seed, id, &captured()), seen);
        }
    }
    let refusals: usize = tally.refused.values().sum();
    let mismatches: usize = tally.wrong.values().map(|(count, _)| count).sum();
    println!("| reader | cases | forwarded | refused | by status | reader errors | mismatches | seconds |");
    println!(
        "| {kind:?} | {count} | {} | {refusals} | {:?} | {} {:?} | {mismatches} | {:.1} |",
        tally.forwarded.len(),
        tally.refused,
        tally.errors,
        tally.server_errors,
        started.elapsed().as_secs_f64(),
    );
    let mut text = String::new();
    for (what, (count, examples)) in &tally.wrong {
        text += &format!("{kind:?}: {what}: {count}\n");
        for (case, seen) in examples.iter().take(number("TOLLGATE_READER_EXAMPLES", 3) as usize) {
            let small = shrunk(case, what, gateway.address);
            text += &format!("  case {}:\n{}\n  saw {seen}\n", case.id, told(&small));
        }
    }
    assert!(tally.wrong.is_empty(), "{text}");
    assert_eq!(tally.cases(), count);
    assert!(tally.closed * 1000 <= count, "{} connections were closed without a response", tally.closed);
    // Otherwise the generator has degenerated and the test proves little.
    assert!(tally.forwarded.len() >= count / 10 && refusals >= count / 10, "{} and {refusals}", tally.forwarded.len());
}

#[test]
fn rack_sees_only_what_was_judged() {
    differ(Kind::Rack);
}

#[test]
fn grape_sees_only_what_was_judged() {
    differ(Kind::Grape);
}

#[test]
fn php_sees_only_what_was_judged() {
    differ(Kind::Php);
}

#[test]
fn django_sees_only_what_was_judged() {
    differ(Kind::Django);
}

#[test]
fn flask_sees_only_what_was_judged() {
    differ(Kind::Flask);
}

#[test]
fn express_sees_only_what_was_judged() {
    differ(Kind::Express);
}

#[test]
fn go_sees_only_what_was_judged() {
    differ(Kind::Go);
}
