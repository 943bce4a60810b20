//! What the command line says of itself: examples, exit codes, completions, man pages and docs/cli.md, all from one place. It
//! must not know what a command does.

use super::{Cli, Failure};
use anyhow::Context as _;
use clap::{Arg, Command as Clap, CommandFactory as _};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

/// What a code means for every command.
const CODES: [(u8, &str); 4] = [
    (0, "done"),
    (1, "not done: the reason is on standard error"),
    (2, "done, but for what takes a restart (reload)"),
    (64, "wrong usage, or a configuration that cannot be used: nothing was tried"),
];

/// Of one command: examples, each with what it does, and what its exit codes mean beyond [`CODES`].
struct CommandNotes {
    command: &'static str,
    examples: &'static [(&'static str, &'static str)],
    codes: &'static [(u8, &'static str)],
}

const fn notes(
    command: &'static str,
    examples: &'static [(&'static str, &'static str)],
    codes: &'static [(u8, &'static str)],
) -> CommandNotes {
    CommandNotes { command, examples, codes }
}

/// Every command that does something.
const NOTES: [CommandNotes; 32] = [
    notes(
        "run",
        &[
            ("tollgate run", "with the configuration that is found"),
            ("tollgate run -c /etc/tollgate/tollgate.toml", "with this one"),
        ],
        &[(0, "ended by a signal"), (1, "an address cannot be bound, a store cannot be opened")],
    ),
    notes("demo", &[("tollgate demo", "and follow what it prints")], &[(1, "an address cannot be bound")]),
    notes(
        "init",
        &[
            ("tollgate init", "asks on the terminal"),
            ("tollgate init --backend http://127.0.0.1:3000", "asks nothing"),
            ("tollgate init --backend https://gitlab.internal/api/v4 --store introspection --tls self-signed", ""),
            ("tollgate init --backend http://127.0.0.1:3000 --admin 127.0.0.1:9191", "where port 9090 is taken"),
        ],
        &[(1, "the file exists, or cannot be written"), (64, "an option that cannot be used: nothing was written")],
    ),
    notes(
        "check",
        &[
            ("tollgate check", "the configuration that is found"),
            ("tollgate check tollgate.toml --offline", "this one, without the network"),
            ("tollgate check --json | jq .message", ""),
        ],
        &[(0, "no errors; there may be warnings"), (64, "there are errors")],
    ),
    notes(
        "reload",
        &[("tollgate reload", ""), ("tollgate reload --admin unix:/run/tollgate/admin.sock", "")],
        &[
            (0, "all changes are in force"),
            (1, "nothing changed"),
            (2, "some changes need a restart; the others are in force"),
            (64, "`admin.listen` is \"none\": send SIGHUP"),
        ],
    ),
    notes(
        "upgrade",
        &[("tollgate upgrade", "after a new binary was installed")],
        &[(0, "the new process serves"), (1, "nothing changed")],
    ),
    notes(
        "server drain",
        &[("tollgate server drain api 10.0.0.5:3000", "before that server is taken away")],
        &[(0, "also if it was so before"), (1, "the gateway cannot be reached; it has no such server")],
    ),
    notes(
        "server undrain",
        &[("tollgate server undrain api 10.0.0.5:3000", "")],
        &[(0, "also if it was so before"), (1, "the gateway cannot be reached; it has no such server")],
    ),
    notes(
        "guessing list",
        &[("tollgate guessing list", ""), ("tollgate guessing list --json | jq -r '.clients[].client'", "")],
        &[(0, "also if nobody guesses"), (1, "the gateway cannot be reached")],
    ),
    notes(
        "guessing lift",
        &[
            ("tollgate guessing lift 192.0.2.7", "its unknown tokens are looked up again at once"),
            ("tollgate guessing lift --all", ""),
        ],
        &[(0, "with --all, also if nobody guesses"), (1, "the gateway cannot be reached; this address does not guess")],
    ),
    notes(
        "token create",
        &[
            ("tollgate token create --user alice", ""),
            ("tollgate token create --user ci --scope read_api --expires 90days --network 10.0.0.0/8", ""),
            ("TOKEN=$(tollgate token create --user alice)", "standard output has the token alone"),
        ],
        &[
            (0, "the token was created and printed"),
            (1, "the user is blocked: no token is created. The token could not be printed: its id is named, revoke it"),
            (64, "a user, scope, plan, rate, network, method or time that cannot be one"),
        ],
    ),
    notes(
        "token list",
        &[
            ("tollgate token list --user alice", ""),
            ("tollgate token list --state valid --expires-within 14days --sort expires", "what has to be rotated"),
            ("tollgate token list --state valid --unused-since 90days", "what nobody seems to need"),
            ("tollgate token list --limit 1000 --after 5f2b8c0e91aa", "the page behind that token"),
        ],
        &[
            (0, "also without any tokens, and if records cannot be read: these are named, and left out"),
            (1, "the token after which to list is not there"),
        ],
    ),
    notes(
        "token show",
        &[("tollgate token show 5f2b8c0e91aa", ""), ("tollgate token show - < token-file", "by the token itself")],
        &[(1, "no such token; several begin with these digits; standard input is not one token")],
    ),
    notes(
        "token rotate",
        &[("tollgate token rotate 5f2b8c0e91aa --overlap 48h", "")],
        &[
            (0, "the new token was printed. The successor of a blocked token is blocked, and a message says so"),
            (1, "as show; a token that is revoked, has expired, or was rotated before: its successors are named"),
            (64, "no --expires, and the creation time of the old token is not known"),
        ],
    ),
    notes(
        "token revoke",
        &[
            ("tollgate token revoke 5f2b8c0e91aa --wait", "until every gateway has confirmed it"),
            ("tollgate token revoke - < leaked-token", "by the token itself"),
            ("tollgate token revoke --user alice", "all of a user's tokens"),
        ],
        &[
            (0, "the token is revoked, also if it was before; with --user, at least one was revoked now"),
            (
                1,
                "as show; with --user, none was revoked now; with --wait, gateways did not confirm it, fewer than --gateways are in \
                 the register, or the store has none",
            ),
        ],
    ),
    notes(
        "token delete",
        &[("tollgate token delete 5f2b8c0e91aa", "its record is gone; a revoked one stays to be seen")],
        &[(1, "as show")],
    ),
    notes(
        "token prune",
        &[
            ("tollgate token prune --ended-before 90days", "says what it would delete"),
            ("tollgate token prune --ended-before 90days --delete", "deletes it"),
        ],
        &[(0, "also if there is nothing to delete"), (64, "a time that cannot be one")],
    ),
    notes(
        "token block",
        &[("tollgate token block alice", "")],
        &[
            (0, "all tokens of the user in this store are blocked, also if they were before"),
            (1, "the store has no token of this user. Records cannot be read that may be this user's: they are named"),
        ],
    ),
    notes(
        "token unblock",
        &[("tollgate token unblock alice", "")],
        &[
            (0, "no token of the user is blocked, also if none was"),
            (1, "the store has no token of this user. Records cannot be read that may be this user's: they are named"),
        ],
    ),
    notes(
        "token import",
        &[
            ("tollgate token import tokens.jsonl", ""),
            ("tollgate -c old.toml token list --json | tollgate -c new.toml token import -", "from store to store"),
        ],
        &[
            (0, "every entry is in the store"),
            (
                1,
                "an entry is invalid: nothing was imported, and the first 20 errors are listed. A known token is another's, or is \
                 revoked, blocked or expires sooner in the input: it stays and is named; the others were imported",
            ),
        ],
    ),
    notes(
        "cert self-signed",
        &[("tollgate cert self-signed --name api.test --out /etc/tollgate", "")],
        &[(1, "a file exists, or cannot be written"), (64, "a name that cannot be in a certificate")],
    ),
    notes(
        "store migrate",
        &[("tollgate store migrate", ""), ("tollgate store migrate --print | less", "what it would do")],
        &[(0, "done; with --print, the SQL was printed")],
    ),
    notes(
        "store check",
        &[("tollgate store check", "as the user, and with the configuration, of the gateway")],
        &[
            (0, "nothing is wrong; there may be warnings"),
            (1, "something is: each finding is printed with what mends it"),
        ],
    ),
    notes(
        "store install-triggers",
        &[("tollgate store install-triggers --print", "for who may change the tables")],
        &[(0, "done; with --print, the SQL was printed")],
    ),
    notes(
        "store uninstall-triggers",
        &[("tollgate store uninstall-triggers", "")],
        &[(0, "done; with --print, the SQL was printed")],
    ),
    notes("example-config", &[("tollgate example-config | less", "")], &[]),
    notes(
        "completions",
        &[
            ("source <(tollgate completions bash)", "for this shell"),
            ("tollgate completions zsh > ~/.zfunc/_tollgate", ""),
            ("tollgate completions fish > ~/.config/fish/completions/tollgate.fish", ""),
        ],
        &[],
    ),
    notes(
        "man",
        &[("tollgate man | man -l -", ""), ("tollgate man --output /usr/share/man/man1", "a page for each command")],
        &[(1, "a page cannot be written")],
    ),
    notes(
        "explain",
        &[
            (
                "tollgate explain --as alice -- curl -H 'PRIVATE-TOKEN: x' 'http://host/api/v3/user'",
                "judged by the configuration",
            ),
            (
                "tollgate explain --running -- curl -H 'PRIVATE-TOKEN: x' 'http://host/api/v3/user'",
                "by the running gateway",
            ),
            (
                "tollgate explain --why 5fd0ab6c0d1f7d04a2cbd2dcb5a3f3fb",
                "what became of a request, from the access log",
            ),
            ("journalctl -u tollgate -o cat | tollgate explain --why 5fd0ab6c0d1f --log -", ""),
        ],
        &[
            (0, "told, whatever the verdict; with --why: the request was found"),
            (1, "the gateway cannot be reached; with --why: no such request, and the files that were read are named"),
        ],
    ),
    notes(
        "routes",
        &[("tollgate routes", ""), ("tollgate routes --graph | dot -Tsvg >routes.svg", "with Graphviz")],
        &[],
    ),
    notes(
        "status",
        &[("tollgate status", "what the operator's page shows"), ("tollgate status --json | jq .servers", "")],
        &[(0, "the gateway answered"), (1, "the gateway cannot be reached, or refuses the token")],
    ),
    notes("help", &[], &[]),
];

