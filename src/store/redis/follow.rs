//! Changes of a Redis server: one connection of its own, which subscribes and is asked over and over, and the register of
//! gateways that confirm what they took in. Of a cluster, one connection to each master: a message reaches the subscribers of
//! the node that it was published on for certain, and those of other nodes only if the cluster's bus does not lose it.

use super::super::feed::{self, Begun, ChangeSource, Coverage, Inbox, Loss, Pace, Subscription};
use super::super::{Change, Heard, Mark, Named, REPLICA_GONE, StoreError, replica_name};
use super::link::{Address, Push, READ_ONLY_REPLICA, RedisConnection, RedisPool, masters_by};
use super::{Keys, RedisChanges, RedisStore, Topology};
use crate::store::credential::Digest;
use crate::telemetry::metrics::StoreMetrics;
use async_trait::async_trait;
use futures_util::future::try_join_all;
use parking_lot::{Mutex, Once};
use redis::{PushInfo, PushKind, Value};
use std::collections::{BTreeMap, VecDeque};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use tokio::time::{sleep, timeout};

/// A lost connection is noticed within a beat and the time for its answer.
const BEAT: Duration = Duration::from_millis(500);
const BEAT_ANSWER: Duration = Duration::from_millis(500);
/// Sentinels are asked beside the beat. They must not hold it up for so long that what is known would be doubted.
const SENTINEL_ANSWER: Duration = Duration::from_millis(300);
/// How often the gateway's entry in the register is renewed, and how long that may take.
const REGISTER: Duration = Duration::from_secs(1);
/// Waits that have arrived from some masters of a cluster and not yet from all. Beyond them the oldest are dropped; whoever
/// waits says it again every second.
const GATHERED: usize = 1_024;
/// Confirmations are kept, and waited for, no longer than this.
pub(super) const WAIT_KEPT: Duration = Duration::from_secs(300);

pub(super) async fn follow(store: &RedisStore, heard: Heard<'_>) {
    if store.settings.changes != RedisChanges::None {
        let register = Arc::new(Register::new(store));
        return feed::follow(RedisFeed { store, register, followed: Vec::new() }, crate::clock::now, heard).await;
    }
    match store.connector.topology() {
        // Without messages, one thing is still to be noticed: that lookups ask a server that is the master no more.
        Topology::Sentinel { .. } => watch_master(store).await,
        Topology::Single | Topology::Cluster => std::future::pending().await,
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

struct RedisFeed<'a> {
    store: &'a RedisStore,
    register: Arc<Register>,
    /// Those that were followed last: one, or a cluster's masters.
    followed: Vec<Address>,
}

type ChannelMessage = feed::Message<String>;

impl RedisFeed<'_> {
    /// Whether another server may take over.
    fn fails_over(&self) -> bool {
        matches!(self.store.connector.topology(), Topology::Sentinel { .. } | Topology::Cluster)
    }
}

#[async_trait]
impl<'a> ChangeSource for RedisFeed<'a> {
    type Subscription = Subscribed<'a>;

    fn label(&self) -> String {
        "redis".into()
    }

    fn pace(&self) -> Pace {
        let silence = match self.store.connector.topology() {
            // Each of the connections is watched by itself, so that the log can name the server.
            Topology::Cluster => 2 * BEAT_ANSWER,
            Topology::Single | Topology::Sentinel { .. } => BEAT_ANSWER,
        };
        Pace { beat: BEAT, silence: Some(silence), upkeep: Some(REGISTER) }
    }

    async fn begin(&mut self, inbox: Inbox<String>) -> Result<Begun<Subscribed<'a>>, Loss> {
        let subscribed = self.subscribe(inbox).await?;
        let servers: Vec<String> = subscribed.ears.iter().map(|ear| ear.address.to_string()).collect();
        Ok(Begun { servers: Some(servers.join(", ")), ..Begun::new(subscribed) })
    }

    fn on_hearing(&mut self) {
        self.store.metrics.servers(self.followed.iter().map(Address::to_string).collect());
        self.store.lost.send_replace(false);
    }

    fn on_lost(&mut self) {
        self.store.lost.send_replace(true);
        self.store.metrics.servers(Vec::new());
        self.store.metrics.writable(None);
        if self.fails_over() {
            self.store.pool.renew();
        }
    }

    fn sign_off(&mut self) {
        self.register.sign_off();
    }
}

