//! Servers that refuse, that are silent, that die under load and come back: what clients see of it, and what operators do.
//! `make test` runs these alone: they measure waits, and other tests would add to them.

use crate::deadlines::Stalls;
use crate::harness::*;
use crate::servers::Server as _;
use crate::servers::http::HttpServer;
use std::any::Any;
use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const TARGET: &str = "/api/v3/projects";
/// The gateway's timeouts here.
const TIMEOUT: Duration = Duration::from_secs(1);
/// A request that took this long has waited for a timeout; the machine's own pauses are shorter.
const SLOW: Duration = Duration::from_millis(900);

fn pool(addresses: &[SocketAddr]) -> String {
    let list: Vec<String> = addresses.iter().map(|address| format!("\"{address}\"")).collect();
    format!(
        "[[upstream]]\nname = \"api\"\nservers = [{}]\nconnect_timeout = \"1s\"\nread_timeout = \"1s\"\n",
        list.join(", ")
    )
}

fn up(server: SocketAddr) -> String {
    format!("tollgate_upstream_server_up{{server=\"{server}\",upstream=\"api\"}}")
}

/// How a server is dead.
#[derive(Clone, Copy, Debug)]
enum Dead {
    Refusing,
    /// SYNs are dropped.
    Unreachable,
    /// Connections are taken, and nothing is answered.
    Silent,
}

/// Its address, and what keeps it as it is.
fn dead(how: Dead) -> (SocketAddr, Box<dyn Any>) {
    match how {
        Dead::Refusing => ((Ipv4Addr::LOCALHOST, free_port()).into(), Box::new(())),
        Dead::Silent => {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            (listener.local_addr().unwrap(), Box::new(listener))
        }
        Dead::Unreachable => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let listener = runtime.block_on(async {
                let socket = tokio::net::TcpSocket::new_v4().unwrap();
                socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
                socket.listen(0).unwrap()
            });
            let address = listener.local_addr().unwrap();
            // Until its queue is full.
            let mut queued = Vec::new();
            while let Ok(socket) = TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
                queued.push(socket);
            }
            (address, Box::new((runtime, listener, queued)))
        }
    }
}

#[derive(Clone, Debug)]
struct Asked {
    id: String,
    status: u16,
    begun: Instant,
    took: Duration,
}

/// One client with a kept connection, which it makes anew where it was closed.
struct Caller {
    address: SocketAddr,
    client: Option<Client>,
}

impl Caller {
    fn of(gateway: &Gateway) -> Self {
        Self { address: gateway.address, client: None }
    }

    /// Status 0: no answer.
    fn ask(&mut self, method: &str, id: &str) -> Asked {
        let begun = Instant::now();
        let mut client = self.client.take().unwrap_or_else(|| Client::connect(self.address));
        let body = if method == "POST" { "Content-Length: 2\n\nhi" } else { "\n" };
        client.send_head(&format!("{method} {TARGET}?id={id} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\n{body}"));
        let answer = client.answer_to(method);
        let status = answer.as_ref().map_or(0, |answer| answer.status);
        if answer.is_some_and(|answer| answer.header("Connection") != Some("close")) {
            self.client = Some(client);
        }
        Asked { id: id.into(), status, begun, took: begun.elapsed() }
    }
}

/// Many clients at one time, each with so many requests.
fn crowd(gateway: &Gateway, clients: usize, each: usize, method: &str) -> Vec<Asked> {
    let asked = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for client in 0..clients {
            let (asked, mut caller) = (&asked, Caller::of(gateway));
            scope.spawn(move || {
                let own: Vec<_> = (0..each).map(|nth| caller.ask(method, &format!("{client}-{nth}"))).collect();
                asked.lock().unwrap().extend(own);
            });
        }
    });
    asked.into_inner().unwrap()
}

/// Again, if the machine stood still meanwhile: what is late then has not waited for a server.
fn steady(ask: impl Fn() -> Vec<Asked>) -> Vec<Asked> {
    loop {
        let stalls = Stalls::watch();
        let asked = ask();
        if stalls.so_far() < SLOW / 4 || outcome(&asked).1 == 0 {
            return asked;
        }
        println!("stalled for {:?}: again", stalls.so_far());
    }
}

/// Statuses with their counts, and how many requests waited.
fn outcome(asked: &[Asked]) -> (BTreeMap<u16, usize>, usize) {
    let mut statuses = BTreeMap::new();
    asked.iter().for_each(|asked| *statuses.entry(asked.status).or_default() += 1);
    (statuses, asked.iter().filter(|asked| asked.took >= SLOW).count())
}

fn only_200(count: usize) -> BTreeMap<u16, usize> {
    BTreeMap::from([(200, count)])
}

/// One of two and three of four are dead. After three requests nobody waits, and nobody gets an error.
fn dead_servers_are_not_felt(how: Dead) {
    for (dead_ones, all) in [(1, 2), (3, 4)] {
        for clients in [1, 8, 32] {
            let servers: Vec<_> = (0..dead_ones).map(|_| dead(how)).collect();
            let alive: Vec<_> = (dead_ones..all).map(|_| Upstream::start()).collect();
            let addresses: Vec<_> =
                servers.iter().map(|(address, _)| *address).chain(alive.iter().map(|alive| alive.address)).collect();
            let gateway = Gateway::start(addresses[0], &pool(&addresses));
            let mut first = Caller::of(&gateway);
            let three: Vec<_> = (0..3).map(|nth| first.ask("GET", &nth.to_string())).collect();
            let then = steady(|| crowd(&gateway, clients, 640 / clients, "GET"));
            println!(
                "{how:?}, {dead_ones} of {all}, {clients} clients: {:?}, then {:?}",
                outcome(&three),
                outcome(&then)
            );
            assert_eq!(outcome(&three).0, only_200(3));
            assert_eq!(outcome(&then), (only_200(640), 0), "{how:?}, {dead_ones} of {all}, {clients} clients");
            if matches!(how, Dead::Refusing | Dead::Unreachable) {
                let posts = steady(|| crowd(&gateway, clients, 64 / clients, "POST"));
                assert_eq!(outcome(&posts), (only_200(64), 0), "{how:?}, {dead_ones} of {all}, {clients} clients");
            }
        }
    }
}

#[test]
fn servers_that_refuse_are_not_felt() {
    dead_servers_are_not_felt(Dead::Refusing);
}

