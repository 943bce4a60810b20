//! The one store of a simulated fleet, and the link of each gateway to it: slow, silent, refused or cut, as a plan says. What
//! follows changes is the product's own driver ([`feed`]); only what is on the wire is simulated. Time is the simulation's. It
//! must not know what is promised: it says what was asked when.

use super::credential::{Credential, Digest};
use super::feed::{self, Begun, ChangeSource, Inbox, Loss, Message, Pace, Subscription};
use super::{Change, Heard, LookupLimits, Mark, Named, StoreError, TokenRecord, TokenStore};
use crate::clock::Now;
use async_trait::async_trait;
use parking_lot::Mutex;
use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, timeout};

/// As PostgreSQL's: src/store/postgres/follow.rs.
const PACE: Pace = Pace { beat: Duration::from_millis(300), silence: Some(Duration::from_millis(500)), upkeep: None };
/// How long a session may take to begin.
const BEGINS: Duration = Duration::from_millis(500);
/// One way, of a link that is well.
const LATENCY_MS: u64 = 8;

/// The clocks of one gateway.
#[derive(Clone, Copy)]
pub(crate) struct SimClock {
    /// Of its runtime, when its process began.
    pub(crate) start: Instant,
    /// The same in the simulation's time.
    pub(crate) booted: u64,
    pub(crate) mono_offset: u64,
    pub(crate) unix_offset: u64,
}

thread_local! {
    /// Of the gateway that runs at the moment: one at a time on a thread.
    static RUNNING: Cell<Option<SimClock>> = const { Cell::new(None) };
}

pub(crate) fn run_by(clock: SimClock) {
    RUNNING.set(Some(clock));
}

/// Milliseconds of the simulation, as the gateway that runs has lived through them.
pub(crate) fn world_ms() -> u64 {
    let clock = RUNNING.get().unwrap();
    clock.booted + (Instant::now() - clock.start).as_millis() as u64
}

