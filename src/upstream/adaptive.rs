//! A limit of the requests that wait for one server, which follows how long it takes to answer them: more are let through while
//! its answers are as quick as they are without load, fewer when they take longer. The gradient of Netflix's
//! concurrency-limits, with the probe of Envoy's adaptive concurrency. Pure: time is an argument. It must not know servers, nor
//! what waits beyond the limit.
//!
//! What is sampled is what is counted: the time from choosing the server to the head of its response. Who calls says which
//! requests are samples. Samples are gathered in windows, and only the middle one of a window counts: one slow request
//! changes nothing, nor does one kind of request that is slow as long as most are of another.
//!
//! Whether a time is long is known by comparison with the one without load. Under load that cannot be seen, so from time to
//! time a probe lets half as many through for a moment.

use crate::telemetry::metrics::AdaptiveReading;
use parking_lot::Mutex;
use std::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{Relaxed, SeqCst},
};
use std::time::{Duration, Instant};

/// What the limit never leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdaptiveBounds {
    pub least: u32,
    pub most: u32,
}

impl Default for AdaptiveBounds {
    fn default() -> Self {
        Self { least: 2, most: 1_000 }
    }
}

/// As Netflix begins.
const FIRST_LIMIT: u32 = 20;
/// The middle answer may take so many times as long as without load before the limit falls.
const TOLERANCE: f64 = 1.2;
/// So much of the limit's square root may queue at the server: the part that looks for more.
const ALLOWANCE: f64 = 0.4;
/// How far a window moves the limit towards what it says.
const SMOOTHING: f64 = 0.4;
/// However slow the answers are, a window says no less than this part of the limit.
const STEEPEST: f64 = 0.5;
/// What a failure leaves of the limit.
const AFTER_FAILURE: f64 = 0.9;

/// A window is over with many samples, or after a longer time with few; and it lasts so many times as long as an answer takes,
/// so that the limit before is over.
const MANY: u32 = 100;
const FEW: u32 = 20;
/// A probe costs those who wait: it is over with so many after this time.
const PROBED: u32 = 50;
const QUICK_PROBE: u64 = 300_000;
const QUICK_WINDOW: u64 = 50_000;
const SLOW_WINDOW: u64 = 1_000_000;
const WINDOW_ANSWERS: u64 = 2;
/// What was gathered for so long without being enough says nothing of now.
const STALE: u64 = 60_000_000;

/// Until the next probe: if the last one changed something, and else. Each up to a quarter longer or shorter.
const PROBE_SOON: u64 = 5_000_000;
const PROBE_LATER: u64 = 30_000_000;
/// Requests have to be down to what a probe lets through within so many windows. They are not if most of those that are with the
/// server are long polls.
const PROBE_WINDOWS: u64 = 4;
/// So many times as long as an answer takes, a probe does not look: the quick ones among those sent since it began come first.
const PROBE_ANSWERS: u64 = 3;
/// The longest probe: this, or as many windows, up to the other.
const PROBE_TIME: u64 = 2_000_000;
const LONGEST_PROBE: u64 = 10_000_000;
/// A probe with less than this part of the time before shows that requests queue at the server.
const LESS: f64 = 0.8;
/// How far a probe that could not be made moves what is known towards what is seen.
const UNSEEN: f64 = 0.25;

/// No request counts: more are with the server than the probe lets through.
const NOT_YET: u64 = u64::MAX;

/// All times are in microseconds since it began.
pub(super) struct AdaptiveLimit {
    began: Instant,
    /// Requests that wait for their heads. The order of this, of the limit and of who waits in the queue is what no waiter gets
    /// lost by.
    awaited: AtomicU32,
    /// In force: the limit, or what a probe lets through.
    limit: AtomicU32,
    /// Of all windows.
    samples: AtomicU64,
    window: Window,
    course: Mutex<Course>,
}

/// Answers since a time. Written without a lock: a sample that comes as a window ends counts for either.
struct Window {
    /// Only requests that were sent since then count, and answers that came since then.
    since: AtomicU64,
    from: AtomicU64,
    /// How many are few.
    fewest: AtomicU32,
    /// When many are enough, when few are, and when it is over whatever it has.
    many: AtomicU64,
    few: AtomicU64,
    ends: AtomicU64,
    samples: AtomicU32,
    /// The most requests that waited for heads.
    most: AtomicU32,
    times: [AtomicU32; TIMES],
}

