//! Declared rounding: makes the f32 backend take the roundings of a device, so that its kernels can be compared on
//! identical inputs. Off when serving.

/// Where values are rounded besides f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rounding {
    #[default]
    None,
    /// Results of operations, cache rows, and queries, probabilities and sums of attention to bf16. Router logits and
    /// head logits stay f32.
    Bf16,
    /// As [`Rounding::Bf16`], and the inputs of FP8 weights to e4m3 in groups of 128 channels:
    /// `s = max(max|x|, 1e-4) / 448`, rounded up to a power of two if `ue8m0`; `x = s · e4m3(x / s)`.
    Fp8Activations { ue8m0: bool },
}

/// Channels that share an activation scale.
const GROUP: usize = 128;
const E4M3_MAX: f32 = 448.0;

impl Rounding {
    /// Rounds results of an operation.
    pub fn results(self, values: &mut [f32]) {
        if self != Rounding::None {
            values.iter_mut().for_each(|v| *v = bf16(*v));
        }
    }

    /// The rows of width `width` as they enter a weight that is FP8 or not.
    pub fn inputs(self, values: &[f32], width: usize, fp8: bool) -> Option<Vec<f32>> {
        let Rounding::Fp8Activations { ue8m0 } = self else {
            return None;
        };
        fp8.then(|| {
            let mut rounded = values.to_vec();
            rounded
                .chunks_mut(width)
                .for_each(|row| row.chunks_mut(GROUP).for_each(|group| quantize(group, ue8m0)));
            rounded
        })
    }
}

pub fn bf16(value: f32) -> f32 {
    half::bf16::from_f32(value).to_f32()
}

fn quantize(group: &mut [f32], ue8m0: bool) {
    let largest = group.iter().fold(1e-4f32, |largest, v| largest.max(v.abs()));
    let scale = largest / E4M3_MAX;
    let scale = if ue8m0 { power_of_two_above(scale) } else { scale };
    group.iter_mut().for_each(|v| *v = scale * e4m3_round(*v / scale));
}

/// The least power of two that is not smaller; `scale` is normal and positive.
fn power_of_two_above(scale: f32) -> f32 {
    let bits = scale.to_bits();
    f32::from_bits(if bits & 0x7f_ffff == 0 { bits } else { (bits & 0x7f80_0000) + 0x80_0000 })
}

/// The nearest e4m3 value, ties to even, saturating at ±448.
pub fn e4m3_round(value: f32) -> f32 {
    let magnitude = value.abs().min(448.0);
    // Distance between neighbours: 2^-9 below 2^-6, else 2^(exponent - 3).
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let step = f32::from_bits(((exponent - 3 + 127) as u32) << 23);
    ((magnitude / step).round_ties_even() * step).copysign(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_scaled_by_their_own_largest_value() {
        let mut values = vec![1.0f32; 130];
        (values[0], values[129]) = (448.0, 0.07);
        let rounding = Rounding::Fp8Activations { ue8m0: false };
        let rounded = rounding.inputs(&values, 130, true).unwrap();
        assert_eq!((rounded[0], rounded[1]), (448.0, 1.0));
        assert!(
            (rounded[128] - 1.0).abs() < 1e-6 && (rounded[129] - 0.0714).abs() < 0.001,
            "{}",
            rounded[129]
        );
        assert!(
            rounding.inputs(&values, 130, false).is_none()
                && Rounding::Bf16.inputs(&values, 130, true).is_none()
        );
    }

    #[test]
    fn ue8m0_scales_are_powers_of_two() {
        assert_eq!([0.75, 1.0, 1.0000001].map(power_of_two_above), [1.0, 1.0, 2.0]);
    }

    #[test]
    fn nearest_value_ties_to_even() {
        let cases = [
            (0.0, 0.0),
            (1.0624, 1.0),
            (1.0625, 1.0),
            (1.0626, 1.125),
            (1.1875, 1.25),
            (463.0, 448.0),
            (-1e9, -448.0),
            (0.0009, 0.0),
            (0.00098, 0.001953125),
            (0.0156, 0.015625),
        ];
        for (value, expected) in cases {
            assert_eq!(e4m3_round(value), expected, "{value}");
        }
    }
}
