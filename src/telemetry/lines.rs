//! Lines of a log on their way to a file or a stream: a bounded queue, and a thread that writes. Whoever logs never
//! waits. What the queue cannot take, or the disk does not, is lost as whole lines and counted.

use super::outage::Outage;
use parking_lot::Mutex;
use std::fs::File;
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

/// Lines that may wait for the thread.
const QUEUE_LINES: usize = 8_192;
/// Lines longer than this share a budget, so that a queue full of the longest ones stays small.
const LONG_LINE: usize = 1_024;
const LONG_LINES_BYTES: usize = 8 * 1024 * 1024;
/// What is written in one go.
const BATCH_BYTES: usize = 64 * 1024;
/// A stream that somebody has set to non-blocking is tried again after this.
const BLOCKED_PAUSE: Duration = Duration::from_millis(10);
/// Losses of a queue whose reader is too slow are told no more often than this.
const LOSSES_TOLD_EVERY: Duration = Duration::from_secs(10);

/// Where lines go.
pub struct Destination {
    file: File,
    /// For one that can be reopened.
    path: Option<PathBuf>,
    /// The end of a line whose beginning is written and could not be taken back.
    owed: Vec<u8>,
}

impl Destination {
    pub fn stdout() -> io::Result<Self> {
        Self::stream(&io::stdout())
    }

    pub fn stderr() -> io::Result<Self> {
        Self::stream(&io::stderr())
    }

    fn stream(stream: &impl AsFd) -> io::Result<Self> {
        // A descriptor of its own: the lock of the standard library's stream would be held by a thread that is stuck.
        let file = File::from(stream.as_fd().try_clone_to_owned()?);
        Ok(Self { file, path: None, owed: Vec::new() })
    }

    /// Opens a file to append to.
    pub fn file(path: &Path) -> Result<Self, String> {
        let file = open(path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self { file, path: Some(path.into()), owed: Vec::new() })
    }

    pub(super) fn metadata(&self) -> io::Result<std::fs::Metadata> {
        self.file.metadata()
    }

