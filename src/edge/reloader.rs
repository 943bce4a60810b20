//! What changes a running process: reloads and upgrades, one at a time, and the reopening of its logs. What fails changes
//! nothing.

use super::Snapshot;
use super::listeners::Listeners;
use super::notify::ServiceManager;
use super::server::{Rebuild, Rebuilt};
use super::signals::Signals;
use super::upgrade::Successors;
use crate::admin::{ReloadHistory, Reloaded, Upgraded, audited_reload, audited_upgrade};
use crate::telemetry::audit_log::{AuditResult, AuditSource, AuditedAction};
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use std::sync::Arc;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::sync::{CancellationToken, DropGuard};

/// Who asks for a change, and where to say how it went if somebody waits for that.
pub(super) enum ChangeRequest {
    Reload(AuditSource, Option<oneshot::Sender<Result<Reloaded, String>>>),
    Upgrade(AuditSource, Option<oneshot::Sender<Result<PassedOn, String>>>),
}

/// Another process serves. This one begins to end when this is dropped: when who asked has been told.
pub(super) struct PassedOn {
    pub(super) upgraded: Upgraded,
    _end: DropGuard,
}

/// Reloads the configuration on SIGHUP, upgrades on SIGUSR2, and does either when the admin listener asks.
pub(super) struct Reloader {
    pub(super) snapshot: Arc<ArcSwap<Snapshot>>,
    pub(super) rebuild: Rebuild,
    pub(super) manager: ServiceManager,
    /// What the reloads changed.
    pub(super) reloads: Arc<ReloadHistory>,
    pub(super) listeners: Arc<Mutex<Listeners>>,
    pub(super) requests: mpsc::Receiver<ChangeRequest>,
    pub(super) hangup: Signals,
    pub(super) upgrade: Signals,
    /// `None`: there is nothing to start again.
    pub(super) successors: Option<Arc<Successors>>,
    /// Cancelled when another process serves.
    pub(super) passed_on: CancellationToken,
    /// Notified of each new snapshot.
    pub(super) replaced: Arc<Notify>,
    /// Keeps the channel open when there is no admin listener.
    pub(super) _open: mpsc::Sender<ChangeRequest>,
}

/// Reopens the access log on SIGUSR1.
pub(super) async fn reopen_when_asked(snapshot: Arc<ArcSwap<Snapshot>>, mut asked: Signals) {
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
    /// Comes back when another process serves.
    pub(super) async fn run(mut self) {
        loop {
            let request = tokio::select! {
                () = self.hangup.next() => ChangeRequest::Reload(AuditSource::Signal("SIGHUP"), None),
                () = self.upgrade.next() => ChangeRequest::Upgrade(AuditSource::Signal("SIGUSR2"), None),
                Some(request) = self.requests.recv() => request,
            };
            match request {
                ChangeRequest::Reload(source, reply) => {
                    self.manager.reloading();
                    let before = self.snapshot.load_full();
                    let result = self.reload().await;
                    self.manager.ready();
                    before.audit(&self.snapshot.load(), source, &audited_reload(&result));
                    self.reloads.note(super::now().unix_ms, source, &result);
                    if let Some(reply) = reply {
                        // The client may be gone.
                        let _ = reply.send(result);
                    }
                }
                ChangeRequest::Upgrade(source, reply) => {
                    let result = self.upgrade().await;
                    {
                        let snapshot = self.snapshot.load();
                        snapshot.audit(&snapshot, source, &audited_upgrade(&result));
                    }
                    let done = result.is_ok();
                    let end = || self.passed_on.clone().drop_guard();
                    let result = result.map(|upgraded| PassedOn { upgraded, _end: end() });
                    if let Some(reply) = reply {
                        let _ = reply.send(result);
                    }
                    if done {
                        return;
                    }
                }
            }
        }
    }

    async fn upgrade(&self) -> Result<Upgraded, String> {
        let Some(successors) = self.successors.clone() else {
            return Err("this process has no configuration file with which another could be started".into());
        };
        let (listeners, authenticator) =
            (Arc::clone(&self.listeners), Arc::clone(&self.snapshot.load().pipeline.authenticator));
        let start = move || {
            // The new process begins with the tokens that this one knows.
            authenticator.save();
            let sockets = listeners.lock().to_pass_on().map_err(|error| format!("no descriptors are left: {error}"))?;
            successors.start(&sockets)
        };
        let result = blocking(start).await.and_then(|started| started);
        match &result {
            Ok(successor) => {
                self.manager.main_process(successor.pid);
                log::info!("upgraded: process {} accepts the connections from now on", successor.pid);
            }
            Err(why) => log::error!("not upgraded, this process goes on: {why}"),
        }
        result.map(|successor| Upgraded { pid: successor.pid, replaced: std::process::id() })
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
                let next = snapshot.pipeline.limits.engine().map(Arc::clone);
                if let Some(engine) = &next {
                    engine.start();
                }
                let before = self.snapshot.swap(Arc::new(snapshot));
                if let Some(engine) = before.pipeline.limits.engine()
                    && next.as_ref().is_none_or(|next| !Arc::ptr_eq(next, engine))
                {
                    engine.retire();
                }
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
