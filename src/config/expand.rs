//! `${NAME}` in the strings of a configuration. What a variable holds can never change the structure of the file, because
//! only parsed strings are expanded, and it is never shown: what is said about a configuration has the name in its place.

use super::text_file;
use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Values of this length and more are hidden wherever they stand; shorter ones, which may be a part of any word, only in what
/// is said about their own key.
const HIDDEN_ANYWHERE: usize = 4;

/// What stood in for names in one configuration.
#[derive(Clone, Default)]
pub struct Expansions {
    names: Vec<ExpandedName>,
    /// The files that values were to come from, with their keys: those that could not be read as well.
    files: Vec<(String, PathBuf)>,
}

#[derive(Clone)]
struct ExpandedName {
    key: String,
    /// With its braces.
    name: String,
    value: Zeroizing<String>,
}

impl fmt::Debug for Expansions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.names.iter().map(|expanded| &expanded.name)).finish()
    }
}

impl Expansions {
    /// A text for people, with names in place of what they stood for.
    pub fn hide(&self, text: &str) -> String {
        self.hide_about("", text)
    }

    /// The keys in which a name stands for something else there, each as [`super::Document::changes`] names it.
    pub fn changes(&self, other: &Self) -> BTreeSet<String> {
        let differs = |own: &&ExpandedName| {
            let same_place = |there: &&ExpandedName| there.key == own.key && there.name == own.name;
            other.names.iter().find(same_place).is_some_and(|there| there.value != own.value)
        };
        let differing = self.names.iter().filter(differs);
        differing.map(|own| own.key.split('[').next().unwrap_or_default().to_owned()).collect()
    }

    /// The same for what is said about a key.
    pub(super) fn hide_about(&self, key: &str, text: &str) -> String {
        let mut text = text.to_owned();
        for ExpandedName { key: own, name, value } in &self.names {
            let is_own = !key.is_empty() && (own.starts_with(key) || key.starts_with(own.as_str()));
            if value.len() >= HIDDEN_ANYWHERE || is_own && !value.is_empty() {
                text = text.replace(value.as_str(), name);
            }
        }
        text
    }

    pub(super) fn files(&self) -> &[(String, PathBuf)] {
        &self.files
    }

    /// Longer values first: one may be a part of another.
    pub(super) fn sort(&mut self) {
        self.names.sort_by_key(|expanded| std::cmp::Reverse(expanded.value.len()));
    }
}

/// Where values come from.
pub(super) struct ValueSource<'a> {
    /// What `${file:…}` is relative to.
    pub(super) folder: &'a Path,
    pub(super) variable: &'a dyn Fn(&str) -> Option<std::ffi::OsString>,
}

/// Why a name cannot be expanded, and what to do. Names no value.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NotExpanded {
    pub(super) what: String,
    pub(super) instead: String,
}

fn not_expanded(what: impl Into<String>, instead: impl Into<String>) -> NotExpanded {
    NotExpanded { what: what.into(), instead: instead.into() }
}

