//! Proves that the suite detects faults: with one of tollgate's rules switched off, in a special build, the same cases
//! must find what gets through. `make test` builds `tollgate-seeded`.

use super::backends::{Kind, Reader};
use super::{CASES, SEED, run};
use crate::harness::*;
use std::path::PathBuf;
use std::process::Command;

const VARIABLE: &str = "TOLLGATE_SEEDED_FAULT";

/// The rules of `src/request/seeded.rs` that decide what a backend reads, each with the application that depends on it most.
const FAULTS: &[(&str, Kind)] = &[
    ("QueryToken", Kind::Rack),
    ("PageBounds", Kind::Flask),
    ("PhpNames", Kind::Php),
    ("JsonNames", Kind::Go),
    ("QueryMethod", Kind::Go),
    ("MethodOverride", Kind::Rack),
    ("QueryCharset", Kind::Django),
    ("BodyPages", Kind::Rack),
    ("UntypedJson", Kind::Grape),
    ("TypeGrammar", Kind::Php),
    ("CanonicalType", Kind::Flask),
    ("Charset", Kind::Express),
    ("Coding", Kind::Express),
    ("PartName", Kind::Go),
    ("Delimiter", Kind::Rack),
    ("PartStart", Kind::Django),
    ("PartEnd", Kind::Django),
];

fn seeded_binary() -> PathBuf {
    let path = PathBuf::from(env!("CARGO_BIN_EXE_tollgate")).with_file_name("tollgate-seeded");
    assert!(
        path.exists(),
        "{} is not there: run `cargo build --locked --features seeded-faults --bin tollgate-seeded --test unify`",
        path.display()
    );
    path
}

#[test]
fn every_seeded_fault_is_caught() {
    let binary = seeded_binary();
    // Each run ends with the first fault found.
    let most = 4 * CASES as usize;
    let mut missed = Vec::new();
    println!("| rule switched off | reader | cases to the first catch | what it read |");
    for kind in Kind::ALL {
        let mut reader = None;
        for (rule, _) in FAULTS.iter().filter(|(_, reader)| *reader == kind) {
            let reader = reader.get_or_insert_with(|| Reader::start(kind));
            let mut program = Command::new(&binary);
            program.env(VARIABLE, rule);
            let gateway = Gateway::start_as(program, reader.address);
            let tally = run(reader, &gateway, SEED ^ 0x5eed, most, true);
            match tally.wrong.keys().next() {
                Some(what) => println!("| {rule} | {kind:?} | {} | {what} |", tally.cases()),
                None => missed.push(*rule),
            }
        }
    }
    assert!(missed.is_empty(), "not found in {most} cases each: {missed:?}");
}

#[test]
fn a_normal_build_has_no_seeded_faults() {
    let normal = std::fs::read(env!("CARGO_BIN_EXE_tollgate")).unwrap();
    assert_eq!(memchr::memmem::find(&normal, VARIABLE.as_bytes()), None, "the binary contains the variable's name");
    let seeded = std::fs::read(seeded_binary()).unwrap();
    assert!(memchr::memmem::find(&seeded, VARIABLE.as_bytes()).is_some(), "the search is broken");

    // With the rule off, the second token of the query is forwarded.
    let upstream = Upstream::start();
    let target = "/api/v3/user?private_token=good-token-0001";
    for (program, passes) in [(tollgate(), false), (Command::new(seeded_binary()), true)] {
        let mut program = program;
        program.env(VARIABLE, "QueryToken");
        let gateway = Gateway::start_as(program, upstream.address);
        assert_eq!(gateway.get(target).status, 200);
        assert_eq!(upstream.seen().last().unwrap().target.contains("private_token"), passes);
    }
}
