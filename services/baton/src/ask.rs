//! `baton ask`: one question to the chat of a running cluster, and its answer; an error if there is none.

use crate::{http::Client, target::Target};
use anyhow::{Context, bail};
use clap::Parser;
use http_body_util::BodyExt;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};
use std::{process::ExitCode, time::Duration};
use tokio::time::timeout;

#[derive(Parser)]
pub struct Args {
    /// What to ask
    question: String,
    #[command(flatten)]
    target: Target,
    /// Served model [default: the first that the gateway lists]
    #[arg(long)]
    model: Option<String>,
    /// Most tokens of the answer
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: u32,
    /// Give up if there is no answer after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout: u64,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let patience = Duration::from_secs(args.timeout);
    let answer = runtime.block_on(async { timeout(patience, ask(&args)).await });
    println!("{}", answer.with_context(|| format!("no answer within {} s", args.timeout))??);
    Ok(ExitCode::SUCCESS)
}

async fn ask(args: &Args) -> anyhow::Result<String> {
    let client = args.target.client()?;
    let model = model(&client, args.model.as_deref()).await?;
    let messages = [json!({"role": "user", "content": args.question})];
    let body = json!({"model": model, "messages": messages, "max_tokens": args.max_tokens, "temperature": 0});
    let response = client.open(Method::POST, "/v1/chat/completions", body.to_string().into()).await?;
    let status = response.status();
    answer(status, &response.into_body().collect().await?.to_bytes())
}

/// The one that is `asked` for, or the first that the gateway lists.
pub async fn model(client: &Client, asked: Option<&str>) -> anyhow::Result<String> {
    if let Some(asked) = asked {
        return Ok(asked.to_owned());
    }
    let (status, body) = client.get("/v1/models").await.context("is the cluster up? (baton up)")?;
    if !status.is_success() {
        bail!("/v1/models answered {status}: {}", String::from_utf8_lossy(&body).trim());
    }
    let list: Value = serde_json::from_slice(&body).context("/v1/models did not answer with JSON")?;
    Ok(list["data"][0]["id"].as_str().context("/v1/models lists no model")?.to_owned())
}

fn answer(status: StatusCode, body: &[u8]) -> anyhow::Result<String> {
    if !status.is_success() {
        bail!("the chat answered {status}: {}", String::from_utf8_lossy(body).trim());
    }
    let said: Value =
        serde_json::from_slice(body).context("the chat's answer is no JSON; is it a Baton gateway?")?;
    match said["choices"][0]["message"]["content"].as_str().map(str::trim) {
        Some(text) if !text.is_empty() => Ok(text.to_owned()),
        _ => bail!("the answer has no text: {said}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_text_is_an_answer() {
        let with = |content: Value| json!({"choices": [{"message": {"content": content}}]}).to_string();
        let said = |status, body: &str| answer(status, body.as_bytes());
        assert_eq!(said(StatusCode::OK, &with(json!(" It appends.\n"))).unwrap(), "It appends.");
        for (status, body, part) in [
            (StatusCode::OK, with(json!(" ")), "no text"),
            (StatusCode::OK, with(json!(null)), "no text"),
            (StatusCode::OK, "<html>".to_owned(), "no JSON"),
            (
                StatusCode::UNAUTHORIZED,
                r#"{"error": {"message": "a key"}}"#.to_owned(),
                "401 Unauthorized: {\"error\"",
            ),
        ] {
            let error = said(status, &body).unwrap_err().to_string();
            assert!(error.contains(part), "{part}: {error}");
        }
    }
}
