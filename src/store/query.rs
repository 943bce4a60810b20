//! Which tokens are meant, and in which order: what a list is asked for, and what a store with SQL makes of it. It must not
//! know how a store is reached.

use super::TokenRecord;
use super::credential::Digest;
use std::cmp::Ordering;

/// What a token is at a moment. The first that holds, from below.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TokenState {
    Active,
    /// Works until its overlap ends.
    Rotated,
    Expired,
    NotYet,
    Blocked,
    Revoked,
}

impl TokenState {
    pub const ALL: [Self; 6] = [Self::Active, Self::Rotated, Self::Expired, Self::NotYet, Self::Blocked, Self::Revoked];

    pub fn of(record: &TokenRecord, now: u64) -> Self {
        match record {
            TokenRecord { revoked: Some(_), .. } => Self::Revoked,
            TokenRecord { blocked: true, .. } => Self::Blocked,
            TokenRecord { not_before: Some(start), .. } if *start > now => Self::NotYet,
            TokenRecord { expires: Some(end), .. } if *end <= now => Self::Expired,
            TokenRecord { superseded: Some(_), .. } => Self::Rotated,
            _ => Self::Active,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Rotated => "rotated",
            Self::Expired => "expired",
            Self::NotYet => "not yet",
            Self::Blocked => "blocked",
            Self::Revoked => "revoked",
        }
    }

    /// Whether a gateway accepts the token.
    pub const fn works(self) -> bool {
        matches!(self, Self::Active | Self::Rotated)
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TokenOrder {
    /// Newest first.
    #[default]
    Created,
    /// Soonest first; those that never expire last.
    Expires,
    /// Longest ago first, those that were never used before them.
    LastUsed,
    /// By name, byte for byte.
    User,
}

/// Where a record stands in an order: by number, then text, then digest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TokenRank {
    number: i64,
    text: String,
    digest: [u8; 32],
}

impl TokenRank {
    pub fn digest(&self) -> Digest {
        Digest::from_bytes(self.digest)
    }
}

const NEVER: i64 = i64::MAX;

impl TokenOrder {
    pub fn rank(self, record: &TokenRecord) -> TokenRank {
        let seconds = |time: u64| i64::try_from(time).unwrap_or(NEVER);
        let (number, text) = match self {
            Self::Created => (-seconds(record.created), String::new()),
            Self::Expires => (record.expires.map_or(NEVER, seconds), String::new()),
            Self::LastUsed => (record.last_used.map_or(0, seconds), String::new()),
            Self::User => (0, record.user.clone()),
        };
        TokenRank { number, text, digest: *record.digest.as_bytes() }
    }
}

/// What is wanted of a store's records. The default is all of them, newest first.
#[derive(Clone, Debug, Default)]
pub struct TokenQuery {
    /// For states.
    pub now: u64,
    pub user: Option<String>,
    /// One of these; empty for any.
    pub states: Vec<TokenState>,
    pub scope: Option<String>,
    /// Not used since then, and not made since then.
    pub unused_since: Option<u64>,
    /// Expires after now, and by then.
    pub expires_by: Option<u64>,
    /// Was revoked or expired by then. A revocation without a time is not known to be so old.
    pub ended_by: Option<u64>,
    pub order: TokenOrder,
    /// Those behind this one.
    pub after: Option<TokenRank>,
    pub limit: Option<usize>,
}

impl TokenQuery {
    /// Whether a record is one of those, in whatever place.
    pub fn takes(&self, record: &TokenRecord) -> bool {
        let by = |time: Option<u64>, bound: u64| time.is_some_and(|time| time <= bound);
        self.user.as_ref().is_none_or(|user| *user == record.user)
            && (self.states.is_empty() || self.states.contains(&TokenState::of(record, self.now)))
            && self.scope.as_ref().is_none_or(|scope| record.scopes.contains(scope))
            && self.unused_since.is_none_or(|since| record.last_used.unwrap_or(0).max(record.created) < since)
            && self.expires_by.is_none_or(|bound| record.expires.is_some_and(|end| end > self.now && end <= bound))
            && self
                .ended_by
                .is_none_or(|bound| by(record.revoked.filter(|at| *at > 1), bound) || by(record.expires, bound))
    }

    /// The rank of a record that is taken, if that is behind where the query begins.
    pub(super) fn place(&self, record: &TokenRecord) -> Option<TokenRank> {
        let rank = self.takes(record).then(|| self.order.rank(record))?;
        self.after.as_ref().is_none_or(|after| rank.cmp(after) == Ordering::Greater).then_some(rank)
    }

    /// Of all records of a store, those that are meant, in their order.
    pub(super) fn arrange(&self, records: Vec<TokenRecord>) -> Vec<TokenRecord> {
        let placed = records.into_iter().filter_map(|record| Some((self.place(&record)?, record)));
        let mut placed: Vec<_> = placed.collect();
        placed.sort_by(|(a, _), (b, _)| a.cmp(b));
        placed.truncate(self.limit.unwrap_or(usize::MAX));
        placed.into_iter().map(|(_, record)| record).collect()
    }

