//! Replaces this process by one of the binary as it is on disk now, while clients notice nothing: the old process starts the
//! new one and passes it the listening sockets themselves, so that no connection in their queues is lost. The new one accepts
//! when everything that can fail is done; until then the old one serves as before, and goes on if the new one gives up.
//!
//! They speak over a pair of connected sockets, one of which is the new process's standard input. Nobody else can connect to it,
//! so there is no path, mode or user to get wrong.

use super::listening::{ListenPlace, ListeningSocket};
use crate::sandbox;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
    sockopt::{Timeout, set_socket_timeout, socket_domain, socket_peercred, socket_type},
};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// In the environment of a process that is to replace the one that started it.
const VARIABLE: &str = "TOLLGATE_UPGRADE";
/// Its value: the messages' version.
const VERSION: &str = "1";
/// How long a new process may take until it can accept connections.
const STARTED_WITHIN: Duration = Duration::from_secs(45);
/// How long the other one may take for what is done in no time.
const ANSWERED_WITHIN: Duration = Duration::from_secs(10);
/// Of the reason for which a new process gives up.
const MOST_TEXT: usize = 16 * 1024;
/// A reason of which every character is escaped.
const LARGEST_MESSAGE: usize = 128 * 1024;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum HandoverMessage {
    /// From the old process: goes with a listening socket.
    Socket {
        /// The service manager holds it as well.
        managers: bool,
    },
    /// From the old one: that was all.
    NoMoreSockets,
    /// From the new one: nothing can fail any more.
    Prepared,
    /// From the old one: accept connections.
    TakeOver,
    /// From the new one: connections are accepted.
    Serving,
    /// From the new one: it ends, for this reason.
    Failed(String),
}

fn send(to: impl AsFd, message: &HandoverMessage, socket: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let sockets = socket.map(|socket| [socket]);
    if let Some(sockets) = &sockets
        && !control.push(SendAncillaryMessage::ScmRights(sockets))
    {
        return Err(io::Error::other("no space for a descriptor"));
    }
    // Who is gone must not end this process by a signal.
    sendmsg(to, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The next message. `UnexpectedEof`: the other process has ended.
fn receive(from: impl AsFd, within: Duration) -> io::Result<(HandoverMessage, Option<OwnedFd>)> {
    set_socket_timeout(&from, Timeout::Recv, Some(within))?;
    let mut bytes = vec![0; LARGEST_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(&from, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => return Err(ErrorKind::TimedOut.into()),
            received => break received?.bytes,
        }
    };
    let mut sockets = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(sockets) => Some(sockets),
        _ => None,
    });
    let socket = sockets.next().and_then(|mut sockets| sockets.next());
    match bytes.get(..received) {
        Some([]) | None => Err(ErrorKind::UnexpectedEof.into()),
        Some(bytes) => Ok((serde_json::from_slice(bytes)?, socket)),
    }
}

/// How this process was started, and its successor is to be.
pub struct Successors {
    program: PathBuf,
    arguments: Vec<OsString>,
}

/// The file that this process was started from, and an upgrade starts.
pub fn program() -> io::Result<PathBuf> {
    match std::env::args_os().next().map(PathBuf::from) {
        // Not what a symbolic link leads to: it may lead to another version by then.
        Some(path) if path.components().count() > 1 => std::path::absolute(path),
        _ => std::env::current_exe(),
    }
}

/// A process that accepts connections in place of this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Successor {
    pub(super) pid: u32,
}

impl Successors {
    /// Called at the start: an upgrade puts another file at the path, and the working folder may change.
    pub fn of_this_process() -> io::Result<Self> {
        Ok(Self { program: program()?, arguments: std::env::args_os().skip(1).collect() })
    }

