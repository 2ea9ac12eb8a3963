//! The executor that runs a model. One thread owns the runner and takes steps, KV reads and KV writes in the order in which
//! they were asked for, which is all the ordering the seams demand.

use crate::{Executor, ExecutorError, Limits, StepOutput};
use kernels::{Backend, StepInput};
use kv::{BlockId, Digest, KvError, KvLayout, KvMemory, Payload, Region, Reply, StepId, Transfer};
use model::{Launched, ModelRunner};
use std::{
    collections::VecDeque,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, TryRecvError, sync_channel},
    },
    thread,
    time::Instant,
};
use tokio::sync::mpsc;

/// Steps, reads and writes on their way to the device thread. Two steps are in flight and transfers are bounded by the
/// pool's blocks, so a full queue means a device that is far behind: then asking waits.
const COMMANDS: usize = 1024;

pub struct ModelExecutor {
    commands: SyncSender<Command>,
    outputs: mpsc::UnboundedReceiver<Result<StepOutput, ExecutorError>>,
    submitted: StepId,
    limits: Limits,
    memory: Arc<ModelMemory>,
}

enum Command {
    Step(StepId, StepInput),
    Read(BlockId, u32, Reply<Payload>),
    Write(BlockId, u32, Payload, Reply<()>),
    Digest(BlockId, u32, Reply<Digest>),
}

impl ModelExecutor {
    /// Moves the runner to a thread of its own. `fail_step` names a step that breaks the device, for tests of what follows.
    pub fn new<B: Backend>(runner: ModelRunner<B>, fail_step: Option<StepId>) -> std::io::Result<Self> {
        let shape = runner.shape();
        let limits = Limits {
            max_sequences: shape.max_sequences,
            max_step_tokens: shape.max_step_tokens,
            max_context: shape.max_context,
            vocab_size: shape.vocab,
        };
        let (layout, blocks, region) = (runner.layout(), shape.blocks, runner.kv_region());
        let (commands, received) = sync_channel(COMMANDS);
        // At most `IN_FLIGHT` outputs are ever uncollected.
        let (sender, outputs) = mpsc::unbounded_channel();
        let device = Device { runner, flying: VecDeque::new(), outputs: sender, fail_step };
        thread::Builder::new().name("device".to_owned()).spawn(move || device.run(&received))?;
        let memory = Arc::new(ModelMemory { commands: commands.clone(), layout, blocks, region });
        Ok(ModelExecutor { commands, outputs, submitted: 0, limits, memory })
    }

    /// Why the device has ended. It says so before it takes no more commands.
    fn last_word(&mut self) -> ExecutorError {
        let said = std::iter::from_fn(|| self.outputs.try_recv().ok());
        said.filter_map(Result::err).last().unwrap_or_else(gone)
    }
}

impl Executor for ModelExecutor {
    fn submit(&mut self, step: StepInput) -> Result<StepId, ExecutorError> {
        self.submitted += 1;
        match self.commands.send(Command::Step(self.submitted, step)) {
            Ok(()) => Ok(self.submitted),
            Err(_) => Err(self.last_word()),
        }
    }

    async fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        self.outputs.recv().await.unwrap_or_else(|| Err(gone()))
    }

    fn kv_memory(&self) -> Arc<dyn KvMemory> {
        self.memory.clone()
    }

    fn limits(&self) -> Limits {
        self.limits
    }
}

fn gone() -> ExecutorError {
    ExecutorError("the device thread has ended; the log says why".to_owned())
}

struct Device<B: Backend> {
    runner: ModelRunner<B>,
    flying: VecDeque<(StepId, Launched<B>, Instant)>,
    outputs: mpsc::UnboundedSender<Result<StepOutput, ExecutorError>>,
    fail_step: Option<StepId>,
}

impl<B: Backend> Device<B> {
    /// Until everybody who could ask is gone, or the device fails.
    fn run(mut self, commands: &Receiver<Command>) {
        if let Err(error) = self.serve(commands) {
            tracing::error!(%error, "the device failed");
            let _ = self.outputs.send(Err(error));
        }
    }

