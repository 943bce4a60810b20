//! HTTP introspection against a scripted server, and against a real backend.

use super::{Fault, Features, Subject, TIMEOUT, run};
use crate::servers::http::{Asked, HttpServer, Reply, Step};
use crate::servers::tls::Authority;
use crate::servers::{Folder, Process, Server as _, eventually, free_port, repository};
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tollgate::store::credential::{Credential, Digest};
use tollgate::store::introspect::{IntrospectMode, IntrospectSettings, IntrospectStore};
use tollgate::store::{
    AdminError, Imported, Records, Secret, StoreError, TlsMode, TlsSettings, TokenAdmin, TokenRecord, TokenStore,
};
use tollgate::telemetry::metrics::Metrics;

/// A timeout that a busy machine does not reach.
const AMPLE: Duration = Duration::from_secs(20);
const TOKEN: &str = "S3CRET-token_0001";

// ---- A server with a table of tokens, and the writes to it ----

/// The tokens that a scripted server knows.
#[derive(Clone, Default)]
struct Table {
    tokens: Arc<Mutex<HashMap<Digest, TokenRecord>>>,
    /// Tokens for which the response is invalid.
    spoiled: Arc<Mutex<HashSet<Digest>>>,
}

impl Table {
    /// A server that responds from this table, like GitLab's `/user` or as RFC 7662 specifies.
    fn serve(&self, rfc7662: bool) -> HttpServer {
        let table = self.clone();
        HttpServer::start(move |asked| table.answer(rfc7662, asked))
    }

    fn answer(&self, rfc7662: bool, asked: &Asked) -> Reply {
        let token = if rfc7662 { asked.field("token").unwrap_or_default() } else { asked.header("private-token") };
        let digest = Digest::of(token.as_bytes());
        if self.spoiled.lock().contains(&digest) {
            return Reply::json("<html>");
        }
        let now = tollgate::edge::now().unix_ms / 1000;
        let record = self.tokens.lock().get(&digest).filter(|record| record.revoked.is_none()).cloned();
        // A response of RFC 7662 can contain these times, so that the client compares them.
        let in_time = |record: &TokenRecord| {
            record.expires.is_none_or(|end| now < end) && record.not_before.is_none_or(|start| start <= now)
        };
        let record = record.filter(|record| rfc7662 || in_time(record));
        match (record, rfc7662) {
            (None, false) => Reply::status(401),
            (None, true) => Reply::json(r#"{"active":false}"#),
            (Some(record), false) => {
                let state = if record.blocked { "blocked" } else { "active" };
                Reply::json(
                    serde_json::json!({"username": record.user, "state": state, "scope": record.scopes}).to_string(),
                )
            }
            (Some(record), true) => Reply::json(
                serde_json::json!({
                    "active": !record.blocked, "username": record.user, "scope": record.scopes.join(" "),
                    "exp": record.expires, "nbf": record.not_before, "iat": record.created,
                })
                .to_string(),
            ),
        }
    }
}

/// Writes that the backend itself would do.
#[async_trait::async_trait]
impl TokenAdmin for Table {
    async fn create(&mut self, record: &TokenRecord) -> Result<(), AdminError> {
        match self.tokens.lock().insert(record.digest, record.clone()) {
            None => Ok(()),
            Some(_) => Err(AdminError::Exists),
        }
    }

    async fn import(&mut self, records: Records<'_>) -> Result<Imported, AdminError> {
        let records = records.collect::<Result<Vec<_>, _>>()?;
        let mut table = self.tokens.lock();
        let before = table.len();
        for record in records {
            table.entry(record.digest).or_insert(record);
        }
        Ok(Imported { new: (table.len() - before) as u64, ..Imported::default() })
    }

    async fn list(&mut self) -> Result<Vec<TokenRecord>, AdminError> {
        Ok(self.tokens.lock().values().cloned().collect())
    }

    async fn find(&mut self, hex_prefix: &str) -> Result<Vec<TokenRecord>, AdminError> {
        Ok(self.list().await?.into_iter().filter(|record| record.digest.to_hex().starts_with(hex_prefix)).collect())
    }

    async fn revoke(&mut self, digest: &Digest, at: u64) -> Result<bool, AdminError> {
        let mut table = self.tokens.lock();
        let record = table.get_mut(digest).ok_or(AdminError::Missing)?;
        let first = record.revoked.is_none();
        record.revoked.get_or_insert(at);
        Ok(first)
    }

    async fn rotate(&mut self, old: &Digest, next: &TokenRecord, at: u64, end: u64) -> Result<(), AdminError> {
        let mut table = self.tokens.lock();
        let record = table.get_mut(old).ok_or(AdminError::Missing)?;
        record.superseded = Some(at);
        record.expires = Some(record.expires.map_or(end, |own| own.min(end)));
        table.insert(next.digest, next.clone());
        Ok(())
    }

    async fn block(&mut self, user: &str, blocked: bool) -> Result<u64, AdminError> {
        let mut table = self.tokens.lock();
        let of_user = table.values_mut().filter(|record| record.user == user && record.blocked != blocked);
        Ok(of_user.map(|record| record.blocked = blocked).count() as u64)
    }

    async fn wait(&mut self, _timeout: Duration) -> Result<Vec<String>, AdminError> {
        Err(AdminError::NoRegister("introspection"))
    }
}

struct IntrospectSubject {
    rfc7662: bool,
    table: Table,
    server: Mutex<HttpServer>,
}

impl IntrospectSubject {
    fn new(rfc7662: bool) -> Self {
        let table = Table::default();
        Self { rfc7662, server: Mutex::new(table.serve(rfc7662)), table }
    }
}

#[async_trait::async_trait]
impl Subject for IntrospectSubject {
    fn name(&self) -> &'static str {
        if self.rfc7662 { "introspection, RFC 7662" } else { "introspection" }
    }

    fn features(&self) -> Features {
        Features {
            hears: false,
            keeps_all: false,
            is_ours: false,
            waits: false,
            has_server: true,
            spoils: true,
            tells_why: false,
        }
    }

    async fn admin(&self) -> Box<dyn TokenAdmin> {
        Box::new(self.table.clone())
    }

