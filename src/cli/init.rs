//! `tollgate init`: writes a first configuration, from options or from questions on a terminal. What it writes is checked as
//! any other; it must not know more about settings than which few of them come first.

use super::Failure;
use super::cert;
use crate::config::{self, Probe};
use crate::edge::{AddressInUse, PassedSockets};
use crate::problem::Problem;
use anyhow::Context as _;
use std::fs::Permissions;
use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

#[derive(clap::Args)]
pub(super) struct InitArguments {
    /// Where the backend is: http://127.0.0.1:3000, https://api.internal, 127.0.0.1:3000 or unix:/path. A path behind it is
    /// taken for --prefix. Without this option, questions are asked on the terminal
    #[arg(long, value_name = "URL")]
    backend: Option<String>,
    /// Who keeps the tokens: sqlite (tollgate itself), introspection (the backend), file, or a server as postgres=URL or
    /// redis=ADDRESS
    #[arg(long, value_name = "KIND", default_value = "sqlite")]
    store: String,
    /// TLS of the listener: none, self-signed (makes a certificate to try it with), or the PEM files as CERTIFICATE,KEY
    #[arg(long, value_name = "TLS", default_value = "none")]
    tls: String,
    /// The path that the API is under (default: the path of the backend's URL, else /api/v3)
    #[arg(long, value_name = "PATH")]
    prefix: Option<String>,
    /// The address to listen on
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    listen: String,
    /// The address of the operator's page, metrics and reloads: like 127.0.0.1:9090, unix:/run/tollgate/admin.sock, or none
    #[arg(long, value_name = "ADDRESS", default_value = ADMIN)]
    admin: String,
    /// The file to write
    #[arg(long, short, value_name = "FILE", default_value = "./tollgate.toml")]
    output: PathBuf,
    /// Replace the file if it exists
    #[arg(long)]
    force: bool,
}

const ADMIN: &str = "127.0.0.1:9090";

/// Where requests go.
#[derive(Debug, PartialEq, Eq)]
struct BackendChoice {
    /// As in `servers`.
    server: String,
    tls: bool,
    /// The path of the URL, if it has one.
    prefix: Option<String>,
}

#[derive(Debug, PartialEq, Eq)]
enum StoreChoice {
    Sqlite,
    Introspection,
    File,
    Postgres(String),
    Redis(String),
}

#[derive(Debug, PartialEq, Eq)]
enum TlsChoice {
    Plain,
    SelfSigned,
    Files(PathBuf, PathBuf),
}

const DEFAULT_PREFIX: &str = "/api/v3";

fn parse_backend(text: &str) -> Result<BackendChoice, String> {
    let wrong = |why: &str| format!("\"{text}\" {why}; write it like http://127.0.0.1:3000");
    if text.starts_with("unix:/") {
        return Ok(BackendChoice { server: text.into(), tls: false, prefix: None });
    }
    let (tls, rest) = match text.split_once("://") {
        Some(("http", rest)) => (false, rest),
        Some(("https", rest)) => (true, rest),
        Some(_) => return Err(wrong("is neither http nor https")),
        None => (false, text),
    };
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    if authority.is_empty() || path.contains(['?', '#']) || authority.contains(['@', '"', '\\', ' ']) {
        return Err(wrong("is not the address of a backend"));
    }
    let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let server = match has_port {
        true => authority.to_owned(),
        false if text.contains("://") => format!("{authority}:{}", if tls { 443 } else { 80 }),
        false => return Err(wrong("has no port")),
    };
    let path = path.trim_end_matches('/');
    Ok(BackendChoice { server, tls, prefix: (!path.is_empty()).then(|| format!("/{path}")) })
}

fn parse_store(text: &str) -> Result<StoreChoice, String> {
    match text.split_once('=').unwrap_or((text, "")) {
        ("sqlite", "") => Ok(StoreChoice::Sqlite),
        ("introspection", "") => Ok(StoreChoice::Introspection),
        ("file", "") => Ok(StoreChoice::File),
        ("postgres", "") => Err("postgres needs an address: write postgres=postgres://USER@HOST/DATABASE".into()),
        ("postgres", url) => Ok(StoreChoice::Postgres(url.into())),
        ("redis", "") => Ok(StoreChoice::Redis("127.0.0.1:6379".into())),
        ("redis", address) => Ok(StoreChoice::Redis(address.into())),
        _ => Err(format!("\"{text}\": use one of: sqlite, introspection, file, postgres=URL, redis=ADDRESS")),
    }
}

