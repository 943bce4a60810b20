//! The entry point: the exit code, and the allocator (chosen by measurement, benches/README.md).

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    // Huge pages take 2 MiB where a few KiB are in use: 19 MiB for a gateway that does nothing. Without them it only has more,
    // and smaller, pages. An old kernel that does not know the call is no reason not to start.
    let _ = nix::sys::prctl::set_thp_disable(true);
    tollgate::cli::main()
}
