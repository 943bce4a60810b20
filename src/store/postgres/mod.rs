//! PostgreSQL: a schema of our own, or any table that is there already, through a query. Knows no configuration file and
//! no command line; what the bytes of a row mean is in `rows`, what servers say of changes in `follow`.

mod admin;
mod connect;
mod examine;
mod follow;
mod presets;
mod rows;
mod schema;
mod statements;

pub use admin::{Migrated, PostgresAdmin};
pub use connect::tls_auto;
pub use presets::{NoTriggers, removal_sql, run_triggers_sql, triggers_sql};
pub use statements::PostgresStatements;

use super::{Heard, LookupLimits, Secret, StoreError, TlsSettings, TokenRecord, TokenStore, feed};
use crate::problem::Problem;
use crate::store::credential::{Credential, Digest};
use crate::telemetry::metrics::StoreMetrics;
use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use connect::{Judgement, Object, PostgresPool, QueryFailure, Reuse, Target};
use futures_util::TryStreamExt as _;
use futures_util::future::join_all;
use sha2::{Digest as _, Sha256};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Row, Statement};

/// How much of GitLab's `db_key_base` goes into its digests.
const GITLAB_SECRET: usize = 32;
/// Tokens that are looked up together when lookups wait for their turn.
const LOOKUP_TOKENS: usize = 128;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PostgresSettings {
    /// `postgres://user@host:port/database`, libpq's keywords, or a folder with a socket as host.
    pub url: Secret,
    /// Takes the place of one in the URL.
    pub password: Option<Secret>,
    pub tls: TlsSettings,
    /// Connections for lookups; one more follows changes, and at its beginning, for a moment, a second one tries it.
    pub connections: usize,
    /// How long a lookup may take. The server ends a query that takes longer, also when nobody waits for it any more.
    pub timeout: Duration,
    /// How long a connection for lookups is kept while nothing is asked on it.
    pub idle: Duration,
    pub source: Source,
    /// The channel that tells of changes; `None`: they are not followed.
    pub channel: Option<String>,
    /// For records that name no scopes of their own.
    pub default_scopes: Vec<String>,
}

/// Where records stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// tollgate's own tables, in this schema.
    Own { schema: String },
    /// GitLab's `users.authentication_token`.
    GitlabLegacy,
    /// GitLab's `personal_access_tokens.token`.
    GitlabPat,
    /// GitLab's `personal_access_tokens.token_digest`, with its `db_key_base`.
    GitlabPatDigest(Secret),
    /// A query with one parameter.
    Lookup { sql: String, bind: Bind },
}

impl Source {
    /// The query to ask, where the tables are not ours, and what to ask it with.
    fn query(&self) -> Option<(String, Bind)> {
        Some(match self {
            Self::Own { .. } => return None,
            Self::GitlabLegacy => (presets::GITLAB_LEGACY.into(), Bind::Plain),
            Self::GitlabPat => (presets::gitlab_pat("token"), Bind::Plain),
            Self::GitlabPatDigest(secret) => (presets::gitlab_pat("token_digest"), Bind::Gitlab(secret.clone())),
            Self::Lookup { sql, bind } => (sql.clone(), bind.clone()),
        })
    }

    /// What the operator has to give for this source.
    fn problem(&self) -> Option<Problem> {
        if let Self::Own { schema } = self {
            return schema::check_name(schema).err();
        }
        if let Self::Lookup { sql, .. } = self {
            let instead = "write it like \"SELECT login AS user FROM public.people WHERE token = $1\"";
            if sql.trim().is_empty() {
                return Some(Problem::error("lookup", "is missing", instead));
            }
            if !sql.contains("$1") {
                let what = "has no $1, and must have exactly one parameter: it would find a row for whatever token";
                return Some(Problem::error("lookup", what, instead));
            }
            if sql.contains("$2") {
                return Some(Problem::error("lookup", "must be a query with exactly one parameter, $1", instead));
            }
        }
        match self.query() {
            Some((_, Bind::Gitlab(secret))) if secret.expose().chars().count() < GITLAB_SECRET => {
                let what = match secret.is_empty() {
                    true => "is missing: the digests hold a part of it".to_owned(),
                    false => {
                        format!("names a file with fewer than {GITLAB_SECRET} characters, which is not a db_key_base")
                    }
                };
                let instead = "name a file with the secret alone, without its name or quotes, from GitLab's \
                    config/secrets.yml or /etc/gitlab/gitlab-secrets.json";
                Some(Problem::error("db_key_base_file", what, instead))
            }
            _ => None,
        }
    }

