//! Hearing of changes: one connection of its own, whose silence is noticed within a second, and the register of gateways
//! that confirm what they heard.

use super::super::{Change, Event, Heard, Named, REPLICA_GONE, StoreError, replica_name};
use super::link::{Address, Link, Pool, Pushes};
use super::{Keys, RedisChanges, RedisStore, Topology};
use crate::store::credential::Digest;
use parking_lot::Once;
use redis::{PushInfo, PushKind, Value};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, timeout};

/// A lost connection is noticed within a beat and the time for its answer.
const BEAT: Duration = Duration::from_millis(500);
const BEAT_ANSWER: Duration = Duration::from_millis(500);
/// Sentinels are asked beside the beat. They must not hold it up for so long that what is known would be doubted.
const SENTINEL_ANSWER: Duration = Duration::from_millis(300);
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MOST: Duration = Duration::from_millis(500);
/// Confirmations that may wait to be written.
const CONFIRMATIONS: usize = 1_024;
const REGISTER: Duration = Duration::from_secs(1);
/// Confirmations are kept, and waited for, no longer than this.
pub(super) const WAIT_KEPT: Duration = Duration::from_secs(300);

pub(super) async fn follow(store: &RedisStore, heard: Heard<'_>) {
    if store.settings.changes == RedisChanges::None {
        return match store.connector.topology() {
            // Without messages, one thing is still to be noticed: that look-ups ask a server that is the master no more.
            Topology::Sentinel { .. } => watch_master(store).await,
            Topology::Single | Topology::Cluster => std::future::pending().await,
        };
    }
    let register = Register::new(store);
    let mut follower = Follower { store, heard, register: &register, hears: None, logged: false, master: None };
    let mut pause = Duration::ZERO;
    loop {
        let started = Instant::now();
        let error = follower.subscribe_and_listen().await;
        follower.lost(&error);
        // At once after a connection that had held, and then ever slower.
        pause = if started.elapsed() > BEAT { Duration::ZERO } else { (pause * 2).clamp(RETRY_FIRST, RETRY_MOST) };
        sleep(pause).await;
    }
}

/// Looks every second whether the sentinels name another master than before.
async fn watch_master(store: &RedisStore) {
    let mut known = None;
    loop {
        if let Ok(master) = store.connector.master().await {
            if known.as_ref().is_some_and(|known| *known != master) {
                store.pool.renew();
            }
            known = Some(master);
        }
        sleep(2 * BEAT).await;
    }
}

struct Follower<'a> {
    store: &'a RedisStore,
    heard: Heard<'a>,
    register: &'a Register,
    /// What was said last.
    hears: Option<bool>,
    logged: bool,
    /// The one that was followed last.
    master: Option<Address>,
}

