//! Connections to a Redis server: where it stands, how it is reached and checked, and what its errors mean. Knows nothing
//! of records.

use super::super::{StoreError, StoreMetrics, TlsMode, TlsSettings, replica_name};
use super::{RedisSettings, Topology};
use crate::problem::Problem;
use crate::tls::{PemFile, TLS, TLS_CA, TLS_CERT, TLS_KEY};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::cluster::ClusterClient;
use redis::cluster_async::ClusterConnection;
use redis::{
    AsyncConnectionConfig, Cmd, ErrorKind, FromRedisValue, Pipeline, ProtocolVersion, PushInfo, RedisConnectionInfo,
    RedisError, RedisFuture, ServerError, Value,
};
use rustls::pki_types::ServerName;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Mutex as AsyncMutex;
use tokio::task::AbortHandle;
use tokio_util::task::AbortOnDropHandle;

/// Name resolution, TCP, TLS and greeting together.
const CONNECT: Duration = Duration::from_secs(1);
/// The same to one node of a cluster: the whole must not fail because one of them is silent.
const CONNECT_NODE: Duration = Duration::from_millis(500);
/// Before the other sentinels, or nodes of a cluster, are asked as well.
const HEAD_START: Duration = Duration::from_millis(100);
/// How long the server may take for one answer. Lookups usually end before, by the store's own timeout.
const ANSWER: Duration = Duration::from_secs(2);
/// A connection on which nothing came for so long, though something was asked, is replaced.
const SILENCE: Duration = Duration::from_millis(200);
/// Requests that may wait inside one connection.
const QUEUE: usize = 1_024;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    Tcp(String, u16),
    Unix(PathBuf),
}

