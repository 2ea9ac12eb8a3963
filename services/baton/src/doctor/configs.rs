//! Configuration files: read with the services' own types, checked by the services themselves, and held against each other.

use super::finding::Finding;
use crate::{demo, settings};
use serde::de::{DeserializeOwned, Deserializer, Visitor};
use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
};

const CHECK: &str = "config";
const SERVICES: [&str; 3] = ["gateway", "router", "worker"];

/// A file that could be read.
pub struct Read {
    pub path: PathBuf,
    pub service: Service,
}

// A handful of these exist at a time.
#[allow(clippy::large_enum_variant)]
pub enum Service {
    Gateway(gateway::Config),
    Router(router::Config),
    Worker(worker::Config),
}

/// `spec`: FILE, or SERVICE=FILE if the keys do not tell whose it is.
pub fn read(spec: &str) -> Result<Read, Finding> {
    let (named, path) = match spec.split_once('=') {
        Some((service, path)) if SERVICES.contains(&service) => (Some(service), path),
        _ => (None, spec),
    };
    let path = PathBuf::from(path);
    let service = match named {
        Some(service) => service,
        None => guess(&path).map_err(|why| unreadable(&path, why))?,
    };
    let service = load(service, &path).map_err(|error| {
        let remedy = format!("correct the file; this is what `baton {service}` would say at its start");
        unreadable(&path, format!("{error:#}")).remedy(remedy)
    })?;
    Ok(Read { path, service })
}

fn unreadable(path: &Path, why: String) -> Finding {
    let why = why.replace(&format!("{}: ", path.display()), "");
    Finding::error(CHECK, path.display().to_string(), why.split_whitespace().collect::<Vec<_>>().join(" "))
        .expected("a TOML file with keys that the service knows")
        .remedy("correct the file, or name its service: --config worker=FILE")
}

fn load(service: &str, path: &Path) -> anyhow::Result<Service> {
    Ok(match service {
        "gateway" => {
            let mut config: gateway::Config = settings::load(Some(path), &[])?;
            demo_if_empty(&mut config.model_dir)?;
            Service::Gateway(config)
        }
        "router" => Service::Router(settings::load(Some(path), &[])?),
        _ => {
            let mut config: worker::Config = settings::load(Some(path), &[])?;
            demo_if_empty(&mut config.model)?;
            Service::Worker(config)
        }
    })
}

/// As the services do when they start.
fn demo_if_empty(directory: &mut PathBuf) -> anyhow::Result<()> {
    if directory.as_os_str().is_empty() {
        *directory = demo::directory()?;
    }
    Ok(())
}

/// The service that knows most of the file's keys; among equals, the one that the file's name names.
fn guess(path: &Path) -> Result<&'static str, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("cannot be read: {error}"))?;
    let table: toml::Table = text.parse().map_err(|error| format!("is not TOML: {error}"))?;
    let known = |fields: &[&str]| table.keys().filter(|key| fields.contains(&key.as_str())).count();
    let scores = [
        known(fields::<gateway::Config>()),
        known(fields::<router::Config>()),
        known(fields::<worker::Config>()),
    ];
    let best = scores.into_iter().max().unwrap_or(0);
    let mut likely = SERVICES.into_iter().zip(scores).filter(|(_, score)| *score == best).map(|(s, _)| s);
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let likely: Vec<&str> = likely.by_ref().collect();
    let named = |service: &&&str| {
        name.contains(**service)
            || **service == "worker" && (name.contains("prefill") || name.contains("decode"))
    };
    match (likely.as_slice(), likely.iter().find(named)) {
        ([only], _) | (_, Some(only)) => Ok(only),
        _ => Err("its keys do not tell whose configuration it is".to_owned()),
    }
}

/// Names of the keys of a configuration, as its type declares them.
fn fields<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut fields: &'static [&'static str] = &[];
    let _ = T::deserialize(Fields(&mut fields));
    fields
}

