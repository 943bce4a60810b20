//! Changes of a PostgreSQL server: a connection of its own that listens. Of our own tables it reads the list of changes
//! again and again, which proves that none is missed and costs the server no transaction id; notifications only make it
//! faster. Of other tables there is no list, and an echo proves that notifications arrive. Confirms to who waits until
//! every gateway has heard. Knows nothing of what a record says.

use super::super::feed::{Begun, ChangeSource, Coverage, Inbox, Loss, Message, Pace, Subscription};
use super::super::{Change, Mark, Named, REPLICA_GONE, StoreError, replica_name};
use super::admin::CHANGES_KEPT;
use super::connect::{
    ASTRAY, ConnectionDriver, Home, MIGRATE, POOLER, QueryFailure, Reached, Target, Unreachable, drive,
};
use super::presets::TriggerCheck;
use super::schema::{ChangesSeen, ListedChange};
use super::{Source, presets, schema};
use crate::store::credential::Digest;
use crate::telemetry::metrics::StoreMetrics;
use async_trait::async_trait;
use futures_util::future::BoxFuture;
use parking_lot::{Mutex, Once};
use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use tokio_postgres::{AsyncMessage, Client, Error, Notification, SimpleQueryMessage};
use tokio_util::task::AbortOnDropHandle;

/// How often the list of changes is read, or the server is asked to say something back.
const BEAT: Duration = Duration::from_millis(300);
/// How long nothing may arrive while that is awaited.
const SILENCE: Duration = Duration::from_millis(500);
/// How often a gateway that reads the list makes sure that notifications arrive, too. An echo costs a transaction id.
const ECHO: Duration = Duration::from_secs(5);
/// How often the gateway's row is brought up to date: each time costs a transaction id.
const ENTRY: Duration = Duration::from_secs(3);
/// How often the triggers of other tables are looked for.
const TRIGGER_CHECK: Duration = Duration::from_secs(3);
/// How often all gateways together delete what nobody asks for any more.
const TIDY: Duration = Duration::from_secs(60);
/// So many rows are deleted at once: what takes long delays the next beat.
const TIDY_ROWS: u64 = 5_000;
/// Keeps two gateways from deleting at once: "tgtidy" in hex digits.
const TIDY_LOCK: i64 = 0x7467_7469_6479;
/// For leaving the register.
const LEAVE: Duration = Duration::from_millis(900);
/// For all that comes before the first beat, and for each thing asked later.
const PATIENCE: Duration = Duration::from_secs(2);
/// For the server to begin to listen: it first reads through what others have not read, and a client that gives up and
/// begins anew only makes that longer. How far it is cannot be told: LISTEN is one statement without a sign in between,
/// `pg_stat_activity` says no more than that it runs, and `pg_notification_queue_usage()` moves when it is done. So this is a
/// fixed time: a quarter of a queue of 8 GB (see [`QUEUE_HIGH`]) at 17 MB/s.
const LISTENING: Duration = Duration::from_secs(120);
/// A part of the server's notification queue. It is all but empty unless a session that listens is in a transaction that
/// does not end. Below this one, listening begins at once.
const QUEUE_LOW: f64 = 0.05;
/// From here on nobody is promised notifications: triggers send none when the queue is half full, so that changes do not
/// fail when it is full.
const QUEUE_HIGH: f64 = 0.25;

pub(super) struct PostgresChanges {
    target: Arc<Target>,
    source: Source,
    channel: String,
    /// This store's key in the register, and its channel for echoes.
    id: String,
    name: String,
    /// Whether this is a gateway that others wait for.
    registers: bool,
    /// Whether there is an entry in the register.
    entered: Arc<AtomicBool>,
    metrics: Arc<StoreMetrics>,
    /// The server of this session.
    home: Option<Home>,
    warnings: Arc<PostgresWarnings>,
}

/// Warnings that are logged once, although their cause may be found again and again.
#[derive(Default)]
struct PostgresWarnings {
    nonsense: Once,
    channel: Once,
    loose: Once,
    /// Whether it is known that the notification queue fills up.
    queue: AtomicBool,
}

impl PostgresChanges {
    pub(super) fn new(
        target: &Arc<Target>,
        source: &Source,
        channel: &str,
        registers: bool,
        metrics: Arc<StoreMetrics>,
    ) -> Self {
        Self {
            target: Arc::clone(target),
            source: source.clone(),
            channel: channel.into(),
            id: format!("tollgate_{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..)),
            name: replica_name(),
            registers,
            entered: Arc::default(),
            metrics,
            home: None,
            warnings: Arc::default(),
        }
    }

    /// Our own tables, where gateways stand in a register.
    fn schema(&self) -> Option<&str> {
        match &self.source {
            Source::Own { schema } => Some(schema),
            _ => None,
        }
    }
}

#[async_trait]
impl ChangeSource for PostgresChanges {
    type Subscription = Listener;

    fn label(&self) -> String {
        self.target.to_string()
    }

    fn pace(&self) -> Pace {
        let upkeep = if self.schema().is_some() { ENTRY } else { TRIGGER_CHECK };
        Pace { beat: BEAT, silence: Some(SILENCE), upkeep: Some(upkeep) }
    }