impl Address {
    pub(super) fn parse(text: &str) -> Result<Self, Problem> {
        // Not shown: a URL in this place may well hold a password.
        let wrong = || {
            let what = match text.contains('@') {
                true => "must not hold a user or a password: must be HOST:PORT or unix:/PATH",
                false => "must be HOST:PORT or unix:/PATH, without a scheme",
            };
            Problem::error(
                "servers",
                what,
                "write it like \"127.0.0.1:6379\", with username and password_file beside it",
            )
        };
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.starts_with('/') && !path.starts_with("//") {
                Ok(Self::Unix(path.into()))
            } else {
                Err(wrong())
            };
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        if host.is_empty() || host.contains(['/', '@']) {
            return Err(wrong());
        }
        Ok(Self::Tcp(host.into(), port.parse().ok().filter(|port| *port > 0).ok_or_else(wrong)?))
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(host, port) if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp(host, port) => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// What an error of the library means, in our words. The server's own words may hold keys or arguments and are not
/// repeated, except where they are known to name a command or a user only.
pub(super) fn failed(error: &RedisError) -> StoreError {
    if error.is_timeout() {
        return StoreError::Timeout;
    }
    // Of several commands sent together, an error without a code of its own.
    if let Some((_, first)) = error.clone().into_server_errors().as_deref().and_then(<[_]>::first) {
        return server_failed(first);
    }
    match (error.kind(), error.code()) {
        (ErrorKind::AuthenticationFailed, _) => StoreError::Unavailable(WRONG_PASSWORD.into()),
        (ErrorKind::RESP3NotSupported, _) => {
            StoreError::Unavailable("the server does not speak RESP3: use Redis 6 or later, or Valkey".into())
        }
        (_, Some(code)) => refused(code, error.detail().unwrap_or_default()),
        (ErrorKind::Io, None) => StoreError::Unavailable(format!("the connection failed: {error}")),
        (ErrorKind::Parse | ErrorKind::UnexpectedReturnType, None) => {
            StoreError::Unavailable("the server answered something that is not Redis".into())
        }
        (_, None) => StoreError::Unavailable(format!("the connection failed: {}", error.category())),
    }
}

/// Its master may well take writes.
pub(super) const READ_ONLY_REPLICA: &str =
    "the server is a read-only replica (READONLY): name the master in servers, or use sentinels";
const WRONG_PASSWORD: &str = "the server refused the user or the password: check username and password";

pub(super) fn server_failed(error: &ServerError) -> StoreError {
    refused(error.code(), error.details().unwrap_or_default())
}

fn refused(code: &str, details: &str) -> StoreError {
    let what = match code {
        "LOADING" => "the server still loads its data (LOADING): wait",
        "MASTERDOWN" => "the server is a replica without its master (MASTERDOWN): restore replication",
        "READONLY" => return unwritable(READ_ONLY_REPLICA),
        "NOAUTH" => "the server wants a password (NOAUTH): set password, and username for an ACL user",
        "WRONGPASS" => WRONG_PASSWORD,
        "NOPERM" => {
            let command = details.split('\'').nth(1).filter(|name| name.len() < 40 && details.contains("command"));
            let what = command.map_or_else(|| "a key or channel".into(), |name| format!("command {name}"));
            return StoreError::Denied(format!("the server's ACL does not let the user use {what} (NOPERM): grant it"));
        }
        "CLUSTERDOWN" => "the cluster is down or misses slots (CLUSTERDOWN): see CLUSTER INFO",
        "TRYAGAIN" => "the cluster moves slots at this moment (TRYAGAIN): wait",
        "MOVED" | "ASK" => "the key is on another node (MOVED): set topology = \"cluster\", or wait while slots move",
        "BUSY" => "the server is busy with a script (BUSY): see SCRIPT KILL",
        "MISCONF" => return unwritable("the server can't save to disk and takes no writes (MISCONF): see its log"),
        "OOM" => return unwritable("the server is out of memory and takes no writes (OOM): raise maxmemory"),
        "NOREPLICAS" => return unwritable("the server has too few replicas to take writes (NOREPLICAS)"),
        "MAXCLIENTS" => "the server has too many connections: raise maxclients",
        "ERR" if details.contains("max number of clients") => "the server has too many connections: raise maxclients",
        "ERR" if details.starts_with("AUTH") || details.starts_with("HELLO") => WRONG_PASSWORD,
        "ERR" if details.contains("DB index") => "the server has no database of this number: check database",
        // Renamed or removed by the configuration, or not there yet.
        "ERR" if details.contains("unknown command") => {
            return StoreError::Denied("the server lacks a command: use Redis 6 or later, or Valkey".into());
        }
        code => return StoreError::Unavailable(format!("the server refused with {code}: see its log")),
    };
    StoreError::Unavailable(what.into())
}

fn unwritable(what: &str) -> StoreError {
    StoreError::ReadOnly(what.into())
}

fn unavailable<E: std::fmt::Display>(address: &Address) -> impl FnOnce(E) -> StoreError {
    move |error| StoreError::Unavailable(format!("{address}: {error}"))
}

trait RedisStream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> RedisStream for S {}

#[derive(Clone)]
enum Wire {
    /// The task that drives it ends with its last user.
    One(MultiplexedConnection, #[allow(dead_code, reason = "held for its end")] Arc<AbortOnDropHandle<()>>),
    Cluster(ClusterConnection),
}

/// A connection, shared by all that clone it. Requests that are dropped half-way don't put it out of step.
#[derive(Clone)]
pub(super) struct RedisConnection {
    wire: Wire,
    seen: Arc<Seen>,
}

struct Seen {
    since: Instant,
    /// When the last answer came, in microseconds since then.
    answered: AtomicU64,
}

impl RedisConnection {
    fn new(wire: Wire) -> Self {
        Self { wire, seen: Arc::new(Seen { since: Instant::now(), answered: AtomicU64::new(0) }) }
    }

    fn elapsed(&self) -> u64 {
        u64::try_from(self.seen.since.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Since the last answer.
    fn unused_for(&self) -> Duration {
        Duration::from_micros(self.elapsed().saturating_sub(self.seen.answered.load(Ordering::Relaxed)))
    }

    fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.seen, &other.seen)
    }

    pub(super) async fn ask<T: FromRedisValue>(&mut self, command: &Cmd) -> Result<T, StoreError> {
        command.query_async(self).await.map_err(|error| failed(&error))
    }

    pub(super) async fn subscribe(&mut self, pattern: bool, name: &str) -> Result<(), StoreError> {
        let Wire::One(connection, _) = &mut self.wire else { return Err(StoreError::Unavailable("no node".into())) };
        let done = if pattern { connection.psubscribe(name).await } else { connection.subscribe(name).await };
        done.map_err(|error| failed(&error))
    }
}

impl ConnectionLike for RedisConnection {
    fn req_packed_command<'a>(&'a mut self, cmd: &'a Cmd) -> RedisFuture<'a, Value> {
        match &mut self.wire {
            Wire::One(connection, _) => connection.req_packed_command(cmd),
            Wire::Cluster(connection) => connection.req_packed_command(cmd),
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipe: &'a Pipeline,
        at: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        match &mut self.wire {
            Wire::One(connection, _) => connection.req_packed_commands(pipe, at, count),
            Wire::Cluster(connection) => connection.req_packed_commands(pipe, at, count),
        }
    }

    fn get_db(&self) -> i64 {
        match &self.wire {
            Wire::One(connection, _) => connection.get_db(),
            Wire::Cluster(connection) => connection.get_db(),
        }
    }
}

/// Makes connections. Holds everything that was to be checked at the start.
pub(super) struct Connector {
    addresses: Vec<Address>,
    topology: Topology,
    identity: RedisConnectionInfo,
    tls: Option<tokio_rustls::TlsConnector>,
    tls_settings: TlsSettings,
    settings: RedisSettings,
    answer: Duration,
    /// The place among the addresses of the one that answered last.
    answered_last: AtomicUsize,
}

impl Connector {
    pub(super) fn new(settings: &RedisSettings) -> Result<Self, Problem> {
        settings.check()?;
        let addresses: Vec<_> = settings.servers.iter().map(|text| Address::parse(text)).collect::<Result<_, _>>()?;
        let mut identity = RedisConnectionInfo::default().set_skip_set_lib_name().set_db(settings.database);
        if let Some(username) = &settings.username {
            identity = identity.set_username(username);
        }
        if let Some(password) = &settings.password {
            identity = identity.set_password(password.expose());
        }
        let tls = settings.tls.client_config()?.map(|config| tokio_rustls::TlsConnector::from(Arc::new(config)));
        if settings.topology == Topology::Cluster {
            cluster_client(settings, &addresses, &identity)?;
        }
        let (topology, tls_settings) = (settings.topology.clone(), settings.tls.clone());
        let answered_last = AtomicUsize::new(0);
        let settings = settings.clone();
        Ok(Self { addresses, topology, identity, tls, tls_settings, settings, answer: ANSWER, answered_last })
    }

    /// For work that may take longer than a lookup.
    pub(super) fn with_answer(mut self, answer: Duration) -> Self {
        self.answer = answer;
        self
    }

    pub(super) const fn topology(&self) -> &Topology {
        &self.topology
    }

    /// A connection for commands: to the server, to the master, or to the whole cluster.
    pub(super) async fn open(&self) -> Result<RedisConnection, StoreError> {
        let (link, node) = self.server(None).await?;
        if self.topology != Topology::Cluster {
            return Ok(link);
        }
        // The library waits for every node that it is given, so it gets one that answers, and asks that for the others.
        let client = cluster_client(&self.settings, &[node], &self.identity)
            .map_err(|problem| StoreError::Unusable(problem.to_string()))?;
        let connection = bounded(client.get_async_connection()).await?;
        Ok(RedisConnection::new(Wire::Cluster(connection.map_err(|error| failed(&error))?)))
    }

    /// A connection that receives messages, which `push` takes: to the server, or to the master that the sentinels name.
    pub(super) async fn subscriber(&self, push: Push) -> Result<(RedisConnection, Address), StoreError> {
        self.server(Some(push)).await
    }

    /// The same to one node of a cluster.
    pub(super) async fn subscriber_at(&self, node: &Address, push: Push) -> Result<RedisConnection, StoreError> {
        self.connect(node, &self.identity, Some(push)).await
    }

    /// The masters of a cluster by their ids, as one of its nodes knows them.
    pub(super) async fn cluster_masters(&self) -> Result<BTreeMap<String, Address>, StoreError> {
        let (mut any, at) = self.server(None).await?;
        masters_by(&mut any, &at).await
    }

    async fn server(&self, push: Option<Push>) -> Result<(RedisConnection, Address), StoreError> {
        match &self.topology {
            Topology::Sentinel { .. } => {
                let address = self.master().await?;
                let mut link = self.connect(&address, &self.identity, push).await?;
                let role: Vec<Value> = link.ask(&redis::cmd("ROLE")).await?;
                if !matches!(role.first(), Some(Value::BulkString(role)) if role == b"master") {
                    let what = format!("{address}: the sentinels name it, but it is no master (yet)");
                    return Err(StoreError::Unavailable(what));
                }
                Ok((link, address))
            }
            Topology::Single | Topology::Cluster => {
                self.first(|address| {
                    let connected = self.connect(address, &self.identity, push.clone());
                    async move { Ok((connected.await?, address.clone())) }
                })
                .await
            }
        }
    }

    /// What the first sentinel that answers says.
    pub(super) async fn master(&self) -> Result<Address, StoreError> {
        let Topology::Sentinel { master } = &self.topology else {
            return Err(StoreError::Unavailable("no sentinels".into()));
        };
        self.first(|sentinel| self.ask_sentinel(sentinel, master)).await
    }

    /// The first answer of several servers. The one that answered last is asked first, and the others a moment later: one that
    /// hangs keeps nobody waiting, and one that answers is not joined by others for nothing.
    async fn first<'a, T, F: Future<Output = Result<T, StoreError>>>(
        &'a self,
        ask: impl Fn(&'a Address) -> F,
    ) -> Result<T, StoreError> {
        let (count, first) = (self.addresses.len(), self.answered_last.load(Ordering::Relaxed));
        let mut asked: FuturesUnordered<_> = (0..count)
            .map(|rank| (rank, (first + rank) % count))
            .filter_map(|(rank, index)| Some((rank, index, self.addresses.get(index)?)))
            .map(|(rank, index, address)| {
                let answer = ask(address);
                async move {
                    if rank > 0 {
                        tokio::time::sleep(HEAD_START).await;
                    }
                    (index, answer.await)
                }
            })
            .collect();
        let mut last = StoreError::Timeout;
        while let Some((index, answer)) = asked.next().await {
            match answer {
                Ok(answer) => {
                    self.answered_last.store(index, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Sentinels have their own password or, mostly, none: ours is shown only when one is wanted.
    async fn ask_sentinel(&self, sentinel: &Address, master: &str) -> Result<Address, StoreError> {
        let question = redis::cmd("SENTINEL").arg("GET-MASTER-ADDR-BY-NAME").arg(master).take();
        let nobody = RedisConnectionInfo::default().set_skip_set_lib_name();
        let mut link = self.connect(sentinel, &nobody, None).await?;
        let mut answer: Result<Option<(String, u16)>, RedisError> = question.query_async(&mut link).await;
        if answer.as_ref().is_err_and(|error| error.code() == Some("NOAUTH")) && self.identity.password().is_some() {
            link = self.connect(sentinel, &self.identity.clone().set_db(0), None).await?;
            answer = question.query_async(&mut link).await;
        }
        match answer {
            Ok(Some((host, port))) => Ok(Address::Tcp(host, port)),
            Ok(None) => {
                Err(StoreError::Unavailable(format!("sentinel {sentinel} watches no such master: check master")))
            }
            Err(error) => Err(failed(&error).at(sentinel)),
        }
    }

    /// The masters of a cluster, for what must be asked of each.
    pub(super) async fn masters(&self) -> Result<Vec<RedisConnection>, StoreError> {
        let (mut any, at) = self.server(None).await?;
        if self.topology != Topology::Cluster {
            return Ok(vec![any]);
        }
        let mut links = Vec::new();
        for node in masters_by(&mut any, &at).await?.values() {
            links.push(self.connect(node, &self.identity, None).await?);
        }
        Ok(links)
    }

    /// Which node of a cluster has which keys, and which are on their way; to be compared.
    pub(super) async fn layout(&self) -> Result<Vec<String>, StoreError> {
        if self.topology != Topology::Cluster {
            return Ok(Vec::new());
        }
        let mut all = Vec::new();
        for mut node in self.masters().await? {
            let nodes: String = node.ask(redis::cmd("CLUSTER").arg("NODES")).await?;
            // `id address flags master ping pong epoch state slots…`; only a node itself knows what it moves.
            let own = nodes.lines().filter(|line| line.contains("myself"));
            all.extend(own.map(|line| {
                let words: Vec<&str> = line.split(' ').collect();
                let slots = words.get(8..).unwrap_or_default().join(" ");
                format!("{} {slots}", words.first().unwrap_or(&""))
            }));
        }
        all.sort_unstable();
        Ok(all)
    }

    async fn connect(
        &self,
        at: &Address,
        identity: &RedisConnectionInfo,
        push: Option<Push>,
    ) -> Result<RedisConnection, StoreError> {
        let stream = async {
            Ok::<Box<dyn RedisStream>, StoreError>(match at {
                Address::Unix(path) => Box::new(UnixStream::connect(path).await.map_err(unavailable(at))?),
                Address::Tcp(host, port) => {
                    let addresses = resolve(host, *port, &self.tls_settings).await.map_err(unavailable(at))?;
                    let plain = TcpStream::connect(addresses.as_slice()).await.map_err(unavailable(at))?;
                    plain.set_nodelay(true).map_err(unavailable(at))?;
                    match &self.tls {
                        None => Box::new(plain),
                        Some(tls) => {
                            let name = ServerName::try_from(host.clone()).map_err(unavailable(at))?;
                            Box::new(tls.connect(name, plain).await.map_err(unavailable(at))?)
                        }
                    }
                }
            })
        };
        // A sentinel is asked and left again.
        let named = !matches!(self.topology, Topology::Sentinel { .. }) || !self.addresses.contains(at);
        let mut config =
            AsyncConnectionConfig::new().set_response_timeout(Some(self.answer)).set_pipeline_buffer_size(QUEUE);
        let mut identity = identity.clone().set_protocol(ProtocolVersion::RESP2);
        if let Some(push) = push {
            identity = identity.set_protocol(ProtocolVersion::RESP3);
            config = config.set_push_sender(move |info| push(info));
        }
        let connected = async {
            let stream = stream.await?;
            let (connection, driver) = MultiplexedConnection::new_with_config(&identity, stream, config)
                .await
                .map_err(|error| failed(&error).at(at))?;
            let driver = AbortOnDropHandle::new(tokio::spawn(driver));
            let mut link = RedisConnection::new(Wire::One(connection, Arc::new(driver)));
            if named {
                // For CLIENT LIST; whoever may not say it goes on without.
                let name = format!("tollgate-{}", replica_name());
                let name: String = name.chars().filter(char::is_ascii_graphic).collect();
                let _ = link.ask::<Value>(redis::cmd("CLIENT").arg("SETNAME").arg(name)).await;
            }
            Ok(link)
        };
        bounded(connected).await?
    }
}

/// The addresses of a host that may be spoken to. To be asked for every connection: sentinels and nodes of a cluster name
/// others, who may be anywhere, and a name may lead anywhere.
async fn resolve(host: &str, port: u16, tls: &TlsSettings) -> std::io::Result<Vec<SocketAddr>> {
    let addresses: Vec<_> = tokio::net::lookup_host((host, port)).await?.collect();
    addresses.iter().try_for_each(|address| tls.admits(address.ip())).map_err(std::io::Error::other)?;
    Ok(addresses)
}

/// For the library's own connections to the nodes of a cluster.
struct Resolver(TlsSettings);

impl redis::io::AsyncDNSResolver for Resolver {
    fn resolve<'a, 'b: 'a>(
        &'a self,
        host: &'b str,
        port: u16,
    ) -> RedisFuture<'a, Box<dyn Iterator<Item = SocketAddr> + Send + 'a>> {
        Box::pin(async move { Ok(Box::new(resolve(host, port, &self.0).await?.into_iter()) as _) })
    }
}

pub(super) type Push = Arc<dyn Fn(PushInfo) -> Result<(), ()> + Send + Sync>;

async fn bounded<T>(future: impl Future<Output = T>) -> Result<T, StoreError> {
    tokio::time::timeout(CONNECT, future)
        .await
        .map_err(|_| StoreError::Unavailable(format!("no connection within {CONNECT:?}")))
}

/// The masters that have slots, by their ids, as the node at `at` knows them.
pub(super) async fn masters_by(
    node: &mut RedisConnection,
    at: &Address,
) -> Result<BTreeMap<String, Address>, StoreError> {
    let unclear = || StoreError::Unavailable("CLUSTER SLOTS can't be understood".into());
    let rows: Vec<Vec<Value>> = node.ask(redis::cmd("CLUSTER").arg("SLOTS")).await?;
    let master = |row: Vec<Value>| {
        // First slot, last slot, the master, its replicas.
        let entry = row.into_iter().nth(2).map(shortened).ok_or_else(unclear)?;
        let (host, port, id): (Option<String>, u16, String) = redis::from_redis_value(entry).map_err(|_| unclear())?;
        match (host.filter(|host| !host.is_empty()), at) {
            (Some(host), _) => Ok((id, Address::Tcp(host, port))),
            // A node that does not know its own address means the one by which it was reached.
            (None, Address::Tcp(host, _)) => Ok((id, Address::Tcp(host.clone(), port))),
            (None, Address::Unix(_)) => Err(unclear()),
        }
    };
    rows.into_iter().map(master).collect()
}

/// Host, port and id, without what newer servers say besides.
fn shortened(value: Value) -> Value {
    match value {
        Value::Array(items) => Value::Array(items.into_iter().take(3).collect()),
        other => other,
    }
}

pub(super) fn half_checked_cluster() -> Problem {
    let what = "a cluster's certificates are checked in full or not used";
    Problem::error(TLS, what, "use \"verify-full\", or \"disable\" in a network that nobody else can read")
}

/// The library checks a cluster's certificates itself, and can't leave out a part.
fn cluster_client(
    settings: &RedisSettings,
    addresses: &[Address],
    identity: &RedisConnectionInfo,
) -> Result<ClusterClient, Problem> {
    let TlsSettings { mode, ca, client } = &settings.tls;
    let read = |file: &PemFile, key| file.content(key).map(<[u8]>::to_vec);
    let scheme = if settings.tls.is_plain() { "redis" } else { "rediss" };
    let mut builder = ClusterClient::builder(addresses.iter().map(|address| format!("{scheme}://{address}")))
        .connection_timeout(CONNECT_NODE)
        .response_timeout(ANSWER)
        .retries(3)
        .max_retry_wait(200);
    if let Some(username) = identity.username() {
        builder = builder.username(username);
    }
    if let Some(password) = identity.password() {
        builder = builder.password(password);
    }
    match mode {
        TlsMode::Disable => {}
        TlsMode::Local => builder = builder.async_dns_resolver(Resolver(settings.tls.clone())),
        TlsMode::VerifyFull => {
            // The library asks for the process' own; an error says that there is one already.
            let _ = rustls::crypto::ring::default_provider().install_default();
            let client_tls = match client {
                Some((certificate, key)) => {
                    let (client_cert, client_key) = (read(certificate, TLS_CERT)?, read(key, TLS_KEY)?);
                    Some(redis::ClientTlsConfig { client_cert, client_key })
                }
                None => None,
            };
            let root_cert = ca.as_ref().map(|file| read(file, TLS_CA)).transpose()?;
            builder = builder.certs(redis::TlsCertificates { client_tls, root_cert });
        }
        TlsMode::Require | TlsMode::VerifyCa => return Err(half_checked_cluster()),
    }
    builder.build().map_err(|_| {
        let what = "the settings of the cluster can't be used";
        Problem::error(TLS, what, "check tls_ca and the client's certificate")
    })
}

/// Connections for lookups, taken in turn, made when they are needed and replaced when they are of no use.
pub(super) struct RedisPool {
    connector: Arc<Connector>,
    slots: Vec<Arc<Slot>>,
    metrics: Arc<StoreMetrics>,
}

#[derive(Default)]
struct Slot {
    link: Mutex<Option<RedisConnection>>,
    /// Held by the one that connects; when and how the last attempt failed.
    connecting: Arc<AsyncMutex<Option<(Instant, StoreError)>>>,
    task: Mutex<Option<AbortHandle>>,
    in_use: AtomicUsize,
}

impl RedisPool {
    pub(super) fn new(connector: Arc<Connector>, size: usize, metrics: Arc<StoreMetrics>) -> Self {
        let slots = (0..size.max(1)).map(|_| Arc::default()).collect();
        Self { connector, slots, metrics }
    }

    /// Forgets all connections, since they may lead to a server that is the master no more.
    pub(super) fn renew(&self) {
        for slot in &self.slots {
            drop(slot.link.lock().take());
        }
        self.count();
    }

    /// Closes connections that were not used for so long, but for the first.
    pub(super) async fn shrink(&self, idle: Duration) {
        let mut ticks = tokio::time::interval(idle / 4);
        loop {
            ticks.tick().await;
            for slot in self.slots.iter().skip(1).filter(|slot| slot.in_use.load(Ordering::Relaxed) == 0) {
                drop(slot.link.lock().take_if(|link| link.unused_for() >= idle));
            }
            self.count();
        }
    }

    /// Asks, and once more on a new connection when the old one turns out to be closed. Only for what may be done twice.
    pub(super) async fn ask<T: FromRedisValue>(&self, pipe: &Pipeline) -> Result<T, StoreError> {
        // The first of those with the least to do, so that the last ones are idle unless they are needed.
        let least = self.slots.iter().min_by_key(|slot| slot.in_use.load(Ordering::Relaxed));
        let Some(slot) = least else { return Err(StoreError::Overloaded) };
        let _used = InUse::new(self, slot);
        let mut again = true;
        loop {
            let mut link = self.link(slot).await?;
            let watch = Watch { pool: self, slot, sent: link.elapsed(), link: link.clone() };
            let result = pipe.query_async(&mut link).await;
            match &result {
                Err(error) if error.is_timeout() => {}
                Err(error) if error.is_io_error() || error.is_unrecoverable_error() => self.discard(slot, &link),
                _ => link.seen.answered.store(link.elapsed(), Ordering::Relaxed),
            }
            drop(watch);
            match result {
                Ok(answer) => return Ok(answer),
                Err(error) if again && error.is_unrecoverable_error() && !error.is_timeout() => again = false,
                Err(error) => return Err(failed(&error)),
            }
        }
    }

    async fn link(&self, slot: &Arc<Slot>) -> Result<RedisConnection, StoreError> {
        let current = || slot.link.lock().clone();
        if let Some(link) = current() {
            return Ok(link);
        }
        let asked = Instant::now();
        let mut last = Arc::clone(&slot.connecting).lock_owned().await;
        if let Some(link) = current() {
            return Ok(link);
        }
        // Whoever waited for an attempt shares its end: the others would queue up behind a dead server for ever.
        if let Some((_, error)) = last.as_ref().filter(|(when, _)| *when >= asked) {
            return Err(error.clone());
        }
        // A task, so that callers who give up don't keep a slow server from ever being reached.
        let (connector, owner) = (Arc::clone(&self.connector), Arc::clone(slot));
        let task = tokio::spawn(async move {
            let result = connector.open().await;
            match &result {
                Ok(link) => *owner.link.lock() = Some(link.clone()),
                Err(error) => *last = Some((Instant::now(), error.clone())),
            }
            result
        });
        *slot.task.lock() = Some(task.abort_handle());
        let result = task.await.unwrap_or_else(|_| Err(StoreError::Unavailable("the connection was given up".into())));
        self.count();
        result
    }

    fn discard(&self, slot: &Slot, link: &RedisConnection) {
        let mut current = slot.link.lock();
        if current.as_ref().is_some_and(|current| current.is(link)) {
            drop(current.take());
        }
        drop(current);
        self.count();
    }

    fn count(&self) {
        let open = self.slots.iter().filter(|slot| slot.link.lock().is_some()).count();
        let in_use = self.slots.iter().filter(|slot| slot.in_use.load(Ordering::Relaxed) > 0).count();
        self.metrics.connections(open, in_use, self.slots.len());
    }
}

impl Drop for RedisPool {
    fn drop(&mut self) {
        for slot in &self.slots {
            if let Some(task) = slot.task.lock().take() {
                task.abort();
            }
        }
    }
}

struct InUse<'a>(&'a RedisPool, &'a Slot);

impl<'a> InUse<'a> {
    fn new(pool: &'a RedisPool, slot: &'a Slot) -> Self {
        slot.in_use.fetch_add(1, Ordering::Relaxed);
        pool.count();
        Self(pool, slot)
    }
}

impl Drop for InUse<'_> {
    fn drop(&mut self) {
        self.1.in_use.fetch_sub(1, Ordering::Relaxed);
        self.0.count();
    }
}

/// Replaces a connection on which nothing at all came since a question, however the question ended: a server that was
/// cut off without a word keeps its connection open for many minutes.
struct Watch<'a> {
    pool: &'a RedisPool,
    slot: &'a Slot,
    link: RedisConnection,
    sent: u64,
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        let answered = self.link.seen.answered.load(Ordering::Relaxed) > self.sent;
        let waited = self.link.elapsed().saturating_sub(self.sent);
        if !answered && u128::from(waited) >= SILENCE.as_micros() {
            self.pool.discard(self.slot, &self.link);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use redis::io::AsyncDNSResolver as _;

    /// For our own connections, and for those that the library makes to the nodes of a cluster.
    #[tokio::test]
    async fn whoever_names_a_place_plain_text_goes_to_this_machine_only() {
        for (host, mode, admitted) in [
            ("127.0.0.1", TlsMode::Local, true),
            ("::1", TlsMode::Local, true),
            ("localhost", TlsMode::Local, true),
            ("10.0.0.9", TlsMode::Local, false),
            ("0.0.0.0", TlsMode::Local, false),
            // Names for an address that leads back here, and is no loopback address.
            ("0", TlsMode::Local, false),
            ("0.0", TlsMode::Local, false),
            ("10.0.0.9", TlsMode::Disable, true),
            ("10.0.0.9", TlsMode::VerifyFull, true),
        ] {
            let tls = TlsSettings { mode, ca: None, client: None };
            assert_eq!(resolve(host, 6379, &tls).await.is_ok(), admitted, "{host} {mode:?}");
            assert_eq!(Resolver(tls).resolve(host, 6379).await.is_ok(), admitted, "{host} {mode:?}");
        }
    }
}
