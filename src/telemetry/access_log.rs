//! One JSON object for each request. Lines are handed to a thread through a bounded queue: a log that stalls loses
//! lines, which a metric counts, and never holds up a request. No token gets here, and what may hold one is cut out.

use super::lines::{LineQueue, LogOutput};
use super::metrics::Metrics;
use aho_corasick::{AhoCorasick, AhoCorasickKind};
use memchr::memchr;
use percent_encoding::percent_decode;
use std::borrow::Cow;
use std::cell::RefCell;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

/// Client-chosen text beyond this is cut.
const MAX_TEXT: usize = 1_024;
/// How long a reload waits for the file to be reopened.
const REOPEN: Duration = Duration::from_secs(2);

/// What is known of a request when it is over. Bytes are the client's own and are escaped on the way out.
#[derive(Debug, Default)]
pub struct AccessLogEntry<'a> {
    pub unix_ms: u64,
    pub request_id: &'a str,
    /// In lower-case hex.
    pub trace_id: Option<[u8; 32]>,
    pub client: Option<IpAddr>,
    /// The method that was judged.
    pub method: &'a [u8],
    /// It came as a POST with that method in X-HTTP-Method-Override.
    pub overridden: bool,
    /// As it was sent, query included; what may be a secret is cut out here.
    pub target: &'a [u8],
    pub route: &'a str,
    pub status: u16,
    /// Whose answer the client got.
    pub by: Option<By>,
    /// Why it was refused or failed; `ok` otherwise.
    pub reason: &'static str,
    /// The limit that refused it.
    pub limit: Option<&'a str>,
    /// One that would have.
    pub limit_dry_run: Option<&'a str>,
    pub source: &'static str,
    /// The first 12 hex digits of the token's digest, and nothing else.
    pub token: Option<&'a str>,
    pub user: Option<&'a str>,
    /// The client spoke HTTP/2.
    pub http2: bool,
    /// Of the client's certificate, which was verified.
    pub client_certificate: Option<&'a str>,
    pub upstream: Option<Upstreamed<'a>>,
    pub duration: Duration,
    pub bytes_received: u64,
    pub bytes_sent: u64,
    pub user_agent: &'a [u8],
}

/// Who answered a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// tollgate itself.
    Gate,
    Backend,
}

impl By {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Gate => "gate",
            Self::Backend => "backend",
        }
    }
}

/// What came of asking a backend.
#[derive(Debug)]
pub struct Upstreamed<'a> {
    pub name: &'a str,
    /// The last one that was asked.
    pub server: Option<&'a str>,
    /// Its own status, whatever the client got.
    pub status: Option<u16>,
    /// From the choice of the server to the head of its answer.
    pub took: Option<Duration>,
    pub attempts: usize,
}

#[derive(Clone)]
pub struct AccessLog {
    lines: Option<Arc<LineQueue>>,
    secret_words: Arc<SecretWords>,
}

/// Words beside which a value is taken for a secret.
pub struct SecretWords(AhoCorasick);

impl SecretWords {
    /// The common ones, and the query parameter that carries tokens.
    pub fn beside(token_parameter: &str) -> std::io::Result<Self> {
        Self::new(&["token", "password", "secret", "private", token_parameter])
    }

    fn new(words: &[&str]) -> std::io::Result<Self> {
        // Most text is short and has none of them: what prepares for long text would cost more than it saves.
        let mut builder = AhoCorasick::builder();
        builder.ascii_case_insensitive(true).prefilter(false).kind(Some(AhoCorasickKind::DFA));
        builder.build(words).map(Self).map_err(std::io::Error::other)
    }

    /// Whether one stands in a text that backends read as it is: without escapes and what they fold.
    fn stand_in(&self, text: &[u8]) -> bool {
        self.0.is_match(text)
    }

    /// Whether one stands in a text, in plain or encoded, or folded as PHP does: `api.key` is `api_key`.
    pub fn may_stand_in(&self, text: &[u8]) -> bool {
        if !text.iter().any(is_read_otherwise) {
            return self.stand_in(text);
        }
        let folded: Vec<u8> =
            decode(text).iter().map(|b| if matches!(b, b'.' | b' ' | b'+' | b'[') { b'_' } else { *b }).collect();
        self.stand_in(&folded)
    }
}

