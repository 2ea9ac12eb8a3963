//! How answers end: stop strings, stop tokens, the client leaving, the gateway stopping.

use crate::client::{Live, PATIENCE, get};
use crate::fake::{Act, Cluster, answer, chat, completion, encode, endless, finished, started, tokens};
use proto::generate_event::Event;
use proto::{FinishReason, TokenLogprob};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::timeout;

fn streamed(chunks: &[Value]) -> String {
    chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect()
}

#[tokio::test]
async fn a_stop_string_over_several_tokens_ends_the_call_at_once() {
    let cluster = Cluster::start(|request| endless(request, "one two three four")).await;
    assert!(encode("two three").len() > 1);
    let whole = cluster.complete(json!({"stop": ["nowhere", "wo thr"]})).await.json();
    assert_eq!(
        whole["choices"][0],
        json!({"index": 0, "text": "one t", "logprobs": null, "finish_reason": "stop", "stop_reason": "wo thr"})
    );
    cluster.left(1).await;
    let chunks = cluster.complete(json!({"stop": "wo thr", "stream": true})).await.chunks();
    assert_eq!(streamed(&chunks), "one t");
    assert_eq!(chunks.last().unwrap()["choices"][0]["stop_reason"], "wo thr");
    cluster.left(2).await;
    let kept = cluster.complete(json!({"stop": "wo thr", "include_stop_str_in_output": true})).await.json();
    assert_eq!(kept["choices"][0]["text"], "one two thr");
}

#[tokio::test]
async fn only_what_may_become_a_stop_string_waits() {
    let cluster = Cluster::start(|request| endless(request, "one two")).await;
    let body = completion(json!({"stop": "two three", "stream": true}));
    let mut live = Live::post(cluster.http, "/v1/completions", &body).await;
    live.until("one").await;
    assert!(!live.reply().body.contains("two"));

    let cluster = Cluster::start(|request| answer(request, "one two")).await;
    let whole = cluster.complete(json!({"stop": "two three"})).await.json();
    assert_eq!(
        (&whole["choices"][0]["text"], &whole["choices"][0]["stop_reason"]),
        (&json!("one two"), &Value::Null)
    );
}

#[tokio::test]
async fn stop_strings_wait_for_min_tokens() {
    let cluster = Cluster::start(|request| answer(request, "one two three two four")).await;
    let min = encode("one two three").len();
    let whole = cluster.complete(json!({"stop": " two", "min_tokens": min})).await.json();
    assert_eq!(whole["choices"][0]["text"], "one two three");
}

#[tokio::test]
async fn stop_tokens_are_named_and_their_text_is_left_out() {
    let id = encode(" two")[0];
    let script = move |request: &proto::GenerateRequest| {
        let ids = [encode("one"), vec![id]].concat();
        [vec![started()], tokens(request, &ids), vec![finished(FinishReason::Stop, Some(id))]].concat()
    };
    let cluster = Cluster::start(script).await;
    let whole = cluster.complete(json!({"stop_token_ids": [id]})).await.json();
    assert_eq!(
        (&whole["choices"][0]["text"], &whole["choices"][0]["stop_reason"]),
        (&json!("one"), &json!(id))
    );
    assert_eq!(cluster.asked()[0].sequence.as_ref().unwrap().stop.as_ref().unwrap().token_ids, [id]);
    let kept =
        cluster.complete(json!({"stop_token_ids": [id], "include_stop_str_in_output": true})).await.json();
    assert_eq!(kept["choices"][0]["text"], "one two");
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_call() {
    let cluster = Cluster::start(|request| endless(request, "one two")).await;
    let mut streaming =
        Live::post(cluster.http, "/v1/chat/completions", &chat(json!({"stream": true, "n": 2}))).await;
    streaming.until("\"index\":1").await;
    drop(streaming);
    cluster.left(2).await;
    let whole = Live::post(cluster.http, "/v1/chat/completions", &chat(json!({}))).await;
    cluster.until_asked(3).await;
    drop(whole);
    cluster.left(3).await;
    cluster.until_metric("{endpoint=\"/v1/chat/completions\",code=\"499\"} 2").await;
}

#[tokio::test]
async fn a_client_that_leaves_before_the_first_event_ends_the_call() {
    let cluster = Cluster::start(|_| vec![Act::Hang]).await;
    let mut waiting = Live::post(cluster.http, "/v1/chat/completions", &chat(json!({"stream": true}))).await;
    assert!(waiting.quiet_for(100).await, "headers wait for the first event");
    cluster.until_asked(1).await;
    drop(waiting);
    cluster.left(1).await;
}

#[tokio::test]
async fn comments_keep_a_silent_stream_alive() {
    let configure = |config: &mut gateway::Config| {
        config.stream.commit_ms = 50;
        config.stream.keep_alive_ms = 50;
    };
    let slow = |request: &proto::GenerateRequest, pause: Act| {
        let mut script = answer(request, "late");
        script.insert(0, pause.clone());
        script.insert(3, pause);
        script
    };
    let go_on = Arc::new(Notify::new());
    let word = go_on.clone();
    let cluster = Cluster::with(move |request| slow(request, Act::Await(word.clone())), configure).await;
    let mut live = Live::post(cluster.http, "/v1/chat/completions", &chat(json!({"stream": true}))).await;
    live.until(": keep-alive\n\n").await;
    assert!(!live.reply().body.contains("role"), "the comment came before the first event");
    go_on.notify_one();
    live.until_after("role", ": keep-alive\n\n").await;
    go_on.notify_one();
    live.finish().await;
    assert!(live.reply().body.ends_with("data: [DONE]\n\n"));

    let never = |config: &mut gateway::Config| {
        config.stream.commit_ms = 50;
        config.stream.keep_alive_ms = 0;
    };
    let cluster = Cluster::with(move |request| slow(request, Act::Wait(200)), never).await;
    assert!(!cluster.chat(json!({"stream": true})).await.body.contains("keep-alive"));
}

/// Whether it may have but one token: a test's way to ask for another script.
fn marked(request: &proto::GenerateRequest) -> bool {
    request.sequence.as_ref().unwrap().stop.as_ref().unwrap().max_tokens == 1
}

/// A gateway that is told to stop while it writes two answers, one that ends 200 ms later and one that would go on for ever.
async fn stopped(drain_ms: u64) -> (Cluster, Live, Live) {
    let script = |request: &proto::GenerateRequest| {
        if marked(request) {
            return endless(request, "one");
        }
        let mut script = answer(request, "one two");
        script.insert(2, Act::Wait(200));
        script
    };
    let mut cluster = Cluster::with(script, |config| config.timeouts.drain_ms = drain_ms).await;
    let mut short = Live::post(cluster.http, "/v1/chat/completions", &chat(json!({"stream": true}))).await;
    let mut long =
        Live::post(cluster.http, "/v1/chat/completions", &chat(json!({"stream": true, "max_tokens": 1})))
            .await;
    short.until("one").await;
    long.until("one").await;
    cluster.stop();
    (cluster, short, long)
}

/// Until nobody listens there any more.
async fn closed(address: SocketAddr) {
    let refused = async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, refused).await.expect("somebody still listens");
}

