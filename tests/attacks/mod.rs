//! Attacks, one request (or a few) at a time. `tables` has what is sent and the expected responses; this file checks what
//! must hold in every case: the backend's request has only one interpretation and contains exactly the validated
//! credential, the client gets no additional response, no token is logged, and the gateway serves the next client
//! immediately.

mod answers;
mod http2;
mod over_http2;
mod peers;
mod tables;
mod traces;

use crate::harness::*;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// One attack. Its text is written as [`expand`] reads it.
pub(crate) struct Case {
    pub class: &'static str,
    pub name: String,
    pub text: String,
    /// The final statuses that the client gets, in order, and no others. Each 200 stands for one whole request at the
    /// backend; there must be no further whole one.
    pub answers: Vec<u16>,
    pub end: End,
    /// The target of the last request at the backend.
    pub target: Option<String>,
    /// The client shuts down its sending side.
    pub half_close: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// As the last response indicates.
    AsSaid,
    /// The gateway must end the connection.
    Closed,
}

impl Case {
    pub fn new(class: &'static str, name: impl Into<String>, text: impl Into<String>, answers: &[u16]) -> Self {
        Self {
            class,
            name: name.into(),
            text: text.into(),
            answers: answers.to_vec(),
            end: End::AsSaid,
            target: None,
            half_close: false,
        }
    }

    /// No further request may be sent on this connection.
    pub fn closed(mut self) -> Self {
        self.end = End::Closed;
        self
    }

    pub fn seen_as(mut self, target: &str) -> Self {
        self.target = Some(target.into());
        self
    }

    pub fn half_closed(mut self) -> Self {
        self.half_close = true;
        self
    }
}

/// A complete request inside a body or after one, which must never be read as a request.
const SMUGGLED: &str = "GET /api/v3/smuggled HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: good-token-0002\n\n";

/// Turns a table's text into bytes: a line end is CRLF, a character below U+0100 is a byte, and `<...>` stands for
/// * `<P>` `<H>` `<T>`: the usual path; the line with Host; the line with a good token;
/// * `<GOOD>` `<OTHER>` `<BAD>`: tokens, two valid and one not; `<SSRF>`: the port that the gateway must not connect to;
/// * `<LF>` `<CR>` `<x00>`: bytes; `<text*5>`: the text five times;
/// * `<SMUGGLED>`: [`SMUGGLED`]; `<LEN>` and `<HEX>`: its length.
fn expand(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = text;
    while let Some(character) = rest.chars().next() {
        rest = &rest[character.len_utf8()..];
        match character {
            '\n' => out.extend_from_slice(b"\r\n"),
            '<' => {
                let end = closing(rest).unwrap_or_else(|| panic!("`<` without `>` in {text:?}"));
                out.extend(placeholder(&rest[..end]));
                rest = &rest[end + 1..];
            }
            _ => out.push(u8::try_from(u32::from(character)).unwrap_or_else(|_| panic!("no byte: {character:?}"))),
        }
    }
    out
}

/// Where the placeholder ends whose `<` has been read; others may stand in it.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 0;
    text.char_indices().find_map(|(at, character)| {
        match character {
            '<' => depth += 1,
            '>' if depth == 0 => return Some(at),
            '>' => depth -= 1,
            _ => {}
        }
        None
    })
}

fn placeholder(word: &str) -> Vec<u8> {
    if let Some((what, count)) = word.rsplit_once('*') {
        return expand(what).repeat(count.parse().unwrap());
    }
    match word {
        "P" => b"/api/v3/projects".to_vec(),
        "H" => b"Host: h.test\r\n".to_vec(),
        "T" => format!("PRIVATE-TOKEN: {GOOD}\r\n").into_bytes(),
        "GOOD" => GOOD.into(),
        "OTHER" => OTHER.into(),
        "BAD" => BAD.into(),
        "SSRF" => ssrf_port().to_string().into_bytes(),
        "LF" => b"\n".to_vec(),
        "CR" => b"\r".to_vec(),
        "SMUGGLED" => expand(SMUGGLED),
        "LEN" => expand(SMUGGLED).len().to_string().into_bytes(),
        "HEX" => format!("{:x}", expand(SMUGGLED).len()).into_bytes(),
        _ => match word.strip_prefix('x').and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => vec![byte],
            None => panic!("no placeholder: <{word}>"),
        },
    }
}

/// The first bytes that a client sends in each case, with its class and name.
pub(crate) fn requests() -> Vec<(String, Vec<u8>)> {
    let all = tables::all().into_iter();
    all.map(|case| (format!("{}: {}", case.class, case.name), expand(&case.text))).collect()
}

