//! The reference in the forms that people and editors read: a page in Markdown and a JSON Schema, both made from the sections'
//! own comments, defaults and types.

use super::section::{REQUIRED, SectionKey};
use super::sources::INCLUDE;
use super::{REFERENCE, Reference};
use serde_json::{Map, Value, json};

const INCLUDE_DOC: &str =
    "Other files that are read as if they stood here, as patterns like \"conf.d/*.toml\", relative to this file.";

/// How a section stands in the file.
enum SectionShape<'a> {
    /// `[name]`
    Table(&'a str),
    /// `[[name]]`, or `[[outer.name]]`
    List(Option<&'a str>, &'a str),
    /// `[outer.NAME]`
    Named(&'a str),
}

impl SectionShape<'_> {
    fn of(header: &str) -> SectionShape<'_> {
        match header.strip_prefix("[[").and_then(|rest| rest.strip_suffix("]]")) {
            Some(path) => match path.split_once('.') {
                Some((outer, name)) => SectionShape::List(Some(outer), name),
                None => SectionShape::List(None, path),
            },
            None => {
                let path = header.trim_matches(['[', ']']);
                path.split_once('.').map_or(SectionShape::Table(path), |(outer, _)| SectionShape::Named(outer))
            }
        }
    }
}

/// A comment as one text.
fn prose(doc: &[&str]) -> String {
    doc.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ")
}

/// JSON Schema of the whole configuration, for editors that read TOML with one.
pub fn schema() -> String {
    let mut properties = Map::new();
    let include = json!({ "type": "array", "items": { "type": "string" }, "description": INCLUDE_DOC });
    properties.insert(INCLUDE.to_owned(), include);
    for Reference { header, doc, fields, .. } in &REFERENCE {
        let table = table(doc, fields);
        match SectionShape::of(header) {
            SectionShape::Table(name) => {
                properties.insert(name.to_owned(), table);
            }
            SectionShape::List(None, name) => {
                let list = properties.entry(name).or_insert_with(|| json!({ "type": "array", "items": null }));
                // Where there are several kinds, each has a table.
                let items = match list["items"].take() {
                    Value::Null => table,
                    Value::Object(mut several) if several.contains_key("anyOf") => {
                        if let Some(kinds) = several.get_mut("anyOf").and_then(Value::as_array_mut) {
                            kinds.push(table);
                        }
                        several.into()
                    }
                    first => json!({ "anyOf": [first, table] }),
                };
                list["items"] = items;
            }
            SectionShape::List(Some(outer), name) => {
                properties[outer]["properties"][name] = json!({ "type": "array", "items": table });
            }
            SectionShape::Named(outer) => {
                properties.insert(outer.to_owned(), json!({ "type": "object", "additionalProperties": table }));
            }
        }
    }
    let schema = json!({
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "tollgate",
        "description": "The configuration of tollgate. Made by `tollgate example-config --schema`.",
        "type": "object",
        "properties": properties,
        "additionalProperties": false,
    });
    format!("{schema:#}\n")
}

fn table(doc: &[&str], fields: &[SectionKey]) -> Value {
    let mut properties = Map::new();
    for field in fields {
        let mut schema = match field.key {
            // The kinds of stores have a schema each, and are told apart by this.
            "kind" => json!({ "const": field.default.trim_matches(['!', '"']) }),
            _ => (field.schema)(),
        };
        schema["description"] = prose(field.doc).into();
        properties.insert(field.key.to_owned(), schema);
    }
    // The kind of a store can be left out of the first one only.
    let is_required = |field: &&SectionKey| {
        field.default.starts_with(REQUIRED) || (field.key == "kind" && field.default != "\"sqlite\"")
    };
    let required: Vec<&str> = fields.iter().filter(is_required).map(|field| field.key).collect();
    json!({
        "type": "object",
        "description": prose(doc),
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    })
}

/// A page with every key, its default and its meaning.
pub fn page() -> String {
    let mut out = String::from(
        "# Configuration\n\n\
         Every section and key, with its default and its meaning. Made by `tollgate example-config --markdown` from the code that \
         reads the file; [config/tollgate.example.toml](https://github.com/tollgate/tollgate/blob/main/config/tollgate.example.toml) \
         is the same as a file, and `tollgate example-config --schema` a JSON Schema, with which editors complete and check keys.\n\n\
         Only `[[upstream]]` is required. Times are written like `\"250ms\"`, `\"60s\"` or `\"1h 30m\"`, sizes like `\"32KiB\"`. \
         `tollgate check` says what is wrong with a file, where, and what to write instead.\n\n\
         At the top of the file, `include = [\"conf.d/*.toml\"]` reads other files as if they stood there, and `${NAME}` in a string is \
         the value of that environment variable.\n",
    );
    for Reference { header, doc, fields, .. } in &REFERENCE {
        let kind = fields.iter().find(|field| field.key == "kind" && *header == "[[store]]");
        let title = kind.map_or(String::new(), |kind| format!(" kind = {}", kind.default.trim_start_matches(REQUIRED)));
        out += &format!("\n## {header}{title}\n\n{}\n\n| key | default | meaning |\n|---|---|---|\n", prose(doc));
        for field in fields.iter() {
            let default = match field.default.strip_prefix(REQUIRED) {
                Some(_) if field.key != "kind" => "required".to_owned(),
                other => format!("`{}`", other.unwrap_or(field.default).replace('|', "\\|")),
            };
            out += &format!("| `{}` | {default} | {} |\n", field.key, prose(field.doc).replace('|', "\\|"));
        }
    }
    out
}
