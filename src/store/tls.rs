//! Shared by the stores with network connections: secrets that cannot be printed, one rule for when plain text is
//! allowed, and one way to verify the server's certificate. Knows no store.

use crate::problem::Problem;
use crate::store::credential::Digest;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use zeroize::Zeroizing;

/// A password or similar secret. Cannot be printed, is overwritten when it is dropped, and is compared only to detect
/// configuration changes.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(Zeroizing::new(text.into()))
    }

    pub fn expose(&self) -> &str {
        &self.0
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("…")
    }
}

/// An address of a store, as far as its settings specify it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place<'a> {
    /// A Unix socket.
    Socket,
    Address(IpAddr),
    /// A host name, not yet resolved.
    Name(&'a str),
}

impl<'a> Place<'a> {
    /// Parses the part before `:PORT`, with or without the brackets of an IPv6 address.
    pub fn of_host(host: &'a str) -> Self {
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        bare.parse().map_or(Self::Name(bare), Self::Address)
    }

    /// Whether connections do not leave this machine. Of names, only `localhost` is local (RFC 6761); its addresses are
    /// checked again before anything is sent ([`TlsSettings::admits`]).
    pub fn is_local(self) -> bool {
        match self {
            Self::Socket => true,
            Self::Address(address) => is_loopback(address),
            Self::Name(name) => name.eq_ignore_ascii_case("localhost"),
        }
    }
}

fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

/// How the server is verified; the names are libpq's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsMode {
    /// Plain text, also to other machines: configured explicitly.
    Disable,
    /// Plain text, to this machine only: the meaning of "auto" if every address is local.
    Local,
    /// Encrypted without verification: protects against eavesdropping, not against impersonation.
    Require,
    /// The certificate must be from a trusted CA, for any name.
    VerifyCa,
    /// The certificate must also be for the configured name.
    VerifyFull,
}

impl TlsMode {
    /// The meaning of "auto": plain text only if every address that a connection may use is on this machine. An empty
    /// list is not local.
    pub fn auto<'a>(places: impl IntoIterator<Item = Place<'a>>) -> Self {
        let mut places = places.into_iter().peekable();
        if places.peek().is_some() && places.all(Place::is_local) { Self::Local } else { Self::VerifyFull }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsSettings {
    pub mode: TlsMode,
    /// PEM; `None`: the system's CA certificates.
    pub ca: Option<PemFile>,
    /// PEM files of a client certificate and its key.
    pub client: Option<(PemFile, PemFile)>,
}

/// The contents of a file when the configuration was read. Two are equal if their contents are, so that a replaced file
/// changes the settings, and what was checked is what is used. Prints its path only, because it may be a key.
#[derive(Clone, PartialEq, Eq)]
pub struct PemFile {
    path: PathBuf,
    content: Result<Arc<[u8]>, String>,
}

impl From<PathBuf> for PemFile {
    /// Reads the file. An error is reported by its user.
    fn from(path: PathBuf) -> Self {
        let content = std::fs::read(&path).map(Into::into).map_err(|error| error.to_string());
        Self { path, content }
    }
}

impl std::fmt::Debug for PemFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.path.fmt(f)
    }
}

impl PemFile {
    /// The same file as it is now.
    pub(crate) fn again(&self) -> Self {
        Self::from(self.path.clone())
    }

    pub(crate) fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// Every error is about `key`, the setting that names this file.
    pub(super) fn content(&self, key: &'static str) -> Result<&[u8], Problem> {
        self.content.as_deref().map_err(|why| self.wrong(key, why))
    }

