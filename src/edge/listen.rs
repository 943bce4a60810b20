//! The listeners' settings, and the check whether their addresses can be bound: an address may be in use, or something else
//! may exist at the path of a socket file. It must not create or remove anything.

use super::listening::PassedSockets;
use super::tls::ListenerTlsSettings;
use crate::problem::{Problem, Severity, no_new_file, socket_path_too_long};
use crate::request::origin::TrustedProxies;
use crate::request::verdict::{VerdictRules, VerdictSource};
use std::fmt;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

#[derive(Clone, Debug, PartialEq)]
pub struct ServerSettings {
    /// Those of `server.listen` come first.
    pub listeners: Vec<ListenerSettings>,
    /// How many of them are from `server.listen`.
    pub short: usize,
    /// `None`: no admin listener.
    pub admin: Option<Listen>,
    /// The admin listener asks for a token.
    pub admin_token: bool,
    /// One for metrics and health alone.
    pub metrics: Option<Listen>,
    /// Worker threads.
    pub threads: usize,
    /// Reload when the configuration file changes.
    pub watch: bool,
    /// Hold the process to the files that it needs.
    pub sandbox: SandboxMode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SandboxMode {
    Off,
    /// Where the kernel can, else with a warning.
    Try,
    /// Nothing is served without.
    On,
}

/// A listener for the API.
#[derive(Clone, Debug, PartialEq)]
pub struct ListenerSettings {
    pub address: Listen,
    /// `None`: plain HTTP.
    pub tls: Option<ListenerTlsSettings>,
    /// HTTP/2 is spoken with those who begin with its preface, or choose it in the TLS handshake.
    pub http2: bool,
    /// Peers whose connections begin with a PROXY protocol header; all others are closed. `None`: nobody sends one.
    pub proxy_protocol: Option<TrustedProxies>,
    /// For what comes before HTTP: the PROXY protocol and TLS.
    pub handshake_timeout: Duration,
    /// Requests get a redirect to this port with https, or a refusal if they carry a token.
    pub redirect: Option<u16>,
    /// Browsers are told to use https alone, for this time.
    pub hsts: Option<Duration>,
    /// Requests are not forwarded: other proxies ask whether they may forward theirs.
    pub verdict: Option<VerdictSettings>,
}

/// Of a listener on which other proxies ask.
#[derive(Clone, Debug, PartialEq)]
pub struct VerdictSettings {
    pub rules: Arc<VerdictRules>,
    /// Who may ask. All others are closed.
    pub peers: TrustedProxies,
}

impl VerdictSettings {
    /// Keys of `[[listener]]`.
    fn problems(&self, address: &Listen) -> Vec<Problem> {
        let mut problems = Vec::new();
        let is_unix = matches!(address, Listen::Unix(..));
        if self.peers.networks.is_empty() && !is_unix {
            let what = "is empty: no proxy could ask";
            problems.push(Problem::error("peers", what, "write the addresses of your proxies, like [\"127.0.0.1\"]"));
        }
        if !self.peers.networks.is_empty() && is_unix {
            let what = "is for TCP: whoever can open a socket file may ask";
            problems.push(Problem::error("peers", what, "remove it").with("address"));
        }
        problems.extend(self.peers.networks.iter().filter(|network| network.prefix_len() == 0).map(|_| {
            let what = "lets everybody ask which tokens are good";
            Problem::error("peers", what, "list the networks of your own proxies alone")
        }));
        let prefix = &self.rules.path_prefix;
        if !prefix.is_empty() && self.rules.source != VerdictSource::Envoy {
            let problem = Problem::error("path_prefix", "goes with source = \"envoy\" only", "remove it");
            problems.push(problem.with("source"));
        }
        if !prefix.is_empty() && (!prefix.starts_with('/') || prefix.ends_with('/')) {
            let instead = "write it like \"/verdict\"";
            problems.push(Problem::error("path_prefix", "does not begin with `/`, or ends with one", instead));
        }
        problems
    }
}

impl ListenerSettings {
    const LEAST_HANDSHAKE: Duration = Duration::from_millis(100);

    /// Plain HTTP/1.
    pub fn plain(address: Listen) -> Self {
        Self {
            address,
            tls: None,
            http2: false,
            proxy_protocol: None,
            handshake_timeout: Duration::from_secs(10),
            redirect: None,
            hsts: None,
            verdict: None,
        }
    }

