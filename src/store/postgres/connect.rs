//! Connections to PostgreSQL: addresses, TLS, selection of one of several servers, and error messages. Knows no tokens,
//! except that an error message must not contain one.

use super::super::tls::NotAdmitted;
use super::super::{Place, StoreError, TlsMode, TlsSettings, replica_name};
use super::{PostgresSettings, Source};
use crate::problem::Problem;
use crate::tls::TLS;
use deadpool::managed::{self, Manager, Metrics, RecycleError, RecycleResult, TimeoutType};
use deadpool_postgres::{ClientWrapper, Runtime};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt as _, StreamExt as _};
use parking_lot::Mutex;
use rustls::{ClientConfig, RootCertStore};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::net::IpAddr;
use std::ops::Deref;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout as within};
use tokio_postgres::config::{Host, LoadBalanceHosts, SslMode, TargetSessionAttrs};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, Connection as Wire, Error, SimpleQueryMessage, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;

/// Timeout for opening a connection.
const CONNECT: Duration = Duration::from_secs(1);
/// How long a connection to a standby serves lookups before a primary is searched for again.
const STANDBY_KEPT: Duration = Duration::from_secs(5);
/// How long a host is tried alone, before the next one is tried beside it: as browsers do with addresses (RFC 8305).
const HEAD_START: Duration = Duration::from_millis(250);
/// How often an address is tried that leads to a server other than the wanted one.
const ATTEMPTS: u32 = 3;
/// The search path for unqualified names in tollgate's statements, including operators: users who may create objects in
/// other schemas must not be able to change the meaning of a statement. Temporary objects would be searched first if
/// pg_temp were not listed last.
pub(super) const SEARCH_PATH: &str = "pg_catalog, pg_temp";
/// The first statement on each connection. The last column identifies the server process by its start time, in
/// microseconds; a server that restarts has closed its connections.
const WHO: &str = "SELECT (extract(epoch FROM pg_catalog.pg_postmaster_start_time()) * 1000000)::bigint, \
    pg_catalog.pg_is_in_recovery()";

pub(super) type ConnectionDriver =
    Wire<Socket, <MakeRustlsConnect as tokio_postgres::tls::MakeTlsConnect<Socket>>::Stream>;

/// A host in the URL.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Listed {
    at: Listing,
    /// The name that its certificate must have.
    name: String,
    port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Listing {
    Socket(PathBuf),
    Address(IpAddr),
    Name,
}

/// A host with its resolved address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ResolvedHost {
    /// `None`: a Unix socket in the folder given as the name.
    address: Option<IpAddr>,
    name: String,
    port: u16,
}

/// The parsed URL.
struct Url {
    /// Everything except the hosts.
    common: Config,
    places: Vec<Listed>,
    /// The meaning of "auto" for this URL.
    auto: TlsMode,
}

