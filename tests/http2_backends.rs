//! HTTP/2 to backends: what they are asked, how many requests share a connection, that nothing cut passes as whole, and that a
//! backend which does not speak it is not used.

use crate::harness::*;
use crate::servers::tls::Authority;
use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::{HeaderMap, Request, Response};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};
use tokio::sync::Semaphore;

const TARGET: &str = "/api/v3/projects";

/// One request as the backend got it.
#[derive(Clone, Debug)]
struct Asked {
    /// Counts connections, from 1.
    connection: usize,
    method: String,
    uri: String,
    headers: HeaderMap,
    body: Vec<u8>,
}

#[derive(Default)]
struct State {
    connections: AtomicUsize,
    open: AtomicUsize,
    asked: Mutex<Vec<Asked>>,
    /// Streams that ended before their response did.
    cancelled: AtomicUsize,
    /// A request for `/hold` takes one.
    passes: Passes,
    /// Requests for `/refused` were refused once.
    refused: AtomicBool,
    greetings: Mutex<Vec<Vec<u8>>>,
    /// Ends all connections without a word.
    kill: tokio::sync::Notify,
}

struct Passes(Semaphore);

impl Default for Passes {
    fn default() -> Self {
        Self(Semaphore::new(0))
    }
}

#[derive(Clone, Default)]
struct Options {
    tls: Option<Arc<rustls::ServerConfig>>,
    most_streams: Option<u32>,
    expects_proxy: bool,
    /// A connection ends, in an orderly way, behind so many requests.
    requests: Option<usize>,
}

struct Backend {
    address: SocketAddr,
    state: Arc<State>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

impl Backend {
    fn start(options: Options) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let state: Arc<State> = Arc::default();
        let listener = runtime.block_on(tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::clone(&state);
        runtime.spawn(async move {
            loop {
                let (mut socket, _) = listener.accept().await.unwrap();
                let (options, state) = (options.clone(), Arc::clone(&shared));
                tokio::spawn(async move {
                    if options.expects_proxy {
                        let mut header = [0; 28];
                        if socket.read_exact(&mut header[..16]).await.is_err() {
                            return;
                        }
                        let length = usize::from(header[15]);
                        socket.read_exact(&mut header[16..16 + length]).await.unwrap();
                        state.greetings.lock().unwrap().push(header[..16 + length].to_vec());
                    }
                    match &options.tls {
                        None => serve(socket, &options, &state).await,
                        Some(config) => {
                            let acceptor = tokio_rustls::TlsAcceptor::from(Arc::clone(config));
                            if let Ok(socket) = acceptor.accept(socket).await {
                                serve(socket, &options, &state).await;
                            }
                        }
                    }
                });
            }
        });
        Self { address, state, runtime: Some(runtime) }
    }

    fn plain() -> Self {
        Self::start(Options::default())
    }

    fn section(&self, more: &str) -> String {
        format!(
            "[[upstream]]\nname = \"api\"\nservers = [\"localhost:{}\"]\nhttp = 2\nread_timeout = \"9s\"\n{more}\n",
            self.address.port()
        )
    }

    fn gateway(&self) -> Gateway {
        Gateway::start(self.address, &self.section(""))
    }

    fn asked(&self) -> Vec<Asked> {
        self.state.asked.lock().unwrap().clone()
    }

    fn connections(&self) -> usize {
        self.state.connections.load(SeqCst)
    }

