//! Tokens in a TOML or JSON file of digests that people edit by hand or programs write. Read again whenever it changes; a
//! broken file changes nothing and says why. The file as a whole is swapped, never parts of it.

mod admin;
mod follow;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;

pub use admin::FileAdmin;

use super::record::{self, RecordField, RecordSource, Unsaid};
use super::terms::TokenTerms;
use super::{Change, Heard, LookupLimits, Named, StoreError, TokenRecord, TokenStore, feed, parse_time, shared_scopes};
use crate::problem::Problem;
use crate::request::seeded::{self, Rule};
use crate::store::credential::{Credential, Digest};
use crate::telemetry::metrics::StoreMetrics;
use arc_swap::ArcSwap;
use async_trait::async_trait;
use foldhash::quality::RandomState;
use serde::Deserialize;
use std::collections::{HashMap, HashSet};
use std::num::NonZeroU64;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Mutex;

/// How often the file's metadata is looked at; bounds the time that a revoked token still works.
const POLL: Duration = Duration::from_millis(200);

pub struct FileStore {
    path: PathBuf,
    table: ArcSwap<KnownTokens>,
    /// What the file looked like when it was last read, good or broken.
    seen: Mutex<Option<Stamp>>,
    /// When it was last looked at, in monotonic milliseconds.
    looked_ms: AtomicU64,
    /// What was found changed and nobody has been told yet.
    untold: parking_lot::Mutex<Vec<Change>>,
    metrics: Arc<StoreMetrics>,
    clock: fn() -> crate::clock::Now,
}

/// All that the file says.
type Table = HashMap<Digest, TokenRecord>;

/// The same as a gateway holds it, in little memory.
type KnownTokens = HashMap<Digest, KnownToken, RandomState>;

/// An entry without its digest.
#[derive(PartialEq, Eq)]
struct KnownToken {
    user: Box<str>,
    /// Shared by all who have the same.
    scopes: Arc<[String]>,
    expires: Option<NonZeroU64>,
    rest: Option<Box<RestOfRecord>>,
}

/// What many entries do not say.
#[derive(Default, PartialEq, Eq)]
struct RestOfRecord {
    /// It expired in 1970, which has no number above 0.
    expired_always: bool,
    description: Box<str>,
    created: u64,
    not_before: Option<u64>,
    revoked: Option<u64>,
    blocked: bool,
    superseded: Option<u64>,
    replaces: Option<Digest>,
    last_used: Option<u64>,
    /// Shared by all who have the same.
    terms: Option<Arc<TokenTerms>>,
}

impl From<TokenRecord> for KnownToken {
    fn from(record: TokenRecord) -> Self {
        // Named one by one, so that a new field is not forgotten.
        let TokenRecord {
            digest: _,
            user,
            scopes,
            description,
            created,
            not_before,
            expires,
            revoked,
            blocked,
            superseded,
            replaces,
            last_used,
            terms,
        } = record;
        let rest = RestOfRecord {
            expired_always: expires == Some(0),
            description: description.into(),
            created,
            not_before,
            revoked,
            blocked,
            superseded,
            replaces,
            last_used,
            terms,
        };
        let rest = (rest != RestOfRecord::default()).then(|| Box::new(rest));
        let (scopes, expires) = (shared_scopes(&scopes), expires.and_then(NonZeroU64::new));
        Self { user: user.into(), scopes, expires, rest }
    }
}

impl KnownToken {
    fn record(&self, digest: Digest) -> TokenRecord {
        let (user, scopes) = (self.user.to_string(), self.scopes.to_vec());
        let record =
            TokenRecord { scopes, expires: self.expires.map(NonZeroU64::get), ..TokenRecord::new(digest, user) };
        let Some(rest) = &self.rest else { return record };
        TokenRecord {
            description: rest.description.to_string(),
            created: rest.created,
            not_before: rest.not_before,
            expires: record.expires.or(rest.expired_always.then_some(0)),
            revoked: rest.revoked,
            blocked: rest.blocked,
            superseded: rest.superseded,
            replaces: rest.replaces,
            last_used: rest.last_used,
            terms: rest.terms.clone(),
            ..record
        }
    }
}

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
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileShape {
    #[serde(default)]
    token: Vec<TokenShape>,
}

