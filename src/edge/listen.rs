//! Where the gateway listens, and what would keep it from that: an address that is taken, or something in the place of a
//! socket file. Looks, and makes nothing.

use std::os::unix::fs::FileTypeExt as _;
use std::time::Duration;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerSettings {
    pub listen: Vec<Listen>,
    /// `None`: no admin listener.
    pub admin: Option<Listen>,
    /// Worker threads.
    pub threads: usize,
    /// How long requests in flight may take once a stop was asked for.
    pub grace: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// `address:port`.
    Tcp(String),
    /// A path, and the mode of the socket file.
    Unix(String, u32),
}

impl ServerSettings {
    /// The keys whose values differ.
    pub fn changes(&self, other: &Self) -> Vec<&'static str> {
        let all = [
            ("server.listen", self.listen != other.listen),
            ("server.threads", self.threads != other.threads),
            ("server.shutdown_grace", self.grace != other.grace),
            ("admin.listen", self.admin != other.admin),
        ];
        all.into_iter().filter(|(_, differs)| *differs).map(|(key, _)| key).collect()
    }
}

/// Says which address of these cannot be bound. The framework would try again for half a minute, and panic.
pub fn check_free(settings: &ServerSettings) -> Result<(), String> {
    check_places(settings)?;
    for listen in settings.listen.iter().chain(&settings.admin) {
        match listen {
            Listen::Tcp(address) => {
                std::net::TcpListener::bind(address).map_err(|error| format!("{address} cannot be bound: {error}"))?;
            }
            Listen::Unix(path, _) => {
                if let Place::Taken(how) | Place::NotYet(how) = Place::of(path) {
                    return Err(format!("unix:{path} cannot be bound: {how}"));
                }
            }
        }
    }
    Ok(())
}

/// Says which of these places can never hold a socket, whether or not the gateway runs at the moment.
pub fn check_places(settings: &ServerSettings) -> Result<(), String> {
    for listen in settings.listen.iter().chain(&settings.admin) {
        if let Listen::Unix(path, _) = listen
            && let Place::Unfit(why) = Place::of(path)
        {
            return Err(format!("unix:{path} cannot be bound: {why}"));
        }
    }
    Ok(())
}

/// What stands where a socket file is to be made.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Place {
    Free,
    /// A socket that nobody answers on: left behind by a process that was killed.
    Stale,
    Taken(String),
    /// No folder, which the service manager may make at the start.
    NotYet(String),
    Unfit(String),
}

impl Place {
    pub(super) fn of(path: &str) -> Self {
        let path = std::path::Path::new(path);
        let kind = match std::fs::symlink_metadata(path) {
            Ok(meta) => meta.file_type(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
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
                () => "something that is no socket",
            };
            return Self::Unfit(format!("{what} stands there, and only a socket that nobody answers on is replaced"));
        }
        match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => Self::Taken("another process listens there".into()),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => Self::Stale,
            // A queue that is full, or a socket of another kind or user: in use, as far as can be told.
            Err(error) => Self::Taken(format!("a socket stands there that may be in use: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixDatagram, UnixListener};

    #[test]
    fn only_a_socket_that_nobody_answers_on_is_replaced() {
        let folder = std::env::temp_dir().join(format!("tollgate-places-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let at = |name: &str| folder.join(name).to_str().unwrap().to_owned();
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
        assert!(matches!(Place::of(&at("no/such/folder")), Place::NotYet(_)));
        for name in ["file", "empty", "folder", "link", "dangling", "link-to-socket"] {
            assert!(matches!(Place::of(&at(name)), Place::Unfit(_)), "{name}: {:?}", Place::of(&at(name)));
            seen += 1;
        }
        for name in ["live", "datagram"] {
            assert!(matches!(Place::of(&at(name)), Place::Taken(_)), "{name}: {:?}", Place::of(&at(name)));
            seen += 1;
        }
        assert_eq!((Place::of(&at("stale")), Place::of(&at("free")), seen), (Place::Stale, Place::Free, 8));
        assert_eq!(Place::of("/dev/null"), Place::of("/dev/zero"), "devices are no sockets either");
        assert!(matches!(Place::of("/dev/null"), Place::Unfit(_)));
        std::fs::remove_dir_all(folder).unwrap();
    }
}
