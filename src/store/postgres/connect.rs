//! Reaching a PostgreSQL server: where, how safely, which of several, and what may be said of it when it fails. Knows no
//! tokens, except that an error text must not repeat one.

use super::super::{Place, StoreError, TlsMode, TlsSettings};
use super::{PostgresSettings, Source};
use deadpool::managed::{self, Manager, Metrics, RecycleError, RecycleResult, TimeoutType};
use deadpool_postgres::{ClientWrapper, Runtime};
use futures_util::FutureExt as _;
use parking_lot::Mutex;
use rustls::{ClientConfig, RootCertStore};
use std::future::poll_fn;
use std::net::IpAddr;
use std::ops::Deref;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinHandle};
use tokio_postgres::config::{Host, LoadBalanceHosts, SslMode, TargetSessionAttrs};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, Connection as Wire, Error, SimpleQueryMessage, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;

/// How long the network may take to open a connection.
const CONNECT: Duration = Duration::from_secs(1);
/// How long a connection to a standby serves look-ups, while there may be a primary elsewhere.
const STANDBY_KEPT: Duration = Duration::from_secs(5);
/// How often a place is tried that answers with another server than the wanted one.
const ATTEMPTS: u32 = 3;
/// Where each of our statements looks for the names that stand in it without a schema, operators among them: whoever may
/// create things in another schema must not decide what our statements mean. The session's temporary objects would come
/// first if they were not named last.
pub(super) const SEARCH_PATH: &str = "pg_catalog, pg_temp";
/// Said first on each connection. What comes last says which server it is: no two start in the same microsecond, and one
/// that restarts has closed its connections.
const WHO: &str = "SELECT (extract(epoch FROM pg_catalog.pg_postmaster_start_time()) * 1000000)::bigint, \
    pg_catalog.pg_is_in_recovery()";

pub(super) type Driver = Wire<Socket, <MakeRustlsConnect as tokio_postgres::tls::MakeTlsConnect<Socket>>::Stream>;

/// A place that the URL names.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Listed {
    at: Listing,
    /// What its certificate must be for.
    name: String,
    port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Listing {
    Socket(PathBuf),
    Address(IpAddr),
    Name,
}

/// A place whose address is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Spot {
    /// `None`: the socket in the folder that is its name.
    address: Option<IpAddr>,
    name: String,
    port: u16,
}

/// What the URL says.
struct Url {
    /// All but the places.
    common: Config,
    places: Vec<Listed>,
    /// What "auto" means here.
    auto: TlsMode,
}

