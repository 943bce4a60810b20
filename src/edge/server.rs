//! Runs the process: listeners, background services, signals, reload, and a graceful shutdown that loses no request in
//! flight. It must not know how a request is judged.

use super::admin::AdminGate;
use super::connection::Gate;
use super::drain::Drain;
use super::listen::{ServerSettings, SocketPlace};
use super::listeners::Listeners;
use super::listening::PassedSockets;
use super::notify::ServiceManager;
use super::proxied::ProxiedLane;
use super::reloader::{ChangeRequest, Reloader, reopen_when_asked};
use super::signals::ProcessSignals;
use super::upgrade::Successors;
use super::workers::{Serve as _, Workers};
use super::{Lifecycle, ListFiles, Snapshot, file_watch, health};
use crate::admin::{ReloadHistory, Reloaded};
use crate::problem::Problem;
use crate::telemetry::audit_log::{AuditResult, AuditSource, AuditedAction};
use crate::telemetry::history::SAMPLED_EVERY_MS;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::outage::LogThrottle;
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use pingora::proxy::http_proxy;
use pingora::server::configuration::ServerConf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

/// Set by tests that compare the framework's lane with our own.
const ORACLE: &str = "TOLLGATE_TEST_FRAMEWORK_LANE";
/// Idle connections to backends that the framework keeps.
const UPSTREAM_POOL: usize = 1_024;
/// How often the last uses of tokens are written to the store, and the cache to its file.
/// How soon it is told that an address has stopped guessing.
const GUESSING_ENDED_EVERY: Duration = Duration::from_secs(1);
const USES_FLUSHED_EVERY: Duration = Duration::from_secs(60);

/// Builds the next snapshot from the current configuration file. The second argument says whether the open access log
/// could be reopened. Blocks: reads files and resolves names.
pub type Rebuild = Arc<dyn Fn(&Snapshot, Result<(), String>) -> Result<Rebuilt, String> + Send + Sync>;

/// The result of a rebuild: what to serve with, and what to report. Nothing is in force yet.
pub struct Rebuilt {
    pub snapshot: Snapshot,
    pub settings: ServerSettings,
    pub report: Reloaded,
    /// Called when it is in force: the next rebuild starts from here.
    pub done: Box<dyn FnOnce() + Send>,
}

/// What [`serve`] runs with.
pub struct Running {
    pub settings: ServerSettings,
    pub snapshot: Snapshot,
    pub rebuild: Rebuild,
    /// The configuration's files, if changes of them are to be taken without being asked.
    pub watched: Option<ListFiles>,
    /// Listening sockets that this process was started with.
    pub passed: PassedSockets,
    /// How an upgrade starts the process that replaces this one.
    pub successors: Option<Successors>,
}

