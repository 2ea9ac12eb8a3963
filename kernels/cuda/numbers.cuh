// Types and conversions that every family uses. bf16 in memory, f32 in registers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <stdint.h>

typedef __nv_bfloat16 bf16;

__device__ __forceinline__ float to_f32(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ bf16 to_bf16(float x) { return __float2bfloat16_rn(x); }

// Sum over the 32 lanes of a warp, in a fixed order; every lane gets it.
__device__ __forceinline__ float warp_sum(float x) {
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// Eight values that lie together, in 16 bytes.
struct Eight {
    float at[8];
};

__device__ __forceinline__ Eight load8(const bf16* from) {
    uint4 packed = *(const uint4*)from;
    const __nv_bfloat162* pairs = (const __nv_bfloat162*)&packed;
    Eight x;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 pair = __bfloat1622float2(pairs[i]);
        x.at[2 * i] = pair.x;
        x.at[2 * i + 1] = pair.y;
    }
    return x;
}

__device__ __forceinline__ void store8(bf16* to, const Eight& x) {
    uint4 packed;
    __nv_bfloat162* pairs = (__nv_bfloat162*)&packed;
#pragma unroll
    for (int i = 0; i < 4; i++) pairs[i] = __floats2bfloat162_rn(x.at[2 * i], x.at[2 * i + 1]);
    *(uint4*)to = packed;
}
