//! Where the time of a request went: the parts of its record account for the whole, a delay shows up in the part where it
//! was made, and a real OpenTelemetry collector has every part as a span of one trace.

use crate::harness::{
    Ask, Cluster, Collector, Worker, alone, baton, baton_failpoints, block_on, client, golden,
};
use futures::{StreamExt, future::join_all, stream};
use http_body_util::BodyExt;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    process::Command,
    time::{Duration, Instant},
};
use tokio::time::{sleep, timeout};

/// Of a whole: more than this nobody may fail to account for.
const UNEXPLAINED: f64 = 0.02;

const SPLIT: [(&str, &str, &str); 14] = [
    ("ttft", "gateway", "gateway"),
    ("ttft", "queue", "router"),
    ("ttft", "reservation", "router"),
    ("ttft", "prefill_wait", "prefill"),
    ("ttft", "prefill", "prefill"),
    ("ttft", "way_back", "prefill"),
    ("ttft", "way_back", "network"),
    ("ttft", "way_back", "router"),
    ("ttft", "way_back", "gateway"),
    ("second_token", "handoff", "router"),
    ("second_token", "decode_wait", "decode"),
    ("second_token", "decode", "decode"),
    ("second_token", "way_back", "router"),
    ("second_token", "way_back", "gateway"),
];

/// Hundreds of requests of every kind, many at a time, on split workers and on one that does both.
#[test]
fn trace_parts_account_for_the_whole() {
    let _alone = alone();
    for arrangement in
        [&["--prefill", "2", "--decode", "2"][..], &["--prefill", "0", "--decode", "0", "--both", "1"]]
    {
        let cluster = Cluster::up(&[arrangement, &["--threads", "1"]].concat());
        block_on(async {
            let asked = stream::iter(0..200).map(|n| asked(&cluster, n)).buffer_unordered(4);
            let seen: Vec<Seen> = asked.collect().await;
            for of in ["ttft", "second_token"] {
                account(&seen, of);
            }
            if arrangement[1] != "0" {
                seen.iter().for_each(|seen| has_every_part(&seen.record));
            }
            cluster.assert_idle().await;
        });
    }
}

/// A record, and what the client's own clock says.
struct Seen {
    record: Value,
    first: Duration,
}

async fn asked(cluster: &Cluster, n: usize) -> Seen {
    let mut ask = Ask::new(&golden::prose(20 + n % 150, n), 4).with("stream", true);
    if n.is_multiple_of(5) {
        ask = ask.with("n", 2).with("temperature", 0.7).with("seed", n);
    }
    let id = format!("trace-{n}");
    let began = Instant::now();
    let headers = [("x-request-id", id.as_str())];
    let response = cluster.http.open_with(Method::POST, "/v1/completions", ask.body(cluster), &headers);
    let response = response.await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    let mut body = response.into_body();
    let mut first = None;
    while let Some(frame) = body.frame().await {
        if frame.unwrap().data_ref().is_some_and(|data| data.starts_with(b"data: ")) {
            first.get_or_insert_with(|| began.elapsed());
        }
    }
    Seen { record: record(cluster, &id).await, first: first.unwrap() }
}

/// The record is there when the request has ended, which the gateway may learn after its client.
async fn record(cluster: &Cluster, id: &str) -> Value {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let (status, body) = cluster.http.get(&format!("/trace/{id}")).await.unwrap();
        if status.is_success() {
            return serde_json::from_slice(&body).unwrap();
        }
        assert!(Instant::now() < deadline, "{status}: {}", String::from_utf8_lossy(&body));
        sleep(Duration::from_millis(5)).await;
    }
}

fn account(seen: &[Seen], of: &str) {
    let mut shares = Vec::new();
    for Seen { record, first } in seen {
        let whole = record[format!("{of}_ms")].as_f64().unwrap_or_else(|| panic!("no {of}: {record:#}"));
        let left = record["unexplained_ms"][of].as_f64().unwrap();
        // Parts are in whole microseconds, of which there are a dozen.
        let sum: f64 = parts(record, of).map(|part| part["ms"].as_f64().unwrap()).sum();
        assert!((whole - sum - left).abs() < 0.02, "{of}: {whole} is not {sum} and {left}: {record:#}");
        shares.push((left / whole).abs());
        let client = first.as_secs_f64() * 1e3;
        assert!(of != "ttft" || whole <= client, "the client had its token after {client} ms: {record:#}");
    }
    shares.sort_by(f64::total_cmp);
    let (median, most) = (shares[shares.len() / 2], shares[shares.len() - 1]);
    println!(
        "{of}: of {} requests, unexplained {:.3} % (median), {:.3} % (most)",
        shares.len(),
        100.0 * median,
        100.0 * most
    );
    assert!(most < UNEXPLAINED, "{of}: {:.1} % are not accounted for", 100.0 * most);
}

