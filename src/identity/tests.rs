//! The promises of the cache, against a store whose every answer the test decides and a clock that it turns.

use super::store::TokenRecord;
use super::*;
use async_trait::async_trait;
use std::cell::Cell;
use std::collections::VecDeque;
use tokio::sync::Semaphore;

thread_local! {
    /// The tests' clock. Each test runs on one thread with all its tasks.
    static CLOCK: Cell<u64> = const { Cell::new(1_000_000) };
}

fn clock() -> Now {
    let ms = CLOCK.get();
    Now { mono_ms: ms, unix_ms: ms }
}

fn pass(time: Duration) {
    CLOCK.set(CLOCK.get() + time.as_millis() as u64);
}

#[derive(Clone)]
enum Says {
    User(&'static str),
    Expires(u64),
    Revoked,
    Nothing,
    CannotTell,
    Panics,
}

/// Answers from a script, the last line of which stands for all that follow; each answer waits for a permit.
struct FakeStore {
    script: Mutex<VecDeque<Says>>,
    asked: AtomicUsize,
    gate: Semaphore,
}

#[async_trait]
impl TokenStore for FakeStore {
    fn kind(&self) -> &'static str {
        "fake"
    }

    async fn lookup(&self, credential: &Credential) -> Result<Option<TokenRecord>, StoreError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        // What the store knows is fixed when it is asked, as with a real query, and told when the gate opens.
        let says = {
            let mut script = self.script.lock();
            if script.len() > 1 { script.pop_front() } else { script.front().cloned() }
        };
        self.gate.acquire().await.unwrap().forget();
        let record = |user: &str, expires, revoked| TokenRecord {
            digest: *credential.digest(),
            user: user.into(),
            scopes: vec!["api".into()],
            description: String::new(),
            created: 0,
            expires,
            revoked,
            last_used: None,
        };
        match says.unwrap() {
            Says::User(user) => Ok(Some(record(user, None, None))),
            Says::Expires(at) => Ok(Some(record("a", Some(at), None))),
            Says::Revoked => Ok(Some(record("a", None, Some(1)))),
            Says::Nothing => Ok(None),
            Says::CannotTell => Err(StoreError::Unavailable("it is down".into())),
            Says::Panics => panic!("the store has a bug"),
        }
    }
}

struct Bench {
    store: Arc<FakeStore>,
    authenticator: Authenticator,
}

const TTL: Duration = Duration::from_secs(60);
const NEGATIVE_TTL: Duration = Duration::from_secs(10);
const STALE: Duration = Duration::from_secs(600);

fn bench(script: &[Says]) -> Bench {
    let store = Arc::new(FakeStore {
        script: Mutex::new(script.iter().cloned().collect()),
        asked: AtomicUsize::new(0),
        gate: Semaphore::new(1_000_000),
    });
    let settings = CacheSettings {
        positive_ttl: TTL,
        negative_ttl: NEGATIVE_TTL,
        stale_if_error: STALE,
        positive_capacity: 1_000,
        negative_capacity: 1_000,
    };
    let metrics = Arc::new(Metrics::new("test").unwrap());
    let dynamic: Arc<dyn TokenStore> = Arc::<FakeStore>::clone(&store);
    Bench { authenticator: Authenticator::new(dynamic, settings, Duration::from_secs(2), metrics, clock), store }
}

impl Bench {
    fn asked(&self) -> usize {
        self.store.asked.load(Ordering::SeqCst)
    }

    /// Keeps answers back until [`Self::open`].
    fn shut(&self) {
        self.store.gate.forget_permits(usize::MAX >> 4);
    }

    fn open(&self) {
        self.store.gate.add_permits(1_000_000);
    }

    async fn ask(&self, token: &str) -> Result<Answer, CannotTell> {
        match self.authenticator.check(token.as_bytes(), clock()) {
            Checked::Known(answer) => Ok(answer),
            Checked::Waiting(waiting) => waiting.answer().await,
        }
    }

    async fn user(&self, token: &str) -> String {
        match self.ask(token).await {
            Ok(Answer::Valid(principal)) => principal.user().to_owned(),
            other => format!("{other:?}"),
        }
    }

