//! Pairs of figures from the same run, their ratios, and the goals they are held against.

use std::error::Error;

use serde_json::json;

pub(crate) type Failure = Box<dyn Error + Send + Sync>;
pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

/// What is asked of a figure: a ratio to the baseline of at least so much, or a value of at most or at least so much.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Goal {
    Ratio {
        must: f64,
        stretch: f64,
    },
    AtMost {
        must: f64,
        stretch: f64,
    },
    AtLeast {
        must: f64,
        stretch: f64,
    },
    /// Only shown.
    None,
}

/// One figure beside its baseline, round by round.
#[derive(Debug)]
pub(crate) struct Measurement {
    /// The number of the goal, and what was measured.
    name: &'static str,
    what: &'static str,
    unit: &'static str,
    goal: Goal,
    pairs: Vec<(f64, f64)>,
}

impl Measurement {
    pub(crate) fn ratio(name: &'static str, what: &'static str, unit: &'static str, must: f64, stretch: f64) -> Self {
        Self { name, what, unit, goal: Goal::Ratio { must, stretch }, pairs: Vec::new() }
    }

    pub(crate) fn at_most(name: &'static str, what: &'static str, unit: &'static str, must: f64, stretch: f64) -> Self {
        Self { name, what, unit, goal: Goal::AtMost { must, stretch }, pairs: Vec::new() }
    }

    pub(crate) fn at_least(
        name: &'static str,
        what: &'static str,
        unit: &'static str,
        must: f64,
        stretch: f64,
    ) -> Self {
        Self { name, what, unit, goal: Goal::AtLeast { must, stretch }, pairs: Vec::new() }
    }

    pub(crate) fn shown(name: &'static str, what: &'static str, unit: &'static str) -> Self {
        Self { name, what, unit, goal: Goal::None, pairs: Vec::new() }
    }

    pub(crate) fn add(&mut self, ours: f64, baseline: f64) {
        self.pairs.push((ours, baseline));
    }

    fn summary(&self) -> Summary {
        let ratios = sorted(self.pairs.iter().map(|(ours, baseline)| ours / baseline));
        Summary {
            ours: median(&sorted(self.pairs.iter().map(|pair| pair.0))),
            baseline: median(&sorted(self.pairs.iter().map(|pair| pair.1))),
            ratio: median(&ratios),
            ratio_min: ratios.first().copied().unwrap_or(f64::NAN),
            ratio_max: ratios.last().copied().unwrap_or(f64::NAN),
        }
    }
}

struct Summary {
    ours: f64,
    baseline: f64,
    ratio: f64,
    ratio_min: f64,
    ratio_max: f64,
}

impl Goal {
    fn verdict(self, summary: &Summary) -> String {
        let (must, stretch, met, met_stretch, sign) = match self {
            Self::Ratio { must, stretch } => (must, stretch, summary.ratio >= must, summary.ratio >= stretch, '≥'),
            Self::AtMost { must, stretch } => (must, stretch, summary.ours <= must, summary.ours <= stretch, '≤'),
            Self::AtLeast { must, stretch } => (must, stretch, summary.ours >= must, summary.ours >= stretch, '≥'),
            Self::None => return String::new(),
        };
        let word = match (met, met_stretch) {
            (_, true) => "stretch",
            (true, false) => "must",
            (false, false) => "missed",
        };
        format!("{word} ({sign} {must}, {sign} {stretch})")
    }
}

/// Prints what was measured: a table, or one JSON object for each goal.
pub(crate) fn report(scenario: &str, measurements: &[Measurement], as_json: bool) {
    if !as_json {
        println!(
            "{:<9} {:<58} {:>10} {:>10} {:<12} {:>6} {:<13} goal",
            "", "", "ours", "baseline", "unit", "ratio", "min-max"
        );
    }
    for measurement in measurements.iter().filter(|each| !each.pairs.is_empty()) {
        let Measurement { name, what, unit, goal, pairs } = measurement;
        let summary = measurement.summary();
        let Summary { ours, baseline, ratio, ratio_min, ratio_max } = summary;
        if as_json {
            let line = json!({
                "scenario": scenario, "goal": name, "what": what, "ours": ours, "baseline": baseline, "ratio": ratio,
                "ratio_min": ratio_min, "ratio_max": ratio_max, "rounds": pairs.len(), "unit": unit,
            });
            println!("{line}");
        } else {
            let range = format!("{ratio_min:.2}-{ratio_max:.2}");
            let verdict = goal.verdict(&summary);
            let (ours, baseline) = (short(ours), short(baseline));
            println!("{name:<9} {what:<58} {ours:>10} {baseline:>10} {unit:<12} {ratio:>6.2} {range:<13} {verdict}");
        }
    }
}

fn short(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// One line about how far the run has come.
pub(crate) fn progress(text: &str) {
    use std::io::{IsTerminal, Write};
    let mut stderr = std::io::stderr();
    let end = if stderr.is_terminal() { "\x1b[K\r" } else { "\n" };
    let _ = write!(stderr, "{text}{end}").and_then(|()| stderr.flush());
}

pub(crate) fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

pub(crate) fn median(sorted: &[f64]) -> f64 {
    percentile(sorted, 0.5)
}

/// The value below which this share of the others lies.
pub(crate) fn percentile(sorted: &[f64], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * share).round() as usize).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_the_median_of_the_rounds_not_the_ratio_of_the_medians() {
        let mut measurement = Measurement::ratio("W0", "", "", 1.0, 2.0);
        for (ours, baseline) in [(10.0, 10.0), (30.0, 10.0), (20.0, 40.0)] {
            measurement.add(ours, baseline);
        }
        let summary = measurement.summary();
        assert_eq!((summary.ratio, summary.ratio_min, summary.ratio_max), (1.0, 0.5, 3.0));
        assert_eq!((summary.ours, summary.baseline), (20.0, 10.0));
        assert!(measurement.goal.verdict(&summary).starts_with("must"));
    }
}