fn parts<'a>(record: &'a Value, of: &'a str) -> impl Iterator<Item = &'a Value> {
    record["parts"].as_array().unwrap().iter().filter(move |part| part["of"] == of)
}

fn part(record: &Value, of: &str, name: &str, service: &str) -> f64 {
    let found = parts(record, of).find(|part| part["name"] == name && part["service"] == service);
    found.map_or(0.0, |part| part["ms"].as_f64().unwrap())
}

fn has_every_part(record: &Value) {
    let has = |(of, name, service): &(&str, &str, &str)| {
        parts(record, of).any(|part| part["name"] == *name && part["service"] == *service)
    };
    // Choices after the first, and prompts that were sent before, leave no hand-off: but every part is told.
    let missing: Vec<_> = SPLIT.iter().filter(|part| !has(part)).collect();
    assert!(
        missing.iter().all(|(_, name, _)| ["handoff", "decode_wait"].contains(name)),
        "{missing:?}: {record:#}"
    );
}

/// How long a phase is held: twice what a busy machine may take for all the others.
const HELD: Duration = Duration::from_secs(3);

/// A phase that a test holds delays one part, and no other.
#[test]
fn trace_tells_where_the_time_went() {
    let _alone = alone();
    let one_at_a_time = ["--router-set", "prefill.requests=1", "--threads", "1"];
    let cluster = Cluster::up_of(baton_failpoints(), &one_at_a_time);
    block_on(async {
        let (prefill, decode) = (cluster.worker("prefill"), cluster.worker("decode"));
        drop(asked(&cluster, 0).await);
        for (n, (worker, phase, slow)) in [
            (prefill, "reserved", ("ttft", "prefill_wait", "prefill")),
            (prefill, "prefilling", ("ttft", "way_back", "prefill")),
            (decode, "committed", ("second_token", "way_back", "decode")),
        ]
        .into_iter()
        .enumerate()
        {
            hold(worker, phase).await;
            let (seen, ()) = tokio::join!(asked(&cluster, 10 + n), let_go_later(worker, phase));
            slowest(&seen.record, slow);
        }
        // The second request waits for the first one's credit.
        let second = async {
            timeout(Duration::from_secs(30), held(prefill)).await.expect("the first request is held");
            tokio::join!(asked(&cluster, 21), let_go_later(prefill, "reserved")).0
        };
        hold(prefill, "reserved").await;
        let (_, second) = tokio::join!(asked(&cluster, 20), second);
        slowest(&second.record, ("ttft", "queue", "router"));
        cluster.assert_idle().await;
    });
}

async fn hold(worker: &Worker, phase: &str) {
    let path = format!("/debug/phases/{phase}");
    client(&worker.admin).open(Method::PUT, &path, "{}".into()).await.unwrap();
}

async fn let_go(worker: &Worker, phase: &str) {
    let path = format!("/debug/phases/{phase}");
    client(&worker.admin).open(Method::DELETE, &path, "{}".into()).await.unwrap();
}

async fn let_go_later(worker: &Worker, phase: &str) {
    sleep(HELD).await;
    let_go(worker, phase).await;
}

fn slowest(record: &Value, (of, name, service): (&str, &str, &str)) {
    let delayed = part(record, of, name, service);
    let others = parts(record, of).filter(|part| part["name"] != name || part["service"] != service);
    let others: f64 = others.map(|part| part["ms"].as_f64().unwrap().abs()).sum();
    // The request takes a moment to get there.
    let expected = HELD.as_secs_f64() * 1e3 * 0.5;
    assert!(
        delayed > expected && others < expected,
        "{name} of {service} took {delayed}, the others {others}: {record:#}"
    );
}

