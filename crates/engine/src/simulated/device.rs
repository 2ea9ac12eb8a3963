//! Rows, slots, and the order of what is done to them. Says so when the engine asks for what no device could
//! do.

use super::{
    SimOptions,
    answer::{self, Asked, Logits, mix, row},
};
use crate::Limits;
use bytes::Bytes;
use kernels::{Entry, EntryOutput, Input, Sampling, SlotInit, StepInput, cpu::History};
use kv::{BlockId, Digest, KvError, Payload, Reply, Transfer};
use std::{collections::VecDeque, sync::Arc};

const ROW_BYTES: usize = size_of::<u64>();

pub(super) struct Device {
    limits: Limits,
    logits: Logits,
    block_tokens: usize,
    /// Of all blocks, one after the other.
    rows: Vec<u64>,
    slots: Vec<Option<Slot>>,
    /// Steps not yet run, and transfers behind one.
    jobs: VecDeque<Job>,
    /// Whoever asks learns nothing more.
    stopped: bool,
}

struct Slot {
    sampling: Arc<Sampling>,
    prompt_len: usize,
    history: History,
    /// Token and position of the last one known.
    last: (u32, usize),
}

enum Job {
    Step(StepInput),
    Read(BlockId, u32, Reply<Payload>),
    Write(BlockId, Payload, Reply<()>),
}

impl Device {
    pub fn new(options: &SimOptions) -> Self {
        let limits = options.limits;
        Device {
            limits,
            logits: options.logits,
            block_tokens: options.block_tokens as usize,
            rows: vec![0; (options.blocks * options.block_tokens) as usize],
            slots: (0..limits.max_sequences).map(|_| None).collect(),
            jobs: VecDeque::new(),
            stopped: false,
        }
    }

    pub fn blocks(&self) -> u32 {
        (self.rows.len() / self.block_tokens) as u32
    }

    pub fn step(&mut self, step: StepInput) {
        self.jobs.push_back(Job::Step(step));
    }

    pub fn read(&mut self, block: BlockId, rows: u32) -> Transfer<Payload> {
        let (reply, transfer) = kv::transfer();
        self.enqueue(Job::Read(block, rows, reply));
        transfer
    }

    pub fn write(&mut self, block: BlockId, payload: Payload) -> Transfer<()> {
        let (reply, transfer) = kv::transfer();
        self.enqueue(Job::Write(block, payload, reply));
        transfer
    }

    /// Nothing is done any more, and whoever waits is told.
    pub fn stop(&mut self) {
        self.stopped = true;
        self.jobs.clear();
    }

    /// The oldest step, and the transfers behind it.
    pub fn run_step(&mut self) -> Result<Vec<EntryOutput>, String> {
        let Some(Job::Step(step)) = self.jobs.pop_front() else { return Err("was never submitted".into()) };
        self.check(&step)?;
        step.init.iter().for_each(|init| self.init(init));
        let outputs = step.entries.iter().map(|entry| self.run_entry(entry)).collect();
        self.run_transfers();
        outputs
    }

    fn enqueue(&mut self, transfer: Job) {
        if !self.stopped {
            self.jobs.push_back(transfer);
            self.run_transfers();
        }
    }

    /// Transfers that no step precedes.
    fn run_transfers(&mut self) {
        while let Some(job) = self.jobs.pop_front() {
            match job {
                Job::Read(block, rows, reply) => {
                    drop(reply.send(Ok(Payload::new(self.copy_out(block, rows)))))
                }
                Job::Write(block, payload, reply) => drop(reply.send(self.copy_in(block, &payload))),
                step => return self.jobs.push_front(step),
            }
        }
    }

    fn copy_out(&self, block: BlockId, rows: u32) -> Bytes {
        let first = block as usize * self.block_tokens;
        self.rows[first..first + rows as usize].iter().flat_map(|row| row.to_le_bytes()).collect()
    }

    fn copy_in(&mut self, block: BlockId, payload: &Payload) -> Result<(), KvError> {
        let first = block as usize * self.block_tokens;
        for (at, row) in payload.bytes.together().as_chunks::<ROW_BYTES>().0.iter().enumerate() {
            self.rows[first + at] = u64::from_le_bytes(*row);
        }
        Digest::of_parts(payload.bytes.iter()).expect(payload.digest)
    }

