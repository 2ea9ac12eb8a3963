//! The metadata of a step in device memory, at addresses that never change, so that a recorded step can be replayed.
//! `kernels/cuda/step.cuh` is the same in device code.

use super::sample::SampleResult;
use super::{
    device::{Address, Device, Memory},
    direct::Span,
    host::Staging,
};
use crate::{Entry, EntryOutput, Error, Input, Shape, StepInput, WantedLogprob};

/// Where kernels find a step. Counts are read on the device: a launch may be larger than the step, and what is beyond its
/// rows, entries or samples does nothing.
#[derive(Clone, Copy, Debug)]
pub struct StepAddresses {
    /// `u32[4]`: rows, entries, entries that sample, 0.
    pub counts: Address,
    /// `[rows]` u32; [`SAMPLED`] until the step has begun: the last token of the slot.
    pub tokens: Address,
    /// `[rows]` u32.
    pub positions: Address,
    /// `[rows]` u32: the entry of a row.
    pub entry_of_row: Address,
    /// `[entries]` u32: first row.
    pub first_row: Address,
    /// `[entries]` u32: rows.
    pub row_count: Address,
    /// `[entries]` u32: position of the first row.
    pub start: Address,
    /// `[entries]` u32: positions up to the last row's.
    pub context: Address,
    /// `[entries]` u32.
    pub slot: Address,
    /// `[entries][max_blocks]` u32.
    pub block_table: Address,
    pub max_blocks: u32,
    /// `[samples]` u32: the entry that samples, ascending.
    pub sample_entry: Address,
    /// `[samples]` u32: the last row of that entry.
    pub sample_row: Address,
    /// `[max_context][rope / 2]` pairs of f32: cos, sin.
    pub angles: Address,
}

/// How much a launch must cover: those of the step, or of the recorded one that it is padded to.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    pub rows: u32,
    pub entries: u32,
    pub samples: u32,
    /// Every entry is one row.
    pub decode: bool,
}

/// Token of a row whose token is the last one sampled for its slot.
pub const SAMPLED: u32 = u32::MAX;

/// Rows of an entry from which on the direct form costs less: per position of the context, heads · 2 · (nope + value) ·
/// latent to make keys and values against heads · 2 · (2 · latent + rope − nope − rope − value) a row.
const DIRECT_ROWS: u32 = 171;

/// Batch sizes that decode steps are recorded for; a step runs as the least that holds it.
fn bucket(rows: u32) -> u32 {
    match rows {
        0..=8 => rows.next_power_of_two(),
        _ => rows.next_multiple_of(8),
    }
}

/// The resident memory of step metadata: arrays one after the other, each at its largest extent.
pub struct StepMemory {
    memory: Memory,
    _angles: Memory,
    pub addresses: StepAddresses,
    shape: Shape,
}

impl StepMemory {
    pub fn new(device: &Device, shape: &Shape) -> Result<StepMemory, Error> {
        let (rows, entries) = (u64::from(shape.max_step_tokens), u64::from(shape.max_sequences));
        let max_blocks = shape.max_context.div_ceil(shape.block_tokens);
        let words = 4 + 3 * rows + 7 * entries + entries * u64::from(max_blocks);
        let memory = device.alloc(4 * words as usize)?;
        let table = angle_table(shape);
        let angles = device.alloc(table.len())?;
        device.upload(&table, angles.address())?;
        device.synchronize()?;
        let mut next = memory.address();
        let mut take = |words: u64| {
            let address = next;
            next += 4 * words;
            address
        };
        let addresses = StepAddresses {
            counts: take(4),
            tokens: take(rows),
            positions: take(rows),
            entry_of_row: take(rows),
            first_row: take(entries),
            row_count: take(entries),
            start: take(entries),
            context: take(entries),
            slot: take(entries),
            sample_entry: take(entries),
            sample_row: take(entries),
            block_table: take(entries * u64::from(max_blocks)),
            max_blocks,
            angles: angles.address(),
        };
        Ok(StepMemory { memory, _angles: angles, addresses, shape: shape.clone() })
    }

