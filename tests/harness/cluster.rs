//! `baton up` as a child process, and what a test does to it.

use super::{Pool, baton, http::Client};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::Value;
use std::{
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tokio::time::sleep;

pub struct Cluster {
    up: Child,
    pub url: String,
    pub http: Client,
    pub model: String,
    pub gateway: Worker,
    pub router: Worker,
    pub routers: Vec<Worker>,
    pub workers: Vec<Worker>,
    /// From start to ready.
    pub took: Duration,
    home: tempfile::TempDir,
}

/// One service of the cluster.
#[derive(Clone, Debug)]
pub struct Worker {
    pub name: String,
    pub role: String,
    pub pid: u32,
    pub grpc: String,
    pub admin: String,
}

impl Worker {
    fn read(value: &Value, name: &str) -> Self {
        let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
        let name = value["name"].as_str().unwrap_or(name).to_owned();
        let pid = value["pid"].as_u64().expect("a pid") as u32;
        Worker { name, role: text("role"), pid, grpc: text("grpc"), admin: text("admin") }
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.pid as i32).unwrap(), signal).expect("the process lives");
    }

    pub fn is_alive(&self) -> bool {
        test_kill_process(Pid::from_raw(self.pid as i32).unwrap()).is_ok()
    }

    /// Resident memory in bytes.
    pub fn resident(&self) -> u64 {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.pid)).expect("the process lives");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }
}

impl Cluster {
    /// `baton up --port 0 --json <arguments>`, ready.
    pub fn up(arguments: &[&str]) -> Self {
        Self::try_up(arguments).unwrap_or_else(|error| panic!("baton up {arguments:?}: {error}"))
    }

    pub fn try_up(arguments: &[&str]) -> Result<Self, String> {
        Self::start(baton(), arguments)
    }

    /// The same of another build.
    pub fn up_of(binary: &Path, arguments: &[&str]) -> Self {
        Self::start(binary, arguments).unwrap_or_else(|error| panic!("baton up {arguments:?}: {error}"))
    }

    fn start(binary: &Path, arguments: &[&str]) -> Result<Self, String> {
        let home = tempfile::TempDir::new().unwrap();
        let began = Instant::now();
        let mut up = Command::new(binary)
            .args(["up", "--port", "0", "--json", "--logs"])
            .arg(home.path())
            .args(arguments)
            .current_dir(home.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("baton starts");
        let mut line = String::new();
        BufReader::new(up.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let Ok(ready) = serde_json::from_str::<Value>(&line) else {
            let mut error = String::new();
            let _ = up.wait();
            let _ = up.stderr.take().unwrap().read_to_string(&mut error);
            return Err(error);
        };
        let url = ready["gateway"]["http"].as_str().unwrap().to_owned();
        Ok(Cluster {
            up,
            http: Client::new(&url).unwrap(),
            url,
            model: ready["model"].as_str().unwrap().to_owned(),
            gateway: Worker::read(&ready["gateway"], "gateway"),
            router: Worker::read(&ready["router"], "router"),
            routers: ready["routers"].as_array().unwrap().iter().map(|r| Worker::read(r, "")).collect(),
            workers: ready["workers"].as_array().unwrap().iter().map(|w| Worker::read(w, "")).collect(),
            took: began.elapsed(),
            home,
        })
    }

    pub fn worker(&self, role: &str) -> &Worker {
        self.workers.iter().find(|worker| worker.role == role).expect("a worker of this role")
    }

    pub fn services(&self) -> impl Iterator<Item = &Worker> {
        self.workers.iter().chain([&self.gateway, &self.router])
    }

    /// Value of a metric of a service, summed over the series whose labels contain `labels`.
    pub async fn metric(&self, service: &Worker, name: &str, labels: &str) -> f64 {
        let (_, body) = Client::new(&service.admin).unwrap().get("/metrics").await.expect("metrics");
        let text = String::from_utf8(body.to_vec()).unwrap();
        let series = text.lines().filter(|line| {
            let rest = line.strip_prefix(name);
            rest.is_some_and(|rest| rest.starts_with([' ', '{'])) && line.contains(labels)
        });
        series.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    /// What a service has logged so far.
    pub fn log(&self, service: &Worker) -> String {
        let path = self.home.path().join(format!("{}.log", service.name));
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    pub async fn pool(&self, worker: &Worker) -> Pool {
        let pool = Pool::of(&worker.admin).await;
        assert_eq!((pool.pid, &pool.role), (worker.pid, &worker.role), "the worker answers for itself");
        pool
    }

    /// Waits until no worker that lives holds a block; panics with the pools otherwise.
    pub async fn assert_idle(&self) {
        self.assert_idle_within(Duration::from_secs(30)).await;
    }

    pub async fn assert_idle_within(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        loop {
            let mut pools = Vec::new();
            for worker in self.workers.iter().filter(|worker| worker.is_alive()) {
                pools.push(self.pool(worker).await);
            }
            if pools.iter().all(Pool::is_idle) {
                return;
            }
            assert!(Instant::now() < deadline, "not idle after {patience:?}: {pools:#?}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Of `baton up`.
    pub fn pid(&self) -> u32 {
        self.up.id()
    }

    /// Signals `baton up` alone.
    pub fn signal(&self, signal: Signal) {
        let _ = kill_process(Pid::from_raw(self.up.id() as i32).unwrap(), signal);
    }

    /// SIGTERM, and how long until everything was gone.
    pub fn stop(&mut self) -> Duration {
        let began = Instant::now();
        self.signal(Signal::TERM);
        self.up.wait().expect("baton up ends");
        began.elapsed()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if matches!(self.up.try_wait(), Ok(None)) {
            self.stop();
        }
    }
}
