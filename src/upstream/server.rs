//! One server and how it has been doing: whether it gets requests, why not, and when it is looked at again. Pure: time is an
//! argument. It must not know the other servers, nor what is asked.
//!
//! Two things keep requests away from a server. *Down* is what failures, checks and unresolved names make of it: it is shown,
//! logged, and ended by one look in the background, or by an answer. *Passed over* is quicker and silent: a server that has
//! not answered its last few requests gets no more while another one does answer, whether or not anything has failed yet.
//! If that lasts, a look in the background tells a server that is only slow from one that is down. No request is spent on it.

use super::adaptive::{AdaptiveBounds, AdaptiveLimit};
use super::check::{CheckFault, CheckSettings};
use super::queue::Queue;
use super::tries::is_refusal;
use super::{FailedTry, MaxRequests, ServerAddress};
use crate::telemetry::metrics::{AdaptiveReading, ServerMetrics, UpstreamError};
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{
    AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize,
    Ordering::{Relaxed, SeqCst},
};
use std::time::{Duration, Instant};

/// Requests without an answer after which a server is passed over, and failed ones in a row after which it is down.
const PATIENCE: u32 = 3;
/// The same for one that has not answered since its start or its last outage.
const PATIENCE_WITH_A_STRANGER: u32 = 1;
/// Until the first look at a server that is down or passed over; doubled each time, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Reasons for which a server gets no requests.
const DOWN: u8 = 1;
const DRAINED: u8 = 2;

/// Why a server is down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DownReason {
    /// Requests to it fail, the last one like this.
    Failing(UpstreamError),
    /// Its name has no address.
    Unresolved,
    /// Its responses have statuses that count as failures.
    Status,
    /// Its responses take longer than they may.
    Slow,
    Check(CheckFault),
}

impl DownReason {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Failing(error) => error.as_str(),
            Self::Unresolved => "unresolved",
            Self::Status => "status",
            Self::Slow => "slow",
            Self::Check(fault) => fault.as_str(),
        }
    }
}

/// A server went down or came back. To be logged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerChange {
    pub server: String,
    pub reason: DownReason,
    /// `Some`: it is back, after this time.
    pub back_after: Option<Duration>,
}

/// What a look at a server has to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// That a connection can be made.
    Connect,
    /// That it answers: a connection was not enough before.
    Answer,
    /// What the configured check asks for.
    Check,
}

/// How a server is, for the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerState {
    pub down: Option<DownReason>,
    pub since: Instant,
    /// Requests without an answer since its last one.
    pub unanswered: u32,
}

pub struct Server {
    /// No other server of this process ever has it.
    number: u64,
    address: ServerAddress,
    /// The host name that the configuration finds it by. With `expand`, it is not in the address.
    host: Option<String>,
    /// As logs, metrics and the admin listener name it.
    label: String,
    /// Where a TCP server listens: the addresses of its name.
    addresses: ArcSwap<Vec<SocketAddr>>,
    /// The address to begin with: the one that was connected to last.
    preferred: AtomicUsize,
    /// Why it gets no new requests: [`DOWN`], [`DRAINED`], both, or 0 for neither. Read for each request.
    absent: AtomicU8,
    /// It has answered since its start or its last outage.
    known: AtomicBool,
    /// Tries since its last answer, but for those that were given up early.
    unanswered: AtomicU32,
    /// One of them has failed.
    failed: AtomicBool,
    /// Requests that are with it, to the end of their responses.
    in_flight: AtomicU32,
    /// How many it may have where that is learned. What was learned outlives reloads.
    adaptive: AdaptiveLimit,
    /// Those that wait for one of them to end.
    queue: Arc<Queue>,
    /// How many answers its pool had given when it gave its last one.
    last_answer: AtomicU64,
    health: Mutex<Health>,
    metrics: ServerMetrics,
}

