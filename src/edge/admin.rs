//! The admin listener: reads plain requests and lets `admin` answer them. Never on the API listeners.

use super::client::{After, ClientStream, Head, HeadLimits};
use super::listener::ListenerState;
use super::reloader::{ChangeRequest, PassedOn};
use super::socket::Socket;
use super::workers::Serve;
use super::{Lifecycle, Snapshot};
use crate::admin::{self, Action, AdminTerms, Operator, ReloadHistory, Reloaded, Unread};
use crate::request::head;
use crate::request::origin::Arrival;
use crate::request::view::{Framing, Method};
use crate::telemetry::audit_log::AuditSource;
use crate::telemetry::metrics::AdminDenial;
use crate::telemetry::outage::LogThrottle;
use arc_swap::ArcSwap;
use bytes::Bytes;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

const LIMITS: HeadLimits = HeadLimits {
    header_bytes: 16 * 1024,
    target_bytes: 4 * 1024,
    header_timeout: Duration::from_secs(5),
    idle_timeout: Duration::from_secs(75),
};

pub(super) struct AdminGate {
    pub(super) snapshot: Arc<ArcSwap<Snapshot>>,
    pub(super) lifecycle: Arc<Lifecycle>,
    pub(super) changes: mpsc::Sender<ChangeRequest>,
    pub(super) started_unix_ms: u64,
    pub(super) reloads: Arc<ReloadHistory>,
    /// A flood of wrong tokens must not fill the disk.
    pub(super) complaints: LogThrottle,
}

impl Serve for AdminGate {
    async fn serve(self: Arc<Self>, socket: Socket, listener: Arc<ListenerState>, _guard: impl Send + 'static) {
        let source = source(&socket);
        let arrival = Arrival::of(socket.peer());
        let mut client = ClientStream::new(socket, arrival);
        loop {
            let head = match client.read_head(|| LIMITS, pin!(std::future::pending())).await {
                Head::Complete(bytes) => match LIMITS.judge(&bytes) {
                    None => Ok(with_host(bytes)),
                    Some(head) => Err(unread(&head)),
                },
                Head::Closed => break,
                head => Err(unread(&head)),
            };
            let parsed =
                head.as_ref().map_err(|why| *why).and_then(|bytes| head::parse(bytes).map_err(Unread::Malformed));
            let view = match parsed {
                Ok(view) => view,
                Err(why) => {
                    // Whoever sent it may be gone.
                    let _ = client.write(&admin::unreadable(why).render(false, true)).await;
                    break;
                }
            };
            let snapshot = self.snapshot.load_full();
            let settings = &snapshot.settings.admin;
            let access = settings.access(&listener.settings.address);
            let terms = AdminTerms { access, hosts: &settings.hosts, token: settings.token.as_ref() };
            let body = match admin::takes_body(&view, &terms) {
                None => Vec::new(),
                Some(most) => match read_body(&mut client, view.body, view.expects_continue, most).await {
                    Ok(body) => body,
                    Err(why) => {
                        let _ = client.write(&admin::unreadable(why).render(false, true)).await;
                        break;
                    }
                },
            };
            let operator = Operator {
                places: &snapshot.settings.places,
                body: &body,
                pipeline: &snapshot.pipeline,
                metrics: &snapshot.metrics,
                upstreams: snapshot.upstreams.iter().map(|peers| &*peers.upstream).collect(),
                terms,
                config: &settings.shown,
                reloads: &self.reloads,
                ready: self.lifecycle.is_ready(),
                started_unix_ms: self.started_unix_ms,
                now: super::now(),
                instant: Instant::now(),
            };
            // This process ends behind its answer.
            let mut passed_on = None;
            let answer = match admin::respond(&view, &operator) {
                Action::Respond(answer) => answer,
                Action::Denied(answer, denial) => {
                    snapshot.metrics.admin_denied(denial);
                    if denial == AdminDenial::WrongToken {
                        self.complain(source);
                    }
                    answer
                }
                Action::Changed(answer, action) => {
                    snapshot.audit(&snapshot, source, &action);
                    answer
                }
                Action::Reload { json } => admin::reloaded(self.reload(source).await, json),
                Action::Upgrade { json } => {
                    let result = self.upgrade(source).await.map(|done| passed_on.insert(done).upgraded);
                    admin::upgraded(result, json)
                }
            };
            let keep = view.keep_alive && view.body == Framing::Empty && passed_on.is_none();
            let written = client.write(&answer.render(view.method == Method::Head, !keep)).await;
            if !keep || written.is_err() {
                break;
            }
        }
        client.end(After::Close).await;
    }
}

