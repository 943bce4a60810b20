//! Spans of exchanges, and their export to a collector by OTLP over HTTP with JSON. Spans wait in a bounded queue for a thread of
//! their own: a collector that is slow or away loses spans, which a metric counts, and never holds up a request. No token
//! gets here, and nothing of a target but the route that it matched.

use super::metrics::{Metrics, SpanResult};
use super::outage::Outage;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{CONTENT_TYPE, HOST, USER_AGENT};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::time::{timeout, timeout_at};

/// Exchanges that wait to be exported.
const QUEUE: usize = 2_048;
/// Exchanges in one request to the collector.
const BATCH: usize = 256;
/// How long spans are gathered for one request.
const GATHERING: Duration = Duration::from_secs(1);
/// For one request to the collector, with its connection.
const EXPORT: Duration = Duration::from_secs(5);
const MAX_ANSWER: usize = 64 * 1024;
const FLUSH_PAUSE: Duration = Duration::from_millis(10);

/// Where spans go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtlpSettings {
    /// `host:port`, spoken to without TLS.
    pub authority: String,
    pub path: String,
    /// How many of a million traces that begin here are recorded.
    pub per_million: u32,
}

/// One exchange of the gate: its own span, and those of what it waited for.
#[derive(Clone, Debug)]
pub struct ExchangeSpans {
    pub trace_id: u128,
    /// The client's span.
    pub parent: Option<u64>,
    pub id: u64,
    pub began_unix_ns: u64,
    pub took: Duration,
    pub method: &'static str,
    pub route: String,
    pub request_id: String,
    pub client: Option<IpAddr>,
    /// 0: the client got none.
    pub status: u16,
    pub reason: &'static str,
    pub upstream: Option<String>,
    pub waits: Vec<WaitSpan>,
}

/// What an exchange waited for.
#[derive(Clone, Debug)]
pub struct WaitSpan {
    pub id: u64,
    /// From the beginning of the exchange.
    pub after: Duration,
    pub took: Duration,
    pub on: WaitedOn,
}

#[derive(Clone, Debug)]
pub enum WaitedOn {
    Store,
    Server {
        name: String,
        status: Option<u16>,
        /// Why there is no answer.
        error: Option<&'static str>,
    },
}

/// Hands spans to the thread that exports them.
#[derive(Clone)]
pub struct SpanExporter(Option<Arc<Export>>);

struct Export {
    queue: mpsc::Sender<QueuedSpans>,
    per_million: u32,
    metrics: Arc<Metrics>,
}

enum QueuedSpans {
    Exchange(Box<ExchangeSpans>),
    /// Sends a message when everything before it was exported or is lost.
    Flush(SyncSender<()>),
}

impl SpanExporter {
    /// Starts the thread that exports; `None`: there is nothing to export.
    pub fn start(to: Option<&OtlpSettings>, metrics: Arc<Metrics>) -> std::io::Result<Self> {
        let Some(to) = to else { return Ok(Self(None)) };
        let (queue, spans) = mpsc::channel(QUEUE);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let collector = Collector {
            to: to.clone(),
            resource: resource(),
            connection: None,
            outage: Outage::default(),
            metrics: Arc::clone(&metrics),
        };
        std::thread::Builder::new().name("otlp".into()).spawn(move || runtime.block_on(collector.run(spans)))?;
        Ok(Self(Some(Arc::new(Export { queue, per_million: to.per_million, metrics }))))
    }

    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Whether a trace that begins here is recorded, by a random number below a million. Without an exporter the backend
    /// decides what it records, as for a request from nobody.
    pub fn samples(&self, random: impl FnOnce() -> u32) -> bool {
        self.0.as_ref().is_none_or(|export| random() < export.per_million)
    }

    /// Never blocks.
    pub fn push(&self, spans: Box<ExchangeSpans>) {
        let Self(Some(export)) = self else { return };
        let count = spans.count();
        if export.queue.try_send(QueuedSpans::Exchange(spans)).is_err() {
            export.metrics.spans(SpanResult::Dropped, count);
        }
    }

