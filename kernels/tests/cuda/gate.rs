//! The router's choice: the same experts and the same bits of weights as on the CPU.

use super::{paged::Paged, support};
use kernels::{
    GateRule, GroupScore, Scoring,
    cpu::route,
    cuda::{device::Device, gate},
};

/// Rows that launches cover beyond those of the step.
const PADDING: u32 = 6;

const V3: GateRule = GateRule {
    scoring: Scoring::Sigmoid,
    groups: 8,
    kept_groups: 4,
    group_score: GroupScore::TopTwo,
    top_k: 8,
    normalize: true,
    scale: 2.5,
};

/// (experts, rule): V3, K2, V2, V2-Lite and small ones of every kind.
fn rules() -> Vec<(u32, GateRule)> {
    let v2 = GateRule {
        scoring: Scoring::Softmax,
        kept_groups: 3,
        group_score: GroupScore::Max,
        top_k: 6,
        normalize: false,
        scale: 16.0,
        ..V3
    };
    vec![
        (256, V3),
        (384, GateRule { groups: 1, kept_groups: 1, scale: 2.827, ..V3 }),
        (160, v2),
        (64, GateRule { groups: 1, kept_groups: 1, scale: 1.0, ..v2 }),
        (24, GateRule { groups: 24, kept_groups: 5, top_k: 7, ..V3 }),
        (9, GateRule { groups: 3, kept_groups: 1, top_k: 5, ..V3 }),
        (1, GateRule { groups: 1, kept_groups: 1, top_k: 1, ..V3 }),
    ]
}

/// In steps of `grid`, so that there are ties.
fn logits(count: usize, grid: f32, seed: u64) -> Vec<f32> {
    support::random(count, seed).iter().map(|x| (x * 3.0 / grid).round() * grid).collect()
}

#[test]
fn choices_and_weights_are_those_of_the_cpu() {
    let Some(device) = support::device() else { return };
    for (case, (experts, rule)) in rules().into_iter().enumerate() {
        for (grid, biased) in [(1e-6, true), (1e-6, false), (0.5, true), (0.5, false)] {
            compare(&device, 37, case as u64, (experts, rule), grid, biased);
        }
    }
    compare(&device, 16_384, 50, rules()[0], 1e-6, true);
}

fn compare(device: &Device, rows: u32, case: u64, (experts, rule): (u32, GateRule), grid: f32, biased: bool) {
    let tokens = vec![0; rows as usize];
    let resident = Paged::new(&[(0, rows)], 2, 1).upload(device, &tokens, PADDING);
    let z = logits((rows * experts) as usize, grid, 10 + case);
    let bias = logits(experts as usize, grid, 40 + case);
    let expected = route(&z, experts as usize, biased.then_some(&bias), &rule);
    let slots = ((rows + PADDING) * rule.top_k) as usize;
    let chosen = support::poisoned(device, 4 * slots);
    let weights = support::poisoned(device, 4 * slots);
    let z = support::upload_f32(device, &z);
    let bias = support::upload_f32(device, &bias);
    gate::route(
        device,
        &resident.addresses,
        &resident.extent,
        z.address(),
        experts,
        biased.then_some(bias.address()),
        &rule,
        chosen.address(),
        weights.address(),
    )
    .expect("launched");
    let valid = (rows * rule.top_k) as usize;
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<u32>>();
    let chosen = support::download_u32(device, &chosen);
    let weights = support::download_u32(device, &weights);
    assert_eq!(chosen[..valid], expected.experts, "{experts} experts, {rule:?}");
    assert_eq!(weights[..valid], bits(&expected.weights), "{experts} experts, {rule:?}");
    assert!(chosen[valid..].iter().chain(&weights[valid..]).all(|word| *word == u32::MAX));
}

#[test]
fn rules_beyond_the_kernel_are_refused() {
    let Some(device) = support::device() else { return };
    let resident = Paged::new(&[(0, 1)], 2, 1).upload(&device, &[0], 0);
    let refused = [
        (385, V3),
        (256, GateRule { top_k: 33, ..V3 }),
        (256, GateRule { groups: 64, ..V3 }),
        (250, V3),
        (4, GateRule { groups: 1, kept_groups: 1, top_k: 5, ..V3 }),
    ];
    for (experts, rule) in refused {
        let (at, extent) = (&resident.addresses, &resident.extent);
        gate::route(&device, at, extent, 0, experts, None, &rule, 0, 0).expect_err("refused");
    }
}
