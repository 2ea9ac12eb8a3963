//! A worker that computes nothing: what its device simulates, and how long that takes. Reads only config.json
//! of the model. Two such workers exchange blocks as real ones do, but none with a real one: weights and
//! layout differ.

use crate::{Config, Error};
use engine::{
    Limits,
    simulated::{Logits, SimOptions, StepCost},
};
use kv::Digest;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Blocks of the pool, if the configuration says nothing.
const BLOCKS: u32 = 4096;
/// An answer ends by itself after so many tokens on average.
const ANSWER: u32 = 100;

/// Time of a step on the backend `sim`: `launch_us`, and so much more for each part of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cost {
    pub launch_us: u64,
    /// A sequence that decodes.
    pub sequence_us: u64,
    /// A row of the cache that a decoding sequence attends to.
    pub context_ns: u64,
    /// A prompt token.
    pub prompt_us: u64,
}

impl Default for Cost {
    fn default() -> Self {
        let StepCost { launch, sequence, context, prompt } = StepCost::default();
        Cost {
            launch_us: launch.as_micros() as u64,
            sequence_us: sequence.as_micros() as u64,
            context_ns: context.as_nanos() as u64,
            prompt_us: prompt.as_micros() as u64,
        }
    }
}

impl From<&Cost> for StepCost {
    fn from(cost: &Cost) -> Self {
        StepCost {
            launch: Duration::from_micros(cost.launch_us),
            sequence: Duration::from_micros(cost.sequence_us),
            context: Duration::from_nanos(cost.context_ns),
            prompt: Duration::from_micros(cost.prompt_us),
        }
    }
}

/// A device for the model that `config` names.
pub fn options(config: &Config) -> Result<SimOptions, Error> {
    let model = model::random_directory(&config.model, config.seed)?.config;
    let vocab_size = model.vocab_size;
    let limits = Limits {
        max_sequences: config.max_sequences,
        max_step_tokens: config.max_step_tokens,
        max_context: config.max_context.unwrap_or(model.max_positions).min(model.max_positions),
        vocab_size,
    };
    let end = model.eos.first().map(|eos| (*eos, ANSWER));
    let mut options = SimOptions {
        limits,
        block_tokens: config.block_tokens,
        blocks: BLOCKS,
        cost: (&config.simulated).into(),
        logits: Logits { vocab_size, tokenizer_size: vocab_size, end },
        fail_step: config.debug.fail_step,
    };
    let fits = |megabytes: u64| (megabytes << 20) / options.layout().block_bytes() as u64;
    let blocks =
        config.kv_blocks.or_else(|| config.kv_cache_mb.map(|mb| fits(mb).min(u32::MAX.into()) as u32));
    options.blocks = blocks.unwrap_or(BLOCKS).max(1);
    Ok(options)
}

/// What such workers know each other by: all that their answers depend on.
pub fn weights_fingerprint(options: &SimOptions, seed: u64) -> u64 {
    Digest::of(format!("simulated {seed} {:?}", options.logits).as_bytes()).0
}
