//! `baton doctor`: looks at a deployment from where it is run, and names the fix for each thing that is wrong. Each check
//! gathers what it can within a bounded time and judges that apart, so that one that fails keeps no other from being made.
//! Changes nothing; what it sends is bounded (`--probe-mib`).

mod clock;
mod configs;
mod etcd;
mod finding;
mod gpu;
mod limits;
mod members;
mod memory;
mod model;
mod ports;
mod rdma;
mod reach;
mod report;

use crate::{
    status,
    target::{AdminToken, Target},
};
use clap::Parser;
use configs::{Read, Service};
use finding::Finding;
use futures::future::join_all;
use members::Member;
use membership::{EtcdTls, MembershipConfig};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::IsTerminal,
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};
use tokio::{task::spawn_blocking, time::timeout};

const CLUSTER: &str = "http://127.0.0.1:8000";

const HELP: &str = "\
Without arguments: the cluster that `baton up` runs on this machine. Arguments add to each other.
Run it where the services run: what cannot be seen from there is told as not checked.

Exit code: 0 if nothing is wrong, or there are only warnings and no --strict; 1 if there are warnings and --strict;
2 if there are errors. What could not be checked counts as neither.";

#[derive(Parser)]
#[command(after_help = HELP)]
pub struct Args {
    /// Configuration file of a gateway, router or worker; SERVICE=FILE if its keys do not tell whose it is; repeatable
    #[arg(long, value_name = "FILE")]
    config: Vec<String>,
    /// Address of a gateway: its members, their ports, clocks and connections are checked [default, if nothing else is given: http://127.0.0.1:8000]
    #[arg(long, value_name = "URL")]
    cluster: Option<String>,
    /// File with the API key, if that gateway asks for one [default: the variable BATON_API_KEY]
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    #[command(flatten)]
    token: AdminToken,
    /// Endpoints of etcd, all of them; those that configuration files name are checked too
    #[arg(long, value_name = "URL,URL", value_delimiter = ',')]
    etcd: Vec<String>,
    /// Name of the cluster among others in the same etcd
    #[arg(long, value_name = "NAME", default_value = "baton")]
    prefix: String,
    /// Directory of a model; those that configuration files name are checked too
    #[arg(long, value_name = "DIR")]
    model: Vec<PathBuf>,
    /// Longest wait for any one answer
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0, value_parser = seconds)]
    timeout: f32,
    /// MiB that each prefill worker is asked to send to each decode worker; 0: only the round trip
    #[arg(long, value_name = "MIB", default_value_t = 4, value_parser = clap::value_parser!(u32).range(..=32))]
    probe_mib: u32,
    /// Warn of pairs of workers below this rate
    #[arg(long, value_name = "GB/S", default_value_t = 0.1)]
    least_rate: f64,
    /// Warn of pairs of workers above this round trip
    #[arg(long, value_name = "MS", default_value_t = 20.0)]
    most_round_trip: f64,
    /// Count warnings: exit code 1
    #[arg(long)]
    strict: bool,
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
}

fn seconds(text: &str) -> Result<f32, String> {
    let seconds: f32 = text.parse().map_err(|_| "not a number".to_owned())?;
    let sane = (0.1..=60.0).contains(&seconds);
    sane.then_some(seconds).ok_or_else(|| "expected 0.1 to 60 seconds".to_owned())
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let findings = runtime.block_on(examine(&args));
    // What is still looked for has been told as not answered.
    runtime.shutdown_background();
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&report::as_json(&findings, args.strict))?),
        false => print!("{}", report::as_text(&findings, std::io::stdout().is_terminal())),
    }
    Ok(ExitCode::from(report::exit_code(&findings, args.strict)))
}

/// What is looked at.
struct Subjects {
    files: Vec<Read>,
    cluster: Option<Target>,
    /// Etcd clusters, by the way to their members.
    sources: Vec<MembershipConfig>,
    directories: BTreeSet<model::Directory>,
    patience: Duration,
}

async fn examine(args: &Args) -> Vec<Finding> {
    let (subjects, mut findings) = Subjects::read(args);
    findings.extend(configs::judge(&subjects.files));
    let (ports, directories, etcds, (members, known)) =
        tokio::join!(subjects.ports(), subjects.directories(), subjects.etcds(), subjects.members());
    findings.extend([ports, directories, etcds, known].concat());
    if let Some(members) = &members {
        findings.extend(between(members, args, subjects.patience).await);
    }
    findings.extend(subjects.machine(members.as_deref().unwrap_or_default()).await);
    findings
}

