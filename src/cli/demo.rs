//! `tollgate demo`: runs the gateway with a small built-in backend and a temporary token store.

use super::{Failure, token::new_token};
use crate::config::Probe;
use crate::request::head;
use crate::request::query::form_decode;
use crate::request::view::{Framing, Method};
use crate::store::TokenRecord;
use crate::store::credential::Digest;
use crate::telemetry::process_log;
use crate::{assembly, config, edge};
use anyhow::{Context as _, anyhow};
use log::LevelFilter;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

const PROJECTS: usize = 253;

pub(super) fn run(listen: SocketAddr) -> Result<(), Failure> {
    process_log::start(LevelFilter::Warn, edge::FRAMEWORK_LOG_LEVELS)?;
    let probe = TcpListener::bind(listen)
        .map_err(|error| anyhow!("{listen} cannot be bound: {error}; choose another address with --listen"))?;
    drop(probe);
    let backend = TcpListener::bind("127.0.0.1:0").context("cannot bind a port for the backend")?;
    let backend_address = backend.local_addr().context("cannot read the backend's address")?;
    std::thread::Builder::new()
        .name("demo-backend".into())
        .spawn(move || serve(&backend))
        .context("cannot start the backend's thread")?;
    // Bound and closed again: another process could take the port before the gateway does, which is good enough for a
    // demo.
    let admin = TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .context("cannot bind a port for the admin listener")?;

    // Removed when the demo ends.
    let folder =
        tempfile::Builder::new().prefix("tollgate-demo-").tempdir().context("cannot create a temporary folder")?;
    let text = format!(
        "[server]\nlisten = [\"{listen}\"]\n[admin]\nlisten = \"{admin}\"\n[log]\naccess = \"off\"\nlevel = \"warn\"\n\
         [[upstream]]\nname = \"demo\"\nservers = [\"{backend_address}\"]\n"
    );
    let settings = config::parse(&text, &folder.path().join("demo.toml"), Probe::Settings)
        .map_err(|problems| anyhow!(assembly::report(&problems)))?;
    let token = new_token()?;
    let record = TokenRecord {
        scopes: vec!["api".into()],
        description: "created by tollgate demo".into(),
        created: edge::now().unix_ms / 1000,
        ..TokenRecord::new(Digest::of(token.as_bytes()), "demo")
    };
    super::block_on(async {
        super::token::admin(&settings, None).await?.create(&record).await?;
        Ok(())
    })?;
    let running = assembly::assemble(settings, None)?;

    let url = format!("http://{listen}/api/v3");
    println!("tollgate listens on http://{listen}, with a demo backend. Press Ctrl-C to stop. Try:\n");
    println!("  a token in the header");
    println!("    curl -i -H 'PRIVATE-TOKEN: {token}' {url}/user\n");
    println!("  a token in the query, which is removed before the request is forwarded");
    println!("    curl -i '{url}/projects/group%2Fproject-7?private_token={token}'\n");
    println!("  no token: 401, and nothing is forwarded");
    println!("    curl -i {url}/projects\n");
    println!("  per_page above the limit: the backend gets per_page=100");
    println!("    curl -sD- -o /dev/null -H 'PRIVATE-TOKEN: {token}' '{url}/projects?per_page=1000'\n");
    println!("  create an issue");
    println!("    curl -i -H 'PRIVATE-TOKEN: {token}' -d title=Hello {url}/projects/1/issues\n");
    println!("  what goes on, as a page for a browser, and metrics");
    println!("    http://{admin}/");
    println!("    curl -s http://{admin}/metrics\n");
    edge::serve(running)?;
    println!("\nstopped");
    Ok(())
}

/// A minimal backend with an API like GitLab's, one thread per connection.
fn serve(listener: &TcpListener) {
    let issues = Arc::new(Mutex::new(Vec::new()));
    for socket in listener.incoming().flatten() {
        let issues = Arc::clone(&issues);
        std::thread::spawn(move || {
            // A connection that breaks ends its thread, and the demo goes on.
            let _ = serve_connection(socket, &issues);
        });
    }
}

