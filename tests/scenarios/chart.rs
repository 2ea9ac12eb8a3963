//! The configuration files that the Helm chart writes, as its golden files have them (tests/chart.py holds those), read by the services'
//! own code; and the values' schema, which offers every key that a service knows and no other. Knows no Helm.

use crate::harness::root;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::{collections::BTreeSet, fs, path::Path};

/// Keys that the chart sets itself, from values of its own.
const GATEWAY_OWN: &[&str] =
    &["listen", "admin", "admin_token_file", "routers", "tls", "model_dir", "keys.file", "timeouts.drain_ms"];
const ROUTER_OWN: &[&str] = &["listen", "admin", "etcd", "etcd_tls", "tls", "prefix", "lease_ms", "drain_ms"];
const WORKER_OWN: &[&str] = &[
    "role",
    "backend",
    "model",
    "served_model_name",
    "listen",
    "admin",
    "advertise",
    "advertise_admin",
    "admin_token_file",
    "tls",
    "membership",
    "drain_ms",
    // Not for those who run it.
    "debug",
];

#[test]
fn chart_configuration_is_what_the_services_take() {
    let mut seen = BTreeSet::new();
    for golden in goldens() {
        let text = fs::read_to_string(&golden).unwrap();
        for (name, toml) in configurations(&text) {
            let outcome = match name {
                "gateway.toml" => parse::<gateway::Config>(&toml).and_then(|config| config.check()),
                "router.toml" => parse::<router::Config>(&toml).and_then(|config| config.check()),
                "worker.toml" => {
                    parse(&toml).and_then(|config| advertised(config, &text).check().map_err(text_of))
                }
                other => Err(format!("no service reads {other}")),
            };
            assert_eq!(outcome, Ok(()), "{}: {name}:\n{toml}", golden.display());
            seen.insert(name.to_owned());
        }
    }
    assert_eq!(seen.len(), 3, "{seen:?}");
}

#[test]
fn chart_values_arrive() {
    let text = fs::read_to_string(root().join("tests/chart/golden/every-key.yaml")).unwrap();
    let of = |name: &str| configurations(&text).into_iter().find(|(found, _)| *found == name).unwrap().1;
    let gateway: gateway::Config = parse(&of("gateway.toml")).unwrap();
    assert_eq!((gateway.limits.body_bytes, gateway.timeouts.drain_ms), (1 << 20, 120_000));
    assert_eq!(gateway.listen.to_string(), "[::]:8000");
    assert_eq!((gateway.traces.endpoint.as_str(), gateway.traces.sample), ("http://otel:4317", 0.5));
    assert_eq!(gateway.keys.file.as_deref(), Some(Path::new("/etc/baton-keys/all.toml")));
    assert_eq!(gateway.admin_token_file.as_deref(), Some(Path::new("/etc/baton-admin/admin-token")));
    let tls = gateway.tls.clone().unwrap();
    assert_eq!(
        (tls.server_name.as_str(), tls.key.as_path()),
        ("services.example", Path::new("/etc/baton-tls/key.pem"))
    );
    let router: router::Config = parse(&of("router.toml")).unwrap();
    assert_eq!((router.members.connections, router.lease_ms, router.etcd.len()), (1, 2_000, 0));
    let worker: worker::Config = parse(&of("worker.toml")).unwrap();
    assert_eq!(worker.served_model_name.as_deref(), Some(r#"quo"ted \ näme"#));
    assert_eq!((worker.traces.endpoint.as_str(), worker.traces.sample), ("http://collector:4317", 0.25));
    assert_eq!((worker.max_reserved_share, worker.gpu_memory_utilization), (1.0, 0.5));
    assert!(worker.membership.registry.unwrap().starts_with("https://everything-router-0"));
    assert_eq!(worker.admin_token_file.as_deref(), Some(Path::new("/etc/baton-admin/admin-token")));
    assert!(
        gateway.routers[0].starts_with("https://") && gateway.tls == router.tls && router.tls == worker.tls
    );
}

#[test]
fn chart_values_offer_every_key() {
    let schema = fs::read_to_string(root().join("helm/values.schema.json")).unwrap();
    let schema: Value = serde_json::from_str(&schema).unwrap();
    offers::<gateway::Config>(&schema, "gatewayConfig", GATEWAY_OWN);
    offers::<router::Config>(&schema, "routerConfig", ROUTER_OWN);
    offers::<worker::Config>(&schema, "workerConfig", WORKER_OWN);
}

fn offers<T: DeserializeOwned>(schema: &Value, definition: &str, own: &[&str]) {
    let properties = schema["definitions"][definition]["properties"].as_object().unwrap();
    let mut offered: BTreeSet<String> = own.iter().map(|key| key.to_string()).collect();
    let mut known = keys::<T>("");
    for (key, property) in properties {
        match property["properties"].as_object() {
            Some(inner) => {
                offered.extend(inner.keys().map(|inner| format!("{key}.{inner}")));
                assert!(known.remove(key), "{definition} offers {key}, which the service does not know");
                known.extend(keys::<T>(key).into_iter().map(|inner| format!("{key}.{inner}")));
            }
            None => drop(offered.insert(key.clone())),
        }
    }
    assert_eq!(
        offered, known,
        "left: what helm/values.schema.json offers as {definition}, and what the chart sets itself"
    );
}

/// Keys of a table of a service's configuration, which it lists when it meets one that it does not know.
fn keys<T: DeserializeOwned>(table: &str) -> BTreeSet<String> {
    let heading = if table.is_empty() { String::new() } else { format!("[{table}]\n") };
    let error = parse::<T>(&format!("{heading}absent = 0\n")).err().expect("unknown keys are errors");
    let (_, listed) = error.split_once("expected").unwrap_or_else(|| panic!("no keys in: {error}"));
    listed.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn parse<T: DeserializeOwned>(toml: &str) -> Result<T, String> {
    toml::from_str(toml).map_err(text_of)
}

fn text_of(error: impl ToString) -> String {
    error.to_string()
}

/// As the pod's arguments say, with an address in the place of the pod's own.
fn advertised(mut config: worker::Config, golden: &str) -> worker::Config {
    let given = |key: &str| {
        let found = golden.lines().find_map(|line| line.trim().strip_prefix(&format!("- --set={key}=")));
        found.map(|url| url.replace("$(POD_IP)", if url.contains('[') { "fd00::1" } else { "10.0.0.1" }))
    };
    (config.advertise, config.advertise_admin) = (given("advertise"), given("advertise_admin"));
    config
}

fn goldens() -> Vec<std::path::PathBuf> {
    let folder = root().join("tests/chart/golden");
    let files = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    files
        .filter(|path: &std::path::PathBuf| path.extension() == Some(Path::new("yaml").as_os_str()))
        .collect()
}

/// Name and text of every TOML file in a ConfigMap: a block of lines, indented by four.
fn configurations(golden: &str) -> Vec<(&str, String)> {
    let mut found = Vec::new();
    let mut lines = golden.lines().peekable();
    while let Some(line) = lines.next() {
        let Some(name) = line.strip_prefix("  ").and_then(|line| line.strip_suffix(": |")) else { continue };
        let mut text = String::new();
        while let Some(line) = lines.next_if(|line| line.starts_with("    ")) {
            text += &line[4..];
            text.push('\n');
        }
        if name.ends_with(".toml") {
            found.push((name, text));
        }
    }
    found
}