    /// What is known without asking the store.
    fn known(&self, token: &str) -> Option<Answer> {
        match self.authenticator.check(token.as_bytes(), clock()) {
            Checked::Known(answer) => Some(answer),
            Checked::Waiting(_) => None,
        }
    }
}

async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn one_lookup_for_any_number_of_callers() {
    let bench = bench(&[Says::User("a")]);
    bench.shut();
    let waiting: Vec<_> = (0..100)
        .map(|_| match bench.authenticator.check(b"t", clock()) {
            Checked::Waiting(waiting) => waiting,
            Checked::Known(_) => panic!("nothing can be known"),
        })
        .collect();
    settle().await;
    bench.open();
    for caller in waiting {
        assert!(matches!(caller.answer().await, Ok(Answer::Valid(_))));
    }
    assert_eq!(bench.asked(), 1);
    assert!(bench.known("t").is_some());
}

#[tokio::test]
async fn a_caller_that_goes_away_leaves_the_lookup_to_the_others() {
    let bench = bench(&[Says::User("a")]);
    bench.shut();
    let first = bench.authenticator.check(b"t", clock());
    let second = bench.authenticator.check(b"t", clock());
    settle().await;
    drop(first);
    bench.open();
    let Checked::Waiting(second) = second else { panic!("nothing can be known") };
    assert!(matches!(second.answer().await, Ok(Answer::Valid(_))));
    assert_eq!(bench.asked(), 1);
}

#[tokio::test]
async fn unknown_is_remembered_for_a_time_of_its_own() {
    let bench = bench(&[Says::Nothing, Says::User("a")]);
    assert!(matches!(bench.ask("t").await, Ok(Answer::Invalid(Invalid::Unknown))));
    pass(NEGATIVE_TTL / 2);
    assert!(matches!(bench.known("t"), Some(Answer::Invalid(Invalid::Unknown))));
    assert_eq!(bench.asked(), 1);
    pass(NEGATIVE_TTL);
    assert_eq!(bench.user("t").await, "a");
}

#[tokio::test]
async fn expired_and_revoked_records_are_invalid() {
    let bench = bench(&[Says::Revoked, Says::Expires(1), Says::Expires(CLOCK.get() / 1000 + 30)]);
    assert!(matches!(bench.ask("r").await, Ok(Answer::Invalid(Invalid::Revoked))));
    assert!(matches!(bench.ask("e").await, Ok(Answer::Invalid(Invalid::Expired))));
    assert!(matches!(bench.ask("s").await, Ok(Answer::Valid(_))));
    // Its own end comes before the cache's.
    pass(Duration::from_secs(31));
    assert!(matches!(bench.known("s"), Some(Answer::Invalid(Invalid::Expired))));
}

#[tokio::test]
async fn a_store_that_cannot_tell_never_opens_and_is_never_remembered() {
    let bench = bench(&[Says::CannotTell, Says::CannotTell, Says::Nothing]);
    assert_eq!(bench.ask("t").await.err(), Some(CannotTell));
    assert_eq!(bench.ask("t").await.err(), Some(CannotTell));
    assert!(matches!(bench.ask("t").await, Ok(Answer::Invalid(Invalid::Unknown))));
    assert_eq!(bench.asked(), 3);
}

#[tokio::test]
async fn the_last_known_answer_stands_in_for_a_while() {
    let bench = bench(&[Says::User("a"), Says::CannotTell]);
    assert_eq!(bench.user("t").await, "a");
    pass(TTL + Duration::from_secs(1));
    assert!(bench.known("t").is_none(), "a stale answer must not be given before the store was asked");
    assert_eq!(bench.user("t").await, "a");
    pass(STALE);
    assert_eq!(bench.ask("t").await.err(), Some(CannotTell));
}

