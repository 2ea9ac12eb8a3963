//! A steady load: streams that ask without pause, each answer held against that of an undisturbed run, and a record of
//! when each stream stood still.

use super::{golden, http::Client};
use futures::{StreamExt, future::join_all, stream::FuturesUnordered};
use http_body_util::BodyExt;
use hyper::Method;
use serde_json::{Map, Value, json};
use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::time::{sleep, timeout};

/// Longest wait for the end of one answer.
const PATIENCE: Duration = Duration::from_secs(120);

/// What one choice has said, whatever way it came.
#[derive(Clone, Debug, Default, PartialEq)]
struct Said {
    text: String,
    tokens: Vec<Value>,
    logprobs: Vec<Value>,
    top: Vec<Value>,
    finish: Value,
}

pub struct Question {
    body: Map<String, Value>,
    expected: Vec<Said>,
}

/// Every kind of request whose answer must survive a move: greedy and seeded, several choices, stop strings, logprobs of the
/// answer and of the prompt.
pub fn bodies(streams: usize) -> Vec<Map<String, Value>> {
    let one = |n: usize| {
        let mut body = json!({
            "model": "baton-demo", "prompt": golden::prose(40 + 4 * n, n), "max_tokens": 120,
            "temperature": 0, "ignore_eos": true, "logprobs": 2, "return_tokens_as_token_ids": true,
        });
        let kind = match n % 8 {
            1 | 5 => json!({"temperature": 0.8, "top_p": 0.95, "seed": n}),
            2 => json!({"temperature": 1.0, "seed": n, "n": 2, "max_tokens": 60}),
            3 => json!({"stop": ["the ", "`;"]}),
            4 => json!({"echo": true}),
            6 => json!({"frequency_penalty": 0.5, "presence_penalty": 0.2}),
            7 => json!({"temperature": 0.7, "seed": n, "stop": [" a"], "min_tokens": 20}),
            _ => json!({}),
        };
        body.as_object_mut().unwrap().extend(kind.as_object().unwrap().clone());
        body.as_object().unwrap().clone()
    };
    (0..streams).map(one).collect()
}

/// Asks each once, undisturbed and not as a stream.
pub async fn undisturbed(client: &Client, bodies: Vec<Map<String, Value>>) -> Vec<Question> {
    let ask = async |body: Map<String, Value>| {
        let sent =
            client.open(Method::POST, "/v1/completions", Value::Object(body.clone()).to_string().into());
        let answer = sent.await.unwrap().into_body().collect().await.unwrap().to_bytes();
        let answer: Value = serde_json::from_slice(&answer).unwrap();
        let mut expected = Vec::new();
        take(&mut expected, &answer).unwrap_or_else(|error| panic!("undisturbed: {error}"));
        Question { body, expected }
    };
    join_all(bodies.into_iter().map(ask)).await
}

/// What went wrong with an answer.
#[derive(Debug)]
enum Fault {
    /// The client was told.
    Told(String),
    Differs(String),
}

#[derive(Default)]
pub struct Load {
    stop: AtomicBool,
    pub served: AtomicUsize,
    in_flight: AtomicUsize,
    told: Mutex<Vec<String>>,
    differs: Mutex<Vec<String>>,
    /// Of each stream, when something came.
    events: Mutex<Vec<Vec<Instant>>>,
}

impl Load {
    /// One stream for each question, until told to stop; then to the end of the answers under way.
    pub async fn run(&self, client: &Client, questions: &[Question]) {
        *self.events.lock().unwrap() = vec![Vec::new(); questions.len()];
        let streams: FuturesUnordered<_> =
            questions.iter().enumerate().map(|(n, question)| self.stream(client, n, question)).collect();
        streams.collect::<()>().await;
    }

    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Errors that clients were told, and answers other than the undisturbed ones.
    pub fn faults(&self) -> (Vec<String>, Vec<String>) {
        (self.told.lock().unwrap().clone(), self.differs.lock().unwrap().clone())
    }

