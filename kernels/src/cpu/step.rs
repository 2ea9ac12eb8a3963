//! A step on the CPU: the engine's request checked against the model's limits, and sampler state per slot.

use super::sample::{Count, History, Row};
use crate::{
    Entry, EntryOutput, Error, Input, SampledToken, Sampling, Shape, SlotInit, StepInput, WantedLogprob,
    check::check, math::angles,
};
use std::{ops::Range, sync::Arc};

/// A step being computed.
pub struct Step {
    /// Of every row.
    pub tokens: Vec<u32>,
    pub positions: Vec<u32>,
    /// (cos, sin) of every rotary pair of every row.
    pub angles: Vec<(f32, f32)>,
    pub entries: Vec<Placed>,
    pub wanted: Vec<WantedLogprob>,
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
        check(step, shape)?;
        step.init.iter().for_each(|init| self.slots[init.slot as usize] = Some(Slot::new(init)));
        let mut placed = Step {
            tokens: Vec::with_capacity(step.tokens()),
            positions: Vec::with_capacity(step.tokens()),
            angles: Vec::with_capacity(step.tokens() * shape.rope_frequencies.len()),
            entries: Vec::with_capacity(step.entries.len()),
            wanted: step.wanted_logprobs(),
            outputs: vec![EntryOutput::default(); step.entries.len()],
        };
        for entry in &step.entries {
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
