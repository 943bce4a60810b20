//! Models of the cache and of single flights under real threads: what callers, lookups, changes, failures and time do at once,
//! chosen by seeds. The primitives are the product's own (parking_lot, moka, tokio's Notify, std's atomics): loom and shuttle
//! have stand-ins for std's only, and swapping them would leave out what the code rests on. Each thread's choices repeat with
//! its seed; how the threads interleave does not.

use super::*;
use crate::store::{Change, LookupLimits, TokenRecord, TokenStore};
use async_trait::async_trait;
use std::sync::atomic::Ordering::SeqCst;
use tokio::time::timeout;

/// Goes on by a millisecond with each step of whoever takes one, so that entries age, are refreshed and run out.
static CLOCK: AtomicU64 = AtomicU64::new(1_000_000);

fn clock() -> Now {
    let ms = CLOCK.load(SeqCst);
    Now { mono_ms: ms, unix_ms: ms }
}

const TOKENS: usize = 4;
/// Nothing in these tests takes so long: a caller that waits longer is lost.
const LOST: Duration = Duration::from_secs(20);

fn token(number: usize) -> [u8; 8] {
    (number as u64).to_be_bytes()
}

fn handle_of(digest: &Digest) -> Digest {
    Digest::of(&[digest.as_bytes().as_slice(), b"salt"].concat())
}

/// A store whose records have a version, which is the name of the user. It fails, panics and takes its time by chance.
struct Versions {
    current: [AtomicU64; TOKENS],
    lookups: AtomicU64,
}

impl Versions {
    fn new() -> Arc<Self> {
        Arc::new(Self { current: std::array::from_fn(|_| AtomicU64::new(1)), lookups: AtomicU64::new(0) })
    }
}

#[async_trait]
impl TokenStore for Versions {
    fn lookup_limits(&self) -> LookupLimits {
        LookupLimits { at_once: 3, tokens: 2 }
    }

    async fn lookup(&self, credential: &Credential) -> Result<Option<TokenRecord>, StoreError> {
        let number = self.lookups.fetch_add(1, SeqCst);
        let place = credential.expose_secret()[7] as usize;
        // Determined when the store reads, and told later.
        let version = self.current[place].load(SeqCst);
        for _ in 0..fastrand::u8(0..4) {
            tokio::task::yield_now().await;
        }
        match number % 97 {
            13 => Err(StoreError::Unavailable("it is down".into())),
            29 => Err(StoreError::Overloaded),
            53 => std::panic::resume_unwind(Box::new("the store has a bug")),
            _ => Ok(Some(TokenRecord::new(*credential.digest(), version.to_string()))),
        }
    }

    fn handle(&self, credential: &Credential) -> Option<Digest> {
        Some(handle_of(credential.digest()))
    }
}

fn authenticator(store: &Arc<Versions>) -> Authenticator {
    let settings = CacheSettings {
        positive_ttl: Duration::from_millis(400),
        negative_ttl: Duration::from_millis(400),
        stale_if_error: Duration::from_secs(10),
        // One of the tokens has to go, again and again.
        positive_capacity: TOKENS as u64 - 1,
        negative_capacity: 100,
    };
    let metrics = Arc::new(Metrics::new("test").unwrap());
    let store = Arc::<Versions>::clone(store);
    let link = Link::new("versions".into(), store, Duration::from_secs(10), Arc::new(metrics.store("versions")));
    Authenticator::new(Chain::new(vec![link]), settings, metrics, clock)
}

/// All the ways in which a change is told.
fn tell(authenticator: &Authenticator, digest: &Digest, way: u8) {
    let change = |token| authenticator.inner.apply(0, Event::Changed(vec![Change { token, at_ms: 0 }]));
    match way {
        0 | 1 => change(Named::Token(*digest)),
        2 | 3 => change(Named::Handle(handle_of(digest))),
        4 => {
            authenticator.forget_prefix(&DigestPrefix::from_hex(digest.id().as_str()).unwrap());
        }
        _ => authenticator.forget_all(),
    }
}

