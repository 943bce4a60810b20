//! How a configuration is found, put together and begun: the search, `${NAME}`, `include` and `tollgate init`.

use super::*;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;

/// Runs in a folder, with these variables and no others of ours.
fn run_in(folder: &Folder, variables: &[(&str, &str)], arguments: &[&str]) -> Output {
    let mut command = tollgate();
    command.current_dir(&folder.0).env_remove("TOLLGATE_CONFIG").envs(variables.iter().copied()).args(arguments);
    run(&mut command)
}

fn is_root() -> bool {
    stdout(&run(Command::new("id").arg("-u"))).trim() == "0"
}

fn with_store(path: &str) -> String {
    format!("{UPSTREAM}[store]\npath = \"{path}\"\n")
}

#[test]
fn a_configuration_is_found_in_one_order_by_every_command() {
    let folder = Folder::new("found");
    folder.write("named.toml", &with_store("named.db"));
    folder.write("variable.toml", &with_store("variable.db"));
    let check = |variables: &[(&str, &str)], arguments: &[&str]| run_in(&folder, variables, arguments);
    if !std::path::Path::new("/etc/tollgate/tollgate.toml").exists() {
        let nothing = check(&[], &["check"]);
        assert_eq!(nothing.status.code(), Some(USAGE), "{}", all(&nothing));
        for part in ["--config", "TOLLGATE_CONFIG", "./tollgate.toml", "/etc/tollgate/tollgate.toml", "tollgate init"] {
            assert!(stderr(&nothing).contains(part), "{part}: {}", all(&nothing));
        }
    }
    folder.write("tollgate.toml", &with_store("here.db"));
    let variable = [("TOLLGATE_CONFIG", "variable.toml")];
    for (variables, arguments, said) in [
        (&[][..], &["check"][..], "./tollgate.toml: ok (found; --config names another)"),
        (&[("TOLLGATE_CONFIG", "")], &["check"], "./tollgate.toml: ok (found"),
        (&variable, &["check"], "variable.toml: ok (named by TOLLGATE_CONFIG)"),
        (&variable, &["check", "named.toml"], "named.toml: ok\n"),
        (&variable, &["check", "-c", "named.toml"], "named.toml: ok\n"),
        (&variable, &["-c", "named.toml", "check"], "named.toml: ok\n"),
        (&variable, &["--config=named.toml", "check"], "named.toml: ok\n"),
    ] {
        let output = check(variables, arguments);
        assert!(stdout(&output).starts_with(said), "{arguments:?}: {}", all(&output));
    }
    // Every command asks the same function, with the option on either side.
    for (variables, database, arguments) in [
        (&[][..], "here.db", &["token", "create", "--user", "u"][..]),
        (&variable, "variable.db", &["token", "create", "--user", "u"]),
        (&variable, "named.db", &["-c", "named.toml", "token", "create", "--user", "u"]),
        (&variable, "named.db", &["token", "-c", "named.toml", "create", "--user", "u"]),
        (&[], "named.db", &["token", "create", "--user", "u", "--config", "named.toml"]),
    ] {
        let output = check(variables, arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", all(&output));
        std::fs::remove_file(folder.0.join(database)).unwrap_or_else(|error| panic!("{arguments:?}: {error}"));
    }
    let wrong_store = check(&variable, &["store", "check", "--store", "none"]);
    assert!(
        stderr(&wrong_store).contains("note: the configuration is variable.toml (named by"),
        "{}",
        all(&wrong_store)
    );
    folder.write("tollgate.toml", "[admin]\nlisten = \"127.0.0.1:1\"\n");
    for command in [&["reload"][..], &["upgrade"], &["server", "drain", "api", "a:1"]] {
        let output = check(&[], command);
        assert_eq!(output.status.code(), Some(1), "{}", all(&output));
        assert!(stderr(&output).contains("127.0.0.1:1: "), "{}", all(&output));
        assert!(stderr(&output).contains("note: the configuration is ./tollgate.toml (found"), "{}", all(&output));
    }
    let run = check(&[], &["run"]);
    assert!(run.status.code() == Some(USAGE) && stderr(&run).contains("./tollgate.toml: upstream"), "{}", all(&run));
    // A name is not passed over, and is not given twice.
    for (variables, arguments, part) in [
        (&[("TOLLGATE_CONFIG", "gone.toml")][..], &["check"][..], "gone.toml: cannot be read"),
        (&[], &["check", "-c", "gone.toml"], "gone.toml: cannot be read"),
        (&[], &["check", "gone.toml"], "gone.toml: cannot be read"),
        (&[], &["check", "named.toml", "-c", "named.toml"], "given twice"),
        (&[], &["demo", "-c", "named.toml"], "reads no configuration"),
        (&[], &["-c", "named.toml", "example-config"], "reads no configuration"),
    ] {
        let output = check(variables, arguments);
        assert_eq!(output.status.code(), Some(USAGE), "{arguments:?}: {}", all(&output));
        assert!(stderr(&output).contains(part), "{arguments:?}: {}", all(&output));
    }
}

#[test]
fn root_reads_no_file_that_others_can_write_unless_it_is_named() {
    let folder = Folder::new("trust");
    let file = folder.write("tollgate.toml", UPSTREAM);
    std::fs::create_dir(folder.0.join("conf.d")).unwrap();
    let included = folder.write("conf.d/a.toml", "[log]\nlevel = \"warn\"\n");
    let main = folder.write("main.toml", &format!("include = [\"conf.d/*.toml\"]\n{UPSTREAM}"));
    let mode = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let check = |arguments: &[&str]| {
        let output = run_in(&folder, &[], &[&["check"], arguments].concat());
        (output.status.code(), all(&output))
    };
    mode(&file, 0o644);
    assert_eq!(check(&[]).0, Some(0), "{}", check(&[]).1);
    assert_eq!(check(&["main.toml"]).0, Some(0), "{}", check(&["main.toml"]).1);
    let refused = if is_root() { Some(USAGE) } else { Some(0) };
    for (path, open, closed) in [(&file, 0o666, 0o644), (&folder.0, 0o777, 0o755)] {
        mode(path, open);
        let (code, said) = check(&[]);
        assert_eq!(code, refused, "{said}");
        assert!(code == Some(0) || said.contains("can be written by everybody; name it with --config"), "{said}");
        assert_eq!(check(&["tollgate.toml"]).0, Some(0), "who names it means it");
        mode(path, closed);
    }
    for (path, open, closed) in [(&included, 0o666, 0o644), (&folder.0.join("conf.d"), 0o777, 0o755)] {
        mode(path, open);
        let (code, said) = check(&["main.toml"]);
        assert_eq!(code, refused, "{said}");
        assert!(code == Some(0) || said.contains("main.toml:1:12: include: conf.d/a.toml is not read"), "{said}");
        mode(path, closed);
    }
    mode(&main, 0o666);
    assert_eq!(check(&["main.toml"]).0, Some(0), "who names it means it");
}

#[test]
fn variables_stand_in_strings_and_are_never_shown() {
    let folder = Folder::new("env");
    let secret = "S3CRET-value";
    folder.write("secret", "S3CRET-value\n");
    let check = |text: &str, variables: &[(&str, &str)]| {
        folder.write("c.toml", text);
        let output = run_in(&folder, variables, &["check", "--offline", "c.toml"]);
        let json = run_in(&folder, variables, &["check", "--offline", "--json", "c.toml"]);
        assert!(!all(&output).contains("S3CRET") && !all(&json).contains("S3CRET"), "{text}: {}", all(&output));
        (output.status.code(), all(&output))
    };
    let upstream = |address: &str| format!("[[upstream]]\nname = \"api\"\nservers = [\"{address}\"]\n");
    // A value cannot change the structure.
    let (code, said) = check(&upstream("${BACKEND}"), &[("BACKEND", "127.0.0.1:1\"]\n[log]\nlevel = \"warn")]);
    assert!(code == Some(USAGE) && said.contains("c.toml:3:12: upstream[0].servers"), "{said}");
    assert!(said.contains("found \"${BACKEND}\""), "{said}");
    assert_eq!(check(&upstream("${HOST}:${PORT}"), &[("HOST", "127.0.0.1"), ("PORT", "80")]).0, Some(0));
    for (text, part) in [
        (
            upstream("${GONE}:80"),
            "c.toml:3:12: upstream[0].servers[0]: the environment variable GONE is not set; set GONE",
        ),
        (upstream("${GONE"), "c.toml:3:12: upstream[0].servers[0]: has a `${` without its `}`"),
        // Errors that would quote what stood there.
        (
            upstream("${SECRET}"),
            "c.toml:3:12: upstream[0].servers: is not the address of a server, found \"${SECRET}\"",
        ),
        (upstream("${file:secret}"), "found \"${file:secret}\""),
        (upstream("${credential:secret}"), "found \"${credential:secret}\""),
        (format!("{UPSTREAM}[log]\naccess = \"${{SECRET}}/a/b\"\n"), "log.access: ${SECRET}/a/b cannot be written"),
        (
            format!("{UPSTREAM}[[store]]\nname = \"${{SECRET}}\"\n[[store]]\nname = \"${{SECRET}}\"\n"),
            "\"${SECRET}\" is the name",
        ),
        (
            format!("{UPSTREAM}[store]\nkind = \"file\"\npath = \"${{SECRET}}\"\n"),
            "store.path: ${SECRET}: No such file",
        ),
        (format!("{UPSTREAM}[store]\nkind = \"postgres\"\nurl = \"${{SECRET}}\"\n"), "store.url"),
    ] {
        let variables = [("SECRET", secret), ("CREDENTIALS_DIRECTORY", folder.0.to_str().unwrap())];
        let (code, said) = check(&text, &variables);
        assert_eq!(code, Some(USAGE), "{text}: {said}");
        assert!(said.contains(part), "{text}: {said}");
        assert_eq!(said.lines().last(), Some("1 error"), "{text}: {said}");
    }
    // What `check` lists, and a literal.
    let open = format!(
        "{UPSTREAM}[store]\nname = \"${{SECRET}}\"\n[[route]]\npath = \"/api/v3/open\"\nauth = \"none\"\nreason = \"${{SECRET}} $${{X}}\"\n"
    );
    let (code, said) = check(&open, &[("SECRET", secret)]);
    assert!(code == Some(0) && said.contains("/api/v3/open  (any method; no token): ${SECRET} ${X}"), "{said}");
    // The errors of commands that read it.
    folder.write("named.toml", &format!("{UPSTREAM}[[store]]\nname = \"${{SECRET}}\"\npath = \"${{SECRET}}.db\"\n[[store]]\nname = \"b\"\npath = \"b.db\"\n"));
    let mut seen = 0;
    for (arguments, part) in [
        (&["token", "show", "0123456789ab"][..], "no such token in store ${SECRET}"),
        (&["token", "show", "0123456789ab", "--json"], "no such token in store ${SECRET}"),
        (&["token", "list", "--store", "none"], "configured stores: ${SECRET}, b"),
        (&["token", "prune", "--ended-before", "1s", "--store", "b"], "not asked: ${SECRET}"),
        (&["store", "check"], "warning: store ${SECRET}: ${SECRET}.db is not there"),
        (&["store", "check", "--json"], "${SECRET}.db is not there"),
    ] {
        let output = run_in(&folder, &[("SECRET", secret)], &[arguments, &["-c", "named.toml"]].concat());
        assert!(all(&output).contains(part) && !all(&output).contains("S3CRET"), "{arguments:?}: {}", all(&output));
        seen += 1;
    }
    assert_eq!(seen, 6);
    // The start's lines, and a token command.
    let gateway = format!(
        "[server]\nlisten = [\"127.0.0.1:{}\"]\n[admin]\nlisten = \"none\"\n{UPSTREAM}[store]\nname = \"${{SECRET}}\"\npath = \"t.db\"\n",
        free_port()
    );
    let config = folder.write("run.toml", &gateway);
    let mut child = tollgate();
    child.args(["run", "-c"]).arg(config).env("SECRET", secret).stdin(Stdio::null()).stderr(Stdio::piped());
    let mut child = child.spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let said: Vec<String> = lines.by_ref().take(5).map(Result::unwrap).collect();
    drop(child.kill());
    child.wait().unwrap();
    assert!(said.iter().any(|line| line.contains("token stores: ${SECRET}")), "{said:?}");
    assert!(!said.join("\n").contains("S3CRET"), "{said:?}");
}

#[test]
fn included_files_are_one_configuration_and_errors_have_their_places() {
    let folder = Folder::new("include");
    std::fs::create_dir(folder.0.join("conf.d")).unwrap();
    let check = || {
        let output = run_in(&folder, &[], &["check", "--offline", "c.toml"]);
        (output.status.code(), all(&output))
    };
    let route = |path: &str| format!("[[route]]\npath = \"{path}\"\nauth = \"none\"\nreason = \"r\"\n");
    let store = |name: &str| format!("[[store]]\nname = \"{name}\"\npath = \"{name}.db\"\n");
    let first = format!("include = [\"conf.d/*.toml\"]\n{UPSTREAM}{}{}", route("/api/v3/first"), store("first"));
    folder.write("c.toml", &first);
    let (code, said) = check();
    assert!(code == Some(0) && said.contains("c.toml:1:12: warning: include: matches no file"), "{said}");
    // In sorted order, behind the first file; what begins with a dot is an editor's.
    folder.write("conf.d/20.toml", &store("third"));
    let second = format!("{}[cache]\npositive_ttl = \"5s\"\n{}", route("/api/v3/second"), store("second"));
    folder.write("conf.d/10.toml", &second);
    folder.write("conf.d/.10.toml.swp", "not TOML");
    folder.write("conf.d/note.txt", "not TOML");
    let (code, said) = check();
    assert!(code == Some(0) && said.contains("/api/v3/second"), "{said}");
    let stores = said.lines().filter(|line| line.contains("within a second"));
    let names: Vec<_> = stores.map(|line| line.split_whitespace().next().unwrap()).collect();
    assert_eq!(names, ["first", "second", "third"], "{said}");
    // Errors point to the file, and to both.
    for (text, part) in [
        (
            "[cache]\nnegative_ttl = 5\n",
            "conf.d/20.toml:2:16: cache.negative_ttl: must be a time with its unit, found 5",
        ),
        (
            "\n[cache]\npositive_ttl = \"6s\"\n",
            "conf.d/20.toml:3:1: cache.positive_ttl: is set in two files (see conf.d/10.toml:6:1); set it in one of them",
        ),
        ("[[route]]\npath = \"/x\"\n[[rout]]\n", "conf.d/20.toml:3:3: rout: is not a known section"),
        ("a = \n", "conf.d/20.toml:1:"),
        ("a = 1\na = 2\n", "conf.d/20.toml:2:1: `a` is in the file twice (see conf.d/20.toml:1:1)"),
        ("include = [\"x.toml\"]\n", "conf.d/20.toml:1:1: `include` is in an included file"),
        (
            &route("/api/v3/first"),
            "conf.d/20.toml:2:8: route[2].path: is in an earlier [[route]] for the same method and host (see c.toml:",
        ),
        ("[log]\naccess = \"${GONE}\"\n", "conf.d/20.toml:2:10: log.access: the environment variable GONE is not set"),
    ] {
        folder.write("conf.d/20.toml", text);
        let (code, said) = check();
        assert_eq!(code, Some(USAGE), "{text}: {said}");
        assert!(said.contains(part), "{text}: {said}");
        assert_eq!(said.lines().last(), Some("1 error"), "{text}: {said}");
    }
    folder.write("conf.d/20.toml", "");
    for (line, part) in [
        ("include = \"conf.d/*.toml\"", "c.toml:1:11: include: must be a list"),
        ("include = [\"gone.toml\"]", "c.toml:1:12: include: is a file that does not exist, found \"gone.toml\""),
        ("include = [\"conf.d\"]", "c.toml:1:12: include: conf.d is not a file"),
        ("include = [\"conf.d/[\"]", "c.toml:1:12: include: is not a pattern"),
        ("include = [\"${GONE}/*.toml\"]", "c.toml:1:12: include[0]: the environment variable GONE is not set"),
        ("include = [1]", "c.toml:1:12: include: must be a string"),
    ] {
        folder.write("c.toml", &format!("{line}\n{UPSTREAM}"));
        let (code, said) = check();
        assert_eq!(code, Some(USAGE), "{line}: {said}");
        assert!(said.contains(part), "{line}: {said}");
    }
    // A pattern that matches the first file itself, and one file by two patterns.
    folder.write("c.toml", &format!("include = [\"*.toml\", \"conf.d/*.toml\", \"conf.d/10.toml\"]\n{UPSTREAM}"));
    let (code, said) = check();
    assert!(code == Some(0) && said.matches("/api/v3/second").count() == 1, "{said}");
    // The admin listener is found in an included file.
    folder.write("conf.d/20.toml", "[admin]\nlisten = \"127.0.0.1:1\"\n");
    let output = run_in(&folder, &[], &["reload", "-c", "c.toml"]);
    assert!(stderr(&output).contains("127.0.0.1:1: "), "{}", all(&output));
}

#[test]
fn includes_are_found_from_the_first_file_and_what_is_no_file_is_an_error() {
    // A folder whose name is a pattern itself, read from another one.
    let folder = Folder::new("include");
    let inside = folder.0.join("a[bc]*");
    std::fs::create_dir_all(inside.join("S3CRET")).unwrap();
    let route = |path: &str| format!("[[route]]\npath = \"{path}\"\nauth = \"none\"\nreason = \"r\"\n");
    let write = |name: &str, text: &str| std::fs::write(inside.join(name), text).unwrap();
    let check = |include: &str| {
        write("c.toml", &format!("include = [{include}]\n{UPSTREAM}# ${{GONE}} in a comment is nothing\n"));
        let variables = [("WHERE", "S3CRET"), ("X", "a")];
        let output = run_in(&folder, &variables, &["check", "--offline", "a[bc]*/c.toml"]);
        assert!(!all(&output).contains("S3CRET"), "{include}: {}", all(&output));
        (output.status.code(), all(&output))
    };
    write("10.toml", &route("/api/v3/ten"));
    write(".20.toml", "not TOML");
    write("S3CRET/30.toml", &route("/api/v3/thirty"));
    for (include, part) in [
        ("\"[0-9]*.toml\"", "/api/v3/ten"),
        ("\"*0.toml\"", "/api/v3/ten"),
        ("\"10.toml\"", "/api/v3/ten"),
        ("\"${WHERE}/*.toml\"", "/api/v3/thirty"),
        ("\"${WHERE}/30.toml\"", "/api/v3/thirty"),
    ] {
        let (code, said) = check(include);
        assert!(code == Some(0) && said.contains(part), "{include}: {said}");
    }
    // What stood for a name is in no path that is shown.
    write("S3CRET/30.toml", "[cache]\nnegative_ttl = 5\n");
    assert!(check("\"${WHERE}/*.toml\"").1.contains("${WHERE}/30.toml:2:16: cache.negative_ttl"));
    std::fs::write(inside.join("S3CRET/30.toml"), b"\n\n[l\xffog]\n").unwrap();
    let (code, said) = check("\"${WHERE}/30.toml\"");
    assert!(code == Some(USAGE) && said.contains("${WHERE}/30.toml is not UTF-8 in line 3"), "{said}");
    // Nobody waits for a pipe, nor reads a device to its end.
    assert!(run(Command::new("mkfifo").arg(inside.join("pipe"))).status.success());
    std::os::unix::fs::symlink("/dev/zero", inside.join("zero")).unwrap();
    std::fs::create_dir(inside.join("many")).unwrap();
    for number in 0..1_001 {
        write(&format!("many/{number}.toml"), "");
    }
    for (include, part) in [
        ("\"pipe\"", "include: a[bc]*/pipe is not a file, found \"pipe\""),
        ("\"many/*.toml\"", "matches more than 1000 files"),
    ] {
        let (code, said) = check(include);
        assert!(code == Some(USAGE) && said.contains(part), "{include}: {said}");
        assert_eq!(said.lines().filter(|line| line.contains(" error")).count(), 1, "{said}");
    }
    // The file itself: `check FILE` speaks of that file, and of no other that it might have found.
    folder.write("tollgate.toml", UPSTREAM);
    folder.write("key.toml", &format!("{UPSTREAM}\"${{X}}\" = 1\n"));
    for (file, part) in [
        ("a[bc]*/zero", "zero: has more than 16384 KiB"),
        ("a[bc]*", "a[bc]*: cannot be read: Is a directory"),
        ("a[bc]*/S3CRET/30.toml", "30.toml: is not UTF-8 in line 3"),
        ("key.toml", "key.toml:4:1: upstream[0].${X}: is not a known key"),
    ] {
        let output = run_in(&folder, &[("X", "name")], &["check", "--offline", file]);
        assert_eq!(output.status.code(), Some(USAGE), "{file}: {}", all(&output));
        assert!(stderr(&output).contains(part) && !stderr(&output).contains("note:"), "{file}: {}", all(&output));
    }
}

#[test]
fn a_reload_reads_included_files_again_and_watching_covers_them() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let config = gateway.folder.0.join("tollgate.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let open = |path: &str| format!("[[route]]\npath = \"{path}\"\nauth = \"none\"\nreason = \"r\"\n");
    let status = |path: &str| gateway.ask(&format!("GET {path} HTTP/1.1\nHost: h.test\n\n")).status;
    assert_eq!(status("/api/v3/a"), 401);
    gateway.folder.write("a.inc", &open("/api/v3/a"));
    gateway.folder.write("tollgate.toml", &format!("include = [\"*.inc\"]\n{text}"));
    let reload = run(tollgate().args(["reload", "--config"]).arg(&config));
    assert_eq!(reload.status.code(), Some(0), "{}", all(&reload));
    assert!(stdout(&reload).contains("route"), "{}", all(&reload));
    assert_eq!(status("/api/v3/a"), 200);
    // What a file says is the value that changed, though the configuration reads as before.
    let why = open("/api/v3/c").replace("\"r\"", "\"${file:why}\"");
    gateway.folder.write("why", "one\n");
    gateway.folder.write("c.inc", &why);
    for (text, said) in [
        ("one\n", "reloaded; changed and in force: route\n"),
        ("one\nsecond line", "reloaded; no settings changed that can take effect without a restart\n"),
        ("two\n", "reloaded; changed and in force: route\n"),
    ] {
        gateway.folder.write("why", text);
        let reload = run(tollgate().args(["reload", "--config"]).arg(&config));
        assert_eq!((reload.status.code(), &*stdout(&reload)), (Some(0), said), "{text}: {}", all(&reload));
    }
    gateway.folder.write("b.inc", "[[route]]\n");
    let broken = run(tollgate().args(["reload", "--config"]).arg(&config));
    assert_eq!(broken.status.code(), Some(1), "{}", all(&broken));
    assert!(stderr(&broken).contains("b.inc:1:1: route[1].path: is missing"), "{}", all(&broken));
    assert_eq!(status("/api/v3/a"), 200, "nothing changed");
    std::fs::remove_file(gateway.folder.0.join("b.inc")).unwrap();

    let watched = Gateway::start(upstream.address, "[server]\nlisten = [\"@LISTEN@\"]\nwatch = true\n");
    let text = std::fs::read_to_string(watched.folder.0.join("tollgate.toml")).unwrap();
    let status = |path: &str| watched.ask(&format!("GET {path} HTTP/1.1\nHost: h.test\n\n")).status;
    watched.folder.write("tollgate.toml", &format!("include = [\"*.inc\"]\n{text}"));
    watched.folder.write("a.inc", &open("/api/v3/a"));
    eventually("an added file is taken", || status("/api/v3/a") == 200);
    watched.folder.write("a.inc", &open("/api/v3/b"));
    eventually("a changed file is taken", || status("/api/v3/b") == 200 && status("/api/v3/a") == 401);
    std::fs::remove_file(watched.folder.0.join("a.inc")).unwrap();
    eventually("a removed file is taken", || status("/api/v3/b") == 401);
}