#[test]
fn servers_that_drop_connections_are_not_felt() {
    dead_servers_are_not_felt(Dead::Unreachable);
}

#[test]
fn servers_that_take_connections_and_say_nothing_are_not_felt() {
    dead_servers_are_not_felt(Dead::Silent);
}

/// From the first request on, many at one time: some wait, nobody gets an error.
#[test]
fn a_crowd_that_comes_at_once_gets_no_error() {
    for how in [Dead::Refusing, Dead::Unreachable, Dead::Silent] {
        let servers = [dead(how), dead(how), dead(how)];
        let alive = Upstream::start();
        let mut addresses: Vec<_> = servers.iter().map(|(address, _)| *address).collect();
        addresses.push(alive.address);
        let gateway = Gateway::start(addresses[0], &pool(&addresses));
        let asked = crowd(&gateway, 32, 10, "GET");
        println!("{how:?}, 3 of 4, 32 clients at once: {:?}", outcome(&asked));
        assert_eq!(outcome(&asked).0, only_200(320), "{how:?}");
    }
}

/// Runs clients until the test's body has ended; the body gets the requests so far.
fn under_load(
    gateway: &Gateway,
    clients: &[&str],
    body: impl FnOnce(&dyn Fn() -> usize),
) -> BTreeMap<String, Vec<Asked>> {
    let (stop, asked) = (AtomicBool::new(false), Mutex::new(BTreeMap::<String, Vec<Asked>>::new()));
    let count = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for (client, method) in clients.iter().enumerate() {
            let (stop, asked, count, mut caller) = (&stop, &asked, &count, Caller::of(gateway));
            scope.spawn(move || {
                for nth in 0.. {
                    if stop.load(SeqCst) {
                        return;
                    }
                    let one = caller.ask(method, &format!("{method}-{client}-{nth}"));
                    count.fetch_add(1, SeqCst);
                    asked.lock().unwrap().entry((*method).into()).or_default().push(one);
                }
            });
        }
        body(&|| count.load(SeqCst));
        stop.store(true, SeqCst);
    });
    asked.into_inner().unwrap()
}

#[test]
fn a_server_that_freezes_under_load_keeps_a_few_requests_waiting_besides_those_that_it_had() {
    let (frozen, alive) = (HttpServer::start(|_| Reply::ok("ok")), HttpServer::start(|_| Reply::ok("ok")));
    let gateway = Gateway::start(frozen.address(), &pool(&[frozen.address(), alive.address()]));
    let mut since = Instant::now();
    let mut asked = under_load(&gateway, &["GET"; 32], |count| {
        eventually("both serve", || frozen.requests() > 50 && alive.requests() > 50);
        frozen.freeze();
        since = Instant::now();
        eventually("it is found to be down", || gateway.metric(&up(frozen.address())) == 0.0);
        let before = count();
        eventually("the other one serves on", || count() > before + 500);
        frozen.thaw();
        eventually("it is found again", || gateway.metric(&up(frozen.address())) == 1.0);
        let before = frozen.requests();
        eventually("it serves again", || frozen.requests() > before + 50);
    });
    let asked = asked.remove("GET").unwrap();
    let after: Vec<_> = asked.iter().filter(|asked| asked.begun > since).cloned().collect();
    println!("frozen under load: {:?}, begun afterwards {:?}", outcome(&asked), outcome(&after));
    assert_eq!(outcome(&asked).0, only_200(asked.len()));
    // Three, and some more in a moment in which the other one has no room either. Without these rules: all clients.
    assert!(outcome(&after).1 <= 20, "{:?}", outcome(&after));
}

/// Every server is stopped, its connections cut, and started again, one after the other, without a pause.
#[test]
fn a_rolling_restart_fails_no_get_and_repeats_no_post() {
    let seen = Arc::new(Mutex::new(BTreeMap::<String, usize>::new()));
    let mut servers: Vec<_> = (0..3)
        .map(|_| {
            let seen = Arc::clone(&seen);
            HttpServer::start(move |asked| {
                let id = asked.target.rsplit('=').next().unwrap_or_default().to_owned();
                *seen.lock().unwrap().entry(id).or_default() += 1;
                // Long enough to be cut.
                Reply::ok("ok").after(Duration::from_millis(2))
            })
        })
        .collect();
    let addresses: Vec<_> = servers.iter().map(HttpServer::address).collect();
    let gateway = Gateway::start(addresses[0], &pool(&addresses));
    let clients = [["GET"; 8].as_slice(), ["POST"; 8].as_slice()].concat();
    let asked = under_load(&gateway, &clients, |count| {
        for _ in 0..4 {
            for server in &mut servers {
                let before = count();
                eventually("requests are served", || count() > before + 100);
                server.stop();
                let before = count();
                eventually("the others serve", || count() > before + 100);
                server.start_again();
            }
        }
    });
    let (gets, posts) = (&asked["GET"], &asked["POST"]);
    println!("rolling restart: GET {:?}, POST {:?}", outcome(gets), outcome(posts));
    assert_eq!(outcome(gets), (only_200(gets.len()), 0));
    let seen = seen.lock().unwrap();
    let mut cut = 0;
    for post in posts {
        assert!(matches!(post.status, 200 | 502), "{post:?}");
        let times = seen.get(&post.id).copied().unwrap_or(0);
        cut += usize::from(post.status == 502);
        // Not read to its end: the test's server had not counted it yet.
        assert!(times == 1 || (times == 0 && post.status == 502), "{post:?} was seen {times} times");
    }
    assert!(cut > 0, "nothing was cut: the test shows nothing");
}

/// A server that takes connections and closes them at once: how often is it tried?
#[test]
fn a_server_that_is_down_is_looked_at_and_not_stormed() {
    let tried = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&tried);
    let closing = HttpServer::start_raw(move |_| {
        counted.fetch_add(1, SeqCst);
    });
    let alive = Upstream::start();
    let gateway = Gateway::start(alive.address, &pool(&[closing.address(), alive.address]));
    assert_eq!(outcome(&crowd(&gateway, 1, 3, "GET")).0, only_200(3));
    let begun = Instant::now();
    let mut requests = 0;
    while begun.elapsed() < 3 * TIMEOUT || requests < 1_000 {
        let asked = crowd(&gateway, 32, 10, "GET");
        assert_eq!(outcome(&asked).0, only_200(320));
        requests += asked.len();
    }
    println!("{requests} requests in 3 s: {} connections to the server that closes them", tried.load(SeqCst));
    // Some requests that fail, and looks after 0.5, 1, 2, 4 seconds.
    assert!(tried.load(SeqCst) <= 12, "{requests} requests, {} tries", tried.load(SeqCst));
    assert_eq!(gateway.metric(&up(closing.address())), 0.0);
}