impl Url {
    fn parse(url: &str) -> Result<Self, Problem> {
        // The parser's message may contain a part of a password.
        let config: Config = url.parse().map_err(|_: Error| {
            wrong(
                "is no PostgreSQL URL: neither postgres://USER@HOST:PORT/DATABASE nor a list of libpq's keywords. Special \
                 characters of a password must be percent-encoded, or given in a setting of their own; sslmode verify-ca \
                 and verify-full are settings of tollgate and not parts of the URL",
            )
        })?;
        let (hosts, addresses, ports) = (config.get_hosts(), config.get_hostaddrs(), config.get_ports());
        let count = hosts.len().max(addresses.len());
        if count == 0 || hosts.contains(&Host::Tcp(String::new())) {
            return Err(wrong("names no host; for a socket, give the folder that it is in"));
        }
        if !hosts.is_empty() && !addresses.is_empty() && hosts.len() != addresses.len() {
            let what = format!("has {} of host and {} of hostaddr: one for each", hosts.len(), addresses.len());
            return Err(wrong(what));
        }
        if ports.len() > 1 && ports.len() != count {
            return Err(wrong(format!("has {} ports for {count} hosts: one for each, or one for all", ports.len())));
        }
        let place = |index: usize| {
            let port = ports.get(index).or(ports.first()).copied().unwrap_or(5432);
            // As in libpq: hostaddr is the address, and host is the name in the certificate.
            match (hosts.get(index), addresses.get(index)) {
                (Some(Host::Tcp(name)), Some(address)) => {
                    Listed { at: Listing::Address(*address), name: name.clone(), port }
                }
                (_, Some(address)) => Listed { at: Listing::Address(*address), name: address.to_string(), port },
                (Some(Host::Unix(folder)), None) => {
                    Listed { at: Listing::Socket(folder.clone()), name: folder.display().to_string(), port }
                }
                (Some(Host::Tcp(name)), None) => match Place::of_host(name) {
                    Place::Address(address) => {
                        Listed { at: Listing::Address(address), name: address.to_string(), port }
                    }
                    _ => Listed { at: Listing::Name, name: name.clone(), port },
                },
                (None, None) => Listed { at: Listing::Name, name: String::new(), port },
            }
        };
        // A host next to a hostaddr counts as well: if it is another machine's, the certificate must be for it.
        let named = hosts.iter().map(|host| match host {
            Host::Unix(_) => Place::Socket,
            Host::Tcp(name) => Place::of_host(name),
        });
        let auto = TlsMode::auto(named.chain(addresses.iter().copied().map(Place::Address)));
        Ok(Self { common: without_places(&config), places: (0..count).map(place).collect(), auto })
    }

    /// Whether the connection is encrypted with these settings.
    fn encrypted(&self, tls: &TlsSettings) -> Result<bool, Problem> {
        let is_socket = |place: &&Listed| matches!(place.at, Listing::Socket(_));
        let sockets = self.places.iter().filter(is_socket).count();
        let only_sockets = sockets == self.places.len();
        if !tls.is_plain() && sockets > 0 && !only_sockets {
            return Err(wrong("a socket can't be encrypted and another host must be: name only one kind"));
        }
        if tls.is_plain() && !only_sockets && self.common.get_ssl_mode() == SslMode::Require {
            return Err(wrong("asks for sslmode=require while the tls setting says plain text: set tls"));
        }
        Ok(!tls.is_plain() && !only_sockets)
    }
}

/// The meaning of "auto" for a URL. One that cannot be parsed is a problem of its own.
pub fn tls_auto(url: &str) -> TlsMode {
    Url::parse(url).map_or(TlsMode::Local, |url| url.auto)
}

/// What is wrong with a URL, given all other settings.
pub(super) fn check_url(settings: &PostgresSettings) -> Result<(), Problem> {
    Url::parse(settings.url.expose())?.encrypted(&settings.tls).map(drop)
}

/// The database that a URL names, and the user whose rights decide what is seen there.
pub(super) fn database_of(url: &super::Secret) -> String {
    let Ok(config) = url.expose().parse::<Config>() else { return String::new() };
    let (hosts, addresses) = (config.get_hosts(), config.get_hostaddrs());
    let ports: Vec<u16> = match config.get_ports() {
        [] => vec![5432; hosts.len().max(addresses.len())],
        [one] => vec![*one; hosts.len().max(addresses.len())],
        ports => ports.to_vec(),
    };
    format!("{hosts:?} {addresses:?} {ports:?} {:?} {:?}", config.get_user(), config.get_dbname())
}

/// Something about the URL.
fn wrong(what: impl Into<String>) -> Problem {
    let instead = "write it like \"postgres://user@host:5432/database\", with the password in password_file";
    Problem::error("url", what, instead)
}

/// How a server's list of sessions shows this process. The server keeps 63 bytes.
fn application_name() -> String {
    format!("tollgate {}", replica_name()).chars().filter(|c| (' '..='~').contains(c)).take(63).collect()
}