/// A lost worker's time is told as such, and how many placements it took.
#[test]
fn trace_counts_attempts_and_what_they_cost() {
    let _alone = alone();
    let cluster = Cluster::up_of(baton_failpoints(), &["--prefill", "2", "--threads", "1"]);
    block_on(async {
        let prefills: Vec<&Worker> =
            cluster.workers.iter().filter(|worker| worker.role == "prefill").collect();
        for worker in &prefills {
            hold(worker, "reserved").await;
        }
        let kill = async {
            let victim = loop {
                let waiting = join_all(prefills.iter().map(|worker| waiting(worker))).await;
                match waiting.iter().position(|count| *count > 0) {
                    Some(index) => break index,
                    None => sleep(Duration::from_millis(10)).await,
                }
            };
            sleep(HELD).await;
            prefills[victim].signal(rustix::process::Signal::KILL);
            let_go(prefills[1 - victim], "reserved").await;
        };
        let (seen, ()) = tokio::join!(asked(&cluster, 1), kill);
        let record = &seen.record;
        assert!(part(record, "ttft", "lost", "router") > HELD.as_secs_f64() * 1e3 * 0.9, "{record:#}");
        assert_eq!((&record["attempts"], &record["migrations"]), (&json!(2), &json!(1)), "{record:#}");
        account(&[seen], "ttft");
    });
}

/// Until a request waits there.
async fn held(worker: &Worker) {
    while waiting(worker).await == 0 {
        sleep(Duration::from_millis(10)).await;
    }
}

/// Requests that are held between reservation and prefill.
async fn waiting(worker: &Worker) -> u64 {
    let (_, body) = client(&worker.admin).get("/debug/phases").await.unwrap();
    serde_json::from_slice::<Value>(&body).unwrap()["reserved"].as_u64().unwrap()
}

#[test]
fn trace_is_shown_by_command_header_and_exemplar() {
    let _alone = alone();
    let cluster = Cluster::up(&["--threads", "1"]);
    let baton = |arguments: &[&str]| {
        let output = Command::new(baton()).args(arguments).args(["--url", &cluster.url]).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.success(), text(output.stdout), text(output.stderr))
    };
    block_on(async {
        let headers = [("x-baton-trace", "1"), ("x-request-id", "shown/1")];
        let ask = Ask::new(&golden::prose(30, 1), 3);
        let whole = cluster
            .http
            .open_with(Method::POST, "/v1/completions", ask.body(&cluster), &headers)
            .await
            .unwrap();
        let whole = whole.into_body().collect().await.unwrap().to_bytes();
        let inside = serde_json::from_slice::<Value>(&whole).unwrap()["baton"].clone();
        let kept = record(&cluster, "shown/1").await;
        assert_eq!(inside["parts"], kept["parts"]);
        assert_eq!((&kept["code"], &kept["completion_tokens"]), (&json!(200), &json!(3)));

        let stream = ask.with("stream", true).body(&cluster);
        let stream = cluster.http.open_with(Method::POST, "/v1/completions", stream, &headers).await.unwrap();
        let stream = stream.into_body().collect().await.unwrap().to_bytes();
        let stream = String::from_utf8(stream.to_vec()).unwrap();
        let last = stream.trim_end().rsplit("data: ").nth(1).unwrap();
        let last: Value = serde_json::from_str(last.trim()).unwrap();
        assert_eq!(
            (&last["choices"], &last["baton"]["request_id"]),
            (&json!([]), &json!("shown/1")),
            "{last}"
        );

        let trace_id = kept["trace_id"].as_str().unwrap();
        let (_, metrics) = cluster.http.get("/metrics").await.unwrap();
        let metrics = String::from_utf8(metrics.to_vec()).unwrap();
        let names = ["time_to_first_token", "inter_token_latency", "request"];
        for name in names.map(|name| format!("baton_{name}_seconds_bucket")) {
            let exemplar = |line: &str| line.starts_with(&name) && line.contains("# {trace_id=\"");
            assert!(metrics.lines().any(exemplar), "{name} has no exemplar:\n{metrics}");
        }
        assert_eq!(trace_id.len(), 32);
    });
    let (shown, text, _) = baton(&["trace", "shown/1"]);
    assert!(shown && text.contains("prefill_wait") && text.contains("unexplained"), "{text}");
    let (_, json, _) = baton(&["trace", "shown/1", "--json"]);
    assert_eq!(serde_json::from_str::<Value>(&json).unwrap()["request_id"], "shown/1");
    let (shown, _, error) = baton(&["trace", "never-asked"]);
    assert!(!shown && error.contains("never-asked"), "{error}");
}

