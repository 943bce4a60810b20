//! Real token stores for the tests, from Debian's packages, each on a free port in its own folder, ended by its pid when it
//! is dropped. Used by the tests with real gateways and by the contract suite.
#![allow(dead_code, reason = "not every test uses every fault")]

pub mod delay;
pub mod http;
pub mod nginx;
pub mod pgbouncer;
pub mod postgres;
pub mod prometheus;
pub mod redis;
pub mod tls;

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// What to do when a program is missing.
pub const HINT: &str = "run `bash tests/install.sh` (TOLLGATE_PY_VENV names another place for the Python clients)";

/// How long a server may take to start or stop.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A free port, below the kernel's ephemeral range (32768 and up), so that no other socket of the tests takes it before its
/// server does. Each is used once, starting at a number that differs between processes.
pub fn free_port() -> u16 {
    const PORTS: std::ops::Range<u32> = 12_000..32_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let next = std::process::id().wrapping_mul(613).wrapping_add(NEXT.fetch_add(1, Relaxed));
        let port = (PORTS.start + next % (PORTS.end - PORTS.start)) as u16;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

/// A temporary folder, removed when it is dropped.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new(name: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Relaxed);
        let path = std::env::temp_dir().join(format!("tollgate-{name}-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.file(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// A process that is killed when it is dropped.
pub struct Process {
    child: Child,
}

impl Process {
    pub fn start(command: &mut Command) -> Self {
        let name = command.get_program().display().to_string();
        Self { child: command.spawn().unwrap_or_else(|error| panic!("{name} cannot be started: {error}; {HINT}")) }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Sends a signal by name, like `STOP`.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([format!("-{name}"), self.pid().to_string()]).status().unwrap();
        assert!(status.success(), "kill -{name} {}", self.pid());
    }

    pub fn kill(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Faults to inject into a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is killed without closing its connections in an orderly way.
    Stop,
    /// It is started again with its data.
    Start,
    /// It accepts connections and does not respond.
    Freeze,
    Thaw,
    /// Every connection to it is closed.
    Cut,
    ReadOnly,
    Writable,
}

pub trait Server {
    fn stop(&mut self);
    fn start_again(&mut self);
    fn freeze(&self);
    fn thaw(&self);
    fn cut(&self);
    /// No effect on a server that is never written to.
    fn read_only(&self, _yes: bool) {}

    fn inject(&mut self, fault: Fault) {
        match fault {
            Fault::Stop => self.stop(),
            Fault::Start => self.start_again(),
            Fault::Freeze => self.freeze(),
            Fault::Thaw => self.thaw(),
            Fault::Cut => self.cut(),
            Fault::ReadOnly => self.read_only(true),
            Fault::Writable => self.read_only(false),
        }
    }
}

/// Waits until a condition is true.
pub fn eventually(what: &str, check: impl FnMut() -> bool) {
    within(PATIENCE, what, check);
}

pub fn within(patience: Duration, what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !check() {
        assert!(Instant::now() < deadline, "not within {patience:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Runs a program, and fails with its error output.
pub fn run(command: &mut Command) -> String {
    let name = command.get_program().display().to_string();
    let output = command.output().unwrap_or_else(|error| panic!("{name} cannot be started: {error}; {HINT}"));
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A file of this repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}
