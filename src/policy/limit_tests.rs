//! Tests of the limits: what applies, whose bucket, all or nothing, and that threads admit what a bucket allows, to the request.

use super::super::limit_bucket::{CalendarPeriod, CalendarQuota};
use super::*;
use crate::identity::{TokenStatus, judge};
use crate::request::route::{Pattern, Route};
use crate::store::TokenRecord;
use crate::store::terms::SaidTerms;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

fn at(mono_ms: u64) -> Now {
    Now { mono_ms, unix_ms: 1_700_000_000_000 + mono_ms }
}

fn rate(requests: u64, period_ms: u64, burst: u64) -> LimitAmounts {
    LimitAmounts { rate: Some(RefillRate::new(requests, period_ms, burst)), ..LimitAmounts::default() }
}

fn limit(name: &str, key: &[LimitKeyPart], amounts: LimitAmounts) -> LimitSettings {
    LimitSettings {
        name: name.into(),
        buckets: BucketSettings { key: key.to_vec(), prefix_v4: 32, prefix_v6: 64, amounts, plans: None, most: 1_000 },
        applies: LimitScope { routes: Vec::new(), methods: Methods::ALL, scopes: Vec::new(), users: Vec::new() },
        costs: LimitCosts::default(),
        dry_run: false,
        shared: false,
    }
}

/// Routes 0 and 1, by their specificity.
fn routes() -> Routes {
    let route = |path: &str| Route::new(path.parse::<Pattern>().unwrap(), path.into());
    Routes::new(vec![route("/a/*"), route("/a/b/*")])
}

fn running(settings: &[LimitSettings]) -> RequestLimits {
    next(settings, None)
}

fn next(settings: &[LimitSettings], before: Option<&RequestLimits>) -> RequestLimits {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    RequestLimits::new(settings, true, &routes(), before, || {
        seed = seed.wrapping_mul(0x2545_f491_4f6c_dd1d).rotate_left(17);
        seed
    })
}

fn caller(user: &str, scopes: &[&str]) -> (Digest, Arc<Principal>) {
    let digest = Digest::of(format!("{user} {scopes:?}").as_bytes());
    let mut record = TokenRecord::new(digest, user);
    record.scopes = scopes.iter().map(|scope| (*scope).to_owned()).collect();
    known(record)
}

/// A token with a plan, a rate of its own, or both.
fn bound(name: &str, user: &str, plan: &str, rate: &str) -> (Digest, Arc<Principal>) {
    let said = SaidTerms { plan: plan.into(), rate: rate.into(), ..SaidTerms::default() };
    known(TokenRecord { terms: TokenTerms::of(said).unwrap(), ..TokenRecord::new(Digest::of(name.as_bytes()), user) })
}

fn known(record: TokenRecord) -> (Digest, Arc<Principal>) {
    let digest = record.digest;
    match judge(Some(&record), &digest, at(0)).0 {
        TokenStatus::Valid(principal) => (digest, principal),
        TokenStatus::Invalid(why) => panic!("{why:?}"),
    }
}

fn anonymous(client: &str) -> LimitSubject<'static> {
    LimitSubject {
        route: 1,
        route_name: "/a/*",
        method: Method::Get,
        client: client.parse().ok(),
        token: None,
        principal: None,
        headers: &[],
    }
}

fn of(caller: &(Digest, Arc<Principal>)) -> LimitSubject<'_> {
    LimitSubject { token: Some(&caller.0), principal: Some(&caller.1), ..anonymous("192.0.2.1") }
}

/// What a request took, and what its limits said.
#[derive(Debug)]
struct PassedRequest {
    taken: LimitsTaken,
    facts: LimitFacts,
}

/// What refuses a request, and what its limits said.
#[derive(Debug)]
struct RefusedRequest {
    excess: Excess,
    facts: LimitFacts,
}

type Asks = Result<PassedRequest, RefusedRequest>;

impl RequestLimits {
    fn asks(&self, subject: &LimitSubject<'_>, stage: LimitStage, now: Now) -> Asks {
        Self::said(|facts| self.take(subject, stage, now, &[], facts))
    }

    fn looks(&self, subject: &LimitSubject<'_>, stage: LimitStage, now: Now) -> Asks {
        Self::said(|facts| self.check(subject, stage, now, facts))
    }

    fn said(ask: impl FnOnce(&mut LimitFacts) -> Result<LimitsTaken, Excess>) -> Asks {
        let mut facts = LimitFacts::new();
        match ask(&mut facts) {
            Ok(taken) => Ok(PassedRequest { taken, facts }),
            Err(excess) => Err(RefusedRequest { excess, facts }),
        }
    }
}

