//! Properties of the bounds and of the queue, over generated pools: seeded, so that a failure can be repeated.

use super::pool_tests::{Random, balances, begun, build, go_down, keyed, place, weighted};
use super::tests::REFUSED;
use super::*;
use std::sync::atomic::AtomicBool;
use std::task::Wake;
use std::thread::Thread;

/// Whether a request was woken. A new one has to look once.
#[derive(Default)]
pub(super) struct Woken(pub(super) AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

pub(super) struct Waiter {
    pub(super) number: u32,
    pub(super) tries: Tries,
    pub(super) woken: Arc<Woken>,
}

fn bounded(weights: &[u32], balance: Balance, most: u32, queue: usize) -> UpstreamSettings {
    UpstreamSettings { max_requests: Some(MaxRequests::Fixed(most)), queue, ..weighted(weights, balance) }
}

/// Polls those that were woken, until none is. Gives those that have a server now.
fn settle(pool: &Upstream, waiting: &mut Vec<Waiter>, now: Instant) -> Vec<(u32, Tries)> {
    let mut served = Vec::new();
    while let Some(index) = waiting.iter().position(|waiter| waiter.woken.0.swap(false, Ordering::SeqCst)) {
        let waker = Waker::from(Arc::clone(&waiting[index].woken));
        match pool.poll_pick(&mut waiting[index].tries, &waker, now) {
            Poll::Pending => {}
            Poll::Ready(picked) => {
                picked.unwrap();
                let waiter = waiting.remove(index);
                served.push((waiter.number, waiter.tries));
            }
        }
    }
    served
}

/// Requests come, end, fail and give up, servers go down and come back: nobody waits while a server has room for it, who came
/// first is served first, and no server has more than it may.
#[test]
fn nobody_waits_for_nothing_and_nobody_overtakes() {
    let (mut now, mut random) = (Instant::now(), Random::with_seed(11));
    for case in 0..150 {
        let weights: Vec<u32> = (0..random.usize(1..5)).map(|_| random.u32(1..3)).collect();
        let most = random.u32(1..4);
        let balance = balances()[random.usize(0..3)].clone();
        let pool = build(&bounded(&weights, balance, most, 20), now);
        let (mut running, mut waiting): (Vec<(u32, Tries)>, Vec<Waiter>) = Default::default();
        let mut last_served = 0;
        for number in 1..400 {
            now += Duration::from_millis(10);
            match random.u8(0..20) {
                0..8 => {
                    let mut tries = keyed(&pool, random.bool().then(|| random.u64(0..3)));
                    match pool.pick(&mut tries, now) {
                        Ok(_) => {
                            assert!(waiting.is_empty(), "case {case}: {number} overtakes {}", waiting.len());
                            running.push((number, tries));
                        }
                        Err(NoServer::Busy) => {
                            let woken = Arc::new(Woken::default());
                            match pool.poll_pick(&mut tries, &Waker::from(Arc::clone(&woken)), now) {
                                Poll::Pending => waiting.push(Waiter { number, tries, woken }),
                                Poll::Ready(Err(NoServer::QueueFull)) => assert_eq!(waiting.len(), 20, "case {case}"),
                                Poll::Ready(_) => panic!("case {case}: {number} was not busy"),
                            }
                        }
                        Err(why) => panic!("{why:?}"),
                    }
                }
                8..14 if !running.is_empty() => {
                    let (_, mut tries) = running.swap_remove(random.usize(0..running.len()));
                    match random.u8(0..3) {
                        0 => drop(pool.answered(&mut tries, 200, now)),
                        1 => tries.given_up(now),
                        _ => {}
                    }
                }
                14..17 if !waiting.is_empty() => drop(waiting.remove(random.usize(0..waiting.len()))),
                17 => {
                    let place = random.usize(0..weights.len());
                    if pool.members()[place].server.is_up() {
                        go_down(&pool, place, now);
                    }
                }
                18 => {
                    for member in pool.members() {
                        pool.seen(&member.server, Ok(()), now);
                    }
                }
                _ => {}
            }
            // Between a wake and what comes of it, others may come.
            if random.bool() {
                continue;
            }
            for (served, tries) in settle(&pool, &mut waiting, now) {
                assert!(served > last_served, "case {case}: {served} after {last_served}");
                last_served = served;
                running.push((served, tries));
            }
            let members = pool.members();
            assert!(members.iter().all(|member| member.server.in_flight() <= most), "case {case}");
            let in_flight: u32 = members.iter().map(|member| member.server.in_flight()).sum();
            assert_eq!((in_flight as usize, pool.queue.waiting()), (running.len(), waiting.len()), "case {case}");
            let up = members.iter().any(|member| member.server.is_up());
            let has_room = |member: &Member| member.server.in_flight() < most && (member.server.is_up() || !up);
            assert!(waiting.is_empty() || !members.iter().any(has_room), "case {case}: {} wait", waiting.len());
        }
    }
}

/// A request that was failed by the one server with room does not keep it from those behind.
#[test]
fn what_the_first_one_cannot_use_is_for_the_next() {
    let now = Instant::now();
    let pool = build(&bounded(&[1, 1], Balance::RoundRobin, 1, 10), now);
    let (_, mut first) = begun(&pool, None, now);
    let (_, second) = begun(&pool, None, now);
    let closed = FailedTry::Exchange { kept: false, error: UpstreamError::Closed };
    let mut waiting = Vec::new();
    let mut join = |tries| waiting.push(Waiter { number: 0, tries, woken: Arc::new(Woken(true.into())) });
    let mut behind = Tries::default();
    assert!(matches!(pool.pick(&mut behind, now), Err(NoServer::Busy)));
    assert!(pool.failed(&mut first, closed, true, now).again);
    // The first server has room now, and this request must not go there again.
    assert!(matches!(pool.pick(&mut first, now), Err(NoServer::Busy)));
    join(first);
    join(behind);
    assert_eq!(settle(&pool, &mut waiting, now).len(), 1);
    drop(second);
    let (_, tries) = settle(&pool, &mut waiting, now).pop().unwrap();
    assert_eq!((tries.count(), tries.last().map(place)), (2, Some(1)));
}

/// The same for those that have looked before and sleep: room that the first one has no use for wakes the next.
#[test]
fn room_that_the_first_one_cannot_use_wakes_the_next() {
    let now = Instant::now();
    let pool = build(&bounded(&[1, 1], Balance::RoundRobin, 1, 10), now);
    let (failing, mut first) = begun(&pool, None, now);
    let (_, _second) = begun(&pool, None, now);
    let closed = FailedTry::Exchange { kept: false, error: UpstreamError::Closed };
    assert!(pool.failed(&mut first, closed, true, now).again);
    // Somebody is quicker at the server that failed it.
    let (taken, third) = begun(&pool, None, now);
    assert_eq!(taken, failing);
    let mut waiting: Vec<Waiter> = [first, Tries::default()]
        .into_iter()
        .zip(1..)
        .map(|(tries, number)| Waiter { number, tries, woken: Arc::new(Woken(true.into())) })
        .collect();
    for waiter in &mut waiting {
        assert!(matches!(pool.pick(&mut waiter.tries, now), Err(NoServer::Busy)));
    }
    assert!(settle(&pool, &mut waiting, now).is_empty());
    drop(third);
    assert_eq!(settle(&pool, &mut waiting, now).iter().map(|(number, _)| *number).collect::<Vec<_>>(), [2]);
}

/// Many who come at once for the last place, over and over: one of them gets it.
#[test]
fn threads_never_get_more_of_a_server_than_it_may_have() {
    let now = Instant::now();
    let pool = build(&bounded(&[1], Balance::RoundRobin, 1, 0), now);
    let (inside, got) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..30_000 {
                    let mut tries = Tries::default();
                    if pool.pick(&mut tries, now).is_ok() {
                        let others = inside.fetch_add(1, Ordering::SeqCst);
                        got.fetch_add(1, Ordering::SeqCst);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        assert_eq!(others, 0, "at a server that may have one request");
                    }
                }
            });
        }
    });
    assert!(got.into_inner() > 10_000);
    assert_eq!(pool.members()[0].server.in_flight(), 0);
}

