//! Embedding, norms, rotation and cache rows against plain loops in f64.

use super::{
    paged::{BLOCK_TOKENS, Paged, angle},
    support::{self, assert_close},
};
use kernels::cuda::elementwise::{LowQuery, PoolLayer, cache_write, embed, rms_norm, rotate_query};

/// Rows that launches cover beyond those of the step.
const PADDING: u32 = 3;
const EPS: f32 = 1e-6;
/// 5 rows of three entries.
const ENTRIES: [(u32, u32); 3] = [(62, 3), (0, 1), (130, 1)];

fn norm(x: &[f32], weight: &[f32]) -> Vec<f32> {
    let squares: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    let inverse = 1.0 / (squares / x.len() as f64 + f64::from(EPS)).sqrt();
    x.iter().zip(weight).map(|(x, w)| (f64::from(*w) * f64::from(*x) * inverse) as f32).collect()
}

fn rotate(values: &[f32], position: u32) -> Vec<f32> {
    let pair = |(pair, xy): (usize, &[f32])| {
        let (cos, sin) = angle(position, pair as u32);
        [xy[0] * cos - xy[1] * sin, xy[0] * sin + xy[1] * cos]
    };
    values.chunks_exact(2).enumerate().flat_map(pair).collect()
}

/// NaN in every element: what a poisoned buffer holds.
fn untouched(values: &[f32]) -> bool {
    values.iter().all(|value| value.is_nan())
}

#[test]
fn embedding_copies_the_rows_of_tokens() {
    let Some(device) = support::device() else { return };
    let (vocab, hidden) = (40, 256);
    let table = support::random_bf16(vocab * hidden, 1);
    // The last token is none of the vocabulary: what a failed sampling leaves.
    let tokens = [3, 39, 0, 3, u32::MAX];
    let step = Paged::new(&ENTRIES, 64, 2).upload(&device, &tokens, PADDING);
    let table_memory = support::upload_bf16(&device, &table);
    let out = support::poisoned(&device, (5 + PADDING as usize) * hidden * 2);
    let (at, to) = (table_memory.address(), out.address());
    embed(&device, &step.addresses, &step.extent, at, vocab as u32, hidden as u32, to).unwrap();
    let found = support::download_bf16(&device, &out);
    let expected: Vec<f32> =
        tokens[..4].iter().flat_map(|token| &table[*token as usize * hidden..][..hidden]).copied().collect();
    assert_eq!(found[..4 * hidden], expected);
    assert!(found[4 * hidden..5 * hidden].iter().all(|value| *value == 0.0));
    assert!(untouched(&found[5 * hidden..]));
}

#[test]
fn norms_add_before_they_scale() {
    let Some(device) = support::device() else { return };
    for (width, add) in [(128, true), (128, false), (7168, true)] {
        let step = Paged::new(&ENTRIES, 64, 2).upload(&device, &[0; 5], PADDING);
        let (mut residual, delta) = (support::random_bf16(5 * width, 3), support::random_bf16(5 * width, 4));
        let weight = support::random(width, 5);
        let x = support::upload_bf16(&device, &residual);
        let (d, w) = (support::upload_bf16(&device, &delta), support::upload_f32(&device, &weight));
        let out = support::poisoned(&device, (5 + PADDING as usize) * width * 2);
        let (at, extent, delta_at) = (&step.addresses, &step.extent, add.then_some(d.address()));
        let (w, to) = (w.address(), out.address());
        rms_norm(&device, at, extent, x.address(), delta_at, w, EPS, width as u32, to).unwrap();
        if add {
            let sum = |(x, d): (&mut f32, &f32)| *x = half::bf16::from_f32(*x + d).to_f32();
            residual.iter_mut().zip(&delta).for_each(sum);
        }
        assert_eq!(support::download_bf16(&device, &x), residual, "width {width}");
        let found = support::download_bf16(&device, &out);
        let expected: Vec<f32> = residual.chunks_exact(width).flat_map(|x| norm(x, &weight)).collect();
        assert_close(&found[..5 * width], &expected, 1e-2, &format!("rms_norm, width {width}"));
        assert!(untouched(&found[5 * width..]));
    }
}

