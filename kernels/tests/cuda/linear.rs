//! Products in FP8 and bf16 at odd sizes, and the quantisation in front of them.

use crate::support::{self, assert_close};
use kernels::{
    Dtype, Scales, Tensor,
    cuda::{
        activate::{Quantised, RowScales, Rows, Source, gather, quantize},
        device::Device,
        linear::{Batch, Input, Matrix, Output, Runs, linear},
    },
};

/// FP8 bytes and block scales, and what they stand for.
pub struct Fp8 {
    pub bytes: Vec<u8>,
    pub scales: Vec<f32>,
    pub values: Vec<f32>,
}

impl Fp8 {
    pub fn random(n: usize, k: usize, seed: u64) -> Fp8 {
        // No NaN; small exponents, as trained weights have them.
        let byte = |x: &f32| (((x.abs() * 64.0) as u8) & 0x3f) | if *x < 0.0 { 0x80 } else { 0 };
        let bytes: Vec<u8> = support::random(n * k, seed).iter().map(byte).collect();
        let blocks = n.div_ceil(128) * k.div_ceil(128);
        let scales: Vec<f32> =
            support::random(blocks, seed + 1).iter().map(|x| 0.01 + x.abs() * 0.02).collect();
        let scale_bytes: Vec<u8> = scales.iter().flat_map(|x| x.to_le_bytes()).collect();
        let tensor = Tensor {
            name: "w",
            dtype: Dtype::F8E4m3,
            rows: n,
            cols: k,
            data: (&bytes).into(),
            scales: Some(Scales { bytes: &scale_bytes, block: [128, 128] }),
        };
        let values = tensor.to_f32().unwrap();
        Fp8 { bytes, scales, values }
    }
}

/// Rows as the quantising kernel leaves them, dequantised.
pub fn through_e4m3(x: &[f32], k: usize) -> Vec<f32> {
    let mut rounded = x.to_vec();
    for row in rounded.chunks_mut(k) {
        for group in row.chunks_mut(128) {
            let scale = group.iter().fold(1e-4f32, |largest, v| largest.max(v.abs())) / 448.0;
            group.iter_mut().for_each(|v| *v = scale * kernels::cpu::e4m3_round(*v / scale));
        }
    }
    rounded
}

/// `y[t] = W x[t]` in f64.
pub fn product(w: &[f32], x: &[f32], k: usize) -> Vec<f32> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    x.chunks_exact(k).flat_map(|x| w.chunks_exact(k).map(move |w| dot(w, x) as f32)).collect()
}

/// (rows, n, k): fewer rows than a tile, more than one tile, edges that do not divide.
/// tiles of which only a part has rows; k in parts by several blocks.
const SIZES: [(usize, usize, usize); 15] = [
    (1, 128, 128),
    (3, 576, 256),
    (17, 64, 384),
    (33, 192, 1536),
    (65, 832, 256),
    (130, 320, 512),
    (300, 128, 128),
    (5, 96, 208),
    (9, 160, 7168),
    (128, 256, 2048),
    (150, 384, 1024),
    (180, 136, 1024),
    (224, 128, 640),
    (64, 2112, 7168),
    (1, 131, 16384),
];
/// Columns between rows of y that must stay as they are.
const GAP: usize = 8;