/// The parser's type cannot remove its hosts.
fn without_places(from: &Config) -> Config {
    let mut config = Config::new();
    if let Some(user) = from.get_user() {
        config.user(user);
    }
    if let Some(password) = from.get_password() {
        config.password(password);
    }
    if let Some(name) = from.get_dbname() {
        config.dbname(name);
    }
    if let Some(options) = from.get_options() {
        config.options(options);
    }
    if let Some(interval) = from.get_keepalives_interval() {
        config.keepalives_interval(interval);
    }
    if let Some(retries) = from.get_keepalives_retries() {
        config.keepalives_retries(retries);
    }
    config
        .application_name(from.get_application_name().unwrap_or(&application_name()))
        .ssl_mode(from.get_ssl_mode())
        .ssl_negotiation(from.get_ssl_negotiation())
        .keepalives(from.get_keepalives())
        .channel_binding(from.get_channel_binding())
        .load_balance_hosts(from.get_load_balance_hosts())
        .target_session_attrs(from.get_target_session_attrs())
        .connect_timeout(CONNECT)
        .tcp_user_timeout(Duration::from_secs(10))
        .keepalives_idle(Duration::from_secs(30));
    config
}

/// A server or several replicas of one, and how to connect to them.
pub(super) struct Target {
    common: Config,
    places: Vec<Listed>,
    attributes: TargetSessionAttrs,
    tls: MakeRustlsConnect,
    settings: TlsSettings,
    /// The first statement on a connection for lookups.
    session: String,
    /// The server that change notifications come from. While there is one, lookups go to that server only: after a
    /// notification, another one may still have the old row.
    home: Mutex<Option<Home>>,
    /// The host that was found to have what was searched for the last time. It is tried first.
    answered: Mutex<Option<ResolvedHost>>,
    /// Lookups could not reach that server.
    astray: Notify,
}

/// One run of a server, from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ServerRun {
    started: i64,
    in_recovery: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Home {
    server: ServerRun,
    host: ResolvedHost,
}

impl Home {
    pub(super) const fn is_standby(&self) -> bool {
        self.server.in_recovery
    }

    /// For the log.
    pub(super) fn place(&self) -> String {
        let ResolvedHost { address, name, port } = &self.host;
        match address {
            Some(address) if address.to_string() != *name => format!("{name}:{port} ({address})"),
            _ => format!("{name}:{port}"),
        }
    }

    pub(super) const fn is_same_server(&self, other: &Self) -> bool {
        self.server.started == other.server.started
    }
}

/// A new connection that no task is driving yet.
pub(super) struct Reached {
    pub(super) client: Client,
    pub(super) driver: ConnectionDriver,
    pub(super) home: Home,
}

/// What is tried next in the search for a server.
enum Candidate {
    Place(Listed),
    Host(ResolvedHost),
}

/// What came of it.
enum HostTried {
    Resolved(Result<Vec<ResolvedHost>, Unreachable>),
    Opened(ResolvedHost, Result<Box<Reached>, Unreachable>),
}

/// Why there is no connection.
pub(super) enum Unreachable {
    Failed(Error),
    Refused(String),
}

impl std::fmt::Display for Unreachable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Failed(error) => f.write_str(&say(error)),
            Self::Refused(why) => f.write_str(why),
        }
    }
}

impl From<Error> for Unreachable {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<Unreachable> for StoreError {
    fn from(why: Unreachable) -> Self {
        let is_denied = match &why {
            Unreachable::Failed(error) => error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE),
            Unreachable::Refused(_) => false,
        };
        let what = why.to_string();
        if is_denied { Self::Denied(what) } else { Self::Unavailable(what) }
    }
}

