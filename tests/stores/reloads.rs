//! A reload that changes the store, or the certificate authority of its server.

use super::{BOUND, Backing, Caller, Embedded, Introspected, PostgresOwn, RedisOwn};
use crate::harness::*;
use crate::servers::http::{HttpServer, Reply};
use crate::servers::redis::{Options, Redis};
use crate::servers::tls::Authority;
use crate::support::{run, status, stderr, stdout};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

/// Changes in a store from a reload are followed from the first lookup on.
#[test]
fn a_revocation_right_behind_a_reload_is_not_lost() {
    let stores: [Box<dyn Backing>; 3] =
        [Box::new(Embedded::new("sqlite")), Box::new(PostgresOwn::new()), Box::new(RedisOwn::new())];
    for mut store in stores {
        store.add(&["known".into(), "doomed".into()]);
        let upstream = Upstream::start();
        let gateway = Gateway::start(upstream.address, "[cache]\npositive_ttl = \"10m\"\n");
        let mut caller = Caller::of(&gateway);
        assert_eq!((caller.status(GOOD), caller.status("known")), (200, 401), "{}", store.name());
        let path = gateway.folder.0.join("tollgate.toml");
        let config = std::fs::read_to_string(&path).unwrap();
        let own = "[store]\nkind = \"file\"\npath = \"tokens.toml\"\n";
        assert!(config.contains(own));
        std::fs::write(&path, config.replace(own, &store.section())).unwrap();
        assert_eq!(gateway.admin_post("/reload").status, 200);
        let mut caller = Caller::of(&gateway);
        assert_eq!((caller.status(GOOD), caller.status("known")), (401, 200), "{}", store.name());
        assert_eq!(caller.status("doomed"), 200);
        store.revoke("doomed");
        let revoked = Instant::now();
        eventually("revoked", || caller.status("doomed") == 401);
        assert!(revoked.elapsed() < BOUND, "{}: {:?}", store.name(), revoked.elapsed());
        assert_eq!(caller.status("known"), 200);
    }
}

/// The store that a reload replaces still waits for answers while its successor begins: together they ask the endpoint for no
/// more tokens at once than one of them may.
#[test]
fn an_endpoint_gets_no_more_requests_at_once_beside_a_reload() {
    let asked = Arc::new((Mutex::new((0_usize, 0_usize, false)), Condvar::new()));
    let state = Arc::clone(&asked);
    let endpoint = HttpServer::start(move |_| {
        let (state, released) = &*state;
        let mut state = state.lock().unwrap();
        state.0 += 1;
        state.1 = state.1.max(state.0);
        let mut state = released.wait_while(state, |(_, _, is_open)| !*is_open).unwrap();
        state.0 -= 1;
        Reply::json("{\"username\":\"root\",\"state\":\"active\"}")
    });
    let url = endpoint.url("/api/v3/user");
    let section =
        format!("[store]\nkind = \"introspection\"\nendpoint = \"{url}\"\nconnections = 2\ntimeout = \"20s\"\n");
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, &section);
    let waiting = "tollgate_store_lookups_waiting{store=\"introspection\"}";
    std::thread::scope(|scope| {
        let callers = |generation: &'static str, count: usize| {
            let gateway = &gateway;
            let call = move |number| Caller::of(gateway).status(&format!("{generation}-{number}"));
            (0..count).map(|number| scope.spawn(move || call(number))).collect::<Vec<_>>()
        };
        let before = callers("before", 5);
        eventually("two are asked for, three wait", || gateway.metric(waiting) == 3.0);
        gateway.rewrite(|text| text.replace("timeout = \"20s\"", "timeout = \"21s\""));
        assert_eq!(gateway.admin_post("/reload").status, 200);
        let behind = callers("behind", 6);
        eventually("of the new ones, two are under way, four wait", || gateway.metric(waiting) == 4.0);
        // What would be sent is sent by now, or soon.
        eventually("the first two have arrived", || asked.0.lock().unwrap().1 >= 2);
        asked.0.lock().unwrap().2 = true;
        asked.1.notify_all();
        for caller in before.into_iter().chain(behind) {
            assert_eq!(caller.join().unwrap(), 200);
        }
    });
    assert_eq!(asked.0.lock().unwrap().1, 2, "the most at once");
}