    pub(crate) fn certificates(&self, key: &'static str) -> Result<Vec<CertificateDer<'static>>, Problem> {
        let found = CertificateDer::pem_slice_iter(self.content(key)?);
        found.collect::<Result<_, _>>().map_err(|error| self.wrong(key, error))
    }

    pub(crate) fn key(&self, key: &'static str) -> Result<PrivateKeyDer<'static>, Problem> {
        PrivateKeyDer::from_pem_slice(self.content(key)?).map_err(|error| self.wrong(key, error))
    }

    pub(crate) fn wrong(&self, key: &'static str, why: impl std::fmt::Display) -> Problem {
        Problem::error(key, format!("{}: {why}", self.path.display()), "name a PEM file that tollgate may read")
    }
}

/// The system's current CA certificates.
pub fn system_authorities() -> Digest {
    let mut found: Vec<_> = rustls_native_certs::load_native_certs().certs.iter().map(|cert| cert.to_vec()).collect();
    found.sort_unstable();
    Digest::of(&found.concat())
}

/// The keys of these settings.
pub(super) const TLS: &str = "tls";
pub(super) const TLS_CA: &str = "tls_ca";
pub(super) const TLS_CERT: &str = "tls_cert";
pub(super) const TLS_KEY: &str = "tls_key";

/// Why nothing is sent to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0} is another machine, where nothing is sent in plain text: set tls = \"verify-full\" (or, in a network that nobody \
     else can read, \"disable\")"
)]
pub struct NotAdmitted(IpAddr);

impl TlsSettings {
    pub const fn is_plain(&self) -> bool {
        matches!(self.mode, TlsMode::Disable | TlsMode::Local)
    }

    /// Whether a connection may be opened to this address, which a name was resolved to or another server reported.
    /// Must be checked for each address before the first byte is sent.
    pub fn admits(&self, address: IpAddr) -> Result<(), NotAdmitted> {
        if self.mode == TlsMode::Local && !is_loopback(address) { Err(NotAdmitted(address)) } else { Ok(()) }
    }

    /// What is wrong with these settings, certificates included.
    pub fn problems(&self) -> Vec<Problem> {
        self.client_config().err().into_iter().collect()
    }

    /// `None`: plain text.
    pub fn client_config(&self) -> Result<Option<ClientConfig>, Problem> {
        if self.is_plain() {
            return Ok(None);
        }
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| Problem::error(TLS, error.to_string(), ""))?;
        let verifier = match self.mode {
            TlsMode::Disable | TlsMode::Local | TlsMode::Require => None,
            TlsMode::VerifyCa | TlsMode::VerifyFull => {
                let roots = Arc::new(self.roots()?);
                let verifier = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider)).build();
                Some(verifier.map_err(|error| Problem::error(TLS_CA, error.to_string(), ""))?)
            }
        };
        let verifier = Arc::new(Verifier { verifier, check_name: self.mode == TlsMode::VerifyFull, provider });
        let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
        let config = match &self.client {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => builder
                .with_client_auth_cert(certificate.certificates(TLS_CERT)?, key.key(TLS_KEY)?)
                .map_err(|error| certificate.wrong(TLS_CERT, error))?,
        };
        Ok(Some(config))
    }

    /// Whether the system's CA certificates are used.
    pub fn trusts_the_system(&self) -> bool {
        matches!(self.mode, TlsMode::VerifyCa | TlsMode::VerifyFull) && self.ca.is_none()
    }

    fn roots(&self) -> Result<RootCertStore, Problem> {
        let mut roots = RootCertStore::empty();
        let found = match &self.ca {
            Some(file) => file.certificates(TLS_CA)?,
            None => rustls_native_certs::load_native_certs().certs,
        };
        // Old certificates in a system's store may not parse; a configured one must.
        let (added, ignored) = roots.add_parsable_certificates(found);
        match (&self.ca, added, ignored) {
            (Some(file), _, 1..) | (Some(file), 0, _) => {
                Err(file.wrong(TLS_CA, "holds no certificate that can be used"))
            }
            (None, 0, _) => {
                let what = "is not set, and the system knows no certificate authorities";
                Err(Problem::error(TLS_CA, what, "install ca-certificates, or set it"))
            }
            _ => Ok(roots),
        }
    }
}

