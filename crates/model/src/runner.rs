//! A loaded model on a backend: steps in, sampled tokens out, and the bytes of its KV blocks. The caller keeps the
//! order: reads and writes take place after every step launched before them.

use crate::{
    Config, Directory, Error, GenerationDefaults, KvSize, check_directory, fingerprint,
    forward::{Activations, Network},
    load::Loader,
    pool,
};
use kernels::{Backend, EntryOutput, GraphKey, Random, Shape, StepInput};
use kv::{BlockId, Digest, KvLayout, Payload, Region, Reply};
use std::path::Path;

#[derive(Clone, Debug, PartialEq)]
pub struct RunnerOptions {
    pub block_tokens: u32,
    /// The KV pool.
    pub kv: KvSize,
    /// Entries in one step, and slots of sampler state.
    pub max_sequences: u32,
    /// Input tokens in one step.
    pub max_step_tokens: u32,
    /// Tokens of prompt and output; the model's own limit if absent.
    pub max_context: Option<u32>,
    /// Ids from here on are never sampled; the model's vocabulary if absent.
    pub tokenizer_size: Option<u32>,
}

impl Default for RunnerOptions {
    fn default() -> Self {
        RunnerOptions {
            block_tokens: 64,
            kv: KvSize::Blocks(256),
            max_sequences: 64,
            max_step_tokens: 512,
            max_context: None,
            tokenizer_size: None,
        }
    }
}

/// What is known of a loaded model.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// Name of its directory.
    pub name: String,
    pub config: Config,
    pub generation: GenerationDefaults,
    pub weights_fingerprint: u64,
    pub max_context: u32,
    pub vocab_size: u32,
    /// Of generation_config.json, or else of config.json.
    pub eos: Vec<u32>,
}

pub struct ModelRunner<B: Backend> {
    pub(crate) backend: B,
    network: Network<B>,
    activations: Activations<B>,
    model: Model,
    pub(crate) shape: Shape,
}

/// A step on its way.
pub struct Launched<B: Backend> {
    step: B::Step,
}

impl<B: Backend> ModelRunner<B> {
    /// Checks the whole directory, then loads it.
    pub fn load(dir: &Path, backend: B, options: RunnerOptions) -> Result<Self, Error> {
        Self::open(&check_directory(dir)?, backend, options)
    }

    /// Loads what has been checked.
    pub fn open(directory: &Directory, mut backend: B, options: RunnerOptions) -> Result<Self, Error> {
        let model = describe(directory, &options)?;
        let shape = shape(&model, &options)?;
        backend.prepare(shape.clone())?;
        let network = Loader { directory, backend: &mut backend }.network()?;
        let activations = Activations::alloc(&mut backend, &shape)?;
        tracing::info!(
            model = model.name,
            mtp_tensors = directory.mtp_tensors,
            unexpected_tensors = directory.unexpected_tensors,
            "model loaded; tensors of multi-token prediction and unexpected ones were left"
        );
        let mut runner = ModelRunner { backend, network, activations, model, shape };
        runner.size_pool(options.kv)?;
        Ok(runner)
    }

    /// Enqueues a step; on a CPU, runs it.
    pub fn launch(&mut self, step: &StepInput) -> Result<Launched<B>, kernels::Error> {
        let key = GraphKey::of(step);
        let mut step = self.backend.upload(step)?;
        let (network, activations) = (&self.network, &mut self.activations);
        self.backend.graphed(key, |backend| network.forward(backend, &mut step, activations))?;
        Ok(Launched { step })
    }

    /// Whether a step has run, so that [`Self::finish`] would not wait.
    pub fn is_done(&mut self, launched: &Launched<B>) -> bool {
        self.backend.is_done(&launched.step)
    }

    /// Waits for a step. Steps are finished in the order they were launched.
    pub fn finish(&mut self, launched: Launched<B>) -> Result<Vec<EntryOutput>, kernels::Error> {
        self.backend.download(launched.step)
    }

    /// Fills the KV pool with random rows, for measuring.
    pub fn randomize_pool(&mut self, random: Random) -> Result<(), kernels::Error> {
        self.backend.randomize_pool(random)
    }

