//! Real applications, each on a free port, that report what they read from a request. tests/install.sh installs their
//! dependencies; a missing program fails the test with a message.

use crate::harness::*;
use crate::servers::Process;
use crate::support::HINT;
use crate::support::repository;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Rack,
    Grape,
    Php,
    Django,
    Flask,
    Express,
    Go,
}

impl Kind {
    pub const ALL: [Self; 7] = [Self::Rack, Self::Grape, Self::Php, Self::Django, Self::Flask, Self::Express, Self::Go];
}

pub struct Reader {
    pub kind: Kind,
    pub address: SocketAddr,
    /// Declared before the folder, so that they are stopped before it is removed.
    processes: Vec<Process>,
    folder: Folder,
}

fn installed(name: &str) -> PathBuf {
    let path = repository("target/readers").join(name);
    assert!(path.exists(), "{} is missing: {HINT}", path.display());
    path
}

fn app(name: &str) -> PathBuf {
    repository("tests/readers/apps").join(name)
}

impl Reader {
    pub fn start(kind: Kind) -> Self {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let mut reader = Self { kind, address, processes: Vec::new(), folder: Folder::new("reader") };
        let port = address.port().to_string();
        match kind {
            Kind::Rack => reader.puma("rack.ru"),
            Kind::Grape => reader.puma("grape.ru"),
            Kind::Php => reader.php(),
            Kind::Django => reader.spawn(python("reader_django.py").arg(port)),
            Kind::Flask => reader.spawn(python("reader_flask.py").arg(port)),
            Kind::Express => reader.spawn(
                Command::new("node").env("NODE_PATH", installed("node_modules")).arg(app("reader.js")).arg(port),
            ),
            Kind::Go => reader.spawn(Command::new(installed("reader-go")).arg(port)),
        }
        reader.wait(address);
        reader
    }

    fn puma(&mut self, script: &str) {
        let bind = format!("tcp://{}", self.address);
        let arguments = ["-b", &bind, "-t", "4:8", "-w", "0", "--quiet", "-e", "production"];
        self.spawn(Command::new("puma").args(arguments).arg(app(script)));
    }

    /// nginx in front of a few FastCGI processes of PHP, started separately so that each can be stopped.
    fn php(&mut self) {
        let workers: Vec<_> = (0..3).map(|_| SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()))).collect();
        for worker in &workers {
            self.spawn(
                Command::new("php-cgi")
                    .args(["-n", "-d", "display_errors=0", "-b", &worker.to_string()])
                    .env("PHP_FCGI_MAX_REQUESTS", "0"),
            );
        }
        workers.iter().for_each(|worker| self.wait(*worker));
        let folder = self.folder.0.display();
        let temp: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|name| format!("  {name}_temp_path {folder}/{name};\n"))
            .concat();
        let servers: String = workers.iter().map(|worker| format!("    server {worker};\n")).collect();
        let (script, address) = (app("reader.php"), self.address);
        let config = self.folder.write(
            "nginx.conf",
            &format!(
                "daemon off;\nmaster_process off;\npid {folder}/nginx.pid;\nerror_log {folder}/nginx.log crit;\n\
                 events {{ worker_connections 256; }}\n\
                 http {{\n{temp}  access_log off;\n  client_max_body_size 0;\n  keepalive_requests 10000000;\n\
                 \x20 keepalive_timeout 600s;\n  large_client_header_buffers 8 64k;\n\
                 \x20 upstream php {{\n    least_conn;\n{servers}  }}\n\
                 \x20 server {{\n    listen {address};\n    location / {{\n\
                 \x20     fastcgi_pass php;\n      fastcgi_buffer_size 64k;\n      fastcgi_buffers 8 64k;\n\
                 \x20     fastcgi_param SCRIPT_FILENAME {script};\n      fastcgi_param REQUEST_METHOD $request_method;\n\
                 \x20     fastcgi_param QUERY_STRING $query_string;\n      fastcgi_param CONTENT_TYPE $content_type;\n\
                 \x20     fastcgi_param CONTENT_LENGTH $content_length;\n      fastcgi_param REQUEST_URI $request_uri;\n\
                 \x20     fastcgi_param DOCUMENT_URI $document_uri;\n\
                 \x20     fastcgi_param SERVER_PROTOCOL $server_protocol;\n    }}\n  }}\n}}\n",
                script = script.display(),
            ),
        );
        self.spawn(Command::new("/usr/sbin/nginx").arg("-c").arg(config));
    }

    fn spawn(&mut self, command: &mut Command) {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.folder.file("process.log")).unwrap();
        command
            .env("READER_LOG", self.folder.file("reports.jsonl"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        self.processes.push(Process::start(command));
    }

    fn wait(&mut self, address: SocketAddr) {
        let deadline = Instant::now() + 6 * PATIENCE;
        while TcpStream::connect(address).is_err() {
            let ended = self.processes.iter_mut().any(Process::has_ended);
            assert!(!ended, "{:?} ended: {}\n{HINT}", self.kind, self.said());
            assert!(Instant::now() < deadline, "{:?} does not listen: {}", self.kind, self.said());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn said(&self) -> String {
        std::fs::read_to_string(self.folder.file("process.log")).unwrap_or_default()
    }

    /// Clears the reports so far.
    pub fn forget(&self) {
        drop(std::fs::File::create(self.folder.file("reports.jsonl")));
    }

    /// The reports so far of requests in which the application read anything, whether or not it responded.
    pub fn reports(&self) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(self.folder.file("reports.jsonl")).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let said = self.said();
            eprintln!("--- what {:?} said:\n{}", self.kind, &said[said.len().saturating_sub(2000)..]);
        }
    }
}

fn python(script: &str) -> Command {
    let venv = std::env::var_os("TOLLGATE_PY_VENV").map_or_else(|| repository("target/py-clients"), Into::into);
    let python = venv.join("bin/python");
    assert!(python.exists(), "{} is missing: {HINT}", python.display());
    let mut command = Command::new(python);
    command.arg("-B").arg(app(script));
    command
}