fn passes(limits: &RequestLimits, subject: &LimitSubject<'_>, now: Now) -> bool {
    limits.asks(subject, LimitStage::Both, now).is_ok()
}

/// How many pass at once.
fn burst(limits: &RequestLimits, subject: &LimitSubject<'_>) -> usize {
    (0..1_000).take_while(|_| passes(limits, subject, at(0))).count()
}

#[test]
fn a_key_has_a_bucket_and_another_key_has_another() {
    use LimitKeyPart as K;
    let (alice, twin, bob) = (caller("alice", &["api"]), caller("alice", &["api", "read"]), caller("bob", &["read"]));
    let elsewhere = |subject| LimitSubject { client: "192.0.2.2".parse().ok(), ..subject };
    let below = |subject| LimitSubject { route: 0, route_name: "/a/b/*", ..subject };
    let says = |subject, headers| LimitSubject { headers, ..subject };
    for (key, first, same, others) in [
        (vec![], of(&alice), vec![of(&bob), anonymous("::1"), below(of(&twin))], vec![]),
        (vec![K::Token], of(&alice), vec![below(of(&alice))], vec![of(&twin), of(&bob)]),
        (vec![K::User], of(&alice), vec![of(&twin)], vec![of(&bob)]),
        (
            vec![K::Address],
            of(&alice),
            vec![of(&bob), anonymous("192.0.2.1")],
            vec![elsewhere(of(&alice)), anonymous("")],
        ),
        (
            vec![K::Address],
            anonymous("2001:db8::1"),
            vec![anonymous("2001:db8::ffff:1")],
            vec![anonymous("2001:db8:0:1::1")],
        ),
        (vec![K::Route], of(&alice), vec![of(&bob)], vec![below(of(&alice))]),
        (vec![K::User, K::Address], of(&alice), vec![of(&twin)], vec![elsewhere(of(&alice)), of(&bob)]),
        (
            vec![K::Header("X-A".into())],
            says(of(&alice), &[1]),
            vec![says(of(&bob), &[1])],
            vec![says(of(&alice), &[2])],
        ),
    ] {
        let limits = running(&[limit("l", &key, rate(1, 1_000, 3))]);
        assert_eq!(burst(&limits, &first), 3, "{key:?}");
        for same in &same {
            assert!(!passes(&limits, same, at(0)), "{key:?} {same:?}");
        }
        for other in &others {
            assert_eq!(burst(&limits, other), 3, "{key:?} {other:?}");
        }
    }
    // A request without the key is not counted by the limit.
    let limits = running(&[limit("l", &[K::Token], rate(1, 1_000, 3))]);
    assert_eq!(burst(&limits, &anonymous("192.0.2.1")), 1_000);
    // By the first of the limit's scopes that the token has.
    let mut by_scope = limit("l", &[K::Scope], rate(1, 1_000, 3));
    by_scope.applies.scopes = vec!["read".into(), "api".into()];
    let limits = running(&[by_scope]);
    assert_eq!((burst(&limits, &of(&alice)), burst(&limits, &of(&bob)), burst(&limits, &of(&twin))), (3, 3, 0));
    assert_eq!(burst(&limits, &of(&caller("carol", &["other"]))), 1_000);
}

#[test]
fn a_limit_is_for_what_it_says() {
    let (alice, bob) = (caller("alice", &["api"]), caller("bob", &[]));
    let mut only = limit("l", &[], rate(1, 1_000, 3));
    only.applies = LimitScope {
        routes: vec!["/a/b/*".into()],
        methods: Methods::only([Method::Post]),
        scopes: vec!["api".into()],
        users: vec!["alice".into()],
    };
    let limits = running(&[only]);
    let right = LimitSubject { route: 0, route_name: "/a/b/*", method: Method::Post, ..of(&alice) };
    assert_eq!(burst(&limits, &right), 3);
    for other in [
        LimitSubject { method: Method::Get, ..right },
        LimitSubject { route: 1, route_name: "/a/*", ..right },
        LimitSubject { principal: Some(&bob.1), ..right },
        LimitSubject { principal: None, ..right },
    ] {
        assert!(passes(&limits, &other, at(0)), "{other:?}");
    }
}

