//! Listening sockets, and where they come from: bound by this process, opened by systemd before it started, or taken over from
//! the process that this one replaces. It must not know what is said on them.

use super::listen::{Listen, SocketPlace};
use super::upgrade::Predecessor;
use listenfd::ListenFd;
use parking_lot::Mutex;
use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::net::TcpSocket;

/// Connections that wait to be accepted; the kernel's own bound (`net.core.somaxconn`) is lower on most machines.
const BACKLOG: u32 = 65_535;

pub(super) struct ListeningSocket {
    pub(super) kind: SocketKind,
    /// The service manager holds it as well, and its file is the manager's.
    pub(super) managers: bool,
}

pub(super) enum SocketKind {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl ListeningSocket {
    /// Binds the address; a stale socket file is replaced. Within an event loop.
    pub(super) fn bind(address: &Listen) -> io::Result<Self> {
        let kind = match address {
            Listen::Tcp(address) => {
                let address: SocketAddr =
                    address.parse().map_err(|error| io::Error::new(ErrorKind::InvalidInput, error))?;
                let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
                // Connections of the process before this one may linger for a minute.
                socket.set_reuseaddr(true)?;
                socket.bind(address)?;
                SocketKind::Tcp(socket.listen(BACKLOG)?.into_std()?)
            }
            Listen::Unix(path, mode) => {
                if SocketPlace::of(path) == SocketPlace::Stale {
                    std::fs::remove_file(path)?;
                }
                let socket = UnixListener::bind(path)?;
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(*mode))?;
                socket.set_nonblocking(true)?;
                SocketKind::Unix(socket)
            }
        };
        Ok(Self { kind, managers: false })
    }

    pub(super) fn try_clone(&self) -> io::Result<Self> {
        let kind = match &self.kind {
            SocketKind::Tcp(socket) => SocketKind::Tcp(socket.try_clone()?),
            SocketKind::Unix(socket) => SocketKind::Unix(socket.try_clone()?),
        };
        Ok(Self { kind, managers: self.managers })
    }

    /// One that another process opened. What it is, and where, is asked of the kernel.
    pub(super) fn passed(socket: OwnedFd, managers: bool) -> io::Result<(ListenPlace, Self)> {
        if !rustix::net::sockopt::socket_acceptconn(&socket)? {
            return Err(io::Error::new(ErrorKind::InvalidInput, "is not a listening socket"));
        }
        let (place, kind) = match rustix::net::sockopt::socket_domain(&socket)? {
            rustix::net::AddressFamily::UNIX => {
                let socket = UnixListener::from(socket);
                socket.set_nonblocking(true)?;
                let path = socket.local_addr()?.as_pathname().map(PathBuf::from);
                let path = path.ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "is a socket without a path"))?;
                (ListenPlace::Unix(path), SocketKind::Unix(socket))
            }
            _ => {
                let socket = TcpListener::from(socket);
                socket.set_nonblocking(true)?;
                (ListenPlace::Tcp(socket.local_addr()?), SocketKind::Tcp(socket))
            }
        };
        Ok((place, Self { kind, managers }))
    }
}

impl AsFd for ListeningSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.kind {
            SocketKind::Tcp(socket) => socket.as_fd(),
            SocketKind::Unix(socket) => socket.as_fd(),
        }
    }
}

/// What two spellings of one address have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ListenPlace {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl ListenPlace {
    fn of(listen: &Listen) -> Option<Self> {
        match listen {
            Listen::Tcp(address) => address.parse().ok().map(Self::Tcp),
            Listen::Unix(path, _) => Some(Self::Unix(path.into())),
        }
    }
}

impl fmt::Display for ListenPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// The listening sockets that this process was started with, and who started it with them. They are not bound again.
#[derive(Default)]
pub struct PassedSockets {
    sockets: Mutex<Vec<(ListenPlace, ListeningSocket)>>,
    predecessor: Option<Arc<Predecessor>>,
}

impl PassedSockets {
    /// Called once, before there are threads: it takes variables out of the environment.
    pub fn of_this_process() -> io::Result<Self> {
        let mut sockets = opened_by_systemd()?;
        let predecessor = Predecessor::of_this_process()?;
        if let Some(predecessor) = &predecessor {
            sockets.extend(predecessor.sockets()?);
        }
        Ok(Self { sockets: Mutex::new(sockets), predecessor: predecessor.map(Arc::new) })
    }

