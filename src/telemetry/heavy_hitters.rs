//! Who makes the traffic at the moment: the tokens, users, clients and routes with the most requests, bytes, refusals and time
//! of backends. A ring keeps a sample of the last requests, and a ranking is worked out from it when somebody asks, so a
//! request pays for little and the memory has a bound. It must not know what a token is beyond its id.
//!
//! As long as few requests come, all of them are in the sample. Of more, each that is taken stands for those since the one before.

use super::metrics::{Families, labels};
use parking_lot::Mutex;
use prometheus::GaugeVec;
use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// How many requests are kept: with [`SPACING`], those of a minute, whatever the rate.
const KEPT: usize = 8_192;
/// On average, if there are more requests than that. Each pause is a random one, so that no caller can keep between two.
const SPACING: Duration = Duration::from_millis(8);
/// So many requests are taken at once after a quiet time.
const BURST: u64 = 1_000;
/// What the metric covers.
const SCRAPED: Duration = Duration::from_secs(60);
/// The metric's ranks.
const RANKS: usize = 3;

labels! {
    /// Whom a ranking is of.
    HitterKind { Token = "token", User = "user", Client = "client", Route = "route" }
}
labels! {
    /// What is ranked by.
    HitterMeasure { Requests = "requests", Bytes = "bytes", Refusals = "refusals", BackendTime = "backend_time" }
}

/// One request of the sample.
pub struct RequestSample {
    pub token: Option<[u8; 12]>,
    pub user: Option<Box<str>>,
    /// An IPv6 address stands for its network of 64 bits.
    pub client: Option<IpAddr>,
    pub route: Box<str>,
    /// In both directions.
    pub bytes: u64,
    /// tollgate answered it.
    pub refused: bool,
    pub backend: Duration,
}

/// One of a ranking. The numbers are estimates where not all requests were taken.
#[derive(Clone, Debug, PartialEq)]
pub struct HeavyHitter {
    pub name: String,
    pub sums: HitterSums,
}

/// What the sample says of the last requests.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TrafficRanking {
    /// How many requests are behind it.
    pub sampled: usize,
    /// Less than what was asked for if the ring does not reach back so far.
    pub covers: Duration,
    pub all: HitterSums,
    /// By kind and then by measure: who has most of it first, and nobody who has none.
    pub lists: Vec<Vec<Vec<HeavyHitter>>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct HitterSums {
    pub requests: u64,
    pub bytes: u64,
    pub refusals: u64,
    pub backend: Duration,
}

pub struct HeavyHitters {
    began: Instant,
    /// Since the last one that was taken.
    passed: AtomicU64,
    /// Microseconds since the beginning at which the rate of requests would be back at nothing, as in GCRA.
    due: AtomicU64,
    ring: Mutex<VecDeque<Taken>>,
    shares: GaugeVec,
}

struct Taken {
    at: Instant,
    /// How many requests it stands for.
    weight: u64,
    request: RequestSample,
}

impl HitterSums {
    fn add(&mut self, taken: &Taken) {
        let (weight, request) = (taken.weight, &taken.request);
        self.requests = self.requests.saturating_add(weight);
        self.bytes = self.bytes.saturating_add(weight.saturating_mul(request.bytes));
        self.refusals = self.refusals.saturating_add(if request.refused { weight } else { 0 });
        let times = u32::try_from(weight).unwrap_or(u32::MAX);
        self.backend = self.backend.saturating_add(request.backend.saturating_mul(times));
    }

    pub fn of(&self, measure: HitterMeasure) -> u128 {
        match measure {
            HitterMeasure::Requests => self.requests.into(),
            HitterMeasure::Bytes => self.bytes.into(),
            HitterMeasure::Refusals => self.refusals.into(),
            HitterMeasure::BackendTime => self.backend.as_micros(),
        }
    }
}

impl HeavyHitters {
    pub(super) fn new(families: &Families<'_>, now: Instant) -> Result<Self, prometheus::Error> {
        Ok(Self {
            began: now,
            passed: AtomicU64::new(0),
            due: AtomicU64::new(0),
            ring: Mutex::new(VecDeque::new()),
            shares: families.float_gauges(
                "tollgate_heavy_hitter_share",
                "Share of all of the last minute that the tokens, users, clients and routes with the most have, by rank.",
                &["of", "by", "rank"],
            )?,
        })
    }

