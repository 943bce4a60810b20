//! The lane of our own and the framework's carry the same generated requests to backends that answer the same: clients and
//! backends must see the same, but for the differences that are named here.

use crate::harness::{Answer, Client, GOOD, Gateway, Seen, Upstream};
use crate::servers::http::{Reply, Step};
use std::time::Duration;

/// Cases of other tests in which the framework's lane does otherwise, and why that is so. All are about a backend's answers, and
/// in all the framework has read the answer before tollgate can judge it.
const DIFFERENCES: &[(&str, &str)] = &[
    ("both framings", LENGTH_DROPPED),
    ("a length and a coding", LENGTH_DROPPED),
    ("a coding and a length", LENGTH_DROPPED),
    ("a blank behind a name", LENIENT),
    ("a bare LF", LENIENT),
    ("a folded line", LENIENT),
    ("bytes behind the end", SURPLUS),
    ("bytes behind no body", SURPLUS),
    ("bytes behind the last chunk", SURPLUS),
    ("surplus behind the length", SURPLUS),
    ("surplus behind the last chunk", SURPLUS),
    ("a second answer", SURPLUS),
    ("a second answer behind chunks", SURPLUS),
    ("a second answer behind no body", SURPLUS),
    ("a body behind 304", SURPLUS),
];
const LENGTH_DROPPED: &str = "the length is removed from an answer with both framings before the first filter";
const LENIENT: &str = "the framework's parser takes the line, and hands over clean fields";
const SURPLUS: &str = "bytes behind the end are not handed over: the answer passes, and its connection is closed";

/// What went wrong on the framework's lane, without what is named above.
pub(crate) fn not_named(case: &str, problems: Vec<String>) -> Vec<String> {
    match DIFFERENCES.iter().any(|(name, _)| *name == case) {
        false => problems,
        true if problems.is_empty() => vec!["is named as a difference of the lanes, and does not differ".into()],
        true => Vec::new(),
    }
}

/// A small generator, so that a case can be had again by its number.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % sides
    }

    fn one_of<'a>(&mut self, all: &[&'a str]) -> &'a str {
        all[self.roll(all.len())]
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        let length = match self.roll(6) {
            0 => 0,
            1..=3 => self.roll(200),
            _ => self.roll(most),
        };
        let seed = self.roll(256);
        (0..length).map(|at| (at * 7 + seed) as u8).collect()
    }
}