impl ValueSource<'_> {
    /// The text with every `${…}` replaced, each of which is noted; `None` if there is none.
    pub(super) fn expand(
        &self,
        key: &str,
        text: &str,
        noted: &mut Expansions,
    ) -> Result<Option<Zeroizing<String>>, NotExpanded> {
        if !text.contains("${") {
            return Ok(None);
        }
        let (mut out, mut rest) = (Zeroizing::new(String::new()), text);
        while let Some(at) = rest.find("${") {
            if rest[..at].ends_with('$') {
                // `$${` is a literal `${`.
                out.push_str(&rest[..at - 1]);
                out.push_str("${");
                rest = &rest[at + 2..];
                continue;
            }
            out.push_str(&rest[..at]);
            let inner = &rest[at + 2..];
            let literal = "write $${ for a literal ${";
            let end = inner.find('}').ok_or_else(|| not_expanded("has a `${` without its `}`", literal))?;
            let name = &inner[..end];
            let value = self.value(key, name, noted)?;
            out.push_str(&value);
            noted.names.push(ExpandedName { key: key.into(), name: format!("${{{name}}}"), value });
            rest = &inner[end + 1..];
        }
        out.push_str(rest);
        Ok(Some(out))
    }

    fn value(&self, key: &str, name: &str, noted: &mut Expansions) -> Result<Zeroizing<String>, NotExpanded> {
        let mut of_file = |path: PathBuf| {
            let value = first_line(name, &path);
            noted.files.push((key.into(), path));
            value
        };
        if let Some(path) = name.strip_prefix("file:") {
            return of_file(self.folder.join(path));
        }
        if let Some(credential) = name.strip_prefix("credential:") {
            if credential.is_empty() || credential.contains('/') || credential.starts_with('.') {
                return Err(not_expanded(
                    format!("${{{name}}} is not the name of a credential"),
                    "write its name alone",
                ));
            }
            let Some(folder) = (self.variable)("CREDENTIALS_DIRECTORY") else {
                let instead = "give the unit LoadCredential=, or run the command with CREDENTIALS_DIRECTORY set";
                return Err(not_expanded(format!("${{{name}}}: systemd gave this process no credentials"), instead));
            };
            return of_file(PathBuf::from(folder).join(credential));
        }
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if name.is_empty() || !name.chars().all(is_name) || name.starts_with(|c: char| c.is_ascii_digit()) {
            let instead = "write ${NAME}, ${file:PATH} or ${credential:NAME}, and $${ for a literal ${";
            return Err(not_expanded(format!("${{{name}}} is not the name of an environment variable"), instead));
        }
        let Some(value) = (self.variable)(name) else {
            let instead = format!("set {name} for this process, or write $${{ for a literal ${{");
            return Err(not_expanded(format!("the environment variable {name} is not set"), instead));
        };
        let not_text = |_| not_expanded(format!("the environment variable {name} is not UTF-8"), "set it to a text");
        value.into_string().map(Zeroizing::new).map_err(not_text)
    }
}

