//! Operations over the rows of a step that take several launches: products with their quantisation, MLPs, routed experts.

use super::{
    activate::{self, Quantised, RowScales, Rows, Source},
    backend::Routing,
    device::{Address, Device},
    direct::Heads,
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

    /// `per` rows for each of the step's.
    fn times(&self, per: u32) -> Rows {
        Rows { count: self.count, per, most: self.most * per }
    }

    /// Room for `per` quantised rows of `k` for each of the step's.
    fn quantised(
        &self,
        device: &Device,
        prepared: &mut Prepared,
        k: u32,
        per: u32,
    ) -> Result<Quantised, Error> {
        let rows = self.max as u32 * per;
        let pitch = RowScales::pitch(rows);
        let values = prepared.room(device, "e4m3", rows as usize * k as usize)?;
        let scales = prepared.room(device, "e4m3 scales", 4 * (pitch * k.div_ceil(128)) as usize)?;
        Ok(Quantised { values, scales: RowScales { values: scales, pitch } })
    }

    /// Rows of `x` as `matrix` takes them: quantised, if it is FP8. There are `per` rows for each of the step's.
    pub fn input(
        &self,
        device: &Device,
        prepared: &mut Prepared,
        x: Source,
        matrix: Matrix,
        per: u32,
    ) -> Result<Input, Error> {
        let (k, rows) = (matrix.k, self.times(per));
        if matrix.scales.is_some() {
            let to = self.quantised(device, prepared, k, per)?;
            activate::quantize(device, rows, x, k, to)?;
            return Ok(quantised(to, k));
        }
        if x.row_at.is_none() {
            return Ok(Input { values: x.values, scales: None, stride: x.stride });
        }
        let room = prepared.room(device, "gathered", 2 * self.max * (per * k) as usize)?;
        activate::gather(device, rows, x, k, room)?;
        Ok(bf16(room, k))
    }

    /// `silu(gate) ⊙ up` of rows `gate | up`, as `down` takes them.
    fn activated(
        &self,
        device: &Device,
        prepared: &mut Prepared,
        both: Address,
        down: Matrix,
        per: u32,
    ) -> Result<Input, Error> {
        let (k, rows) = (down.k, self.times(per));
        if down.scales.is_some() {
            let to = self.quantised(device, prepared, k, per)?;
            activate::silu_mul_quantize(device, rows, both, k, to)?;
            return Ok(quantised(to, k));
        }
        let room = prepared.room(device, "activated", 2 * self.max * (per * k) as usize)?;
        activate::silu_mul(device, rows, both, k, room)?;
        Ok(bf16(room, k))
    }

    pub fn linear(
        &self,
        device: &Device,
        prepared: &mut Prepared,
        x: Address,
        weight: &Linear,
        out: Address,
    ) -> Result<(), Error> {
        let input = self.input(device, prepared, rows(x, weight.k), weight.matrix(), 1)?;
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
        let matrix = Matrix { count: heads, weights, scales: None, n, k };
        let input = Input { stride: heads * from, ..bf16(x, k) };
        let output = Output { values: out, stride: heads * to, f32: false };
        let batch = Batch { count: heads, input: from, output: to };
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
        let weights = weights + u64::from(heads.first) * u64::from(2 * n * shape.latent);
        let matrix = Matrix { count: heads.count, weights, scales: None, n, k: shape.latent };
        let output = Output { values: out, stride: heads.count * n, f32: false };
        let batch = Batch { count: heads.count, input: 0, output: n };
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
        let both = prepared.room(device, "gate and up", 4 * self.max * down.k as usize)?;
        self.linear(device, prepared, x, gate_up, both)?;
        let input = self.activated(device, prepared, both, down.matrix(), 1)?;
        let output = Output { values: out, stride: down.n, f32: false };
        linear::linear(device, down.matrix(), input, output, self.runs(), Batch::ONE)
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
        let results = prepared.room(device, "experts' results", 2 * slots * hidden as usize)?;
        // Twice the mean, so that few experts spill into a second tile and have their weights read again.
        let tokens = linear::tile(2 * self.most * top_k / count);
        let places = moe::place(device, self.count, self.most, top_k, count, tokens, routing.chosen, places)?;
        let source = Source { row_at: Some(places.row_at), ..rows(x, hidden) };
        let input = self.input(device, prepared, source, gate_up, top_k)?;
        let output = Output { values: both, stride: 2 * width, f32: false };
        linear::linear(device, gate_up, input, output, places.runs, Batch::ONE)?;
        let input = self.activated(device, prepared, both, down, top_k)?;
        let output = Output { values: results, stride: hidden, f32: false };
        linear::linear(device, down, input, output, places.runs, Batch::ONE)?;
        let (count, most, weights) = (self.count, self.most, routing.weights);
        moe::combine(device, count, most, top_k, results, &places, weights, shared, hidden, out)
    }
}

impl Linear {
    pub fn matrix(&self) -> Matrix {
        Matrix { count: 1, weights: self.weights(), scales: self.scales(), n: self.n, k: self.k }
    }
}

impl Matrices {
    pub fn matrix(&self) -> Matrix {
        let (count, n, k) = (self.count as u32, self.n as u32, self.k as u32);
        Matrix { count, weights: self.weights(), scales: self.scales(), n, k }
    }
}

/// Dense rows of width `k`, to be multiplied as they are.
pub fn bf16(values: Address, k: u32) -> Input {
    Input { values, scales: None, stride: k }
}

/// Dense rows of width `k`.
pub fn rows(values: Address, k: u32) -> Source {
    Source { values, stride: k, row_at: None }
}

fn quantised(rows: Quantised, k: u32) -> Input {
    Input { values: rows.values, scales: Some(rows.scales), stride: k }
}
