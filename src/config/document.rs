//! What a configuration file says, as a document: two of them are compared to name the keys that differ.

use toml::{Table, Value};

#[derive(Clone, Default, PartialEq)]
pub struct Document(Table);

impl std::fmt::Debug for Document {
    /// A URL in it may hold a password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Document")
    }
}

impl Document {
    /// Of a text that is known to be TOML.
    pub(super) fn parse(text: &str) -> Self {
        Self(text.parse().unwrap_or_default())
    }

    pub(super) const fn table(&self) -> &Table {
        &self.0
    }

    /// The keys that the other one has with another value, more, or not at all: `pagination.max_per_page` for a key of a
    /// table, `upstream` for a list of tables.
    pub fn changes(&self, other: &Self) -> Vec<String> {
        let mut changed = Vec::new();
        compare(&self.0, &other.0, "", &mut changed);
        changed
    }
}

fn compare(old: &Table, new: &Table, above: &str, changed: &mut Vec<String>) {
    let empty = Table::new();
    let table = |value: Option<&Value>| match value {
        None => Some(empty.clone()),
        Some(value) => value.as_table().cloned(),
    };
    let added = new.keys().filter(|key| !old.contains_key(*key));
    for key in old.keys().chain(added) {
        let (before, after) = (old.get(key), new.get(key));
        if before == after {
            continue;
        }
        let name = if above.is_empty() { key.clone() } else { format!("{above}.{key}") };
        match (table(before), table(after)) {
            (Some(before), Some(after)) => compare(&before, &after, &name, changed),
            _ => changed.push(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_named_by_key() {
        let old = Document::parse(
            "[server]\nlisten = [\"a\"]\nthreads = 1\n[cache]\nsnapshot = \"x\"\n[[upstream]]\nname = \"a\"\n",
        );
        for (text, expected) in [
            (
                "[server]\nthreads = 1\nlisten = [\"a\"]\n\n# moved\n[[upstream]]\nname = \"a\"\n[cache]\nsnapshot = \"x\"\n",
                "",
            ),
            (
                "[server]\nlisten = [\"b\"]\n[cache]\nsnapshot = \"x\"\n[[upstream]]\nname = \"a\"\n",
                "server.listen server.threads",
            ),
            (
                "[server]\nlisten = [\"a\"]\nthreads = 1\n[[upstream]]\nname = \"b\"\n[log]\nlevel = \"warn\"\n",
                "cache.snapshot upstream log.level",
            ),
            (
                "[server]\nlisten = [\"a\"]\nthreads = 1\n[cache]\nsnapshot = \"x\"\n[[upstream]]\nname = \"a\"\n[pagination]\n[[pagination.route]]\npath = \"/\"\n",
                "pagination.route",
            ),
        ] {
            assert_eq!(old.changes(&Document::parse(text)).join(" "), expected, "{text}");
        }
    }
}
