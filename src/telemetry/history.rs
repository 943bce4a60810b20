//! What became of the requests of the last 15 minutes and 24 hours, in memory of a fixed size: two rings of time slots, filled
//! every few seconds from counters that the metrics keep anyway, so that a request pays nothing for it. Time is an argument.
//! Knows no metric.

use crate::telemetry::metrics::{LATENCY_BUCKETS, LATENCY_SECONDS, STATUS_CLASSES};
use parking_lot::Mutex;

/// Reasons of refusals that are told apart; there are fewer. Others would be counted together.
pub const MOST_REASONS: usize = 96;
/// How often the counters are read.
pub const SAMPLED_EVERY_MS: u64 = 5_000;
const RING_STEPS: [(u64, usize); 2] = [(10_000, 90), (600_000, 144)];

/// What the counters say, since the process began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrafficTotals<N> {
    /// By class of the status, as the metrics have them.
    pub statuses: [N; STATUS_CLASSES.len()],
    /// Those of them that tollgate answered itself.
    pub refused: [N; STATUS_CLASSES.len()],
    /// The same by reason, in the order in which the reasons came up.
    pub reasons: [N; MOST_REASONS],
    /// How long they took, by bucket: not cumulative, and those that took longer last.
    pub took: [N; LATENCY_BUCKETS],
}

impl<N: Copy + Default> Default for TrafficTotals<N> {
    fn default() -> Self {
        let none = N::default();
        Self {
            statuses: [none; STATUS_CLASSES.len()],
            refused: [none; STATUS_CLASSES.len()],
            reasons: [none; MOST_REASONS],
            took: [none; LATENCY_BUCKETS],
        }
    }
}

impl<N: Copy> TrafficTotals<N> {
    fn numbers(&self) -> impl Iterator<Item = &N> {
        self.statuses.iter().chain(&self.refused).chain(&self.reasons).chain(&self.took)
    }

    fn numbers_mut(&mut self) -> impl Iterator<Item = &mut N> {
        self.statuses.iter_mut().chain(&mut self.refused).chain(&mut self.reasons).chain(&mut self.took)
    }
}

/// What requests came to, each in one of these.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrafficResults {
    /// The backend answered, with a status below 400.
    pub ok: u64,
    /// The backend answered with 4xx.
    pub client_error: u64,
    /// tollgate answered with a status below 500: 401, 403, 429 and so on.
    pub refused: u64,
    /// 5xx, whoever answered.
    pub failed: u64,
    /// The client left before there was a response.
    pub client_gone: u64,
}

impl TrafficResults {
    pub const NAMES: [&'static str; 5] = ["ok", "client_error", "refused", "failed", "client_gone"];

    pub fn in_order(&self) -> [u64; 5] {
        [self.ok, self.client_error, self.refused, self.failed, self.client_gone]
    }
}

impl TrafficTotals<u64> {
    pub fn results(&self) -> TrafficResults {
        let [gone, s1, s2, s3, s4, s5] = self.statuses;
        let [_, _, r2, r3, r4, _] = self.refused;
        TrafficResults {
            ok: (s1 + s2 + s3).saturating_sub(r2 + r3),
            client_error: s4.saturating_sub(r4),
            refused: r2 + r3 + r4,
            failed: s5,
            client_gone: gone,
        }
    }

    pub fn requests(&self) -> u64 {
        self.statuses.iter().sum()
    }

    /// In seconds; between the bounds of a bucket by the straight line, as Prometheus' histogram_quantile does. `None`:
    /// there were no requests.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        quantile(LATENCY_SECONDS, &self.took, share)
    }
}

/// Of counts by bucket, which are not cumulative; one more bucket than bounds.
pub fn quantile(bounds: &[f64], counts: &[u64], share: f64) -> Option<f64> {
    let all: u64 = counts.iter().sum();
    if all == 0 {
        return None;
    }
    let rank = share * all as f64;
    let (mut before, mut least) = (0.0, 0.0);
    for (bound, count) in bounds.iter().zip(counts) {
        let upto = before + *count as f64;
        if *count > 0 && upto >= rank {
            return Some(least + (bound - least) * ((rank - before) / *count as f64).clamp(0.0, 1.0));
        }
        (before, least) = (upto, *bound);
    }
    // Longer than the last bound: more is not known.
    bounds.last().copied()
}

/// One of the two windows, as it is read.
pub struct TrafficWindow {
    pub step_ms: u64,
    /// How much of the last slot's time is over.
    pub last_ms: u64,
    /// Of it, that there has been a process.
    pub covered_ms: u64,
    pub all: TrafficTotals<u64>,
    /// The oldest first, the one that is not over last.
    pub slots: Vec<TrafficTotals<u64>>,
}