    /// Starts a process that takes over the sockets. Returns when it accepts connections, or when it never will: then it has
    /// ended, and nothing has changed. Blocks.
    pub(super) fn start(&self, sockets: &[ListeningSocket]) -> Result<Successor, String> {
        let program = self.program.display();
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|error| format!("no socket for the new process: {error}"))?;
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::from(theirs)).env(VARIABLE, VERSION);
        // They name this process, and what it was passed.
        ["WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"].iter().for_each(|name| {
            command.env_remove(name);
        });
        match sandbox::to_pass_on() {
            (name, Some(value)) => command.env(name, value),
            (name, None) => command.env_remove(name),
        };
        let child = command.spawn().map_err(|error| match sandbox::current() {
            Some(sandbox) if error.kind() == ErrorKind::PermissionDenied => {
                let folders: Vec<_> = sandbox.programs().map(|folder| folder.display().to_string()).collect();
                let folders = folders.join(", ");
                format!(
                    "{program} cannot be started: {error}; the sandbox that this process is in was allowed to start programs in \
                     {folders}: if it is elsewhere by now, restart tollgate"
                )
            }
            _ => format!("{program} cannot be started: {error}"),
        })?;
        // It held the other end.
        drop(command);
        let pid = child.id();
        let mut child = Starting(Some(child));
        if let Err(error) = hand_over(&ours, sockets) {
            // Asked before it is killed, which it is with this: the reason may be that it has ended.
            let ended = if has_ended(&error) { child.ended() } else { None };
            return Err(match (ended, error.kind()) {
                (Some(status), _) => format!("the new process has ended ({status}): {program}; see its log"),
                (None, ErrorKind::TimedOut) => {
                    let within = humantime::format_duration(STARTED_WITHIN);
                    format!("the new process did not start within {within}, and was ended: {program}")
                }
                (None, _) => error.to_string(),
            });
        }
        if let Some(mut child) = child.0.take() {
            let watch = move || match child.wait() {
                // Stopped, or replaced as well.
                Ok(status) if status.success() => log::info!("the process that replaced this one has ended"),
                Ok(status) => log::error!("the process that replaced this one has ended: {status}"),
                Err(error) => log::error!("the process that replaced this one is lost: {error}"),
            };
            // Without it, the end of the new process would only be seen by the service manager.
            let _ = std::thread::Builder::new().name("successor".into()).spawn(watch);
        }
        Ok(Successor { pid })
    }
}

fn has_ended(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe | ErrorKind::ConnectionReset)
}

fn hand_over(to: &OwnedFd, sockets: &[ListeningSocket]) -> io::Result<()> {
    set_socket_timeout(to, Timeout::Send, Some(ANSWERED_WITHIN))?;
    for socket in sockets {
        send(to, &HandoverMessage::Socket { managers: socket.managers }, Some(socket.as_fd()))?;
    }
    send(to, &HandoverMessage::NoMoreSockets, None)?;
    expect(to, STARTED_WITHIN, |message| matches!(message, HandoverMessage::Prepared))?;
    send(to, &HandoverMessage::TakeOver, None)?;
    expect(to, ANSWERED_WITHIN, |message| matches!(message, HandoverMessage::Serving))
}

/// The next message must be this one.
fn expect(from: impl AsFd, within: Duration, is_it: impl Fn(&HandoverMessage) -> bool) -> io::Result<()> {
    match receive(from, within)?.0 {
        message if is_it(&message) => Ok(()),
        HandoverMessage::Failed(why) => Err(io::Error::other(why)),
        other => Err(io::Error::other(format!("the other process speaks another version: {other:?}"))),
    }
}

/// A process that does not serve yet. It ends when this is dropped.
struct Starting(Option<Child>);

