//! Writing to the token file. An edit keeps the notation of the file, including comments. The file is replaced
//! atomically, and a command reports success only after it has read the change from the file again.

use super::super::record::{FieldValue, RecordField, said};
use super::super::{AdminError, Differing, Imported, Records, TokenAdmin, TokenRecord, rfc3339};
use super::{Format, Stamp, Table, parse};
use crate::store::credential::Digest;
use crate::store::query::TokenQuery;
use async_trait::async_trait;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::collections::{HashMap, HashSet};
use std::fs::{File, Metadata, Permissions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use toml_edit::{Array, ArrayOfTables, DocumentMut, InlineTable, Item, TableLike, Value};

/// Timeout for the lock; other commands hold it far shorter.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
const LOCK_POLL: Duration = Duration::from_millis(20);
/// How often a change is retried if an editor, which takes no lock, wrote meanwhile.
const ATTEMPTS: usize = 5;

pub struct FileAdmin {
    path: PathBuf,
    format: Format,
}

/// The change of one entry.
enum Edit {
    Add(TokenRecord),
    Set(Digest, Vec<Set>),
    Remove(Digest),
}

/// A field and its new value.
#[derive(Clone, Copy)]
enum Set {
    Revoked(u64),
    Superseded(u64),
    Expires(u64),
    Blocked(bool),
}

impl Set {
    const fn field(self) -> RecordField {
        match self {
            Self::Revoked(_) => RecordField::Revoked,
            Self::Superseded(_) => RecordField::Superseded,
            Self::Expires(_) => RecordField::Expires,
            Self::Blocked(_) => RecordField::Blocked,
        }
    }

    const fn value(self) -> FieldValue<'static> {
        match self {
            Self::Revoked(time) | Self::Superseded(time) | Self::Expires(time) => FieldValue::Time(time),
            Self::Blocked(blocked) => FieldValue::Flag(blocked),
        }
    }

    fn put(self, record: &mut TokenRecord) {
        match self {
            Self::Revoked(time) => record.revoked = Some(time),
            Self::Superseded(time) => record.superseded = Some(time),
            Self::Expires(time) => record.expires = Some(time),
            Self::Blocked(blocked) => record.blocked = blocked,
        }
    }
}

fn to_toml(value: FieldValue<'_>) -> Value {
    match value {
        FieldValue::Text(text) => text.into(),
        FieldValue::Words(words) => Value::Array(words.iter().collect()),
        FieldValue::Time(seconds) => rfc3339(seconds).into(),
        FieldValue::Flag(flag) => flag.into(),
        FieldValue::Digest(digest) => digest.to_hex().into(),
    }
}

fn to_json(value: FieldValue<'_>) -> serde_json::Value {
    value.json(|seconds| rfc3339(seconds).into())
}

/// An entry: the digest, and all that the record says.
fn entry(record: &TokenRecord) -> impl Iterator<Item = (&'static str, FieldValue<'_>)> {
    let digest = std::iter::once(("sha256", FieldValue::Digest(&record.digest)));
    digest.chain(said(record).map(|(field, value)| (field.name(), value)))
}

impl Edit {
    const fn digest(&self) -> &Digest {
        match self {
            Self::Add(record) => &record.digest,
            Self::Set(digest, _) | Self::Remove(digest) => digest,
        }
    }

    fn put(&self, table: &mut Table) {
        match self {
            Self::Add(record) => {
                table.insert(record.digest, record.clone());
            }
            Self::Set(digest, fields) => {
                if let Some(record) = table.get_mut(digest) {
                    fields.iter().for_each(|field| field.put(record));
                }
            }
            Self::Remove(digest) => {
                table.remove(digest);
            }
        }
    }
}

/// The file to write to, and the lock against other commands.
struct Held {
    /// With links resolved.
    target: PathBuf,
    folder: File,
    _lock: Option<Flock<File>>,
}

impl FileAdmin {
    pub fn new(path: &Path) -> Self {
        Self { path: path.into(), format: Format::of(path) }
    }

    fn failed(&self, why: impl std::fmt::Display) -> AdminError {
        AdminError::Store(format!("{}: {why}", self.path.display()))
    }

    /// The contents of the file; empty if it does not exist.
    fn read(&self, path: &Path) -> Result<String, AdminError> {
        match std::fs::read_to_string(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
            read => read.map_err(|error| self.failed(error)),
        }
    }

