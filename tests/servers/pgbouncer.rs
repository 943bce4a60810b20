//! PgBouncer between tollgate and a PostgreSQL server, from Debian's package.

use super::postgres::{Postgres, as_nobody, give_away};
use super::{Folder, Process, eventually, free_port};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::Stdio;

pub struct PgBouncer {
    #[expect(dead_code, reason = "gone with its owner")]
    folder: Folder,
    #[expect(dead_code, reason = "ended with its owner")]
    process: Process,
    port: u16,
}

impl PgBouncer {
    /// `mode`: "session" keeps a connection for each client, "transaction" gives it another one for each transaction.
    /// `size`: so many connections to the server.
    pub fn start(server: &Postgres, mode: &str, size: usize) -> Self {
        let (folder, port) = (Folder::new("pgbouncer"), free_port());
        let settings = format!(
            "[databases]\npostgres = host=127.0.0.1 port={} user=postgres\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {port}\nunix_socket_dir =\nauth_type = any\npool_mode = {mode}\ndefault_pool_size = {size}\n",
            server.port()
        );
        std::fs::write(folder.file("pgbouncer.ini"), settings).unwrap();
        give_away(&folder.0);
        let mut command = as_nobody(Path::new("pgbouncer"));
        command.arg("--quiet").arg(folder.file("pgbouncer.ini")).stdin(Stdio::null()).stderr(Stdio::null());
        let process = Process::start(&mut command);
        eventually("PgBouncer listens", || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok());
        Self { folder, process, port }
    }

    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }
}
