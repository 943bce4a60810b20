//! The fake server of the tests: it answers what a test's script says, byte for byte if need be, and records what it was
//! asked; or it hands each connection to a function, for a test that reads the bytes itself. Threads and
//! blocking sockets: nothing of it shares a runtime, or a bug, with what it tests.

use super::{PATIENCE, Server, eventually, tls::Authority};
use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// A request as it arrived.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    /// The request line as it arrived.
    pub line: String,
    pub method: String,
    pub target: String,
    /// Names in lower case, in the order of the request.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Counts the server's connections, from 1.
    pub connection: usize,
    /// Counts the requests on this connection, from 1.
    pub nth: usize,
}

impl Asked {
    /// The values of all headers of this name, joined by commas; empty when there is none.
    pub fn header(&self, name: &str) -> String {
        let values = self.headers.iter().filter(|(key, _)| key == name).map(|(_, value)| value.as_str());
        values.collect::<Vec<_>>().join(", ")
    }

    /// A field of a form in the body, decoded.
    pub fn field(&self, name: &str) -> Option<String> {
        let body = String::from_utf8_lossy(&self.body).into_owned();
        let pair = body.split('&').filter_map(|pair| pair.split_once('=')).find(|(key, _)| *key == name);
        pair.map(|(_, value)| form_decode(value))
    }
}

pub fn form_decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digits = [rest.next().unwrap(), rest.next().unwrap()];
                u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 16).unwrap()
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).unwrap()
}

/// One thing that a server does.
#[derive(Clone, Debug)]
pub enum Step {
    Send(Vec<u8>),
    Wait(Duration),
    /// Until the client goes away or the server is stopped.
    Hang,
    /// Closes the connection.
    Close,
}

/// What a server does about one request.
#[derive(Clone, Debug, Default)]
pub struct Reply(pub Vec<Step>);

impl Reply {
    pub fn raw(bytes: impl AsRef<[u8]>) -> Self {
        Self(vec![Step::Send(bytes.as_ref().to_vec())])
    }

