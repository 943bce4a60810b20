//! One problem of a configuration as people and programs read it: its place in the file, the key, what is wrong, the value
//! that was found, and what to write instead.

use crate::problem::Severity;
use std::fmt;
use std::path::PathBuf;

/// One thing wrong with a configuration, or worth knowing about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    pub file: PathBuf,
    /// Of the file among those that are read: they are reported in this order.
    pub(super) index: usize,
    /// `None`: it is about something that is not in the file.
    pub place: Option<Position>,
    pub key: String,
    pub severity: Severity,
    pub what: String,
    /// The value as it is written in the file. `None` for one that may hold a secret.
    pub found: Option<String>,
    pub instead: String,
    /// The other place, where two of them contradict or repeat each other.
    pub related: Option<(PathBuf, Position)>,
    /// The file is right, and what it names is not: it may be right tomorrow without a change of the file.
    pub(crate) surroundings: bool,
}

/// A place in one of the files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FilePosition {
    pub(super) index: usize,
    pub(super) file: PathBuf,
    pub(super) position: Position,
}

/// Both count from 1; columns count characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    pub line: usize,
    pub column: usize,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.file.display();
        write!(f, "{file}:")?;
        if let Some(Position { line, column }) = self.place {
            write!(f, "{line}:{column}:")?;
        }
        if self.severity == Severity::Warning {
            f.write_str(" warning:")?;
        }
        if !self.key.is_empty() {
            write!(f, " {}:", self.key)?;
        }
        write!(f, " {}", self.what)?;
        if let Some((file, Position { line, column })) = &self.related {
            write!(f, " (see {}:{line}:{column})", file.display())?;
        }
        if let Some(found) = &self.found {
            write!(f, ", found {found}")?;
        }
        if self.instead.is_empty() { Ok(()) } else { write!(f, "; {}", self.instead) }
    }
}

impl Diagnostic {
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }

    /// For programs. The fields and their types stay as they are; docs/operations.md describes them.
    pub fn json(&self) -> serde_json::Value {
        let related = self.related.as_ref().map(|(file, at)| {
            serde_json::json!({ "file": file.display().to_string(), "line": at.line, "column": at.column })
        });
        serde_json::json!({
            "file": self.file.display().to_string(),
            "line": self.place.map(|at| at.line),
            "column": self.place.map(|at| at.column),
            "key": self.key,
            "severity": match self.severity {
                Severity::Error => "error",
                Severity::Warning => "warning",
            },
            "message": self.what,
            "found": self.found,
            "instead": self.instead,
            "related": related,
        })
    }
}
