//! An executor without a model. A row of the cache stands for its token and position; the next token
//! is a function of every row found through the block table and of the slot's history, so that a
//! lost, stale or misplaced block, or a slot that was not reinitialised, changes the answer.
//!
//! Work is done when it is collected, as late as the contract allows, and strictly in order.

use crate::{Executor, ExecutorError, Limits, StepOutput};
use bytes::Bytes;
use kernels::{
    Entry, EntryOutput, Input, Logprobs, SampledToken, Sampling, SlotInit, StepInput, TokenLogprob,
};
use kv::{BlockId, Digest, KvDtype, KvError, KvLayout, KvMemory, Payload, StepId, Transfer};
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};
use tokio::{sync::oneshot, time::Instant};

/// One layer of one row of two 32-bit words.
pub(crate) const ROW_BYTES: usize = 8;

pub(crate) fn mix(a: u64, b: u64) -> u64 {
    let mut x = a ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// What the cache holds for a token at a position.
pub(crate) fn row(position: usize, token: u32) -> u64 {
    mix(position as u64 + 1, u64::from(token) + 1)
}

/// The token after `tokens`, as the whole engine must find it.
pub(crate) fn next_token(tokens: &[u32], prompt_len: usize, sampling: &Sampling, vocab: u32) -> SampledToken {
    let rows = tokens.iter().enumerate().map(|(position, &token)| row(position, token));
    sample(rows.fold(0, mix), tokens, prompt_len, sampling, vocab)
}

fn sample(prefix: u64, history: &[u32], prompt_len: usize, sampling: &Sampling, vocab: u32) -> SampledToken {
    let history = history.iter().fold(prompt_len as u64, |hash, &token| mix(hash, u64::from(token)));
    let hash = mix(mix(prefix, history), mix(sampling.seed, u64::from(sampling.choice)));
    let id = (hash % u64::from(vocab)) as u32;
    SampledToken { id, logprobs: sampling.logprobs.map(|_| logprobs(id, hash)) }
}

fn logprobs(token: u32, hash: u64) -> Logprobs {
    Logprobs { token: TokenLogprob { token, logprob: -((hash >> 40) as f32), rank: 1 }, top: Vec::new() }
}

/// Logprobs of the prompt token at `position`, of the prefix before it.
pub(crate) fn prompt_logprobs(tokens: &[u32], position: usize) -> Logprobs {
    let rows = tokens[..position].iter().enumerate().map(|(at, &token)| row(at, token));
    logprobs(tokens[position], rows.fold(0, mix))
}

#[derive(Clone, Debug)]
pub(crate) struct Fake {
    pub limits: Limits,
    pub block_tokens: u32,
    pub blocks: u32,
    /// Time of a step.
    pub step_time: Duration,
    /// The step that kills the device.
    pub dies_at: Option<StepId>,
}

impl Default for Fake {
    fn default() -> Self {
        Fake {
            limits: Limits { max_sequences: 8, max_step_tokens: 16, max_context: 4096, vocab_size: 97 },
            block_tokens: 4,
            blocks: 64,
            step_time: Duration::ZERO,
            dies_at: None,
        }
    }
}

impl Fake {
    pub fn start(&self) -> FakeExecutor {
        let device = Device {
            vocab: self.limits.vocab_size,
            block_tokens: self.block_tokens as usize,
            rows: vec![0; (self.blocks * self.block_tokens) as usize],
            slots: vec![None; self.limits.max_sequences as usize],
            jobs: VecDeque::new(),
            steps: 0,
            most_in_flight: 0,
        };
        FakeExecutor {
            fake: self.clone(),
            memory: Arc::new(FakeMemory { fake: self.clone(), device: Mutex::new(device) }),
            submitted: 0,
            due: None,
        }
    }
}

pub(crate) struct FakeExecutor {
    fake: Fake,
    memory: Arc<FakeMemory>,
    submitted: StepId,
    /// When the step that is being collected is done.
    due: Option<Instant>,
}

impl FakeExecutor {
    pub fn memory(&self) -> Arc<FakeMemory> {
        Arc::clone(&self.memory)
    }
}

impl Executor for FakeExecutor {
    fn submit(&mut self, step: StepInput) -> Result<StepId, ExecutorError> {
        assert!(step.entries.len() <= self.fake.limits.max_sequences as usize, "too many sequences");
        assert!(step.tokens() <= self.fake.limits.max_step_tokens as usize, "over the budget");
        self.submitted += 1;
        let mut device = self.memory.device();
        device.jobs.push_back(Job::Step(self.submitted, step));
        let in_flight = device.in_flight();
        assert!(in_flight <= Self::IN_FLIGHT, "too many steps in flight");
        device.most_in_flight = device.most_in_flight.max(in_flight);
        Ok(self.submitted)
    }

    async fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        if self.memory.device().in_flight() == 0 {
            std::future::pending::<()>().await;
        }
        let due = *self.due.get_or_insert_with(|| Instant::now() + self.fake.step_time);
        tokio::time::sleep_until(due).await;
        self.due = None;
        let (step, entries) = self.memory.device().run_step();
        if self.fake.dies_at.is_some_and(|last| step >= last) {
            return Err(ExecutorError(format!("step {step} kills it")));
        }
        Ok(StepOutput { step, entries, elapsed: self.fake.step_time })
    }

    fn kv_memory(&self) -> Arc<dyn KvMemory> {
        self.memory()
    }

    fn limits(&self) -> Limits {
        self.fake.limits
    }
}

