//! The threads that serve connections. Each worker has an event loop of its own; all of them accept from the same listening
//! sockets, and the one with the fewest connections takes a new one and keeps it to its end. Nothing here knows what is
//! said over a connection.

use super::listener::ListenerState;
use super::listening::{ListeningSocket, SocketKind};
use super::socket::{DetachedSocket, Socket};
use arc_swap::ArcSwap;
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

/// Pause after an accept that failed for a lack of descriptors or memory: the next one would fail as well.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections that are taken from a listener that closes: the kernel holds no more (`net.core.somaxconn`) on most machines.
const MOST_AT_CLOSE: usize = 4_096;
/// How long the end of a worker waits for blocking work.
const BLOCKING_AT_END: Duration = Duration::from_secs(1);

/// Serves one connection to its end.
pub(super) trait Serve: Send + Sync + 'static {
    /// `guard` is dropped at its end.
    fn serve(
        self: Arc<Self>,
        socket: Socket,
        listener: Arc<ListenerState>,
        guard: impl Send + 'static,
    ) -> impl Future<Output = ()> + Send;
}

/// A bound address. Each worker has its own handle to the one socket.
pub(super) struct Acceptor {
    socket: ListeningSocket,
    /// As it is configured now.
    listener: Arc<ArcSwap<ListenerState>>,
    /// It is to be closed.
    closing: CancellationToken,
    /// Whether the last accept failed, so that an error is logged as it begins and as it ends.
    failing: Arc<AtomicBool>,
}

impl Acceptor {
    pub(super) fn new(listener: ListenerState, socket: ListeningSocket) -> Self {
        let listener = Arc::new(ArcSwap::from_pointee(listener));
        Self { socket, listener, closing: CancellationToken::new(), failing: Arc::default() }
    }

    /// What holds on to it while it accepts.
    pub(super) fn open(&self) -> io::Result<OpenListener> {
        let socket = self.socket.try_clone()?;
        Ok(OpenListener { socket, listener: Arc::clone(&self.listener), closing: self.closing.clone() })
    }

    /// A handle to the same socket.
    pub(super) fn share(&self) -> io::Result<Self> {
        Ok(Self {
            socket: self.socket.try_clone()?,
            listener: Arc::clone(&self.listener),
            closing: self.closing.clone(),
            failing: Arc::clone(&self.failing),
        })
    }

