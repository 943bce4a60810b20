//! A real Prometheus, with the configuration that a test writes.

use super::{Process, free_port};
use crate::harness::{Answer, Client, Folder, eventually};
use std::process::{Command, Stdio};

pub struct Prometheus {
    port: u16,
    _process: Process,
    _folder: Folder,
}

impl Prometheus {
    /// Scrapes twice a second: a scrape may not take longer than the time between two. `rules` are the names of files in the folder.
    pub fn start(folder: Folder, targets: &[String], rules: &[&str]) -> Self {
        let port = free_port();
        let targets: Vec<String> = targets.iter().map(|target| format!("\"{target}\"")).collect();
        let config = format!(
            "global: {{scrape_interval: 500ms, scrape_timeout: 500ms, evaluation_interval: 250ms}}\nrule_files: [{}]\n\
             scrape_configs:\n  - job_name: tollgate\n    static_configs:\n      - targets: [{}]\n",
            rules.join(", "),
            targets.join(", ")
        );
        let config = folder.write("prometheus.yml", &config);
        let process = Process::start(
            Command::new("prometheus")
                .arg(format!("--config.file={}", config.display()))
                .arg(format!("--storage.tsdb.path={}", folder.file("data").display()))
                .arg(format!("--web.listen-address=127.0.0.1:{port}"))
                .arg("--enable-feature=exemplar-storage")
                .stdout(Stdio::null())
                .stderr(Stdio::null()),
        );
        eventually("Prometheus listens", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
        let prometheus = Self { port, _process: process, _folder: folder };
        // It listens before its storage is open, and answers everything with 503 until then.
        eventually("Prometheus is ready", || prometheus.get("/-/ready").status == 200);
        prometheus
    }

    fn get(&self, path: &str) -> Answer {
        let mut client = Client::connect(([127, 0, 0, 1], self.port).into());
        client.send_head(&format!("GET {path} HTTP/1.1\nHost: p.test\n\n"));
        client.answer()
    }

    /// What its API answers.
    pub fn api(&self, path: &str) -> serde_json::Value {
        serde_json::from_str(&self.get(&format!("/api/v1/{path}")).text()).unwrap()
    }

    /// The value of an expression now.
    pub fn query(&self, expression: &str) -> serde_json::Value {
        let encoded = percent_encoding::utf8_percent_encode(expression, percent_encoding::NON_ALPHANUMERIC);
        self.api(&format!("query?query={encoded}"))
    }
}