/// Of a file with a secret: as with the keys that end in `_file`.
fn first_line(name: &str, path: &Path) -> Result<Zeroizing<String>, NotExpanded> {
    let instead = "name a file whose first line is the value";
    let text = match text_file::read_regular(path, text_file::SECRET) {
        Ok(text) => Zeroizing::new(text),
        Err(why) => return Err(not_expanded(format!("${{{name}}}: {} {why}", path.display()), instead)),
    };
    match text.lines().next() {
        Some(line) if !line.is_empty() => Ok(Zeroizing::new(line.to_owned())),
        _ => Err(not_expanded(format!("${{{name}}}: {} has an empty first line", path.display()), instead)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expanded(text: &str, noted: &mut Expansions) -> Result<Option<String>, NotExpanded> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("secret"), "from-file\nsecond\n").unwrap();
        std::fs::write(folder.path().join("empty"), "\n").unwrap();
        std::fs::write(folder.path().join("dos"), "from-dos\r\n").unwrap();
        std::fs::write(folder.path().join("bytes"), b"line\nS3CRET\xff\n").unwrap();
        std::fs::write(folder.path().join("bounded"), vec![b'x'; text_file::SECRET as usize]).unwrap();
        std::fs::write(folder.path().join("long"), vec![b'x'; text_file::SECRET as usize + 1]).unwrap();
        nix::unistd::mkfifo(&folder.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let variable = |name: &str| match name {
            "HOST" => Some("db.test".into()),
            "NEXT" => Some("${HOST}".into()),
            "EMPTY" => Some("".into()),
            "CREDENTIALS_DIRECTORY" if !text.contains("none given") => Some(folder.path().as_os_str().to_owned()),
            "BYTES" => Some(std::os::unix::ffi::OsStringExt::from_vec(b"S3CRET\xff".to_vec())),
            _ => None,
        };
        let source = ValueSource { folder: folder.path(), variable: &variable };
        Ok(source.expand("key", text, noted)?.map(|text| text.to_string()))
    }

    #[test]
    fn names_are_replaced_once_and_a_literal_stays() {
        for (text, expected) in [
            ("plain $1 $ {} $", None),
            ("a${HOST}b", Some("adb.testb")),
            ("${HOST}:${HOST}", Some("db.test:db.test")),
            ("$${HOST}", Some("${HOST}")),
            ("$$${HOST}", Some("$${HOST}")),
            ("$x${HOST}", Some("$xdb.test")),
            // What a value says is not read again.
            ("${NEXT}", Some("${HOST}")),
            ("[${EMPTY}]", Some("[]")),
            ("${file:secret}", Some("from-file")),
            ("${credential:secret}", Some("from-file")),
            ("${file:dos}", Some("from-dos")),
        ] {
            let said = expanded(text, &mut Expansions::default());
            assert_eq!(said.as_ref().map(Option::as_deref), Ok(expected), "{text}");
        }
        for (text, part) in [
            ("${GONE}", "GONE is not set"),
            ("${HOST", "without its `}`"),
            ("${}", "is not the name"),
            ("${9}", "is not the name"),
            ("${A-B}", "is not the name"),
            ("${HOST:-x}", "is not the name"),
            ("${file:gone}", "cannot be read"),
            ("${file:empty}", "an empty first line"),
            ("${credential:../secret}", "is not the name of a credential"),
            ("${credential:}", "is not the name of a credential"),
            ("${credential:secret} none given", "systemd gave this process no credentials"),
            ("${BYTES}", "the environment variable BYTES is not UTF-8"),
            ("${file:bytes}", "bytes is not UTF-8 in line 2"),
            ("${file:long}", "long has more than 64 KiB"),
            // Neither waited for nor read without an end.
            ("${file:fifo}", "fifo is not a file"),
            ("${file:/dev/zero}", "/dev/zero is not a file"),
            ("${file:.}", "is not a file"),
        ] {
            let said = expanded(text, &mut Expansions::default());
            assert!(said.as_ref().is_err_and(|said| said.what.contains(part)), "{text}: {said:?}");
            assert!(!format!("{said:?}").contains("S3CRET"), "{text}: {said:?}");
        }
        assert!(expanded("${file:bounded}", &mut Expansions::default()).is_ok());
    }

    #[test]
    fn keys_are_named_whose_names_stand_for_something_else() {
        let noted = |all: &[(&str, &str, &str)]| {
            let one = |(key, name, value): &(&str, &str, &str)| ExpandedName {
                key: (*key).into(),
                name: (*name).into(),
                value: Zeroizing::new((*value).into()),
            };
            Expansions { names: all.iter().map(one).collect(), files: Vec::new() }
        };
        let old = noted(&[("store[0].url", "${A}", "1"), ("log.access", "${B}", "2"), ("route[1].path", "${A}", "1")]);
        assert!(old.changes(&old).is_empty());
        let new = noted(&[("log.access", "${B}", "3"), ("store[0].url", "${A}", "4"), ("route[1].path", "${A}", "1")]);
        assert_eq!(old.changes(&new).into_iter().collect::<Vec<_>>(), ["log.access", "store"]);
        // Another name is another text of the file, which says so itself.
        assert!(old.changes(&noted(&[("log.access", "${C}", "3")])).is_empty());
    }

    #[test]
    fn what_stood_for_a_name_is_hidden() {
        let mut noted = Expansions::default();
        let mut note = |key: &str, name: &str, value: &str| {
            noted.names.push(ExpandedName { key: key.into(), name: name.into(), value: Zeroizing::new(value.into()) });
        };
        note("store[0].url", "${URL}", "secret");
        note("store[0].name", "${LONG}", "secret-and-more");
        note("server.threads", "${N}", "4");
        noted.sort();
        assert_eq!(noted.hide("a secret-and-more, a secret, 4"), "a ${LONG}, a ${URL}, 4");
        assert_eq!(noted.hide_about("server.threads", "found 4"), "found ${N}");
        assert_eq!(noted.hide_about("server.listen", "found 4"), "found 4");
        assert!(!format!("{noted:?}").contains("secret"));
    }
}
