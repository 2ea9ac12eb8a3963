//! Who may know whom: the table of ARCHITECTURE.md, and the limits of style that a machine can hold.

use crate::harness::root;
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};

/// Package, and the packages of this workspace that it may use.
const MAY_USE: &[(&str, &[&str])] = &[
    ("proto", &[]),
    ("kv", &[]),
    ("openai", &[]),
    ("telemetry", &[]),
    ("kernels", &["kv"]),
    ("membership", &["proto"]),
    ("credentials", &["proto", "telemetry"]),
    ("handoff", &["kv", "proto"]),
    ("model", &["kernels", "kv"]),
    ("engine", &["model", "kernels", "kv"]),
    ("gateway", &["credentials", "openai", "proto", "telemetry"]),
    ("router", &["credentials", "proto", "kv", "handoff", "membership", "telemetry"]),
    (
        "worker",
        &["credentials", "engine", "handoff", "kernels", "kv", "membership", "model", "proto", "telemetry"],
    ),
    ("baton", &["credentials", "gateway", "router", "worker", "membership", "model", "proto", "telemetry"]),
];

#[test]
fn nobody_knows_more_than_the_table_allows() {
    let metadata = cargo_metadata();
    let packages = metadata["packages"].as_array().unwrap();
    let ours: BTreeMap<&str, &Value> =
        packages.iter().map(|package| (package["name"].as_str().unwrap(), package)).collect();
    let table: BTreeMap<&str, BTreeSet<&str>> =
        MAY_USE.iter().map(|(name, may)| (*name, may.iter().copied().collect())).collect();
    for (name, package) in &ours {
        let Some(may) = table.get(name) else {
            assert_eq!(*name, "tests", "{name} is missing from the table");
            continue;
        };
        for dependency in package["dependencies"].as_array().unwrap() {
            let used = dependency["name"].as_str().unwrap();
            let for_tests = dependency["kind"] == "dev";
            if ours.contains_key(used) && !for_tests {
                assert!(may.contains(used), "{name} must not know {used}; see ARCHITECTURE.md");
            }
        }
    }
    assert_eq!(ours.len(), table.len() + 1);
}

#[test]
fn the_architecture_page_shows_the_same_table() {
    let page = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    for (name, may) in MAY_USE.iter().filter(|(_, may)| !may.is_empty()) {
        let line = page
            .split(['\n', '·'])
            .map(str::trim)
            .flat_map(|part| part.split("   "))
            .map(|part| part.trim().trim_start_matches(|c: char| c.is_ascii_digit() || c == ' '));
        let found = line.filter_map(|part| part.split_once('→')).find(|(left, _)| left.trim() == *name);
        let (_, right) = found.unwrap_or_else(|| panic!("ARCHITECTURE.md has no row for {name}"));
        let listed: BTreeSet<&str> =
            right.split(',').map(|word| word.trim().split([' ', '(']).next().unwrap()).collect();
        assert_eq!(listed, may.iter().copied().collect(), "row of {name}");
    }
}

#[test]
fn every_file_has_a_header_and_one_subject() {
    let mut long = Vec::new();
    for path in sources(root()) {
        let text = std::fs::read_to_string(&path).unwrap();
        let lines = text.lines().count();
        assert!(
            text.starts_with("//!") || text.starts_with("mod ") || lines < 12,
            "{}: no //! header",
            path.display()
        );
        if lines > 600 {
            long.push(format!("{} ({lines} lines)", path.display()));
        }
    }
    assert!(long.is_empty(), "longer than one subject needs: {long:#?}");
}

fn cargo_metadata() -> Value {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["metadata", "--no-deps", "--format-version", "1", "--locked"]).current_dir(root());
    let output = cargo.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn sources(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap().map(Result::unwrap) {
        let (path, name) = (entry.path(), entry.file_name());
        if path.is_dir() && name != "target" && !name.to_string_lossy().starts_with('.') {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}
