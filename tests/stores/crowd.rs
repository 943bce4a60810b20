//! Many callers at once, and what an ordinary day does to a store meanwhile: a cold start, an import, a lost subscription, an
//! outage. Nobody whose token is valid is refused while the store answers, and no known caller at any time.

use super::{Backing, PostgresOwn, RedisOwn, setting};
use crate::harness::*;
use crate::servers::Fault;
use crate::servers::delay::DelayLine;
use crate::servers::http::{HttpServer, Reply};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// To the store and back, as between two zones of a cloud.
const ROUND_TRIP: Duration = Duration::from_millis(6);

/// The answers of a while: how many of each status, and the slowest.
#[derive(Debug, Default)]
struct Answers {
    statuses: BTreeMap<u16, usize>,
    slowest: Duration,
}

impl Answers {
    fn add(&mut self, status: u16, took: Duration) {
        *self.statuses.entry(status).or_default() += 1;
        self.slowest = self.slowest.max(took);
    }

    fn merge(mut self, other: Self) -> Self {
        for (status, count) in other.statuses {
            *self.statuses.entry(status).or_default() += count;
        }
        self.slowest = self.slowest.max(other.slowest);
        self
    }

    /// All were 200.
    #[track_caller]
    fn all_pass(&self, what: &str) {
        assert!(!self.statuses.is_empty() && self.statuses.keys().eq([&200]), "{what}: {self:?}");
    }
}

/// A kept connection of the crowd.
async fn ask(socket: &mut TcpStream, token: &str) -> u16 {
    let request = format!("GET /api/v3/user HTTP/1.1\r\nHost: h.test\r\nPRIVATE-TOKEN: {token}\r\n\r\n");
    socket.write_all(request.as_bytes()).await.unwrap();
    let (mut head, mut buffer) = (Vec::new(), [0; 4_096]);
    loop {
        let count = socket.read(&mut buffer).await.unwrap();
        assert!(count > 0, "the connection was closed: {:?}", String::from_utf8_lossy(&head));
        head.extend_from_slice(&buffer[..count]);
        let text = String::from_utf8_lossy(&head);
        if let Some((fields, body)) = text.split_once("\r\n\r\n") {
            let field = |line: &str| line.to_ascii_lowercase().strip_prefix("content-length: ").map(str::to_owned);
            let length: usize = fields.lines().find_map(field).expect("a length").parse().unwrap();
            if body.len() >= length {
                return text[9..12].parse().unwrap();
            }
        }
    }
}

/// Every token once, all at the same time.
async fn all_at_once(address: SocketAddr, tokens: &[String]) -> Answers {
    let mut sockets = Vec::new();
    for _ in tokens {
        sockets.push(TcpStream::connect(address).await.unwrap());
    }
    let callers = sockets.into_iter().zip(tokens).map(|(mut socket, token)| async move {
        let before = Instant::now();
        (ask(&mut socket, token).await, before.elapsed())
    });
    let mut answers = Answers::default();
    for (status, took) in futures_util::future::join_all(callers).await {
        answers.add(status, took);
    }
    answers
}

/// Requests with all tokens in turn, at a rate, on kept connections, until it is over.
struct Crowd {
    over: Arc<AtomicBool>,
    callers: Vec<tokio::task::JoinHandle<Answers>>,
}

impl Crowd {
    fn gather(address: SocketAddr, tokens: &Arc<Vec<String>>, per_second: usize) -> Self {
        const CONNECTIONS: usize = 64;
        let (over, next) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let pause = Duration::from_secs(CONNECTIONS as u64) / u32::try_from(per_second).unwrap();
        let callers = (0..CONNECTIONS).map(|_| {
            let (over, next, tokens) = (Arc::clone(&over), Arc::clone(&next), Arc::clone(tokens));
            tokio::spawn(async move {
                let mut socket = TcpStream::connect(address).await.unwrap();
                let mut ticks = tokio::time::interval(pause);
                let mut answers = Answers::default();
                while !over.load(Ordering::Relaxed) {
                    ticks.tick().await;
                    let token = &tokens[next.fetch_add(1, Ordering::Relaxed) % tokens.len()];
                    let before = Instant::now();
                    answers.add(ask(&mut socket, token).await, before.elapsed());
                }
                answers
            })
        });
        let callers = callers.collect();
        Self { over, callers }
    }

    async fn leave(self) -> Answers {
        self.over.store(true, Ordering::Relaxed);
        let mut answers = Answers::default();
        for caller in self.callers {
            answers = answers.merge(caller.await.unwrap());
        }
        answers
    }
}

