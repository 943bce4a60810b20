//! From settings to running parts. Start-up and reload take the same road; a reload keeps the store and its cache as
//! long as their settings did not change.

use crate::admin::Reloaded;
use crate::config::{self, Diagnostic, Probe, Settings};
use crate::edge::{self, ListFiles, Logs, PassedSockets, Rebuild, Rebuilt, Running, Snapshot, Successors};
use crate::identity::{Authenticator, CannotTell, Checked, Mode, TokenStatus};
use crate::pipeline::Pipeline;
use crate::policy::{GuessGuard, RequestLimits};
use crate::share::LeaseEngine;
use crate::store::chain::{Chain, Link};
use crate::store::credential::Digest;
use crate::store::{self, NamedStore, TlsSettings};
use crate::telemetry::access_log::AccessLog;
use crate::telemetry::audit_log::AuditLog;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::spans::SpanExporter;
use anyhow::{Context as _, anyhow};
use parking_lot::Mutex;
use std::hash::{BuildHasher as _, RandomState};
use std::path::PathBuf;
use std::sync::Arc;

/// Builds everything that serves the settings. With a path, reloads read that file again.
pub fn assemble(settings: Settings, path: Option<PathBuf>) -> anyhow::Result<Running> {
    let metrics = Arc::new(Metrics::new(env!("CARGO_PKG_VERSION")).context("metrics")?);
    let authenticator = authenticator(&settings, &metrics, None)?;
    let logs = Logs {
        access: access_log(&settings, &metrics)?,
        audit: audit_log(&settings, &metrics)?,
        spans: spans(&settings, &metrics)?,
    };
    let engine = leases(&settings, &metrics)?;
    let snapshot = snapshot(&settings, authenticator, Arc::clone(&metrics), logs.clone(), engine, None);
    let watched = path.clone().filter(|_| settings.server.watch);
    let watched = watched.map(|path| Arc::new(move || config::files(&path)) as ListFiles);
    // Without a file, another process would serve something else.
    let successors = path.is_some().then(Successors::of_this_process).transpose().context("upgrade")?;
    let server = settings.server.clone();
    let rebuild = rebuild(settings, path, logs);
    Ok(Running { settings: server, snapshot, rebuild, watched, passed: PassedSockets::default(), successors })
}

fn snapshot(
    settings: &Settings,
    authenticator: Arc<Authenticator>,
    metrics: Arc<Metrics>,
    logs: Logs,
    engine: Option<Arc<LeaseEngine>>,
    running: Option<&Snapshot>,
) -> Snapshot {
    let before = running.map(|running| &running.pipeline.limits);
    // Every process, and every RandomState, has keys of its own.
    let seed = || RandomState::new().hash_one(0);
    let limits = RequestLimits::new(&settings.limits, settings.limit_fields, &settings.rules.routes, before, seed);
    let watching = running.map(|running| &running.pipeline.guessing);
    let guessing = GuessGuard::new(settings.guessing.as_ref(), watching, seed);
    let (limits, guessing) = match (&settings.shared_limits, engine) {
        (Some(share), Some(engine)) => {
            engine.keep_at_most(limits.shared_keys() + guessing.shared_keys());
            let seed = |name: &str| share.seed(name);
            (limits.sharing(&engine, seed), guessing.sharing(&engine, seed))
        }
        _ => (limits, guessing),
    };
    if let Some(before) = before {
        say_what_limits_keep(&limits, before);
    }
    match watching.map_or(0, |before| guessing.forgets(before)) {
        0 => {}
        episodes => {
            log::warn!("[guessing] has another budget: {episodes} clients that guessed begin anew, without a pause")
        }
    }
    let pipeline = pipeline(settings, authenticator, limits, guessing);
    Snapshot::build(pipeline, metrics, &settings.upstreams, settings.edge.clone(), logs, running)
}

fn pipeline(
    settings: &Settings,
    authenticator: Arc<Authenticator>,
    limits: RequestLimits,
    guessing: GuessGuard,
) -> Pipeline {
    Pipeline {
        rules: settings.rules.clone(),
        policy: settings.policy.clone(),
        forward: settings.forward.clone(),
        cors: settings.cors.clone(),
        authenticator,
        limits,
        guessing,
    }
}

/// What judges requests by these settings, for those who tell of requests without a gateway: it opens no store, no log and no
/// socket, and knows no token. Limits are full, and shared ones are this process's own.
pub fn judging(settings: &Settings) -> anyhow::Result<Pipeline> {
    let metrics = Arc::new(Metrics::new(env!("CARGO_PKG_VERSION")).context("metrics")?);
    let nobody = Authenticator::new(Chain::new(Vec::new()), settings.cache.clone(), metrics, edge::now);
    let seed = || RandomState::new().hash_one(0);
    let limits = RequestLimits::new(&settings.limits, settings.limit_fields, &settings.rules.routes, None, seed);
    let guessing = GuessGuard::new(settings.guessing.as_ref(), None, seed);
    Ok(pipeline(settings, Arc::new(nobody), limits, guessing))
}