    /// An answer with a Content-Length.
    pub fn new(status: u16, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Self {
        let body = body.as_ref();
        let length = body.len().to_string();
        Self(vec![Step::Send([&head(status, headers, &[("Content-Length", &length)]), body].concat())])
    }

    pub fn json(body: impl AsRef<str>) -> Self {
        Self::new(200, &[("Content-Type", "application/json")], body.as_ref())
    }

    pub fn status(status: u16) -> Self {
        Self::new(status, &[("Content-Type", "application/json")], r#"{"message":"a status"}"#)
    }

    /// JSON in chunks of a few bytes each.
    pub fn chunked(body: &str, size: usize) -> Self {
        let mut bytes = head(200, &[("Content-Type", "application/json")], &[("Transfer-Encoding", "chunked")]);
        for chunk in body.as_bytes().chunks(size) {
            bytes.extend(format!("{:x}\r\n", chunk.len()).into_bytes());
            bytes.extend(chunk);
            bytes.extend(b"\r\n");
        }
        bytes.extend(b"0\r\n\r\n");
        Self::raw(bytes)
    }

    /// JSON with a Content-Length and 200.
    pub fn ok(body: &str) -> Self {
        Self::json(body)
    }

    pub fn hang() -> Self {
        Self(vec![Step::Hang])
    }

    pub fn then(mut self, step: Step) -> Self {
        self.0.push(step);
        self
    }

    /// Ends the connection behind it.
    pub fn then_close(self) -> Self {
        self.then(Step::Close)
    }

    pub fn after(mut self, wait: Duration) -> Self {
        self.0.insert(0, Step::Wait(wait));
        self
    }

    /// Only the first bytes, and then something else.
    pub fn cut(self, length: usize, step: Step) -> Self {
        let mut bytes = self.bytes();
        bytes.truncate(length);
        Self(vec![Step::Send(bytes), step])
    }

    /// In pieces of a few bytes, with a wait after each.
    pub fn slowly(self, size: usize, wait: Duration) -> Self {
        let bytes = self.bytes();
        Self(bytes.chunks(size).flat_map(|piece| [Step::Send(piece.to_vec()), Step::Wait(wait)]).collect())
    }

    /// Writes the answer, up to the step that ends the connection, which it returns. `answered` is called before the last
    /// piece is written, `sent` behind each.
    pub fn play(self, stream: &mut impl Write, answered: impl FnOnce(), sent: impl Fn()) -> io::Result<Option<Step>> {
        let last = self.0.iter().rposition(|step| matches!(step, Step::Send(_)));
        let mut answered = Some(answered);
        for (index, step) in self.0.into_iter().enumerate() {
            match step {
                Step::Send(bytes) => {
                    if last == Some(index) {
                        answered.take().into_iter().for_each(|answered| answered());
                    }
                    stream.write_all(&bytes)?;
                    stream.flush()?;
                    sent();
                }
                Step::Wait(time) => std::thread::sleep(time),
                Step::Hang | Step::Close => return Ok(Some(step)),
            }
        }
        Ok(None)
    }

    /// All that is sent.
    pub fn bytes(&self) -> Vec<u8> {
        let sent = self.0.iter().filter_map(|step| match step {
            Step::Send(bytes) => Some(bytes.as_slice()),
            _ => None,
        });
        sent.collect::<Vec<_>>().concat()
    }
}

fn head(status: u16, headers: &[(&str, &str)], more: &[(&str, &str)]) -> Vec<u8> {
    let mut head = format!("HTTP/1.1 {status} Reason\r\n");
    for (name, value) in headers.iter().chain(more) {
        head += &format!("{name}: {value}\r\n");
    }
    (head + "\r\n").into_bytes()
}

type Script = Box<dyn Fn(&Asked) -> Reply + Send + Sync>;
type OnConnection = Box<dyn Fn(TcpStream) + Send + Sync>;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum At {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// Ends when it is dropped.
pub struct HttpServer {
    at: At,
    shared: Arc<Shared>,
}

struct Shared {
    script: Mutex<Arc<Script>>,
    /// Serves whole connections, in place of the script.
    on_connection: Option<OnConnection>,
    tls: Option<Arc<rustls::ServerConfig>>,
    /// Requests arrive and are not answered.
    frozen: Mutex<bool>,
    thawed: Condvar,
    /// No connections are taken.
    stopped: AtomicBool,
    /// The listening thread runs.
    listening: AtomicBool,
    sockets: Mutex<BTreeMap<usize, Socket>>,
    connections: AtomicUsize,
    requests: AtomicUsize,
    under_way: AtomicUsize,
    most_under_way: AtomicUsize,
    most_open: AtomicUsize,
    sent: AtomicUsize,
    asked: Mutex<Vec<Asked>>,
}

impl HttpServer {
    /// On a free port.
    pub fn start(script: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        Self::start_at(At::Tcp((Ipv4Addr::LOCALHOST, 0).into()), None, None, script)
    }

    pub fn start_on(address: SocketAddr, script: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        Self::start_at(At::Tcp(address), None, None, script)
    }

    /// Answers each connection's first request with these bytes and closes it.
    pub fn answering_once(bytes: &'static [u8]) -> Self {
        Self::start(move |_| Reply::raw(bytes).then_close())
    }

    /// Hands each connection to a function; only connections are counted.
    pub fn start_raw(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        let at = At::Tcp((Ipv4Addr::LOCALHOST, 0).into());
        Self::start_at(at, None, Some(Box::new(serve)), |_| unreachable!("the function serves"))
    }

    pub fn start_unix(path: &Path, script: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        Self::start_at(At::Unix(path.to_owned()), None, None, script)
    }

    /// The certificate is for 127.0.0.1 and its name, and for no other loopback address.
    pub fn start_tls(
        authority: &Authority,
        host: Ipv4Addr,
        script: impl Fn(&Asked) -> Reply + Send + Sync + 'static,
    ) -> Self {
        use rustls::pki_types::pem::PemObject as _;
        use rustls::pki_types::{CertificateDer, PrivateKeyDer};
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config =
            rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let certificate = CertificateDer::from_pem_file(authority.certificate()).unwrap();
        let key = PrivateKeyDer::from_pem_file(authority.key()).unwrap();
        let config = config.with_no_client_auth().with_single_cert(vec![certificate], key).unwrap();
        Self::start_at(At::Tcp((host, 0).into()), Some(Arc::new(config)), None, script)
    }

    fn start_at(
        at: At,
        tls: Option<Arc<rustls::ServerConfig>>,
        on_connection: Option<OnConnection>,
        script: impl Fn(&Asked) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let script: Script = Box::new(script);
        let shared = Shared {
            script: Mutex::new(Arc::new(script)),
            on_connection,
            tls,
            frozen: Mutex::default(),
            thawed: Condvar::new(),
            stopped: AtomicBool::new(true),
            listening: AtomicBool::new(false),
            sockets: Mutex::default(),
            connections: AtomicUsize::new(0),
            requests: AtomicUsize::new(0),
            under_way: AtomicUsize::new(0),
            most_under_way: AtomicUsize::new(0),
            most_open: AtomicUsize::new(0),
            sent: AtomicUsize::new(0),
            asked: Mutex::default(),
        };
        let mut server = Self { at, shared: Arc::new(shared) };
        server.start_again();
        server
    }

    pub fn at(&self) -> &At {
        &self.at
    }

    /// Of a TCP server.
    pub fn address(&self) -> SocketAddr {
        match &self.at {
            At::Tcp(address) => *address,
            At::Unix(path) => panic!("{} is no address", path.display()),
        }
    }

    /// The URL of a path on this server, as the configuration of tollgate has it.
    pub fn url(&self, path: &str) -> String {
        match (&self.at, &self.shared.tls) {
            (At::Unix(socket), _) => format!("unix:{}:{path}", socket.display()),
            (At::Tcp(address), None) => format!("http://{address}{path}"),
            (At::Tcp(address), Some(_)) if address.ip() == Ipv4Addr::LOCALHOST => {
                format!("https://localhost:{}{path}", address.port())
            }
            (At::Tcp(address), Some(_)) => format!("https://{address}{path}"),
        }
    }

    /// Answers otherwise from now on.
    pub fn script(&self, script: impl Fn(&Asked) -> Reply + Send + Sync + 'static) {
        let script: Script = Box::new(script);
        *self.shared.script.lock().unwrap() = Arc::new(script);
    }

    /// Connections that were ever taken.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(SeqCst)
    }

    /// Connections that are open now.
    pub fn open(&self) -> usize {
        self.shared.sockets.lock().unwrap().len()
    }

    /// Most connections that were open at once.
    pub fn most_open(&self) -> usize {
        self.shared.most_open.load(SeqCst)
    }

    pub fn requests(&self) -> usize {
        self.shared.requests.load(SeqCst)
    }

    /// Pieces that were sent, of all answers.
    pub fn sent(&self) -> usize {
        self.shared.sent.load(SeqCst)
    }

    /// Most requests that were unanswered at once.
    pub fn most_under_way(&self) -> usize {
        self.shared.most_under_way.load(SeqCst)
    }

    /// Up to the last 10,000 requests.
    pub fn asked(&self) -> Vec<Asked> {
        self.shared.asked.lock().unwrap().clone()
    }

    pub fn forget(&self) {
        self.shared.asked.lock().unwrap().clear();
    }

    pub fn last(&self) -> Asked {
        self.asked().pop().unwrap()
    }
}

impl Server for HttpServer {
    /// Connections are refused from now on, and closed if they are open.
    fn stop(&mut self) {
        self.shared.stopped.store(true, SeqCst);
        self.thaw();
        eventually("the HTTP server has stopped", || {
            // Wakes the listening thread.
            let _: io::Result<Socket> = connect(&self.at);
            self.cut();
            !self.shared.listening.load(SeqCst) && self.open() == 0
        });
    }

    /// Listens again, at the same address.
    fn start_again(&mut self) {
        let listener = match &self.at {
            At::Unix(path) => {
                drop(std::fs::remove_file(path));
                Listener::Unix(UnixListener::bind(path).unwrap())
            }
            At::Tcp(address) => {
                let listener = TcpListener::bind(address).unwrap();
                self.at = At::Tcp(listener.local_addr().unwrap());
                Listener::Tcp(listener)
            }
        };
        self.shared.stopped.store(false, SeqCst);
        self.shared.listening.store(true, SeqCst);
        let shared = Arc::clone(&self.shared);
        std::thread::spawn(move || {
            shared.listen(&listener);
            drop(listener);
            shared.listening.store(false, SeqCst);
        });
    }

    /// Takes connections and requests, and answers none.
    fn freeze(&self) {
        *self.shared.frozen.lock().unwrap() = true;
    }

    fn thaw(&self) {
        *self.shared.frozen.lock().unwrap() = false;
        self.shared.thawed.notify_all();
    }

    /// Closes all connections.
    fn cut(&self) {
        for socket in self.shared.sockets.lock().unwrap().values() {
            socket.shut();
        }
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        // A panic in a panic would hide what went wrong; and a function may still wait for something that its test does not do.
        if std::thread::panicking() || self.shared.on_connection.is_some() {
            self.shared.stopped.store(true, SeqCst);
            self.thaw();
            let _: io::Result<Socket> = connect(&self.at);
            self.cut();
        } else {
            self.stop();
        }
    }
}

impl Shared {
    fn listen(self: &Arc<Self>, listener: &Listener) {
        loop {
            let socket = match listener {
                Listener::Tcp(listener) => listener.accept().and_then(|(socket, _)| {
                    // Or the kernel would keep a second piece back until the client has acknowledged the first.
                    socket.set_nodelay(true)?;
                    Ok(Socket::Tcp(socket))
                }),
                Listener::Unix(listener) => listener.accept().map(|(socket, _)| Socket::Unix(socket)),
            };
            if self.stopped.load(SeqCst) {
                return;
            }
            let Ok(socket) = socket else { continue };
            let number = self.connections.fetch_add(1, SeqCst) + 1;
            let mut sockets = self.sockets.lock().unwrap();
            sockets.insert(number, socket.try_clone());
            self.most_open.fetch_max(sockets.len(), SeqCst);
            drop(sockets);
            let shared = Arc::clone(self);
            std::thread::spawn(move || {
                let _open = Open(&shared, number);
                match (&shared.on_connection, socket) {
                    (Some(serve), Socket::Tcp(socket)) => serve(socket),
                    (_, socket) => {
                        // A client that goes away is none of the server's business.
                        let _: io::Result<()> = shared.serve(socket, number);
                    }
                }
            });
        }
    }

    fn serve(&self, socket: Socket, number: usize) -> io::Result<()> {
        let watched = socket.try_clone();
        let mut stream: Box<dyn Duplex> = match &self.tls {
            None => Box::new(socket),
            Some(config) => {
                let session = rustls::ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
                Box::new(rustls::StreamOwned::new(session, socket))
            }
        };
        let mut unread = Vec::new();
        let mut nth = 0;
        while let Some(mut asked) = read_head(&mut stream, &mut unread)? {
            nth += 1;
            (asked.connection, asked.nth) = (number, nth);
            // Recorded before its body: one whose body is cut off was asked all the same.
            let mut all = self.asked.lock().unwrap();
            if all.len() == 10_000 {
                all.clear();
            }
            all.push(asked.clone());
            drop(all);
            asked.body = read_body(&mut stream, &mut unread, &asked)?;
            let mut all = self.asked.lock().unwrap();
            if let Some(entry) = all.iter_mut().rfind(|entry| (entry.connection, entry.nth) == (number, nth)) {
                entry.body.clone_from(&asked.body);
            }
            drop(all);
            let under_way = UnderWay::new(self);
            self.requests.fetch_add(1, SeqCst);
            let mut frozen = self.frozen.lock().unwrap();
            while *frozen && !self.stopped.load(SeqCst) {
                frozen = self.thawed.wait_timeout(frozen, Duration::from_millis(50)).unwrap().0;
            }
            drop(frozen);
            let script = Arc::clone(&self.script.lock().unwrap());
            let reply = script(&asked);
            let mut under_way = Some(under_way);
            // Counted as answered before the client can know.
            let answered = || drop(under_way.take());
            match reply.play(&mut stream, answered, || _ = self.sent.fetch_add(1, SeqCst))? {
                Some(Step::Hang) => {
                    watched.set_read_timeout(Some(PATIENCE));
                    // Ends with the client, whatever it says.
                    let _: io::Result<usize> = stream.read(&mut [0; 1]);
                    return Ok(());
                }
                Some(_) => {
                    watched.shut();
                    return Ok(());
                }
                None => {}
            }
            drop(under_way);
        }
        Ok(())
    }
}

/// An open connection. Also one whose function panicked is no longer counted.
struct Open<'s>(&'s Shared, usize);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.sockets.lock().unwrap().remove(&self.1);
    }
}

