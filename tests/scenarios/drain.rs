//! Workers and routers that leave in good order, or without a word while another takes over: under load, nobody notices.

use crate::harness::{Ask, Cluster, alone, baton, block_on, etcd_cluster::EtcdCluster, golden, http::Client};
use futures::future::join_all;
use rustix::process::Signal;
use serde_json::Value;
use std::{process::Stdio, time::Duration};
use tokio::{
    process::Command,
    time::{sleep, timeout},
};

fn asks(tokens: usize) -> Vec<Ask> {
    let seeded = |n: usize| Ask::new(&golden::prose(60 + 10 * n, n), tokens).with("seed", n as i64);
    (0..12).map(seeded).collect()
}

async fn decoding(cluster: &Cluster) {
    let two = async {
        while cluster.pool(cluster.worker("decode")).await.running < 2 {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(60), two).await.expect("two sequences decode at the same time");
}

async fn run(arguments: &[&str], url: &str) -> String {
    let command =
        Command::new(baton()).args(arguments).args(["--url", url]).stdin(Stdio::null()).output().await;
    let output = command.unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn drain_moves_what_runs_and_loses_nothing() {
    let _alone = alone();
    let pairs = ["--threads", "1", "--prefill", "2", "--decode", "2", "--worker-set", "drain_ms=20"];
    let cluster = Cluster::up(&pairs);
    block_on(async {
        let asks = asks(200);
        let expected = join_all(asks.iter().map(|ask| ask.send(&cluster))).await;
        let leave = async {
            decoding(&cluster).await;
            let victim = member(&cluster, cluster.worker("decode").pid).await;
            let said = run(&["drain", &victim], &cluster.url).await;
            assert!(said.contains("takes nothing new") && said.contains("has left"), "{said}");
        };
        let ((), found) = tokio::join!(leave, join_all(asks.iter().map(|ask| ask.send(&cluster))));
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!(found.as_ref().unwrap().said(), expected.as_ref().unwrap().said());
        }
        let moved = cluster.metric(&cluster.router, "baton_migrations_total", "drained").await;
        assert!(moved > 0.0, "200 tokens last longer than 20 ms");
        let failed = cluster.metric(&cluster.router, "baton_router_placements_total", "failed").await;
        assert_eq!(failed, 0.0, "to leave is no failure");
        cluster.assert_idle().await;
    });
}

async fn member(cluster: &Cluster, pid: u32) -> String {
    let status: Value = serde_json::from_str(&run(&["status", "--json"], &cluster.url).await).unwrap();
    let members = status["members"].as_array().unwrap();
    let found = members.iter().find(|member| member["pid"] == pid).expect("a member");
    found["id"].as_str().unwrap().to_owned()
}

#[test]
fn drain_names_the_members_there_are() {
    let _alone = alone();
    let cluster = Cluster::up(&["--threads", "1"]);
    block_on(async {
        let output =
            Command::new(baton()).args(["drain", "nobody", "--url", &cluster.url]).output().await.unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("no member nobody; there are: decode-"), "{said}");
        // Of one whose address another has now.
        let worker = Client::new(&cluster.worker("decode").admin).unwrap();
        let (status, said) = worker.post("/drain?member=decode-1", "{}".into()).await.unwrap();
        assert!(status == 409 && String::from_utf8_lossy(&said).contains("this is decode-"), "{status}");
        assert!(Ask::new(&golden::prose(60, 1), 1).send(&cluster).await.is_ok(), "the worker goes on");
    });
}

/// Streams in flight go on with the other router; the first comes back where it was.
#[test]
fn another_router_goes_on_with_every_answer() {
    let _alone = alone();
    let etcd = EtcdCluster::start(1);
    let endpoints = etcd.endpoints().join(",");
    let cluster = Cluster::up(&["--threads", "1", "--routers", "2", "--etcd", &endpoints]);
    block_on(async {
        let asks = asks(120);
        let expected = join_all(asks.iter().map(|ask| ask.send(&cluster))).await;
        for signal in [Signal::KILL, Signal::TERM] {
            let strike = async {
                decoding(&cluster).await;
                match signal {
                    Signal::KILL => cluster.router.signal(signal),
                    // The first has been replaced: the other serves now.
                    _ => cluster.routers[1].signal(signal),
                }
            };
            let ((), found) = tokio::join!(strike, join_all(asks.iter().map(|ask| ask.send(&cluster))));
            for (found, expected) in found.iter().zip(&expected) {
                assert_eq!(found.as_ref().unwrap().said(), expected.as_ref().unwrap().said(), "{signal:?}");
            }
            cluster.assert_idle().await;
        }
        let resumed = cluster.metric(&cluster.gateway, "baton_gateway_resumed_total", "").await;
        assert!(resumed > 0.0, "the killed router had work");
    });
}

/// Blocks of one layout mean nothing in another: such a worker gets no work beside one that matches, whatever its room.
#[test]
fn only_workers_that_match_are_paired() {
    let _alone = alone();
    let cluster = Cluster::up(&["--threads", "1"]);
    let registry = format!("membership.registry={:?}", cluster.router.grpc);
    let other = ["worker", "--role", "decode", "--set", &registry, "--set", "block_tokens=32"];
    block_on(async {
        let _other = Command::new(baton())
            .args(other)
            .args(["--set", "threads=1"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("baton starts");
        let joined = async {
            while !run(&["status"], &cluster.url)
                .await
                .lines()
                .filter(|line| line.starts_with("decode-"))
                .count()
                .eq(&2)
            {
                sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), joined).await.expect("the other worker joins");
        let matching = member(&cluster, cluster.worker("decode").pid).await;
        for answer in join_all(asks(4).iter().map(|ask| ask.send(&cluster))).await {
            assert_eq!(answer.unwrap().decode, matching);
        }
    });
}
