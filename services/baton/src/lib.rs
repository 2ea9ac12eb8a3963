//! The one binary, as a library so that a test build of it is a second binary. Each subcommand stands in a file of its own; a service's own work stands in its library.

mod ask;
mod bench;
mod bench_engine;
mod bench_handoff;
mod demo;
mod doctor;
mod drain;
mod http;
mod key;
mod machine;
mod plan;
mod serve;
mod settings;
mod status;
mod target;
mod trace;
mod up;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Serves DeepSeek-V3-class models from separate pools of prefill and decode workers.
#[derive(Parser)]
#[command(name = "baton", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start gateway, router and workers as processes of this machine, and stop them together
    Up(up::Args),
    /// Serve the OpenAI API
    Gateway(serve::Args),
    /// Queue requests, place them on workers and carry their tokens
    Router(serve::Args),
    /// Run the engine: read prompts (prefill), write answers (decode), or both
    Worker(serve::WorkerArgs),
    /// Show members, load, queue and blocks of a running cluster
    Status(status::Args),
    /// Show where the time of one request went until its first two tokens
    Trace(trace::Args),
    /// Look at a deployment and name the fix for each thing that is wrong
    Doctor(doctor::Args),
    /// Say how many prefill and decode workers the load of a running cluster needs, and why
    Plan(plan::Args),
    /// Have a worker leave: it takes nothing new, finishes or passes on what it has, and ends
    Drain(drain::Args),
    /// Make API keys for gateways that ask for them
    Key(key::Args),
    /// Ask the chat of a running cluster one question
    Ask(ask::Args),
    /// Measure a running cluster: time to first token, time between tokens, throughput
    Bench(bench::Args),
    /// Measure the model alone, with random weights: time of a step, share of what the GPU could do
    BenchEngine(bench_engine::Args),
    /// Measure the hand-off alone: KV blocks between two processes, beside what this machine can do
    BenchHandoff(bench_handoff::Args),
}

pub fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("baton: {}", whole(&error));
            ExitCode::FAILURE
        }
    }
}

/// The error and its causes, each said once: many messages already end with their cause.
fn whole(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |said, cause| match said.contains(&cause) {
        true => said,
        false if said.is_empty() => cause,
        false => format!("{said}: {cause}"),
    })
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Up(args) => up::run(args),
        Command::Gateway(args) => serve::gateway(args),
        Command::Router(args) => serve::router(args),
        Command::Worker(args) => serve::worker(args),
        Command::Status(args) => status::run(args),
        Command::Trace(args) => trace::run(args),
        Command::Ask(args) => ask::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Key(args) => key::run(args),
        Command::Drain(args) => drain::run(args),
        Command::BenchEngine(args) => bench_engine::run(args),
        Command::BenchHandoff(args) => bench_handoff::run(args),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent_and_documented() {
        let command = Cli::command();
        command.clone().debug_assert();
        for subcommand in command.get_subcommands() {
            for argument in subcommand.get_arguments() {
                let name = argument.get_id();
                assert!(argument.get_help().is_some(), "{} --{name}", subcommand.get_name());
            }
        }
    }

    #[test]
    fn a_cause_is_said_once() {
        let error = anyhow::anyhow!("in use").context("cannot listen: in use").context("gateway");
        assert_eq!(whole(&error), "gateway: cannot listen: in use");
    }
}
