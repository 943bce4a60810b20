//! tollgate's own tables in PostgreSQL: creation and migration, and the queries on them.

use super::super::record::{self, FieldValue, RecordField, RecordSource, Unsaid};
use super::super::{StoreError, TokenRecord};
use super::connect::{MIGRATE, QueryFailure};
use crate::problem::Problem;
use crate::store::credential::Digest;
use bytes::BytesMut;
use std::collections::HashMap;
use std::error::Error;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, to_sql_checked};
use tokio_postgres::{Client, GenericClient, Row, SimpleQueryMessage};

/// Numbered from 1, and never changed once released.
const MIGRATIONS: &[&str] =
    &[include_str!("1.sql"), include_str!("2.sql"), include_str!("3.sql"), include_str!("4.sql")];
/// The triggers of the newest version. Run whenever they are not as they should be.
const TRIGGERS: &str = include_str!("triggers.sql");
/// The schema version that this version creates.
const VERSION: i32 = MIGRATIONS.len() as i32;
/// The oldest schema version that this version can read.
const OLDEST: i32 = 1;
/// Keeps two migrations from running at once: "tollgate" in hex digits that fit.
const LOCK: i64 = 0x746f_6c6c_6761_7465;

/// Returns one row whenever the schema exists, so that an empty result never means "no such token". As in all queries
/// of a gateway, every name is qualified with its schema, including operators, in addition to the connection's
/// search_path, which a pooler may lose.
pub(super) const LOOKUP: &str = "SELECT '{mark}'::text, v.version, v.readers_from, t.digest, t.\"user\", t.scopes, \
    t.description, t.created, t.not_before, t.expires, t.revoked, t.blocked, t.superseded, t.replaces, t.last_used, \
    {terms} FROM {no_terms}, {schema}.version v LEFT JOIN {schema}.token t ON t.digest OPERATOR(pg_catalog.=) $1::bytea";
/// The same for several digests, whose rows come in any order.
pub(super) const LOOKUP_MANY: &str = "SELECT '{mark}'::text, v.version, v.readers_from, t.digest, t.\"user\", t.scopes, \
    t.description, t.created, t.not_before, t.expires, t.revoked, t.blocked, t.superseded, t.replaces, t.last_used, \
    {terms} FROM {no_terms}, {schema}.version v LEFT JOIN {schema}.token t ON t.digest OPERATOR(pg_catalog.=) ANY ($1::bytea[])";
/// The digest, and the fields of a record in their order.
pub(super) const COLUMNS: &str = "digest, \"user\", scopes, description, created, not_before, expires, revoked, blocked, \
    superseded, replaces, last_used, plan, rate, networks, methods";
/// The first version whose tables have the columns of a token's terms, which are the last of [`COLUMNS`].
const TERMS_SINCE: i32 = 4;
/// [`COLUMNS`] as older tables have them.
const COLUMNS_BEFORE_TERMS: &str = "digest, \"user\", scopes, description, created, not_before, expires, revoked, blocked, \
    superseded, replaces, last_used";
/// What is read of older tables.
const NO_TERMS: &str = "''::text AS plan, ''::text AS rate, '{}'::text[] AS networks, '{}'::text[] AS methods";
/// The terms in a lookup, whatever the version of the tables, which may change under a prepared statement: a column that the
/// table does not have is found further out, in `no_terms`.
const LOOKUP_TERMS: &str = "(SELECT plan FROM (SELECT t.*) AS own), (SELECT rate FROM (SELECT t.*) AS own), \
    (SELECT networks FROM (SELECT t.*) AS own), (SELECT methods FROM (SELECT t.*) AS own)";
pub(super) const COLUMNS_COUNT: usize = RecordField::ALL.len() + 1;
pub(super) const NOTE_USES: &str = "UPDATE {schema}.token t SET last_used = u.at \
    FROM ROWS FROM (pg_catalog.unnest($1::bytea[]), pg_catalog.unnest($2::bigint[])) AS u (digest, at) \
    WHERE t.digest OPERATOR(pg_catalog.=) u.digest \
    AND (t.last_used IS NULL OR t.last_used OPERATOR(pg_catalog.<) u.at)";
