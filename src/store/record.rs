//! The fields of a token's record: the one list of their names and kinds, by which every store reads and writes a record. It
//! must not know how a store encodes a value, nor what a gateway makes of it.

use super::TokenRecord;
use super::credential::Digest;
use super::terms::{SaidTerms, TermFault, TokenTerms};
use serde_json::Value as Json;

/// A field of a record, apart from the digest that it is found by. In the order in which they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RecordField {
    User,
    Scopes,
    Description,
    Created,
    NotBefore,
    Expires,
    Revoked,
    Blocked,
    Superseded,
    Replaces,
    LastUsed,
    Plan,
    Rate,
    Networks,
    Methods,
}

impl RecordField {
    pub(super) const ALL: [Self; 15] = [
        Self::User,
        Self::Scopes,
        Self::Description,
        Self::Created,
        Self::NotBefore,
        Self::Expires,
        Self::Revoked,
        Self::Blocked,
        Self::Superseded,
        Self::Replaces,
        Self::LastUsed,
        Self::Plan,
        Self::Rate,
        Self::Networks,
        Self::Methods,
    ];

    /// The key in a file, the name of a column, and the name in messages.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Scopes => "scopes",
            Self::Description => "description",
            Self::Created => "created",
            Self::NotBefore => "not_before",
            Self::Expires => "expires",
            Self::Revoked => "revoked",
            Self::Blocked => "blocked",
            Self::Superseded => "superseded",
            Self::Replaces => "replaces",
            Self::LastUsed => "last_used",
            Self::Plan => "plan",
            Self::Rate => "rate",
            Self::Networks => "networks",
            Self::Methods => "methods",
        }
    }

    /// Whether it is one of [`TokenTerms`].
    pub(super) const fn is_term(self) -> bool {
        matches!(self, Self::Plan | Self::Rate | Self::Networks | Self::Methods)
    }

    /// Its column, behind the digest.
    pub(super) const fn column(self) -> usize {
        self as usize + 1
    }

    /// What a record says in this field. `None`: nothing.
    pub(super) fn of(self, record: &TokenRecord) -> Option<FieldValue<'_>> {
        let said = record.terms.as_deref().map(TokenTerms::said);
        match self {
            Self::User => Some(FieldValue::Text(&record.user)),
            Self::Scopes => Some(FieldValue::Words(&record.scopes)),
            Self::Description => Some(FieldValue::Text(&record.description)),
            Self::Created => Some(FieldValue::Time(record.created)),
            Self::NotBefore => record.not_before.map(FieldValue::Time),
            Self::Expires => record.expires.map(FieldValue::Time),
            Self::Revoked => record.revoked.map(FieldValue::Time),
            Self::Blocked => Some(FieldValue::Flag(record.blocked)),
            Self::Superseded => record.superseded.map(FieldValue::Time),
            Self::Replaces => record.replaces.as_ref().map(FieldValue::Digest),
            Self::LastUsed => record.last_used.map(FieldValue::Time),
            Self::Plan => said.map(|said| FieldValue::Text(&said.plan)),
            Self::Rate => said.map(|said| FieldValue::Text(&said.rate)),
            Self::Networks => said.map(|said| FieldValue::Words(&said.networks)),
            Self::Methods => said.map(|said| FieldValue::Words(&said.methods)),
        }
    }
}

