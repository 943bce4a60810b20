//! Writes log lines to a file, a stream or a datagram socket through a bounded queue and a writer thread. Logging never blocks the caller.
//! Lines that do not fit into the queue or cannot be written are dropped whole and counted.

use super::datagrams::{Datagrams, SyslogAddress, absent};
use super::outage::Outage;
use crate::problem::{Problem, no_new_file, not_writable};
use parking_lot::Mutex;
use std::fs::File;
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

/// Capacity of the queue.
const QUEUE_LINES: usize = 8_192;
/// Lines longer than this share a budget of bytes, which bounds the memory of a queue full of long lines.
const LONG_LINE: usize = 1_024;
const LONG_LINES_BYTES: usize = 8 * 1024 * 1024;
/// How much is written at once.
const BATCH_BYTES: usize = 64 * 1024;
/// While lines come this close together they are gathered for as long, so that their writers need not wake this thread for each.
const GATHERING: Duration = Duration::from_millis(2);
/// Pause before the next attempt to write to a stream that another process has set to non-blocking.
const BLOCKED_PAUSE: Duration = Duration::from_millis(10);
/// Shortest interval between two messages about dropped lines.
const LOSS_REPORT_INTERVAL: Duration = Duration::from_secs(10);

/// Where lines of requests go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogTarget {
    Off,
    Stdout,
    Stderr,
    File(PathBuf),
    Syslog(SyslogAddress),
    /// The socket of systemd's journal.
    Journal(PathBuf),
}

impl LogTarget {
    /// What keeps the log from being written, looked for without making a file. `key` names a file; sockets have keys of their
    /// own in `[log]`.
    pub fn problems(&self, key: &'static str) -> Vec<Problem> {
        let path = match self {
            Self::Off | Self::Stdout | Self::Stderr => return Vec::new(),
            Self::Syslog(to) => return to.problems(),
            Self::Journal(path) => return absent("journald", path),
            Self::File(path) => path,
        };
        // Never opened: the reader of a pipe would take the end of that for the end of the log.
        let why = match std::fs::metadata(path) {
            Ok(meta) if meta.is_dir() => Some("it is a folder".to_owned()),
            Ok(_) => not_writable(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => no_new_file(path),
            Err(error) => Some(error.to_string()),
        };
        let problem = |why| {
            let what = format!("{} cannot be written: {why}", path.display());
            Problem::error(key, what, "name a file in a folder that tollgate may write to")
        };
        why.map(problem).into_iter().collect()
    }

    /// Opens it; `None` when it is off. `log` is the log's name for readers of several.
    pub fn open(&self, log: &str) -> Result<Option<LogOutput>, String> {
        Ok(Some(match self {
            Self::Off => return Ok(None),
            Self::Stdout => Destination::stdout().map_err(|error| format!("standard output: {error}"))?.into(),
            Self::Stderr => Destination::stderr().map_err(|error| format!("standard error: {error}"))?.into(),
            Self::File(path) => Destination::file(path)?.into(),
            Self::Syslog(to) => Datagrams::syslog(to.clone(), log).into(),
            Self::Journal(path) => Datagrams::journal(path.clone(), log).into(),
        }))
    }
}

/// What a log is written to.
pub enum LogOutput {
    Stream(Destination),
    Datagrams(Datagrams),
}

impl From<Destination> for LogOutput {
    fn from(stream: Destination) -> Self {
        Self::Stream(stream)
    }
}

impl From<Datagrams> for LogOutput {
    fn from(datagrams: Datagrams) -> Self {
        Self::Datagrams(datagrams)
    }
}

impl LogOutput {
    /// Writes whole lines, or returns the error and the number of lines lost.
    fn write(&mut self, lines: &[u8]) -> Result<(), (io::Error, u64)> {
        match self {
            Self::Stream(stream) => stream.write(lines),
            Self::Datagrams(datagrams) => datagrams.write(lines),
        }
    }

    fn has_path(&self) -> bool {
        matches!(self, Self::Stream(Destination { path: Some(_), .. }))
    }