#[test]
fn an_empty_step_launches_nothing() {
    let Some(device) = support::device() else { return };
    let step = Paged::new(&[], 64, 2).upload(&device, &[], 0);
    rms_norm(&device, &step.addresses, &step.extent, 0, None, 0, EPS, 128, 0).unwrap();
    embed(&device, &step.addresses, &step.extent, 0, 1, 128, 0).unwrap();
    device.synchronize().unwrap();
}

#[test]
fn queries_turn_in_their_rotary_part_only() {
    let Some(device) = support::device() else { return };
    for heads in [4, 128] {
        let (nope, rope) = (128, 64);
        let paged = Paged::new(&ENTRIES, rope as u32, 6);
        let step = paged.upload(&device, &[0; 5], PADDING);
        let query = support::random_bf16(5 * heads * (nope + rope), 7);
        let expected: Vec<f32> = query
            .chunks_exact(heads * (nope + rope))
            .zip(paged.rows())
            .flat_map(|(row, (_, position))| row.chunks_exact(nope + rope).map(move |head| (head, position)))
            .flat_map(|(head, position)| [&head[..nope], &rotate(&head[nope..], position)].concat())
            .collect();
        let padded = [query, vec![f32::NAN; PADDING as usize * heads * (nope + rope)]].concat();
        let memory = support::upload_bf16(&device, &padded);
        let at = memory.address();
        rotate_query(&device, &step.addresses, &step.extent, at, heads as u32, nope as u32, rope as u32)
            .unwrap();
        let found = support::download_bf16(&device, &memory);
        assert_close(&found[..expected.len()], &expected, 1e-2, &format!("rotate_query, {heads} heads"));
        assert!(untouched(&found[expected.len()..]));
    }
}

#[test]
fn cache_rows_are_normed_rotated_and_placed_by_the_block_table() {
    let Some(device) = support::device() else { return };
    let (latent, rope, layers, layer) = (512, 64, 3, 1);
    for rank in [0, 64, 1536] {
        let width = rank + latent + rope;
        let paged = Paged::new(&ENTRIES, rope as u32, 8);
        let step = paged.upload(&device, &[0; 5], PADDING);
        let low = support::random_bf16(5 * width, 9);
        let (kv_norm, query_norm) = (support::random(latent, 10), support::random(rank, 11));
        let elements = (paged.blocks * layers * BLOCK_TOKENS) as usize * (latent + rope);
        let pool = support::poisoned(&device, elements * 2);
        let normed = support::poisoned(&device, (5 + PADDING as usize) * rank * 2);
        let low_memory = support::upload_bf16(&device, &low);
        let kv_norm_memory = support::upload_f32(&device, &kv_norm);
        let query_norm_memory = support::upload_f32(&device, &query_norm);
        let query = (rank > 0).then(|| LowQuery {
            rank: rank as u32,
            norm: query_norm_memory.address(),
            normed: normed.address(),
        });
        let to = PoolLayer {
            pool: pool.address(),
            layers,
            layer,
            block_tokens: BLOCK_TOKENS,
            latent: latent as u32,
            rope: rope as u32,
        };
        let (at, extent, weight) = (&step.addresses, &step.extent, kv_norm_memory.address());
        cache_write(&device, at, extent, low_memory.address(), width as u32, query, weight, EPS, &to)
            .unwrap();
        let mut found = support::download_bf16(&device, &pool);
        let mut expected_query = Vec::new();
        for ((entry, position), row) in paged.rows().into_iter().zip(low.chunks_exact(width)) {
            let (a, kv) = row.split_at(rank);
            expected_query.extend(norm(a, &query_norm));
            let expected = [norm(&kv[..latent], &kv_norm), rotate(&kv[latent..], position)].concat();
            let place = paged.place(entry, position, layers, layer) * (latent + rope);
            let written = &mut found[place..][..latent + rope];
            assert_close(written, &expected, 1e-2, &format!("cache rows, rank {rank}, position {position}"));
            written.fill(f32::NAN);
        }
        assert!(untouched(&found), "nothing else is written");
        if rank > 0 {
            let found = support::download_bf16(&device, &normed);
            assert_close(
                &found[..5 * rank],
                &expected_query,
                1e-2,
                &format!("low-rank queries, rank {rank}"),
            );
            assert!(untouched(&found[5 * rank..]));
        }
    }
}