/// A mark is the server's time and the oldest transaction in progress at that time: everything not visible at that
/// moment was written by this or a later transaction. (Transaction numbers wrap around; half of the range counts as
/// later.)
pub(super) const MARK: &str = "(extract(epoch FROM pg_catalog.clock_timestamp())::float8 OPERATOR(pg_catalog.*) \
    1000::float8)::bigint::text OPERATOR(pg_catalog.||) ' '::text OPERATOR(pg_catalog.||) \
    (pg_catalog.txid_snapshot_xmin(pg_catalog.txid_current_snapshot()) OPERATOR(pg_catalog.&) 4294967295::bigint)::text";
/// A change is recorded when it is made and becomes visible when its transaction ends: the additional minute, and the
/// transactions that were in progress, cover the time between. The first row says whether the list reaches back far
/// enough.
const CHANGED: &str = "SELECT '{mark}'::text, NULL::bytea, v.version, v.readers_from, \
    $1::bigint OPERATOR(pg_catalog.>=) v.since_ms \
    AND ($1::bigint OPERATOR(pg_catalog.-) 60000::bigint) OPERATOR(pg_catalog.>=) \
    ((extract(epoch FROM pg_catalog.clock_timestamp())::float8 OPERATOR(pg_catalog.*) 1000::float8)::bigint \
    OPERATOR(pg_catalog.-) 3540000::bigint) \
    FROM {schema}.version v \
    UNION ALL \
    (SELECT DISTINCT '{mark}'::text, {digests}, NULL::integer, NULL::integer, {digests} IS NOT NULL \
    FROM {schema}.change c WHERE c.at_ms OPERATOR(pg_catalog.>=) ($1::bigint OPERATOR(pg_catalog.-) 60000::bigint) \
    OR ((c.xmin::text::bigint OPERATOR(pg_catalog.-) $2::bigint OPERATOR(pg_catalog.+) 4294967296::bigint) \
    OPERATOR(pg_catalog.%) 4294967296::bigint) OPERATOR(pg_catalog.<) 2147483648::bigint)";

/// The first version whose list of changes can be read behind a snapshot.
pub(super) const LISTED_SINCE: i32 = 3;
/// Which triggers of the token table do not fire, which of their functions are other than they were made, and what to do about
/// it; NULL: all is as it should be. Gateways may not write tokens, so that they look at the path instead of using it.
const OFF: &str = "(SELECT pg_catalog.string_agg(w.what, '; '::text) FROM (\
    SELECT pg_catalog.format('trigger %s of table {schema}.token is %s'::text, w.name, \
    CASE WHEN t.tgname IS NULL THEN 'missing: `tollgate store migrate --config FILE` makes it'::text \
    ELSE pg_catalog.format('off: `ALTER TABLE {schema}.token ENABLE %s %s` switches it on'::text, w.how, w.name) END) \
    AS what FROM (VALUES ('tollgate_added'::text, 'O'::text, 'TRIGGER'::text), \
    ('tollgate_removed'::text, 'O'::text, 'TRIGGER'::text), ('tollgate_altered'::text, 'O'::text, 'TRIGGER'::text), \
    ('tollgate_emptied'::text, 'O'::text, 'ALWAYS TRIGGER'::text), \
    ('tollgate_replicated'::text, 'R'::text, 'REPLICA TRIGGER'::text), \
    ('tollgate_replicated_change'::text, 'R'::text, 'REPLICA TRIGGER'::text)) AS w (name, mode, how) \
    LEFT JOIN pg_catalog.pg_trigger t ON t.tgrelid OPERATOR(pg_catalog.=) \
    '{schema}.token'::pg_catalog.regclass::pg_catalog.oid AND t.tgname::text OPERATOR(pg_catalog.=) w.name \
    WHERE (t.tgenabled::text OPERATOR(pg_catalog.=) ANY (ARRAY['A'::text, w.mode])) IS NOT TRUE \
    UNION ALL \
    SELECT pg_catalog.format('function {schema}.%s is not as it was made: `tollgate store migrate --config FILE` makes it again'\
    ::text, f.name) FROM (VALUES ('tell'::text), ('token_added'::text), ('token_removed'::text), ('token_altered'::text), \
    ('token_emptied'::text), ('token_replicated'::text)) AS f (name) \
    WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_proc p WHERE p.proname::text OPERATOR(pg_catalog.=) f.name \
    AND p.pronamespace OPERATOR(pg_catalog.=) (SELECT c.relnamespace FROM pg_catalog.pg_class c \
    WHERE c.oid OPERATOR(pg_catalog.=) '{schema}.token'::pg_catalog.regclass::pg_catalog.oid) \
    AND pg_catalog.obj_description(p.oid, 'pg_proc'::name) OPERATOR(pg_catalog.=) ('tollgate '::text \
    OPERATOR(pg_catalog.||) pg_catalog.encode(pg_catalog.sha256(pg_catalog.convert_to(p.prosrc, 'UTF8'::name)), 'hex'::text)))\
    ) AS w (what))";