    /// Notes a request, if it is its turn: `sample` is made only then. `random`: from 0 to 1.
    pub fn note(&self, now: Instant, random: impl FnOnce() -> f32, sample: impl FnOnce() -> RequestSample) {
        self.passed.fetch_add(1, Relaxed);
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let now_us = micros(now.saturating_duration_since(self.began));
        let due = self.due.load(Relaxed);
        if due > now_us + BURST * micros(SPACING) {
            return;
        }
        let pause = 2.0 * random() * SPACING.as_micros() as f32;
        if self.due.compare_exchange(due, due.max(now_us) + pause as u64, Relaxed, Relaxed).is_err() {
            // Another request is taken, or the next one, which stands for this one too.
            return;
        }
        // A request does not wait for whoever reads the ring.
        let Some(mut ring) = self.ring.try_lock() else { return };
        if ring.len() >= KEPT {
            ring.pop_front();
        }
        ring.push_back(Taken { at: now, weight: self.passed.swap(0, Relaxed), request: sample() });
    }

    /// Who made most of the requests of the last time, `most` of each list.
    pub fn ranking(&self, now: Instant, last: Duration, most: usize) -> TrafficRanking {
        let mut ranking = TrafficRanking::default();
        // No request waits for it, so the names need no copies.
        let ring = self.ring.lock();
        let mut sums: [HashMap<HitterKey<'_>, HitterSums>; 4] = Default::default();
        let age = |taken: &Taken| now.saturating_duration_since(taken.at);
        // What was pushed out of a full ring was older than all that is in it.
        ranking.covers = match ring.front() {
            Some(first) if ring.len() >= KEPT => age(first).min(last),
            _ => last,
        };
        for taken in ring.iter().filter(|taken| age(taken) <= last) {
            ranking.sampled += 1;
            ranking.all.add(taken);
            for (sums, key) in sums.iter_mut().zip(HitterKey::all(&taken.request)) {
                if let Some(key) = key {
                    sums.entry(key).or_default().add(taken);
                }
            }
        }
        ranking.lists = sums
            .iter()
            .map(|sums| HitterMeasure::ALL.iter().map(|measure| HitterKey::most(sums, *measure, most)).collect())
            .collect();
        ranking
    }

    /// Writes the shares of the first ranks to the metric.
    pub(super) fn publish(&self, now: Instant) {
        let ranking = self.ranking(now, SCRAPED, RANKS);
        for (kind, lists) in HitterKind::ALL.iter().zip(&ranking.lists) {
            for (measure, list) in HitterMeasure::ALL.iter().zip(lists) {
                let all = ranking.all.of(*measure);
                for rank in 0..RANKS {
                    let own = list.get(rank).map_or(0, |hitter| hitter.sums.of(*measure));
                    let share = if all == 0 { 0.0 } else { own as f64 / all as f64 };
                    let rank = (rank + 1).to_string();
                    self.shares.with_label_values(&[kind.as_str(), measure.as_str(), &rank]).set(share);
                }
            }
        }
    }
}

/// One of those that are ranked.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum HitterKey<'a> {
    Token([u8; 12]),
    Text(&'a str),
    Client(IpAddr),
}

impl<'a> HitterKey<'a> {
    /// By kind.
    fn all(request: &'a RequestSample) -> [Option<Self>; 4] {
        [
            request.token.map(Self::Token),
            request.user.as_deref().map(Self::Text),
            request.client.map(Self::Client),
            Some(Self::Text(&request.route)),
        ]
    }

    fn name(&self) -> String {
        match self {
            Self::Token(id) => String::from_utf8_lossy(id).into_owned(),
            Self::Text(text) => (*text).to_owned(),
            Self::Client(address @ IpAddr::V4(_)) => address.to_string(),
            Self::Client(network @ IpAddr::V6(_)) => format!("{network}/64"),
        }
    }