/// Fits 4 billion requests a slot.
type TrafficSlot = TrafficTotals<u32>;

struct TrafficRing {
    step_ms: u64,
    slots: Box<[TrafficSlot]>,
    /// Steps since the boot of the machine, of the newest slot.
    newest: u64,
}

impl TrafficRing {
    fn new(step_ms: u64, count: usize, mono_ms: u64) -> Self {
        Self { step_ms, slots: vec![TrafficSlot::default(); count].into(), newest: mono_ms / step_ms }
    }

    fn place(&self, step: u64) -> usize {
        usize::try_from(step % self.slots.len() as u64).unwrap_or(0)
    }

    /// Empties the slots of the time that has passed, in which nothing was noted.
    fn advance(&mut self, mono_ms: u64) {
        let step = mono_ms / self.step_ms;
        let passed = step.saturating_sub(self.newest).min(self.slots.len() as u64);
        for back in 0..passed {
            let place = self.place(step - back);
            if let Some(slot) = self.slots.get_mut(place) {
                *slot = TrafficSlot::default();
            }
        }
        self.newest = self.newest.max(step);
    }

    fn add(&mut self, more: &TrafficTotals<u64>) {
        let place = self.place(self.newest);
        let Some(slot) = self.slots.get_mut(place) else { return };
        for (sum, count) in slot.numbers_mut().zip(more.numbers()) {
            *sum = sum.saturating_add(u32::try_from(*count).unwrap_or(u32::MAX));
        }
    }

    fn window(&self, began_ms: u64, mono_ms: u64) -> TrafficWindow {
        let count = self.slots.len() as u64;
        let oldest = (self.newest + 1).saturating_sub(count);
        // A machine that has just booted has fewer steps behind it: what was before is empty, as all of the ring is.
        let slots: Vec<_> = (0..count)
            .filter_map(|index| self.slots.get(self.place(self.newest + 1 + index)))
            .map(|slot| {
                let mut wide = TrafficTotals::default();
                wide.numbers_mut().zip(slot.numbers()).for_each(|(wide, count)| *wide = u64::from(*count));
                wide
            })
            .collect();
        let mut all = TrafficTotals::default();
        for slot in &slots {
            all.numbers_mut().zip(slot.numbers()).for_each(|(sum, count): (&mut u64, _)| *sum += count);
        }
        let from = began_ms.max(oldest * self.step_ms);
        TrafficWindow {
            step_ms: self.step_ms,
            last_ms: mono_ms % self.step_ms,
            covered_ms: mono_ms.saturating_sub(from),
            all,
            slots,
        }
    }
}

/// The two windows.
pub struct TrafficHistory(Mutex<HistoryState>);

struct HistoryState {
    /// `None`: nothing was read yet.
    began_ms: Option<u64>,
    last: TrafficTotals<u64>,
    rings: [TrafficRing; 2],
}

impl Default for TrafficHistory {
    fn default() -> Self {
        let rings = RING_STEPS.map(|(step, count)| TrafficRing::new(step, count, 0));
        Self(Mutex::new(HistoryState { began_ms: None, last: TrafficTotals::default(), rings }))
    }
}

impl TrafficHistory {
    /// Notes what has come since the last time.
    pub fn note(&self, totals: TrafficTotals<u64>, mono_ms: u64) {
        let mut state = self.0.lock();
        state.began_ms.get_or_insert(mono_ms);
        let mut more = totals.clone();
        // A counter that is read while others go on may be behind the one before: it catches up with the next reading.
        more.numbers_mut().zip(state.last.numbers()).for_each(|(more, last)| *more = more.saturating_sub(*last));
        for ring in &mut state.rings {
            ring.advance(mono_ms);
            ring.add(&more);
        }
        state.last = totals;
    }