/// Whether some reader takes the byte for another one.
fn is_read_otherwise(byte: &u8) -> bool {
    matches!(byte, b'%' | b'.' | b' ' | b'+' | b'[')
}

impl AccessLog {
    /// Starts the thread that writes; `None` switches the log off. `token_parameter` is the query parameter that carries
    /// tokens.
    pub fn start(to: Option<LogOutput>, token_parameter: &str, metrics: Arc<Metrics>) -> std::io::Result<Self> {
        let queue = |to| LineQueue::start("access", to, move |lines| metrics.access_log_lost(lines));
        let lines = to.map(queue).transpose()?.map(Arc::new);
        let secret_words = SecretWords::beside(token_parameter)?;
        Ok(Self { lines, secret_words: Arc::new(secret_words) })
    }

    /// The same log for another token parameter.
    pub fn with_parameter(&self, token_parameter: &str) -> std::io::Result<Self> {
        let secret_words = SecretWords::beside(token_parameter)?;
        Ok(Self { lines: self.lines.clone(), secret_words: Arc::new(secret_words) })
    }

    pub fn is_on(&self) -> bool {
        self.lines.is_some()
    }

    pub fn write(&self, entry: &AccessLogEntry<'_>) {
        if let Some(lines) = &self.lines {
            lines.push(format(entry, &self.secret_words));
        }
    }

    /// Waits until what was logged so far is written, but no longer than this.
    pub fn flush(&self, patience: Duration) {
        if let Some(lines) = &self.lines {
            lines.flush(patience);
        }
    }

    /// Reopens the file, which may have been rotated. Blocks for a moment; `Ok(false)`: it is reopened later, because the
    /// log is blocked.
    pub fn reopen(&self) -> Result<bool, String> {
        self.lines.as_ref().map_or(Ok(true), |lines| lines.reopen(REOPEN))
    }
}

/// What stands between two values, in one piece.
macro_rules! text_key {
    ($key:literal) => {
        concat!(",\"", $key, "\":\"")
    };
}
macro_rules! number_key {
    ($key:literal) => {
        concat!(",\"", $key, "\":")
    };
}

fn format(entry: &AccessLogEntry<'_>, secret_words: &SecretWords) -> Vec<u8> {
    let mut line = Vec::with_capacity(512);
    let (path, query) = match memchr(b'?', entry.target) {
        Some(at) => (&entry.target[..at], Some(&entry.target[at + 1..])),
        None => (entry.target, None),
    };
    line.extend_from_slice(b"{\"time\":\"");
    time(&mut line, entry.unix_ms);
    line.push(b'"');
    text(&mut line, text_key!("request_id"), entry.request_id.as_bytes());
    if let Some(trace_id) = &entry.trace_id {
        text(&mut line, text_key!("trace_id"), trace_id);
    }
    if let Some(client) = entry.client {
        address(&mut line, client);
    }
    text(&mut line, text_key!("method"), entry.method);
    if entry.overridden {
        line.extend_from_slice(b",\"method_override\":true");
    }
    text(&mut line, text_key!("path"), &redacted_path(path, secret_words));
    if let Some(query) = query {
        text(&mut line, text_key!("query"), &redacted(query, secret_words));
    }
    text(&mut line, text_key!("route"), entry.route.as_bytes());
    number(&mut line, number_key!("status"), entry.status.into());
    if let Some(by) = entry.by {
        word(&mut line, text_key!("by"), by.as_str());
    }
    word(&mut line, text_key!("reason"), entry.reason);
    if let Some(limit) = entry.limit {
        word(&mut line, text_key!("limit"), limit);
    }
    if let Some(limit) = entry.limit_dry_run {
        word(&mut line, text_key!("limit_dry_run"), limit);
    }
    word(&mut line, text_key!("source"), entry.source);
    if let Some(token) = entry.token {
        word(&mut line, text_key!("token"), token);
    }
    if let Some(user) = entry.user {
        text(&mut line, text_key!("user"), user.as_bytes());
    }
    if entry.http2 {
        word(&mut line, text_key!("protocol"), "HTTP/2");
    }
    if let Some(subject) = entry.client_certificate {
        text(&mut line, text_key!("client_certificate"), subject.as_bytes());
    }
    if let Some(upstream) = &entry.upstream {
        text(&mut line, text_key!("upstream"), upstream.name.as_bytes());
        if let Some(server) = upstream.server {
            text(&mut line, text_key!("upstream_server"), server.as_bytes());
        }
        if let Some(status) = upstream.status {
            number(&mut line, number_key!("upstream_status"), status.into());
        }
        if let Some(took) = upstream.took {
            milliseconds(&mut line, number_key!("upstream_duration_ms"), took);
        }
        number(&mut line, number_key!("attempts"), upstream.attempts as u64);
    }
    milliseconds(&mut line, number_key!("duration_ms"), entry.duration);
    number(&mut line, number_key!("bytes_received"), entry.bytes_received);
    number(&mut line, number_key!("bytes_sent"), entry.bytes_sent);
    text(&mut line, text_key!("user_agent"), entry.user_agent);
    line.extend_from_slice(b"}\n");
    line
}