impl Target {
    pub(super) fn new(settings: &PostgresSettings) -> Result<Self, Problem> {
        settings.check()?;
        let Url { mut common, places, .. } = Url::parse(settings.url.expose())?;
        let url = Url { common: common.clone(), places: places.clone(), auto: settings.tls.mode };
        let tls = match (url.encrypted(&settings.tls)?, settings.tls.client_config()?) {
            (true, Some(tls)) => {
                common.ssl_mode(SslMode::Require);
                tls
            }
            _ => {
                common.ssl_mode(SslMode::Disable);
                never()?
            }
        };
        if let Some(password) = &settings.password {
            common.password(password.expose());
        }
        let attributes = common.get_target_session_attrs();
        // Checked by tollgate itself, in the first statement of a connection.
        common.target_session_attrs(TargetSessionAttrs::Any);
        let read_only = match settings.source {
            Source::Own { .. } => "",
            _ => "SET default_transaction_read_only = on;",
        };
        // Only last uses are written on these connections, and they may be lost.
        let session = format!(
            "SET statement_timeout = {}; SET synchronous_commit = off; SET TimeZone = 'UTC'; {read_only}",
            settings.timeout.as_millis().max(1)
        );
        Ok(Self {
            common,
            places,
            attributes,
            tls: MakeRustlsConnect::new(tls),
            settings: settings.tls.clone(),
            session,
            home: Mutex::new(None),
            answered: Mutex::new(None),
            astray: Notify::new(),
        })
    }

    /// Opens a connection: to the server that notifications come from if it can be reached, else to a primary, else to
    /// any server. The caller must check which one it is, and give up after the `time` that it names.
    pub(super) async fn reach(&self, session: &str, time: Duration) -> Result<Reached, Unreachable> {
        let home = self.home();
        self.reach_from(home.as_ref(), session, time).await
    }

    /// As if notifications came from that server.
    pub(super) async fn reach_from(
        &self,
        home: Option<&Home>,
        session: &str,
        time: Duration,
    ) -> Result<Reached, Unreachable> {
        let mut places = self.places.clone();
        let mut first = home.map(|home| home.host.clone());
        if self.common.get_load_balance_hosts() == LoadBalanceHosts::Random {
            fastrand::shuffle(&mut places);
        } else {
            first = first.or_else(|| self.answered.lock().clone());
        }
        // Half of the time for each, so that a standby can still be used when the other hosts have not answered.
        let is_one = places.len() == 1 && places.iter().all(|place| place.at != Listing::Name);
        let (time_of_each, head_start) = (if is_one { time } else { time / 2 }, HEAD_START.min(time / 4));
        let mut waiting: VecDeque<Candidate> =
            first.into_iter().map(Candidate::Host).chain(places.into_iter().map(Candidate::Place)).collect();
        let mut running = FuturesUnordered::new();
        let (mut next_best, mut failed): (Option<Reached>, _) = (None, None);
        let mut tried: Vec<ResolvedHost> = Vec::new();
        // Behind a load balancer, the next connection may reach another server.
        let mut again: Vec<ResolvedHost> = Vec::new();
        let mut attempts = if home.is_some() { ATTEMPTS } else { 1 };
        let mut is_due = true;
        loop {
            if is_due || running.is_empty() {
                is_due = false;
                match waiting.pop_front() {
                    Some(Candidate::Host(host)) if tried.contains(&host) => {
                        is_due = true;
                        continue;
                    }
                    Some(candidate) => {
                        if let Candidate::Host(host) = &candidate {
                            tried.push(host.clone());
                        }
                        running.push(self.attempt(candidate, session, time_of_each));
                    }
                    None if !running.is_empty() => {}
                    None if attempts > 1 && !again.is_empty() => {
                        attempts -= 1;
                        tried.clear();
                        waiting.extend(again.drain(..).map(Candidate::Host));
                        continue;
                    }
                    None => break,
                }
            }
            let attempt = tokio::select! {
                biased;
                Some(attempt) = running.next() => attempt,
                () = sleep(head_start), if !waiting.is_empty() => {
                    is_due = true;
                    continue;
                }
            };
            // With this one, it is the next one's turn.
            is_due = true;
            match attempt {
                HostTried::Resolved(Ok(hosts)) => {
                    hosts.into_iter().rev().for_each(|host| waiting.push_front(Candidate::Host(host)));
                }
                HostTried::Opened(host, Ok(reached)) => {
                    if self.suits(&reached.home.server, home) {
                        *self.answered.lock() = Some(host);
                        return Ok(*reached);
                    }
                    let better = |best: &Reached| best.home.server.in_recovery && !reached.home.server.in_recovery;
                    if next_best.as_ref().is_none_or(better) {
                        next_best = Some(*reached);
                    }
                    again.push(host);
                }
                HostTried::Resolved(Err(error)) | HostTried::Opened(_, Err(error)) => failed = Some(error),
            }
        }
        match (next_best, failed) {
            (Some(reached), _) => Ok(reached),
            (None, Some(error)) => Err(error),
            (None, None) => Err(Unreachable::Refused("no host has an address".into())),
        }
    }

