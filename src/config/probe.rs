//! What is looked at besides the file: what it names on this machine and in the network. Nothing is written or made.

use super::places::Places;
use super::{File, Settings};
use crate::edge::{self, AddressInUse, PassedSockets};
use crate::identity;
use crate::problem::{Problem, Severity};
use crate::store::NamedStore;
use crate::telemetry::lines::LogTarget;
use crate::telemetry::metrics::Metrics;
use std::sync::Arc;
use std::time::Duration;

/// How far to look.
#[derive(Clone, Copy, Debug)]
pub enum Probe<'a> {
    /// At the file, and at the secrets and certificates that it names.
    Settings,
    /// At what a start needs: listeners that nobody else has, the log, files of stores, names of upstreams. No store is
    /// connected to: a gateway starts while one is down. One that is to replace a running process does not: that process has
    /// a cache of tokens, and this one would have none.
    Start(&'a PassedSockets),
    /// At what a reload needs while these settings run: the same, but for files that did not change, and the listeners, which
    /// stay.
    Reload(&'a Settings),
    /// At everything that a start needs, with listeners that may be the running gateway's. With `network`, stores are
    /// connected to as well; without it, not even names are resolved.
    Check { network: bool },
}

/// A store that does not answer within this time, over its own time-outs, is not waited for.
const PATIENCE: Duration = Duration::from_secs(20);

pub(super) fn look(settings: &Settings, file: &File, probe: Probe<'_>, places: &mut Places<'_>) {
    let mut add =
        |section: &str, problems: Vec<Problem>| problems.into_iter().for_each(|found| places.add(section, found));
    let (running, names, connected) = match probe {
        Probe::Settings => return,
        Probe::Start(passed) if passed.predecessor().is_some() => (None, true, Some(Severity::Error)),
        Probe::Start(_) => (None, true, None),
        Probe::Reload(running) => (Some(running), true, None),
        Probe::Check { network } => (None, network, network.then_some(Severity::Warning)),
    };
    match probe {
        Probe::Start(passed) => add("", settings.server.unbound(AddressInUse::Error, passed)),
        Probe::Check { .. } => {
            add("", settings.server.unbound(AddressInUse::Warning, &PassedSockets::default()));
        }
        Probe::Settings | Probe::Reload(_) => {}
    }
    if running.is_none_or(|running| running.access_log != settings.access_log) {
        add("log", settings.access_log.problems("access"));
    }
    if settings.audit_log != settings.access_log
        && running.is_none_or(|running| running.audit_log != settings.audit_log)
    {
        let section = if matches!(settings.audit_log, LogTarget::File(_)) { "admin" } else { "log" };
        add(section, settings.audit_log.problems("audit"));
    }
    if let Some(path) = &settings.snapshot
        && running.is_none_or(|running| running.snapshot != settings.snapshot)
    {
        add("cache", identity::snapshot_problems(path));
    }
    if names {
        for (upstream, section) in settings.upstreams.iter().zip(&file.upstreams) {
            add(&section.at, edge::unresolved(upstream));
        }
    }
    let changed = |store: &NamedStore| running.is_none_or(|running| !running.stores.contains(store));
    let stores = || settings.stores.iter().zip(&file.stores).filter(|(store, _)| changed(store));
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
    let found = runtime.block_on(futures_util::future::join_all(stores().map(|(store, _)| problems(store, connected))));
    if let Some(share) = settings.shared_limits.as_ref().filter(|_| connected.is_some()) {
        // Of no store that is named: nobody sees its series.
        let metrics = Metrics::new("").map(|metrics| Arc::new(metrics.store("shared_limits")));
        add("shared_limits", metrics.map(|metrics| runtime.block_on(share.probe(metrics))).unwrap_or_default());
    }
    stores().zip(found).for_each(|((_, section), found)| add(section.at(), found));
}

/// What is wrong with a store. What only the network tells is a warning to somebody who asks: the gateway starts all the same,
/// and answers 503 until it is right.
async fn problems(store: &NamedStore, connected: Option<Severity>) -> Vec<Problem> {
    let mut found = store.kind.probe(false).await;
    if let Some(severity) = connected {
        match tokio::time::timeout(PATIENCE, store.kind.probe(true)).await {
            Ok(all) => {
                let new = all.into_iter().filter(|problem| !found.contains(problem));
                let new: Vec<_> = new.map(|problem| Problem { severity, ..problem }).collect();
                found.extend(new);
            }
            Err(_) => {
                let problem = Problem::warning("kind", "did not answer in time", "see whether the server is well");
                found.push(Problem { severity, ..problem });
            }
        }
    }
    found
}
