//! The documented bound: once a revocation is in the store, the token stops working on every gateway within a second,
//! whatever happens to the connections between them.

use super::{BOUND, Backing, Caller, PostgresOwn, RedisOwn, setting};
use crate::harness::*;
use crate::servers::Fault;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

const REPLICAS: usize = 3;

/// Three gateways under load on one store, connections cut at random times, and a series of revocations.
fn promised(mut store: Box<dyn Backing>) {
    let count = setting("TOLLGATE_REVOCATIONS", 60);
    let doomed: Vec<String> = (0..count).map(|number| format!("doomed-{number:05}")).collect();
    let steady: Vec<String> = (0..20).map(|number| format!("steady-{number:02}")).collect();
    store.add(&doomed);
    store.add(&steady);
    let upstream = Upstream::start();
    let more = format!("{}[cache]\npositive_ttl = \"10m\"\n[log]\naccess = \"off\"\n", store.section());
    let gateways: Vec<Gateway> = (0..REPLICAS).map(|_| Gateway::start(upstream.address, &more)).collect();

    let (over, good, other) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let (mut lags, mut cuts, mut late) = (Vec::new(), 0, Vec::new());
    std::thread::scope(|scope| {
        for gateway in &gateways {
            let (over, good, other, steady) = (&over, &good, &other, &steady);
            scope.spawn(move || {
                let mut caller = Caller::of(gateway);
                while !over.load(Ordering::Relaxed) {
                    for token in steady {
                        let counter = if caller.status(token) == 200 { good } else { other };
                        counter.fetch_add(1, Ordering::Relaxed);
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
        }
        // One thread per gateway sends requests until the token is refused, and returns how long that took.
        let (asks, answers): (Vec<_>, Vec<_>) = gateways
            .iter()
            .map(|gateway| {
                let (ask, asked) = mpsc::channel::<(String, Instant)>();
                let (answer, answered) = mpsc::channel::<Duration>();
                scope.spawn(move || {
                    let mut caller = Caller::of(gateway);
                    while let Ok((token, revoked)) = asked.recv() {
                        let mut last = revoked;
                        while caller.status(&token) == 200 {
                            last = Instant::now();
                            assert!(last - revoked < PATIENCE, "{token} still works");
                        }
                        answer.send(last.saturating_duration_since(revoked)).unwrap();
                    }
                });
                (ask, answered)
            })
            .unzip();
        let mut callers: Vec<Caller> = gateways.iter().map(Caller::of).collect();
        // A few hundred cuts in the long form, and some in the short one.
        let (mut random, seldom) = (7_u64, 8.max(count as u64 / 150));
        for token in &doomed {
            // In every cache, or being looked up.
            for caller in &mut callers {
                let status = caller.status(token);
                assert!(status == 200 || status == 503, "{}: {token}: {status}", store.name());
            }
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            match (random >> 33) % seldom {
                0 => {
                    store.inject(Fault::Cut);
                    cuts += 1;
                    store.revoke(token);
                }
                1 => {
                    store.revoke(token);
                    store.inject(Fault::Cut);
                    cuts += 1;
                }
                _ => store.revoke(token),
            }
            let revoked = Instant::now();
            for ask in &asks {
                ask.send((token.clone(), revoked)).unwrap();
            }
            for answer in &answers {
                let lag = answer.recv().unwrap();
                if lag > BOUND {
                    late.push((token.clone(), lag));
                }
                lags.push(lag);
            }
        }
        drop(asks);
        over.store(true, Ordering::Relaxed);
    });
    lags.sort();
    let at = |share: f64| lags[((lags.len() - 1) as f64 * share) as usize];
    println!(
        "| {} | {count} revocations x {REPLICAS} gateways, {cuts} cuts | p50 {:.1?}, p99 {:.1?}, p99.9 {:.1?}, max {:.1?} | {} worked past {BOUND:?} | meanwhile {} answers 200, {} others |",
        store.name(),
        at(0.5),
        at(0.99),
        at(0.999),
        at(1.0),
        late.len(),
        good.load(Ordering::Relaxed),
        other.load(Ordering::Relaxed),
    );
    assert_eq!(late, [], "{}: tokens that worked longer than the bound", store.name());
    assert!(cuts > 0 && good.load(Ordering::Relaxed) > count);
}

#[test]
fn no_token_works_past_the_bound_on_postgres() {
    promised(Box::new(PostgresOwn::new()));
}

#[test]
fn no_token_works_past_the_bound_on_redis() {
    promised(Box::new(RedisOwn::new()));
}
