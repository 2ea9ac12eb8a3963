//! From a model's directory to a running engine. The only place that names a backend.

use crate::{
    Config, Error, LoadFormat, Role,
    config::CPU_CACHE_MB,
    convert::Bounds,
    measure::{self, Measured},
    shared::Identity,
    simulated,
};
use engine::{EngineConfig, EngineHandle, Executor, ModelExecutor, StepRecord, simulated::SimExecutor};
use kernels::{
    Backend, CudaBackend, Random,
    cpu::{CpuBackend, CpuOptions},
    cuda::{LinkRates, link_rates},
};
use kv::KvMemory;
use model::{KvSize, ModelRunner, RunnerOptions};
use std::{path::Path, sync::Arc, time::Instant};
use tokio::sync::oneshot;

pub struct Loaded {
    pub engine: EngineHandle,
    pub identity: Identity,
    /// Name under which the model is served.
    pub model: String,
}

/// Told of each step.
pub type OnStep = Box<dyn Fn(StepRecord) + Send + Sync>;

/// Checks and loads on a thread of its own, which may take minutes and keeps no process from ending.
pub async fn load(config: Config, on_step: OnStep) -> Result<Loaded, Error> {
    let (sender, loaded) = oneshot::channel();
    let thread = std::thread::Builder::new().name("load".to_owned());
    thread.spawn(move || drop(sender.send(start(&config, on_step)))).map_err(Error::Thread)?;
    loaded
        .await
        .unwrap_or_else(|_| Err(Error::Engine("its start panicked; the log has the message".to_owned())))
}

fn start(config: &Config, on_step: OnStep) -> Result<Loaded, Error> {
    match config.backend.as_str() {
        "cuda" => {
            let backend = CudaBackend::new(0).map_err(model::Error::from)?;
            launch(config, backend, KvSize::Share(config.gpu_memory_utilization), on_step)
        }
        "sim" => simulate(config, on_step),
        _ => {
            let options = CpuOptions { threads: config.threads, ..CpuOptions::default() };
            let backend = CpuBackend::new(options).map_err(model::Error::from)?;
            launch(config, backend, KvSize::Bytes(CPU_CACHE_MB << 20), on_step)
        }
    }
}

fn simulate(config: &Config, on_step: OnStep) -> Result<Loaded, Error> {
    let options = simulated::options(config)?;
    let weights_fingerprint = simulated::weights_fingerprint(&options, config.seed);
    let engine = engine::spawn(SimExecutor::new(options), engine_config(config, on_step));
    loaded(config, engine, weights_fingerprint, &directory_name(&config.model))
}

/// Measures the model on the backend that the options name.
pub(crate) fn measure(options: &measure::Options) -> Result<Measured, Error> {
    let began = Instant::now();
    match options.backend.as_str() {
        "cuda" => {
            let backend = CudaBackend::new(0).map_err(model::Error::from)?;
            measure::measure(options, backend, began)
        }
        "cpu" => {
            let cpu = CpuOptions { threads: options.threads, ..CpuOptions::default() };
            let backend = CpuBackend::new(cpu).map_err(model::Error::from)?;
            measure::measure(options, backend, began)
        }
        other => Err(Error::Backend(other.to_owned())),
    }
}

/// The KV pool of a backend with a model of random weights, `config` being its config.json: for measuring transfers.
pub(crate) fn pool(backend: &str, config: &str, blocks: u32) -> Result<Arc<dyn KvMemory>, Error> {
    let directory = model::random_model(config, 1)?;
    match backend {
        "cuda" => open_pool(&directory, CudaBackend::new(0).map_err(model::Error::from)?, blocks),
        "cpu" => {
            let backend = CpuBackend::new(CpuOptions::default()).map_err(model::Error::from)?;
            open_pool(&directory, backend, blocks)
        }
        other => Err(Error::Backend(other.to_owned())),
    }
}

