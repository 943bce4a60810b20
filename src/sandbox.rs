//! Which files this process may touch, held by the kernel: Landlock. What it was allowed at its start, and inherits to those
//! that it starts, can be taken away but never be given back. It must not know which setting needs a file, or why.

use landlock::{
    ABI, Access as _, AccessFs, BitFlags, LandlockStatus, PathBeneath, PathFd, RestrictSelfError, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, RulesetError, RulesetStatus, Scope,
};
use parking_lot::RwLock;
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::fs::FileType;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a path is needed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileAccess {
    Read,
    /// Reading, writing, making and removing files.
    Write,
    /// Making and removing sockets. To connect to one, nothing is needed.
    Socket,
    /// Reading and starting programs.
    Run,
}

impl FileAccess {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Socket => "socket",
            Self::Run => "run",
        }
    }

    /// What is not allowed in a folder.
    pub const fn doing(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write to",
            Self::Socket => "make sockets in",
            Self::Run => "start programs of",
        }
    }

    fn rights(self) -> BitFlags<AccessFs> {
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        match self {
            Self::Read => read,
            Self::Write => read | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::MakeReg | AccessFs::RemoveFile,
            Self::Socket => AccessFs::MakeSock | AccessFs::RemoveFile,
            Self::Run => AccessFs::Execute | AccessFs::ReadFile,
        }
    }
}

/// How much of the tree around a path is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// The path, and what is below it.
    Itself,
    /// A file that others with its name may come in place of: the folder that it is in, and the one that a link leads to. A
    /// file that is mounted, and one in `/`, cannot be replaced: that one alone.
    Folder,
}

/// A path that the process needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileRule {
    pub path: PathBuf,
    pub extent: Extent,
    pub access: FileAccess,
    /// For people. A key of the configuration where `is_setting`.
    pub why: String,
    /// A reload can ask for it. What only the system needs is never asked for again.
    pub is_setting: bool,
}

impl FileRule {
    /// The places of the tree that are meant, as it is now. One that does not exist has no place below an existing folder.
    pub fn places(&self) -> Vec<PathBuf> {
        let Ok(path) = std::path::absolute(&self.path) else { return Vec::new() };
        let found = std::fs::metadata(&path).ok();
        if self.extent == Extent::Itself {
            return vec![canonical(&path)];
        }
        // A pipe or a device: what is opened is that one, wherever it is. It may have no path of its own, as a pipe that
        // /dev/stdout leads to.
        if self.access != FileAccess::Socket && found.as_ref().is_some_and(|meta| is_special(meta.file_type())) {
            return vec![std::fs::canonicalize(&path).unwrap_or(path)];
        }
        let mut places = Vec::new();
        let target = std::fs::canonicalize(&path).ok();
        for file in [Some(&path), target.as_ref()].into_iter().flatten() {
            let folder = file.parent().map(canonical);
            let device = |path: &Path| std::fs::symlink_metadata(path).ok().map(|meta| meta.dev());
            let cannot_be_replaced = |folder: &PathBuf| {
                let is_mounted = device(file).is_some_and(|own| Some(own) != device(folder));
                folder.parent().is_none() || is_mounted
            };
            let place = match folder {
                Some(folder) if !cannot_be_replaced(&folder) => folder,
                _ => canonical(file),
            };
            if !places.contains(&place) {
                places.push(place);
            }
        }
        places
    }
}

fn is_special(kind: FileType) -> bool {
    kind.is_fifo() || kind.is_char_device() || kind.is_block_device()
}

/// Without links, as far as the path exists.
fn canonical(path: &Path) -> PathBuf {
    let mut missing = Vec::new();
    let mut above = path;
    loop {
        match (std::fs::canonicalize(above), above.parent(), above.file_name()) {
            (Ok(found), ..) => return missing.iter().rev().fold(found, |path, name| path.join(name)),
            (Err(_), Some(parent), Some(name)) => {
                missing.push(name);
                above = parent;
            }
            _ => return path.to_owned(),
        }
    }
}