#[test]
fn the_operator_sees_a_server_go_and_come_back() {
    let mut server = HttpServer::start(|_| Reply::ok("ok"));
    let (address, alive) = (server.address(), Upstream::start());
    let gateway = Gateway::start(alive.address, &pool(&[address, alive.address]));
    for _ in 0..4 {
        assert_eq!(gateway.get(TARGET).status, 200);
    }
    assert_eq!((gateway.metric(&up(address)), gateway.metric(&up(alive.address))), (1.0, 1.0));
    server.stop();
    for _ in 0..20 {
        assert_eq!(gateway.get(TARGET).status, 200);
    }
    assert_eq!((gateway.metric(&up(address)), gateway.metric(&up(alive.address))), (0.0, 1.0));
    let outages = format!("tollgate_upstream_server_outages_total{{server=\"{address}\",upstream=\"api\"}}");
    assert_eq!(gateway.metric(&outages), 1.0);
    let lines = |part: &str| {
        let log = gateway.process_log();
        log.lines().filter(|line| line.contains(part) && line.contains(&address.to_string())).count()
    };
    eventually("its outage is logged", || (lines("is down: connect"), lines("is up again")) == (1, 0));
    let page: serde_json::Value = serde_json::from_slice(&gateway.admin_get("/upstreams").unwrap().body).unwrap();
    let (gone, well) = (&page[0]["servers"][0], &page[0]["servers"][1]);
    assert_eq!(
        (&gone["server"], &gone["up"], &gone["reason"]),
        (&address.to_string().into(), &false.into(), &"connect".into())
    );
    assert_eq!((&well["up"], &well["reason"]), (&true.into(), &serde_json::Value::Null));
    let since = gone["since"].as_str().unwrap();
    assert!(since.starts_with("20") && since.ends_with('Z') && since >= well["since"].as_str().unwrap(), "{page}");
    server.start_again();
    eventually("it is found again, without a request", || gateway.metric(&up(address)) == 1.0);
    eventually("its return is logged", || (lines("is down"), lines("is up again")) == (1, 1));
    let before = server.requests();
    for _ in 0..4 {
        assert_eq!(gateway.get(TARGET).status, 200);
    }
    assert_eq!(server.requests(), before + 2);
    // A reload without it takes its series away.
    gateway.rewrite(|text| text.replace(&format!("\"{address}\", "), ""));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    assert_eq!(gateway.get(TARGET).status, 200);
    eventually("the old pool is gone", || !gateway.metrics().contains(&address.to_string()));
}

/// The gateway, for which the system's resolver reads another file of hosts. As root, or where users may have namespaces.
fn with_hosts(hosts: &str, upstream: SocketAddr, more: &str) -> (Gateway, Folder) {
    let folder = Folder::new("hosts");
    folder.write("hosts", hosts);
    let mut program = Command::new("unshare");
    let script = format!("mount --bind {} /etc/hosts && exec \"$0\" \"$@\"", folder.file("hosts").display());
    program.args(["--map-root-user", "--mount", "sh", "-c", &script, env!("CARGO_BIN_EXE_tollgate")]);
    (Gateway::start_program(program, upstream, more), folder)
}

/// `localhost` is ::1 and 127.0.0.1, and most backends listen on one of them.
#[test]
fn a_name_with_a_dead_address_is_one_server_that_is_well() {
    for (host, family) in [("127.0.0.1", "ipv4"), ("[::1]", "ipv6")] {
        let listener = TcpListener::bind(format!("{host}:0")).unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let server = HttpServer::start_on(address, |_| Reply::ok("ok"));
        let name = format!("both.test:{}", address.port());
        let servers = pool(&[]).replace("[]", &format!("[\"{name}\"]"));
        let (gateway, _hosts) = with_hosts("127.0.0.1 both.test\n::1 both.test\n", address, &servers);
        let mut caller = Caller::of(&gateway);
        for nth in 0..20 {
            for method in ["GET", "POST"] {
                assert_eq!(caller.ask(method, &nth.to_string()).status, 200, "{family}");
            }
        }
        let metrics = gateway.metrics();
        let failed =
            metrics.lines().any(|line| line.starts_with("tollgate_upstream_errors_total") && !line.ends_with(" 0"));
        assert!(!failed, "{family}: {metrics}");
        let series = format!("tollgate_upstream_server_up{{server=\"{name}\",upstream=\"api\"}} 1");
        assert_eq!(metrics.matches("tollgate_upstream_server_up{").count(), 1, "{metrics}");
        assert!(metrics.contains(&series), "{metrics}");
        assert!(server.connections() <= 2, "{family}: connections are kept: {}", server.connections());
    }
}

#[test]
fn a_name_that_cannot_be_resolved_makes_its_server_unhealthy_and_not_the_gateway() {
    let alive = Upstream::start();
    let servers = pool(&[alive.address]).replace("servers = [", "servers = [\"no-such-name.invalid:80\", ");
    let gateway = Gateway::start(alive.address, &servers);
    assert_eq!(outcome(&crowd(&gateway, 8, 10, "POST")), (only_200(80), 0));
    let series = "tollgate_upstream_server_up{server=\"no-such-name.invalid:80\",upstream=\"api\"}";
    assert!(gateway.metrics().contains(&format!("{series} 0\n")), "{}", gateway.metrics());
    let log = gateway.process_log();
    assert!(log.contains("server no-such-name.invalid:80 is down: unresolved"), "{log}");
    // It is the only one: 503, and no gateway that does not start.
    let gateway = Gateway::start(alive.address, &servers.replace(&format!(", \"{}\"", alive.address), ""));
    assert_eq!(gateway.get(TARGET).status, 503);
}