    /// Without triggers nobody notifies of changes.
    fn may_be_untold(&self) -> bool {
        self.schema().is_none()
    }

    async fn begin(&mut self, inbox: Inbox<String>) -> Result<Begun<Listener>, Loss> {
        // The list of changes is read by an index, also before the server knows how long it is; and what is to be done three
        // times a second is not worth compiling.
        let plans = self.schema().map_or("", |_| "; SET enable_seqscan = off; SET jit = off");
        let begin = format!("SET statement_timeout = {}; SET synchronous_commit = off{plans}", PATIENCE.as_millis());
        let reached = timeout(PATIENCE, self.target.reach(&begin, PATIENCE)).await;
        let Reached { client, driver, home } = match reached {
            Ok(Ok(reached)) => reached,
            Ok(Err(why)) => return Err(StoreError::from(why).into()),
            Err(_) => return Err(unavailable(format!("no connection within {PATIENCE:?}")).into()),
        };
        if home.is_standby() {
            return Err(StoreError::ReadOnly(
                "a standby server tells nobody of changes: revoked tokens work until they are looked up again. Name the \
                 primary server in url, alone or among others"
                    .into(),
            )
            .into());
        }
        self.home = Some(home.clone());
        self.target.forget_astray();
        let (signs, inbox) = (Arc::<Signs>::default(), Arc::new(inbox));
        let mut listener = Listener {
            client,
            target: Arc::clone(&self.target),
            schema: self.schema().map(str::to_owned),
            list: None,
            channel: self.channel.clone(),
            id: self.id.clone(),
            nobody: Digest::of(self.id.as_bytes()).to_hex(),
            name: self.name.clone(),
            registers: self.registers,
            entered: Arc::clone(&self.entered),
            tidies: AtomicBool::new(false),
            trigger_check: presets::trigger_check(&self.source, &self.channel),
            signs: Arc::clone(&signs),
            warnings: Arc::clone(&self.warnings),
            inbox: Arc::clone(&inbox),
        };
        let (nobody, warnings) = (listener.nobody.clone(), Arc::clone(&self.warnings));
        let reader = NotificationReader {
            target: Arc::clone(&self.target),
            echo_channel: self.id.clone(),
            nobody,
            signs,
            warnings,
            inbox,
        };
        let mut reading: BoxFuture<'static, Loss> = Box::pin(reader.read(driver));
        let coverage = tokio::select! {
            biased;
            why = &mut reading => return Err(why),
            subscribed = listener.subscribe(&home) => subscribed?,
        };
        // Of its first echo or first look, behind which nothing is missed.
        let mark = listener.signs.mark.lock().clone();
        Ok(Begun { subscription: listener, reading, coverage, mark, servers: Some(home.place()) })
    }

    /// Before it is said: no answer that counts for longer may come from elsewhere.
    fn on_hearing(&mut self) {
        self.target.settle(self.home.clone());
        self.metrics.servers(self.home.iter().map(Home::place).collect());
    }

    /// Now that answers count for a moment only, anybody may give them.
    fn on_lost(&mut self) {
        self.target.settle(None);
        self.metrics.servers(Vec::new());
    }

    fn sign_off(&mut self) {
        self.target.settle(None);
        let Some(schema) = self.schema().filter(|_| self.entered.load(Ordering::Relaxed)) else { return };
        let sql = schema::fill("DELETE FROM {schema}.replica WHERE id OPERATOR(pg_catalog.=) $1::text", schema);
        let leaving = Leaving(Some((Arc::clone(&self.target), sql, self.id.clone())));
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || leaving.leave())),
            Err(_) => drop(leaving),
        }
    }
}

/// Takes a gateway off the register, in a runtime of its own: that of a process that ends waits a moment for what blocks,
/// and for nothing else. Without the right to leave, the gateway counts as gone after a while.
struct Leaving(Option<(Arc<Target>, String, String)>);

impl Leaving {
    fn leave(mut self) {
        self.at_once();
    }

    fn at_once(&mut self) {
        let Some((target, sql, id)) = self.0.take() else { return };
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        let leave = async {
            let Ok(Reached { client, driver, .. }) = target.reach("", LEAVE).await else { return };
            let _driver = AbortOnDropHandle::new(drive(driver));
            let _ = client.execute(&sql, &[&id]).await;
        };
        let _ = runtime.block_on(async { timeout(LEAVE, leave).await });
    }
}

impl Drop for Leaving {
    /// The runtime is at its end already and did not take it: nothing else is delayed any more.
    fn drop(&mut self) {
        if self.0.is_some() {
            std::thread::scope(|scope| {
                // Not on this thread, which may belong to that runtime.
                scope.spawn(|| self.at_once());
            });
        }
    }
}

/// Signs that a server lives.
#[derive(Default)]
struct Signs {
    echo: Notify,
    /// A change of nobody's token arrived.
    proof: Notify,
    /// How far the list of changes was read, or what the last echo said of it.
    mark: Mutex<Option<Mark>>,
    /// The triggers' channel when the listening began; not set: notifications are not listened to.
    channel: OnceLock<String>,
    /// By the server's clock: whatever arrives now was committed later. A change is noted when its statement runs, which
    /// may be long before.
    since_ms: AtomicU64,
    /// Whether the list of changes is read, too.
    reads_list: AtomicBool,
    told: Mutex<ToldTwice>,
}

