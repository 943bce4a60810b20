//! The page of the admin listener: what `status` says, as one document that needs nothing from elsewhere and no script. Every text
//! goes through [`Html::text`]: what is written as it is can only be a constant of this source. It knows nothing but the JSON.

use super::explain::{EXPLAIN_FORM, EXPLAIN_SCRIPT};
use crate::store::credential::Digest;
use crate::telemetry::history::TrafficResults;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use std::borrow::Cow;
use std::fmt::Write as _;
use std::sync::LazyLock;
use std::time::Duration;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// Fields of the response: what the page may load and do. Its own style and script are known by their hashes.
pub(super) static FIELDS: LazyLock<String> = LazyLock::new(|| {
    let hash = |text: &str| STANDARD.encode(Digest::of(text.as_bytes()).as_bytes());
    format!(
        "Content-Security-Policy: default-src 'none'; script-src 'sha256-{}' 'sha256-{}'; style-src 'sha256-{}'; img-src data:; \
         connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'\r\n\
         Referrer-Policy: no-referrer\r\nCross-Origin-Opener-Policy: same-origin\r\nVary: Accept\r\n",
        hash(SCRIPT),
        hash(EXPLAIN_SCRIPT),
        hash(STYLE)
    )
});

/// Rows of one table; a longer list is for a program.
const MOST_ROWS: usize = 200;
/// Characters of one text.
const LONGEST: usize = 400;

/// A text from outside without characters that steer a terminal or change the order or the look of what is beside them: they
/// are named instead. A long one is cut.
pub fn visible(text: &str) -> Cow<'_, str> {
    let steers = |c: char| {
        c.is_control()
            || matches!(c,
                '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
                | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
    };
    if text.len() <= LONGEST && !text.chars().any(steers) {
        return Cow::Borrowed(text);
    }
    let mut out = String::new();
    for (index, c) in text.chars().enumerate() {
        if index >= LONGEST {
            out.push('…');
            break;
        }
        match steers(c) {
            // Into a string, this cannot fail.
            true => drop(write!(out, "⟨U+{:04X}⟩", u32::from(c))),
            false => out.push(c),
        }
    }
    Cow::Owned(out)
}

/// A document in the making.
struct Html(String);

impl Html {
    /// Markup of this source.
    fn raw(&mut self, markup: &'static str) -> &mut Self {
        self.0 += markup;
        self
    }

    /// Any text, as text or as the value of an attribute in double quotes.
    fn text(&mut self, text: &str) -> &mut Self {
        for c in visible(text).chars() {
            match c {
                '&' => self.0 += "&amp;",
                '<' => self.0 += "&lt;",
                '>' => self.0 += "&gt;",
                '"' => self.0 += "&quot;",
                '\'' => self.0 += "&#39;",
                '`' => self.0 += "&#96;",
                c => self.0.push(c),
            }
        }
        self
    }

    /// A name from outside, whose direction does not reach what is beside it.
    fn name(&mut self, text: &str) -> &mut Self {
        self.raw("<bdi>").text(text).raw("</bdi>")
    }

    fn number(&mut self, number: f64) -> &mut Self {
        // Into a string, this cannot fail.
        let _ = if number.fract() == 0.0 { write!(self.0, "{number:.0}") } else { write!(self.0, "{number:.2}") };
        self
    }

    fn count(&mut self, value: &Value) -> &mut Self {
        match value.as_u64() {
            Some(count) => self.text(&grouped(count)),
            None => self.raw("–"),
        }
    }

    /// A word for a state, in its colour.
    fn pill(&mut self, mood: Mood, word: &str) -> &mut Self {
        self.raw(match mood {
            Mood::Ok => "<span class=\"p ok\">",
            Mood::Warn => "<span class=\"p warn\">",
            Mood::Bad => "<span class=\"p bad\">",
            Mood::Idle => "<span class=\"p idle\">",
        });
        self.text(word).raw("</span>")
    }

    /// A time and how long ago it was.
    fn ago(&mut self, when: &Value, now: &Value) -> &mut Self {
        let Some(time) = when.as_str() else { return self.raw("–") };
        self.raw("<time datetime=\"").text(time).raw("\" title=\"").text(time).raw("\">");
        match seconds_between(time, now.as_str().unwrap_or_default()) {
            Some(seconds) => self.text(&span(seconds)).raw(" ago"),
            None => self.text(time),
        };
        self.raw("</time>")
    }

    /// A table whose rows are changed as time goes by.
    fn table(
        &mut self,
        id: &'static str,
        caption: &'static str,
        heads: &[(&'static str, &'static str)],
        rows: &[Value],
        row: impl Fn(&mut Self, &Value),
    ) {
        self.raw("<div class=\"scroll\" role=\"group\" tabindex=\"0\" aria-label=\"").raw(caption);
        self.raw("\"><table><caption class=\"vh\">").raw(caption).raw("</caption><thead><tr>");
        for (class, head) in heads {
            self.raw("<th scope=\"col\" class=\"").raw(class).raw("\">").raw(head).raw("</th>");
        }
        self.raw("</tr></thead><tbody data-live id=\"").raw(id).raw("\">");
        for one in rows.iter().take(MOST_ROWS) {
            self.raw("<tr>");
            row(self, one);
            self.raw("</tr>");
        }
        if rows.is_empty() || rows.len() > MOST_ROWS {
            self.raw("<tr><td class=\"dim\" colspan=\"").number(heads.len() as f64).raw("\">");
            match rows.len().saturating_sub(MOST_ROWS) {
                0 => self.raw("none"),
                more => self.text(&grouped(more as u64)).raw(" more: GET /status has all of them"),
            };
            self.raw("</td></tr>");
        }
        self.raw("</tbody></table></div>");
    }
}

#[derive(Clone, Copy)]
enum Mood {
    Ok,
    Warn,
    Bad,
    Idle,
}