    /// 15 minutes, and 24 hours.
    pub fn windows(&self, mono_ms: u64) -> [TrafficWindow; 2] {
        let mut state = self.0.lock();
        let began_ms = state.began_ms.unwrap_or(mono_ms);
        state.rings.iter_mut().for_each(|ring| ring.advance(mono_ms));
        [&state.rings[0], &state.rings[1]].map(|ring| ring.window(began_ms, mono_ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: u64 = 60_000;

    /// Counters as they stand after some requests.
    fn totals(ok: u64, refused: u64, fast: u64, slow: u64) -> TrafficTotals<u64> {
        let mut totals = TrafficTotals::default();
        (totals.statuses[2], totals.statuses[4], totals.refused[4], totals.reasons[3]) =
            (ok, refused, refused, refused);
        // 1 ms to 2.5 ms, and 2.5 s to 5 s.
        (totals.took[2], totals.took[12]) = (fast, slow);
        totals
    }

    #[test]
    fn what_was_noted_leaves_its_window_in_time_and_no_sooner() {
        let history = TrafficHistory::default();
        let began = 1_000_000_003;
        history.note(totals(0, 0, 0, 0), began);
        history.note(totals(100, 20, 110, 10), began + 5_000);
        let counts = |at: u64| history.windows(began + at).map(|window| window.all.requests());
        assert_eq!(counts(5_000), [120, 120]);
        history.note(totals(101, 20, 111, 10), began + 10 * MINUTE);
        assert_eq!(counts(14 * MINUTE), [121, 121]);
        assert_eq!(counts(16 * MINUTE), [1, 121], "the first ones are older than 15 minutes");
        assert_eq!(counts(23 * 60 * MINUTE), [0, 121]);
        assert_eq!(counts(25 * 60 * MINUTE), [0, 0]);
        // And in memory of one size, whatever came.
        for day in 0..40 {
            history.note(totals(200 + day, 20, 111, 10), began + (26 + day) * 60 * MINUTE);
        }
        let [short, long] = history.windows(began + 65 * 60 * MINUTE);
        assert_eq!((short.slots.len(), long.slots.len()), (90, 144));
        assert_eq!((short.all.requests(), long.all.requests()), (1, 24));
        // To the beginning of the oldest slot.
        assert!((890_000..=900_000).contains(&short.covered_ms), "{}", short.covered_ms);
        assert!((1_430..=1_440).contains(&(long.covered_ms / MINUTE)), "{}", long.covered_ms);
    }

    #[test]
    fn results_add_up_to_all_requests() {
        let totals = TrafficTotals {
            statuses: [1, 2, 30, 4, 50, 6],
            refused: [0, 0, 0, 3, 20, 4],
            ..TrafficTotals::<u64>::default()
        };
        let results = totals.results();
        let expected = TrafficResults { ok: 33, client_error: 30, refused: 23, failed: 6, client_gone: 1 };
        assert_eq!((results, results.in_order().iter().sum::<u64>()), (expected, totals.requests()));
    }

    #[test]
    fn quantiles_lie_within_their_bucket() {
        let history = TrafficHistory::default();
        history.note(totals(0, 0, 0, 0), 0);
        history.note(totals(100, 0, 90, 10), 1);
        let [window, _] = history.windows(2);
        let near = |share: f64, expected: f64| {
            let found = window.all.quantile(share).unwrap();
            assert!((found - expected).abs() < 1e-9, "{share}: {found}");
        };
        near(0.5, 0.001 + 0.0015 * 50.0 / 90.0);
        near(0.9, 0.0025);
        near(0.99, 2.5 + 2.5 * 0.9);
        assert_eq!(TrafficTotals::default().quantile(0.5), None);
        let mut endless = TrafficTotals::default();
        endless.took[LATENCY_BUCKETS - 1] = 1;
        assert_eq!(endless.quantile(0.5), Some(60.0), "more is not known");
    }

    #[test]
    fn a_counter_that_seems_to_go_back_takes_nothing_away() {
        let history = TrafficHistory::default();
        history.note(totals(10, 0, 10, 0), 0);
        history.note(totals(8, 0, 8, 0), 1_000);
        history.note(totals(12, 0, 12, 0), 2_000);
        assert!(history.windows(2_000)[0].all.requests() >= 12);
    }

    #[test]
    fn a_machine_that_has_just_booted_has_whole_windows() {
        let history = TrafficHistory::default();
        history.note(totals(0, 0, 0, 0), 1_000);
        history.note(totals(7, 0, 7, 0), 25_000);
        let [short, long] = history.windows(25_000);
        assert_eq!((short.slots.len(), long.slots.len(), short.covered_ms), (90, 144, 24_000));
        assert_eq!((short.slots[89].requests(), long.slots[143].requests()), (7, 7), "the newest comes last");
    }

    #[test]
    fn both_rings_take_less_than_150_kib() {
        let slots: usize = RING_STEPS.iter().map(|(_, count)| count).sum();
        assert!(slots * size_of::<TrafficSlot>() < 150 * 1024, "{}", slots * size_of::<TrafficSlot>());
    }
}
