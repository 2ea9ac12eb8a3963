//! Weights as a checkpoint holds them: borrowed bytes with a type and a shape, and their conversion to f32. Of a model without
//! files, the rule that its numbers come from.

use crate::{Error, Random};
use std::sync::LazyLock;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    F32,
    F16,
    Bf16,
    /// e4m3 "fn": bias 7, largest 448, no infinities, 0x7f and 0xff are NaN.
    F8E4m3,
}

impl Dtype {
    pub fn bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::F8E4m3 => 1,
        }
    }
}

/// Multipliers of blocks of a matrix, `ceil(rows / block[0])` × `ceil(cols / block[1])`, f32 little-endian. They
/// multiply, although checkpoints call them `weight_scale_inv`.
#[derive(Clone, Copy, Debug)]
pub struct Scales<'a> {
    pub bytes: &'a [u8],
    pub block: [usize; 2],
}

/// Where the numbers of a tensor come from.
#[derive(Clone, Copy, Debug)]
pub enum Data<'a> {
    /// Row-major, little-endian, not necessarily aligned, of exactly the length that shape and type give (the loader's duty).
    Bytes(&'a [u8]),
    /// Element `[row][col]` is number `row · cols + col`. FP8 has the scale [`Random::scale`] in every block.
    Random(Random),
    /// Every element the same.
    Constant(f32),
}

impl<'a, T: AsRef<[u8]> + ?Sized> From<&'a T> for Data<'a> {
    fn from(bytes: &'a T) -> Self {
        Data::Bytes(bytes.as_ref())
    }
}

/// A matrix `[rows][cols]`; a vector is one row.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    pub name: &'a str,
    pub dtype: Dtype,
    pub rows: usize,
    pub cols: usize,
    pub data: Data<'a>,
    /// Of FP8 bytes.
    pub scales: Option<Scales<'a>>,
}

/// The weights of one layer's attention, but the output projection.
#[derive(Clone, Debug)]
pub struct MlaTensors<'a> {
    pub query: QueryTensors<'a>,
    /// `[latent + rope][hidden]`: latent rows first.
    pub kv_a: Tensor<'a>,
    pub kv_norm: Tensor<'a>,
    /// `[heads × (nope + value)][latent]`: head-major, key rows first.
    pub kv_b: Tensor<'a>,
    /// eps of both inner norms.
    pub eps: f32,
}

/// Query projection `[heads × (nope + rope)]`, head-major, with or without a low-rank middle.
#[derive(Clone, Debug)]
pub enum QueryTensors<'a> {
    Direct(Tensor<'a>),
    LowRank { a: Tensor<'a>, norm: Tensor<'a>, b: Tensor<'a> },
}

/// `down · (silu(gate · x) ⊙ (up · x))`.
#[derive(Clone, Copy, Debug)]
pub struct MlpTensors<'a> {
    pub gate: Tensor<'a>,
    pub up: Tensor<'a>,
    pub down: Tensor<'a>,
}

static E4M3: LazyLock<[f32; 256]> = LazyLock::new(|| std::array::from_fn(|byte| e4m3(byte as u8)));

fn e4m3(byte: u8) -> f32 {
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * mantissa * 2f32.powi(-9),
        _ => sign * (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    }
}

