//! The children of `baton up`: who is started with what, in which order, and what happens when one dies.

use super::{
    Args,
    child::{Addresses, Child},
};
use crate::{demo, http::Client, settings};
use anyhow::{Context, bail};
use futures::future::{join_all, select_all};
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::time::{Instant, sleep, timeout, timeout_at};

/// What workers and gateway do once they have waited for what runs (`drain_ms`, `handover_ms`): last words, leaving, closing. With
/// the defaults everything has ended 10 s after the signal.
const CLOSING: Duration = Duration::from_secs(2);
/// Routers have nothing to wait for once workers and gateway are gone.
const ROUTERS: Duration = Duration::from_millis(800);
/// A worker or router that dies is started again so many times, after a pause that doubles; one that lived for long
/// begins anew.
const RESTARTS: u32 = 5;
const LONG: Duration = Duration::from_secs(60);

pub struct Cluster {
    args: Args,
    model: PathBuf,
    name: String,
    /// Longest wait for workers and gateway after SIGTERM.
    leaving: Duration,
    logs: Option<PathBuf>,
    routers: Vec<Service>,
    gateway: Option<Child>,
    workers: Vec<Service>,
    ready: bool,
}

/// A service that is started again when it ends.
struct Service {
    role: &'static str,
    child: Child,
    since: Instant,
    restarts: u32,
}

impl Cluster {
    pub fn new(args: Args) -> anyhow::Result<Self> {
        let (model, name) = match &args.model {
            Some(directory) => (directory.clone(), directory_name(directory)),
            None => (demo::directory()?, demo::NAME.to_owned()),
        };
        let worker = settings::load(None, &args.worker_set).context("--worker-set")?;
        let gateway = settings::load(None, &args.gateway_set).context("--gateway-set")?;
        let leaving = leaving(&worker, &gateway);
        let logs = (!args.verbose).then(|| log_directory(args.logs.as_deref())).transpose()?;
        let (routers, gateway, workers) = (Vec::new(), None, Vec::new());
        Ok(Cluster { args, model, name, leaving, logs, routers, gateway, workers, ready: false })
    }

    /// Starts everything and waits until a request would succeed.
    pub async fn start(&mut self, patience: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + patience;
        for number in 1..=self.args.routers {
            let name = if self.args.routers == 1 { "router".into() } else { format!("router-{number}") };
            let mut child = self.child(&name, self.router_arguments(None))?;
            child.listening(patience).await?;
            self.routers.push(Service::new("router", child));
        }
        let address = self.router_addresses().swap_remove(0);
        for (role, count) in self.roles() {
            for number in 1..=count {
                let child = self.child(&format!("{role}-{number}"), self.worker_arguments(role, &address))?;
                self.workers.push(Service::new(role, child));
            }
        }
        self.gateway = Some(self.child("gateway", self.gateway_arguments())?);
        let children = self.workers.iter_mut().map(|worker| &mut worker.child).chain(&mut self.gateway);
        for listening in join_all(children.map(|child| child.listening(patience))).await {
            listening?;
        }
        self.wait_until_ready(deadline).await?;
        self.ready = true;
        Ok(())
    }

    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// Starts again what ends. Ends with an error when the gateway dies, or another service too often.
    pub async fn watch(&mut self) -> anyhow::Error {
        loop {
            let gateway = self.gateway.as_mut().expect("there is one once all is ready");
            let services = self.routers.iter_mut().chain(&mut self.workers);
            let waits = services.map(|service| Box::pin(service.child.wait()));
            let (index, left) = tokio::select! {
                error = gateway.died() => return error,
                (status, index, _) = select_all(waits) => (index, status.is_ok_and(|status| status.success())),
            };
            if let Err(error) = self.restart(index, left).await {
                return error;
            }
        }
    }

    /// SIGTERM to workers and gateway first, so that nothing loses its router while it drains; SIGKILL to what remains.
    pub async fn stop(&mut self) {
        let mut first: Vec<&mut Child> = self.gateway.iter_mut().collect();
        first.extend(self.workers.iter_mut().map(|worker| &mut worker.child));
        end(first, self.leaving).await;
        let routers = self.routers.iter_mut().map(|router| &mut router.child).collect();
        end(routers, ROUTERS).await;
    }

    pub fn announce(&self, json: bool) {
        match json {
            true => println!("{}", self.as_json()),
            false => println!("{}", self.banner()),
        }
    }

    fn service(&mut self, index: usize) -> &mut Service {
        self.routers.iter_mut().chain(&mut self.workers).nth(index).expect("an index of this very list")
    }

