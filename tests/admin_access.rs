//! Who may do what over the listeners for operators: the token, listeners that others can reach, the one for metrics alone, and
//! requests that a web page can make a browser send.

use crate::harness::*;
use crate::support::*;
use base64::Engine as _;
use std::net::{Ipv4Addr, SocketAddr};

const ADMIN_TOKEN: &str = "an-operators-token-of-some-length-4711";

fn local(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

fn answer(address: SocketAddr, line: &str, fields: &str) -> Answer {
    let mut client = Client::connect(address);
    client.send_head(&format!("{line} HTTP/1.1\nHost: localhost\n{fields}\n"));
    client.answer_to(line.split(' ').next().unwrap()).unwrap()
}

/// Adds keys to [admin], and reloads by a signal.
fn with_admin(gateway: &Gateway, keys: &str) {
    let before = std::fs::read_to_string(gateway.folder.0.join("tollgate.toml")).unwrap();
    let lines = gateway.process_log().matches("configuration reloaded").count();
    gateway.rewrite(|_| before.replace("[admin]\n", &format!("[admin]\n{keys}")));
    gateway.signal("HUP");
    eventually("a reload", || gateway.process_log().matches("configuration reloaded").count() > lines);
}

fn with_token() -> (Upstream, Gateway) {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    with_admin(&gateway, &format!("token_sha256 = \"{}\"\n", sha256_hex(ADMIN_TOKEN)));
    (upstream, gateway)
}

/// What `GET /metrics` of a listener with a token says of a series.
fn metric(gateway: &Gateway, series: &str) -> f64 {
    let text = answer(gateway.admin, "GET /metrics", &format!("Authorization: Bearer {ADMIN_TOKEN}\n")).text();
    text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok()).unwrap_or(0.0)
}

#[test]
fn a_token_is_asked_for_by_everything_but_health() {
    let (_upstream, gateway) = with_token();
    let basic =
        |pair: &str| format!("Authorization: Basic {}\n", base64::engine::general_purpose::STANDARD.encode(pair));
    let right = [
        format!("Authorization: Bearer {ADMIN_TOKEN}\n"),
        format!("authorization: bearer {ADMIN_TOKEN}\n"),
        basic(&format!("anybody:{ADMIN_TOKEN}")),
        basic(&format!(":{ADMIN_TOKEN}")),
    ];
    let wrong = [
        String::new(),
        "Authorization: Bearer wrong\n".into(),
        format!("Authorization: Bearer {ADMIN_TOKEN}x\n"),
        format!("Authorization: Bearer {}\n", &ADMIN_TOKEN[..ADMIN_TOKEN.len() - 1]),
        // The digest is in the configuration: whoever reads it there does not get in by it.
        format!("Authorization: Bearer {}\n", sha256_hex(ADMIN_TOKEN)),
        format!("Authorization: {ADMIN_TOKEN}\n"),
        basic(&format!("{ADMIN_TOKEN}:")),
        basic(ADMIN_TOKEN),
        format!("PRIVATE-TOKEN: {ADMIN_TOKEN}\n"),
        format!("Authorization: Bearer {ADMIN_TOKEN}\nAuthorization: Bearer {ADMIN_TOKEN}\n"),
        format!("Authorization: Bearer {GOOD}\n"),
    ];
    let lines = [
        "GET /",
        "GET /metrics",
        "GET /status",
        "GET /upstreams",
        "GET /top",
        "GET /guessing",
        "GET /nowhere",
        "POST /cache/forget",
        "POST /guessing/lift",
        "POST /reload",
        "POST /upgrade",
        "POST /nowhere",
        "DELETE /reload",
        "HEAD /status",
    ];
    let mut seen = 0;
    for fields in &wrong {
        for line in lines {
            let got = answer(gateway.admin, line, fields);
            let asked = got.header("WWW-Authenticate").unwrap_or_default().starts_with("Basic realm=");
            assert_eq!((got.status, asked), (401, true), "{line} with {fields:?}");
            seen += 1;
        }
    }
    assert_eq!(seen, 11 * 14);
    for fields in &right {
        for (line, status) in
            [("GET /status", 200), ("GET /metrics", 200), ("POST /cache/forget", 200), ("GET /nowhere", 404)]
        {
            assert_eq!(answer(gateway.admin, line, fields).status, status, "{line} with {fields:?}");
        }
    }
    for line in ["GET /healthz", "HEAD /readyz", "OPTIONS /"] {
        assert_eq!(answer(gateway.admin, line, "").status, 200, "{line}");
    }
    for line in ["POST /healthz", "OPTIONS /reload", "GET /healthz/"] {
        assert_eq!(answer(gateway.admin, line, "").status, 401, "{line}");
    }
    let counted = |reason: &str| metric(&gateway, &format!("tollgate_admin_denials_total{{reason=\"{reason}\"}}"));
    assert!(counted("wrong_token") >= 70.0 && counted("no_token") >= 14.0, "{}", counted("wrong_token"));
    // However many there were, the log has a line a minute, and no token.
    let log = gateway.process_log();
    assert_eq!(log.matches("a request with a wrong token was refused").count(), 1, "{log}");
    assert!(!log.contains(ADMIN_TOKEN) && !log.contains("wrong\n"), "{log}");
}