    /// Opens the path again. Returns whether a line is lost by it, of which the old file has the beginning.
    fn reopen(&mut self) -> Result<bool, String> {
        let Self::Stream(stream) = self else { return Ok(false) };
        stream.reopen()?;
        // The rest of a partial line belongs into the old file.
        Ok(!std::mem::take(&mut stream.rest_of_line).is_empty())
    }
}

/// Where lines go.
pub struct Destination {
    file: File,
    /// Set if the destination can be reopened.
    path: Option<PathBuf>,
    /// The rest of a line whose beginning has been written and could not be removed.
    rest_of_line: Vec<u8>,
}

impl Destination {
    pub fn stdout() -> io::Result<Self> {
        Self::stream(&io::stdout())
    }

    pub fn stderr() -> io::Result<Self> {
        Self::stream(&io::stderr())
    }

    fn stream(stream: &impl AsFd) -> io::Result<Self> {
        // A separate descriptor: a blocked writer thread would hold the lock of the standard library's stream.
        let file = File::from(stream.as_fd().try_clone_to_owned()?);
        Ok(Self { file, path: None, rest_of_line: Vec::new() })
    }

    /// Opens a file for appending.
    pub fn file(path: &Path) -> Result<Self, String> {
        let file = open(path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self { file, path: Some(path.into()), rest_of_line: Vec::new() })
    }

    pub(super) fn metadata(&self) -> io::Result<std::fs::Metadata> {
        self.file.metadata()
    }

    /// Opens the path again, after the file was moved. If that fails, the old file stays open.
    fn reopen(&mut self) -> Result<(), String> {
        let Some(path) = &self.path else { return Ok(()) };
        self.file = open(path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(())
    }

    /// Writes whole lines, or returns the error and the number of lines lost.
    fn write(&mut self, lines: &[u8]) -> Result<(), (io::Error, u64)> {
        let rest_of_line = std::mem::take(&mut self.rest_of_line);
        let (sent, failed) = self.write_bytes(&rest_of_line);
        if let Some(error) = failed {
            self.rest_of_line = rest_of_line[sent..].to_vec();
            return Err((error, count_lines(lines)));
        }
        let (sent, failed) = self.write_bytes(lines);
        let Some(error) = failed else { return Ok(()) };
        let whole = memchr::memrchr(b'\n', &lines[..sent]).map_or(0, |end| end + 1);
        let mut lost = count_lines(&lines[whole..]);
        if sent > whole && !self.remove_last(sent - whole) {
            let end = memchr::memchr(b'\n', &lines[sent..]).map_or(lines.len(), |end| sent + end + 1);
            self.rest_of_line = lines[sent..end].to_vec();
            lost -= 1;
        }
        Err((error, lost))
    }

    /// Returns how many bytes were written, and the error if not all were.
    fn write_bytes(&mut self, bytes: &[u8]) -> (usize, Option<io::Error>) {
        let mut sent = 0;
        while sent < bytes.len() {
            match self.file.write(&bytes[sent..]) {
                Ok(0) => return (sent, Some(io::ErrorKind::WriteZero.into())),
                Ok(count) => sent += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(BLOCKED_PAUSE),
                Err(error) => return (sent, Some(error)),
            }
        }
        (sent, None)
    }

    /// Truncates a partially written line, which would not be valid JSON. Not possible for a pipe.
    fn remove_last(&mut self, count: usize) -> bool {
        let taken = || -> io::Result<bool> {
            let mut file = &self.file;
            let (meta, end) = (self.file.metadata()?, file.stream_position()?);
            // Another process may have appended.
            if !meta.is_file() || meta.len() != end {
                return Ok(false);
            }
            let end = end.saturating_sub(count as u64);
            self.file.set_len(end)?;
            file.seek(SeekFrom::Start(end))?;
            Ok(true)
        };
        taken().unwrap_or(false)
    }
}

fn count_lines(bytes: &[u8]) -> u64 {
    memchr::memchr_iter(b'\n', bytes).count() as u64
}

fn open(path: &Path) -> io::Result<File> {
    let mut options = std::fs::OpenOptions::new();
    // What callers do is nobody's business but the operator's and the group's that reads logs.
    options.append(true).create(true).mode(0o640);
    // Opened for reading as well, so that opening a FIFO does not block until it has a reader.
    let mut file = match options.clone().read(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => options.open(path)?,
        opened => opened?,
    };
    let meta = file.metadata()?;
    let mut last = [b'\n'];
    if meta.is_file() && meta.len() > 0 && file.read_exact_at(&mut last, meta.len() - 1).is_ok() && last != *b"\n" {
        // A killed process or a full disk left a partial line: terminate it, so that the next line is a line of its
        // own. If the disk is still full, the next write reports it.
        let _ = file.write_all(b"\n");
    }
    Ok(file)
}

enum QueueItem {
    Line(Vec<u8>),
    /// Wakes the thread up to reopen the file.
    Wake,
    /// Sends a message when everything before it has been written.
    Flush(SyncSender<()>),
}

/// A bounded queue of lines with a writer thread.
pub struct LineQueue {
    messages: SyncSender<QueueItem>,
    shared: Arc<Shared>,
}

struct Shared {
    /// The log's name, for messages about it.
    name: &'static str,
    /// Bytes of long lines in the queue.
    long_bytes: AtomicUsize,
    /// Dropped lines that have not been reported yet.
    unreported: AtomicU64,
    count_lost: Box<dyn Fn(u64) + Send + Sync>,
    has_path: bool,
    /// The callers that wait for the file to be reopened.
    reopen: Mutex<Vec<SyncSender<Result<(), String>>>>,
}

impl Shared {
    fn lose(&self, lines: u64) {
        self.unreported.fetch_add(lines, Ordering::Relaxed);
        (self.count_lost)(lines);
    }