    /// What [`Self::takes`] says, for `WHERE`. Each condition stands by itself.
    pub(super) fn conditions(&self, dialect: &QueryDialect, parameters: &mut Vec<QueryParameter>) -> Vec<String> {
        let mut parameter = |value| dialect.parameter(parameters, value);
        // Numbers and names of states are written into the text: none of them comes from outside.
        let mut all = Vec::new();
        if let Some(user) = &self.user {
            all.push(format!("\"user\" = {}", parameter(QueryParameter::Text(user.clone()))));
        }
        if !self.states.is_empty() {
            let now = self.now;
            let names: Vec<_> = self.states.iter().map(|state| format!("'{}'", state.name())).collect();
            all.push(format!(
                "CASE WHEN revoked IS NOT NULL THEN 'revoked' WHEN blocked THEN 'blocked' WHEN not_before > {now} THEN \
                 'not yet' WHEN expires <= {now} THEN 'expired' WHEN superseded IS NOT NULL THEN 'rotated' ELSE 'active' END \
                 IN ({})",
                names.join(", ")
            ));
        }
        if let Some(scope) = &self.scope {
            all.push((dialect.has_scope)(&parameter(QueryParameter::Text(scope.clone()))));
        }
        if let Some(since) = self.unused_since {
            all.push(format!("coalesce(last_used, 0) < {since} AND created < {since}"));
        }
        if let Some(bound) = self.expires_by {
            all.push(format!("expires > {} AND expires <= {bound}", self.now));
        }
        if let Some(bound) = self.ended_by {
            all.push(format!("(revoked > 1 AND revoked <= {bound} OR expires <= {bound})"));
        }
        all
    }

    /// What follows `SELECT … FROM token`, and its parameters.
    pub(super) fn sql(&self, dialect: &QueryDialect) -> (String, Vec<QueryParameter>) {
        let mut parameters = Vec::new();
        let mut all = self.conditions(dialect, &mut parameters);
        let mut parameter = |value| dialect.parameter(&mut parameters, value);
        let by = match self.order {
            TokenOrder::Created => "-created".to_owned(),
            TokenOrder::Expires => format!("coalesce(expires, {NEVER})"),
            TokenOrder::LastUsed => "coalesce(last_used, 0)".to_owned(),
            TokenOrder::User => format!("\"user\"{}", dialect.by_bytes),
        };
        if let Some(TokenRank { number, text, digest }) = &self.after {
            let key = match self.order {
                TokenOrder::User => parameter(QueryParameter::Text(text.clone())),
                _ => number.to_string(),
            };
            let digest = parameter(QueryParameter::Bytes(digest.to_vec()));
            all.push(format!("({by}, digest) > ({key}, {digest})"));
        }
        let conditions = if all.is_empty() { String::new() } else { format!("WHERE {} ", all.join(" AND ")) };
        let limit = self.limit.map(|limit| format!(" LIMIT {limit}")).unwrap_or_default();
        // What an index can give stands as it always did.
        let order = if self.order == TokenOrder::Created { "created DESC".to_owned() } else { by };
        (format!("{conditions}ORDER BY {order}, digest{limit}"), parameters)
    }
}

/// What databases write in different ways.
pub(super) struct QueryDialect {
    pub(super) parameter: char,
    /// That the scope in this parameter is one of the record's.
    pub(super) has_scope: fn(&str) -> String,
    /// Behind a text that is ordered byte for byte.
    pub(super) by_bytes: &'static str,
}

impl QueryDialect {
    /// Notes a parameter. Returns how the text names it.
    pub(super) fn parameter(&self, parameters: &mut Vec<QueryParameter>, value: QueryParameter) -> String {
        parameters.push(value);
        format!("{}{}", self.parameter, parameters.len())
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum QueryParameter {
    Text(String),
    Bytes(Vec<u8>),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_takes_what_it_says() {
        let base = TokenRecord {
            created: 100,
            scopes: vec!["api".into(), "read".into()],
            ..TokenRecord::new(Digest::of(b"t"), "ann")
        };
        let all = TokenQuery { now: 1_000, ..TokenQuery::default() };
        let used = |at| TokenRecord { last_used: Some(at), ..base.clone() };
        let ends = |at| TokenRecord { expires: Some(at), ..base.clone() };
        let revoked = |at| TokenRecord { revoked: Some(at), ..base.clone() };
        let unused = |since| TokenQuery { unused_since: Some(since), ..all.clone() };
        let soon = |by| TokenQuery { expires_by: Some(by), ..all.clone() };
        let ended = |by| TokenQuery { ended_by: Some(by), ..all.clone() };
        let user = |name: &str| TokenQuery { user: Some(name.into()), ..all.clone() };
        let scope = |name: &str| TokenQuery { scope: Some(name.into()), ..all.clone() };
        for (query, record, is_taken) in [
            (&all, &base, true),
            (&user("ann"), &base, true),
            (&user("an"), &base, false),
            (&user("Ann"), &base, false),
            (&scope("read"), &base, true),
            (&scope("rea"), &base, false),
            // Never used: as old as it is.
            (&unused(101), &base, true),
            (&unused(100), &base, false),
            (&unused(201), &used(200), true),
            (&unused(200), &used(200), false),
            (&unused(100), &used(50), false),
            (&soon(1_001), &ends(1_001), true),
            (&soon(1_000), &ends(1_001), false),
            (&soon(2_000), &ends(1_000), false),
            (&soon(2_000), &base, false),
            (&ended(500), &ends(500), true),
            (&ended(499), &ends(500), false),
            (&ended(500), &revoked(500), true),
            (&ended(499), &revoked(500), false),
            // Revoked at no known time.
            (&ended(500), &revoked(1), false),
            (&ended(500), &base, false),
            (&ended(500), &TokenRecord { blocked: true, ..base.clone() }, false),
            // Each condition has to hold.
            (&TokenQuery { scope: Some("none".into()), ..user("ann") }, &base, false),
            (&TokenQuery { states: vec![TokenState::Expired, TokenState::Active], ..all.clone() }, &base, true),
            (&TokenQuery { states: vec![TokenState::Expired], ..all.clone() }, &base, false),
        ] {
            assert_eq!(query.takes(record), is_taken, "{query:?}: {record:?}");
        }
    }
}