    /// Bytes of host memory that one step takes on its way.
    pub fn staging_bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// Enqueues the copies that make `step` resident. `staging` is free again when the stream has passed them.
    pub fn upload(&self, device: &Device, step: &StepInput, staging: &mut Staging) -> Result<Extent, Error> {
        let rows = Rows::of(step);
        let at = &self.addresses;
        let samples = rows.sample_entry.len() as u32;
        let counts = [rows.tokens.len() as u32, step.entries.len() as u32, samples, 0];
        let columns = [
            (at.counts, counts.as_slice()),
            (at.tokens, &rows.tokens),
            (at.positions, &rows.positions),
            (at.entry_of_row, &rows.entry_of_row),
            (at.first_row, &rows.first_row),
            (at.row_count, &rows.row_count),
            (at.start, &rows.start),
            (at.context, &rows.context),
            (at.slot, &rows.slot),
            (at.sample_entry, &rows.sample_entry),
            (at.sample_row, &rows.sample_row),
        ];
        for (address, values) in columns {
            staging.send(device, values, address)?;
        }
        staging.send(device, &block_tables(&step.entries, at.max_blocks as usize), at.block_table)?;
        let decode = step.entries.iter().all(|entry| entry.len() == 1 && entry.prompt_logprobs.is_none());
        Ok(self.extent(counts[0], counts[1], samples, decode))
    }

    /// Entries that a decode step of `entries` is launched for.
    pub fn padded(&self, entries: u32) -> u32 {
        bucket(entries).min(self.shape.max_sequences).min(self.shape.max_step_tokens)
    }

    /// A decode step is launched as large as the record that it may be replayed from.
    fn extent(&self, rows: u32, entries: u32, samples: u32, decode: bool) -> Extent {
        if !decode {
            return Extent { rows, entries, samples, decode };
        }
        let padded = self.padded(entries);
        Extent { rows: padded, entries: padded, samples: padded, decode }
    }
}

/// The columns of a step.
#[derive(Default)]
struct Rows {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    entry_of_row: Vec<u32>,
    first_row: Vec<u32>,
    row_count: Vec<u32>,
    start: Vec<u32>,
    context: Vec<u32>,
    slot: Vec<u32>,
    sample_entry: Vec<u32>,
    sample_row: Vec<u32>,
}

impl Rows {
    fn of(step: &StepInput) -> Rows {
        let mut rows = Rows::default();
        for (index, entry) in step.entries.iter().enumerate() {
            rows.push(index as u32, entry);
        }
        rows
    }

    fn push(&mut self, index: u32, entry: &Entry) {
        let (first, count) = (self.tokens.len() as u32, entry.len() as u32);
        match &entry.input {
            Input::Tokens(tokens) => self.tokens.extend(tokens),
            Input::Sampled => self.tokens.push(SAMPLED),
        }
        self.positions.extend(entry.start..entry.start + count);
        self.entry_of_row.extend((0..count).map(|_| index));
        self.first_row.push(first);
        self.row_count.push(count);
        self.start.push(entry.start);
        self.context.push(entry.start + count);
        self.slot.push(entry.slot);
        if entry.sample {
            self.sample_entry.push(index);
            self.sample_row.push(first + count - 1);
        }
    }
}

fn block_tables(entries: &[Entry], max_blocks: usize) -> Vec<u32> {
    let mut tables = vec![0; entries.len() * max_blocks];
    for (entry, table) in entries.iter().zip(tables.chunks_exact_mut(max_blocks)) {
        let count = entry.block_table.len().min(max_blocks);
        table[..count].copy_from_slice(&entry.block_table[..count]);
    }
    tables
}

/// (cos, sin) of every position, computed in f64.
fn angle_table(shape: &Shape) -> Vec<u8> {
    let mut table = Vec::with_capacity(shape.max_context as usize * shape.rope as usize * 4);
    let mut row = Vec::new();
    for position in 0..shape.max_context {
        row.clear();
        crate::math::angles(position, &shape.rope_frequencies, shape.rope_amplitude, &mut row);
        table.extend(row.iter().flat_map(|(cos, sin)| [cos.to_le_bytes(), sin.to_le_bytes()]).flatten());
    }
    table
}

