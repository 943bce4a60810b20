//! `tollgate explain`: what would become of a request, told stage by stage; by the configuration alone or by the running gateway.
//! It takes the request in the forms that people have at hand, and prints what `crate::explain` says. It judges nothing.

use super::reload::{AdminTarget, post_json};
use super::{Failure, block_on, curl, load, why};
use crate::config::Settings;
use crate::edge::{Listen, now};
use crate::explain::{
    ExplainQuestion, ExplainWorld, Explanation, ToldRule, ToldUpstream, WhatIf, Witness, explain as tell, known_scopes,
};
use crate::identity::{Invalid, TokenStatus};
use crate::request::head;
use crate::request::origin::{Arrival, TlsArrival};
use crate::{assembly, request};
use anyhow::Context as _;
use base64::Engine as _;
use std::io::{IsTerminal as _, Read as _};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

#[derive(clap::Args)]
pub(super) struct ExplainArguments {
    #[command(flatten)]
    target: AdminTarget,
    /// Ask the running gateway: its routes, its cache and its limits as they are now. It only looks
    #[arg(long)]
    running: bool,
    /// The request as bytes, head and body, from a file or standard input (`-`)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["curl", "log_line"])]
    raw: Option<PathBuf>,
    /// The request as a line of the access log, or `-` for standard input. What the line does not have is said
    #[arg(long, value_name = "LINE", conflicts_with = "curl")]
    log_line: Option<String>,
    /// Tell why a request ended as it did, by its id, from the access log
    #[arg(long, value_name = "REQUEST_ID", conflicts_with_all = ["curl", "raw", "log_line", "running"])]
    why: Option<String>,
    /// The access log to look in, or `-` for standard input: default, the configured file and those rotated beside it
    #[arg(long, value_name = "FILE", requires = "why")]
    log: Option<PathBuf>,
    /// The address that the request comes from
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    from: IpAddr,
    /// It comes over TLS. With curl's arguments, the URL says so
    #[arg(long)]
    tls: bool,
    /// Take its token to be a valid one of this user
    #[arg(long = "as", value_name = "USER")]
    assumed: Option<String>,
    /// The scopes of that token
    #[arg(long, value_name = "SCOPE", value_delimiter = ',', requires = "assumed")]
    scopes: Vec<String>,
    /// Ask the configured stores about the token
    #[arg(long, conflicts_with_all = ["assumed", "running", "admin"])]
    ask_store: bool,
    /// The request as arguments of curl
    #[arg(last = true, value_name = "CURL")]
    curl: Vec<String>,
}

/// A request, from whatever form it was given in.
struct Given {
    bytes: Vec<u8>,
    tls: bool,
    /// The port of its URL.
    port: Option<u16>,
    client: Option<IpAddr>,
    witness: Witness,
    /// What the form does not say.
    lacks: Vec<String>,
    /// What the log says of it, if it is a line of that.
    reason: Option<String>,
}

pub(super) fn run(arguments: &ExplainArguments) -> Result<(), Failure> {
    if let Some(id) = &arguments.why {
        return why::run(id, &arguments.target.config, arguments.log.as_deref(), arguments.target.json);
    }
    let given = given(arguments)?;
    let running = arguments.running || arguments.target.admin.is_some();
    let mut explanation = if running { asked(arguments, &given)? } else { offline(arguments, &given)? };
    if let Some(reason) = given.reason.filter(|reason| *reason != explanation.reason) {
        let why = "what the line lacks, another token or configuration, or something that happened behind the verdict";
        explanation.notes.push(format!("the line says `{reason}`, and this says `{}`: {why}", explanation.reason));
    }
    explanation.notes.extend(given.lacks);
    if arguments.target.json {
        let text = serde_json::to_string_pretty(&explanation).context("the explanation cannot be written as JSON")?;
        return Ok(say!("{text}")?);
    }
    Printer::new().print(&explanation)
}

