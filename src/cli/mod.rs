//! The command line. Exit codes: 0 done, 1 failed, 2 done but for what takes a restart, 64 bad configuration or usage.
#![allow(clippy::print_stdout, reason = "this is what a command line is for")]

/// Prints a line. Who reads may have seen enough (`| head`): that is no error, and ends no command half-way.
macro_rules! say {
    ($($line:tt)*) => { $crate::cli::print_line(format_args!($($line)*)) };
}

mod cert;
mod check;
mod configuration;
mod curl;
mod demo;
mod explain;
mod guessing;
mod init;
mod progress;
mod reference;
mod reload;
mod routes;
mod run;
mod server;
mod status;
mod store;
mod token;
mod upgrade;
mod why;

#[doc(hidden)]
pub use curl::{CurlRequest, request as curl_request};

pub use reference::markdown;

use crate::config::{self, Diagnostic, Expansions, Probe, Settings};
use clap::{FromArgMatches as _, Parser, Subcommand};
use configuration::ConfigOption;
use std::io::Write as _;
use std::process::ExitCode;
use std::sync::OnceLock;

/// An authenticating gateway for token-authenticated REST APIs in GitLab's style.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(flatten)]
    config: ConfigOption,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the gateway
    Run,
    /// Run a gateway with a small backend and a token of its own, to try tollgate without a configuration file.
    Demo {
        /// The gateway's address. The backend and the admin listener take free ports.
        #[arg(long, default_value = "127.0.0.1:8080", value_name = "ADDRESS")]
        listen: std::net::SocketAddr,
    },
    /// Write a first configuration, from options or from questions on the terminal
    ///
    /// Exit codes: 0 written, 1 the file exists or cannot be written, 64 an option that cannot be used.
    Init(init::InitArguments),
    /// Check a configuration file and everything it names, and list what can be reached without a token.
    ///
    /// Finds what would keep `tollgate run` or a reload from succeeding. Run it as the user that the gateway runs as.
    /// Exit codes: 0 no errors (there may be warnings), 64 errors.
    Check(check::CheckArguments),
    /// Reload the configuration of a running gateway, and show which changes are in force.
    ///
    /// Exit codes: 0 all changes are in force, 2 some need a restart, 1 nothing changed.
    Reload(reload::AdminTarget),
    /// Replace a running gateway by the binary as it is on disk now, without losing a connection or a request.
    ///
    /// The running gateway starts its binary again with the arguments that it was started with, and passes it the listening
    /// sockets. If the new process cannot start, nothing changes. Exit codes: 0 the new process serves, 1 nothing changed.
    Upgrade(reload::AdminTarget),
    /// Tell what would become of a request, and why: stage by stage, with the lines of the configuration
    ///
    /// The request is curl's arguments behind `--`, bytes, or a line of the access log. Without --running no gateway is asked and no
    /// store: --as says whose token it is.
    Explain(explain::ExplainArguments),
    /// List what can be reached and how: paths, methods, tokens, scopes, limits, upstreams
    Routes(routes::RoutesArguments),
    /// Show what a running gateway does: requests, refusals, latency, servers, stores, cache, limits, callers, reloads
    ///
    /// The same as the page on its admin listener.
    Status(reload::AdminTarget),
    /// Drain a server of a running gateway, or return it to service.
    Server {
        #[command(subcommand)]
        command: server::ServerCommand,
    },
    /// List the addresses that guess tokens at a running gateway, or let one send failed tokens again.
    Guessing {
        #[command(subcommand)]
        command: guessing::GuessingCommand,
    },
    /// Create, list, show, rotate, revoke, block and import tokens.
    Token {
        #[command(subcommand)]
        command: token::TokenCommand,
    },
    /// Make a certificate for trying TLS.
    Cert {
        #[command(subcommand)]
        command: cert::CertCommand,
    },
    /// Prepare a PostgreSQL store: make tollgate's tables, or install change triggers on other tables.
    Store {
        #[command(subcommand)]
        command: store::StoreCommand,
    },
    /// Print a configuration with every key, its default and its meaning
    ExampleConfig(ExampleArguments),
    /// Print a script that completes commands and options in a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the man page, or write those of all commands
    Man(reference::ManArguments),
}

#[derive(clap::Args)]
struct ExampleArguments {
    /// Print a JSON Schema in its place, for editors
    #[arg(long, conflicts_with = "markdown")]
    schema: bool,
    /// Print it as a page in Markdown
    #[arg(long)]
    markdown: bool,
}

impl ExampleArguments {
    fn text(&self) -> String {
        match (self.schema, self.markdown) {
            (true, _) => config::schema(),
            (_, true) => config::page(),
            _ => config::example(),
        }
    }
}

/// Why a command ended badly.
pub(crate) enum Failure {
    /// 64: nothing was tried.
    Usage(String),
    /// 64: the errors are printed already.
    Reported,
    /// 1.
    Failed(anyhow::Error),
    /// 2: what could be done was done and said.
    Restart,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Usage(text) => f.write_str(text),
            Self::Failed(error) => write!(f, "{error:#}"),
            Self::Reported | Self::Restart => Ok(()),
        }
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

const USAGE: u8 = 64;
const RESTART: u8 = 2;

