//! From the batch to a step: what the policy sees, and carrying out what it says.

use super::{Core, InFlight, Kind, SequenceId, State};
use crate::{
    ComputedBlock, Event, StepKind,
    policy::{Candidate, Plan, Runnable, View, Work},
};
use kernels::{Entry, StepInput};
use kv::{BlockHash, Holder, StepId};
use tokio::time::Instant;

/// One sequence's part of a step.
pub(super) struct Part {
    pub id: SequenceId,
    pub run: u32,
    /// Positions of the sequence that are computed after it.
    pub computed: usize,
    pub sampled: bool,
    pub decodes: bool,
}

/// A step as planned, until the executor has given it its number.
pub(super) struct Prepared {
    pub parts: Vec<Part>,
    pub tokens: usize,
}

impl Prepared {
    pub fn decoding(&self) -> usize {
        self.parts.iter().filter(|part| part.decodes).count()
    }

    pub fn kind(&self) -> StepKind {
        match self.decoding() {
            0 => StepKind::Prefill,
            all if all == self.parts.len() => StepKind::Decode,
            _ => StepKind::Mixed,
        }
    }
}

impl Core {
    /// The next step, if there is something to compute; [`Self::submitted`] must follow.
    pub fn plan(&mut self) -> Option<StepInput> {
        loop {
            let plan = self.consult();
            let preempted = !plan.preempt.is_empty();
            plan.preempt.iter().for_each(|&id| self.preempt(id));
            let step = self.build(&plan);
            if !step.entries.is_empty() {
                return Some(step);
            }
            // With blocks freed and nothing to run, somebody else may run now.
            if !preempted {
                return None;
            }
        }
    }

    /// The executor has taken the planned step: tells who starts, and offers what it completes.
    pub fn submitted(&mut self, step: StepId) {
        let prepared = self.prepared.take().expect("a step was planned");
        for part in &prepared.parts {
            self.announce(part, step);
        }
        self.in_flight.push_back(InFlight { step, prepared, began: Instant::now() });
    }

    fn consult(&self) -> Plan {
        let running = self.runnables();
        let free_slots = self.free_slots.len() - self.reserved.len();
        let waiting = self.candidates(free_slots);
        self.policy.plan(&View {
            running: &running,
            waiting: &waiting,
            free_blocks: self.pool.available(),
            free_slots,
            budget: self.limits.max_step_tokens as usize,
            blocks_soon: self.blocks_soon(),
        })
    }

    fn runnables(&self) -> Vec<Runnable> {
        let mut running: Vec<Runnable> = self.running.iter().filter_map(|id| self.runnable(*id)).collect();
        let wanted: usize =
            running.iter().map(|r| if let Work::Decode { wants } = r.work { wants } else { 0 }).sum();
        if wanted > self.pool.available() {
            running.iter_mut().filter(|r| r.preemptible).for_each(|r| r.frees = self.exclusive(r.id));
        }
        running
    }

    fn runnable(&self, id: SequenceId) -> Option<Runnable> {
        let sequence = &self.sequences[&id];
        let tokens = Some(sequence.runnable()).filter(|&tokens| tokens > 0)?;
        let work = if sequence.is_decoding() {
            Work::Decode {
                wants: usize::from(sequence.submitted >= sequence.blocks.len() * self.block_tokens),
            }
        } else {
            Work::Prefill { tokens }
        };
        // A hand-off's blocks are promised; it has all that it needs and ends by itself.
        Some(Runnable { id, work, preemptible: sequence.kind != Kind::Prefill, frees: 0 })
    }

    /// Blocks that nobody else holds: at least these are free once the sequence lets go.
    fn exclusive(&self, id: SequenceId) -> usize {
        self.sequences[&id].blocks.iter().filter(|&&block| self.pool.holders(block) == 1).count()
    }

    fn blocks_soon(&self) -> usize {
        self.running.iter().filter(|id| self.sequences[id].is_ending()).map(|&id| self.exclusive(id)).sum()
    }

    /// The first in line, until one does not fit.
    fn candidates(&self, mut slots: usize) -> Vec<Candidate> {
        let mut blocks = self.pool.available();
        let mut tokens = self.limits.max_step_tokens as usize;
        let mut candidates = Vec::new();
        for &id in &self.waiting {
            let candidate = self.candidate(id);
            candidates.push(candidate);
            if slots == 0 || candidate.blocks > blocks || candidate.tokens >= tokens {
                break;
            }
            slots -= 1;
            blocks -= candidate.blocks;
            tokens -= candidate.tokens;
        }
        candidates
    }

