//! The values allowed in a record: one rule for each kind of text, one way to write and parse a time. Errors say what
//! is wrong and never quote the value.

use std::time::Duration;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// 31 December 9999, 23:59:59: the last second that RFC 3339 can write.
pub const LATEST: u64 = 253_402_300_799;

/// Longer names do not fit into a header field.
const LONGEST_NAME: usize = 255;

/// The name of a user. It is sent to backends in a header field, which loses leading and trailing blanks, and to
/// terminals.
pub fn check_user(user: &str) -> Result<(), &'static str> {
    if user.trim().is_empty() {
        return Err("must not be empty");
    }
    if user.len() > LONGEST_NAME {
        return Err("must be of at most 255 bytes");
    }
    if user.trim() != user {
        return Err("must not begin or end with a blank");
    }
    if user.chars().any(is_unseen) {
        return Err("must not hold control characters");
    }
    Ok(())
}

/// A scope is one word, because some stores keep all scopes in one text.
pub fn check_scope(scope: &str) -> Result<(), &'static str> {
    if scope.is_empty() || scope.contains(char::is_whitespace) {
        return Err("must be one word");
    }
    if scope.len() > LONGEST_NAME {
        return Err("must be of at most 255 bytes");
    }
    if scope.chars().any(is_unseen) {
        return Err("must not hold control characters");
    }
    Ok(())
}

/// Text for people, of any number of lines. PostgreSQL cannot store NUL bytes.
pub fn check_description(text: &str) -> Result<(), &'static str> {
    if text.contains('\0') { Err("must not hold a NUL byte") } else { Ok(()) }
}

