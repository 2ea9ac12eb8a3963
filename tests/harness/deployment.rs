//! A cluster as it is deployed: real etcd, two routers, two prefill and two decode workers and a gateway, each a process on
//! a host of its own, that a test kills, stops, cuts off, drains and starts again.

use super::{
    Pool, baton_failpoints,
    etcd_cluster::{EtcdCluster, Place},
    http::Client,
    network::{Host, Network},
    root,
};
use bytes::Bytes;
use hyper::Method;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    fs::File,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};
use tokio::time::{sleep, timeout};

/// For anything that must happen at some time, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(90);
const ADMIN: u16 = 7701;

/// Silence that means death, here: short, as every stop and every cut waits for it.
const SILENCE: &str = "liveness.silence_ms=3000";
const HEARTBEAT: &str = "liveness.heartbeat_ms=300";

pub struct Service {
    pub name: String,
    pub role: &'static str,
    pub host: Host,
    arguments: Vec<String>,
    process: Child,
}

pub struct Deployment {
    pub gateway: Service,
    pub routers: Vec<Service>,
    pub workers: Vec<Service>,
    pub etcd: EtcdCluster,
    pub http: Client,
    // Last: its hosts are gone only when their processes are.
    _network: Network,
}

impl Deployment {
    /// Ready. Must be called where `host` of the network stands.
    pub async fn start(mut network: Network) -> Self {
        let places = (0..3).map(|_| network.host()).map(|host| Place { exec: host.exec(), ip: host.ip });
        let etcd = EtcdCluster::start_in(places.collect());
        let endpoints = json!(etcd.endpoints());
        let mut start = |name: &str, role: &'static str, sets: &[String]| {
            let host = network.host();
            let ours = [format!("listen={}:{}", host.ip, port(role)), format!("admin={}:{ADMIN}", host.ip)];
            let sets = ours.iter().chain(sets).flat_map(|set| ["--set".to_owned(), set.clone()]);
            let service = if ["prefill", "decode"].contains(&role) { "worker" } else { role };
            let arguments = std::iter::once(service.to_owned()).chain(sets).collect();
            Service::start(name, role, host, arguments)
        };
        let router = [format!("etcd={endpoints}"), set(SILENCE), set(HEARTBEAT), set("lease_ms=3000")];
        let routers: Vec<Service> =
            (1..=2).map(|n| start(&format!("router-{n}"), "router", &router)).collect();
        let mut workers = Vec::new();
        for role in ["prefill", "decode"] {
            for n in 1..=2 {
                let worker = [
                    format!("role={role}"),
                    format!("membership.etcd={endpoints}"),
                    set("membership.lease_ms=3000"),
                    set(SILENCE),
                    set(HEARTBEAT),
                    set("threads=1"),
                    set("max_step_tokens=64"),
                    set("block_tokens=16"),
                    set("prefix_cache=false"),
                    set("drain_ms=1000"),
                ];
                workers.push(start(&format!("{role}-{n}"), role, &worker));
            }
        }
        let addresses: Vec<String> = routers.iter().map(Service::grpc).collect();
        let gateway = [format!("routers={}", json!(addresses)), set("timeouts.silence_ms=3000")];
        let gateway = start("gateway", "gateway", &gateway);
        let url = format!("http://{}:{}", gateway.host.ip, port("gateway"));
        let http = Client::new(&url).unwrap();
        let deployment = Deployment { gateway, routers, workers, etcd, http, _network: network };
        deployment.whole().await;
        deployment
    }

    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.routers.iter().chain(&self.workers).chain([&self.gateway])
    }

    pub fn service(&self, name: &str) -> &Service {
        self.services().find(|service| service.name == name).unwrap_or_else(|| panic!("no {name}"))
    }

    pub fn service_mut(&mut self, name: &str) -> &mut Service {
        let services = self.routers.iter_mut().chain(&mut self.workers);
        services.into_iter().find(|service| service.name == name).unwrap_or_else(|| panic!("no {name}"))
    }

    /// The router that the gateway uses now.
    pub async fn active_router(&self) -> &Service {
        let mut busiest = (&self.routers[0], -1.0);
        for router in &self.routers {
            let running = router.metric("baton_router_running", "").await;
            if running > busiest.1 {
                busiest = (router, running);
            }
        }
        busiest.0
    }

    /// Waits until every router sees exactly the workers that live, and none is suspected.
    pub async fn whole(&self) {
        let deadline = Instant::now() + PATIENCE;
        while let Err(what) = self.is_whole().await {
            assert!(Instant::now() < deadline, "not whole after {PATIENCE:?}: {what}");
            sleep(Duration::from_millis(50)).await;
        }
    }

    async fn is_whole(&self) -> Result<(), String> {
        let status = self.status().await?;
        let pids: BTreeSet<u64> = self.workers.iter().map(|worker| worker.process.id().into()).collect();
        let members = status["members"].as_array().cloned().unwrap_or_default();
        let found = members.iter().filter(|member| member["draining"] != true);
        let found: BTreeSet<u64> = found.filter_map(|member| member["pid"].as_u64()).collect();
        if found != pids || members.len() != pids.len() {
            return Err(format!("workers {pids:?}, members {found:?} of {}", members.len()));
        }
        for router in &self.routers {
            for role in ["prefill", "decode"] {
                let labels = format!("role=\"{role}\",state=\"ready\"");
                let ready = router.try_metric("baton_members", &labels).await.unwrap_or(0.0);
                if ready != 2.0 {
                    return Err(format!("{} finds {ready} {role} workers ready", router.name));
                }
            }
        }
        Ok(())
    }

    pub async fn status(&self) -> Result<Value, String> {
        let (code, body) = self.http.get("/status").await.map_err(|error| format!("{error:#}"))?;
        if !code.is_success() {
            return Err(String::from_utf8_lossy(&body).into_owned());
        }
        serde_json::from_slice(&body).map_err(|error| error.to_string())
    }

    /// Blocks still held when nothing runs any more, after at most `patience`.
    pub async fn leaked(&self, patience: Duration) -> u32 {
        let deadline = Instant::now() + patience;
        loop {
            let mut held = 0;
            for worker in &self.workers {
                let pool = Pool::of(&worker.admin()).await;
                assert_eq!(pool.check, "ok", "{}", worker.name);
                held += pool.blocks.held + pool.blocks.quarantined + pool.reservations;
            }
            if held == 0 || Instant::now() > deadline {
                return held;
            }
            sleep(Duration::from_millis(50)).await;
        }
    }
}