const LANES: [&str; 2] = ["the own lane", "the framework's lane"];

static SSRF_CONNECTIONS: AtomicU32 = AtomicU32::new(0);

/// A port that the gateway would connect to only if a client could choose the address.
fn ssrf_port() -> u16 {
    static PORT: OnceLock<u16> = OnceLock::new();
    *PORT.get_or_init(|| {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            for _ in listener.incoming() {
                SSRF_CONNECTIONS.fetch_add(1, Ordering::SeqCst);
            }
        });
        port
    })
}

/// What was received on one connection.
pub(crate) struct Talk {
    socket: TcpStream,
    bytes: Vec<u8>,
    pub closed: bool,
    head_first: bool,
}

impl Talk {
    /// Sends bytes and reads until `count` responses have arrived and nothing more comes, or until the connection is closed
    /// if that is expected.
    pub fn with(address: std::net::SocketAddr, bytes: &[u8], count: usize, end: End, half_close: bool) -> Self {
        let socket = TcpStream::connect(address).unwrap();
        socket.set_nodelay(true).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut writer = socket.try_clone().unwrap();
        let head_first = bytes.starts_with(b"HEAD ");
        let mut talk = Self { socket, bytes: Vec::new(), closed: false, head_first };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // The gateway may end the connection before all is sent; what it said is judged below.
                let _: std::io::Result<()> = writer.write_all(bytes);
                if half_close {
                    let _: std::io::Result<()> = writer.shutdown(Shutdown::Write);
                }
            });
            let deadline = Instant::now() + Duration::from_secs(5);
            while !talk.closed && Instant::now() < deadline {
                let enough = talk.answers().is_ok_and(|answers| answers.len() >= count);
                let quiet = !talk.read(Duration::from_millis(30));
                if enough && quiet && end == End::AsSaid && count > 0 {
                    break;
                }
            }
        });
        talk
    }

    /// Whether anything came in time.
    pub fn read(&mut self, patience: Duration) -> bool {
        self.socket.set_read_timeout(Some(patience)).unwrap();
        let mut piece = [0; 16 * 1024];
        match self.socket.read(&mut piece) {
            Ok(0) => self.closed = true,
            Ok(n) => {
                self.bytes.extend_from_slice(&piece[..n]);
                return true;
            }
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
            Err(_) => self.closed = true,
        }
        false
    }

    /// The final answers so far, read strictly; 1xx are left out.
    pub fn answers(&self) -> Result<Vec<Answer>, String> {
        let (mut answers, mut rest) = (Vec::new(), &self.bytes[..]);
        while !rest.is_empty() {
            let without_body = answers.is_empty() && self.head_first;
            let (answer, tail) = read_answer(rest, without_body, self.closed)?;
            rest = tail;
            if answer.status >= 200 || answer.status == 101 {
                answers.push(answer);
            }
        }
        Ok(answers)
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

fn read_answer(bytes: &[u8], without_body: bool, closed: bool) -> Result<(Answer, &[u8]), String> {
    let broken = |why: &str| format!("{why}: {:?}", String::from_utf8_lossy(&bytes[..bytes.len().min(200)]));
    let end = find(bytes, b"\r\n\r\n").ok_or_else(|| broken("half an answer"))?;
    let head = std::str::from_utf8(&bytes[..end]).map_err(|_| broken("no text"))?;
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok());
    let status: u16 = status.ok_or_else(|| broken("no status line"))?;
    let headers: Option<Vec<(String, String)>> =
        lines.map(|line| line.split_once(": ").map(|(name, value)| (name.into(), value.into()))).collect();
    let mut answer =
        Answer { status, headers: headers.ok_or_else(|| broken("no field"))?, body: Vec::new(), cut: false };
    let mut rest = &bytes[end + 4..];
    if without_body || status < 200 || status == 204 || status == 304 {
        return Ok((answer, rest));
    }
    if answer.header("Transfer-Encoding").is_some() {
        loop {
            let line = find(rest, b"\r\n").ok_or_else(|| broken("a cut chunk line"))?;
            let size = std::str::from_utf8(&rest[..line]).ok().and_then(|hex| usize::from_str_radix(hex, 16).ok());
            let size = size.ok_or_else(|| broken("no chunk size"))?;
            rest = &rest[line + 2..];
            let (data, tail) = rest.split_at_checked(size + 2).ok_or_else(|| broken("a cut chunk"))?;
            if !data.ends_with(b"\r\n") {
                return Err(broken("a chunk without its end"));
            }
            answer.body.extend_from_slice(&data[..size]);
            rest = tail;
            if size == 0 {
                return Ok((answer, rest));
            }
        }
    }
    match answer.header("Content-Length") {
        Some(length) => {
            let length: usize = length.parse().map_err(|_| broken("no length"))?;
            let (body, tail) = rest.split_at_checked(length).ok_or_else(|| broken("a cut body"))?;
            answer.body = body.to_vec();
            Ok((answer, tail))
        }
        None if closed => {
            answer.body = rest.to_vec();
            Ok((answer, &[]))
        }
        None => Err(broken("a body without end")),
    }
}

