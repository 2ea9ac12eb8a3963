//! Norm, rotation, SiLU: what happens row by row between the products.

use super::lanes::{LANES, Lanes, by_level, halve};
use crate::math::silu;

by_level! {
    /// `out = weight ⊙ x · rsqrt(mean(x²) + eps)`; squares are summed in lane `i mod 16`, lanes by halving.
    ///
    /// # Safety
    /// None beyond the level's; all slices have one length.
    pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = rms_norm_kernel, avx512 (0, 0), narrow (0, 0)
}

#[inline(always)]
unsafe fn rms_norm_kernel<L: Lanes, const A: usize, const B: usize>(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    let mut squares = [0.0f32; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for values in whole {
        for lane in 0..LANES {
            squares[lane] = values[lane].mul_add(values[lane], squares[lane]);
        }
    }
    for (lane, value) in rest.iter().enumerate() {
        squares[lane] = value.mul_add(*value, squares[lane]);
    }
    let inverse = 1.0 / (halve(squares) / x.len() as f32 + eps).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = weight * (x * inverse);
    }
}

by_level! {
    /// `out[i] = silu(gate[i]) · up[i]`.
    ///
    /// # Safety
    /// None beyond the level's; all slices have one length.
    pub fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) = silu_mul_kernel, avx512 (0, 0), narrow (0, 0)
}

#[inline(always)]
unsafe fn silu_mul_kernel<L: Lanes, const A: usize, const B: usize>(
    gate: &[f32],
    up: &[f32],
    out: &mut [f32],
) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = silu(*gate) * up;
    }
}

by_level! {
    /// `out[i] += weight · values[i]`.
    ///
    /// # Safety
    /// None beyond the level's; both slices have one length.
    pub fn add_scaled(out: &mut [f32], values: &[f32], weight: f32) = add_scaled_kernel, avx512 (0, 0), narrow (0, 0)
}

#[inline(always)]
unsafe fn add_scaled_kernel<L: Lanes, const A: usize, const B: usize>(
    out: &mut [f32],
    values: &[f32],
    weight: f32,
) {
    for (out, value) in out.iter_mut().zip(values) {
        *out = value.mul_add(weight, *out);
    }
}

/// Rotates adjacent pairs.
pub fn rotate(values: &mut [f32], angles: &[(f32, f32)]) {
    for ([x, y], (cos, sin)) in values.as_chunks_mut::<2>().0.iter_mut().zip(angles) {
        (*x, *y) = (*x * cos - *y * sin, *x * sin + *y * cos);
    }
}

#[cfg(test)]
mod tests {
    use super::super::lanes::Level;
    use super::*;
    use crate::math::angles;

    #[test]
    fn adjacent_pairs_turn_by_their_own_angle() {
        let mut turned = vec![];
        angles(7, &[0.0268793601, 0.0], 1.0, &mut turned);
        let mut values = [1.0, 0.0, 3.0, 4.0];
        rotate(&mut values, &turned);
        assert!((values[0] - 0.982_350_9).abs() < 1e-6 && (values[1] - 0.187_047_29).abs() < 1e-6);
        assert_eq!(values[2..], [3.0, 4.0]);
    }

    #[test]
    fn levels_agree_on_every_bit() {
        let x: Vec<f32> = (0..77).map(|i| (i as f32 * 0.7).sin() * 9.0).collect();
        let results = Level::available().into_iter().map(|level| {
            let (mut normed, mut activated) = (vec![0.0; 77], vec![0.0; 77]);
            // SAFETY: the level is available.
            unsafe {
                rms_norm(level, &x, &x, 1e-6, &mut normed);
                silu_mul(level, &x, &normed, &mut activated);
            }
            [normed, activated].concat().iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        });
        let results: Vec<_> = results.collect();
        assert!(results.iter().all(|bits| *bits == results[0]));
    }
}
