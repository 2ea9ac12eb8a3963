//! Orders to workers: who may give them, what the worker is told and where, and that its refusal is passed on in words.

use crate::client::{Reply, request};
use crate::fake::{Cluster, answer};
use gateway::keys::{Limits, NewKey};
use proto::Member;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

const TOKEN: &str = "0123456789-0123456789";

/// A worker's admin port that gives one answer, and remembers what it was asked.
struct Worker {
    at: SocketAddr,
    heard: Arc<Mutex<Vec<String>>>,
}

impl Worker {
    async fn says(status: &'static str, body: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (at, heard) = (listener.local_addr().unwrap(), Arc::new(Mutex::new(Vec::new())));
        let hears = heard.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut bytes = [0; 4096];
                let length = stream.read(&mut bytes).await.unwrap();
                hears.lock().unwrap().push(String::from_utf8_lossy(&bytes[..length]).to_lowercase());
                let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n", body.len());
                stream.write_all((head + body).as_bytes()).await.unwrap();
            }
        });
        Worker { at, heard }
    }

    fn heard(&self) -> Vec<String> {
        self.heard.lock().unwrap().clone()
    }
}

struct Files(TempDir);

impl Files {
    fn new() -> Self {
        let files = Files(TempDir::new().unwrap());
        std::fs::write(files.token(), TOKEN).unwrap();
        files
    }

    fn token(&self) -> PathBuf {
        self.0.path().join("token")
    }
}

async fn cluster(worker: SocketAddr, configure: impl FnOnce(&mut gateway::Config)) -> Cluster {
    let cluster = Cluster::with(|request| answer(request, "yes"), configure).await;
    let member =
        |id: &str| Member { id: id.into(), admin_address: format!("http://{worker}"), ..Member::default() };
    *cluster.fake.members.lock().unwrap() = vec![member("decode-1"), member("prefill-1")];
    cluster
}

async fn order(cluster: &Cluster, member: &str, bearer: &str) -> Reply {
    let headers = match bearer {
        "" => String::new(),
        bearer => format!("authorization: Bearer {bearer}\r\norigin: http://page\r\n"),
    };
    request(cluster.http, "POST", &format!("/status/members/{member}/drain"), &headers, "").await
}

fn message(reply: &Reply) -> String {
    reply.json()["error"]["message"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn the_worker_that_is_meant_is_told_with_the_same_token() {
    let (files, worker) = (Files::new(), Worker::says("202 Accepted", "{}").await);
    let cluster = cluster(worker.at, |config| config.admin_token_file = Some(files.token())).await;
    let told = order(&cluster, "decode-1", TOKEN).await;
    assert_eq!((told.status, told.json()["member"].as_str()), (202, Some("decode-1")), "{}", told.body);
    let [heard] = &worker.heard()[..] else { panic!("{:?}", worker.heard()) };
    assert!(heard.starts_with("post /drain?member=decode-1 http/1.1"), "{heard}");
    assert!(heard.contains(&format!("authorization: bearer {TOKEN}")), "{heard}");
    assert!(!heard.contains("origin:"), "a worker refuses pages: {heard}");
}

#[tokio::test]
async fn nobody_without_the_token_reaches_a_worker() {
    let (files, worker) = (Files::new(), Worker::says("202 Accepted", "{}").await);
    let bare = cluster(worker.at, |_| {}).await;
    let refused = order(&bare, "decode-1", TOKEN).await;
    assert_eq!(refused.error(), (403, String::new(), "admin_only".into()));
    assert!(message(&refused).contains("admin_token_file"), "{}", refused.body);
    let cluster = cluster(worker.at, |config| config.admin_token_file = Some(files.token())).await;
    for bearer in ["", "0123456789-012345678_"] {
        let refused = order(&cluster, "decode-1", bearer).await;
        assert_eq!(refused.error(), (401, String::new(), "invalid_admin_token".into()), "{bearer:?}");
    }
    assert_eq!(worker.heard(), [""; 0]);
}

#[tokio::test]
async fn an_api_key_is_no_admin_token_and_the_token_needs_no_key() {
    let (files, worker) = (Files::new(), Worker::says("202 Accepted", "{}").await);
    let new = NewKey::generate("ops", Limits::default(), true).unwrap();
    let keys = files.0.path().join("keys.toml");
    std::fs::write(&keys, new.entry.to_toml().unwrap()).unwrap();
    let configure = |config: &mut gateway::Config| {
        (config.admin_token_file, config.keys.file) = (Some(files.token()), Some(keys));
    };
    let cluster = cluster(worker.at, configure).await;
    assert_eq!(order(&cluster, "decode-1", &new.key).await.status, 401);
    assert_eq!(order(&cluster, "decode-1", TOKEN).await.status, 202);
}

#[tokio::test]
async fn an_unknown_member_is_told_who_there_is() {
    let (files, worker) = (Files::new(), Worker::says("202 Accepted", "{}").await);
    let cluster = cluster(worker.at, |config| config.admin_token_file = Some(files.token())).await;
    let refused = order(&cluster, "decode-2", TOKEN).await;
    assert_eq!(refused.error(), (404, String::new(), "member_not_found".into()));
    assert!(message(&refused).ends_with("there are: decode-1, prefill-1"), "{}", refused.body);
    assert_eq!(worker.heard(), [""; 0]);
}

#[tokio::test]
async fn what_a_worker_says_against_it_is_passed_on() {
    let (files, worker) =
        (Files::new(), Worker::says("403 Forbidden", "this is not the admin token\n").await);
    let cluster = cluster(worker.at, |config| config.admin_token_file = Some(files.token())).await;
    let refused = order(&cluster, "decode-1", TOKEN).await;
    assert_eq!(refused.error(), (502, String::new(), "worker_refused".into()));
    for part in ["decode-1", "403", "this is not the admin token", "same token"] {
        assert!(message(&refused).contains(part), "{part}: {}", refused.body);
    }
}

#[tokio::test]
async fn a_worker_that_cannot_be_reached_or_does_not_answer_is_named() {
    let files = Files::new();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gone = SocketAddr::from(([127, 0, 0, 1], 1));
    let breaks_off = Worker::says("", "").await;
    for (at, status, part) in [
        (gone, 502, "decode-1 cannot be told at"),
        (silent.local_addr().unwrap(), 504, "Whether decode-1 was told at"),
        (breaks_off.at, 502, "Whether decode-1 was told at"),
    ] {
        let cluster = cluster(at, |config| config.admin_token_file = Some(files.token())).await;
        let failed = order(&cluster, "decode-1", TOKEN).await;
        assert_eq!(failed.status, status, "{}", failed.body);
        assert!(message(&failed).starts_with(&format!("{part} http://{at}")), "{}", failed.body);
        assert_eq!(message(&failed).contains("look at /status"), at != gone, "{}", failed.body);
    }
}

#[tokio::test]
async fn the_status_says_what_a_worker_did_however_much_else_it_says() {
    let (files, much): (_, &str) = (Files::new(), "x".repeat(5000).leak());
    for (says, expected) in [("202 Accepted", 202), ("409 Conflict", 502)] {
        let worker = Worker::says(says, much).await;
        let cluster = cluster(worker.at, |config| config.admin_token_file = Some(files.token())).await;
        let told = order(&cluster, "decode-1", TOKEN).await;
        assert_eq!(told.status, expected, "{}", told.body);
        assert_eq!(told.body.contains("worker_refused"), expected == 502, "{}", told.body);
    }
}