    fn parse(&self, text: &str) -> Result<Table, AdminError> {
        parse(self.begun(text), self.format).map_err(|why| self.failed(why))
    }

    /// The text to edit; a minimal one if the file is empty.
    fn begun<'a>(&self, text: &'a str) -> &'a str {
        match self.format {
            _ if !text.trim().is_empty() => text,
            Format::Toml => "# Tokens that tollgate knows, by their SHA-256.\n",
            Format::Json => "{}",
        }
    }

    fn table(&self) -> Result<Table, AdminError> {
        self.parse(&self.read(&self.path)?)
    }

    fn records(&self) -> Result<Vec<TokenRecord>, AdminError> {
        let mut records: Vec<_> = self.table()?.into_values().collect();
        records.sort_by(|a, b| b.created.cmp(&a.created).then_with(|| a.digest.as_bytes().cmp(b.digest.as_bytes())));
        Ok(records)
    }

    /// A link is preserved: its target is written.
    fn target(&self) -> Result<PathBuf, AdminError> {
        match std::fs::canonicalize(&self.path) {
            Ok(target) => Ok(target),
            Err(error) if error.kind() == ErrorKind::NotFound => match std::fs::symlink_metadata(&self.path) {
                Ok(_) => Err(self.failed("is a link to a file that is not there")),
                Err(_) => Ok(self.path.clone()),
            },
            Err(error) => Err(self.failed(error)),
        }
    }

    /// Waits until no other command writes in the file's folder. The file itself cannot be locked, because each change
    /// replaces it.
    async fn hold(&self) -> Result<Held, AdminError> {
        let target = self.target()?;
        let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = File::open(parent).map_err(|error| self.failed(format!("{}: {error}", parent.display())))?;
        let mut ours = folder.try_clone().map_err(|error| self.failed(error))?;
        let deadline = Instant::now() + LOCK_PATIENCE;
        let lock = loop {
            match Flock::lock(ours, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => break Some(lock),
                Err((file, Errno::EWOULDBLOCK | Errno::EINTR)) if Instant::now() < deadline => ours = file,
                Err((_, Errno::EWOULDBLOCK)) => {
                    let why = format!("another command has been writing for {LOCK_PATIENCE:?}; nothing was changed");
                    return Err(self.failed(why));
                }
                // Some network file systems cannot lock folders. The check before the file is replaced remains.
                Err(_) => break None,
            }
            tokio::time::sleep(LOCK_POLL).await;
        };
        Ok(Held { target, folder, _lock: lock })
    }

    /// Applies the edits that `plan` returns for the current contents.
    async fn change<T>(&self, plan: impl Fn(&Table) -> Result<(Vec<Edit>, T), AdminError>) -> Result<T, AdminError> {
        let held = self.hold().await?;
        for _ in 0..ATTEMPTS {
            let seen = Stamp::of(&held.target);
            let text = self.read(&held.target)?;
            let before = self.parse(&text)?;
            let (edits, outcome) = plan(&before)?;
            if edits.is_empty() && !text.trim().is_empty() {
                return Ok(outcome);
            }
            let mut after = before;
            edits.iter().for_each(|edit| edit.put(&mut after));
            let new = self.edited(self.begun(&text), &edits)?;
            if parse(&new, self.format).ok().as_ref() != Some(&after) {
                let why =
                    "it is written in a way that this change can't be made in; nothing was changed: edit it by hand";
                return Err(self.failed(why));
            }
            if self.replace(&held, seen, &new)? {
                self.check(&edits, &after)?;
                return Ok(outcome);
            }
        }
        Err(self.failed("somebody else writes to it all the time; nothing was changed"))
    }

    /// Reads the file again, as a gateway will.
    fn check(&self, edits: &[Edit], after: &Table) -> Result<(), AdminError> {
        let now = self.table()?;
        match edits.iter().find(|edit| now.get(edit.digest()) != after.get(edit.digest())) {
            None => Ok(()),
            Some(edit) => Err(self.failed(format!(
                "was written, and does not say now what was written of token {}: does another program write to it?",
                edit.digest().id()
            ))),
        }
    }

    fn edited(&self, text: &str, edits: &[Edit]) -> Result<String, AdminError> {
        let edited = match self.format {
            Format::Toml => edit_toml(text, edits),
            Format::Json => edit_json(text, edits),
        };
        // An empty file may be one that is being written: gateways do not read it.
        edited.map(|text| self.begun(&text).to_owned()).map_err(|why| self.failed(why))
    }

    /// Replaces the file atomically, with the same owner and mode. Returns false if the file has changed since it was
    /// read.
    fn replace(&self, held: &Held, seen: Option<Stamp>, text: &str) -> Result<bool, AdminError> {
        let failed = |error: std::io::Error| self.failed(error);
        let was = match std::fs::metadata(&held.target) {
            Ok(meta) => Some(meta),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error)),
        };
        let name = held.target.file_name().unwrap_or_default().to_string_lossy();
        let folder = held.target.parent().unwrap_or(Path::new(""));
        // Removed again on every way out but the last.
        let mut temporary =
            tempfile::Builder::new().prefix(&format!(".{name}.")).suffix(".new").tempfile_in(folder).map_err(failed)?;
        self.write(temporary.as_file_mut(), was.as_ref(), text)?;
        if Stamp::of(&held.target) != seen {
            return Ok(false);
        }
        temporary.persist(&held.target).map_err(|error| failed(error.error))?;
        // Without this, a power failure may restore the old file.
        held.folder.sync_all().map_err(failed)?;
        Ok(true)
    }

    /// The file is readable for the owner only until its final owner and mode are set.
    fn write(&self, file: &mut File, was: Option<&Metadata>, text: &str) -> Result<(), AdminError> {
        let failed = |error: std::io::Error| self.failed(error);
        if let Some(was) = was {
            let own = file.metadata().map_err(failed)?;
            if (own.uid(), own.gid()) != (was.uid(), was.gid()) {
                std::os::unix::fs::fchown(&*file, Some(was.uid()), Some(was.gid())).map_err(|error| {
                    self.failed(format!(
                        "belongs to user {} and group {}, and would not any more ({error}); nothing was changed: run the \
                         command as that user",
                        was.uid(),
                        was.gid()
                    ))
                })?;
            }
            file.set_permissions(Permissions::from_mode(was.mode() & 0o7777)).map_err(failed)?;
        }
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)
    }
}

