//! The registry's families as OpenMetrics 1.0, the format that has a place for exemplars. Knows no metric by its name. Prometheus must
//! store the same series from it as from the older format: only `le` is written differently, as this format wants it.

use super::exemplars::{Exemplar, REQUEST_ID, TRACE_ID};
use prometheus::proto::{Metric, MetricFamily, MetricType};
use std::borrow::Cow;
use std::fmt::{Display, Write as _};

/// `exemplar` has that of a series' bucket, counted from the lowest.
pub(super) fn encode(families: &[MetricFamily], exemplar: impl Fn(&str, &Metric, usize) -> Option<Exemplar>) -> String {
    let mut out = OpenMetricsText(String::new());
    for family in families {
        let name = family.name();
        // A counter's samples end in `_total`, and its family does not. One whose name does not end so would get another name.
        let (named, kind) = match (family.get_field_type(), name.strip_suffix("_total")) {
            (MetricType::COUNTER, Some(stem)) => (stem, "counter"),
            (MetricType::COUNTER, None) => (name, "unknown"),
            (MetricType::GAUGE, _) => (name, "gauge"),
            (MetricType::HISTOGRAM, _) => (name, "histogram"),
            // There is none here: the test of the names finds one.
            (MetricType::SUMMARY | MetricType::UNTYPED, _) => continue,
        };
        if !family.help().is_empty() {
            out.put(format_args!("# HELP {named} {}\n", escaped(family.help())));
        }
        out.put(format_args!("# TYPE {named} {kind}\n"));
        for metric in family.get_metric() {
            match family.get_field_type() {
                MetricType::HISTOGRAM => out.histogram(name, metric, |bucket| exemplar(name, metric, bucket)),
                MetricType::GAUGE => out.sample(name, "", metric, None, number(metric.get_gauge().get_value())),
                _ => out.sample(name, "", metric, None, number(metric.get_counter().get_value())),
            }
        }
    }
    out.0 + "# EOF\n"
}

struct OpenMetricsText(String);

impl OpenMetricsText {
    fn put(&mut self, what: std::fmt::Arguments<'_>) {
        // A String takes everything.
        let _: std::fmt::Result = self.0.write_fmt(what);
    }

    /// All but the end of the line.
    fn begin_sample(&mut self, name: &str, suffix: &str, metric: &Metric, le: Option<f64>, value: impl Display) {
        self.put(format_args!("{name}{suffix}"));
        let mut before = '{';
        for label in metric.get_label() {
            self.put(format_args!("{before}{}=\"{}\"", label.name(), escaped(label.value())));
            before = ',';
        }
        if let Some(bound) = le {
            self.put(format_args!("{before}le=\"{}\"", canonical(bound)));
            before = ',';
        }
        let end = if before == ',' { "}" } else { "" };
        self.put(format_args!("{end} {value}"));
    }

    fn sample(&mut self, name: &str, suffix: &str, metric: &Metric, le: Option<f64>, value: impl Display) {
        self.begin_sample(name, suffix, metric, le, value);
        self.0.push('\n');
    }

    fn histogram(&mut self, name: &str, metric: &Metric, exemplar: impl Fn(usize) -> Option<Exemplar>) {
        let histogram = metric.get_histogram();
        // The library leaves out the last bucket, which has all.
        let last = (f64::INFINITY, histogram.get_sample_count());
        let buckets = histogram.get_bucket().iter().map(|bucket| (bucket.upper_bound(), bucket.cumulative_count()));
        for (index, (upper, count)) in buckets.filter(|(upper, _)| upper.is_finite()).chain([last]).enumerate() {
            self.begin_sample(name, "_bucket", metric, Some(upper), count);
            if let Some(found) = exemplar(index) {
                self.exemplar(&found);
            }
            self.0.push('\n');
        }
        self.sample(name, "_sum", metric, None, number(histogram.get_sample_sum()));
        self.sample(name, "_count", metric, None, histogram.get_sample_count());
    }

    fn exemplar(&mut self, exemplar: &Exemplar) {
        let Exemplar { request_id, trace_id, seconds, at_unix_ms } = exemplar;
        self.put(format_args!(" # {{{REQUEST_ID}=\"{}\"", escaped(request_id)));
        if let Some(trace_id) = trace_id {
            self.put(format_args!(",{TRACE_ID}=\"{}\"", escaped(trace_id)));
        }
        let (at, ms) = (at_unix_ms / 1000, at_unix_ms % 1000);
        self.put(format_args!("}} {} {at}.{ms:03}", number(*seconds)));
    }
}

/// In a help text as in a label's value.
fn escaped(text: &str) -> Cow<'_, str> {
    if !text.contains(['\\', '\n', '"']) {
        return text.into();
    }
    text.replace('\\', "\\\\").replace('\n', "\\n").replace('"', "\\\"").into()
}

