//! Reaching a PostgreSQL server: where, how safely, and what may be said of it when it fails. Knows no tokens, except
//! that an error text must not repeat one.

use super::super::{StoreError, TlsMode};
use super::{PostgresSettings, Source};
use deadpool_postgres::{Connect, Manager, ManagerConfig, Pool, PoolError, RecyclingMethod, Runtime, TimeoutType};
use rustls::{ClientConfig, RootCertStore};
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::{AbortHandle, JoinHandle};
use tokio_postgres::config::{Host, SslMode};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, Connection, Error, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;

/// How long the network may take to open a connection.
const CONNECT: Duration = Duration::from_secs(1);

pub(super) type Driver = Connection<Socket, <MakeRustlsConnect as tokio_postgres::tls::MakeTlsConnect<Socket>>::Stream>;

/// A server, and how to speak with it.
pub(super) struct Target {
    config: Config,
    tls: MakeRustlsConnect,
    /// What a connection for look-ups begins with.
    session: String,
}

impl Target {
    pub(super) fn new(settings: &PostgresSettings) -> Result<Self, String> {
        // What the parser says may repeat a part of a password.
        let mut config: Config = settings.url.expose().parse().map_err(|_: Error| {
            "url: is neither postgres://USER@HOST:PORT/DATABASE nor a list of libpq's keywords. Special characters of a \
             password must be percent-encoded, or given in a setting of their own; sslmode verify-ca and verify-full \
             are settings of tollgate and not parts of the URL"
                .to_owned()
        })?;
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            return Err("url: names no host; for a socket, give the folder that it is in".into());
        }
        let is_socket = |host: &Host| matches!(host, Host::Unix(_));
        let sockets = config.get_hosts().iter().filter(|host| is_socket(host)).count();
        let only_sockets = sockets > 0 && sockets == config.get_hosts().len();
        let wanted = config.get_ssl_mode();
        let tls = match settings.tls.client_config()? {
            Some(tls) if !only_sockets => {
                if sockets > 0 {
                    return Err("url: a socket can't be encrypted and another host must be: name only one kind".into());
                }
                config.ssl_mode(SslMode::Require);
                tls
            }
            _ => {
                if wanted == SslMode::Require && settings.tls.mode == TlsMode::Disable && !only_sockets {
                    return Err("url: asks for sslmode=require while the tls setting says disable".into());
                }
                config.ssl_mode(SslMode::Disable);
                never()?
            }
        };
        if let Some(password) = &settings.password {
            config.password(password.expose());
        }
        if config.get_application_name().is_none() {
            config.application_name("tollgate");
        }
        config
            .connect_timeout(CONNECT)
            .tcp_user_timeout(Duration::from_secs(10))
            .keepalives_idle(Duration::from_secs(30));
        let read_only = match settings.source {
            Source::Own { .. } => "",
            _ => "SET default_transaction_read_only = on;",
        };
        // Only the last use of a token is written here, which may be lost.
        let session = format!(
            "SET statement_timeout = {}; SET synchronous_commit = off; SET TimeZone = 'UTC'; {read_only}",
            settings.timeout.as_millis().max(1)
        );
        Ok(Self { config, tls: MakeRustlsConnect::new(tls), session })
    }

    pub(super) async fn connect(&self) -> Result<(Client, Driver), Error> {
        self.config.connect(self.tls.clone()).await
    }
}

impl std::fmt::Display for Target {
    /// For people; without user and password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PostgreSQL at ")?;
        match (self.config.get_hosts().first(), self.config.get_hostaddrs().first()) {
            (Some(Host::Tcp(host)), _) => f.write_str(host)?,
            (Some(Host::Unix(path)), _) => write!(f, "{}", path.display())?,
            (None, Some(address)) => write!(f, "{address}")?,
            (None, None) => {}
        }
        write!(f, ":{}", self.config.get_ports().first().unwrap_or(&5432))?;
        self.config.get_dbname().map_or(Ok(()), |name| write!(f, "/{name}"))
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

/// Makes the connections of a pool.
struct Connector(Arc<Target>);

impl Connect for Connector {
    fn connect(
        &self,
        _: &Config,
    ) -> Pin<Box<dyn Future<Output = Result<(Client, JoinHandle<()>), Error>> + Send + '_>> {
        Box::pin(async {
            let (client, driver) = self.0.connect().await?;
            let task = drive(driver);
            let mut owner = EndsWith::owner_of(&task);
            client.batch_execute(&self.0.session).await?;
            // From here on the pool ends the task with the connection.
            owner.0 = None;
            Ok((client, task))
        })
    }
}

/// Callers wait for a connection for half of their time at most, so that they are told what they waited for.
pub(super) fn pool(target: &Arc<Target>, connections: usize, timeout: Duration) -> Result<Pool, String> {
    let manager = Manager::from_connect(
        target.config.clone(),
        Connector(Arc::clone(target)),
        ManagerConfig { recycling_method: RecyclingMethod::Fast },
    );
    Pool::builder(manager)
        .max_size(connections.max(1))
        .wait_timeout(Some(timeout / 2))
        .create_timeout(Some(timeout.max(CONNECT)))
        .recycle_timeout(Some(timeout))
        .runtime(Runtime::Tokio1)
        .build()
        .map_err(|error| format!("PostgreSQL connections: {error}"))
}

pub(super) fn no_connection(error: PoolError, target: &Target) -> StoreError {
    match error {
        PoolError::Timeout(TimeoutType::Wait) => StoreError::Overloaded,
        PoolError::Timeout(_) => StoreError::Unavailable(format!("{target}: no connection in time")),
        PoolError::Backend(error) => StoreError::Unavailable(format!("{target}: {}", say(&error))),
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
