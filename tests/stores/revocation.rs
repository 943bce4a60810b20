//! The documented bound: once a revocation is in the store, the token stops working on every gateway within a second,
//! whatever happens to the connections between them.

use super::{BOUND, Backing, Caller, Config, PostgresOwn, RedisOwn, setting};
use crate::harness::*;
use crate::servers::http::HttpServer;
use crate::servers::postgres::Postgres;
use crate::servers::redis::{Cluster, Redis, Watched};
use crate::servers::{Fault, Server as _, run, within};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

const REPLICAS: usize = 3;
/// How long a server, a gateway or a trigger is off.
const OFF: Duration = Duration::from_millis(1_500);

/// What happens beside the revocations, and what it is done to.
struct Disturbance {
    name: &'static str,
    work: Box<dyn FnMut(&Scene<'_>) + Send>,
}

fn disturbance(name: &'static str, work: impl FnMut(&Scene<'_>) + Send + 'static) -> Disturbance {
    Disturbance { name, work: Box::new(work) }
}

struct Scene<'a> {
    gateways: &'a [Gateway],
    /// Held while a revocation is written, which a failover waits for, as well as for the other server to have it: what a
    /// server loses is not promised.
    writing: &'a Mutex<()>,
}

/// Raises a flag when it is dropped.
struct EndsWith<'a>(&'a AtomicBool);

impl Drop for EndsWith<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Three gateways under load on one store, connections cut at random times, and a series of revocations, with disturbances
/// beside it. `count`: of revocations, in the short form and in the long one.
fn promised(mut store: Box<dyn Backing>, count: (usize, usize), mut beside: Vec<Disturbance>) {
    let is_long = setting("TOLLGATE_REVOCATIONS", 0) > 0;
    let count = if is_long { setting("TOLLGATE_REVOCATIONS", 0).min(count.1) } else { count.0 };
    let doomed: Vec<String> = (0..count).map(|number| format!("doomed-{number:05}")).collect();
    let steady: Vec<String> = (0..20).map(|number| format!("steady-{number:02}")).collect();
    store.add(&doomed);
    store.add(&steady);
    // One that remembers no request: there are millions.
    let backend = HttpServer::start(|_| Reply::ok("{}"));
    let more = format!("{}[cache]\npositive_ttl = \"10m\"\n[log]\naccess = \"off\"\n", store.section());
    let gateways: Vec<Gateway> = (0..REPLICAS).map(|_| Gateway::start(backend.address(), &more)).collect();

    let (over, good, other) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let (done, writing, now) = (AtomicUsize::new(0), Mutex::new(()), Mutex::new("nothing else"));
    // What takes its time has revocations beside it in the short form as well.
    let pause = if is_long || beside.is_empty() { Duration::ZERO } else { Duration::from_millis(100) };
    let (mut lags, mut cuts, mut late) = (BTreeMap::<&str, Vec<Duration>>::new(), 0, Vec::new());
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
        // Also when this panics: the threads would go on for ever, and nobody would see why.
        let ends = EndsWith(&over);
        let scene = Scene { gateways: &gateways, writing: &writing };
        let (done, now, over, beside) = (&done, &now, &over, &mut beside);
        let disturbing = scope.spawn(move || {
            let all = beside.len();
            for (index, Disturbance { name, work }) in beside.iter_mut().enumerate() {
                let due = (index * 2 + 1) * count / (all * 2);
                within(Duration::from_secs(3_600), "so many are revoked", || {
                    done.load(Ordering::Relaxed) >= due || over.load(Ordering::Relaxed)
                });
                // It failed, and no more are.
                if done.load(Ordering::Relaxed) < due {
                    return;
                }
                *now.lock().unwrap() = name;
                work(&scene);
                // What it leads to comes a little later.
                std::thread::sleep(BOUND);
                *now.lock().unwrap() = "nothing else";
            }
        });
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
            let turn = (random >> 33) % seldom;
            let (revoked, beside) = {
                let _one = writing.lock().unwrap();
                if turn == 0 {
                    cuts += usize::from(store.inject(Fault::Cut));
                }
                store.revoke(token);
                let revoked = (Instant::now(), *now.lock().unwrap());
                if turn == 1 {
                    cuts += usize::from(store.inject(Fault::Cut));
                }
                revoked
            };
            for ask in &asks {
                ask.send((token.clone(), revoked)).unwrap();
            }
            for answer in &answers {
                let lag = answer.recv().unwrap();
                if lag > BOUND {
                    late.push((token.clone(), beside, lag));
                }
                lags.entry(beside).or_default().push(lag);
            }
            done.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(pause);
        }
        let disturbed = disturbing.join();
        drop((asks, ends));
        disturbed.unwrap();
    });
    let mut all: Vec<Duration> = lags.values().flatten().copied().collect();
    let row = |beside: &str, lags: &mut Vec<Duration>| {
        lags.sort();
        let at = |share: f64| lags[((lags.len() - 1) as f64 * share) as usize];
        println!(
            "| {} | {beside} | {} x {REPLICAS} | p50 {:.1?}, p99 {:.1?}, p99.9 {:.1?}, max {:.1?} | {} worked past {BOUND:?} |",
            store.name(),
            lags.len() / REPLICAS,
            at(0.5),
            at(0.99),
            at(0.999),
            at(1.0),
            lags.iter().filter(|lag| **lag > BOUND).count(),
        );
    };
    lags.iter_mut().for_each(|(beside, lags)| row(beside, lags));
    row(
        &format!(
            "all; {cuts} cuts; meanwhile {} answers 200, {} others",
            good.load(Ordering::Relaxed),
            other.load(Ordering::Relaxed)
        ),
        &mut all,
    );
    assert_eq!(late, [], "{}: tokens that worked longer than the bound", store.name());
    assert!(good.load(Ordering::Relaxed) > count);
    for Disturbance { name, .. } in &beside {
        assert!(lags.contains_key(name), "no token was revoked beside {name:?}");
    }
}