    async fn attempt(&self, candidate: Candidate, session: &str, time: Duration) -> HostTried {
        let silent = |name: &str, port| {
            Unreachable::Refused(format!("{name}:{port}: no answer within {}", humantime::format_duration(time)))
        };
        match candidate {
            Candidate::Place(place) => {
                let resolved = within(time, self.resolve(&place)).await;
                HostTried::Resolved(resolved.unwrap_or_else(|_| Err(silent(&place.name, place.port))))
            }
            Candidate::Host(host) => {
                let opened = within(time, self.open(&host, session)).await;
                let opened = opened.unwrap_or_else(|_| Err(silent(&host.name, host.port)));
                HostTried::Opened(host, opened.map(Box::new))
            }
        }
    }

    /// Whether no better server is to be searched for.
    fn suits(&self, server: &ServerRun, home: Option<&Home>) -> bool {
        match home {
            Some(home) => server.started == home.server.started,
            // Configured so.
            None => !server.in_recovery || self.attributes == TargetSessionAttrs::ReadOnly,
        }
    }

    async fn resolve(&self, place: &Listed) -> Result<Vec<ResolvedHost>, Unreachable> {
        let host = |address| ResolvedHost { address, name: place.name.clone(), port: place.port };
        let addresses: Vec<IpAddr> = match &place.at {
            Listing::Socket(_) => return Ok(vec![host(None)]),
            Listing::Address(address) => vec![*address],
            Listing::Name => {
                let found = tokio::net::lookup_host((place.name.as_str(), place.port)).await;
                let found = found.map_err(|error| Unreachable::Refused(format!("{}: {error}", place.name)))?;
                let mut found: Vec<_> = found.map(|address| address.ip()).collect();
                if self.common.get_load_balance_hosts() == LoadBalanceHosts::Random {
                    fastrand::shuffle(&mut found);
                }
                found
            }
        };
        for address in &addresses {
            let named = |why: NotAdmitted| Unreachable::Refused(format!("{}: {why}", place.name));
            self.settings.admits(*address).map_err(named)?;
        }
        Ok(addresses.into_iter().map(Some).map(host).collect())
    }

