//! Memory that a process here may have: of the machine, or of the control group (v2) that it is in, or of one around that,
//! whichever has least.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// In bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Memory {
    pub all: u64,
    pub available: u64,
    /// The file of the limit, if it is not the machine's own.
    pub limit: Option<PathBuf>,
}

/// `None`: the machine does not tell.
pub fn gather() -> Option<Memory> {
    let machine = machine(&fs::read_to_string("/proc/meminfo").ok()?)?;
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    Some(within(machine, Path::new("/sys/fs/cgroup"), &groups))
}

/// Of the text of /proc/meminfo.
fn machine(text: &str) -> Option<Memory> {
    let kib = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    Some(Memory { all: kib("MemTotal:")? << 10, available: kib("MemAvailable:")? << 10, limit: None })
}

/// `groups`: the text of /proc/self/cgroup. A container that sees its own group as the root has its limit there.
fn within(machine: Memory, root: &Path, groups: &str) -> Memory {
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let around = root.join(own);
    let limits = around.ancestors().take_while(|path| path.starts_with(root)).filter_map(group);
    limits.fold(machine, |least, group| Memory {
        limit: if group.all < least.all { group.limit } else { least.limit },
        all: group.all.min(least.all),
        available: group.available.min(least.available),
    })
}

/// A group's own limit; `None` if it has none. What it has read of files makes room when room is needed.
fn group(path: &Path) -> Option<Memory> {
    let limit = path.join("memory.max");
    let number = |file: &Path| fs::read_to_string(file).ok()?.trim().parse::<u64>().ok();
    let all = number(&limit)?;
    let used = number(&path.join("memory.current")).unwrap_or(0);
    let stat = fs::read_to_string(path.join("memory.stat")).unwrap_or_default();
    let cached = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.parse::<u64>().ok());
    let available = all.saturating_sub(used.saturating_sub(cached.unwrap_or(0)));
    Some(Memory { all, available, limit: Some(limit) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(dir).unwrap();
        files.iter().for_each(|(name, text)| fs::write(dir.join(name), text).unwrap());
    }

    #[test]
    fn the_least_of_machine_and_groups_holds() {
        let root = tempfile::TempDir::new().unwrap();
        let (root, pod) = (root.path(), root.path().join("pod"));
        let machine = machine("MemTotal: 64 kB\nMemFree: 1 kB\nMemAvailable: 32 kB\n").unwrap();
        let seen = |groups| within(machine.clone(), root, groups);
        assert_eq!(seen("0::/pod/container\n"), machine, "no group has a limit");
        write(&pod.join("container"), &[("memory.max", "max\n")]);
        let used = ("memory.current", "30000\n");
        write(&pod, &[("memory.max", "40000\n"), used, ("memory.stat", "anon 5\ninactive_file 20000\n")]);
        let limit = Some(pod.join("memory.max"));
        assert_eq!(seen("0::/pod/container\n"), Memory { all: 40_000, available: 30_000, limit });
        assert_eq!(seen("1:name=systemd:/\n"), machine, "it is in no such group");
        write(root, &[("memory.max", "10000\n")]);
        let own = seen("0::/\n");
        assert_eq!((own.all, own.available, own.limit), (10_000, 10_000, Some(root.join("memory.max"))));
        write(root, &[("memory.max", "9000000\n")]);
        assert_eq!(seen("0::/\n"), machine, "more than the machine has is no limit");
    }
}
