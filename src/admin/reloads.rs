//! The last reloads and what each changed, for the page: keys, never values. Knows no configuration.

use super::Reloaded;
use crate::telemetry::audit_log::AuditSource;
use parking_lot::Mutex;
use std::collections::VecDeque;

const KEPT: usize = 20;
/// What failed has more lines than anybody reads here; the log has all of them.
const MOST_LINES: usize = 10;
const LONGEST_LINE: usize = 400;
/// A file that is written anew may differ everywhere.
const MOST_KEYS: usize = 100;

/// The last reloads, and the start.
#[derive(Default)]
pub struct ReloadHistory(Mutex<VecDeque<ReloadNote>>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReloadNote {
    pub unix_ms: u64,
    /// Who asked for it.
    pub by: String,
    /// `start`, `ok`, `restart_needed`, `unchanged` or `failed`.
    pub result: &'static str,
    pub applied: Vec<String>,
    pub restart: Vec<String>,
    pub errors: Vec<String>,
}

impl ReloadHistory {
    pub fn started(&self, unix_ms: u64) {
        let none = Vec::new;
        let note = ReloadNote {
            unix_ms,
            by: "start".into(),
            result: "start",
            applied: none(),
            restart: none(),
            errors: none(),
        };
        self.push(note);
    }

    pub fn note(&self, unix_ms: u64, source: AuditSource, result: &Result<Reloaded, String>) {
        let keys = |keys: &[String]| keys.iter().take(MOST_KEYS).cloned().collect::<Vec<_>>();
        let (word, applied, restart, errors) = match result {
            Ok(Reloaded { applied, restart }) => {
                let word = match (applied.is_empty(), restart.is_empty()) {
                    (true, true) => "unchanged",
                    (_, false) => "restart_needed",
                    (false, true) => "ok",
                };
                (word, keys(applied), keys(restart), Vec::new())
            }
            Err(why) => {
                let cut = |line: &str| line.chars().take(LONGEST_LINE).collect::<String>();
                ("failed", Vec::new(), Vec::new(), why.lines().take(MOST_LINES).map(cut).collect())
            }
        };
        self.push(ReloadNote { unix_ms, by: asked_by(source), result: word, applied, restart, errors });
    }

    fn push(&self, note: ReloadNote) {
        let mut notes = self.0.lock();
        if notes.len() >= KEPT {
            notes.pop_front();
        }
        notes.push_back(note);
    }

    /// The last one first.
    pub fn last(&self) -> Vec<ReloadNote> {
        self.0.lock().iter().rev().cloned().collect()
    }
}

/// Who it was, for people.
pub fn asked_by(source: AuditSource) -> String {
    match source {
        AuditSource::Tcp(Some(client)) => format!("admin listener, {client}"),
        AuditSource::Unix { uid: Some(uid), pid: Some(pid) } => format!("admin listener, uid {uid}, pid {pid}"),
        AuditSource::Tcp(None) | AuditSource::Unix { .. } => "admin listener".into(),
        AuditSource::Signal(name) => name.into(),
        AuditSource::Process => "the file changed".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_ones_are_kept_and_say_what_changed() {
        let history = ReloadHistory::default();
        history.started(1);
        let changed = Reloaded { applied: vec!["log.level".into()], restart: Vec::new() };
        history.note(2, AuditSource::Signal("SIGHUP"), &Ok(changed));
        history.note(3, AuditSource::Process, &Err("a\n".repeat(50)));
        let last = history.last();
        assert_eq!(last.iter().map(|note| note.result).collect::<Vec<_>>(), ["failed", "ok", "start"]);
        assert_eq!((last[0].errors.len(), last[1].applied.as_slice()), (MOST_LINES, &["log.level".to_owned()][..]));
        for number in 0..100 {
            history.note(number, AuditSource::Tcp(None), &Ok(Reloaded::default()));
        }
        assert_eq!((history.last().len(), history.last()[0].unix_ms), (KEPT, 99));
    }
}
