//! Runs the process: listeners, background services, signals, reload, and a graceful shutdown that loses no request in
//! flight. It must not know how a request is judged.

use super::admin::{AdminGate, ReloadRequest};
use super::connection::Gate;
use super::listen::{Listen, ServerSettings, SocketPlace};
use super::proxied::{MAX_ATTEMPTS, ProxiedLane};
use super::{Lifecycle, Snapshot};
use crate::admin::Reloaded;
use crate::telemetry::metrics::Metrics;
use arc_swap::ArcSwap;
use async_trait::async_trait;
use pingora::listeners::{L4BufferSettings, ListenerConfig};
use pingora::proxy::http_proxy;
use pingora::server::configuration::ServerConf;
use pingora::server::{RunArgs, Server, ShutdownSignal, ShutdownSignalWatch, ShutdownWatch};
use pingora::services::background::{BackgroundService, background_service};
use pingora::services::listening::Service;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Mutex, Notify, mpsc};

/// Idle connections to backends that are kept.
const UPSTREAM_POOL: usize = 1_024;
/// Writes to a client are buffered up to one TCP segment. Reads use the buffer of `client`.
const WRITE_BUFFER: usize = 1460;
/// How often the last uses of tokens are written to the store, and the cache to its file.
const USES_FLUSHED_EVERY: Duration = Duration::from_secs(60);
/// How long a shutdown waits for the last uses to be written.
const USES_AT_STOP: Duration = Duration::from_secs(2);

/// Builds the next snapshot from the current configuration file. The second argument says whether the open access log
/// could be reopened. Blocks: reads files and resolves names.
pub type Rebuild = Arc<dyn Fn(&Snapshot, Result<(), String>) -> Result<Rebuilt, String> + Send + Sync>;

/// The result of a rebuild: the snapshot to serve with, and what to report.
pub struct Rebuilt {
    pub snapshot: Snapshot,
    pub report: Reloaded,
}

/// What [`serve`] runs with.
pub struct Running {
    pub settings: ServerSettings,
    pub snapshot: Snapshot,
    pub rebuild: Rebuild,
}

/// Serves until a signal ends the process.
pub fn serve(running: Running) {
    handle_signals_early();
    let Running { settings, snapshot, rebuild } = running;
    let started_unix_ms = super::now().unix_ms;
    let metrics = Arc::clone(&snapshot.metrics);
    metrics.reloaded(true, started_unix_ms / 1000);
    let snapshot = Arc::new(ArcSwap::from_pointee(snapshot));
    let lifecycle = Arc::new(Lifecycle::default());

    let conf = ServerConf {
        threads: settings.threads,
        // Measured: work stealing costs a fifth of a request's CPU time (benches/README.md).
        work_stealing: false,
        max_retries: MAX_ATTEMPTS,
        upstream_keepalive_pool_size: UPSTREAM_POOL,
        // `Drain` waits for the requests in flight; the framework's own grace period can only sleep.
        grace_period_seconds: Some(0),
        graceful_shutdown_timeout_seconds: Some(1),
        ..ServerConf::default()
    };
    let mut server = Server::new_with_opt_and_conf(None, conf);
    server.bootstrap();

    let lane = Arc::new(http_proxy(&server.configuration, ProxiedLane { lifecycle: Arc::clone(&lifecycle) }));
    let gate = Gate { snapshot: Arc::clone(&snapshot), lane, lifecycle: Arc::clone(&lifecycle) };
    let mut api = Service::new("api".into(), gate);
    settings.listen.iter().for_each(|listen| api.add_listener(listener(listen)));
    server.add_service(api);

    let (reloads, requests) = mpsc::channel(1);
    if let Some(listen) = &settings.admin {
        let gate = AdminGate {
            snapshot: Arc::clone(&snapshot),
            lifecycle: Arc::clone(&lifecycle),
            reloads: reloads.clone(),
            started_unix_ms,
        };
        let mut admin = Service::new("admin".into(), gate);
        admin.add_listener(listener(listen));
        admin.threads = Some(1);
        server.add_service(admin);
    }
    let replaced = Arc::new(Notify::new());
    let reloader = Reloader {
        snapshot: Arc::clone(&snapshot),
        rebuild,
        requests: Mutex::new(requests),
        replaced: Arc::clone(&replaced),
        _open: reloads,
    };
    server.add_service(background_service("reload", reloader));
    server.add_service(background_service("tokens", Tokens { snapshot: Arc::clone(&snapshot), replaced }));

    let drain =
        Drain { lifecycle, metrics: Arc::clone(&metrics), grace: settings.grace, snapshot: Arc::clone(&snapshot) };
    server.run(RunArgs { shutdown_signal: Box::new(drain) });

    let last = snapshot.load();
    last.pipeline.authenticator.save();
    last.log.flush(Duration::from_secs(2));
    for listen in settings.listen.iter().chain(&settings.admin) {
        if let Listen::Unix(path, _) = listen {
            remove_socket(path);
        }
    }
}

