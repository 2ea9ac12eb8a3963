//! One sequence inside the engine: its tokens, its blocks, how far it is computed, who listens.

use super::{SequenceId, finish};
use crate::{Event, Finish, Offers, SequenceSpec};
use kernels::{Input, PromptLogprobs, Sampling, SlotInit};
use kv::{BlockHash, BlockId, Holder, hash_blocks};
use std::sync::Arc;
use tokio::{
    sync::mpsc::{self, error::TrySendError},
    time::Instant,
};

/// How far a sequence goes here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// From prompt to end.
    Whole,
    /// To the first token, its blocks on offer.
    Prefill,
    /// From the first token on.
    Decode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Not in the batch, holds nothing.
    Waiting,
    /// Blocks are written from elsewhere.
    Reserved,
    Running,
    /// Computed; holds only what is on offer.
    Offering,
    /// A reservation that ended under writes: its blocks are nobody's until its listener goes.
    Quarantined,
}

impl State {
    /// As what the block table is held.
    pub fn holder(self) -> Option<Holder> {
        match self {
            State::Waiting | State::Offering | State::Quarantined => None,
            State::Reserved => Some(Holder::Reservation),
            State::Running => Some(Holder::Sequence),
        }
    }
}

pub(super) struct Sequence {
    pub id: SequenceId,
    pub kind: Kind,
    pub state: State,
    pub request_id: String,
    /// Prompt and output so far.
    pub tokens: Vec<u32>,
    pub prompt_len: usize,
    /// Tokens with which it ends at the latest.
    end: usize,
    pub sampling: Arc<Sampling>,
    stop_ids: Vec<u32>,
    /// Prefill: to be told as the token after `tokens`, instead of sampling one.
    pub forced: Option<u32>,
    /// To be told right after the start.
    pub on_start: Option<Event>,
    /// Of the full blocks of `tokens`.
    pub hashes: Vec<BlockHash>,
    block_tokens: usize,
    /// The block table.
    pub blocks: Vec<BlockId>,
    pub slot: Option<u32>,
    /// Tokens known when the slot was given its state; those after were sampled into it.
    initial: Option<usize>,
    /// Positions whose computation is submitted, and those whose is also collected.
    pub submitted: usize,
    pub computed: usize,
    /// Tokens sampled by steps in flight.
    pub unseen: usize,
    /// When the first step towards the next token began.
    pub began: Option<Instant>,
    /// Blocks given to the prefix index.
    pub published: usize,
    /// Counts preemptions: outputs of an earlier run are not for this one.
    pub run: u32,
    pub started: bool,
    /// The next prompt position whose logprobs are to be told; `prompt_len` when none is.
    pub logprobs_from: usize,
    /// By index: announced as computed and not released yet.
    pub offered: Vec<bool>,
    events: mpsc::Sender<Event>,
    offers: Offers,
    /// Lost its listener, or the listener lost events.
    gone: bool,
}

impl Sequence {
    /// `end` is where the model's or the pool's context ends.
    pub fn new(
        id: SequenceId,
        kind: Kind,
        spec: SequenceSpec,
        context: usize,
        block_tokens: usize,
        offers: Offers,
    ) -> (Self, mpsc::Receiver<Event>) {
        let logprobs_from = unreported_logprobs(&spec);
        let end = spec.prompt_len.saturating_add(spec.max_tokens).min(context);
        let (events, receiver) = mpsc::channel(most_events(&spec, end, block_tokens));
        let sequence = Sequence {
            id,
            kind,
            state: if kind == Kind::Decode { State::Reserved } else { State::Waiting },
            hashes: hash_blocks(&spec.tokens, block_tokens),
            request_id: spec.request_id,
            tokens: spec.tokens,
            prompt_len: spec.prompt_len,
            end,
            sampling: Arc::new(spec.sampling),
            stop_ids: spec.stop_ids,
            forced: spec.forced,
            on_start: None,
            block_tokens,
            blocks: Vec::new(),
            slot: None,
            initial: None,
            submitted: 0,
            computed: 0,
            unseen: 0,
            began: None,
            published: 0,
            run: 0,
            started: false,
            logprobs_from,
            offered: Vec::new(),
            events,
            offers,
            gone: false,
        };
        (sequence, receiver)
    }

    /// One more output token.
    pub fn push(&mut self, token: u32) {
        self.tokens.push(token);
        if self.tokens.len().is_multiple_of(self.block_tokens) {
            let parent = self.hashes.last().copied().unwrap_or(BlockHash::ROOT);
            self.hashes.push(parent.then(&self.tokens[self.tokens.len() - self.block_tokens..]));
        }
    }

    pub fn finish(&self) -> Option<Finish> {
        finish(&self.tokens, self.prompt_len, self.end, &self.stop_ids)
    }

    /// Tokens that can be submitted now.
    pub fn runnable(&self) -> usize {
        let known = self.tokens.len() - self.submitted.min(self.tokens.len());
        match self.kind {
            Kind::Prefill => known,
            Kind::Whole | Kind::Decode if known > 0 => known,
            Kind::Whole | Kind::Decode => usize::from(self.unseen > 0 && !self.is_ending()),
        }
    }

