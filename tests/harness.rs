//! What the tests outside the process share: the real binary on free ports, an upstream that records what it receives and
//! judges every byte of it, and a client that speaks raw bytes. Loopback only. Everything ends when it is dropped.

pub use crate::servers::http::Reply;
pub use crate::servers::{Folder, free_port};
use crate::servers::{http::HttpServer, within};
use sha2::{Digest as _, Sha256};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// Tokens that every gateway of the tests knows, unless it is given others.
pub const GOOD: &str = "good-token-0001";
pub const OTHER: &str = "good-token-0002";
pub const BAD: &str = "bad-token-9999";

/// Selects the framework's lane (src/edge/server.rs).
pub const FRAMEWORK_LANE: &str = "TOLLGATE_TEST_FRAMEWORK_LANE";

/// How long anything may take before a test fails.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Tries until something is true.
pub fn eventually(what: &str, check: impl FnMut() -> bool) {
    within(PATIENCE, what, check);
}

pub fn sha256_hex(token: &str) -> String {
    Sha256::digest(token.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The command line of the binary under test.
pub fn tollgate() -> Command {
    Command::new(env!("CARGO_BIN_EXE_tollgate"))
}

/// The real gateway, serving.
pub struct Gateway {
    pub address: SocketAddr,
    pub admin: SocketAddr,
    pub folder: Folder,
    child: Child,
}

impl Gateway {
    /// Starts with a file store that knows [`GOOD`] and [`OTHER`], in front of `upstream`; `more` is TOML that is added.
    /// A section in `more` takes the place of the harness's own section of that name.
    pub fn start(upstream: SocketAddr, more: &str) -> Self {
        Self::start_with_tokens(upstream, &Self::known_tokens(), more)
    }

    fn known_tokens() -> String {
        let entry =
            |token: &&str| format!("[[token]]\nsha256 = \"{}\"\nuser = \"user-{}\"\n", sha256_hex(token), &token[11..]);
        [GOOD, OTHER].iter().map(entry).collect()
    }

    /// With another environment or other standard streams.
    pub fn start_with(upstream: SocketAddr, more: &str, change: impl FnOnce(&mut Command)) -> Self {
        Self::started(tollgate(), upstream, &Self::known_tokens(), more, change)
    }

    /// With HTTP/1 carried by the framework (`FRAMEWORK_LANE`), or as users have it.
    pub fn start_on_lane(framework: bool, upstream: SocketAddr) -> Self {
        Self::start_with(upstream, "", |command| {
            if framework {
                command.env(FRAMEWORK_LANE, "1");
            }
        })
    }

    /// On one of the lanes, with tokens other than [`GOOD`] and [`OTHER`] if they are given.
    pub fn start_on_lane_with(framework: bool, upstream: SocketAddr, tokens: Option<&str>, more: &str) -> Self {
        let tokens = tokens.map_or_else(Self::known_tokens, str::to_owned);
        Self::started(tollgate(), upstream, &tokens, more, |command| {
            if framework {
                command.env(FRAMEWORK_LANE, "1");
            }
        })
    }

    pub fn start_with_tokens(upstream: SocketAddr, tokens: &str, more: &str) -> Self {
        Self::started(tollgate(), upstream, tokens, more, |_| {})
    }

    /// Another build of the gateway, or one with more in its environment, as [`start`](Self::start) does it.
    pub fn start_as(program: Command, upstream: SocketAddr) -> Self {
        Self::started(program, upstream, &Self::known_tokens(), "", |_| {})
    }

    /// The gateway by another command, to which its arguments are added.
    pub fn start_program(program: Command, upstream: SocketAddr, more: &str) -> Self {
        Self::started(program, upstream, &Self::known_tokens(), more, |_| {})
    }

    fn started(
        program: Command,
        upstream: SocketAddr,
        tokens: &str,
        more: &str,
        change: impl FnOnce(&mut Command),
    ) -> Self {
        let folder = Folder::new("test");
        folder.write("tokens.toml", tokens);
        let (address, admin) = (
            SocketAddr::from((Ipv4Addr::LOCALHOST, free_port())),
            SocketAddr::from((Ipv4Addr::LOCALHOST, free_port())),
        );
        let sections = [
            ("[server]", format!("listen = [\"{address}\"]\nthreads = 1\n")),
            ("[admin]", format!("listen = \"{admin}\"\n")),
            ("[store]", "kind = \"file\"\npath = \"tokens.toml\"\n".into()),
            ("[log]", "access = \"access.log\"\n".into()),
            ("[[upstream]]", format!("name = \"api\"\nservers = [\"{upstream}\"]\n")),
        ];
        let more = more.replace("@LISTEN@", &address.to_string());
        let own: String = sections
            .iter()
            .filter(|(header, _)| !more.lines().any(|line| line == *header))
            .map(|(header, body)| format!("{header}\n{body}"))
            .collect();
        let config = folder.write("tollgate.toml", &format!("{own}{more}"));
        let mut gateway = Self { address, admin, child: Self::spawn(program, &folder, &config, change), folder };
        gateway.wait_ready();
        gateway
    }

    fn spawn(mut program: Command, folder: &Folder, config: &Path, change: impl FnOnce(&mut Command)) -> Child {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(folder.0.join("process.log")).unwrap();
        let stdout = std::fs::File::create(folder.0.join("stdout.log")).unwrap();
        program.args(["run", "--config"]).arg(config).stdin(Stdio::null()).stdout(stdout).stderr(log);
        change(&mut program);
        program.spawn().unwrap()
    }

    fn wait_ready(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while self.admin_get("/readyz").is_none_or(|answer| answer.status != 200) {
            assert!(self.child.try_wait().unwrap().is_none(), "the gateway ended: {}", self.process_log());
            assert!(Instant::now() < deadline, "the gateway is not ready: {}", self.process_log());
            std::thread::sleep(Duration::from_millis(10));
        }
        eventually("the API listener is open", || TcpStream::connect(self.address).is_ok());
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Changes the text of the configuration, which comes into force with a reload.
    pub fn rewrite(&self, change: impl Fn(&str) -> String) {
        let path = self.folder.0.join("tollgate.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        let changed = change(&text);
        assert_ne!(text, changed, "the rewrite changed nothing");
        std::fs::write(&path, changed).unwrap();
    }

    pub fn client(&self) -> Client {
        Client::connect(self.address)
    }

    /// One request on a connection of its own; the head lines end in `\n` here.
    pub fn ask(&self, head: &str) -> Answer {
        let mut client = self.client();
        client.send_head(head);
        client.answer()
    }

    /// GET with [`GOOD`].
    pub fn get(&self, target: &str) -> Answer {
        self.ask(&format!("GET {target} HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: {GOOD}\n\n"))
    }

    /// `None` while nobody listens there.
    pub fn admin_get(&self, path: &str) -> Option<Answer> {
        let mut client = Client::try_connect(self.admin)?;
        client.send_head(&format!("GET {path} HTTP/1.1\nHost: localhost\n\n"));
        client.try_answer()
    }

    pub fn admin_post(&self, path: &str) -> Answer {
        let mut client = Client::connect(self.admin);
        client.send_head(&format!("POST {path} HTTP/1.1\nHost: localhost\n\n"));
        client.answer()
    }

    /// What Prometheus scrapes, once all requests are over: an exchange is counted at its end, which may be a moment behind
    /// its answer. One scrape reads series after series, so only the next one is known to have all that was counted when
    /// this one saw no request. Requests that a test holds open are waited for in vain, and not for long.
    pub fn metrics(&self) -> String {
        let scrape = || self.admin_get("/metrics").unwrap().text();
        let deadline = Instant::now() + Duration::from_millis(500);
        while !scrape().contains("tollgate_requests_in_flight 0\n") && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        scrape()
    }

    /// The value of one series, written as Prometheus prints it; 0 when it is not there.
    pub fn metric(&self, series: &str) -> f64 {
        let metrics = self.metrics();
        metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok()).unwrap_or(0.0)
    }

    /// The access log so far, a JSON object a line, with a line for each request that was counted: another thread writes
    /// them, a moment later.
    pub fn access_log(&self) -> Vec<serde_json::Value> {
        let counted = || {
            let metrics = self.admin_get("/metrics").map_or_else(String::new, |answer| answer.text());
            let of = |name: &str| -> f64 {
                let lines = metrics.lines().filter(|line| line.starts_with(name));
                lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
            };
            of("tollgate_requests_total{") - of("tollgate_log_lines_dropped_total{log=\"access\"}")
        };
        // A log that was moved, or that goes elsewhere, never has all of them.
        let (all, patience) = (counted() as usize, Instant::now() + Duration::from_secs(1));
        loop {
            let lines = self.written_access_log();
            if lines.len() >= all || Instant::now() > patience {
                return lines;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// What of it is in the file. A line that crosses a page of the file can be seen half written: it counts once its end is
    /// there.
    pub fn written_access_log(&self) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(self.folder.0.join("access.log")).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
    }

    /// What the process said of itself.
    pub fn process_log(&self) -> String {
        std::fs::read_to_string(self.folder.0.join("process.log")).unwrap_or_default()
    }

    /// Resident memory in bytes.
    pub fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() * 1024
    }

    /// Time that its threads have had on a processor.
    pub fn cpu_time(&self) -> Duration {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap().flatten();
        // A thread may be gone before it is looked at.
        let statistics = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("schedstat")).ok());
        let nanos = statistics.map(|text| text.split(' ').next().unwrap().parse::<u64>().unwrap());
        Duration::from_nanos(nanos.sum())
    }

    /// Sends a signal by name, like `TERM`.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([format!("-{name}"), self.pid().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Waits for the process to end by itself.
    pub fn ended(&mut self) -> std::process::ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the gateway did not end: {}", self.process_log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        if std::thread::panicking() {
            eprintln!("--- what the gateway said:\n{}", self.process_log());
        }
    }
}

