//! The gateway as the tests build it to show that they see faults: `src/request/seeded.rs` says how.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    tollgate::cli::main()
}
