//! Limits over real sockets: each refuses by its own name and status, and nothing that is refused reaches the router.

use crate::client::{Live, get, post, request};
use crate::fake::{Cluster, answer, chat, completion, endless};
use proto::ErrorCode;
use serde_json::json;
use std::time::Duration;

const JSON: &str = "content-type: application/json\r\n";
const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn heads_are_bounded_in_fields_and_bytes() {
    let configure = |config: &mut gateway::Config| {
        config.limits.headers = 20;
        config.limits.header_bytes = 2000;
    };
    let cluster = Cluster::with(|request| answer(request, "yes"), configure).await;
    let body = chat(json!({})).to_string();
    let fields =
        |count: usize| format!("{JSON}{}", (0..count).map(|i| format!("x-{i}: y\r\n")).collect::<String>());
    // host, connection and content-length are there already, and content-type.
    assert_eq!(request(cluster.http, "POST", CHAT, &fields(16), &body).await.status, 200);
    let many = request(cluster.http, "POST", CHAT, &fields(17), &body).await;
    assert_eq!(many.error(), (431, String::new(), "headers_too_large".into()));
    assert!(many.body.contains("21 header fields") && many.body.contains("at most 20"), "{}", many.body);
    let large = format!("{JSON}x-large: {}\r\n", "x".repeat(2000));
    let refused = request(cluster.http, "POST", CHAT, &large, &body).await;
    assert_eq!(refused.error(), (431, String::new(), "headers_too_large".into()));
    let path = format!("/v1/models?{}", "x".repeat(2000));
    assert_eq!(get(cluster.http, &path).await.status, 431);
    for far_beyond in [fields(100), format!("{JSON}x-large: {}\r\n", "x".repeat(20_000))] {
        assert_eq!(request(cluster.http, "POST", CHAT, &far_beyond, &body).await.status, 431);
    }
    assert_eq!(cluster.asked().len(), 1);
}

#[tokio::test]
async fn a_head_that_comes_byte_by_byte_is_cut_off() {
    let cluster =
        Cluster::with(|request| answer(request, "yes"), |config| config.timeouts.header_ms = 300).await;
    let mut slow = Live::raw(cluster.http, "GET /v1/models HTTP/1.1\r\nhost: t\r\nx-a").await;
    assert!(slow.quiet_for(150).await, "not before its time");
    slow.finish().await;
    let reply = slow.reply();
    assert_eq!(reply.error(), (408, String::new(), "timeout".into()));
    assert_eq!(reply.header("connection"), Some("close"));
    // An idle connection is closed without a word.
    let mut idle = Live::raw(cluster.http, "GET /health HTTP/1.1\r\nhost: t\r\n\r\n").await;
    idle.finish().await;
    assert_eq!(idle.reply().status, 200);
    assert_eq!(idle.reply().body, "ok\n");
}

#[tokio::test]
async fn more_connections_than_places_are_told_so() {
    let configure = |config: &mut gateway::Config| {
        config.limits.connections = 2;
        config.timeouts.retry_after_ms = 1500;
    };
    let cluster = Cluster::with(|request| endless(request, "one"), configure).await;
    let mut first = Live::post(cluster.http, CHAT, &chat(json!({"stream": true}))).await;
    first.until("one").await;
    let second = Live::raw(cluster.http, "GET ").await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let third = get(cluster.http, "/health").await;
    assert_eq!(third.error(), (503, String::new(), "server_overloaded".into()));
    assert_eq!((third.header("retry-after"), third.header("retry-after-ms")), (Some("2"), Some("1500")));
    assert_eq!(get(cluster.admin, "/health").await.status, 200, "the admin port has places of its own");
    drop(second);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(get(cluster.http, "/health").await.status, 200);
}

const PIECE: &[u8] = &[b' '; 256 << 10];

/// Begins a request that is refused by its head, with a body of this many pieces to come.
async fn refused(cluster: &Cluster, path: &str, content_type: &str, pieces: usize) -> Live {
    let length = pieces * PIECE.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: t\r\ncontent-type: {content_type}\r\ncontent-length: {length}\r\n\r\n"
    );
    Live::raw(cluster.http, &head).await
}