    /// The bytes that a line takes from the budget of long lines.
    fn long(line: &[u8]) -> usize {
        if line.len() > LONG_LINE { line.len() } else { 0 }
    }
}

impl LineQueue {
    /// Starts the writer thread. `count_lost` is called with the number of dropped lines.
    pub fn start(
        name: &'static str,
        output: impl Into<LogOutput>,
        count_lost: impl Fn(u64) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let output = output.into();
        let (messages, queue) = sync_channel(QUEUE_LINES);
        let shared = Arc::new(Shared {
            name,
            long_bytes: AtomicUsize::new(0),
            unreported: AtomicU64::new(0),
            count_lost: Box::new(count_lost),
            has_path: output.has_path(),
            reopen: Mutex::default(),
        });
        let writer = Writer { output, shared: Arc::clone(&shared), outage: Outage::default(), reported_at: None };
        std::thread::Builder::new().name(format!("{name}-log")).spawn(move || writer.run(&queue))?;
        Ok(Self { messages, shared })
    }

    /// Enqueues a line, which must end in `\n`. Never blocks.
    pub fn push(&self, line: Vec<u8>) {
        let long = Shared::long(&line);
        let fits = long == 0 || self.shared.long_bytes.fetch_add(long, Ordering::Relaxed) + long <= LONG_LINES_BYTES;
        if !fits || self.messages.try_send(QueueItem::Line(line)).is_err() {
            if long > 0 {
                self.shared.long_bytes.fetch_sub(long, Ordering::Relaxed);
            }
            self.shared.lose(1);
        }
    }

    /// Waits until all lines pushed so far are written, at most for `timeout`.
    pub fn flush(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        let (done, written) = sync_channel(1);
        let mut message = QueueItem::Flush(done);
        loop {
            match self.messages.try_send(message) {
                Ok(()) => break,
                Err(TrySendError::Full(back)) if Instant::now() < deadline => {
                    message = back;
                    std::thread::sleep(BLOCKED_PAUSE);
                }
                Err(_) => return,
            }
        }
        // On timeout the remaining lines are lost: the caller is about to exit and must not wait for longer.
        let _: Result<(), _> = written.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    }

