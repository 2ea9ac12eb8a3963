//! API keys over real sockets: who gets in, where each limit lies, what the headers say, and a file that changes.

use crate::client::{Live, Reply, get, request};
use crate::fake::{Cluster, answer, chat, endless};
use gateway::keys::{Limits, NewKey};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const CHAT: &str = "/v1/chat/completions";

/// A file of keys.
struct Keys {
    dir: TempDir,
    entries: Vec<String>,
}

impl Keys {
    fn new() -> Self {
        Keys { dir: TempDir::new().unwrap(), entries: Vec::new() }
    }

    fn add(&mut self, name: &str, limits: Limits, admin: bool) -> String {
        let new = NewKey::generate(name, limits, admin).unwrap();
        self.entries.push(new.entry.to_toml().unwrap());
        self.write(&self.entries.concat());
        new.key
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("keys.toml")
    }

    fn write(&self, text: &str) {
        std::fs::write(self.path(), text).unwrap();
    }

    async fn cluster(&self) -> Cluster {
        Cluster::with(|request| answer(request, "yes"), |config| config.keys.file = Some(self.path())).await
    }
}

fn bearer(key: &str) -> String {
    format!("content-type: application/json\r\nauthorization: Bearer {key}\r\n")
}

async fn ask(cluster: &Cluster, key: &str, extra: Value) -> Reply {
    request(cluster.http, "POST", CHAT, &bearer(key), &chat(extra).to_string()).await
}

/// A gateway with a stream of this key that goes on for ever.
async fn streaming(keys: &Keys, key: &str, configure: impl FnOnce(&mut gateway::Config)) -> (Cluster, Live) {
    let with_keys = |config: &mut gateway::Config| {
        config.keys.file = Some(keys.path());
        configure(config);
    };
    let cluster = Cluster::with(|request| endless(request, "one"), with_keys).await;
    let stream = stream(&cluster, key).await;
    (cluster, stream)
}

async fn stream(cluster: &Cluster, key: &str) -> Live {
    let body = chat(json!({"stream": true})).to_string();
    let mut stream = Live::send(cluster.http, "POST", CHAT, &bearer(key), &body).await;
    stream.until("one").await;
    stream
}

#[tokio::test]
async fn only_known_keys_get_in_and_only_admins_see_the_process() {
    let mut keys = Keys::new();
    let (user, admin) =
        (keys.add("user", Limits::default(), false), keys.add("ops", Limits::default(), true));
    let cluster = keys.cluster().await;
    let refused = cluster.chat(json!({})).await;
    assert_eq!(refused.error(), (401, String::new(), "invalid_api_key".into()));
    assert!(refused.header("x-request-id").is_some());
    let last = if user.ends_with('0') { 1 } else { 0 };
    let wrong = format!("{}{last}", &user[..user.len() - 1]);
    assert_eq!(ask(&cluster, &wrong, json!({})).await.status, 401);
    assert_eq!(ask(&cluster, "sk-none", json!({})).await.status, 401);
    assert!(cluster.asked().is_empty());
    assert_eq!(ask(&cluster, &user, json!({})).await.status, 200);
    assert_eq!(cluster.asked()[0].tenant, "user");
    for path in ["/health", "/ready"] {
        assert_eq!(get(cluster.http, path).await.status, 200, "{path}");
    }
    for path in ["/v1/models", "/status", "/metrics", "/v1/embeddings"] {
        assert_eq!(get(cluster.http, path).await.status, 401, "{path}");
    }
    for (key, path, status) in [
        (&user, "/v1/models", 200),
        (&user, "/status", 200),
        (&user, "/metrics", 403),
        (&admin, "/metrics", 200),
        (&admin, "/v1/models", 200),
    ] {
        assert_eq!(request(cluster.http, "GET", path, &bearer(key), "").await.status, status, "{path}");
    }
    assert_eq!(get(cluster.admin, "/metrics").await.status, 200, "the admin port lies apart");
}

#[tokio::test]
async fn a_record_is_shown_to_whose_it_is_and_to_operators() {
    let mut keys = Keys::new();
    let (one, other) =
        (keys.add("one", Limits::default(), false), keys.add("other", Limits::default(), false));
    let admin = keys.add("ops", Limits::default(), true);
    let cluster = keys.cluster().await;
    let asked = ask(&cluster, &one, json!({})).await;
    let path = format!("/trace/{}", asked.header("x-request-id").unwrap());
    let shown = async |key: &str| request(cluster.http, "GET", &path, &bearer(key), "").await.status;
    assert_eq!((shown(&one).await, shown(&other).await, shown(&admin).await), (200, 404, 200));
    assert_eq!(get(cluster.http, &path).await.status, 401);
    assert_eq!(get(cluster.admin, &path).await.status, 200, "the admin port lies apart");
}