/// Removes the socket file of a listener that is closing, unless another process listens on it by now. One that still
/// accepts connections at the deadline is left, and the next start replaces it.
fn remove_socket(path: &str) {
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

fn listener(listen: &Listen) -> ListenerConfig {
    let config = match listen {
        Listen::Tcp(address) => ListenerConfig::tcp(address),
        Listen::Unix(path, mode) => ListenerConfig::uds(path).permissions(std::fs::Permissions::from_mode(*mode)),
    };
    config.l4_buffer(L4BufferSettings::new(0, WRITE_BUFFER))
}

/// Waits for the signal to shut down, then for the requests in flight.
struct Drain {
    lifecycle: Arc<Lifecycle>,
    metrics: Arc<Metrics>,
    grace: Duration,
    snapshot: Arc<ArcSwap<Snapshot>>,
}

#[async_trait]
impl ShutdownSignalWatch for Drain {
    async fn recv(&self) -> ShutdownSignal {
        let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
        let (Ok(mut terminate), Ok(mut interrupt)) = signals else {
            log::error!("SIGTERM and SIGINT cannot be handled: shutting down");
            return ShutdownSignal::GracefulTerminate;
        };
        next(&mut terminate, &mut interrupt).await;
        self.metrics.ready(false);
        self.lifecycle.drain();
        // Logged last, so that it is true when somebody reads it.
        let grace = humantime::format_duration(self.grace);
        log::info!("shutting down: requests in flight have {grace} to complete, new ones get 503");
        tokio::select! {
            () = async {
                self.quiet().await;
                self.last_uses().await;
            } => {}
            () = next(&mut terminate, &mut interrupt) => log::warn!("second signal: shutting down immediately"),
        }
        // The fast shutdown would not end the accept loops, and they would spin on a runtime that is gone.
        ShutdownSignal::GracefulTerminate
    }
}

impl Drain {
    async fn quiet(&self) {
        let deadline = Instant::now() + self.grace;
        while self.metrics.requests_in_flight() > 0 {
            if Instant::now() >= deadline {
                log::warn!("the grace period is over: {} requests are aborted", self.metrics.requests_in_flight());
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // Responses that were just written need their connections for a moment longer.
        tokio::time::sleep(Duration::from_millis(50)).await;
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

async fn next(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// Installs handlers for the signals that would otherwise end the process before the services that handle them run.
/// SIGXFSZ gets one as well: a log file at its size limit must not end the process, and the log counts the lines it loses.
fn handle_signals_early() {
    let installed = || -> std::io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let _entered = runtime.enter();
        for kind in [SignalKind::hangup(), SignalKind::user_defined1(), SignalKind::from_raw(SIGXFSZ)] {
            // The handler stays installed for the process's lifetime; nobody waits for the signal yet.
            let _ = signal(kind)?;
        }
        Ok(())
    };
    if let Err(error) = installed() {
        log::error!("SIGHUP and SIGUSR1 cannot be handled and would end the process: {error}");
    }
}

/// The number on Linux, except on MIPS.
const SIGXFSZ: i32 = 25;

/// Reloads the configuration on SIGHUP and on requests of the admin listener, and reopens the access log on these and on
/// SIGUSR1. A bad configuration changes nothing.
struct Reloader {
    snapshot: Arc<ArcSwap<Snapshot>>,
    rebuild: Rebuild,
    requests: Mutex<mpsc::Receiver<ReloadRequest>>,
    /// Notified of each new snapshot.
    replaced: Arc<Notify>,
    /// Keeps the channel open when there is no admin listener.
    _open: mpsc::Sender<ReloadRequest>,
}

#[async_trait]
impl BackgroundService for Reloader {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        // Two loops: reopening a rotated log must not wait while a reload resolves names.
        tokio::select! {
            () = self.reload_when_asked() => {}
            () = self.reopen_when_asked() => {}
            _ = shutdown.changed() => {}
        }
    }
}

impl Reloader {
    async fn reload_when_asked(&self) {
        let mut hangups = Signals::of(SignalKind::hangup(), "SIGHUP");
        let mut requests = self.requests.lock().await;
        loop {
            let reply = tokio::select! {
                () = hangups.next() => None,
                request = requests.recv() => request,
            };
            let result = self.reload().await;
            if let Some(reply) = reply {
                // The client may be gone.
                let _ = reply.send(result);
            }
        }
    }

    async fn reopen_when_asked(&self) {
        let mut asked = Signals::of(SignalKind::user_defined1(), "SIGUSR1");
        loop {
            asked.next().await;
            if self.reopen().await.is_ok_and(|done| done) {
                log::info!("access log reopened");
            }
        }
    }

    /// Whether the log has been reopened; `false` if that has to wait for the log's reader.
    async fn reopen(&self) -> Result<bool, String> {
        let log = self.snapshot.load().log.clone();
        let result = blocking(move || log.reopen()).await?.map_err(|why| format!("log.access: {why}"));
        match &result {
            Ok(true) => {}
            Ok(false) => {
                log::warn!("the access log is blocked: its reader reads nothing; it is reopened when that ends")
            }
            Err(why) => log::error!("access log not reopened, lines go to the old file: {why}"),
        }
        result
    }

    async fn reload(&self) -> Result<Reloaded, String> {
        // First, because a rotated log must be reopened even if the reload fails. A blocked log does not keep the new
        // configuration from taking effect.
        let reopened = self.reopen().await.map(|_| ());
        let (current, rebuild) = (self.snapshot.load_full(), Arc::clone(&self.rebuild));
        let metrics = Arc::clone(&current.metrics);
        let result = blocking(move || rebuild(&current, reopened)).await.and_then(|built| built);
        metrics.reloaded(result.is_ok(), super::now().unix_ms / 1000);
        match result {
            Ok(Rebuilt { snapshot, report }) => {
                self.snapshot.store(Arc::new(snapshot));
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

#[async_trait]
impl BackgroundService for Tokens {
    async fn start(&self, mut shutdown: ShutdownWatch) {
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
                    _ = shutdown.changed() => return,
                }
            }
        }
    }
}

impl Tokens {
    /// Waits until a reload has replaced the authenticator.
    async fn replaced(&self, current: &Arc<crate::identity::Authenticator>) {
        while Arc::ptr_eq(current, &self.snapshot.load().pipeline.authenticator) {
            self.replaced.notified().await;
        }
    }
}
