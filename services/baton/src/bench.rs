//! `baton bench`: a load generator. Sends prompts of token ids to `/v1/completions`, every prompt unlike
//! the others so that no prefix cache answers for the engine, and reports what a client sees.

mod load;
mod report;

use crate::{ask, http::Client, target::Target};
use anyhow::bail;
use clap::Parser;
use futures::stream::{self, StreamExt};
use load::{Plan, Record};
use std::{process::ExitCode, sync::Arc, time::Duration};
use tokio::time::{Instant, sleep_until};

#[derive(Clone, Parser)]
pub struct Args {
    #[command(flatten)]
    target: Target,
    /// Served model [default: the first that the gateway lists]
    #[arg(long)]
    model: Option<String>,
    /// Requests in flight at once
    #[arg(long, default_value_t = 1)]
    concurrency: usize,
    /// Requests measured
    #[arg(long, default_value_t = 16)]
    requests: usize,
    /// Requests sent before measuring, unmeasured
    #[arg(long, default_value_t = 2)]
    warmup: usize,
    /// Requests a second, started at even intervals however long answers take; 0: as fast as --concurrency allows
    #[arg(long, default_value_t = 0.0)]
    rate: f64,
    /// Tokens of each prompt
    #[arg(long, default_value_t = 512)]
    prompt_tokens: usize,
    /// Of these, tokens that all prompts share
    #[arg(long, default_value_t = 0)]
    shared_prefix: usize,
    /// Tokens of each answer; end-of-sentence is ignored
    #[arg(long, default_value_t = 64)]
    output_tokens: usize,
    /// Prompts are drawn from token ids 16 up to this
    #[arg(long, default_value_t = 2048)]
    vocabulary: u32,
    /// Seed of the prompts
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Goodput counts requests whose first token came within so many milliseconds
    #[arg(long, value_name = "MS")]
    slo_ttft: Option<f64>,
    /// Goodput counts requests whose mean time per later token was at most so many milliseconds
    #[arg(long, value_name = "MS")]
    slo_itl: Option<f64>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    check(&args)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (records, elapsed) = runtime.block_on(measure(&args))?;
    let report = report::Report::new(&args, &records, elapsed);
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => print!("{report}"),
    }
    Ok(if report.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn check(args: &Args) -> anyhow::Result<()> {
    if args.concurrency == 0 || args.requests == 0 || args.prompt_tokens == 0 || args.output_tokens == 0 {
        bail!("--concurrency, --requests, --prompt-tokens and --output-tokens must be at least 1");
    }
    if args.requests > 1_000_000 || args.shared_prefix >= args.prompt_tokens || args.vocabulary <= 16 {
        bail!(
            "--requests is at most 1000000, --shared-prefix less than --prompt-tokens, --vocabulary more than 16"
        );
    }
    Ok(())
}

async fn measure(args: &Args) -> anyhow::Result<(Vec<Record>, Duration)> {
    let client = args.target.client()?;
    let model = ask::model(&client, args.model.as_deref()).await?;
    let plan = Arc::new(Plan::new(args, model));
    drive(&client, &plan, args, 0..args.warmup, 0.0).await;
    let began = Instant::now();
    let records = drive(&client, &plan, args, args.warmup..args.warmup + args.requests, args.rate).await;
    Ok((records, began.elapsed()))
}

/// At a given rate each request has its appointed time and its latency counts from there, so that a slow
/// server cannot hide its queue by slowing the generator.
async fn drive(
    client: &Client,
    plan: &Arc<Plan>,
    args: &Args,
    numbers: std::ops::Range<usize>,
    rate: f64,
) -> Vec<Record> {
    let began = Instant::now();
    let first = numbers.start;
    let in_flight = if rate > 0.0 { numbers.len().max(1) } else { args.concurrency };
    stream::iter(numbers)
        .map(|number| async move {
            let due = match rate > 0.0 {
                true => began + Duration::from_secs_f64((number - first) as f64 / rate),
                false => Instant::now(),
            };
            sleep_until(due).await;
            plan.send(client, number, due).await
        })
        .buffer_unordered(in_flight)
        .collect()
        .await
}
