//! Shared by tests with real programs: Puma with a Ruby application, and a SQLite store that the command line has filled. A
//! missing program fails the test with a hint how to install it.

use crate::harness::*;
pub use crate::servers::{HINT, repository};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

pub const SECOND: Duration = Duration::from_secs(1);

/// The head of a GET.
pub fn get(token: &str, target: &str) -> String {
    format!("GET {target} HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: {token}\n\n")
}

/// The status of a GET on a new connection.
pub fn status(gateway: &Gateway, token: &str) -> u16 {
    gateway.ask(&get(token, "/api/v3/user")).status
}

/// Runs a program. If it cannot be started, fails with the hint.
pub fn run(command: &mut Command) -> Output {
    let output = command.stdin(Stdio::null()).output();
    output.unwrap_or_else(|error| panic!("{} cannot be started: {error}; {HINT}", command.get_program().display()))
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// A Ruby backend, ended by its pid when it is dropped.
pub struct Puma {
    pub address: SocketAddr,
    child: Child,
    folder: Folder,
}

impl Puma {
    /// Starts a rackup file of `tests/backend`. `tokens` is `token=user,token=user`.
    pub fn start(script: &str, tokens: &str) -> Self {
        let folder = Folder::new("test");
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let log = std::fs::File::create(folder.0.join("puma.log")).unwrap();
        let child = Command::new("puma")
            .args(["-b", &format!("tcp://{address}"), "-t", "4:8", "-w", "0", "--quiet", "-e", "production"])
            .arg(repository("tests/backend").join(script))
            .env("BACKEND_TOKENS", tokens)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("puma cannot be started: {error}; {HINT}"));
        let mut puma = Self { address, child, folder };
        // Loading Grape takes a while, longer when other tests use the cores.
        let deadline = Instant::now() + 3 * PATIENCE;
        while TcpStream::connect(address).is_err() {
            let ended = puma.child.try_wait().unwrap();
            assert!(ended.is_none(), "puma ended ({ended:?}): {}\n{HINT}", puma.log());
            assert!(Instant::now() < deadline, "puma does not listen: {}", puma.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        puma
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.0.join("puma.log")).unwrap_or_default()
    }
}

impl Drop for Puma {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        if std::thread::panicking() {
            eprintln!("--- output of puma:\n{}", self.log());
        }
    }
}

/// A SQLite store that `tollgate token import` has filled.
pub struct Store {
    pub path: PathBuf,
    config: PathBuf,
    _folder: Folder,
}

impl Store {
    /// With one user for each token.
    pub fn with<'a>(tokens: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let lines = tokens.into_iter().map(|(token, user)| format!("{{\"token\":\"{token}\",\"user\":\"{user}\"}}\n"));
        Self::imported(&lines.collect::<String>())
    }

    /// With the tokens in these JSON lines.
    pub fn imported(lines: &str) -> Self {
        let folder = Folder::new("test");
        let path = folder.0.join("tokens.db");
        let config = folder.write(
            "store.toml",
            "[store]\nkind = \"sqlite\"\npath = \"tokens.db\"\n\
             [[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n",
        );
        folder.write("tokens.jsonl", lines);
        let store = Self { path, config, _folder: folder };
        let file = store.config.with_file_name("tokens.jsonl");
        let output = store.token(&["import"], &[file.to_str().unwrap()]);
        assert!(output.status.success(), "{}", stderr(&output));
        store
    }

    /// The section that makes a gateway use this store.
    pub fn section(&self) -> String {
        format!("[store]\nkind = \"sqlite\"\npath = \"{}\"\n", self.path.display())
    }

    /// `tollgate token COMMAND --config … ARGUMENTS`.
    pub fn token(&self, command: &[&str], arguments: &[&str]) -> Output {
        run(tollgate().arg("token").args(command).arg("--config").arg(&self.config).args(arguments))
    }

    /// Creates a token, and returns it.
    pub fn create(&self, user: &str) -> String {
        let output = self.token(&["create"], &["--user", user]);
        assert!(output.status.success(), "{}", stderr(&output));
        stdout(&output).trim().to_owned()
    }
}
