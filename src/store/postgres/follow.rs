//! Changes of a PostgreSQL server: a connection of its own that listens, an echo that proves that it hears, and
//! confirmations for who waits until every gateway has heard. Knows nothing of what a record says.

use super::super::feed::{Begun, ChangeSource, Coverage, Inbox, Loss, Message, Pace, Subscription};
use super::super::{Change, Mark, Named, StoreError, replica_name};
use super::connect::{
    ASTRAY, ConnectionDriver, Home, MIGRATE, POOLER, QueryFailure, Reached, Target, Unreachable, drive,
};
use super::presets::TriggerCheck;
use super::{Source, presets, schema};
use crate::store::credential::Digest;
use async_trait::async_trait;
use futures_util::future::{BoxFuture, join};
use parking_lot::{Mutex, Once};
use std::future::poll_fn;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_postgres::{AsyncMessage, Client, Error};
use tokio_util::task::AbortOnDropHandle;

/// How often the server is asked to say something back.
const BEAT: Duration = Duration::from_millis(300);
/// How long nothing may arrive while that is awaited.
const SILENCE: Duration = Duration::from_millis(500);
/// How often the gateway's row is brought up to date, or the triggers are looked for.
const ENTRY: Duration = Duration::from_millis(900);
const TRIGGER_CHECK: Duration = Duration::from_secs(9);
/// For all that comes before the first beat, and for each thing asked later.
const PATIENCE: Duration = Duration::from_secs(2);

pub(super) struct PostgresChanges {
    target: Arc<Target>,
    source: Source,
    channel: String,
    /// This store's key in the register, and its channel for echoes.
    id: String,
    name: String,
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
}

