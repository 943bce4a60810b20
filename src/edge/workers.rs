//! The threads that serve connections. Each worker has an event loop of its own; all of them accept from the same listening
//! sockets, and the one with the fewest connections takes a new one and keeps it to its end. Nothing here knows what is
//! said over a connection.

use super::listen::{Listen, SocketPlace};
use super::socket::{DetachedSocket, Socket};
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket, UnixListener};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};

/// Connections that wait to be accepted; the kernel's own bound (`net.core.somaxconn`) is lower on most machines.
const BACKLOG: u32 = 65_535;
/// Pause after an accept that failed for a lack of descriptors or memory: the next one would fail as well.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long the end of a worker waits for blocking work.
const BLOCKING_AT_END: Duration = Duration::from_secs(1);

/// Serves one connection to its end.
pub(super) trait Serve: Send + Sync + 'static {
    /// `guard` is dropped at its end.
    fn serve(self: Arc<Self>, socket: Socket, guard: impl Send + 'static) -> impl Future<Output = ()> + Send;
}

/// A bound address. Each worker has its own handle to the one socket.
pub(super) struct Acceptor {
    socket: ListeningSocket,
    address: Listen,
    /// Whether the last accept failed, so that an error is logged as it begins and as it ends.
    failing: Arc<AtomicBool>,
}

enum ListeningSocket {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener),
}

