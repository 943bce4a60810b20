//! Malformed and ambiguous responses of a backend: 502 as long as nothing was forwarded, an incomplete body stays visibly
//! incomplete, and a connection with an error is not reused for the next client.

use super::{End, LANES, Talk, expand};
use crate::harness::*;
use crate::lanes::not_named;
use crate::servers::http::{HttpServer, Reply};

/// What the client must get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gets {
    /// 502, and not a byte of the backend's.
    Refusal,
    /// The backend's status and this body.
    Whole(u16, &'static str),
    /// The backend's status, and a visibly incomplete body.
    Cut,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    Waits,
    Closes,
}

use Gets::{Cut, Refusal, Whole};
use Then::{Closes, Waits};

type AnswerCase = (&'static str, &'static str, Then, Gets);

const HELLO: Gets = Whole(200, "hello");

/// Name, what the backend answers, what it does next, and what the client gets. Text as in the other tables.
#[rustfmt::skip]
const CASES: &[AnswerCase] = &[
    ("plain",                              "HTTP/1.1 200 OK\nContent-Length: 5\n\nhello", Waits, HELLO),
    ("plain, in chunks",                   "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nhello\n0\n\n", Waits, HELLO),
    ("two different lengths",              "HTTP/1.1 200 OK\nContent-Length: 5\nContent-Length: 6\n\nhello!", Waits, Refusal),
    ("two equal lengths",                  "HTTP/1.1 200 OK\nContent-Length: 5\nContent-Length: 5\n\nhello", Waits, Refusal),
    ("a list of lengths",                  "HTTP/1.1 200 OK\nContent-Length: 5, 5\n\nhello", Waits, Refusal),
    ("a list of different lengths",        "HTTP/1.1 200 OK\nContent-Length: 5, 6\n\nhello", Waits, Refusal),
    ("a length and a coding",              "HTTP/1.1 200 OK\nContent-Length: 5\nTransfer-Encoding: chunked\n\n5\nhello\n0\n\n", Waits, Refusal),
    ("a coding and a length",              "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\nContent-Length: 5\n\n5\nhello\n0\n\n", Waits, Refusal),
    ("two codings",                        "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\nTransfer-Encoding: chunked\n\n5\nhello\n0\n\n", Waits, Refusal),
    ("a list of codings",                  "HTTP/1.1 200 OK\nTransfer-Encoding: gzip, chunked\n\n5\nhello\n0\n\n", Waits, Refusal),
    ("a coding that is none",              "HTTP/1.1 200 OK\nTransfer-Encoding: identity\n\nhello", Closes, Refusal),
    ("a length with a plus",               "HTTP/1.1 200 OK\nContent-Length: +5\n\nhello", Waits, Refusal),
    ("a length below zero",                "HTTP/1.1 200 OK\nContent-Length: -5\n\nhello", Waits, Refusal),
    ("a length in hex",                    "HTTP/1.1 200 OK\nContent-Length: 0x5\n\nhello", Waits, Refusal),
    ("a length that is a word",            "HTTP/1.1 200 OK\nContent-Length: five\n\nhello", Waits, Refusal),
    ("an empty length",                    "HTTP/1.1 200 OK\nContent-Length:\n\nhello", Waits, Refusal),
    ("a length of 2^64 + 5",               "HTTP/1.1 200 OK\nContent-Length: 18446744073709551621\n\nhello", Waits, Refusal),
    ("no HTTP",                            "hello\n\n", Closes, Refusal),
    ("binary",                             "<x00><x01><xff><xfe>", Closes, Refusal),
    ("another protocol",                   "SSH-2.0-OpenSSH_9.0\n", Closes, Refusal),
    ("a status that is a word",            "HTTP/1.1 abc OK\nContent-Length: 5\n\nhello", Waits, Refusal),
    ("a status of four digits",            "HTTP/1.1 2000 OK\nContent-Length: 5\n\nhello", Waits, Refusal),
    ("a status below 100",                 "HTTP/1.1 099 OK\nContent-Length: 5\n\nhello", Waits, Refusal),
    ("a field without a colon",            "HTTP/1.1 200 OK\nhello\nContent-Length: 5\n\nhello", Waits, Refusal),
    ("NUL in a field",                     "HTTP/1.1 200 OK\nX: a<x00>b\nContent-Length: 5\n\nhello", Waits, Refusal),
    ("CR in a field",                      "HTTP/1.1 200 OK\nX: a<CR>b\nContent-Length: 5\n\nhello", Waits, Refusal),
    ("a blank behind a name",              "HTTP/1.1 200 OK\nContent-Length : 5\n\nhello", Waits, Refusal),
    ("a switch that nobody asked for",     "HTTP/1.1 101 Switching Protocols\nConnection: Upgrade\nUpgrade: websocket\n\nhello", Waits, Refusal),
    ("closes before the answer",           "", Closes, Refusal),
    ("closes within the status line",      "HTTP/1.1 20", Closes, Refusal),
    ("closes within the head",             "HTTP/1.1 200 OK\nContent-Length: 5\nX: y", Closes, Refusal),
    ("closes behind a 100",                "HTTP/1.1 100 Continue\n\n", Closes, Refusal),
    ("8 MB of head",                       "HTTP/1.1 200 OK\nX: <a*8000000>\nContent-Length: 5\n\nhello", Closes, Refusal),
    ("10,000 fields",                      "HTTP/1.1 200 OK\n<X: y\n*10000>Content-Length: 5\n\nhello", Closes, Refusal),
    ("a thousand 103s",                    "<HTTP/1.1 103 Early Hints\nLink: x\n\n*1000>HTTP/1.1 200 OK\nContent-Length: 5\n\nhello", Waits, Refusal),
    ("a body that is cut",                 "HTTP/1.1 200 OK\nContent-Length: 100\n\nhello", Closes, Cut),
    ("a body of which nothing comes",      "HTTP/1.1 200 OK\nContent-Length: 100\n\n", Closes, Cut),
    ("chunks that are cut",                "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n64\nhello", Closes, Cut),
    ("chunks without a last one",          "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nhello\n", Closes, Cut),
    ("chunks cut within the last one",     "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nhello\n0", Closes, Cut),
    ("a chunk size that is none",          "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nhello\nzz\nhello\n0\n\n", Waits, Cut),
    ("a chunk size below zero",            "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nhello\n-5\nhello\n0\n\n", Waits, Cut),
    ("a chunk longer than it says",        "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nhello!!\n0\n\n", Waits, Cut),
    ("surplus behind the length",          "HTTP/1.1 200 OK\nContent-Length: 5\n\nhelloevil", Waits, Refusal),
    ("surplus behind the last chunk",      "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nhello\n0\n\nevil", Waits, Refusal),
    ("a second answer",                    "HTTP/1.1 200 OK\nContent-Length: 5\n\nhelloHTTP/1.1 200 OK\nContent-Length: 4\n\nevil", Waits, Refusal),
    ("a second answer behind chunks",      "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nhello\n0\n\nHTTP/1.1 200 OK\nContent-Length: 4\n\nevil", Waits, Refusal),
    ("a second answer behind no body",     "HTTP/1.1 204 No Content\n\nHTTP/1.1 200 OK\nContent-Length: 4\n\nevil", Waits, Refusal),
    ("a body behind 304",                  "HTTP/1.1 304 Not Modified\n\nevil", Waits, Refusal),
    ("a body that the end ends",           "HTTP/1.1 200 OK\n\nhello", Closes, HELLO),
    ("HTTP/1.0",                           "HTTP/1.0 200 OK\n\nhello", Closes, HELLO),
    ("HTTP/1.0 with a length",             "HTTP/1.0 200 OK\nContent-Length: 5\n\nhello", Closes, HELLO),
    ("HTTP/1.0 with chunks",               "HTTP/1.0 200 OK\nTransfer-Encoding: chunked\n\n5\nhello\n0\n\n", Waits, Refusal),
    ("fields that end here",               "HTTP/1.1 200 OK\nContent-Length: 5\nConnection: X-Mine, keep-alive\nX-Mine: evil\nKeep-Alive: evil\nProxy-Authenticate: x\nX-Accel-Redirect: evil\n\nhello", Waits, HELLO),
];

