//! Which configuration file a command reads. It must not know what is in it.

use super::Failure;
use crate::config;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

const VARIABLE: &str = "TOLLGATE_CONFIG";
const HERE: &str = "./tollgate.toml";
const SYSTEM: &str = "/etc/tollgate/tollgate.toml";

/// The same option before and behind every command.
#[derive(clap::Args, Clone, Debug, Default)]
pub(super) struct ConfigOption {
    /// Configuration file (default: the one in TOLLGATE_CONFIG, else ./tollgate.toml, else /etc/tollgate/tollgate.toml)
    #[arg(short, long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NamedBy {
    Option,
    Variable,
    /// Nobody: it was found.
    Search,
}

/// The file that a command reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FoundConfig {
    pub(super) path: PathBuf,
    named_by: NamedBy,
}

impl FoundConfig {
    /// How it came to be this one, in brackets; empty if an option says so.
    pub(super) const fn how(&self) -> &'static str {
        match self.named_by {
            NamedBy::Option => "",
            NamedBy::Variable => " (named by TOLLGATE_CONFIG)",
            NamedBy::Search => " (found; --config names another)",
        }
    }
}

impl std::fmt::Display for FoundConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.path.display(), self.how())
    }
}

impl ConfigOption {
    pub(super) const fn is_given(&self) -> bool {
        self.config.is_some()
    }

    /// The file that is named, or the first that is there.
    pub(super) fn find(&self) -> Result<FoundConfig, Failure> {
        self.search()?.ok_or_else(|| {
            Failure::Usage(format!(
                "no configuration: none is named with --config or {VARIABLE}, and there is no {HERE} and no {SYSTEM}; \
                 `tollgate init` writes one"
            ))
        })
    }

    /// The same for a command that can do without. `None`: none is named, and none is there.
    pub(super) fn search(&self) -> Result<Option<FoundConfig>, Failure> {
        search(self.config.as_deref(), std::env::var_os(VARIABLE), [HERE, SYSTEM].map(Path::new), config::distrusted)
    }

    /// The same where the file can be given without the option as well.
    pub(super) fn or_named(&self, file: Option<&Path>) -> Result<FoundConfig, Failure> {
        match (file, &self.config) {
            (Some(_), Some(_)) => Err(Failure::Usage("the file is given twice: once is enough".into())),
            (Some(file), None) => Ok(FoundConfig { path: file.into(), named_by: NamedBy::Option }),
            (None, _) => self.find(),
        }
    }

    /// Below an error: which file was read, if the command line does not say so.
    pub(super) fn note_source(&self, error: &str) {
        if let Ok(Some(found)) = self.search()
            && (found.named_by == NamedBy::Variable
                || found.named_by == NamedBy::Search && !error.contains(&*found.path.to_string_lossy()))
        {
            eprintln!("note: the configuration is {found}");
        }
    }
}

/// A file that is named is the one, there or not: to go on to the next would run with a configuration that nobody meant.
fn search(
    named: Option<&Path>,
    variable: Option<OsString>,
    places: [&Path; 2],
    distrusted: impl Fn(&Path) -> Option<String>,
) -> Result<Option<FoundConfig>, Failure> {
    if let Some(path) = named {
        return Ok(Some(FoundConfig { path: path.into(), named_by: NamedBy::Option }));
    }
    if let Some(path) = variable.filter(|path| !path.is_empty()) {
        return Ok(Some(FoundConfig { path: path.into(), named_by: NamedBy::Variable }));
    }
    // One that cannot be examined is not passed over: reading it says why.
    let is_there =
        |path: &Path| !std::fs::symlink_metadata(path).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound);
    let Some(path) = places.into_iter().find(|path| is_there(path)) else { return Ok(None) };
    match distrusted(path) {
        Some(why) => Err(Failure::Usage(format!(
            "{}: nobody named this file, and a process of root does not read it: {why}; name it with --config, or let only \
             root write to it and its folder",
            path.display()
        ))),
        None => Ok(Some(FoundConfig { path: path.into(), named_by: NamedBy::Search })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_that_is_named_or_there_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let [here, system] = ["here.toml", "system.toml"].map(|name| folder.path().join(name));
        let found = |named: Option<&str>, variable: Option<&str>| {
            let places = [here.as_path(), system.as_path()];
            let found = search(named.map(Path::new), variable.map(Into::into), places, |_| None);
            found.map_err(|failure| failure.to_string()).unwrap().map(|found| found.path)
        };
        assert_eq!(found(None, None), None);
        std::fs::write(&system, "").unwrap();
        assert_eq!(found(None, None).as_ref(), Some(&system));
        std::fs::write(&here, "").unwrap();
        assert_eq!(found(None, None).as_ref(), Some(&here));
        assert_eq!(found(None, Some("")).as_ref(), Some(&here), "an empty variable names nothing");
        assert_eq!(found(None, Some("gone.toml")), Some("gone.toml".into()), "a name is not passed over");
        assert_eq!(found(Some("other.toml"), Some("gone.toml")), Some("other.toml".into()));
        // A link to nowhere is there: an error, and not the next file.
        std::fs::remove_file(&here).unwrap();
        std::os::unix::fs::symlink("nowhere", &here).unwrap();
        assert_eq!(found(None, None).as_ref(), Some(&here));
        let refused = search(None, None, [&here, &system], |_| Some("everybody can write to it".into()));
        assert!(
            matches!(refused, Err(Failure::Usage(text)) if text.contains("everybody") && text.contains("--config"))
        );
    }
}