struct UnderWay<'s>(&'s Shared);

impl<'s> UnderWay<'s> {
    fn new(shared: &'s Shared) -> Self {
        let count = shared.under_way.fetch_add(1, SeqCst) + 1;
        shared.most_under_way.fetch_max(count, SeqCst);
        Self(shared)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, SeqCst);
    }
}

/// `None`: the client has closed. Only the framings that clients of ours use.
fn read_more(stream: &mut dyn Duplex, unread: &mut Vec<u8>) -> io::Result<bool> {
    let mut piece = [0; 8192];
    let length = stream.read(&mut piece)?;
    unread.extend_from_slice(&piece[..length]);
    Ok(length > 0)
}

fn read_head(stream: &mut dyn Duplex, unread: &mut Vec<u8>) -> io::Result<Option<Asked>> {
    let end = loop {
        if let Some(end) = unread.windows(4).position(|window| window == b"\r\n\r\n") {
            break end;
        }
        if !read_more(stream, unread)? {
            return Ok(None);
        }
    };
    let head = String::from_utf8_lossy(&unread[..end]).into_owned();
    unread.drain(..end + 4);
    let mut lines = head.split("\r\n");
    let line = lines.next().unwrap_or_default();
    let mut words = line.split(' ').map(str::to_owned);
    let mut asked = Asked {
        line: line.to_owned(),
        method: words.next().unwrap_or_default(),
        target: words.next().unwrap_or_default(),
        ..Asked::default()
    };
    asked.headers = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    Ok(Some(asked))
}

