//! The mixture of experts from routing to sum: experts without rows, one expert with all of them, several tiles.

use crate::{
    linear::{Fp8, product, through_e4m3},
    support::{self, assert_close, bf16},
};
use kernels::cuda::{
    device::Device,
    linear::{Batch, Input, Matrix, Output, linear, quantize},
    moe::{combine, place, scratch_bytes, silu_mul},
};

const HIDDEN: usize = 256;
const WIDTH: usize = 128;
const EXPERTS: usize = 6;
const TOP_K: usize = 2;

struct Weights {
    gate_up: Vec<Fp8>,
    down: Vec<Fp8>,
}

impl Weights {
    fn random() -> Weights {
        let each = |n, k, seed: u64| (0..EXPERTS as u64).map(|e| Fp8::random(n, k, seed + 2 * e)).collect();
        Weights { gate_up: each(2 * WIDTH, HIDDEN, 100), down: each(HIDDEN, WIDTH, 200) }
    }

    fn expected(&self, x: &[f32], chosen: &[u32], weights: &[f32]) -> Vec<f32> {
        let x_rounded = through_e4m3(x, HIDDEN);
        let mut out = vec![0.0; x.len()];
        for (slot, (expert, weight)) in chosen.iter().zip(weights).enumerate() {
            let (row, expert) = (slot / TOP_K, *expert as usize);
            let both = product(&self.gate_up[expert].values, &x_rounded[row * HIDDEN..][..HIDDEN], HIDDEN);
            let both: Vec<f32> = both.into_iter().map(bf16).collect();
            let silu = |x: f32| x / (1.0 + (-x).exp());
            let inner: Vec<f32> = (0..WIDTH).map(|i| bf16(silu(both[i]) * both[WIDTH + i])).collect();
            let down = product(&self.down[expert].values, &through_e4m3(&inner, WIDTH), WIDTH);
            for (out, value) in out[row * HIDDEN..][..HIDDEN].iter_mut().zip(down) {
                *out += weight * bf16(value);
            }
        }
        out
    }
}

fn all(parts: &[Fp8]) -> (Vec<u8>, Vec<f32>) {
    let bytes = parts.iter().flat_map(|part| &part.bytes).copied().collect();
    (bytes, parts.iter().flat_map(|part| &part.scales).copied().collect())
}

fn run(device: &Device, of: &Weights, x: &[f32], chosen: &[u32], weights: &[f32], tokens: u32) -> Vec<f32> {
    let rows = x.len() / HIDDEN;
    let (slots, launched) = (rows * TOP_K, rows as u32 + 3);
    let counts = support::upload_u32(device, &[rows as u32, 0, 0, 0]);
    let x_at = support::upload_bf16(device, x);
    let (chosen_at, weights_at) = (support::upload_u32(device, chosen), support::upload_f32(device, weights));
    let [(gate_up, gate_up_scales), (down, down_scales)] = [all(&of.gate_up), all(&of.down)];
    let matrix =
        |bytes: &[u8], scales: &[f32]| (support::upload(device, bytes), support::upload_f32(device, scales));
    let (gate_up, down) = (matrix(&gate_up, &gate_up_scales), matrix(&down, &down_scales));
    let scratch = support::poisoned(device, scratch_bytes(launched, TOP_K as u32, EXPERTS as u32));
    let room = |bytes: usize| support::poisoned(device, bytes);
    let (q, q_scales) = (room(rows * HIDDEN), room(4 * rows * HIDDEN / 128));
    let (both, inner) = (room(slots * 2 * WIDTH * 2), room(slots * WIDTH * 2));
    let (inner_q, inner_scales, at) = (room(slots * WIDTH), room(4 * slots), room(slots * HIDDEN * 2));
    let out = room((rows + 1) * HIDDEN * 2);
    let (hidden, width, top_k) = (HIDDEN as u32, WIDTH as u32, TOP_K as u32);
    let (count, experts) = (counts.address(), EXPERTS as u32);
    quantize(device, count, 1, launched, x_at.address(), hidden, hidden, q.address(), q_scales.address())
        .unwrap();
    let places =
        place(device, count, launched, top_k, experts, tokens, chosen_at.address(), scratch.address())
            .unwrap();
    let expert = |(bytes, scales): &(kernels::cuda::device::Memory, kernels::cuda::device::Memory), n, k| {
        Matrix { weights: bytes.address(), scales: Some(scales.address()), n, k }
    };
    let input = Input {
        values: q.address(),
        scales: Some(q_scales.address()),
        stride: hidden,
        gather: Some(places.row_at),
    };
    let output = Output { values: both.address(), stride: 2 * width, f32: false };
    linear(device, expert(&gate_up, 2 * width, hidden), input, output, places.runs, Batch::ONE).unwrap();
    let most = launched * top_k;
    silu_mul(device, count, top_k, most, both.address(), width, inner.address()).unwrap();
    quantize(
        device,
        count,
        top_k,
        most,
        inner.address(),
        width,
        width,
        inner_q.address(),
        inner_scales.address(),
    )
    .unwrap();
    let input = Input {
        values: inner_q.address(),
        scales: Some(inner_scales.address()),
        stride: width,
        gather: None,
    };
    let output = Output { values: at.address(), stride: hidden, f32: false };
    linear(device, expert(&down, hidden, width), input, output, places.runs, Batch::ONE).unwrap();
    combine(
        device,
        count,
        launched,
        top_k,
        at.address(),
        &places,
        weights_at.address(),
        None,
        hidden,
        out.address(),
    )
    .unwrap();
    let found = support::download_bf16(device, &out);
    assert!(
        found[rows * HIDDEN..].iter().all(|value| value.is_nan()),
        "rows beyond the step are not written"
    );
    found[..rows * HIDDEN].to_vec()
}

#[test]
fn moe_from_routing_to_sum() {
    let Some(device) = support::device() else { return };
    let of = Weights::random();
    // Rows, tile, and how slots choose: spread, all alike, two experts only.
    let choices: [(usize, u32, fn(usize) -> u32); 5] = [
        (1, 8, |slot| (slot * 5) as u32 % 6),
        (7, 8, |slot| (slot * 5 + slot / 2) as u32 % 6),
        (300, 16, |slot| (slot * 7 + slot / 3) as u32 % 6),
        (70, 8, |_| 3),
        (129, 128, |slot| 2 * (slot as u32 % 2)),
    ];
    for (rows, tokens, choose) in choices {
        let x = support::random_bf16(rows * HIDDEN, 7 + rows as u64);
        let chosen: Vec<u32> = (0..rows * TOP_K).map(choose).collect();
        let weights: Vec<f32> = support::random(rows * TOP_K, 8).iter().map(|x| x.abs() + 0.1).collect();
        let found = run(&device, &of, &x, &chosen, &weights, tokens);
        assert_close(
            &found,
            &of.expected(&x, &chosen, &weights),
            1e-2,
            &format!("moe, {rows} rows in tiles of {tokens}"),
        );
        assert_eq!(
            found,
            run(&device, &of, &x, &chosen, &weights, tokens),
            "the same input gives the same bits"
        );
    }
}
