//! Rules that can be switched off one at a time, so that the differential test suite and the fuzz targets can prove that
//! they detect what each of them prevents. Only in the binaries with the feature `seeded-faults`, `tollgate-seeded` and the
//! one of `fuzz/`; in every other build [`off`] is the constant false and the environment is not read.

/// The rules that can be switched off, by variant name in TOLLGATE_SEEDED_FAULT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// Token parameters are removed from the query.
    QueryToken,
    /// Page parameters of the query are kept within bounds.
    PageBounds,
    /// Names that PHP folds or cuts are matched.
    PhpNames,
    /// Names in JSON are matched case-insensitively.
    JsonNames,
    /// `_method` in a query is refused.
    QueryMethod,
    /// X-HTTP-Method-Override is refused.
    MethodOverride,
    /// A query is refused together with a charset that changes its names.
    QueryCharset,
    /// A GET's body must hold no page parameters.
    BodyPages,
    /// A body without a type is watched as JSON.
    UntypedJson,
    /// A Content-Type that names a parsed type but does not follow the grammar is refused.
    TypeGrammar,
    /// The Content-Type of a parsed type is forwarded in one spelling.
    CanonicalType,
    /// Charsets that change the bytes of names are refused.
    Charset,
    /// Bodies of a parsed type with a Content-Encoding are refused.
    Coding,
    /// A part has exactly one name, in one spelling.
    PartName,
    /// The delimiter does not occur inside a part.
    Delimiter,
    /// Nothing precedes the first part.
    PartStart,
    /// Nothing follows the last part.
    PartEnd,
    /// No request makes the gateway panic.
    Panic,

    // From here on, what the fuzz targets alone are tested with.
    /// Content-Length beside Transfer-Encoding is refused.
    BothFramings,
    /// The size of a chunk has at least one digit.
    ChunkDigits,
    /// Escaped dots count as dots.
    EscapedDots,
    /// The escapes of a canonical path are in capitals.
    EscapeCase,
    /// A backend's head has whole line ends and no control bytes.
    AnswerText,
    /// URLs in an answer lose the request's token.
    AnswerToken,
    /// Nothing follows the ports in a line of the PROXY protocol.
    ProxyLineEnd,
    /// A value of HTTP/2 has no blanks at its ends.
    Http2Blanks,
    /// A CONTINUATION frame can end a header block.
    BlockEnd,
    /// Hex digits of a trace context are in lower case.
    TraceCase,
    /// What is wrong with a token file is said without what stands in it.
    FileQuotes,
    /// A cache file has as many entries as its header says.
    CacheCount,
    /// A value that may be a secret is not shown.
    ConfigSecret,
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

/// Panics on a path that says so, if that rule is switched off: a panic within a request must cost no more than its connection.
#[inline]
pub(crate) fn trip(path: &[u8]) {
    assert!(!off(Rule::Panic) || !path.ends_with(b"/seeded-panic"), "a seeded panic");
}