/// Names are resolved again while the gateway runs: one that had no address, and one whose address changes.
#[test]
fn names_are_resolved_again() {
    let port = free_port();
    let at = |host: [u8; 4]| HttpServer::start_on((host, port).into(), move |_| Reply::ok(&format!("{}", host[3])));
    let (first, second) = (at([127, 0, 0, 1]), at([127, 0, 0, 2]));
    let section = pool(&[]).replace("[]", &format!("[\"moving.test:{port}\"]")) + "resolve_interval = \"1s\"\n";
    let (gateway, hosts) = with_hosts("127.0.0.9 other.test\n", first.address(), &section);
    assert_eq!(gateway.get(TARGET).status, 503);
    hosts.write("hosts", "127.0.0.1 moving.test\n");
    eventually("it has an address", || gateway.get(TARGET).status == 200);
    assert_eq!(gateway.get(TARGET).text(), "1");
    hosts.write("hosts", "127.0.0.2 moving.test\n");
    eventually("it has another address", || gateway.get(TARGET).text() == "2");
    // A resolver that fails takes nothing away.
    hosts.write("hosts", "");
    let before = second.requests();
    let begun = Instant::now();
    while begun.elapsed() < 2 * TIMEOUT {
        assert_eq!(gateway.get(TARGET).text(), "2");
    }
    assert!(second.requests() > before);
}

/// A health check over HTTP, on a port of its own: status, body and thresholds decide, and no request is needed.
#[test]
fn checks_take_a_server_away_and_bring_it_back_without_a_request() {
    let answers = Arc::new(Mutex::new((200, "ready")));
    let said = Arc::clone(&answers);
    let health = HttpServer::start(move |_| {
        let (status, body) = *said.lock().unwrap();
        Reply::new(status, &[], body)
    });
    let (checked, other) = (Upstream::start(), Upstream::start());
    let check = format!(
        "check = \"http\"\ncheck_path = \"/ready?deep=1\"\ncheck_body = \"ready\"\ncheck_port = {}\n\
         check_interval = \"100ms\"\ncheck_timeout = \"500ms\"\n",
        health.address().port()
    );
    let gateway = Gateway::start(checked.address, &(pool(&[checked.address]) + &check));
    let reason = || {
        let page: serde_json::Value = serde_json::from_slice(&gateway.admin_get("/upstreams").unwrap().body).unwrap();
        page[0]["servers"][0]["reason"].as_str().map(str::to_owned)
    };
    eventually("it is checked", || health.requests() >= 3);
    assert_eq!(reason(), None);
    let asked = health.last();
    assert_eq!(
        (asked.line.as_str(), asked.header("host")),
        ("GET /ready?deep=1 HTTP/1.1", checked.address.to_string())
    );
    assert_eq!(asked.header("private-token"), "");
    for (status, body, expected) in [(503, "ready", "check_status"), (200, "not yet", "check_body")] {
        *answers.lock().unwrap() = (status, body);
        let before = health.requests();
        eventually("it is down", || reason().as_deref() == Some(expected));
        assert!(health.requests() >= before + 2, "three checks in a row");
        // It is the only one, so it is used.
        assert_eq!(gateway.get(TARGET).status, 200);
        assert_eq!(reason().as_deref(), Some(expected), "what a check found, only a check takes back");
        *answers.lock().unwrap() = (200, "ready");
        eventually("it is up again", || reason().is_none());
    }
    // Nobody was asked for it but the check's own port.
    assert_eq!(checked.seen().len(), 2);
    // Over TCP, a server that nobody has used is found down at the start.
    let dead = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
    let gateway = Gateway::start(other.address, &(pool(&[dead, other.address]) + "check = \"tcp\"\n"));
    eventually("the dead one is found", || gateway.metric(&up(dead)) == 0.0);
    assert_eq!(gateway.metric(&up(other.address)), 1.0);
    assert_eq!(outcome(&crowd(&gateway, 8, 10, "POST")).0, only_200(80));
    assert_eq!(gateway.metric("tollgate_upstream_errors_total{kind=\"connect\",upstream=\"api\"}"), 0.0);
}

/// The entries of `servers`, as they are written.
fn listed(entries: &[String], more: &str) -> String {
    pool(&[]).replace("[]", &format!("[{}]", entries.join(", "))) + more
}

fn plain(server: &HttpServer) -> String {
    format!("\"{}\"", server.address())
}

fn with(server: &HttpServer, what: &str) -> String {
    format!("{{ address = \"{}\", {what} }}", server.address())
}

fn servers<const N: usize>() -> [HttpServer; N] {
    std::array::from_fn(|nth| HttpServer::start(move |_| Reply::ok(&nth.to_string())))
}

fn page(gateway: &Gateway) -> serde_json::Value {
    serde_json::from_slice(&gateway.admin_get("/upstreams").unwrap().body).unwrap()
}

#[test]
fn servers_get_requests_by_their_weights_and_backups_when_the_others_are_gone() {
    let [mut light, mut heavy, spare] = servers();
    let entries = [plain(&light), with(&heavy, "weight = 3"), with(&spare, "backup = true")];
    let gateway = Gateway::start(light.address(), &listed(&entries, ""));
    let asked = |count: usize| {
        let before = [light.requests(), heavy.requests(), spare.requests()];
        assert_eq!(outcome(&crowd(&gateway, 1, count, "GET")).0, only_200(count));
        let after = [light.requests(), heavy.requests(), spare.requests()];
        [0, 1, 2].map(|nth| after[nth] - before[nth])
    };
    assert_eq!(asked(40), [10, 30, 0]);
    let known = &page(&gateway)[0]["servers"];
    let weights: Vec<_> =
        (0..3).map(|nth| (known[nth]["weight"].as_u64().unwrap(), known[nth]["backup"] == true)).collect();
    assert_eq!(weights, [(1, false), (3, false), (1, true)]);
    // A reload changes the weights of servers that stay.
    gateway.rewrite(|text| text.replace("weight = 3", "weight = 1"));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    assert_eq!(asked(40), [20, 20, 0]);
    heavy.stop();
    light.stop();
    let before = spare.requests();
    assert_eq!(outcome(&crowd(&gateway, 4, 10, "POST")).0, only_200(40), "refused connections are no loss");
    assert_eq!(spare.requests(), before + 40);
    light.start_again();
    eventually("the first one is back", || gateway.metric(&up(light.address())) == 1.0);
    let before = spare.requests();
    assert_eq!(outcome(&crowd(&gateway, 4, 10, "GET")).0, only_200(40));
    assert_eq!(spare.requests(), before);
}

