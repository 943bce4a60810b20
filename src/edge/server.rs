//! Runs the process: listeners, background services, signals, reload, and a graceful shutdown that loses no request in
//! flight. It must not know how a request is judged.

use super::admin::{AdminGate, ReloadRequest};
use super::connection::Gate;
use super::listen::{ServerSettings, SocketPlace};
use super::listeners::Listeners;
use super::notify::ServiceManager;
use super::proxied::ProxiedLane;
use super::workers::{Serve as _, Workers};
use super::{Lifecycle, ShutdownTimes, Snapshot, file_watch, health};
use crate::admin::{Reloaded, audited_reload};
use crate::problem::Problem;
use crate::telemetry::audit_log::{AuditResult, AuditSource, AuditedAction};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::outage::LogThrottle;
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use pingora::proxy::http_proxy;
use pingora::server::configuration::ServerConf;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, mpsc, watch};

/// Set by tests that compare the framework's lane with our own.
const ORACLE: &str = "TOLLGATE_TEST_FRAMEWORK_LANE";
/// Idle connections to backends that the framework keeps.
const UPSTREAM_POOL: usize = 1_024;
/// How often the last uses of tokens are written to the store, and the cache to its file.
const USES_FLUSHED_EVERY: Duration = Duration::from_secs(60);
/// How long a shutdown waits for the last uses to be written.
const USES_AT_STOP: Duration = Duration::from_secs(2);

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
    /// The configuration file, if changes of it are to be taken without being asked.
    pub watched: Option<PathBuf>,
}

/// Serves until a signal ends the process. The error names the address that cannot be bound.
pub fn serve(running: Running) -> Result<(), ServeError> {
    let Running { settings, snapshot, rebuild, watched } = running;
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
    let (reloads, requests) = mpsc::channel(1);
    let asked = reloads.clone();
    let gate = Arc::new(AdminGate {
        snapshot: Arc::clone(&snapshot),
        lifecycle: Arc::clone(&lifecycle),
        reloads: reloads.clone(),
        started_unix_ms,
    });
    let runtime = background.handle().clone();
    let mut listeners = Listeners::new(workers.doors(), Arc::clone(&metrics), move |acceptor| {
        let gate = Arc::clone(&gate);
        let spawner = runtime.clone();
        let serve = move |socket, listener| drop(spawner.spawn(Arc::clone(&gate).serve(socket, listener, ())));
        runtime.spawn(acceptor.accept(serve));
    });
    let prepared = listeners.prepare(&settings)?;
    listeners.apply(prepared);
    let listeners = Arc::new(Mutex::new(listeners));
    let replaced = Arc::new(Notify::new());
    let reloader = Reloader {
        snapshot: Arc::clone(&snapshot),
        rebuild,
        manager: manager.clone(),
        listeners: Arc::clone(&listeners),
        requests,
        hangup: signals.hangup,
        replaced: Arc::clone(&replaced),
        _open: reloads,
    };
    // A reload resolves names: reopening a rotated log must not wait for it.
    background.spawn(reopen_when_asked(Arc::clone(&snapshot), signals.reopen));
    background.spawn(reloader.run());
    background.spawn(file_watch::run(Arc::clone(&listeners), watched, move || {
        log::info!("the configuration file has changed");
        // If one is asked for already, it reads the same file.
        let _ = asked.try_send((AuditSource::Process, None));
    }));
    background.spawn(health::run(Arc::clone(&snapshot)));
    background.spawn(Tokens { snapshot: Arc::clone(&snapshot), replaced }.run());
    manager.ready();
    background.spawn(manager.clone().watch(workers.doors()));
    let version = AuditedAction::new("start", AuditResult::Done).with("version", env!("CARGO_PKG_VERSION"));
    {
        // Not for longer: who holds a snapshot keeps its pools and connections after a reload.
        let first = snapshot.load();
        first.audit(&first, AuditSource::Process, &version);
    }
    let drain = Drain {
        manager: manager.clone(),
        lifecycle,
        metrics,
        listeners: Arc::clone(&listeners),
        snapshot: Arc::clone(&snapshot),
    };
    let aborted = background.block_on(drain.run(signals.terminate, signals.interrupt));
    manager.stopped(aborted);
    // The receivers may be gone.
    let _ = end.send(true);
    drop(workers);
    drop(entered);
    background.shutdown_timeout(Duration::from_secs(1));

    let last = snapshot.load();
    last.pipeline.authenticator.save();
    last.log.flush(Duration::from_secs(2));
    let result = if aborted == 0 { AuditResult::Done } else { AuditResult::Failed };
    last.audit(&last, AuditSource::Process, &AuditedAction::new("stopped", result).with("aborted", aborted));
    last.audit.flush(Duration::from_secs(1));
    last.spans.flush(Duration::from_secs(2));
    listeners.lock().socket_files().iter().for_each(|path| remove_socket(path));
    Ok(())
}

