//! `tollgate token`: what people do with tokens in a store of tollgate's own. A token is printed once, when it is made.

use super::Failure;
use crate::config::{Settings, StoreKind};
use crate::identity::credential::Digest;
use crate::identity::store::file::FileAdmin;
use crate::identity::store::sqlite::SqliteAdmin;
use crate::identity::store::{AdminError, ShownRecord, TokenAdmin, TokenRecord, parse_time, rfc3339};
use anyhow::{Context as _, anyhow, bail};
use clap::Subcommand;
use serde::Deserialize;
use std::io::{BufRead, IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

#[derive(clap::Args)]
pub(super) struct Common {
    /// The configuration whose [store] is meant.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
pub(super) enum Command {
    /// Make a token and print it, once.
    Create {
        #[command(flatten)]
        common: Common,
        /// Who the token belongs to.
        #[arg(long)]
        user: String,
        /// Once for each scope.
        #[arg(long = "scope", value_name = "SCOPE")]
        scopes: Vec<String>,
        #[arg(long, default_value = "")]
        description: String,
        /// When it ends: a time like 2026-12-31T23:59:59Z, or from now on like 90days.
        #[arg(long, value_name = "TIME")]
        expires: Option<String>,
    },
    /// All tokens, newest first.
    List {
        #[command(flatten)]
        common: Common,
    },
    /// One token: by its id (or more of its SHA-256), or by the token itself on standard input.
    Show {
        #[command(flatten)]
        common: Common,
        /// The id from the access log or the list; `-` reads the token from standard input.
        id: String,
    },
    /// End a token. A running gateway knows within a second.
    Revoke {
        #[command(flatten)]
        common: Common,
        /// The id from the access log or the list; `-` reads the token from standard input.
        id: String,
    },
    /// Add tokens from JSON lines with `user`, `token` or `sha256`, and if wanted `scopes`, `description`, `expires`.
    Import {
        #[command(flatten)]
        common: Common,
        /// The file; `-` reads standard input.
        file: PathBuf,
    },
}

pub(super) fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Create { common, user, scopes, description, expires } => {
            create(&common, user, scopes, description, expires.as_deref())
        }
        Command::List { common } => list(&common),
        Command::Show { common, id } => show(&common, &id),
        Command::Revoke { common, id } => revoke(&common, &id),
        Command::Import { common, file } => import(&common, &file),
    }
}

fn open(common: &Common) -> Result<Box<dyn TokenAdmin>, Failure> {
    let settings = super::load(&common.config)?;
    Ok(admin(&settings)?)
}

/// The writing side of the configured store.
pub(super) fn admin(settings: &Settings) -> Result<Box<dyn TokenAdmin>, AdminError> {
    Ok(match settings.store.kind {
        StoreKind::Sqlite => Box::new(SqliteAdmin::open(&settings.store.path)?),
        StoreKind::File => Box::new(FileAdmin::new(&settings.store.path)),
    })
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// `tg-`, 32 letters and digits that hold 160 random bits, and 6 that check them: a scanner can tell it from noise.
pub(super) fn new_token() -> anyhow::Result<String> {
    let mut random = [0; 20];
    getrandom::fill(&mut random).map_err(|error| anyhow!("the system has no random numbers: {error}"))?;
    let body = base32(&random);
    let check = base32(&Digest::of(body.as_bytes()).as_bytes()[..5]);
    Ok(format!("tg-{body}{}", &check[..6]))
}

/// RFC 4648's letters in lower case, without padding.
fn base32(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let mut out = String::new();
    let (mut bits, mut count) = (0_u32, 0);
    for byte in bytes {
        bits = (bits << 8) | u32::from(*byte);
        count += 8;
        while count >= 5 {
            count -= 5;
            out.push(LETTERS[(bits >> count) as usize & 31] as char);
        }
    }
    out
}

fn create(
    common: &Common,
    user: String,
    scopes: Vec<String>,
    description: String,
    expires: Option<&str>,
) -> Result<(), Failure> {
    let expires = expires.map(expiry).transpose().map_err(|error| Failure::Usage(error.to_string()))?;
    if let Some(scope) = scopes.iter().find(|scope| scope.is_empty() || scope.contains(char::is_whitespace)) {
        return Err(Failure::Usage(format!("--scope: \"{scope}\" must be one word")));
    }
    let mut admin = open(common)?;
    let token = new_token()?;
    let digest = Digest::of(token.as_bytes());
    let record =
        TokenRecord { digest, user, scopes, description, created: now(), expires, revoked: None, last_used: None };
    admin.create(&record)?;
    if common.json {
        let mut shown = serde_json::to_value(ShownRecord::from(&record))?;
        shown["token"] = token.into();
        println!("{shown}");
    } else {
        println!("{token}");
        eprintln!("token {} for {}: keep it now, it is not shown again", digest.id(), record.user);
    }
    Ok(())
}

/// A point in time, or a span from now.
fn expiry(text: &str) -> anyhow::Result<u64> {
    let span = || humantime::parse_duration(text).ok().map(|span| now() + span.as_secs());
    match parse_time(text).or_else(span) {
        Some(at) if at > now() => Ok(at),
        Some(_) => bail!("--expires {text} is over already"),
        None => bail!("--expires {text}: write a time like 2026-12-31T23:59:59Z, or a span like 90days"),
    }
}

fn list(common: &Common) -> Result<(), Failure> {
    let records = open(common)?.list()?;
    if common.json {
        let shown: Vec<_> = records.iter().map(ShownRecord::from).collect();
        println!("{}", serde_json::to_string(&shown)?);
        return Ok(());
    }
    println!("{:<12}  {:<20}  {:<20}  {:<20}  {:<8}  DESCRIPTION", "ID", "USER", "CREATED", "LAST USED", "STATE");
    for record in &records {
        let last_used = record.last_used.map_or_else(|| "never".into(), rfc3339);
        println!(
            "{:<12}  {:<20}  {:<20}  {last_used:<20}  {:<8}  {}",
            record.digest.id().to_string(),
            plain(&record.user),
            rfc3339(record.created),
            state(record),
            plain(&record.description)
        );
    }
    Ok(())
}

/// Text from a store on a terminal: control characters could rewrite what was printed before.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

fn state(record: &TokenRecord) -> &'static str {
    match record {
        TokenRecord { revoked: Some(_), .. } => "revoked",
        TokenRecord { expires: Some(end), .. } if *end <= now() => "expired",
        _ => "active",
    }
}

