//! PostgreSQL with several servers, and with several configurations: lookups use the server that the subscription is on, and
//! only `store migrate` changes the channel. The metrics name the server in use, of Redis as well.

use super::{BOUND, Backing as _, Caller, Config, PostgresGitlab, PostgresOwn, RedisOwn, servers_in_use};
use crate::harness::*;
use crate::servers::postgres::signal;
use crate::servers::{Fault, Server as _};
use crate::support::{run, stderr, stdout};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

const MORE: &str = "[cache]\npositive_ttl = \"10m\"\n[log]\naccess = \"off\"\n";

/// Revokes a token and sends requests until it is refused, and for a while after that.
fn refused_in_time(store: &PostgresOwn, gateway: &Gateway, token: &str) {
    let mut caller = Caller::of(gateway);
    assert_eq!(caller.status(token), 200, "{token}");
    store.revoke(token);
    let revoked = Instant::now();
    let mut last = revoked;
    while caller.status(token) == 200 {
        last = Instant::now();
        assert!(last - revoked < PATIENCE, "{token} still works");
    }
    let lag = last - revoked;
    assert!(lag < BOUND, "{token} worked for {lag:?}");
    // A new lookup does not return the old row.
    while revoked.elapsed() < BOUND * 2 {
        assert_eq!(caller.status(token), 401, "{token}");
    }
}

#[test]
fn a_late_standby_among_the_hosts_brings_no_revoked_token_back() {
    let mut store = PostgresOwn::new();
    let tokens: Vec<String> = (0..4).map(|number| format!("token-{number}")).collect();
    store.add(&tokens);
    let standby = store.server.late_standby();
    let upstream = Upstream::start();
    for (number, ports) in
        [[standby.port(), store.server.port()], [store.server.port(), standby.port()]].into_iter().enumerate()
    {
        let [first, second] = ports;
        let section = format!(
            "[store]\nkind = \"postgres\"\nurl = \"postgres://postgres@127.0.0.1:{first},127.0.0.1:{second}/postgres\"\n\
             timeout = \"1s\"\n"
        );
        let gateway = Gateway::start(upstream.address, &format!("{section}{MORE}"));
        let in_use =
            format!("tollgate_store_server_info{{server=\"127.0.0.1:{}\",store=\"postgres\"}}", store.server.port());
        eventually("the primary is named as the server in use", || gateway.metric(&in_use) == 1.0);
        for token in &tokens[number * 2..number * 2 + 2] {
            refused_in_time(&store, &gateway, token);
        }
    }
}

/// No series of a server is left when it is down, or when a reload names another.
#[test]
fn the_server_in_use_of_redis_is_in_the_metrics() {
    let (mut first, second) = (RedisOwn::new(), RedisOwn::new());
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, &format!("{}{MORE}", first.section()));
    let in_use = |server: &RedisOwn| BTreeSet::from([server.server.address()]);
    eventually("the first server is named", || servers_in_use(&gateway) == in_use(&first));
    first.inject(Fault::Stop);
    eventually("no server is named", || servers_in_use(&gateway).is_empty());
    first.inject(Fault::Start);
    eventually("the first server is named again", || servers_in_use(&gateway) == in_use(&first));
    gateway.rewrite(|text| text.replace(&first.section(), &second.section()));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    eventually("the second server is named", || servers_in_use(&gateway) == in_use(&second));
}

/// A server that says nothing for a little longer than it takes to find the subscription silent. That alone does not make an
/// old answer good: the token was revoked meanwhile, and lookups are answered in time.
#[test]
fn a_silent_subscription_brings_no_revoked_token_back() {
    const ROUNDS: usize = 5;
    let mut store = PostgresOwn::new();
    let tokens: Vec<String> = (0..ROUNDS).map(|number| format!("token-{number}")).collect();
    store.add(&tokens);
    let upstream = Upstream::start();
    let section = store.section().replace("timeout = \"1s\"", "timeout = \"3s\"");
    let gateway = Gateway::start(upstream.address, &format!("{section}{MORE}"));
    let subscribed = || gateway.metric("tollgate_store_subscribed{store=\"postgres\"}") == 1.0;
    // Not by the metric, which is read when no request is in flight.
    let silences = || gateway.process_log().matches("the server sent nothing").count();
    for (round, token) in tokens.iter().enumerate() {
        eventually("it is subscribed", subscribed);
        let mut caller = Caller::of(&gateway);
        assert_eq!(caller.status(token), 200, "{token}");
        let processes = store.server.psql(
            "postgres",
            "SELECT string_agg(pid::text, ' ') FROM pg_stat_activity WHERE application_name LIKE 'tollgate%'",
        );
        let processes: Vec<u32> = processes.split(' ').map(|pid| pid.parse().unwrap()).collect();
        signal("STOP", &processes);
        store.server.psql(
            "postgres",
            &format!("UPDATE tollgate.token SET revoked = 1 WHERE digest = '\\x{}'", sha256_hex(token)),
        );
        // With all who could answer a new connection.
        store.server.freeze();
        let (revoked, mut last) = (Instant::now(), Instant::now());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                eventually("the subscription is found silent", || silences() > round);
                std::thread::sleep(Duration::from_millis(600));
                store.server.thaw();
            });
            while caller.status(token) == 200 {
                last = Instant::now();
                assert!(last - revoked < PATIENCE, "{token} still works");
            }
        });
        assert!(last - revoked < BOUND, "{token} worked for {:?}", last - revoked);
    }
}