#[test]
fn a_write_costs_more() {
    let alice = caller("alice", &[]);
    let mut costly = limit("l", &[LimitKeyPart::Token], rate(1, 1_000, 10));
    costly.costs.methods[Method::Post.index()] = 5;
    costly.costs.methods[Method::Options.index()] = 0;
    costly.costs.routes.push(("/a/b/*".into(), 4));
    let limits = running(&[costly]);
    let post = LimitSubject { method: Method::Post, ..of(&alice) };
    assert_eq!(burst(&limits, &LimitSubject { method: Method::Options, ..of(&alice) }), 1_000, "free of cost");
    assert!(passes(&limits, &post, at(0)), "5 of 10");
    assert!(passes(&limits, &LimitSubject { route: 0, route_name: "/a/b/*", ..of(&alice) }, at(0)), "9 of 10");
    let excess = limits.asks(&post, LimitStage::Both, at(0)).unwrap_err().excess;
    assert_eq!((excess.remaining, excess.retry_after, excess.per_minute), (1, 4, Some(60)));
    assert!(passes(&limits, &of(&alice), at(0)), "10 of 10");
}

#[test]
fn the_strictest_answers_and_who_is_refused_takes_nothing() {
    let (alice, bob) = (caller("alice", &[]), caller("bob", &[]));
    let limits = running(&[
        limit("all", &[], rate(10, 1_000, 10)),
        limit("user", &[LimitKeyPart::User], rate(1, 10_000, 2)),
        limit("token", &[LimitKeyPart::Token], rate(1, 1_000, 2)),
    ]);
    assert_eq!(burst(&limits, &of(&alice)), 2);
    let refused = limits.asks(&of(&alice), LimitStage::Both, at(0)).unwrap_err();
    assert_eq!((limits.name(refused.excess.limit), refused.excess.retry_after), ("user", 10));
    assert_eq!(refused.excess.reset, 1_700_000_010);
    assert_eq!(refused.facts.len(), 2, "both that refuse it are counted, and nothing else");
    for _ in 0..100 {
        assert!(!passes(&limits, &of(&alice), at(0)));
    }
    // 8 of the first limit are left.
    let facts = limits.asks(&of(&bob), LimitStage::Both, at(0)).unwrap().facts;
    assert_eq!(facts.iter().map(|fact| fact.remaining).collect::<Vec<_>>(), [7, 1, 1]);
}

#[test]
fn a_dry_run_refuses_nothing() {
    let alice = caller("alice", &[]);
    let dry = LimitSettings { dry_run: true, ..limit("dry", &[LimitKeyPart::User], rate(1, 1_000, 2)) };
    let limits = running(&[dry, limit("real", &[LimitKeyPart::User], rate(1, 1_000, 4))]);
    let results = |facts: LimitFacts| facts.iter().map(|fact| fact.result).collect::<Vec<_>>();
    use LimitResult::{Allowed, DryRun, Refused};
    for expected in [[Allowed, Allowed], [Allowed, Allowed], [DryRun, Allowed], [DryRun, Allowed]] {
        assert_eq!(results(limits.asks(&of(&alice), LimitStage::Both, at(0)).unwrap().facts), expected);
    }
    let refused = limits.asks(&of(&alice), LimitStage::Both, at(0)).unwrap_err();
    assert_eq!((limits.name(refused.excess.limit), results(refused.facts)), ("real", vec![DryRun, Refused]));
}

fn planned(key: &[LimitKeyPart], amounts: LimitAmounts, plans: &[(&str, LimitAmounts)]) -> LimitSettings {
    let mut settings = limit("l", key, amounts);
    let plan = |(name, amounts): &(&str, LimitAmounts)| LimitPlan { name: (*name).to_owned(), amounts: *amounts };
    settings.buckets.plans = Some(plans.iter().map(plan).collect());
    settings
}

#[test]
fn a_rate_of_its_own_goes_before_the_plan_and_the_plan_before_the_limit() {
    use LimitKeyPart::{Token, User};
    let plans = [("gold", rate(1, 60_000, 7)), ("free", rate(1, 60_000, 1))];
    let own = "1/h burst 4";
    let callers = [("", "", 3), ("gold", "", 7), ("free", "", 1), ("gone", "", 3), ("", own, 4), ("gold", own, 4)];
    let limits = running(&[planned(&[Token], rate(1, 60_000, 3), &plans)]);
    for (index, (plan, own, passed)) in callers.iter().enumerate() {
        let caller = bound(&format!("t{index}"), "u", plan, own);
        assert_eq!(burst(&limits, &of(&caller)), *passed, "{plan} {own}");
    }
    // Without `plans = true`, a token's terms say nothing.
    let limits = running(&[limit("l", &[Token], rate(1, 60_000, 3))]);
    for (index, (plan, own, _)) in callers.iter().enumerate() {
        assert_eq!(burst(&limits, &of(&bound(&format!("t{index}"), "u", plan, own))), 3, "{plan} {own}");
    }
    // A user has a bucket for each plan of his tokens, and a rate of its own is of a token only.
    let limits = running(&[planned(&[User], rate(1, 60_000, 3), &plans)]);
    let (one, two) = (bound("one", "u", "gold", ""), bound("two", "u", "gold", own));
    assert_eq!((burst(&limits, &of(&one)), burst(&limits, &of(&two))), (7, 0));
    assert_eq!(burst(&limits, &of(&bound("three", "u", "", own))), 3);
}