impl Signs {
    /// When a change was committed, as far as is known: at most a beat too early.
    fn committed(&self, noted_ms: u64) -> u64 {
        noted_ms.max(self.since_ms.load(Ordering::Relaxed))
    }
}

/// Changes of our own tables come by notification and in the list. Counts, for each one that came on one way, whether it
/// has come on the other. The server process is a part of what is compared: nobody else can send what one wrote.
#[derive(Default)]
struct ToldTwice {
    /// With how often it came by notification more than in the list, and the look at the list that it came before.
    open: HashMap<Digest, (i32, u64)>,
    looks: u64,
}

impl ToldTwice {
    fn key(what: &str, pid: i32) -> Digest {
        Digest::of(format!("{what} {pid}").as_bytes())
    }

    /// Whether a notification is news.
    fn notified(&mut self, what: &str, pid: i32) -> bool {
        self.comes(Self::key(what, pid), 1)
    }

    /// Whether a row of the list is news.
    fn listed(&mut self, row: &ListedChange) -> bool {
        let what = row.hex.as_ref().map_or_else(|| "*".to_owned(), |hex| format!("{hex} {}", row.at_ms));
        row.pid.is_none_or(|pid| self.comes(Self::key(&what, pid), -1))
    }

    fn comes(&mut self, key: Digest, way: i32) -> bool {
        let (count, look) = self.open.entry(key).or_default();
        let is_news = count.signum() != -way;
        *count += way;
        *look = self.looks;
        if *count == 0 {
            self.open.remove(&key);
        }
        is_news
    }

    /// What comes on one way is in the other one's next look, or never is.
    fn looked(&mut self) {
        self.looks += 1;
        let oldest = self.looks.saturating_sub(3);
        self.open.retain(|_, (_, look)| *look >= oldest);
    }
}

/// A connection that listens.
pub(super) struct Listener {
    client: Client,
    target: Arc<Target>,
    schema: Option<String>,
    /// Where the list of changes is read.
    list: Option<ChangeList>,
    channel: String,
    id: String,
    /// The digest of no token, in hex: a change of it, told as triggers tell, proves that theirs arrive.
    nobody: String,
    name: String,
    registers: bool,
    entered: Arc<AtomicBool>,
    /// Whether old rows may be deleted, and have to be right away.
    tidies: AtomicBool,
    trigger_check: Option<TriggerCheck>,
    signs: Arc<Signs>,
    warnings: Arc<PostgresWarnings>,
    inbox: Arc<Inbox<String>>,
}

/// How far the list of changes was read.
#[derive(Default)]
struct ChangeList {
    snapshot: Mutex<Option<String>>,
    /// The table that was there at the first look.
    table: OnceLock<String>,
    echoed: Mutex<Option<Instant>>,
    may_tidy: bool,
}

#[async_trait]
impl Subscription for Listener {
    /// The key of a wait.
    type Wait = String;

    /// What was changed before is in the list. Where there is none, an echo comes on the way that changes come, behind all
    /// that came before: one that stays out means that changes stay out too.
    async fn beat(&self) -> Result<Option<Mark>, Loss> {
        match &self.list {
            Some(list) => {
                let queue = self.read_list(list).await?;
                if queue < QUEUE_LOW && self.signs.channel.get().is_none() {
                    self.listen().await?;
                }
                let is_due = list.echoed.lock().is_none_or(|at| at.elapsed() > ECHO);
                if is_due && queue < QUEUE_LOW && self.signs.channel.get().is_some() {
                    self.echo().await?;
                    *list.echoed.lock() = Some(Instant::now());
                }
            }
            None => self.echo().await?,
        }
        Ok(self.signs.mark.lock().clone())
    }

    async fn upkeep(&self) -> Result<Option<Coverage>, Loss> {
        let kept = async {
            if self.schema.is_some() {
                self.enter().await?;
                self.tidy().await;
                return Ok(None);
            }
            self.coverage().await.map(Some)
        };
        let kept = timeout(PATIENCE, kept).await;
        Ok(kept.unwrap_or_else(|_| Err(unavailable(format!("the server said nothing for {PATIENCE:?}"))))?)
    }

    async fn confirm(&self, waits: &mut Vec<String>) -> Result<(), Loss> {
        // Nobody waits where there is no register; a message that says so is somebody's mischief.
        let Some(schema) = &self.schema else {
            waits.clear();
            return Ok(());
        };
        let sql = schema::fill(
            "INSERT INTO {schema}.confirmation (wait, replica) SELECT w.id, $2::text FROM {schema}.wait w \
            WHERE w.id OPERATOR(pg_catalog.=) ANY ($1::text[]) ON CONFLICT DO NOTHING",
            schema,
        );
        match timeout(PATIENCE, self.client.execute(&sql, &[&*waits, &self.id])).await {
            // One of those who waited has given up in the same moment; the others are confirmed to with the next upkeep.
            Ok(Err(error)) if error.code() == Some(&tokio_postgres::error::SqlState::FOREIGN_KEY_VIOLATION) => Ok(()),
            Ok(Err(error)) => Err(self.no_entry(error).into()),
            Ok(Ok(_)) => {
                waits.clear();
                Ok(())
            }
            Err(_) => Err(unavailable(format!("a confirmation took longer than {PATIENCE:?}")).into()),
        }
    }
}

