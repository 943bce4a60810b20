//! What stores over a network share: secrets that print nothing, one rule for when plain text is allowed, and one way to
//! check the other side's certificate. Knows no store.

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

/// A password or the like. Prints nothing and is compared only to see whether a configuration changed.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    pub fn expose(&self) -> &str {
        &self.0
    }

    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("…")
    }
}

/// A place that a store may be reached at, as far as its settings say where that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place<'a> {
    /// A Unix socket.
    Socket,
    Address(IpAddr),
    /// Where a name leads is known only once it was resolved.
    Name(&'a str),
}

impl<'a> Place<'a> {
    /// What stands before `:PORT`, with or without the brackets of an IPv6 address.
    pub fn of_host(host: &'a str) -> Self {
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        bare.parse().map_or(Self::Name(bare), Self::Address)
    }

    /// Whether nothing leaves this machine on the way there. Of names, only `localhost` is known to be here (RFC 6761);
    /// what it resolves to is looked at again before anything is sent ([`TlsSettings::admits`]).
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

/// How much is asked of the other side; the words are libpq's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsMode {
    /// Plain text, wherever the other side is: somebody wrote so.
    Disable,
    /// Plain text, and only to this machine: what "auto" means where every place is local.
    Local,
    /// Encrypted, to whomever: keeps out listeners, not impostors.
    Require,
    /// The certificate must come from a known authority, for whatever name.
    VerifyCa,
    /// And be for the name that was asked for.
    VerifyFull,
}

impl TlsMode {
    /// What "auto" means: plain text only if every place that a connection may go to is on this machine. Of no place at
    /// all nothing is known.
    pub fn auto<'a>(places: impl IntoIterator<Item = Place<'a>>) -> Self {
        let mut places = places.into_iter().peekable();
        if places.peek().is_some() && places.all(Place::is_local) { Self::Local } else { Self::VerifyFull }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsSettings {
    pub mode: TlsMode,
    /// PEM; `None`: the system's authorities.
    pub ca: Option<PemFile>,
    /// PEM files of a client certificate and its key.
    pub client: Option<(PemFile, PemFile)>,
}

/// A file as it was when it was named: two are equal when their contents are, so that a file that was replaced in its
/// place makes other settings, and what was checked is what is used. Prints its path only, as it may be a key.
#[derive(Clone, PartialEq, Eq)]
pub struct PemFile {
    path: PathBuf,
    content: Result<Arc<[u8]>, String>,
}

impl From<PathBuf> for PemFile {
    /// Reads the file. That it can't be read is said by whoever uses it.
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
    pub(super) fn content(&self) -> Result<&[u8], String> {
        self.content.as_deref().map_err(|why| self.wrong(why))
    }

    fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, String> {
        CertificateDer::pem_slice_iter(self.content()?).collect::<Result<_, _>>().map_err(|error| self.wrong(error))
    }

    fn key(&self) -> Result<PrivateKeyDer<'static>, String> {
        PrivateKeyDer::from_pem_slice(self.content()?).map_err(|error| self.wrong(error))
    }

    fn wrong(&self, why: impl std::fmt::Display) -> String {
        format!("{}: {why}", self.path.display())
    }
}

/// What authorities the system trusts at this moment.
pub fn system_authorities() -> Digest {
    let mut found: Vec<_> = rustls_native_certs::load_native_certs().certs.iter().map(|cert| cert.to_vec()).collect();
    found.sort_unstable();
    Digest::of(&found.concat())
}

impl TlsSettings {
    pub const fn is_plain(&self) -> bool {
        matches!(self.mode, TlsMode::Disable | TlsMode::Local)
    }

    /// Whether a connection may be opened to this address, which a name was resolved to, or which another server named. To
    /// be asked before the first byte is sent, for each address.
    pub fn admits(&self, address: IpAddr) -> Result<(), String> {
        if self.mode == TlsMode::Local && !is_loopback(address) {
            return Err(format!(
                "{address} is another machine, where nothing is sent in plain text: set tls = \"verify-full\" (or, in a \
                 network that nobody else can read, \"disable\")"
            ));
        }
        Ok(())
    }

    /// `None`: plain text.
    pub fn client_config(&self) -> Result<Option<ClientConfig>, String> {
        if self.is_plain() {
            return Ok(None);
        }
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("TLS: {error}"))?;
        let verifier = match self.mode {
            TlsMode::Disable | TlsMode::Local | TlsMode::Require => None,
            TlsMode::VerifyCa | TlsMode::VerifyFull => {
                let roots = Arc::new(self.roots()?);
                let verifier = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider)).build();
                Some(verifier.map_err(|error| format!("TLS authorities: {error}"))?)
            }
        };
        let verifier = Arc::new(Verifier { verifier, check_name: self.mode == TlsMode::VerifyFull, provider });
        let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
        let config = match &self.client {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => builder
                .with_client_auth_cert(certificate.certificates()?, key.key()?)
                .map_err(|error| certificate.wrong(error))?,
        };
        Ok(Some(config))
    }

    /// Whether the system says whom to trust.
    pub fn trusts_the_system(&self) -> bool {
        matches!(self.mode, TlsMode::VerifyCa | TlsMode::VerifyFull) && self.ca.is_none()
    }

    fn roots(&self) -> Result<RootCertStore, String> {
        let mut roots = RootCertStore::empty();
        let found = match &self.ca {
            Some(file) => file.certificates()?,
            None => rustls_native_certs::load_native_certs().certs,
        };
        // Old authorities in a system's store may not parse; one of our own must.
        let (added, ignored) = roots.add_parsable_certificates(found);
        match (&self.ca, added, ignored) {
            (Some(file), _, 1..) | (Some(file), 0, _) => Err(file.wrong("holds no certificate that can be used")),
            (None, 0, _) => {
                Err("the system knows no certificate authorities: install ca-certificates, or set tls_ca".into())
            }
            _ => Ok(roots),
        }
    }
}

/// Leaves out of the usual checks what the mode leaves out, and nothing else.
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
            // Each of several places counts, wherever it stands.
            (vec![socket, far], TlsMode::VerifyFull),
            (vec![here, far], TlsMode::VerifyFull),
            (vec![far, here], TlsMode::VerifyFull),
            (vec![], TlsMode::VerifyFull),
        ] {
            assert_eq!(TlsMode::auto(places.clone()), mode, "{places:?}");
        }
        // Names that only look like this machine, and addresses that are every machine or none.
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
        assert!(!format!("{key:?}").contains("S3CRET") && !key.key().unwrap_err().contains("S3CRET"));
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
        assert_eq!(before.content().unwrap(), b"one", "what was checked is what is used");
        std::fs::remove_file(&path).unwrap();
        assert!(PemFile::from(path).content().unwrap_err().contains("ca.pem: No such file"));
    }
}
