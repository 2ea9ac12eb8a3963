//! The whole model measured without a cluster: random weights, the real path of a step (upload, forward pass, sampling, recorded
//! steps), the next step prepared and enqueued while one runs, as the engine does. Knows no scheduler.

mod case;
mod feed;
mod floor;

pub use case::{Case, Phase};
pub use floor::Rates;
pub use kernels::OperationTime;

use crate::Error;
use feed::Feed;
use kernels::{Backend, Random, Timed};
use kv::{KvDtype, KvLayout};
use model::{Config, Directory, KvSize, Launched, ModelRunner, RunnerOptions};
use std::{
    collections::{HashSet, VecDeque},
    path::PathBuf,
    time::Instant,
};

const BLOCK_TOKENS: u32 = 64;
/// Steps on their way at once, as in the engine.
const IN_FLIGHT: usize = 2;

#[derive(Clone, Debug)]
pub struct Options {
    /// config.json or its directory.
    pub model: PathBuf,
    /// One of [`crate::BACKENDS`].
    pub backend: String,
    pub seed: u64,
    pub cases: Vec<Case>,
    /// Measure operations, one by one, instead of steps.
    pub operations: bool,
    /// Threads of the CPU backend; 0: one for each core.
    pub threads: usize,
}

/// What was measured.
#[derive(Clone, Debug)]
pub struct Measured {
    /// From the start to a model whose first steps have run.
    pub seconds_to_ready: f64,
    pub kv_blocks: u32,
    pub config: Config,
    pub cases: Vec<Outcome>,
}

#[derive(Clone, Debug)]
pub struct Outcome {
    pub case: Case,
    /// Of the timed steps, in order.
    pub milliseconds: Vec<f64>,
    /// Different tokens that the last step sampled: experts are only spread if there are about as many as sequences.
    pub distinct_tokens: usize,
    /// Of the last step, if operations were asked for.
    pub operations: Vec<OperationTime>,
}

impl Outcome {
    pub fn median(&self) -> f64 {
        let mut sorted = self.milliseconds.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    }

    pub fn tokens_per_second(&self) -> f64 {
        f64::from(self.case.tokens_of_step()) / self.median() * 1e3
    }

    /// Milliseconds below which this GPU could not do it.
    pub fn floor(&self, config: &Config, rates: &Rates) -> f64 {
        1e3 * floor::seconds(config, &self.case, rates)
    }
}

/// Loads the model on the backend that the options name, and measures every case.
pub fn run(options: &Options) -> Result<Measured, Error> {
    crate::load::measure(options)
}

/// Loads once for all cases. `began`: when the process did.
pub(crate) fn measure<B: Backend>(options: &Options, backend: B, began: Instant) -> Result<Measured, Error> {
    let directory = model::random_directory(&options.model, options.seed)?;
    match options.operations {
        false => run_on(options, &directory, backend, began, |_| Ok(Vec::new())),
        true => run_on(options, &directory, Timed::new(backend), began, Timed::take),
    }
}

fn run_on<B: Backend>(
    options: &Options,
    directory: &Directory,
    backend: B,
    began: Instant,
    take: impl Fn(&mut B) -> Result<Vec<OperationTime>, kernels::Error>,
) -> Result<Measured, Error> {
    let mut runner = ModelRunner::open(directory, backend, room(&options.cases))?;
    let key = options.seed ^ u64::MAX;
    runner.randomize_pool(Random { key, std: 1.0 }).map_err(model::Error::from)?;
    let seconds_to_ready = began.elapsed().as_secs_f64();
    tracing::info!(seconds_to_ready, "loaded");
    let case = |case: &Case| measure_case(&mut runner, case, options.seed, &take).map_err(model::Error::from);
    let cases = options.cases.iter().map(case).collect::<Result<_, _>>()?;
    let kv_blocks = runner.shape().blocks;
    Ok(Measured { seconds_to_ready, kv_blocks, config: directory.config.clone(), cases })
}

/// What the largest case needs.
fn room(cases: &[Case]) -> RunnerOptions {
    let most = |of: fn(&Case) -> u32| cases.iter().map(of).max().unwrap_or(1);
    RunnerOptions {
        block_tokens: BLOCK_TOKENS,
        kv: KvSize::Blocks(most(Case::blocks)),
        max_sequences: most(|case| case.sequences),
        max_step_tokens: most(Case::tokens_of_step),
        max_context: Some(most(Case::positions)),
        tokenizer_size: None,
    }
}

fn measure_case<B: Backend>(
    runner: &mut ModelRunner<B>,
    case: &Case,
    seed: u64,
    take: &impl Fn(&mut B) -> Result<Vec<OperationTime>, kernels::Error>,
) -> Result<Outcome, kernels::Error> {
    let mut feed = Feed::new(case, runner.shape(), seed);
    let mut flying: VecDeque<Launched<B>> = VecDeque::new();
    let (mut ended, mut distinct, mut operations) = (Vec::new(), 0, Vec::new());
    let total = case.warmup() + case.steps();
    for number in 0..=total {
        if number < total {
            flying.push_back(runner.launch(&feed.step(number))?);
        }
        if flying.len() == IN_FLIGHT || number == total {
            distinct = finish(runner, &mut flying)?;
            ended.push(Instant::now());
            let launched = take(runner.backend())?;
            if number < total {
                operations = launched;
            }
        }
    }
    let millisecond = |pair: &[Instant]| (pair[1] - pair[0]).as_secs_f64() * 1e3;
    let milliseconds = ended.windows(2).skip(case.warmup() as usize - 1).map(millisecond).collect();
    let outcome = Outcome { case: *case, milliseconds, distinct_tokens: distinct, operations };
    tracing::info!(%case, milliseconds = outcome.median(), "measured");
    Ok(outcome)
}

/// Ends the oldest step; the number of different tokens that it sampled.
fn finish<B: Backend>(
    runner: &mut ModelRunner<B>,
    flying: &mut VecDeque<Launched<B>>,
) -> Result<usize, kernels::Error> {
    let Some(step) = flying.pop_front() else { return Ok(0) };
    let outputs = runner.finish(step)?;
    let tokens: HashSet<u32> =
        outputs.iter().filter_map(|output| Some(output.sampled.as_ref()?.id)).collect();
    Ok(tokens.len())
}

/// Bytes of a token's rows in the cache of a device that keeps bf16.
pub(crate) fn kv_bytes(config: &Config) -> usize {
    let row = config.kv_lora_rank + config.rope_dim;
    KvLayout { dtype: KvDtype::Bf16, layers: config.layers, block_tokens: 1, row }.block_bytes()
}