/// What only changes as a window ends.
struct Course {
    limit: f64,
    /// The middle time of the last window, and without load.
    middle: f64,
    unloaded: Option<f64>,
    /// It was seen by a probe.
    is_sure: bool,
    probe: Option<LatencyProbe>,
    /// The limit at the last probe, when that was over, and when the next one is due.
    probed_limit: f64,
    probed: u64,
    next_probe: u64,
    last_failure: u64,
    /// The limit's use in the last window.
    most: u32,
}

#[derive(Clone, Copy)]
struct LatencyProbe {
    limit: u32,
    /// What the step before has seen, with twice as many.
    before: Option<f64>,
}

impl AdaptiveLimit {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            began: now,
            awaited: AtomicU32::new(0),
            limit: AtomicU32::new(FIRST_LIMIT),
            samples: AtomicU64::new(0),
            window: Window {
                since: AtomicU64::new(0),
                from: AtomicU64::new(0),
                fewest: AtomicU32::new(FEW),
                many: AtomicU64::new(QUICK_WINDOW),
                few: AtomicU64::new(SLOW_WINDOW),
                ends: AtomicU64::new(STALE),
                samples: AtomicU32::new(0),
                most: AtomicU32::new(0),
                times: std::array::from_fn(|_| AtomicU32::new(0)),
            },
            course: Mutex::new(Course {
                limit: FIRST_LIMIT.into(),
                middle: 0.0,
                unloaded: None,
                is_sure: false,
                probe: None,
                probed_limit: FIRST_LIMIT.into(),
                probed: 0,
                next_probe: 0,
                last_failure: 0,
                most: 0,
            }),
        }
    }

    pub(super) fn limit(&self, bounds: AdaptiveBounds) -> u32 {
        self.limit.load(SeqCst).max(bounds.least).min(bounds.most)
    }

    pub(super) fn is_full(&self, bounds: AdaptiveBounds) -> bool {
        self.awaited.load(SeqCst) >= self.limit(bounds)
    }

    /// One more request waits for its head, if there is room.
    pub(super) fn takes(&self, bounds: AdaptiveBounds) -> bool {
        let limit = self.limit(bounds);
        self.awaited.fetch_update(SeqCst, SeqCst, |count| (count < limit).then_some(count + 1)).is_ok()
    }

    /// One less, for whatever reason.
    pub(super) fn leaves(&self) {
        self.awaited.fetch_sub(1, SeqCst);
    }

    /// The server has answered a request, which still counts as waiting.
    pub(super) fn sampled(&self, bounds: AdaptiveBounds, asked: Instant, now: Instant) {
        self.samples.fetch_add(1, Relaxed);
        let (asked, now) = (self.micros(asked), self.micros(now));
        let awaited = self.awaited.load(Relaxed);
        let since = self.window.since.load(Relaxed);
        if since == NOT_YET && awaited <= self.limit(bounds) {
            self.settle(now);
        } else if asked >= since && now >= self.window.from.load(Relaxed) {
            self.window.add(now.saturating_sub(asked), awaited);
        }
        if self.window.is_over(now) {
            self.conclude(bounds, now);
        }
    }

    /// A request was given up before it was answered. If the server had long enough, this says that it takes longer.
    pub(super) fn given_up(&self, bounds: AdaptiveBounds, asked: Instant, now: Instant) {
        let unloaded = self.course.lock().unloaded;
        let waited = now.saturating_duration_since(asked).as_micros() as f64;
        if unloaded.is_some_and(|unloaded| waited >= 2.0 * unloaded) {
            self.sampled(bounds, asked, now);
        }
    }

    /// A request to the server failed: it refused it, or did not answer in time. Those that were sent before another one failed
    /// change nothing more.
    pub(super) fn failed(&self, bounds: AdaptiveBounds, asked: Instant, now: Instant) {
        let (asked, now) = (self.micros(asked), self.micros(now));
        let mut course = self.course.lock();
        if asked < course.last_failure {
            return;
        }
        course.last_failure = now;
        course.limit = within(course.limit * AFTER_FAILURE, bounds);
        self.publish(&course);
    }

    /// The server comes back after an outage: as many as at first, or fewer if it could not have so many before. What it takes
    /// without load has to be seen again.
    pub(super) fn begins_anew(&self, now: Instant) {
        let mut course = self.course.lock();
        course.limit = course.limit.min(FIRST_LIMIT.into());
        (course.is_sure, course.probe, course.next_probe) = (false, None, self.micros(now));
        self.window.take();
        self.window.begin(self.micros(now), course.answer());
        self.publish(&course);
    }

    /// For the operator.
    pub(super) fn reading(&self, bounds: AdaptiveBounds) -> AdaptiveReading {
        let course = self.course.lock();
        let limit = within(course.limit, bounds) as u32;
        AdaptiveReading {
            limit,
            is_pinned: limit == bounds.least && course.most >= limit && bounds.least < bounds.most,
            unloaded: course.unloaded.map(|unloaded| Duration::from_micros(unloaded as u64)),
            samples: self.samples.load(Relaxed),
        }
    }

    /// With the server are no more than a probe lets through.
    #[inline(never)]
    fn settle(&self, now: u64) {
        let Some(course) = self.course.try_lock() else { return };
        if self.window.since.load(Relaxed) == NOT_YET {
            self.window.settle(now, (course.middle as u64).max(course.answer()));
        }
    }

    /// Ends the window, unless another request was quicker.
    #[inline(never)]
    fn conclude(&self, bounds: AdaptiveBounds, now: u64) {
        let Some(mut course) = self.course.try_lock() else { return };
        if !self.window.is_over(now) {
            return;
        }
        let (middle, most) = self.window.take();
        course.probe = match (course.probe.take(), middle) {
            (Some(probe), Some(middle)) => course.probed(bounds, probe, middle, now),
            (Some(_), None) => {
                course.probed_nothing(now);
                None
            }
            (None, Some(middle)) => {
                course.follow(bounds, middle, most);
                course.probe_if_due(bounds, most, now)
            }
            (None, None) => None,
        };
        match course.probe {
            Some(_) => self.window.begin_probe(now, course.middle as u64),
            None => self.window.begin(now, course.answer()),
        }
        self.publish(&course);
    }

    fn publish(&self, course: &Course) {
        self.limit.store(course.probe.map_or(course.limit as u32, |probe| probe.limit), SeqCst);
    }

    fn micros(&self, time: Instant) -> u64 {
        // Never NOT_YET: that is half a million years away.
        u64::try_from(time.saturating_duration_since(self.began).as_micros()).unwrap_or(0)
    }
}