/// A raw connection.
pub struct Client {
    pub socket: TcpStream,
    buffer: Vec<u8>,
}

/// One answer, its body taken apart by its framing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// The connection was cut before the body's end.
    pub cut: bool,
}

impl Answer {
    /// The one value of a header; panics when it is there twice.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut values =
            self.headers.iter().filter(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str());
        let value = values.next();
        assert!(values.next().is_none(), "{name} stands twice: {:?}", self.headers);
        value
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Client {
    pub fn connect(address: SocketAddr) -> Self {
        Self::try_connect(address).unwrap_or_else(|| panic!("nobody listens on {address}"))
    }

    pub fn try_connect(address: SocketAddr) -> Option<Self> {
        let socket = TcpStream::connect(address).ok()?;
        socket.set_nodelay(true).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        Some(Self { socket, buffer: Vec::new() })
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    /// Sends lines that end in `\n` here with CRLF.
    pub fn send_head(&mut self, head: &str) {
        self.send(head.replace('\n', "\r\n").as_bytes());
    }

    pub fn answer(&mut self) -> Answer {
        self.try_answer().expect("an answer, but the connection was closed")
    }

    /// The next answer that is no 1xx; `None` when the connection ends before one begins.
    pub fn try_answer(&mut self) -> Option<Answer> {
        self.answer_to("GET")
    }

    /// The answer to a method; HEAD's has no body.
    pub fn answer_to(&mut self, method: &str) -> Option<Answer> {
        loop {
            let answer = self.any_answer(method)?;
            if answer.status >= 200 || answer.status == 101 {
                return Some(answer);
            }
        }
    }

    pub fn any_answer(&mut self, method: &str) -> Option<Answer> {
        let end = loop {
            if let Some(end) = find(&self.buffer, b"\r\n\r\n") {
                break end;
            }
            if self.more() == 0 {
                assert!(self.buffer.is_empty(), "half an answer: {:?}", String::from_utf8_lossy(&self.buffer));
                return None;
            }
        };
        let head = String::from_utf8(self.buffer.drain(..end + 4).collect()).unwrap();
        let mut lines = head.trim_end().split("\r\n");
        let status_line = lines.next().unwrap();
        let status = status_line
            .strip_prefix("HTTP/1.1 ")
            .and_then(|rest| rest[..3].parse().ok())
            .unwrap_or_else(|| panic!("{status_line}"));
        let headers: Vec<(String, String)> = lines
            .map(|line| line.split_once(": ").or(line.split_once(':')).unwrap())
            .map(|(n, v)| (n.into(), v.into()))
            .collect();
        let mut answer = Answer { status, headers, body: Vec::new(), cut: false };
        if status < 200 || status == 204 || status == 304 || method == "HEAD" {
            return Some(answer);
        }
        if answer.header("Transfer-Encoding").is_some() {
            answer.cut = !self.chunked_body(&mut answer.body);
        } else if let Some(length) = answer.header("Content-Length").map(|text| text.parse::<usize>().unwrap()) {
            while self.buffer.len() < length && self.more() > 0 {}
            answer.cut = self.buffer.len() < length;
            answer.body = self.buffer.drain(..length.min(self.buffer.len())).collect();
        } else {
            while self.more() > 0 {}
            answer.body = std::mem::take(&mut self.buffer);
        }
        Some(answer)
    }

    fn chunked_body(&mut self, body: &mut Vec<u8>) -> bool {
        loop {
            let end = loop {
                if let Some(end) = find(&self.buffer, b"\r\n") {
                    break end;
                }
                if self.more() == 0 {
                    return false;
                }
            };
            let line: Vec<u8> = self.buffer.drain(..end + 2).collect();
            let size = usize::from_str_radix(std::str::from_utf8(&line[..end]).unwrap(), 16).unwrap();
            while self.buffer.len() < size + 2 {
                if self.more() == 0 {
                    return false;
                }
            }
            body.extend(self.buffer.drain(..size));
            assert_eq!(self.buffer.drain(..2).collect::<Vec<_>>(), b"\r\n");
            if size == 0 {
                return true;
            }
        }
    }

    /// Bytes that came and were not asked for yet; 0 when the connection is over.
    fn more(&mut self) -> usize {
        let mut piece = [0; 16 * 1024];
        let n = loop {
            match self.socket.read(&mut piece) {
                Ok(n) => break n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break 0,
                Err(error) => panic!("no answer: {error}"),
            }
        };
        self.buffer.extend_from_slice(&piece[..n]);
        n
    }

    /// What comes next, whatever it is; `None` when the connection is over.
    pub fn next_bytes(&mut self) -> Option<Vec<u8>> {
        if self.buffer.is_empty() && self.more() == 0 {
            return None;
        }
        Some(std::mem::take(&mut self.buffer))
    }

    /// Raw bytes, for tunnels.
    pub fn read_exactly(&mut self, count: usize) -> Vec<u8> {
        while self.buffer.len() < count {
            assert!(self.more() > 0, "the connection ended");
        }
        self.buffer.drain(..count).collect()
    }

    /// Whether the other side ends the connection within a time, without sending anything else.
    pub fn is_closed_within(&mut self, patience: Duration) -> bool {
        self.socket.set_read_timeout(Some(patience)).unwrap();
        let mut byte = [0];
        let closed = match self.socket.read(&mut byte) {
            Ok(0) => true,
            Ok(_) => panic!("more bytes: {byte:?}"),
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        };
        self.socket.set_read_timeout(Some(PATIENCE)).unwrap();
        closed
    }

    pub fn finish_sending(&self) {
        self.socket.shutdown(Shutdown::Write).unwrap();
    }
}

pub fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// One request as the upstream got it.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub head: String,
    pub method: String,
    pub target: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// All of the body came.
    pub complete: bool,
}

impl Seen {
    pub fn all(&self, name: &str) -> Vec<&str> {
        self.headers
            .iter()
            .filter(|(known, _)| known.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
            .collect()
    }

    /// The one value of a header; panics when it is there twice.
    pub fn header(&self, name: &str) -> Option<&str> {
        let all = self.all(name);
        assert!(all.len() < 2, "{name} stands twice: {}", self.head);
        all.first().copied()
    }
}

/// Holds an upstream's answers back until a test has seen what it wants, at most for a minute.
#[derive(Clone, Default)]
pub struct Latch(Arc<(Mutex<bool>, Condvar)>);

impl Latch {
    pub fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }

    pub fn wait(&self) {
        let open = self.0.0.lock().unwrap();
        drop(self.0.1.wait_timeout_while(open, 6 * PATIENCE, |open| !*open).unwrap());
    }
}

/// A backend that takes nothing but canonical HTTP/1.1. Every violation is kept, and fails the test when it is dropped.
pub struct Upstream {
    pub address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    violations: Arc<Mutex<Vec<String>>>,
    _server: HttpServer,
}

impl Upstream {
    /// Answers 200 to everything.
    pub fn start() -> Self {
        Self::answering(|_| Reply::ok("{\"ok\":true}"))
    }

    pub fn answering(script: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        let (seen, violations) = (Arc::default(), Arc::default());
        let (recorded, broken) = (Arc::clone(&seen), Arc::clone(&violations));
        let server = HttpServer::start_raw(move |socket| serve(socket, &recorded, &broken, &script));
        Self { address: server.address(), seen, violations, _server: server }
    }

    /// Answers 200, some requests not before the latch opens.
    pub fn holding(holds: fn(&Seen) -> bool, body: &'static str) -> (Self, Latch) {
        let latch = Latch::default();
        let held = latch.clone();
        let upstream = Self::answering(move |seen| {
            if holds(seen) {
                held.wait();
            }
            Reply::ok(body)
        });
        (upstream, latch)
    }