#[test]
fn a_plan_is_in_place_of_all_amounts_and_a_rate_of_its_own_of_the_rate_alone() {
    let in_flight = LimitAmounts { concurrency: Some(2), ..rate(100, 1_000, 100) };
    let settings = planned(
        &[LimitKeyPart::Token],
        LimitAmounts { concurrency: Some(1), ..rate(1, 1_000, 1) },
        &[("gold", in_flight)],
    );
    let limits = running(std::slice::from_ref(&settings));
    let take = |caller: &(Digest, Arc<Principal>)| limits.asks(&of(caller), LimitStage::Both, at(0));
    for (plan, own, places) in [("gold", "", 2), ("gold", "50/s", 2), ("", "50/s", 1)] {
        let caller = bound(&format!("{plan}{own}"), "u", plan, own);
        let mut held: Vec<_> = (0..places).map(|_| take(&caller).unwrap()).collect();
        assert_eq!(take(&caller).unwrap_err().excess.by, LimitedBy::Concurrency, "{plan} {own}");
        held.pop();
        assert!(take(&caller).is_ok(), "a place is given back to where it was taken from");
        let amounts = limits.amounts(0, Some(&caller.1)).unwrap();
        assert_eq!(amounts.concurrency, Some(u32::try_from(places).unwrap()));
        assert_eq!(amounts.stated(), Some(if own.is_empty() { (100, 1) } else { (50, 1) }));
    }
    // The answer says the plan's amounts.
    let gold = bound("told", "u", "gold", "30/min burst 1");
    drop(take(&gold).unwrap());
    assert_eq!(take(&gold).unwrap_err().excess.per_minute, Some(30));
    // A reload that leaves the plans as they are keeps all of these buckets, and one that changes them none.
    let after = next(std::slice::from_ref(&settings), Some(&limits));
    assert!(!passes(&after, &of(&gold), at(0)));
    let mut changed = settings;
    changed.buckets.plans.as_mut().unwrap()[0].amounts = rate(9, 1_000, 9);
    assert!(passes(&next(&[changed], Some(&after)), &of(&gold), at(0)));
}

/// Whatever a record says: the dearest request passes in its time, and all that is due.
#[test]
fn a_rate_of_its_own_lets_pass_what_is_due() {
    let mut settings = planned(&[LimitKeyPart::Token], rate(100, 1_000, 100), &[]);
    settings.costs.methods[Method::Post.index()] = 5;
    let limits = running(&[settings]);
    let slow = bound("slow", "u", "", "1/s burst 1");
    let post = LimitSubject { method: Method::Post, ..of(&slow) };
    assert!(passes(&limits, &post, at(0)) && !passes(&limits, &post, at(4_999)) && passes(&limits, &post, at(5_000)));
    let fast = bound("fast", "u", "", "10000/s burst 1");
    assert!((0..100).all(|ms| (0..10).all(|_| passes(&limits, &of(&fast), at(ms)))));
}

