//! `tollgate explain --why REQUEST_ID`: finds a request in the access log and tells in sentences why it ended so. It reads log
//! files and judges nothing; what a reason means stands in `explain::reasons`.

use super::configuration::ConfigOption;
use super::{Failure, load};
use crate::explain::{REASONS_PAGE, texts};
use crate::telemetry::lines::LogTarget;
use anyhow::Context as _;
use flate2::read::MultiGzDecoder;
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Lines that are printed of one id: a client may send the same one again and again.
const MOST_LINES: usize = 10;
const READ_BYTES: usize = 256 * 1024;
/// A shorter part of an id would find others.
const LEAST_ID: usize = 4;

pub(super) fn run(id: &str, config: &ConfigOption, log: Option<&Path>, json: bool) -> Result<(), Failure> {
    if id.len() < LEAST_ID || !id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_')) {
        return Err(Failure::Usage(
            "--why: a request id has letters, digits, `-` and `_`; give all of it, or its beginning".into(),
        ));
    }
    let files = match log {
        Some(path) if path.as_os_str() == "-" => Vec::new(),
        Some(path) => vec![path.to_owned()],
        None => configured(config)?,
    };
    let mut search = LogSearch { id, found: Vec::new(), read: Vec::new(), unread: Vec::new() };
    match files.as_slice() {
        [] => {
            search.through(std::io::stdin().lock()).context("standard input cannot be read")?;
            search.read.push("standard input".into());
        }
        files => files.iter().for_each(|file| search.file(file)),
    }
    if json {
        search.found.iter().try_for_each(|line| say!("{}", told_json(line)))?;
    } else {
        for (place, line) in search.found.iter().enumerate() {
            if place > 0 {
                say!("")?;
            }
            sentences(line).iter().try_for_each(|sentence| say!("{sentence}"))?;
        }
    }
    match search.found.is_empty() {
        true => Err(Failure::Failed(search.nothing())),
        false => Ok(()),
    }
}

/// The access log's file and those rotated beside it, the newest first.
fn configured(config: &ConfigOption) -> Result<Vec<PathBuf>, Failure> {
    let found = config.find()?;
    let instead = |how: &str| Failure::Usage(format!("{found}: log.access is {how}"));
    let pipe = "| tollgate explain --why ID --log -`";
    match load(config)?.access_log {
        LogTarget::File(path) => Ok(with_rotated(&path)),
        LogTarget::Off => Err(instead("\"off\": no request is logged")),
        LogTarget::Stdout | LogTarget::Stderr => {
            Err(instead(&format!("a stream, which the service manager keeps: `journalctl -u tollgate -o cat {pipe}")))
        }
        LogTarget::Journal(_) => {
            Err(instead(&format!("\"journald\": `journalctl -t tollgate TOLLGATE_LOG=access -o cat {pipe}")))
        }
        LogTarget::Syslog(_) => {
            Err(instead(&format!("\"syslog\": give the file that the daemon writes: `cat FILE {pipe}")))
        }
    }
}

fn with_rotated(path: &Path) -> Vec<PathBuf> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let own = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let is_rotated = |name: &str| name.strip_prefix(&own).is_some_and(|rest| rest.starts_with(['.', '-']));
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut rotated: Vec<(SystemTime, PathBuf)> = entries
        .filter(|entry| is_rotated(&entry.file_name().to_string_lossy()))
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    rotated.sort_by(|a, b| b.cmp(a));
    std::iter::once(path.to_owned()).chain(rotated.into_iter().map(|(_, path)| path)).collect()
}

struct LogSearch<'s> {
    id: &'s str,
    found: Vec<Value>,
    read: Vec<String>,
    /// With the reason.
    unread: Vec<String>,
}

impl LogSearch<'_> {
    /// Looks through a file, unless an earlier one had the request.
    fn file(&mut self, path: &Path) {
        if !self.found.is_empty() {
            return;
        }
        let name = path.display().to_string();
        if [".xz", ".zst", ".bz2"].iter().any(|end| name.ends_with(end)) {
            return self.unread.push(format!("{name}: not read, as only .gz is: unpack it and give it with --log"));
        }
        let opened = File::open(path).and_then(|file| match name.ends_with(".gz") {
            true => self.through(BufReader::with_capacity(READ_BYTES, MultiGzDecoder::new(file))),
            false => self.through(BufReader::with_capacity(READ_BYTES, file)),
        });
        match opened {
            Ok(()) => self.read.push(name),
            Err(error) => self.unread.push(format!("{name}: {error}")),
        }
    }

    fn through(&mut self, mut lines: impl BufRead) -> std::io::Result<()> {
        let finder = memchr::memmem::Finder::new(self.id.as_bytes());
        let mut line = Vec::new();
        while self.found.len() < MOST_LINES {
            line.clear();
            if lines.read_until(b'\n', &mut line)? == 0 {
                break;
            }
            if finder.find(&line).is_none() {
                continue;
            }
            let object = object_in(&String::from_utf8_lossy(&line));
            let is_it = |object: &Value| {
                ["request_id", "trace_id"]
                    .iter()
                    .any(|key| object[key].as_str().is_some_and(|own| own.starts_with(self.id)))
            };
            self.found.extend(object.filter(is_it));
        }
        Ok(())
    }

    fn nothing(&self) -> anyhow::Error {
        let read = if self.read.is_empty() { "nothing".into() } else { self.read.join(", ") };
        let mut text = format!("no request with the id {} was found; read: {read}", self.id);
        for unread in &self.unread {
            text.push_str(&format!("\n  {unread}"));
        }
        text.push_str("\n  a request is logged when it is over: one that goes on is not there yet");
        anyhow::Error::msg(text)
    }
}