impl<'a> RedisFeed<'a> {
    async fn subscribe(&mut self, inbox: Inbox<String>) -> Result<Subscribed<'a>, Loss> {
        let inbox = Arc::new(inbox);
        let (masters, ears) = self.connect(&inbox).await?;
        let addresses: Vec<Address> = ears.iter().map(|ear| ear.address.clone()).collect();
        if self.fails_over() && self.followed != addresses {
            // Lookups may have come back to the old one in between.
            self.store.pool.renew();
        }
        self.followed = addresses;
        try_join_all(ears.iter().map(|ear| hear_of_flushes(ear.link.clone(), self.store))).await?;
        let mut waits = Vec::new();
        let keyspace = match &self.store.settings.changes {
            RedisChanges::Channel(name) => {
                // Whoever hears must be known to those who wait, so that comes first.
                self.register.note().await?;
                bounded(try_join_all(ears.iter().map(|ear| ear.subscribe(false, name)))).await?;
                // Also what others began to wait for before this was listening.
                waits = self.register.outstanding().await?;
                false
            }
            _ => {
                let pattern = format!("__keyspace@{}__:", self.store.settings.database) + &self.store.keys.pattern("");
                for ear in &ears {
                    check_notifications(&mut ear.link.clone(), &self.store.warnings).await?;
                    bounded(ear.subscribe(true, &pattern)).await?;
                }
                true
            }
        };
        let register = Arc::clone(&self.register);
        let (may_ask_role, may_ask_stats) = (AtomicBool::new(true), AtomicBool::new(true));
        let subscribed =
            Subscribed { store: self.store, register, masters, ears, may_ask_role, may_ask_stats, keyspace };
        bounded(subscribed.check()).await?;
        // What was told before they began to wait has arrived before the answer to the check.
        waits.into_iter().for_each(|id| inbox.put(ChannelMessage::Wait(id)));
        Ok(subscribed)
    }

    /// Connections that nothing is subscribed on yet, and of a cluster its masters.
    async fn connect(&self, inbox: &Arc<Inbox<String>>) -> Result<(BTreeMap<String, Address>, Vec<ServerEar>), Loss> {
        let connector = &self.store.connector;
        if *connector.topology() != Topology::Cluster {
            let (push, arrived) = self.push(inbox, &Arc::new(Gathering::of(1)), 0);
            let (link, address) = connector.subscriber(push).await?;
            return Ok((BTreeMap::new(), vec![ServerEar::new(link, address, arrived)]));
        }
        let masters = connector.cluster_masters().await?;
        let gathering = Arc::new(Gathering::of(masters.len()));
        let ears = masters.values().enumerate().map(|(index, address)| {
            let (push, arrived) = self.push(inbox, &gathering, index);
            async move {
                match connector.subscriber_at(address, push).await {
                    Ok(link) => Ok(ServerEar::new(link, address.clone(), arrived)),
                    // Another node answered, and knows it as a master.
                    Err(StoreError::Unavailable(why)) => Err(Loss::Incomplete(format!("a master is missing: {why}"))),
                    Err(StoreError::Timeout) => Err(Loss::Incomplete(format!("the master {address} does not answer"))),
                    Err(error) => Err(Loss::from(error)),
                }
            }
        });
        let ears = try_join_all(ears).await?;
        Ok((masters, ears))
    }

    /// What takes the messages of one connection, and how many there were.
    fn push(&self, inbox: &Arc<Inbox<String>>, gathering: &Arc<Gathering>, index: usize) -> (Push, Arc<AtomicU64>) {
        let (keys, inbox, gathering) = (self.store.keys.clone(), Arc::clone(inbox), Arc::clone(gathering));
        let arrived = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&arrived);
        let push = move |info| {
            count.fetch_add(1, Ordering::Relaxed);
            match message(info, &keys) {
                Some(ChannelMessage::Wait(id)) if !gathering.is_whole(index, &id) => {}
                Some(message) => inbox.put(message),
                None => {}
            }
            Ok(())
        };
        (Arc::new(push), arrived)
    }
}

