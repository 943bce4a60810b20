//! Starts and ends the process's work: listeners, the services beside them, signals, reload and a drain that loses no
//! request.

use super::admin::{AdminGate, ReloadRequest};
use super::connection::Gate;
use super::proxy::{MAX_ATTEMPTS, MainLane};
use super::{Lifecycle, Snapshot};
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

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerSettings {
    pub listen: Vec<Listen>,
    /// `None`: no admin listener.
    pub admin: Option<Listen>,
    /// Worker threads.
    pub threads: usize,
    /// How long requests in flight may take once a stop was asked for.
    pub grace: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// `address:port`.
    Tcp(String),
    /// A path, and the mode of the socket file.
    Unix(String, u32),
}

/// Builds the next snapshot from the configuration as it is now.
pub type Rebuild = Box<dyn Fn(&Snapshot) -> Result<Snapshot, String> + Send + Sync>;

/// What is being served.
pub struct Running {
    pub settings: ServerSettings,
    pub snapshot: Snapshot,
    pub rebuild: Rebuild,
}

/// Says which address of these can't be listened on. The framework would try again for half a minute, and panic.
pub fn check_free(settings: &ServerSettings) -> Result<(), String> {
    for listen in settings.listen.iter().chain(&settings.admin) {
        match listen {
            Listen::Tcp(address) => {
                std::net::TcpListener::bind(address)
                    .map_err(|error| format!("{address} can't be listened on: {error}"))?;
            }
            Listen::Unix(path, _) => {
                if std::os::unix::net::UnixStream::connect(path).is_ok() {
                    return Err(format!("somebody listens on unix:{path} already"));
                }
                let folder = std::path::Path::new(path).parent().filter(|folder| !folder.is_dir());
                if let Some(folder) = folder {
                    return Err(format!("unix:{path}: there is no folder {}", folder.display()));
                }
            }
        }
    }
    Ok(())
}

/// Serves until a signal ends it.
pub fn serve(running: Running) {
    let Running { settings, snapshot, rebuild } = running;
    let started_unix_ms = super::now().unix_ms;
    let metrics = Arc::clone(&snapshot.pipeline.metrics);
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

    let lane = Arc::new(http_proxy(&server.configuration, MainLane { lifecycle: Arc::clone(&lifecycle) }));
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

    let drain = Drain { lifecycle, metrics: Arc::clone(&metrics), grace: settings.grace };
    server.run(RunArgs { shutdown_signal: Box::new(drain) });

    let last = snapshot.load();
    last.pipeline.authenticator.save();
    last.log.flush(Duration::from_secs(2));
    for listen in settings.listen.iter().chain(&settings.admin) {
        if let Listen::Unix(path, _) = listen {
            // Nobody listens there any more.
            drop(std::fs::remove_file(path));
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
            () = self.quiet() => {}
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

async fn next(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// Puts a new snapshot in place on SIGHUP or when the admin listener asks. A bad configuration changes nothing.
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
        let Ok(mut hangup) = signal(SignalKind::hangup()) else {
            log::error!("SIGHUP can't be caught: reload through the admin listener only");
            return;
        };
        let mut requests = self.requests.lock().await;
        loop {
            let reply = tokio::select! {
                _ = hangup.recv() => None,
                request = requests.recv() => request,
                _ = shutdown.changed() => return,
            };
            let result = self.reload();
            if let Some(reply) = reply {
                // Whoever asked may be gone.
                drop(reply.send(result));
            }
        }
    }
}

impl Reloader {
    fn reload(&self) -> Result<(), String> {
        let current = self.snapshot.load_full();
        // Names may have to be resolved, and files read: this runs on a thread of its own.
        let result = (self.rebuild)(&current);
        current.pipeline.metrics.reloaded(result.is_ok(), super::now().unix_ms / 1000);
        match result {
            Ok(next) => {
                self.snapshot.store(Arc::new(next));
                self.replaced.notify_one();
                log::info!("the configuration was loaded anew");
                Ok(())
            }
            Err(why) => {
                log::error!("the configuration stays as it was: {why}");
                Err(why)
            }
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
        let mut flushed = super::now().unix_ms;
        let mut flush = tokio::time::interval_at(tokio::time::Instant::now() + USES_FLUSHED_EVERY, USES_FLUSHED_EVERY);
        loop {
            let authenticator = Arc::clone(&self.snapshot.load().pipeline.authenticator);
            // One future for as long as the store is the same: its subscriptions live in it.
            let mut following = std::pin::pin!(authenticator.follow_changes());
            loop {
                tokio::select! {
                    () = &mut following => {}
                    () = self.replaced(&authenticator) => break,
                    _ = flush.tick() => {
                        let since = std::mem::replace(&mut flushed, super::now().unix_ms);
                        let last = Arc::clone(&authenticator);
                        // Beside the following: neither may hold up the other.
                        tokio::spawn(async move { last.flush_uses(since).await });
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
