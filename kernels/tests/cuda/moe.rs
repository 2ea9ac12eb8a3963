//! The mixture of experts from routing to sum: experts without rows, one expert with all of them, several tiles.

use crate::{
    linear::{Fp8, product, through_e4m3},
    support::{self, assert_close, bf16},
};
use kernels::cuda::{
    activate::{Quantised, RowScales, Rows, Source, gather, quantize, silu_mul, silu_mul_quantize},
    device::{Device, Memory},
    linear::{Batch, Input, Matrix, Output, Runs, linear},
    moe::{combine, place, scratch_bytes},
};

const HIDDEN: usize = 256;
const WIDTH: usize = 128;
const EXPERTS: usize = 6;
const TOP_K: usize = 2;

struct Weights {
    gate_up: Vec<Fp8>,
    down: Vec<Fp8>,
    /// The same values as a bf16 checkpoint has them.
    bf16: bool,
}

/// The expert of a slot.
type Choose = fn(usize) -> u32;

/// What the layer is given.
struct Case<'a> {
    x: &'a [f32],
    chosen: &'a [u32],
    weights: &'a [f32],
    shared: Option<&'a [f32]>,
    tokens: u32,
}

impl Weights {
    fn random(bf16: bool) -> Weights {
        let each = |n, k, seed: u64| (0..EXPERTS as u64).map(|e| Fp8::random(n, k, seed + 2 * e)).collect();
        let mut of = Weights { gate_up: each(2 * WIDTH, HIDDEN, 100), down: each(HIDDEN, WIDTH, 200), bf16 };
        if bf16 {
            let parts = of.gate_up.iter_mut().chain(&mut of.down);
            parts.flat_map(|part| &mut part.values).for_each(|value| *value = support::bf16(*value));
        }
        of
    }

    fn inputs(&self, x: &[f32], k: usize) -> Vec<f32> {
        if self.bf16 { x.to_vec() } else { through_e4m3(x, k) }
    }

    fn expected(&self, Case { x, chosen, weights, shared, .. }: &Case<'_>) -> Vec<f32> {
        let x_rounded = self.inputs(x, HIDDEN);
        let mut out = vec![0.0; x.len()];
        for (slot, (expert, weight)) in chosen.iter().zip(*weights).enumerate() {
            let (row, expert) = (slot / TOP_K, *expert as usize);
            let both = product(&self.gate_up[expert].values, &x_rounded[row * HIDDEN..][..HIDDEN], HIDDEN);
            let both: Vec<f32> = both.into_iter().map(bf16).collect();
            let silu = |x: f32| x / (1.0 + (-x).exp());
            let inner: Vec<f32> = (0..WIDTH).map(|i| bf16(silu(both[i]) * both[WIDTH + i])).collect();
            let down = product(&self.down[expert].values, &self.inputs(&inner, WIDTH), WIDTH);
            for (out, value) in out[row * HIDDEN..][..HIDDEN].iter_mut().zip(down) {
                *out += weight * bf16(value);
            }
        }
        if let Some(shared) = shared {
            out.iter_mut().zip(*shared).for_each(|(out, value)| *out += value);
        }
        out
    }

    /// Weights one after the other, and scales if they have any.
    fn upload(&self, device: &Device, parts: &[Fp8]) -> (Memory, Option<Memory>) {
        let all = |of: fn(&Fp8) -> &[f32]| parts.iter().flat_map(of).copied().collect::<Vec<f32>>();
        if self.bf16 {
            return (support::upload_bf16(device, &all(|part| &part.values)), None);
        }
        let bytes: Vec<u8> = parts.iter().flat_map(|part| &part.bytes).copied().collect();
        (support::upload(device, &bytes), Some(support::upload_f32(device, &all(|part| &part.scales))))
    }
}