    /// Opens the file again, after the lines that are being written. `Ok(false)`: not done within `timeout`, because
    /// the thread is blocked by a stalled reader; it reopens the file as soon as it continues.
    pub fn reopen(&self, timeout: Duration) -> Result<bool, String> {
        if !self.shared.has_path {
            return Ok(true);
        }
        let (done, reopened) = sync_channel(1);
        {
            let mut waiting = self.shared.reopen.lock();
            // One request is enough for the thread. Bounded, as repeated requests for a blocked log would accumulate.
            waiting.truncate(16);
            waiting.push(done);
        }
        // If the queue is full, the thread is going to run without being woken up.
        let _: Result<(), _> = self.messages.try_send(QueueItem::Wake);
        match reopened.recv_timeout(timeout) {
            Ok(result) => result.map(|()| true),
            Err(_) => Ok(false),
        }
    }
}

struct Writer {
    output: LogOutput,
    shared: Arc<Shared>,
    outage: Outage,
    reported_at: Option<Instant>,
}

impl Writer {
    /// Writes queued lines in batches, and waits while the queue is empty.
    fn run(mut self, queue: &Receiver<QueueItem>) {
        let mut batch = Vec::with_capacity(BATCH_BYTES);
        let (mut waiting, mut last) = (Vec::new(), None::<Instant>);
        while let Ok(message) = queue.recv() {
            let now = Instant::now();
            if last.replace(now).is_some_and(|last| now.duration_since(last) < 2 * GATHERING) {
                std::thread::sleep(GATHERING);
            }
            batch.clear();
            let mut next = Some(message);
            while let Some(message) = next {
                match message {
                    QueueItem::Line(line) => {
                        self.shared.long_bytes.fetch_sub(Shared::long(&line), Ordering::Relaxed);
                        batch.extend_from_slice(&line);
                    }
                    QueueItem::Wake => {}
                    QueueItem::Flush(done) => waiting.push(done),
                }
                next = if batch.len() < BATCH_BYTES { queue.try_recv().ok() } else { None };
            }
            self.reopen();
            if !batch.is_empty() {
                self.write(&batch);
            }
            for done in waiting.drain(..) {
                // Fails only if the caller has stopped waiting.
                let _: Result<(), _> = done.send(());
            }
        }
    }

    fn reopen(&mut self) {
        let waiting = std::mem::take(&mut *self.shared.reopen.lock());
        if waiting.is_empty() {
            return;
        }
        let result = self.output.reopen().map(|loses_a_line| {
            if loses_a_line {
                self.shared.lose(1);
            }
        });
        for done in waiting {
            // Fails only if the caller has stopped waiting.
            let _: Result<(), _> = done.send(result.clone());
        }
    }

    fn write(&mut self, batch: &[u8]) {
        let name = self.shared.name;
        let began = Instant::now();
        match self.output.write(batch) {
            Err((error, lost)) => {
                self.shared.lose(lost);
                if self.outage.failed(began).is_some() {
                    log::error!("the {name} log cannot be written: {error}; its lines are dropped");
                }
            }
            Ok(()) => {
                let now = Instant::now();
                let over = self.outage.succeeded(began, now);
                let due = self.reported_at.is_none_or(|reported| now.duration_since(reported) >= LOSS_REPORT_INTERVAL);
                if over.is_none() && (!due || self.shared.unreported.load(Ordering::Relaxed) == 0) {
                    return;
                }
                self.reported_at = Some(now);
                let lost = self.shared.unreported.swap(0, Ordering::Relaxed);
                match over {
                    Some(_) => log::warn!("the {name} log is written again; {lost} lines were lost"),
                    None => log::warn!("the {name} log lost {lost} lines: its reader is too slow"),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counting() -> (Arc<AtomicU64>, impl Fn(u64) + Send + Sync + 'static) {
        let lost = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&lost);
        let count = move |lines| {
            counted.fetch_add(lines, Ordering::Relaxed);
        };
        (lost, count)
    }

    #[test]
    fn a_partial_line_is_removed_from_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        std::fs::write(&path, "one\ntw").unwrap();
        let mut destination = Destination::file(&path).unwrap();
        // A partial line of a killed process is terminated; one that a full disk cut off is removed.
        destination.write(b"three\n").unwrap();
        destination.file.write_all(b"fou").unwrap();
        assert!(destination.remove_last(3));
        destination.write(b"five\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\ntw\nthree\nfive\n");
        // But not if another process has appended to it.
        destination.file.write_all(b"six").unwrap();
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"x").unwrap();
        assert!(!destination.remove_last(3));
    }

    #[test]
    fn the_rest_of_a_line_comes_first() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut destination = Destination::file(&path).unwrap();
        destination.file.write_all(b"o").unwrap();
        destination.rest_of_line = b"ne\n".to_vec();
        destination.write(b"two\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\ntwo\n");
    }