fn read_body(stream: &mut dyn Duplex, unread: &mut Vec<u8>, asked: &Asked) -> io::Result<Vec<u8>> {
    let length = asked.header("content-length").parse().unwrap_or(0);
    while unread.len() < length {
        if !read_more(stream, unread)? {
            return Err(ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(unread.drain(..length).collect())
}

trait Duplex: Read + Write {}
impl<T: Read + Write> Duplex for T {}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

fn connect(at: &At) -> io::Result<Socket> {
    match at {
        At::Tcp(address) => TcpStream::connect(address).map(Socket::Tcp),
        At::Unix(path) => UnixStream::connect(path).map(Socket::Unix),
    }
}

impl Socket {
    fn try_clone(&self) -> Self {
        match self {
            Self::Tcp(socket) => Self::Tcp(socket.try_clone().unwrap()),
            Self::Unix(socket) => Self::Unix(socket.try_clone().unwrap()),
        }
    }

    fn shut(&self) {
        // One that is closed already is as good.
        let _: io::Result<()> = match self {
            Self::Tcp(socket) => socket.shutdown(Shutdown::Both),
            Self::Unix(socket) => socket.shutdown(Shutdown::Both),
        };
    }

    fn set_read_timeout(&self, timeout: Option<Duration>) {
        match self {
            Self::Tcp(socket) => socket.set_read_timeout(timeout).unwrap(),
            Self::Unix(socket) => socket.set_read_timeout(timeout).unwrap(),
        }
    }
}

impl Read for Socket {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.read(bytes),
            Self::Unix(socket) => socket.read(bytes),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.write(bytes),
            Self::Unix(socket) => socket.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
