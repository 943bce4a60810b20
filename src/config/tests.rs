//! What a configuration may say, and what is said about a bad one.

use super::*;
use crate::store::servers::Folder;
use crate::store::{StoreSettings, TlsMode};

fn problems(text: &str) -> Vec<String> {
    parse(text, Path::new("/conf")).err().unwrap_or_default().iter().map(ToString::to_string).collect()
}

const MINIMAL: &str = "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:3000\"]\n";

#[test]
fn every_default_reads() {
    let settings = parse(MINIMAL, Path::new("/conf")).unwrap();
    assert_eq!(settings.stores.len(), 1);
    assert_eq!(settings.stores[0].kind, StoreSettings::Sqlite(Path::new("/conf/tollgate.db").into()));
    assert_eq!(settings.rules.routes.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(), ["/api/v3/*"]);
    // A missing key makes the reader take every stand-in.
    assert_eq!(problems("[[upstream]]\n[[route]]\n[[pagination.route]]\n").len(), 5);
}

#[test]
fn the_example_says_all_and_is_right() {
    let example = example();
    parse(&example, Path::new("")).unwrap_or_else(|problems| panic!("{problems:?}"));
    let with_headers = example.replace("\n# [[", "\n[[");
    let everything = with_headers.lines().map(|line| {
        let key = line
            .strip_prefix("# ")
            .filter(|rest| rest.split(" = ").next().is_some_and(|k| !k.contains(' ')) && rest.contains(" = "));
        key.unwrap_or(line).to_owned() + "\n"
    });
    parse(&everything.collect::<String>(), Path::new("")).unwrap_or_else(|problems| panic!("{problems:?}"));
    let keys: usize = REFERENCE.iter().map(|section| section.fields.len()).sum();
    assert_eq!(keys, 127, "the reference lost or gained keys: update this number on purpose");
    assert!(
        REFERENCE
            .iter()
            .all(|section| !section.doc.is_empty() && section.fields.iter().all(|field| !field.doc.is_empty()))
    );
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
        "line 2: server.listen: must be a list (put it in square brackets, like [\"…\"])",
        "line 3: server.treads: is not a key that tollgate knows (did you mean `threads`?)",
        "line 4: tokens: is not a section that tollgate knows (did you mean `token`?)",
        "line 6: token.body: is none of the words that can stand here (write one of: \"refuse\" \"ignore\")",
        "line 7: token.query: a parameter's name has letters, digits and `_` only (like \"private_token\")",
        "line 9: cache.positive_ttl: must be a time with its unit (like \"60s\", \"10m\" or \"250ms\")",
        "line 11: limits.header_bytes: must be a size with its unit (like \"32KiB\" or \"10MiB\")",
        "line 13: route[0].path: write the pattern in its canonical form: no `//`, no trailing `/`, no `.json`, no escapes of \
         plain letters, other escapes in capitals, and none of `[]|^` (like \"/api/v3/projects/:id/issues\" or \"/api/v3/templates/*\")",
        "line 14: route[1].reason: is missing: this route can be reached without a token (write why, for whoever reads \
         `tollgate check` in a year)",
        "line 14: route[1].upstream: there is no upstream \"apu\" (did you mean `api`?)",
        "line 18: upstream[0].servers: is empty (like [\"127.0.0.1:3000\"])",
        "line 20: upstream[0].servers: \"127.0.0.1\" is no address of a server (like \"127.0.0.1:3000\", \"backend:3000\" or \
         \"unix:/path\")",
    ];
    assert_eq!(problems(text), expected);
}

