//! Reads the sources and holds the rules of the house: the order of the modules, where pingora may be named, and what
//! the pure stages must not know.

use std::path::{Path, PathBuf};

fn sources() -> Vec<(PathBuf, String)> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|ext| ext == "rs") {
                found.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    walk(&root, &mut found);
    let read = |path: PathBuf| (path.strip_prefix(&root).unwrap().to_owned(), std::fs::read_to_string(&path).unwrap());
    let sources: Vec<_> = found.into_iter().map(read).collect();
    assert!(sources.len() >= 45, "only {} files were read: is the scan right?", sources.len());
    sources
}

/// The code of a file: no comments, and nothing from its tests on.
fn code(text: &str) -> String {
    let body = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    body.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

fn is_test(path: &Path) -> bool {
    let name = path.to_string_lossy();
    name.ends_with("tests.rs") || name.contains("/contract/")
}

/// The modules as `lib.rs` declares them.
fn order() -> Vec<String> {
    let lib = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let modules: Vec<String> =
        lib.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';').map(str::to_owned)).collect();
    assert_eq!(modules.len(), 21, "lib.rs declares the modules of the path: {modules:?}");
    modules
}

#[test]
fn a_module_uses_only_what_is_declared_above_it() {
    let order = order();
    let place = |module: &str| order.iter().position(|known| known == module);
    let mut uses = 0;
    let mut breaches = Vec::new();
    for (path, text) in sources().iter().filter(|(path, _)| !is_test(path)) {
        let own = path.components().next().unwrap().as_os_str().to_string_lossy().trim_end_matches(".rs").to_owned();
        let Some(own_place) = place(&own) else { continue };
        let code = code(text);
        let mut used: Vec<String> = Vec::new();
        for (at, _) in code.match_indices("crate::") {
            let rest = &code[at + "crate::".len()..];
            // `use crate::{a, b}` names several at once.
            let names = match rest.strip_prefix('{') {
                Some(list) => list.split('}').next().unwrap_or_default(),
                None => rest.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap_or_default(),
            };
            used.extend(names.split(',').map(|name| name.trim().split("::").next().unwrap_or_default().to_owned()));
        }
        for module in used.iter().filter(|module| place(module).is_some()) {
            uses += 1;
            if place(module).unwrap() > own_place {
                breaches.push(format!("{} uses {module}, which is declared below it", path.display()));
            }
        }
    }
    assert!(uses > 60, "only {uses} uses were found: is the scan right?");
    assert_eq!(breaches, Vec::<String>::new());
}

#[test]
fn pingora_is_named_in_the_edge_only() {
    let named: Vec<_> =
        sources().into_iter().filter(|(_, text)| code(text).contains("pingora::")).map(|(path, _)| path).collect();
    assert!(named.len() >= 5, "{named:?}");
    assert!(named.iter().all(|path| path.starts_with("edge")), "{named:?}");
}

#[test]
fn the_configuration_is_read_as_toml_in_one_folder() {
    let named: Vec<_> =
        sources().into_iter().filter(|(_, text)| code(text).contains("toml::")).map(|(path, _)| path).collect();
    // The file store's tokens are TOML as well.
    let allowed = |path: &PathBuf| path.starts_with("config") || path.starts_with("store/file");
    assert!(named.len() >= 3 && named.iter().all(allowed), "{named:?}");
}

#[test]
fn pure_stages_know_no_clock_no_runtime_and_no_io() {
    let pure = |path: &Path| {
        path.starts_with("request")
            || path.starts_with("policy")
            || path.starts_with("reply")
            || path.starts_with("forward")
    };
    let mut read = 0;
    for (path, text) in sources().iter().filter(|(path, _)| pure(path)) {
        read += 1;
        let code = code(text);
        for forbidden in
            ["tokio", "async ", ".await", "Instant", "SystemTime", "std::fs", "std::net::Tcp", "log::", "fastrand"]
        {
            assert!(!code.contains(forbidden), "{} is pure and names {forbidden}", path.display());
        }
    }
    assert!(read >= 14, "only {read} files of the pure stages were read");
}

#[test]
fn every_file_says_what_it_is_for() {
    for (path, text) in sources() {
        assert!(text.starts_with("//! "), "{} begins without saying what it is for", path.display());
    }
}

#[test]
fn nothing_is_called_a_bag() {
    for (path, _) in sources() {
        let name = path.to_string_lossy().into_owned();
        assert!(!["util", "helper", "common", "manager", "misc"].iter().any(|word| name.contains(word)), "{name}");
    }
}

#[test]
fn the_example_is_the_reference() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/tollgate.example.toml");
    let committed = std::fs::read_to_string(path).unwrap();
    assert_eq!(committed, tollgate::config::example(), "stale: run `make example`");
}