/// A query without what may be a secret. Most have none, and nothing that somebody reads otherwise than it stands there.
fn redacted<'q>(query: &'q [u8], secret_words: &SecretWords) -> Cow<'q, [u8]> {
    if !query.iter().any(is_read_otherwise) && !secret_words.stand_in(query) {
        return query.into();
    }
    redacted_pieces(query, secret_words).into()
}

/// Every parameter in whose name or value a secret's word stands, in plain or encoded, however the parameters are separated,
/// keeps its name at most.
fn redacted_pieces(query: &[u8], secret_words: &SecretWords) -> Vec<u8> {
    let mut out = Vec::with_capacity(query.len());
    for piece in query.split_inclusive(|b| matches!(b, b'&' | b';')) {
        if !secret_words.may_stand_in(piece) {
            out.extend_from_slice(piece);
            continue;
        }
        // A plain name that is itself the telling word is no secret; anything else may be.
        let name = piece.split(|b| *b == b'=').next().unwrap_or_default();
        let plain = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'[' | b']');
        if name.len() < piece.len() && name.iter().all(plain) && secret_words.may_stand_in(name) {
            out.extend_from_slice(&name[..name.len().min(64)]);
            out.push(b'=');
        }
        out.extend_from_slice(b"[redacted]");
        out.extend(piece.last().filter(|b| matches!(b, b'&' | b';')));
    }
    out
}

/// A path without what may be a secret that somebody put in the wrong place: behind a `;`, a forgotten or encoded `?`,
/// or in a target that is no path at all.
fn redacted_path<'p>(path: &'p [u8], secret_words: &SecretWords) -> Cow<'p, [u8]> {
    if !path.starts_with(b"/") {
        return b"-".into();
    }
    let says_value = |b: &u8| matches!(b, b'=' | b':' | b';' | b'&' | b'?' | b'#');
    if !path.iter().any(|b| says_value(b) || *b == b'%') {
        return path.into();
    }
    let mut out = Vec::with_capacity(path.len());
    for piece in path.split_inclusive(|b| *b == b'/') {
        let decoded = decode(piece);
        if decoded.iter().any(says_value) && secret_words.may_stand_in(piece) {
            out.extend_from_slice(b"[redacted]");
            out.extend(piece.last().filter(|b| **b == b'/'));
        } else {
            out.extend_from_slice(piece);
        }
    }
    out.into()
}

/// Undoes `%hh`, twice: a nested URL carries its own query encoded. Most parameters have none.
fn decode(bytes: &[u8]) -> Cow<'_, [u8]> {
    if memchr(b'%', bytes).is_none() {
        return bytes.into();
    }
    percent_decode(&Cow::from(percent_decode(bytes))).collect::<Vec<_>>().into()
}

/// Digits of a number, without the formatter: a line has seven of them.
fn digits(line: &mut Vec<u8>, mut value: u64) {
    let mut all = [0; 20];
    let mut first = all.len();
    loop {
        first -= 1;
        all[first] = b'0' + (value % 10) as u8;
        value /= 10;
        if value == 0 {
            break;
        }
    }
    line.extend_from_slice(&all[first..]);
}

