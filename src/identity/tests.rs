//! Tests of the cache and of lookups, with a scripted store and a clock that the test controls.

use super::*;
use crate::store::{Change, Heard, LookupLimits, TokenRecord, TokenStore};
use async_trait::async_trait;
use futures_util::FutureExt as _;
use std::cell::Cell;
use std::collections::VecDeque;
use tokio::sync::{Semaphore, mpsc};

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
    NotBefore(u64),
    Blocked,
    Nothing,
    CannotTell,
    Busy,
    Garbage,
    Panics,
}

/// A store that answers by a script, whose last entry is repeated. Each answer waits for a permit.
struct FakeStore {
    script: Mutex<VecDeque<Says>>,
    asked: AtomicUsize,
    gate: Semaphore,
    /// Its change notifications.
    events: (mpsc::UnboundedSender<Event>, tokio::sync::Mutex<mpsc::UnboundedReceiver<Event>>),
    /// Its answer to the question what changed.
    changed: Mutex<Option<Vec<Digest>>>,
    /// The marks with which it was asked.
    marks: Mutex<Vec<String>>,
    tells_changes: bool,
    /// The number of uses in each batch.
    uses: Mutex<Vec<usize>>,
    /// The uses it received, and whether it accepts them.
    noted: Mutex<Vec<(Digest, u64)>>,
    takes_uses: AtomicBool,
    at_once: usize,
}

#[async_trait]
impl TokenStore for FakeStore {
    fn lookup_limits(&self) -> LookupLimits {
        LookupLimits { at_once: self.at_once, tokens: 4 }
    }

    async fn lookup(&self, credential: &Credential) -> Result<Option<TokenRecord>, StoreError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        // The answer is determined when the query begins, as in a real store, and returned when the gate opens.
        let says = {
            let mut script = self.script.lock();
            if script.len() > 1 { script.pop_front() } else { script.front().cloned() }
        };
        self.gate.acquire().await.unwrap().forget();
        let record = |user: &str, expires, revoked| TokenRecord {
            scopes: vec!["api".into()],
            expires,
            revoked,
            ..TokenRecord::new(*credential.digest(), user)
        };
        match says.unwrap() {
            Says::User(user) => Ok(Some(record(user, None, None))),
            Says::Expires(at) => Ok(Some(record("a", Some(at), None))),
            Says::Revoked => Ok(Some(record("a", None, Some(1)))),
            Says::Nothing => Ok(None),
            Says::NotBefore(at) => Ok(Some(TokenRecord { not_before: Some(at), ..record("a", None, None) })),
            Says::Blocked => Ok(Some(TokenRecord { blocked: true, ..record("a", None, None) })),
            Says::CannotTell => Err(StoreError::Unavailable("it is down".into())),
            Says::Busy => Err(StoreError::Overloaded),
            Says::Garbage => Err(StoreError::Garbage("a number".into())),
            Says::Panics => panic!("the store has a bug"),
        }
    }

    fn handle(&self, credential: &Credential) -> Option<Digest> {
        Some(handle_of(credential.expose_secret()))
    }

    async fn follow(&self, heard: Heard<'_>) {
        while let Some(event) = self.events.1.lock().await.recv().await {
            heard(event);
        }
    }

    fn tells_changes(&self) -> bool {
        self.tells_changes
    }

    async fn changed_since(&self, mark: &str) -> Result<Option<Vec<Digest>>, StoreError> {
        self.marks.lock().push(mark.into());
        Ok(self.changed.lock().clone())
    }

    async fn note_uses(&self, uses: Vec<(Digest, u64)>) -> Result<(), StoreError> {
        if !self.takes_uses.load(Ordering::SeqCst) {
            return Err(StoreError::Unavailable("it is down".into()));
        }
        self.uses.lock().push(uses.len());
        self.noted.lock().extend(uses);
        Ok(())
    }
}

/// The fake store's identifier of a token.
fn handle_of(token: &[u8]) -> Digest {
    Digest::of(&[token, b"salt"].concat())
}

struct Bench {
    store: Arc<FakeStore>,
    authenticator: Arc<Authenticator>,
}

const TTL: Duration = Duration::from_secs(60);
const NEGATIVE_TTL: Duration = Duration::from_secs(10);
const STALE: Duration = Duration::from_secs(600);

/// With a store that sends no notifications, unless a test makes it.
fn bench(script: &[Says]) -> Bench {
    bench_of(script, false)
}

fn bench_of(script: &[Says], tells_changes: bool) -> Bench {
    bench_with(script, tells_changes, 100_000)
}

/// `at_once`: lookups that the store can take at once.
fn bench_with(script: &[Says], tells_changes: bool, at_once: usize) -> Bench {
    let store = Arc::new(FakeStore {
        script: Mutex::new(script.iter().cloned().collect()),
        asked: AtomicUsize::new(0),
        gate: Semaphore::new(1_000_000),
        events: {
            let (tell, told) = mpsc::unbounded_channel();
            (tell, tokio::sync::Mutex::new(told))
        },
        changed: Mutex::new(None),
        marks: Mutex::default(),
        tells_changes,
        uses: Mutex::default(),
        noted: Mutex::default(),
        takes_uses: AtomicBool::new(true),
        at_once,
    });
    let settings = CacheSettings {
        positive_ttl: TTL,
        negative_ttl: NEGATIVE_TTL,
        stale_if_error: STALE,
        positive_capacity: 1_000,
        negative_capacity: 1_000,
    };
    let metrics = Arc::new(Metrics::new("test").unwrap());
    let link = |store: &Arc<FakeStore>, name: &str| {
        let store = Arc::<FakeStore>::clone(store);
        Link::new(name.into(), store, Duration::from_secs(2), Arc::new(metrics.store(name)))
    };
    let chain = Chain::new(vec![link(&store, "fake")]);
    Bench { authenticator: Arc::new(Authenticator::new(chain, settings, Arc::clone(&metrics), clock)), store }
}

impl Bench {
    fn asked(&self) -> usize {
        self.store.asked.load(Ordering::SeqCst)
    }

    /// Delays answers until [`Self::open`].
    fn shut(&self) {
        self.store.gate.forget_permits(usize::MAX >> 4);
    }

    fn open(&self) {
        self.store.gate.add_permits(1_000_000);
    }

    async fn ask(&self, token: &str) -> Result<TokenStatus, CannotTell> {
        match self.authenticator.check(token.as_bytes(), &Digest::of(token.as_bytes()), clock(), Mode::Serve) {
            Checked::Known(answer, _) => Ok(answer),
            Checked::Waiting(waiting) => waiting.answer().await.0,
            Checked::NotAsked => Err(CannotTell::NotAsked),
        }
    }

    async fn user(&self, token: &str) -> String {
        match self.ask(token).await {
            Ok(TokenStatus::Valid(principal)) => principal.user().to_owned(),
            other => format!("{other:?}"),
        }
    }

    /// The status in the cache, without a lookup.
    fn known(&self, token: &str) -> Option<TokenStatus> {
        match self.authenticator.check(token.as_bytes(), &Digest::of(token.as_bytes()), clock(), Mode::Serve) {
            Checked::Known(answer, _) => Some(answer),
            Checked::Waiting(_) | Checked::NotAsked => None,
        }
    }
}

fn check(bench: &Bench, token: &str) -> Checked {
    bench.authenticator.check(token.as_bytes(), &Digest::of(token.as_bytes()), clock(), Mode::Serve)
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
        .map(|_| match check(&bench, "t") {
            Checked::Waiting(waiting) => waiting,
            Checked::Known(..) | Checked::NotAsked => panic!("nothing can be known"),
        })
        .collect();
    settle().await;
    bench.open();
    for caller in waiting {
        assert!(matches!(caller.answer().await.0, Ok(TokenStatus::Valid(_))));
    }
    assert_eq!(bench.asked(), 1);
    assert!(bench.known("t").is_some());
}