/// A place that is allowed: the folder or file that it was at the start, not what has its name by now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct AllowedPlace {
    path: PathBuf,
    access: FileAccess,
    device: u64,
    inode: u64,
}

impl AllowedPlace {
    fn of(path: &Path, access: FileAccess) -> io::Result<Self> {
        let meta = std::fs::metadata(path)?;
        Ok(Self { path: path.to_owned(), access, device: meta.dev(), inode: meta.ino() })
    }

    fn allows(&self, path: &Path, access: FileAccess) -> bool {
        let is_the_same = || Self::of(&self.path, self.access).is_ok_and(|now| now == *self);
        self.access.rights().contains(access.rights()) && path.starts_with(&self.path) && is_the_same()
    }
}

/// What this process is held to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    allowed: Vec<AllowedPlace>,
    /// The kernel knows not all that was asked for: an older one lets files be truncated, for example.
    pub is_partial: bool,
}

impl Sandbox {
    /// The first place of a rule that lies outside. What does not exist cannot be opened, and is not asked for.
    pub fn refuses(&self, rule: &FileRule) -> Option<PathBuf> {
        let is_allowed = |place: &PathBuf| self.allowed.iter().any(|allowed| allowed.allows(place, rule.access));
        rule.places().into_iter().find(|place| place.exists() && !is_allowed(place))
    }

    /// The places that programs may be started in.
    pub fn programs(&self) -> impl Iterator<Item = &Path> {
        self.allowed.iter().filter(|place| place.access == FileAccess::Run).map(|place| place.path.as_path())
    }
}

/// What this process is in. A static, because a process has one, as long as it lives.
static CURRENT: RwLock<Option<Arc<Sandbox>>> = RwLock::new(None);

/// In the environment of a process that one in a sandbox starts to be replaced by it: the sandbox, which it is in as well.
const VARIABLE: &str = "TOLLGATE_SANDBOX";
/// Threads of what was looked at before may take a moment to end.
const ALONE_WITHIN: Duration = Duration::from_secs(3);

/// What this process is held to. `None`: to nothing.
pub fn current() -> Option<Arc<Sandbox>> {
    CURRENT.read().clone()
}

/// Takes over what the process that started this one was held to. Only to be called in a process that is to replace another:
/// else, anybody may have set the variable.
pub fn inherit() -> io::Result<()> {
    if let Some(text) = std::env::var_os(VARIABLE) {
        let text = text.into_string().map_err(|_| ErrorKind::InvalidData)?;
        *CURRENT.write() = Some(Arc::new(serde_json::from_str(&text)?));
    }
    Ok(())
}

/// The name and the value by which a process started by this one knows what it is in.
pub fn to_pass_on() -> (&'static str, Option<OsString>) {
    let text = current().and_then(|sandbox| serde_json::to_string(&*sandbox).ok());
    (VARIABLE, text.map(OsString::from))
}

/// The folders of the libraries that this process is linked to; none of a static one.
pub fn libraries() -> Vec<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    library_folders(&maps)
}

fn library_folders(maps: &str) -> Vec<PathBuf> {
    let paths = maps.lines().filter_map(|line| Some(Path::new(line.get(line.find('/')?..)?)));
    let is_library = |path: &&Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.ends_with(".so") || name.contains(".so.")
    };
    let mut folders: Vec<_> = paths.filter(is_library).filter_map(Path::parent).map(Path::to_owned).collect();
    folders.sort();
    folders.dedup();
    folders
}

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error(
        "this kernel has no Landlock: it came with Linux 5.13, and the boot parameter lsm= must name it, if that is set"
    )]
    NoLandlock,
    #[error("{0} threads run already, and would be outside of it")]
    Threads(usize),
    #[error("{}: {error}", path.display())]
    Path { path: PathBuf, error: io::Error },
    #[error("{0}")]
    Refused(String),
}

/// How it came to what this process is held to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entered {
    /// To these rules.
    Now,
    /// The kernel nests no more of them: to those of the process that this one replaces, which are never weaker.
    Inherited,
}

