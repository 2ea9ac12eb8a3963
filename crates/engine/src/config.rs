//! What shapes an engine: its role, its limits, and who is told about each step.

use std::{fmt, sync::Arc, time::Duration};

/// Which asks an engine takes, and which policy plans its steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Prompts up to the first token, for hand-off.
    Prefill,
    /// Answers after the first token.
    Decode,
    /// Both, and whole sequences.
    Both,
}

#[derive(Clone)]
pub struct EngineConfig {
    pub role: Role,
    /// Sequences in the batch, reservations included; at most the executor's.
    pub max_sequences: u32,
    /// Tokens of one step: the budget that prompts are chunked by. At most the executor's.
    pub max_step_tokens: u32,
    /// Blocks of the executor's pool to use; 0: all of them.
    pub blocks: u32,
    /// Keep computed blocks findable for other sequences.
    pub prefix_cache: bool,
    /// Share of the pool that may be reserved and not yet decoding. A lone reservation may exceed it.
    pub max_reserved_share: f32,
    /// Sequences that may wait for the batch; more are refused.
    pub waiting_limit: usize,
    /// Called on the engine's thread after each step; must not block.
    pub on_step: Option<Arc<dyn Fn(StepRecord) + Send + Sync>>,
}

impl Default for EngineConfig {
    fn default() -> Self {
        EngineConfig {
            role: Role::Both,
            max_sequences: 64,
            max_step_tokens: 512,
            blocks: 0,
            prefix_cache: true,
            max_reserved_share: 0.5,
            waiting_limit: 1024,
            on_step: None,
        }
    }
}

impl fmt::Debug for EngineConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineConfig")
            .field("role", &self.role)
            .field("max_sequences", &self.max_sequences)
            .field("max_step_tokens", &self.max_step_tokens)
            .field("blocks", &self.blocks)
            .field("prefix_cache", &self.prefix_cache)
            .field("max_reserved_share", &self.max_reserved_share)
            .field("waiting_limit", &self.waiting_limit)
            .finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StepKind {
    Prefill,
    Decode,
    Mixed,
}

impl StepKind {
    /// The value of the metrics' label `kind`.
    pub fn label(self) -> &'static str {
        match self {
            StepKind::Prefill => "prefill",
            StepKind::Decode => "decode",
            StepKind::Mixed => "mixed",
        }
    }
}

/// A step that has been collected.
#[derive(Clone, Copy, Debug)]
pub struct StepRecord {
    pub kind: StepKind,
    /// Tokens computed.
    pub tokens: usize,
    /// Of these, tokens of answers; the others are of prompts.
    pub decoding: usize,
    pub sequences: usize,
    pub elapsed: Duration,
}