/// Splits edits into changes, by token, additions, and removals.
fn sorted(edits: &[Edit]) -> (HashMap<Digest, &[Set]>, Vec<&TokenRecord>, HashSet<Digest>) {
    let (mut set, mut add, mut gone) = (HashMap::new(), Vec::new(), HashSet::new());
    for edit in edits {
        match edit {
            Edit::Add(record) => add.push(record),
            Edit::Set(digest, fields) => {
                set.insert(*digest, fields.as_slice());
            }
            Edit::Remove(digest) => {
                gone.insert(*digest);
            }
        }
    }
    (set, add, gone)
}

fn edit_toml(text: &str, edits: &[Edit]) -> Result<String, NotEditable> {
    // The library uses its own line ends.
    let lines = text.matches('\n').count();
    let has_crlf = lines > 0 && text.matches("\r\n").count() == lines;
    let text = if has_crlf { text.replace("\r\n", "\n") } else { text.to_owned() };
    // The parser's own message may quote the text.
    let mut file: DocumentMut = text.parse().map_err(|_| NotEditable::Toml)?;
    let (set, add, gone) = sorted(edits);
    let digest = |entry: &dyn TableLike| entry.get("sha256").and_then(Item::as_str).and_then(Digest::from_hex);
    let fields = |entry: &dyn TableLike| set.get(&digest(entry)?).copied();
    let stays = |entry: &dyn TableLike| digest(entry).is_none_or(|digest| !gone.contains(&digest));
    // Text after the last table belongs before the added one.
    let trailing = file.trailing().as_str().unwrap_or_default().to_owned();
    let tokens = file.entry("token").or_insert_with(|| Item::ArrayOfTables(ArrayOfTables::new()));
    match tokens {
        Item::ArrayOfTables(tables) => {
            tables.retain(|table| stays(table));
            for table in tables.iter_mut() {
                if let Some(fields) = fields(table) {
                    fields.iter().for_each(|field| set_in(table, *field));
                }
            }
            let mut before = trailing;
            let is_added = !add.is_empty();
            for record in add {
                let mut table = inline(record).into_table();
                table.decor_mut().set_prefix(std::mem::take(&mut before) + "\n");
                tables.push(table);
            }
            if is_added {
                file.set_trailing("");
            }
        }
        Item::Value(Value::Array(array)) => {
            array.retain(|value| value.as_inline_table().is_none_or(|table| stays(table)));
            for value in array.iter_mut() {
                if let Some(table) = value.as_inline_table_mut()
                    && let Some(fields) = fields(table)
                {
                    fields.iter().for_each(|field| set_inline(table, *field));
                }
            }
            for record in add {
                push(array, inline(record));
            }
        }
        _ => return Err(NotEditable::List),
    }
    let text = file.to_string();
    Ok(if has_crlf { text.replace('\n', "\r\n") } else { text })
}