fn parse_tls(text: &str) -> Result<TlsChoice, String> {
    match (text, text.split_once(',')) {
        ("none", _) => Ok(TlsChoice::Plain),
        ("self-signed", _) => Ok(TlsChoice::SelfSigned),
        (_, Some((certificate, key))) if !certificate.is_empty() && !key.is_empty() => {
            Ok(TlsChoice::Files(certificate.into(), key.into()))
        }
        _ => Err(format!("\"{text}\": use one of: none, self-signed, CERTIFICATE,KEY")),
    }
}

/// What the file says.
struct Choices {
    backend: BackendChoice,
    store: StoreChoice,
    tls: TlsChoice,
    prefix: String,
    listen: String,
    admin: String,
}

pub(super) fn run(arguments: InitArguments) -> Result<(), Failure> {
    let output = &arguments.output;
    if !arguments.force && std::fs::symlink_metadata(output).is_ok() {
        let why = format!("{} exists, and is not replaced without --force", output.display());
        return Err(anyhow::Error::msg(why).into());
    }
    let choices = match &arguments.backend {
        Some(backend) => by_options(&arguments, backend)?,
        None if std::io::stdin().is_terminal() && std::io::stderr().is_terminal() => by_questions(&arguments)?,
        None => {
            return Err(Failure::Usage("--backend is missing, and there is no terminal to ask on".into()));
        }
    };
    let folder = output.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // What `check` would refuse is never written, nor is a certificate for it.
    let checked = |text: &str| {
        config::parse(text, output, Probe::Settings)
            .map_err(|problems| Failure::Usage(format!("nothing was written\n{}", super::report(&problems))))
    };
    if choices.tls == TlsChoice::SelfSigned {
        checked(&text(&choices, None))?;
    }
    let (tls, made) = match &choices.tls {
        TlsChoice::Plain => (None, Vec::new()),
        TlsChoice::SelfSigned => {
            let pair = cert::self_signed(folder)?;
            let name = |path: &Path| path.file_name().map(PathBuf::from).unwrap_or_default();
            (Some((name(&pair.0), name(&pair.1))), vec![pair.0, pair.1])
        }
        TlsChoice::Files(certificate, key) => {
            let absolute = |path: &Path| std::path::absolute(path).with_context(|| path.display().to_string());
            (Some((absolute(certificate)?, absolute(key)?)), Vec::new())
        }
    };
    let text = text(&choices, tls.as_ref());
    let settings = checked(&text)?;
    if choices.store == StoreChoice::File {
        make_token_file(&folder.join("tokens.toml"))?;
    }
    // As any other file of this user, but for one with a password. The umask takes away from both.
    let mode = Permissions::from_mode(if has_password(&choices.store) { 0o600 } else { 0o644 });
    let file = tempfile::Builder::new().permissions(mode).tempfile_in(folder);
    let file = file.with_context(|| folder.display().to_string())?;
    file.as_file().write_all(text.as_bytes()).with_context(|| output.display().to_string())?;
    // Never in place of one that somebody made meanwhile.
    let placed = if arguments.force { file.persist(output) } else { file.persist_noclobber(output) };
    placed.map_err(|error| anyhow::anyhow!("{}: {}", output.display(), error.error))?;
    say!("wrote {}", output.display())?;
    for path in made {
        say!("wrote {}", path.display())?;
    }
    settings.warnings.iter().for_each(|warning| eprintln!("{warning}"));
    for Problem { key, what, instead, .. } in settings.server.unbound(AddressInUse::Error, &PassedSockets::default()) {
        let option = if key.starts_with("admin") { "--admin" } else { "--listen" };
        eprintln!("note: {what}; {instead}: --force with another {option} writes the file again");
    }
    if let Some(why) = unreachable_now(&choices.backend.server) {
        eprintln!("note: the backend does not answer yet: {why}");
    }
    next_steps(&choices, output)
}

