//! The sizes and rules of a model that a backend must know. Plain numbers, no device.

use crate::StepInput;
use kv::{KvDtype, KvLayout};

/// Sizes of a model and of what is kept resident for it; given once, by [`crate::Weights::prepare`].
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    pub layers: u32,
    pub vocab: u32,
    /// Ids from here on are never sampled: rows of the head for which the tokenizer has no token.
    pub tokenizer_size: u32,
    pub hidden: u32,
    pub heads: u32,
    /// Rows of a head's query and key without position (`qk_nope_head_dim`).
    pub nope: u32,
    /// Rows with rotary position (`qk_rope_head_dim`), even.
    pub rope: u32,
    /// `v_head_dim`.
    pub value: u32,
    /// `kv_lora_rank`.
    pub latent: u32,
    pub softmax_scale: f32,
    /// Angle per position of each rotary pair, YaRN applied; `rope / 2` of them.
    pub rope_frequencies: Vec<f64>,
    /// Factor of cos and sin; 1 unless YaRN's two mscales differ.
    pub rope_amplitude: f64,
    pub block_tokens: u32,
    pub blocks: u32,
    /// Entries in a step, and slots of sampler state.
    pub max_sequences: u32,
    /// Input tokens in a step.
    pub max_step_tokens: u32,
    /// Positions.
    pub max_context: u32,
}

impl Shape {
    /// Elements of a cache row: latent, then rotary key.
    pub fn row(&self) -> usize {
        (self.latent + self.rope) as usize
    }

    /// Rows of one head's query.
    pub fn query(&self) -> usize {
        (self.nope + self.rope) as usize
    }

    pub fn layout(&self, dtype: KvDtype) -> KvLayout {
        KvLayout { dtype, layers: self.layers, block_tokens: self.block_tokens, row: self.latent + self.rope }
    }
}

/// Memory of a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    pub total: usize,
    /// Allocated by nobody.
    pub free: usize,
    /// Allocated by this backend.
    pub held: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    Sigmoid,
    Softmax,
}

/// How a group of experts is scored when only some groups are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// Sum of the two largest (DeepSeek-V3).
    TopTwo,
    /// The largest (DeepSeek-V2).
    Max,
}

/// From router logits z to experts and weights. `s = scoring(z)`, `c = s + bias`; the `kept_groups` best of
/// `groups` runs of consecutive experts stay, others count as −∞; the `top_k` largest c are chosen, best first;
/// weights are s (never c), divided by their sum + 1e-20 if `normalize`, times `scale`. Ties: lower id.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GateRule {
    pub scoring: Scoring,
    pub groups: u32,
    pub kept_groups: u32,
    pub group_score: GroupScore,
    pub top_k: u32,
    pub normalize: bool,
    pub scale: f32,
}

/// Steps with equal keys launch the same operations on buffers of the same extent, so that a backend may
/// record one and replay it for the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GraphKey {
    pub entries: u32,
    pub rows: u32,
    /// Every entry is one token and no prompt logprobs are taken.
    pub decode: bool,
}

impl GraphKey {
    pub fn of(step: &StepInput) -> GraphKey {
        GraphKey {
            entries: step.entries.len() as u32,
            rows: step.tokens() as u32,
            decode: step.entries.iter().all(|entry| entry.len() == 1 && entry.prompt_logprobs.is_none()),
        }
    }
}
