//! The configuration as the admin listener shows it. A value is shown only where its kind or its key is known to hold no secret:
//! what is not known is hidden.

use super::{Document, REFERENCE};
use crate::admin::{ShownConfig, ShownKey, ShownSection};
use std::path::Path;
use toml::{Table, Value};

/// Kinds of values that are a number, a word of a list, an address, a pattern or a name. Not here: URLs, headers, plain text.
const OPEN_KINDS: [&str; 74] = [
    "AmbiguousPathsWord",
    "AuthMode",
    "BalanceBy",
    "BasicUsersText",
    "Beyond",
    "BodyPolicy",
    "BoundAs",
    "Bytes",
    "CheckKind",
    "ClientCertificate",
    "Duration",
    "FilePath",
    "Forward",
    "HashKey",
    "HeaderName",
    "Identifier",
    "Inherited<Duration>",
    "Inherited<Option<Bytes>>",
    "Inherited<Option<Duration>>",
    "Inherited<Option<u64>>",
    "Inherited<u64>",
    "IntrospectionMode",
    "Level",
    "LimitCostText",
    "ListenAddress",
    "ListenerMode",
    "Option<Bytes>",
    "Option<CanaryText>",
    "Option<Duration>",
    "Option<Fraction>",
    "Option<ListenAddress>",
    "Option<MaxRequests>",
    "Option<Prefix>",
    "Option<QuotaText>",
    "Option<RateText>",
    "Option<u64>",
    "OverridePolicy",
    "ParameterName",
    "PostgresPreset",
    "QueryToken",
    "QueueOrderWord",
    "Ratio",
    "RedisChangesBy",
    "RedisTopology",
    "RoutePattern",
    "SandboxWord",
    "ScopePreset",
    "SharedStore",
    "StoreKind",
    "Strip",
    "Switch",
    "SyslogTarget",
    "Tls",
    "TlsVersions",
    "TraceFields",
    "Untyped",
    "Vec<CertificateText>",
    "Vec<HostName>",
    "Vec<LimitKeyText>",
    "Vec<ListedServer>",
    "Vec<ListenAddress>",
    "Vec<MethodName>",
    "Vec<OtherCredential>",
    "Vec<PoolText>",
    "Vec<Prefix>",
    "Vec<Proxy>",
    "Vec<RouteHost>",
    "Vec<RoutePattern>",
    "Vec<UpstreamAddress>",
    "Vec<u64>",
    "VerdictSourceWord",
    "WhenGoneWord",
    "bool",
    "u64",
];
/// Keys with plain text that is a name, the path of a file or a word all the same.
const OPEN_KEYS: [&str; 27] = [
    "access",
    "audit",
    "channel",
    "check_path",
    "client_ca",
    "client_secret_file",
    "cors_origins",
    "db_key_base_file",
    "master",
    "name",
    "password_file",
    "path_prefix",
    "prefix",
    "reason",
    "routes",
    "scopes",
    "scopes_at",
    "secret_file",
    "snapshot",
    "tls_ca",
    "tls_cert",
    "tls_key",
    "tls_name",
    "upstream",
    "user",
    "username",
    "users",
];
/// Longer values are cut.
const LONGEST: usize = 300;

pub(super) fn shown(document: &Document, file: &Path) -> ShownConfig {
    let mut sections = Vec::new();
    for (name, value) in document.table() {
        add(name, name, value, &mut sections);
    }
    ShownConfig { file: file.display().to_string(), sections }
}

/// `name`: as the reference has it; `header`: as the file has it.
fn add(name: &str, header: &str, value: &Value, sections: &mut Vec<ShownSection>) {
    match value {
        Value::Table(table) if is_section(name) => {
            let mut keys = Vec::new();
            let mut within = Vec::new();
            for (key, value) in table {
                let inner = format!("{name}.{key}");
                match value {
                    // [plan.gold], [[pagination.route]].
                    Value::Table(_) | Value::Array(_) if name == "plan" || is_section(&inner) => {
                        let name = if name == "plan" { name } else { &inner };
                        within.push((name.to_owned(), format!("{header}.{key}"), value));
                    }
                    _ => keys.push(ShownKey { key: key.clone(), value: is_open(name, key).then(|| written(value)) }),
                }
            }
            if !keys.is_empty() {
                sections.push(ShownSection { name: titled(&format!("[{header}]"), name, table), keys });
            }
            for (name, header, value) in within {
                add(&name, &header, value, sections);
            }
        }
        Value::Array(all) => {
            for value in all.iter().filter_map(Value::as_table) {
                let key = |(key, value): (&String, &Value)| ShownKey {
                    key: key.clone(),
                    value: is_open(name, key).then(|| written(value)),
                };
                let keys = value.iter().map(key).collect();
                sections.push(ShownSection { name: titled(&format!("[[{header}]]"), name, value), keys });
            }
        }
        _ => {}
    }
}