    /// What is in flight ends it, whatever is sampled.
    pub fn is_ending(&self) -> bool {
        self.unseen > 0 && (self.kind == Kind::Prefill || self.tokens.len() + self.unseen >= self.end)
    }

    pub fn is_decoding(&self) -> bool {
        match self.kind {
            Kind::Prefill => false,
            Kind::Decode => true,
            Kind::Whole => self.initial.is_some_and(|initial| self.submitted >= initial),
        }
    }

    /// Known tokens not yet submitted; 0 while others compute them.
    pub fn uncomputed(&self) -> usize {
        match self.kind {
            Kind::Decode => 0,
            _ => self.tokens.len().saturating_sub(self.submitted),
        }
    }

    /// The next input of `n` tokens. Tokens sampled into the slot are taken from there.
    pub fn input(&self, n: usize) -> Input {
        match self.initial {
            Some(initial) if self.submitted >= initial => Input::Sampled,
            _ => Input::Tokens(self.tokens[self.submitted..self.submitted + n].to_vec()),
        }
    }

    /// The slot's state, once per run.
    pub fn slot_init(&mut self) -> Option<SlotInit> {
        let slot = self.slot.filter(|_| self.initial.is_none())?;
        self.initial = Some(self.tokens.len());
        Some(SlotInit {
            slot,
            tokens: self.tokens.as_slice().into(),
            prompt_len: self.prompt_len as u32,
            sampling: Arc::clone(&self.sampling),
        })
    }

    /// Targets for the rows of the next `n` tokens, as far as the prompt goes and they are not told yet.
    pub fn prompt_logprobs(&self, n: usize) -> Option<PromptLogprobs> {
        let top = self.sampling.prompt_logprobs?;
        let target = |position: usize| {
            let wanted = (self.logprobs_from..self.prompt_len).contains(&position);
            wanted.then(|| self.tokens[position])
        };
        let targets: Vec<_> = (self.submitted + 1..=self.submitted + n).map(target).collect();
        targets.iter().any(Option::is_some).then_some(PromptLogprobs { top, targets })
    }

    /// Leading blocks that may be taken from the prefix cache: at least the last token must be computed
    /// to have logits, and every one whose prompt logprobs are to be told.
    pub fn matchable(&self) -> &[BlockHash] {
        if self.logprobs_from < self.prompt_len {
            return &[];
        }
        let most = (self.tokens.len() - 1) / self.block_tokens;
        &self.hashes[..most.min(self.hashes.len())]
    }

    /// The first `computed` tokens are in the cache.
    pub fn skip_to(&mut self, computed: usize) {
        self.submitted = computed;
        self.computed = computed;
    }

    /// Back to before the first step; what steps in flight give for it is ignored.
    pub fn restart(&mut self) {
        self.state = State::Waiting;
        self.run += 1;
        self.blocks.clear();
        self.initial = None;
        self.unseen = 0;
        self.published = 0;
        self.skip_to(0);
    }

    pub fn send(&mut self, event: Event) {
        match self.events.try_send(event) {
            Ok(()) => {}
            Err(TrySendError::Closed(_)) => self.gone = true,
            Err(TrySendError::Full(event)) => {
                tracing::error!(request_id = %self.request_id, ?event, "more events than a sequence can have; cancelled");
                self.gone = true;
            }
        }
    }

    pub fn is_gone(&self) -> bool {
        self.gone || self.events.is_closed()
    }

    /// Indices that were on offer and are delivered.
    pub fn take_released(&mut self) -> Vec<usize> {
        let mut released: Vec<usize> =
            self.offers.take_released().into_iter().map(|index| index as usize).collect();
        released.retain(|&index| self.offered.get_mut(index).is_some_and(std::mem::take));
        released
    }

    pub fn for_each_hold(&self, mut hold: impl FnMut(BlockId)) {
        if self.state.holder().is_some() {
            self.blocks.iter().for_each(|&block| hold(block));
        }
        let offered = self.blocks.iter().zip(&self.offered).filter(|(_, offered)| **offered);
        offered.for_each(|(&block, _)| hold(block));
    }
}

/// The first position whose prompt logprobs are to be told. A sequence that has output, or whose first
/// token is known, has told them before.
fn unreported_logprobs(spec: &SequenceSpec) -> usize {
    let fresh = spec.tokens.len() == spec.prompt_len && spec.forced.is_none();
    match spec.sampling.prompt_logprobs {
        Some(_) if fresh => 1.min(spec.prompt_len),
        _ => spec.prompt_len,
    }
}

/// So that a slow listener never stalls the engine, there is room for everything a sequence can tell.
fn most_events(spec: &SequenceSpec, end: usize, block_tokens: usize) -> usize {
    let tokens = end.saturating_sub(spec.tokens.len()) + 1;
    let computed = spec.tokens.len().div_ceil(block_tokens);
    let logprobs = spec.prompt_len - unreported_logprobs(spec);
    // Started, and the last one.
    tokens + computed + logprobs + 2
}
