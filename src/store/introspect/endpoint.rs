//! The endpoint's address: parses the configured URL and opens connections to it. Knows nothing of HTTP except the URL
//! and the Host field.

use super::super::{Place, TlsSettings};
use crate::problem::Problem;
use hyper::http::HeaderValue;
use hyper::http::uri::{InvalidUri, PathAndQuery, Scheme, Uri};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream, lookup_host};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

pub(super) struct Endpoint {
    address: EndpointAddress,
    /// The request target.
    pub(super) path: PathAndQuery,
    pub(super) host: HeaderValue,
    /// For messages: host and port, or the socket. Not the URL, whose query may contain a key.
    pub(super) place: String,
    /// Requests go to another machine in plain text.
    pub(super) leaks: bool,
}

enum EndpointAddress {
    Tcp {
        host: String,
        port: u16,
        tls: Option<(TlsConnector, ServerName<'static>)>,
        /// If false, the name must resolve to this machine.
        anywhere: bool,
    },
    Unix(PathBuf),
}

/// A connection of any kind.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Endpoint {
    /// The error names what is wrong with the URL and never the URL. `insecure_http`: tokens may go to another machine
    /// in plain text.
    pub(super) fn new(url: &str, insecure_http: bool, tls: &TlsSettings) -> Result<Self, Problem> {
        if let Some(rest) = url.strip_prefix("unix:") {
            return Self::unix(rest);
        }
        // The parser would drop it silently.
        if url.contains('#') {
            return Err(wrong("must not have a fragment (#)"));
        }
        let uri: Uri = url.parse().map_err(|error: InvalidUri| wrong(error.to_string()))?;
        let secure = match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTP => false,
            Some(scheme) if *scheme == Scheme::HTTPS => true,
            _ => return Err(wrong("is not an address that can be asked: must begin with http://, https:// or unix:/")),
        };
        let authority = uri.authority().map_or("", |authority| authority.as_str());
        if authority.contains('@') {
            return Err(wrong("must not hold a user or a password"));
        }
        let name = uri.host().unwrap_or_default();
        if name.is_empty() {
            return Err(wrong("has no host"));
        }
        // The parser accepts any digits as a port, and then returns none.
        let port = match authority.strip_prefix(name).unwrap_or_default() {
            "" if secure => 443,
            "" => 80,
            port => match port.trim_start_matches(':').parse() {
                Ok(0) | Err(_) => return Err(wrong("has a port that is none")),
                Ok(port) => port,
            },
        };
        // An IPv6 address is in brackets in URLs only.
        let host = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name).to_owned();
        let elsewhere = !Place::of_host(&host).is_local();
        if !secure && !insecure_http && elsewhere {
            return Err(Problem::error(
                ENDPOINT,
                format!("http:// to {name} would send every token over the network in plain text"),
                "use https://, an address of this machine (127.0.0.1, [::1], localhost) or unix:/; where the way there is \
                 safe, set insecure_http = true",
            ));
        }
        let tls = match secure {
            true => Some((connector(tls)?, server_name(&host)?)),
            false => None,
        };
        Ok(Self {
            path: uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/")),
            host: HeaderValue::from_str(authority).map_err(|error| wrong(error.to_string()))?,
            place: format!("{name}:{port}"),
            leaks: !secure && elsewhere,
            address: EndpointAddress::Tcp { host, port, tls, anywhere: secure || insecure_http },
        })
    }

    /// `/path/to/socket:/path`, or the socket alone.
    fn unix(rest: &str) -> Result<Self, Problem> {
        let (socket, path) = match rest.split_once(":/") {
            Some((socket, path)) => (socket, format!("/{path}")),
            None => (rest, "/".to_owned()),
        };
        if !socket.starts_with('/') || socket.contains('\0') {
            return Err(wrong("after unix: comes the absolute path of a socket, like unix:/run/app.sock:/api/v3/user"));
        }
        if path.contains('#') {
            return Err(wrong("must not have a fragment (#)"));
        }
        Ok(Self {
            address: EndpointAddress::Unix(socket.into()),
            path: path.parse().map_err(|error: InvalidUri| wrong(error.to_string()))?,
            host: HeaderValue::from_static("localhost"),
            place: socket.into(),
            leaks: false,
        })
    }

    /// `patience` limits the wait for each address of a name except the last one, which the caller's deadline limits.
    pub(super) async fn connect(&self, patience: Duration) -> io::Result<Box<dyn Stream>> {
        match &self.address {
            EndpointAddress::Unix(path) => Ok(Box::new(UnixStream::connect(path).await?)),
            EndpointAddress::Tcp { host, port, tls, anywhere } => {
                let stream = connect(host, *port, *anywhere, patience).await?;
                // A request is one write; Nagle's algorithm would only delay it.
                stream.set_nodelay(true)?;
                match tls {
                    None => Ok(Box::new(stream)),
                    Some((connector, name)) => Ok(Box::new(connector.connect(name.clone(), stream).await?)),
                }
            }
        }
    }
}

fn connector(tls: &TlsSettings) -> Result<TlsConnector, Problem> {
    let is_disabled = || wrong("is https, but TLS is disabled: choose another tls mode");
    let mut config = tls.client_config()?.ok_or_else(is_disabled)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

fn server_name(host: &str) -> Result<ServerName<'static>, Problem> {
    ServerName::try_from(host.to_owned()).map_err(|error| wrong(format!("the host can't be in a certificate: {error}")))
}

