//! Real etcd for tests: a cluster of servers on free loopback ports that can be killed, stopped, frozen
//! and started again with their data; nothing is left behind when it is dropped. Uses the standard
//! library and `tempfile` only, so that any test can include it with `#[path]`.
#![allow(dead_code)] // each test binary uses its part

use std::{
    env,
    fs::File,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// For an election on a busy machine, with room.
const READY: Duration = Duration::from_secs(60);
/// A port may be taken between its choice and its use: then others are chosen, so many times.
pub const TRIES: usize = 3;
/// Where files lie in memory, and what must be free there: each server takes 128 MiB before its first commit.
const MEMORY: &str = "/dev/shm";
const MEMORY_KIB: u64 = 4 << 20;

pub struct EtcdCluster {
    servers: Vec<Server>,
    binary: PathBuf,
    dir: TempDir,
}

/// Where a server runs.
#[derive(Clone)]
pub struct Place {
    pub ip: String,
    /// What to put before its command, to run it there.
    pub exec: Vec<String>,
}

struct Server {
    place: Place,
    client_port: u16,
    peer_port: u16,
    process: Option<Child>,
}

impl EtcdCluster {
    /// Blocks until the cluster answers. Panics, saying what to do, if there is no etcd to run.
    pub fn start(servers: usize) -> Self {
        let binary = find_etcd();
        for _ in 0..TRIES {
            if let Some(cluster) = Self::try_start(on_loopback(servers), binary.clone()) {
                return cluster;
            }
        }
        panic!("etcd ({}) does not start here", binary.display());
    }

    /// One server in each place, which has its ports for itself.
    pub fn start_in(places: Vec<Place>) -> Self {
        let server = |place| Server { place, client_port: 2379, peer_port: 2380, process: None };
        let servers = places.into_iter().map(server).collect();
        Self::try_start(servers, find_etcd()).expect("etcd starts in each place")
    }

    fn try_start(servers: Vec<Server>, binary: PathBuf) -> Option<Self> {
        let mut cluster = Self { servers, binary, dir: directory() };
        cluster.start_all();
        cluster.wait_until_ready().then_some(cluster)
    }

    pub fn len(&self) -> usize {
        self.servers.len()
    }

    /// Client URLs of all servers, dead or alive.
    pub fn endpoints(&self) -> Vec<String> {
        let url = |server: &Server| format!("http://{}:{}", server.place.ip, server.client_port);
        self.servers.iter().map(url).collect()
    }

    /// SIGKILL, and gone when this returns.
    pub fn kill(&mut self, server: usize) {
        if let Some(mut process) = self.servers[server].process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    pub fn kill_all(&mut self) {
        (0..self.len()).for_each(|server| self.kill(server));
    }

    /// SIGTERM; SIGKILL if that does not help.
    pub fn stop(&mut self, server: usize) {
        self.signal(server, "TERM");
        let process = self.servers[server].process.as_mut();
        let ended = |process: &mut Child| !matches!(process.try_wait(), Ok(None));
        if let Some(process) = process {
            wait_until(Duration::from_secs(5), || ended(process));
        }
        self.kill(server);
    }

    /// The process stays, and so do its connections, but it answers nothing.
    pub fn freeze(&self, server: usize) {
        self.signal(server, "STOP");
    }

    pub fn thaw(&self, server: usize) {
        self.signal(server, "CONT");
    }

    /// Starts whatever is not running, with the data it had, and waits until the cluster answers.
    pub fn restart(&mut self) {
        self.start_all();
        assert!(self.wait_until_ready(), "etcd does not come back");
    }

    /// All members die and lose their data.
    pub fn wipe(&mut self) {
        self.kill_all();
        for server in 0..self.len() {
            let _ = std::fs::remove_dir_all(self.dir.path().join(format!("s{server}")));
        }
    }

    /// The server that leads, if the cluster has a leader now.
    pub fn leader(&self) -> Option<usize> {
        let statuses: Vec<_> = self.servers.iter().map(Server::status).collect();
        let leader = statuses.iter().flatten().find_map(|status| field(status, "leader"))?;
        let leads = |status: &Option<String>| {
            let id = status.as_deref().and_then(|status| field(status, "member_id"));
            id == Some(leader)
        };
        statuses.iter().position(leads)
    }

    /// The same once there is one: a starved leader is voted out.
    pub fn elected(&self) -> usize {
        let mut leader = None;
        wait_until(READY, || {
            leader = self.leader();
            leader.is_some()
        });
        leader.expect("a leader")
    }

    fn start_all(&mut self) {
        let peers: Vec<_> = self
            .servers
            .iter()
            .enumerate()
            .map(|(at, server)| format!("s{at}=http://{}:{}", server.place.ip, server.peer_port))
            .collect();
        let peers = peers.join(",");
        for (at, server) in self.servers.iter_mut().enumerate() {
            if server.process.is_none() {
                let process = server.spawn(&self.binary, at, self.dir.path(), &peers);
                server.process = Some(process);
            }
        }
    }

    /// False if a server ended instead.
    fn wait_until_ready(&mut self) -> bool {
        let mut failed = false;
        wait_until(READY, || {
            failed = self.servers.iter_mut().any(Server::has_ended);
            failed || self.servers.iter().all(Server::is_healthy)
        });
        !failed && self.servers.iter().all(Server::is_healthy)
    }

    fn signal(&self, server: usize, signal: &str) {
        if let Some(process) = &self.servers[server].process {
            let _ = Command::new("kill").args([format!("-{signal}"), process.id().to_string()]).status();
        }
    }
}

impl Drop for EtcdCluster {
    fn drop(&mut self) {
        self.kill_all();
    }
}

impl Server {
    fn spawn(&self, binary: &Path, at: usize, dir: &Path, peers: &str) -> Child {
        let client = format!("http://{}:{}", self.place.ip, self.client_port);
        let peer = format!("http://{}:{}", self.place.ip, self.peer_port);
        let log = File::options()
            .create(true)
            .append(true)
            .open(dir.join(format!("s{at}.log")))
            .expect("a log file");
        let binary = binary.to_str().expect("a path of plain text").to_owned();
        let mut command = self.place.exec.iter().chain([&binary]);
        Command::new(command.next().expect("the binary at least"))
            .args(command)
            .args(["--name", &format!("s{at}")])
            .arg("--data-dir")
            .arg(dir.join(format!("s{at}")))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", peers])
            .args(["--heartbeat-interval", "100", "--election-timeout", "1000"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log file"))
            .stderr(log)
            .spawn()
            .expect("etcd starts")
    }

    fn has_ended(&mut self) -> bool {
        let process = self.process.as_mut();
        process.is_some_and(|process| !matches!(process.try_wait(), Ok(None)))
    }

    /// Healthy means: serves, and its cluster has a leader.
    fn is_healthy(&self) -> bool {
        self.get("/health").is_some_and(|body| body.contains("\"true\""))
    }

    fn status(&self) -> Option<String> {
        self.process.as_ref()?;
        self.post("/v3/maintenance/status", "{}")
    }

    fn get(&self, path: &str) -> Option<String> {
        self.http("GET", path, "").ok()
    }

    fn post(&self, path: &str, body: &str) -> Option<String> {
        self.http("POST", path, body).ok()
    }

    /// etcd's HTTP face, so that this file needs no gRPC client.
    fn http(&self, method: &str, path: &str, body: &str) -> io::Result<String> {
        let ip: IpAddr = self.place.ip.parse().expect("an address");
        let address = SocketAddr::from((ip, self.client_port));
        let timeout = Duration::from_secs(2);
        let mut stream = TcpStream::connect_timeout(&address, timeout)?;
        stream.set_read_timeout(Some(timeout))?;
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: etcd\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        match answer.starts_with("HTTP/1.1 200") {
            true => Ok(answer),
            false => Err(io::Error::other(answer)),
        }
    }
}

/// `"name":"value"` in flat JSON.
fn field<'a>(json: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = json.split_once(&format!("\"{name}\":\""))?;
    rest.split('"').next()
}

fn on_loopback(servers: usize) -> Vec<Server> {
    let server = |ports: &[u16]| Server {
        place: Place { ip: Ipv4Addr::LOCALHOST.to_string(), exec: Vec::new() },
        client_port: ports[0],
        peer_port: ports[1],
        process: None,
    };
    choose_ports(2 * servers).chunks(2).map(server).collect()
}

pub fn choose_ports(count: usize) -> Vec<u16> {
    // All held at once, so that no port is chosen twice.
    let bind = |_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let held: Vec<_> = (0..count).map(bind).collect();
    held.iter().map(|listener| listener.local_addr().expect("a bound port").port()).collect()
}

/// In memory if there is room: etcd commits nothing before it is on a disk, which others keep busy too.
pub fn directory() -> TempDir {
    let roomy = free_kib(MEMORY) >= Some(MEMORY_KIB);
    let made = if roomy { TempDir::new_in(MEMORY) } else { TempDir::new() };
    made.expect("a temporary directory")
}

/// By `df`, in whose last line the fourth word is what is free.
fn free_kib(path: &str) -> Option<u64> {
    let said = Command::new("df").args(["-Pk", path]).output().ok()?;
    let said = String::from_utf8(said.stdout).ok()?;
    said.lines().last()?.split_whitespace().nth(3)?.parse().ok()
}

pub fn find_etcd() -> PathBuf {
    if let Some(path) = env::var_os("BATON_ETCD_BIN") {
        return path.into();
    }
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).map(|dir| dir.join("etcd")).find(|binary| binary.is_file()).expect(
        "this test needs a real etcd, and there is none in $PATH: `make test` installs it \
             (or name one in BATON_ETCD_BIN)",
    )
}

pub fn wait_until(timeout: Duration, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() && start.elapsed() < timeout {
        thread::sleep(Duration::from_millis(50));
    }
}