/// What a gateway asks again and again, in one snapshot: first how things are, then what changed behind an earlier
/// snapshot, then who waits for a confirmation. It takes no transaction id. Rows of `change` that another server has
/// numbered, as after a restore, have been seen by no snapshot of this one.
const LIST: &str = "SELECT 'state'::text, {mark}, pg_catalog.txid_current_snapshot()::text, \
    pg_catalog.pg_notification_queue_usage()::text, v.version::text, v.channel, {off}, \
    (extract(epoch FROM pg_catalog.statement_timestamp())::float8 OPERATOR(pg_catalog.*) 1000::float8)::bigint::text, \
    '{schema}.token'::pg_catalog.regclass::pg_catalog.oid::text FROM {schema}.version v \
    UNION ALL SELECT 'change'::text, c.at_ms::text, pg_catalog.encode(coalesce(c.digests, c.digest), 'hex'::text), \
    c.pid::text, NULL::text, NULL::text, NULL::text, NULL::text, NULL::text FROM {schema}.change c WHERE {behind} \
    UNION ALL SELECT 'wait'::text, w.id, NULL::text, NULL::text, NULL::text, NULL::text, NULL::text, NULL::text, NULL::text \
    FROM {schema}.wait w WHERE NOT EXISTS (SELECT FROM {schema}.confirmation n \
    WHERE n.wait OPERATOR(pg_catalog.=) w.id AND n.replica OPERATOR(pg_catalog.=) '{replica}'::text)";

/// [`LIST`] for a gateway. `seen`: the snapshot of the last look, if there was one.
pub(super) fn list_sql(schema: &str, replica: &str, seen: Option<&str>) -> String {
    let behind = seen.and_then(|seen| Some((seen.split_once(':')?.0, seen))).map_or_else(
        || "false".to_owned(),
        |(oldest, seen)| {
            format!(
                "c.tx OPERATOR(pg_catalog.>=) {oldest}::bigint \
                AND NOT pg_catalog.txid_visible_in_snapshot(c.tx, '{seen}'::pg_catalog.txid_snapshot) \
                AND pg_catalog.txid_visible_in_snapshot(c.tx, pg_catalog.txid_current_snapshot())"
            )
        },
    );
    let sql = LIST.replace("{mark}", MARK).replace("{off}", OFF).replace("{behind}", &behind);
    fill(&sql.replace("{replica}", replica), schema)
}

/// The answer to [`LIST`].
pub(super) struct ChangesSeen {
    pub(super) mark: String,
    pub(super) snapshot: String,
    /// The part of the server's notification queue that is in use.
    pub(super) queue: f64,
    pub(super) version: i32,
    pub(super) channel: String,
    /// Triggers that do not fire.
    pub(super) off: Option<String>,
    pub(super) at_ms: u64,
    /// Which table the tokens are in: another one after a restore.
    pub(super) table: String,
    pub(super) changes: Vec<ListedChange>,
    pub(super) waits: Vec<String>,
}

