//! `tollgate token`: manages the tokens in a writable store. A token is printed only once, when it is created.

use super::Failure;
use super::configuration::ConfigOption;
use super::progress::Progress;
use crate::config::Settings;
use crate::policy::LimitKeyPart;
use crate::store::credential::Digest;
use crate::store::portable::{Reading, is_token};
use crate::store::query::{TokenOrder, TokenQuery, TokenState};
use crate::store::terms::{SaidTerms, TokenTerms, check_plan, parse_method, parse_network, parse_token_rate};
use crate::store::values::{LATEST, check_description, check_scope, check_user, is_unseen};
use crate::store::{AdminError, MissingStore, NamedStore, ShownRecord, TokenAdmin, TokenRecord, parse_time, rfc3339};
use anyhow::{Context as _, anyhow, bail};
use clap::Subcommand;
use data_encoding::BASE32_NOPAD;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, IsTerminal as _, Read as _, Write as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

#[derive(clap::Args)]
pub(super) struct TokenOptions {
    #[command(flatten)]
    config: ConfigOption,
    /// Name of the [[store]] (default: the first writable one; for show, rotate and revoke the first that has the token)
    #[arg(long, value_name = "NAME")]
    store: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
pub(super) enum TokenCommand {
    /// Create a token and print it; it is not shown again.
    Create {
        #[command(flatten)]
        options: TokenOptions,
        /// User that the token belongs to
        #[arg(long)]
        user: String,
        /// A scope; may be repeated
        #[arg(long = "scope", value_name = "SCOPE")]
        scopes: Vec<String>,
        /// What the token is for
        #[arg(long, default_value = "")]
        description: String,
        /// Start of validity: a time like 2026-12-31T08:00:00Z, or a duration from now like 2h (default: now)
        #[arg(long, value_name = "TIME")]
        not_before: Option<String>,
        /// Expiry: a time like 2026-12-31T23:59:59Z, or a duration from now like 90days (default: never)
        #[arg(long, value_name = "TIME")]
        expires: Option<String>,
        #[command(flatten)]
        terms: TermOptions,
    },
    /// List tokens, newest first
    List {
        #[command(flatten)]
        options: TokenOptions,
        #[command(flatten)]
        wanted: ListOptions,
    },
    /// Show one token, by its id (or a longer prefix of its SHA-256), or by the token itself on standard input.
    Show {
        #[command(flatten)]
        options: TokenOptions,
        /// The id from the access log or the list; `-` reads the token from standard input.
        id: String,
    },
    /// Replace a token by a new one for the same user and scopes. Both are valid for the overlap; then the old one
    /// expires.
    Rotate {
        #[command(flatten)]
        options: TokenOptions,
        /// The id from the access log or the list; `-` reads the token from standard input.
        id: String,
        /// How long the old token remains valid
        #[arg(long, default_value = "24h", value_name = "SPAN")]
        overlap: String,
        /// Expiry of the new token (default: the old token's lifetime, from now)
        #[arg(long, value_name = "TIME")]
        expires: Option<String>,
    },
    /// Revoke a token, or all of a user's. Running gateways refuse it within a second
    Revoke {
        #[command(flatten)]
        options: TokenOptions,
        /// The id from the access log or the list; `-` reads the token from standard input
        #[arg(required_unless_present = "user")]
        id: Option<String>,
        /// Revoke all tokens of this user, in place of one
        #[arg(long, conflicts_with = "id")]
        user: Option<String>,
        /// Wait until every running gateway on this store has confirmed the revocation
        #[arg(long)]
        wait: bool,
        /// With --wait: how many gateways must at least confirm; fewer in the register are a failure
        #[arg(long, value_name = "NUMBER", requires = "wait")]
        gateways: Option<usize>,
        /// How long to wait; then the exit code is 1, and the gateways that did not confirm are named
        #[arg(long, default_value = "30s", value_name = "SPAN")]
        timeout: String,
    },
    /// Delete a token's record. The token is refused like one that never was; `revoke` keeps the record
    Delete {
        #[command(flatten)]
        options: TokenOptions,
        /// The id from the access log or the list; `-` reads the token from standard input
        id: String,
    },
    /// Delete the records of tokens that were revoked or have expired long ago. Without --delete, only say what that would be
    Prune {
        #[command(flatten)]
        options: TokenOptions,
        /// Those that ended before this: a time like 2026-01-01T00:00:00Z, or a duration ago like 90days
        #[arg(long, value_name = "TIME")]
        ended_before: String,
        /// Delete them
        #[arg(long)]
        delete: bool,
    },
    /// Block a user: all of the user's tokens are refused until `unblock`.
    Block {
        #[command(flatten)]
        options: TokenOptions,
        /// Name of the user
        user: String,
    },
    /// Unblock a user.
    Unblock {
        #[command(flatten)]
        options: TokenOptions,
        /// Name of the user
        user: String,
    },
    /// Import tokens from JSON: one object per line with `user`, `token` or `sha256`, and optionally `scopes`,
    /// `description`, `expires` and the other fields of a list; or the output of `list --json`.
    Import {
        #[command(flatten)]
        options: TokenOptions,
        /// File to import; `-` reads standard input
        file: PathBuf,
    },
}

/// Which tokens a list has, and how it is printed.
#[derive(clap::Args)]
pub(super) struct ListOptions {
    /// Tokens of this user
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// Tokens in this state; may be repeated. `valid` is active and rotated
    #[arg(long = "state", value_name = "STATE", value_delimiter = ',')]
    states: Vec<StateName>,
    /// Tokens with this scope
    #[arg(long, value_name = "SCOPE")]
    scope: Option<String>,
    /// Tokens that are older than this and were not used since: a time, or a duration ago like 90days
    #[arg(long, value_name = "TIME")]
    unused_since: Option<String>,
    /// Tokens that expire within this, like 14days
    #[arg(long, value_name = "SPAN")]
    expires_within: Option<String>,
    /// The order: newest first, soonest expiry first, longest unused first, or by name
    #[arg(long, value_name = "ORDER", default_value = "created")]
    sort: OrderName,
    /// At most so many
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Those behind the token with this id, in the same order
    #[arg(long, value_name = "ID")]
    after: Option<String>,
    /// Times in full, and creation, terms and description as well
    #[arg(long)]
    wide: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum StateName {
    Valid,
    Active,
    Rotated,
    NotYet,
    Expired,
    Blocked,
    Revoked,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum OrderName {
    Created,
    Expires,
    LastUsed,
    User,
}

/// How the new token may be used.
#[derive(clap::Args)]
pub(super) struct TermOptions {
    /// Plan: the amounts of [plan.NAME] in each [[limit]] with `plans = true`
    #[arg(long, value_name = "NAME")]
    plan: Option<String>,
    /// Rate of its own, like 600/min or "600/min burst 100", in each [[limit]] with `plans = true` and a key by token
    #[arg(long, value_name = "RATE")]
    rate: Option<String>,
    /// A network that the token may be used from, like 10.0.0.0/8; may be repeated (default: from everywhere)
    #[arg(long = "network", value_name = "NETWORK", value_delimiter = ',')]
    networks: Vec<String>,
    /// A method that the token may be used with; may be repeated, or be a list like GET,HEAD (default: all)
    #[arg(long = "method", value_name = "METHOD", value_delimiter = ',')]
    methods: Vec<String>,
}

impl TermOptions {
    /// Checked one by one, so that it is said which option is wrong.
    fn read(self) -> Result<Option<Arc<TokenTerms>>, Failure> {
        let wrong = |option: &str, text: &str, why: &str| Failure::Usage(format!("{option} \"{}\" {why}", plain(text)));
        if let Some(plan) = &self.plan {
            check_plan(plan).map_err(|why| wrong("--plan", plan, why))?;
        }
        if let Some(rate) = &self.rate {
            parse_token_rate(rate).map_err(|why| wrong("--rate", rate, why))?;
        }
        for network in &self.networks {
            parse_network(network).map_err(|why| wrong("--network", network, why))?;
        }
        for method in &self.methods {
            parse_method(method).map_err(|why| wrong("--method", method, why))?;
        }
        TokenTerms::of(SaidTerms {
            plan: self.plan.unwrap_or_default(),
            rate: self.rate.unwrap_or_default(),
            networks: self.networks,
            methods: self.methods,
        })
        .map_err(|why| Failure::Usage(format!("--network: {why}")))
    }
}

/// What a gateway with this configuration would make of a record's plan, if that is not what it says.
fn plan_note(settings: &Settings, record: &TokenRecord) -> Option<String> {
    let terms = record.terms.as_ref()?;
    let by_plan = |key: &dyn Fn(&[LimitKeyPart]) -> bool| {
        settings.limits.iter().any(|limit| limit.buckets.plans.is_some() && key(&limit.buckets.key))
    };
    match terms.plan() {
        Some(plan) if !settings.plans.iter().any(|known| known.name == plan) => {
            return Some(format!("there is no [plan.{plan}]: each [[limit]] has its own amounts for it"));
        }
        Some(plan) if !by_plan(&|_| true) => {
            return Some(format!("no [[limit]] says `plans = true`: plan {plan} changes nothing"));
        }
        _ => {}
    }
    let by_token = |key: &[LimitKeyPart]| key.contains(&LimitKeyPart::Token);
    (terms.rate().is_some() && !by_plan(&by_token))
        .then(|| "no [[limit]] by token says `plans = true`: the token's own rate limits nothing".into())
}

pub(super) async fn run(command: TokenCommand) -> Result<(), Failure> {
    match command {
        TokenCommand::Create { options, user, scopes, description, not_before, expires, terms } => {
            let not_before = moment("--not-before", not_before.as_deref())?;
            let expires = moment("--expires", expires.as_deref())?;
            let bounds = Bounds { not_before, expires, terms: terms.read()? };
            create(&options, user, scopes, description, bounds).await
        }
        TokenCommand::List { options, wanted } => list(&options, &wanted).await,
        TokenCommand::Show { options, id } => show(&options, &id).await,
        TokenCommand::Rotate { options, id, overlap, expires } => {
            let expires = moment("--expires", expires.as_deref())?;
            rotate(&options, &id, span("--overlap", &overlap)?, expires).await
        }
        TokenCommand::Revoke { options, id, user, wait, gateways, timeout } => {
            let wait = wait.then(|| span("--timeout", &timeout)).transpose()?;
            match (id, user) {
                (_, Some(user)) => revoke_user(&options, &user, wait, gateways.unwrap_or(0)).await,
                (id, None) => revoke(&options, &id.unwrap_or_default(), wait, gateways.unwrap_or(0)).await,
            }
        }
        TokenCommand::Delete { options, id } => delete(&options, &id).await,
        TokenCommand::Prune { options, ended_before, delete } => {
            prune(&options, past("--ended-before", &ended_before)?, delete).await
        }
        TokenCommand::Block { options, user } => block(&options, &user, true).await,
        TokenCommand::Unblock { options, user } => block(&options, &user, false).await,
        TokenCommand::Import { options, file } => import(&options, &file).await,
    }
}

/// A store opened for writing.
struct OpenStore {
    settings: Settings,
    /// The store's name.
    store: String,
    admin: Box<dyn TokenAdmin>,
}

/// Opens the store that is meant, to read from it or to change what is in it.
async fn open(options: &TokenOptions) -> Result<OpenStore, Failure> {
    open_with(options, MissingStore::ReadEmpty).await
}

async fn open_with(options: &TokenOptions, missing: MissingStore) -> Result<OpenStore, Failure> {
    let settings = super::load(&options.config)?;
    let store = chosen(&settings, options.store.as_deref())?;
    let (name, admin) = (store.name.clone(), writer(store, missing).await?);
    Ok(OpenStore { settings, store: name, admin })
}

/// Opens the store with this name for writing, or the first writable one.
pub(super) async fn admin(settings: &Settings, name: Option<&str>) -> anyhow::Result<Box<dyn TokenAdmin>> {
    writer(chosen(settings, name)?, MissingStore::Create).await
}

fn chosen<'a>(settings: &'a Settings, name: Option<&str>) -> anyhow::Result<&'a NamedStore> {
    let names = || settings.stores.iter().map(|store| store.name.as_str()).collect::<Vec<_>>().join(", ");
    match name {
        Some(name) => settings
            .stores
            .iter()
            .find(|store| store.name == name)
            .ok_or_else(|| anyhow!("there is no store \"{name}\"; configured stores: {}", names())),
        None => settings.stores.iter().find(|store| store.kind.is_writable()).ok_or_else(|| {
            anyhow!(
                "{}: read-only for tollgate; create and revoke tokens in the systems that own these stores",
                names()
            )
        }),
    }
}

async fn writer(store: &NamedStore, missing: MissingStore) -> anyhow::Result<Box<dyn TokenAdmin>> {
    store.kind.admin(missing).await?.ok_or_else(|| {
        anyhow!("store {}: read-only for tollgate; create and revoke tokens in the system that owns it", store.name)
    })
}

impl OpenStore {
    /// Reads a token again, to verify a change before it is reported.
    async fn confirmed(&mut self, digest: &Digest, is: impl Fn(&TokenRecord) -> bool) -> anyhow::Result<TokenRecord> {
        match self.admin.find(&digest.to_hex()).await?.into_iter().next() {
            Some(record) if is(&record) => Ok(record),
            _ => bail!("store {}: accepted the change of token {} but does not return it", self.store, digest.id()),
        }
    }

