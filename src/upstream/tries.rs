//! The tries of one request: which servers have had it, and whether another one may. Pure: time is an argument. It must not
//! know how a request is sent.

use super::Server;
use super::adaptive::AdaptiveBounds;
use super::callers::CallerRank;
use super::queue::{Queue, QueuePlace, QueueTurn};
use crate::telemetry::metrics::UpstreamError;
use smallvec::SmallVec;
use std::sync::Arc;
use std::task::Waker;
use std::time::Instant;

/// How often a request is repeated after tries that took their time or reached a server. Connections that were refused at
/// once do not count: each server is tried once at most.
const REPEATS: usize = 3;

/// How a try failed before anything of an answer was passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailedTry {
    /// There was no connection: the server has got nothing of the request.
    Connect(UpstreamError),
    /// The server may have got the request. `kept`: the connection had carried another one before.
    Exchange { kept: bool, error: UpstreamError },
}

impl FailedTry {
    /// There was no connection, and that was said at once: it cost the server next to nothing.
    pub(super) fn is_refused(self) -> bool {
        matches!(self, Self::Connect(error) if is_refusal(error))
    }

    pub fn error(self) -> UpstreamError {
        match self {
            Self::Connect(error) | Self::Exchange { error, .. } => error,
        }
    }
}

/// Whether a server that fails in this way lets nobody in, however it answers on connections that it has.
pub(super) fn is_refusal(error: UpstreamError) -> bool {
    use UpstreamError as E;
    matches!(error, E::Connect | E::TlsUntrusted | E::TlsName | E::TlsExpired | E::TlsHandshake | E::NoHttp2)
}

/// Belongs to a request from its first try to its end.
#[derive(Default)]
pub struct Tries {
    tried: SmallVec<[Arc<Server>; 2]>,
    current: Option<CurrentTry>,
    /// The server to ask once more, on a new connection.
    once_more: Option<Arc<Server>>,
    count: usize,
    costly: usize,
    key: Option<u64>,
    caller: u64,
    weight: u32,
    rank: CallerRank,
    /// The server of the last try counts this request as one in flight.
    counted: bool,
    /// An adaptive limit of that server, with these bounds, counts it as one that waits for its head.
    awaited: Option<AdaptiveBounds>,
    /// Its body comes from the client meanwhile.
    streams: bool,
    queued: Option<QueuePlace>,
}

struct CurrentTry {
    server: Arc<Server>,
    asked: Instant,
}

impl Tries {
    /// The request's place among the servers, from [`super::Upstream::key_of`], if it has one.
    pub fn keyed(&mut self, key: Option<u64>) {
        self.key = key;
    }

    /// Who asks, as a number that is spread evenly: for the order in which requests wait.
    pub fn called_by(&mut self, caller: u64, weight: u32) {
        (self.caller, self.weight) = (caller, weight);
    }

    /// The client still sends the body, and how long that takes says nothing about the server. To be said before an answer.
    pub fn streams_body(&mut self) {
        self.streams = true;
    }

    pub(super) fn weight(&self) -> u32 {
        self.weight
    }

    pub(super) fn caller(&self) -> u64 {
        self.caller
    }

    pub(super) fn ranked(&mut self, rank: CallerRank) {
        self.rank = rank;
    }

    pub(super) fn key(&self) -> Option<u64> {
        self.key
    }

    /// How many there were.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The server that was asked last.
    pub fn last(&self) -> Option<&Server> {
        self.current.as_ref().map(|current| &*current.server).or(self.tried.last().map(|server| &**server))
    }

    pub(super) fn has(&self, server: &Arc<Server>) -> bool {
        self.tried.iter().any(|tried| Arc::ptr_eq(tried, server))
    }

    /// The server counts it already as one in flight.
    pub(super) fn begin(&mut self, server: Arc<Server>, now: Instant) {
        server.asks();
        self.counted = true;
        self.count += 1;
        self.current = Some(CurrentTry { server, asked: now });
    }

