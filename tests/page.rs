//! The page of the admin listener: what is on it, what never is, and how it looks to a real Chromium.

use crate::harness::*;
use crate::support::*;
use std::process::{Command, Stdio};

fn page(gateway: &Gateway) -> Answer {
    let mut client = Client::connect(gateway.admin);
    client.send_head("GET / HTTP/1.1\nHost: localhost\nAccept: text/html,application/xhtml+xml,*/*;q=0.8\n\n");
    client.answer()
}

fn status_json(gateway: &Gateway) -> serde_json::Value {
    serde_json::from_slice(&gateway.admin_get("/status?series").unwrap().body).unwrap()
}

const ADMIN_TOKEN: &str = "an-operators-token-of-some-length-4711";
const HOSTILE_USER: &str = "<script>window.hostile=1</script>";
const HOSTILE_REASON: &str = "</style><img src=x onerror=window.hostile=1>&'`";

/// A gateway with a bit of everything, and traffic.
fn busy(upstream: &Upstream) -> Gateway {
    let dead = free_port();
    let tokens = format!(
        "[[token]]\nsha256 = \"{}\"\nuser = \"{HOSTILE_USER}\"\n[[token]]\nsha256 = \"{}\"\nuser = \"\u{5d0}\\u202Ebob\"\n",
        sha256_hex(GOOD),
        sha256_hex(OTHER)
    );
    let more = format!(
        "[[upstream]]\nname = \"api\"\nservers = [\"{}\"]\n[[upstream]]\nname = \"reports\"\nservers = [\"127.0.0.1:{dead}\"]\ncheck = \"tcp\"\ncheck_interval = \"100ms\"\n\
         check_failures = 1\n[[limit]]\nname = \"per-token\"\nrate = \"3/min\"\nburst = 3\n\
         [guessing]\nfailures = 10\n[[route]]\npath = \"/api/v3/reports/*\"\nupstream = \"reports\"\n\
         [route.request_headers.set]\nX-Backend-Key = \"S3CRET-header\"\n[[route]]\npath = \"/api/v3/version\"\nauth = \"none\"\nreason = \"{HOSTILE_REASON}\"\n",
        upstream.address
    );
    let gateway = Gateway::start_with_tokens(upstream.address, &tokens, &more);
    for (token, times) in [(GOOD, 5), (OTHER, 2), (BAD, 6)] {
        for _ in 0..times {
            status(&gateway, token);
        }
    }
    gateway.ask(&get(OTHER, "/api/v3/reports/1"));
    gateway
}

#[test]
fn a_browser_gets_a_page_and_everybody_else_the_list() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let got = page(&gateway);
    assert_eq!((got.status, got.header("Content-Type")), (200, Some("text/html; charset=utf-8")));
    let policy = got.header("Content-Security-Policy").unwrap();
    for wanted in [
        "default-src 'none'",
        "script-src 'sha256-",
        "style-src 'sha256-",
        "connect-src 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
        "form-action 'self'",
    ] {
        assert!(policy.contains(wanted), "{policy}");
    }
    assert!(!policy.contains("unsafe") && !policy.contains('*'), "{policy}");
    assert_eq!(
        (got.header("Cache-Control"), got.header("X-Content-Type-Options")),
        (Some("no-store"), Some("nosniff"))
    );
    for accept in ["", "Accept: */*\n", "Accept: text/plain\n", "Accept: application/json\n"] {
        let mut client = Client::connect(gateway.admin);
        client.send_head(&format!("GET / HTTP/1.1\nHost: localhost\n{accept}\n"));
        let got = client.answer();
        assert!(got.text().contains("POST /reload  ") && got.header("Content-Security-Policy").is_none(), "{accept:?}");
    }
}