fn tokens(name: &str, count: usize) -> Vec<String> {
    (0..count).map(|number| format!("{name}-{number:06}")).collect()
}

/// A store as it is reached over a slow network.
fn far_away(store: &dyn Backing) -> (DelayLine, String) {
    let (line, section) = DelayLine::before(&store.section(), ROUND_TRIP / 2);
    // Longer than it takes to notice that a server is silent, by far.
    let section = section.replace("timeout = \"1s\"", "timeout = \"3s\"");
    assert!(section.contains("timeout = \"3s\""), "{section}");
    (line, section)
}

fn known_callers_never_notice(mut store: Box<dyn Backing>) {
    let (in_use, per_second) = (setting("TOLLGATE_CROWD_TOKENS", 1_000), setting("TOLLGATE_CROWD_RATE", 1_000));
    let imported = setting("TOLLGATE_CROWD_IMPORT", 20_000);
    let known = Arc::new(tokens("known", in_use));
    store.add(&known);
    let (_line, section) = far_away(&*store);
    let backend = HttpServer::start(|_| Reply::ok("{\"ok\":true}"));
    let more = format!("{section}[cache]\npositive_ttl = \"10m\"\n[log]\naccess = \"off\"\n");
    let gateway = Gateway::start(backend.address(), &more);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let name = store.name();
    let subscribed = || gateway.metric(&format!("tollgate_store_subscribed{{store=\"{name}\"}}")) == 1.0;
    eventually("it is subscribed", subscribed);

    let cold = runtime.block_on(all_at_once(gateway.address, &known[..in_use.min(1_000)]));
    cold.all_pass("a cold start");
    // The rest, before somebody counts.
    runtime.block_on(async {
        Crowd::gather(gateway.address, &known, per_second * 2).leave_after(in_use, per_second).await
    });

    let during = |what: &str, store: &mut dyn Backing, work: &mut dyn FnMut(&mut dyn Backing)| {
        let lookups = |gateway: &Gateway| {
            gateway.metric(&format!("tollgate_store_lookups_total{{result=\"found\",store=\"{name}\"}}"))
        };
        let (before, began) = (lookups(&gateway), Instant::now());
        let crowd = runtime.block_on(async { Crowd::gather(gateway.address, &known, per_second) });
        work(store);
        let answers = runtime.block_on(crowd.leave());
        println!(
            "| {name} | {what} | {in_use} tokens, {:.0} requests/s for {:.1?} | {:?} | slowest {:.1?} | {} lookups |",
            answers.statuses.values().sum::<usize>() as f64 / began.elapsed().as_secs_f64(),
            began.elapsed(),
            answers.statuses,
            answers.slowest,
            lookups(&gateway) - before,
        );
        answers.all_pass(what);
        answers
    };
    println!("| {name} | cold start | 1,000 at once | {:?} | slowest {:.1?} |", cold.statuses, cold.slowest);
    during("an import", &mut *store, &mut |store| {
        store.add(&tokens("new", imported));
        std::thread::sleep(Duration::from_millis(500));
    });
    during("lost subscriptions", &mut *store, &mut |store| {
        for _ in 0..3 {
            store.inject(Fault::Cut);
            std::thread::sleep(Duration::from_secs(1));
        }
    });
    let silent = during("a silent server", &mut *store, &mut |store| {
        store.inject(Fault::Freeze);
        std::thread::sleep(Duration::from_secs(4));
        store.inject(Fault::Thaw);
        std::thread::sleep(Duration::from_secs(2));
    });
    // The lookup's timeout is three seconds.
    assert!(silent.slowest < Duration::from_secs(2), "known callers waited for a silent server: {silent:?}");
    during("an outage", &mut *store, &mut |store| {
        store.inject(Fault::Stop);
        std::thread::sleep(Duration::from_secs(2));
        store.inject(Fault::Start);
        std::thread::sleep(Duration::from_secs(2));
    });
}

impl Crowd {
    /// Leaves when every one of so many tokens was asked for.
    async fn leave_after(self, tokens: usize, per_second: usize) -> Answers {
        tokio::time::sleep(Duration::from_secs_f64(tokens as f64 / per_second as f64)).await;
        self.leave().await
    }
}

#[test]
fn known_callers_never_notice_what_happens_to_postgres() {
    known_callers_never_notice(Box::new(PostgresOwn::new()));
}

#[test]
fn known_callers_never_notice_what_happens_to_redis() {
    known_callers_never_notice(Box::new(RedisOwn::new()));
}
