//! `baton status`: what the router knows of the cluster, as the gateway shows it at `/status`.

use crate::target::Target;
use anyhow::{Context, bail};
use clap::Parser;
use serde_json::Value;
use std::process::ExitCode;

#[derive(Parser)]
pub struct Args {
    #[command(flatten)]
    target: Target,
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let status = runtime.block_on(fetch(&args.target))?;
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&status)?),
        false => print!("{}", table(&status)),
    }
    Ok(ExitCode::SUCCESS)
}

pub async fn fetch(target: &Target) -> anyhow::Result<Value> {
    let url = &target.url;
    let (status, body) = target.client()?.get("/status").await.context("is the cluster up? (baton up)")?;
    if !status.is_success() {
        bail!("{url}/status answered {status}: {}", String::from_utf8_lossy(&body).trim());
    }
    serde_json::from_slice(&body)
        .with_context(|| format!("{url}/status did not answer with JSON; is it a Baton gateway?"))
}

const HEADINGS: [&str; 9] =
    ["MEMBER", "ROLE", "STATE", "RUNNING", "WAITING", "RESERVED", "BLOCKS USED", "CACHED", "ADDRESS"];

fn table(status: &Value) -> String {
    let members = list(status, "members").iter().chain(list(status, "lost"));
    let rows: Vec<Vec<String>> =
        std::iter::once(HEADINGS.map(str::to_owned).to_vec()).chain(members.map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..HEADINGS.len()).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text += cells.join("  ").trim_end();
        text.push('\n');
    }
    text + &pools(status) + &queue(status) + &problems(status)
}

fn row(member: &Value) -> Vec<String> {
    let load = &member["load"];
    let number = |key: &str| load[key].as_u64().unwrap_or(0);
    let (total, free) = (number("blocks_total"), number("blocks_free"));
    vec![
        text(&member["id"]),
        text(&member["role"]),
        text(&member["state"]),
        number("running").to_string(),
        number("waiting").to_string(),
        number("reserved").to_string(),
        format!("{}/{total}", total.saturating_sub(free)),
        number("blocks_cached").to_string(),
        text(&member["address"]),
    ]
}

/// How many workers each pool has, and should have.
fn pools(status: &Value) -> String {
    let pool = |pool: &Value| {
        let desired = pool["desired"].as_u64().map_or("unknown".to_owned(), |desired| desired.to_string());
        let role = text(&pool["role"]);
        format!("{role:<8} desired {desired}, ready {}, draining {}\n", pool["ready"], pool["draining"])
    };
    format!("\n{}", list(status, "pools").iter().map(pool).collect::<String>())
}

fn problems(status: &Value) -> String {
    let problem = |problem: &Value| {
        format!(
            "\n{}: {}\n  {}\n",
            text(&problem["severity"]),
            text(&problem["text"]),
            text(&problem["remedy"])
        )
    };
    list(status, "problems").iter().map(problem).collect()
}

fn list<'a>(status: &'a Value, key: &str) -> &'a [Value] {
    status[key].as_array().map(Vec::as_slice).unwrap_or_default()
}

fn queue(status: &Value) -> String {
    let classes = list(status, "queue");
    let depth: u64 = classes.iter().filter_map(|class| class["depth"].as_u64()).sum();
    let by_class: Vec<String> =
        classes.iter().map(|class| format!("priority {}: {}", class["priority"], class["depth"])).collect();
    let detail = if by_class.is_empty() { String::new() } else { format!(" ({})", by_class.join(", ")) };
    format!("{} running, {depth} of {} queued{detail}\n", status["running"], status["queue_limit"])
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or("?").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_aligned_and_counts_blocks_in_use() {
        let status = serde_json::json!({
            "members": [{"id": "d1", "role": "decode", "address": "http://h:1", "state": "draining",
                "load": {"blocks_total": 10, "blocks_free": 7, "blocks_cached": 2, "running": 1}}],
            "lost": [{"id": "d2", "role": "decode", "state": "missing"}],
            "pools": [{"role": "decode", "desired": 2, "ready": 0, "draining": 1}, {"role": "both", "ready": 1, "draining": 0}],
            "queue": [{"priority": 0, "depth": 4}], "running": 1, "queue_limit": 9,
            "problems": [{"severity": "critical", "text": "No decode worker.", "remedy": "Start one."}],
        });
        let text = table(&status);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0].find("STATE"), lines[1].find("draining"));
        assert!(lines[1].contains("3/10"));
        assert!(lines[2].contains("missing"));
        assert_eq!(lines[4], "decode   desired 2, ready 0, draining 1");
        assert_eq!(lines[5], "both     desired unknown, ready 1, draining 0");
        assert_eq!(lines[6], "1 running, 4 of 9 queued (priority 0: 4)");
        assert_eq!(lines[8..], ["critical: No decode worker.", "  Start one."]);
    }
}
