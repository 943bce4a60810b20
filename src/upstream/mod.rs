//! WHO SERVES. The servers behind each `[[upstream]]`: which one is next, and how they have been doing. Pure: no socket, no
//! name resolution, no clock of its own. A server's state outlives every reload that keeps the server. It must not know
//! what is asked of a server, nor by which connection.
//!
//! A lane calls [`Upstream::pick`] for each try of a request, then [`Upstream::answered`] or [`Upstream::failed`], which says
//! whether to pick again. What is done in the background is said by [`Upstream::looks`] and [`Upstream::names`].

mod adaptive;
mod budget;
mod callers;
mod check;
mod queue;
mod ring;
mod roster;
mod server;
mod tls;
mod tries;

pub use adaptive::AdaptiveBounds;
pub use budget::RetryLimits;
pub use check::{CheckFault, CheckSettings, HttpCheck, verdict};
pub use ring::HashBy;
pub use roster::Member;
pub use server::{DownReason, Look, Server, ServerChange, ServerState};
pub use tls::UpstreamTls;
pub use tries::{FailedTry, Tries};

use crate::problem::{Problem, socket_path_too_long};
use crate::telemetry::metrics::{AdaptiveReading, Metrics, UpstreamError, UpstreamMetrics};
use crate::telemetry::outage::{Outage, Recovery};
use arc_swap::ArcSwap;
use budget::RetryBudget;
use callers::Callers;
use parking_lot::Mutex;
use queue::{Queue, QueueTurn};
use ring::{KeyHash, Ring};
use roster::{Roster, RosterRules};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

/// One `[[upstream]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamSettings {
    pub name: String,
    pub servers: Vec<ListedServer>,
    /// Each address of a name is a server.
    pub expand: bool,
    pub balance: Balance,
    /// How long a server that comes back gets less than its weight.
    pub slow_start: Option<Duration>,
    /// Most requests in flight to one server.
    pub max_requests: Option<MaxRequests>,
    /// Most requests that wait for a server with room, and for how long.
    pub queue: usize,
    pub queue_order: QueueOrder,
    pub queue_timeout: Duration,
    /// How often names are resolved again.
    pub resolve_interval: Duration,
    pub check: Option<CheckSettings>,
    /// Responses that count as failures of their server: these statuses, and those that took so long to begin.
    pub failure_statuses: Vec<u16>,
    pub failure_latency: Option<Duration>,
    /// With fewer servers up than these of a hundred, all are used.
    pub panic_below: u64,
    /// How often requests are sent again. `None`: as often as their tries fail.
    pub retries: Option<RetryLimits>,
    pub connect_timeout: Duration,
    pub read_timeout: Duration,
    /// To the first byte of a response, and to the end of the exchange.
    pub per_try_timeout: Option<Duration>,
    pub request_timeout: Option<Duration>,
    /// How long an unused connection is kept; below the backend's own keep-alive time.
    pub idle_timeout: Duration,
    /// `None`: plain text.
    pub tls: Option<UpstreamTls>,
    /// HTTP/2, and not HTTP/1.
    pub http2: bool,
    /// Each connection begins with the client's address.
    pub send_proxy: bool,
}

impl UpstreamSettings {
    /// Keys of an `[[upstream]]`.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.name.is_empty() {
            problems.push(Problem::error("name", "is empty", "write it like \"api\""));
        }
        if self.servers.is_empty() {
            problems.push(Problem::error("servers", "is empty", "write it like [\"127.0.0.1:3000\"]"));
        }
        if !self.servers.is_empty() && self.servers.iter().all(|server| server.backup) {
            let instead = "remove `backup = true` from those that are to serve";
            problems.push(Problem::error("servers", "has backups only", instead));
        }
        for (index, server) in self.servers.iter().enumerate() {
            if let ServerAddress::Unix(path) = &server.address
                && let Some(what) = socket_path_too_long(path)
            {
                problems.push(Problem::error("servers", what, "use a shorter path").element(index));
            }
            let weight = Problem::out_of_range("servers", server.weight.into(), 1..=MAX_WEIGHT);
            problems.extend(
                weight.map(|problem| Problem { what: "has a weight out of range".into(), ..problem }.element(index)),
            );
        }
        if let Some(time) = self.slow_start {
            problems.extend(Problem::too_short("slow_start", time, Duration::from_secs(1)));
            if let Balance::Hash(_) = self.balance {
                let what = "does not go with balance = \"hash\": a key belongs to its server at once";
                problems.push(Problem::error("slow_start", what, "use \"none\"").with("balance"));
            }
        }
        problems.extend(self.max_requests.iter().flat_map(|most| most.problems()));
        problems.extend(Problem::out_of_range("queue", self.queue as u64, 0..=100_000));
        let least = Duration::from_millis(1);
        problems.extend(Problem::too_short("queue_timeout", self.queue_timeout, least));
        problems.extend(Problem::too_short("connect_timeout", self.connect_timeout, least));
        problems.extend(Problem::too_short("read_timeout", self.read_timeout, least));
        for (key, time) in [("per_try_timeout", self.per_try_timeout), ("request_timeout", self.request_timeout)] {
            problems.extend(time.and_then(|time| Problem::too_short(key, time, least)));
        }
        if let Some(time) = self.per_try_timeout
            && time >= self.read_timeout
        {
            let what = "is not below read_timeout, which ends a try before it";
            problems
                .push(Problem::error("per_try_timeout", what, "use a shorter time, or \"none\"").with("read_timeout"));
        }
        if let Some(retries) = self.retries {
            problems.extend(Problem::out_of_range("retry_floor", retries.floor.into(), 0..=10_000));
        }
        problems.extend(Problem::too_short("resolve_interval", self.resolve_interval, Duration::from_secs(1)));
        problems.extend(self.check.iter().flat_map(CheckSettings::problems));
        problems.extend(self.tls.iter().flat_map(|tls| tls.problems(&self.servers)));
        problems.extend(Problem::out_of_range("panic_below", self.panic_below, 0..=100));
        for (index, status) in self.failure_statuses.iter().enumerate() {
            let problem = Problem::out_of_range("failure_statuses", (*status).into(), 400..=599);
            problems.extend(problem.map(|problem| problem.element(index)));
        }
        problems
    }

    /// The names that have to be resolved.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.servers.iter().filter_map(|server| server.address.name())
    }

    fn roster_rules(&self) -> RosterRules {
        RosterRules { panic_below: self.panic_below, slow_start: self.slow_start }
    }

    /// Whether one pool can serve by both: they differ in nothing but times and what is spoken, which belong to a connection.
    fn same_pool(&self, other: &Self) -> bool {
        let Self { connect_timeout, read_timeout, per_try_timeout, request_timeout, .. } = *self;
        let Self { idle_timeout, queue_timeout, http2, send_proxy, .. } = *self;
        let times = Self { connect_timeout, read_timeout, per_try_timeout, request_timeout, ..other.clone() };
        *self == Self { idle_timeout, queue_timeout, http2, send_proxy, tls: self.tls.clone(), ..times }
    }
}