impl Command {
    const fn reads_configuration(&self) -> bool {
        !matches!(
            self,
            Self::Demo { .. }
                | Self::Init(_)
                | Self::Cert { .. }
                | Self::ExampleConfig(_)
                | Self::Completions { .. }
                | Self::Man(_)
        )
    }
}

pub fn main() -> ExitCode {
    let parsed = reference::command_line().try_get_matches().and_then(|matches| {
        let json = wants_json(&matches);
        Ok((Cli::from_arg_matches(&matches)?, json))
    });
    let (cli, json) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => {
            // Help and version are no errors.
            if !error.use_stderr() {
                // Whoever reads may be gone.
                let _: std::io::Result<()> = error.print();
                return ExitCode::SUCCESS;
            }
            if std::env::args_os().any(|argument| argument == "--json") {
                let text = error.to_string();
                say_error("", text.trim().trim_start_matches("error: "), USAGE, true);
            } else {
                let _: std::io::Result<()> = error.print();
            }
            return ExitCode::from(USAGE);
        }
    };
    let reads = cli.command.reads_configuration();
    // What is on the command line needs no note.
    let is_named = matches!(&cli.command, Command::Check(arguments) if arguments.names_file());
    if !reads && cli.config.is_given() {
        let text = "this command reads no configuration: leave out --config";
        say_error(text, text, USAGE, json);
        return ExitCode::from(USAGE);
    }
    let result = match cli.command {
        Command::Run => run::run(&cli.config),
        Command::Demo { listen } => demo::run(listen),
        Command::Init(arguments) => init::run(arguments),
        Command::Check(arguments) => check::run(&arguments),
        Command::Reload(arguments) => reload::run(&arguments),
        Command::Explain(arguments) => explain::run(&arguments),
        Command::Routes(arguments) => routes::run(&arguments),
        Command::Upgrade(arguments) => upgrade::run(&arguments),
        Command::Status(arguments) => status::run(&arguments),
        Command::Server { command } => server::run(&command),
        Command::Guessing { command } => guessing::run(&command),
        Command::Token { command } => block_on(token::run(command)),
        Command::Cert { command } => cert::run(&command),
        Command::Store { command } => block_on(store::run(command)),
        Command::Completions { shell } => reference::completions(shell),
        Command::Man(arguments) => reference::man(&arguments),
        Command::ExampleConfig(arguments) => say!("{}", arguments.text().trim_end()).map_err(Failure::from),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(text)) => {
            say_error(&text, &text, USAGE, json);
            if reads && !is_named && !json {
                cli.config.note_source(&text);
            }
            ExitCode::from(USAGE)
        }
        Err(Failure::Reported) => ExitCode::from(USAGE),
        Err(Failure::Restart) => ExitCode::from(RESTART),
        Err(Failure::Failed(error)) => {
            let text = format!("{error:#}");
            say_error(&format!("tollgate: {text}"), &text, 1, json);
            if reads && !is_named && !json {
                cli.config.note_source(&text);
            }
            ExitCode::FAILURE
        }
    }
}

/// Whether the command, the last of those that are nested, was asked for JSON.
fn wants_json(matches: &clap::ArgMatches) -> bool {
    match matches.subcommand() {
        Some((_, inner)) => wants_json(inner),
        None => matches.try_get_one::<bool>("json").ok().flatten().is_some_and(|json| *json),
    }
}

/// What stood for names in the configuration that this command reads: no error has it.
static EXPANSIONS: OnceLock<Expansions> = OnceLock::new();

fn hidden(text: &str) -> String {
    EXPANSIONS.get().map_or_else(|| text.to_owned(), |expansions| expansions.hide(text))
}

/// An error for people, or the same for programs.
fn say_error(shown: &str, text: &str, code: u8, json: bool) {
    if json {
        eprintln!("{}", serde_json::json!({ "error": hidden(text), "exit_code": code }));
    } else {
        eprintln!("{}", hidden(shown));
    }
}

fn print_line(line: std::fmt::Arguments<'_>) -> std::io::Result<()> {
    writeln!(std::io::stdout().lock(), "{line}").or_else(|error| match error.kind() {
        std::io::ErrorKind::BrokenPipe => Ok(()),
        _ => Err(std::io::Error::new(error.kind(), format!("standard output: {error}"))),
    })
}

/// Runs a command that talks to a store.
fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

/// Loads a configuration for a command that opens what it needs itself.
fn load(option: &ConfigOption) -> Result<Settings, Failure> {
    let loaded = config::load(&option.find()?.path, Probe::Settings);
    let settings = loaded.map_err(|found| Failure::Usage(report(&found)))?;
    EXPANSIONS.get_or_init(|| settings.expansions.clone());
    Ok(settings)
}

/// Everything that was found, one a line, and how much it is.
fn report(found: &[Diagnostic]) -> String {
    let count = |errors: bool, name: &str| match found.iter().filter(|found| found.is_error() == errors).count() {
        0 => None,
        1 => Some(format!("1 {name}")),
        many => Some(format!("{many} {name}s")),
    };
    let counts = [count(true, "error"), count(false, "warning")].into_iter().flatten().collect::<Vec<_>>().join(", ");
    found.iter().map(ToString::to_string).chain([counts]).collect::<Vec<_>>().join("\n")
}
