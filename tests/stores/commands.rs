//! The commands that list and change tokens, on real stores.

use super::{Backing, Config, Embedded, PostgresOwn, RedisOwn};
use crate::harness::*;
use crate::support::{run, stderr, stdout};
use std::process::{Command, Output};

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

/// One record that somebody wrote by hand and nobody can read: it is named, and the rest is done.
#[test]
fn a_record_that_cannot_be_read_keeps_no_command_from_the_others() {
    let mut store = RedisOwn::new();
    store.add(&["one".into(), "two".into()]);
    let key = format!("tollgate:token:{}", sha256_hex("by hand"));
    store.server.cli(&["HSET", &key, "user", "ann", "revoked", "1"]);
    let id = &sha256_hex("by hand")[..12];
    let token =
        |arguments: &[&str]| run(tollgate().arg("token").args(arguments).arg("--config").arg(&store.config.path));
    let listed = token(&["list"]);
    assert_eq!(code(&listed), 0);
    assert_eq!(stdout(&listed).lines().count(), 3, "{}", stdout(&listed));
    assert!(stderr(&listed).contains(id) && stderr(&listed).contains("revoked"), "{}", stderr(&listed));
    let json: serde_json::Value = serde_json::from_str(&stdout(&token(&["list", "--json"]))).unwrap();
    assert_eq!(json.as_array().unwrap().len(), 2);
    for command in ["block", "unblock"] {
        let done = token(&[command, "user-of-one"]);
        assert_eq!(code(&done), 1, "it may be a token of that user");
        assert!(stdout(&done).contains("1 token of user-of-one"), "{}", stdout(&done));
        assert!(stderr(&done).contains(id), "{}", stderr(&done));
    }
    let shown = token(&["show", id]);
    assert_eq!(code(&shown), 1);
    assert!(stderr(&shown).contains("revoked"), "{}", stderr(&shown));
}

/// In a chain, a token is found in the store that has it, as a gateway finds it.
#[test]
fn commands_find_a_token_in_the_store_of_a_chain_that_has_it() {
    let (mut first, mut second) = (Embedded::new("sqlite"), RedisOwn::new());
    first.add(&["in-both".into(), "in-first".into()]);
    second.add(&["in-both".into(), "in-second".into()]);
    let named = |section: String, name: &str| section.replace("[store]", &format!("[[store]]\nname = \"{name}\""));
    let backend = "[[store]]\nname = \"backend\"\nkind = \"introspection\"\nendpoint = \"http://127.0.0.1:1/user\"\n";
    let chain = format!("{}{}{backend}", named(first.section(), "own"), named(second.section(), "shared"));
    let config = Config::new(&chain);
    let token = |arguments: &[&str]| run(tollgate().arg("token").args(arguments).arg("--config").arg(&config.path));
    for (name, store) in [("in-both", "own"), ("in-first", "own"), ("in-second", "shared")] {
        let shown = token(&["show", &sha256_hex(name)[..12]]);
        assert_eq!(code(&shown), 0, "{}", stderr(&shown));
        assert!(stdout(&shown).contains(&format!("store        {store}\n")), "{name}: {}", stdout(&shown));
    }
    let missing = token(&["show", &sha256_hex("nowhere")[..12]]);
    assert_eq!(code(&missing), 1);
    assert!(
        stderr(&missing).contains("no such token in store own or shared; not asked: backend"),
        "{}",
        stderr(&missing)
    );
    assert_eq!(code(&token(&["show", &sha256_hex("in-both")[..12], "--store", "shared"])), 0);
    assert_eq!(code(&token(&["show", &sha256_hex("in-first")[..12], "--store", "shared"])), 1);
    assert_eq!(code(&token(&["revoke", &sha256_hex("in-second")])), 0);
    let key = format!("tollgate:token:{}", sha256_hex("in-second"));
    assert!(second.server.cli(&["GET", &key]).contains("revoked"));
}

/// A list of many is printed as it is read, and ends when nobody reads any more.
#[test]
fn a_long_list_is_printed_in_bounded_memory() {
    let count = super::setting("TOLLGATE_LIST_TOKENS", 100_000);
    let tokens: Vec<String> = (0..count).map(|number| format!("token-{number:07}")).collect();
    let stores: [Box<dyn Backing>; 2] = [Box::new(PostgresOwn::new()), Box::new(RedisOwn::new())];
    for mut store in stores {
        store.add(&tokens);
        let config = Config::new(&store.section());
        let binary = env!("CARGO_BIN_EXE_tollgate");
        // The highest memory of the command, by what the kernel says of ended children.
        let script = "import resource, subprocess, sys\n\
            lines = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, check=True, bufsize=0).stdout.count(b'\\n')\n\
            print(lines, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)";
        let command = ["-c", script, binary, "token", "list", "--config", config.path.to_str().unwrap()];
        let said = stdout(&run(Command::new("python3").args(command)));
        let (lines, kib) = said.trim().split_once(' ').unwrap_or_else(|| panic!("{said}"));
        let (lines, kib): (usize, u64) = (lines.parse().unwrap(), kib.parse().unwrap());
        assert_eq!(lines, count + 1, "{}", store.name());
        println!("| {} | list of {count} | {:.0} MiB |", store.name(), kib as f64 / 1024.0);
        assert!(kib < 64 * 1024, "{}: {kib} KiB", store.name());
        let script = format!("'{binary}' token list --config '{}' | head -3", config.path.display());
        let begun = run(Command::new("bash").args(["-o", "pipefail", "-c", &script]));
        assert_eq!(stdout(&begun).lines().count(), 3);
        assert_eq!((code(&begun), stderr(&begun)), (0, String::new()), "{}", store.name());
    }
}
