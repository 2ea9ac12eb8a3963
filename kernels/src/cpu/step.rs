//! A step on the CPU: the engine's request checked against the model's limits, and sampler state per slot.

use super::{
    elementwise::angles,
    sample::{Count, History, Row},
};
use crate::{
    Entry, EntryOutput, Error, Input, PromptLogprobs, SampledToken, Sampling, Shape, SlotInit, StepInput,
};
use std::{collections::HashSet, ops::Range, sync::Arc};

/// A step being computed.
pub struct Step {
    /// Of every row.
    pub tokens: Vec<u32>,
    pub positions: Vec<u32>,
    /// (cos, sin) of every rotary pair of every row.
    pub angles: Vec<(f32, f32)>,
    pub entries: Vec<Placed>,
    pub outputs: Vec<EntryOutput>,
}

/// An entry with its place in the step.
pub struct Placed {
    pub slot: u32,
    pub rows: Range<usize>,
    /// Position of the first row.
    pub start: u32,
    pub block_table: Vec<u32>,
    pub sample: bool,
    pub prompt_logprobs: Option<PromptLogprobs>,
}

impl Placed {
    /// Position of the token after the last row.
    pub fn next_position(&self) -> u32 {
        self.start + self.rows.len() as u32
    }
}

impl Step {
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Entries that sample, with their index.
    pub fn sampling(&self) -> impl Iterator<Item = (usize, &Placed)> {
        self.entries.iter().enumerate().filter(|(_, entry)| entry.sample)
    }
}

/// Sampler state of every slot.
pub struct Slots {
    slots: Vec<Option<Slot>>,
}

struct Slot {
    /// Sampled last.
    last: Option<u32>,
    prompt_len: u32,
    sampling: Arc<Sampling>,
    /// Kept only if a penalty is set.
    history: History,
}

impl Slots {
    pub fn new(count: u32) -> Slots {
        Slots { slots: (0..count).map(|_| None).collect() }
    }

    /// Checks `step`; if it is sound, initialises its slots and places its rows.
    pub fn accept(&mut self, step: &StepInput, shape: &Shape) -> Result<Step, Error> {
        check_extent(step, shape)?;
        step.init.iter().try_for_each(|init| check_init(init, shape))?;
        step.init.iter().for_each(|init| self.slots[init.slot as usize] = Some(Slot::new(init)));
        let mut placed = Step {
            tokens: Vec::with_capacity(step.tokens()),
            positions: Vec::with_capacity(step.tokens()),
            angles: Vec::with_capacity(step.tokens() * shape.rope_frequencies.len()),
            entries: Vec::with_capacity(step.entries.len()),
            outputs: vec![EntryOutput::default(); step.entries.len()],
        };
        let mut seen = HashSet::new();
        for entry in &step.entries {
            check_entry(entry, shape)?;
            if !seen.insert(entry.slot) {
                return Err(Error::Step(format!("slot {} appears twice", entry.slot)));
            }
            self.place(entry, shape, &mut placed)?;
        }
        Ok(placed)
    }

    fn place(&self, entry: &Entry, shape: &Shape, step: &mut Step) -> Result<(), Error> {
        let first = step.rows();
        match &entry.input {
            Input::Tokens(tokens) => step.tokens.extend(tokens),
            Input::Sampled => step.tokens.push(self.last(entry.slot)?),
        }
        for position in (entry.start..).take(entry.len()) {
            step.positions.push(position);
            angles(position, &shape.rope_frequencies, shape.rope_amplitude, &mut step.angles);
        }
        step.entries.push(Placed {
            slot: entry.slot,
            rows: first..step.rows(),
            start: entry.start,
            block_table: entry.block_table.clone(),
            sample: entry.sample,
            prompt_logprobs: entry.prompt_logprobs.clone(),
        });
        Ok(())
    }

    fn last(&self, slot: u32) -> Result<u32, Error> {
        let state = self.slot(slot)?;
        state.last.ok_or_else(|| Error::Step(format!("slot {slot} has sampled nothing yet")))
    }

    fn slot(&self, slot: u32) -> Result<&Slot, Error> {
        let state = self.slots.get(slot as usize).and_then(Option::as_ref);
        state.ok_or_else(|| Error::Step(format!("slot {slot} was never initialised")))
    }

