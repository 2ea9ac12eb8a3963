//! The engine as a synchronous state machine: asks come in, steps go out, outputs come back, events go
//! to whoever asked. Keeps: every block has exactly the holders that the sequences account for; the
//! first sequence in order (priority, arrival) always progresses.
//!
//! Up to two steps are in flight. A sequence that decodes in step k joins k+1 before its token is
//! known; if it ends in k, what k+1 gives for it is ignored. Its blocks and its slot may be reused at
//! once: the executor runs steps in the order submitted, so whatever k+1 still writes there is
//! overwritten before a later step, or a KV write ordered after the newest step, is read.

mod admit;
mod collect;
mod longest;
mod plan;
mod sequence;

use crate::{
    EngineConfig, EngineLoad, Event, Finish, FirstToken, Limits, Role,
    policy::{ChunkedPrefill, Combined, Decode, SchedulePolicy},
};
use collect::InFlight;
use kv::{BlockPool, Counts, Holder, StepId};
use longest::Longest;
use plan::Prepared;
use sequence::{Kind, Sequence, State};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// A sequence's name, ordered as it is scheduled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId {
    /// Lower first.
    pub priority: i32,
    pub arrival: u64,
}

pub(crate) struct Core {
    config: EngineConfig,
    limits: Limits,
    block_tokens: usize,
    policy: Box<dyn SchedulePolicy>,
    pool: BlockPool,
    sequences: BTreeMap<SequenceId, Sequence>,
    /// The ids of those in [`State::Waiting`], and so on.
    waiting: BTreeSet<SequenceId>,
    running: BTreeSet<SequenceId>,
    reserved: BTreeSet<SequenceId>,
    free_slots: Vec<u32>,
    /// Planned and not yet submitted.
    prepared: Option<Prepared>,
    in_flight: VecDeque<InFlight>,
    arrivals: u64,
    collected: StepId,
    longest_step: Longest,
}

impl Core {
    /// `limits` are the executor's, `blocks` its pool's.
    pub fn new(config: EngineConfig, limits: Limits, block_tokens: u32, blocks: u32) -> Self {
        assert!(
            config.blocks <= blocks,
            "{} blocks are configured, the executor has {blocks}",
            config.blocks
        );
        let blocks = if config.blocks == 0 { blocks } else { config.blocks };
        let limits = effective(&config, limits, block_tokens, blocks);
        Core {
            policy: policy(config.role),
            limits,
            block_tokens: block_tokens as usize,
            pool: BlockPool::new(blocks),
            sequences: BTreeMap::new(),
            waiting: BTreeSet::new(),
            running: BTreeSet::new(),
            reserved: BTreeSet::new(),
            free_slots: (0..limits.max_sequences).rev().collect(),
            prepared: None,
            in_flight: VecDeque::new(),
            arrivals: 0,
            collected: 0,
            longest_step: Longest::default(),
            config,
        }
    }