    /// `left`: it was drained, and has not failed. A router comes back where it was: gateway and workers know it there.
    async fn restart(&mut self, index: usize, left: bool) -> anyhow::Result<()> {
        let service = self.service(index);
        if left {
            eprintln!("baton up: {} has left and is started again", service.child.name);
        } else {
            eprintln!("baton up: {}", service.child.died().await);
            service.count_restart()?;
            sleep(Duration::from_millis(100 << service.restarts)).await;
        }
        let (role, name) = (service.role, service.child.name.clone());
        let arguments = match role {
            "router" => {
                let former = service.child.addresses.clone();
                self.router_arguments(Some(&former))
            }
            _ => self.worker_arguments(role, &self.router_addresses()[0]),
        };
        let mut child = self.child(&name, arguments)?;
        child.listening(Duration::from_secs(self.args.ready_timeout)).await?;
        eprintln!("baton up: {name} is back as process {}", child.pid);
        let service = self.service(index);
        (service.child, service.since) = (child, Instant::now());
        Ok(())
    }

    fn child(&self, name: &str, arguments: Vec<String>) -> anyhow::Result<Child> {
        Child::start(name.to_owned(), &arguments, self.logs.as_deref())
    }

    /// Each role, and how many workers it has.
    fn roles(&self) -> [(&'static str, usize); 3] {
        [("prefill", self.args.prefill), ("decode", self.args.decode), ("both", self.args.both)]
    }

    fn router_addresses(&self) -> Vec<String> {
        self.routers.iter().map(|router| router.child.addresses.grpc.clone()).collect()
    }

    fn router_arguments(&self, at: Option<&Addresses>) -> Vec<String> {
        let port = |address: &str| address.rsplit(':').next().unwrap_or("0").to_owned();
        let (grpc, admin) = at.map_or(("0".into(), "0".into()), |at| (port(&at.grpc), port(&at.admin)));
        let mut set = vec![format!("listen=127.0.0.1:{grpc}"), format!("admin=127.0.0.1:{admin}")];
        set.extend(self.roles().map(|(role, count)| format!("pools.{role}={count}")));
        if !self.args.etcd.is_empty() {
            set.push(format!("etcd={}", json!(self.args.etcd)));
        }
        set.extend(self.traces());
        command("router", set, &self.args.router_set)
    }

    fn worker_arguments(&self, role: &str, router: &str) -> Vec<String> {
        let args = &self.args;
        let mut set = vec![
            format!("role={role}"),
            format!("backend={}", args.backend),
            format!("handoff.transport={}", worker::Transport::from(args.transport).name()),
            format!("model={}", json!(self.model)),
            format!("served_model_name={}", json!(self.name)),
            format!("threads={}", args.threads),
            format!("max_step_tokens={}", args.chunk),
            format!("block_tokens={}", args.block_tokens),
            match args.etcd.is_empty() {
                true => format!("membership.registry={}", json!(router)),
                false => format!("membership.etcd={}", json!(args.etcd)),
            },
        ];
        // All workers are on one GPU.
        let workers = args.prefill + args.decode + args.both;
        set.push(format!("gpu_memory_utilization={}", worker::GPU_SHARE / workers as f32));
        set.extend(args.kv_blocks.map(|blocks| format!("kv_blocks={blocks}")));
        set.extend(self.traces());
        command("worker", set, &args.worker_set)
    }

    fn gateway_arguments(&self) -> Vec<String> {
        let mut set = vec![
            format!("listen={}:{}", bracketed(self.args.host), self.args.port),
            "admin=127.0.0.1:0".into(),
            format!("routers={}", json!(self.router_addresses())),
            format!("model_dir={}", json!(self.model)),
            format!("served_model_name={}", json!([self.name])),
        ];
        set.extend(self.traces());
        command("gateway", set, &self.args.gateway_set)
    }

    fn traces(&self) -> Option<String> {
        self.args.traces.as_ref().map(|endpoint| format!("traces.endpoint={}", json!(endpoint)))
    }

    /// Polls the gateway until it would serve. A child that dies meanwhile ends the wait with its log.
    async fn wait_until_ready(&mut self, deadline: Instant) -> anyhow::Result<()> {
        let client = Client::new(&self.gateway_addresses().http)?;
        let reason = std::cell::RefCell::new(String::from("no answer yet"));
        let ready = async {
            loop {
                match client.get("/ready").await {
                    Ok((status, _)) if status.is_success() => return,
                    Ok((_, body)) => *reason.borrow_mut() = String::from_utf8_lossy(&body).trim().to_owned(),
                    Err(error) => *reason.borrow_mut() = format!("{error:#}"),
                }
                sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            ready = timeout_at(deadline, ready) => match ready {
                Ok(()) => Ok(()),
                Err(_) => bail!("not ready after {} s; the gateway says: {}", self.args.ready_timeout, reason.borrow()),
            },
            error = died(&mut self.gateway, self.routers.iter_mut().chain(&mut self.workers)) => Err(error),
        }
    }

    fn gateway_addresses(&self) -> Addresses {
        self.gateway.as_ref().map(|child| child.addresses.clone()).unwrap_or_default()
    }

    fn as_json(&self) -> serde_json::Value {
        let one = |child: &Child| json!({"pid": child.pid, "grpc": child.addresses.grpc, "http": child.addresses.http, "admin": child.addresses.admin});
        let named = |service: &Service| {
            let mut value = one(&service.child);
            value["role"] = json!(service.role);
            value["name"] = json!(service.child.name);
            value
        };
        let [routers, workers] =
            [&self.routers, &self.workers].map(|services| services.iter().map(named).collect::<Vec<_>>());
        json!({
            "model": self.name,
            "gateway": self.gateway.as_ref().map(one),
            "router": routers[0],
            "routers": routers,
            "workers": workers,
            "logs": self.logs,
        })
    }

    fn banner(&self) -> String {
        let url = self.gateway_addresses().http;
        let mut text = format!("\nBaton is ready: {url}/v1 serves {}\n\n", self.name);
        text += &format!("  Look at it:  {url}/dashboard\n\n");
        let others = self.routers.iter().chain(&self.workers).map(|service| &service.child);
        let services = self.gateway.iter().chain(others);
        for child in services {
            let address =
                if child.addresses.http.is_empty() { &child.addresses.grpc } else { &child.addresses.http };
            let metrics = format!("{}/metrics", child.addresses.admin);
            text += &format!("  {:<10} pid {:<8} {:<26} {metrics}\n", child.name, child.pid, address);
        }
        if let Some(logs) = &self.logs {
            text += &format!("\n  logs in {}\n", logs.display());
        }
        text + &examples(&url, &self.name) + "\nCtrl-C stops everything."
    }
}

impl Service {
    fn new(role: &'static str, child: Child) -> Self {
        Service { role, child, since: Instant::now(), restarts: 0 }
    }

    fn count_restart(&mut self) -> anyhow::Result<()> {
        if self.since.elapsed() > LONG {
            self.restarts = 0;
        }
        if self.restarts == RESTARTS {
            bail!("{} has died {} times; giving up", self.child.name, RESTARTS + 1);
        }
        self.restarts += 1;
        Ok(())
    }
}

/// How to ask a question, for a newcomer to paste.
fn examples(url: &str, model: &str) -> String {
    let question = r#"{"role": "user", "content": "What does `Vec::push` do?"}"#;
    format!(
        r#"
Ask with curl:

  curl {url}/v1/chat/completions -H 'content-type: application/json' \
    -d '{{"model": "{model}", "messages": [{question}]}}'

or from Python (pip install openai):

  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="none")
  answer = client.chat.completions.create(model="{model}", messages=[{question}])
  print(answer.choices[0].message.content)
"#
    )
}

fn leaving(worker: &worker::Config, gateway: &gateway::Config) -> Duration {
    let worker = worker.drain_ms.saturating_add(worker.handover_ms);
    Duration::from_millis(worker.max(gateway.timeouts.drain_ms)).saturating_add(CLOSING)
}

/// The error of the first service to die.
async fn died(gateway: &mut Option<Child>, others: impl Iterator<Item = &mut Service>) -> anyhow::Error {
    let children = gateway.iter_mut().chain(others.map(|service| &mut service.child));
    select_all(children.map(|child| Box::pin(child.died()))).await.0
}

async fn end(mut children: Vec<&mut Child>, patience: Duration) {
    children.iter().for_each(|child| child.terminate());
    let waits = children.iter_mut().map(|child| async move {
        if timeout(patience, child.wait()).await.is_err() {
            eprintln!("baton up: {} did not stop in time and is killed", child.name);
            child.kill().await;
        }
    });
    join_all(waits).await;
}

fn command(service: &str, set: Vec<String>, overrides: &[String]) -> Vec<String> {
    let sets = set.into_iter().chain(overrides.iter().cloned());
    std::iter::once(service.to_owned()).chain(sets.flat_map(|set| ["--set".to_owned(), set])).collect()
}

fn bracketed(host: std::net::IpAddr) -> String {
    if host.is_ipv6() { format!("[{host}]") } else { host.to_string() }
}

fn directory_name(directory: &Path) -> String {
    let name =
        directory.canonicalize().ok().and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
    name.unwrap_or_else(|| "model".into())
}

fn log_directory(asked: Option<&Path>) -> anyhow::Result<PathBuf> {
    let directory = asked
        .map(Path::to_owned)
        .unwrap_or_else(|| std::env::temp_dir().join(format!("baton-up-{}", std::process::id())));
    fs::create_dir_all(&directory)
        .with_context(|| format!("cannot create the log directory {}", directory.display()))?;
    Ok(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_have_the_time_they_are_configured_to_take() {
        let set = |set: &[&str]| set.iter().map(|set| (*set).to_owned()).collect::<Vec<String>>();
        let with = |worker: &[&str], gateway: &[&str]| {
            let worker = settings::load(None, &set(worker)).unwrap();
            leaving(&worker, &settings::load(None, &set(gateway)).unwrap())
        };
        assert!(with(&[], &[]) + ROUTERS < Duration::from_secs(10), "{:?}", with(&[], &[]));
        assert_eq!(with(&["drain_ms=60000", "handover_ms=3000"], &[]), Duration::from_secs(65));
        assert_eq!(with(&[], &["timeouts.drain_ms=30000"]), Duration::from_secs(32));
    }
}
