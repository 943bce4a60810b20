//! The pairs of configurations in config/moving, side by side: another gateway as it is set up before, and tollgate after. Both get the
//! same requests, and docs/moving.md has the table of what differs.

use crate::harness::*;
use crate::servers::http::Reply;
use crate::servers::nginx::nginx;
use crate::servers::repository;
use crate::servers::{Process, free_port};
use crate::support::*;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Command, Stdio};

const ALICE: &str = "example-token-of-alice";
const BOB: &str = "example-token-of-bob";

/// A request, and what becomes of it before and after: the status, and what the backend is asked for, if it is.
struct Row {
    what: &'static str,
    request: String,
    before: &'static str,
    after: &'static str,
}

fn row(what: &'static str, token: Option<&str>, target: &str, before: &'static str, after: &'static str) -> Row {
    let token = token.map(|token| format!("PRIVATE-TOKEN: {token}\n")).unwrap_or_default();
    Row { what, request: format!("GET {target} HTTP/1.1\nHost: h\n{token}\n"), before, after }
}

/// A backend that knows two tokens where Rack would look for them, the query after the header, and trusts `X-User` headers from the
/// gateway.
fn backend() -> Upstream {
    Upstream::answering(|seen| {
        let known = [ALICE, BOB].into_iter().find(|token| seen.all("PRIVATE-TOKEN").contains(token));
        let user = if known == Some(BOB) { "bob" } else { "alice" };
        match known {
            None if seen.target.starts_with("/api/v3/user") => {
                Reply::new(401, &[("Content-Type", "application/json")], "{\"message\":\"401 Unauthorized\"}")
            }
            _ => Reply::ok(&format!("{{\"id\":1,\"username\":\"{user}\"}}")),
        }
    })
}

/// What a client and the backend see of a request.
fn seen(address: SocketAddr, upstream: &Upstream, request: &str) -> String {
    upstream.forget();
    let mut client = Client::connect(address);
    client.send_head(request);
    let answer = client.answer();
    let asked = upstream.seen().into_iter().rfind(|seen| !seen.target.starts_with("/api/v3/user"));
    let asked = asked.map(|seen| {
        let identity = ["X-User", "X-Tollgate-User"].into_iter().find_map(|name| seen.header(name));
        let token = seen.header("PRIVATE-TOKEN").map(|token| token.strip_prefix("example-token-of-").unwrap_or(token));
        let who = [identity.map(|user| format!("user {user}")), token.map(|token| format!("token of {token}"))];
        format!(" {} for {}", seen.target, who.into_iter().flatten().collect::<Vec<_>>().join(", "))
    });
    format!("{}{}", answer.status, asked.unwrap_or_default())
}

/// The configuration of `folder`, on free ports and in front of `upstream`.
fn moved(folder: &str, file: &str, upstream: &Upstream, listen: SocketAddr) -> String {
    let text = std::fs::read_to_string(repository(&format!("config/moving/{folder}/{file}"))).unwrap();
    assert!(text.contains("127.0.0.1:3000") && text.contains("127.0.0.1:8080"), "{text}");
    text.replace("127.0.0.1:3000", &upstream.address.to_string()).replace("127.0.0.1:8080", &listen.to_string())
}

fn tollgate_in(folder: &str, upstream: &Upstream) -> Gateway {
    let text = std::fs::read_to_string(repository(&format!("config/moving/{folder}/tollgate.toml"))).unwrap();
    let section = |header: &str| -> String {
        let parts = text.split("\n[").skip(1).map(|part| format!("[{part}\n"));
        parts.filter(|part| part.starts_with(header)).collect()
    };
    // In the harness's spelling, in place of its own store.
    let store = section("[[store]]").replace("[[store]]", "[store]");
    Gateway::start(upstream.address, &[section("[token]"), store, section("[cache]")].concat())
}

/// Every row as the table of docs/moving.md has it.
fn compare(title: &str, before: SocketAddr, after: &Gateway, upstream: &Upstream, rows: &[Row]) {
    let page = std::fs::read_to_string(repository("docs/moving.md")).unwrap();
    for Row { what, request, before: old, after: new } in rows {
        let (found, wanted) = (seen(before, upstream, request), *old);
        assert_eq!(found, wanted, "{title}, before: {what}");
        let (found, wanted) = (seen(after.address, upstream, request), *new);
        assert_eq!(found, wanted, "{title}, after: {what}");
        let line = format!("| {what} | `{old}` | `{new}` |");
        assert!(page.contains(&line), "docs/moving.md has no line: {line}");
    }
}