/// What only changes when something fails.
struct Health {
    since: Instant,
    /// When its last outage ended.
    back: Option<Instant>,
    /// Failures since the last answer.
    failures: u32,
    down: Option<DownReason>,
    /// Answers in a row that count as failures.
    bad: u32,
    /// Looks since the last answer, which make the pauses longer.
    looks: u32,
    /// Checks in a row that failed or succeeded: the other one is 0. Both are before the first one.
    checks_failed: u32,
    checks_passed: u32,
    next_look: Option<Instant>,
    /// Somebody is looking.
    looking: bool,
}

impl Server {
    pub(super) fn new(
        address: ServerAddress,
        host: Option<String>,
        addresses: Vec<SocketAddr>,
        metrics: ServerMetrics,
        queue: Arc<Queue>,
        now: Instant,
    ) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        Self {
            number: NUMBER.fetch_add(1, Relaxed),
            label: address.to_string(),
            address,
            host,
            addresses: ArcSwap::from_pointee(addresses),
            preferred: AtomicUsize::new(0),
            absent: AtomicU8::new(0),
            known: AtomicBool::new(false),
            unanswered: AtomicU32::new(0),
            failed: AtomicBool::new(false),
            in_flight: AtomicU32::new(0),
            adaptive: AdaptiveLimit::new(now),
            queue,
            last_answer: AtomicU64::new(0),
            health: Mutex::new(Health {
                since: now,
                back: None,
                failures: 0,
                down: None,
                bad: 0,
                looks: 0,
                checks_failed: 0,
                checks_passed: 0,
                next_look: None,
                looking: false,
            }),
            metrics,
        }
    }

    pub fn number(&self) -> u64 {
        self.number
    }

    pub fn address(&self) -> &ServerAddress {
        &self.address
    }

    pub fn host(&self) -> Option<&str> {
        self.host.as_deref()
    }

    pub fn label(&self) -> &str {
        &self.label
    }

    /// The addresses of a TCP server, the one to begin with first. None: its name has no address.
    pub fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        let all = self.addresses.load_full();
        let (first, count) = (self.preferred.load(Relaxed), all.len());
        (0..count).filter_map(move |index| all.get((first + index) % count).copied())
    }

    pub fn listens_at(&self, address: SocketAddr) -> bool {
        self.addresses.load().contains(&address)
    }

    /// This is the address that could be connected to.
    pub fn prefer(&self, address: SocketAddr) {
        if let Some(place) = self.addresses.load().iter().position(|known| *known == address) {
            self.preferred.store(place, Relaxed);
        }
    }

    /// Whether it gets requests.
    pub fn is_up(&self) -> bool {
        self.absent.load(Relaxed) == 0
    }

    fn is_down(&self) -> bool {
        self.absent.load(Relaxed) & DOWN != 0
    }

    /// The operator keeps new requests away from it.
    pub fn is_drained(&self) -> bool {
        self.absent.load(Relaxed) & DRAINED != 0
    }

    /// False: it was so before.
    pub(super) fn set_drained(&self, drained: bool, now: Instant) -> bool {
        let before = match drained {
            true => self.absent.fetch_or(DRAINED, Relaxed),
            false => self.absent.fetch_and(!DRAINED, Relaxed),
        };
        self.metrics.draining(drained);
        let changed = (before & DRAINED != 0) != drained;
        if changed && before & DOWN == 0 {
            self.health.lock().back = (!drained).then_some(now);
        }
        changed
    }

    /// Whether a request can go to it if there is no better server.
    pub(super) fn is_usable(&self) -> bool {
        self.has_address() && !self.is_drained()
    }

    pub fn state(&self) -> ServerState {
        let health = self.health.lock();
        ServerState { down: health.down, since: health.since, unanswered: self.unanswered.load(Relaxed) }
    }

    /// Whether there is any way to connect to it.
    fn has_address(&self) -> bool {
        matches!(self.address, ServerAddress::Unix(_)) || !self.addresses.load().is_empty()
    }

    /// Since when it has been back after an outage. `None`: it had none, or is in one.
    pub(super) fn back_since(&self) -> Option<Instant> {
        self.health.lock().back
    }

    /// Requests that are with it.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(SeqCst)
    }

    /// It gets one more request, if it has fewer than it may.
    pub(super) fn takes(&self, at_most: Option<MaxRequests>) -> bool {
        match at_most {
            None => {}
            Some(MaxRequests::Adaptive(bounds)) if self.adaptive.takes(bounds) => {}
            Some(MaxRequests::Adaptive(_)) => return false,
            Some(MaxRequests::Fixed(most)) => {
                let one_more = |count| (count < most).then_some(count + 1);
                return self.in_flight.fetch_update(SeqCst, SeqCst, one_more).is_ok();
            }
        }
        self.in_flight.fetch_add(1, SeqCst);
        true
    }

    /// Whether it has as many requests as it may.
    pub(super) fn is_full(&self, at_most: Option<MaxRequests>) -> bool {
        match at_most {
            None => false,
            Some(MaxRequests::Fixed(most)) => self.in_flight() >= most,
            Some(MaxRequests::Adaptive(bounds)) => self.adaptive.is_full(bounds),
        }
    }

    pub(super) fn is_done(&self) {
        self.in_flight.fetch_sub(1, SeqCst);
        self.queue.wake();
    }

    /// One request less waits for its head: there may be room for another one, though this one goes on.
    pub(super) fn head_is_over(&self) {
        self.adaptive.leaves();
        self.queue.wake();
    }

    /// It has answered a request, of which nothing but the server itself made the time longer.
    pub(super) fn took(&self, bounds: AdaptiveBounds, asked: Instant, now: Instant) {
        self.adaptive.sampled(bounds, asked, now);
    }

    /// A request was given up, which may have waited for long.
    pub(super) fn took_too_long(&self, bounds: AdaptiveBounds, asked: Instant, now: Instant) {
        self.adaptive.given_up(bounds, asked, now);
    }

    /// A request failed, which may be for the load.
    pub(super) fn answers_too_little(&self, bounds: AdaptiveBounds, failure: FailedTry, asked: Instant, now: Instant) {
        if !matches!(failure, FailedTry::Exchange { kept: true, error: UpstreamError::Closed }) {
            self.adaptive.failed(bounds, asked, now);
        }
    }

    pub(super) fn reading(&self, bounds: AdaptiveBounds) -> AdaptiveReading {
        self.adaptive.reading(bounds)
    }

    /// The metrics that are read from it say what is so now. `bounds`: of its limit, if that is adaptive.
    pub(super) fn publish(&self, bounds: Option<AdaptiveBounds>) {
        self.metrics.in_flight(self.in_flight());
        self.metrics.adaptive(bounds.map(|bounds| self.reading(bounds)));
    }

    pub(super) fn unanswered(&self) -> u32 {
        self.unanswered.load(Relaxed)
    }

    /// Whether it is not to be passed over at the moment. `multiple`: how many times as many requests as another one it gets.
    pub(super) fn has_room(&self, multiple: u32) -> bool {
        let patience = if self.known.load(Relaxed) { PATIENCE } else { PATIENCE_WITH_A_STRANGER };
        self.unanswered.load(Relaxed) < patience * multiple
    }

    /// Whether it stands out: its tries fail, or its pool has given so many answers since its last one. Where there is no
    /// room anywhere, because all are busy, it still gets nothing.
    pub(super) fn is_suspect(&self, pool_answers: u64, many: u64) -> bool {
        self.failed.load(Relaxed) || pool_answers.saturating_sub(self.last_answer.load(Relaxed)) >= many
    }

    /// A request goes to it.
    pub(super) fn asks(&self) {
        self.unanswered.fetch_add(1, Relaxed);
    }

    /// A request was given up before it was answered. One that was given up soon says nothing about the server.
    pub(super) fn given_up(&self, asked: Instant, now: Instant) {
        if now.saturating_duration_since(asked) < FIRST_PAUSE {
            let _ = self.unanswered.fetch_update(Relaxed, Relaxed, |count| count.checked_sub(1));
        }
    }

    /// It has answered in a way that counts as a failure.
    pub(super) fn answered_badly(&self, reason: DownReason, pool_answers: u64, now: Instant) -> Option<ServerChange> {
        self.last_answer.store(pool_answers, Relaxed);
        self.unanswered.store(0, Relaxed);
        self.failed.store(true, Relaxed);
        let mut health = self.health.lock();
        health.bad += 1;
        (health.bad >= PATIENCE && health.down.is_none()).then(|| self.down(&mut health, reason, now))
    }

    /// It has answered a request that was sent at a time. `pool_answers`: how many its pool has given.
    pub(super) fn answered(&self, asked: Instant, pool_answers: u64, now: Instant) -> Option<ServerChange> {
        self.last_answer.store(pool_answers, Relaxed);
        self.unanswered.store(0, Relaxed);
        // Read first, as it is hardly ever set.
        if self.failed.load(Relaxed) {
            self.failed.store(false, Relaxed);
            self.health.lock().bad = 0;
        }
        if self.known.load(Relaxed) && !self.is_down() {
            return None;
        }
        let mut health = self.health.lock();
        let refuses = matches!(health.down, Some(DownReason::Failing(error)) if is_refusal(error));
        let checks = matches!(health.down, Some(DownReason::Check(_)));
        // A server that stops still answers what it had begun; and what a check found, only a check takes back.
        if checks || (refuses && asked < health.since) {
            return None;
        }
        self.known.store(true, Relaxed);
        health.looks = 0;
        self.back(&mut health, now)
    }

    /// A try failed.
    pub(super) fn failed(&self, failure: FailedTry, asked: Instant, now: Instant) -> Option<ServerChange> {
        let mut health = self.health.lock();
        // An answer to another request counts from 0 again. It takes no lock, so it is only seen here.
        health.failures = (health.failures + 1).min(self.unanswered.load(Relaxed));
        let enough = match failure {
            FailedTry::Connect(_) => 0,
            FailedTry::Exchange { kept: true, error: UpstreamError::Closed } => return None,
            // One slow URL must not take servers away. A silent one is passed over, and then looked at.
            FailedTry::Exchange { error: UpstreamError::TryTimeout, .. } => return None,
            FailedTry::Exchange { .. } => PATIENCE,
        };
        self.failed.store(true, Relaxed);
        if health.failures < enough || health.down.is_some() || asked < health.since {
            return None;
        }
        let reason = DownReason::Failing(failure.error());
        Some(self.down(&mut health, reason, now))
    }

    /// Its name was resolved again, to no address if that failed.
    pub(super) fn resolved(&self, addresses: Vec<SocketAddr>, now: Instant) -> Option<ServerChange> {
        let mut health = self.health.lock();
        if addresses.is_empty() {
            // What was known may still be right.
            let lost = !self.has_address() && health.down.is_none();
            return lost.then(|| self.down(&mut health, DownReason::Unresolved, now));
        }
        if **self.addresses.load() != addresses {
            self.preferred.store(0, Relaxed);
            self.addresses.store(Arc::new(addresses));
        }
        let was_lost = health.down == Some(DownReason::Unresolved);
        if was_lost { self.back(&mut health, now) } else { None }
    }

    /// What to look at now, if it is time. The caller says what it saw with [`Self::seen`]. `others`: there are other
    /// servers, so that this one can be passed over.
    pub(super) fn due(&self, check: Option<&CheckSettings>, others: bool, now: Instant) -> Option<Look> {
        let mut health = self.health.lock();
        if !self.has_address() {
            return None;
        }
        let is_well = !self.is_down() && (self.has_room(1) || !others);
        let look = match (check, health.down) {
            (Some(_), _) => Look::Check,
            (None, None) if is_well => {
                if self.known.load(Relaxed) {
                    // The next suspicion begins with a pause of its own.
                    health.next_look = None;
                }
                return None;
            }
            (None, Some(DownReason::Failing(UpstreamError::Connect | UpstreamError::ConnectTimeout))) => Look::Connect,
            (None, _) => Look::Answer,
        };
        if health.looking {
            return None;
        }
        let first = match check {
            // At once: it may be down already.
            Some(_) => now,
            None => now + pause(health.looks),
        };
        if *health.next_look.get_or_insert(first) > now {
            return None;
        }
        (health.looking, health.next_look) = (true, None);
        Some(look)
    }

    /// How a look ended.
    pub(super) fn seen(
        &self,
        check: Option<&CheckSettings>,
        found: Result<(), CheckFault>,
        now: Instant,
    ) -> Option<ServerChange> {
        let mut health = self.health.lock();
        health.looking = false;
        if check.is_none() {
            // Until it answers a request, the pauses go on from here.
            health.looks = health.looks.saturating_add(1);
        }
        let is_first = (health.checks_failed, health.checks_passed) == (0, 0);
        (health.checks_failed, health.checks_passed) = match found {
            Ok(()) => (0, health.checks_passed.saturating_add(1)),
            Err(_) => (health.checks_failed.saturating_add(1), 0),
        };
        let next = check.map_or_else(|| pause(health.looks), |check| spread(check.interval));
        health.next_look = Some(now + next);
        match (health.down, found) {
            (Some(_), Ok(())) => {
                let enough = health.checks_passed >= check.map_or(1, |check| check.successes);
                if enough { self.back(&mut health, now) } else { None }
            }
            (None, Ok(())) if !self.has_room(1) => {
                // It is slow, or it answers looks only: a stranger again.
                health.bad = 0;
                self.known.store(false, Relaxed);
                self.failed.store(false, Relaxed);
                self.unanswered.store(0, Relaxed);
                None
            }
            (None, Err(fault)) => {
                let reason = match check {
                    Some(check) if is_first || health.checks_failed >= check.failures => DownReason::Check(fault),
                    None if !self.has_room(1) => DownReason::Failing(UpstreamError::Timeout),
                    _ => return None,
                };
                Some(self.down(&mut health, reason, now))
            }
            _ => None,
        }
    }

    fn down(&self, health: &mut Health, reason: DownReason, now: Instant) -> ServerChange {
        (health.down, health.since, health.back, health.checks_passed) = (Some(reason), now, None, 0);
        health.next_look = Some(now + pause(health.looks));
        self.absent.fetch_or(DOWN, Relaxed);
        // If all servers have to be used, it is one to be tried with care.
        self.known.store(false, Relaxed);
        self.unanswered.store(0, Relaxed);
        self.failed.store(false, Relaxed);
        self.metrics.went_down();
        ServerChange { server: self.label.clone(), reason, back_after: None }
    }

    fn back(&self, health: &mut Health, now: Instant) -> Option<ServerChange> {
        let reason = health.down.take()?;
        let lasted = now.saturating_duration_since(health.since);
        (health.since, health.back, health.failures, health.bad) = (now, Some(now), 0, 0);
        self.unanswered.store(0, Relaxed);
        self.failed.store(false, Relaxed);
        self.absent.fetch_and(!DOWN, Relaxed);
        self.adaptive.begins_anew(now);
        self.metrics.came_back();
        Some(ServerChange { server: self.label.clone(), reason, back_after: Some(lasted) })
    }
}