    /// Copies out the first `rows` tokens of every layer of a block. An error, here and below, means that the device is lost.
    pub fn kv_read(
        &mut self,
        block: BlockId,
        rows: u32,
        reply: Reply<Payload>,
    ) -> Result<(), kernels::Error> {
        self.backend.kv_read(block, rows, reply)
    }

    /// Copies `payload` (the form `kv_read` gives) into a block.
    pub fn kv_write(
        &mut self,
        block: BlockId,
        rows: u32,
        payload: Payload,
        reply: Reply<()>,
    ) -> Result<(), kernels::Error> {
        self.backend.kv_write(block, rows, payload, reply)
    }

    /// The digest of what lies in the first `rows` tokens of every layer of a block.
    pub fn kv_digest(
        &mut self,
        block: BlockId,
        rows: u32,
        reply: Reply<Digest>,
    ) -> Result<(), kernels::Error> {
        self.backend.kv_digest(block, rows, reply)
    }

    /// Where the pool lies, if transports may reach it.
    pub fn kv_region(&self) -> Option<Region> {
        self.backend.kv_region()
    }

    /// Breaks the device; see [`Backend::fail`].
    pub fn fail(&mut self) -> Result<(), kernels::Error> {
        self.backend.fail()
    }

    pub fn backend(&mut self) -> &mut B {
        &mut self.backend
    }

    pub fn layout(&self) -> KvLayout {
        self.backend.layout()
    }

    /// Sizes that were reserved: blocks, sequences and tokens of a step.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    pub fn model(&self) -> &Model {
        &self.model
    }
}

fn describe(directory: &crate::Directory, options: &RunnerOptions) -> Result<Model, Error> {
    let config = directory.config.clone();
    let max_context = options.max_context.unwrap_or(config.max_positions);
    if max_context == 0 || max_context > config.max_positions {
        let what = format!("{max_context}, but the model has positions for 1 to {}", config.max_positions);
        return Err(Error::Option { option: "max_context", what });
    }
    let eos = if directory.generation.eos.is_empty() { &config.eos } else { &directory.generation.eos };
    let full = directory.path.canonicalize().unwrap_or_else(|_| directory.path.clone());
    Ok(Model {
        name: full
            .file_name()
            .map_or_else(|| "model".to_string(), |name| name.to_string_lossy().into_owned()),
        eos: eos.clone(),
        vocab_size: config.vocab_size,
        generation: directory.generation.clone(),
        weights_fingerprint: fingerprint::of_directory(directory),
        max_context,
        config,
    })
}

fn shape(model: &Model, options: &RunnerOptions) -> Result<Shape, Error> {
    let positive = [
        ("block_tokens", options.block_tokens),
        ("max_sequences", options.max_sequences),
        ("max_step_tokens", options.max_step_tokens),
        ("tokenizer_size", options.tokenizer_size.unwrap_or(1)),
    ];
    if let Some((option, _)) = positive.into_iter().find(|(_, value)| *value == 0) {
        return Err(Error::Option { option, what: "0, must be at least 1".to_string() });
    }
    options.kv.check()?;
    let config = &model.config;
    if let Some(size) = options.tokenizer_size.filter(|size| *size > config.vocab_size) {
        let what = format!(
            "{size}, but the model has {} ids: the tokenizer belongs to another model",
            config.vocab_size
        );
        return Err(Error::Option { option: "tokenizer_size", what });
    }
    Ok(Shape {
        layers: config.layers,
        vocab: config.vocab_size,
        tokenizer_size: options.tokenizer_size.unwrap_or(config.vocab_size),
        hidden: config.hidden,
        heads: config.heads,
        nope: config.nope,
        rope: config.rope_dim,
        value: config.value,
        latent: config.kv_lora_rank,
        softmax_scale: config.rope.softmax_scale(config.nope + config.rope_dim) as f32,
        rope_frequencies: config.rope.frequencies(config.rope_dim),
        rope_amplitude: config.rope.amplitude(),
        block_tokens: options.block_tokens,
        // Until the pool has its size.
        blocks: pool::first_blocks(options, model.max_context),
        max_sequences: options.max_sequences,
        max_step_tokens: options.max_step_tokens,
        max_context: model.max_context,
    })
}