    fn serve(&mut self, commands: &Receiver<Command>) -> Result<(), ExecutorError> {
        loop {
            self.finish_done()?;
            let command = match self.flying.is_empty() {
                true => commands.recv().map_err(|_| TryRecvError::Disconnected),
                false => commands.try_recv(),
            };
            match command {
                Ok(command) => self.take(command)?,
                Err(TryRecvError::Empty) => self.finish_oldest()?,
                Err(TryRecvError::Disconnected) => return Ok(()),
            }
        }
    }

    fn take(&mut self, command: Command) -> Result<(), ExecutorError> {
        match command {
            Command::Step(step, input) => return self.launch(step, &input),
            Command::Read(block, rows, reply) => self.runner.kv_read(block, rows, reply),
            Command::Write(block, rows, payload, reply) => self.runner.kv_write(block, rows, payload, reply),
            Command::Digest(block, rows, reply) => self.runner.kv_digest(block, rows, reply),
        }
        .map_err(|error| ExecutorError(format!("KV blocks cannot be copied: {error}")))
    }

    /// What is done already, as every step of a CPU is, is answered before anything else is taken.
    fn launch(&mut self, step: StepId, input: &StepInput) -> Result<(), ExecutorError> {
        let began = Instant::now();
        if self.fail_step == Some(step) {
            self.runner.fail().map_err(|error| failed_in(step, &error))?;
        }
        let launched = self.runner.launch(input).map_err(|error| {
            let (entries, tokens) = (input.entries.len(), input.tokens());
            failed_in(step, &format_args!("{error} (of {entries} sequences, {tokens} tokens)"))
        })?;
        self.flying.push_back((step, launched, began));
        if self.flying.len() >= ModelExecutor::IN_FLIGHT {
            self.finish_oldest()?;
        }
        Ok(())
    }

    /// However many blocks wait to be copied: the engine does not wait for them.
    fn finish_done(&mut self) -> Result<(), ExecutorError> {
        while self.flying.front().is_some_and(|(_, oldest, _)| self.runner.is_done(oldest)) {
            self.finish_oldest()?;
        }
        Ok(())
    }

    fn finish_oldest(&mut self) -> Result<(), ExecutorError> {
        if let Some((step, launched, began)) = self.flying.pop_front() {
            let entries = self.runner.finish(launched).map_err(|error| failed_in(step, &error))?;
            let _ = self.outputs.send(Ok(StepOutput { step, entries, elapsed: began.elapsed() }));
        }
        Ok(())
    }
}

/// The step in which an error shows; on a device that runs behind, the cause may lie in one before it.
fn failed_in(step: StepId, error: &dyn std::fmt::Display) -> ExecutorError {
    ExecutorError(format!("step {step}: {error}"))
}

/// The pool's bytes, through the same queue as the steps: whatever was submitted before is done before.
struct ModelMemory {
    commands: SyncSender<Command>,
    layout: KvLayout,
    blocks: u32,
    region: Option<Region>,
}

impl ModelMemory {
    /// If the device is gone, so is the reply, which tells whoever waits.
    fn ask<T>(&self, block: BlockId, command: impl FnOnce(Reply<T>) -> Command) -> Transfer<T> {
        if block >= self.blocks {
            return failed(KvError::NoSuchBlock { block, blocks: self.blocks });
        }
        let (reply, transfer) = kv::transfer();
        let _ = self.commands.send(command(reply));
        transfer
    }
}

impl KvMemory for ModelMemory {
    fn layout(&self) -> KvLayout {
        self.layout
    }

    fn blocks(&self) -> u32 {
        self.blocks
    }

    fn read(&self, block: BlockId, rows: u32, _after: StepId) -> Transfer<Payload> {
        self.ask(block, |reply| Command::Read(block, rows, reply))
    }

    fn write(&self, block: BlockId, rows: u32, payload: Payload, _after: StepId) -> Transfer<()> {
        let (expected, found) = (self.layout.payload_bytes(rows), payload.bytes.len());
        if expected != found {
            return failed(KvError::WrongLength { rows, expected, found });
        }
        self.ask(block, |reply| Command::Write(block, rows, payload, reply))
    }

    fn region(&self) -> Option<Region> {
        self.region.clone()
    }

    fn digest(&self, block: BlockId, rows: u32, _after: StepId) -> Transfer<Digest> {
        self.ask(block, |reply| Command::Digest(block, rows, reply))
    }
}

fn failed<T>(error: KvError) -> Transfer<T> {
    let (reply, transfer) = kv::transfer();
    let _ = reply.send(Err(error));
    transfer
}
