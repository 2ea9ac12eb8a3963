//! Elementary functions of which every machine gives the same bits: only IEEE operations, no system library.
//! The f64 ones follow FreeBSD's msun (Sun Microsystems 1993), accurate to about one unit in the last place.
#![allow(clippy::excessive_precision, clippy::approx_constant)] // Coefficients as published.

const LN2_HI: f64 = 6.931_471_803_691_238_164_90e-01;
const LN2_LO: f64 = 1.908_214_929_270_587_700_02e-10;

/// Natural logarithm.
pub fn ln(x: f64) -> f64 {
    if x <= 0.0 || !x.is_finite() {
        return if x == 0.0 {
            f64::NEG_INFINITY
        } else if x < 0.0 {
            f64::NAN
        } else {
            x
        };
    }
    let (x, bias) = if x < f64::MIN_POSITIVE { (x * 2f64.powi(54), -54) } else { (x, 0) };
    // x = 2^k (1 + f), with sqrt(1/2) < 1 + f < sqrt(2).
    let shifted = x.to_bits() + ((0x3ff0_0000 - 0x3fe6_a09e) << 32);
    let k = f64::from((shifted >> 52) as i32 - 0x3ff + bias);
    let f = f64::from_bits((shifted & 0x000f_ffff_ffff_ffff) + (0x3fe6_a09e << 32)) - 1.0;
    let s = f / (2.0 + f);
    let (z, half) = (s * s, 0.5 * f * f);
    let w = z * z;
    let even = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
    let odd = z
        * (6.666666666666735130e-01
            + w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
    s * (half + even + odd) + k * LN2_LO - half + f + k * LN2_HI
}

/// Exponential.
pub fn exp(x: f64) -> f64 {
    if x > 709.7 {
        return f64::INFINITY;
    }
    if x < -708.0 {
        return 0.0;
    }
    let k = (x * std::f64::consts::LOG2_E).round_ties_even();
    let (hi, lo) = (x - k * LN2_HI, k * LN2_LO);
    let r = hi - lo;
    let z = r * r;
    let c = r - z
        * (1.66666666666666019037e-01
            + z * (-2.77777777770155933842e-03
                + z * (6.61375632143793436117e-05
                    + z * (-1.65339022054652515390e-06 + z * 4.13813679705723846039e-08))));
    let y = 1.0 + (r * c / (2.0 - c) - lo + hi);
    y * f64::from_bits(((k as i64 + 1023) as u64) << 52)
}

/// Sine and cosine for |x| up to about 2²⁰.
pub fn sin_cos(x: f64) -> (f64, f64) {
    let n = (x * std::f64::consts::FRAC_2_PI).round_ties_even();
    // π/2 in three parts, of which n times the first two is exact.
    let r = x - n * 1.57079632673412561417e+00;
    let r = r - n * 6.07710050630396597660e-11;
    let r = r - n * 2.02226624879595063154e-21;
    let z = r * r;
    let sin = r + r
        * z
        * (-1.66666666666666324348e-01
            + z * (8.33333333332248946124e-03
                + z * (-1.98412698298579493134e-04
                    + z * (2.75573137070700676789e-06
                        + z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)))));
    let cos = 1.0 - 0.5 * z
        + z * z
            * (4.16666666666666019037e-02
                + z * (-1.38888888888741095749e-03
                    + z * (2.48015872894767294178e-05
                        + z * (-2.75573143513906633035e-07
                            + z * (2.08757232129817482790e-09 - z * 1.13596475577881948265e-11)))));
    match (n as i64).rem_euclid(4) {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    }
}

/// (cos, sin) of every pair at `position`, times `amplitude`; computed in f64.
pub(crate) fn angles(position: u32, frequencies: &[f64], amplitude: f64, out: &mut Vec<(f32, f32)>) {
    out.extend(frequencies.iter().map(|frequency| {
        let (sin, cos) = sin_cos(f64::from(position) * frequency);
        ((cos * amplitude) as f32, (sin * amplitude) as f32)
    }));
}

/// Exponential in f32, for loops that the compiler turns into vectors: no branch, no table. 0 below −87; Cephes' polynomial.
#[inline(always)]
pub(crate) fn exp_f32(x: f32) -> f32 {
    // Adding and subtracting this rounds to an integer, which is then in the low bits of the sum.
    const MAGIC: f32 = 12_582_912.0;
    // Comparisons rather than clamp or max: these propagate NaN and compile to a compare and a blend.
    let bounded = if x > 88.0 { 88.0 } else { x };
    let bounded = if bounded < -87.0 { -87.0 } else { bounded };
    let sum = bounded.mul_add(std::f32::consts::LOG2_E, MAGIC);
    let n = sum - MAGIC;
    let r = n.mul_add(-0.693_359_375, bounded);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.987_569_15e-4_f32;
    let p = p.mul_add(r, 1.398_199_95e-3);
    let p = p.mul_add(r, 8.333_451_9e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_55e-1);
    let p = p.mul_add(r, 0.5);
    let y = p.mul_add(r * r, r) + 1.0;
    let scale = f32::from_bits(
        sum.to_bits().wrapping_sub(MAGIC.to_bits()).wrapping_shl(23).wrapping_add(0x3f80_0000),
    );
    if x < -87.0 { 0.0 } else { y * scale }
}

/// x · sigmoid(x).
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp_f32(-x))
}

#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp_f32(-x))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f64, expected: f64, tolerance: f64) {
        assert!(
            (found - expected).abs() <= tolerance * expected.abs().max(1e-300),
            "{found:e} is not {expected:e}"
        );
    }

    #[test]
    fn f64_functions_agree_with_the_system_library() {
        for i in 1..20_000 {
            let x = f64::from(i) * 0.37 - 3000.0;
            close(exp(x / 10.0), (x / 10.0).exp(), 1e-15);
            close(ln(f64::from(i) * 1e-4), (f64::from(i) * 1e-4).ln(), 4e-16);
            let (sin, cos) = sin_cos(x * 40.0);
            assert!((sin - (x * 40.0).sin()).abs() < 1e-15 && (cos - (x * 40.0).cos()).abs() < 1e-15, "{x}");
        }
        assert_eq!((ln(0.0), ln(1.0), exp(0.0)), (f64::NEG_INFINITY, 0.0, 1.0));
        close(ln(5e-324), -744.4400719213812, 1e-15);
        assert!(ln(-1.0).is_nan());
    }

    #[test]
    fn exp_f32_is_accurate_to_two_units() {
        for i in -870_000..870_000 {
            let x = i as f32 * 1e-4;
            close(f64::from(exp_f32(x)), f64::from(x).exp(), 2.0 * f64::from(f32::EPSILON));
        }
        assert_eq!((exp_f32(0.0), exp_f32(-88.0), exp_f32(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
        assert!(exp_f32(f32::NAN).is_nan());
    }

    #[test]
    fn rotary_check_angles() {
        let (sin, cos) = sin_cos(0.188155521);
        close(cos, 0.982350911, 1e-8);
        close(sin, 0.187047288, 1e-8);
        let (sin, cos) = sin_cos(26.8793601);
        close(cos, -0.174918, 1e-5);
        close(sin, 0.984583, 1e-5);
    }
}