/// The pause before the next look.
fn pause(looks: u32) -> Duration {
    spread(FIRST_PAUSE.saturating_mul(1 << looks.min(16)).min(LONGEST_PAUSE))
}

/// Up to a quarter longer or shorter, so that many gateways do not look at one time.
fn spread(time: Duration) -> Duration {
    time.mul_f64(0.75 + fastrand::f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::metrics::Metrics;

    const MS: Duration = Duration::from_millis(1);
    const REFUSED: FailedTry = FailedTry::Connect(UpstreamError::Connect);
    const CLOSED: FailedTry = FailedTry::Exchange { kept: false, error: UpstreamError::Closed };

    fn server(now: Instant) -> Server {
        let address = ServerAddress::Tcp("127.0.0.1:1".into());
        let metrics = Metrics::new("test").unwrap().server("api", "127.0.0.1:1");
        Server::new(address, None, vec!["127.0.0.1:1".parse().unwrap()], metrics, Arc::default(), now)
    }

    #[test]
    fn a_refused_connection_is_enough_and_one_look_ends_it() {
        let start = Instant::now();
        let server = server(start);
        server.asks();
        let down = server.failed(REFUSED, start, start).unwrap();
        assert_eq!((down.reason.as_str(), down.back_after), ("connect", None));
        assert!(!server.is_up());
        assert_eq!(server.failed(REFUSED, start, start), None, "it is down already");
        assert_eq!(server.due(None, true, start), None, "a pause comes first");
        let later = start + FIRST_PAUSE * 2;
        assert_eq!(
            (server.due(None, true, later), server.due(None, true, later)),
            (Some(Look::Connect), None),
            "one look at a time"
        );
        assert_eq!(server.seen(None, Ok(()), later).unwrap().back_after, Some(FIRST_PAUSE * 2));
        assert!(server.is_up());
    }

    #[test]
    fn pauses_grow_until_it_answers() {
        let start = Instant::now();
        let server = server(start);
        server.asks();
        server.failed(REFUSED, start, start);
        let mut now = start;
        for looks in 0..10 {
            let expected = FIRST_PAUSE.saturating_mul(1 << looks).min(LONGEST_PAUSE);
            assert_eq!(server.due(None, true, now + expected.mul_f64(0.7)), None, "look {looks}");
            now += expected.mul_f64(1.3);
            assert_eq!(server.due(None, true, now), Some(Look::Connect), "look {looks}");
            // Half of the time it can be connected to, and then refuses again.
            if looks % 2 == 0 {
                assert_eq!(server.seen(None, Err(CheckFault::Closed), now), None);
            } else {
                assert!(server.seen(None, Ok(()), now).is_some());
                server.asks();
                assert!(server.failed(REFUSED, now, now).is_some());
            }
        }
        assert!(server.answered(now, 1, now).is_some(), "an answer needs no look");
        server.asks();
        server.failed(REFUSED, now, now);
        assert_eq!(
            server.due(None, true, now + FIRST_PAUSE.mul_f64(1.3)),
            Some(Look::Connect),
            "the pauses begin anew"
        );
    }

    #[test]
    fn three_exchanges_must_fail_in_a_row_and_one_answer_between_them_is_enough() {
        let start = Instant::now();
        let server = server(start);
        for _ in 0..10 {
            for _ in 0..2 {
                server.asks();
                assert_eq!(server.failed(CLOSED, start, start), None);
            }
            server.asks();
            server.answered(start, 1, start);
            // One that was asked before that answer.
            assert_eq!(server.failed(CLOSED, start, start), None);
        }
        for turn in 0..3 {
            server.asks();
            assert_eq!(server.failed(CLOSED, start, start).is_some(), turn == 2);
        }
        assert_eq!(
            server.due(None, true, start + FIRST_PAUSE * 2),
            Some(Look::Answer),
            "a connection proves nothing here"
        );
    }

    #[test]
    fn a_kept_connection_that_was_closed_says_nothing_of_the_server() {
        let start = Instant::now();
        let server = server(start);
        for _ in 0..100 {
            server.asks();
            assert_eq!(
                server.failed(FailedTry::Exchange { kept: true, error: UpstreamError::Closed }, start, start),
                None
            );
        }
    }

    #[test]
    fn an_answer_to_what_was_asked_before_does_not_bring_it_back() {
        let start = Instant::now();
        let server = server(start);
        server.asks();
        server.asks();
        assert!(server.failed(REFUSED, start, start + MS).is_some());
        assert_eq!(server.answered(start, 1, start + 2 * MS), None);
        assert!(!server.is_up());
        assert!(server.answered(start + 2 * MS, 1, start + 3 * MS).is_some());
    }

    #[test]
    fn a_silent_server_is_passed_over_and_a_look_says_whether_it_is_down() {
        let start = Instant::now();
        let server = server(start);
        assert!(server.has_room(1));
        server.asks();
        assert!(!server.has_room(1), "a stranger gets one");
        server.answered(start, 1, start);
        for _ in 0..PATIENCE {
            assert!(server.has_room(1));
            server.asks();
        }
        assert!(!server.has_room(1));
        assert_eq!(server.due(None, false, start), None, "the only server is never passed over");
        assert_eq!(server.due(None, true, start), None, "a pause comes first");
        let later = start + FIRST_PAUSE * 2;
        assert_eq!((server.due(None, true, later), server.due(None, true, later)), (Some(Look::Answer), None));
        assert_eq!(server.seen(None, Ok(()), later), None);
        assert!(server.has_room(1), "it is only slow");
        server.asks();
        assert!(!server.has_room(1), "and has to show that it answers requests as well");
        assert_eq!(server.due(None, true, later + FIRST_PAUSE), None, "the pauses grow");
        let later = later + FIRST_PAUSE * 3;
        assert_eq!(server.due(None, true, later), Some(Look::Answer));
        let down = server.seen(None, Err(CheckFault::Closed), later).unwrap();
        assert_eq!((down.reason.as_str(), server.is_up()), ("timeout", false));
        assert!(server.answered(start, 1, later).is_some(), "an answer is an answer, however late");
    }

    #[test]
    fn who_gives_up_early_is_not_counted() {
        let start = Instant::now();
        let server = server(start);
        for _ in 0..10 {
            server.asks();
            server.given_up(start, start + 10 * MS);
        }
        assert_eq!(server.unanswered(), 0);
        server.asks();
        server.given_up(start, start + FIRST_PAUSE);
        assert_eq!(server.unanswered(), 1, "who has waited so long has seen a silent server");
    }

    #[test]
    fn a_name_without_an_address_is_down_until_it_has_one() {
        let start = Instant::now();
        let server = server(start);
        assert_eq!(server.resolved(Vec::new(), start), None, "what was known goes on");
        server.addresses.store(Arc::default());
        assert_eq!(server.resolved(Vec::new(), start).unwrap().reason, DownReason::Unresolved);
        assert!(!server.has_address() && server.due(None, true, start + LONGEST_PAUSE).is_none());
        let (a, b) = ("192.0.2.1:1".parse().unwrap(), "[2001:db8::1]:1".parse().unwrap());
        assert!(server.resolved(vec![a, b], start).unwrap().back_after.is_some());
        assert_eq!(server.addresses().collect::<Vec<_>>(), [a, b]);
        server.prefer(b);
        assert_eq!(server.addresses().collect::<Vec<_>>(), [b, a]);
    }

    #[test]
    fn checks_find_a_server_down_and_bring_it_back_by_their_thresholds() {
        let start = Instant::now();
        let server = server(start);
        let check = CheckSettings {
            http: None,
            port: None,
            interval: Duration::from_secs(4),
            timeout: Duration::from_secs(1),
            failures: 3,
            successes: 2,
        };
        let mut now = start;
        let mut look = |found: Result<(), CheckFault>| {
            assert_eq!(server.due(Some(&check), true, now), Some(Look::Check));
            assert_eq!(server.due(Some(&check), true, now), None, "one at a time");
            let change = server.seen(Some(&check), found, now).map(|change| change.back_after.is_some());
            if change.is_none() {
                assert_eq!(server.due(Some(&check), true, now + check.interval.mul_f64(0.7)), None);
            }
            now += check.interval.mul_f64(1.3);
            change
        };
        let (well, ill) = (Ok(()), Err(CheckFault::Status));
        assert_eq!(look(ill), Some(false), "the first check decides alone");
        assert_eq!([well, ill, well, well].map(&mut look), [None, None, None, Some(true)]);
        assert_eq!([ill, ill, well, ill, ill, ill].map(&mut look), [None, None, None, None, None, Some(false)]);
        assert_eq!(server.state().down.map(DownReason::as_str), Some("check_status"));
        server.asks();
        assert_eq!(server.answered(now, 1, now), None, "what a check found, only a check takes back");
    }
}
