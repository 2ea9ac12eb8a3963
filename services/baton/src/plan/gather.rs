//! Where the numbers come from: the services' own `/metrics`, scraped over a while, or a Prometheus that has done so.

use super::series::{Series, Window};
use crate::{http::Client, status, target::Target};
use anyhow::{Context, bail};
use futures::future::join_all;
use serde::Deserialize;
use serde_json::Value;
use std::{collections::BTreeMap, time::Duration};
use tokio::time::{Instant, sleep, timeout};

/// Scrapes beyond the first: each two neighbours show one batch and its time.
const SCRAPES: u32 = 10;
const PATIENCE: Duration = Duration::from_secs(10);
/// What is asked of Prometheus: no buckets but those of the three times.
const NAMES: &str = "baton_gateway_requests_total|baton_gateway_in_flight|baton_(cached_)?prompt_tokens_total|\
    baton_completion_tokens_total|baton_(time_to_first_token|inter_token_latency)_seconds_bucket|\
    baton_router_queue_(seconds_bucket|depth)|baton_(step_seconds|batch_tokens)_(sum|count)|baton_kv_blocks|baton_worker_running";

/// And the most sequences of a decode worker's batch, if that is known.
pub async fn scraped(
    gateway: &Target,
    routers: &[String],
    over: Duration,
) -> anyhow::Result<(Window, Option<u32>)> {
    let status = status::fetch(gateway).await?;
    let members = status["members"].as_array().map(Vec::as_slice).unwrap_or_default();
    let admin = members.iter().filter_map(|member| member["admin"].as_str().map(str::to_owned));
    let others = routers.iter().cloned().chain(admin).map(|url| Ok((Client::new(&url)?, url)));
    let gateway = gateway.client().map(|client| (client, gateway.url.clone()));
    let targets: Vec<(Client, String)> =
        std::iter::once(gateway).chain(others).collect::<anyhow::Result<_>>()?;
    let mut window = Window::default();
    let began = Instant::now();
    for turn in 0..=SCRAPES {
        sleep(((over / SCRAPES) * turn).saturating_sub(began.elapsed())).await;
        let time = began.elapsed().as_secs_f64();
        let scrapes = targets.iter().map(|(client, target)| metrics(client, target));
        for ((_, target), text) in targets.iter().zip(join_all(scrapes).await) {
            window.add(time, target, &text?);
        }
    }
    Ok((window, most_sequences(members)))
}

fn most_sequences(members: &[Value]) -> Option<u32> {
    let decode = members.iter().filter(|member| member["role"] == "decode");
    decode.filter_map(|member| member["max_sequences"].as_u64()).min().and_then(|most| most.try_into().ok())
}

async fn metrics(client: &Client, target: &str) -> anyhow::Result<String> {
    let (status, body) = timeout(PATIENCE, client.get("/metrics"))
        .await
        .with_context(|| format!("{target}/metrics did not answer within {PATIENCE:?}"))??;
    if !status.is_success() {
        bail!("{target}/metrics answered {status}; its admin port must be reachable from here");
    }
    Ok(String::from_utf8_lossy(&body).into_owned())
}

#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "data")]
    matrix: Option<Matrix>,
    #[serde(default)]
    error: String,
}

#[derive(Deserialize)]
struct Matrix {
    result: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    metric: BTreeMap<String, String>,
    values: Vec<(f64, String)>,
}

/// `selector`: further labels, as PromQL has them, for one cluster among several.
pub async fn kept(prometheus: &str, selector: &str, over: Duration) -> anyhow::Result<Window> {
    let comma = if selector.is_empty() { "" } else { "," };
    let query = format!("{{__name__=~\"{NAMES}\"{comma}{selector}}}[{}s]", over.as_secs().max(1));
    let client = Client::new(prometheus)?;
    let path = format!("/api/v1/query?query={}", encoded(&query));
    let (status, body) = timeout(PATIENCE * 3, client.get(&path))
        .await
        .with_context(|| format!("{prometheus} did not answer within {:?}", PATIENCE * 3))??;
    let answer: Answer = serde_json::from_slice(&body)
        .with_context(|| format!("{prometheus} answered {status}; is it Prometheus?"))?;
    let Some(matrix) = answer.matrix else { bail!("{prometheus} answered {status}: {}", answer.error) };
    Ok(Window::new(matrix.result.into_iter().map(series).collect()))
}

fn series(row: Row) -> Series {
    let mut labels = row.metric;
    let name = labels.remove("__name__").unwrap_or_default();
    let points = row.values.iter().filter_map(|(time, value)| Some((*time, value.parse().ok()?)));
    Series { name, points: points.collect(), labels }
}

fn encoded(query: &str) -> String {
    let byte = |byte: u8| match byte.is_ascii_alphanumeric() || byte == b'_' {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    };
    query.bytes().map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prometheus_answers_become_series() {
        let json = r#"{"status":"success","data":{"resultType":"matrix","result":[
            {"metric":{"__name__":"baton_kv_blocks","role":"decode","instance":"a:1"},"values":[[1.5,"3"],[2.5,"4"]]}]}}"#;
        let answer: Answer = serde_json::from_str(json).unwrap();
        let found = series(answer.matrix.unwrap().result.remove(0));
        assert_eq!((found.name.as_str(), found.points), ("baton_kv_blocks", vec![(1.5, 3.0), (2.5, 4.0)]));
        assert_eq!(found.labels.len(), 2);
        assert_eq!(encoded("a{b=\"c\"}"), "a%7Bb%3D%22c%22%7D");
    }
}
