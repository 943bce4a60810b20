//! Rules of judging that can be switched off, one at a time, so that the differential suite can show that it sees what
//! gets through without each. Only in the binary `tollgate-seeded` of the feature `seeded-faults`; in every other build
//! [`off`] is the constant false, and the environment is never asked.

/// What can be switched off, by the name of its variant in TOLLGATE_SEEDED_FAULT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// Token parameters are cut out of the query.
    QueryToken,
    /// Page parameters of the query are kept within bounds.
    PageBounds,
    /// Names that PHP folds or cuts are matched.
    PhpNames,
    /// Names in JSON are matched in any case of letters.
    JsonNames,
    /// `_method` in a query is refused.
    QueryMethod,
    /// X-HTTP-Method-Override is refused.
    MethodOverride,
    /// A query is refused beside a charset in which it has other names.
    QueryCharset,
    /// A GET's body must hold no page parameters.
    BodyPages,
    /// A body without a type is watched as JSON.
    UntypedJson,
    /// What claims a readable type and is not of the grammar is refused.
    TypeGrammar,
    /// A readable type is forwarded in one spelling.
    CanonicalType,
    /// Charsets in which names have other bytes are refused.
    Charset,
    /// Coded bodies of a readable type are refused.
    Coding,
    /// A part has one name, said in one way.
    PartName,
    /// The delimiter stands nowhere inside a part.
    Delimiter,
    /// Nothing stands before the first part.
    PartStart,
    /// Nothing stands behind the last part.
    PartEnd,
}

#[cfg(not(feature = "seeded-faults"))]
#[inline]
pub(crate) const fn off(_rule: Rule) -> bool {
    false
}

#[cfg(feature = "seeded-faults")]
pub(crate) fn off(rule: Rule) -> bool {
    static NAME: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    let name = NAME.get_or_init(|| std::env::var("TOLLGATE_SEEDED_FAULT").ok());
    name.as_deref() == Some(format!("{rule:?}").as_str())
}