    /// Names the records that were left out because they cannot be read. Returns how many.
    fn name_unreadable(&mut self) -> usize {
        let unreadable = self.admin.take_unreadable();
        for what in &unreadable {
            eprintln!("{}", super::hidden(&format!("left out, store {}: {}", self.store, plain(what))));
        }
        unreadable.len()
    }

    /// Names the stores that a change does not affect.
    fn note_others(&self) {
        let others: Vec<_> =
            self.settings.stores.iter().map(|store| store.name.as_str()).filter(|name| *name != self.store).collect();
        if !others.is_empty() {
            let note = format!("note: this is about store {} only; not asked: {}", self.store, others.join(", "));
            eprintln!("{}", super::hidden(&note));
        }
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// `tg-`, 32 letters and digits with 160 random bits, and 6 check digits, by which secret scanners can recognise
/// tokens.
pub(super) fn new_token() -> anyhow::Result<String> {
    let mut random = [0; 20];
    getrandom::fill(&mut random).map_err(|error| anyhow!("cannot get random numbers from the system: {error}"))?;
    let base32 = |bytes: &[u8]| BASE32_NOPAD.encode(bytes).to_ascii_lowercase();
    let body = base32(&random);
    let check = base32(&Digest::of(body.as_bytes()).as_bytes()[..5]);
    Ok(format!("tg-{body}{}", &check[..6]))
}

/// When and how a new token may be used.
struct Bounds {
    not_before: Option<u64>,
    expires: Option<u64>,
    terms: Option<Arc<TokenTerms>>,
}

async fn create(
    options: &TokenOptions,
    user: String,
    scopes: Vec<String>,
    description: String,
    bounds: Bounds,
) -> Result<(), Failure> {
    let Bounds { not_before, expires, terms } = bounds;
    let usage = |option: &str, why: &str| Failure::Usage(format!("{option}: {why}"));
    check_user(&user).map_err(|why| usage("--user", why))?;
    for scope in &scopes {
        check_scope(scope).map_err(|why| usage("--scope", &format!("\"{}\" {why}", plain(scope))))?;
    }
    check_description(&description).map_err(|why| usage("--description", why))?;
    if not_before.zip(expires).is_some_and(|(start, end)| start >= end) {
        return Err(Failure::Usage("--not-before comes after --expires".into()));
    }
    let mut opened = open_with(options, MissingStore::Create).await?;
    warn_of_scopes(&opened.settings, &scopes);
    let is_blocked = |records: &[TokenRecord]| records.iter().any(|record| record.blocked);
    if is_blocked(&opened.admin.of_user(&user).await?) {
        let name = plain(&user);
        return Err(
            anyhow!("{name} is blocked: no token was made. `tollgate token unblock` lets {name} in again").into()
        );
    }
    let token = new_token()?;
    let record = TokenRecord {
        scopes,
        description,
        created: now(),
        not_before,
        expires,
        terms,
        ..TokenRecord::new(Digest::of(token.as_bytes()), user)
    };
    if let Some(note) = plan_note(&opened.settings, &record) {
        eprintln!("note: {note}");
    }
    opened.admin.create(&record).await?;
    // A store that keeps a record but for its bounds must not go unnoticed.
    let same = |made: &TokenRecord| made.user == record.user && made.terms == record.terms;
    let made = opened.confirmed(&record.digest, same).await?;
    // A concurrent `block` of the user either finds the new token, or is found here.
    if is_blocked(&opened.admin.of_user(&record.user).await?) {
        opened.admin.revoke(&record.digest, now()).await?;
        let (name, id) = (plain(&record.user), record.digest.id());
        return Err(anyhow!("{name} was blocked at the same time: the new token {id} is revoked").into());
    }
    hand_over(options, &token, &made)
}

/// Warns of reasons for which the new token would be refused.
fn warn_of_scopes(settings: &Settings, scopes: &[String]) {
    let Some(known) = &settings.policy.scopes else { return };
    let unknown = |scope: &&String| !known.rules().iter().any(|rule| rule.scope == **scope);
    if scopes.is_empty() {
        eprintln!("note: [[scope]] is configured, so a token without a scope is allowed nothing");
    }
    for scope in scopes.iter().filter(unknown) {
        eprintln!("note: no [[scope]] defines what \"{}\" allows", plain(scope));
    }
}

/// Prints a new token. The only output whose failure matters, because the token cannot be shown again.
fn hand_over(options: &TokenOptions, token: &str, record: &TokenRecord) -> Result<(), Failure> {
    let lost = || format!("token {} works, but it could not be printed: revoke it", record.digest.id());
    let mut out = std::io::stdout().lock();
    if options.json {
        let mut shown = serde_json::to_value(ShownRecord::from(record))?;
        shown["token"] = token.into();
        writeln!(out, "{shown}").with_context(lost)?;
    } else {
        writeln!(out, "{token}").with_context(lost)?;
        eprintln!("token {} for {}: keep it now, it is not shown again", record.digest.id(), plain(&record.user));
    }
    if record.blocked {
        eprintln!("note: it does not work yet: {} is blocked", plain(&record.user));
    } else if let Some(start) = record.not_before.filter(|start| *start > now()) {
        eprintln!("note: it works from {} on", rfc3339(start));
    }
    Ok(())
}

async fn rotate(options: &TokenOptions, id: &str, overlap: Duration, expires: Option<u64>) -> Result<(), Failure> {
    let (mut opened, old) = find(options, id).await?;
    let (token, at) = (new_token()?, now());
    let lifetime = match (expires, old.expires) {
        (Some(_), _) | (None, None) => None,
        (None, Some(_)) if old.created == 0 && old.not_before.is_none() => {
            let why = format!("the creation time of token {} is not known: specify --expires", old.digest.id());
            return Err(Failure::Usage(why));
        }
        (None, Some(end)) => Some(end.saturating_sub(old.not_before.unwrap_or(old.created))),
    };
    let next = TokenRecord {
        scopes: old.scopes.clone(),
        description: old.description.clone(),
        created: at,
        expires: expires.or(lifetime.map(|span| at.saturating_add(span).min(LATEST))),
        replaces: Some(old.digest),
        blocked: old.blocked,
        terms: old.terms.clone(),
        ..TokenRecord::new(Digest::of(token.as_bytes()), old.user.clone())
    };
    match opened.admin.rotate(&old.digest, &next, at, at.saturating_add(overlap.as_secs())).await {
        Err(AdminError::Ended) => return Err(nothing_to_rotate(&mut opened, &old.digest).await?.into()),
        done => done?,
    }
    let old = opened.confirmed(&old.digest, |old| old.superseded.is_some()).await?;
    if old.blocked && !next.blocked {
        // Blocked between the check and the rotation: the successor must not be a way around it.
        opened.admin.block(&old.user, true).await?;
    }
    let next =
        opened.confirmed(&next.digest, |next| next.replaces == Some(old.digest) && next.blocked == old.blocked).await?;
    let (id, end) = (old.digest.id(), old.expires.map_or_else(|| "never".into(), rfc3339));
    match state(&old) {
        "rotated" => eprintln!("token {id} remains valid until {end}"),
        "expired" => eprintln!("token {id} is no longer valid"),
        other => eprintln!("token {id} is in state \"{other}\" and ends at {end}"),
    }
    hand_over(options, &token, &next)
}

/// Why a token cannot be rotated; for one that was rotated before, its successors.
async fn nothing_to_rotate(opened: &mut OpenStore, digest: &Digest) -> anyhow::Result<anyhow::Error> {
    let record = opened.confirmed(digest, |_| true).await?;
    let id = digest.id();
    let nothing = "there is nothing to rotate";
    Ok(match (record.revoked, record.superseded) {
        (Some(_), _) => anyhow!("token {id} is revoked: {nothing}"),
        (None, Some(at)) => {
            let all = opened.admin.of_user(&record.user).await?;
            let (mut successors, mut last) = (Vec::new(), *digest);
            while let Some(next) = all.iter().find(|next| next.replaces == Some(last))
                && successors.len() < all.len()
            {
                successors.push(format!("{} ({})", next.digest.id(), state(next)));
                last = next.digest;
            }
            let who = match successors.as_slice() {
                [] => "the token in its place is not in this store any more".to_owned(),
                list => format!("the token in its place is {}", list.join(", and in the place of that one ")),
            };
            anyhow!("token {id} was rotated before, at {}: {nothing}; {who}", rfc3339(at))
        }
        (None, None) => anyhow!("token {id} has expired: {nothing}; make a new one"),
    })
}

/// A duration like `24h`.
fn span(option: &str, text: &str) -> Result<Duration, Failure> {
    humantime::parse_duration(text)
        .ok()
        .filter(|span| now().saturating_add(span.as_secs()) <= LATEST)
        .ok_or_else(|| Failure::Usage(format!("{option} {text}: use a duration like 24h or 30s")))
}

/// A future time, or a duration from now.
fn moment(option: &str, text: Option<&str>) -> Result<Option<u64>, Failure> {
    let Some(text) = text else { return Ok(None) };
    let span = || humantime::parse_duration(text).ok().map(|span| now().saturating_add(span.as_secs()));
    match parse_time(text).or_else(span) {
        Some(at) if at > LATEST => Err(Failure::Usage(format!("{option} {text} is after the year 9999"))),
        Some(at) if at > now() => Ok(Some(at)),
        Some(_) => Err(Failure::Usage(format!("{option} {text} is in the past"))),
        None => Err(Failure::Usage(format!(
            "{option} {text}: use a time like 2026-12-31T23:59:59Z, or a duration like 90days"
        ))),
    }
}

/// A past time, or a duration before now.
fn past(option: &str, text: &str) -> Result<u64, Failure> {
    let span = || humantime::parse_duration(text).ok().map(|span| now().saturating_sub(span.as_secs()));
    match parse_time(text).or_else(span) {
        Some(at) if at <= now() => Ok(at),
        Some(_) => Err(Failure::Usage(format!("{option} {text} is in the future"))),
        None => Err(Failure::Usage(format!(
            "{option} {text}: use a time like 2026-01-01T00:00:00Z, or a duration ago like 90days"
        ))),
    }
}

impl ListOptions {
    /// Without the page, which depends on a record.
    fn query(&self) -> Result<TokenQuery, Failure> {
        let mut states: Vec<TokenState> = Vec::new();
        for name in &self.states {
            match name {
                StateName::Valid => states.extend([TokenState::Active, TokenState::Rotated]),
                StateName::Active => states.push(TokenState::Active),
                StateName::Rotated => states.push(TokenState::Rotated),
                StateName::NotYet => states.push(TokenState::NotYet),
                StateName::Expired => states.push(TokenState::Expired),
                StateName::Blocked => states.push(TokenState::Blocked),
                StateName::Revoked => states.push(TokenState::Revoked),
            }
        }
        let within = self.expires_within.as_deref().map(|text| span("--expires-within", text)).transpose()?;
        Ok(TokenQuery {
            now: now(),
            user: self.user.clone(),
            states,
            scope: self.scope.clone(),
            unused_since: self.unused_since.as_deref().map(|text| past("--unused-since", text)).transpose()?,
            expires_by: within.map(|span| now().saturating_add(span.as_secs())),
            order: match self.sort {
                OrderName::Created => TokenOrder::Created,
                OrderName::Expires => TokenOrder::Expires,
                OrderName::LastUsed => TokenOrder::LastUsed,
                OrderName::User => TokenOrder::User,
            },
            // One more says whether that is all.
            limit: self.limit.map(|limit| limit as usize + 1),
            ..TokenQuery::default()
        })
    }
}

/// The token of a page's end.
async fn last_of_page(opened: &mut OpenStore, id: &str) -> Result<TokenRecord, Failure> {
    let hex = hex_of_id(id)?;
    let mut found = opened.admin.find(&hex).await?;
    match (found.pop(), found.len()) {
        (Some(record), 0) => Ok(record),
        (Some(_), _) => Err(anyhow!("--after {id}: several tokens begin with it: give more digits").into()),
        (None, _) => {
            Err(anyhow!("--after {id}: store {} has no such token (any more): begin again", opened.store).into())
        }
    }
}

/// Prints each record as it comes: there may be millions.
async fn list(options: &TokenOptions, wanted: &ListOptions) -> Result<(), Failure> {
    let mut query = wanted.query()?;
    let mut opened = open(options).await?;
    let notes_uses = opened.admin.notes_uses();
    if wanted.unused_since.is_some() && !notes_uses {
        let why = format!("store {} does not note when tokens are used: --unused-since cannot be told", opened.store);
        return Err(anyhow::Error::msg(why).into());
    }
    if let Some(id) = &wanted.after {
        query.after = Some(query.order.rank(&last_of_page(&mut opened, id).await?));
    }
    let (mut count, progress) = (0, Progress::beside_output("reading"));
    opened.admin.count_into(Arc::clone(&progress.count));
    let mut out = std::io::BufWriter::new(std::io::stdout());
    let table = TokenTable::of(wanted, notes_uses);
    if !options.json {
        table.head(&mut out)?;
    }
    let mut printed = Ok(());
    let (mut last, mut more) = (None, false);
    let most = wanted.limit.unwrap_or(u32::MAX);
    let mut each = |record: TokenRecord| {
        if count == most {
            more = true;
            return Ok(());
        }
        count += 1;
        if count == 1 {
            progress.step("printing");
        }
        progress.set(u64::from(count));
        last = Some(record.digest);
        printed = match options.json {
            true => print_json(&mut out, count == 1, &record),
            false => table.line(&mut out, &record),
        };
        // Whoever reads may have seen enough.
        if printed.is_ok() { Ok(()) } else { Err(AdminError::Input("standard output".into())) }
    };
    let visited = opened.admin.select(&query, &mut each).await;
    drop(progress);
    let end = if count == 0 { "[]" } else { "]" };
    let printed = printed.and_then(|()| if options.json { writeln!(out, "{end}") } else { Ok(()) });
    match printed.and_then(|()| out.flush()) {
        Err(gone) if gone.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
        printed => printed.context("standard output")?,
    }
    visited?;
    opened.name_unreadable();
    if let Some(last) = last.filter(|_| more) {
        eprintln!("there are more: --after {}", last.id());
    }
    Ok(())
}

fn print_json(out: &mut impl std::io::Write, is_first: bool, record: &TokenRecord) -> std::io::Result<()> {
    let shown = serde_json::to_string(&ShownRecord::from(record))?;
    write!(out, "{}{shown}", if is_first { "[" } else { "," })
}

/// A list for people. On a terminal, lines are no wider than that; elsewhere nothing is cut.
struct TokenTable {
    wide: bool,
    notes_uses: bool,
    width: Option<usize>,
}

impl TokenTable {
    const USER: usize = 16;

    fn of(wanted: &ListOptions, notes_uses: bool) -> Self {
        let width = terminal_size::terminal_size_of(std::io::stdout()).map(|(width, _)| usize::from(width.0));
        Self { wide: wanted.wide, notes_uses, width: width.filter(|_| !wanted.wide) }
    }

    fn head(&self, out: &mut impl std::io::Write) -> std::io::Result<()> {
        if self.wide {
            return writeln!(
                out,
                "{:<12}  {:<20}  {:<8}  {:<20}  {:<20}  {:<20}  {:<20}  {:<12}  DESCRIPTION",
                "ID", "USER", "STATE", "CREATED", "EXPIRES", "LAST USED", "SCOPES", "TERMS"
            );
        }
        let head = format!("{:<12}  {:<16}  {:<8}  {:<10}", "ID", "USER", "STATE", "EXPIRES");
        let used = if self.notes_uses { format!("  {:<10}", "LAST USED") } else { String::new() };
        writeln!(out, "{head}{used}  SCOPES")
    }

    fn line(&self, out: &mut impl std::io::Write, record: &TokenRecord) -> std::io::Result<()> {
        let (id, user, state) = (record.digest.id().to_string(), plain(&record.user), state(record));
        let scopes = plain(&record.scopes.join(" "));
        if self.wide {
            let line = format!(
                "{id:<12}  {user:<20}  {state:<8}  {:<20}  {:<20}  {:<20}  {:<20}  {:<12}  {}",
                rfc3339(record.created),
                record.expires.map_or_else(|| "-".into(), rfc3339),
                last_used(self.notes_uses, record),
                if scopes.is_empty() { "-" } else { &scopes },
                terms_in_a_column(record),
                plain(&record.description)
            );
            return writeln!(out, "{}", line.trim_end());
        }
        let day = |time: u64| rfc3339(time).chars().take(10).collect::<String>();
        let user = if self.width.is_some() { cut(&user, Self::USER) } else { user };
        let expires = record.expires.map_or_else(|| "-".into(), day);
        let mut line = format!("{id:<12}  {user:<16}  {state:<8}  {expires:<10}");
        if self.notes_uses {
            line += &format!("  {:<10}", record.last_used.map_or_else(|| "never".into(), day));
        }
        line += "  ";
        line += &scopes;
        let line = line.trim_end();
        match self.width {
            Some(width) => writeln!(out, "{}", cut(line, width)),
            None => writeln!(out, "{line}"),
        }
    }
}

/// A text of at most so many characters; `…` stands for the rest.
fn cut(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most.saturating_sub(1)).chain(['…']).collect()
}

/// Like `plan=gold methods=GET,HEAD`; `-` for none.
fn terms_in_a_column(record: &TokenRecord) -> String {
    let Some(SaidTerms { plan, rate, networks, methods }) = record.terms.as_deref().map(TokenTerms::said) else {
        return "-".into();
    };
    // One word for each, without blanks in it.
    let fields = [
        ("plan", plan.clone()),
        ("rate", rate.replace(" burst ", " burst=")),
        ("networks", networks.join(",")),
        ("methods", methods.join(",")),
    ];
    let said = fields.into_iter().filter(|(_, value)| !value.is_empty());
    said.map(|(name, value)| format!("{name}={}", plain(&value))).collect::<Vec<_>>().join(" ")
}

/// In a store without recorded uses, the last use of a token is unknown.
fn last_used(notes_uses: bool, record: &TokenRecord) -> String {
    let none = if notes_uses { "never" } else { "not recorded" };
    record.last_used.map_or_else(|| none.into(), rfc3339)
}

/// Text from a store for a terminal, without control characters, which could change earlier output.
fn plain(text: &str) -> String {
    text.chars().map(|c| if is_unseen(c) { '\u{fffd}' } else { c }).collect()
}

fn state(record: &TokenRecord) -> &'static str {
    TokenState::of(record, now()).name()
}

fn hex_of_id(id: &str) -> anyhow::Result<String> {
    let hex = id.to_ascii_lowercase();
    if hex.len() < 6 || hex.len() > 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        bail!(
            "an id is 6 to 64 hex digits of the token's SHA-256; to use the token itself, pass - and write it to standard input"
        );
    }
    Ok(hex)
}

