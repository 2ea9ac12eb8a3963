//! Both forms of attention against softmax in f64, over blocks in shuffled order and contexts that end inside of one.

use super::{
    paged::{BLOCK_TOKENS, Paged},
    support::{self, assert_close},
};
use kernels::cuda::{
    attention::{self, attend_absorbed, gather_context},
    device::{Device, Memory},
    direct::{Heads, Span, attend_direct},
    elementwise::PoolLayer,
};

const LATENT: usize = 512;
const ROPE: usize = 64;
const WIDTH: usize = LATENT + ROPE;
const HEAD: usize = 128;
const QUERY: usize = HEAD + ROPE;
const LAYERS: u32 = 2;
const LAYER: u32 = 1;
/// Makes some probabilities large and most small.
const SCALE: f32 = 0.3;
const PADDING: u32 = 2;

/// A pool in which nothing but the positions that rows may see is a number.
struct Cache {
    memory: Memory,
    values: Vec<f32>,
}

impl Cache {
    fn new(device: &Device, paged: &Paged) -> Cache {
        let mut values = vec![f32::NAN; (paged.blocks * LAYERS * BLOCK_TOKENS) as usize * WIDTH];
        for (entry, (start, rows)) in paged.entries.iter().enumerate() {
            let random = support::random_bf16((start + rows) as usize * WIDTH, 100 + entry as u64);
            for (position, row) in random.chunks_exact(WIDTH).enumerate() {
                let place = paged.place(entry, position as u32, LAYERS, LAYER) * WIDTH;
                values[place..][..WIDTH].copy_from_slice(row);
            }
        }
        Cache { memory: support::upload_bf16(device, &values), values }
    }

    fn layer(&self) -> PoolLayer {
        PoolLayer {
            pool: self.memory.address(),
            layers: LAYERS,
            layer: LAYER,
            block_tokens: BLOCK_TOKENS,
            latent: LATENT as u32,
            rope: ROPE as u32,
        }
    }

