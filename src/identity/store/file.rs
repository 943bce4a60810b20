//! Tokens in a TOML or JSON file of digests that people edit by hand or programs write. Read again whenever it changes; a
//! broken file changes nothing and says why. The file as a whole is swapped, never parts of it.

use super::{
    AdminError, Change, Event, Heard, Named, Records, StoreError, TokenAdmin, TokenRecord, TokenStore, parse_time,
    rfc3339,
};
use crate::identity::credential::{Credential, Digest};
use crate::telemetry::metrics::StoreMetrics;
use arc_swap::ArcSwap;
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Mutex;

/// How often the file's metadata is looked at; bounds the time that a revoked token still works.
const POLL: Duration = Duration::from_millis(200);

pub struct FileStore {
    path: PathBuf,
    table: ArcSwap<Table>,
    /// What the file looked like when it was last read, good or broken.
    seen: Mutex<Option<Stamp>>,
    /// When it was last looked at, in monotonic milliseconds.
    looked_ms: AtomicU64,
    /// What was found changed and nobody has been told yet.
    untold: parking_lot::Mutex<Vec<Event>>,
    metrics: Arc<StoreMetrics>,
    clock: fn() -> crate::Now,
}

type Table = HashMap<Digest, TokenRecord>;

/// Changes whenever an editor, `mv` or `cp` puts new content in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let meta = std::fs::metadata(path).ok()?;
        Some(Self { inode: meta.ino(), size: meta.size(), modified: (meta.mtime(), meta.mtime_nsec()) })
    }
}

