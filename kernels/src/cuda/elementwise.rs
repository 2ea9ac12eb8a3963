//! Launchers of `cuda/elementwise.cu`: embedding, norm, rotation of queries, cache rows. One block of threads
//! per row.

use super::{
    device::{Address, Args, Device, Grid},
    step::{Extent, StepAddresses},
};
use crate::Error;

pub(super) const KERNELS: &[&str] = &["embed", "rms_norm", "rotate_query", "cache_write"];

const THREADS: u32 = 256;
/// Elements that are loaded together.
const VECTOR: u32 = 8;

/// `residual[t] = table[token[t]]`: `table` bf16 `[vocab][hidden]`, `residual` bf16 `[rows][hidden]`.
pub fn embed(
    device: &Device,
    step: &StepAddresses,
    extent: &Extent,
    table: Address,
    vocab: u32,
    hidden: u32,
    residual: Address,
) -> Result<(), Error> {
    multiple("hidden", hidden, VECTOR)?;
    let args = Args::default().ptr(step.counts).ptr(step.tokens).ptr(table).ptr(residual);
    launch(device, "embed", extent, args.u32(hidden).u32(vocab))
}

/// `residual += delta` if given, rounded to bf16; `out = norm(residual)`. bf16 `[rows][width]`, `weight` f32
/// `[width]`.
#[allow(clippy::too_many_arguments)]
pub fn rms_norm(
    device: &Device,
    step: &StepAddresses,
    extent: &Extent,
    residual: Address,
    delta: Option<Address>,
    weight: Address,
    eps: f32,
    width: u32,
    out: Address,
) -> Result<(), Error> {
    multiple("width of a norm", width, VECTOR)?;
    let args = Args::default().ptr(step.counts).ptr(residual).ptr(delta.unwrap_or(0)).ptr(weight);
    launch(device, "rms_norm", extent, args.f32(eps).ptr(out).u32(width))
}

/// Rotates the last `rope` elements of every head of `query`, bf16 `[rows][heads][nope + rope]`.
pub fn rotate_query(
    device: &Device,
    step: &StepAddresses,
    extent: &Extent,
    query: Address,
    heads: u32,
    nope: u32,
    rope: u32,
) -> Result<(), Error> {
    multiple("qk_nope_head_dim", nope, 2)?;
    multiple("qk_rope_head_dim", rope, 2)?;
    let args = Args::default().ptr(step.counts).ptr(step.positions).ptr(step.angles).ptr(query);
    launch(device, "rotate_query", extent, args.u32(heads).u32(nope).u32(rope))
}

/// The KV pool, bf16 `[block][layer][block_tokens][latent + rope]`, and a layer of it.
#[derive(Clone, Copy, Debug)]
pub struct PoolLayer {
    pub pool: Address,
    pub layers: u32,
    pub layer: u32,
    pub block_tokens: u32,
    pub latent: u32,
    pub rope: u32,
}

/// Low-rank query in the first `rank` columns: its norm's weight, f32 `[rank]`, and where the result goes,
/// bf16 `[rows][rank]`.
#[derive(Clone, Copy, Debug)]
pub struct LowQuery {
    pub rank: u32,
    pub norm: Address,
    pub normed: Address,
}

/// From `low`, bf16 `[rows][stride]` = query (if any) | latent | rotary key: writes the cache rows
/// `norm(latent) | rotate(key)` and the normed low-rank query. `kv_norm` f32 `[latent]`.
#[allow(clippy::too_many_arguments)]
pub fn cache_write(
    device: &Device,
    step: &StepAddresses,
    extent: &Extent,
    low: Address,
    stride: u32,
    query: Option<LowQuery>,
    kv_norm: Address,
    eps: f32,
    to: &PoolLayer,
) -> Result<(), Error> {
    let LowQuery { rank, norm, normed } = query.unwrap_or(LowQuery { rank: 0, norm: 0, normed: 0 });
    multiple("q_lora_rank", rank, 2)?;
    multiple("stride of the low rows", stride, 2)?;
    multiple("kv_lora_rank", to.latent, 2)?;
    multiple("qk_rope_head_dim", to.rope, 2)?;
    let args = Args::default().ptr(step.counts).ptr(step.positions).ptr(step.entry_of_row);
    let args = args.ptr(step.block_table).u32(step.max_blocks).ptr(step.angles);
    let args = args.ptr(low).u32(stride).u32(rank).ptr(norm).ptr(kv_norm).f32(eps).ptr(normed);
    let args = args.ptr(to.pool).u32(to.layers).u32(to.layer).u32(to.block_tokens);
    launch(device, "cache_write", extent, args.u32(to.latent).u32(to.rope))
}

fn launch(device: &Device, name: &str, extent: &Extent, args: Args) -> Result<(), Error> {
    match extent.rows {
        0 => Ok(()),
        rows => device.launch(name, Grid::new([rows, 1, 1], THREADS), args),
    }
}

fn multiple(field: &str, value: u32, of: u32) -> Result<(), Error> {
    match value.is_multiple_of(of) {
        true => Ok(()),
        false => Err(Error::Unsupported(format!("{field} {value}: the kernels need a multiple of {of}"))),
    }
}