    #[test]
    fn a_device_that_takes_nothing_loses_whole_lines_and_counts_them() {
        let (lost, count) = counting();
        let queue = LineQueue::start("test", Destination::file(Path::new("/dev/full")).unwrap(), count).unwrap();
        for _ in 0..100 {
            queue.push(b"a line\n".to_vec());
        }
        queue.flush(Duration::from_secs(10));
        assert_eq!(lost.load(Ordering::Relaxed), 100);
    }

    #[test]
    fn a_stalled_reader_blocks_no_caller() {
        let (reader, writer) = io::pipe().unwrap();
        let destination = Destination::stream(&writer).unwrap();
        let (lost, count) = counting();
        let queue = LineQueue::start("test", destination, count).unwrap();
        let line = vec![b'x'; 100].into_iter().chain(*b"\n").collect::<Vec<u8>>();
        for _ in 0..50_000 {
            queue.push(line.clone());
        }
        // Only the pipe's buffer, one batch and the queue can hold lines.
        let kept = 50_000 - lost.load(Ordering::Relaxed);
        assert!((QUEUE_LINES as u64..3 * QUEUE_LINES as u64).contains(&kept), "{kept}");
        // The same for the longest lines: memory is bounded by bytes.
        let long = vec![b'x'; 40_000].into_iter().chain(*b"\n").collect::<Vec<u8>>();
        let (other_reader, other_writer) = io::pipe().unwrap();
        let (long_lost, count) = counting();
        let long_queue = LineQueue::start("test", Destination::stream(&other_writer).unwrap(), count).unwrap();
        for _ in 0..1_000 {
            long_queue.push(long.clone());
        }
        assert!(long_lost.load(Ordering::Relaxed) > 700, "{}", long_lost.load(Ordering::Relaxed));
        let began = Instant::now();
        queue.flush(Duration::from_millis(100));
        assert_eq!(queue.reopen(Duration::from_secs(60)), Ok(true), "there is nothing to reopen");
        assert!(began.elapsed() < Duration::from_secs(5));
        drop((reader, other_reader));
    }

    #[test]
    fn a_moved_file_is_reopened_under_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let (path, moved) = (folder.path().join("log"), folder.path().join("log.1"));
        let (lost, count) = counting();
        let queue = LineQueue::start("test", Destination::file(&path).unwrap(), count).unwrap();
        queue.push(b"one\n".to_vec());
        queue.flush(Duration::from_secs(10));
        std::fs::rename(&path, &moved).unwrap();
        queue.push(b"two\n".to_vec());
        queue.flush(Duration::from_secs(10));
        assert_eq!(queue.reopen(Duration::from_secs(10)), Ok(true));
        queue.push(b"three\n".to_vec());
        queue.flush(Duration::from_secs(10));
        assert_eq!(std::fs::read_to_string(&moved).unwrap(), "one\ntwo\n");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "three\n");
        assert_eq!(lost.load(Ordering::Relaxed), 0);
    }
}
