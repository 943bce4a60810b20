//! The signals that mean something to the process. It must not know what they mean.

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals that mean something to the gateway. One that is delivered before its receiver waits for it is kept.
pub(super) struct ProcessSignals {
    pub(super) terminate: Signals,
    pub(super) interrupt: Signals,
    pub(super) hangup: Signals,
    pub(super) reopen: Signals,
    pub(super) upgrade: Signals,
}

impl ProcessSignals {
    /// From here on, none of them ends the process by itself. SIGXFSZ has a handler as well: a log file at its size limit
    /// must not end the process, and the log counts the lines it loses.
    pub(super) fn handled() -> Self {
        let _ = Signals::of(SignalKind::from_raw(SIGXFSZ), "SIGXFSZ");
        Self {
            terminate: Signals::of(SignalKind::terminate(), "SIGTERM"),
            interrupt: Signals::of(SignalKind::interrupt(), "SIGINT"),
            hangup: Signals::of(SignalKind::hangup(), "SIGHUP"),
            reopen: Signals::of(SignalKind::user_defined1(), "SIGUSR1"),
            upgrade: Signals::of(SignalKind::user_defined2(), "SIGUSR2"),
        }
    }
}

/// The number on Linux, except on MIPS.
const SIGXFSZ: i32 = 25;

/// The deliveries of one signal. If it cannot be handled, there are none.
pub(super) struct Signals(Option<Signal>);

impl Signals {
    fn of(kind: SignalKind, name: &str) -> Self {
        let handled = signal(kind).inspect_err(|error| log::error!("{name} cannot be handled: {error}"));
        Self(handled.ok())
    }

    pub(super) async fn next(&mut self) {
        match &mut self.0 {
            // The result only says whether the signal can be delivered again, which it always can.
            Some(signal) => {
                let _ = signal.recv().await;
            }
            None => std::future::pending().await,
        }
    }
}

/// The name of the next signal to stop.
pub(super) async fn next_to_stop(terminate: &mut Signals, interrupt: &mut Signals) -> &'static str {
    tokio::select! {
        () = terminate.next() => "SIGTERM",
        () = interrupt.next() => "SIGINT",
    }
}
