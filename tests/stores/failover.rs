//! A master of a Redis cluster fails, killed or silent, and its replica takes over: known callers notice nothing, nobody who
//! was revoked passes, and revocations of the tokens that it had work within a second again.

use super::{BOUND, Caller, Config, servers_in_use};
use crate::harness::*;
use crate::servers::Server as _;
use crate::servers::redis::{Cluster, Redis};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// From the promotion to the first notification: an attempt that is under way, a pause, and the next attempt. Documented.
const FOLLOWED: Duration = Duration::from_secs(3);

/// The node that has a token.
fn owner(cluster: &Cluster, token: &str) -> usize {
    let key = format!("tollgate:token:{}", sha256_hex(token));
    cluster.nodes.iter().position(|node| node.try_cli(&["EXISTS", &key]) == "1").expect("a master that has it")
}

fn is_master(node: &Redis) -> bool {
    node.try_cli(&["INFO", "replication"]).contains("role:master")
}

/// Whether the replica has everything by now: what it lacks, a failover loses.
fn is_replicated(master: &Redis) -> bool {
    let info = master.cli(&["INFO", "replication"]);
    let own = info.lines().find_map(|line| line.trim().strip_prefix("master_repl_offset:")).expect("an offset");
    info.contains(&format!("offset={own},"))
}

fn replica_follows(fault: &str, fail: fn(&mut Redis), mend: fn(&mut Redis)) {
    let mut cluster = Cluster::with_replicas();
    let servers: Vec<String> = cluster.nodes.iter().map(|node| format!("{:?}", node.address())).collect();
    let section = format!(
        "[store]\nkind = \"redis\"\ntopology = \"cluster\"\nservers = [{}]\ntimeout = \"1s\"\n",
        servers[..3].join(", ")
    );
    let config = Config::new(&section);
    let tokens = |kind: &str, count| (0..count).map(|number| format!("{kind}-{number:02}")).collect::<Vec<String>>();
    let (known, gone, doomed) = (tokens("known", 30), tokens("gone", 12), tokens("doomed", 60));
    config.import(&[known.clone(), gone.clone(), doomed.clone()].concat());
    let upstream = Upstream::start();
    let more = format!("{section}[cache]\npositive_ttl = \"10m\"\n[log]\naccess = \"off\"\n");
    let gateway = Gateway::start(upstream.address, &more);
    let heard = || gateway.process_log().matches("change notifications are arriving").count();
    eventually("the cluster is followed", || heard() == 1);
    let masters = || cluster.nodes.iter().filter(|node| is_master(node)).map(Redis::address).collect();
    assert_eq!(servers_in_use(&gateway), masters(), "{fault}: a series for each master");
    let mut caller = Caller::of(&gateway);
    for token in [&known[..], &gone, &doomed].concat() {
        assert_eq!(caller.status(&token), 200, "{token}");
    }
    let failing = owner(&cluster, &known[0]);
    let on_it: Vec<&String> = doomed.iter().filter(|token| owner(&cluster, token) == failing).collect();
    let (early, late) = on_it.split_at(on_it.len() / 2);
    assert!(early.len() > 2 && gone.iter().any(|token| owner(&cluster, token) == failing), "{on_it:?}");
    for token in &gone {
        config.tollgate(&["token", "revoke"], &[&sha256_hex(token), "--wait"]).unwrap();
        assert_eq!(caller.status(token), 401, "{token}: revoked, and confirmed");
    }
    eventually("the replica has everything", || is_replicated(&cluster.nodes[failing]));

    let (over, failed) = (AtomicBool::new(false), Instant::now());
    let (slowest, count) = std::thread::scope(|scope| {
        let known_callers = scope.spawn(|| {
            let (mut caller, mut slowest, mut count) = (Caller::of(&gateway), Duration::ZERO, 0);
            while !over.load(Ordering::Relaxed) {
                for token in &known {
                    let before = Instant::now();
                    assert_eq!(caller.status(token), 200, "{fault}: {token} after {:?}", failed.elapsed());
                    slowest = slowest.max(before.elapsed());
                    count += 1;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            (slowest, count)
        });
        let revoked = scope.spawn(|| {
            let mut caller = Caller::of(&gateway);
            while !over.load(Ordering::Relaxed) {
                for token in &gone {
                    assert_ne!(caller.status(token), 200, "{fault}: {token} after {:?}", failed.elapsed());
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        // Ends the others also when an assertion fails.
        let over = Over(&over);
        fail(&mut cluster.nodes[failing]);
        // What is confirmed has been applied. As a rule nothing is, until the replica has taken over.
        let first = early[0];
        if config.tollgate(&["token", "revoke"], &[&sha256_hex(first), "--wait"]).is_ok() {
            assert_eq!(caller.status(first), 401, "{fault}: confirmed");
        }
        eventually("the replica takes over", || {
            cluster.nodes[3..]
                .iter()
                .any(|node| is_master(node) && node.try_cli(&["CLUSTER", "INFO"]).contains("state:ok"))
        });
        let promoted = Instant::now();
        eventually("the gateway follows it", || heard() == 2);
        let followed = promoted.elapsed();
        assert!(followed < FOLLOWED, "{fault}: {followed:?}");
        println!("cluster, {fault}: promoted after {:.1?}, followed {followed:.1?} later", promoted - failed);
        let work = |caller: &mut Caller, tokens: &[&String]| {
            for token in tokens {
                config.revoke(token);
                let revoked = Instant::now();
                while caller.status(token) == 200 {
                    assert!(revoked.elapsed() < BOUND, "{fault}: {token} works for {:?}", revoked.elapsed());
                }
                assert_eq!(caller.status(token), 401, "{fault}: {token}");
            }
        };
        work(&mut caller, early);
        config.tollgate(&["token", "revoke"], &[&sha256_hex(late[0]), "--wait"]).unwrap();
        assert_eq!(caller.status(late[0]), 401, "{fault}: confirmed");
        let promoted = cluster.nodes[3..].iter().filter(|node| is_master(node));
        let others = (0..3).filter(|index| *index != failing).map(|index| &cluster.nodes[index]);
        let masters = others.chain(promoted).map(Redis::address).collect();
        assert_eq!(servers_in_use(&gateway), masters, "{fault}: those that are masters now");
        mend(&mut cluster.nodes[failing]);
        eventually("the old master follows", || !is_master(&cluster.nodes[failing]));
        work(&mut caller, &late[1..]);
        drop(over);
        revoked.join().unwrap();
        known_callers.join().unwrap()
    });
    assert!(!gateway.process_log().contains(" redis::"), "{fault}: the library's own lines");
    println!("cluster, {fault}: {count} requests with known tokens 200, the slowest {slowest:.0?}");
    assert!(slowest < Duration::from_secs(1), "{fault}: {slowest:?}");
}

struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn the_replica_of_a_killed_master_is_followed() {
    replica_follows("killed", |node| node.stop(), |node| node.start_again());
}

#[test]
fn the_replica_of_a_silent_master_is_followed() {
    replica_follows("silent", |node| node.freeze(), |node| node.thaw());
}