/// A step on the device, until its results are collected.
pub struct Step {
    pub(super) extent: Extent,
    /// Its place in the ring.
    pub(super) ring: usize,
    pub(super) entries: Vec<Placed>,
    pub(super) wanted: Vec<WantedLogprob>,
    /// u32 on the device: rows, targets and counts of `wanted`, then rows of each chunk of them.
    pub(super) wanted_at: Address,
}

pub(super) struct Placed {
    slot: u32,
    pub span: Span,
    sample: bool,
}

impl Placed {
    /// Positions up to the last row's, and so the position of the token after it.
    pub fn context(&self) -> u32 {
        self.span.start + self.span.rows
    }
}

impl Step {
    pub(super) fn new(step: &StepInput, extent: Extent, ring: usize, wanted_at: Address) -> Step {
        let mut first_row = 0;
        let placed = |entry: &Entry| {
            let span = Span { first_row, rows: entry.len() as u32, start: entry.start };
            first_row += span.rows;
            Placed { slot: entry.slot, span, sample: entry.sample }
        };
        Step {
            extent,
            ring,
            entries: step.entries.iter().map(placed).collect(),
            wanted: step.wanted_logprobs(),
            wanted_at,
        }
    }

    /// Whether rows attend in the direct form: where there are enough of them for each context that making keys and values of it
    /// costs less than the wider products of the absorbed form.
    pub(super) fn is_direct(&self) -> bool {
        !self.extent.decode && self.extent.rows >= DIRECT_ROWS * self.extent.entries
    }

    /// What [`Step::wanted_at`] holds, in chunks of `rows`.
    pub(super) fn wanted_words(&self, rows: usize) -> Vec<u32> {
        let column = |of: fn(&WantedLogprob) -> u32| self.wanted.iter().map(of);
        let mut words: Vec<u32> =
            column(|w| w.row).chain(column(|w| w.target)).chain(column(|w| w.top)).collect();
        words.extend(self.wanted.chunks(rows).map(|chunk| chunk.len() as u32));
        words
    }

    /// Results in the order of the entries: `sampled` of the i-th that samples, `prompt` of the i-th wanted.
    pub(super) fn outputs(
        self,
        sampled: impl Fn(usize) -> SampleResult,
        prompt: impl Fn(usize) -> SampleResult,
    ) -> Result<Vec<EntryOutput>, Error> {
        let mut outputs = vec![EntryOutput::default(); self.entries.len()];
        let sampling = self.entries.iter().zip(&mut outputs).filter(|(entry, _)| entry.sample);
        for (index, (entry, output)) in sampling.enumerate() {
            let (slot, position) = (entry.slot, entry.context());
            let token = sampled(index).sampled().ok_or(Error::NotFinite { slot, position })?;
            output.sampled = Some(token);
        }
        for (index, wanted) in self.wanted.iter().enumerate() {
            let (slot, position) = (self.entries[wanted.entry].slot, wanted.position);
            let found = prompt(index).sampled().and_then(|token| token.logprobs);
            let found = found.ok_or(Error::NotFinite { slot, position })?;
            outputs[wanted.entry].prompt_logprobs.push((position + 1, found));
        }
        Ok(outputs)
    }
}

/// What the host knows of slots without asking the device.
pub struct Known(Vec<Option<Sampled>>);

/// Whether an initialised slot has sampled, or will have by the time the next step runs.
type Sampled = bool;

impl Known {
    pub fn new(slots: u32) -> Known {
        Known(vec![None; slots as usize])
    }

    /// Refuses entries of slots that lack the state they need; otherwise notes what the step will leave.
    pub fn accept(&mut self, step: &StepInput) -> Result<(), Error> {
        let mut after = self.0.clone();
        step.init.iter().for_each(|init| after[init.slot as usize] = Some(false));
        for entry in &step.entries {
            let slot = entry.slot;
            let Some(sampled) = &mut after[slot as usize] else {
                return Err(Error::Step(format!("slot {slot} was never initialised")));
            };
            if entry.input == Input::Sampled && !*sampled {
                return Err(Error::Step(format!("slot {slot} has sampled nothing yet")));
            }
            *sampled |= entry.sample;
        }
        self.0 = after;
        Ok(())
    }
}
