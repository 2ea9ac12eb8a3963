//! Open files: every client, router and worker is a connection, and each is a file.

use super::{
    configs::{Read, Service},
    finding::Finding,
    members::Member,
};
use rustix::process::{Resource, getrlimit};
use std::fs;

const CHECK: &str = "limits";
/// Of a service beside its connections: libraries, logs, listeners, weights, with room.
const BESIDE: u64 = 256;
/// Of a service without a configuration to tell: the defaults' 1024 requests at the same time.
const CONNECTIONS: u64 = 1024;

/// A limit, of this process or of one of Baton's on this machine.
pub struct Limit {
    pub subject: String,
    /// Absent: unlimited.
    pub open_files: Option<u64>,
    pub needed: u64,
}

pub fn gather(files: &[Read], members: &[Member]) -> Vec<Limit> {
    let here = Limit {
        subject: "open files of what is started from here".to_owned(),
        open_files: getrlimit(Resource::Nofile).current,
        needed: files.iter().map(|file| connections(&file.service)).max().unwrap_or(CONNECTIONS) + BESIDE,
    };
    let running = members.iter().filter_map(|member| {
        let limits =
            fs::read_to_string(format!("/proc/{}/limits", member.pid)).ok().filter(|_| is_here(member))?;
        let subject = format!("open files of {}", member.id);
        Some(Limit { subject, open_files: open_files(&limits)?, needed: CONNECTIONS + BESIDE })
    });
    std::iter::once(here).chain(running).collect()
}

/// The same process id elsewhere would be somebody else.
fn is_here(member: &Member) -> bool {
    let command = fs::read_to_string(format!("/proc/{}/cmdline", member.pid)).unwrap_or_default();
    member.address.contains("//127.") && command.contains("worker")
}

/// Most connections that a configuration allows at the same time.
fn connections(service: &Service) -> u64 {
    match service {
        Service::Gateway(config) => config.limits.concurrent_requests as u64,
        Service::Router(config) => config.members.connections as u64 * 64,
        Service::Worker(_) => CONNECTIONS,
    }
}

/// The soft limit, of /proc/PID/limits; the inner `None` is no limit.
fn open_files(limits: &str) -> Option<Option<u64>> {
    let line = limits.lines().find(|line| line.starts_with("Max open files"))?;
    let soft = line.split_whitespace().nth(3)?;
    if soft == "unlimited" { Some(None) } else { soft.parse().ok().map(Some) }
}

pub fn judge(limits: &[Limit]) -> Vec<Finding> {
    limits.iter().map(one).collect()
}

fn one(limit: &Limit) -> Finding {
    match limit.open_files {
        None => Finding::ok(CHECK, &limit.subject, "unlimited"),
        Some(files) if files >= limit.needed => Finding::ok(CHECK, &limit.subject, files.to_string()),
        Some(files) => Finding::warning(CHECK, &limit.subject, format!("at most {files}"))
            .expected(format!("at least {}: a file for each connection, and {BESIDE} beside", limit.needed))
            .remedy(format!(
                "`ulimit -n {}` before starting, or LimitNOFILE= of its unit",
                (limit.needed).next_power_of_two()
            )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::Severity;

    #[test]
    fn the_kernels_table_is_read() {
        let text = "Limit    Soft Limit  Hard Limit  Units\nMax open files            1024                 524288               files\n";
        assert_eq!(open_files(text), Some(Some(1024)));
        assert_eq!(open_files(&text.replace("1024  ", "unlimited")), Some(None));
        assert_eq!(open_files("nothing"), None);
    }

    #[test]
    fn too_few_is_a_warning() {
        let limit = |open_files| Limit { subject: "x".into(), open_files, needed: 1280 };
        for (files, severity) in
            [(None, Severity::Ok), (Some(1280), Severity::Ok), (Some(1024), Severity::Warning)]
        {
            assert_eq!(one(&limit(files)).severity, severity);
        }
        assert!(one(&limit(Some(256))).remedy.contains("ulimit -n 2048"));
    }
}
