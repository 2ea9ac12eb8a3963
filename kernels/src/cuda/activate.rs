//! Launchers of `kernels/cuda/activate.cu`.

use super::device::{Address, Args, Device, Grid};
use crate::Error;

pub(super) const KERNELS: &[&str] = &["quantize", "silu_mul_quantize", "silu_mul", "gather"];

/// Warps of a block, and channels that one has at a time.
const WARPS: u32 = 4;
const CHANNELS: u32 = 256;
/// From so many rows on, a block takes a whole row.
const MANY_ROWS: u32 = 4096;

/// `*count × per` rows, at most `most`.
#[derive(Clone, Copy)]
pub struct Rows {
    /// u32 on the device.
    pub count: Address,
    pub per: u32,
    pub most: u32,
}

/// bf16 rows, `stride` elements apart.
#[derive(Clone, Copy)]
pub struct Source {
    pub values: Address,
    pub stride: u32,
    /// u32: the row that each is taken from; as they are if absent.
    pub row_at: Option<Address>,
}

/// e4m3 rows `[rows][k]` and their scales.
#[derive(Clone, Copy)]
pub struct Quantised {
    pub values: Address,
    pub scales: RowScales,
}

/// f32, `[ceil(k / 128)][pitch]`: a scale of each row for every 128 channels. The pitch is a multiple of 4, not less than the rows.
#[derive(Clone, Copy)]
pub struct RowScales {
    pub values: Address,
    pub pitch: u32,
}

impl RowScales {
    /// The pitch that so many rows need.
    pub fn pitch(rows: u32) -> u32 {
        rows.next_multiple_of(4)
    }
}

fn grid(rows: Rows, k: u32) -> Grid {
    let blocks = if rows.most >= MANY_ROWS { 1 } else { k.div_ceil(WARPS * CHANNELS) };
    Grid::new([rows.most, blocks, 1], 32 * WARPS)
}

fn launch(device: &Device, name: &str, rows: Rows, k: u32, args: Args) -> Result<(), Error> {
    match rows.most {
        0 => Ok(()),
        _ => device.launch(name, grid(rows, k), args),
    }
}

fn check_quantised(k: u32, stride: u32) -> Result<(), Error> {
    match k.is_multiple_of(16) && stride.is_multiple_of(8) {
        true => Ok(()),
        false => {
            Err(Error::Unsupported(format!("FP8 rows of {k} at stride {stride}: not multiples of 16 and 8")))
        }
    }
}

/// Rows of `k` channels to e4m3.
pub fn quantize(device: &Device, rows: Rows, x: Source, k: u32, to: Quantised) -> Result<(), Error> {
    check_quantised(k, x.stride)?;
    let args = Args::default().ptr(rows.count).u32(rows.per).ptr(x.row_at.unwrap_or(0)).ptr(x.values);
    launch(
        device,
        "quantize",
        rows,
        k,
        args.u32(x.stride).u32(k).ptr(to.values).ptr(to.scales.values).u32(to.scales.pitch),
    )
}

/// `silu(gate) ⊙ up` of rows `gate | up`, each `k` wide, rounded to bf16, to e4m3.
pub fn silu_mul_quantize(
    device: &Device,
    rows: Rows,
    both: Address,
    k: u32,
    to: Quantised,
) -> Result<(), Error> {
    check_quantised(k, k)?;
    let args = Args::default().ptr(rows.count).u32(rows.per).ptr(both).u32(k);
    let args = args.ptr(to.values).ptr(to.scales.values).u32(to.scales.pitch);
    launch(device, "silu_mul_quantize", rows, k, args)
}

/// `out = silu(gate) ⊙ up`, of rows `gate | up`, each `k` wide.
pub fn silu_mul(device: &Device, rows: Rows, both: Address, k: u32, out: Address) -> Result<(), Error> {
    if !k.is_multiple_of(8) {
        return Err(Error::Unsupported(format!("an MLP of width {k}: not a multiple of 8")));
    }
    let args = Args::default().ptr(rows.count).u32(rows.per).ptr(both).u32(k).ptr(out);
    launch(device, "silu_mul", rows, k, args)
}

/// Copies rows of `k` channels.
pub fn gather(device: &Device, rows: Rows, x: Source, k: u32, out: Address) -> Result<(), Error> {
    if !k.is_multiple_of(8) || !x.stride.is_multiple_of(8) {
        return Err(Error::Unsupported(format!("rows of {k} at stride {}: not multiples of 8", x.stride)));
    }
    let args = Args::default().ptr(rows.count).u32(rows.per).ptr(x.row_at.unwrap_or(0)).ptr(x.values);
    launch(device, "gather", rows, k, args.u32(x.stride).u32(k).ptr(out))
}