    fn row(&self, paged: &Paged, entry: usize, position: u32) -> &[f32] {
        &self.values[paged.place(entry, position, LAYERS, LAYER) * WIDTH..][..WIDTH]
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// `Σ_j softmax(scores)_j values_j`.
fn weighted(scores: &[f64], values: &[&[f32]]) -> Vec<f32> {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let total: f64 = powers.iter().sum();
    let mut out = vec![0.0; values[0].len()];
    for (power, values) in powers.iter().zip(values) {
        out.iter_mut().zip(*values).for_each(|(out, value)| *out += power / total * f64::from(*value));
    }
    out.into_iter().map(|value| value as f32).collect()
}

fn expected_absorbed(paged: &Paged, cache: &Cache, query: &[f32], heads: usize) -> Vec<f32> {
    let mut out = Vec::new();
    for ((entry, position), query) in paged.rows().into_iter().zip(query.chunks_exact(heads * WIDTH)) {
        let rows: Vec<&[f32]> = (0..=position).map(|position| cache.row(paged, entry, position)).collect();
        let latents: Vec<&[f32]> = rows.iter().map(|row| &row[..LATENT]).collect();
        for query in query.chunks_exact(WIDTH) {
            let scores: Vec<f64> = rows.iter().map(|row| f64::from(SCALE) * dot(query, row)).collect();
            out.extend(weighted(&scores, &latents));
        }
    }
    out
}

/// Output of all rows, and of the padding after them.
fn run_absorbed(
    device: &Device,
    paged: &Paged,
    cache: &Cache,
    query: &[f32],
    heads: usize,
    (max_context, padding): (u32, u32),
) -> Vec<f32> {
    let step = paged.upload(device, &vec![0; paged.rows().len()], padding);
    let query = support::upload_bf16(device, query);
    let rows = step.extent.rows;
    let out = support::poisoned(device, rows as usize * heads * LATENT * 2);
    let bytes = attention::absorbed_scratch_bytes(heads as u32, max_context, rows);
    let scratch = support::poisoned(device, bytes);
    attend_absorbed(
        device,
        &step.addresses,
        &step.extent,
        query.address(),
        &cache.layer(),
        heads as u32,
        max_context,
        SCALE,
        scratch.address(),
        out.address(),
    )
    .unwrap();
    support::download_bf16(device, &out)
}

fn check_absorbed(entries: &[(u32, u32)], heads: usize, max_context: u32) {
    let Some(device) = support::device() else { return };
    let paged = Paged::new(entries, ROPE as u32, 21);
    let cache = Cache::new(&device, &paged);
    let query = support::random_bf16(paged.rows().len() * heads * WIDTH, 22);
    let found = run_absorbed(&device, &paged, &cache, &query, heads, (max_context, PADDING));
    let expected = expected_absorbed(&paged, &cache, &query, heads);
    let row = heads * LATENT;
    for (index, (entry, position)) in paged.rows().into_iter().enumerate() {
        let what = format!("attend_absorbed, {heads} heads, entry {entry}, position {position}");
        assert_close(&found[index * row..][..row], &expected[index * row..][..row], 1e-2, &what);
    }
    assert!(found[expected.len()..].iter().all(|value| value.is_nan()), "padding is not written");
}

#[test]
fn absorbed_with_few_heads_and_several_splits() {
    check_absorbed(&[(0, 3), (63, 1), (64, 1), (100, 5), (511, 3), (1500, 2)], 4, 4096);
}

#[test]
fn absorbed_with_splits_longer_than_the_least() {
    check_absorbed(&[(17_000, 1), (9, 1), (16_383, 2)], 4, 32_768);
}

#[test]
fn absorbed_with_heads_that_do_not_fill_their_tiles() {
    for heads in [16, 20, 32, 70] {
        check_absorbed(&[(0, 1), (127, 2), (600, 1)], heads, 1024);
    }
}

#[test]
fn absorbed_with_128_heads() {
    check_absorbed(&[(0, 2), (70, 1), (577, 1)], 128, 163_840);
    check_absorbed(&[(4096, 1), (8200, 1), (63, 1), (64, 1), (128, 1)], 128, 16_384);
    check_absorbed(&[(0, 140), (1000, 1)], 64, 4096);
}

#[test]
fn absorbed_over_random_entries() {
    let mut below = support::dice(5);
    for _ in 0..12 {
        let entries: Vec<_> = (0..1 + below(6)).map(|_| (below(1500) as u32, 1 + below(5) as u32)).collect();
        check_absorbed(&entries, [4, 16, 17, 64, 128][below(5)], 4096);
    }
}

/// 128 heads and 32 splits leave room for 63 rows in a launch.
#[test]
fn absorbed_in_several_launches() {
    check_absorbed(&[(0, 60), (0, 1), (520, 3), (3, 6)], 128, 163_840);
}

#[test]
fn absorbed_rows_do_not_depend_on_their_neighbours() {
    for heads in [16, 128] {
        rows_alone_and_together(heads);
    }
}

/// In launches of the same size.
fn rows_alone_and_together(heads: usize) {
    let Some(device) = support::device() else { return };
    let entries = [(700, 2), (40, 1), (5000, 1)];
    let paged = Paged::new(&entries, ROPE as u32, 23);
    let cache = Cache::new(&device, &paged);
    let row = heads * WIDTH;
    let query = support::random_bf16(paged.rows().len() * row, 24);
    let together = run_absorbed(&device, &paged, &cache, &query, heads, (8192, PADDING));
    let mut first = 0;
    for (entry, (_, rows)) in entries.iter().enumerate() {
        let rows = *rows as usize;
        let alone = paged.only(entry);
        let found = run_absorbed(
            &device,
            &alone,
            &cache,
            &query[first * row..][..rows * row],
            heads,
            (8192, PADDING + (paged.rows().len() - rows) as u32),
        );
        let extent = rows * heads * LATENT;
        assert_eq!(found[..extent], together[first * heads * LATENT..][..extent], "entry {entry}");
        first += rows;
    }
}

#[test]
fn a_gathered_context_is_contiguous() {
    let Some(device) = support::device() else { return };
    let paged = Paged::new(&[(3, 2), (190, 11)], ROPE as u32, 25);
    let cache = Cache::new(&device, &paged);
    let step = paged.upload(&device, &[0; 13], 0);
    for (entry, context) in [(0, 5), (1, 201), (1, 0)] {
        let latent = support::poisoned(&device, (context + 1) * LATENT * 2);
        let rope = support::poisoned(&device, (context + 1) * ROPE * 2);
        let (to_latent, to_rope) = (latent.address(), rope.address());
        let (at, pool) = (&step.addresses, cache.layer());
        gather_context(&device, at, entry as u32, context as u32, &pool, to_latent, to_rope).unwrap();
        let (latent, rope) =
            (support::download_bf16(&device, &latent), support::download_bf16(&device, &rope));
        for position in 0..context {
            let row = cache.row(&paged, entry, position as u32);
            assert_eq!(latent[position * LATENT..][..LATENT], row[..LATENT]);
            assert_eq!(rope[position * ROPE..][..ROPE], row[LATENT..]);
        }
        let rest = latent[context * LATENT..].iter().chain(&rope[context * ROPE..]);
        assert!(rest.clone().all(|value| value.is_nan()));
    }
}

/// Rows of a span that lies after others in the step; three of six heads.
fn check_direct(start: u32, rows: u32) {
    let Some(device) = support::device() else { return };
    let heads = Heads { first: 2, count: 3, all: 6 };
    let (first_row, context) = (5, (start + rows) as usize);
    let step_rows = first_row + rows as usize + 1;
    let query = support::random_bf16(step_rows * 6 * QUERY, 31);
    let k = support::random_bf16(context * 3 * HEAD, 32);
    let v = support::random_bf16(context * 3 * HEAD, 33);
    let rope = support::random_bf16(context * ROPE, 34);
    let out = support::poisoned(&device, step_rows * 6 * HEAD * 2);
    let [q_at, k_at, v_at, rope_at] =
        [&query, &k, &v, &rope].map(|values| support::upload_bf16(&device, values));
    let span = Span { first_row: first_row as u32, rows, start };
    let [q, keys, values, turned] = [&q_at, &k_at, &v_at, &rope_at].map(Memory::address);
    attend_direct(&device, span, heads, q, keys, values, turned, SCALE, out.address()).unwrap();
    let mut found = support::download_bf16(&device, &out);
    let compared = if rows > 1000 { support::sampled(rows as usize) } else { (0..rows as usize).collect() };
    for row in compared.iter().copied() {
        for head in 0..3 {
            let at = (first_row + row) * 6 + 2 + head;
            let query = &query[at * QUERY..][..QUERY];
            let seen = 0..=start as usize + row;
            let of_head = |j: usize, of: &'_ [f32]| of[(j * 3 + head) * HEAD..][..HEAD].to_vec();
            let score = |j: usize| {
                let with_position = dot(&query[HEAD..], &rope[j * ROPE..][..ROPE]);
                f64::from(SCALE) * (dot(&query[..HEAD], &of_head(j, &k)) + with_position)
            };
            let scores: Vec<f64> = seen.clone().map(score).collect();
            let values: Vec<Vec<f32>> = seen.map(|j| of_head(j, &v)).collect();
            let values: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
            let found = &mut found[at * HEAD..][..HEAD];
            assert_close(
                found,
                &weighted(&scores, &values),
                1e-2,
                &format!("attend_direct, start {start}, row {row}"),
            );
            found.fill(f32::NAN);
        }
    }
    let written = found.chunks_exact(HEAD).filter(|head| head.iter().all(|value| value.is_finite())).count();
    let untouched = found.chunks_exact(HEAD).filter(|head| head.iter().all(|value| value.is_nan())).count();
    assert_eq!(written, (rows as usize - compared.len()) * 3, "rows that were not compared are written too");
    assert_eq!(written + untouched, step_rows * 6, "other rows and heads are not written");
}

#[test]
fn direct_from_the_first_position() {
    check_direct(0, 1);
    check_direct(0, 64);
    check_direct(0, 65);
    check_direct(0, 128);
    check_direct(0, 400);
}

/// As many rows as a step has at most, and as many behind a context of as many.
#[test]
fn direct_of_16384_rows() {
    check_direct(0, 16_384);
    check_direct(8_192, 8_192);
}

#[test]
fn direct_of_random_spans() {
    let mut below = support::dice(6);
    for _ in 0..12 {
        check_direct(below(400) as u32, 1 + below(300) as u32);
    }
}

#[test]
fn direct_behind_a_context() {
    check_direct(37, 100);
    check_direct(200, 130);
    check_direct(64, 1);
    check_direct(300, 257);
    check_direct(127, 129);
}
