//! What a Redis server says of its own settings, by which valid tokens get lost or change notifications stay out.

use super::super::examine::Finding;
use super::follow::{KEYSPACE_EVENTS, missing_events};
use super::link::{Connector, RedisConnection};
use super::{RedisChanges, RedisSettings, Topology};
use std::time::SystemTime;

impl RedisSettings {
    /// Asks the server, the master, or every master of a cluster.
    pub(in crate::store) async fn examine(&self) -> Vec<Finding> {
        let connector = match Connector::new(self) {
            Ok(connector) => connector,
            Err(problem) => return vec![Finding::error(problem.to_string(), "")],
        };
        let nodes = match connector.topology() {
            Topology::Cluster => connector.masters().await,
            Topology::Single | Topology::Sentinel { .. } => connector.open().await.map(|link| vec![link]),
        };
        let nodes = match nodes {
            Ok(nodes) => nodes,
            Err(error) => return vec![Finding::error(format!("no connection: {error}"), "")],
        };
        let (count, mut found) = (nodes.len(), Vec::new());
        for (index, mut node) in nodes.into_iter().enumerate() {
            let mut of_node = self.examine_node(&mut node).await;
            if count > 1 {
                of_node.iter_mut().for_each(|one| one.what = format!("master {} of {count}: {}", index + 1, one.what));
            }
            found.extend(of_node);
        }
        found
    }

    async fn examine_node(&self, node: &mut RedisConnection) -> Vec<Finding> {
        let mut found = vec![clock(node).await];
        let config = |setting| redis::cmd("CONFIG").arg("GET").arg(setting).take();
        let settings = [
            ("maxmemory-policy", false),
            ("appendonly", false),
            ("notify-keyspace-events", self.changes != RedisChanges::Keyspace),
        ];
        for (name, skipped) in settings {
            if skipped {
                continue;
            }
            match node.ask::<Vec<(String, String)>>(&config(name)).await {
                Ok(answer) => {
                    let value = answer.into_iter().next().map(|(_, value)| value).unwrap_or_default();
                    found.push(match name {
                        "maxmemory-policy" => policy(node, &value).await,
                        "appendonly" => persistence(node, &value).await,
                        _ => events(&value),
                    });
                }
                Err(error) => {
                    let mend = "grant +config|get to the user of this configuration, or look yourself";
                    found.push(Finding::unknown(name, &error, mend));
                }
            }
        }
        found
    }
}

async fn clock(node: &mut RedisConnection) -> Finding {
    let asked = SystemTime::now();
    match node.ask::<(u64, u64)>(&redis::cmd("TIME")).await {
        Ok((seconds, micros)) => Finding::clock(seconds * 1000 + micros / 1000, asked),
        Err(error) => Finding::unknown("the server's clock", &error, "grant +time"),
    }
}

async fn policy(node: &mut RedisConnection, value: &str) -> Finding {
    if value == "noeviction" {
        return Finding::fine("maxmemory-policy is noeviction");
    }
    let mend = "CONFIG SET maxmemory-policy noeviction (and in redis.conf)";
    let what = format!("maxmemory-policy is {value}: valid tokens are evicted when memory is full, and get 401");
    let limit = node.ask::<Vec<(String, String)>>(redis::cmd("CONFIG").arg("GET").arg("maxmemory")).await;
    match limit.as_deref() {
        // Nothing is evicted until somebody sets a limit.
        Ok([(_, limit), ..]) if limit == "0" => Finding::warning(format!("{what}; maxmemory is 0 now"), mend),
        _ => Finding::error(what, mend),
    }
}

async fn persistence(node: &mut RedisConnection, appendonly: &str) -> Finding {
    if appendonly == "yes" {
        return Finding::fine("appendonly is yes");
    }
    let save = node.ask::<Vec<(String, String)>>(redis::cmd("CONFIG").arg("GET").arg("save")).await;
    let saves = matches!(save.as_deref(), Ok([(_, save), ..]) if !save.is_empty());
    let mend = "CONFIG SET appendonly yes (and in redis.conf)";
    match saves {
        true => {
            Finding::warning("appendonly is no: a restart loses the tokens, and revocations, since the last save", mend)
        }
        false => Finding::error("appendonly is no, and nothing is saved: a restart loses every token", mend),
    }
}

fn events(value: &str) -> Finding {
    let missing = missing_events(value);
    if missing.is_empty() {
        return Finding::fine(format!("notify-keyspace-events is {value}"));
    }
    let mend = format!("CONFIG SET notify-keyspace-events {KEYSPACE_EVENTS} (and in redis.conf)");
    Finding::error(format!("notify-keyspace-events is \"{value}\", without {missing}: some changes are not told"), mend)
}