/// With three places.
fn milliseconds(line: &mut Vec<u8>, key: &'static str, time: Duration) {
    let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    number(line, key, micros / 1000);
    let rest = micros % 1000;
    line.extend_from_slice(&[b'.', b'0' + (rest / 100) as u8, b'0' + (rest / 10 % 10) as u8, b'0' + (rest % 10) as u8]);
}

#[inline]
fn number(line: &mut Vec<u8>, key: &'static str, value: u64) {
    line.extend_from_slice(key.as_bytes());
    digits(line, value);
}

/// A JSON string of a word of tollgate's own, in which nothing has to be escaped.
#[inline(always)]
fn word(line: &mut Vec<u8>, key: &'static str, value: &str) {
    debug_assert!(value.bytes().all(|b| is_plain(&b)), "{value:?}");
    line.extend_from_slice(key.as_bytes());
    line.extend_from_slice(value.as_bytes());
    line.push(b'"');
}

fn is_plain(byte: &u8) -> bool {
    (*byte >= b' ') & (*byte <= b'~') & (*byte != b'"') & (*byte != b'\\')
}

/// A JSON string of bytes that nobody has checked: what is not visible ASCII is escaped.
#[inline(always)]
fn text(line: &mut Vec<u8>, key: &'static str, value: &[u8]) {
    line.extend_from_slice(key.as_bytes());
    let value = &value[..value.len().min(MAX_TEXT)];
    // Without branches, so that it looks at many bytes at once. Most text needs no escape.
    if value.iter().fold(true, |plain, b| plain & is_plain(b)) {
        line.extend_from_slice(value);
    } else {
        escaped(line, value);
    }
    line.push(b'"');
}

fn escaped(line: &mut Vec<u8>, value: &[u8]) {
    for character in String::from_utf8_lossy(value).chars() {
        match character {
            '"' | '\\' => line.extend_from_slice(&[b'\\', character as u8]),
            ' '..='~' => line.push(character as u8),
            _ => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    line.extend_from_slice(format!("\\u{unit:04x}").as_bytes());
                }
            }
        }
    }
}

/// The client's address. Lines of one client often follow each other.
fn address(line: &mut Vec<u8>, client: IpAddr) {
    thread_local! {
        static LAST: RefCell<(Option<IpAddr>, String)> = const { RefCell::new((None, String::new())) };
    }
    LAST.with_borrow_mut(|(known, text)| {
        if *known != Some(client) {
            (*known, *text) = (Some(client), client.to_string());
        }
        line.extend_from_slice(text_key!("client").as_bytes());
        line.extend_from_slice(text.as_bytes());
        line.push(b'"');
    });
}