fn serve_connection(mut socket: TcpStream, issues: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut buffer = Vec::new();
    loop {
        let end = loop {
            if let Some(end) = head::end_of_head(&buffer, 0) {
                break end;
            }
            if read_more(&mut socket, &mut buffer)? == 0 {
                return Ok(());
            }
        };
        let head_bytes: Vec<u8> = buffer.drain(..end).collect();
        let Ok(view) = head::parse(&head_bytes) else { return Ok(()) };
        let length = match view.body {
            Framing::Length(length) => usize::try_from(length).unwrap_or(0),
            Framing::Empty => 0,
            // Not supported: curl sends forms with Content-Length.
            Framing::Chunked => return Ok(()),
        };
        while buffer.len() < length {
            if read_more(&mut socket, &mut buffer)? == 0 {
                return Ok(());
            }
        }
        let body: Vec<u8> = buffer.drain(..length).collect();
        let (status, headers, json) = answer(view.method, view.path(), view.query().unwrap_or_default(), &body, issues);
        let text = if view.method == Method::Head { "" } else { &json };
        let length = json.len();
        let head =
            format!("HTTP/1.1 {status}\r\nContent-Type: application/json\r\n{headers}Content-Length: {length}\r\n\r\n");
        socket.write_all((head + text).as_bytes())?;
    }
}

fn read_more(socket: &mut TcpStream, buffer: &mut Vec<u8>) -> std::io::Result<usize> {
    let mut piece = [0; 4096];
    let n = socket.read(&mut piece)?;
    buffer.extend_from_slice(&piece[..n]);
    Ok(n)
}

fn answer(
    method: Method,
    path: &[u8],
    query: &[u8],
    body: &[u8],
    issues: &Mutex<Vec<String>>,
) -> (&'static str, String, String) {
    let path = String::from_utf8_lossy(path).into_owned();
    let none = String::new;
    let missing = || ("404 Not Found", none(), "{\"message\":\"404 Not Found\"}".to_owned());
    let segments: Vec<&str> = path.trim_start_matches("/api/v3/").split('/').collect();
    match (method, segments.as_slice()) {
        (Method::Get | Method::Head, ["user"]) => ("200 OK", none(), "{\"id\":1,\"username\":\"demo\"}".into()),
        (Method::Get | Method::Head, ["projects"]) => {
            let page = parameter(query, "page").and_then(|v| v.parse().ok()).unwrap_or(1_usize).max(1);
            let per_page = parameter(query, "per_page").and_then(|v| v.parse().ok()).unwrap_or(20_usize).max(1);
            let first = (page - 1).saturating_mul(per_page) + 1;
            let list: Vec<String> =
                (first..first.saturating_add(per_page)).take_while(|id| *id <= PROJECTS).map(project).collect();
            let headers = format!("X-Page: {page}\r\nX-Per-Page: {per_page}\r\nX-Total: {PROJECTS}\r\n");
            ("200 OK", headers, format!("[{}]", list.join(",")))
        }
        (Method::Get | Method::Head, ["projects", id]) => {
            let name = form_decode(id.as_bytes());
            let name = String::from_utf8_lossy(&name);
            let id = name.strip_prefix("group/project-").unwrap_or(&name).parse().ok();
            match id.filter(|id| (1..=PROJECTS).contains(id)) {
                Some(id) => ("200 OK", none(), project(id)),
                None => missing(),
            }
        }
        (Method::Post, ["projects", _, "issues"]) => match parameter(body, "title") {
            Some(title) => {
                let mut issues = issues.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                issues.push(title.clone());
                let issue = serde_json::json!({ "id": issues.len(), "title": title, "state": "opened" });
                ("201 Created", none(), issue.to_string())
            }
            None => ("400 Bad Request", none(), "{\"message\":\"400 (Bad request) \\\"title\\\" not given\"}".into()),
        },
        (Method::Get | Method::Head, ["projects", _, "issues"]) => {
            let issues = issues.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let list: Vec<_> = issues
                .iter()
                .enumerate()
                .map(|(i, title)| serde_json::json!({ "id": i + 1, "title": title }))
                .collect();
            ("200 OK", none(), serde_json::Value::from(list).to_string())
        }
        _ => missing(),
    }
}

fn project(id: usize) -> String {
    format!("{{\"id\":{id},\"path_with_namespace\":\"group/project-{id}\"}}")
}

/// The decoded value of a form parameter.
fn parameter(form: &[u8], name: &str) -> Option<String> {
    form.split(|b| *b == b'&').find_map(|pair| {
        let value = pair.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
        Some(String::from_utf8_lossy(&form_decode(value)).into_owned())
    })
}
