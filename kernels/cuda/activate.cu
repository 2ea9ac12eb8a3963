// Rows on their way into a product: gathered, activated, and quantised for FP8 weights.
//
// FP8: e4m3 with a scale for each 128 channels: s = max(max |x|, 1e-4) / 448, q = e4m3(x / s), to nearest even.
// Layouts: rows [rows][k] with a stride, q [rows][k], scales [ceil(k / 128)][pitch >= rows]; `both` is [rows][gate | up].
// Grid: rows by some blocks of 4 warps; a warp takes two groups of 128 channels after the other. Bound: bytes.
#include "numbers.cuh"

// A lane's eight channels of a group of 128, which is half a warp's; a lane beyond the row takes part with zeros.
__device__ __forceinline__ void quantize_group(const Eight& x, bool valid, uint8_t* q, float* scale_at) {
    float largest = 1e-4f;
#pragma unroll
    for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(x.at[i]));
#pragma unroll
    for (int offset = 8; offset > 0; offset >>= 1) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    }
    float scale = largest / 448.f;
    if (valid && threadIdx.x % 16 == 0) *scale_at = scale;
    uint32_t packed[2] = {};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        uint32_t byte = __nv_cvt_float_to_fp8(x.at[i] / scale, __NV_SATFINITE, __NV_E4M3);
        packed[i / 4] |= byte << (i % 4 * 8);
    }
    if (valid) *(uint2*)q = {packed[0], packed[1]};
}

__device__ __forceinline__ float rounded(float x) { return to_f32(to_bf16(x)); }

// silu(gate) * up, rounded to bf16.
__device__ __forceinline__ Eight activate(const bf16* gate, const bf16* up) {
    Eight g = load8(gate), u = load8(up), y;
#pragma unroll
    for (int i = 0; i < 8; i++) y.at[i] = rounded(g.at[i] / (1.f + __expf(-g.at[i])) * u.at[i]);
    return y;
}

// `*count * per` rows; row i is x[row_at[i]] if row_at is given, else x[i].
extern "C" __global__ void __launch_bounds__(128) quantize(const uint32_t* count, uint32_t per, const uint32_t* row_at,
                                                           const bf16* x, uint32_t stride, uint32_t k, uint8_t* q,
                                                           float* scales, uint32_t pitch) {
    uint32_t row = blockIdx.x;
    if (row >= *count * per) return;
    const bf16* from = x + (uint64_t)(row_at ? row_at[row] : row) * stride;
    for (uint32_t begin = (blockIdx.y * 4 + threadIdx.x / 32) * 256; begin < k; begin += gridDim.y * 1024) {
        uint32_t column = begin + threadIdx.x % 32 * 8;
        bool valid = column < k;
        Eight eight = valid ? load8(from + column) : Eight{};
        quantize_group(eight, valid, q + (uint64_t)row * k + column, scales + (uint64_t)(column / 128) * pitch + row);
    }
}

// As quantize, of silu(both[row][0 .. k]) * both[row][k ..].
extern "C" __global__ void __launch_bounds__(128) silu_mul_quantize(const uint32_t* count, uint32_t per, const bf16* both,
                                                                    uint32_t k, uint8_t* q, float* scales,
                                                                    uint32_t pitch) {
    uint32_t row = blockIdx.x;
    if (row >= *count * per) return;
    const bf16* from = both + (uint64_t)row * 2 * k;
    for (uint32_t begin = (blockIdx.y * 4 + threadIdx.x / 32) * 256; begin < k; begin += gridDim.y * 1024) {
        uint32_t column = begin + threadIdx.x % 32 * 8;
        bool valid = column < k;
        Eight eight = valid ? activate(from + column, from + k + column) : Eight{};
        quantize_group(eight, valid, q + (uint64_t)row * k + column, scales + (uint64_t)(column / 128) * pitch + row);
    }
}

// out[row] = silu(both[row][0 .. k]) * both[row][k ..]. A lane takes eight channels.
extern "C" __global__ void __launch_bounds__(128)
    silu_mul(const uint32_t* count, uint32_t per, const bf16* both, uint32_t k, bf16* out) {
    uint32_t row = blockIdx.x;
    if (row >= *count * per) return;
    const bf16* from = both + (uint64_t)row * 2 * k;
    for (uint32_t column = (blockIdx.y * 128 + threadIdx.x) * 8; column < k; column += gridDim.y * 1024) {
        store8(out + (uint64_t)row * k + column, activate(from + column, from + k + column));
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