#[tokio::test]
async fn a_refusal_is_there_for_who_first_sends_all_of_a_body() {
    let cluster = Cluster::with(|_| vec![], |_| {}).await;
    for (path, content_type, status) in [(CHAT, "text/plain", 415), ("/v1/none", "application/json", 404)] {
        let mut client = refused(&cluster, path, content_type, 16).await;
        for _ in 0..16 {
            tokio::time::sleep(Duration::from_millis(10)).await;
            client.more(PIECE).await.expect("the connection stands while the body comes");
        }
        client.finish().await;
        assert_eq!(client.reply().status, status);
    }
}

#[tokio::test]
async fn a_refused_body_is_taken_up_to_what_a_body_may_be() {
    let cluster = Cluster::with(|_| vec![], |config| config.limits.body_bytes = 100_000).await;
    let mut client = refused(&cluster, CHAT, "text/plain", 400).await;
    let sending = async {
        for _ in 0..400 {
            client.more(PIECE).await?;
        }
        Ok::<_, std::io::Error>(())
    };
    let sent = tokio::time::timeout(Duration::from_secs(4), sending).await;
    sent.expect("cut off by size, not by time").expect_err("cut off");
}

#[tokio::test]
async fn conversations_are_bounded_in_messages_and_characters() {
    let configure = |config: &mut gateway::Config| {
        config.limits.messages = 3;
        config.limits.characters = 100;
    };
    let cluster = Cluster::with(|request| answer(request, "yes"), configure).await;
    let message = |text: &str| json!({"role": "user", "content": text});
    let messages = |count: usize, text: &str| chat(json!({"messages": vec![message(text); count]}));
    let hidden = chat(json!({"messages": [{"role": "user", "content": "", "name": "x".repeat(101)}]}));
    for (path, body, param, part) in [
        (CHAT, messages(4, "a"), "messages", "found 4 messages, expected at most 3"),
        (CHAT, messages(2, &"é".repeat(51)), "messages", "found 102 characters, expected at most 100"),
        (CHAT, hidden, "messages", "characters"),
        (
            "/v1/completions",
            completion(json!({"prompt": ["a".repeat(50), "b".repeat(51)]})),
            "prompt",
            "found 101",
        ),
    ] {
        let reply = post(cluster.http, path, &body).await;
        assert_eq!(reply.error(), (400, param.into(), "invalid_value".into()), "{}", reply.body);
        assert!(reply.body.contains(part), "{part}: {}", reply.body);
    }
    assert!(cluster.asked().is_empty());
    assert_eq!(post(cluster.http, CHAT, &messages(2, &"é".repeat(50))).await.status, 200);
}

/// A template that looks at every message once for each of them.
#[tokio::test]
async fn a_quadratic_template_is_stopped() {
    let dir = tempfile::TempDir::new().unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"] {
        std::fs::copy(crate::fake::checkpoint().join(file), dir.path().join(file)).unwrap();
    }
    let template = "{% for m in messages %}{% for other in messages %}{% if other.content == 'x' and m.content == 'x' \
                    and loop.index > 99999 %}{{ other.role }}{% endif %}{% endfor %}{% endfor %}end";
    std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    let cluster =
        Cluster::with(|request| answer(request, "yes"), |config| config.model_dir = dir.path().to_owned())
            .await;
    let messages =
        |count: usize| chat(json!({"messages": vec![json!({"role": "user", "content": "x"}); count]}));
    assert_eq!(post(cluster.http, CHAT, &messages(100)).await.status, 200);
    let began = std::time::Instant::now();
    let mut live = Live::post(cluster.http, CHAT, &messages(2048)).await;
    live.finish_within(Duration::from_secs(60)).await;
    let reply = live.reply();
    assert_eq!(reply.error(), (400, "messages".into(), "invalid_value".into()));
    assert!(reply.body.contains("steps for these messages"), "{}", reply.body);
    println!("stopped after {:?}", began.elapsed());
}

#[tokio::test]
async fn a_full_queue_says_when_there_will_be_room() {
    let full = || proto::Error::new(ErrorCode::QueueFull, "full").retry_after(Duration::from_millis(7300));
    for (name, script) in [
        ("as a status", crate::fake::Act::Fail(full())),
        ("as an event", crate::fake::Act::Say(proto::generate_event::Event::Error(full()))),
    ] {
        let cluster = Cluster::start(move |_| vec![script.clone()]).await;
        let reply = cluster.chat(json!({})).await;
        assert_eq!(reply.error(), (503, String::new(), "server_overloaded".into()), "{name}");
        let found = (reply.header("retry-after"), reply.header("retry-after-ms"));
        assert_eq!(found, (Some("8"), Some("7300")), "{name}");
    }
}
