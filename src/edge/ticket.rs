//! The right to use a lane. There is none without a permit of the pipeline.

use super::exchange::{Exchange, HeadSlice};
use crate::policy::Permit;
use crate::reply::answer::{self, Credentials};
use crate::reply::cors::CorsGrant;
use crate::request::body::BodyScanner;
use crate::request::route::{HeaderEdits, Route};
use crate::request::view::{Framing, Method};
use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// The right to use a lane, with all that is needed to the end. Made by `connection` from a plan, so that no request gets
/// here without a permit.
pub(super) struct Ticket {
    pub(super) _permit: Permit,
    pub(super) body: Option<BodyScanner>,
    /// As the request line says it.
    pub(super) method: Method,
    pub(super) framing: Framing,
    pub(super) expects_continue: bool,
    pub(super) keep_alive: bool,
    pub(super) http10: bool,
    /// The token came in the query, and the client is to be told.
    pub(super) deprecated: bool,
    /// Must not leave in the answer.
    pub(super) token: Option<OwnToken>,
    /// Whether a page may read what is said when the backend fails.
    pub(super) grant: CorsGrant,
    /// Raised when the backend has agreed to a WebSocket. `None`: the client asked for none.
    pub(super) tunnel: Option<Arc<AtomicBool>>,
    pub(super) exchange: Box<Exchange>,
}

/// The token of a request. Its type prints nothing, and it lives as long as the exchange.
#[derive(Clone)]
pub(super) enum OwnToken {
    InHead(HeadSlice),
    /// It was written with escapes.
    Decoded(Box<[u8]>),
}

impl OwnToken {
    pub(super) fn of(token: Cow<'_, [u8]>, head: &[u8]) -> Self {
        match token {
            Cow::Borrowed(token) => Self::InHead(HeadSlice::of(token, head)),
            Cow::Owned(token) => Self::Decoded(token.into()),
        }
    }

    /// Its bytes, with the head that it came in.
    pub(super) fn within<'a>(&'a self, head: &'a [u8]) -> &'a [u8] {
        match self {
            Self::InHead(place) => place.within(head),
            Self::Decoded(token) => token,
        }
    }
}

impl Ticket {
    fn token(&self) -> Option<&[u8]> {
        self.token.as_ref().map(|token| token.within(&self.exchange.head))
    }

    /// What the route writes into the backend's answer, and takes out.
    pub(super) fn response_headers(&self) -> &HeaderEdits {
        const NONE: &HeaderEdits = &HeaderEdits { set: Vec::new(), remove: Vec::new() };
        self.exchange.route().map_or(NONE, |route| &route.response_headers)
    }

    /// What tollgate says in the final answer.
    pub(super) fn own_fields(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let exchange = &self.exchange;
        answer::own_fields(&exchange.request_id, self.deprecated, exchange.hsts(), exchange.limit_fields())
    }

    /// What of this request must not leave in a URL of the answer.
    pub(super) fn credentials(&self) -> Credentials<'_> {
        let rules = &self.exchange.snapshot.pipeline.rules;
        Credentials {
            names: &rules.names,
            token: self.token(),
            fragments_pass: self.exchange.route().is_some_and(Route::is_web_page),
        }
    }
}
