//! TLS to backends: who is trusted, why a connection is refused, which connections are used again, and that nothing which was
//! cut passes as whole. And the PROXY protocol, which backends may be told their clients by.

use crate::harness::*;
use crate::servers::http::HttpServer;
use crate::servers::tls::Authority;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{HandshakeKind, RootCertStore, ServerConfig, ServerConnection, StreamOwned, SupportedProtocolVersion};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const TARGET: &str = "/api/v3/projects";
const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
const TLS12: &[&SupportedProtocolVersion] = &[&rustls::version::TLS12];
const TLS13: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];
const BOTH: &[&SupportedProtocolVersion] = &[&rustls::version::TLS12, &rustls::version::TLS13];

type TlsSocket = StreamOwned<ServerConnection, TcpStream>;

/// One request as a backend got it.
#[derive(Clone, Debug)]
struct Received {
    head: String,
    body: Vec<u8>,
    connection: usize,
}

/// What a backend saw of a connection.
#[derive(Clone, Debug, Default)]
struct Opened {
    /// The header of the PROXY protocol.
    proxy: Vec<u8>,
    /// `None`: there was no whole handshake, and `why` says so.
    kind: Option<HandshakeKind>,
    why: String,
    sni: Option<String>,
    alpn: Option<Vec<u8>>,
    client_certificate: bool,
}

#[derive(Default)]
struct State {
    config: Mutex<Option<Arc<ServerConfig>>>,
    opened: Mutex<Vec<Opened>>,
    received: Mutex<Vec<Received>>,
    expects_proxy: bool,
}

/// A backend with TLS, which a test can give another certificate. Blocking, and of other parts than what it tests.
struct Backend {
    address: SocketAddr,
    state: Arc<State>,
    _server: HttpServer,
}

/// Answers a request; false: the connection is over.
type Answering = fn(&Received, &mut TlsSocket) -> bool;

fn answers_ok(_: &Received, socket: &mut TlsSocket) -> bool {
    socket.write_all(OK).is_ok()
}

impl Backend {
    fn start(config: ServerConfig, answering: Answering) -> Self {
        Self::start_with(Some(config), false, answering)
    }

    fn start_with(config: Option<ServerConfig>, expects_proxy: bool, answering: Answering) -> Self {
        let state = State { config: Mutex::new(config.map(Arc::new)), expects_proxy, ..State::default() };
        let state = Arc::new(state);
        let shared = Arc::clone(&state);
        let server = HttpServer::start_raw(move |socket| shared.serve(socket, answering));
        Self { address: server.address(), state, _server: server }
    }

    fn present(&self, config: ServerConfig) {
        *self.state.config.lock().unwrap() = Some(Arc::new(config));
    }

    fn opened(&self) -> Vec<Opened> {
        self.state.opened.lock().unwrap().clone()
    }

    fn received(&self) -> Vec<Received> {
        self.state.received.lock().unwrap().clone()
    }

    /// The upstream's section of a gateway's configuration, by name.
    fn section(&self, more: &str) -> String {
        format!("[[upstream]]\nname = \"api\"\nservers = [\"localhost:{}\"]\ntls = true\n{more}\n", self.address.port())
    }

    fn trusting(&self, authority: &Authority) -> String {
        self.section(&format!("tls_ca = \"{}\"\n", authority.ca().display()))
    }
}

