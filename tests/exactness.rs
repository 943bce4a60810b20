//! A limit against what gets through, with 32 kept connections that send as fast as they can, for 1 to 4 workers. Prints a table.
//!
//! TOLLGATE_EXACTNESS_SECONDS (1) makes it longer.

use crate::harness::*;
use crate::support::get;
use std::time::{Duration, Instant};

const CONNECTIONS: usize = 32;
const RATE: u64 = 500;
const BURST: u64 = 50;

/// What the clients saw together.
#[derive(Default)]
struct Outcome {
    passed: u64,
    refused: u64,
}

/// Sends until a time, on one connection.
fn ask(gateway: &Gateway, until: Instant) -> Outcome {
    let mut client = gateway.client();
    let mut outcome = Outcome::default();
    while Instant::now() < until {
        client.send_head(&get(GOOD, "/api/v3/projects"));
        match client.answer().status {
            200 => outcome.passed += 1,
            429 => outcome.refused += 1,
            status => panic!("{status}"),
        }
    }
    outcome
}

#[test]
fn as_much_gets_through_as_is_allowed() {
    let seconds = std::env::var("TOLLGATE_EXACTNESS_SECONDS").map_or(1, |text| text.parse().unwrap());
    println!("| workers | requests | due | got through | difference |\n|---|---|---|---|---|");
    for workers in 1..=4 {
        let upstream = Upstream::start();
        let gateway = Gateway::start(
            upstream.address,
            &format!(
                "[server]\nlisten = [\"@LISTEN@\"]\nthreads = {workers}\n[log]\naccess = \"off\"\n\
                 [[limit]]\nname = \"l\"\nrate = \"{RATE}/s\"\nburst = {BURST}\n"
            ),
        );
        let begun = Instant::now();
        let until = begun + Duration::from_secs(seconds);
        let all = std::thread::scope(|scope| {
            let clients: Vec<_> = (0..CONNECTIONS).map(|_| scope.spawn(|| ask(&gateway, until))).collect();
            let add = |sum: Outcome, one: Outcome| Outcome {
                passed: sum.passed + one.passed,
                refused: sum.refused + one.refused,
            };
            clients.into_iter().map(|client| client.join().unwrap()).fold(Outcome::default(), add)
        });
        // From before the first request to behind the last answer: a little more than what the gateway saw.
        let due = BURST as f64 + RATE as f64 * begun.elapsed().as_secs_f64();
        let passed = all.passed as f64;
        println!(
            "| {workers} | {} | {due:.1} | {passed} | {:+.2} % |",
            all.passed + all.refused,
            100.0 * (passed - due) / due
        );
        assert!(passed <= due, "{passed} of {due}");
        assert!(all.refused > 0, "the clients were too slow to reach the limit");
        // What is missing is due while no request was on its way: at the beginning and at the end.
        assert!(passed >= 0.9 * due, "{passed} of {due}: requests that were due were refused");
        assert_eq!(upstream.seen().len() as u64, all.passed);
    }
}
