//! Operations over the rows of a step that take several launches: products with their quantisation, MLPs, routed experts.

use super::{
    attention::Heads,
    backend::Routing,
    device::{Address, Device},
    linear::{self, Batch, Input, Matrix, Output, Runs},
    memory::Prepared,
    moe,
    step::Step,
    weights::{Experts, Linear, Matrices},
};
use crate::{Error, Shape};

/// Rows of a step: how many a launch covers, and where the device finds how many there are.
#[derive(Clone, Copy)]
pub struct Launch {
    pub count: Address,
    pub most: u32,
    pub max: usize,
}

impl Launch {
    pub fn rows(prepared: &Prepared, step: &Step) -> Launch {
        Launch { count: prepared.step.addresses.counts, most: step.extent.rows, max: prepared.max_rows() }
    }

    pub fn runs(&self) -> Runs {
        Runs::Count { count: self.count, most: self.most }
    }

    /// As `matrix` takes its input: quantised, if it is FP8. There are `per` rows for each of the step's.
    pub fn input(
        &self,
        device: &Device,
        prepared: &mut Prepared,
        x: Address,
        matrix: Matrix,
        per: u32,
    ) -> Result<Input, Error> {
        let k = matrix.k;
        if matrix.scales.is_none() {
            return Ok(bf16(x, k));
        }
        let rows = self.max * per as usize;
        let values = prepared.room(device, "e4m3", rows * k as usize)?;
        let scales = prepared.room(device, "e4m3 scales", 4 * rows * k.div_ceil(128) as usize)?;
        linear::quantize(device, self.count, per, self.most * per, x, k, k, values, scales)?;
        Ok(Input { values, scales: Some(scales), stride: k, gather: None })
    }

    pub fn linear(
        &self,
        device: &Device,
        prepared: &mut Prepared,
        x: Address,
        weight: &Linear,
        out: Address,
    ) -> Result<(), Error> {
        let input = self.input(device, prepared, x, weight.matrix(), 1)?;
        let output = Output { values: out, stride: weight.n, f32: false };
        linear::linear(device, weight.matrix(), input, output, self.runs(), Batch::ONE)
    }

    /// A bf16 matrix for each head: (weights, columns in, their stride), then (columns out, their stride).
    pub fn heads(
        &self,
        device: &Device,
        shape: &Shape,
        (weights, k, from): (Address, u32, usize),
        x: Address,
        (n, to): (u32, usize),
        out: Address,
    ) -> Result<(), Error> {
        let (heads, from, to) = (shape.heads, from as u32, to as u32);
        let matrix = Matrix { weights, scales: None, n, k };
        let input = Input { stride: heads * from, ..bf16(x, k) };
        let output = Output { values: out, stride: heads * to, f32: false };
        let batch = Batch { count: heads, weights: 2 * n * k, input: 2 * from, output: to };
        linear::linear(device, matrix, input, output, self.runs(), batch)
    }

    /// Latent rows to rows of some heads: `[rows][heads.count][n]`, by matrices `[heads.all][n][latent]`.
    #[allow(clippy::too_many_arguments)]
    pub fn up(
        &self,
        device: &Device,
        shape: &Shape,
        heads: &Heads,
        weights: Address,
        n: u32,
        x: Address,
        out: Address,
    ) -> Result<(), Error> {
        let bytes = 2 * n * shape.latent;
        let weights = weights + u64::from(heads.first) * u64::from(bytes);
        let matrix = Matrix { weights, scales: None, n, k: shape.latent };
        let output = Output { values: out, stride: heads.count * n, f32: false };
        let batch = Batch { count: heads.count, weights: bytes, input: 0, output: n };
        linear::linear(device, matrix, bf16(x, shape.latent), output, self.runs(), batch)
    }

    pub fn mlp(
        &self,
        device: &Device,
        prepared: &mut Prepared,
        x: Address,
        gate_up: &Linear,
        down: &Linear,
        out: Address,
    ) -> Result<(), Error> {
        let width = down.k;
        let both = prepared.room(device, "gate and up", 4 * self.max * width as usize)?;
        let inner = prepared.room(device, "activated", 2 * self.max * width as usize)?;
        self.linear(device, prepared, x, gate_up, both)?;
        moe::silu_mul(device, self.count, 1, self.most, both, width, inner)?;
        self.linear(device, prepared, inner, down, out)
    }

    #[allow(clippy::too_many_arguments)]
    pub fn experts(
        &self,
        device: &Device,
        prepared: &mut Prepared,
        x: Address,
        routing: &Routing,
        experts: &Experts,
        shared: Option<Address>,
        out: Address,
    ) -> Result<(), Error> {
        let (top_k, count) = (routing.top_k, experts.count);
        let (gate_up, down) = (experts.gate_up.matrix(), experts.down.matrix());
        let (hidden, width) = (down.n, down.k);
        let slots = self.max * top_k as usize;
        let places = prepared.room(device, "places", moe::scratch_bytes(self.max as u32, top_k, count))?;
        let both = prepared.room(device, "experts' gate and up", 4 * slots * width as usize)?;
        let inner = prepared.room(device, "experts' activated", 2 * slots * width as usize)?;
        let results = prepared.room(device, "experts' results", 2 * slots * hidden as usize)?;
        // Twice the mean, so that few experts spill into a second tile and have their weights read again.
        let tokens = linear::tile(2 * self.most * top_k / count);
        let places = moe::place(device, self.count, self.most, top_k, count, tokens, routing.chosen, places)?;
        let input = self.input(device, prepared, x, gate_up, 1)?;
        let input = Input { gather: Some(places.row_at), ..input };
        let output = Output { values: both, stride: 2 * width, f32: false };
        linear::linear(device, gate_up, input, output, places.runs, Batch::ONE)?;
        moe::silu_mul(device, self.count, top_k, self.most * top_k, both, width, inner)?;
        let input = self.input(device, prepared, inner, down, top_k)?;
        let output = Output { values: results, stride: hidden, f32: false };
        linear::linear(device, down, input, output, places.runs, Batch::ONE)?;
        let (count, rows, weights) = (self.count, self.most, routing.weights);
        moe::combine(device, count, rows, top_k, results, &places, weights, shared, hidden, out)
    }
}

impl Linear {
    pub fn matrix(&self) -> Matrix {
        Matrix { weights: self.weights(), scales: self.scales(), n: self.n, k: self.k }
    }
}

impl Matrices {
    pub fn matrix(&self) -> Matrix {
        Matrix { weights: self.weights(), scales: self.scales(), n: self.n as u32, k: self.k as u32 }
    }
}

/// Dense rows of width `k`.
pub fn bf16(values: Address, k: u32) -> Input {
    Input { values, scales: None, stride: k, gather: None }
}
