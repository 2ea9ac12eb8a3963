//! `baton plan`: how many prefill and decode workers the load of a running cluster needs to keep to given times, and why. From
//! what its services count, scraped here for a while or kept by Prometheus. Changes nothing.

mod curve;
mod gather;
mod measured;
mod queueing;
mod report;
mod scaling;
mod series;
mod sizing;

use anyhow::bail;
use clap::{Parser, ValueEnum};
use measured::Measured;
use report::Report;
use sizing::Target;
use std::{process::ExitCode, time::Duration};

const HELP: &str = "\
The load must be there while it is measured. Percentiles are of what clients saw. Formulae and their sources stand in
ARCHITECTURE.md, \"How many workers\". The last table says what the chart's autoscalers (HPA, KEDA) would do with their
default thresholds, and which thresholds would have them follow this plan.";

#[derive(Parser)]
#[command(after_help = HELP)]
pub struct Args {
    #[command(flatten)]
    gateway: crate::target::Target,
    /// Admin address of a router, for the wait in its queue; repeatable
    #[arg(long, value_name = "URL")]
    router: Vec<String>,
    /// Ask this Prometheus instead of scraping
    #[arg(long, value_name = "URL", conflicts_with_all = ["url", "router"])]
    prometheus: Option<String>,
    /// Of one cluster among several in Prometheus, labels as in PromQL: release="baton",namespace="inference"
    #[arg(long, value_name = "LABELS", default_value = "", requires = "prometheus")]
    selector: String,
    /// Time that is measured: 30s, 10m, 2h; scraping takes so long
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = time)]
    window: Duration,
    /// Wanted time to first token
    #[arg(long, value_name = "MS", default_value_t = 1000.0)]
    ttft_ms: f64,
    /// Wanted time between tokens
    #[arg(long, value_name = "MS", default_value_t = 50.0)]
    itl_ms: f64,
    /// Share of requests and tokens that keep to these
    #[arg(long, value_name = "P", default_value = "p90")]
    percentile: Percentile,
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Percentile {
    P50,
    P90,
    P99,
}

fn time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text} is not a time like 30s, 10m or 2h");
    let (number, unit) = text.split_at(text.len() - text.chars().last().map_or(0, char::len_utf8));
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let seconds = number.saturating_mul(seconds);
    match (2..=7 * 24 * 3600).contains(&seconds) {
        true => Ok(Duration::from_secs(seconds)),
        false => Err("expected two seconds to a week".to_owned()),
    }
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let target = args.target()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let measured = runtime.block_on(args.measured(target.percentile))?;
    let (plan, autoscaling) = (sizing::plan(&measured, target), scaling::signals(&measured, target));
    let report = Report { target, measured, plan, autoscaling };
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => print!("{report}"),
    }
    Ok(ExitCode::SUCCESS)
}

impl Args {
    fn target(&self) -> anyhow::Result<Target> {
        let sane = |ms: f64| ms.is_finite() && ms > 0.0;
        if !sane(self.ttft_ms) || !sane(self.itl_ms) {
            bail!("--ttft-ms and --itl-ms must be above 0");
        }
        let percentile = match self.percentile {
            Percentile::P50 => 0.5,
            Percentile::P90 => 0.9,
            Percentile::P99 => 0.99,
        };
        Ok(Target { ttft: self.ttft_ms / 1e3, itl: self.itl_ms / 1e3, percentile })
    }

    async fn measured(&self, percentile: f64) -> anyhow::Result<Measured> {
        match &self.prometheus {
            Some(prometheus) => {
                let window = gather::kept(prometheus, &self.selector, self.window).await?;
                Measured::new(&window, percentile, None)
            }
            None => {
                let (window, most) = gather::scraped(&self.gateway, &self.router, self.window).await?;
                Measured::new(&window, percentile, most)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit() {
        assert_eq!(time("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(time("2h"), Ok(Duration::from_secs(7200)));
        for wrong in ["", "s", "30", "1.5m", "0s", "9999h", "3µ"] {
            assert!(time(wrong).is_err(), "{wrong}");
        }
    }
}
