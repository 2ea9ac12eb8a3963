// src/math.rs and src/cpu/philox.rs in device code, operation by operation: the same bits as on the CPU. Every
// operation is spelled out, because the compiler would otherwise join products and sums into one rounding.
#pragma once
#include <stdint.h>

// A double whose operations are never joined.
struct Exact {
    double value;
    __device__ __forceinline__ Exact(double x) : value(x) {}
};

__device__ __forceinline__ Exact operator+(Exact a, Exact b) { return __dadd_rn(a.value, b.value); }
__device__ __forceinline__ Exact operator-(Exact a, Exact b) { return __dsub_rn(a.value, b.value); }
__device__ __forceinline__ Exact operator*(Exact a, Exact b) { return __dmul_rn(a.value, b.value); }
__device__ __forceinline__ Exact operator/(Exact a, Exact b) { return __ddiv_rn(a.value, b.value); }

constexpr double LN2_HI = 6.93147180369123816490e-01;
constexpr double LN2_LO = 1.90821492927058770002e-10;

// Natural logarithm.
__device__ inline double ln(double value) {
    if (value <= 0.0 || !isfinite(value)) {
        return value == 0.0 ? -INFINITY : value < 0.0 ? NAN : value;
    }
    bool subnormal = value < 2.2250738585072014e-308;
    if (subnormal) value = __dmul_rn(value, 18014398509481984.0);
    uint64_t shifted = (uint64_t)__double_as_longlong(value) + ((uint64_t)(0x3ff00000 - 0x3fe6a09e) << 32);
    Exact k = (double)((int)(shifted >> 52) - 0x3ff - (subnormal ? 54 : 0));
    uint64_t mantissa = (shifted & 0x000fffffffffffffull) + (0x3fe6a09eull << 32);
    Exact f = Exact(__longlong_as_double((long long)mantissa)) - 1.0;
    Exact s = f / (Exact(2.0) + f);
    Exact z = s * s, half = Exact(0.5) * f * f, w = z * z;
    Exact even = w * (Exact(3.999999999940941908e-01)
        + w * (Exact(2.222219843214978396e-01) + w * Exact(1.531383769920937332e-01)));
    Exact odd = z * (Exact(6.666666666666735130e-01)
        + w * (Exact(2.857142874366239149e-01)
            + w * (Exact(1.818357216161805012e-01) + w * Exact(1.479819860511658591e-01))));
    return (s * (half + even + odd) + k * Exact(LN2_LO) - half + f + k * Exact(LN2_HI)).value;
}

// Exponential.
__device__ inline double exp_f64(double value) {
    if (value > 709.7) return INFINITY;
    if (value < -708.0) return 0.0;
    Exact x = value;
    Exact k = rint((x * Exact(1.44269504088896340735992468100189214)).value);
    Exact hi = x - k * Exact(LN2_HI), lo = k * Exact(LN2_LO);
    Exact r = hi - lo;
    Exact z = r * r;
    Exact c = r - z * (Exact(1.66666666666666019037e-01)
        + z * (Exact(-2.77777777770155933842e-03)
            + z * (Exact(6.61375632143793436117e-05)
                + z * (Exact(-1.65339022054652515390e-06) + z * Exact(4.13813679705723846039e-08)))));
    Exact y = Exact(1.0) + (r * c / (Exact(2.0) - c) - lo + hi);
    return (y * Exact(__longlong_as_double(((long long)k.value + 1023) << 52))).value;
}

// Exponential in f32; 0 below -87.
__device__ __forceinline__ float exp_f32(float x) {
    const float magic = 12582912.0f;
    float bounded = x > 88.0f ? 88.0f : x;
    bounded = bounded < -87.0f ? -87.0f : bounded;
    float sum = __fmaf_rn(bounded, 1.44269504088896340736f, magic);
    float n = __fsub_rn(sum, magic);
    float r = __fmaf_rn(n, -0.693359375f, bounded);
    r = __fmaf_rn(n, 2.1219444e-4f, r);
    float p = 1.98756915e-4f;
    p = __fmaf_rn(p, r, 1.39819995e-3f);
    p = __fmaf_rn(p, r, 8.3334519e-3f);
    p = __fmaf_rn(p, r, 4.1665796e-2f);
    p = __fmaf_rn(p, r, 1.66666655e-1f);
    p = __fmaf_rn(p, r, 0.5f);
    float y = __fadd_rn(__fmaf_rn(p, __fmul_rn(r, r), r), 1.0f);
    float scale = __uint_as_float(((__float_as_uint(sum) - __float_as_uint(magic)) << 23) + 0x3f800000u);
    return x < -87.0f ? 0.0f : __fmul_rn(y, scale);
}

__device__ __forceinline__ float sigmoid(float x) { return __fdiv_rn(1.0f, __fadd_rn(1.0f, exp_f32(-x))); }

// Larger for larger floats, in the total order of IEEE 754: -NaN, -inf, ..., -0, +0, ..., inf, NaN.
__device__ __forceinline__ uint32_t ordered(float x) {
    uint32_t bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_ordered(uint32_t key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// Philox4x32-10.
__device__ __forceinline__ uint4 philox(uint2 key, uint4 counter) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        uint32_t a_high = __umulhi(0xd2511f53u, counter.x), a_low = 0xd2511f53u * counter.x;
        uint32_t b_high = __umulhi(0xcd9e8d57u, counter.z), b_low = 0xcd9e8d57u * counter.z;
        counter = make_uint4(b_high ^ counter.y ^ key.x, b_low, a_high ^ counter.w ^ key.y, a_low);
        key.x += 0x9e3779b9u;
        key.y += 0xbb67ae85u;
    }
    return counter;
}

// Larger than any value of gumbel().
constexpr float LARGEST_NOISE = 22.9f;

// -ln(-ln(1 - w)), w = min((x + 1/2) 2^-32, 1 - 2^-24).
__device__ inline float gumbel(uint32_t x) {
    double w = __dmul_rn(__dadd_rn((double)x, 0.5), 2.3283064365386962890625e-10);
    w = fmin(w, 1.0 - 5.9604644775390625e-8);
    return (float)-ln(-ln(__dsub_rn(1.0, w)));
}

// At least gumbel(x), and cheap: -ln(1 - w) >= w.
__device__ __forceinline__ float gumbel_bound(uint32_t x) {
    return 1e-3f - __logf(((float)x + 0.5f) * 2.3283064365386962890625e-10f);
}