fn inline(record: &TokenRecord) -> InlineTable {
    let mut table = InlineTable::new();
    for (key, value) in entry(record) {
        let mut value = to_toml(value);
        // On one line, whatever the text contains: the file's line ends are not part of it.
        if let Some(text) = value.as_str().filter(|text| text.contains(['\n', '\r']))
            && let Ok(escaped) = serde_json::Value::from(text).to_string().replace('\u{7f}', "\\u007f").parse()
        {
            value = escaped;
        }
        table.insert(key, value);
    }
    table.fmt();
    table
}

/// Sets a key's value. White space and comments around the old value are preserved.
fn set_in(table: &mut dyn TableLike, set: Set) {
    let (key, mut new) = (set.field().name(), to_toml(set.value()));
    match table.get_mut(key).and_then(Item::as_value_mut) {
        Some(old) => {
            *new.decor_mut() = old.decor().clone();
            *old = new;
        }
        None => {
            table.insert(key, Item::Value(new));
        }
    }
}

fn set_inline(table: &mut InlineTable, set: Set) {
    let key = set.field().name();
    if table.contains_key(key) {
        return set_in(table, set);
    }
    // A comment after the last value is moved to the new one.
    let last = table.iter_mut().last().map(|(_, value)| value);
    let behind = last.and_then(|value| {
        let behind = value.decor().suffix().and_then(|text| text.as_str()).map(str::to_owned);
        value.decor_mut().set_suffix("");
        behind
    });
    let mut new = to_toml(set.value());
    new.decor_mut().set_prefix(" ");
    new.decor_mut().set_suffix(behind.unwrap_or_default());
    table.insert(key, new);
}

/// Adds an entry in the style of the existing ones: below them, or after them on one line.
fn push(array: &mut Array, table: InlineTable) {
    let mut value = Value::InlineTable(table);
    let of_last = array.iter().last().and_then(|last| last.decor().prefix()).and_then(|prefix| prefix.as_str());
    let indent = match of_last {
        Some(prefix) if !prefix.contains('\n') && array.trailing().as_str().is_none_or(|end| !end.contains('\n')) => {
            None
        }
        Some(prefix) => {
            prefix.rsplit('\n').next().map(|indent| indent.chars().take_while(|c| c.is_whitespace()).collect())
        }
        None => Some("  ".to_owned()),
    };
    // Comments after the last entry stay there.
    let (has_comma, trailing) = (array.trailing_comma(), array.trailing().as_str().unwrap_or_default().to_owned());
    let mut before = String::new();
    if !has_comma && let Some(last) = array.iter_mut().last() {
        before = last.decor().suffix().and_then(|suffix| suffix.as_str()).unwrap_or_default().to_owned();
        last.decor_mut().set_suffix("");
    }
    before += &trailing;
    let before = before.trim_end();
    match indent {
        Some(indent) => {
            value.decor_mut().set_prefix(format!("{before}\n{indent}"));
            value.decor_mut().set_suffix("");
            array.set_trailing_comma(true);
            array.set_trailing("\n");
        }
        None => {
            let first = array.is_empty();
            value.decor_mut().set_prefix(if first { "" } else { " " });
            value.decor_mut().set_suffix(trailing);
            array.set_trailing_comma(false);
            array.set_trailing("");
        }
    }
    array.push_formatted(value);
}

