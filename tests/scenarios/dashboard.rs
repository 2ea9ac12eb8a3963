//! The dashboard as a person meets it, in Chromium, over a cluster of processes (tests/dashboard.py); and that it can be turned off.

use crate::harness::{Cluster, alone, block_on, python, root};
use std::fs;
use tempfile::TempDir;

#[test]
fn dashboard_in_a_browser() {
    let _alone = alone();
    let dir = TempDir::new().unwrap();
    let token = dir.path().join("token");
    fs::write(&token, "0123456789-0123456789").unwrap();
    let (token, set) = (token.to_str().unwrap(), format!("admin_token_file={}", token.display()));
    let pairs = ["--prefill", "2", "--decode", "2", "--threads", "1"];
    let cluster = Cluster::up(&[&pairs[..], &["--worker-set", &set, "--gateway-set", &set]].concat());
    let (up, decode) = (cluster.pid().to_string(), cluster.worker("decode").pid.to_string());
    let pictures = root().join("target/dashboard");
    let said = python("dashboard.py", &[&cluster.url, &up, &decode, token, pictures.to_str().unwrap()]);
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
