//! The one driver that follows a store's changes: it begins sessions, notices their silence, ends and repeats them, and says
//! which [`Event`] when. What differs between stores is behind [`ChangeSource`] and [`Subscription`]; the driver knows no
//! protocol and nothing of what a record says.
//!
//! What it holds:
//! * What arrived before the answer to a beat has taken effect before [`Event::Alive`] is said for that beat.
//! * Whoever waits for a confirmation gets it only after the changes before it have taken effect.
//! * A source that does not answer a beat, and from which nothing else arrives, is lost within the beat and its silence.
//! * Every loss is said once, and logged once a minute for each reason; every new session begins with [`Event::Hearing`].

use super::{Change, Event, Heard, Mark, StoreError, Unheard};
use crate::clock::{LATE, Now};
use async_trait::async_trait;
use futures_util::future::{BoxFuture, pending};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep, timeout_at};

/// Pauses between attempts, and the last one from there on. A quarter more at random, so that gateways don't come in step.
const PAUSES_MS: [u64; 5] = [0, 100, 200, 300, 400];
/// What worked for so long is worth an attempt at once.
const WORKED: Duration = Duration::from_secs(2);
/// Between two lines of the log on one reason of a loss.
const LOG_PAUSE: Duration = Duration::from_secs(60);
/// Reasons in that time; further ones are not logged.
const LOG_REASONS: usize = 8;
/// Messages that may wait to be taken in. A gateway that falls further behind begins again and revalidates everything.
const INBOX: usize = 65_536;
/// Messages that are taken in together.
const BATCH: usize = 4_096;
/// Confirmations that may wait to be written. Beyond them the oldest are dropped: somebody floods the channel, and whoever
/// waits is told that this gateway did not confirm.
const CONFIRMATIONS: usize = 1_024;

/// How often in a row a late timer is an excuse: a server that is down must be noticed on a busy machine as well.
const EXCUSES: u32 = 3;

/// How often a source is asked, and how long it may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// Between two beats.
    pub(super) beat: Duration,
    /// How long nothing may arrive while the answer to a beat is awaited. `None` for what is local: the answer says when a
    /// disk is done, and until then nothing is promised.
    pub(super) silence: Option<Duration>,
    /// Between two calls of [`Subscription::upkeep`], the first right away. `None`: never.
    pub(super) upkeep: Option<Duration>,
}

/// Whether somebody notifies of changes at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Coverage {
    Told,
    /// Why nobody does, for the log.
    Untold(String),
}

/// Why a session ended, or none began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Loss {
    /// The store said so, or did not answer.
    Store(StoreError),
    /// The connection was closed.
    Closed,
    /// Nothing arrived from a server for so long.
    Silent { server: String, time: Duration },
    /// More changes arrived than wait to be taken in.
    Overrun,
    /// Nobody takes in what arrives.
    Abandoned,
    /// Nobody notifies of all changes, and why.
    Untold(String),
    /// Of several servers that have a part of the records each, one is missing, and why.
    Incomplete(String),
}

impl From<StoreError> for Loss {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl Loss {
    const fn cause(&self) -> Unheard {
        match self {
            Self::Store(StoreError::Timeout | StoreError::Overloaded | StoreError::CircuitOpen)
            | Self::Silent { .. } => Unheard::Timeout,
            Self::Store(StoreError::Unavailable(_)) | Self::Closed => Unheard::Unavailable,
            Self::Store(StoreError::Denied(_)) => Unheard::Denied,
            Self::Store(StoreError::ReadOnly(_)) => Unheard::Standby,
            Self::Store(StoreError::Garbage(_) | StoreError::Unusable(_)) => Unheard::Garbage,
            Self::Overrun | Self::Abandoned => Unheard::Overrun,
            Self::Untold(_) => Unheard::NoTriggers,
            Self::Incomplete(_) => Unheard::Incomplete,
        }
    }
}

impl fmt::Display for Loss {
    /// For the log, behind what is lost.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Store(
                StoreError::Unavailable(why)
                | StoreError::Denied(why)
                | StoreError::ReadOnly(why)
                | StoreError::Unusable(why)
                | StoreError::Garbage(why),
            ) => f.write_str(why),
            Self::Store(error) => error.fmt(f),
            Self::Closed => f.write_str("the connection was closed"),
            Self::Silent { server, time } => write!(f, "{server} sent nothing for {time:?}"),
            Self::Overrun => write!(f, "more than {INBOX} changes arrived before they could be taken in"),
            Self::Abandoned => f.write_str("nobody takes in what arrives"),
            Self::Untold(why) | Self::Incomplete(why) => f.write_str(why),
        }
    }
}

