//! Network namespaces: one host for each process, joined by a bridge in a namespace of its own, so that packets between
//! any two can be dropped in one direction, or lost now and then. Names carry this process's id; nothing stays behind.
//! Needs root, `ip`, and for faults `iptables`.

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::{fs::File, os::fd::AsFd, path::Path, process::Command, thread};

pub struct Network {
    prefix: String,
    hosts: u8,
}

/// A namespace with one address.
#[derive(Clone, Debug)]
pub struct Host {
    pub namespace: String,
    pub ip: String,
}

impl Network {
    /// What is missing here.
    pub fn lacks() -> Option<String> {
        if !rustix::process::geteuid().is_root() {
            return Some("network namespaces need root".into());
        }
        if let Some(tool) = ["ip", "iptables"].into_iter().find(|tool| !has(tool)) {
            return Some(format!("there is no `{tool}` in $PATH"));
        }
        // Root in a container may lack the capability.
        let name = format!("bt{}-try", std::process::id());
        let netns = |verb: &str| Command::new("ip").args(["netns", verb, &name]).status();
        let made = netns("add").is_ok_and(|status| status.success());
        let _ = netns("del");
        (!made).then(|| "network namespaces cannot be made here".into())
    }

    pub fn new() -> Self {
        remove_stale();
        let network = Network { prefix: format!("bt{}", std::process::id()), hosts: 0 };
        let switch = network.switch();
        ip(&format!("netns add {switch}"));
        ip(&format!("-n {switch} link add br0 type bridge"));
        ip(&format!("-n {switch} link set br0 up"));
        network
    }

    pub fn host(&mut self) -> Host {
        self.hosts += 1;
        let (n, switch) = (self.hosts, self.switch());
        let host = Host { namespace: format!("{}-h{n}", self.prefix), ip: format!("10.77.0.{n}") };
        let name = &host.namespace;
        ip(&format!("netns add {name}"));
        ip(&format!("link add v{n} netns {switch} type veth peer name eth0 netns {name}"));
        ip(&format!("-n {switch} link set v{n} master br0 up"));
        ip(&format!("-n {name} addr add {}/24 dev eth0", host.ip));
        ip(&format!("-n {name} link set eth0 up"));
        ip(&format!("-n {name} link set lo up"));
        host
    }

    fn switch(&self) -> String {
        format!("{}-sw", self.prefix)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let hosts = (1..=self.hosts).map(|n| format!("{}-h{n}", self.prefix));
        for name in hosts.chain([self.switch()]) {
            let _ = Command::new("ip").args(["netns", "del", &name]).status();
        }
    }
}

impl Host {
    /// What to put before a command to run it here.
    pub fn exec(&self) -> Vec<String> {
        ["ip", "netns", "exec", &self.namespace].map(str::to_owned).to_vec()
    }

    /// Drops what comes from `other`, and only that.
    pub fn drop_from(&self, other: &Host) {
        self.iptables(&format!("-A INPUT -s {} -j DROP", other.ip));
    }

    /// Drops one packet in twenty of what comes in.
    pub fn lose_packets(&self) {
        self.iptables("-A INPUT ! -i lo -m statistic --mode random --probability 0.05 -j DROP");
    }

    pub fn heal(&self) {
        self.iptables("-F INPUT");
    }

    fn iptables(&self, arguments: &str) {
        ip(&format!("netns exec {} iptables -w {arguments}", self.namespace));
    }

    /// Runs `work` on a thread that stands here, and so do all threads and processes that it starts.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let run = || {
            let namespace = File::open(Path::new("/run/netns").join(&self.namespace)).expect("the namespace");
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).expect("setns");
            work()
        };
        thread::scope(|scope| match scope.spawn(run).join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    }
}

/// Namespaces of test processes that were killed.
fn remove_stale() {
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return };
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let owner = name.strip_prefix("bt").and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            let _ = Command::new("ip").args(["netns", "del", &name]).status();
        }
    }
}

fn has(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(tool).is_file())
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("ip runs");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}
