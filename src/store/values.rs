//! The values allowed in a record: one rule for each kind of text, one way to write and parse a time. Errors say what
//! is wrong and never quote the value.

use std::time::Duration;

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

/// Parses `2026-01-31T12:00:00Z` or `2026-01-31` into Unix seconds.
pub fn parse_time(text: &str) -> Option<u64> {
    // The parser ignores anything after a fraction, for example an offset from UTC, so nothing of the kind may reach
    // it.
    let clock = text.get(10..).unwrap_or_default();
    if !clock.bytes().all(|b| b.is_ascii_digit() || b"T :.Z".contains(&b)) {
        return None;
    }
    let time = humantime::parse_rfc3339_weak(text).or_else(|_| humantime::parse_rfc3339(&format!("{text}T00:00:00Z")));
    Some(time.ok()?.duration_since(std::time::UNIX_EPOCH).ok()?.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_utc_is_a_time() {
        for (text, seconds) in [
            ("1970-01-02", Some(86_400)),
            ("1970-01-01T00:00:05Z", Some(5)),
            ("1970-01-01T00:00:05.9Z", Some(5)),
            ("1970-01-01 00:00:05", Some(5)),
            ("9999-12-31T23:59:59Z", Some(LATEST)),
            ("1970-01-01T02:00:00.5+02:00", None),
            ("1970-01-01T02:00:00+02:00", None),
            ("1970-01-01T02:00:00-02:00", None),
            ("1969-12-31", None),
            ("tomorrow", None),
            ("", None),
        ] {
            assert_eq!(parse_time(text), seconds, "{text}");
            assert!(seconds.is_none_or(|seconds| parse_time(&rfc3339(seconds)) == Some(seconds)));
        }
        for late in [LATEST + 1, u64::MAX / 2, u64::MAX] {
            assert_eq!(rfc3339(late), "out of range");
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