enum Job {
    Step(StepId, StepInput),
    Read { block: BlockId, rows: u32, done: oneshot::Sender<Result<Payload, KvError>> },
    Write { block: BlockId, payload: Payload, done: oneshot::Sender<Result<(), KvError>> },
}

pub(crate) struct FakeMemory {
    fake: Fake,
    device: Mutex<Device>,
}

impl FakeMemory {
    fn device(&self) -> MutexGuard<'_, Device> {
        self.device.lock().expect("no test panics while holding it")
    }

    pub fn most_in_flight(&self) -> usize {
        self.device().most_in_flight
    }
}

impl KvMemory for FakeMemory {
    fn layout(&self) -> KvLayout {
        KvLayout { dtype: KvDtype::F32, layers: 1, block_tokens: self.fake.block_tokens, row: 2 }
    }

    fn blocks(&self) -> u32 {
        self.fake.blocks
    }

    fn read(&self, block: BlockId, rows: u32, after: StepId) -> Transfer<Payload> {
        let (done, transfer) = oneshot::channel();
        let mut device = self.device();
        assert!(after <= device.submitted(), "a read after a step that was never submitted");
        device.jobs.push_back(Job::Read { block, rows, done });
        device.run_transfers();
        transfer
    }

    fn write(&self, block: BlockId, rows: u32, payload: Payload, after: StepId) -> Transfer<()> {
        let (done, transfer) = oneshot::channel();
        let mut device = self.device();
        assert!(after <= device.submitted(), "a write after a step that was never submitted");
        assert_eq!(payload.bytes.len(), rows as usize * ROW_BYTES);
        device.jobs.push_back(Job::Write { block, payload, done });
        device.run_transfers();
        transfer
    }
}

#[derive(Clone)]
struct SlotState {
    tokens: Vec<u32>,
    prompt_len: usize,
    sampling: Arc<Sampling>,
}

struct Device {
    vocab: u32,
    block_tokens: usize,
    /// Of all blocks, one after the other.
    rows: Vec<u64>,
    slots: Vec<Option<SlotState>>,
    jobs: VecDeque<Job>,
    /// Steps run.
    steps: StepId,
    most_in_flight: usize,
}

impl Device {
    fn in_flight(&self) -> usize {
        self.jobs.iter().filter(|job| matches!(job, Job::Step(..))).count()
    }

    fn submitted(&self) -> StepId {
        self.steps + self.in_flight() as StepId
    }

