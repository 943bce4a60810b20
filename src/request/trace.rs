//! A request's place in a trace, as W3C Trace Context (`traceparent`) has it. Pure: new ids come from the caller. A field that
//! is not exactly of the grammar is no trace context, and must never be passed on.

use super::seeded::{self, Rule};
use super::view::{FieldKind, RequestView};
use crate::hex;
use std::num::{NonZeroU64, NonZeroU128};

/// What becomes of `traceparent` and `tracestate`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TraceMode {
    /// Well-formed ones are passed on as they came.
    #[default]
    Pass,
    /// The client's trace is gone on with, with a span of tollgate's own in it; a request without one begins a trace.
    Make,
    /// Every request begins a trace.
    Restart,
    /// None is passed on.
    Drop,
}

impl TraceMode {
    /// Whether requests have a span of tollgate's own.
    pub const fn makes_spans(self) -> bool {
        matches!(self, Self::Make | Self::Restart)
    }
}

/// The place of one request in its trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    pub trace_id: NonZeroU128,
    /// The client's span.
    pub parent: Option<NonZeroU64>,
    /// tollgate's own span, the parent of what the backend does. `None`: the client's span is passed on.
    pub span: Option<NonZeroU64>,
    flags: u8,
}

/// Ids for a trace that begins here, and for a span.
#[derive(Clone, Copy, Debug)]
pub struct NewIds {
    pub trace_id: NonZeroU128,
    pub span: NonZeroU64,
    /// Whether a trace that begins here is recorded.
    pub sampled: bool,
}

const SAMPLED: u8 = 1;
/// Of level 2 of the recommendation: the trace id is random.
const RANDOM: u8 = 2;
/// `00-<32>-<16>-<2>`
const LENGTH: usize = 55;

impl TraceContext {
    /// What a request says. Of several fields none is true.
    pub fn of(view: &RequestView<'_>) -> Option<Self> {
        let mut fields = view.fields_of(FieldKind::TraceParent);
        let field = fields.next()?;
        if fields.next().is_some() { None } else { Self::parse(field.value) }
    }

    /// What a request says, or what is made for it. `ids` is only called where a span is made.
    pub fn begin(mode: TraceMode, view: &RequestView<'_>, ids: impl FnOnce() -> NewIds) -> Option<Self> {
        let found = match mode {
            TraceMode::Drop => return None,
            TraceMode::Pass => return Self::of(view),
            TraceMode::Restart => None,
            TraceMode::Make => Self::of(view),
        };
        let NewIds { trace_id, span, sampled } = ids();
        Some(match found {
            // Flags that mean nothing yet end here, as whoever makes a span cannot keep their promise.
            Some(found) => Self { span: Some(span), flags: found.flags & (SAMPLED | RANDOM), ..found },
            None => {
                let flags = if sampled { SAMPLED | RANDOM } else { RANDOM };
                Self { trace_id, parent: None, span: Some(span), flags }
            }
        })
    }

    /// `00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01`
    fn parse(text: &[u8]) -> Option<Self> {
        let text: &[u8; LENGTH] = text.try_into().ok()?;
        if !text.starts_with(b"00-") || text[35] != b'-' || text[52] != b'-' {
            return None;
        }
        let trace_id = NonZeroU128::new(read_hex(&text[3..35])?)?;
        let parent = NonZeroU64::new(u64::try_from(read_hex(&text[36..52])?).ok()?)?;
        let flags = u8::try_from(read_hex(&text[53..])?).ok()?;
        Some(Self { trace_id, parent: Some(parent), span: None, flags })
    }

    pub const fn is_sampled(&self) -> bool {
        self.flags & SAMPLED != 0
    }

    /// Whether the client's `tracestate` belongs to it.
    pub const fn goes_on(&self) -> bool {
        self.parent.is_some()
    }

    /// The field's value for the backend.
    pub fn write(&self, out: &mut Vec<u8>) {
        let mut text = [b'-'; LENGTH];
        text[..2].copy_from_slice(b"00");
        text[3..35].copy_from_slice(&self.trace_id_hex());
        let parent = self.span.or(self.parent).map_or(0, NonZeroU64::get);
        hex::write(&parent.to_be_bytes(), &mut text[36..52]);
        hex::write(&[self.flags], &mut text[53..]);
        out.extend_from_slice(&text);
    }