/// An entry as the parsers read it, with its types checked. What its texts mean is read by [`FileEntry`].
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
    not_before: Option<String>,
    expires: Option<String>,
    revoked: Option<Revoked>,
    #[serde(default)]
    blocked: bool,
    superseded: Option<String>,
    replaces: Option<String>,
    /// As another store knew it; gateways write nothing here.
    last_used: Option<String>,
    plan: Option<String>,
    rate: Option<String>,
    networks: Option<Vec<String>>,
    methods: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Revoked {
    Flag(bool),
    Since(String),
}

/// An entry of the file, and its place there.
struct FileEntry {
    index: usize,
    token: TokenShape,
}

impl FileEntry {
    fn broken(&self, key: &'static str, what: &'static str) -> Broken {
        Broken::Entry { index: self.index, key, what }
    }

    fn unix_seconds(&self, field: RecordField, text: &str) -> Result<u64, Broken> {
        parse_time(text).ok_or_else(|| self.broken(field.name(), "must be a time like 2026-12-31T23:59:59Z"))
    }
}

impl RecordSource for FileEntry {
    type Error = Broken;

    fn text(&self, field: RecordField) -> Result<Option<String>, Broken> {
        Ok(match field {
            RecordField::User => Some(self.token.user.clone()),
            RecordField::Description => Some(self.token.description.clone()),
            RecordField::Plan => self.token.plan.clone(),
            RecordField::Rate => self.token.rate.clone(),
            _ => None,
        })
    }

    fn words(&self, field: RecordField) -> Result<Option<Vec<String>>, Broken> {
        Ok(match field {
            RecordField::Scopes => Some(self.token.scopes.clone()),
            RecordField::Networks => self.token.networks.clone(),
            RecordField::Methods => self.token.methods.clone(),
            _ => None,
        })
    }

    fn time(&self, field: RecordField) -> Result<Option<u64>, Broken> {
        let text = match field {
            RecordField::Created => &self.token.created,
            RecordField::NotBefore => &self.token.not_before,
            RecordField::Expires => &self.token.expires,
            RecordField::Superseded => &self.token.superseded,
            RecordField::LastUsed => &self.token.last_used,
            _ => &None,
        };
        text.as_ref().map(|text| self.unix_seconds(field, text)).transpose()
    }

    fn flag(&self, _: RecordField) -> Result<Option<bool>, Broken> {
        Ok(Some(self.token.blocked))
    }

    fn digest(&self, field: RecordField) -> Result<Option<Digest>, Broken> {
        let hex = self.token.replaces.as_deref();
        hex.map(|hex| Digest::from_hex(hex).ok_or_else(|| self.broken(field.name(), "must be 64 hex digits")))
            .transpose()
    }

    fn revoked(&self) -> Result<Option<u64>, Broken> {
        match &self.token.revoked {
            None | Some(Revoked::Flag(false)) => Ok(None),
            Some(Revoked::Flag(true)) => Ok(Some(0)),
            Some(Revoked::Since(text)) => self.unix_seconds(RecordField::Revoked, text).map(Some),
        }
    }

    fn wrong(&self, field: RecordField, what: &'static str) -> Broken {
        self.broken(field.name(), what)
    }

    fn missing(&self, field: RecordField) -> Broken {
        self.broken(field.name(), "must not be empty")
    }
}

impl FileStore {
    /// Reads the file; it must be there and right.
    pub fn open(path: &Path, metrics: Arc<StoreMetrics>, clock: fn() -> crate::clock::Now) -> Result<Self, FileError> {
        let seen = Stamp::of(path);
        let table = ArcSwap::from_pointee(read(path)?);
        metrics.file_current(true);
        let looked_ms = AtomicU64::new(clock().mono_ms);
        let (seen, untold) = (Mutex::new(seen), parking_lot::Mutex::default());
        Ok(Self { path: path.into(), table, seen, looked_ms, untold, metrics, clock })
    }