#[test]
fn no_answer_of_a_backend_is_believed_blindly() {
    const { assert!(CASES.len() >= 50) };
    let failures = [false, true].map(|framework| {
        let backend = Backend::start();
        let gateway = Gateway::start_on_lane(framework, backend.0.address());
        let judged = |(name, text, then, gets): &AnswerCase| {
            let problems = problems(&backend, &gateway, (name, text, *then, *gets));
            let problems = if framework { not_named(name, problems) } else { problems };
            problems
                .into_iter()
                .map(|what| format!("{}, {name}: {what}", LANES[usize::from(framework)]))
                .collect::<Vec<_>>()
        };
        CASES.iter().flat_map(judged).collect::<Vec<_>>()
    });
    let failures = failures.concat();
    assert!(failures.is_empty(), "{} problems\n  {}", failures.len(), failures.join("\n  "));
}

fn problems(backend: &Backend, gateway: &Gateway, (name, text, then, gets): AnswerCase) -> Vec<String> {
    let mut problems = Vec::new();
    let mut problem = |what: String| problems.push(what);
    backend.answer_with(expand(text), then);
    let request = expand("GET <P>/asked HTTP/1.1\n<H><T>\n");
    let end = if matches!(gets, Cut) { End::Closed } else { End::AsSaid };
    let mut talk = Talk::with(gateway.address, &request, 1, end, false);
    let asked = backend.connections("/asked");

    // Other clients meanwhile: each gets its own response, over another connection if this one had an error.
    for number in 0..3 {
        let target = format!("/api/v3/canary/{}{number}", name.len());
        let answer = gateway.get(&target);
        if answer.status != 200 || answer.text() != target {
            problem(format!("the canary got {} {}", answer.status, answer.text()));
        }
    }
    let spoilt = !matches!(name, "plain" | "plain, in chunks" | "fields that end here");
    if spoilt && backend.connections("/canary/").iter().any(|connection| asked.contains(connection)) {
        problem("its connection was used again".into());
    }
    while talk.read(std::time::Duration::from_millis(5)) {}

    let raw = String::from_utf8_lossy(talk.bytes()).into_owned();
    if raw.contains("evil") {
        problem(format!("the client got what is not its own: {raw:?}"));
    }
    match (gets, talk.answers()) {
        (Cut, Err(_)) if raw.starts_with("HTTP/1.1 200") && talk.closed => {}
        // Nothing was forwarded yet: a 502 is accepted as well.
        (Cut | Refusal, Ok(answers))
            if answers.len() == 1
                && answers[0].status == 502
                && answers[0].text() == "{\"message\":\"502 Bad Gateway\"}" => {}
        (Whole(status, body), Ok(answers))
            if answers.len() == 1 && answers[0].status == status && answers[0].text() == body => {}
        (_, answers) => problem(format!("wanted {gets:?}, but the client got {raw:?} ({answers:?})")),
    }
    if asked.len() > 1 && then == Waits {
        problem(format!("asked {} times", asked.len()));
    }
    problems
}