/// Omits exactly those of the usual checks that the mode omits.
#[derive(Debug)]
struct Verifier {
    /// `None`: any certificate.
    verifier: Option<Arc<WebPkiServerVerifier>>,
    check_name: bool,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(verifier) = &self.verifier else { return Ok(ServerCertVerified::assertion()) };
        match verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !self.check_name => Ok(ServerCertVerified::assertion()),
            result => result,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_text_is_for_this_machine_only() {
        let (socket, here, far) = (Place::Socket, Place::of_host("127.0.0.1"), Place::of_host("10.0.0.9"));
        for (places, mode) in [
            (vec![socket], TlsMode::Local),
            (vec![here, socket, Place::of_host("localhost")], TlsMode::Local),
            (vec![Place::of_host("[::1]"), Place::of_host("::1"), Place::of_host("LocalHost")], TlsMode::Local),
            (vec![Place::of_host("127.9.9.9"), Place::of_host("[::ffff:127.0.0.1]")], TlsMode::Local),
            // Each of several addresses counts, at any position.
            (vec![socket, far], TlsMode::VerifyFull),
            (vec![here, far], TlsMode::VerifyFull),
            (vec![far, here], TlsMode::VerifyFull),
            (vec![], TlsMode::VerifyFull),
        ] {
            assert_eq!(TlsMode::auto(places.clone()), mode, "{places:?}");
        }
        // Names that only look local, and addresses of all machines or none.
        for host in [
            "",
            "localhost.",
            "localhost.example",
            "my.localhost",
            "127.0.0.1.example",
            "127.1",
            "0x7f000001",
            "2130706433",
            "0.0.0.0",
            "::",
            "::ffff:10.0.0.9",
            "fe80::1",
            "localhost,db.example",
            "db.example",
            "/run/postgresql",
        ] {
            assert_eq!(TlsMode::auto([Place::of_host(host)]), TlsMode::VerifyFull, "{host:?}");
        }
    }

    #[test]
    fn a_name_that_resolves_elsewhere_is_not_spoken_to_in_plain_text() {
        let settings = |mode| TlsSettings { mode, ca: None, client: None };
        for (mode, address, admitted) in [
            (TlsMode::Local, "127.0.0.1", true),
            (TlsMode::Local, "::1", true),
            (TlsMode::Local, "::ffff:127.0.0.1", true),
            (TlsMode::Local, "10.0.0.9", false),
            (TlsMode::Local, "::ffff:10.0.0.9", false),
            (TlsMode::Local, "0.0.0.0", false),
            (TlsMode::Disable, "10.0.0.9", true),
            (TlsMode::VerifyFull, "10.0.0.9", true),
        ] {
            assert_eq!(settings(mode).admits(address.parse().unwrap()).is_ok(), admitted, "{mode:?} {address}");
        }
    }

    #[test]
    fn nothing_prints_a_secret() {
        assert!(!format!("{:?} {:#?}", Secret::new("S3CRET"), Some(Secret::new("S3CRET"))).contains("S3CRET"));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key.pem");
        std::fs::write(&path, "S3CRET").unwrap();
        let key = PemFile::from(path);
        assert!(
            !format!("{key:?}").contains("S3CRET") && !key.key(TLS_KEY).unwrap_err().to_string().contains("S3CRET")
        );
    }

    #[test]
    fn a_file_that_was_replaced_in_its_place_is_another_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.pem");
        std::fs::write(&path, "one").unwrap();
        let [before, again] = [(); 2].map(|()| PemFile::from(path.clone()));
        assert_eq!(before, again);
        std::fs::write(&path, "two").unwrap();
        assert_ne!(before, PemFile::from(path.clone()));
        assert_eq!(before.content(TLS_CA).unwrap(), b"one", "what was checked is what is used");
        std::fs::remove_file(&path).unwrap();
        assert!(PemFile::from(path).content(TLS_CA).unwrap_err().what.contains("ca.pem: No such file"));
    }
}
