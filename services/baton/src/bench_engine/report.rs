//! What was measured, as a table and as JSON, beside the floor of the GPU and the published figures of another server.

use super::Args;
use crate::machine::{Machine, today};
use serde::Serialize;
use std::fmt;
use worker::measure::{Measured, OperationTime, Outcome, Rates};

#[derive(Serialize)]
pub struct Report {
    date: String,
    #[serde(flatten)]
    machine: Machine,
    backend: String,
    model: String,
    seed: u64,
    seconds_to_ready: f64,
    kv_blocks: u32,
    /// Rates that floors are computed from: bytes a second, operations a second in bf16 and FP8.
    #[serde(skip_serializing_if = "Option::is_none")]
    floor_rates: Option<[f64; 3]>,
    peer: &'static str,
    cases: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    case: String,
    steps: usize,
    /// Median of the timed steps, the fastest and the slowest.
    milliseconds: f64,
    fastest: f64,
    slowest: f64,
    tokens_per_second: f64,
    distinct_tokens: usize,
    floor_milliseconds: Option<f64>,
    share_of_floor: Option<f64>,
    peer_milliseconds: Option<f64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    operations: Vec<OperationRow>,
}

#[derive(Serialize)]
struct OperationRow {
    operation: &'static str,
    calls: u32,
    milliseconds: f64,
}

const PEER: &str = "vLLM 0.24.0, one H200, random FP8 weights, 2026-11-23";

/// (model directory, case, milliseconds of a step) of [`PEER`].
const PEER_STEPS: &[(&str, &str, f64)] = &[
    ("slice9", "decode:1x4096", 2.85),
    ("slice9", "decode:128x4096", 27.7),
    ("slice9", "decode:256x4096", 32.2),
    ("slice9", "prefill:1x4096", 4096.0 / 48.5),
    ("slice9", "prefill:4x4096", 16384.0 / 55.8),
    ("slice9", "prefill:1x16384", 16384.0 / 40.7),
    ("ep32", "prefill:4x4096", 16384.0 / 8.75),
    ("ep32", "prefill:1x16384", 16384.0 / 6.33),
];

impl Report {
    pub fn new(args: &Args, measured: &Measured, machine: Machine) -> Report {
        let model = model_name(args);
        let rates = (args.backend == "cuda").then_some(Rates::H200);
        Report {
            date: today(),
            machine,
            backend: args.backend.clone(),
            seed: args.seed,
            seconds_to_ready: round(measured.seconds_to_ready),
            kv_blocks: measured.kv_blocks,
            floor_rates: rates.map(|rates| [rates.bytes, rates.bf16, rates.fp8]),
            peer: PEER,
            cases: measured.cases.iter().map(|case| Row::new(&model, case, measured, rates)).collect(),
            model,
        }
    }
}

impl Row {
    fn new(model: &str, outcome: &Outcome, measured: &Measured, rates: Option<Rates>) -> Row {
        let (case, median) = (outcome.case.to_string(), outcome.median());
        let floor = rates.map(|rates| outcome.floor(&measured.config, &rates));
        let times = || outcome.milliseconds.iter().copied();
        let operation = |time: &OperationTime| OperationRow {
            operation: time.name,
            calls: time.calls,
            milliseconds: round(f64::from(time.milliseconds)),
        };
        Row {
            steps: outcome.milliseconds.len(),
            milliseconds: round(median),
            fastest: round(times().fold(f64::INFINITY, f64::min)),
            slowest: round(times().fold(0.0, f64::max)),
            tokens_per_second: round(outcome.tokens_per_second()),
            distinct_tokens: outcome.distinct_tokens,
            floor_milliseconds: floor.map(round),
            share_of_floor: floor.map(|floor| round(floor / median)),
            peer_milliseconds: peer(model, &case).map(round),
            operations: outcome.operations.iter().map(operation).collect(),
            case,
        }
    }
}

fn peer(model: &str, case: &str) -> Option<f64> {
    let same = |(of, named, _): &&(&str, &str, f64)| *of == model && *named == case;
    PEER_STEPS.iter().find(same).map(|(.., milliseconds)| *milliseconds)
}

