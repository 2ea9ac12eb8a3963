//! `baton up`: a whole cluster on this machine. Every service is a process of its own, as in a real
//! deployment; they find each other by the addresses they print, so nothing here picks ports. Ready is
//! said only when a request would succeed.

mod child;
mod cluster;

use anyhow::bail;
use clap::Parser;
use cluster::Cluster;
use std::{net::IpAddr, path::PathBuf, process::ExitCode, time::Duration};

#[derive(Clone, Parser)]
pub struct Args {
    /// Hugging Face directory of the model [default: the demo model]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Prefill workers
    #[arg(long, value_name = "N", default_value_t = 1)]
    prefill: usize,
    /// Decode workers
    #[arg(long, value_name = "N", default_value_t = 1)]
    decode: usize,
    /// Workers that do both, without a hand-off
    #[arg(long, value_name = "N", default_value_t = 0)]
    both: usize,
    /// Routers; more than one need --etcd, as the membership lives in the router otherwise
    #[arg(long, value_name = "N", default_value_t = 1)]
    routers: usize,
    /// Address of the gateway; anything but loopback is reachable from outside
    #[arg(long, value_name = "IP", default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port of the gateway; 0 takes a free one
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// What computes: cpu, cuda (Hopper GPUs, in a binary built with the feature cuda), or sim (nothing: times and answers are simulated)
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    backend: String,
    /// How KV blocks get from prefill to decode: grpc, or nixl (in a binary built with the feature rdma)
    #[arg(long, value_name = "NAME", default_value = "grpc")]
    transport: crate::serve::Transport,
    /// Keep the membership in this etcd instead of in the router
    #[arg(long, value_name = "URL,URL", value_delimiter = ',')]
    etcd: Vec<String>,
    /// Send the spans of every request to the OpenTelemetry collector at this address (OTLP over gRPC)
    #[arg(long, value_name = "URL")]
    traces: Option<String>,
    /// Threads that compute, of each worker; 0: one for each core
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Tokens of one step, and so the largest chunk of a prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    chunk: u32,
    /// Tokens of a KV block
    #[arg(long, value_name = "TOKENS", default_value_t = 64)]
    block_tokens: u32,
    /// Blocks of each worker's KV pool [default: what fits 128 MiB on a CPU, what is left of a GPU shared out evenly]
    #[arg(long, value_name = "N")]
    kv_blocks: Option<u32>,
    /// Override one key of every worker's configuration
    #[arg(long = "worker-set", value_name = "KEY=VALUE")]
    worker_set: Vec<String>,
    /// Override one key of the router's configuration
    #[arg(long = "router-set", value_name = "KEY=VALUE")]
    router_set: Vec<String>,
    /// Override one key of the gateway's configuration
    #[arg(long = "gateway-set", value_name = "KEY=VALUE")]
    gateway_set: Vec<String>,
    /// Give up if not ready after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    ready_timeout: u64,
    /// Directory for the logs of the services [default: one under the temporary directory]
    #[arg(long, value_name = "DIR")]
    logs: Option<PathBuf>,
    /// Show the services' logs here instead of writing them to files
    #[arg(long)]
    verbose: bool,
    /// Print one line of JSON instead of the banner when ready: addresses and process ids
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    check(&args)?;
    // One thread, and the one that lives longest: children are tied to the thread that starts them.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(up(args))
}

fn check(args: &Args) -> anyhow::Result<()> {
    if args.both == 0 && (args.prefill == 0 || args.decode == 0) {
        bail!(
            "--prefill {} --decode {}: a request needs at least one of each, or --both 1",
            args.prefill,
            args.decode
        );
    }
    if args.routers == 0 || args.routers > 1 && args.etcd.is_empty() {
        bail!(
            "--routers {}: at least one, and --etcd URL for more than one to see the same members",
            args.routers
        );
    }
    if !worker::BACKENDS.contains(&args.backend.as_str()) {
        bail!("--backend {}: this build of baton computes on: {}", args.backend, worker::BACKENDS.join(", "));
    }
    Ok(())
}

async fn up(args: Args) -> anyhow::Result<ExitCode> {
    let json = args.json;
    let patience = Duration::from_secs(args.ready_timeout);
    let stop = crate::serve::stop_signal()?;
    tokio::pin!(stop);
    let mut cluster = Cluster::new(args)?;
    let started = tokio::select! {
        started = cluster.start(patience) => started,
        () = &mut stop => Ok(()),
    };
    let ended = match started {
        Ok(()) if cluster.is_ready() => {
            cluster.announce(json);
            tokio::select! {
                failure = cluster.watch() => Err(failure),
                () = &mut stop => Ok(()),
            }
        }
        other => other,
    };
    // A worker may be configured to drain for long: who does not want to wait says so again.
    let again = crate::serve::stop_signal()?;
    tokio::select! {
        () = cluster.stop() => {}
        () = again => eprintln!("baton up: told to stop again; what still runs is killed"),
    }
    ended.map(|()| ExitCode::SUCCESS)
}
