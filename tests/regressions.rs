//! Bugs that were found outside of this suite, each with a test that is named by what it guards. The first line says how it
//! was found. The classes that they belong to are tested by tables elsewhere.

use crate::harness::*;

const TARGET: &str = "/api/v3/projects";

fn post(content_type: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST {TARGET} HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: {GOOD}\n{content_type}Content-Length: {length}\n\n{body}"
    )
}

/// An audit with real parsers: Grape read a JSON body without a type, and acted for the token in it.
#[test]
fn a_body_without_a_type_does_not_decide_who_acts() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    for body in ["{\"private_token\":\"another\"}", "[]\n{\"private_token\":\"another\"}", "private_token=another"] {
        assert!([400, 401].contains(&gateway.ask(&post("", body)).status), "{body}");
    }
    assert!(upstream.seen().iter().all(|seen| !String::from_utf8_lossy(&seen.body).contains("another")));
}

/// Rack and PHP with generated names: a NUL, a bracket or a dot ended the name or was replaced in it.
#[test]
fn no_spelling_of_the_tokens_name_passes_beside_a_header() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    for name in ["private_token%00x", "private.token", "private_token[]", "private%5Ftoken%5B", "+private_token"] {
        let request = format!("GET {TARGET}?{name}=another HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: {GOOD}\n\n");
        assert_eq!(gateway.ask(&request).status, 401, "{name}");
    }
    assert_eq!(upstream.seen().len(), 0);
}

/// Django with generated requests: it decodes the query with the charset of the Content-Type, whatever the method.
#[test]
fn a_charset_does_not_change_the_names_in_a_query() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let request = format!(
        "GET {TARGET}?a=1 HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: {GOOD}\nContent-Type: text/plain; charset=utf-7\n\n"
    );
    assert_eq!((gateway.ask(&request).status, upstream.seen().len()), (415, 0));
}

/// A review of persistent connections: the configuration of the first request was used for all that followed.
#[test]
fn a_reload_holds_for_connections_that_are_open() {
    let upstream = Upstream::start();
    let open = "[[route]]\npath = \"/api/v3/open\"\nauth = \"none\"\nreason = \"a test\"\n";
    let gateway = Gateway::start(upstream.address, open);
    let mut client = gateway.client();
    let ask = "GET /api/v3/open HTTP/1.1\nHost: h.test\n\n";
    client.send_head(ask);
    assert_eq!(client.answer().status, 200);
    gateway.rewrite(|text| text.replace(open, ""));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    client.send_head(ask);
    assert_eq!(client.answer().status, 401);
}

/// CI on a quick machine: a gateway on SQLite that ended within 100 ms of its start left a cache snapshot without its
/// position in the list of changes, so that the next one looked up every token again.
#[test]
fn a_gateway_that_ends_at_once_leaves_a_snapshot_that_the_next_one_can_use() {
    let upstream = Upstream::start();
    let folder = Folder::new("test");
    let (database, snapshot) = (folder.0.join("tokens.db"), folder.0.join("cache"));
    let more = format!(
        "[store]\nkind = \"sqlite\"\npath = \"{}\"\n[cache]\nsnapshot = \"{}\"\n",
        database.display(),
        snapshot.display()
    );
    let config =
        folder.write("create.toml", &format!("{more}[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n"));
    let created = tollgate().args(["token", "create", "--user", "ann", "--config"]).arg(config).output().unwrap();
    let token = String::from_utf8(created.stdout).unwrap();
    let request = format!("GET {TARGET} HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: {}\n\n", token.trim());
    let mut first = Gateway::start(upstream.address, &more);
    // What was looked up before it follows the store is looked up again, and is no use for the next one.
    eventually("it follows the store", || first.metric("tollgate_store_subscribed{store=\"sqlite\"}") == 1.0);
    assert_eq!(first.ask(&request).status, 200);
    first.signal("TERM");
    assert!(first.ended().success());
    let second = Gateway::start(upstream.address, &more);
    eventually("the snapshot is used", || second.process_log().contains("earlier cache entries are in use"));
    assert_eq!(second.ask(&request).status, 200);
    assert_eq!(second.metric("tollgate_store_lookups_total{result=\"found\",store=\"sqlite\"}"), 0.0);
}
