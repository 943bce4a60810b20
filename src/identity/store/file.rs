//! Tokens in a TOML file of digests that people edit by hand. Read again whenever it changes; a broken file changes
//! nothing and says why. The file as a whole is swapped, never parts of it.

use super::{AdminError, Changes, StoreError, TokenAdmin, TokenRecord, TokenStore, parse_time, rfc3339};
use crate::identity::credential::{Credential, Digest};
use arc_swap::ArcSwap;
use async_trait::async_trait;
use serde::Deserialize;
use std::collections::HashMap;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;

/// How often the file's metadata is looked at; bounds the time that a revoked token still works.
const POLL: Duration = Duration::from_millis(200);

pub struct FileStore {
    path: PathBuf,
    table: ArcSwap<Table>,
    /// What the file looked like when it was last read, good or broken.
    seen: Mutex<Option<Stamp>>,
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

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileShape {
    #[serde(default)]
    token: Vec<TokenShape>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenShape {
    sha256: String,
    user: String,
    #[serde(default)]
    scopes: Vec<String>,
    #[serde(default)]
    description: String,
    created: Option<String>,
    expires: Option<String>,
    revoked: Option<Revoked>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Revoked {
    Flag(bool),
    Since(String),
}

impl FileStore {
    /// Reads the file; it must be there and right.
    pub fn open(path: &Path, clock: fn() -> crate::Now) -> Result<Self, String> {
        let seen = Stamp::of(path);
        let table = read(path)?;
        Ok(Self { path: path.into(), table: ArcSwap::from_pointee(table), seen: Mutex::new(seen), clock })
    }

    /// What changed since the last look, if anything.
    async fn look(&self) -> Option<Changes> {
        let mut seen = self.seen.lock().await;
        let stamp = Stamp::of(&self.path);
        if stamp == *seen {
            return None;
        }
        *seen = stamp;
        match read(&self.path) {
            Ok(table) => {
                let now = (self.clock)().unix_ms;
                let old = self.table.swap(Arc::new(table));
                let new = self.table.load();
                let changed = |digest: &&Digest| old.get(digest) != new.get(digest);
                let digests: std::collections::HashSet<_> =
                    old.keys().chain(new.keys()).filter(changed).copied().collect();
                log::info!("{} was read again: {} tokens, {} changed", self.path.display(), new.len(), digests.len());
                Some(Changes::Tokens(digests.into_iter().map(|digest| (digest, changed_at(stamp, now))).collect()))
            }
            Err(why) => {
                log::error!("{} is kept as it was before, because the new one is broken: {why}", self.path.display());
                None
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
    fn kind(&self) -> &'static str {
        "file"
    }

    async fn lookup(&self, credential: &Credential) -> Result<Option<TokenRecord>, StoreError> {
        Ok(self.table.load().get(credential.digest()).cloned())
    }

    async fn changes(&self) -> Changes {
        loop {
            tokio::time::sleep(POLL).await;
            if let Some(changes) = self.look().await {
                return changes;
            }
        }
    }
}

fn read(path: &Path) -> Result<Table, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    parse(&text)
}

fn parse(text: &str) -> Result<Table, String> {
    // toml's message would quote the line, which may be a token somebody pasted by mistake: only the place is told.
    let file: FileShape = toml::from_str(text).map_err(|error| {
        let line = error.span().map_or(0, |span| text[..span.start.min(text.len())].lines().count().max(1));
        format!("line {line}: {}", error.message())
    })?;
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
        let record = TokenRecord {
            digest,
            scopes: token.scopes,
            description: token.description,
            created: time("created", &token.created)?.unwrap_or(0),
            expires: time("expires", &token.expires)?,
            revoked,
            last_used: None,
            user: token.user,
        };
        if table.insert(digest, record).is_some() {
            return Err(place("sha256", "stands in the file twice: which one holds?"));
        }
    }
    Ok(table)
}

/// The file as the command line writes to it: text is added, and what people wrote stays as it is.
pub struct FileAdmin {
    path: PathBuf,
}

impl FileAdmin {
    pub fn new(path: &Path) -> Self {
        Self { path: path.into() }
    }

    fn text(&self) -> Result<String, AdminError> {
        match std::fs::read_to_string(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
            read => read.map_err(|error| AdminError::Store(format!("{}: {error}", self.path.display()))),
        }
    }

    fn table(&self) -> Result<Table, AdminError> {
        parse(&self.text()?).map_err(|why| AdminError::Store(format!("{}: {why}", self.path.display())))
    }

    /// Puts the new text in place as a whole, after having checked that it can be read.
    fn replace(&self, text: &str) -> Result<(), AdminError> {
        parse(text).map_err(AdminError::Store)?;
        let failed = |error: std::io::Error| AdminError::Store(format!("{}: {error}", self.path.display()));
        let mode = std::fs::metadata(&self.path).map_or(0o600, |meta| meta.mode() & 0o777);
        let temporary = self.path.with_extension(format!("new-{}", std::process::id()));
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&temporary)
            .map_err(failed)?;
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)?;
        std::fs::rename(&temporary, &self.path).map_err(failed)
    }
}

fn entry(record: &TokenRecord) -> String {
    let text = |text: &str| toml::Value::String(text.into()).to_string();
    let mut lines = format!("\n[[token]]\nsha256 = \"{}\"\nuser = {}\n", record.digest.to_hex(), text(&record.user));
    if !record.scopes.is_empty() {
        lines += &format!("scopes = [{}]\n", record.scopes.iter().map(|s| text(s)).collect::<Vec<_>>().join(", "));
    }
    if !record.description.is_empty() {
        lines += &format!("description = {}\n", text(&record.description));
    }
    lines += &format!("created = \"{}\"\n", rfc3339(record.created));
    for (key, time) in [("expires", record.expires), ("revoked", record.revoked)] {
        if let Some(time) = time {
            lines += &format!("{key} = \"{}\"\n", rfc3339(time));
        }
    }
    lines
}

impl TokenAdmin for FileAdmin {
    fn create(&mut self, record: &TokenRecord) -> Result<(), AdminError> {
        if self.table()?.contains_key(&record.digest) {
            return Err(AdminError::Exists);
        }
        self.replace(&(self.text()? + &entry(record)))
    }

