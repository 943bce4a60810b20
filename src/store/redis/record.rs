//! A record as the value of a key: a JSON object or a hash with the same fields. Knows no connection. An invalid record
//! is an error that names the token and the field, never the value.

use super::super::json::Unambiguous;
use super::super::record::{self, RecordField, RecordSource, Unsaid};
use super::super::values::{LATEST, parse_scopes, parse_time};
use super::super::{StoreError, TokenRecord};
use crate::store::credential::Digest;
use serde_json::{Map, Number, Value as Json};

/// The value of a key as it was read: an edit includes it, so that it cannot overwrite a concurrent change.
pub(super) enum Stored {
    Json(String),
    Hash(Vec<(String, String)>),
}

impl Stored {
    pub(super) fn parse(&self, digest: Digest, default_scopes: &[String]) -> Result<TokenRecord, Malformed> {
        let fields = match self {
            Self::Json(text) => object(text)?,
            // The last one counts, because the server keeps only one field of a name.
            Self::Hash(fields) => {
                fields.iter().map(|(name, value)| (name.clone(), Json::from(value.as_str()))).collect()
            }
        };
        check_names(fields.keys())?;
        let source = ValueFields { fields, is_hash: matches!(self, Self::Hash(_)) };
        record::read(digest, &source, &Unsaid { scopes: default_scopes, created: 0 })
    }
}

/// Why a value is no record. Never quotes it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    #[error("is no JSON at column {column}")]
    Syntax { column: usize },
    /// Programs differ in which of the two they take.
    #[error("has a key twice, the second one before column {column}")]
    Twice { column: usize },
    /// Nobody reads it: a token with `expires_at` would never end.
    #[error(
        "field {name:?} is none of tollgate's, and would be ignored: correct it, or let it begin with {FOREIGN} if it is another \
         program's"
    )]
    Unknown { name: String },
    #[error("must be a JSON object")]
    NoObject,
    #[error("field {}: {what}", field.name())]
    Field { field: RecordField, what: &'static str },
}

impl Malformed {
    /// What an operator is told, who knows tokens by the beginning of their digests.
    pub(super) fn of(self, digest: Digest) -> StoreError {
        StoreError::Garbage(format!("token {}: {self}", digest.id()))
    }
}

/// What names of fields begin with that are other programs' and are kept.
const FOREIGN: &str = "x_";
/// Of a name, as much is shown.
const NAME_SHOWN: usize = 40;

fn object(text: &str) -> Result<Map<String, Json>, Malformed> {
    match serde_json::from_str(text) {
        Ok(Unambiguous(Json::Object(fields))) => Ok(fields),
        Ok(Unambiguous(_)) => Err(Malformed::NoObject),
        Err(error) if error.is_data() => Err(Malformed::Twice { column: error.column() }),
        Err(error) => Err(Malformed::Syntax { column: error.column() }),
    }
}

/// That every field is either read here or said to be somebody else's.
fn check_names<'a>(mut names: impl Iterator<Item = &'a String>) -> Result<(), Malformed> {
    let is_known = |name: &str| RecordField::ALL.iter().any(|field| field.name() == name) || name.starts_with(FOREIGN);
    match names.find(|name| !is_known(name)) {
        None => Ok(()),
        Some(name) => Err(Malformed::Unknown { name: name.chars().take(NAME_SHOWN).collect() }),
    }
}

struct ValueFields {
    fields: Map<String, Json>,
    /// In a hash, an empty string means that the field is absent.
    is_hash: bool,
}

impl ValueFields {
    fn get(&self, field: RecordField) -> Option<&Json> {
        match self.fields.get(field.name()) {
            None | Some(Json::Null) => None,
            Some(Json::String(text)) if self.is_hash && text.is_empty() => None,
            Some(value) => Some(value),
        }
    }

    fn read<T>(
        &self,
        field: RecordField,
        read: impl Fn(&Json) -> Option<T>,
        what: &'static str,
    ) -> Result<Option<T>, Malformed> {
        self.get(field).map(|value| read(value).ok_or(Malformed::Field { field, what })).transpose()
    }
}

impl RecordSource for ValueFields {
    type Error = Malformed;