/// The header, and which of several it is.
fn titled(header: &str, name: &str, table: &Table) -> String {
    let own =
        ["name", "path", "address", "kind"].into_iter().find(|key| table.contains_key(*key) && is_open(name, key));
    match own.and_then(|key| table.get(key)?.as_str()) {
        Some(own) => format!("{header} {}", cut(own)),
        None => header.to_owned(),
    }
}

/// The reference's entries of a section: a store has one for each kind.
fn entries(name: &str) -> impl Iterator<Item = &'static [super::SectionKey]> {
    let own = name.to_owned();
    REFERENCE.iter().filter_map(move |section| {
        let header = section.header.trim_matches(['[', ']']);
        (header == own || own == "plan" && header.starts_with("plan.")).then_some(section.fields)
    })
}

fn is_section(name: &str) -> bool {
    entries(name).next().is_some()
}

/// Whether values of a key can be shown, in each kind of its section.
fn is_open(section: &str, key: &str) -> bool {
    let mut known = entries(section).flatten().filter(|field| field.key == key).peekable();
    known.peek().is_some() && known.all(|field| OPEN_KINDS.contains(&field.kind) || OPEN_KEYS.contains(&field.key))
}

fn written(value: &Value) -> String {
    cut(&value.to_string())
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(LONGEST) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every key of every section, with a value of its own that may be a secret.
    #[test]
    fn what_may_be_a_secret_is_not_shown_whatever_its_key() {
        let mut text = String::new();
        let mut written = 0;
        for section in &REFERENCE {
            let header = section.header.replace("gold", "S3CRET-not");
            let list = header.starts_with("[[") || section.header == "[[store]]";
            text += &header;
            text += "\n";
            for field in section.fields {
                text +=
                    &format!("{} = \"S3CRET {} {}\"\n", field.key, section.header.trim_matches(['[', ']']), field.key);
                written += 1;
            }
            assert!(list || section.header.starts_with('['));
        }
        let shown = shown(&Document::of([&*text].into_iter()), Path::new("c.toml"));
        let all: Vec<_> = shown.sections.iter().flat_map(|section| &section.keys).collect();
        assert!(written > 240 && all.len() == written, "{written} keys, {} shown or hidden", all.len());
        let mut hidden: Vec<_> = all.iter().filter(|key| key.value.is_none()).map(|key| key.key.as_str()).collect();
        hidden.sort_unstable();
        hidden.dedup();
        // Whoever adds a key here has thought about what somebody might write there.
        assert_eq!(
            hidden,
            [
                "check_body",
                "client_id",
                "endpoint",
                "lookup",
                "otlp",
                "request_headers",
                "response_headers",
                "token_sha256",
                "url",
            ]
        );
        // And a key that nobody knows.
        let shown = super::shown(
            &Document::of(["[token]\npasswort = \"S3CRET\"\n[nowhere]\na = \"S3CRET\"\n"].into_iter()),
            Path::new(""),
        );
        assert!(!format!("{shown:?}").contains("S3CRET"), "{shown:?}");
    }

    #[test]
    fn sections_are_named_as_in_the_file() {
        let text = "[server]\nthreads = 2\n[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n[plan.gold]\nweight = 2\n\
                    [store]\nkind = \"postgres\"\nurl = \"postgres://u:S3CRET@h/d\"\n[pagination]\nmax_per_page = 50\n\
                    [[pagination.route]]\npath = \"/api\"\n[[route]]\npath = \"/x\"\n[route.request_headers.set]\nAuthorization = \"S3CRET\"\n";
        let shown = shown(&Document::of([text].into_iter()), Path::new("/etc/c.toml"));
        let names: Vec<_> = shown.sections.iter().map(|section| section.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "[server]",
                "[[upstream]] api",
                "[plan.gold]",
                "[store] postgres",
                "[pagination]",
                "[[pagination.route]] /api",
                "[[route]] /x"
            ]
        );
        let text = format!("{shown:?}");
        assert!(!text.contains("S3CRET") && text.contains("127.0.0.1:1"), "{text}");
    }
}