    /// Waits until what was pushed so far is exported, but no longer than this.
    pub fn flush(&self, patience: Duration) {
        let Self(Some(export)) = self else { return };
        let deadline = Instant::now() + patience;
        let (done, exported) = sync_channel(1);
        let mut message = QueuedSpans::Flush(done);
        while let Err(TrySendError::Full(back)) = export.queue.try_send(message) {
            if Instant::now() >= deadline {
                break;
            }
            message = back;
            std::thread::sleep(FLUSH_PAUSE);
        }
        if exported.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_err() {
            log::warn!("the last spans were not exported: no response from the collector in time");
        }
    }
}

/// The far end, and the connection to it.
struct Collector {
    to: OtlpSettings,
    /// What is the same in every request.
    resource: Value,
    connection: Option<SendRequest<Full<Bytes>>>,
    outage: Outage,
    metrics: Arc<Metrics>,
}

impl Collector {
    async fn run(mut self, mut queue: mpsc::Receiver<QueuedSpans>) {
        let (mut batch, mut waiting) = (Vec::new(), Vec::new());
        while let Some(first) = queue.recv().await {
            let until = tokio::time::Instant::now() + GATHERING;
            let mut next = Some(first);
            while let Some(message) = next {
                match message {
                    QueuedSpans::Exchange(spans) => batch.push(spans),
                    QueuedSpans::Flush(done) => waiting.push(done),
                }
                if batch.len() >= BATCH || !waiting.is_empty() {
                    break;
                }
                next = timeout_at(until, queue.recv()).await.ok().flatten();
            }
            self.export(&batch).await;
            batch.clear();
            for done in waiting.drain(..) {
                // Fails only if the caller has stopped waiting.
                let _: Result<(), _> = done.send(());
            }
        }
    }

    async fn export(&mut self, batch: &[Box<ExchangeSpans>]) {
        if batch.is_empty() {
            return;
        }
        let count: u64 = batch.iter().map(|spans| spans.count()).sum();
        let body = Bytes::from(request_body(&self.resource, batch).to_string());
        let began = Instant::now();
        let result =
            timeout(EXPORT, self.post(body)).await.unwrap_or_else(|_| Err("it did not respond in time".into()));
        match result {
            Ok(rejected) => {
                let rejected = rejected.min(count);
                self.metrics.spans(SpanResult::Exported, count - rejected);
                self.metrics.spans(SpanResult::Failed, rejected);
                if self.outage.succeeded(began, Instant::now()).is_some() {
                    log::warn!("spans are exported again");
                }
            }
            Err(why) => {
                self.connection = None;
                self.metrics.spans(SpanResult::Failed, count);
                if self.outage.failed(began).is_some() {
                    log::error!("spans cannot be exported to {}: {why}; they are dropped", self.to.authority);
                }
            }
        }
    }

