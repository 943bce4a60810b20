//! TLS on a listener: which certificate answers to which name, whose clients' certificates are taken, and the handshake. It
//! must not know what is said over the connection.

use super::socket::Socket;
use crate::problem::Problem;
use crate::telemetry::metrics::HandshakeResult;
use crate::tls::PemFile;
use rustls::crypto::ring;
use rustls::pki_types::CertificateDer;
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, ServerConfig, SupportedProtocolVersion, version};
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use x509_cert::Certificate;
use x509_cert::der::Decode as _;

const HTTP2: &[u8] = b"h2";
const HTTP1: &[u8] = b"http/1.1";
/// A certificate that ends within this time is worth a warning.
const ENDS_SOON: Duration = Duration::from_secs(14 * 24 * 3600);
/// The subject of a client's certificate, as far as it is forwarded and logged.
const LONGEST_SUBJECT: usize = 1024;

/// A certificate with the authorities that lead to its root, and its private key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateFiles {
    pub chain: PemFile,
    pub key: PemFile,
}

/// What clients may speak, after Mozilla's recommendations as far as rustls has it: it knows no cipher without forward
/// secrecy and authentication in the first place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsProfile {
    /// TLS 1.3.
    Modern,
    /// TLS 1.2 and 1.3.
    Intermediate,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerTlsSettings {
    /// The first one answers to every name that no other has.
    pub certificates: Vec<CertificateFiles>,
    /// Clients have to show a certificate of one of these authorities.
    pub client_ca: Option<PemFile>,
    /// Clients without a certificate are taken as well.
    pub client_optional: bool,
    pub profile: TlsProfile,
    /// Offer HTTP/2.
    pub http2: bool,
}

const CERTIFICATES: &str = "certificates";
const CLIENT_CA: &str = "client_ca";

impl ListenerTlsSettings {
    /// The same files as they are now.
    pub(super) fn again(&self) -> Self {
        let again = |files: &CertificateFiles| CertificateFiles { chain: files.chain.again(), key: files.key.again() };
        Self {
            certificates: self.certificates.iter().map(again).collect(),
            client_ca: self.client_ca.as_ref().map(PemFile::again),
            ..self.clone()
        }
    }

    pub fn files(&self) -> impl Iterator<Item = &PemFile> {
        self.certificates.iter().flat_map(|files| [&files.chain, &files.key]).chain(&self.client_ca)
    }

    /// Keys of `[[listener]]`. Certificates that have ended, or soon will, are a warning: a reload must be able to replace the
    /// others.
    pub fn problems(&self, now: SystemTime) -> Vec<Problem> {
        let mut problems = Vec::new();
        for (index, files) in self.certificates.iter().enumerate() {
            match files.load() {
                Ok(loaded) => problems.extend(loaded.about_its_time(files, now).map(|problem| problem.element(index))),
                Err(problem) => problems.push(problem.element(index)),
            }
        }
        if problems.iter().all(|problem| problem.severity == crate::problem::Severity::Warning) {
            problems.extend(ListenerTls::new(self).err());
        }
        problems
    }
}

/// A certificate, ready for use.
struct LoadedCertificate {
    key: Arc<CertifiedKey>,
    names: Vec<String>,
    begins: SystemTime,
    ends: SystemTime,
}

impl CertificateFiles {
    fn load(&self) -> Result<LoadedCertificate, Problem> {
        let chain = self.chain.certificates(CERTIFICATES)?;
        let Some(leaf) = chain.first() else { return Err(self.chain.wrong(CERTIFICATES, "holds no certificate")) };
        let read = |error: &dyn std::fmt::Display| self.chain.wrong(CERTIFICATES, error);
        let parsed = Certificate::from_der(leaf).map_err(|error| read(&error))?;
        let names = names(leaf).map_err(|error| read(&error))?;
        let validity = parsed.tbs_certificate.validity;
        let provider = ring::default_provider();
        let key =
            CertifiedKey::from_der(chain, self.key.key(CERTIFICATES)?, &provider).map_err(|error| match error {
                rustls::Error::InconsistentKeys(_) => self.key.wrong(CERTIFICATES, "is not the key of the certificate"),
                error => self.key.wrong(CERTIFICATES, error),
            })?;
        Ok(LoadedCertificate {
            key: Arc::new(key),
            names,
            begins: validity.not_before.to_system_time(),
            ends: validity.not_after.to_system_time(),
        })
    }
}

