//! What an exchange notes for its spans, if they are exported: when it asked the store and servers, and what came of it.

use super::new_span_id;
use crate::telemetry::spans::{WaitSpan, WaitedOn};
use crate::upstream::Server;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Instant;

/// An exchange has few tries: the rest of a long row is left out.
const MOST_TRIES: usize = 16;

#[derive(Default)]
pub(super) struct SpanNotes {
    /// When the store was asked, and when it answered.
    store: Option<(Instant, Option<Instant>)>,
    tries: Vec<TryNote>,
}

struct TryNote {
    server: Arc<Server>,
    began: Instant,
    ended: Option<Instant>,
    status: Option<u16>,
    error: Option<&'static str>,
}

impl SpanNotes {
    pub(super) fn asks_store(&mut self) {
        self.store = Some((Instant::now(), None));
    }

    pub(super) fn learned(&mut self) {
        if let Some((_, answered @ None)) = &mut self.store {
            *answered = Some(Instant::now());
        }
    }

    pub(super) fn tries(&mut self, server: &Arc<Server>) {
        if self.tries.len() < MOST_TRIES {
            let (server, began) = (Arc::clone(server), Instant::now());
            self.tries.push(TryNote { server, began, ended: None, status: None, error: None });
        }
    }

    pub(super) fn answered(&mut self, status: u16) {
        if let Some(last) = self.tries.last_mut() {
            last.status = Some(status);
        }
    }

    pub(super) fn failed(&mut self, error: &'static str) {
        if let Some(last) = self.tries.last_mut() {
            (last.ended, last.error) = (Some(Instant::now()), Some(error));
        }
    }

    /// The spans of an exchange that has ended. `last`: what the backend was told is its parent. `failure`: why the exchange
    /// failed, if it did.
    pub(super) fn waits(
        &self,
        started: Instant,
        ended: Instant,
        last: NonZeroU64,
        failure: Option<&'static str>,
    ) -> Vec<WaitSpan> {
        let span = |id: NonZeroU64, began: Instant, end: Option<Instant>, on| WaitSpan {
            id: id.get(),
            after: began.saturating_duration_since(started),
            took: end.unwrap_or(ended).saturating_duration_since(began),
            on,
        };
        let store = self.store.map(|(began, answered)| span(new_span_id(), began, answered, WaitedOn::Store));
        let count = self.tries.len();
        let tries = self.tries.iter().enumerate().map(|(index, note)| {
            let id = if index + 1 == count { last } else { new_span_id() };
            let on = WaitedOn::Server {
                name: note.server.label().to_owned(),
                status: note.status,
                error: note.error.or(failure.filter(|_| note.status.is_none())),
            };
            span(id, note.began, note.ended, on)
        });
        store.into_iter().chain(tries).collect()
    }
}
