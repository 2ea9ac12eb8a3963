//! RDMA on this machine, if the transport nixl is asked for: NIXL itself, devices and their links, memory that may be locked.

use super::finding::Finding;
use rustix::process::{Resource, getrlimit};
use std::{fs, path::Path};

const CHECK: &str = "rdma";
const DEVICES: &str = "/sys/class/infiniband";
const ACTIVE: &str = "ACTIVE";
/// Registered memory is locked; a pool is never smaller.
const LOCKED: u64 = 1 << 30;

pub struct Found {
    /// Why NIXL cannot be used.
    pub nixl: Result<(), String>,
    /// Ports by name, and their state as the kernel words it.
    pub ports: Vec<(String, String)>,
    /// Absent: unlimited.
    pub lockable: Option<u64>,
}

pub fn gather() -> Found {
    Found {
        nixl: worker::nixl().map_err(|error| error.to_string()),
        ports: ports(Path::new(DEVICES)),
        lockable: getrlimit(Resource::Memlock).current,
    }
}

fn ports(devices: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for device in entries(devices) {
        for port in entries(&devices.join(&device).join("ports")) {
            let state = fs::read_to_string(devices.join(&device).join("ports").join(&port).join("state"));
            found.push((format!("{device}/{port}"), state.unwrap_or_default().trim().to_owned()));
        }
    }
    found.sort();
    found
}

fn entries(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// `asked`: some worker is configured to use it, or this binary could.
pub fn judge(found: &Found, asked: bool) -> Vec<Finding> {
    if !asked {
        return vec![Finding::not_checked(
            CHECK,
            "this machine",
            "no configuration given here asks for transport = \"nixl\"",
        )];
    }
    // What stands in the way of NIXL itself, the configuration's own check has told already.
    let mut findings = Vec::new();
    if found.nixl.is_ok() {
        findings.push(Finding::ok(CHECK, "NIXL", "in this binary, and its library can be loaded"));
    }
    findings.push(link(&found.ports));
    findings.push(match found.lockable {
        Some(bytes) if bytes < LOCKED => Finding::warning(
            CHECK,
            "memlock",
            format!("{} MiB may be locked", bytes >> 20),
        )
        .expected("unlimited, or more than the KV pool: registered memory is locked")
        .remedy(
            "`ulimit -l unlimited`, LimitMEMLOCK=infinity, or in a container --ulimit memlock=-1 or IPC_LOCK",
        ),
        Some(bytes) => Finding::ok(CHECK, "memlock", format!("{} MiB may be locked", bytes >> 20)),
        None => Finding::ok(CHECK, "memlock", "unlimited"),
    });
    findings
}

fn link(ports: &[(String, String)]) -> Finding {
    let told: Vec<String> = ports.iter().map(|(port, state)| format!("{port} {state}")).collect();
    let active = ports.iter().any(|(_, state)| state.contains(ACTIVE));
    match ports {
        [] => Finding::not_checked(CHECK, DEVICES, "no RDMA device: NIXL takes shared memory or TCP here"),
        _ if active => Finding::ok(CHECK, DEVICES, told.join(", ")),
        _ => Finding::warning(CHECK, DEVICES, told.join(", "))
            .expected("a port that is ACTIVE")
            .remedy("see cable, switch and subnet manager (ibstat, rdma link); until then NIXL takes TCP"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::Severity;

    fn found(ports: &[&str], lockable: Option<u64>) -> Found {
        let ports = ports.iter().map(|state| ("mlx5_0/1".to_owned(), (*state).to_owned())).collect();
        Found { nixl: Ok(()), ports, lockable }
    }

    fn worst(found: &Found) -> Option<Severity> {
        judge(found, true).into_iter().map(|finding| finding.severity).max()
    }

    #[test]
    fn devices_links_and_limits_are_judged() {
        assert_eq!(worst(&found(&["4: ACTIVE"], None)), Some(Severity::Ok));
        assert_eq!(worst(&found(&["4: ACTIVE", "1: DOWN"], None)), Some(Severity::Ok));
        assert_eq!(worst(&found(&["1: DOWN"], None)), Some(Severity::Warning));
        assert_eq!(worst(&found(&[], None)), Some(Severity::NotChecked));
        assert_eq!(worst(&found(&["4: ACTIVE"], Some(8 << 20))), Some(Severity::Warning));
        assert_eq!(judge(&found(&[], None), false)[0].severity, Severity::NotChecked);
    }

    #[test]
    fn ports_are_read_from_the_kernels_tree() {
        let root = std::env::temp_dir().join(format!("baton-doctor-rdma-{}", std::process::id()));
        let port = root.join("mlx5_0/ports/1");
        fs::create_dir_all(&port).unwrap();
        fs::write(port.join("state"), "4: ACTIVE\n").unwrap();
        assert_eq!(ports(&root), [("mlx5_0/1".to_owned(), "4: ACTIVE".to_owned())]);
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(ports(&root), []);
    }
}
