//! The admin listener: reads plain requests and lets `admin` answer them. Never on the API listeners.

use super::client::{ClientStream, Head, HeadLimits};
use super::{Lifecycle, Snapshot};
use crate::admin::{self, Action, Operator};
use crate::request::head;
use crate::request::view::{Framing, Method};
use arc_swap::ArcSwap;
use async_trait::async_trait;
use pingora::apps::ServerApp;
use pingora::protocols::Stream;
use pingora::server::ShutdownWatch;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

const LIMITS: HeadLimits = HeadLimits {
    header_bytes: 16 * 1024,
    target_bytes: 4 * 1024,
    header_timeout: Duration::from_secs(5),
    idle_timeout: Duration::from_secs(75),
};

/// Asks for a reload and says how it went.
pub(super) type ReloadRequest = oneshot::Sender<Result<(), String>>;

pub(super) struct AdminGate {
    pub(super) snapshot: Arc<ArcSwap<Snapshot>>,
    pub(super) lifecycle: Arc<Lifecycle>,
    pub(super) reloads: mpsc::Sender<ReloadRequest>,
    pub(super) started_unix_ms: u64,
}

#[async_trait]
impl ServerApp for AdminGate {
    async fn process_new(self: &Arc<Self>, socket: Stream, _shutdown: &ShutdownWatch) -> Option<Stream> {
        let mut client = ClientStream::new(socket);
        while let Head::Complete(bytes) = client.read_head(|| LIMITS, std::future::pending()).await {
            if LIMITS.judge(&bytes).is_some() {
                break;
            }
            let Ok(view) = head::parse(&bytes) else { break };
            let snapshot = self.snapshot.load_full();
            let operator = Operator {
                pipeline: &snapshot.pipeline,
                ready: !self.lifecycle.is_draining(),
                started_unix_ms: self.started_unix_ms,
                now: super::now(),
            };
            let answer = match admin::respond(&view, &operator) {
                Action::Answer(answer) => answer,
                Action::Reload => admin::reloaded(self.reload().await),
            };
            let keep = view.keep_alive && view.body == Framing::Empty;
            let written = client.write(&answer.render(view.method == Method::Head, !keep)).await;
            if !keep || written.is_err() {
                break;
            }
        }
        client.close().await;
        None
    }
}

impl AdminGate {
    async fn reload(&self) -> Result<(), String> {
        let (reply, answer) = oneshot::channel();
        let gone = || "the reload service has ended".to_owned();
        self.reloads.send(reply).await.map_err(|_| gone())?;
        answer.await.unwrap_or_else(|_| Err(gone()))
    }
}