#[test]
fn the_server_with_fewer_requests_in_flight_gets_the_next() {
    let [quick, slow] = servers();
    slow.script(|_| Reply::ok("slow").after(Duration::from_millis(100)));
    let entries = [plain(&quick), plain(&slow)];
    let gateway = Gateway::start(quick.address(), &listed(&entries, "balance = \"least_requests\"\n"));
    assert_eq!(outcome(&crowd(&gateway, 8, 50, "GET")).0, only_200(400));
    assert!(slow.requests() * 5 < quick.requests(), "slow {}, quick {}", slow.requests(), quick.requests());
    eventually("none is in flight", || {
        let known = &page(&gateway)[0]["servers"];
        known[0]["in_flight"] == 0 && known[1]["in_flight"] == 0
    });
}

/// Requests with one key go to one server; those without it to all in turn.
#[test]
fn requests_with_the_same_key_go_to_the_same_server() {
    for (by, field) in [
        ("header:X-Project", Some("x-PROJECT: {}\n")),
        ("cookie:shard", Some("Cookie: other=1; shard={}; last=2\n")),
        ("user", None),
        ("token", None),
    ] {
        let all: [HttpServer; 4] = servers();
        let entries: Vec<_> = all.iter().map(plain).collect();
        let gateway =
            Gateway::start(all[0].address(), &listed(&entries, &format!("balance = \"hash\"\nhash = \"{by}\"\n")));
        let ask = |token: &str, field: &str| {
            let answer = gateway.ask(&format!("GET {TARGET} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {token}\n{field}\n"));
            assert_eq!(answer.status, 200);
            answer.text()
        };
        let Some(field) = field else {
            for token in [GOOD, OTHER] {
                let first = ask(token, "");
                assert!((0..10).all(|_| ask(token, "") == first), "{by}");
            }
            continue;
        };
        let owner = |key: &str| ask(GOOD, &field.replace("{}", key));
        let owners: Vec<_> = (0..40).map(|key| owner(&key.to_string())).collect();
        assert!((0..40).all(|key| owner(&key.to_string()) == owners[key]), "{by}");
        assert!((0..4).all(|nth| owners.contains(&nth.to_string())), "{by}: {owners:?}");
        let without: Vec<_> = (0..4).map(|_| ask(OTHER, "")).collect();
        assert!((0..4).all(|nth| without.contains(&nth.to_string())), "{by}: {without:?}");
        // After a restart, and on another gateway, too.
        let again =
            Gateway::start(all[0].address(), &listed(&entries, &format!("balance = \"hash\"\nhash = \"{by}\"\n")));
        let answer = again
            .ask(&format!("GET {TARGET} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\n{}\n", field.replace("{}", "7")));
        assert_eq!(answer.text(), owners[7], "{by}");
    }
}

const WAITING: &str = "tollgate_upstream_requests_waiting{upstream=\"api\"}";

/// At this moment: `Gateway::metric` waits until no request is in flight.
fn waiting(gateway: &Gateway) -> usize {
    let text = gateway.admin_get("/metrics").unwrap().text();
    text.lines().find_map(|line| line.strip_prefix(WAITING)?.trim().parse().ok()).unwrap()
}

fn in_flight(server: &HttpServer) -> String {
    format!("tollgate_upstream_server_requests_in_flight{{server=\"{}\",upstream=\"api\"}}", server.address())
}

fn failed(kind: &str) -> String {
    format!("tollgate_upstream_errors_total{{kind=\"{kind}\",upstream=\"api\"}}")
}

fn get(id: &str) -> String {
    format!("GET {TARGET}?id={id} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\n\n")
}

/// The reasons of requests in the access log, by their ids.
fn reasons(gateway: &Gateway) -> BTreeMap<String, String> {
    let lines = gateway.access_log();
    let entry = |line: &serde_json::Value| {
        (line["query"].as_str().unwrap_or_default().into(), line["reason"].as_str().unwrap_or_default().into())
    };
    lines.iter().map(entry).collect()
}

#[test]
fn no_server_has_more_requests_than_it_may() {
    let all: [HttpServer; 2] = servers();
    all.iter().for_each(|server| server.script(|_| Reply::ok("ok").after(Duration::from_millis(2))));
    for balance in ["round_robin", "least_requests", "hash"] {
        let more = format!("max_requests = 2\nbalance = \"{balance}\"\n");
        let gateway = Gateway::start(all[0].address(), &listed(&all.each_ref().map(plain), &more));
        for method in ["GET", "POST"] {
            assert_eq!(outcome(&crowd(&gateway, 16, 30, method)).0, only_200(480), "{balance} {method}");
        }
        assert_eq!(gateway.metric(WAITING), 0.0);
        assert!(all.iter().all(|server| server.most_under_way() <= 2 && gateway.metric(&in_flight(server)) == 0.0));
    }
    assert!(all.iter().all(|server| server.most_under_way() == 2), "nothing was at its bound: the test shows nothing");
}

#[test]
fn requests_wait_in_their_order_and_leave_the_queue_with_their_client() {
    let server = HttpServer::start(|_| Reply::ok("ok"));
    let more = "max_requests = 1\nqueue = 6\nqueue_timeout = \"60s\"\nread_timeout = \"60s\"\n";
    let section = listed(&[plain(&server)], more).replacen("read_timeout = \"1s\"\n", "", 1);
    let gateway = Gateway::start(server.address(), &section);
    server.freeze();
    let mut clients: Vec<Client> = Vec::new();
    for id in 0..7 {
        let mut client = gateway.client();
        // One of them brings a body that is still on its way.
        match id {
            3 => client.send_head(&format!(
                "POST {TARGET}?id=3 HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\nContent-Type: application/octet-stream\nContent-Length: 300000\n\n"
            )),
            _ => client.send_head(&get(&id.to_string())),
        }
        eventually("it waits", || waiting(&gateway) == id);
        clients.push(client);
    }
    assert_eq!(gateway.metric(&in_flight(&server)), 1.0);
    let answer = gateway.ask(&get("refused"));
    assert_eq!((answer.status, answer.header("Retry-After")), (503, Some("1")));
    assert_eq!(gateway.metric(&failed("queue_full")), 1.0);
    // Two clients go; who half-closes its connection has announced nothing, and so is gone as well.
    drop(clients.remove(5));
    eventually("a client that closes leaves the queue", || waiting(&gateway) == 5);
    clients[1].finish_sending();
    eventually("a client that stops leaves the queue", || waiting(&gateway) == 4);
    drop(clients.remove(1));
    let body = vec![b'x'; 300_000];
    let mut late = clients.remove(2);
    let sender = late.socket.try_clone().unwrap();
    let upload = std::thread::spawn(move || std::io::Write::write_all(&mut &sender, &body).unwrap());
    server.thaw();
    for client in &mut clients {
        assert_eq!(client.answer().status, 200);
    }
    assert_eq!(late.answer().status, 200);
    upload.join().unwrap();
    let order: Vec<_> =
        server.asked().iter().map(|asked| asked.target.rsplit('=').next().unwrap().to_owned()).collect();
    assert_eq!(order, ["0", "2", "3", "4", "6"]);
    assert_eq!(server.asked()[2].body.len(), 300_000);
    eventually("all are logged", || reasons(&gateway).len() == 8);
    let reasons = reasons(&gateway);
    let of = |id: &str| reasons[&format!("id={id}")].as_str();
    assert_eq!([of("refused"), of("1"), of("5"), of("6")], ["upstream_queue_full", "client_gone", "client_gone", "ok"]);
    assert_eq!((gateway.metric(WAITING), gateway.metric(&in_flight(&server))), (0.0, 0.0));
}

