//! One recent request for each bucket of a route's latencies, so that a point in a plot leads to a line of the access log. A
//! request replaces another only where that one is old: nearly all requests pay for one comparison. Nothing here waits or grows.

use super::metrics::{LATENCY_BUCKETS, LATENCY_SECONDS};
use parking_lot::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// How long one is kept before another may take its place. Below the usual 15 seconds between two scrapes.
pub(super) const FRESH_MS: u64 = 10_000;
/// Names and values together, by the format.
const MOST_CHARACTERS: usize = 128;
pub(super) const REQUEST_ID: &str = "request_id";
pub(super) const TRACE_ID: &str = "trace_id";

/// What a request is found by. Never a secret.
#[derive(Clone, Copy, Debug)]
pub struct ExemplarIds<'r> {
    pub request_id: &'r str,
    /// In hex, of a trace that is recorded.
    pub trace_id: Option<[u8; 32]>,
}

impl ExemplarIds<'_> {
    fn fit(&self) -> bool {
        let trace = self.trace_id.map_or(0, |id| TRACE_ID.len() + id.len());
        REQUEST_ID.len() + self.request_id.chars().count() + trace <= MOST_CHARACTERS
    }
}

/// One request, and how long it took.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Exemplar {
    pub(super) request_id: Box<str>,
    pub(super) trace_id: Option<Box<str>>,
    pub(super) seconds: f64,
    pub(super) at_unix_ms: u64,
}

/// Those of one route.
#[derive(Default)]
pub(super) struct ExemplarSlots {
    /// When each slot was written, in milliseconds since the Unix epoch; 0: never. Apart from the slots, so that what every
    /// request reads is not written to by others.
    written: [AtomicU64; LATENCY_BUCKETS],
    slots: [Mutex<Option<Exemplar>>; LATENCY_BUCKETS],
}

impl ExemplarSlots {
    /// A request is over. `ids` is asked only where there is room: it may find that the request is not to be shown.
    #[inline]
    pub(super) fn offer<'r>(&self, seconds: f64, at_unix_ms: u64, ids: impl FnOnce() -> Option<ExemplarIds<'r>>) {
        let bucket = LATENCY_SECONDS.partition_point(|upper| seconds > *upper);
        let Some(written) = self.written.get(bucket) else { return };
        // A clock that was put back makes all of them old.
        if at_unix_ms.abs_diff(written.load(Ordering::Relaxed)) >= FRESH_MS
            && let Some(ids) = ids()
        {
            self.replace(bucket, seconds, at_unix_ms, ids);
        }
    }

    #[cold]
    fn replace(&self, bucket: usize, seconds: f64, at_unix_ms: u64, ids: ExemplarIds<'_>) {
        let (Some(written), Some(slot)) = (self.written.get(bucket), self.slots.get(bucket)) else { return };
        if !ids.fit() {
            return;
        }
        // Whoever holds it writes another, or reads.
        let Some(mut slot) = slot.try_lock() else { return };
        let trace_id = ids.trace_id.map(|id| String::from_utf8_lossy(&id).into());
        *slot = Some(Exemplar { request_id: ids.request_id.into(), trace_id, seconds, at_unix_ms });
        written.store(at_unix_ms, Ordering::Relaxed);
    }

    pub(super) fn get(&self, bucket: usize) -> Option<Exemplar> {
        self.slots.get(bucket)?.lock().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_790_000_000_000;

    fn offer(slots: &ExemplarSlots, seconds: f64, at: u64, id: &str) {
        slots.offer(seconds, at, || Some(ExemplarIds { request_id: id, trace_id: None }));
    }

    fn shown(slots: &ExemplarSlots) -> Vec<(usize, String)> {
        let found =
            (0..LATENCY_BUCKETS).filter_map(|bucket| Some((bucket, slots.get(bucket)?.request_id.into_string())));
        found.collect()
    }

    #[test]
    fn a_request_stands_in_the_bucket_that_counts_it() {
        let slots = ExemplarSlots::default();
        let mut wanted = Vec::new();
        for (bucket, upper) in LATENCY_SECONDS.iter().enumerate() {
            // A bound is counted by its own bucket.
            offer(&slots, *upper, NOW, &bucket.to_string());
            wanted.push((bucket, bucket.to_string()));
        }
        offer(&slots, 60.000_001, NOW, "slow");
        wanted.push((LATENCY_BUCKETS - 1, "slow".into()));
        assert_eq!((wanted.len(), shown(&slots)), (LATENCY_BUCKETS, wanted));
    }

    #[test]
    fn one_is_kept_until_it_is_old_or_the_clock_is_put_back() {
        let slots = ExemplarSlots::default();
        let first = || shown(&slots).into_iter().next().unwrap().1;
        offer(&slots, 0.001, NOW, "a");
        for at in [NOW, NOW + 1, NOW - 5, NOW + FRESH_MS - 1] {
            slots.offer(0.001, at, || -> Option<ExemplarIds<'_>> {
                panic!("a fresh one costs nothing but a comparison")
            });
        }
        assert_eq!(first(), "a");
        offer(&slots, 0.001, NOW + FRESH_MS, "b");
        assert_eq!(first(), "b");
        offer(&slots, 0.001, NOW - 3_600_000, "c");
        assert_eq!(first(), "c");
        assert_eq!(slots.get(1).unwrap().at_unix_ms, NOW - 3_600_000);
    }

    #[test]
    fn what_is_not_to_be_shown_or_is_too_long_leaves_the_place_to_the_next() {
        let slots = ExemplarSlots::default();
        slots.offer(0.001, NOW, || None);
        let trace = Some([b'a'; 32]);
        for (length, trace_id) in [(119, None), (128, None), (79, trace)] {
            let id = "i".repeat(length);
            slots.offer(0.001, NOW, || Some(ExemplarIds { request_id: &id, trace_id }));
        }
        assert_eq!(shown(&slots), []);
        let (with_trace, without) = ("i".repeat(78), "j".repeat(118));
        slots.offer(0.001, NOW, || Some(ExemplarIds { request_id: &with_trace, trace_id: trace }));
        offer(&slots, 0.1, NOW, &without);
        assert_eq!(shown(&slots), [(1, with_trace), (7, without)]);
    }

    #[test]
    fn a_request_does_not_wait_for_whoever_reads() {
        let slots = ExemplarSlots::default();
        let held = slots.slots[1].lock();
        offer(&slots, 0.001, NOW, "a");
        drop(held);
        assert_eq!(shown(&slots), []);
        offer(&slots, 0.001, NOW, "b");
        assert_eq!(shown(&slots), [(1, "b".to_owned())]);
    }
}