    fn let_go(&self, requests: usize) {
        self.state.passes.0.add_permits(requests);
    }
}

async fn serve(socket: impl AsyncRead + AsyncWrite + Unpin, options: &Options, state: &Arc<State>) {
    let mut builder = h2::server::Builder::new();
    if let Some(most) = options.most_streams {
        builder.max_concurrent_streams(most);
    }
    let Ok(mut connection) = builder.handshake::<_, Bytes>(socket).await else { return };
    let number = state.connections.fetch_add(1, SeqCst) + 1;
    state.open.fetch_add(1, SeqCst);
    let mut requests = 0;
    loop {
        let accepted = tokio::select! {
            accepted = connection.accept() => accepted,
            () = state.kill.notified() => None,
        };
        let Some(Ok((request, respond))) = accepted else { break };
        requests += 1;
        if options.requests == Some(requests) {
            connection.graceful_shutdown();
        }
        tokio::spawn(respond_to(request, respond, number, Arc::clone(state)));
    }
    state.open.fetch_sub(1, SeqCst);
}

async fn read(mut body: RecvStream) -> Option<Vec<u8>> {
    let mut all = Vec::new();
    while let Some(data) = body.data().await {
        let data = data.ok()?;
        all.extend_from_slice(&data);
        body.flow_control().release_capacity(data.len()).unwrap();
    }
    Some(all)
}

async fn respond_to(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    connection: usize,
    state: Arc<State>,
) -> Option<()> {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path().to_owned();
    if path.ends_with("/refused") && !state.refused.swap(true, SeqCst) {
        respond.send_reset(Reason::REFUSED_STREAM);
        return None;
    }
    if path.ends_with("/reset") {
        respond.send_reset(Reason::INTERNAL_ERROR);
        return None;
    }
    let body = read(body).await?;
    state.asked.lock().unwrap().push(Asked {
        connection,
        method: parts.method.to_string(),
        uri: parts.uri.to_string(),
        headers: parts.headers,
        body: body.clone(),
    });
    let ok = || Response::builder().status(200);
    let empty = |response: http::response::Builder| response.body(()).unwrap();
    match path.rsplit('/').next().unwrap() {
        "echo" => {
            let length = body.len();
            let mut stream = respond.send_response(empty(ok().header("content-length", length)), false).ok()?;
            send(&mut stream, &body, true, &state).await?;
        }
        "stream" => {
            let mut stream = respond.send_response(empty(ok().header("x-a", "1").header("x-a", "2")), false).ok()?;
            for piece in [&b"one"[..], b"two", b"three"] {
                send(&mut stream, piece, false, &state).await?;
            }
            let mut trailers = HeaderMap::new();
            trailers.insert("x-trailer", "dropped".parse().unwrap());
            stream.send_trailers(trailers).ok()?;
        }
        "large" => {
            let mut stream = respond.send_response(empty(ok()), false).ok()?;
            // More than the buffers of two sockets hold.
            for _ in 0..320 {
                send(&mut stream, &[b'x'; 64 * 1024], false, &state).await?;
            }
        }
        "empty" => drop(respond.send_response(empty(ok()), true).ok()?),
        "nothing" => drop(respond.send_response(empty(Response::builder().status(204)), true).ok()?),
        "hints" => {
            let hints = Response::builder().status(103).header("link", "</a>; rel=preload");
            respond.send_informational(empty(hints)).ok()?;
            drop(respond.send_response(empty(ok()), true).ok()?);
        }
        "switch" => drop(respond.send_response(empty(Response::builder().status(101)), true)),
        cut @ ("cut" | "cut-stream") => {
            let response = if cut == "cut" { ok().header("content-length", 100) } else { ok() };
            let mut stream = respond.send_response(empty(response), false).ok()?;
            send(&mut stream, b"a part", false, &state).await?;
            // What was sent goes out first.
            tokio::time::sleep(Duration::from_millis(100)).await;
            stream.send_reset(Reason::INTERNAL_ERROR);
        }
        "hold" => {
            let gone = std::future::poll_fn(|cx| respond.poll_reset(cx));
            tokio::select! {
                pass = state.passes.0.acquire() => pass.unwrap().forget(),
                _ = gone => {
                    state.cancelled.fetch_add(1, SeqCst);
                    return None;
                }
            }
            drop(respond.send_response(empty(ok()), true).ok()?);
        }
        _ => {
            let mut stream = respond.send_response(empty(ok().header("content-length", 2)), false).ok()?;
            send(&mut stream, b"ok", true, &state).await?;
        }
    }
    Some(())
}

async fn send(stream: &mut h2::SendStream<Bytes>, data: &[u8], last: bool, state: &State) -> Option<()> {
    let mut rest = data;
    while !rest.is_empty() {
        stream.reserve_capacity(rest.len());
        let room = match std::future::poll_fn(|cx| stream.poll_capacity(cx)).await {
            Some(Ok(room)) => room.min(rest.len()),
            _ => {
                state.cancelled.fetch_add(1, SeqCst);
                return None;
            }
        };
        stream.send_data(Bytes::copy_from_slice(&rest[..room]), last && room == rest.len()).ok()?;
        rest = &rest[room..];
    }
    Some(())
}

fn tls(authority: &Authority, alpn: &[&str]) -> Arc<rustls::ServerConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let chain = vec![CertificateDer::from_pem_file(authority.certificate()).unwrap()];
    let key = PrivateKeyDer::from_pem_file(authority.key()).unwrap();
    let mut config = builder.with_no_client_auth().with_single_cert(chain, key).unwrap();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    Arc::new(config)
}

