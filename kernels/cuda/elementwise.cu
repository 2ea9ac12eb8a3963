// What happens row by row between the products: embedding, norm, rotation, cache rows.
//
//   embed         residual[t] = table[token[t]]
//   rms_norm      residual += delta, rounded;  out = weight * residual * rsqrt(mean(residual^2) + eps)
//   rotate_query  the last `rope` elements of every head of a query, in place: adjacent pairs (x, y) become
//                 (x cos - y sin, x sin + y cos), the angle being that of the row's position
//   cache_write   low[t] = a query | latent | rotary key:  normed[t] = norm(a query),
//                 pool[block][layer][token] = norm(latent) | rotate(rotary key)
//
// Layouts: activations bf16 [rows][width]; norm weights f32; angles f32 pairs (cos, sin) [position][rope /
// 2]; the pool bf16 [block][layer][block_tokens][latent + rope]. Arithmetic is f32, results are rounded once.
// Thread map: one block of 256 threads per row; vectors of 8 elements (embed, rms_norm) or pairs are dealt
// out to its threads. Rows from counts[0] on do nothing. Sums: each thread its own elements in order, lanes
// by halving, then warps in order. Shared memory: one float per warp. All of it is bound by the bandwidth of
// memory.
#include "numbers.cuh"

#define THREADS 256

// Sum over the block; every thread gets it. `warps` may be used again after the next barrier.
__device__ __forceinline__ float block_sum(float x, float* warps) {
    x = warp_sum(x);
    if ((threadIdx.x & 31) == 0) warps[threadIdx.x >> 5] = x;
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < THREADS / 32; warp++) sum += warps[warp];
    return sum;
}

__device__ __forceinline__ __nv_bfloat162 rotated(__nv_bfloat162 pair, float2 angle) {
    float2 v = __bfloat1622float2(pair);
    return __floats2bfloat162_rn(v.x * angle.x - v.y * angle.y, v.x * angle.y + v.y * angle.x);
}

// A token outside the vocabulary is what sampling leaves where logits were not finite; its error is on the
// way to the host while this step already runs. It gets zeros, so that the step ends.
extern "C" __global__ void __launch_bounds__(THREADS)
embed(const uint32_t* counts, const uint32_t* tokens, const bf16* table, bf16* residual, uint32_t hidden,
      uint32_t vocab) {
    uint32_t row = blockIdx.x;
    if (row >= counts[0]) return;
    uint32_t token = tokens[row];
    const uint4* from = reinterpret_cast<const uint4*>(table + (uint64_t)token * hidden);
    uint4* to = reinterpret_cast<uint4*>(residual + (uint64_t)row * hidden);
    for (uint32_t i = threadIdx.x; i < hidden / 8; i += THREADS) {
        to[i] = token < vocab ? from[i] : make_uint4(0, 0, 0, 0);
    }
}

// `delta` may be null: nothing is added and the residual stays as it is. The second pass reads what the same
// thread wrote in the first.
extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm(const uint32_t* counts, bf16* residual, const bf16* delta, const float* weight, float eps, bf16* out,
         uint32_t width) {
    __shared__ float warps[THREADS / 32];
    uint32_t row = blockIdx.x;
    if (row >= counts[0]) return;
    uint64_t start = (uint64_t)row * width;
    bf16* x = residual + start;
    float squares = 0.0f;
    for (uint32_t i = threadIdx.x * 8; i < width; i += THREADS * 8) {
        Eight values = load8(x + i);
        if (delta != nullptr) {
            Eight added = load8(delta + start + i);
            for (int j = 0; j < 8; j++) values.at[j] += added.at[j];
            store8(x + i, values);
            for (int j = 0; j < 8; j++) values.at[j] = to_f32(to_bf16(values.at[j]));
        }
        for (int j = 0; j < 8; j++) squares = fmaf(values.at[j], values.at[j], squares);
    }
    float inverse = 1.0f / sqrtf(block_sum(squares, warps) / (float)width + eps);
    for (uint32_t i = threadIdx.x * 8; i < width; i += THREADS * 8) {
        Eight values = load8(x + i);
        const float4* w = reinterpret_cast<const float4*>(weight + i);
        float4 low = w[0], high = w[1];
        float weights[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        for (int j = 0; j < 8; j++) values.at[j] = weights[j] * (values.at[j] * inverse);
        store8(out + start + i, values);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
rotate_query(const uint32_t* counts, const uint32_t* positions, const float2* angles, bf16* query,
             uint32_t heads, uint32_t nope, uint32_t rope) {
    uint32_t row = blockIdx.x;
    if (row >= counts[0]) return;
    uint32_t pairs = rope / 2, width = nope + rope;
    const float2* angle = angles + (uint64_t)positions[row] * pairs;
    bf16* values = query + (uint64_t)row * heads * width;
    for (uint32_t i = threadIdx.x; i < heads * pairs; i += THREADS) {
        uint32_t head = i / pairs, pair = i % pairs;
        __nv_bfloat162* at = reinterpret_cast<__nv_bfloat162*>(values + head * width + nope + 2 * pair);
        *at = rotated(*at, angle[pair]);
    }
}

// norm of `width` elements of one row, by the whole block.
__device__ __forceinline__ void norm_row(const bf16* x, const float* weight, float eps, uint32_t width,
                                         bf16* out, float* warps) {
    const __nv_bfloat162* from = reinterpret_cast<const __nv_bfloat162*>(x);
    float squares = 0.0f;
    for (uint32_t i = threadIdx.x; i < width / 2; i += THREADS) {
        float2 v = __bfloat1622float2(from[i]);
        squares = fmaf(v.y, v.y, fmaf(v.x, v.x, squares));
    }
    float inverse = 1.0f / sqrtf(block_sum(squares, warps) / (float)width + eps);
    for (uint32_t i = threadIdx.x; i < width / 2; i += THREADS) {
        float2 v = __bfloat1622float2(from[i]);
        reinterpret_cast<__nv_bfloat162*>(out)[i] =
            __floats2bfloat162_rn(weight[2 * i] * (v.x * inverse), weight[2 * i + 1] * (v.y * inverse));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
cache_write(const uint32_t* counts, const uint32_t* positions, const uint32_t* entry_of_row,
            const uint32_t* block_table, uint32_t max_blocks, const float2* angles, const bf16* low,
            uint32_t low_stride, uint32_t rank, const float* query_norm, const float* kv_norm, float eps,
            bf16* normed, bf16* pool, uint32_t layers, uint32_t layer, uint32_t block_tokens, uint32_t latent,
            uint32_t rope) {
    __shared__ float of_query[THREADS / 32], of_latent[THREADS / 32];
    uint32_t row = blockIdx.x;
    if (row >= counts[0]) return;
    const bf16* from = low + (uint64_t)row * low_stride;
    if (rank > 0) norm_row(from, query_norm, eps, rank, normed + (uint64_t)row * rank, of_query);
    uint32_t position = positions[row];
    uint64_t block = block_table[(uint64_t)entry_of_row[row] * max_blocks + position / block_tokens];
    uint64_t place = (block * layers + layer) * block_tokens + position % block_tokens;
    bf16* cached = pool + place * (latent + rope);
    norm_row(from + rank, kv_norm, eps, latent, cached, of_latent);
    const float2* angle = angles + (uint64_t)position * (rope / 2);
    const __nv_bfloat162* key = reinterpret_cast<const __nv_bfloat162*>(from + rank + latent);
    for (uint32_t i = threadIdx.x; i < rope / 2; i += THREADS) {
        reinterpret_cast<__nv_bfloat162*>(cached + latent)[i] = rotated(key[i], angle[i]);
    }
}
