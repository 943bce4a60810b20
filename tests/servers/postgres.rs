//! A PostgreSQL server for a test, from Debian's package: on a free loopback port and a socket in its folder.

use super::tls::Authority;
use super::{Folder, HINT, PATIENCE, Process, Server, eventually, free_port, repository, run};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

pub struct Postgres {
    folder: Folder,
    port: u16,
    process: Option<Process>,
    authority: Option<Authority>,
    settings: Vec<String>,
}

impl Postgres {
    /// Plain text; no passwords, except for the user `guarded` with `pa55-word`.
    pub fn start() -> Self {
        Self::new(None)
    }

    /// Accepts encrypted connections only, except on the Unix socket.
    pub fn start_with_tls(authority: Authority) -> Self {
        Self::new(Some(authority))
    }

    fn new(authority: Option<Authority>) -> Self {
        // A socket's path must be short.
        let folder = Folder::new("pg");
        run(Command::new("cp").arg("-r").arg(template()).arg(folder.file("data")));
        let host = if authority.is_some() { "hostssl" } else { "host" };
        let rules = format!(
            "local all all trust\n{host} all guarded 127.0.0.1/32 scram-sha-256\n{host} all all 127.0.0.1/32 trust\n\
             local replication all trust\n"
        );
        std::fs::write(folder.file("data/pg_hba.conf"), rules).unwrap();
        if let Some(authority) = &authority {
            std::fs::copy(authority.certificate(), folder.file("data/server.crt")).unwrap();
            std::fs::copy(authority.key(), folder.file("data/server.key")).unwrap();
            run(Command::new("chmod").arg("600").arg(folder.file("data/server.key")));
        }
        give_away(&folder.0);
        let mut server = Self { folder, port: free_port(), process: None, authority, settings: Vec::new() };
        server.start_again();
        server
    }

    /// Over TCP, as superuser.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Over the socket in this folder.
    pub fn socket(&self) -> &Path {
        &self.folder.0
    }

    pub const fn authority(&self) -> Option<&Authority> {
        self.authority.as_ref()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.file("log")).unwrap_or_default()
    }

    /// The result of a query, a line for each row and `|` between columns.
    pub fn psql(&self, database: &str, sql: &str) -> String {
        self.try_psql(database, sql).unwrap_or_else(|why| panic!("{sql}: {why}"))
    }

    pub fn try_psql(&self, database: &str, sql: &str) -> Result<String, String> {
        let output = Command::new(program("psql"))
            .env("PGOPTIONS", "-c default_transaction_read_only=off")
            .args(["-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-d", database, "-h"])
            .arg(&self.folder.0)
            .args(["-p", &self.port.to_string(), "-c", sql])
            .output()
            .unwrap_or_else(|error| panic!("psql cannot be started: {error}; {HINT}"));
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    /// An empty database.
    pub fn create_database(&self, name: &str) {
        self.psql("postgres", &format!("CREATE DATABASE {name}"));
    }

    /// A standby of this server.
    pub fn standby(&self) -> Self {
        self.standby_with(&[])
    }

    /// A standby that does not apply changes from here on.
    pub fn late_standby(&self) -> Self {
        self.standby_with(&["recovery_min_apply_delay=1h"])
    }

    fn standby_with(&self, settings: &[&str]) -> Self {
        let folder = Folder::new("pg");
        give_away(&folder.0);
        run(as_nobody(&program("pg_basebackup"))
            .arg("-h")
            .arg(&self.folder.0)
            .args(["-p", &self.port.to_string(), "-U", "postgres", "-R", "-X", "stream", "-c", "fast", "-D"])
            .arg(folder.file("data")));
        let settings = settings.iter().map(|setting| (*setting).to_owned()).collect();
        let mut standby = Self { folder, port: free_port(), process: None, authority: None, settings };
        standby.start_again();
        standby
    }

    fn everybody(&self, process: &Process) -> Vec<u32> {
        let mut pids = vec![process.pid()];
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // `PID (NAME) STATE PARENT …`, where a name may hold anything.
            let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            let parent = stat.rsplit(')').next().and_then(|rest| rest.split(' ').nth(2)?.parse().ok());
            if parent == Some(process.pid()) {
                pids.push(pid);
            }
        }
        pids
    }
}

