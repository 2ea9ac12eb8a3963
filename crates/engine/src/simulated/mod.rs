//! The executor without a model. A step takes the time that a formula says, and what it gives depends on
//! every row of the KV cache that its block tables lead to: a lost, stale or misplaced block changes the
//! answer. Everything else about it is as real: the layout of the bytes, their order against steps, digests,
//! sampling, logprobs.
//!
//! Work is done when it is collected, as late as the contract allows, and strictly in order.

mod answer;
mod cost;
mod device;

pub use answer::{Logits, next_token, prompt_logprobs};
pub use cost::StepCost;

use crate::{Executor, ExecutorError, Limits, StepOutput};
use device::Device;
use kernels::StepInput;
use kv::{BlockId, KvDtype, KvError, KvLayout, KvMemory, Payload, StepId, Transfer};
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::time::{Instant, sleep_until};

#[derive(Clone, Debug)]
pub struct SimOptions {
    pub limits: Limits,
    pub block_tokens: u32,
    pub blocks: u32,
    pub cost: StepCost,
    pub logits: Logits,
    /// A step that breaks the device, for tests of what follows.
    pub fail_step: Option<StepId>,
}

impl SimOptions {
    /// A row is one fingerprint of 64 bits, told as two numbers of 32.
    pub fn layout(&self) -> KvLayout {
        KvLayout { dtype: KvDtype::F32, layers: 1, block_tokens: self.block_tokens, row: 2 }
    }
}

pub struct SimExecutor {
    options: SimOptions,
    memory: Arc<SimMemory>,
    submitted: StepId,
    /// Steps submitted and not collected, and when each is done.
    running: VecDeque<(StepId, Instant, Instant)>,
}

impl SimExecutor {
    pub fn new(options: SimOptions) -> Self {
        let memory = SimMemory { layout: options.layout(), device: Mutex::new(Device::new(&options)) };
        SimExecutor { options, memory: Arc::new(memory), submitted: 0, running: VecDeque::new() }
    }
}

impl Executor for SimExecutor {
    fn submit(&mut self, step: StepInput) -> Result<StepId, ExecutorError> {
        self.submitted += 1;
        let now = Instant::now();
        let starts = self.running.back().map_or(now, |(_, _, before)| now.max(*before));
        let done = starts + self.options.cost.of(&step);
        self.running.push_back((self.submitted, starts, done));
        self.memory.device().step(step);
        Ok(self.submitted)
    }

    async fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        let Some(&(step, starts, done)) = self.running.front() else { return std::future::pending().await };
        sleep_until(done).await;
        self.running.pop_front();
        if self.options.fail_step.is_some_and(|fails| step >= fails) {
            return Err(ExecutorError(format!("step {step} was told to fail")));
        }
        let entries = self
            .memory
            .device()
            .run_step()
            .map_err(|problem| ExecutorError(format!("step {step}: {problem}")))?;
        Ok(StepOutput { step, entries, elapsed: done - starts })
    }

    fn kv_memory(&self) -> Arc<dyn KvMemory> {
        self.memory.clone()
    }

    fn limits(&self) -> Limits {
        self.options.limits
    }
}

impl Drop for SimExecutor {
    fn drop(&mut self) {
        self.memory.device().stop();
    }
}

/// The device outlives its executor as long as somebody may still ask for bytes.
struct SimMemory {
    layout: KvLayout,
    device: Mutex<Device>,
}

impl SimMemory {
    fn device(&self) -> MutexGuard<'_, Device> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, block: BlockId) -> Result<(), KvError> {
        let blocks = self.blocks();
        if block < blocks { Ok(()) } else { Err(KvError::NoSuchBlock { block, blocks }) }
    }
}

impl KvMemory for SimMemory {
    fn layout(&self) -> KvLayout {
        self.layout
    }

    fn blocks(&self) -> u32 {
        self.device().blocks()
    }

    fn read(&self, block: BlockId, rows: u32, _after: StepId) -> Transfer<Payload> {
        match self.check(block) {
            Ok(()) => self.device().read(block, rows),
            Err(error) => failed(error),
        }
    }

    fn write(&self, block: BlockId, rows: u32, payload: Payload, _after: StepId) -> Transfer<()> {
        let (expected, found) = (self.layout.payload_bytes(rows), payload.bytes.len());
        if expected != found {
            return failed(KvError::WrongLength { rows, expected, found });
        }
        match self.check(block) {
            Ok(()) => self.device().write(block, payload),
            Err(error) => failed(error),
        }
    }
}

fn failed<T>(error: KvError) -> Transfer<T> {
    let (reply, transfer) = kv::transfer();
    let _ = reply.send(Err(error));
    transfer
}
