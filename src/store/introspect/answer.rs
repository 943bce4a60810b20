//! Interprets the body of a response. Pure: bytes in, a record or an error out. Errors name places in the response and
//! never its values.

use super::super::json::Unambiguous;
use super::super::values::parse_scopes;
use super::super::{StoreError, TokenRecord};
use crate::store::credential::Digest;
use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderMap, RETRY_AFTER};
use serde_json::Value;

/// Maximum length of a user's name in bytes, as it becomes a header field.
const USER_BYTES: usize = 255;

/// Where the values are in a response.
pub(super) struct Shape {
    /// RFC 7662: `active` says whether the token is valid. Otherwise the status does.
    pub(super) rfc7662: bool,
    /// JSON pointers; the first that finds a string or a number is used.
    pub(super) user: Vec<String>,
    /// A JSON pointer; `None`: responses have no scopes.
    pub(super) scopes: Option<String>,
    pub(super) default_scopes: Vec<String>,
}

impl Shape {
    /// `Ok(None)`: the endpoint does not know the token.
    pub(super) fn read(&self, body: &[u8], digest: Digest) -> Result<Option<TokenRecord>, StoreError> {
        let value = parse(body)?;
        if self.rfc7662 {
            match value.get("active") {
                Some(Value::Bool(true)) => {}
                Some(Value::Bool(false)) => return Ok(None),
                _ => return Err(garbage("\"active\" is missing or neither true nor false")),
            }
        }
        let mut record = TokenRecord::new(digest, self.user_of(&value)?);
        record.scopes = self.scopes_of(&value)?;
        if self.rfc7662 {
            record.expires = time(&value, "exp")?;
            record.not_before = time(&value, "nbf")?;
            record.created = time(&value, "iat")?.unwrap_or(0);
        } else {
            // GitLab: active, blocked, ldap_blocked, deactivated, banned.
            record.blocked = value.get("state").is_some_and(|state| state != "active");
        }
        Ok(Some(record))
    }

    fn user_of(&self, value: &Value) -> Result<String, StoreError> {
        let user = self.user.iter().find_map(|pointer| match value.pointer(pointer)? {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) if !number.is_f64() => Some(number.to_string()),
            _ => None,
        });
        match user {
            None => Err(garbage(format!("no text or number at {}", self.user.join(", ")))),
            Some(user) if user.trim().is_empty() => Err(garbage("the user's name is empty")),
            Some(user) if user.len() > USER_BYTES => {
                Err(garbage(format!("the user's name is longer than {USER_BYTES} bytes")))
            }
            Some(user) if user.chars().any(char::is_control) => {
                Err(garbage("the user's name has control characters in it"))
            }
            Some(user) => Ok(user),
        }
    }

    fn scopes_of(&self, value: &Value) -> Result<Vec<String>, StoreError> {
        let Some(pointer) = &self.scopes else { return Ok(self.default_scopes.clone()) };
        let wrong = || garbage(format!("what stands at {pointer} is neither a list of texts nor a text"));
        match value.pointer(pointer) {
            None | Some(Value::Null) => Ok(self.default_scopes.clone()),
            Some(Value::String(text)) => parse_scopes(text).ok_or_else(wrong),
            Some(Value::Array(list)) => {
                list.iter().map(|scope| scope.as_str().map(str::to_owned).ok_or_else(wrong)).collect()
            }
            Some(_) => Err(wrong()),
        }
    }
}

pub(super) fn garbage(why: impl Into<String>) -> StoreError {
    StoreError::Garbage(why.into())
}

/// Why a status for "no such token" may have another reason, or come from a rate limiter or firewall in front of the
/// endpoint. `None`: it is the endpoint's own. 401 has this meaning in HTTP and needs no further evidence; the other
/// statuses are less specific, and must have a JSON body like the endpoint's other responses.
pub(super) fn doubt(status: StatusCode, headers: &HeaderMap, body: Option<&[u8]>) -> Option<&'static str> {
    if headers.contains_key(RETRY_AFTER) {
        return Some(
            "asks to come back later (Retry-After): it limits how often it is asked, so exempt tollgate's address",
        );
    }
    let spent = |name: &str| headers.get_all(name).iter().any(|left| left.as_bytes().trim_ascii() == b"0");
    if ["ratelimit-remaining", "x-ratelimit-remaining", "x-rate-limit-remaining"].into_iter().any(spent) {
        return Some("has no requests left for tollgate: exempt its address from the limit");
    }
    if headers.contains_key("cf-mitigated") {
        return Some("a firewall in front of the endpoint gave it: let tollgate's address through");
    }
    if status == StatusCode::UNAUTHORIZED {
        return None;
    }
    let mut kinds = headers.get_all(CONTENT_TYPE).iter();
    let json = matches!((kinds.next(), kinds.next()), (Some(kind), None) if is_json(kind.as_bytes()));
    if !json || body.is_none_or(|body| parse(body).is_err()) {
        return Some("not as the endpoint answers, with an object in JSON: did a firewall or limiter in front of it?");
    }
    None
}