/// The token with an id, or the one on standard input, and the store that it is in: the one that is named, else the first
/// that has it of those that tollgate can read by digest, in their order, as a gateway asks them.
async fn find(options: &TokenOptions, id: &str) -> Result<(OpenStore, TokenRecord), Failure> {
    let settings = super::load(&options.config)?;
    let prefix = if id == "-" { Digest::of(&token_on_input()?).to_hex() } else { hex_of_id(id)? };
    let candidates: Vec<&NamedStore> = match options.store.as_deref() {
        None if settings.stores.iter().any(|store| store.kind.is_writable()) => {
            settings.stores.iter().filter(|store| store.kind.is_writable()).collect()
        }
        name => vec![chosen(&settings, name)?],
    };
    let mut asked = Vec::new();
    for store in &candidates {
        let mut admin =
            writer(store, MissingStore::ReadEmpty).await.with_context(|| format!("store {}", store.name))?;
        let mut found = admin.find(&prefix).await.with_context(|| format!("store {}", store.name))?;
        match (found.pop(), found.len()) {
            (Some(record), 0) => {
                let store = store.name.clone();
                return Ok((OpenStore { settings, store, admin }, record));
            }
            (Some(_), more) => {
                let tokens = more + 1;
                return Err(
                    anyhow!("{tokens} tokens of store {} begin with {prefix}: give more digits", store.name).into()
                );
            }
            (None, _) => {}
        }
        if let Some(what) = admin.take_unreadable().first() {
            return Err(anyhow!("store {}: {}", store.name, plain(what)).into());
        }
        asked.push(store.name.as_str());
    }
    let others: Vec<_> =
        settings.stores.iter().map(|store| store.name.as_str()).filter(|name| !asked.contains(name)).collect();
    let not_asked = if others.is_empty() { String::new() } else { format!("; not asked: {}", others.join(", ")) };
    Err(anyhow!("no such token in store {}{not_asked}", asked.join(" or ")).into())
}

