//! Rotary frequencies and YaRN (Peng et al. 2023, arXiv:2309.00071), as the DeepSeek family uses it: static, at
//! every position.

use kernels::{exp, ln};
use std::f64::consts::TAU;

#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub yarn: Option<Yarn>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    pub factor: f64,
    pub original_positions: f64,
    pub beta_fast: f64,
    pub beta_slow: f64,
    pub mscale: f64,
    pub mscale_all_dim: f64,
}

impl Rope {
    /// Angle per position of each of the `dim / 2` pairs.
    pub fn frequencies(&self, dim: u32) -> Vec<f64> {
        let plain = |j: u32| exp(-2.0 * f64::from(j) / f64::from(dim) * ln(self.theta));
        let Some(yarn) = &self.yarn else {
            return (0..dim / 2).map(plain).collect();
        };
        let (low, high) = yarn.ramp(dim, self.theta);
        let blend = |j: u32| {
            let ramp = ((f64::from(j) - low) / (high - low)).clamp(0.0, 1.0);
            plain(j) * (1.0 - ramp) + plain(j) / yarn.factor * ramp
        };
        (0..dim / 2).map(blend).collect()
    }

    /// Factor of cos and sin.
    pub fn amplitude(&self) -> f64 {
        self.yarn.as_ref().map_or(1.0, |yarn| {
            magnitude(yarn.factor, yarn.mscale) / magnitude(yarn.factor, yarn.mscale_all_dim)
        })
    }

    /// Factor of the attention scores, for heads of `query` rows.
    pub fn softmax_scale(&self, query: u32) -> f64 {
        let plain = 1.0 / f64::from(query).sqrt();
        self.yarn.as_ref().map_or(plain, |yarn| {
            let magnitude = magnitude(yarn.factor, yarn.mscale_all_dim);
            plain * magnitude * magnitude
        })
    }
}

impl Yarn {
    /// First and last pair of the transition from unscaled to scaled frequencies.
    fn ramp(&self, dim: u32, theta: f64) -> (f64, f64) {
        let pair =
            |beta: f64| f64::from(dim) * ln(self.original_positions / (TAU * beta)) / (2.0 * ln(theta));
        let low = pair(self.beta_fast).floor().max(0.0);
        let high = pair(self.beta_slow).ceil().min(f64::from(dim) - 1.0);
        (low, if high == low { high + 0.001 } else { high })
    }
}

fn magnitude(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * ln(factor) + 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn yarn(theta: f64, factor: f64, betas: (f64, f64), mscale: f64) -> Rope {
        let (beta_fast, beta_slow) = betas;
        let yarn =
            Yarn { factor, original_positions: 4096.0, beta_fast, beta_slow, mscale, mscale_all_dim: mscale };
        Rope { theta, yarn: Some(yarn) }
    }

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() <= expected.abs() * 5e-7, "{found} is not {expected}");
    }

    #[test]
    fn deepseek_v3() {
        let rope = yarn(1e4, 40.0, (32.0, 1.0), 1.0);
        assert_eq!(rope.yarn.as_ref().unwrap().ramp(64, 1e4), (10.0, 23.0));
        let f = rope.frequencies(64);
        let expected = [
            1.0,
            7.498942e-1,
            5.623413e-1,
            4.216965e-1,
            3.162278e-1,
            2.371374e-1,
            1.778279e-1,
            1.333521e-1,
            1.0e-1,
            7.498942e-2,
            5.623413e-2,
            3.900693e-2,
            2.687936e-2,
            1.837815e-2,
            1.244796e-2,
            8.334509e-3,
            5.5e-3,
            3.561997e-3,
            2.249365e-3,
            1.370514e-3,
            7.905694e-4,
            4.149904e-4,
            1.778279e-4,
            3.333804e-5,
            2.5e-5,
            1.874736e-5,
            1.405853e-5,
            1.054241e-5,
            7.905694e-6,
            5.928434e-6,
            4.445699e-6,
            3.333804e-6,
        ];
        f.iter().zip(expected).for_each(|(found, expected)| close(*found, expected));
        close(7.0 * f[12], 0.188155521);
        close(1000.0 * f[12], 26.8793601);
        close(100_000.0 * f[31], 0.333380358);
        close(rope.softmax_scale(192), 0.13523378);
        assert_eq!(rope.amplitude(), 1.0);
    }

    #[test]
    fn kimi_k2_ramps_within_one_pair() {
        let rope = yarn(5e4, 32.0, (1.0, 1.0), 1.0);
        assert_eq!(rope.yarn.as_ref().unwrap().ramp(64, 5e4), (19.0, 20.0));
        close(rope.softmax_scale(192), 0.13086080);
        close(yarn(5e4, 64.0, (1.0, 1.0), 1.0).softmax_scale(192), 0.14467963);
    }

    #[test]
    fn deepseek_v2_lite_and_no_scaling() {
        close(yarn(1e4, 40.0, (32.0, 1.0), 0.707).softmax_scale(192), 0.11472139);
        let plain = Rope { theta: 1e4, yarn: None };
        close(plain.softmax_scale(192), 0.07216878364870322);
        close(plain.frequencies(64)[31], 1.333521432163324e-4);
    }
}
