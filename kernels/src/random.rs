//! Weights that come from a formula instead of a file: element `i` of a tensor is a function of the tensor's key and `i`, so
//! that every backend makes the same numbers, in any order, where they are to lie.
//!
//! With `w(c)` the four words of Philox4x32-10 (Salmon et al. 2011) for the key's low and high word and the counter
//! `(c low, c high, 0, 0)`:
//! - e4m3: byte `i mod 16` of `w(i / 16)`, little-endian, its exponent put between 4 and 7: `byte & 0x9f | 0x20`, so ±2^(e − 7) · (1 + m / 8)
//!   with e and m uniform: always finite, never 0. One scale for the whole tensor gives the standard deviation;
//! - otherwise: `(⌊u / 2⁸⌋ − 2²³) · (std · √3 · 2⁻²³)` with `u` word `i mod 4` of `w(i / 4)`: uniform in `[−√3 std, √3 std)`, one product
//!   rounded to f32, then to bf16 where the tensor is bf16.

use crate::cpu::philox;

/// Standard deviation of [`Random::e4m3`]: √(E[4^(e − 7)] · E[(1 + m / 8)²]) = √(85 / 256 · 275 / 128).
const E4M3_STD: f32 = 0.844_600_5;
const SQRT_3: f32 = 1.732_050_8;
const TWO_23: i32 = 1 << 23;

/// Numbers around zero with a standard deviation of `std`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Random {
    /// Tells this tensor's numbers from those of others.
    pub key: u64,
    pub std: f32,
}

impl Random {
    fn words(&self, counter: usize) -> [u32; 4] {
        let halves = |x: u64| [x as u32, (x >> 32) as u32];
        let [low, high] = halves(counter as u64);
        philox(halves(self.key), [low, high, 0, 0])
    }

    /// Element `index` as an e4m3 byte, to be multiplied by [`Random::scale`].
    pub fn e4m3(&self, index: usize) -> u8 {
        let word = self.words(index / 16)[index % 16 / 4];
        word.to_le_bytes()[index % 4] & 0x9f | 0x20
    }

    /// What e4m3 bytes are multiplied by.
    pub fn scale(&self) -> f32 {
        self.std / E4M3_STD
    }

    /// Element `index`, not in e4m3.
    pub fn uniform(&self, index: usize) -> f32 {
        let word = self.words(index / 4)[index % 4];
        ((word >> 8) as i32 - TWO_23) as f32 * self.unit()
    }

    /// What the integers of [`Random::uniform`] are multiplied by.
    pub(crate) fn unit(&self) -> f32 {
        self.std * SQRT_3 / TWO_23 as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Data, Dtype, Tensor};

    const COUNT: usize = 40_000;

    fn values(dtype: Dtype, key: u64, std: f32) -> Vec<f32> {
        let data = Data::Random(Random { key, std });
        Tensor { name: "w", dtype, rows: 4, cols: COUNT / 4, data, scales: None }.to_f32().unwrap()
    }

    #[test]
    fn numbers_have_the_standard_deviation_that_was_asked_for() {
        for (dtype, std) in [(Dtype::F8E4m3, 0.02), (Dtype::Bf16, 1.0), (Dtype::F32, 0.05)] {
            let values = values(dtype, 7, std);
            let mean = values.iter().sum::<f32>() / COUNT as f32;
            let found = (values.iter().map(|x| x * x).sum::<f32>() / COUNT as f32).sqrt();
            assert!(mean.abs() < 0.02 * std && (found / std - 1.0).abs() < 0.02, "{dtype:?}: {mean} {found}");
        }
    }

    #[test]
    fn numbers_depend_on_key_and_index_and_on_nothing_else() {
        for dtype in [Dtype::F8E4m3, Dtype::Bf16] {
            let first = values(dtype, 1, 1.0);
            assert_eq!(first, values(dtype, 1, 1.0));
            let equal = |other: &[f32]| first.iter().zip(other).filter(|(a, b)| a == b).count();
            assert!(equal(&values(dtype, 2, 1.0)) < COUNT / 20);
            assert!(equal(&values(dtype, 1 | 1 << 40, 1.0)) < COUNT / 20);
            assert!(equal(&first[1..]) < COUNT / 20, "neighbours differ");
        }
    }

    #[test]
    fn bf16_tensors_hold_bf16() {
        let rounded = |x: &f32| half::bf16::from_f32(*x).to_f32() == *x;
        assert!(values(Dtype::Bf16, 3, 0.3).iter().all(rounded));
        assert!(!values(Dtype::F32, 3, 0.3).iter().all(rounded));
    }
}