/// Reads standard input, which must contain exactly one token.
fn token_on_input() -> anyhow::Result<Vec<u8>> {
    let stdin = std::io::stdin();
    let mut bytes = Vec::new();
    // On a terminal, a line end is sufficient.
    let read = if stdin.is_terminal() {
        stdin.lock().read_until(b'\n', &mut bytes)
    } else {
        stdin.lock().take(64 * 1024).read_to_end(&mut bytes)
    };
    read.context("standard input")?;
    while bytes.last().is_some_and(|last| matches!(last, b'\r' | b'\n')) {
        bytes.pop();
    }
    if bytes.trim_ascii().is_empty() {
        bail!("standard input is empty; expected one token");
    }
    if bytes.contains(&b'\n') {
        bail!("standard input has more than one line; expected one token");
    }
    if !is_token(&bytes) {
        bail!("standard input is not a token: expected 1 to 2048 visible ASCII characters, without blanks");
    }
    Ok(bytes)
}

async fn show(options: &TokenOptions, id: &str) -> Result<(), Failure> {
    let (opened, record) = find(options, id).await?;
    print_record(options, &opened, &record)
}

fn print_record(options: &TokenOptions, opened: &OpenStore, record: &TokenRecord) -> Result<(), Failure> {
    let shown = ShownRecord::from(record);
    if options.json {
        say!("{}", serde_json::to_string(&shown)?)?;
        return Ok(());
    }
    let or = |value: Option<String>, none: &str| value.unwrap_or_else(|| none.into());
    say!("id           {}", shown.id)?;
    if opened.settings.stores.len() > 1 {
        say!("store        {}", opened.store)?;
    }
    say!("state        {}", state(record))?;
    say!("user         {}", plain(&shown.user))?;
    say!("scopes       {}", plain(&shown.scopes.join(" ")))?;
    say!("description  {}", plain(&shown.description))?;
    say!("created      {}", shown.created)?;
    if let Some(start) = shown.not_before {
        say!("not before   {start}")?;
    }
    say!("expires      {}", or(shown.expires, "never"))?;
    if let Some(plan) = shown.plan {
        say!("plan         {}", plain(&plan))?;
    }
    if let Some(rate) = shown.rate {
        say!("rate         {}", plain(&rate))?;
    }
    if let Some(note) = plan_note(&opened.settings, record) {
        say!("             ({note})")?;
    }
    if !shown.networks.is_empty() {
        say!("networks     {}", plain(&shown.networks.join(" ")))?;
    }
    if !shown.methods.is_empty() {
        say!("methods      {}", plain(&shown.methods.join(" ")))?;
    }
    if let Some(at) = shown.superseded {
        say!("rotated      {at}")?;
    }
    if let Some(old) = shown.replaces {
        say!("replaces     {old}")?;
    }
    say!(
        "revoked      {}",
        if record.revoked.is_some_and(is_unknown) { "yes".into() } else { or(shown.revoked, "no") }
    )?;
    say!("last used    {}", last_used(opened.admin.notes_uses(), record))?;
    say!("sha256       {}", shown.sha256)?;
    Ok(())
}

