//! `baton drain`: has one worker leave the cluster in good order, and follows until it has left.

use crate::{
    http::Client,
    status,
    target::{AdminToken, Target},
};
use anyhow::{Context, anyhow, bail};
use clap::Parser;
use http_body_util::BodyExt;
use hyper::{Method, StatusCode};
use serde_json::Value;
use std::{process::ExitCode, time::Duration};
use tokio::time::{Instant, sleep};

#[derive(Parser)]
pub struct Args {
    /// Id of the member as `baton status` shows it, or a beginning that only one has
    member: String,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    token: AdminToken,
    /// Return as soon as the worker has begun to leave
    #[arg(long)]
    no_wait: bool,
    /// Give up if it has not left after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(drain(args))?;
    Ok(ExitCode::SUCCESS)
}

async fn drain(args: Args) -> anyhow::Result<()> {
    let status = status::fetch(&args.target).await?;
    let member = find(&status, &args.member)?;
    let (id, admin) = (text(&member["id"]), text(&member["admin"]));
    let token = args.token.read().map_err(|problem| anyhow!(problem))?;
    let (client, path) = (Client::new(&admin)?.with_bearer(token), format!("/drain?member={id}"));
    let response = client.open(Method::POST, &path, "{}".into()).await;
    let response = response.with_context(|| {
        format!("the admin port of {id} must be reachable from here; SIGTERM to its process does the same")
    })?;
    if [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN].contains(&response.status()) {
        bail!("{id} takes orders only from who has its admin token; give the file with --token-file");
    }
    if response.status() == StatusCode::CONFLICT {
        let said = response.into_body().collect().await?.to_bytes();
        bail!("{id} is no longer at {admin}: {}", String::from_utf8_lossy(&said).trim());
    }
    if !response.status().is_success() {
        bail!("{admin}/drain answered {}; is it a Baton worker of this version?", response.status());
    }
    println!("{id} takes nothing new");
    if args.no_wait {
        return Ok(());
    }
    left(&args, &id).await
}

/// Looks that must not find it: a router that has just begun knows nobody yet.
const ABSENT: u32 = 3;
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Tells how much still runs there, until it is gone from the membership.
async fn left(args: &Args, id: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(args.timeout);
    let (mut told, mut absent) = (None, 0);
    while absent < ABSENT {
        match status::fetch(&args.target).await {
            // A gateway that is replaced meanwhile is back in a moment.
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => {}
            Ok(status) if is_lost(&status, id) => {
                bail!("{id} went without having left: its process ended, or its lease; look at its log")
            }
            Ok(status) => match members(&status).find(|member| text(&member["id"]) == id) {
                None => absent += 1,
                Some(_) if Instant::now() > deadline => bail!("{id} has not left after {} s", args.timeout),
                Some(member) => {
                    absent = 0;
                    tell(id, &member["load"]["running"], &mut told);
                }
            },
        }
        sleep(LOOK_AGAIN).await;
    }
    println!("{id} has left");
    Ok(())
}

/// How much runs there, when that has changed.
fn tell(id: &str, running: &Value, told: &mut Option<u64>) {
    let running = running.as_u64();
    if running != *told {
        println!("{id} runs {} sequences", running.unwrap_or(0));
        *told = running;
    }
}

fn is_lost(status: &Value, id: &str) -> bool {
    let lost = status["lost"].as_array().map(Vec::as_slice).unwrap_or_default();
    lost.iter().any(|member| text(&member["id"]) == id)
}

fn find<'a>(status: &'a Value, beginning: &str) -> anyhow::Result<&'a Value> {
    let matching: Vec<&Value> =
        members(status).filter(|member| text(&member["id"]).starts_with(beginning)).collect();
    match matching[..] {
        [one] => Ok(one),
        [] => {
            let ids: Vec<String> = members(status).map(|member| text(&member["id"])).collect();
            bail!("no member {beginning}; there are: {}", ids.join(", "))
        }
        _ => bail!("{beginning} is the beginning of {} members; give more of the id", matching.len()),
    }
}

fn members(status: &Value) -> impl Iterator<Item = &Value> {
    status["members"].as_array().map(Vec::as_slice).unwrap_or_default().iter()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_is_named_by_a_beginning_that_only_it_has() {
        let status =
            serde_json::json!({"members": [{"id": "decode-1a"}, {"id": "decode-1b"}, {"id": "prefill-1"}]});
        assert_eq!(find(&status, "prefill").unwrap()["id"], "prefill-1");
        assert_eq!(find(&status, "decode-1b").unwrap()["id"], "decode-1b");
        assert!(find(&status, "decode-1").unwrap_err().to_string().contains("2 members"));
        assert!(find(&status, "both").unwrap_err().to_string().contains("decode-1a, decode-1b, prefill-1"));
    }
}
