//! Requests to `/v1/completions` with token ids, and answers as token ids with their logprobs: what
//! comparisons of tokens need, with no text in between.

use super::{Cluster, http::Client};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::{HeaderMap, Method, StatusCode};
use serde_json::{Map, Value, json};

impl Client {
    pub async fn post(&self, path: &str, json: String) -> anyhow::Result<(StatusCode, Bytes)> {
        let response = self.open(Method::POST, path, json.into()).await?;
        let status = response.status();
        Ok((status, response.into_body().collect().await?.to_bytes()))
    }
}

#[derive(Clone, Debug)]
pub struct Ask(pub Map<String, Value>);

/// One choice.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    pub ids: Vec<u32>,
    /// Exact: shortest text that reads back as the same f32.
    pub logprobs: Vec<String>,
    pub finish: String,
    pub cached: u64,
    pub prompt_tokens: u64,
    /// Members that served it.
    pub prefill: String,
    pub decode: String,
}

impl Ask {
    /// Greedy, with logprobs, exactly `tokens` of output.
    pub fn new(prompt: &[u32], tokens: usize) -> Self {
        let body = json!({
            "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": true,
            "logprobs": 2, "return_tokens_as_token_ids": true,
        });
        Ask(body.as_object().unwrap().clone())
    }

    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.0.insert(key.into(), value.into());
        self
    }

    pub fn body(&self, cluster: &Cluster) -> Bytes {
        let named = self.clone().with("model", cluster.model.as_str());
        Bytes::from(Value::Object(named.0).to_string())
    }

    /// The first choice, or status and body of the error.
    pub async fn send(&self, cluster: &Cluster) -> Result<Answer, (StatusCode, String)> {
        let sent = cluster.http.open(Method::POST, "/v1/completions", self.body(cluster)).await;
        let response = sent.map_err(|error| (StatusCode::IM_A_TEAPOT, format!("{error:#}")))?;
        let status = response.status();
        let headers = response.headers().clone();
        let body = match response.into_body().collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) => return Err((StatusCode::IM_A_TEAPOT, error.to_string())),
        };
        if !status.is_success() {
            return Err((status, String::from_utf8_lossy(&body).into_owned()));
        }
        Ok(Answer::read(&headers, &serde_json::from_slice(&body).expect("JSON")))
    }
}

impl Answer {
    fn read(headers: &HeaderMap, body: &Value) -> Self {
        let member = |role: &str| headers[&format!("x-baton-{role}")].to_str().unwrap().to_owned();
        let choice = &body["choices"][0];
        let array = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let id = |token: Value| token.as_str().unwrap().strip_prefix("token_id:").unwrap().parse().unwrap();
        let usage = &body["usage"];
        Answer {
            ids: array(&choice["logprobs"]["tokens"]).into_iter().map(id).collect(),
            logprobs: array(&choice["logprobs"]["token_logprobs"]).iter().map(Value::to_string).collect(),
            finish: choice["finish_reason"].as_str().unwrap_or_default().to_owned(),
            cached: usage["prompt_tokens_details"]["cached_tokens"].as_u64().expect("cached_tokens"),
            prompt_tokens: usage["prompt_tokens"].as_u64().expect("prompt_tokens"),
            prefill: member("prefill"),
            decode: member("decode"),
        }
    }

    /// What must not depend on how it was computed.
    pub fn said(&self) -> (&[u32], &[String], &str) {
        (&self.ids, &self.logprobs, &self.finish)
    }
}
