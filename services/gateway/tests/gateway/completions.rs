//! Completions: forms of prompts, echo, logprobs, several prompts at once.

use crate::fake::{Cluster, answer, encode, prompt_logprobs, started, tokens};
use serde_json::{Value, json};

fn sequence(cluster: &Cluster, call: usize) -> proto::Sequence {
    cluster.asked()[call].sequence.clone().unwrap()
}

#[tokio::test]
async fn prompts_as_text_and_as_ids() {
    let cluster = Cluster::start(|request| answer(request, "yes")).await;
    let whole = cluster.complete(json!({"prompt": "fn main"})).await.json();
    assert_eq!(whole["object"], "text_completion");
    assert_eq!(
        whole["choices"],
        json!([{"index": 0, "text": "yes", "logprobs": null, "finish_reason": "stop", "stop_reason": null}])
    );
    let bos = [vec![0], encode("fn main")].concat();
    assert_eq!(sequence(&cluster, 0).tokens, bos);
    cluster.complete(json!({"prompt": "<｜begin▁of▁sentence｜>fn main"})).await;
    assert_eq!(sequence(&cluster, 1).tokens, bos, "a begin token that is there is not doubled");
    cluster.complete(json!({"prompt": "fn main", "add_special_tokens": false})).await;
    assert_eq!(sequence(&cluster, 2).tokens, encode("fn main"));
    cluster.complete(json!({"prompt": [5, 6, 7]})).await;
    assert_eq!(sequence(&cluster, 3).tokens, [5, 6, 7]);
}

#[tokio::test]
async fn prompts_times_choices() {
    let cluster = Cluster::start(|request| {
        let sequence = request.sequence.as_ref().unwrap();
        answer(request, &format!("{} {}", sequence.tokens[0], sequence.sampling.as_ref().unwrap().choice))
    })
    .await;
    let body = json!({"prompt": [[5, 9], [6, 9, 9]], "n": 2});
    let whole = cluster.complete(body.clone()).await.json();
    let texts: Vec<_> = whole["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| (choice["index"].clone(), choice["text"].clone()))
        .collect();
    assert_eq!(
        texts,
        [
            (json!(0), json!("5 0")),
            (json!(1), json!("5 1")),
            (json!(2), json!("6 0")),
            (json!(3), json!("6 1"))
        ]
    );
    assert_eq!(
        (&whole["usage"]["prompt_tokens"], &whole["usage"]["prompt_tokens_details"]["cached_tokens"]),
        (&json!(5), &json!(6))
    );

    let mut streamed = body;
    streamed["stream"] = json!(true);
    let chunks = cluster.complete(streamed).await.chunks();
    for (index, text) in ["5 0", "5 1", "6 0", "6 1"].iter().enumerate() {
        let of = chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|choice| choice["index"] == index);
        assert_eq!(of.filter_map(|choice| choice["text"].as_str()).collect::<String>(), *text);
    }
}

#[tokio::test]
async fn echo_puts_the_prompt_first() {
    let cluster = Cluster::start(|request| answer(request, " yes")).await;
    let text = |reply: Value| reply["choices"][0]["text"].as_str().unwrap().to_owned();
    assert_eq!(
        text(cluster.complete(json!({"echo": true, "prompt": "Is it so?"})).await.json()),
        "Is it so? yes"
    );
    assert_eq!(
        text(cluster.complete(json!({"echo": true, "prompt": encode("Is it so?")})).await.json()),
        "Is it so? yes"
    );
    let chunks =
        cluster.complete(json!({"echo": true, "prompt": "Is it so?", "stream": true, "n": 2})).await.chunks();
    for index in 0..2 {
        let first = chunks.iter().find(|chunk| chunk["choices"][0]["index"] == index).unwrap();
        assert_eq!(first["choices"][0]["text"], "Is it so?");
    }
}

