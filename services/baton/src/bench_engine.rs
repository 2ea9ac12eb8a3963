//! `baton bench-engine`: the whole model with random weights, without a cluster: milliseconds of a step, tokens a second, share
//! of what the GPU could do.

mod report;

use crate::machine::Machine;
use anyhow::Context;
use clap::Parser;
use report::Report;
use std::{path::PathBuf, process::ExitCode};
use worker::measure::{self, Case};

/// What is measured if no case is named.
const CASES: &[&str] = &[
    "decode:1x4096",
    "decode:8x4096",
    "decode:32x4096",
    "decode:64x4096",
    "decode:128x4096",
    "decode:256x4096",
    "decode:128x1024",
    "decode:32x16384",
    "prefill:1x4096",
    "prefill:4x4096",
    "prefill:1x16384",
];

#[derive(Clone, Parser)]
pub struct Args {
    /// A config.json of the DeepSeek family, or its directory; no other file is read
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// What computes: cpu, or cuda (Hopper GPUs, in a binary built with the feature cuda)
    #[arg(long, value_name = "NAME", default_value = "cuda")]
    backend: String,
    /// Seed of weights, tokens and the order of blocks
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Timed steps of each decode case that names none [default: 24]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    steps: Option<u32>,
    /// Show what each operation of a step takes, launched one by one, instead of steps as they are served
    #[arg(long)]
    kernels: bool,
    /// Threads that compute on a CPU; 0: one for each core
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Write the figures to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// decode:SEQUENCESxCONTEXT[xSTEPS] or prefill:PROMPTSxTOKENS, all prompts in one step [default: eleven of both]
    cases: Vec<Case>,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    telemetry::init("bench-engine");
    let measured = measure::run(&options(&args))?;
    let report = Report::new(&args, &measured, Machine::of(&args.backend));
    print!("{report}");
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&report)? + "\n";
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn options(args: &Args) -> measure::Options {
    let parse = |case: &&str| case.parse().expect("the default cases are cases");
    let cases: Vec<Case> = match args.cases.is_empty() {
        true => CASES.iter().map(parse).collect(),
        false => args.cases.clone(),
    };
    measure::Options {
        model: args.model.clone(),
        backend: args.backend.clone(),
        seed: args.seed,
        cases: cases.into_iter().map(|case| case.or_steps(args.steps)).collect(),
        operations: args.kernels,
        threads: args.threads,
    }
}