/// In a token file, a revocation may have no time.
const fn is_unknown(revoked: u64) -> bool {
    revoked <= 1
}

async fn revoke(options: &TokenOptions, id: &str, wait: Option<Duration>, least: usize) -> Result<(), Failure> {
    let (mut opened, record) = find(options, id).await?;
    let revoked = opened.admin.revoke(&record.digest, now()).await?;
    let record = opened.confirmed(&record.digest, |record| record.revoked.is_some()).await?;
    let id = record.digest.id();
    if options.json {
        print_record(options, &opened, &record)?;
    } else {
        let how = match record.revoked {
            _ if revoked => "is revoked".into(),
            Some(at) if !is_unknown(at) => format!("was revoked before, at {}", rfc3339(at)),
            _ => "was revoked before".into(),
        };
        say!("token {id} of {} {how}", plain(&record.user))?;
    }
    match wait {
        Some(timeout) => confirm(&mut opened, &format!("token {id} is revoked"), timeout, least).await,
        None => Ok(()),
    }
}

/// Waits until every gateway has taken in what was done.
async fn confirm(opened: &mut OpenStore, done: &str, timeout: Duration, least: usize) -> Result<(), Failure> {
    let started = Instant::now();
    let confirmed = opened.admin.wait(timeout).await;
    let confirmed = confirmed.with_context(|| format!("{done}, but not confirmed by all gateways"))?;
    let took = started.elapsed().as_millis();
    match confirmed.len() {
        0 => eprintln!("no gateway is running on this store"),
        count => eprintln!("confirmed by {count} within {took} ms: {}", plain(&confirmed.join(", "))),
    }
    if confirmed.len() < least {
        return Err(anyhow!(
            "{done}, but only {} of {least} gateways are in the register of this store: the others do not run, \
             cannot register, or use another store",
            confirmed.len()
        )
        .into());
    }
    Ok(())
}

