//! Files that people and programs write: token files, the cache's file, configurations. Nothing that is said of them may hold a
//! secret that stands in them.

use serde_json::Value;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeSet;
use tollgate::config::{Probe, parse};
use tollgate::identity::fuzzing::read_cache_file;
use tollgate::store::file::fuzzing::read_tokens;

/// Stands for a secret in the inputs; it is in the dictionary too.
const SECRET: &str = "S3CRET";

pub fn tokens(data: &[u8]) {
    let Some((options, text)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let json = options & 1 != 0;
    let records = match read_tokens(text, json) {
        Ok(records) => records,
        Err(said) => {
            assert!(!said.contains(SECRET), "a secret in what is said: {said}");
            return;
        }
    };
    let whole: Value = match json {
        true => serde_json::from_str(text).expect("no JSON"),
        false => {
            let table: toml::Table = toml::from_str(text).expect("no TOML");
            serde_json::to_value(table).expect("a table")
        }
    };
    let all = whole.get("token").and_then(Value::as_array).cloned().unwrap_or_default();
    assert_eq!(records.len(), all.len(), "another number of tokens");
    let known: BTreeSet<(String, String)> =
        records.iter().map(|record| (record.digest.to_hex(), record.user.clone())).collect();
    for entry in all {
        let text = |key: &str| entry.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let record = (text("sha256").to_ascii_lowercase(), text("user"));
        assert!(known.contains(&record), "an entry was read as another one: {record:?}");
        let digest =
            |record: &&tollgate::store::TokenRecord| record.digest.to_hex() == text("sha256").to_ascii_lowercase();
        let found = records.iter().find(digest).expect("found above");
        let blocked = entry.get("blocked").and_then(Value::as_bool).unwrap_or_default();
        assert_eq!(found.blocked, blocked, "blocked");
        assert_eq!(found.revoked.is_some(), is_said(&entry, "revoked"), "revoked");
        assert_eq!(found.expires.is_some(), is_said(&entry, "expires"), "expires");
        let scopes = entry.get("scopes").and_then(Value::as_array).cloned().unwrap_or_default();
        let held: BTreeSet<&str> = found.scopes.iter().map(String::as_str).collect();
        let given: BTreeSet<&str> = scopes.iter().filter_map(Value::as_str).collect();
        assert!(held.is_subset(&given), "scopes that nobody gave");
    }
}

fn is_said(entry: &Value, key: &str) -> bool {
    !matches!(entry.get(key), None | Some(Value::Null))
}

const ORIGIN: &str = "file:t";
const NOW: u64 = 1_800_000_000_000;

/// A header and entries; the sum is added unless the input says no.
pub fn cache(data: &[u8]) {
    let Some((options, body)) = data.split_first() else { return };
    let Ok(body) = std::str::from_utf8(body) else { return };
    let mut text = body.to_owned();
    if options & 1 == 0 {
        if !text.ends_with('\n') {
            text.push('\n');
        }
        let sum: String = Sha256::digest(&text).iter().map(|byte| format!("{byte:02x}")).collect();
        text.push_str(&format!("{sum}\n"));
    }
    let Ok(entries) = read_cache_file(&text, ORIGIN, NOW) else { return };
    // The same by a reader that knows nothing of the format but the lines.
    let lines: Vec<&str> = text.trim_end_matches('\n').lines().collect();
    let (sum, lines) = lines.split_last().expect("nothing");
    let body: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let own: String = Sha256::digest(&body).iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(
        sum.eq_ignore_ascii_case(&own) || body.len() + sum.len() != text.trim_end_matches('\n').len(),
        "another sum"
    );
    let header: Value = serde_json::from_str(lines[0]).expect("no header");
    assert_eq!(header["format"], "tollgate cache 3");
    assert_eq!(header["origin"], ORIGIN);
    assert!(header["taken_at"].as_u64().is_some_and(|at| at <= NOW && NOW - at <= 24 * 3_600_000), "an old file");
    assert_eq!(header["entries"].as_u64(), Some(entries.len() as u64), "another number of entries");
    assert_eq!(lines.len() - 1, entries.len(), "another number of lines");
    for (line, (digest, user, scopes, fresh, stale)) in lines[1..].iter().zip(entries) {
        let line: Value = serde_json::from_str(line).expect("no entry");
        let same = line["sha256"].as_str().is_some_and(|hex| hex.eq_ignore_ascii_case(&digest.to_hex()))
            && line["principal"]["user"] == user.as_str()
            && line["principal"]["scopes"] == serde_json::json!(scopes)
            && line["fresh_until"].as_u64() == Some(fresh)
            && line["stale_until"].as_u64() == Some(stale);
        assert!(same, "an entry was read as another one");
    }
}

/// Keys of a store that may hold a secret, or one by mistake.
const KEYS: [&str; 12] = [
    "url",
    "endpoint",
    "lookup",
    "password",
    "client_secret",
    "client_id",
    "username",
    "password_file",
    "client_secret_file",
    "prefix",
    "tls_ca",
    "url_or_so",
];
const KINDS: [&str; 5] = ["sqlite", "file", "postgres", "redis", "introspection"];

const UPSTREAM: &str = "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n";

/// An odd first byte: any text. An even one: a store with a secret in one of its keys.
pub fn config(data: &[u8]) {
    let Some(([options, kind, key], text)) = data.split_first_chunk::<3>() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    // A configuration names files, which are read.
    if ["/dev", "/proc", "/sys"].iter().any(|folder| text.contains(folder)) {
        return;
    }
    let free = options & 1 != 0;
    // The password of a URL, which is parsed.
    let is_password = !free && options & 4 != 0;
    let text = if free {
        text.to_owned()
    } else if is_password {
        let (kind, key, scheme) = match kind & 1 {
            0 => ("postgres", "url", "postgres"),
            _ => ("introspection", "endpoint", "http"),
        };
        let url = toml::Value::String(format!("{scheme}://u:{SECRET}{text}@127.0.0.1/x"));
        format!("{UPSTREAM}[[store]]\nkind = \"{kind}\"\n{key} = {url}\n")
    } else {
        let value = toml::Value::String(text.replace('#', SECRET));
        let (kind, key) = (KINDS[usize::from(*kind) % KINDS.len()], KEYS[usize::from(*key) % KEYS.len()]);
        let value = if options & 2 == 0 { value.to_string() } else { format!("[{value}]") };
        format!("{UPSTREAM}[[store]]\nkind = \"{kind}\"\n{key} = {value}\n")
    };
    let file = std::path::Path::new("/nonexistent/tollgate.toml");
    let read = || parse(&text, file, Probe::Settings);
    let (found, debug) = match read() {
        Ok(settings) => (settings.warnings.clone(), format!("{settings:?}")),
        Err(found) => (found, String::new()),
    };
    let again = match read() {
        Ok(settings) => settings.warnings,
        Err(found) => found,
    };
    assert_eq!(found, again, "another result at the second time");
    let lines = text.split('\n').count();
    for diagnostic in &found {
        let place = diagnostic.place.map(|position| (&diagnostic.file, position));
        let related = diagnostic.related.as_ref().map(|(file, position)| (file, *position));
        // Of another file, which a pattern of `include` named, the lines are not known here.
        for (_, position) in [place, related].into_iter().flatten().filter(|(of, _)| *of == file) {
            assert!((1..=lines).contains(&position.line) && position.column >= 1, "a place outside of the file");
        }
        assert!(free || !said(diagnostic).contains(SECRET), "{}", said(diagnostic));
    }
    assert!(!is_password || !debug.contains(SECRET), "a secret in Debug");
}

fn said(diagnostic: &tollgate::config::Diagnostic) -> String {
    format!("{diagnostic}\n{}", diagnostic.json())
}