impl PostgresChanges {
    pub(super) fn new(target: &Arc<Target>, source: &Source, channel: &str) -> Self {
        Self {
            target: Arc::clone(target),
            source: source.clone(),
            channel: channel.into(),
            id: format!("tollgate_{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..)),
            name: replica_name(),
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
        let begin = format!("SET statement_timeout = {}; SET synchronous_commit = off", PATIENCE.as_millis());
        let Reached { client, driver, home } = match timeout(PATIENCE, self.target.reach(&begin, PATIENCE)).await {
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
        let signs = Arc::<Signs>::default();
        let listener = Listener {
            client,
            target: Arc::clone(&self.target),
            schema: self.schema().map(str::to_owned),
            channel: self.channel.clone(),
            id: self.id.clone(),
            nobody: Digest::of(self.id.as_bytes()).to_hex(),
            name: self.name.clone(),
            trigger_check: presets::trigger_check(&self.source, &self.channel),
            signs: Arc::clone(&signs),
            warnings: Arc::clone(&self.warnings),
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
            subscribed = timeout(PATIENCE, listener.subscribe(&home)) => match subscribed {
                Ok(coverage) => coverage?,
                Err(_) => {
                    let what = format!("subscribing got no answer, or a message of its own never arrived: {POOLER}");
                    return Err(unavailable(what).into());
                }
            },
        };
        // Of its first echo, behind which nothing is missed.
        let mark = listener.signs.mark.lock().clone();
        Ok(Begun { subscription: listener, reading, coverage, mark })
    }

    /// Before it is said: no answer that counts for longer may come from elsewhere.
    fn on_hearing(&mut self) {
        self.target.settle(self.home.clone());
    }

    /// Now that answers count for a moment only, anybody may give them.
    fn on_lost(&mut self) {
        self.target.settle(None);
    }

    fn sign_off(&mut self) {
        self.target.settle(None);
    }
}

/// Signs that a server lives.
#[derive(Default)]
struct Signs {
    echo: Notify,
    /// A change of nobody's token arrived.
    proof: Notify,
    /// What the last echo said of the list of changes.
    mark: Mutex<Option<Mark>>,
    /// The triggers' channel when the listening began.
    channel: OnceLock<String>,
}

/// A connection that listens.
pub(super) struct Listener {
    client: Client,
    target: Arc<Target>,
    schema: Option<String>,
    channel: String,
    id: String,
    /// The digest of no token, in hex: a change of it, told as triggers tell, proves that theirs arrive.
    nobody: String,
    name: String,
    trigger_check: Option<TriggerCheck>,
    signs: Arc<Signs>,
    warnings: Arc<PostgresWarnings>,
}

#[async_trait]
impl Subscription for Listener {
    /// The key of a wait.
    type Wait = String;

    /// An echo comes on the way that changes come, behind all that came before: one that stays out means that changes stay
    /// out too.
    async fn beat(&self) -> Result<Option<Mark>, Loss> {
        self.echo().await.map_err(failed)?;
        Ok(self.signs.mark.lock().clone())
    }

    async fn upkeep(&self) -> Result<Option<Coverage>, Loss> {
        let kept = async {
            if self.schema.is_some() {
                return self.enter().await.map(|()| None);
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
    /// Listens, and returns once it is certain that changes arrive: whether somebody tells of them.
    async fn subscribe(&self, home: &Home) -> Result<Coverage, StoreError> {
        let channel = match &self.schema {
            Some(schema) => match schema::version(&self.client, schema).await {
                Ok(Some((_, channel))) => channel,
                Ok(None) => {
                    return Err(unavailable(format!("the schema {schema} has no tables of tollgate: {MIGRATE}")));
                }
                Err(QueryFailure { error, .. }) => return Err(error),
            },
            None => self.channel.clone(),
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
        let begin = format!("LISTEN \"{channel}\"; LISTEN \"{}\"", self.id);
        self.client.batch_execute(&begin).await.map_err(failed)?;
        // Set once a session. Each echo from here on says on which channel the triggers tell then.
        let _ = self.signs.channel.set(channel.clone());
        // Whoever hears must be known to those who wait, so that comes first.
        self.enter().await?;
        self.echo().await.map_err(failed)?;
        self.hear_another(home).await?;
        // Whoever waited before this was heard is asked to wait behind what comes now.
        if let Some(schema) = &self.schema {
            let again = schema::fill(
                "SELECT pg_catalog.pg_notify($2::text, 'wait '::text OPERATOR(pg_catalog.||) w.id) FROM {schema}.wait w \
                WHERE NOT EXISTS (SELECT FROM {schema}.confirmation c WHERE c.wait OPERATOR(pg_catalog.=) w.id \
                AND c.replica OPERATOR(pg_catalog.=) $1::text)",
                schema,
            );
            self.client.query(&again, &[&self.id, &channel]).await.map_err(failed)?;
        }
        self.coverage().await
    }

    /// Asks for a message of one's own, and waits for it. In our own tables, where there is a list of changes, it says how
    /// far that was told, and on which channel the triggers tell.
    async fn echo(&self) -> Result<(), Error> {
        let sql = match &self.schema {
            Some(schema) => schema::fill(
                &format!(
                    "SELECT pg_catalog.pg_notify('{}'::text, {} OPERATOR(pg_catalog.||) ' '::text \
                    OPERATOR(pg_catalog.||) v.channel) FROM {{schema}}.version v",
                    self.id,
                    schema::MARK
                ),
                schema,
            ),
            None => format!("SELECT pg_catalog.pg_notify('{}'::text, ''::text)", self.id),
        };
        let (asked, ()) = join(self.client.batch_execute(&sql), self.signs.echo.notified()).await;
        asked
    }

    /// Enters this gateway in the register, where there is one, or says that it is still there.
    async fn enter(&self) -> Result<(), StoreError> {
        let Some(schema) = &self.schema else { return Ok(()) };
        let name: String = self.name.chars().filter(|c| !"'\\\0".contains(*c)).collect();
        let sql = schema::fill(
            &format!(
                "INSERT INTO {{schema}}.replica (id, name) VALUES ('{}', '{name}') \
                ON CONFLICT (id) DO UPDATE SET seen = pg_catalog.clock_timestamp()",
                self.id
            ),
            schema,
        );
        self.client.batch_execute(&sql).await.map_err(|error| self.no_entry(error))
    }

    /// Whether somebody tells of changes: triggers of our own tables always do.
    async fn coverage(&self) -> Result<Coverage, StoreError> {
        let Some(check) = &self.trigger_check else { return Ok(Coverage::Told) };
        let seen = look_at_triggers(&self.client, check).await.map_err(failed)?;
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
                    "{}: tollgate's triggers are of an older version, and look for functions and operators wherever the \
                 search_path of whoever changes the tables says: who may create some there can take over. Run `tollgate store \
                 install-triggers --config FILE` again",
                    self.target
                );
            });
        }
        Ok(Coverage::Told)
    }

    /// Changes come from others, at rest, and on the triggers' channel. A pooler that gives each transaction another
    /// connection brings back the echo of one's own, and drops all else. The second connection is made as lookups make
    /// theirs: it must get to the same server.
    async fn hear_another(&self, home: &Home) -> Result<(), StoreError> {
        let at = |error: StoreError| error.at(&"a second connection, to try the first");
        // Where lookups would go if changes were heard from here.
        let reached = self.target.reach_from(Some(home), "", PATIENCE).await.map_err(|why| at(why.into()))?;
        let Reached { client: other, driver, home: reached } = reached;
        if !home.is_same_server(&reached) {
            return Err(unavailable(ASTRAY));
        }
        let _driver = AbortOnDropHandle::new(drive(driver));
        other.batch_execute(&self.proof_sql()).await.map_err(|error| at(failed(error)))?;
        self.signs.proof.notified().await;
        Ok(())
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
                 {schema}.confirmation, UPDATE (last_used) ON {schema}.token"
            )),
            (error, _) => error,
        }
    }
}