/// All of a body that may be this large, in time.
async fn read_body(client: &mut ClientStream, framing: Framing, waits: bool, most: u64) -> Result<Vec<u8>, Unread> {
    if matches!(framing, Framing::Length(length) if length > most) {
        return Err(Unread::BodyTooLarge);
    }
    if waits {
        // Whoever asked may be gone, which the next read finds.
        let _ = client.write(b"HTTP/1.1 100 Continue\r\n\r\n").await;
    }
    client.begin_body(framing, None);
    let Some((mut reader, ..)) = client.split() else { return Err(Unread::TooSlow) };
    let mut body = Vec::new();
    let read = async {
        while let Some(piece) = reader.piece().await.map_err(|_| Unread::Malformed(head::HeadFault::Framing))? {
            body.extend_from_slice(reader.bytes(&piece));
            reader.consume(&piece);
            if body.len() as u64 > most {
                return Err(Unread::BodyTooLarge);
            }
        }
        Ok(())
    };
    timeout(LIMITS.header_timeout, read).await.unwrap_or(Err(Unread::TooSlow))?;
    Ok(body)
}

impl AdminGate {
    /// Somebody has sent a wrong token.
    fn complain(&self, source: AuditSource) {
        if let Some(suppressed) = self.complaints.due(Instant::now()) {
            let by = admin::asked_by(source);
            log::warn!(
                "admin listener: a request with a wrong token was refused, {by} ({suppressed} more since the last line)"
            );
        }
    }

    async fn reload(&self, source: AuditSource) -> Result<Reloaded, String> {
        let (reply, answer) = oneshot::channel();
        self.changes.send(ChangeRequest::Reload(source, Some(reply))).await.map_err(|_| ending())?;
        answer.await.unwrap_or_else(|_| Err(ending()))
    }

    async fn upgrade(&self, source: AuditSource) -> Result<PassedOn, String> {
        let (reply, answer) = oneshot::channel();
        self.changes.send(ChangeRequest::Upgrade(source, Some(reply))).await.map_err(|_| ending())?;
        answer.await.unwrap_or_else(|_| Err(ending()))
    }
}

fn ending() -> String {
    "this process is ending: another one may have replaced it".to_owned()
}

/// Who is at the other end of a connection.
fn source(socket: &Socket) -> AuditSource {
    match socket {
        Socket::Unix(stream) => {
            let peer = stream.peer_cred().ok();
            AuditSource::Unix { uid: peer.as_ref().map(|peer| peer.uid()), pid: peer.and_then(|peer| peer.pid()) }
        }
        Socket::Tcp(_) | Socket::Tls(_) | Socket::ClientHttp2(_) | Socket::BackendHttp2(_) => {
            AuditSource::Tcp(socket.peer())
        }
    }
}

/// Why a head was not taken.
fn unread(head: &Head) -> Unread {
    match head {
        Head::TooLarge => Unread::TooLarge,
        Head::TargetTooLong => Unread::TargetTooLong,
        Head::TooSlow => Unread::TooSlow,
        Head::Malformed(fault) => Unread::Malformed(*fault),
        Head::Complete(_) | Head::Closed => Unread::Malformed(head::HeadFault::RequestLine),
    }
}

/// Health checks speak HTTP/1.0 and may name no host, as HAProxy's `httpchk` does: they are taken to mean this machine.
/// No browser speaks it, so no web page gets in by this.
fn with_host(head: Bytes) -> Bytes {
    let Some(line) = memchr::memmem::find(&head, b"\r\n") else { return head };
    let (request_line, fields) = head.split_at(line + 2);
    let names_host = |line: &[u8]| line.get(..5).is_some_and(|name| name.eq_ignore_ascii_case(b"host:"));
    if !request_line.ends_with(b" HTTP/1.0\r\n") || fields.split(|b| *b == b'\n').any(names_host) {
        return head;
    }
    [request_line, b"Host: localhost\r\n", fields].concat().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_http10_without_a_host_is_given_one() {
        let given = |head: &'static str| String::from_utf8(with_host(head.into()).to_vec()).unwrap();
        assert_eq!(given("OPTIONS / HTTP/1.0\r\n\r\n"), "OPTIONS / HTTP/1.0\r\nHost: localhost\r\n\r\n");
        for unchanged in [
            "GET / HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.0\r\nHost: evil.example\r\n\r\n",
            "GET / HTTP/1.0\r\nA: b\r\nhOST:\r\n\r\n",
            "\r\nGET / HTTP/1.0\r\n\r\n",
        ] {
            assert_eq!(given(unchanged), unchanged);
        }
    }
}