/// Serves until a signal ends the process. The error names the address that cannot be bound.
pub fn serve(running: Running) -> Result<(), ServeError> {
    let Running { settings, snapshot, rebuild, watched, passed, successors } = running;
    // Everything but the exchanges: the store's changes, reloads, the admin listener. Two threads, so that a slow scrape
    // holds up neither.
    let background = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("background")
        .enable_all()
        .build()
        .map_err(ServeError::Runtime)?;
    let entered = background.enter();
    // Before a connection is accepted: who gets an answer may send a signal.
    let signals = ProcessSignals::handled();
    let started_unix_ms = super::now().unix_ms;
    let metrics = Arc::clone(&snapshot.metrics);
    metrics.reloaded(true, started_unix_ms / 1000);
    let snapshot = Arc::new(ArcSwap::from_pointee(snapshot));
    let lifecycle = Arc::new(Lifecycle::default());
    let (end, shutdown) = watch::channel(false);

    let conf = Arc::new(ServerConf {
        // `upstream` bounds the tries of a request; each server of a pool may be one.
        max_retries: usize::MAX,
        upstream_keepalive_pool_size: UPSTREAM_POOL,
        ..ServerConf::default()
    });
    let framework = std::env::var_os(ORACLE)
        .map(|_| Arc::new(http_proxy(&conf, ProxiedLane { lifecycle: Arc::clone(&lifecycle) })));
    let gate = Gate {
        snapshot: Arc::clone(&snapshot),
        framework,
        lifecycle: Arc::clone(&lifecycle),
        crowd: Arc::default(),
        floods: LogThrottle::default(),
        shutdown,
    };

    let workers = Workers::start(settings.threads, &Arc::new(gate)).map_err(ServeError::Runtime)?;
    let manager = ServiceManager::of_this_process();
    let (changes, requests) = mpsc::channel(1);
    let asked = changes.clone();
    let reloads = Arc::new(ReloadHistory::default());
    reloads.started(started_unix_ms);
    let gate = Arc::new(AdminGate {
        snapshot: Arc::clone(&snapshot),
        lifecycle: Arc::clone(&lifecycle),
        changes: changes.clone(),
        started_unix_ms,
        reloads: Arc::clone(&reloads),
        complaints: LogThrottle::default(),
    });
    let runtime = background.handle().clone();
    let mut listeners = Listeners::new(workers.doors(), Arc::clone(&metrics), passed, move |acceptor| {
        let gate = Arc::clone(&gate);
        let spawner = runtime.clone();
        let serve = move |socket, listener| drop(spawner.spawn(Arc::clone(&gate).serve(socket, listener, ())));
        runtime.spawn(acceptor.accept(serve));
    });
    let prepared = listeners.prepare(&settings)?;
    let addresses = settings.listeners.iter().map(|listener| &listener.address).chain(settings.operators());
    if let Some(place) = listeners.passed().unused(addresses).first() {
        return Err(ServeError::Unused(place.to_string()));
    }
    if let Some(predecessor) = listeners.passed().predecessor() {
        predecessor.may_take_over().map_err(ServeError::TakeOver)?;
        log::info!("taking over from the process before this one");
    }
    if let Some(engine) = snapshot.load().pipeline.limits.engine() {
        engine.start();
    }
    // Nothing can fail any more. Before a connection is accepted: nobody's action stands before it.
    let version = AuditedAction::new("start", AuditResult::Done).with("version", env!("CARGO_PKG_VERSION"));
    {
        // Not for longer: who holds a snapshot keeps its pools and connections after a reload.
        let first = snapshot.load();
        first.audit(&first, AuditSource::Process, &version);
    }
    listeners.apply(prepared);
    let listeners = Arc::new(Mutex::new(listeners));
    let (replaced, passed_on) = (Arc::new(Notify::new()), CancellationToken::new());
    let reloader = Reloader {
        snapshot: Arc::clone(&snapshot),
        rebuild,
        manager: manager.clone(),
        reloads,
        listeners: Arc::clone(&listeners),
        requests,
        hangup: signals.hangup,
        upgrade: signals.upgrade,
        successors: successors.map(Arc::new),
        passed_on: passed_on.clone(),
        replaced: Arc::clone(&replaced),
        _open: changes,
    };
    // A reload resolves names: reopening a rotated log must not wait for it.
    background.spawn(reopen_when_asked(Arc::clone(&snapshot), signals.reopen));
    background.spawn(reloader.run());
    background.spawn(file_watch::run(Arc::clone(&listeners), watched, move || {
        log::info!("the configuration file has changed");
        // If one is asked for already, it reads the same file.
        let _ = asked.try_send(ChangeRequest::Reload(AuditSource::Process, None));
    }));
    background.spawn(health::run(Arc::clone(&snapshot)));
    background.spawn(sample_traffic(Arc::clone(&metrics)));
    background.spawn(Tokens { snapshot: Arc::clone(&snapshot), replaced }.run());
    manager.ready();
    listeners.lock().serving();
    background.spawn(manager.clone().watch(workers.doors()));
    let drain = Drain {
        manager: manager.clone(),
        lifecycle,
        metrics,
        listeners: Arc::clone(&listeners),
        snapshot: Arc::clone(&snapshot),
        passed_on: passed_on.clone(),
    };
    let aborted = background.block_on(drain.run(signals.terminate, signals.interrupt));
    if !passed_on.is_cancelled() {
        manager.stopped(aborted);
    }
    // The receivers may be gone.
    let _ = end.send(true);
    drop(workers);
    drop(entered);
    background.shutdown_timeout(Duration::from_secs(1));

    let last = snapshot.load();
    if !passed_on.is_cancelled() {
        last.pipeline.authenticator.save();
    }
    last.log.flush(Duration::from_secs(2));
    let result = if aborted == 0 { AuditResult::Done } else { AuditResult::Failed };
    last.audit(&last, AuditSource::Process, &AuditedAction::new("stopped", result).with("aborted", aborted));
    last.audit.flush(Duration::from_secs(1));
    last.spans.flush(Duration::from_secs(2));
    listeners.lock().end().iter().for_each(|path| remove_socket(path));
    Ok(())
}