impl Course {
    /// A window without a probe has ended.
    fn follow(&mut self, bounds: AdaptiveBounds, middle: f64, most: u32) {
        self.middle = middle;
        let unloaded = *self.unloaded.get_or_insert(middle);
        let gradient = (TOLERANCE * unloaded / middle).clamp(STEEPEST, 1.0);
        let mut target = gradient * self.limit + ALLOWANCE * self.limit.sqrt();
        if most < self.limit as u32 {
            // Nobody needs more, and what would come of it cannot be seen.
            target = target.min(self.limit);
        }
        self.limit = within(self.limit + SMOOTHING * (target - self.limit), bounds);
        self.most = most;
    }

    fn probe_if_due(&self, bounds: AdaptiveBounds, most: u32, now: u64) -> Option<LatencyProbe> {
        // While nobody needs more, there is nothing to be learned, and nobody is to be kept waiting.
        let is_used = most >= self.limit as u32;
        // If it fell that far, either the server can do less, or what is known of it is no longer so.
        let has_fallen = self.limit <= (self.probed_limit / 2.0).max(bounds.least.into());
        let is_due = now >= self.next_probe || (has_fallen && now >= self.probed.saturating_add(PROBE_SOON));
        let limit = (most.min(self.limit as u32) / 2).max(bounds.least);
        (is_used && is_due).then_some(LatencyProbe { limit, before: None })
    }

    /// A step of a probe has ended. `Some`: it goes on with half as many, as this may have been too many as well.
    fn probed(&mut self, bounds: AdaptiveBounds, probe: LatencyProbe, middle: f64, now: u64) -> Option<LatencyProbe> {
        let is_less = probe.before.is_none_or(|before| middle < LESS * before);
        let is_expected = self.is_sure && self.unloaded.is_some_and(|unloaded| middle <= TOLERANCE * unloaded);
        if is_less && !is_expected && probe.limit > bounds.least {
            return Some(LatencyProbe { limit: (probe.limit / 2).max(bounds.least), before: Some(middle) });
        }
        let known = self.unloaded.unwrap_or(middle);
        let has_changed = !self.is_sure || middle > TOLERANCE * known || known > TOLERANCE * middle;
        // Half of the way down: a time that is too short by chance would press the limit until the next probe.
        let unloaded = if self.is_sure && middle < known { (known + middle) / 2.0 } else { middle };
        (self.unloaded, self.is_sure) = (Some(unloaded), true);
        self.is_probed(now, if has_changed { PROBE_SOON } else { PROBE_LATER });
        None
    }