/// What `GET /` sends to a browser. `status`: with its series.
pub(super) fn render(status: &Value) -> String {
    let mut page = Html(String::with_capacity(96 * 1024));
    let html = &mut page;
    html.raw("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>tollgate</title>");
    html.raw("<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><meta name=\"referrer\" content=\"no-referrer\">");
    html.raw("<noscript><meta http-equiv=\"refresh\" content=\"10\"></noscript>");
    html.raw("<link rel=\"icon\" href=\"data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 20 20'%3E%3Cpath fill='none' stroke='%230f6cbd' stroke-width='2.4' stroke-linecap='round' d='M4 3v14M4 7l13-3'/%3E%3Cpath fill='none' stroke='%230f6cbd' stroke-width='2' d='M2 17h6'/%3E%3C/svg%3E\">");
    html.raw("<style>").raw(STYLE).raw("</style></head><body><a class=\"skip\" href=\"#main\">Skip to content</a>");
    header(html, status);
    html.raw("<main id=\"main\">");
    tiles(html, status);
    html.raw("<div class=\"grid\">");
    traffic(html, status);
    html.raw(EXPLAIN_FORM);
    servers(html, status);
    stores(html, status);
    limits(html, status);
    callers(html, status);
    certificates(html, status);
    reloads(html, status);
    configuration(html, status);
    html.raw("</div></main><footer>The numbers are counted since the start, or read every 5 seconds for the last 15 minutes and 24 hours. <a href=\"/status\">/status</a> has them as JSON, <a href=\"/metrics\">/metrics</a> for Prometheus. Times are UTC.</footer>");
    html.raw("<script>").raw(SCRIPT).raw("</script><script>").raw(EXPLAIN_SCRIPT).raw("</script></body></html>\n");
    page.0
}

fn header(html: &mut Html, status: &Value) {
    html.raw("<header><div class=\"bar\"><h1><svg viewBox=\"0 0 20 20\" aria-hidden=\"true\"><path fill=\"none\" stroke=\"currentColor\" stroke-width=\"2.4\" stroke-linecap=\"round\" d=\"M4 3v14M4 7l13-3\"/><path fill=\"none\" stroke=\"currentColor\" stroke-width=\"2\" d=\"M2 17h6\"/></svg>tollgate <small>");
    html.text(text(&status["version"])).raw("</small></h1><div class=\"facts\" data-live id=\"facts\"><span>");
    match status["ready"].as_bool() {
        Some(true) => html.pill(Mood::Ok, "ready"),
        _ => html.pill(Mood::Warn, "draining"),
    };
    html.raw("</span><span>up <b>").text(&span(status["uptime_seconds"].as_u64().unwrap_or(0)));
    html.raw("</b></span><span>process <b>").text(&status["pid"].to_string()).raw("</b></span>");
    html.raw("<span>loaded <b>").ago(&status["configuration"]["loaded"], &status["time"]).raw("</b></span>");
    if status["reads_only"] == true {
        html.raw("<span title=\"It can be reached from other machines and has no token: set [admin] token_sha256.\">");
        html.pill(Mood::Idle, "this listener only reads").raw("</span>");
    }
    html.raw("</div><div class=\"live\"><span class=\"dot\" aria-hidden=\"true\"></span><span id=\"at\">");
    let time = text(&status["time"]);
    html.text(time.get(11..19).unwrap_or(time)).raw(
        " UTC</span><button id=\"pause\" type=\"button\" aria-pressed=\"false\" hidden>Pause</button></div></div>",
    );
    html.raw("<nav aria-label=\"Sections\"><ul><li><a href=\"#traffic\">Traffic</a></li><li><a href=\"#explain\">Explain</a></li><li><a href=\"#servers\">Servers</a></li><li><a href=\"#stores\">Stores</a></li><li><a href=\"#limits\">Limits</a></li><li><a href=\"#callers\">Callers</a></li><li><a href=\"#certificates\">Certificates</a></li><li><a href=\"#reloads\">Reloads</a></li><li><a href=\"#configuration\">Configuration</a></li></ul></nav></header>");
}

fn tiles(html: &mut Html, status: &Value) {
    let window = &status["traffic"]["last_15_minutes"];
    let requests = window["requests"].as_u64().unwrap_or(0);
    let of = |name: &str| window["results"][name].as_u64().unwrap_or(0);
    html.raw("<h2 class=\"vh\">At a glance</h2><ul class=\"tiles\" data-live id=\"tiles\"><li><span class=\"k\">Requests</span><span class=\"n\">");
    html.text(&rate(&window["requests_per_second"]))
        .raw("<small> /s</small></span><span class=\"s\">")
        .text(&grouped(requests))
        .raw(" in 15 min</span></li>");
    html.raw("<li><span class=\"k\">Refused</span><span class=\"n\">").text(&share(of("refused"), requests));
    html.raw("</span><span class=\"s\">").text(&grouped(of("refused"))).raw(" by tollgate in 15 min</span></li>");
    html.raw("<li><span class=\"k\">Failed (5xx)</span><span class=\"n\">")
        .text(&share(of("failed"), requests))
        .raw("</span><span class=\"s\">");
    if of("failed") > 0 {
        html.pill(Mood::Bad, &grouped(of("failed"))).raw(" in 15 min</span></li>");
    } else {
        html.raw("none in 15 min</span></li>");
    }
    html.raw("<li><span class=\"k\">Latency, p50</span><span class=\"n\">").text(&ms(&window["latency_ms"]["p50"]));
    html.raw("</span><span class=\"s\">p90 ")
        .text(&ms(&window["latency_ms"]["p90"]))
        .raw(", p99 ")
        .text(&ms(&window["latency_ms"]["p99"]))
        .raw("</span></li>");
    html.raw("<li><span class=\"k\">In flight</span><span class=\"n\">").count(&status["requests_in_flight"]);
    html.raw("</span><span class=\"s\">").count(&status["connections"]).raw(" connections</span></li>");
    let cache = &status["cache"];
    let count = |name: &str| cache[name].as_u64().unwrap_or(0);
    let hits = count("hits") + count("negative_hits") + count("stale");
    html.raw("<li><span class=\"k\">Cache hits</span><span class=\"n\">").text(&share(hits, hits + count("misses")));
    html.raw("</span><span class=\"s\">")
        .count(&cache["valid"])
        .raw(" valid, ")
        .count(&cache["invalid"])
        .raw(" unknown kept</span></li>");
    let servers: Vec<&Value> =
        list(&status["upstreams"]).iter().flat_map(|upstream| list(&upstream["servers"])).collect();
    let up = servers.iter().filter(|server| server["up"] == true).count();
    html.raw("<li><span class=\"k\">Servers up</span><span class=\"n\">")
        .number(up as f64)
        .raw("<small> of ")
        .number(servers.len() as f64);
    html.raw("</small></span><span class=\"s\">");
    match servers.len() - up {
        0 => html.pill(Mood::Ok, "all up"),
        down => html.pill(Mood::Bad, &format!("{down} down")),
    };
    html.raw("</span></li><li><span class=\"k\">Revocations</span><span class=\"n\">");
    let follows = list(&status["stores"]).iter().any(|store| store["subscribed"].is_boolean());
    let deaf = list(&status["stores"]).iter().any(|store| store["subscribed"] == false);
    match (follows, deaf) {
        (true, false) => html.raw("heard").raw("</span><span class=\"s\">").pill(Mood::Ok, "at once"),
        (true, true) => html.raw("not heard").raw("</span><span class=\"s\">").pill(Mood::Bad, "see stores"),
        (false, _) => html.raw("by time").raw("</span><span class=\"s\">").pill(Mood::Idle, "when the cache expires"),
    };
    html.raw("</span></li></ul>");
}

