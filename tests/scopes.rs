//! A token's record is enforced by the real binary: scopes on the canonical path, period of validity, blocked users, and
//! rotation.

use crate::harness::*;
use crate::support::{Store, stderr, stdout};

/// A token for each set of scopes: its name is the scopes, with `-` between.
fn tokens() -> String {
    let token = |name: &str, scopes: &str, more: &str| {
        format!("[[token]]\nsha256 = \"{}\"\nuser = \"{name}\"\nscopes = [{scopes}]\n{more}\n", sha256_hex(name))
    };
    [
        token("api", "\"api\"", ""),
        token("read_api", "\"read_api\"", ""),
        token("read_user", "\"read_user\"", ""),
        token("api-sudo", "\"api\", \"sudo\"", ""),
        token("sudo", "\"sudo\"", ""),
        token("none", "", ""),
        token("deploy", "\"deploy\"", ""),
        token("blocked", "\"api\"", "blocked = true"),
        token("tomorrow", "\"api\"", "not_before = \"2999-01-01T00:00:00Z\""),
        token("yesterday", "\"api\"", "expires = \"2020-01-01T00:00:00Z\""),
    ]
    .concat()
}

fn ask(gateway: &Gateway, token: &str, method: &str, target: &str, more: &str) -> Answer {
    let mut client = gateway.client();
    client.send_head(&format!("{method} {target} HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: {token}\n{more}\n"));
    client.answer_to(method).unwrap()
}

#[test]
fn a_scope_allows_what_the_table_says_on_every_spelling_of_a_path() {
    let upstream = Upstream::start();
    let gateway = Gateway::start_with_tokens(
        upstream.address,
        &tokens(),
        "[api]\nscopes = \"gitlab\"\n[[scope]]\nname = \"deploy\"\nmethods = [\"POST\"]\n\
         paths = [\"/api/v3/projects/:id/deploy\", \"/api/v3/hooks/*\"]\n",
    );
    let mut forbidden = 0;
    for (token, method, target, status) in [
        ("api", "GET", "/api/v3/projects", 200),
        ("api", "DELETE", "/api/v3/projects/1", 200),
        ("read_api", "GET", "/api/v3/projects", 200),
        ("read_api", "HEAD", "/api/v3/projects", 200),
        ("read_api", "POST", "/api/v3/projects", 403),
        ("read_api", "OPTIONS", "/api/v3/projects", 403),
        ("read_user", "GET", "/api/v3/user", 200),
        ("read_user", "GET", "/api/v3/users/7", 200),
        ("read_user", "HEAD", "/api/v3/user", 403),
        ("read_user", "PUT", "/api/v3/users/7", 403),
        ("read_user", "GET", "/api/v3/projects", 403),
        // The backend reads these as /api/v3/projects, or as a path without a rule.
        ("read_user", "GET", "/api/v3/user%2F..%2Fprojects", 400),
        ("read_user", "GET", "/api/v3/users2", 403),
        ("read_user", "GET", "/api/v3/user;x=1", 403),
        // Other spellings of an allowed path.
        ("read_user", "GET", "/api/v3/%75ser", 200),
        ("read_user", "GET", "/api/v3//user", 200),
        ("read_user", "GET", "/api/v3/user.json", 200),
        ("read_user", "GET", "/api/v3/user/", 200),
        ("read_user", "GET", "/api/v3/%70rojects", 403),
        ("deploy", "POST", "/api/v3/projects/1/deploy", 200),
        ("deploy", "POST", "/api/v3/projects/1/deploy.json", 200),
        ("deploy", "POST", "/api/v3/projects/1/2/deploy", 403),
        ("deploy", "POST", "/api/v3/hooks", 200),
        ("deploy", "POST", "/api/v3/hooks/a/b", 200),
        ("deploy", "GET", "/api/v3/hooks", 403),
        ("none", "GET", "/api/v3/user", 403),
        ("sudo", "GET", "/api/v3/user", 403),
        ("blocked", "GET", "/api/v3/user", 401),
        ("tomorrow", "GET", "/api/v3/user", 401),
        ("yesterday", "GET", "/api/v3/user", 401),
    ] {
        let before = upstream.seen().len();
        let answer = ask(&gateway, token, method, target, "Content-Length: 0\n");
        assert_eq!(answer.status, status, "{token} {method} {target}");
        assert_eq!(upstream.seen().len() - before, usize::from(status == 200), "{token} {method} {target}");
        forbidden += usize::from(status == 403);
        if status == 403 && method != "HEAD" {
            assert_eq!(answer.text(), "{\"message\":\"403 Forbidden\"}");
            assert_eq!(answer.header("Content-Type"), Some("application/json"));
        }
    }
    let refused = |reason: &str| {
        gateway.metric(&format!("tollgate_auth_total{{reason=\"{reason}\",result=\"refused\",source=\"header\"}}"))
    };
    assert_eq!((refused("blocked"), refused("not_yet_valid"), refused("expired")), (1.0, 1.0, 1.0));
    assert_eq!((refused("scope"), forbidden), (12.0, 12));
    let log = gateway.access_log();
    let entry = log.iter().find(|entry| entry["reason"] == "scope").unwrap();
    assert_eq!(entry["status"], 403);
    assert_eq!(entry["token"], &sha256_hex("read_api")[..12]);
}

