//! Sends log lines as datagrams to syslog (RFC 5424) or to systemd's journal (its native protocol). For the writer thread of a
//! log only, as it may wait for the reader. A line that cannot be sent is lost and the next one is tried: nothing is kept.

use crate::problem::Problem;
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs as _, UdpSocket};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// How long the reader's queue may be full before a line is lost.
const STALLED: Duration = Duration::from_secs(1);
/// Pause between attempts to reach a reader that is not there. The lines of that time are lost.
const ABSENT_PAUSE: Duration = Duration::from_millis(100);
/// Facility daemon, severity info.
const PRIORITY: &str = "30";
/// Longest datagrams for which memory is kept.
const KEPT_BYTES: usize = 64 * 1024;

/// Where a syslog daemon listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SyslogAddress {
    Unix(PathBuf),
    /// `host:port`, over UDP.
    Udp(String),
}

impl SyslogAddress {
    /// Problems of `[log] syslog`, looked for without sending anything. What only the network tells is not looked at.
    pub(super) fn problems(&self) -> Vec<Problem> {
        match self {
            Self::Unix(path) => absent("syslog", path),
            Self::Udp(_) => Vec::new(),
        }
    }
}

/// What is wrong with the socket that a key of `[log]` names.
pub(super) fn absent(key: &'static str, path: &Path) -> Vec<Problem> {
    let Err(error) = UnixDatagram::unbound().and_then(|socket| socket.connect(path)) else { return Vec::new() };
    let what = format!("{} cannot be reached: {error}", path.display());
    vec![match error.kind() {
        // The reader may start later, or again.
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
            Problem::warning(key, format!("{what}; lines are lost until somebody listens there"), "start its reader")
        }
        _ => Problem::error(key, what, "name the datagram socket that the log's reader listens on"),
    }]
}

/// A log that is sent line by line.
#[derive(Debug)]
pub struct Datagrams {
    to: SyslogAddress,
    form: DatagramForm,
    socket: Option<DatagramSocket>,
    /// Not before this time, if the last attempt to connect failed.
    connect_at: Option<Instant>,
    packet: Vec<u8>,
}

#[derive(Debug)]
enum DatagramForm {
    /// What stands between the time and the message.
    Syslog(String),
    /// The fields beside the message.
    Journal(String),
}

#[derive(Debug)]
enum DatagramSocket {
    Unix(UnixDatagram),
    Udp(UdpSocket),
}

impl Datagrams {
    /// RFC 5424. `log` names the log in the message's id.
    pub fn syslog(to: SyslogAddress, log: &str) -> Self {
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let name = name.trim();
        let legal = (1..=255).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic());
        let (name, pid) = (if legal { name } else { "-" }, std::process::id());
        Self::new(to, DatagramForm::Syslog(format!(" {name} tollgate {pid} {log} - ")))
    }

    pub fn journal(to: PathBuf, log: &str) -> Self {
        let fields = format!("\nPRIORITY=6\nSYSLOG_FACILITY=3\nSYSLOG_IDENTIFIER=tollgate\nTOLLGATE_LOG={log}\n");
        Self::new(SyslogAddress::Unix(to), DatagramForm::Journal(fields))
    }

    fn new(to: SyslogAddress, form: DatagramForm) -> Self {
        Self { to, form, socket: None, connect_at: None, packet: Vec::new() }
    }

    /// Sends whole lines, or returns the last error and the number of lines lost.
    pub(super) fn write(&mut self, lines: &[u8]) -> Result<(), (io::Error, u64)> {
        let (mut lost, mut why) = (0, None);
        for line in lines.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
            if let Err(error) = self.send(line) {
                lost += 1;
                why = Some(error);
            }
        }
        self.packet.clear();
        self.packet.shrink_to(KEPT_BYTES);
        why.map_or(Ok(()), |error| Err((error, lost)))
    }

    fn send(&mut self, line: &[u8]) -> io::Result<()> {
        self.pack(line);
        let was_connected = self.socket.is_some();
        let error = match self.try_send() {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                return Err(io::Error::new(ErrorKind::TimedOut, "its reader is too slow"));
            }
            _ if is_too_long(&error) => {
                let what = format!("a line of {} bytes is too long for a datagram", line.len());
                return Err(io::Error::new(ErrorKind::InvalidInput, what));
            }
            _ => self.socket = None,
        }
        // The reader was restarted: its new socket gets what the old one did not take.
        if was_connected { self.try_send() } else { Err(error) }
    }

    fn pack(&mut self, line: &[u8]) {
        self.packet.clear();
        match &self.form {
            DatagramForm::Syslog(middle) => {
                let time = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
                for part in ["<", PRIORITY, ">1 ", &time, middle] {
                    self.packet.extend_from_slice(part.as_bytes());
                }
                self.packet.extend_from_slice(line);
            }
            // A line has no line break, so that its length need not be sent.
            DatagramForm::Journal(fields) => {
                self.packet.extend_from_slice(b"MESSAGE=");
                self.packet.extend_from_slice(line);
                self.packet.extend_from_slice(fields.as_bytes());
            }
        }
    }

    fn try_send(&mut self) -> io::Result<()> {
        let socket = match &self.socket {
            Some(socket) => socket,
            None => {
                let now = Instant::now();
                if self.connect_at.is_some_and(|at| now < at) {
                    return Err(io::Error::new(ErrorKind::NotConnected, "nobody listens there"));
                }
                match DatagramSocket::connect(&self.to) {
                    Ok(socket) => {
                        self.connect_at = None;
                        self.socket.insert(socket)
                    }
                    Err(error) => {
                        self.connect_at = Some(now + ABSENT_PAUSE);
                        return Err(error);
                    }
                }
            }
        };
        match socket {
            DatagramSocket::Unix(socket) => socket.send(&self.packet),
            DatagramSocket::Udp(socket) => socket.send(&self.packet),
        }
        .map(|_| ())
    }
}