fn noted(command: &str) -> Option<&'static CommandNotes> {
    NOTES.iter().find(|notes| notes.command == command)
}

fn examples(notes: &CommandNotes) -> String {
    let mut text = String::from("Examples:");
    for (command, what) in notes.examples {
        let _ = write!(text, "\n  {command}");
        if !what.is_empty() {
            let _ = write!(text, "\n      {what}");
        }
    }
    text
}

/// The command line with its examples.
pub(super) fn command_line() -> Clap {
    let main = "Examples:\n  tollgate demo\n      try it, without a configuration\n  tollgate init\n      write a configuration\n  \
                tollgate check && tollgate run\n\nExit codes: 0 done, 1 not done, 2 done but for what takes a restart, 64 wrong \
                usage or configuration";
    with_examples(Cli::command().after_help(main), "")
}

fn with_examples(command: Clap, above: &str) -> Clap {
    let names: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    names.into_iter().fold(command, |command, name| {
        let path = if above.is_empty() { name.clone() } else { format!("{above} {name}") };
        command.mut_subcommand(name, |sub| {
            let sub = if READS_NO_CONFIGURATION.contains(&path.as_str()) { sub.arg(unread_config()) } else { sub };
            match noted(&path) {
                Some(notes) if !notes.examples.is_empty() => sub.after_help(examples(notes)),
                _ => with_examples(sub, &path),
            }
        })
    })
}

