//! What limits and the guard against guessing make of a store that replicas share, and of one that does not answer.

use super::engine::{LeaseEngine, LeaseOutcome};
use super::model::{ModelStore, Weather};
use super::{LeaseRefusal, RefusedBy, ShareStore, WhenGone};
use crate::clock::Now;
use crate::identity::Invalid;
use crate::policy::{
    BucketSettings, GuessCount, GuessGuard, GuessSettings, LimitAmounts, LimitCosts, LimitFacts, LimitKeyPart,
    LimitScope, LimitSettings, LimitStage, LimitSubject, RefillRate, RequestLimits,
};
use crate::request::origin::AddressList;
use crate::request::route::{Methods, Pattern, Route};
use crate::request::routes::Routes;
use crate::request::view::Method;
use crate::store::credential::Digest;
use crate::telemetry::metrics::Metrics;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

const NOW: Now = Now { mono_ms: 0, unix_ms: 1_700_000_000_000 };

fn store() -> Arc<ModelStore> {
    let store = Arc::new(ModelStore::default());
    store.now_us.store(NOW.unix_ms * 1_000, Ordering::Relaxed);
    store
}

fn engine(store: &Arc<ModelStore>) -> Arc<LeaseEngine> {
    let metrics = Metrics::new("").unwrap();
    let store = Arc::clone(store) as Arc<dyn ShareStore>;
    let engine = LeaseEngine::new(store, Duration::from_secs(3_600), WhenGone::Closed, metrics.share("model"), || NOW);
    engine.keep_at_most(100);
    engine
}

#[test]
fn what_a_shared_limit_has_said_holds_for_it_alone() {
    let limit = |name: &str| LimitSettings {
        name: name.into(),
        buckets: BucketSettings {
            key: vec![LimitKeyPart::Token],
            prefix_v4: 32,
            prefix_v6: 64,
            amounts: LimitAmounts { rate: Some(RefillRate::new(1, 1_000, 5)), ..LimitAmounts::default() },
            plans: None,
            most: 100,
        },
        applies: LimitScope { routes: Vec::new(), methods: Methods::ALL, scopes: Vec::new(), users: Vec::new() },
        costs: LimitCosts::default(),
        dry_run: false,
        shared: true,
    };
    let routes = Routes::new(vec![Route::new("/*".parse::<Pattern>().unwrap(), "/*".into())]);
    let limits = RequestLimits::new(&[limit("first"), limit("second")], false, &routes, None, || 7);
    assert_eq!(limits.shared_keys(), 200);
    let limits = limits.sharing(&engine(&store()), |_| (1, 2));
    let token = Digest::of(b"token");
    let subject = LimitSubject {
        route: 0,
        route_name: "/*",
        method: Method::Get,
        client: None,
        token: Some(&token),
        principal: None,
        headers: &[],
    };
    let ask = |paid: &[(u16, LeaseOutcome)]| limits.take(&subject, LimitStage::Both, NOW, paid, &mut LimitFacts::new());
    let lacking = |paid: &[(u16, LeaseOutcome)]| -> Vec<u16> {
        let lacking = ask(paid).unwrap().into_lacking();
        lacking.into_iter().flat_map(|lacking| lacking.lacks).map(|lack| lack.limit).collect()
    };
    assert_eq!(lacking(&[]), [0, 1]);
    assert_eq!(lacking(&[(0, LeaseOutcome::Paid)]), [1]);
    assert_eq!(lacking(&[(1, LeaseOutcome::Paid)]), [0]);
    assert!(lacking(&[(0, LeaseOutcome::Paid), (1, LeaseOutcome::Paid)]).is_empty());
    let refusal = LeaseRefusal { by: RefusedBy::Rate, wait_ms: 1_500, remaining: 0 };
    for number in [0, 1] {
        let refused = ask(&[(number, LeaseOutcome::Refused(refusal))]).unwrap_err();
        assert_eq!((refused.limit, refused.retry_after), (number, 2));
    }
}

/// Replicas that watch who guesses, with a hundred failed tokens for an address.
async fn replicas(store: &Arc<ModelStore>, count: u64) -> Vec<(GuessGuard, Arc<LeaseEngine>)> {
    let settings = GuessSettings {
        failures: 100,
        per: Duration::from_secs(10),
        pause: Duration::from_secs(20),
        longest_pause: Duration::from_secs(50),
        lookups: 10,
        wait: Duration::from_secs(1),
        allow: AddressList { networks: Vec::new(), unix_peers: false },
        shared: true,
    };
    let replica = |number| {
        let engine = engine(store);
        let guard = GuessGuard::new(Some(&settings), None, || number);
        assert_eq!(guard.shared_keys(), 16_384);
        (guard.sharing(&engine, |name| (name.len() as u64, 1)), engine)
    };
    let all: Vec<_> = (0..count).map(replica).collect();
    // So that each knows the number of all.
    for _ in 0..2 {
        for (_, engine) in &all {
            engine.beat().await;
        }
    }
    all
}

/// So many different tokens, until an episode begins: how many there were.
async fn guesses((guard, engine): &(GuessGuard, Arc<LeaseEngine>), from: &str, first: u64, most: u64) -> u64 {
    for token in first..first + most {
        let digest = Digest::of(&token.to_be_bytes());
        let counted = guard.failed(Some(from.parse().unwrap()), &digest, Invalid::Unknown, NOW);
        if matches!(counted, GuessCount::Began(_)) {
            return token + 1 - first;
        }
        engine.turn().await;
    }
    most
}

#[tokio::test]
async fn replicas_count_failed_tokens_together() {
    let all = replicas(&store(), 2).await;
    assert_eq!(guesses(&all[0], "192.0.2.1", 0, 80).await, 80);
    assert_eq!(all[0].0.active(), 0);
    // 20 are left, of which the first replica may have leased some.
    let second = guesses(&all[1], "192.0.2.1", 1_000, 80).await;
    assert!((2..=22).contains(&second), "{second}");
    assert_eq!(all[1].0.episodes(NOW)[0].failures, 1);
    // Another address has its own, and so has a network of IPv6.
    assert_eq!(guesses(&all[1], "192.0.2.2", 0, 50).await, 50);
    assert_eq!(guesses(&all[0], "2001:db8::1", 0, 90).await, 90);
    assert!(guesses(&all[1], "2001:db8::ffff:1", 1_000, 80).await < 20);
    // Beyond both budgets a failed token counts once: each guard says as many as there were.
    assert_eq!(guesses(&all[1], "192.0.2.1", 3_000, 90).await, 90);
    let beyond = all[1]
        .0
        .episodes(NOW)
        .iter()
        .map(|episode| (episode.network.to_string(), episode.failures))
        .collect::<Vec<_>>();
    let most = beyond.iter().find(|(network, _)| network.starts_with("192.0.2.1/")).unwrap().1;
    assert!((80..=91).contains(&most), "{beyond:?}");
    // The first one learns of it with its next failed token, or when it has used what it has leased.
    assert!(guesses(&all[0], "192.0.2.1", 2_000, 30).await <= 12);
}

#[tokio::test]
async fn a_store_that_is_gone_says_nothing_of_an_address() {
    let store = store();
    let all = replicas(&store, 2).await;
    *store.weather.lock() = Weather::Lost;
    assert_eq!(guesses(&all[0], "192.0.2.1", 0, 100).await, 100);
    assert_eq!(all[0].0.active(), 0);
    assert_eq!(guesses(&all[0], "192.0.2.1", 1_000, 1).await, 1, "this process counts on");
    assert_eq!(all[0].0.active(), 1);
}