/// How many requests a server may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MaxRequests {
    /// To the end of their responses.
    Fixed(u32),
    /// As many as it answers without a queue of its own, to the heads of their responses.
    Adaptive(AdaptiveBounds),
}

impl MaxRequests {
    fn problems(self) -> Option<Problem> {
        let (least, most) = match self {
            Self::Fixed(most) => (most, most),
            Self::Adaptive(AdaptiveBounds { least, most }) => (least, most),
        };
        if least > most {
            let instead = "make least the smaller one";
            return Some(Problem::error("max_requests", "has a least number above the most", instead));
        }
        let out_of_range = |number: u32| Problem::out_of_range("max_requests", number.into(), 1..=1_000_000);
        out_of_range(least).or_else(|| out_of_range(most))
    }
}

/// Which of the requests that wait is next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum QueueOrder {
    /// Of the caller who asks least; among equals, the one that came first.
    #[default]
    Fair,
    Arrival,
}

/// An entry of the configuration's list of servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedServer {
    pub address: ServerAddress,
    /// Its part of the requests, beside the weights of the others.
    pub weight: u32,
    /// It gets requests only while no other is up.
    pub backup: bool,
}

/// Weights are compared with each other, so that more would not mean more.
const MAX_WEIGHT: u64 = 100;

/// How the server of a request is chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Balance {
    RoundRobin,
    /// Of two at random, the one with fewer requests in flight for its weight.
    LeastRequests,
    /// The one that the request's key belongs to. Requests without the key take turns.
    Hash(HashBy),
}

/// A server as the configuration names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ServerAddress {
    /// `host:port`.
    Tcp(String),
    /// A path.
    Unix(String),
}

impl ServerAddress {
    /// The host name that has to be resolved, with its port. `None`: there is nothing to resolve.
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Tcp(address) if address.parse::<SocketAddr>().is_err() => Some(address),
            _ => None,
        }
    }

    /// The host, if it is a name.
    pub fn host_name(&self) -> Option<&str> {
        self.name()?.rsplit_once(':').map(|(host, _)| host)
    }
}

impl fmt::Display for ServerAddress {
    /// As the configuration writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{path}"),
        }
    }
}

/// The addresses of a server's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedName {
    pub name: String,
    /// In the order in which they are to be tried. None: the name cannot be resolved.
    pub addresses: Vec<SocketAddr>,
}

/// Where a try goes.
pub struct Pick {
    pub server: Arc<Server>,
    /// On a connection that has carried nothing yet.
    pub fresh: bool,
}

/// Why there is no server for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoServer {
    /// None that it has not tried.
    Absent,
    /// Each that it could go to has as many requests as it may have.
    Busy,
    /// The same, and so many are waiting, of callers who ask no more than this one.
    QueueFull,
    /// It has waited for too long.
    QueueTimeout,
}

/// What is to be done about a failed try.
#[derive(Debug, PartialEq, Eq)]
pub struct AfterFailure {
    /// [`Upstream::pick`] has another server.
    pub again: bool,
    /// There would be another try if there were another server.
    pub exhausted: bool,
    /// To be logged.
    pub change: Option<ServerChange>,
}

/// The servers of one `[[upstream]]` and their state.
pub struct Upstream {
    settings: UpstreamSettings,
    hash: KeyHash,
    queue: Arc<Queue>,
    callers: Arc<Callers>,
    budget: Arc<RetryBudget>,
    roster: ArcSwap<Roster>,
    turn: AtomicUsize,
    answers: AtomicU64,
    outage: Outage,
    metrics: Arc<Metrics>,
    series: UpstreamMetrics,
    names: Mutex<KnownNames>,
}

/// What is known of names.
#[derive(Default)]
struct KnownNames {
    known: Vec<ResolvedName>,
    /// When they are to be resolved again.
    due: Option<Instant>,
}

impl Upstream {
    /// `names`: what the names of the servers were resolved to. `running`: the pool whose place this one takes, if there is
    /// one; it goes on itself if only times changed, and else hands over the state of its servers.
    pub fn build(
        settings: &UpstreamSettings,
        names: Vec<ResolvedName>,
        running: Option<&Arc<Self>>,
        metrics: &Arc<Metrics>,
        now: Instant,
    ) -> (Arc<Self>, Vec<ServerChange>) {
        let upstream = match running {
            Some(running) if running.settings.same_pool(settings) => Arc::clone(running),
            _ => Arc::new(Self {
                settings: settings.clone(),
                hash: KeyHash::of_pool(&settings.name),
                queue: running.map_or_else(Arc::default, |running| Arc::clone(&running.queue)),
                callers: running.map_or_else(|| Arc::new(Callers::new(now)), |running| Arc::clone(&running.callers)),
                // Its servers are found by `resolved`, which takes over those that it knows.
                roster: ArcSwap::from_pointee(Roster::of(
                    running.map_or_else(Vec::new, |running| running.members()),
                    None,
                    settings.roster_rules(),
                    now,
                )),
                // The budget counts on.
                budget: running.map_or_else(Arc::default, |running| Arc::clone(&running.budget)),
                turn: AtomicUsize::new(running.map_or(0, |running| running.turn.load(Ordering::Relaxed))),
                // Those of the pool before may have been many.
                answers: AtomicU64::new(running.map_or(0, |running| running.answers.load(Ordering::Relaxed))),
                outage: Outage::default(),
                metrics: Arc::clone(metrics),
                series: metrics.upstream(&settings.name),
                names: Mutex::default(),
            }),
        };
        let changes = upstream.resolved(names, now);
        (upstream, changes)
    }