impl Listener {
    /// Listens, and returns once it is certain that no change is missed: whether somebody tells of them.
    async fn subscribe(&mut self, home: &Home) -> Result<Coverage, Loss> {
        let (queue, channel, version) = self.in_time(self.prepare()).await?;
        if version >= schema::LISTED_SINCE
            && let Some(schema) = &self.schema
        {
            self.list =
                Some(ChangeList { may_tidy: self.in_time(self.may_tidy(schema)).await?, ..ChangeList::default() });
        }
        self.signs.reads_list.store(self.list.is_some(), Ordering::Relaxed);
        self.tidies.store(self.list.as_ref().is_some_and(|list| list.may_tidy), Ordering::Relaxed);
        if let Some(list) = &self.list {
            // Triggers that do not fire are found here.
            self.in_time(self.read_list(list)).await?;
        }
        self.warn_of_queue(queue);
        self.channel.clone_from(&channel);
        // Whoever hears must be known to those who wait, so that comes first.
        self.in_time(self.enter()).await?;
        let listens = match &self.list {
            Some(_) => queue < QUEUE_LOW,
            None if queue < QUEUE_HIGH => true,
            None => return Err(queue_is_full().into()),
        };
        if listens {
            let listening = timeout(LISTENING, self.listen()).await;
            listening.unwrap_or_else(|_| Err(unavailable(format!("LISTEN got no answer within {LISTENING:?}"))))?;
        }
        if listens {
            self.in_time(self.ask_for_echo()).await?;
            arrives(&self.signs.echo).await?;
        }
        self.in_time(self.try_another(home, listens)).await?;
        if listens {
            arrives(&self.signs.proof).await?;
        }
        match (&self.list, &self.schema) {
            (Some(list), _) => {
                *list.echoed.lock() = listens.then(Instant::now);
                self.in_time(self.read_list(list)).await?;
            }
            // Whoever waited before this was heard is asked to wait behind what comes now.
            (None, Some(schema)) => {
                let again = schema::fill(
                    "SELECT pg_catalog.pg_notify($2::text, 'wait '::text OPERATOR(pg_catalog.||) w.id) FROM {schema}.wait w \
                    WHERE NOT EXISTS (SELECT FROM {schema}.confirmation c WHERE c.wait OPERATOR(pg_catalog.=) w.id \
                    AND c.replica OPERATOR(pg_catalog.=) $1::text)",
                    schema,
                );
                let asked = async { self.client.query(&again, &[&self.id, &channel]).await.map_err(failed) };
                self.in_time(asked).await?;
            }
            (None, None) => {}
        }
        self.in_time(self.coverage()).await
    }

    /// One step of the subscription.
    async fn in_time<T, E: Into<Loss>>(&self, step: impl Future<Output = Result<T, E>>) -> Result<T, Loss> {
        match timeout(PATIENCE, step).await {
            Ok(done) => done.map_err(Into::into),
            Err(_) => Err(unavailable(format!("subscribing got no answer within {PATIENCE:?}")).into()),
        }
    }

    /// How much of the notification queue is in use, where the triggers tell, and the version of our own tables.
    async fn prepare(&self) -> Result<(f64, String, i32), StoreError> {
        let (version, channel) = match &self.schema {
            Some(schema) => match schema::version(&self.client, schema).await {
                Ok(Some(found)) => found,
                Ok(None) => {
                    return Err(unavailable(format!("the schema {schema} has no tables of tollgate: {MIGRATE}")));
                }
                Err(QueryFailure { error, .. }) => return Err(error),
            },
            None => (0, self.channel.clone()),
        };
        schema::check_channel(&channel).map_err(|problem| StoreError::Garbage(problem.to_string()))?;
        if channel != self.channel {
            self.warnings.channel.call_once(|| {
                log::warn!(
                    "{}: the triggers tell of changes on channel \"{channel}\" and the configuration says \"{}\". This gateway \
                 listens where the triggers tell; set channel = \"{channel}\", or make the other one that of all gateways by \
                 `tollgate store migrate`",
                    self.target,
                    self.channel
                );
            });
        }
        let row = self.client.query_one("SELECT pg_catalog.pg_notification_queue_usage()", &[]).await;
        let queue = row.and_then(|row| row.try_get(0)).map_err(failed)?;
        Ok((queue, channel, version))
    }

    async fn listen(&self) -> Result<(), StoreError> {
        let begin = format!("LISTEN \"{}\"; LISTEN \"{}\"", self.channel, self.id);
        self.client.batch_execute(&begin).await.map_err(failed)?;
        // Set once a session. Each echo and each look at the list from here on says on which channel the triggers tell then.
        let _ = self.signs.channel.set(self.channel.clone());
        Ok(())
    }