    /// Keys of `[[listener]]`.
    pub fn problems(&self, now: SystemTime) -> Vec<Problem> {
        let mut problems: Vec<Problem> = self.tls.iter().flat_map(|tls| tls.problems(now)).collect();
        if let (Listen::Unix(..), Some(_)) = (&self.address, &self.tls) {
            let instead = "remove the certificates, or listen on an address and a port";
            problems.push(Problem::error("certificates", "goes with TCP only", instead).with("address"));
        }
        if self.redirect.is_some() && self.tls.is_some() {
            let instead = "use it on a listener for plain HTTP";
            problems
                .push(Problem::error("redirect_to_https", "goes without certificates", instead).with("certificates"));
        }
        if self.redirect == Some(0) {
            problems.push(Problem::error("redirect_to_https", "is out of range", "use a port from 1 to 65535"));
        }
        if self.hsts.is_some() && self.tls.is_none() {
            problems.push(Problem::error("hsts", "goes with certificates only", "remove it").with("certificates"));
        }
        if let Some(verdict) = &self.verdict {
            problems.extend(verdict.problems(&self.address));
            if self.redirect.is_some() {
                let problem = Problem::error("redirect_to_https", "goes with mode = \"forward\" only", "remove it");
                problems.push(problem.with("mode"));
            }
        }
        problems.extend(Problem::too_short("handshake_timeout", self.handshake_timeout, Self::LEAST_HANDSHAKE));
        problems
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Listen {
    /// `address:port`.
    Tcp(String),
    /// A path, and the mode of the socket file.
    Unix(String, u32),
}

impl Listen {
    /// Whether only this machine can reach it.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Tcp(address) => {
                address.parse().is_ok_and(|address: SocketAddr| address.ip().to_canonical().is_loopback())
            }
            Self::Unix(..) => true,
        }
    }
}

impl ServerSettings {
    /// The keys whose values differ, and take effect with a restart only.
    pub fn changes(&self, other: &Self) -> Vec<&'static str> {
        let all = [
            ("server.threads", self.threads != other.threads),
            ("server.watch", self.watch != other.watch),
            ("server.sandbox", self.sandbox != other.sandbox),
        ];
        all.into_iter().filter(|(_, differs)| *differs).map(|(key, _)| key).collect()
    }
}

/// What it means that an address is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressInUse {
    /// The gateway cannot start.
    Error,
    /// It may be in use by the gateway that runs with this configuration.
    Warning,
}

impl ServerSettings {
    const MOST_THREADS: usize = 512;