    pub fn name(&self) -> &str {
        &self.settings.name
    }

    pub fn check(&self) -> Option<&CheckSettings> {
        self.settings.check.as_ref()
    }

    pub fn members(&self) -> Vec<Member> {
        self.roster.load().members.clone()
    }

    /// Whether any server is up.
    pub fn is_up(&self) -> bool {
        self.roster.load().members.iter().any(|member| member.server.is_up())
    }

    /// A request for this pool, which is a canary, went to the main one for want of a server.
    pub fn passed_on(&self) {
        self.series.passed_on();
    }

    /// What a request's server is chosen by, if that is a part of the request.
    pub fn hash_by(&self) -> Option<&HashBy> {
        match &self.settings.balance {
            Balance::Hash(by) => Some(by),
            Balance::RoundRobin | Balance::LeastRequests => None,
        }
    }

    /// Where a key stands, for [`Tries::keyed`].
    pub fn key_of(&self, text: &[u8]) -> u64 {
        self.hash.of(text)
    }

    /// Whether it matters who asks: [`Tries::called_by`] is for these pools alone.
    pub fn ranks_callers(&self) -> bool {
        self.settings.max_requests.is_some() && self.settings.queue_order == QueueOrder::Fair
    }

    /// Whether it matters which requests are samples of how long a server takes: see [`Tries::streams_body`].
    pub fn is_adaptive(&self) -> bool {
        self.adaptive_bounds().is_some()
    }

    fn adaptive_bounds(&self) -> Option<AdaptiveBounds> {
        match self.settings.max_requests {
            Some(MaxRequests::Adaptive(bounds)) => Some(bounds),
            Some(MaxRequests::Fixed(_)) | None => None,
        }
    }

    /// The server for the next try of a request. A request tries no server twice, but for a kept connection that was dead.
    /// Servers that are down come last: a pool is never given up while one of its servers has not been tried.
    pub fn pick(&self, tries: &mut Tries, now: Instant) -> Result<Pick, NoServer> {
        if let Some(server) = tries.once_more() {
            tries.begin(Arc::clone(&server), now);
            self.series.retried();
            return Ok(Pick { server, fresh: true });
        }
        if self.ranks_callers() && tries.count() == 0 && !tries.is_queued() {
            tries.ranked(self.callers.asks(tries.caller(), tries.weight(), now));
        }
        // Nobody overtakes those that wait.
        if self.settings.max_requests.is_some() && !tries.is_queued() && self.queue.waiting() > 0 {
            return Err(NoServer::Busy);
        }
        let roster = self.roster.load();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        // The common case: the first try, and the next one in turn is well.
        let next = match self.settings.balance {
            Balance::RoundRobin if tries.count() == 0 && !roster.panics => roster.in_turn(turn).next(),
            _ => None,
        };
        let server = match next.map(|member| &member.server) {
            Some(server) if server.is_up() && server.has_room(1) && server.takes(self.settings.max_requests) => {
                Arc::clone(server)
            }
            _ => self.take_chosen(&roster, tries, turn)?,
        };
        if tries.count() > 0 {
            self.series.retried();
        }
        tries.awaits_head(self.adaptive_bounds());
        tries.begin(Arc::clone(&server), now);
        Ok(Pick { server, fresh: false })
    }

    /// The same for a request that found all servers busy: it waits in the queue, and `waker` is called when it is its turn. If it
    /// gives up, [`Tries::leave_queue`] says so.
    pub fn poll_pick(&self, tries: &mut Tries, waker: &Waker, now: Instant) -> Poll<Result<Pick, NoServer>> {
        match tries.queue(&self.queue, self.settings.queue, waker) {
            None | Some(QueueTurn::Displaced) => {
                tries.leave_queue();
                return Poll::Ready(Err(NoServer::QueueFull));
            }
            Some(QueueTurn::Later) => return Poll::Pending,
            Some(QueueTurn::Now) => {}
        }
        let picked = self.pick(tries, now);
        if let Err(NoServer::Busy) = picked {
            return Poll::Pending;
        }
        tries.leave_queue();
        Poll::Ready(picked)
    }

    #[inline(never)]
    fn take_chosen(&self, roster: &Roster, tries: &Tries, turn: usize) -> Result<Arc<Server>, NoServer> {
        loop {
            let server = &self.choose(roster, tries, turn)?.server;
            // Another request may have been quicker.
            if server.takes(self.settings.max_requests) {
                return Ok(Arc::clone(server));
            }
        }
    }