    /// Puts what is new in the list into the inbox, and who waits for a confirmation behind it. Says how much of the
    /// notification queue is in use.
    async fn read_list(&self, list: &ChangeList) -> Result<f64, Loss> {
        let schema = self.schema.as_deref().unwrap_or_default();
        let sql = schema::list_sql(schema, &self.id, list.snapshot.lock().as_deref());
        let answer = self.client.simple_query(&sql).await.map_err(failed)?;
        let seen = ChangesSeen::read(&answer).map_err(|QueryFailure { error, .. }| error)?;
        if seen.version < schema::LISTED_SINCE {
            return Err(unavailable(format!("the tables are of version {} now", seen.version)).into());
        }
        if let Some(channel) = self.signs.channel.get() {
            same_channel(channel, &seen.channel)?;
        }
        if *list.table.get_or_init(|| seen.table.clone()) != seen.table {
            return Err(unavailable("there is another table of tokens now: was a backup restored?").into());
        }
        if let Some(off) = seen.off {
            return Err(Loss::Untold(format!("nobody tells of all changes: {off}")));
        }
        {
            let mut told = self.signs.told.lock();
            for row in seen.changes {
                if told.listed(&row) {
                    self.inbox.put(match row.hex {
                        None => Message::Everything,
                        Some(hex) => match changes(&hex, self.signs.committed(row.at_ms), Named::Token) {
                            Some(changes) => Message::Changed(changes),
                            None => Message::Everything,
                        },
                    });
                }
            }
            told.looked();
        }
        seen.waits.into_iter().for_each(|wait| self.inbox.put(Message::Wait(wait)));
        self.signs.since_ms.fetch_max(seen.at_ms, Ordering::Relaxed);
        *self.signs.mark.lock() = Some(seen.mark);
        *list.snapshot.lock() = Some(seen.snapshot);
        self.warn_of_queue(seen.queue);
        Ok(seen.queue)
    }

    fn warn_of_queue(&self, queue: f64) {
        if queue < QUEUE_LOW {
            self.warnings.queue.store(false, Ordering::Relaxed);
        } else if !self.warnings.queue.swap(true, Ordering::Relaxed) {
            log::warn!(
                "{}: the server's queue of notifications is {:.0} % full (pg_notification_queue_usage): a session that listens \
                 is in a transaction that does not end. When it is full, transactions that notify fail, in all databases of \
                 the server. Find the session with SELECT pid, usename, application_name, xact_start, query FROM \
                 pg_stat_activity WHERE xact_start IS NOT NULL ORDER BY xact_start",
                self.target,
                queue * 100.0
            );
        }
    }

    /// Asks for a message of one's own, and waits for it.
    async fn echo(&self) -> Result<(), StoreError> {
        self.ask_for_echo().await?;
        self.signs.echo.notified().await;
        Ok(())
    }

    /// In our own tables it says on which channel the triggers tell,
    /// how far the list of changes was told, and of which version the tables are.
    async fn ask_for_echo(&self) -> Result<(), StoreError> {
        let (word, from) = match &self.schema {
            Some(schema) => (
                format!(
                    "{} OPERATOR(pg_catalog.||) ' '::text OPERATOR(pg_catalog.||) v.version::text \
                    OPERATOR(pg_catalog.||) ' '::text OPERATOR(pg_catalog.||) v.channel",
                    schema::MARK
                ),
                schema::fill("FROM {schema}.version v", schema),
            ),
            None => (schema::MARK.to_owned(), String::new()),
        };
        let sql = format!(
            "SELECT pg_catalog.pg_notify('{}'::text, {word}) {from} \
            WHERE pg_catalog.pg_notification_queue_usage() OPERATOR(pg_catalog.<) {QUEUE_HIGH}::float8",
            self.id
        );
        let answer = self.client.simple_query(&sql).await.map_err(failed)?;
        if !answer.iter().any(|message| matches!(message, SimpleQueryMessage::Row(_))) {
            return Err(queue_is_full());
        }
        Ok(())
    }

    /// Enters this gateway in the register, where there is one, or says that it is still there.
    async fn enter(&self) -> Result<(), StoreError> {
        let Some(schema) = self.schema.as_ref().filter(|_| self.registers) else { return Ok(()) };
        let name: String = self.name.chars().filter(|c| !"'\\\0".contains(*c)).collect();
        let sql = schema::fill(
            &format!(
                "INSERT INTO {{schema}}.replica (id, name) VALUES ('{}', '{name}') \
                ON CONFLICT (id) DO UPDATE SET seen = pg_catalog.clock_timestamp()",
                self.id
            ),
            schema,
        );
        self.entered.store(true, Ordering::Relaxed);
        self.client.batch_execute(&sql).await.map_err(|error| self.no_entry(error))
    }

    async fn may_tidy(&self, schema: &str) -> Result<bool, StoreError> {
        let has = |table| format!("pg_catalog.has_table_privilege('{{schema}}.{table}'::text, 'DELETE'::text)");
        let sql = format!("SELECT {} AND {} AND {}", has("change"), has("replica"), has("wait"));
        let row = self.client.query_one(&schema::fill(&sql, schema), &[]).await;
        row.and_then(|row| row.try_get(0)).map_err(failed)
    }

