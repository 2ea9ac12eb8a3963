//! `baton gateway`, `baton router`, `baton worker`: one service in this process, until a signal.

use crate::{demo, settings};
use anyhow::Context;
use clap::{Parser, ValueEnum};
use std::{future::Future, path::PathBuf, process::ExitCode};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Parser)]
pub struct Args {
    /// TOML file; every key has a default
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Override one key, dotted for tables: --set queue.limit=64
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

#[derive(Parser)]
pub struct WorkerArgs {
    #[command(flatten)]
    settings: Args,
    /// What this worker does
    #[arg(long)]
    role: Option<Role>,
    /// What computes: cpu, cuda (Hopper GPUs, in a binary built with the feature cuda), or sim (nothing: times and answers are simulated)
    #[arg(long, value_name = "NAME")]
    backend: Option<String>,
    /// How KV blocks get from prefill to decode: grpc, or nixl (in a binary built with the feature rdma); the same for all workers
    #[arg(long, value_name = "NAME")]
    transport: Option<Transport>,
    /// Hugging Face directory of the model [default: the demo model]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Where weights come from: safetensors, or random (only config.json is read; for measuring)
    #[arg(long, value_name = "FORMAT")]
    load_format: Option<LoadFormat>,
    /// Seed of random weights
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Share of the GPU's memory that this worker takes; the KV pool gets what weights and scratch leave of it [default: 0.9]
    #[arg(long, value_name = "SHARE")]
    gpu_memory_utilization: Option<f32>,
    /// Size of the KV pool in MiB, whatever the share [default on a CPU: 128]
    #[arg(long, value_name = "MIB")]
    kv_cache_mb: Option<u64>,
    /// Blocks of the KV pool, whatever the share and the MiB
    #[arg(long, value_name = "N")]
    kv_blocks: Option<u32>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Transport {
    Grpc,
    Nixl,
}

#[derive(Clone, Copy, ValueEnum)]
enum LoadFormat {
    Safetensors,
    Random,
}

#[derive(Clone, Copy, ValueEnum)]
enum Role {
    Prefill,
    Decode,
    Both,
}

pub fn gateway(args: Args) -> anyhow::Result<ExitCode> {
    let mut config: gateway::Config = settings::load(args.config.as_deref(), &args.set)?;
    if config.model_dir.as_os_str().is_empty() {
        config.model_dir = demo::directory()?;
        default_name(&mut config.served_model_name);
    }
    config.traces = config.traces.or_environment();
    telemetry::init("gateway");
    serve(|shutdown| async move { gateway::run(config, shutdown).await.context("gateway") })
}

pub fn router(args: Args) -> anyhow::Result<ExitCode> {
    let mut config: router::Config = settings::load(args.config.as_deref(), &args.set)?;
    config.traces = config.traces.or_environment();
    telemetry::init("router");
    serve(|shutdown| async move { router::run(config, shutdown).await.context("router") })
}

pub fn worker(args: WorkerArgs) -> anyhow::Result<ExitCode> {
    let mut config: worker::Config = settings::load(args.settings.config.as_deref(), &args.settings.set)?;
    args.override_settings(&mut config);
    if config.model.as_os_str().is_empty() {
        config.model = demo::directory()?;
        config.served_model_name.get_or_insert_with(|| demo::NAME.to_owned());
    }
    config.traces = config.traces.or_environment();
    telemetry::init("worker");
    serve(|shutdown| async move { worker::run(config, shutdown).await.context("worker") })
}

impl WorkerArgs {
    fn override_settings(self, config: &mut worker::Config) {
        replace(&mut config.role, self.role.map(Into::into));
        replace(&mut config.backend, self.backend);
        replace(&mut config.handoff.transport, self.transport.map(Into::into));
        replace(&mut config.model, self.model);
        replace(&mut config.load_format, self.load_format.map(Into::into));
        replace(&mut config.seed, self.seed);
        replace(&mut config.gpu_memory_utilization, self.gpu_memory_utilization);
        config.kv_cache_mb = self.kv_cache_mb.or(config.kv_cache_mb);
        config.kv_blocks = self.kv_blocks.or(config.kv_blocks);
    }
}

fn replace<T>(value: &mut T, by: Option<T>) {
    if let Some(by) = by {
        *value = by;
    }
}

impl From<Transport> for worker::Transport {
    fn from(transport: Transport) -> Self {
        match transport {
            Transport::Grpc => worker::Transport::Grpc,
            Transport::Nixl => worker::Transport::Nixl,
        }
    }
}

impl From<LoadFormat> for worker::LoadFormat {
    fn from(format: LoadFormat) -> Self {
        match format {
            LoadFormat::Safetensors => worker::LoadFormat::Safetensors,
            LoadFormat::Random => worker::LoadFormat::Random,
        }
    }
}

impl From<Role> for worker::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::Prefill => worker::Role::Prefill,
            Role::Decode => worker::Role::Decode,
            Role::Both => worker::Role::Both,
        }
    }
}

fn default_name(names: &mut Vec<String>) {
    if names.is_empty() {
        names.push(demo::NAME.to_owned());
    }
}

/// Runs a service until it ends or this process is told to stop.
fn serve<S, F>(service: S) -> anyhow::Result<ExitCode>
where
    S: FnOnce(std::pin::Pin<Box<dyn Future<Output = ()> + Send>>) -> F,
    F: Future<Output = anyhow::Result<()>>,
{
    die_with_parent();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let stop = stop_signal()?;
        service(Box::pin(stop)).await
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Completes at the first SIGINT or SIGTERM.
pub fn stop_signal() -> anyhow::Result<impl Future<Output = ()> + Send> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Name of the variable by which `baton up` tells its children who started them.
pub const PARENT: &str = "BATON_UP_PID";

/// A child of `baton up` ends when `up` does, even by SIGKILL.
fn die_with_parent() {
    let Some(parent) = std::env::var(PARENT).ok().and_then(|pid| pid.parse::<i32>().ok()) else { return };
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))
    {
        tracing::warn!(%error, "cannot tie this process to baton up");
    }
    let now = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get());
    if now != Some(parent) {
        eprintln!("baton: the process that started this one has ended");
        std::process::exit(1);
    }
}