#[tokio::test]
async fn requests_a_minute_are_exact_and_each_tenant_has_its_own() {
    let mut keys = Keys::new();
    let limits = |n| Limits { requests_per_minute: Some(n), ..Limits::default() };
    let (one, other) = (keys.add("one", limits(3), false), keys.add("other", limits(1), false));
    let cluster = keys.cluster().await;
    let began = Instant::now();
    for left in ["2", "1", "0"] {
        let reply = ask(&cluster, &one, json!({})).await;
        assert_eq!((reply.status, reply.header("x-ratelimit-remaining-requests")), (200, Some(left)));
        assert_eq!(reply.header("x-ratelimit-limit-requests"), Some("3"));
        assert!(reply.header("x-ratelimit-limit-tokens").is_none());
    }
    let refused = ask(&cluster, &one, json!({})).await;
    assert_eq!(refused.error(), (429, String::new(), "rate_limit_exceeded".into()));
    assert_eq!(refused.json()["error"]["type"], "requests");
    let (after, ms) = (refused.header("retry-after").unwrap(), refused.header("retry-after-ms").unwrap());
    let (after, ms): (u64, u64) = (after.parse().unwrap(), ms.parse().unwrap());
    let least = 20_000u64.saturating_sub(began.elapsed().as_millis() as u64 + 1);
    assert!((least..=20_000).contains(&ms) && after == ms.div_ceil(1000), "{after} s, {ms} ms");
    assert_eq!(ask(&cluster, &other, json!({})).await.status, 200);
    assert_eq!(cluster.asked().len(), 4);
    let page = get(cluster.admin, "/metrics").await.body;
    assert!(page.contains("baton_gateway_limited_total{tenant=\"one\",limit=\"requests\"} 1"), "{page}");
}

/// The records of as many requests are kept.
const RECORDS: usize = 256;

#[tokio::test]
async fn refusals_by_a_limit_push_out_nobodys_record() {
    let mut keys = Keys::new();
    let once = Limits { requests_per_minute: Some(1), ..Limits::default() };
    let (flood, steady) = (keys.add("flood", once, false), keys.add("steady", Limits::default(), false));
    let cluster = keys.cluster().await;
    assert_eq!(ask(&cluster, &flood, json!({})).await.status, 200);
    let asked = ask(&cluster, &steady, json!({})).await;
    for _ in 0..RECORDS {
        assert_eq!(ask(&cluster, &flood, json!({})).await.status, 429);
    }
    let path = format!("/trace/{}", asked.header("x-request-id").unwrap());
    assert_eq!(get(cluster.admin, &path).await.status, 200);
    let page = get(cluster.admin, "/metrics").await.body;
    let refused = format!("baton_gateway_limited_total{{tenant=\"flood\",limit=\"requests\"}} {RECORDS}");
    assert!(page.contains(&refused) && page.contains("baton_request_seconds_count 2"), "{page}");
}

#[tokio::test]
async fn tokens_are_charged_for_what_may_come_and_given_back_for_what_did_not() {
    let mut keys = Keys::new();
    let key = keys.add("t", Limits { tokens_per_minute: Some(200), ..Limits::default() }, false);
    let cluster = keys.cluster().await;
    let began = Instant::now();
    let reply = ask(&cluster, &key, json!({"max_tokens": 160})).await;
    let used = reply.json()["usage"]["total_tokens"].as_u64().unwrap();
    let left: u64 = reply.header("x-ratelimit-remaining-tokens").unwrap().parse().unwrap();
    let refilled = began.elapsed().as_millis() as u64 * 200 / 60_000;
    assert!((200 - used..=200 - used + refilled + 1).contains(&left), "{left} left, {used} used");
    // 2 x 120 for the choices is more than there is, but what a full bucket holds may be had.
    let refused = ask(&cluster, &key, json!({"max_tokens": 120, "n": 2})).await;
    assert_eq!((refused.status, refused.json()["error"]["type"].clone()), (429, json!("tokens")));
    let ms: u64 = refused.header("retry-after-ms").unwrap().parse().unwrap();
    assert!(ms <= used * 300, "{ms} ms for {used} tokens");
    assert_eq!(refused.header("x-ratelimit-limit-tokens"), Some("200"));
    tokio::time::sleep(Duration::from_millis(ms)).await;
    assert_eq!(ask(&cluster, &key, json!({"max_tokens": 120, "n": 2})).await.status, 200, "exactly then");
}

