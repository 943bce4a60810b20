//! In which format a scraper wants the metrics, by its Accept. OpenMetrics is for those that name it; everybody else, and whoever sends
//! what cannot be read, gets Prometheus' text format.

pub(super) const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// The draft of the same: what is written here is the same in both.
const OPENMETRICS_DRAFT: &str = "application/openmetrics-text; version=0.0.1; charset=utf-8";

/// Whether it is a type that Accept chooses.
pub(super) fn is_chosen(content_type: &str) -> bool {
    [TEXT, OPENMETRICS, OPENMETRICS_DRAFT].contains(&content_type)
}

/// The Content-Type to answer with.
pub(super) fn wanted<'v>(accept: impl Iterator<Item = &'v [u8]>) -> &'static str {
    let mut wishes = Wishes::default();
    for value in accept {
        if std::str::from_utf8(value).ok().and_then(|list| wishes.add(list)).is_none() {
            return TEXT;
        }
    }
    let Wishes { openmetrics, draft, text: (_, text) } = wishes;
    match openmetrics.max(draft) {
        0 => TEXT,
        best if best < text => TEXT,
        _ if openmetrics >= draft => OPENMETRICS,
        _ => OPENMETRICS_DRAFT,
    }
}

/// How much each format is wanted, in thousandths.
#[derive(Default)]
struct Wishes {
    openmetrics: u16,
    draft: u16,
    /// With how closely that was said: `text/plain` counts for more than `*/*`.
    text: (u8, u16),
}

impl Wishes {
    /// `None`: malformed.
    fn add(&mut self, list: &str) -> Option<()> {
        for range in list.split(',').map(trimmed).filter(|range| !range.is_empty()) {
            let mut parts = range.split(';').map(trimmed);
            let (kind, subtype) = parts.next()?.split_once('/')?;
            let (mut version, mut weight) = (None, 1000);
            for parameter in parts.filter(|parameter| !parameter.is_empty()) {
                let (name, value) = parameter.split_once('=')?;
                let quoted = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
                let value = quoted.unwrap_or(value);
                if !is_token(name) || !is_token(value) {
                    return None;
                }
                if name.eq_ignore_ascii_case("q") {
                    weight = thousandths(value)?;
                } else if name.eq_ignore_ascii_case("version") {
                    version = Some(value);
                }
            }
            if !is_token(kind) || !is_token(subtype) {
                return None;
            }
            let kind = (kind.to_ascii_lowercase(), subtype.to_ascii_lowercase());
            match (kind.0.as_str(), kind.1.as_str(), version) {
                ("application", "openmetrics-text", None | Some("1.0.0")) => {
                    self.openmetrics = self.openmetrics.max(weight);
                }
                ("application", "openmetrics-text", Some("0.0.1")) => self.draft = self.draft.max(weight),
                ("text", "plain", Some("0.0.4")) => self.text = self.text.max((3, weight)),
                ("text", "plain", None) => self.text = self.text.max((2, weight)),
                ("text", "*", _) => self.text = self.text.max((1, weight)),
                ("*", "*", _) => self.text = self.text.max((0, weight)),
                _ => {}
            }
        }
        Some(())
    }
}

fn trimmed(text: &str) -> &str {
    text.trim_matches([' ', '\t'])
}

/// RFC 9110, 5.6.2.
fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

/// `0.5` is 500. At most three digits, and at most 1.
fn thousandths(text: &str) -> Option<u16> {
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    if !matches!(whole, "0" | "1") || part.len() > 3 || !part.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    format!("{whole}{part:0<3}").parse().ok().filter(|weight| *weight <= 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(accept: &[&str]) -> &'static str {
        wanted(accept.iter().map(|value| value.as_bytes()))
    }

    #[test]
    fn scrapers_get_what_they_ask_for() {
        let mut seen = 0;
        for (accept, answer) in [
            // Prometheus 2.5 to 2.48, 2.49 to 2.55 with protobuf, 3.
            ("application/openmetrics-text; version=0.0.1,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", OPENMETRICS_DRAFT),
            (
                "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
                 text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
                OPENMETRICS,
            ),
            (
                "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited,\
                 application/openmetrics-text;version=1.0.0;q=0.8,application/openmetrics-text;version=0.0.1;q=0.75,\
                 text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
                OPENMETRICS,
            ),
            (
                "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,application/openmetrics-text;\
                 version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,\
                 */*;q=0.1",
                OPENMETRICS,
            ),
            // scrape_protocols: [PrometheusText0.0.4, OpenMetricsText1.0.0]
            ("text/plain;version=0.0.4;q=0.6,application/openmetrics-text;version=1.0.0;q=0.5,*/*;q=0.4", TEXT),
            ("application/openmetrics-text", OPENMETRICS),
            ("Application/OpenMetrics-Text; Version=\"1.0.0\" ; charset=utf-8", OPENMETRICS),
            (
                "application/openmetrics-text;version=1.0.0;q=0.2, application/openmetrics-text;version=0.0.1",
                OPENMETRICS_DRAFT,
            ),
            // Browsers, curl.
            ("text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8", TEXT),
            ("*/*", TEXT),
            ("", TEXT),
            ("application/*", TEXT),
            // Not wanted, less wanted, unknown.
            ("application/openmetrics-text;q=0", TEXT),
            ("application/openmetrics-text;q=0.000, */*", TEXT),
            ("application/openmetrics-text;q=0.9, */*", TEXT),
            ("application/openmetrics-text;q=0.9, text/*;q=0.91", TEXT),
            ("application/openmetrics-text;q=0.9, text/plain;q=0.1, */*", OPENMETRICS),
            ("application/openmetrics-text;version=2.0.0, text/plain;q=0.1", TEXT),
            ("application/openmetrics-text-x, text/application", TEXT),
            ("application/openmetrics-textual", TEXT),
        ] {
            assert_eq!(of(&[accept]), answer, "{accept}");
            seen += 1;
        }
        assert_eq!(seen, 20);
        assert_eq!(of(&[]), TEXT);
        assert_eq!(of(&["*/*;q=0.1", "application/openmetrics-text;q=0.5"]), OPENMETRICS);
    }

    #[test]
    fn what_cannot_be_read_gets_the_format_of_before() {
        let good = "application/openmetrics-text;version=1.0.0";
        assert_eq!(of(&[good]), OPENMETRICS);
        let mut seen = 0;
        for bad in [
            "text",
            "/plain",
            "text/",
            "text/plain;q",
            "text/plain;q=",
            "text/plain;q=2",
            "text/plain;q=1.001",
            "text/plain;q=0.1234",
            "text/plain;q=-1",
            "text/plain;q=+0.5",
            "text/plain;q=.5",
            "text/plain;q=0,5",
            "text/plain;q=0.5x",
            "text/plain;q=NaN",
            "text/plain;=1",
            "text/plain;a=\"b",
            "text/plain;a=\"b, c\"",
            "te xt/plain",
            "text/pl\u{e4}in",
            "text/plain;q =0.5",
            "text/plain/x",
        ] {
            assert_eq!(of(&[&format!("{good},{bad}")]), TEXT, "{bad}");
            assert_eq!(of(&[good, bad]), TEXT, "{bad}");
            seen += 1;
        }
        assert_eq!(seen, 21);
        assert_eq!(wanted([good.as_bytes(), b"\xff"].into_iter()), TEXT);
    }
}
