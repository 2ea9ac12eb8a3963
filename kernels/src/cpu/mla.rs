//! Projections of MLA: from hidden rows to queries and cache rows, into the latent space and out of it.

use super::{
    Buffer, Level, Mla, Query, Rounding, Step,
    elementwise::{rms_norm, rotate},
    matrix::{Out, Product, Rows, multiply},
    pool::KvPool,
};
use crate::Shape;
use rayon::prelude::*;

/// Elements below which rows are not worth handing out.
const SMALL: usize = 1 << 14;

impl Mla {
    /// Of the low-rank query; 0: none.
    pub fn rank(&self) -> usize {
        match &self.query {
            Query::Direct(_) => 0,
            Query::LowRank { norm, .. } => norm.len(),
        }
    }
}

/// [`crate::Backend::mla_project`] in parts.
pub struct Projection<'a> {
    pub level: Level,
    pub rounding: Rounding,
    pub shape: &'a Shape,
    pub weights: &'a Mla,
    pub step: &'a Step,
}

impl Projection<'_> {
    /// Everything that multiplies x.
    pub fn first(&self, x: &Buffer, low: &mut [f32], query: &mut Buffer) {
        let rows = self.step.rows();
        let fp8 = self.weights.low.fp8;
        let rounded = self.rounding.inputs(x.rows(rows), x.width, fp8);
        let x = Rows { values: rounded.as_deref().unwrap_or(x.rows(rows)), stride: x.width };
        let mut products = vec![Product {
            rows,
            x,
            w: &self.weights.low.packed,
            y: Out::new(low, self.weights.low.packed.n),
        }];
        if let Query::Direct(q) = &self.weights.query {
            let stride = query.width;
            products.push(Product { rows, x, w: &q.packed, y: Out::new(query.rows_mut(rows), stride) });
        }
        // SAFETY: outputs are distinct.
        unsafe { multiply(self.level, &products) };
        self.rounding.results(low);
    }

    /// The query from its low-rank form.
    pub fn second(&self, low: &[f32], normed: &mut [f32], query: &mut Buffer) {
        let rows = self.step.rows();
        if let Query::LowRank { norm, b } = &self.weights.query {
            let rank = norm.len();
            let norm_row = |(low, normed): (&[f32], &mut [f32])| {
                // SAFETY: the level was detected; all slices have the rank's length.
                unsafe { rms_norm(self.level, &low[..rank], norm, self.weights.eps, normed) }
            };
            let lows = low.par_chunks_exact(self.weights.low.packed.n);
            lows.zip(normed.par_chunks_exact_mut(rank)).with_min_len(1 + SMALL / rank).for_each(norm_row);
            self.rounding.results(normed);
            let rounded = self.rounding.inputs(normed, rank, b.fp8);
            let x = Rows { values: rounded.as_deref().unwrap_or(normed), stride: rank };
            let stride = query.width;
            let y = Out::new(query.rows_mut(rows), stride);
            // SAFETY: one product.
            unsafe { multiply(self.level, &[Product { rows, x, w: &b.packed, y }]) };
        }
        self.rounding.results(query.rows_mut(rows));
    }

    pub fn rotate_queries(&self, query: &mut Buffer) {
        let (width, nope, rows) = (self.shape.query(), self.shape.nope as usize, self.step.rows());
        let row_width = query.width;
        let row = |(index, row): (usize, &mut [f32])| {
            row.chunks_exact_mut(width).for_each(|head| rotate(&mut head[nope..], self.angles(index)));
        };
        let chunks = query.rows_mut(rows).par_chunks_exact_mut(row_width);
        chunks.enumerate().with_min_len(1 + SMALL / row_width).for_each(row);
        self.rounding.results(query.rows_mut(rows));
    }

    pub fn write_cache(&self, layer: usize, low: &[f32], pool: &mut KvPool) {
        let (rank, latent, width) =
            (self.weights.rank(), self.shape.latent as usize, self.weights.low.packed.n);
        for entry in &self.step.entries {
            for (index, position) in entry.rows.clone().zip(entry.start as usize..) {
                let (block, token) = (position / pool.block_tokens(), position % pool.block_tokens());
                let row = &low[index * width..][rank..width];
                let cached = pool.row_mut(entry.block_table[block], layer, token);
                let (c, kr) = cached.split_at_mut(latent);
                // SAFETY: the level was detected; all slices have the latent's length.
                unsafe { rms_norm(self.level, &row[..latent], &self.weights.kv_norm, self.weights.eps, c) };
                kr.copy_from_slice(&row[latent..]);
                rotate(kr, self.angles(index));
                self.rounding.results(cached);
            }
        }
    }

    fn angles(&self, row: usize) -> &[(f32, f32)] {
        let pairs = self.shape.rope_frequencies.len();
        &self.step.angles[row * pairs..][..pairs]
    }
}

/// `absorbed[t][head] = W_UK[head]ᵀ q_nope | q_rope`.
pub fn absorb(level: Level, shape: &Shape, weights: &Mla, query: &[f32], absorbed: &mut [f32]) {
    let (heads, nope, latent) = (shape.heads as usize, shape.nope as usize, shape.latent as usize);
    let (from, to) = (shape.query(), shape.row());
    let rows = query.len() / (heads * from);
    for (query, absorbed) in query.chunks_exact(from).zip(absorbed.chunks_exact_mut(to)) {
        absorbed[latent..].copy_from_slice(&query[nope..]);
    }
    let y = Out::new(absorbed, heads * to);
    let product = |(head, w)| Product {
        rows,
        x: Rows { values: &query[head * from..], stride: heads * from },
        w,
        y: y.skip(head * to),
    };
    let products: Vec<_> = weights.key.iter().enumerate().map(product).collect();
    // SAFETY: every head has its own columns.
    unsafe { multiply(level, &products) }
}

/// `out[t][head] = W_UV[head] · summed[t][head]`.
pub fn values(level: Level, shape: &Shape, weights: &Mla, summed: &[f32], out: &mut [f32]) {
    let (heads, latent, value) = (shape.heads as usize, shape.latent as usize, shape.value as usize);
    let rows = summed.len() / (heads * latent);
    let y = Out::new(out, heads * value);
    let product = |(head, w)| Product {
        rows,
        x: Rows { values: &summed[head * latent..], stride: heads * latent },
        w,
        y: y.skip(head * value),
    };
    let products: Vec<_> = weights.value.iter().enumerate().map(product).collect();
    // SAFETY: every head has its own columns.
    unsafe { multiply(level, &products) }
}
