//! The process log, on standard error. Lines go through a bounded queue, so that a slow reader never blocks a request;
//! dropped lines are counted.

use super::lines::{Destination, LineQueue};
use log::{LevelFilter, Metadata, Record};
use std::os::unix::fs::MetadataExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

/// Longer lines are truncated.
const MAX_LINE: usize = 8 * 1024;
/// How long to wait at exit for the last lines to be written.
const FLUSH: Duration = Duration::from_secs(1);

/// Dropped lines. A static, because a process has one logger.
static LOST: AtomicU64 = AtomicU64::new(0);

/// Panics so far. A static like the hook that counts them.
static PANICS: AtomicU64 = AtomicU64::new(0);

/// The number of panics so far.
pub fn panics() -> u64 {
    PANICS.load(Ordering::Relaxed)
}

/// The number of dropped lines so far.
pub fn lost() -> u64 {
    LOST.load(Ordering::Relaxed)
}

fn count_lost(lines: u64) {
    LOST.fetch_add(lines, Ordering::Relaxed);
}

struct ProcessLog {
    queue: LineQueue,
    /// The most verbose level of modules that differ from the default, the first match counts.
    levels: &'static [(&'static str, LevelFilter)],
    with_time: bool,
}

/// Starts the log. Panics are logged too, because the default hook writes to standard error and could block. `levels`
/// are the most verbose levels of single modules; all others have `Info`.
pub fn start(level: LevelFilter, levels: &'static [(&'static str, LevelFilter)]) -> std::io::Result<()> {
    let stderr = Destination::stderr()?;
    let with_time = !is_journal(&stderr, std::env::var("JOURNAL_STREAM").ok().as_deref());
    let queue = LineQueue::start("process", stderr, count_lost)?;
    if log::set_boxed_logger(Box::new(ProcessLog { queue, levels, with_time })).is_ok() {
        std::panic::set_hook(Box::new(|panic| {
            PANICS.fetch_add(1, Ordering::Relaxed);
            log::error!("{panic}");
            // A panic of the main thread ends the process; elsewhere it ends a request or a task.
            if std::thread::current().name() == Some("main") {
                log::logger().flush();
            }
        }));
    }
    log::set_max_level(level);
    Ok(())
}

/// Whether the stream goes to systemd's journal, which records the time of each line itself. The variable holds the
/// stream's device and inode, and is also inherited by processes with a different stream.
fn is_journal(stream: &Destination, variable: Option<&str>) -> bool {
    let named = variable.and_then(|text| {
        let (device, inode) = text.split_once(':')?;
        Some((device.parse::<u64>().ok()?, inode.parse::<u64>().ok()?))
    });
    stream.metadata().is_ok_and(|meta| named == Some((meta.dev(), meta.ino())))
}

impl log::Log for ProcessLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let target = metadata.target();
        let within =
            |module: &str| target.strip_prefix(module).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"));
        let most = self.levels.iter().find(|(module, _)| within(module)).map_or(LevelFilter::Info, |(_, level)| *level);
        metadata.level() <= most
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let time = self.with_time.then(SystemTime::now);
            self.queue.push(format(time, record));
        }
    }

    fn flush(&self) {
        self.queue.flush(FLUSH);
    }
}

/// Formats a message as one line: line breaks are replaced by `; ` and control characters are escaped.
fn format(time: Option<SystemTime>, record: &Record<'_>) -> Vec<u8> {
    use std::fmt::Write as _;
    let mut line = String::with_capacity(160);
    let time = time.map(|time| format!("{} ", humantime::format_rfc3339_millis(time))).unwrap_or_default();
    // Writing to a String cannot fail.
    let _: std::fmt::Result = write!(line, "[{time}{:<5} {}] ", record.level(), record.target());
    let message = record.args().to_string();
    for (index, part) in message.lines().enumerate() {
        if index > 0 {
            line.push_str("; ");
        }
        for character in part.chars() {
            match character {
                '\t' => line.push(' '),
                _ if character.is_control() => line.extend(character.escape_default()),
                _ => line.push(character),
            }
        }
    }
    if line.len() > MAX_LINE {
        line.truncate((0..=MAX_LINE).rev().find(|at| line.is_char_boundary(*at)).unwrap_or(0));
        line.push_str("… [cut]");
    }
    line.push('\n');
    line.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use log::{Level, Log as _};

    fn line(time: Option<SystemTime>, message: &str) -> String {
        let arguments = format_args!("{message}").to_string();
        let bytes = format(
            time,
            &Record::builder().level(Level::Warn).target("tollgate::edge").args(format_args!("{arguments}")).build(),
        );
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn a_message_is_one_bounded_line_with_its_time() {
        assert_eq!(line(Some(SystemTime::UNIX_EPOCH), "x"), "[1970-01-01T00:00:00.000Z WARN  tollgate::edge] x\n");
        assert_eq!(line(None, "x"), "[WARN  tollgate::edge] x\n");
        assert_eq!(line(None, "a\nb\r\nc\u{1b}[31m\0"), "[WARN  tollgate::edge] a; b; c\\u{1b}[31m\\u{0}\n");
        let long = line(None, &"é".repeat(10_000));
        assert!(long.len() < MAX_LINE + 20 && long.ends_with("… [cut]\n") && long.lines().count() == 1);
    }

    #[test]
    fn the_journal_is_known_by_device_and_inode() {
        let folder = tempfile::tempdir().unwrap();
        let stream = Destination::file(&folder.path().join("log")).unwrap();
        let meta = stream.metadata().unwrap();
        let variable = format!("{}:{}", meta.dev(), meta.ino());
        assert!(is_journal(&stream, Some(&variable)));
        let other = format!("{}:{}", meta.dev(), meta.ino() + 1);
        for variable in [None, Some(""), Some("nonsense"), Some("1:"), Some(other.as_str())] {
            assert!(!is_journal(&stream, variable), "{variable:?}");
        }
    }

    #[test]
    fn levels_of_modules_override_the_default() {
        let queue = LineQueue::start("process", Destination::file("/dev/null".as_ref()).unwrap(), |_| {}).unwrap();
        let levels = &[("proxy::pool", LevelFilter::Off), ("proxy", LevelFilter::Warn)];
        let log = ProcessLog { queue, levels, with_time: false };
        let says = |target: &str, level| log.enabled(&Metadata::builder().target(target).level(level).build());
        assert!(says("tollgate::edge", Level::Info) && says("redis", Level::Warn));
        assert!(!says("proxy::server", Level::Info) && says("proxy", Level::Warn));
        assert!(!says("proxy::pool", Level::Error) && !says("proxy::pool::tcp", Level::Error));
        assert!(says("proxylike", Level::Info) && !says("tollgate", Level::Debug));
    }
}