#[test]
fn who_waits_for_too_long_is_refused() {
    let server = HttpServer::start(|_| Reply::ok("ok"));
    let more = "max_requests = 1\nqueue_timeout = \"200ms\"\n";
    let gateway = Gateway::start(server.address(), &listed(&[plain(&server)], more).replace("1s", "60s"));
    server.freeze();
    let mut first = gateway.client();
    first.send_head(&get("first"));
    eventually("the server has it", || page(&gateway)[0]["servers"][0]["in_flight"] == 1);
    let begun = Instant::now();
    let answer = gateway.ask(&get("late"));
    assert_eq!((answer.status, answer.header("Retry-After")), (503, Some("1")));
    assert!(begun.elapsed() >= Duration::from_millis(200), "{:?}", begun.elapsed());
    assert_eq!((gateway.metric(&failed("queue_timeout")), gateway.metric(WAITING)), (1.0, 0.0));
    server.thaw();
    assert_eq!(first.answer().status, 200);
    assert_eq!(gateway.get(TARGET).status, 200);
    eventually("it is logged", || {
        reasons(&gateway).get("id=late").is_some_and(|reason| reason == "upstream_queue_timeout")
    });
    // Without a queue it is refused at once. A reload changes that for a pool that runs.
    gateway.rewrite(|text| text.replace("queue_timeout = \"200ms\"", "queue_timeout = \"60s\"\nqueue = 0"));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    server.freeze();
    first.send_head(&get("again"));
    eventually("the server has it", || page(&gateway)[0]["servers"][0]["in_flight"] == 1);
    assert_eq!(gateway.ask(&get("at-once")).status, 503);
    server.thaw();
    assert_eq!(first.answer().status, 200);
}

#[test]
fn a_try_that_takes_too_long_to_begin_goes_to_another_server_where_that_is_safe() {
    let [slow, quick] = servers();
    slow.script(|asked| match asked.target.contains("slow") {
        true => Reply::ok("late").after(Duration::from_millis(600)),
        false => Reply::ok("ok"),
    });
    let more = "per_try_timeout = \"150ms\"\n";
    let gateway = Gateway::start(slow.address(), &listed(&[plain(&slow), plain(&quick)], more));
    let mut caller = Caller::of(&gateway);
    let answers = || (0..2).for_each(|_| assert_eq!(gateway.ask(&get("plain")).status, 200));
    answers();
    for nth in 0..12 {
        let asked = caller.ask("GET", &format!("slow-{nth}"));
        assert!(asked.status == 200 && asked.took < Duration::from_millis(550), "{asked:?}");
        answers();
    }
    let tried = gateway.metric(&failed("try_timeout"));
    assert!(tried >= 3.0, "{tried}");
    assert_eq!(gateway.metric(&up(slow.address())), 1.0, "one slow URL takes no server away");
    let posts: Vec<_> = (0..12).map(|nth| caller.ask("POST", &format!("slow-post-{nth}"))).collect();
    let late = posts.iter().filter(|post| post.status == 504).count();
    assert!(late > 0 && posts.iter().all(|post| matches!(post.status, 200 | 504)), "{posts:?}");
    let seen = |server: &HttpServer| server.asked().iter().filter(|asked| asked.method == "POST").count();
    assert_eq!(seen(&slow) + seen(&quick), 12, "no POST is sent twice");
    eventually("it is logged", || {
        reasons(&gateway).values().filter(|reason| *reason == "upstream_timeout").count() == late
    });
}

#[test]
fn a_request_that_takes_too_long_as_a_whole_is_ended() {
    let hangs = HttpServer::start(|asked| match asked.target.rsplit('=').next().unwrap() {
        "begun" => Reply::ok(&"x".repeat(1000)).slowly(100, Duration::from_millis(100)),
        "hangs" => Reply::hang(),
        _ => Reply::ok("ok"),
    });
    let more = "request_timeout = \"300ms\"\nmax_requests = 1\n";
    let section = listed(&[plain(&hangs)], more).replace("1s", "60s");
    let gateway = Gateway::start(hangs.address(), &section);
    let limit = Duration::from_millis(300)..Duration::from_secs(5);
    let mut asked = Caller::of(&gateway).ask("GET", "hangs");
    assert!(asked.status == 504 && limit.contains(&asked.took), "{asked:?}");
    asked = Caller::of(&gateway).ask("GET", "quick");
    assert_eq!(asked.status, 200);
    let answer = gateway.ask(&get("begun"));
    assert!(answer.status == 200 && answer.cut, "{answer:?}");
    // A body that does not come is a part of it.
    let mut client = gateway.client();
    client.send_head(&format!("PUT {TARGET}?id=body HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\nContent-Length: 9\n\n"));
    eventually("the server has it", || page(&gateway)[0]["servers"][0]["in_flight"] == 1);
    assert_eq!(client.answer().status, 504);
    let unreachable = dead(Dead::Unreachable);
    let section = pool(&[unreachable.0]).replace("1s", "60s") + "request_timeout = \"300ms\"\n";
    let other = Gateway::start(unreachable.0, &section);
    asked = Caller::of(&other).ask("GET", "connect");
    assert!(asked.status == 504 && limit.contains(&asked.took), "{asked:?}");
    assert_eq!(other.metric(&failed("request_timeout")), 1.0);
    assert_eq!(gateway.metric(&failed("request_timeout")), 3.0);
    eventually("all are logged", || reasons(&gateway).len() == 4);
    let reasons = reasons(&gateway);
    let of = |id: &str| reasons[&format!("id={id}")].as_str();
    assert_eq!(
        ["hangs", "quick", "begun", "body"].map(of),
        ["upstream_request_timeout", "ok", "upstream_request_timeout", "upstream_request_timeout"]
    );
}

