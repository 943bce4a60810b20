//! What is wrong with a setting, as the stage says that the setting belongs to. It knows no file: `config/` finds the place
//! and says it to the operator.

/// One thing wrong. Never holds a secret: what it says is printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The key, as it stands in the section of these settings.
    pub key: &'static str,
    pub what: String,
    /// What to write instead, or to do.
    pub instead: String,
    pub severity: Severity,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Nothing runs with it.
    Error,
    /// It runs, and somebody should know what it means.
    Warning,
}

impl Problem {
    pub fn error(key: &'static str, what: impl Into<String>, instead: impl Into<String>) -> Self {
        Self { key, what: what.into(), instead: instead.into(), severity: Severity::Error }
    }

    pub fn warning(key: &'static str, what: impl Into<String>, instead: impl Into<String>) -> Self {
        Self { key, what: what.into(), instead: instead.into(), severity: Severity::Warning }
    }
}