/// The same in both languages; a file that ends in `.json` is JSON.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileShape {
    #[serde(default)]
    token: Vec<TokenShape>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenShape {
    sha256: String,
    user: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    scopes: Vec<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    description: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    created: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    not_before: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    revoked: Option<Revoked>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    blocked: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    superseded: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replaces: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Revoked {
    Flag(bool),
    Since(String),
}

impl From<&TokenRecord> for TokenShape {
    fn from(record: &TokenRecord) -> Self {
        Self {
            sha256: record.digest.to_hex(),
            user: record.user.clone(),
            scopes: record.scopes.clone(),
            description: record.description.clone(),
            created: Some(rfc3339(record.created)),
            not_before: record.not_before.map(rfc3339),
            expires: record.expires.map(rfc3339),
            revoked: record.revoked.map(|at| Revoked::Since(rfc3339(at))),
            blocked: record.blocked,
            superseded: record.superseded.map(rfc3339),
            replaces: record.replaces.map(Digest::to_hex),
        }
    }
}

impl FileStore {
    /// Reads the file; it must be there and right.
    pub fn open(path: &Path, metrics: Arc<StoreMetrics>, clock: fn() -> crate::Now) -> Result<Self, String> {
        let seen = Stamp::of(path);
        let table = ArcSwap::from_pointee(read(path)?);
        metrics.file_current(true);
        let looked_ms = AtomicU64::new(clock().mono_ms);
        let (seen, untold) = (Mutex::new(seen), parking_lot::Mutex::default());
        Ok(Self { path: path.into(), table, seen, looked_ms, untold, metrics, clock })
    }

    /// Reads the file if it changed since the last look.
    async fn look(&self) {
        let mut seen = self.seen.lock().await;
        let looked_ms = (self.clock)().mono_ms;
        let (path, before, old) = (self.path.clone(), *seen, self.table.load_full());
        // A disk may take its time, and so do millions of lines.
        let looked = tokio::task::spawn_blocking(move || {
            let stamp = Stamp::of(&path);
            let read = || {
                let new = read(&path)?;
                let changed = |digest: &&Digest| old.get(digest) != new.get(digest);
                let digests: HashSet<_> = old.keys().chain(new.keys()).filter(changed).copied().collect();
                Ok((new, digests))
            };
            (stamp != before).then(|| (stamp, read()))
        });
        // An error: the process is ending, and nobody looks any more.
        let Ok(looked) = looked.await else { return };
        if let Some((stamp, read)) = looked {
            self.take_in(&mut seen, stamp, read);
        }
        // Only now: whoever asks meanwhile waits for the end.
        self.looked_ms.store(looked_ms, Ordering::Relaxed);
    }

    fn take_in(&self, seen: &mut Option<Stamp>, stamp: Option<Stamp>, read: Result<(Table, HashSet<Digest>), String>) {
        *seen = stamp;
        self.metrics.file_current(read.is_ok());
        match read {
            Ok((new, digests)) => {
                let now = (self.clock)().unix_ms;
                let new = Arc::new(new);
                self.table.store(Arc::clone(&new));
                log::info!("{} was read again: {} tokens, {} changed", self.path.display(), new.len(), digests.len());
                let at_ms = changed_at(stamp, now);
                let change = |digest| Change { token: Named::Token(digest), at_ms };
                self.untold.lock().push(Event::Changed(digests.into_iter().map(change).collect()));
            }
            Err(why) => {
                log::error!("{} is kept as it was before, because the new one is broken: {why}", self.path.display());
            }
        }
    }
}

/// When the change was made: the file's own time, unless it was moved here with an older one.
fn changed_at(stamp: Option<Stamp>, now: u64) -> u64 {
    let modified = stamp.map_or(now, |s| s.modified.0 as u64 * 1000 + s.modified.1 as u64 / 1_000_000);
    if now.saturating_sub(modified) < 60_000 { modified.min(now) } else { now }
}

#[async_trait]
impl TokenStore for FileStore {
    async fn lookup(&self, credential: &Credential) -> Result<Option<TokenRecord>, StoreError> {
        // Nobody follows the file, or the process stood still: what the table says may be long over.
        let age = (self.clock)().mono_ms.saturating_sub(self.looked_ms.load(Ordering::Relaxed));
        if age > 3 * POLL.as_millis() as u64 {
            self.look().await;
        }
        Ok(self.table.load().get(credential.digest()).cloned())
    }

    fn tells_changes(&self) -> bool {
        true
    }

    async fn follow(&self, heard: Heard<'_>) {
        heard(Event::Hearing);
        loop {
            tokio::time::sleep(POLL).await;
            let asked_ms = (self.clock)().mono_ms;
            self.look().await;
            let untold = std::mem::take(&mut *self.untold.lock());
            untold.into_iter().for_each(heard);
            heard(Event::Alive { asked_ms, mark: None });
        }
    }
}

/// What a gateway reads. A file without a word is one that somebody is just writing, or lost: never a list of nobody.
fn read(path: &Path) -> Result<Table, String> {
    let read = || {
        let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
        if text.trim().is_empty() {
            return Err("the file is empty (to let nobody in, write `token = []`, or `{}` in JSON)".into());
        }
        parse(&text, Format::of(path))
    };
    read().map_err(|why| format!("{}: {why}", path.display()))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Toml,
    Json,
}

impl Format {
    fn of(path: &Path) -> Self {
        if path.extension().is_some_and(|extension| extension == "json") { Self::Json } else { Self::Toml }
    }

    /// The parsers' own messages may quote the text, which may be a token that somebody pasted by mistake.
    fn shape(self, text: &str) -> Result<FileShape, String> {
        match self {
            Self::Toml => toml::from_str(text).map_err(|error| {
                let line = error.span().map_or(0, |span| text[..span.start.min(text.len())].lines().count().max(1));
                format!("line {line}: {}", without_values(error.message()))
            }),
            Self::Json => serde_json::from_str(text)
                .map_err(|error| format!("line {}: {}", error.line(), without_values(&error.to_string()))),
        }
    }
}

/// A message without what stands in double quotes.
fn without_values(message: &str) -> String {
    message.split('"').enumerate().map(|(index, part)| if index % 2 == 0 { part } else { "…" }).collect()
}

fn parse(text: &str, format: Format) -> Result<Table, String> {
    let file = format.shape(text)?;
    let mut table = HashMap::with_capacity(file.token.len());
    for (index, token) in file.token.into_iter().enumerate() {
        let place = |key: &str, why: &str| format!("token[{index}].{key}: {why}");
        let digest = Digest::from_hex(&token.sha256).ok_or_else(|| {
            place("sha256", "must be 64 hex digits, the SHA-256 of the token (printf %s TOKEN | sha256sum)")
        })?;
        let time = |key: &str, text: &Option<String>| match text {
            Some(text) => {
                parse_time(text).map(Some).ok_or_else(|| place(key, "must be a time like 2026-12-31T23:59:59Z"))
            }
            None => Ok(None),
        };
        let revoked = match &token.revoked {
            None | Some(Revoked::Flag(false)) => None,
            Some(Revoked::Flag(true)) => Some(0),
            Some(Revoked::Since(text)) => time("revoked", &Some(text.clone()))?,
        };
        let replaces = token
            .replaces
            .as_deref()
            .map(|hex| Digest::from_hex(hex).ok_or_else(|| place("replaces", "must be 64 hex digits")));
        let record = TokenRecord {
            digest,
            scopes: token.scopes,
            description: token.description,
            created: time("created", &token.created)?.unwrap_or(0),
            not_before: time("not_before", &token.not_before)?,
            expires: time("expires", &token.expires)?,
            revoked,
            blocked: token.blocked,
            superseded: time("superseded", &token.superseded)?,
            replaces: replaces.transpose()?,
            last_used: None,
            user: token.user,
        };
        if table.insert(digest, record).is_some() {
            return Err(place("sha256", "stands in the file twice: which one holds?"));
        }
    }
    Ok(table)
}

/// The file as the command line writes to it. In TOML text is added, and what people wrote stays as it is; JSON is
/// written anew.
pub struct FileAdmin {
    path: PathBuf,
    format: Format,
}

impl FileAdmin {
    pub fn new(path: &Path) -> Self {
        Self { path: path.into(), format: Format::of(path) }
    }

    fn failed(&self, why: impl std::fmt::Display) -> AdminError {
        AdminError::Store(format!("{}: {why}", self.path.display()))
    }

    /// What the file says; a start for one that is not there or empty.
    fn text(&self) -> Result<String, AdminError> {
        let text = match std::fs::read_to_string(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            read => read.map_err(|error| self.failed(error))?,
        };
        if !text.trim().is_empty() {
            return Ok(text);
        }
        Ok(match self.format {
            Format::Toml => "# Tokens that tollgate knows, by their SHA-256.\n".into(),
            Format::Json => "{}".into(),
        })
    }

    fn table(&self) -> Result<Table, AdminError> {
        parse(&self.text()?, self.format).map_err(|why| self.failed(why))
    }

    fn records(&self) -> Result<Vec<TokenRecord>, AdminError> {
        let mut records: Vec<_> = self.table()?.into_values().collect();
        records.sort_by(|a, b| b.created.cmp(&a.created).then_with(|| a.digest.as_bytes().cmp(b.digest.as_bytes())));
        Ok(records)
    }

    /// Adds entries behind what is there.
    fn add(&self, text: &str, records: &[TokenRecord]) -> Result<String, AdminError> {
        match self.format {
            Format::Toml => {
                let mut text = text.to_owned();
                for record in records {
                    let file = FileShape { token: vec![record.into()] };
                    text += "\n";
                    text += &toml::to_string(&file).map_err(|error| self.failed(error))?;
                }
                Ok(text)
            }
            Format::Json => {
                let mut file = self.format.shape(text).map_err(|why| self.failed(why))?;
                file.token.extend(records.iter().map(TokenShape::from));
                serde_json::to_string_pretty(&file).map_err(|error| self.failed(error))
            }
        }
    }

    /// Gives keys of some entries new values, in TOML's notation.
    fn set(&self, text: &str, digests: &[Digest], keys: &[(&str, String)]) -> Result<String, AdminError> {
        match self.format {
            Format::Toml => Ok(digests.iter().fold(text.to_owned(), |text, digest| set_in_toml(&text, digest, keys))),
            Format::Json => {
                let mut file: serde_json::Value = serde_json::from_str(text).map_err(|error| self.failed(error))?;
                let entries = file.get_mut("token").and_then(serde_json::Value::as_array_mut).into_iter().flatten();
                for entry in entries {
                    let digest = entry.get("sha256").and_then(|hex| hex.as_str()).and_then(Digest::from_hex);
                    if digest.is_some_and(|digest| digests.contains(&digest)) {
                        for (key, value) in keys {
                            entry[*key] = serde_json::from_str(value).map_err(|error| self.failed(error))?;
                        }
                    }
                }
                serde_json::to_string_pretty(&file).map_err(|error| self.failed(error))
            }
        }
    }

    /// Puts the new text in place as a whole, after having checked that it can be read.
    fn replace(&self, text: &str) -> Result<(), AdminError> {
        parse(text, self.format).map_err(|why| self.failed(why))?;
        let mode = std::fs::metadata(&self.path).map_or(0o600, |meta| meta.mode() & 0o777);
        let temporary = self.path.with_extension(format!("new-{}", std::process::id()));
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&temporary)
            .map_err(|error| self.failed(error))?;
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(|error| self.failed(error))?;
        std::fs::rename(&temporary, &self.path).map_err(|error| self.failed(error))
    }
}

