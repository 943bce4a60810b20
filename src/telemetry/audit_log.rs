//! Who changed what: one JSON object for each change that the admin listener or a signal made, or failed to make. It must never
//! hold a token, nor a configured value: keys and names only.

use super::lines::{LineQueue, LogOutput};
use super::metrics::Metrics;
use serde_json::{Map, Value};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

/// How long a reload waits for the file to be reopened.
const REOPEN: Duration = Duration::from_secs(2);

/// Who asked for a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuditSource {
    /// A connection to the admin listener.
    Tcp(Option<IpAddr>),
    /// The same over a Unix socket: the process at its other end, as the kernel knows it.
    Unix { uid: Option<u32>, pid: Option<i32> },
    /// Its sender is not known.
    Signal(&'static str),
    /// tollgate itself.
    Process,
}

/// What was done, or was not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditedAction {
    pub action: &'static str,
    pub result: AuditResult,
    pub details: Vec<(&'static str, Value)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuditResult {
    Done,
    /// It was so already.
    Unchanged,
    /// It could not be done.
    Failed,
    /// It made no sense.
    Refused,
}

impl AuditResult {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Done => "ok",
            Self::Unchanged => "unchanged",
            Self::Failed => "failed",
            Self::Refused => "refused",
        }
    }
}

impl AuditedAction {
    pub fn new(action: &'static str, result: AuditResult) -> Self {
        Self { action, result, details: Vec::new() }
    }

    pub fn with(mut self, key: &'static str, value: impl Into<Value>) -> Self {
        self.details.push((key, value.into()));
        self
    }
}

#[derive(Clone)]
pub struct AuditLog(Option<Arc<LineQueue>>);

impl AuditLog {
    /// Starts the thread that writes; `None` switches the log off.
    pub fn start(to: Option<LogOutput>, metrics: Arc<Metrics>) -> std::io::Result<Self> {
        let queue = |to| LineQueue::start("audit", to, move |lines| metrics.audit_log_lost(lines));
        Ok(Self(to.map(queue).transpose()?.map(Arc::new)))
    }

    pub fn write(&self, unix_ms: u64, source: AuditSource, action: &AuditedAction) {
        if let Self(Some(lines)) = self {
            lines.push(format(unix_ms, source, action));
        }
    }

    pub fn is_same(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (Some(own), Some(other)) => Arc::ptr_eq(own, other),
            (own, other) => own.is_none() && other.is_none(),
        }
    }

    /// Waits until what was logged so far is written, but no longer than this.
    pub fn flush(&self, patience: Duration) {
        if let Self(Some(lines)) = self {
            lines.flush(patience);
        }
    }

    /// Reopens the file, which may have been rotated. Blocks for a moment.
    pub fn reopen(&self) -> Result<bool, String> {
        self.0.as_ref().map_or(Ok(true), |lines| lines.reopen(REOPEN))
    }
}

fn format(unix_ms: u64, source: AuditSource, action: &AuditedAction) -> Vec<u8> {
    let mut entry = Map::new();
    let mut put = |key: &str, value: Value| drop(entry.insert(key.to_owned(), value));
    let time = std::time::UNIX_EPOCH + Duration::from_millis(unix_ms);
    put("time", humantime::format_rfc3339_millis(time).to_string().into());
    match source {
        AuditSource::Tcp(client) => {
            put("source", "admin".into());
            put("client", client.map(|ip| ip.to_string()).into());
        }
        AuditSource::Unix { uid, pid } => {
            put("source", "admin".into());
            put("client_uid", uid.into());
            put("client_pid", pid.into());
        }
        AuditSource::Signal(name) => {
            put("source", "signal".into());
            put("signal", name.into());
        }
        AuditSource::Process => put("source", "process".into()),
    }
    put("action", action.action.into());
    put("result", action.result.as_str().into());
    action.details.iter().for_each(|(key, value)| put(key, value.clone()));
    // Line breaks within are escaped.
    let mut line = Value::Object(entry).to_string().into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_says_who_what_and_with_which_result_on_one_line() {
        let reload = AuditedAction::new("reload", AuditResult::Failed).with("errors", vec!["a\nb", "c"]);
        let client = "::1".parse().ok();
        for (source, action, expected) in [
            (
                AuditSource::Tcp(client),
                reload.clone(),
                r#""source":"admin","client":"::1","action":"reload","result":"failed","errors":["a\nb","c"]"#,
            ),
            (
                AuditSource::Unix { uid: Some(33), pid: None },
                AuditedAction::new("cache_forget", AuditResult::Done).with("removed", 1),
                r#""source":"admin","client_uid":33,"client_pid":null,"action":"cache_forget","result":"ok","removed":1"#,
            ),
            (
                AuditSource::Signal("SIGHUP"),
                AuditedAction::new("reload", AuditResult::Unchanged),
                r#""source":"signal","signal":"SIGHUP","action":"reload","result":"unchanged""#,
            ),
            (
                AuditSource::Process,
                AuditedAction::new("start", AuditResult::Refused),
                r#""source":"process","action":"start","result":"refused""#,
            ),
        ] {
            let line = String::from_utf8(format(1, source, &action)).unwrap();
            assert_eq!(line, format!("{{\"time\":\"1970-01-01T00:00:00.001Z\",{expected}}}\n"));
        }
    }
}