/// These refuse `--config`, and do not show it.
const READS_NO_CONFIGURATION: [&str; 7] =
    ["demo", "init", "cert", "cert self-signed", "example-config", "completions", "man"];

/// In place of the option that every command would inherit.
fn unread_config() -> Arg {
    let path = clap::value_parser!(PathBuf);
    Arg::new("config").short('c').long("config").value_name("FILE").value_parser(path).hide(true).help("Not read here")
}

pub(super) fn completions(shell: clap_complete::Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command_line(), "tollgate", &mut script);
    say!("{}", String::from_utf8_lossy(&script).trim_end())?;
    Ok(())
}

#[derive(clap::Args)]
pub(super) struct ManArguments {
    /// Write a page for each command into this folder, instead of the first one to standard output
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Print all commands as one page of Markdown, as in docs/cli.md
    #[arg(long, conflicts_with = "output")]
    markdown: bool,
}

pub(super) fn man(arguments: &ManArguments) -> Result<(), Failure> {
    if arguments.markdown {
        say!("{}", markdown().trim_end())?;
        return Ok(());
    }
    match &arguments.output {
        Some(folder) => {
            clap_mangen::generate_to(command_line(), folder).with_context(|| folder.display().to_string())?;
            say!("wrote the pages to {}", folder.display())?;
        }
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(command_line()).render(&mut page)?;
            std::io::stdout().lock().write_all(&page).context("standard output")?;
        }
    }
    Ok(())
}