    /// Transfers that no step precedes.
    fn run_transfers(&mut self) {
        while let Some(job) = self.jobs.pop_front() {
            match job {
                Job::Read { block, rows, done } => drop(done.send(Ok(Payload::new(self.read(block, rows))))),
                Job::Write { block, payload, done } => drop(done.send(self.write(block, &payload))),
                step => return self.jobs.push_front(step),
            }
        }
    }

    fn read(&self, block: BlockId, rows: u32) -> Bytes {
        let first = block as usize * self.block_tokens;
        self.rows[first..first + rows as usize].iter().flat_map(|row| row.to_le_bytes()).collect()
    }

    fn write(&mut self, block: BlockId, payload: &Payload) -> Result<(), KvError> {
        let first = block as usize * self.block_tokens;
        for (at, row) in payload.bytes.chunks_exact(ROW_BYTES).enumerate() {
            self.rows[first + at] = u64::from_le_bytes(row.try_into().expect("chunks are exact"));
        }
        Digest::of(&payload.bytes).expect(payload.digest)
    }

    fn run_step(&mut self) -> (StepId, Vec<EntryOutput>) {
        let Some(Job::Step(id, step)) = self.jobs.pop_front() else {
            panic!("transfers before a step are done")
        };
        self.steps = id;
        step.init.iter().for_each(|init| self.init(init));
        self.no_block_is_written_twice(&step);
        let outputs = step.entries.iter().map(|entry| self.run_entry(entry)).collect();
        self.run_transfers();
        (id, outputs)
    }

    fn init(&mut self, init: &SlotInit) {
        self.slots[init.slot as usize] = Some(SlotState {
            tokens: init.tokens.to_vec(),
            prompt_len: init.prompt_len as usize,
            sampling: Arc::clone(&init.sampling),
        });
    }

    fn no_block_is_written_twice(&self, step: &StepInput) {
        let mut written: Vec<BlockId> = Vec::new();
        for entry in &step.entries {
            let (first, end) = (entry.start as usize, entry.start as usize + entry.len());
            assert_eq!(entry.block_table.len(), end.div_ceil(self.block_tokens), "a block table that fits");
            written.extend(&entry.block_table[first / self.block_tokens..]);
        }
        let blocks = written.len();
        written.sort_unstable();
        written.dedup();
        assert_eq!(written.len(), blocks, "two sequences write into one block");
    }

    fn run_entry(&mut self, entry: &Entry) -> EntryOutput {
        let slot = self.slots[entry.slot as usize].clone().expect("the slot was initialised");
        let start = entry.start as usize;
        let tokens = match &entry.input {
            Input::Tokens(tokens) => tokens.clone(),
            Input::Sampled => {
                assert_eq!(
                    slot.tokens.len(),
                    start + 1,
                    "the last sampled token is the one at this position"
                );
                vec![slot.tokens[start]]
            }
        };
        assert!(!tokens.is_empty() && entry.slot < self.slots.len() as u32);
        let mut output = EntryOutput::default();
        for (at, &token) in tokens.iter().enumerate() {
            let place = self.place(entry, start + at);
            self.rows[place] = row(start + at, token);
            if let Some(target) = entry.prompt_logprobs.as_ref().and_then(|wanted| wanted.targets[at]) {
                let found = logprobs(target, self.prefix(entry, start + at + 1));
                output.prompt_logprobs.push(((start + at + 1) as u32, found));
            }
        }
        if entry.sample {
            let prefix = self.prefix(entry, start + tokens.len());
            let sampled = sample(prefix, &slot.tokens, slot.prompt_len, &slot.sampling, self.vocab);
            self.slots[entry.slot as usize].as_mut().expect("as above").tokens.push(sampled.id);
            output.sampled = Some(sampled);
        }
        output
    }

    fn place(&self, entry: &Entry, position: usize) -> usize {
        entry.block_table[position / self.block_tokens] as usize * self.block_tokens
            + position % self.block_tokens
    }

    /// All rows before `end`, as the block table finds them.
    fn prefix(&self, entry: &Entry, end: usize) -> u64 {
        (0..end).map(|position| self.rows[self.place(entry, position)]).fold(0, mix)
    }
}