impl Url {
    fn parse(url: &str) -> Result<Self, String> {
        // What the parser says may repeat a part of a password.
        let config: Config = url.parse().map_err(|_: Error| {
            "is no PostgreSQL URL: neither postgres://USER@HOST:PORT/DATABASE nor a list of libpq's keywords. Special \
             characters of a password must be percent-encoded, or given in a setting of their own; sslmode verify-ca and \
             verify-full are settings of tollgate and not parts of the URL"
                .to_owned()
        })?;
        let (hosts, addresses, ports) = (config.get_hosts(), config.get_hostaddrs(), config.get_ports());
        let count = hosts.len().max(addresses.len());
        if count == 0 || hosts.contains(&Host::Tcp(String::new())) {
            return Err("names no host; for a socket, give the folder that it is in".into());
        }
        if !hosts.is_empty() && !addresses.is_empty() && hosts.len() != addresses.len() {
            return Err(format!("has {} of host and {} of hostaddr: one for each", hosts.len(), addresses.len()));
        }
        if ports.len() > 1 && ports.len() != count {
            return Err(format!("has {} ports for {count} hosts: one for each, or one for all", ports.len()));
        }
        let place = |index: usize| {
            let port = ports.get(index).or(ports.first()).copied().unwrap_or(5432);
            // As libpq: an address is where to go, and the name beside it what the certificate is for.
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
        // A name beside an address counts as well: where somebody else is asked for, the certificate is to say so.
        let named = hosts.iter().map(|host| match host {
            Host::Unix(_) => Place::Socket,
            Host::Tcp(name) => Place::of_host(name),
        });
        let auto = TlsMode::auto(named.chain(addresses.iter().copied().map(Place::Address)));
        Ok(Self { common: without_places(&config), places: (0..count).map(place).collect(), auto })
    }

    /// Whether the connection is encrypted with these settings.
    fn encrypted(&self, tls: &TlsSettings) -> Result<bool, String> {
        let is_socket = |place: &&Listed| matches!(place.at, Listing::Socket(_));
        let sockets = self.places.iter().filter(is_socket).count();
        let only_sockets = sockets == self.places.len();
        if !tls.is_plain() && sockets > 0 && !only_sockets {
            return Err("a socket can't be encrypted and another host must be: name only one kind".into());
        }
        if tls.is_plain() && !only_sockets && self.common.get_ssl_mode() == SslMode::Require {
            return Err("asks for sslmode=require while the tls setting says plain text: set tls".into());
        }
        Ok(!tls.is_plain() && !only_sockets)
    }
}

/// What "auto" means for a URL.
pub fn tls_auto(url: &str) -> Result<TlsMode, String> {
    Url::parse(url).map(|url| url.auto)
}

/// What is wrong with a URL, given all other settings.
pub fn check_url(settings: &PostgresSettings) -> Result<(), String> {
    Url::parse(settings.url.expose())?.encrypted(&settings.tls).map(drop)
}

/// The type can't forget its hosts.
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
        .application_name(from.get_application_name().unwrap_or("tollgate"))
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

/// A server, or several that stand in for each other, and how to speak with them.
pub(super) struct Target {
    common: Config,
    places: Vec<Listed>,
    attributes: TargetSessionAttrs,
    tls: MakeRustlsConnect,
    settings: TlsSettings,
    /// What a connection for look-ups begins with.
    session: String,
    /// The server that changes are heard from. While there is one, look-ups go there and nowhere else: behind a
    /// notification, another one may still have the row of before.
    home: Mutex<Option<Home>>,
    /// Look-ups could not get there.
    astray: Notify,
}

/// One server, from one of its starts on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Server {
    started: i64,
    in_recovery: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Home {
    server: Server,
    spot: Spot,
}

impl Home {
    pub(super) const fn is_standby(&self) -> bool {
        self.server.in_recovery
    }

    pub(super) const fn is_same_server(&self, other: &Self) -> bool {
        self.server.started == other.server.started
    }
}

/// A new connection, which nobody drives yet.
pub(super) struct Reached {
    pub(super) client: Client,
    pub(super) driver: Driver,
    pub(super) home: Home,
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

impl Target {
    pub(super) fn new(settings: &PostgresSettings) -> Result<Self, String> {
        let at_url = |why: String| format!("url: {why}");
        let Url { mut common, places, .. } = Url::parse(settings.url.expose()).map_err(at_url)?;
        let url = Url { common: common.clone(), places: places.clone(), auto: settings.tls.mode };
        let tls = match (url.encrypted(&settings.tls).map_err(at_url)?, settings.tls.client_config()?) {
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
        // Asked by ourselves, together with what else a connection begins with.
        common.target_session_attrs(TargetSessionAttrs::Any);
        let read_only = match settings.source {
            Source::Own { .. } => "",
            _ => "SET default_transaction_read_only = on;",
        };
        // Only the last use of a token is written here, which may be lost.
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
            astray: Notify::new(),
        })
    }

    /// Opens a connection, to the server that changes are heard from if that can be reached, else to a primary, else to
    /// what there is. The caller looks at which it was.
    pub(super) async fn reach(&self, session: &str) -> Result<Reached, Unreachable> {
        let home = self.home();
        self.reach_from(home.as_ref(), session).await
    }

