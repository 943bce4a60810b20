//! The short form of the load test: many persistent connections, a hundred thousand valid tokens, a fifth of the requests
//! with unknown ones, and then a flood of unknown tokens. Every response is compared with its request.
//!
//! TOLLGATE_LOAD_SECONDS (5) and TOLLGATE_FLOOD (50,000 distinct bad tokens) make it longer.

use crate::harness::*;
use crate::support::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const CONNECTIONS: usize = 64;
const TOKENS: usize = 100_000;
const MIB: u64 = 1024 * 1024;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

fn token(index: usize) -> String {
    format!("load-token-{index:06}")
}

/// Returns the token and the user that it got, so that a response to another request is detected.
fn echo() -> Upstream {
    Upstream::answering(|seen| {
        let digest = sha256_hex(seen.header("PRIVATE-TOKEN").unwrap_or_default());
        Reply::ok(&format!("{{\"digest\":\"{digest}\",\"target\":\"{}\"}}", seen.target))
    })
}

/// One connection's client.
struct Caller {
    client: Client,
    sent: usize,
    lane: usize,
}

impl Caller {
    /// Sends a request with this token and returns whether the response is right and its own.
    fn ask(&mut self, token: &str, good: bool) -> Result<(), String> {
        self.sent += 1;
        let target = format!("/api/v3/load/{}/{}", self.lane, self.sent);
        self.client.send_head(&get(token, &target));
        let answer = self.client.try_answer().ok_or("the connection was closed")?;
        let expected = match good {
            true => (200, format!("{{\"digest\":\"{}\",\"target\":\"{target}\"}}", sha256_hex(token))),
            false => (401, "{\"message\":\"401 Unauthorized\"}".to_owned()),
        };
        let got = (answer.status, answer.text());
        if got == expected && !answer.cut { Ok(()) } else { Err(format!("{target} with {token}: {got:?}")) }
    }
}

/// Runs the work on each connection repeatedly until it returns that there is no more. Returns the errors, and calls
/// `meanwhile` from time to time.
fn on_all_connections(
    gateway: &Gateway,
    work: impl Fn(&mut Caller) -> Option<Result<(), String>> + Send + Sync + 'static,
    mut meanwhile: impl FnMut(),
) -> (usize, Vec<String>) {
    let (work, running) = (Arc::new(work), Arc::new(AtomicUsize::new(CONNECTIONS)));
    let address = gateway.address;
    let workers: Vec<_> = (0..CONNECTIONS)
        .map(|lane| {
            let (work, running) = (Arc::clone(&work), Arc::clone(&running));
            std::thread::spawn(move || {
                let mut caller = Caller { client: Client::connect(address), sent: 0, lane };
                let mut wrong = Vec::new();
                while wrong.len() < 5
                    && let Some(result) = work(&mut caller)
                {
                    wrong.extend(result.err());
                }
                running.fetch_sub(1, Ordering::SeqCst);
                (caller.sent, wrong)
            })
        })
        .collect();
    while running.load(Ordering::SeqCst) > 0 && !workers.iter().all(std::thread::JoinHandle::is_finished) {
        meanwhile();
        std::thread::sleep(Duration::from_millis(50));
    }
    let (mut sent, mut wrong) = (0, Vec::new());
    for worker in workers {
        let (count, more) = worker.join().expect("a connection failed");
        sent += count;
        wrong.extend(more);
    }
    (sent, wrong)
}

fn lookups(gateway: &Gateway, result: &str) -> f64 {
    gateway.metric(&format!("tollgate_cache_lookups_total{{result=\"{result}\"}}"))
}

fn mean(values: &[u64]) -> u64 {
    values.iter().sum::<u64>() / values.len().max(1) as u64
}