#[tokio::test]
async fn a_stale_answer_does_not_outlive_a_no() {
    let bench = bench(&[Says::User("a"), Says::Revoked, Says::CannotTell]);
    assert_eq!(bench.user("t").await, "a");
    pass(TTL + Duration::from_secs(1));
    assert!(matches!(bench.ask("t").await, Ok(Answer::Invalid(Invalid::Revoked))));
    pass(NEGATIVE_TTL);
    assert_eq!(bench.ask("t").await.err(), Some(CannotTell), "the old yes must be gone");
}

#[tokio::test]
async fn entries_in_use_are_refreshed_without_a_wait() {
    let bench = bench(&[Says::User("a"), Says::User("b")]);
    assert_eq!(bench.user("t").await, "a");
    pass(TTL * 8 / 10);
    // Answered at once with what is known, and asked again behind the scenes, once.
    assert!(bench.known("t").is_some() && bench.known("t").is_some());
    settle().await;
    assert_eq!(bench.asked(), 2);
    pass(TTL * 5 / 10);
    assert!(bench.known("t").is_some(), "the refreshed entry has a new life");
    assert_eq!(bench.user("t").await, "b");
}

#[tokio::test]
async fn a_failed_refresh_is_tried_again_and_keeps_the_entry() {
    let bench = bench(&[Says::User("a"), Says::CannotTell, Says::User("b")]);
    assert_eq!(bench.user("t").await, "a");
    pass(TTL * 8 / 10);
    assert!(bench.known("t").is_some());
    settle().await;
    assert!(bench.known("t").is_some());
    settle().await;
    assert_eq!(bench.asked(), 2, "not more than one try a second");
    pass(Duration::from_millis(1_100));
    assert!(bench.known("t").is_some());
    settle().await;
    assert_eq!((bench.asked(), bench.user("t").await.as_str()), (3, "b"));
}

#[tokio::test]
async fn a_lookup_in_flight_cannot_resurrect_what_was_revoked() {
    let bench = bench(&[Says::User("a"), Says::Revoked]);
    bench.shut();
    let Checked::Waiting(waiting) = bench.authenticator.check(b"t", clock()) else { panic!("nothing can be known") };
    settle().await;
    // The store has read the record and has not told it yet; now it changes.
    bench.authenticator.forget(&Digest::of(b"t"));
    bench.open();
    assert!(matches!(waiting.answer().await, Ok(Answer::Invalid(Invalid::Revoked))));
    assert!(matches!(bench.known("t"), Some(Answer::Invalid(Invalid::Revoked))));
    assert_eq!(bench.asked(), 2);
}

#[tokio::test]
async fn nor_when_everything_changed() {
    let bench = bench(&[Says::User("a"), Says::Nothing]);
    bench.shut();
    let Checked::Waiting(waiting) = bench.authenticator.check(b"t", clock()) else { panic!("nothing can be known") };
    settle().await;
    bench.authenticator.forget_all();
    bench.open();
    assert!(matches!(waiting.answer().await, Ok(Answer::Invalid(Invalid::Unknown))));
}

#[tokio::test]
async fn a_background_refresh_cannot_resurrect_either() {
    let bench = bench(&[Says::User("a"), Says::User("a"), Says::Revoked]);
    assert_eq!(bench.user("t").await, "a");
    pass(TTL * 8 / 10);
    bench.shut();
    assert!(bench.known("t").is_some());
    settle().await;
    bench.authenticator.forget(&Digest::of(b"t"));
    bench.open();
    settle().await;
    assert!(matches!(bench.known("t"), Some(Answer::Invalid(Invalid::Revoked))));
}

#[tokio::test]
async fn a_token_that_changes_all_the_time_is_refused_and_not_believed() {
    let bench = bench(&[Says::User("a")]);
    bench.shut();
    let Checked::Waiting(waiting) = bench.authenticator.check(b"t", clock()) else { panic!("nothing can be known") };
    for _ in 0..MAX_ATTEMPTS {
        settle().await;
        bench.authenticator.forget(&Digest::of(b"t"));
        bench.store.gate.add_permits(1);
    }
    assert_eq!(waiting.answer().await.err(), Some(CannotTell));
    assert_eq!(bench.asked(), MAX_ATTEMPTS);
}

