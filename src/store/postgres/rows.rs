//! Interprets a row of a table that tollgate does not own. Columns are found by name and checked by type; a value that
//! cannot be interpreted is an error, never a guess.

use super::super::terms::{SaidTerms, TermFault, TokenTerms};
use super::super::{TokenRecord, values::parse_scopes};
use super::connect::QueryFailure;
use crate::store::credential::Digest;
use std::error::Error;
use std::sync::Arc;
use tokio_postgres::types::{FromSql, Kind, Type};
use tokio_postgres::{Column, Row};

/// From PostgreSQL's year 2000 to the Unix epoch.
const EPOCH_SECONDS: i64 = 946_684_800;
const MICROS: i64 = 1_000_000;
const DAY: i64 = 86_400;
/// Larger values are probably milliseconds, and would keep a token valid for centuries.
const LAST_SECOND: i64 = 100_000_000_000;
/// A revocation without a time.
const SOME_TIME: u64 = 0;

/// The positions of the columns in a row.
pub(super) struct Columns {
    user: usize,
    scopes: Option<usize>,
    not_before: Option<usize>,
    expires: Option<usize>,
    revoked: Option<usize>,
    blocked: Option<usize>,
    plan: Option<usize>,
    rate: Option<usize>,
    networks: Option<usize>,
    methods: Option<usize>,
}

impl Columns {
    /// Checks names and types, which are known without a row.
    pub(super) fn of(columns: &[Column]) -> Result<Self, QueryFailure> {
        let find = |names: &[&str], fits: fn(&Type) -> bool, kinds: &str| -> Result<Option<usize>, QueryFailure> {
            let mut found = (0..columns.len()).filter(|at| names.contains(&columns[*at].name()));
            let (first, second) = (found.next(), found.next());
            let name = names.join(" or ");
            if second.is_some() {
                return Err(QueryFailure::unusable(format!(
                    "the lookup query has several columns {name}: name only one so"
                )));
            }
            match first {
                Some(at) if !fits(base(columns[at].type_())) => Err(QueryFailure::unusable(format!(
                    "column {name} of the lookup query is of type {}, where {kinds} is needed: cast it in the query",
                    columns[at].type_()
                ))),
                first => Ok(first),
            }
        };
        let user = find(&["user", "username"], is_text, "text")?;
        let words =
            |name: &'static str| find(&[name], |of| is_text(of) || is_list(of) || is_json(of), "text[], text or json");
        Ok(Self {
            user: user
                .ok_or_else(|| QueryFailure::unusable("the lookup query has no column user: name one AS \"user\""))?,
            scopes: words("scopes")?,
            not_before: find(&["not_before"], is_time, "a time or bigint")?,
            expires: find(&["expires_at", "expires"], is_time, "a time or bigint")?,
            revoked: find(
                &["revoked", "revoked_at"],
                |of| *of == Type::BOOL || is_time(of),
                "boolean, a time or bigint",
            )?,
            blocked: find(&["blocked"], |of| *of == Type::BOOL, "boolean")?,
            plan: find(&["plan"], is_text, "text")?,
            rate: find(&["rate"], is_text, "text")?,
            networks: words("networks")?,
            methods: words("methods")?,
        })
    }