    /// Every request so far, whole or not.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    pub fn forget(&self) {
        self.seen.lock().unwrap().clear();
    }

    /// The one request that came since the last [`Self::forget`].
    pub fn only(&self) -> Seen {
        let seen = self.seen();
        assert_eq!(seen.len(), 1, "{seen:?}");
        seen[0].clone()
    }

    pub fn violations(&self) -> Vec<String> {
        self.violations.lock().unwrap().clone()
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert_eq!(self.violations(), Vec::<String>::new(), "the upstream got bytes that are not canonical");
        }
    }
}

/// Reads requests by one strict grammar and keeps what breaks it.
fn serve(
    mut socket: TcpStream,
    seen: &Mutex<Vec<Seen>>,
    violations: &Mutex<Vec<String>>,
    script: impl Fn(&Seen) -> Reply,
) {
    let mut buffer = Vec::new();
    let violation = |text: String| violations.lock().unwrap().push(text);
    loop {
        let end = loop {
            if let Some(end) = find(&buffer, b"\r\n\r\n") {
                break end;
            }
            match read_some(&mut socket, &mut buffer) {
                0 if buffer.is_empty() => return,
                0 => return violation(format!("bytes that are no request: {:?}", String::from_utf8_lossy(&buffer))),
                _ => {}
            }
        };
        let head: Vec<u8> = buffer.drain(..end + 4).collect();
        let head = String::from_utf8_lossy(&head[..end]).into_owned();
        let request = match parse_strictly(&head) {
            Ok(request) => request,
            Err(why) => return violation(format!("{why}: {head:?}")),
        };
        let index = {
            let mut seen = seen.lock().unwrap();
            seen.push(request.clone());
            seen.len() - 1
        };
        let body = match read_body(&mut socket, &mut buffer, &request) {
            Ok(body) => body,
            Err(Some(why)) => return violation(format!("{why}: {head:?}")),
            Err(None) => return,
        };
        let whole = Seen { body, complete: true, ..request };
        if let Some(entry) = seen.lock().unwrap().get_mut(index) {
            *entry = whole.clone();
        }
        let reply = script(&whole);
        let switches = reply.bytes().starts_with(b"HTTP/1.1 101");
        // `Err`: whoever asked is gone.
        if !matches!(reply.play(&mut socket, || {}, || {}), Ok(None)) {
            return;
        }
        if switches {
            return echo(socket, &buffer);
        }
    }
}