fn secured(authority: &Authority) -> String {
    format!("tls = true\ntls_ca = \"{}\"\n", authority.ca().display())
}

fn request(method: &str, target: &str, more: &str) -> String {
    format!("{method} {target} HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: {GOOD}\n{more}\n")
}

fn errors(gateway: &Gateway, kind: &str) -> f64 {
    gateway.metric(&format!("tollgate_upstream_errors_total{{kind=\"{kind}\",upstream=\"api\"}}"))
}

/// Clients that each wait for a response to `/hold`.
fn hold(gateway: &Gateway, count: usize) -> Vec<Client> {
    let ask = |_| {
        let mut client = gateway.client();
        client.send_head(&request("GET", "/api/v3/hold", ""));
        client
    };
    (0..count).map(ask).collect()
}

#[test]
fn requests_share_a_connection_and_are_asked_word_for_word() {
    let backend = Backend::plain();
    let gateway = backend.gateway();
    for _ in 0..5 {
        let answer = gateway.get("/api/v3/projects?a=%20b&c[]=1");
        assert_eq!((answer.status, answer.text().as_str(), answer.header("Content-Length")), (200, "ok", Some("2")));
    }
    let mut held = hold(&gateway, 30);
    eventually("all are there at once", || backend.asked().len() == 35);
    backend.let_go(30);
    assert!(held.iter_mut().all(|client| client.answer().status == 200));
    assert_eq!(backend.connections(), 1);
    let asked = &backend.asked()[0];
    assert_eq!((asked.method.as_str(), asked.uri.as_str()), ("GET", "http://h.test/api/v3/projects?a=%20b&c[]=1"));
    assert!(asked.headers["private-token"] == GOOD && asked.headers["x-forwarded-proto"] == "http");
    for name in ["host", "connection", "transfer-encoding", "upgrade"] {
        assert!(!asked.headers.contains_key(name), "{name}");
    }
    assert_eq!(gateway.metric("tollgate_upstream_connects_total{connection=\"new\",upstream=\"api\"}"), 1.0);
    assert_eq!(gateway.metric("tollgate_upstream_connects_total{connection=\"reused\",upstream=\"api\"}"), 34.0);
}

#[test]
fn it_is_negotiated_over_tls() {
    let authority = Authority::new();
    let backend = Backend::start(Options { tls: Some(tls(&authority, &["h2", "http/1.1"])), ..Options::default() });
    let gateway = Gateway::start(backend.address, &backend.section(&secured(&authority)));
    assert_eq!((gateway.get(TARGET).status, gateway.get(TARGET).status), (200, 200));
    assert_eq!((backend.connections(), backend.asked()[0].uri.as_str()), (1, "https://h.test/api/v3/projects"));
    assert_eq!(backend.asked()[0].headers["x-forwarded-proto"], "http", "what the client spoke");
    // Another trust is another connection.
    let other = Authority::new();
    let both = [std::fs::read(authority.ca()).unwrap(), std::fs::read(other.ca()).unwrap()].concat();
    std::fs::write(authority.ca(), both).unwrap();
    assert_eq!(gateway.admin_post("/reload").status, 200);
    assert_eq!((gateway.get(TARGET).status, backend.connections()), (200, 2));
}

