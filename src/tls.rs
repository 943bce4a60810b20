//! TLS to servers that tollgate connects to, token stores and backends alike: the files that the settings name, whom they
//! trust, and how a certificate is verified. It must not know what is asked of a server.

use crate::problem::Problem;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use std::path::PathBuf;
use std::sync::Arc;

/// The keys of these settings, which are the same for stores and upstreams.
pub const TLS: &str = "tls";
pub const TLS_CA: &str = "tls_ca";
pub const TLS_CERT: &str = "tls_cert";
pub const TLS_KEY: &str = "tls_key";

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
    pub fn content(&self, key: &'static str) -> Result<&[u8], Problem> {
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

/// The CA certificates that the system had when the configuration was read. Two are equal if their certificates are.
#[derive(Clone, PartialEq, Eq)]
pub struct SystemAuthorities(Arc<Vec<CertificateDer<'static>>>);

impl std::fmt::Debug for SystemAuthorities {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} certificates", self.0.len())
    }
}

impl SystemAuthorities {
    /// Reads them, in an order of their own: the system names none.
    pub fn load() -> Self {
        let mut found = rustls_native_certs::load_native_certs().certs;
        found.sort_unstable_by(|a, b| a.as_ref().cmp(b.as_ref()));
        Self(Arc::new(found))
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.iter().map(|certificate| certificate.as_ref()).collect::<Vec<_>>().concat()
    }
}

/// Who is trusted to name servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Authorities {
    System(SystemAuthorities),
    File(PemFile),
}

/// What of a server's certificate is verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verified {
    /// Protects against eavesdropping, not against impersonation.
    Nothing,
    /// It is from one of these, for any name.
    Authority(Authorities),
    /// The usual: it must also be for the name of the server.
    AuthorityAndName(Authorities),
}

/// `client`: a certificate of our own and its key.
pub fn client_config(verified: &Verified, client: Option<&(PemFile, PemFile)>) -> Result<ClientConfig, Problem> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| Problem::error(TLS, error.to_string(), ""))?;
    let verifier = match verified {
        Verified::Nothing => None,
        Verified::Authority(authorities) | Verified::AuthorityAndName(authorities) => {
            let roots = Arc::new(roots(authorities)?);
            let verifier = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider)).build();
            Some(verifier.map_err(|error| Problem::error(TLS_CA, error.to_string(), ""))?)
        }
    };
    let check_name = matches!(verified, Verified::AuthorityAndName(_));
    let verifier = Arc::new(Verifier { verifier, check_name, provider });
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    match client {
        None => Ok(builder.with_no_client_auth()),
        Some((certificate, key)) => builder
            .with_client_auth_cert(certificate.certificates(TLS_CERT)?, key.key(TLS_KEY)?)
            .map_err(|error| certificate.wrong(TLS_CERT, error)),
    }
}

fn roots(authorities: &Authorities) -> Result<RootCertStore, Problem> {
    let mut roots = RootCertStore::empty();
    let found = match authorities {
        Authorities::File(file) => file.certificates(TLS_CA)?,
        Authorities::System(SystemAuthorities(found)) => found.to_vec(),
    };
    // Old certificates in a system's store may not parse; a configured one must.
    let (added, ignored) = roots.add_parsable_certificates(found);
    match (authorities, added, ignored) {
        (Authorities::File(file), _, 1..) | (Authorities::File(file), 0, _) => {
            Err(file.wrong(TLS_CA, "holds no certificate that can be used"))
        }
        (Authorities::System(_), 0, _) => {
            let what = "is not set, and the system knows no certificate authorities";
            Err(Problem::error(TLS_CA, what, "install ca-certificates, or set it"))
        }
        _ => Ok(roots),
    }
}

/// Omits exactly those of the usual checks that are not asked for.
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
    fn nothing_prints_a_key() {
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