#[tokio::test]
async fn the_admin_port_is_there_until_the_drain_is_over() {
    let (cluster, mut short, long) = stopped(10_000).await;
    closed(cluster.http).await;
    let ready = get(cluster.admin, "/ready").await;
    assert_eq!((ready.status, ready.body.as_str()), (503, "not ready: draining\n"));
    for path in ["/health", "/status"] {
        assert_eq!(get(cluster.admin, path).await.status, 200, "{path}");
    }
    short.finish().await;
    cluster.until_metric("{endpoint=\"/v1/chat/completions\",code=\"200\"} 1").await;
    drop(long);
    closed(cluster.admin).await;
}

#[tokio::test]
async fn stopping_lets_answers_end_and_cuts_the_rest() {
    let (cluster, mut short, mut long) = stopped(2_000).await;
    short.finish().await;
    assert!(short.reply().body.ends_with("[DONE]\n\n"));
    long.finish().await;
    assert!(long.reply().body.contains("\"server_overloaded\""), "{}", long.reply().body);
    cluster.left(1).await;
}

/// Some 100 KB of events.
fn wide(request: &proto::GenerateRequest) -> Vec<Act> {
    let top = (0..1000).map(|token| TokenLogprob { token, logprob: -1.0, rank: 1 }).collect::<Vec<_>>();
    let mut events = tokens(request, &[50; 10]);
    for event in &mut events {
        if let Act::Say(Event::Token(token)) = event {
            token.top.clone_from(&top);
        }
    }
    [vec![started()], events, vec![Act::Hang]].concat()
}

/// 300 streams: more than there would be room for in 16 MiB, be it for the window of each or for all they have to say.
#[tokio::test]
async fn streams_that_nobody_reads_hold_up_nobody_else() {
    let configure =
        |config: &mut gateway::Config| (config.limits.choices, config.limits.sequences) = (300, 300);
    let script = |request: &proto::GenerateRequest| match marked(request) {
        true => answer(request, "yes"),
        false => wide(request),
    };
    let cluster = Cluster::with(script, configure).await;
    let body = completion(json!({"stream": true, "logprobs": 5, "n": 300}));
    let _never_read = Live::post(cluster.http, "/v1/completions", &body).await;
    while cluster.fake.asked.lock().unwrap().len() < 300 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let other = timeout(PATIENCE, cluster.complete(json!({"max_tokens": 1}))).await;
    let other = other.expect("its tokens wait for streams that nobody reads");
    assert_eq!(other.status, 200, "{}", other.body);
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_given_up() {
    let script = |request: &proto::GenerateRequest| {
        let ids = vec![50; 2000];
        [vec![started()], tokens(request, &ids), vec![Act::Hang]].concat()
    };
    let configure = |config: &mut gateway::Config| config.timeouts.stalled_client_ms = 200;
    let cluster = Cluster::with(script, configure).await;
    let body = chat(json!({"stream": true, "logprobs": true, "top_logprobs": 2, "n": 8}));
    let _never_read = Live::post(cluster.http, "/v1/chat/completions", &body).await;
    let given_up = async {
        while cluster.fake.left.load(std::sync::atomic::Ordering::SeqCst) < 8 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), given_up)
        .await
        .expect("its calls go on though it reads nothing");
}
