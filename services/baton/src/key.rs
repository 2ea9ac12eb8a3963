//! `baton key new`: makes an API key, shows it once, and prints the entry by which gateways will know it.

use anyhow::anyhow;
use clap::{Parser, Subcommand};
use gateway::keys::{Limits, NewKey};
use std::process::ExitCode;

#[derive(Parser)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a key: shows it once (on stderr), and prints the entry for the file of keys
    New(New),
}

#[derive(Parser)]
struct New {
    /// Whose key it is: the tenant. Keys of one name share limits and their share of the queue
    name: String,
    /// Requests a minute [default: no limit]
    #[arg(long, value_name = "N")]
    requests_per_minute: Option<u32>,
    /// Tokens a minute, of prompts and completions together, for example 100000 [default: no limit]
    #[arg(long, value_name = "N")]
    tokens_per_minute: Option<u32>,
    /// Requests at the same time [default: no limit]
    #[arg(long, value_name = "N")]
    concurrency: Option<u32>,
    /// Lowest number, and so the highest priority, that its requests may ask for [default: the gateway's own bound]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    priority_min: Option<i32>,
    /// It opens what only operators may see
    #[arg(long)]
    admin: bool,
    /// Print one line of JSON: the key, and the entry
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Command::New(asked) = args.command;
    let limits = Limits {
        requests_per_minute: asked.requests_per_minute,
        tokens_per_minute: asked.tokens_per_minute,
        concurrency: asked.concurrency,
        priority_min: asked.priority_min,
    };
    let new = NewKey::generate(&asked.name, limits, asked.admin).map_err(|problem| anyhow!(problem))?;
    let entry = new.entry.to_toml().map_err(|problem| anyhow!(problem))?;
    match asked.json {
        true => println!("{}", serde_json::json!({"key": new.key, "entry": entry})),
        false => {
            eprintln!(
                "The key of {}, shown only now: nobody can read it back from its entry.\n\n{}\n",
                asked.name, new.key
            );
            print!("{entry}");
        }
    }
    Ok(ExitCode::SUCCESS)
}
