//! The listeners that are open: opened at the start, opened, changed and closed by a reload, and passed to another process by
//! an upgrade. All that can fail is done before anything changes.

use super::listen::{Listen, ListenerSettings, ServerSettings};
use super::listener::ListenerState;
use super::listening::{ListeningSocket, PassedSockets};
use super::server::ServeError;
use super::tls::ListenerTlsSettings;
use super::workers::{Acceptor, OpenListener, WorkerDoors};
use crate::telemetry::metrics::Metrics;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

/// The listeners of the API, and those for operators, by address.
pub(super) struct Listeners {
    open: HashMap<Listen, OpenListener>,
    /// What each of them is for is asked of the configuration, with each request.
    operators: HashMap<Listen, OpenListener>,
    /// Socket files to be removed at the end of the process.
    closed: Vec<String>,
    passed: PassedSockets,
    doors: WorkerDoors,
    take_operator: Box<dyn Fn(Acceptor) + Send>,
    metrics: Arc<Metrics>,
}

/// What a reload will do to the listeners. Nothing of it can fail any more.
pub(super) struct Prepared {
    opened: Vec<ReadyListener>,
    changed: Vec<ListenerState>,
    operators: Vec<ReadyListener>,
    settings: ServerSettings,
}

/// A listener that accepts as soon as somebody runs it.
struct ReadyListener {
    acceptor: Acceptor,
    open: OpenListener,
}

impl Listeners {
    /// None is open yet. `take_operator` serves a listener for operators.
    pub(super) fn new(
        doors: WorkerDoors,
        metrics: Arc<Metrics>,
        passed: PassedSockets,
        take_operator: impl Fn(Acceptor) + Send + 'static,
    ) -> Self {
        let (open, closed) = (HashMap::new(), Vec::new());
        let operators = HashMap::new();
        Self { open, operators, closed, passed, doors, take_operator: Box::new(take_operator), metrics }
    }

    /// Binds what is new, and reads the certificates of what has changed. Within an event loop.
    pub(super) fn prepare(&self, settings: &ServerSettings) -> Result<Prepared, ServeError> {
        let (mut opened, mut changed) = (Vec::new(), Vec::new());
        for listener in &settings.listeners {
            match self.open.get(&listener.address) {
                Some(open) if open.current().settings == *listener => {}
                Some(_) => changed.push(made(listener)?),
                None => opened.push(self.opened(made(listener)?)?),
            }
        }
        let mut operators = Vec::new();
        for address in settings.operators().filter(|address| !self.operators.contains_key(*address)) {
            operators.push(self.opened(made(&ListenerSettings::plain(address.clone()))?)?);
        }
        Ok(Prepared { opened, changed, operators, settings: settings.clone() })
    }

    /// Takes a socket that is open already, or binds the address.
    fn opened(&self, listener: ListenerState) -> Result<ReadyListener, ServeError> {
        let address = listener.settings.address.clone();
        let socket = match self.passed.take(&address) {
            Ok(Some(socket)) => Ok(socket),
            Ok(None) => ListeningSocket::bind(&address),
            Err(error) => Err(error),
        };
        let opened = socket.and_then(|socket| {
            let acceptor = Acceptor::new(listener, socket);
            Ok(ReadyListener { open: acceptor.open()?, acceptor })
        });
        opened.map_err(|error| ServeError::Bind { address: address.to_string(), error })
    }

    /// Does what was prepared. New listeners accept before old ones are closed.
    pub(super) fn apply(&mut self, prepared: Prepared) {
        let Prepared { opened, changed, operators, settings } = prepared;
        for ReadyListener { acceptor, open } in opened {
            let address = open.current().settings.address.clone();
            match self.doors.open(&acceptor) {
                Ok(()) => drop(self.open.insert(address, open)),
                // No descriptors are left.
                Err(error) => log::error!("listener {address}: a worker cannot accept connections: {error}"),
            }
        }
        for listener in changed {
            if let Some(open) = self.open.get(&listener.settings.address) {
                open.change(listener);
            }
        }
        let is_wanted = |address: &Listen| settings.listeners.iter().any(|listener| listener.address == *address);
        let gone: Vec<Listen> = self.open.keys().filter(|address| !is_wanted(address)).cloned().collect();
        for address in gone {
            if let Some(open) = self.open.remove(&address) {
                close(&address, open);
            }
        }
        for ReadyListener { acceptor, open } in operators {
            self.operators.insert(open.current().settings.address.clone(), open);
            (self.take_operator)(acceptor);
        }
        let is_wanted = |address: &Listen| settings.operators().any(|wanted| wanted == address);
        let gone: Vec<_> = self.operators.extract_if(|address, _| !is_wanted(address)).collect();
        gone.into_iter().for_each(|(address, open)| close(&address, open));
        self.tell();
    }

