//! Dense MLP, and the mixture of experts: rows are gathered per expert, each expert runs once over its rows, the results
//! are added per row in slot order.

use super::{
    elementwise::{add_scaled, silu_mul},
    gate::Routing,
    lanes::Level,
    matrix::{Out, Packed, Product, Rows, multiply},
    rounding::Rounding,
};
use rayon::prelude::*;

/// A matrix and whether the checkpoint holds it in FP8, for [`Rounding`].
pub struct Linear {
    pub packed: Packed,
    pub fp8: bool,
}

/// Gate rows over up rows in `gate_up`.
#[derive(Clone, Copy)]
pub struct Mlp<'a> {
    pub gate_up: &'a Linear,
    pub down: &'a Linear,
}

/// One MLP over `rows` consecutive rows of gathered inputs and outputs.
struct Part<'a> {
    mlp: Mlp<'a>,
    start: usize,
    rows: usize,
}

pub struct FeedForward {
    pub level: Level,
    pub rounding: Rounding,
    pub hidden: usize,
}

impl FeedForward {
    /// `out[t] = mlp(x[t])`.
    pub fn dense(&self, x: &[f32], mlp: Mlp<'_>, out: &mut [f32]) {
        let rows = x.len() / self.hidden;
        self.parts(x, &[Part { mlp, start: 0, rows }], out);
    }

    /// `out[t] = Σ_slot weight · expert(x[t]) + shared(x[t])`.
    pub fn sparse(
        &self,
        x: &[f32],
        routing: &Routing,
        experts: &[(Linear, Linear)],
        shared: Option<Mlp<'_>>,
        out: &mut [f32],
    ) {
        let (rows, slots) = (x.len() / self.hidden, routing.experts.len());
        let (starts, place) = place(routing, experts.len());
        let mut parts: Vec<Part<'_>> = experts
            .iter()
            .zip(starts.windows(2))
            .filter(|(_, range)| range[0] < range[1])
            .map(|((gate_up, down), range)| Part {
                mlp: Mlp { gate_up, down },
                start: range[0],
                rows: range[1] - range[0],
            })
            .collect();
        parts.extend(shared.map(|mlp| Part { mlp, start: slots, rows }));
        let total = slots + shared.map_or(0, |_| rows);
        let inputs = self.gather(x, routing.top_k, &place, total);
        let mut outputs = vec![0.0; total * self.hidden];
        self.parts(&inputs, &parts, &mut outputs);
        let shared = &outputs[slots * self.hidden..];
        out.par_chunks_mut(self.hidden).enumerate().for_each(|(row, out)| {
            out.fill(0.0);
            for slot in row * routing.top_k..(row + 1) * routing.top_k {
                let values = &outputs[place[slot] * self.hidden..][..self.hidden];
                // SAFETY: the level was detected; slices have one length.
                unsafe { add_scaled(self.level, out, values, routing.weights[slot]) }
            }
            if let Some(shared) = shared.get(row * self.hidden..(row + 1) * self.hidden) {
                out.iter_mut().zip(shared).for_each(|(out, value)| *out += value);
            }
        });
        self.rounding.results(out);
    }

    /// Copies of rows in the order of their experts, then all rows once more for the shared expert.
    fn gather(&self, x: &[f32], top_k: usize, place: &[usize], total: usize) -> Vec<f32> {
        let mut inputs = vec![0.0; total * self.hidden];
        for (slot, place) in place.iter().enumerate() {
            inputs[place * self.hidden..][..self.hidden]
                .copy_from_slice(&x[slot / top_k * self.hidden..][..self.hidden]);
        }
        let rest = &mut inputs[place.len() * self.hidden..];
        let shared = rest.len();
        rest.copy_from_slice(&x[..shared]);
        inputs
    }