/// All that a record says, without what is empty anyway.
pub(super) fn said(record: &TokenRecord) -> impl Iterator<Item = (RecordField, FieldValue<'_>)> {
    RecordField::ALL
        .into_iter()
        .filter_map(|field| Some((field, field.of(record).filter(|value| !value.is_default())?)))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FieldValue<'a> {
    Text(&'a str),
    Words(&'a [String]),
    /// Unix seconds.
    Time(u64),
    Flag(bool),
    Digest(&'a Digest),
}

impl FieldValue<'_> {
    /// As JSON, with times as a store writes them.
    pub(super) fn json(self, time: impl FnOnce(u64) -> Json) -> Json {
        match self {
            Self::Text(text) => text.into(),
            Self::Words(words) => words.into(),
            Self::Time(seconds) => time(seconds),
            Self::Flag(flag) => flag.into(),
            Self::Digest(digest) => digest.to_hex().into(),
        }
    }

    /// Whether a record without this field says the same.
    pub(super) fn is_default(&self) -> bool {
        match self {
            Self::Text(text) => text.is_empty(),
            Self::Words(words) => words.is_empty(),
            Self::Flag(flag) => !flag,
            Self::Time(_) | Self::Digest(_) => false,
        }
    }
}

/// Where the fields of one record are read from. A field that is not there is `None`; one that cannot be understood is an
/// error, and never taken for one that is not there.
pub(super) trait RecordSource {
    type Error;

    fn text(&self, field: RecordField) -> Result<Option<String>, Self::Error>;
    fn words(&self, field: RecordField) -> Result<Option<Vec<String>>, Self::Error>;
    fn time(&self, field: RecordField) -> Result<Option<u64>, Self::Error>;
    fn flag(&self, field: RecordField) -> Result<Option<bool>, Self::Error>;
    fn digest(&self, field: RecordField) -> Result<Option<Digest>, Self::Error>;

    /// Since when the token is revoked, where that may be said in other ways than by a time.
    fn revoked(&self) -> Result<Option<u64>, Self::Error> {
        self.time(RecordField::Revoked)
    }

    /// A field says what cannot be understood.
    fn wrong(&self, field: RecordField, what: &'static str) -> Self::Error;

    /// A field that must be there is not.
    fn missing(&self, field: RecordField) -> Self::Error;
}

/// What a record means that says nothing of its scopes, or of when it was made.
pub(super) struct Unsaid<'a> {
    pub(super) scopes: &'a [String],
    pub(super) created: u64,
}

impl Unsaid<'_> {
    pub(super) const NOTHING: Self = Self { scopes: &[], created: 0 };
}

/// Reads every field once.
pub(super) fn read<S: RecordSource>(digest: Digest, source: &S, unsaid: &Unsaid<'_>) -> Result<TokenRecord, S::Error> {
    let user = source.text(RecordField::User)?.filter(|user| !user.is_empty());
    let said = SaidTerms {
        plan: source.text(RecordField::Plan)?.unwrap_or_default(),
        rate: source.text(RecordField::Rate)?.unwrap_or_default(),
        networks: source.words(RecordField::Networks)?.unwrap_or_default(),
        methods: source.words(RecordField::Methods)?.unwrap_or_default(),
    };
    Ok(TokenRecord {
        digest,
        user: user.ok_or_else(|| source.missing(RecordField::User))?,
        scopes: source.words(RecordField::Scopes)?.unwrap_or_else(|| unsaid.scopes.to_vec()),
        description: source.text(RecordField::Description)?.unwrap_or_default(),
        created: source.time(RecordField::Created)?.unwrap_or(unsaid.created),
        not_before: source.time(RecordField::NotBefore)?,
        expires: source.time(RecordField::Expires)?,
        revoked: source.revoked()?,
        blocked: source.flag(RecordField::Blocked)?.unwrap_or(false),
        superseded: source.time(RecordField::Superseded)?,
        replaces: source.digest(RecordField::Replaces)?,
        last_used: source.time(RecordField::LastUsed)?,
        terms: TokenTerms::shared(said).map_err(|TermFault { field, what }| source.wrong(field, what))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    impl RecordSource for TokenRecord {
        type Error = Infallible;

        fn text(&self, field: RecordField) -> Result<Option<String>, Infallible> {
            Ok(field.of(self).map(|value| match value {
                FieldValue::Text(text) => text.to_owned(),
                other => panic!("{field:?} is no text: {other:?}"),
            }))
        }

        fn words(&self, field: RecordField) -> Result<Option<Vec<String>>, Infallible> {
            Ok(field.of(self).map(|value| match value {
                FieldValue::Words(words) => words.to_vec(),
                other => panic!("{field:?} are no words: {other:?}"),
            }))
        }

        fn time(&self, field: RecordField) -> Result<Option<u64>, Infallible> {
            Ok(field.of(self).map(|value| match value {
                FieldValue::Time(time) => time,
                other => panic!("{field:?} is no time: {other:?}"),
            }))
        }

        fn flag(&self, field: RecordField) -> Result<Option<bool>, Infallible> {
            Ok(field.of(self).map(|value| match value {
                FieldValue::Flag(flag) => flag,
                other => panic!("{field:?} is no flag: {other:?}"),
            }))
        }

        fn digest(&self, field: RecordField) -> Result<Option<Digest>, Infallible> {
            Ok(field.of(self).map(|value| match value {
                FieldValue::Digest(digest) => *digest,
                other => panic!("{field:?} is no digest: {other:?}"),
            }))
        }

        fn wrong(&self, field: RecordField, what: &'static str) -> Infallible {
            panic!("{field:?} {what}")
        }

        fn missing(&self, field: RecordField) -> Infallible {
            panic!("{field:?} is missing")
        }
    }

    #[test]
    fn every_field_is_written_and_read() {
        let full = TokenRecord {
            digest: Digest::of(b"t"),
            user: "user".into(),
            scopes: vec!["api".into()],
            description: "description".into(),
            created: 1,
            not_before: Some(2),
            expires: Some(3),
            revoked: Some(4),
            blocked: true,
            superseded: Some(5),
            replaces: Some(Digest::of(b"old")),
            last_used: Some(6),
            terms: TokenTerms::of(SaidTerms {
                plan: "gold".into(),
                rate: "600/min".into(),
                networks: vec!["10.0.0.0/8".into()],
                methods: vec!["GET".into()],
            })
            .unwrap(),
        };
        assert_eq!(read(full.digest, &full, &Unsaid::NOTHING), Ok(full.clone()));
        assert_eq!(said(&full).count(), RecordField::ALL.len());
        let bare = TokenRecord::new(full.digest, "user");
        assert_eq!(read(full.digest, &bare, &Unsaid::NOTHING), Ok(bare.clone()));
        let names: Vec<_> = said(&bare).map(|(field, _)| field.name()).collect();
        assert_eq!(names, ["user", "created"]);
        for (index, field) in RecordField::ALL.into_iter().enumerate() {
            assert_eq!(field.column(), index + 1, "{field:?}");
        }
    }
}
