//! What the records of a load amount to, as a table and as JSON.

use super::{Args, load::Record};
use serde::Serialize;
use std::{fmt, time::Duration};

#[derive(Serialize)]
pub struct Report {
    pub requests: usize,
    pub failed: usize,
    pub concurrency: usize,
    pub rate: f64,
    pub seconds: f64,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub completion_tokens: u64,
    pub requests_per_second: f64,
    pub prompt_tokens_per_second: f64,
    pub completion_tokens_per_second: f64,
    /// Requests a second that met the objectives; absent if none was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub goodput_per_second: Option<f64>,
    /// Milliseconds.
    pub ttft: Option<Spread>,
    /// Gaps between pieces of an answer.
    pub itl: Option<Spread>,
    /// Per request, mean time of the tokens after the first.
    pub time_per_output_token: Option<Spread>,
    pub e2e: Option<Spread>,
    /// The first few.
    pub errors: Vec<String>,
}

/// Milliseconds.
#[derive(Serialize)]
pub struct Spread {
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

impl Report {
    pub fn new(args: &Args, records: &[Record], elapsed: Duration) -> Self {
        let good: Vec<&Record> = records.iter().filter(|record| record.error.is_none()).collect();
        let seconds = elapsed.as_secs_f64();
        let sum = |count: fn(&Record) -> u64| good.iter().map(|record| count(record)).sum::<u64>();
        let (prompt, completion) = (sum(|r| r.prompt_tokens), sum(|r| r.completion_tokens));
        let objectives = args.slo_ttft.is_some() || args.slo_itl.is_some();
        let met = good.iter().filter(|record| meets(record, args)).count();
        Report {
            requests: records.len(),
            failed: records.len() - good.len(),
            concurrency: args.concurrency,
            rate: args.rate,
            seconds,
            prompt_tokens: prompt,
            cached_tokens: sum(|r| r.cached_tokens),
            completion_tokens: completion,
            requests_per_second: good.len() as f64 / seconds,
            prompt_tokens_per_second: prompt as f64 / seconds,
            completion_tokens_per_second: completion as f64 / seconds,
            goodput_per_second: objectives.then_some(met as f64 / seconds),
            ttft: Spread::of(good.iter().filter_map(|record| record.first_token)),
            itl: Spread::of(good.iter().flat_map(|record| record.gaps.iter().copied())),
            time_per_output_token: Spread::of(good.iter().filter_map(|record| record.per_token())),
            e2e: Spread::of(good.iter().map(|record| record.total)),
            errors: records.iter().filter_map(|record| record.error.clone()).take(5).collect(),
        }
    }
}

fn meets(record: &Record, args: &Args) -> bool {
    let within = |time: Option<Duration>, limit: Option<f64>| {
        limit.is_none_or(|limit| time.is_none_or(|time| milliseconds(time) <= limit))
    };
    within(record.first_token, args.slo_ttft) && within(record.per_token(), args.slo_itl)
}

impl Spread {
    fn of(times: impl Iterator<Item = Duration>) -> Option<Self> {
        let mut sorted: Vec<f64> = times.map(milliseconds).collect();
        sorted.sort_by(f64::total_cmp);
        let mean = sorted.iter().sum::<f64>() / sorted.len() as f64;
        let max = *sorted.last()?;
        let at = |share: f64| sorted[((sorted.len() as f64 * share).ceil() as usize).saturating_sub(1)];
        Some(Spread { mean, p50: at(0.50), p90: at(0.90), p99: at(0.99), max })
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} requests in {:.2} s, {} failed", self.requests, self.seconds, self.failed)?;
        writeln!(f, "  requests    {:>10.2} /s", self.requests_per_second)?;
        let cached = format!("({} tokens, {} from cache)", self.prompt_tokens, self.cached_tokens);
        writeln!(f, "  prompt      {:>10.1} tokens/s  {cached}", self.prompt_tokens_per_second)?;
        writeln!(
            f,
            "  completion  {:>10.1} tokens/s  ({} tokens)",
            self.completion_tokens_per_second, self.completion_tokens
        )?;
        if let Some(goodput) = self.goodput_per_second {
            writeln!(f, "  goodput     {goodput:>10.2} requests/s within the objectives")?;
        }
        writeln!(
            f,
            "\n  {:<22}{:>9}{:>9}{:>9}{:>9}{:>9}",
            "milliseconds", "mean", "p50", "p90", "p99", "max"
        )?;
        for (name, spread) in [
            ("time to first token", &self.ttft),
            ("inter-token latency", &self.itl),
            ("time per output token", &self.time_per_output_token),
            ("end to end", &self.e2e),
        ] {
            if let Some(Spread { mean, p50, p90, p99, max }) = spread {
                writeln!(f, "  {name:<22}{mean:>9.2}{p50:>9.2}{p90:>9.2}{p99:>9.2}{max:>9.2}")?;
            }
        }
        self.errors.iter().try_for_each(|error| writeln!(f, "  failed: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let spread = Spread::of((1..=100).map(Duration::from_millis)).unwrap();
        let found = [spread.p50, spread.p90, spread.p99, spread.max].map(f64::round);
        assert_eq!(found, [50.0, 90.0, 99.0, 100.0]);
        assert!(Spread::of(std::iter::empty()).is_none());
    }
}