fn edit_json(text: &str, edits: &[Edit]) -> Result<String, NotEditable> {
    let malformed = |error: serde_json::Error| NotEditable::Json { line: error.line() };
    let mut file: serde_json::Value = serde_json::from_str(text).map_err(malformed)?;
    let (set, add, gone) = sorted(edits);
    let file_fields = file.as_object_mut().ok_or(NotEditable::Object)?;
    let entries = file_fields.entry("token").or_insert_with(|| serde_json::Value::Array(Vec::new()));
    let entries = entries.as_array_mut().ok_or(NotEditable::List)?;
    let digest =
        |entry: &serde_json::Value| entry.get("sha256").and_then(serde_json::Value::as_str).and_then(Digest::from_hex);
    entries.retain(|entry| digest(entry).is_none_or(|digest| !gone.contains(&digest)));
    for entry in entries.iter_mut() {
        for set in digest(entry).and_then(|digest| set.get(&digest).copied()).into_iter().flatten() {
            entry[set.field().name()] = to_json(set.value());
        }
    }
    entries.extend(add.into_iter().map(|record| {
        let fields = entry(record).map(|(key, value)| (key.to_owned(), to_json(value)));
        serde_json::Value::Object(fields.collect())
    }));
    write_json(&file, &indent_of(text)).map_err(malformed)
}

/// Why a file cannot be edited. Never quotes it.
#[derive(Debug, thiserror::Error)]
enum NotEditable {
    #[error("is no TOML that can be edited")]
    Toml,
    #[error("line {line}: is no JSON that can be edited")]
    Json { line: usize },
    #[error("is no JSON object")]
    Object,
    #[error("`token` is no list")]
    List,
}

/// The indentation of the first key after the first line; two blanks if there is none.
fn indent_of(text: &str) -> String {
    let line = text.lines().skip(1).find(|line| !line.trim().is_empty());
    let indent: String = line.unwrap_or_default().chars().take_while(|c| matches!(c, ' ' | '\t')).collect();
    if indent.is_empty() { "  ".into() } else { indent }
}

fn write_json(file: &serde_json::Value, indent: &str) -> Result<String, serde_json::Error> {
    use serde::Serialize as _;
    let mut bytes = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
    file.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter))?;
    bytes.push(b'\n');
    String::from_utf8(bytes).map_err(serde::ser::Error::custom)
}

#[async_trait]
impl TokenAdmin for FileAdmin {
    async fn create(&mut self, record: &TokenRecord) -> Result<(), AdminError> {
        self.change(|table| {
            if table.contains_key(&record.digest) {
                return Err(AdminError::Exists);
            }
            Ok((vec![Edit::Add(record.clone())], ()))
        })
        .await
    }

    async fn import(&mut self, records: Records<'_>) -> Result<Imported, AdminError> {
        // Everything is read before the lock is taken, because a pipe may be slow.
        let records = records.collect::<Result<Vec<_>, _>>()?;
        self.change(|table| {
            let mut new: HashMap<Digest, &TokenRecord> = HashMap::new();
            let mut differing = Differing::default();
            let mut edits = Vec::new();
            for record in &records {
                match table.get(&record.digest).or_else(|| new.get(&record.digest).copied()) {
                    Some(known) => differing.compare(known, record),
                    None => {
                        new.insert(record.digest, record);
                        edits.push(Edit::Add(record.clone()));
                    }
                }
            }
            Ok((edits, Imported { new: new.len() as u64, differing }))
        })
        .await
    }

    async fn list(&mut self) -> Result<Vec<TokenRecord>, AdminError> {
        self.records()
    }

    async fn find(&mut self, hex_prefix: &str) -> Result<Vec<TokenRecord>, AdminError> {
        let records = self.records()?.into_iter();
        Ok(records.filter(|record| record.digest.to_hex().starts_with(hex_prefix)).take(100).collect())
    }

    async fn revoke(&mut self, digest: &Digest, at: u64) -> Result<bool, AdminError> {
        self.change(|table| match table.get(digest).ok_or(AdminError::Missing)?.revoked {
            Some(_) => Ok((Vec::new(), false)),
            None => Ok((vec![Edit::Set(*digest, vec![Set::Revoked(at)])], true)),
        })
        .await
    }

    async fn revoke_user(&mut self, user: &str, at: u64) -> Result<u64, AdminError> {
        self.change(|table| {
            let open = table.values().filter(|record| record.user == user && record.revoked.is_none());
            let edits: Vec<_> = open.map(|record| Edit::Set(record.digest, vec![Set::Revoked(at)])).collect();
            let count = edits.len() as u64;
            Ok((edits, count))
        })
        .await
    }