/// The connection to one server that messages arrive by.
struct ServerEar {
    link: RedisConnection,
    address: Address,
    /// How many messages arrived.
    arrived: Arc<AtomicU64>,
    /// What the node of a cluster said of the cluster's layout when its list of masters was read last.
    layout: Mutex<String>,
    /// How many keys the server had evicted when it was asked last.
    evicted: AtomicU64,
}

/// What was evicted before this gateway listened is none of its business.
const NOT_COUNTED: u64 = u64::MAX;

impl ServerEar {
    fn new(link: RedisConnection, address: Address, arrived: Arc<AtomicU64>) -> Self {
        Self { link, address, arrived, layout: Mutex::default(), evicted: AtomicU64::new(NOT_COUNTED) }
    }

    async fn subscribe(&self, pattern: bool, name: &str) -> Result<(), StoreError> {
        self.link.clone().subscribe(pattern, name).await
    }
}

/// Waits on their way in. One that has arrived by every connection is behind all changes that were published before it, by
/// whichever node.
struct Gathering {
    connections: usize,
    waits: Mutex<VecDeque<(String, Vec<bool>)>>,
}

impl Gathering {
    fn of(connections: usize) -> Self {
        Self { connections, waits: Mutex::default() }
    }

    /// Notes that a wait arrived by a connection. Whether it was the last one that was missing.
    fn is_whole(&self, connection: usize, id: &str) -> bool {
        let mut waits = self.waits.lock();
        let index = waits.iter().position(|(known, _)| known == id).unwrap_or_else(|| {
            if waits.len() == GATHERED {
                waits.pop_front();
            }
            waits.push_back((id.to_owned(), vec![false; self.connections]));
            waits.len() - 1
        });
        let Some((_, arrived)) = waits.get_mut(index) else { return false };
        if let Some(arrived) = arrived.get_mut(connection) {
            *arrived = true;
        }
        let is_whole = arrived.iter().all(|arrived| *arrived);
        if is_whole {
            waits.remove(index);
        }
        is_whole
    }
}