/// A reload that changes how the records are reached, and not which are meant: the cache is taken over, without a snapshot.
/// One that names other records begins with an empty cache.
#[test]
fn a_cache_goes_on_where_the_records_are_the_same() {
    let mut postgres = PostgresOwn::new();
    let answers = Introspected::new();
    answers.users.lock().unwrap().insert("known".into(), true);
    postgres.add(&["known".into(), "doomed".into()]);
    postgres.age();
    let notified = (postgres.section(), "timeout = \"1s\"", "timeout = \"3s\"\nconnections = 3", "postgres");
    let other = answers.section();
    let never = (other, "timeout = \"1s\"", "timeout = \"3s\"\nbreaker_failures = 9", "introspection");
    for (section, before, after, name) in [notified, never] {
        let upstream = Upstream::start();
        let gateway = Gateway::start(upstream.address, &format!("{section}[cache]\npositive_ttl = \"10m\"\n"));
        let mut caller = Caller::of(&gateway);
        let subscribed = || {
            name != "postgres"
                || gateway.process_log().matches("change notifications are arriving").count() > 0
                    && gateway.metric("tollgate_store_subscribed{store=\"postgres\"}") == 1.0
        };
        eventually("subscribed", subscribed);
        assert_eq!(caller.status("known"), 200, "{name}");
        let found = || gateway.metric(&format!("tollgate_store_lookups_total{{result=\"found\",store=\"{name}\"}}"));
        let looked_up = found();
        if name == "postgres" {
            assert_eq!(caller.status("doomed"), 200);
        }
        gateway.rewrite(|text| text.replace(before, after));
        let followed = || gateway.process_log().matches("earlier cache entries are in use").count();
        assert_eq!(gateway.admin_post("/reload").status, 200, "{name}");
        if name == "postgres" {
            // What changes in between is told of by the list of changes.
            postgres.revoke("doomed");
            eventually("the changes since are known", || followed() == 1);
            assert_eq!(caller.status("doomed"), 401);
        }
        assert_eq!(caller.status("known"), 200, "{name}");
        assert_eq!(found() - looked_up, if name == "postgres" { 2.0 } else { 0.0 }, "{name}: `doomed`, twice");
    }
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, &postgres.section());
    let mut caller = Caller::of(&gateway);
    assert_eq!(caller.status("known"), 200);
    // The same server, and other records.
    gateway.rewrite(|text| text.replace("kind = \"postgres\"", "kind = \"postgres\"\nschema = \"empty\""));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    assert_eq!(caller.status("known"), 503, "its tables are missing, and nothing is known");
}

/// The authority's file was replaced under the same name, as in a renewal: a reload reads it, though no setting changed.
#[test]
fn certificate_files_are_read_again() {
    let (old, new) = (Authority::new(), Authority::new());
    let server = Redis::start(&Options { tls: Some(&old), ..Options::default() });
    for token in ["one", "two", "three", "four"] {
        server.cli(&["SET", &format!("tollgate:token:{}", sha256_hex(token)), "{\"user\":\"ann\"}"]);
    }
    let upstream = Upstream::start();
    let folder = Folder::new("test");
    let ca = folder.0.join("ca.pem");
    std::fs::copy(old.ca(), &ca).unwrap();
    let store = format!(
        "[store]\nkind = \"redis\"\nservers = [\"localhost:{}\"]\ntls = \"verify-full\"\ntls_ca = \"{}\"\n",
        server.tls_port,
        ca.display()
    );
    let gateway = Gateway::start(upstream.address, &store);
    assert_eq!(status(&gateway, "one"), 200);
    // A broken file changes nothing, including settings that are not from that file.
    std::fs::write(&ca, "no certificate").unwrap();
    let answer = gateway.admin_post("/reload");
    assert_eq!(answer.status, 500);
    assert!(answer.text().contains("ca.pem"), "{}", answer.text());
    assert_eq!(status(&gateway, "two"), 200);
    // The server gets a certificate of another authority.
    server.cli(&[
        "CONFIG",
        "SET",
        "tls-cert-file",
        new.certificate().to_str().unwrap(),
        "tls-key-file",
        new.key().to_str().unwrap(),
        "tls-ca-cert-file",
        new.ca().to_str().unwrap(),
    ]);
    server.cli(&["CLIENT", "KILL", "TYPE", "normal"]);
    eventually("the new certificate is not trusted", || status(&gateway, "three") == 503);
    std::fs::copy(new.ca(), &ca).unwrap();
    let answer = gateway.admin_post("/reload");
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(status(&gateway, "four"), 200);
    // Nothing changed: the store and its cache are kept.
    let followed = || gateway.process_log().matches("change notifications are arriving").count();
    eventually("the new store is followed", || followed() == 2);
    assert_eq!(gateway.admin_post("/reload").status, 200);
    assert_eq!((status(&gateway, "four"), followed()), (200, 2));
}

/// Tokens in plain text on the network: an error without `insecure_http`, and with it a warning at each start and reload.
#[test]
fn tokens_in_plain_text_are_warned_of_at_every_start_and_reload() {
    let upstream = Upstream::start();
    let store = |more: &str| {
        format!("[store]\nkind = \"introspection\"\nendpoint = \"http://192.0.2.1/api/v3/user?key=S3CRET\"\n{more}")
    };
    let folder = Folder::new("test");
    let check = |more: &str| {
        let text = format!("{}[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n", store(more));
        run(tollgate().args(["check", "--config"]).arg(folder.write("tollgate.toml", &text)))
    };
    let refused = check("");
    assert!(!refused.status.success() && stderr(&refused).contains("insecure_http = true"), "{}", stderr(&refused));
    let warned = check("insecure_http = true\n");
    let warning = "EVERY TOKEN TRAVELS IN PLAIN TEXT to 192.0.2.1:80";
    assert!(warned.status.success());
    let said = stdout(&warned);
    assert!(said.contains("warning: ") && said.contains(warning) && !said.contains("S3CRET"), "{said}");
    let gateway = Gateway::start(upstream.address, &store("insecure_http = true\n"));
    let warnings = || gateway.process_log().matches(warning).count();
    eventually("warned of at the start", || warnings() == 1);
    assert_eq!(gateway.admin_post("/reload").status, 200);
    eventually("warned of again", || warnings() == 2);
}