#[tokio::test]
async fn forgetting_takes_back_a_no_as_well() {
    let bench = bench(&[Says::Nothing, Says::User("a")]);
    assert!(matches!(bench.ask("t").await, Ok(Answer::Invalid(_))));
    bench.authenticator.forget(&Digest::of(b"t"));
    assert_eq!(bench.user("t").await, "a");
}

#[tokio::test(start_paused = true)]
async fn a_slow_store_is_cut_off() {
    let bench = bench(&[Says::User("a")]);
    bench.shut();
    let before = tokio::time::Instant::now();
    assert_eq!(bench.ask("t").await.err(), Some(CannotTell));
    assert_eq!(before.elapsed(), Duration::from_secs(2));
}

#[tokio::test]
async fn lookups_under_way_are_bounded() {
    let bench = bench(&[Says::Nothing]);
    bench.shut();
    let waiting: Vec<_> =
        (0..MAX_LOOKUPS).map(|n| bench.authenticator.check(format!("t{n}").as_bytes(), clock())).collect();
    let Checked::Waiting(excess) = bench.authenticator.check(b"one more", clock()) else {
        panic!("nothing can be known")
    };
    assert_eq!(excess.answer().await.err(), Some(CannotTell));
    bench.open();
    for caller in waiting {
        let Checked::Waiting(caller) = caller else { panic!("nothing can be known") };
        assert!(matches!(caller.answer().await, Ok(Answer::Invalid(_))));
    }
    assert!(matches!(bench.ask("one more").await, Ok(Answer::Invalid(_))), "and there is room again");
}

#[tokio::test]
async fn a_panic_in_the_store_costs_one_lookup() {
    let bench = bench(&[Says::Panics, Says::User("a")]);
    assert_eq!(bench.ask("t").await.err(), Some(CannotTell));
    assert_eq!(bench.user("t").await, "a");
}

#[tokio::test]
async fn garbage_does_not_evict_good_tokens() {
    let bench = bench(&[Says::User("a"), Says::Nothing]);
    assert_eq!(bench.user("good").await, "a");
    for n in 0..20_000 {
        assert!(matches!(bench.ask(&format!("bad{n}")).await, Ok(Answer::Invalid(_))));
    }
    assert!(bench.known("good").is_some());
    bench.authenticator.inner.cache.run_pending();
    let (valid, invalid) = bench.authenticator.cache_sizes();
    assert!(valid == 1 && invalid <= 1_000, "{valid} {invalid}");
}

#[test]
fn lifetimes_differ_by_chance() {
    let settings = CacheSettings {
        positive_ttl: TTL,
        negative_ttl: NEGATIVE_TTL,
        stale_if_error: Duration::ZERO,
        positive_capacity: 10,
        negative_capacity: 10,
    };
    let cache = Cache::new(settings);
    let answer = Answer::Invalid(Invalid::Unknown);
    let alive = |token: &[u8], after: Duration| {
        let now = Now { mono_ms: after.as_millis() as u64, unix_ms: 0 };
        matches!(cache.get(&Digest::of(token), now), Cached::Answer { .. })
    };
    cache.put(Digest::of(b"long"), &answer, Now { mono_ms: 0, unix_ms: 0 }, 0.0);
    cache.put(Digest::of(b"short"), &answer, Now { mono_ms: 0, unix_ms: 0 }, 1.0);
    assert!(alive(b"long", NEGATIVE_TTL * 95 / 100) && !alive(b"short", NEGATIVE_TTL * 95 / 100));
    assert!(alive(b"short", NEGATIVE_TTL * 85 / 100) && !alive(b"long", NEGATIVE_TTL));
}

#[tokio::test]
async fn uses_are_noted_coarsely() {
    let bench = bench(&[Says::User("a")]);
    let start = clock().unix_ms;
    assert_eq!(bench.user("t").await, "a");
    assert_eq!(bench.authenticator.inner.cache.used_since(start), [(Digest::of(b"t"), start)]);
    pass(Duration::from_secs(30));
    assert!(bench.known("t").is_some());
    assert_eq!(bench.authenticator.inner.cache.used_since(start + 1), []);
}