/// A gateway that is suspended for longer than the bound.
fn a_gateway_stands_still() -> Disturbance {
    disturbance("a gateway frozen and woken", |scene| {
        scene.gateways[0].signal("STOP");
        std::thread::sleep(OFF);
        scene.gateways[0].signal("CONT");
    })
}

/// A primary and a standby, which takes its place.
struct Pair {
    servers: Arc<(Mutex<Postgres>, Mutex<Postgres>)>,
    /// Whether the second one is the primary.
    failed_over: Arc<AtomicBool>,
    section: String,
    config: Arc<Config>,
}

impl Pair {
    fn new() -> Self {
        let first = Postgres::start();
        let section = PostgresOwn::section_for(&first);
        Config::new(&section).tollgate(&["store", "migrate"], &[]).unwrap();
        let second = first.standby();
        let section = section.replace("/postgres\"", &format!(",127.0.0.1:{}/postgres\"", second.port()));
        let commands = section.replace("/postgres\"", "/postgres?application_name=commands\"");
        let config = Arc::new(Config::new(&commands));
        Self {
            servers: Arc::new((Mutex::new(first), Mutex::new(second))),
            failed_over: Arc::default(),
            section,
            config,
        }
    }

    fn primary(&self) -> std::sync::MutexGuard<'_, Postgres> {
        let second = self.failed_over.load(Ordering::Relaxed);
        if second { self.servers.1.lock().unwrap() } else { self.servers.0.lock().unwrap() }
    }

    fn disturbances(&self) -> Vec<Disturbance> {
        let servers = || Arc::clone(&self.servers);
        let (frozen, switched, promoted) = (servers(), servers(), servers());
        let (config, failed_over) = (Arc::clone(&self.config), Arc::clone(&self.failed_over));
        vec![
            a_gateway_stands_still(),
            disturbance("a standby frozen and woken", move |_| {
                frozen.1.lock().unwrap().freeze();
                std::thread::sleep(OFF);
                frozen.1.lock().unwrap().thaw();
            }),
            disturbance("a trigger switched off and on", move |_| {
                let alter = |how| format!("ALTER TABLE tollgate.token {how} TRIGGER tollgate_altered");
                switched.0.lock().unwrap().psql("postgres", &alter("DISABLE"));
                std::thread::sleep(OFF);
                switched.0.lock().unwrap().psql("postgres", &alter("ENABLE"));
            }),
            disturbance("an import", move |_| {
                let count = setting("TOLLGATE_REVOCATIONS_IMPORT", 20_000);
                let tokens: Vec<_> = (0..count).map(|number| format!("new-{number}")).collect();
                config.import(&tokens);
            }),
            disturbance("a standby promoted", move |scene| {
                let _nobody_writes = scene.writing.lock().unwrap();
                let (mut first, second) = (promoted.0.lock().unwrap(), promoted.1.lock().unwrap());
                let written = first.psql("postgres", "SELECT pg_current_wal_flush_lsn()");
                eventually("the standby has all of it", || {
                    second.psql("postgres", &format!("SELECT pg_last_wal_replay_lsn() >= '{written}'")) == "t"
                });
                first.stop();
                second.psql("postgres", "SELECT pg_promote()");
                failed_over.store(true, Ordering::Relaxed);
            }),
        ]
    }
}

