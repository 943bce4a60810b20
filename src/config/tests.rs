//! What a configuration may say, and what is said about a bad one.

use super::*;
use crate::store::{StoreSettings, TlsMode};
use crate::upstream::{AdaptiveBounds, MaxRequests};

/// The settings of a file in `folder`.
fn load(text: &str, folder: &Path) -> Result<Settings, Vec<Diagnostic>> {
    parse(text, &folder.join("c.toml"), Probe::Settings)
}

/// What is said of a text, errors and warnings, without the name of the file in front.
fn said(text: &str, folder: &Path) -> Vec<String> {
    let found = load(text, folder).map_or_else(|found| found, |settings| settings.warnings);
    let file = format!("{}:", folder.join("c.toml").display());
    found.iter().map(|found| found.to_string().strip_prefix(&file).unwrap().trim_start().to_owned()).collect()
}

fn problems(text: &str) -> Vec<String> {
    said(text, Path::new("/conf"))
}

const MINIMAL: &str = "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:3000\"]\n";

#[test]
fn every_default_reads() {
    let settings = load(MINIMAL, Path::new("/conf")).unwrap();
    assert_eq!(settings.stores.len(), 1);
    assert_eq!(settings.stores[0].kind, StoreSettings::Sqlite(Path::new("/conf/tollgate.db").into()));
    assert_eq!(settings.rules.routes.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(), ["/api/v3/*"]);
    // A missing key makes the reader take every stand-in.
    assert_eq!(problems("[[upstream]]\n[[route]]\n[[pagination.route]]\n").len(), 4);
}

#[test]
fn the_example_says_all_and_is_right() {
    let example = example();
    load(&example, Path::new("")).unwrap_or_else(|problems| panic!("{problems:?}"));
    let with_headers = example.replace("\n# [[", "\n[[").replace("\n# [plan", "\n[plan");
    let everything = with_headers.lines().map(|line| {
        let key = line
            .strip_prefix("# ")
            .filter(|rest| rest.split(" = ").next().is_some_and(|k| !k.contains(' ')) && rest.contains(" = "));
        key.unwrap_or(line).to_owned() + "\n"
    });
    load(&everything.collect::<String>(), Path::new("")).unwrap_or_else(|problems| panic!("{problems:?}"));
    let keys: usize = REFERENCE.iter().map(|section| section.fields.len()).sum();
    assert_eq!(keys, 257, "the reference lost or gained keys: update this number on purpose");
    assert!(
        REFERENCE
            .iter()
            .all(|section| !section.doc.is_empty() && section.fields.iter().all(|field| !field.doc.is_empty()))
    );
}

/// Found by the fuzz target: behind an array without its end, the values of other keys were taken for patterns of `include`.
#[test]
fn a_file_that_is_no_toml_includes_none() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("other"), "not TOML\n").unwrap();
    let text = |end: &str| format!("include = [\"other\"{end}\n[[route]]\npath = \"*\"\nauth = \"none\"\n");
    let files = |text: &str| {
        let found = load(text, folder.path()).unwrap_err();
        let mut files: Vec<_> = found.iter().map(|found| found.file.file_name().unwrap().to_owned()).collect();
        files.dedup();
        files
    };
    assert_eq!(files(&text("")), ["c.toml"]);
    assert_eq!(files(&text("]")), ["other"]);
}

/// What it takes and refuses is tried with another author's validator in deploy/references.py.
#[test]
fn every_key_is_on_the_page_and_in_the_schema() {
    let page = page();
    let schema: serde_json::Value = serde_json::from_str(&schema()).unwrap();
    let mut keys = 0;
    for section in &REFERENCE {
        for field in section.fields {
            assert!(page.contains(&format!("\n| `{}` | ", field.key)), "{}", field.key);
        }
        keys += section.fields.len();
    }
    assert_eq!(page.matches("\n| `").count(), keys);
    fn described(value: &serde_json::Value) -> usize {
        match value {
            serde_json::Value::Object(table) => {
                let own = table.get("properties").and_then(|own| own.as_object()).map_or(0, |own| {
                    own.values().filter(|key| key.get("description").is_some_and(|text| text.is_string())).count()
                });
                own + table.values().map(described).sum::<usize>()
            }
            serde_json::Value::Array(list) => list.iter().map(described).sum(),
            _ => 0,
        }
    }
    let named: std::collections::BTreeSet<&str> = REFERENCE.iter().map(|section| section.header).collect();
    // `include`, the tables that stand in the file by themselves, and all keys.
    let tables = named.iter().filter(|header| header.matches('[').count() == 1 && !header.contains('.')).count();
    assert_eq!(described(&schema), 1 + tables + keys);
    assert_eq!(schema["properties"]["store"]["items"]["anyOf"].as_array().unwrap().len(), 5);
    assert_eq!(schema["properties"]["upstream"]["items"]["required"], serde_json::json!(["name", "servers"]));
}

#[test]
fn most_requests_are_a_number_or_adaptive() {
    let read = |text: &str| {
        let settings = load(&format!("{MINIMAL}max_requests = {text}\n"), Path::new("/conf")).unwrap();
        settings.upstreams[0].max_requests
    };
    let adaptive = |least, most| Some(MaxRequests::Adaptive(AdaptiveBounds { least, most }));
    assert_eq!(read("\"none\""), None);
    assert_eq!(read("50"), Some(MaxRequests::Fixed(50)));
    assert_eq!(read("\"adaptive\""), adaptive(2, 1_000));
    assert_eq!(read("{ most = 64 }"), adaptive(2, 64));
    assert_eq!(read("{ least = 4, most = 4 }"), adaptive(4, 4));
    for (text, part) in [
        ("0", "max_requests: is out of range"),
        ("{ least = 0 }", "max_requests: is out of range"),
        ("{ most = 5000000000 }", "max_requests: is out of range"),
        ("{ least = 9, most = 8 }", "max_requests: has a least number above the most"),
        ("\"adaptiv\"", "max_requests: must be a number or \"adaptive\", or \"none\""),
        ("{ least = \"2\" }", "max_requests: least: must be a whole number"),
        ("{ lest = 2 }", "max_requests: has the unknown key `lest`"),
    ] {
        let found = problems(&format!("{MINIMAL}max_requests = {text}\n"));
        assert!(found.len() == 1 && found[0].contains(part), "{text}: {found:?}");
    }
}