    /// Sends one request. Returns how many spans of it were not taken.
    async fn post(&mut self, body: Bytes) -> Result<u64, String> {
        let mut kept = self.connection.take();
        // One that was closed meanwhile says so before anything is sent.
        if let Some(connection) = &mut kept
            && connection.ready().await.is_err()
        {
            kept = None;
        }
        let mut connection = match kept {
            Some(connection) => connection,
            None => self.connect().await?,
        };
        let response = match connection.try_send_request(self.request(body)?).await {
            Ok(response) => response,
            Err(mut failed) => {
                // Given back unsent.
                let Some(request) = failed.take_message() else { return Err(failed.error().to_string()) };
                connection = self.connect().await?;
                connection.send_request(request).await.map_err(|error| error.to_string())?
            }
        };
        let status = response.status();
        let answer =
            Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(|error| error.to_string())?;
        self.connection = Some(connection);
        if !status.is_success() {
            return Err(format!("it answered with status {}", status.as_u16()));
        }
        Ok(rejected(&answer.to_bytes()))
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, String> {
        let stream = TcpStream::connect(&self.to.authority).await.map_err(|error| error.to_string())?;
        let (connection, driver) = handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
        // Its end is seen by the next request.
        tokio::spawn(async move { drop(driver.await) });
        Ok(connection)
    }

    fn request(&self, body: Bytes) -> Result<Request<Full<Bytes>>, String> {
        let request = Request::builder()
            .method(Method::POST)
            .uri(&self.to.path)
            .header(HOST, &self.to.authority)
            .header(CONTENT_TYPE, "application/json")
            .header(USER_AGENT, concat!("tollgate/", env!("CARGO_PKG_VERSION")))
            .body(Full::new(body));
        request.map_err(|error| error.to_string())
    }
}

/// The spans that a response with status 200 says were not taken.
fn rejected(answer: &[u8]) -> u64 {
    let answer: Value = serde_json::from_slice(answer).unwrap_or_default();
    let count = &answer["partialSuccess"]["rejectedSpans"];
    count.as_u64().or_else(|| count.as_str()?.parse().ok()).unwrap_or(0)
}

impl ExchangeSpans {
    fn count(&self) -> u64 {
        1 + self.waits.len() as u64
    }
}

/// SpanKind and StatusCode of the protocol.
const KIND_SERVER: u8 = 2;
const KIND_CLIENT: u8 = 3;
const STATUS_ERROR: u8 = 2;

fn resource() -> Value {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let attributes = [
        text("service.name", "tollgate"),
        text("service.version", env!("CARGO_PKG_VERSION")),
        text("host.name", name.trim()),
    ];
    json!({ "attributes": attributes })
}

/// An ExportTraceServiceRequest. Integers of 64 bits are strings there.
fn request_body(resource: &Value, batch: &[Box<ExchangeSpans>]) -> Value {
    let spans: Vec<Value> = batch.iter().flat_map(|exchange| spans(exchange)).collect();
    let scope = json!({ "name": "tollgate", "version": env!("CARGO_PKG_VERSION") });
    json!({ "resourceSpans": [{ "resource": resource, "scopeSpans": [{ "scope": scope, "spans": spans }] }] })
}

fn text(key: &str, value: &str) -> Value {
    json!({ "key": key, "value": { "stringValue": value } })
}

fn number(key: &str, value: u64) -> Value {
    json!({ "key": key, "value": { "intValue": value.to_string() } })
}

/// A span without its name, kind and attributes.
fn span(exchange: &ExchangeSpans, id: u64, parent: Option<u64>, after: Duration, took: Duration) -> Value {
    let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let began = exchange.began_unix_ns.saturating_add(nanos(after));
    let mut span = json!({
        "traceId": format!("{:032x}", exchange.trace_id),
        "spanId": format!("{id:016x}"),
        "startTimeUnixNano": began.to_string(),
        "endTimeUnixNano": began.saturating_add(nanos(took)).to_string(),
    });
    if let Some(parent) = parent {
        span["parentSpanId"] = format!("{parent:016x}").into();
    }
    span
}

fn spans(exchange: &ExchangeSpans) -> Vec<Value> {
    let mut gate = span(exchange, exchange.id, exchange.parent, Duration::ZERO, exchange.took);
    gate["name"] = format!("{} {}", exchange.method, exchange.route).into();
    gate["kind"] = KIND_SERVER.into();
    let mut attributes = vec![
        text("http.request.method", exchange.method),
        text("http.route", &exchange.route),
        text("tollgate.request_id", &exchange.request_id),
        text("tollgate.reason", exchange.reason),
    ];
    if exchange.status != 0 {
        attributes.push(number("http.response.status_code", exchange.status.into()));
    }
    attributes.extend(exchange.client.map(|client| text("client.address", &client.to_string())));
    attributes.extend(exchange.upstream.as_ref().map(|upstream| text("tollgate.upstream", upstream)));
    gate["attributes"] = attributes.into();
    // A client's own fault is no error of a server.
    if exchange.status == 0 || exchange.status >= 500 {
        gate["status"] = json!({ "code": STATUS_ERROR, "message": exchange.reason });
    }
    let mut all = vec![gate];
    for wait in &exchange.waits {
        let mut span = span(exchange, wait.id, Some(exchange.id), wait.after, wait.took);
        span["kind"] = KIND_CLIENT.into();
        match &wait.on {
            WaitedOn::Store => span["name"] = "token store".into(),
            WaitedOn::Server { name, status, error } => {
                let upstream = exchange.upstream.as_deref().unwrap_or_default();
                span["name"] = format!("upstream {upstream}").into();
                let mut attributes = vec![text("http.request.method", exchange.method), text("server.address", name)];
                attributes.extend(status.map(|status| number("http.response.status_code", status.into())));
                attributes.extend(error.map(|error| text("error.type", error)));
                span["attributes"] = attributes.into();
                if error.is_some() || status.is_some_and(|status| status >= 400) {
                    span["status"] = json!({ "code": STATUS_ERROR });
                }
            }
        }
        all.push(span);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exchange() -> ExchangeSpans {
        let on = WaitedOn::Server { name: "10.0.0.1:80".into(), status: Some(404), error: None };
        ExchangeSpans {
            trace_id: 0xabc,
            parent: Some(0xdef),
            id: 1,
            began_unix_ns: 1_000_000_000,
            took: Duration::from_nanos(500),
            method: "GET",
            route: "/api/v3/*".into(),
            request_id: "r".into(),
            client: "192.0.2.1".parse().ok(),
            status: 404,
            reason: "ok",
            upstream: Some("api".into()),
            waits: vec![
                WaitSpan { id: 2, after: Duration::ZERO, took: Duration::from_nanos(9), on: WaitedOn::Store },
                WaitSpan { id: 3, after: Duration::from_nanos(10), took: Duration::from_nanos(400), on },
            ],
        }
    }

    #[test]
    fn a_request_to_the_collector_has_the_shape_of_the_protocol() {
        let body = request_body(&resource(), &[Box::new(exchange())]);
        let spans = &body["resourceSpans"][0]["scopeSpans"][0]["spans"];
        assert_eq!(body["resourceSpans"][0]["resource"]["attributes"][0], text("service.name", "tollgate"));
        let expected = json!({
            "traceId": "00000000000000000000000000000abc",
            "spanId": "0000000000000001",
            "startTimeUnixNano": "1000000000",
            "endTimeUnixNano": "1000000500",
            "parentSpanId": "0000000000000def",
            "name": "GET /api/v3/*",
            "kind": 2,
            "attributes": [
                { "key": "http.request.method", "value": { "stringValue": "GET" } },
                { "key": "http.route", "value": { "stringValue": "/api/v3/*" } },
                { "key": "tollgate.request_id", "value": { "stringValue": "r" } },
                { "key": "tollgate.reason", "value": { "stringValue": "ok" } },
                { "key": "http.response.status_code", "value": { "intValue": "404" } },
                { "key": "client.address", "value": { "stringValue": "192.0.2.1" } },
                { "key": "tollgate.upstream", "value": { "stringValue": "api" } },
            ],
        });
        assert_eq!(spans[0], expected);
        assert_eq!(
            (spans[1]["name"].as_str(), spans[1]["parentSpanId"].as_str()),
            (Some("token store"), Some("0000000000000001"))
        );
        assert_eq!(
            (spans[2]["startTimeUnixNano"].as_str(), spans[2]["endTimeUnixNano"].as_str()),
            (Some("1000000010"), Some("1000000410"))
        );
        assert_eq!((&spans[2]["status"]["code"], spans.as_array().unwrap().len()), (&2.into(), 3));
        // Who has no parent has no such field, and a server's failure is an error.
        let failed = request_body(&Value::Null, &[Box::new(ExchangeSpans { parent: None, status: 503, ..exchange() })]);
        let failed = &failed["resourceSpans"][0]["scopeSpans"][0]["spans"][0];
        assert_eq!((failed.get("parentSpanId"), &failed["status"]["code"]), (None, &2.into()));
    }

    #[test]
    fn what_a_collector_did_not_take_is_read_from_its_answer() {
        for (answer, expected) in [
            ("", 0),
            ("{}", 0),
            (r#"{"partialSuccess":{}}"#, 0),
            (r#"{"partialSuccess":{"rejectedSpans":"3","errorMessage":"x"}}"#, 3),
            (r#"{"partialSuccess":{"rejectedSpans":4}}"#, 4),
            ("not JSON", 0),
        ] {
            assert_eq!(rejected(answer.as_bytes()), expected, "{answer}");
        }
    }
}
