//! Taking asks, or refusing them with the reason.

use super::{Core, Kind, Sequence, SequenceId};
use crate::{Event, Offers, Refused, Role, SequenceSpec, policy::headroom};
use kernels::SampledToken;
use kv::{BlockHash, BlockId, Holder};
use tokio::sync::mpsc;

/// A sequence that was taken, and what it tells.
pub(crate) struct Accepted {
    pub id: SequenceId,
    pub events: mpsc::Receiver<Event>,
}

impl Core {
    pub fn generate(&mut self, mut spec: SequenceSpec, offers: Offers) -> Result<Accepted, Refused> {
        self.require(Role::Both, "whole sequences")?;
        self.validate(&spec)?;
        self.require_queue()?;
        // A forced token is known already: one more to prefill.
        let position = spec.tokens.len() as u32;
        let forced = spec.forced.take().map(|id| SampledToken { id, logprobs: None });
        spec.tokens.extend(forced.as_ref().map(|token| token.id));
        self.require_fit(spec.tokens.len())?;
        let accepted = self.accept(Kind::Whole, spec, offers);
        let sequence = self.sequences.get_mut(&accepted.id).expect("just accepted");
        sequence.on_start = forced.map(|token| Event::Token { position, token, computed: None });
        self.wait(accepted.id);
        Ok(accepted)
    }

    pub fn prefill(&mut self, spec: SequenceSpec, offers: Offers) -> Result<Accepted, Refused> {
        self.require(Role::Prefill, "prompts for hand-off")?;
        self.validate(&spec)?;
        self.require_queue()?;
        self.require_fit(spec.tokens.len())?;
        let accepted = self.accept(Kind::Prefill, spec, offers);
        self.wait(accepted.id);
        Ok(accepted)
    }

    /// The blocks of the reservation, and how many of them have their content.
    pub fn reserve(
        &mut self,
        mut spec: SequenceSpec,
        offers: Offers,
    ) -> Result<(Accepted, Vec<BlockId>, u32), Refused> {
        self.require(Role::Decode, "reservations")?;
        self.validate(&spec)?;
        // The first token, forced or not, comes with the activation; all after it are sampled.
        spec.forced = None;
        self.require_fit(spec.tokens.len())?;
        let total = (spec.tokens.len() + 1).div_ceil(self.block_tokens);
        self.require_reservable(total)?;
        let accepted = self.accept(Kind::Decode, spec, offers);
        let (id, keep) = (accepted.id, headroom(self.decoding()));
        let hashes = if self.config.prefix_cache { self.sequences[&id].hashes.clone() } else { Vec::new() };
        let Some((blocks, present)) = self.take_blocks(&hashes, total, keep, Holder::Reservation) else {
            self.sequences.remove(&id);
            let free = self.pool.available();
            return Err(Refused::Full(format!(
                "{total} blocks are wanted, {free} are free, {keep} of them kept to decode"
            )));
        };
        let sequence = self.sequences.get_mut(&id).expect("accepted above");
        sequence.blocks.clone_from(&blocks);
        self.reserved.insert(id);
        Ok((accepted, blocks, present as u32))
    }

    /// Matched and fresh blocks, `total` together, leaving `keep` free; or nothing.
    pub(super) fn take_blocks(
        &mut self,
        hashes: &[BlockHash],
        total: usize,
        keep: usize,
        holder: Holder,
    ) -> Option<(Vec<BlockId>, usize)> {
        let mut blocks = self.pool.match_prefix(hashes, holder);
        let (present, fresh) = (blocks.len(), total - blocks.len());
        let fresh =
            (fresh + keep <= self.pool.available()).then(|| self.pool.allocate(fresh, holder)).flatten();
        let Some(fresh) = fresh else {
            self.pool.release_all(&blocks, holder);
            return None;
        };
        blocks.extend(fresh);
        Some((blocks, present))
    }

    fn accept(&mut self, kind: Kind, spec: SequenceSpec, offers: Offers) -> Accepted {
        self.arrivals += 1;
        let id = SequenceId { priority: spec.priority, arrival: self.arrivals };
        let context = self.limits.max_context as usize;
        let (sequence, events) = Sequence::new(id, kind, spec, context, self.block_tokens, offers);
        self.sequences.insert(id, sequence);
        Accepted { id, events }
    }

    /// Into the queue, unless nothing is left to do.
    fn wait(&mut self, id: SequenceId) {
        let sequence = self.sequences.get_mut(&id).expect("just accepted");
        let Some(finish) = sequence.finish() else {
            self.waiting.insert(id);
            return;
        };
        if let Some(event) = sequence.on_start.take() {
            sequence.send(event);
        }
        self.end(id, Event::Finished(finish));
    }

    fn require(&self, role: Role, what: &str) -> Result<(), Refused> {
        if self.config.role == role || self.config.role == Role::Both {
            return Ok(());
        }
        Err(Refused::Invalid(format!("this engine's role is {:?}: it takes no {what}", self.config.role)))
    }

    fn require_queue(&self) -> Result<(), Refused> {
        if self.waiting.len() < self.config.waiting_limit {
            return Ok(());
        }
        Err(Refused::Full(format!("{} sequences are waiting already", self.waiting.len())))
    }

    /// There must be room for the known tokens and one more, were it alone.
    fn require_fit(&self, tokens: usize) -> Result<(), Refused> {
        let limit = self.limits.max_context as usize;
        if tokens < limit {
            return Ok(());
        }
        let pool = self.pool.counts().total as usize * self.block_tokens;
        let what = if limit == pool { "what the block pool holds" } else { "the model's context" };
        Err(Refused::TooLong { tokens: tokens + 1, limit, what })
    }

    fn require_reservable(&self, blocks: usize) -> Result<(), Refused> {
        let reserved = self.reserved.len();
        if self.free_slots.len() <= reserved {
            return Err(Refused::Full(format!("all {} sequences are in use", self.limits.max_sequences)));
        }
        let held: usize = self.reserved.iter().map(|id| self.sequences[id].blocks.len()).sum();
        let share = self.config.max_reserved_share * self.pool.counts().total as f32;
        if reserved > 0 && (held + blocks) as f32 > share {
            return Err(Refused::Full(format!(
                "{reserved} reservations hold {held} blocks, {blocks} more exceed the reservable share of {share}"
            )));
        }
        Ok(())
    }

    /// Everything that could make the model index outside its tables.
    fn validate(&self, spec: &SequenceSpec) -> Result<(), Refused> {
        let vocab = self.limits.vocab_size;
        if spec.prompt_len == 0 || spec.prompt_len > spec.tokens.len() {
            let (prompt, tokens) = (spec.prompt_len, spec.tokens.len());
            return Err(Refused::Invalid(format!(
                "a prompt of {prompt} tokens among {tokens}; expected at least one"
            )));
        }
        if spec.max_tokens == 0 {
            return Err(Refused::Invalid("max_tokens is 0; expected at least 1".to_owned()));
        }
        let biased = spec.sampling.logit_bias.iter().map(|(id, _)| id);
        let ids = spec.tokens.iter().chain(&spec.forced).chain(&spec.sampling.suppress).chain(biased);
        match ids.copied().find(|&id| id >= vocab) {
            Some(id) => Err(Refused::Invalid(format!("token id {id} is outside the vocabulary of {vocab}"))),
            None => Ok(()),
        }
    }
}