    /// A GitLab token may do everything unless it says otherwise.
    const fn is_gitlab(&self) -> bool {
        matches!(self, Self::GitlabLegacy | Self::GitlabPat | Self::GitlabPatDigest(_))
    }
}

impl PostgresSettings {
    /// Everything that is wrong with these settings, without connecting to anything.
    pub fn problems(&self) -> Vec<Problem> {
        self.problems_but_tls().into_iter().chain(self.tls.problems()).collect()
    }

    fn problems_but_tls(&self) -> Vec<Problem> {
        let channel = self.channel.as_deref().and_then(|channel| schema::check_channel(channel).err());
        [connect::check_url(self).err(), self.source.problem(), channel, Problem::connections(self.connections)]
            .into_iter()
            .flatten()
            .collect()
    }

    /// Which records are meant: see [`super::StoreSettings::records`].
    pub(super) fn records(&self) -> String {
        // Its Debug form has dots for the key, which does not matter: with another key, other tokens have records.
        format!("postgres {} {:?} {:?}", connect::database_of(&self.url), self.source, self.default_scopes)
    }

    /// What building a store checks first. TLS is not among it: its certificates are read when they are put to use.
    fn check(&self) -> Result<(), Problem> {
        Problem::first_error(self.problems_but_tls())
    }
}

/// What a query is given for a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bind {
    /// The token itself, as text.
    Plain,
    /// 64 hex digits.
    Sha256Hex,
    /// 44 letters, padded.
    Sha256Base64,
    /// Base64 of the SHA-256 over the token and the first 32 characters of GitLab's `db_key_base`.
    Gitlab(Secret),
}

impl Bind {
    /// What GitLab would keep for a token.
    fn gitlab(secret: &Secret, token: &[u8]) -> [u8; 32] {
        let secret = secret.expose();
        let end = secret.char_indices().nth(GITLAB_SECRET).map_or(secret.len(), |(at, _)| at);
        Sha256::new().chain_update(token).chain_update(&secret[..end]).finalize().into()
    }

    /// `None`: no text column holds such a token.
    fn key(&self, credential: &Credential) -> Option<String> {
        let token = credential.expose_secret();
        match self {
            _ if token.is_empty() => None,
            Self::Plain => std::str::from_utf8(token).ok().filter(|text| !text.contains('\0')).map(str::to_owned),
            Self::Sha256Hex => Some(credential.digest().to_hex()),
            Self::Sha256Base64 => Some(BASE64.encode(credential.digest().as_bytes())),
            Self::Gitlab(secret) => Some(BASE64.encode(Self::gitlab(secret, token))),
        }
    }
}

pub struct PostgresStore {
    pool: PostgresPool,
    target: Arc<Target>,
    query: Query,
    nonce: QueryNonce,
    settings: PostgresSettings,
    metrics: Arc<StoreMetrics>,
    /// Not any more once nobody follows the store: a reload has replaced it, and whoever still asks it must not keep
    /// connections open for the next question.
    keeps_connections: AtomicBool,
    is_unregistered: AtomicBool,
}

/// A random text that every row of a result begins with. A prepared statement is run by its name alone: on a connection that
/// a pooler shares, the name may be another client's statement, and its result could make an unknown token valid.
struct QueryNonce(String);

impl QueryNonce {
    fn new() -> Result<Self, Problem> {
        nobody().map(Self).map_err(|failure| Problem::error("kind", failure.error.to_string(), ""))
    }

    /// Wraps an operator's query, so that it returns a row also if it finds nothing. The nonce is there only if the search
    /// path is tollgate's: a pooler may run the query on a connection with another one.
    fn around(&self, sql: &str) -> String {
        let sql = sql.trim_end().trim_end_matches(';');
        format!(
            "SELECT CASE WHEN pg_catalog.current_setting('search_path'::text) OPERATOR(pg_catalog.=) '{}'::text \
            THEN '{}'::text END AS tollgate_mark, found.* FROM (SELECT) one \
            LEFT JOIN (SELECT true AS tollgate_found, query.* FROM (\n{sql}\n) query) found ON true",
            connect::SEARCH_PATH,
            self.0
        )
    }