fn set(text: &str) -> String {
    text.to_owned()
}

fn port(role: &str) -> u16 {
    if role == "gateway" { 8000 } else { 7700 }
}

impl Service {
    fn start(name: &str, role: &'static str, host: Host, arguments: Vec<String>) -> Self {
        let process = spawn(name, &host, &arguments);
        Service { name: name.to_owned(), role, host, arguments, process }
    }

    /// Another incarnation at the same address; the former must have ended or be killed.
    pub fn start_again(&mut self) {
        self.kill();
        self.process = spawn(&self.name, &self.host, &self.arguments);
    }

    pub fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.process.id() as i32).unwrap(), signal).expect("the process lives");
    }

    pub fn has_ended(&mut self) -> bool {
        self.process.try_wait().is_ok_and(|status| status.is_some())
    }

    pub async fn ended(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "{} does not end", self.name);
            sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn grpc(&self) -> String {
        format!("http://{}:{}", self.host.ip, port(self.role))
    }

    pub fn admin(&self) -> String {
        format!("http://{}:{ADMIN}", self.host.ip)
    }

    /// Holds a phase of requests in this process, or lets it go.
    pub async fn hold(&self, phase: &str, held: bool) {
        let method = if held { Method::PUT } else { Method::DELETE };
        let client = Client::new(&self.admin()).unwrap();
        let path = format!("/debug/phases/{phase}");
        let answer = timeout(PATIENCE, client.open(method, &path, Bytes::new())).await.expect("an answer");
        assert!(answer.unwrap().status().is_success());
    }

    /// Requests that wait in a phase here.
    pub async fn held(&self, phase: &str) -> u64 {
        let (_, body) = Client::new(&self.admin()).unwrap().get("/debug/phases").await.unwrap();
        serde_json::from_slice::<Value>(&body).unwrap()[phase].as_u64().unwrap()
    }

    /// Summed over the series whose labels contain `labels`.
    pub async fn metric(&self, name: &str, labels: &str) -> f64 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(value) = self.try_metric(name, labels).await {
                return value;
            }
            assert!(Instant::now() < deadline, "{} shows no metrics", self.name);
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// `None` if it does not answer.
    pub async fn try_metric(&self, name: &str, labels: &str) -> Option<f64> {
        let client = Client::new(&self.admin()).unwrap();
        let (_, body) = timeout(Duration::from_secs(2), client.get("/metrics")).await.ok()?.ok()?;
        let text = String::from_utf8_lossy(&body).into_owned();
        let series = text.lines().filter(|line| {
            let rest = line.strip_prefix(name);
            rest.is_some_and(|rest| rest.starts_with([' ', '{'])) && line.contains(labels)
        });
        Some(series.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Logs go to target/faults, one file a service.
fn spawn(name: &str, host: &Host, arguments: &[String]) -> Child {
    let logs = root().join("target/faults");
    std::fs::create_dir_all(&logs).unwrap();
    let log = File::options().create(true).append(true).open(logs.join(format!("{name}.log"))).unwrap();
    let exec = host.exec();
    Command::new(&exec[0])
        .args(&exec[1..])
        .arg(baton_failpoints())
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("ip starts")
}
