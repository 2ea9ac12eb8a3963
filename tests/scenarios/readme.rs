//! Every command in README, tried against a running cluster (tests/readme.py).

use crate::harness::{Cluster, alone, baton, python};

#[test]
fn readme_commands() {
    let _alone = alone();
    let cluster = Cluster::up(&["--threads", "1"]);
    let said = python("readme.py", &[baton().to_str().unwrap(), &cluster.url]);
    assert!(said.contains("commands of README were tried"), "{said}");
}
