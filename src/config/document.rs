//! What the files of a configuration say, as one document, with names that are not expanded: two of them are compared to name the keys that differ.

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
    /// Of texts that are known to be TOML, and to set no key twice.
    pub(super) fn of<'t>(texts: impl Iterator<Item = &'t str>) -> Self {
        let mut whole = Table::new();
        texts.for_each(|text| add(&mut whole, text.parse().unwrap_or_default()));
        Self(whole)
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

fn add(into: &mut Table, table: Table) {
    for (key, value) in table {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(known)), Value::Table(more)) => add(known, more),
            (Some(Value::Array(known)), Value::Array(more)) => known.extend(more),
            (_, value) => drop(into.insert(key, value)),
        }
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
        let parse = |text: &str| Document::of([text].into_iter());
        let old =
            parse("[server]\nlisten = [\"a\"]\nthreads = 1\n[cache]\nsnapshot = \"x\"\n[[upstream]]\nname = \"a\"\n");
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
            assert_eq!(old.changes(&parse(text)).join(" "), expected, "{text}");
        }
    }
}