impl Server for Postgres {
    /// Like a crash.
    fn stop(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        let everybody = self.everybody(&process);
        signal("CONT", &everybody);
        process.signal("QUIT");
        let deadline = Instant::now() + PATIENCE;
        while !process.has_ended() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        process.kill();
        drop(std::fs::remove_file(self.folder.file("data/postmaster.pid")));
    }

    /// On the same port, with the same data.
    fn start_again(&mut self) {
        let mut command = as_nobody(&program("postgres"));
        command.arg("-D").arg(self.folder.file("data")).args(["-p", &self.port.to_string()]);
        let socket = format!("unix_socket_directories={}", self.folder.0.display());
        let ssl = format!("ssl={}", if self.authority.is_some() { "on" } else { "off" });
        for setting in [
            "listen_addresses=127.0.0.1",
            &socket,
            &ssl,
            "fsync=off",
            "full_page_writes=off",
            "shared_buffers=32MB",
            "max_connections=60",
            "autovacuum=off",
            "log_min_messages=log",
        ] {
            command.args(["-c", setting]);
        }
        for setting in &self.settings {
            command.args(["-c", setting]);
        }
        let log = std::fs::OpenOptions::new().append(true).create(true).open(self.folder.file("log")).unwrap();
        self.process = Some(Process::start(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log)));
        eventually("PostgreSQL answers", || self.try_psql("postgres", "SELECT 1").is_ok());
    }

    /// The kernel accepts connections, and nothing responds.
    fn freeze(&self) {
        let process = self.process.as_ref().unwrap();
        // The parent first, so that no child is missed.
        process.signal("STOP");
        signal("STOP", &self.everybody(process));
    }

    fn thaw(&self) {
        signal("CONT", &self.everybody(self.process.as_ref().unwrap()));
    }

    /// Cuts every connection of a client.
    fn cut(&self) {
        let others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
            WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
        self.psql("postgres", others);
    }

    /// Affects existing sessions as well, from their next statement on.
    fn read_only(&self, yes: bool) {
        let value = if yes { "on" } else { "off" };
        self.psql("postgres", &format!("ALTER SYSTEM SET default_transaction_read_only = {value}"));
        self.psql("postgres", "SELECT pg_reload_conf()");
        eventually("the setting is applied", || {
            let applied =
                "SELECT setting FROM pg_file_settings WHERE name = 'default_transaction_read_only' AND applied";
            self.psql("postgres", applied) == value
        });
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Sends a signal by name to several processes.
pub fn signal(name: &str, pids: &[u32]) {
    let pids = pids.iter().map(u32::to_string);
    // Some may have ended meanwhile.
    drop(Command::new("kill").arg(format!("-{name}")).args(pids).stderr(Stdio::null()).status());
}

/// A data folder as initdb makes it, kept between runs.
fn template() -> PathBuf {
    static MADE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one = MADE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let version = program("postgres").parent().unwrap().parent().unwrap().file_name().unwrap().to_owned();
    let kept = repository("target").join(format!("postgres-template-{}", version.to_string_lossy()));
    if kept.join("PG_VERSION").exists() {
        return kept;
    }
    let folder = Folder::new("initdb");
    give_away(&folder.0);
    run(as_nobody(&program("initdb"))
        .args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync", "-D"])
        .arg(folder.file("data")));
    let made = repository("target").join(format!("postgres-template-{}", std::process::id()));
    std::fs::create_dir_all(repository("target")).unwrap();
    run(Command::new("cp").arg("-r").arg(folder.file("data")).arg(&made));
    // Another process may have been first.
    if std::fs::rename(&made, &kept).is_err() {
        drop(std::fs::remove_dir_all(&made));
    }
    kept
}

/// A program of the newest version that is installed.
fn program(name: &str) -> PathBuf {
    let root = Path::new("/usr/lib/postgresql");
    let mut versions: Vec<(u32, PathBuf)> = std::fs::read_dir(root)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin").join(name))))
        .filter(|(_, path)| path.exists())
        .collect();
    versions.sort();
    versions.pop().unwrap_or_else(|| panic!("PostgreSQL's {name} is not installed; {HINT}")).1
}

/// PostgreSQL refuses to run as root.
fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata("/proc/self").unwrap().uid() == 0
}

pub(super) fn as_nobody(program: &Path) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(program).current_dir("/");
    command
}

pub(super) fn give_away(folder: &Path) {
    run(Command::new("chmod").arg("-R").arg("go-rwx").arg(folder));
    if is_root() {
        run(Command::new("chown").args(["-R", "postgres:postgres"]).arg(folder));
    }
}