/// A row of `change`.
pub(super) struct ListedChange {
    pub(super) at_ms: u64,
    /// Digests one after the other; `None`: everything.
    pub(super) hex: Option<String>,
    /// The server process that wrote it.
    pub(super) pid: Option<i32>,
}

impl ChangesSeen {
    pub(super) fn read(answer: &[SimpleQueryMessage]) -> Result<Self, QueryFailure> {
        let misread = || QueryFailure::unusable(format!("the list of changes cannot be read: {MIGRATE}"));
        let (mut seen, mut changes, mut waits) = (None, Vec::new(), Vec::new());
        for message in answer {
            let SimpleQueryMessage::Row(row) = message else { continue };
            let text = |at: usize| row.try_get(at).ok().flatten();
            let need = |at: usize| text(at).ok_or_else(misread);
            let number = |at: usize| need(at)?.parse::<u64>().map_err(|_| misread());
            match need(0)? {
                "state" => {
                    let snapshot = need(2)?;
                    if !snapshot.bytes().all(|byte| byte.is_ascii_digit() || byte == b':' || byte == b',') {
                        return Err(misread());
                    }
                    seen = Some(Self {
                        mark: need(1)?.to_owned(),
                        snapshot: snapshot.to_owned(),
                        queue: need(3)?.parse().map_err(|_| misread())?,
                        version: need(4)?.parse().map_err(|_| misread())?,
                        channel: need(5)?.to_owned(),
                        off: text(6).map(str::to_owned),
                        at_ms: number(7)?,
                        table: need(8)?.to_owned(),
                        changes: Vec::new(),
                        waits: Vec::new(),
                    });
                }
                "change" => changes.push(ListedChange {
                    at_ms: number(1)?,
                    hex: text(2).map(str::to_owned),
                    pid: text(3).and_then(|pid| pid.parse().ok()),
                }),
                _ => waits.push(need(1)?.to_owned()),
            }
        }
        let seen =
            seen.ok_or_else(|| QueryFailure::unusable(format!("the schema doesn't say its version: {MIGRATE}")))?;
        Ok(Self { changes, waits, ..seen })
    }
}

/// Which version the tables have, for [`changed_sql`].
pub(super) const WHICH: &str = "SELECT '{mark}'::text, v.version FROM {schema}.version v";

/// [`CHANGED`] for tables of a version.
pub(super) fn changed_sql(version: i32) -> String {
    CHANGED.replace("{digests}", if version < LISTED_SINCE { "c.digest" } else { "coalesce(c.digests, c.digest)" })
}

/// The answer to [`WHICH`].
pub(super) fn which(rows: &[Row]) -> Result<i32, QueryFailure> {
    let none = || QueryFailure::unusable(format!("the schema doesn't say its version: {MIGRATE}"));
    rows.first().ok_or_else(none)?.try_get(1).map_err(misread)
}

/// The result of [`MARK`].
pub(super) fn read_mark(mark: &str) -> Option<(i64, i64)> {
    let (at_ms, oldest) = mark.split_once(' ')?;
    Some((at_ms.parse().ok()?, oldest.parse().ok()?))
}

/// Names are inserted into SQL: only names that never need quoting are allowed.
pub(super) fn check_name(schema: &str) -> Result<(), Problem> {
    let fine = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    let starts = schema.starts_with(|c: char| c.is_ascii_lowercase() || c == '_');
    if schema.len() > 40 || !starts || !schema.chars().all(fine) || schema.starts_with("pg_") {
        let what = "must be up to 40 of a-z, 0-9 and _, and not begin with a digit or pg_";
        return Err(Problem::error("schema", what, "write it like \"tollgate\""));
    }
    Ok(())
}

pub(super) fn check_channel(channel: &str) -> Result<(), Problem> {
    let fine = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    if channel.is_empty() || channel.len() > 40 || !channel.chars().all(fine) {
        let what = "must be up to 40 letters, digits, _, - and .";
        return Err(Problem::error("channel", what, "write it like \"tollgate_change\""));
    }
    Ok(())
}

