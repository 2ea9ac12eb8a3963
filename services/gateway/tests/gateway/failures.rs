//! When the router or what is behind it fails: before the first event an HTTP error, after it an SSE event.

use crate::client::get;
use crate::fake::{Act, Cluster, answer, encode, prompt_logprobs, serve_fake, started, tokens};
use futures::future::join_all;
use proto::generate_event::Event;
use proto::{ErrorCode, GenerateRequest};
use serde_json::json;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;
use tokio::time::Instant;

fn error(code: ErrorCode) -> proto::Error {
    proto::Error::new(code, "because")
}

#[tokio::test]
async fn errors_before_the_first_event_are_http_errors() {
    let rows = [
        (ErrorCode::InvalidRequest, 400, "invalid_value", false),
        (ErrorCode::ContextLength, 400, "context_length_exceeded", false),
        (ErrorCode::ModelNotFound, 404, "model_not_found", false),
        (ErrorCode::QueueFull, 503, "server_overloaded", true),
        (ErrorCode::NoMembers, 503, "server_overloaded", true),
        (ErrorCode::Deadline, 504, "timeout", false),
        (ErrorCode::WorkerLost, 502, "worker_lost", false),
        (ErrorCode::Internal, 500, "internal_error", false),
    ];
    for (code, status, name, retry) in rows {
        // As a status, as the stream's first event, and as a status after the headers.
        for script in [
            vec![Act::Fail(error(code))],
            vec![Act::Say(Event::Error(error(code)))],
            vec![Act::Wait(1), Act::Fail(error(code))],
        ] {
            let cluster = Cluster::start(move |_| script.clone()).await;
            for stream in [false, true] {
                let reply = cluster.chat(json!({"stream": stream})).await;
                assert_eq!(reply.error(), (status, String::new(), name.into()));
                assert_eq!(reply.header("retry-after").is_some(), retry, "{code:?}");
                assert!(reply.body.contains("because"));
            }
        }
    }
}

/// Tokens that the request brings along beside its prompt: another router has told them.
fn begun(request: &GenerateRequest) -> &[u32] {
    let sequence = request.sequence.as_ref().unwrap();
    &sequence.tokens[sequence.prompt_len as usize..]
}

fn broken(request: &GenerateRequest, end: Act) -> Vec<Act> {
    if !begun(request).is_empty() {
        return vec![end];
    }
    [vec![started()], tokens(request, &encode("one two")), vec![end]].concat()
}