    /// Requests were not down to what the probe lets through, or there were too few: what is seen with the limit has to do.
    fn probed_nothing(&mut self, now: u64) {
        if let Some(unloaded) = &mut self.unloaded {
            *unloaded += UNSEEN * (self.middle - *unloaded);
        }
        self.is_probed(now, PROBE_LATER);
    }

    /// What an answer takes, without load.
    fn answer(&self) -> u64 {
        self.unloaded.unwrap_or(0.0) as u64
    }

    fn is_probed(&mut self, now: u64, next: u64) {
        self.next_probe = now + (next as f64 * (0.75 + fastrand::f64() / 2.0)) as u64;
        (self.probed, self.probed_limit) = (now, self.limit);
    }
}

fn within(limit: f64, bounds: AdaptiveBounds) -> f64 {
    limit.max(bounds.least.into()).min(bounds.most.into())
}

/// Eight to a doubling, from 8 microseconds on. The last one has everything from an hour on.
const TIMES: usize = 8 * 29;

fn place_of(micros: u64) -> usize {
    let micros = micros.clamp(8, (1 << 32) - 1);
    let doublings = micros.ilog2() - 3;
    doublings as usize * 8 + (micros >> doublings) as usize % 8
}

/// Where a place begins, and how wide it is.
fn times_of(place: usize) -> (f64, f64) {
    let doublings = 2_f64.powi(i32::try_from(place / 8).unwrap_or(0));
    ((8 + place % 8) as f64 * doublings, doublings)
}

impl Window {
    fn add(&self, micros: u64, awaited: u32) {
        if let Some(count) = self.times.get(place_of(micros)) {
            count.fetch_add(1, Relaxed);
        }
        if awaited > self.most.load(Relaxed) {
            self.most.fetch_max(awaited, Relaxed);
        }
        self.samples.fetch_add(1, Relaxed);
    }

    fn is_over(&self, now: u64) -> bool {
        let is_enough = match self.samples.load(Relaxed) {
            MANY.. => now >= self.many.load(Relaxed),
            count if count >= self.fewest.load(Relaxed) => now >= self.few.load(Relaxed),
            _ => false,
        };
        is_enough || now >= self.ends.load(Relaxed)
    }

    /// The middle time, if there are enough, and the most requests. Empties it.
    fn take(&self) -> (Option<f64>, u32) {
        let counts: [u32; TIMES] =
            std::array::from_fn(|place| self.times.get(place).map_or(0, |count| count.swap(0, Relaxed)));
        self.samples.store(0, Relaxed);
        let all: u32 = counts.iter().sum();
        let mut left = f64::from(all) / 2.0;
        let middle = counts.into_iter().enumerate().find_map(|(place, count)| {
            let (count, (from, width)) = (f64::from(count), times_of(place));
            if count > 0.0 && left <= count {
                return Some(from + width * left / count);
            }
            left -= count;
            None
        });
        (middle.filter(|_| all >= FEW), self.most.swap(0, Relaxed))
    }

    fn begin(&self, now: u64, answer: u64) {
        let least = QUICK_WINDOW.max(WINDOW_ANSWERS * answer);
        self.fewest.store(FEW, Relaxed);
        self.many.store(now + least, Relaxed);
        self.few.store(now + SLOW_WINDOW.max(2 * least), Relaxed);
        self.ends.store(now + STALE.max(2 * least), Relaxed);
        self.from.store(now, Relaxed);
        self.since.store(0, Relaxed);
    }

    /// Nothing counts before [`Self::settle`].
    fn begin_probe(&self, now: u64, middle: u64) {
        self.ends.store(now + (PROBE_WINDOWS * QUICK_WINDOW.max(middle)).min(LONGEST_PROBE), Relaxed);
        self.since.store(NOT_YET, Relaxed);
    }