/// A misspelled name must not pass for a user without tokens: what changed nothing is an error.
async fn revoke_user(options: &TokenOptions, user: &str, wait: Option<Duration>, least: usize) -> Result<(), Failure> {
    let mut opened = open(options).await?;
    let name = plain(user);
    let progress = Progress::new("revoking the user's tokens");
    opened.admin.count_into(Arc::clone(&progress.count));
    let revoked = opened.admin.revoke_user(user, now()).await;
    // Read again: what is said to be revoked is.
    let (mut all, mut open) = (0, 0);
    let mut each = |record: TokenRecord| {
        all += 1;
        open += u64::from(record.revoked.is_none());
        Ok(())
    };
    let visited = opened.admin.visit_user(user, &mut each).await;
    drop(progress);
    let revoked = revoked?;
    visited?;
    if open > 0 {
        let why = format!(
            "store {}: {} of {name} are not revoked: a token was made meanwhile; try again",
            opened.store,
            tokens(open)
        );
        return Err(anyhow::Error::msg(why).into());
    }
    match (revoked, all) {
        (0, 0) => return Err(anyhow!("store {} has no token of \"{name}\": none was revoked", opened.store).into()),
        (0, all) => {
            return Err(anyhow!(
                "none was revoked: {} of {name} {} revoked before",
                tokens(all),
                if all == 1 { "was" } else { "were" }
            )
            .into());
        }
        _ => {}
    }
    let before = all - revoked;
    if options.json {
        say!("{}", serde_json::json!({ "user": user, "revoked": revoked, "revoked_before": before }))?;
    } else {
        let verb = if revoked == 1 { "is" } else { "are" };
        let rest = if before == 0 {
            String::new()
        } else {
            format!("; {before} {} before", if before == 1 { "was" } else { "were" })
        };
        say!("{} of {name} {verb} revoked{rest}", tokens(revoked))?;
    }
    opened.note_others();
    if let Some(timeout) = wait {
        confirm(
            &mut opened,
            &format!("{} of {name} {} revoked", tokens(revoked), if revoked == 1 { "is" } else { "are" }),
            timeout,
            least,
        )
        .await?;
    }
    match opened.name_unreadable() {
        0 => Ok(()),
        count => {
            let what = tokens(count as u64);
            Err(anyhow!("{what} could not be read, and may be of {name}: correct or remove what is named above").into())
        }
    }
}