impl DatagramSocket {
    fn connect(to: &SyslogAddress) -> io::Result<Self> {
        Ok(match to {
            SyslogAddress::Unix(path) => {
                let socket = UnixDatagram::unbound()?;
                socket.connect(path)?;
                socket.set_write_timeout(Some(STALLED))?;
                Self::Unix(socket)
            }
            SyslogAddress::Udp(address) => {
                let to = address.to_socket_addrs()?.next().ok_or(ErrorKind::NotFound)?;
                let any = match to {
                    SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
                    SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
                };
                let socket = UdpSocket::bind(any)?;
                socket.connect(to)?;
                socket.set_write_timeout(Some(STALLED))?;
                Self::Udp(socket)
            }
        })
    }
}

fn is_too_long(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::errno::Errno::EMSGSIZE as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receive(socket: &UnixDatagram) -> String {
        let mut buffer = vec![0; 1 << 20];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }

    #[test]
    fn each_line_is_one_datagram_of_its_form() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let socket = UnixDatagram::bind(&path).unwrap();
        let mut syslog = Datagrams::syslog(SyslogAddress::Unix(path.clone()), "access");
        syslog.write(b"{\"a\":1}\n{\"b\":2}\n").unwrap();
        for message in ["{\"a\":1}", "{\"b\":2}"] {
            let text = receive(&socket);
            let parts: Vec<&str> = text.splitn(8, ' ').collect();
            let pid = std::process::id().to_string();
            assert_eq!((parts[0], parts[3], parts[4], parts[5], parts[6]), ("<30>1", "tollgate", &*pid, "access", "-"));
            assert!(humantime::parse_rfc3339(parts[1]).is_ok() && parts[1].len() == 24, "{text}");
            assert!(!parts[2].is_empty());
            assert_eq!(parts[7], message);
        }
        let mut journal = Datagrams::journal(path, "access");
        journal.write(b"{\"a\":1}\n").unwrap();
        let expected =
            "MESSAGE={\"a\":1}\nPRIORITY=6\nSYSLOG_FACILITY=3\nSYSLOG_IDENTIFIER=tollgate\nTOLLGATE_LOG=access\n";
        assert_eq!(receive(&socket), expected);
    }

    #[test]
    fn a_line_too_long_for_a_datagram_is_lost_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let socket = UnixDatagram::bind(&path).unwrap();
        let mut journal = Datagrams::journal(path, "access");
        let long = "x".repeat(8 << 20);
        let (error, lost) = journal.write(format!("{long}\nshort\n").as_bytes()).unwrap_err();
        assert_eq!(lost, 1);
        assert!(error.to_string().contains("too long"), "{error}");
        assert!(receive(&socket).starts_with("MESSAGE=short\n"));
        assert!(journal.packet.capacity() <= 2 * KEPT_BYTES, "{}", journal.packet.capacity());
    }

    #[test]
    fn a_reader_that_comes_back_gets_lines_again_and_one_that_stalls_holds_up_for_a_bounded_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let mut syslog = Datagrams::syslog(SyslogAddress::Unix(path.clone()), "access");
        assert_eq!(syslog.write(b"1\n2\n3\n").unwrap_err().1, 3, "nobody listens");
        let first = UnixDatagram::bind(&path).unwrap();
        std::thread::sleep(2 * ABSENT_PAUSE);
        syslog.write(b"4\n").unwrap();
        assert!(receive(&first).ends_with(" 4"));
        // Restarted between two lines: none is lost.
        drop(first);
        std::fs::remove_file(&path).unwrap();
        let second = UnixDatagram::bind(&path).unwrap();
        syslog.write(b"5\n").unwrap();
        assert!(receive(&second).ends_with(" 5"));
        // It reads nothing: one line takes a second at most once its queue is full.
        let began = Instant::now();
        let lost = loop {
            if let Err((error, lost)) = syslog.write(b"6\n") {
                assert!(error.to_string().contains("too slow"), "{error}");
                break lost;
            }
        };
        assert_eq!(lost, 1);
        assert!(began.elapsed() < 5 * STALLED, "{:?}", began.elapsed());
        receive(&second);
        syslog.write(b"7\n").unwrap();
    }

    #[test]
    fn syslog_over_udp() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = SyslogAddress::Udp(socket.local_addr().unwrap().to_string());
        Datagrams::syslog(to, "access").write(b"line\n").unwrap();
        let mut buffer = [0; 512];
        let length = socket.recv(&mut buffer).unwrap();
        assert!(buffer.starts_with(b"<30>1 ") && buffer[..length].ends_with(b" access - line"));
    }

    #[test]
    fn a_socket_that_is_not_there_is_a_warning_and_one_of_another_kind_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let severities =
            |name: &str| absent("syslog", &at(name)).iter().map(|found| found.severity).collect::<Vec<_>>();
        use crate::problem::Severity::{Error, Warning};
        assert_eq!(severities("none"), [Warning]);
        drop(UnixDatagram::bind(at("stale")).unwrap());
        assert_eq!(severities("stale"), [Warning]);
        let _stream = std::os::unix::net::UnixListener::bind(at("stream")).unwrap();
        assert_eq!(severities("stream"), [Error]);
        let _good = UnixDatagram::bind(at("good")).unwrap();
        assert_eq!(severities("good"), []);
    }
}