/// Where a store's changes arrive from.
#[async_trait]
pub(super) trait ChangeSource: Send {
    type Subscription: Subscription;

    /// What the log calls it.
    fn label(&self) -> String;

    fn pace(&self) -> Pace;

    /// Connects, subscribes, and proves that changes arrive in `inbox`. Returns only once no change from now on can be
    /// missed; bounds its own time. What it puts into the inbox is taken in after [`Event::Hearing`].
    async fn begin(
        &mut self,
        inbox: Inbox<<Self::Subscription as Subscription>::Wait>,
    ) -> Result<Begun<Self::Subscription>, Loss>;

    /// Whether, before a session has begun, it is open if anybody notifies of changes here: nothing is said of it then.
    fn may_be_untold(&self) -> bool {
        false
    }

    /// Called before [`Event::Hearing`] ends a loss.
    fn on_hearing(&mut self) {}

    /// Called behind [`Event::Deaf`].
    fn on_lost(&mut self) {}

    /// Called when following ends, whichever way: the gateway leaves the store's register. May be called at any moment and
    /// must not block.
    fn sign_off(&mut self) {}
}

/// One session of a source: a connection that has subscribed. All calls may run at once, and any may be dropped half-way.
/// An error ends the session.
#[async_trait]
pub(super) trait Subscription: Send + Sync {
    /// What a confirmation is asked for by.
    type Wait: Send;

    /// Asks for a sign of life, on the way that changes arrive: when this returns, all changes that were made before it was
    /// called are in the inbox. Says how far the store's list of changes was told by then.
    async fn beat(&self) -> Result<Option<Mark>, Loss>;

    /// What is to be done every so often beside the beats: staying in the register of gateways, and looking whether
    /// somebody notifies of changes, if that can change.
    async fn upkeep(&self) -> Result<Option<Coverage>, Loss> {
        Ok(None)
    }

    /// Confirms that all that was told before these has taken effect. What is left in `waits` is tried again with the next
    /// upkeep.
    async fn confirm(&self, _waits: &mut Vec<Self::Wait>) -> Result<(), Loss> {
        Ok(())
    }
}

/// A session that has begun.
pub(super) struct Begun<S> {
    pub(super) subscription: S,
    /// Reads the connection, where no task of its own does. It is polled first, so that what has arrived is in the inbox
    /// before it is judged that nothing arrived. Returns what ended the connection.
    pub(super) reading: BoxFuture<'static, Loss>,
    pub(super) coverage: Coverage,
    /// How far the store's list of changes was told when the session began.
    pub(super) mark: Option<Mark>,
    /// The servers, for the log, where there may be others.
    pub(super) servers: Option<String>,
}

impl<S> Begun<S> {
    /// One whose messages get into the inbox by themselves.
    pub(super) fn new(subscription: S) -> Self {
        Self { subscription, reading: Box::pin(pending()), coverage: Coverage::Told, mark: None, servers: None }
    }
}

/// What arrives from a source.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Message<W> {
    Changed(Vec<Change>),
    /// Anything may have changed.
    Everything,
    /// Somebody wants to know when all before this has taken effect.
    Wait(W),
    /// Nothing arrives any more, and why.
    Ended(Loss),
}

