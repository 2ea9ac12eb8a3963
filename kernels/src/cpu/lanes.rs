//! Sixteen f32 lanes, on every machine: one AVX-512 register, two of AVX2, or an array. Kernels are written once
//! over [`Lanes`] and get the same bits from each, since a lane does the same IEEE operations in the same order.

/// Lanes of a vector.
pub const LANES: usize = 16;

/// What the machine can do, or is told to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    Avx512,
    Avx2,
    /// Any machine with the compiler's baseline; without FMA instructions it is right, but slow.
    Portable,
}

impl Level {
    pub fn detect() -> Level {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
            {
                return Level::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Level::Avx2;
            }
        }
        Level::Portable
    }

    /// All that this machine can run, best first.
    pub fn available() -> Vec<Level> {
        let best = Level::detect();
        let all = [Level::Avx512, Level::Avx2, Level::Portable];
        all.into_iter().skip_while(|level| *level != best).collect()
    }
}

/// # Safety
/// Only from a function compiled for the features of the implementor, on a machine that has them; pointers must be
/// valid for [`LANES`] elements.
pub unsafe trait Lanes: Copy {
    unsafe fn zero() -> Self;
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// `self · by + acc`, rounded once.
    unsafe fn fma(self, by: Self, acc: Self) -> Self;
    /// Sum of the lanes by halving: i with i + 8, then + 4, + 2, + 1.
    unsafe fn sum(self) -> f32;
}

#[derive(Clone, Copy)]
#[repr(align(64))]
pub struct Array([f32; LANES]);

// SAFETY: needs no features.
unsafe impl Lanes for Array {
    #[inline(always)]
    unsafe fn zero() -> Self {
        Array([0.0; LANES])
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Array([value; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's.
        Array(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn fma(self, by: Self, acc: Self) -> Self {
        let mut out = acc;
        for lane in 0..LANES {
            out.0[lane] = self.0[lane].mul_add(by.0[lane], acc.0[lane]);
        }
        out
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        halve(self.0)
    }
}

/// [`Lanes::sum`] of an array.
#[inline(always)]
pub fn halve(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Lanes;
    use std::arch::x86_64::*;

    #[derive(Clone, Copy)]
    pub struct Avx512(__m512);

    #[derive(Clone, Copy)]
    pub struct Avx2(__m256, __m256);

    #[inline(always)]
    unsafe fn sum256(v: __m256) -> f32 {
        // SAFETY: AVX, by the contract of the trait.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    // SAFETY: needs avx512f and avx512dq.
    unsafe impl Lanes for Avx512 {
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: the contract of the trait, here and below.
            Avx512(unsafe { _mm512_setzero_ps() })
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            Avx512(unsafe { _mm512_set1_ps(value) })
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            Avx512(unsafe { _mm512_loadu_ps(from) })
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self.0) }
        }

        #[inline(always)]
        unsafe fn fma(self, by: Self, acc: Self) -> Self {
            Avx512(unsafe { _mm512_fmadd_ps(self.0, by.0, acc.0) })
        }

        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe {
                sum256(_mm256_add_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0)))
            }
        }
    }

    // SAFETY: needs avx2 and fma.
    unsafe impl Lanes for Avx2 {
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: the contract of the trait, here and below.
            unsafe { Avx2(_mm256_setzero_ps(), _mm256_setzero_ps()) }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            let v = unsafe { _mm256_set1_ps(value) };
            Avx2(v, v)
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { Avx2(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe {
                _mm256_storeu_ps(to, self.0);
                _mm256_storeu_ps(to.add(8), self.1);
            }
        }

        #[inline(always)]
        unsafe fn fma(self, by: Self, acc: Self) -> Self {
            unsafe { Avx2(_mm256_fmadd_ps(self.0, by.0, acc.0), _mm256_fmadd_ps(self.1, by.1, acc.1)) }
        }

        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe { sum256(_mm256_add_ps(self.0, self.1)) }
        }
    }
}

/// Defines `fn $name(level: Level, args…)`, which runs `$kernel` compiled for that level. The kernel is generic over
/// `Lanes` and two tile extents that suit the number of registers, and must be `#[inline(always)]`.
macro_rules! by_level {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) = $kernel:ident,
     avx512 ($r512:literal, $c512:literal), narrow ($r:literal, $c:literal)) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        $vis unsafe fn $name(level: $crate::cpu::lanes::Level, $($arg: $type),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")]
            unsafe fn avx512($($arg: $type),*) {
                // SAFETY: the caller's, here and below.
                unsafe { $kernel::<$crate::cpu::lanes::Avx512, $r512, $c512>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            unsafe fn avx2($($arg: $type),*) {
                unsafe { $kernel::<$crate::cpu::lanes::Avx2, $r, $c>($($arg),*) }
            }
            match level {
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::lanes::Level::Avx512 => unsafe { avx512($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::lanes::Level::Avx2 => unsafe { avx2($($arg),*) },
                _ => unsafe { $kernel::<$crate::cpu::lanes::Array, $r, $c>($($arg),*) },
            }
        }
    };
}
pub(crate) use by_level;