#[test]
fn from_nginx_with_auth_request() {
    let (upstream, port) = (backend(), SocketAddr::from((Ipv4Addr::LOCALHOST, free_port())));
    let folder = Folder::new("moving");
    let config = format!("events {{}}\nhttp {{\n{} }}\n", moved("nginx-auth-request", "nginx.conf", &upstream, port));
    let _nginx = Process::start(nginx(&folder, &config).stderr(Stdio::null()));
    eventually("nginx listens", || TcpStream::connect(port).is_ok());
    let gateway = tollgate_in("nginx-auth-request", &upstream);
    compare(
        "nginx",
        port,
        &gateway,
        &upstream,
        &[
            row(
                "a valid token",
                Some(ALICE),
                "/api/v3/projects",
                "200 /api/v3/projects for token of alice",
                "200 /api/v3/projects for token of alice",
            ),
            row("none", None, "/api/v3/projects", "401", "401"),
            row("an unknown one", Some("nobody"), "/api/v3/projects", "401", "401"),
            row("outside of the API", Some(ALICE), "/admin", "404", "404"),
            row(
                "the token in the query",
                None,
                "/api/v3/projects?private_token=example-token-of-alice",
                "401",
                "200 /api/v3/projects for token of alice",
            ),
            row(
                "another one in the query",
                Some(ALICE),
                "/api/v3/projects?private_token=example-token-of-bob",
                "200 /api/v3/projects?private_token=example-token-of-bob for token of alice",
                "401",
            ),
            row(
                "a large page",
                Some(ALICE),
                "/api/v3/projects?per_page=9999",
                "200 /api/v3/projects?per_page=9999 for token of alice",
                "200 /api/v3/projects?per_page=100 for token of alice",
            ),
            row(
                "an encoded dot segment",
                Some(ALICE),
                "/api/v3/projects/%2e%2e/users",
                "200 /api/v3/projects/%2e%2e/users for token of alice",
                "400",
            ),
        ],
    );
}

#[test]
fn from_haproxy_with_a_map() {
    let (upstream, port) = (backend(), SocketAddr::from((Ipv4Addr::LOCALHOST, free_port())));
    let folder = Folder::new("moving");
    std::fs::copy(repository("config/moving/haproxy-map/tokens.map"), folder.file("tokens.map")).unwrap();
    let config = moved("haproxy-map", "haproxy.cfg", &upstream, port)
        .replace("/etc/haproxy/tokens.map", &folder.file("tokens.map").display().to_string());
    let config = folder.write("haproxy.cfg", &config);
    let _haproxy = Process::start(
        Command::new("haproxy").args(["-db", "-f"]).arg(config).stdout(Stdio::null()).stderr(Stdio::null()),
    );
    eventually("HAProxy listens", || TcpStream::connect(port).is_ok());
    let gateway = tollgate_in("haproxy-map", &upstream);
    import(&gateway, "haproxy-map");
    compare(
        "HAProxy",
        port,
        &gateway,
        &upstream,
        &[
            row(
                "a valid token",
                Some(ALICE),
                "/api/v3/projects",
                "200 /api/v3/projects for user alice, token of alice",
                "200 /api/v3/projects for user alice",
            ),
            row("none", None, "/api/v3/projects", "401", "401"),
            row("an unknown one", Some("nobody"), "/api/v3/projects", "401", "401"),
            row("outside of the API", Some(ALICE), "/admin", "404", "404"),
            row(
                "the token in the query",
                None,
                "/api/v3/projects?private_token=example-token-of-bob",
                "401",
                "200 /api/v3/projects for user bob",
            ),
            row(
                "another one in the query",
                Some(ALICE),
                "/api/v3/projects?private_token=example-token-of-bob",
                "200 /api/v3/projects?private_token=example-token-of-bob for user alice, token of alice",
                "401",
            ),
            row(
                "a large page",
                Some(ALICE),
                "/api/v3/projects?per_page=9999",
                "200 /api/v3/projects?per_page=9999 for user alice, token of alice",
                "200 /api/v3/projects?per_page=100 for user alice",
            ),
        ],
    );
}

/// Runs the import that the file of the configuration recommends.
fn import(gateway: &Gateway, folder: &str) {
    let text = std::fs::read_to_string(repository(&format!("config/moving/{folder}/tollgate.toml"))).unwrap();
    let command: String = text
        .lines()
        .skip(1)
        .map_while(|line| line.strip_prefix('#'))
        .map(|line| format!("{}\n", line.strip_prefix("   ").unwrap_or(line)))
        .collect();
    let binary = tollgate().get_program().to_owned();
    let command = command
        .replace("tollgate token", &format!("{} token", binary.to_string_lossy()))
        .replace("--config tollgate.toml", &format!("--config {}", gateway.folder.file("tollgate.toml").display()));
    let ran = run(Command::new("bash")
        .args(["-euo", "pipefail", "-c", &command])
        .current_dir(repository(&format!("config/moving/{folder}"))));
    assert!(ran.status.success(), "{}: {}", command, stderr(&ran));
}

/// Kong cannot be had where the tests run: its half is as its documentation says, and tollgate's half is tried.
#[test]
fn the_credentials_of_kong_work_behind_the_import() {
    let upstream = backend();
    let gateway = tollgate_in("kong-key-auth", &upstream);
    import(&gateway, "kong-key-auth");
    for (token, wanted) in
        [(ALICE, "200 /api/v3/projects for user alice"), (BOB, "200 /api/v3/projects for user bob"), ("nobody", "401")]
    {
        let row = row("", Some(token), "/api/v3/projects", "", "");
        assert_eq!(seen(gateway.address, &upstream, &row.request), wanted);
    }
}
