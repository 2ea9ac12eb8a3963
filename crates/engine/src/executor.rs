//! The seam between scheduling and computing.

use kernels::{EntryOutput, StepInput};
use kv::{KvMemory, StepId};
use std::{future::Future, sync::Arc, time::Duration};

/// What a step gave, entries in the order they were submitted.
#[derive(Debug)]
pub struct StepOutput {
    pub step: StepId,
    pub entries: Vec<EntryOutput>,
    pub elapsed: Duration,
}

/// The device is unusable; the worker must end.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the executor stopped: {0}")]
pub struct ExecutorError(pub String);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sequences in one step, and slots of resident sampler state.
    pub max_sequences: u32,
    /// Tokens in one step.
    pub max_step_tokens: u32,
    /// Tokens of prompt and output together that the model's positions allow.
    pub max_context: u32,
    pub vocab_size: u32,
}

/// Runs steps in the order submitted. At most [`Self::IN_FLIGHT`] are submitted and not collected,
/// so that the next step is prepared while one runs.
pub trait Executor: Send + 'static {
    const IN_FLIGHT: usize = 2;

    /// Enqueues a step and returns its number (1, 2, …) without waiting.
    fn submit(&mut self, step: StepInput) -> Result<StepId, ExecutorError>;

    /// The oldest uncollected step. Pending when none is in flight, unless the device is lost meanwhile; cancel-safe.
    fn collect(&mut self) -> impl Future<Output = Result<StepOutput, ExecutorError>> + Send;

    /// The bytes of the block pool, ordered against the steps of this executor.
    fn kv_memory(&self) -> Arc<dyn KvMemory>;

    fn limits(&self) -> Limits;
}
