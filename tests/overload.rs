//! More requests than a server can answer: what callers get without a limit, with one that suits the server, and with an adaptive
//! one. Prints a table.
//!
//! TOLLGATE_OVERLOAD_SECONDS (0: a short form, with two of the rows) is how long each row is measured.

use crate::deadlines::Stalls;
use crate::harness::*;
use crate::servers::Server as _;
use crate::servers::http::{HttpServer, Step};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What the server does at once, and how long it takes for each.
const WORKERS: usize = 8;
const SERVICE: Duration = Duration::from_millis(40);
/// A second.
const CAPACITY: f64 = WORKERS as f64 / 0.04;
/// Callers wait no longer.
const GIVE_UP: Duration = Duration::from_secs(1);

/// Takes every request, works on some at once in the order in which they came, and lets the others wait, as Puma does. It works
/// for those that have gone as well.
fn server() -> HttpServer {
    let workers = Mutex::new(([Instant::now(); WORKERS], fastrand::Rng::with_seed(7)));
    HttpServer::start(move |_| {
        let now = Instant::now();
        let (workers, random) = &mut *workers.lock().unwrap();
        let worker = workers.iter_mut().min().unwrap();
        // Workers that always take the same time work in step, which none do that work.
        *worker = now.max(*worker) + SERVICE.mul_f32(0.5 + random.f32());
        Reply::ok("ok").after(worker.saturating_duration_since(now))
    })
}

fn gateway(server: &HttpServer, limit: &str, tokens: &[String]) -> Gateway {
    let entry = |token: &String| format!("[[token]]\nsha256 = \"{}\"\nuser = \"{token}\"\n", sha256_hex(token));
    let section = format!(
        "[[upstream]]\nname = \"api\"\nservers = [\"{}\"]\nmax_requests = {limit}\n[log]\naccess = \"off\"\n",
        server.address()
    );
    Gateway::start_with_tokens(server.address(), &tokens.iter().map(entry).collect::<String>(), &section)
}

/// What came of one request.
#[derive(Clone, Copy)]
struct Asked {
    /// When it was to be sent.
    due: Instant,
    took: Duration,
    /// 0: no answer in time.
    status: u16,
}

/// A kept connection, made anew where it was closed.
struct Caller<'g> {
    gateway: &'g Gateway,
    socket: Option<TcpStream>,
    token: &'g str,
}

impl<'g> Caller<'g> {
    fn of(gateway: &'g Gateway, token: &'g str) -> Self {
        Self { gateway, socket: None, token }
    }

    fn ask(&mut self, due: Instant) -> Asked {
        let status = self.try_ask(due + GIVE_UP).unwrap_or(0);
        if status != 200 {
            // A refusal ends the connection.
            self.socket = None;
        }
        Asked { due, took: due.elapsed(), status }
    }

