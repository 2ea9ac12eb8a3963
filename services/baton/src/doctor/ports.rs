//! Ports that configuration files name: free, or held by whom.

use super::finding::Finding;
use crate::http::Client;
use std::{
    collections::BTreeSet,
    fs, io,
    net::{SocketAddr, TcpListener},
    time::Duration,
};
use tokio::{task::spawn_blocking, time::timeout};

const CHECK: &str = "ports";

/// What came of trying to listen.
#[derive(Debug)]
pub enum Tried {
    Free,
    /// By the process, if it can be told, and whether a Baton service answers there.
    Held {
        by: Option<String>,
        baton: bool,
    },
    /// The address is of another machine, or may not be used here.
    Cannot(io::ErrorKind, String),
}

pub async fn gather(address: SocketAddr, patience: Duration) -> Tried {
    match TcpListener::bind(address) {
        Ok(_) => Tried::Free,
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            // It reads what is open in every process, which takes a while; whoever is not found in time is not told.
            let looking = spawn_blocking(move || owner(address.port()));
            let by = timeout(patience, looking).await.ok().and_then(|found| found.ok().flatten());
            let baton =
                by.as_deref().is_some_and(|by| by.starts_with("baton")) || answers(address, patience).await;
            Tried::Held { by, baton }
        }
        Err(error) => Tried::Cannot(error.kind(), error.to_string()),
    }
}

pub fn judge(subject: &str, key: &str, address: SocketAddr, tried: &Tried) -> Finding {
    let subject = format!("{key} = {address} of {subject}");
    match tried {
        Tried::Free => Finding::ok(CHECK, subject, "free"),
        Tried::Held { by, baton: true } => {
            let by = by.as_deref().unwrap_or("a Baton service");
            Finding::ok(CHECK, subject, format!("held by {by}: the service runs"))
        }
        Tried::Held { by, baton: false } => {
            let by = by.as_deref().unwrap_or("a process that cannot be seen from here");
            Finding::error(CHECK, subject, format!("in use by {by}"))
                .expected("a free port, or the Baton service itself")
                .remedy(format!("end that process, or give {key} another port"))
        }
        Tried::Cannot(io::ErrorKind::AddrNotAvailable, _) => {
            Finding::not_checked(CHECK, subject, "the address is not one of this machine")
        }
        Tried::Cannot(_, why) => Finding::error(CHECK, subject, format!("cannot be listened on: {why}"))
            .expected("a port that this user may listen on")
            .remedy(format!("give {key} a port from 1024 on, or allow this one to the user of the service")),
    }
}

/// Whether metrics of Baton are shown there.
async fn answers(address: SocketAddr, patience: Duration) -> bool {
    let Ok(client) = Client::new(&format!("http://{address}")) else { return false };
    let answer = timeout(patience, client.get("/metrics")).await;
    answer.is_ok_and(|answer| answer.is_ok_and(|(_, body)| body.windows(6).any(|word| word == b"baton_")))
}

/// Name and id of the process that listens on a port of this machine, as far as this user may know.
fn owner(port: u16) -> Option<String> {
    let sockets: BTreeSet<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .into_iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .flat_map(|table| table.lines().filter_map(|line| listening(line, port)).collect::<Vec<_>>())
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let holds = |pid: &String| {
        let open = fs::read_dir(format!("/proc/{pid}/fd")).ok().into_iter().flatten().flatten();
        open.filter_map(|file| fs::read_link(file.path()).ok())
            .any(|target| sockets.contains(&*target.to_string_lossy()))
    };
    let pid = processes
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
        .find(holds)?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(format!("{} (process {pid})", name.trim()))
}

/// The inode of a listening socket, of a line of /proc/net/tcp.
fn listening(line: &str, port: u16) -> Option<String> {
    let mut words = line.split_whitespace().skip(1);
    let (_, local) = words.next()?.rsplit_once(':')?;
    let state = words.nth(1)?;
    let inode = words.nth(5)?;
    (state == "0A" && u16::from_str_radix(local, 16) == Ok(port)).then(|| inode.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::Severity;

    #[test]
    fn a_line_of_the_table_is_read() {
        let line = "   1: 0100007F:1E14 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 ff 100";
        assert_eq!(listening(line, 0x1e14), Some("4711".into()));
        assert_eq!(listening(line, 80), None);
        assert_eq!(listening(&line.replace(" 0A ", " 01 "), 0x1e14), None);
    }

    #[test]
    fn who_holds_a_port_is_told() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let by = owner(listener.local_addr().unwrap().port()).unwrap();
        assert!(by.contains(&format!("process {}", std::process::id())), "{by}");
    }

    #[test]
    fn only_a_stranger_is_an_error() {
        let address = "127.0.0.1:7700".parse().unwrap();
        let held = |by: &str, baton| Tried::Held { by: Some(by.into()), baton };
        for (tried, severity) in [
            (Tried::Free, Severity::Ok),
            (held("baton (process 3)", true), Severity::Ok),
            (held("nginx (process 4)", false), Severity::Error),
            (Tried::Cannot(io::ErrorKind::AddrNotAvailable, String::new()), Severity::NotChecked),
            (Tried::Cannot(io::ErrorKind::PermissionDenied, String::new()), Severity::Error),
        ] {
            assert_eq!(judge("r.toml", "listen", address, &tried).severity, severity, "{tried:?}");
        }
    }
}