    /// Problems that show without binding an address. Keys of `[server]` and `[admin]`, with their section.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.listeners.is_empty() {
            let what = "is empty: the API would be unreachable";
            problems.push(Problem::error("server.listen", what, "write it like [\"127.0.0.1:8080\"]"));
        }
        let all: Vec<_> = self.addresses().collect();
        for (number, (listen, key, index)) in all.iter().enumerate() {
            let problem = |what: &str, instead: &str| {
                let problem = Problem::error(key, what, instead);
                index.map_or(problem.clone(), |index| problem.element(index))
            };
            match listen {
                Listen::Tcp(address) => {
                    if address.parse().is_ok_and(|address: SocketAddr| address.port() == 0) {
                        let what = "has port 0, which means any free port";
                        problems.push(problem(what, "use a port from 1 to 65535"));
                    }
                }
                Listen::Unix(path, _) => {
                    if let Some(what) = socket_path_too_long(path) {
                        problems.push(problem(&what, "use a shorter path"));
                    }
                }
            }
            if let Some((_, first, at)) = all[..number].iter().find(|(other, ..)| other == listen) {
                let problem = problem("repeats the address of another listener", "remove one of them");
                problems.push(Problem { related: Some((first, *at)), ..problem });
            }
        }
        problems.extend(self.exposed());
        if self.threads > Self::MOST_THREADS {
            let instead = format!("use at most {}; 0 means one for each core", Self::MOST_THREADS);
            problems.push(Problem::error("server.threads", "is out of range", instead));
        }
        problems
    }

    /// What others can reach of what is for operators.
    fn exposed(&self) -> Vec<Problem> {
        let is_outside = |listen: &Listen| match listen {
            Listen::Tcp(address) => address.parse().is_ok_and(|address: SocketAddr| !is_inside(address.ip())),
            Listen::Unix(..) => false,
        };
        let private = "use a loopback or private address, or restrict access with a firewall";
        let mut problems = Vec::new();
        if let Some(admin) = &self.admin {
            let said = match (is_outside(admin), self.admin_token, admin.is_local()) {
                (true, true, _) => {
                    Some(("can be reached from other networks, and its token is sent in plain text", private))
                }
                (true, false, _) => {
                    let what = "can be reached from other networks, and has no token: it shows everybody what goes on, and refuses \
                                reloads and other changes";
                    Some((what, private))
                }
                (false, false, false) => {
                    let what = "is not loopback and has no token: it refuses reloads and other changes";
                    Some((what, "set token_sha256, or use a loopback address or a Unix socket"))
                }
                (false, ..) => None,
            };
            problems.extend(said.map(|(what, instead)| Problem::warning("admin.listen", what, instead)));
        }
        if self.metrics.as_ref().is_some_and(is_outside) {
            let what = "can be reached from other networks: metrics name routes, upstreams and servers";
            problems.push(Problem::warning("admin.metrics_listen", what, private));
        }
        problems
    }

    /// The listeners for operators.
    pub(super) fn operators(&self) -> impl Iterator<Item = &Listen> {
        self.admin.iter().chain(&self.metrics)
    }

    /// The addresses that cannot be bound, found by binding all of them for a moment, but for those that are open already. The framework would retry for half a
    /// minute and then panic.
    pub fn unbound(&self, in_use: AddressInUse, passed: &PassedSockets) -> Vec<Problem> {
        let mut problems = Vec::new();
        // All stay bound to the end: two of them may conflict with each other.
        let mut held: Vec<(TcpListener, SocketAddr, &'static str, Option<usize>)> = Vec::new();
        for (listen, key, index) in self.addresses().filter(|(listen, ..)| !passed.has(listen)) {
            let (severity, why, related, instead) = match listen {
                Listen::Tcp(text) => {
                    let Ok(address) = text.parse::<SocketAddr>() else { continue };
                    match TcpListener::bind(address) {
                        Ok(listener) => {
                            held.push((listener, address, key, index));
                            continue;
                        }
                        Err(error) if error.kind() == ErrorKind::AddrInUse => {
                            let other = held.iter().find(|(_, other, ..)| other.port() == address.port());
                            match other {
                                Some((_, _, key, index)) => {
                                    let why = "another listener of this configuration has this port on all addresses"
                                        .to_owned();
                                    (Severity::Error, why, Some((*key, *index)), "remove one of them")
                                }
                                None => (in_use.severity(), taken(in_use, error.to_string()), None, FREE),
                            }
                        }
                        Err(error) => {
                            let instead = match error.kind() {
                                ErrorKind::AddrNotAvailable => "use an address of this machine",
                                ErrorKind::PermissionDenied => {
                                    "use port 1024 or higher, or give tollgate CAP_NET_BIND_SERVICE"
                                }
                                _ => "use another address",
                            };
                            (Severity::Error, error.to_string(), None, instead)
                        }
                    }
                }
                Listen::Unix(path, _) => match SocketPlace::of(path) {
                    SocketPlace::Free | SocketPlace::Stale => match no_new_file(Path::new(path)) {
                        Some(why) => (Severity::Error, why, None, "use a folder that tollgate can write to"),
                        None => continue,
                    },
                    SocketPlace::Taken(why) => (in_use.severity(), taken(in_use, why), None, FREE),
                    // systemd creates RuntimeDirectory= when the service starts, and removes it when it stops.
                    SocketPlace::NotYet(why) if in_use == AddressInUse::Warning && path.starts_with("/run/") => {
                        (Severity::Warning, why, None, "create the folder, unless the service manager does")
                    }
                    SocketPlace::NotYet(why) => (Severity::Error, why, None, "create the folder"),
                    SocketPlace::Unfit(why) => {
                        (Severity::Error, why, None, "use another path, or remove the existing file")
                    }
                },
            };
            let what = format!("{listen} cannot be bound: {why}");
            problems.push(Problem { severity, element: index, related, ..Problem::error(key, what, instead) });
        }
        problems
    }

    /// Every listener, with its key and its index in that key's list.
    fn addresses(&self) -> impl Iterator<Item = (&Listen, &'static str, Option<usize>)> {
        let api = self.listeners.iter().enumerate().map(|(index, listener)| match index.checked_sub(self.short) {
            None => (&listener.address, "server.listen", Some(index)),
            Some(index) => (&listener.address, "listener", Some(index)),
        });
        let operators = [("admin.listen", &self.admin), ("admin.metrics_listen", &self.metrics)];
        api.chain(operators.into_iter().filter_map(|(key, listen)| Some((listen.as_ref()?, key, None))))
    }
}

const FREE: &str = "stop the other process, or use another address";

