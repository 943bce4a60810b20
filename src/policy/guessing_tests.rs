//! Tests of the guard against guessing: what counts, when turns are due, how pauses grow, and what others of an address keep.

use super::*;

fn at(mono_ms: u64) -> Now {
    Now { mono_ms, unix_ms: 1_700_000_000_000 + mono_ms }
}

/// Ten failed tokens in ten seconds.
fn settings() -> GuessSettings {
    GuessSettings {
        failures: 10,
        per: Duration::from_secs(10),
        pause: Duration::from_secs(20),
        longest_pause: Duration::from_secs(50),
        lookups: 10,
        wait: Duration::from_secs(1),
        allow: AddressList { networks: vec!["10.9.0.0/16".parse().unwrap()], unix_peers: false },
        shared: false,
    }
}

fn guard() -> GuessGuard {
    next(&settings(), None)
}

fn next(settings: &GuessSettings, before: Option<&GuessGuard>) -> GuessGuard {
    let mut seed = 7_u64;
    GuessGuard::new(Some(settings), before, || {
        seed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
        seed
    })
}

fn client(text: &str) -> Option<IpAddr> {
    Some(text.parse().unwrap())
}

fn fail(guard: &GuessGuard, from: &str, token: u64, now: u64) -> GuessCount {
    guard.failed(client(from), &Digest::of(&token.to_be_bytes()), Invalid::Unknown, at(now))
}

/// As many different tokens as the budget has, and one.
fn overspend(guard: &GuessGuard, from: &str, now: u64) {
    for token in 0..10 {
        assert_eq!(fail(guard, from, now << 8 | token, now), GuessCount::Counted);
    }
    assert!(matches!(fail(guard, from, now << 8 | 10, now), GuessCount::Began(_)));
}

/// A token that did not come before.
fn any() -> Digest {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    Digest::of(format!("any {}", NEXT.fetch_add(1, Ordering::Relaxed)).as_bytes())
}

fn refused_for(verdict: &GuessVerdict) -> Option<u64> {
    match verdict {
        GuessVerdict::Refused(refusal) => Some(refusal.retry_after),
        _ => None,
    }
}

#[test]
fn beyond_the_budget_tokens_take_turns_and_those_too_far_away_are_refused() {
    let guard = guard();
    assert!(matches!(guard.turn(client("192.0.2.1"), &any(), at(0)), GuessVerdict::Free));
    overspend(&guard, "192.0.2.1", 1_000);
    // Ten a second, for up to a second ahead.
    let turns: Vec<_> = (0..20).map(|_| guard.turn(client("192.0.2.1"), &any(), at(1_000))).collect();
    let waits: Vec<_> = turns
        .iter()
        .map_while(|turn| match turn {
            GuessVerdict::Turn(turn) => Some(turn.wait.as_millis()),
            _ => None,
        })
        .collect();
    assert_eq!(waits, [0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1_000]);
    assert!(turns[11..].iter().all(|turn| refused_for(turn) == Some(20)), "{turns:?}");
    // A second later, ten more are due.
    let later: Vec<_> = (0..20).map(|_| guard.turn(client("192.0.2.1"), &any(), at(2_000))).collect();
    assert_eq!(later.iter().filter(|turn| matches!(turn, GuessVerdict::Turn(_))).count(), 10);
    drop(later);
    // Nobody else is meant.
    assert!(matches!(guard.turn(client("192.0.2.2"), &any(), at(2_000)), GuessVerdict::Free));
    assert!(matches!(guard.turn(None, &any(), at(2_000)), GuessVerdict::Free));
    assert_eq!(guard.0.as_ref().unwrap().state.waiting.load(Ordering::Relaxed), 11);
    drop(turns);
    assert_eq!(guard.0.as_ref().unwrap().state.waiting.load(Ordering::Relaxed), 0);
}

#[test]
fn places_to_wait_are_bounded_for_all_addresses_together() {
    let guard = next(&GuessSettings { wait: Duration::from_secs(60), ..settings() }, None);
    let mut held = Vec::new();
    let waiting = |held: &[GuessVerdict]| held.iter().filter(|turn| matches!(turn, GuessVerdict::Turn(_))).count();
    for number in 0..20 {
        let from = format!("192.0.2.{number}");
        overspend(&guard, &from, 1_000);
        let before = waiting(&held);
        held.extend((0..1_000).map(|_| guard.turn(client(&from), &any(), at(1_000))));
        // One address has no more than its part.
        assert_eq!(waiting(&held) - before, if number < 16 { 256 } else { 0 }, "{from}");
    }
    assert_eq!(waiting(&held), MOST_WAITING);
    let state = Arc::clone(&guard.0.as_ref().unwrap().state);
    assert_eq!(state.lined_up.lock().len(), MOST_WAITING);
    drop(held);
    assert_eq!((state.lined_up.lock().len(), state.waiting.load(Ordering::Relaxed)), (0, 0));
}