// ---- init ----

/// The file must be one that `check` passes, with what it names.
fn passes(folder: &Folder, file: &str) -> String {
    let checked = run_in(folder, &[], &["check", "--offline", file]);
    let text = std::fs::read_to_string(folder.0.join(file)).unwrap();
    assert_eq!(checked.status.code(), Some(0), "{}\n{text}", all(&checked));
    assert!(!stdout(&checked).contains("warning"), "{}\n{text}", all(&checked));
    text
}

#[test]
fn init_writes_what_check_passes_and_replaces_nothing() {
    for (arguments, parts) in [
        (
            &[][..],
            &["servers = [\"127.0.0.1:1\"]", "prefixes = [\"/api/v3\"]", "kind = \"sqlite\"", "forward = \"identity\""]
                [..],
        ),
        (&["--store", "introspection"], &["kind = \"introspection\"", "positive_ttl"]),
        (&["--store", "file"], &["kind = \"file\""]),
        (&["--store", "redis"], &["servers = [\"127.0.0.1:6379\"]"]),
        (&["--store", "redis=r.test:1"], &["servers = [\"r.test:1\"]"]),
        (&["--store", "postgres=postgres://u@127.0.0.1/d"], &["url = \"postgres://u@127.0.0.1/d\""]),
        (&["--tls", "self-signed", "--listen", "127.0.0.1:8443"], &["[[listener]]", "localhost.pem"]),
        (&["--prefix", "/api/v4"], &["prefixes = [\"/api/v4\"]"]),
        (&["--backend", "https://api.test/api/v4"], &["tls = true", "\"api.test:443\"", "prefixes = [\"/api/v4\"]"]),
        (
            &["--backend", "https://api.test/v9", "--store", "introspection"],
            &["endpoint = \"https://api.test:443/v9/user\""],
        ),
        (&["--backend", "unix:/run/api.sock"], &["\"unix:/run/api.sock\""]),
    ] {
        let folder = Folder::new("init");
        let backend = if arguments.contains(&"--backend") { &[][..] } else { &["--backend", "http://127.0.0.1:1"] };
        let made = run_in(&folder, &[], &[&["init"], backend, arguments].concat());
        assert_eq!(made.status.code(), Some(0), "{arguments:?}: {}", all(&made));
        assert!(stdout(&made).starts_with("wrote ./tollgate.toml\n"), "{}", all(&made));
        assert!(stdout(&made).contains("\n  tollgate run &\n"), "{}", all(&made));
        let text = passes(&folder, "tollgate.toml");
        for part in parts {
            assert!(text.contains(part), "{arguments:?}: {part}\n{text}");
        }
        // A backend that gets no token answers 401 itself until it knows of the user: people are told.
        assert_eq!(
            stdout(&made).contains("X-Tollgate-User"),
            text.contains("forward = \"identity\""),
            "{}",
            all(&made)
        );
        // Not again, and again with --force.
        let again = run_in(&folder, &[], &["init", "--backend", "http://127.0.0.1:2"]);
        assert_eq!(again.status.code(), Some(1), "{}", all(&again));
        assert!(stderr(&again).contains("--force"), "{}", all(&again));
        assert_eq!(std::fs::read_to_string(folder.0.join("tollgate.toml")).unwrap(), text);
        let forced =
            run_in(&folder, &[], &[&["init", "--force", "--backend", "http://127.0.0.1:2"], arguments].concat());
        if !arguments.contains(&"--backend") {
            assert_eq!(forced.status.code(), Some(0), "{}", all(&forced));
            assert!(passes(&folder, "tollgate.toml").contains("127.0.0.1:2"));
        }
    }
    let folder = Folder::new("init");
    let before = listing(&folder);
    for (arguments, part) in [
        (&[][..], "--backend is missing, and there is no terminal"),
        (&["--backend", "localhost"], "--backend: \"localhost\" has no port; write it like http://127.0.0.1:3000"),
        (&["--backend", "ftp://a:1"], "neither http nor https"),
        (&["--backend", "a:1", "--store", "stone"], "--store: \"stone\": use one of"),
        (&["--backend", "a:1", "--store", "postgres"], "postgres needs an address"),
        (&["--backend", "http://10.0.0.1", "--store", "introspection"], "in plain text: use https"),
        (&["--backend", "a:1", "--tls", "maybe"], "--tls: \"maybe\""),
        (&["--backend", "a:1", "--tls", "gone.pem,gone.key"], "nothing was written"),
        (&["--backend", "a:1", "--prefix", "api"], "api.prefixes"),
        (&["--backend", "a:1", "--listen", "nowhere"], "server.listen: is not an address"),
    ] {
        let output = run_in(&folder, &[], &[&["init"], arguments].concat());
        assert_eq!(output.status.code(), Some(USAGE), "{arguments:?}: {}", all(&output));
        assert!(stderr(&output).contains(part), "{arguments:?}: {}", all(&output));
        assert_eq!(listing(&folder), before, "{arguments:?}");
    }
    let nowhere = run_in(&folder, &[], &["init", "--backend", "a:1", "--output", "no/folder/c.toml"]);
    assert_eq!(nowhere.status.code(), Some(1), "{}", all(&nowhere));
    let other = run_in(&folder, &[], &["init", "--backend", "a:1", "-o", "c.toml"]);
    assert!(stdout(&other).contains("tollgate run -c c.toml &"), "{}", all(&other));
    passes(&folder, "c.toml");
}

