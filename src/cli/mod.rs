//! The command line. Exit codes: 0 done, 1 failed, 2 done but for what takes a restart, 64 bad configuration or usage.
#![allow(clippy::print_stdout, reason = "this is what a command line is for")]

/// Prints a line. Who reads may have seen enough (`| head`): that is no error, and ends no command half-way.
macro_rules! say {
    ($($line:tt)*) => { $crate::cli::print_line(format_args!($($line)*)) };
}

mod check;
mod demo;
mod reload;
mod run;
mod store;
mod token;

use clap::{Parser, Subcommand};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

/// An authenticating gateway for token-authenticated REST APIs in GitLab's style.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the gateway with a configuration file.
    Run {
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Show everything at work without a file or a backend: backend, token, gateway and metrics.
    Demo {
        /// Where the gateway listens; the backend and the admin listener take free ports.
        #[arg(long, default_value = "127.0.0.1:8080", value_name = "ADDRESS")]
        listen: std::net::SocketAddr,
    },
    /// Say everything that is wrong with a configuration file, and what can be reached without a token.
    Check {
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Have a running gateway reload its configuration, and say what is in force then.
    ///
    /// Exit codes: 0 all of it is, 2 all but what takes a restart, 1 nothing changed.
    Reload(reload::Arguments),
    /// Create, list, show, rotate, revoke, block and import tokens.
    Token {
        #[command(subcommand)]
        command: token::Command,
    },
    /// Make a store's tables, and what tells of changes in tables that are not tollgate's.
    Store {
        #[command(subcommand)]
        command: store::Command,
    },
    /// Print a configuration with every key, its default and its meaning.
    ExampleConfig,
}

/// Why a command ended badly.
pub(crate) enum Failure {
    /// 64: nothing was tried.
    Usage(String),
    /// 1.
    Failed(anyhow::Error),
    /// 2: what could be done was done and said.
    Restart,
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

const USAGE: u8 = 64;
const RESTART: u8 = 2;

pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors.
            let code = if error.use_stderr() { USAGE } else { 0 };
            drop(error.print());
            return ExitCode::from(code);
        }
    };
    let result = match cli.command {
        Command::Run { config } => run::run(&config),
        Command::Demo { listen } => demo::run(listen),
        Command::Check { config } => check::run(&config),
        Command::Reload(arguments) => reload::run(&arguments),
        Command::Token { command } => block_on(token::run(command)),
        Command::Store { command } => block_on(store::run(command)),
        Command::ExampleConfig => say!("{}", crate::config::example().trim_end()).map_err(Failure::from),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(text)) => {
            eprintln!("{text}");
            ExitCode::from(USAGE)
        }
        Err(Failure::Restart) => ExitCode::from(RESTART),
        Err(Failure::Failed(error)) => {
            eprintln!("tollgate: {error:#}");
            ExitCode::FAILURE
        }
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

/// Loads a configuration, or says all that is wrong with it.
fn load(path: &std::path::Path) -> Result<crate::config::Settings, Failure> {
    crate::config::load(path).map_err(|problems| {
        let count = problems.len();
        let what = if count == 1 { "one problem".to_owned() } else { format!("{count} problems") };
        Failure::Usage(format!("{}: {what}\n{}", path.display(), crate::assembly::report(&problems)))
    })
}
