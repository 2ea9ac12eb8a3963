//! A cluster on the simulated network: the real gateway, routers and workers, each on a host of its own, with
//! a membership in the same process. A host can be killed: what it says from then on reaches nobody, and what
//! its tasks still do is of no consequence. It can be started again, at the same address, as another
//! incarnation.

use crate::{
    device::{Broken, Controls, Device},
    nature::Chance,
    net::{Listener, Net},
    shape::Shape,
};
use engine::EngineHandle;
use membership::{Membership, Memory};
use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock},
};
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};

pub const GATEWAY: &str = "gateway:8000";
/// Name of the model in requests.
pub const MODEL: &str = "sim";

#[derive(Clone)]
pub struct Cluster {
    pub net: Net,
    pub members: Memory,
    pub shape: Arc<Shape>,
    broken: Option<Broken>,
    hosts: Arc<Mutex<Hosts>>,
}

#[derive(Default)]
struct Hosts {
    incarnations: u64,
    /// By name, those that live.
    live: BTreeMap<String, Host>,
}

/// One incarnation of a service.
pub struct Host {
    /// Name and incarnation: what the network and the membership know.
    pub id: String,
    pub worker: Option<WorkerHost>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), String>>,
}

#[derive(Clone)]
pub struct WorkerHost {
    /// There once the worker has started.
    pub engine: Arc<OnceLock<EngineHandle>>,
    pub controls: Controls,
}

impl Cluster {
    pub fn start(shape: Shape, net: Net, broken: Option<Broken>) -> Self {
        let members = Memory::new(shape.lease());
        let cluster = Cluster { net, members, shape: Arc::new(shape), broken, hosts: Arc::default() };
        cluster.shape.names().iter().for_each(|name| cluster.start_host(name));
        cluster
    }

