//! The dashboard as a person meets it, in Chromium, over a cluster of processes (tests/dashboard.py); and that it can be turned off.

use crate::harness::{Cluster, alone, block_on, root};
use std::process::Command;

#[test]
fn dashboard_in_a_browser() {
    let _alone = alone();
    let cluster = Cluster::up(&["--prefill", "2", "--decode", "2", "--threads", "1"]);
    let python = root().join("target/tools/venv/bin/python");
    assert!(python.exists(), "{} is missing: run `make test`, or `bash tests/install`", python.display());
    let asked = Command::new(python)
        .arg(root().join("tests/dashboard.py"))
        .args([&cluster.url, &cluster.pid().to_string(), &cluster.worker("decode").pid.to_string()])
        .arg(root().join("target/dashboard"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&asked.stdout);
    assert!(asked.status.success(), "{said}{}", String::from_utf8_lossy(&asked.stderr));
    assert!(said.contains("the dashboard is sound"), "{said}");
}

#[test]
fn dashboard_off() {
    let _alone = alone();
    let cluster = Cluster::up(&["--gateway-set", "dashboard=false"]);
    block_on(async {
        for path in ["/dashboard", "/dashboard/main.js", "/"] {
            let (status, _) = cluster.http.get(path).await.unwrap();
            assert_eq!(status.as_u16(), 404, "{path}");
        }
        let (status, _) = cluster.http.get("/status/history").await.unwrap();
        assert!(status.is_success(), "what it reads is there for others");
    });
}