/// Why the gateway cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("{address} cannot be bound: {error}")]
    Bind { address: String, error: std::io::Error },
    #[error("listener {address}: {problem}")]
    Listener { address: String, problem: Box<Problem> },
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

/// Waits for the signal to shut down, then for the requests in flight.
struct Drain {
    manager: ServiceManager,
    lifecycle: Arc<Lifecycle>,
    metrics: Arc<Metrics>,
    listeners: Arc<Mutex<Listeners>>,
    snapshot: Arc<ArcSwap<Snapshot>>,
}

impl Drain {
    /// Comes back with the number of requests that did not come to their end.
    async fn run(&self, mut terminate: Signals, mut interrupt: Signals) -> i64 {
        let signal = next(&mut terminate, &mut interrupt).await;
        {
            let snapshot = self.snapshot.load();
            snapshot.audit(&snapshot, AuditSource::Signal(signal), &AuditedAction::new("stop", AuditResult::Done));
        }
        self.manager.stopping();
        self.metrics.ready(false);
        self.lifecycle.leave();
        // As the configuration is now: a reload may have changed it since the start.
        let ShutdownTimes { drain_delay, grace } = self.snapshot.load().settings.shutdown;
        let orderly = async {
            if !drain_delay.is_zero() {
                let delay = humantime::format_duration(drain_delay);
                log::info!("shutting down: not ready, requests are served as before for {delay}");
                tokio::time::sleep(drain_delay).await;
            }
            self.listeners.lock().close_all();
            self.lifecycle.drain();
            // Logged last, so that it is true when somebody reads it.
            let grace_text = humantime::format_duration(grace);
            log::info!("shutting down: listeners closed, requests in flight have {grace_text} to complete");
            let aborted = self.quiet(grace).await;
            self.last_uses().await;
            aborted
        };
        tokio::select! {
            aborted = orderly => aborted,
            _ = next(&mut terminate, &mut interrupt) => {
                let aborted = self.metrics.requests_in_flight();
                log::warn!("second signal: shutting down immediately: {aborted} requests are aborted");
                aborted
            }
        }
    }