/// Servers that take requests and break off get a bounded number of them again.
#[test]
fn what_is_sent_again_is_bounded_by_a_budget() {
    let closing = || HttpServer::start(|_| Reply::raw("").then_close());
    let all = [closing(), closing()];
    let more = "retry_budget = 0.1\nretry_floor = 0\n";
    let gateway = Gateway::start(all[0].address(), &listed(&all.each_ref().map(plain), more));
    let asked = crowd(&gateway, 4, 50, "GET");
    assert_eq!(outcome(&asked).0, BTreeMap::from([(502, 200)]));
    // Looks at servers that are down are no requests.
    let gets = |server: &HttpServer| server.asked().iter().filter(|asked| asked.method == "GET").count();
    let seen = gets(&all[0]) + gets(&all[1]);
    // Ten that were saved, a tenth of 200, and as repeats are requests too, a tenth of those.
    assert!((220..=235).contains(&seen), "{seen}");
    let refused = gateway.metric("tollgate_upstream_retries_refused_total{upstream=\"api\"}");
    assert_eq!(refused, 400.0 - seen as f64);
    // Without a bound, everything is sent twice.
    let gateway = Gateway::start(all[0].address(), &listed(&all.each_ref().map(plain), "retry_budget = \"none\"\n"));
    crowd(&gateway, 4, 50, "GET");
    assert_eq!(gets(&all[0]) + gets(&all[1]) - seen, 400);
}

/// A token that is revoked while its request waits gets nothing to the backend.
#[test]
fn a_revoked_token_leaves_the_queue() {
    let server = HttpServer::start(|_| Reply::ok("ok"));
    let section = listed(&[plain(&server)], "max_requests = 1\nqueue_timeout = \"60s\"\n").replace("\"1s\"", "\"60s\"");
    let gateway = Gateway::start(server.address(), &section);
    server.freeze();
    let mut holder = gateway.client();
    holder.send_head(&get("holder").replace(GOOD, OTHER));
    eventually("the server has it", || page(&gateway)[0]["servers"][0]["in_flight"] == 1);
    let mut late = gateway.client();
    late.send_head(&get("late"));
    eventually("it waits", || waiting(&gateway) == 1);
    let tokens = std::fs::read_to_string(gateway.folder.file("tokens.toml")).unwrap();
    let (good, other) = (sha256_hex(GOOD), sha256_hex(OTHER));
    assert!(tokens.contains(&good) && tokens.contains(&other));
    gateway.folder.write("tokens.toml", &format!("[[token]]\nsha256 = \"{other}\"\nuser = \"user-0002\"\n"));
    assert_eq!(late.answer().status, 401);
    server.thaw();
    assert_eq!(holder.answer().status, 200);
    assert_eq!(server.requests(), 1);
}

#[test]
fn a_drained_server_ends_what_it_has_and_gets_nothing_new() {
    let all: [HttpServer; 2] = servers();
    let gateway = Gateway::start(
        all[0].address(),
        &(listed(&all.each_ref().map(plain), "") + "read_timeout = \"60s\"\n").replacen(
            "read_timeout = \"1s\"\n",
            "",
            1,
        ),
    );
    let post = |server: &HttpServer, what: &str| {
        gateway.admin_post(&format!("/upstreams/api/servers/{}/{what}", server.address()))
    };
    let state = |nth: usize| page(&gateway)[0]["servers"][nth].clone();
    let draining = |server: &HttpServer| {
        gateway
            .metric(&format!("tollgate_upstream_server_draining{{server=\"{}\",upstream=\"api\"}}", server.address()))
    };
    all[0].freeze();
    let mut held = gateway.client();
    held.send_head(&get("held"));
    eventually("the first one has it", || state(0)["in_flight"] == 1 && all[0].requests() == 1);
    let answer = post(&all[0], "drain");
    let said: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!((answer.status, &said["result"], &said["in_flight"]), (200, &"draining".into(), &1.into()));
    let before = all[0].requests();
    assert_eq!(outcome(&crowd(&gateway, 4, 25, "POST")).0, only_200(100));
    assert_eq!(all[0].requests(), before);
    all[0].thaw();
    assert_eq!(held.answer().status, 200);
    eventually("it has nothing left", || state(0)["in_flight"] == 0);
    assert_eq!(
        (&state(0)["draining"], &state(0)["up"], &state(1)["draining"]),
        (&true.into(), &true.into(), &false.into())
    );
    assert_eq!((draining(&all[0]), draining(&all[1])), (1.0, 0.0));
    // It outlives a reload that changes the pool.
    gateway.rewrite(|text| text.replace("[[upstream]]\n", "[[upstream]]\nmax_requests = 50\n"));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    assert_eq!(outcome(&crowd(&gateway, 4, 25, "GET")).0, only_200(100));
    assert_eq!((all[0].requests(), &state(0)["draining"]), (before, &true.into()));
    // The last one, too: the operator has said so.
    assert_eq!(post(&all[1], "drain").status, 200);
    assert_eq!(gateway.get(TARGET).status, 503);
    eventually("it is logged", || reasons(&gateway).values().any(|reason| reason == "upstream_absent"));
    assert_eq!(post(&all[0], "undrain").status, 200);
    assert_eq!(outcome(&crowd(&gateway, 4, 25, "GET")).0, only_200(100));
    assert_eq!((all[0].requests(), draining(&all[0])), (before + 100, 0.0));
    let log = gateway.process_log();
    let lines = |what: &str| log.lines().filter(|line| line.contains(&format!("{} {what}", all[0].address()))).count();
    assert_eq!((lines("is drained"), lines("is no longer drained")), (1, 1), "{log}");
    // On the command line.
    let cli = |what: &str, server: &str| {
        let config = gateway.folder.file("tollgate.toml");
        let output = tollgate().args(["server", what, "api", server, "--config"]).arg(config).output().unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr),
        )
    };
    let address = all[0].address().to_string();
    let (code, said) = cli("drain", &address);
    assert!(code == Some(0) && said.contains("gets no new requests; 0 are in flight"), "{said}");
    assert_eq!(state(0)["draining"], true);
    let (code, said) = cli("undrain", &address);
    assert!(code == Some(0) && said.contains("gets requests again"), "{said}");
    assert_eq!(state(0)["draining"], false);
    let (code, said) = cli("drain", "127.0.0.1:1");
    assert!(code == Some(1) && said.contains("404 Not Found: There is no such server"), "{said}");
}

