//! Saves the cache's valid entries to a file, so that a restart does not cause a lookup for every token in use. The
//! file contains digests but no tokens. Write access to it would allow letting tokens in while the store is down, so it
//! is read only if no other user can write it, and only if it is complete and from the same stores.

use super::cache::SavedEntry;
use super::principal::{Principal, SavedPrincipal};
use crate::problem::{Problem, no_new_file};
use crate::request::seeded::{self, Rule};
use crate::store::Mark;
use crate::store::credential::Digest;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::io::{BufRead as _, BufReader, BufWriter, Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

const FORMAT: &str = "tollgate cache 3";
/// Older files are ignored, because their entries have expired.
const OLDEST_MS: u64 = 24 * 3_600_000;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    format: String,
    /// The stores that the entries are from.
    origin: String,
    /// By this machine's clock; used only to detect old files.
    taken_at: u64,
    /// The position in each store's list of changes, in the store's own terms.
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

/// Replaces the file atomically.
pub(super) fn write(
    path: &Path,
    origin: &str,
    taken_at: u64,
    marks: &[Option<Mark>],
    entries: &[SavedEntry],
) -> Result<(), String> {
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // A new file that only this user can read, removed if anything below fails.
    let file =
        tempfile::Builder::new().prefix(".tollgate-cache-").tempfile_in(folder).map_err(|error| failed(&error))?;
    let mut out = HashingWriter { inner: BufWriter::new(file), hash: Sha256::new() };
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
    let file = file.map_err(|error| failed(&error))?;
    file.as_file().sync_all().map_err(|error| failed(&error))?;
    file.persist(path).map_err(|error| failed(&error.error))?;
    Ok(())
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

/// The marks in a file, one for each store, and its entries.
pub(super) type CacheContents = (Vec<Option<Mark>>, Vec<SavedEntry>);

/// Reads a file that [`write`] made. All or nothing.
pub(super) fn read(path: &Path, origin: &str, now_unix_ms: u64) -> Result<CacheContents, String> {
    let failed = |why: &dyn std::fmt::Display| format!("{}: {why}", path.display());
    let mut file = std::fs::File::open(path).map_err(|error| failed(&error))?;
    let meta = file.metadata().map_err(|error| failed(&error))?;
    let own = std::fs::metadata("/proc/self").map_or(0, |me| me.uid());
    if meta.mode() & 0o022 != 0 || meta.uid() != own || !meta.is_file() {
        return Err(failed(
            &"may have been written by another user (it must be a file of the service's user, mode 0600)",
        ));
    }
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(|error| failed(&error))?;
    parse(&text, origin, now_unix_ms).map_err(|why| failed(&why))
}

/// The same for the text of a file.
pub(super) fn parse(text: &str, origin: &str, now_unix_ms: u64) -> Result<CacheContents, String> {
    let body = text.trim_end_matches('\n').rfind('\n').map_or("", |end| &text[..=end]);
    let sum = text[body.len()..].trim_end_matches('\n');
    if Digest::from_hex(sum) != Some(Digest::of(body.as_bytes())) {
        return Err("is damaged or truncated".into());
    }
    let mut lines = BufReader::new(body.as_bytes()).lines();
    let mut next = || lines.next().transpose().map_err(|error| error.to_string());
    let header: Header = match next()? {
        Some(line) => serde_json::from_str(&line).map_err(|error| error.to_string())?,
        None => return Err("is empty".into()),
    };
    if header.format != FORMAT || header.origin != origin {
        return Err("is from other stores or another version".into());
    }
    if header.taken_at > now_unix_ms || now_unix_ms - header.taken_at > OLDEST_MS {
        return Err("is older than 24 hours, or its time is in the future".into());
    }
    // The header's number is compared at the end; until then it reserves nothing.
    let mut entries = Vec::new();
    while let Some(line) = next()? {
        let line: EntryLine = serde_json::from_str(&line).map_err(|error| error.to_string())?;
        let digest = |hex: &str| Digest::from_hex(hex).ok_or("contains an invalid digest");
        let of = digest(&line.sha256)?;
        entries.push(SavedEntry {
            digest: of,
            principal: Arc::new(Principal::from_kept(line.principal, &of)?),
            fresh_until: line.fresh_until,
            stale_until: line.stale_until,
            handles: line.handles.iter().map(|hex| digest(hex)).collect::<Result<_, _>>()?,
        });
    }
    if entries.len() != header.entries && !seeded::off(Rule::CacheCount) {
        return Err("does not have the number of entries in its header".into());
    }
    Ok((header.marks, entries))
}

/// Writes lines and hashes them.
struct HashingWriter {
    inner: BufWriter<tempfile::NamedTempFile>,
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Found with the fuzz target `cache`: memory was reserved for as many entries as the header said, and the start failed.
    #[test]
    fn the_number_in_the_header_reserves_nothing() {
        for entries in [1, 99_999_999_999, u64::MAX] {
            let marks = r#""taken_at":1,"marks":[]"#;
            let body = format!("{{\"format\":\"{FORMAT}\",\"origin\":\"o\",{marks},\"entries\":{entries}}}\n");
            let text = format!("{body}{}\n", Digest::of(body.as_bytes()).to_hex());
            let said = parse(&text, "o", 2).err();
            assert_eq!(said.as_deref(), Some("does not have the number of entries in its header"), "{entries}");
        }
    }
}