#[tokio::test]
async fn a_caller_that_disconnects_does_not_end_the_lookup() {
    let bench = bench(&[Says::User("a")]);
    bench.shut();
    let first = check(&bench, "t");
    let second = check(&bench, "t");
    settle().await;
    drop(first);
    bench.open();
    let Checked::Waiting(second) = second else { panic!("nothing can be known") };
    assert!(matches!(second.answer().await.0, Ok(TokenStatus::Valid(_))));
    assert_eq!(bench.asked(), 1);
}

#[tokio::test]
async fn unknown_tokens_are_cached_for_negative_ttl() {
    let bench = bench(&[Says::Nothing, Says::User("a")]);
    assert!(matches!(bench.ask("t").await, Ok(TokenStatus::Invalid(Invalid::Unknown))));
    pass(NEGATIVE_TTL / 2);
    assert!(matches!(bench.known("t"), Some(TokenStatus::Invalid(Invalid::Unknown))));
    assert_eq!(bench.asked(), 1);
    pass(NEGATIVE_TTL);
    assert_eq!(bench.user("t").await, "a");
}

#[tokio::test]
async fn expired_and_revoked_records_are_invalid() {
    let bench = bench(&[Says::Revoked, Says::Expires(1), Says::Expires(CLOCK.get() / 1000 + 30)]);
    assert!(matches!(bench.ask("r").await, Ok(TokenStatus::Invalid(Invalid::Revoked))));
    assert!(matches!(bench.ask("e").await, Ok(TokenStatus::Invalid(Invalid::Expired))));
    assert!(matches!(bench.ask("s").await, Ok(TokenStatus::Valid(_))));
    // The token expires before its cache entry does.
    pass(Duration::from_secs(31));
    assert!(matches!(bench.known("s"), Some(TokenStatus::Invalid(Invalid::Expired))));
}

#[tokio::test]
async fn a_failing_store_lets_nothing_pass_and_is_not_cached() {
    let bench = bench(&[Says::CannotTell, Says::CannotTell, Says::Nothing]);
    assert_eq!(bench.ask("t").await.err(), Some(CannotTell::Store));
    assert_eq!(bench.ask("t").await.err(), Some(CannotTell::Store));
    assert!(matches!(bench.ask("t").await, Ok(TokenStatus::Invalid(Invalid::Unknown))));
    assert_eq!(bench.asked(), 3);
}

#[tokio::test]
async fn a_stale_entry_is_used_while_the_store_fails() {
    let bench = bench(&[Says::User("a"), Says::CannotTell]);
    assert_eq!(bench.user("t").await, "a");
    pass(TTL + Duration::from_secs(1));
    assert!(bench.known("t").is_none(), "a stale answer must not be given before the store was asked");
    assert_eq!(bench.user("t").await, "a");
    pass(STALE);
    assert_eq!(bench.ask("t").await.err(), Some(CannotTell::Store));
}

#[tokio::test]
async fn a_stale_entry_does_not_outlive_a_negative_result() {
    let bench = bench(&[Says::User("a"), Says::Revoked, Says::CannotTell]);
    assert_eq!(bench.user("t").await, "a");
    pass(TTL + Duration::from_secs(1));
    assert!(matches!(bench.ask("t").await, Ok(TokenStatus::Invalid(Invalid::Revoked))));
    pass(NEGATIVE_TTL);
    assert_eq!(bench.ask("t").await.err(), Some(CannotTell::Store), "the old yes must be gone");
}

#[tokio::test]
async fn entries_in_use_are_refreshed_in_the_background() {
    let bench = bench(&[Says::User("a"), Says::User("b")]);
    assert_eq!(bench.user("t").await, "a");
    pass(TTL * 8 / 10);
    // Served from the cache at once, with one refresh in the background.
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
    let Checked::Waiting(waiting) = check(&bench, "t") else { panic!("nothing can be known") };
    settle().await;
    // The store has read the record but not returned it; now it changes.
    bench.authenticator.forget(&Digest::of(b"t"));
    bench.open();
    assert!(matches!(waiting.answer().await.0, Ok(TokenStatus::Invalid(Invalid::Revoked))));
    assert!(matches!(bench.known("t"), Some(TokenStatus::Invalid(Invalid::Revoked))));
    assert_eq!(bench.asked(), 2);
}

#[tokio::test]
async fn a_lookup_in_flight_cannot_resurrect_when_everything_changed() {
    let bench = bench(&[Says::User("a"), Says::Nothing]);
    bench.shut();
    let Checked::Waiting(waiting) = check(&bench, "t") else { panic!("nothing can be known") };
    settle().await;
    bench.authenticator.forget_all();
    bench.open();
    assert!(matches!(waiting.answer().await.0, Ok(TokenStatus::Invalid(Invalid::Unknown))));
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
    assert!(matches!(bench.known("t"), Some(TokenStatus::Invalid(Invalid::Revoked))));
}

#[tokio::test]
async fn a_failed_lookup_cannot_resurrect_what_was_revoked_meanwhile() {
    let bench = bench(&[Says::User("a"), Says::CannotTell]);
    assert_eq!(bench.user("t").await, "a");
    pass(TTL + Duration::from_secs(1));
    bench.shut();
    let Checked::Waiting(waiting) = check(&bench, "t") else { panic!("the entry has expired") };
    settle().await;
    bench.authenticator.forget(&Digest::of(b"t"));
    bench.open();
    assert_eq!(waiting.answer().await.0.err(), Some(CannotTell::Store));
}

#[tokio::test]
async fn a_token_that_changes_all_the_time_is_refused() {
    let bench = bench(&[Says::User("a")]);
    bench.shut();
    let Checked::Waiting(waiting) = check(&bench, "t") else { panic!("nothing can be known") };
    for _ in 0..MAX_ATTEMPTS {
        settle().await;
        bench.authenticator.forget(&Digest::of(b"t"));
        bench.store.gate.add_permits(1);
    }
    assert_eq!(waiting.answer().await.0.err(), Some(CannotTell::Busy));
    assert_eq!(bench.asked(), MAX_ATTEMPTS);
}

#[tokio::test]
async fn forgetting_removes_negative_entries_as_well() {
    let bench = bench(&[Says::Nothing, Says::User("a")]);
    assert!(matches!(bench.ask("t").await, Ok(TokenStatus::Invalid(_))));
    bench.authenticator.forget(&Digest::of(b"t"));
    assert_eq!(bench.user("t").await, "a");
}

#[tokio::test(start_paused = true)]
async fn a_slow_store_times_out() {
    let bench = bench(&[Says::User("a")]);
    bench.shut();
    let before = tokio::time::Instant::now();
    assert_eq!(bench.ask("t").await.err(), Some(CannotTell::Store));
    assert_eq!(before.elapsed(), Duration::from_secs(2));
}

#[tokio::test]
async fn lookups_in_progress_are_bounded() {
    let bench = bench(&[Says::Nothing]);
    bench.shut();
    let waiting: Vec<_> = (0..MAX_STRANGERS).map(|n| check(&bench, &format!("t{n}"))).collect();
    let Checked::Waiting(excess) = check(&bench, "one more") else { panic!("nothing can be known") };
    assert_eq!(excess.answer().await.0.err(), Some(CannotTell::Busy));
    bench.open();
    for caller in waiting {
        let Checked::Waiting(caller) = caller else { panic!("nothing can be known") };
        assert!(matches!(caller.answer().await.0, Ok(TokenStatus::Invalid(_))));
    }
    assert!(matches!(bench.ask("one more").await, Ok(TokenStatus::Invalid(_))), "and there is room again");
}

