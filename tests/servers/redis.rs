//! Redis servers for a test: one, a master with a replica and three sentinels, or a cluster of three.

use super::tls::Authority;
use super::{Folder, PATIENCE, Process, Server, eventually, free_port, run};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

#[derive(Default)]
pub struct Options<'a> {
    /// Data survives a restart.
    pub durable: bool,
    /// Lines like `user name on >password ...`; the default user keeps all rights.
    pub users: &'a [&'a str],
    /// A second port, for TLS only.
    pub tls: Option<&'a Authority>,
    pub config: &'a [&'a str],
}

pub struct Redis {
    process: Option<Process>,
    folder: Folder,
    pub port: u16,
    pub tls_port: u16,
    sentinel: bool,
}

impl Redis {
    pub fn start(options: &Options<'_>) -> Self {
        let folder = Folder::new("redis");
        let (port, tls_port) = (free_port(), free_port());
        let mut config = vec![
            format!("port {port}"),
            "bind 127.0.0.1".into(),
            format!("dir {}", folder.0.display()),
            format!("unixsocket {}", folder.file("socket").display()),
            "save \"\"".into(),
            format!("appendonly {}", if options.durable { "yes" } else { "no" }),
        ];
        if let Some(authority) = options.tls {
            config.push(format!("tls-port {tls_port}"));
            config.push(format!("tls-cert-file {}", authority.certificate().display()));
            config.push(format!("tls-key-file {}", authority.key().display()));
            config.push(format!("tls-ca-cert-file {}", authority.ca().display()));
            config.push("tls-auth-clients no".into());
        }
        config.extend(options.users.iter().chain(options.config).map(|line| (*line).to_owned()));
        std::fs::write(folder.file("redis.conf"), config.join("\n")).unwrap();
        let mut server = Self { process: None, folder, port, tls_port, sentinel: false };
        server.start_again();
        server
    }

    pub fn sentinel(master: u16) -> Self {
        let folder = Folder::new("sentinel");
        let port = free_port();
        let config = format!(
            "port {port}\nbind 127.0.0.1\ndir {}\nsentinel monitor main 127.0.0.1 {master} 2\n\
             sentinel down-after-milliseconds main 1000\nsentinel failover-timeout main 6000\n",
            folder.0.display()
        );
        std::fs::write(folder.file("redis.conf"), config).unwrap();
        let mut server = Self { process: None, folder, port, tls_port: 0, sentinel: true };
        server.start_again();
        server
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.file("socket")
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Runs redis-cli, and fails on an error reply.
    pub fn cli(&self, arguments: &[&str]) -> String {
        run(Command::new("redis-cli").args(["-e", "-p", &self.port.to_string()]).args(arguments)).trim().to_owned()
    }

    /// The reply, also if it is an error; empty if there is no server.
    pub fn try_cli(&self, arguments: &[&str]) -> String {
        let output = Command::new("redis-cli").args(["-p", &self.port.to_string()]).args(arguments).output();
        String::from_utf8_lossy(&output.unwrap().stdout).trim().to_owned()
    }
}

impl Server for Redis {
    /// Like a crash.
    fn stop(&mut self) {
        self.process = None;
    }

    fn start_again(&mut self) {
        let mut command = Command::new("redis-server");
        command.arg(self.folder.file("redis.conf")).stdout(Stdio::null()).stderr(Stdio::null());
        if self.sentinel {
            command.arg("--sentinel");
        }
        self.process = Some(Process::start(&mut command));
        let deadline = Instant::now() + PATIENCE;
        while !self.try_cli(&["PING"]).contains("PONG") {
            let ended = self.process.as_mut().is_some_and(Process::has_ended);
            assert!(!ended && Instant::now() < deadline, "redis-server on port {} does not start", self.port);
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    fn freeze(&self) {
        self.process.as_ref().unwrap().signal("STOP");
    }

    fn thaw(&self) {
        self.process.as_ref().unwrap().signal("CONT");
    }

    /// Closes all connections to it.
    fn cut(&self) {
        self.cli(&["CLIENT", "KILL", "TYPE", "normal"]);
        self.cli(&["CLIENT", "KILL", "TYPE", "pubsub"]);
    }

    /// A replica of an unreachable master accepts no writes.
    fn read_only(&self, yes: bool) {
        self.cli(if yes { &["REPLICAOF", "127.0.0.1", "1"] } else { &["REPLICAOF", "NO", "ONE"] });
    }
}

/// A master with one replica, and three sentinels that watch `main`.
pub struct Watched {
    pub master: Redis,
    pub replica: Redis,
    pub sentinels: Vec<Redis>,
}

impl Watched {
    pub fn start() -> Self {
        let (master, replica) = (Redis::start(&Options::default()), Redis::start(&Options::default()));
        replica.cli(&["REPLICAOF", "127.0.0.1", &master.port.to_string()]);
        eventually("the replica is synchronized", || {
            replica.cli(&["INFO", "replication"]).contains("master_link_status:up")
        });
        let sentinels: Vec<_> = (0..3).map(|_| Redis::sentinel(master.port)).collect();
        for sentinel in &sentinels {
            eventually("the sentinels know each other", || {
                let info = sentinel.cli(&["INFO", "sentinel"]);
                info.contains("slaves=1") && info.contains("sentinels=3")
            });
        }
        Self { master, replica, sentinels }
    }

    pub fn addresses(&self) -> Vec<String> {
        self.sentinels.iter().map(Redis::address).collect()
    }
}

/// Three masters that share the slots, and behind them their replicas if there are any.
pub struct Cluster {
    pub nodes: Vec<Redis>,
}

impl Cluster {
    pub fn start() -> Self {
        Self::of(3, &[])
    }

    pub fn with_replicas() -> Self {
        let cluster = Self::of(6, &["--cluster-replicas", "1"]);
        for node in &cluster.nodes {
            eventually("every master has its replica", || {
                let info = node.cli(&["INFO", "replication"]);
                info.contains("connected_slaves:1") || info.contains("master_link_status:up")
            });
        }
        cluster
    }

    fn of(count: usize, more: &[&str]) -> Self {
        let nodes: Vec<_> = (0..count).map(|_| Self::node()).collect();
        let addresses: Vec<_> = nodes.iter().map(Redis::address).collect();
        run(Command::new("redis-cli").args(["--cluster", "create"]).args(&addresses).args(more).arg("--cluster-yes"));
        for node in &nodes {
            eventually("the cluster is up", || node.cli(&["CLUSTER", "INFO"]).contains("cluster_state:ok"));
        }
        Self { nodes }
    }

    /// A node without slots, which no other knows.
    pub fn node() -> Redis {
        let bus = format!("cluster-port {}", free_port());
        let config = ["cluster-enabled yes", "cluster-node-timeout 2000", "enable-debug-command local", &bus];
        Redis::start(&Options { config: &config, ..Options::default() })
    }

    /// From now on, messages reach those only who are subscribed on the node that they are published on.
    pub fn lose_messages_between(nodes: &[Redis]) {
        for node in nodes {
            // The number is that of PUBLISH among the packets of the bus.
            node.cli(&["DEBUG", "DROP-CLUSTER-PACKET-FILTER", "4"]);
        }
    }
}
