//! Real etcd, three servers: one is killed, then a worker, then all of etcd is gone for a while, under load. Nobody who does
//! not touch a dead worker notices.

use crate::harness::{Ask, Cluster, alone, block_on, etcd_cluster::EtcdCluster, golden};
use rustix::process::Signal;
use std::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};
use tokio::time::sleep;

#[test]
fn etcd_may_lose_a_server_and_then_all_of_them() {
    let _alone = alone();
    let mut etcd = EtcdCluster::start(3);
    let endpoints = etcd.endpoints().join(",");
    let cluster = Cluster::up(&["--etcd", &endpoints, "--threads", "1", "--prefill", "2", "--decode", "2"]);
    let gone = Duration::from_secs(12);
    block_on(async {
        let load = Load::default();
        let break_etcd = async {
            sleep(Duration::from_secs(1)).await;
            etcd.kill(etcd.leader().unwrap_or(0));
            sleep(Duration::from_secs(4)).await;
            let killed = cluster.worker("decode");
            killed.signal(Signal::KILL);
            sleep(Duration::from_secs(8)).await;
            whole(&cluster, killed.pid, "the successor has joined, the dead one has left").await;
            load.undisturbed.store(true, Ordering::Relaxed);
            etcd.kill_all();
            sleep(gone).await;
            assert_eq!(members(&cluster).await.len(), 4, "the last view is kept");
            etcd.restart();
            sleep(Duration::from_secs(8)).await;
            whole(&cluster, killed.pid, "all workers are back under their names").await;
            load.stop.store(true, Ordering::Relaxed);
        };
        tokio::join!(break_etcd, load.run(&cluster, 0), load.run(&cluster, 1), load.run(&cluster, 2));
        let served = load.served.load(Ordering::Relaxed);
        let failed = load.failed.load(Ordering::Relaxed);
        println!(
            "{served} requests served, {failed} that touched the killed worker failed; etcd was gone for {gone:?}"
        );
        assert!(served > 20 && failed <= CLIENTS, "each client had at most one request on the killed worker");
        cluster.assert_idle().await;
    });
}

const CLIENTS: usize = 3;

#[derive(Default)]
struct Load {
    stop: AtomicBool,
    /// No worker has died lately: every request must be answered.
    undisturbed: AtomicBool,
    served: AtomicUsize,
    failed: AtomicUsize,
}

impl Load {
    /// Asks without pause; every answer must be the right one, every failure a clear one.
    async fn run(&self, cluster: &Cluster, client: usize) {
        let golden = golden::golden();
        let began = Instant::now();
        for item in golden.iter().cycle().skip(client * 90) {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let ask = Ask::new(&item.prompt_ids, item.answer_ids.len());
            match ask.send(cluster).await {
                Ok(answer) => {
                    assert_eq!(answer.ids, item.answer_ids);
                    self.served.fetch_add(1, Ordering::Relaxed);
                }
                Err((status, body)) => {
                    let clear = status.is_server_error() && body.contains("message");
                    let excused = clear && !self.undisturbed.load(Ordering::Relaxed);
                    assert!(excused, "after {:?}: {status}: {body}", began.elapsed());
                    self.failed.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }
}

/// Waits until there are four workers, without the killed one.
async fn whole(cluster: &Cluster, killed: u32, what: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let pids = members(cluster).await;
        if pids.len() == 4 && !pids.contains(&killed) {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "not in a minute: {what}; {killed} was killed, there are {pids:?}"
        );
        sleep(Duration::from_millis(100)).await;
    }
}

/// Their processes.
async fn members(cluster: &Cluster) -> Vec<u32> {
    let (_, body) = cluster.http.get("/status").await.unwrap();
    let status: serde_json::Value = serde_json::from_slice(&body).unwrap();
    let members = status["members"].as_array().unwrap().iter();
    members.map(|member| member["pid"].as_u64().unwrap() as u32).collect()
}
