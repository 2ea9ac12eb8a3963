//! Launchers of `cuda/direct.cu`: attention over keys and values made from the whole context of one entry.

use super::{
    attention::expect,
    device::{Address, Args, Device, Grid, TensorMap},
};
use crate::Error;

pub(super) const KERNELS: &[&str] = &["attend_direct"];

/// Columns of a head's key without position, and of its value; of its key's part with position.
const HEAD: u32 = 128;
const ROPE: u32 = 64;
const QUERY: u32 = HEAD + ROPE;
/// Queries of a block, and keys of a tile.
const TILE: u32 = 128;
const THREADS: u32 = 256 + 128;
/// Shared memory of a block: queries, and two tiles of keys and values, from a multiple of 1024 on.
const SHARED: u32 = 2 * TILE * (QUERY + 2 * (QUERY + HEAD)) + 1024;

/// Consecutive rows of one entry, as the host knows them: a step that takes the direct form is never
/// recorded.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    pub first_row: u32,
    pub rows: u32,
    /// Position of the first row.
    pub start: u32,
}

/// Heads that keys and values were made for, of all heads of the queries: a long context is done some heads
/// at a time.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub first: u32,
    pub count: u32,
    pub all: u32,
}

/// `query` bf16 `[step rows][all][nope + rope]`, rotated; `k` and `v` bf16 `[start + rows][count][128]`,
/// `rope` bf16 `[start + rows][64]`; `out` bf16 `[step rows][all][128]`, of which the rows of `span` and the
/// heads are written.
#[allow(clippy::too_many_arguments)]
pub fn attend_direct(
    device: &Device,
    span: Span,
    heads: Heads,
    query: Address,
    k: Address,
    v: Address,
    rope: Address,
    scale: f32,
    out: Address,
) -> Result<(), Error> {
    if span.rows == 0 {
        return Ok(());
    }
    let (context, width) = (span.start + span.rows, heads.count * HEAD * 2);
    let row = u64::from(heads.all) * u64::from(span.first_row);
    let query = query + row * u64::from(2 * QUERY);
    let stride = heads.all * QUERY * 2;
    let query = TensorMap::rows(query, [span.rows, stride], stride, TILE)?;
    let [k, v] = [k, v].map(|of| TensorMap::rows(of, [context, width], width, TILE));
    let rope = TensorMap::rows(rope, [context, ROPE * 2], ROPE * 2, TILE)?;
    let args = Args::default().map(&query).map(&k?).map(&rope).map(&v?).u32(span.rows).u32(span.start);
    let args = args.u32(heads.first).u32(heads.all).f32(scale).ptr(out + row * u64::from(2 * HEAD));
    let grid = Grid::new([span.rows.div_ceil(TILE), heads.count, 1], THREADS).shared(SHARED);
    device.launch("attend_direct", grid, args)
}

/// Whether the direct form has kernels for a head of these sizes.
pub fn check_direct(nope: u32, value: u32) -> Result<(), Error> {
    expect("qk_nope_head_dim", nope, HEAD)?;
    expect("v_head_dim", value, HEAD)
}