/// Replaces the lines of these keys in a token's entry, or adds them below its digest.
fn set_in_toml(text: &str, digest: &Digest, keys: &[(&str, String)]) -> String {
    let hex = digest.to_hex();
    let key_of = |line: &str| line.split_once('=').map(|(key, _)| key.trim().to_owned());
    let is_digest =
        |line: &str| key_of(line).is_some_and(|key| key == "sha256") && line.to_ascii_lowercase().contains(&hex);
    // Entries begin at their header; what stands before the first one is kept as it is.
    let mut entries: Vec<Vec<&str>> = vec![Vec::new()];
    for line in text.lines() {
        if line.trim_start().starts_with('[') {
            entries.push(Vec::new());
        }
        if let Some(entry) = entries.last_mut() {
            entry.push(line);
        }
    }
    let mut out = String::new();
    for entry in entries {
        let ours = entry.iter().any(|line| is_digest(line));
        for line in entry {
            if !ours || !keys.iter().any(|(key, _)| key_of(line).is_some_and(|found| found == *key)) {
                out += line;
                out.push('\n');
            }
            if ours && is_digest(line) {
                keys.iter().for_each(|(key, value)| out += &format!("{key} = {value}\n"));
            }
        }
    }
    out
}

/// A time as both languages write it.
fn quoted(time: u64) -> String {
    format!("\"{}\"", rfc3339(time))
}