    /// As if changes were heard from there.
    pub(super) async fn reach_from(&self, home: Option<&Home>, session: &str) -> Result<Reached, Unreachable> {
        let mut next_best: Option<Reached> = None;
        let mut failed = None;
        let mut places = self.places.clone();
        if self.common.get_load_balance_hosts() == LoadBalanceHosts::Random {
            fastrand::shuffle(&mut places);
        }
        // Where it was last goes first.
        let mut spots: Vec<Spot> = home.map(|home| home.spot.clone()).into_iter().collect();
        let mut unresolved = places.into_iter();
        // Of a load balancer the next connection may get to another server.
        let mut again: Vec<Spot> = Vec::new();
        let mut tried: Vec<Spot> = Vec::new();
        let mut attempts = if home.is_some() { ATTEMPTS } else { 1 };
        loop {
            for spot in std::mem::take(&mut spots) {
                if tried.contains(&spot) {
                    continue;
                }
                tried.push(spot.clone());
                match self.open(&spot, session).await {
                    Ok(reached) if self.suits(&reached.home.server, home) => return Ok(reached),
                    Ok(reached) => {
                        let better = |best: &Reached| best.home.server.in_recovery && !reached.home.server.in_recovery;
                        if next_best.as_ref().is_none_or(better) {
                            next_best = Some(reached);
                        }
                        again.push(spot);
                    }
                    Err(error) => failed = Some(error),
                }
            }
            if let Some(place) = unresolved.next() {
                match self.resolve(&place).await {
                    Ok(resolved) => spots = resolved,
                    Err(error) => failed = Some(error),
                }
            } else if attempts > 1 && !again.is_empty() {
                attempts -= 1;
                spots = std::mem::take(&mut again);
                tried.clear();
            } else {
                break;
            }
        }
        match (next_best, failed) {
            (Some(reached), _) => Ok(reached),
            (None, Some(error)) => Err(error),
            (None, None) => Err(Unreachable::Refused("no host has an address".into())),
        }
    }

    /// Whether there is nothing better to look for.
    fn suits(&self, server: &Server, home: Option<&Home>) -> bool {
        match home {
            Some(home) => server.started == home.server.started,
            // Somebody asked for just that.
            None => !server.in_recovery || self.attributes == TargetSessionAttrs::ReadOnly,
        }
    }

    async fn resolve(&self, place: &Listed) -> Result<Vec<Spot>, Unreachable> {
        let spot = |address| Spot { address, name: place.name.clone(), port: place.port };
        let addresses: Vec<IpAddr> = match &place.at {
            Listing::Socket(_) => return Ok(vec![spot(None)]),
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
            let named = |why: String| Unreachable::Refused(format!("{}: {why}", place.name));
            self.settings.admits(*address).map_err(named)?;
        }
        Ok(addresses.into_iter().map(Some).map(spot).collect())
    }

    async fn open(&self, spot: &Spot, session: &str) -> Result<Reached, Unreachable> {
        let mut config = self.common.clone();
        match spot.address {
            Some(address) => config.host(&spot.name).hostaddr(address),
            None => config.host_path(&spot.name),
        };
        config.port(spot.port);
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
        let server = Server { started, in_recovery: last.try_get(1)? != Some("f") };
        Ok(Reached { client, driver, home: Home { server, spot: spot.clone() } })
    }

    fn home(&self) -> Option<Home> {
        self.home.lock().clone()
    }

    /// From now on look-ups go to this server only; `None`: to any.
    pub(super) fn settle(&self, home: Option<Home>) {
        *self.home.lock() = home;
    }

    /// Comes back when look-ups can't get to where changes are heard from.
    pub(super) async fn look_ups_go_astray(&self) {
        self.astray.notified().await;
    }

    /// Forgets what was said of look-ups before.
    pub(super) fn forget_astray(&self) {
        let _: Option<()> = self.astray.notified().now_or_never();
    }

    /// Whether a standby was taken for want of a primary, and it is time to look for one.
    fn is_makeshift(&self, connection: &Connection) -> bool {
        let choice = self.places.len() > 1 || self.places.iter().any(|place| place.at == Listing::Name);
        connection.server.in_recovery
            && self.attributes != TargetSessionAttrs::ReadOnly
            && choice
            && connection.made.elapsed() > STANDBY_KEPT
    }

    /// Whether answers from this connection may be given; what to do if not.
    pub(super) fn judge(&self, connection: &Connection) -> Judgement {
        let home = self.home.lock();
        match &*home {
            Some(home) if home.server.started != connection.server.started => {
                // It was made to go there.
                let astray = connection.wanted == Some(home.server.started);
                if astray { Judgement::Astray } else { Judgement::Another }
            }
            _ => Judgement::Good,
        }
    }

