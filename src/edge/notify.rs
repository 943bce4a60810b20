//! Tells the service manager how the process is: sd_notify's protocol, a datagram for each message
//! (systemd's sd_notify(3)). Without NOTIFY_SOCKET nothing is said. It must not know why something is so.

use super::workers::WorkerDoors;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::time::Duration;

#[derive(Clone, Default)]
pub(super) struct ServiceManager(Option<Arc<(UnixDatagram, SocketAddr)>>);

impl ServiceManager {
    /// The one that started this process, if it wants to know.
    pub(super) fn of_this_process() -> Self {
        let Some(path) = std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()) else { return Self(None) };
        let made = address(path.as_encoded_bytes()).and_then(|address| {
            let socket = UnixDatagram::unbound()?;
            // A manager that does not read must not hold anything up.
            socket.set_nonblocking(true)?;
            Ok((socket, address))
        });
        match made {
            Ok(made) => Self(Some(Arc::new(made))),
            Err(error) => {
                log::warn!("NOTIFY_SOCKET cannot be used, the service manager is told nothing: {error}");
                Self(None)
            }
        }
    }

    pub(super) fn ready(&self) {
        self.say("READY=1\nSTATUS=serving");
    }

    /// A reload begins; [`ready`](Self::ready) ends it, however it went.
    pub(super) fn reloading(&self) {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
        self.say(&format!("RELOADING=1\nMONOTONIC_USEC={}", now.as_micros()));
    }

    /// Another process serves in place of this one: the manager watches that one from now on, and does not listen to this.
    pub(super) fn main_process(&self, pid: u32) {
        self.say(&format!("MAINPID={pid}"));
    }

    pub(super) fn stopping(&self) {
        self.say("STOPPING=1\nSTATUS=draining");
    }

    /// The last word, which `systemctl status` still shows when the process has ended.
    pub(super) fn stopped(&self, aborted: i64) {
        self.say(&match aborted {
            0 => "STATUS=stopped, all requests were served".to_owned(),
            aborted => format!("STATUS=stopped, {aborted} requests were aborted"),
        });
    }

    fn say(&self, message: &str) {
        if let Some(manager) = &self.0 {
            let (socket, address) = &**manager;
            // It has its own time-outs if this does not arrive.
            let _ = socket.send_to_addr(message.as_bytes(), address);
        }
    }

    /// Tells the watchdog that all is well, for as long as every worker's event loop answers. Comes back if nobody watches.
    pub(super) async fn watch(self, workers: WorkerDoors) {
        let Some(every) = watchdog(|name| std::env::var(name).ok(), std::process::id()) else { return };
        if self.0.is_none() {
            return;
        }
        let mut tick = tokio::time::interval(every);
        loop {
            tick.tick().await;
            if tokio::time::timeout(every, workers.answer()).await.is_ok_and(|all| all) {
                self.say("WATCHDOG=1");
            } else {
                log::error!("a worker's event loop does not respond: the watchdog is not told that all is well");
            }
        }
    }
}

/// A path, or a name behind `@`.
fn address(path: &[u8]) -> io::Result<SocketAddr> {
    match path.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(std::path::Path::new(std::str::from_utf8(path).map_err(io::Error::other)?)),
    }
}

/// Half of the time after which the manager gives this process up.
fn watchdog(variable: impl Fn(&str) -> Option<String>, own: u32) -> Option<Duration> {
    if variable("WATCHDOG_PID").is_some_and(|pid| pid.parse() != Ok(own)) {
        return None;
    }
    let microseconds: u64 = variable("WATCHDOG_USEC")?.parse().ok().filter(|time| *time > 0)?;
    Some(Duration::from_micros(microseconds / 2).max(Duration::from_millis(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdog_is_this_processs_own() {
        let every = |pid: Option<&str>, time: Option<&str>| {
            watchdog(|name| if name == "WATCHDOG_PID" { pid } else { time }.map(str::to_owned), 7)
        };
        assert_eq!(every(Some("7"), Some("30000000")), Some(Duration::from_secs(15)));
        assert_eq!(every(None, Some("2000")), Some(Duration::from_millis(1)));
        for (pid, time) in [(Some("8"), Some("30000000")), (Some("7"), None), (None, Some("0")), (None, Some("x"))] {
            assert_eq!(every(pid, time), None, "{pid:?} {time:?}");
        }
    }
}