/// What each result is called, and means.
const RESULTS: [(&str, &str); TrafficResults::NAMES.len()] = [
    ("ok", "answered by the backend, below 400"),
    ("client error", "4xx of the backend"),
    ("refused", "by tollgate: 401, 403, 429 …"),
    ("failed", "5xx of the backend or of tollgate"),
    ("client gone", "left before a response"),
];

struct PlotNames {
    window: &'static str,
    title: &'static str,
    requests: &'static str,
    latency: &'static str,
    ticks: [&'static str; 4],
    step: &'static str,
}

const PLOTS: [PlotNames; 2] = [
    PlotNames {
        window: "last_15_minutes",
        title: "Last 15 minutes",
        requests: "plot-a",
        latency: "plot-b",
        ticks: ["15 min ago", "10", "5", "now"],
        step: "in steps of 10 seconds",
    },
    PlotNames {
        window: "last_24_hours",
        title: "Last 24 hours",
        requests: "plot-c",
        latency: "plot-d",
        ticks: ["24 h ago", "16", "8", "now"],
        step: "in steps of 10 minutes",
    },
];

fn traffic(html: &mut Html, status: &Value) {
    let traffic = &status["traffic"];
    html.raw("<h2 class=\"vh\" id=\"traffic\">Traffic</h2>");
    for names in &PLOTS {
        let window = &traffic[names.window];
        html.raw("<section class=\"card half\" aria-label=\"")
            .raw(names.title)
            .raw("\"><h2>")
            .raw(names.title)
            .raw(" <span>")
            .raw(names.step)
            .raw("</span></h2>");
        requests_plot(html, window, names);
        html.raw("<ul class=\"key\" data-live id=\"").raw(names.requests).raw("-key\">");
        for (index, (name, _)) in RESULTS.iter().enumerate() {
            html.raw("<li><i class=\"b").number(index as f64).raw("\"></i>").raw(name).raw(" <b>");
            html.count(&window["results"][TrafficResults::NAMES[index]]).raw("</b></li>");
        }
        html.raw("</ul>");
        latency_plot(html, window, names);
        html.raw("<ul class=\"key\" data-live id=\"").raw(names.latency).raw("-key\">");
        for (index, name) in ["p50", "p90", "p99"].into_iter().enumerate() {
            html.raw("<li><i class=\"m")
                .number(index as f64)
                .raw("\"></i>")
                .raw(name)
                .raw(" <b>")
                .text(&ms(&window["latency_ms"][name]))
                .raw("</b></li>");
        }
        html.raw("</ul></section>");
    }
    let [short, long] = ["last_15_minutes", "last_24_hours"].map(|name| &traffic[name]);
    html.raw("<section class=\"card half\" aria-labelledby=\"h-results\"><h2 id=\"h-results\">Requests by result</h2>");
    let rows: Vec<Value> = (0..RESULTS.len()).map(Value::from).collect();
    let heads = [("", "Result"), ("opt", "Meaning"), ("r", "15 min"), ("r", "Share"), ("r", "24 h"), ("r", "Share")];
    html.table("results", "Requests by result", &heads, &rows, |html, row| {
        let index = row.as_u64().and_then(|index| usize::try_from(index).ok()).unwrap_or(0);
        let ((word, meaning), name) = (RESULTS[index], TrafficResults::NAMES[index]);
        html.raw("<th scope=\"row\" class=\"w\">")
            .raw(word)
            .raw("</th><td class=\"dim opt\">")
            .raw(meaning)
            .raw("</td>");
        for window in [short, long] {
            let count = &window["results"][name];
            html.raw("<td class=\"r\">").count(count).raw("</td><td class=\"r dim\">");
            html.text(&share(count.as_u64().unwrap_or(0), window["requests"].as_u64().unwrap_or(0))).raw("</td>");
        }
    });
    html.raw("<h3>Latency, from the head of the request to the end of the response</h3>");
    let rows: Vec<Value> = ["p50", "p90", "p99"].map(Value::from).into();
    let heads = [("", "Quantile"), ("r", "15 min"), ("r", "24 h")];
    html.table("latency", "Latency", &heads, &rows, |html, row| {
        let name = text(row);
        html.raw("<th scope=\"row\">").text(name).raw("</th>");
        for window in [short, long] {
            html.raw("<td class=\"r\">").text(&ms(&window["latency_ms"][name])).raw("</td>");
        }
    });
    html.raw("</section><section class=\"card half\" aria-labelledby=\"h-refusals\"><h2 id=\"h-refusals\">Refusals by reason <span>answered by tollgate, without the backend's answer</span></h2>");
    let mut rows = list(&long["refusals"]).to_vec();
    let recent = |reason: &Value| {
        list(&short["refusals"])
            .iter()
            .find(|row| row["reason"] == *reason)
            .map_or(Value::from(0), |row| row["requests"].clone())
    };
    rows.sort_by_key(|row| std::cmp::Reverse((recent(&row["reason"]).as_u64(), row["requests"].as_u64())));
    let heads = [("", "Reason"), ("r", "Status"), ("r", "15 min"), ("r", "24 h")];
    html.table("refusals", "Refusals by reason", &heads, &rows, |html, row| {
        html.raw("<th scope=\"row\" class=\"m\">")
            .text(text(&row["reason"]))
            .raw("</th><td class=\"r\">")
            .text(&row["status"].to_string());
        html.raw("</td><td class=\"r\">")
            .count(&recent(&row["reason"]))
            .raw("</td><td class=\"r\">")
            .count(&row["requests"])
            .raw("</td>");
    });
    html.raw("</section>");
}

/// Width of a slot in a plot's own units.
const SLOT: f64 = 6.0;
const HEIGHT: f64 = 100.0;

fn numbers(value: &Value) -> Vec<Option<f64>> {
    list(value).iter().map(Value::as_f64).collect()
}

/// The frame of a plot: `draw` draws what is in it.
fn plot(
    html: &mut Html,
    id: &'static str,
    names: &PlotNames,
    labels: &[String],
    series: &[(&str, &Value)],
    about: (&'static str, &'static str, &str),
    draw: impl Fn(&mut Html),
) {
    let (title, unit, summary) = about;
    html.raw("<figure class=\"plot\" aria-label=\"").raw(title).raw(", ").raw(names.title).raw("\"><figcaption><b>").raw(title).raw("</b><span class=\"read\" role=\"status\"></span></figcaption><div class=\"y\" aria-hidden=\"true\" data-live id=\"").raw(id).raw("-y\">");
    for label in labels {
        html.raw("<span>").text(label).raw("</span>");
    }
    html.raw("</div><div data-live id=\"")
        .raw(id)
        .raw("\"><svg role=\"img\" preserveAspectRatio=\"none\" viewBox=\"0 0 ");
    let width = series.first().map_or(0, |(_, values)| list(values).len()) as f64 * SLOT;
    html.number(width).raw(" 100\" data-unit=\"").raw(unit).raw("\" data-step=\"");
    html.raw(if names.window == "last_15_minutes" { "10" } else { "600" }).raw("\" data-series=\"");
    let series: Vec<Value> =
        series.iter().map(|(name, values)| Value::from(vec![Value::from(*name), (*values).clone()])).collect();
    // Numbers and words of this source only, and more than a text may have.
    html.0 += &Value::from(series).to_string().replace('&', "&amp;").replace('"', "&quot;").replace('<', "&lt;");
    html.raw("\" aria-label=\"").text(summary).raw("\">");
    for line in 1..labels.len().saturating_sub(1) {
        let y = HEIGHT * line as f64 / (labels.len() - 1) as f64;
        html.raw("<line class=\"g\" x1=\"0\" x2=\"")
            .number(width)
            .raw("\" y1=\"")
            .number(y)
            .raw("\" y2=\"")
            .number(y)
            .raw("\"/>");
    }
    draw(html);
    html.raw("<line class=\"at\" x1=\"0\" x2=\"0\" y1=\"0\" y2=\"100\" transform=\"translate(-99)\"/></svg></div><div class=\"x\" aria-hidden=\"true\">");
    for tick in names.ticks {
        html.raw("<span>").raw(tick).raw("</span>");
    }
    html.raw("</div></figure>");
}

fn requests_plot(html: &mut Html, window: &Value, names: &PlotNames) {
    let series = &window["series"];
    let step = series["step_seconds"].as_f64().unwrap_or(1.0);
    let slots = list(&series[TrafficResults::NAMES[0]]).len();
    // The last one is not over: its rate is that of the time so far, unless that is too short to say anything.
    let seconds = |slot: usize| match slot + 1 == slots {
        true => series["last_step_seconds"].as_f64().unwrap_or(step).clamp(step / 4.0, step),
        false => step,
    };
    let rates = |name: &&str| -> Vec<f64> {
        numbers(&series[*name]).iter().enumerate().map(|(slot, count)| count.unwrap_or(0.0) / seconds(slot)).collect()
    };
    let all: Vec<Vec<f64>> = TrafficResults::NAMES.iter().map(rates).collect();
    let most = (0..slots).map(|slot| all.iter().filter_map(|rates| rates.get(slot)).sum::<f64>()).fold(0.0, f64::max);
    // A round number of requests a second.
    let top = round_up(most);
    let labels =
        [top, top / 2.0, 0.0].map(|value| if value == 0.0 { "0/s".into() } else { format!("{}/s", short(value)) });
    let shown: Vec<(&str, &Value)> =
        RESULTS.iter().zip(TrafficResults::NAMES).map(|((word, _), name)| (*word, &series[name])).collect();
    let summary =
        format!("{} requests; at most {} a second", grouped(window["requests"].as_u64().unwrap_or(0)), short(most));
    plot(html, names.requests, names, &labels, &shown, ("Requests", "", &summary), |html| {
        let mut floor = vec![0.0; slots];
        for (index, rates) in all.iter().enumerate() {
            if rates.iter().all(|rate| *rate == 0.0) {
                continue;
            }
            html.raw("<path class=\"f").number(index as f64).raw("\" d=\"");
            for (slot, rate) in rates.iter().enumerate().filter(|(_, rate)| **rate > 0.0) {
                // What is there is seen, however little it is.
                let high = (HEIGHT * rate / top).max(0.8);
                let y = (HEIGHT - floor[slot] - high).max(0.0);
                floor[slot] += high;
                html.raw("M").number(slot as f64 * SLOT + 0.5).raw(" ").number(y).raw("h5v").number(high).raw("h-5z");
            }
            html.raw("\"/>");
        }
    });
}

fn latency_plot(html: &mut Html, window: &Value, names: &PlotNames) {
    let series = &window["series"];
    let all: Vec<(&str, Vec<Option<f64>>)> =
        ["p50", "p90", "p99"].into_iter().map(|name| (name, numbers(&series[name]))).collect();
    let known = || all.iter().flat_map(|(_, values)| values.iter().flatten().copied()).filter(|value| *value > 0.0);
    // Whole powers of ten, of milliseconds.
    let (least, most) = (known().fold(f64::INFINITY, f64::min), known().fold(0.0, f64::max));
    let low = if least.is_finite() { least.log10().floor().clamp(-1.0, 4.0) } else { 0.0 };
    let high = if most > 0.0 { most.log10().ceil().max(low + 2.0) } else { low + 3.0 };
    let decades: Vec<i32> = (low as i32..=high as i32).rev().collect();
    let labels: Vec<String> = decades.iter().map(|power| ms(&Value::from(10_f64.powi(*power)))).collect();
    let shown: Vec<(&str, &Value)> = all.iter().map(|(name, _)| (*name, &series[name])).collect();
    let summary =
        format!("median {}, 99 of 100 within {}", ms(&window["latency_ms"]["p50"]), ms(&window["latency_ms"]["p99"]));
    plot(html, names.latency, names, &labels, &shown, ("Latency, logarithmic", " ms", &summary), |html| {
        for (index, (_, values)) in all.iter().enumerate() {
            html.raw("<path class=\"ln t").number(index as f64).raw("\" d=\"");
            let mut before = false;
            for (slot, value) in values.iter().enumerate() {
                let Some(value) = value else {
                    before = false;
                    continue;
                };
                let y = HEIGHT * (1.0 - ((value.max(1e-3).log10() - low) / (high - low)).clamp(0.0, 1.0));
                match before {
                    true => html.raw("V").number(y),
                    false => html.raw("M").number(slot as f64 * SLOT).raw(" ").number(y),
                };
                html.raw("h6");
                before = true;
            }
            html.raw("\"/>");
        }
    });
}

fn servers(html: &mut Html, status: &Value) {
    html.raw("<section class=\"card\" id=\"servers\" aria-labelledby=\"h-servers\"><h2 id=\"h-servers\">Servers <span>behind the gateway</span></h2>");
    let rows: Vec<Value> = list(&status["upstreams"])
        .iter()
        .flat_map(|upstream| {
            list(&upstream["servers"]).iter().map(|server| {
                let mut row = server.clone();
                row["upstream"] = upstream["upstream"].clone();
                row
            })
        })
        .collect();
    let heads = [
        ("", "Upstream"),
        ("", "Server"),
        ("", "State"),
        ("", "Why"),
        ("", "Since"),
        ("r", "In flight"),
        ("r", "At most"),
        ("r", "Unanswered"),
        ("r", "Weight"),
        ("", "Role"),
    ];
    html.table("t-servers", "Servers", &heads, &rows, |html, row| {
        html.raw("<th scope=\"row\" class=\"w\">")
            .name(text(&row["upstream"]))
            .raw("</th><td class=\"m w\">")
            .name(text(&row["server"]))
            .raw("</td><td>");
        match (row["up"] == true, row["draining"] == true) {
            (true, false) => html.pill(Mood::Ok, "up"),
            (true, true) => html.pill(Mood::Warn, "draining"),
            (false, _) => html.pill(Mood::Bad, "down"),
        };
        html.raw("</td><td>")
            .text(row["reason"].as_str().unwrap_or("–"))
            .raw("</td><td class=\"w\">")
            .ago(&row["since"], &status["time"]);
        html.raw("</td><td class=\"r\">")
            .count(&row["in_flight"])
            .raw("</td><td class=\"r\">")
            .count(&row["max_requests"]);
        html.raw("</td><td class=\"r\">")
            .count(&row["unanswered"])
            .raw("</td><td class=\"r\">")
            .count(&row["weight"])
            .raw("</td><td>");
        html.raw(if row["backup"] == true { "backup" } else { "main" }).raw("</td>");
    });
    html.raw("</section>");
}

fn stores(html: &mut Html, status: &Value) {
    html.raw("<section class=\"card\" id=\"stores\" aria-labelledby=\"h-stores\"><h2 id=\"h-stores\">Token stores <span>asked in this order</span></h2>");
    let heads = [
        ("", "Store"),
        ("", "Lookups"),
        ("", "Changes"),
        ("r", "Lag p50"),
        ("r", "Lag p99"),
        ("r", "Found"),
        ("r", "Unknown"),
        ("r", "Failed"),
        ("r", "Waiting"),
        ("r", "p50"),
        ("r", "p99"),
        ("", "Server"),
    ];
    html.table("t-stores", "Token stores", &heads, list(&status["stores"]), |html, row| {
        html.raw("<th scope=\"row\" class=\"w\">").name(text(&row["store"])).raw("</th><td>");
        match (row["answers"] != false, row["file_current"] == false) {
            (true, false) => html.pill(Mood::Ok, "answers"),
            (true, true) => html.pill(Mood::Warn, "earlier file in use"),
            (false, _) => html.pill(Mood::Bad, "fails"),
        };
        html.raw("</td><td>");
        match row["subscribed"].as_bool() {
            Some(true) => html.pill(Mood::Ok, "heard"),
            Some(false) => html
                .pill(Mood::Bad, "not heard")
                .raw(" ")
                .text(row["subscription_problem"].as_str().unwrap_or_default()),
            None => html.pill(Mood::Idle, "no notifications"),
        };
        html.raw("</td>");
        for (of, name) in [("revocation_lag_ms", "p50"), ("revocation_lag_ms", "p99")] {
            html.raw("<td class=\"r\">").text(&ms(&row[of][name])).raw("</td>");
        }
        let failed: u64 =
            row["errors"].as_object().into_iter().flat_map(|all| all.values()).filter_map(Value::as_u64).sum();
        html.raw("<td class=\"r\">")
            .count(&row["lookups"]["found"])
            .raw("</td><td class=\"r\">")
            .count(&row["lookups"]["unknown"]);
        html.raw("</td><td class=\"r\">")
            .count(&failed.into())
            .raw("</td><td class=\"r\">")
            .count(&row["waiting"])
            .raw("</td>");
        for name in ["p50", "p99"] {
            html.raw("<td class=\"r\">").text(&ms(&row["lookup_ms"][name])).raw("</td>");
        }
        html.raw("<td class=\"m w\">");
        let servers = list(&row["servers"]);
        for (index, server) in servers.iter().enumerate() {
            html.raw(if index > 0 { ", " } else { "" }).name(text(server));
        }
        html.raw(if servers.is_empty() { "–" } else { "" }).raw("</td>");
    });
    html.raw("<h3>Cache since the start</h3>");
    let cache = [status["cache"].clone()];
    let heads = [
        ("r", "Valid tokens"),
        ("r", "Unknown tokens"),
        ("r", "Hits"),
        ("r", "Hits, unknown"),
        ("r", "Stale"),
        ("r", "Lookups"),
    ];
    html.table("t-cache", "Cache", &heads, &cache, |html, row| {
        for name in ["valid", "invalid", "hits", "negative_hits", "stale", "misses"] {
            html.raw("<td class=\"r\">").count(&row[name]).raw("</td>");
        }
    });
    html.raw("</section>");
}

fn limits(html: &mut Html, status: &Value) {
    html.raw("<section class=\"card half\" id=\"limits\" aria-labelledby=\"h-limits\"><h2 id=\"h-limits\">Limits <span>requests since the start</span></h2>");
    let heads = [("", "Limit"), ("r", "Allowed"), ("r", "Refused"), ("r", "Dry run"), ("r", "No own bucket")];
    html.table("t-limits", "Limits", &heads, list(&status["limits"]), |html, row| {
        html.raw("<th scope=\"row\" class=\"wrap\">").name(text(&row["limit"])).raw("</th>");
        for name in ["allowed", "refused", "dry_run", "shared_bucket"] {
            html.raw("<td class=\"r\">").count(&row[name]).raw("</td>");
        }
    });
    html.raw("</section><section class=\"card half\" aria-labelledby=\"h-guessing\"><h2 id=\"h-guessing\">Token guessing <span>addresses with many failed tokens, now</span></h2>");
    let guessing = &status["guessing"];
    if guessing["watching"] == true {
        let heads = [("", "Client"), ("", "Since"), ("r", "Failed tokens"), ("r", "Refused"), ("r", "Pause left")];
        html.table("t-guessing", "Addresses that guess tokens", &heads, list(&guessing["clients"]), |html, row| {
            html.raw("<th scope=\"row\" class=\"m w\">")
                .name(text(&row["client"]))
                .raw("</th><td class=\"w\">")
                .ago(&row["since"], &status["time"]);
            html.raw("</td><td class=\"r\">")
                .count(&row["failed_tokens"])
                .raw("</td><td class=\"r\">")
                .count(&row["refused"]);
            html.raw("</td><td class=\"r\">").text(&span(row["pause_seconds_left"].as_u64().unwrap_or(0))).raw("</td>");
        });
    } else {
        html.raw("<p class=\"none\">Not watched: [guessing] failures is \"none\".</p>");
    }
    html.raw("</section>");
}

fn callers(html: &mut Html, status: &Value) {
    let callers = &status["callers"];
    html.raw("<h2 class=\"vh\" id=\"callers\">Callers</h2>");
    let kinds: [(&str, &str, &str, &str); 4] = [
        ("token", "t-tokens", "Tokens", "Top tokens"),
        ("user", "t-users", "Users", "Top users"),
        ("client", "t-clients", "Clients", "Top clients"),
        ("route", "t-routes", "Routes", "Top routes"),
    ];
    for (kind, id, head, title) in kinds {
        html.raw("<section class=\"card half\" aria-label=\"").raw(title).raw("\"><h2>").raw(title);
        html.raw(if kind == "token" {
            " <span>last minute, by requests; the id is the start of the SHA-256</span></h2>"
        } else {
            " <span>last minute, by requests</span></h2>"
        });
        let heads = [("", head), ("r", "Requests"), ("r", "Refused"), ("r", "Bytes"), ("r", "Backend time")];
        html.table(id, title, &heads, list(&callers[format!("{kind}s")]["by_requests"]), |html, row| {
            html.raw(if kind == "user" {
                "<th scope=\"row\" class=\"wrap\">"
            } else {
                "<th scope=\"row\" class=\"m wrap\">"
            });
            html.name(text(&row[kind]))
                .raw("</th><td class=\"r\">")
                .count(&row["requests"])
                .raw("</td><td class=\"r\">")
                .count(&row["refusals"]);
            html.raw("</td><td class=\"r\">")
                .text(&bytes(row["bytes"].as_f64().unwrap_or(0.0)))
                .raw("</td><td class=\"r\">");
            let backend = row["backend_seconds"].as_f64().unwrap_or(0.0);
            html.text(&ms(&Value::from(backend * 1000.0))).raw("</td>");
        });
        html.raw("</section>");
    }
}

fn certificates(html: &mut Html, status: &Value) {
    html.raw("<section class=\"card half\" id=\"certificates\" aria-labelledby=\"h-certificates\"><h2 id=\"h-certificates\">Certificates <span>of listeners</span></h2>");
    let heads = [("", "Listener"), ("", "Name"), ("", "Ends"), ("r", "Left")];
    html.table("t-certificates", "Certificates", &heads, list(&status["certificates"]), |html, row| {
        html.raw("<th scope=\"row\" class=\"m w\">")
            .name(text(&row["listener"]))
            .raw("</th><td class=\"wrap\">")
            .name(text(&row["name"]));
        html.raw("</td><td class=\"w\">")
            .text(text(&row["ends"]).get(..10).unwrap_or_default())
            .raw("</td><td class=\"r\">");
        let left = row["days_left"].as_i64().unwrap_or(0);
        match left {
            ..0 => html.pill(Mood::Bad, "ended"),
            0..=7 => html.pill(Mood::Bad, &format!("{left} days")),
            8..=21 => html.pill(Mood::Warn, &format!("{left} days")),
            _ => html.pill(Mood::Ok, &format!("{left} days")),
        };
        html.raw("</td>");
    });
    html.raw("</section>");
}

fn reloads(html: &mut Html, status: &Value) {
    html.raw("<section class=\"card half\" id=\"reloads\" aria-labelledby=\"h-reloads\"><h2 id=\"h-reloads\">Reloads <span>the last 20, and the start</span></h2>");
    let heads = [("", "When"), ("", "Result"), ("", "Asked by"), ("", "What changed")];
    html.table("t-reloads", "Reloads", &heads, list(&status["reloads"]), |html, row| {
        html.raw("<th scope=\"row\" class=\"w\">").ago(&row["time"], &status["time"]).raw("</th><td>");
        match text(&row["result"]) {
            "start" => html.pill(Mood::Idle, "started"),
            "ok" => html.pill(Mood::Ok, "in force"),
            "unchanged" => html.pill(Mood::Idle, "unchanged"),
            "restart_needed" => html.pill(Mood::Warn, "restart needed"),
            _ => html.pill(Mood::Bad, "failed"),
        };
        html.raw("</td><td class=\"w\">").text(text(&row["by"])).raw("</td><td class=\"wrap\">");
        let join = |all: &Value| list(all).iter().map(text).collect::<Vec<_>>().join(", ");
        let (applied, restart) = (join(&row["applied"]), join(&row["restart_needed"]));
        html.text(&applied);
        if !restart.is_empty() {
            html.raw(if applied.is_empty() { "" } else { "; " }).raw("not in force until a restart: ").text(&restart);
        }
        let errors = list(&row["errors"]);
        if !errors.is_empty() {
            html.raw("nothing changed<ul class=\"errs\">");
            for error in errors {
                html.raw("<li>").text(text(error)).raw("</li>");
            }
            html.raw("</ul>");
        }
        html.raw("</td>");
    });
    html.raw("</section>");
}

fn configuration(html: &mut Html, status: &Value) {
    let configuration = &status["configuration"];
    html.raw("<section class=\"card\" id=\"configuration\" aria-labelledby=\"h-configuration\"><h2 id=\"h-configuration\">Configuration in force <span class=\"m\">");
    html.name(text(&configuration["file"])).raw("</span><span>as the file has it; all other keys have their defaults</span></h2><div class=\"conf\" data-live id=\"t-configuration\">");
    for section in list(&configuration["sections"]).iter().take(MOST_ROWS) {
        html.raw("<table><caption class=\"m\">").name(text(&section["section"])).raw("</caption><tbody>");
        for key in list(&section["keys"]) {
            html.raw("<tr><th scope=\"row\" class=\"m\">").text(text(&key["key"])).raw("</th><td class=\"m\">");
            match key["value"].as_str() {
                Some(value) => html.name(value),
                None => html.raw("<span class=\"p idle\">hidden</span>"),
            };
            html.raw("</td></tr>");
        }
        html.raw("</tbody></table>");
    }
    html.raw("</div></section>");
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A few digits of it.
fn short(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{:.1}M", v / 1e6),
        v if v >= 10_000.0 => format!("{:.0}k", v / 1e3),
        v if v >= 100.0 || v.fract() == 0.0 => format!("{v:.0}"),
        v if v >= 1.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

fn rate(value: &Value) -> String {
    short(value.as_f64().unwrap_or(0.0))
}

fn share(part: u64, all: u64) -> String {
    match (part, all) {
        (_, 0) => "–".into(),
        (0, _) => "0%".into(),
        _ => {
            let percent = 100.0 * part as f64 / all as f64;
            if percent < 0.1 {
                "<0.1%".into()
            } else if percent < 10.0 {
                format!("{percent:.1}%")
            } else {
                format!("{percent:.0}%")
            }
        }
    }
}

fn ms(value: &Value) -> String {
    match value.as_f64() {
        None => "–".into(),
        Some(ms) if ms >= 10_000.0 => format!("{:.0} s", ms / 1000.0),
        Some(ms) if ms >= 1_000.0 => format!("{:.1} s", ms / 1000.0),
        Some(ms) if ms >= 10.0 => format!("{ms:.0} ms"),
        Some(0.0) => "0 ms".into(),
        Some(ms) if ms >= 0.1 => format!("{ms:.1} ms"),
        Some(ms) => format!("{:.0} µs", ms * 1000.0),
    }
}

fn bytes(value: f64) -> String {
    let mut value = value;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" || value >= 100.0 {
                format!("{value:.0} {unit}")
            } else {
                format!("{value:.1} {unit}")
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min", seconds / 60),
        3_600..86_400 => format!("{} h {} min", seconds / 3_600, seconds % 3_600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3_600),
    }
}

fn seconds_between(from: &str, to: &str) -> Option<u64> {
    let (from, to) = (humantime::parse_rfc3339(from).ok()?, humantime::parse_rfc3339(to).ok()?);
    Some(to.duration_since(from).unwrap_or(Duration::ZERO).as_secs())
}

/// The next of 1, 2, 4, 6, 8, 10, 20 …, and of their tenths: half of it is as round.
fn round_up(value: f64) -> f64 {
    let mut step = 0.1;
    loop {
        for factor in [1.0, 2.0, 4.0, 6.0, 8.0] {
            if value <= step * factor || step > 1e12 {
                return step * factor;
            }
        }
        step *= 10.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const HOSTILE: [&str; 5] = [
        "<script>alert(1)</script>",
        "\"'><img src=x onerror=alert(1)>",
        "a\u{202e}b\u{2066}c\u{200b}d",
        "</style></script><!--",
        "\u{1b}[31mred\r\n\0&amp;`",
    ];

    /// A status whose every text is hostile, and whose lists have entries.
    fn hostile(text: &str) -> Value {
        let server = json!({"server": text, "up": false, "reason": text, "since": text, "in_flight": 1, "weight": 1});
        let hitter = json!({"token": text, "user": text, "client": text, "route": text, "requests": 1, "bytes": 5, "refusals": 0, "backend_seconds": 0.1});
        let list = json!({"by_requests": [hitter]});
        let window = json!({"requests": 3, "results": {"ok": 3}, "requests_per_second": 0.1, "latency_ms": {"p50": 1.0},
            "refusals": [{"reason": text, "status": 401, "requests": 2}],
            "series": {"step_seconds": 10, "ok": [1, 2], "client_error": [0, 0], "refused": [0, 0], "failed": [0, 0], "client_gone": [0, 0],
                "p50": [1.0, null], "p90": [2.0, null], "p99": [3.0, null]}});
        json!({
            "version": text, "ready": true, "started": text, "uptime_seconds": 5, "time": text, "pid": 1,
            "cache": {}, "traffic": {"last_15_minutes": window, "last_24_hours": window},
            "upstreams": [{"upstream": text, "servers": [server]}],
            "stores": [{"store": text, "subscribed": false, "subscription_problem": text, "servers": [text], "errors": {text: 1}}],
            "limits": [{"limit": text, "allowed": 1}],
            "guessing": {"watching": true, "clients": [{"client": text, "since": text}]},
            "callers": {"tokens": list, "users": list, "clients": list, "routes": list},
            "certificates": [{"listener": text, "name": text, "ends": text, "days_left": 3}],
            "configuration": {"file": text, "loaded": text, "sections": [{"section": text, "keys": [{"key": text, "value": text}]}]},
            "reloads": [{"time": text, "by": text, "result": text, "applied": [text], "restart_needed": [text], "errors": [text]}],
        })
    }

    /// The tags, the texts behind them left out.
    fn tags(page: &str) -> Vec<&str> {
        page.split('<').skip(1).filter_map(|rest| rest.split(['>', ' ']).next()).collect()
    }

    #[test]
    fn no_text_from_outside_becomes_markup() {
        let plain = render(&hostile("plain"));
        let mut read = 0;
        for text in HOSTILE {
            let page = render(&hostile(text));
            assert_eq!(tags(&page), tags(&plain), "{text:?} made markup");
            assert_eq!(page.matches('"').count(), plain.matches('"').count(), "{text:?} ends an attribute");
            for c in text.chars().filter(|c| !c.is_ascii_graphic() && *c != ' ') {
                assert!(c == '\n' || !page.contains(c), "{:?} is on the page", c);
                assert!(page.contains(&format!("⟨U+{:04X}⟩", u32::from(c))), "{c:?} is not named");
            }
            read += 1;
        }
        assert_eq!(read, HOSTILE.len());
        assert!(plain.matches("plain").count() > 30, "a text is not on the page");
    }

    #[test]
    fn the_policy_names_what_is_on_the_page() {
        let page = render(&hostile("x"));
        let part =
            |from: &str, to: &str| page.split(from).nth(1).and_then(|rest| rest.split(to).next()).unwrap().to_owned();
        let hash = |text: &str| STANDARD.encode(Digest::of(text.as_bytes()).as_bytes());
        let scripts: Vec<_> =
            page.split("<script>").skip(1).map(|rest| rest.split("</script>").next().unwrap()).collect();
        assert_eq!(scripts.len(), 2);
        let scripts = format!("script-src 'sha256-{}' 'sha256-{}';", hash(scripts[0]), hash(scripts[1]));
        assert!(FIELDS.contains(&scripts), "{}", *FIELDS);
        assert!(FIELDS.contains(&format!("style-src 'sha256-{}';", hash(&part("<style>", "</style>")))));
        for wanted in ["default-src 'none'", "base-uri 'none'", "frame-ancestors 'none'", "form-action 'self'"] {
            assert!(FIELDS.contains(wanted));
        }
        // Neither an attribute that is style or script, nor anything from elsewhere.
        for never in [" style=", " onload", " onclick", " src=", "@import", "url("] {
            assert!(!page.contains(never), "{never}");
        }
        assert_eq!(
            page.matches("http").count(),
            // What the form says to write on a terminal leads nowhere.
            page.matches("http-equiv").count()
                + page.matches("http://www.w3.org/2000/svg").count()
                + page.matches("'PRIVATE-TOKEN: …' http://host/").count()
        );
    }

    #[test]
    fn long_lists_are_cut() {
        let mut status = hostile("x");
        status["limits"] = (0..1_000).map(|_| json!({"limit": "y".repeat(10_000)})).collect();
        let page = render(&status);
        assert!(page.len() < 400_000 && page.contains("800 more"), "{}", page.len());
    }

    #[test]
    fn an_empty_status_is_a_page_too() {
        let page = render(&Value::Null);
        assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
    }

    #[test]
    fn numbers_are_said_in_few_digits() {
        assert_eq!([0, 999, 1_000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!(
            [0.05, 0.5, 12.0, 1_500.0, 60_000.0].map(|v| ms(&json!(v))),
            ["50 µs", "0.5 ms", "12 ms", "1.5 s", "60 s"]
        );
        assert_eq!([0.0, 0.3, 3.0, 17.0, 501.0].map(round_up), [0.1, 0.4, 4.0, 20.0, 600.0]);
        assert_eq!([share(0, 0), share(0, 5), share(1, 10_000), share(1, 3)], ["–", "0%", "<0.1%", "33%"]);
        assert_eq!([59, 61, 3_700, 90_000].map(span), ["59 s", "1 min", "1 h 1 min", "1 d 1 h"]);
        assert_eq!([0.0, 2_048.0, 5e9].map(bytes), ["0 B", "2.0 KiB", "4.7 GiB"]);
    }
}