fn open_pool<B: Backend>(
    directory: &model::Directory,
    backend: B,
    blocks: u32,
) -> Result<Arc<dyn KvMemory>, Error> {
    let options =
        RunnerOptions { kv: KvSize::Blocks(blocks), max_step_tokens: 64, ..RunnerOptions::default() };
    let mut runner = ModelRunner::open(directory, backend, options)?;
    runner.randomize_pool(Random { key: 1, std: 1.0 }).map_err(model::Error::from)?;
    Ok(ModelExecutor::new(runner, None).map_err(Error::Thread)?.kv_memory())
}

/// Whether this binary has kernels for GPUs, and whether the driver's library can be loaded here.
pub fn cuda() -> (bool, bool) {
    (kernels::cuda::device::is_built(), kernels::cuda::device::is_driver_present())
}

/// Whether NIXL can be used: it is in this binary, and its library can be loaded here.
pub fn nixl() -> Result<(), Error> {
    handoff::nixl::check().map_err(Error::Transport)
}

/// Rates of the link to the device, where there is one.
pub(crate) fn link(backend: &str, bytes: usize) -> Result<Option<LinkRates>, Error> {
    let rates = (backend == "cuda").then(|| link_rates(0, bytes));
    Ok(rates.transpose().map_err(model::Error::from)?)
}

fn launch<B: Backend>(config: &Config, backend: B, kv: KvSize, on_step: OnStep) -> Result<Loaded, Error> {
    let directory = match config.load_format {
        LoadFormat::Safetensors => model::check_directory(&config.model)?,
        LoadFormat::Random => model::random_directory(&config.model, config.seed)?,
    };
    let runner = ModelRunner::open(&directory, backend, options(config, kv))?;
    let model = runner.model().clone();
    let executor = ModelExecutor::new(runner, config.debug.fail_step).map_err(Error::Thread)?;
    let engine = engine::spawn(executor, engine_config(config, on_step));
    loaded(config, engine, model.weights_fingerprint, &model.name)
}

/// `name`: under which the model is served, if the configuration gives none.
pub fn loaded(
    config: &Config,
    engine: EngineHandle,
    weights_fingerprint: u64,
    name: &str,
) -> Result<Loaded, Error> {
    let limits = engine.limits();
    let bounds = Bounds { vocab_size: limits.vocab_size, max_context: limits.max_context };
    let model = config.served_model_name.clone().unwrap_or_else(|| name.to_owned());
    let files_fingerprint = proto::files_fingerprint(&config.model).map_err(Error::Files)?;
    Ok(Loaded { engine, identity: Identity { weights_fingerprint, files_fingerprint, bounds }, model })
}

fn directory_name(path: &Path) -> String {
    let full = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    full.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// `kv`: the pool's size, if the configuration names none.
fn options(config: &Config, kv: KvSize) -> RunnerOptions {
    let bytes = config.kv_cache_mb.map(|megabytes| KvSize::Bytes(megabytes << 20));
    RunnerOptions {
        block_tokens: config.block_tokens,
        kv: config.kv_blocks.map(KvSize::Blocks).or(bytes).unwrap_or(kv),
        max_sequences: config.max_sequences,
        max_step_tokens: config.max_step_tokens,
        max_context: config.max_context,
        tokenizer_size: None,
    }
}

pub fn engine_config(config: &Config, on_step: OnStep) -> EngineConfig {
    EngineConfig {
        role: match config.role {
            Role::Prefill => engine::Role::Prefill,
            Role::Decode => engine::Role::Decode,
            Role::Both => engine::Role::Both,
        },
        max_sequences: config.max_sequences,
        max_step_tokens: config.max_step_tokens,
        blocks: 0,
        prefix_cache: config.prefix_cache,
        max_reserved_share: config.max_reserved_share,
        waiting_limit: config.waiting as usize,
        on_step: Some(Arc::new(on_step)),
    }
}
