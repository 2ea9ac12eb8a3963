// Numbers out of a formula, for weights without files and for a pool that was never prefilled: src/random.rs in device code,
// the same bits. Element i of a tensor comes from Philox4x32-10 with the tensor's key and a counter of i.
//   random_e4m3   sixteen bytes a thread: byte b of the words becomes (b & 0x9f) | 0x20, whose value is finite and not zero.
//   random_bf16   one element a thread, out[b][n][k] = element first + b * stride_b + n * stride_n + k * stride_k: uniform, or what an
//                 e4m3 byte stands for, times `unit`, rounded to bf16.
// Grid-stride loops of 256 threads; no shared memory; bound by integer arithmetic (Philox), about 100 operations a thread.
#include "math.cuh"
#include <cuda_bf16.h>

__device__ __forceinline__ uint4 words(uint64_t key, uint64_t counter) {
    return philox(make_uint2((uint32_t)key, (uint32_t)(key >> 32)),
                  make_uint4((uint32_t)counter, (uint32_t)(counter >> 32), 0, 0));
}

__device__ __forceinline__ uint32_t word(uint4 words, uint32_t which) {
    return which == 0 ? words.x : which == 1 ? words.y : which == 2 ? words.z : words.w;
}

__device__ __forceinline__ uint32_t finite(uint32_t bytes) { return (bytes & 0x9f9f9f9fu) | 0x20202020u; }

extern "C" __global__ void __launch_bounds__(256) random_e4m3(uint64_t key, uint64_t count, uint8_t* out) {
    bool aligned = ((uintptr_t)out & 15) == 0;
    uint64_t threads = (uint64_t)gridDim.x * blockDim.x;
    for (uint64_t j = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; 16 * j < count; j += threads) {
        uint4 drawn = words(key, j);
        uint4 bytes = make_uint4(finite(drawn.x), finite(drawn.y), finite(drawn.z), finite(drawn.w));
        if (aligned && 16 * j + 16 <= count) {
            reinterpret_cast<uint4*>(out)[j] = bytes;
            continue;
        }
        for (uint32_t b = 0; b < 16 && 16 * j + b < count; b++)
            out[16 * j + b] = (uint8_t)(word(bytes, b / 4) >> (8 * (b % 4)));
    }
}

// The value of a byte with an exponent that is not the format's least.
__device__ __forceinline__ float e4m3(uint32_t byte) {
    return __uint_as_float((byte & 0x80) << 24 | ((byte >> 3 & 15) + 120) << 23 | (byte & 7) << 20);
}

extern "C" __global__ void __launch_bounds__(256)
    random_bf16(uint64_t key, uint32_t fp8, float unit, uint64_t count, uint32_t n, uint32_t k, uint64_t first,
                uint64_t stride_b, uint64_t stride_n, uint64_t stride_k, __nv_bfloat16* out) {
    uint64_t threads = (uint64_t)gridDim.x * blockDim.x, matrix = (uint64_t)n * k;
    for (uint64_t o = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; o < count; o += threads) {
        uint64_t at = o % matrix;
        uint64_t i = first + o / matrix * stride_b + at / k * stride_n + at % k * stride_k;
        float value;
        if (fp8) {
            value = e4m3(finite(word(words(key, i / 16), i % 16 / 4)) >> (8 * (i % 4)) & 0xff);
        } else {
            value = (float)((int32_t)(word(words(key, i / 4), i % 4) >> 8) - (1 << 23));
        }
        out[o] = __float2bfloat16_rn(__fmul_rn(value, unit));
    }
}