    /// What the sampler needs to know about an entry, and its logits.
    pub fn row<'a>(
        &'a self,
        entry: &Placed,
        logits: &'a [f32],
        tokenizer_size: usize,
    ) -> Result<Row<'a>, Error> {
        let slot = self.slot(entry.slot)?;
        Ok(Row {
            logits,
            tokenizer_size,
            sampling: &slot.sampling,
            history: &slot.history,
            position: entry.next_position(),
            prompt_len: slot.prompt_len,
        })
    }

    /// Notes that `slot` has sampled `token`.
    pub fn sampled(&mut self, slot: u32, token: &SampledToken) {
        if let Some(Some(slot)) = self.slots.get_mut(slot as usize) {
            slot.last = Some(token.id);
            if slot.sampling.has_penalties() {
                slot.history.entry(token.id).or_default().output += 1;
            }
        }
    }
}

impl Slot {
    fn new(init: &SlotInit) -> Slot {
        let history = if init.sampling.has_penalties() { history(init) } else { History::new() };
        Slot { last: None, prompt_len: init.prompt_len, sampling: init.sampling.clone(), history }
    }
}

fn history(init: &SlotInit) -> History {
    let mut history = History::new();
    for (index, token) in init.tokens.iter().enumerate() {
        let count: &mut Count = history.entry(*token).or_default();
        match index < init.prompt_len as usize {
            true => count.in_prompt = true,
            false => count.output += 1,
        }
    }
    history
}

fn check_extent(step: &StepInput, shape: &Shape) -> Result<(), Error> {
    let (entries, tokens) = (step.entries.len(), step.tokens());
    if entries == 0 || entries > shape.max_sequences as usize {
        return Err(Error::Step(format!("{entries} entries, expected 1 to {}", shape.max_sequences)));
    }
    if tokens > shape.max_step_tokens as usize {
        return Err(Error::Step(format!("{tokens} tokens, expected at most {}", shape.max_step_tokens)));
    }
    Ok(())
}

fn check_init(init: &SlotInit, shape: &Shape) -> Result<(), Error> {
    if init.slot >= shape.max_sequences {
        return Err(Error::Step(format!("slot {} of {}", init.slot, shape.max_sequences)));
    }
    if init.prompt_len as usize > init.tokens.len() {
        return Err(Error::Step(format!("prompt of {} in {} tokens", init.prompt_len, init.tokens.len())));
    }
    init.sampling.check(shape.vocab).map_err(Error::Step)
}

fn check_entry(entry: &Entry, shape: &Shape) -> Result<(), Error> {
    let fail = |what: String| Err(Error::Step(format!("slot {}: {what}", entry.slot)));
    let end = entry.start as usize + entry.len();
    let needed = end.div_ceil(shape.block_tokens as usize);
    if entry.slot >= shape.max_sequences {
        return fail(format!("there are {} slots", shape.max_sequences));
    }
    if entry.is_empty() {
        return fail("no input".to_string());
    }
    if end > shape.max_context as usize {
        return fail(format!("{end} positions, the model is set up for {}", shape.max_context));
    }
    if entry.block_table.len() < needed {
        return fail(format!("{} blocks, {end} tokens need {needed}", entry.block_table.len()));
    }
    if let Some(block) = entry.block_table.iter().find(|block| **block >= shape.blocks) {
        return fail(format!("block {block} is outside the pool of {}", shape.blocks));
    }
    if let Input::Tokens(tokens) = &entry.input
        && let Some(token) = tokens.iter().find(|token| **token >= shape.vocab)
    {
        return fail(format!("token {token} is outside the vocabulary of {}", shape.vocab));
    }
    match &entry.prompt_logprobs {
        Some(p) if p.targets.len() != entry.len() => {
            fail(format!("{} targets of prompt logprobs for {} tokens", p.targets.len(), entry.len()))
        }
        Some(p) if p.targets.iter().flatten().any(|token| *token >= shape.vocab) => {
            fail("a target of prompt logprobs is outside the vocabulary".to_string())
        }
        _ => Ok(()),
    }
}