/// The one token that an id, or standard input, stands for.
fn find(admin: &dyn TokenAdmin, id: &str) -> anyhow::Result<TokenRecord> {
    let prefix = if id == "-" {
        let mut token = String::new();
        std::io::stdin().lock().read_line(&mut token).context("standard input")?;
        Digest::of(token.trim_end_matches(['\r', '\n']).as_bytes()).to_hex()
    } else {
        let hex = id.to_ascii_lowercase();
        if hex.len() < 6 || hex.len() > 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            bail!(
                "an id is 6 to 64 hex digits of the token's SHA-256; to say the token itself, write - and give it on standard input"
            );
        }
        hex
    };
    let mut found = admin.find(&prefix)?;
    match (found.pop(), found.len()) {
        (Some(record), 0) => Ok(record),
        (None, _) => bail!("no such token"),
        (Some(_), more) => bail!("{} tokens begin with {prefix}: give more digits", more + 1),
    }
}

fn show(common: &Common, id: &str) -> Result<(), Failure> {
    let record = find(open(common)?.as_ref(), id)?;
    print_record(common, &record)
}

fn print_record(common: &Common, record: &TokenRecord) -> Result<(), Failure> {
    let shown = ShownRecord::from(record);
    if common.json {
        println!("{}", serde_json::to_string(&shown)?);
        return Ok(());
    }
    let or = |value: Option<String>, none: &str| value.unwrap_or_else(|| none.into());
    println!("id           {}", shown.id);
    println!("state        {}", state(record));
    println!("user         {}", plain(&shown.user));
    println!("scopes       {}", plain(&shown.scopes.join(" ")));
    println!("description  {}", plain(&shown.description));
    println!("created      {}", shown.created);
    println!("expires      {}", or(shown.expires, "never"));
    println!("revoked      {}", or(shown.revoked, "no"));
    println!("last used    {}", or(shown.last_used, "never"));
    println!("sha256       {}", shown.sha256);
    Ok(())
}