    /// Deletes changes, gateways and waits that nobody asks for any more: at the beginning of a session, and so seldom that
    /// all gateways together do it once a minute. Where it may not, or fails, others do it.
    async fn tidy(&self) {
        let (Some(schema), Some(list)) = (&self.schema, &self.list) else { return };
        if !list.may_tidy {
            return;
        }
        let is_due = self.tidies.swap(false, Ordering::Relaxed);
        let chance = if is_due { 1.0 } else { ENTRY.as_secs_f64() / TIDY.as_secs_f64() };
        // One gateway at a time, and for the others there is nothing left to wait for.
        let sql = schema::fill(
            &format!(
                "WITH turn AS (SELECT pg_catalog.random() OPERATOR(pg_catalog.<) ({chance}::float8 OPERATOR(pg_catalog./) \
                CASE WHEN {is_due} THEN 1::float8 ELSE (SELECT pg_catalog.count(*) FROM {{schema}}.replica r \
                WHERE r.seen OPERATOR(pg_catalog.>) (pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) \
                '{gone} s'::interval))::float8 END) AND pg_catalog.pg_try_advisory_xact_lock({TIDY_LOCK}) AS mine), \
                replicas AS (DELETE FROM {{schema}}.replica r USING turn WHERE turn.mine AND r.seen OPERATOR(pg_catalog.<) \
                (pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) '1 day'::interval)), \
                waits AS (DELETE FROM {{schema}}.wait w USING turn WHERE turn.mine AND w.asked OPERATOR(pg_catalog.<) \
                (pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) '1 day'::interval)) \
                DELETE FROM {{schema}}.change c USING turn WHERE turn.mine AND c.seq OPERATOR(pg_catalog.=) ANY (ARRAY( \
                SELECT o.seq FROM {{schema}}.change o WHERE o.at_ms OPERATOR(pg_catalog.<) ((extract(epoch FROM \
                pg_catalog.statement_timestamp())::float8 OPERATOR(pg_catalog.*) 1000::float8)::bigint \
                OPERATOR(pg_catalog.-) {kept}::bigint) ORDER BY o.at_ms LIMIT {TIDY_ROWS}))",
                gone = REPLICA_GONE.as_secs(),
                kept = CHANGES_KEPT.as_millis(),
            ),
            schema,
        );
        match self.client.execute(&sql, &[]).await {
            // There are more.
            Ok(TIDY_ROWS) => self.tidies.store(true, Ordering::Relaxed),
            Ok(_) => {}
            Err(error) => log::debug!("{}: old changes are not deleted: {}", self.target, failed(error)),
        }
    }

    /// Whether somebody tells of changes: triggers of our own tables always do.
    async fn coverage(&self) -> Result<Coverage, StoreError> {
        let Some(check) = &self.trigger_check else { return Ok(Coverage::Told) };
        let seen = look_at_triggers(&self.client, check).await.map_err(failed)?;
        if let Some(off) = &seen.off {
            return Ok(Coverage::Untold(format!("nobody tells of all changes: {off}")));
        }
        if !seen.there {
            return Ok(Coverage::Untold(format!(
                "the tables have no triggers of tollgate that tell on channel \"{}\"{}, so nobody tells of changes. \
                 Run `tollgate store install-triggers --config FILE`",
                self.channel,
                seen.elsewhere()
            )));
        }
        if seen.loose {
            self.warnings.loose.call_once(|| {
                log::warn!(
                    "{}: tollgate's triggers are of an older version: they run with the rights of whoever changes the tables, \
                 whose changes fail if those are not enough, and may look for functions and operators wherever the search_path \
                 says. Run `tollgate store install-triggers --config FILE` again",
                    self.target
                );
            });
        }
        Ok(Coverage::Told)
    }

    /// Changes come from others, at rest, and on the triggers' channel. A pooler that gives each transaction another
    /// connection brings back the echo of one's own, and drops all else. The second connection is made as lookups make
    /// theirs: it must get to the same server.
    async fn try_another(&self, home: &Home, listens: bool) -> Result<(), StoreError> {
        let at = |error: StoreError| error.at(&"a second connection, to try the first");
        // Where lookups would go if changes were heard from here.
        let reached = self.target.reach_from(Some(home), "", PATIENCE).await.map_err(|why| at(why.into()))?;
        let Reached { client: other, driver, home: reached } = reached;
        if !home.is_same_server(&reached) {
            return Err(unavailable(ASTRAY));
        }
        if !listens {
            return Ok(());
        }
        let _driver = AbortOnDropHandle::new(drive(driver));
        other.batch_execute(&self.proof_sql()).await.map_err(|error| at(failed(error)))
    }

    /// A change of nobody's token, on the channel that the triggers tell on at this moment, as they find it.
    fn proof_sql(&self) -> String {
        let word = format!(
            "'{} '::text OPERATOR(pg_catalog.||) ((extract(epoch FROM pg_catalog.clock_timestamp())::float8 \
            OPERATOR(pg_catalog.*) 1000::float8)::bigint)::text",
            self.nobody
        );
        match &self.schema {
            Some(schema) => schema::fill(
                &format!("SELECT pg_catalog.pg_notify(v.channel, {word}) FROM {{schema}}.version v"),
                schema,
            ),
            None => format!("SELECT pg_catalog.pg_notify('{}'::text, {word})", self.channel),
        }
    }

