//! The end of the process: what is said to balancers, when listeners close, and how long requests in flight may take.

use super::listeners::Listeners;
use super::notify::ServiceManager;
use super::signals::{Signals, next_to_stop};
use super::{Lifecycle, ShutdownTimes, Snapshot};
use crate::telemetry::audit_log::{AuditResult, AuditSource, AuditedAction};
use crate::telemetry::metrics::Metrics;
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// How long a shutdown waits for the last uses to be written.
const USES_AT_STOP: Duration = Duration::from_secs(2);

/// Waits for the signal to shut down, or for an upgrade, and then for the requests in flight.
pub(super) struct Drain {
    pub(super) manager: ServiceManager,
    pub(super) lifecycle: Arc<Lifecycle>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) listeners: Arc<Mutex<Listeners>>,
    pub(super) snapshot: Arc<ArcSwap<Snapshot>>,
    /// Another process serves.
    pub(super) passed_on: CancellationToken,
}

impl Drain {
    /// Comes back with the number of requests that did not come to their end.
    pub(super) async fn run(&self, mut terminate: Signals, mut interrupt: Signals) -> i64 {
        let signal = tokio::select! {
            signal = next_to_stop(&mut terminate, &mut interrupt) => signal,
            () = self.passed_on.cancelled() => return self.behind_an_upgrade(terminate, interrupt).await,
        };
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
            self.finish(grace).await
        };
        tokio::select! {
            aborted = orderly => aborted,
            _ = next_to_stop(&mut terminate, &mut interrupt) => self.at_once(),
        }
    }

    /// Another process accepts the connections: this one completes its requests. No balancer has to know.
    async fn behind_an_upgrade(&self, mut terminate: Signals, mut interrupt: Signals) -> i64 {
        let grace = self.snapshot.load().settings.shutdown.grace;
        let orderly = async {
            self.listeners.lock().passed_on();
            self.finish(grace).await
        };
        let stopped = async {
            // A service manager that stops the service tells all its processes: this one is ending already.
            next_to_stop(&mut terminate, &mut interrupt).await;
            next_to_stop(&mut terminate, &mut interrupt).await;
        };
        tokio::select! {
            aborted = orderly => aborted,
            () = stopped => self.at_once(),
        }
    }

    fn at_once(&self) -> i64 {
        let aborted = self.metrics.requests_in_flight();
        log::warn!("second signal: shutting down immediately: {aborted} requests are aborted");
        aborted
    }

    /// No connection is accepted any more.
    async fn finish(&self, grace: Duration) -> i64 {
        self.lifecycle.drain();
        // Logged last, so that it is true when somebody reads it.
        let grace_text = humantime::format_duration(grace);
        log::info!("shutting down: listeners closed, requests in flight have {grace_text} to complete");
        let aborted = self.quiet(grace).await;
        let engine = self.snapshot.load().pipeline.limits.engine().map(Arc::clone);
        tokio::join!(self.last_uses(), async {
            if let Some(engine) = engine {
                // What is leased goes back to the other replicas.
                engine.end().await;
            }
        });
        aborted
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