#[test]
fn commands_with_another_channel_leave_the_channel_alone_and_migrate_says_that_it_does_not() {
    let mut store = PostgresOwn::new();
    let tokens: Vec<String> = (0..3).map(|number| format!("token-{number}")).collect();
    store.add(&tokens);
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, &format!("{}{MORE}", store.section()));
    refused_in_time(&store, &gateway, &tokens[0]);
    let other = Config::new(&format!("{}channel = \"other\"\n", PostgresOwn::section_for(&store.server)));
    let id = sha256_hex(&tokens[0]);
    other.tollgate(&["token", "list"], &[]).unwrap();
    other.tollgate(&["token", "show"], &[&id]).unwrap();
    refused_in_time(&store, &gateway, &tokens[1]);
    let said = run(tollgate().args(["store", "migrate", "--config"]).arg(&other.path));
    assert!(said.status.success(), "{}", stderr(&said));
    assert!(stdout(&said).contains("\"tollgate_change\" before, \"other\" now"), "{}", stdout(&said));
    refused_in_time(&store, &gateway, &tokens[2]);
}

/// The log tells the operator about the change, with both channels.
#[test]
fn the_log_names_channels_that_differ_and_triggers_of_an_older_making() {
    let own = PostgresOwn::new();
    let gitlab = PostgresGitlab::new();
    // As an older version created it.
    gitlab.server.psql(
        "postgres",
        "DO $$ DECLARE f regprocedure; BEGIN FOR f IN SELECT oid FROM pg_proc WHERE pronamespace = 'tollgate'::regnamespace
         LOOP EXECUTE format('ALTER FUNCTION %s RESET ALL', f); END LOOP; END $$",
    );
    let upstream = Upstream::start();
    let said = |section: &str, channel: &str, parts: &[&str]| {
        let section = section.replace("timeout", &format!("channel = \"{channel}\"\ntimeout"));
        let gateway = Gateway::start(upstream.address, &format!("{section}{MORE}"));
        eventually("the log says so", || parts.iter().all(|part| gateway.process_log().contains(part)));
    };
    said(
        &own.section(),
        "other",
        &["on channel \"tollgate_change\"", "configuration says \"other\"", "change notifications are arriving"],
    );
    said(&gitlab.section, "tollgate_change", &["of an older version", "change notifications are arriving"]);
    said(
        &gitlab.section,
        "other",
        &["tell on channel \"other\" (there are some that tell on \"tollgate_change\"", "install-triggers"],
    );
}

/// The log says which trigger is off and what turns it on, and the metric says that nothing is promised meanwhile.
#[test]
fn the_log_names_a_trigger_that_is_off() {
    let mut store = PostgresOwn::new();
    store.add(&["known".into()]);
    let gitlab = PostgresGitlab::new();
    let upstream = Upstream::start();
    for (server, name, section, table, trigger) in [
        (&store.server, "postgres", store.section(), "\"tollgate\".token", "tollgate_altered"),
        (&gitlab.server, "gitlab-pat", gitlab.section.clone(), "public.users", "tollgate_owner_"),
    ] {
        let gateway = Gateway::start(upstream.address, &format!("{section}{MORE}"));
        let subscribed = || gateway.metric(&format!("tollgate_store_subscribed{{store=\"{name}\"}}"));
        eventually("it is subscribed", || subscribed() == 1.0);
        let found = server.psql(
            "postgres",
            &format!(
                "SELECT tgname FROM pg_trigger WHERE tgrelid = '{table}'::regclass AND starts_with(tgname, '{trigger}') \
                 AND tgname NOT LIKE '%gone%'"
            ),
        );
        server.psql("postgres", &format!("ALTER TABLE {table} DISABLE TRIGGER {found}"));
        eventually("nothing is promised", || subscribed() == 0.0);
        let command = format!("TRIGGER {found}");
        std::thread::sleep(Duration::from_secs(4));
        println!("{}", gateway.process_log());
        eventually("the log names the trigger", || {
            let log = gateway.process_log();
            log.lines().any(|line| line.contains("ALTER TABLE") && line.contains(&command) && line.contains("is off"))
        });
        let log = gateway.process_log();
        let (_, command) = log.split_once("`ALTER TABLE ").unwrap();
        server.psql("postgres", &format!("ALTER TABLE {}", command.split_once('`').unwrap().0));
        eventually("it is subscribed again", || subscribed() == 1.0);
    }
}

/// `revoke --wait` does not wait for a gateway that was stopped, nor for the store that a reload replaced.
#[test]
fn gateways_that_stop_or_move_on_leave_the_register() {
    let mut store = PostgresOwn::new();
    store.add(&["known".into()]);
    let upstream = Upstream::start();
    let mut gateway = Gateway::start(upstream.address, &format!("{}{MORE}", store.section()));
    let registered = || store.server.psql("postgres", "SELECT string_agg(id, ' ') FROM tollgate.replica");
    eventually("it is registered", || !registered().is_empty());
    let first = registered();
    gateway.rewrite(|config| config.replace("timeout = \"1s\"", "timeout = \"2s\""));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    eventually("the new store is registered, and the old one is not", || {
        let now = registered();
        !now.is_empty() && !now.contains(&first)
    });
    gateway.signal("TERM");
    assert!(gateway.ended().success());
    assert_eq!(registered(), "");
}
