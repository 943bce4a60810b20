//! Whether a process of root may read a configuration that nobody named to it. It must not know what is in the file.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// Who may write to a file or a folder.
#[derive(Clone, Copy, Debug)]
pub(super) struct WriteAccess {
    pub(super) user: u32,
    pub(super) group: u32,
    pub(super) mode: u32,
    /// On a file system that is mounted read-only, as Kubernetes mounts a ConfigMap.
    pub(super) read_only: bool,
}

const GROUP_WRITES: u32 = 0o020;
const ALL_WRITE: u32 = 0o002;
/// In such a folder, one's own files cannot be renamed or removed by others.
const STICKY: u32 = 0o1000;

impl WriteAccess {
    fn of(path: &Path) -> io::Result<Self> {
        let meta = std::fs::metadata(path)?;
        let flags = nix::sys::statvfs::statvfs(path).map(|system| system.flags()).map_err(io::Error::from)?;
        let read_only = flags.contains(nix::sys::statvfs::FsFlags::ST_RDONLY);
        Ok(Self { user: meta.uid(), group: meta.gid(), mode: meta.mode(), read_only })
    }

    /// Who but root can write. `is_above`: a folder above the file's own, where only renaming matters.
    fn other_writer(self, is_above: bool) -> Option<String> {
        if self.read_only {
            None
        } else if self.user != 0 {
            Some(format!("belongs to user {}", self.user))
        } else if is_above && self.mode & STICKY != 0 {
            None
        } else if self.mode & ALL_WRITE != 0 {
            Some("can be written by everybody".into())
        } else if self.mode & GROUP_WRITES != 0 && self.group != 0 {
            Some(format!("can be written by group {}", self.group))
        } else {
            None
        }
    }
}

/// Why this process must not read a file that nobody named; `None`: it may. Only root is kept from it: who can write the file
/// would otherwise say what root does. A link is judged by its target, and by the folder that it is in.
pub fn distrusted(path: &Path) -> Option<String> {
    distrusted_by(rustix::process::geteuid().as_raw(), path, WriteAccess::of)
}

fn distrusted_by(user: u32, path: &Path, access: impl Fn(&Path) -> io::Result<WriteAccess>) -> Option<String> {
    if user != 0 {
        return None;
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // One that is not there is for the reader to report.
    let target = std::fs::canonicalize(path).ok()?;
    let folder = std::fs::canonicalize(folder).ok()?;
    let named = path.file_name().map(|name| folder.join(name));
    let of_link = named.iter().flat_map(|path| path.ancestors().enumerate().skip(1));
    target.ancestors().enumerate().chain(of_link).find_map(|(depth, place)| match access(place) {
        Ok(access) => Some(format!("{} {}", place.display(), access.other_writer(depth > 1)?)),
        Err(error) => Some(format!("{} cannot be examined: {error}", place.display())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_reads_only_what_nobody_else_can_write() {
        let folder = tempfile::tempdir().unwrap();
        let folder = std::fs::canonicalize(folder.path()).unwrap();
        std::fs::create_dir(folder.join("conf")).unwrap();
        let file = folder.join("conf/a.toml");
        std::fs::write(&file, "").unwrap();
        let root = WriteAccess { user: 0, group: 0, mode: 0o755, read_only: false };
        // What is special about the file, its folder, and the folder above.
        let judge = |user: u32, special: [WriteAccess; 3]| {
            distrusted_by(user, &file, |place| {
                let depth = file.ancestors().position(|above| above == place);
                Ok(depth.and_then(|depth| special.get(depth).copied()).unwrap_or(root))
            })
        };
        let with_mode = |mode| WriteAccess { mode, ..root };
        let of = |user, group, mode| WriteAccess { user, group, mode, ..root };
        for (special, part) in [
            ([root, root, root], None),
            ([with_mode(0o660), root, root], None),
            ([of(7, 0, 0o600), root, root], Some("conf/a.toml belongs to user 7")),
            ([with_mode(0o666), root, root], Some("conf/a.toml can be written by everybody")),
            ([of(0, 9, 0o664), root, root], Some("conf/a.toml can be written by group 9")),
            ([of(0, 9, 0o640), root, root], None),
            ([root, of(7, 7, 0o755), root], Some("conf belongs to user 7")),
            ([root, with_mode(0o777), root], Some("conf can be written by everybody")),
            // Others can put a file there, if not rename this one.
            ([root, with_mode(0o1777), root], Some("conf can be written by everybody")),
            ([root, root, with_mode(0o1777)], None),
            ([root, root, with_mode(0o777)], Some(" can be written by everybody")),
            ([root, root, of(7, 7, 0o755)], Some(" belongs to user 7")),
            ([WriteAccess { read_only: true, ..of(7, 7, 0o777) }, root, root], None),
        ] {
            let said = judge(0, special);
            match part {
                None => assert_eq!(said, None, "{special:?}"),
                Some(part) => assert!(said.as_ref().is_some_and(|said| said.contains(part)), "{special:?}: {said:?}"),
            }
            assert_eq!(judge(1000, special), None, "another user reads what it can read");
        }
        // Who can replace the link chooses the file, and so does who can replace its target.
        std::fs::create_dir(folder.join("links")).unwrap();
        let link = folder.join("links/link.toml");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for open in ["links", "conf", "conf/a.toml"] {
            let open = folder.join(open);
            let said = distrusted_by(0, &link, |place| Ok(if place == open { with_mode(0o777) } else { root }));
            assert_eq!(said, Some(format!("{} can be written by everybody", open.display())));
        }
        assert_eq!(distrusted_by(0, &link, |_| Ok(root)), None);
        assert_eq!(distrusted_by(0, &folder.join("gone.toml"), |_| Ok(with_mode(0o777))), None);
    }
}
