//! Tenants with keys, in front of a real cluster and through the official client; and what operators need keys and tokens for.

use crate::harness::{Cluster, alone, baton, block_on, http::Client, python};
use serde_json::Value;
use std::{fs, path::Path, process::Command};
use tempfile::TempDir;

/// `baton key new`: the key, and the entry.
fn new_key(arguments: &[&str]) -> (String, String) {
    let output = Command::new(baton()).args(["key", "new", "--json"]).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |name: &str| said[name].as_str().unwrap().to_owned();
    (text("key"), text("entry"))
}

fn command(cluster: &Cluster, arguments: &[&str], key: Option<&str>) -> (bool, String) {
    let mut command = Command::new(baton());
    command.args(arguments).args(["--url", &cluster.url]).env_remove("BATON_API_KEY");
    if let Some(key) = key {
        command.env("BATON_API_KEY", key);
    }
    let output = command.output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(said).unwrap())
}

#[test]
fn keys_and_limits_through_the_openai_client() {
    let _alone = alone();
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("keys.toml");
    let (counted, first) = new_key(&["counted", "--requests-per-minute", "3"]);
    let (metered, second) = new_key(&["metered", "--tokens-per-minute", "1000", "--priority-min", "0"]);
    let (operators, third) = new_key(&["operators", "--admin"]);
    fs::write(&file, first + &second + &third).unwrap();
    let cluster = Cluster::up(&["--threads", "1", "--gateway-set", &format!("keys.file={}", file.display())]);
    python("keys.py", &[&format!("{}/v1", cluster.url), &cluster.model, &counted, &metered]);
    let limited = |limit: &str| {
        let labels = format!("limit=\"{limit}\"");
        block_on(cluster.metric(&cluster.gateway, "baton_gateway_limited_total", &labels))
    };
    assert_eq!(limited("requests"), 2.0);
    assert!(limited("tokens") >= 1.0);
    let log = cluster.log(&cluster.gateway);
    for key in [&counted, &metered] {
        assert!(!log.contains(key.rsplit('-').next().unwrap()), "a secret stands in the log");
    }
    for (key, good) in [(None, false), (Some("sk-baton-a-b"), false), (Some(metered.as_str()), true)] {
        let (went, said) = command(&cluster, &["status"], key);
        assert_eq!((went, said.contains("decode-")), (good, good), "{key:?}: {said}");
    }
    let question = ["ask", "What does `Vec::push` do?"];
    let answer = "Appends an element to the back of a collection.\n";
    assert_eq!(command(&cluster, &question, Some(&operators)), (true, answer.to_owned()));
    let (went, said) = command(&cluster, &question, None);
    assert!(!went && said.contains("401"), "{said}");
    block_on(async {
        for (key, status) in [(&counted, 403), (&operators, 200)] {
            let client = Client::new(&cluster.url).unwrap().with_bearer(Some(key.clone()));
            assert_eq!(client.get("/metrics").await.unwrap().0, status, "only operators see the process");
        }
        cluster.assert_idle().await;
    });
}

#[test]
fn only_who_has_the_admin_token_may_have_a_worker_leave() {
    let _alone = alone();
    let dir = TempDir::new().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let (token, wrong) =
        (file("token", "a token of some length"), file("wrong", "a-token-of-the-same-length"));
    let good = file("good", "0123456789-0123456789");
    fs::copy(Path::new(&good), Path::new(&token)).unwrap();
    let cluster = Cluster::up(&["--threads", "1", "--worker-set", &format!("admin_token_file={token}")]);
    for (arguments, went, part) in [
        (vec!["drain", "decode"], false, "--token-file"),
        (vec!["drain", "decode", "--token-file", &wrong], false, "--token-file"),
        (vec!["drain", "decode", "--no-wait", "--token-file", &good], true, "takes nothing new"),
    ] {
        let (success, said) = command(&cluster, &arguments, None);
        assert!(success == went && said.contains(part), "{arguments:?}: {said}");
    }
}