    fn check(&self, row: &Row) -> Result<(), QueryFailure> {
        match row.try_get::<_, &str>(0) {
            Ok(nonce) if nonce == self.0 => Ok(()),
            _ => Err(QueryFailure::anothers_answer()),
        }
    }
}

enum Query {
    Own { lookup: String, lookup_many: String, note_uses: String, which: String, schema: String },
    Lookup { sql: String, bind: Bind },
}

impl PostgresStore {
    /// Connects to nothing: only wrong settings are an error.
    pub fn new(mut settings: PostgresSettings, metrics: Arc<StoreMetrics>) -> Result<Self, Problem> {
        let target = Arc::new(Target::new(&settings)?);
        if settings.source.is_gitlab() && settings.default_scopes.is_empty() {
            settings.default_scopes.push("api".into());
        }
        let nonce = QueryNonce::new()?;
        let query = match (&settings.source, settings.source.query()) {
            (_, Some((sql, bind))) => Query::Lookup { sql: nonce.around(&sql), bind },
            (Source::Own { schema }, _) => {
                let fill = |sql: &str| schema::fill(sql, schema).replace("{mark}", &nonce.0);
                Query::Own {
                    lookup: fill(schema::LOOKUP),
                    lookup_many: fill(schema::LOOKUP_MANY),
                    note_uses: fill(schema::NOTE_USES),
                    which: fill(schema::WHICH),
                    schema: schema.clone(),
                }
            }
            _ => return Err(Problem::error("preset", "has no query", "report this fault of tollgate")),
        };
        let pool = connect::pool(&target, settings.connections, settings.timeout)?;
        Ok(Self {
            pool,
            target,
            query,
            nonce,
            settings,
            metrics,
            keeps_connections: AtomicBool::new(true),
            is_unregistered: AtomicBool::new(false),
        })
    }

    /// Puts a question on a pooled connection. One that was lost meanwhile is replaced and the question put again; a new
    /// connection has no such excuse.
    async fn ask(&self, query: &BoundQuery<'_>) -> Result<Vec<Row>, StoreError> {
        let answer = tokio::time::timeout(self.settings.timeout, self.ask_for_long(query)).await;
        answer.unwrap_or(Err(StoreError::Timeout))
    }

    async fn ask_for_long(&self, query: &BoundQuery<'_>) -> Result<Vec<Row>, StoreError> {
        loop {
            let lease = self.right_lease().await?;
            let rows = query.put(lease.connection()?, &self.nonce).await;
            if let Some(rows) = lease.ended(rows) {
                return rows.map_err(|failure| failure.without(query.hidden()));
            }
        }
    }

    /// The same for an operator's query and several keys: sent without waiting for an answer in between.
    async fn ask_for_each(&self, sql: &str, keys: &[&str]) -> Result<Vec<Result<Vec<Row>, StoreError>>, StoreError> {
        loop {
            let lease = self.right_lease().await?;
            let found = each(lease.connection()?, sql, keys, &self.nonce).await;
            if let Some(found) = lease.ended(found) {
                let hidden =
                    |failure: QueryFailure| keys.iter().fold(failure, |failure, key| failure.hiding(key)).error;
                let found = found.map_err(hidden)?;
                return Ok(found.into_iter().map(|one| one.map_err(hidden)).collect());
            }
        }
    }

    async fn lookup_each(
        &self,
        sql: &str,
        bind: &Bind,
        credentials: &[&Credential],
    ) -> Result<Vec<Result<Option<TokenRecord>, StoreError>>, StoreError> {
        let keys: Vec<Option<String>> = credentials.iter().map(|credential| bind.key(credential)).collect();
        let asked: Vec<&str> = keys.iter().flatten().map(String::as_str).collect();
        let answer = tokio::time::timeout(self.settings.timeout, self.ask_for_each(sql, &asked)).await;
        let mut found = answer.unwrap_or(Err(StoreError::Timeout))?.into_iter();
        let records = credentials.iter().zip(&keys).map(|(credential, key)| match key {
            None => Ok(None),
            Some(key) => match found.next() {
                Some(rows) => self.record_of(rows?.first(), credential, key),
                None => Err(StoreError::Unavailable("an answer is missing".into())),
            },
        });
        Ok(records.collect())
    }

