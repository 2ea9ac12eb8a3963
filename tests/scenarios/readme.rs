//! Every command in README, tried against a running cluster (tests/readme.py).

use crate::harness::{Cluster, alone, baton, root};
use std::process::Command;

#[test]
fn readme_commands() {
    let _alone = alone();
    let cluster = Cluster::up(&["--threads", "1"]);
    let python = root().join("target/tools/venv/bin/python");
    assert!(python.exists(), "{} is missing: run `make test`, or `bash tests/install`", python.display());
    let tried = Command::new(python)
        .arg(root().join("tests/readme.py"))
        .arg(baton())
        .arg(&cluster.url)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&tried.stdout);
    assert!(tried.status.success(), "{said}{}", String::from_utf8_lossy(&tried.stderr));
    assert!(said.contains("commands of README were tried"), "{said}");
}