    async fn remove(&mut self, digests: &[Digest], still: &TokenQuery) -> Result<u64, AdminError> {
        self.change(|table| {
            let edits: Vec<_> = digests
                .iter()
                .filter(|digest| table.get(digest).is_some_and(|record| still.takes(record)))
                .map(|digest| Edit::Remove(*digest))
                .collect();
            let count = edits.len() as u64;
            Ok((edits, count))
        })
        .await
    }

    async fn rotate(&mut self, old: &Digest, next: &TokenRecord, at: u64, end: u64) -> Result<(), AdminError> {
        self.change(|table| {
            let end = table.get(old).ok_or(AdminError::Missing)?.rotated_out(at, end)?;
            if table.contains_key(&next.digest) {
                return Err(AdminError::Exists);
            }
            let next = TokenRecord { replaces: Some(*old), ..next.clone() };
            let old = Edit::Set(*old, vec![Set::Superseded(at), Set::Expires(end)]);
            Ok((vec![old, Edit::Add(next)], ()))
        })
        .await
    }

    async fn block(&mut self, user: &str, blocked: bool) -> Result<u64, AdminError> {
        self.change(|table| {
            let differs = |record: &&TokenRecord| record.user == user && record.blocked != blocked;
            let digests: HashSet<_> = table.values().filter(differs).map(|record| record.digest).collect();
            let count = digests.len() as u64;
            let edit = |digest| Edit::Set(digest, vec![Set::Blocked(blocked)]);
            Ok((digests.into_iter().map(edit).collect(), count))
        })
        .await
    }