    /// An adaptive limit of the server counts it already.
    pub(super) fn awaits_head(&mut self, bounds: Option<AdaptiveBounds>) {
        self.awaited = bounds;
    }

    pub(super) fn is_awaited(&self) -> bool {
        self.awaited.is_some()
    }

    /// A head has come, `asked`: since the request was sent, unless another head came before. After an interim one, the server
    /// is still at work, but a tunnel is none.
    pub(super) fn has_head(&mut self, status: u16, asked: Option<Instant>, now: Instant) {
        if status < 200 && status != 101 {
            return;
        }
        if let (Some(bounds), Some(asked), 200..400, false) = (self.awaited, asked, status, self.streams)
            && let Some(server) = self.last()
        {
            server.took(bounds, asked, now);
        }
        self.head_is_over();
    }

    fn head_is_over(&mut self) {
        if self.awaited.take().is_some()
            && let Some(server) = self.last()
        {
            server.head_is_over();
        }
    }

    pub(super) fn is_queued(&self) -> bool {
        self.queued.is_some()
    }

    /// Waits in the queue. `None`: there is no room in it.
    pub(super) fn queue(&mut self, queue: &Arc<Queue>, most: usize, waker: &Waker) -> Option<QueueTurn> {
        if self.queued.is_none() {
            self.queued = Some(queue.enter(most, self.rank, self.count > 0, waker)?);
        }
        self.queued.as_ref().map(|place| place.turn(waker))
    }

    /// It waits no longer.
    pub fn leave_queue(&mut self) {
        self.queued = None;
    }

    pub(super) fn will_ask_once_more(&self) -> bool {
        self.once_more.is_some()
    }

    pub(super) fn once_more(&mut self) -> Option<Arc<Server>> {
        self.once_more.take()
    }

    /// The current try was answered: the server, and when it was asked. `None`: it was answered before.
    pub(super) fn answered(&mut self) -> Option<(Arc<Server>, Instant)> {
        let CurrentTry { server, asked } = self.current.take()?;
        self.tried.push(Arc::clone(&server));
        Some((server, asked))
    }

    /// The current try failed: the server, when it was asked, and whether the rules allow another try.
    /// `repeatable`: sending it twice does no harm, and all that was sent is at hand.
    pub(super) fn failed(&mut self, failure: FailedTry, repeatable: bool) -> Option<(Arc<Server>, Instant, bool)> {
        let CurrentTry { server, asked } = self.current.take()?;
        self.costly += usize::from(!failure.is_refused());
        let again = match failure {
            FailedTry::Connect(_) => true,
            FailedTry::Exchange { .. } => repeatable,
        };
        // The connection was dead already, which is not the server's fault.
        if again && matches!(failure, FailedTry::Exchange { kept: true, error: UpstreamError::Closed }) {
            self.once_more = Some(Arc::clone(&server));
        } else {
            if self.awaited.take().is_some() {
                server.head_is_over();
            }
            if std::mem::take(&mut self.counted) {
                server.is_done();
            }
        }
        self.tried.push(Arc::clone(&server));
        Some((server, asked, again && self.costly <= REPEATS))
    }
}

/// A request that ends while it waits for a server: its client is gone, or it was refused for its body.
impl Tries {
    pub fn given_up(&mut self, now: Instant) {
        if let Some(CurrentTry { server, asked }) = self.current.take() {
            server.given_up(asked, now);
            if let Some(bounds) = self.awaited.take() {
                if !self.streams {
                    server.took_too_long(bounds, asked, now);
                }
                server.head_is_over();
            }
            if std::mem::take(&mut self.counted) {
                server.is_done();
            }
        }
    }
}

impl Drop for Tries {
    fn drop(&mut self) {
        self.head_is_over();
        if self.counted
            && let Some(server) = self.last()
        {
            server.is_done();
        }
    }
}