    /// Hands each connection to `take` until the listener is closed. Those that the kernel has accepted by then are taken
    /// first: closing the socket would reset them.
    pub(super) async fn accept(self, take: impl Fn(Socket, Arc<ListenerState>)) -> io::Result<()> {
        let Self { socket, listener, closing, failing } = self;
        let address = listener.load().settings.address.clone();
        let socket = match socket.kind {
            SocketKind::Tcp(socket) => AsyncListener::Tcp(TcpListener::from_std(socket)?),
            SocketKind::Unix(socket) => AsyncListener::Unix(UnixListener::from_std(socket)?),
        };
        loop {
            let accepted = tokio::select! {
                biased;
                // First, or a flood of connections would keep it open.
                () = closing.cancelled() => break,
                accepted = socket.accept() => accepted,
            };
            match accepted {
                Ok(connection) => {
                    if failing.load(Ordering::Relaxed) && failing.swap(false, Ordering::Relaxed) {
                        log::warn!("listener {address}: connections are accepted again");
                    }
                    take(connection, listener.load_full());
                }
                Err(error) if is_of_one_client(&error) => {}
                Err(error) => {
                    if !failing.swap(true, Ordering::Relaxed) {
                        log::error!("listener {address}: connections cannot be accepted and wait: {error}");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        let socket = socket.into_std()?;
        for _ in 0..MOST_AT_CLOSE {
            match accept_waiting(&socket) {
                Ok(connection) => take(connection, listener.load_full()),
                Err(error) if is_of_one_client(&error) => {}
                // There are no more.
                Err(_) => break,
            }
        }
        Ok(())
    }
}

/// That client is gone.
fn is_of_one_client(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset)
}

/// Asks the kernel itself: the event loop may not have been told yet of a connection that has just come.
fn accept_waiting(listener: &SocketKind) -> io::Result<Socket> {
    Ok(match listener {
        SocketKind::Tcp(listener) => {
            let (socket, _) = listener.accept()?;
            socket.set_nonblocking(true)?;
            let _ = socket.set_nodelay(true);
            Socket::Tcp(tokio::net::TcpStream::from_std(socket)?)
        }
        SocketKind::Unix(listener) => {
            let (socket, _) = listener.accept()?;
            socket.set_nonblocking(true)?;
            Socket::Unix(tokio::net::UnixStream::from_std(socket)?)
        }
    })
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

    fn into_std(self) -> io::Result<SocketKind> {
        Ok(match self {
            Self::Tcp(listener) => SocketKind::Tcp(listener.into_std()?),
            Self::Unix(listener) => SocketKind::Unix(listener.into_std()?),
        })
    }
}

/// A listener that accepts connections, on however many workers.
pub(super) struct OpenListener {
    /// To be passed on.
    socket: ListeningSocket,
    listener: Arc<ArcSwap<ListenerState>>,
    closing: CancellationToken,
}

impl OpenListener {
    pub(super) fn current(&self) -> Arc<ListenerState> {
        self.listener.load_full()
    }

    /// Connections from now on are served by these settings.
    pub(super) fn change(&self, to: ListenerState) {
        self.listener.store(Arc::new(to));
    }

    pub(super) fn socket(&self) -> &ListeningSocket {
        &self.socket
    }

    /// No further connection is accepted. The sockets close a moment later, on each worker.
    pub(super) fn close(self) {
        self.closing.cancel();
    }
}

/// What a worker is given by others.
enum GivenWork {
    Connection(DetachedSocket, Arc<ListenerState>, Counted),
    Acceptor(Acceptor),
    /// Is to be answered.
    Question(oneshot::Sender<()>),
}

/// A worker as the others see it.
#[derive(Clone)]
struct Worker {
    /// Holds no more than a worker has yet to look at: as many as were accepted while it served something else.
    handed_over: mpsc::UnboundedSender<GivenWork>,
    /// Its connections, with those on their way to it.
    open: Arc<AtomicUsize>,
}

type HandedOver = mpsc::UnboundedReceiver<GivenWork>;

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
pub(super) struct Workers {
    threads: Vec<(oneshot::Sender<()>, JoinHandle<()>)>,
    doors: WorkerDoors,
}

/// Where all workers are given new listeners.
#[derive(Clone)]
pub(super) struct WorkerDoors(Arc<[Worker]>);

impl WorkerDoors {
    /// Whether every worker's event loop has answered.
    pub(super) async fn answer(&self) -> bool {
        let ask = |worker: &Worker| {
            let (reply, answer) = oneshot::channel();
            // One that has ended drops the question.
            let _ = worker.handed_over.send(GivenWork::Question(reply));
            answer
        };
        let asked: Vec<_> = self.0.iter().map(ask).collect();
        for answer in asked {
            if answer.await.is_err() {
                return false;
            }
        }
        true
    }

    /// Every worker accepts from it, until it is closed.
    pub(super) fn open(&self, acceptor: &Acceptor) -> io::Result<()> {
        let shares = self.0.iter().map(|_| acceptor.share()).collect::<io::Result<Vec<_>>>()?;
        for (worker, share) in self.0.iter().zip(shares) {
            // At the end of the process, the worker may have ended.
            let _ = worker.handed_over.send(GivenWork::Acceptor(share));
        }
        Ok(())
    }
}

impl Workers {
    /// Starts them, without a listener.
    pub(super) fn start<S: Serve>(count: usize, service: &Arc<S>) -> io::Result<Self> {
        let (all, inboxes): (Vec<_>, Vec<_>) = (0..count.max(1))
            .map(|_| {
                let (handed_over, inbox) = mpsc::unbounded_channel();
                (Worker { handed_over, open: Arc::default() }, inbox)
            })
            .unzip();
        let all: Arc<[Worker]> = all.into();
        let mut threads = Vec::with_capacity(all.len());
        for (own, inbox) in inboxes.into_iter().enumerate() {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let (end, ended) = oneshot::channel();
            let place = WorkPlace { own, all: Arc::clone(&all), service: Arc::clone(service) };
            let run = move || place.run(runtime, inbox, ended);
            threads.push((end, std::thread::Builder::new().name(format!("worker-{own}")).spawn(run)?));
        }
        Ok(Self { threads, doors: WorkerDoors(all) })
    }

    pub(super) fn doors(&self) -> WorkerDoors {
        self.doors.clone()
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        let (ends, threads): (Vec<_>, Vec<_>) = self.threads.drain(..).unzip();
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
    fn run(self, runtime: Runtime, mut inbox: HandedOver, ended: oneshot::Receiver<()>) {
        let place = Arc::new(self);
        runtime.block_on(async {
            let take_over = async {
                while let Some(handed) = inbox.recv().await {
                    match handed {
                        GivenWork::Connection(socket, listener, count) => {
                            // If it fails, the connection ends: there is nothing to say it with.
                            if let Ok(socket) = socket.attach() {
                                place.serve(socket, listener, count);
                            }
                        }
                        GivenWork::Acceptor(acceptor) => place.accept(acceptor),
                        // Who asked may have given up.
                        GivenWork::Question(reply) => drop(reply.send(())),
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

    fn accept(self: &Arc<Self>, acceptor: Acceptor) {
        let place = Arc::clone(self);
        tokio::spawn(async move {
            let address = acceptor.listener.load().settings.address.clone();
            if let Err(error) = acceptor.accept(|socket, listener| place.assign(socket, listener)).await {
                log::error!("listener {address}: a worker cannot accept connections: {error}");
            }
        });
    }

    /// Gives a new connection to the worker with the fewest, this one if there are several.
    fn assign(&self, socket: Socket, listener: Arc<ListenerState>) {
        let open = |worker: &&Worker| worker.open.load(Ordering::Relaxed);
        let (Some(own), Some(least)) = (self.all.get(self.own), self.all.iter().min_by_key(open)) else { return };
        if open(&own) <= open(&least) {
            return self.serve(socket, listener, Counted::at(own));
        }
        if let Ok(socket) = socket.detach() {
            // At the end of the process, the other worker may have ended.
            let _ = least.handed_over.send(GivenWork::Connection(socket, listener, Counted::at(least)));
        }
    }

    fn serve(&self, socket: Socket, listener: Arc<ListenerState>, count: Counted) {
        tokio::spawn(Arc::clone(&self.service).serve(socket, listener, count));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::edge::listen::{Listen, ListenerSettings};
    use std::cell::Cell;
    use std::rc::Rc;

    #[test]
    fn what_the_kernel_has_accepted_before_a_listener_closes_is_taken() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let local = tokio::task::LocalSet::new();
        local.block_on(&runtime, async {
            let settings = ListenerSettings::plain(Listen::Tcp("127.0.0.1:0".into()));
            let socket = ListeningSocket::bind(&settings.address).unwrap();
            let SocketKind::Tcp(bound) = &socket.kind else { panic!("TCP was asked for") };
            let address = bound.local_addr().unwrap();
            let acceptor = Acceptor::new(ListenerState::new(settings).unwrap(), socket);
            let open = acceptor.open().unwrap();
            let taken = Rc::new(Cell::new(0));
            let count = Rc::clone(&taken);
            let accepting = tokio::task::spawn_local(acceptor.accept(move |_, _| count.set(count.get() + 1)));
            tokio::task::yield_now().await;
            // The event loop hears of the first one, and has no time to hear of the others.
            let mut clients = vec![std::net::TcpStream::connect(address).unwrap()];
            while taken.get() == 0 {
                tokio::task::yield_now().await;
            }
            clients.extend((0..9).map(|_| std::net::TcpStream::connect(address).unwrap()));
            open.close();
            accepting.await.unwrap().unwrap();
            assert_eq!(taken.get(), clients.len());
            assert!(std::net::TcpStream::connect(address).is_err());
        });
    }
}