    fn most(sums: &HashMap<Self, HitterSums>, measure: HitterMeasure, most: usize) -> Vec<HeavyHitter> {
        let mut list: Vec<(&Self, &HitterSums)> = sums.iter().filter(|(_, sums)| sums.of(measure) > 0).collect();
        // By key among equals, so that the order does not change from one time to the next.
        list.sort_unstable_by(|(a, x), (b, y)| y.of(measure).cmp(&x.of(measure)).then_with(|| a.cmp(b)));
        list.into_iter().take(most).map(|(key, sums)| HeavyHitter { name: key.name(), sums: *sums }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::metrics::Metrics;
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn of(user: &str, bytes: u64) -> RequestSample {
        RequestSample {
            token: None,
            user: Some(user.into()),
            client: Some("192.0.2.1".parse().unwrap()),
            route: "api".into(),
            bytes,
            refused: bytes == 0,
            backend: Duration::from_millis(bytes),
        }
    }

    /// Users by requests, or whatever it is.
    fn users(ranking: &TrafficRanking, measure: HitterMeasure) -> Vec<(&str, u128)> {
        let list = &ranking.lists[HitterKind::User as usize][measure as usize];
        list.iter().map(|hitter| (&*hitter.name, hitter.sums.of(measure))).collect()
    }

    #[test]
    fn of_few_requests_all_are_counted() {
        let metrics = Metrics::new("test").unwrap();
        let (hitters, start) = (metrics.heavy_hitters(), Instant::now());
        for _ in 0..300 {
            hitters.note(start, || 0.5, || of("a", 10));
        }
        (0..200).for_each(|_| hitters.note(start, || 0.5, || of("b", 100)));
        (0..7).for_each(|_| hitters.note(start, || 0.5, || of("c", 0)));
        let ranking = hitters.ranking(start, MINUTE, 2);
        assert_eq!((ranking.sampled, ranking.covers), (507, MINUTE));
        assert_eq!(
            ranking.all,
            HitterSums { requests: 507, bytes: 23_000, refusals: 7, backend: Duration::from_millis(23_000) }
        );
        assert_eq!(users(&ranking, HitterMeasure::Requests), [("a", 300), ("b", 200)]);
        assert_eq!(users(&ranking, HitterMeasure::Bytes), [("b", 20_000), ("a", 3_000)]);
        assert_eq!(users(&ranking, HitterMeasure::Refusals), [("c", 7)]);
        assert_eq!(users(&ranking, HitterMeasure::BackendTime), [("b", 20_000_000), ("a", 3_000_000)]);
        let text = metrics.render().unwrap();
        let first = r#"tollgate_heavy_hitter_share{by="refusals",of="user",rank="1"} 1"#;
        assert!(text.contains(first) && !text.contains("192.0.2.1"), "{text}");
    }

    #[test]
    fn of_many_requests_a_bounded_sample_stands_for_all() {
        let metrics = Metrics::new("test").unwrap();
        let (hitters, start) = (metrics.heavy_hitters(), Instant::now());
        let mut random = fastrand::Rng::with_seed(3);
        // Two minutes of 5,000 a second: a third are of one user, the others of a thousand.
        let count = 600_000;
        for index in 0..count {
            let user = if random.u8(0..3) == 0 { "busy".to_owned() } else { random.u16(0..1_000).to_string() };
            let now = start + Duration::from_micros(200) * index;
            let chance = random.f32();
            hitters.note(now, || chance, || of(&user, 1));
        }
        let ranking = hitters.ranking(start + Duration::from_secs(120), MINUTE, 10);
        assert!((6_500..=KEPT).contains(&ranking.sampled), "{}", ranking.sampled);
        assert!(ranking.all.requests.abs_diff(300_000) < 3_000, "{:?}", ranking.all);
        let list = users(&ranking, HitterMeasure::Requests);
        assert_eq!(list[0].0, "busy");
        assert!(list[0].1.abs_diff(100_000) < 6_000 && list[1].1 < 3_000, "{list:?}");
        // Asked for longer than it can say, it says so.
        let longest = hitters.ranking(start + Duration::from_secs(120), Duration::from_secs(600), 10);
        assert_eq!(longest.sampled, KEPT);
        assert!(longest.covers < Duration::from_secs(75), "{:?}", longest.covers);
    }

    #[test]
    fn what_is_old_counts_no_more() {
        let metrics = Metrics::new("test").unwrap();
        let (hitters, start) = (metrics.heavy_hitters(), Instant::now());
        hitters.note(start, || 0.5, || of("a", 1));
        hitters.note(start + MINUTE, || 0.5, || of("b", 1));
        let ranking = hitters.ranking(start + MINUTE + Duration::from_secs(1), MINUTE, 10);
        assert_eq!(users(&ranking, HitterMeasure::Requests), [("b", 1)]);
    }

    #[test]
    fn a_request_does_not_wait_for_a_reader() {
        let metrics = Metrics::new("test").unwrap();
        let (hitters, start) = (metrics.heavy_hitters(), Instant::now());
        let reader = hitters.ring.lock();
        hitters.note(start, || 0.5, || of("a", 1));
        drop(reader);
        hitters.note(start, || 0.5, || of("b", 1));
        // The next one stands for it.
        let ranking = hitters.ranking(start, MINUTE, 10);
        assert_eq!(users(&ranking, HitterMeasure::Requests), [("b", 2)]);
    }

    #[test]
    fn an_ipv6_client_is_named_by_its_network() {
        let metrics = Metrics::new("test").unwrap();
        let (hitters, start) = (metrics.heavy_hitters(), Instant::now());
        let client = Some("2001:db8::".parse().unwrap());
        hitters.note(start, || 0.5, || RequestSample { client, token: Some(*b"0123456789ab"), ..of("a", 1) });
        let lists = hitters.ranking(start, MINUTE, 10).lists;
        let name = |kind: HitterKind| lists[kind as usize][0][0].name.clone();
        assert_eq!([name(HitterKind::Client), name(HitterKind::Token)], ["2001:db8::/64", "0123456789ab"]);
    }
}