impl AddressInUse {
    const fn severity(self) -> Severity {
        match self {
            Self::Error => Severity::Error,
            Self::Warning => Severity::Warning,
        }
    }
}

fn taken(in_use: AddressInUse, why: String) -> String {
    match in_use {
        AddressInUse::Error => why,
        AddressInUse::Warning => format!("{why}; this is expected while the gateway runs"),
    }
}

/// Loopback and private addresses.
fn is_inside(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_private() || ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unique_local() || ip.is_unicast_link_local(),
    }
}

impl fmt::Display for Listen {
    /// As it is written in the configuration.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path, _) => write!(f, "unix:{path}"),
        }
    }
}

impl fmt::Display for ListenerSettings {
    /// For people.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address.fmt(f)?;
        let said = [
            (self.tls.is_some(), "TLS"),
            (self.tls.as_ref().is_some_and(|tls| tls.client_ca.is_some()), "client certificates"),
            (self.http2, "HTTP/2"),
            (self.proxy_protocol.is_some(), "PROXY protocol"),
            (self.redirect.is_some(), "redirect to https"),
            (self.verdict.is_some(), "verdicts for other proxies"),
        ];
        let said: Vec<_> = said.into_iter().filter(|(is, _)| *is).map(|(_, what)| what).collect();
        if said.is_empty() { Ok(()) } else { write!(f, " ({})", said.join(", ")) }
    }
}

/// What exists at the path where a socket file is to be created.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum SocketPlace {
    Free,
    /// A socket that no process listens on, left behind by one that was killed.
    Stale,
    Taken(String),
    /// The folder does not exist; the service manager may create it at the start.
    NotYet(String),
    Unfit(String),
}

impl SocketPlace {
    pub(super) fn of(path: &str) -> Self {
        let path = Path::new(path);
        let kind = match std::fs::symlink_metadata(path) {
            Ok(meta) => meta.file_type(),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let missing = path.parent().filter(|folder| !folder.is_dir());
                return missing
                    .map_or(Self::Free, |folder| Self::NotYet(format!("there is no folder {}", folder.display())));
            }
            Err(error) => return Self::Unfit(error.to_string()),
        };
        if !kind.is_socket() {
            let what = match () {
                () if kind.is_file() => "a file",
                () if kind.is_dir() => "a folder",
                () if kind.is_symlink() => "a symbolic link",
                () => "something else",
            };
            return Self::Unfit(format!(
                "{what} exists at this path; only a socket that no process listens on is replaced"
            ));
        }
        match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => Self::Taken("another process listens on it".into()),
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => Self::Stale,
            // A full queue, or a socket of another type or user: treated as in use.
            Err(error) => Self::Taken(format!("a socket exists at this path and may be in use: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixDatagram, UnixListener};

    #[test]
    fn only_a_socket_that_no_process_listens_on_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(at("file"), "precious").unwrap();
        std::fs::write(at("empty"), "").unwrap();
        std::fs::create_dir(at("folder")).unwrap();
        std::os::unix::fs::symlink(at("file"), at("link")).unwrap();
        std::os::unix::fs::symlink(at("nowhere"), at("dangling")).unwrap();
        drop(UnixListener::bind(at("stale")).unwrap());
        let _live = UnixListener::bind(at("live")).unwrap();
        let _datagram = UnixDatagram::bind(at("datagram")).unwrap();
        std::os::unix::fs::symlink(at("stale"), at("link-to-socket")).unwrap();
        let mut seen = 0;
        assert!(matches!(SocketPlace::of(&at("no/such/folder")), SocketPlace::NotYet(_)));
        for name in ["file", "empty", "folder", "link", "dangling", "link-to-socket"] {
            assert!(
                matches!(SocketPlace::of(&at(name)), SocketPlace::Unfit(_)),
                "{name}: {:?}",
                SocketPlace::of(&at(name))
            );
            seen += 1;
        }
        for name in ["live", "datagram"] {
            assert!(
                matches!(SocketPlace::of(&at(name)), SocketPlace::Taken(_)),
                "{name}: {:?}",
                SocketPlace::of(&at(name))
            );
            seen += 1;
        }
        assert_eq!(
            (SocketPlace::of(&at("stale")), SocketPlace::of(&at("free")), seen),
            (SocketPlace::Stale, SocketPlace::Free, 8)
        );
        assert_eq!(SocketPlace::of("/dev/null"), SocketPlace::of("/dev/zero"), "devices are not sockets either");
        assert!(matches!(SocketPlace::of("/dev/null"), SocketPlace::Unfit(_)));
    }
}
