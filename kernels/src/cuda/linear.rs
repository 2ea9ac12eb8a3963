//! Launchers of `kernels/cuda/linear.cu`.

use super::device::{Address, Args, Device, Grid};
use crate::Error;

pub(super) const KERNELS: &[&str] = &[
    "linear_fp8_8",
    "linear_fp8_16",
    "linear_fp8_32",
    "linear_fp8_64",
    "linear_fp8_128",
    "linear_bf16_8",
    "linear_bf16_16",
    "linear_bf16_32",
    "linear_bf16_64",
    "linear_bf16_128",
    "linear_bf16_f32_8",
    "linear_bf16_f32_16",
    "linear_bf16_f32_32",
    "linear_bf16_f32_64",
    "linear_bf16_f32_128",
    "quantize",
];

/// Rows of a weight matrix that one block computes, and the bytes of k and the padding that it holds of each.
const WEIGHT_ROWS: u32 = 64;
const PITCH: u32 = 144;

/// Shared memory of a block: stages of rows, then scales.
fn ring_bytes(tokens: u32) -> u32 {
    let stages = if tokens <= 32 { 8 } else { 4 };
    stages * ((WEIGHT_ROWS + tokens) * PITCH + 4 * tokens + 16)
}

/// Input rows a block computes: the least that holds the rows one matrix gets.
pub fn tile(rows: u32) -> u32 {
    rows.next_power_of_two().clamp(8, 128)
}

/// `[n][k]` on the device; FP8 if it has scales.
#[derive(Clone, Copy)]
pub struct Matrix {
    pub weights: Address,
    pub scales: Option<Address>,
    pub n: u32,
    pub k: u32,
}

/// Rows of width k, `stride` elements apart: bf16, or e4m3 with scales `[rows][ceil(k / 128)]`.
#[derive(Clone, Copy)]
pub struct Input {
    pub values: Address,
    pub scales: Option<Address>,
    pub stride: u32,
    /// u32: the input row that each output row comes from; as they are if absent.
    pub gather: Option<Address>,
}

/// Rows of width n, `stride` elements apart.
#[derive(Clone, Copy)]
pub struct Output {
    pub values: Address,
    pub stride: u32,
    pub f32: bool,
}

/// Which rows there are.
#[derive(Clone, Copy)]
pub enum Runs {
    /// u32 on the device: how many; at most `most`.
    Count { count: Address, most: u32 },
    /// Tiles of `tokens` rows on the device, each of one matrix of several; how many there are, at most `most`.
    Tiles { count: Address, tiles: Address, tokens: u32, most: u32 },
}

/// As many products at once, their parts so far from each other: bytes of weights and inputs, elements of outputs.
#[derive(Clone, Copy)]
pub struct Batch {
    pub count: u32,
    pub weights: u32,
    pub input: u32,
    pub output: u32,
}

impl Batch {
    pub const ONE: Batch = Batch { count: 1, weights: 0, input: 0, output: 0 };
}

/// `y[t] = W x[t]`.
pub fn linear(
    device: &Device,
    matrix: Matrix,
    input: Input,
    output: Output,
    runs: Runs,
    batch: Batch,
) -> Result<(), Error> {
    let element = if matrix.scales.is_some() { 1 } else { 2 };
    if !(matrix.k * element).is_multiple_of(16) || !(input.stride * element).is_multiple_of(16) {
        let (k, stride) = (matrix.k, input.stride);
        return Err(Error::Unsupported(format!("k {k} at stride {stride}: rows must begin at 16 bytes")));
    }
    let (count, tiles, tokens, runs) = match runs {
        Runs::Count { count, most } => (count, 0, tile(most), most.div_ceil(tile(most))),
        Runs::Tiles { count, tiles, tokens, most } => (count, tiles, tokens, most),
    };
    let family = match (matrix.scales, output.f32) {
        (Some(_), false) => "linear_fp8",
        (None, false) => "linear_bf16",
        (None, true) => "linear_bf16_f32",
        (Some(_), true) => return Err(Error::Unsupported("FP8 weights with f32 results".to_string())),
    };
    let args = Args::default()
        .ptr(matrix.weights)
        .ptr(matrix.scales.unwrap_or(0))
        .ptr(input.values)
        .ptr(input.scales.unwrap_or(0))
        .ptr(input.gather.unwrap_or(0))
        .ptr(count)
        .ptr(tiles)
        .ptr(output.values);
    let args = args.u32(matrix.n).u32(matrix.k).u32(input.stride).u32(output.stride);
    let args = args.u32(batch.weights).u32(batch.input).u32(batch.output);
    let grid = Grid::new([matrix.n.div_ceil(WEIGHT_ROWS), runs, batch.count], 128);
    match runs {
        0 => Ok(()),
        _ => device.launch(&format!("{family}_{tokens}"), grid.shared(ring_bytes(tokens)), args),
    }
}

/// bf16 rows, `stride` apart, to e4m3 rows and their scales. There are `*count × per` rows, at most `most`.
#[allow(clippy::too_many_arguments)]
pub fn quantize(
    device: &Device,
    count: Address,
    per: u32,
    most: u32,
    x: Address,
    stride: u32,
    k: u32,
    values: Address,
    scales: Address,
) -> Result<(), Error> {
    let args = Args::default().ptr(count).u32(per).ptr(x).u32(stride).u32(k).ptr(values).ptr(scales);
    if !k.is_multiple_of(16) || !stride.is_multiple_of(4) {
        return Err(Error::Unsupported(format!(
            "FP8 rows of {k} at stride {stride}: not multiples of 16 and 4"
        )));
    }
    match most {
        0 => Ok(()),
        _ => device.launch("quantize", Grid::new([most, k.div_ceil(4 * 128), 1], 128), args),
    }
}