#[test]
fn the_commands_take_the_token() {
    let (_upstream, gateway) = with_token();
    let file = gateway.folder.write("admin-token", &format!("{ADMIN_TOKEN}\n"));
    let wrong = gateway.folder.write("wrong-token", "wrong\n");
    let ask = |command: &[&str], token: Option<&std::path::Path>, variable: Option<&str>| {
        let mut tollgate = tollgate();
        tollgate.args(command).arg("--config").arg(gateway.folder.0.join("tollgate.toml"));
        if let Some(file) = token {
            tollgate.arg("--admin-token-file").arg(file);
        }
        if let Some(token) = variable {
            tollgate.env("TOLLGATE_ADMIN_TOKEN", token);
        }
        let output = run(&mut tollgate);
        (output.status.code(), stdout(&output) + &stderr(&output))
    };
    for command in [&["status"][..], &["status", "--json"], &["reload"]] {
        let (code, said) = ask(command, None, None);
        assert!(code == Some(1) && said.contains("401") && said.contains("--admin-token-file"), "{command:?}: {said}");
        let (code, said) = ask(command, Some(&wrong), Some(ADMIN_TOKEN));
        assert!(code == Some(1) && said.contains("401"), "the file comes first: {command:?}: {said}");
        for (token, variable) in [(Some(&*file), None), (None, Some(ADMIN_TOKEN))] {
            let (code, said) = ask(command, token, variable);
            assert!(code == Some(0) && !said.contains(ADMIN_TOKEN), "{command:?}: {said}");
        }
    }
    let (code, said) = ask(&["status"], Some(std::path::Path::new("/no/such/file")), None);
    assert!(code == Some(64) && said.contains("/no/such/file"), "{said}");
    let (code, said) = ask(&["status"], None, Some("two words"));
    assert!(code == Some(64) && said.contains("TOLLGATE_ADMIN_TOKEN") && !said.contains("two words"), "{said}");
}

#[test]
fn a_listener_that_others_reach_only_reads_unless_it_has_a_token() {
    let upstream = Upstream::start();
    let mut gateway = Gateway::start(upstream.address, "");
    let (own, open) = (gateway.admin, free_port());
    let to_open = |text: &str| text.replace(&format!("listen = \"{own}\""), &format!("listen = \"0.0.0.0:{open}\""));
    gateway.rewrite(to_open);
    assert_eq!(gateway.admin_post("/reload").status, 200);
    gateway.admin = local(open);
    eventually("the new address", || gateway.admin_get("/readyz").is_some());
    let reloads = || gateway.metric("tollgate_config_reloads_total{result=\"ok\"}");
    let before = reloads();
    let changes = [
        "/reload",
        "/upgrade",
        "/cache/forget",
        "/guessing/lift",
        "/upstreams/api/servers/x/drain",
        "/upstreams/api/servers/x/undrain",
    ];
    for path in changes {
        let got = gateway.admin_post(path);
        assert!(
            got.status == 403 && got.text().contains("token_sha256") && got.text().contains("loopback"),
            "{path}: {}",
            got.text()
        );
    }
    for path in ["/", "/status", "/metrics", "/upstreams", "/top", "/guessing", "/healthz"] {
        assert_eq!(gateway.admin_get(path).unwrap().status, 200, "{path}");
    }
    let status: serde_json::Value = serde_json::from_slice(&gateway.admin_get("/status").unwrap().body).unwrap();
    assert_eq!((reloads(), &status["reads_only"]), (before, &true.into()));
    // `check` says so.
    let check = run(tollgate().args(["check", "--offline", "--config"]).arg(gateway.folder.0.join("tollgate.toml")));
    assert!(
        stdout(&check).contains("warning: admin.listen") && stdout(&check).contains("refuses reloads"),
        "{}",
        stdout(&check)
    );
    // With a token it does.
    with_admin(&gateway, &format!("token_sha256 = \"{}\"\n", sha256_hex(ADMIN_TOKEN)));
    let field = format!("Authorization: Bearer {ADMIN_TOKEN}\n");
    assert_eq!(answer(gateway.admin, "POST /reload", "").status, 401);
    assert_eq!(answer(gateway.admin, "POST /reload", &field).status, 200);
}