    async fn open(&self, host: &ResolvedHost, session: &str) -> Result<Reached, Unreachable> {
        let mut config = self.common.clone();
        match host.address {
            Some(address) => config.host(&host.name).hostaddr(address),
            None => config.host_path(&host.name),
        };
        config.port(host.port);
        let (client, mut driver) = config.connect(self.tls.clone()).await?;
        let begin = format!("SHOW transaction_read_only; SET search_path = {SEARCH_PATH}; {session}; {WHO}");
        let said = attended(&mut driver, client.simple_query(&begin)).await?;
        let rows: Vec<_> = said
            .iter()
            .filter_map(|message| match message {
                SimpleQueryMessage::Row(row) => Some(row),
                _ => None,
            })
            .collect();
        let [first, last] = rows.as_slice() else {
            return Err(Unreachable::Refused(format!("an answer to another question came back: {POOLER}")));
        };
        let refused =
            |why: &str| Unreachable::Refused(format!("{why}, which is not what target_session_attrs asks for"));
        match (self.attributes, first.try_get(0)?) {
            (TargetSessionAttrs::ReadWrite, Some("on")) => return Err(refused("the server takes no writes")),
            (TargetSessionAttrs::ReadOnly, Some("off")) => return Err(refused("the server takes writes")),
            _ => {}
        }
        let started = last.try_get(0)?.and_then(|started| started.parse().ok());
        let started = started.ok_or_else(|| Unreachable::Refused("the server doesn't say when it started".into()))?;
        let server = ServerRun { started, in_recovery: last.try_get(1)? != Some("f") };
        Ok(Reached { client, driver, home: Home { server, host: host.clone() } })
    }

    fn home(&self) -> Option<Home> {
        self.home.lock().clone()
    }

    /// From now on lookups go to this server only; `None`: to any.
    pub(super) fn settle(&self, home: Option<Home>) {
        *self.home.lock() = home;
    }

    /// Completes when lookups cannot reach the server that notifications come from.
    pub(super) async fn look_ups_go_astray(&self) {
        self.astray.notified().await;
    }

    /// Resets what [`Self::look_ups_go_astray`] waits for.
    pub(super) fn forget_astray(&self) {
        let _: Option<()> = self.astray.notified().now_or_never();
    }

    /// Whether a standby was used for lack of a primary, and it is time to search for one.
    fn is_makeshift(&self, connection: &Connection) -> bool {
        let choice = self.places.len() > 1 || self.places.iter().any(|place| place.at == Listing::Name);
        connection.server.in_recovery
            && self.attributes != TargetSessionAttrs::ReadOnly
            && choice
            && connection.made.elapsed() > STANDBY_KEPT
    }

    /// Whether results from this connection may be used; else what to do.
    pub(super) fn judge(&self, connection: &Connection) -> Judgement {
        let home = self.home.lock();
        match &*home {
            Some(home) if home.server.started != connection.server.started => {
                // It was opened to that server.
                let astray = connection.wanted == Some(home.server.started);
                if astray { Judgement::Astray } else { Judgement::Another }
            }
            _ => Judgement::Good,
        }
    }

    /// Tells the subscriber that lookups do not reach the same server.
    pub(super) fn say_astray(&self) -> StoreError {
        self.astray.notify_one();
        StoreError::Unavailable(format!("{self}: {ASTRAY}"))
    }
}

/// How a pooled connection may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Judgement {
    Good,
    /// To a server other than the one that notifications now come from.
    Another,
    /// The same, and no other connection can be opened.
    Astray,
}

pub(super) const ASTRAY: &str = "lookups get to another server than the one that changes are heard from: does something \
    between (a load balancer, a name with several addresses) send each connection somewhere else? Name the primary in url";

/// Waits for a result on a connection that no task is driving yet.
async fn attended<T>(
    driver: &mut ConnectionDriver,
    answer: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let mut answer = pin!(answer);
    loop {
        tokio::select! {
            biased;
            said = &mut answer => return said,
            message = poll_fn(|cx| driver.poll_message(cx)) => match message {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error),
                // The result contains the reason.
                None => return answer.await,
            },
        }
    }
}

impl std::fmt::Display for Target {
    /// For messages: without user and password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PostgreSQL at ")?;
        for (index, place) in self.places.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{}:{}", place.name, place.port)?;
        }
        self.common.get_dbname().map_or(Ok(()), |name| write!(f, "/{name}"))
    }
}