async fn delete(options: &TokenOptions, id: &str) -> Result<(), Failure> {
    let (mut opened, record) = find(options, id).await?;
    opened.admin.remove(&[record.digest], &TokenQuery::default()).await?;
    if !opened.admin.find(&record.digest.to_hex()).await?.is_empty() {
        return Err(anyhow!(
            "store {}: accepted the deletion of token {} but still returns it",
            opened.store,
            record.digest.id()
        )
        .into());
    }
    if options.json {
        let mut shown = serde_json::to_value(ShownRecord::from(&record))?;
        shown["deleted"] = true.into();
        say!("{shown}")?;
    } else {
        say!("token {} of {} is deleted; it was {}", record.digest.id(), plain(&record.user), state(&record))?;
    }
    Ok(())
}

async fn prune(options: &TokenOptions, before: u64, is_meant: bool) -> Result<(), Failure> {
    let mut opened = open(options).await?;
    let query = TokenQuery { now: now(), ended_by: Some(before), ..TokenQuery::default() };
    let progress = Progress::new("reading");
    opened.admin.count_into(Arc::clone(&progress.count));
    let (mut digests, mut revoked) = (Vec::new(), 0_u64);
    let mut each = |record: TokenRecord| {
        revoked += u64::from(record.revoked.is_some());
        digests.push(record.digest);
        progress.set(digests.len() as u64);
        Ok(())
    };
    opened.admin.select(&query, &mut each).await?;
    let found = digests.len() as u64;
    let mut kept = 0;
    if is_meant {
        progress.step("deleting");
        // Somebody may have renewed one of them since it was read.
        let removed = opened.admin.remove(&digests, &query).await;
        kept = found.saturating_sub(removed?);
    }
    drop(progress);
    let expired = found - revoked;
    if options.json {
        say!(
            "{}",
            serde_json::json!({
                "ended_before": rfc3339(before), "tokens": found, "revoked": revoked, "expired": expired, "deleted": is_meant,
                "kept": kept
            })
        )?;
    } else {
        let which = format!("that ended before {}: {revoked} revoked, {expired} expired", rfc3339(before));
        match (found, is_meant) {
            (0, _) => say!("no token ended before {}", rfc3339(before))?,
            (_, true) if kept > 0 => {
                say!("deleted {} of {} {which}; {kept} changed meanwhile", found - kept, tokens(found))?;
            }
            (_, true) => say!("deleted {} {which}", tokens(found))?,
            (_, false) => say!("would delete {} {which}; --delete does it", tokens(found))?,
        }
    }
    opened.note_others();
    opened.name_unreadable();
    Ok(())
}

