//! Every operation of `Backend`, CUDA against the CPU with the roundings that CUDA declares: the same weights, inputs and cache
//! on both, over random steps with block tables in random order. What an operation is given never comes from one before it.

use crate::{
    paged::shuffled,
    support::{self, assert_close},
};
use kernels::{
    Backend, CpuBackend, CudaBackend, Data, Dtype, Entry, GateRule, GroupScore, Input, MlaTensors,
    MlpTensors, QueryTensors, Random, Sampling, Scoring, Shape, SlotInit, StepInput, Tensor,
    cpu::{CpuOptions, Rounding},
    cuda::device::Device,
};
use kv::{KvDtype, Payload};
use std::sync::Arc;

const VOCAB: usize = 640;
const HIDDEN: usize = 512;
const RANK: usize = 256;
const WIDTH: usize = 256;
const EXPERTS: usize = 24;
const BLOCKS: u32 = 80;
const ROWS: usize = 768;
const RULE: GateRule = GateRule {
    scoring: Scoring::Sigmoid,
    groups: 4,
    kept_groups: 2,
    group_score: GroupScore::TopTwo,
    top_k: 4,
    normalize: true,
    scale: 2.5,
};

/// What a test wants to know of a backend besides its operations.
trait Watched: Backend {
    /// The first `count` values of a buffer, of f32 or of the backend's activations.
    fn values(&mut self, buffer: &Self::Buffer, count: usize, f32: bool) -> Vec<f32>;
}

impl Watched for CpuBackend {
    fn values(&mut self, buffer: &Self::Buffer, count: usize, _: bool) -> Vec<f32> {
        buffer.values()[..count].to_vec()
    }
}

impl Watched for CudaBackend {
    fn values(&mut self, buffer: &Self::Buffer, count: usize, f32: bool) -> Vec<f32> {
        let (from, to) = (self.mark().unwrap(), self.mark().unwrap());
        self.between(&from, &to).unwrap();
        let mut bytes = vec![0; count * if f32 { 4 } else { 2 }];
        Device::new(0).unwrap().download(buffer.address(), &mut bytes).unwrap();
        let dtype = if f32 { KvDtype::F32 } else { KvDtype::Bf16 };
        from_bytes(&bytes, dtype)
    }
}

fn from_bytes(bytes: &[u8], dtype: KvDtype) -> Vec<f32> {
    match dtype {
        KvDtype::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        KvDtype::Bf16 => {
            bytes.as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect()
        }
    }
}

fn to_bytes(values: &[f32], dtype: KvDtype) -> Vec<u8> {
    match dtype {
        KvDtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        KvDtype::Bf16 => values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect(),
    }
}

fn shape(heads: usize) -> Shape {
    Shape {
        layers: 2,
        vocab: VOCAB as u32,
        tokenizer_size: VOCAB as u32,
        hidden: HIDDEN as u32,
        heads: heads as u32,
        nope: 128,
        rope: 64,
        value: 128,
        latent: 512,
        softmax_scale: 0.07,
        rope_frequencies: (0..32).map(|pair| 0.75f64.powi(pair)).collect(),
        rope_amplitude: 1.0,
        block_tokens: 64,
        blocks: BLOCKS,
        max_sequences: 8,
        max_step_tokens: ROWS as u32,
        max_context: 2048,
    }
}