/// A time as RFC 3339 writes it. The date and the second are written once for all lines that need them.
fn time(line: &mut Vec<u8>, unix_ms: u64) {
    thread_local! {
        static SECOND: RefCell<(u64, Vec<u8>)> = const { RefCell::new((u64::MAX, Vec::new())) };
    }
    let (second, ms) = (unix_ms / 1000, unix_ms % 1000);
    SECOND.with_borrow_mut(|(known, text)| {
        if *known != second {
            let at = std::time::UNIX_EPOCH + Duration::from_secs(second);
            *text = humantime::format_rfc3339_seconds(at).to_string().into_bytes();
            // Its `Z`.
            text.pop();
            *known = second;
        }
        line.extend_from_slice(text);
    });
    line.extend_from_slice(&[b'.', b'0' + (ms / 100) as u8, b'0' + (ms / 10 % 10) as u8, b'0' + (ms % 10) as u8, b'Z']);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words() -> SecretWords {
        SecretWords::new(&["token", "password", "secret", "private", "apikey", "api_key"]).unwrap()
    }

    #[test]
    fn numbers_and_times_are_written_as_the_formatter_writes_them() {
        let mut seen = 0;
        for micros in [0, 1, 9, 10, 999, 1_000, 1_001, 12_345, 99_999, 1_000_000, 86_400_000_000, 123_456_789_012] {
            let mut line = Vec::new();
            milliseconds(&mut line, number_key!("k"), Duration::from_micros(micros));
            number(&mut line, number_key!("n"), micros);
            let expected = format!(",\"k\":{}.{:03},\"n\":{micros}", micros / 1000, micros % 1000);
            assert_eq!(String::from_utf8(line).unwrap(), expected);
            let mut line = Vec::new();
            time(&mut line, micros);
            let at = std::time::UNIX_EPOCH + Duration::from_millis(micros);
            assert_eq!(String::from_utf8(line).unwrap(), humantime::format_rfc3339_millis(at).to_string());
            seen += 1;
        }
        assert_eq!(seen, 12);
        let mut line = Vec::new();
        text(&mut line, text_key!("k"), "a\"b\\c\u{1}\u{e9}\u{1f600}~".as_bytes());
        assert_eq!(String::from_utf8(line).unwrap(), r#","k":"a\"b\\c\u0001\u00e9\ud83d\ude00~""#);
    }

    #[test]
    fn secrets_are_cut_out() {
        for query in [
            "a=1&private_token=S3CRET&b=2",
            "private%5Ftoken=S3CRET",
            "[private_token]=S3CRET",
            "x=1;private_token=S3CRET",
            "access_token=S3CRET",
            "u=%2Fx%3Fprivate_token%3DS3CRET",
            "u=%252Fx%253Fprivate_token%253DS3CRET",
            "password=S3CRET",
            "PRIVATE-TOKEN=S3CRET",
            "private_token%3DS3CRET",
            "private_token%3DS3CRET=x",
            "private_token:S3CRET",
            "apikey=S3CRET",
            "api.key=S3CRET",
            "api%2Ekey=S3CRET",
            "api+key=S3CRET",
            "api%5bkey=S3CRET",
            "S3CRET=private_token",
        ] {
            let text = String::from_utf8(redacted(query.as_bytes(), &words()).into_owned()).unwrap();
            assert!(!text.contains("S3CRET"), "{query} -> {text}");
        }
        for path in [
            "/p&private_token=S3CRET",
            "/p%3Fprivate_token=S3CRET/x",
            "/p/private_token%3DS3CRET",
            "/p;private_token=S3CRET",
            "http://S3CRET@h/",
        ] {
            let text = String::from_utf8(redacted_path(path.as_bytes(), &words()).into_owned()).unwrap();
            assert!(!text.contains("S3CRET"), "{path} -> {text}");
        }
        assert_eq!(
            redacted_path(b"/api/v3/projects/private-repo/x", &words()).as_ref(),
            b"/api/v3/projects/private-repo/x"
        );
        assert_eq!(*redacted(b"a=1&private_token=S&b=2", &words()), *b"a=1&private_token=[redacted]&b=2");
        assert_eq!(*redacted(b"page=2&per_page=5", &words()), *b"page=2&per_page=5");
    }

    #[test]
    fn every_line_is_one_json_object() {
        let nasty = b"\"\\\n\r\0\x7f\xff\xc3\xa9{}\xf0\x9f\x98\x80";
        let entry = AccessLogEntry {
            method: nasty,
            target: nasty,
            user_agent: nasty,
            user: Some("a\"b"),
            route: "x",
            ..AccessLogEntry::default()
        };
        let line = String::from_utf8(format(&entry, &words())).unwrap();
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!((line.lines().count(), value["user"].as_str()), (1, Some("a\"b")));
        // The longest one: journald splits what is longer than 48 KiB.
        let long = [0xff; 100_000];
        let text = "\u{1}".repeat(50_000);
        let entry = AccessLogEntry {
            request_id: &text[..128],
            method: &long,
            target: &[b"/".as_slice(), &long, b"?", &long].concat(),
            route: &text,
            user: Some(&text),
            upstream: Some(Upstreamed {
                name: &text,
                server: Some(&text[..108]),
                status: None,
                took: None,
                attempts: 3,
            }),
            user_agent: &long,
            ..AccessLogEntry::default()
        };
        assert!(format(&entry, &words()).len() < 48 * 1024);
        let path = AccessLogEntry { target: b"/api;private_token=S3CRET/x?a=1", ..AccessLogEntry::default() };
        assert!(!String::from_utf8(format(&path, &words())).unwrap().contains("S3CRET"));
    }
}
