//! MLA attention over the block pool, absorbed form. For one query vector: scores are 16-lane dot products with the cache
//! rows, the softmax sums in 16 lanes by absolute position, values are added in the order of positions. Nothing depends
//! on which other vectors are near.

use super::{
    lanes::{LANES, Lanes, Level, by_level, halve},
    matrix::{Out, tiles},
    pool::KvPool,
    rounding::{Rounding, bf16},
};
use crate::math::exp_f32;
use rayon::prelude::*;
use std::{cell::RefCell, ops::Range};

/// Query vectors of one task: enough to use a cache block many times, few enough for their scores to stay in cache.
const TASK_VECTORS: usize = 64;
/// Positions up to which one thread does it all.
const SMALL: usize = 128;
/// Blocks and columns that a thread takes at least when several share a task.
const MIN_BLOCKS: usize = 2;
const MIN_COLUMNS: usize = 64;

/// Queries of one sequence, consecutive positions.
pub struct Span<'a> {
    /// Rows in the step.
    pub rows: Range<usize>,
    /// Position of the first row.
    pub start: usize,
    pub table: &'a [u32],
}

/// What attention reads and writes.
pub struct Attention<'a> {
    pub level: Level,
    pub rounding: Rounding,
    pub pool: &'a KvPool,
    pub layer: usize,
    pub heads: usize,
    /// Of the cache row, the leading part that is the value too.
    pub latent: usize,
    pub scale: f32,
    /// `[T][heads][latent + rope]`.
    pub query: &'a [f32],
    /// `[T][heads][latent]`.
    pub out: Out,
}

thread_local! {
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl Attention<'_> {
    /// Runs all spans on the current pool: a task per thread, or all threads on one task after the other if there are
    /// too few of them. Vectors of a task are its rows' heads, one after the other.
    pub fn run(&self, spans: &[Span<'_>]) {
        let run = (TASK_VECTORS / self.heads).max(1);
        let tasks: Vec<Span<'_>> = spans.iter().flat_map(|span| span.split(run)).collect();
        let threads = rayon::current_num_threads();
        if tasks.len() >= threads {
            let alone = |task: &Span<'_>| SCORES.with_borrow_mut(|scores| self.run_alone(task, scores));
            tasks.par_iter().with_max_len(1).for_each(alone);
        } else {
            let mut scores = Vec::new();
            for task in &tasks {
                match task.context() <= SMALL {
                    true => self.run_alone(task, &mut scores),
                    false => self.run_together(task, &mut scores, threads),
                }
            }
        }
    }

    fn run_alone(&self, task: &Span<'_>, scores: &mut Vec<f32>) {
        let (scores, stride) = self.scores(task, scores);
        let blocks = 0..task.context().div_ceil(self.pool.block_tokens());
        self.score(task, blocks, Out::new(scores, stride));
        let sums: Vec<f32> = scores.chunks_exact_mut(stride).map(|row| self.softmax(row)).collect();
        self.add_values(task, 0..self.latent, scores, stride);
        self.normalize(task, &sums);
    }

    /// The same, each step by several threads: scores by blocks, values by columns. No sum is divided among them.
    fn run_together(&self, task: &Span<'_>, scores: &mut Vec<f32>, threads: usize) {
        let (scores, stride) = self.scores(task, scores);
        let blocks = task.context().div_ceil(self.pool.block_tokens());
        let out = Out::new(scores, stride);
        pieces(blocks, MIN_BLOCKS, threads * 2)
            .into_par_iter()
            .for_each(|blocks| self.score(task, blocks, out));
        let sums: Vec<f32> = scores.par_chunks_exact_mut(stride).map(|row| self.softmax(row)).collect();
        let scores = &*scores;
        let columns = pieces(self.latent, MIN_COLUMNS, threads);
        columns.into_par_iter().for_each(|columns| self.add_values(task, columns, scores, stride));
        self.normalize(task, &sums);
    }

    /// `[vectors][stride]`, all −∞; the stride is the context, rounded up to whole lanes.
    fn scores<'a>(&self, task: &Span<'_>, scores: &'a mut Vec<f32>) -> (&'a mut [f32], usize) {
        let stride = task.context().next_multiple_of(LANES);
        scores.clear();
        scores.resize(task.rows.len() * self.heads * stride, f32::NEG_INFINITY);
        (scores, stride)
    }

    /// `scores[vector][position]` for all positions of `blocks` that the vector may see.
    fn score(&self, task: &Span<'_>, blocks: Range<usize>, scores: Out) {
        let width = self.pool.row();
        for (first, tokens, block) in self.blocks(task, blocks) {
            for row in task.rows.clone() {
                let visible = task.visible(row, first).min(tokens);
                let query = &self.query[row * self.heads * width..][..self.heads * width];
                let out = scores.skip((row - task.rows.start) * self.heads * scores.stride + first);
                assert!(first + visible <= scores.stride && block.len() >= visible * width);
                // SAFETY: extents as asserted; blocks are disjoint columns of the scores.
                unsafe {
                    dots(
                        self.level,
                        self.heads,
                        query.as_ptr(),
                        visible,
                        block.as_ptr(),
                        width,
                        self.scale,
                        out,
                    )
                }
            }
        }
    }

    /// Scores become `exp(s − max)`; gives their sum. The length is a multiple of [`LANES`].
    fn softmax(&self, row: &mut [f32]) -> f32 {
        let mut sum = 0.0;
        // SAFETY: plain slices.
        unsafe { softmax(self.level, row, &mut sum) };
        if self.rounding != Rounding::None {
            row.iter_mut().for_each(|p| *p = bf16(*p));
        }
        sum
    }

    /// `out[vector][columns] = Σ_position p · c`, block after block.
    fn add_values(&self, task: &Span<'_>, columns: Range<usize>, scores: &[f32], stride: usize) {
        let width = self.pool.row();
        let all = 0..task.context().div_ceil(self.pool.block_tokens());
        let whole = columns.start + columns.len() / LANES * LANES;
        for (first, tokens, block) in self.blocks(task, all) {
            for rows in task.runs_of_equal_view(first, tokens) {
                let visible = task.visible(rows.start, first).min(tokens);
                let vectors = rows.len() * self.heads;
                let p = &scores[(rows.start - task.rows.start) * self.heads * stride + first..];
                let (block, add) = (&block[..visible * width], first > 0);
                let out = self.out.skip(rows.start * self.heads * self.latent);
                assert!(p.len() >= (vectors - 1) * stride + visible);
                // SAFETY: extents as asserted; rows and columns are this task's own.
                unsafe {
                    let (level, start) = (self.level, columns.start);
                    let b = block[start..].as_ptr();
                    tiles(
                        level,
                        vectors,
                        whole - start,
                        visible,
                        p.as_ptr(),
                        stride,
                        b,
                        width,
                        out.skip(start),
                        add,
                    );
                    rest(vectors, whole..columns.end, p, stride, block, width, out, add);
                }
            }
        }
    }

    fn normalize(&self, task: &Span<'_>, sums: &[f32]) {
        for (vector, sum) in sums.iter().enumerate() {
            let start = (task.rows.start * self.heads + vector) * self.latent;
            // SAFETY: the task's own rows.
            let out = unsafe { std::slice::from_raw_parts_mut(self.out.skip(start).start, self.latent) };
            let inverse = 1.0 / sum;
            out.iter_mut().for_each(|value| *value *= inverse);
            if self.rounding != Rounding::None {
                out.iter_mut().for_each(|value| *value = bf16(*value));
            }
        }
    }

    /// First position, tokens and rows of those blocks of a task.
    fn blocks(&self, task: &Span<'_>, range: Range<usize>) -> impl Iterator<Item = (usize, usize, &[f32])> {
        let (size, context) = (self.pool.block_tokens(), task.context());
        let blocks = range.clone().zip(&task.table[range]);
        blocks.map(move |(index, block)| {
            let first = index * size;
            (first, size.min(context - first), self.pool.block(*block, self.layer))
        })
    }
}