fn number(value: f64) -> String {
    if value.is_infinite() {
        return if value > 0.0 { "+Inf" } else { "-Inf" }.into();
    }
    value.to_string()
}

/// A bound as every exporter is to write it, since it is part of a series' name: `0.005`, `1.0`, `1e+06`, `+Inf`.
fn canonical(bound: f64) -> String {
    if bound == 0.0 || !bound.is_finite() || (1e-4..1e6).contains(&bound.abs()) {
        return if bound.is_finite() { format!("{bound:?}") } else { number(bound) };
    }
    let text = format!("{bound:e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
    format!("{digits}e{sign}{exponent:0>2}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus::core::Collector;
    use prometheus::{Counter, Gauge, Histogram, HistogramOpts, IntCounterVec, Opts};

    fn text_of(metric: &dyn Collector, exemplar: Option<&Exemplar>) -> String {
        encode(&metric.collect(), |_, _, bucket| exemplar.filter(|_| bucket == 1).cloned())
    }

    #[test]
    fn names_and_values_are_those_of_the_format() {
        let counter = IntCounterVec::new(Opts::new("a_total", "Some."), &["x"]).unwrap();
        counter.with_label_values(&["1"]).inc_by(3);
        assert_eq!(text_of(&counter, None), "# HELP a Some.\n# TYPE a counter\na_total{x=\"1\"} 3\n# EOF\n");
        // Its series would have another name as a counter.
        let odd = Counter::new("odd", "h").unwrap();
        assert_eq!(text_of(&odd, None), "# HELP odd h\n# TYPE odd unknown\nodd 0\n# EOF\n");
        let gauge = Gauge::new("g_total", "h").unwrap();
        for (value, text) in
            [(1.5, "1.5"), (f64::INFINITY, "+Inf"), (f64::NEG_INFINITY, "-Inf"), (f64::NAN, "NaN"), (-2.0, "-2")]
        {
            gauge.set(value);
            assert_eq!(
                text_of(&gauge, None),
                format!("# HELP g_total h\n# TYPE g_total gauge\ng_total {text}\n# EOF\n")
            );
        }
    }

    #[test]
    fn buckets_are_cumulative_and_have_exemplars() {
        let histogram = Histogram::with_opts(HistogramOpts::new("h", "h").buckets(vec![0.5, 1.0])).unwrap();
        [0.25, 0.75, 0.75, 4.0].iter().for_each(|value| histogram.observe(*value));
        let mut exemplar =
            Exemplar { request_id: "r".into(), trace_id: None, seconds: 0.75, at_unix_ms: 1_790_000_000_007 };
        let with = |exemplar: &str| {
            format!(
                "# HELP h h\n# TYPE h histogram\nh_bucket{{le=\"0.5\"}} 1\nh_bucket{{le=\"1.0\"}} 3{exemplar}\n\
                 h_bucket{{le=\"+Inf\"}} 4\nh_sum 5.75\nh_count 4\n# EOF\n"
            )
        };
        assert_eq!(text_of(&histogram, None), with(""));
        assert_eq!(text_of(&histogram, Some(&exemplar)), with(" # {request_id=\"r\"} 0.75 1790000000.007"));
        // Such an id is not taken from a client; the format must hold all the same.
        exemplar.request_id = "a\"} 1\n# EOF\n\\".into();
        exemplar.trace_id = Some("t".into());
        assert_eq!(
            text_of(&histogram, Some(&exemplar)),
            with(" # {request_id=\"a\\\"} 1\\n# EOF\\n\\\\\",trace_id=\"t\"} 0.75 1790000000.007")
        );
    }

    #[test]
    fn quotes_line_ends_and_backslashes_are_escaped() {
        let counter = IntCounterVec::new(Opts::new("a_total", "a \"b\" \\ \n."), &["x"]).unwrap();
        counter.with_label_values(&["\"\\\n"]).inc();
        assert_eq!(
            text_of(&counter, None),
            "# HELP a a \\\"b\\\" \\\\ \\n.\n# TYPE a counter\na_total{x=\"\\\"\\\\\\n\"} 1\n# EOF\n"
        );
    }

    #[test]
    fn bounds_are_written_as_the_format_wants_them() {
        // The examples of its specification.
        for text in [
            "0.0", "0.001", "0.002", "0.01", "0.1", "0.9", "0.95", "0.99", "0.999", "1.0", "1.7", "10.0", "1e-10",
            "1e-09", "1e-05", "0.0001", "100000.0", "1e+06", "1e+10", "2.5e+07", "+Inf",
        ] {
            assert_eq!(canonical(text.parse().unwrap()), text);
        }
    }
}
