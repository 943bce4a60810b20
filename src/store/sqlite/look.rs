//! Whether a gateway could open a database, found by reading its header only: opening it with SQLite would make files
//! beside it.

use super::{DatabaseError, SCHEMA_VERSION, Unusable};
use crate::problem::{no_new_file, not_writable};
use std::io::{ErrorKind, Read as _};
use std::path::Path;

/// <https://www.sqlite.org/fileformat.html>, section 1.3.
const MAGIC: &[u8; 16] = b"SQLite format 3\0";
const HEADER: usize = 100;

/// Why a gateway could not open this database, or make it where there is none.
pub(in crate::store) fn unusable(path: &Path) -> Option<DatabaseError> {
    why_unusable(path).map(|why| DatabaseError { path: path.into(), why })
}

fn why_unusable(path: &Path) -> Option<Unusable> {
    match std::fs::metadata(path) {
        Ok(meta) if meta.is_dir() => return Some(Unusable::Folder),
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound && !path.is_symlink() => {
            return no_new_file(path).map(Unusable::NotWritable);
        }
        Err(error) => return Some(error.into()),
    }
    // SQLite makes files of its own in the folder.
    not_writable(path).or_else(|| no_new_file(path)).map(Unusable::NotWritable).or_else(|| unreadable(path))
}

fn unreadable(path: &Path) -> Option<Unusable> {
    let mut header = Vec::with_capacity(HEADER);
    let read = std::fs::File::open(path).and_then(|file| file.take(HEADER as u64).read_to_end(&mut header));
    match read {
        Err(error) => Some(error.into()),
        // An empty file becomes a database.
        Ok(0) => None,
        Ok(_) => {
            let page_size = header.get(16..18).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
            let sized = page_size.is_some_and(|size| size == 1 || size >= 512 && size.is_power_of_two());
            let Some(version) = header.get(60..64).filter(|_| header.starts_with(MAGIC) && sized) else {
                return Some(Unusable::Foreign);
            };
            let version = i64::from(i32::from_be_bytes([version[0], version[1], version[2], version[3]]));
            (version > SCHEMA_VERSION).then_some(Unusable::Newer(version))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::sqlite::open;

    #[test]
    fn it_agrees_with_sqlite() {
        let folder = std::env::temp_dir().join(format!("tollgate-look-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("folder")).unwrap();
        let path = |name: &str| folder.join(name);
        drop(open(&path("good")).unwrap());
        let good = std::fs::read(path("good")).unwrap();
        std::fs::write(path("newer"), &good).unwrap();
        rusqlite::Connection::open(path("newer")).unwrap().pragma_update(None, "user_version", 1_000).unwrap();
        let foreign = rusqlite::Connection::open(path("foreign")).unwrap();
        foreign.execute_batch("PRAGMA page_size = 65536; CREATE TABLE other (x)").unwrap();
        drop(foreign);
        std::os::unix::fs::symlink(path("gone"), path("dangling")).unwrap();
        std::fs::write(path("empty"), "").unwrap();
        std::fs::write(path("text"), "token = []\n").unwrap();
        std::fs::write(path("magic"), MAGIC).unwrap();
        std::fs::write(path("zeros"), [MAGIC.as_slice(), &[0; 200]].concat()).unwrap();
        let mut seen = 0;
        for (name, usable) in [
            ("good", true),
            ("foreign", true),
            ("empty", true),
            ("new", true),
            ("newer", false),
            ("text", false),
            ("magic", false),
            ("zeros", false),
            ("folder", false),
            ("dangling", false),
            ("nowhere/new", false),
            ("text/new", false),
        ] {
            let before = std::fs::read_dir(&folder).unwrap().count();
            let found = unusable(&path(name));
            assert_eq!(std::fs::read_dir(&folder).unwrap().count(), before, "{name}: something was made");
            assert_eq!(found.is_none(), usable, "{name}: {found:?}");
            let opened = open(&path(name));
            assert_eq!(opened.is_ok(), usable, "{name}: {:?}", opened.err());
            seen += 1;
        }
        assert_eq!(seen, 12);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