#[test]
fn trace_reaches_a_collector() {
    let _alone = alone();
    let Some(collector) = Collector::start() else { return };
    let cluster = Cluster::up(&["--threads", "1", "--traces", &collector.url]);
    block_on(async {
        let record = asked(&cluster, 7).await.record;
        let trace_id = record["trace_id"].as_str().unwrap().to_owned();
        let expected =
            record["parts"].as_array().unwrap().iter().filter(|part| part["service"] != "network").count();
        // Four calls, the parts, and what decode received.
        let spans = collector.trace(&trace_id, expected + 5).await;
        agree(&spans, &record);
        is_one_tree(&spans);
        for service in cluster.services() {
            assert_eq!(
                cluster.metric(service, "baton_spans_dropped_total", "").await,
                0.0,
                "{}",
                service.name
            );
        }
        unsampled_leaves_nothing(&cluster, &collector).await;
        cluster.assert_idle().await;
    });
}

type Spans = BTreeMap<String, Value>;

fn text<'a>(span: &'a Value, key: &str) -> &'a str {
    span[key].as_str().unwrap_or_default()
}

fn ms(span: &Value) -> f64 {
    let at = |key| text(span, key).parse::<u64>().unwrap();
    (at("endTimeUnixNano") - at("startTimeUnixNano")) as f64 / 1e6
}

fn agree(spans: &Spans, record: &Value) {
    for part in record["parts"].as_array().unwrap().iter().filter(|part| part["service"] != "network") {
        let service = format!("baton-{}", part["service"].as_str().unwrap());
        let is_it = |span: &&Value| {
            span["name"] == part["name"]
                && span["service"] == service.as_str()
                && span["baton.of"] == part["of"]
        };
        let told: f64 = spans.values().filter(is_it).map(ms).sum();
        let expected = part["ms"].as_f64().unwrap();
        assert!((told - expected).abs() < 0.002, "{part} is {told} ms in the trace: {spans:#?}");
    }
}

/// One root, and everybody else has a parent that was exported too.
fn is_one_tree(spans: &Spans) {
    let roots: Vec<_> = spans.values().filter(|span| text(span, "parentSpanId").is_empty()).collect();
    assert_eq!(roots.len(), 1, "{roots:#?}");
    assert_eq!(
        (text(roots[0], "service"), text(roots[0], "name")),
        ("baton-gateway", "POST /v1/completions")
    );
    for span in spans.values().filter(|span| !text(span, "parentSpanId").is_empty()) {
        assert!(spans.contains_key(text(span, "parentSpanId")), "nobody told the parent of {span:#}");
    }
    let parent = |name: &str| {
        let span = spans.values().find(|span| span["name"] == name).unwrap_or_else(|| panic!("no {name}"));
        spans[text(span, "parentSpanId")]["name"].clone()
    };
    let calls =
        ["baton.v1.Router/Generate", "baton.v1.Prefill/Prefill", "baton.v1.Decode/Generate", "receive"];
    let callers = [
        "POST /v1/completions",
        "baton.v1.Router/Generate",
        "baton.v1.Router/Generate",
        "baton.v1.Decode/Generate",
    ];
    assert_eq!(calls.map(parent), callers);
}

/// A caller that does not keep its trace is not kept here.
async fn unsampled_leaves_nothing(cluster: &Cluster, collector: &Collector) {
    let ask = Ask::new(&golden::prose(30, 5), 3).body(cluster);
    let ids = ["0af7651916cd43dd8448eb211c80319c", "1af7651916cd43dd8448eb211c80319c"];
    for (trace_id, flags) in ids.into_iter().zip(["00", "01"]) {
        let header = format!("{trace_id}-b7ad6b7169203331-{flags}");
        let header = format!("00-{header}");
        let headers = [("traceparent", header.as_str())];
        let answer =
            cluster.http.open_with(Method::POST, "/v1/completions", ask.clone(), &headers).await.unwrap();
        drop(answer.into_body().collect().await.unwrap());
    }
    // When the later one is there, the earlier one would be.
    let rooted = async {
        let root = |span: &Value| text(span, "parentSpanId") == "b7ad6b7169203331";
        while !collector.spans(ids[1]).values().any(root) {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(Duration::from_secs(30), rooted).await.expect("the client's span is the root");
    assert!(collector.spans(ids[0]).is_empty());
}