fn run(
    device: &Device,
    fp8: Option<&Fp8>,
    w: &[f32],
    x: &[f32],
    (rows, n, k): (usize, usize, usize),
    f32: bool,
) -> Vec<f32> {
    let x_memory = support::upload_bf16(device, x);
    let count = support::upload_u32(device, &[rows as u32]);
    let weights = match fp8 {
        Some(fp8) => support::upload(device, &fp8.bytes),
        None => support::upload_bf16(device, w),
    };
    let w_scales = fp8.map(|fp8| support::upload_f32(device, &fp8.scales));
    let groups = k.div_ceil(128);
    let (q, q_scales) = (
        support::poisoned(device, rows * k),
        support::poisoned(device, 4 * rows.next_multiple_of(4) * groups),
    );
    let scales_at = RowScales { values: q_scales.address(), pitch: RowScales::pitch(rows as u32) };
    let k32 = k as u32;
    let all = Rows { count: count.address(), per: 1, most: rows as u32 };
    let source = Source { values: x_memory.address(), stride: k32, row_at: None };
    let to = Quantised { values: q.address(), scales: scales_at };
    quantize(device, all, source, k32, to).unwrap();
    let input = match fp8 {
        Some(_) => Input { values: q.address(), scales: Some(scales_at), stride: k32 },
        None => Input { values: x_memory.address(), scales: None, stride: k32 },
    };
    let y = support::poisoned(device, rows * (n + GAP) * if f32 { 4 } else { 2 });
    let matrix = Matrix {
        count: 1,
        weights: weights.address(),
        scales: w_scales.as_ref().map(|m| m.address()),
        n: n as u32,
        k: k32,
    };
    let output = Output { values: y.address(), stride: (n + GAP) as u32, f32 };
    let runs = Runs::Count { count: count.address(), most: rows as u32 };
    linear(device, matrix, input, output, runs, Batch::ONE).unwrap();
    let y = if f32 { support::download_f32(device, &y) } else { support::download_bf16(device, &y) };
    let (within, gaps): (Vec<_>, Vec<_>) = y.chunks_exact(n + GAP).map(|row| row.split_at(n)).unzip();
    assert!(gaps.concat().iter().all(|value| value.is_nan()), "values were written between rows");
    within.concat()
}

/// Launched for seven rows of which the step has none, and for none.
#[test]
fn linear_and_quantize_without_rows() {
    let Some(device) = support::device() else { return };
    let (count, x) = (
        support::upload_u32(&device, &[0]),
        support::upload_bf16(&device, &support::random_bf16(7 * 128, 1)),
    );
    let (y, q, scales) = (
        support::poisoned(&device, 7 * 128 * 2),
        support::poisoned(&device, 7 * 128),
        support::poisoned(&device, 8 * 4),
    );
    let matrix = Matrix { count: 1, weights: x.address(), scales: None, n: 7, k: 128 };
    let input = Input { values: x.address(), scales: None, stride: 128 };
    let output = Output { values: y.address(), stride: 128, f32: false };
    for most in [0, 7] {
        let runs = Runs::Count { count: count.address(), most };
        linear(&device, matrix, input, output, runs, Batch::ONE).unwrap();
        let rows = Rows { count: count.address(), per: 1, most };
        let scales_at = RowScales { values: scales.address(), pitch: 8 };
        let to = Quantised { values: q.address(), scales: scales_at };
        quantize(&device, rows, Source { values: x.address(), stride: 128, row_at: None }, 128, to).unwrap();
    }
    let written = [&y, &q, &scales].map(|memory| support::download(&device, memory)).concat();
    assert!(written.iter().all(|byte| *byte == 0xff), "rows beyond the step are not written");
}

#[test]
fn linear_fp8_with_block_scales() {
    let Some(device) = support::device() else { return };
    for (index, size @ (rows, n, k)) in SIZES.into_iter().enumerate() {
        let (w, x) = (Fp8::random(n, k, 10 + index as u64), support::random_bf16(rows * k, index as u64));
        let found = run(&device, Some(&w), &[], &x, size, false);
        assert_close(
            &found,
            &product(&w.values, &through_e4m3(&x, k), k),
            1e-2,
            &format!("linear_fp8, {size:?}"),
        );
    }
}

