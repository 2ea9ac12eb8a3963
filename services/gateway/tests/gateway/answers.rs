//! Chat answers, whole and streamed: content, order of chunks, usage, logprobs, choices, headers.

use crate::client::{Live, get, request};
use crate::fake::{Act, Cluster, answer, chat, encode, finished, started, tokens};
use proto::FinishReason;
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::sync::Notify;

const TEXT: &str = "A `Vec` grows – naïvely: 日本 🦀.";

#[tokio::test]
async fn a_whole_answer() {
    let cluster = Cluster::start(|request| answer(request, TEXT)).await;
    let reply = cluster.chat(json!({"seed": -2, "priority": -5, "top_k": 7, "user": "u"})).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let whole = reply.json();
    let completion = encode(TEXT).len() as u64 + 1;
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["model"], "demo");
    assert!(whole["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(
        whole["choices"],
        json!([{"index": 0, "message": {"role": "assistant", "content": TEXT, "refusal": null}, "logprobs": null,
            "finish_reason": "stop", "stop_reason": null}])
    );
    assert_eq!(
        whole["usage"],
        json!({"prompt_tokens": 9, "completion_tokens": completion, "total_tokens": 9 + completion,
            "prompt_tokens_details": {"cached_tokens": 3}})
    );
    for (name, value) in
        [("content-type", "application/json"), ("x-baton-prefill", "p-1"), ("x-baton-decode", "d-1")]
    {
        assert_eq!(reply.header(name), Some(value));
    }
    let asked = cluster.asked()[0].clone().sequence.unwrap();
    let (sampling, stop) = (asked.sampling.unwrap(), asked.stop.unwrap());
    assert_eq!(asked.tokens, [0, 3, 357, 310, 270, 797, 68, 35, 4], "golden.jsonl's prompt_ids");
    assert_eq!((asked.prompt_len, asked.priority), (9, -5));
    assert_eq!((sampling.temperature, sampling.top_k, sampling.seed), (0.0, 7, u64::MAX - 1));
    assert_eq!((stop.max_tokens, stop.eos_ids), (2048 - 9, vec![1]));
}

#[tokio::test]
async fn a_streamed_answer_in_order() {
    let cluster = Cluster::start(|request| answer(request, TEXT)).await;
    let plain = cluster.chat(json!({"stream": true})).await;
    assert_eq!(plain.header("content-type"), Some("text/event-stream; charset=utf-8"));
    assert_eq!(plain.header("x-baton-decode"), Some("d-1"));
    let chunks = plain.chunks();
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(content(&chunks, 0), TEXT);
    let last = &chunks.last().unwrap()["choices"][0];
    assert_eq!((&last["delta"], &last["finish_reason"]), (&json!({}), &json!("stop")));
    assert!(chunks[..chunks.len() - 1].iter().all(|chunk| chunk["choices"][0]["finish_reason"].is_null()));
    assert!(
        chunks
            .iter()
            .all(|chunk| chunk["id"] == chunks[0]["id"] && chunk["object"] == "chat.completion.chunk")
    );
    assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none()));

    let with_usage =
        cluster.chat(json!({"stream": true, "stream_options": {"include_usage": true}})).await.chunks();
    let (last, before) = with_usage.split_last().unwrap();
    assert!(before.iter().all(|chunk| chunk["usage"].is_null() && chunk.get("usage").is_some()));
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], encode(TEXT).len() as u64 + 1);

    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let always = cluster.chat(json!({"stream": true, "stream_options": options})).await.chunks();
    assert!(always.iter().all(|chunk| chunk["usage"]["prompt_tokens"] == 9));
}

fn content(chunks: &[Value], index: u64) -> String {
    let choices =
        chunks.iter().filter_map(|chunk| chunk["choices"].get(0)).filter(|choice| choice["index"] == index);
    choices.filter_map(|choice| choice["delta"]["content"].as_str()).collect()
}

/// Each token sent alone: text appears as soon as it is whole characters, and never before.
#[tokio::test]
async fn half_a_character_is_never_sent() {
    let cluster = Cluster::start(|request| {
        let ids = encode("a🦀b");
        let spaced = tokens(request, &ids).into_iter().flat_map(|token| [token, Act::Wait(30)]);
        std::iter::once(started()).chain(spaced).chain([finished(FinishReason::Length, None)]).collect()
    })
    .await;
    let chunks = cluster.chat(json!({"stream": true})).await.chunks();
    let pieces: Vec<_> =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(pieces, ["", "a", "🦀", "b"]);
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "length");

    let cut = Cluster::start(|request| {
        let ids = encode("a🦀");
        [vec![started()], tokens(request, &ids[..2]), vec![finished(FinishReason::Length, None)]].concat()
    })
    .await;
    assert_eq!(content(&cut.chat(json!({"stream": true})).await.chunks(), 0), "a\u{FFFD}");
}