    async fn wait(&mut self, _timeout: Duration) -> Result<Vec<String>, AdminError> {
        Err(AdminError::NoRegister("a file"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(token: &str) -> String {
        Digest::of(token.as_bytes()).to_hex()
    }

    fn edited(format: Format, text: &str, edits: &[Edit]) -> String {
        let mut after = parse(text, format).unwrap();
        edits.iter().for_each(|edit| edit.put(&mut after));
        let new = match format {
            Format::Toml => edit_toml(text, edits),
            Format::Json => edit_json(text, edits),
        };
        let new = new.unwrap();
        assert_eq!(parse(&new, format).ok().as_ref(), Some(&after), "{text}\n=>\n{new}");
        new
    }

    fn edits() -> Vec<Edit> {
        let fields = vec![Set::Revoked(1_700_000_000), Set::Blocked(true)];
        let added = TokenRecord { created: 5, ..TokenRecord::new(Digest::of(b"new"), "n \"q\" \\ é") };
        let other = TokenRecord {
            scopes: vec!["a".into()],
            description: "x\ny\r\n\u{7f}\"".into(),
            ..TokenRecord::new(Digest::of(b"other"), "o")
        };
        vec![Edit::Set(Digest::of(b"a"), fields), Edit::Add(added), Edit::Add(other)]
    }

    #[test]
    fn every_way_to_write_toml_is_edited_and_kept() {
        let (a, b) = (hex("a"), hex("b"));
        let upper = a.to_uppercase();
        for text in [
            format!(
                "# mine\n[[token]] # head\nsha256 = \"{a}\" # digest\nuser = \"alice\"\n\n# bob's\n[[token]]\nsha256 = \"{b}\"\nuser = \"bob\"\n# the end\n"
            ),
            format!("[[token]]\nuser = \"alice\"\nrevoked = false # kept\nblocked = false\n  sha256 = '{upper}'\n"),
            format!("[[ \"token\" ]]\n\"sha256\" = \"{a}\"\n'user' = \"\"\"alice\"\"\"\n\"revoked\" = false # kept\n"),
            format!("[['token']]\n\"\\u0073ha256\" = \"{a}\"\nuser=\"alice\""),
            format!("token = [{{ sha256 = \"{a}\", user = \"alice\" }}] # kept\n"),
            format!("token=[{{sha256=\"{a}\",user=\"alice\",revoked=false}},{{user='bob',sha256='{b}'}}]"),
            format!(
                "\"token\" = [ # kept\n  {{ sha256 = \"{a}\", user = \"alice\" }}, # first\n  {{ user = \"bob\", sha256 = \"{b}\" }}, # last\n  # the end\n]\n"
            ),
            format!(
                "token = [\n\t{{ sha256 = \"{a}\", user = \"alice\" }},\n\t{{ user = \"bob\", sha256 = \"{b}\" }} # kept\n]\n"
            ),
            format!("token = [ {{ sha256 = \"{a}\", user = \"alice\", }}, ] # kept, TOML 1.1\n"),
            format!("token = [\n  {{\n    sha256 = \"{a}\", # kept, TOML 1.1\n    user = \"alice\" # last\n  }}\n]\n"),
            format!(
                "token = [\n  {{\n    sha256 = \"{a}\", # kept, TOML 1.1\n    user = \"alice\", # last\n  }},\n]\n"
            ),
            format!("# dos\r\n[[token]]\r\nsha256 = \"{a}\" # kept\r\nuser = \"alice\"\r\n"),
            format!("token = [{{ sha256 = \"\"\"{a}\"\"\", user = \"\\u0061lice\" }}]"),
        ] {
            let new = edited(Format::Toml, &text, &edits());
            for comment in text.lines().filter_map(|line| line.split_once('#').map(|(_, comment)| comment.trim())) {
                assert!(new.contains(comment), "{comment} is gone from\n{new}");
            }
            assert_eq!(new.contains('\r'), text.contains('\r'), "{new:?}");
            assert_eq!(new.matches('\r').count(), if text.contains('\r') { new.matches('\n').count() } else { 0 });
            // Again, and each by itself.
            let blocked = edited(
                Format::Toml,
                &new,
                &[Edit::Set(Digest::of(b"other"), vec![Set::Blocked(true), Set::Expires(7)])],
            );
            assert!(blocked.matches("blocked = true").count() == 2, "{blocked}");
        }
        for text in [
            "",
            "# nobody\n",
            "token = []",
            "token = [] # nobody\n",
            "token = [\n  # nobody\n]\n",
            "\"token\"=[ ]\n# the end",
        ] {
            let new = edited(Format::Toml, text, &edits()[1..]);
            assert_eq!(text.contains('#'), new.contains('#'), "{new}");
        }
    }

    #[test]
    fn comments_stay_beside_what_they_speak_of() {
        let a = hex("a");
        let text = format!("[[token]]\nsha256 = \"{a}\"\nuser = \"alice\"\n# Bob left in May.\n");
        let new = edited(Format::Toml, &text, &edits()[1..2]);
        assert!(new.starts_with(&format!("{text}\n[[token]]\n")), "{new}");
        let text = format!("token = [\n  {{ sha256 = \"{a}\", user = \"alice\" }} # Alice\n]\n");
        let new = edited(Format::Toml, &text, &edits()[1..2]);
        assert!(new.contains("user = \"alice\" }, # Alice\n  { sha256"), "{new}");
        let text = format!("token = [{{ sha256 = \"{a}\", user = \"alice\" }}]");
        let new = edited(Format::Toml, &text, &edits()[..1]);
        assert_eq!(
            new.trim_end(),
            format!(
                "token = [{{ sha256 = \"{a}\", user = \"alice\", revoked = \"2023-11-14T22:13:20Z\", blocked = true }}]"
            )
        );
    }

    #[test]
    fn every_way_to_write_json_is_edited_and_kept() {
        let a = hex("a");
        for text in [
            format!("{{\"token\":[{{\"user\":\"alice\",\"sha256\":\"{a}\",\"description\":\"d\"}}]}}"),
            format!(
                "{{\n\t\"token\": [\n\t\t{{\"user\": \"alice\", \"sha256\": \"{}\", \"revoked\": false}}\n\t]\n}}\n",
                a.to_uppercase()
            ),
            format!("{{\"\\u0074oken\":[{{\"user\":\"alice\",\"\\u0073ha256\":\"{a}\"}}]}}"),
        ] {
            let new = edited(Format::Json, &text, &edits());
            assert!(new.find("\"user\"") < new.find("\"sha256\""), "the order changed: {new}");
            assert_eq!(new.contains("\n\t\"token\""), text.contains('\t'), "{new}");
        }
        for text in ["{}", "{\"token\":[]}"] {
            edited(Format::Json, text, &edits()[1..]);
        }
    }
}
