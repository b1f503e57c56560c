//! Numbers by measurement and variant, as a table for people and as JSON.

use std::fmt::Write;
use std::time::Duration;

use crate::variant::Variant;

#[derive(Clone, Copy, Debug)]
pub struct Value {
    number: f64,
    /// The measurement ended before it was over: it is more than this.
    more: bool,
}

impl Value {
    pub fn exact(number: f64) -> Value {
        Value { number, more: false }
    }

    pub fn more_than(number: f64) -> Value {
        Value { number, more: true }
    }

    /// Nearest rank, in milliseconds. A sample that is None took longer than `patience`.
    pub fn percentile(samples: &[Option<Duration>], percent: f64, patience: Duration) -> Value {
        let mut sorted: Vec<Duration> = samples.iter().flatten().copied().collect();
        sorted.sort();
        let rank = (samples.len() as f64 * percent / 100.0).ceil() as usize;
        match sorted.get(rank.max(1) - 1) {
            Some(time) => Value::exact(time.as_secs_f64() * 1000.0),
            None => Value::more_than(patience.as_secs_f64() * 1000.0),
        }
    }

    fn text(self) -> String {
        let digits = match self.number {
            n if n >= 100.0 || n.fract() == 0.0 => 0,
            n if n >= 10.0 => 1,
            _ => 2,
        };
        format!("{}{:.digits$}", if self.more { "> " } else { "" }, self.number)
    }
}

struct Row {
    name: String,
    unit: &'static str,
    values: Vec<Option<Value>>,
}

pub struct Report {
    variants: Vec<Variant>,
    rows: Vec<Row>,
    notes: Vec<String>,
}

impl Report {
    pub fn new(variants: &[Variant]) -> Report {
        Report { variants: variants.to_vec(), rows: Vec::new(), notes: Vec::new() }
    }

    /// Whether the variant is measured.
    pub fn has(&self, variant: Variant) -> bool {
        self.variants.contains(&variant)
    }

    pub fn add(&mut self, name: &str, unit: &'static str, variant: Variant, value: Value) {
        println!("    {}: {name}: {} {unit}", variant.name(), value.text());
        let index = self.rows.iter().position(|row| row.name == name).unwrap_or_else(|| {
            self.rows.push(Row { name: name.into(), unit, values: vec![None; self.variants.len()] });
            self.rows.len() - 1
        });
        let column = self.variants.iter().position(|v| *v == variant).expect("a variant of this run");
        self.rows[index].values[column] = Some(value);
    }

    pub fn note(&mut self, note: String) {
        println!("    {note}");
        self.notes.push(note);
    }

    /// Dovetail's number over that of `other`.
    fn ratio(&self, row: &Row, other: Variant) -> Option<f64> {
        let value = |variant| {
            let column = self.variants.iter().position(|v| *v == variant)?;
            row.values[column].filter(|value| !value.more)
        };
        let (ours, theirs) = (value(Variant::Dovetail)?, value(other)?);
        (theirs.number > 0.0).then(|| ours.number / theirs.number)
    }