    fn known(&self, token: &Digest) -> Option<TokenRecord> {
        self.table.load().get(token).map(|known| known.record(*token))
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

    fn take_in(
        &self,
        seen: &mut Option<Stamp>,
        stamp: Option<Stamp>,
        read: Result<(KnownTokens, HashSet<Digest>), FileError>,
    ) {
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
                self.untold.lock().extend(digests.into_iter().map(change));
            }
            Err(FileError { path, why }) => {
                log::error!("{} is kept as it was before, because the new one is broken: {why}", path.display());
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
    /// From memory.
    fn lookup_limits(&self) -> LookupLimits {
        LookupLimits { at_once: 1_024, tokens: 1 }
    }

    fn lookup_at_once(&self, token: &Digest) -> Option<Option<TokenRecord>> {
        // Nobody follows the file, or the process stood still: what the table says may be long over.
        let age = (self.clock)().mono_ms.saturating_sub(self.looked_ms.load(Ordering::Relaxed));
        (age <= 3 * POLL.as_millis() as u64).then(|| self.known(token))
    }

    async fn lookup(&self, credential: &Credential) -> Result<Option<TokenRecord>, StoreError> {
        if let Some(found) = self.lookup_at_once(credential.digest()) {
            return Ok(found);
        }
        self.look().await;
        Ok(self.known(credential.digest()))
    }

    fn tells_changes(&self) -> bool {
        true
    }

    async fn follow(&self, heard: Heard<'_>) {
        feed::follow(follow::FileChanges(self), self.clock, heard).await;
    }
}

/// What a gateway reads. A file without a word is one that somebody is just writing, or lost: never a list of nobody.
fn read(path: &Path) -> Result<KnownTokens, FileError> {
    let read = || {
        let text = std::fs::read_to_string(path)?;
        if text.trim().is_empty() {
            return Err(Broken::Empty);
        }
        entries(&text, Format::of(path), |known: &mut KnownTokens, record| {
            known.insert(record.digest, record.into()).is_none()
        })
    };
    read().map_err(|why| FileError { path: path.into(), why })
}

/// Why a gateway could not read this file.
pub(super) fn unusable(path: &Path) -> Option<FileError> {
    read(path).err()
}

/// A token file that cannot be read, and why.
#[derive(Debug, thiserror::Error)]
#[error("{}: {why}", path.display())]
pub struct FileError {
    path: PathBuf,
    why: Broken,
}

impl FileError {
    pub(super) fn problem(&self) -> Problem {
        Problem::error("path", self.to_string(), "name a file with tokens, see docs/stores.md")
    }
}

/// What is wrong with a token file. Never quotes it.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("the file is empty (to let nobody in, write `token = []`, or `{{}}` in JSON)")]
    Empty,
    #[error("line {line}: {what}")]
    Syntax { line: usize, what: String },
    #[error("token[{index}].{key}: {what}")]
    Entry { index: usize, key: &'static str, what: &'static str },
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
    fn shape(self, text: &str) -> Result<FileShape, Broken> {
        match self {
            Self::Toml => toml::from_str(text).map_err(|error| {
                let line = error.span().map_or(0, |span| text[..span.start.min(text.len())].lines().count().max(1));
                Broken::Syntax { line, what: without_values(error.message()) }
            }),
            Self::Json => serde_json::from_str(text)
                .map_err(|error| Broken::Syntax { line: error.line(), what: without_values(&error.to_string()) }),
        }
    }
}

/// A parser's message without what it quotes of the file: a value in double quotes, or a key or a number in backticks. What was
/// expected in its place stays.
fn without_values(message: &str) -> String {
    // These quote names of fields and signs that the parser itself knows.
    let own_words = ["missing field ", "duplicate field ", "expected "].iter().any(|begin| message.starts_with(begin));
    let (found, expected) = message.rfind(", expected").map_or((message, ""), |at| message.split_at(at));
    let is_quote = |letter: char| matches!(letter, '"' | '`');
    match (found.find(is_quote), found.rfind(is_quote)) {
        (Some(first), Some(last)) if !own_words && !seeded::off(Rule::FileQuotes) => {
            format!("{}…{}{expected}", &found[..first], &found[last + 1..])
        }
        _ => message.to_owned(),
    }
}

fn parse(text: &str, format: Format) -> Result<Table, Broken> {
    entries(text, format, |table: &mut Table, record| table.insert(record.digest, record).is_none())
}

/// Reads all entries. `put` says whether a digest is new.
fn entries<T: Default>(text: &str, format: Format, put: impl Fn(&mut T, TokenRecord) -> bool) -> Result<T, Broken> {
    let read = |all: &mut T, index: usize, token: TokenShape| {
        let entry = FileEntry { index, token };
        let digest = Digest::from_hex(&entry.token.sha256).ok_or_else(|| {
            entry.broken("sha256", "must be 64 hex digits, the SHA-256 of the token (printf %s TOKEN | sha256sum)")
        })?;
        match put(all, record::read(digest, &entry, &Unsaid::NOTHING)?) {
            true => Ok(()),
            false => Err(entry.broken("sha256", "stands in the file twice: which one holds?")),
        }
    };
    if format == Format::Toml
        && let Some(all) = in_pieces(text, read)
    {
        return all;
    }
    let mut all = T::default();
    let mut tokens = format.shape(text)?.token.into_iter().enumerate();
    tokens.try_for_each(|(index, token)| read(&mut all, index, token))?;
    Ok(all)
}

/// Reads one entry after the other, because the parser's tree of a whole file takes a hundred times the memory of what it
/// says. `None`: the file has another form than `[[token]]` and what belongs to it, or a piece is no TOML by itself, as in the
/// midst of a text of several lines. It must be read as a whole then, which also tells where a mistake is.
fn in_pieces<T: Default>(
    text: &str,
    read: impl Fn(&mut T, usize, TokenShape) -> Result<(), Broken>,
) -> Option<Result<T, Broken>> {
    const HEADER: &str = "[[token]]";
    let mut begins = Vec::new();
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        let content = line.trim();
        if content == HEADER {
            begins.push(at);
        } else if begins.is_empty() && !content.is_empty() && !content.starts_with('#') {
            return None;
        }
        at += line.len();
    }
    // What is before the first entry goes with it: a comment can be no TOML as well.
    *begins.first_mut()? = 0;
    let ends = begins.iter().skip(1).copied().chain([text.len()]);
    let (mut all, mut index) = (T::default(), 0);
    for (begin, end) in begins.iter().copied().zip(ends) {
        let piece: FileShape = toml::from_str(text.get(begin..end)?).ok()?;
        for token in piece.token {
            if let Err(why) = read(&mut all, index, token) {
                return Some(Err(why));
            }
            index += 1;
        }
    }
    Some(Ok(all))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::terms::SaidTerms;