/// A caller who asks once it was told that a token changed never gets an older record: not from the cache, not from a lookup that
/// was in flight, its own or another's, and not from an entry that is used because the store failed. Callers go away at any time,
/// the one that started the lookup among them, lookups panic, and everybody who stays gets an answer.
#[test]
fn nobody_gets_what_was_revoked_before_they_asked_and_nobody_waits_for_ever() {
    const CALLERS: u64 = 6;
    const CHANGES: usize = 12_000;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_time().build().unwrap();
    let store = Versions::new();
    let authenticator = Arc::new(authenticator(&store));
    let digests: [Digest; TOKENS] = std::array::from_fn(|number| Digest::of(&token(number)));
    let told: Arc<[AtomicU64; TOKENS]> = Arc::new(std::array::from_fn(|_| AtomicU64::new(0)));
    let over = Arc::new(AtomicBool::new(false));
    let changes = runtime.spawn({
        let (store, authenticator) = (Arc::clone(&store), Arc::clone(&authenticator));
        let (told, over) = (Arc::clone(&told), Arc::clone(&over));
        async move {
            let mut random = fastrand::Rng::with_seed(1);
            for _ in 0..CHANGES {
                let number = random.usize(0..TOKENS);
                let version = store.current[number].fetch_add(1, SeqCst) + 1;
                tell(&authenticator, &digests[number], random.u8(0..6));
                told[number].store(version, SeqCst);
                CLOCK.fetch_add(random.u64(0..10), SeqCst);
                (0..random.u16(0..400)).for_each(|_| std::hint::spin_loop());
                for _ in 0..random.u8(0..3) {
                    tokio::task::yield_now().await;
                }
            }
            over.store(true, SeqCst);
        }
    });
    let callers: Vec<_> = (0..CALLERS)
        .map(|seed| {
            let (authenticator, told, over) = (Arc::clone(&authenticator), Arc::clone(&told), Arc::clone(&over));
            runtime.spawn(async move {
                let mut random = fastrand::Rng::with_seed(seed);
                let (mut answers, mut hits, mut waited, mut left) = (0, 0, 0, 0);
                // The changes go on by themselves, and come to an end.
                for step in 0.. {
                    if over.load(SeqCst) {
                        break;
                    }
                    let number = random.usize(0..TOKENS);
                    let least = told[number].load(SeqCst);
                    let now = clock();
                    let answer = match authenticator.check(&token(number), &digests[number], now, Mode::Serve) {
                        Checked::Known(answer, _) => {
                            hits += 1;
                            Ok(answer)
                        }
                        // Goes away, sometimes having started the lookup, and sometimes half-way.
                        Checked::Waiting(waiting) if random.u8(0..8) == 0 => {
                            left += 1;
                            if random.bool() {
                                let _ = futures_util::poll!(std::pin::pin!(waiting.answer()));
                            }
                            continue;
                        }
                        Checked::Waiting(waiting) => {
                            waited += 1;
                            timeout(LOST, waiting.answer()).await.unwrap_or_else(|_| panic!("step {step}: lost")).0
                        }
                        Checked::NotAsked => panic!("it may look up"),
                    };
                    if let Ok(TokenStatus::Valid(principal)) = answer {
                        answers += 1;
                        let version: u64 = principal.user().parse().unwrap();
                        assert!(version >= least, "caller {seed}, step {step}: {version}, and {least} was told");
                    }
                    if random.u8(0..4) == 0 {
                        CLOCK.fetch_add(1, SeqCst);
                        tokio::task::yield_now().await;
                    }
                }
                (answers, hits, waited, left)
            })
        })
        .collect();
    let mut sums = [0; 4];
    let ended: Vec<_> = callers.into_iter().map(|caller| runtime.block_on(caller)).collect();
    runtime.block_on(changes).unwrap();
    for counted in ended {
        let (answers, hits, waited, left) = counted.unwrap();
        sums.iter_mut().zip([answers, hits, waited, left]).for_each(|(sum, more)| *sum += more);
    }
    // Everything that is to be seen has happened.
    assert!(sums.iter().all(|sum| *sum > 500), "{sums:?}");
    // No flight is left behind, by those that panicked either.
    let is_clear = || authenticator.inner.flights.iter().all(|shard| shard.lock().is_empty());
    let clears = async {
        while !is_clear() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let cleared = runtime.block_on(async { timeout(LOST, clears).await });
    assert!(cleared.is_ok(), "a flight is left behind");
    assert_eq!(authenticator.inner.refreshes.load(SeqCst) + authenticator.inner.strangers.load(SeqCst), 0);
    let entries = authenticator.inner.cache.saved_entries(clock()).len();
    assert!(entries < TOKENS, "{entries} entries");
}

/// A waiter and the end of its flight, over and over: between the look at the outcome and the wait there is no gap.
#[test]
fn no_waiter_of_a_flight_is_lost() {
    const ROUNDS: usize = 20_000;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let flights: Vec<Arc<Flight>> = (0..ROUNDS).map(|_| Arc::default()).collect();
    let reached = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = fastrand::Rng::with_seed(3);
            for (round, flight) in flights.iter().enumerate() {
                while reached.load(SeqCst) < round {
                    std::thread::yield_now();
                }
                (0..random.u16(0..200)).for_each(|_| std::hint::spin_loop());
                flight.complete(Err(CannotTell::Store));
            }
        });
        for (round, flight) in flights.iter().enumerate() {
            reached.store(round, SeqCst);
            let outcome = runtime.block_on(async { timeout(Duration::from_secs(5), flight.outcome()).await });
            // For the thread beside this one, which would wait for ever.
            reached.store(if outcome.is_ok() { round } else { usize::MAX }, SeqCst);
            assert!(outcome.is_ok(), "round {round}: the waiter is lost");
        }
    });
}