    fn try_ask(&mut self, until: Instant) -> Option<u16> {
        let left =
            |until: Instant| Some(until.saturating_duration_since(Instant::now())).filter(|left| !left.is_zero());
        let mut socket = match self.socket.take() {
            Some(socket) => socket,
            None => TcpStream::connect_timeout(&self.gateway.address, left(until)?).ok()?,
        };
        let head = format!("GET /api/v3/user HTTP/1.1\r\nHost: h\r\nPRIVATE-TOKEN: {}\r\n\r\n", self.token);
        socket.write_all(head.as_bytes()).ok()?;
        let mut answer = Vec::new();
        loop {
            socket.set_read_timeout(Some(left(until)?)).ok()?;
            let mut piece = [0; 2048];
            let count = socket.read(&mut piece).ok().filter(|count| *count > 0)?;
            answer.extend_from_slice(&piece[..count]);
            let Some(end) = find(&answer, b"\r\n\r\n") else { continue };
            let text = String::from_utf8_lossy(&answer[..end]).into_owned();
            let length: usize = text.lines().find_map(|line| line.strip_prefix("Content-Length: ")?.parse().ok())?;
            if answer.len() >= end + 4 + length {
                self.socket = Some(socket);
                return text.get(9..12)?.parse().ok();
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Load {
    /// So many callers, each of whom asks again as soon as it has its answer.
    Closed(usize),
    /// So many requests a second, whatever becomes of them.
    Open(f64),
}

/// Puts a load on a gateway for a time; what came of it.
fn offer(gateway: &Gateway, token: &str, load: Load, time: Duration) -> Vec<Asked> {
    let (begin, next) = (Instant::now(), AtomicU64::new(0));
    let all = Mutex::new(Vec::new());
    let lanes = match load {
        Load::Closed(callers) => callers,
        // As many as can be waiting at one time.
        Load::Open(rate) => (rate * GIVE_UP.as_secs_f64() * 1.1) as usize + 8,
    };
    std::thread::scope(|scope| {
        for _ in 0..lanes {
            let lane = || {
                let (mut caller, mut own) = (Caller::of(gateway, token), Vec::new());
                loop {
                    let due = match load {
                        Load::Closed(_) => Instant::now(),
                        Load::Open(rate) => {
                            begin + Duration::from_secs_f64(next.fetch_add(1, Ordering::Relaxed) as f64 / rate)
                        }
                    };
                    if due >= begin + time {
                        break;
                    }
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                    let asked = caller.ask(due);
                    own.push(asked);
                    if let (Load::Closed(_), 503) = (load, asked.status) {
                        std::thread::sleep(SERVICE);
                    }
                }
                all.lock().unwrap().extend(own);
            };
            std::thread::Builder::new().stack_size(256 * 1024).spawn_scoped(scope, lane).unwrap();
        }
    });
    all.into_inner().unwrap()
}

#[derive(Debug, Default)]
struct Outcome {
    p50: Duration,
    p99: Duration,
    refused: f64,
    gave_up: f64,
    /// Answers a second.
    goodput: f64,
}

impl Outcome {
    /// Of what was due since a time.
    fn of(all: &[Asked], since: Instant, time: Duration) -> Self {
        let all: Vec<_> = all.iter().filter(|asked| asked.due >= since).collect();
        let mut times: Vec<_> = all.iter().filter(|asked| asked.status == 200).map(|asked| asked.took).collect();
        times.sort_unstable();
        let share = |status| all.iter().filter(|asked| asked.status == status).count() as f64 / all.len().max(1) as f64;
        Self {
            p50: percentile(&times, 50),
            p99: percentile(&times, 99),
            refused: share(503),
            gave_up: share(0),
            goodput: times.len() as f64 / time.as_secs_f64(),
        }
    }
}

/// Of sorted times; the longest there is if there are none.
fn percentile(times: &[Duration], percent: usize) -> Duration {
    times.get((times.len() * percent / 100).min(times.len().saturating_sub(1))).copied().unwrap_or(GIVE_UP)
}

/// Asks the admin listener until it is told to stop: the slowest answer.
fn watch_admin(gateway: &Gateway, over: &AtomicBool) -> Duration {
    let mut slowest = Duration::ZERO;
    while !over.load(Ordering::Relaxed) {
        for path in ["/healthz", "/readyz", "/metrics", "/upstreams"] {
            let begun = Instant::now();
            assert_eq!(gateway.admin_get(path).map(|answer| answer.status), Some(200), "{path}");
            slowest = slowest.max(begun.elapsed());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    slowest
}

fn seconds() -> u64 {
    std::env::var("TOLLGATE_OVERLOAD_SECONDS").map_or(0, |text| text.parse().unwrap())
}

#[test]
fn an_adaptive_limit_keeps_a_server_at_work_that_would_collapse() {
    let token = "good-token-0001".to_owned();
    let (time, is_long) = (Duration::from_secs(seconds().max(2)), seconds() > 0);
    let warm = Duration::from_secs(if is_long { 3 } else { 2 });
    let loads = [
        ("closed, 12 callers", Load::Closed(WORKERS * 3 / 2)),
        ("closed, 24 callers", Load::Closed(WORKERS * 3)),
        ("open, 1.5 times", Load::Open(1.5 * CAPACITY)),
        ("open, 3 times", Load::Open(3.0 * CAPACITY)),
    ];
    println!("| load | max_requests | p50 | p99 | refused | gave up | answers a second | slowest of admin |");
    println!("|---|---|---|---|---|---|---|---|");
    for (name, load) in loads.into_iter().skip(if is_long { 0 } else { 3 }) {
        let mut goodputs = Vec::new();
        for limit in ["\"none\"", "10", "\"adaptive\""] {
            if !is_long && limit == "10" {
                continue;
            }
            let server = server();
            let gateway = gateway(&server, limit, std::slice::from_ref(&token));
            let (begin, over) = (Instant::now(), AtomicBool::new(false));
            let (all, slowest) = std::thread::scope(|scope| {
                let admin = scope.spawn(|| watch_admin(&gateway, &over));
                let all = offer(&gateway, &token, load, warm + time);
                over.store(true, Ordering::Relaxed);
                (all, admin.join().unwrap())
            });
            let outcome = Outcome::of(&all, begin + warm, time);
            println!(
                "| {name} | {} | {:.0} ms | {:.0} ms | {:.0} % | {:.0} % | {:.0} | {:.0} ms |",
                limit.trim_matches('"'),
                outcome.p50.as_secs_f64() * 1e3,
                outcome.p99.as_secs_f64() * 1e3,
                outcome.refused * 100.0,
                outcome.gave_up * 100.0,
                outcome.goodput,
                slowest.as_secs_f64() * 1e3,
            );
            assert!(slowest < GIVE_UP, "the admin listener took {slowest:?}");
            goodputs.push(outcome.goodput);
            if limit != "\"adaptive\"" {
                continue;
            }
            assert!(outcome.goodput > 0.75 * CAPACITY, "{outcome:?}");
            assert!(outcome.gave_up < 0.05, "{outcome:?}");
            let limit = state(&gateway)["max_requests"].as_u64().unwrap();
            assert!((4..=24).contains(&limit), "{}", state(&gateway));
            if let Load::Open(_) = load {
                assert!(outcome.refused > 0.2, "{outcome:?}");
                assert!(2.0 * goodputs[0] < outcome.goodput, "without a limit, nothing collapsed: {goodputs:?}");
            }
        }
    }
}

fn state(gateway: &Gateway) -> serde_json::Value {
    let page: serde_json::Value = serde_json::from_slice(&gateway.admin_get("/upstreams").unwrap().body).unwrap();
    page[0]["servers"][0].clone()
}

/// What callers wait, each of whom asks four times a second, from the shortest to the longest.
fn modest(gateway: &Gateway, tokens: &[String], begin: Instant, time: Duration) -> Vec<Asked> {
    let all = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for (place, token) in tokens.iter().enumerate() {
            let all = &all;
            scope.spawn(move || {
                let (mut caller, mut own) = (Caller::of(gateway, token), Vec::new());
                for nth in 0.. {
                    let due = begin + Duration::from_millis(250 * nth + 25 * place as u64);
                    if due >= begin + time {
                        break;
                    }
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                    own.push(caller.ask(due));
                }
                all.lock().unwrap().extend(own);
            });
        }
    });
    all.into_inner().unwrap()
}

/// One who asks fifty times as much as each of ten others, who are refused nothing and wait at most so many times as long. What
/// happens in the first seconds, `warm`, does not count.
fn one_busy_caller_beside_ten(max_requests: &str, warm: u64, most: f32) {
    let tokens: Vec<String> = (0..11).map(|number| format!("good-token-{number:04}")).collect();
    let (busy, others) = tokens.split_first().unwrap();
    let (warm, time) = (Duration::from_secs(warm), Duration::from_secs(seconds().max(3)));
    println!("| `max_requests` | busy caller | p50 of the others | p99 | refused |\n|---|---|---|---|---|");
    let mut tries = 0;
    loop {
        let stalls = Stalls::watch();
        let measured = [0.0, 200.0].map(|rate| {
            let server = server();
            let gateway = gateway(&server, max_requests, &tokens);
            let begin = Instant::now();
            let all = std::thread::scope(|scope| {
                if rate > 0.0 {
                    scope.spawn(|| drop(offer(&gateway, busy, Load::Open(rate), warm + time)));
                }
                modest(&gateway, others, begin, warm + time)
            });
            let outcome = Outcome::of(&all, begin + warm, time);
            println!(
                "| {max_requests} | {rate} a second | {:.0} ms | {:.0} ms | {:.1} % |",
                outcome.p50.as_secs_f64() * 1e3,
                outcome.p99.as_secs_f64() * 1e3,
                outcome.refused * 100.0
            );
            outcome
        });
        let [alone, beside] = &measured;
        let holds = beside.refused == 0.0 && beside.gave_up == 0.0 && beside.p99 <= alone.p99.mul_f32(most);
        tries += 1;
        if holds || stalls.so_far() < Duration::from_millis(10) || tries == 4 {
            assert!(holds, "{measured:?}, stalled for {:?}", stalls.so_far());
            return;
        }
    }
}

/// With as many as the server works on at once, all that others wait for is the next one that it has done.
#[test]
fn one_busy_caller_beside_ten_before_a_limit_that_fits() {
    one_busy_caller_beside_ten("8", 2, 1.5);
}

/// What they wait for longer is the server's own queue, which this limit lets grow a little to see what the server can do, and
/// which is long until it has found that out. docs/operations.md has the figures of the long form, which holds 1.5 times; the 120 requests
/// of the short one do not say it so exactly.
#[test]
fn one_busy_caller_beside_ten_before_an_adaptive_limit() {
    one_busy_caller_beside_ten("\"adaptive\"", if seconds() > 0 { 20 } else { 6 }, 2.0);
}

const LIMIT: &str = "tollgate_upstream_server_limit";

#[test]
fn the_limit_is_shown_and_outlives_a_reload() {
    let mut server = HttpServer::start(|_| Reply::ok("ok"));
    let token = "good-token-0001".to_owned();
    let gateway = gateway(&server, "\"adaptive\"", std::slice::from_ref(&token));
    let asked = (0..50).filter(|_| Caller::of(&gateway, &token).ask(Instant::now()).status == 200).count();
    assert_eq!(asked, 50);
    let series = |name: &str| format!("{LIMIT}{name}{{server=\"{}\",upstream=\"api\"}}", server.address());
    let before = state(&gateway);
    assert_eq!((&before["max_requests"], &before["adaptive"]["samples"]), (&20.into(), &50.into()), "{before}");
    assert_eq!(
        [series(""), series("_samples_total"), series("_pinned")].map(|name| gateway.metric(&name)),
        [20.0, 50.0, 0.0]
    );
    // Connections that are refused bring it down, and it stays there.
    server.stop();
    eventually("it falls", || {
        Caller::of(&gateway, &token).ask(Instant::now());
        state(&gateway)["max_requests"].as_u64().unwrap() < 20
    });
    server.start_again();
    eventually("it is back", || Caller::of(&gateway, &token).ask(Instant::now()).status == 200);
    let learned = state(&gateway)["max_requests"].as_u64().unwrap();
    assert!((2..20).contains(&learned), "{learned}");
    gateway.rewrite(|text| text.replace("max_requests = \"adaptive\"", "max_requests = { most = 100 }\nqueue = 7"));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    assert_eq!(state(&gateway)["max_requests"].as_u64(), Some(learned));
    gateway.rewrite(|text| text.replace("{ most = 100 }", "{ least = 2, most = 3 }"));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    assert_eq!(state(&gateway)["max_requests"].as_u64(), Some(3));
    // Without one, there is none to be seen.
    gateway.rewrite(|text| text.replace("{ least = 2, most = 3 }", "\"none\""));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    assert_eq!((&state(&gateway)["max_requests"], &state(&gateway)["adaptive"]), (&().into(), &().into()));
    assert!(!gateway.metrics().contains(LIMIT));
}

/// What is open for long keeps no place once its response has begun.
#[test]
fn streams_keep_no_place() {
    let server = HttpServer::start(|asked| match asked.target.contains("stream") {
        true => Reply::raw("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n: \r\n").then(Step::Hang),
        false => Reply::ok("ok"),
    });
    let token = "good-token-0001".to_owned();
    let gateway = gateway(&server, "{ least = 1, most = 2 }", std::slice::from_ref(&token));
    let streams: Vec<Client> = (0..8)
        .map(|_| {
            let mut client = gateway.client();
            client.send_head(&format!("GET /api/v3/stream HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {token}\n\n"));
            assert!(client.next_bytes().unwrap().starts_with(b"HTTP/1.1 200"));
            client
        })
        .collect();
    assert_eq!(state(&gateway)["in_flight"], 8);
    assert_eq!(Caller::of(&gateway, &token).ask(Instant::now()).status, 200);
    drop(streams);
}