/// What the stores of these settings say of a token, as a gateway without a cache would be told.
pub async fn ask_stores(settings: &Settings, token: &[u8]) -> anyhow::Result<Result<TokenStatus, CannotTell>> {
    let metrics = Arc::new(Metrics::new(env!("CARGO_PKG_VERSION")).context("metrics")?);
    let links = settings.stores.iter().map(|store| link(store, &metrics)).collect::<anyhow::Result<Vec<_>>>()?;
    let authenticator = Authenticator::new(Chain::new(links), settings.cache.clone(), metrics, edge::now);
    Ok(match authenticator.check(token, &Digest::of(token), edge::now(), Mode::Serve) {
        Checked::Known(status, _) => Ok(status),
        Checked::Waiting(lookup) => lookup.answer().await.0,
        Checked::NotAsked => Err(CannotTell::NotAsked),
    })
}

fn say_what_limits_keep(limits: &RequestLimits, before: &RequestLimits) {
    let kept: Vec<_> = limits.kept_from(before).collect();
    let new: Vec<_> = limits.names().filter(|name| !kept.contains(name)).collect();
    for (names, what) in [(kept, "keep their buckets"), (new, "begin with full buckets")] {
        if !names.is_empty() {
            log::info!("limits that {what}: {}", names.join(", "));
        }
    }
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

/// What shared limits are asked by. `None`: there are none.
fn leases(settings: &Settings, metrics: &Metrics) -> anyhow::Result<Option<Arc<LeaseEngine>>> {
    let Some(share) = settings.shared_limits.as_ref().filter(|_| settings.shares_limits()) else { return Ok(None) };
    let store = share.open(Arc::new(metrics.store("shared_limits"))).context("shared_limits")?;
    Ok(Some(LeaseEngine::new(store, share.timeout, share.when_gone, metrics.share(share.kind()), edge::now)))
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
    let to = settings.access_log.open("access").map_err(|why| anyhow!("log.access: {why}"))?;
    AccessLog::start(to, &settings.rules.names.token, Arc::clone(metrics)).context("access log")
}

fn audit_log(settings: &Settings, metrics: &Arc<Metrics>) -> anyhow::Result<AuditLog> {
    let to = settings.audit_log.open("audit").map_err(|why| anyhow!("admin.audit: {why}"))?;
    AuditLog::start(to, Arc::clone(metrics)).context("audit log")
}

fn spans(settings: &Settings, metrics: &Arc<Metrics>) -> anyhow::Result<SpanExporter> {
    SpanExporter::start(settings.otlp.as_ref(), Arc::clone(metrics)).context("export of spans")
}

/// Makes the next snapshot from the file as it is then. What needs a restart is said, and left as it is.
fn rebuild(settings: Settings, path: Option<PathBuf>, logs: Logs) -> Rebuild {
    let started = settings.server.clone();
    let authorities = system_authorities(&settings.stores);
    let current = Arc::new(Mutex::new((settings, logs, authorities)));
    Arc::new(move |running: &Snapshot, reopened: Result<(), String>| {
        let path = path.as_deref().ok_or("there is no configuration file to read")?;
        let held = current.lock();
        let (settings, logs, authorities) = &*held;
        let next = config::load(path, Probe::Reload(settings)).map_err(|problems| report(&problems))?;
        next.warnings.iter().for_each(|warning| log::warn!("{warning}"));
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
            logs.access.with_parameter(&next.rules.names.token).map_err(|error| error.to_string())?
        } else {
            access_log(&next, &metrics).map_err(describe)?
        };
        let audit = match next.audit_log == settings.audit_log {
            true => logs.audit.clone(),
            false => audit_log(&next, &metrics).map_err(describe)?,
        };
        let spans = match next.otlp == settings.otlp {
            true => logs.spans.clone(),
            false => spans(&next, &metrics).map_err(describe)?,
        };
        let next_logs = Logs { access: next_log, audit, spans };
        let engine = match running.pipeline.limits.engine() {
            // With what it has leased.
            Some(running) if next.shares_limits() && next.shared_limits == settings.shared_limits => {
                Some(Arc::clone(running))
            }
            _ => {
                if let Some(share) = &settings.shared_limits {
                    metrics.forget_share(share.kind());
                }
                leases(&next, &metrics).map_err(describe)?
            }
        };
        let snapshot = snapshot(&next, authenticator, metrics, next_logs.clone(), engine, Some(running));
        let restart: Vec<String> = next.server.changes(&started).into_iter().map(str::to_owned).collect();
        let mut changed = settings.document.changes(&next.document);
        // Files that the configuration names may have other contents: certificates, passwords.
        let by_files = [
            ("upstream", next.upstreams != settings.upstreams),
            ("store", next.stores != settings.stores),
            ("shared_limits", next.shared_limits != settings.shared_limits),
            ("listener", next.server.listeners != settings.server.listeners),
        ];
        for (key, _) in by_files.into_iter().filter(|(_, differs)| *differs) {
            let own = if key == "listener" { "server.listen" } else { key };
            if !changed.iter().any(|known| known.starts_with(key) || known == own) {
                changed.push(key.to_owned());
            }
        }
        for key in settings.expansions.changes(&next.expansions) {
            if !changed.contains(&key) {
                changed.push(key);
            }
        }
        let applied = changed.into_iter().filter(|key| !restart.contains(key)).collect();
        let report = Reloaded { applied, restart };
        let (server, current) = (next.server.clone(), Arc::clone(&current));
        let done = Box::new(move || {
            log::set_max_level(next.level);
            *current.lock() = (next, next_logs, next_authorities);
        });
        Ok(Rebuilt { snapshot, settings: server, report, done })
    })
}

/// All errors, one a line.
pub fn report(problems: &[Diagnostic]) -> String {
    problems.iter().filter(|found| found.is_error()).map(ToString::to_string).collect::<Vec<_>>().join("\n")
}