    /// What one sequence may ask for.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty() && self.in_flight.is_empty()
    }

    /// The reservation becomes a decoding sequence: all its blocks are written.
    pub fn activate(&mut self, id: SequenceId, first: FirstToken) {
        if !self.reserved.remove(&id) {
            return;
        }
        let sequence = self.sequences.get_mut(&id).expect("a reserved sequence exists");
        for &block in &sequence.blocks {
            self.pool.pass(block, Holder::Reservation, Holder::Sequence);
        }
        sequence.state = State::Running;
        sequence.slot = Some(self.free_slots.pop().expect("a reservation counts for a slot"));
        sequence.skip_to(sequence.tokens.len());
        self.running.insert(id);
        if first.0 >= self.limits.vocab_size {
            let cause = format!(
                "the first token {} is outside the vocabulary of {}",
                first.0, self.limits.vocab_size
            );
            return self.end(id, Event::Failed(cause));
        }
        self.publish(id);
        let sequence = self.sequences.get_mut(&id).expect("as above");
        sequence.push(first.0);
        if let Some(finish) = sequence.finish() {
            self.end(id, Event::Finished(finish));
        }
    }

    /// The reservation ends, but something still writes into the blocks of these indices: they become free when the
    /// listener goes, the others now.
    pub fn quarantine(&mut self, id: SequenceId, writing: &[u32]) {
        if !self.reserved.remove(&id) {
            return;
        }
        let sequence = self.sequences.get_mut(&id).expect("a reserved sequence exists");
        let numbered = (0u32..).zip(std::mem::take(&mut sequence.blocks));
        let (kept, let_go): (Vec<_>, Vec<_>) = numbered.partition(|(index, _)| writing.contains(index));
        let let_go: Vec<_> = let_go.into_iter().map(|(_, block)| block).collect();
        self.pool.release_all(&let_go, Holder::Reservation);
        sequence.blocks = kept.into_iter().map(|(_, block)| block).collect();
        sequence.state = State::Quarantined;
        sequence.blocks.iter().for_each(|&block| self.pool.quarantine(block, Holder::Reservation));
    }

    /// Frees what is not wanted any more: sequences nobody listens to, offers that are delivered.
    pub fn sweep(&mut self) {
        let gone: Vec<SequenceId> = self.sequences.values().filter(|s| s.is_gone()).map(|s| s.id).collect();
        gone.into_iter().for_each(|id| self.remove(id));
        for sequence in self.sequences.values_mut() {
            for index in sequence.take_released() {
                self.pool.release(sequence.blocks[index], Holder::Offer);
            }
        }
    }

    /// The executor is dead: so is every sequence.
    pub fn fail(&mut self, cause: &str) {
        while let Some(&id) = self.sequences.keys().next() {
            self.end(id, Event::Failed(cause.to_owned()));
        }
        self.in_flight.clear();
    }

    pub fn load(&self) -> EngineLoad {
        EngineLoad {
            blocks: self.pool.counts(),
            running: self.running.len() as u32,
            waiting: self.waiting.len() as u32,
            reserved: self.reserved.len() as u32,
            waiting_tokens: self.sequences.values().map(|s| s.uncomputed() as u64).sum(),
            step: self.collected,
            longest_step: self.longest_step.get(),
        }
    }

    /// Verifies the pool, and that its holders are those that the sequences account for.
    pub fn check(&self) -> Result<Counts, String> {
        self.pool.check()?;
        let counts = self.pool.counts();
        let mut expected = vec![0; counts.total as usize];
        for sequence in self.sequences.values() {
            sequence.for_each_hold(|block| expected[block as usize] += 1);
        }
        for (block, &expected) in expected.iter().enumerate() {
            let found = self.pool.holders(block as u32);
            if found != expected {
                return Err(format!(
                    "block {block} has {found} holders, its sequences account for {expected}"
                ));
            }
        }
        Ok(counts)
    }

    /// Sends the last event and forgets the sequence.
    fn end(&mut self, id: SequenceId, event: Event) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.send(event);
            self.remove(id);
        }
    }

    fn remove(&mut self, id: SequenceId) {
        self.leave(id);
        if let Some(sequence) = self.sequences.remove(&id) {
            for (index, _) in sequence.offered.iter().enumerate().filter(|(_, offered)| **offered).rev() {
                self.pool.release(sequence.blocks[index], Holder::Offer);
            }
        }
    }

    /// Takes a sequence out of its state, with all that it holds but offers.
    fn leave(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        self.waiting.remove(&id);
        self.running.remove(&id);
        self.reserved.remove(&id);
        if let Some(holder) = sequence.state.holder() {
            self.pool.release_all(&sequence.blocks, holder);
        }
        if sequence.state == State::Quarantined {
            sequence.blocks.iter().for_each(|&block| self.pool.unquarantine(block));
        }
        self.free_slots.extend(sequence.slot.take());
    }

    /// Out of blocks: decode gives up, others compute again from the tokens they have.
    fn preempt(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get(&id) else { return };
        tracing::debug!(request_id = %sequence.request_id, tokens = sequence.tokens.len(), "preempted");
        if sequence.kind == Kind::Decode {
            return self.end(id, Event::Preempted);
        }
        self.leave(id);
        let sequence = self.sequences.get_mut(&id).expect("looked up above");
        sequence.restart();
        self.waiting.insert(id);
    }

    /// Makes full, computed blocks findable.
    fn publish(&mut self, id: SequenceId) {
        if !self.config.prefix_cache {
            return;
        }
        let sequence = self.sequences.get_mut(&id).expect("the caller has looked it up");
        let full = sequence.computed / self.block_tokens;
        for index in sequence.published..full {
            self.pool.publish(sequence.blocks[index], sequence.hashes[index]);
        }
        sequence.published = full;
    }

    fn decoding(&self) -> usize {
        self.running.iter().filter(|id| self.sequences[id].is_decoding()).count()
    }
}

fn policy(role: Role) -> Box<dyn SchedulePolicy> {
    match role {
        Role::Prefill => Box::new(ChunkedPrefill),
        Role::Decode => Box::new(Decode),
        Role::Both => Box::new(Combined),
    }
}

/// The executor's limits under this configuration and pool. Every sequence of a full batch must be
/// able to decode in one step.
fn effective(config: &EngineConfig, limits: Limits, block_tokens: u32, blocks: u32) -> Limits {
    let max_step_tokens = limits.max_step_tokens.min(config.max_step_tokens).max(1);
    Limits {
        max_sequences: limits.max_sequences.min(config.max_sequences).min(max_step_tokens).max(1),
        max_step_tokens,
        max_context: limits.max_context.min(blocks.saturating_mul(block_tokens)),
        vocab_size: limits.vocab_size,
    }
}

/// Whether a sequence of these tokens has ended already.
fn finish(tokens: &[u32], prompt_len: usize, end: usize, stop_ids: &[u32]) -> Option<Finish> {
    match tokens[prompt_len..].last() {
        Some(last) if stop_ids.contains(last) => Some(Finish::Stop(*last)),
        _ => (tokens.len() >= end).then_some(Finish::Length),
    }
}