#[async_trait]
impl TokenAdmin for FileAdmin {
    async fn create(&mut self, record: &TokenRecord) -> Result<(), AdminError> {
        if self.table()?.contains_key(&record.digest) {
            return Err(AdminError::Exists);
        }
        self.replace(&self.add(&self.text()?, std::slice::from_ref(record))?)
    }

    async fn import(&mut self, records: Records<'_>) -> Result<u64, AdminError> {
        let mut known: HashSet<Digest> = self.table()?.into_keys().collect();
        let mut new = Vec::new();
        for record in records {
            let record = record?;
            if known.insert(record.digest) {
                new.push(record);
            }
        }
        self.replace(&self.add(&self.text()?, &new)?).map(|()| new.len() as u64)
    }

    async fn list(&mut self) -> Result<Vec<TokenRecord>, AdminError> {
        self.records()
    }

    async fn find(&mut self, hex_prefix: &str) -> Result<Vec<TokenRecord>, AdminError> {
        let records = self.records()?.into_iter();
        Ok(records.filter(|record| record.digest.to_hex().starts_with(hex_prefix)).take(100).collect())
    }

    async fn revoke(&mut self, digest: &Digest, at: u64) -> Result<bool, AdminError> {
        let table = self.table()?;
        if table.get(digest).ok_or(AdminError::Missing)?.revoked.is_some() {
            return Ok(false);
        }
        self.replace(&self.set(&self.text()?, &[*digest], &[("revoked", quoted(at))])?).map(|()| true)
    }

    async fn rotate(&mut self, old: &Digest, next: &TokenRecord, at: u64, end: u64) -> Result<(), AdminError> {
        let table = self.table()?;
        let end = table.get(old).ok_or(AdminError::Missing)?.rotated_out(at, end)?;
        if table.contains_key(&next.digest) {
            return Err(AdminError::Exists);
        }
        let text = self.set(&self.text()?, &[*old], &[("superseded", quoted(at)), ("expires", quoted(end))])?;
        self.replace(&self.add(&text, &[TokenRecord { replaces: Some(*old), ..next.clone() }])?)
    }

    async fn block(&mut self, user: &str, blocked: bool) -> Result<u64, AdminError> {
        let differs = |record: &&TokenRecord| record.user == user && record.blocked != blocked;
        let table = self.table()?;
        let digests: Vec<_> = table.values().filter(differs).map(|record| record.digest).collect();
        self.replace(&self.set(&self.text()?, &digests, &[("blocked", blocked.to_string())])?)?;
        Ok(digests.len() as u64)
    }

    async fn wait(&mut self, _timeout: Duration) -> Result<Vec<String>, AdminError> {
        Err(AdminError::NoRegister("a file"))
    }
}