/// For plain-text connections: accepts no certificate.
fn never() -> Result<ClientConfig, Problem> {
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| Problem::error(TLS, error.to_string(), ""))?;
    Ok(builder.with_root_certificates(RootCertStore::empty()).with_no_client_auth())
}

/// Drives a connection. Notices of the server are dropped, because they may contain a token.
pub(super) fn drive(mut driver: ConnectionDriver) -> JoinHandle<()> {
    tokio::spawn(async move { while let Some(Ok(_)) = poll_fn(|cx| driver.poll_message(cx)).await {} })
}

/// A connection of the pool.
pub(super) struct Connection {
    client: ClientWrapper,
    server: ServerRun,
    /// The server that it was meant for.
    wanted: Option<i64>,
    made: Instant,
}

impl Deref for Connection {
    type Target = ClientWrapper;

    fn deref(&self) -> &ClientWrapper {
        &self.client
    }
}

pub(super) type PostgresPool = managed::Pool<Connections>;
pub(super) type Object = managed::Object<Connections>;

/// Opens the connections of a pool.
pub(super) struct Connections {
    target: Arc<Target>,
    time: Duration,
}

impl Manager for Connections {
    type Type = Connection;
    type Error = Unreachable;

    async fn create(&self) -> Result<Connection, Unreachable> {
        let target = &self.target;
        let wanted = target.home().map(|home| home.server.started);
        let Reached { client, driver, home } = target.reach(&target.session, self.time).await?;
        let client = ClientWrapper::new(client, drive(driver));
        Ok(Connection { client, server: home.server, wanted, made: Instant::now() })
    }

    async fn recycle(&self, connection: &mut Connection, _: &Metrics) -> RecycleResult<Unreachable> {
        let good = self.target.judge(connection) == Judgement::Good && !self.target.is_makeshift(connection);
        if !good || connection.client.is_closed() {
            return Err(RecycleError::message("replaced"));
        }
        Ok(())
    }
}

/// Callers wait for a connection for at most half of their timeout, so that the error can name the cause.
pub(super) fn pool(target: &Arc<Target>, connections: usize, timeout: Duration) -> Result<PostgresPool, Problem> {
    PostgresPool::builder(Connections { target: Arc::clone(target), time: timeout })
        .max_size(connections.max(1))
        // The one that was used last comes first, so that those that a burst opened are used no more.
        .queue_mode(managed::QueueMode::Lifo)
        .wait_timeout(Some(timeout / 2))
        .create_timeout(Some(timeout.max(CONNECT)))
        .recycle_timeout(Some(timeout))
        .runtime(Runtime::Tokio1)
        .build()
        .map_err(|error| Problem::error("connections", error.to_string(), ""))
}

pub(super) fn no_connection(error: managed::PoolError<Unreachable>, target: &Target) -> StoreError {
    use managed::PoolError;
    match error {
        PoolError::Timeout(TimeoutType::Wait) => StoreError::Overloaded,
        PoolError::Timeout(_) => StoreError::Unavailable(format!("{target}: no connection in time")),
        PoolError::Backend(error) => StoreError::from(error).at(target),
        PoolError::Closed | PoolError::NoRuntimeSpecified | PoolError::PostCreateHook(_) => {
            StoreError::Unavailable(format!("{target}: the pool is closed"))
        }
    }
}

/// What to do about tables that are missing or old.
pub(super) const MIGRATE: &str = "run `tollgate store migrate --config FILE`";

/// The error for results that belong to another client's query.
pub(super) const POOLER: &str = "is there a pooler between that gives each transaction another connection? Let tollgate \
    have its own: pool_mode = session, or PostgreSQL's own port";

/// A query without a result.
pub(super) struct QueryFailure {
    pub(super) error: StoreError,
    pub(super) connection: Reuse,
}

/// What to do with a connection after a failure.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Reuse {
    Keep,
    Drop,
    /// It was lost or is outdated; another connection may succeed.
    Replace,
}