/// Whether the file would tell a secret to whoever can read it.
fn has_password(store: &StoreChoice) -> bool {
    let StoreChoice::Postgres(url) = store else { return false };
    let user = url.split_once("://").and_then(|(_, rest)| rest.split('/').next()?.rsplit_once('@'));
    user.is_some_and(|(user, _)| user.contains(':')) || url.contains("password=")
}

/// The gateway reads the file, and does not start without it.
fn make_token_file(path: &Path) -> anyhow::Result<()> {
    let made = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    match made {
        Ok(mut file) => file
            .write_all(b"# Tokens that tollgate knows, by their SHA-256.\n")
            .with_context(|| path.display().to_string()),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

fn by_options(arguments: &InitArguments, backend: &str) -> Result<Choices, Failure> {
    let usage = |option: &'static str| move |why: String| Failure::Usage(format!("{option}: {why}"));
    let backend = parse_backend(backend).map_err(usage("--backend"))?;
    let store = parse_store(&arguments.store).map_err(usage("--store"))?;
    plain_tokens(&backend, &store).map_err(Failure::Usage)?;
    let prefix = arguments.prefix.clone().or_else(|| backend.prefix.clone());
    Ok(Choices {
        prefix: prefix.unwrap_or_else(|| DEFAULT_PREFIX.into()),
        backend,
        store,
        tls: parse_tls(&arguments.tls).map_err(usage("--tls"))?,
        listen: arguments.listen.clone(),
        admin: arguments.admin.clone(),
    })
}

/// Tokens must not be sent to another machine in plain text by a default.
fn plain_tokens(backend: &BackendChoice, store: &StoreChoice) -> Result<(), String> {
    let host = backend.server.rsplit_once(':').map_or(backend.server.as_str(), |(host, _)| host);
    let is_local = host == "localhost"
        || host.starts_with("unix")
        || host.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
    match store {
        StoreChoice::Introspection if !backend.tls && !is_local => Err(format!(
            "with introspection every token goes to {host}, over http in plain text: use https, or another store"
        )),
        _ => Ok(()),
    }
}

fn by_questions(arguments: &InitArguments) -> Result<Choices, Failure> {
    eprintln!("tollgate stands in front of a backend, and forwards no request without a valid token.\n");
    let backend = asked("Where is the backend?", "http://127.0.0.1:3000", parse_backend)?;
    let stores = "Who keeps the tokens? sqlite: tollgate itself; introspection: the backend, which is asked; or file, \
                  postgres=URL, redis=ADDRESS";
    let store = asked(stores, &arguments.store, |text| {
        let store = parse_store(text)?;
        plain_tokens(&backend, &store).map(|()| store)
    })?;
    let default = arguments.prefix.clone().or_else(|| backend.prefix.clone()).unwrap_or_else(|| DEFAULT_PREFIX.into());
    let prefix = asked("Which path is the API under?", &default, |text| match text.starts_with('/') {
        true => Ok(text.to_owned()),
        false => Err(format!("\"{text}\" does not begin with /")),
    })?;
    let tls = "TLS towards clients? none, self-signed (to try it), or CERTIFICATE,KEY as PEM files";
    let tls = asked(tls, &arguments.tls, parse_tls)?;
    let admin = "Where is the operator's page, for this machine alone? An address, unix:/path, or none";
    let admin = asked(admin, &free_admin(&arguments.admin), |text| {
        let is_one = text == "none" || text.starts_with("unix:/") || text.parse::<SocketAddr>().is_ok();
        if is_one { Ok(text.to_owned()) } else { Err(format!("\"{text}\": write it like {ADMIN}")) }
    })?;
    Ok(Choices { backend, store, tls, prefix, listen: arguments.listen.clone(), admin })
}

/// The address itself, or with one of the next ports if another process has that one now: the default of a question must be
/// one that can be taken.
fn free_admin(address: &str) -> String {
    let Ok(first) = address.parse::<SocketAddr>() else { return address.into() };
    let in_use = |address: &SocketAddr| {
        TcpListener::bind(address).is_err_and(|error| error.kind() == std::io::ErrorKind::AddrInUse)
    };
    let ports = (first.port()..=u16::MAX).take(100).map(|port| SocketAddr::new(first.ip(), port));
    ports.into_iter().find(|address| !in_use(address)).unwrap_or(first).to_string()
}

/// Asks until the answer can be used. An empty one is the default.
fn asked<T>(question: &str, default: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<T, Failure> {
    loop {
        eprint!("{question} [{default}] ");
        let mut line = String::new();
        if std::io::stdin().lock().read_line(&mut line).context("standard input")? == 0 {
            return Err(Failure::Usage("\nno answer: nothing was written".into()));
        }
        let answer = Some(line.trim()).filter(|answer| !answer.is_empty()).unwrap_or(default);
        match parse(answer) {
            Ok(value) => return Ok(value),
            Err(why) => eprintln!("{why}"),
        }
    }
}

/// A string of TOML.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

fn text(choices: &Choices, tls: Option<&(PathBuf, PathBuf)>) -> String {
    let Choices { backend, store, prefix, listen, admin, .. } = choices;
    let mut out = String::from(
        "# Made by `tollgate init`. `tollgate check` says what is wrong with it, and `tollgate example-config` prints every\n\
         # other key with its default.\n\n",
    );
    match tls {
        None => {
            out += "[server]\n# \"0.0.0.0:8080\" is reached from other machines, where tokens would travel in plain text.\n";
            out += &format!("listen = [{}]\n", quoted(listen));
        }
        Some((certificate, key)) => {
            out += "[[listener]]\n# \"[::]:443\" is reached from everywhere.\n";
            out += &format!("address = {}\n", quoted(listen));
            out += "# Taken again when the files change.\n";
            out += &format!(
                "certificates = [{{ chain = {}, key = {} }}]\n",
                quoted(&certificate.to_string_lossy()),
                quoted(&key.to_string_lossy())
            );
        }
    }
    out += "\n# The operator's page, metrics at /metrics, and what `tollgate reload` talks to. Whoever reaches this address may change things.\n";
    out += &format!("[admin]\nlisten = {}\n\n[[upstream]]\nname = \"api\"\n", quoted(admin));
    out += &format!("servers = [{}]\n", quoted(&backend.server));
    if backend.tls {
        out += "# Its certificate is verified by the authorities that this system trusts.\ntls = true\n";
    }
    out += &format!("\n[api]\n# Everything else is 404.\nprefixes = [{}]\n\n", quoted(prefix));
    out += match store {
        StoreChoice::Introspection => {
            "[[store]]\n# Asks the backend who a token belongs to: GET PREFIX/user, once for each token; the answer is kept.\n\
             kind = \"introspection\"\n"
        }
        StoreChoice::Sqlite => {
            "[[store]]\n# Made on first use. Only digests of tokens are in it.\nkind = \"sqlite\"\npath = \"tollgate.db\"\n"
        }
        StoreChoice::File => {
            "[[store]]\n# `tollgate token` writes to it, and so may people. Only digests of tokens are in it.\n\
             kind = \"file\"\npath = \"tokens.toml\"\n"
        }
        StoreChoice::Postgres(_) => "[[store]]\n# `tollgate store migrate` makes its tables.\nkind = \"postgres\"\n",
        StoreChoice::Redis(_) => "[[store]]\nkind = \"redis\"\n",
    };
    match store {
        StoreChoice::Introspection => {
            let endpoint = if backend.tls { format!("https://{}{prefix}/user", backend.server) } else { String::new() };
            if backend.tls {
                out += &format!("endpoint = {}\n", quoted(&endpoint));
            }
            out +=
                "\n[cache]\n# How long a token that the backend revoked may still work here.\npositive_ttl = \"60s\"\n";
        }
        StoreChoice::Postgres(url) => {
            out += "# A password belongs into a file: password_file = \"…\", or url = \"${DATABASE_URL}\".\n";
            out += &format!("url = {}\n", quoted(url));
        }
        StoreChoice::Redis(address) => {
            out += "# password_file = \"…\"\n";
            out += &format!("servers = [{}]\n", quoted(address));
        }
        StoreChoice::Sqlite | StoreChoice::File => {}
    }
    if *store != StoreChoice::Introspection {
        out += "\n[token]\n# The backend does not know these tokens. It gets the user in X-Tollgate-User, and must be reached through\n\
                # tollgate only. \"token\" forwards the token itself, in PRIVATE-TOKEN.\nforward = \"identity\"\n";
    }
    out += "\n[log]\n# A line of JSON for each request, which `tollgate explain --why ID` reads; or \"stdout\", \"off\", …\naccess = \"access.log\"\n";
    out
}

/// Why nobody answers at the backend's address, if that can be told at once.
fn unreachable_now(server: &str) -> Option<String> {
    if server.starts_with("unix:") {
        return None;
    }
    let address = match server.to_socket_addrs() {
        Ok(mut all) => all.next()?,
        Err(error) => return Some(format!("{server}: {error}")),
    };
    TcpStream::connect_timeout(&address, Duration::from_millis(500)).err().map(|error| format!("{server}: {error}"))
}

fn next_steps(choices: &Choices, output: &Path) -> Result<(), Failure> {
    let is_found = [Path::new("./tollgate.toml"), Path::new("tollgate.toml")].contains(&output);
    let option = match config::distrusted(output) {
        None if is_found => String::new(),
        _ => format!(" -c {}", output.display()),
    };
    let (scheme, trust) = match choices.tls {
        TlsChoice::Plain => ("http", ""),
        TlsChoice::SelfSigned => ("https", "-k "),
        TlsChoice::Files(..) => ("https", ""),
    };
    say!("\nNext:")?;
    if matches!(choices.store, StoreChoice::Postgres(_)) {
        say!("  tollgate store migrate{option}")?;
    }
    let token = match choices.store {
        StoreChoice::Introspection => {
            say!("  TOKEN=…                                # one that the backend knows")?;
            "$TOKEN"
        }
        _ => {
            say!("  TOKEN=$(tollgate token create{option} --user alice)")?;
            "$TOKEN"
        }
    };
    say!("  tollgate run{option} &")?;
    let path = if choices.store == StoreChoice::Introspection { "/user" } else { "/" };
    let prefix = choices.prefix.trim_end_matches('/');
    let (socket, host) = match choices.listen.strip_prefix("unix:") {
        Some(socket) => (format!("--unix-socket {socket} "), "localhost"),
        None => (String::new(), choices.listen.as_str()),
    };
    say!("  curl {trust}{socket}-i -H \"PRIVATE-TOKEN: {token}\" {scheme}://{host}{prefix}{path}")?;
    if choices.store != StoreChoice::Introspection {
        say!(
            "\nThe backend gets no token. A 401 with a valid one is the backend's own: it must act for the user in X-Tollgate-User."
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_is_an_address_with_or_without_a_path() {
        let parsed = |text: &str| parse_backend(text).map(|backend| (backend.server, backend.tls, backend.prefix));
        for (text, server, tls, prefix) in [
            ("http://127.0.0.1:3000", "127.0.0.1:3000", false, None),
            ("http://127.0.0.1:3000/", "127.0.0.1:3000", false, None),
            ("https://api.test", "api.test:443", true, None),
            ("http://api.test/api/v4/", "api.test:80", false, Some("/api/v4")),
            ("[::1]:3000", "[::1]:3000", false, None),
            ("http://[::1]", "[::1]:80", false, None),
            ("unix:/run/api.sock", "unix:/run/api.sock", false, None),
        ] {
            assert_eq!(parsed(text), Ok((server.into(), tls, prefix.map(str::to_owned))), "{text}");
        }
        for text in ["", "localhost", "ftp://a:1", "http://", "http://u:p@a", "http://a/?x", "a b:1", "a\"b:1"] {
            assert!(parsed(text).is_err(), "{text}");
        }
        assert!(plain_tokens(&parse_backend("http://10.0.0.1:80").unwrap(), &StoreChoice::Introspection).is_err());
        assert!(plain_tokens(&parse_backend("http://[::1]:80").unwrap(), &StoreChoice::Introspection).is_ok());
        assert!(plain_tokens(&parse_backend("http://10.0.0.1:80").unwrap(), &StoreChoice::Sqlite).is_ok());
    }
}