    /// Found by the fuzz target `tokens`: a token in the place of a key was said, and one behind an escaped quote.
    #[test]
    fn what_is_wrong_quotes_nothing_of_the_file() {
        for (text, format, said) in [
            ("[[token]]\nS3CRET = \"ann\"\n", Format::Toml, "unknown field …, expected one of `sha256`, `user`"),
            ("[[token]]\n\"a`, expected S3CRET\" = 1\n", Format::Toml, "unknown field …, expected one of `sha256`"),
            ("{\"token\":[{\"S3CRET\":1}]}", Format::Json, "unknown field …, expected one of `sha256`"),
            ("{\"token\":\"a\\\"S3CRET\\\"\"}", Format::Json, "invalid type: string …, expected a sequence"),
            ("{\"token\":[{\"user\":\"u\"}]}", Format::Json, "missing field `sha256`"),
            ("{\"token\":[}", Format::Json, "expected value at line 1"),
            ("[[token]]\nsha256 = S3CRET\n", Format::Toml, "line 2"),
        ] {
            let why = format!("{}", parse(text, format).err().unwrap());
            assert!(why.contains(said) && !why.contains("S3CRET"), "{text}: {why}");
        }
    }

    #[test]
    fn a_known_token_says_what_its_record_said() {
        let digest = Digest::of(b"t");
        let plain = TokenRecord { scopes: vec!["api".into()], expires: Some(7), ..TokenRecord::new(digest, "u") };
        let full = TokenRecord {
            description: "d".into(),
            created: 1,
            not_before: Some(2),
            expires: Some(0),
            revoked: Some(3),
            blocked: true,
            superseded: Some(4),
            replaces: Some(Digest::of(b"before")),
            last_used: Some(5),
            terms: TokenTerms::of(SaidTerms { plan: "gold".into(), ..SaidTerms::default() }).unwrap(),
            ..plain.clone()
        };
        for record in [plain.clone(), full] {
            assert_eq!(KnownToken::from(record.clone()).record(digest), record);
        }
        let [one, other] = [plain.clone(), plain].map(KnownToken::from);
        assert!(Arc::ptr_eq(&one.scopes, &other.scopes), "one list for both");
    }