    /// Three passes over all parts: gate and up, their activation, down.
    fn parts(&self, x: &[f32], parts: &[Part<'_>], out: &mut [f32]) {
        let widths: Vec<usize> = parts.iter().map(|part| part.mlp.down.packed.k).collect();
        let mut both = buffers(parts, &widths, 2);
        self.products(
            parts,
            |part| (&x[part.start * self.hidden..][..part.rows * self.hidden], self.hidden, part.mlp.gate_up),
            &mut both,
        );
        let mut inner = buffers(parts, &widths, 1);
        for ((both, inner), width) in both.iter().zip(&mut inner).zip(&widths) {
            self.activate(both, inner, *width);
        }
        let mut outs = split_out(out, parts, self.hidden);
        let inner: Vec<(&[f32], usize, &Linear)> = parts
            .iter()
            .zip(&inner)
            .zip(&widths)
            .map(|((part, inner), width)| (inner.as_slice(), *width, part.mlp.down))
            .collect();
        self.run(&inner, &mut outs);
    }

    fn products<'a>(
        &self,
        parts: &'a [Part<'a>],
        input: impl Fn(&'a Part<'a>) -> (&'a [f32], usize, &'a Linear),
        out: &mut [Vec<f32>],
    ) {
        let inputs: Vec<_> = parts.iter().map(input).collect();
        let mut outs: Vec<&mut [f32]> = out.iter_mut().map(Vec::as_mut_slice).collect();
        self.run(&inputs, &mut outs);
    }

    /// One product for each (x, width, weight), into the output of the same index.
    fn run(&self, inputs: &[(&[f32], usize, &Linear)], outs: &mut [&mut [f32]]) {
        let rounded: Vec<Option<Vec<f32>>> =
            inputs.iter().map(|(x, width, linear)| self.rounding.inputs(x, *width, linear.fp8)).collect();
        let products: Vec<Product<'_>> = inputs
            .iter()
            .zip(&rounded)
            .zip(outs.iter_mut())
            .map(|(((x, width, linear), rounded), out)| Product {
                rows: x.len() / width,
                x: Rows { values: rounded.as_deref().unwrap_or(x), stride: *width },
                w: &linear.packed,
                y: Out::new(out, linear.packed.n),
            })
            .collect();
        // SAFETY: every product has an output of its own, of its extent.
        unsafe { multiply(self.level, &products) };
        outs.iter_mut().for_each(|out| self.rounding.results(out));
    }

    fn activate(&self, both: &[f32], inner: &mut [f32], width: usize) {
        let row = |(both, inner): (&[f32], &mut [f32])| {
            // SAFETY: the level was detected; slices have one length.
            unsafe { silu_mul(self.level, &both[..width], &both[width..], inner) }
        };
        both.par_chunks_exact(2 * width)
            .zip(inner.par_chunks_exact_mut(width))
            .with_min_len(1 + 8192 / width)
            .for_each(row);
        self.rounding.results(inner);
    }
}

/// `rows × times × width` for every part.
fn buffers(parts: &[Part<'_>], widths: &[usize], times: usize) -> Vec<Vec<f32>> {
    parts.iter().zip(widths).map(|(part, width)| vec![0.0; part.rows * times * width]).collect()
}

/// The rows of each part; parts lie in order and cover `out`.
fn split_out<'a>(mut out: &'a mut [f32], parts: &[Part<'_>], hidden: usize) -> Vec<&'a mut [f32]> {
    let mut split = Vec::with_capacity(parts.len());
    for part in parts {
        let (own, rest) = out.split_at_mut(part.rows * hidden);
        split.push(own);
        out = rest;
    }
    split
}

/// First gathered row of every expert (and the end), and the gathered row of every slot: by expert, then by row.
fn place(routing: &Routing, experts: usize) -> (Vec<usize>, Vec<usize>) {
    let mut starts = vec![0; experts + 1];
    routing.experts.iter().for_each(|expert| starts[*expert as usize + 1] += 1);
    (0..experts).for_each(|expert| starts[expert + 1] += starts[expert]);
    let mut next = starts.clone();
    let take = |expert: &u32| {
        let place = next[*expert as usize];
        next[*expert as usize] += 1;
        place
    };
    (starts, routing.experts.iter().map(take).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_placed_by_expert_then_by_row() {
        let routing = Routing { top_k: 2, experts: vec![2, 0, 0, 2, 1, 2], weights: vec![1.0; 6] };
        assert_eq!(place(&routing, 4), (vec![0, 2, 3, 6, 6], vec![3, 0, 1, 4, 2, 5]));
    }
}