#[tokio::test]
async fn echo_alone_drops_the_token_that_must_be_sampled() {
    let cluster = Cluster::start(|request| {
        [vec![started()], prompt_logprobs_if_asked(request), tokens(request, &[50])].concat()
    })
    .await;
    let whole = cluster
        .complete(json!({"echo": true, "max_tokens": 0, "prompt": "Is it so?", "logprobs": 1}))
        .await
        .json();
    let choice = &whole["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("Is it so?"), &json!("length")));
    assert_eq!(whole["usage"]["completion_tokens"], 0);
    assert_eq!(
        choice["logprobs"]["tokens"].as_array().unwrap().len() as u64,
        whole["usage"]["prompt_tokens"]
    );
    assert_eq!(sequence(&cluster, 0).stop.unwrap().max_tokens, 1);
}

fn prompt_logprobs_if_asked(request: &proto::GenerateRequest) -> Vec<crate::fake::Act> {
    let sampling = request.sequence.as_ref().unwrap().sampling.as_ref().unwrap();
    if sampling.prompt_logprobs.is_some() { prompt_logprobs(request) } else { Vec::new() }
}

#[tokio::test]
async fn logprobs_of_completions_with_echo() {
    let cluster = Cluster::start(|request| {
        let mut script = answer(request, " né");
        let prompt = prompt_logprobs_if_asked(request);
        script.splice(1..1, prompt);
        script
    })
    .await;
    let body = json!({"prompt": "ça va", "echo": true, "logprobs": 2, "n": 2});
    let whole = cluster.complete(body.clone()).await.json();
    for choice in whole["choices"].as_array().unwrap() {
        let lists = &choice["logprobs"];
        let count = lists["tokens"].as_array().unwrap().len();
        assert_eq!(lists["tokens"][0], "<｜begin▁of▁sentence｜>");
        assert_eq!((&lists["token_logprobs"][0], &lists["top_logprobs"][0]), (&Value::Null, &Value::Null));
        assert_eq!(lists["token_logprobs"][1], -1.0, "the prompt's own logprobs");
        for list in ["token_logprobs", "top_logprobs", "text_offset"] {
            assert_eq!(lists[list].as_array().unwrap().len(), count, "{list}");
        }
        let text = choice["text"].as_str().unwrap();
        assert_eq!(text, "ça va né");
        let offsets: Vec<_> = lists["text_offset"]
            .as_array()
            .unwrap()
            .iter()
            .map(|offset| offset.as_u64().unwrap() as usize)
            .collect();
        assert!(offsets.is_sorted() && offsets.iter().all(|offset| *offset <= text.chars().count()));
        assert_eq!(*offsets.last().unwrap(), text.chars().count(), "the end token comes after all text");
        let completion = 1 + encode("ça va").len();
        assert_eq!(offsets[completion], 5, "the completion begins after the prompt's five characters");
        let first = lists["top_logprobs"][completion].as_object().unwrap();
        assert_eq!((first.len(), first.values().any(|logprob| *logprob == -9999.0)), (2, true));
    }
    let asked: Vec<_> =
        (0..2).map(|call| sequence(&cluster, call).sampling.unwrap().prompt_logprobs).collect();
    assert_eq!(asked, [Some(2), None], "the prompt is scored once");

    let mut named = body;
    named["return_tokens_as_token_ids"] = json!(true);
    let whole = cluster.complete(named).await.json();
    assert_eq!(whole["choices"][0]["logprobs"]["tokens"][0], "token_id:0");
}

#[tokio::test]
async fn tokens_that_are_no_characters_are_told_by_their_bytes() {
    let cluster = Cluster::start(|request| answer(request, "🦀")).await;
    let whole = cluster.complete(json!({"logprobs": 0})).await.json();
    let first = whole["choices"][0]["logprobs"]["tokens"][0].as_str().unwrap();
    assert!(first.starts_with("bytes:\\xf0"), "{first}");
}