#[test]
fn all_problems_are_told_at_once() {
    let text = "\
[server]
listen = \"127.0.0.1:8080\"
treads = 4
[tokens]
[token]
body = \"maybe\"
query = \"private token\"
[cache]
positive_ttl = 60
[limits]
header_bytes = \"32KB\"
[[route]]
path = \"/api/v3/session/\"
[[route]]
path = \"/api/v3/open\"
auth = \"none\"
upstream = \"apu\"
[[upstream]]
name = \"api\"
servers = [\"127.0.0.1\"]
";
    let expected = [
        "2:10: server.listen: must be a list, found \"127.0.0.1:8080\"; put it in square brackets, like [\"…\"]",
        "3:1: server.treads: is not a known key; did you mean `threads`?",
        "4:2: tokens: is not a known section; did you mean `token`?",
        "6:8: token.body: is not allowed here, found \"maybe\"; use one of: \"refuse\", \"ignore\"",
        "7:9: token.query: must have letters, digits and `_` only, found \"private token\"; write it like \"private_token\"",
        "9:16: cache.positive_ttl: must be a time with its unit, found 60; write it like \"60s\", \"10m\" or \"250ms\"",
        "11:16: limits.header_bytes: must be a size with its unit, found \"32KB\"; write it like \"32KiB\" or \"10MiB\"",
        "13:8: route[0].path: write the pattern in its canonical form: no `//`, no trailing `/`, no `.json`, no escapes of \
         plain letters, other escapes in capitals, and none of `[]|^`, found \"/api/v3/session/\"; write it like \
         \"/api/v3/projects/:id/issues\" or \"/api/v3/templates/*\"",
        "14:1: route[1].reason: is missing: these paths can be reached without a token; write the reason; \
         `tollgate check` lists it with the path",
        "17:12: route[1].upstream: is not the name of an [[upstream]], found \"apu\"; did you mean `api`?",
        "20:12: upstream[0].servers: is not the address of a server, found \"127.0.0.1\"; write it like \
         \"127.0.0.1:3000\", \"backend:3000\" or \"unix:/path\"",
    ];
    assert_eq!(problems(text), expected);
}

#[test]
fn what_contradicts_itself() {
    for (text, part) in [
        ("", "upstream: is missing"),
        ("[server]\nlisten = []\n", "server.listen: is empty"),
        ("[admin]\nlisten = \"127.0.0.1:8080\"\n", "admin.listen: repeats the address of another listener"),
        ("[api]\nprefixes = []\n", "everything would be 404"),
        ("[admin]\naudit = \"\"\n", "admin.audit: is empty"),
        ("[admin]\ntoken_sha256 = \"an-operators-token\"\n", "admin.token_sha256: is not a SHA-256 in 64 hex digits"),
        (
            "[admin]\nmetrics_listen = \"127.0.0.1:9090\"\n",
            "admin.metrics_listen: repeats the address of another listener",
        ),
        ("[admin]\naudit = \"a.log\"\n[log]\naccess = \"a.log\"\n", "admin.audit: is the file of log.access"),
        ("[log]\nsyslog = \"unix:log\"\n", "log.syslog: a socket's path must be absolute"),
        ("[log]\nsyslog = \"loghost\"\n", "log.syslog: is not the address of a syslog daemon"),
        (
            "[[route]]\npath = \"/a\"\nrequest_headers = { set = { traceparent = \"x\" } }\n",
            "3:1: route[0].request_headers: `traceparent` has a key of its own: [trace] context",
        ),
        ("[pagination]\nmax_per_page = 10\n", "pagination.max_per_page: is less than default_per_page"),
        ("[pagination]\nmax_page = 0\n", "pagination.max_page: is below first_page"),
        ("[pagination]\nfirst_page = 2147483648\n", "pagination.first_page: is out of range"),
        ("[token]\nquery = \"_method\"\n", "token.query: is a parameter with another meaning"),
        ("[limits]\ntarget_bytes = \"64KiB\"\n", "limits.target_bytes"),
        ("[cache]\npositive_capacity = 0\n", "cache.positive_capacity: must not be 0"),
        ("[[route]]\npath = \"/x\"\nauth = \"optional\"\n", "route[0].reason: is missing"),
        ("[[route]]\npath = \"/x\"\npass_token = true\n", "route[0].pass_token: goes with auth = \"none\" only"),
        (
            "[[route]]\npath = \"/x\"\n[[route]]\npath = \"/x\"\n",
            "route[1].path: is in an earlier [[route]] for the same method and host",
        ),
        ("[token]\nheader = \"Host\"\n", "token.header: is a header with another meaning"),
        (
            "[api]\ncors_origins = [\"null\"]\n",
            "api.cors_origins: is the origin of every sandboxed page and local file, found \"null\"",
        ),
        ("[api]\ncors_origins = [\"*\", \"https://a.test\"]\n", "api.cors_origins: does not go with other origins"),
        ("[api]\ncors_origins = [\"https://a.test/\"]\n", "api.cors_origins: has more than scheme, host and port"),
        ("[api]\ncors_origins = [\"https://a.test:443\"]\n", "which browsers leave out"),
        (
            "[api]\ncors_origins = [\"https://a.test\", \"https://a.test\"]\n",
            "2:35: api.cors_origins: is in the list twice (see /conf/c.toml:2:17)",
        ),
        ("[api]\ncors_origins = \"*\"\n", "api.cors_origins: must be a list"),
        ("[token]\npath_and_user_headers = \"drop\"\n", "token.path_and_user_headers: is not allowed here"),
        (
            "[[route]]\npath = \"/a\"\nhosts = [\"A.test\", \"*.b.test\"]\n[[route]]\npath = \"/a\"\nhosts = [\"b\", \"a.test.\"]\n",
            "5:8: route[1].path: is in an earlier [[route]] for the same method and host (see /conf/c.toml:2:8)",
        ),
        (
            "[[route]]\npath = \"/a\"\nhosts = [\"a.test:80\"]\n",
            "3:10: route[0].hosts: is not a host name, found \"a.test:80\"; write a name alone",
        ),
        (
            "[[route]]\npath = \"/a\"\nhosts = [\"a.test\", \"A.test\"]\n",
            "3:20: route[0].hosts: is in the list twice (see /conf/c.toml:3:10)",
        ),
        (
            "[[route]]\npath = \"/a\"\n[route.request_headers]\nset = { \"PRIVATE-TOKEN\" = \"x\" }\n",
            "3:8: route[0].request_headers: `PRIVATE-TOKEN` carries the token",
        ),
        (
            "[[route]]\npath = \"/a\"\nrequest_headers = { sets = {} }\n",
            "3:1: route[0].request_headers: has the unknown key `sets`",
        ),
        (
            "[[route]]\npath = \"/a\"\nresponse_headers = { set = { X-A = 1 } }\n",
            "3:1: route[0].response_headers: must be a string",
        ),
        (
            "[[route]]\npath = \"/a\"\nresponse_headers = { remove = [\"Location\"] }\n",
            "3:1: route[0].response_headers: `Location` is written or judged by tollgate",
        ),
        (
            "[[route]]\npath = \"/a/*\"\nrewrite_prefix = \"/b/../c\"\n",
            "3:18: route[0].rewrite_prefix: write the pattern in its canonical form",
        ),
        (
            "[[route]]\npath = \"/a/*\"\nrewrite_prefix = \"/b/*\"\n",
            "3:18: route[0].rewrite_prefix: must be a plain path",
        ),
        (
            "[[route]]\npath = \"/a\"\npool = [{ scope = \"x\", upstream = \"apu\" }]\n",
            "3:9: route[0].pool: upstream: `apu` is not the name of an [[upstream]]",
        ),
        (
            "[[route]]\npath = \"/a\"\npool = [{ scope = \"x\", upstrem = \"api\" }]\n",
            "3:9: route[0].pool: has the unknown key `upstrem`",
        ),
        (
            "[[route]]\npath = \"/a\"\npool = [{ scope = \"\", upstream = \"api\" }]\n",
            "3:9: route[0].pool: scope: must be one word",
        ),
        (
            "[[route]]\npath = \"/a\"\ncanary = { upstream = \"next\", share = 0.05, by = \"user\" }\n",
            "3:1: route[0].canary: upstream: `next` is not the name of an [[upstream]]",
        ),
        (
            "[[route]]\npath = \"/a\"\ncanary = { upstream = \"api\", share = 0.05, by = \"user\" }\n",
            "3:1: route[0].canary: upstream: is the upstream that serves the other requests of this route",
        ),
        (
            "[[route]]\npath = \"/a\"\ncanary = { upstream = \"api\", share = 1.5, by = \"user\" }\n",
            "3:1: route[0].canary: share: must be a number from 0 to 1",
        ),
        (
            "[[route]]\npath = \"/a\"\ncanary = { share = 1, by = \"user\" }\n",
            "3:1: route[0].canary: has no `upstream`",
        ),
        (
            "[[route]]\npath = \"/a\"\ncanary = { upstream = \"api\", share = 0, by = \"ip\" }\n",
            "3:1: route[0].canary: by: is not allowed here",
        ),
        (
            "[[route]]\npath = \"/a\"\nauth = \"none\"\nreason = \"x\"\ncanary = { upstream = \"api\", share = 0, by = \"user\" }\n",
            "5:1: route[0].canary: by: goes with a token",
        ),
        ("[token\n", "is not TOML: "),
        ("store = 1\n", "store: must be a table"),
        ("route = 1\n", "route: must be a list of tables"),
    ] {
        let found =
            problems(&format!("{text}{}", if text.is_empty() || text.contains("[token\n") { "" } else { MINIMAL }));
        assert!(found.iter().any(|problem| problem.contains(part)), "{text}: {found:?}");
    }
}

#[test]
fn a_route_edits_no_header_that_tollgate_owns() {
    let said =
        |key: &str, edits: &str| problems(&format!("{MINIMAL}[[route]]\npath = \"/a\"\n{key} = {{ {edits} }}\n")).len();
    let request = [
        "private-token",
        "Host",
        "Connection",
        "Keep-Alive",
        "TE",
        "Upgrade",
        "Expect",
        "Content-Length",
        "Content-Type",
        "Content-Encoding",
        "Transfer-Encoding",
        "Trailer",
        "Authorization",
        "Cookie",
        "Sudo",
        "JOB-TOKEN",
        "Origin",
        "X-Request-Id",
        "X-Tollgate-User",
        "X-Tollgate-Anything",
        "X-Forwarded-For",
        "X-Forwarded-Else",
        "X-Real-IP",
        "Forwarded",
        "X-Http-Method-Override",
        "X-Original-URL",
        "Remote-User",
        "X-Sendfile-Type",
        "X_Under",
        "X.Dot",
        "",
        "X A",
    ];
    let response = [
        "Content-Length",
        "Transfer-Encoding",
        "Connection",
        "Keep-Alive",
        "Trailer",
        "Upgrade",
        "X-Request-Id",
        "Date",
        "Content-Type",
        "Content-Encoding",
        "Content-Range",
        "Set-Cookie",
        "Link",
        "X-Accel-Redirect",
        "X-Tollgate-User",
        "Proxy-Authenticate",
        "",
    ];
    for (key, names) in [("request_headers", &request[..]), ("response_headers", &response[..])] {
        for name in names {
            assert_eq!(said(key, &format!("set = {{ \"{name}\" = \"x\" }}")), 1, "{key} {name}");
            assert_eq!(said(key, &format!("remove = [\"{name}\"]")), 1, "{key} {name}");
        }
        for value in ["", " x", "x ", "a\\r\\nX-Other: y", "a\\u0000", "a\\tb", "é", "\\u007f"] {
            assert_eq!(said(key, &format!("set = {{ X-A = \"{value}\" }}")), 1, "{key} {value}");
        }
        assert_eq!(said(key, "set = { X-A = \"1\", x-a = \"2\" }"), 1);
        assert_eq!(said(key, "set = { X-A = \"1\" }, remove = [\"x-a\"]"), 1);
        assert_eq!(said(key, "set = { X-A = \"a, b;c\", Cache-Control = \"no-store\" }, remove = [\"X-B\"]"), 0);
    }
}

#[test]
fn routes_that_no_request_matches_alike_may_have_the_same_path() {
    let route = |rest: &str| format!("[[route]]\npath = \"/a\"\n{rest}\n");
    let text = [
        MINIMAL.into(),
        route(""),
        route("hosts = [\"a.test\"]\nmethods = [\"GET\"]"),
        route("hosts = [\"a.test\"]\nmethods = [\"POST\"]"),
        route("hosts = [\"*.test\", \"*.a.test\"]"),
        route("hosts = [\"*.b.test\"]"),
    ];
    assert_eq!(problems(&text.concat()), Vec::<String>::new());
}

#[test]
fn a_route_for_a_whole_prefix_takes_its_place() {
    let text = format!("{MINIMAL}[[route]]\npath = \"/api/v3/*\"\nauth = \"optional\"\nreason = \"public mirror\"\n");
    let settings = load(&text, Path::new("")).unwrap();
    let index = settings.rules.routes.find(crate::request::view::Method::Get, b"h", b"/api/v3/projects").unwrap();
    assert_eq!(settings.rules.routes.get(index).unwrap().reason, "public mirror");
}

// Stores.

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let write = |name, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("password", "S3CRET-pass\nsecond line\n");
    write("short", "too short\n");
    write("key_base", &"k".repeat(64));
    write("empty", "\n");
    folder
}