/// Holds this process to the rules, and all that it starts. It must not have started a thread: one that runs already would
/// stay outside.
pub fn enter(rules: &[FileRule]) -> Result<Entered, SandboxError> {
    alone()?;
    // What the running kernel does not know is left out.
    let handled = AccessFs::from_all(ABI::V5);
    let refused = |error: RulesetError| SandboxError::Refused(error.to_string());
    let mut ruleset = Ruleset::default()
        .handle_access(handled)
        .and_then(|ruleset| ruleset.scope(Scope::Signal))
        .and_then(Ruleset::create)
        .map_err(refused)?;
    let mut allowed: Vec<AllowedPlace> = Vec::new();
    for (place, access) in rules.iter().flat_map(|rule| rule.places().into_iter().map(|place| (place, rule.access))) {
        let failed = |error: io::Error| SandboxError::Path { path: place.clone(), error };
        let (meta, fd) = match (std::fs::metadata(&place), PathFd::new(&place)) {
            (Ok(meta), Ok(fd)) => (meta, fd),
            // What cannot be reached cannot be opened either.
            _ => continue,
        };
        let known = AllowedPlace::of(&place, access).map_err(failed)?;
        if allowed.contains(&known) {
            continue;
        }
        let rights = if meta.is_dir() { access.rights() } else { access.rights() & AccessFs::from_file(ABI::V5) };
        if rights.is_empty() || is_anonymous(&place, meta.file_type()) {
            continue;
        }
        ruleset = ruleset.add_rule(PathBeneath::new(fd, rights)).map_err(refused)?;
        allowed.push(known);
    }
    let entered = match ruleset.restrict_self() {
        Ok(status) => match (status.ruleset, status.landlock) {
            (RulesetStatus::NotEnforced, _) | (_, LandlockStatus::NotEnabled | LandlockStatus::NotImplemented) => {
                return Err(SandboxError::NoLandlock);
            }
            (ruleset, _) => Ok(ruleset == RulesetStatus::PartiallyEnforced),
        },
        Err(error) => Err(error),
    };
    match entered {
        Ok(is_partial) => {
            *CURRENT.write() = Some(Arc::new(Sandbox { allowed, is_partial }));
            Ok(Entered::Now)
        }
        Err(error) if is_too_deep(&error) && current().is_some() => Ok(Entered::Inherited),
        Err(error) => Err(refused(error)),
    }
}

/// A pipe without a path in the file system: Landlock has no rules for these, and lets them be opened.
fn is_anonymous(path: &Path, kind: FileType) -> bool {
    is_special(kind) && std::fs::canonicalize(path).is_err()
}

/// The kernel nests 16.
fn is_too_deep(error: &RulesetError) -> bool {
    match error {
        RulesetError::RestrictSelf(RestrictSelfError::RestrictSelfCall { source, .. }) => {
            source.kind() == ErrorKind::ArgumentListTooLong
        }
        _ => false,
    }
}

