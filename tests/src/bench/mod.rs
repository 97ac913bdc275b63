//! Owns what the measuring programs share: a line of the table, medians, rounds, progress on stderr, rows as JSON on stdout.
//! Called by `nodeguard-tunnel-bench`, `nodeguard-kernel-bench` and the bench of `nodeguard-cluster`.
//! Must never print anything but rows on stdout: `cargo xtask bench` reads them.

pub mod traffic;

use std::{
    io::Write,
    time::{Duration, Instant},
};

use anyhow::Result;
use serde::Serialize;

/// `at least` or `at most` this ratio; none where a figure is only shown.
pub type Goal = Option<(&'static str, f64)>;

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What is measured.
    pub what: String,
    /// In which unit.
    pub unit: &'static str,
    /// This project's figure.
    pub ours: f64,
    /// The other's in the same run, or what is allowed.
    pub other: f64,
    /// Ours divided by the other, unless it says so: the median of the ratios of each round.
    pub ratio: f64,
    /// What the ratio has to be.
    pub goal: Goal,
}

impl Row {
    /// A figure that has nothing to stand beside.
    pub fn alone(what: impl Into<String>, unit: &'static str, ours: f64) -> Row {
        Row::beside(what, unit, ours, f64::NAN, None)
    }

    /// Two figures and their ratio.
    pub fn beside(what: impl Into<String>, unit: &'static str, ours: f64, other: f64, goal: Goal) -> Row {
        Row { what: what.into(), unit, ours, other, ratio: ours / other, goal }
    }
}

/// Figures of two sides, ours first, one of each in a round.
#[derive(Clone, Debug, Default)]
pub struct Pairs([Vec<f64>; 2]);

impl Pairs {
    /// Of what each side has, round by round.
    pub fn of(ours: &[f64], other: &[f64]) -> Pairs {
        Pairs([ours.to_vec(), other.to_vec()])
    }

    /// Adds a round: ours and the other.
    pub fn add(&mut self, [ours, other]: [f64; 2]) {
        self.push(0, ours);
        self.push(1, other);
    }

    /// Adds a figure of one side; every round has one of each.
    pub fn push(&mut self, side: usize, figure: f64) {
        self.0[side].push(figure);
    }

    /// Medians of both, and the median of the rounds' ratios: what disturbs a whole round does not disturb its ratio.
    pub fn row(&self, what: impl Into<String>, unit: &'static str, goal: Goal) -> Row {
        let [ours, other] = &self.0;
        let ratios: Vec<f64> = ours.iter().zip(other).map(|(ours, other)| ours / other).collect();
        Row { ratio: median(&ratios), ..Row::beside(what, unit, median(ours), median(other), goal) }
    }
}

/// Who is first changes with every round or turn: the indices of all, ours being 0.
pub fn in_turn<const N: usize>(turn: usize) -> [usize; N] {
    std::array::from_fn(|place| (place + turn) % N)
}

/// A round of this length: both sides take short turns, so that what else happens on the machine meets both alike. A turn returns how much it
/// did in what time. Returns each side's median rate per second.
pub fn round_of(
    time: Duration,
    round: usize,
    mut turn: impl FnMut(usize) -> Result<(f64, Duration)>,
) -> Result<[f64; 2]> {
    let (started, mut rates) = (Instant::now(), [Vec::new(), Vec::new()]);
    for number in 0_usize.. {
        for side in in_turn::<2>(round + number) {
            let (more, took) = turn(side)?;
            rates[side].push(more / took.as_secs_f64());
        }
        if started.elapsed() > time {
            break;
        }
    }
    Ok([median(&rates[0]), median(&rates[1])])
}

/// The middle value; no number where there is none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Prints on stderr what is being done.
pub fn progress(text: &str) {
    let _ = writeln!(std::io::stderr(), "  {text}");
}

/// Prints the rows.
pub fn print(rows: &[Row]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, rows)?;
    Ok(writeln!(out)?)
}

/// Prints a line on stdout at once, for a program that waits for it.
pub fn print_line(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}