/// The other end of a tunnel: sends back what it gets.
fn echo(mut socket: TcpStream, early: &[u8]) {
    let mut piece = early.to_vec();
    loop {
        if socket.write_all(&piece).is_err() {
            return;
        }
        piece.clear();
        if read_some(&mut socket, &mut piece) == 0 {
            return;
        }
    }
}

fn read_some(socket: &mut TcpStream, buffer: &mut Vec<u8>) -> usize {
    let mut piece = [0; 16 * 1024];
    let n = socket.read(&mut piece).unwrap_or(0);
    buffer.extend_from_slice(&piece[..n]);
    n
}

fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

fn parse_strictly(head: &str) -> Result<Seen, String> {
    let mut lines = head.split("\r\n");
    let request_line = lines.next().unwrap_or_default();
    let words: Vec<&str> = request_line.split(' ').collect();
    let [method, target, "HTTP/1.1"] = words[..] else { return Err("the request line is not canonical".into()) };
    if !is_token(method) || target.is_empty() || !target.bytes().all(|b| b.is_ascii_graphic()) || target.contains('#') {
        return Err("the request line is not canonical".into());
    }
    let mut headers = Vec::new();
    for line in lines {
        let Some((name, value)) = line.split_once(": ") else {
            return Err(format!("a field line is not canonical: {line:?}"));
        };
        let clean = !value.bytes().any(|b| (b < 0x20 && b != b'\t') || b == 0x7f) && value.trim() == value;
        if !is_token(name) || !clean {
            return Err(format!("a field line is not canonical: {line:?}"));
        }
        headers.push((name.to_owned(), value.to_owned()));
    }
    let seen = Seen { head: head.into(), method: method.into(), target: target.into(), headers, ..Seen::default() };
    let (lengths, codings) = (seen.all("content-length"), seen.all("transfer-encoding"));
    if lengths.len() + codings.len() > 1 {
        return Err("more than one framing".into());
    }
    let canonical_length =
        |text: &str| text == "0" || (!text.starts_with('0') && text.bytes().all(|b| b.is_ascii_digit()));
    if lengths.iter().any(|text| text.is_empty() || !canonical_length(text))
        || codings.iter().any(|text| *text != "chunked")
    {
        return Err("a framing that is not canonical".into());
    }
    if seen.all("host").len() != 1 {
        return Err("not one Host".into());
    }
    for (name, _) in &seen.headers {
        let folded: String =
            name.to_ascii_uppercase().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        if folded == "PRIVATE_TOKEN" && !name.eq_ignore_ascii_case("private-token") {
            return Err(format!("a twin of the token header: {name}"));
        }
    }
    Ok(seen)
}