#[tokio::test]
async fn other_choices_start_with_the_first_token_of_choice_0() {
    let first_token = Arc::new(Notify::new());
    let word = first_token.clone();
    let cluster = Cluster::start(move |request| {
        let choice = request.sequence.as_ref().unwrap().sampling.as_ref().unwrap().choice;
        let mut script = answer(request, &format!("choice {choice}"));
        if choice == 0 {
            script.insert(1, Act::Await(word.clone()));
        }
        script
    })
    .await;
    let mut live = Live::post(
        cluster.http,
        "/v1/chat/completions",
        &chat(json!({"n": 3, "stream": true, "stream_options": {"include_usage": true}})),
    )
    .await;
    live.until("\"role\"").await;
    assert_eq!(cluster.asked().len(), 1, "the others wait for the first token");
    first_token.notify_one();
    live.finish().await;
    let chunks = live.reply().chunks();
    for index in 0..3 {
        assert_eq!(content(&chunks, index), format!("choice {index}"));
    }
    assert_eq!(chunks.iter().filter(|chunk| chunk["choices"][0]["finish_reason"] == "stop").count(), 3);
    let usage = &chunks.last().unwrap()["usage"];
    assert_eq!(
        (&usage["prompt_tokens"], &usage["prompt_tokens_details"]["cached_tokens"]),
        (&json!(9), &json!(3))
    );
    let asked: Vec<_> = cluster.asked().into_iter().map(|request| request.sequence.unwrap()).collect();
    let choices: Vec<_> = asked.iter().map(|sequence| sequence.sampling.as_ref().unwrap().choice).collect();
    let seeds: Vec<_> = asked.iter().map(|sequence| sequence.sampling.as_ref().unwrap().seed).collect();
    assert_eq!((choices, seeds[0] == seeds[1] && seeds[1] == seeds[2]), (vec![0, 1, 2], true));
    let ids: std::collections::HashSet<_> = asked.iter().map(|sequence| &sequence.request_id).collect();
    assert_eq!(ids.len(), 3);

    first_token.notify_one();
    let whole = cluster.chat(json!({"n": 2})).await.json();
    assert_eq!(whole["choices"][1]["message"]["content"], "choice 1");
    assert_eq!(whole["usage"]["completion_tokens"], 2 * (encode("choice 0").len() as u64 + 1));
}

#[tokio::test]
async fn logprobs_of_chat() {
    let cluster = Cluster::start(|request| answer(request, "aé")).await;
    let whole = cluster.chat(json!({"logprobs": true, "top_logprobs": 2})).await.json();
    let list = whole["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert_eq!(list.len() as u64, whole["usage"]["completion_tokens"]);
    assert_eq!(
        (&list[0]["token"], &list[0]["bytes"], &list[0]["logprob"]),
        (&json!("a"), &json!([97]), &json!(-0.0))
    );
    assert_eq!(list[0]["top_logprobs"][1]["logprob"], -9999.0, "JSON has no infinity");
    let bytes: Vec<u8> = list[..list.len() - 1]
        .iter()
        .flat_map(|token| token["bytes"].as_array().unwrap())
        .map(|byte| byte.as_u64().unwrap() as u8)
        .collect();
    assert_eq!(bytes, "aé".as_bytes());
    assert_eq!(cluster.asked()[0].sequence.as_ref().unwrap().sampling.as_ref().unwrap().logprobs, Some(2));

    let named = cluster.chat(json!({"logprobs": true, "return_tokens_as_token_ids": true})).await.json();
    let first = &named["choices"][0]["logprobs"]["content"][0];
    assert_eq!(
        (&first["token"], &first["top_logprobs"]),
        (&json!(format!("token_id:{}", encode("a")[0])), &json!([]))
    );

    let chunks = cluster.chat(json!({"logprobs": true, "stream": true, "top_logprobs": 2})).await.chunks();
    let streamed: Vec<Value> = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array())
        .flatten()
        .cloned()
        .collect();
    assert_eq!(streamed, list, "no token's logprob is lost while its text waits");
}

#[tokio::test]
async fn every_answer_has_its_id_and_traces_go_on() {
    let cluster = Cluster::start(|request| answer(request, "yes")).await;
    let headers = "content-type: application/json\r\nx-request-id: mine-1\r\nauthorization: Bearer k\r\n\
        traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n";
    let reply =
        request(cluster.http, "POST", "/v1/chat/completions", headers, &chat(json!({})).to_string()).await;
    assert_eq!(reply.header("x-request-id"), Some("mine-1"));
    assert!(reply.header("openai-processing-ms").is_some());
    let asked = &cluster.asked()[0];
    assert!(asked.sequence.as_ref().unwrap().request_id.starts_with("mine-1~"));
    assert_eq!(asked.tenant.len(), 16);
    assert!(cluster.fake.traces.lock().unwrap()[0].starts_with("00-0af7651916cd43dd8448eb211c80319c-"));
    for path in ["/v1/models", "/nowhere", "/health"] {
        assert!(get(cluster.http, path).await.header("x-request-id").is_some(), "{path}");
    }
}

#[tokio::test]
async fn models_health_and_metrics() {
    let cluster = Cluster::start(|request| answer(request, "yes")).await;
    let list = get(cluster.http, "/v1/models").await.json();
    assert_eq!(list["data"][1]["id"], "org/demo");
    assert_eq!(list["data"][0]["max_model_len"], 2048);
    assert_eq!(get(cluster.http, "/v1/models/org/demo").await.json()["id"], "org/demo");
    assert_eq!(get(cluster.http, "/v1/models/org/other").await.error().2, "model_not_found");
    assert_eq!(get(cluster.http, "/health").await.status, 200);
    cluster.chat(json!({})).await;
    cluster.chat(json!({"n": 0})).await;
    for address in [cluster.http, cluster.admin] {
        assert_eq!(get(address, "/ready").await.status, 200);
        let metrics = get(address, "/metrics").await.body;
        for line in [
            "baton_gateway_requests_total{endpoint=\"/v1/chat/completions\",code=\"200\"} 1",
            "baton_gateway_requests_total{endpoint=\"/v1/chat/completions\",code=\"400\"} 1",
            "baton_prompt_tokens_total 9",
            "baton_completion_tokens_total 3",
            "baton_cached_prompt_tokens_total 3",
            "baton_time_to_first_token_seconds_count 1",
            "baton_inter_token_latency_seconds_count 2",
            "baton_request_seconds_count 2",
            "baton_gateway_in_flight 0",
        ] {
            assert!(metrics.contains(line), "{line} is missing from\n{metrics}");
        }
    }
}