fn given(arguments: &ExplainArguments) -> Result<Given, Failure> {
    let nothing = Given {
        bytes: Vec::new(),
        tls: arguments.tls,
        port: None,
        client: None,
        witness: Witness::Cache,
        lacks: Vec::new(),
        reason: None,
    };
    let mut given = match (&arguments.raw, &arguments.log_line, arguments.curl.as_slice()) {
        (Some(path), ..) => {
            let bytes = read(path)?;
            let mut lacks = Vec::new();
            if memchr::memchr(b'\r', &bytes).is_none() && memchr::memchr(b'\n', &bytes).is_some() {
                lacks.push("no line of it ends with CR LF, as HTTP has it: `sed 's/$/\\r/' FILE` writes them".into());
            }
            Given { bytes, lacks, ..nothing }
        }
        (None, Some(line), _) => {
            let line =
                if line == "-" { String::from_utf8_lossy(&read("-".as_ref())?).into_owned() } else { line.clone() };
            logged(&line, nothing)?
        }
        (None, None, [_, ..]) => {
            let request = curl::request(&arguments.curl).map_err(|why| Failure::Usage(format!("curl: {why}")))?;
            let port = Some(request.port);
            Given { bytes: request.bytes, tls: arguments.tls || request.https, port, ..nothing }
        }
        (None, None, []) => {
            let usage = "what is to be explained? Give curl's arguments behind `--`, --raw FILE, --log-line LINE or --why REQUEST_ID";
            return Err(Failure::Usage(usage.into()));
        }
    };
    if let Some(user) = &arguments.assumed {
        given.witness = Witness::Assumed { user: user.clone(), scopes: arguments.scopes.clone() };
    }
    Ok(given)
}

fn read(path: &std::path::Path) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    let read = match path.as_os_str() == "-" {
        true => std::io::stdin().lock().read_to_end(&mut bytes).map(drop),
        false => std::fs::read(path).map(|read| bytes = read),
    };
    read.with_context(|| format!("{} cannot be read", path.display()))?;
    Ok(bytes)
}

/// A request like the one of a log line. What the line does not have is left out, and said.
fn logged(line: &str, nothing: Given) -> Result<Given, Failure> {
    let not_a_line =
        || Failure::Usage("--log-line: not a line of the access log (a JSON object with `method` and `path`)".into());
    let line = why::object_in(line).ok_or_else(not_a_line)?;
    let text = |key: &str| line[key].as_str().map(str::to_owned);
    let (method, path) = text("method").zip(text("path")).ok_or_else(not_a_line)?;
    let mut lacks =
        vec!["a log line has no header fields, no Host and no body: the request was told without them".to_owned()];
    let query = text("query").map_or(String::new(), |query| format!("?{query}"));
    if format!("{path}{query}").contains("[redacted]") {
        lacks.push("parts of the target are [redacted] in the line, and stand so in what was judged".into());
    }
    let overridden = line["method_override"].as_bool() == Some(true);
    let (sent, field) = match overridden {
        true => ("POST", format!("{}: {method}\r\n", request::METHOD_OVERRIDE)),
        false => (method.as_str(), String::new()),
    };
    let mut witness = Witness::Cache;
    let mut token = "";
    if text("source").is_some_and(|source| source != "none") {
        token = "PRIVATE-TOKEN: token-of-the-log-line\r\n";
        lacks.push("the line has only the id of the token: another one stands in its place, in the header".into());
        let invalid = |why| Witness::Store(Ok(TokenStatus::Invalid(why)));
        witness = match (text("reason").as_deref(), text("user")) {
            (Some("unknown"), _) => invalid(Invalid::Unknown),
            (Some("expired"), _) => invalid(Invalid::Expired),
            (Some("revoked"), _) => invalid(Invalid::Revoked),
            (Some("blocked"), _) => invalid(Invalid::Blocked),
            (Some("not_yet_valid"), _) => invalid(Invalid::NotYetValid),
            (_, Some(user)) => {
                lacks.push(format!(
                    "the token is taken to be a valid one of {user}; the line has no scopes: see --as and --scopes"
                ));
                Witness::Assumed { user, scopes: Vec::new() }
            }
            (_, None) => Witness::Cache,
        };
    }
    let bytes =
        format!("{sent} {path}{query} HTTP/1.1\r\nHost: host-of-the-log-line\r\n{token}{field}\r\n").into_bytes();
    let client = text("client").and_then(|client| client.parse().ok());
    Ok(Given { bytes, client, witness, lacks, reason: text("reason"), ..nothing })
}