/// docs/cli.md.
pub fn markdown() -> String {
    let mut out = String::from(
        "# The command line\n\n\
         Made by `tollgate man --markdown`; a test compares it with the program.\n\n\
         Every command that reads a configuration takes `-c FILE`, before or behind its name. Without it, the first of these is \
         read: the file that `TOLLGATE_CONFIG` names, `./tollgate.toml`, `/etc/tollgate/tollgate.toml`. A file that is named and \
         missing is an error. A process of root does not read a `./tollgate.toml` that others can write, unless it is named.\n\n\
         Data goes to standard output, messages to standard error. With `--json`, standard output is JSON or empty: one object, a \
         list of objects for `token list`, or an object for each line for `check` and `store check`. Keys are in lower case with \
         `_`; times are RFC 3339 in UTC, or null; a key is never left out, and new ones may be added. If a command fails with \
         `--json`, the last line on standard error is `{\"error\": \"…\", \"exit_code\": 1}`; the problems that `check` finds are all \
         on standard output.\n\n\
         ## Exit codes\n\n| code | meaning |\n|---|---|\n",
    );
    for (code, meaning) in CODES {
        let _ = writeln!(out, "| {code} | {meaning} |");
    }
    out += "\nWhat they mean for a command, beyond that:\n\n| command | 0 | 1 | 64 |\n|---|---|---|---|\n";
    for notes in NOTES.iter().filter(|notes| notes.command != "help") {
        let of = |wanted: u8| notes.codes.iter().find(|(code, _)| *code == wanted).map_or("", |(_, meaning)| meaning);
        let _ = writeln!(out, "| `{}` | {} | {} | {} |", notes.command, of(0), of(1), of(64));
    }
    let mut command = command_line();
    command.build();
    describe(&command, "", &mut out);
    out
}