#[test]
fn servers_are_named_in_admin_requests_as_the_configuration_names_them() {
    let alive = Upstream::start();
    let section = "[[upstream]]\nname = \"a b\"\nservers = [\"[::1]:9\", \"unix:/run/app.sock\", \"localhost:9\"]\n";
    let gateway = Gateway::start(alive.address, section);
    for (path, nth) in [
        ("/upstreams/a%20b/servers/[::1]:9/drain", 0),
        ("/upstreams/a%20b/servers/unix:/run/app.sock/drain", 1),
        ("/upstreams/%61%20b/servers/localhost%3A9/drain", 2),
    ] {
        assert_eq!(page(&gateway)[0]["servers"][nth]["draining"], false);
        assert_eq!(gateway.admin_post(path).status, 200, "{path}");
        assert_eq!(page(&gateway)[0]["servers"][nth]["draining"], true);
    }
    for (path, status) in [
        ("/upstreams/a/servers/localhost:9/drain", 404),
        ("/upstreams/a%20b/servers/localhost:8/drain", 404),
        ("/upstreams/a%20b/servers/localhost:9/drain2", 404),
        ("/upstreams/a%20b/servers/localhost:9", 404),
        ("/upstreams/a%20b/drain", 404),
        ("/upstreams", 405),
    ] {
        assert_eq!(gateway.admin_post(path).status, status, "{path}");
    }
    assert_eq!(gateway.admin_get("/upstreams/a%20b/servers/localhost:9/drain").unwrap().status, 405);
}

/// What the busy one costs somebody who asks now and then: how many of its requests were not answered with 200, and its slowest.
fn beside_a_busy_caller(order: &str) -> (usize, Duration) {
    let upstream = Upstream::answering(|_| {
        std::thread::sleep(Duration::from_millis(10));
        Reply::ok("{}")
    });
    let more = format!(
        "[[upstream]]\nname = \"api\"\nservers = [\"{}\"]\nmax_requests = 4\nqueue = 8\nqueue_order = \"{order}\"\n",
        upstream.address
    );
    let gateway = Gateway::start(upstream.address, &more);
    let done = AtomicBool::new(false);
    // A test that fails must not keep its clients.
    let deadline = Instant::now() + 3 * PATIENCE;
    std::thread::scope(|scope| {
        for _ in 0..32 {
            scope.spawn(|| {
                let mut client = gateway.client();
                while !done.load(SeqCst) && Instant::now() < deadline {
                    let head = format!("GET /api/v3/user HTTP/1.1\r\nHost: h\r\nPRIVATE-TOKEN: {OTHER}\r\n\r\n");
                    let sent = client.socket.write_all(head.as_bytes());
                    // A refusal may end the connection.
                    let answer = sent.ok().and_then(|()| client.try_answer());
                    if answer.is_none_or(|answer| answer.header("connection") == Some("close")) {
                        client = gateway.client();
                    }
                }
            });
        }
        // As soon as there is more than enough for the queue.
        eventually("the queue is full", || {
            gateway.access_log().iter().any(|line| line["reason"] == "upstream_queue_full")
        });
        let (mut refused, mut slowest) = (0, Duration::ZERO);
        for _ in 0..60 {
            let asked = Instant::now();
            refused += usize::from(gateway.get("/api/v3/user").status != 200);
            slowest = slowest.max(asked.elapsed());
        }
        done.store(true, SeqCst);
        (refused, slowest)
    })
}

#[test]
fn one_busy_caller_does_not_crowd_the_others_out() {
    let (refused, slowest) = beside_a_busy_caller("fair");
    assert_eq!(refused, 0, "the slowest took {slowest:?}");
    let (refused, _) = beside_a_busy_caller("arrival");
    assert!(refused > 10, "{refused} of 60 refused: the test has no crowd");
}

/// How many requests of two callers who ask alike a server with little room has answered. One of them has a plan.
fn two_busy_callers(has_plan: &str) -> [usize; 2] {
    let upstream = Upstream::answering(|_| {
        std::thread::sleep(Duration::from_millis(10));
        Reply::ok("{}")
    });
    let more = format!(
        "[[upstream]]\nname = \"api\"\nservers = [\"{}\"]\nmax_requests = 4\nqueue = 8\n[plan.gold]\nweight = 64\n",
        upstream.address
    );
    let token = |token: &str| {
        let plan = if token == has_plan { "plan = \"gold\"\n" } else { "" };
        format!("[[token]]\nsha256 = \"{}\"\nuser = \"{token}\"\n{plan}", sha256_hex(token))
    };
    let gateway = Gateway::start_with_tokens(upstream.address, &(token(OTHER) + &token(GOOD)), &more);
    let served = [OTHER, GOOD].map(|token| (token, AtomicUsize::new(0)));
    let until = Instant::now() + Duration::from_secs(3);
    std::thread::scope(|scope| {
        for (token, served) in (0..16).flat_map(|_| &served) {
            let gateway = &gateway;
            scope.spawn(move || {
                let mut client = gateway.client();
                while Instant::now() < until {
                    let head = format!("GET /api/v3/user HTTP/1.1\r\nHost: h\r\nPRIVATE-TOKEN: {token}\r\n\r\n");
                    let sent = client.socket.write_all(head.as_bytes());
                    let answer = sent.ok().and_then(|()| client.try_answer());
                    served.fetch_add(usize::from(answer.as_ref().is_some_and(|answer| answer.status == 200)), SeqCst);
                    // A refusal may end the connection.
                    if answer.is_none_or(|answer| answer.header("connection") == Some("close")) {
                        client = gateway.client();
                    }
                }
            });
        }
    });
    served.map(|(_, served)| served.into_inner())
}

#[test]
fn a_plan_with_a_weight_may_ask_more_before_it_comes_behind_others() {
    for has_plan in [GOOD, OTHER] {
        let [other, good] = two_busy_callers(has_plan);
        let (gold, plain) = if has_plan == GOOD { (good, other) } else { (other, good) };
        assert!(gold > 3 * plain, "{has_plan}: {gold} with the plan, {plain} without");
    }
}