impl Tensor<'_> {
    /// Writes row `row` as f32, block scales applied. An FP8 value times its scale is rounded once, to f32.
    pub fn read_row(&self, row: usize, out: &mut [f32]) -> Result<(), Error> {
        match self.data {
            Data::Bytes(bytes) => self.read_bytes(bytes, row, out),
            Data::Random(random) => self.make_row(random, row, out),
            Data::Constant(value) => out.fill(value),
        }
        if let Some(scales) = &self.scales {
            scales.apply(row, self.cols, out);
        }
        match out.iter().position(|value| !value.is_finite()) {
            None => Ok(()),
            Some(col) => Err(Error::Tensor {
                name: self.name.to_string(),
                what: format!("value at [{row}, {col}] is {}; the file is corrupt", out[col]),
            }),
        }
    }

    fn read_bytes(&self, bytes: &[u8], row: usize, out: &mut [f32]) {
        let width = self.cols * self.dtype.bytes();
        let bytes = &bytes[row * width..][..width];
        match self.dtype {
            Dtype::F32 => widen::<4>(bytes, out, f32::from_le_bytes),
            Dtype::F16 => widen::<2>(bytes, out, |b| half::f16::from_le_bytes(b).to_f32()),
            Dtype::Bf16 => widen::<2>(bytes, out, |b| half::bf16::from_le_bytes(b).to_f32()),
            Dtype::F8E4m3 => widen::<1>(bytes, out, |[b]| E4M3[usize::from(b)]),
        }
    }

    fn make_row(&self, random: Random, row: usize, out: &mut [f32]) {
        let value = |index: usize| match self.dtype {
            Dtype::F32 => random.uniform(index),
            Dtype::F16 => half::f16::from_f32(random.uniform(index)).to_f32(),
            Dtype::Bf16 => half::bf16::from_f32(random.uniform(index)).to_f32(),
            Dtype::F8E4m3 => E4M3[usize::from(random.e4m3(index))] * random.scale(),
        };
        out.iter_mut().zip(row * self.cols..).for_each(|(out, index)| *out = value(index));
    }

    pub fn to_f32(&self) -> Result<Vec<f32>, Error> {
        let mut out = vec![0.0; self.rows * self.cols];
        for (row, values) in out.chunks_exact_mut(self.cols).enumerate() {
            self.read_row(row, values)?;
        }
        Ok(out)
    }
}

fn widen<const N: usize>(bytes: &[u8], out: &mut [f32], value: impl Fn([u8; N]) -> f32) {
    for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *out = value(*bytes);
    }
}

impl Scales<'_> {
    fn apply(&self, row: usize, cols: usize, values: &mut [f32]) {
        let per_row = cols.div_ceil(self.block[1]);
        let (scales, _) = self.bytes.as_chunks::<4>();
        let scales = &scales[row / self.block[0] * per_row..][..per_row];
        for (values, scale) in values.chunks_mut(self.block[1]).zip(scales) {
            let scale = f32::from_le_bytes(*scale);
            values.iter_mut().for_each(|value| *value *= scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_values_are_those_of_the_format() {
        let cases =
            [(0x00, 0.0), (0x01, 0.001953125), (0x08, 0.015625), (0x38, 1.0), (0x7e, 448.0), (0xfe, -448.0)];
        for (byte, value) in cases {
            assert_eq!(E4M3[byte], value, "{byte:#x}");
        }
        assert!(E4M3[0x7f].is_nan() && E4M3[0xff].is_nan());
    }

    /// 5 rows and 6 columns in blocks of 2 × 4: the last block row covers 1 row, the last block column 2.
    #[test]
    fn blocks_that_do_not_divide_use_the_scale_of_their_own_block() {
        let scales: Vec<u8> = (1..=6u8).flat_map(|s| f32::from(s).to_le_bytes()).collect();
        let tensor = Tensor {
            name: "w",
            dtype: Dtype::F8E4m3,
            rows: 5,
            cols: 6,
            data: (&[0x38; 30]).into(),
            scales: Some(Scales { bytes: &scales, block: [2, 4] }),
        };
        let values = tensor.to_f32().unwrap();
        assert_eq!(values[..6], [1.0, 1.0, 1.0, 1.0, 2.0, 2.0]);
        assert_eq!(values[24..], [5.0, 5.0, 5.0, 5.0, 6.0, 6.0]);
    }

    #[test]
    fn a_nan_byte_names_its_tensor_and_place() {
        let tensor = Tensor {
            name: "w",
            dtype: Dtype::F8E4m3,
            rows: 1,
            cols: 3,
            data: (&[0, 0x7f, 0]).into(),
            scales: None,
        };
        let error = tensor.to_f32().unwrap_err().to_string();
        assert!(error.contains("tensor w") && error.contains("[0, 1]"), "{error}");
    }
}