#[test]
fn init_keeps_secrets_and_what_is_there_and_says_what_is_taken() {
    let mode = |folder: &Folder, name: &str| {
        std::fs::metadata(folder.0.join(name)).unwrap_or_else(|error| panic!("{name}: {error}")).permissions().mode()
            & 0o777
    };
    let backend = ["init", "--backend", "http://127.0.0.1:1"];
    let init = |folder: &Folder, arguments: &[&str]| run_in(folder, &[], &[&backend, arguments].concat());
    for (arguments, file, expected) in [
        (&[][..], "tollgate.toml", 0o644),
        (&["--store", "postgres=postgres://u@127.0.0.1/d"], "tollgate.toml", 0o644),
        (&["--store", "postgres=postgres://u:S3CRET@127.0.0.1/d"], "tollgate.toml", 0o600),
        (&["--store", "postgres=host=127.0.0.1 user=u password=S3CRET"], "tollgate.toml", 0o600),
        (&["--store", "file"], "tokens.toml", 0o600),
        (&["--tls", "self-signed"], "localhost.key", 0o600),
    ] {
        let folder = Folder::new("init");
        let made = init(&folder, arguments);
        assert_eq!(made.status.code(), Some(0), "{arguments:?}: {}", all(&made));
        assert!(!all(&made).contains("S3CRET"), "{}", all(&made));
        assert_eq!(mode(&folder, file), expected, "{arguments:?}");
        let is_postgres = arguments.iter().any(|argument| argument.starts_with("postgres"));
        assert_eq!(stdout(&made).contains("\n  tollgate store migrate\n"), is_postgres, "{}", all(&made));
        passes(&folder, "tollgate.toml");
    }
    let folder = Folder::new("init");
    let command = format!("umask 077; {} {}", env!("CARGO_BIN_EXE_tollgate"), backend.join(" "));
    assert!(run(Command::new("sh").args(["-c", &command]).current_dir(&folder.0)).status.success());
    assert_eq!(mode(&folder, "tollgate.toml"), 0o600, "the umask");

    // The commands that it prints are those that work: a found file that others can write is not read by root.
    let folder = Folder::new("init");
    std::fs::set_permissions(&folder.0, std::fs::Permissions::from_mode(0o777)).unwrap();
    let made = init(&folder, &["--listen", "unix:/tmp/api.sock"]);
    let run = if is_root() { "\n  tollgate run -c ./tollgate.toml &\n" } else { "\n  tollgate run &\n" };
    assert!(stdout(&made).contains(run), "{}", all(&made));
    let curl = "  curl --unix-socket /tmp/api.sock -i -H \"PRIVATE-TOKEN: $TOKEN\" http://localhost/api/v3/\n";
    assert!(stdout(&made).contains(curl), "{}", all(&made));

    // Tokens that are there stay, and so does half of a certificate.
    let folder = Folder::new("init");
    let tokens = format!("[[token]]\nsha256 = \"{}\"\nuser = \"ann\"\n", sha256_hex("a"));
    folder.write("tokens.toml", &tokens);
    assert!(init(&folder, &["--store", "file"]).status.success());
    assert_eq!(std::fs::read_to_string(folder.0.join("tokens.toml")).unwrap(), tokens);
    let folder = Folder::new("init");
    folder.write("localhost.pem", "mine");
    let half = init(&folder, &["--tls", "self-signed"]);
    assert!(half.status.code() == Some(1) && stderr(&half).contains("localhost.pem exists"), "{}", all(&half));
    assert_eq!(listing(&folder).len(), 1, "{:?}", listing(&folder));
    // What is refused leaves no certificate behind, and a value is one value.
    let folder = Folder::new("init");
    let quote = "/a\"]\n[log]\nlevel = \"off\"#";
    for (arguments, part) in [
        (&["--tls", "self-signed", "--listen", "nowhere"][..], "is not an address"),
        (&["--tls", "self-signed", "--admin", "nowhere"], "admin.listen: is not an address"),
        (&["--admin", "127.0.0.1:8080"], "admin.listen: repeats the address"),
        (&["--prefix", quote], "api.prefixes"),
        (&["--admin", "unix:x\"\n[log]\n"], "admin.listen"),
    ] {
        let refused = init(&folder, arguments);
        assert_eq!(refused.status.code(), Some(USAGE), "{arguments:?}: {}", all(&refused));
        assert!(
            stderr(&refused).contains("nothing was written") && stderr(&refused).contains(part),
            "{}",
            all(&refused)
        );
        assert!(listing(&folder).is_empty(), "{arguments:?}: {:?}", listing(&folder));
    }

    // Each address is the one that was asked for; one that is taken is said, with what to do.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (taken, free) = (taken.local_addr().unwrap().to_string(), format!("127.0.0.1:{}", free_port()));
    for (listen, admin, option) in [
        (&*free, "none", None),
        (&free, "unix:/tmp/tollgate-admin.sock", None),
        (&free, &taken, Some("--admin")),
        (&taken, "none", Some("--listen")),
    ] {
        let folder = Folder::new("init");
        let made = init(&folder, &["--listen", listen, "--admin", admin]);
        assert_eq!(made.status.code(), Some(0), "{}", all(&made));
        let text = std::fs::read_to_string(folder.0.join("tollgate.toml")).unwrap();
        assert!(text.contains(&format!("[admin]\nlisten = \"{admin}\"\n")), "{text}");
        assert!(text.contains(&format!("listen = [\"{listen}\"]\n")), "{text}");
        let said = option.map(|option| {
            format!(
                "stop the other process, or use another address: --force with another {option} writes the file again"
            )
        });
        match said {
            Some(said) => assert!(
                stderr(&made).contains(&format!("note: {taken} cannot be bound")) && stderr(&made).contains(&said),
                "{}",
                all(&made)
            ),
            None => assert!(!stderr(&made).contains("cannot be bound"), "{}", all(&made)),
        }
    }
}

