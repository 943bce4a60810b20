//! Shared by the stores with network connections: secrets that cannot be printed, one rule for when plain text is
//! allowed, and what of a server's certificate is verified. Knows no store.

use crate::problem::Problem;
use crate::store::credential::Digest;
use crate::tls::{self, Authorities, PemFile, SystemAuthorities, Verified};
use rustls::ClientConfig;
use std::net::IpAddr;
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

/// The system's current CA certificates.
pub fn system_authorities() -> Digest {
    Digest::of(&SystemAuthorities::load().to_bytes())
}

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
        let verified = match self.mode {
            TlsMode::Disable | TlsMode::Local => return Ok(None),
            TlsMode::Require => Verified::Nothing,
            TlsMode::VerifyCa => Verified::Authority(self.authorities()),
            TlsMode::VerifyFull => Verified::AuthorityAndName(self.authorities()),
        };
        tls::client_config(&verified, self.client.as_ref()).map(Some)
    }

    fn authorities(&self) -> Authorities {
        self.ca.clone().map_or_else(|| Authorities::System(SystemAuthorities::load()), Authorities::File)
    }

    /// Whether the system's CA certificates are used.
    pub fn trusts_the_system(&self) -> bool {
        matches!(self.mode, TlsMode::VerifyCa | TlsMode::VerifyFull) && self.ca.is_none()
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
    }
}
