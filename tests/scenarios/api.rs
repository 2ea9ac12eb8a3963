//! The API over the real model: what the gateway promises of prompts, choices, seeds, echoes and stops holds with two workers
//! behind it.

use crate::harness::{Cluster, alone, block_on};
use serde_json::{Value, json};

const QUESTION: &str = "What does `Vec::push` do?";

#[test]
fn api_over_the_real_model() {
    let _alone = alone();
    let cluster = Cluster::up(&[]);
    block_on(async {
        an_echo_scores_what_was_generated(&cluster).await;
        a_seed_decides_and_choices_differ(&cluster).await;
        several_prompts_are_as_good_as_one(&cluster).await;
        stops_end_every_choice(&cluster).await;
        cluster.assert_idle().await;
    });
}

/// A token has the same logprob, bit for bit, whether it was sampled or stood in the prompt.
async fn an_echo_scores_what_was_generated(cluster: &Cluster) {
    let prompt: Vec<u32> = (100..170).collect();
    let said = complete(cluster, json!({"prompt": prompt, "max_tokens": 8})).await;
    let tokens = |reply: &Value| reply["choices"][0]["logprobs"]["tokens"].as_array().unwrap().clone();
    let scores =
        |reply: &Value| reply["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().clone();
    let generated = tokens(&said)
        .into_iter()
        .map(|token| token.as_str().unwrap().strip_prefix("token_id:").unwrap().parse::<u32>().unwrap());
    let whole: Vec<u32> = prompt.iter().copied().chain(generated).collect();
    let echoed = complete(cluster, json!({"prompt": whole, "max_tokens": 0, "echo": true})).await;
    assert_eq!(
        (tokens(&echoed).len(), echoed["usage"]["completion_tokens"].as_u64()),
        (whole.len(), Some(0))
    );
    assert!(scores(&echoed)[0].is_null());
    assert_eq!(scores(&echoed)[prompt.len()..], scores(&said)[..]);
}

async fn a_seed_decides_and_choices_differ(cluster: &Cluster) {
    let ask = json!({"prompt": QUESTION, "max_tokens": 12, "temperature": 1.5, "seed": 7, "n": 4});
    let (one, two) = (complete(cluster, ask.clone()).await, complete(cluster, ask.clone()).await);
    assert_eq!(one["choices"], two["choices"]);
    let mut distinct = texts(&one);
    distinct.sort();
    distinct.dedup();
    assert!(distinct.len() > 1, "{distinct:?}");
    let mut other = ask;
    other["seed"] = json!(8);
    assert_ne!(texts(&one), texts(&complete(cluster, other).await));
}

async fn several_prompts_are_as_good_as_one(cluster: &Cluster) {
    let prompts = [QUESTION, "Explain `Option::map`.", "std::mem::swap"];
    let all = complete(cluster, json!({"prompt": prompts, "max_tokens": 10})).await;
    for (index, prompt) in prompts.iter().enumerate() {
        let alone = complete(cluster, json!({"prompt": prompt, "max_tokens": 10})).await;
        assert_eq!(texts(&all)[index], texts(&alone)[0], "{prompt}");
    }
}

async fn stops_end_every_choice(cluster: &Cluster) {
    let messages = json!([{"role": "user", "content": QUESTION}]);
    let mut ask = json!({"messages": messages, "temperature": 0, "n": 3, "stop": ["t to the b"]});
    for (kept, text) in [(false, "Appends an elemen"), (true, "Appends an element to the b")] {
        ask["include_stop_str_in_output"] = json!(kept);
        let reply = post(cluster, "/v1/chat/completions", ask.clone()).await;
        for choice in reply["choices"].as_array().unwrap() {
            assert_eq!(choice["message"]["content"], text);
            assert_eq!(
                (&choice["finish_reason"], &choice["stop_reason"]),
                (&json!("stop"), &json!("t to the b"))
            );
        }
        assert_eq!(reply["choices"].as_array().unwrap().len(), 3);
    }
}

fn texts(reply: &Value) -> Vec<String> {
    reply["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| choice["text"].as_str().unwrap().to_owned())
        .collect()
}

/// Greedy and with logprobs unless asked otherwise.
async fn complete(cluster: &Cluster, extra: Value) -> Value {
    let mut body =
        json!({"temperature": 0, "logprobs": 0, "return_tokens_as_token_ids": true, "ignore_eos": true});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    post(cluster, "/v1/completions", body).await
}

async fn post(cluster: &Cluster, path: &str, mut body: Value) -> Value {
    body["model"] = json!(cluster.model);
    let (status, reply) = cluster.http.post(path, body.to_string()).await.unwrap();
    assert!(status.is_success(), "{status}: {reply:?}");
    serde_json::from_slice(&reply).unwrap()
}