/// Notes which fields are asked for, and deserialises nothing.
struct Fields<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for Fields<'_> {
    type Error = serde::de::value::Error;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
        Err(serde::de::Error::custom("only fields are wanted"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        *self.0 = fields;
        self.deserialize_any(visitor)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

/// What each file says, by the service's own check, and what they say together.
pub fn judge(files: &[Read]) -> Vec<Finding> {
    let alone = files.iter().map(|file| match file.service.check() {
        Ok(()) => {
            Finding::ok(CHECK, file.subject(), format!("a {}'s, read and checked", file.service.name()))
        }
        Err((check, why)) => Finding::error(check, file.subject(), why)
            .expected(format!("what `baton {}` accepts", file.service.name()))
            .remedy(remedy(check)),
    });
    alone.chain(contradictions(files)).collect()
}

fn remedy(check: &str) -> &'static str {
    match check {
        "rdma" => {
            "set handoff.transport = \"grpc\", or use a binary built with --features rdma and install NIXL"
        }
        _ => "correct the value that is named",
    }
}

fn contradictions(files: &[Read]) -> Vec<Finding> {
    let mut findings = double_ports(files);
    let workers: Vec<(&Read, &worker::Config)> = files.iter().filter_map(Read::worker).collect();
    type Text = fn(&worker::Config) -> String;
    let texts: [(&str, Text); 4] = [
        ("block_tokens", |config| config.block_tokens.to_string()),
        ("handoff.transport", |config| config.handoff.transport.name().to_owned()),
        ("backend", |config| config.backend.clone()),
        ("served_model_name", served),
    ];
    if let [(first, settings), others @ ..] = workers.as_slice() {
        for (file, other) in others {
            for (key, value) in texts.iter().filter(|(_, value)| value(settings) != value(other)) {
                let remedy = format!("give all workers of a cluster the same {key}");
                let found =
                    format!("{key} is {}, but {} in {}", value(other), value(settings), first.subject());
                let found = Finding::error(CHECK, file.subject(), found);
                findings.push(found.expected("workers that can be paired").remedy(remedy));
            }
        }
    }
    for router in files {
        if let Service::Router(config) = &router.service {
            findings.extend(workers.iter().filter_map(|(file, worker)| meets(router, config, file, worker)));
        }
    }
    findings
}

/// The name by which a worker's model goes: directories may differ from machine to machine.
fn served(config: &worker::Config) -> String {
    let directory = || config.model.file_name().map(|name| name.to_string_lossy().into_owned());
    config.served_model_name.clone().or_else(directory).unwrap_or_default()
}

/// A worker that registers where this router does not look.
fn meets(router: &Read, config: &router::Config, file: &Read, worker: &worker::Config) -> Option<Finding> {
    let (of_router, of_worker) = (&config.etcd, &worker.membership.etcd);
    let found = match (of_router.is_empty(), of_worker.is_empty()) {
        (false, false) if config.prefix != worker.membership.prefix => {
            format!("membership.prefix is {}, but prefix is {}", worker.membership.prefix, config.prefix)
        }
        (false, false) if !of_router.iter().any(|url| of_worker.contains(url)) => {
            format!("membership.etcd is {of_worker:?}, but etcd is {of_router:?}")
        }
        (true, false) => "membership.etcd is set, but the router serves its own registry".to_owned(),
        (false, true) => "membership.registry is set, but the router uses etcd".to_owned(),
        _ => return None,
    };
    let found = format!("{found} in {}", router.subject());
    let found = Finding::error(CHECK, file.subject(), found).expected("a worker that its router can see");
    Some(found.remedy("give both the same etcd endpoints and prefix, or let both use the router's registry"))
}

fn double_ports(files: &[Read]) -> Vec<Finding> {
    let mut taken: Vec<(SocketAddr, String)> = Vec::new();
    let mut findings = Vec::new();
    for file in files {
        for (key, address) in file.service.ports() {
            let owner = format!("{key} of {}", file.subject());
            let same = |(other, _): &&(SocketAddr, String)| address.port() != 0 && overlap(*other, address);
            if let Some((_, first)) = taken.iter().find(same) {
                let found = format!("{key} = {address} is also {first}");
                let found = Finding::error("ports", file.subject(), found).expected("an address used once");
                findings.push(found.remedy(format!("give {key} another port")));
            }
            taken.push((address, owner));
        }
    }
    findings
}

fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    a.port() == b.port() && (a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified())
}

