//! Hearing of changes: a connection of its own that listens, an echo that proves that it hears, and confirmations for
//! who waits until every gateway has heard. Knows nothing of what a record says.

use super::super::{Change, Event, Heard, Mark, Named, replica_name};
use super::connect::{ASTRAY, Driver, EndsWith, Failure, Home, POOLER, Reached, Target, drive, say};
use super::presets::TriggerCheck;
use super::{Source, presets, schema};
use crate::store::credential::Digest;
use futures_util::future::join;
use parking_lot::Mutex;
use std::future::poll_fn;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_postgres::{AsyncMessage, Client, Error};

/// How often the server is asked to say something back.
const BEAT: Duration = Duration::from_millis(300);
/// How long nothing may come while that is awaited.
const SILENCE: Duration = Duration::from_millis(500);
/// Every so many beats the gateway's row is brought up to date, or the triggers are looked for.
const BEATS_PER_ENTRY: u32 = 3;
const BEATS_PER_TRIGGER_CHECK: u32 = 30;
/// For all that comes before the first beat, and for each thing asked later.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between attempts: at once, then longer.
const PAUSES: [u64; 5] = [0, 100, 200, 300, 400];
/// Between two lines of the log on different causes of the same loss.
const LOG_PAUSE: Duration = Duration::from_secs(60);
/// Words that are taken in together.
const BATCH: usize = 4_096;

/// Follows changes until it is dropped.
pub(super) async fn follow(target: &Target, source: &Source, channel: &str, heard: Heard<'_>) {
    let mut follower = Follower::new(target, source, channel, heard);
    let mut attempt = 0;
    loop {
        let began = Instant::now();
        let why = follower.session().await;
        follower.lost(&why);
        // What worked for a while is worth an attempt at once.
        attempt = if began.elapsed() > PATIENCE * 2 { 0 } else { attempt + 1 };
        let pause = PAUSES[attempt.min(PAUSES.len() - 1)];
        tokio::time::sleep(Duration::from_millis(pause + fastrand::u64(0..=pause / 4))).await;
    }
}

struct Follower<'a> {
    target: &'a Target,
    source: &'a Source,
    /// Our own tables, where gateways stand in a register.
    schema: Option<&'a str>,
    channel: &'a str,
    heard: Heard<'a>,
    /// This store's key in the register, and its channel for echoes.
    id: String,
    /// The digest of no token, in hex: a change of it, told as triggers tell, proves that theirs come.
    nobody: String,
    name: String,
    hearing: Hearing,
    /// The server of this connection.
    home: Option<Home>,
    /// What the log was told last and when, so that it is told once.
    told: Option<(Instant, String)>,
    nonsense_told: bool,
    channel_told: bool,
    loose_told: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Hearing {
    /// Nothing was said yet.
    Unknown,
    Yes,
    No,
}