#[test]
fn what_contradicts_itself() {
    for (text, part) in [
        ("", "upstream: is missing"),
        ("[server]\nlisten = []\n", "server.listen: is empty"),
        ("[admin]\nlisten = \"127.0.0.1:8080\"\n", "an address stands there twice"),
        ("[api]\nprefixes = []\n", "everything would be 404"),
        ("[pagination]\nmax_per_page = 10\n", "pagination.default_per_page: is out of range"),
        ("[pagination]\nmax_page = 0\n", "pagination.max_page: is below first_page"),
        (
            "[pagination]\nfirst_page = 2147483648\n",
            "pagination.first_page, pagination.default_per_page: is out of range",
        ),
        ("[token]\nquery = \"_method\"\n", "_method has a meaning of its own"),
        ("[limits]\ntarget_bytes = \"64KiB\"\n", "limits.target_bytes"),
        ("[cache]\npositive_capacity = 0\n", "ask the store for every single request"),
        ("[[route]]\npath = \"/x\"\nauth = \"optional\"\n", "route[0].reason: is missing"),
        ("[[route]]\npath = \"/x\"\npass_token = true\n", "goes with auth = \"none\" only"),
        ("[[route]]\npath = \"/x\"\n[[route]]\npath = \"/x\"\n", "stands in another route"),
        ("[token]\nheader = \"Host\"\n", "has a meaning of its own"),
        ("[api]\ncors_origins = [\"null\"]\n", "api.cors_origins: \"null\" is the origin of every sandboxed page"),
        ("[api]\ncors_origins = [\"*\", \"https://a.test\"]\n", "api.cors_origins: has \"*\" beside other origins"),
        (
            "[api]\ncors_origins = [\"https://a.test/\"]\n",
            "api.cors_origins: \"https://a.test/\" has more than scheme, host and port",
        ),
        ("[api]\ncors_origins = [\"https://a.test:443\"]\n", "which browsers leave out"),
        (
            "[api]\ncors_origins = [\"https://a.test\", \"https://a.test\"]\n",
            "api.cors_origins: \"https://a.test\" stands there twice",
        ),
        ("[api]\ncors_origins = \"*\"\n", "api.cors_origins: must be a list"),
        ("[token]\npath_and_user_headers = \"drop\"\n", "token.path_and_user_headers: is none of the words"),
        ("[token\n", "the file: is not TOML"),
        ("store = 1\n", "store: must be a table"),
        ("route = 1\n", "route: is a list of tables"),
    ] {
        let found =
            problems(&format!("{text}{}", if text.is_empty() || text.contains("[token\n") { "" } else { MINIMAL }));
        assert!(found.iter().any(|problem| problem.contains(part)), "{text}: {found:?}");
    }
}

#[test]
fn a_route_for_a_whole_prefix_takes_its_place() {
    let text = format!("{MINIMAL}[[route]]\npath = \"/api/v3/*\"\nauth = \"optional\"\nreason = \"public mirror\"\n");
    let settings = parse(&text, Path::new("")).unwrap();
    let index = settings.rules.routes.find(crate::request::view::Method::Get, b"/api/v3/projects").unwrap();
    assert_eq!(settings.rules.routes.get(index).unwrap().reason, "public mirror");
}

// Stores.

fn folder() -> Folder {
    let folder = Folder::new("config");
    folder.write("password", "S3CRET-pass\nsecond line\n");
    folder.write("short", "too short\n");
    folder.write("key_base", &"k".repeat(64));
    folder.write("empty", "\n");
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
    let settings = parse(&text, &folder.0).unwrap_or_else(|problems| panic!("{problems:?}"));
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
        let settings = parse(&text, &folder.0).unwrap_or_else(|problems| panic!("{text}: {problems:?}"));
        let StoreSettings::Redis(redis) = &settings.stores[0].kind else { panic!("redis") };
        assert_eq!(redis.tls.mode, mode, "{text}");
        assert_eq!(settings.warnings, Vec::<String>::new());
    }
    assert_eq!(read, 12);
    let elsewhere = "kind = \"introspection\"\nendpoint = \"http://10.0.0.1/user?k=S3CRET\"\ninsecure_http = true\n";
    let settings = parse(&format!("{MINIMAL}[store]\n{elsewhere}"), &folder.0).unwrap();
    let [warning] = settings.warnings.as_slice() else { panic!("{:?}", settings.warnings) };
    assert!(warning.contains("IN PLAIN TEXT to 10.0.0.1:80") && !warning.contains("S3CRET"), "{warning}");
    // Where nobody named an endpoint it is the upstream.
    let upstream = MINIMAL.replace("127.0.0.1:3000", "10.0.0.1:3000");
    assert_ne!(upstream, MINIMAL);
    let found = parse(&format!("{upstream}[store]\nkind = \"introspection\"\n"), &folder.0).unwrap_err();
    assert!(found.iter().any(|problem| problem.to_string().contains("insecure_http = true")), "{found:?}");
}

