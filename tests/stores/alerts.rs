//! A real Prometheus with the rules of deploy/, minutes as seconds, scrapes gateways whose stores have a fault each: for every
//! fault exactly the alert that names it fires. docs/operations.md has the table.

use super::{Backing, Config, Embedded, Introspected, PostgresGitlab, PostgresOwn, RedisOwn};
use crate::harness::*;
use crate::servers::http::{HttpServer, Reply};
use crate::servers::postgres::Postgres;
use crate::servers::prometheus::Prometheus;
use crate::servers::redis::{Cluster, Redis};
use crate::servers::{Fault, Server as _};
use crate::support::get;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long the alerts of all gateways must be right together.
const STEADY: Duration = Duration::from_secs(4);
/// After the faults.
const PATIENCE: Duration = Duration::from_secs(120);

/// With the rules of deploy/, 60 times as fast.
fn scraping(gateways: &[&Gateway]) -> Prometheus {
    let folder = Folder::new("prometheus");
    let rules = std::fs::read_to_string("deploy/prometheus/alerts.yml").unwrap();
    let minutes = |text: &str| -> String {
        let mut out = String::new();
        let mut letters = text.chars().peekable();
        while let Some(letter) = letters.next() {
            let ends = letters.peek().is_none_or(|next| !next.is_alphanumeric());
            match letter {
                'm' if ends && out.ends_with(|c: char| c.is_ascii_digit()) => out.push('s'),
                'h' if ends && out.ends_with(|c: char| c.is_ascii_digit()) => out.push('m'),
                letter => out.push(letter),
            }
        }
        out
    };
    let fast = minutes(&rules);
    assert!(fast.contains("[5s]") && fast.contains("for: 1s") && !fast.contains("[5m]"), "{fast}");
    folder.write("alerts.yml", &fast);
    let targets: Vec<String> = gateways.iter().map(|gateway| gateway.admin.to_string()).collect();
    Prometheus::start(folder, &targets, &["alerts.yml"])
}

/// The alerts that fire now for each gateway.
fn firing(prometheus: &Prometheus, gateways: &[&Gateway]) -> Vec<BTreeSet<String>> {
    let answer = prometheus.api("alerts");
    let alerts = answer["data"]["alerts"].as_array().unwrap();
    let of = |gateway: &&Gateway| {
        let instance = gateway.admin.to_string();
        let fires = |alert: &&serde_json::Value| alert["state"] == "firing" && alert["labels"]["instance"] == *instance;
        let name = |alert: &serde_json::Value| alert["labels"]["alertname"].as_str().unwrap().to_owned();
        alerts.iter().filter(fires).map(name).collect()
    };
    gateways.iter().map(of).collect()
}

/// A gateway with the fault of its store.
struct Case {
    fault: &'static str,
    alerts: &'static [&'static str],
    gateway: Gateway,
    /// Brings the fault about, again and again where that is what it is.
    inject: Box<dyn FnMut() + Send>,
}

fn known() -> Vec<String> {
    (0..20).map(|number| format!("known-{number}")).collect()
}

fn case(
    fault: &'static str,
    alerts: &'static [&'static str],
    backend: &HttpServer,
    section: &str,
    inject: impl FnMut() + Send + 'static,
) -> Case {
    let more = format!("{section}[cache]\npositive_ttl = \"2s\"\nnegative_ttl = \"1s\"\n[log]\naccess = \"off\"\n");
    Case { fault, alerts, gateway: Gateway::start(backend.address(), &more), inject: Box::new(inject) }
}

/// A store on a server, into which one fault is injected once.
fn broken(
    fault: &'static str,
    alerts: &'static [&'static str],
    backend: &HttpServer,
    mut store: Box<dyn Backing + Send>,
    mut inject: impl FnMut(&mut dyn Backing) + Send + 'static,
) -> Case {
    store.add(&known());
    let section = store.section();
    case(fault, alerts, backend, &section, move || inject(&mut *store))
}