#[test]
fn every_kind_of_store_in_a_chain() {
    let text = format!(
        "{MINIMAL}[[store]]\n[[store]]\nkind = \"file\"\n\
         [[store]]\nkind = \"postgres\"\nurl = \"host=/run/postgresql dbname=a user=b\"\npassword_file = \"password\"\n\
         [[store]]\nkind = \"postgres\"\nname = \"gitlab\"\npreset = \"gitlab-pat-digest\"\nurl = \"postgres://u@db.example/gitlab\"\n\
         db_key_base_file = \"key_base\"\ntls = \"require\"\n\
         [[store]]\nkind = \"postgres\"\nname = \"mine\"\npreset = \"custom\"\nurl = \"postgres://u@127.0.0.1/mine\"\n\
         lookup = \"SELECT login AS user FROM people WHERE token = $1;\"\ndigest = \"plain\"\nnotify = false\n\
         [[store]]\nkind = \"redis\"\nservers = [\"redis.example:6379\"]\npassword_file = \"password\"\n\
         [[store]]\nkind = \"introspection\"\n"
    );
    let folder = folder();
    let settings = load(&text, folder.path()).unwrap_or_else(|problems| panic!("{problems:?}"));
    let names: Vec<_> = settings.stores.iter().map(|store| store.name.as_str()).collect();
    assert_eq!(names, ["sqlite", "file", "postgres", "gitlab", "mine", "redis", "introspection"]);
    let tls: Vec<_> = settings
        .stores
        .iter()
        .filter_map(|store| match &store.kind {
            StoreSettings::Postgres(store) => Some(store.tls.mode),
            StoreSettings::Redis(store) => Some(store.tls.mode),
            StoreSettings::Introspection(store) => Some(store.tls.mode),
            StoreSettings::Sqlite(_) | StoreSettings::File(_) => None,
        })
        .collect();
    // Nothing that leaves the machine goes in plain text unless somebody wrote so.
    assert_eq!(
        tls,
        [TlsMode::Local, TlsMode::Require, TlsMode::Local, TlsMode::VerifyFull, TlsMode::Local],
        "the socket, as written, loopback, another machine, the upstream"
    );
    let StoreSettings::Introspection(asked) = &settings.stores[6].kind else { panic!("the last one") };
    assert_eq!(asked.url, "http://127.0.0.1:3000/api/v3/user");
    let StoreSettings::Postgres(own) = &settings.stores[2].kind else { panic!("the third one") };
    assert_eq!(own.password.as_ref().unwrap().expose(), "S3CRET-pass");
    assert!(!format!("{settings:?}").contains("S3CRET"), "nothing prints a secret");
    // Found by the fuzz target `config`: the document was printed, and with it a URL's password.
    let url = "[[store]]\nkind = \"postgres\"\nurl = \"postgres://u:S3CRET@127.0.0.1/x\"\n";
    let text = format!("[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n{url}");
    let settings = parse(&text, Path::new("t.toml"), Probe::Settings).unwrap();
    assert!(!format!("{settings:?}").contains("S3CRET"), "nothing prints a password");
}

