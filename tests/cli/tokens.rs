//! The token commands report what happened: what they report is done, what is not done is an error on standard error with a
//! non-zero exit code, and standard output has data only. On every store that is a file; servers are in the contract suite.

use super::*;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

fn id(token: &str) -> String {
    sha256_hex(token)[..12].to_owned()
}

impl Place {
    /// The command must fail with 1 and an error on standard error, and print nothing else.
    fn fails(&self, command: &str, arguments: &[&str]) -> String {
        self.failed(command, &self.token(command, arguments))
    }

    fn failed(&self, command: &str, output: &Output) -> String {
        let said = stderr(output);
        assert_eq!(output.status.code(), Some(1), "{} {command}: {}", self.kind, all(output));
        assert!(stdout(output).is_empty() && !said.trim().is_empty(), "{} {command}: {}", self.kind, all(output));
        said
    }

    /// Imports tokens from JSON lines.
    fn import(&self, lines: &str) {
        let output = self.with_input("import", &["-"], lines);
        assert_eq!(output.status.code(), Some(0), "{}: {}", self.kind, all(&output));
    }

    fn state(&self, token: &str) -> String {
        let shown = self.ok("show", &[&id(token)]);
        shown.lines().find_map(|line| line.strip_prefix("state        ")).unwrap().to_owned()
    }

    fn file(&self) -> std::path::PathBuf {
        self.folder.0.join(self.store().1)
    }
}

// ---- the token file ----

/// A file as another implementation of TOML reads it.
fn read_by_python(path: &Path) -> serde_json::Value {
    let script = "import json,sys,tomllib; print(json.dumps(tomllib.load(open(sys.argv[1],'rb'))))";
    let output = run(Command::new("python3").args(["-c", script]).arg(path));
    assert!(output.status.success(), "{}", stderr(&output));
    serde_json::from_str(&stdout(&output)).unwrap()
}

#[test]
fn a_token_file_is_edited_in_every_way_that_it_may_be_written() {
    let (a, b) = (sha256_hex("a"), sha256_hex("b"));
    let upper = a.to_uppercase();
    let texts = [
        (
            true,
            format!(
                "# C1\n[[token]] # C2\nsha256 = \"{a}\" # C3\nuser = \"alice\"\n\n# C4\n[[token]]\nsha256 = \"{b}\"\nuser = \"bob\"\n# C5\n"
            ),
        ),
        (
            true,
            format!(
                "[[token]]\nuser = \"alice\"\nrevoked = false # C1\nsha256 = '{upper}'\n[[token]]\n  user='bob'\n  blocked =    false # C2\n  sha256='{b}'"
            ),
        ),
        (
            true,
            format!(
                "[[ \"token\" ]]\n\"sha256\" = \"{a}\"\n'user' = \"\"\"alice\"\"\"\n\n[['token']] # C1\n\"\\u0075ser\" = \"b\\u006fb\"\n'sha256'=\"{b}\"\n"
            ),
        ),
        (
            true,
            format!(
                "token = [{{ sha256 = \"{a}\", user = \"alice\" }}, {{ sha256 = \"{b}\", user = \"bob\" }}] # C1\n"
            ),
        ),
        (true, format!("\"token\"=[{{sha256=\"{a}\",user=\"alice\",revoked=false}},{{user='bob',\"sha256\"='{b}'}},]")),
        (
            true,
            format!(
                "# C1\ntoken = [ # C2\n  {{ sha256 = \"{a}\", user = \"alice\" }}, # C3\n  # C4\n  {{ user = \"bob\", sha256 = \"{b}\" }} # C5\n  # C6\n] # C7\n"
            ),
        ),
        (
            true,
            format!(
                "# C1\r\n[[token]]\r\nsha256 = \"{a}\" # C2\r\nuser = \"alice\"\r\n[[token]]\r\nuser = \"bob\"\r\nsha256 = \"{b}\"\r\n"
            ),
        ),
        // TOML 1.1: inline tables over several lines.
        (
            false,
            format!(
                "token = [\n  {{\n    sha256 = \"{a}\", # C1\n    user = \"alice\", # C2\n  }},\n  {{ user = \"bob\", sha256 = \"{b}\", }},\n]\n"
            ),
        ),
    ];
    let mut seen = 0;
    for (has_reader, text) in &texts {
        let place = Place::new("file");
        std::fs::write(place.file(), text).unwrap();
        assert!(place.ok("revoke", &[&id("a")]).contains("is revoked"));
        assert_eq!(place.state("a"), "revoked", "{text}");
        assert_eq!(place.ok("block", &["bob"]), "1 token of bob is blocked\n", "{text}");
        assert_eq!((place.state("a"), place.state("b")), ("revoked".into(), "blocked".into()), "{text}");
        assert_eq!(place.ok("unblock", &["bob"]), "1 token of bob works again\n", "{text}");
        let created = place.json("create", &["--user", "carol \"c\"", "--scope", "api", "--description", "two\nlines"]);
        let rotated = place.json("rotate", &[&id("b"), "--overlap", "1h"]);
        assert_eq!(place.state("b"), "rotated", "{text}");
        place.import("{\"token\":\"d\",\"user\":\"dave\",\"last_used\":\"2026-01-01T00:00:00Z\"}\n");
        let new = std::fs::read_to_string(place.file()).unwrap();
        for comment in (1..9).map(|n| format!("# C{n}")).filter(|comment| text.contains(comment)) {
            assert!(new.contains(&comment), "{comment} is gone:\n{text}\n=>\n{new}");
        }
        let crlf = new.matches("\r\n").count();
        assert_eq!(crlf, if text.contains('\r') { new.matches('\n').count() } else { 0 }, "{new}");
        let listed = place.json("list", &[]);
        assert_eq!(listed.as_array().unwrap().len(), 5, "{new}");
        if *has_reader {
            seen += 1;
            let read = read_by_python(&place.file());
            let entries = read["token"].as_array().unwrap();
            assert_eq!(entries.len(), 5, "{new}");
            for entry in entries {
                let sha256 = entry["sha256"].as_str().unwrap().to_lowercase();
                let shown = listed.as_array().unwrap().iter().find(|shown| shown["sha256"] == sha256.as_str()).unwrap();
                for key in ["user", "revoked", "expires", "superseded", "last_used"] {
                    let read = entry.get(key).filter(|value| **value != false);
                    assert_eq!(read.unwrap_or(&serde_json::Value::Null), &shown[key], "{key} of {sha256}: {new}");
                }
                assert_eq!(
                    entry.get("blocked").is_some_and(|blocked| *blocked == true),
                    shown["blocked"] == true,
                    "{new}"
                );
            }
            assert_eq!(entries[2]["sha256"], created["sha256"], "{new}");
            assert_eq!(entries[3]["replaces"].as_str(), Some(b.as_str()), "{new}");
            assert_eq!(rotated["replaces_sha256"].as_str(), Some(b.as_str()));
        }
    }
    assert_eq!((texts.len(), seen), (8, 7));
    // Files without tokens.
    for text in ["token = []", "token = [] # C1\n", "token = [\n  # C1\n]\n", "# C1\n", "", "\n", "'token'=[]"] {
        let place = Place::new("file");
        std::fs::write(place.file(), text).unwrap();
        let created = [place.json("create", &["--user", "a"]), place.json("create", &["--user", "b"])];
        let read = read_by_python(&place.file());
        for (entry, created) in read["token"].as_array().unwrap().iter().zip(&created) {
            assert_eq!(entry["sha256"], created["sha256"], "{text}");
        }
        let new = std::fs::read_to_string(place.file()).unwrap();
        assert_eq!(new.contains("# C1"), text.contains("# C1"), "{new}");
    }
}

