//! One fuzzer for all targets: `TOLLGATE_FUZZ_TARGET` names the one that runs. A target gives bytes to tollgate's own code and
//! holds what comes out against a reader by other authors, or against a few lines that say the same in another way. It panics
//! when they differ. docs/fuzzing.md lists the targets with the faults that they were shown to find.

#![no_main]

mod answers;
mod bodies;
mod files;
mod heads;
mod http2;
mod paths;
mod queries;
mod spellings;
mod wire;

use libfuzzer_sys::fuzz_target;
use std::sync::OnceLock;

type Target = fn(&[u8]);

/// The targets, by the name of their corpus. `run.py` reads this table too.
const TARGETS: [(&str, Target); 16] = [
    ("head", heads::read),
    ("forward", heads::forwarded),
    ("chunks", wire::chunks),
    ("query", queries::edited),
    ("form", bodies::form),
    ("multipart", bodies::multipart),
    ("json", bodies::json),
    ("path", paths::canonical_paths),
    ("answer", answers::rewritten),
    ("proxy", wire::proxy),
    ("http2", http2::written),
    ("frames", http2::frames),
    ("trace", heads::trace),
    ("tokens", files::tokens),
    ("cache", files::cache),
    ("config", files::config),
];

fn chosen() -> Target {
    let name = std::env::var("TOLLGATE_FUZZ_TARGET").unwrap_or_default();
    match TARGETS.iter().find(|(known, _)| *known == name) {
        Some((_, target)) => *target,
        None => {
            let known = TARGETS.map(|(name, _)| name).join(", ");
            eprintln!("TOLLGATE_FUZZ_TARGET is `{name}`; use one of: {known}");
            std::process::exit(2)
        }
    }
}

fuzz_target!(|data: &[u8]| {
    static TARGET: OnceLock<Target> = OnceLock::new();
    TARGET.get_or_init(chosen)(data);
});