/// The key of the URL.
const ENDPOINT: &str = "endpoint";

fn wrong(what: impl Into<String>) -> Problem {
    Problem::error(ENDPOINT, what, "write it like \"http://127.0.0.1:3000/api/v3/user\"")
}

async fn connect(host: &str, port: u16, anywhere: bool, patience: Duration) -> io::Result<TcpStream> {
    let mut addresses = lookup_host((host, port)).await?.peekable();
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    while let Some(address) = addresses.next() {
        if !anywhere && !Place::Address(address.ip()).is_local() {
            return Err(io::Error::other("the name leads to another machine, and http:// would show it every token"));
        }
        let attempt = TcpStream::connect(address);
        let result = match addresses.peek() {
            None => attempt.await,
            Some(_) => tokio::time::timeout(patience, attempt).await.unwrap_or_else(|late| Err(late.into())),
        };
        match result {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::super::super::TlsMode;
    use super::*;

    fn endpoint(url: &str, mode: TlsMode) -> Result<Endpoint, Problem> {
        // A CA certificate for tests would need a file; without verification none is read.
        Endpoint::new(url, true, &TlsSettings { mode, ca: None, client: None })
    }

    #[test]
    fn plain_text_stays_on_this_machine() {
        let (mut here, mut elsewhere) = (0, 0);
        let tls = TlsSettings { mode: TlsMode::Require, ca: None, client: None };
        for url in [
            "http://127.0.0.1:3000/user",
            "http://127.8.8.8/user",
            "http://localhost:3000/user",
            "HTTP://LOCALHOST/user",
            "http://[::1]:3000/user",
            "unix:/run/app.sock:/user",
            "https://db.example/user",
            "https://10.0.0.1/user",
        ] {
            here += 1;
            let endpoint = Endpoint::new(url, false, &tls).unwrap_or_else(|why| panic!("{url}: {why}"));
            assert!(!endpoint.leaks, "{url}");
        }
        for url in [
            "http://10.0.0.1:3000/user",
            "http://db.example/user?key=S3CRET",
            "HTTP://db.example/user",
            "http://localhost.example/user",
            "http://localhost./user",
            "http://127.0.0.1.example/user",
            "http://127.1/user",
            "http://2130706433/user",
            "http://0.0.0.0/user",
            "http://[::]/user",
            "http://[::ffff:10.0.0.1]/user",
            "http://[fe80::1]/user",
        ] {
            elsewhere += 1;
            let why = Endpoint::new(url, false, &tls).err().unwrap_or_else(|| panic!("{url} is taken")).to_string();
            assert!(why.contains("insecure_http = true") && !why.contains("S3CRET"), "{url}: {why}");
            assert!(Endpoint::new(url, true, &tls).unwrap().leaks, "{url}");
        }
        for url in ["http://127.0.0.1@db.example/", "http://localhost:80@db.example/", "http://localhost\\@db.example/"]
        {
            assert!(Endpoint::new(url, true, &tls).is_err(), "{url}");
        }
        assert_eq!((here, elsewhere), (8, 12));
    }

    #[test]
    fn urls() {
        for (url, place, host, path) in [
            ("http://127.0.0.1:8080/api/v3/user", "127.0.0.1:8080", "127.0.0.1:8080", "/api/v3/user"),
            ("http://example", "example:80", "example", "/"),
            ("HTTP://Example/a?b=c", "Example:80", "Example", "/a?b=c"),
            ("https://example/i", "example:443", "example", "/i"),
            ("http://[::1]:81/", "[::1]:81", "[::1]:81", "/"),
            ("unix:/run/a.sock:/api/v3/user?x=y", "/run/a.sock", "localhost", "/api/v3/user?x=y"),
            ("unix:/run/a:b.sock:/x", "/run/a:b.sock", "localhost", "/x"),
            ("unix:/run/a.sock", "/run/a.sock", "localhost", "/"),
        ] {
            let endpoint = endpoint(url, TlsMode::Require).unwrap();
            assert_eq!((endpoint.place.as_str(), endpoint.path.as_str()), (place, path), "{url}");
            assert_eq!(endpoint.host, host, "{url}");
        }
    }

    #[test]
    fn what_is_no_url() {
        for (url, part) in [
            ("", "endpoint: "),
            ("example/api", "endpoint: "),
            ("/api/v3/user", "must begin with"),
            ("ftp://example/", "must begin with"),
            ("http:///path", "endpoint: "),
            ("http://user:S3CRET@example/", "must not hold a user"),
            ("http://S3CRET@example/", "must not hold a user"),
            ("http://example/#S3CRET", "fragment"),
            ("http://example:0/", "port"),
            ("http://example:99999/", "port"),
            ("http://exa mple/S3CRET", "endpoint: "),
            ("unix:run/a.sock:/S3CRET", "absolute path"),
            ("unix:/run/a.sock:/a b", "endpoint: "),
            ("https://exa_mple..S3CRET/", "certificate"),
        ] {
            let why = endpoint(url, TlsMode::Require).err().unwrap_or_else(|| panic!("{url} is taken")).to_string();
            assert!(why.contains(part) && !why.contains("S3CRET"), "{url}: {why}");
        }
        let why = endpoint("https://example/", TlsMode::Disable).err().unwrap().to_string();
        assert!(why.contains("TLS is disabled"), "{why}");
    }
}