/// `Err(None)`: the body was cut, which is how an aborted request looks.
fn read_body(socket: &mut TcpStream, buffer: &mut Vec<u8>, request: &Seen) -> Result<Vec<u8>, Option<String>> {
    let mut take = |buffer: &mut Vec<u8>, count: usize| -> Result<Vec<u8>, Option<String>> {
        while buffer.len() < count {
            if read_some(socket, buffer) == 0 {
                return Err(None);
            }
        }
        Ok(buffer.drain(..count).collect())
    };
    if let Some(length) = request.header("content-length") {
        return take(buffer, length.parse().unwrap());
    }
    if request.header("transfer-encoding").is_none() {
        return Ok(Vec::new());
    }
    let mut body = Vec::new();
    loop {
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            line.extend(take(buffer, 1)?);
        }
        let text = String::from_utf8_lossy(&line[..line.len() - 2]).into_owned();
        if text.is_empty() || text.len() > 16 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(Some(format!("a chunk size that is not plain hex: {text:?}")));
        }
        let size = usize::from_str_radix(&text, 16).unwrap();
        body.extend(take(buffer, size)?);
        if take(buffer, 2)? != b"\r\n" {
            return Err(Some("a chunk that does not end in CRLF, or trailers".into()));
        }
        if size == 0 {
            return Ok(body);
        }
    }
}

impl Gateway {
    /// Waits for the process to end by itself; `None` when it does not.
    pub fn try_ended(&mut self, patience: Duration) -> Option<std::process::ExitStatus> {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Some(status);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        drop(self.child.kill());
        drop(self.child.wait());
        None
    }
}
