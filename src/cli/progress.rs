//! What a command that takes long shows meanwhile. It must not know what it waits for.

use parking_lot::Mutex;
use std::io::{IsTerminal as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A line on standard error, if that is a terminal, which says how far a command is. It is removed at the end.
pub(super) struct Progress {
    step: Arc<Mutex<&'static str>>,
    /// Tokens of this step.
    pub(super) count: Arc<AtomicU64>,
    /// Once the sender is dropped, the thread ends.
    line: Option<(mpsc::Sender<()>, JoinHandle<()>)>,
}

impl Progress {
    const EVERY: Duration = Duration::from_millis(250);

    /// Of a command that prints as it proceeds: on one terminal, what is printed is the progress.
    pub(super) fn beside_output(step: &'static str) -> Self {
        Self::shown(step, !std::io::stdout().is_terminal())
    }

    pub(super) fn new(step: &'static str) -> Self {
        Self::shown(step, true)
    }

    fn shown(step: &'static str, wanted: bool) -> Self {
        let mut progress = Self { step: Arc::new(Mutex::new(step)), count: Arc::default(), line: None };
        if wanted && std::io::stderr().is_terminal() {
            let (sender, end) = mpsc::channel();
            let (step, count) = (Arc::clone(&progress.step), Arc::clone(&progress.count));
            // A thread, because a step may be one statement or may block.
            progress.line = Some((sender, std::thread::spawn(move || Self::show(&step, &count, &end))));
        }
        progress
    }

    fn show(step: &Mutex<&'static str>, count: &AtomicU64, end: &mpsc::Receiver<()>) {
        let (began, mut erase) = (Instant::now(), "");
        while end.recv_timeout(Self::EVERY) == Err(RecvTimeoutError::Timeout) {
            erase = "\r\x1b[K";
            let step = *step.lock();
            let counted = match count.load(Ordering::Relaxed) {
                0 => String::new(),
                count => format!(" {count} tokens,"),
            };
            // Nobody needs it: an error changes nothing.
            let _ = write!(std::io::stderr(), "{erase}{step}:{counted} {} s", began.elapsed().as_secs());
        }
        let _ = write!(std::io::stderr(), "{erase}");
    }

    pub(super) fn step(&self, step: &'static str) {
        *self.step.lock() = step;
        self.set(0);
    }

    pub(super) fn set(&self, count: u64) {
        self.count.store(count, Ordering::Relaxed);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some((sender, thread)) = self.line.take() {
            drop(sender);
            let _ = thread.join();
        }
    }
}
