//! The text of a file that a configuration is in, or that it names. A file without an end (`/dev/zero`), or one whose end
//! somebody else has (a FIFO), must not keep a process from starting. It must not know what is in the text.

use crate::sandbox;
use std::io::{Error, ErrorKind, Read as _};
use std::path::Path;

/// Of one file of a configuration: some hundred thousand routes.
pub(super) const CONFIGURATION: u64 = 16 * 1024 * 1024;
/// Of a file whose first line is a secret.
pub(super) const SECRET: u64 = 64 * 1024;

/// Of whatever somebody named on the command line, a pipe too: why it cannot be read, if not.
pub(super) fn read(path: &Path, most: u64) -> Result<String, String> {
    let file = std::fs::File::open(path).map_err(|error| unreadable(&error))?;
    let mut bytes = Vec::new();
    file.take(most + 1).read_to_end(&mut bytes).map_err(|error| unreadable(&error))?;
    if bytes.len() as u64 > most {
        return Err(format!("has more than {} KiB", most / 1024));
    }
    String::from_utf8(bytes).map_err(|error| {
        let good = error.utf8_error().valid_up_to();
        let line = error.as_bytes().iter().take(good).filter(|byte| **byte == b'\n').count() + 1;
        format!("is not UTF-8 in line {line}")
    })
}

/// Of what a configuration names, which is read again at every reload: a pipe would be empty then, or keep it waiting.
pub(super) fn read_regular(path: &Path, most: u64) -> Result<String, String> {
    match std::fs::metadata(path) {
        Ok(meta) if meta.is_file() => read(path, most),
        Ok(_) => Err("is not a file".into()),
        Err(error) => Err(unreadable(&error)),
    }
}

fn unreadable(error: &Error) -> String {
    let outside = match sandbox::current() {
        Some(_) if error.kind() == ErrorKind::PermissionDenied => {
            "; if it is outside of the sandbox that this process is in, restart tollgate"
        }
        _ => "",
    };
    format!("cannot be read: {error}{outside}")
}
