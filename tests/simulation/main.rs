//! Whole clusters in one thread and in simulated time, disturbed by what a seed says, and held to what must
//! be true of every answer and every block. The code of gateway, router and worker is the real one; simulated
//! are the network, the membership's source, the device, the clock and chance.
//!
//! Every seed runs in a process of its own, so that it gives the same alone as among thousands. `make
//! simulate SEEDS=…` runs many; `cargo test -p tests --test simulation -- --seed 17` replays one and tells
//! what happens.

mod check;
mod client;
mod cluster;
mod device;
mod faults;
mod journal;
mod many;
mod nature;
mod net;
mod pipe;
mod run;
mod shape;
mod workload;

use anyhow::Context;
use device::Broken;
use std::{ops::Range, process::ExitCode};

/// Of a run without arguments, as in continuous integration.
const SEEDS: Range<u64> = 0..320;

fn main() -> anyhow::Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [] | ["--nocapture"] => many::prove(SEEDS),
        ["--seeds", seeds] => many::run(parse_range(seeds)?),
        ["--seed", seed] => one(seed, None, true),
        ["--seed", seed, "--quiet"] => one(seed, None, false),
        ["--seed", seed, "--broken", broken] => one(seed, Some(parse_broken(broken)?), true),
        ["--seed", seed, "--quiet", "--broken", broken] => one(seed, Some(parse_broken(broken)?), false),
        // Arguments of other tests.
        _ => {
            println!(
                "the simulation knows --seeds FROM..TO and --seed N [--broken WHAT]; it was not asked to run"
            );
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// In this process, which must have done nothing else.
fn one(seed: &str, broken: Option<Broken>, aloud: bool) -> anyhow::Result<ExitCode> {
    let verdict = run::run(seed.parse().context("--seed takes a number")?, broken, aloud);
    println!("{}", serde_json::to_string(&verdict)?);
    if let (Some(violation), true) = (&verdict.violation, aloud) {
        eprintln!("seed {}: {violation}", verdict.seed);
    }
    Ok(if verdict.violation.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn parse_range(seeds: &str) -> anyhow::Result<Range<u64>> {
    let parsed = match seeds.split_once("..") {
        Some((from, to)) => from.parse().ok().zip(to.parse().ok()).map(|(from, to)| from..to),
        None => seeds.parse().ok().map(|count| 0..count),
    };
    parsed.with_context(|| format!("`{seeds}` is neither a number of seeds nor FROM..TO"))
}

fn parse_broken(name: &str) -> anyhow::Result<Broken> {
    let found = Broken::ALL.iter().find(|(known, _)| *known == name).map(|(_, broken)| *broken);
    let known: Vec<_> = Broken::ALL.iter().map(|(name, _)| *name).collect();
    found.with_context(|| format!("nothing is broken by `{name}`; there are: {}", known.join(", ")))
}
