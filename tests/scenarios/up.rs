//! `baton up` as a newcomer meets it: ready soon, from any directory, modest, and gone when told.

use crate::harness::{Ask, Cluster, alone, baton, block_on, golden, has_nixl};
use futures::future::join_all;
use rustix::process::Signal;
use std::{
    process::Command,
    thread,
    time::{Duration, Instant},
};
use tokio::time::sleep;

/// f32 weights of the demo model (17.4 M parameters), the default pool, and what a worker may use beside them.
const WORKER_MEMORY: u64 = 17_400_000 * 4 + (128 << 20) + 150_000_000;

/// On a busy machine; how long stopping may take by design, the tests of `up` itself say.
const SOON: Duration = Duration::from_secs(30);

#[test]
fn up_is_ready_soon_stays_modest_and_leaves_nothing() {
    let _alone = alone();
    drop(Cluster::up(&[])); // the first start unpacks the demo model
    let mut cluster = Cluster::up(&[]);
    assert!(cluster.took < SOON, "ready after {:?}", cluster.took);
    block_on(async {
        let long = Ask::new(&golden::prose(1900, 0), 100);
        let (one, two) = tokio::join!(long.send(&cluster), long.send(&cluster));
        assert_eq!(one.unwrap().ids, two.unwrap().ids);
        cluster.assert_idle().await;
    });
    for worker in &cluster.workers {
        let resident = worker.resident();
        assert!(resident < WORKER_MEMORY, "{} holds {} MB", worker.name, resident / 1_000_000);
    }
    let took = cluster.stop();
    assert!(took < SOON, "stopped after {took:?}");
    assert_all_gone(&cluster);
}

#[test]
fn up_stops_in_time_whatever_runs() {
    let _alone = alone();
    let mut cluster = Cluster::up(&["--threads", "1"]);
    let asks: Vec<Ask> = (0..8).map(|n| Ask::new(&golden::prose(30 + n, n), 1900)).collect();
    let stop = async {
        while cluster.pool(cluster.worker("decode")).await.running < 8 {
            sleep(Duration::from_millis(20)).await;
        }
        cluster.signal(Signal::INT);
        Instant::now()
    };
    let (told, outcomes) =
        block_on(async { tokio::join!(stop, join_all(asks.iter().map(|ask| ask.send(&cluster)))) });
    cluster.stop();
    assert!(told.elapsed() < SOON, "stopped after {:?}", told.elapsed());
    assert_all_gone(&cluster);
    for outcome in outcomes {
        let (_, error) = outcome.expect_err("1900 tokens take longer than stopping may");
        assert!(error.contains("error"), "{error}");
    }
}

#[test]
fn up_takes_its_children_along_when_killed() {
    let _alone = alone();
    let mut cluster = Cluster::up(&[]);
    cluster.signal(Signal::KILL);
    cluster.stop();
    assert_all_gone(&cluster);
}

#[test]
fn up_says_what_is_wrong() {
    let _alone = alone();
    for (arguments, expected) in [
        (&["--decode", "0"][..], "at least one of each"),
        (&["--backend", "tpu"], "this build of baton computes on: cpu"),
        (&["--model", "/nowhere"], "/nowhere"),
        (&["--worker-set", "kv_block=3"], "kv_block"),
        (&["--gateway-set", "limits.body=3"], "body"),
        (&["--transport", "rdma"], "possible values: grpc, nixl"),
        (&["--transport", "nixl", "--backend", "sim"], "its KV pool is not in host memory"),
        (&["--transport", "nixl"], "build it with --features rdma"),
    ] {
        if has_nixl() && expected.contains("--features rdma") {
            continue;
        }
        let output = Command::new(baton()).args(["up", "--port", "0"]).args(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(expected), "{arguments:?}: {said}");
    }
}

#[test]
fn up_serves_status_and_bench() {
    let _alone = alone();
    let cluster = Cluster::up(&[]);
    let run = |arguments: &[&str]| {
        let output = Command::new(baton()).args(arguments).args(["--url", &cluster.url]).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let status = run(&["status"]);
    assert!(
        status.contains("prefill") && status.contains("decode") && status.contains("0 running"),
        "{status}"
    );
    let status: serde_json::Value = serde_json::from_str(&run(&["status", "--json"])).unwrap();
    assert_eq!(status["members"].as_array().unwrap().len(), 2);
    let bench = run(&[
        "bench",
        "--requests",
        "4",
        "--warmup",
        "0",
        "--prompt-tokens",
        "100",
        "--output-tokens",
        "8",
        "--json",
    ]);
    let bench: serde_json::Value = serde_json::from_str(&bench).unwrap();
    assert_eq!(
        (bench["failed"].as_u64(), bench["prompt_tokens"].as_u64(), bench["completion_tokens"].as_u64()),
        (Some(0), Some(400), Some(32))
    );
    block_on(cluster.assert_idle());
}

fn assert_all_gone(cluster: &Cluster) {
    let deadline = Instant::now() + SOON;
    while let Some(service) = cluster.services().find(|service| service.is_alive()) {
        assert!(Instant::now() < deadline, "{} outlived baton up", service.name);
        thread::sleep(Duration::from_millis(50));
    }
}
