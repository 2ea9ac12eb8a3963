//! The demo model answers what it was trained to answer, across two processes, with the cache found where it should be.

use crate::harness::{Answer, Ask, Cluster, alone, block_on, golden, python, root};
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Tokens of a block, and the chunk that these clusters prefill by.
const BLOCK: usize = 64;
const CHUNK: &str = "128";
/// Tokens of thirty golden questions and answers as one conversation.
const CONVERSATION: usize = 843;
/// Bytes of one token's KV: layers × row × f32.
const TOKEN_BYTES: usize = 5 * 576 * 4;

#[test]
fn every_golden_answer_is_exact_through_the_openai_client() {
    let _alone = alone();
    let cluster = Cluster::up(&["--chunk", CHUNK]);
    block_on(async {
        let before = landed(&cluster).await;
        let answers = root().join("deploy/demo/golden.jsonl");
        let arguments = [&format!("{}/v1", cluster.url), &cluster.model, answers.to_str().unwrap()];
        let said = python("golden.py", &arguments);
        assert!(said.starts_with("552 of 552 exact"), "{said}");
        let prompts: usize = golden::golden().iter().map(|item| item.prompt_ids.len()).sum();
        let moved = landed(&cluster).await - before;
        assert_eq!(
            moved,
            (2 * prompts * TOKEN_BYTES) as f64,
            "every prompt's rows moved, once for each request"
        );
        let pids: BTreeSet<u32> = cluster.services().map(|service| service.pid).collect();
        assert_eq!(pids.len(), 4, "four services are four processes");
        cluster.assert_idle().await;
    });
}

#[test]
fn a_long_conversation_stays_exact_and_hits_the_cache() {
    let _alone = alone();
    let cluster = Cluster::up(&["--chunk", CHUNK]);
    block_on(async {
        let mut messages: Vec<Value> = Vec::new();
        let mut last = Value::Null;
        for item in golden::golden().into_iter().step_by(2).take(30) {
            messages.push(json!({"role": "user", "content": item.question}));
            last = chat(&cluster, &messages).await;
            assert_eq!(last["choices"][0]["message"]["content"], item.answer, "{}", item.question);
            messages.push(json!({"role": "assistant", "content": item.answer}));
        }
        let count = |value: &Value| value.as_u64().unwrap() as usize;
        let usage = &last["usage"];
        let prompt = count(&usage["prompt_tokens"]);
        assert_eq!(count(&usage["total_tokens"]), CONVERSATION, "{usage}");
        // What was asked and answered before is found, but for the last answer's part of a block: decode made that.
        let earlier = prompt - golden::golden()[58].prompt_ids.len();
        assert!(count(&usage["prompt_tokens_details"]["cached_tokens"]) + 2 * BLOCK > earlier, "{usage}");
        let moved = landed(&cluster).await as usize / TOKEN_BYTES;
        assert!((prompt..4 * prompt).contains(&moved), "{moved} tokens moved in all for {prompt} in the end");
        cluster.assert_idle().await;
    });
}

#[test]
fn long_prompts_cross_in_chunks_and_are_found_again() {
    let _alone = alone();
    let cluster = Cluster::up(&["--chunk", CHUNK]);
    block_on(async {
        for reference in golden::references().iter().filter(|reference| reference.ids.len() > 100) {
            let answer = Ask::new(&reference.ids, 48).send(&cluster).await.unwrap();
            let sure = reference.margins.iter().take_while(|margin| **margin > 0.01).count();
            assert_eq!(answer.ids[..sure], reference.greedy[..sure], "{}", reference.name);
        }
        for (salt, length) in [63, 64, 65, 1500].into_iter().enumerate() {
            found_again(&cluster, &golden::prose(length, salt + 1)).await;
        }
        cluster.assert_idle().await;
    });
}

/// Asked twice, a prompt is computed and moved once: the second time prefill finds all but what it must compute to
/// have logits, decode all full blocks; and the answer is the same, bit for bit.
async fn found_again(cluster: &Cluster, prompt: &[u32]) {
    let ask = Ask::new(prompt, 8);
    let start = landed(cluster).await;
    let first = ask.send(cluster).await.unwrap();
    let middle = landed(cluster).await;
    let second = ask.send(cluster).await.unwrap();
    let end = landed(cluster).await;
    let length = prompt.len();
    assert_ne!(first.prefill, first.decode, "read by one process, answered by another");
    assert_eq!((first.prompt_tokens, first.cached), (length as u64, 0), "{length} tokens");
    assert_eq!(second.cached, ((length - 1) / BLOCK * BLOCK) as u64, "{length} tokens");
    assert_eq!(middle - start, (length * TOKEN_BYTES) as f64, "{length} tokens");
    assert_eq!(end - middle, (length % BLOCK * TOKEN_BYTES) as f64, "{length} tokens");
    assert_eq!(Answer::said(&first), Answer::said(&second), "{length} tokens");
}

/// KV bytes that decode has taken in; they are counted where they land.
async fn landed(cluster: &Cluster) -> f64 {
    cluster.metric(cluster.worker("decode"), "baton_handoff_bytes_total", "grpc").await
}

async fn chat(cluster: &Cluster, messages: &[Value]) -> Value {
    let body = json!({"model": cluster.model, "messages": messages, "temperature": 0});
    let (status, body) = cluster.http.post("/v1/chat/completions", body.to_string()).await.unwrap();
    assert!(status.is_success(), "{status}: {body:?}");
    serde_json::from_slice(&body).unwrap()
}