    fn no_entry(&self, error: Error) -> StoreError {
        match (failed(error), &self.schema) {
            (StoreError::Denied(why), Some(schema)) => StoreError::Denied(format!(
                "{why}; the gateway must be allowed to enter itself in the register: GRANT USAGE ON SCHEMA {schema}, \
                 SELECT ON ALL TABLES IN SCHEMA {schema}, INSERT and UPDATE ON {schema}.replica and \
                 {schema}.confirmation, UPDATE (last_used) ON {schema}.token, and DELETE ON {schema}.change, \
                 {schema}.replica and {schema}.wait for tidying up"
            )),
            (error, _) => error,
        }
    }
}

/// A message that the server took, and that another session's would follow.
async fn arrives(sign: &Notify) -> Result<(), Loss> {
    let arrived = timeout(PATIENCE, sign.notified()).await;
    arrived.map_err(|_| {
        unavailable(format!("the server took a message of this gateway that never arrived: {POOLER}")).into()
    })
}

fn unavailable(what: impl Into<String>) -> StoreError {
    StoreError::Unavailable(what.into())
}

fn failed(error: Error) -> StoreError {
    Unreachable::from(error).into()
}

fn queue_is_full() -> StoreError {
    unavailable(format!(
        "the server's queue of notifications is more than {:.0} % full, so that changes may not be told: see \
         pg_notification_queue_usage()",
        QUEUE_HIGH * 100.0
    ))
}

fn same_channel(listened: &str, told_on: &str) -> Result<(), StoreError> {
    if listened == told_on {
        return Ok(());
    }
    Err(unavailable(format!(
        "the triggers tell on channel \"{told_on}\" now, and this gateway listened to \"{listened}\""
    )))
}

/// Runs the connection, and sorts signs of life from what changed.
struct NotificationReader {
    target: Arc<Target>,
    echo_channel: String,
    nobody: String,
    signs: Arc<Signs>,
    warnings: Arc<PostgresWarnings>,
    inbox: Arc<Inbox<String>>,
}

impl NotificationReader {
    /// Returns what ended the connection.
    async fn read(self, mut driver: ConnectionDriver) -> Loss {
        let messages = async {
            loop {
                let ended = match poll_fn(|cx| driver.poll_message(cx)).await {
                    Some(Ok(AsyncMessage::Notification(said))) => self.take(&said),
                    Some(Ok(_)) => Ok(()),
                    Some(Err(error)) => Err(failed(error).into()),
                    None => Err(Loss::Closed),
                };
                if let Err(why) = ended {
                    return why;
                }
            }
        };
        tokio::select! {
            biased;
            why = messages => why,
            () = self.target.look_ups_go_astray() => unavailable(ASTRAY).into(),
        }
    }

    fn take(&self, said: &Notification) -> Result<(), Loss> {
        let (channel, payload) = (said.channel(), said.payload());
        if channel == self.echo_channel {
            self.echoed(payload)?;
        } else if payload.starts_with(&self.nobody) {
            self.signs.proof.notify_one();
        } else {
            let word = read_word(payload);
            let is_change = matches!(word, Word::Changes(_) | Word::Everything);
            let is_listed = is_change && self.signs.reads_list.load(Ordering::Relaxed);
            if is_listed && !self.signs.told.lock().notified(payload, said.process_id()) {
                return Ok(());
            }
            self.inbox.put(match word {
                Word::Changes(mut changes) => {
                    changes.iter_mut().for_each(|change| change.at_ms = self.signs.committed(change.at_ms));
                    Message::Changed(changes)
                }
                Word::Everything => Message::Everything,
                Word::Wait(id) => Message::Wait(id.into()),
                Word::Nonsense => {
                    self.warnings.nonsense.call_once(|| {
                        log::warn!(
                            "{}: a message on the channel is none of tollgate's; all tokens are looked up again",
                            self.target
                        );
                    });
                    Message::Everything
                }
            });
        }
        Ok(())
    }

    /// `UNIX_MS OLDEST [VERSION CHANNEL]`
    fn echoed(&self, payload: &str) -> Result<(), Loss> {
        let mut words = payload.splitn(4, ' ');
        let (at, oldest) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        if let Ok(at_ms) = at.parse() {
            self.signs.since_ms.fetch_max(at_ms, Ordering::Relaxed);
        }
        if let (Some(version), Some(told_on)) = (words.next(), words.next()) {
            same_channel(self.signs.channel.get().map_or("", String::as_str), told_on)?;
            let reads_list = self.signs.reads_list.load(Ordering::Relaxed);
            if !reads_list && version.parse().is_ok_and(|version: i32| version >= schema::LISTED_SINCE) {
                return Err(unavailable("the tables were migrated, and have a list of changes that can be read").into());
            }
            if !reads_list {
                *self.signs.mark.lock() = Some(format!("{at} {oldest}"));
            }
        }
        self.signs.echo.notify_one();
        Ok(())
    }
}