impl Follower<'_> {
    fn lost(&mut self, error: &StoreError) {
        if !std::mem::replace(&mut self.logged, true) {
            log::warn!("redis: changes are not heard of: {error}");
        }
        if self.hears != Some(false) {
            (self.heard)(Event::Deaf);
            self.hears = Some(false);
            if self.is_sentinel() {
                self.store.pool.renew();
            }
        }
    }

    fn is_sentinel(&self) -> bool {
        matches!(self.store.connector.topology(), Topology::Sentinel { .. })
    }

    async fn subscribe_and_listen(&mut self) -> StoreError {
        let listened = async {
            let (mut link, pushes, address) = self.store.connector.subscriber().await?;
            if self.is_sentinel() && self.master.as_ref() != Some(&address) {
                // Look-ups may have come back to the old one in between.
                self.store.pool.renew();
                self.master = Some(address.clone());
            }
            hear_of_flushes(&mut link, self.store).await?;
            let channel = match &self.store.settings.changes {
                RedisChanges::Channel(name) => {
                    // Whoever hears must be known to those who wait, so that comes first.
                    self.register.note().await?;
                    bounded(link.subscribe(false, name)).await?;
                    true
                }
                _ => {
                    check_notifications(&mut link, &self.store.said).await?;
                    let channel = format!("__keyspace@{}__:", self.store.settings.database);
                    bounded(link.subscribe(true, &(channel + &self.store.keys.pattern("")))).await?;
                    false
                }
            };
            let mut beat = Beat { store: self.store, link, address, may_ask_role: true, keyspace: !channel };
            beat.check().await?;
            Ok((beat, pushes, channel))
        };
        let (mut beat, mut pushes, channel) = match listened.await {
            Ok(subscribed) => subscribed,
            Err(error) => return error,
        };
        (self.heard)(Event::Hearing);
        self.hears = Some(true);
        self.logged = false;
        let (confirm, confirmations) = mpsc::channel(CONFIRMATIONS);
        let (beats, mut answered) = mpsc::channel(1);
        let beating = async {
            let mut ticks = interval_at(Instant::now() + BEAT, BEAT);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                let asked_ms = crate::clock::now().mono_ms;
                if let Err(error) = beat.check().await {
                    return error;
                }
                if beats.send(asked_ms).await.is_err() {
                    return StoreError::Unavailable("nobody takes in what comes".into());
                }
            }
        };
        let reading = async {
            loop {
                let (first, alive) = tokio::select! {
                    biased;
                    first = pushes.next() => match first {
                        Some(first) => (Some(first), None),
                        None => break,
                    },
                    // What came before the answer to a beat lies in the queue by now, and comes first.
                    Some(asked_ms) = answered.recv() => (pushes.more(), Some(asked_ms)),
                };
                if first.is_some_and(|first| self.take(first, &mut pushes, &confirm)) {
                    return StoreError::Unavailable("the connection was closed".into());
                }
                if let Some(asked_ms) = alive {
                    (self.heard)(Event::Alive { asked_ms, mark: None });
                }
            }
            StoreError::Unavailable("the connection was closed, or brought more than could be taken in".into())
        };
        let registering = async {
            if channel {
                self.register.keep(confirmations).await;
            }
            std::future::pending::<StoreError>().await
        };
        tokio::select! {
            error = reading => error,
            error = beating => error,
            error = registering => error,
        }
    }

    /// Takes in a message and all that came with it. Says whether the connection ended.
    fn take(&self, first: PushInfo, pushes: &mut Pushes, confirm: &mpsc::Sender<String>) -> bool {
        let mut changes = Vec::new();
        let mut everything = false;
        let mut waits = Vec::new();
        let mut ended = false;
        let mut next = Some(first);
        while let Some(push) = next {
            match message(push, &self.store.keys) {
                Message::Changed(change) => changes.push(change),
                Message::Everything => everything = true,
                Message::Wait(id) => waits.push(id),
                Message::Ended => ended = true,
                Message::Other => {}
            }
            next = if ended { None } else { pushes.more() };
        }
        if !changes.is_empty() {
            (self.heard)(Event::Changed(changes));
        }
        if everything {
            (self.heard)(Event::Hearing);
        }
        // Only now, as everything before has taken effect.
        for id in waits {
            // With a full queue somebody floods the channel: whoever waits is told that this gateway did not confirm.
            drop(confirm.try_send(id));
        }
        ended
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Message {
    Changed(Change),
    Everything,
    Wait(String),
    Ended,
    Other,
}

fn message(push: PushInfo, keys: &Keys) -> Message {
    let text = |value: &Value| match value {
        Value::BulkString(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        _ => String::new(),
    };
    match (push.kind, push.data.as_slice()) {
        (PushKind::Disconnection, _) => Message::Ended,
        (PushKind::Message, [_, payload]) => channel_message(&text(payload)),
        (PushKind::PMessage, [_, channel, _]) => {
            let channel = text(channel);
            let key = channel.split_once("__:").map_or("", |(_, key)| key);
            // The register's keys lie under the same prefix.
            keys.digest(key).map_or(Message::Other, |digest| changed(digest, now_ms()))
        }
        // No keys: all of them.
        (PushKind::Invalidate, data) if !data.iter().any(|keys| matches!(keys, Value::Array(_))) => Message::Everything,
        _ => Message::Other,
    }
}

fn changed(digest: Digest, at_ms: u64) -> Message {
    Message::Changed(Change { token: Named::Token(digest), at_ms })
}

fn channel_message(payload: &str) -> Message {
    let (first, rest) = payload.split_once(' ').unwrap_or((payload, ""));
    match (first, Digest::from_hex(first)) {
        ("*", _) => Message::Everything,
        ("wait", _) if is_wait(rest) => Message::Wait(rest.into()),
        (_, Some(digest)) => changed(digest, rest.trim().parse().unwrap_or_else(|_| now_ms())),
        _ => {
            // Somebody wants to tell something. Asking too much is the safe side.
            log::warn!("redis: a message on the channel of changes can't be understood; all tokens are looked up anew");
            Message::Everything
        }
    }
}

/// The name becomes part of a key.
fn is_wait(id: &str) -> bool {
    (1..=64).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

async fn bounded<T>(future: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    timeout(BEAT_ANSWER, future).await.unwrap_or(Err(StoreError::Timeout))
}

fn is_denied(error: &StoreError) -> bool {
    matches!(error, StoreError::Unavailable(what) if what.contains("(NOPERM)") || what.contains("lacks a command"))
}

/// Neither messages nor keyspace events tell of FLUSHALL and FLUSHDB, but the server tells every client whose keys it
/// tracks. Those of a prefix that nobody uses are tracked, so that nothing else is told.
async fn hear_of_flushes(link: &mut Link, store: &RedisStore) -> Result<(), StoreError> {
    let mut track = redis::cmd("CLIENT");
    track.arg("TRACKING").arg("ON").arg("BCAST").arg("PREFIX").arg(store.keys.unused());
    match bounded(link.ask::<Value>(&track)).await {
        Err(error) if is_denied(&error) => {
            store.said.flushes.call_once(|| log::warn!("redis: FLUSHALL will not be heard of: {error}"));
            Ok(())
        }
        answer => answer.map(drop),
    }
}

/// Without the right ones nothing would ever be heard.
async fn check_notifications(link: &mut Link, said: &Said) -> Result<(), StoreError> {
    let question = redis::cmd("CONFIG").arg("GET").arg("notify-keyspace-events").take();
    let flags: Vec<(String, String)> = match bounded(link.ask(&question)).await {
        Ok(answer) => answer,
        Err(error) if is_denied(&error) => {
            said.notifications.call_once(|| {
                log::warn!("redis: whether notify-keyspace-events holds Kg$hx can't be seen (+config|get): make sure");
            });
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let flags = flags.first().map_or("", |(_, flags)| flags.as_str());
    let has = |flag| flags.contains(flag);
    if has('K') && (has('A') || ['g', '$', 'h', 'x'].into_iter().all(has)) {
        return Ok(());
    }
    let what = "the server does not tell of changed keys: CONFIG SET notify-keyspace-events Kg$hxe (and in redis.conf)";
    Err(StoreError::Unavailable(what.into()))
}

/// What is asked over and over on the connection that messages come by.
struct Beat<'a> {
    store: &'a RedisStore,
    link: Link,
    address: Address,
    may_ask_role: bool,
    keyspace: bool,
}

impl Beat<'_> {
    async fn check(&mut self) -> Result<(), StoreError> {
        if self.may_ask_role {
            let asked = match self.store.connector.topology() {
                Topology::Cluster => self.cluster().await,
                Topology::Single | Topology::Sentinel { .. } => self.role().await,
            };
            match asked {
                Err(error) if is_denied(&error) => self.may_ask_role = false,
                Err(error) => return Err(error),
                Ok(()) => {}
            }
        }
        if !self.may_ask_role {
            bounded(self.link.ask::<Value>(&redis::cmd("PING"))).await?;
        }
        if self.keyspace {
            check_notifications(&mut self.link, &self.store.said).await?;
        }
        Ok(())
    }

    async fn role(&mut self) -> Result<(), StoreError> {
        let command = redis::cmd("ROLE");
        let sentinel = matches!(self.store.connector.topology(), Topology::Sentinel { .. });
        let named = async {
            // Not to be reached is no news; a master that was left behind by a split network doesn't know it.
            let asked = timeout(SENTINEL_ANSWER, self.store.connector.master());
            if sentinel { asked.await.ok().and_then(Result::ok) } else { None }
        };
        let (role, named) = tokio::join!(bounded(self.link.ask::<Vec<Value>>(&command)), named);
        let role = role?;
        if named.is_some_and(|named| named != self.address) {
            return Err(StoreError::Unavailable("the sentinels name another master".into()));
        }
        let word = |index| match role.get(index) {
            Some(Value::BulkString(word)) => word.as_slice(),
            _ => b"",
        };
        match word(0) {
            b"master" => Ok(()),
            b"slave" if sentinel => Err(StoreError::Unavailable("the server is the master no more".into())),
            // The link's state is the fourth; messages come through it.
            b"slave" if word(3) == b"connected" => Ok(()),
            _ => Err(StoreError::Unavailable("the server is a replica that is cut off from its master".into())),
        }
    }

    async fn cluster(&mut self) -> Result<(), StoreError> {
        let info: String = bounded(self.link.ask(redis::cmd("CLUSTER").arg("INFO"))).await?;
        match info.lines().any(|line| line.trim() == "cluster_state:ok") {
            true => Ok(()),
            false => Err(StoreError::Unavailable("this node says that the cluster is down: see CLUSTER INFO".into())),
        }
    }
}

/// This gateway's place among those that others wait for.
struct Register {
    pool: Arc<Pool>,
    keys: Keys,
    name: String,
    said: Arc<Said>,
}

/// What one store says once, as it stays so however often it is found out.
#[derive(Default)]
pub(super) struct Said {
    flushes: Once,
    notifications: Once,
    register: Once,
}

impl Register {
    fn new(store: &RedisStore) -> Self {
        // Two generations of a configuration may follow at once: each confirms for itself.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("{}/{}", replica_name(), COUNT.fetch_add(1, Ordering::Relaxed));
        Self { pool: Arc::clone(&store.pool), keys: store.keys.clone(), name, said: Arc::clone(&store.said) }
    }

    async fn now(&self) -> Result<u64, StoreError> {
        let mut pipe = redis::Pipeline::new();
        pipe.cmd("TIME");
        let ((seconds, micros),): ((u64, u64),) = self.pool.ask(&pipe).await?;
        Ok(seconds * 1000 + micros / 1000)
    }

    /// Enters this gateway. One that may not write goes on without; one that can't at the moment does not.
    async fn note(&self) -> Result<(), StoreError> {
        let entered = async {
            let now = self.now().await?;
            let mut pipe = redis::Pipeline::new();
            pipe.cmd("ZADD").arg(self.keys.replicas()).arg(now).arg(&self.name);
            self.pool.ask::<Value>(&pipe).await
        };
        match timeout(REGISTER, entered).await.unwrap_or(Err(StoreError::Timeout)) {
            Ok(_) => Ok(()),
            Err(error) if is_denied(&error) || error.to_string().contains("(READONLY)") => {
                self.said.register.call_once(|| {
                    log::warn!("redis: this gateway can't register, so `--wait` won't wait for it: {error}")
                });
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Stays registered and confirms, and also what others began to wait for before it was listening.
    async fn keep(&self, mut asked: mpsc::Receiver<String>) {
        let mut open = Vec::new();
        let mut outstanding = false;
        let mut tick = tokio::time::interval(REGISTER);
        loop {
            tokio::select! {
                _ = tick.tick() => {
                    drop(self.note().await);
                    if !outstanding && let Ok(waits) = self.outstanding().await {
                        open.extend(waits);
                        outstanding = true;
                    }
                }
                id = asked.recv() => match id {
                    Some(id) => open.push(id),
                    None => return,
                },
            }
            while let Ok(id) = asked.try_recv() {
                open.push(id);
            }
            // What fails is tried again with the next tick.
            for id in std::mem::take(&mut open) {
                let key = self.keys.confirmed(&id);
                let mut pipe = redis::Pipeline::new();
                pipe.cmd("SADD").arg(&key).arg(&self.name).cmd("EXPIRE").arg(&key).arg(WAIT_KEPT.as_secs());
                match timeout(REGISTER, self.pool.ask::<Value>(&pipe)).await {
                    Err(_) | Ok(Err(StoreError::Timeout | StoreError::Overloaded)) => open.push(id),
                    Ok(Err(error)) if !is_denied(&error) && open.len() < 1_000 => open.push(id),
                    Ok(_) => {}
                }
            }
        }
    }

    async fn outstanding(&self) -> Result<Vec<String>, StoreError> {
        let since = self.now().await?.saturating_sub(u64::try_from(WAIT_KEPT.as_millis()).unwrap_or(u64::MAX));
        let mut pipe = redis::Pipeline::new();
        pipe.cmd("ZRANGEBYSCORE").arg(self.keys.waits()).arg(since).arg("+inf");
        let (waits,): (Vec<String>,) =
            timeout(REGISTER, self.pool.ask(&pipe)).await.unwrap_or(Err(StoreError::Timeout))?;
        Ok(waits.into_iter().filter(|id| is_wait(id)).collect())
    }
}

impl Drop for Register {
    /// Takes its leave, so that nobody waits [`REPLICA_GONE`] for a gateway that has been told to go.
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let mut pipe = redis::Pipeline::new();
        pipe.cmd("ZREM").arg(self.keys.replicas()).arg(&self.name);
        let pool = Arc::clone(&self.pool);
        runtime.spawn(async move { timeout(BEAT_ANSWER.min(REPLICA_GONE), pool.ask::<Value>(&pipe)).await.ok() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages() {
        let digest = Digest::of(b"t");
        let hex = digest.to_hex();
        assert_eq!(channel_message(&format!("{hex} 1700000000000")), changed(digest, 1_700_000_000_000));
        assert!(matches!(channel_message(&hex), Message::Changed(change) if change.token == Named::Token(digest)));
        assert_eq!(channel_message("*"), Message::Everything);
        assert_eq!(channel_message("wait abc123"), Message::Wait("abc123".into()));
        for doubtful in ["", "wait ", "wait a:b", "revoked!", &hex[1..]] {
            assert_eq!(channel_message(doubtful), Message::Everything, "{doubtful}");
        }
    }

    #[test]
    fn only_keys_of_tokens_are_tokens() {
        let keys = Keys { prefix: "a[*]:".into() };
        let push = |key: &str| PushInfo {
            kind: PushKind::PMessage,
            data: [b"".to_vec(), format!("__keyspace@0__:{key}").into_bytes(), b"set".to_vec()]
                .map(Value::BulkString)
                .into(),
        };
        let digest = Digest::of(b"t");
        assert!(matches!(message(push(&keys.token(&digest)), &keys), Message::Changed(_)));
        for other in
            [keys.replicas(), keys.waits(), keys.confirmed("a"), keys.token(&digest).to_uppercase(), digest.to_hex()]
        {
            assert_eq!(message(push(&other), &keys), Message::Other, "{other}");
        }
        assert_eq!(keys.pattern("ab"), r"a\[\*\]:ab*");
    }
}