#[test]
fn one_type_name_stands_for_one_thing() {
    let mut seen: std::collections::BTreeMap<String, usize> = Default::default();
    for (_, text) in sources().iter().filter(|(path, _)| !is_test(path)) {
        for line in code(text).lines() {
            let line = line.strip_prefix("pub").map_or(line, |rest| rest.split_once(' ').map_or("", |(_, rest)| rest));
            let kinds = ["struct ", "enum ", "trait ", "type "];
            let Some(rest) = kinds.into_iter().find_map(|kind| line.strip_prefix(kind)) else { continue };
            let name: String = rest.chars().take_while(|c| c.is_ascii_alphanumeric()).collect();
            *seen.entry(name).or_default() += 1;
        }
        // Types that the configuration's macros declare.
        let code = code(text);
        let declared = ["section! {", "words! {"].into_iter().flat_map(|start| code.split(start).skip(1));
        let values = code.lines().filter(|line| line.contains(") = |text|"));
        for rest in declared.chain(values) {
            let name: String = rest.trim_start().chars().take_while(|c| c.is_ascii_alphanumeric()).collect();
            *seen.entry(name).or_default() += 1;
        }
    }
    assert!(seen.contains_key("ServerSection") && seen.contains_key("BodyPolicy") && seen.contains_key("FilePath"));
    assert!(seen.len() > 250, "only {} types were read: is the scan right?", seen.len());
    let shared: Vec<_> = seen.iter().filter(|(_, count)| **count > 1).map(|(name, _)| name.as_str()).collect();
    assert!(shared.is_empty(), "names of two types: {shared:?}");
}

#[test]
fn who_serves_is_decided_without_a_socket() {
    let read: Vec<_> =
        sources().into_iter().filter(|(path, _)| path.starts_with("upstream") && !is_test(path)).collect();
    assert!(!read.is_empty());
    for (path, text) in read {
        for forbidden in ["tokio", "pingora", "TcpStream", "UnixStream", "ToSocketAddrs", "Instant::now", "log::"] {
            assert!(!code(&text).contains(forbidden), "{} names {forbidden}", path.display());
        }
    }
}

/// A second TLS stack would be a second set of faults to follow.
#[test]
fn there_is_one_tls_stack() {
    let lock = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.lock")).unwrap();
    let packages: Vec<_> = lock.lines().filter_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"')).collect();
    assert!(packages.len() > 200, "only {} packages were read: is the scan right?", packages.len());
    let count = |name: &str| packages.iter().filter(|known| **known == name).count();
    assert_eq!((count("rustls"), count("ring")), (1, 1));
    let others = ["openssl", "openssl-sys", "native-tls", "boring", "boring-sys", "aws-lc-sys", "aws-lc-rs", "s2n-tls"];
    assert!(others.iter().all(|name| count(name) == 0), "{packages:?}");
}

/// The runner takes a name for any test whose path holds it: `load::` would also mean `reload::`.
#[test]
fn what_runs_alone_is_named_by_whole_modules() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let makefile = std::fs::read_to_string(root.join("Makefile")).unwrap();
    let alone: Vec<_> = makefile.lines().find_map(|line| line.strip_prefix("ALONE = ")).unwrap().split(' ').collect();
    assert!(alone.len() >= 5, "{alone:?}");
    fn modules(folder: &Path, prefix: &str, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            let name = entry.file_stem().unwrap().to_string_lossy().into_owned();
            if entry.is_dir() {
                modules(&entry, &format!("{prefix}{name}::"), found);
            } else if entry.extension().is_some_and(|extension| extension == "rs") {
                found.push(format!("{prefix}{name}::"));
            }
        }
    }
    let mut all = Vec::new();
    modules(&root.join("tests"), "", &mut all);
    assert!(all.len() >= 40, "only {} files were read", all.len());
    for name in alone {
        let taken: Vec<_> = all.iter().filter(|module| module.contains(name)).collect();
        assert!(!taken.is_empty(), "no module is called {name}");
        assert!(taken.iter().all(|module| module.starts_with(name)), "{name} also takes {taken:?}");
    }
}

/// A verdict on a token that was only assumed is told to somebody, and nothing is ever forwarded by it.
#[test]
fn only_explain_supposes() {
    let all = sources();
    let users: Vec<_> = all
        .iter()
        .filter(|(_, text)| code(text).contains("suppose("))
        .map(|(path, _)| path.to_string_lossy())
        .collect();
    assert_eq!(users, ["explain.rs"], "of {} files", all.len());
    let pipeline = all.iter().find(|(path, _)| path.ends_with("pipeline.rs")).unwrap();
    assert!(code(&pipeline.1).contains("fn suppose<"), "what this looks for has another name");
}