#[test]
fn tls_auto_looks_at_every_way_to_name_a_place() {
    let mode = |url: &str| {
        let text = format!("{MINIMAL}[store]\nkind = \"postgres\"\nurl = \"{url}\"\n");
        match &parse(&text, &folder().0).unwrap_or_else(|problems| panic!("{url}: {problems:?}")).stores[0].kind {
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
        let found: Vec<_> =
            parse(&text, &folder().0).err().unwrap_or_default().iter().map(ToString::to_string).collect();
        assert!(found.iter().any(|problem| problem.contains("store.url: ")), "{url}: {found:?}");
    }
    let redis = |servers: &str| {
        let text = format!("{MINIMAL}[store]\nkind = \"redis\"\ntopology = \"sentinel\"\nservers = [{servers}]\n");
        match &parse(&text, &folder().0).unwrap_or_else(|problems| panic!("{servers}: {problems:?}")).stores[0].kind {
            StoreSettings::Redis(store) => store.tls.mode,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(redis("\"127.0.0.1:1\", \"[::1]:2\", \"unix:/run/redis.sock\""), TlsMode::Local);
    assert_eq!(redis("\"127.0.0.1:1\", \"10.0.0.9:2\""), TlsMode::VerifyFull);
}

#[test]
fn what_is_wrong_with_a_store() {
    let folder = folder();
    for (text, part) in [
        ("kind = \"stone\"", "store.kind: is none of the words"),
        ("kind = \"file\"\nurl = \"x\"", "store.url: is not a key that tollgate knows"),
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
        ("kind = \"postgres\"\nurl = \"host=h\"\npassword_file = \"nowhere\"", "store.password_file: can't be read"),
        ("kind = \"postgres\"\nurl = \"host=h\"\npassword_file = \"empty\"", "names an empty file"),
        ("kind = \"postgres\"\nurl = \"host=h\"\nschema = \"a; DROP\"", "store.schema: has lower-case letters"),
        ("kind = \"postgres\"\nurl = \"host=h\"\nconnections = 0", "store.connections: is out of range"),
        ("kind = \"postgres\"\nurl = \"host=h\"\ntls_cert = \"a\"", "and tls_key go together"),
        ("kind = \"postgres\"\nurl = \"host=h\"\ntls_ca = \"nowhere\"", "store.tls: "),
        ("kind = \"redis\"\nservers = []", "store.servers: is empty"),
        ("kind = \"redis\"\nservers = [\"a:1\", \"b:1\"]\ntls = \"disable\"", "are several where one is asked"),
        ("kind = \"redis\"\ntopology = \"cluster\"\nchanges = \"keyspace\"", "no keyspace notifications"),
        ("kind = \"redis\"\nprefix = \"a*\"", "store.prefix: must be there"),
        ("kind = \"introspection\"\nendpoint = \"ftp://x\"", "store.endpoint: is no address that can be asked"),
        ("kind = \"introspection\"\nendpoint = \"http://10.0.0.1/user\"", "store.endpoint: http:// to 10.0.0.1 would"),
        ("kind = \"introspection\"\nendpoint = \"http://[2001:db8::1]:80/user\"", "insecure_http = true"),
        ("kind = \"introspection\"\nendpoint = \"http://u:S3CRET@127.0.0.1/\"", "must not hold a user"),
        ("kind = \"introspection\"\nunknown_statuses = [401, 429]", "store.unknown_statuses: must be statuses"),
        ("kind = \"introspection\"\nunknown_statuses = []", "store.unknown_statuses: must be statuses"),
        ("kind = \"redis\"\nservers = [\"u:S3CRET@127.0.0.1:6379\"]", "store.servers: must not hold a user"),
        ("kind = \"introspection\"\nmode = \"rfc7662\"", "needs endpoint and client_id"),
        ("kind = \"introspection\"\nuser = [\"name\"]", "is no JSON pointer"),
        ("timeout = \"0s\"", "store.timeout: "),
    ] {
        let text = format!("{MINIMAL}[store]\n{text}\n");
        let found: Vec<_> = parse(&text, &folder.0).err().unwrap_or_default().iter().map(ToString::to_string).collect();
        assert!(found.iter().any(|problem| problem.contains(part)), "{text}: {found:?}");
        assert!(!found.iter().any(|problem| problem.contains("S3CRET")), "{found:?}");
    }
    let twice = format!("{MINIMAL}[[store]]\n[[store]]\npath = \"other\"\n");
    assert!(problems(&twice).iter().any(|problem| problem.contains("store[1].name: \"sqlite\" stands there twice")));
    let scope = format!("{MINIMAL}[[scope]]\nname = \"two words\"\n");
    assert!(problems(&scope).iter().any(|problem| problem.contains("scope[0].name: must be one word")));
}
