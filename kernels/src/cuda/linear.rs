//! Launchers of `kernels/cuda/linear.cu`.

use super::{
    activate::RowScales,
    device::{Address, Args, Device, Grid, TensorMap},
};
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
];

/// Rows of a weight matrix that one block computes, and the bytes of k that it has of each in a stage.
const WEIGHT_ROWS: u32 = 128;
const CHUNK: u32 = 128;
/// Floats between the scales of a stage that one of four lanes reads and those of the next lane.
const SCALED_PITCH: u32 = 36;
/// Blocks that may share a tile, each with a part of k: a cluster of Hopper's portable size.
const MOST_SPLITS: u32 = 8;
/// A block has at least so many stages of k.
const LEAST_CHUNKS: u32 = 4;

/// Scales of rows that are fetched for a tile: from the last that begins at 16 bytes on.
fn scales_box(tokens: u32) -> u32 {
    tokens + 4
}

/// Results of a tile of many rows on their way out: 64 columns of bf16 and 16 bytes for each warpgroup's 128 rows.
fn results_bytes(tokens: u32) -> u32 {
    if tokens == 128 { 2 * 128 * (64 * 2 + 16) } else { 0 }
}

/// Shared memory of a block: stages of rows, scales, results; and what aligning the stages to 1024 may take.
fn ring_bytes(tokens: u32) -> u32 {
    let stages = match tokens {
        ..=32 => 4,
        33..=64 => 8,
        _ => 5,
    };
    let scaled = if tokens == 128 { 4 * SCALED_PITCH } else { 0 };
    let scales = scales_box(tokens).next_multiple_of(32) + scaled;
    let stage = (WEIGHT_ROWS + tokens) * CHUNK + 4 * scales;
    stages * stage + results_bytes(tokens) + 1024
}

/// Threads of a block: two warpgroups multiply; a warp loads, or a warpgroup that gives its registers away.
fn threads(tokens: u32) -> u32 {
    256 + if tokens == 128 { 128 } else { 32 }
}

/// Blocks that run at once on a multiprocessor.
fn resident(tokens: u32) -> u32 {
    match tokens {
        ..=16 => 3,
        17..=32 => 2,
        _ => 1,
    }
}

/// Parts of k for so many tiles: as many as have blocks that run at once.
fn splits(at_once: u32, works: u32, chunks: u32) -> u32 {
    let most = (at_once / works).min(chunks / LEAST_CHUNKS).clamp(1, MOST_SPLITS);
    1 << most.ilog2()
}

/// Input rows of a tile: the least that holds the rows one matrix gets.
pub fn tile(rows: u32) -> u32 {
    rows.next_power_of_two().clamp(8, 128)
}

/// `count` matrices `[n][k]` on the device, one after the other; FP8 if they have scales.
#[derive(Clone, Copy)]
pub struct Matrix {
    pub count: u32,
    pub weights: Address,
    pub scales: Option<Address>,
    pub n: u32,
    pub k: u32,
}

/// Rows of width k, `stride` elements apart: bf16, or e4m3 with scales.
#[derive(Clone, Copy)]
pub struct Input {
    pub values: Address,
    pub scales: Option<RowScales>,
    pub stride: u32,
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
    /// Tiles of `tokens` rows on the device, each of one matrix of several; how many there are, at most `most`, over
    /// at most `rows` rows.
    Tiles { count: Address, tiles: Address, tokens: u32, most: u32, rows: u32 },
}

/// As many products at once, of matrices that follow each other; inputs and outputs lie so many elements apart in their rows.
#[derive(Clone, Copy)]
pub struct Batch {
    pub count: u32,
    pub input: u32,
    pub output: u32,
}

impl Batch {
    pub const ONE: Batch = Batch { count: 1, input: 0, output: 0 };
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
    let (k_bytes, stride_bytes) = (matrix.k * element, input.stride * element);
    if !k_bytes.is_multiple_of(16) || !stride_bytes.is_multiple_of(16) {
        let (k, stride) = (matrix.k, input.stride);
        return Err(Error::Unsupported(format!("k {k} at stride {stride}: rows must begin at 16 bytes")));
    }
    let (count, tiles, tokens, runs, rows) = match runs {
        Runs::Count { count, most } => (count, 0, tile(most), most.div_ceil(tile(most)), most),
        Runs::Tiles { count, tiles, tokens, most, rows } => (count, tiles, tokens, most, rows),
    };
    if runs == 0 {
        return Ok(());
    }
    let family = match (matrix.scales, output.f32) {
        (Some(_), false) => "linear_fp8",
        (None, false) => "linear_bf16",
        (None, true) => "linear_bf16_f32",
        (Some(_), true) => return Err(Error::Unsupported("FP8 weights with f32 results".to_string())),
    };
    let works = matrix.n.div_ceil(WEIGHT_ROWS) * runs * batch.count;
    let at_once = device.multiprocessors * resident(tokens);
    let splits = splits(at_once, works, k_bytes.div_ceil(CHUNK));
    let width = if batch.count == 1 { k_bytes } else { stride_bytes };
    let weights = TensorMap::rows(matrix.weights, [matrix.count * matrix.n, k_bytes], k_bytes, WEIGHT_ROWS)?;
    let inputs = TensorMap::rows(input.values, [rows, width], stride_bytes, tokens)?;
    let scales = match input.scales {
        Some(of) => {
            TensorMap::floats(of.values, [matrix.k.div_ceil(128), rows], of.pitch, scales_box(tokens))?
        }
        None => inputs,
    };
    let args = Args::default().map(&weights).map(&inputs).map(&scales);
    let args = args.ptr(matrix.scales.unwrap_or(0)).ptr(count).ptr(tiles);
    let args = args.ptr(output.values).u32(matrix.n).u32(matrix.k).u32(output.stride);
    let args = args.u32(batch.count).u32(batch.input * element).u32(batch.output).u32(splits);
    let blocks = if splits > 1 { works * splits } else { works.min(at_once) };
    let grid = Grid::new([blocks, 1, 1], threads(tokens)).shared(ring_bytes(tokens)).clusters_of(splits);
    device.launch(&format!("{family}_{tokens}"), grid, args)
}
