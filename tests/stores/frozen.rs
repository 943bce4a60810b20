//! A gateway that was suspended, by SIGSTOP or on a paused machine: when it continues, with requests waiting in its sockets,
//! it must not use cache entries from before.

use super::{BOUND, Backing, Caller, PostgresOwn, RedisOwn, all, setting};
use crate::harness::*;
use crate::servers::Fault;
use crate::servers::delay::DelayLine;
use crate::support::get;
use std::time::{Duration, Instant};

/// Longer than cached answers are used after the last successful probe.
const STANDSTILL: Duration = Duration::from_millis(1_500);
const CLIENTS: usize = 8;

/// At a moment when it keeps no other writer out.
fn stop(gateway: &Gateway, store: &dyn Backing) {
    eventually("it stands still between two writes", || {
        gateway.signal("STOP");
        let is_between = store.takes_writes();
        if !is_between {
            gateway.signal("CONT");
        }
        is_between
    });
}

fn wakes_with_care(make: fn() -> Box<dyn Backing>) {
    let mut store = make();
    let rounds = ["quiet", "cut"];
    let doomed: Vec<String> =
        rounds.iter().flat_map(|round| (0..CLIENTS).map(move |number| format!("doomed-{round}-{number}"))).collect();
    store.add(&doomed);
    store.add(&["steady".into()]);
    let upstream = Upstream::start();
    let more = format!(
        "{}[server]\nlisten = [\"@LISTEN@\"]\nthreads = 4\n[cache]\npositive_ttl = \"10m\"\n[log]\naccess = \"off\"\n",
        store.section()
    );
    let gateway = Gateway::start(upstream.address, &more);
    eventually("the store is followed", || gateway.process_log().contains("change notifications are arriving"));
    for (round, doomed) in rounds.iter().zip(doomed.chunks(CLIENTS)) {
        let mut clients: Vec<Client> = (0..CLIENTS).map(|_| Client::connect(gateway.address)).collect();
        for (client, token) in clients.iter_mut().zip(doomed) {
            client.send_head(&get(token, "/api/v3/user"));
            assert_eq!(client.answer().status, 200, "{}: {token}", store.name());
        }
        assert_eq!(Caller::of(&gateway).status("steady"), 200);
        stop(&gateway, &*store);
        for token in doomed {
            store.revoke(token);
        }
        if *round == "cut" {
            // The subscription is lost, and not detected yet.
            store.inject(Fault::Cut);
        }
        std::thread::sleep(STANDSTILL);
        for (client, token) in clients.iter_mut().zip(doomed) {
            client.send_head(&get(token, "/api/v3/user"));
        }
        let mut other = Client::connect(gateway.address);
        other.send_head(&get("steady", "/api/v3/user"));
        gateway.signal("CONT");
        let statuses: Vec<u16> = clients.iter_mut().map(|client| client.answer().status).collect();
        assert_eq!(statuses, [401; CLIENTS], "{}, {round}: the first responses after continuing", store.name());
        assert_eq!(other.answer().status, 200, "{}, {round}", store.name());
    }
}

#[test]
fn a_gateway_that_stood_still_wakes_with_care() {
    let stores: Vec<_> = all().into_iter().filter(|make| make().hears()).collect();
    assert_eq!(stores.len(), 5);
    std::thread::scope(|scope| {
        for make in stores {
            scope.spawn(move || wakes_with_care(make));
        }
    });
}

/// A standstill that is shorter than the bound, and long enough that a server which answers in time seems silent: what it sent
/// meanwhile is read before anything is made of the silence.
fn wakes_in_time(mut store: Box<dyn Backing>) {
    let tokens: Vec<String> =
        (0..setting("TOLLGATE_STANDSTILLS", 5)).map(|number| format!("doomed-{number}")).collect();
    store.add(&tokens);
    let upstream = Upstream::start();
    // So far away that answers are under way when the gateway stops.
    let (_line, section) = DelayLine::before(&store.section(), Duration::from_millis(100));
    let more = format!("{section}[cache]\npositive_ttl = \"10m\"\n[log]\naccess = \"off\"\n");
    let gateway = Gateway::start(upstream.address, &more);
    eventually("the store is followed", || gateway.process_log().contains("change notifications are arriving"));
    let mut lags = Vec::new();
    for token in &tokens {
        let mut caller = Caller::of(&gateway);
        eventually("it is known", || caller.status(token) == 200);
        // At any moment between two probes.
        std::thread::sleep(Duration::from_millis(fastrand::u64(0..500)));
        gateway.signal("STOP");
        store.revoke(token);
        let (revoked, mut last) = (Instant::now(), Duration::ZERO);
        std::thread::sleep(Duration::from_millis(700));
        gateway.signal("CONT");
        while caller.status(token) == 200 {
            last = revoked.elapsed();
            assert!(last < PATIENCE, "{token} still works");
        }
        lags.push(last);
    }
    lags.sort();
    let worst = lags.last().copied().unwrap_or_default();
    println!("| {} | {} standstills of 700 ms | worst {worst:.0?} |", store.name(), lags.len());
    assert!(worst < BOUND, "{}: {lags:?}", store.name());
}

#[test]
fn a_gateway_that_stood_still_for_a_moment_wakes_in_time_on_postgres() {
    wakes_in_time(Box::new(PostgresOwn::new()));
}

#[test]
fn a_gateway_that_stood_still_for_a_moment_wakes_in_time_on_redis() {
    wakes_in_time(Box::new(RedisOwn::new()));
}
