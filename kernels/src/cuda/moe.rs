//! Launchers of `kernels/cuda/moe.cu`.

use super::{
    device::{Address, Args, Device, Grid},
    linear::Runs,
};
use crate::Error;

pub(super) const KERNELS: &[&str] = &["moe_count", "moe_tiles", "moe_place", "moe_place_few", "moe_combine"];

/// A tile on the device.
const TILE_BYTES: u32 = 16;
/// Experts that the block which lists tiles can take: four a thread.
const MOST_EXPERTS: u32 = 1024;
/// Slots that one block can place.
const FEW_SLOTS: u32 = 1024;

/// Where the copies of rows lie, by expert.
#[derive(Clone, Copy)]
pub struct Places {
    /// `[rows × top_k]` u32.
    pub place: Address,
    /// `[rows × top_k]` u32: the row at each place.
    pub row_at: Address,
    pub runs: Runs,
}

/// Most tiles that `slots` copies can make.
fn most_tiles(slots: u32, experts: u32, tokens: u32) -> u32 {
    slots.div_ceil(tokens) + experts.min(slots)
}

/// Bytes that [`place`] needs for at most `rows` rows, whatever the tile.
pub fn scratch_bytes(rows: u32, top_k: u32, experts: u32) -> usize {
    let slots = (rows * top_k) as usize;
    8 * slots
        + 8 * experts as usize
        + 8
        + TILE_BYTES as usize * most_tiles(rows * top_k, experts, 8) as usize
        + 64
}

/// Sorts the copies of rows by expert, in tiles of `tokens`. `counts[0]` rows, at most `rows`; `chosen` is `[rows][top_k]`.
#[allow(clippy::too_many_arguments)]
pub fn place(
    device: &Device,
    counts: Address,
    rows: u32,
    top_k: u32,
    experts: u32,
    tokens: u32,
    chosen: Address,
    scratch: Address,
) -> Result<Places, Error> {
    if experts > MOST_EXPERTS {
        return Err(Error::Unsupported(format!("{experts} routed experts: the CUDA kernels are for 1024")));
    }
    let slots = u64::from(rows * top_k);
    let tiles = scratch;
    let most = most_tiles(rows * top_k, experts, tokens);
    let place = tiles + u64::from(TILE_BYTES * most);
    let row_at = place + 4 * slots;
    let slots_of = row_at + 4 * slots;
    let first_of = slots_of + 4 * u64::from(experts);
    let tile_count = first_of + 4 * u64::from(experts);
    let args = Args::default().ptr(counts).u32(top_k).ptr(chosen);
    if rows * top_k <= FEW_SLOTS {
        let args = args.u32(tokens).ptr(place).ptr(row_at).ptr(tile_count).ptr(tiles);
        device.launch("moe_place_few", Grid::new([1, 1, 1], 1024), args)?;
    } else {
        device.launch("moe_count", Grid::new([experts, 1, 1], 256), args.ptr(slots_of))?;
        let args = Args::default().ptr(slots_of).u32(experts).u32(tokens).ptr(first_of).ptr(tile_count);
        device.launch("moe_tiles", Grid::new([1, 1, 1], 256), args.ptr(tiles))?;
        let args = Args::default().ptr(counts).u32(top_k).ptr(chosen).ptr(first_of).ptr(place).ptr(row_at);
        device.launch("moe_place", Grid::new([experts, 1, 1], 256), args)?;
    }
    Ok(Places {
        place,
        row_at,
        runs: Runs::Tiles { count: tile_count, tiles, tokens, most, rows: rows * top_k },
    })
}

/// `out[t] = Σ_slot weight · at[place[slot]] + shared[t]`, slots in the gate's order.
#[allow(clippy::too_many_arguments)]
pub fn combine(
    device: &Device,
    counts: Address,
    rows: u32,
    top_k: u32,
    at: Address,
    places: &Places,
    weights: Address,
    shared: Option<Address>,
    hidden: u32,
    out: Address,
) -> Result<(), Error> {
    let args = Args::default().ptr(counts).u32(top_k).ptr(at).ptr(places.place).ptr(weights);
    let args = args.ptr(shared.unwrap_or(0)).u32(hidden).ptr(out);
    match rows {
        0 => Ok(()),
        _ if !hidden.is_multiple_of(8) => {
            Err(Error::Unsupported(format!("hidden size {hidden}: not a multiple of 8")))
        }
        _ => device.launch("moe_combine", Grid::new([rows, hidden.div_ceil(1024), 1], 128), args),
    }
}