#[tokio::test]
async fn cached_tokens_come_before_a_flood_of_guesses() {
    let bench = bench_with(&[Says::User("a"), Says::Nothing], false, 2);
    assert_eq!(bench.user("known").await, "a");
    pass(TTL + Duration::from_secs(1));
    bench.shut();
    let guesses: Vec<_> = (0..MAX_STRANGERS).map(|n| check(&bench, &format!("guess{n}"))).collect();
    let Checked::Waiting(stranger) = check(&bench, "one more") else { panic!("nothing can be known") };
    assert_eq!(stranger.answer().await.0.err(), Some(CannotTell::Busy));
    settle().await;
    assert_eq!(bench.asked(), 3, "others wait");
    let Checked::Waiting(known) = check(&bench, "known") else { panic!("the entry is too old to be used") };
    settle().await;
    bench.open();
    assert!(matches!(known.answer().await.0, Ok(TokenStatus::Invalid(Invalid::Unknown))));
    assert!(bench.asked() < 100, "before the guesses: {}", bench.asked());
    drop(guesses);
}

/// 1,000 tokens in use at a start without a snapshot.
#[tokio::test]
async fn a_cold_start_refuses_nobody() {
    let bench = bench_with(&[Says::User("a")], false, 2);
    bench.shut();
    let callers: Vec<_> = (0..1_000).map(|n| check(&bench, &format!("t{n}"))).collect();
    settle().await;
    assert_eq!(bench.asked(), 2);
    bench.open();
    for caller in callers {
        let Checked::Waiting(caller) = caller else { panic!("nothing can be known") };
        assert!(matches!(caller.answer().await.0, Ok(TokenStatus::Valid(_))));
    }
    assert_eq!(bench.asked(), 1_000);
}

/// What waits for a store that answers nobody ends with the store's timeout, like what was asked.
#[tokio::test(start_paused = true)]
async fn nobody_waits_longer_than_the_timeout_for_a_turn() {
    let bench = bench_with(&[Says::Nothing], false, 1);
    bench.shut();
    let before = tokio::time::Instant::now();
    let callers: Vec<_> = (0..10).map(|n| check(&bench, &format!("t{n}"))).collect();
    for (n, caller) in callers.into_iter().enumerate() {
        let Checked::Waiting(caller) = caller else { panic!("nothing can be known") };
        let why = if n == 0 { CannotTell::Store } else { CannotTell::Busy };
        assert_eq!(caller.answer().await.0.err(), Some(why));
    }
    assert_eq!(before.elapsed(), Duration::from_secs(2));
}

/// The loss of the subscription, which is noticed meanwhile, is no reason to wait for the same timeout again.
#[tokio::test(start_paused = true)]
async fn a_timeout_is_not_repeated() {
    let bench = bench_of(&[Says::User("a")], true);
    let following = bench.follow();
    bench.tell(Event::Hearing).await;
    bench.shut();
    let before = tokio::time::Instant::now();
    let Checked::Waiting(caller) = check(&bench, "t") else { panic!("nothing can be known") };
    bench.tell(Event::Deaf).await;
    assert_eq!(caller.answer().await.0.err(), Some(CannotTell::Store));
    assert_eq!(before.elapsed(), Duration::from_secs(2));
    following.abort();
}

/// A server that goes silent: whoever was known waits for a moment, and only as long as nobody knows.
#[tokio::test(start_paused = true)]
async fn known_callers_wait_a_moment_for_a_silent_server() {
    let bench = bench_of(&[Says::User("a")], true);
    let following = bench.follow();
    bench.tell(Event::Hearing).await;
    assert_eq!((bench.user("t").await.as_str(), bench.user("u").await.as_str()), ("a", "a"));
    bench.shut();
    // One who waited already, one who comes behind it, and those who come when it is known.
    bench.tell(Event::Hearing).await;
    let Checked::Waiting(before) = check(&bench, "t") else { panic!("it is looked up again") };
    bench.tell(Event::Silent).await;
    bench.tell(Event::Deaf).await;
    let Checked::Waiting(behind) = check(&bench, "u") else { panic!("it is in doubt") };
    let silent = tokio::time::Instant::now();
    for answer in <[_; 2]>::from(tokio::join!(before.answer(), behind.answer())) {
        assert!(matches!(answer, (Ok(TokenStatus::Valid(_)), CacheResult::Stale)));
    }
    // Once, not once more for the second. The clock that is left out of the test's time may be late on a busy machine.
    assert!(silent.elapsed() < SILENT + SILENT / 10, "{:?}", silent.elapsed());
    let Checked::Known(TokenStatus::Valid(_), CacheResult::Stale) = check(&bench, "t") else { panic!("it waits") };
    // An answer says that the server is back: from then on nothing old is served.
    bench.open();
    settle().await;
    bench.tell(Event::Deaf).await;
    assert!(matches!(check(&bench, "t"), Checked::Waiting(_)));
    following.abort();
}

/// A subscription that falls silent beside lookups that are slow: what changed meanwhile is not served from the cache.
#[tokio::test(start_paused = true)]
async fn a_silent_subscription_is_no_reason_to_serve_what_is_in_doubt() {
    let bench = bench_of(&[Says::User("a"), Says::User("a"), Says::User("a"), Says::Revoked], true);
    let following = bench.follow();
    bench.tell(Event::Hearing).await;
    assert_eq!((bench.user("t").await.as_str(), bench.user("u").await.as_str()), ("a", "a"));
    bench.shut();
    bench.tell(Event::Silent).await;
    bench.tell(Event::Deaf).await;
    let (Checked::Waiting(other), Checked::Waiting(revoked)) = (check(&bench, "u"), check(&bench, "t")) else {
        panic!("they are in doubt")
    };
    let first_answer = async {
        tokio::time::sleep(SILENT * 9 / 10).await;
        bench.store.gate.add_permits(1);
    };
    let ((other, _), ()) = tokio::join!(other.answer(), first_answer);
    assert!(matches!(other, Ok(TokenStatus::Valid(_))));
    // One answer for anybody shows that the store can be asked: the others wait for theirs.
    let its_answer = async {
        tokio::time::sleep(SILENT * 9 / 10).await;
        bench.open();
    };
    let ((revoked, _), ()) = tokio::join!(revoked.answer(), its_answer);
    assert!(matches!(revoked, Ok(TokenStatus::Invalid(Invalid::Revoked))), "{revoked:?}");
    following.abort();
}

#[tokio::test]
async fn a_panic_in_the_store_costs_one_lookup() {
    let bench = bench(&[Says::Panics, Says::User("a")]);
    assert_eq!(bench.ask("t").await.err(), Some(CannotTell::Store));
    assert_eq!(bench.user("t").await, "a");
}

#[tokio::test]
async fn garbage_does_not_evict_good_tokens() {
    let bench = bench(&[Says::User("a"), Says::Nothing]);
    assert_eq!(bench.user("good").await, "a");
    for n in 0..20_000 {
        assert!(matches!(bench.ask(&format!("bad{n}")).await, Ok(TokenStatus::Invalid(_))));
    }
    assert!(bench.known("good").is_some());
    let (valid, invalid) = bench.authenticator.cache_sizes();
    assert!(valid == 1 && invalid <= 1_000, "{valid} {invalid}");
}

#[test]
fn lifetimes_have_jitter() {
    let settings = CacheSettings {
        positive_ttl: TTL,
        negative_ttl: NEGATIVE_TTL,
        stale_if_error: Duration::ZERO,
        positive_capacity: 10,
        negative_capacity: 10,
    };
    let cache = Cache::new(settings);
    let answer = TokenStatus::Invalid(Invalid::Unknown);
    let alive = |token: &[u8], after: Duration| {
        let now = Now { mono_ms: after.as_millis() as u64, unix_ms: 0 };
        matches!(cache.get(&Digest::of(token), now, Mode::Serve), Cached::Fresh { .. })
    };
    let learned = || Learned { answer: &answer, until_unix_ms: None, handles: Vec::new(), asked_ms: 0 };
    cache.put(Digest::of(b"long"), learned(), Now { mono_ms: 0, unix_ms: 0 }, 0.0);
    cache.put(Digest::of(b"short"), learned(), Now { mono_ms: 0, unix_ms: 0 }, 1.0);
    assert!(alive(b"long", NEGATIVE_TTL * 95 / 100) && !alive(b"short", NEGATIVE_TTL * 95 / 100));
    assert!(alive(b"short", NEGATIVE_TTL * 85 / 100) && !alive(b"long", NEGATIVE_TTL));
}

