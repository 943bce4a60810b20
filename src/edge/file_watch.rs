//! Notices files that change: certificates of listeners, and those of the configuration if that is wanted. It looks at their times and
//! sizes; what they say is for others to read.

use super::listeners::Listeners;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How often files are looked at. What has changed is taken at the second look that finds it the same: the first may see it
/// half written.
const LOOK: Duration = Duration::from_secs(1);

/// What tells one version of a file from the next. `None`: it is not there.
type FileVersion = Option<(u64, u64, i64, i64)>;

fn stamp(path: &Path) -> FileVersion {
    let meta = std::fs::metadata(path).ok()?;
    Some((meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec()))
}

/// Files that are looked at again and again.
#[derive(Default)]
struct WatchedFiles {
    /// As it was taken, and as it was seen last.
    files: HashMap<PathBuf, (FileVersion, FileVersion)>,
    /// Which files there are, as that was taken, and as it was seen last.
    names: (Vec<PathBuf>, Vec<PathBuf>),
}

impl WatchedFiles {
    /// They are as they were taken.
    fn taken(&mut self, paths: &[PathBuf], stamp: impl Fn(&Path) -> FileVersion) {
        let as_taken = |path: &PathBuf| (path.clone(), (stamp(path), stamp(path)));
        self.files = paths.iter().map(as_taken).collect();
        self.names = (paths.to_vec(), paths.to_vec());
    }

    /// Whether any of them has changed, or is not among them any more, and that has been the same for one look. One that is
    /// new here may have changed since it was read.
    fn changed(&mut self, paths: Vec<PathBuf>, stamp: impl Fn(&Path) -> FileVersion) -> bool {
        self.files.retain(|path, _| paths.contains(path));
        let mut settled = paths != self.names.0 && paths == self.names.1;
        self.names.1.clone_from(&paths);
        let names = paths.clone();
        for path in paths {
            let now = stamp(&path);
            let (taken, seen) = self.files.entry(path).or_insert((None, now));
            if now != *taken && now == *seen && now.is_some() {
                *taken = now;
                settled = true;
            }
            *seen = now;
        }
        if settled {
            self.names.0 = names;
        }
        settled
    }
}

/// Which files a configuration is read from, now.
pub type ListFiles = Arc<dyn Fn() -> Vec<PathBuf> + Send + Sync>;

/// Takes changed certificates by itself. A configuration that has changed is for `reload` to take.
pub(super) async fn run(listeners: Arc<Mutex<Listeners>>, configuration: Option<ListFiles>, reload: impl Fn()) {
    let (mut certificates, mut configured) = (WatchedFiles::default(), WatchedFiles::default());
    configured.taken(&configuration.as_ref().map(|list| list()).unwrap_or_default(), stamp);
    loop {
        tokio::time::sleep(LOOK).await;
        let (held, list) = (Arc::clone(&listeners), configuration.clone());
        let look = move || {
            let paths = list.map(|list| list()).unwrap_or_default();
            let files = held.lock().certificate_files();
            if certificates.changed(files, stamp) {
                held.lock().renew_certificates();
            }
            let asks = configured.changed(paths, stamp);
            (certificates, configured, asks)
        };
        // Files may be on a network that is slow.
        match tokio::task::spawn_blocking(look).await {
            Ok((next, next_configured, asks)) => {
                (certificates, configured) = (next, next_configured);
                if asks {
                    reload();
                }
            }
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_taken_once_and_only_when_it_has_settled() {
        let mut watched = WatchedFiles::default();
        let mut look = |size: Option<u64>| watched.changed(vec!["a".into()], |_| size.map(|size| (1, size, 0, 0)));
        assert_eq!([look(Some(1)), look(Some(1))], [true, false], "it may have changed since it was read");
        assert_eq!([look(Some(2)), look(Some(3)), look(Some(3)), look(Some(3))], [false, false, true, false]);
        // Away for a moment: renamed over, or on its way.
        assert_eq!([look(None), look(None), look(Some(3)), look(Some(3))], [false; 4]);
        assert_eq!([look(None), look(Some(4)), look(Some(4))], [false, false, true]);
        let mut look =
            |paths: &[&str]| watched.changed(paths.iter().map(PathBuf::from).collect(), |_| Some((1, 4, 0, 0)));
        // The list of an `include`: longer, and shorter again.
        assert_eq!([look(&["a", "b"]), look(&["a", "b"])], [true, false]);
        assert_eq!([look(&["a"]), look(&["a"]), look(&["a"])], [false, true, false]);
        let mut watched = WatchedFiles::default();
        watched.taken(&["a".into()], |_| Some((1, 1, 0, 0)));
        assert!(!watched.changed(vec!["a".into()], |_| Some((1, 1, 0, 0))), "nothing has changed since the start");
    }
}