    /// Waits for every connection to end: after its request, or because it has none. Comes back with the number of requests for
    /// which that takes too long.
    async fn quiet(&self, grace: Duration) -> i64 {
        let deadline = Instant::now() + grace;
        // Connections that were just accepted are on their way to a worker, where they are counted.
        tokio::time::sleep(Duration::from_millis(50).min(grace)).await;
        while self.metrics.requests_in_flight() > 0 || self.metrics.open_connections() > 0 {
            if Instant::now() >= deadline {
                let aborted = self.metrics.requests_in_flight();
                if aborted > 0 {
                    log::warn!("the grace period is over: {aborted} requests are aborted");
                }
                return aborted;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        0
    }

    /// Writes the last uses that the store does not have yet.
    async fn last_uses(&self) {
        let authenticator = Arc::clone(&self.snapshot.load().pipeline.authenticator);
        if tokio::time::timeout(USES_AT_STOP, authenticator.flush_uses()).await.is_err() {
            let waited = humantime::format_duration(USES_AT_STOP);
            log::warn!("last uses of tokens were not recorded: no response from the store within {waited}");
        }
    }
}

/// The name of the next signal to stop.
async fn next(terminate: &mut Signals, interrupt: &mut Signals) -> &'static str {
    tokio::select! {
        () = terminate.next() => "SIGTERM",
        () = interrupt.next() => "SIGINT",
    }
}

/// The signals that mean something to the gateway. One that is delivered before its receiver waits for it is kept.
struct ProcessSignals {
    terminate: Signals,
    interrupt: Signals,
    hangup: Signals,
    reopen: Signals,
}

impl ProcessSignals {
    /// From here on, none of them ends the process by itself. SIGXFSZ has a handler as well: a log file at its size limit
    /// must not end the process, and the log counts the lines it loses.
    fn handled() -> Self {
        let _ = Signals::of(SignalKind::from_raw(SIGXFSZ), "SIGXFSZ");
        Self {
            terminate: Signals::of(SignalKind::terminate(), "SIGTERM"),
            interrupt: Signals::of(SignalKind::interrupt(), "SIGINT"),
            hangup: Signals::of(SignalKind::hangup(), "SIGHUP"),
            reopen: Signals::of(SignalKind::user_defined1(), "SIGUSR1"),
        }
    }
}

/// The number on Linux, except on MIPS.
const SIGXFSZ: i32 = 25;

/// Reloads the configuration on SIGHUP and on requests of the admin listener, and reopens the access log first. A bad configuration changes nothing.
struct Reloader {
    snapshot: Arc<ArcSwap<Snapshot>>,
    rebuild: Rebuild,
    manager: ServiceManager,
    listeners: Arc<Mutex<Listeners>>,
    requests: mpsc::Receiver<ReloadRequest>,
    hangup: Signals,
    /// Notified of each new snapshot.
    replaced: Arc<Notify>,
    /// Keeps the channel open when there is no admin listener.
    _open: mpsc::Sender<ReloadRequest>,
}

/// Reopens the access log on SIGUSR1.
async fn reopen_when_asked(snapshot: Arc<ArcSwap<Snapshot>>, mut asked: Signals) {
    loop {
        asked.next().await;
        let done = reopen(&snapshot).await;
        if done == Ok(true) {
            log::info!("access log reopened");
        }
        let result = if done.is_ok() { AuditResult::Done } else { AuditResult::Failed };
        let snapshot = snapshot.load();
        snapshot.audit(&snapshot, AuditSource::Signal("SIGUSR1"), &AuditedAction::new("reopen_logs", result));
    }
}

/// Whether the log has been reopened; `false` if that has to wait for the log's reader.
async fn reopen(snapshot: &ArcSwap<Snapshot>) -> Result<bool, String> {
    let (log, audit) = (snapshot.load().log.clone(), snapshot.load().audit.clone());
    let reopen_all = move || {
        if let Err(why) = audit.reopen() {
            log::error!("audit log not reopened, lines go to the old file: admin.audit: {why}");
        }
        log.reopen()
    };
    let result = blocking(reopen_all).await?.map_err(|why| format!("log.access: {why}"));
    match &result {
        Ok(true) => {}
        Ok(false) => {
            log::warn!("the access log is blocked: its reader reads nothing; it is reopened when that ends")
        }
        Err(why) => log::error!("access log not reopened, lines go to the old file: {why}"),
    }
    result
}

impl Reloader {
    async fn run(mut self) {
        loop {
            let (source, reply) = tokio::select! {
                () = self.hangup.next() => (AuditSource::Signal("SIGHUP"), None),
                Some(request) = self.requests.recv() => request,
            };
            self.manager.reloading();
            let before = self.snapshot.load_full();
            let result = self.reload().await;
            self.manager.ready();
            before.audit(&self.snapshot.load(), source, &audited_reload(&result));
            if let Some(reply) = reply {
                // The client may be gone.
                let _ = reply.send(result);
            }
        }
    }

    async fn reload(&self) -> Result<Reloaded, String> {
        // First, because a rotated log must be reopened even if the reload fails. A blocked log does not keep the new
        // configuration from taking effect.
        let reopened = reopen(&self.snapshot).await.map(|_| ());
        let (current, rebuild) = (self.snapshot.load_full(), Arc::clone(&self.rebuild));
        let metrics = Arc::clone(&current.metrics);
        let listeners = Arc::clone(&self.listeners);
        let prepare = move || {
            let built = rebuild(&current, reopened)?;
            let prepared = listeners.lock().prepare(&built.settings).map_err(|error| error.to_string())?;
            Ok((built, prepared))
        };
        let result = blocking(prepare).await.and_then(|built| built);
        metrics.reloaded(result.is_ok(), super::now().unix_ms / 1000);
        match result {
            Ok((Rebuilt { snapshot, report, done, .. }, prepared)) => {
                self.snapshot.store(Arc::new(snapshot));
                self.listeners.lock().apply(prepared);
                done();
                self.replaced.notify_one();
                log::info!("configuration reloaded");
                if !report.restart.is_empty() {
                    let keys = report.restart.join(", ");
                    log::warn!("changed settings that need a restart are not in force: {keys}");
                }
                Ok(report)
            }
            Err(why) => {
                log::error!("configuration not reloaded, nothing changed: {why}");
                Err(why)
            }
        }
    }
}

/// Runs blocking work on a thread of its own.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|error| format!("internal error: {error}"))
}

/// The deliveries of one signal. If it cannot be handled, there are none.
struct Signals(Option<Signal>);

impl Signals {
    fn of(kind: SignalKind, name: &str) -> Self {
        let handled = signal(kind).inspect_err(|error| log::error!("{name} cannot be handled: {error}"));
        Self(handled.ok())
    }

    async fn next(&mut self) {
        match &mut self.0 {
            // The result only says whether the signal can be delivered again, which it always can.
            Some(signal) => {
                let _ = signal.recv().await;
            }
            None => std::future::pending().await,
        }
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
