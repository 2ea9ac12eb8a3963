//! One request over HTTP, to its end: an answer, an error that says what it is, or a client that left.
//! Whatever else happens is none of these, and told as it was.

use crate::{
    cluster::GATEWAY,
    net::{Conn, Net},
    workload::Ask,
};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::collections::BTreeMap;

#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    Answered(Answer),
    /// With what had come before.
    Failed(Failure, Answer),
    Left(Answer),
    /// Neither an answer nor an error.
    Odd(String),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    pub status: u16,
    pub code: String,
    pub message: String,
}

/// By choice.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer(pub BTreeMap<u64, Choice>);

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Choice {
    pub text: String,
    /// Of each token: everything that was told about it.
    pub logprobs: Vec<String>,
    pub finish: Option<String>,
}

pub async fn send(net: &Net, ask: &Ask) -> Outcome {
    let outcome = match try_send(net, ask).await {
        Ok(outcome) => outcome,
        Err(error) => Outcome::Odd(format!("{error:#}")),
    };
    net.journal.note(&ask.name, &outcome);
    outcome
}

async fn try_send(net: &Net, ask: &Ask) -> anyhow::Result<Outcome> {
    net.journal.note(&ask.name, format_args!("asks {} {}", ask.path, ask.body));
    let conn = net.dial("client", GATEWAY).await?;
    let (mut sender, connection) = http1::handshake::<_, Full<Bytes>>(TokioIo::<Conn>::new(conn)).await?;
    let driving = tokio::spawn(connection);
    let request = Request::post(ask.path)
        .header("host", "gateway")
        .header("content-type", "application/json")
        .header("authorization", format!("Bearer {}", ask.tenant))
        .header("x-request-id", &ask.name)
        .body(Full::from(ask.body.to_string()))?;
    let response = sender.send_request(request).await?;
    let status = response.status().as_u16();
    let streams = ask.body["stream"] == true && status == 200;
    let outcome = if streams {
        stream(response.into_body(), ask.leaves_after).await
    } else {
        let body = response.into_body().collect().await?.to_bytes();
        whole(status, &serde_json::from_slice(&body)?)
    };
    // Leaving means that the connection is gone.
    driving.abort();
    outcome
}

fn whole(status: u16, body: &Value) -> anyhow::Result<Outcome> {
    if let Some(failure) = failure(status, body) {
        return Ok(Outcome::Failed(failure, Answer::default()));
    }
    let mut answer = Answer::default();
    answer.take(body);
    anyhow::ensure!(status == 200 && answer.is_whole(), "status {status} with {body}");
    Ok(Outcome::Answered(answer))
}

fn failure(status: u16, body: &Value) -> Option<Failure> {
    let error = body.get("error")?;
    let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
    Some(Failure { status, code: text("code"), message: text("message") })
}

async fn stream(mut body: Incoming, leaves_after: Option<u64>) -> anyhow::Result<Outcome> {
    let (mut answer, mut buffer, mut events) = (Answer::default(), String::new(), 0);
    loop {
        if leaves_after.is_some_and(|last| events >= last) {
            return Ok(Outcome::Left(answer));
        }
        let Some(frame) = body.frame().await else {
            anyhow::bail!("the stream ended after {events} events without [DONE] or an error: {answer:?}")
        };
        let bytes = frame?.into_data().unwrap_or_default();
        buffer.push_str(std::str::from_utf8(&bytes)?);
        while let Some((event, rest)) = buffer.split_once("\n\n") {
            let event = event.strip_prefix("data: ").map(str::to_owned);
            buffer = rest.to_owned();
            let Some(event) = event else { continue };
            if event == "[DONE]" {
                anyhow::ensure!(answer.is_whole(), "[DONE] before every choice has ended: {answer:?}");
                return Ok(Outcome::Answered(answer));
            }
            events += 1;
            let event: Value = serde_json::from_str(&event)?;
            if let Some(failure) = failure(200, &event) {
                return Ok(Outcome::Failed(failure, answer));
            }
            answer.take(&event);
        }
    }
}

impl Answer {
    fn is_whole(&self) -> bool {
        !self.0.is_empty() && self.0.values().all(|choice| choice.finish.is_some())
    }

    /// Choices of an answer, or of a part of it.
    fn take(&mut self, event: &Value) {
        for part in event["choices"].as_array().into_iter().flatten() {
            let choice = self.0.entry(part["index"].as_u64().unwrap_or_default()).or_default();
            let texts = [&part["text"], &part["delta"]["content"], &part["message"]["content"]];
            texts.iter().filter_map(|text| text.as_str()).for_each(|text| choice.text.push_str(text));
            choice.logprobs.extend(logprobs(&part["logprobs"]));
            if let Some(finish) = part["finish_reason"].as_str() {
                choice.finish = Some(finish.to_owned());
            }
        }
    }

    /// Whether this could be the beginning of `whole`.
    pub fn begins(&self, whole: &Answer) -> bool {
        self.0.iter().all(|(index, part)| {
            let whole = whole.0.get(index);
            whole.is_some_and(|whole| {
                whole.text.starts_with(&part.text)
                    && whole.logprobs.starts_with(&part.logprobs)
                    && (part.finish.is_none() || part == whole)
            })
        })
    }
}

fn logprobs(told: &Value) -> Vec<String> {
    let list = |key: &str| told[key].as_array().cloned().unwrap_or_default();
    if told.get("content").is_some() {
        return list("content").iter().map(Value::to_string).collect();
    }
    let (tokens, own, top) = (list("tokens"), list("token_logprobs"), list("top_logprobs"));
    let one =
        |(at, token): (usize, &Value)| format!("{token} {} {}", own[at], top.get(at).unwrap_or(&Value::Null));
    tokens.iter().enumerate().map(one).collect()
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Outcome::Answered(answer) => write!(out, "is answered: {answer:?}"),
            Outcome::Failed(Failure { status, code, message }, answer) => {
                write!(out, "fails with {status} {code}: {message}; before that {answer:?}")
            }
            Outcome::Left(answer) => write!(out, "leaves after {answer:?}"),
            Outcome::Odd(what) => write!(out, "neither an answer nor an error: {what}"),
        }
    }
}