/// What there is of triggers.
struct Triggers {
    /// Those that do not fire.
    off: Option<String>,
    there: bool,
    /// Some were made by a tollgate that did not say where their functions look for names.
    loose: bool,
    /// Other channels that tollgate's triggers tell on.
    others: Option<String>,
}

impl Triggers {
    fn elsewhere(&self) -> String {
        let others = self.others.as_ref();
        others.map_or_else(String::new, |others| format!(" (there are some that tell on \"{others}\": see `channel`)"))
    }
}

async fn look_at_triggers(client: &Client, TriggerCheck(check): &TriggerCheck) -> Result<Triggers, Error> {
    let row = client.query_one(check, &[]).await?;
    let [others, off] = [2, 3].map(|at| row.try_get(at));
    Ok(Triggers { off: off?, there: row.try_get(0)?, loose: row.try_get(1)?, others: others? })
}

#[derive(Debug, PartialEq, Eq)]
enum Word<'a> {
    Changes(Vec<Change>),
    Everything,
    Wait(&'a str),
    Nonsense,
}

/// `HEX [UNIX_MS]`, where HEX may be several digests one after the other, `h:HEX [UNIX_MS]`, `*` or `wait ID`.
fn read_word(word: &str) -> Word<'_> {
    if word == "*" {
        return Word::Everything;
    }
    let (first, second) = word.split_once(' ').map_or((word, None), |(first, second)| (first, Some(second)));
    if first == "wait" {
        let id = second.unwrap_or_default();
        let fine = !id.is_empty() && id.len() <= 64 && id.bytes().all(|b| b.is_ascii_hexdigit());
        return if fine { Word::Wait(id) } else { Word::Nonsense };
    }
    let at_ms = match second {
        Some(text) => text.parse().ok(),
        None => SystemTime::now().duration_since(UNIX_EPOCH).ok().and_then(|now| now.as_millis().try_into().ok()),
    };
    let Some(at_ms) = at_ms else { return Word::Nonsense };
    let named = match first.strip_prefix("h:") {
        Some(hex) => changes(hex, at_ms, Named::Handle),
        None => changes(first, at_ms, Named::Token),
    };
    named.map_or(Word::Nonsense, Word::Changes)
}

/// Changes of the tokens whose digests stand one after the other: at least one.
fn changes(hex: &str, at_ms: u64, named: fn(Digest) -> Named) -> Option<Vec<Change>> {
    let (digests, []) = hex.as_bytes().as_chunks::<64>() else { return None };
    let change = |digest: &[u8; 64]| {
        let digest = Digest::from_hex(std::str::from_utf8(digest).ok()?)?;
        Some(Change { token: named(digest), at_ms })
    };
    let changes: Vec<_> = digests.iter().map(change).collect::<Option<_>>()?;
    (!changes.is_empty()).then_some(changes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_the_channel() {
        let digest = Digest::of(b"t");
        let hex = digest.to_hex();
        assert_eq!(read_word("*"), Word::Everything);
        assert_eq!(read_word("wait 0123abc"), Word::Wait("0123abc"));
        let change = |token| Word::Changes(vec![Change { token, at_ms: 5 }]);
        assert_eq!(read_word(&format!("{hex} 5")), change(Named::Token(digest)));
        assert_eq!(read_word(&format!("h:{hex} 5")), change(Named::Handle(digest)));
        assert!(
            matches!(read_word(&hex), Word::Changes(changes) if changes[0].at_ms > 1_000_000_000_000),
            "any hand's NOTIFY"
        );
        let other = Digest::of(b"u");
        let both = [digest, other].map(|digest| Change { token: Named::Token(digest), at_ms: 5 });
        assert_eq!(read_word(&format!("{hex}{} 5", other.to_hex())), Word::Changes(both.to_vec()));
        for nonsense in [
            "",
            " ",
            "**",
            "wait",
            "wait ",
            "wait '; DROP",
            "12",
            &hex[1..],
            &format!("{hex} x"),
            "h:",
            &format!("{hex}0 5"),
        ] {
            assert_eq!(read_word(nonsense), Word::Nonsense, "{nonsense:?}");
        }
    }

    /// A change is told once, whichever way is faster, and one that nobody has told on the other way is told.
    #[test]
    fn what_comes_on_two_ways_is_told_once() {
        let row = |hex: &str, pid| ListedChange { at_ms: 5, hex: Some(hex.into()), pid: Some(pid) };
        let mut told = ToldTwice::default();
        assert!(told.notified("ab 5", 7));
        assert!(!told.listed(&row("ab", 7)));
        assert!(told.listed(&row("ab", 7)), "another one of the same time");
        assert!(!told.notified("ab 5", 7));
        assert!(told.notified("ab 5", 8), "what another process sends");
        assert!(told.listed(&row("ab", 7)));
        assert!(told.listed(&ListedChange { pid: None, ..row("ab", 8) }), "by an older version");
        assert!(told.notified("*", 7) && !told.listed(&ListedChange { hex: None, ..row("", 7) }));
        for _ in 0..4 {
            told.looked();
        }
        assert!(told.open.is_empty());
    }
}