/// No entry is used past its lifetime, nor further from its lookup or from the last confirmation than is promised, nor once all
/// were doubted, whatever readers meet.
#[test]
fn no_answer_is_older_than_its_promise() {
    const ROUNDS: u64 = 60_000;
    const TTL_MS: u64 = 5_000;
    let cache = Cache::new(CacheSettings {
        positive_ttl: Duration::from_millis(TTL_MS),
        negative_ttl: Duration::from_secs(1),
        stale_if_error: Duration::from_secs(60),
        positive_capacity: 10,
        negative_capacity: 10,
    });
    let digest = Digest::of(b"t");
    // When the entry of each round was put, and the rounds before which all were doubted.
    let put_at: Vec<AtomicU64> = (0..=ROUNDS).map(|_| AtomicU64::new(0)).collect();
    let (time, doubted, confirmed) = (AtomicU64::new(10_000), AtomicU64::new(0), AtomicU64::new(0));
    let fresh = AtomicU64::new(0);
    cache.hear_until(0);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                loop {
                    let (floor, ms) = (doubted.load(SeqCst), time.load(SeqCst));
                    if ms == u64::MAX {
                        return;
                    }
                    let now = Now { mono_ms: ms, unix_ms: ms };
                    let Cached::Fresh { answer: TokenStatus::Valid(principal), .. } =
                        cache.get(&digest, now, Mode::Serve)
                    else {
                        continue;
                    };
                    let round: u64 = principal.user().parse().unwrap();
                    let put = put_at[round as usize].load(SeqCst);
                    assert!(round > floor, "round {round} is used, and {floor} was doubted");
                    assert!(ms < put + TTL_MS, "round {round}: put at {put}, used at {ms}");
                    let until = confirmed.load(SeqCst);
                    assert!(ms < until || ms < put + 700, "round {round}: put at {put}, confirmed until {until}, {ms}");
                    fresh.fetch_add(1, SeqCst);
                }
            });
        }
        let mut random = fastrand::Rng::with_seed(5);
        let mut ms = 10_000;
        for round in 1..=ROUNDS {
            let record = TokenRecord::new(digest, round.to_string());
            let now = Now { mono_ms: ms, unix_ms: ms };
            let (answer, _) = judge(Some(&record), &digest, now);
            put_at[round as usize].store(ms, SeqCst);
            let learned = Learned { answer: &answer, until_unix_ms: None, handles: Vec::new(), asked_ms: ms };
            cache.put(digest, learned, now, random.f64());
            for _ in 0..random.u8(0..6) {
                // Known before it is in force: readers look at this behind the cache.
                match random.u8(0..4) {
                    0 | 1 => {
                        confirmed.fetch_max(ms + PROMISE_MS, SeqCst);
                        cache.hear_until(ms + PROMISE_MS);
                    }
                    2 => {
                        cache.doubt_all();
                        doubted.store(round, SeqCst);
                    }
                    _ => {}
                }
                ms += random.u64(0..900);
                time.store(ms, SeqCst);
            }
        }
        time.store(u64::MAX, SeqCst);
    });
    assert!(fresh.into_inner() > 1_000);
}
