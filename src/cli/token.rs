//! `tollgate token`: what people do with tokens in a store of tollgate's own. A token is printed once, when it is made.

use super::Failure;
use crate::config::Settings;
use crate::identity::credential::Digest;
use crate::identity::store::file::FileAdmin;
use crate::identity::store::postgres::{PostgresAdmin, Source};
use crate::identity::store::redis::RedisAdmin;
use crate::identity::store::sqlite::SqliteAdmin;
use crate::identity::store::{
    AdminError, NamedStore, ShownRecord, StoreSettings, TokenAdmin, TokenRecord, parse_time, rfc3339,
};
use anyhow::{Context as _, anyhow, bail};
use clap::Subcommand;
use serde::Deserialize;
use std::io::{BufRead, IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

#[derive(clap::Args)]
pub(super) struct Common {
    /// The configuration whose store is meant.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// The name of the [[store]]; without it, the first one that tollgate can write to.
    #[arg(long, value_name = "NAME")]
    store: Option<String>,
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
        /// When it begins: a time like 2026-12-31T08:00:00Z, or from now on like 2h. At once without it.
        #[arg(long, value_name = "TIME")]
        not_before: Option<String>,
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
    /// Put a new token in the place of another, for the same user and scopes. Both work for a while, then the old one ends.
    Rotate {
        #[command(flatten)]
        common: Common,
        /// The id from the access log or the list; `-` reads the token from standard input.
        id: String,
        /// How long the old one goes on working.
        #[arg(long, default_value = "24h", value_name = "SPAN")]
        overlap: String,
        /// When the new one ends; without it, as far from now as the old one was from its making.
        #[arg(long, value_name = "TIME")]
        expires: Option<String>,
    },
    /// End a token. A running gateway knows within a second.
    Revoke {
        #[command(flatten)]
        common: Common,
        /// The id from the access log or the list; `-` reads the token from standard input.
        id: String,
        /// Come back only when every running gateway on this store has confirmed it.
        #[arg(long)]
        wait: bool,
        /// How long to wait for them. Afterwards the exit code is 1, and those that did not confirm are named.
        #[arg(long, default_value = "30s", value_name = "SPAN")]
        timeout: String,
    },
    /// Refuse all tokens of a user, until `unblock`.
    Block {
        #[command(flatten)]
        common: Common,
        user: String,
    },
    /// Take a user's tokens again.
    Unblock {
        #[command(flatten)]
        common: Common,
        user: String,
    },
    /// Add tokens from JSON lines with `user`, `token` or `sha256`, and if wanted `scopes`, `description`, `expires`.
    Import {
        #[command(flatten)]
        common: Common,
        /// The file; `-` reads standard input.
        file: PathBuf,
    },
}

pub(super) async fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Create { common, user, scopes, description, not_before, expires } => {
            let not_before = moment("--not-before", not_before.as_deref())?;
            let expires = moment("--expires", expires.as_deref())?;
            create(&common, user, scopes, description, not_before, expires).await
        }
        Command::List { common } => list(&common).await,
        Command::Show { common, id } => show(&common, &id).await,
        Command::Rotate { common, id, overlap, expires } => {
            let expires = moment("--expires", expires.as_deref())?;
            rotate(&common, &id, span("--overlap", &overlap)?, expires).await
        }
        Command::Revoke { common, id, wait, timeout } => {
            let wait = wait.then(|| span("--timeout", &timeout)).transpose()?;
            revoke(&common, &id, wait).await
        }
        Command::Block { common, user } => block(&common, &user, true).await,
        Command::Unblock { common, user } => block(&common, &user, false).await,
        Command::Import { common, file } => import(&common, &file).await,
    }
}

async fn open(common: &Common) -> Result<(Settings, Box<dyn TokenAdmin>), Failure> {
    let settings = super::load(&common.config)?;
    let admin = admin(&settings, common.store.as_deref()).await?;
    Ok((settings, admin))
}

/// The writing side of a store: of the one with this name, or of the first that has one.
pub(super) async fn admin(settings: &Settings, name: Option<&str>) -> anyhow::Result<Box<dyn TokenAdmin>> {
    let names = || settings.stores.iter().map(|store| store.name.as_str()).collect::<Vec<_>>().join(", ");
    let store =
        match name {
            Some(name) => settings
                .stores
                .iter()
                .find(|store| store.name == name)
                .ok_or_else(|| anyhow!("there is no store \"{name}\"; there are: {}", names()))?,
            None => settings.stores.iter().find(|store| is_ours(store)).ok_or_else(|| {
                anyhow!("{}: not tollgate's own; make and end tokens where these stores belong", names())
            })?,
        };
    Ok(match &store.kind {
        StoreSettings::Sqlite(path) => Box::new(SqliteAdmin::open(path)?),
        StoreSettings::File(path) => Box::new(FileAdmin::new(path)),
        StoreSettings::Postgres(settings) if is_ours(store) => Box::new(PostgresAdmin::open(settings).await?),
        StoreSettings::Redis(settings) => Box::new(RedisAdmin::open(settings).await?),
        StoreSettings::Postgres(_) | StoreSettings::Introspection(_) => {
            bail!("store {}: not tollgate's own; make and end tokens where they belong", store.name)
        }
    })
}