    pub(super) fn record(
        &self,
        row: &Row,
        digest: Digest,
        default_scopes: &[String],
    ) -> Result<TokenRecord, QueryFailure> {
        let cell = |at: Option<usize>| at.map_or(Ok(None), |at| cell(row, at));
        let user = cell(Some(self.user))?.map(|user| user.text()).transpose()?.unwrap_or_default();
        if user.is_empty() {
            return Err(QueryFailure::garbage("a token without a user: column user is NULL or empty"));
        }
        let expires = cell(self.expires)?.map(|cell| cell.time()).transpose()?;
        let not_before = cell(self.not_before)?.map(|cell| cell.time()).transpose()?;
        let revoked = match (self.revoked, cell(self.revoked)?) {
            (Some(at), None) if *base(row.columns()[at].type_()) == Type::BOOL => Some(SOME_TIME),
            (_, Some(cell)) if *base(&cell.kind) == Type::BOOL => cell.truth()?.then_some(SOME_TIME),
            (_, cell) => cell.map(|cell| cell.time()).transpose()?.map(Time::started),
        };
        // NULL does not say that the user is not blocked.
        let blocked = match (self.blocked, cell(self.blocked)?) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(_), Some(cell)) => cell.truth()?,
        };
        Ok(TokenRecord {
            scopes: cell(self.scopes)?.map_or_else(|| Ok(default_scopes.to_vec()), |cell| cell.words("scopes"))?,
            expires: expires.and_then(Time::ends),
            not_before: not_before.map(Time::begins),
            revoked,
            blocked,
            terms: self.terms(row)?,
            ..TokenRecord::new(digest, user)
        })
    }

    /// How the token may be used. A column that was there before tollgate read it, and means something else, is an error.
    fn terms(&self, row: &Row) -> Result<Option<Arc<TokenTerms>>, QueryFailure> {
        let text = |at: Option<usize>| match at.map_or(Ok(None), |at| cell(row, at))? {
            Some(cell) => cell.text(),
            None => Ok(String::new()),
        };
        let words = |at: Option<usize>, name| match at.map_or(Ok(None), |at| cell(row, at))? {
            Some(cell) => cell.words(name),
            None => Ok(Vec::new()),
        };
        let said = SaidTerms {
            plan: text(self.plan)?,
            rate: text(self.rate)?,
            networks: words(self.networks, "networks")?,
            methods: words(self.methods, "methods")?,
        };
        TokenTerms::shared(said).map_err(|TermFault { field, what }| {
            let name = field.name();
            QueryFailure::garbage(format!(
                "column {name} of the lookup query {what}; if it is something else, give it another name in the query"
            ))
        })
    }
}

/// The base type of a domain.
fn base(kind: &Type) -> &Type {
    match kind.kind() {
        Kind::Domain(inner) => base(inner),
        _ => kind,
    }
}

fn is_text(kind: &Type) -> bool {
    [Type::TEXT, Type::VARCHAR, Type::BPCHAR, Type::NAME, Type::UNKNOWN].contains(kind)
        || kind.name() == "citext"
        || matches!(kind.kind(), Kind::Enum(_))
}

fn is_json(kind: &Type) -> bool {
    [Type::JSON, Type::JSONB].contains(kind)
}

fn is_list(kind: &Type) -> bool {
    matches!(kind.kind(), Kind::Array(member) if is_text(base(member)))
}

fn is_time(kind: &Type) -> bool {
    [Type::TIMESTAMPTZ, Type::TIMESTAMP, Type::DATE, Type::INT8, Type::INT4].contains(kind)
}

/// A raw value.
struct Cell<'a> {
    kind: Type,
    raw: &'a [u8],
}

impl<'a> FromSql<'a> for Cell<'a> {
    fn from_sql(kind: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        Ok(Self { kind: base(kind).clone(), raw })
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}

fn cell(row: &Row, at: usize) -> Result<Option<Cell<'_>>, QueryFailure> {
    row.try_get(at).map_err(|_| QueryFailure::garbage("a value of the lookup's row can't be read"))
}

/// Microseconds since 2000, with two infinities.
#[derive(Clone, Copy)]
enum Time {
    Never,
    Always,
    At { seconds: u64, exact: bool },
}

impl Time {
    /// Rounded down to seconds, for an end: never later than specified.
    const fn ends(self) -> Option<u64> {
        match self {
            Self::Never => None,
            Self::Always => Some(0),
            Self::At { seconds, .. } => Some(seconds),
        }
    }

    /// Rounded up to seconds, for a start: never earlier than specified.
    const fn begins(self) -> u64 {
        match self {
            Self::Never => i64::MAX as u64,
            Self::Always => 0,
            Self::At { seconds, exact } => seconds + !exact as u64,
        }
    }

    const fn started(self) -> u64 {
        match self {
            Self::Never => i64::MAX as u64,
            Self::Always => SOME_TIME,
            Self::At { seconds, .. } => seconds,
        }
    }
}

