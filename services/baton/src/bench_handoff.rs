//! `baton bench-handoff`: KV blocks from one process to another on this machine, beside what the machine can do: gigabytes a
//! second, processor time, the protocol's cost of a request, what is left to send when a chunked prefill ends.

mod report;

use anyhow::Context;
use clap::Parser;
use report::Report;
use std::{path::PathBuf, process::ExitCode};
use worker::handoff_speed::{self, Options};

#[derive(Clone, Parser)]
pub struct Args {
    /// Whose KV pool is measured beside plain memory: cpu, or cuda (Hopper GPUs, in a binary built with the feature cuda)
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    backend: String,
    /// Sizes of a block; 4392 KiB are a block of DeepSeek-V3
    #[arg(long, value_name = "KIB,KIB", value_delimiter = ',', default_values_t = [4392, 256], value_parser = clap::value_parser!(u32).range(8..=65536))]
    block_kb: Vec<u32>,
    /// Blocks of one transfer, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=16384))]
    mb: u32,
    /// Transfers by each way
    #[arg(long, value_name = "N", default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Measure NIXL as well, in a binary built with the feature rdma
    #[arg(long)]
    nixl: bool,
    /// Write the figures to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Be the process that receives; the other one asks for it
    #[arg(long, hide = true)]
    peer: bool,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    telemetry::init("bench-handoff");
    let runtime = tokio::runtime::Runtime::new()?;
    if args.peer {
        runtime.block_on(handoff_speed::peer())?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut peer = tokio::process::Command::new(std::env::current_exe()?);
    peer.args(["bench-handoff", "--peer"]);
    let figures = runtime.block_on(handoff_speed::run(&options(&args), peer))?;
    let report = Report::new(&args.backend, figures);
    print!("{report}");
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&report)? + "\n";
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn options(args: &Args) -> Options {
    Options {
        backend: args.backend.clone(),
        block_bytes: args.block_kb.iter().map(|kb| (*kb as usize) << 10).collect(),
        bytes: (args.mb as usize) << 20,
        rounds: args.rounds as usize,
        nixl: args.nixl,
    }
}