impl Read {
    pub fn subject(&self) -> String {
        self.path.display().to_string()
    }

    pub fn worker(&self) -> Option<(&Read, &worker::Config)> {
        match &self.service {
            Service::Worker(config) => Some((self, config)),
            _ => None,
        }
    }
}

impl Service {
    pub fn name(&self) -> &'static str {
        match self {
            Service::Gateway(_) => "gateway",
            Service::Router(_) => "router",
            Service::Worker(_) => "worker",
        }
    }

    pub fn ports(&self) -> [(&'static str, SocketAddr); 2] {
        let (listen, admin) = match self {
            Service::Gateway(config) => (config.listen, config.admin),
            Service::Router(config) => (config.listen, config.admin),
            Service::Worker(config) => (config.listen, config.admin),
        };
        [("listen", listen), ("admin", admin)]
    }

    /// The first thing that the service itself would refuse, and the check that it belongs to.
    fn check(&self) -> Result<(), (&'static str, String)> {
        match self {
            Service::Gateway(config) => config.check().map_err(|why| (CHECK, why)),
            Service::Router(config) => config.check().map_err(|why| (CHECK, why)),
            Service::Worker(config) => config.check().map_err(|error| {
                let check = if matches!(error, worker::Error::Transport(_)) { "rdma" } else { CHECK };
                (check, error.to_string())
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::Severity;

    fn file(name: &str, service: &str, text: &str) -> Read {
        let service = match service {
            "gateway" => Service::Gateway(toml::from_str(text).unwrap()),
            "router" => Service::Router(toml::from_str(text).unwrap()),
            _ => Service::Worker(toml::from_str(text).unwrap()),
        };
        Read { path: name.into(), service }
    }

    const WORKER: &str = "model = \"m\"\nmembership.registry = \"http://r:7700\"\n";

    #[test]
    fn keys_tell_whose_file_it_is() {
        let directory = tempfile();
        for (name, text, expected) in [
            ("a.toml", "routers = []\nlistn = 3\n", Some("gateway")),
            ("b.toml", "running = 4\nprefix = \"x\"", Some("router")),
            ("c.toml", "role = \"decode\"\n", Some("worker")),
            ("router.toml", "", Some("router")),
            ("decode.toml", "listen = \"127.0.0.1:1\"", Some("worker")),
            ("x.toml", "listen = \"127.0.0.1:1\"", None),
        ] {
            let path = directory.join(name);
            fs::write(&path, text).unwrap();
            assert_eq!(guess(&path).ok(), expected, "{name}");
        }
        fs::remove_dir_all(&directory).unwrap();
    }

    fn tempfile() -> PathBuf {
        let directory = std::env::temp_dir().join(format!("baton-doctor-configs-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        directory
    }

    fn problems(files: &[Read]) -> Vec<(&'static str, String)> {
        let bad = judge(files).into_iter().filter(|finding| finding.severity > Severity::NotChecked);
        bad.map(|finding| (finding.check, finding.found)).collect()
    }

    #[test]
    fn a_consistent_set_is_fine() {
        let gateway = file("g", "gateway", "model_dir = \"m\"\n");
        let (one, two) = (file("p", "worker", WORKER), file("d", "worker", WORKER));
        assert_eq!(problems(&[gateway, file("r", "router", ""), one, two]), []);
    }

    #[test]
    fn contradictions_are_named() {
        let other = |text: &str| file("d", "worker", &format!("{text}\n{WORKER}"));
        for (files, check, part) in [
            (vec![file("p", "worker", WORKER), other("block_tokens = 16")], "config", "block_tokens is 16"),
            (vec![file("r", "router", "listen = \"0.0.0.0:7701\"")], "ports", "is also listen of r"),
            (
                vec![file("r", "router", "etcd = [\"http://e:1\"]"), file("p", "worker", WORKER)],
                "config",
                "uses etcd",
            ),
            (vec![file("g", "gateway", "")], "config", "model_dir"),
            (vec![other("backend = \"tpu\"")], "config", "tpu"),
        ] {
            let found = problems(&files);
            assert!(
                found.len() == 1 && found[0].0 == check && found[0].1.contains(part),
                "{part}: {found:?}"
            );
        }
    }
}
