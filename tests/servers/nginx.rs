//! nginx in the foreground, with everything that it writes in a folder of the test's.

use crate::harness::Folder;
use std::process::{Command, Stdio};

/// nginx with this configuration, whose block `http` begins a line. The folder has to outlive the process.
pub fn nginx(folder: &Folder, config: &str) -> Command {
    let place = folder.0.display();
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {place}/{kind};\n"))
        .concat();
    let (before, http) = config.split_once("http {\n").expect("a block `http`");
    let text = format!(
        "daemon off; master_process off; pid {place}/pid; error_log stderr;\n{before}http {{\naccess_log off;\n{temporary}{http}"
    );
    let mut command = Command::new("nginx");
    command.arg("-p").arg(&folder.0).arg("-c").arg(folder.write("nginx.conf", &text)).stdin(Stdio::null());
    command
}