pub(super) fn fill(sql: &str, schema: &str) -> String {
    let sql = sql.replace("{terms}", LOOKUP_TERMS).replace("{no_terms}", &format!("(SELECT {NO_TERMS}) AS no_terms"));
    sql.replace("{schema}", &format!("\"{schema}\""))
}

/// [`COLUMNS`], read from tables of a version; with an alias in a query, like `t.`.
pub(super) fn columns_read(version: i32, table: &str) -> String {
    let of =
        |columns: &str| columns.split(", ").map(|column| format!("{table}{column}")).collect::<Vec<_>>().join(", ");
    if version < TERMS_SINCE { format!("{}, {NO_TERMS}", of(COLUMNS_BEFORE_TERMS)) } else { of(COLUMNS) }
}

/// Those of [`COLUMNS`] that are written to tables of a version.
pub(super) fn columns_written(version: i32) -> &'static str {
    if version < TERMS_SINCE { COLUMNS_BEFORE_TERMS } else { COLUMNS }
}

/// Of an import: that the input `g` says something of a token's terms, and the table `k` something else.
pub(super) fn differing_terms(version: i32) -> &'static str {
    if version < TERMS_SINCE {
        return "";
    }
    " OR (g.plan, g.rate, g.networks, g.methods) <> ('', '', '{}'::text[], '{}'::text[]) \
      AND (g.plan, g.rate, g.networks, g.methods) <> (k.plan, k.rate, k.networks, k.methods)"
}

/// Whether tables of a version can keep all that a record says.
pub(super) fn keeps(version: i32, record: &TokenRecord) -> Result<(), String> {
    if version < TERMS_SINCE && record.terms.is_some() {
        return Err(format!(
            "the tables are of version {version}, which keeps no plan, rate, networks and methods of a token: {MIGRATE}"
        ));
    }
    Ok(())
}

/// Whether this version can read a schema version.
pub(super) fn check_version(version: i32, readers_from: i32) -> Result<(), QueryFailure> {
    if version < OLDEST {
        return Err(QueryFailure::unusable(format!("the tables are of version {version} and too old: {MIGRATE}")));
    }
    if readers_from > VERSION {
        return Err(QueryFailure::unusable(format!(
            "the tables are of version {version}, made by a newer tollgate; this one knows {VERSION}: upgrade it, or {MIGRATE} \
             of the right version"
        )));
    }
    Ok(())
}

/// The answer to [`LOOKUP`].
pub(super) fn found(rows: &[Row]) -> Result<Option<TokenRecord>, QueryFailure> {
    let [row] = rows else {
        return Err(QueryFailure::unusable(format!("the schema doesn't say its version: {MIGRATE}")));
    };
    let [version, readers_from] = [1, 2].map(|at| row.try_get::<_, i32>(at));
    check_version(version.map_err(misread)?, readers_from.map_err(misread)?)?;
    if row.try_get::<_, Option<&[u8]>>(3).map_err(misread)?.is_none() {
        return Ok(None);
    }
    record(row, 3).map(Some)
}

/// The answer to [`LOOKUP_MANY`]: one for each of the digests, in their order.
pub(super) fn found_many(
    rows: &[Row],
    wanted: impl Iterator<Item = Digest>,
) -> Result<Vec<Result<Option<TokenRecord>, StoreError>>, QueryFailure> {
    if rows.is_empty() {
        return Err(QueryFailure::unusable(format!("the schema doesn't say its version: {MIGRATE}")));
    }
    let mut found = HashMap::with_capacity(rows.len());
    for row in rows {
        let [version, readers_from] = [1, 2].map(|at| row.try_get::<_, i32>(at));
        check_version(version.map_err(misread)?, readers_from.map_err(misread)?)?;
        if let Some(digest) = digest(row, 3)? {
            found.insert(digest, record(row, 3).map(Some).map_err(|failure| failure.error));
        }
    }
    // The same token may be wanted twice, by two paths into the queue.
    Ok(wanted.map(|digest| found.get(&digest).cloned().unwrap_or(Ok(None))).collect())
}

