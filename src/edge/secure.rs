//! TLS to backends: the handshake, with what the configuration trusts, and what is said when it fails. A connection belongs to
//! the settings that it was made with, and is of no use to others. It must not know what is asked over it.

use super::socket::Socket;
use crate::problem::Problem;
use crate::telemetry::metrics::UpstreamError;
use crate::upstream::{Server, UpstreamTls};
use parking_lot::Mutex;
use rustls::AlertDescription;
use rustls::pki_types::{ServerName, UnixTime};
use std::borrow::Cow;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, TlsStream};

/// How TLS is spoken with the servers of one upstream. Its connections share their sessions, so that most handshakes are short.
pub(super) struct BackendTls {
    settings: UpstreamTls,
    /// An error is refused before it gets here; if it did, there would be no connections.
    connector: Result<TlsConnector, Problem>,
    complaints: Complaints,
}

/// What was last said of each server whose handshakes fail, by its number: each reason is logged once, not for each try.
#[derive(Default)]
struct Complaints(Mutex<HashMap<u64, (String, Instant)>>);

/// A server that fails for one reason after another is not worth more than a line in so long.
const BETWEEN_COMPLAINTS: Duration = Duration::from_secs(10);
/// Servers that are gone from the configuration are forgotten at some time.
const MAX_COMPLAINTS: usize = 1_024;

impl Complaints {
    /// Whether this is to be logged.
    fn is_new(&self, server: u64, why: &str, now: Instant) -> bool {
        let mut all = self.0.lock();
        let recent = |last: &Instant| now.saturating_duration_since(*last) < BETWEEN_COMPLAINTS;
        if all.get(&server).is_some_and(|(said, last)| said == why || recent(last)) {
            return false;
        }
        if all.len() >= MAX_COMPLAINTS {
            all.clear();
        }
        all.insert(server, (why.to_owned(), now));
        true
    }

    fn over(&self, server: u64) {
        self.0.lock().remove(&server);
    }
}

impl BackendTls {
    /// One that runs already goes on if its settings are the same, contents of files included.
    pub(super) fn of(settings: &UpstreamTls, running: Option<&Arc<Self>>) -> Arc<Self> {
        match running {
            Some(running) if running.settings == *settings => Arc::clone(running),
            _ => {
                let connector = settings.config().map(|config| TlsConnector::from(Arc::new(config)));
                Arc::new(Self { settings: settings.clone(), connector, complaints: Complaints::default() })
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
        let stream = connector.connect(name, socket).await.map_err(|error| {
            let why = described(&error);
            if self.complaints.is_new(server.number(), &why, Instant::now()) {
                log::warn!("server {}: the TLS handshake failed: {why}", server.label());
            }
            fault(&error)
        })?;
        self.complaints.over(server.number());
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

/// Why a handshake failed, for the log. Nothing that the other end wrote is repeated, except for a date.
fn described(error: &io::Error) -> Cow<'static, str> {
    use rustls::Error as E;
    let Some(tls) = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) else {
        return match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => "the server closed the connection".into(),
            kind => format!("the connection broke ({kind})").into(),
        };
    };
    match tls {
        E::InvalidCertificate(why) => described_certificate(why),
        E::NoCertificatesPresented => "the server sent no certificate".into(),
        E::InvalidMessage(_) => "what the server sent is not TLS".into(),
        E::PeerIncompatible(_) => "no protocol version or cipher in common".into(),
        E::PeerMisbehaved(_) | E::InappropriateMessage { .. } | E::InappropriateHandshakeMessage { .. } => {
            "the server broke the rules of TLS".into()
        }
        E::AlertReceived(alert) => described_alert(*alert),
        _ => "it could not be completed".into(),
    }
}

fn described_certificate(why: &rustls::CertificateError) -> Cow<'static, str> {
    use rustls::CertificateError as C;
    match why {
        C::UnknownIssuer => "unknown issuer: its certificate is not from an authority that is trusted".into(),
        C::ExpiredContext { not_after, .. } => format!("its certificate expired at {}", date(*not_after)).into(),
        C::Expired => "its certificate has expired".into(),
        C::NotValidYetContext { not_before, .. } => {
            format!("its certificate is not valid before {}", date(*not_before)).into()
        }
        C::NotValidYet => "its certificate is not valid yet".into(),
        C::NotValidForNameContext { expected, .. } => {
            format!("its certificate is not for the name {}", expected.to_str()).into()
        }
        C::NotValidForName => "its certificate is not for the name".into(),
        C::BadSignature => "a signature in its certificate's chain is wrong: is it from an authority of the same name with another key?".into(),
        C::BadEncoding => "its certificate cannot be read".into(),
        C::InvalidPurpose | C::InvalidPurposeContext { .. } => "its certificate is not one for servers".into(),
        C::UnhandledCriticalExtension => "its certificate has a critical extension that is not known".into(),
        C::UnsupportedSignatureAlgorithmContext { .. } | C::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
            "its certificate is signed by an algorithm that is not supported".into()
        }
        _ => "its certificate cannot be used".into(),
    }
}

