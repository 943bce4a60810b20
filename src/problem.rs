//! What is wrong with a setting, as the stage says that the setting belongs to. It knows no configuration file: `config/`
//! finds the place and reports it to the operator.

use nix::unistd::{AccessFlags, access};
use std::fmt;
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

/// One thing wrong. Never holds a secret: what it says is printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The key, as it stands in the section of these settings.
    pub key: &'static str,
    /// Which element of the key's list.
    pub element: Option<usize>,
    /// Another key, or an earlier element, that this one contradicts or repeats.
    pub related: Option<(&'static str, Option<usize>)>,
    pub what: String,
    /// What to write instead, or to do.
    pub instead: String,
    pub severity: Severity,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.what)?;
        if self.instead.is_empty() { Ok(()) } else { write!(f, "; {}", self.instead) }
    }
}

impl std::error::Error for Problem {}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Nothing runs with it.
    Error,
    /// It runs, and somebody should know what it means.
    Warning,
}

impl Problem {
    pub fn error(key: &'static str, what: impl Into<String>, instead: impl Into<String>) -> Self {
        let (what, instead, severity) = (what.into(), instead.into(), Severity::Error);
        Self { key, element: None, related: None, what, instead, severity }
    }

    pub fn warning(key: &'static str, what: impl Into<String>, instead: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(key, what, instead) }
    }

    /// A number outside of its range.
    pub fn out_of_range(key: &'static str, value: u64, range: RangeInclusive<u64>) -> Option<Self> {
        let instead = format!("use a number from {} to {}", range.start(), range.end());
        (!range.contains(&value)).then(|| Self::error(key, "is out of range", instead))
    }

    /// A number of connections, which every store with a network has.
    pub fn connections(count: usize) -> Option<Self> {
        Self::out_of_range("connections", u64::try_from(count).unwrap_or(u64::MAX), 1..=1_000)
    }

    /// Nothing can be built from settings with an error.
    pub fn first_error(found: Vec<Self>) -> Result<(), Self> {
        found.into_iter().find(|problem| problem.severity == Severity::Error).map_or(Ok(()), Err)
    }

    /// A time below what makes sense.
    pub fn too_short(key: &'static str, value: Duration, least: Duration) -> Option<Self> {
        let least_text = humantime::format_duration(least);
        (value < least).then(|| Self::error(key, "is too short", format!("use at least \"{least_text}\"")))
    }

    /// It is this element of the list.
    #[must_use]
    pub fn element(self, index: usize) -> Self {
        Self { element: Some(index), ..self }
    }

    /// It contradicts or repeats what another key says.
    #[must_use]
    pub fn with(self, key: &'static str) -> Self {
        Self { related: Some((key, None)), ..self }
    }

    /// It repeats an earlier element of this or another list.
    #[must_use]
    pub fn repeats(self, key: &'static str, index: usize) -> Self {
        Self { related: Some((key, Some(index))), ..self }
    }
}

/// Why no file can be made at a path, as far as that can be told without making one.
pub fn no_new_file(path: &Path) -> Option<String> {
    let folder = match path.parent() {
        Some(folder) if folder.as_os_str().is_empty() => Path::new("."),
        Some(folder) => folder,
        None => return Some("names a folder".into()),
    };
    match std::fs::metadata(folder) {
        Ok(meta) if !meta.is_dir() => Some(format!("{} is not a folder", folder.display())),
        Ok(_) => not_writable(folder).map(|why| format!("the folder {}: {why}", folder.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Some(format!("there is no folder {}", folder.display()))
        }
        Err(error) => Some(format!("the folder {}: {error}", folder.display())),
    }
}

/// Why a file or a folder that is there cannot be written to.
pub fn not_writable(path: &Path) -> Option<String> {
    let how = if path.is_dir() { AccessFlags::W_OK | AccessFlags::X_OK } else { AccessFlags::W_OK };
    access(path, how).err().map(|error| error.desc().to_owned())
}

/// The kernel has room for no longer path of a socket.
pub fn socket_path_too_long(path: &str) -> Option<String> {
    const LONGEST: usize = 107;
    (path.len() > LONGEST).then(|| format!("is the path of a socket with more than {LONGEST} bytes"))
}
