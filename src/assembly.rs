//! From settings to running parts. Start-up and reload take the same road; a reload keeps the store and its cache as
//! long as their settings did not change.

use crate::config::{self, LogTarget, Problem, Settings, StoreKind};
use crate::edge::{self, Rebuild, Running, Snapshot};
use crate::identity::Authenticator;
use crate::identity::store::TokenStore;
use crate::identity::store::file::FileStore;
use crate::identity::store::sqlite::SqliteStore;
use crate::pipeline::Pipeline;
use crate::telemetry::access_log::{AccessLog, Sink};
use crate::telemetry::metrics::Metrics;
use anyhow::{Context as _, anyhow};
use parking_lot::Mutex;
use std::path::PathBuf;
use std::sync::Arc;

/// Builds everything that serves the settings. With a path, reloads read that file again.
pub fn assemble(settings: Settings, path: Option<PathBuf>) -> anyhow::Result<Running> {
    let metrics = Arc::new(Metrics::new(env!("CARGO_PKG_VERSION")).context("metrics")?);
    let authenticator = authenticator(&settings, &metrics)?;
    let log = access_log(&settings, &metrics)?;
    let snapshot = snapshot(&settings, authenticator, Arc::clone(&metrics), log.clone())?;
    Ok(Running { settings: settings.server.clone(), snapshot, rebuild: rebuild(settings, path, log) })
}

fn snapshot(
    settings: &Settings,
    authenticator: Arc<Authenticator>,
    metrics: Arc<Metrics>,
    log: AccessLog,
) -> anyhow::Result<Snapshot> {
    let pipeline =
        Pipeline { rules: settings.rules.clone(), forward: settings.forward.clone(), authenticator, metrics };
    Snapshot::build(pipeline, &settings.upstreams, settings.timeouts, log).map_err(|why| anyhow!(why))
}

fn authenticator(settings: &Settings, metrics: &Arc<Metrics>) -> anyhow::Result<Arc<Authenticator>> {
    let store: Arc<dyn TokenStore> = match settings.store.kind {
        StoreKind::Sqlite => Arc::new(SqliteStore::start(&settings.store.path).map_err(|why| anyhow!("store: {why}"))?),
        StoreKind::File => {
            Arc::new(FileStore::open(&settings.store.path, edge::now).map_err(|why| anyhow!("store: {why}"))?)
        }
    };
    let cache = settings.cache.clone();
    Ok(Arc::new(Authenticator::new(store, cache, settings.store.timeout, Arc::clone(metrics), edge::now)))
}

fn access_log(settings: &Settings, metrics: &Arc<Metrics>) -> anyhow::Result<AccessLog> {
    let sink = match &settings.access_log {
        LogTarget::Off => None,
        LogTarget::Stdout => Some(Sink::Stdout),
        LogTarget::File(path) => Some(Sink::file(path).map_err(|why| anyhow!("log.access: {why}"))?),
    };
    AccessLog::start(sink, &settings.rules.names.token, Arc::clone(metrics)).context("access log")
}

/// Makes the next snapshot from the file as it is then. What needs a restart is said, and left as it is.
fn rebuild(settings: Settings, path: Option<PathBuf>, log: AccessLog) -> Rebuild {
    let started = settings.server.clone();
    let current = Mutex::new((settings, log));
    Box::new(move |running: &Snapshot| {
        let path = path.as_deref().ok_or("there is no configuration file to read")?;
        let next = config::load(path).map_err(|problems| report(&problems))?;
        let mut current = current.lock();
        let (settings, log) = &mut *current;
        let describe = |error: anyhow::Error| format!("{error:#}");
        let metrics = Arc::clone(&running.pipeline.metrics);
        let authenticator = if (&next.store, &next.cache) == (&settings.store, &settings.cache) {
            Arc::clone(&running.pipeline.authenticator)
        } else {
            authenticator(&next, &metrics).map_err(describe)?
        };
        // Opened anew in any case, so that a reload also picks up a rotated file.
        let next_log = access_log(&next, &metrics).map_err(describe)?;
        let snapshot = snapshot(&next, authenticator, metrics, next_log.clone()).map_err(describe)?;
        if next.server != started {
            log::warn!("[server] and [admin] changed: addresses, threads and grace take a restart");
        }
        log::set_max_level(next.level);
        (*settings, *log) = (next, next_log);
        Ok(snapshot)
    })
}

/// All problems, one a line.
pub fn report(problems: &[Problem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}