/// The answer to [`CHANGED`].
pub(super) fn changed(rows: &[Row]) -> Result<Option<Vec<Digest>>, QueryFailure> {
    let Some((first, rest)) = rows.split_first() else {
        return Err(QueryFailure::unusable(format!("the schema doesn't say its version: {MIGRATE}")));
    };
    check_version(first.try_get(2).map_err(misread)?, first.try_get(3).map_err(misread)?)?;
    for row in rows {
        // The list does not reach back far enough, or contains a change of everything.
        if !row.try_get::<_, bool>(4).map_err(misread)? {
            return Ok(None);
        }
    }
    let mut digests = Vec::new();
    for row in rest {
        let bytes = row.try_get::<_, Option<&[u8]>>(1).map_err(misread)?.unwrap_or_default();
        digests.extend(
            split_digests(bytes)
                .ok_or_else(|| QueryFailure::garbage("a change whose digests are not 32 bytes long"))?,
        );
    }
    Ok(Some(digests))
}

/// Digests that stand one after the other: at least one.
fn split_digests(bytes: &[u8]) -> Option<impl Iterator<Item = Digest>> {
    let (digests, []) = bytes.as_chunks::<32>() else { return None };
    (!digests.is_empty()).then(|| digests.iter().copied().map(Digest::from_bytes))
}

fn misread(_: tokio_postgres::Error) -> QueryFailure {
    QueryFailure::unusable(format!("a value in tollgate's tables is of another type than it was made with: {MIGRATE}"))
}

fn digest(row: &Row, at: usize) -> Result<Option<Digest>, QueryFailure> {
    let bytes: Option<&[u8]> = row.try_get(at).map_err(misread)?;
    let bytes = bytes.map(|bytes| bytes.try_into().map(Digest::from_bytes)).transpose();
    bytes.map_err(|_| QueryFailure::garbage("a digest that is not 32 bytes long"))
}

/// Reads [`COLUMNS`], beginning at a column.
pub(super) fn record(row: &Row, from: usize) -> Result<TokenRecord, QueryFailure> {
    let digest = digest(row, from)?.ok_or_else(|| QueryFailure::garbage("a record without a digest"))?;
    record::read(digest, &OwnRow { row, from }, &Unsaid::NOTHING)
}

/// A row of tollgate's own table, from a column on.
struct OwnRow<'a> {
    row: &'a Row,
    from: usize,
}

impl OwnRow<'_> {
    fn get<'a, T: FromSql<'a>>(&'a self, field: RecordField) -> Result<Option<T>, QueryFailure> {
        self.row.try_get(self.from + field.column()).map_err(misread)
    }
}

impl RecordSource for OwnRow<'_> {
    type Error = QueryFailure;

    fn text(&self, field: RecordField) -> Result<Option<String>, QueryFailure> {
        self.get(field)
    }

    fn words(&self, field: RecordField) -> Result<Option<Vec<String>>, QueryFailure> {
        self.get(field)
    }

    fn time(&self, field: RecordField) -> Result<Option<u64>, QueryFailure> {
        let seconds = self.get::<i64>(field)?.map(u64::try_from).transpose();
        seconds.map_err(|_| QueryFailure::garbage("a time before 1970 in tollgate's tables"))
    }

    fn flag(&self, field: RecordField) -> Result<Option<bool>, QueryFailure> {
        self.get(field)
    }

    fn digest(&self, field: RecordField) -> Result<Option<Digest>, QueryFailure> {
        digest(self.row, self.from + field.column())
    }

    fn wrong(&self, field: RecordField, what: &'static str) -> QueryFailure {
        QueryFailure::garbage(format!("{} {what}", field.name()))
    }

    fn missing(&self, _: RecordField) -> QueryFailure {
        QueryFailure::garbage("a token without a user in tollgate's tables")
    }
}

