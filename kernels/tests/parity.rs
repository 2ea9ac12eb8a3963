//! Operations compared: here the two forms of MLA attention and the rounding hooks on one CPU; a row for every device
//! kernel belongs here too, against the CPU on inputs rounded alike.

use kernels::{
    Backend, CpuBackend, Dtype, Entry, Input, MlaTensors, QueryTensors, Sampling, Scales, Shape, SlotInit,
    StepInput, Tensor, Weights,
    cpu::{CpuOptions, MlaForm, Rounding},
};
use std::sync::Arc;

const HIDDEN: usize = 96;
const HEADS: usize = 3;
const TOKENS: usize = 150;

/// The inner sizes of DeepSeek-V3 (`real`), or sizes that no vector width divides.
fn shape(real: bool) -> Shape {
    let (nope, rope, value, latent) = if real { (128, 64, 128, 512) } else { (20, 6, 18, 37) };
    Shape {
        layers: 2,
        vocab: 50,
        tokenizer_size: 50,
        hidden: HIDDEN as u32,
        heads: HEADS as u32,
        nope,
        rope,
        value,
        latent,
        softmax_scale: 1.0 / ((nope + rope) as f32).sqrt(),
        rope_frequencies: (0..rope / 2).map(|j| 0.8f64.powi(j as i32)).collect(),
        rope_amplitude: 1.0,
        block_tokens: 16,
        blocks: 40,
        max_sequences: 4,
        max_step_tokens: 256,
        max_context: 512,
    }
}

fn noise(count: usize, scale: f32, mut seed: u32) -> Vec<u8> {
    let mut next = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        scale * ((seed >> 8) as f32 / (1 << 23) as f32 - 1.0)
    };
    (0..count).flat_map(|_| next().to_le_bytes()).collect()
}

fn tensor<'a>(name: &'a str, rows: usize, cols: usize, bytes: &'a [u8]) -> Tensor<'a> {
    Tensor { name, dtype: Dtype::F32, rows, cols, data: bytes.into(), scales: None }
}

/// Attention of the second layer over a prompt, in two chunks.
fn attend(shape: &Shape, options: CpuOptions) -> Vec<f32> {
    let mut backend = CpuBackend::new(options).unwrap();
    backend.prepare(shape.clone()).unwrap();
    let (row, query) = (shape.row(), HEADS * shape.query());
    let value = HEADS * shape.value as usize;
    let kv_b = HEADS * (shape.nope + shape.value) as usize;
    let weight = |rows: usize, cols: usize, seed| noise(rows * cols, 2.0 / (cols as f32).sqrt(), seed);
    let (q, kv_a) = (weight(query, HIDDEN, 1), weight(row, HIDDEN, 2));
    let (norm, up) = (noise(shape.latent as usize, 1.5, 3), weight(kv_b, shape.latent as usize, 4));
    let mla = backend
        .load_mla(&MlaTensors {
            query: QueryTensors::Direct(tensor("q", query, HIDDEN, &q)),
            kv_a: tensor("kv_a", row, HIDDEN, &kv_a),
            kv_norm: tensor("kv_norm", 1, shape.latent as usize, &norm),
            kv_b: tensor("kv_b", kv_b, shape.latent as usize, &up),
            eps: 1e-6,
        })
        .unwrap();
    let embedding = noise(50 * HIDDEN, 1.0, 5);
    let table = backend.load_table(tensor("embedding", 50, HIDDEN, &embedding)).unwrap();
    let mut out = Vec::new();
    for chunk in [0..90, 90..TOKENS] {
        let step = backend.upload(&step(chunk.clone())).unwrap();
        let mut alloc = |width| backend.alloc(256, width).unwrap();
        let (mut x, mut q, mut o) = (alloc(HIDDEN), alloc(query), alloc(value));
        backend.embed(&step, &table, &mut x).unwrap();
        backend.mla_project(&step, 1, &x, &mla, &mut q).unwrap();
        backend.mla_attend(&step, 1, &q, &mla, &mut o).unwrap();
        out.extend_from_slice(&o.values()[..chunk.len() * value]);
    }
    out
}