#[test]
fn odd_terms_are_said_once_and_give_nobody_more() {
    let settings = planned(&[LimitKeyPart::Token], rate(1, 60_000, 3), &[("gold", rate(1, 60_000, 7))]);
    let limits = running(&[settings]);
    let take = |caller: &(Digest, Arc<Principal>)| limits.asks(&of(caller), LimitStage::Both, at(0));
    let is_odd = |caller: &(Digest, Arc<Principal>)| {
        let facts = take(caller).map_or_else(|exceeded| exceeded.facts, |taken| taken.facts);
        facts.iter().any(|fact| fact.odd)
    };
    let (gone, again) = (bound("gone", "u", "gone", ""), bound("again", "u", "gone", ""));
    // Looking changes nothing.
    assert!(limits.looks(&of(&gone), LimitStage::Both, at(0)).unwrap().facts.iter().all(|fact| !fact.odd));
    assert!(limits.take_odd().is_empty());
    assert!(is_odd(&gone) && is_odd(&gone), "until it is said");
    let said = OddTerms { kind: OddKind::UnknownPlan, name: "gone".into(), token: gone.1.token() };
    assert_eq!(limits.take_odd(), [said]);
    assert!(!is_odd(&gone) && !is_odd(&again));
    assert!(!is_odd(&bound("good", "u", "gold", "")) && !is_odd(&caller("free", &[])));
    assert!(limits.take_odd().is_empty());
    // Who only looks uses up none of their places.
    for index in 1..=2 * MOST_OWN_RATES {
        let looked = bound("looked", "u", "", &format!("{index}/min burst 1"));
        assert!(limits.looks(&of(&looked), LimitStage::Both, at(0)).is_ok());
    }
    // No more different rates than this; who has one of them keeps it.
    for index in 1..=MOST_OWN_RATES {
        assert!(!is_odd(&bound(&format!("own {index}"), "u", "", &format!("{index}/h burst 1"))));
    }
    let (late, planned) = (bound("late", "u", "", "1000/h burst 9"), bound("planned", "u", "gold", "1001/h burst 9"));
    assert_eq!((burst(&limits, &of(&late)), burst(&limits, &of(&planned))), (3, 7));
    let said = OddTerms { kind: OddKind::TooManyRates, name: "l".into(), token: late.1.token() };
    assert_eq!(limits.take_odd(), [said]);
    assert_eq!(burst(&limits, &of(&bound("early", "u", "", "5/h burst 1"))), 1);
    // A plan for each token is no way to have a long list.
    for index in 0..1_000 {
        is_odd(&bound("many", "u", &format!("plan-{index}"), ""));
    }
    assert_eq!(limits.take_odd().len(), MOST_ODD - 2);
}

#[test]
fn addresses_are_asked_before_the_token_store_and_get_back_what_a_later_limit_refuses() {
    let alice = caller("alice", &[]);
    let limits = running(&[
        limit("token", &[LimitKeyPart::Token], rate(1, 1_000, 1)),
        limit("address", &[LimitKeyPart::Address], rate(1, 1_000, 3)),
        limit("all", &[], rate(100, 1_000, 100)),
    ]);
    assert!(limits.has_early(0) && limits.has_early(1));
    let names = |facts: &LimitFacts| facts.iter().map(|fact| limits.name(fact.limit)).collect::<Vec<_>>().join(" ");
    for round in 0..10 {
        let early = limits.asks(&of(&alice), LimitStage::Early, at(0)).unwrap();
        assert_eq!(names(&early.facts), "address");
        match limits.asks(&of(&alice), LimitStage::Late, at(0)) {
            Ok(late) => assert_eq!((round, names(&late.facts).as_str()), (0, "token all")),
            Err(refused) => {
                assert_eq!(names(&refused.facts), "token");
                limits.give_back(&early.taken, at(0));
            }
        }
    }
    // One is taken of three.
    assert_eq!((0..5).filter(|_| limits.asks(&of(&alice), LimitStage::Early, at(0)).is_ok()).count(), 2);
    assert!(limits.looks(&of(&alice), LimitStage::Early, at(0)).is_err());
}

#[test]
fn requests_in_flight_are_given_back_with_their_place() {
    let alice = caller("alice", &[]);
    let most = LimitAmounts { concurrency: Some(2), ..LimitAmounts::default() };
    let limits = running(&[limit("l", &[LimitKeyPart::User], most), limit("rate", &[], rate(1, 1_000, 3))]);
    let take = || limits.asks(&of(&alice), LimitStage::Both, at(0));
    let (one, two) = (take().unwrap(), take().unwrap());
    let excess = take().unwrap_err().excess;
    assert_eq!((excess.by, excess.retry_after, excess.per_minute), (LimitedBy::Concurrency, 1, None));
    drop(one);
    let three = take().unwrap();
    // The rate refuses: no place is kept for it.
    drop(two);
    assert_eq!(take().unwrap_err().excess.by, LimitedBy::Rate);
    drop(three);
    let both = [at(10_000), at(10_000)].map(|now| limits.asks(&of(&alice), LimitStage::Both, now));
    assert!(both.iter().all(Result::is_ok));
    assert!(limits.asks(&of(&alice), LimitStage::Both, at(10_000)).is_err());
}

