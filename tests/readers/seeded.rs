//! The gateway with switchable rules, which the tests use to prove that they detect faults: see
//! `src/request/seeded.rs`.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    tollgate::cli::main()
}