    fn choose<'r>(&self, roster: &'r Roster, tries: &Tries, turn: usize) -> Result<&'r Member, NoServer> {
        let (answers, many) = (self.answers.load(Ordering::Relaxed), MANY_ANSWERS * roster.members.len() as u64);
        let untried = |member: &Member| !tries.has(&member.server);
        let all = roster.panics || !roster.in_turn(turn).any(|member| untried(member) && member.server.is_up());
        let is_busy = |member: &Member| member.server.is_full(self.settings.max_requests);
        let serves_this = |member: &Member| untried(member) && (member.server.is_up() || all);
        let fits = |member: &Member| serves_this(member) && !is_busy(member);
        let from = |turn: usize| roster.in_turn(turn).filter(|member| fits(member));
        let has_room = |member: &&Member| member.has_room(answers, many);
        // A server that is merely busy keeps its keys, and is known to be by its requests in flight.
        let serves = |member: &&Member| member.server.has_room(1) || !member.server.is_suspect(answers, many);
        let by_key = || {
            let (ring, key) = roster.ring.as_deref().zip(tries.key())?;
            let owner = |place| roster.members.get(place).filter(|member: &&Member| member.share > 0 && fits(member));
            let owners = || ring.from(key).filter_map(owner).filter(serves);
            owners().find(|member| roster.is_within_bound(member)).or_else(|| owners().next())
        };
        let less_loaded_of_two = || {
            // Mixed, a counter is as good as a random number, and the same again in a test.
            let (one, other) = (mixed(turn as u64), mixed(!(turn as u64)));
            let one = from(one as usize).find(serves)?;
            let other = from(other as usize).filter(serves).find(|other| !Arc::ptr_eq(&other.server, &one.server));
            let less = |other: &&Member| other.is_less_loaded(other.server.in_flight(), one, one.server.in_flight());
            Some(other.filter(less).unwrap_or(one))
        };
        let chosen = match self.settings.balance {
            Balance::RoundRobin => from(turn).find(has_room),
            Balance::LeastRequests => less_loaded_of_two(),
            Balance::Hash(_) => by_key().or_else(|| from(turn).find(has_room)),
        };
        let least_waited_for = || {
            from(turn).reduce(|best, member| {
                let suspect = |member: &Member| member.server.is_suspect(answers, many);
                let better = match (suspect(member), suspect(best)) {
                    (false, true) => true,
                    (true, false) => false,
                    _ => member.is_less_loaded(member.server.unanswered(), best, best.server.unanswered()),
                };
                if better { member } else { best }
            })
        };
        if let Some(member) = chosen.or_else(least_waited_for) {
            return Ok(member);
        }
        // Backups and servers that are down do not get what is too much for the others.
        if roster.in_turn(turn).any(serves_this) {
            return Err(NoServer::Busy);
        }
        let left = || roster.members.iter().filter(|member| untried(member) && member.server.is_usable());
        let best =
            left().filter(|member| !is_busy(member)).min_by_key(|member| (!member.server.is_up(), member.backup));
        best.ok_or_else(|| if left().next().is_some() { NoServer::Busy } else { NoServer::Absent })
    }

    /// Keeps new requests away from a server, or lets them go to it again; those that it has go on. Returns the server and whether
    /// anything changed. `None`: the pool has no such server.
    pub fn drain(&self, label: &str, drained: bool, now: Instant) -> Option<(Arc<Server>, bool)> {
        let server = self.members().into_iter().find(|member| member.server.label() == label)?.server;
        let changed = server.set_drained(drained, now);
        self.noted(changed, now);
        Some((server, changed))
    }

    /// Brings those metrics up to date that are read from the state of servers.
    pub fn publish(&self) {
        self.series.waiting(self.queue.waiting());
        let bounds = self.adaptive_bounds();
        self.roster.load().members.iter().for_each(|member| member.server.publish(bounds));
    }

    /// The limit of requests with one of its servers, and what it follows if it is adaptive.
    pub fn limit_of(&self, server: &Server) -> (Option<u32>, Option<AdaptiveReading>) {
        let reading = self.adaptive_bounds().map(|bounds| server.reading(bounds));
        let fixed = match self.settings.max_requests {
            Some(MaxRequests::Fixed(most)) => Some(most),
            _ => None,
        };
        (reading.map(|reading| reading.limit).or(fixed), reading)
    }

    /// A connection to a server is established.
    pub fn connected(&self, reused: bool) {
        self.series.connected(reused);
    }

    /// The server of the current try has sent the head of an answer. The time since it was asked, if it is the first head.
    /// `Some` of the rest: to be logged.
    pub fn answered(
        &self,
        tries: &mut Tries,
        status: u16,
        now: Instant,
    ) -> (Option<Duration>, Option<Recovery>, Option<ServerChange>) {
        let answered = tries.answered();
        if tries.is_awaited() {
            tries.has_head(status, answered.as_ref().map(|(_, asked)| *asked), now);
        }
        let Some((server, asked)) = answered else { return (None, None, None) };
        let took = now.saturating_duration_since(asked);
        self.series.answered(took);
        let answers = self.answers.fetch_add(1, Ordering::Relaxed) + 1;
        let slow = self.settings.failure_latency.is_some_and(|limit| took > limit);
        let bad = match slow {
            true => Some(DownReason::Slow),
            false => self.settings.failure_statuses.contains(&status).then_some(DownReason::Status),
        };
        let change = match bad {
            Some(reason) => server.answered_badly(reason, answers, now),
            None => server.answered(asked, answers, now),
        };
        self.noted(change.is_some(), now);
        (Some(took), self.outage.succeeded(asked, now), change)
    }

    /// The current try failed, and nothing of an answer was passed on. `repeatable`: sending the request twice does no harm,
    /// and all of it that was sent is at hand.
    pub fn failed(&self, tries: &mut Tries, failure: FailedTry, repeatable: bool, now: Instant) -> AfterFailure {
        self.series.failed(failure.error());
        let Some((server, asked, again)) = tries.failed(failure, repeatable) else {
            return AfterFailure { again: false, exhausted: false, change: None };
        };
        let change = server.failed(failure, asked, now);
        if let Some(bounds) = self.adaptive_bounds() {
            server.answers_too_little(bounds, failure, asked, now);
        }
        self.noted(change.is_some(), now);
        let is_left = |member: &Member| !tries.has(&member.server) && member.server.is_usable();
        let left = || self.roster.load().members.iter().any(is_left);
        let is_left = tries.will_ask_once_more() || left();
        let exhausted = again && !is_left;
        let again = again && is_left;
        // A refused connection, or one without trust, costs no server anything, and a kept one that was dead is no try.
        let is_free = tries.will_ask_once_more() || failure.is_refused();
        let within = |limits| is_free || self.budget.take(limits, self.turn.load(Ordering::Relaxed), now);
        let again = again && {
            let may = self.settings.retries.is_none_or(within);
            if !may {
                self.series.retry_refused();
            }
            may
        };
        AfterFailure { again, exhausted, change }
    }

    /// A try failed for another reason than the server's connection, or there was no server.
    pub fn error(&self, kind: UpstreamError) {
        self.series.failed(kind);
    }

    /// A request failed with its last try. `Some`: the log should say that an outage begins.
    pub fn request_failed(&self, now: Instant) -> Option<u64> {
        self.outage.failed(now)
    }

    /// The servers that are to be looked at now, and what has to be seen. The result goes to [`Self::seen`].
    pub fn looks(&self, now: Instant) -> Vec<(Arc<Server>, Look)> {
        // Requests of an earlier snapshot report to an earlier pool of the same servers; and a slow start goes on.
        self.noted(true, now);
        let roster = self.roster.load();
        let others = roster.members.len() > 1;
        let check = self.settings.check.as_ref();
        let due = |Member { server, .. }: &Member| Some((Arc::clone(server), server.due(check, others, now)?));
        roster.members.iter().filter_map(due).collect()
    }

    /// How a look ended.
    pub fn seen(&self, server: &Server, found: Result<(), CheckFault>, now: Instant) -> Option<ServerChange> {
        let change = server.seen(self.settings.check.as_ref(), found, now);
        self.noted(change.is_some(), now);
        change
    }

    /// The names that are to be resolved now. The result goes to [`Self::resolved`].
    pub fn names(&self, now: Instant) -> Vec<String> {
        let mut names = self.names.lock();
        if names.due.is_none_or(|due| now < due) {
            return Vec::new();
        }
        // Set by the result.
        names.due = None;
        self.settings.names().map(str::to_owned).collect()
    }

    /// The servers' names were resolved.
    pub fn resolved(&self, found: Vec<ResolvedName>, now: Instant) -> Vec<ServerChange> {
        let mut names = self.names.lock();
        let mut unresolved = false;
        for found in found {
            unresolved |= found.addresses.is_empty();
            match names.known.iter_mut().find(|known| known.name == found.name) {
                // What was known may still be right.
                Some(_) if found.addresses.is_empty() => {}
                Some(known) => *known = found,
                None => names.known.push(found),
            }
        }
        let wait = if unresolved {
            UNRESOLVED_AGAIN.min(self.settings.resolve_interval)
        } else {
            self.settings.resolve_interval
        };
        names.due = self.settings.names().next().map(|_| now + wait);
        let roster = self.roster.load();
        let mut changes = Vec::new();
        let mut members: Vec<Member> = Vec::new();
        for listed in &self.settings.servers {
            for (address, addresses) in self.listed(&listed.address, &names.known) {
                // Found by another name, it would be trusted for another name.
                let host = listed.address.host_name();
                let is_it = |known: &&Arc<Server>| *known.address() == address && known.host() == host;
                let known = roster.members.iter().map(|member| &member.server).find(is_it);
                let server = known.cloned().unwrap_or_else(|| {
                    let metrics = self.metrics.server(&self.settings.name, &address.to_string());
                    let host = host.map(str::to_owned);
                    Arc::new(Server::new(address, host, Vec::new(), metrics, Arc::clone(&self.queue), now))
                });
                if let ServerAddress::Tcp(_) = server.address() {
                    changes.extend(server.resolved(addresses, now));
                }
                members.push(Member::new(server, listed.weight, listed.backup));
            }
        }
        let ring = self.hash_by().map(|_| Arc::new(Ring::of(&members, self.hash)));
        self.roster.store(Arc::new(Roster::of(members, ring, self.settings.roster_rules(), now)));
        self.queue.wake();
        changes
    }

    /// The servers that one entry of the configuration stands for, with their addresses.
    fn listed(&self, entry: &ServerAddress, known: &[ResolvedName]) -> Vec<(ServerAddress, Vec<SocketAddr>)> {
        let addresses = match (entry, entry.name()) {
            (ServerAddress::Tcp(_), Some(name)) => {
                known.iter().find(|known| known.name == name).map_or_else(Vec::new, |known| known.addresses.clone())
            }
            (ServerAddress::Tcp(address), None) => address.parse().into_iter().collect(),
            (ServerAddress::Unix(_), _) => Vec::new(),
        };
        if self.settings.expand && entry.name().is_some() && !addresses.is_empty() {
            return addresses.into_iter().map(|one| (ServerAddress::Tcp(one.to_string()), vec![one])).collect();
        }
        vec![(entry.clone(), addresses)]
    }

    /// Takes turns anew, if the state of a server changed.
    fn noted(&self, changed: bool, now: Instant) {
        if changed && self.roster.load().renewed(self.settings.roster_rules(), now).is_some() {
            let renewed = |roster: &Arc<Roster>| match roster.renewed(self.settings.roster_rules(), now) {
                Some(renewed) => Arc::new(renewed),
                None => Arc::clone(roster),
            };
            self.roster.rcu(renewed);
            self.queue.wake();
        }
    }
}