#[test]
fn bodies_pass_both_ways() {
    let backend = Backend::plain();
    let gateway = Gateway::start(backend.address, &(backend.section("") + "[limits]\nbody_bytes = \"64MiB\"\n"));
    let body: Vec<u8> = (0..5 * 1024 * 1024_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut chunks = Vec::new();
    for piece in body.chunks(100_000) {
        chunks.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
        chunks.extend_from_slice(piece);
        chunks.extend_from_slice(b"\r\n");
    }
    chunks.extend_from_slice(b"0\r\n\r\n");
    let sized = format!("Content-Length: {}\n", body.len());
    for (framing, sent) in [(sized.as_str(), &body), ("Transfer-Encoding: chunked\n", &chunks)] {
        let mut client = gateway.client();
        client.send_head(&request(
            "PUT",
            "/api/v3/echo",
            &format!("Content-Type: application/octet-stream\n{framing}"),
        ));
        let (mut writer, sent) = (client.socket.try_clone().unwrap(), sent.clone());
        let sender = std::thread::spawn(move || writer.write_all(&sent).unwrap());
        let answer = client.answer();
        sender.join().unwrap();
        assert_eq!((answer.status, answer.cut), (200, false), "{framing}");
        assert!(answer.body == body, "{framing}");
    }
    assert!(backend.asked().iter().all(|asked| asked.body == body));
    assert_eq!(backend.connections(), 1);
    // And a small one with its head.
    let answer =
        gateway.ask(&(request("POST", "/api/v3/echo", "Content-Type: text/plain\nContent-Length: 2\n") + "hi"));
    assert_eq!(answer.text(), "hi");
}

#[test]
fn responses_have_the_framing_that_they_need() {
    let backend = Backend::plain();
    let gateway = backend.gateway();
    let mut client = gateway.client();
    let mut ask = |method: &str, path: &str| {
        client.send_head(&request(method, &format!("/api/v3/{path}"), ""));
        client.answer_to(method).unwrap()
    };
    let stream = ask("GET", "stream");
    assert_eq!((stream.text().as_str(), stream.header("Transfer-Encoding")), ("onetwothree", Some("chunked")));
    let fields: Vec<_> = stream.headers.iter().filter(|(name, _)| name == "x-a").map(|(_, value)| value).collect();
    assert_eq!(fields, ["1", "2"]);
    assert!(stream.header("x-trailer").is_none());
    let empty = ask("GET", "empty");
    assert_eq!((empty.status, empty.header("Content-Length"), empty.body.len()), (200, Some("0"), 0));
    let nothing = ask("GET", "nothing");
    assert_eq!(
        (nothing.status, nothing.header("Content-Length"), nothing.header("Transfer-Encoding")),
        (204, None, None)
    );
    let head = ask("HEAD", "echo");
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert_eq!((ask("GET", "empty").status, ask("OPTIONS", "stream").text().as_str()), (200, "onetwothree"));
    assert_eq!(backend.connections(), 1);
    // An interim response goes before the final one.
    let mut client = gateway.client();
    client.send_head(&request("GET", "/api/v3/hints", ""));
    let hints = client.any_answer("GET").unwrap();
    assert_eq!((hints.status, hints.header("link")), (103, Some("</a>; rel=preload")));
    assert_eq!(client.any_answer("GET").unwrap().status, 200);
    assert_eq!(gateway.get("/api/v3/switch").status, 502);
}

#[test]
fn what_was_cut_is_not_whole() {
    let backend = Backend::plain();
    let gateway = backend.gateway();
    for path in ["/api/v3/cut", "/api/v3/cut-stream"] {
        let answer = gateway.get(path);
        assert_eq!((answer.status, answer.cut, answer.text().as_str()), (200, true, "a part"), "{path}");
    }
    // Others are not disturbed: it was a stream that failed, and no connection.
    assert_eq!((gateway.get(TARGET).status, backend.connections()), (200, 1));
    assert_eq!(gateway.get("/api/v3/reset").status, 502);
    assert_eq!((gateway.get(TARGET).status, backend.connections()), (200, 1));
}

#[test]
fn a_connection_has_as_many_requests_as_its_backend_lets_it() {
    for (most, connections) in [(Some(4), 3), (Some(1), 10), (None, 1)] {
        let backend = Backend::start(Options { most_streams: most, ..Options::default() });
        let gateway = backend.gateway();
        let mut held = hold(&gateway, 10);
        eventually("all are with the backend", || backend.asked().len() == 10);
        assert_eq!(backend.connections(), connections, "{most:?}");
        let mut shares: BTreeMap<usize, u32> = BTreeMap::new();
        backend.asked().iter().for_each(|asked| *shares.entry(asked.connection).or_default() += 1);
        assert!(shares.values().all(|share| *share <= most.unwrap_or(100)), "{shares:?}");
        backend.let_go(10);
        assert!(held.iter_mut().all(|client| client.answer().status == 200));
    }
    let backend = Backend::plain();
    let gateway = backend.gateway();
    let _held = hold(&gateway, 150);
    eventually("all are with the backend", || backend.asked().len() == 150);
    assert_eq!(backend.connections(), 2, "100 on a connection at most");
}

/// What the backend says that it has not begun can be sent again, whatever it is.
#[test]
fn a_request_that_was_not_looked_at_is_sent_again() {
    let backend = Backend::plain();
    let gateway = backend.gateway();
    assert_eq!(gateway.get(TARGET).status, 200);
    let post = request("POST", "/api/v3/refused", "Content-Type: text/plain\nContent-Length: 2\n") + "hi";
    assert_eq!(gateway.ask(&post).status, 200);
    assert_eq!((backend.asked().len(), backend.asked()[1].body.as_slice()), (2, &b"hi"[..]));
    // What it may have begun is not.
    let post = request("POST", "/api/v3/reset", "Content-Length: 0\n");
    assert_eq!(gateway.ask(&post).status, 502);
}

#[test]
fn a_backend_may_end_its_connections_in_the_midst_of_requests() {
    let backend = Backend::start(Options { requests: Some(7), ..Options::default() });
    let gateway = backend.gateway();
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let address = gateway.address;
            std::thread::spawn(move || {
                let mut client = Client::connect(address);
                for _ in 0..100 {
                    client.send_head(&request("POST", TARGET, "Content-Length: 0\n"));
                    assert_eq!(client.answer().status, 200);
                }
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().unwrap());
    assert_eq!(backend.asked().len(), 400);
    assert!(backend.connections() >= 30, "{}", backend.connections());
}

/// What was on it and may be repeated shares the next one.
#[test]
fn a_connection_that_is_lost_with_many_requests_is_replaced_by_one() {
    let backend = Backend::plain();
    let gateway = backend.gateway();
    assert_eq!(gateway.get(TARGET).status, 200);
    let mut held = hold(&gateway, 50);
    eventually("all are with the backend", || backend.asked().len() == 51);
    backend.state.kill.notify_waiters();
    eventually("all are there again", || backend.asked().len() == 101);
    assert_eq!(backend.connections(), 2);
    backend.let_go(50);
    assert!(held.iter_mut().all(|client| client.answer().status == 200));
}

#[test]
fn a_backend_that_does_not_speak_it_is_down() {
    let authority = Authority::new();
    let http1 = Upstream::start();
    let no_overlap = Backend::start(Options { tls: Some(tls(&authority, &["http/1.1"])), ..Options::default() });
    let no_alpn = Backend::start(Options { tls: Some(tls(&authority, &[])), ..Options::default() });
    let answers_http1 = crate::servers::http::HttpServer::start_raw(|mut socket| {
        drop(std::io::Read::read(&mut socket, &mut [0; 24]));
        drop(socket.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"));
    });
    for (what, address, more) in [
        ("other protocols", no_overlap.address, secured(&authority)),
        ("no negotiation", no_alpn.address, secured(&authority)),
        ("HTTP/1", answers_http1.address(), String::new()),
    ] {
        for check in ["", "check = \"tcp\"\n"] {
            let section = format!(
                "[[upstream]]\nname = \"api\"\nservers = [\"localhost:{}\"]\nhttp = 2\n{more}{check}",
                address.port()
            );
            let gateway = Gateway::start(address, &section);
            let reason = if check.is_empty() { "no_http2" } else { "check_no_http2" };
            let is_down = || gateway.process_log().contains(&format!("is down: {reason}"));
            if !check.is_empty() {
                eventually(what, is_down);
            }
            assert_eq!(gateway.get(TARGET).status, 502, "{what}");
            // The log is written by a thread of its own.
            eventually(what, is_down);
            assert_eq!(errors(&gateway, "no_http2"), 1.0, "{what}: {}", gateway.process_log());
            assert!(gateway.admin_get("/upstreams").unwrap().text().contains(reason));
        }
    }
    assert!(no_alpn.asked().is_empty() && no_overlap.asked().is_empty() && http1.seen().is_empty());
}

#[test]
fn checks_ask_in_http2() {
    let backend = Backend::plain();
    let more = "check = \"http\"\ncheck_path = \"/health\"\ncheck_body = \"ok\"\ncheck_interval = \"100ms\"\n";
    let gateway = Gateway::start(backend.address, &backend.section(more));
    eventually("it is checked", || backend.asked().iter().filter(|asked| asked.uri.ends_with("/health")).count() > 2);
    assert_eq!((gateway.get(TARGET).status, gateway.process_log().contains("is down")), (200, false));
    assert!(
        backend
            .asked()
            .iter()
            .all(|asked| asked.uri.ends_with("/health") != asked.headers.contains_key("private-token"))
    );
    eventually("a check leaves no connection behind", || backend.state.open.load(SeqCst) <= 2);
}

/// A client that goes away ends its stream, and not what others have on that connection.
#[test]
fn a_client_that_goes_ends_its_stream_only() {
    let backend = Backend::plain();
    let gateway = backend.gateway();
    let mut held = hold(&gateway, 3);
    eventually("all are with the backend", || backend.asked().len() == 3);
    drop(held.pop());
    eventually("its stream ends", || backend.state.cancelled.load(SeqCst) == 1);
    backend.let_go(2);
    assert!(held.iter_mut().all(|client| client.answer().status == 200));
    assert_eq!(backend.connections(), 1);
}

/// Responses that nobody takes fill their own window, and no other one's.
#[test]
fn clients_that_do_not_read_hold_up_nobody() {
    let backend = Backend::plain();
    let gateway = backend.gateway();
    let slow: Vec<_> = (0..90)
        .map(|_| {
            let mut client = gateway.client();
            client.send_head(&request("GET", "/api/v3/large", ""));
            client
        })
        .collect();
    eventually("all have begun", || backend.asked().len() == 90);
    let before = gateway.memory();
    for _ in 0..5 {
        assert_eq!(gateway.get(TARGET).text(), "ok");
    }
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(gateway.get(TARGET).text(), "ok");
    assert_eq!(backend.connections(), 1);
    let grown = gateway.memory().saturating_sub(before);
    assert!(grown < 32 * 1024 * 1024, "{grown}");
    drop(slow);
    eventually("their streams end", || backend.state.cancelled.load(SeqCst) == 90);
    assert_eq!((gateway.get(TARGET).status, backend.connections()), (200, 1));
}

#[test]
fn an_unused_connection_is_closed_in_time() {
    let backend = Backend::plain();
    let gateway = Gateway::start(backend.address, &backend.section("idle_timeout = \"300ms\"\n"));
    assert_eq!(gateway.get(TARGET).status, 200);
    eventually("it is closed", || backend.state.open.load(SeqCst) == 0);
    assert_eq!((gateway.get(TARGET).status, backend.connections()), (200, 2));
}

/// Upgrades are HTTP/1's. The backend is asked the plain request, and its answer is no tunnel.
#[test]
fn a_websocket_is_not_asked_for() {
    let backend = Backend::plain();
    let gateway = backend.gateway();
    let more = "Connection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Version: 13\nSec-WebSocket-Key: dGhl\n";
    let answer = gateway.ask(&request("GET", TARGET, more));
    assert_eq!((answer.status, answer.text().as_str()), (200, "ok"));
    assert!(!backend.asked()[0].headers.contains_key("upgrade"));
}

#[test]
fn a_connection_that_says_who_its_client_is_has_one_request() {
    let backend = Backend::start(Options { expects_proxy: true, ..Options::default() });
    let gateway = Gateway::start(backend.address, &backend.section("send_proxy = true\n"));
    for _ in 0..3 {
        assert_eq!(gateway.get(TARGET).status, 200);
    }
    assert_eq!(backend.asked().iter().map(|asked| asked.connection).collect::<Vec<_>>(), [1, 2, 3]);
    let greetings = backend.state.greetings.lock().unwrap().clone();
    assert!(greetings.iter().all(|greeting| greeting[12..20] == *b"\x21\x11\0\x0c\x7f\0\0\x01"), "{greetings:?}");
    eventually("each ends with its request", || backend.state.open.load(SeqCst) == 0);
}