    /// Opens the path again, where another file may stand by now. The old one stays when that fails.
    fn reopen(&mut self) -> Result<(), String> {
        let Some(path) = &self.path else { return Ok(()) };
        self.file = open(path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(())
    }

    /// Writes whole lines, or says why not and how many are lost.
    fn write(&mut self, lines: &[u8]) -> Result<(), (io::Error, u64)> {
        let owed = std::mem::take(&mut self.owed);
        let (sent, failed) = self.write_bytes(&owed);
        if let Some(error) = failed {
            self.owed = owed[sent..].to_vec();
            return Err((error, count_lines(lines)));
        }
        let (sent, failed) = self.write_bytes(lines);
        let Some(error) = failed else { return Ok(()) };
        let whole = memchr::memrchr(b'\n', &lines[..sent]).map_or(0, |end| end + 1);
        let mut lost = count_lines(&lines[whole..]);
        if sent > whole && !self.take_back(sent - whole) {
            let end = memchr::memchr(b'\n', &lines[sent..]).map_or(lines.len(), |end| sent + end + 1);
            self.owed = lines[sent..end].to_vec();
            lost -= 1;
        }
        Err((error, lost))
    }

    /// How many bytes could be written, and what ended it before the last one.
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

    /// Takes the last bytes out of a file again, as nobody can read half a line. A pipe does not give anything back.
    fn take_back(&mut self, count: usize) -> bool {
        let taken = || -> io::Result<bool> {
            let mut file = &self.file;
            let (meta, end) = (self.file.metadata()?, file.stream_position()?);
            // Somebody else may have appended.
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
    options.append(true).create(true);
    // Open for reading as well: a FIFO then opens at once, whether or not somebody reads it.
    let mut file = match options.clone().read(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => options.open(path)?,
        opened => opened?,
    };
    let meta = file.metadata()?;
    let mut last = [b'\n'];
    if meta.is_file() && meta.len() > 0 && file.read_exact_at(&mut last, meta.len() - 1).is_ok() && last != *b"\n" {
        // A process that was killed, or a full disk, left half a line: the next one begins on its own. A disk that is
        // still full is told of by what is written next.
        drop(file.write_all(b"\n"));
    }
    Ok(file)
}

enum QueueItem {
    Line(Vec<u8>),
    /// Something else than a line is asked for.
    Wake,
    /// Everything before this is written: say so.
    Flush(SyncSender<()>),
}

/// Hands lines to a thread of its own.
pub struct LineQueue {
    messages: SyncSender<QueueItem>,
    shared: Arc<Shared>,
}

struct Shared {
    /// Which log this is, for what is said about it.
    name: &'static str,
    /// Bytes of long lines that wait.
    long_bytes: AtomicUsize,
    /// Lines lost and not told of yet.
    untold: AtomicU64,
    count_lost: Box<dyn Fn(u64) + Send + Sync>,
    has_path: bool,
    /// Who waits for the file to be reopened.
    reopen: Mutex<Vec<SyncSender<Result<(), String>>>>,
}

impl Shared {
    fn lose(&self, lines: u64) {
        self.untold.fetch_add(lines, Ordering::Relaxed);
        (self.count_lost)(lines);
    }

    /// The bytes that a line takes from the budget of long ones.
    fn long(line: &[u8]) -> usize {
        if line.len() > LONG_LINE { line.len() } else { 0 }
    }
}

impl LineQueue {
    /// Starts the thread that writes. `count_lost` is told of every line that is lost.
    pub fn start(
        name: &'static str,
        destination: Destination,
        count_lost: impl Fn(u64) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let (messages, queue) = sync_channel(QUEUE_LINES);
        let shared = Arc::new(Shared {
            name,
            long_bytes: AtomicUsize::new(0),
            untold: AtomicU64::new(0),
            count_lost: Box::new(count_lost),
            has_path: destination.path.is_some(),
            reopen: Mutex::default(),
        });
        let writer = Writer { destination, shared: Arc::clone(&shared), outage: Outage::default(), told_at: None };
        std::thread::Builder::new().name(format!("{name}-log")).spawn(move || writer.run(&queue))?;
        Ok(Self { messages, shared })
    }

    /// Takes a line, which ends in `\n`. Never waits.
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

    /// Waits until what was logged so far is written, but no longer than this.
    pub fn flush(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
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
        // Too slow: the lines are lost, and the process ends all the same.
        let _: Result<(), _> = written.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    }

    /// Opens the file again, behind the lines that are being written. `Ok(false)`: whoever reads what is open takes
    /// nothing, so that it is done when the thread comes to it.
    pub fn reopen(&self, patience: Duration) -> Result<bool, String> {
        if !self.shared.has_path {
            return Ok(true);
        }
        let (done, reopened) = sync_channel(1);
        {
            let mut waiting = self.shared.reopen.lock();
            // The first one is enough for the thread; who asks again and again of a log that is stuck need not pile up.
            waiting.truncate(16);
            waiting.push(done);
        }
        // With a full queue the thread comes to it without being woken.
        let _: Result<(), _> = self.messages.try_send(QueueItem::Wake);
        match reopened.recv_timeout(patience) {
            Ok(result) => result.map(|()| true),
            Err(_) => Ok(false),
        }
    }
}

struct Writer {
    destination: Destination,
    shared: Arc<Shared>,
    outage: Outage,
    told_at: Option<Instant>,
}

impl Writer {
    /// Writes what is there in one go, and waits when nothing is.
    fn run(mut self, queue: &Receiver<QueueItem>) {
        let mut batch = Vec::with_capacity(BATCH_BYTES);
        let mut waiting = Vec::new();
        while let Ok(message) = queue.recv() {
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
                // Whoever waited may have lost patience.
                let _: Result<(), _> = done.send(());
            }
        }
    }

    fn reopen(&mut self) {
        let waiting = std::mem::take(&mut *self.shared.reopen.lock());
        if waiting.is_empty() {
            return;
        }
        let result = self.destination.reopen();
        if result.is_ok() && !self.destination.owed.is_empty() {
            // The rest of a line belongs into the file that holds its beginning.
            self.destination.owed.clear();
            self.shared.lose(1);
        }
        for done in waiting {
            let _: Result<(), _> = done.send(result.clone());
        }
    }

    fn write(&mut self, batch: &[u8]) {
        let name = self.shared.name;
        let began = Instant::now();
        match self.destination.write(batch) {
            Err((error, lost)) => {
                self.shared.lose(lost);
                if self.outage.failed(began).is_some() {
                    log::error!("the {name} log cannot be written: {error}; its lines are lost until it can be");
                }
            }
            Ok(()) => {
                let now = Instant::now();
                let over = self.outage.succeeded(began, now);
                let due = self.told_at.is_none_or(|told| now.duration_since(told) >= LOSSES_TOLD_EVERY);
                if over.is_none() && (!due || self.shared.untold.load(Ordering::Relaxed) == 0) {
                    return;
                }
                self.told_at = Some(now);
                let lost = self.shared.untold.swap(0, Ordering::Relaxed);
                match over {
                    Some(_) => log::warn!("the {name} log is written again; {lost} lines were lost"),
                    None => log::warn!("the {name} log lost {lost} lines: whoever reads it is too slow"),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn temporary(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("tollgate-lines-{name}-{}", std::process::id()))
    }

    fn counting() -> (Arc<AtomicU64>, impl Fn(u64) + Send + Sync + 'static) {
        let lost = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&lost);
        let count = move |lines| {
            counted.fetch_add(lines, Ordering::Relaxed);
        };
        (lost, count)
    }

    #[test]
    fn half_a_line_is_taken_back_from_a_file() {
        let path = temporary("half");
        std::fs::write(&path, "one\ntw").unwrap();
        let mut destination = Destination::file(&path).unwrap();
        // What a killed process left is ended, and what a full disk cut is taken back.
        destination.write(b"three\n").unwrap();
        destination.file.write_all(b"fou").unwrap();
        assert!(destination.take_back(3));
        destination.write(b"five\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\ntw\nthree\nfive\n");
        // Not when somebody else has written behind it.
        destination.file.write_all(b"six").unwrap();
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"x").unwrap();
        assert!(!destination.take_back(3));
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn the_rest_of_a_line_comes_first() {
        let path = temporary("rest");
        let mut destination = Destination::file(&path).unwrap();
        destination.file.write_all(b"o").unwrap();
        destination.owed = b"ne\n".to_vec();
        destination.write(b"two\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\ntwo\n");
        std::fs::remove_file(path).unwrap();
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
    fn nobody_waits_for_a_reader_that_takes_nothing() {
        let (reader, writer) = io::pipe().unwrap();
        let destination = Destination::stream(&writer).unwrap();
        let (lost, count) = counting();
        let queue = LineQueue::start("test", destination, count).unwrap();
        let line = vec![b'x'; 100].into_iter().chain(*b"\n").collect::<Vec<u8>>();
        for _ in 0..50_000 {
            queue.push(line.clone());
        }
        // The pipe's own buffer, one batch and the queue are all that can be on the way.
        let kept = 50_000 - lost.load(Ordering::Relaxed);
        assert!((QUEUE_LINES as u64..3 * QUEUE_LINES as u64).contains(&kept), "{kept}");
        // The longest lines neither: memory is bounded by bytes.
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
        let (path, moved) = (temporary("moved"), temporary("moved-1"));
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
        drop((std::fs::remove_file(path), std::fs::remove_file(moved)));
    }
}
