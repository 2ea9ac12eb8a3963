//! Launchers of `cuda/attention.cu`: attention over the paged cache in the latent space (absorbed), and what the direct form
//! needs of it.

use super::{
    device::{Address, Args, Device, Grid, TensorMap},
    elementwise::PoolLayer,
    step::{Extent, StepAddresses},
};
use crate::Error;

/// `cuda/absorbed.cu`.
pub(super) const ABSORBED_KERNELS: &[&str] = &["attend_absorbed_64"];

pub(super) const KERNELS: &[&str] =
    &["attend_absorbed_16", "attend_absorbed_32", "attend_combine", "gather_context"];

/// Sizes that the kernels are compiled for.
const LATENT: u32 = 512;
const ROPE: u32 = 64;
const WIDTH: u32 = LATENT + ROPE;
const TILE: u32 = 64;
/// As in `splits.cuh`: positions of a split.
const SHORTEST_SPLIT: u32 = 128;
const LONGEST_SPLIT: u32 = 4096;
/// Splits that a launch makes at most, over all its rows, to give every multiprocessor work.
const MOST_WANTED: u32 = 256;
/// Partial results of one launch take at most this much, if one row's do: steps of more rows take several
/// launches.
const SCRATCH_BYTES: usize = 512 << 20;
/// Blocks of a grid in its second and third dimension.
const LARGEST_GRID: usize = 65_535;

/// Bytes of scratch memory for [`attend_absorbed`] in steps of at most `max_rows`.
pub fn absorbed_scratch_bytes(heads: u32, max_context: u32, max_rows: u32) -> usize {
    let longest = max_rows as usize * longest_splits(max_context) as usize;
    let parts = longest.max(MOST_WANTED as usize) * part_bytes(heads);
    let row = longest_splits(max_context).max(MOST_WANTED) as usize * part_bytes(heads);
    parts.min(SCRATCH_BYTES).max(row)
}

/// `out[t][head] = Σ_j softmax(scale · q · cache_j)_j latent_j` over the positions up to the row's own.
/// `query` bf16 `[rows][heads][latent + rope]`, `out` bf16 `[rows][heads][latent]`, `scratch` of
/// [`absorbed_scratch_bytes`] for the same heads and context and at least as many rows. Splits of a context
/// depend on its length and on the number of rows in the launch.
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
    let groups = heads.div_ceil(64);
    let wanted = (device.multiprocessors.min(MOST_WANTED) / (extent.rows * groups).max(1)).max(1);
    let splits = wanted.max(longest_splits(max_context)).min(max_context.div_ceil(SHORTEST_SPLIT)).max(1);
    let per_launch = SCRATCH_BYTES / (splits as usize * part_bytes(heads));
    let per_launch = per_launch.clamp(1, LARGEST_GRID) as u32;
    for first in (0..extent.rows).step_by(per_launch as usize) {
        let rows = per_launch.min(extent.rows - first);
        let lse = scratch + u64::from(rows) * u64::from(splits * heads) * u64::from(LATENT) * 4;
        let args = match heads {
            ..=32 => Args::default(),
            _ => maps(query, pool, extent.rows * heads)?,
        };
        let args = args.ptr(step.counts).ptr(step.positions).ptr(step.entry_of_row).ptr(step.block_table);
        let args = args.u32(step.max_blocks);
        let args = if heads <= 32 { args.ptr(query).ptr(pool.pool) } else { args };
        let args = args.u32(pool.layers).u32(pool.layer).u32(heads).f32(scale).u32(first).u32(wanted);
        let (name, grid) = absorbed_kernel(heads, splits, rows);
        device.launch(name, grid, args.ptr(scratch).ptr(lse).ptr(out))?;
        if splits > 1 {
            let args = Args::default().ptr(step.counts).ptr(step.positions).u32(heads).u32(first);
            let args = args.u32(splits).u32(wanted).ptr(scratch).ptr(lse).ptr(out);
            device.launch("attend_combine", Grid::new([heads, rows, 1], 128), args)?;
        }
    }
    Ok(())
}

/// The kernel for so many heads. Shared memory: queries, two tiles of the cache; below 64 heads also probabilities, maxima and
/// sums of 128 (row, warp) pairs, else those of 64 heads, and what begins at a multiple of 1024.
fn absorbed_kernel(heads: u32, splits: u32, rows: u32) -> (&'static str, Grid) {
    let few = |tile| 2 * (tile * WIDTH + 2 * TILE * WIDTH + tile * TILE) + 2 * 128 * 4;
    let (name, tile, threads, shared) = match heads {
        ..=16 => ("attend_absorbed_16", 16, 256, few(16)),
        17..=32 => ("attend_absorbed_32", 32, 256, few(32)),
        _ => {
            let probabilities = 2 * 64 * (TILE + 8) + 2 * 64 * 4;
            ("attend_absorbed_64", 64, 256 + 128, 2 * 3 * TILE * WIDTH + probabilities + 1024)
        }
    };
    (name, Grid::new([heads.div_ceil(tile), splits, rows], threads).shared(shared))
}

/// Queries of so many (row, head) pairs, and the rows of the pool: how many there are is for the block tables to know.
fn maps(query: Address, pool: &PoolLayer, queries: u32) -> Result<Args, Error> {
    let query = TensorMap::rows(query, [queries, 2 * WIDTH], 2 * WIDTH, TILE)?;
    let pool = TensorMap::rows(pool.pool, [i32::MAX as u32, 2 * WIDTH], 2 * WIDTH, TILE)?;
    Ok(Args::default().map(&query).map(&pool))
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

/// Splits of the longest context that has more than are wanted.
fn longest_splits(max_context: u32) -> u32 {
    max_context.div_ceil(LONGEST_SPLIT).max(1)
}

/// A split's partial sums and their weights.
fn part_bytes(heads: u32) -> usize {
    (heads * (LATENT + 1) * 4) as usize
}