pub(crate) fn clock() -> Now {
    let (clock, world) = (RUNNING.get().unwrap(), world_ms());
    Now { mono_ms: world + clock.mono_offset, unix_ms: world + clock.unix_offset }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LinkFault {
    /// Connections end, and new ones are refused.
    Refused,
    /// Nothing arrives on either side until it is over; then all of it does.
    Silent,
    /// Each way takes up to so many milliseconds.
    Slow(u64),
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct FaultTime {
    pub(crate) from: u64,
    pub(crate) until: u64,
    pub(crate) fault: LinkFault,
}

type Reply = oneshot::Sender<Result<Option<TokenRecord>, StoreError>>;

/// What is on its way.
enum Transit {
    Lookup(Digest, Reply),
    Begin(Arc<Wire>, oneshot::Sender<()>),
    Ping(Arc<Wire>, u64),
    Answer(Reply, Result<Option<TokenRecord>, StoreError>),
    HasBegun(oneshot::Sender<()>),
    Frame(Arc<Wire>, Frame),
}

enum Frame {
    Changed(Change),
    Pong(u64),
    Closed,
}

/// The gateway's end of the connection that changes arrive on.
#[derive(Default)]
pub(crate) struct Wire {
    arrived: Mutex<VecDeque<Frame>>,
    more: Notify,
    /// What is on its way gets lost.
    dead: AtomicBool,
    pings: AtomicU64,
    pongs: Mutex<BTreeMap<u64, oneshot::Sender<()>>>,
}

impl Wire {
    fn arrive(&self, frame: Frame) {
        self.arrived.lock().push_back(frame);
        self.more.notify_one();
    }

    async fn read(self: Arc<Self>, inbox: Inbox<()>) -> Loss {
        loop {
            let more = self.more.notified();
            let frames = std::mem::take(&mut *self.arrived.lock());
            for frame in frames {
                match frame {
                    Frame::Changed(change) => inbox.put(Message::Changed(vec![change])),
                    Frame::Pong(number) => {
                        let asked = self.pongs.lock().remove(&number);
                        let _ = asked.map(|asked| asked.send(()));
                    }
                    Frame::Closed => return Loss::Closed,
                }
            }
            more.await;
        }
    }
}

#[derive(Default)]
struct StoreLink {
    faults: Vec<FaultTime>,
    held: Vec<Transit>,
    session: Option<Arc<Wire>>,
    /// When the last frame arrives: they keep their order.
    frames_until: u64,
    /// Lookups in progress, by token.
    in_progress: HashMap<Digest, usize>,
}

impl StoreLink {
    fn fault(&self, now: u64) -> Option<LinkFault> {
        let active = || self.faults.iter().filter(|time| (time.from..time.until).contains(&now)).map(|time| time.fault);
        let first = |wanted: LinkFault| active().find(|fault| *fault == wanted);
        first(LinkFault::Refused).or_else(|| first(LinkFault::Silent)).or_else(|| active().next())
    }
}

/// A lookup that the store was asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AskedLookup {
    pub(crate) replica: usize,
    pub(crate) digest: Digest,
    pub(crate) at: u64,
    /// Of the same gateway and token, this one included.
    pub(crate) in_progress: usize,
}

/// A token, and what became of it.
pub(crate) struct SimToken {
    pub(crate) digest: Digest,
    /// Since when it is valid, or not.
    pub(crate) history: Vec<(u64, bool)>,
}

impl SimToken {
    pub(crate) fn at(&self, time: u64) -> (u64, bool) {
        self.history.iter().rev().find(|(since, _)| *since <= time).copied().unwrap_or((0, false))
    }
}

struct Central {
    now: u64,
    random: fastrand::Rng,
    order: u64,
    transit: BTreeMap<(u64, u64), (usize, Transit)>,
    links: Vec<StoreLink>,
    tokens: Vec<SimToken>,
    places: HashMap<Digest, usize>,
    asked: Vec<AskedLookup>,
}

/// The store's server.
pub(crate) struct CentralStore(Mutex<Central>);

impl CentralStore {
    pub(crate) fn new(seed: u64, tokens: Vec<(Digest, bool)>, faults: Vec<Vec<FaultTime>>) -> Arc<Self> {
        let places = tokens.iter().enumerate().map(|(place, (digest, _))| (*digest, place)).collect();
        let token = |(digest, valid)| SimToken { digest, history: vec![(0, valid)] };
        let link = |faults| StoreLink { faults, ..StoreLink::default() };
        Arc::new(Self(Mutex::new(Central {
            now: 0,
            random: fastrand::Rng::with_seed(seed),
            order: 0,
            transit: BTreeMap::new(),
            links: faults.into_iter().map(link).collect(),
            tokens: tokens.into_iter().map(token).collect(),
            places,
            asked: Vec::new(),
        })))
    }

    /// Goes on to this time: what has arrived by then is done.
    pub(crate) fn step(&self, now: u64) {
        self.0.lock().step(now);
    }

    /// Makes a token valid, or not, and tells all who listen.
    pub(crate) fn commit(&self, token: usize, valid: bool) {
        self.0.lock().commit(token, valid);
    }

    /// Takes back what was written since a time, without telling anybody, as a standby does that did not get it.
    pub(crate) fn lose_writes(&self, since: u64) -> usize {
        let mut central = self.0.lock();
        let now = central.now;
        let mut lost = 0;
        for token in &mut central.tokens {
            let (is, was) = (token.at(now).1, token.at(since).1);
            if is != was {
                token.history.push((now, was));
                lost += 1;
            }
        }
        lost
    }

    /// Ends the connection that changes arrive on, and what is on its way is lost. `told`: the gateway's end learns of it.
    pub(crate) fn cut(&self, replica: usize, told: bool) {
        self.0.lock().cut(replica, told);
    }

    pub(crate) fn with_token<T>(&self, token: usize, look: impl FnOnce(&SimToken) -> T) -> T {
        look(&self.0.lock().tokens[token])
    }

    /// What was asked since the last call.
    pub(crate) fn take_asked(&self) -> Vec<AskedLookup> {
        std::mem::take(&mut self.0.lock().asked)
    }

    fn send(&self, replica: usize, what: Transit) {
        let mut central = self.0.lock();
        let due = central.now + central.latency(replica);
        central.travel(due, replica, what);
    }

    /// Counts a lookup as in progress until this is dropped.
    fn asks(self: &Arc<Self>, replica: usize, digest: Digest) -> InProgress {
        let mut central = self.0.lock();
        let count = central.links[replica].in_progress.entry(digest).or_default();
        *count += 1;
        let (in_progress, at) = (*count, central.now);
        central.asked.push(AskedLookup { replica, digest, at, in_progress });
        InProgress { central: Arc::clone(self), replica, digest }
    }
}

struct InProgress {
    central: Arc<CentralStore>,
    replica: usize,
    digest: Digest,
}

impl Drop for InProgress {
    fn drop(&mut self) {
        let mut central = self.central.0.lock();
        if let Some(count) = central.links[self.replica].in_progress.get_mut(&self.digest) {
            *count -= 1;
        }
    }
}

impl Central {
    fn latency(&mut self, replica: usize) -> u64 {
        let most = match self.links[replica].fault(self.now) {
            Some(LinkFault::Slow(most)) => most,
            _ => LATENCY_MS,
        };
        self.random.u64(1..=most.max(1))
    }

    fn travel(&mut self, due: u64, replica: usize, what: Transit) {
        self.order += 1;
        self.transit.insert((due, self.order), (replica, what));
    }

    fn step(&mut self, now: u64) {
        self.now = now;
        for replica in 0..self.links.len() {
            match self.links[replica].fault(now) {
                Some(LinkFault::Silent) => {}
                Some(LinkFault::Refused) => {
                    self.links[replica].held.clear();
                    self.cut(replica, true);
                }
                _ => {
                    for what in std::mem::take(&mut self.links[replica].held) {
                        self.travel(now, replica, what);
                    }
                }
            }
        }
        while let Some(first) = self.transit.first_entry()
            && first.key().0 <= now
        {
            let (replica, what) = first.remove();
            match self.links[replica].fault(now) {
                Some(LinkFault::Silent) => self.links[replica].held.push(what),
                Some(LinkFault::Refused) => self.refuse(what),
                _ => self.arrive(replica, what),
            }
        }
    }

    fn refuse(&mut self, what: Transit) {
        if let Transit::Lookup(_, reply) | Transit::Answer(reply, _) = what {
            let _ = reply.send(Err(StoreError::Unavailable("connection refused".into())));
        }
    }

    fn arrive(&mut self, replica: usize, what: Transit) {
        match what {
            Transit::Lookup(digest, reply) => {
                let answer = match self.places.get(&digest).map(|place| self.tokens[*place].at(self.now).1) {
                    Some(true) => Ok(Some(TokenRecord::new(digest, digest.to_hex()))),
                    Some(false) => Ok(Some(TokenRecord { revoked: Some(1), ..TokenRecord::new(digest, "revoked") })),
                    None => Ok(None),
                };
                let due = self.now + self.latency(replica);
                self.travel(due, replica, Transit::Answer(reply, answer));
            }
            Transit::Answer(reply, answer) => {
                let _ = reply.send(answer);
            }
            Transit::Begin(wire, reply) => {
                self.links[replica].session = Some(wire);
                let due = self.now + self.latency(replica);
                self.travel(due, replica, Transit::HasBegun(reply));
            }
            Transit::HasBegun(reply) => {
                let _ = reply.send(());
            }
            Transit::Ping(wire, number) => {
                let is_open = self.links[replica].session.as_ref().is_some_and(|open| Arc::ptr_eq(open, &wire));
                if is_open {
                    self.tell(replica, wire, Frame::Pong(number));
                }
            }
            Transit::Frame(wire, frame) => {
                if !wire.dead.load(SeqCst) {
                    wire.arrive(frame);
                }
            }
        }
    }

    /// Behind all that was told before.
    fn tell(&mut self, replica: usize, wire: Arc<Wire>, frame: Frame) {
        let due = (self.now + self.latency(replica)).max(self.links[replica].frames_until);
        self.links[replica].frames_until = due;
        self.travel(due, replica, Transit::Frame(wire, frame));
    }

    fn commit(&mut self, token: usize, valid: bool) {
        let (now, digest) = (self.now, self.tokens[token].digest);
        self.tokens[token].history.push((now, valid));
        for replica in 0..self.links.len() {
            if let Some(wire) = self.links[replica].session.clone() {
                let change = Change { token: Named::Token(digest), at_ms: now };
                self.tell(replica, wire, Frame::Changed(change));
            }
        }
    }

    fn cut(&mut self, replica: usize, told: bool) {
        if let Some(wire) = self.links[replica].session.take() {
            wire.dead.store(true, SeqCst);
            if told {
                wire.arrive(Frame::Closed);
            }
        }
    }
}

/// The store as one gateway sees it.
pub(crate) struct LinkedStore {
    pub(crate) central: Arc<CentralStore>,
    pub(crate) replica: usize,
    pub(crate) tells_changes: bool,
}

#[async_trait]
impl TokenStore for LinkedStore {
    fn lookup_limits(&self) -> LookupLimits {
        LookupLimits { at_once: 4, tokens: 16 }
    }

    async fn lookup(&self, credential: &Credential) -> Result<Option<TokenRecord>, StoreError> {
        let _counted = self.central.asks(self.replica, *credential.digest());
        let (reply, answer) = oneshot::channel();
        self.central.send(self.replica, Transit::Lookup(*credential.digest(), reply));
        answer.await.unwrap_or_else(|_| Err(StoreError::Unavailable("the connection was closed".into())))
    }

    fn tells_changes(&self) -> bool {
        self.tells_changes
    }

    async fn follow(&self, heard: Heard<'_>) {
        match self.tells_changes {
            true => {
                let source = LinkedChanges { central: Arc::clone(&self.central), replica: self.replica };
                feed::follow(source, clock, heard).await;
            }
            false => std::future::pending().await,
        }
    }
}

struct LinkedChanges {
    central: Arc<CentralStore>,
    replica: usize,
}

#[async_trait]
impl ChangeSource for LinkedChanges {
    type Subscription = LinkedSubscription;

    fn label(&self) -> String {
        "simulated".into()
    }

    fn pace(&self) -> Pace {
        PACE
    }

    async fn begin(&mut self, inbox: Inbox<()>) -> Result<Begun<LinkedSubscription>, Loss> {
        let wire = Arc::<Wire>::default();
        let (reply, begun) = oneshot::channel();
        self.central.send(self.replica, Transit::Begin(Arc::clone(&wire), reply));
        match timeout(BEGINS, begun).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err(Loss::Closed),
            Err(_) => return Err(StoreError::Timeout.into()),
        }
        let reading = Box::pin(Arc::clone(&wire).read(inbox));
        let (central, replica) = (Arc::clone(&self.central), self.replica);
        Ok(Begun { reading, ..Begun::new(LinkedSubscription { central, replica, wire }) })
    }
}

struct LinkedSubscription {
    central: Arc<CentralStore>,
    replica: usize,
    wire: Arc<Wire>,
}

#[async_trait]
impl Subscription for LinkedSubscription {
    type Wait = ();

    async fn beat(&self) -> Result<Option<Mark>, Loss> {
        let number = self.wire.pings.fetch_add(1, SeqCst);
        let (reply, pong) = oneshot::channel();
        self.wire.pongs.lock().insert(number, reply);
        self.central.send(self.replica, Transit::Ping(Arc::clone(&self.wire), number));
        pong.await.map(|()| None).map_err(|_| Loss::Closed)
    }
}