#[test]
fn a_json_file_keeps_its_order_and_its_indentation() {
    let a = sha256_hex("a");
    let place = Place::new("json");
    std::fs::write(
        place.file(),
        format!("{{\n    \"token\": [\n        {{\"user\": \"alice\", \"sha256\": \"{a}\"}}\n    ]\n}}\n"),
    )
    .unwrap();
    assert!(place.ok("revoke", &[&id("a")]).contains("is revoked"));
    place.ok("create", &["--user", "bob"]);
    let new = std::fs::read_to_string(place.file()).unwrap();
    assert!(new.contains("\n    \"token\"") && new.find("\"user\": \"alice\"") < new.find(&a), "{new}");
    let read: serde_json::Value = serde_json::from_str(&new).unwrap();
    assert_eq!(read["token"].as_array().unwrap().len(), 2);
    assert!(read["token"][0]["revoked"].is_string(), "{new}");
}

#[test]
fn a_running_gateway_obeys_what_was_edited() {
    let upstream = Upstream::start();
    let place = Place::new("file");
    let text = format!(
        "token = [{{ sha256 = \"{}\", user = \"alice\" }}, {{ sha256 = \"{}\", user = \"bob\" }}]",
        sha256_hex("a"),
        sha256_hex("b")
    );
    std::fs::write(place.file(), text).unwrap();
    let gateway = Gateway::start(upstream.address, &place.section());
    assert_eq!((status(&gateway, "a"), status(&gateway, "b")), (200, 200));
    place.ok("revoke", &[&id("a")]);
    place.ok("block", &["bob"]);
    eventually("revoked and blocked", || status(&gateway, "a") == 401 && status(&gateway, "b") == 401);
    let token = place.json("create", &["--user", "carol"])["token"].as_str().unwrap().to_owned();
    eventually("the new one works", || status(&gateway, &token) == 200);
}

#[test]
fn commands_at_the_same_time_lose_nothing() {
    for place in Place::all() {
        place.import("{\"token\":\"r\",\"user\":\"r\"}\n{\"token\":\"s\",\"user\":\"s\"}\n");
        let mut children: Vec<_> = (0..16)
            .map(|n| {
                let user = format!("user-{n}");
                let mut create = place.command(&["token", "create"], &["--user", &user]);
                create.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
            })
            .collect();
        for (command, argument) in [("revoke", id("r")), ("block", "s".into())] {
            let mut command = place.command(&["token", command], &[&argument]);
            children.push(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap());
        }
        let count = children.len();
        for child in children {
            let output = child.wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(0), "{}: {}", place.kind, all(&output));
        }
        assert_eq!(count, 18);
        let users: std::collections::BTreeSet<String> = place
            .json("list", &[])
            .as_array()
            .unwrap()
            .iter()
            .map(|shown| shown["user"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(users.len(), 18, "{}: {users:?}", place.kind);
        assert_eq!((place.state("r"), place.state("s")), ("revoked".into(), "blocked".into()), "{}", place.kind);
        let left: Vec<_> = std::fs::read_dir(&place.folder.0)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.contains(".new") || name.contains("lock"))
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[test]
fn a_file_stays_a_link_and_its_owners() {
    for place in [Place::new("file"), Place::new("json")] {
        let name = place.store().1;
        let elsewhere = place.folder.0.join("elsewhere");
        std::fs::create_dir(&elsewhere).unwrap();
        let target = elsewhere.join("target");
        std::fs::write(&target, if place.kind == "json" { "{}" } else { "token = []\n" }).unwrap();
        std::os::unix::fs::symlink("elsewhere/target", place.folder.0.join(name)).unwrap();
        std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o640)).unwrap();
        let is_root = std::os::unix::fs::chown(&target, Some(12_345), Some(23_456)).is_ok();
        let created = place.json("create", &["--user", "alice"]);
        assert!(std::fs::symlink_metadata(place.file()).unwrap().is_symlink(), "{}: the link is gone", place.kind);
        let meta = std::fs::metadata(&target).unwrap();
        assert_eq!(meta.mode() & 0o7777, 0o640);
        assert!(std::fs::read_to_string(&target).unwrap().contains(created["sha256"].as_str().unwrap()));
        if is_root {
            assert_eq!((meta.uid(), meta.gid()), (12_345, 23_456), "{}: the owner changed", place.kind);
            // A user who may write the file, but cannot keep its owner, must not change it.
            for folder in [&place.folder.0, &elsewhere] {
                std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o777)).unwrap();
            }
            std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o666)).unwrap();
            let before = std::fs::read(&target).unwrap();
            let mut command = Command::new("setpriv");
            command.args(["--reuid=1", "--regid=1", "--clear-groups"]).arg(env!("CARGO_BIN_EXE_tollgate"));
            command.args(["token", "create", "--user", "bob", "--config"]).arg(place.folder.0.join("tollgate.toml"));
            let said = place.failed("create", &run(&mut command));
            assert!(said.contains("12345") && said.contains("nothing was changed"), "{said}");
            assert_eq!(std::fs::read(&target).unwrap(), before);
            assert_eq!(std::fs::read_dir(&elsewhere).unwrap().count(), 1, "something was left behind");
        }
        std::fs::remove_file(&target).unwrap();
        let said = place.fails("create", &["--user", "alice"]);
        assert!(said.contains("is a link to a file that is not there"), "{said}");
        assert!(!target.exists());
    }
}

// ---- reports and errors ----

#[test]
fn nobody_is_blocked_whom_nobody_knows() {
    for place in Place::all() {
        place.import("{\"token\":\"a\",\"user\":\"alice\"}\n");
        for user in ["nobody", "Alice", "alice ", "", "*", "al\u{1b}[2Jice"] {
            for command in ["block", "unblock"] {
                for arguments in [&[user][..], &[user, "--json"]] {
                    let said = place.fails(command, arguments);
                    assert!(said.contains(&format!("nobody was {command}ed")) && !said.contains('\u{1b}'), "{said:?}");
                }
            }
        }
        assert_eq!(place.state("a"), "active");
        for id in ["abcdef012345", &sha256_hex("nobody")] {
            for command in ["show", "revoke", "rotate"] {
                let said = place.fails(command, &[id]);
                assert!(said.contains("no such token in store "), "{said}");
            }
        }
    }
}