fn revoke(common: &Common, id: &str) -> Result<(), Failure> {
    let mut admin = open(common)?;
    let record = find(admin.as_ref(), id)?;
    let revoked = admin.revoke(&record.digest, now())?;
    let record = find(admin.as_ref(), &record.digest.to_hex())?;
    if common.json {
        return print_record(common, &record);
    }
    let how = if revoked { "is revoked" } else { "was revoked before" };
    println!("token {} of {} {how}", record.digest.id(), plain(&record.user));
    Ok(())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ImportedLine {
    token: Option<String>,
    sha256: Option<String>,
    user: String,
    #[serde(default)]
    scopes: Vec<String>,
    #[serde(default)]
    description: String,
    expires: Option<String>,
}

fn import(common: &Common, file: &std::path::Path) -> Result<(), Failure> {
    let mut admin = open(common)?;
    let input: Box<dyn BufRead> = if file == std::path::Path::new("-") {
        Box::new(std::io::stdin().lock())
    } else {
        Box::new(std::io::BufReader::new(std::fs::File::open(file).with_context(|| file.display().to_string())?))
    };
    let started = Instant::now();
    let mut progress = Progress::new();
    let mut read = 0;
    let mut records =
        input.lines().enumerate().filter(|(_, line)| !matches!(line, Ok(line) if line.trim().is_empty())).map(
            |(index, line)| {
                read += 1;
                progress.tick(read);
                let number = index as u64 + 1;
                imported(line).map_err(|why| AdminError::Line(number, why))
            },
        );
    // All or nothing: a broken line leaves the store as it was.
    let new = admin.import(&mut records)?;
    drop(records);
    progress.end();
    let seconds = started.elapsed().as_secs_f64();
    if common.json {
        println!("{}", serde_json::json!({ "read": read, "imported": new, "known": read - new, "seconds": seconds }));
    } else {
        println!("{new} tokens imported, {} known before, in {seconds:.1} s", read - new);
    }
    Ok(())
}

/// One line. Its text is never quoted back: it may hold a token.
fn imported(line: std::io::Result<String>) -> Result<TokenRecord, String> {
    let line = line.map_err(|error| error.to_string())?;
    let line: ImportedLine = serde_json::from_str(&line).map_err(|error| {
        format!("is not the JSON that is expected (column {}): give user, and token or sha256", error.column())
    })?;
    let digest = match (&line.token, &line.sha256) {
        (Some(token), None) if (1..=255).contains(&token.len()) && token.bytes().all(|b| b.is_ascii_graphic()) => {
            Digest::of(token.as_bytes())
        }
        (Some(_), None) => return Err("token must be 1 to 255 visible ASCII characters".into()),
        (None, Some(hex)) => Digest::from_hex(hex).ok_or("sha256 must be 64 hex digits")?,
        _ => return Err("give token or sha256, and not both".into()),
    };
    let expires = match &line.expires {
        Some(text) => Some(parse_time(text).ok_or("expires must be a time like 2026-12-31T23:59:59Z")?),
        None => None,
    };
    Ok(TokenRecord {
        digest,
        user: line.user,
        scopes: line.scopes,
        description: line.description,
        created: now(),
        expires,
        revoked: None,
        last_used: None,
    })
}

/// A line on a terminal that says how far it got.
struct Progress {
    shown: Option<Instant>,
}

impl Progress {
    fn new() -> Self {
        Self { shown: std::io::stderr().is_terminal().then(Instant::now) }
    }

    fn tick(&mut self, count: u64) {
        if let Some(shown) = &mut self.shown
            && shown.elapsed() > Duration::from_millis(200)
        {
            *shown = Instant::now();
            drop(write!(std::io::stderr(), "\r{count} lines"));
        }
    }

    fn end(&self) {
        if self.shown.is_some() {
            drop(write!(std::io::stderr(), "\r\x1b[K"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_recognisable_and_differ() {
        let tokens: std::collections::HashSet<_> = (0..1000).map(|_| new_token().unwrap()).collect();
        assert_eq!(tokens.len(), 1000);
        assert!(tokens.iter().all(|token| token.starts_with("tg-") && token.len() == 41 && token.is_ascii()));
    }

    #[test]
    fn imported_lines_never_quote_a_token() {
        let digest = Digest::of(b"S3CRET");
        assert_eq!(imported(Ok("{\"user\":\"a\",\"token\":\"S3CRET\"}".into())).unwrap().digest, digest);
        assert_eq!(
            imported(Ok(format!("{{\"user\":\"a\",\"sha256\":\"{}\"}}", digest.to_hex()))).unwrap().digest,
            digest
        );
        for line in [
            "{\"user\":\"a\",\"token\":\"S3CRET x\"}",
            "{\"token\":\"S3CRET\"}",
            "S3CRET",
            "{\"user\":\"a\",\"S3CRET\":1}",
            "{\"user\":\"a\",\"token\":\"S3CRET\",\"sha256\":\"S3CRET\"}",
        ] {
            let why = imported(Ok(line.into())).unwrap_err();
            assert!(!why.contains("S3CRET"), "{why}");
        }
    }
}