/// The names that Rack 1 and 2 would give to the parameters of a query: split at `&` and `;`, form-decoded once,
/// brackets before and behind taken off. Written from Rack's documentation, not from tollgate's source.
fn rack_names(query: &[u8]) -> Vec<Vec<u8>> {
    let decode = |text: &[u8]| {
        let (mut out, mut at) = (Vec::new(), 0);
        while at < text.len() {
            let hex = text.get(at + 1..at + 3).and_then(|hex| std::str::from_utf8(hex).ok());
            match (text[at], hex.and_then(|hex| u8::from_str_radix(hex, 16).ok())) {
                (b'%', Some(byte)) => {
                    out.push(byte);
                    at += 2;
                }
                (b'+', _) => out.push(b' '),
                (byte, _) => out.push(byte),
            }
            at += 1;
        }
        out
    };
    let bracket = |byte: &u8| matches!(byte, b'[' | b']');
    let parameters = query.split(|byte| matches!(byte, b'&' | b';'));
    parameters
        .map(|parameter| decode(parameter.split(|byte| *byte == b'=').next().unwrap()))
        .map(|name| name.into_iter().skip_while(bracket).take_while(|byte| !bracket(byte)).collect::<Vec<u8>>())
        .map(|name| name.trim_ascii().to_vec())
        .collect()
}

/// A header's name as CGI, and so Rack, spells it.
fn folded(name: &str) -> String {
    name.to_ascii_uppercase().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
}

/// What must hold for every request that reaches the backend. A value that must not be forwarded is `evil`.
fn judge_request(seen: &Seen, problems: &mut Vec<String>) {
    let mut problem = |what: &str| problems.push(format!("{what}: {:?}", seen.head));
    let (path, query) = seen.target.split_once('?').unwrap_or((&seen.target, ""));
    if rack_names(query.as_bytes()).iter().any(|name| name == b"private_token") {
        problem("Rack would find a token in the query");
    }
    if [GOOD, OTHER, BAD].iter().any(|token| seen.target.contains(token)) {
        problem("a token in the target");
    }
    if !path.starts_with('/') {
        problem("the target has no path");
    }
    for word in ["smuggled", "evil", BAD] {
        if seen.head.contains(word) {
            problem(&format!("{word} got through"));
        }
    }
    let names: Vec<String> = seen.headers.iter().map(|(name, _)| folded(name)).collect();
    let count = |known: &str| names.iter().filter(|name| *name == known).count();
    for once in [
        "HOST",
        "PRIVATE_TOKEN",
        "X_FORWARDED_FOR",
        "X_FORWARDED_PROTO",
        "X_FORWARDED_HOST",
        "X_FORWARDED_PORT",
        "X_REQUEST_ID",
    ] {
        if count(once) != 1 {
            problem(&format!("not exactly one {once}"));
        }
    }
    if seen.header("Private-Token").is_none_or(|token| token != GOOD) {
        problem("not the token that was judged");
    }
    // Rack reads a POST without a type as a form, and a form's token takes precedence over the header's.
    if seen.method == "POST" && seen.header("Content-Type").is_none() && seen.header("X-Typed").is_some() {
        problem("a body that has lost its type");
    }
    if seen.header("X-Forwarded-Proto") != Some("http") || seen.header("X-Forwarded-Port") == Some("7") {
        problem("the client's word for how it came");
    }
    if seen.header("X-Forwarded-For") != Some("127.0.0.1") {
        problem("X-Forwarded-For is not the peer");
    }
    if count("CONTENT_LENGTH") + count("TRANSFER_ENCODING") > 1 || count("CONTENT_TYPE") > 1 {
        problem("a body that can be read in two ways");
    }
    let never = ["AUTHORIZATION", "COOKIE", "SUDO", "FORWARDED", "TE", "TRAILER", "KEEP_ALIVE", "HTTP2_SETTINGS"];
    let ours = ["X_FORWARDED_FOR", "X_FORWARDED_PROTO", "X_FORWARDED_HOST", "X_FORWARDED_PORT"];
    for name in &names {
        let forwarded = name.starts_with("X_FORWARDED_") && !ours.contains(&name.as_str());
        let foreign = ["X_TOLLGATE_", "PROXY_", "X_REAL_IP", "X_HTTP_METHOD", "HTTP_"];
        if forwarded || never.contains(&name.as_str()) || foreign.iter().any(|start| name.starts_with(start)) {
            problem(&format!("{name} got through"));
        }
    }
}