    fn open(&self) -> Arc<dyn TokenStore> {
        let metrics = Arc::new(Metrics::new("test").unwrap().store("asked"));
        // The suite does thousands of lookups while the server is down; the breaker has its own tests.
        let pause = Duration::from_millis(1);
        let url = self.server.lock().url("/");
        let settings = IntrospectSettings { breaker_pause: pause, ..settings(url, self.rfc7662) };
        Arc::new(IntrospectStore::new(settings, TIMEOUT, metrics).unwrap())
    }

    async fn spoil(&self, token: &str) {
        self.table.spoiled.lock().insert(Digest::of(token.as_bytes()));
    }

    async fn fault(&self, fault: Fault) {
        self.server.lock().inject(fault);
    }
}

#[tokio::test]
async fn introspection_holds_the_contract() {
    run(&IntrospectSubject::new(false)).await;
}

#[tokio::test]
async fn rfc7662_holds_the_contract() {
    run(&IntrospectSubject::new(true)).await;
}

// ---- What the tests below share ----

fn settings(url: String, rfc7662: bool) -> IntrospectSettings {
    IntrospectSettings {
        url,
        insecure_http: false,
        mode: if rfc7662 {
            IntrospectMode::Rfc7662 { client_id: "toll gate".into(), client_secret: Secret::new("p:a%ss") }
        } else {
            IntrospectMode::User { header: "PRIVATE-TOKEN".into(), unknown: vec![401, 403] }
        },
        user: ["/username", "/sub"].map(str::to_owned).into(),
        scopes: "/scope".into(),
        default_scopes: vec!["default".into()],
        tls: TlsSettings { mode: TlsMode::VerifyFull, ca: None, client: None },
        connections: 8,
        breaker_failures: 1_000,
        breaker_pause: Duration::from_secs(3600),
    }
}

struct Bench {
    server: HttpServer,
    store: Arc<IntrospectStore>,
    metrics: Metrics,
}

impl Bench {
    fn new(server: HttpServer, timeout: Duration, change: impl FnOnce(&mut IntrospectSettings)) -> Self {
        let metrics = Metrics::new("test").unwrap();
        let mut settings = settings(server.url("/api/v3/user?a=b"), false);
        change(&mut settings);
        let store = IntrospectStore::new(settings, timeout, Arc::new(metrics.store("asked"))).unwrap();
        Self { server, store: Arc::new(store), metrics }
    }

    fn user(script: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        Self::new(HttpServer::start(script), AMPLE, |_| {})
    }

    fn rfc7662(script: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        Self::new(HttpServer::start(script), AMPLE, |settings| settings.mode = self::settings(String::new(), true).mode)
    }

    async fn ask(&self, token: &str) -> Result<Option<TokenRecord>, StoreError> {
        let answer = self.store.lookup(&Credential::new(token.as_bytes(), Digest::of(token.as_bytes()))).await;
        if let Err(error) = &answer {
            let text = format!("{error} {error:?} {error:#?}");
            for secret in ["S3CRET", "p:a%ss", "cDphJXNz", "http:", "unix:"] {
                assert!(!text.contains(secret), "{text}");
            }
        }
        answer
    }

    async fn ask_user(&self) -> Result<Option<String>, &'static str> {
        self.ask(TOKEN).await.map(|record| record.map(|record| record.user)).map_err(|error| error.kind())
    }

    /// The value of a metric of the store.
    fn metric(&self, name: &str) -> i64 {
        let text = self.metrics.render().unwrap();
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    fn connections(&self) -> [i64; 2] {
        ["open", "in_use"]
            .map(|state| self.metric(&format!("tollgate_store_connections{{state=\"{state}\",store=\"asked\"}}")))
    }

    fn breaker_open(&self) -> bool {
        self.metric("tollgate_store_breaker_open") != 0
    }
}

fn anna() -> Reply {
    Reply::json(r#"{"id":7,"username":"anna","state":"active"}"#)
}

fn valid() -> Result<Option<String>, &'static str> {
    Ok(Some("anna".to_owned()))
}

// ---- What is sent ----

#[tokio::test]
async fn the_token_goes_in_its_header() {
    let bench = Bench::user(|_| anna());
    let record = bench.ask(TOKEN).await.unwrap().unwrap();
    assert_eq!((record.user.as_str(), record.digest), ("anna", Digest::of(TOKEN.as_bytes())));
    assert_eq!((record.scopes, record.blocked, record.expires), (vec!["default".to_owned()], false, None));
    let asked = bench.server.last();
    assert_eq!((asked.method.as_str(), asked.target.as_str()), ("GET", "/api/v3/user?a=b"));
    let mut headers = asked.headers;
    headers.sort();
    let host = bench.server.address().to_string();
    let agent = concat!("tollgate/", env!("CARGO_PKG_VERSION"));
    let expected = [("accept", "application/json"), ("host", &host), ("private-token", TOKEN), ("user-agent", agent)];
    assert_eq!(headers, expected.map(|(name, value)| (name.to_owned(), value.to_owned())), "and nothing else");
}

#[tokio::test]
async fn authorization_says_bearer() {
    let bench = Bench::new(HttpServer::start(|_| anna()), AMPLE, |settings| {
        settings.mode = IntrospectMode::User { header: "Authorization".into(), unknown: vec![401] };
    });
    assert_eq!(bench.ask_user().await, valid());
    assert_eq!(bench.server.last().header("authorization"), format!("Bearer {TOKEN}"));
}