fn step(range: std::ops::Range<usize>) -> StepInput {
    let tokens: Vec<u32> = range.clone().map(|i| (i * 7 % 50) as u32).collect();
    let block_table: Vec<u32> = (0..TOKENS.div_ceil(16) as u32).map(|i| (i * 11 + 3) % 40).collect();
    let init =
        SlotInit { slot: 2, tokens: [0].into(), prompt_len: 1, sampling: Arc::new(Sampling::default()) };
    let input = Input::Tokens(tokens);
    let entry = Entry {
        slot: 2,
        input,
        start: range.start as u32,
        block_table,
        sample: false,
        prompt_logprobs: None,
    };
    StepInput { init: vec![init], entries: vec![entry] }
}

/// Relative error in the Frobenius norm.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    difference / norm(&mut b.iter().map(|b| f64::from(*b)))
}

#[test]
fn the_absorbed_form_of_attention_agrees_with_the_direct_one() {
    for real in [true, false] {
        let shape = shape(real);
        let direct = attend(&shape, CpuOptions { form: MlaForm::Direct, ..CpuOptions::default() });
        let absorbed = attend(&shape, CpuOptions::default());
        let distance = distance(&absorbed, &direct);
        assert!(distance < 2e-6, "{distance:e}");
        assert!(direct.iter().any(|value| value.abs() > 0.05), "attention must not be trivial");
    }
}

#[test]
fn bf16_rounding_moves_attention_by_bf16_and_no_more() {
    let shape = shape(true);
    let exact = attend(&shape, CpuOptions::default());
    let rounded = attend(&shape, CpuOptions { rounding: Rounding::Bf16, ..CpuOptions::default() });
    let distance = distance(&rounded, &exact);
    assert!((5e-4..2e-2).contains(&distance), "{distance:e}");
    assert!(rounded.iter().all(|value| value.to_bits() & 0xffff == 0));
}

/// `W x` of four tokens, `x` taken from `rows`.
fn product(rounding: Rounding, rows: &[f32], weight: Tensor<'_>) -> Vec<f32> {
    let mut backend = CpuBackend::new(CpuOptions { rounding, ..CpuOptions::default() }).unwrap();
    backend.prepare(shape(false)).unwrap();
    let bytes: Vec<u8> = rows.iter().flat_map(|value| value.to_le_bytes()).collect();
    let table = backend.load_table(tensor("embedding", 50, weight.cols, &bytes)).unwrap();
    let linear = backend.load_linear(&[weight]).unwrap();
    let (mut x, mut y) = (backend.alloc(256, weight.cols).unwrap(), backend.alloc(256, weight.rows).unwrap());
    let step = backend.upload(&step(0..4)).unwrap();
    backend.embed(&step, &table, &mut x).unwrap();
    backend.linear(&step, &x, &linear, &mut y).unwrap();
    y.values()[..4 * weight.rows].to_vec()
}

#[test]
fn fp8_weights_meet_fp8_inputs_and_no_others_do() {
    let (n, k) = (130, 320);
    let noise = noise(50 * k, 3.0, 7);
    let x: Vec<f32> = noise.as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value)).collect();
    let quantized: Vec<u8> = (0..n * k).map(|i| (i * 37 % 0x50) as u8 | (i % 2 * 0x80) as u8).collect();
    let scales: Vec<u8> = (1..=6u8).flat_map(|s| (f32::from(s) / 64.0).to_le_bytes()).collect();
    let scales = Some(Scales { bytes: &scales, block: [128, 128] });
    let fp8 = Tensor { dtype: Dtype::F8E4m3, scales, ..tensor("w", n, k, &quantized) };
    let plain: Vec<u8> = fp8.to_f32().unwrap().iter().flat_map(|value| value.to_le_bytes()).collect();
    for ue8m0 in [false, true] {
        let rounding = Rounding::Fp8Activations { ue8m0 };
        let rounded = rounding.inputs(&x, k, true).unwrap();
        let found = product(rounding, &x, fp8);
        assert_eq!(found, product(Rounding::Bf16, &rounded, tensor("w", n, k, &plain)));
        let unrounded = product(Rounding::Bf16, &x, tensor("w", n, k, &plain));
        assert!((1e-3..5e-2).contains(&distance(&found, &unrounded)), "{:e}", distance(&found, &unrounded));
        assert_eq!(product(rounding, &x, tensor("w", n, k, &plain)), unrounded);
    }
}