/// The types of [`COLUMNS`].
pub(super) const TYPES: [Type; COLUMNS_COUNT] = [
    Type::BYTEA,
    Type::TEXT,
    Type::TEXT_ARRAY,
    Type::TEXT,
    Type::INT8,
    Type::INT8,
    Type::INT8,
    Type::INT8,
    Type::BOOL,
    Type::INT8,
    Type::BYTEA,
    Type::INT8,
    Type::TEXT,
    Type::TEXT,
    Type::TEXT_ARRAY,
    Type::TEXT_ARRAY,
];

/// A record as the parameters of a statement, one for each of [`COLUMNS`].
pub(super) struct Parameters<'a>([Option<FieldValue<'a>>; COLUMNS_COUNT]);

impl<'a> Parameters<'a> {
    pub(super) fn of(record: &'a TokenRecord) -> Self {
        let mut values = [None; COLUMNS_COUNT];
        values[0] = Some(FieldValue::Digest(&record.digest));
        for field in RecordField::ALL {
            // The columns of terms are never NULL.
            let absent = match field {
                RecordField::Plan | RecordField::Rate => Some(FieldValue::Text("")),
                RecordField::Networks | RecordField::Methods => Some(FieldValue::Words(&[])),
                _ => None,
            };
            values[field.column()] = field.of(record).or(absent);
        }
        Self(values)
    }

    pub(super) fn list(&self) -> [&(dyn ToSql + Sync); COLUMNS_COUNT] {
        self.0.each_ref().map(|value| value as _)
    }

    /// For [`columns_written`].
    pub(super) fn written(&self, version: i32) -> Vec<&(dyn ToSql + Sync)> {
        self.list().into_iter().take(columns_written(version).split(", ").count()).collect()
    }
}

impl ToSql for FieldValue<'_> {
    fn to_sql(&self, kind: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        match self {
            Self::Text(text) => text.to_sql(kind, out),
            Self::Words(words) => words.to_sql(kind, out),
            Self::Time(seconds) => i64::try_from(*seconds).unwrap_or(i64::MAX).to_sql(kind, out),
            Self::Flag(flag) => flag.to_sql(kind, out),
            Self::Digest(digest) => digest.as_bytes().as_slice().to_sql(kind, out),
        }
    }

    fn accepts(kind: &Type) -> bool {
        TYPES.contains(kind)
    }

    to_sql_checked!();
}

/// The result of a migration.
pub(super) struct Tables {
    pub(super) version: i32,
    /// The channel before and after, if it changed.
    pub(super) moved: Option<(String, String)>,
}

/// What a migration finds.
struct Before {
    has_schema: bool,
    /// The version, 0 for none, and the channel.
    version: i32,
    channel: Option<String>,
    /// Triggers that do not fire.
    off: bool,
}

impl Before {
    async fn read(client: &impl GenericClient, schema: &str) -> Result<Self, QueryFailure> {
        // Whoever may only write tokens need not be allowed to create tables: this reads the catalog only.
        let sql = "SELECT EXISTS (SELECT FROM pg_catalog.pg_namespace n WHERE n.nspname = $1), \
            EXISTS (SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
            WHERE n.nspname = $1 AND c.relname = 'version')";
        let row = client.query_one(sql, &[&schema]).await.map_err(QueryFailure::own)?;
        let [has_schema, has_version] = [0, 1].map(|at| row.try_get(at));
        let mut before = Self { has_schema: has_schema.map_err(misread)?, version: 0, channel: None, off: false };
        if has_version.map_err(misread)?
            && let Some((found, channel)) = version(client, schema).await?
        {
            (before.version, before.channel) = (found, Some(channel));
        }
        if before.version == VERSION {
            let sql = fill(&format!("SELECT {OFF} IS NOT NULL"), schema);
            let row = client.query_one(&sql, &[]).await.map_err(QueryFailure::own)?;
            before.off = row.try_get(0).map_err(misread)?;
        }
        Ok(before)
    }

    /// What a transaction has to do; empty: nothing. A newer schema is not changed, but for its channel.
    fn steps(&self, schema: &str, channel: Option<&str>) -> String {
        let moves = channel.filter(|channel| self.channel.as_deref() != Some(*channel));
        if self.version >= VERSION && !self.off && moves.is_none() {
            return String::new();
        }
        let mut sql = "SET LOCAL lock_timeout = '5s';\n".to_owned();
        if !self.has_schema {
            sql += "CREATE SCHEMA {schema};\n";
        }
        MIGRATIONS.iter().skip(usize::try_from(self.version).unwrap_or(0)).for_each(|migration| sql += migration);
        // They need the table to themselves: whoever looks up tokens meanwhile must not wait for long.
        if self.version < VERSION || self.off {
            sql += TRIGGERS;
        }
        if moves.is_some() && self.version > 0 {
            // A change made now would be notified on the channel that gateways are about to leave.
            sql += "SET LOCAL lock_timeout = 0;\nLOCK TABLE {schema}.token IN SHARE ROW EXCLUSIVE MODE;\n";
        }
        // The channel's letters need no quoting: see `check_channel`.
        let channel = moves.map_or_else(|| "channel".to_owned(), |channel| format!("'{channel}'"));
        sql += &format!("UPDATE {{schema}}.version SET channel = {channel}, version = greatest(version, {VERSION});\n");
        fill(&sql, schema)
    }
}

