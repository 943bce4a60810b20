//! TLS to the servers of an upstream, as the configuration asks for it. Pure: `edge` makes the connections.

use super::{ListedServer, ServerAddress};
use crate::problem::Problem;
use crate::tls::{self, Authorities, PemFile, TLS, Verified};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;

/// The keys of an `[[upstream]]` with `tls = true`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamTls {
    /// Whom servers' certificates have to be from. `None`: any certificate will do.
    pub authorities: Option<Authorities>,
    /// A certificate of tollgate's own, and its key.
    pub client: Option<(PemFile, PemFile)>,
    /// What certificates have to be for; `None`: the host name of each server.
    pub name: Option<String>,
    /// What is spoken over it: HTTP/2, and not HTTP/1.
    pub http2: bool,
}

const TLS_NAME: &str = "tls_name";

impl UpstreamTls {
    /// Keys of an `[[upstream]]`.
    pub(super) fn problems(&self, servers: &[ListedServer]) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.authorities.is_none() {
            let what =
                "is set: whoever answers at the servers' addresses gets the tokens of all clients, and their data";
            let instead = "name the servers' authority in tls_ca, and remove this";
            problems.push(Problem::warning("insecure_skip_verify", what, instead));
        }
        if let Some(name) = &self.name
            && ServerName::try_from(name.as_str()).is_err()
        {
            problems.push(Problem::error(TLS_NAME, "is no host name", "write it like \"backend.example\""));
        }
        for (index, server) in servers.iter().enumerate() {
            let named = |name: &str| ServerName::try_from(name).is_ok();
            let problem = match &server.address {
                ServerAddress::Unix(_) => {
                    let what = "is a Unix socket, over which TLS is not spoken";
                    Problem::error("servers", what, "use \"host:port\", or tls = false").with(TLS)
                }
                ServerAddress::Tcp(_) if self.name.is_some() => continue,
                ServerAddress::Tcp(_) if server.address.host_name().is_some_and(named) => continue,
                // Without a name there is nothing to compare a certificate with.
                ServerAddress::Tcp(_) if self.authorities.is_none() => continue,
                ServerAddress::Tcp(_) => {
                    let what = "has no host name that its certificate could be verified for";
                    Problem::error("servers", what, "use its name, or set tls_name").with(TLS)
                }
            };
            problems.push(problem.element(index));
        }
        problems.extend(self.config().err());
        problems
    }

    /// What is spoken with the servers. An error is one that `problems` reports as well.
    pub fn config(&self) -> Result<ClientConfig, Problem> {
        let verified = self.authorities.clone().map_or(Verified::Nothing, Verified::AuthorityAndName);
        let mut config = tls::client_config(&verified, self.client.as_ref())?;
        // A server that speaks something else has to say so now, and not in the middle of a response.
        config.alpn_protocols = vec![if self.http2 { b"h2".to_vec() } else { b"http/1.1".to_vec() }];
        Ok(config)
    }
}
