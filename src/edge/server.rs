//! Starts and ends the process's work: listeners, the services beside them, signals, reload and a drain that loses no
//! request.

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
/// Writes to a client are gathered up to one segment; reads have a buffer of our own.
const WRITE_BUFFER: usize = 1460;
const USES_FLUSHED_EVERY: Duration = Duration::from_secs(60);
/// How long a stop may take longer for the sake of them.
const USES_AT_STOP: Duration = Duration::from_secs(2);

/// Builds the next snapshot from the configuration as it is now. Told whether the log that is open could be reopened.
/// Blocks: files are read and names resolved.
pub type Rebuild = Arc<dyn Fn(&Snapshot, Result<(), String>) -> Result<Rebuilt, String> + Send + Sync>;

/// What a reload puts in place, and what it says of it.
pub struct Rebuilt {
    pub snapshot: Snapshot,
    pub report: Reloaded,
}

/// What is being served.
pub struct Running {
    pub settings: ServerSettings,
    pub snapshot: Snapshot,
    pub rebuild: Rebuild,
}

/// Serves until a signal ends it.
pub fn serve(running: Running) {
    catch_early();
    let Running { settings, snapshot, rebuild } = running;
    let started_unix_ms = super::now().unix_ms;
    let metrics = Arc::clone(&snapshot.metrics);
    metrics.reloaded(true, started_unix_ms / 1000);
    let snapshot = Arc::new(ArcSwap::from_pointee(snapshot));
    let lifecycle = Arc::new(Lifecycle::default());

    let conf = ServerConf {
        threads: settings.threads,
        // Measured: stealing costs a fifth of the CPU of a request (benches/README.md).
        work_stealing: false,
        max_retries: MAX_ATTEMPTS,
        upstream_keepalive_pool_size: UPSTREAM_POOL,
        // Our own drain comes before the framework's, which can only sleep.
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

/// Removes the socket file of a listener that is closing. One on which another process listens by now stays; one that
/// answers longer than this is replaced by the next start.
fn remove_socket(path: &str) {
    let deadline = Instant::now() + Duration::from_secs(1);
    loop {
        match SocketPlace::of(path) {
            SocketPlace::Stale => {
                // A file that is left behind is replaced by the next start.
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

/// Waits for the signal to stop, then for the requests in flight.
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
            log::error!("signals can't be caught; stopping");
            return ShutdownSignal::GracefulTerminate;
        };
        next(&mut terminate, &mut interrupt).await;
        self.metrics.ready(false);
        self.lifecycle.drain();
        // Last, so that it is true for whoever reads it.
        log::info!("stopping: requests in flight have {:?}, new ones get 503", self.grace);
        tokio::select! {
            () = async {
                self.quiet().await;
                self.last_uses().await;
            } => {}
            () = next(&mut terminate, &mut interrupt) => log::warn!("asked twice: stopping at once"),
        }
        // Not the fast one: it would not tell the accept loops to end, and they would spin on a runtime that is gone.
        ShutdownSignal::GracefulTerminate
    }
}

impl Drain {
    async fn quiet(&self) {
        let deadline = Instant::now() + self.grace;
        while self.metrics.requests_in_flight() > 0 {
            if Instant::now() >= deadline {
                log::warn!("{} requests are cut off after the grace period", self.metrics.requests_in_flight());
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // Answers that were just written are still on their way through the sockets' close.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

impl Drain {
    /// Nobody uses a token any more: what the store was not told yet is told now.
    async fn last_uses(&self) {
        let authenticator = Arc::clone(&self.snapshot.load().pipeline.authenticator);
        if tokio::time::timeout(USES_AT_STOP, authenticator.flush_uses()).await.is_err() {
            log::warn!("the last uses of tokens were not recorded: no answer within {USES_AT_STOP:?}");
        }
    }
}

async fn next(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// From here on no signal of ours ends the process: until the services that wait for them are there, they do nothing.
/// Neither does a file that has grown to the limit of its size: the log counts what it loses.
fn catch_early() {
    let caught = || -> std::io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let _entered = runtime.enter();
        for kind in [SignalKind::hangup(), SignalKind::user_defined1(), SignalKind::from_raw(SIGXFSZ)] {
            drop(signal(kind)?);
        }
        Ok(())
    };
    if let Err(error) = caught() {
        log::error!("SIGHUP and SIGUSR1 cannot be caught and would end the process: {error}");
    }
}

/// The number on Linux, on all but MIPS.
const SIGXFSZ: i32 = 25;

/// Puts a new snapshot in place on SIGHUP or when the admin listener asks, and reopens the log on SIGUSR1 as well. A bad
/// configuration changes nothing.
struct Reloader {
    snapshot: Arc<ArcSwap<Snapshot>>,
    rebuild: Rebuild,
    requests: Mutex<mpsc::Receiver<ReloadRequest>>,
    /// Told of each snapshot that is put in place.
    replaced: Arc<Notify>,
    /// Keeps the channel open when there is no admin listener.
    _open: mpsc::Sender<ReloadRequest>,
}

#[async_trait]
impl BackgroundService for Reloader {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        // A log that is moved must not wait for names that a reload resolves.
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
                // Whoever asked may be gone.
                let _ = reply.send(result);
            }
        }
    }

    async fn reopen_when_asked(&self) {
        let mut asked = Signals::of(SignalKind::user_defined1(), "SIGUSR1");
        loop {
            asked.next().await;
            if self.reopen().await.is_ok_and(|done| done) {
                log::info!("the access log was reopened");
            }
        }
    }

    /// Whether the log has been reopened by now.
    async fn reopen(&self) -> Result<bool, String> {
        let log = self.snapshot.load().log.clone();
        let result = blocking(move || log.reopen()).await?.map_err(|why| format!("log.access: {why}"));
        match &result {
            Ok(true) => {}
            Ok(false) => log::warn!("the access log is stuck, as its reader takes nothing; it is reopened after that"),
            Err(why) => log::error!("the access log goes on where it was: {why}"),
        }
        result
    }

    async fn reload(&self) -> Result<Reloaded, String> {
        // Before anything that can fail: whoever has moved the log needs it under its name again in any case. One that
        // is stuck keeps no rule from coming into force.
        let reopened = self.reopen().await.map(drop);
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
                    log::warn!("[server] or [admin] changed: {keys} take a restart and are not in force");
                }
                Ok(report)
            }
            Err(why) => {
                log::error!("the configuration stays as it was: {why}");
                Err(why)
            }
        }
    }
}

/// Runs what blocks on a thread that nobody else needs.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|error| format!("a fault of tollgate's own: {error}"))
}

