// Rows on their way into a product: gathered, activated, and quantised for FP8 weights.
//
// FP8: e4m3 with a scale for each 128 channels: s = max(max |x|, 1e-4) / 448, q = e4m3(x / s), to nearest even.
// Layouts: rows [rows][k] with a stride, q [rows][k], scales [ceil(k / 128)][pitch >= rows]; `both` is [rows][gate | up].
// Grid: rows by some blocks of 4 warps; a warp takes a group of 128 channels after the other. Bound: bytes.
#include "numbers.cuh"

struct Four {
    float at[4];
};

__device__ __forceinline__ Four load4(const bf16* from) {
    __align__(8) bf16 four[4];
    *(uint2*)four = *(const uint2*)from;
    return {to_f32(four[0]), to_f32(four[1]), to_f32(four[2]), to_f32(four[3])};
}

// A lane's four channels of a group of 128; a lane beyond the row takes part with zeros.
__device__ __forceinline__ void quantize_group(Four x, bool valid, uint8_t* q, float* scale_at) {
    float largest = 1e-4f;
#pragma unroll
    for (int i = 0; i < 4; i++) largest = fmaxf(largest, fabsf(x.at[i]));
    float scale = warp_max(largest) / 448.f;
    if (threadIdx.x % 32 == 0) *scale_at = scale;
    uint32_t packed = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        packed |= (uint32_t)__nv_cvt_float_to_fp8(x.at[i] / scale, __NV_SATFINITE, __NV_E4M3) << (8 * i);
    }
    if (valid) *(uint32_t*)q = packed;
}

__device__ __forceinline__ float rounded(float x) { return to_f32(to_bf16(x)); }

// silu(gate) * up, rounded to bf16.
__device__ __forceinline__ Four activate(const bf16* gate, const bf16* up) {
    Four g = load4(gate), u = load4(up), y;
#pragma unroll
    for (int i = 0; i < 4; i++) y.at[i] = rounded(g.at[i] / (1.f + __expf(-g.at[i])) * u.at[i]);
    return y;
}

// `*count * per` rows; row i is x[row_at[i]] if row_at is given, else x[i].
extern "C" __global__ void __launch_bounds__(128) quantize(const uint32_t* count, uint32_t per, const uint32_t* row_at,
                                                           const bf16* x, uint32_t stride, uint32_t k, uint8_t* q,
                                                           float* scales, uint32_t pitch) {
    uint32_t row = blockIdx.x, groups = (k + 127) / 128, lane = threadIdx.x % 32;
    if (row >= *count * per) return;
    const bf16* from = x + (uint64_t)(row_at ? row_at[row] : row) * stride;
    for (uint32_t group = blockIdx.y * 4 + threadIdx.x / 32; group < groups; group += gridDim.y * 4) {
        uint32_t column = group * 128 + lane * 4;
        bool valid = column < k;
        Four four = valid ? load4(from + column) : Four{};
        quantize_group(four, valid, q + (uint64_t)row * k + column, scales + (uint64_t)group * pitch + row);
    }
}

// As quantize, of silu(both[row][0 .. k]) * both[row][k ..].
extern "C" __global__ void __launch_bounds__(128) silu_mul_quantize(const uint32_t* count, uint32_t per, const bf16* both,
                                                                    uint32_t k, uint8_t* q, float* scales,
                                                                    uint32_t pitch) {
    uint32_t row = blockIdx.x, groups = (k + 127) / 128, lane = threadIdx.x % 32;
    if (row >= *count * per) return;
    const bf16* from = both + (uint64_t)row * 2 * k;
    for (uint32_t group = blockIdx.y * 4 + threadIdx.x / 32; group < groups; group += gridDim.y * 4) {
        uint32_t column = group * 128 + lane * 4;
        bool valid = column < k;
        Four four = valid ? activate(from + column, from + k + column) : Four{};
        quantize_group(four, valid, q + (uint64_t)row * k + column, scales + (uint64_t)group * pitch + row);
    }
}

// out[row] = silu(both[row][0 .. k]) * both[row][k ..]. A lane takes four channels.
extern "C" __global__ void __launch_bounds__(128)
    silu_mul(const uint32_t* count, uint32_t per, const bf16* both, uint32_t k, bf16* out) {
    uint32_t row = blockIdx.x;
    if (row >= *count * per) return;
    const bf16* from = both + (uint64_t)row * 2 * k;
    for (uint32_t column = (blockIdx.y * 128 + threadIdx.x) * 4; column < k; column += gridDim.y * 512) {
        Four four = activate(from + column, from + k + column);
        __align__(8) bf16 rounded[4];
#pragma unroll
        for (int i = 0; i < 4; i++) rounded[i] = to_bf16(four.at[i]);
        *(uint2*)(out + (uint64_t)row * k + column) = *(uint2*)rounded;
    }
}

// out[row] = x[row_at[row]], 16 bytes a thread.
extern "C" __global__ void __launch_bounds__(128) gather(const uint32_t* count, uint32_t per, const uint32_t* row_at,
                                                         const bf16* x, uint32_t stride, uint32_t k, bf16* out) {
    uint32_t row = blockIdx.x;
    if (row >= *count * per) return;
    const bf16* from = x + (uint64_t)(row_at ? row_at[row] : row) * stride;
    for (uint32_t column = (blockIdx.y * 128 + threadIdx.x) * 8; column < k; column += gridDim.y * 1024) {
        *(uint4*)(out + (uint64_t)row * k + column) = *(const uint4*)(from + column);
    }
}