/// Waits until this is the only thread.
fn alone() -> Result<(), SandboxError> {
    let threads = || std::fs::read_dir("/proc/self/task").map(Iterator::count);
    let deadline = Instant::now() + ALONE_WITHIN;
    loop {
        match threads() {
            Ok(1) => return Ok(()),
            Ok(count) if Instant::now() > deadline => return Err(SandboxError::Threads(count)),
            Ok(_) => std::thread::sleep(Duration::from_millis(5)),
            Err(error) => return Err(SandboxError::Path { path: "/proc/self/task".into(), error }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(path: PathBuf, extent: Extent, access: FileAccess) -> FileRule {
        FileRule { path, extent, access, why: "test".into(), is_setting: true }
    }

    #[test]
    fn a_file_means_the_folders_that_another_may_come_from() {
        let folder = tempfile::tempdir().unwrap();
        let folder = std::fs::canonicalize(folder.path()).unwrap();
        for name in ["named", "elsewhere"] {
            std::fs::create_dir(folder.join(name)).unwrap();
        }
        std::fs::write(folder.join("elsewhere/target"), "").unwrap();
        std::os::unix::fs::symlink("../elsewhere/target", folder.join("named/link")).unwrap();
        std::os::unix::fs::symlink("named", folder.join("way")).unwrap();
        let places = |path: &str, extent| rule(folder.join(path), extent, FileAccess::Read).places();
        let expected = |paths: &[&str]| paths.iter().map(|path| folder.join(path)).collect::<Vec<_>>();
        assert_eq!(places("named/link", Extent::Folder), expected(&["named", "elsewhere"]));
        assert_eq!(places("way/gone", Extent::Folder), expected(&["named"]), "the folder decides");
        assert_eq!(places("named/gone/file", Extent::Folder), expected(&["named/gone"]));
        assert_eq!(places("way", Extent::Itself), expected(&["named"]));
        // Never all of the tree, for a file at its root.
        assert_eq!(rule("/gone".into(), Extent::Folder, FileAccess::Write).places(), [PathBuf::from("/gone")]);
        assert_eq!(rule("/dev/null".into(), Extent::Folder, FileAccess::Write).places(), [PathBuf::from("/dev/null")]);
    }

    #[test]
    fn libraries_are_where_they_are_mapped_from() {
        let maps = "7f1-7f2 r-xp 00000000 fe:00 12  /usr/bin/tollgate\n\
                    7f3-7f4 r-xp 00000000 fe:00 13  /usr/lib/x/libc.so.6\n\
                    7f5-7f6 r--p 00000000 fe:00 14  /usr/lib/x/libm.so.6\n\
                    7f7-7f8 r--p 00000000 fe:00 15  /opt/my libs/libz.so\n\
                    7fff-8000 rw-p 00000000 00:00 0  [stack]\n";
        assert_eq!(library_folders(maps), [Path::new("/opt/my libs"), Path::new("/usr/lib/x")]);
        assert_eq!(library_folders("7f1-7f2 r-xp 0 fe:00 12  /tollgate\n"), [] as [&Path; 0]);
    }

    #[test]
    fn what_is_refused_is_what_exists_and_lies_outside() {
        let folder = tempfile::tempdir().unwrap();
        let folder = std::fs::canonicalize(folder.path()).unwrap();
        for name in ["in", "in/below", "in2"] {
            std::fs::create_dir(folder.join(name)).unwrap();
        }
        let allowed = [(folder.join("in"), FileAccess::Read), (folder.join("in/below"), FileAccess::Write)];
        let allowed = allowed.iter().map(|(path, access)| AllowedPlace::of(path, *access).unwrap()).collect();
        let sandbox = Sandbox { allowed, is_partial: false };
        let refused = |path: &str, access| sandbox.refuses(&rule(folder.join(path), Extent::Folder, access));
        assert_eq!(refused("in/file", FileAccess::Read), None);
        assert_eq!(refused("in/below/file", FileAccess::Read), None);
        assert_eq!(refused("in/below/file", FileAccess::Write), None);
        assert_eq!(refused("in/file", FileAccess::Write), Some(folder.join("in")), "reading is not writing");
        assert_eq!(refused("in/below/s", FileAccess::Socket), Some(folder.join("in/below")), "nor are sockets files");
        assert_eq!(refused("in2/file", FileAccess::Read), Some(folder.join("in2")), "a name is no folder");
        assert_eq!(refused("gone/file", FileAccess::Read), None, "nothing can be opened there");
        let text = serde_json::to_string(&sandbox).unwrap();
        assert_eq!(serde_json::from_str::<Sandbox>(&text).unwrap(), sandbox, "as it is passed on");
        // Another folder with its name is not the one that is allowed.
        std::fs::rename(folder.join("in"), folder.join("was")).unwrap();
        std::fs::create_dir(folder.join("in")).unwrap();
        assert_eq!(refused("in/file", FileAccess::Read), Some(folder.join("in")));
    }
}