fn offline(arguments: &ExplainArguments, given: &Given) -> Result<Explanation, Failure> {
    let settings = load(&arguments.target.config)?;
    let pipeline = assembly::judging(&settings)?;
    let witness = match arguments.ask_store {
        true => block_on(ask_stores(&settings, &pipeline.rules, &given.bytes))?,
        false => match (&given.witness, &given.reason) {
            // The line does not say which scopes its token had: unless it was refused for them, they were enough.
            (Witness::Assumed { user, scopes }, Some(reason))
                if scopes.is_empty() && !matches!(reason.as_str(), "scope" | "sudo_scope") =>
            {
                Witness::Assumed { user: user.clone(), scopes: known_scopes(&pipeline) }
            }
            (witness, _) => witness.clone(),
        },
    };
    let upstreams = settings.upstreams.iter().map(|upstream| ToldUpstream {
        name: upstream.name.clone(),
        servers: upstream.servers.iter().map(|server| server.address.to_string()).collect(),
        http2: upstream.http2,
    });
    let world = ExplainWorld {
        pipeline: &pipeline,
        places: &settings.edge.places,
        upstreams: upstreams.collect(),
        running: false,
    };
    let (arrival, note) = arrival(arguments, given, &settings);
    let question = ExplainQuestion { bytes: &given.bytes, arrival, witness, now: now() };
    let mut explanation = tell(&world, &question);
    explanation.notes.extend(note);
    Ok(explanation)
}

/// How the request comes: by the listener with the port of its URL, if there is one.
fn arrival(arguments: &ExplainArguments, given: &Given, settings: &Settings) -> (Arrival, Option<String>) {
    let from = given.client.unwrap_or(arguments.from);
    let is_there = |address: &Listen| match (address, given.port) {
        (Listen::Tcp(text), Some(port)) => text.rsplit_once(':').is_some_and(|(_, own)| own == port.to_string()),
        _ => false,
    };
    let plain = Arrival::of(Some(from));
    match settings.server.listeners.iter().find(|listener| is_there(&listener.address)) {
        Some(listener) => {
            let hsts = listener.hsts.map(|time| format!("max-age={}", time.as_secs()));
            let tls = listener.tls.as_ref().map(|_| Arc::new(TlsArrival { hsts, subject: None }));
            (Arrival { redirect: listener.redirect, tls, ..plain }, None)
        }
        None => {
            let note = given
                .port
                .map(|port| format!("no listener has port {port}: taken to come by a proxy, or a mapping of ports"));
            (Arrival { tls: given.tls.then(|| Arc::new(TlsArrival::default())), ..plain }, note)
        }
    }
}

/// What the stores say of the request's token, if it has one.
async fn ask_stores(settings: &Settings, rules: &request::Rules, bytes: &[u8]) -> Result<Witness, Failure> {
    let end = head::end_of_head(bytes, 0).unwrap_or(bytes.len());
    let Ok(view) = head::parse(&bytes[..end]) else { return Ok(Witness::Cache) };
    let examined = request::examine(&view, rules);
    match examined.ok().and_then(|examined| examined.presented) {
        Some(presented) => Ok(Witness::Store(assembly::ask_stores(settings, &presented.value).await?)),
        None => Ok(Witness::Cache),
    }
}

/// Asks the running gateway.
fn asked(arguments: &ExplainArguments, given: &Given) -> Result<Explanation, Failure> {
    let mut call = serde_json::json!({
        "base64": base64::engine::general_purpose::STANDARD.encode(&given.bytes),
        "client": given.client.unwrap_or(arguments.from),
        "tls": given.tls,
    });
    match &given.witness {
        Witness::Assumed { user, scopes } => call["as"] = serde_json::json!({ "user": user, "scopes": scopes }),
        Witness::Cache | Witness::Store(_) => {}
    }
    let mut answer = post_json("/explain", Some(&call), &arguments.target)?;
    Ok(serde_json::from_value(answer["explanation"].take())
        .context("the gateway's answer is not known here: is it another version?")?)
}

/// Writes an explanation for people.
struct Printer {
    colour: bool,
}