#[test]
fn a_reload_keeps_the_buckets_of_what_did_not_change() {
    let alice = caller("alice", &[]);
    let settings = [limit("one", &[LimitKeyPart::User], rate(1, 1_000, 3)), limit("two", &[], rate(1, 1_000, 9))];
    let before = running(&settings);
    assert_eq!(burst(&before, &of(&alice)), 3);
    let mut changed = settings.clone();
    changed.reverse();
    changed[0].buckets.amounts = rate(1, 1_000, 8);
    // To whom it applies may change.
    changed[1].applies.methods = Methods::only([Method::Get]);
    let after = next(&changed, Some(&before));
    assert_eq!(after.kept_from(&before).collect::<Vec<_>>(), ["one"]);
    assert!(!passes(&after, &of(&alice), at(0)));
    assert_eq!(burst(&next(&changed[..1], Some(&after)), &anonymous("")), 8);
}

/// Requests that came before a reload and such that came after it take from the same buckets, of which each locks all of its own.
#[test]
fn a_reload_in_another_order_makes_nobody_wait_for_each_other() {
    let key = &[LimitKeyPart::User];
    let mut settings: Vec<_> =
        (0..12).map(|n| limit(&format!("limit-{n}"), key, rate(1_000_000, 1_000, 900_000))).collect();
    let mut snapshots = vec![running(&settings)];
    for reload in 0..3 {
        settings.rotate_left(5);
        settings.swap(0, 7);
        // One goes and comes back, with buckets of its own.
        let fewer = next(&settings[1..], snapshots.last());
        snapshots.push(fewer);
        let all = next(&settings, snapshots.last());
        assert!((9..12).contains(&all.kept_from(&snapshots[0]).count()), "reload {reload}");
        snapshots.push(all);
    }
    let alice = caller("alice", &[]);
    let (snapshots, alice) = (Arc::new(snapshots), Arc::new(alice));
    let (done, ended) = std::sync::mpsc::channel();
    for thread in 0..snapshots.len() {
        let (snapshots, alice, done) = (Arc::clone(&snapshots), Arc::clone(&alice), done.clone());
        // Not of a scope: threads that hang must not keep the test from failing.
        std::thread::spawn(move || {
            (0..5_000).for_each(|turn| {
                passes(&snapshots[thread], &of(&alice), at(turn));
            });
            done.send(()).unwrap();
        });
    }
    for thread in 0..snapshots.len() {
        let waited = ended.recv_timeout(std::time::Duration::from_secs(60));
        assert!(waited.is_ok(), "{} of {} threads wait for each other", snapshots.len() - thread, snapshots.len());
    }
}

#[test]
fn what_is_left_is_of_the_amount_that_was_exceeded() {
    let quota = CalendarQuota { requests: 3, period: CalendarPeriod::Day };
    let amounts = LimitAmounts { quota: Some(quota), ..rate(600, 60_000, 100) };
    let limits = running(&[limit("q", &[LimitKeyPart::User], amounts)]);
    let alice = caller("alice", &[]);
    (0..3).for_each(|_| assert!(passes(&limits, &of(&alice), at(0))));
    let excess = limits.asks(&of(&alice), LimitStage::Both, at(0)).unwrap_err().excess;
    assert_eq!((excess.by, excess.remaining), (LimitedBy::Quota, 0));
}

#[test]
fn a_plan_with_a_weight_alone_has_the_limits_own_amounts() {
    let limits = running(&[planned(&[LimitKeyPart::Token], rate(1, 1_000, 3), &[("heavy", LimitAmounts::default())])]);
    let heavy = bound("heavy-token", "ann", "heavy", "");
    assert_eq!(burst(&limits, &of(&heavy)), 3);
    let own = bound("own-token", "ann", "heavy", "1/s");
    assert_eq!(burst(&limits, &of(&own)), 1);
}

#[test]
fn a_plans_concurrency_is_not_shared() {
    let mut settings = planned(
        &[LimitKeyPart::Token],
        rate(1, 1_000, 3),
        &[("gold", LimitAmounts { concurrency: Some(1), ..rate(1, 1_000, 9) })],
    );
    let errors =
        |settings: &LimitSettings| settings.problems().iter().filter(|problem| problem.key == "shared").count();
    assert_eq!(errors(&settings), 0);
    settings.shared = true;
    assert_eq!(errors(&settings), 1);
}