    /// Tells who follows changes that look-ups don't get to the same server.
    pub(super) fn say_astray(&self) -> StoreError {
        self.astray.notify_one();
        StoreError::Unavailable(format!("{self}: {ASTRAY}"))
    }
}

/// What a pooled connection is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Judgement {
    Good,
    /// To another server than changes are heard from by now.
    Another,
    /// And no other can be had.
    Astray,
}

pub(super) const ASTRAY: &str = "look-ups get to another server than the one that changes are heard from: does something \
    between (a load balancer, a name with several addresses) send each connection somewhere else? Name the primary in url";

/// Waits for an answer on a connection that nobody drives yet.
async fn attended<T>(driver: &mut Driver, answer: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let mut answer = pin!(answer);
    loop {
        tokio::select! {
            biased;
            said = &mut answer => return said,
            message = poll_fn(|cx| driver.poll_message(cx)) => match message {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error),
                // The answer knows why.
                None => return answer.await,
            },
        }
    }
}

impl std::fmt::Display for Target {
    /// For people; without user and password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PostgreSQL at ")?;
        for (index, place) in self.places.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{}:{}", place.name, place.port)?;
        }
        self.common.get_dbname().map_or(Ok(()), |name| write!(f, "/{name}"))
    }
}

/// For connections that are plain text: trusts nobody.
fn never() -> Result<ClientConfig, String> {
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("TLS: {error}"))?;
    Ok(builder.with_root_certificates(RootCertStore::empty()).with_no_client_auth())
}

/// Ends a task when it is dropped.
pub(super) struct EndsWith(Option<AbortHandle>);

impl EndsWith {
    pub(super) fn owner_of(task: &JoinHandle<()>) -> Self {
        Self(Some(task.abort_handle()))
    }
}

impl Drop for EndsWith {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

/// Runs a connection. What the server remarks on is dropped: it may repeat a token.
pub(super) fn drive(mut driver: Driver) -> JoinHandle<()> {
    tokio::spawn(async move { while let Some(Ok(_)) = poll_fn(|cx| driver.poll_message(cx)).await {} })
}

/// A connection of the pool.
pub(super) struct Connection {
    client: ClientWrapper,
    server: Server,
    /// The server that it was to go to.
    wanted: Option<i64>,
    made: Instant,
}

impl Deref for Connection {
    type Target = ClientWrapper;

    fn deref(&self) -> &ClientWrapper {
        &self.client
    }
}

pub(super) type Pool = managed::Pool<Connections>;
pub(super) type Object = managed::Object<Connections>;

/// Makes the connections of a pool.
pub(super) struct Connections(Arc<Target>);

impl Manager for Connections {
    type Type = Connection;
    type Error = Unreachable;

    async fn create(&self) -> Result<Connection, Unreachable> {
        let target = &self.0;
        let wanted = target.home().map(|home| home.server.started);
        let Reached { client, driver, home } = target.reach(&target.session).await?;
        let client = ClientWrapper::new(client, drive(driver));
        Ok(Connection { client, server: home.server, wanted, made: Instant::now() })
    }