/// Creates or migrates tollgate's own tables. The only place that changes the channel.
pub(super) async fn migrate(client: &mut Client, schema: &str, channel: Option<&str>) -> Result<Tables, QueryFailure> {
    let before = Before::read(client, schema).await?;
    if before.steps(schema, channel).is_empty() {
        return Ok(Tables { version: before.version, moved: None });
    }
    let transaction = client.transaction().await.map_err(QueryFailure::own)?;
    transaction.execute("SELECT pg_advisory_xact_lock($1)", &[&LOCK]).await.map_err(QueryFailure::own)?;
    // Another migration may have been first.
    let before = Before::read(&transaction, schema).await?;
    transaction.batch_execute(&before.steps(schema, channel)).await.map_err(QueryFailure::own)?;
    transaction.commit().await.map_err(QueryFailure::own)?;
    let moved = before.channel.zip(channel.map(str::to_owned)).filter(|(was, now)| was != now);
    Ok(Tables { version: before.version.max(VERSION), moved })
}

/// The SQL that [`migrate`] would run now, for whoever runs it by hand. Empty: there is nothing to do.
pub(super) async fn migration_sql(
    client: &Client,
    schema: &str,
    channel: Option<&str>,
) -> Result<String, QueryFailure> {
    let steps = Before::read(client, schema).await?.steps(schema, channel);
    if steps.is_empty() {
        return Ok(steps);
    }
    Ok(format!("BEGIN;\nSELECT pg_advisory_xact_lock({LOCK});\n{steps}COMMIT;\n"))
}

/// Checks that this version can read and write these tables. Returns their version.
pub(super) async fn check(client: &Client, schema: &str) -> Result<i32, QueryFailure> {
    match version(client, schema).await? {
        Some((version, _)) => check_version(version, 0).map(|()| version),
        None => Err(QueryFailure::unusable(format!("the schema {schema} has no tables of tollgate: {MIGRATE}"))),
    }
}

/// The schema's version and channel; `None`: it does not exist.
pub(super) async fn version(client: &impl GenericClient, schema: &str) -> Result<Option<(i32, String)>, QueryFailure> {
    let sql = fill("SELECT version, readers_from, channel FROM {schema}.version", schema);
    let rows = match client.query(&sql, &[]).await {
        Ok(rows) => rows,
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => return Ok(None),
        Err(error) => return Err(QueryFailure::own(error)),
    };
    let [row] = rows.as_slice() else {
        return Err(QueryFailure::unusable(format!("the schema doesn't say its version: {MIGRATE}")));
    };
    check_version(row.try_get::<_, i32>(0).map_err(misread)?.max(OLDEST), row.try_get(1).map_err(misread)?)?;
    Ok(Some((row.try_get(0).map_err(misread)?, row.try_get(2).map_err(misread)?)))
}