/// A request that changes something is never sent twice, whatever happens to its response.
#[test]
fn a_post_is_not_repeated() {
    let backend = Backend::start();
    let gateway = Gateway::start(backend.0.address(), "");
    // First a pooled connection, which the backend closes during the request.
    assert_eq!(gateway.get("/api/v3/canary/1").status, 200);
    backend.answer_with(Vec::new(), Closes);
    let answer = gateway
        .ask(&format!("POST /api/v3/asked HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: {GOOD}\nContent-Length: 2\n\nab"));
    assert_eq!(answer.status, 502);
    assert_eq!(backend.connections("/asked").len(), 1);
}

/// A misbehaving backend: it responds to `/canary/` with the target, and to other requests as configured.
struct Backend(HttpServer);

impl Backend {
    fn start() -> Self {
        let backend = Self(HttpServer::start(|_| unreachable!("replaced below")));
        backend.answer_with(Vec::new(), Waits);
        backend
    }

    fn answer_with(&self, bytes: Vec<u8>, then: Then) {
        self.0.script(move |asked| match then {
            _ if asked.target.contains("/canary/") => Reply::new(200, &[], &asked.target),
            Waits => Reply::raw(&bytes),
            Closes => Reply::raw(&bytes).then_close(),
        });
        self.0.forget();
    }

    /// The connections on which a target was asked for.
    fn connections(&self, target: &str) -> Vec<usize> {
        self.0.asked().iter().filter(|asked| asked.target.contains(target)).map(|asked| asked.connection).collect()
    }
}