fn describe(command: &Clap, above: &str, out: &mut String) {
    for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
        let path = format!("{above}{}", sub.get_name());
        if sub.has_subcommands() {
            describe(sub, &format!("{path} "), out);
            continue;
        }
        let about = sub.get_long_about().or(sub.get_about()).map(ToString::to_string).unwrap_or_default();
        let _ = write!(out, "\n## tollgate {path}\n\n{about}\n\n");
        let shown: Vec<&Arg> =
            sub.get_arguments().filter(|arg| !matches!(arg.get_id().as_str(), "help" | "config")).collect();
        if !shown.is_empty() {
            *out += "| option | |\n|---|---|\n";
        }
        for arg in shown {
            let value = arg.get_value_names().and_then(|names| names.first()).map(|name| format!(" {name}"));
            let value = value.filter(|_| arg.get_action().takes_values()).unwrap_or_default();
            let name = match (arg.get_short(), arg.get_long()) {
                (Some(short), Some(long)) => format!("-{short}, --{long}{value}"),
                (None, Some(long)) => format!("--{long}{value}"),
                _ => value.trim_start().to_owned(),
            };
            let default =
                arg.get_default_values().iter().map(|text| text.to_string_lossy()).collect::<Vec<_>>().join(" ");
            let default = if default.is_empty() || !arg.get_action().takes_values() {
                String::new()
            } else {
                format!(" (default: `{default}`)")
            };
            let help = arg.get_help().map(ToString::to_string).unwrap_or_default().replace('|', "\\|");
            let _ = writeln!(out, "| `{name}` | {help}{default} |");
        }
        if let Some(notes) = noted(&path).filter(|notes| !notes.examples.is_empty()) {
            *out += "\n```sh\n";
            for (example, what) in notes.examples {
                let what = if what.is_empty() { String::new() } else { format!("  # {what}") };
                let _ = writeln!(out, "{example}{what}");
            }
            *out += "```\n";
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// The commands that do something, with the words that call them.
    fn leaves(command: &Clap, above: &str, found: &mut Vec<(String, Clap)>) {
        for sub in command.get_subcommands() {
            let path = format!("{above}{}", sub.get_name());
            match sub.has_subcommands() {
                true => leaves(sub, &format!("{path} "), found),
                false => found.push((path, sub.clone())),
            }
        }
    }

    #[test]
    fn every_command_has_examples_that_parse_and_one_style() {
        command_line().debug_assert();
        let mut found = Vec::new();
        leaves(&command_line(), "", &mut found);
        let names: Vec<_> = found.iter().map(|(name, _)| name.as_str()).collect();
        let known: Vec<_> = NOTES.iter().map(|notes| notes.command).filter(|name| *name != "help").collect();
        assert!(names.iter().all(|name| known.contains(name)), "{names:?} {known:?}");
        assert!(known.iter().all(|name| names.contains(name)), "{names:?} {known:?}");
        let mut examples = 0;
        for (name, command) in &found {
            let about = command.get_about().map(ToString::to_string).unwrap_or_default();
            assert!(!about.is_empty() && !about.ends_with('.'), "{name}: {about}");
            assert!(command.get_after_help().is_some(), "{name} has no examples");
            for arg in command.get_arguments() {
                if arg.is_hide_set() {
                    continue;
                }
                let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
                assert!(!help.is_empty() && !help.ends_with('.'), "{name} {}: {help}", arg.get_id());
            }
            // Who shows the option reads the file.
            let refused = READS_NO_CONFIGURATION.contains(&name.as_str());
            let call = format!("tollgate {name} --help");
            let help = command_line().try_get_matches_from(call.split(' ')).unwrap_err().to_string();
            assert_eq!(help.contains("--config <FILE>"), !refused, "{name}: {help}");
            for (example, _) in noted(name).unwrap().examples {
                // The part that is tollgate's, without what the shell reads.
                let calls = example.split(['|', '<', '>', '&', '(', ')']).map(str::trim);
                for call in calls.filter(|part| part.starts_with("tollgate ")) {
                    examples += 1;
                    let words = call.split_whitespace();
                    let parsed = command_line().try_get_matches_from(words);
                    assert!(parsed.is_ok(), "{call}: {}", parsed.unwrap_err());
                }
            }
        }
        assert!(found.len() >= 24 && examples >= 35, "{} {examples}", found.len());
    }

    #[test]
    fn the_page_is_what_the_program_says() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/cli.md");
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        assert!(committed == markdown(), "stale: run `tollgate man --markdown > docs/cli.md`");
    }
}