/// Takes messages of one session in the order in which they arrive. Never blocks.
pub(super) struct Inbox<W> {
    sender: mpsc::Sender<Message<W>>,
    counts: Arc<Counts>,
}

/// What was put into an inbox.
#[derive(Default)]
struct Counts {
    arrived: AtomicU64,
    overrun: AtomicBool,
}

impl<W> Inbox<W> {
    pub(super) fn put(&self, message: Message<W>) {
        self.counts.arrived.fetch_add(1, Ordering::Relaxed);
        if let Err(mpsc::error::TrySendError::Full(_)) = self.sender.try_send(message) {
            self.counts.overrun.store(true, Ordering::Relaxed);
        }
    }
}

/// The other end of an [`Inbox`].
struct Arriving<W> {
    receiver: mpsc::Receiver<Message<W>>,
    counts: Arc<Counts>,
}

impl<W> Arriving<W> {
    fn pair() -> (Inbox<W>, Self) {
        let (sender, receiver) = mpsc::channel(INBOX);
        let counts = Arc::<Counts>::default();
        (Inbox { sender, counts: Arc::clone(&counts) }, Self { receiver, counts })
    }

    /// Waits for at least one message.
    async fn next(&mut self, batch: &mut Vec<Message<W>>) -> Result<(), Loss> {
        match self.receiver.recv_many(batch, BATCH).await {
            0 => Err(Loss::Closed),
            _ => self.is_whole(),
        }
    }

    /// What is there by now, and nothing that arrives meanwhile.
    fn ready(&mut self, batch: &mut Vec<Message<W>>) -> Result<(), Loss> {
        for _ in 0..self.receiver.len() {
            batch.extend(self.receiver.try_recv());
        }
        self.is_whole()
    }

    fn is_whole(&self) -> Result<(), Loss> {
        if self.counts.overrun.load(Ordering::Relaxed) {
            return Err(Loss::Overrun);
        }
        Ok(())
    }
}

/// Confirmations that are asked for.
struct Waiting<W> {
    queue: Mutex<VecDeque<W>>,
    more: Notify,
}

impl<W> Waiting<W> {
    fn push(&self, wait: W) {
        let mut queue = self.queue.lock();
        if queue.len() == CONFIRMATIONS {
            queue.pop_front();
        }
        queue.push_back(wait);
        self.more.notify_one();
    }
}

/// Follows changes until it is dropped.
pub(super) async fn follow<S: ChangeSource>(source: S, clock: fn() -> Now, heard: Heard<'_>) {
    let mut following = Following { source, clock, heard, state: State::Unknown, logged: Vec::new() };
    let mut attempt = 0;
    loop {
        let began = Instant::now();
        let why = following.session().await;
        following.lost(&why);
        attempt = if began.elapsed() > WORKED { 0 } else { attempt + 1 };
        let pause = PAUSES_MS[attempt.min(PAUSES_MS.len() - 1)];
        sleep(Duration::from_millis(pause + fastrand::u64(0..=pause / 4))).await;
    }
}

struct Following<'a, S: ChangeSource> {
    source: S,
    clock: fn() -> Now,
    heard: Heard<'a>,
    state: State,
    /// The lines of the log on this loss, and when they were written.
    logged: Vec<(Instant, String)>,
}

/// What was said last.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Unknown,
    Hearing,
    Lost,
    Untold,
}

