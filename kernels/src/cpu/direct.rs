//! MLA attention in its direct form: keys and values are made from every latent. Slow and plain, one head at a time; it
//! exists to check the absorbed form, and kernels for prefill, against.

use super::{Mla, attention::Span, pool::KvPool};
use crate::Shape;

/// As [`super::attention::Attention::run`] and the value projection after it: `out[t][heads × value]`.
pub fn attend(
    shape: &Shape,
    pool: &KvPool,
    layer: usize,
    weights: &Mla,
    query: &[f32],
    spans: &[Span<'_>],
    out: &mut [f32],
) {
    for span in spans {
        for head in 0..shape.heads as usize {
            attend_head(shape, pool, layer, weights, query, span, head, out);
        }
    }
}

#[allow(clippy::too_many_arguments)]
fn attend_head(
    shape: &Shape,
    pool: &KvPool,
    layer: usize,
    weights: &Mla,
    query: &[f32],
    span: &Span<'_>,
    head: usize,
    out: &mut [f32],
) {
    let (nope, value, latent) = (shape.nope as usize, shape.value as usize, shape.latent as usize);
    let context = span.start + span.rows.len();
    let size = pool.block_tokens();
    let cache: Vec<&[f32]> = (0..context)
        .map(|position| {
            &pool.block(span.table[position / size], layer)[position % size * pool.row()..][..pool.row()]
        })
        .collect();
    let project = |row: &&[f32], n: usize, at: &dyn Fn(usize, usize) -> f32| -> Vec<f32> {
        (0..n).map(|d| (0..latent).fold(0.0, |acc, c| row[c].mul_add(at(d, c), acc))).collect()
    };
    let keys: Vec<_> =
        cache.iter().map(|row| project(row, nope, &|d, c| weights.key[head].at(c, d))).collect();
    let values: Vec<_> =
        cache.iter().map(|row| project(row, value, &|d, c| weights.value[head].at(d, c))).collect();
    for (index, row) in span.rows.clone().enumerate() {
        let q = &query[(row * shape.heads as usize + head) * shape.query()..][..shape.query()];
        let scores: Vec<f32> = (0..=span.start + index)
            .map(|j| shape.softmax_scale * (dot(&q[..nope], &keys[j]) + dot(&q[nope..], &cache[j][latent..])))
            .collect();
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let powers: Vec<f32> = scores.iter().map(|s| crate::math::exp_f32(s - max)).collect();
        let sum: f32 = powers.iter().sum();
        let out = &mut out[(row * shape.heads as usize + head) * value..][..value];
        for (d, out) in out.iter_mut().enumerate() {
            *out = powers.iter().zip(&values).fold(0.0, |acc, (p, v)| p.mul_add(v[d], acc)) / sum;
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |acc, (a, b)| a.mul_add(*b, acc))
}