/// A matrix whose products keep about the size of their inputs.
fn matrix(name: &'static str, dtype: Dtype, rows: usize, cols: usize) -> Tensor<'static> {
    let key = name.bytes().fold(rows as u64, |key, byte| key * 131 + u64::from(byte));
    let std = 1.0 / (cols as f32).sqrt();
    Tensor { name, dtype, rows, cols, data: Data::Random(Random { key, std }), scales: None }
}

fn fp8(name: &'static str, rows: usize, cols: usize) -> Tensor<'static> {
    matrix(name, Dtype::F8E4m3, rows, cols)
}

/// Rows to look up, with values around 1.
fn table(name: &'static str, width: usize) -> Tensor<'static> {
    let rows = matrix(name, Dtype::Bf16, VOCAB, width);
    let key = width as u64 * 7919 + name.len() as u64;
    Tensor { data: Data::Random(Random { key, std: 1.0 }), ..rows }
}

/// Entries as (position of the first row, rows), every one with blocks of its own.
fn step(entries: &[(u32, u32)], seed: u64) -> StepInput {
    let mut free = shuffled(BLOCKS, seed).into_iter();
    let init =
        |slot| SlotInit { slot, tokens: [0].into(), prompt_len: 1, sampling: Arc::new(Sampling::default()) };
    let entry = |(slot, &(start, rows)): (u32, &(u32, u32))| Entry {
        slot,
        input: Input::Tokens(
            (0..rows).map(|row| (row * 37 + slot * 101 + seed as u32) % VOCAB as u32).collect(),
        ),
        start,
        block_table: free.by_ref().take((start + rows).div_ceil(64) as usize).collect(),
        sample: true,
        prompt_logprobs: None,
    };
    let slots = 0..entries.len() as u32;
    StepInput { init: slots.clone().map(init).collect(), entries: slots.zip(entries).map(entry).collect() }
}

/// What an operation gave, and how far it may be off.
type Found = (&'static str, Vec<f32>, f64);

struct Run<'a, B: Backend> {
    backend: &'a mut B,
    input: StepInput,
    step: B::Step,
    rows: usize,
    found: Vec<Found>,
}

impl<B: Watched> Run<'_, B> {
    /// The rows of the step's tokens.
    fn input(&mut self, name: &'static str, width: usize) -> B::Buffer {
        let table = self.backend.load_table(table(name, width)).unwrap();
        let mut buffer = self.backend.alloc(ROWS, width).unwrap();
        self.backend.embed(&self.step, &table, &mut buffer).unwrap();
        buffer
    }

    fn alloc(&mut self, width: usize) -> B::Buffer {
        self.backend.alloc(ROWS, width).unwrap()
    }

    fn keep(&mut self, what: &'static str, buffer: &B::Buffer, width: usize) {
        let values = self.backend.values(buffer, self.rows * width, false);
        self.found.push((what, values, 1e-2));
    }

    fn norm(&mut self) {
        let (mut residual, delta) = (self.input("x", HIDDEN), self.input("delta", HIDDEN));
        let one = Tensor { data: Data::Constant(0.75), ..matrix("norm", Dtype::F32, 1, HIDDEN) };
        let weight = self.backend.load_table(one).unwrap();
        let mut out = self.alloc(HIDDEN);
        self.backend.rms_norm(&self.step, &mut residual, Some(&delta), &weight, 1e-6, &mut out).unwrap();
        self.keep("rms_norm: residual", &residual, HIDDEN);
        self.keep("rms_norm", &out, HIDDEN);
    }

    fn attention(&mut self, heads: usize) {
        let (query, kv_b) = (heads * 192, heads * 256);
        let norm = |name, width| Tensor { data: Data::Constant(1.25), ..matrix(name, Dtype::F32, 1, width) };
        let low = QueryTensors::LowRank {
            a: fp8("q_a", RANK, HIDDEN),
            norm: norm("q_norm", RANK),
            b: fp8("q_b", query, RANK),
        };
        let tensors = MlaTensors {
            query: low,
            kv_a: fp8("kv_a", 576, HIDDEN),
            kv_norm: norm("kv_norm", 512),
            kv_b: fp8("kv_b", kv_b, 512),
            eps: 1e-6,
        };
        let mla = self.backend.load_mla(&tensors).unwrap();
        let (x, mut q) = (self.input("x", HIDDEN), self.alloc(query));
        self.backend.mla_project(&self.step, 0, &x, &mla, &mut q).unwrap();
        self.keep("mla_project: query", &q, query);
        let cached = self.cached(0);
        self.found.push(("mla_project: cache", cached, 1e-2));
        let (q, mut out) = (self.input("query", query), self.alloc(heads * 128));
        self.backend.mla_attend(&self.step, 1, &q, &mla, &mut out).unwrap();
        self.keep("mla_attend", &out, heads * 128);
    }

    /// The same rows in every block that the step sees, in both layers.
    fn fill_cache(&mut self) {
        for block in self.blocks() {
            let layout = self.backend.layout();
            let values = support::random_bf16(2 * 64 * 576, 900 + u64::from(block));
            let (reply, written) = kv::transfer();
            let payload = Payload::new(to_bytes(&values, layout.dtype));
            self.backend.kv_write(block, 64, payload, reply).unwrap();
            written.blocking_recv().unwrap().unwrap();
        }
    }

    /// Rows of a layer in every block of the step.
    fn cached(&mut self, layer: usize) -> Vec<f32> {
        let mut cached = Vec::new();
        for block in self.blocks() {
            let (reply, payload) = kv::transfer();
            self.backend.kv_read(block, 64, reply).unwrap();
            let bytes = payload.blocking_recv().unwrap().unwrap().bytes.together();
            let values = from_bytes(&bytes, self.backend.layout().dtype);
            cached.extend_from_slice(&values[layer * 64 * 576..][..64 * 576]);
        }
        cached
    }

    fn blocks(&self) -> Vec<u32> {
        self.input.entries.iter().flat_map(|entry| entry.block_table.clone()).collect()
    }

    fn products(&mut self) {
        let x = self.input("x", HIDDEN);
        for (what, dtype) in [("linear, FP8", Dtype::F8E4m3), ("linear, bf16", Dtype::Bf16)] {
            let weight = self.backend.load_linear(&[matrix("w", dtype, 328, HIDDEN)]).unwrap();
            let mut out = self.alloc(328);
            self.backend.linear(&self.step, &x, &weight, &mut out).unwrap();
            self.keep(what, &out, 328);
        }
        let (gate_up, down) = self.mlp_weights();
        let mut out = self.alloc(HIDDEN);
        self.backend.mlp(&self.step, &x, &gate_up, &down, &mut out).unwrap();
        self.keep("mlp", &out, HIDDEN);
    }

    fn mlp_weights(&mut self) -> (B::Linear, B::Linear) {
        let up = [fp8("gate", WIDTH, HIDDEN), fp8("up", WIDTH, HIDDEN)];
        let gate_up = self.backend.load_linear(&up).unwrap();
        (gate_up, self.backend.load_linear(&[fp8("down", HIDDEN, WIDTH)]).unwrap())
    }

    fn experts(&mut self) {
        let name = |part: &str, expert| -> &'static str { format!("{part} {expert}").leak() };
        let mut each = (0..EXPERTS).map(|expert| MlpTensors {
            gate: fp8(name("gate", expert), WIDTH, HIDDEN),
            up: fp8(name("up", expert), WIDTH, HIDDEN),
            down: fp8(name("down", expert), HIDDEN, WIDTH),
        });
        let experts = self.backend.load_experts(EXPERTS, &mut each).unwrap();
        let router = self.backend.load_linear(&[matrix("router", Dtype::Bf16, EXPERTS, HIDDEN)]).unwrap();
        let bias = Tensor { data: Data::Constant(0.125), ..matrix("bias", Dtype::F32, 1, EXPERTS) };
        let bias = self.backend.load_table(bias).unwrap();
        let x = self.input("x", HIDDEN);
        let routing = self.backend.gate(&self.step, &x, &router, Some(&bias), &RULE).unwrap();
        let (gate_up, down) = self.mlp_weights();
        for (what, shared) in [("experts", None), ("experts and shared", Some((&gate_up, &down)))] {
            let mut out = self.alloc(HIDDEN);
            self.backend.experts(&self.step, &x, &routing, &experts, shared, &mut out).unwrap();
            self.keep(what, &out, HIDDEN);
        }
    }

    /// Logits, and the tokens that both backends sample from their own.
    fn head(mut self) -> Vec<Found> {
        let x = self.input("x", HIDDEN);
        let head = self.backend.load_linear(&[matrix("head", Dtype::Bf16, VOCAB, HIDDEN)]).unwrap();
        let mut logits = self.backend.alloc_logits(8, VOCAB).unwrap();
        self.backend.logits(&mut self.step, &x, &head, &mut logits).unwrap();
        let count = self.input.entries.len() * VOCAB;
        self.found.push(("logits", self.backend.values(&logits, count, true), 1e-4));
        self.backend.sample(&mut self.step, &logits).unwrap();
        self.backend.graphed(kernels::GraphKey { decode: false, entries: 0, rows: 0 }, |_| Ok(())).unwrap();
        let outputs = self.backend.download(self.step).unwrap();
        let ids = outputs.iter().map(|output| output.sampled.as_ref().unwrap().id as f32);
        self.found.push(("sample", ids.collect(), 1e-12));
        self.found
    }
}

fn run<B: Watched>(mut backend: B, heads: usize, input: StepInput) -> Vec<Found> {
    backend.prepare(shape(heads)).unwrap();
    let step = backend.upload(&input).unwrap();
    let rows = input.tokens();
    let mut run = Run { backend: &mut backend, input, step, rows, found: Vec::new() };
    run.fill_cache();
    run.norm();
    run.attention(heads);
    run.products();
    run.experts();
    run.head()
}

/// Heads, and entries of a step.
type Case = (usize, Vec<(u32, u32)>);

/// Compares over all cases together: a bf16 result that is rounded the other way may change the scale of the group of 128 that is
/// quantised next inside of an operation, and with it a tenth of the group by a step of e4m3, which for a single row is much.
fn compare(cases: &[Case]) {
    let rounding = Rounding::Fp8Activations { ue8m0: false };
    let mut all: Vec<(Found, Vec<f32>)> = Vec::new();
    for (seed, (heads, entries)) in (1..).zip(cases) {
        let cpu = CpuBackend::new(CpuOptions { rounding, ..CpuOptions::default() }).unwrap();
        let expected = run(cpu, *heads, step(entries, seed));
        let found = run(CudaBackend::new(0).unwrap(), *heads, step(entries, seed));
        for (index, ((what, found, tolerance), (_, expected, _))) in
            found.into_iter().zip(expected).enumerate()
        {
            assert_close(&found, &expected, 3.0 * tolerance, &format!("{what}, {heads} heads, {entries:?}"));
            if all.len() == index {
                all.push(((what, Vec::new(), tolerance), Vec::new()));
            }
            all[index].0.1.extend(found);
            all[index].1.extend(expected);
        }
    }
    for ((what, found, tolerance), expected) in &all {
        assert_close(found, expected, *tolerance, &format!("{what}, together"));
    }
}

#[test]
fn operations_over_decode_steps() {
    let Some(_) = support::device() else { return };
    compare(&[
        (4, vec![(0, 1)]),
        (16, vec![(63, 1), (64, 1), (700, 1), (1, 1)]),
        (128, vec![(130, 1), (511, 1), (999, 1), (64, 1), (5, 1), (0, 1)]),
        (64, vec![(17, 1), (300, 1), (2, 1), (128, 1), (700, 1)]),
    ]);
}

#[test]
fn operations_over_prefill_steps() {
    let Some(_) = support::device() else { return };
    compare(&[
        (4, vec![(0, 257)]),
        (16, vec![(0, 63), (320, 65), (65, 130), (1000, 1)]),
        (64, vec![(100, 31), (0, 200)]),
    ]);
}

#[test]
fn operations_over_random_steps() {
    let Some(_) = support::device() else { return };
    let mut dice = support::dice(77);
    let mut below = |bound| dice(bound) as u32;
    let mut case = || {
        let entries = (0..1 + below(6)).map(|_| (below(600), 1 + below(100))).collect();
        ([4, 8, 20, 64][below(4) as usize], entries)
    };
    compare(&(0..12).map(|_| case()).collect::<Vec<Case>>());
}
