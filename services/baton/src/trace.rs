//! `baton trace`: where the time of one request went until its first two tokens, as the gateway shows it at `/trace`.

use crate::target::Target;
use anyhow::{Context, bail};
use clap::Parser;
use serde_json::Value;
use std::process::ExitCode;

#[derive(Parser)]
pub struct Args {
    /// Id of the request, from the header x-request-id of its answer
    request_id: String,
    #[command(flatten)]
    target: Target,
    /// Print the record as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let record = runtime.block_on(fetch(&args))?;
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&record)?),
        false => print!("{}", waterfall(&record)),
    }
    Ok(ExitCode::SUCCESS)
}

async fn fetch(args: &Args) -> anyhow::Result<Value> {
    let path = format!("/trace/{}", args.request_id);
    let url = &args.target.url;
    let (status, body) = args.target.client()?.get(&path).await.context("is the cluster up? (baton up)")?;
    let answer: Value = serde_json::from_slice(&body)
        .with_context(|| format!("{url}{path} did not answer with JSON; is it a Baton gateway?"))?;
    if !status.is_success() {
        bail!("{}", answer["error"]["message"].as_str().unwrap_or("the gateway gave no reason"));
    }
    Ok(answer)
}

/// Columns of the bars.
const WIDTH: f64 = 48.0;

fn waterfall(record: &Value) -> String {
    let text = |key: &str| record[key].as_str().unwrap_or("").to_owned();
    let number = |key: &str| record[key].as_u64().unwrap_or(0);
    let mut out = format!(
        "request {}  trace {}\n{}: {} prompt tokens ({} cached), {} of completion, status {}, {} ms in all\n\
         prefill {}  decode {}  placements {}, moves {}\n",
        text("request_id"),
        text("trace_id"),
        text("model"),
        number("prompt_tokens"),
        number("cached_tokens"),
        number("completion_tokens"),
        number("code"),
        ms(&record["total_ms"]),
        text("prefill"),
        text("decode"),
        number("attempts"),
        number("migrations"),
    );
    let ttft = record["ttft_ms"].as_f64().unwrap_or(0.0);
    let end = ttft + record["second_token_ms"].as_f64().unwrap_or(0.0);
    for (of, title, whole) in [
        ("ttft", "time to first token", &record["ttft_ms"]),
        ("second_token", "from there to the second", &record["second_token_ms"]),
    ] {
        if whole.is_null() {
            continue;
        }
        out += &format!("\n{title}: {} ms\n", ms(whole));
        let parts = record["parts"].as_array().map(Vec::as_slice).unwrap_or_default();
        parts.iter().filter(|part| part["of"] == of).for_each(|part| out += &row(part, end));
        out += &remainder(&record["unexplained_ms"][of], whole);
    }
    out
}

fn row(part: &Value, end: f64) -> String {
    let (name, service) = (part["name"].as_str().unwrap_or("?"), part["service"].as_str().unwrap_or("?"));
    let (start, length) = (part["start_ms"].as_f64().unwrap_or(0.0), part["ms"].as_f64().unwrap_or(0.0));
    let columns = |ms: f64| if end > 0.0 { (ms.max(0.0) / end * WIDTH).round() as usize } else { 0 };
    let (from, to) = (columns(start), columns(start + length));
    let bar = "#".repeat(to.saturating_sub(from));
    // What is too short for a column is still there.
    let bar = if bar.is_empty() { "|" } else { &bar };
    format!("  {name:<12} {service:<8} {:>9} ms  {}{bar}\n", ms(&part["ms"]), " ".repeat(from))
}

fn remainder(unexplained: &Value, whole: &Value) -> String {
    let (left, whole) = (unexplained.as_f64().unwrap_or(0.0), whole.as_f64().unwrap_or(0.0));
    let share = if whole > 0.0 { 100.0 * left / whole } else { 0.0 };
    format!("  {:<21} {:>9} ms  ({share:.2} %)\n", "unexplained", ms(unexplained))
}

fn ms(value: &Value) -> String {
    value.as_f64().map_or_else(|| "-".to_owned(), |ms| format!("{ms:.3}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_bars_in_their_places_and_the_remainder_is_said() {
        let part = |name: &str, of: &str, start: f64, ms: f64| serde_json::json!({"name": name, "service": "s", "of": of, "start_ms": start, "ms": ms});
        let record = serde_json::json!({
            "request_id": "r", "prefill": "p", "decode": "d", "ttft_ms": 6.0, "second_token_ms": 2.0, "total_ms": 8.5,
            "parts": [part("queue", "ttft", 0.0, 2.0), part("prefill", "ttft", 2.0, 3.9),
                part("decode", "second_token", 6.0, 2.0)],
            "unexplained_ms": {"ttft": 0.1, "second_token": 0.0},
        });
        let text = waterfall(&record);
        let line = |start: &str| text.lines().find(|line| line.trim().starts_with(start)).unwrap().to_owned();
        let bar = |start: &str| (line(start).find('#').unwrap(), line(start).matches('#').count());
        let (queue, prefill, decode) = (bar("queue"), bar("prefill  "), bar("decode  "));
        assert_eq!((queue.1, prefill.0 - queue.0, decode.0 - queue.0, decode.1), (12, 12, 36, 12), "{text}");
        assert!(line("unexplained").contains("0.100 ms  (1.67 %)"), "{text}");
    }
}