/// Many threads, one clock that goes forward: exactly what is due gets through, neither less nor more.
#[test]
fn threads_together_get_what_is_due_to_the_request() {
    const THREADS: u64 = 8;
    let (alice, bob) = (caller("alice", &[]), caller("bob", &[]));
    let (requests, period, size) = (700, 1_000, 40);
    let mut settings =
        vec![limit("all", &[], rate(requests, period, size)), limit("user", &[LimitKeyPart::User], rate(1, 1_000, 5))];
    settings[1].applies.users = vec!["bob".into()];
    let limits = running(&settings);
    let (clock, over, admitted, bobs) =
        (AtomicU64::new(0), AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    const END: u64 = 3_000;
    const MOST_WAITS: u64 = 1_000_000;
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (limits, clock, over, admitted, bobs, alice, bob) =
                (&limits, &clock, &over, &admitted, &bobs, &alice, &bob);
            scope.spawn(move || {
                while !over.load(Ordering::Acquire) {
                    let now = clock.load(Ordering::Acquire);
                    // Half of the threads mostly fail at their own limit, and must not take from that of all.
                    let (who, count) = if thread % 2 == 0 { (alice, admitted) } else { (bob, bobs) };
                    if passes(limits, &of(who), at(now)) {
                        count.fetch_add(1, Ordering::AcqRel);
                    }
                }
            });
        }
        // The clock waits until all that is due at a time was taken: only then is there nothing to flow over. Not for ever: a
        // bucket that gives less would be waited for in vain.
        let (mut now, mut waits) = (0, 0);
        while now <= END && waits < MOST_WAITS {
            clock.store(now, Ordering::Release);
            let all = admitted.load(Ordering::Acquire) + bobs.load(Ordering::Acquire);
            match all.cmp(&(size + now * requests / period)) {
                std::cmp::Ordering::Less => waits += 1,
                std::cmp::Ordering::Equal => (now, waits) = (now + 1, 0),
                std::cmp::Ordering::Greater => break,
            }
            std::thread::yield_now();
        }
        over.store(true, Ordering::Release);
    });
    let bobs = bobs.into_inner();
    assert_eq!(admitted.into_inner() + bobs, size + END * requests / period);
    assert!((1..=5 + END / 1_000).contains(&bobs), "{bobs}");
}

/// The same with requests in flight: never more than allowed, and all places are free in the end.
#[test]
fn threads_together_are_never_more_than_allowed() {
    let alice = caller("alice", &[]);
    let most = LimitAmounts {
        concurrency: Some(3),
        quota: Some(CalendarQuota { requests: 20_000, period: CalendarPeriod::Day }),
        ..LimitAmounts::default()
    };
    let limits = running(&[limit("l", &[LimitKeyPart::User], most)]);
    let (inside, highest, passed) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                // A place that is never free is not waited for.
                for _ in 0..2_000_000 {
                    match limits.asks(&of(&alice), LimitStage::Both, at(0)) {
                        Ok(taken) => {
                            highest.fetch_max(inside.fetch_add(1, Ordering::AcqRel) + 1, Ordering::AcqRel);
                            passed.fetch_add(1, Ordering::AcqRel);
                            std::thread::yield_now();
                            inside.fetch_sub(1, Ordering::AcqRel);
                            drop(taken);
                        }
                        Err(refused) if refused.excess.by == LimitedBy::Quota => break,
                        Err(_) => std::thread::yield_now(),
                    }
                }
            });
        }
    });
    assert_eq!((highest.into_inner(), passed.into_inner()), (3, 20_000));
    let tomorrow = at(24 * 60 * 60 * 1_000);
    let taken: Vec<_> = (0..4).map(|_| limits.asks(&of(&alice), LimitStage::Both, tomorrow)).collect();
    assert_eq!(taken.iter().filter(|taken| taken.is_ok()).count(), 3);
}

/// The hash with which a token leaves this process must keep tokens apart whatever the seed is.
#[test]
fn a_seed_makes_no_two_tokens_one() {
    for seed in [0, u64::MAX, u64::MAX << 1, 0x5555_5555_5555_5555] {
        let settings = limit("token", &[LimitKeyPart::Token], rate(1, 1_000, 1));
        let limits = RequestLimits::new(&[settings], false, &routes(), None, || seed);
        let callers: Vec<_> = (0..100).map(|number| caller(&format!("user-{number}"), &[])).collect();
        let pass = callers.iter().filter(|caller| passes(&limits, &of(caller), at(0))).count();
        assert_eq!(pass, 100, "{seed:x}");
    }
}

#[test]
fn who_only_looks_is_told_what_is_left() {
    let limits = running(&[limit("token", &[LimitKeyPart::Token], rate(1, 1_000, 7))]);
    let alice = caller("alice", &[]);
    let left = || limits.looks(&of(&alice), LimitStage::Both, at(0)).unwrap().facts[0].remaining;
    assert_eq!((left(), left()), (7, 7));
    assert!(passes(&limits, &of(&alice), at(0)));
    assert_eq!(left(), 6);
}