    fn candidate(&self, id: SequenceId) -> Candidate {
        let sequence = &self.sequences[&id];
        let found = self.pool.peek(self.matchable(id));
        let total = sequence.tokens.len().div_ceil(self.block_tokens);
        Candidate {
            id,
            tokens: sequence.tokens.len() - found.blocks * self.block_tokens,
            blocks: total - found.blocks + found.cached,
        }
    }

    fn matchable(&self, id: SequenceId) -> &[BlockHash] {
        if self.config.prefix_cache { self.sequences[&id].matchable() } else { &[] }
    }

    fn build(&mut self, plan: &Plan) -> StepInput {
        let mut step = StepInput::default();
        let mut prepared = Prepared { parts: Vec::new(), tokens: 0 };
        for &(id, tokens) in &plan.run {
            if !self.waiting.contains(&id) || self.start(id) {
                self.add(id, tokens, &mut step, &mut prepared);
            }
        }
        prepared.tokens = step.tokens();
        self.prepared = (!prepared.parts.is_empty()).then_some(prepared);
        step
    }

    /// From waiting into the batch, with blocks for all its tokens and a slot. False if an earlier start
    /// has evicted what this one counted on: then it waits on.
    fn start(&mut self, id: SequenceId) -> bool {
        let hashes = self.matchable(id).to_vec();
        let total = self.sequences[&id].tokens.len().div_ceil(self.block_tokens);
        let Some((blocks, present)) = self.take_blocks(&hashes, total, 0, Holder::Sequence) else {
            return false;
        };
        self.waiting.remove(&id);
        self.running.insert(id);
        let sequence = self.sequences.get_mut(&id).expect("a waiting sequence exists");
        sequence.state = State::Running;
        sequence.slot = Some(self.free_slots.pop().expect("the policy counts slots"));
        sequence.blocks = blocks;
        sequence.published = present;
        sequence.skip_to(present * self.block_tokens);
        true
    }

    fn add(&mut self, id: SequenceId, tokens: usize, step: &mut StepInput, prepared: &mut Prepared) {
        let sequence = self.sequences.get_mut(&id).expect("the policy runs existing sequences");
        let decodes = sequence.is_decoding();
        let tokens = tokens.min(sequence.runnable());
        let end = sequence.submitted + tokens;
        if end > sequence.blocks.len() * self.block_tokens {
            let block = self.pool.allocate(1, Holder::Sequence).expect("the policy counts blocks");
            sequence.blocks.extend(block);
        }
        step.init.extend(sequence.slot_init());
        let sampled = end >= sequence.tokens.len() && sequence.forced.is_none();
        step.entries.push(Entry {
            slot: sequence.slot.expect("a running sequence has a slot"),
            input: sequence.input(tokens),
            start: sequence.submitted as u32,
            block_table: sequence.blocks[..end.div_ceil(self.block_tokens)].to_vec(),
            sample: sampled,
            prompt_logprobs: sequence.prompt_logprobs(tokens),
        });
        sequence.submitted = end;
        sequence.unseen += usize::from(sampled);
        prepared.parts.push(Part { id, run: sequence.run, computed: end, sampled, decodes });
    }

    fn announce(&mut self, part: &Part, step: StepId) {
        let sequence =
            self.sequences.get_mut(&part.id).expect("nothing ends between planning and submitting");
        if !std::mem::replace(&mut sequence.started, true) && sequence.kind != Kind::Decode {
            let cached_tokens = (sequence.published * self.block_tokens).min(sequence.prompt_len);
            sequence.send(Event::Started { cached_tokens });
            if let Some(event) = sequence.on_start.take() {
                sequence.send(event);
            }
        }
        if sequence.kind == Kind::Prefill {
            self.offer(part, step);
        }
    }

    /// Holds for the hand-off what this step completes, from the prefix cache or by computing.
    fn offer(&mut self, part: &Part, step: StepId) {
        let sequence = self.sequences.get_mut(&part.id).expect("announced");
        let (tokens, rows) = (sequence.tokens.len(), self.block_tokens);
        let complete = if part.computed == tokens { tokens.div_ceil(rows) } else { part.computed / rows };
        let first = sequence.offered.len();
        let computed = |index: usize| ComputedBlock {
            index: index as u32,
            block: sequence.blocks[index],
            rows: rows.min(tokens - index * rows) as u32,
        };
        let blocks: Vec<ComputedBlock> = (first..complete).map(computed).collect();
        if blocks.is_empty() {
            return;
        }
        blocks.iter().for_each(|computed| self.pool.share(computed.block, Holder::Offer));
        sequence.offered.resize(complete, true);
        sequence.send(Event::Computed { blocks, after: step });
    }
}