/// Whether tollgate may write there.
fn is_ours(store: &NamedStore) -> bool {
    match &store.kind {
        StoreSettings::Sqlite(_) | StoreSettings::File(_) | StoreSettings::Redis(_) => true,
        StoreSettings::Postgres(settings) => matches!(settings.source, Source::Own { .. }),
        StoreSettings::Introspection(_) => false,
    }
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

async fn create(
    common: &Common,
    user: String,
    scopes: Vec<String>,
    description: String,
    not_before: Option<u64>,
    expires: Option<u64>,
) -> Result<(), Failure> {
    if let Some(scope) = scopes.iter().find(|scope| scope.is_empty() || scope.contains(char::is_whitespace)) {
        return Err(Failure::Usage(format!("--scope: \"{scope}\" must be one word")));
    }
    if not_before.zip(expires).is_some_and(|(start, end)| start >= end) {
        return Err(Failure::Usage("--not-before comes after --expires".into()));
    }
    let (settings, mut admin) = open(common).await?;
    warn_of_scopes(&settings, &scopes);
    let token = new_token()?;
    let record = TokenRecord {
        scopes,
        description,
        created: now(),
        not_before,
        expires,
        ..TokenRecord::new(Digest::of(token.as_bytes()), user)
    };
    admin.create(&record).await?;
    hand_over(common, &token, &record)
}

/// What a token would be refused for, said while it can still be made in another way.
fn warn_of_scopes(settings: &Settings, scopes: &[String]) {
    let Some(known) = &settings.policy.scopes else { return };
    let unknown = |scope: &&String| !known.rules().iter().any(|rule| rule.scope == **scope);
    if scopes.is_empty() {
        eprintln!("note: [[scope]] is in force, and a token without a scope may do nothing");
    }
    for scope in scopes.iter().filter(unknown) {
        eprintln!("note: no [[scope]] says what \"{}\" allows", plain(scope));
    }
}

/// Prints a new token, the one time: here it does matter that it is read.
fn hand_over(common: &Common, token: &str, record: &TokenRecord) -> Result<(), Failure> {
    let lost = || format!("token {} works, but it could not be printed: revoke it", record.digest.id());
    let mut out = std::io::stdout().lock();
    if common.json {
        let mut shown = serde_json::to_value(ShownRecord::from(record))?;
        shown["token"] = token.into();
        writeln!(out, "{shown}").with_context(lost)?;
    } else {
        writeln!(out, "{token}").with_context(lost)?;
        eprintln!("token {} for {}: keep it now, it is not shown again", record.digest.id(), plain(&record.user));
    }
    Ok(())
}

async fn rotate(common: &Common, id: &str, overlap: Duration, expires: Option<u64>) -> Result<(), Failure> {
    let (_, mut admin) = open(common).await?;
    let old = find(admin.as_mut(), id).await?;
    let (token, at) = (new_token()?, now());
    let lifetime = old.expires.map(|end| end.saturating_sub(old.not_before.unwrap_or(old.created)));
    let next = TokenRecord {
        scopes: old.scopes.clone(),
        description: old.description.clone(),
        created: at,
        expires: expires.or(lifetime.map(|span| at.saturating_add(span))),
        replaces: Some(old.digest),
        blocked: old.blocked,
        ..TokenRecord::new(Digest::of(token.as_bytes()), old.user.clone())
    };
    let end = at.saturating_add(overlap.as_secs());
    admin.rotate(&old.digest, &next, at, end).await?;
    let end = old.rotated_out(at, end)?;
    eprintln!("token {} goes on working until {}", old.digest.id(), rfc3339(end));
    hand_over(common, &token, &next)
}

/// A span like `24h`.
fn span(option: &str, text: &str) -> Result<Duration, Failure> {
    humantime::parse_duration(text)
        .map_err(|_| Failure::Usage(format!("{option} {text}: write a span like 24h or 30s")))
}

/// A point in time to come, or a span from now.
fn moment(option: &str, text: Option<&str>) -> Result<Option<u64>, Failure> {
    let Some(text) = text else { return Ok(None) };
    let span = || humantime::parse_duration(text).ok().map(|span| now().saturating_add(span.as_secs()));
    match parse_time(text).or_else(span) {
        Some(at) if at > now() => Ok(Some(at)),
        Some(_) => Err(Failure::Usage(format!("{option} {text} is over already"))),
        None => Err(Failure::Usage(format!(
            "{option} {text}: write a time like 2026-12-31T23:59:59Z, or a span like 90days"
        ))),
    }
}

async fn list(common: &Common) -> Result<(), Failure> {
    let records = open(common).await?.1.list().await?;
    if common.json {
        let shown: Vec<_> = records.iter().map(ShownRecord::from).collect();
        say!("{}", serde_json::to_string(&shown)?)?;
        return Ok(());
    }
    say!("{:<12}  {:<20}  {:<20}  {:<20}  {:<8}  DESCRIPTION", "ID", "USER", "CREATED", "LAST USED", "STATE")?;
    for record in &records {
        let last_used = record.last_used.map_or_else(|| "never".into(), rfc3339);
        say!(
            "{:<12}  {:<20}  {:<20}  {last_used:<20}  {:<8}  {}",
            record.digest.id().to_string(),
            plain(&record.user),
            rfc3339(record.created),
            state(record),
            plain(&record.description)
        )?;
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
        TokenRecord { blocked: true, .. } => "blocked",
        TokenRecord { not_before: Some(start), .. } if *start > now() => "not yet",
        TokenRecord { expires: Some(end), .. } if *end <= now() => "expired",
        TokenRecord { superseded: Some(_), .. } => "rotated",
        _ => "active",
    }
}

/// The one token that an id, or standard input, stands for.
async fn find(admin: &mut dyn TokenAdmin, id: &str) -> anyhow::Result<TokenRecord> {
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
    let mut found = admin.find(&prefix).await?;
    match (found.pop(), found.len()) {
        (Some(record), 0) => Ok(record),
        (None, _) => bail!("no such token"),
        (Some(_), more) => bail!("{} tokens begin with {prefix}: give more digits", more + 1),
    }
}

async fn show(common: &Common, id: &str) -> Result<(), Failure> {
    let record = find(open(common).await?.1.as_mut(), id).await?;
    print_record(common, &record)
}

fn print_record(common: &Common, record: &TokenRecord) -> Result<(), Failure> {
    let shown = ShownRecord::from(record);
    if common.json {
        say!("{}", serde_json::to_string(&shown)?)?;
        return Ok(());
    }
    let or = |value: Option<String>, none: &str| value.unwrap_or_else(|| none.into());
    say!("id           {}", shown.id)?;
    say!("state        {}", state(record))?;
    say!("user         {}", plain(&shown.user))?;
    say!("scopes       {}", plain(&shown.scopes.join(" ")))?;
    say!("description  {}", plain(&shown.description))?;
    say!("created      {}", shown.created)?;
    if let Some(start) = shown.not_before {
        say!("not before   {start}")?;
    }
    say!("expires      {}", or(shown.expires, "never"))?;
    if let Some(at) = shown.superseded {
        say!("rotated      {at}")?;
    }
    if let Some(old) = shown.replaces {
        say!("replaces     {old}")?;
    }
    say!("revoked      {}", or(shown.revoked, "no"))?;
    say!("last used    {}", or(shown.last_used, "never"))?;
    say!("sha256       {}", shown.sha256)?;
    Ok(())
}

async fn revoke(common: &Common, id: &str, wait: Option<Duration>) -> Result<(), Failure> {
    let (_, mut admin) = open(common).await?;
    let record = find(admin.as_mut(), id).await?;
    let revoked = admin.revoke(&record.digest, now()).await?;
    let record = find(admin.as_mut(), &record.digest.to_hex()).await?;
    if common.json {
        print_record(common, &record)?;
    } else {
        let how = if revoked { "is revoked" } else { "was revoked before" };
        say!("token {} of {} {how}", record.digest.id(), plain(&record.user))?;
    }
    let Some(timeout) = wait else { return Ok(()) };
    let started = Instant::now();
    let confirmed = admin.wait(timeout).await?;
    let took = started.elapsed().as_millis();
    match confirmed.len() {
        0 => eprintln!("no gateway is running on this store"),
        count => eprintln!("confirmed by {count} within {took} ms: {}", plain(&confirmed.join(", "))),
    }
    Ok(())
}

async fn block(common: &Common, user: &str, blocked: bool) -> Result<(), Failure> {
    let changed = open(common).await?.1.block(user, blocked).await?;
    let how = if blocked { "are blocked" } else { "work again" };
    if common.json {
        say!("{}", serde_json::json!({ "user": user, "blocked": blocked, "changed": changed }))?;
    } else {
        say!("{changed} tokens of {} {how}", plain(user))?;
    }
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
    not_before: Option<String>,
    expires: Option<String>,
    #[serde(default)]
    blocked: bool,
}

async fn import(common: &Common, file: &std::path::Path) -> Result<(), Failure> {
    let (_, mut admin) = open(common).await?;
    let input: Box<dyn BufRead + Send> = if file == std::path::Path::new("-") {
        Box::new(std::io::BufReader::new(std::io::stdin()))
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
    let new = admin.import(&mut records).await?;
    drop(records);
    progress.end();
    let seconds = started.elapsed().as_secs_f64();
    if common.json {
        say!("{}", serde_json::json!({ "read": read, "imported": new, "known": read - new, "seconds": seconds }))?;
    } else {
        say!("{new} tokens imported, {} known before, in {seconds:.1} s", read - new)?;
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
    let time = |key: &str, text: &Option<String>| match text {
        Some(text) => parse_time(text).map(Some).ok_or(format!("{key} must be a time like 2026-12-31T23:59:59Z")),
        None => Ok(None),
    };
    Ok(TokenRecord {
        scopes: line.scopes,
        description: line.description,
        created: now(),
        not_before: time("not_before", &line.not_before)?,
        expires: time("expires", &line.expires)?,
        blocked: line.blocked,
        ..TokenRecord::new(digest, line.user)
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