/// Backups are for servers that are down, not for those that are busy.
#[test]
fn what_is_too_much_does_not_go_to_backups_or_servers_that_are_down() {
    let now = Instant::now();
    let pool = build(&bounded(&[1, 1, 0], Balance::RoundRobin, 1, 10), now);
    go_down(&pool, 0, now);
    let (_, held) = begun(&pool, None, now);
    assert!(matches!(pool.pick(&mut Tries::default(), now), Err(NoServer::Busy)));
    drop(held);
    go_down(&pool, 1, now);
    let (spare, _held) = begun(&pool, None, now);
    assert_eq!(spare, 2);
    assert!(matches!(pool.pick(&mut Tries::default(), now), Err(NoServer::Busy)));
    // Refused by all: there is nothing to wait for.
    let (mut tries, pool) = (Tries::default(), build(&bounded(&[1, 1], Balance::RoundRobin, 1, 10), now));
    for _ in 0..2 {
        pool.pick(&mut tries, now).unwrap();
        pool.failed(&mut tries, REFUSED, false, now);
    }
    assert!(matches!(pool.pick(&mut tries, now), Err(NoServer::Absent)));
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// The same between threads: a waiter that is lost would make this end by its deadline.
#[test]
fn no_waiter_is_lost_between_threads() {
    const THREADS: usize = 8;
    const EACH: usize = 3_000;
    let start = Instant::now();
    let deadline = start + Duration::from_secs(30);
    let pool = build(&bounded(&[1, 2], Balance::RoundRobin, 1, THREADS), start);
    let served: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS as u64)
            .map(|seed| {
                let pool = &pool;
                scope.spawn(move || {
                    let mut random = Random::with_seed(seed);
                    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
                    let mut served = 0;
                    for _ in 0..EACH {
                        let mut tries = Tries::default();
                        // Some ask more than others, so that they overtake.
                        tries.called_by(random.u64(0..seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15), 1);
                        let mut picked = pool.pick(&mut tries, start);
                        while let Err(NoServer::Busy) = picked {
                            match pool.poll_pick(&mut tries, &waker, start) {
                                Poll::Ready(ready) => picked = ready,
                                Poll::Pending if random.u8(..) < 20 => break,
                                Poll::Pending => {
                                    let left = deadline.saturating_duration_since(Instant::now());
                                    assert!(!left.is_zero(), "a request waits for ever");
                                    std::thread::park_timeout(left);
                                }
                            }
                        }
                        assert!(pool.members().iter().all(|member| member.server.in_flight() <= 1));
                        served += usize::from(picked.is_ok());
                        if picked.is_ok() && random.bool() {
                            std::thread::yield_now();
                        }
                    }
                    served
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert!(served > THREADS * EACH / 2, "{served} were served");
    assert_eq!(pool.queue.waiting(), 0);
    assert!(pool.members().iter().all(|member| member.server.in_flight() == 0));
}

/// The same while tries fail, clients go away, servers are drained, go down and come back: nobody is lost, and no server ever has
/// more than it may.
#[test]
fn no_waiter_is_lost_while_servers_come_and_go() {
    const THREADS: usize = 6;
    const EACH: usize = 250;
    let mut sums = [0; 3];
    for seed in 0..24 {
        let mut random = Random::with_seed(seed);
        let start = Instant::now();
        let deadline = start + Duration::from_secs(30);
        let weights: Vec<u32> = (0..random.usize(1..4)).map(|_| random.u32(1..3)).collect();
        let most = random.u32(1..3);
        let balance = balances()[random.usize(0..3)].clone();
        let pool = build(&bounded(&weights, balance, most, random.usize(2..=THREADS)), start);
        let over = AtomicBool::new(false);
        let counted: Vec<[usize; 3]> = std::thread::scope(|scope| {
            let (pool, over) = (&pool, &over);
            let unrest = scope.spawn(move || {
                let mut random = Random::with_seed(seed + 1_000);
                while !over.load(Ordering::SeqCst) {
                    let members = pool.members();
                    let server = &members[random.usize(0..members.len())].server;
                    assert!(server.in_flight() <= most, "seed {seed}: {} at once", server.in_flight());
                    match random.u8(0..4) {
                        0 => drop(pool.drain(server.label(), random.bool(), start)),
                        1 => drop(pool.seen(server, Ok(()), start)),
                        _ => (0..random.u16(0..2_000)).for_each(|_| std::hint::spin_loop()),
                    }
                }
                // All that were taken away are back: what waits still must be served by them.
                for member in pool.members() {
                    pool.drain(member.server.label(), false, start);
                    pool.seen(&member.server, Ok(()), start);
                }
            });
            let requests: Vec<_> = (0..THREADS as u64)
                .map(|thread| {
                    scope.spawn(move || {
                        let mut random = Random::with_seed(seed * 100 + thread);
                        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
                        let [mut served, mut waited, mut left] = [0; 3];
                        for _ in 0..EACH {
                            let mut tries = keyed(pool, Some(random.u64(0..9)));
                            tries.called_by(random.u64(..), 1);
                            'tries: loop {
                                let mut picked = pool.pick(&mut tries, start);
                                while let Err(NoServer::Busy) = picked {
                                    match pool.poll_pick(&mut tries, &waker, start) {
                                        Poll::Ready(ready) => picked = ready,
                                        Poll::Pending if random.u8(..) < 12 => {
                                            left += 1;
                                            break 'tries;
                                        }
                                        Poll::Pending => {
                                            waited += 1;
                                            let left = deadline.saturating_duration_since(Instant::now());
                                            assert!(!left.is_zero(), "seed {seed}: a request waits for ever");
                                            std::thread::park_timeout(left);
                                        }
                                    }
                                }
                                if picked.is_err() {
                                    break;
                                }
                                std::thread::yield_now();
                                let closed = FailedTry::Exchange { kept: random.bool(), error: UpstreamError::Closed };
                                match random.u8(0..12) {
                                    0 if pool.failed(&mut tries, REFUSED, true, start).again => continue,
                                    1 if pool.failed(&mut tries, closed, true, start).again => continue,
                                    2 => tries.given_up(start),
                                    _ => drop(pool.answered(&mut tries, 200, start)),
                                }
                                served += 1;
                                break;
                            }
                        }
                        [served, waited, left]
                    })
                })
                .collect();
            let counted = requests.into_iter().map(|thread| thread.join()).collect::<Vec<_>>();
            over.store(true, Ordering::SeqCst);
            unrest.join().unwrap();
            counted.into_iter().map(Result::unwrap).collect()
        });
        counted.iter().flat_map(|counted| counted.iter().enumerate()).for_each(|(place, more)| sums[place] += more);
        assert_eq!(pool.queue.waiting(), 0, "seed {seed}");
        assert!(pool.members().iter().all(|member| member.server.in_flight() == 0), "seed {seed}");
    }
    assert!(sums.iter().all(|sum| *sum > 100), "served, waited, left: {sums:?}");
}

/// What became of the requests of those who ask little, and of the one who asks fifty times as much.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outcome {
    /// In milliseconds, of 99 in 100 of the others' requests, with the time at the server.
    p99: u64,
    served: usize,
    refused: usize,
    busy_refused: usize,
}

/// Ten seconds at a server that has room for 4 requests of 5 to 15 ms each: 20 callers with 5 requests a second, and one with so
/// many more.
fn crowd(order: QueueOrder, busy_each_second: u64) -> Outcome {
    let (start, mut random) = (Instant::now(), Random::with_seed(3));
    let pool = build(&UpstreamSettings { queue_order: order, ..bounded(&[1], Balance::RoundRobin, 4, 20) }, start);
    let (mut running, mut waiting) = (Vec::<(u64, Tries)>::new(), Vec::<(u64, Waiter)>::new());
    let (mut outcome, mut times) = (Outcome::default(), Vec::new());
    let spread = |caller: u64| caller.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for tick in 0..10_000u64 {
        let now = start + Duration::from_millis(tick);
        running.retain(|(ends, _)| tick < *ends);
        let busy = busy_each_second * (tick + 1) / 1_000 - busy_each_second * tick / 1_000;
        let others = (1..=20).filter(|caller| (tick + u64::from(*caller) * 7).is_multiple_of(200));
        // The busy one comes first, which is the worst for the others.
        let arrive: Vec<u32> = std::iter::repeat_n(0, busy as usize).chain(others).collect();
        for caller in arrive {
            let takes = random.u64(5..=15);
            let mut tries = Tries::default();
            tries.called_by(spread(caller.into()), 1);
            match pool.pick(&mut tries, now) {
                Ok(_) => {
                    if caller > 0 {
                        outcome.served += 1;
                        times.push(takes);
                    }
                    running.push((tick + takes, tries));
                }
                Err(NoServer::Busy) => {
                    let woken = Arc::new(Woken(AtomicBool::new(true)));
                    waiting.push((tick, Waiter { number: caller, tries, woken }));
                }
                Err(other) => panic!("{other:?}"),
            }
        }
        while let Some(index) = waiting.iter().position(|(_, waiter)| waiter.woken.0.swap(false, Ordering::SeqCst)) {
            let (since, waiter) = &mut waiting[index];
            let (since, waker) = (*since, Waker::from(Arc::clone(&waiter.woken)));
            match pool.poll_pick(&mut waiter.tries, &waker, now) {
                Poll::Pending => {}
                Poll::Ready(Ok(_)) => {
                    let ((_, waiter), takes) = (waiting.remove(index), random.u64(5..=15));
                    if waiter.number > 0 {
                        outcome.served += 1;
                        times.push(tick - since + takes);
                    }
                    running.push((tick + takes, waiter.tries));
                }
                Poll::Ready(Err(why)) => {
                    assert_eq!(why, NoServer::QueueFull);
                    let (_, waiter) = waiting.remove(index);
                    *(if waiter.number > 0 { &mut outcome.refused } else { &mut outcome.busy_refused }) += 1;
                }
            }
        }
    }
    times.sort_unstable();
    outcome.p99 = times[times.len() * 99 / 100];
    outcome
}

#[test]
fn one_caller_who_asks_fifty_times_as_much_costs_the_others_next_to_nothing() {
    let alone = crowd(QueueOrder::Fair, 0);
    // 350 requests a second where 400 fit, and 1,100 and 3,100.
    for busy_each_second in [250, 1_000, 3_000] {
        let fair = crowd(QueueOrder::Fair, busy_each_second);
        assert!(2 * fair.p99 <= 3 * alone.p99 && fair.refused == 0 && fair.served >= 995, "{alone:?} {fair:?}");
        let before = crowd(QueueOrder::Arrival, busy_each_second);
        if busy_each_second > 250 {
            assert!(fair.busy_refused > 5_000, "{fair:?}");
            assert!(before.refused > 300 && before.p99 > 40, "in order of arrival: {before:?}");
        }
    }
}