#[test]
fn the_page_and_the_status_say_what_goes_on() {
    let upstream = Upstream::start();
    let gateway = busy(&upstream);
    eventually("everything is counted", || status_json(&gateway)["traffic"]["last_15_minutes"]["requests"] == 14);
    let status = status_json(&gateway);
    let window = &status["traffic"]["last_15_minutes"];
    assert_eq!((&window["results"]["ok"], &window["results"]["failed"]), (&5.into(), &1.into()), "{window}");
    let reason = |name: &str| {
        window["refusals"]
            .as_array()
            .unwrap()
            .iter()
            .find(|row| row["reason"] == name)
            .map_or(0, |row| row["requests"].as_u64().unwrap())
    };
    // Of six unknown tokens, the last ones may be told to wait; of five requests with one token, two are over its limit.
    assert_eq!((reason("limit_rate"), reason("unknown") + reason("guessing")), (2, 6), "{window}");
    let results = window["results"].as_object().unwrap();
    assert_eq!(results.values().filter_map(serde_json::Value::as_u64).sum::<u64>(), 14, "{results:?}");
    for name in ["ok", "client_error", "refused", "failed", "client_gone"] {
        let slots = window["series"][name].as_array().unwrap();
        let sum: u64 = slots.iter().filter_map(serde_json::Value::as_u64).sum();
        assert_eq!((slots.len(), Some(sum)), (90, results[name].as_u64()), "{name}");
    }
    assert!(window["latency_ms"]["p50"].as_f64().unwrap() > 0.0);
    // What was there before stays.
    for key in [
        "version",
        "ready",
        "started",
        "uptime_seconds",
        "store",
        "hears_of_changes",
        "cache",
        "requests_in_flight",
        "routes",
    ] {
        assert!(!status[key].is_null(), "{key}");
    }
    eventually("the dead server is found", || status_json(&gateway)["upstreams"][1]["servers"][0]["up"] == false);
    assert_eq!(status["stores"][0]["subscribed"], true);
    assert_eq!(status["limits"][0]["refused"], 2);
    assert_eq!(status["callers"]["tokens"]["by_requests"][0]["token"].as_str().unwrap().len(), 12);
    assert_eq!((&status["reloads"][0]["result"], &status["reloads"][0]["by"]), (&"start".into(), &"start".into()));
    // A reload and what it changed; one that failed and why.
    gateway.rewrite(|text| text.replace("burst = 3", "burst = 4"));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    gateway.rewrite(|text| text.replace("burst = 4", "burst = \"four\""));
    assert_eq!(gateway.admin_post("/reload").status, 500);
    let reloads = status_json(&gateway)["reloads"].clone();
    assert_eq!(
        (&reloads[0]["result"], &reloads[1]["result"], &reloads[1]["applied"]),
        (&"failed".into(), &"ok".into(), &serde_json::json!(["limit"]))
    );
    assert!(reloads[0]["errors"][0].as_str().unwrap().contains("limit[0].burst"), "{reloads}");
    let html = page(&gateway).text();
    for wanted in [
        ">down<",
        ">limit_rate<",
        "127.0.0.1",
        ">per-token<",
        ">failed<",
        ">in force<",
        ">heard<",
        "[[upstream]] reports",
        &sha256_hex(GOOD)[..12],
    ] {
        assert!(html.contains(wanted), "{wanted} is not on the page");
    }
    // The command says the same.
    let output = run(tollgate().args(["status", "--config"]).arg(gateway.folder.0.join("tollgate.toml")));
    let text = stdout(&output);
    assert!(output.status.success(), "{text}{}", stderr(&output));
    for wanted in ["ready", "limit_rate", "down", "per-token", "requests", "heard", &sha256_hex(GOOD)[..12]] {
        assert!(text.contains(wanted), "{wanted} is not in {text}");
    }
    assert!(!text.contains('\u{202e}'), "{text:?}");
    let output = run(tollgate().args(["status", "--json", "--config"]).arg(gateway.folder.0.join("tollgate.toml")));
    assert_eq!(serde_json::from_str::<serde_json::Value>(&stdout(&output)).unwrap()["limits"], status["limits"]);
}

#[test]
fn no_secret_is_on_the_page() {
    let upstream = Upstream::start();
    let gateway = busy(&upstream);
    let folder = &gateway.folder;
    let secret = folder.write("password", "S3CRET-password");
    let original = std::fs::read_to_string(folder.0.join("tollgate.toml")).unwrap();
    let store = format!(
        "[[store]]\nkind = \"file\"\npath = \"tokens.toml\"\n[[store]]\nname = \"pg\"\nkind = \"postgres\"\nurl = \"postgres://u:S3CRET-url@127.0.0.1:1/d\"\n\
         tls = \"disable\"\n[[store]]\nname = \"cache\"\nkind = \"redis\"\nservers = [\"127.0.0.1:1\"]\nusername = \"u\"\npassword_file = \"{}\"\n",
        secret.display()
    );
    gateway.rewrite(|_| original.replace("[store]\nkind = \"file\"\npath = \"tokens.toml\"\n", &store));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    // With an error in it, which is told.
    gateway.rewrite(|text| text.replace("url = \"postgres:", "url = 7 # \"postgres:") + "[token]\nheader = 1\n");
    assert_eq!(gateway.admin_post("/reload").status, 500);
    let field = "Accept: text/html\n";
    let mut read = 0;
    for (path, field) in [
        ("/", field),
        ("/", ""),
        ("/status", ""),
        ("/status?series", ""),
        ("/metrics", ""),
        ("/upstreams", ""),
        ("/top", ""),
    ] {
        let mut client = Client::connect(gateway.admin);
        client.send_head(&format!("GET {path} HTTP/1.1\nHost: localhost\n{field}\n"));
        let text = client.answer().text();
        for never in ["S3CRET", GOOD, OTHER, BAD, &sha256_hex(GOOD)[..13], &sha256_hex(OTHER)[..13]] {
            assert!(!text.contains(never), "{never} is in {path}: {text}");
        }
        read += 1;
    }
    assert_eq!(read, 7);
    let html = page(&gateway).text();
    assert!(
        html.contains("postgres") && html.contains("password_file") && html.contains(">hidden<"),
        "the configuration is not there"
    );
}

#[test]
fn a_real_browser_shows_it() {
    let upstream = Upstream::start();
    let gateway = busy(&upstream);
    let guarded = Gateway::start(upstream.address, "");
    guarded.rewrite(|text| {
        text.replace("[admin]\n", &format!("[admin]\ntoken_sha256 = \"{}\"\n", sha256_hex(ADMIN_TOKEN)))
    });
    assert_eq!(guarded.admin_post("/reload").status, 200);
    let wanted = serde_json::json!({
        "url": format!("http://{}/", gateway.admin),
        "names": [HOSTILE_USER, HOSTILE_REASON, "limit_rate", "per-token", "\u{5d0}⟨U+202E⟩bob", &sha256_hex(GOOD)[..12]],
        "known": GOOD,
        "token_url": format!("http://{}/", guarded.admin),
        "token": ADMIN_TOKEN,
    });
    let output = Command::new("/usr/bin/python3")
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/page/check.py"))
        .arg(wanted.to_string())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
    println!("{}", stdout(&output));
    assert!(stdout(&output).contains("with a token"));
}