impl Bench {
    /// Writes the uses, and returns what the store received.
    async fn flushed(&self) -> Vec<(Digest, u64)> {
        // A use in this very millisecond is also reported the next time.
        pass(Duration::from_millis(1));
        self.authenticator.flush_uses().await;
        let mut uses = std::mem::take(&mut *self.store.noted.lock());
        uses.sort_by_key(|(digest, _)| *digest.as_bytes());
        uses
    }
}

#[tokio::test]
async fn uses_are_recorded_coarsely() {
    let bench = bench(&[Says::User("a")]);
    let start = clock().unix_ms;
    assert_eq!(bench.user("t").await, "a");
    assert_eq!(bench.flushed().await, [(Digest::of(b"t"), start)]);
    pass(Duration::from_secs(30));
    assert!(bench.known("t").is_some());
    assert_eq!(bench.flushed().await, [], "it was told");
    pass(Duration::from_secs(31));
    let again = clock().unix_ms;
    assert_eq!(bench.user("t").await, "a");
    assert_eq!(bench.flushed().await, [(Digest::of(b"t"), again)]);
}

#[tokio::test]
async fn a_change_of_the_record_loses_no_use() {
    let token = Digest::of(b"t");
    type Step = (&'static str, fn(&Bench));
    let steps: [Step; 5] = [
        ("notification by digest", |bench| bench.authenticator.inner.apply(0, change(Named::Token(Digest::of(b"t"))))),
        ("notification by handle", |bench| {
            bench.authenticator.inner.apply(0, change(Named::Handle(handle_of(b"t"))));
        }),
        ("forgotten by the operator", |bench| bench.authenticator.forget(&Digest::of(b"t"))),
        ("all forgotten", |bench| bench.authenticator.forget_all()),
        ("subscription established", |bench| bench.authenticator.inner.apply(0, Event::Hearing)),
    ];
    for (how, step) in steps {
        let bench = bench(&[Says::User("a")]);
        let used = clock().unix_ms;
        assert_eq!(bench.user("t").await, "a");
        pass(Duration::from_secs(5));
        step(&bench);
        assert_eq!(bench.flushed().await, [(token, used)], "{how}");
        assert_eq!(bench.flushed().await, [], "{how}: once");
        // A use that was written is not written again because of a change.
        step(&bench);
        assert_eq!(bench.flushed().await, [], "{how}");
    }
    // The record is revoked: the lookup says so, and the use before it is kept.
    let bench = bench(&[Says::User("a"), Says::Revoked]);
    let used = clock().unix_ms;
    assert_eq!(bench.user("t").await, "a");
    pass(TTL + STALE + TTL);
    assert!(matches!(bench.ask("t").await, Ok(TokenStatus::Invalid(Invalid::Revoked))));
    assert_eq!(bench.flushed().await, [(token, used)]);
}

#[tokio::test]
async fn uses_that_a_store_could_not_write_are_retried() {
    let bench = bench(&[Says::User("a")]);
    let start = clock().unix_ms;
    assert_eq!((bench.user("t").await, bench.user("u").await), ("a".into(), "a".into()));
    bench.store.takes_uses.store(false, Ordering::SeqCst);
    assert_eq!(bench.flushed().await, []);
    pass(Duration::from_secs(61));
    let again = clock().unix_ms;
    assert!(bench.ask("u").await.is_ok());
    assert_eq!(bench.flushed().await, []);
    bench.store.takes_uses.store(true, Ordering::SeqCst);
    let mut expected = [(Digest::of(b"t"), start), (Digest::of(b"u"), again)];
    expected.sort_by_key(|(digest, _)| *digest.as_bytes());
    assert_eq!(bench.flushed().await, expected);
    assert_eq!(bench.flushed().await, []);
}

// The fields of a record.

#[tokio::test]
async fn blocked_users_and_future_tokens_are_invalid() {
    let start = CLOCK.get() / 1000 + 5;
    let bench = bench(&[Says::Blocked, Says::NotBefore(start), Says::User("a")]);
    assert!(matches!(bench.ask("b").await, Ok(TokenStatus::Invalid(Invalid::Blocked))));
    assert!(matches!(bench.ask("n").await, Ok(TokenStatus::Invalid(Invalid::NotYetValid))));
    // Its start is before the expiry of the negative entry, and takes effect to the second.
    pass(Duration::from_millis(4_900));
    assert!(matches!(bench.known("n"), Some(TokenStatus::Invalid(Invalid::NotYetValid))));
    pass(Duration::from_millis(200));
    assert_eq!(bench.user("n").await, "a");
}

#[tokio::test]
async fn an_extended_expiry_is_noticed() {
    let bench = bench(&[Says::Expires(CLOCK.get() / 1000 + 30), Says::User("a")]);
    assert_eq!(bench.user("t").await, "a");
    pass(Duration::from_secs(31));
    assert!(matches!(bench.known("t"), Some(TokenStatus::Invalid(Invalid::Expired))));
    pass(TTL);
    assert_eq!(bench.user("t").await, "a");
    assert_eq!(bench.asked(), 2);
}

#[tokio::test]
async fn an_expired_token_is_never_served_stale() {
    let bench = bench(&[Says::Expires(CLOCK.get() / 1000 + 30), Says::CannotTell]);
    assert_eq!(bench.user("t").await, "a");
    pass(TTL + Duration::from_secs(1));
    assert_eq!(bench.ask("t").await.err(), Some(CannotTell::Store));
}

// A store that fails and recovers.

#[tokio::test]
async fn callers_do_not_wait_for_a_failing_store_to_fail_again() {
    let bench = bench(&[Says::User("a"), Says::User("a"), Says::CannotTell, Says::CannotTell, Says::User("b")]);
    assert_eq!((bench.user("t").await.as_str(), bench.user("u").await.as_str()), ("a", "a"));
    pass(TTL + Duration::from_secs(1));
    assert_eq!(bench.user("t").await, "a", "the first caller waited and got the last known answer");
    // The others are served from the cache at once, while one background lookup probes the store.
    assert!(matches!(bench.known("u"), Some(TokenStatus::Valid(_))));
    assert!(matches!(bench.known("u"), Some(TokenStatus::Valid(_))));
    settle().await;
    assert_eq!(bench.asked(), 4);
    // The store has recovered.
    pass(Duration::from_millis(1_100));
    assert!(matches!(bench.known("u"), Some(TokenStatus::Valid(_))));
    settle().await;
    assert_eq!(bench.user("u").await, "b");
    assert!(bench.known("t").is_none(), "and callers wait for it again");
}

#[tokio::test]
async fn an_old_failure_does_not_allow_stale_entries() {
    let bench = bench(&[Says::User("a"), Says::CannotTell, Says::Revoked]);
    assert_eq!(bench.user("t").await, "a");
    pass(TTL + Duration::from_secs(1));
    assert_eq!(bench.user("t").await, "a");
    pass(Duration::from_millis(AILING_MS));
    assert!(matches!(bench.ask("t").await, Ok(TokenStatus::Invalid(Invalid::Revoked))));
}

#[tokio::test]
async fn one_invalid_record_is_not_a_failing_store() {
    let bench = bench(&[Says::User("a"), Says::Garbage, Says::Revoked]);
    assert_eq!(bench.user("t").await, "a");
    assert_eq!(bench.ask("spoiled").await.err(), Some(CannotTell::Record));
    pass(TTL + Duration::from_secs(1));
    assert!(matches!(bench.ask("t").await, Ok(TokenStatus::Invalid(Invalid::Revoked))), "asked, not taken for down");
}

#[tokio::test]
async fn refreshes_leave_room_for_new_tokens() {
    let bench = bench(&[Says::User("a")]);
    let tokens = MAX_REFRESHES + 100;
    for n in 0..tokens {
        assert_eq!(bench.user(&format!("t{n}")).await, "a");
    }
    pass(TTL * 8 / 10);
    bench.shut();
    for n in 0..tokens {
        assert!(bench.known(&format!("t{n}")).is_some());
    }
    settle().await;
    assert_eq!(bench.asked(), tokens + MAX_REFRESHES);
    let Checked::Waiting(newcomer) = check(&bench, "newcomer") else { panic!("nothing can be known") };
    bench.open();
    assert!(matches!(newcomer.answer().await.0, Ok(TokenStatus::Valid(_))));
}

// Change notifications.

impl Bench {
    /// Subscribes to the store.
    fn follow(&self) -> tokio::task::JoinHandle<()> {
        let authenticator = Arc::clone(&self.authenticator);
        tokio::spawn(async move { authenticator.follow_changes().await })
    }

    async fn tell(&self, event: Event) {
        self.store.events.0.send(event).unwrap();
        settle().await;
    }

    /// A confirmation of the subscription as of now.
    async fn live(&self) {
        self.live_at(CLOCK.get(), None).await;
    }

    async fn live_at(&self, asked_ms: u64, mark: Option<&str>) {
        self.tell(Event::Alive { asked_ms, mark: mark.map(str::to_owned) }).await;
    }
}

fn change(token: Named) -> Event {
    Event::Changed(vec![Change { token, at_ms: CLOCK.get() }])
}

#[tokio::test]
async fn a_change_removes_the_entry_by_digest_or_handle() {
    let bench = bench(&[Says::User("a"), Says::User("a"), Says::Revoked]);
    let following = bench.follow();
    assert_eq!((bench.user("t").await.as_str(), bench.user("u").await.as_str()), ("a", "a"));
    bench.tell(change(Named::Token(Digest::of(b"t")))).await;
    assert!(matches!(bench.ask("t").await, Ok(TokenStatus::Invalid(Invalid::Revoked))));
    bench.tell(change(Named::Handle(handle_of(b"u")))).await;
    assert!(matches!(bench.ask("u").await, Ok(TokenStatus::Invalid(Invalid::Revoked))));
    following.abort();
}

#[tokio::test]
async fn a_lookup_in_flight_cannot_resurrect_what_was_revoked_by_handle() {
    let bench = bench(&[Says::User("a"), Says::Revoked]);
    let following = bench.follow();
    bench.shut();
    let Checked::Waiting(waiting) = check(&bench, "t") else { panic!("nothing can be known") };
    settle().await;
    bench.tell(change(Named::Handle(handle_of(b"other")))).await;
    bench.tell(change(Named::Handle(handle_of(b"t")))).await;
    bench.open();
    assert!(matches!(waiting.answer().await.0, Ok(TokenStatus::Invalid(Invalid::Revoked))));
    assert_eq!(bench.asked(), 2);
    following.abort();
}

#[tokio::test]
async fn tokens_are_looked_up_again_after_a_lost_subscription() {
    let bench = bench(&[Says::User("a"), Says::Nothing, Says::Revoked, Says::User("b")]);
    let following = bench.follow();
    assert_eq!(bench.user("t").await, "a");
    assert!(matches!(bench.ask("n").await, Ok(TokenStatus::Invalid(Invalid::Unknown))));
    bench.tell(Event::Hearing).await;
    assert!(matches!(bench.ask("t").await, Ok(TokenStatus::Invalid(Invalid::Revoked))));
    assert_eq!(bench.user("n").await, "b", "a negative entry is looked up again as well");
    following.abort();
}

// Without a confirmed subscription, results are cached for a moment only.

const MOMENT: Duration = Duration::from_millis(700);

/// A check that runs while a revocation is taken in: it may find the entry, which is not confirmed yet, or the confirmation,
/// behind which the entry is gone. Never both.
#[test]
fn a_confirmation_does_not_reach_an_entry_that_was_found_before_it() {
    const ROUNDS: u64 = 60_000;
    let cache = Cache::new(CacheSettings {
        positive_ttl: TTL,
        negative_ttl: NEGATIVE_TTL,
        stale_if_error: Duration::ZERO,
        positive_capacity: ROUNDS,
        negative_capacity: ROUNDS,
    });
    let record = TokenRecord::new(Digest::of(b""), "a");
    let now = Now { mono_ms: 10_000, unix_ms: 10_000 };
    let (answer, _) = judge(Some(&record), &record.digest, now);
    let token = |round: u64| Digest::of(&round.to_be_bytes());
    let current = AtomicU64::new(0);
    cache.hear_until(0);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                loop {
                    let round = current.load(Ordering::Acquire);
                    if round == ROUNDS {
                        return;
                    }
                    let found = cache.get(&token(round), now, Mode::Serve);
                    assert!(!matches!(found, Cached::Fresh { .. }), "round {round}: revoked, and used as confirmed");
                }
            });
        }
        for round in 1..=ROUNDS {
            cache.hear_until(0);
            let learned = Learned { answer: &answer, until_unix_ms: None, handles: Vec::new(), asked_ms: 0 };
            cache.put(token(round), learned, now, 0.0);
            current.store(round, Ordering::Release);
            // As in `Inner::apply`: the change first, then the confirmation that all before it was told.
            cache.forget(&token(round));
            cache.hear_until(20_000);
        }
    });
}