/// The gateway and a backend that returns the request that it got.
pub(crate) struct Scene {
    pub upstream: Upstream,
    pub gateway: Gateway,
}

impl Scene {
    pub fn new(more: &str) -> Self {
        Self::before(|upstream| Gateway::start(upstream, more))
    }

    fn before(start: impl FnOnce(std::net::SocketAddr) -> Gateway) -> Self {
        let upstream = Upstream::answering(|seen| match seen.method.as_str() {
            "HEAD" => Reply::raw("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"),
            _ => Reply::ok(&format!("{{\"upstream\":true,\"target\":{:?}}}", seen.target)),
        });
        Self { gateway: start(upstream.address), upstream }
    }

    /// Runs one case and returns what failed.
    fn play(&self, case: &Case) -> Vec<String> {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let mut problems = Vec::new();
        let connections = SSRF_CONNECTIONS.load(Ordering::SeqCst);
        let violations = self.upstream.violations().len();
        self.upstream.forget();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let text = case.text.replace("<H>", &format!("<H>X-Case: {number}\n"));
        let mut talk = Talk::with(self.gateway.address, &expand(&text), case.answers.len(), case.end, case.half_close);
        let canary = self.canary();
        // The canary took its time: what is still to come on the first connection has come.
        while talk.read(Duration::from_millis(5)) {}

        let answers = talk.answers().unwrap_or_else(|why| {
            problems.push(format!("the client got {why}"));
            Vec::new()
        });
        let statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
        if statuses != case.answers {
            problems.push(format!("answered {statuses:?} instead of {:?}", case.answers));
        }
        if statuses.iter().any(|status| *status >= 500) {
            problems.push("a server error for a client's fault".into());
        }
        for answer in &answers {
            let from_upstream =
                answer.text().contains("\"upstream\":true") || (talk.head_first && answer.body.is_empty());
            if answer.status == 200 && !from_upstream {
                problems.push("a 200 that the backend did not give".into());
            }
            if answer.status == 401 && answer.text() != "{\"message\":\"401 Unauthorized\"}" && !talk.head_first {
                problems.push(format!("a 401 that says more: {}", answer.text()));
            }
        }
        let says_close = answers.last().is_some_and(|answer| answer.header("Connection") == Some("close"));
        if (case.end == End::Closed || says_close) && !talk.closed {
            problems.push("the connection was left open".into());
        }
        if case.end == End::AsSaid && !case.half_close && !says_close && talk.closed {
            problems.push("the connection was closed without a word".into());
        }
        let reply = String::from_utf8_lossy(talk.bytes());
        if [GOOD, OTHER, BAD].iter().any(|token| reply.contains(token)) {
            problems.push("the answer holds a token".into());
        }

        // Of a request that was broken off before, the backend may have read the head only now.
        let late = |seen: &Seen| seen.header("X-Case").is_some_and(|case| case != number.to_string());
        let mut seen = self.upstream.seen();
        seen.retain(|seen| !seen.target.contains("/canary/") && !late(seen));
        seen.iter().for_each(|seen| judge_request(seen, &mut problems));
        let (whole, all) = (seen.iter().filter(|seen| seen.complete).count(), seen.len());
        let passed = case.answers.iter().filter(|status| **status == 200).count();
        if whole != passed {
            problems.push(format!("{whole} whole requests at the backend instead of {passed}"));
        }
        if all > case.answers.len().max(1) {
            problems.push(format!("{all} requests at the backend"));
        }
        if let (Some(target), Some(last)) = (&case.target, seen.last())
            && last.target.as_bytes() != expand(target)
        {
            problems.push(format!("the backend saw {:?} instead of {target:?}", last.target));
        }
        let new: Vec<String> = self.upstream.violations().split_off(violations);
        problems.extend(new.into_iter().map(|why| format!("at the backend: {why}")));
        if SSRF_CONNECTIONS.load(Ordering::SeqCst) != connections {
            problems.push("the gateway went where the client sent it".into());
        }
        problems.extend(canary);
        problems
    }