    /// The process that this one is to replace.
    pub fn predecessor(&self) -> Option<&Arc<Predecessor>> {
        self.predecessor.as_ref()
    }

    /// Whether the address is open already.
    pub fn has(&self, address: &Listen) -> bool {
        let place = ListenPlace::of(address);
        self.sockets.lock().iter().any(|(passed, _)| Some(passed) == place.as_ref())
    }

    /// One of systemd's may be taken again after a reload has closed it here: systemd keeps it open.
    pub(super) fn take(&self, address: &Listen) -> io::Result<Option<ListeningSocket>> {
        let place = ListenPlace::of(address);
        let mut sockets = self.sockets.lock();
        let Some(index) = sockets.iter().position(|(passed, _)| Some(passed) == place.as_ref()) else {
            return Ok(None);
        };
        match &sockets[index].1 {
            socket if socket.managers => socket.try_clone().map(Some),
            _ => Ok(Some(sockets.swap_remove(index).1)),
        }
    }

    /// Closes what the predecessor passed and no listener wants: the configuration has changed since it read it. Their
    /// addresses.
    pub(super) fn drop_unwanted(&self) -> Vec<ListenPlace> {
        self.sockets.lock().extract_if(.., |(_, socket)| !socket.managers).map(|(place, _)| place).collect()
    }

    /// Addresses of systemd's sockets that none of `wanted` has: nobody would accept the connections that systemd lets in.
    pub(super) fn unused<'a>(&self, wanted: impl Iterator<Item = &'a Listen>) -> Vec<ListenPlace> {
        let wanted: Vec<_> = wanted.filter_map(ListenPlace::of).collect();
        let sockets = self.sockets.lock();
        let unused = sockets.iter().filter(|(place, socket)| socket.managers && !wanted.contains(place));
        unused.map(|(place, _)| place.clone()).collect()
    }
}

impl fmt::Debug for PassedSockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.sockets.lock().iter().map(|(place, _)| place)).finish()
    }
}

/// systemd's sd_listen_fds(3).
fn opened_by_systemd() -> io::Result<Vec<(ListenPlace, ListeningSocket)>> {
    let mut passed = ListenFd::from_env();
    let mut sockets = Vec::new();
    for index in 0..passed.len() {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("LISTEN_FDS, socket {index}: {error}"));
        let socket = match passed.take_unix_listener(index) {
            Ok(socket) => socket.map(OwnedFd::from),
            Err(_) => passed.take_tcp_listener(index).map_err(named)?.map(OwnedFd::from),
        };
        if let Some(socket) = socket {
            sockets.push(ListeningSocket::passed(socket, true).map_err(named)?);
        }
    }
    Ok(sockets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_passed_socket_is_known_by_its_address_and_one_of_systemd_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock").to_str().unwrap().to_owned();
        let unix = OwnedFd::from(UnixListener::bind(&path).unwrap());
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Listen::Tcp(tcp.local_addr().unwrap().to_string());
        let sockets =
            vec![ListeningSocket::passed(unix, false).unwrap(), ListeningSocket::passed(tcp.into(), true).unwrap()];
        let passed = PassedSockets { sockets: Mutex::new(sockets), predecessor: None };
        let path = Listen::Unix(path, 0o600);
        assert!(passed.has(&path) && passed.has(&address) && !passed.has(&Listen::Tcp("127.0.0.1:1".into())));
        assert_eq!(passed.unused([&path].into_iter()), [ListenPlace::of(&address).unwrap()], "of systemd's");
        assert_eq!(passed.unused([&address].into_iter()), []);
        for (listen, again) in [(&path, false), (&address, true)] {
            assert!(passed.take(listen).unwrap().is_some());
            assert_eq!(passed.take(listen).unwrap().is_some(), again, "{listen}");
        }
        assert_eq!(passed.drop_unwanted(), []);
        assert!(passed.has(&address));
    }

    #[test]
    fn only_a_listening_socket_is_taken() {
        let connected = std::os::unix::net::UnixStream::pair().unwrap().0;
        assert!(ListeningSocket::passed(connected.into(), false).is_err());
        let file = tempfile::tempfile().unwrap();
        assert!(ListeningSocket::passed(file.into(), false).is_err());
        let abstract_name = <std::os::unix::net::SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(
            b"tollgate-test-listening",
        )
        .unwrap();
        let nameless = UnixListener::bind_addr(&abstract_name).unwrap();
        assert!(ListeningSocket::passed(nameless.into(), false).is_err());
    }
}
