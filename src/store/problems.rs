//! What is wrong with a store's settings and with what they name, found without changing anything: files are read, and a
//! server is asked once for a token that does not exist. It must not know what a gateway does about it.

use super::credential::{Credential, Digest};
use super::file::FileStore;
use super::{StoreError, StoreSettings, sqlite};
use crate::problem::Problem;
use crate::telemetry::metrics::Metrics;
use std::sync::Arc;
use std::time::Duration;

/// How long a server may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Keys that errors of the stores begin with.
const KEYS: [&str; 12] = [
    "url",
    "password_file",
    "schema",
    "channel",
    "lookup",
    "servers",
    "username",
    "master",
    "changes",
    "endpoint",
    "unknown_statuses",
    "user",
];

impl StoreSettings {
    /// All that is wrong with these settings and with what they name, warnings included. `offline` leaves out what needs the
    /// network. Nothing is written or made.
    pub async fn problems(&self, offline: bool) -> Vec<Problem> {
        let metrics = match Metrics::new("") {
            Ok(metrics) => Arc::new(metrics.store("check")),
            Err(error) => return vec![Problem::error("kind", error.to_string(), "report this fault of tollgate")],
        };
        let (key, opened) = match self {
            Self::Sqlite(path) => {
                let problem = |why| Problem::error("path", format!("{}: {why}", path.display()), DATABASE);
                return sqlite::unusable(path).map(problem).into_iter().collect();
            }
            Self::File(path) => {
                let problem = |why| Problem::error("path", why, TOKEN_FILE);
                return FileStore::open(path, metrics, crate::clock::now).err().map(problem).into_iter().collect();
            }
            remote => match remote.open(PATIENCE, metrics, crate::clock::now) {
                Ok(store) => (remote.place_key(), store),
                Err(error) => return vec![settings_error(remote.place_key(), &error.to_string())],
            },
        };
        if offline {
            return Vec::new();
        }
        let nobody = format!("tollgate-check-{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..));
        let credential = Credential::new(nobody.as_bytes(), Digest::of(nobody.as_bytes()));
        let asked = tokio::time::timeout(PATIENCE, opened.lookup(&credential)).await;
        let warning = |error: StoreError| Problem::warning(key, format!("cannot be used now: {error}"), REMOTE);
        asked.unwrap_or(Err(StoreError::Timeout)).err().map(warning).into_iter().collect()
    }

    /// The key that says where the server is.
    const fn place_key(&self) -> &'static str {
        match self {
            Self::Sqlite(_) | Self::File(_) => "path",
            Self::Postgres(_) => "url",
            Self::Redis(_) => "servers",
            Self::Introspection(_) => "endpoint",
        }
    }
}

const DATABASE: &str = "name a database that tollgate may write to, or a file that it may create";
const TOKEN_FILE: &str = "name a file with tokens, see docs/stores.md";
const REMOTE: &str = "the gateway starts, and answers 503 until the store can be used";

/// An error of a store's constructor, whose text begins with its key.
fn settings_error(place_key: &'static str, why: &str) -> Problem {
    let named = why.split_once(": ").and_then(|(key, rest)| Some((*KEYS.iter().find(|known| **known == key)?, rest)));
    let (key, what) = named.unwrap_or((place_key, why));
    Problem::error(if key == "url" { place_key } else { key }, what, "")
}
