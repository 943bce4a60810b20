//! `tollgate upgrade`: asks the running gateway to replace itself by the binary as it is on disk now, and waits for the result.

use super::Failure;
use super::reload::{AdminTarget, not_done, post};

pub(super) fn run(target: &AdminTarget) -> Result<(), Failure> {
    let answer = post("/upgrade", target)?;
    if target.json && answer["result"] == "upgraded" {
        say!("{answer}")?;
        return Ok(());
    }
    match (answer["result"].as_str(), answer["pid"].as_u64(), answer["replaced"].as_u64()) {
        (Some("upgraded"), Some(pid), Some(replaced)) => {
            say!("upgraded: process {pid} accepts connections, process {replaced} completes its requests and ends")?;
            Ok(())
        }
        _ => Err(not_done(&answer)),
    }
}
