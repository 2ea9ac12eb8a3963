//! Workers die, clients leave, requests are nonsense: what was touched ends in an answer or a clear error, the rest goes on,
//! and nothing stays held.

use crate::harness::{Answer, Ask, Cluster, Worker, alone, baton, block_on, golden};
use futures::future::join_all;
use http_body_util::BodyExt;
use hyper::{Method, StatusCode};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    future::Future,
    process::Stdio,
    time::{Duration, Instant},
};
use tokio::{
    process::{Child, Command},
    time::sleep,
};

const PAIRS: [&str; 6] = ["--prefill", "2", "--decode", "2", "--threads", "1"];

#[test]
fn faults_prefill_killed() {
    let _alone = alone();
    survives(Fault { role: "prefill", arguments: &PAIRS, signal: Signal::KILL });
}

#[test]
fn faults_decode_killed() {
    let _alone = alone();
    survives(Fault { role: "decode", arguments: &PAIRS, signal: Signal::KILL });
}

#[test]
fn faults_the_only_decode_worker_killed() {
    let _alone = alone();
    survives(Fault { role: "decode", arguments: &["--threads", "1"], signal: Signal::KILL });
}

/// Its sockets stay open; only its silence tells.
#[test]
fn faults_decode_stopped_in_its_tracks() {
    let _alone = alone();
    let impatient = ["--router-set", "liveness.silence_ms=2500", "--worker-set", "liveness.silence_ms=2500"];
    survives(Fault { role: "decode", arguments: &[&PAIRS[..], &impatient].concat(), signal: Signal::STOP });
}

/// A decode worker beside those of the cluster, whose device breaks in its 40th step: it says so, ends with an error, leaves
/// the membership at once, and every answer is whole.
#[test]
fn faults_a_device_that_fails_ends_its_worker_and_no_request() {
    let _alone = alone();
    let cluster = Cluster::up(&["--threads", "1"]);
    block_on(async {
        let asks: Vec<Ask> = (0..16).map(|n| Ask::new(&golden::prose(100 + 20 * n, n), 60)).collect();
        let expected = join_all(asks.iter().map(|ask| ask.send(&cluster))).await;
        let victim = start_failing(&cluster, 40);
        let pid = victim.id().expect("it runs");
        until(|| async { members(&cluster).await.iter().any(|member| member["pid"] == pid) }).await;
        let found = join_all(asks.iter().map(|ask| ask.send(&cluster))).await;
        let ended = victim.wait_with_output().await.unwrap();
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert_eq!(ended.status.code(), Some(1), "{said}");
        let last = said.lines().last().unwrap_or_default();
        assert!(last.contains("step 40: device: it was told to fail"), "{said}");
        assert!(last.contains("must be started again"), "{said}");
        for (found, expected) in found.iter().zip(&expected) {
            assert!(is_answer(found, expected), "one worker is left and takes what the other lost");
        }
        assert!(members(&cluster).await.iter().all(|member| member["pid"] != pid), "it gave its lease back");
        cluster.assert_idle().await;
    });
}

fn start_failing(cluster: &Cluster, step: u32) -> Child {
    let registry = format!("membership.registry={:?}", cluster.router.grpc);
    let fail = format!("debug.fail_step={step}");
    Command::new(baton())
        .args(["worker", "--role", "decode", "--set", &registry, "--set", &fail, "--set", "threads=1"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("baton starts")
}

async fn until<F: Future<Output = bool>>(holds: impl Fn() -> F) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds().await {
        assert!(Instant::now() < deadline, "waited in vain");
        sleep(Duration::from_millis(20)).await;
    }
}

struct Fault<'a> {
    role: &'a str,
    arguments: &'a [&'a str],
    signal: Signal,
}

/// Undisturbed, every request has its answer; with a worker lost among them, every request ends in that same answer or
/// in a clear error, and those that did not need the worker in the answer.
fn survives(fault: Fault) {
    let cluster = Cluster::up(fault.arguments);
    block_on(async {
        let asks: Vec<Ask> =
            (0..24).map(|n| Ask::new(&golden::prose(200 + 20 * n, n), 60).with("seed", n as i64)).collect();
        let expected = join_all(asks.iter().map(|ask| ask.send(&cluster))).await;
        cluster.assert_idle().await;
        let victim = cluster.worker(fault.role).clone();
        let ((), found) = tokio::join!(
            strike(&cluster, &victim, fault.signal),
            join_all(asks.iter().map(|ask| ask.send(&cluster)))
        );
        let answered =
            found.iter().zip(&expected).filter(|(found, expected)| is_answer(found, expected)).count();
        println!("{} {:?}: {answered} of {} answered", victim.name, fault.signal, asks.len());
        assert!(answered >= asks.len() / 2, "those that never touched the victim must be answered");
        let lost = cluster.metric(&cluster.router, "baton_router_placements_total", "failed").await;
        assert!(lost > 0.0, "the victim had no work: the test shows nothing");
        match fault.signal {
            Signal::STOP => victim.signal(Signal::CONT),
            _ => used_again(&cluster, &victim).await,
        }
        cluster.assert_idle().await;
    });
}

/// Once the victim has several sequences.
async fn strike(cluster: &Cluster, victim: &Worker, signal: Signal) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while cluster.pool(victim).await.running < 3 {
        assert!(Instant::now() < deadline, "{} never has three sequences", victim.name);
        sleep(Duration::from_millis(5)).await;
    }
    victim.signal(signal);
}