impl LoadedCertificate {
    fn about_its_time(&self, files: &CertificateFiles, now: SystemTime) -> Option<Problem> {
        let at = |time: SystemTime| humantime::format_rfc3339_seconds(time);
        let what = match () {
            () if self.ends <= now => format!("ended at {}: clients refuse it", at(self.ends)),
            () if self.begins > now => format!("begins at {}: clients refuse it until then", at(self.begins)),
            () if self.ends <= now + ENDS_SOON => format!("ends at {}", at(self.ends)),
            () => return None,
        };
        let what = format!("{}: {what}", files.chain.path().display());
        Some(Problem::warning(CERTIFICATES, what, "put a new certificate in its place, and reload"))
    }
}

/// The names that a certificate is for, in lower case.
fn names(certificate: &CertificateDer<'_>) -> Result<Vec<String>, webpki::Error> {
    let certificate = webpki::EndEntityCert::try_from(certificate)?;
    Ok(certificate.valid_dns_names().map(str::to_ascii_lowercase).collect())
}

/// When one of a listener's certificates ends, for the metric.
#[derive(Clone, Debug)]
pub(super) struct CertificateEnd {
    /// Its first name.
    pub(super) name: String,
    pub(super) unix_seconds: u64,
}

/// A listener's TLS, made from its settings.
pub(super) struct ListenerTls {
    acceptor: TlsAcceptor,
    ends: Vec<CertificateEnd>,
}

/// A connection after its handshake.
pub(super) struct Encrypted {
    pub(super) socket: Socket,
    pub(super) http2: bool,
    /// Of the client's certificate.
    pub(super) subject: Option<String>,
}

/// Why a handshake failed.
#[derive(Debug)]
pub(super) struct HandshakeFault {
    pub(super) result: HandshakeResult,
    pub(super) error: io::Error,
}

impl ListenerTls {
    pub(super) fn new(settings: &ListenerTlsSettings) -> Result<Self, Problem> {
        let versions: &[&SupportedProtocolVersion] = match settings.profile {
            TlsProfile::Modern => &[&version::TLS13],
            TlsProfile::Intermediate => &[&version::TLS13, &version::TLS12],
        };
        let provider = Arc::new(ring::default_provider());
        let certificates = Certificates::load(&settings.certificates)?;
        let ends = certificates.ends.clone();
        let failed = |error: &dyn std::fmt::Display| Problem::error(CERTIFICATES, error.to_string(), "");
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)
            .map_err(|error| failed(&error))?;
        let builder = match &settings.client_ca {
            None => builder.with_no_client_auth(),
            Some(file) => {
                let mut roots = RootCertStore::empty();
                let (added, ignored) = roots.add_parsable_certificates(file.certificates(CLIENT_CA)?);
                if added == 0 || ignored > 0 {
                    return Err(file.wrong(CLIENT_CA, "holds no certificate that can be used"));
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                let verifier = if settings.client_optional { verifier.allow_unauthenticated() } else { verifier };
                builder.with_client_cert_verifier(verifier.build().map_err(|error| file.wrong(CLIENT_CA, error))?)
            }
        };
        let mut config = builder.with_cert_resolver(Arc::new(certificates));
        config.alpn_protocols = match settings.http2 {
            true => vec![HTTP2.to_vec(), HTTP1.to_vec()],
            false => vec![HTTP1.to_vec()],
        };
        // Their key changes every six hours, and with every change of these settings: who may not come in by new ones does
        // not come in by an old ticket.
        config.ticketer = ring::Ticketer::new().map_err(|error| failed(&error))?;
        Ok(Self { acceptor: TlsAcceptor::from(Arc::new(config)), ends })
    }