#[test]
fn requests_with_one_token_have_one_turn() {
    let guard = guard();
    overspend(&guard, "192.0.2.1", 1_000);
    let turn = |token: &Digest, now| match guard.turn(client("192.0.2.1"), token, at(now)) {
        GuessVerdict::Turn(turn) => Some(turn),
        _ => None,
    };
    let (one, other) = (any(), any());
    let first = turn(&any(), 1_000).unwrap();
    let same: Vec<_> = (0..60).filter_map(|_| turn(&one, 1_000)).collect();
    assert_eq!(same.len(), 60);
    assert!(same.iter().all(|turn| turn.wait.as_millis() == 100));
    // Others of the address wait behind one of them, not behind sixty.
    assert_eq!(turn(&other, 1_000).unwrap().wait.as_millis(), 200);
    assert_eq!(turn(&one, 1_050).unwrap().wait.as_millis(), 50);
    // Of another address it has another one.
    overspend(&guard, "192.0.2.2", 1_000);
    let elsewhere = guard.turn(client("192.0.2.2"), &one, at(1_000));
    assert!(matches!(elsewhere, GuessVerdict::Turn(turn) if turn.wait.is_zero()));
    // Once it has come, the next request waits for a new one.
    assert!(turn(&one, 1_100).unwrap().wait.as_millis() >= 100);
    drop((first, same));
}

#[test]
fn the_turn_of_who_has_gone_is_somebody_elses() {
    let guard = guard();
    overspend(&guard, "192.0.2.1", 1_000);
    let turn = |now| match guard.turn(client("192.0.2.1"), &any(), at(now)) {
        GuessVerdict::Turn(turn) => Some(turn),
        _ => None,
    };
    // Thirty a second for ten seconds who do not stay, and one each second who does.
    let mut longest = 0;
    for step in 0..300 {
        let now = 1_000 + step * 33;
        drop(turn(now));
        if step % 30 == 0 {
            let mut patient = turn(now).unwrap();
            longest = longest.max(patient.wait.as_millis());
            patient.has_come();
        }
    }
    assert!(longest <= 100, "{longest} ms");
    // What has come is used, whoever goes then: ten a second and no more.
    let looked_up = (0..1_000).filter(|step| {
        turn(20_000 + step).is_some_and(|mut turn| {
            turn.wait.is_zero() && {
                turn.has_come();
                true
            }
        })
    });
    let looked_up = looked_up.count();
    assert!((9..=11).contains(&looked_up), "{looked_up}");
}

#[test]
fn pauses_grow_up_to_a_bound_and_an_episode_ends_once() {
    let guard = guard();
    overspend(&guard, "192.0.2.1", 0);
    let (mut now, mut pauses) = (0, Vec::new());
    for round in 0..4 {
        let left = guard.episodes(at(now))[0].retry_after;
        pauses.push(left);
        now += left * 1_000;
        assert!(matches!(guard.turn(client("192.0.2.1"), &any(), at(now)), GuessVerdict::Free), "the pause is over");
        assert_eq!(guard.ended(at(now - 1)), []);
        // What flowed in meanwhile is used up again.
        (0..11).for_each(|token| {
            assert_eq!(fail(&guard, "192.0.2.1", (round + 1) << 32 | token, now), GuessCount::Counted)
        });
    }
    assert_eq!(pauses, [20, 40, 50, 50]);
    let end = now + 50_000;
    assert_eq!((guard.ended(at(end - 1)).len(), guard.active()), (0, 1));
    let ended = guard.ended(at(end));
    assert_eq!((ended.len(), ended[0].failures, ended[0].pauses), (1, 5, 5));
    assert_eq!((guard.ended(at(end)).len(), guard.active()), (0, 0));
    // It begins anew, with the first pause.
    overspend(&guard, "192.0.2.1", end + 1);
    assert_eq!(guard.episodes(at(end + 1))[0].retry_after, 20);
}

