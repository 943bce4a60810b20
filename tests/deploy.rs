//! What no compiler sees: presets, unit file, Dockerfile, Prometheus files, and the tables of the documentation.

use std::process::Command;

#[test]
fn everything_that_is_shipped_beside_the_binary_is_right() {
    let root = env!("CARGO_MANIFEST_DIR");
    let check = Command::new("sh")
        .args(["deploy/check.sh", env!("CARGO_BIN_EXE_tollgate")])
        .current_dir(root)
        .output()
        .unwrap();
    let (said, failed) = (String::from_utf8_lossy(&check.stdout), String::from_utf8_lossy(&check.stderr));
    assert!(check.status.success(), "{said}{failed}");
    assert!(said.contains("50 files checked"), "the check saw another number of files: {said}");
}