#[test]
fn unblock_revives_nothing_and_says_who_is_left_out() {
    for place in Place::all() {
        let future = "2099-01-01T00:00:00Z";
        place.import(&format!(
            "{{\"token\":\"works\",\"user\":\"u\"}}\n{{\"token\":\"gone\",\"user\":\"u\"}}\n\
             {{\"token\":\"over\",\"user\":\"u\",\"expires\":\"2020-01-01T00:00:00Z\"}}\n\
             {{\"token\":\"later\",\"user\":\"u\",\"not_before\":\"{future}\"}}\n{{\"token\":\"other\",\"user\":\"o\"}}\n"
        ));
        place.ok("revoke", &[&id("gone")]);
        assert_eq!(place.ok("unblock", &["u"]), "no token of u was blocked\n");
        assert_eq!(place.ok("block", &["u"]), "4 tokens of u are blocked\n");
        assert_eq!(place.ok("block", &["u"]), "4 tokens of u are blocked, as before\n");
        let json = place.json("block", &["u"]);
        assert_eq!((&json["changed"], &json["tokens"], &json["in_force"]), (&0.into(), &4.into(), &0.into()));
        let said = place.ok("unblock", &["u"]);
        assert_eq!(
            said, "1 token of u works again; 1 is revoked; 1 is expired; 1 is not valid yet\n",
            "{}",
            place.kind
        );
        for (token, state) in
            [("works", "active"), ("gone", "revoked"), ("over", "expired"), ("later", "not yet"), ("other", "active")]
        {
            assert_eq!(place.state(token), state, "{}: {token}", place.kind);
        }
        place.ok("block", &["u"]);
        let json = place.json("unblock", &["u"]);
        assert_eq!((&json["changed"], &json["tokens"], &json["in_force"]), (&4.into(), &4.into(), &1.into()));
        place.ok("revoke", &[&id("works")]);
        place.ok("block", &["u"]);
        assert_eq!(
            place.ok("unblock", &["u"]),
            "no token of u works again; 2 are revoked; 1 is expired; 1 is not valid yet\n"
        );
    }
}

#[test]
fn a_blocked_user_gets_no_token_that_works() {
    for place in Place::all() {
        place.import("{\"token\":\"a\",\"user\":\"alice\"}\n{\"token\":\"b\",\"user\":\"bob\"}\n");
        place.ok("block", &["alice"]);
        for arguments in [&["--user", "alice"][..], &["--user", "alice", "--json"]] {
            let said = place.fails("create", arguments);
            assert!(said.contains("alice is blocked: no token was made"), "{said}");
        }
        assert_eq!(place.json("list", &[]).as_array().unwrap().len(), 2, "{}", place.kind);
        // The successor of a blocked token is blocked, and the output says so.
        let output = place.token("rotate", &[&id("a")]);
        assert_eq!(output.status.code(), Some(0), "{}", all(&output));
        let next = stdout(&output).trim().to_owned();
        assert!(stderr(&output).contains("does not work yet: alice is blocked"), "{}", stderr(&output));
        assert!(!stderr(&output).contains("remains valid"), "{}", stderr(&output));
        assert_eq!(place.state(&next), "blocked");
        // An import does not circumvent this.
        let lines = "{\"token\":\"a2\",\"user\":\"alice\"}\n{\"token\":\"b2\",\"user\":\"bob\"}\n";
        let output = place.with_input("import", &["-"], lines);
        assert_eq!(output.status.code(), Some(0), "{}", all(&output));
        assert!(
            stderr(&output).contains("users who are blocked here stay so") && stderr(&output).contains("alice"),
            "{}",
            stderr(&output)
        );
        assert!(!stderr(&output).contains("bob"), "{}", stderr(&output));
        assert_eq!((place.state("a2"), place.state("b2")), ("blocked".into(), "active".into()), "{}", place.kind);
        assert_eq!(place.ok("unblock", &["alice"]), "3 tokens of alice work again\n");
        place.ok("create", &["--user", "alice"]);
    }
}

#[test]
fn names_that_are_none_are_refused_before_anything_is_made() {
    for place in Place::all() {
        for user in [
            "",
            " ",
            " alice",
            "alice\t",
            "al\u{1b}[2Jice",
            "al\nice",
            "a\u{7f}",
            "a\u{85}b",
            "a\u{202e}b",
            &"x".repeat(256),
        ] {
            let output = place.token("create", &["--user", user]);
            assert_eq!(output.status.code(), Some(USAGE), "{user:?}: {}", all(&output));
            let said = stderr(&output);
            assert!(
                said.starts_with("--user: must ") && !said.contains('\u{1b}') && stdout(&output).is_empty(),
                "{said:?}"
            );
            let line = serde_json::json!({ "token": "t", "user": user }).to_string();
            let said = place.failed("import", &place.with_input("import", &["-"], &line));
            assert!(said.contains("line 1, column 21: user: must") || said.contains("user: must"), "{said:?}");
        }
        for scope in ["", "two words", "a\u{1b}b", "a\u{a0}b", "a\nb"] {
            let output = place.token("create", &["--user", "u", "--scope", "api", "--scope", scope]);
            assert_eq!(output.status.code(), Some(USAGE), "{scope:?}: {}", all(&output));
            assert!(
                stderr(&output).starts_with("--scope: ") && !stderr(&output).contains('\u{1b}'),
                "{}",
                stderr(&output)
            );
            let line = serde_json::json!({ "token": "t", "user": "u", "scopes": ["api", scope] }).to_string();
            let said = place.failed("import", &place.with_input("import", &["-"], &line));
            assert!(said.contains("scopes: each must"), "{said:?}");
        }
        for (option, value) in
            [("--expires", "9000years"), ("--expires", "9999999999days"), ("--not-before", "8000years")]
        {
            let output = place.token("create", &["--user", "u", option, value]);
            assert_eq!(output.status.code(), Some(USAGE), "{value}: {}", all(&output));
        }
        assert_eq!(place.json("list", &[]), serde_json::json!([]), "{}: something was made", place.kind);
        for user in ["alice", "Alice Ö. 名前", "a@b", "o'neil", "50%"] {
            assert_eq!(place.json("create", &["--user", user])["user"].as_str(), Some(user), "{}", place.kind);
        }
    }
}