impl<'a> Span<'a> {
    /// Pieces of at most `run` rows.
    fn split(&self, run: usize) -> impl Iterator<Item = Span<'a>> {
        self.rows.clone().step_by(run).map(move |row| Span {
            rows: row..(row + run).min(self.rows.end),
            start: self.start + row - self.rows.start,
            table: self.table,
        })
    }

    /// Positions that the last row sees.
    fn context(&self) -> usize {
        self.start + self.rows.len()
    }

    /// Tokens from position `first` on that `row` may see.
    fn visible(&self, row: usize, first: usize) -> usize {
        (self.start + row - self.rows.start + 1).saturating_sub(first)
    }

    /// Runs of rows that see equally many of the `tokens` from `first`: all, or each row its own number.
    fn runs_of_equal_view(&self, first: usize, tokens: usize) -> impl Iterator<Item = Range<usize>> {
        let whole =
            self.rows.clone().find(|row| self.visible(*row, first) >= tokens).unwrap_or(self.rows.end);
        let partial =
            (self.rows.start..whole).filter(move |row| self.visible(*row, first) > 0).map(|row| row..row + 1);
        partial.chain((whole < self.rows.end).then_some(whole..self.rows.end))
    }
}

/// `0..count` in at most `most` pieces of at least `least`, multiples of it but for the last.
fn pieces(count: usize, least: usize, most: usize) -> Vec<Range<usize>> {
    let step = count.div_ceil(most).next_multiple_of(least);
    (0..count).step_by(step).map(|start| start..(start + step).min(count)).collect()
}

