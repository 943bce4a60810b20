//! The valid entries of a cache in a file, so that a restart under load does not send every caller to the store. Holds
//! digests and never a token. Whoever can write this file could let tokens in while the store is down, so it is read
//! only from a file that nobody else can write, and only when it is whole and of the same stores.

use super::cache::SavedEntry;
use super::principal::{Principal, SavedPrincipal};
use crate::problem::{Problem, no_new_file};
use crate::store::Mark;
use crate::store::credential::Digest;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::io::{BufRead as _, BufReader, BufWriter, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;

const FORMAT: &str = "tollgate cache 2";
/// Older ones are not worth reading: what they hold is over.
const OLDEST_MS: u64 = 24 * 3_600_000;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    format: String,
    /// The stores that the entries are from.
    origin: String,
    /// By this machine's clock: says whether it is worth reading, and nothing else.
    taken_at: u64,
    /// How far each store had told of its changes, in its own terms.
    marks: Vec<Option<Mark>>,
    entries: usize,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EntryLine {
    sha256: String,
    fresh_until: u64,
    stale_until: u64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    handles: Vec<String>,
    principal: SavedPrincipal,
}

/// Puts a new file in the place of the old one, as a whole.
pub(super) fn write(
    path: &Path,
    origin: &str,
    taken_at: u64,
    marks: &[Option<Mark>],
    entries: &[SavedEntry],
) -> Result<(), String> {
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let temporary = path.with_extension(format!("new-{}", std::process::id()));
    // Made anew, never written into: what stands there may be somebody else's link.
    drop(std::fs::remove_file(&temporary));
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary);
    let mut out = HashingWriter { inner: BufWriter::new(file.map_err(|error| failed(&error))?), hash: Sha256::new() };
    let (format, origin, marks) = (FORMAT.into(), origin.into(), marks.to_vec());
    let header = Header { format, origin, taken_at, marks, entries: entries.len() };
    out.line(&header).map_err(|error| failed(&error))?;
    for entry in entries {
        let line = EntryLine {
            sha256: entry.digest.to_hex(),
            fresh_until: entry.fresh_until,
            stale_until: entry.stale_until,
            handles: entry.handles.iter().map(|handle| handle.to_hex()).collect(),
            principal: entry.principal.keep(),
        };
        out.line(&line).map_err(|error| failed(&error))?;
    }
    let HashingWriter { mut inner, hash } = out;
    let end = writeln!(inner, "{}", Digest::from_bytes(hash.finalize().into()).to_hex());
    let file = end.and_then(|()| inner.into_inner().map_err(|error| error.into_error()));
    file.and_then(|file| file.sync_all())
        .and_then(|()| std::fs::rename(&temporary, path))
        .map_err(|error| failed(&error))
}

/// What keeps a snapshot from being written there. The gateway runs without one.
pub fn problems(path: &Path) -> Vec<Problem> {
    let why = if path.is_dir() { Some("is a folder".to_owned()) } else { no_new_file(path) };
    let warning = |why| {
        let what = format!("cannot be written, so that nothing is kept over a restart: {why}");
        Problem::warning("snapshot", what, "name a file in a folder that tollgate may write to")
    };
    why.map(warning).into_iter().collect()
}

/// A snapshot's marks, one for each store, and its entries.
pub(super) type Read = (Vec<Option<Mark>>, Vec<SavedEntry>);

/// Reads a file that [`write`] made. All or nothing.
pub(super) fn read(path: &Path, origin: &str, now_unix_ms: u64) -> Result<Read, String> {
    let failed = |why: &dyn std::fmt::Display| format!("{}: {why}", path.display());
    let mut file = std::fs::File::open(path).map_err(|error| failed(&error))?;
    let meta = file.metadata().map_err(|error| failed(&error))?;
    let own = std::fs::metadata("/proc/self").map_or(0, |me| me.uid());
    if meta.mode() & 0o022 != 0 || meta.uid() != own || !meta.is_file() {
        return Err(failed(&"somebody else could have written it (it must be a file of mode 0600 and one's own)"));
    }
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(|error| failed(&error))?;
    let body = text.trim_end_matches('\n').rfind('\n').map_or("", |end| &text[..=end]);
    let sum = text[body.len()..].trim_end_matches('\n');
    if Digest::from_hex(sum) != Some(Digest::of(body.as_bytes())) {
        return Err(failed(&"is damaged or was cut off"));
    }
    let mut lines = BufReader::new(body.as_bytes()).lines();
    let mut next = || lines.next().transpose().map_err(|error| failed(&error));
    let header: Header = match next()? {
        Some(line) => serde_json::from_str(&line).map_err(|error| failed(&error))?,
        None => return Err(failed(&"is empty")),
    };
    if header.format != FORMAT || header.origin != origin {
        return Err(failed(&"is from other stores or another version"));
    }
    if header.taken_at > now_unix_ms || now_unix_ms - header.taken_at > OLDEST_MS {
        return Err(failed(&"is too old, or from the future"));
    }
    let mut entries = Vec::with_capacity(header.entries);
    while let Some(line) = next()? {
        let line: EntryLine = serde_json::from_str(&line).map_err(|error| failed(&error))?;
        let digest = |hex: &str| Digest::from_hex(hex).ok_or_else(|| failed(&"holds a digest that is none"));
        let of = digest(&line.sha256)?;
        entries.push(SavedEntry {
            digest: of,
            principal: Arc::new(Principal::from_kept(line.principal, &of)),
            fresh_until: line.fresh_until,
            stale_until: line.stale_until,
            handles: line.handles.iter().map(|hex| digest(hex)).collect::<Result<_, _>>()?,
        });
    }
    if entries.len() != header.entries {
        return Err(failed(&"has other entries than it says"));
    }
    Ok((header.marks, entries))
}

/// Writes lines and keeps their sum.
struct HashingWriter {
    inner: BufWriter<std::fs::File>,
    hash: Sha256,
}

impl HashingWriter {
    fn line(&mut self, value: &impl Serialize) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        self.hash.update(&line);
        self.inner.write_all(&line)
    }
}