#[tokio::test]
async fn who_has_no_token_left_is_refused_before_the_body_is_read() {
    let mut keys = Keys::new();
    let key = keys.add("t", Limits { tokens_per_minute: Some(10), ..Limits::default() }, false);
    let (cluster, _first) = streaming(&keys, &key, |_| {}).await;
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: t\r\ncontent-length: 1000\r\n{}\r\n", bearer(&key));
    let mut second = Live::raw(cluster.http, &head).await;
    second.finish().await;
    let refused = second.reply();
    assert_eq!((refused.status, refused.json()["error"]["type"].clone()), (429, json!("tokens")));
    let ms: u64 = refused.header("retry-after-ms").unwrap().parse().unwrap();
    assert!((1000..=6000).contains(&ms), "{ms} ms until there is a token");
}

#[tokio::test]
async fn what_a_full_gateway_refuses_costs_the_key_nothing() {
    let mut keys = Keys::new();
    let key = keys.add("t", Limits { requests_per_minute: Some(2), ..Limits::default() }, false);
    let narrow = |config: &mut gateway::Config| config.limits.concurrent_requests = 1;
    let (cluster, _first) = streaming(&keys, &key, narrow).await;
    let refused = ask(&cluster, &key, json!({})).await;
    assert_eq!((refused.status, refused.header("x-ratelimit-remaining-requests")), (503, Some("1")));
}

#[tokio::test]
async fn a_stream_holds_its_place_until_the_client_leaves() {
    let mut keys = Keys::new();
    let key = keys.add("t", Limits { concurrency: Some(1), ..Limits::default() }, false);
    let (cluster, first) = streaming(&keys, &key, |_| {}).await;
    let refused = ask(&cluster, &key, json!({})).await;
    assert_eq!((refused.status, refused.json()["error"]["type"].clone()), (429, json!("concurrency")));
    assert!(refused.header("retry-after").is_some());
    drop(first);
    cluster.left(1).await;
    stream(&cluster, &key).await;
}

#[tokio::test]
async fn priorities_have_a_ceiling_for_all_and_one_for_the_key() {
    let mut keys = Keys::new();
    let batch = keys.add("batch", Limits { priority_min: Some(5), ..Limits::default() }, false);
    let online = keys.add("online", Limits::default(), false);
    let cluster = keys.cluster().await;
    for (key, asked, found) in [
        (&batch, json!(null), Some(5)),
        (&batch, json!(7), Some(7)),
        (&batch, json!(4), None),
        (&batch, json!(11), None),
        (&online, json!(null), Some(0)),
        (&online, json!(-10), Some(-10)),
        (&online, json!(-11), None),
    ] {
        let before = cluster.asked().len();
        let reply = ask(&cluster, key, json!({"priority": asked})).await;
        let sent = cluster.asked().get(before).map(|request| request.sequence.as_ref().unwrap().priority);
        assert_eq!(sent, found, "{asked}: {}", reply.body);
        if found.is_none() {
            assert_eq!(reply.error(), (400, "priority".into(), "invalid_value".into()));
        }
    }
}

#[tokio::test]
async fn a_file_that_changes_is_taken_up_and_a_bad_one_is_not() {
    let mut keys = Keys::new();
    let old = keys.add("t", Limits::default(), false);
    let cluster = keys.cluster().await;
    assert_eq!(ask(&cluster, &old, json!({})).await.status, 200);
    keys.write("[[key]]\nid = 3");
    cluster.until_metric("baton_credentials_stale{what=\"keys\"} 1").await;
    assert_eq!(ask(&cluster, &old, json!({})).await.status, 200, "the old keys hold");
    keys.entries.clear();
    let new = keys.add("t", Limits::default(), false);
    cluster.until_metric("baton_credentials_stale{what=\"keys\"} 0").await;
    assert_eq!(ask(&cluster, &new, json!({})).await.status, 200);
    assert_eq!(ask(&cluster, &old, json!({})).await.status, 401);
}
