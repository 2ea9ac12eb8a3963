//! One request of the load: its prompt, its stream, what was measured.

use super::Args;
use crate::http::Client;
use anyhow::{Context, anyhow, bail};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::{Method, body::Incoming};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::time::Instant;

/// What every request has in common.
pub struct Plan {
    model: String,
    prompt_tokens: usize,
    shared_prefix: usize,
    output_tokens: usize,
    vocabulary: u64,
    seed: u64,
}

/// What was measured of one request.
#[derive(Debug, Default)]
pub struct Record {
    pub error: Option<String>,
    pub first_token: Option<Duration>,
    pub total: Duration,
    /// Between pieces of the answer.
    pub gaps: Vec<Duration>,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub completion_tokens: u64,
}

impl Record {
    /// Mean time of the tokens after the first.
    pub fn per_token(&self) -> Option<Duration> {
        let later = u32::try_from(self.completion_tokens.checked_sub(1)?).ok().filter(|n| *n > 0)?;
        Some((self.total - self.first_token?) / later)
    }
}

impl Plan {
    pub fn new(args: &Args, model: String) -> Self {
        Plan {
            model,
            prompt_tokens: args.prompt_tokens,
            shared_prefix: args.shared_prefix,
            output_tokens: args.output_tokens,
            vocabulary: u64::from(args.vocabulary),
            seed: args.seed,
        }
    }

    /// Request `number`; its time counts from `due`.
    pub async fn send(&self, client: &Client, number: usize, due: Instant) -> Record {
        let mut record = Record::default();
        if let Err(error) = self.stream(client, number, due, &mut record).await {
            record.error = Some(format!("{error:#}"));
        }
        record.total = due.elapsed();
        record
    }

    fn body(&self, number: usize) -> String {
        let prompt: Vec<u64> = (0..self.prompt_tokens).map(|index| self.token(number, index)).collect();
        json!({
            "model": self.model, "prompt": prompt, "max_tokens": self.output_tokens, "ignore_eos": true,
            "temperature": 0, "stream": true, "stream_options": {"include_usage": true},
        })
        .to_string()
    }

    fn token(&self, number: usize, index: usize) -> u64 {
        let stream = if index < self.shared_prefix { 0 } else { number as u64 + 1 };
        16 + scramble(self.seed ^ scramble(stream) ^ index as u64) % (self.vocabulary - 16)
    }

    async fn stream(
        &self,
        client: &Client,
        number: usize,
        due: Instant,
        record: &mut Record,
    ) -> anyhow::Result<()> {
        let body = Bytes::from(self.body(number));
        let response = client.open(Method::POST, "/v1/completions", body).await?;
        let status = response.status();
        if !status.is_success() {
            let body = response.into_body().collect().await?.to_bytes();
            bail!("{status}: {}", String::from_utf8_lossy(&body).trim());
        }
        let mut events = Events { body: response.into_body(), buffer: Vec::new() };
        let mut last: Option<Instant> = None;
        while let Some(event) = events.next().await? {
            if let Some(error) = event.get("error") {
                bail!("mid-stream: {error}");
            }
            if let Some(usage) = event.get("usage").filter(|usage| usage.is_object()) {
                record.usage(usage);
            }
            if says_something(&event) {
                let now = Instant::now();
                record.first_token.get_or_insert(now - due);
                record.gaps.extend(last.map(|last| now - last));
                last = Some(now);
            }
        }
        record.first_token.map(|_| ()).ok_or_else(|| anyhow!("the stream ended without a token"))
    }
}

impl Record {
    fn usage(&mut self, usage: &Value) {
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        self.prompt_tokens = number(&usage["prompt_tokens"]);
        self.completion_tokens = number(&usage["completion_tokens"]);
        self.cached_tokens = number(&usage["prompt_tokens_details"]["cached_tokens"]);
    }
}

/// Neither the closing chunk of a choice nor the one with the usage is a piece of the answer.
fn says_something(event: &Value) -> bool {
    let choice = &event["choices"][0];
    choice.is_object() && (choice["finish_reason"].is_null() || choice["text"] != "")
}

/// Server-sent events of a body. Comments are passed over.
struct Events {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Events {
    async fn next(&mut self) -> anyhow::Result<Option<Value>> {
        loop {
            while let Some(end) = self.buffer.windows(2).position(|two| two == b"\n\n") {
                let event: Vec<u8> = self.buffer.drain(..end + 2).collect();
                match event.strip_prefix(b"data: ") {
                    Some(payload) if payload.starts_with(b"[DONE]") => return Ok(None),
                    Some(payload) => {
                        return Ok(Some(serde_json::from_slice(payload).context("an event is not JSON")?));
                    }
                    None => {}
                }
            }
            match self.body.frame().await {
                Some(frame) => self.buffer.extend(frame?.into_data().unwrap_or_default()),
                None => bail!("the stream broke off"),
            }
        }
    }
}

/// splitmix64 (Steele, Lea, Flood, 2014): a random-looking function of its argument.
fn scramble(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