    pub fn start_host(&self, name: &str) {
        let id = {
            let mut hosts = self.hosts.lock().expect("sound");
            hosts.incarnations += 1;
            format!("{name}.{}", hosts.incarnations)
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let stopped = async { drop(stopped.await) };
        let role = name.split('-').next().unwrap_or_default();
        let mut worker = None;
        let task = match role {
            "gateway" => self.gateway(&id, stopped),
            "router" => self.router(&id, name, stopped),
            role => {
                let host = worker.insert(self.worker_host(&id));
                self.worker(&id, name, role, host.clone(), stopped)
            }
        };
        self.net.journal.note(&id, "starts");
        let host = Host { id, worker, stop: Some(stop), task };
        self.hosts.lock().expect("sound").live.insert(name.to_owned(), host);
    }

    /// Not a byte more, and no leave.
    pub fn kill(&self, name: &str) {
        let Some(host) = self.hosts.lock().expect("sound").live.remove(name) else { return };
        self.net.journal.note(&host.id, "is killed");
        self.members.connect(&host.id, false);
        self.net.kill(&host.id);
        host.task.abort();
        if let Some(worker) = host.worker {
            worker.controls.hung.send_replace(false);
        }
    }

    /// SIGTERM; resolves when the process has ended.
    pub async fn terminate(&self, name: &str) {
        let Some(mut host) = self.hosts.lock().expect("sound").live.remove(name) else { return };
        self.net.journal.note(&host.id, "is told to stop");
        drop(host.stop.take());
        let _ = host.task.await;
    }

    pub fn id(&self, name: &str) -> Option<String> {
        self.hosts.lock().expect("sound").live.get(name).map(|host| host.id.clone())
    }

    /// Workers that live, by their ids.
    pub fn workers(&self) -> Vec<(String, WorkerHost)> {
        let hosts = self.hosts.lock().expect("sound");
        let workers = hosts.live.values().filter_map(|host| Some((host.id.clone(), host.worker.clone()?)));
        workers.collect()
    }

    pub fn worker_named(&self, name: &str) -> Option<WorkerHost> {
        self.hosts.lock().expect("sound").live.get(name).and_then(|host| host.worker.clone())
    }

    /// Names of hosts whose process has ended by itself, and why.
    pub fn ended(&self) -> Vec<String> {
        let hosts = self.hosts.lock().expect("sound");
        hosts.live.iter().filter(|(_, host)| host.task.is_finished()).map(|(name, _)| name.clone()).collect()
    }

    /// Starts again what has ended by itself.
    pub fn replace(&self, name: &str) {
        self.kill(name);
        self.start_host(name);
    }

    fn gateway(&self, id: &str, stop: impl Future<Output = ()> + Send + 'static) -> Running {
        let [public, admin] = [GATEWAY, "gateway:8001"].map(|at| Listener(self.net.listen(id, at)));
        let server = gateway::Server::on(self.shape.gateway(), &self.net.dialing(id), public, admin);
        let server = server.expect("a configuration that works");
        self.run(id, async move { server.serve(stop).await.map_err(|error| error.to_string()) })
    }

    fn router(&self, id: &str, name: &str, stop: impl Future<Output = ()> + Send + 'static) -> Running {
        let (incoming, admin) = self.ports(id, name);
        let mut router = router::Router::new(self.shape.router()).expect("a configuration that works");
        router = router.with_dial(self.net.dialing(id));
        if !self.shape.registry {
            router = router.with_members(self.members.client(id, self.shape.lag));
        }
        self.run(id, async move { router.serve(incoming, admin, stop).await.map_err(|e| e.to_string()) })
    }

    fn worker_host(&self, id: &str) -> WorkerHost {
        let own = Chance::new(self.shape.seed, id).next();
        let controls = Controls {
            hung: Arc::new(watch::Sender::new(false)),
            failing: Arc::default(),
            damage: self.shape.damage,
            broken: self.broken,
            own,
        };
        WorkerHost { engine: Arc::default(), controls }
    }

    fn worker(
        &self,
        id: &str,
        name: &str,
        role: &str,
        host: WorkerHost,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> Running {
        let place = worker::Place {
            addresses: worker::Addresses {
                grpc: format!("http://{name}:7000"),
                admin: format!("http://{name}:7001"),
            },
            membership: self.membership(id),
            dial: self.net.dialing(id),
            credentials: credentials::Metrics::default(),
        };
        let chance = Chance::new(self.shape.seed, &format!("device of {id}"));
        let load = move |config: worker::Config, on_step| async move {
            let options = worker::simulated::options(&config)?;
            let weights = worker::simulated::weights_fingerprint(&options, config.seed);
            let device = Device::new(options, host.controls, chance);
            let (engine, driven) = engine::drive(device, worker::engine_config(&config, on_step));
            tokio::spawn(driven);
            let _ = host.engine.set(engine.clone());
            worker::loaded(&config, engine, weights, MODEL)
        };
        let (incoming, admin) = self.ports(id, name);
        let served = worker::serve(self.shape.worker(role), place, incoming, admin, load, stop);
        self.run(id, async move { served.await.map_err(|error| error.to_string()) })
    }

    fn membership(&self, id: &str) -> Arc<dyn Membership> {
        match self.shape.registry {
            true => membership::registry("http://router-0:7000", self.net.dialing(id)).expect("an address"),
            false => self.members.client(id, self.shape.lag),
        }
    }

    /// With the end of the service its process ends, and its connections with it.
    fn run(&self, id: &str, service: impl Future<Output = Result<(), String>> + Send + 'static) -> Running {
        let (net, id) = (self.net.clone(), id.to_owned());
        tokio::spawn(async move {
            let outcome = service.await;
            net.journal.note(&id, format!("has ended: {outcome:?}"));
            net.kill(&id);
            outcome
        })
    }

    fn ports(&self, id: &str, name: &str) -> (impl Incoming, Listener) {
        let [grpc, admin] = ["7000", "7001"].map(|port| self.net.listen(id, &format!("{name}:{port}")));
        (ReceiverStream::new(grpc).map(io::Result::Ok), Listener(admin))
    }
}

type Running = JoinHandle<Result<(), String>>;

trait Incoming: tokio_stream::Stream<Item = io::Result<crate::net::Conn>> + Send + 'static {}
impl<I: tokio_stream::Stream<Item = io::Result<crate::net::Conn>> + Send + 'static> Incoming for I {}

/// The demo model's directory: its tokenizer and its shape are used, its weights are not.
pub fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/demo/checkpoint")
}