#[test]
fn a_rotated_token_names_its_successor() {
    for place in Place::all() {
        place.import(
            "{\"token\":\"first\",\"user\":\"u\"}\n{\"token\":\"gone\",\"user\":\"u\"}\n\
             {\"token\":\"over\",\"user\":\"u\",\"expires\":\"2020-01-01T00:00:00Z\"}\n\
             {\"token\":\"widow\",\"user\":\"u\",\"superseded\":\"2020-01-01T00:00:00Z\"}\n",
        );
        let second = place.json("rotate", &[&id("first")])["id"].as_str().unwrap().to_owned();
        let said = place.fails("rotate", &[&id("first")]);
        assert!(
            said.contains("was rotated before") && said.contains(&format!("in its place is {second} (active)")),
            "{said}"
        );
        let third = place.json("rotate", &[&second, "--overlap", "1h"])["id"].as_str().unwrap().to_owned();
        for arguments in [&[&*id("first")][..], &[&*id("first"), "--json"]] {
            let said = place.fails("rotate", arguments);
            let chain = format!("in its place is {second} (rotated), and in the place of that one {third} (active)");
            assert!(said.contains(&chain), "{said}");
        }
        place.ok("revoke", &[&id("gone")]);
        for (token, part) in
            [("gone", "is revoked"), ("over", "has expired"), ("widow", "is not in this store any more")]
        {
            let said = place.fails("rotate", &[&id(token)]);
            assert!(said.contains(part) && said.contains("nothing to rotate") && said.contains(&id(token)), "{said}");
        }
        assert_eq!(place.json("list", &[]).as_array().unwrap().len(), 6, "{}", place.kind);
        // Without an overlap the old one ends immediately, and the output says so.
        let output = place.token("rotate", &[&third, "--overlap", "0s"]);
        assert_eq!(output.status.code(), Some(0), "{}", all(&output));
        assert!(stderr(&output).contains(&format!("token {third} is no longer valid")), "{}", stderr(&output));
    }
}

#[test]
fn a_token_on_standard_input_is_one_token() {
    for place in Place::all() {
        place.import("{\"token\":\"a\",\"user\":\"u\"}\n");
        for input in ["a", "a\n", "a\r\n", "a\n\n"] {
            let output = place.with_input("show", &["-", "--json"], input);
            assert_eq!(output.status.code(), Some(0), "{input:?}: {}", all(&output));
        }
        for (input, part) in [
            ("", "standard input is empty"),
            ("\n", "standard input is empty"),
            (" \n", "standard input is empty"),
            ("a\nb\n", "more than one line"),
            ("a b", "is not a token"),
            (" a", "is not a token"),
            ("a\t", "is not a token"),
            ("S3CRET\u{e9}", "is not a token"),
            (&"x".repeat(2049), "is not a token"),
            ("unknown", "no such token"),
        ] {
            for command in ["show", "revoke", "rotate"] {
                let said = place.failed(command, &place.with_input(command, &["-"], input));
                assert!(said.contains(part) && !said.contains("S3CRET"), "{input:?}: {said}");
            }
        }
        assert_eq!(place.state("a"), "active");
        let mut nothing = place.command(&["token", "show"], &["-"]);
        assert!(place.failed("show", &run(&mut nothing)).contains("standard input is empty"));
    }
}

