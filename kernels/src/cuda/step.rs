//! The metadata of a step in device memory, at addresses that never change, so that a recorded step can be replayed.
//! `kernels/cuda/step.cuh` is the same in device code.

use super::device::Address;

/// Where kernels find a step. Counts are read on the device: a launch may be larger than the step, and what is beyond its
/// rows, entries or samples does nothing.
#[derive(Clone, Copy, Debug)]
pub struct StepAddresses {
    /// `u32[4]`: rows, entries, entries that sample, 0.
    pub counts: Address,
    /// `[rows]` u32.
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
    /// `[entries]` u32.
    pub slot: Address,
    /// `[entries][max_blocks]` u32.
    pub block_table: Address,
    pub max_blocks: u32,
    /// `[samples]` u32: the entry that samples, ascending.
    pub sample_entry: Address,
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