type Outcome = Result<Answer, (StatusCode, String)>;

/// Whether it is the expected answer; panics unless it is that or a clear error.
fn is_answer(found: &Outcome, expected: &Outcome) -> bool {
    let expected = expected.as_ref().expect("undisturbed, every request is answered");
    match found {
        Ok(answer) => assert_eq!(answer.said(), expected.said()),
        Err((status, body)) => {
            let error: Value = serde_json::from_str(body).unwrap_or_else(|_| panic!("{status}: {body}"));
            assert!(status.is_server_error() && error["error"]["message"].is_string(), "{status}: {body}");
            println!("{status}: {body}");
        }
    }
    found.is_ok()
}

/// `up` starts the victim's successor; it must get work as soon as it has joined.
async fn used_again(cluster: &Cluster, victim: &Worker) {
    let known: BTreeSet<u32> = cluster.workers.iter().map(|worker| worker.pid).collect();
    let deadline = Instant::now() + Duration::from_secs(30);
    let successor = loop {
        let found = members(cluster).await.into_iter().find(|member| {
            member["role"] == victim.role.as_str()
                && !known.contains(&(member["pid"].as_u64().unwrap() as u32))
        });
        if let Some(member) = found {
            break member["id"].as_str().unwrap().to_owned();
        }
        assert!(Instant::now() < deadline, "no successor of {} joined", victim.name);
        sleep(Duration::from_millis(50)).await;
    };
    let header = format!("x-baton-{}", victim.role);
    for salt in 40..80 {
        let ask = Ask::new(&golden::prose(70, salt), 2);
        let response = cluster.http.open(Method::POST, "/v1/completions", ask.body(cluster)).await.unwrap();
        assert!(response.status().is_success());
        if response.headers().get(&header).is_some_and(|by| by == successor.as_str()) {
            return;
        }
    }
    panic!("{successor} got no work");
}

async fn members(cluster: &Cluster) -> Vec<Value> {
    let (_, body) = cluster.http.get("/status").await.unwrap();
    serde_json::from_slice::<Value>(&body).unwrap()["members"].as_array().unwrap().clone()
}

/// Within a second, of which a busy machine makes a few: that the answer was not at its end anyhow, the gateway's count says.
#[test]
fn faults_a_client_that_leaves_frees_its_blocks_at_once() {
    let _alone = alone();
    let cluster = Cluster::up(&["--chunk", "32", "--threads", "1"]);
    block_on(async {
        for (left, (prompt, tokens, leave_after)) in (1..).zip([(20, 1500, 3), (1800, 200, 0), (64, 1500, 1)])
        {
            let ask = Ask::new(&golden::prose(prompt, 3), tokens).with("stream", true);
            let mut sent = Box::pin(cluster.http.open(Method::POST, "/v1/completions", ask.body(&cluster)));
            if leave_after == 0 {
                // Headers wait for the first event: leave while prefill computes.
                let prefill = cluster.worker("prefill");
                tokio::select! {
                    _ = &mut sent => {}
                    () = until(|| async { cluster.pool(prefill).await.running > 0 }) => {}
                }
                drop(sent);
            } else {
                let mut body = sent.await.unwrap().into_body();
                for _ in 0..leave_after {
                    body.frame().await.unwrap().unwrap();
                }
                let decode = cluster.pool(cluster.worker("decode")).await;
                assert!(decode.blocks.held > 0 || decode.running > 0, "{decode:?}");
                drop(body);
            }
            cluster.assert_idle_within(Duration::from_secs(5)).await;
            let requests =
                || cluster.metric(&cluster.gateway, "baton_gateway_requests_total", r#"code="499""#);
            until(|| async { requests().await == f64::from(left) }).await;
        }
    });
}

#[test]
fn faults_nonsense_is_refused_by_name() {
    let _alone = alone();
    let cluster = Cluster::up(&["--kv-blocks", "16"]);
    block_on(async {
        let long: Vec<u32> = golden::prose(2040, 0);
        let too_many: Vec<u32> = golden::prose(1100, 0);
        for (mut body, status, part) in [
            (json!({"prompt": long, "max_tokens": 100}), 400, "context_length_exceeded"),
            (json!({"prompt": too_many, "max_tokens": 10}), 400, "context_length_exceeded"),
            (json!({"prompt": [4096], "max_tokens": 1}), 400, "prompt"),
            (json!({"prompt": "x", "model": "gpt-9"}), 404, "model_not_found"),
            (json!({"prompt": "x", "temperature": -1}), 400, "temperature"),
            (json!({"prompt": "x", "suffix": "y"}), 400, "suffix"),
            (json!({"prompt": "x", "n": 0}), 400, "n"),
            (json!({"prompt": []}), 400, "prompt"),
        ] {
            let fields = body.as_object_mut().unwrap();
            fields.entry("model").or_insert_with(|| json!(cluster.model));
            let (found, answer) = cluster.http.post("/v1/completions", body.to_string()).await.unwrap();
            let answer = String::from_utf8_lossy(&answer).into_owned();
            assert_eq!(found.as_u16(), status, "{body:.100}: {answer}");
            let error: Value = serde_json::from_str(&answer).unwrap();
            assert!(error["error"]["message"].is_string() && answer.contains(part), "{answer}");
        }
        cluster.assert_idle().await;
    });
}
