//! An exchange that goes on (a download, an upload, a tunnel) lasts no longer than the right to it: its token is checked again
//! when its store tells of a change, and each second besides. It decides nothing itself: the authenticator of the
//! configuration in force is asked as for a new request.

use super::ticket::{OwnToken, Ticket};
use super::{Snapshot, now};
use crate::identity::{Checked, Mode, TokenStatus};
use crate::policy::within_terms;
use crate::reply::Cause;
use crate::request::view::Method;
use crate::store::credential::Digest;
use arc_swap::ArcSwap;
use bytes::Bytes;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::time::timeout;

/// Shorter exchanges are not watched: what they were permitted by is as new as their verdict.
pub(super) const AFTER: Duration = Duration::from_secs(1);
/// For what no store tells of: the end of a token's own time, and that of an answer in the cache.
const EVERY: Duration = Duration::from_secs(1);

/// What an exchange has to show for itself once it lasts.
pub(super) struct Recheck<'g> {
    live: &'g ArcSwap<Snapshot>,
    head: Bytes,
    token: OwnToken,
    digest: Digest,
    client: Option<IpAddr>,
    method: Method,
}

impl<'g> Recheck<'g> {
    /// `None`: it needs no token.
    pub(super) fn of(ticket: &Ticket, live: &'g ArcSwap<Snapshot>) -> Option<Self> {
        let exchange = &ticket.exchange;
        exchange.facts.principal.as_ref()?;
        let (token, digest) = (ticket.token.clone()?, exchange.facts.token?);
        Some(Self {
            live,
            head: exchange.head.clone(),
            token,
            digest,
            client: exchange.facts.client,
            method: exchange.facts.method,
        })
    }

    /// Comes back when the token gives no right any more, with the reason.
    pub(super) async fn ended(self) -> Cause {
        loop {
            // A reload may have put other stores in their place.
            let snapshot = self.live.load_full();
            let authenticator = &snapshot.pipeline.authenticator;
            let watch = authenticator.watch(&self.digest);
            let mut changed = pin!(watch.changed());
            // Before the question, so that no change is missed between the two.
            changed.as_mut().enable();
            let answer = match authenticator.check(self.token.within(&self.head), &self.digest, now(), Mode::Serve) {
                Checked::Known(answer, _) => Ok(answer),
                Checked::Waiting(lookup) => lookup.answer().await.0,
                // Not when asked to serve.
                Checked::NotAsked => return Cause::Bug,
            };
            match answer {
                Ok(TokenStatus::Valid(principal)) => {
                    if let Err(fault) = within_terms(&principal, self.client, self.method) {
                        return Cause::Policy(fault);
                    }
                }
                Ok(TokenStatus::Invalid(why)) => return Cause::Identity(why),
                Err(why) => return Cause::CannotTell(why),
            }
            // Whichever comes first.
            let _ = timeout(EVERY, changed).await;
        }
    }
}

/// The same for an exchange that may need no token, and then goes on for ever.
pub(super) async fn ended(recheck: Option<Recheck<'_>>) -> Cause {
    match recheck {
        Some(recheck) => recheck.ended().await,
        None => std::future::pending().await,
    }
}

/// The watch over one exchange: nothing but a point in time until it lasts.
pub(super) enum Standing<'g> {
    Unwatched,
    Young(Instant, Option<Recheck<'g>>),
    Watched(Pin<Box<dyn Future<Output = Cause> + Send + 'g>>),
}

impl<'g> Standing<'g> {
    pub(super) fn since(started: Instant, recheck: Option<Recheck<'g>>) -> Self {
        recheck.map_or(Self::Unwatched, |recheck| Self::Young(started + AFTER, Some(recheck)))
    }

    /// When [`Self::poll_ended`] is to be asked even if nothing has happened.
    pub(super) fn due(&self) -> Option<Instant> {
        match self {
            Self::Young(due, _) => Some(*due),
            Self::Unwatched | Self::Watched(_) => None,
        }
    }

    /// The time named by [`Self::due`] has come.
    pub(super) fn begin(&mut self) {
        if let Self::Young(_, recheck) = self
            && let Some(recheck) = recheck.take()
        {
            *self = Self::Watched(Box::pin(recheck.ended()));
        }
    }

    /// Ready when the exchange must end.
    pub(super) fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<Cause> {
        match self {
            Self::Watched(ended) => ended.as_mut().poll(cx),
            Self::Unwatched | Self::Young(..) => Poll::Pending,
        }
    }
}