    fn import(
        &mut self,
        records: &mut dyn Iterator<Item = Result<TokenRecord, AdminError>>,
    ) -> Result<u64, AdminError> {
        let mut known: std::collections::HashSet<Digest> = self.table()?.into_keys().collect();
        let (mut text, mut new) = (self.text()?, 0);
        for record in records {
            let record = record?;
            if known.insert(record.digest) {
                text += &entry(&record);
                new += 1;
            }
        }
        self.replace(&text).map(|()| new)
    }

    fn list(&self) -> Result<Vec<TokenRecord>, AdminError> {
        let mut records: Vec<_> = self.table()?.into_values().collect();
        records.sort_by(|a, b| b.created.cmp(&a.created).then_with(|| a.digest.as_bytes().cmp(b.digest.as_bytes())));
        Ok(records)
    }

    fn find(&self, hex_prefix: &str) -> Result<Vec<TokenRecord>, AdminError> {
        Ok(self.list()?.into_iter().filter(|record| record.digest.to_hex().starts_with(hex_prefix)).collect())
    }

    /// Adds a `revoked` line below the digest's own.
    fn revoke(&mut self, digest: &Digest, at: u64) -> Result<bool, AdminError> {
        let table = self.table()?;
        if table.get(digest).ok_or(AdminError::Missing)?.revoked.is_some() {
            return Ok(false);
        }
        let hex = digest.to_hex();
        let mut text = String::new();
        for line in self.text()?.lines() {
            text += line;
            text.push('\n');
            if line.to_ascii_lowercase().contains(&hex) && line.trim_start().starts_with("sha256") {
                text += &format!("revoked = \"{}\"\n", rfc3339(at));
            }
        }
        self.replace(&text).map(|()| true)
    }
}