#[tokio::test]
async fn before_the_subscription_results_are_cached_for_a_moment() {
    let bench = bench_of(&[Says::User("a"), Says::User("a"), Says::Revoked, Says::User("b")], true);
    let following = bench.follow();
    assert_eq!(bench.user("t").await, "a");
    assert!(bench.known("t").is_some());
    pass(MOMENT);
    assert!(bench.known("t").is_none(), "the changes since are not known");
    settle().await;
    assert!(bench.known("t").is_some());
    // Tokens looked up before the subscription was established may have changed before it was.
    bench.tell(Event::Hearing).await;
    assert!(matches!(bench.ask("t").await, Ok(TokenStatus::Invalid(Invalid::Revoked))));
    assert_eq!(bench.user("u").await, "b");
    for _ in 0..20 {
        pass(MOMENT);
        bench.live().await;
    }
    assert!(bench.known("u").is_some(), "and for their whole time from then on");
    assert_eq!(bench.asked(), 4);
    following.abort();
}

#[tokio::test]
async fn a_store_without_notifications_has_no_bound() {
    let bench = bench_of(&[Says::User("a")], true);
    let following = bench.follow();
    bench.tell(Event::Untold).await;
    assert_eq!(bench.user("t").await, "a");
    pass(TTL * 7 / 10);
    assert!(bench.known("t").is_some(), "positive_ttl is the bound");
    assert_eq!(bench.asked(), 1);
    following.abort();
}

/// SIGSTOP, or a paused or suspended machine: afterwards the cache is used before the interruption can be noticed.
#[tokio::test]
async fn entries_are_used_for_a_second_after_the_last_confirmation() {
    let bench = bench_of(&[Says::User("a"), Says::User("a"), Says::Revoked], true);
    let following = bench.follow();
    bench.tell(Event::Hearing).await;
    assert_eq!(bench.user("t").await, "a");
    for (passed, believed) in [(999, true), (999, true), (1_000, false)] {
        bench.live().await;
        pass(Duration::from_millis(passed));
        assert_eq!(bench.known("t").is_some(), believed, "{passed} ms");
    }
    settle().await;
    assert_eq!(bench.asked(), 2, "the store was asked");
    // A confirmation that was sent before the interruption says nothing about later changes.
    pass(MOMENT);
    bench.live_at(CLOCK.get() - 3_000, None).await;
    assert!(matches!(bench.ask("t").await, Ok(TokenStatus::Invalid(Invalid::Revoked))));
    following.abort();
}