/// `application/json` or `application/…+json`, whatever the parameters.
pub(super) fn is_json(content_type: &[u8]) -> bool {
    let kind = content_type.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii().to_ascii_lowercase();
    kind.strip_prefix(b"application/")
        .is_some_and(|subtype| subtype == b"json" || (subtype.ends_with(b"+json") && subtype.len() > b"+json".len()))
}

/// Integer Unix seconds. `null` counts as absent; a fraction or a time before 1970 is an error.
fn time(value: &Value, key: &str) -> Result<Option<u64>, StoreError> {
    match value.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(number) => {
            number.as_u64().map(Some).ok_or_else(|| garbage(format!("\"{key}\" is no whole number of seconds")))
        }
    }
}

fn parse(body: &[u8]) -> Result<Value, StoreError> {
    // The parser's message may quote the response.
    let Unambiguous(value) = serde_json::from_slice(body).map_err(|error| {
        garbage(format!("no JSON without doubt (line {}, column {})", error.line(), error.column()))
    })?;
    if value.is_object() { Ok(value) } else { Err(garbage("JSON, but no object")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(rfc7662: bool) -> Shape {
        Shape {
            rfc7662,
            user: ["/username", "/sub", "/deep/0/id"].map(str::to_owned).into(),
            scopes: Some("/scope".into()),
            default_scopes: vec!["api".into()],
        }
    }

    fn read(rfc7662: bool, body: &str) -> Result<Option<TokenRecord>, StoreError> {
        shape(rfc7662).read(body.as_bytes(), Digest::of(b"t"))
    }

    #[test]
    fn users() {
        let longest = "é".repeat(127) + "x";
        for (body, user) in [
            (r#"{"username":"anna"}"#, "anna"),
            (r#"{"username":null,"sub":"anna"}"#, "anna"),
            (r#"{"username":{},"sub":"anna"}"#, "anna"),
            (r#"{"username":true,"sub":7}"#, "7"),
            (r#"{"username":-7}"#, "-7"),
            (r#"{"username":1.5,"sub":"anna"}"#, "anna"),
            (r#"{"deep":[{"id":18446744073709551615}]}"#, "18446744073709551615"),
            (r#"{"username":"\u00e9 \"x\""}"#, "é \"x\""),
            (&format!(" {{\"username\":\"{longest}\"}}\r\n"), &longest),
        ] {
            assert_eq!(read(false, body).unwrap().unwrap().user, user, "{body}");
        }
    }

    /// They mean something else there: what somebody pays, where he lives.
    #[test]
    fn an_answer_says_nothing_of_how_a_token_may_be_used() {
        let body =
            r#"{"active":true,"username":"anna","plan":"gold","rate":9,"networks":["10.0.0.0/8"],"methods":["GET"]}"#;
        for rfc7662 in [false, true] {
            assert_eq!(read(rfc7662, body).unwrap().unwrap().terms, None);
        }
    }

    #[test]
    fn what_is_no_record() {
        let long = format!(r#"{{"username":"{}"}}"#, "x".repeat(256));
        let deep = format!(r#"{{"username":"a","x":{}1{}}}"#, "[".repeat(1_000), "]".repeat(1_000));
        for body in [
            "",
            "{",
            "{}",
            "null",
            "true",
            "[]",
            "\"S3CRET\"",
            "<html>S3CRET</html>",
            r#"[{"username":"S3CRET"}]"#,
            r#"{"message":"401 S3CRET"}"#,
            r#"{"username":null}"#,
            r#"{"username":""}"#,
            r#"{"username":" "}"#,
            r#"{"username":"","sub":"S3CRET"}"#,
            r#"{"username":["S3CRET"]}"#,
            r#"{"username":1.5}"#,
            r#"{"username":1e400}"#,
            r#"{"username":"a\u0000S3CRET"}"#,
            r#"{"username":"a\r\nS3CRET: x"}"#,
            r#"{"username":"a\ud800"}"#,
            r#"{"username":"S3CRET","username":"S3CRET"}"#,
            r#"{"username":"a","x":[{"S3CRET":1,"S3CRET":2}]}"#,
            r#"{"username":"a"} {}"#,
            r#"{"username":"a""#,
            r#"{"username":"a","scope":7}"#,
            r#"{"username":"a","scope":["api",7]}"#,
            r#"{"username":"a","scope":{}}"#,
            "{\"username\":\"a\u{0}S3CRET\"}",
            "{'username':'a'}",
            &long,
            &deep,
        ] {
            let error = read(false, body).unwrap_err();
            assert!(matches!(error, StoreError::Garbage(_)), "{body}: {error}");
            assert!(!error.to_string().contains("S3CRET"), "{error}");
        }
        let error = shape(false).read(b"{\"username\":\"\xff\"}", Digest::of(b"t")).unwrap_err();
        assert!(matches!(error, StoreError::Garbage(_)), "{error}");
    }

    #[test]
    fn scopes() {
        for (scope, scopes) in [
            (r#""scope":"api  read""#, &["api", "read"][..]),
            (r#""scope":["api","read user"]"#, &["api", "read user"]),
            (r#""scope":"""#, &[]),
            (r#""scope":[]"#, &[]),
            (r#""scope":null"#, &["api"]),
            (r#""x":1"#, &["api"]),
        ] {
            let body = format!(r#"{{"username":"a",{scope}}}"#);
            assert_eq!(read(false, &body).unwrap().unwrap().scopes, scopes, "{scope}");
        }
        let shape = Shape { scopes: None, ..shape(false) };
        let record = shape.read(br#"{"username":"a","scope":"x"}"#, Digest::of(b"t")).unwrap().unwrap();
        assert_eq!(record.scopes, ["api"], "nobody asked for those of the answer");
    }

    #[test]
    fn states_of_users() {
        for (state, blocked) in [
            ("", false),
            (r#","state":"active""#, false),
            (r#","state":"blocked""#, true),
            (r#","state":"ldap_blocked""#, true),
            (r#","state":"Active""#, true),
            (r#","state":null"#, true),
            (r#","state":{}"#, true),
        ] {
            let body = format!(r#"{{"username":"a"{state}}}"#);
            assert_eq!(read(false, &body).unwrap().unwrap().blocked, blocked, "{state}");
        }
        let body = r#"{"active":true,"username":"a","state":"xyz"}"#;
        assert!(!read(true, body).unwrap().unwrap().blocked, "RFC 7662 has no such thing");
    }

    #[test]
    fn rfc7662() {
        let body =
            r#"{"active":true,"sub":"anna","scope":"a b","exp":1800000000,"nbf":1600000000,"iat":5,"aud":["x"]}"#;
        let record = read(true, body).unwrap().unwrap();
        assert_eq!((record.expires, record.not_before, record.created), (Some(1_800_000_000), Some(1_600_000_000), 5));
        assert_eq!((record.user.as_str(), record.scopes), ("anna", vec!["a".to_owned(), "b".to_owned()]));
        let body = r#"{"active":true,"sub":"anna","exp":null}"#;
        assert_eq!(read(true, body).unwrap().unwrap().expires, None);
        for body in [r#"{"active":false}"#, r#"{"active":false,"sub":"anna","exp":"x"}"#] {
            assert_eq!(read(true, body), Ok(None), "{body}");
        }
        for body in [
            r#"{"sub":"anna"}"#,
            r#"{"active":"true","sub":"anna"}"#,
            r#"{"active":1,"sub":"anna"}"#,
            r#"{"active":null,"sub":"anna"}"#,
            r#"{"Active":true,"sub":"anna"}"#,
            r#"{"active":true}"#,
            r#"{"active":true,"active":false,"sub":"anna"}"#,
            r#"{"active":true,"sub":"anna","exp":1800000000.5}"#,
            r#"{"active":true,"sub":"anna","exp":1.8e9}"#,
            r#"{"active":true,"sub":"anna","exp":"1800000000"}"#,
            r#"{"active":true,"sub":"anna","exp":-1}"#,
            r#"{"active":true,"sub":"anna","exp":18446744073709551616}"#,
            r#"{"active":true,"sub":"anna","nbf":false}"#,
            r#"{"active":true,"sub":"anna","iat":{}}"#,
        ] {
            assert!(matches!(read(true, body), Err(StoreError::Garbage(_))), "{body}");
        }
    }

    #[test]
    fn content_types() {
        for (content_type, expected) in [
            ("application/json", true),
            ("APPLICATION/JSON ;charset=utf-8", true),
            (" application/token-introspection+json", true),
            ("application/jsonp", false),
            ("application/+json", false),
            ("application/json+x", false),
            ("text/json", false),
            ("text/html", false),
            ("text/html; application/json", false),
            ("application/json, text/html", false),
            ("application/xml", false),
            ("json", false),
            ("", false),
            ("\u{e9}", false),
        ] {
            assert_eq!(is_json(content_type.as_bytes()), expected, "{content_type}");
        }
    }
}