impl Printer {
    fn new() -> Self {
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { colour: std::io::stdout().is_terminal() && !refused }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn print(&self, told: &Explanation) -> Result<(), Failure> {
        say!("{}", self.paint("1", &told.request))?;
        // What most people want to know comes first.
        say!("{}", self.verdict(told))?;
        if !told.means.is_empty() && told.verdict != "forward" {
            say!("  what it means: {}", told.means)?;
            say!("  what to do:    {}", told.advice)?;
        }
        say!("")?;
        for stage in &told.stages {
            let mark = match stage.outcome.as_str() {
                "passed" => self.paint("32", "ok"),
                "refused" => self.paint("1;31", "NO"),
                "unknown" => self.paint("33", "??"),
                _ => self.paint("2", "--"),
            };
            say!(
                "{mark} {:<9} {}",
                stage.stage,
                if stage.decided.is_empty() { "not reached" } else { &stage.decided }
            )?;
            stage.saw.iter().try_for_each(|saw| say!("             {saw}"))?;
            stage.rules.iter().try_for_each(|rule| say!("             {}", self.rule(rule)))?;
        }
        if let Some(answer) = &told.answer {
            say!("\nThe client gets:")?;
            self.quoted(answer)?;
        }
        if let Some(upstream) = &told.upstream {
            let when = if told.verdict == "forward" { "Goes to" } else { "A part goes to" };
            say!("\n{when} {} ({}):", upstream.upstream, upstream.servers.join(", "))?;
            self.quoted(&upstream.head)?;
            if upstream.body_bytes > 0 {
                let chunks = if upstream.chunked { ", in chunks" } else { "" };
                say!("  and {} bytes of body as they came{chunks}", upstream.body_bytes)?;
            }
            if upstream.http2 {
                say!("  (as fields of HTTP/2: this upstream has http = 2)")?;
            }
            if upstream.fields_dropped > 0 {
                say!("  {} header fields were left out for their name", upstream.fields_dropped)?;
            }
        }
        self.what_if(told)?;
        for note in &told.notes {
            say!("{}", self.paint("2", &format!("note: {note}")))?;
        }
        Ok(())
    }

    fn rule(&self, rule: &ToldRule) -> String {
        let value = if rule.value.is_empty() { String::new() } else { format!(" = {}", rule.value) };
        let place = rule.place.as_deref().unwrap_or("the default");
        format!("{}{value}  {}", self.paint("36", &rule.key), self.paint("2", place))
    }

    fn verdict(&self, told: &Explanation) -> String {
        let log = format!("in the log: reason `{}`, route `{}`", told.reason, told.route);
        let status = told.status.map_or(String::new(), |status| status.to_string());
        match told.verdict.as_str() {
            "forward" => format!("{}; {log}", self.paint("1;32", "Forwarded: the backend answers")),
            "refuse" => format!("{}; {log}", self.paint("1;31", &format!("Refused with {status}"))),
            "unknown" => format!("{} whether the token is valid", self.paint("1;33", "Not known:")),
            _ => format!("{} without the rest: {status}; {log}", self.paint("1;33", "Not whole:")),
        }
    }

    fn quoted(&self, head: &str) -> Result<(), Failure> {
        let lines = head.lines().filter(|line| !line.is_empty());
        Ok(lines.map(|line| self.paint("2", "  | ") + line).try_for_each(|line| say!("{line}"))?)
    }

    fn what_if(&self, told: &Explanation) -> Result<(), Failure> {
        if told.what_if.is_empty() {
            return Ok(());
        }
        say!("\nWhat would change it:")?;
        let cases = joined(&told.what_if);
        let width = cases.iter().map(|case| case.change.chars().count()).max().unwrap_or(0);
        for case in &cases {
            let upstream = case.upstream.as_ref().map_or(String::new(), |name| format!(" to {name}"));
            let result = match (case.verdict.as_str(), case.status) {
                ("forward", _) => self.paint("32", &format!("forwarded{upstream}")),
                (_, Some(status)) => self.paint("31", &format!("{status} {}", case.reason)),
                (verdict, None) => verdict.to_owned(),
            };
            let same = if case.same { self.paint("2", "  (the same)") } else { String::new() };
            say!("  {:<width$}  {result}{same}", case.change)?;
        }
        Ok(())
    }
}

/// Cases behind each other that differ by one word, and end in the same way, in one line.
fn joined(cases: &[WhatIf]) -> Vec<WhatIf> {
    let mut all: Vec<WhatIf> = Vec::new();
    for case in cases {
        let same_end = |last: &WhatIf| {
            (&last.verdict, last.status, &last.reason, &last.upstream)
                == (&case.verdict, case.status, &case.reason, &case.upstream)
        };
        // `with GET`, `with a valid token of scope api`: what is before the last word has to be the same, and what is behind it.
        let method = |text: &str| {
            let word = text.strip_prefix("with ")?.split(' ').next()?;
            word.bytes().all(|b| b.is_ascii_uppercase()).then(|| word.to_owned())
        };
        match (all.last_mut(), method(&case.change)) {
            (Some(last), Some(word))
                if same_end(last) && method(last.change.split(',').next().unwrap_or_default()).is_some() =>
            {
                let (methods, rest) = last.change.split_once(" and ").unwrap_or((&last.change, ""));
                let rest = if rest.is_empty() { String::new() } else { format!(" and {rest}") };
                last.change = format!("{methods}, {word}{rest}");
            }
            _ => all.push(case.clone()),
        }
    }
    all
}