/// SplitMix64: numbers next to each other get places far from each other.
fn mixed(number: u64) -> u64 {
    let number = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// A server is suspect when its pool has given so many answers for each of its servers, and it none of them.
const MANY_ANSWERS: u64 = 2;
/// How long a name that cannot be resolved is left alone.
const UNRESOLVED_AGAIN: Duration = Duration::from_secs(2);

#[cfg(test)]
mod adaptive_tests;

#[cfg(test)]
pub(crate) use tests::settings as settings_for_tests;

#[cfg(test)]
mod pool_tests;

#[cfg(test)]
mod queue_tests;

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) const REFUSED: FailedTry = FailedTry::Connect(UpstreamError::Connect);
    const CLOSED: FailedTry = FailedTry::Exchange { kept: false, error: UpstreamError::Closed };

    pub(crate) fn settings(servers: &[&str]) -> UpstreamSettings {
        let address = |text: &&str| match text.strip_prefix("unix:") {
            Some(path) => ServerAddress::Unix(path.into()),
            None => ServerAddress::Tcp((*text).into()),
        };
        UpstreamSettings {
            name: "api".into(),
            servers: servers
                .iter()
                .map(|text| ListedServer { address: address(text), weight: 1, backup: false })
                .collect(),
            expand: false,
            balance: Balance::RoundRobin,
            slow_start: None,
            max_requests: None,
            queue: 0,
            queue_order: QueueOrder::Fair,
            queue_timeout: Duration::from_secs(1),
            resolve_interval: Duration::from_secs(30),
            check: None,
            failure_statuses: Vec::new(),
            failure_latency: None,
            panic_below: 0,
            retries: None,
            per_try_timeout: None,
            request_timeout: None,
            connect_timeout: Duration::from_secs(2),
            read_timeout: Duration::from_secs(60),
            idle_timeout: Duration::from_secs(15),
            tls: None,
            http2: false,
            send_proxy: false,
        }
    }

    pub(super) fn metrics() -> Arc<Metrics> {
        Arc::new(Metrics::new("test").unwrap())
    }

    fn upstream(servers: &[&str], now: Instant) -> Arc<Upstream> {
        Upstream::build(&settings(servers), Vec::new(), None, &metrics(), now).0
    }

    /// A request that is answered by the first server that it is sent to.
    fn served_by(pool: &Upstream, now: Instant) -> String {
        let mut tries = Tries::default();
        let pick = pool.pick(&mut tries, now).unwrap();
        pool.answered(&mut tries, 200, now);
        pick.server.label().to_owned()
    }

    /// The servers that a request is tried on while each try fails.
    fn tried(pool: &Upstream, failure: FailedTry, repeatable: bool, now: Instant) -> Vec<String> {
        let (mut tries, mut labels) = (Tries::default(), Vec::new());
        while let Ok(pick) = pool.pick(&mut tries, now) {
            labels.push(pick.server.label().to_owned());
            if !pool.failed(&mut tries, failure, repeatable, now).again {
                break;
            }
        }
        labels
    }

    #[test]
    fn servers_take_turns() {
        let now = Instant::now();
        let two = upstream(&["127.0.0.1:1", "unix:/run/app.sock"], now);
        let turns: Vec<_> = (0..4).map(|_| served_by(&two, now)).collect();
        assert_eq!(turns, ["127.0.0.1:1", "unix:/run/app.sock", "127.0.0.1:1", "unix:/run/app.sock"]);
        assert!(upstream(&[], now).pick(&mut Tries::default(), now).is_err());
    }

    #[test]
    fn a_request_tries_every_server_once_and_the_last_one_too() {
        let now = Instant::now();
        let pool = upstream(&["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3", "127.0.0.1:4", "127.0.0.1:5"], now);
        for turn in 0..7 {
            let mut labels = tried(&pool, REFUSED, false, now);
            labels.sort_unstable();
            labels.dedup();
            assert_eq!(labels.len(), 5, "request {turn}");
        }
        let only = upstream(&["127.0.0.1:1"], now);
        for _ in 0..10 {
            assert_eq!(tried(&only, REFUSED, true, now), ["127.0.0.1:1"], "a pool's last server is never passed over");
        }
    }

    /// However the turns of other requests fall.
    #[test]
    fn the_next_try_goes_to_another_server() {
        let now = Instant::now();
        let pool = upstream(&["127.0.0.1:1", "127.0.0.1:2"], now);
        (0..2).for_each(|_| drop(served_by(&pool, now)));
        let mut tries = Tries::default();
        let first = pool.pick(&mut tries, now).unwrap().server;
        served_by(&pool, now);
        assert!(pool.failed(&mut tries, CLOSED, true, now).again);
        assert!(!Arc::ptr_eq(&first, &pool.pick(&mut tries, now).unwrap().server));
    }

    #[test]
    fn what_was_sent_is_repeated_only_if_that_is_safe_and_not_for_ever() {
        let now = Instant::now();
        let pool = upstream(&["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3", "127.0.0.1:4", "127.0.0.1:5"], now);
        assert_eq!(tried(&pool, CLOSED, false, now).len(), 1);
        assert_eq!(tried(&pool, CLOSED, true, now).len(), 4);
        assert_eq!(tried(&pool, FailedTry::Connect(UpstreamError::ConnectTimeout), false, now).len(), 4);
    }

    #[test]
    fn a_kept_connection_that_was_dead_is_no_try_at_its_server() {
        let now = Instant::now();
        let dead = FailedTry::Exchange { kept: true, error: UpstreamError::Closed };
        let pool = upstream(&["127.0.0.1:1", "127.0.0.1:2"], now);
        let mut tries = Tries::default();
        let first = pool.pick(&mut tries, now).unwrap();
        assert!(pool.failed(&mut tries, dead, true, now).again);
        let again = pool.pick(&mut tries, now).unwrap();
        assert!(Arc::ptr_eq(&first.server, &again.server) && again.fresh && !first.fresh);
        assert!(pool.failed(&mut tries, REFUSED, true, now).again);
        let other = pool.pick(&mut tries, now).unwrap();
        assert!(!Arc::ptr_eq(&first.server, &other.server) && !other.fresh);
        let mut post = Tries::default();
        pool.pick(&mut post, now).unwrap();
        assert!(!pool.failed(&mut post, dead, false, now).again);
    }

    #[test]
    fn a_server_that_is_down_gets_nothing_while_another_one_is_up() {
        let now = Instant::now();
        let pool = upstream(&["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"], now);
        let mut tries = Tries::default();
        pool.pick(&mut tries, now).unwrap();
        let after = pool.failed(&mut tries, REFUSED, false, now);
        assert!(after.again && after.change.is_some_and(|change| change.server == "127.0.0.1:1"));
        pool.pick(&mut tries, now).unwrap();
        pool.answered(&mut tries, 200, now);
        let mut served: Vec<_> = (0..10).map(|_| served_by(&pool, now)).collect();
        served.sort_unstable();
        let halves = [vec!["127.0.0.1:2"; 5], vec!["127.0.0.1:3"; 5]].concat();
        assert_eq!(served, halves, "the load of a server that is down is spread evenly");
        let later = now + Duration::from_secs(1);
        let looks = pool.looks(later);
        assert_eq!(looks.len(), 1);
        assert!(pool.seen(&looks[0].0, Ok(()), later).is_some());
        assert!((0..3).map(|_| served_by(&pool, later)).any(|label| label == "127.0.0.1:1"));
    }

    #[test]
    fn if_all_are_down_all_are_used_and_an_answer_is_enough() {
        let now = Instant::now();
        let pool = upstream(&["127.0.0.1:1", "127.0.0.1:2"], now);
        assert_eq!(tried(&pool, REFUSED, false, now).len(), 2);
        assert!(pool.members().iter().all(|member| !member.server.is_up()));
        let mut tries = Tries::default();
        let picked = pool.pick(&mut tries, now).unwrap().server;
        assert!(pool.answered(&mut tries, 200, now).2.is_some_and(|change| change.back_after.is_some()));
        assert!((0..4).all(|_| served_by(&pool, now) == picked.label()));
    }

    /// With a silent server, requests that come at one time must not all wait for it.
    #[test]
    fn only_a_few_wait_for_a_silent_server() {
        let now = Instant::now();
        let pool = upstream(&["127.0.0.1:1", "127.0.0.1:2"], now);
        let mut waiting = Vec::new();
        for _ in 0..1_000 {
            let mut tries = Tries::default();
            match pool.pick(&mut tries, now).unwrap().server.label() {
                "127.0.0.1:1" => waiting.push(tries),
                _ => drop(pool.answered(&mut tries, 200, now)),
            }
        }
        assert_eq!(waiting.len(), 1, "a stranger gets one");
        pool.answered(&mut waiting[0], 200, now);
        for _ in 0..1_000 {
            let mut tries = Tries::default();
            match pool.pick(&mut tries, now).unwrap().server.label() {
                "127.0.0.1:1" => waiting.push(tries),
                _ => drop(pool.answered(&mut tries, 200, now)),
            }
        }
        assert_eq!(waiting.len(), 1 + 3);
    }

    #[test]
    fn the_state_of_a_server_outlives_a_reload_that_keeps_it() {
        let (now, metrics) = (Instant::now(), metrics());
        let build =
            |servers: &[&str], running| Upstream::build(&settings(servers), Vec::new(), running, &metrics, now).0;
        let pool = build(&["127.0.0.1:1", "127.0.0.1:2"], None);
        let mut tries = Tries::default();
        pool.pick(&mut tries, now).unwrap();
        pool.failed(&mut tries, REFUSED, false, now);
        let times = UpstreamSettings { idle_timeout: Duration::ZERO, ..settings(&["127.0.0.1:1", "127.0.0.1:2"]) };
        assert!(Arc::ptr_eq(&pool, &Upstream::build(&times, Vec::new(), Some(&pool), &metrics, now).0));
        let other = build(&["127.0.0.1:3", "127.0.0.1:1"], Some(&pool));
        assert!(!Arc::ptr_eq(&pool, &other));
        let up: Vec<_> = other.members().iter().map(|member| member.server.is_up()).collect();
        assert_eq!(up, [true, false]);
        drop(pool);
        let text = metrics.render().unwrap();
        assert!(text.contains("server_up{server=\"127.0.0.1:1\",upstream=\"api\"} 0"), "{text}");
        assert!(!text.contains("127.0.0.1:2"), "{text}");
    }

    /// What is spoken belongs to connections. What servers have shown, and which ones are drained, does not go with it.
    #[test]
    fn a_pool_outlives_a_change_of_its_tls() {
        let (now, metrics) = (Instant::now(), metrics());
        let plain = settings(&["a.test:1"]);
        let build = |settings: &UpstreamSettings, running| {
            let names = vec![ResolvedName { name: "a.test:1".into(), addresses: vec!["127.0.0.1:1".parse().unwrap()] }];
            Upstream::build(settings, names, running, &metrics, now).0
        };
        let pool = build(&plain, None);
        pool.drain("a.test:1", true, now);
        let tls = |name: Option<&str>| UpstreamTls {
            authorities: None,
            client: None,
            name: name.map(str::to_owned),
            http2: false,
        };
        for changed in [
            UpstreamSettings { tls: Some(tls(None)), ..plain.clone() },
            UpstreamSettings { tls: Some(tls(Some("b.test"))), ..plain.clone() },
            UpstreamSettings { http2: true, ..plain.clone() },
            UpstreamSettings { send_proxy: true, ..plain.clone() },
        ] {
            assert!(Arc::ptr_eq(&pool, &build(&changed, Some(&pool))), "{changed:?}");
        }
    }

    /// A connection to one address that was verified for one name must not serve requests for another.
    #[test]
    fn an_address_that_is_found_by_another_name_is_another_server() {
        let (now, metrics) = (Instant::now(), metrics());
        let build = |name: &str, running| {
            let settings = UpstreamSettings { expand: true, ..settings(&[name]) };
            let names = vec![ResolvedName { name: name.into(), addresses: vec!["127.0.0.1:1".parse().unwrap()] }];
            Upstream::build(&settings, names, running, &metrics, now).0
        };
        let server = |pool: &Upstream| Arc::clone(&pool.members()[0].server);
        let before = build("a.test:1", None);
        assert_eq!((server(&before).host(), server(&before).label()), (Some("a.test"), "127.0.0.1:1"));
        assert!(Arc::ptr_eq(&server(&before), &server(&build("a.test:1", Some(&before)))));
        let after = build("b.test:1", Some(&before));
        assert_eq!(server(&after).host(), Some("b.test"));
        assert_ne!(server(&before).number(), server(&after).number());
    }

    #[test]
    fn a_handshake_that_fails_takes_a_server_away_like_a_refused_connection() {
        let now = Instant::now();
        let untrusted = FailedTry::Connect(UpstreamError::TlsUntrusted);
        let pool = upstream(&["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3", "127.0.0.1:4", "127.0.0.1:5"], now);
        assert_eq!(tried(&pool, untrusted, false, now).len(), 5, "it is tried everywhere, at no cost");
        let pool = upstream(&["127.0.0.1:1", "127.0.0.1:2"], now);
        let mut begun_before = Tries::default();
        pool.pick(&mut begun_before, now).unwrap();
        let mut tries = Tries::default();
        let (other, later) = (pool.pick(&mut tries, now).unwrap().server, now + Duration::from_millis(1));
        pool.failed(&mut tries, untrusted, false, later);
        assert!(!other.is_up());
        // What goes on over connections that it has says nothing about new ones.
        pool.answered(&mut begun_before, 200, later);
        assert!(!other.is_up());
    }

    /// A request that began before a reload reports to the pool that it began with.
    #[test]
    fn what_an_earlier_pool_learns_is_known_to_the_next() {
        let (now, metrics) = (Instant::now(), metrics());
        let build =
            |servers: &[&str], running| Upstream::build(&settings(servers), Vec::new(), running, &metrics, now).0;
        let before = build(&["127.0.0.1:1"], None);
        let mut tries = Tries::default();
        before.pick(&mut tries, now).unwrap();
        let after = build(&["127.0.0.1:1", "127.0.0.1:2"], Some(&before));
        before.failed(&mut tries, REFUSED, false, now);
        assert!((0..4).all(|_| served_by(&after, now) == "127.0.0.1:2"));
    }

    #[test]
    fn all_addresses_of_a_name_are_one_server_unless_they_are_told_apart() {
        let now = Instant::now();
        let (a, b): (SocketAddr, SocketAddr) = ("127.0.0.1:1".parse().unwrap(), "[::1]:1".parse().unwrap());
        let name =
            |addresses: &[SocketAddr]| vec![ResolvedName { name: "localhost:1".into(), addresses: addresses.to_vec() }];
        let labels =
            |pool: &Upstream| pool.members().iter().map(|member| member.server.label().to_owned()).collect::<Vec<_>>();
        let one = settings(&["localhost:1"]);
        let (pool, _) = Upstream::build(&one, name(&[a, b]), None, &metrics(), now);
        assert_eq!(labels(&pool), ["localhost:1"]);
        assert_eq!(pool.members()[0].server.addresses().collect::<Vec<_>>(), [a, b]);
        let each = UpstreamSettings { expand: true, ..one };
        let (pool, _) = Upstream::build(&each, name(&[a, b]), None, &metrics(), now);
        assert_eq!(labels(&pool), ["127.0.0.1:1", "[::1]:1"]);
        assert_eq!(pool.names(now), [] as [String; 0], "not before its time");
        let later = now + Duration::from_secs(30);
        assert_eq!((pool.names(later).len(), pool.names(later).len()), (1, 0), "once at a time");
        let kept = Arc::clone(&pool.members()[1].server);
        pool.resolved(name(&[b]), later);
        assert!(labels(&pool) == ["[::1]:1"] && Arc::ptr_eq(&kept, &pool.members()[0].server));
        pool.resolved(name(&[]), later);
        assert_eq!(labels(&pool), ["[::1]:1"], "a resolver that fails takes nothing away");
        assert!(!pool.names(later + UNRESOLVED_AGAIN).is_empty(), "and is asked again soon");
    }

    #[test]
    fn a_name_that_cannot_be_resolved_is_a_server_that_is_down() {
        let now = Instant::now();
        let unresolved = vec![ResolvedName { name: "a.invalid:1".into(), addresses: Vec::new() }];
        let (pool, changes) =
            Upstream::build(&settings(&["a.invalid:1", "127.0.0.1:1"]), unresolved.clone(), None, &metrics(), now);
        assert_eq!(changes.len(), 1);
        assert!((0..4).all(|_| served_by(&pool, now) == "127.0.0.1:1"));
        assert_eq!(tried(&pool, REFUSED, false, now), ["127.0.0.1:1"], "there is nothing to connect to");
        let found = vec![ResolvedName { name: "a.invalid:1".into(), addresses: vec!["127.0.0.1:2".parse().unwrap()] }];
        assert!(pool.resolved(found, now)[0].back_after.is_some());
        let (only, _) = Upstream::build(&settings(&["a.invalid:1"]), unresolved, None, &metrics(), now);
        assert!(only.pick(&mut Tries::default(), now).is_err());
    }

    #[test]
    fn statuses_and_slow_responses_count_only_where_that_is_configured() {
        let now = Instant::now();
        let down_after = |settings: &UpstreamSettings, status: u16, took: Duration| {
            let (pool, _) = Upstream::build(settings, Vec::new(), None, &metrics(), now);
            let answer = |_: &usize| {
                let mut tries = Tries::default();
                pool.pick(&mut tries, now).unwrap();
                pool.answered(&mut tries, status, now + took).2.is_some()
            };
            (1..10).find(answer)
        };
        let (plain, second) = (settings(&["127.0.0.1:1"]), Duration::from_secs(1));
        assert_eq!(down_after(&plain, 503, 60 * second), None, "a URL that fails must not take servers away");
        let statuses = UpstreamSettings { failure_statuses: vec![502, 503], ..plain.clone() };
        assert_eq!((down_after(&statuses, 503, second), down_after(&statuses, 500, second)), (Some(3), None));
        let latency = UpstreamSettings { failure_latency: Some(2 * second), ..plain };
        assert_eq!((down_after(&latency, 200, 3 * second), down_after(&latency, 200, second)), (Some(3), None));
    }

    #[test]
    fn below_the_panic_threshold_all_servers_are_used() {
        let now = Instant::now();
        let servers = ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3", "127.0.0.1:4"];
        for (panic_below, expected) in [(0, 1), (25, 1), (26, 4)] {
            let settings = UpstreamSettings { panic_below, ..settings(&servers) };
            let (pool, _) = Upstream::build(&settings, Vec::new(), None, &metrics(), now);
            let mut tries = Tries::default();
            for _ in 0..3 {
                pool.pick(&mut tries, now).unwrap();
                pool.failed(&mut tries, REFUSED, false, now);
            }
            assert_eq!(pool.members().iter().filter(|member| member.server.is_up()).count(), 1);
            let mut served: Vec<_> = (0..8)
                .map(|_| {
                    let mut tries = Tries::default();
                    let label = pool.pick(&mut tries, now).unwrap().server.label().to_owned();
                    tries.given_up(now);
                    label
                })
                .collect();
            served.sort_unstable();
            served.dedup();
            assert_eq!(served.len(), expected, "panic_below = {panic_below}");
        }
    }
}
