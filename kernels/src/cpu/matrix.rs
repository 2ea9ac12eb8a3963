//! Matrix products. Every output element is one chain of fused multiply-adds over k, from 0 upwards, whatever the tile,
//! the thread, the batch or the machine; that makes the whole backend invariant. SIMD runs across outputs.

use super::lanes::{LANES, Lanes, Level, by_level};
use crate::{Error, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// Output columns in a panel.
pub const PANEL: usize = 64;
/// k is walked in runs of this length, so that a panel's run stays in the first caches while rows pass by.
const K_RUN: usize = 512;
/// Rows of one task.
const ROW_RUN: usize = 120;
/// Products with fewer multiply-adds run on the calling thread: handing out costs more.
const SMALL: usize = 1 << 16;

/// A weight matrix `W[n][k]` as panels `[n / 64][k][64]` of f32, zero-padded; aligned to cache lines.
pub struct Packed {
    storage: Vec<f32>,
    offset: usize,
    pub n: usize,
    pub k: usize,
}

impl Packed {
    fn zeroed(n: usize, k: usize) -> Packed {
        let storage = vec![0.0; n.div_ceil(PANEL) * PANEL * k + LANES];
        let offset = storage.as_ptr().align_offset(64);
        Packed { storage, offset: if offset < LANES { offset } else { 0 }, n, k }
    }

    /// The rows of `parts`, one after the other, are the rows of W.
    pub fn from_parts(parts: &[Tensor<'_>]) -> Result<Packed, Error> {
        let rows: Vec<_> = parts.iter().flat_map(|part| (0..part.rows).map(move |row| (part, row))).collect();
        Packed::gathered(&rows)
    }

    /// Rows `range` of `tensor` are the rows of W.
    pub fn from_rows(tensor: &Tensor<'_>, range: Range<usize>) -> Result<Packed, Error> {
        Packed::gathered(&range.map(|row| (tensor, row)).collect::<Vec<_>>())
    }

    fn gathered(rows: &[(&Tensor<'_>, usize)]) -> Result<Packed, Error> {
        let k = rows.first().map_or(0, |(tensor, _)| tensor.cols);
        let mut packed = Packed::zeroed(rows.len(), k);
        packed.panels_mut().enumerate().try_for_each(|(panel, out)| {
            let mut values = vec![0.0; k];
            for (column, (part, row)) in rows[panel * PANEL..].iter().take(PANEL).enumerate() {
                part.read_row(*row, &mut values)?;
                (0..k).for_each(|i| out[i * PANEL + column] = values[i]);
            }
            Ok(())
        })?;
        Ok(packed)
    }

    /// Rows `range` of `tensor` are the columns of W: `W[n][k] = tensor[range.start + k][n]`.
    pub fn from_columns(tensor: &Tensor<'_>, range: Range<usize>) -> Result<Packed, Error> {
        let mut packed = Packed::zeroed(tensor.cols, range.len());
        let (k, mut values) = (range.len(), vec![0.0; tensor.cols]);
        for (i, row) in range.enumerate() {
            tensor.read_row(row, &mut values)?;
            for (panel, columns) in values.chunks(PANEL).enumerate() {
                packed.values_mut()[(panel * k + i) * PANEL..][..columns.len()].copy_from_slice(columns);
            }
        }
        Ok(packed)
    }

    /// `W[n][k]`.
    pub fn at(&self, n: usize, k: usize) -> f32 {
        self.storage[self.offset + (n / PANEL * self.k + k) * PANEL + n % PANEL]
    }

    pub fn panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    fn panel(&self, index: usize) -> *const f32 {
        self.storage[self.offset + index * PANEL * self.k..].as_ptr()
    }

    fn values_mut(&mut self) -> &mut [f32] {
        let length = self.panels() * PANEL * self.k;
        &mut self.storage[self.offset..][..length]
    }

    fn panels_mut(&mut self) -> impl IndexedParallelIterator<Item = &mut [f32]> {
        let length = (PANEL * self.k).max(1);
        self.values_mut().par_chunks_exact_mut(length)
    }
}

/// Rows of a matrix in memory: where, how many, and how far apart.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub values: &'a [f32],
    pub stride: usize,
}

/// A matrix that tasks write disjoint tiles of.
#[derive(Clone, Copy)]
pub struct Out {
    pub start: *mut f32,
    pub stride: usize,
}

// SAFETY: whoever writes through it keeps to its own tile.
unsafe impl Send for Out {}
// SAFETY: the same.
unsafe impl Sync for Out {}

impl Out {
    /// `values` is borrowed for as long as the tasks run, by the caller's care.
    pub fn new(values: &mut [f32], stride: usize) -> Out {
        Out { start: values.as_mut_ptr(), stride }
    }

    pub fn skip(self, elements: usize) -> Out {
        // SAFETY: an offset within the matrix; checked where tiles are written.
        Out { start: unsafe { self.start.add(elements) }, stride: self.stride }
    }
}

/// `y[row] = W x[row]` for `rows` rows.
#[derive(Clone, Copy)]
pub struct Product<'a> {
    pub rows: usize,
    pub x: Rows<'a>,
    pub w: &'a Packed,
    pub y: Out,
}

/// A part of one product: some rows, some panels.
#[derive(Clone)]
struct Task {
    product: usize,
    rows: Range<usize>,
    panels: Range<usize>,
}

/// Runs products on the current pool.
///
/// # Safety
/// The `y` of all products must be disjoint, of extent `rows` × `w.n`, and not otherwise used.
pub unsafe fn multiply(level: Level, products: &[Product<'_>]) {
    let total: usize = products.iter().map(|p| p.rows * p.w.panels() * PANEL * p.w.k).sum();
    for product in products.iter().filter(|p| p.rows > 0) {
        let needed = (product.rows - 1) * product.x.stride + product.w.k;
        assert!(product.x.values.len() >= needed, "x has {} values, {needed} needed", product.x.values.len());
    }
    let threads = rayon::current_num_threads();
    let share =
        if total <= SMALL || threads == 1 { usize::MAX } else { (total / (threads * 4)).max(SMALL / 2) };
    let tasks: Vec<Task> =
        products.iter().enumerate().flat_map(|(i, product)| split(i, product, share)).collect();
    // SAFETY: tasks are disjoint tiles.
    let run = |task: &Task| unsafe { run_task(level, &products[task.product], task) };
    match tasks.as_slice() {
        tasks if share == usize::MAX => tasks.iter().for_each(run),
        tasks => tasks.par_iter().with_max_len(1).for_each(run),
    }
}

fn split(index: usize, product: &Product<'_>, share: usize) -> Vec<Task> {
    let panels = product.w.panels();
    let row_run = product.rows.min(ROW_RUN);
    let per_panel = (row_run * PANEL * product.w.k).max(1);
    let panel_run = (share / per_panel).clamp(1, panels.max(1));
    let starts = (0..product.rows).step_by(row_run.max(1));
    starts
        .flat_map(|row| (0..panels).step_by(panel_run).map(move |panel| (row, panel)))
        .map(|(row, panel)| Task {
            product: index,
            rows: row..(row + row_run).min(product.rows),
            panels: panel..(panel + panel_run).min(panels),
        })
        .collect()
}

unsafe fn run_task(level: Level, product: &Product<'_>, task: &Task) {
    let (rows, stride) = (task.rows.len(), product.x.stride);
    let x = &product.x.values[task.rows.start * stride..];
    for panel in task.panels.clone() {
        let columns = (product.w.n - panel * PANEL).min(PANEL);
        let y = product.y.skip(task.rows.start * product.y.stride + panel * PANEL);
        // SAFETY: x was checked, the panel is whole, y is the task's own.
        unsafe {
            if columns == PANEL {
                run_panel(level, rows, x.as_ptr(), stride, product.w, panel, y);
            } else {
                let mut padded = vec![0.0f32; rows * PANEL];
                run_panel(level, rows, x.as_ptr(), stride, product.w, panel, Out::new(&mut padded, PANEL));
                for (row, values) in padded.chunks_exact(PANEL).enumerate() {
                    std::ptr::copy_nonoverlapping(values.as_ptr(), y.start.add(row * y.stride), columns);
                }
            }
        }
    }
}

unsafe fn run_panel(level: Level, rows: usize, x: *const f32, ldx: usize, w: &Packed, panel: usize, y: Out) {
    let b = w.panel(panel);
    for start in (0..w.k.max(1)).step_by(K_RUN) {
        let k = (w.k - start).min(K_RUN);
        // SAFETY: the caller's; offsets stay within x's rows and the panel.
        unsafe { tiles(level, rows, PANEL, k, x.add(start), ldx, b.add(start * PANEL), PANEL, y, start > 0) }
    }
}

by_level! {
    /// `y[r][c] (+)= Σ_k x[r · ldx + k] · b[k · ldb + c]` for `rows` × `columns`, columns a multiple of [`LANES`]: the chain
    /// starts from 0, or goes on from y if `add`.
    ///
    /// # Safety
    /// All extents must lie within their allocations; y must not be used by others.
    pub fn tiles(rows: usize, columns: usize, k: usize, x: *const f32, ldx: usize, b: *const f32, ldb: usize, y: Out, add: bool)
        = tiles_kernel, avx512 (6, 4), narrow (6, 1)
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn tiles_kernel<L: Lanes, const R: usize, const C: usize>(
    rows: usize,
    columns: usize,
    k: usize,
    x: *const f32,
    ldx: usize,
    b: *const f32,
    ldb: usize,
    y: Out,
    add: bool,
) {
    let mut column = 0;
    // SAFETY: the caller's; every tile lies within rows × columns.
    unsafe {
        while column + C * LANES <= columns {
            column_of_tiles::<L, R, C>(rows, k, x, ldx, b.add(column), ldb, y.skip(column), add);
            column += C * LANES;
        }
        while column + LANES <= columns {
            column_of_tiles::<L, R, 1>(rows, k, x, ldx, b.add(column), ldb, y.skip(column), add);
            column += LANES;
        }
    }
}

/// All rows of `C × LANES` columns, R at a time, the rest in one smaller tile.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn column_of_tiles<L: Lanes, const R: usize, const C: usize>(
    rows: usize,
    k: usize,
    x: *const f32,
    ldx: usize,
    b: *const f32,
    ldb: usize,
    y: Out,
    add: bool,
) {
    let mut row = 0;
    // SAFETY: the caller's.
    unsafe {
        while row + R <= rows {
            tile::<L, R, C>(k, x.add(row * ldx), ldx, b, ldb, y.skip(row * y.stride), add);
            row += R;
        }
        let (x, y) = (x.add(row * ldx), y.skip(row * y.stride));
        match rows - row {
            0 => {}
            1 => tile::<L, 1, C>(k, x, ldx, b, ldb, y, add),
            2 => tile::<L, 2, C>(k, x, ldx, b, ldb, y, add),
            3 => tile::<L, 3, C>(k, x, ldx, b, ldb, y, add),
            4 => tile::<L, 4, C>(k, x, ldx, b, ldb, y, add),
            _ => tile::<L, 5, C>(k, x, ldx, b, ldb, y, add),
        }
    }
}

#[inline(always)]
unsafe fn tile<L: Lanes, const R: usize, const C: usize>(
    k: usize,
    x: *const f32,
    ldx: usize,
    b: *const f32,
    ldb: usize,
    y: Out,
    add: bool,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut acc = [[L::zero(); C]; R];
        if add {
            for (r, acc) in acc.iter_mut().enumerate() {
                for (c, acc) in acc.iter_mut().enumerate() {
                    *acc = L::load(y.start.add(r * y.stride + c * LANES));
                }
            }
        }
        for i in 0..k {
            let mut column = [L::zero(); C];
            for (c, column) in column.iter_mut().enumerate() {
                *column = L::load(b.add(i * ldb + c * LANES));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let value = L::splat(*x.add(r * ldx + i));
                for c in 0..C {
                    acc[c] = value.fma(column[c], acc[c]);
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (c, acc) in acc.iter().enumerate() {
                acc.store(y.start.add(r * y.stride + c * LANES));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values with all kinds of magnitudes, the same on every call.
    pub(crate) fn noise(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next() * (1.0 + 10.0 * next())).collect()
    }

    fn chain(x: &[f32], w: &[f32]) -> f32 {
        x.iter().zip(w).fold(0.0, |acc, (x, w)| x.mul_add(*w, acc))
    }

    #[test]
    fn every_element_is_one_chain_whatever_the_shape_level_and_threads() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        for (rows, n, k) in [(1, 1, 1), (1, 130, 700), (7, 64, 33), (250, 200, 96), (13, 576, 1100)] {
            let (x, w) = (noise(rows * k, 1), noise(n * k, 2));
            let bytes: Vec<u8> = w.iter().flat_map(|v| v.to_le_bytes()).collect();
            let tensor = Tensor {
                name: "w",
                dtype: crate::Dtype::F32,
                rows: n,
                cols: k,
                data: (&bytes).into(),
                scales: None,
            };
            let packed = Packed::from_parts(&[tensor]).unwrap();
            for level in Level::available() {
                let mut y = vec![f32::NAN; rows * n];
                let out = Out::new(&mut y, n);
                let product = Product { rows, x: Rows { values: &x, stride: k }, w: &packed, y: out };
                // SAFETY: one product, y is its own.
                pool.install(|| unsafe { multiply(level, &[product]) });
                for (i, found) in y.iter().enumerate() {
                    let expected = chain(&x[i / n * k..][..k], &w[i % n * k..][..k]);
                    assert_eq!(found.to_bits(), expected.to_bits(), "{level:?} {rows}x{n}x{k} element {i}");
                }
            }
        }
    }

    #[test]
    fn columns_and_rows_pack_the_same_matrix() {
        let bytes: Vec<u8> = noise(70 * 5, 3).iter().flat_map(|v| v.to_le_bytes()).collect();
        let tensor = Tensor {
            name: "w",
            dtype: crate::Dtype::F32,
            rows: 5,
            cols: 70,
            data: (&bytes).into(),
            scales: None,
        };
        let (rows, columns) =
            (Packed::from_parts(&[tensor]).unwrap(), Packed::from_columns(&tensor, 1..4).unwrap());
        assert_eq!((rows.n, rows.k, columns.n, columns.k), (5, 70, 70, 3));
        assert!((0..70).all(|c| (0..3).all(|r| columns.at(c, r) == rows.at(r + 1, c))));
    }
}