async fn block(options: &TokenOptions, user: &str, blocked: bool) -> Result<(), Failure> {
    let mut opened = open(options).await?;
    let name = plain(user);
    let works = |state: &str| TokenState::ALL.into_iter().any(|known| known.name() == state && known.works());
    let progress = Progress::new(if blocked { "blocking the user's tokens" } else { "unblocking the user's tokens" });
    opened.admin.count_into(Arc::clone(&progress.count));
    // What the tokens that were blocked are without that.
    let mut freed: BTreeMap<&str, usize> = BTreeMap::new();
    let (mut count, mut in_force, mut unchanged) = (0, 0, None);
    let mut before = |record: TokenRecord| {
        if record.blocked {
            *freed.entry(state(&TokenRecord { blocked: false, ..record })).or_default() += 1;
        }
        Ok(())
    };
    let mut now = |record: TokenRecord| {
        if count == 0 {
            progress.step("reading them again");
        }
        count += 1;
        progress.set(count);
        in_force += usize::from(works(state(&record)));
        if record.blocked != blocked {
            unchanged = Some(record.digest.id());
        }
        Ok(())
    };
    let changed = opened.admin.block_each(user, blocked, &mut before, &mut now).await;
    drop(progress);
    let changed = changed?;
    if count == 0 {
        let how = if blocked { "blocked" } else { "unblocked" };
        return Err(anyhow!("store {} has no token of \"{name}\": nobody was {how}", opened.store).into());
    }
    if let Some(id) = unchanged {
        return Err(anyhow!("store {}: accepted the change but does not return it for token {id}", opened.store).into());
    }
    if options.json {
        say!(
            "{}",
            serde_json::json!({
                "user": user, "blocked": blocked, "changed": changed, "tokens": count, "in_force": in_force
            })
        )?;
    } else if blocked {
        let before = match count.saturating_sub(changed) {
            0 => String::new(),
            _ if changed == 0 => ", as before".into(),
            before => format!(", {before} of them as before"),
        };
        say!("{} of {name} {} blocked{before}", tokens(count), if count == 1 { "is" } else { "are" })?;
    } else {
        let again: usize = freed.iter().filter(|(state, _)| works(state)).map(|(_, count)| count).sum();
        let still = |what: &str| match freed.get(what) {
            None => String::new(),
            Some(count) => format!("; {} {what}", if *count == 1 { "1 is".into() } else { format!("{count} are") }),
        };
        let rest: String =
            ["revoked", "expired", "not yet"].map(|what| still(what).replace("not yet", "not valid yet")).concat();
        match (freed.len(), again) {
            (0, _) => say!("no token of {name} was blocked")?,
            (_, 0) => say!("no token of {name} works again{rest}")?,
            (_, 1) => say!("1 token of {name} works again{rest}")?,
            (_, again) => say!("{again} tokens of {name} work again{rest}")?,
        }
    }
    opened.note_others();
    match opened.name_unreadable() {
        0 => Ok(()),
        count => {
            let how = if blocked { "blocked" } else { "unblocked" };
            let what = format!(
                "{} could not be read, and may be of {name}: correct or remove what is named above; {name} is \
                {how} but for these",
                tokens(count as u64)
            );
            Err(anyhow!(what).into())
        }
    }
}

fn tokens(count: u64) -> String {
    if count == 1 { "1 token".into() } else { format!("{count} tokens") }
}

async fn import(options: &TokenOptions, file: &std::path::Path) -> Result<(), Failure> {
    let mut opened = open_with(options, MissingStore::Create).await?;
    let input: Box<dyn BufRead + Send> = if file == std::path::Path::new("-") {
        Box::new(BufReader::new(std::io::stdin()))
    } else {
        Box::new(BufReader::new(std::fs::File::open(file).with_context(|| file.display().to_string())?))
    };
    let blocked = opened.admin.blocked_users().await?;
    let started = Instant::now();
    let progress = Progress::new("reading");
    let mut reading = Reading::new(input, now());
    let mut held_back: BTreeSet<String> = BTreeSet::new();
    // Atomic: an invalid entry leaves the store unchanged.
    let imported = {
        let mut records = std::iter::from_fn(|| {
            let next = reading.next();
            progress.set(reading.entries());
            let Some(mut next) = next else {
                progress.step("writing");
                return None;
            };
            if let Ok(record) = &mut next
                && !record.blocked
                && blocked.contains(&record.user)
            {
                record.blocked = true;
                held_back.insert(record.user.clone());
            }
            Some(next)
        });
        opened.admin.import(&mut records).await
    };
    drop(progress);
    let (imported, read) = (imported?, reading.entries());
    let (new, differing) = (imported.new, imported.differing);
    let seconds = started.elapsed().as_secs_f64();
    if options.json {
        say!(
            "{}",
            serde_json::json!({
                "read": read, "imported": new, "known": read - new, "differing": differing.count, "seconds": seconds
            })
        )?;
    } else {
        say!("{new} tokens imported, {} known before, in {seconds:.1} s", read - new)?;
    }
    if !held_back.is_empty() {
        let users = held_back.iter().map(|user| plain(user)).collect::<Vec<_>>().join(", ");
        eprintln!("note: users who are blocked here stay so, with their imported tokens: {users}");
    }
    match differing.count {
        0 => Ok(()),
        count => {
            let more = count - differing.named.len() as u64;
            let more = if more == 0 { String::new() } else { format!("\nand {more} more") };
            let named = differing.named.join("\n");
            Err(anyhow!("{count} of the known tokens differ from the input, and stay as they are:\n{named}{more}")
                .into())
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
}