    fn text(&self, field: RecordField) -> Result<Option<String>, Malformed> {
        self.read(field, |value| value.as_str().map(str::to_owned), "must be a text")
    }

    fn words(&self, field: RecordField) -> Result<Option<Vec<String>>, Malformed> {
        self.read(field, scopes, "must be a JSON array of texts, or words with blanks between them")
    }

    fn time(&self, field: RecordField) -> Result<Option<u64>, Malformed> {
        match self.read(field, unix_seconds, TIME)? {
            // Ambiguous: "never" or 1970.
            Some(0) if field == RecordField::Expires => {
                let what = "0 is no time: leave the field out for a token that does not expire";
                Err(Malformed::Field { field, what })
            }
            time => Ok(time),
        }
    }

    fn flag(&self, field: RecordField) -> Result<Option<bool>, Malformed> {
        self.read(field, truth, "must be true or false")
    }

    fn digest(&self, field: RecordField) -> Result<Option<Digest>, Malformed> {
        self.read(field, |value| Digest::from_hex(value.as_str()?), "must be 64 hex digits")
    }

    fn revoked(&self) -> Result<Option<u64>, Malformed> {
        Ok(self.read(RecordField::Revoked, revoked, REVOKED)?.flatten())
    }

    fn wrong(&self, field: RecordField, what: &'static str) -> Malformed {
        Malformed::Field { field, what }
    }

    fn missing(&self, field: RecordField) -> Malformed {
        Malformed::Field { field, what: "is missing" }
    }
}

const TIME: &str = "must be unix seconds, or a time like 2026-01-31T12:00:00Z";
const REVOKED: &str = "must be true, false, unix seconds or a time like 2026-01-31T12:00:00Z";

fn unix_seconds(value: &Json) -> Option<u64> {
    let seconds = match value {
        Json::Number(number) => whole(number)?,
        Json::String(text) if text.bytes().all(|byte| byte.is_ascii_digit()) => text.parse().ok()?,
        Json::String(text) => parse_time(text)?,
        _ => return None,
    };
    (seconds <= LATEST).then_some(seconds)
}

/// Some languages have floating-point numbers only.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bounded right before")]
fn whole(number: &Number) -> Option<u64> {
    let float = || number.as_f64().filter(|float| (0.0..1e12).contains(float)).map(|float| float as u64);
    number.as_u64().or_else(float)
}

/// `Some(None)`: explicitly not revoked. A revocation without a time gets second 1, which is never compared.
fn revoked(value: &Json) -> Option<Option<u64>> {
    match value {
        Json::Bool(false) => Some(None),
        Json::Bool(true) => Some(Some(1)),
        Json::String(text) if text == "false" => Some(None),
        Json::String(text) if text == "true" => Some(Some(1)),
        // 0 and 1 are ambiguous: booleans or times.
        other => unix_seconds(other).filter(|seconds| *seconds > 1).map(Some),
    }
}

fn truth(value: &Json) -> Option<bool> {
    match value {
        Json::Bool(truth) => Some(*truth),
        Json::Number(number) if number.as_u64() == Some(0) => Some(false),
        Json::Number(number) if number.as_u64() == Some(1) => Some(true),
        Json::String(text) if text == "false" || text == "0" => Some(false),
        Json::String(text) if text == "true" || text == "1" => Some(true),
        _ => None,
    }
}

fn scopes(value: &Json) -> Option<Vec<String>> {
    match value {
        Json::Array(list) => list.iter().map(|scope| scope.as_str().map(str::to_owned)).collect(),
        Json::String(text) => parse_scopes(text),
        _ => None,
    }
}

/// The JSON text of a record as written by tollgate.
pub(super) fn to_json(record: &TokenRecord) -> String {
    let mut fields = Map::new();
    for field in RecordField::ALL {
        let Some(value) = field.of(record) else { continue };
        // Of a record without scopes it must be said that it has none, since a default may hold for those that say nothing.
        if value.is_default() && field != RecordField::Scopes {
            continue;
        }
        let value = value.json(|seconds| match (field, seconds) {
            // What could be a boolean is written as one.
            (RecordField::Revoked, 0 | 1) => true.into(),
            (RecordField::Expires, 0) => 1.into(),
            _ => seconds.into(),
        });
        fields.insert(field.name().into(), value);
    }
    Json::Object(fields).to_string()
}