impl QueryFailure {
    /// The tables or the query are at fault, for whatever token.
    pub(super) fn unusable(text: impl Into<String>) -> Self {
        Self { error: StoreError::Unusable(text.into()), connection: Reuse::Drop }
    }

    pub(super) fn garbage(text: impl Into<String>) -> Self {
        Self { error: StoreError::Garbage(text.into()), connection: Reuse::Drop }
    }

    /// A connection pooler may run the query on a connection where the prepared statement is another client's.
    pub(super) fn anothers_answer() -> Self {
        let text = format!("an answer to another question came back: {POOLER}");
        Self { error: StoreError::Unavailable(text), connection: Reuse::Drop }
    }

    /// For a query written by the operator.
    pub(super) fn lookup(error: Error) -> Self {
        let unknown = [SqlState::UNDEFINED_TABLE, SqlState::UNDEFINED_FUNCTION, SqlState::UNDEFINED_OBJECT];
        if error.code().is_some_and(|code| unknown.contains(code)) {
            return Self::of(
                &error,
                "correct the lookup query. It runs with search_path = pg_catalog, pg_temp: tables, functions, types and \
                 operators of other schemas are written with their schema, like public.people",
            );
        }
        Self::of(&error, "correct the lookup query, or grant what it needs")
    }

    /// For a query on tollgate's own tables.
    pub(super) fn own(error: Error) -> Self {
        Self::of(&error, MIGRATE)
    }

    pub(super) fn of(error: &Error, advice: &str) -> Self {
        let Some(code) = error.code() else {
            return Self { error: StoreError::Unavailable(say(error)), connection: Reuse::Replace };
        };
        let class = &code.code()[..2];
        let text = say(error);
        // A prepared plan that no longer fits its table, or that a pooler lost: affects only this connection.
        let stale = *code == SqlState::FEATURE_NOT_SUPPORTED || *code == SqlState::INVALID_SQL_STATEMENT_NAME;
        let lost = stale || class == "08" || (class == "57" && *code != SqlState::QUERY_CANCELED);
        let error = match class {
            _ if *code == SqlState::DUPLICATE_PSTATEMENT || *code == SqlState::INVALID_SQL_STATEMENT_NAME => {
                StoreError::Unavailable(format!("{text}: {POOLER}"))
            }
            "57" if *code == SqlState::QUERY_CANCELED => StoreError::Timeout,
            _ if *code == SqlState::INSUFFICIENT_PRIVILEGE => StoreError::Denied(format!("{text}: {advice}")),
            "42" | "3F" | "0A" => StoreError::Unusable(format!("{text}: {advice}")),
            // These may be about the one token that was asked for.
            "22" | "21" | "P0" => StoreError::Garbage(format!("{text}: {advice}")),
            _ => StoreError::Unavailable(text),
        };
        Self { error, connection: if lost { Reuse::Replace } else { Reuse::Keep } }
    }

    /// The message, without text that must not be shown.
    pub(super) fn without(self, hidden: &str) -> StoreError {
        self.hiding(hidden).error
    }

    pub(super) fn hiding(mut self, hidden: &str) -> Self {
        if let StoreError::Garbage(text)
        | StoreError::Unusable(text)
        | StoreError::Unavailable(text)
        | StoreError::Denied(text) = &mut self.error
            && !hidden.is_empty()
        {
            *text = text.replace(hidden, "…");
        }
        self
    }
}

/// The message for a failure. The server's own message is included only if it cannot contain a value of the query.
pub(super) fn say(error: &Error) -> String {
    if let Some(said) = error.as_db_error() {
        let code = said.code().code();
        return match &code[..2] {
            "08" | "0A" | "25" | "28" | "3D" | "3F" | "42" | "53" | "55" | "57" => {
                format!("{} (SQLSTATE {code})", said.message())
            }
            _ => format!("the query failed with SQLSTATE {code}"),
        };
    }
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