#[tokio::test]
async fn rfc7662_sends_a_form_and_who_asks() {
    let bench = Bench::rfc7662(|_| Reply::json(r#"{"active":true,"username":"anna","scope":"a b","exp":1800000000}"#));
    let token = "a+b/c==&token=x%41~*";
    let record = bench.ask(token).await.unwrap().unwrap();
    assert_eq!((record.scopes, record.expires), (vec!["a".to_owned(), "b".to_owned()], Some(1_800_000_000)));
    let asked = bench.server.last();
    assert_eq!((asked.method.as_str(), asked.target.as_str()), ("POST", "/api/v3/user?a=b"));
    assert_eq!(asked.field("token").unwrap(), token);
    assert_eq!(asked.field("token_type_hint").unwrap(), "access_token");
    assert_eq!(asked.header("content-type"), "application/x-www-form-urlencoded");
    // base64 of `toll+gate:p%3Aa%25ss`.
    assert_eq!(asked.header("authorization"), "Basic dG9sbCtnYXRlOnAlM0FhJTI1c3M=");
    assert!(!asked.headers.iter().any(|(_, value)| value.contains(token)));
}

#[tokio::test]
async fn what_cannot_be_a_token_is_not_sent() {
    for bench in [Bench::user(|_| anna()), Bench::rfc7662(|_| Reply::json(r#"{"active":true,"sub":"a"}"#))] {
        for token in ["", " ", "a b", "a\r\nHost: x", "a\0", "tök", "\u{7f}", &"x".repeat(2049)] {
            assert_eq!(bench.ask(token).await, Ok(None), "{token:?}");
        }
        assert_eq!(bench.server.connections(), 0);
        assert!(bench.ask(&"x".repeat(2048)).await.unwrap().is_some());
        assert!(bench.ask("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~").await.unwrap().is_some());
    }
}

#[test]
fn settings_that_cannot_work() {
    let wrong = |change: fn(&mut IntrospectSettings), part: &str| {
        let mut settings = settings("https://user.example/".into(), false);
        settings.tls.mode = TlsMode::Require;
        change(&mut settings);
        let metrics = Arc::new(Metrics::new("test").unwrap().store("asked"));
        let why = IntrospectStore::new(settings, AMPLE, metrics).err().unwrap().to_string();
        assert!(why.contains(part), "{why}");
    };
    wrong(|settings| settings.url = "ftp://x/".into(), "endpoint: ");
    wrong(|settings| settings.url = "http://user.example/".into(), "insecure_http");
    let header = |header: &str| IntrospectMode::User { header: header.into(), unknown: vec![401] };
    for (name, part) in [("a b", "header"), ("Host", "can't hold a token")] {
        let settings = IntrospectSettings { mode: header(name), ..settings("http://127.0.0.1/".into(), false) };
        let metrics = Arc::new(Metrics::new("test").unwrap().store("asked"));
        let why = IntrospectStore::new(settings, AMPLE, metrics).err().unwrap().to_string();
        assert!(why.contains(part), "{why}");
    }
    for unknown in [vec![], vec![401, 200], vec![302], vec![399], vec![500], vec![407], vec![408], vec![429], vec![0]] {
        let mode = IntrospectMode::User { header: "PRIVATE-TOKEN".into(), unknown };
        let settings = IntrospectSettings { mode, ..settings("http://127.0.0.1/".into(), false) };
        let found = settings.problems();
        assert!(found.len() == 1 && found[0].key == "unknown_statuses", "{found:?}");
    }
    wrong(|settings| settings.user = vec![], "user");
    wrong(|settings| settings.user = vec!["username".into()], "JSON pointer");
    wrong(|settings| settings.connections = 0, "connections");
    wrong(|settings| settings.breaker_failures = 0, "breaker_failures");
    let empty = |settings: &mut IntrospectSettings| {
        settings.mode = IntrospectMode::Rfc7662 { client_id: String::new(), client_secret: Secret::default() };
    };
    wrong(empty, "client_id");
    let shown = format!("{:?}", settings("http://x/?key=S3CRET".into(), true));
    assert!(!shown.contains("S3CRET") && !shown.contains("p:a"), "{shown}");
}

// ---- What answers mean ----

#[tokio::test]
async fn every_status() {
    let body = r#"{"username":"anna","active":true}"#;
    for rfc7662 in [false, true] {
        let script = move |asked: &Asked| {
            let status = asked.target.rsplit('=').next().unwrap().parse().unwrap();
            let location = ("Location", "http://127.0.0.1:1/");
            Reply::new(status, &[("Content-Type", "application/json"), location], body)
        };
        let server = HttpServer::start(script);
        let mut counts = [0; 3];
        for status in 100..=599 {
            let metrics = Arc::new(Metrics::new("test").unwrap().store("asked"));
            let settings = settings(server.url(&format!("/?status={status}")), rfc7662);
            let store = IntrospectStore::new(settings, AMPLE, metrics).unwrap();
            let answer = store.lookup(&Credential::new(TOKEN.as_bytes(), Digest::of(TOKEN.as_bytes()))).await;
            match status {
                200 => assert_eq!(answer.unwrap().unwrap().user, "anna"),
                401 | 403 if !rfc7662 => assert_eq!(answer, Ok(None), "{status}"),
                _ => {
                    let Err(StoreError::Unavailable(why)) = &answer else { panic!("{status}: {answer:?}") };
                    // Interim responses are skipped, and here no final one follows.
                    let skipped = (100..200).contains(&status) && status != 101;
                    assert!(skipped || why.starts_with(&format!("answered {status}: ")), "{why}");
                    assert!(status != 401 && status != 403 || why.contains("client_id"), "{why}");
                    counts[2] += 1;
                }
            }
            counts[usize::from(status >= 400)] += 1;
        }
        assert_eq!(counts, [300, 200, if rfc7662 { 499 } else { 497 }]);
    }
}

#[tokio::test]
async fn what_something_in_front_of_the_endpoint_says_is_no_word_of_it() {
    let json = ("Content-Type", "application/json");
    let html = ("Content-Type", "text/html");
    let text = ("Content-Type", "text/plain");
    let no = r#"{"message":"403 Forbidden"}"#;
    let all: &[u16] = &[401, 403];
    let mut asked = 0;
    for (what, unknown, status, headers, body, expected) in [
        ("GitLab's own 401", all, 401, &[json][..], r#"{"message":"401 Unauthorized"}"#, Ok(None)),
        ("a 401 is one in any form", all, 401, &[html], "<html>", Ok(None)),
        ("and without one", all, 401, &[], "", Ok(None)),
        ("its own 403", all, 403, &[json], no, Ok(None)),
        ("with a charset", all, 403, &[("Content-Type", "application/json; charset=utf-8")], no, Ok(None)),
        ("as a problem", all, 403, &[("Content-Type", "application/problem+json")], no, Ok(None)),
        // As nginx, Rack Attack (bans and throttling), Cloudflare and others respond.
        ("nginx", all, 403, &[html], "<html><h1>403 Forbidden</h1></html>", Err("garbage")),
        ("Rack Attack's ban", all, 403, &[text], "Forbidden\n", Err("garbage")),
        ("JSON by its type only", all, 403, &[json], "<html>", Err("garbage")),
        ("JSON by its body only", all, 403, &[html], no, Err("garbage")),
        ("two types", all, 403, &[json, html], no, Err("garbage")),
        ("no type", all, 403, &[], no, Err("garbage")),
        ("nothing", all, 403, &[json], "", Err("garbage")),
        ("no object", all, 403, &[json], "\"Forbidden\"", Err("garbage")),
        ("cut off", all, 403, &[json], r#"{"message":"403"#, Err("garbage")),
        ("come back later", all, 403, &[json, ("Retry-After", "60")], no, Err("garbage")),
        ("also with a 401", all, 401, &[json, ("retry-after", "Wed, 21 Oct 2026 07:28:00 GMT")], no, Err("garbage")),
        ("nothing left", all, 403, &[json, ("RateLimit-Remaining", "0")], no, Err("garbage")),
        ("nothing left, X-", all, 401, &[json, ("X-RateLimit-Remaining", " 0")], no, Err("garbage")),
        ("something left", all, 403, &[json, ("RateLimit-Remaining", "10")], no, Ok(None)),
        ("Cloudflare", all, 403, &[json, ("cf-mitigated", "challenge")], no, Err("garbage")),
        ("throttled", all, 429, &[text, ("Retry-After", "60")], "Retry later\n", Err("unavailable")),
        ("maintenance", all, 503, &[json], no, Err("unavailable")),
        ("a login page elsewhere", all, 302, &[("Location", "/users/sign_in")], "", Err("unavailable")),
        // With `unknown_statuses` set.
        ("403 is another thing here", &[401], 403, &[json], no, Err("unavailable")),
        ("404 is unknown here", &[404], 404, &[json], no, Ok(None)),
        ("a page", &[404], 404, &[html], "<html>", Err("garbage")),
        ("401 is another thing here", &[404], 401, &[json], no, Err("unavailable")),
    ] {
        asked += 1;
        let reply = Reply::new(status, headers, body);
        let server = HttpServer::start(move |_| reply.clone());
        let bench = Bench::new(server, AMPLE, |settings| {
            settings.mode = IntrospectMode::User { header: "PRIVATE-TOKEN".into(), unknown: unknown.to_vec() };
        });
        assert_eq!(bench.ask_user().await, expected, "{what}");
    }
    assert_eq!(asked, 28);
    // Too long to be read.
    let long = format!(r#"{{"message":"{}"}}"#, "x".repeat(100_000));
    let bench = Bench::user(move |_| Reply::new(403, &[json], &long));
    assert_eq!(bench.ask_user().await, Err("garbage"));
}

#[tokio::test]
async fn an_early_hint_is_not_the_answer() {
    let bench =
        Bench::user(|_| Reply::raw([&b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"[..], &anna().bytes()].concat()));
    assert_eq!(bench.ask_user().await, valid());
    bench.server.script(|_| Reply::raw([&b"HTTP/1.1 100 Continue\r\n\r\n"[..], &Reply::status(401).bytes()].concat()));
    assert_eq!(bench.ask_user().await, Ok(None));
}

#[tokio::test]
async fn bodies_and_their_types() {
    let json: &[(&str, &str)] = &[("Content-Type", "application/json")];
    let good = r#"{"username":"anna"}"#;
    let padded = |length: usize| format!(r#"{{"username":"anna","x":"{}"}}"#, "x".repeat(length - 26));
    let gap = |what: &[u8]| Reply::raw([&b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"[..], what].concat());
    let bytes = anna().bytes().len();
    for (what, reply, expected) in [
        ("plain", Reply::new(200, json, good), valid()),
        ("charset", Reply::new(200, &[("Content-Type", "application/json; charset=utf-8")], good), valid()),
        ("other json", Reply::new(200, &[("Content-Type", "application/vnd.x+json")], good), valid()),
        ("html", Reply::new(200, &[("Content-Type", "text/html")], "<html>S3CRET</html>"), Err("garbage")),
        ("json as html", Reply::new(200, &[("Content-Type", "text/html")], good), Err("garbage")),
        ("html as json", Reply::new(200, json, "<html>S3CRET</html>"), Err("garbage")),
        ("no type", Reply::new(200, &[], good), Err("garbage")),
        ("two types", Reply::new(200, &[json[0], json[0]], good), Err("garbage")),
        ("empty", Reply::new(200, json, ""), Err("garbage")),
        ("no user", Reply::new(200, json, r#"{"message":"S3CRET"}"#), Err("garbage")),
        ("compressed", Reply::new(200, &[json[0], ("Content-Encoding", "gzip")], b"\x1f\x8b\x08\0"), Err("garbage")),
        ("longest", Reply::new(200, json, padded(65_536)), valid()),
        ("too long", Reply::new(200, json, padded(65_537)), Err("garbage")),
        ("too long, in chunks", Reply::chunked(&padded(65_537), 5_000), Err("garbage")),
        ("longest, in chunks", Reply::chunked(&padded(65_536), 5_000), valid()),
        ("small chunks", Reply::chunked(good, 3), valid()),
        (
            "without end",
            Reply(vec![Step::Send(head_without_end()), Step::Send(vec![b'['; 300_000]), Step::Hang]),
            Err("garbage"),
        ),
        ("until closed", gap(b"\r\n{\"username\":\"anna\"}").then(Step::Close), valid()),
        ("until closed, cut", gap(b"\r\n{\"username\":\"anna\"").then(Step::Close), Err("garbage")),
        ("cut", anna().cut(bytes - 1, Step::Close), Err("garbage")),
        ("cut chunks", gap(b"Transfer-Encoding: chunked\r\n\r\n5\r\n{\"use\r\n").then(Step::Close), Err("garbage")),
        (
            "cut before the last chunk",
            {
                let all = Reply::chunked(good, 100);
                let length = all.bytes().len();
                all.cut(length - 5, Step::Close)
            },
            Err("garbage"),
        ),
        ("broken chunks", gap(b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n{}\r\n"), Err("garbage")),
        ("cut head", anna().cut(30, Step::Close), Err("unavailable")),
        ("nothing", Reply(vec![Step::Close]), Err("unavailable")),
        ("no http", Reply::raw("S3CRET\r\n\r\n").then(Step::Close), Err("unavailable")),
        ("noise", Reply::raw(b"\xff\xfe\0\0\r\n\r\n").then(Step::Close), Err("unavailable")),
        ("http 0.9", Reply::raw("{\"username\":\"anna\"}").then(Step::Close), Err("unavailable")),
        (
            "two lengths",
            gap(b"Content-Length: 19\r\nContent-Length: 18\r\n\r\n{\"username\":\"anna\"}").then(Step::Close),
            Err("unavailable"),
        ),
        (
            "endless head",
            Reply::raw([&b"HTTP/1.1 200 OK\r\nX: "[..], &vec![b'x'; 200_000]].concat()).then(Step::Hang),
            Err("unavailable"),
        ),
        (
            "many fields",
            Reply::raw(format!("HTTP/1.1 200 OK\r\n{}\r\n", "X: y\r\n".repeat(1000))).then(Step::Hang),
            Err("unavailable"),
        ),
        ("a 401 that is cut", Reply::status(401).cut(90, Step::Close), Ok(None)),
        ("a 401 with a page", Reply::new(401, &[("Content-Type", "text/html")], "<html>"), Ok(None)),
        ("a 401 without end", Reply::raw("HTTP/1.1 401 No\r\n\r\n").then(Step::Send(vec![b'x'; 300_000])), Ok(None)),
    ] {
        let bench = Bench::user(move |_| reply.clone());
        assert_eq!(bench.ask_user().await, expected, "{what}");
        assert_eq!(bench.connections()[1], 0, "{what}");
    }
}

fn head_without_end() -> Vec<u8> {
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n".to_vec()
}

#[tokio::test]
async fn redirects_are_not_followed() {
    let elsewhere = HttpServer::start(|_| anna());
    for status in [301, 302, 303, 307, 308] {
        let target = elsewhere.url("/");
        let bench = Bench::user(move |_| Reply::new(status, &[("Location", &target)], ""));
        let error = bench.ask(TOKEN).await.unwrap_err();
        assert!(error.to_string().contains("redirects are not followed"), "{error}");
        assert_eq!(bench.server.requests(), 1);
    }
    assert_eq!(elsewhere.connections(), 0, "the token is not sent to the other server");
}

#[tokio::test]
async fn rfc7662_answers() {
    for (status, body, expected) in [
        (200, r#"{"active":true,"username":"anna"}"#, valid()),
        (200, r#"{"active":true,"sub":"anna"}"#, valid()),
        (200, r#"{"active":false}"#, Ok(None)),
        (200, r#"{"username":"anna"}"#, Err("garbage")),
        (200, r#"{"active":"yes","username":"anna"}"#, Err("garbage")),
        (401, r#"{"active":false}"#, Err("unavailable")),
        (403, r#"{"active":false}"#, Err("unavailable")),
        (400, r#"{"error":"invalid_client"}"#, Err("unavailable")),
        (503, r#"{"active":false}"#, Err("unavailable")),
    ] {
        let reply = Reply::new(status, &[("Content-Type", "application/json")], body);
        let bench = Bench::rfc7662(move |_| reply.clone());
        assert_eq!(bench.ask_user().await, expected, "{status} {body}");
    }
}

// ---- Time ----

#[tokio::test]
async fn slow_answers() {
    let quick = Duration::from_millis(300);
    for (what, reply) in [
        ("no answer", Reply::hang()),
        ("half a head", anna().cut(20, Step::Hang)),
        ("half a body", anna().cut(anna().bytes().len() - 1, Step::Hang)),
        ("byte by byte", anna().slowly(1, Duration::from_millis(20))),
    ] {
        let server = HttpServer::start(move |_| reply.clone());
        let bench = Bench::new(server, quick, |_| {});
        let begun = Instant::now();
        assert_eq!(bench.ask_user().await, Err("timeout"), "{what}");
        assert!(begun.elapsed() >= quick - Duration::from_millis(5), "{what}: {:?}", begun.elapsed());
        assert_eq!(bench.connections(), [0, 0], "{what}: not to be used again");
        eventually("the server sees it closed", || bench.server.open() == 0);
    }
    let bench = Bench::user(|_| anna().slowly(10, Duration::from_millis(5)).after(Duration::from_millis(50)));
    assert_eq!(bench.ask_user().await, valid(), "slow, but within the timeout");
    // The head of a 401 is enough.
    let bench =
        Bench::new(HttpServer::start(|_| Reply::status(401).cut(80, Step::Hang)), Duration::from_secs(2), |_| {});
    assert_eq!(bench.ask_user().await, Ok(None));
}

#[tokio::test]
async fn nobody_there() {
    let mut bench = Bench::user(|_| anna());
    bench.server.stop();
    let error = bench.ask(TOKEN).await.unwrap_err();
    assert!(matches!(&error, StoreError::Unavailable(why) if why.contains("connecting to 127.0.0.1:")), "{error}");
    bench.server.start_again();
    assert_eq!(bench.ask_user().await, valid());
    let bench = Bench::new(HttpServer::start(|_| anna()), AMPLE, |settings| {
        settings.url = "http://no-such-host.invalid/".into();
        settings.insecure_http = true;
    });
    assert_eq!(bench.ask_user().await, Err("unavailable"));
}

// ---- Connections ----

#[tokio::test]
async fn connections_are_kept() {
    let bench = Bench::user(|asked| match asked.nth % 3 {
        0 => Reply::status(401),
        1 => Reply::status(503),
        _ => anna(),
    });
    for _ in 0..30 {
        drop(bench.ask(TOKEN).await);
    }
    assert_eq!((bench.server.connections(), bench.server.requests()), (1, 30));
    assert_eq!(bench.connections(), [1, 0]);
    bench.server.script(|_| {
        Reply::new(200, &[("Content-Type", "application/json"), ("Connection", "close")], r#"{"username":"anna"}"#)
    });
    for _ in 0..3 {
        assert_eq!(bench.ask_user().await, valid());
    }
    assert_eq!((bench.server.connections(), bench.connections()), (3, [0, 0]), "the first connection was reused");
}

#[tokio::test]
async fn a_kept_connection_that_is_closed_is_replaced() {
    let mut bench = Bench::user(|_| anna());
    for round in 0..20 {
        assert_eq!(bench.ask_user().await, valid());
        // Detected before the connection is used, or when it is used.
        bench.server.cut();
        if round % 2 == 0 {
            eventually("the server has closed", || bench.server.open() == 0);
        }
    }
    // Closed after the request has arrived: sent again, once.
    for rfc7662 in [false, true] {
        let script = |asked: &Asked| match asked.nth {
            1 => Reply::json(r#"{"username":"anna","active":true}"#),
            _ => Reply(vec![Step::Close]),
        };
        let bench = if rfc7662 { Bench::rfc7662(script) } else { Bench::user(script) };
        for _ in 0..5 {
            assert_eq!(bench.ask_user().await, valid());
        }
        assert_eq!((bench.server.connections(), bench.server.requests()), (5, 9));
        bench.server.script(|_| Reply(vec![Step::Close]));
        assert_eq!(bench.ask_user().await, Err("unavailable"));
        assert_eq!(bench.server.requests(), 11, "on the pooled connection and on a new one, and not again");
    }
    // A server that was restarted at the same address.
    bench.server.stop();
    bench.server.start_again();
    assert_eq!(bench.ask_user().await, valid());
}

/// Otherwise one token's response would be used for another token.
#[tokio::test]
async fn an_answer_that_nobody_asked_for_answers_nothing() {
    let bench = Bench::user(|asked| match asked.header("private-token").as_str() {
        "unknown" => Reply::status(401).then(Step::Wait(Duration::from_millis(5))).then(Step::Send(anna().bytes())),
        _ => Reply::status(403),
    });
    for round in 1..=20 {
        assert_eq!(bench.ask("unknown").await, Ok(None));
        eventually("all of it is sent", || bench.server.sent() == 3 * round - 1);
        assert_eq!(bench.ask("other").await, Ok(None), "{round}");
    }
    // A body that is longer than its Content-Length.
    let more = [Reply::status(401).bytes(), anna().bytes()].concat();
    let bench = Bench::user(move |_| Reply::raw(&more));
    for _ in 0..20 {
        assert_eq!(bench.ask(TOKEN).await, Ok(None));
    }
}

#[tokio::test]
async fn a_look_up_that_is_given_up_takes_its_connection_with_it() {
    let bench = Bench::user(|asked| match asked.header("private-token").as_str() {
        "slow" => anna().slowly(5, Duration::from_millis(2)),
        _ => Reply::status(401),
    });
    for round in 0..60 {
        let given_up = tokio::time::timeout(Duration::from_millis(round), bench.ask("slow")).await;
        assert!(given_up.is_err() || given_up == Ok(bench.ask("slow").await));
        assert_eq!(bench.ask("other").await, Ok(None), "never the rest of another response");
        assert_eq!(bench.connections()[1], 0);
    }
    assert!(bench.server.connections() > 20, "some requests were cancelled");
}

#[tokio::test]
async fn idle_connections_are_closed() {
    let bench = Bench::user(|_| anna());
    assert_eq!(bench.ask_user().await, valid());
    let store = Arc::clone(&bench.store);
    let follower = tokio::spawn(async move { store.follow(&|event| panic!("{event:?}")).await });
    eventually_async(|| bench.connections() == [0, 0]).await;
    eventually_async(|| bench.server.open() == 0).await;
    follower.abort();
    assert_eq!(bench.ask_user().await, valid());
}

async fn eventually_async(mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + 2 * AMPLE;
    while !check() {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn a_store_serves_several_runtimes() {
    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }
    let bench = Arc::new(Bench::new(HttpServer::start(|_| anna()), AMPLE, |settings| settings.connections = 3));
    // One runtime after the other; the earlier ones are shut down or idle at the next lookup.
    let still = runtime();
    assert_eq!(still.block_on(bench.ask_user()), valid());
    for _ in 0..5 {
        let gone = runtime();
        assert_eq!(gone.block_on(bench.ask_user()), valid());
        assert_eq!(gone.block_on(bench.ask_user()), valid());
        drop(gone);
    }
    assert_eq!(still.block_on(bench.ask_user()), valid());
    assert!(bench.connections()[0] <= 3 && bench.server.connections() <= 7, "{:?}", bench.connections());
    // Concurrently, with more runtimes than connections.
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let bench = Arc::clone(&bench);
            std::thread::spawn(move || {
                let runtime = runtime();
                runtime.block_on(async {
                    for _ in 0..200 {
                        assert_eq!(bench.ask_user().await, valid());
                        tokio::task::yield_now().await;
                    }
                });
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(bench.server.most_under_way() <= 3, "{}", bench.server.most_under_way());
    assert_eq!(bench.connections()[1], 0);
}

#[tokio::test]
async fn the_bound_is_never_exceeded() {
    let bench =
        Arc::new(Bench::new(HttpServer::start(|_| anna().after(Duration::from_millis(1))), 8 * AMPLE, |settings| {
            settings.connections = 4
        }));
    let asking: Vec<_> = (0..500)
        .map(|_| {
            let bench = Arc::clone(&bench);
            tokio::spawn(async move { bench.ask_user().await })
        })
        .collect();
    for task in asking {
        assert_eq!(task.await.unwrap(), valid());
    }
    assert_eq!((bench.server.most_under_way(), bench.server.connections(), bench.server.requests()), (4, 4, 500));
    // If the server does not respond, most lookups fail before their own timeout.
    let bench = Arc::new(Bench::new(HttpServer::start(|_| Reply::hang()), Duration::from_secs(2), |settings| {
        settings.connections = 4;
    }));
    let begun = Instant::now();
    let asking: Vec<_> = (0..100)
        .map(|_| {
            let bench = Arc::clone(&bench);
            tokio::spawn(async move { (bench.ask_user().await, begun.elapsed()) })
        })
        .collect();
    let mut kinds = HashMap::<_, u32>::new();
    for task in asking {
        let (answer, took) = task.await.unwrap();
        let kind = answer.unwrap_err();
        *kinds.entry(kind).or_default() += 1;
        assert!(kind == "timeout" || took < Duration::from_millis(1_900), "{kind} after {took:?}");
    }
    assert_eq!(kinds, HashMap::from([("timeout", 4), ("overloaded", 96)]));
    assert_eq!(bench.server.most_under_way(), 4);
}

// ---- The circuit breaker ----

#[tokio::test]
async fn the_breaker() {
    let pause = Duration::from_millis(400);
    let bench = Bench::new(HttpServer::start(|_| Reply::status(503)), AMPLE, |settings| {
        settings.breaker_failures = 3;
        settings.breaker_pause = pause;
    });
    for _ in 0..3 {
        assert!(!bench.breaker_open());
        assert_eq!(bench.ask_user().await, Err("unavailable"));
    }
    assert!(bench.breaker_open());
    let opened = Instant::now();
    let mut refused = 0;
    // The server has recovered, but it is not asked before the pause is over.
    bench.server.script(|_| anna());
    loop {
        match bench.ask_user().await {
            Err("circuit_open") => refused += 1,
            other => break assert_eq!(other, valid()),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(refused > 0 && opened.elapsed() >= pause - Duration::from_millis(50), "{:?}", opened.elapsed());
    assert_eq!((bench.server.requests(), bench.breaker_open()), (4, false));
    assert_eq!(bench.ask_user().await, valid());
}

#[tokio::test]
async fn one_request_tries_when_the_pause_is_over() {
    let pause = Duration::from_millis(100);
    let bench = Arc::new(Bench::new(HttpServer::start(|_| Reply::status(500)), AMPLE, |settings| {
        settings.breaker_failures = 1;
        settings.breaker_pause = pause;
    }));
    assert_eq!(bench.ask_user().await, Err("unavailable"));
    bench.server.freeze();
    bench.server.script(|_| anna());
    tokio::time::sleep(2 * pause).await;
    let trial = tokio::spawn({
        let bench = Arc::clone(&bench);
        async move { bench.ask_user().await }
    });
    eventually_async(|| bench.server.requests() == 2).await;
    for _ in 0..50 {
        assert_eq!(bench.ask_user().await, Err("circuit_open"));
    }
    assert_eq!(bench.server.requests(), 2);
    // If the probe is cancelled, the next lookup probes.
    trial.abort();
    assert!(trial.await.is_err() && bench.breaker_open());
    bench.server.thaw();
    assert_eq!(bench.ask_user().await, valid());
    assert!(!bench.breaker_open());
}

#[tokio::test]
async fn what_the_breaker_counts() {
    let failing = |reply: Reply| {
        let server = HttpServer::start(move |_| reply.clone());
        Bench::new(server, Duration::from_millis(400), |settings| settings.breaker_failures = 2)
    };
    let cut = || anna().cut(anna().bytes().len() - 1, Step::Close);
    for (reply, opens) in [
        (Reply::status(500), true),
        (Reply::status(429), true),
        (Reply::hang(), true),
        (Reply(vec![Step::Close]), true),
        (cut(), true),
        (anna(), false),
        (Reply::status(401), false),
        (Reply::status(403), false),
        (Reply::new(403, &[("Content-Type", "text/html")], "<html>"), false),
        (Reply::new(403, &[("Retry-After", "1")], ""), true),
        // The endpoint responds, and a pause would not help.
        (Reply::status(404), false),
        (Reply::status(302), false),
        (Reply::json("[]"), false),
        (Reply::new(200, &[("Content-Type", "text/html")], "<html>"), false),
    ] {
        let what = format!("{reply:?}");
        let bench = failing(reply);
        for _ in 0..3 {
            drop(bench.ask(TOKEN).await);
        }
        assert_eq!(
            (bench.breaker_open(), bench.server.requests()),
            if opens { (true, 2) } else { (false, 3) },
            "{what}"
        );
    }
    // The caller's timeout ends first: this counts as a failure.
    let bench = failing(Reply::hang());
    for _ in 0..2 {
        drop(tokio::time::timeout(Duration::from_millis(390), bench.ask(TOKEN)).await);
    }
    assert!(bench.breaker_open());
    // Cancelled long before: does not count.
    let bench = failing(Reply::hang());
    for _ in 0..10 {
        drop(tokio::time::timeout(Duration::from_millis(5), bench.ask(TOKEN)).await);
    }
    assert!(!bench.breaker_open());
}

// ---- Other ways to the server ----

#[tokio::test]
async fn a_unix_socket() {
    let folder = Folder::new("http");
    let mut bench = Bench::new(HttpServer::start_unix(&folder.file("a.sock"), |_| anna()), AMPLE, |_| {});
    for _ in 0..3 {
        assert_eq!(bench.ask_user().await, valid());
    }
    let asked = bench.server.last();
    assert_eq!((asked.target.as_str(), asked.header("host").as_str()), ("/api/v3/user?a=b", "localhost"));
    assert_eq!(bench.server.connections(), 1);
    bench.server.stop();
    assert_eq!(bench.ask_user().await, Err("unavailable"));
    bench.server.start_again();
    assert_eq!(bench.ask_user().await, valid());
}

#[tokio::test]
async fn tls() {
    let [known, other] = [(); 2].map(|()| Authority::new());
    // `otherwise`: at an address that is not in the certificate.
    let ask = async |mode, ca: Option<&Authority>, otherwise: bool| {
        let bench = Bench::new(
            HttpServer::start_tls(&known, [127, 0, 0, if otherwise { 2 } else { 1 }].into(), |_| anna()),
            AMPLE,
            |settings| {
                settings.tls = TlsSettings { mode, ca: ca.map(|ca| ca.ca().into()), client: None };
            },
        );
        let answer = bench.ask(TOKEN).await.map(|record| record.unwrap().user);
        (answer, bench.server.requests())
    };
    use TlsMode::{Require, VerifyCa, VerifyFull};
    assert_eq!(ask(VerifyFull, Some(&known), false).await, (Ok("anna".into()), 1));
    assert_eq!(ask(VerifyCa, Some(&known), false).await.1, 1);
    assert_eq!(ask(Require, None, false).await.1, 1);
    assert_eq!(ask(VerifyCa, Some(&known), true).await, (Ok("anna".into()), 1));
    for (mode, ca, otherwise) in [(VerifyFull, &other, false), (VerifyCa, &other, false), (VerifyFull, &known, true)] {
        let (answer, requests) = ask(mode, Some(ca), otherwise).await;
        let error = answer.unwrap_err();
        assert!(matches!(&error, StoreError::Unavailable(why) if why.contains("certificate")), "{error}");
        assert_eq!(requests, 0, "the token is not sent");
    }
    // Nothing is sent in plain text to a server without TLS.
    let bench = Bench::new(HttpServer::start(|_| anna()), Duration::from_secs(5), |settings| {
        settings.url = settings.url.replace("http:", "https:");
        settings.tls.ca = Some(known.ca().into());
    });
    assert!(bench.ask(TOKEN).await.is_err());
    assert_eq!(bench.server.requests(), 0);
}

// ---- A real backend ----

/// The Grape application under Puma.
fn puma() -> (Process, u16) {
    let port = free_port();
    let process = Process::start(
        Command::new("puma")
            .args(["-b", &format!("tcp://127.0.0.1:{port}"), "-t", "4:8", "-w", "0", "--quiet", "-e", "production"])
            .arg(repository("tests/backend/gitlab.ru"))
            .env("BACKEND_TOKENS", "good-token-0001=anna,=odd=bert")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null()),
    );
    eventually("puma listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
    (process, port)
}

#[tokio::test]
async fn a_real_backend() {
    let (mut puma, port) = puma();
    let metrics = Arc::new(Metrics::new("test").unwrap().store("asked"));
    let settings = settings(format!("http://127.0.0.1:{port}/api/v3/user"), false);
    let store = IntrospectStore::new(settings, AMPLE, metrics).unwrap();
    let ask = async |token: &str| {
        let answer = store.lookup(&Credential::new(token.as_bytes(), Digest::of(token.as_bytes()))).await;
        answer.map(|record| record.map(|record| record.user)).map_err(|error| error.kind())
    };
    for _ in 0..3 {
        assert_eq!(ask("good-token-0001").await, valid());
        assert_eq!(ask("=odd").await, Ok(Some("bert".into())));
        for token in ["good-token-0002", "good-token-000", "'", "%00", "a,b", "\"", "\\"] {
            assert_eq!(ask(token).await, Ok(None), "{token}");
        }
    }
    puma.kill();
    assert_eq!(ask("good-token-0001").await, Err("unavailable"));
}

/// nginx in front of the endpoint, with its own responses for rate limits and forbidden clients.
#[tokio::test]
async fn a_real_limiter_in_front_of_a_real_backend() {
    let (_puma, backend) = puma();
    let (folder, port) = (Folder::new("nginx"), free_port());
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|kind| format!("{kind}_temp_path {};", folder.file(kind).display()))
        .collect();
    let limited = |name: &str, status: u16| {
        format!(
            "location /{name} {{ limit_req zone=z{status}; limit_req_status {status}; \
             proxy_pass http://127.0.0.1:{backend}/api/v3/user; }}"
        )
    };
    let config = format!(
        "daemon off; master_process off; pid {pid}; error_log stderr crit; events {{}} http {{ access_log off; {temporary} \
         limit_req_zone $binary_remote_addr zone=z403:1m rate=1r/m; \
         limit_req_zone $binary_remote_addr zone=z429:1m rate=1r/m; \
         server {{ listen 127.0.0.1:{port}; location /open {{ proxy_pass http://127.0.0.1:{backend}/api/v3/user; }} \
         location /denied {{ deny all; }} {} {} }} }}",
        limited("forbids", 403),
        limited("limits", 429),
        pid = folder.file("pid").display(),
    );
    let path = folder.write("nginx.conf", &config);
    let _nginx = Process::start(Command::new("nginx").arg("-c").arg(&path).args(["-e", "stderr"]).stdin(Stdio::null()));
    eventually("nginx listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
    let ask = async |place: &str, token: &str| {
        let metrics = Arc::new(Metrics::new("test").unwrap().store("asked"));
        let settings = settings(format!("http://127.0.0.1:{port}/{place}"), false);
        let store = IntrospectStore::new(settings, AMPLE, metrics).unwrap();
        let answer = store.lookup(&Credential::new(token.as_bytes(), Digest::of(token.as_bytes()))).await;
        answer.map(|record| record.map(|record| record.user)).map_err(|error| error.kind())
    };
    for _ in 0..3 {
        assert_eq!(ask("open", "good-token-0001").await, valid());
        assert_eq!(ask("open", "bad-token").await, Ok(None));
    }
    assert_eq!(ask("denied", "good-token-0001").await, Err("garbage"));
    for (place, kind) in [("forbids", "garbage"), ("limits", "unavailable")] {
        assert_eq!(ask(place, "good-token-0001").await, valid(), "{place}");
        for token in ["good-token-0001", "bad-token"] {
            assert_eq!(ask(place, token).await, Err(kind), "{place}: {token}");
        }
    }
}

/// Figures, not a test: `cargo test --release --lib introspect::figures -- --ignored --nocapture`.
#[tokio::test]
#[ignore = "prints figures"]
async fn figures() {
    let measure = async |what: &str, url: String, token: &str, rounds: usize| {
        let metrics = Arc::new(Metrics::new("test").unwrap().store("asked"));
        let store = Arc::new(IntrospectStore::new(settings(url, false), AMPLE, metrics).unwrap());
        let token: Arc<str> = token.into();
        for tasks in [1, 8] {
            let begun = Instant::now();
            let asking: Vec<_> = (0..tasks)
                .map(|_| {
                    let (store, token) = (Arc::clone(&store), Arc::clone(&token));
                    tokio::spawn(async move {
                        let mut times = Vec::new();
                        for _ in 0..rounds {
                            let begun = Instant::now();
                            let credential = Credential::new(token.as_bytes(), Digest::of(token.as_bytes()));
                            assert!(store.lookup(&credential).await.unwrap().is_some());
                            times.push(begun.elapsed());
                        }
                        times
                    })
                })
                .collect();
            let mut times = Vec::new();
            for task in asking {
                times.extend(task.await.unwrap());
            }
            times.sort();
            let count = times.len();
            let rate = count as f64 / begun.elapsed().as_secs_f64();
            let line = format!(
                "{what}, {tasks} at once: p50 {:?} p99 {:?} max {:?}, {rate:.0}/s",
                times[count / 2],
                times[count * 99 / 100],
                times[count - 1]
            );
            eprintln!("{line}");
        }
    };
    let server = HttpServer::start(|_| anna());
    measure("scripted", server.url("/"), TOKEN, 5_000).await;
    let folder = Folder::new("figures");
    let server = HttpServer::start_unix(&folder.file("s"), |_| anna());
    measure("scripted, unix", server.url("/"), TOKEN, 5_000).await;
    let (_puma, port) = puma();
    measure("puma", format!("http://127.0.0.1:{port}/api/v3/user"), "good-token-0001", 500).await;
}