impl<S: ChangeSource> Following<'_, S> {
    /// One session, from its beginning to its end. Returns what ended it.
    async fn session(&mut self) -> Loss {
        let (inbox, mut arriving) = Arriving::pair();
        let asked_ms = (self.clock)().mono_ms;
        let Begun { subscription, mut reading, coverage, mark, servers } = match self.source.begin(inbox).await {
            Ok(begun) => begun,
            Err(why) => return why,
        };
        self.cover(coverage);
        if let Some(servers) = servers
            && self.state == State::Hearing
        {
            log::info!("{}: changes are heard from {servers}", self.source.label());
        }
        // A gateway that ends before the first beat knows how far it was, too.
        if mark.is_some() && self.state == State::Hearing {
            (self.heard)(Event::Alive { asked_ms, mark });
        }
        let pace = self.source.pace();
        let waiting = Waiting { queue: Mutex::default(), more: Notify::new() };
        let counts = Arc::clone(&arriving.counts);
        // These borrow nothing of `self`, so that messages are taken in while they wait for answers.
        let (answers, mut answered) = mpsc::channel(1);
        let mut beating = pin!(beat_on(&subscription, pace, self.clock, &counts, answers));
        let (coverages, mut covered) = mpsc::channel(1);
        let mut keeping = pin!(keep_up(&subscription, pace, &waiting, coverages));
        let mut batch = Vec::new();
        loop {
            let taken_in = tokio::select! {
                biased;
                why = &mut reading => return why,
                Some((asked_ms, mark)) = answered.recv() => {
                    // What arrived before the answer lies in the inbox by now, and comes first.
                    let all = arriving.ready(&mut batch).and_then(|()| self.take_in(&mut batch, &waiting));
                    if all.is_ok() && self.state == State::Hearing {
                        (self.heard)(Event::Alive { asked_ms, mark });
                    }
                    all
                }
                arrived = arriving.next(&mut batch) => {
                    arrived.and_then(|()| self.take_in(&mut batch, &waiting))
                }
                Some(coverage) = covered.recv() => {
                    self.cover(coverage);
                    Ok(())
                }
                why = &mut beating => return why,
                why = &mut keeping => return why,
            };
            if let Err(why) = taken_in {
                return why;
            }
        }
    }

    /// Passes messages on, and lets who waits behind them be told only then.
    fn take_in(
        &self,
        batch: &mut Vec<Message<<S::Subscription as Subscription>::Wait>>,
        waiting: &Waiting<<S::Subscription as Subscription>::Wait>,
    ) -> Result<(), Loss> {
        let (mut changes, mut everything, mut waits, mut ended) = (Vec::new(), false, Vec::new(), None);
        for message in batch.drain(..) {
            match message {
                Message::Changed(more) => changes.extend(more),
                Message::Everything => everything = true,
                Message::Wait(wait) => waits.push(wait),
                Message::Ended(why) => ended = Some(why),
            }
        }
        if !changes.is_empty() {
            (self.heard)(Event::Changed(changes));
        }
        // Where nobody notifies of changes, one message of everything is no promise that there will be others.
        if everything && self.state == State::Hearing {
            (self.heard)(Event::Hearing);
        }
        waits.into_iter().for_each(|wait| waiting.push(wait));
        ended.map_or(Ok(()), Err)
    }

    fn cover(&mut self, coverage: Coverage) {
        match (coverage, self.state) {
            (Coverage::Told, State::Hearing) | (Coverage::Untold(_), State::Lost | State::Untold) => {}
            (Coverage::Told, State::Unknown | State::Lost | State::Untold) => {
                self.logged.clear();
                self.state = State::Hearing;
                self.source.on_hearing();
                (self.heard)(Event::Hearing);
            }
            (Coverage::Untold(why), State::Unknown) => {
                self.state = State::Untold;
                (self.heard)(Event::Untold);
                (self.heard)(Event::Unheard(Unheard::NoTriggers, why.clone()));
                self.log(&format!("a revoked token works for up to positive_ttl: {why}"));
            }
            (Coverage::Untold(why), State::Hearing) => {
                self.deaf();
                (self.heard)(Event::Unheard(Unheard::NoTriggers, why.clone()));
                self.log(&why);
            }
        }
    }

    fn lost(&mut self, why: &Loss) {
        match self.state {
            State::Hearing => {
                if matches!(why, Loss::Silent { .. }) {
                    (self.heard)(Event::Silent);
                }
                self.deaf();
            }
            State::Unknown if !self.source.may_be_untold() => self.deaf(),
            State::Unknown | State::Lost | State::Untold => {}
        }
        (self.heard)(Event::Unheard(why.cause(), why.to_string()));
        self.log(&format!("changes cannot be followed, trying again: {why}"));
    }

    fn deaf(&mut self) {
        self.state = State::Lost;
        (self.heard)(Event::Deaf);
        self.source.on_lost();
    }

    /// Each reason once a minute, and not endlessly many.
    fn log(&mut self, why: &str) {
        self.logged.retain(|(at, _)| at.elapsed() <= LOG_PAUSE);
        if self.logged.len() < LOG_REASONS && !self.logged.iter().any(|(_, logged)| logged == why) {
            log::warn!("{}: {why}", self.source.label());
            self.logged.push((Instant::now(), why.to_owned()));
        }
    }
}