    /// What would be undefined on a device.
    fn check(&self, step: &StepInput) -> Result<(), String> {
        let (entries, tokens) = (step.entries.len(), step.tokens());
        let Limits { max_sequences, max_step_tokens, .. } = self.limits;
        if entries > max_sequences as usize || tokens > max_step_tokens as usize {
            return Err(format!(
                "{entries} sequences and {tokens} tokens, at most {max_sequences} and {max_step_tokens}"
            ));
        }
        let mut written: Vec<BlockId> = Vec::new();
        for entry in &step.entries {
            let end = entry.start as usize + entry.len();
            let (blocks, expected) = (entry.block_table.len(), end.div_ceil(self.block_tokens));
            if entry.is_empty() || blocks != expected {
                return Err(format!("a table of {blocks} blocks for {end} tokens, {expected} are expected"));
            }
            written.extend(&entry.block_table[entry.start as usize / self.block_tokens..]);
        }
        written.sort_unstable();
        match written.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(format!("two sequences write into block {}", pair[0])),
            None => Ok(()),
        }
    }

    fn init(&mut self, init: &SlotInit) {
        let (prompt_len, sampling) = (init.prompt_len as usize, Arc::clone(&init.sampling));
        let history = answer::history(&init.tokens, prompt_len, &sampling);
        let last = (init.tokens.last().copied().unwrap_or_default(), init.tokens.len().saturating_sub(1));
        self.slots[init.slot as usize] = Some(Slot { sampling, prompt_len, history, last });
    }

    fn run_entry(&mut self, entry: &Entry) -> Result<EntryOutput, String> {
        let slot = self.slots.get_mut(entry.slot as usize).and_then(Option::take);
        let mut slot = slot.ok_or_else(|| format!("slot {} was never initialised", entry.slot))?;
        let output = self.run_with(entry, &mut slot);
        self.slots[entry.slot as usize] = Some(slot);
        output
    }

    fn run_with(&mut self, entry: &Entry, slot: &mut Slot) -> Result<EntryOutput, String> {
        let (start, tokens) = (entry.start as usize, slot.inputs(entry)?);
        let mut output = EntryOutput::default();
        let mut found = (0..start).map(|position| self.rows[self.place(entry, position)]).fold(0, mix);
        let mut before = start.checked_sub(1).map_or(0, |last| self.rows[self.place(entry, last)]);
        for (position, &token) in (start..).zip(&tokens) {
            before = row(before, position, token);
            let place = self.place(entry, position);
            self.rows[place] = before;
            found = mix(found, before);
            let wanted = entry.prompt_logprobs.as_ref();
            if let Some((target, top)) = wanted.and_then(|w| Some((w.targets[position - start]?, w.top))) {
                let logprobs = answer::logprobs(found, target, top, &self.logits);
                output.prompt_logprobs.push((position as u32 + 1, logprobs));
            }
        }
        if entry.sample {
            let position = start + tokens.len();
            let asked = Asked {
                sampling: &slot.sampling,
                history: &slot.history,
                position,
                prompt_len: slot.prompt_len,
            };
            let sampled = answer::sample(found, &asked, &self.logits);
            slot.take(sampled.id, position);
            output.sampled = Some(sampled);
        }
        Ok(output)
    }

    fn place(&self, entry: &Entry, position: usize) -> usize {
        entry.block_table[position / self.block_tokens] as usize * self.block_tokens
            + position % self.block_tokens
    }
}

impl Slot {
    fn inputs(&self, entry: &Entry) -> Result<Vec<u32>, String> {
        match &entry.input {
            Input::Tokens(tokens) => Ok(tokens.clone()),
            Input::Sampled if self.last.1 == entry.start as usize => Ok(vec![self.last.0]),
            Input::Sampled => Err(format!(
                "the last token of slot {} is at position {}, not at {}",
                entry.slot, self.last.1, entry.start
            )),
        }
    }

    fn take(&mut self, token: u32, position: usize) {
        self.last = (token, position);
        if self.sampling.has_penalties() {
            answer::count_output(&mut self.history, token);
        }
    }
}