/// Of the directory that holds config.json.
fn model_name(args: &Args) -> String {
    let full = args.model.canonicalize().unwrap_or_else(|_| args.model.clone());
    let directory = if full.is_file() { full.parent().map(|dir| dir.to_path_buf()) } else { Some(full) };
    let name = directory.and_then(|dir| Some(dir.file_name()?.to_string_lossy().into_owned()));
    name.unwrap_or_else(|| "model".to_owned())
}

fn round(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gpu = self.machine.gpu.as_deref().unwrap_or("no GPU");
        writeln!(
            f,
            "{} on {} ({gpu}), random weights, ready in {:.1} s; peer: {}",
            self.model, self.backend, self.seconds_to_ready, self.peer
        )?;
        writeln!(
            f,
            "{:<22}{:>12}{:>14}{:>12}{:>10}{:>12}{:>10}",
            "case", "ms/step", "tok/s", "floor ms", "share", "peer ms", "distinct"
        )?;
        self.cases.iter().try_for_each(|row| write!(f, "{row}"))
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.2}"));
        writeln!(
            f,
            "{:<22}{:>12.3}{:>14.0}{:>12}{:>10}{:>12}{:>10}",
            self.case,
            self.milliseconds,
            self.tokens_per_second,
            shown(self.floor_milliseconds),
            shown(self.share_of_floor),
            shown(self.peer_milliseconds),
            self.distinct_tokens
        )?;
        self.operations.iter().try_for_each(|row| {
            writeln!(f, "    {:<30}{:>6} calls{:>12.3} ms", row.operation, row.calls, row.milliseconds)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[test]
    fn every_figure_of_the_peer_is_of_a_case_that_is_measured() {
        for (model, case, milliseconds) in PEER_STEPS {
            assert!(super::super::CASES.contains(case), "{model} {case}");
            assert_eq!(peer(model, case), Some(*milliseconds));
        }
        assert_eq!(peer("demo", "decode:1x4096"), None);
    }

    /// The demo model's sizes on the CPU: every case runs through loading, feeding, timing and reporting.
    #[test]
    fn the_demo_models_configuration_is_measured_on_the_cpu() {
        let config = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/demo/checkpoint/config.json");
        let line = ["bench-engine", "--model", config, "--backend", "cpu", "--steps", "3"];
        let cases = ["decode:1x20", "decode:5x70", "prefill:2x30"];
        let args = Args::parse_from(line.iter().chain(&cases));
        let measured = worker::measure::run(&super::super::options(&args)).unwrap();
        let report = Report::new(&args, &measured, Machine::of("cpu"));
        let table = report.to_string();
        for (row, case) in report.cases.iter().zip(cases) {
            assert!(row.case.starts_with(case) && table.contains(case), "{table}");
            assert!(row.milliseconds > 0.0 && row.fastest <= row.milliseconds, "{table}");
            assert!(row.operations.is_empty() && row.floor_milliseconds.is_none(), "{table}");
        }
        assert_eq!(report.cases.iter().map(|row| row.steps).collect::<Vec<_>>(), [3, 3, 4]);
        assert!(report.cases[1].distinct_tokens > 1, "sequences go different ways: {table}");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(
            (json["model"].as_str(), json["cases"].as_array().unwrap().len()),
            (Some("checkpoint"), 3)
        );
    }

    #[test]
    fn operations_are_counted_layer_by_layer() {
        let config = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/demo/checkpoint");
        let line = ["bench-engine", "--model", config, "--backend", "cpu", "--kernels", "decode:3x40x2"];
        let args = Args::parse_from(line);
        let measured = worker::measure::run(&super::super::options(&args)).unwrap();
        let calls = |name: &str| {
            let found = measured.cases[0].operations.iter().find(|time| time.name == name);
            found.map_or(0, |time| time.calls)
        };
        let layers = measured.config.layers;
        assert_eq!((calls("upload"), calls("mla_attend"), calls("rms_norm")), (1, layers, 2 * layers + 1));
        assert_eq!(calls("gate") + calls("mlp (dense layers)"), layers);
        assert_eq!((calls("logits"), calls("sample")), (1, 1));
    }
}