    async fn recycle(&self, connection: &mut Connection, _: &Metrics) -> RecycleResult<Unreachable> {
        let good = self.0.judge(connection) == Judgement::Good && !self.0.is_makeshift(connection);
        if !good || connection.client.is_closed() {
            return Err(RecycleError::message("replaced"));
        }
        Ok(())
    }
}

/// Callers wait for a connection for half of their time at most, so that they are told what they waited for.
pub(super) fn pool(target: &Arc<Target>, connections: usize, timeout: Duration) -> Result<Pool, String> {
    Pool::builder(Connections(Arc::clone(target)))
        .max_size(connections.max(1))
        .wait_timeout(Some(timeout / 2))
        .create_timeout(Some(timeout.max(CONNECT)))
        .recycle_timeout(Some(timeout))
        .runtime(Runtime::Tokio1)
        .build()
        .map_err(|error| format!("PostgreSQL connections: {error}"))
}

pub(super) fn no_connection(error: managed::PoolError<Unreachable>, target: &Target) -> StoreError {
    use managed::PoolError;
    match error {
        PoolError::Timeout(TimeoutType::Wait) => StoreError::Overloaded,
        PoolError::Timeout(_) => StoreError::Unavailable(format!("{target}: no connection in time")),
        PoolError::Backend(error) => StoreError::Unavailable(format!("{target}: {error}")),
        PoolError::Closed | PoolError::NoRuntimeSpecified | PoolError::PostCreateHook(_) => {
            StoreError::Unavailable(format!("{target}: the pool is closed"))
        }
    }
}

/// What to do about answers that belong to others.
pub(super) const POOLER: &str = "is there a pooler between that gives each transaction another connection? Let tollgate \
    have its own: pool_mode = session, or PostgreSQL's own port";

/// A question that was not answered.
pub(super) struct Failure {
    pub(super) error: StoreError,
    pub(super) connection: Verdict,
}

/// What becomes of a connection after a failure.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Keep,
    Drop,
    /// It was lost, or is out of date; another one may do better.
    Replace,
}

impl Failure {
    pub(super) fn garbage(text: impl Into<String>) -> Self {
        Self { error: StoreError::Garbage(text.into()), connection: Verdict::Drop }
    }

    /// A pooler may put our question on a connection where it means another's.
    pub(super) fn anothers_answer() -> Self {
        let text = format!("an answer to another question came back: {POOLER}");
        Self { error: StoreError::Unavailable(text), connection: Verdict::Drop }
    }

    /// Of a query that people wrote.
    pub(super) fn lookup(error: Error) -> Self {
        let unknown = [SqlState::UNDEFINED_TABLE, SqlState::UNDEFINED_FUNCTION, SqlState::UNDEFINED_OBJECT];
        if error.code().is_some_and(|code| unknown.contains(code)) {
            return Self::of(
                &error,
                "correct the look-up query. It runs with search_path = pg_catalog, pg_temp: tables, functions, types and \
                 operators of other schemas are written with their schema, like public.people",
            );
        }
        Self::of(&error, "correct the look-up query, or grant what it needs")
    }

    /// Of a query on our own tables.
    pub(super) fn own(error: Error) -> Self {
        Self::of(&error, super::schema::MIGRATE)
    }

    fn of(error: &Error, advice: &str) -> Self {
        let Some(code) = error.code() else {
            return Self { error: StoreError::Unavailable(say(error)), connection: Verdict::Replace };
        };
        let class = &code.code()[..2];
        let text = say(error);
        // A plan that no longer fits its table, or that a pooler lost: only for this connection.
        let stale = *code == SqlState::FEATURE_NOT_SUPPORTED || *code == SqlState::INVALID_SQL_STATEMENT_NAME;
        let lost = stale || class == "08" || (class == "57" && *code != SqlState::QUERY_CANCELED);
        let error = match class {
            _ if *code == SqlState::DUPLICATE_PSTATEMENT || *code == SqlState::INVALID_SQL_STATEMENT_NAME => {
                StoreError::Unavailable(format!("{text}: {POOLER}"))
            }
            "57" if *code == SqlState::QUERY_CANCELED => StoreError::Timeout,
            "42" | "22" | "21" | "3F" | "0A" | "P0" => StoreError::Garbage(format!("{text}: {advice}")),
            _ => StoreError::Unavailable(text),
        };
        Self { error, connection: if lost { Verdict::Replace } else { Verdict::Keep } }
    }

    /// What to tell, without a text that must not be told.
    pub(super) fn without(self, hidden: &str) -> StoreError {
        match self.error {
            StoreError::Garbage(text) if !hidden.is_empty() => StoreError::Garbage(text.replace(hidden, "…")),
            StoreError::Unavailable(text) if !hidden.is_empty() => StoreError::Unavailable(text.replace(hidden, "…")),
            error => error,
        }
    }
}

/// What happened, for people. A server's own words are repeated only where they can't hold a value of the query.
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