fn dice(case: usize, what: u64) -> Dice {
    let seed = std::env::var("TOLLGATE_LANES_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(20_261_128_u64);
    let mut dice =
        Dice(seed ^ (case as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ what.wrapping_mul(0xd1b5_4a32_d192_ed03) | 1);
    dice.roll(2);
    dice
}

struct Case {
    method: &'static str,
    bytes: Vec<Vec<u8>>,
    last: bool,
}

fn case(number: usize) -> Case {
    let mut dice = dice(number, 1);
    let method = dice.one_of(&["GET", "GET", "GET", "HEAD", "POST", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]);
    let http10 = dice.roll(12) == 0;
    let last = dice.roll(10) == 0;
    let mut head = format!("{method} /api/v3/case/{number}?per_page={}", dice.roll(300));
    let token = if dice.roll(4) == 0 {
        head += &format!("&private_token={GOOD}");
        String::new()
    } else {
        format!("PRIVATE-TOKEN: {GOOD}\r\n")
    };
    head += &format!(" HTTP/1.{}\r\nHost: h.test\r\nX-Request-Id: id-{number}\r\n{token}", u8::from(!http10));
    for _ in 0..dice.roll(4) {
        head += dice.one_of(&[
            "Accept: */*\r\n",
            "X-Empty:\r\n",
            "x-lower: a  b\r\n",
            "Cookie: a=b\r\n",
            "TE: trailers\r\n",
            "User-Agent: python-gitlab/1.0\r\n",
            "If-None-Match: \"x\"\r\n",
            "Accept-Encoding: gzip, deflate\r\n",
            "X-Bytes: \u{e9}\t~\r\n",
        ]);
    }
    head += match (http10, last) {
        (true, false) => "Connection: keep-alive\r\n",
        (false, true) => "Connection: close\r\n",
        _ => "",
    };
    let mut pieces = Vec::new();
    let has_body = !matches!(method, "GET" | "HEAD" | "OPTIONS") && dice.roll(5) > 0;
    if has_body {
        let body = dice.bytes(100_000);
        head += "Content-Type: application/octet-stream\r\n";
        if !http10 && dice.roll(2) == 0 {
            head += "Transfer-Encoding: chunked\r\n\r\n";
            let mut at = 0;
            while at < body.len() {
                let size = 1 + dice.roll(body.len() - at);
                let extension = dice.one_of(&["", "", ";a=b"]);
                let mut piece = format!("{size:x}{extension}\r\n").into_bytes();
                piece.extend(&body[at..at + size]);
                piece.extend(b"\r\n");
                pieces.push(piece);
                at += size;
            }
            pieces.push(dice.one_of(&["0\r\n\r\n", "0\r\n\r\n", "0\r\nX-Trailer: y\r\n\r\n"]).into());
        } else {
            head += &format!("Content-Length: {}\r\n\r\n", body.len());
            pieces.extend(body.chunks(1 + dice.roll(body.len().max(1))).map(<[u8]>::to_vec));
        }
    } else {
        head += "\r\n";
    }
    let mut bytes = vec![head.into_bytes()];
    match dice.roll(2) {
        0 => bytes.extend(pieces),
        _ => bytes[0].extend(pieces.concat()),
    }
    Case { method, bytes, last }
}

/// What the backend answers to a case.
fn reply(seen: &Seen) -> Reply {
    let number = seen.target.trim_start_matches("/api/v3/case/").split('?').next().unwrap().parse().unwrap();
    let mut dice = dice(number, 2);
    let status =
        dice.one_of(&["200 OK", "200", "201 Made", "204 No Content", "304 Not Modified", "404 Nothing", "500 X"]);
    let mut head = String::new();
    if dice.roll(8) == 0 {
        head += "HTTP/1.1 103 Early Hints\r\nLink: </s?private_token=x>; rel=preload\r\n\r\n";
    }
    let http10 = dice.roll(12) == 0;
    head += &format!("HTTP/1.{} {status}\r\nDate: Sat, 28 Nov 2026 12:00:00 GMT\r\n", u8::from(!http10));
    for _ in 0..dice.roll(5) {
        head += dice.one_of(&[
            "Content-Type: application/json\r\n",
            "ETag: W/\"x\"\r\n",
            "X-Total: 7\r\n",
            "Set-Cookie: a=b\r\n",
            "Link: <http://h.test/api/v3/p?page=2&private_token=secret>; rel=\"next\"\r\n",
            "Keep-Alive: timeout=5\r\n",
            "X-Accel-Redirect: /secret\r\n",
            "x-lower: a  b\r\n",
            "X-Empty:\r\n",
            "Vary:Origin\r\n",
        ]);
    }
    let body = dice.bytes(200_000);
    let no_body = seen.method == "HEAD" || status.starts_with("204") || status.starts_with("304");
    let mut bytes = Vec::new();
    let mut close = http10;
    match dice.roll(4) {
        _ if no_body => head += "\r\n",
        0 if !http10 => {
            head += "Transfer-Encoding: chunked\r\n\r\n";
            let size = 1 + dice.roll(body.len().max(1));
            for chunk in body.chunks(size) {
                bytes.extend(format!("{:x}{}\r\n", chunk.len(), dice.one_of(&["", ";x=y"])).into_bytes());
                bytes.extend(chunk);
                bytes.extend(b"\r\n");
            }
            bytes.extend(dice.one_of(&["0\r\n\r\n", "0\r\nX-Trailer: z\r\n\r\n"]).as_bytes());
        }
        1 => {
            head += "\r\n";
            bytes = body;
            close = true;
        }
        _ => {
            head += &format!("Content-Length: {}\r\n\r\n", body.len());
            bytes = body;
        }
    }
    let all = [head.into_bytes(), bytes].concat();
    let first = match dice.roll(3) {
        0 => all.len(),
        _ => dice.roll(all.len()),
    };
    let mut reply = Reply::raw(&all[..first]);
    if first < all.len() {
        reply = reply.then(Step::Wait(Duration::from_millis(1))).then(Step::Send(all[first..].to_vec()));
    }
    if close { reply.then_close() } else { reply }
}

/// One lane with its backend, and a connection that is kept as long as it can be.
struct Lane {
    upstream: Upstream,
    gateway: Gateway,
    client: Option<Client>,
}

/// What both sides saw of a case.
#[derive(Debug, PartialEq)]
struct Outcome {
    answers: Vec<Answer>,
    head: Vec<String>,
    body: Vec<u8>,
}

impl Lane {
    fn start(framework: bool) -> Self {
        let upstream = Upstream::answering(reply);
        let gateway = Gateway::start_on_lane(framework, upstream.address);
        Self { upstream, gateway, client: None }
    }

    fn carry(&mut self, case: &Case) -> Outcome {
        self.upstream.forget();
        let mut client = self.client.take().unwrap_or_else(|| self.gateway.client());
        case.bytes.iter().for_each(|piece| client.send(piece));
        let mut answers = Vec::new();
        loop {
            let answer = client.any_answer(case.method).expect("an answer");
            let status = answer.status;
            let closes = answer.header("Connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
                || (answer.header("Content-Length").is_none()
                    && answer.header("Transfer-Encoding").is_none()
                    && !matches!(status, 204 | 304)
                    && case.method != "HEAD");
            let cut = answer.cut;
            answers.push(comparable(answer));
            if status >= 200 {
                if !closes && !case.last && !cut {
                    self.client = Some(client);
                }
                break;
            }
        }
        let seen = self.upstream.only();
        let mut head: Vec<String> = seen.head.lines().map(str::to_owned).collect();
        head.sort();
        Outcome { answers, head, body: seen.body }
    }
}

/// Without what may differ: `Connection`, which the framework writes in every answer; `Date`, where it puts its own in place
/// of the backend's; and the order of fields.
fn comparable(answer: Answer) -> Answer {
    let Answer { status, headers, body, cut } = answer;
    let mut headers: Vec<(String, String)> = headers
        .into_iter()
        .map(|(name, value)| (name.to_lowercase(), value))
        .filter(|(name, _)| name != "connection" && name != "date")
        .collect();
    headers.sort();
    Answer { status, headers, body, cut }
}

/// Each pair of lanes carries its share of the cases: most of their time is waiting.
const PAIRS: usize = 4;

#[test]
fn both_lanes_carry_the_same() {
    let count = std::env::var("TOLLGATE_LANES").ok().and_then(|text| text.parse().ok()).unwrap_or(20_000);
    let different: Vec<String> = std::thread::scope(|scope| {
        let share = |first: usize| scope.spawn(move || differences((first..count).step_by(PAIRS)));
        let shares: Vec<_> = (0..PAIRS).map(share).collect();
        shares.into_iter().flat_map(|share| share.join().unwrap()).collect()
    });
    assert!(
        different.is_empty(),
        "{} of {count} cases differ, first:\n{}",
        different.len(),
        different[..different.len().min(3)].join("\n\n")
    );
}

fn differences(numbers: impl Iterator<Item = usize>) -> Vec<String> {
    let (mut own, mut framework) = (Lane::start(false), Lane::start(true));
    let mut different = Vec::new();
    for number in numbers {
        let case = case(number);
        let (ours, theirs) = (own.carry(&case), framework.carry(&case));
        if ours != theirs {
            let sent: Vec<_> = case
                .bytes
                .iter()
                .map(|piece| String::from_utf8_lossy(&piece[..piece.len().min(300)]).into_owned())
                .collect();
            let brief = |outcome: &Outcome| {
                let answers: Vec<_> = outcome
                    .answers
                    .iter()
                    .map(|Answer { status, headers, body, cut }| {
                        format!("{status} {headers:?} {} bytes, cut: {cut}", body.len())
                    })
                    .collect();
                format!("{answers:#?}\n{:#?}\n{} bytes", outcome.head, outcome.body.len())
            };
            different.push(format!(
                "case {number}: {sent:#?}\n--- ours\n{}\n--- the framework's\n{}",
                brief(&ours),
                brief(&theirs)
            ));
        }
    }
    different
}