impl Starting {
    /// How it has ended. Its sockets close a moment before it does.
    fn ended(&mut self) -> Option<std::process::ExitStatus> {
        let deadline = Instant::now() + Duration::from_secs(1);
        loop {
            match self.0.as_mut()?.try_wait() {
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                ended => return ended.ok().flatten(),
            }
        }
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // If it has ended by itself, there is nothing to kill.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The process that started this one to be replaced by it.
pub struct Predecessor {
    channel: OwnedFd,
    replaced: AtomicBool,
}

impl Predecessor {
    /// `None`: this process was started by somebody else.
    pub(super) fn of_this_process() -> io::Result<Option<Self>> {
        match std::env::var_os(VARIABLE) {
            None => return Ok(None),
            Some(version) if version == VERSION => {}
            Some(_) => return Err(io::Error::other(format!("{VARIABLE} names another version of the hand-over"))),
        }
        let stdin = rustix::stdio::stdin();
        let ours = rustix::process::geteuid();
        let is_pair =
            socket_domain(stdin) == Ok(AddressFamily::UNIX) && socket_type(stdin) == Ok(SocketType::SEQPACKET);
        if !is_pair || socket_peercred(stdin).map(|peer| peer.uid) != Ok(ours) {
            let why = format!("{VARIABLE} is set, and standard input is no socket of a process of this user");
            return Err(io::Error::other(why));
        }
        let channel = stdin.try_clone_to_owned()?;
        // It must end with the old process, and nothing else is to be read there.
        rustix::stdio::dup2_stdin(std::fs::File::open("/dev/null")?)?;
        set_socket_timeout(&channel, Timeout::Send, Some(ANSWERED_WITHIN))?;
        Ok(Some(Self { channel, replaced: AtomicBool::new(false) }))
    }

    /// The listening sockets that it passes.
    pub(super) fn sockets(&self) -> io::Result<Vec<(ListenPlace, ListeningSocket)>> {
        let mut sockets = Vec::new();
        loop {
            match receive(&self.channel, ANSWERED_WITHIN)? {
                (HandoverMessage::Socket { managers }, Some(socket)) => {
                    sockets.push(ListeningSocket::passed(socket, managers)?);
                }
                (HandoverMessage::NoMoreSockets, None) => return Ok(sockets),
                (other, _) => return Err(io::Error::other(format!("unexpected message: {other:?}"))),
            }
        }
    }

    /// Waits for its word that this process is to accept connections. An error: it goes on itself.
    pub(super) fn may_take_over(&self) -> io::Result<()> {
        send(&self.channel, &HandoverMessage::Prepared, None)?;
        expect(&self.channel, ANSWERED_WITHIN, |message| matches!(message, HandoverMessage::TakeOver))
    }

    /// This process accepts connections.
    pub(super) fn serving(&self) {
        self.replaced.store(true, Ordering::Relaxed);
        // If it is gone, this process serves alone, as it should.
        let _ = send(&self.channel, &HandoverMessage::Serving, None);
    }

    /// This process ends, and the old one goes on.
    pub fn gave_up(&self, why: &str) {
        if !self.replaced.load(Ordering::Relaxed) {
            let end = (0..=why.len().min(MOST_TEXT)).rev().find(|end| why.is_char_boundary(*end)).unwrap_or(0);
            let why = why.get(..end).unwrap_or_default().to_owned();
            // It sees that this process ends.
            let _ = send(&self.channel, &HandoverMessage::Failed(why), None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    fn at(channel: OwnedFd) -> Predecessor {
        Predecessor { channel, replaced: AtomicBool::new(false) }
    }

    #[test]
    fn sockets_arrive_and_the_new_process_accepts_when_both_agree() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let sockets = [ListeningSocket::passed(listener.into(), true).unwrap().1];
        let (ours, theirs) = pair();
        std::thread::scope(|scope| {
            let old = scope.spawn(|| hand_over(&ours, &sockets));
            let predecessor = at(theirs);
            let passed = predecessor.sockets().unwrap();
            assert_eq!(passed.iter().map(|(place, _)| place.clone()).collect::<Vec<_>>(), [ListenPlace::Tcp(address)]);
            assert!(passed[0].1.managers);
            predecessor.may_take_over().unwrap();
            assert!(!old.is_finished(), "before the new one accepts");
            predecessor.serving();
            old.join().unwrap().unwrap();
            // Nobody reads it any more.
            predecessor.gave_up("too late");
        });
    }

    #[test]
    fn a_new_process_that_gives_up_says_why_and_one_that_dies_is_noticed() {
        let (ours, theirs) = pair();
        std::thread::scope(|scope| {
            let old = scope.spawn(|| hand_over(&ours, &[]));
            let predecessor = at(theirs);
            assert!(predecessor.sockets().unwrap().is_empty());
            predecessor.gave_up(&format!("broken{}", "ü".repeat(MOST_TEXT)));
            let why = old.join().unwrap().unwrap_err().to_string();
            assert!(why.starts_with("broken") && why.len() <= MOST_TEXT, "{}", why.len());
        });
        let (ours, theirs) = pair();
        drop(theirs);
        assert!(has_ended(&hand_over(&ours, &[]).unwrap_err()));
        // And the other way round.
        let (ours, theirs) = pair();
        send(&ours, &HandoverMessage::NoMoreSockets, None).unwrap();
        drop(ours);
        let predecessor = at(theirs);
        assert!(predecessor.sockets().unwrap().is_empty());
        assert!(predecessor.may_take_over().is_err(), "the old one has ended: a stop, and this one must not serve on");
    }

    #[test]
    fn a_message_of_another_version_is_an_error() {
        let (ours, theirs) = pair();
        rustix::net::send(&ours, b"{\"hello\":7}", SendFlags::empty()).unwrap();
        assert!(receive(&theirs, ANSWERED_WITHIN).is_err());
        send(&ours, &HandoverMessage::Socket { managers: false }, None).unwrap();
        assert!(at(theirs).sockets().is_err(), "without a socket");
    }
}
