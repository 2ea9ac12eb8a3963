//! Launchers of `cuda/attention.cu`: attention over the paged cache in the latent space (absorbed), and what the direct form
//! needs of it.

use super::{
    device::{Address, Args, Device, Grid},
    elementwise::PoolLayer,
    step::{Extent, StepAddresses},
};
use crate::Error;

pub(super) const KERNELS: &[&str] =
    &["attend_absorbed_16", "attend_absorbed_32", "attend_absorbed_64", "attend_combine", "gather_context"];

/// Sizes that the kernels are compiled for.
const LATENT: u32 = 512;
const ROPE: u32 = 64;
const WIDTH: u32 = LATENT + ROPE;
const TILE: u32 = 64;
/// Positions of a split of a short context; of longer ones there are at most `MAX_SPLITS`.
const SPLIT: u32 = 512;
const MAX_SPLITS: u32 = 32;
/// Partial results of one launch take at most this much, if one row's do: steps of more rows take several
/// launches.
const SCRATCH_BYTES: usize = 512 << 20;
/// Blocks of a grid in its second and third dimension.
const LARGEST_GRID: usize = 65_535;

/// Bytes of scratch memory for [`attend_absorbed`] in steps of at most `max_rows`.
pub fn absorbed_scratch_bytes(heads: u32, max_context: u32, max_rows: u32) -> usize {
    let rows = rows_per_launch(heads, max_context).min(max_rows);
    rows as usize * row_bytes(heads, max_context)
}

/// `out[t][head] = Σ_j softmax(scale · q · cache_j)_j latent_j` over the positions up to the row's own.
/// `query` bf16 `[rows][heads][latent + rope]`, `out` bf16 `[rows][heads][latent]`, `scratch` of
/// [`absorbed_scratch_bytes`] for the same heads and context and at least as many rows. Splits of a context
/// depend on nothing but its length.
#[allow(clippy::too_many_arguments)]
pub fn attend_absorbed(
    device: &Device,
    step: &StepAddresses,
    extent: &Extent,
    query: Address,
    pool: &PoolLayer,
    heads: u32,
    max_context: u32,
    scale: f32,
    scratch: Address,
    out: Address,
) -> Result<(), Error> {
    check(pool)?;
    let (per_launch, splits) = (rows_per_launch(heads, max_context), max_splits(max_context));
    let (name, tile) = match heads {
        0..=16 => ("attend_absorbed_16", 16),
        17..=32 => ("attend_absorbed_32", 32),
        _ => ("attend_absorbed_64", 64),
    };
    // Queries, two tiles of the cache, probabilities; maxima and sums of 128 (row, warp) pairs.
    let shared = 2 * (tile * WIDTH + 2 * TILE * WIDTH + tile * TILE) + 2 * 128 * 4;
    for first in (0..extent.rows).step_by(per_launch as usize) {
        let rows = per_launch.min(extent.rows - first);
        let lse = scratch + u64::from(rows) * u64::from(splits * heads) * u64::from(LATENT) * 4;
        let args = Args::default().ptr(step.counts).ptr(step.positions).ptr(step.entry_of_row);
        let args = args.ptr(step.block_table).u32(step.max_blocks).ptr(query).ptr(pool.pool);
        let args = args.u32(pool.layers).u32(pool.layer).u32(heads).f32(scale).u32(first).u32(splits);
        let grid = Grid::new([heads.div_ceil(tile), splits, rows], 256).shared(shared);
        device.launch(name, grid, args.ptr(scratch).ptr(lse).ptr(out))?;
        if splits > 1 {
            let args = Args::default().ptr(step.counts).ptr(step.positions).u32(heads).u32(first);
            let args = args.u32(splits).ptr(scratch).ptr(lse).ptr(out);
            device.launch("attend_combine", Grid::new([heads, rows, 1], 128), args)?;
        }
    }
    Ok(())
}

/// Copies the first `context` cache rows of an entry to `latent`, bf16 `[context][512]`, and `rope`,
/// `[context][64]`. `entry` is its index in the step.
#[allow(clippy::too_many_arguments)]
pub fn gather_context(
    device: &Device,
    step: &StepAddresses,
    entry: u32,
    context: u32,
    pool: &PoolLayer,
    latent: Address,
    rope: Address,
) -> Result<(), Error> {
    check(pool)?;
    if context == 0 {
        return Ok(());
    }
    let table = step.block_table + 4 * u64::from(entry) * u64::from(step.max_blocks);
    let args = Args::default().ptr(table).ptr(pool.pool).u32(pool.layers).u32(pool.layer).u32(context);
    device.launch("gather_context", Grid::new([context.div_ceil(8), 1, 1], 256), args.ptr(latent).ptr(rope))
}

fn check(pool: &PoolLayer) -> Result<(), Error> {
    expect("kv_lora_rank", pool.latent, LATENT)?;
    expect("qk_rope_head_dim", pool.rope, ROPE)?;
    expect("block_tokens", pool.block_tokens, TILE)
}

pub(super) fn expect(field: &str, value: u32, supported: u32) -> Result<(), Error> {
    match value == supported {
        true => Ok(()),
        false => Err(Error::Unsupported(format!("{field} {value}: the CUDA kernels are for {supported}"))),
    }
}

/// Splits of the longest context.
fn max_splits(max_context: u32) -> u32 {
    max_context.div_ceil(SPLIT).clamp(1, MAX_SPLITS)
}

/// Partial sums and their weights.
fn row_bytes(heads: u32, max_context: u32) -> usize {
    (max_splits(max_context) * heads * (LATENT + 1) * 4) as usize
}

fn rows_per_launch(heads: u32, max_context: u32) -> u32 {
    (SCRATCH_BYTES / row_bytes(heads, max_context).max(1)).clamp(1, LARGEST_GRID) as u32
}