/// Why the gateway cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("{address} cannot be bound: {error}")]
    Bind { address: String, error: std::io::Error },
    #[error("listener {address}: {problem}")]
    Listener { address: String, problem: Box<Problem> },
    #[error("systemd passes the socket {0}, and no listener has this address; see LISTEN_FDS in sd_listen_fds(3)")]
    Unused(String),
    #[error("the process that started this one to be replaced does not wait for it any more: {0}")]
    TakeOver(std::io::Error),
    #[error("no threads, event loops or listeners can be made: {0}")]
    Runtime(std::io::Error),
}

/// Removes the socket file of a listener that is closing, unless another process listens on it by now. One that still
/// accepts connections at the deadline is left, and the next start replaces it.
pub(super) fn remove_socket(path: &str) {
    let deadline = Instant::now() + Duration::from_secs(1);
    loop {
        match SocketPlace::of(path) {
            SocketPlace::Stale => {
                // If this fails, the next start replaces the file.
                let _ = std::fs::remove_file(path);
                return;
            }
            SocketPlace::Taken(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            _ => return,
        }
    }
}

/// Reads the counters for the windows that the admin listener shows.
async fn sample_traffic(metrics: Arc<Metrics>) {
    let mut ticks = tokio::time::interval(Duration::from_millis(SAMPLED_EVERY_MS));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        metrics.sample_traffic(super::now().mono_ms);
    }
}

/// Follows the store's changes for the token cache, and writes last uses; moves on to the new store after a reload.
struct Tokens {
    snapshot: Arc<ArcSwap<Snapshot>>,
    replaced: Arc<Notify>,
}

impl Tokens {
    async fn run(self) {
        let mut flushing: Option<tokio::task::JoinHandle<()>> = None;
        let mut flush = tokio::time::interval_at(tokio::time::Instant::now() + USES_FLUSHED_EVERY, USES_FLUSHED_EVERY);
        let mut guessing = tokio::time::interval(GUESSING_ENDED_EVERY);
        guessing.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let authenticator = Arc::clone(&self.snapshot.load().pipeline.authenticator);
            // One future for as long as the store is the same, because it owns the subscriptions.
            let mut following = std::pin::pin!(authenticator.follow_changes());
            loop {
                tokio::select! {
                    () = &mut following => {}
                    () = self.replaced(&authenticator) => {
                        // Its uses are not known to the next one.
                        let last = Arc::clone(&authenticator);
                        tokio::spawn(async move { last.flush_uses().await });
                        break;
                    }
                    _ = guessing.tick() => self.snapshot.load().end_guessing(super::now()),
                    // With many tokens this takes a while: never two at once.
                    _ = flush.tick(), if flushing.as_ref().is_none_or(tokio::task::JoinHandle::is_finished) => {
                        let last = Arc::clone(&authenticator);
                        // In a task of its own: neither may delay the other.
                        flushing = Some(tokio::spawn(async move { last.flush_uses().await }));
                        let last = Arc::clone(&authenticator);
                        tokio::task::spawn_blocking(move || last.save());
                    }
                }
            }
        }
    }

    /// Waits until a reload has replaced the authenticator.
    async fn replaced(&self, current: &Arc<crate::identity::Authenticator>) {
        while Arc::ptr_eq(current, &self.snapshot.load().pipeline.authenticator) {
            self.replaced.notified().await;
        }
    }
}