/// The same JSON object with some fields set; fields of other programs are preserved.
pub(super) fn edited(text: &str, edits: &[(&str, Json)]) -> Result<String, Malformed> {
    let mut fields = object(text)?;
    for (name, value) in edits {
        fields.insert((*name).into(), value.clone());
    }
    Ok(Json::Object(fields).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::terms::{SaidTerms, TokenTerms};
    use std::sync::Arc;

    fn parse(stored: &Stored) -> Result<TokenRecord, String> {
        let digest = Digest::of(b"t");
        stored.parse(digest, &["default".into()]).map_err(|wrong| wrong.of(digest).to_string())
    }

    fn json(text: &str) -> Result<TokenRecord, String> {
        parse(&Stored::Json(text.into()))
    }

    fn hash(fields: &[(&str, &str)]) -> Result<TokenRecord, String> {
        parse(&Stored::Hash(fields.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()))
    }

    #[test]
    fn what_is_written_is_read_again() {
        let full = TokenRecord {
            scopes: vec!["api".into()],
            description: "\"é\\".into(),
            created: 1_700_000_000,
            not_before: Some(1_700_000_001),
            expires: Some(1_800_000_000),
            revoked: Some(1_750_000_000),
            blocked: true,
            superseded: Some(1_740_000_000),
            replaces: Some(Digest::of(b"old")),
            last_used: Some(1_700_000_002),
            terms: terms("gold", "600/min burst 5", &["10.0.0.0/8", "::1"], &["GET"]),
            ..TokenRecord::new(Digest::of(b"t"), "user")
        };
        assert_eq!(json(&to_json(&full)), Ok(full));
        let bare = TokenRecord::new(Digest::of(b"t"), "user");
        assert_eq!(json(&to_json(&bare)), Ok(bare), "no scopes are no default scopes");
        // Times that other stores accept.
        let ended = TokenRecord { revoked: Some(0), expires: Some(0), ..TokenRecord::new(Digest::of(b"t"), "user") };
        let read = json(&to_json(&ended)).unwrap();
        assert_eq!((read.revoked, read.expires), (Some(1), Some(1)), "ended, and readable");
    }

    fn terms(plan: &str, rate: &str, networks: &[&str], methods: &[&str]) -> Option<Arc<TokenTerms>> {
        let list = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let (networks, methods) = (list(networks), list(methods));
        TokenTerms::of(SaidTerms { plan: plan.into(), rate: rate.into(), networks, methods }).unwrap()
    }

    #[test]
    fn other_programs_say_how_a_token_may_be_used() {
        let bound = terms("gold", "9/s", &["10.0.0.0/8", "::1"], &["GET", "HEAD"]);
        let text = r#"{"user":"a","plan":"gold","rate":"9/s","networks":"10.0.0.0/8 ::1","methods":["GET","HEAD"]}"#;
        assert_eq!(json(text).unwrap().terms, bound);
        let fields =
            [("user", "a"), ("plan", "gold"), ("rate", "9/s"), ("networks", "10.0.0.0/8 ::1"), ("methods", "GET HEAD")];
        assert_eq!(hash(&fields).unwrap().terms, bound);
        let fields = [("user", "a"), ("plan", ""), ("rate", ""), ("networks", ""), ("methods", "")];
        assert_eq!(hash(&fields).unwrap().terms, None);
        assert_eq!(json(r#"{"user":"a","plan":null,"networks":[],"methods":[]}"#).unwrap().terms, None);
        for (text, field) in [
            (r#""plan":"S3CRET x""#, "plan"),
            (r#""rate":600"#, "rate"),
            (r#""rate":"S3CRET""#, "rate"),
            (r#""networks":["S3CRET"]"#, "networks"),
            (r#""networks":{"10.0.0.0/8":1}"#, "networks"),
            (r#""methods":["get"]"#, "methods"),
            (r#""network":["10.0.0.0/8"]"#, "network"),
        ] {
            let why = json(&format!(r#"{{"user":"a",{text}}}"#)).unwrap_err();
            assert!(why.contains(field) && !why.contains("S3CRET"), "{text}: {why}");
        }
    }

    #[test]
    fn other_programs_write_in_other_ways() {
        let record =
            json(r#"{"user":"a","scopes":"api  read","expires":"2027-01-01T02:00:00.5+02:00","x_":[1],"blocked":1}"#);
        let record = record.unwrap();
        assert_eq!(
            (record.scopes.join(","), record.expires, record.blocked),
            ("api,read".into(), Some(1_798_761_600), true)
        );
        for (text, seconds) in [
            ("2027-01-01T00:00:00Z", 1_798_761_600),
            ("2027-01-01", 1_798_761_600),
            ("2027-01-01 05:30:00+05:30", 1_798_761_600),
            ("2026-12-31T19:00:00.123-05:00", 1_798_761_600),
        ] {
            let record = json(&format!(r#"{{"user":"a","expires":"{text}"}}"#));
            assert_eq!(record.unwrap().expires, Some(seconds), "{text}");
        }
        assert_eq!(json(r#"{"user":"a","revoked":true}"#).unwrap().revoked, Some(1));
        assert_eq!(json(r#"{"user":"a","revoked":false,"expires":1.8e9}"#).unwrap().expires, Some(1_800_000_000));
        assert_eq!(json(r#"{"user":"a","scopes":null}"#).unwrap().scopes, ["default"]);
        let record =
            hash(&[("user", "a"), ("scopes", "[\"api\"]"), ("revoked", ""), ("expires", "1800000000")]).unwrap();
        assert_eq!((record.scopes, record.revoked, record.expires), (vec!["api".into()], None, Some(1_800_000_000)));
    }

    #[test]
    fn what_makes_no_sense_is_named_and_not_shown() {
        for (text, part) in [
            ("S3CRET", "is no JSON"),
            ("[\"S3CRET\"]", "must be a JSON object"),
            (r#"{"x_name":"S3CRET"}"#, "field user: is missing"),
            (r#"{"user":"a","expires_at":"S3CRET"}"#, "field \"expires_at\" is none of tollgate's"),
            (r#"{"user":"a","revoked_at":"S3CRET"}"#, "field \"revoked_at\" is none of tollgate's"),
            (r#"{"user":"a","User":"S3CRET"}"#, "field \"User\" is none of tollgate's"),
            (r#"{"user":"a","revoked":true,"revoked":false}"#, "has a key twice"),
            (r#"{"user":"S3CRET","us\u0065r":"a"}"#, "has a key twice"),
            (r#"{"user":"a","x_more":{"y":1,"y":2}}"#, "has a key twice"),
            (r#"{"user":""}"#, "field user: is missing"),
            (r#"{"user":7}"#, "field user: must be a text"),
            (r#"{"user":"a","expires":"S3CRET"}"#, "field expires: must be unix seconds"),
            (r#"{"user":"a","expires":1800000000000}"#, "field expires: must be unix seconds"),
            (r#"{"user":"a","expires":0}"#, "field expires: 0 is no time"),
            (r#"{"user":"a","expires":-5}"#, "field expires"),
            (r#"{"user":"a","revoked":1}"#, "field revoked"),
            (r#"{"user":"a","revoked":"maybe"}"#, "field revoked"),
            (r#"{"user":"a","blocked":"S3CRET"}"#, "field blocked"),
            (r#"{"user":"a","scopes":[1]}"#, "field scopes"),
            (r#"{"user":"a","replaces":"S3CRET"}"#, "field replaces"),
        ] {
            let why = json(text).unwrap_err();
            assert!(why.contains(part) && why.contains(Digest::of(b"t").id().as_str()), "{why}");
            assert!(!why.contains("S3CRET"), "{why}");
        }
        assert!(hash(&[("user", "a"), ("expires_at", "1")]).unwrap_err().contains("expires_at"));
        assert!(hash(&[("user", "a"), ("x_expires_at", "1")]).is_ok());
        assert!(hash(&[("user", "a"), ("revoked", "0")]).unwrap_err().contains("field revoked"));
    }

    #[test]
    fn an_edit_keeps_what_it_does_not_know() {
        let text = edited(r#"{"user":"a","x_theirs":{"x":1}}"#, &[("revoked", 1_800_000_000.into())]).unwrap();
        assert!(text.contains(r#""x_theirs":{"x":1}"#) && text.contains(r#""revoked":1800000000"#), "{text}");
    }
}