#[tokio::test]
async fn a_late_confirmation_makes_entries_fresh_again() {
    let bench = bench_of(&[Says::User("a")], true);
    let following = bench.follow();
    bench.tell(Event::Hearing).await;
    assert_eq!(bench.user("t").await, "a");
    pass(Duration::from_secs(3));
    // The subscription was not lost: changes would have been reported before.
    bench.live().await;
    assert!(bench.known("t").is_some());
    assert_eq!(bench.asked(), 1);
    following.abort();
}

#[tokio::test]
async fn without_confirmation_each_result_is_used_for_a_moment_after_its_lookup() {
    let bench = bench_of(&[Says::User("a")], true);
    let following = bench.follow();
    bench.tell(Event::Hearing).await;
    pass(Duration::from_secs(3));
    for _ in 0..100 {
        assert_eq!(bench.user("t").await, "a");
        assert!(bench.known("t").is_some(), "for a moment");
        pass(Duration::from_millis(100));
        settle().await;
    }
    // Entries in use are refreshed shortly before.
    assert!((14..=25).contains(&bench.asked()), "{}", bench.asked());
    following.abort();
}

#[tokio::test]
async fn one_unconfirmed_store_makes_all_entries_doubtful() {
    let (benches, chain) = chain_of(&[&[Says::Nothing], &[Says::User("a")]]);
    let following = chain.follow();
    for bench in &benches {
        bench.tell(Event::Hearing).await;
    }
    assert_eq!(chain.user("t").await, "a");
    pass(Duration::from_millis(900));
    benches[1].live().await;
    pass(Duration::from_millis(200));
    assert!(chain.known("t").is_none(), "the first one may have learned of it");
    benches[0].live().await;
    assert!(chain.known("t").is_some());
    following.abort();
}

#[tokio::test]
async fn doubtful_entries_are_used_while_the_store_is_down_but_not_while_it_is_busy() {
    let bench = bench_of(&[Says::User("a"), Says::CannotTell, Says::Busy], true);
    let following = bench.follow();
    bench.tell(Event::Hearing).await;
    assert_eq!(bench.user("t").await, "a");
    pass(Duration::from_secs(3));
    assert_eq!(bench.user("t").await, "a", "it can't be asked");
    pass(Duration::from_millis(AILING_MS));
    assert_eq!(bench.ask("t").await.err(), Some(CannotTell::Busy), "nothing says that it is down");
    following.abort();
}

#[tokio::test]
async fn a_doubtful_entry_is_refreshed_soon_while_the_store_fails() {
    let bench = bench_of(&[Says::User("a"), Says::User("b"), Says::CannotTell, Says::Revoked], true);
    let following = bench.follow();
    bench.tell(Event::Hearing).await;
    assert_eq!((bench.user("t").await.as_str(), bench.user("u").await.as_str()), ("a", "b"));
    pass(Duration::from_secs(1));
    assert_eq!(bench.user("u").await, "b", "the store fails for one caller");
    assert!(matches!(bench.known("t"), Some(TokenStatus::Valid(_))), "another one does not wait");
    settle().await;
    assert!(matches!(bench.known("t"), Some(TokenStatus::Invalid(Invalid::Revoked))), "and its token was asked for");
    following.abort();
}

/// A lookup that begins before an interruption and completes after it.
#[tokio::test]
async fn a_lookup_is_repeated_after_an_interruption() {
    for before in [Says::User("a"), Says::CannotTell] {
        let bench = bench_of(&[Says::User("a"), before, Says::Revoked], true);
        let following = bench.follow();
        bench.tell(Event::Hearing).await;
        assert_eq!(bench.user("t").await, "a");
        pass(Duration::from_secs(1));
        bench.authenticator.inner.pulse.beat(clock());
        bench.shut();
        let Checked::Waiting(waiting) = check(&bench, "t") else { panic!("it is in doubt") };
        settle().await;
        pass(Duration::from_secs(3));
        bench.open();
        assert!(matches!(waiting.answer().await.0, Ok(TokenStatus::Invalid(Invalid::Revoked))));
        assert_eq!(bench.asked(), 3);
        following.abort();
    }
}

#[tokio::test]
async fn a_failure_before_an_interruption_does_not_allow_stale_entries() {
    let bench = bench(&[Says::User("a"), Says::CannotTell, Says::Revoked]);
    let pulse = &bench.authenticator.inner.pulse;
    assert_eq!(bench.user("t").await, "a");
    pass(TTL + Duration::from_secs(1));
    pulse.beat(clock());
    assert_eq!(bench.user("t").await, "a");
    assert!(bench.known("t").is_some(), "callers do not wait for it to fail again");
    pass(Duration::from_secs(2));
    assert!(bench.known("t").is_none(), "but the failure is from another time");
    pulse.beat(clock());
    assert!(matches!(bench.ask("t").await, Ok(TokenStatus::Invalid(Invalid::Revoked))));
}

#[test]
fn interruptions() {
    let at = |mono_ms| Now { mono_ms, unix_ms: 0 };
    let pulse = Pulse::default();
    assert!(!pulse.was_interrupted_since(0, at(1_000_000)), "the pulse has not started");
    assert_eq!(pulse.beat(at(5_000)), None, "the first one ends nothing");
    assert_eq!(pulse.beat(at(6_000)), None);
    assert!(!pulse.was_interrupted_since(0, at(7_000)));
    assert!(pulse.was_interrupted_since(0, at(7_001)), "before it is noted itself");
    assert_eq!(pulse.beat(at(9_500)), Some(Duration::from_millis(3_500)));
    assert!(pulse.was_interrupted_since(9_499, at(10_500)) && !pulse.was_interrupted_since(9_500, at(10_500)));
    assert!(!pulse.was_interrupted_since(13_000, at(13_500)), "not in so short a time");
}

#[tokio::test]
async fn after_a_lost_subscription_entries_are_used_while_the_store_is_down_only() {
    let bench = bench(&[Says::User("a"), Says::Busy, Says::CannotTell, Says::Busy]);
    let following = bench.follow();
    assert_eq!(bench.user("t").await, "a");
    bench.tell(Event::Deaf).await;
    assert_eq!(bench.user("t").await, "a", "busy and not to be heard is what down looks like at first");
    assert_eq!(bench.user("t").await, "a", "the store is down");
    bench.tell(Event::Hearing).await;
    assert!(bench.known("t").is_none(), "it can be reached again, so that it must be asked");
    settle().await;
    assert_eq!(bench.ask("t").await.err(), Some(CannotTell::Busy), "busy is no excuse for a change that was missed");
    following.abort();
}

#[tokio::test]
async fn a_doubtful_entry_requests_its_own_refresh_while_the_store_fails() {
    let bench = bench(&[Says::User("a"), Says::User("b"), Says::CannotTell, Says::Revoked]);
    let following = bench.follow();
    assert_eq!((bench.user("t").await.as_str(), bench.user("u").await.as_str()), ("a", "b"));
    bench.tell(Event::Deaf).await;
    assert_eq!(bench.user("u").await, "b", "the store fails for one caller");
    // The other one is served from the cache at once, and its lookup is in progress.
    assert!(matches!(bench.known("t"), Some(TokenStatus::Valid(_))));
    settle().await;
    assert_eq!(bench.asked(), 4);
    assert!(matches!(bench.known("t"), Some(TokenStatus::Invalid(Invalid::Revoked))));
    following.abort();
}

