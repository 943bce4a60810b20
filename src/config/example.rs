//! The documented example, made from the sections' own comments.

use super::section::REQUIRED;
use super::{REFERENCE, Reference};

/// Keys without a default, and what stands for them in the example.
const SAMPLES: [(&str, &str, &str); 7] = [
    ("[[upstream]]", "name", "\"api\""),
    ("[[upstream]]", "servers", "[\"127.0.0.1:3000\"]"),
    ("[[store]]", "url", "\"postgres://tollgate@127.0.0.1/tollgate\""),
    ("[[scope]]", "name", "\"api\""),
    ("[[pagination.route]]", "path", "\"/api/v3/projects/:id/repository/commits\""),
    ("[[route]]", "path", "\"/api/v3/session\""),
    ("[[route]]", "reason", "\"exchanges a password for a token\""),
];

/// A whole configuration with every key, its default and its meaning.
pub fn example() -> String {
    let mut out = String::from(
        "# Every key of tollgate's configuration, with its default. Only [[upstream]] is required.\n\
         # Made by `tollgate example-config`; `tollgate check FILE` reports what is wrong with a file.\n\
         # In every string, ${NAME} is an environment variable, ${credential:NAME} a credential of systemd and ${file:PATH} the\n\
         # first line of a file; $${ is a literal ${. One that is missing is an error, and no value is ever shown.\n\
         \n\
         # More files, read as if they stood here: in the order of their names, lists of tables are appended, and a key that\n\
         # is set twice is an error. Paths in them start at the folder of this file. An included file includes no others.\n\
         # include = [\"conf.d/*.toml\"]\n",
    );
    for Reference { header, doc, fields, commented } in REFERENCE {
        out += "\n";
        doc.iter().for_each(|line| out += &format!("#{line}\n"));
        let comment = if commented { "# " } else { "" };
        out += &format!("{comment}{header}\n");
        for field in fields {
            field.doc.iter().for_each(|line| out += &format!("#{line}\n"));
            let sample = SAMPLES.iter().find(|(section, key, _)| (*section, *key) == (header, field.key));
            let value = sample.map_or(field.default.trim_start_matches(REQUIRED), |(_, _, value)| value);
            out += &format!("{comment}{} = {value}\n", field.key);
        }
    }
    out
}