impl State {
    fn serve(&self, mut socket: TcpStream, answering: Answering) {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut opened = Opened::default();
        if self.expects_proxy {
            let mut prefix = [0; 16];
            if socket.read_exact(&mut prefix).is_err() {
                return;
            }
            let mut rest = vec![0; usize::from(u16::from_be_bytes([prefix[14], prefix[15]]))];
            socket.read_exact(&mut rest).unwrap();
            opened.proxy = [&prefix[..], &rest].concat();
        }
        let config = self.config.lock().unwrap().clone();
        let mut session = ServerConnection::new(config.unwrap()).unwrap();
        while session.is_handshaking() {
            // A client that goes away, or that this backend refuses.
            if let Err(error) = session.complete_io(&mut socket) {
                opened.why = error.to_string();
                self.opened.lock().unwrap().push(opened);
                // The alert is read, and not lost in a reset.
                let _ = socket.shutdown(std::net::Shutdown::Write);
                let _ = socket.read_to_end(&mut Vec::new());
                return;
            }
        }
        opened.kind = session.handshake_kind();
        opened.sni = session.server_name().map(str::to_owned);
        opened.alpn = session.alpn_protocol().map(<[u8]>::to_vec);
        opened.client_certificate = session.peer_certificates().is_some();
        let connection = {
            let mut all = self.opened.lock().unwrap();
            all.push(opened);
            all.len()
        };
        let mut socket = StreamOwned::new(session, socket);
        let mut unread = Vec::new();
        while let Some(request) = receive(&mut socket, &mut unread, connection) {
            self.received.lock().unwrap().push(request.clone());
            if !answering(&request, &mut socket) {
                return;
            }
        }
    }
}

/// A request with a Content-Length or none.
fn receive(socket: &mut TlsSocket, unread: &mut Vec<u8>, connection: usize) -> Option<Received> {
    let mut more = |unread: &mut Vec<u8>| {
        let mut piece = vec![0; 64 * 1024];
        let n = socket.read(&mut piece).ok().filter(|n| *n > 0)?;
        unread.extend_from_slice(&piece[..n]);
        Some(())
    };
    let end = loop {
        match find(unread, b"\r\n\r\n") {
            Some(end) => break end + 4,
            None => more(unread)?,
        }
    };
    let head = String::from_utf8(unread.drain(..end).collect()).unwrap();
    let field = |line: &str| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse::<usize>().ok();
    let length = head.lines().find_map(field).unwrap_or(0);
    while unread.len() < length {
        more(unread)?;
    }
    Some(Received { head, body: unread.drain(..length).collect(), connection })
}