#[tokio::test]
async fn stale_entries_are_used_while_the_store_is_busy_if_nothing_was_missed() {
    let bench = bench(&[Says::User("a"), Says::Busy]);
    assert_eq!(bench.user("t").await, "a");
    pass(TTL + Duration::from_secs(1));
    assert_eq!(bench.user("t").await, "a");
}

#[tokio::test]
async fn results_are_cached_for_a_moment_while_the_subscription_is_lost() {
    let bench = bench(&[Says::User("a"), Says::Revoked, Says::User("b")]);
    let following = bench.follow();
    bench.tell(Event::Deaf).await;
    assert_eq!(bench.user("t").await, "a");
    assert!(bench.known("t").is_some());
    // Well within the bound of a second, which includes the lookup.
    pass(Duration::from_millis(700));
    assert!(matches!(bench.ask("t").await, Ok(TokenStatus::Invalid(Invalid::Revoked))));
    bench.tell(Event::Hearing).await;
    assert_eq!(bench.user("t").await, "b");
    pass(Duration::from_secs(2));
    bench.live().await;
    assert!(bench.known("t").is_some(), "and for their whole time when it comes again");
    following.abort();
}

// Chains.

fn chain_of(scripts: &[&[Says]]) -> (Vec<Bench>, Bench) {
    let benches: Vec<Bench> = scripts.iter().map(|script| bench_of(script, true)).collect();
    let metrics = Arc::new(Metrics::new("test").unwrap());
    let links = benches.iter().enumerate().map(|(index, bench)| {
        let (name, store) = (format!("store{index}"), Arc::<FakeStore>::clone(&bench.store));
        let metrics = Arc::new(metrics.store(&name));
        Link::new(name, store, Duration::from_secs(2), metrics)
    });
    let settings = CacheSettings {
        positive_ttl: TTL,
        negative_ttl: NEGATIVE_TTL,
        stale_if_error: STALE,
        positive_capacity: 1_000,
        negative_capacity: 1_000,
    };
    let authenticator = Authenticator::new(Chain::new(links.collect()), settings, Arc::clone(&metrics), clock);
    let chain = Bench { store: Arc::clone(&benches[0].store), authenticator: Arc::new(authenticator) };
    (benches, chain)
}

#[tokio::test]
async fn the_first_store_that_knows_a_token_wins() {
    let (benches, chain) = chain_of(&[&[Says::Nothing], &[Says::User("second")], &[Says::User("third")]]);
    assert_eq!(chain.user("t").await, "second");
    assert_eq!(benches.iter().map(Bench::asked).collect::<Vec<_>>(), [1, 1, 0]);
}

#[tokio::test]
async fn a_revoked_token_is_not_looked_up_in_the_next_store() {
    let (benches, chain) = chain_of(&[&[Says::Revoked], &[Says::User("second")]]);
    assert!(matches!(chain.ask("t").await, Ok(TokenStatus::Invalid(Invalid::Revoked))));
    assert_eq!(benches[1].asked(), 0);
}

#[tokio::test]
async fn a_failing_store_ends_the_chain() {
    for trouble in [Says::CannotTell, Says::Busy, Says::Garbage] {
        let (benches, chain) = chain_of(&[&[Says::Nothing], &[trouble], &[Says::User("third")]]);
        assert!(chain.ask("t").await.is_err());
        assert_eq!(benches.iter().map(Bench::asked).collect::<Vec<_>>(), [1, 1, 0]);
    }
}

#[tokio::test]
async fn no_store_knows_the_token() {
    let (benches, chain) = chain_of(&[&[Says::Nothing], &[Says::Nothing]]);
    assert!(matches!(chain.ask("t").await, Ok(TokenStatus::Invalid(Invalid::Unknown))));
    assert_eq!(benches.iter().map(Bench::asked).collect::<Vec<_>>(), [1, 1]);
}

// The cache file.

impl Bench {
    fn with_snapshot(self, path: &Path, origin: &str) -> Self {
        let authenticator = Arc::into_inner(self.authenticator).unwrap().with_snapshot(path, origin);
        Self { authenticator: Arc::new(authenticator), ..self }
    }
}

/// Writes the file of a process that has cached `a` and `b`, the latter for 30 seconds more.
async fn write_cache_file(path: &Path) {
    let bench =
        bench(&[Says::User("a"), Says::Expires(CLOCK.get() / 1000 + 30), Says::Nothing]).with_snapshot(path, "here");
    let following = bench.follow();
    bench.tell(Event::Hearing).await;
    bench.live_at(CLOCK.get(), Some("the store's own")).await;
    assert_eq!((bench.user("a").await.as_str(), bench.user("b").await.as_str()), ("a", "a"));
    assert!(bench.ask("nobody").await.is_ok());
    bench.authenticator.save();
    following.abort();
}

#[tokio::test]
async fn a_restart_needs_no_lookups_for_unchanged_tokens() {
    let folder = tempfile::tempdir().unwrap();
    write_cache_file(&folder.path().join("cache")).await;
    let text = std::fs::read_to_string(folder.path().join("cache")).unwrap();
    assert_eq!(text.lines().count(), 4, "{text}");
    pass(Duration::from_secs(10));
    let bench = bench(&[Says::Revoked]).with_snapshot(&folder.path().join("cache"), "here");
    *bench.store.changed.lock() = Some(vec![Digest::of(b"c")]);
    let following = bench.follow();
    bench.tell(Event::Hearing).await;
    assert!(
        matches!(bench.known("a"), Some(TokenStatus::Valid(principal)) if principal.user() == "a" && principal.scopes() == ["api"])
    );
    assert!(bench.known("b").is_some());
    assert_eq!(bench.asked(), 0);
    assert_eq!(*bench.store.marks.lock(), ["the store's own"]);
    pass(Duration::from_secs(21));
    bench.live().await;
    assert!(matches!(bench.known("b"), Some(TokenStatus::Invalid(Invalid::Expired))), "its own end holds");
    pass(TTL - Duration::from_secs(30));
    assert!(
        matches!(bench.ask("a").await, Ok(TokenStatus::Invalid(Invalid::Revoked))),
        "and the entry's lifetime does not start again"
    );
    following.abort();
}

#[tokio::test]
async fn what_was_revoked_meanwhile_is_not_restored() {
    let folder = tempfile::tempdir().unwrap();
    write_cache_file(&folder.path().join("cache")).await;
    let first = bench(&[Says::Revoked]).with_snapshot(&folder.path().join("cache"), "here");
    assert!(first.known("a").is_none(), "nothing counts before the store has spoken");
    settle().await;
    let second = bench(&[Says::Revoked]).with_snapshot(&folder.path().join("cache"), "here");
    *second.store.changed.lock() = Some(vec![Digest::of(b"a")]);
    let following = second.follow();
    second.tell(Event::Hearing).await;
    assert!(matches!(second.ask("a").await, Ok(TokenStatus::Invalid(Invalid::Revoked))));
    assert!(second.known("b").is_some());
    following.abort();
}

#[tokio::test]
async fn without_a_list_of_changes_restored_entries_are_used_only_while_the_store_is_down() {
    let folder = tempfile::tempdir().unwrap();
    write_cache_file(&folder.path().join("cache")).await;
    let bench = bench(&[Says::CannotTell, Says::Revoked]).with_snapshot(&folder.path().join("cache"), "here");
    let following = bench.follow();
    bench.tell(Event::Hearing).await;
    assert_eq!(bench.user("a").await, "a", "the store is down");
    pass(Duration::from_millis(AILING_MS));
    assert!(matches!(bench.ask("a").await, Ok(TokenStatus::Invalid(Invalid::Revoked))), "the store is back");
    following.abort();
}