impl<'a> Follower<'a> {
    fn new(target: &'a Target, source: &'a Source, channel: &'a str, heard: Heard<'a>) -> Self {
        let schema = match source {
            Source::Own { schema } => Some(schema.as_str()),
            _ => None,
        };
        let id = format!("tollgate_{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..));
        Self {
            target,
            source,
            schema,
            channel,
            heard,
            nobody: Digest::of(id.as_bytes()).to_hex(),
            id,
            name: replica_name(),
            hearing: Hearing::Unknown,
            home: None,
            told: None,
            nonsense_told: false,
            channel_told: false,
            loose_told: false,
        }
    }

    /// Whether nothing may be said of hearing: without triggers nobody tells of changes, so that neither is true.
    fn is_silent(&self) -> bool {
        self.schema.is_none() && self.hearing == Hearing::Unknown
    }

    fn lost(&mut self, why: &str) {
        if !self.is_silent() && self.hearing != Hearing::No {
            self.hearing = Hearing::No;
            (self.heard)(Event::Deaf);
        }
        // Now that answers count for a moment only, anybody may give them.
        self.target.settle(None);
        self.log(format!("{}: can't hear of changes, and tries again: {why}", self.target));
    }

    fn log(&mut self, text: String) {
        let is_news = self.told.as_ref().is_none_or(|(at, told)| *told != text && at.elapsed() > LOG_PAUSE);
        if is_news {
            log::warn!("{text}");
            self.told = Some((Instant::now(), text));
        }
    }

    fn hears(&mut self) {
        if self.told.take().is_some() {
            log::info!("{}: hears of changes again", self.target);
        }
        self.hearing = Hearing::Yes;
        // Before it is said: no answer that counts for longer may come from elsewhere.
        self.target.settle(self.home.clone());
        (self.heard)(Event::Hearing);
    }

    /// One connection, from its beginning to its end. Returns what ended it.
    async fn session(&mut self) -> String {
        let begin = format!("SET statement_timeout = {}; SET synchronous_commit = off", PATIENCE.as_millis());
        let Reached { client, driver, home } = match timeout(PATIENCE, self.target.reach(&begin)).await {
            Ok(Ok(reached)) => reached,
            Ok(Err(why)) => return why.to_string(),
            Err(_) => return format!("no connection within {PATIENCE:?}"),
        };
        if home.is_standby() {
            return "a standby server tells nobody of changes: revoked tokens work until they are asked for anew. Name the \
                    primary server in url, alone or among others"
                .into();
        }
        self.home = Some(home);
        self.target.forget_astray();
        let (words, inbox) = mpsc::unbounded_channel();
        let life = Life {
            echo: Notify::new(),
            proof: Notify::new(),
            mark: Mutex::default(),
            words: AtomicU64::new(0),
            channel: OnceLock::new(),
        };
        let (echo_channel, nobody) = (self.id.clone(), self.nobody.clone());
        // All on one task: it ends with the store. What has come is read before it is judged that nothing came.
        tokio::select! {
            biased;
            why = read(driver, &words, &life, &echo_channel, &nobody) => why,
            why = self.listen(&client, inbox, &life) => why,
        }
    }

    async fn listen(&mut self, client: &Client, mut inbox: mpsc::UnboundedReceiver<String>, life: &Life) -> String {
        match timeout(PATIENCE, self.subscribe(client, life)).await {
            Ok(Ok(())) => {}
            Ok(Err(why)) => return why,
            Err(_) => {
                return format!("subscribing got no answer, or a message of its own never came: {POOLER}");
            }
        }
        let beat = self.beat_sql();
        let trigger_check = presets::trigger_check(self.source, self.channel);
        let mut batch = Vec::new();
        // Borrows nothing of `self`, so that words are taken in while a beat is awaited.
        let (triggers, mut triggers_seen) = mpsc::unbounded_channel();
        let heard = self.heard;
        let mut heart = std::pin::pin!(beat_on(client, life, beat, trigger_check.as_ref(), triggers, heard));
        loop {
            tokio::select! {
                biased;
                count = inbox.recv_many(&mut batch, BATCH) => {
                    if count == 0 {
                        return "the connection was closed".into();
                    }
                    if let Err(why) = self.take_in(client, &mut batch).await {
                        return why;
                    }
                }
                Some(seen) = triggers_seen.recv() => self.triggers(&seen),
                () = self.target.look_ups_go_astray() => return ASTRAY.into(),
                why = &mut heart => return why,
            }
        }
    }

    /// Listens, and says so once it is certain.
    async fn subscribe(&mut self, client: &Client, life: &Life) -> Result<(), String> {
        let failed = |error: Error| say(&error);
        let channel = match self.schema {
            Some(schema) => match schema::version(client, schema).await {
                Ok(Some((_, channel))) => channel,
                Ok(None) => return Err(format!("the schema {schema} has no tables of tollgate: {}", schema::MIGRATE)),
                Err(Failure { error, .. }) => return Err(error.to_string()),
            },
            None => self.channel.to_owned(),
        };
        schema::check_channel(&channel)?;
        if channel != self.channel && !self.channel_told {
            self.channel_told = true;
            log::warn!(
                "{}: the triggers tell of changes on channel \"{channel}\" and the configuration says \"{}\". This gateway \
                 listens where the triggers tell; set channel = \"{channel}\", or make the other one that of all gateways by \
                 `tollgate store migrate`",
                self.target,
                self.channel
            );
        }
        let begin = format!("LISTEN \"{channel}\"; LISTEN \"{}\"", self.id);
        client.batch_execute(&begin).await.map_err(failed)?;
        // Each echo from here on says on which channel the triggers tell then.
        let _: Result<(), String> = life.channel.set(channel.clone());
        let echo = life.echo.notified();
        let (beat, ()) = join(client.batch_execute(&self.beat_sql().entry), echo).await;
        beat.map_err(|error| self.no_entry(&error))?;
        self.hear_another(life).await?;
        match presets::trigger_check(self.source, self.channel) {
            None => self.hears(),
            Some(check) => {
                let seen = look_at_triggers(client, &check).await.map_err(failed)?;
                self.triggers(&seen);
            }
        }
        // Whoever waited before this was heard is asked to wait behind what comes now.
        if let Some(schema) = self.schema {
            let again = schema::fill(
                "SELECT pg_catalog.pg_notify($2::text, 'wait '::text OPERATOR(pg_catalog.||) w.id) FROM {schema}.wait w \
                WHERE NOT EXISTS (SELECT FROM {schema}.confirmation c WHERE c.wait OPERATOR(pg_catalog.=) w.id \
                AND c.replica OPERATOR(pg_catalog.=) $1::text)",
                schema,
            );
            client.query(&again, &[&self.id, &channel]).await.map_err(failed)?;
        }
        Ok(())
    }

    /// Changes come from others, at rest, and on the triggers' channel. A pooler that gives each transaction another
    /// connection brings back the echo of one's own, and drops all else. The second connection is made as look-ups make
    /// theirs: it must get to the same server.
    async fn hear_another(&self, life: &Life) -> Result<(), String> {
        let failed = |why: String| format!("a second connection, to try the first: {why}");
        // Where look-ups would go if changes were heard from here.
        let reached = self.target.reach_from(self.home.as_ref(), "").await.map_err(|why| failed(why.to_string()))?;
        let Reached { client: other, driver, home } = reached;
        if !self.home.as_ref().is_some_and(|own| own.is_same_server(&home)) {
            return Err(ASTRAY.into());
        }
        let _ends = EndsWith::owner_of(&drive(driver));
        other.batch_execute(&self.proof_sql()).await.map_err(|error| failed(say(&error)))?;
        life.proof.notified().await;
        Ok(())
    }

    /// A change of nobody's token, on the channel that the triggers tell on at this moment, as they find it.
    fn proof_sql(&self) -> String {
        let word = format!(
            "'{} '::text OPERATOR(pg_catalog.||) ((extract(epoch FROM pg_catalog.clock_timestamp())::float8 \
            OPERATOR(pg_catalog.*) 1000::float8)::bigint)::text",
            self.nobody
        );
        match self.schema {
            Some(schema) => schema::fill(
                &format!("SELECT pg_catalog.pg_notify(v.channel, {word}) FROM {{schema}}.version v"),
                schema,
            ),
            None => format!("SELECT pg_catalog.pg_notify('{}'::text, {word})", self.channel),
        }
    }

    fn no_entry(&self, error: &Error) -> String {
        match self.schema {
            Some(schema) => format!(
                "{}; the gateway must be allowed to enter itself in the register: GRANT USAGE ON SCHEMA {schema}, \
                 SELECT ON ALL TABLES IN SCHEMA {schema}, INSERT and UPDATE ON {schema}.replica and \
                 {schema}.confirmation, UPDATE (last_used) ON {schema}.token",
                say(error)
            ),
            None => say(error),
        }
    }

    fn beat_sql(&self) -> Beat {
        // In our own tables, where there is a list of changes, an echo says how far it was told, and on which channel the
        // triggers tell.
        let echo = match self.schema {
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
        let entry = self.schema.map_or_else(String::new, |schema| {
            let name: String = self.name.chars().filter(|c| !"'\\\0".contains(*c)).collect();
            schema::fill(
                &format!(
                    "INSERT INTO {{schema}}.replica (id, name) VALUES ('{}', '{name}') \
                    ON CONFLICT (id) DO UPDATE SET seen = pg_catalog.clock_timestamp();",
                    self.id
                ),
                schema,
            )
        });
        Beat { entry: format!("{entry} {echo}"), echo }
    }

    fn triggers(&mut self, seen: &Triggers) {
        if seen.there && seen.loose && !self.loose_told {
            self.loose_told = true;
            log::warn!(
                "{}: tollgate's triggers are of an older version, and look for functions and operators wherever the \
                 search_path of whoever changes the tables says: who may create some there can take over. Run `tollgate store \
                 install-triggers --config FILE` again",
                self.target
            );
        }
        match (seen.there, self.hearing) {
            (true, Hearing::Unknown | Hearing::No) => self.hears(),
            (false, Hearing::Unknown) => {
                (self.heard)(Event::Untold);
                self.log(format!(
                    "{}: the tables have no triggers of tollgate that tell on channel \"{}\"{}, so nobody tells of changes: \
                     a revoked token works for up to positive_ttl. Run `tollgate store install-triggers --config FILE`",
                    self.target,
                    self.channel,
                    seen.elsewhere()
                ));
            }
            (false, Hearing::Yes) => {
                self.hearing = Hearing::No;
                (self.heard)(Event::Deaf);
                self.target.settle(None);
                self.log(format!(
                    "{}: tollgate's triggers on channel \"{}\" are gone{}: nobody tells of changes",
                    self.target,
                    self.channel,
                    seen.elsewhere()
                ));
            }
            _ => {}
        }
    }

    /// Passes words on in their order, as many as possible at once, and confirms to who waits behind them.
    async fn take_in(&mut self, client: &Client, batch: &mut Vec<String>) -> Result<(), String> {
        let (mut changes, mut everything) = (Vec::new(), false);
        for word in batch.drain(..) {
            match read_word(&word) {
                Word::Change(change) => changes.push(change),
                Word::Everything => everything = true,
                Word::Wait(id) => {
                    self.pass_on(&mut changes, &mut everything);
                    if let Some(schema) = self.schema {
                        self.confirm(client, schema, id).await?;
                    }
                }
                Word::Nonsense => {
                    everything = true;
                    if !self.nonsense_told {
                        self.nonsense_told = true;
                        log::warn!(
                            "{}: a word on the channel is none of tollgate's; everything is asked anew",
                            self.target
                        );
                    }
                }
            }
        }
        self.pass_on(&mut changes, &mut everything);
        Ok(())
    }

    fn pass_on(&self, changes: &mut Vec<Change>, everything: &mut bool) {
        let (changes, everything) = (std::mem::take(changes), std::mem::take(everything));
        // Without triggers a word of everything is no promise that there will be others.
        if everything && self.hearing == Hearing::Yes {
            (self.heard)(Event::Hearing);
        } else if !changes.is_empty() {
            (self.heard)(Event::Changed(changes));
        }
    }

    async fn confirm(&self, client: &Client, schema: &str, wait: &str) -> Result<(), String> {
        let sql = schema::fill(
            "INSERT INTO {schema}.confirmation (wait, replica) SELECT w.id, $2::text FROM {schema}.wait w \
            WHERE w.id OPERATOR(pg_catalog.=) $1::text ON CONFLICT DO NOTHING",
            schema,
        );
        match timeout(PATIENCE, client.execute(&sql, &[&wait, &self.id])).await {
            // Who waited has given up in the same moment.
            Ok(Err(error)) if error.code() == Some(&tokio_postgres::error::SqlState::FOREIGN_KEY_VIOLATION) => Ok(()),
            Ok(result) => result.map(drop).map_err(|error| self.no_entry(&error)),
            Err(_) => Err(format!("a confirmation took longer than {PATIENCE:?}")),
        }
    }
}

impl Drop for Follower<'_> {
    /// Nobody says where changes are heard from any more.
    fn drop(&mut self) {
        self.target.settle(None);
    }
}

/// Signs that a server lives.
struct Life {
    echo: Notify,
    /// A change of nobody's token came.
    proof: Notify,
    /// What the last echo said of the list of changes.
    mark: Mutex<Option<Mark>>,
    /// Words that came.
    words: AtomicU64,
    /// The triggers' channel when the listening began.
    channel: OnceLock<String>,
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

struct Beat {
    echo: String,
    /// With the gateway's row in the register.
    entry: String,
}

/// Runs the connection and sorts echoes from words. Returns what ended it.
async fn read(
    mut driver: Driver,
    words: &mpsc::UnboundedSender<String>,
    life: &Life,
    echo_channel: &str,
    nobody: &str,
) -> String {
    loop {
        match poll_fn(|cx| driver.poll_message(cx)).await {
            Some(Ok(AsyncMessage::Notification(said))) => {
                life.words.fetch_add(1, Ordering::Relaxed);
                if said.channel() == echo_channel {
                    if let Some((mark, told_on)) = said.payload().rsplit_once(' ') {
                        let channel = life.channel.get().map_or("", String::as_str);
                        if told_on != channel {
                            return format!(
                                "the triggers tell on channel \"{told_on}\" now, and this gateway listened to \"{channel}\""
                            );
                        }
                        *life.mark.lock() = Some(mark.to_owned());
                    }
                    life.echo.notify_one();
                } else if said.payload().starts_with(nobody) {
                    life.proof.notify_one();
                } else if words.send(said.payload().to_owned()).is_err() {
                    return "nobody takes in what comes".into();
                }
            }
            Some(Ok(_)) => {}
            Some(Err(error)) => return say(&error),
            None => return "the server closed the connection".into(),
        }
    }
}

/// Asks for an echo again and again. An echo comes on the way that changes come, behind all that came before: one that
/// stays out means that changes stay out too. Whoever polls this has taken in first what has come. Returns what ended it.
async fn beat_on(
    client: &Client,
    life: &Life,
    beat: Beat,
    trigger_check: Option<&TriggerCheck>,
    triggers: mpsc::UnboundedSender<Triggers>,
    heard: Heard<'_>,
) -> String {
    let mut ticks = interval(BEAT);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for count in 1_u32.. {
        ticks.tick().await;
        let asked_ms = crate::clock::now().mono_ms;
        let sql = if count % BEATS_PER_ENTRY == 0 { &beat.entry } else { &beat.echo };
        let mut round = std::pin::pin!(join(client.batch_execute(sql), life.echo.notified()));
        let mut words = life.words.load(Ordering::Relaxed);
        loop {
            match timeout(SILENCE, &mut round).await {
                Ok((Ok(()), ())) => break,
                Ok((Err(error), ())) => return say(&error),
                Err(_) => {
                    // A flood of words is a sign of life.
                    let now = life.words.load(Ordering::Relaxed);
                    if now == words {
                        return format!("the server said nothing for {SILENCE:?}");
                    }
                    words = now;
                }
            }
        }
        heard(Event::Alive { asked_ms, mark: life.mark.lock().clone() });
        if let Some(check) = trigger_check
            && count % BEATS_PER_TRIGGER_CHECK == 0
        {
            match timeout(PATIENCE, look_at_triggers(client, check)).await {
                Ok(Ok(seen)) => drop(triggers.send(seen)),
                Ok(Err(error)) => return say(&error),
                Err(_) => return format!("the server said nothing for {PATIENCE:?}"),
            }
        }
    }
    "counted to the end".into()
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
