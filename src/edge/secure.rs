//! TLS to backends: the handshake, with what the configuration trusts, and what is said when it fails. A connection belongs to
//! the settings that it was made with, and is of no use to others. It must not know what is asked over it.

use super::socket::Socket;
use crate::problem::Problem;
use crate::telemetry::metrics::UpstreamError;
use crate::upstream::{Server, UpstreamTls};
use rustls::AlertDescription;
use rustls::pki_types::ServerName;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, TlsStream};

/// How TLS is spoken with the servers of one upstream. Its connections share their sessions, so that most handshakes are short.
pub(super) struct BackendTls {
    settings: UpstreamTls,
    /// An error is refused before it gets here; if it did, there would be no connections.
    connector: Result<TlsConnector, Problem>,
}

impl BackendTls {
    /// One that runs already goes on if its settings are the same, contents of files included.
    pub(super) fn of(settings: &UpstreamTls, running: Option<&Arc<Self>>) -> Arc<Self> {
        match running {
            Some(running) if running.settings == *settings => Arc::clone(running),
            _ => {
                let connector = settings.config().map(|config| TlsConnector::from(Arc::new(config)));
                Arc::new(Self { settings: settings.clone(), connector })
            }
        }
    }

    /// Whether a connection that was made with one is as good for the other.
    pub(super) fn is_same(one: Option<&Arc<Self>>, other: Option<&Arc<Self>>) -> bool {
        match (one, other) {
            (None, None) => true,
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            _ => false,
        }
    }

    /// What the server's certificate has to be for, and what it is asked for.
    fn name(&self, server: &Server) -> Option<ServerName<'static>> {
        let named = |name: &str| ServerName::try_from(name.to_owned()).ok();
        match self.settings.name.as_deref().or(server.host()) {
            Some(name) => named(name),
            // Nothing is verified, and an address is never sent.
            None if self.settings.authorities.is_none() => Some(IpAddr::V4(Ipv4Addr::UNSPECIFIED).into()),
            None => None,
        }
    }

    pub(super) async fn handshake(&self, server: &Server, socket: TcpStream) -> Result<Socket, UpstreamError> {
        let (Ok(connector), Some(name)) = (&self.connector, self.name(server)) else {
            return Err(UpstreamError::TlsHandshake);
        };
        let stream = connector.connect(name, socket).await.map_err(|error| fault(&error))?;
        if self.settings.http2 && stream.get_ref().1.alpn_protocol() != Some(b"h2") {
            return Err(UpstreamError::NoHttp2);
        }
        Ok(TlsStream::Client(stream).into())
    }
}

/// Why a handshake failed.
fn fault(error: &io::Error) -> UpstreamError {
    use rustls::CertificateError as C;
    let tls = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>());
    let why = match tls {
        Some(rustls::Error::InvalidCertificate(why)) => why,
        Some(rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol)) => return UpstreamError::NoHttp2,
        _ => return UpstreamError::TlsHandshake,
    };
    match why {
        C::Expired | C::ExpiredContext { .. } | C::NotValidYet | C::NotValidYetContext { .. } => {
            UpstreamError::TlsExpired
        }
        C::NotValidForName | C::NotValidForNameContext { .. } => UpstreamError::TlsName,
        _ => UpstreamError::TlsUntrusted,
    }
}

/// Whether the other end has ended the connection by an alert. With TLS 1.3 it judges our certificate after the handshake has
/// ended for us, so that its refusal comes in place of a response.
pub(super) fn is_alert(error: &io::Error) -> bool {
    let tls = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>());
    matches!(tls, Some(rustls::Error::AlertReceived(_)))
}
