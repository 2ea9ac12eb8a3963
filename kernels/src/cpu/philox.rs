//! Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") and the Gumbel noise of the sampler:
//! a pure function of seed, choice, position and token id.

use crate::math::ln;

const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];

/// Larger than any value of [`gumbel`].
pub const LARGEST_NOISE: f32 = 22.9;

pub fn philox(mut key: [u32; 2], mut counter: [u32; 4]) -> [u32; 4] {
    for _ in 0..10 {
        let [a, b] = [(MULTIPLIERS[0], counter[0]), (MULTIPLIERS[1], counter[2])]
            .map(|(m, c)| u64::from(m) * u64::from(c));
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// Where a sequence's noise comes from at one position.
#[derive(Clone, Copy, Debug)]
pub struct Noise {
    pub seed: u64,
    pub choice: u32,
    /// Of the token being sampled, in its sequence.
    pub position: u32,
}

impl Noise {
    /// Noise of a token id.
    pub fn of(&self, id: u32) -> f32 {
        let counter = [self.position, id / 4, self.choice, 0];
        gumbel(philox([self.seed as u32, (self.seed >> 32) as u32], counter)[id as usize % 4])
    }
}

/// `−ln(−ln(1 − w))`, `w = min((x + ½) · 2⁻³², 1 − 2⁻²⁴)`. In f64, where 1 − w is exact, so that large values, which decide, are exact too.
fn gumbel(x: u32) -> f32 {
    let w = ((f64::from(x) + 0.5) * 2f64.powi(-32)).min(1.0 - 2f64.powi(-24));
    -ln(-ln(1.0 - w)) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that Random123 is distributed with.
    #[test]
    fn known_answers() {
        assert_eq!(philox([0; 2], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = u32::MAX;
        assert_eq!(philox([ones; 2], [ones; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let (key, counter) =
            ([0xa409_3822, 0x299f_31d0], [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]);
        assert_eq!(philox(key, counter), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn noise_is_gumbel() {
        assert!(gumbel(0) < LARGEST_NOISE && gumbel(0) > 22.8);
        assert!(gumbel(u32::MAX) < -2.8 && gumbel(u32::MAX) > -2.9);
        let noise = Noise { seed: 7, choice: 0, position: 3 };
        let (count, mean) = (20_000, 0.5772);
        let sum: f64 = (0..count).map(|id| f64::from(noise.of(id))).sum();
        assert!((sum / f64::from(count) - mean).abs() < 0.03, "{}", sum / f64::from(count));
        assert_ne!(noise.of(5), Noise { choice: 1, ..noise }.of(5));
        assert_ne!(noise.of(5), Noise { position: 4, ..noise }.of(5));
        assert_ne!(noise.of(5), Noise { seed: 7 | 1 << 40, ..noise }.of(5));
    }
}