/// Columns that no vector covers, element by element.
///
/// # Safety
/// As for [`tiles`].
#[allow(clippy::too_many_arguments)]
unsafe fn rest(
    vectors: usize,
    columns: Range<usize>,
    p: &[f32],
    stride: usize,
    block: &[f32],
    width: usize,
    out: Out,
    add: bool,
) {
    for vector in 0..vectors {
        for column in columns.clone() {
            // SAFETY: the caller's.
            let out = unsafe { &mut *out.start.add(vector * out.stride + column) };
            let start = if add { *out } else { 0.0 };
            let rows = block.chunks_exact(width).enumerate();
            *out = rows.fold(start, |acc, (j, row)| p[vector * stride + j].mul_add(row[column], acc));
        }
    }
}

by_level! {
    /// `out[v][t] = scale · (q[v] · k[t])`, rows of q and k `width` long: lane `i mod 16` sums in order, then the lanes are
    /// summed by halving.
    ///
    /// # Safety
    /// All extents must lie within their allocations; out must not be used by others.
    fn dots(vectors: usize, q: *const f32, tokens: usize, k: *const f32, width: usize, scale: f32, out: Out)
        = dots_kernel, avx512 (4, 4), narrow (2, 2)
}

/// Queries that stay in the first cache, with a tile of keys, while the keys of a block pass by.
const RESIDENT: usize = 12;

#[inline(always)]
unsafe fn dots_kernel<L: Lanes, const V: usize, const T: usize>(
    vectors: usize,
    q: *const f32,
    tokens: usize,
    k: *const f32,
    width: usize,
    scale: f32,
    out: Out,
) {
    for start in (0..vectors).step_by(RESIDENT) {
        let count = RESIDENT.min(vectors - start);
        let mut token = 0;
        // SAFETY: the caller's.
        unsafe {
            let (q, out) = (q.add(start * width), out.skip(start * out.stride));
            while token + T <= tokens {
                column_of_dots::<L, V, T>(count, q, k.add(token * width), width, scale, out.skip(token));
                token += T;
            }
            while token < tokens {
                column_of_dots::<L, V, 1>(count, q, k.add(token * width), width, scale, out.skip(token));
                token += 1;
            }
        }
    }
}

/// All vectors with T tokens.
#[inline(always)]
unsafe fn column_of_dots<L: Lanes, const V: usize, const T: usize>(
    vectors: usize,
    q: *const f32,
    k: *const f32,
    width: usize,
    scale: f32,
    out: Out,
) {
    let mut vector = 0;
    // SAFETY: the caller's.
    unsafe {
        while vector + V <= vectors {
            dot_tile::<L, V, T>(q.add(vector * width), k, width, scale, out.skip(vector * out.stride));
            vector += V;
        }
        while vector < vectors {
            dot_tile::<L, 1, T>(q.add(vector * width), k, width, scale, out.skip(vector * out.stride));
            vector += 1;
        }
    }
}

#[inline(always)]
unsafe fn dot_tile<L: Lanes, const V: usize, const T: usize>(
    q: *const f32,
    k: *const f32,
    width: usize,
    scale: f32,
    out: Out,
) {
    // SAFETY: the caller's; the last, partial vector is read through padded copies.
    unsafe {
        let mut acc = [[L::zero(); T]; V];
        let mut i = 0;
        while i + LANES <= width {
            let mut keys = [L::zero(); T];
            for (t, key) in keys.iter_mut().enumerate() {
                *key = L::load(k.add(t * width + i));
            }
            for (v, acc) in acc.iter_mut().enumerate() {
                let query = L::load(q.add(v * width + i));
                for t in 0..T {
                    acc[t] = query.fma(keys[t], acc[t]);
                }
            }
            i += LANES;
        }
        for (v, acc) in acc.iter_mut().enumerate() {
            for (t, acc) in acc.iter_mut().enumerate() {
                if i < width {
                    let (query, key) =
                        (padded(q.add(v * width + i), width - i), padded(k.add(t * width + i), width - i));
                    *acc = L::load(query.as_ptr()).fma(L::load(key.as_ptr()), *acc);
                }
                *out.start.add(v * out.stride + t) = acc.sum() * scale;
            }
        }
    }
}

unsafe fn padded(from: *const f32, count: usize) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    // SAFETY: the caller's: `count` elements, fewer than LANES.
    unsafe { std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), count) };
    lanes
}

by_level! {
    /// See [`Attention::softmax`].
    ///
    /// # Safety
    /// None beyond the level's.
    fn softmax(row: &mut [f32], sum: &mut f32) = softmax_kernel, avx512 (0, 0), narrow (0, 0)
}

#[inline(always)]
unsafe fn softmax_kernel<L: Lanes, const A: usize, const B: usize>(row: &mut [f32], sum: &mut f32) {
    let mut largest = [f32::NEG_INFINITY; LANES];
    for values in row.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            largest[lane] = if values[lane] > largest[lane] { values[lane] } else { largest[lane] };
        }
    }
    let largest = largest.iter().fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a });
    let mut sums = [0.0; LANES];
    for values in row.as_chunks_mut::<LANES>().0 {
        for lane in 0..LANES {
            values[lane] = exp_f32(values[lane] - largest);
            sums[lane] += values[lane];
        }
    }
    *sum = halve(sums);
}