/// What members say, from here and of each other.
async fn between(members: &[Member], args: &Args, patience: Duration) -> Vec<Finding> {
    let mut findings = members::judge(members);
    let answers = reach::gather(members, patience).await;
    findings.extend(reach::judge(members, &answers));
    // Whoever does not answer here has been told already.
    let able = members.iter().zip(&answers).filter(|(member, answer)| answer.can_be_probed(member));
    let able: Vec<&Member> = able.map(|(member, _)| member).collect();
    let token = match args.token.read() {
        Ok(token) => token,
        Err(why) => {
            findings
                .push(Finding::error("pairs", "--token-file", why).remedy("name a file that can be read"));
            None
        }
    };
    let probes = reach::probe(&able, args.probe_mib, token.as_deref(), patience, reach::ALL_PROBES).await;
    let least = reach::Least { gigabytes_per_second: args.least_rate, round_trip_ms: args.most_round_trip };
    let least = if args.probe_mib == 0 { reach::Least { gigabytes_per_second: 0.0, ..least } } else { least };
    findings.extend(reach::judge_pairs(&probes, least));
    findings
}

impl Subjects {
    fn read(args: &Args) -> (Subjects, Vec<Finding>) {
        let (mut files, mut findings) = (Vec::new(), Vec::new());
        for spec in &args.config {
            match configs::read(spec) {
                Ok(file) => files.push(file),
                Err(finding) => findings.push(finding),
            }
        }
        let nothing = args.config.is_empty() && args.etcd.is_empty() && args.model.is_empty();
        let default = nothing.then(|| CLUSTER.to_owned());
        let subjects = Subjects {
            sources: sources(args, &files),
            directories: directories(args, &files),
            cluster: args
                .cluster
                .clone()
                .or(default)
                .map(|url| Target { url, key_file: args.key_file.clone() }),
            patience: Duration::from_secs_f32(args.timeout),
            files,
        };
        (subjects, findings)
    }

    async fn ports(&self) -> Vec<Finding> {
        let ports = self.files.iter().flat_map(|file| file.service.ports().map(|port| (file, port)));
        let named = ports.filter(|(_, (_, address))| address.port() != 0);
        join_all(named.map(|(file, (key, address))| async move {
            let tried = ports::gather(address, self.patience).await;
            ports::judge(&file.subject(), key, address, &tried)
        }))
        .await
    }

    /// Directories may lie on a network that does not answer.
    async fn directories(&self) -> Vec<Finding> {
        let looked = self.directories.iter().cloned().map(|directory| async move {
            let subject = directory.path.display().to_string();
            let look = spawn_blocking(move || model::judge(&directory, &model::gather(&directory)));
            match timeout(self.patience * 12, look).await {
                Ok(Ok(findings)) => findings,
                _ => vec![
                    Finding::error("model", subject, "could not be read in time")
                        .remedy("see the file system that it lies on"),
                ],
            }
        });
        join_all(looked).await.concat()
    }

    async fn etcds(&self) -> Vec<Finding> {
        let surveyed = self.sources.iter().map(|source| async move {
            etcd::judge(&etcd::gather(&source.etcd, source.tls.as_ref(), self.patience).await)
        });
        join_all(surveyed).await.concat()
    }

    /// As the router and etcd know them; `None` if neither was asked or answers.
    async fn members(&self) -> (Option<Vec<Member>>, Vec<Finding>) {
        let (router, etcd) = tokio::join!(self.of_router(), self.of_etcd());
        let (router, mut findings) = match router {
            Some(Ok((members, findings))) => (Some(members), findings),
            Some(Err(finding)) => (None, vec![finding]),
            None => (None, Vec::new()),
        };
        if let (Some(router), Some(etcd)) = (&router, &etcd) {
            findings.extend(members::compare(router, etcd));
        }
        (router.or(etcd), findings)
    }