    fn settle(&self, now: u64, answer: u64) {
        let from = now + (PROBE_ANSWERS * answer).min(LONGEST_PROBE / 2);
        self.from.store(from, Relaxed);
        self.fewest.store(PROBED, Relaxed);
        self.many.store(from, Relaxed);
        self.few.store(from + QUICK_PROBE, Relaxed);
        let longest = PROBE_TIME.max(PROBE_WINDOWS * WINDOW_ANSWERS * answer).min(LONGEST_PROBE);
        self.ends.store(now + longest, Relaxed);
        self.since.store(now, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_the_place_that_holds_it() {
        let mut last = 0;
        for micros in (8..5_000).chain([65_535, 65_536, 1 << 20, (1 << 31) + 7, u64::from(u32::MAX)]) {
            let place = place_of(micros);
            let (begins, wide) = times_of(place);
            assert!(
                begins <= micros as f64 && (micros as f64) < begins + wide,
                "{micros}: {place} is {begins} + {wide}"
            );
            assert!(place >= last && place < TIMES, "{micros}: {place} behind {last}");
            last = place;
        }
        // Shorter and longer ones stand at the ends.
        assert_eq!((place_of(0), place_of(u64::MAX)), (0, TIMES - 1));
    }

    fn window() -> Window {
        AdaptiveLimit::new(Instant::now()).window
    }

    /// From, many, few, end.
    fn bounds(window: &Window) -> [u64; 4] {
        [&window.from, &window.many, &window.few, &window.ends].map(|at| at.load(Relaxed))
    }

    #[test]
    fn a_window_is_as_long_as_what_it_waits_for() {
        let window = window();
        // A quick server: the windows have lengths of their own.
        window.begin(7, 1_000);
        assert_eq!(bounds(&window), [7, 7 + QUICK_WINDOW, 7 + SLOW_WINDOW, 7 + STALE]);
        // A slow one: two answers are waited for, and twice as long if they are few.
        window.begin(7, 40_000_000);
        assert_eq!(bounds(&window), [7, 7 + 80_000_000, 7 + 160_000_000, 7 + 160_000_000]);
    }

    #[test]
    fn a_probe_counts_behind_what_was_on_its_way() {
        let window = window();
        window.begin_probe(100, 10_000);
        assert_eq!((window.since.load(Relaxed), window.ends.load(Relaxed)), (NOT_YET, 100 + 4 * QUICK_WINDOW));
        window.settle(100, 10_000);
        assert_eq!(bounds(&window), [30_100, 30_100, 30_100 + QUICK_PROBE, 100 + PROBE_TIME]);
        assert_eq!((window.since.load(Relaxed), window.fewest.load(Relaxed)), (100, PROBED));
        window.settle(100, 60_000_000);
        assert_eq!(bounds(&window)[3], 100 + LONGEST_PROBE);
    }

    #[test]
    fn a_limit_is_pinned_at_its_least_alone_and_in_use() {
        let limit = AdaptiveLimit::new(Instant::now());
        let pinned = |least, most, now: f64, used| {
            let mut course = limit.course.lock();
            (course.limit, course.most) = (now, used);
            drop(course);
            limit.reading(AdaptiveBounds { least, most }).is_pinned
        };
        assert!(pinned(2, 100, 2.0, 2) && pinned(2, 100, 1.0, 5));
        // Not in use, above the least, or with nowhere to go.
        assert!(!pinned(2, 100, 2.0, 1) && !pinned(2, 100, 3.0, 5) && !pinned(2, 2, 2.0, 5));
    }

    /// How long until the next probe, and whether this one goes on.
    fn probed(course: &Course, limit: u32, middle: f64) -> (u64, Option<u32>) {
        let bounds = AdaptiveBounds { least: 2, most: 100 };
        let mut course = Course { probe: None, ..*course };
        let goes_on = course.probed(bounds, LatencyProbe { limit, before: None }, middle, 0);
        (course.next_probe, goes_on.map(|probe| probe.limit))
    }

    #[test]
    fn a_probe_ends_at_the_least() {
        let limit = AdaptiveLimit::new(Instant::now());
        let course = limit.course.lock();
        assert_eq!(probed(&course, 7, 1_000.0).1, Some(3));
        assert_eq!(probed(&course, 3, 1_000.0).1, Some(2));
        assert_eq!(probed(&course, 2, 1_000.0).1, None);
    }

    #[test]
    fn the_next_probe_comes_soon_only_if_this_one_has_changed_something() {
        let limit = AdaptiveLimit::new(Instant::now());
        let mut course = limit.course.lock();
        (course.unloaded, course.is_sure) = (Some(1_000.0), true);
        // Up to a quarter longer or shorter.
        let is = |(next, _): (u64, Option<u32>), about: u64| (about * 3 / 4..=about * 5 / 4).contains(&next);
        for (middle, about) in [
            (1_000.0, PROBE_LATER),
            (TOLERANCE * 1_000.0, PROBE_LATER),
            (TOLERANCE * 1_000.0 + 1.0, PROBE_SOON),
            (1_000.0 / TOLERANCE - 1.0, PROBE_SOON),
        ] {
            assert!(is(probed(&course, 2, middle), about), "{middle}");
        }
        course.is_sure = false;
        assert!(is(probed(&course, 2, 1_000.0), PROBE_SOON));
    }
}