impl Acceptor {
    /// Binds the address; a stale socket file is replaced. Within an event loop.
    pub(super) fn bind(listen: &Listen) -> io::Result<Self> {
        let socket = match listen {
            Listen::Tcp(address) => {
                let address: SocketAddr =
                    address.parse().map_err(|error| io::Error::new(ErrorKind::InvalidInput, error))?;
                let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
                // Connections of the process before this one may linger for a minute.
                socket.set_reuseaddr(true)?;
                socket.bind(address)?;
                ListeningSocket::Tcp(socket.listen(BACKLOG)?.into_std()?)
            }
            Listen::Unix(path, mode) => {
                if SocketPlace::of(path) == SocketPlace::Stale {
                    std::fs::remove_file(path)?;
                }
                let socket = std::os::unix::net::UnixListener::bind(path)?;
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(*mode))?;
                socket.set_nonblocking(true)?;
                ListeningSocket::Unix(socket)
            }
        };
        Ok(Self { socket, address: listen.clone(), failing: Arc::default() })
    }

    /// A handle to the same socket.
    pub(super) fn share(&self) -> io::Result<Self> {
        let socket = match &self.socket {
            ListeningSocket::Tcp(socket) => ListeningSocket::Tcp(socket.try_clone()?),
            ListeningSocket::Unix(socket) => ListeningSocket::Unix(socket.try_clone()?),
        };
        Ok(Self { socket, address: self.address.clone(), failing: Arc::clone(&self.failing) })
    }

    /// Hands each connection to `take`, for as long as the event loop runs that this is polled by.
    pub(super) async fn accept(self, take: impl Fn(Socket)) -> io::Result<()> {
        let Self { socket, address, failing } = self;
        let socket = match socket {
            ListeningSocket::Tcp(socket) => AsyncListener::Tcp(TcpListener::from_std(socket)?),
            ListeningSocket::Unix(socket) => AsyncListener::Unix(UnixListener::from_std(socket)?),
        };
        loop {
            match socket.accept().await {
                Ok(connection) => {
                    if failing.load(Ordering::Relaxed) && failing.swap(false, Ordering::Relaxed) {
                        log::warn!("listener {address}: connections are accepted again");
                    }
                    take(connection);
                }
                // That one client is gone.
                Err(error) if matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset) => {}
                Err(error) => {
                    if !failing.swap(true, Ordering::Relaxed) {
                        log::error!("listener {address}: connections cannot be accepted and wait: {error}");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

enum AsyncListener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl AsyncListener {
    async fn accept(&self) -> io::Result<Socket> {
        match self {
            Self::Tcp(listener) => {
                let (socket, _) = listener.accept().await?;
                // If it fails, the client has gone already; the first read will show it.
                let _ = socket.set_nodelay(true);
                Ok(Socket::Tcp(socket))
            }
            Self::Unix(listener) => Ok(Socket::Unix(listener.accept().await?.0)),
        }
    }
}

/// A worker as the others see it.
struct Worker {
    /// Holds no more than a worker has yet to look at: as many as were accepted while it served something else.
    handed_over: mpsc::UnboundedSender<(DetachedSocket, Counted)>,
    /// Its connections, with those on their way to it.
    open: Arc<AtomicUsize>,
}

type HandedOver = mpsc::UnboundedReceiver<(DetachedSocket, Counted)>;

/// One connection in its worker's count.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn at(worker: &Worker) -> Self {
        worker.open.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(&worker.open))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The running workers. When this is dropped they end, with the connections that they have.
pub(super) struct Workers(Vec<(oneshot::Sender<()>, JoinHandle<()>)>);

impl Workers {
    /// Starts them. Each accepts from every listener.
    pub(super) fn start<S: Serve>(count: usize, listeners: &[Acceptor], service: &Arc<S>) -> io::Result<Self> {
        let (all, inboxes): (Vec<_>, Vec<_>) = (0..count.max(1))
            .map(|_| {
                let (handed_over, inbox) = mpsc::unbounded_channel();
                (Worker { handed_over, open: Arc::default() }, inbox)
            })
            .unzip();
        let all: Arc<[Worker]> = all.into();
        let mut threads = Vec::with_capacity(all.len());
        for (own, inbox) in inboxes.into_iter().enumerate() {
            let listeners = listeners.iter().map(Acceptor::share).collect::<io::Result<Vec<_>>>()?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let (end, ended) = oneshot::channel();
            let place = WorkPlace { own, all: Arc::clone(&all), service: Arc::clone(service) };
            let run = move || place.run(runtime, listeners, inbox, ended);
            threads.push((end, std::thread::Builder::new().name(format!("worker-{own}")).spawn(run)?));
        }
        Ok(Self(threads))
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        let (ends, threads): (Vec<_>, Vec<_>) = self.0.drain(..).unzip();
        drop(ends);
        for thread in threads {
            // A panic has been reported where it happened.
            let _ = thread.join();
        }
    }
}

/// What runs on one worker's thread.
struct WorkPlace<S> {
    own: usize,
    all: Arc<[Worker]>,
    service: Arc<S>,
}

impl<S: Serve> WorkPlace<S> {
    fn run(self, runtime: Runtime, listeners: Vec<Acceptor>, mut inbox: HandedOver, ended: oneshot::Receiver<()>) {
        let place = Arc::new(self);
        runtime.block_on(async {
            for listener in listeners {
                let place = Arc::clone(&place);
                tokio::spawn(async move {
                    let address = listener.address.clone();
                    if let Err(error) = listener.accept(|socket| place.assign(socket)).await {
                        log::error!("listener {address}: a worker cannot accept connections: {error}");
                    }
                });
            }
            let take_over = async {
                while let Some((socket, count)) = inbox.recv().await {
                    // If it fails, the connection ends: there is nothing to say it with.
                    if let Ok(socket) = socket.attach() {
                        place.serve(socket, count);
                    }
                }
            };
            tokio::select! {
                () = take_over => {}
                // The sender is dropped.
                _ = ended => {}
            }
        });
        runtime.shutdown_timeout(BLOCKING_AT_END);
    }

    /// Gives a new connection to the worker with the fewest, this one if there are several.
    fn assign(&self, socket: Socket) {
        let open = |worker: &&Worker| worker.open.load(Ordering::Relaxed);
        let (Some(own), Some(least)) = (self.all.get(self.own), self.all.iter().min_by_key(open)) else { return };
        if open(&own) <= open(&least) {
            return self.serve(socket, Counted::at(own));
        }
        if let Ok(socket) = socket.detach() {
            // At the end of the process, the other worker may have ended.
            let _ = least.handed_over.send((socket, Counted::at(least)));
        }
    }

    fn serve(&self, socket: Socket, count: Counted) {
        tokio::spawn(Arc::clone(&self.service).serve(socket, count));
    }
}