#[test]
fn linear_fp8_of_random_sizes() {
    let Some(device) = support::device() else { return };
    let mut below = support::dice(3);
    for seed in 0..40 {
        let size @ (rows, n, k) = (1 + below(280), 8 * (1 + below(80)), 16 * (1 + below(70)));
        let (w, x) = (Fp8::random(n, k, 400 + seed), support::random_bf16(rows * k, 500 + seed));
        let expected = product(&w.values, &through_e4m3(&x, k), k);
        assert_close(
            &run(&device, Some(&w), &[], &x, size, false),
            &expected,
            1e-2,
            &format!("linear_fp8, {size:?}"),
        );
    }
}

/// As many rows as a step has at most; some of them are compared.
#[test]
fn linear_fp8_of_16384_rows() {
    let Some(device) = support::device() else { return };
    let size @ (rows, n, k) = (16_384, 2112, 1536);
    let (w, x) = (Fp8::random(n, k, 91), support::random_bf16(rows * k, 92));
    let found = run(&device, Some(&w), &[], &x, size, false);
    assert!(found.iter().all(|value| value.is_finite()), "every row is written");
    for row in support::sampled(rows) {
        let expected = product(&w.values, &through_e4m3(&x[row * k..][..k], k), k);
        assert_close(&found[row * n..][..n], &expected, 1e-2, &format!("linear_fp8, {size:?}, row {row}"));
    }
}

#[test]
fn linear_bf16_to_bf16_and_to_f32() {
    let Some(device) = support::device() else { return };
    for (index, size @ (rows, n, k)) in SIZES.into_iter().enumerate() {
        let (w, x) =
            (support::random_bf16(n * k, 30 + index as u64), support::random_bf16(rows * k, index as u64));
        let expected = product(&w, &x, k);
        let found = run(&device, None, &w, &x, size, false);
        assert_close(&found, &expected, 1e-2, &format!("linear_bf16, {size:?}"));
        let found = run(&device, None, &w, &x, size, true);
        assert_close(&found, &expected, 1e-4, &format!("linear_bf16_f32, {size:?}"));
    }
}

/// A matrix for each head, inputs and outputs interleaved by head, as the absorbed form has them; of gathered rows.
#[test]
fn linear_batched_and_gathered() {
    let Some(device) = support::device() else { return };
    let (rows, heads, n, k) = (5usize, 3usize, 512usize, 128usize);
    let w = support::random_bf16(heads * n * k, 50);
    let x = support::random_bf16(9 * heads * k, 51);
    let row_at: Vec<u32> = vec![8, 0, 3, 3, 5];
    let [w_at, x_at] = [&w, &x].map(|values| support::upload_bf16(&device, values));
    let count = support::upload_u32(&device, &[rows as u32]);
    let row_at_memory = support::upload_u32(&device, &row_at);
    let stride = (heads * k) as u32;
    let gathered = support::poisoned(&device, 7 * heads * k * 2);
    let source = Source { values: x_at.address(), stride, row_at: Some(row_at_memory.address()) };
    let all = Rows { count: count.address(), per: 1, most: 7 };
    gather(&device, all, source, stride, gathered.address()).unwrap();
    let y = support::poisoned(&device, rows * heads * n * 2);
    let matrix =
        Matrix { count: heads as u32, weights: w_at.address(), scales: None, n: n as u32, k: k as u32 };
    let input = Input { values: gathered.address(), scales: None, stride };
    let output = Output { values: y.address(), stride: (heads * n) as u32, f32: false };
    let runs = Runs::Count { count: count.address(), most: 7 };
    let batch = Batch { count: heads as u32, input: k as u32, output: n as u32 };
    linear(&device, matrix, input, output, runs, batch).unwrap();
    let mut expected = vec![0.0; rows * heads * n];
    for (row, from) in row_at.iter().enumerate() {
        for head in 0..heads {
            let x = &x[(*from as usize * heads + head) * k..][..k];
            let y = product(&w[head * n * k..][..n * k], x, k);
            expected[(row * heads + head) * n..][..n].copy_from_slice(&y);
        }
    }
    assert_close(&support::download_bf16(&device, &y), &expected, 1e-2, "linear, batched and gathered");
}