impl Backing for Pair {
    fn name(&self) -> &'static str {
        "postgres, two hosts"
    }

    fn section(&self) -> String {
        self.section.clone()
    }

    fn add(&mut self, tokens: &[String]) {
        self.config.import(tokens);
    }

    /// Its session may be cut.
    fn revoke(&self, token: &str) {
        let sql = format!("UPDATE tollgate.token SET revoked = 1 WHERE digest = '\\x{}'", sha256_hex(token));
        eventually("it is revoked", || self.primary().try_psql("postgres", &sql).is_ok());
    }

    fn hears(&self) -> bool {
        true
    }

    /// Cuts the connections of gateways: an import that is cut again and again never ends.
    fn inject(&mut self, fault: Fault) -> bool {
        assert_eq!(fault, Fault::Cut);
        let others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'client backend' \
            AND application_name LIKE 'tollgate %'";
        self.primary().psql("postgres", others);
        true
    }
}

/// Several Redis servers, written to by the command line.
struct Several<S> {
    name: &'static str,
    servers: Arc<Mutex<S>>,
    config: Config,
    section: String,
}

impl<S> Several<S> {
    fn new(name: &'static str, servers: S, addresses: &[String], topology: &str) -> Self {
        let section = format!(
            "[store]\nkind = \"redis\"\nname = \"redis\"\nservers = {addresses:?}\n{topology}\ntimeout = \"1s\"\n"
        );
        Self { name, servers: Arc::new(Mutex::new(servers)), config: Config::new(&section), section }
    }
}

impl<S> Backing for Several<S> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn section(&self) -> String {
        self.section.clone()
    }

    fn add(&mut self, tokens: &[String]) {
        self.config.import(tokens);
    }

    /// While servers change places, a command may fail.
    fn revoke(&self, token: &str) {
        let digest = sha256_hex(token);
        eventually("it is revoked", || self.config.tollgate(&["token", "revoke"], &[&digest]).is_ok());
    }

    fn hears(&self) -> bool {
        true
    }

    fn inject(&mut self, _: Fault) -> bool {
        false
    }
}

#[test]
fn no_token_works_past_the_bound_on_postgres() {
    promised(Box::new(PostgresOwn::new()), (60, 10_000), Vec::new());
}

#[test]
fn no_token_works_past_the_bound_on_redis() {
    promised(Box::new(RedisOwn::new()), (60, 10_000), vec![a_gateway_stands_still()]);
}

#[test]
fn no_token_works_past_the_bound_on_postgres_whatever_happens_to_its_servers() {
    let pair = Pair::new();
    let beside = pair.disturbances();
    promised(Box::new(pair), (80, 10_000), beside);
}

#[test]
fn no_token_works_past_the_bound_while_sentinels_fail_over() {
    let watched = Watched::start();
    let addresses = watched.addresses();
    let sentinels = Several::new("redis, sentinels", watched, &addresses, "topology = \"sentinel\"\nmaster = \"main\"");
    let servers = Arc::clone(&sentinels.servers);
    let failover = disturbance("a master killed, and its replica promoted", move |scene| {
        let _nobody_writes = scene.writing.lock().unwrap();
        let mut servers = servers.lock().unwrap();
        assert_eq!(servers.master.cli(&["WAIT", "1", "5000"]), "1");
        servers.master.stop();
        // A server that is promoted cuts the connections that it has, this one too.
        eventually("the replica is the master", || servers.replica.try_cli(&["ROLE"]).starts_with("master"));
    });
    promised(Box::new(sentinels), (40, 2_000), vec![failover]);
}

#[test]
fn no_token_works_past_the_bound_while_a_cluster_moves_its_slots() {
    let cluster = Cluster::start();
    let addresses: Vec<String> = cluster.nodes.iter().map(Redis::address).collect();
    let store = Several::new("redis, cluster", cluster, &addresses, "topology = \"cluster\"");
    let servers = Arc::clone(&store.servers);
    let reshard = disturbance("a third of the slots moved", move |_| {
        let nodes = &servers.lock().unwrap().nodes;
        let (from, to) = (nodes[0].cli(&["CLUSTER", "MYID"]), nodes[1].cli(&["CLUSTER", "MYID"]));
        let slots = if setting("TOLLGATE_REVOCATIONS", 0) > 0 { "5000" } else { "500" };
        run(std::process::Command::new("redis-cli").args(["--cluster", "reshard", &nodes[0].address()]).args([
            "--cluster-from",
            &from,
            "--cluster-to",
            &to,
            "--cluster-slots",
            slots,
            "--cluster-yes",
        ]));
    });
    promised(Box::new(store), (40, 2_000), vec![reshard]);
}
