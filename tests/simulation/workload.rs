//! The requests of a seed: greedy and sampled, one choice and several, stop strings, logprobs, penalties,
//! echoes, chat and completions, streamed and whole, of several tenants and priorities, with prompts that
//! begin alike. Every one names its sampling seed, so that its answer does not depend on anything but itself.

use crate::{
    cluster::MODEL,
    nature::{Chance, mix},
    shape::Shape,
};
use serde_json::{Value, json};
use std::time::Duration;

/// Ids of the demo model that stand for text.
const TOKENS: std::ops::Range<u64> = 300..4096;
const WORDS: [&str; 12] =
    ["what", "is", "the", "capital", "of", "a", "river", "seven", "and", "blue", "how", "many"];

#[derive(Clone, Debug)]
pub struct Ask {
    pub name: String,
    pub path: &'static str,
    pub body: Value,
    pub tenant: String,
    /// After the cluster has started.
    pub at: Duration,
    /// The client leaves after so many events of the stream.
    pub leaves_after: Option<u64>,
}

/// In order of their times.
pub fn asks(seed: u64, shape: &Shape) -> Vec<Ask> {
    let mut chance = Chance::new(seed, "workload");
    let count = chance.within(8, 25);
    // Together, or one after another.
    let window = *chance.of(&[50, 1_000, 4_000, 8_000]);
    let mut asks: Vec<Ask> =
        (0..count).map(|number| ask(format!("request-{number}"), window, shape, &mut chance)).collect();
    asks.sort_by_key(|ask| ask.at);
    asks
}

/// A small request that a healthy cluster answers.
pub fn probe(number: u64) -> Ask {
    let body = json!({
        "model": MODEL, "prompt": prompt(1_000 + number, 20), "max_tokens": 6, "temperature": 0,
        "ignore_eos": true,
    });
    let (at, tenant) = (Duration::ZERO, "probe".to_owned());
    Ask { name: format!("probe-{number}"), path: "/v1/completions", body, tenant, at, leaves_after: None }
}

fn ask(name: String, window: u64, shape: &Shape, chance: &mut Chance) -> Ask {
    let chat = chance.once_in(4);
    let mut body = if chat { talk(chance) } else { complete(shape, chance) };
    let set = body.as_object_mut().expect("an object");
    let mut put = |key: &str, value: Value| drop(set.insert(key.to_owned(), value));
    put("model", MODEL.into());
    put("max_tokens", chance.within(1, u64::from(shape.context() / 4).min(60)).into());
    put("seed", (chance.next() >> 12).into());
    put("temperature", (*chance.of(&[0.0, 0.0, 0.7, 1.0])).into());
    if chance.once_in(3) {
        put("n", chance.within(2, 4).into());
    }
    if chance.once_in(3) {
        put("stop", json!([*chance.of(&["e", "st", " the", "ing"]), "zzz"]));
    }
    if chance.once_in(3) {
        put("ignore_eos", true.into());
    }
    if chance.once_in(4) {
        put("frequency_penalty", 0.5.into());
        put("repetition_penalty", 1.2.into());
    }
    if chance.once_in(4) {
        put("top_k", 5.into());
    }
    put("priority", (*chance.of(&[0, 0, 0, 1, -1])).into());
    let streams = !chance.once_in(4);
    put("stream", streams.into());
    let leaves_after = (streams && chance.once_in(6)).then(|| chance.within(0, 12));
    let tenant = format!("sk-{}", chance.within(0, 3));
    let at = Duration::from_millis(chance.within(0, window));
    let path = if chat { "/v1/chat/completions" } else { "/v1/completions" };
    Ask { name, path, body, tenant, at, leaves_after }
}

fn talk(chance: &mut Chance) -> Value {
    let words: Vec<&str> = (0..chance.within(1, 8)).map(|_| *chance.of(&WORDS)).collect();
    let mut body = json!({"messages": [{"role": "user", "content": words.join(" ")}]});
    if chance.once_in(2) {
        body["logprobs"] = true.into();
        body["top_logprobs"] = chance.within(0, 4).into();
    }
    body
}

fn complete(shape: &Shape, chance: &mut Chance) -> Value {
    let longest = u64::from(shape.context() / 3).min(400);
    let (family, length) = (chance.within(0, 5), chance.within(1, longest));
    let mut body = json!({"prompt": prompt(family, length)});
    if chance.once_in(2) {
        body["logprobs"] = chance.within(0, 4).into();
        body["echo"] = chance.once_in(3).into();
    }
    body
}

/// Prompts of one family begin alike.
fn prompt(family: u64, length: u64) -> Vec<u64> {
    let token = |at| TOKENS.start + mix(mix(family) ^ at) % (TOKENS.end - TOKENS.start);
    (0..length).map(token).collect()
}