#[test]
fn load_and_flood_leave_every_answer_right_and_memory_flat() {
    let upstream = echo();
    let lines: String =
        (0..TOKENS).map(|n| format!("{{\"sha256\":\"{}\",\"user\":\"u{n}\"}}\n", sha256_hex(&token(n)))).collect();
    let store = Store::imported(&lines);
    drop(lines);
    // A negative cache much smaller than the flood, and a positive one for all valid tokens.
    let cache = "[cache]\npositive_ttl = \"1h\"\nnegative_ttl = \"1h\"\nnegative_capacity = 10000\n";
    let gateway = Gateway::start(upstream.address, &(store.section() + cache));

    // ---- Every valid token once: each gets its own record, and the cache reaches its size. ----
    let started = Instant::now();
    let next = AtomicUsize::new(0);
    let (sent, wrong) = on_all_connections(
        &gateway,
        move |caller| {
            let index = next.fetch_add(1, Ordering::Relaxed);
            (index < TOKENS).then(|| caller.ask(&token(index), true))
        },
        || upstream.forget(),
    );
    println!("warm: {sent} requests in {:.1?}, {} MiB", started.elapsed(), gateway.memory() / MIB);
    assert_eq!(wrong, Vec::<String>::new());
    assert_eq!(sent, TOKENS);

    // ---- Load ----
    let duration = Duration::from_secs(number("TOLLGATE_LOAD_SECONDS", 5));
    let end = Instant::now() + duration;
    let mut memory = Vec::new();
    let (sent, wrong) = on_all_connections(
        &gateway,
        move |caller| {
            if Instant::now() >= end {
                return None;
            }
            // Spread over all tokens: a step that is coprime to their number.
            let index = (caller.sent * 7_919 + caller.lane * 1_571) % TOKENS;
            Some(match caller.sent % 5 {
                0 => caller.ask(&format!("bad-{:04}", index % 1_000), false),
                _ => caller.ask(&token(index), true),
            })
        },
        || {
            upstream.forget();
            memory.push(gateway.memory());
        },
    );
    let (middle, last) = (mean(&memory[memory.len() / 3..memory.len() * 2 / 3]), mean(&memory[memory.len() * 2 / 3..]));
    println!(
        "load: {sent} requests, {:.0}/s, memory {} KiB then {} KiB",
        sent as f64 / duration.as_secs_f64(),
        middle / 1024,
        last / 1024
    );
    assert_eq!(wrong, Vec::<String>::new());
    assert!(sent > 1_000, "only {sent} requests");
    assert!(last <= middle + middle / 20 + MIB, "memory grows under steady load: {middle} then {last} bytes");
    let errors = gateway.metrics();
    assert!(!errors.contains("tollgate_store_errors_total{"), "the store failed: {errors}");

    // ---- Flood: distinct bad tokens from most connections, good ones from every eighth ----
    let flood = number("TOLLGATE_FLOOD", 50_000) as usize;
    let before = gateway.memory();
    let (hits, misses) = (lookups(&gateway, "hit"), lookups(&gateway, "miss"));
    let (next, flooded, good) = (AtomicUsize::new(0), Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut peak = before;
    let asked = Arc::clone(&good);
    let (sent, wrong) = on_all_connections(
        &gateway,
        move |caller| {
            if caller.lane % 8 != 0 {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= flood {
                    flooded.store(true, Ordering::SeqCst);
                    return None;
                }
                return Some(caller.ask(&format!("flood-{index:08}-{:08x}", index * 2_654_435_761), false));
            }
            if flooded.load(Ordering::SeqCst) {
                return None;
            }
            asked.fetch_add(1, Ordering::Relaxed);
            Some(caller.ask(&token((caller.sent * 7_919 + caller.lane * 1_571) % TOKENS), true))
        },
        || {
            upstream.forget();
            peak = peak.max(gateway.memory());
        },
    );
    let good = good.load(Ordering::SeqCst);
    let ratio = (lookups(&gateway, "hit") - hits) / good as f64;
    let negative = gateway.metric("tollgate_cache_entries{kind=\"negative\"}");
    println!(
        "flood: {sent} requests, {good} good ones with a hit ratio of {:.4}, {} misses, {negative} bad entries, memory {} MiB, peak {} MiB",
        ratio,
        lookups(&gateway, "miss") - misses,
        before / MIB,
        peak / MIB
    );
    assert_eq!(wrong, Vec::<String>::new());
    assert!(good > 1_000, "only {good} requests with valid tokens");
    assert!(ratio > 0.99, "the flood evicted valid tokens from the cache: {ratio}");
    assert!(negative <= 10_500.0, "{negative} unknown tokens are cached, with a limit of 10,000");
    assert!(peak < before + 24 * MIB, "a flood of unknown tokens took {} MiB", (peak - before) / MIB);
    // The backend got valid tokens only.
    assert_eq!(gateway.metric("tollgate_requests_in_flight"), 0.0);
}