    /// The longest time after `since` that any stream stood still, or has stood still until now.
    pub fn longest_pause(&self, since: Instant) -> Duration {
        let events = self.events.lock().unwrap();
        let pauses = |of: &Vec<Instant>| {
            let gap = |pair: &[Instant]| pair[1].saturating_duration_since(pair[0].max(since));
            let still = of.last().map(|last| last.max(&since).elapsed());
            of.windows(2).map(gap).chain(still).max().unwrap_or_default()
        };
        events.iter().map(pauses).max().unwrap_or_default()
    }

    /// Waits until something has come on every stream after `since`.
    pub async fn flows_after(&self, since: Instant, patience: Duration) -> bool {
        let flows = |of: &Vec<Instant>| of.last().is_some_and(|last| *last > since);
        let all = async {
            while !self.events.lock().unwrap().iter().all(flows) {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(patience, all).await.is_ok()
    }

    async fn stream(&self, client: &Client, n: usize, question: &Question) {
        while !self.stop.load(Ordering::Relaxed) {
            self.in_flight.fetch_add(1, Ordering::Relaxed);
            let answered = match timeout(PATIENCE, self.ask(client, n, question)).await {
                Ok(answered) => answered,
                Err(_) => Err(Fault::Differs(format!("stream {n}: no end of the answer after {PATIENCE:?}"))),
            };
            self.in_flight.fetch_sub(1, Ordering::Relaxed);
            match answered {
                Ok(()) => drop(self.served.fetch_add(1, Ordering::Relaxed)),
                Err(Fault::Differs(what)) => self.differs.lock().unwrap().push(what),
                Err(Fault::Told(error)) => {
                    self.told.lock().unwrap().push(error);
                    sleep(Duration::from_millis(200)).await;
                }
            }
        }
    }

    fn event(&self, n: usize) {
        self.events.lock().unwrap()[n].push(Instant::now());
    }

    async fn ask(&self, client: &Client, n: usize, question: &Question) -> Result<(), Fault> {
        let told = |error: String| Fault::Told(error);
        let mut body = question.body.clone();
        body.insert("stream".into(), true.into());
        let sent = client.open(Method::POST, "/v1/completions", Value::Object(body).to_string().into()).await;
        let response = sent.map_err(|error| told(format!("{error:#}")))?;
        let status = response.status();
        let mut body = response.into_body();
        let (mut said, mut rest) = (Vec::new(), Vec::new());
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| told(format!("the answer broke off: {error}")))?;
            rest.extend_from_slice(frame.data_ref().map_or(&[][..], |data| &data[..]));
            while let Some(end) = rest.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = rest.drain(..end + 2).collect();
                let event = String::from_utf8_lossy(&event);
                let Some(data) = event.trim_end().strip_prefix("data: ") else { continue };
                self.event(n);
                if data == "[DONE]" {
                    return judge(n, &said, &question.expected);
                }
                take(&mut said, &serde_json::from_str(data).expect("JSON")).map_err(told)?;
            }
        }
        Err(told(format!("{status}: {}", String::from_utf8_lossy(&rest))))
    }
}

fn judge(n: usize, said: &[Said], expected: &[Said]) -> Result<(), Fault> {
    if said == expected {
        return Ok(());
    }
    Err(Fault::Differs(format!("stream {n} said {said:?}, undisturbed {expected:?}")))
}

/// Adds a whole answer, or a piece of one.
fn take(said: &mut Vec<Said>, answer: &Value) -> Result<(), String> {
    if !answer["error"].is_null() {
        return Err(answer["error"].to_string());
    }
    for choice in answer["choices"].as_array().map(Vec::as_slice).unwrap_or_default() {
        let index = choice["index"].as_u64().unwrap() as usize;
        if said.len() <= index {
            said.resize(index + 1, Said::default());
        }
        said[index].add(choice);
    }
    Ok(())
}

impl Said {
    fn add(&mut self, choice: &Value) {
        let list = |key: &str| choice["logprobs"][key].as_array().cloned().unwrap_or_default();
        self.text += choice["text"].as_str().unwrap_or_default();
        self.tokens.extend(list("tokens"));
        self.logprobs.extend(list("token_logprobs"));
        self.top.extend(list("top_logprobs"));
        if !choice["finish_reason"].is_null() {
            self.finish = json!([choice["finish_reason"], choice["stop_reason"]]);
        }
    }
}
