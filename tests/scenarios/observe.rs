//! What a running cluster shows of itself: every metric of the outward contract on the service that it belongs to, health and
//! readiness of each, one trace id in the logs of all four, and gRPC services that say what they are.

use crate::harness::{Cluster, Worker, alone, baton, block_on};
use serde_json::{Value, json};
use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::sleep,
};
use tonic::transport::Endpoint;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

/// Name of a sample, and the labels that it carries.
type Metric = (&'static str, &'static [&'static str]);

const GATEWAY: &[Metric] = &[
    ("baton_gateway_requests_total", &["endpoint", "code"]),
    ("baton_time_to_first_token_seconds_count", &[]),
    ("baton_inter_token_latency_seconds_count", &[]),
    ("baton_request_seconds_count", &[]),
    ("baton_prompt_tokens_total", &[]),
    ("baton_completion_tokens_total", &[]),
    ("baton_cached_prompt_tokens_total", &[]),
];
const ROUTER: &[Metric] = &[
    ("baton_router_queue_depth", &["class"]),
    ("baton_router_queue_seconds_count", &[]),
    ("baton_router_placements_total", &["outcome"]),
    ("baton_migrations_total", &["cause"]),
    ("baton_members", &["role", "state"]),
];
const WORKER: &[Metric] = &[
    ("baton_kv_blocks", &["role", "state"]),
    ("baton_handoff_bytes_total", &["transport"]),
    ("baton_handoff_seconds_count", &[]),
    ("baton_step_seconds_count", &["kind"]),
    ("baton_batch_tokens_count", &["kind"]),
];
/// Hand-offs are counted where they land.
const DECODE: &[Metric] = &[("baton_handoffs_total", &["outcome"])];

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

#[test]
fn observe_metrics_and_traces() {
    let _alone = alone();
    let cluster = Cluster::up(&[]);
    block_on(async {
        let answer = ask_traced(&cluster).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let (prefill, decode) = (cluster.worker("prefill"), cluster.worker("decode"));
        for (service, metrics) in [
            (&cluster.gateway, GATEWAY),
            (&cluster.router, ROUTER),
            (prefill, WORKER),
            (decode, WORKER),
            (decode, DECODE),
        ] {
            shows(service, metrics).await;
        }
        for (service, part) in [
            (&cluster.gateway, "gateway"),
            (&cluster.router, "route"),
            (prefill, "prefill"),
            (decode, "decode"),
        ] {
            logs_the_trace(&cluster, service, part).await;
        }
        cluster.assert_idle().await;
    });
}

#[test]
fn observe_grpc_services() {
    let _alone = alone();
    let cluster = Cluster::up(&[]);
    block_on(async {
        for member in members(&cluster).await {
            let address = member["address"].as_str().unwrap();
            describes_itself(
                address,
                &["baton.v1.Decode", "baton.v1.Prefill", "baton.v1.Handoff", "baton.v1.Reach"],
            )
            .await;
        }
        let mut router = Command::new(baton())
            .args(["router", "--set", "listen=127.0.0.1:0", "--set", "admin=127.0.0.1:0"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(router.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let said: Value = serde_json::from_str(&line).unwrap();
        describes_itself(said["listening"]["grpc"].as_str().unwrap(), &["baton.v1.Router"]).await;
        router.kill().unwrap();
        router.wait().unwrap();
    });
}

async fn ask_traced(cluster: &Cluster) -> String {
    let messages = json!([{"role": "user", "content": "What does `Vec::push` do?"}]);
    let body = json!({"model": cluster.model, "messages": messages, "temperature": 0}).to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: baton\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\ntraceparent: 00-{TRACE}-b7ad6b7169203331-01\r\n\r\n",
        body.len()
    );
    exchange(&cluster.url, &(head + &body)).await
}

async fn get(url: &str, path: &str) -> String {
    exchange(url, &format!("GET {path} HTTP/1.1\r\nhost: baton\r\nconnection: close\r\n\r\n")).await
}

/// One request as written here and its answer as it came, headers included.
async fn exchange(url: &str, request: &str) -> String {
    let mut stream = TcpStream::connect(url.strip_prefix("http://").unwrap()).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

async fn shows(service: &Worker, metrics: &[Metric]) {
    for path in ["/health", "/ready"] {
        let answer = get(&service.admin, path).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{}{path}: {answer}", service.name);
    }
    let page = get(&service.admin, "/metrics").await;
    for (name, labels) in metrics {
        let is_sample = |line: &str| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']))
                && labels.iter().all(|label| line.contains(&format!("{label}=\"")))
        };
        assert!(page.lines().any(is_sample), "{} shows no {name}{labels:?}:\n{page}", service.name);
    }
}

/// The service's line about its part of the request, which is written when that part has ended.
async fn logs_the_trace(cluster: &Cluster, service: &Worker, part: &str) {
    let deadline = Instant::now() + Duration::from_secs(30);
    let (trace, part) = (format!("trace_id={TRACE}"), format!("part=\"{part}\""));
    loop {
        let log = cluster.log(service);
        if log.lines().any(|line| line.contains(&trace) && line.contains(&part)) {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "no line with {trace} and {part} in the log of {}:\n{log}",
            service.name
        );
        sleep(Duration::from_millis(20)).await;
    }
}

async fn members(cluster: &Cluster) -> Vec<Value> {
    let (_, body) = cluster.http.get("/status").await.unwrap();
    serde_json::from_slice::<Value>(&body).unwrap()["members"].as_array().unwrap().clone()
}

/// Standard health says that the server and each service serve; standard reflection lists them.
async fn describes_itself(address: &str, services: &[&str]) {
    let channel = Endpoint::from_shared(address.to_owned()).unwrap().connect().await.unwrap();
    let mut health = HealthClient::new(channel.clone());
    for service in [""].iter().chain(services) {
        let answer = health.check(HealthCheckRequest { service: service.to_string() }).await.unwrap();
        assert_eq!(answer.into_inner().status, 1, "{service} at {address} serves");
    }
    let list = MessageRequest::ListServices(String::new());
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(list) };
    let mut reflection = ServerReflectionClient::new(channel);
    let answers = reflection.server_reflection_info(tokio_stream::iter([request])).await.unwrap();
    let answer = answers.into_inner().message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("{answer:?}");
    };
    for service in services {
        assert!(list.service.iter().any(|listed| listed.name == *service), "{service} is not in {list:?}");
    }
}