#[test]
fn a_token_that_fails_again_and_again_counts_once_a_minute() {
    let guard = guard();
    let counted = |token: u64, why: Invalid, from: u64, until: u64| {
        let counts = |now: u64| guard.failed(client("192.0.2.1"), &Digest::of(&token.to_be_bytes()), why, at(now));
        (from..until).step_by(10).filter(|now| counts(*now) != GuessCount::Not).count()
    };
    // From a program with an old token, a hundred times a second, for three minutes.
    assert_eq!(counted(1, Invalid::Unknown, 60_000, 240_000), 3);
    assert_eq!(counted(1, Invalid::Revoked, 240_000, 420_000), 3);
    // However many such tokens there are.
    let many =
        (0..1_000).map(|token| counted(token, Invalid::Expired, 480_000 + token, 480_001 + token)).sum::<usize>();
    assert_eq!(many, 1);
    assert_eq!(guard.active(), 0);
}

#[test]
fn an_address_is_an_ipv4_address_or_an_ipv6_network() {
    let guard = guard();
    for token in 0..11 {
        fail(&guard, &format!("2001:db8:0:1::{token:x}"), token, 0);
    }
    let limited = |from: &str| !matches!(guard.turn(client(from), &any(), at(0)), GuessVerdict::Free);
    assert!(limited("2001:db8:0:1:ffff::1") && !limited("2001:db8:0:2::1") && !limited("192.0.2.1"));
    assert_eq!(GuessEpisode::name(&guard.episodes(at(0))[0].network), "2001:db8:0:1::/64");
    overspend(&guard, "192.0.2.1", 1);
    assert!(limited("192.0.2.1") && !limited("192.0.2.0"));
    // Those who are allowed are not counted, nor are peers without an address.
    for token in 0..100 {
        assert_eq!(fail(&guard, "10.9.1.1", token, 0), GuessCount::Not);
        assert_eq!(guard.failed(None, &Digest::of(b"t"), Invalid::Unknown, at(0)), GuessCount::Not);
    }
    assert!(!limited("10.9.1.1"));
}

#[test]
fn lifting_forgets_one_address_or_all() {
    let guard = guard();
    for from in ["192.0.2.1", "192.0.2.2", "192.0.2.3"] {
        overspend(&guard, from, 0);
    }
    assert_eq!(guard.lift(client("192.0.2.9"), at(1)), []);
    assert_eq!((guard.lift(client("192.0.2.2"), at(1)).len(), guard.active()), (1, 2));
    assert!(matches!(guard.turn(client("192.0.2.2"), &any(), at(1)), GuessVerdict::Free));
    overspend(&guard, "192.0.2.2", 2);
    assert_eq!((guard.lift(None, at(3)).len(), guard.active(), guard.episodes(at(3)).len()), (3, 0, 0));
}

#[test]
fn a_reload_keeps_what_is_known_unless_it_means_something_else() {
    let first = guard();
    overspend(&first, "192.0.2.1", 0);
    let said = |settings: Option<&GuessSettings>, before: &GuessGuard| {
        GuessGuard::new(settings, Some(before), || 7).forgets(before)
    };
    let limited = |guard: &GuessGuard| !matches!(guard.turn(client("192.0.2.1"), &any(), at(0)), GuessVerdict::Free);
    let other = GuessSettings { failures: 11, ..settings() };
    assert_eq!((said(Some(&settings()), &first), said(Some(&other), &first), said(None, &first)), (0, 1, 1));
    let same = next(&GuessSettings { lookups: 5, ..settings() }, Some(&first));
    assert!(limited(&same));
    let allowed = AddressList { networks: vec!["192.0.2.0/24".parse().unwrap()], unix_peers: false };
    assert!(!limited(&next(&GuessSettings { allow: allowed, ..settings() }, Some(&same))));
    assert!(!limited(&next(&GuessSettings { failures: 11, ..settings() }, Some(&same))));
    assert!(!limited(&GuessGuard::new(None, Some(&same), || 0)));
}

#[test]
fn who_fills_the_table_makes_nobody_pay_for_it() {
    let guard = guard();
    let of = |number: u32| IpAddr::from(std::net::Ipv4Addr::from_bits(0x0b00_0000 + number));
    let fails = |number: u32, token: u64| {
        guard.failed(Some(of(number)), &Digest::of(&token.to_be_bytes()), Invalid::Unknown, at(0))
    };
    let untracked = (0..80_000).filter(|number| fails(*number, 1) == GuessCount::Untracked).count();
    assert!((14_000..20_000).contains(&untracked), "{untracked}");
    let newcomer = (80_000..).find(|number| fails(*number, 1) == GuessCount::Untracked).unwrap();
    assert!((0..100).all(|token| fails(newcomer, token) == GuessCount::Untracked));
    assert!(matches!(guard.turn(Some(of(newcomer)), &any(), at(0)), GuessVerdict::Free));
}