/// Characters that a terminal interprets, or that make two names look the same: control characters, line separators,
/// changes of the writing direction, and the byte order mark.
pub fn is_unseen(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{061c}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// Formats Unix seconds like `2026-01-31T12:00:00Z`.
pub fn rfc3339(seconds: u64) -> String {
    if seconds > LATEST {
        return "out of range".into();
    }
    let time = std::time::UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
    time.map_or_else(|| "out of range".into(), |time| humantime::format_rfc3339_seconds(time).to_string())
}

/// Parses `2026-01-31T12:00:00Z`, with an offset like `+02:00` instead of the `Z` as well; without either, and for a day
/// alone, the time is in UTC. Fractions of a second are dropped. The one way in which text becomes Unix seconds.
pub fn parse_time(text: &str) -> Option<u64> {
    let (day, clock) = text.split_at_checked(10)?;
    let time = match clock.as_bytes() {
        [] => format!("{day}T00:00:00Z"),
        // The parser takes any separator.
        [b'T' | b't' | b' ', ..] if clock.ends_with(['Z', 'z']) || clock.contains(['+', '-']) => text.to_owned(),
        [b'T' | b't' | b' ', ..] => format!("{text}Z"),
        _ => return None,
    };
    let time = OffsetDateTime::parse(&time, &Rfc3339).ok()?;
    u64::try_from(time.unix_timestamp()).ok().filter(|seconds| *seconds <= LATEST)
}

/// Parses the scopes of a foreign record: words, a JSON array of strings, or a YAML list of words as Rails writes it. The one
/// way in which text becomes scopes.
pub fn parse_scopes(text: &str) -> Option<Vec<String>> {
    let text = text.trim();
    if text.starts_with('[') {
        return serde_json::from_str(text).ok();
    }
    let Some(yaml) = text.strip_prefix("---") else {
        let plain = !text.starts_with(['{', '"']);
        return plain.then(|| text.split_whitespace().map(str::to_owned).collect());
    };
    let yaml = yaml.trim();
    if let Some(flow) = yaml.strip_prefix('[') {
        let names = flow.strip_suffix(']')?.split(',').filter(|name| !name.trim().is_empty());
        return names.map(yaml_name).collect();
    }
    yaml.lines().map(|line| yaml_name(line.trim_start().strip_prefix("- ")?)).collect()
}

/// `api`, `'api'`, `"api"`, and Ruby's `:api`.
fn yaml_name(text: &str) -> Option<String> {
    let text = text.trim();
    let text = text.strip_prefix(':').unwrap_or(text);
    let bare = ['"', '\''].iter().find_map(|quote| text.strip_prefix(*quote)?.strip_suffix(*quote)).unwrap_or(text);
    let fine = !bare.is_empty() && bare.chars().all(|c| c.is_ascii_alphanumeric() || "_-.:/".contains(c));
    fine.then(|| bare.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        for (text, seconds) in [
            ("1970-01-02", Some(86_400)),
            ("1970-01-01T00:00:05Z", Some(5)),
            ("1970-01-01T00:00:05.9Z", Some(5)),
            ("1970-01-01 00:00:05", Some(5)),
            ("9999-12-31T23:59:59Z", Some(LATEST)),
            ("1970-01-01t00:00:05z", Some(5)),
            ("1970-01-01T02:00:00.5+02:00", Some(0)),
            ("1970-01-01T02:00:05+02:00", Some(5)),
            ("1970-01-01T02:00:00-02:00", Some(14_400)),
            ("1970-01-01T01:00:00+02:00", None),
            ("9999-12-31T23:59:59-00:01", None),
            ("10000-01-01T00:00:00Z", None),
            ("1970-01-01T00:00:05+02", None),
            ("1970-01-01T00:00:05+24:00", None),
            ("1970-01-01T00:00:05+02:60", None),
            ("1970-01-01T00:00:05Z+02:00", None),
            ("1970-01-01T00:00:05 Z", None),
            ("1970-01-01x00:00:05Z", None),
            ("1970-01-01T00:00", None),
            ("1970-01-01T24:00:00Z", None),
            ("1970-02-30", None),
            ("19700101", None),
            ("1970-01-01Z", None),
            ("é970-01-01", None),
            ("1969-12-31", None),
            ("tomorrow", None),
            ("", None),
        ] {
            assert_eq!(parse_time(text), seconds, "{text}");
            assert!(seconds.is_none_or(|seconds| parse_time(&rfc3339(seconds)) == Some(seconds)), "{text}");
        }
        for late in [LATEST + 1, u64::MAX / 2, u64::MAX] {
            assert_eq!(rfc3339(late), "out of range");
        }
    }

    #[test]
    fn scopes_in_every_spelling() {
        let two = Some(vec!["api".to_owned(), "read_user".to_owned()]);
        for text in [
            "api read_user",
            " api\tread_user\n",
            r#"["api", "read_user"]"#,
            "---\n- api\n- read_user\n",
            "---\n- :api\n- 'read_user'\n",
            "--- [api, \"read_user\"]\n",
            "---\r\n  - api\r\n  - read_user\r\n",
        ] {
            assert_eq!(parse_scopes(text), two, "{text:?}");
        }
        for text in ["", " ", "[]", "--- []\n", "---\n"] {
            assert_eq!(parse_scopes(text), Some(vec![]), "{text:?}");
        }
        for text in ["[1]", "[", "{}", "{api,read_user}", "---\napi: true\n", "--- {a: b}", "---\n- [a]\n", "\"api\""] {
            assert_eq!(parse_scopes(text), None, "{text:?}");
        }
    }

    #[test]
    fn names_are_seen_as_they_are() {
        let long = "é".repeat(127);
        for user in ["alice", "Alice B. Ó Cé", "a@b.example", "50%", "名前", "क्‍ष", "👩‍🚀", "a,b;c=d", "\"", &long]
        {
            assert_eq!(check_user(user), Ok(()), "{user:?}");
        }
        let longer = "x".repeat(256);
        for user in [
            "",
            " ",
            "\t",
            "\u{a0}",
            " alice",
            "alice ",
            "alice\n",
            "al\nice",
            "al\tice",
            "al\u{1b}[2Jice",
            "a\0b",
            "a\x7fb",
            "a\u{85}b",
            "a\u{9b}b",
            "a\u{2028}b",
            "a\u{202e}b",
            "\u{feff}alice",
            "a\u{200b}b",
            "a\u{2067}b",
            &longer,
        ] {
            assert!(check_user(user).is_err(), "{user:?}");
        }
        for scope in ["api", "read_user", "a:b/c", "é"] {
            assert_eq!(check_scope(scope), Ok(()), "{scope:?}");
        }
        for scope in ["", " ", "a b", "a\tb", "a\n", "a\u{a0}b", "a\u{3000}b", "a\x1bb", "a\0", "a\u{202e}", &longer] {
            assert!(check_scope(scope).is_err(), "{scope:?}");
        }
        assert!(check_description("two\nlines\t\u{1b}").is_ok() && check_description("a\0b").is_err());
    }
}