    /// The files that the listeners' TLS is made from.
    pub(super) fn certificate_files(&self) -> Vec<PathBuf> {
        let current: Vec<_> = self.open.values().map(OpenListener::current).collect();
        let all = current.iter().filter_map(|listener| listener.settings.tls.as_ref());
        all.flat_map(ListenerTlsSettings::files).map(|file| file.path().to_owned()).collect()
    }

    /// Reads the certificates again, and uses those that have changed. A listener for which there is no good set keeps the
    /// one that it has.
    pub(super) fn renew_certificates(&mut self) {
        for (address, open) in &self.open {
            let current = open.current();
            let Some(tls) = &current.settings.tls else { continue };
            let next = ListenerSettings { tls: Some(tls.again()), ..current.settings.clone() };
            if next == current.settings {
                continue;
            }
            match ListenerState::new(next) {
                Ok(next) => {
                    open.change(next);
                    log::info!("listener {address}: certificates reloaded");
                }
                Err(problem) => {
                    log::error!("listener {address}: certificates not reloaded, the old ones stay in use: {problem}");
                }
            }
        }
        self.tell();
    }

    /// When the certificates end.
    fn tell(&self) {
        let current: Vec<_> = self.open.values().map(OpenListener::current).collect();
        let of_one = |listener: &Arc<ListenerState>| {
            let address = listener.settings.address.to_string();
            let ends = listener.tls().map(|tls| tls.ends().to_vec()).unwrap_or_default();
            ends.into_iter().map(move |end| (address.clone(), end.name, end.unix_seconds)).collect::<Vec<_>>()
        };
        self.metrics.listeners().certificates(current.iter().flat_map(of_one));
    }

    /// The listeners of the API accept no further connection.
    pub(super) fn close_all(&mut self) {
        for (address, open) in self.open.drain() {
            self.closed.extend(own_file(&address, &open));
            open.close();
        }
    }

    /// Closes what is still open. Returns the paths of socket files that were in use to the end.
    pub(super) fn end(&mut self) -> Vec<String> {
        self.close_all();
        for (address, open) in self.operators.drain() {
            self.closed.extend(own_file(&address, &open));
            open.close();
        }
        std::mem::take(&mut self.closed)
    }

    /// The sockets of all listeners, for the process that is to replace this one.
    pub(super) fn to_pass_on(&self) -> std::io::Result<Vec<ListeningSocket>> {
        self.open.values().chain(self.operators.values()).map(|open| open.socket().try_clone()).collect()
    }

    /// Another process has all sockets, and accepts connections. Their files are that one's.
    pub(super) fn passed_on(&mut self) {
        let api = self.open.drain().map(|(_, open)| open);
        let operators = self.operators.drain().map(|(_, open)| open);
        api.chain(operators).for_each(OpenListener::close);
    }

    /// Connections are accepted: the process before this one ends.
    pub(super) fn serving(&self) {
        if let Some(predecessor) = self.passed.predecessor() {
            predecessor.serving();
            for place in self.passed.drop_unwanted() {
                log::warn!("{place}: the process before this one listened here, and no listener has this address");
            }
        }
    }

    pub(super) fn passed(&self) -> &PassedSockets {
        &self.passed
    }
}

fn made(settings: &ListenerSettings) -> Result<ListenerState, ServeError> {
    let address = settings.address.to_string();
    ListenerState::new(settings.clone()).map_err(|problem| ServeError::Listener { address, problem: problem.into() })
}

/// Its socket file, if this process has to remove it.
fn own_file(address: &Listen, open: &OpenListener) -> Option<String> {
    match address {
        Listen::Unix(path, _) if !open.socket().managers => Some(path.clone()),
        _ => None,
    }
}

/// The file of a socket that nobody listens on any more goes with it.
fn close(address: &Listen, open: OpenListener) {
    let file = own_file(address, &open);
    open.close();
    if let Some(path) = file {
        // The workers need a moment to close it.
        std::thread::spawn(move || super::server::remove_socket(&path));
    }
}