/// `None`: it says nothing of tokens.
fn message(push: PushInfo, keys: &Keys) -> Option<ChannelMessage> {
    let text = |value: &Value| match value {
        Value::BulkString(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        _ => String::new(),
    };
    match (push.kind, push.data.as_slice()) {
        (PushKind::Disconnection, _) => Some(ChannelMessage::Ended(Loss::Closed)),
        (PushKind::Message, [_, payload]) => Some(channel_message(&text(payload))),
        (PushKind::PMessage, [_, channel, _]) => {
            let channel = text(channel);
            let key = channel.split_once("__:").map_or("", |(_, key)| key);
            // The register's keys lie under the same prefix.
            keys.digest(key).map(|digest| changed(digest, now_ms()))
        }
        // No keys: all of them.
        (PushKind::Invalidate, data) if !data.iter().any(|keys| matches!(keys, Value::Array(_))) => {
            Some(ChannelMessage::Everything)
        }
        _ => None,
    }
}

fn changed(digest: Digest, at_ms: u64) -> ChannelMessage {
    ChannelMessage::Changed(vec![Change { token: Named::Token(digest), at_ms }])
}

fn channel_message(payload: &str) -> ChannelMessage {
    let (first, rest) = payload.split_once(' ').unwrap_or((payload, ""));
    match (first, Digest::from_hex(first)) {
        ("*", _) => ChannelMessage::Everything,
        ("wait", _) if is_wait(rest) => ChannelMessage::Wait(rest.into()),
        (_, Some(digest)) => changed(digest, rest.trim().parse().unwrap_or_else(|_| now_ms())),
        _ => {
            // Somebody wants to tell something. Asking too much is the safe side.
            log::warn!(
                "redis: a message on the channel of changes can't be understood; all tokens are looked up again"
            );
            ChannelMessage::Everything
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

async fn bounded<T, E: From<StoreError>>(future: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    timeout(BEAT_ANSWER, future).await.unwrap_or(Err(StoreError::Timeout.into()))
}

/// Neither messages nor keyspace events tell of FLUSHALL and FLUSHDB, but the server tells every client whose keys it
/// tracks. Those of a prefix that nobody uses are tracked, so that nothing else is told.
async fn hear_of_flushes(mut link: RedisConnection, store: &RedisStore) -> Result<(), StoreError> {
    let mut track = redis::cmd("CLIENT");
    track.arg("TRACKING").arg("ON").arg("BCAST").arg("PREFIX").arg(store.keys.unused());
    match bounded(link.ask::<Value>(&track)).await {
        Err(error @ StoreError::Denied(_)) => {
            store.warnings.flushes.call_once(|| log::warn!("redis: FLUSHALL will not be heard of: {error}"));
            Ok(())
        }
        answer => answer.map(drop),
    }
}

/// What a server must tell of, for keyspace notifications: generic commands, strings, hashes, expiry and eviction.
pub const KEYSPACE_EVENTS: &str = "Kg$hxe";

/// Which of [`KEYSPACE_EVENTS`] a server's flags leave out. `A` stands for all kinds of events.
pub(super) fn missing_events(flags: &str) -> String {
    let has = |flag| flags.contains(flag);
    KEYSPACE_EVENTS.chars().filter(|flag| !has(*flag) && (*flag == 'K' || !has('A'))).collect()
}

/// Without the right ones nothing would ever be heard.
async fn check_notifications(link: &mut RedisConnection, warnings: &RedisWarnings) -> Result<(), StoreError> {
    let question = redis::cmd("CONFIG").arg("GET").arg("notify-keyspace-events").take();
    let flags: Vec<(String, String)> = match bounded(link.ask(&question)).await {
        Ok(answer) => answer,
        Err(StoreError::Denied(_)) => {
            warnings.notifications.call_once(|| {
                log::warn!(
                    "redis: whether notify-keyspace-events holds {KEYSPACE_EVENTS} can't be seen (+config|get): make sure"
                );
            });
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let flags = flags.first().map_or("", |(_, flags)| flags.as_str());
    let missing = missing_events(flags);
    match missing.as_str() {
        "" => return Ok(()),
        // A token that was evicted to make room was valid.
        "e" => {
            warnings.evictions.call_once(|| {
                log::warn!(
                    "redis: evicted keys are not told of: CONFIG SET notify-keyspace-events {KEYSPACE_EVENTS} (and in redis.conf)"
                );
            });
            return Ok(());
        }
        _ => {}
    }
    let what = format!(
        "the server does not tell of all changed keys: CONFIG SET notify-keyspace-events {KEYSPACE_EVENTS} (and in redis.conf)"
    );
    Err(StoreError::Unavailable(what))
}

/// The connections that messages arrive by.
struct Subscribed<'a> {
    store: &'a RedisStore,
    register: Arc<Register>,
    /// Of a cluster: its masters by their ids. There is one connection to each.
    masters: BTreeMap<String, Address>,
    ears: Vec<ServerEar>,
    may_ask_role: AtomicBool,
    may_ask_stats: AtomicBool,
    keyspace: bool,
}

#[async_trait]
impl Subscription for Subscribed<'_> {
    /// The name of a wait.
    type Wait = String;

    async fn beat(&self) -> Result<Option<Mark>, Loss> {
        self.check().await?;
        Ok(None)
    }

    async fn upkeep(&self) -> Result<Option<Coverage>, Loss> {
        if !self.keyspace {
            // The register lies where lookups are answered: that it can't be written says nothing of this connection.
            let _ = self.register.note().await;
        }
        for ear in &self.ears {
            self.count_evictions(ear).await;
        }
        Ok(None)
    }

    async fn confirm(&self, waits: &mut Vec<String>) -> Result<(), Loss> {
        if !self.masters.is_empty() {
            // What a new master published is behind none of the waits.
            bounded(self.check()).await?;
        }
        let mut again = Vec::new();
        for id in waits.drain(..) {
            if !self.register.confirm(&id).await {
                again.push(id);
            }
        }
        *waits = again;
        Ok(())
    }
}

impl Subscribed<'_> {
    /// Keys that the server removed to make room: valid tokens among them are unknown from then on. Whoever may not ask goes
    /// on without.
    async fn count_evictions(&self, ear: &ServerEar) {
        if !self.may_ask_stats.load(Ordering::Relaxed) {
            return;
        }
        let stats = bounded(ear.link.clone().ask::<String>(redis::cmd("INFO").arg("stats"))).await;
        match stats {
            Err(StoreError::Denied(_)) => self.may_ask_stats.store(false, Ordering::Relaxed),
            // That it does not answer is for the beats to say.
            Err(_) => {}
            Ok(stats) => {
                let evicted = stats.lines().find_map(|line| line.strip_prefix("evicted_keys:")?.trim().parse().ok());
                let Some(evicted) = evicted else { return };
                let before = ear.evicted.swap(evicted, Ordering::Relaxed);
                if before != NOT_COUNTED && evicted > before {
                    self.store.metrics.evicted(evicted - before);
                    self.store.warnings.evicted.call_once(|| {
                        log::error!(
                            "redis: {} evicts keys: valid tokens get 401. CONFIG SET maxmemory-policy noeviction (and in \
                             redis.conf), and raise maxmemory",
                            ear.address
                        );
                    });
                }
            }
        }
    }

    async fn check(&self) -> Result<(), Loss> {
        match self.ears.as_slice() {
            [ear] => Ok(self.check_one(ear).await?),
            ears => try_join_all(ears.iter().map(|ear| self.check_within(ear))).await.map(drop),
        }
    }

    /// The messages of other connections are no sign of life of this one.
    async fn check_within(&self, ear: &ServerEar) -> Result<(), Loss> {
        let mut answer = pin!(self.check_one(ear));
        let mut arrived = ear.arrived.load(Ordering::Relaxed);
        loop {
            if let Ok(answer) = timeout(BEAT_ANSWER, &mut answer).await {
                return answer.map_err(|error| error.at(&ear.address).into());
            }
            let by_now = ear.arrived.load(Ordering::Relaxed);
            if by_now == arrived {
                return Err(Loss::Silent { server: ear.address.to_string(), time: BEAT_ANSWER });
            }
            arrived = by_now;
        }
    }

    async fn check_one(&self, ear: &ServerEar) -> Result<(), StoreError> {
        let mut link = ear.link.clone();
        if self.may_ask_role.load(Ordering::Relaxed) {
            let asked = match self.store.connector.topology() {
                Topology::Cluster => self.cluster(ear).await,
                Topology::Single | Topology::Sentinel { .. } => self.role(ear).await,
            };
            match asked {
                Err(StoreError::Denied(_)) => self.may_ask_role.store(false, Ordering::Relaxed),
                Err(error) => return Err(error),
                Ok(()) => {}
            }
        }
        if !self.may_ask_role.load(Ordering::Relaxed) {
            match link.ask::<Value>(&redis::cmd("PING")).await {
                // A master that can't save refuses PING like a write (MISCONF). It hears and tells nevertheless.
                Ok(_) | Err(StoreError::ReadOnly(_)) => {}
                Err(error) => return Err(error),
            }
            if !self.masters.is_empty() {
                self.same_masters(ear).await?;
            }
        }
        if self.keyspace {
            check_notifications(&mut link, &self.store.warnings).await?;
        }
        Ok(())
    }

    async fn role(&self, ear: &ServerEar) -> Result<(), StoreError> {
        let mut link = ear.link.clone();
        let command = redis::cmd("ROLE");
        let sentinel = matches!(self.store.connector.topology(), Topology::Sentinel { .. });
        let named = async {
            // Not to be reached is no news; a master that was left behind by a split network doesn't know it.
            let asked = timeout(SENTINEL_ANSWER, self.store.connector.master());
            if sentinel { asked.await.ok().and_then(Result::ok) } else { None }
        };
        let (role, named) = tokio::join!(link.ask::<Vec<Value>>(&command), named);
        let role = role?;
        if named.is_some_and(|named| named != ear.address) {
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

    /// That the node is part of a whole cluster, and that messages arrive from all of its masters.
    async fn cluster(&self, ear: &ServerEar) -> Result<(), StoreError> {
        let info: String = ear.link.clone().ask(redis::cmd("CLUSTER").arg("INFO")).await?;
        if !info.lines().any(|line| line.trim() == "cluster_state:ok") {
            let what = "this node says that the cluster is down: see CLUSTER INFO";
            return Err(StoreError::Unavailable(what.into()));
        }
        // A failover, or a slot that found another master, changes one of these; the list of masters is longer.
        let tells = |line: &&str| {
            ["cluster_current_epoch:", "cluster_my_epoch:", "cluster_size:"].iter().any(|name| line.starts_with(name))
        };
        let layout: String = info.lines().filter(tells).collect();
        if *ear.layout.lock() != layout {
            self.same_masters(ear).await?;
            *ear.layout.lock() = layout;
        }
        Ok(())
    }

    async fn same_masters(&self, ear: &ServerEar) -> Result<(), StoreError> {
        let masters = masters_by(&mut ear.link.clone(), &ear.address).await?;
        match masters.keys().eq(self.masters.keys()) {
            true => Ok(()),
            false => Err(StoreError::Unavailable("the cluster has other masters than before".into())),
        }
    }
}

/// This gateway's place among those that others wait for.
struct Register {
    pool: Arc<RedisPool>,
    keys: Keys,
    name: String,
    warnings: Arc<RedisWarnings>,
    /// Whether this gateway enters itself.
    is_open: bool,
    metrics: Arc<StoreMetrics>,
}

/// Warnings that a store logs once, although their cause may be found again and again; a new cause is a new warning.
#[derive(Default)]
pub(super) struct RedisWarnings {
    flushes: Once,
    notifications: Once,
    /// That evictions are not told of.
    evictions: Once,
    /// That there are some.
    evicted: Once,
    /// Why the register could not be written last.
    register: Mutex<Option<StoreError>>,
}

impl Register {
    fn new(store: &RedisStore) -> Self {
        // Two generations of a configuration may follow at once: each confirms for itself.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("{}/{}", replica_name(), COUNT.fetch_add(1, Ordering::Relaxed));
        Self {
            pool: Arc::clone(&store.pool),
            keys: store.keys.clone(),
            name,
            warnings: Arc::clone(&store.warnings),
            is_open: !store.is_unregistered.load(Ordering::Relaxed),
            metrics: Arc::clone(&store.metrics),
        }
    }

    async fn now(&self) -> Result<u64, StoreError> {
        let mut pipe = redis::Pipeline::new();
        pipe.cmd("TIME");
        let ((seconds, micros),): ((u64, u64),) = self.pool.ask(&pipe).await?;
        Ok(seconds * 1000 + micros / 1000)
    }

    /// Enters this gateway. One that may not write goes on without; one that can't at the moment does not.
    async fn note(&self) -> Result<(), StoreError> {
        if !self.is_open {
            return Ok(());
        }
        let entered = async {
            let now = self.now().await?;
            let mut pipe = redis::Pipeline::new();
            pipe.cmd("ZADD").arg(self.keys.replicas()).arg(now).arg(&self.name);
            self.pool.ask::<Value>(&pipe).await
        };
        let entered = timeout(REGISTER, entered).await.unwrap_or(Err(StoreError::Timeout));
        match &entered {
            Ok(_) => self.metrics.writable(Some(true)),
            // That says nothing of those who may, or of the master.
            Err(StoreError::Denied(_)) => self.metrics.writable(None),
            Err(StoreError::ReadOnly(why)) if why == READ_ONLY_REPLICA => self.metrics.writable(None),
            Err(StoreError::ReadOnly(_)) => self.metrics.writable(Some(false)),
            Err(_) => {}
        }
        match entered {
            Ok(_) => {
                *self.warnings.register.lock() = None;
                Ok(())
            }
            // Whoever can read and subscribe hears. A server that takes no writes takes none of those who wait either.
            Err(error @ (StoreError::Denied(_) | StoreError::ReadOnly(_))) => {
                let mut said = self.warnings.register.lock();
                if said.as_ref() != Some(&error) {
                    log::warn!("redis: this gateway can't register, so `--wait` won't wait for it: {error}");
                    *said = Some(error);
                }
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Says that this gateway has taken in all that was told before. `false`: to be tried again.
    async fn confirm(&self, wait: &str) -> bool {
        if !self.is_open {
            return true;
        }
        let key = self.keys.confirmed(wait);
        let mut pipe = redis::Pipeline::new();
        pipe.cmd("SADD").arg(&key).arg(&self.name).cmd("EXPIRE").arg(&key).arg(WAIT_KEPT.as_secs());
        match timeout(REGISTER, self.pool.ask::<Value>(&pipe)).await {
            Err(_) => false,
            Ok(Err(error)) => matches!(error, StoreError::Denied(_)),
            Ok(Ok(_)) => true,
        }
    }

    /// What others wait for. One that may not know goes on without.
    async fn outstanding(&self) -> Result<Vec<String>, StoreError> {
        let asked = async {
            let since = self.now().await?.saturating_sub(u64::try_from(WAIT_KEPT.as_millis()).unwrap_or(u64::MAX));
            let mut pipe = redis::Pipeline::new();
            pipe.cmd("ZRANGEBYSCORE").arg(self.keys.waits()).arg(since).arg("+inf");
            self.pool.ask::<(Vec<String>,)>(&pipe).await
        };
        match timeout(REGISTER, asked).await.unwrap_or(Err(StoreError::Timeout)) {
            Ok((waits,)) => Ok(waits.into_iter().filter(|id| is_wait(id)).collect()),
            Err(StoreError::Denied(_)) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Takes its leave, so that nobody waits [`REPLICA_GONE`] for a gateway that has been told to go.
    fn sign_off(&self) {
        if !self.is_open {
            return;
        }
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
        assert!(
            matches!(channel_message(&hex), ChannelMessage::Changed(changes) if changes[0].token == Named::Token(digest))
        );
        assert_eq!(channel_message("*"), ChannelMessage::Everything);
        assert_eq!(channel_message("wait abc123"), ChannelMessage::Wait("abc123".into()));
        for doubtful in ["", "wait ", "wait a:b", "revoked!", &hex[1..]] {
            assert_eq!(channel_message(doubtful), ChannelMessage::Everything, "{doubtful}");
        }
    }

    #[test]
    fn a_wait_is_whole_when_every_connection_brought_it() {
        let gathering = Gathering::of(3);
        assert_eq!([0, 0, 1, 1, 0].map(|connection| gathering.is_whole(connection, "a")), [false; 5], "one is missing");
        assert!(!gathering.is_whole(2, "b"), "that is another one");
        assert!(gathering.is_whole(2, "a"));
        assert!(!gathering.is_whole(2, "a"), "it begins anew");
        for number in 0..2 * GATHERED {
            assert!(!gathering.is_whole(0, &format!("flood{number}")));
        }
        assert_eq!(gathering.waits.lock().len(), GATHERED);
        assert!(Gathering::of(1).is_whole(0, "a"), "one server");
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
        assert!(matches!(message(push(&keys.token(&digest)), &keys), Some(ChannelMessage::Changed(_))));
        for other in
            [keys.replicas(), keys.waits(), keys.confirmed("a"), keys.token(&digest).to_uppercase(), digest.to_hex()]
        {
            assert_eq!(message(push(&other), &keys), None, "{other}");
        }
        assert_eq!(keys.pattern("ab"), r"a\[\*\]:ab*");
    }
}