fn run(device: &Device, of: &Weights, case: &Case<'_>) -> Vec<f32> {
    let Case { x, chosen, weights, shared, tokens } = *case;
    let rows = x.len() / HIDDEN;
    let (slots, launched) = (rows * TOP_K, rows as u32 + 3);
    let counts = support::upload_u32(device, &[rows as u32, 0, 0, 0]);
    let x_at = support::upload_bf16(device, x);
    let (chosen_at, weights_at) = (support::upload_u32(device, chosen), support::upload_f32(device, weights));
    let [gate_up, down] = [&of.gate_up, &of.down].map(|parts| of.upload(device, parts));
    let shared = shared.map(|rows| support::upload_bf16(device, rows));
    let scratch = support::poisoned(device, scratch_bytes(launched, TOP_K as u32, EXPERTS as u32));
    let room = |bytes: usize| support::poisoned(device, bytes);
    let (hidden, width, top_k) = (HIDDEN as u32, WIDTH as u32, TOP_K as u32);
    let copied = launched as usize * TOP_K;
    let (x_room, x_scales) = (room(copied * HIDDEN * 2), room(4 * (copied + 3) * HIDDEN / 128));
    let (inner, inner_scales) = (room(copied * WIDTH * 2), room(4 * (copied + 3)));
    let (both, at) = (room(slots * 2 * WIDTH * 2), room(slots * HIDDEN * 2));
    let out = room((rows + 1) * HIDDEN * 2);
    let (count, experts) = (counts.address(), EXPERTS as u32);
    let places =
        place(device, count, launched, top_k, experts, tokens, chosen_at.address(), scratch.address())
            .unwrap();
    let expert = |(weights, scales): &(Memory, Option<Memory>), n, k| Matrix {
        count: experts,
        weights: weights.address(),
        scales: scales.as_ref().map(Memory::address),
        n,
        k,
    };
    let copies = Rows { count, per: top_k, most: launched * top_k };
    let source = Source { values: x_at.address(), stride: hidden, row_at: Some(places.row_at) };
    let scales_at =
        |scales: &Memory| RowScales { values: scales.address(), pitch: RowScales::pitch(copied as u32) };
    let to =
        |values: &Memory, scales: &Memory| Quantised { values: values.address(), scales: scales_at(scales) };
    match of.bf16 {
        true => gather(device, copies, source, hidden, x_room.address()).unwrap(),
        false => quantize(device, copies, source, hidden, to(&x_room, &x_scales)).unwrap(),
    }
    let input = |values: &Memory, scales: &Memory, stride| {
        let scales = (!of.bf16).then(|| scales_at(scales));
        Input { values: values.address(), scales, stride }
    };
    let output = Output { values: both.address(), stride: 2 * width, f32: false };
    let gathered = input(&x_room, &x_scales, hidden);
    linear(device, expert(&gate_up, 2 * width, hidden), gathered, output, places.runs, Batch::ONE).unwrap();
    match of.bf16 {
        true => silu_mul(device, copies, both.address(), width, inner.address()).unwrap(),
        false => silu_mul_quantize(device, copies, both.address(), width, to(&inner, &inner_scales)).unwrap(),
    }
    let placed = input(&inner, &inner_scales, width);
    let output = Output { values: at.address(), stride: hidden, f32: false };
    linear(device, expert(&down, hidden, width), placed, output, places.runs, Batch::ONE).unwrap();
    combine(
        device,
        count,
        launched,
        top_k,
        at.address(),
        &places,
        weights_at.address(),
        shared.as_ref().map(Memory::address),
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

fn compare(of: &Weights) {
    let Some(device) = support::device() else { return };
    // Rows, tile, and how slots choose: none, spread, all alike, two experts only.
    let choices: [(usize, u32, Choose); 9] = [
        (0, 8, |_| 0),
        (1, 8, |slot| (slot * 5) as u32 % 6),
        (7, 8, |slot| (slot * 5 + slot / 2) as u32 % 6),
        (300, 16, |slot| (slot * 7 + slot / 3) as u32 % 6),
        (70, 8, |_| 3),
        (129, 128, |slot| 2 * (slot as u32 % 2)),
        (100, 32, |slot| (slot * slot) as u32 % 6),
        (400, 128, |slot| (slot * 7 + slot / 3) as u32 % 6),
        (200, 64, |slot| (slot % 5) as u32 / 4),
    ];
    for (index, (rows, tokens, choose)) in choices.into_iter().enumerate() {
        let x = support::random_bf16(rows * HIDDEN, 7 + rows as u64);
        let chosen: Vec<u32> = (0..rows * TOP_K).map(choose).collect();
        let weights: Vec<f32> = support::random(rows * TOP_K, 8).iter().map(|x| x.abs() + 0.1).collect();
        let shared = support::random_bf16(rows * HIDDEN, 9);
        let shared = (index % 2 == 0).then_some(shared.as_slice());
        let case = Case { x: &x, chosen: &chosen, weights: &weights, shared, tokens };
        let (found, expected) = (run(&device, of, &case), of.expected(&case));
        let what = format!("moe, {rows} rows in tiles of {tokens}, bf16 {}", of.bf16);
        assert_close(&found, &expected, 1e-2, &what);
        assert_eq!(found, run(&device, of, &case), "the same input gives the same bits");
    }
}

#[test]
fn moe_fp8_from_routing_to_sum() {
    compare(&Weights::random(false));
}

#[test]
fn moe_bf16_from_routing_to_sum() {
    compare(&Weights::random(true));
}

/// As many rows as a step has at most; some of them are compared.
#[test]
fn moe_fp8_of_16384_rows() {
    let Some(device) = support::device() else { return };
    let of = Weights::random(false);
    let rows = 16_384;
    let x = support::random_bf16(rows * HIDDEN, 61);
    let chosen: Vec<u32> = (0..rows * TOP_K).map(|slot| (slot * 7 + slot / 3) as u32 % 6).collect();
    let weights: Vec<f32> = support::random(rows * TOP_K, 62).iter().map(|x| x.abs() + 0.1).collect();
    let found =
        run(&device, &of, &Case { x: &x, chosen: &chosen, weights: &weights, shared: None, tokens: 128 });
    assert!(found.iter().all(|value| value.is_finite()), "every row is written");
    let (mut some, mut expected) = (Vec::new(), Vec::new());
    for row in support::sampled(rows) {
        let slots = row * TOP_K..(row + 1) * TOP_K;
        let case = Case {
            x: &x[row * HIDDEN..][..HIDDEN],
            chosen: &chosen[slots.clone()],
            weights: &weights[slots],
            shared: None,
            tokens: 128,
        };
        expected.extend(of.expected(&case));
        some.extend_from_slice(&found[row * HIDDEN..][..HIDDEN]);
    }
    assert_close(&some, &expected, 1e-2, "moe, some of 16384 rows");
}

#[test]
fn moe_fp8_of_random_routings() {
    let Some(device) = support::device() else { return };
    let of = Weights::random(false);
    let mut below = support::dice(9);
    for seed in 0..12 {
        let (rows, tokens) = (1 + below(300), [8, 16, 32, 64, 128][below(5)]);
        let x = support::random_bf16(rows * HIDDEN, 600 + seed);
        let most = 1 + below(EXPERTS);
        let chosen: Vec<u32> = (0..rows * TOP_K).map(|_| below(most) as u32).collect();
        let weights: Vec<f32> =
            support::random(rows * TOP_K, 700 + seed).iter().map(|x| x.abs() + 0.1).collect();
        let case = Case { x: &x, chosen: &chosen, weights: &weights, shared: None, tokens };
        let what = format!("moe, {rows} rows over {most} experts in tiles of {tokens}");
        assert_close(&run(&device, &of, &case), &of.expected(&case), 1e-2, &what);
    }
}

/// Places are in the order of experts, then of slots; tiles cover them in that order.
#[test]
fn moe_places_by_expert_in_slot_order() {
    let Some(device) = support::device() else { return };
    for (rows, experts, tokens) in [(1usize, 256u32, 8u32), (33, 384, 16), (257, 5, 64), (1000, 1024, 8)] {
        let slots = rows * 8;
        let chosen: Vec<u32> = (0..slots).map(|slot| (slot * slot + slot / 7) as u32 % experts).collect();
        let (counts, chosen_at) =
            (support::upload_u32(&device, &[rows as u32]), support::upload_u32(&device, &chosen));
        let launched = rows as u32 + 2;
        let scratch = support::poisoned(&device, scratch_bytes(launched, 8, experts));
        let (counts, chosen_at) = (counts.address(), chosen_at.address());
        let places =
            place(&device, counts, launched, 8, experts, tokens, chosen_at, scratch.address()).unwrap();
        let words = support::download_u32(&device, &scratch);
        let at = |address: u64| &words[(address - scratch.address()) as usize / 4..];
        let mut order: Vec<usize> = (0..slots).collect();
        order.sort_by_key(|slot| chosen[*slot]);
        for (place, slot) in order.iter().enumerate() {
            assert_eq!(at(places.place)[*slot] as usize, place, "slot {slot} of {experts} experts");
            assert_eq!(at(places.row_at)[place] as usize, slot / 8);
        }
        let Runs::Tiles { count, tiles, .. } = places.runs else { panic!("not tiles") };
        let mut next = 0;
        for tile in at(tiles).as_chunks::<4>().0.iter().take(at(count)[0] as usize) {
            let [expert, first, rows, _] = *tile;
            assert!(first == next && (1..=tokens).contains(&rows), "tile {tile:?} after {next}");
            let mut covered = order[first as usize..][..rows as usize].iter();
            assert!(covered.all(|slot| chosen[*slot] == expert), "tile {tile:?} mixes experts");
            next += rows;
        }
        assert_eq!(next as usize, slots, "tiles cover every slot");
    }
}

/// Outputs of a dense MLP's activation, at a width that does not fill a block.
#[test]
fn silu_mul_rows() {
    let Some(device) = support::device() else { return };
    let (rows, width) = (5usize, 320usize);
    let both: Vec<f32> = support::random(rows * 2 * width, 3).iter().map(|x| bf16(x * 30.0)).collect();
    let (count, both_at) =
        (support::upload_u32(&device, &[rows as u32]), support::upload_bf16(&device, &both));
    let out = support::poisoned(&device, (rows + 1) * width * 2);
    let all = Rows { count: count.address(), per: 1, most: 6 };
    silu_mul(&device, all, both_at.address(), width as u32, out.address()).unwrap();
    let silu = |x: f32| x / (1.0 + (-x).exp());
    let expected: Vec<f32> = (both.chunks_exact(2 * width))
        .flat_map(|row| (0..width).map(|i| silu(row[i]) * row[width + i]))
        .collect();
    let found = support::download_bf16(&device, &out);
    assert_close(&found[..rows * width], &expected, 1e-2, "silu_mul");
    assert!(found[rows * width..].iter().all(|value| value.is_nan()), "rows beyond the step are not written");
}