    fn record_of(
        &self,
        row: Option<&Row>,
        credential: &Credential,
        key: &str,
    ) -> Result<Option<TokenRecord>, StoreError> {
        let Some(row) = row else { return Ok(None) };
        let record = rows::Columns::of(row.columns())
            .and_then(|columns| columns.record(row, *credential.digest(), &self.settings.default_scopes));
        record.map(Some).map_err(|failure| failure.without(key))
    }

    async fn lease(&self) -> Result<Lease<'_>, StoreError> {
        let result = self.pool.get().await;
        self.count_connections();
        match result {
            Ok(connection) => Ok(Lease { connection: Some(connection), store: self }),
            Err(error) => Err(connect::no_connection(error, &self.target)),
        }
    }

    /// A store that was replaced says nothing of its connections: the metric is its successor's.
    fn count_connections(&self) {
        if self.keeps_connections.load(Ordering::Relaxed) {
            let status = self.pool.status();
            self.metrics.connections(status.size, status.size.saturating_sub(status.available), status.max_size);
        }
    }

    /// Closes what was not used for long, but for one connection.
    async fn shrink(&self) {
        let mut ticks = tokio::time::interval(self.settings.idle / 4);
        loop {
            ticks.tick().await;
            let mut kept = 0;
            drop(self.pool.retain(|_, used| {
                let stays = kept == 0 || used.last_used() < self.settings.idle;
                kept += usize::from(stays);
                stays
            }));
            self.count_connections();
        }
    }

    fn close_idle_connections(&self) {
        drop(self.pool.retain(|_, _| false));
    }

    /// A connection to the server that changes are heard from; while they are not, to any.
    async fn right_lease(&self) -> Result<Lease<'_>, StoreError> {
        loop {
            let lease = self.lease().await?;
            match self.target.judge(lease.connection()?) {
                Judgement::Good => return Ok(lease),
                Judgement::Another => {}
                Judgement::Astray => return Err(self.target.say_astray()),
            }
        }
    }
}

/// A query with its parameters.
enum BoundQuery<'a> {
    /// On tollgate's own tables.
    Own { sql: &'a str, parameters: &'a [&'a (dyn ToSql + Sync)] },
    /// On other tables. Its result is one row or none.
    Lookup { sql: &'a str, key: &'a str },
}

impl BoundQuery<'_> {
    /// What no error may repeat.
    const fn hidden(&self) -> &str {
        match self {
            Self::Own { .. } => "",
            Self::Lookup { key, .. } => key,
        }
    }

    async fn put(&self, connection: &Object, nonce: &QueryNonce) -> Result<Vec<Row>, QueryFailure> {
        match self {
            Self::Own { sql, parameters } => {
                let statement = connection.prepare_cached(sql).await.map_err(QueryFailure::own)?;
                let rows = connection.query(&statement, parameters).await.map_err(QueryFailure::own)?;
                rows.iter().try_for_each(|row| nonce.check(row)).map(|()| rows)
            }
            Self::Lookup { sql, key } => {
                let statement = lookup_statement(connection, sql, nonce).await?;
                one(connection, &statement, key, nonce).await
            }
        }
    }
}

/// An operator's query, which is tried on a new connection.
async fn lookup_statement(connection: &Object, sql: &str, nonce: &QueryNonce) -> Result<Statement, QueryFailure> {
    let statement = connection.prepare_typed_cached(sql, &[Type::TEXT]).await.map_err(QueryFailure::lookup)?;
    // Also before there is a row: a query that can't answer is not one that finds nobody.
    rows::Columns::of(statement.columns())?;
    if Object::metrics(connection).recycle_count == 0 {
        // A query that finds somebody for a token that nobody has would let everybody in.
        if !one(connection, &statement, &nobody()?, nonce).await?.is_empty() {
            return Err(QueryFailure::unusable(
                "the lookup query finds a row for a token that nobody has: compare a column with $1 in its WHERE",
            ));
        }
    }
    Ok(statement)
}

