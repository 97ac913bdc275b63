//! Owns the text format of Prometheus, version 0.0.4: families with HELP, TYPE and samples.
//! Called by `metrics` alone.
//! Must never write OpenMetrics: there, a counter's family and a bucket's bound have other names than the upstream agent's.

use std::fmt::Write;

use crate::sys::histogram::Histogram;

/// The content type of the text.
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Metrics with one name.
#[derive(Debug)]
pub(crate) struct Family {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    help: &'static str,
    samples: Vec<Sample>,
}

/// What a family measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Counter,
    Gauge,
    Histogram,
}

#[derive(Debug)]
struct Sample {
    labels: Vec<(&'static str, String)>,
    value: Value,
}

/// The value of a sample.
#[derive(Debug)]
pub(crate) enum Value {
    Whole(u64),
    Fraction(f64),
    Histogram(Histogram),
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

impl Family {
    pub(crate) fn counter(name: &'static str, help: &'static str) -> Family {
        Family { name, help, kind: Kind::Counter, samples: Vec::new() }
    }

    pub(crate) fn gauge(name: &'static str, help: &'static str) -> Family {
        Family { kind: Kind::Gauge, ..Family::counter(name, help) }
    }

    pub(crate) fn histogram(name: &'static str, help: &'static str) -> Family {
        Family { kind: Kind::Histogram, ..Family::counter(name, help) }
    }

    /// Adds a sample without labels.
    pub(crate) fn value(self, value: impl Into<Value>) -> Family {
        self.with([], value)
    }

    /// Adds a sample with labels.
    pub(crate) fn with<const N: usize>(mut self, labels: [(&'static str, &str); N], value: impl Into<Value>) -> Family {
        let labels = labels.map(|(name, label)| (name, label.to_owned())).into();
        self.samples.push(Sample { labels, value: value.into() });
        self
    }

    /// Adds a sample for each of `all`.
    pub(crate) fn each<T>(self, all: impl IntoIterator<Item = T>, add: impl Fn(Family, T) -> Family) -> Family {
        all.into_iter().fold(self, add)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// The names of the labels of the first sample.
    #[cfg(test)]
    pub(crate) fn labels(&self) -> Vec<&'static str> {
        self.samples.first().map(|sample| sample.labels.iter().map(|(name, _)| *name).collect()).unwrap_or_default()
    }

    fn encode(&self, out: &mut String) {
        let Family { name, help, kind, samples } = self;
        let kind = kind.name();
        write(out, format_args!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
        for Sample { labels, value } in samples {
            match value {
                Value::Whole(value) => write(out, format_args!("{name}{} {value}\n", braces(labels, None))),
                Value::Fraction(value) => write(out, format_args!("{name}{} {value}\n", braces(labels, None))),
                Value::Histogram(histogram) => buckets(out, name, labels, histogram),
            }
        }
    }
}

fn buckets(out: &mut String, name: &str, labels: &[(&'static str, String)], histogram: &Histogram) {
    let bounds = histogram.bounds.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
    let mut below = 0;
    for (bound, count) in bounds.zip(&histogram.counts) {
        below += count;
        write(out, format_args!("{name}_bucket{} {below}\n", braces(labels, Some(&bound))));
    }
    let braces = braces(labels, None);
    write(out, format_args!("{name}_sum{braces} {}\n{name}_count{braces} {below}\n", histogram.sum));
}

/// `{name="value",...}`, or nothing.
fn braces(labels: &[(&'static str, String)], bound: Option<&str>) -> String {
    let labels = labels.iter().map(|(name, value)| (*name, value.as_str())).chain(bound.map(|bound| ("le", bound)));
    let pairs: Vec<String> = labels.map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
    if pairs.is_empty() { String::new() } else { format!("{{{}}}", pairs.join(",")) }
}

fn escaped(value: &str) -> String {
    value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}

fn write(out: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing into a String cannot fail.
    let _ = out.write_fmt(text);
}

/// The text of all families.
pub(crate) fn encode(families: &[Family]) -> String {
    let mut out = String::new();
    families.iter().for_each(|family| family.encode(&mut out));
    out
}

impl From<u64> for Value {
    fn from(value: u64) -> Value {
        Value::Whole(value)
    }
}

impl From<u32> for Value {
    fn from(value: u32) -> Value {
        Value::Whole(value.into())
    }
}

impl From<usize> for Value {
    fn from(value: usize) -> Value {
        Value::Whole(value as u64)
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Value {
        Value::Whole(value.into())
    }
}

impl From<f64> for Value {
    fn from(value: f64) -> Value {
        Value::Fraction(value)
    }
}

impl From<&Histogram> for Value {
    fn from(value: &Histogram) -> Value {
        Value::Histogram(value.clone())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::sys::histogram::UPSTREAM_BUCKETS;

    #[test]
    fn a_histogram_is_prometheus() {
        let mut histogram = Histogram::new(&UPSTREAM_BUCKETS);
        for milliseconds in [1, 5, 6, 40_000] {
            histogram.observe(Duration::from_millis(milliseconds));
        }
        let text = encode(&[Family::histogram("x", "Words.").value(&histogram)]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[..5],
            [
                "# HELP x Words.",
                "# TYPE x histogram",
                "x_bucket{le=\"0.005\"} 2",
                "x_bucket{le=\"0.025\"} 3",
                "x_bucket{le=\"0.1\"} 3"
            ]
        );
        assert_eq!(lines[8..], ["x_bucket{le=\"30\"} 3", "x_bucket{le=\"+Inf\"} 4", "x_sum 40.012", "x_count 4"]);
    }

    #[test]
    fn a_label_is_escaped() {
        let text = encode(&[Family::gauge("x", "Words.").with([("rule", "a \"b\"\\\nc"), ("other", "")], 0.5)]);
        assert!(text.ends_with("\nx{rule=\"a \\\"b\\\"\\\\\\nc\",other=\"\"} 0.5\n"), "{text}");
    }
}
