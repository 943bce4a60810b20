//! The listeners that are open: opened at the start, and opened, changed and closed by a reload. All that can fail is done
//! before anything changes.

use super::listen::{Listen, ListenerSettings, ServerSettings};
use super::listener::ListenerState;
use super::server::ServeError;
use super::tls::ListenerTlsSettings;
use super::workers::{Acceptor, OpenListener, WorkerDoors};
use crate::telemetry::metrics::Metrics;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

/// The listeners of the API, by address, and the one of the admin.
pub(super) struct Listeners {
    open: HashMap<Listen, OpenListener>,
    admin: Option<(Listen, OpenListener)>,
    /// At the end of the process.
    closed: Vec<Listen>,
    doors: WorkerDoors,
    take_admin: Box<dyn Fn(Acceptor) + Send>,
    metrics: Arc<Metrics>,
}

/// What a reload will do to the listeners. Nothing of it can fail any more.
pub(super) struct Prepared {
    opened: Vec<Acceptor>,
    changed: Vec<ListenerState>,
    admin: Option<Option<Acceptor>>,
    settings: ServerSettings,
}

impl Listeners {
    /// None is open yet. `take_admin` serves an admin listener.
    pub(super) fn new(
        doors: WorkerDoors,
        metrics: Arc<Metrics>,
        take_admin: impl Fn(Acceptor) + Send + 'static,
    ) -> Self {
        Self { open: HashMap::new(), admin: None, closed: Vec::new(), doors, take_admin: Box::new(take_admin), metrics }
    }

    /// Binds what is new, and reads the certificates of what has changed. Within an event loop.
    pub(super) fn prepare(&self, settings: &ServerSettings) -> Result<Prepared, ServeError> {
        let (mut opened, mut changed) = (Vec::new(), Vec::new());
        for listener in &settings.listeners {
            match self.open.get(&listener.address) {
                Some(open) if open.current().settings == *listener => {}
                Some(_) => changed.push(made(listener)?),
                None => opened.push(bound(made(listener)?)?),
            }
        }
        let admin = match (&self.admin, &settings.admin) {
            (Some((open, _)), Some(wanted)) if open == wanted => None,
            (None, None) => None,
            (_, None) => Some(None),
            (_, Some(wanted)) => Some(Some(bound(made(&ListenerSettings::plain(wanted.clone()))?)?)),
        };
        Ok(Prepared { opened, changed, admin, settings: settings.clone() })
    }

    /// Does what was prepared. New listeners accept before old ones are closed.
    pub(super) fn apply(&mut self, prepared: Prepared) {
        let Prepared { opened, changed, admin, settings } = prepared;
        for acceptor in opened {
            let open = acceptor.open();
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
                open.close();
                removed(&address);
            }
        }
        if let Some(next) = admin {
            let before = self.admin.take();
            if let Some(acceptor) = next {
                let open = acceptor.open();
                self.admin = Some((open.current().settings.address.clone(), open));
                (self.take_admin)(acceptor);
            }
            if let Some((address, open)) = before {
                open.close();
                removed(&address);
            }
        }
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

    /// No further connection is accepted.
    pub(super) fn close_all(&mut self) {
        for (address, open) in self.open.drain() {
            self.closed.push(address);
            open.close();
        }
    }

    /// The paths of socket files that were in use to the end.
    pub(super) fn socket_files(&self) -> Vec<String> {
        let all = self.open.keys().chain(&self.closed).chain(self.admin.iter().map(|(address, _)| address));
        all.filter_map(|address| match address {
            Listen::Unix(path, _) => Some(path.clone()),
            Listen::Tcp(_) => None,
        })
        .collect()
    }
}

fn made(settings: &ListenerSettings) -> Result<ListenerState, ServeError> {
    let address = settings.address.to_string();
    ListenerState::new(settings.clone()).map_err(|problem| ServeError::Listener { address, problem: problem.into() })
}

fn bound(listener: ListenerState) -> Result<Acceptor, ServeError> {
    let address = listener.settings.address.to_string();
    Acceptor::bind(listener).map_err(|error| ServeError::Bind { address, error })
}

/// The file of a socket that nobody listens on any more goes with it.
fn removed(address: &Listen) {
    if let Listen::Unix(path, _) = address {
        let path = path.clone();
        // The workers need a moment to close it.
        std::thread::spawn(move || super::server::remove_socket(&path));
    }
}