/// The JSON object of a line, also behind what a log daemon writes in front.
pub(super) fn object_in(line: &str) -> Option<Value> {
    let begin = line.find('{')?;
    serde_json::from_str::<Value>(line[begin..].trim()).ok().filter(Value::is_object)
}

/// The line, with what its reason means.
fn told_json(line: &Value) -> Value {
    let reason = line["reason"].as_str().unwrap_or_default();
    let (means, advice) = texts(reason).unwrap_or_default();
    serde_json::json!({ "line": line, "means": means, "advice": advice, "described": REASONS_PAGE })
}

fn sentences(line: &Value) -> Vec<String> {
    let text = |key: &str| line[key].as_str().unwrap_or_default();
    let number = |key: &str| line[key].as_f64();
    let reason = text("reason");
    let status = line["status"].as_u64().unwrap_or(0);
    let query = line["query"].as_str().map_or(String::new(), |query| format!("?{query}"));
    let mut said = vec![format!("{} {}{query}  at {}", text("method"), text("path"), text("time"))];
    let took = number("duration_ms").map_or(String::new(), |ms| format!(" after {ms} ms"));
    said.push(match (status, text("by")) {
        (0, _) => format!("  The client got no response{took}."),
        (status, "backend") => format!("  The client got {status} from the backend{took}."),
        (status, _) => format!("  The client got {status} from tollgate itself{took}."),
    });
    let (means, advice) =
        texts(reason).unwrap_or_else(|| ("this version of tollgate does not know this reason".into(), String::new()));
    match reason {
        "ok" if status >= 400 => said.push(format!(
            "  Why: nothing was refused here (reason `ok`); the {status} is the backend's own answer. Its log says more."
        )),
        "ok" => said.push("  Why: nothing was refused and nothing failed (reason `ok`).".into()),
        reason => {
            said.push(format!("  Why: `{reason}`: {}", ended(&means)));
            if let Some(limit) = line["limit"].as_str() {
                said.push(format!("  The limit is `{limit}`."));
            }
            said.push(format!("  What to do: {}", ended(&advice)));
            said.push(format!("  More: {REASONS_PAGE}, row `{reason}`."));
        }
    }
    said.push(format!("  Route: {}.", text("route")));
    said.push(who(line));
    said.push(upstream(line));
    if reason == "unknown" {
        said.push(
            "  Next: ask the caller for the first 12 hex digits of `printf %s TOKEN | sha256sum`; never for the token."
                .into(),
        );
    } else if let Some(token) = line["token"].as_str() {
        said.push(format!("  Next: `tollgate token show --config FILE {token}` has the token's record."));
    }
    if status != 0 && text("by") != "backend" {
        said.push(
            "  Also: `tollgate explain --config FILE --log-line -` with this line shows each stage, and the line of the \
             configuration behind it."
                .into(),
        );
    }
    said
}

fn who(line: &Value) -> String {
    let text = |key: &str| line[key].as_str();
    let client = text("client").map_or("a peer of a Unix socket".to_owned(), |client| format!("client {client}"));
    let agent =
        text("user_agent").filter(|agent| !agent.is_empty()).map_or(String::new(), |agent| format!(", {agent}"));
    let token = match (text("token"), text("source")) {
        (Some(token), source) => format!("token {token} ({})", source.unwrap_or("?")),
        (None, None | Some("none")) => "no token".into(),
        (None, Some(source)) => format!("no single well-formed token ({source})"),
    };
    let user = text("user").map_or(", whose user is not known".to_owned(), |user| format!(" of user {user}"));
    let user = if text("token").is_some() { user } else { String::new() };
    format!("  Who: {token}{user}; {client}{agent}.")
}

fn upstream(line: &Value) -> String {
    let text = |key: &str| line[key].as_str();
    let Some(name) = text("upstream") else { return "  Upstream: none was asked.".into() };
    let server = text("upstream_server").map_or("no server".to_owned(), |server| format!("server {server}"));
    let attempts = line["attempts"].as_u64().unwrap_or(0);
    let answer = match (line["upstream_status"].as_u64(), line["upstream_duration_ms"].as_f64()) {
        (Some(status), Some(ms)) => format!("which answered {status} after {ms} ms"),
        (Some(status), None) => format!("which answered {status}"),
        (None, _) => "which sent no answer".into(),
    };
    format!("  Upstream: {name}, {server}, {answer}; attempts: {attempts}.")
}

/// As a sentence.
fn ended(text: &str) -> String {
    if text.ends_with(['?', '.', '!']) { text.to_owned() } else { format!("{text}.") }
}