    async fn of_router(&self) -> Option<Result<(Vec<Member>, Vec<Finding>), Finding>> {
        let target = self.cluster.as_ref()?;
        let url = &target.url;
        let (status, date) = tokio::join!(
            timeout(self.patience, status::fetch(target)),
            reach::date(url, "/health", self.patience)
        );
        let lost = |why: String| {
            Finding::error("reach", url, why).expected("the gateway shows its cluster").remedy(
                "start it (`baton up`), correct --cluster, or see the gateway's log: without a router it cannot tell members",
            )
        };
        let status = match status {
            Ok(Ok(status)) => status,
            Ok(Err(error)) => return Some(Err(lost(crate::whole(&error)))),
            Err(_) => return Some(Err(lost(format!("no answer within {} s", self.patience.as_secs_f32())))),
        };
        let members = match serde_json::from_value::<Vec<Member>>(status["members"].clone()) {
            Ok(members) => members,
            Err(error) => return Some(Err(lost(format!("/status cannot be read: {error}")))),
        };
        let clock = clock::judge("gateway", date.ok().flatten());
        let mut findings =
            vec![Finding::ok("reach", url, "the gateway answers, and so does a router"), clock];
        findings.extend(members::silent_routers(&status));
        Some(Ok((members, findings)))
    }

    async fn of_etcd(&self) -> Option<Vec<Member>> {
        let mut found: BTreeMap<String, Member> = BTreeMap::new();
        let mut heard = false;
        for source in &self.sources {
            let Ok(client) = membership::connect(source.clone()) else { continue };
            let mut views = client.watch();
            let view = timeout(self.patience, views.wait_for(|view| view.connected)).await;
            if let Ok(Ok(view)) = view {
                heard = true;
                found.extend(view.members.iter().map(|member| (member.id.clone(), member.clone().into())));
            }
        }
        heard.then(|| found.into_values().collect())
    }

    /// This machine: limits, GPUs, RDMA.
    async fn machine(&self, members: &[Member]) -> Vec<Finding> {
        let workers: Vec<&worker::Config> =
            self.files.iter().filter_map(|file| file.worker().map(|(_, config)| config)).collect();
        let mut findings = limits::judge(&limits::gather(&self.files, members));
        let to_start = workers.iter().filter(|config| config.backend == "cuda");
        let share = to_start.map(|config| config.gpu_memory_utilization).reduce(f32::max);
        if share.is_some() || members.iter().any(|member| member.backend == "cuda") {
            let look = timeout(self.patience, spawn_blocking(gpu::gather)).await;
            findings.extend(match look {
                Ok(Ok(found)) => gpu::judge(&found, share),
                _ => vec![Finding::not_checked("gpu", "this machine", "the driver did not answer in time")],
            });
        } else {
            findings.push(Finding::not_checked(
                "gpu",
                "this machine",
                "nothing looked at here computes on a GPU",
            ));
        }
        let nixl = workers.iter().any(|config| config.handoff.transport == worker::Transport::Nixl);
        findings.extend(rdma::judge(&rdma::gather(), nixl));
        findings
    }
}

/// Each etcd cluster once.
fn sources(args: &Args, files: &[Read]) -> Vec<MembershipConfig> {
    let mut sources: Vec<MembershipConfig> = Vec::new();
    let mut add = |etcd: &[String], tls: Option<EtcdTls>, prefix: &str| {
        let known = sources.iter().any(|source| source.etcd == etcd && source.prefix == prefix);
        if !etcd.is_empty() && !known {
            let prefix = prefix.to_owned();
            sources.push(MembershipConfig {
                etcd: etcd.to_vec(),
                tls,
                prefix,
                ..MembershipConfig::default()
            });
        }
    };
    add(&args.etcd, None, &args.prefix);
    for file in files {
        match &file.service {
            Service::Router(config) => add(&config.etcd, config.etcd_tls.clone(), &config.prefix),
            Service::Worker(config) => {
                add(&config.membership.etcd, config.membership.tls.clone(), &config.membership.prefix);
            }
            Service::Gateway(_) => {}
        }
    }
    sources
}

/// Each directory once, with its weights if anything reads them.
fn directories(args: &Args, files: &[Read]) -> BTreeSet<model::Directory> {
    let mut found: BTreeMap<PathBuf, model::Directory> = BTreeMap::new();
    let given = args.model.iter().map(|path| (path.clone(), String::new(), false));
    let configured = files.iter().filter_map(|file| match &file.service {
        Service::Worker(config) => {
            let random = config.load_format == worker::LoadFormat::Random || config.backend == "sim";
            Some((config.model.clone(), config.backend.clone(), random))
        }
        Service::Gateway(config) => Some((config.model_dir.clone(), String::new(), true)),
        Service::Router(_) => None,
    });
    for (path, backend, without_weights) in given.chain(configured) {
        let new = model::Directory { path: path.clone(), backend, without_weights };
        let entry = found.entry(path).or_insert(new.clone());
        entry.without_weights &= new.without_weights;
        if entry.backend.is_empty() {
            entry.backend = new.backend;
        }
    }
    found.into_values().collect()
}