fn config((certificate, key): (PathBuf, PathBuf), versions: &[&'static SupportedProtocolVersion]) -> ServerConfig {
    configured((certificate, key), versions, None)
}

fn configured(
    (certificate, key): (PathBuf, PathBuf),
    versions: &[&'static SupportedProtocolVersion],
    demands_from: Option<&Authority>,
) -> ServerConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_protocol_versions(versions).unwrap();
    let builder = match demands_from {
        None => builder.with_no_client_auth(),
        Some(authority) => {
            let mut roots = RootCertStore::empty();
            roots.add(CertificateDer::from_pem_file(authority.ca()).unwrap()).unwrap();
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
            builder.with_client_cert_verifier(verifier)
        }
    };
    let chain = vec![CertificateDer::from_pem_file(certificate).unwrap()];
    let mut config = builder.with_single_cert(chain, PrivateKeyDer::from_pem_file(key).unwrap()).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config
}

fn own(authority: &Authority) -> (PathBuf, PathBuf) {
    (authority.certificate(), authority.key())
}

/// Nobody listens there: the sections of these tests name their backends.
fn nowhere() -> SocketAddr {
    "127.0.0.1:9".parse().unwrap()
}

fn errors(gateway: &Gateway, kind: &str) -> f64 {
    gateway.metric(&format!("tollgate_upstream_errors_total{{kind=\"{kind}\",upstream=\"api\"}}"))
}

fn reload(gateway: &Gateway) {
    let answer = gateway.admin_post("/reload");
    assert_eq!(answer.status, 200, "{}", answer.text());
}

#[test]
fn a_verified_backend_serves_and_its_connection_is_used_again() {
    let authority = Authority::new();
    for versions in [TLS12, TLS13] {
        let backend = Backend::start(config(own(&authority), versions), answers_ok);
        let gateway = Gateway::start(nowhere(), &backend.trusting(&authority));
        for _ in 0..5 {
            assert_eq!((gateway.get(TARGET).status, gateway.get(TARGET).text().as_str()), (200, "ok"));
        }
        let opened = backend.opened();
        assert_eq!(opened.len(), 1, "one handshake for ten requests: {opened:?}");
        assert_eq!((opened[0].sni.as_deref(), opened[0].alpn.as_deref()), (Some("localhost"), Some(&b"http/1.1"[..])));
        let received = backend.received();
        assert_eq!(received.len(), 10);
        // What the client spoke, not what tollgate speaks.
        assert!(received[0].head.contains("X-Forwarded-Proto: http\r\n"), "{}", received[0].head);
        assert_eq!(gateway.metric("tollgate_upstream_connects_total{connection=\"reused\",upstream=\"api\"}"), 9.0);
    }
}

#[test]
fn bodies_of_some_mebibytes_pass_both_ways() {
    let authority = Authority::new();
    let backend = Backend::start(config(own(&authority), BOTH), |request, socket| {
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", request.body.len());
        socket.write_all(head.as_bytes()).is_ok() && socket.write_all(&request.body).is_ok() && socket.flush().is_ok()
    });
    let gateway =
        Gateway::start(nowhere(), &format!("{}[limits]\nbody_bytes = \"64MiB\"\n", backend.trusting(&authority)));
    let body: Vec<u8> = (0..5 * 1024 * 1024_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for round in 0..3 {
        let mut client = gateway.client();
        client.send_head(&format!(
            "PUT {TARGET} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\nContent-Type: application/octet-stream\n\
             Content-Length: {}\n\n",
            body.len()
        ));
        let mut writer = client.socket.try_clone().unwrap();
        let sent = body.clone();
        let sender = std::thread::spawn(move || writer.write_all(&sent).unwrap());
        let answer = client.answer();
        sender.join().unwrap();
        assert_eq!((answer.status, answer.cut), (200, false), "round {round}");
        assert!(answer.body == body, "round {round}: other bytes came back");
    }
    assert_eq!(backend.opened().len(), 1);
    assert!(backend.received().iter().all(|received| received.body == body));
}

/// Why no connection is made, as the client, the metric, the log and the operator see it.
#[test]
fn a_backend_that_is_not_trusted_gets_nothing() {
    let (authority, other, stranger) = (Authority::new(), Authority::new(), Authority::named("a-stranger"));
    let expired = authority.issue("DNS:localhost", 0);
    std::thread::sleep(Duration::from_millis(1_100));
    let client_authority = Authority::new();
    let demanding =
        |versions: &[&'static SupportedProtocolVersion]| configured(own(&authority), versions, Some(&client_authority));
    for (what, served, kind, detail) in [
        ("another authority", config(own(&stranger), BOTH), "tls_untrusted", "unknown issuer"),
        ("one with the same name", config(own(&other), BOTH), "tls_untrusted", "an authority of the same name"),
        (
            "another name",
            config(authority.issue("DNS:elsewhere.test", 2), BOTH),
            "tls_name",
            "not for the name localhost",
        ),
        ("an address only", config(authority.issue("IP:127.0.0.1", 2), BOTH), "tls_name", "not for the name localhost"),
        ("expired", config(expired, BOTH), "tls_expired", "its certificate expired at 20"),
        ("a client certificate is demanded, TLS 1.2", demanding(TLS12), "tls_handshake", "client certificate"),
    ] {
        let backend = Backend::start(served, answers_ok);
        let gateway = Gateway::start(nowhere(), &backend.trusting(&authority));
        let answer = gateway.ask(&format!(
            "POST {TARGET} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\nContent-Type: text/plain\nContent-Length: 2\n\nhi"
        ));
        assert_eq!((answer.status, answer.text().as_str()), (502, "{\"message\":\"502 Bad Gateway\"}"), "{what}");
        assert_eq!(errors(&gateway, kind), 1.0, "{what}: {}", gateway.metrics());
        assert!(backend.received().is_empty(), "{what}");
        // Another thread writes the log.
        let is_said = [format!("is down: {kind}"), "the TLS handshake failed: ".into()];
        eventually(what, || is_said.iter().all(|words| gateway.process_log().contains(words)));
        let log = gateway.process_log();
        let told: Vec<&str> = log.lines().filter(|line| line.contains("the TLS handshake failed: ")).collect();
        assert!(told.len() == 1 && told[0].contains(detail) && !told[0].contains("elsewhere"), "{what}: {log}");
        assert_eq!(gateway.access_log().last().unwrap()["reason"], "upstream_broken", "{what}");
        let upstreams = gateway.admin_get("/upstreams").unwrap().text();
        assert!(upstreams.contains(kind), "{what}: {upstreams}");
    }
    // With TLS 1.3, a server refuses after the handshake, in place of a response.
    let backend = Backend::start(demanding(TLS13), answers_ok);
    let gateway = Gateway::start(nowhere(), &backend.trusting(&authority));
    assert_eq!(gateway.get(TARGET).status, 502);
    assert_eq!(errors(&gateway, "tls_handshake") + errors(&gateway, "closed"), 1.0, "{}", gateway.metrics());
    assert!(backend.received().is_empty());
}

/// No connection means that nothing of the request was sent: any method goes to the next server.
#[test]
fn another_server_is_tried_after_a_handshake_that_failed() {
    let (authority, other) = (Authority::new(), Authority::new());
    let bad = Backend::start(config(own(&other), BOTH), answers_ok);
    let good = Backend::start(config(own(&authority), BOTH), answers_ok);
    // It speaks no TLS, and says so as most do.
    let plain = HttpServer::start_raw(|mut socket| {
        drop(socket.read(&mut [0; 1024]));
        drop(socket.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"));
    });
    let servers =
        [bad.address, plain.address(), good.address].map(|address| format!("\"localhost:{}\"", address.port()));
    let section = format!(
        "[[upstream]]\nname = \"api\"\nservers = [{}]\ntls = true\ntls_ca = \"{}\"\n",
        servers.join(", "),
        authority.ca().display()
    );
    let gateway = Gateway::start(nowhere(), &section);
    let request = format!("POST {TARGET} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\nContent-Length: 0\n\n");
    let begun = Instant::now();
    for _ in 0..6 {
        assert_eq!(gateway.ask(&request).status, 200);
    }
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert_eq!((bad.received().len(), good.received().len()), (0, 6));
    assert_eq!((errors(&gateway, "tls_untrusted"), errors(&gateway, "tls_handshake")), (1.0, 1.0));
    // The other two are down until a handshake succeeds.
    bad.present(config(own(&authority), BOTH));
    eventually("the server with a new certificate is used", || {
        gateway.ask(&request);
        !bad.received().is_empty()
    });
}

#[test]
fn a_client_certificate_is_presented() {
    let (authority, clients) = (Authority::new(), Authority::new());
    for versions in [TLS12, TLS13] {
        let backend = Backend::start(configured(own(&authority), versions, Some(&clients)), answers_ok);
        let (certificate, key) = own(&clients);
        let more = format!("tls_cert = \"{}\"\ntls_key = \"{}\"\n", certificate.display(), key.display());
        let gateway = Gateway::start(nowhere(), &format!("{}{more}", backend.trusting(&authority)));
        assert_eq!(gateway.get(TARGET).status, 200);
        assert!(backend.opened()[0].client_certificate);
    }
}

#[test]
fn what_is_not_verified_is_said_at_every_start_reload_and_check() {
    let authority = Authority::new();
    let backend = Backend::start(config(authority.issue("DNS:elsewhere.test", 2), BOTH), answers_ok);
    let by_address = format!(
        "[[upstream]]\nname = \"api\"\nservers = [\"{}\"]\ntls = true\ninsecure_skip_verify = true\n",
        backend.address
    );
    for (section, sni) in [(backend.section("insecure_skip_verify = true"), Some("localhost")), (by_address, None)] {
        let gateway = Gateway::start(nowhere(), &section);
        assert_eq!(gateway.get(TARGET).status, 200);
        assert_eq!(backend.opened().last().unwrap().sni.as_deref(), sni);
        let warnings = || gateway.process_log().matches("insecure_skip_verify").count();
        assert_eq!(warnings(), 1, "{}", gateway.process_log());
        reload(&gateway);
        eventually("a reload warns as well", || warnings() == 2);
        let path = gateway.folder.0.join("tollgate.toml");
        let check = tollgate().args(["check", "--config"]).arg(path).output().unwrap();
        let said = [check.stdout, check.stderr].concat();
        assert!(check.status.success() && String::from_utf8_lossy(&said).contains("insecure_skip_verify"));
    }
}

/// Whoever sits in between can end a connection, but not make it look as if the server had.
#[test]
fn an_end_that_tls_did_not_announce_is_no_end_of_a_body() {
    let authority = Authority::new();
    let backend = Backend::start(config(own(&authority), BOTH), |request, socket| {
        socket.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhalf of it").unwrap();
        if request.head.starts_with("GET /api/v3/whole") {
            socket.conn.send_close_notify();
        }
        socket.flush().unwrap();
        let _ = socket.conn.write_tls(&mut socket.sock);
        false
    });
    let gateway = Gateway::start(nowhere(), &backend.trusting(&authority));
    let whole = gateway.get("/api/v3/whole");
    assert_eq!((whole.status, whole.text().as_str(), whole.cut), (200, "half of it", false));
    let cut = gateway.get("/api/v3/cut");
    assert_eq!((cut.status, cut.cut), (200, true), "{cut:?}");
    assert_eq!(errors(&gateway, "closed"), 1.0);
}

#[test]
fn a_replaced_authority_ends_the_trust_in_connections_that_are_there() {
    let (old, new) = (Authority::new(), Authority::new());
    let backend = Backend::start(config(own(&old), BOTH), answers_ok);
    let folder = Folder::new("authorities");
    let ca = folder.file("ca.pem");
    std::fs::copy(old.ca(), &ca).unwrap();
    let gateway = Gateway::start(nowhere(), &backend.section(&format!("tls_ca = \"{}\"", ca.display())));
    assert_eq!(gateway.get(TARGET).status, 200);
    reload(&gateway);
    assert_eq!((gateway.get(TARGET).status, backend.opened().len()), (200, 1), "the connection outlives a reload");
    // The same file with other contents.
    std::fs::copy(new.ca(), &ca).unwrap();
    assert_eq!(gateway.get(TARGET).status, 200, "not before the reload");
    reload(&gateway);
    assert_eq!((gateway.get(TARGET).status, errors(&gateway, "tls_untrusted")), (502, 1.0));
    assert_eq!((backend.received().len(), backend.opened().len()), (3, 2));
    // And to a new certificate.
    backend.present(config(own(&new), BOTH));
    assert_eq!(gateway.get(TARGET).status, 200);
    assert_eq!(backend.opened().len(), 3);
    // A file that is none is refused, and changes nothing.
    std::fs::write(&ca, "no certificate").unwrap();
    let refused = gateway.admin_post("/reload");
    assert!(refused.status == 500 && refused.text().contains("tls_ca"), "{}", refused.text());
    assert_eq!((gateway.get(TARGET).status, backend.opened().len()), (200, 3));
}

#[test]
fn a_handshake_that_takes_too_long_counts_as_a_connection_that_does() {
    let silent = HttpServer::start_raw(|mut socket| drop(socket.read_to_end(&mut Vec::new())));
    let section = format!(
        "[[upstream]]\nname = \"api\"\nservers = [\"{}\"]\ntls = true\ntls_name = \"backend.test\"\n\
         insecure_skip_verify = true\nconnect_timeout = \"300ms\"\n",
        silent.address()
    );
    let gateway = Gateway::start(nowhere(), &section);
    let begun = Instant::now();
    assert_eq!(gateway.get(TARGET).status, 504);
    assert!((300..2_000).contains(&begun.elapsed().as_millis()), "{:?}", begun.elapsed());
    assert_eq!(errors(&gateway, "connect_timeout"), 1.0);
}

/// Most handshakes after the first are short.
#[test]
fn sessions_are_resumed() {
    let authority = Authority::new();
    let backend = Backend::start(config(own(&authority), BOTH), |_, socket| {
        socket.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok").unwrap();
        socket.conn.send_close_notify();
        let _ = socket.flush();
        false
    });
    let gateway = Gateway::start(nowhere(), &backend.trusting(&authority));
    for _ in 0..3 {
        assert_eq!(gateway.get(TARGET).status, 200);
    }
    let kinds: Vec<_> = backend.opened().iter().map(|opened| opened.kind.unwrap()).collect();
    assert_eq!(kinds, [HandshakeKind::Full, HandshakeKind::Resumed, HandshakeKind::Resumed]);
    // Whoever trusts another authority has to be convinced anew.
    reload(&gateway);
    assert_eq!(gateway.get(TARGET).status, 200);
    assert_eq!(backend.opened().last().unwrap().kind, Some(HandshakeKind::Resumed), "nothing changed");
    let other = Authority::new();
    let both = [std::fs::read(authority.ca()).unwrap(), std::fs::read(other.ca()).unwrap()].concat();
    std::fs::write(authority.ca(), both).unwrap();
    reload(&gateway);
    assert_eq!(gateway.get(TARGET).status, 200);
    assert_eq!(backend.opened().last().unwrap().kind, Some(HandshakeKind::Full), "the trust changed");
}

#[test]
fn websockets_pass_through_tls() {
    let authority = Authority::new();
    let backend = Backend::start(config(own(&authority), BOTH), |_, socket| {
        socket
            .write_all(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
            .unwrap();
        let mut piece = [0; 64 * 1024];
        while let Ok(n @ 1..) = socket.read(&mut piece) {
            if socket.write_all(&piece[..n]).is_err() {
                break;
            }
        }
        socket.conn.send_close_notify();
        let _ = socket.flush();
        false
    });
    let gateway = Gateway::start(nowhere(), &backend.trusting(&authority));
    let mut client = gateway.client();
    client.send_head(&format!(
        "GET {TARGET} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\nConnection: Upgrade\nUpgrade: websocket\n\
         Sec-WebSocket-Version: 13\nSec-WebSocket-Key: dGhl\n\n"
    ));
    assert_eq!(client.answer().status, 101);
    for piece in [&b"hello"[..], b"\x81\x05\0\xff", &[7; 100_000]] {
        client.send(piece);
        assert_eq!(client.read_exactly(piece.len()), piece);
    }
    client.finish_sending();
    assert!(client.is_closed_within(PATIENCE));
}

#[test]
fn checks_speak_tls() {
    let authority = Authority::new();
    let expired = authority.issue("DNS:localhost", 0);
    std::thread::sleep(Duration::from_millis(1_100));
    for (check, reason) in [("http", "check_tls_expired"), ("tcp", "check_tls_expired")] {
        let backend = Backend::start(config(expired.clone(), BOTH), answers_ok);
        let more = format!("check = \"{check}\"\ncheck_interval = \"100ms\"\ncheck_successes = 1\n");
        let gateway = Gateway::start(nowhere(), &format!("{}{more}", backend.trusting(&authority)));
        eventually("the check finds the certificate", || gateway.process_log().contains(&format!("is down: {reason}")));
        backend.present(config(own(&authority), BOTH));
        eventually("the check sees the new one", || gateway.process_log().contains("is up again"));
        let is_check = |received: &Received| received.head.starts_with("GET / ");
        assert_eq!(backend.received().iter().any(is_check), check == "http");
        assert_eq!(gateway.get(TARGET).status, 200);
    }
}

/// With `expand`, the addresses of a name are servers, and the name is what their certificates have to be for.
#[test]
fn addresses_of_a_name_are_verified_for_the_name() {
    let authority = Authority::new();
    let backend = Backend::start(config(authority.issue("DNS:localhost", 2), BOTH), answers_ok);
    let gateway = Gateway::start(nowhere(), &format!("{}expand = true\n", backend.trusting(&authority)));
    assert_eq!(gateway.get(TARGET).status, 200);
    assert_eq!(backend.opened().last().unwrap().sni.as_deref(), Some("localhost"));
}

#[test]
fn a_name_of_its_own_is_asked_for_and_verified() {
    let authority = Authority::new();
    let backend = Backend::start(config(authority.issue("DNS:backend.test", 2), BOTH), answers_ok);
    let section = |name: &str| {
        format!(
            "[[upstream]]\nname = \"api\"\nservers = [\"{}\"]\ntls = true\ntls_name = \"{name}\"\ntls_ca = \"{}\"\n",
            backend.address,
            authority.ca().display()
        )
    };
    let gateway = Gateway::start(nowhere(), &section("backend.test"));
    assert_eq!(gateway.get(TARGET).status, 200);
    assert_eq!(backend.opened().last().unwrap().sni.as_deref(), Some("backend.test"));
    // Another name is another trust, also for the connection that is there.
    gateway.rewrite(|text| text.replace("backend.test", "another.test"));
    reload(&gateway);
    assert_eq!((gateway.get(TARGET).status, errors(&gateway, "tls_name")), (502, 1.0));
}

/// The lane that tests compare with must not send in plain text what is to be sent over TLS.
#[test]
fn the_frameworks_lane_refuses_what_it_cannot_speak() {
    let plain = Upstream::start();
    let by = |keys: &str| {
        let section = format!("[[upstream]]\nname = \"api\"\nservers = [\"{}\"]\n{keys}", plain.address);
        let gateway = Gateway::start_with(nowhere(), &section, |command| {
            command.env(FRAMEWORK_LANE, "1");
        });
        gateway.get(TARGET).status
    };
    assert_eq!(by("tls = true\ninsecure_skip_verify = true\n"), 503);
    assert_eq!(by("send_proxy = true\n"), 503);
    assert_eq!((by(""), plain.seen().len()), (200, 1));
}

// --- The PROXY protocol ---

const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// The header of a client with an IPv4 address.
fn header_of(address: [u8; 4]) -> Vec<u8> {
    [SIGNATURE, b"\x21\x11\0\x0c", &address, &[0; 8]].concat()
}

#[test]
fn each_client_has_a_connection_that_says_who_it_is() {
    let authority = Authority::new();
    let backend = Backend::start_with(Some(config(own(&authority), BOTH)), true, answers_ok);
    let more = "[server]\nlisten = [\"@LISTEN@\"]\nthreads = 1\ntrusted_proxies = [\"127.0.0.1\"]\n";
    let gateway = Gateway::start(nowhere(), &format!("{more}{}send_proxy = true\n", backend.trusting(&authority)));
    let mut client = gateway.client();
    let clients = ["192.0.2.1", "192.0.2.1", "192.0.2.2", "2001:db8::7"];
    for address in clients {
        client.send_head(&format!(
            "GET {TARGET} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\nX-Forwarded-For: {address}\n\n"
        ));
        assert_eq!(client.answer().status, 200);
    }
    assert_eq!(gateway.get(TARGET).status, 200);
    let opened = backend.opened();
    let v6 = "2001:db8::7".parse::<std::net::Ipv6Addr>().unwrap().octets();
    let expected = [
        header_of([192, 0, 2, 1]),
        header_of([192, 0, 2, 1]),
        header_of([192, 0, 2, 2]),
        [SIGNATURE, b"\x21\x21\0\x24", &v6, &[0; 20]].concat(),
        header_of([127, 0, 0, 1]),
    ];
    assert_eq!(opened.iter().map(|opened| opened.proxy.clone()).collect::<Vec<_>>(), expected);
    let connections: Vec<_> = backend.received().iter().map(|received| received.connection).collect();
    assert_eq!(connections, [1, 2, 3, 4, 5], "no request follows another client's");
    assert!(opened.iter().all(|opened| opened.kind.is_some()), "the header goes before the handshake");
}

#[test]
fn checks_are_nobodys_connections() {
    let headers: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
    let seen = Arc::clone(&headers);
    let server = HttpServer::start_raw(move |mut socket| {
        let mut prefix = [0; 16];
        if socket.read_exact(&mut prefix).is_ok() {
            seen.lock().unwrap().push(prefix.to_vec());
            let mut request = vec![0; usize::from(prefix[15])];
            drop(socket.read_exact(&mut request).and_then(|()| socket.read(&mut [0; 1024])));
            drop(socket.write_all(OK));
        }
    });
    let section = format!(
        "[[upstream]]\nname = \"api\"\nservers = [\"{}\"]\nsend_proxy = true\ncheck = \"http\"\ncheck_interval = \"100ms\"\n",
        server.address()
    );
    let gateway = Gateway::start(nowhere(), &section);
    eventually("a check came", || !headers.lock().unwrap().is_empty());
    assert_eq!(headers.lock().unwrap()[0], [SIGNATURE, b"\x20\0\0\0"].concat());
    assert_eq!(gateway.get(TARGET).status, 200);
}