/// Plain text only where all places are this machine, and tokens to another one only where somebody said so.
#[test]
fn plain_text_to_this_machine_only() {
    let folder = folder();
    let mut read = 0;
    for (servers, more, mode) in [
        (r#""127.0.0.1:6379""#, "", TlsMode::Local),
        (r#""[::1]:6379""#, "", TlsMode::Local),
        (r#""localhost:6379""#, "", TlsMode::Local),
        (r#""unix:/run/redis.sock""#, "", TlsMode::Local),
        (r#""127.0.0.1:1", "localhost:2""#, "topology = \"sentinel\"\nmaster = \"m\"", TlsMode::Local),
        (r#""127.0.0.1:1", "10.0.0.1:2""#, "topology = \"sentinel\"\nmaster = \"m\"", TlsMode::VerifyFull),
        (r#""10.0.0.1:1", "127.0.0.1:2""#, "topology = \"cluster\"", TlsMode::VerifyFull),
        (r#""redis.example:6379""#, "", TlsMode::VerifyFull),
        (r#""[2001:db8::1]:6379""#, "", TlsMode::VerifyFull),
        (r#""0.0.0.0:6379""#, "", TlsMode::VerifyFull),
        (r#""redis.example:6379""#, "tls = \"disable\"", TlsMode::Disable),
        (r#""127.0.0.1:6379""#, "tls = \"disable\"", TlsMode::Disable),
    ] {
        read += 1;
        let text = format!("{MINIMAL}[store]\nkind = \"redis\"\nservers = [{servers}]\n{more}\n");
        let settings = load(&text, folder.path()).unwrap_or_else(|problems| panic!("{text}: {problems:?}"));
        let StoreSettings::Redis(redis) = &settings.stores[0].kind else { panic!("redis") };
        assert_eq!(redis.tls.mode, mode, "{text}");
        assert_eq!(settings.warnings, []);
    }
    assert_eq!(read, 12);
    let elsewhere = "kind = \"introspection\"\nendpoint = \"http://10.0.0.1/user?k=S3CRET\"\ninsecure_http = true\n";
    let settings = load(&format!("{MINIMAL}[store]\n{elsewhere}"), folder.path()).unwrap();
    let [warning] = settings.warnings.as_slice() else { panic!("{:?}", settings.warnings) };
    let warning = warning.to_string();
    assert!(warning.contains("IN PLAIN TEXT to 10.0.0.1:80") && !warning.contains("S3CRET"), "{warning}");
    // Where nobody named an endpoint it is the upstream.
    let upstream = MINIMAL.replace("127.0.0.1:3000", "10.0.0.1:3000");
    assert_ne!(upstream, MINIMAL);
    let found = load(&format!("{upstream}[store]\nkind = \"introspection\"\n"), folder.path()).unwrap_err();
    assert!(found.iter().any(|problem| problem.to_string().contains("insecure_http = true")), "{found:?}");
}

#[test]
fn tls_auto_looks_at_every_way_to_name_a_place() {
    let mode = |url: &str| {
        let text = format!("{MINIMAL}[store]\nkind = \"postgres\"\nurl = \"{url}\"\n");
        match &load(&text, folder().path()).unwrap_or_else(|problems| panic!("{url}: {problems:?}")).stores[0].kind {
            StoreSettings::Postgres(store) => store.tls.mode,
            other => panic!("{other:?}"),
        }
    };
    let here = [
        "host=/run/postgresql",
        "host=127.0.0.1",
        "host=localhost",
        "hostaddr=127.0.0.1",
        "hostaddr=::1",
        "host=localhost hostaddr=127.0.0.1",
        "host=/run/a,/run/b",
        "host=/run/a,localhost,127.0.0.2 port=1,2,3",
        "postgres://u@localhost/db",
        "postgres://u@[::1]:5433/db",
        "postgresql://u@127.0.0.1,localhost/db",
        "postgres://u@%2Frun%2Fpostgresql/db",
        "postgres:///db?host=/run/postgresql",
        "postgres:///db?hostaddr=127.0.0.1",
    ];
    let elsewhere = [
        "host=db.example",
        "host=10.0.0.9",
        "hostaddr=10.0.0.9",
        "hostaddr=fd00::9",
        "host=localhost hostaddr=10.0.0.9",
        "host=127.0.0.1 hostaddr=10.0.0.9",
        "host=/run/postgresql hostaddr=10.0.0.9",
        "host=localhost,localhost hostaddr=127.0.0.1,10.0.0.9",
        "host=localhost,db.example",
        "hostaddr=127.0.0.1,10.0.0.9",
        // An address of this machine, where somebody else is asked for.
        "host=db.example hostaddr=127.0.0.1",
        "postgres://u@localhost/db?hostaddr=10.0.0.9",
        "postgres://u@localhost/db?host=db.example",
        "postgres://u@localhost,db.example/db",
        "postgres://u@[::1],[fd00::9]/db",
        "postgres:///db?hostaddr=10.0.0.9",
        "postgres:///db?host=/run/postgresql&hostaddr=10.0.0.9",
        "postgres://u@%64b.example/db",
    ];
    // A socket can't be encrypted, and what names nothing (libpq would ask PGHOST) names no place that could be looked at.
    let refused = [
        "host=/run/postgresql,db.example",
        "host=db.example,/run/postgresql",
        "postgres://u@%2Frun%2Fpostgresql/db?host=db.example",
        "host=localhost,db.example hostaddr=127.0.0.1",
        "host=localhost port=1,2",
        "host='' dbname=db",
        "postgres://u@localhost,,db.example/db",
        "dbname=db",
        "postgres:///db",
    ];
    for url in here {
        assert_eq!(mode(url), TlsMode::Local, "{url}");
    }
    for url in elsewhere {
        assert_eq!(mode(url), TlsMode::VerifyFull, "{url}");
    }
    for url in refused {
        let text = format!("{MINIMAL}[store]\nkind = \"postgres\"\nurl = \"{url}\"\n");
        let found = said(&text, folder().path());
        assert!(found.iter().any(|problem| problem.contains("store.url: ")), "{url}: {found:?}");
    }
    let redis = |topology: &str, servers: &str| {
        let text = format!("{MINIMAL}[store]\nkind = \"redis\"\n{topology}\nservers = [{servers}]\n");
        match &load(&text, folder().path()).unwrap_or_else(|problems| panic!("{servers}: {problems:?}")).stores[0].kind
        {
            StoreSettings::Redis(store) => store.tls.mode,
            other => panic!("{other:?}"),
        }
    };
    let sentinels = "topology = \"sentinel\"\nmaster = \"tokens\"";
    assert_eq!(redis("", "\"unix:/run/redis.sock\""), TlsMode::Local);
    assert_eq!(redis(sentinels, "\"127.0.0.1:1\", \"[::1]:2\""), TlsMode::Local);
    assert_eq!(redis(sentinels, "\"127.0.0.1:1\", \"10.0.0.9:2\""), TlsMode::VerifyFull);
}

#[test]
fn what_is_wrong_with_a_store() {
    let folder = folder();
    for (text, part) in [
        ("kind = \"stone\"", "store.kind: is not allowed here, found \"stone\""),
        ("kind = \"file\"\nurl = \"x\"", "store.url: is not a known key"),
        ("kind = \"postgres\"", "store.url: is missing"),
        ("kind = \"postgres\"\nurl = \"postgres://u:S3CRET@h:port/x\"", "store.url: is no PostgreSQL URL"),
        ("kind = \"postgres\"\nurl = \"host=h\"\nlookup = \"SELECT\"", "goes with preset = \"custom\" only"),
        ("kind = \"postgres\"\nurl = \"host=h\"\npreset = \"custom\"", "store.lookup: is missing"),
        ("kind = \"postgres\"\nurl = \"host=h\"\npreset = \"custom\"\nlookup = \"SELECT 1\"", "has no $1"),
        ("kind = \"postgres\"\nurl = \"host=h\"\npreset = \"gitlab-pat-digest\"", "db_key_base_file: is missing"),
        (
            "kind = \"postgres\"\nurl = \"host=h\"\npreset = \"gitlab-pat-digest\"\ndb_key_base_file = \"short\"",
            "fewer than 32 characters",
        ),
        ("kind = \"postgres\"\nurl = \"host=h\"\npassword_file = \"nowhere\"", "store.password_file: cannot be read"),
        ("kind = \"postgres\"\nurl = \"host=h\"\npassword_file = \"empty\"", "names an empty file"),
        ("kind = \"postgres\"\nurl = \"host=h\"\nschema = \"a; DROP\"", "store.schema: must have lower-case letters"),
        ("kind = \"postgres\"\nurl = \"host=h\"\nconnections = 0", "store.connections: is out of range"),
        ("kind = \"postgres\"\nurl = \"host=h\"\ntls_cert = \"a\"", "and tls_key go together"),
        ("kind = \"postgres\"\nurl = \"host=h\"\ntls_ca = \"nowhere\"", "store.tls_ca: "),
        ("kind = \"redis\"\nservers = []", "store.servers: is empty"),
        ("kind = \"redis\"\nservers = [\"a:1\", \"b:1\"]\ntls = \"disable\"", "names several servers"),
        ("kind = \"redis\"\ntopology = \"cluster\"\nchanges = \"keyspace\"", "no keyspace notifications"),
        ("kind = \"redis\"\nprefix = \"a*\"", "store.prefix: must have visible characters"),
        ("kind = \"introspection\"\nendpoint = \"ftp://x\"", "store.endpoint: is not an address that can be asked"),
        ("kind = \"introspection\"\nendpoint = \"http://10.0.0.1/user\"", "store.endpoint: http:// to 10.0.0.1 would"),
        ("kind = \"introspection\"\nendpoint = \"http://[2001:db8::1]:80/user\"", "insecure_http = true"),
        ("kind = \"introspection\"\nendpoint = \"http://u:S3CRET@127.0.0.1/\"", "must not hold a user"),
        ("kind = \"introspection\"\nunknown_statuses = [401, 429]", "store.unknown_statuses: must be statuses"),
        ("kind = \"introspection\"\nunknown_statuses = []", "store.unknown_statuses: must be statuses"),
        ("kind = \"redis\"\nservers = [\"u:S3CRET@127.0.0.1:6379\"]", "store.servers: must not hold a user"),
        ("kind = \"introspection\"\nmode = \"rfc7662\"", "store.endpoint: is missing"),
        ("kind = \"introspection\"\nmode = \"rfc7662\"", "store.client_id: is missing"),
        ("kind = \"introspection\"\nuser = [\"name\"]", "store.user: is not a JSON pointer"),
        ("timeout = \"0s\"", "store.timeout: "),
    ] {
        let text = format!("{MINIMAL}[store]\n{text}\n");
        let found = said(&text, folder.path());
        assert!(found.iter().any(|problem| problem.contains(part)), "{text}: {found:?}");
        assert!(!found.iter().any(|problem| problem.contains("S3CRET")), "{found:?}");
    }
    let twice = format!("{MINIMAL}[[store]]\n[[store]]\npath = \"other\"\n");
    assert!(
        problems(&twice)
            .iter()
            .any(|problem| problem.contains("store[1].name: \"sqlite\" is the name of an earlier store"))
    );
    let scope = format!("{MINIMAL}[[scope]]\nname = \"two words\"\n");
    assert!(problems(&scope).iter().any(|problem| problem.contains("scope[0].name: must be one word")));
}

// What is said, and what is not.

/// One fault is one problem: what follows from it, and what was meant by a mistyped name, is not said as well.
#[test]
fn no_echoes() {
    for (text, only) in [
        ("[[upstream]]\nname = \"api\"\nserver = [\"127.0.0.1:1\"]\n", "3:1: upstream[0].server: "),
        (
            "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\", { address = \"127.0.0.1:2\", wieght = 2 }]\n",
            "3:27: upstream[0].servers: wieght: has the unknown key `wieght`",
        ),
        (
            "[[upstream]]\nname = \"api\"\nservers = [{ address = \"127.0.0.1:2\", weight = 101 }]\n",
            "3:12: upstream[0].servers: has a weight out of range",
        ),
        ("[[upstream]]\nname = \"api\"\nservers = [{ weight = 1 }]\n", "3:12: upstream[0].servers: has no address"),
        (
            "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\nhash = \"cookie:a b\"\n",
            "4:8: upstream[0].hash: is nothing to choose a server by",
        ),
        (
            "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\nretry_budget = 20\n",
            "4:16: upstream[0].retry_budget: must be a number from 0 to 1, or \"none\"",
        ),
        ("[[upstreams]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n", "1:3: upstreams: "),
        ("upstream = 1\n[[route]]\npath = \"/x\"\nupstream = \"api\"\n", "1:12: upstream: "),
        (
            "[[upstream]]\nname = 1\nservers = [\"127.0.0.1:1\"]\n[[route]]\npath = \"/x\"\nupstream = \"api2\"\n",
            "2:8: upstream[0].name: ",
        ),
        (
            "[[upstream]]\nname = \"api\"\nservers = \"127.0.0.1:1\"\n[store]\nkind = \"introspection\"\n",
            "3:11: upstream[0].servers: ",
        ),
        ("@[store]\nkind = \"postgre\"\nurl = \"host=h\"\nlookup = 1\n", "5:8: store.kind: "),
        ("@[limits]\nheader_bytes = 1\ntarget_bytes = \"60KiB\"\n", "5:16: limits.header_bytes: "),
        ("@[limits]\nheader_byte = \"64KiB\"\ntarget_bytes = \"60KiB\"\n", "5:1: limits.header_byte: "),
        (
            "@[pagination]\ndefault_per_page = 0\n[[pagination.route]]\npath = \"/x\"\n",
            "5:20: pagination.default_per_page: ",
        ),
        ("@[server]\nlisten = [\"nowhere\"]\n[admin]\nlisten = \"127.0.0.1:8080\"\n", "5:11: server.listen: "),
        (
            "@[[store]]\n[[store]]\nname = \"sqlite\"\n[[store]]\nkind = 1\n",
            "6:8: store[1].name: |8:8: store[2].kind: ",
        ),
    ] {
        let found = problems(&text.replace('@', MINIMAL));
        let wanted: Vec<_> = only.split('|').collect();
        assert!(
            found.len() == wanted.len() && found.iter().zip(&wanted).all(|(found, wanted)| found.starts_with(wanted)),
            "{text}: {found:#?}"
        );
    }
}

#[test]
fn limits_that_contradict_themselves_are_refused() {
    for (text, wanted) in [
        ("rate = \"600/min\"", ""),
        ("rate = \"10/s\"\nburst = 5\ncost = { write = 5, GET = 2, \"/api/v3/*\" = 3 }", ""),
        ("rate = \"none\"\nquota = \"100/day\"\nconcurrency = 1\nkey = []", ""),
        ("", "limit[0].rate: is missing; it has no default"),
        ("rate = \"none\"", "limit[0].rate: is missing, and so are quota and concurrency: it limits nothing"),
        ("rate = \"600\"", "limit[0].rate: is not a rate"),
        ("rate = \"0/s\"", "limit[0].rate: is out of range"),
        ("rate = \"9/day\"", "limit[0].rate: is a quota"),
        ("rate = \"none\"\nquota = \"100/h\"", "limit[0].quota: is not a quota"),
        ("rate = \"600/min\"\nburst = 0", "limit[0].burst: is 0: nothing would pass"),
        ("rate = \"none\"\nquota = \"9/day\"\nburst = 9", "limit[0].burst: goes with a rate"),
        ("rate = \"5000/s\"\nburst = 5", "limit[0].burst: is no more than the rate has within a millisecond"),
        (
            "rate = \"9/s\"\nburst = 4\ncost = { write = 5 }",
            "limit[0].cost: is 5 for some requests, and the burst is 4",
        ),
        (
            "rate = \"none\"\nquota = \"4/day\"\ncost = { write = 5 }",
            "limit[0].cost: is 5 for some requests, and the quota",
        ),
        ("rate = \"9/s\"\nshared = true", "limit[0].shared: needs a store"),
        ("rate = \"9/s\"\nshared = true\n[shared_limits]\nstore = \"redis\"", ""),
        ("rate = \"9/s\"\nshared = true\n[shared_limits]\nstore = \"postgres\"", ""),
        ("rate = \"9/s\"\n[shared_limits]\nstore = \"redis\"", "warning: shared_limits.store: is of no use"),
        (
            "rate = \"9/s\"\nconcurrency = 2\nshared = true\n[shared_limits]\nstore = \"redis\"",
            "limit[0].concurrency: is counted by each gateway for itself",
        ),
        (
            "rate = \"9/s\"\nshared = true\n[shared_limits]\nstore = \"redis\"\ntopology = \"cluster\"",
            "shared_limits.topology: a cluster cannot keep shared limits",
        ),
        (
            "rate = \"9/s\"\nshared = true\n[shared_limits]\nstore = \"redis\"\ntimeout = \"5s\"",
            "shared_limits.timeout: is longer than what is leased is kept for",
        ),
        (
            "rate = \"9/s\"\nshared = true\n[shared_limits]\nstore = \"postgres\"\nurl = \"nothing\"",
            "shared_limits.url: is no PostgreSQL URL",
        ),
        ("rate = \"9/s\"\ncost = { read = 0, write = 0 }", "limit[0].cost: is 0 for all requests"),
        ("rate = \"9/s\"\ncost = { reads = 0 }", "limit[0].cost: has the key `reads`"),
        ("rate = \"9/s\"\ncost = { \"/x\" = 2 }", "limit[0].cost: `/x` is not the path of a route"),
        ("rate = \"none\"\nconcurrency = 0", "limit[0].concurrency: is 0"),
        ("rate = \"9/s\"\nkey = [\"header\"]", "limit[0].key: is without the name of a header"),
        ("rate = \"9/s\"\nkey = [\"header:\"]", "limit[0].key: is without the name of a header"),
        ("rate = \"9/s\"\nkey = [\"header:X-T\"]", "warning: limit[0].key: is what the client says"),
        ("rate = \"9/s\"\nkey = [\"ip\"]", "limit[0].key: is nothing to count by"),
        ("rate = \"9/s\"\nkey = [\"user\", \"user\"]", "limit[0].key: is in the list twice"),
        ("rate = \"9/s\"\nkey = [\"scope\"]", "limit[0].key: has a scope, and `scopes` is empty"),
        ("rate = \"9/s\"\nprefix_v4 = 33", "limit[0].prefix_v4: is out of range"),
        ("rate = \"9/s\"\nbuckets = 1", "limit[0].buckets: is out of range"),
        ("rate = \"9/s\"\nmethods = []", "limit[0].methods: is empty"),
        ("rate = \"9/s\"\nplans = true\n[plan.gold]\nrate = \"90/s\"\nburst = 100", ""),
        ("rate = \"9/s\"\nplans = true\nkey = [\"route\"]", "limit[0].key: has neither"),
        ("rate = \"9/s\"\n[plan.gold]\nrate = \"9/s\"", "warning: plan.gold.rate: is of a plan, and no [[limit]] says"),
        (
            "rate = \"9/s\"\nplans = true\n[plan.\"go ld\"]\nrate = \"9/s\"",
            "plan.go ld.rate: is of a plan whose name must be",
        ),
        ("rate = \"9/s\"\nplans = true\n[plan]\ngold = 5", "plan.gold: must be a table"),
        (
            "rate = \"9/s\"\nplans = true\n[plan.gold]\nrate = \"10000/s\"\nburst = 2",
            "plan.gold.burst: is no more than",
        ),
        ("rate = \"9/s\"\nplans = true\n[plan.gold]\nrate = \"none\"", "plan.gold.rate: is missing, and so are quota"),
        ("rate = \"9/s\"\nplans = true\n[plan.gold]\nrate = \"9/s\"\nburst = 0", "plan.gold.burst: is 0"),
        (
            "rate = \"9/s\"\nplans = true\ncost = { write = 5 }\n[plan.gold]\nrate = \"4/s\"",
            "limit[0].cost: is 5 for some requests, and plan gold has 4",
        ),
        ("rate = \"9/s\"\nroutes = [\"/api/v4/*\"]", "limit[0].routes: is not the path of a route"),
        ("rate = \"9/s\"\nroutes = [\"/open\"]", "limit[0].routes: match no request"),
        (
            "rate = \"9/s\"\nbuckets = 16777216\n[[limit]]\nname = \"b\"\nkey = [\"user\"]\nrate = \"9/s\"",
            "warning: limit[0].buckets: comes to 1028 MiB",
        ),
        ("rate = \"9/s\"\nmethods = [\"GET\"]\ncost = { read = 0 }", "limit[0].methods: match no request"),
        ("rate = \"9/s\"\nkey = [\"address\"]\nroutes = [\"/open\"]", ""),
        ("rate = \"9/s\"\nkey = []\nroutes = [\"/open\"]\nmethods = [\"POST\"]", "limit[0].routes: match no request"),
        (
            "rate = \"9/s\"\n[[limit]]\nname = \"l\"\nrate = \"9/s\"",
            "limit[1].name: is the name of an earlier [[limit]]",
        ),
        (
            "rate = \"9/s\"\n[limits]\nallow = [\"10.1.0.0/16\"]\ndeny = [\"10.0.0.0/8\"]",
            "limits.allow: 10.1.0.0/16 is within",
        ),
    ] {
        let open = "[[route]]\npath = \"/open\"\nauth = \"none\"\nreason = \"r\"\nmethods = [\"GET\"]\n";
        let found = problems(&format!("{MINIMAL}{open}[[limit]]\nname = \"l\"\n{text}\n"));
        assert_only(&found, wanted, text);
    }
}

/// That there is one problem, which begins so behind its place; or none.
fn assert_only(found: &[String], wanted: &str, text: &str) {
    let without_place: Vec<_> = found.iter().map(|found| found.split_once(": ").map_or("", |(_, rest)| rest)).collect();
    match wanted {
        "" => assert!(found.is_empty(), "{text}: {found:?}"),
        wanted => assert!(found.len() == 1 && without_place[0].starts_with(wanted), "{text}: {found:?}"),
    }
}

#[test]
fn guards_against_guessing_that_contradict_themselves_are_refused() {
    for (text, wanted) in [
        ("", ""),
        ("failures = 100", ""),
        ("failures = 100\nallow = [\"10.0.0.0/8\"]\nwait = \"0s\"", ""),
        ("failures = 9", "guessing.failures: is out of range"),
        ("failures = 0", "guessing.failures: is out of range"),
        ("failures = 100\nper = \"2h\"", "guessing.per: is out of range"),
        ("failures = 100\nlookups = 0", "guessing.lookups: is out of range"),
        ("failures = 100\nwait = \"2m\"", "guessing.wait: is out of range"),
        ("failures = 100\npause = \"10m\"", "guessing.pause: is longer than the longest pause"),
        ("allow = [\"10.0.0.0/8\"]", "warning: guessing.allow: has networks, and `failures` is \"none\""),
        ("failures = 100\nallow = [\"unix\"]", "warning: guessing.allow: has \"unix\""),
        ("failures = 100\nshared = true", "guessing.shared: needs a store"),
        ("failures = 100\nshared = true\n[shared_limits]\nstore = \"redis\"", ""),
        ("failures = 100\n[shared_limits]\nstore = \"redis\"", "warning: shared_limits.store: is of no use"),
        ("shared = true", "warning: guessing.shared: is of no use"),
    ] {
        let found = problems(&format!("{MINIMAL}[guessing]\n{text}\n"));
        assert_only(&found, wanted, text);
    }
}

#[test]
fn every_element_of_a_list_and_every_fault_of_the_text_is_reported() {
    let found = problems(
        "[server]\nlisten = [\"a\", \"127.0.0.1:1\",\n  \"b\"]\ntrusted_proxies = [\"x\"]\n[[upstream]]\nname = \"a\"\nservers = [\"u:S3CRET@h\", \"h\"]\n",
    );
    let places: Vec<_> = found.iter().map(|found| found.split(": ").take(2).collect::<Vec<_>>().join(" ")).collect();
    let expected = [
        "2:11 server.listen",
        "3:3 server.listen",
        "4:20 server.trusted_proxies",
        "7:12 upstream[0].servers",
        "7:26 upstream[0].servers",
    ];
    assert_eq!(places, expected);
    assert!(!found.iter().any(|found| found.contains("S3CRET")), "{found:?}");
    let found = problems("[server]\nthreads = = 1\nlisten = [\"a\"\n[log]\nlevel = S3CRET\n");
    assert!(found.len() >= 2 && found.iter().all(|found| found.contains("is not TOML: ")), "{found:?}");
    assert!(!found.iter().any(|found| found.contains("S3CRET")), "{found:?}");
}

#[test]
fn a_duplicate_names_both_places() {
    for (text, part) in [
        (
            "@[limits]\nbody_bytes = \"1MiB\"\nbody_bytes = \"2MiB\"\n",
            "6:1: `body_bytes` is in the file twice (see /conf/c.toml:5:1)",
        ),
        ("@[limits]\n[log]\n[limits]\n", "6:2: `limits` is in the file twice (see /conf/c.toml:4:2)"),
        (
            "@[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n",
            "5:8: upstream[1].name: is the name of an earlier [[upstream]] (see /conf/c.toml:2:8)",
        ),
        (
            "@[[store]]\nname = \"a\"\n[[store]]\nname = \"a\"\n",
            "7:8: store[1].name: \"a\" is the name of an earlier store: metrics could not tell them apart (see /conf/c.toml:5:8)",
        ),
        (
            "@[[route]]\npath = \"/x\"\n[[route]]\npath = \"/x\"\n",
            "7:8: route[1].path: is in an earlier [[route]] for the same method and host (see /conf/c.toml:5:8)",
        ),
        (
            "@[server]\nlisten = [\"127.0.0.1:1\", \"127.0.0.1:1\"]\n",
            "5:26: server.listen: repeats the address of another listener (see /conf/c.toml:5:11)",
        ),
        (
            "@[server]\nlisten = [\"127.0.0.1:1\"]\n[admin]\nlisten = \"127.0.0.1:1\"\n",
            "7:10: admin.listen: repeats the address of another listener (see /conf/c.toml:5:11)",
        ),
        (
            "@[api]\nprefixes = [\"/a\", \"/b\", \"/a\"]\n",
            "5:25: warning: api.prefixes: is in the list twice (see /conf/c.toml:5:13)",
        ),
        ("@[token]\nbody = \"ignore\"\nmethod_override = \"judge\"\n", "(see /conf/c.toml:5:8), found \"judge\""),
    ] {
        let found = problems(&text.replace('@', MINIMAL));
        assert!(found.iter().any(|found| found.contains(part)), "{text}: {found:#?}");
    }
}

/// TLS to servers: what goes with what, and no name that could not be verified.
#[test]
fn what_is_wrong_with_an_upstreams_tls() {
    let folder = folder();
    std::fs::write(folder.path().join("none.pem"), "no certificate").unwrap();
    let named = "servers = [\"backend.test:443\"]\n";
    for (text, part) in [
        (format!("{named}tls_ca = \"none.pem\""), "upstream[0].tls_ca: goes with tls = true only"),
        (format!("{named}tls_name = \"a.test\""), "upstream[0].tls_name: goes with tls = true only"),
        (format!("{named}insecure_skip_verify = true"), "upstream[0].insecure_skip_verify: goes with tls = true only"),
        (format!("{named}tls = true\ntls_ca = \"none.pem\""), "none.pem: holds no certificate that can be used"),
        (format!("{named}tls = true\ntls_ca = \"nowhere.pem\""), "nowhere.pem: No such file"),
        (format!("{named}tls = true\ntls_cert = \"none.pem\""), "upstream[0].tls_cert: and tls_key go together"),
        (
            format!("{named}tls = true\ninsecure_skip_verify = true\ntls_ca = \"none.pem\""),
            "upstream[0].tls_ca: is not used with insecure_skip_verify = true",
        ),
        (
            format!("{named}tls = true\ninsecure_skip_verify = true\ntls_cert = \"none.pem\"\ntls_key = \"none.pem\""),
            "upstream[0].tls_key: ",
        ),
        (format!("{named}tls = true\ntls_name = \"a b\""), "upstream[0].tls_name: is no host name"),
        ("servers = [\"10.0.0.1:443\"]\ntls = true".into(), "upstream[0].servers: has no host name that its"),
        ("servers = [\"[::1]:443\"]\ntls = true".into(), "upstream[0].servers: has no host name that its"),
        ("servers = [\"unix:/x\"]\ntls = true\ntls_name = \"a.test\"".into(), "upstream[0].servers: is a Unix socket"),
        (
            format!("{named}tls = true\n[store]\nkind = \"introspection\""),
            "store.endpoint: is missing: the first [[upstream]] speaks TLS",
        ),
    ] {
        let text = format!("[[upstream]]\nname = \"api\"\n{text}\n");
        let found = load(&text, folder.path()).map(|_| ()).expect_err(&text);
        assert!(found.iter().any(|problem| problem.to_string().contains(part)), "{text}: {found:?}");
    }
    let skip = "tls = true\ninsecure_skip_verify = true";
    for (text, warnings) in [
        (format!("{named}tls = true\ninsecure_skip_verify = true"), 1),
        // Nothing is verified, so that no name is needed.
        (format!("servers = [\"10.0.0.1:443\"]\n{skip}"), 1),
        (format!("servers = [\"10.0.0.1:443\"]\ntls_name = \"10.0.0.1\"\n{skip}"), 1),
        (format!("{named}send_proxy = true"), 0),
    ] {
        let text = format!("[[upstream]]\nname = \"api\"\n{text}\n");
        let settings = load(&text, folder.path()).unwrap_or_else(|found| panic!("{text}: {found:?}"));
        assert_eq!(settings.warnings.len(), warnings, "{text}: {:?}", settings.warnings);
    }
}

#[test]
fn what_is_dangerous_is_a_warning() {
    for (text, part) in [
        ("[admin]\nlisten = \"0.0.0.0:9090\"\n", "5:10: warning: admin.listen: can be reached from other networks"),
        ("[admin]\nlisten = \"[::]:9090\"\n", "admin.listen"),
        ("[admin]\nlisten = \"8.8.8.8:9090\"\n", "admin.listen"),
        ("[admin]\nlisten = \"10.1.2.3:9090\"\n", "admin.listen: is not loopback and has no token: it refuses reloads"),
        ("[admin]\nlisten = \"[fd00::1]:9090\"\n", "admin.listen: is not loopback and has no token"),
        (
            "[admin]\nlisten = \"0.0.0.0:9090\"\ntoken_sha256 = \"0000000000000000000000000000000000000000000000000000000000000000\"\n",
            "admin.listen: can be reached from other networks, and its token is sent in plain text",
        ),
        ("[admin]\nmetrics_listen = \"0.0.0.0:9100\"\n", "admin.metrics_listen: can be reached from other networks"),
        (
            "[server]\ntrusted_proxies = [\"10.0.0.0/8\", \"0.0.0.0/0\"]\n",
            "server.trusted_proxies: trusts everybody (0.0.0.0/0)",
        ),
        ("[server]\ntrusted_proxies = [\"::/0\"]\n", "trusts everybody (::/0)"),
        ("[server]\ntrusted_proxies = [\"::ffff:0.0.0.0/96\"]\n", "trusts everybody (0.0.0.0/0)"),
        ("[server]\ntrusted_proxies = [\"128.0.0.0/1\"]\n", "a large part of the Internet"),
        ("[token]\nbody = \"ignore\"\n", "token.body"),
        ("[cache]\npositive_ttl = \"1day\"\n", "cache.positive_ttl: is a day or more"),
        ("[cache]\nnegative_ttl = \"2days\"\n", "cache.negative_ttl"),
        ("[cache]\nstale_if_error = \"7days\"\n", "cache.stale_if_error"),
    ] {
        let settings =
            load(&format!("{MINIMAL}{text}"), Path::new("/conf")).unwrap_or_else(|found| panic!("{text}: {found:?}"));
        let [warning] = settings.warnings.as_slice() else { panic!("{text}: {:?}", settings.warnings) };
        let warning = warning.to_string();
        assert!(warning.contains(" warning: ") && warning.contains(part), "{text}: {warning}");
    }
    for text in [
        "[admin]\nlisten = \"10.1.2.3:9090\"\ntoken_sha256 = \"0000000000000000000000000000000000000000000000000000000000000000\"\n",
        "[admin]\nmetrics_listen = \"10.1.2.3:9100\"\n",
        "[admin]\nmetrics_listen = \"127.0.0.1:9100\"\n",
        "[admin]\nlisten = \"none\"\n",
        "[admin]\nlisten = \"unix:/run/x\"\n",
        "[server]\ntrusted_proxies = [\"10.0.0.0/8\", \"fd00::/8\", \"192.0.2.1\", \"unix\"]\n",
        "[cache]\npositive_ttl = \"23h\"\nnegative_ttl = \"23h\"\nstale_if_error = \"23h\"\n",
    ] {
        assert_eq!(problems(&format!("{MINIMAL}{text}")), Vec::<String>::new(), "{text}");
    }
}

/// Whatever somebody writes in a store's section by mistake may be a password.
#[test]
fn no_value_that_may_be_a_secret_is_shown() {
    let folder = folder();
    let mut read = 0;
    for (text, faults) in [
        ("kind = \"postgres\"\nurl = \"S3CRET\"", 1),
        ("kind = \"postgres\"\nurl = 7\npassword_file = [\"S3CRET\"]", 2),
        ("kind = \"postgres\"\nurl = \"host=h\"\npassword_file = \"S3CRET\"", 1),
        ("kind = \"postgres\"\nurl = \"host=h\"\npassword = \"S3CRET\"", 1),
        ("kind = \"redis\"\nservers = [\"redis://u:S3CRET\"]", 1),
        ("kind = \"redis\"\nusername = [\"S3CRET\"]", 1),
        ("kind = \"introspection\"\nendpoint = \"S3CRET\"\nclient_secret = \"S3CRET\"", 2),
        ("kind = \"introspection\"\nclient_id = [\"S3CRET\"]", 1),
        ("[admin]\ntoken_sha256 = \"S3CRET\"", 1),
    ] {
        read += 1;
        let found = said(&format!("{MINIMAL}[store]\n{text}\n"), folder.path());
        // A path that does not exist is named by the system's own message, never by the value.
        assert!(found.len() == faults && !found.iter().any(|found| found.contains("S3CRET")), "{text}: {found:#?}");
    }
    assert_eq!(read, 9);
}

#[test]
fn json_has_one_shape() {
    let found = load("[server]\nthreads = \"é\" # x\n", Path::new("/conf")).unwrap_err();
    let json: Vec<_> = found.iter().map(Diagnostic::json).collect();
    assert_eq!(
        json,
        [
            serde_json::json!({
                "file": "/conf/c.toml", "line": null, "column": null, "key": "upstream", "severity": "error",
                "message": "is missing: there is no backend to forward to", "found": null,
                "instead": "write [[upstream]] with name = \"api\" and servers = [\"127.0.0.1:3000\"]", "related": null,
            }),
            serde_json::json!({
                "file": "/conf/c.toml", "line": 2, "column": 11, "key": "server.threads", "severity": "error",
                "message": "must be a whole number, 0 or more", "found": "\"é\"", "instead": "write it without quotes",
                "related": null,
            }),
        ]
    );
}