    /// A valid request on a new connection: it must get its own response immediately.
    pub fn canary(&self) -> Option<String> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let target = format!("/api/v3/canary/{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let started = Instant::now();
        let answer = self.gateway.get(&target);
        let own = answer.text().contains(&format!("\"{target}\""));
        (answer.status != 200 || !own || started.elapsed() > Duration::from_secs(2))
            .then(|| format!("the canary got {} {} after {:?}", answer.status, answer.text(), started.elapsed()))
    }

    /// The gateway's logs: a JSON object in each line, and no token.
    fn written(&self) -> Vec<String> {
        std::thread::sleep(Duration::from_millis(200));
        let access = std::fs::read_to_string(self.gateway.folder.0.join("access.log")).unwrap();
        let mut problems = Vec::new();
        for line in access.lines() {
            if !serde_json::from_str::<serde_json::Value>(line).is_ok_and(|value| value.is_object()) {
                problems.push(format!("no JSON object in the access log: {line}"));
            }
            if [GOOD, OTHER, BAD].iter().any(|token| line.contains(token)) {
                problems.push(format!("a token in the access log: {line}"));
            }
        }
        for (place, text) in [("process log", self.gateway.process_log()), ("metrics", self.gateway.metrics())] {
            if [GOOD, OTHER, BAD].iter().any(|token| text.contains(token)) {
                problems.push(format!("a token in the {place}"));
            }
            if text.contains("panicked") {
                problems.push(format!("a panic: {text}"));
            }
        }
        problems
    }
}

/// Runs the cases of a class on both lanes and fails with all violations.
fn play_all(class: &str) {
    let cases: Vec<Case> = tables::all().into_iter().filter(|case| case.class == class).collect();
    assert!(!cases.is_empty(), "no cases of {class}");
    let mut failures = Vec::new();
    for framework in [false, true] {
        let lane = LANES[usize::from(framework)];
        let scene = Scene::before(|upstream| Gateway::start_on_lane(framework, upstream));
        for case in &cases {
            let problems = scene.play(case).into_iter();
            failures.extend(problems.map(|problem| format!("{lane}, {}: {problem}", case.name)));
        }
        failures.extend(scene.written());
    }
    // The violations were printed case by case.
    if !failures.is_empty() {
        panic!("{class}: {} problems in {} cases\n  {}", failures.len(), cases.len(), failures.join("\n  "));
    }
}

macro_rules! classes {
    ($($class:ident $least:literal,)*) => {
        $(#[test]
        fn $class() {
            play_all(stringify!($class));
        })*

        /// The least number of cases of each class.
        const CLASSES: &[(&str, usize)] = &[$((stringify!($class), $least)),*];
    };
}

classes! {
    credential_position 59,
    query_differential 108,
    token_value 65,
    header_differential 106,
    hop_by_hop 33,
    path_confusion 139,
    host_and_form 65,
    framing_length 62,
    framing_coding 55,
    framing_chunks 57,
    version 42,
    pipelining 32,
    syntax_and_limits 73,
    body_credential 127,
}

#[test]
fn no_class_loses_cases() {
    let cases = tables::all();
    for (class, least) in CLASSES {
        let count = cases.iter().filter(|case| case.class == *class).count();
        assert!(count >= *least, "{class} has {count} cases of at least {least}");
        println!("{class}: {count}");
    }
    assert!(cases.len() >= 1_000, "{} cases", cases.len());
    let mut names: Vec<(&str, &str)> = cases.iter().map(|case| (case.class, case.name.as_str())).collect();
    names.sort_unstable();
    names.windows(2).for_each(|pair| assert_ne!(pair[0], pair[1], "two cases have the same name"));
    assert!(cases.iter().all(|case| CLASSES.iter().any(|(class, _)| *class == case.class)));
}

#[test]
fn the_model_of_rack_reads_as_rack_does() {
    for query in [
        "private_token=x",
        "private%5Ftoken=x",
        "[private_token]=x",
        "]private_token=x",
        "private_token]=x",
        "private_token[]=x",
        "private_token[a]=x",
        "x=1;private_token=x",
        "x=1&+private_token=x",
        "private_token",
    ] {
        assert!(rack_names(query.as_bytes()).contains(&b"private_token".to_vec()), "{query}");
    }
    for query in ["PRIVATE_TOKEN=x", "private-token=x", "a[private_token]=x", "private%255Ftoken=x", "a=private_token"]
    {
        assert!(!rack_names(query.as_bytes()).contains(&b"private_token".to_vec()), "{query}");
    }
}

#[test]
fn placeholders() {
    assert_eq!(expand("a<x00><ab*3>\n<LF><GOOD>\u{e9}"), b"a\0ababab\r\n\ngood-token-0001\xe9");
}