/// A Redis server that takes no writes any more.
fn unwritable(fault: &'static str, backend: &HttpServer, inject: fn(&Redis)) -> Case {
    let (mut store, mut done) = (RedisOwn::new(), false);
    store.add(&known());
    let section = store.section();
    case(fault, &["TollgateStoreNotWritable"], backend, &section, move || {
        if !std::mem::replace(&mut done, true) {
            inject(&store.server);
        }
    })
}

/// A cluster of which one master fails, and no replica takes its place.
fn incomplete(fault: &'static str, backend: &HttpServer, inject: fn(&mut Redis)) -> Case {
    let (mut cluster, mut done) = (Cluster::start(), false);
    let servers: Vec<String> = cluster.nodes.iter().map(|node| format!("\"{}\"", node.address())).collect();
    let servers = servers.join(", ");
    let section =
        format!("[store]\nkind = \"redis\"\ntopology = \"cluster\"\nservers = [{servers}]\ntimeout = \"1s\"\n");
    Config::new(&section).import(&known());
    case(fault, &["TollgateStoreClusterIncomplete"], backend, &section, move || {
        if !std::mem::replace(&mut done, true) {
            inject(&mut cluster.nodes[0]);
        }
    })
}

/// Tokens that are known, and a few that are not, at a rate that nobody takes for an attack.
fn callers(address: std::net::SocketAddr, over: &AtomicBool) {
    let mut client = Client::connect(address);
    for number in 0.. {
        if over.load(Ordering::Relaxed) {
            return;
        }
        let token = if number % 6 == 0 { format!("nobody-{number}") } else { format!("known-{}", number % 20) };
        client.send_head(&get(&token, "/api/v3/user"));
        let answer = client.answer();
        if answer.header("Connection").is_some_and(|value| value.eq_ignore_ascii_case("close")) {
            client = Client::connect(address);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn once(mut work: impl FnMut(&mut dyn Backing) + Send + 'static) -> impl FnMut(&mut dyn Backing) + Send {
    let mut done = false;
    move |store| {
        if !std::mem::replace(&mut done, true) {
            work(store);
        }
    }
}

#[test]
fn every_fault_of_a_store_fires_the_alert_that_names_it_and_no_other() {
    let backend = HttpServer::start(|_| Reply::ok("{\"ok\":true}"));
    let stop = || once(|store| assert!(store.inject(Fault::Stop)));
    let freeze = || once(|store| assert!(store.inject(Fault::Freeze)));
    let mut seldom = 0;
    let flapping = move |store: &mut dyn Backing| {
        seldom += 1;
        if seldom % 8 == 0 {
            store.inject(Fault::Cut);
        }
    };
    let garbage = Config::new("");
    let tokens: Vec<String> = known().iter().map(|token| sha256_hex(token)).collect();
    let gitlab = |more: &str, triggers: &str| {
        let mut store = PostgresGitlab::new();
        store.add(&known());
        store.server.psql("postgres", triggers);
        let section = format!("{}{more}", store.section());
        (store, section)
    };
    let drop_triggers = "DROP SCHEMA tollgate CASCADE";
    let (_untold, untold_section) = gitlab("", drop_triggers);
    let (_elsewhere, elsewhere_section) = gitlab("channel = \"another\"\n", "SELECT 1");
    let mut redis = RedisOwn::new();
    redis.add(&known());
    redis.server.cli(&["ACL", "SETUSER", "deaf", "on", "nopass", "~*", "resetchannels", "+@all", "-subscribe"]);
    let denied_section = format!("{}username = \"deaf\"\npassword_file = \"password\"\n", redis.section());
    let denied_password = garbage.folder.write("password", "anything");
    let denied_section = denied_section.replace("\"password\"", &format!("\"{}\"", denied_password.display()));
    let mut spoiled = RedisOwn::new();
    spoiled.add(&known());
    for token in &tokens[..1] {
        spoiled.server.cli(&["SET", &format!("tollgate:token:{token}"), "{\"user\":7}"]);
    }
    let primary = Postgres::start();
    let primary_config = Config::new(&PostgresOwn::section_for(&primary));
    primary_config.tollgate(&["store", "migrate"], &[]).unwrap();
    primary_config.import(&known());
    let empty_section = format!("{}schema = \"empty\"\n", PostgresOwn::section_for(&primary));
    let standby = primary.standby();
    let standby_section = PostgresOwn::section_for(&standby);
    let mut removed = PostgresOwn::new();
    let mut file = Embedded::new("file");
    file.add(&known());
    let (file_section, file_path) = (file.section(), file.path.clone());
    removed.add(&known());
    let (mut evicting, mut filled) = (RedisOwn::new(), 0);
    evicting.add(&known());
    evicting.server.cli(&["CONFIG", "SET", "maxmemory-policy", "volatile-lru", "maxmemory", "4mb"]);
    let evicting_section = evicting.section();
    let (mut off, mut is_off) = (PostgresOwn::new(), false);
    off.add(&known());
    let off_section = off.section();
    let mut instead = Embedded::new("sqlite");
    instead.add(&known());

    let mut cases = vec![
        broken("none", &[], &backend, Box::new(PostgresOwn::new()), |_| {}),
        broken("PostgreSQL is down", &["TollgateStoreFailing"], &backend, Box::new(PostgresOwn::new()), stop()),
        broken(
            "PostgreSQL does not answer",
            &["TollgateStoreFailing"],
            &backend,
            Box::new(PostgresOwn::new()),
            freeze(),
        ),
        broken("Redis is down", &["TollgateStoreFailing"], &backend, Box::new(RedisOwn::new()), stop()),
        broken("Redis does not answer", &["TollgateStoreFailing"], &backend, Box::new(RedisOwn::new()), freeze()),
        broken("the endpoint is down", &["TollgateStoreFailing"], &backend, Box::new(Introspected::new()), stop()),
        broken(
            "connections are cut again and again",
            &["TollgateStoreSubscriptionFlaps"],
            &backend,
            Box::new(RedisOwn::new()),
            flapping,
        ),
        case("a trigger is switched off", &["TollgateStoreNoTriggers"], &backend, &off_section, move || {
            if !std::mem::replace(&mut is_off, true) {
                off.server.psql("postgres", "ALTER TABLE tollgate.token DISABLE TRIGGER tollgate_altered");
            }
        }),
        case("no triggers", &["TollgateStoreNoTriggers"], &backend, &untold_section, || {}),
        case("triggers for another channel", &["TollgateStoreNoTriggers"], &backend, &elsewhere_section, || {}),
        case("only a standby", &["TollgateStoreStandby"], &backend, &standby_section, || {}),
        case("no right to subscribe", &["TollgateStoreDenied"], &backend, &denied_section, || {}),
        case("keys are evicted", &["TollgateStoreEvicts"], &backend, &evicting_section, move || {
            filled += 1;
            // Only keys with an end are removed, so that nobody is refused meanwhile.
            evicting.server.cli(&["SET", &format!("filler:{filled}"), &"x".repeat(100_000), "EX", "3600"]);
        }),
        unwritable("Redis is out of memory", &backend, |server| drop(server.cli(&["CONFIG", "SET", "maxmemory", "1"]))),
        unwritable("Redis cannot save", &backend, |server| {
            // A folder in the place of the file that is to be written.
            std::fs::create_dir(server.socket().with_file_name("dump.rdb")).unwrap();
            server.cli(&["CONFIG", "SET", "save", "3600 1000000"]);
            server.cli(&["BGSAVE"]);
        }),
        unwritable("Redis has too few replicas", &backend, |server| {
            server.cli(&["CONFIG", "SET", "min-replicas-to-write", "1"]);
        }),
        incomplete("a master of a cluster is down", &backend, |node| node.stop()),
        incomplete("a master of a cluster does not answer", &backend, |node| node.freeze()),
        case("tables are missing", &["TollgateStoreFailing"], &backend, &empty_section, || {}),
        case("a record that cannot be read", &["TollgateStoreRecordInvalid"], &backend, &spoiled.section(), || {}),
        case("an invalid token file", &["TollgateStoreFileBroken"], &backend, &file_section, move || {
            std::fs::write(&file_path, "[[token").unwrap();
        }),
        case("a store that was down is removed by a reload", &[], &backend, &removed.section(), || {}),
    ];
    assert_eq!(cases.len(), 22);
    let over = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = cases
        .iter()
        .map(|case| (case.gateway.address, Arc::clone(&over)))
        .map(|(address, over)| std::thread::spawn(move || callers(address, &over)))
        .collect();
    let prometheus = scraping(&cases.iter().map(|case| &case.gateway).collect::<Vec<_>>());
    // Healthy at first, so that nothing is left of the start.
    std::thread::sleep(Duration::from_secs(2));
    removed.inject(Fault::Stop);
    std::thread::sleep(Duration::from_secs(3));
    let last = cases.last().unwrap();
    last.gateway.rewrite(|text| text.replace(&removed.section(), &instead.section()));
    assert_eq!(last.gateway.admin_post("/reload").status, 200);

    let (began, mut right_since) = (Instant::now(), None::<Instant>);
    loop {
        cases.iter_mut().for_each(|case| (case.inject)());
        std::thread::sleep(Duration::from_millis(250));
        let firing = firing(&prometheus, &cases.iter().map(|case| &case.gateway).collect::<Vec<_>>());
        let wrong: Vec<String> = cases
            .iter()
            .zip(&firing)
            .filter(|(case, firing)| !firing.iter().map(String::as_str).eq(case.alerts.iter().copied()))
            .map(|(case, firing)| format!("{}: {firing:?} where {:?} is expected", case.fault, case.alerts))
            .collect();
        if wrong.is_empty() {
            if right_since.get_or_insert_with(Instant::now).elapsed() > STEADY {
                break;
            }
        } else {
            right_since = None;
        }
        assert!(began.elapsed() < PATIENCE, "{}", wrong.join("\n"));
    }
    over.store(true, Ordering::Relaxed);
    // The document's rows, in their order: what it says of metrics and log lines is there as well.
    let document = std::fs::read_to_string("docs/operations.md").unwrap();
    let table = document.split("### What a fault of a store looks like").nth(1).unwrap();
    let rows: Vec<Vec<&str>> = table
        .lines()
        .skip_while(|line| !line.starts_with("|---"))
        .skip(1)
        .take_while(|line| line.starts_with('|'))
        .map(|line| line.trim_matches('|').split(" | ").map(str::trim).collect())
        .collect();
    assert_eq!(rows.len(), cases.len());
    for (row, case) in rows.iter().zip(&cases) {
        let [fault, metric, alerts, line] = row[..] else { panic!("{row:?}") };
        let fires = if case.alerts.is_empty() { "none".to_owned() } else { case.alerts.join(", ") };
        assert_eq!((fault, alerts), (case.fault, fires.as_str()));
        let (log, metrics) = (case.gateway.process_log(), case.gateway.metrics());
        assert!(log.contains(line.trim_matches('`')), "{fault}: {line}: {log}");
        let (name, label) = metric.trim_matches('`').split_once('{').unwrap_or((metric.trim_matches('`'), ""));
        let has = |series: &str| series.starts_with(name) && series.contains(label.trim_end_matches('}'));
        assert!(metric == "none" || metrics.lines().any(has), "{fault}: {metric}: {metrics}");
        println!("| {fault} | {metric} | {alerts} | {line} |");
    }
    for thread in threads {
        thread.join().unwrap();
    }
}