    /// In Markdown, which reads well on a terminal too.
    pub fn table(&self) -> String {
        let mut lines = vec![vec!["measured".to_owned(), "unit".to_owned()]];
        lines[0].extend(self.variants.iter().map(|variant| variant.name().to_owned()));
        lines[0].extend(["dovetail : plain", "dovetail : dsync", "target", "met"].map(str::to_owned));
        for row in &self.rows {
            let mut line = vec![row.name.clone(), row.unit.to_owned()];
            line.extend(row.values.iter().map(|value| value.map_or(String::new(), Value::text)));
            for other in [Variant::Plain, Variant::Dsync] {
                line.push(self.ratio(row, other).map_or(String::new(), |ratio| format!("{ratio:.3}")));
            }
            let target = Target::of(&row.name);
            line.push(target.as_ref().map_or(String::new(), Target::text));
            line.push(
                target
                    .and_then(|target| self.met(row, &target))
                    .map_or("", |met| if met { "yes" } else { "NO" })
                    .into(),
            );
            lines.push(line);
        }
        let widths: Vec<usize> =
            (0..lines[0].len()).map(|i| lines.iter().map(|line| line[i].len()).max().unwrap_or(0)).collect();
        let mut text = String::new();
        for (number, line) in lines.iter().enumerate() {
            for (i, cell) in line.iter().enumerate() {
                let width = widths[i];
                let _ = if i == 0 { write!(text, "| {cell:<width$} ") } else { write!(text, "| {cell:>width$} ") };
            }
            text += "|\n";
            if number == 0 {
                for (i, width) in widths.iter().enumerate() {
                    let _ = if i == 0 {
                        write!(text, "|{:-<w$}", "", w = width + 2)
                    } else {
                        write!(text, "|{:-<w$}:", "", w = width + 1)
                    };
                }
                text += "|\n";
            }
        }
        for note in &self.notes {
            let _ = writeln!(text, "- {note}");
        }
        text
    }

    fn met(&self, row: &Row, target: &Target) -> Option<bool> {
        let column = self.variants.iter().position(|v| *v == Variant::Dovetail)?;
        let value = row.values[column]?;
        Some(!value.more && value.number <= target.limit)
    }

    pub fn json(&self) -> String {
        let mut text = String::from("{\n  \"measurements\": [\n");
        for (i, row) in self.rows.iter().enumerate() {
            let _ = write!(text, "    {{\"name\": {}, \"unit\": {}", quoted(row.name.trim()), quoted(row.unit));
            for (variant, value) in self.variants.iter().zip(&row.values) {
                if let Some(value) = value {
                    let key = if value.more { format!("{}_more_than", variant.name()) } else { variant.name().into() };
                    let _ = write!(text, ", \"{key}\": {:.4}", value.number);
                }
            }
            for other in [Variant::Plain, Variant::Dsync] {
                if let Some(ratio) = self.ratio(row, other) {
                    let _ = write!(text, ", \"dovetail_over_{}\": {ratio:.4}", other.name());
                }
            }
            if let Some(target) = Target::of(&row.name) {
                let _ = write!(text, ", \"target\": {}", quoted(&target.text()));
                if let Some(met) = self.met(row, &target) {
                    let _ = write!(text, ", \"met\": {met}");
                }
            }
            text += if i + 1 < self.rows.len() { "},\n" } else { "}\n" };
        }
        text += "  ],\n  \"notes\": [\n";
        for (i, note) in self.notes.iter().enumerate() {
            let _ = writeln!(text, "    {}{}", quoted(note), if i + 1 < self.notes.len() { "," } else { "" });
        }
        text + "  ]\n}"
    }
}

/// What Dovetail has to reach: at most this, in the row's unit.
struct Target {
    limit: f64,
    unit: &'static str,
}

impl Target {
    fn of(row: &str) -> Option<Target> {
        let (limit, unit) = match row {
            _ if row.starts_with("lag") && row.ends_with("p50, low rate") => (5.0, "ms"),
            _ if row.starts_with("lag") && row.ends_with("p99, low rate") => (25.0, "ms"),
            _ if row.starts_with("lag") && row.ends_with("p99, under load") => (250.0, "ms"),
            _ if row.contains("users at once") => (1.0, "s"),
            _ if row.contains("processes on b") => (4.0, ""),
            _ if row.contains("time over the delivery's") => (1.0, ""),
            _ if row.starts_with("  on the wire") && row.contains("one flag") => (100.0, "kB"),
            _ if row.starts_with("relay: memory") => (100.0, "MB"),
            _ if row.ends_with("median of rounds") => (1.05, ""),
            _ => return None,
        };
        Some(Target { limit, unit })
    }

    fn text(&self) -> String {
        format!("<= {} {}", self.limit, self.unit).trim_end().to_owned()
    }
}

fn quoted(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out + "\""
}
