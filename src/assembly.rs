//! From settings to running parts. Start-up and reload take the same road; a reload keeps the store and its cache as
//! long as their settings did not change.

use crate::admin::Reloaded;
use crate::config::{self, Diagnostic, Probe, Settings};
use crate::edge::{self, Rebuild, Rebuilt, Running, Snapshot};
use crate::identity::Authenticator;
use crate::pipeline::Pipeline;
use crate::store::chain::{Chain, Link};
use crate::store::credential::Digest;
use crate::store::{self, NamedStore, TlsSettings};
use crate::telemetry::access_log::AccessLog;
use crate::telemetry::lines::{Destination, LogTarget};
use crate::telemetry::metrics::Metrics;
use anyhow::{Context as _, anyhow};
use parking_lot::Mutex;
use std::path::PathBuf;
use std::sync::Arc;

/// Builds everything that serves the settings. With a path, reloads read that file again.
pub fn assemble(settings: Settings, path: Option<PathBuf>) -> anyhow::Result<Running> {
    let metrics = Arc::new(Metrics::new(env!("CARGO_PKG_VERSION")).context("metrics")?);
    let authenticator = authenticator(&settings, &metrics, None)?;
    let log = access_log(&settings, &metrics)?;
    let snapshot = snapshot(&settings, authenticator, Arc::clone(&metrics), log.clone(), None);
    Ok(Running { settings: settings.server.clone(), snapshot, rebuild: rebuild(settings, path, log) })
}

fn snapshot(
    settings: &Settings,
    authenticator: Arc<Authenticator>,
    metrics: Arc<Metrics>,
    log: AccessLog,
    running: Option<&Snapshot>,
) -> Snapshot {
    let pipeline = Pipeline {
        rules: settings.rules.clone(),
        policy: settings.policy.clone(),
        forward: settings.forward.clone(),
        cors: settings.cors.clone(),
        authenticator,
    };
    let hosts = settings.admin_hosts.clone();
    Snapshot::build(pipeline, metrics, &settings.upstreams, settings.timeouts, log, hosts, running)
}

/// `before`: one of the same records, whose cache is taken over.
fn authenticator(
    settings: &Settings,
    metrics: &Arc<Metrics>,
    before: Option<&Authenticator>,
) -> anyhow::Result<Arc<Authenticator>> {
    let links = settings.stores.iter().map(|store| link(store, metrics)).collect::<anyhow::Result<Vec<_>>>()?;
    let authenticator = Authenticator::new(Chain::new(links), settings.cache.clone(), Arc::clone(metrics), edge::now);
    let authenticator = match &settings.snapshot {
        // What a running one knows is newer than the file.
        Some(path) if before.is_some() => authenticator.saving_to(path, &origin(&settings.stores)),
        Some(path) => authenticator.with_snapshot(path, &origin(&settings.stores)),
        None => authenticator,
    };
    Ok(Arc::new(match before {
        Some(before) => authenticator.taking_over(before),
        None => authenticator,
    }))
}

fn link(store: &NamedStore, metrics: &Metrics) -> anyhow::Result<Link> {
    let metrics = Arc::new(metrics.store(&store.name));
    let opened = store.kind.open(store.timeout, Arc::clone(&metrics), edge::now);
    let opened = opened.with_context(|| format!("store {}", store.name))?;
    Ok(Link::new(store.name.clone(), opened, store.timeout, metrics))
}

/// Whom the system trusts, if any of these stores goes by that: as with files that are named, what was replaced in place is
/// taken in by a reload.
fn system_authorities(stores: &[NamedStore]) -> Option<Digest> {
    let asks = |store: &NamedStore| store.kind.tls().is_some_and(TlsSettings::trusts_the_system);
    stores.iter().any(asks).then(store::system_authorities)
}

/// Which records these stores hold, in their order: a cache may only be taken over by the same.
fn origin(stores: &[NamedStore]) -> String {
    let records: Vec<String> = stores.iter().map(|store| store.kind.records()).collect();
    Digest::of(format!("{records:?}").as_bytes()).to_hex()
}

fn access_log(settings: &Settings, metrics: &Arc<Metrics>) -> anyhow::Result<AccessLog> {
    let to = match &settings.access_log {
        LogTarget::Off => None,
        LogTarget::Stdout => Some(Destination::stdout().context("log.access: standard output")?),
        LogTarget::File(path) => Some(Destination::file(path).map_err(|why| anyhow!("log.access: {why}"))?),
    };
    AccessLog::start(to, &settings.rules.names.token, Arc::clone(metrics)).context("access log")
}

/// Makes the next snapshot from the file as it is then. What needs a restart is said, and left as it is.
fn rebuild(settings: Settings, path: Option<PathBuf>, log: AccessLog) -> Rebuild {
    let started = settings.server.clone();
    let authorities = system_authorities(&settings.stores);
    let current = Mutex::new((settings, log, authorities));
    Arc::new(move |running: &Snapshot, reopened: Result<(), String>| {
        let path = path.as_deref().ok_or("there is no configuration file to read")?;
        let mut current = current.lock();
        let next = config::load(path, Probe::Reload(&current.0)).map_err(|problems| report(&problems))?;
        next.warnings.iter().for_each(|warning| log::warn!("{warning}"));
        let (settings, log, authorities) = &mut *current;
        let next_authorities = system_authorities(&next.stores);
        let describe = |error: anyhow::Error| format!("{error:#}");
        let metrics = Arc::clone(&running.metrics);
        let authenticator = if (&next.stores, &next.cache, &next.snapshot)
            == (&settings.stores, &settings.cache, &settings.snapshot)
            && next_authorities == *authorities
        {
            Arc::clone(&running.pipeline.authenticator)
        } else {
            running.pipeline.authenticator.save();
            let same_records = origin(&next.stores) == origin(&settings.stores);
            let before = same_records.then_some(&*running.pipeline.authenticator);
            authenticator(&next, &metrics, before).map_err(describe)?
        };
        let next_log = if next.access_log == settings.access_log {
            reopened?;
            log.with_parameter(&next.rules.names.token).map_err(|error| error.to_string())?
        } else {
            access_log(&next, &metrics).map_err(describe)?
        };
        let snapshot = snapshot(&next, authenticator, metrics, next_log.clone(), Some(running));
        let restart: Vec<String> = next.server.changes(&started).into_iter().map(str::to_owned).collect();
        let mut changed = settings.document.changes(&next.document);
        // Files that the configuration names may have other contents: certificates, passwords.
        let by_files = [("upstream", next.upstreams != settings.upstreams), ("store", next.stores != settings.stores)];
        for (key, _) in by_files.into_iter().filter(|(_, differs)| *differs) {
            if !changed.iter().any(|known| known.starts_with(key)) {
                changed.push(key.to_owned());
            }
        }
        let applied = changed.into_iter().filter(|key| !restart.contains(key)).collect();
        let report = Reloaded { applied, restart };
        log::set_max_level(next.level);
        (*settings, *log, *authorities) = (next, next_log, next_authorities);
        Ok(Rebuilt { snapshot, report })
    })
}

/// All errors, one a line.
pub fn report(problems: &[Diagnostic]) -> String {
    problems.iter().filter(|found| found.is_error()).map(ToString::to_string).collect::<Vec<_>>().join("\n")
}