#[test]
fn revoke_says_that_it_was_done_before() {
    for place in Place::all() {
        place.import("{\"token\":\"a\",\"user\":\"u\"}\n");
        assert!(place.ok("revoke", &[&id("a")]).ends_with(" of u is revoked\n"));
        let at = place.json("show", &[&id("a")])["revoked"].as_str().unwrap().to_owned();
        // The token is revoked, as requested: this is not an error.
        assert!(place.ok("revoke", &[&id("a")]).ends_with(&format!(" of u was revoked before, at {at}\n")));
        assert_eq!(place.json("revoke", &[&id("a")])["revoked"].as_str(), Some(&*at));
    }
    // The time of the revocation is unknown.
    let place = Place::new("file");
    std::fs::write(
        place.file(),
        format!("[[token]]\nsha256 = \"{}\"\nuser = \"u\"\nrevoked = true\n", sha256_hex("a")),
    )
    .unwrap();
    assert!(place.ok("revoke", &[&id("a")]).ends_with(" of u was revoked before\n"));
    assert!(place.ok("show", &[&id("a")]).contains("revoked      yes\n"));
    let output = place.token("revoke", &[&id("a"), "--wait"]);
    assert_eq!(output.status.code(), Some(1), "{}", all(&output));
    assert!(
        stderr(&output).contains("is revoked, but not confirmed")
            && stderr(&output).contains("a file keeps no register"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_change_says_which_stores_it_did_not_reach() {
    let folder = Folder::new("test");
    let store =
        |name: &str, path: &str| format!("[[store]]\nkind = \"sqlite\"\nname = \"{name}\"\npath = \"{path}\"\n");
    let config = folder.write("tollgate.toml", &format!("{UPSTREAM}{}{}", store("one", "1.db"), store("two", "2.db")));
    let token = |arguments: &[&str]| {
        let (command, rest) = arguments.split_first().unwrap();
        run(tollgate().args(["token", command, "--config"]).arg(&config).args(rest))
    };
    for store in ["one", "two"] {
        assert!(token(&["create", "--user", "u", "--store", store]).status.success());
    }
    let output = token(&["block", "u"]);
    assert_eq!(stdout(&output), "1 token of u is blocked\n");
    assert!(stderr(&output).contains("store one only; not asked: two"), "{}", stderr(&output));
    let output = token(&["show", "abcdef012345", "--store", "two"]);
    assert!(stderr(&output).contains("no such token in store two"), "{}", stderr(&output));
}

// ---- from store to store ----

#[test]
fn a_list_is_imported_by_every_other_store() {
    let mut pairs = 0;
    for from in ["sqlite", "file", "json"] {
        let source = Place::new(from);
        source.import(
            "{\"token\":\"a\",\"user\":\"alice \\\"a\\\"\",\"scopes\":[\"api\",\"é\"],\"description\":\"two\\nlines ]},\",\"created\":\"2020-01-01T00:00:00Z\",\
             \"not_before\":\"2020-01-02T00:00:00Z\",\"expires\":\"2099-01-01T00:00:00Z\",\"last_used\":\"2026-01-01T00:00:00Z\"}\n\
             {\"token\":\"b\",\"user\":\"bob\"}\n{\"token\":\"c\",\"user\":\"carol\"}\n{\"token\":\"d\",\"user\":\"dave\"}\n",
        );
        source.ok("revoke", &[&id("b")]);
        source.ok("block", &["carol"]);
        source.json("rotate", &[&id("d"), "--overlap", "1h", "--expires", "30days"]);
        let list = source.ok("list", &["--json"]);
        assert_eq!(serde_json::from_str::<serde_json::Value>(&list).unwrap().as_array().unwrap().len(), 5);
        let pretty = serde_json::to_string_pretty(&serde_json::from_str::<serde_json::Value>(&list).unwrap()).unwrap();
        let lines: String = serde_json::from_str::<Vec<serde_json::Value>>(&list)
            .unwrap()
            .iter()
            .map(|shown| format!("{shown}\n"))
            .collect();
        for (to, input) in [("sqlite", &list), ("file", &pretty), ("json", &lines), ("file", &list), ("json", &list)] {
            let target = Place::new(to);
            let output = target.with_input("import", &["-"], input);
            assert_eq!(output.status.code(), Some(0), "{from} to {to}: {}", all(&output));
            assert!(stdout(&output).starts_with("5 tokens imported, 0 known before"), "{}", all(&output));
            assert_eq!(target.ok("list", &["--json"]), list, "{from} to {to}");
            // The second time everything is known, and nothing differs.
            let output = target.with_input("import", &["-"], input);
            assert_eq!(output.status.code(), Some(0), "{from} to {to}: {}", all(&output));
            assert!(
                stdout(&output).starts_with("0 tokens imported, 5 known before") && stderr(&output).is_empty(),
                "{}",
                all(&output)
            );
            pairs += 1;
        }
        // One record as `show` and `create` print it.
        let target = Place::new(from);
        target.import(&source.ok("show", &[&id("a"), "--json"]));
        target.import(&source.ok("create", &["--user", "eve", "--json"]));
        assert_eq!(target.json("list", &[]).as_array().unwrap().len(), 2);
    }
    assert_eq!(pairs, 15);
}

#[test]
fn an_import_names_what_is_wrong_and_where() {
    for place in Place::all() {
        let lines: String = (0..60)
            .map(|n| match n % 2 {
                0 => format!("{{\"token\":\"t{n}\",\"user\":\"u\"}}\n"),
                _ => format!("{{\"token\":\"t{n}\",\"user\":\"u\",\"expires\":\"S3CRET\"}}\n"),
            })
            .collect();
        let said = place.failed("import", &place.with_input("import", &["-"], &lines));
        assert!(said.contains("nothing was imported: 30 entries are wrong"), "{said}");
        let named: Vec<_> = said.lines().filter(|line| line.starts_with("line ")).collect();
        assert_eq!(named.len(), 20, "{said}");
        assert_eq!(named[0], "line 2, column 36: expires: must be a time like 2026-12-31T23:59:59Z");
        assert_eq!(named[19], "line 40, column 37: expires: must be a time like 2026-12-31T23:59:59Z");
        assert!(said.ends_with("\nand 10 more\n") && !said.contains("S3CRET"), "{said}");
        assert_eq!(place.json("list", &[]), serde_json::json!([]), "{}: something was imported", place.kind);
        // A truncated list is an error.
        let said = place
            .failed("import", &place.with_input("import", &["-"], "[{\"token\":\"t\",\"user\":\"u\"},\n{\"token\":"));
        assert!(said.contains("line 2, column 10: the array does not end"), "{said}");
        assert_eq!(place.json("list", &[]), serde_json::json!([]), "{}: something was imported", place.kind);
    }
}

#[test]
fn an_import_says_when_a_known_token_is_somebody_elses() {
    for place in Place::all() {
        place.import("{\"token\":\"a\",\"user\":\"alice\"}\n{\"token\":\"b\",\"user\":\"bob\"}\n");
        let lines = "{\"token\":\"a\",\"user\":\"mallory\"}\n{\"token\":\"b\",\"user\":\"bob\",\"revoked\":true}\n\
                     {\"token\":\"c\",\"user\":\"carol\"}\n{\"token\":\"c\",\"user\":\"eve\"}\n";
        let output = place.with_input("import", &["-"], lines);
        assert_eq!(output.status.code(), Some(1), "{}: {}", place.kind, all(&output));
        assert!(stdout(&output).starts_with("1 tokens imported, 3 known before"), "{}", all(&output));
        let said = stderr(&output);
        for part in [
            "3 of the known tokens differ from the input, and stay as they are".to_owned(),
            format!("token {} belongs to \"alice\" here, and to \"mallory\" in the input", id("a")),
            format!("token {} is revoked in the input, and not here", id("b")),
            format!("token {} belongs to \"carol\" here, and to \"eve\" in the input", id("c")),
        ] {
            assert!(said.contains(&part), "{part}: {said}");
        }
        for (token, user) in [("a", "alice"), ("b", "bob"), ("c", "carol")] {
            let shown = place.json("show", &[&id(token)]);
            assert_eq!((shown["user"].as_str(), shown["revoked"].is_null()), (Some(user), true), "{}", place.kind);
        }
        let output = place.with_input("import", &["-", "--json"], lines);
        assert_eq!(output.status.code(), Some(1), "{}", all(&output));
        let said: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
        assert_eq!((&said["imported"], &said["known"], &said["differing"]), (&0.into(), &4.into(), &3.into()));
    }
}

// ---- last used ----

#[test]
fn the_last_use_survives_a_stop_and_a_change_of_the_record() {
    let upstream = Upstream::start();
    let place = Place::new("sqlite");
    let tokens = ["kept", "revoked", "rotated", "blocked", "imported", "unused"];
    let lines: String =
        tokens.iter().map(|token| format!("{{\"token\":\"{token}\",\"user\":\"{token}\"}}\n")).collect();
    place.import(&lines);
    let mut gateway = Gateway::start(upstream.address, &place.section());
    for token in &tokens[..5] {
        assert_eq!(status(&gateway, token), 200, "{token}");
    }
    assert!(place.ok("show", &[&id("kept")]).contains("last used    never"));
    place.ok("revoke", &[&id("revoked"), "--wait"]);
    place.ok("rotate", &[&id("rotated")]);
    place.ok("block", &["blocked"]);
    place.import(&lines);
    eventually("revoked and blocked", || status(&gateway, "revoked") == 401 && status(&gateway, "blocked") == 401);
    gateway.signal("TERM");
    assert!(gateway.ended().success());
    for token in &tokens[..5] {
        assert!(
            place.json("show", &[&id(token)])["last_used"].is_string(),
            "{token} was used: {}",
            gateway.process_log()
        );
    }
    assert!(place.json("show", &[&id("unused")])["last_used"].is_null());
    place.ok("unblock", &["blocked"]);
    assert!(place.json("show", &[&id("blocked")])["last_used"].is_string());
}

#[test]
fn a_reload_that_changes_the_store_keeps_the_last_use() {
    let upstream = Upstream::start();
    let (first, second) = (Place::new("sqlite"), Place::new("sqlite"));
    first.import("{\"token\":\"a\",\"user\":\"u\"}\n");
    let gateway = Gateway::start(upstream.address, &first.section());
    assert_eq!(status(&gateway, "a"), 200);
    let config = gateway.folder.0.join("tollgate.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let [old, new] = [&first, &second].map(|place| place.file().display().to_string());
    std::fs::write(&config, text.replace(&old, &new)).unwrap();
    second.ok("list", &[]);
    assert_eq!(gateway.admin_post("/reload").status, 200);
    eventually("the first store is told", || first.json("show", &[&id("a")])["last_used"].is_string());
}

#[test]
fn a_store_without_uses_does_not_say_never() {
    let place = Place::new("file");
    place.import(
        "{\"token\":\"a\",\"user\":\"u\"}\n{\"token\":\"b\",\"user\":\"u\",\"last_used\":\"2026-01-01T00:00:00Z\"}\n",
    );
    assert!(place.ok("show", &[&id("a")]).contains("last used    not recorded"));
    assert!(place.ok("show", &[&id("b")]).contains("last used    2026-01-01T00:00:00Z"));
    let narrow = place.ok("list", &[]);
    assert!(!narrow.contains("LAST USED") && !narrow.contains("never"), "{narrow}");
    let list = place.ok("list", &["--wide"]);
    assert!(list.contains("not recorded") && !list.contains("never"), "{list}");
    assert!(Place::new("sqlite").ok("list", &[]).lines().count() == 1);
}

/// With an empty database that a reading command created, the next gateway would start.
#[test]
fn a_command_that_creates_no_token_creates_no_database() {
    let folder = Folder::new("test");
    let config = folder.write("tollgate.toml", "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n");
    let token = |args: &[&str]| run(tollgate().arg("token").args(args).arg("--config").arg(&config));
    let commands =
        [(&["list"][..], 0), (&["show", "0123456789ab"], 1), (&["revoke", "0123456789ab"], 1), (&["block", "ann"], 1)];
    for (command, code) in commands {
        assert_eq!(token(command).status.code(), Some(code), "{command:?}");
        assert!(!folder.0.join("tollgate.db").exists(), "{command:?} made a database");
    }
    assert!(token(&["create", "--user", "ann"]).status.success());
    assert!(stdout(&token(&["list"])).contains("ann"));
}

// ---- many tokens ----

/// Tokens of every kind; a token's name says what it is.
fn assorted(place: &Place) {
    let line = |token: &str, user: &str, more: &str| {
        format!("{{\"token\":\"{token}\",\"user\":\"{user}\",\"created\":\"2026-01-01T00:00:00Z\"{more}}}\n")
    };
    let soon = time_from_now("5 days");
    let late = time_from_now("60 days");
    place.import(
        &[
            line("active", "ann", ",\"scopes\":[\"api\"],\"last_used\":\"2026-02-01T00:00:00Z\""),
            line("soon", "ann", &format!(",\"expires\":\"{soon}\",\"scopes\":[\"api\",\"read_api\"]")),
            line("late", "bob", &format!(",\"expires\":\"{late}\",\"scopes\":[\"read_api\"]")),
            line("expired", "bob", ",\"expires\":\"2026-03-01T00:00:00Z\""),
            line("revoked", "bob", ",\"revoked\":\"2026-04-01T00:00:00Z\""),
            line("blocked", "eve", ",\"blocked\":true"),
            line("later", "ann", &format!(",\"not_before\":\"{late}\"")),
            line("rotated", "ann", &format!(",\"superseded\":\"2026-05-01T00:00:00Z\",\"expires\":\"{soon}\"")),
        ]
        .concat(),
    );
}

fn time_from_now(span: &str) -> String {
    stdout(&run(Command::new("date").args(["-u", "-d", &format!("now + {span}"), "+%Y-%m-%dT%H:%M:%SZ"])))
        .trim()
        .to_owned()
}

const ASSORTED: [&str; 8] = ["active", "soon", "late", "expired", "revoked", "blocked", "later", "rotated"];

#[test]
fn a_list_has_what_it_was_asked_for() {
    for place in Place::all() {
        assorted(&place);
        let ids: Vec<_> = ASSORTED.iter().map(|name| (id(name), *name)).collect();
        let names = |arguments: &[&str]| {
            let listed = place.json("list", arguments);
            let named = listed.as_array().unwrap().iter().map(|shown| {
                let id = shown["id"].as_str().unwrap();
                ids.iter().find(|(known, _)| known == id).unwrap().1
            });
            named.collect::<Vec<_>>()
        };
        let sorted = |arguments: &[&str]| {
            let mut names = names(arguments);
            names.sort();
            names.join(" ")
        };
        for (arguments, expected) in [
            (&["--user", "ann"][..], "active later rotated soon"),
            (&["--user", "nobody"], ""),
            (&["--state", "valid"], "active late rotated soon"),
            (&["--state", "expired,revoked"], "expired revoked"),
            (&["--state", "expired", "--state", "not-yet"], "expired later"),
            (&["--state", "blocked"], "blocked"),
            (&["--state", "rotated", "--user", "ann"], "rotated"),
            (&["--scope", "read_api"], "late soon"),
            (&["--scope", "read"], ""),
            (&["--expires-within", "14days"], "rotated soon"),
            (&["--expires-within", "14days", "--state", "active"], "soon"),
        ] {
            assert_eq!(sorted(arguments), expected, "{} {arguments:?}", place.kind);
        }
        assert_eq!(names(&["--sort", "expires"])[0], "expired", "{}", place.kind);
        assert_eq!(names(&["--sort", "user", "--limit", "5"])[4..], names(&["--user", "bob", "--limit", "1"]));
        // Pages are the whole, and a note says that there are more.
        for order in ["created", "expires", "last-used", "user"] {
            let whole = names(&["--sort", order]);
            let (mut paged, mut after) = (Vec::new(), None::<String>);
            loop {
                let more = after.iter().flat_map(|after| ["--after", after.as_str()]);
                let arguments: Vec<_> = ["--sort", order, "--limit", "3"].into_iter().chain(more).collect();
                let output = place.token("list", &arguments);
                let page = names(&arguments);
                paged.extend(page.iter().copied());
                let said = stderr(&output);
                let next = said.trim().strip_prefix("there are more: --after ").map(str::to_owned);
                assert_eq!(next.is_some(), paged.len() < whole.len(), "{}: {said}", place.kind);
                assert_eq!(stdout(&output).lines().count(), page.len() + 1, "{}", all(&output));
                let Some(next) = next else { break };
                after = Some(next);
            }
            assert_eq!((paged, whole.len()), (whole, 8), "{} by {order}", place.kind);
        }
        let unused = place.token("list", &["--unused-since", "2026-01-15T00:00:00Z", "--state", "valid"]);
        if place.kind == "sqlite" {
            assert_eq!(sorted(&["--unused-since", "2026-01-15T00:00:00Z", "--state", "valid"]), "late rotated soon");
        } else {
            assert_eq!(unused.status.code(), Some(1));
            assert!(stderr(&unused).contains("does not note when tokens are used"), "{}", all(&unused));
        }
        for (arguments, code) in [
            (&["--state", "dead"][..], USAGE),
            (&["--limit", "0"], USAGE),
            (&["--sort", "size"], USAGE),
            (&["--expires-within", "soon"], USAGE),
            (&["--unused-since", "2999-01-01T00:00:00Z"], USAGE),
            (&["--after", "0123456789ab"], 1),
            (&["--after", "short"], 1),
        ] {
            assert_eq!(place.token("list", arguments).status.code(), Some(code), "{} {arguments:?}", place.kind);
        }
        // For people: what fits into 80 columns, and everything.
        let text = place.ok("list", &[]);
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert!(text.starts_with("ID            USER              STATE     EXPIRES"), "{text}");
        assert!(text.lines().any(|line| line.contains("ann") && line.ends_with("api read_api")), "{text}");
        let wide = place.ok("list", &["--wide"]);
        assert!(
            wide.contains("2026-01-01T00:00:00Z") && wide.lines().next().unwrap().ends_with("DESCRIPTION"),
            "{wide}"
        );
    }
}

#[test]
fn an_id_names_one_token_or_none() {
    for place in Place::all() {
        // Of the same first eleven digits.
        let digests = ["a", "b"].map(|end| format!("{}{end}{}", "abcdef01234", "0".repeat(52)));
        let line = |sha256: &String| format!("{{\"sha256\":\"{sha256}\",\"user\":\"u\"}}\n");
        place.import(&digests.each_ref().map(line).concat());
        for command in ["show", "revoke", "rotate", "delete"] {
            let said = place.fails(command, &["abcdef01234"]);
            assert!(said.contains("2 tokens of store ") && said.contains("give more digits"), "{command}: {said}");
            for short in ["abcde", "", "abcdefg", &"a".repeat(65)] {
                assert!(place.fails(command, &[short]).contains("an id is 6 to 64 hex digits"), "{command} {short}");
            }
        }
        let said = place.fails("list", &["--after", "ABCDEF"]);
        assert!(said.contains("several tokens begin with it"), "{said}");
        place.ok("delete", &["ABCDEF01234B"]);
        assert!(place.ok("show", &["abcdef"]).contains(&digests[0]), "{}", place.kind);
    }
}

#[test]
fn pages_neither_skip_nor_double_a_token_while_others_are_made() {
    for place in Place::both() {
        assorted(&place);
        for order in ["created", "expires", "last-used", "user"] {
            let whole: Vec<_> = place.json("list", &[]).as_array().unwrap().iter().map(sha256_of).collect();
            let (mut seen, mut after) = (Vec::new(), None::<String>);
            loop {
                let more = after.iter().flat_map(|after| ["--after", after.as_str()]);
                let arguments: Vec<_> = ["--sort", order, "--limit", "3"].into_iter().chain(more).collect();
                let page = place.json("list", &arguments);
                let page = page.as_array().unwrap();
                seen.extend(page.iter().map(sha256_of));
                let Some(last) = page.get(2) else { break };
                after = last["id"].as_str().map(str::to_owned);
                // In front of everything, and, by name or by use, somewhere in between.
                place.ok("create", &["--user", "beth", "--expires", "30days"]);
            }
            for sha256 in &whole {
                assert_eq!(seen.iter().filter(|seen| *seen == sha256).count(), 1, "{} by {order}", place.kind);
            }
            assert!(seen.iter().collect::<std::collections::BTreeSet<_>>().len() == seen.len(), "{order}");
        }
    }
}

fn sha256_of(shown: &serde_json::Value) -> String {
    shown["sha256"].as_str().unwrap().to_owned()
}

/// What takes long says so on a terminal, and takes it back; elsewhere standard error has messages alone.
#[test]
fn progress_is_for_terminals() {
    let place = Place::new("sqlite");
    let input = place.folder.0.join("input");
    assert!(run(Command::new("mkfifo").arg(&input)).status.success());
    let config = place.folder.0.join("tollgate.toml");
    let command =
        format!("{} token import -c {} {}", env!("CARGO_BIN_EXE_tollgate"), config.display(), input.display());
    let mut script = Command::new("script");
    script.args(["-qec", &command, "/dev/null"]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = script.spawn().unwrap();
    let mut writer = std::fs::File::options().write(true).open(&input).unwrap();
    let (mut said, mut byte) = (Vec::new(), [0]);
    // As long as nothing comes, it says what it waits for.
    while !String::from_utf8_lossy(&said).contains("reading: 0 s") {
        assert_eq!(std::io::Read::read(child.stdout.as_mut().unwrap(), &mut byte).unwrap(), 1);
        said.push(byte[0]);
    }
    writer.write_all(b"{\"token\":\"a\",\"user\":\"u\"}\n").unwrap();
    drop(writer);
    let output = child.wait_with_output().unwrap();
    let rest = stdout(&output);
    assert!(output.status.success() && rest.contains("\r\u{1b}[K1 tokens imported"), "{rest:?}");

    let mut other = place.command(&["token", "import"], &[input.to_str().unwrap()]);
    let child = other.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut writer = std::fs::File::options().write(true).open(&input).unwrap();
    // Longer than until the first line would be shown.
    std::thread::sleep(Duration::from_millis(600));
    writer.write_all(b"{\"token\":\"b\",\"user\":\"u\"}\n").unwrap();
    drop(writer);
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), &*stderr(&output)), (Some(0), ""), "{}", all(&output));
}

#[test]
fn a_long_name_is_cut_on_a_terminal_only() {
    let place = Place::new("sqlite");
    let user = "somebody-with-a-very-long-name@example.com";
    place.ok("create", &["--user", user, "--scope", "one-scope-that-is-long", "--scope", "another-scope"]);
    assert!(place.ok("list", &[]).contains(user));
    let command = format!(
        "stty rows 24 cols 80; {} token list -c {}",
        env!("CARGO_BIN_EXE_tollgate"),
        place.folder.0.join("tollgate.toml").display()
    );
    let shown = stdout(&run(Command::new("script").args(["-qec", &command, "/dev/null"])));
    assert!(shown.contains("somebody-with-a…") && !shown.contains(user), "{shown}");
    let widest = shown.lines().map(|line| line.trim_end().chars().count()).max().unwrap();
    assert!((70..=80).contains(&widest), "{widest}: {shown}");
}

#[test]
fn a_users_tokens_are_revoked_and_what_changed_nothing_is_an_error() {
    for place in Place::all() {
        assorted(&place);
        assert_eq!(
            place.ok("revoke", &["--user", "bob"]),
            "2 tokens of bob are revoked; 1 was before\n",
            "{}",
            place.kind
        );
        for name in ["late", "expired", "revoked"] {
            assert_eq!(place.state(name), "revoked", "{}", place.kind);
        }
        assert_eq!(place.state("active"), "active", "{}", place.kind);
        assert!(place.json("show", &[&id("revoked")])["revoked"] == "2026-04-01T00:00:00Z", "{}", place.kind);
        assert!(
            place.fails("revoke", &["--user", "bob"]).contains("none was revoked: 3 tokens of bob were revoked before")
        );
        assert!(place.fails("revoke", &["--user", "bobby"]).contains("has no token of \"bobby\": none was revoked"));
        let json = place.json("revoke", &["--user", "eve"]);
        assert_eq!(json, serde_json::json!({ "user": "eve", "revoked": 1, "revoked_before": 0 }), "{}", place.kind);
        for arguments in [&[][..], &["--user", "ann", "0123456789ab"]] {
            assert_eq!(place.token("revoke", arguments).status.code(), Some(USAGE), "{arguments:?}");
        }
    }
}

#[test]
fn a_record_is_deleted_and_the_rest_of_the_file_stays() {
    for place in Place::all() {
        assorted(&place);
        assert_eq!(
            place.ok("delete", &[&id("active")]),
            format!("token {} of ann is deleted; it was active\n", id("active"))
        );
        assert!(place.fails("show", &[&id("active")]).contains("no such token"));
        assert!(place.fails("delete", &[&id("active")]).contains("no such token"));
        let json = place.json("delete", &[&id("late")]);
        assert_eq!((json["deleted"].as_bool(), json["user"].as_str()), (Some(true), Some("bob")), "{}", place.kind);
        assert_eq!(place.json("list", &[]).as_array().unwrap().len(), 6, "{}", place.kind);
    }
    // In every way that a file may be written; the comments of others stay.
    let (a, b) = (sha256_hex("a"), sha256_hex("b"));
    let entries = [
        format!(
            "# C1\n[[token]]\nsha256 = \"{a}\"\nuser = \"a\"\n\n# C2\n[[token]]\nsha256 = \"{b}\"\nuser = \"b\"\n# C3\n"
        ),
        format!(
            "# C3\ntoken = [\n  {{ sha256 = \"{a}\", user = \"a\" }},\n  # C2\n  {{ sha256 = \"{b}\", user = \"b\" }}\n]\n"
        ),
        format!("token=[{{sha256=\"{a}\",user=\"a\"}},{{user='b',sha256='{b}'}},] # C3 C2"),
    ];
    for text in &entries {
        let place = Place::new("file");
        std::fs::write(place.file(), text).unwrap();
        place.ok("delete", &[&id("a")]);
        let new = std::fs::read_to_string(place.file()).unwrap();
        assert!(new.contains("C2") && new.contains("C3") && !new.contains(&a) && new.contains(&b), "{text}\n=>\n{new}");
        assert_eq!(read_by_python(&place.file())["token"].as_array().unwrap().len(), 1, "{new}");
        place.ok("delete", &[&id("b")]);
        assert_eq!(place.json("list", &[]), serde_json::json!([]));
        // Gateways refuse to read an empty file: it may be half written.
        assert!(!std::fs::read_to_string(place.file()).unwrap().trim().is_empty(), "{text}");
        place.ok("create", &["--user", "c"]);
        assert_eq!(place.json("list", &[]).as_array().unwrap().len(), 1, "{text}");
    }
}

#[test]
fn what_ended_long_ago_is_pruned_when_that_is_meant() {
    for place in Place::all() {
        assorted(&place);
        let before = ["--ended-before", "2026-03-15T00:00:00Z"];
        let said =
            "would delete 1 token that ended before 2026-03-15T00:00:00Z: 0 revoked, 1 expired; --delete does it\n";
        assert_eq!(place.ok("prune", &before), said, "{}", place.kind);
        assert_eq!(place.json("list", &[]).as_array().unwrap().len(), 8, "{}", place.kind);
        let json = place.json("prune", &["--ended-before", "2026-04-15T00:00:00Z"]);
        let expected = serde_json::json!({
            "ended_before": "2026-04-15T00:00:00Z", "tokens": 2, "revoked": 1, "expired": 1, "deleted": false, "kept": 0
        });
        assert_eq!(json, expected, "{}", place.kind);
        let done = place.ok("prune", &["--ended-before", "1s", "--delete"]);
        assert!(done.starts_with("deleted 2 tokens that ended before "), "{}: {done}", place.kind);
        let mut left: Vec<_> =
            ASSORTED.into_iter().filter(|name| place.token("show", &[&id(name)]).status.success()).collect();
        left.sort_unstable();
        assert_eq!(left, ["active", "blocked", "late", "later", "rotated", "soon"], "{}", place.kind);
        assert!(place.ok("prune", &["--ended-before", "1s", "--delete"]).starts_with("no token ended before "));
        for arguments in [&[][..], &["--ended-before", "later"], &["--ended-before", "2999-01-01T00:00:00Z"]] {
            assert_eq!(place.token("prune", arguments).status.code(), Some(USAGE), "{arguments:?}");
        }
    }
    // A revocation without a time may be of today.
    let place = Place::new("file");
    std::fs::write(
        place.file(),
        format!("[[token]]\nsha256 = \"{}\"\nuser = \"a\"\nrevoked = true\n", sha256_hex("a")),
    )
    .unwrap();
    assert!(place.ok("prune", &["--ended-before", "1s", "--delete"]).starts_with("no token"));
}

#[test]
fn a_token_that_is_renewed_while_prune_runs_stays() {
    let place = Place::new("file");
    let line = |token: &str| format!("{{\"token\":\"{token}\",\"user\":\"u\",\"expires\":\"2026-03-01T00:00:00Z\"}}\n");
    place.import(&["a", "b"].map(line).concat());
    // Another command writes.
    let folder = std::fs::canonicalize(&place.folder.0).unwrap();
    let lock = std::fs::File::open(&folder).unwrap();
    let lock = nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusive).unwrap();
    let mut prune = place.command(&["token", "prune"], &["--ended-before", "1s", "--delete", "--json"]);
    let child = prune.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let opened = format!("/proc/{}/fd", child.id());
    eventually("it has read the tokens, and waits for the folder", || {
        let mut all = std::fs::read_dir(&opened).unwrap();
        all.any(|fd| std::fs::read_link(fd.unwrap().path()).is_ok_and(|target| target == folder))
    });
    let text = std::fs::read_to_string(place.file()).unwrap();
    std::fs::write(place.file(), text.replacen("2026-03-01", "2099-03-01", 1)).unwrap();
    drop(lock);
    let output = child.wait_with_output().unwrap();
    let said: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!((&said["tokens"], &said["kept"], &said["deleted"]), (&2.into(), &1.into(), &true.into()), "{said}");
    let left = place.json("list", &[]);
    assert_eq!((left.as_array().unwrap().len(), left[0]["expires"].as_str()), (1, Some("2099-03-01T00:00:00Z")));
}