#[test]
fn the_listener_for_metrics_has_metrics_and_health_and_nothing_else() {
    let (_upstream, gateway) = with_token();
    let metrics = local(free_port());
    with_admin(&gateway, &format!("metrics_listen = \"{metrics}\"\n"));
    let mut seen = 0;
    for path in ["/metrics", "/healthz", "/readyz"] {
        for method in ["GET", "HEAD"] {
            assert_eq!(answer(metrics, &format!("{method} {path}"), "").status, 200, "{method} {path}");
            seen += 1;
        }
        for method in ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"] {
            assert_eq!(answer(metrics, &format!("{method} {path}"), "").status, 405, "{method} {path}");
            seen += 1;
        }
    }
    let reloads = || metric(&gateway, "tollgate_config_reloads_total{result=\"ok\"}");
    let before = reloads();
    for path in [
        "/",
        "/status",
        "/upstreams",
        "/top",
        "/guessing",
        "/reload",
        "/upgrade",
        "/cache/forget",
        "/guessing/lift",
        "/upstreams/api/servers/x/drain",
        "/explain",
        "//reload",
        "/metrics/../reload",
    ] {
        for method in ["GET", "POST", "HEAD", "OPTIONS", "DELETE"] {
            // Whoever has the token gets no more here.
            for field in ["", &format!("Authorization: Bearer {ADMIN_TOKEN}\n")] {
                assert_eq!(answer(metrics, &format!("{method} {path}"), field).status, 404, "{method} {path}");
                seen += 1;
            }
        }
    }
    assert_eq!((seen, reloads()), (21 + 130, before));
    // The same rules about who asks.
    let mut client = Client::connect(metrics);
    client.send_head("GET /metrics HTTP/1.1\nHost: evil.example\n\n");
    assert_eq!(client.answer().status, 403);
    assert_eq!(answer(metrics, "GET /metrics", "Origin: http://evil.example\n").status, 403);
    // It comes and goes with reloads, like the others.
    gateway.rewrite(|text| {
        text.lines().filter(|line| !line.starts_with("metrics_listen")).map(|line| format!("{line}\n")).collect()
    });
    assert_eq!(answer(gateway.admin, "POST /reload", &format!("Authorization: Bearer {ADMIN_TOKEN}\n")).status, 200);
    eventually("it is closed", || Client::try_connect(metrics).is_none());
}

#[test]
fn what_a_form_or_a_page_can_send_changes_nothing() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let reloads = || gateway.metric("tollgate_config_reloads_total{result=\"ok\"}");
    let before = reloads();
    let mut seen = 0;
    for (fields, status) in [
        // A form always has a type, also without fields.
        ("Content-Type: text/plain\nContent-Length: 0\n", 415),
        ("Content-Type: application/x-www-form-urlencoded\nContent-Length: 0\n", 415),
        ("Content-Type: multipart/form-data; boundary=x\nContent-Length: 0\n", 415),
        ("Content-Type: text/plain; application/json\nContent-Length: 0\n", 415),
        ("Content-Type: application/jsonp\n", 415),
        ("Content-Type: \n", 415),
        ("Content-Length: 2\n", 415),
        ("Origin: http://evil.example\n", 403),
        ("Origin: null\n", 403),
        ("Sec-Fetch-Site: cross-site\n", 403),
        ("Sec-Fetch-Site: same-site\n", 403),
        ("Sec-Fetch-Site: cross-site\nSec-Fetch-Mode: navigate\n", 403),
        ("Sec-Fetch-Site: cross-site\nContent-Type: application/json\n", 403),
    ] {
        let got = answer(gateway.admin, "POST /reload", fields);
        assert_eq!(got.status, status, "{fields:?}: {}", got.text());
        seen += 1;
    }
    assert_eq!((seen, reloads()), (13, before));
    for fields in [
        "",
        "Content-Type: application/json\n",
        "Content-Type: Application/JSON; charset=utf-8\nContent-Length: 0\n",
        "Sec-Fetch-Site: same-origin\n",
        "Sec-Fetch-Site: none\n",
    ] {
        assert_eq!(answer(gateway.admin, "POST /reload", fields).status, 200, "{fields:?}");
    }
    // A link from elsewhere to the page is followed; a script that loads it is not.
    let link = "Sec-Fetch-Site: cross-site\nSec-Fetch-Mode: navigate\n";
    assert_eq!(answer(gateway.admin, "GET /", link).status, 200);
    assert_eq!(
        answer(gateway.admin, "GET /status", "Sec-Fetch-Site: cross-site\nSec-Fetch-Mode: no-cors\n").status,
        403
    );
}