    /// The trace id in lower-case hex.
    pub fn trace_id_hex(&self) -> [u8; 32] {
        let mut text = [0; 32];
        hex::write(&self.trace_id.get().to_be_bytes(), &mut text);
        text
    }
}

/// Lower-case hex only.
fn read_hex(text: &[u8]) -> Option<u128> {
    text.iter().try_fold(0, |value, byte| {
        let digit = match byte {
            b'0'..=b'9' => byte - b'0',
            b'a'..=b'f' => byte - b'a' + 10,
            b'A'..=b'F' if seeded::off(Rule::TraceCase) => byte - b'A' + 10,
            _ => return None,
        };
        Some(value << 4 | u128::from(digit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::head;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn begin(mode: TraceMode, fields: &str, sampled: bool) -> Option<String> {
        let bytes = format!("GET / HTTP/1.1\r\nHost: t\r\n{fields}\r\n").into_bytes();
        let view = head::parse(&bytes).unwrap();
        let ids =
            || NewIds { trace_id: NonZeroU128::new(0xabc).unwrap(), span: NonZeroU64::new(0xdef).unwrap(), sampled };
        let context = TraceContext::begin(mode, &view, ids)?;
        let mut out = Vec::new();
        context.write(&mut out);
        Some(String::from_utf8(out).unwrap())
    }

    #[test]
    fn only_the_grammar_is_a_traceparent() {
        for flags in ["00", "01", "02", "03", "ff"] {
            let text = format!("{}{flags}", &GOOD[..53]);
            let passed = begin(TraceMode::Pass, &format!("TraceParent: {text}\r\n"), false);
            assert_eq!(passed.as_deref(), Some(text.as_str()));
        }
        let mut seen = 0;
        for bad in [
            "",
            "00",
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00F067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0A",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-011",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-00",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-011",
            "00_4bf92f3577b34da6a3ce929d0e0e4736_00f067aa0ba902b7_01",
            "00-4bf92f3577b34da6a3ce929d0e0e473g-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7- 1",
            "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01, 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            assert_eq!(begin(TraceMode::Pass, &format!("traceparent: {bad}\r\n"), false), None, "{bad}");
            seen += 1;
        }
        assert_eq!(seen, 18);
        let twice = format!("traceparent: {GOOD}\r\ntraceparent: {GOOD}\r\n");
        assert_eq!(begin(TraceMode::Pass, &twice, false), None);
        assert_eq!(begin(TraceMode::Pass, "", false), None);
    }

    #[test]
    fn a_span_of_its_own_stands_in_the_trace_of_the_client_or_begins_one() {
        let with = format!("traceparent: {GOOD}\r\n");
        let own = |trace: &str, flags: &str| Some(format!("00-{trace}-0000000000000def-{flags}"));
        let (client, made) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00000000000000000000000000000abc");
        // The client's decision is kept, whatever the one for new traces is.
        assert_eq!(begin(TraceMode::Make, &with, false), own(client, "01"));
        assert_eq!(begin(TraceMode::Make, &with.replace("-01\r", "-00\r"), true), own(client, "00"));
        assert_eq!(begin(TraceMode::Make, &with.replace("-01\r", "-ff\r"), true), own(client, "03"));
        for (sampled, flags) in [(true, "03"), (false, "02")] {
            assert_eq!(begin(TraceMode::Make, "", sampled), own(made, flags));
            assert_eq!(begin(TraceMode::Make, "traceparent: x\r\n", sampled), own(made, flags));
            assert_eq!(begin(TraceMode::Restart, &with, sampled), own(made, flags));
        }
        assert_eq!(begin(TraceMode::Drop, &with, true), None);
    }

    #[test]
    fn modes_that_make_spans() {
        let modes = [TraceMode::Pass, TraceMode::Make, TraceMode::Restart, TraceMode::Drop];
        assert_eq!(modes.map(TraceMode::makes_spans), [false, true, true, false]);
    }
}