    pub(super) fn ends(&self) -> &[CertificateEnd] {
        &self.ends
    }

    /// The handshake. The time it may take is the caller's to say.
    pub(super) async fn accept(&self, socket: TcpStream) -> Result<Encrypted, HandshakeFault> {
        let stream = match self.acceptor.accept(socket).await {
            Ok(stream) => stream,
            Err(error) => return Err(HandshakeFault { result: result_of(&error), error }),
        };
        let (_, session) = stream.get_ref();
        let http2 = session.alpn_protocol() == Some(HTTP2);
        let subject = session.peer_certificates().and_then(<[_]>::first).map(subject);
        Ok(Encrypted { socket: Socket::from(tokio_rustls::TlsStream::from(stream)), http2, subject })
    }
}

/// What a failed handshake is counted as.
fn result_of(error: &io::Error) -> HandshakeResult {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::NoCertificatesPresented) => HandshakeResult::NoClientCertificate,
        Some(rustls::Error::InvalidCertificate(_)) => HandshakeResult::ClientCertificate,
        // The client did not like ours.
        Some(rustls::Error::AlertReceived(_)) => HandshakeResult::RefusedByClient,
        Some(rustls::Error::PeerIncompatible(_)) => HandshakeResult::Incompatible,
        Some(_) => HandshakeResult::Malformed,
        None => HandshakeResult::Closed,
    }
}

/// In the order of RFC 4514, the most special part first. Of a certificate that cannot be read, which none is that was
/// verified, nothing.
fn subject(certificate: &CertificateDer<'_>) -> String {
    let subject = Certificate::from_der(certificate).map(|parsed| parsed.tbs_certificate.subject.to_string());
    let mut subject = subject.unwrap_or_default();
    if subject.len() > LONGEST_SUBJECT {
        // A part of a name is another name: none is better.
        subject.clear();
    }
    subject
}

/// Chooses by the name that the client asks for.
struct Certificates {
    by_name: HashMap<String, Vec<Arc<CertifiedKey>>>,
    /// For every other name, and for clients that name none.
    first: Arc<CertifiedKey>,
    ends: Vec<CertificateEnd>,
}

impl std::fmt::Debug for Certificates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.by_name.keys()).finish()
    }
}

impl Certificates {
    fn load(all: &[CertificateFiles]) -> Result<Self, Problem> {
        let mut by_name: HashMap<String, Vec<Arc<CertifiedKey>>> = HashMap::new();
        let (mut first, mut ends) = (None, Vec::new());
        for (index, files) in all.iter().enumerate() {
            let loaded = files.load().map_err(|problem| problem.element(index))?;
            let since = loaded.ends.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            let name = loaded.names.first().cloned().unwrap_or_default();
            ends.push(CertificateEnd { name, unix_seconds: since.as_secs() });
            for name in loaded.names {
                by_name.entry(name).or_default().push(Arc::clone(&loaded.key));
            }
            first.get_or_insert(loaded.key);
        }
        let first = first.ok_or_else(|| Problem::error(CERTIFICATES, "is empty", "name a chain and its key"))?;
        Ok(Self { by_name, first, ends })
    }

    /// Those for the very name come before those for all names of its domain.
    fn named(&self, name: &str) -> impl Iterator<Item = &Arc<CertifiedKey>> {
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        let wildcard = name.split_once('.').map(|(_, domain)| format!("*.{domain}"));
        let exact = self.by_name.get(&name);
        let wide = wildcard.and_then(|wildcard| self.by_name.get(&wildcard));
        exact.into_iter().chain(wide).flatten()
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let can_be_used = |key: &&Arc<CertifiedKey>| key.key.choose_scheme(hello.signature_schemes()).is_some();
        let named = hello.server_name().and_then(|name| self.named(name).find(can_be_used));
        Some(Arc::clone(named.unwrap_or(&self.first)))
    }
}