/// A route with one limit has a short way of its own, which must say the same.
#[test]
fn a_limit_alone_does_as_it_does_beside_another_one() {
    use LimitKeyPart as K;
    // Knuth's generator: nothing else is needed of it.
    let mut state = 12_u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let wide = limit("wide", &[], rate(1_000_000, 1, 1_000_000));
    let callers = ["ann", "bob", "eve"].map(|user| caller(user, &["api"]));
    let quota = CalendarQuota { requests: 40, period: CalendarPeriod::Day };
    let amounts = [
        rate(3, 1_000, 4),
        LimitAmounts { quota: Some(quota), ..LimitAmounts::default() },
        LimitAmounts { concurrency: Some(2), ..LimitAmounts::default() },
        LimitAmounts { concurrency: Some(3), quota: Some(quota), ..rate(5, 1_000, 5) },
    ];
    let (mut refused, mut kept) = (0, 0);
    for (amounts, key, dry_run) in amounts.iter().flat_map(|amounts| {
        let keys = [vec![K::Token], vec![K::User], vec![K::Address], vec![]];
        keys.into_iter().flat_map(move |key| [(amounts, key.clone(), false), (amounts, key, true)])
    }) {
        let mut one = LimitSettings { dry_run, ..limit("one", &key, *amounts) };
        one.costs.methods[Method::Post.index()] = 3;
        one.costs.methods[Method::Head.index()] = 0;
        one.buckets.plans = (key == [K::Token]).then(Vec::new);
        let (alone, beside) = (running(std::slice::from_ref(&one)), running(&[one, wide.clone()]));
        let (mut held, mut time) = (Vec::new(), 0);
        for _ in 0..400 {
            time += random(300) as u64;
            let subject = LimitSubject {
                method: [Method::Get, Method::Post, Method::Head][random(3)],
                ..of(&callers[random(3)])
            };
            let stage = [LimitStage::Both, LimitStage::Early, LimitStage::Late][random(3)];
            let [first, second] = [&alone, &beside].map(|limits| limits.asks(&subject, stage, at(time)));
            let first_of = |facts: &LimitFacts| facts.iter().find(|fact| fact.limit == 0).copied();
            match (first, second) {
                (Ok(first), Ok(second)) => {
                    assert_eq!(first_of(&first.facts), first_of(&second.facts));
                    let kept_of = |LimitsTaken(kept): &LimitsTaken| {
                        kept.as_ref().map_or((0, 0), |kept| (kept.in_flight.len(), kept.changes.len()))
                    };
                    assert_eq!(kept_of(&first.taken), kept_of(&second.taken));
                    kept += kept_of(&first.taken).0;
                    if stage == LimitStage::Early && random(2) == 0 {
                        alone.give_back(&first.taken, at(time));
                        beside.give_back(&second.taken, at(time));
                    }
                    held.push((first, second));
                }
                (Err(first), Err(second)) => {
                    assert_eq!((first.excess, &first.facts), (second.excess, &second.facts));
                    refused += 1;
                }
                (first, second) => panic!("{key:?} {amounts:?}: {first:?}, {second:?}"),
            }
            if random(3) == 0 && !held.is_empty() {
                held.swap_remove(random(held.len()));
            }
        }
    }
    assert!(refused > 1_000 && kept > 200, "{refused} {kept}");
}

/// What an earlier stage was allowed is given back, so that nothing is left of it but refusals.
#[test]
fn behind_a_refusal_nothing_is_left_that_was_allowed() {
    let token = limit("token", &[LimitKeyPart::Token], rate(1, 1_000, 1));
    let alice = caller("alice", &[]);
    for settings in [vec![token.clone()], vec![token, limit("all", &[], rate(100, 1_000, 100))]] {
        let (limits, mut facts) = (running(&settings), LimitFacts::new());
        let mut take = || {
            let taken = limits.take(&of(&alice), LimitStage::Both, at(0), &[], &mut facts);
            (taken.is_ok(), facts.iter().map(|fact| (fact.limit, fact.result)).collect::<Vec<_>>())
        };
        let (passes, said) = take();
        assert!(
            passes && said.len() == settings.len() && said.iter().all(|(_, result)| *result == LimitResult::Allowed)
        );
        assert_eq!(take(), (false, vec![(0, LimitResult::Refused)]));
    }
}