fn described_alert(alert: AlertDescription) -> Cow<'static, str> {
    use AlertDescription as A;
    match alert {
        A::NoApplicationProtocol => "the server does not speak the protocol that is asked for (ALPN)".into(),
        A::ProtocolVersion | A::HandshakeFailure | A::InsufficientSecurity => {
            "the server refused: no protocol version or cipher in common, or it wants a client certificate".into()
        }
        A::CertificateRequired | A::NoCertificate => "the server wants a client certificate".into(),
        A::BadCertificate
        | A::UnsupportedCertificate
        | A::CertificateRevoked
        | A::CertificateExpired
        | A::CertificateUnknown
        | A::UnknownCA
        | A::AccessDenied => "the server does not accept the client certificate".into(),
        A::UnrecognisedName => "the server does not know the name that it was asked for".into(),
        other => format!("the server refused (alert {})", u8::from(other)).into(),
    }
}

fn date(time: UnixTime) -> impl std::fmt::Display {
    // The year 9999 is the last one that can be written.
    let seconds = time.as_secs().min(253_402_300_799);
    humantime::format_rfc3339_seconds(std::time::UNIX_EPOCH + Duration::from_secs(seconds))
}

/// Whether the other end has ended the connection by an alert. With TLS 1.3 it judges our certificate after the handshake has
/// ended for us, so that its refusal comes in place of a response.
pub(super) fn is_alert(error: &io::Error) -> bool {
    let tls = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>());
    matches!(tls, Some(rustls::Error::AlertReceived(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_logged_once_until_it_is_over_or_another() {
        let (all, start) = (Complaints::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(all.is_new(1, "a", start) && all.is_new(2, "a", start));
        assert!(!all.is_new(1, "a", at(3_600)), "the same");
        assert!(!all.is_new(1, "b", at(9)) && all.is_new(1, "b", at(10)), "another one");
        all.over(1);
        assert!(all.is_new(1, "b", at(11)) && !all.is_new(2, "a", at(11)));
        assert!((10..5_000).all(|server| all.is_new(server, "c", at(60))));
        assert!(all.0.lock().len() <= MAX_COMPLAINTS);
    }

    #[test]
    fn what_the_other_end_wrote_is_not_repeated() {
        let name = ServerName::try_from("wanted.test").unwrap();
        let presented = vec!["evil\n.test".to_owned()];
        let why = rustls::CertificateError::NotValidForNameContext { expected: name, presented };
        assert_eq!(described_certificate(&why), "its certificate is not for the name wanted.test");
        let of = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let why = rustls::CertificateError::ExpiredContext { time: of(9), not_after: of(u64::MAX) };
        assert_eq!(described_certificate(&why), "its certificate expired at 9999-12-31T23:59:59Z");
        assert_eq!(described_alert(AlertDescription::Unknown(200)), "the server refused (alert 200)");
    }
}