/// A terminal with a program on it.
fn on_a_terminal(folder: &Folder, arguments: &str) -> std::process::Child {
    let command = format!("{} {arguments}", env!("CARGO_BIN_EXE_tollgate"));
    let mut script = Command::new("script");
    script.args(["-qec", &command, "/dev/null"]).current_dir(&folder.0);
    script.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
}

#[test]
fn a_file_that_appears_while_init_asks_is_not_replaced() {
    let folder = Folder::new("init");
    let mut child = on_a_terminal(&folder, "init");
    let mut first = [0];
    // It has looked, and asks.
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut first).unwrap();
    folder.write("tollgate.toml", "mine");
    child.stdin.take().unwrap().write_all(b"http://127.0.0.1:1\n\n\n\nnone\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", all(&output));
    assert!(stdout(&output).contains("File exists"), "{}", all(&output));
    assert_eq!(std::fs::read_to_string(folder.0.join("tollgate.toml")).unwrap(), "mine");
}

/// On a terminal, as `script` makes one.
#[test]
fn init_asks_on_a_terminal_until_it_has_answers() {
    let folder = Folder::new("init");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap();
    let mut child = on_a_terminal(&folder, &format!("init --admin {taken}"));
    let answers = "nonsense\nhttp://127.0.0.1:1/api/v4\nstone\nfile\n\n\nnowhere\n\n";
    child.stdin.take().unwrap().write_all(answers.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{said}");
    for part in [
        "\"nonsense\" has no port",
        "\"stone\": use one of",
        "[/api/v4]",
        "\"nowhere\": write it like 127.0.0.1:9090",
        "wrote ./tollgate.toml",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let text = passes(&folder, "tollgate.toml");
    assert!(text.contains("prefixes = [\"/api/v4\"]") && text.contains("kind = \"file\""), "{text}");
    // The port that is taken is not offered: the next one that is free is.
    let admin = text.split("[admin]\nlisten = \"").nth(1).and_then(|rest| rest.split('"').next()).unwrap();
    let admin: SocketAddr = admin.parse().unwrap();
    assert!(admin.port() > taken.port() && said.contains(&format!("[{admin}] ")), "{admin}: {said}");
}

// ---- what the command line says of itself ----

#[test]
fn shells_complete_commands_and_every_command_has_a_page() {
    let folder = Folder::new("man");
    for shell in ["bash", "zsh", "fish"] {
        let script = run_in(&folder, &[], &["completions", shell]);
        assert_eq!(script.status.code(), Some(0), "{}", all(&script));
        let text = stdout(&script);
        assert!(text.contains("completions") && text.contains("ended-before") && text.len() > 5_000, "{text}");
        if shell == "bash" {
            folder.write("tollgate.bash", &text);
        }
    }
    assert_eq!(run_in(&folder, &[], &["completions", "tcsh"]).status.code(), Some(USAGE));
    // As bash asks it.
    let ask = "source ./tollgate.bash; COMP_WORDS=(tollgate token pr); COMP_CWORD=2; _tollgate tollgate pr token; echo ${COMPREPLY[@]}";
    let completed = run(Command::new("bash").args(["-c", ask]).current_dir(&folder.0));
    assert_eq!(stdout(&completed).trim(), "prune", "{}", all(&completed));
    std::fs::create_dir(folder.0.join("man1")).unwrap();
    let made = run_in(&folder, &[], &["man", "--output", "man1"]);
    assert_eq!(made.status.code(), Some(0), "{}", all(&made));
    let pages: Vec<_> = std::fs::read_dir(folder.0.join("man1"))
        .unwrap()
        .map(|page| page.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(pages.len() >= 28 && pages.contains(&"tollgate-token-prune.1".to_owned()), "{pages:?}");
    let page = std::fs::read_to_string(folder.0.join("man1/tollgate-token-prune.1")).unwrap();
    assert!(page.contains(".TH") && page.contains("Examples") && page.contains("90days"), "{page}");
    assert!(stdout(&run_in(&folder, &[], &["man"])).contains(".TH tollgate"));
    assert_eq!(run_in(&folder, &[], &["man", "--output", "gone"]).status.code(), Some(1));
}

#[test]
fn errors_are_json_for_who_asked_for_json() {
    let folder = Folder::new("json");
    folder.write("tollgate.toml", &format!("[admin]\nlisten = \"127.0.0.1:1\"\n{UPSTREAM}"));
    for (arguments, code) in [
        (&["token", "show", "0123456789ab", "--json"][..], 1),
        (&["token", "prune", "--ended-before", "soon", "--json"], USAGE),
        (&["reload", "--json"], 1),
        (&["server", "drain", "api", "a:1", "--json"], 1),
        (&["store", "migrate", "--json"], 1),
        (&["store", "check", "--store", "none", "--json"], 1),
    ] {
        let output = run_in(&folder, &[], arguments);
        assert_eq!((output.status.code(), stdout(&output)), (Some(code), String::new()), "{arguments:?}");
        let error: serde_json::Value =
            serde_json::from_str(&stderr(&output)).unwrap_or_else(|_| panic!("{}", all(&output)));
        assert_eq!(error["exit_code"], code, "{arguments:?}");
        assert!(error["error"].as_str().is_some_and(|text| !text.is_empty()), "{arguments:?}");
    }
    // What clap refuses, and an option that this command does not take.
    for arguments in [
        &["token", "list", "--json", "--limit", "0"][..],
        &["token", "list", "--json", "--no-such-option"],
        &["token", "revoke", "--json"],
        &["token", "prune", "--json"],
    ] {
        let output = run_in(&folder, &[], arguments);
        assert_eq!((output.status.code(), stdout(&output)), (Some(USAGE), String::new()), "{arguments:?}");
        let error: serde_json::Value =
            serde_json::from_str(&stderr(&output)).unwrap_or_else(|_| panic!("{}", all(&output)));
        assert_eq!(error["exit_code"], USAGE, "{arguments:?}");
        let text = error["error"].as_str().unwrap();
        assert!(!text.is_empty() && !text.starts_with("error"), "{arguments:?}: {text}");
    }
    let found = run_in(&folder, &[], &["store", "check", "--json"]);
    let lines: Vec<serde_json::Value> =
        stdout(&found).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(!lines.is_empty(), "{}", all(&found));
    for line in lines {
        let fields: Vec<_> = line.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(fields, ["store", "severity", "message", "instead"]);
    }
    // A running gateway's answer, as it is.
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let config = gateway.folder.0.join("tollgate.toml");
    let reload = run(tollgate().args(["reload", "--json", "-c"]).arg(&config));
    let answer: serde_json::Value = serde_json::from_str(&stdout(&reload)).unwrap();
    assert_eq!((reload.status.code(), answer["result"].as_str()), (Some(0), Some("reloaded")), "{}", all(&reload));
}
