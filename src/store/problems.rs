//! What is wrong with a store's settings and with what they name, found without changing anything: files are read, and a
//! server is asked once for a token that does not exist. It must not know what a gateway does about it.

use super::credential::{Credential, Digest};
use super::{StoreError, StoreSettings, file, sqlite};
use crate::problem::Problem;
use crate::telemetry::metrics::Metrics;
use std::sync::Arc;
use std::time::Duration;

/// How long a server may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

impl StoreSettings {
    /// All that is wrong with these settings themselves, warnings included. Reads and connects to nothing: files that they
    /// name were read when they were made.
    pub fn problems(&self) -> Vec<Problem> {
        match self {
            Self::Sqlite(_) | Self::File(_) => Vec::new(),
            Self::Postgres(settings) => settings.problems(),
            Self::Redis(settings) => settings.problems(),
            Self::Introspection(settings) => settings.problems(),
        }
    }

    /// All that is wrong with what these settings name: a file, or with `network` a server. Settings that have a problem of
    /// their own are not tried. Nothing is written or made.
    pub async fn probe(&self, network: bool) -> Vec<Problem> {
        match self {
            Self::Sqlite(path) => return sqlite::unusable(path).map(|error| error.problem()).into_iter().collect(),
            Self::File(path) => return file::unusable(path).map(|error| error.problem()).into_iter().collect(),
            Self::Postgres(_) | Self::Redis(_) | Self::Introspection(_) if !network => return Vec::new(),
            Self::Postgres(_) | Self::Redis(_) | Self::Introspection(_) => {}
        }
        if Problem::first_error(self.problems()).is_err() {
            return Vec::new();
        }
        let key = self.place_key();
        let metrics = match Metrics::new("") {
            Ok(metrics) => Arc::new(metrics.store("check")),
            Err(error) => return vec![Problem::error("kind", error.to_string(), "report this fault of tollgate")],
        };
        let opened = match self.open(PATIENCE, metrics, crate::clock::now) {
            Ok(opened) => opened,
            Err(problem) => return vec![problem],
        };
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

const REMOTE: &str =
    "a gateway starts all the same, and answers 503 until the store can be used; an upgrade is refused";