/// A signal that may come again and again; one that cannot be caught never comes.
struct Signals(Option<Signal>);

impl Signals {
    fn of(kind: SignalKind, name: &str) -> Self {
        let caught = signal(kind).inspect_err(|error| log::error!("{name} cannot be caught: {error}"));
        Self(caught.ok())
    }

    async fn next(&mut self) {
        match &mut self.0 {
            Some(signal) => drop(signal.recv().await),
            None => std::future::pending().await,
        }
    }
}

/// Keeps the token cache in step with the store, also when a reload brings another store.
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
            // One future for as long as the store is the same: its subscriptions live in it.
            let mut following = std::pin::pin!(authenticator.follow_changes());
            loop {
                tokio::select! {
                    () = &mut following => {}
                    () = self.replaced(&authenticator) => {
                        // It knows of uses that the next one does not.
                        let last = Arc::clone(&authenticator);
                        tokio::spawn(async move { last.flush_uses().await });
                        break;
                    }
                    // Slices take their time where there are many: never two at once.
                    _ = flush.tick(), if flushing.as_ref().is_none_or(tokio::task::JoinHandle::is_finished) => {
                        let last = Arc::clone(&authenticator);
                        // Beside the following: neither may hold up the other.
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
    /// Comes back when a reload has put another store in place.
    async fn replaced(&self, current: &Arc<crate::identity::Authenticator>) {
        while Arc::ptr_eq(current, &self.snapshot.load().pipeline.authenticator) {
            self.replaced.notified().await;
        }
    }
}