fn unavailable(what: impl Into<String>) -> StoreError {
    StoreError::Unavailable(what.into())
}

fn failed(error: Error) -> StoreError {
    Unreachable::from(error).into()
}

/// Runs the connection, and sorts signs of life from what changed.
struct NotificationReader {
    target: Arc<Target>,
    echo_channel: String,
    nobody: String,
    signs: Arc<Signs>,
    warnings: Arc<PostgresWarnings>,
    inbox: Inbox<String>,
}

impl NotificationReader {
    /// Returns what ended the connection.
    async fn read(self, mut driver: ConnectionDriver) -> Loss {
        let messages = async {
            loop {
                let ended = match poll_fn(|cx| driver.poll_message(cx)).await {
                    Some(Ok(AsyncMessage::Notification(said))) => self.take(said.channel(), said.payload()),
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

    fn take(&self, channel: &str, payload: &str) -> Result<(), Loss> {
        if channel == self.echo_channel {
            if let Some((mark, told_on)) = payload.rsplit_once(' ') {
                let channel = self.signs.channel.get().map_or("", String::as_str);
                if told_on != channel {
                    let what = format!(
                        "the triggers tell on channel \"{told_on}\" now, and this gateway listened to \"{channel}\""
                    );
                    return Err(unavailable(what).into());
                }
                *self.signs.mark.lock() = Some(mark.to_owned());
            }
            self.signs.echo.notify_one();
        } else if payload.starts_with(&self.nobody) {
            self.signs.proof.notify_one();
        } else {
            self.inbox.put(match read_word(payload) {
                Word::Change(change) => Message::Changed(vec![change]),
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
}

/// What there is of triggers.
struct Triggers {
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
    Ok(Triggers { there: row.try_get(0)?, loose: row.try_get(1)?, others: row.try_get(2)? })
}

#[derive(Debug, PartialEq, Eq)]
enum Word<'a> {
    Change(Change),
    Everything,
    Wait(&'a str),
    Nonsense,
}

/// `HEX [UNIX_MS]`, `h:HEX [UNIX_MS]`, `*` or `wait ID`.
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
    let token = match first.strip_prefix("h:") {
        Some(hex) => Digest::from_hex(hex).map(Named::Handle),
        None => Digest::from_hex(first).map(Named::Token),
    };
    let at_ms = match second {
        Some(text) => text.parse().ok(),
        None => SystemTime::now().duration_since(UNIX_EPOCH).ok().and_then(|now| now.as_millis().try_into().ok()),
    };
    match (token, at_ms) {
        (Some(token), Some(at_ms)) => Word::Change(Change { token, at_ms }),
        _ => Word::Nonsense,
    }
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
        let change = |token| Word::Change(Change { token, at_ms: 5 });
        assert_eq!(read_word(&format!("{hex} 5")), change(Named::Token(digest)));
        assert_eq!(read_word(&format!("h:{hex} 5")), change(Named::Handle(digest)));
        assert!(
            matches!(read_word(&hex), Word::Change(Change { at_ms: 1_000_000_000_000.., .. })),
            "any hand's NOTIFY"
        );
        for nonsense in ["", " ", "**", "wait", "wait ", "wait '; DROP", "12", &hex[1..], &format!("{hex} x"), "h:"] {
            assert_eq!(read_word(nonsense), Word::Nonsense, "{nonsense:?}");
        }
    }
}