#[tokio::test]
async fn errors_after_the_first_event_are_sse_events() {
    for (end, code) in [
        (Act::Say(Event::Error(error(ErrorCode::WorkerLost))), "worker_lost"),
        (Act::Fail(error(ErrorCode::QueueFull)), "server_overloaded"),
        (Act::Vanish, "worker_lost"),
    ] {
        let script = move |request: &GenerateRequest| broken(request, end.clone());
        let cluster = Cluster::with(script, |config| config.timeouts.resume_ms = 100).await;
        let reply = cluster.chat(json!({"stream": true})).await;
        assert_eq!(reply.status, 200);
        let last = reply.body.trim_end().rsplit("\n\n").next().unwrap();
        let event: serde_json::Value = serde_json::from_str(last.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(event["error"]["code"], code);
        assert!(reply.body.contains("two"), "what came before is not lost");
        let whole = cluster.chat(json!({})).await;
        assert_eq!(whole.error().2, code);
        assert_ne!(whole.status, 200);
    }
}

#[tokio::test]
async fn tokens_out_of_place_are_never_passed_on() {
    let cluster = Cluster::start(|request| {
        let mut script = answer(request, "one two three");
        script.remove(2);
        script
    })
    .await;
    let reply = cluster.chat(json!({})).await;
    assert_eq!(reply.error(), (500, String::new(), "internal_error".into()));
    assert!(reply.body.contains("was due"), "{}", reply.body);
}

#[tokio::test]
async fn missing_prompt_logprobs_are_an_error() {
    let cluster = Cluster::start(|request| answer(request, "yes")).await;
    let reply = cluster.complete(json!({"echo": true, "logprobs": 1})).await;
    assert_eq!(reply.error().2, "internal_error");
}

#[tokio::test]
async fn a_new_request_goes_to_the_router_that_answers() {
    let (second, address) = serve_fake(Box::new(|request| answer(request, "second"))).await;
    let configure = |config: &mut gateway::Config| {
        config.routers.insert(0, "http://127.0.0.1:1".into());
        config.routers.push(format!("http://{address}"));
    };
    let gone = |request: &GenerateRequest| match request.sequence.as_ref().unwrap().tokens.len() {
        9 => vec![Act::Vanish],
        _ => vec![Act::Fail(error(ErrorCode::Draining))],
    };
    let cluster = Cluster::with(gone, configure).await;
    cluster.ready(200, "").await;
    for reply in [cluster.chat(json!({})).await, cluster.chat(json!({})).await] {
        assert_eq!(reply.json()["choices"][0]["message"]["content"], "second");
    }
    assert_eq!(cluster.asked().len(), 1, "the router that answers is preferred from then on");
    assert_eq!(second.asked.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn an_answer_goes_on_where_its_router_was_lost() {
    let first_half = encode("one two");
    for end in [Act::Vanish, Act::Silence, Act::Say(Event::Error(error(ErrorCode::Draining)))] {
        let silence_ms = if matches!(end, Act::Silence) { 1000 } else { 10_000 };
        let (second, address) = serve_fake(Box::new(|request| answer(request, " three"))).await;
        let first = move |request: &GenerateRequest| broken(request, end.clone());
        let configure = |config: &mut gateway::Config| {
            config.timeouts.silence_ms = silence_ms;
            config.routers.push(format!("http://{address}"));
        };
        let cluster = Cluster::with(first, configure).await;
        let reply = cluster.complete(json!({"stop": "o thr"})).await.json();
        assert_eq!(reply["choices"][0]["text"], "one tw", "a stop string across the break is found");
        let streamed = cluster.complete(json!({"stream": true, "logprobs": 1})).await;
        assert!(!streamed.body.contains("error"), "{}", streamed.body);
        let asked = second.asked.lock().unwrap();
        assert_eq!(begun(&asked[0]), first_half, "what the client has is not asked for again");
        assert!(begun(&asked[1]).is_empty(), "the next request goes to the router that answers");
    }
}

#[tokio::test]
async fn a_request_that_outlives_its_routers_ends() {
    let cluster = Cluster::start(|request| {
        [vec![started()], tokens(request, &encode(" one")), vec![Act::Vanish]].concat()
    })
    .await;
    let reply = cluster.complete(json!({})).await;
    assert_eq!(reply.error().2, "worker_lost");
    assert_eq!(cluster.asked().len(), 4);
}

#[tokio::test]
async fn a_request_that_waited_for_its_place_waits_on_elsewhere() {
    let (times, asked) = (3, std::sync::atomic::AtomicU32::new(0));
    let cluster =
        Cluster::start(move |request| match asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst) {
            before if before < times => vec![Act::Wait(10), Act::Vanish],
            _ => answer(request, "at last"),
        })
        .await;
    assert_eq!(cluster.chat(json!({})).await.json()["choices"][0]["message"]["content"], "at last");
}

#[tokio::test]
async fn an_echoed_prompt_is_scored_once_though_its_router_was_lost() {
    let (_second, address) = serve_fake(Box::new(|request| {
        [vec![started()], prompt_logprobs(request), answer(request, " two").split_off(1)].concat()
    }))
    .await;
    let first = |request: &GenerateRequest| {
        let mut scored = prompt_logprobs(request);
        scored.truncate(1);
        [vec![started()], scored, vec![Act::Vanish]].concat()
    };
    let cluster = Cluster::with(first, |config| config.routers.push(format!("http://{address}"))).await;
    let reply = cluster.complete(json!({"echo": true, "logprobs": 1})).await.json();
    assert_eq!(reply["choices"][0]["text"], "fn main two");
}

#[tokio::test]
async fn without_any_router_requests_are_told_to_come_back() {
    let cluster =
        Cluster::with(|_| vec![], |config| config.routers = vec!["http://127.0.0.1:1".into()]).await;
    let reply = cluster.chat(json!({"stream": true})).await;
    assert_eq!(reply.error(), (503, String::new(), "server_overloaded".into()));
    assert_eq!(reply.header("retry-after"), Some("1"));
    cluster.ready(503, "no router answers").await;
}

#[tokio::test]
async fn readiness_follows_the_cluster() {
    let cluster = Cluster::start(|_| vec![]).await;
    cluster.ready(200, "").await;
    assert_eq!(get(cluster.admin, "/ready").await.status, 200);
    let decode = cluster.fake.members.lock().unwrap().pop();
    cluster.ready(503, "no decode worker").await;
    cluster.fake.members.lock().unwrap().extend(decode);
    cluster.ready(200, "").await;
}

#[tokio::test]
async fn probes_do_not_multiply_onto_the_router() {
    let cluster = Cluster::start(|_| vec![]).await;
    let began = Instant::now();
    cluster.ready(200, "").await;
    for path in ["/ready", "/status"] {
        let replies = join_all((0..100).map(|_| get(cluster.http, path))).await;
        assert!(replies.iter().all(|reply| reply.status == 200), "{path}");
    }
    let asked = cluster.fake.statuses.load(SeqCst);
    assert!(asked as u128 <= 2 + began.elapsed().as_millis() / 200, "{asked}");
}

#[tokio::test]
async fn one_question_a_second_serves_readiness_and_history() {
    let cluster = Cluster::start(|_| vec![]).await;
    tokio::time::sleep(Duration::from_millis(4200)).await;
    let asked = cluster.fake.statuses.load(SeqCst);
    // The history's first sample is of a look of its own.
    assert!((2..=6).contains(&asked), "{asked}");
    let status = get(cluster.http, "/status/history").await.json();
    assert!(!status["samples"].as_array().unwrap().is_empty(), "{status}");
}

/// And one that never answers keeps what another says waiting for a moment only.
#[tokio::test]
async fn a_router_that_was_too_slow_once_is_heard_when_it_is_slow() {
    let cluster = Cluster::start(|_| vec![]).await;
    for (takes, status) in [(2500, 503), (1000, 200), (1000, 200)] {
        cluster.fake.status_takes.store(takes, SeqCst);
        let reply = get(cluster.http, "/status").await;
        assert_eq!(reply.status, status, "{takes} ms: {}", reply.body);
    }
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = format!("http://{}", silent.local_addr().unwrap());
    let cluster = Cluster::with(|_| vec![], |config| config.routers.push(silent)).await;
    let began = Instant::now();
    assert_eq!(get(cluster.http, "/status").await.status, 200);
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
}

#[tokio::test]
async fn silence_and_slowness_have_their_bounds() {
    let impatient = |config: &mut gateway::Config| {
        (config.timeouts.silence_ms, config.timeouts.resume_ms) = (1000, 100);
    };
    let silent = Cluster::with(|_| vec![Act::Silence], impatient).await;
    let mute = Cluster::with(|request| broken(request, Act::Silence), impatient).await;
    let slow =
        Cluster::with(|request| broken(request, Act::Hang), |config| config.timeouts.request_ms = 2000).await;
    let (silent, mute, whole, streamed) = tokio::join!(
        silent.chat(json!({})),
        mute.chat(json!({})),
        slow.chat(json!({})),
        slow.chat(json!({"stream": true}))
    );
    assert_eq!(silent.error(), (503, String::new(), "server_overloaded".into()));
    assert_eq!(mute.error().2, "worker_lost");
    assert_eq!(whole.error(), (504, String::new(), "timeout".into()));
    assert!(streamed.body.contains("\"code\":\"timeout\""), "{}", streamed.body);
    slow.left(2).await;
}

/// A request may be what kills routers: there is an end to it, however many there are to be asked.
#[tokio::test]
async fn a_request_takes_no_more_than_four_routers_along() {
    let mut fakes = Vec::new();
    for _ in 0..6 {
        fakes.push(serve_fake(Box::new(|_: &GenerateRequest| vec![Act::Vanish])).await);
    }
    let addresses = fakes.iter().map(|(_, address)| format!("http://{address}")).collect();
    let cluster =
        Cluster::with(|request| answer(request, "unused"), |config| config.routers = addresses).await;
    assert_eq!(cluster.chat(json!({})).await.error().2, "worker_lost");
    let asked: usize = fakes.iter().map(|(fake, _)| fake.asked.lock().unwrap().len()).sum();
    assert_eq!(asked, 4);
}

/// Token ids of one tokenizer are other text in another.
#[tokio::test]
async fn workers_with_other_files_of_the_model_are_not_asked() {
    let own = proto::files_fingerprint(&crate::fake::checkpoint()).unwrap();
    for (files, match_files, serves) in
        [(own, true, true), (0, true, true), (7, true, false), (7, false, true)]
    {
        let cluster =
            Cluster::with(|request| answer(request, "yes"), |config| config.match_files = match_files).await;
        cluster.fake.members.lock().unwrap()[0].files_fingerprint = files;
        let ready = cluster.ready(if serves { 200 } else { 503 }, "").await;
        let reply = cluster.chat(json!({})).await;
        assert_eq!(reply.status, ready.status, "{}", reply.body);
        if !serves {
            for part in [format!("{own:016x}"), format!("{files:016x}")] {
                assert!(ready.body.contains(&part) && reply.body.contains(&part), "{part}: {}", ready.body);
            }
            assert!(cluster.asked().is_empty());
        }
    }
}