impl Cell<'_> {
    fn garbage(&self) -> QueryFailure {
        QueryFailure::garbage(format!("a value of type {} in the lookup's row makes no sense", self.kind))
    }

    fn text(&self) -> Result<String, QueryFailure> {
        let text = std::str::from_utf8(self.raw).map_err(|_| self.garbage())?;
        Ok(if self.kind == Type::BPCHAR { text.trim_end_matches(' ') } else { text }.to_owned())
    }

    fn truth(&self) -> Result<bool, QueryFailure> {
        bool::from_sql(&Type::BOOL, self.raw).map_err(|_| self.garbage())
    }

    fn time(&self) -> Result<Time, QueryFailure> {
        let wide = || <[u8; 8]>::try_from(self.raw).map(i64::from_be_bytes).map_err(|_| self.garbage());
        let narrow = || <[u8; 4]>::try_from(self.raw).map(i32::from_be_bytes).map_err(|_| self.garbage());
        let at = |seconds: i64, exact| Time::At { seconds: u64::try_from(seconds).unwrap_or(0), exact };
        let since_2000 =
            |micros: i64| at((micros.div_euclid(MICROS)).saturating_add(EPOCH_SECONDS), micros.rem_euclid(MICROS) == 0);
        Ok(match self.kind {
            Type::TIMESTAMPTZ | Type::TIMESTAMP => match wide()? {
                i64::MAX => Time::Never,
                i64::MIN => Time::Always,
                micros => since_2000(micros),
            },
            // As PostgreSQL compares a date with a time: the first second of the day, in UTC.
            Type::DATE => match narrow()? {
                i32::MAX => Time::Never,
                i32::MIN => Time::Always,
                days => at(i64::from(days) * DAY + EPOCH_SECONDS, true),
            },
            _ => {
                let seconds = if self.kind == Type::INT4 { i64::from(narrow()?) } else { wide()? };
                if seconds > LAST_SECOND {
                    return Err(QueryFailure::garbage(
                        "a time of the lookup's row is beyond the year 5000: are these milliseconds? Divide by 1000",
                    ));
                }
                at(seconds, true)
            }
        })
    }

    fn words(&self, name: &str) -> Result<Vec<String>, QueryFailure> {
        let text = match self.kind {
            Type::JSONB => self.raw.get(1..),
            _ => Some(self.raw),
        };
        if matches!(self.kind.kind(), Kind::Array(_)) {
            return Vec::<String>::from_sql(&self.kind, self.raw).map_err(|_| self.garbage());
        }
        let text = text.and_then(|text| std::str::from_utf8(text).ok()).ok_or_else(|| self.garbage())?;
        parse_scopes(text).ok_or_else(|| {
            QueryFailure::garbage(format!(
                "{name} are neither words, nor a JSON array of strings, nor a YAML list: give text[]"
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_in_every_type() {
        let time = |kind: Type, raw: &[u8]| Cell { kind, raw }.time();
        let micros = 1_500_001_i64;
        let half = time(Type::TIMESTAMPTZ, &micros.to_be_bytes()).ok().unwrap();
        assert_eq!((half.ends(), half.begins()), (Some(946_684_801), 946_684_802), "never longer than it was meant");
        let day = time(Type::DATE, &1_i32.to_be_bytes()).ok().unwrap();
        assert_eq!((day.ends(), day.begins()), (Some(946_771_200), 946_771_200));
        let never = time(Type::TIMESTAMP, &i64::MAX.to_be_bytes()).ok().unwrap();
        assert_eq!((never.ends(), never.begins()), (None, i64::MAX as u64));
        let past = time(Type::TIMESTAMP, &i64::MIN.to_be_bytes()).ok().unwrap();
        assert_eq!((past.ends(), past.begins()), (Some(0), 0));
        assert_eq!(time(Type::INT8, &(-5_i64).to_be_bytes()).ok().unwrap().ends(), Some(0));
        assert!(time(Type::INT8, &1_700_000_000_000_i64.to_be_bytes()).is_err(), "milliseconds");
        assert!(time(Type::INT8, &[1]).is_err());
    }
}