#[test]
fn acting_as_another_takes_the_switch_and_the_scope() {
    let upstream = Upstream::start();
    for (switch, token, status) in
        [("allow", "api-sudo", 200), ("allow", "api", 403), ("allow", "sudo", 403), ("refuse", "api-sudo", 403)]
    {
        let more = format!("[api]\nscopes = \"gitlab\"\n[token]\nsudo = \"{switch}\"\n");
        let gateway = Gateway::start_with_tokens(upstream.address, &tokens(), &more);
        for (target, header) in [("/api/v3/user?sudo=root", ""), ("/api/v3/user", "SUDO: root\n")] {
            assert_eq!(ask(&gateway, token, "GET", target, header).status, status, "{switch} {token} {target}");
        }
    }
}

#[test]
fn without_a_table_every_valid_token_may_do_everything() {
    let upstream = Upstream::start();
    let gateway = Gateway::start_with_tokens(upstream.address, &tokens(), "");
    for token in ["none", "read_user", "api"] {
        assert_eq!(ask(&gateway, token, "DELETE", "/api/v3/projects/1", "").status, 200, "{token}");
    }
}

#[test]
fn a_rotation_lets_both_work_and_ends_the_old_one_by_itself() {
    let upstream = Upstream::start();
    let store = Store::with([("somebody-elses-token", "other")]);
    let gateway = Gateway::start(upstream.address, &store.section());
    let old = store.create("ci");
    let id = sha256_hex(&old);
    assert_eq!(ask(&gateway, &old, "GET", "/api/v3/user", "").status, 200);
    let output = store.token(&["rotate"], &[&id[..12], "--overlap", "3s"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let new = stdout(&output).trim().to_owned();
    assert!(new != old && new.starts_with("tg-"), "{new}");
    assert!(stderr(&output).contains("remains valid until"), "{}", stderr(&output));
    let again = store.token(&["rotate"], &[&id[..12]]);
    assert!(!again.status.success() && stderr(&again).contains("nothing to rotate"), "{}", stderr(&again));
    eventually("the old one counts as old", || {
        ask(&gateway, &old, "GET", "/api/v3/user", "");
        gateway.metric("tollgate_rotated_token_requests_total{generation=\"old\"}") > 0.0
    });
    assert_eq!(ask(&gateway, &new, "GET", "/api/v3/user", "").status, 200);
    assert!(gateway.metric("tollgate_rotated_token_requests_total{generation=\"new\"}") >= 1.0);
    eventually("the old one ends", || ask(&gateway, &old, "GET", "/api/v3/user", "").status == 401);
    assert_eq!(ask(&gateway, &new, "GET", "/api/v3/user", "").status, 200);
    let shown = stdout(&store.token(&["show"], &[&id[..12]]));
    assert!(shown.contains("state        expired") && shown.contains("rotated      "), "{shown}");
    let shown = stdout(&store.token(&["show"], &[&sha256_hex(&new)[..12]]));
    assert!(shown.contains(&format!("replaces     {}", &id[..12])), "{shown}");
}

#[test]
fn a_blocked_user_is_out_at_once_and_comes_back() {
    let upstream = Upstream::start();
    let store = Store::with([("token-of-ann-1", "ann"), ("token-of-ann-2", "ann"), ("token-of-ben", "ben")]);
    let gateway = Gateway::start(upstream.address, &store.section());
    let status = |token: &str| ask(&gateway, token, "GET", "/api/v3/user", "").status;
    assert_eq!((status("token-of-ann-1"), status("token-of-ann-2"), status("token-of-ben")), (200, 200, 200));
    let output = store.token(&["block"], &["ann"]);
    assert_eq!(stdout(&output), "2 tokens of ann are blocked\n");
    eventually("blocked", || status("token-of-ann-1") == 401 && status("token-of-ann-2") == 401);
    assert_eq!(status("token-of-ben"), 200);
    assert_eq!(stdout(&store.token(&["unblock"], &["ann"])), "2 tokens of ann work again\n");
    eventually("back", || status("token-of-ann-1") == 200 && status("token-of-ann-2") == 200);
}

#[test]
fn revoke_waits_for_every_running_gateway() {
    let upstream = Upstream::start();
    let store = Store::with([("token-of-ann", "ann"), ("token-of-ben", "ben")]);
    let gateways: Vec<Gateway> = (0..3).map(|_| Gateway::start(upstream.address, &store.section())).collect();
    for gateway in &gateways {
        assert_eq!(ask(gateway, "token-of-ann", "GET", "/api/v3/user", "").status, 200);
    }
    let output = store.token(&["revoke"], &[&sha256_hex("token-of-ann")[..12], "--wait"]);
    assert!(output.status.success(), "{}", stderr(&output));
    for gateway in &gateways {
        assert_eq!(
            ask(gateway, "token-of-ann", "GET", "/api/v3/user", "").status,
            401,
            "a confirmed revocation is in force"
        );
    }
    assert!(stderr(&output).starts_with("confirmed by 3 within "), "{}", stderr(&output));
    // Whoever knows how many there must be is told when one is missing.
    for (least, code) in [("3", 0), ("4", 1)] {
        let arguments = [&sha256_hex("token-of-ann")[..12], "--wait", "--gateways", least];
        let output = store.token(&["revoke"], &arguments);
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        assert_eq!(stderr(&output).contains("only 3 of 4 gateways are in the register"), code == 1);
    }
    // A gateway that does not respond is named.
    gateways[0].signal("STOP");
    let output = store.token(&["revoke"], &[&sha256_hex("token-of-ben")[..12], "--wait", "--timeout", "1s"]);
    gateways[0].signal("CONT");
    assert!(!output.status.success());
    assert!(stderr(&output).contains(&format!(":{}", gateways[0].pid())), "{}", stderr(&output));
}

#[test]
fn scopes_that_mean_nothing_are_said_when_a_token_is_made() {
    let folder = Folder::new("test");
    let config = folder.write(
        "tollgate.toml",
        "[api]\nscopes = \"gitlab\"\n[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n",
    );
    let create = |more: &[&str]| {
        let mut command = tollgate();
        command.args(["token", "create", "--user", "a", "--config"]).arg(&config).args(more);
        stderr(&crate::support::run(&mut command))
    };
    assert!(create(&[]).contains("a token without a scope is allowed nothing"));
    assert!(create(&["--scope", "apu"]).contains("no [[scope]] defines what \"apu\" allows"));
    assert!(!create(&["--scope", "api"]).contains("note:"));
}