/// What an operator's query finds for each key. A failure of the connection is one of all.
async fn each(
    connection: &Object,
    sql: &str,
    keys: &[&str],
    nonce: &QueryNonce,
) -> Result<Vec<Result<Vec<Row>, QueryFailure>>, QueryFailure> {
    let statement = lookup_statement(connection, sql, nonce).await?;
    let found = join_all(keys.iter().map(|key| one(connection, &statement, key, nonce))).await;
    let (mut all, mut last) = (Vec::with_capacity(found.len()), None);
    for one in found {
        match one {
            Err(failure) if failure.connection != Reuse::Keep => last = Some(failure),
            one => all.push(one),
        }
    }
    match last {
        // Garbage for one token says nothing of the others, which are asked for again one by one.
        Some(failure) => Err(failure),
        None => Ok(all),
    }
}

/// The one row of an answer, or none. Two are no answer: which one holds?
async fn one(
    connection: &Object,
    statement: &Statement,
    key: &str,
    nonce: &QueryNonce,
) -> Result<Vec<Row>, QueryFailure> {
    let mut rows = pin!(connection.query_raw(statement, [key]).await.map_err(QueryFailure::lookup)?);
    let mut found = Vec::new();
    while let Some(row) = rows.try_next().await.map_err(QueryFailure::lookup)? {
        nonce.check(&row)?;
        if !found.is_empty() {
            // More may be on their way: the connection is not used again.
            return Err(QueryFailure::garbage(
                "two rows for one token, and no telling which one holds: make the column unique",
            ));
        }
        found.push(row);
    }
    if found.is_empty() {
        return Err(QueryFailure::anothers_answer());
    }
    found.retain(|row| row.try_get::<_, bool>(1).is_ok());
    Ok(found)
}

/// Text that no table holds.
fn nobody() -> Result<String, QueryFailure> {
    let mut random = [0; 32];
    getrandom::fill(&mut random).map_err(|_| QueryFailure::garbage("the operating system gives no random numbers"))?;
    Ok(Digest::from_bytes(random).to_hex())
}

#[async_trait]
impl TokenStore for PostgresStore {
    fn lookup_limits(&self) -> LookupLimits {
        LookupLimits { at_once: self.settings.connections, tokens: LOOKUP_TOKENS }
    }

    async fn lookup(&self, credential: &Credential) -> Result<Option<TokenRecord>, StoreError> {
        match &self.query {
            Query::Own { lookup, .. } => {
                let digest = credential.digest().as_bytes().as_slice();
                let rows = self.ask(&BoundQuery::Own { sql: lookup, parameters: &[&digest] }).await?;
                schema::found(&rows).map_err(|failure| failure.error)
            }
            Query::Lookup { sql, bind } => {
                let Some(key) = bind.key(credential) else { return Ok(None) };
                let rows = self.ask(&BoundQuery::Lookup { sql, key: &key }).await?;
                self.record_of(rows.first(), credential, &key)
            }
        }
    }

    async fn lookup_many(&self, credentials: &[&Credential]) -> Vec<Result<Option<TokenRecord>, StoreError>> {
        let answer = match &self.query {
            Query::Own { lookup_many, .. } => {
                let digests: Vec<&[u8]> =
                    credentials.iter().map(|credential| credential.digest().as_bytes().as_slice()).collect();
                let rows = self.ask(&BoundQuery::Own { sql: lookup_many, parameters: &[&digests] }).await;
                rows.and_then(|rows| {
                    let wanted = credentials.iter().map(|credential| *credential.digest());
                    schema::found_many(&rows, wanted).map_err(|failure| failure.error)
                })
            }
            Query::Lookup { sql, bind } => self.lookup_each(sql, bind, credentials).await,
        };
        match answer {
            Ok(found) => found,
            // One that can't be read must not keep the others from an answer.
            Err(StoreError::Garbage(_)) => {
                let mut found = Vec::with_capacity(credentials.len());
                for credential in credentials {
                    found.push(self.lookup(credential).await);
                }
                found
            }
            Err(error) => vec![Err(error); credentials.len()],
        }
    }

    fn handle(&self, credential: &Credential) -> Option<Digest> {
        match &self.query {
            Query::Lookup { bind: Bind::Gitlab(secret), .. } => {
                Some(Digest::from_bytes(Bind::gitlab(secret, credential.expose_secret())))
            }
            _ => None,
        }
    }

