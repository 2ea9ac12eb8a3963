//! Requests that are refused at the door: status, field and code; nothing reaches the router.

use crate::client::{Live, get, post, request};
use crate::fake::{Cluster, answer, chat, completion};
use serde_json::json;

const JSON: &str = "content-type: application/json\r\n";
const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn what_http_says_is_wrong() {
    let cluster =
        Cluster::with(|request| answer(request, "yes"), |config| config.limits.body_bytes = 10_000).await;
    let large = format!("{{\"x\": \"{}\"}}", "x".repeat(30_000));
    let good = chat(json!({})).to_string();
    let rows = [
        ("POST", CHAT, JSON, "{", (400, "invalid_json")),
        ("POST", CHAT, JSON, "[]", (400, "invalid_json")),
        ("POST", CHAT, JSON, "", (400, "invalid_json")),
        ("POST", CHAT, JSON, &large, (413, "request_too_large")),
        ("POST", CHAT, "content-type: text/plain\r\n", &good, (415, "unsupported_media_type")),
        ("POST", CHAT, "", &good, (415, "unsupported_media_type")),
        ("GET", CHAT, "", "", (405, "method_not_supported")),
        ("DELETE", "/v1/models", "", "", (405, "method_not_supported")),
        ("POST", "/v1/embeddings", JSON, "{}", (404, "unknown_url")),
        ("GET", "/", "", "", (404, "unknown_url")),
    ];
    for (method, path, headers, body, (status, code)) in rows {
        let reply = request(cluster.http, method, path, headers, body).await;
        assert_eq!(reply.error(), (status, String::new(), code.into()), "{method} {path}");
        assert_eq!(reply.header("content-type"), Some("application/json"));
        assert!(reply.header("x-request-id").is_some());
    }
    let charset = "content-type: Application/JSON; charset=utf-8\r\n";
    assert_eq!(request(cluster.http, "POST", CHAT, charset, &good).await.status, 200);
    assert_eq!(cluster.asked().len(), 1);
}

#[tokio::test]
async fn what_the_model_says_is_wrong() {
    let cluster = Cluster::with(|request| answer(request, "yes"), |config| config.limits.sequences = 4).await;
    let long = "word ".repeat(3000);
    let absurd = "x".repeat(1 << 20);
    let value = "invalid_value";
    let context = "context_length_exceeded";
    let rows = [
        (CHAT, chat(json!({"model": "other"})), (404, "model", "model_not_found")),
        (CHAT, chat(json!({"messages": [{"role": "user", "content": long}]})), (400, "messages", context)),
        (CHAT, chat(json!({"messages": [{"role": "user", "content": absurd}]})), (400, "messages", context)),
        (CHAT, chat(json!({"max_tokens": 2040})), (400, "max_tokens", context)),
        (CHAT, chat(json!({"logit_bias": {"4096": 1}})), (400, "logit_bias", value)),
        (CHAT, chat(json!({"stop_token_ids": [4096]})), (400, "stop_token_ids", value)),
        (CHAT, chat(json!({"n": 5})), (400, "n", value)),
        (CHAT, chat(json!({"temperature": 3})), (400, "temperature", value)),
        (CHAT, chat(json!({"tools": [{}]})), (400, "tools", "unsupported_parameter")),
        ("/v1/completions", completion(json!({"prompt": [1, 4096]})), (400, "prompt", value)),
        (
            "/v1/completions",
            completion(json!({"prompt": "", "add_special_tokens": false})),
            (400, "prompt", value),
        ),
        ("/v1/completions", completion(json!({"prompt": vec![5; 2048]})), (400, "prompt", context)),
        ("/v1/completions", completion(json!({"prompt": ["a", "b", "c"], "n": 2})), (400, "n", value)),
    ];
    for (path, body, (status, param, code)) in rows {
        let reply = post(cluster.http, path, &body).await;
        assert_eq!(reply.error(), (status, param.into(), code.into()), "{}", reply.body);
        assert!(reply.body.len() < 600, "{} bytes of refusal", reply.body.len());
        assert!(reply.header("retry-after").is_none());
    }
    assert!(cluster.asked().is_empty());
    let exact = cluster.complete(json!({"prompt": vec![5; 2047], "max_tokens": 1})).await;
    assert_eq!(exact.status, 200, "a prompt and a token that just fit: {}", exact.body);
}

#[tokio::test]
async fn the_workers_shorter_context_holds() {
    let cluster = Cluster::start(|request| answer(request, "yes")).await;
    cluster.fake.members.lock().unwrap().iter_mut().for_each(|member| member.max_context = 100);
    assert_eq!(get(cluster.http, "/status").await.status, 200, "it has heard of them");
    cluster.chat(json!({})).await;
    assert_eq!(cluster.asked()[0].sequence.as_ref().unwrap().stop.as_ref().unwrap().max_tokens, 91);
    assert_eq!(cluster.chat(json!({"max_tokens": 92})).await.error().2, "context_length_exceeded");
}

#[tokio::test]
async fn without_a_chat_template_only_completions_are_served() {
    let dir = std::env::temp_dir().join(format!("gateway-plain-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    for file in ["tokenizer.json", "config.json", "generation_config.json"] {
        std::fs::copy(crate::fake::checkpoint().join(file), dir.join(file)).unwrap();
    }
    let cluster =
        Cluster::with(|request| answer(request, "yes"), |config| config.model_dir = dir.clone()).await;
    std::fs::remove_dir_all(&dir).unwrap();
    let reply = cluster.chat(json!({})).await;
    assert_eq!(reply.error(), (400, "messages".into(), "invalid_value".into()));
    assert!(reply.body.contains("chat_template.jinja"));
    assert_eq!(cluster.complete(json!({})).await.status, 200);
}

#[tokio::test]
async fn a_body_that_never_comes_times_out() {
    let cluster =
        Cluster::with(|request| answer(request, "yes"), |config| config.timeouts.body_ms = 100).await;
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: t\r\n{JSON}content-length: 500\r\n\r\n{{");
    let mut live = Live::raw(cluster.http, &head).await;
    live.until("\"timeout\"").await;
    assert_eq!(live.reply().status, 408);
}

#[tokio::test]
async fn more_requests_than_places_are_told_to_come_back() {
    let configure = |config: &mut gateway::Config| {
        config.limits.concurrent_requests = 1;
        config.timeouts.retry_after_ms = 1500;
    };
    let cluster = Cluster::with(|request| crate::fake::endless(request, "one"), configure).await;
    let mut first = Live::post(cluster.http, CHAT, &chat(json!({"stream": true}))).await;
    first.until("one").await;
    let second = cluster.chat(json!({})).await;
    assert_eq!(second.error(), (503, String::new(), "server_overloaded".into()));
    assert_eq!((second.header("retry-after"), second.header("retry-after-ms")), (Some("2"), Some("1500")));
    drop(first);
    cluster.left(1).await;
}

#[tokio::test]
async fn a_large_prompt_is_read_off_the_streaming_threads_with_the_same_result() {
    let cluster = Cluster::start(|request| answer(request, "yes")).await;
    let ids: Vec<u32> = (0..1900).map(|i| 5 + i % 4000).collect();
    let text = json!({"prompt": ids, "metadata": {"pad": "x".repeat(10_000)}});
    assert_eq!(cluster.complete(text).await.status, 200);
    assert_eq!(cluster.asked()[0].sequence.as_ref().unwrap().tokens, ids);
}