/// A gateway whose clock is ahead or behind asks for the changes after the store's mark, not after its own time.
#[tokio::test]
async fn the_cache_file_depends_on_the_stores_marks_and_not_on_clocks() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cache");
    let bench = bench_of(&[Says::User("a")], true).with_snapshot(&path, "here");
    let following = bench.follow();
    bench.tell(Event::Hearing).await;
    bench.live_at(CLOCK.get(), Some("mark 1")).await;
    assert_eq!(bench.user("a").await, "a");
    bench.live_at(CLOCK.get(), Some("mark 2")).await;
    bench.authenticator.save();
    assert_eq!(cache_file::read(&path, "here", CLOCK.get()).unwrap().0, [Some("mark 2".into())]);
    // A mark of the list before the loss of the subscription does not apply to the list after it.
    bench.tell(Event::Hearing).await;
    bench.authenticator.save();
    assert_eq!(cache_file::read(&path, "here", CLOCK.get()).unwrap().0, [None]);
    following.abort();
    // Without a mark no entry is used, whatever the store would report.
    let next = bench_of(&[Says::Revoked], true).with_snapshot(&path, "here");
    *next.store.changed.lock() = Some(vec![]);
    let following = next.follow();
    next.tell(Event::Hearing).await;
    assert!(matches!(next.ask("a").await, Ok(TokenStatus::Invalid(Invalid::Revoked))));
    assert!(next.store.marks.lock().is_empty());
    following.abort();
}

/// All stores of a chain must be subscribed to before one of them is asked what changed.
#[tokio::test]
async fn a_chain_is_asked_what_changed_when_all_its_stores_are_subscribed_to() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cache");
    let (benches, chain) = chain_of(&[&[Says::User("a")], &[Says::Nothing]]);
    let chain = chain.with_snapshot(&path, "here");
    let following = chain.follow();
    for (bench, mark) in benches.iter().zip(["first", "second"]) {
        bench.tell(Event::Hearing).await;
        bench.live_at(CLOCK.get(), Some(mark)).await;
    }
    assert_eq!(chain.user("a").await, "a");
    chain.authenticator.save();
    following.abort();
    let (benches, chain) = chain_of(&[&[Says::Revoked], &[Says::Nothing]]);
    let chain = chain.with_snapshot(&path, "here");
    for bench in &benches {
        *bench.store.changed.lock() = Some(vec![]);
    }
    let following = chain.follow();
    benches[0].tell(Event::Hearing).await;
    assert!(benches[0].store.marks.lock().is_empty());
    benches[1].tell(Event::Hearing).await;
    let asked: Vec<_> = benches.iter().map(|bench| bench.store.marks.lock().clone()).collect();
    assert_eq!(asked, [["first"], ["second"]]);
    assert!(matches!(chain.known("a"), Some(TokenStatus::Valid(_))));
    following.abort();
}

#[tokio::test]
async fn a_cache_file_that_cannot_be_trusted_is_ignored() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cache");
    write_cache_file(&path).await;
    let good = std::fs::read(&path).unwrap();
    let read = |origin: &str| cache_file::read(&path, origin, CLOCK.get()).map(|(_, kept)| kept.len());
    assert_eq!(read("here"), Ok(2));
    assert!(read("elsewhere").unwrap_err().contains("other stores"));
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1;
        std::fs::write(&path, &bad).unwrap();
        // Only a change of the final newline may go unnoticed.
        assert!(read("here").is_err() || at == good.len() - 1, "byte {at}");
        std::fs::write(&path, &good[..at]).unwrap();
        assert!(read("here").is_err() || at == good.len() - 1, "cut at {at}");
    }
    std::fs::write(&path, &good).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o620)).unwrap();
    assert!(read("here").unwrap_err().contains("may have been written by another user"));
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(read("here"), Ok(2));
    pass(Duration::from_secs(25 * 3600));
    assert!(read("here").unwrap_err().contains("older than 24 hours"));
    std::fs::remove_file(&path).unwrap();
    assert!(read("here").unwrap_err().contains("No such file"));
    let mode = {
        write_cache_file(&path).await;
        std::fs::metadata(&path).unwrap().permissions().mode()
    };
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test(start_paused = true)]
async fn uses_are_written_in_batches_with_pauses() {
    let bench = bench(&[Says::User("a")]);
    let uses: Vec<_> = (0..1_201_u32).map(|n| (Digest::of(&n.to_be_bytes()), 1)).collect();
    let links = Link::new("fake".into(), Arc::<FakeStore>::clone(&bench.store), TTL, metrics_of("fake"));
    let began = tokio::time::Instant::now();
    Chain::new(vec![links]).note_uses(&uses).await;
    assert_eq!(*bench.store.uses.lock(), [500, 500, 201]);
    assert!(began.elapsed() >= Duration::from_millis(50), "no pause for other users of the lock");
}

fn metrics_of(name: &str) -> Arc<StoreMetrics> {
    Arc::new(Metrics::new("test").unwrap().store(name))
}

#[tokio::test]
async fn forgetting_by_prefix_reaches_cache_and_flights() {
    let bench = bench(&[Says::User("before"), Says::User("before"), Says::User("after")]);
    assert_eq!(bench.user("one").await, "before");
    let prefix = |token: &str| DigestPrefix::from_hex(Digest::of(token.as_bytes()).id().as_str()).unwrap();
    assert_eq!(bench.authenticator.forget_prefix(&prefix("two")), 0);
    assert_eq!(bench.user("one").await, "before");
    assert_eq!(bench.asked(), 1, "another token's digits made it be asked again");
    assert_eq!(bench.authenticator.forget_prefix(&prefix("one")), 1);
    // A lookup in progress may have an outdated result.
    bench.shut();
    let digest = Digest::of(b"one");
    let Checked::Waiting(waiting) = bench.authenticator.check(b"one", &digest, clock(), Mode::Serve) else {
        panic!("known")
    };
    while bench.asked() < 2 {
        tokio::task::yield_now().await;
    }
    bench.authenticator.forget_prefix(&prefix("one"));
    bench.open();
    let Ok(TokenStatus::Valid(principal)) = waiting.answer().await.0 else { panic!("no answer") };
    assert_eq!((principal.user(), bench.asked()), ("after", 3));
}

/// Whoever watches a token is woken by every change that may concern it, and finds nothing in the cache that was there before.
#[tokio::test]
async fn who_watches_a_token_is_told_of_its_changes() {
    type Cause = (&'static str, fn(&Bench));
    let told: [Cause; 6] = [
        ("a change", |bench| bench.authenticator.forget(&Digest::of(b"one"))),
        ("its prefix", |bench| {
            let prefix = DigestPrefix::from_hex(Digest::of(b"one").id().as_str()).unwrap();
            bench.authenticator.forget_prefix(&prefix);
        }),
        ("all forgotten", |bench| bench.authenticator.forget_all()),
        ("a lost subscription", |bench| bench.authenticator.inner.apply(0, Event::Deaf)),
        ("a restored one", |bench| bench.authenticator.inner.apply(0, Event::Hearing)),
        ("a handle", |bench| {
            let token = Named::Handle(Digest::of(b"handle"));
            bench.authenticator.inner.apply(0, Event::Changed(vec![Change { token, at_ms: 0 }]));
        }),
    ];
    for (what, cause) in told {
        let bench = bench_of(&[Says::User("alice")], true);
        assert_eq!(bench.user("one").await, "alice", "{what}");
        let watch = bench.authenticator.watch(&Digest::of(b"one"));
        let mut changed = std::pin::pin!(watch.changed());
        changed.as_mut().enable();
        bench.authenticator.forget(&Digest::of(b"two"));
        assert!(changed.as_mut().now_or_never().is_none(), "{what}: another token");
        cause(&bench);
        assert!(changed.now_or_never().is_some(), "{what}");
    }
}