    fn tells_changes(&self) -> bool {
        self.settings.channel.is_some()
    }

    fn stay_unregistered(&self) {
        self.is_unregistered.store(true, Ordering::Relaxed);
    }

    async fn follow(&self, heard: Heard<'_>) {
        let _in_use = CurrentStore::new(self);
        match &self.settings.channel {
            Some(channel) => {
                let registers = !self.is_unregistered.load(Ordering::Relaxed);
                let metrics = Arc::clone(&self.metrics);
                let changes =
                    follow::PostgresChanges::new(&self.target, &self.settings.source, channel, registers, metrics);
                tokio::join!(feed::follow(changes, crate::clock::now, heard), self.shrink());
            }
            None => self.shrink().await,
        }
    }

    async fn changed_since(&self, mark: &str) -> Result<Option<Vec<Digest>>, StoreError> {
        let Query::Own { which, schema, .. } = &self.query else { return Ok(None) };
        let Some((since, oldest)) = schema::read_mark(mark) else { return Ok(None) };
        let version = self.ask(&BoundQuery::Own { sql: which, parameters: &[] }).await?;
        let version = schema::which(&version).map_err(|failure| failure.error)?;
        let sql = schema::fill(&schema::changed_sql(version), schema).replace("{mark}", &self.nonce.0);
        let rows = self.ask(&BoundQuery::Own { sql: &sql, parameters: &[&since, &oldest] }).await?;
        schema::changed(&rows).map_err(|failure| failure.error)
    }

    async fn note_uses(&self, mut uses: Vec<(Digest, u64)>) -> Result<(), StoreError> {
        let Query::Own { note_uses, .. } = &self.query else { return Ok(()) };
        // In one order everywhere, so that gateways don't wait for each other in circles.
        uses.sort_unstable_by_key(|(digest, _)| *digest.as_bytes());
        let digests: Vec<&[u8]> = uses.iter().map(|(digest, _)| digest.as_bytes().as_slice()).collect();
        let times: Vec<i64> = uses.iter().map(|(_, at)| i64::try_from(at / 1000).unwrap_or(i64::MAX)).collect();
        self.ask(&BoundQuery::Own { sql: note_uses, parameters: &[&digests, &times] }).await.map(drop)
    }
}

/// While somebody follows a store, it is the current one and keeps its connections.
struct CurrentStore<'a>(&'a PostgresStore);

impl<'a> CurrentStore<'a> {
    fn new(store: &'a PostgresStore) -> Self {
        store.keeps_connections.store(true, Ordering::Release);
        Self(store)
    }
}

impl Drop for CurrentStore<'_> {
    fn drop(&mut self) {
        self.0.keeps_connections.store(false, Ordering::Release);
        self.0.close_idle_connections();
    }
}

/// A pooled connection in use. It goes back to the pool only when it is said to be clean: a lookup may be dropped at
/// any moment, and the next one must not wait for the answer to this one's question.
struct Lease<'a> {
    connection: Option<Object>,
    store: &'a PostgresStore,
}

impl Lease<'_> {
    fn connection(&self) -> Result<&Object, StoreError> {
        self.connection.as_ref().ok_or_else(|| StoreError::Unavailable("its connection is gone".into()))
    }

    fn reused(&self) -> bool {
        self.connection.as_ref().is_some_and(|connection| Object::metrics(connection).recycle_count > 0)
    }

    fn give_back(mut self) {
        if self.store.keeps_connections.load(Ordering::Acquire) {
            drop(self.connection.take());
            // It may have been replaced in this very moment.
            if !self.store.keeps_connections.load(Ordering::Acquire) {
                self.store.close_idle_connections();
            }
        }
    }

    /// What a question came to. `None`: the connection was lost, and another one may succeed.
    fn ended<T>(self, result: Result<T, QueryFailure>) -> Option<Result<T, QueryFailure>> {
        let reused = self.reused();
        match &result {
            Ok(_) => self.give_back(),
            Err(failure) if failure.connection == Reuse::Replace && reused => return None,
            // A new connection counts as tried once it has answered something.
            Err(failure) if failure.connection == Reuse::Keep && reused => self.give_back(),
            Err(_) => {}
        }
        Some(result)
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            drop(Object::take(connection));
        }
        self.store.count_connections();
    }
}