    /// All pieces of a file read as the file does.
    #[test]
    fn a_file_in_pieces_says_what_the_whole_says() {
        let entry =
            |number: u32, more: &str| format!("[[token]]\nsha256 = \"{:064x}\"\nuser = \"u{number}\"\n{more}", number);
        let plain = format!("# head\n\n{}{}", entry(1, "scopes = [\n\"a\",\n\"b\" ]\n\n"), entry(2, "# tail\n"));
        let table = "description = \"\"\"x\n[[token]]\nsha256 = 1\"\"\"\n";
        let cases = [
            (plain.clone(), true),
            (plain.replace('\n', "\r\n"), true),
            (plain.replace("[[token]]", "  [[token]] \t"), true),
            (format!("{}[[token]] # another\nsha256 = \"{:064x}\"\nuser = \"v\"\n", entry(1, ""), 7), true),
            // Read as a whole.
            ("# nobody\n".into(), false),
            (entry(1, table), false),
            (format!("{}{}", entry(1, table), entry(2, "")), false),
            (format!("token = []\n{}", entry(1, "")), false),
            (format!("token = [{{ sha256 = \"{:064x}\", user = \"u\" }}]\n", 9), false),
            (format!("{}other = 1\n", entry(1, "")), false),
            (format!("{}[other]\n", entry(1, "")), false),
            (format!("{}{}", entry(1, "[token.x]\n"), entry(2, "")), false),
            (format!("{}user = \"twice\"\n", entry(1, "")), false),
            (format!("{}scopes = [\n{}]\n", entry(1, ""), entry(2, "")), false),
            (format!("[token]\n{}", entry(1, "")), false),
            (format!("\u{feff}{}", entry(1, "")), false),
            // Found by the fuzz target `tokens`: this is no comment of TOML.
            (format!("# \u{c}\n{}", entry(1, "")), false),
        ];
        let mut seen = 0;
        for (text, in_one_go) in cases {
            let record = |all: &mut Table, _, token: TokenShape| {
                let digest = Digest::from_hex(&token.sha256).unwrap();
                let entry = FileEntry { index: 0, token };
                all.insert(digest, record::read(digest, &entry, &Unsaid::NOTHING)?);
                Ok(())
            };
            let whole = Format::Toml.shape(&text).map(|shape| {
                let mut all = Table::new();
                shape.token.into_iter().try_for_each(|token| record(&mut all, 0, token)).unwrap();
                all
            });
            let pieces = in_pieces(&text, record);
            assert_eq!(pieces.is_some(), in_one_go, "{text}");
            if let Some(pieces) = pieces {
                assert_eq!(pieces.ok(), whole.ok(), "{text}");
            }
            assert_eq!(parse(&text, Format::Toml).is_ok(), Format::Toml.shape(&text).is_ok(), "{text}");
            seen += 1;
        }
        assert_eq!(seen, 17);
    }
}