impl<S: ChangeSource> Drop for Following<'_, S> {
    fn drop(&mut self) {
        self.source.sign_off();
    }
}

fn ticks(every: Duration) -> Interval {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// Asks for signs of life. Returns what ended it.
async fn beat_on<S: Subscription>(
    subscription: &S,
    pace: Pace,
    clock: fn() -> Now,
    counts: &Counts,
    answers: mpsc::Sender<(u64, Option<Mark>)>,
) -> Loss {
    let mut ticks = ticks(pace.beat);
    loop {
        ticks.tick().await;
        let asked_ms = clock().mono_ms;
        let answer = match pace.silence {
            Some(silence) => answer_within(subscription, silence, counts).await,
            None => subscription.beat().await,
        };
        let told = match answer {
            Ok(mark) => answers.send((asked_ms, mark)).await,
            Err(why) => return why,
        };
        if told.is_err() {
            return Loss::Abandoned;
        }
    }
}

/// The answer to a beat, unless nothing at all arrives for so long: a flood of changes is a sign of life, too.
async fn answer_within<S: Subscription>(
    subscription: &S,
    silence: Duration,
    counts: &Counts,
) -> Result<Option<Mark>, Loss> {
    let mut answer = subscription.beat();
    let (mut arrived, mut excused) = (counts.arrived.load(Ordering::Relaxed), 0);
    loop {
        let due = Instant::now() + silence;
        if let Ok(answer) = timeout_at(due, &mut answer).await {
            return answer;
        }
        let by_now = counts.arrived.load(Ordering::Relaxed);
        let is_late = due.elapsed() > LATE && excused < EXCUSES;
        if by_now == arrived && !is_late {
            return Err(Loss::Silent { server: "the server".into(), time: silence });
        }
        excused = if is_late { excused + 1 } else { 0 };
        arrived = by_now;
    }
}

/// Stays registered and confirms, beside the beats: a store that is slow to write must not keep changes back. Returns what
/// ended it.
async fn keep_up<S: Subscription>(
    subscription: &S,
    pace: Pace,
    waiting: &Waiting<S::Wait>,
    coverages: mpsc::Sender<Coverage>,
) -> Loss {
    let mut ticks = pace.upkeep.map(ticks);
    let mut waits = Vec::new();
    loop {
        let due = async {
            match &mut ticks {
                Some(ticks) => {
                    ticks.tick().await;
                }
                None => pending().await,
            }
        };
        tokio::select! {
            biased;
            () = due => match subscription.upkeep().await {
                Ok(None) => {}
                Ok(Some(coverage)) => {
                    if coverages.send(coverage).await.is_err() {
                        return Loss::Abandoned;
                    }
                }
                Err(why) => return why,
            },
            () = waiting.more.notified() => {}
        }
        waits.extend(std::mem::take(&mut *waiting.queue.lock()));
        let surplus = waits.len().saturating_sub(CONFIRMATIONS);
        waits.drain(..surplus);
        if !waits.is_empty()
            && let Err(why) = subscription.confirm(&mut waits).await
        {
            return why;
        }
    }
}

#[cfg(test)]
mod tests;
