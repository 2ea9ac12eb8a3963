//! What a service asks of the engine and what it is told: sequence specifications and events.

use kernels::{Logprobs, SampledToken, Sampling};
use kv::{BlockId, Counts, StepId};
use std::time::Duration;
use tokio::time::Instant;

/// A sequence to run. `tokens[..prompt_len]` is the prompt; what follows is output generated earlier
/// (elsewhere, before a preemption or a loss), which counts as output for penalties and limits; prompt
/// logprobs have been told then, and when the next token is `forced`, and are not told again.
#[derive(Clone, Debug)]
pub struct SequenceSpec {
    /// For logs.
    pub request_id: String,
    pub tokens: Vec<u32>,
    pub prompt_len: usize,
    pub sampling: Sampling,
    /// Of output, counted from `prompt_len`; at least 1.
    pub max_tokens: usize,
    /// Ids that end the sequence: the model's eos (unless ignored) and the request's stop ids.
    pub stop_ids: Vec<u32>,
    /// Lower first.
    pub priority: i32,
    /// Take this as the token after `tokens` instead of sampling it (already seen by the client).
    pub forced: Option<u32>,
}

/// Why a sequence was not taken. Nothing is held.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("{tokens} tokens of prompt and output exceed {limit}, {what}")]
    TooLong { tokens: usize, limit: usize, what: &'static str },
    #[error("invalid request: {0}")]
    Invalid(String),
    #[error("no capacity now: {0}")]
    Full(String),
    #[error("the engine has stopped: {0}")]
    Stopped(String),
}

/// A block whose rows are final once step `after` of the event has run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ComputedBlock {
    /// Index in the sequence.
    pub index: u32,
    pub block: BlockId,
    /// Valid tokens in it.
    pub rows: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// eos or a stop id, the last token of the output.
    Stop(u32),
    /// `max_tokens` or the model's context.
    Length,
}

#[derive(Clone, Debug)]
pub enum Event {
    /// First time in a batch. `cached_tokens`: prompt tokens found in the prefix cache.
    Started {
        cached_tokens: usize,
    },
    /// Prefill for a hand-off only: blocks that are complete after step `after`, which has been
    /// submitted but may still be running; ask `KvMemory::read(block, rows, after)` at once.
    Computed {
        blocks: Vec<ComputedBlock>,
        after: StepId,
    },
    PromptLogprob {
        position: u32,
        logprobs: Logprobs,
    },
    Token {
        position: u32,
        token: SampledToken,
        /// Absent from a forced token, which nothing was computed for.
        computed: Option<Computed>,
    },
    Finished(Finish),
    /// Out of blocks; everything is released. Decode only: others recompute by themselves.
    Preempted,
    Failed(String),
}

/// When a token was computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Computed {
    /// The device began the first step that the token needed after the one before it.
    pub began: Instant,
    pub ended: Instant,
}

/// The token with which a hand-off ends and decoding begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstToken(pub u32);

/// What the engine holds and does, as reported to membership and metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineLoad {
    pub blocks: Counts,
    /// Sequences in the batch. Only while there are some do steps follow each other: one that waits may
    /// wait for offers to be delivered or reservations to end.
    pub running: u32,
    pub waiting: u32,
    /// Reservations not yet decoding.
    pub reserved: u32,
    /// Prompt tokens not yet computed, of waiting and running sequences.
    pub waiting_tokens: u64,
    /// Steps collected so far.
    pub step: StepId,
    /// The longest that any step has taken.
    pub longest_step: Duration,
}
