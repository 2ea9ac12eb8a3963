// Leaves of the digest of a KV block (kv::Digest is the specification and has the test vectors):
//
//   leaves[i] = XXH64(bytes[4096 i ..][.. 4096], seed = i)
//
// over the valid rows of every layer, one after the other. XXH64: github.com/Cyan4973/xxHash, doc/xxhash_spec.md.
//
// Layouts: `block` is [layers][stride] bytes, of which the first `width` of each layer count; both are multiples of four.
// Thread map: four threads a leaf, one for each accumulator of XXH64, which takes every fourth word of eight bytes; the
// first of them merges the four and takes in what is left of a last leaf. No shared memory. Bound: a leaf is 128 dependent
// rounds of two products; a block of DeepSeek-V3 has 1,098 leaves, so that it takes about the time of one.
#include <stdint.h>

#define LEAF 4096u
#define P1 0x9E3779B185EBCA87ull
#define P2 0xC2B2AE3D27D4EB4Full
#define P3 0x165667B19E3779F9ull
#define P4 0x85EBCA77C2B2AE63ull
#define P5 0x27D4EB2F165667C5ull

__device__ __forceinline__ uint64_t rotated(uint64_t x, int by) { return (x << by) | (x >> (64 - by)); }

__device__ __forceinline__ uint64_t round_of(uint64_t sum, uint64_t word) { return rotated(sum + word * P2, 31) * P1; }

__device__ __forceinline__ uint64_t merged(uint64_t hash, uint64_t sum) { return (hash ^ round_of(0, sum)) * P1 + P4; }

// The valid bytes of a block as if they lay one after the other.
struct Bytes {
    const uint8_t* block;
    uint32_t width, stride;

    __device__ __forceinline__ uint32_t half(uint32_t at) const {
        uint32_t place = width == stride ? at : at / width * stride + at % width;
        return *reinterpret_cast<const uint32_t*>(block + place);
    }

    __device__ __forceinline__ uint64_t word(uint32_t at) const { return half(at) | (uint64_t)half(at + 4) << 32; }
};

// Accumulator `lane` after all whole stripes of 32 bytes.
__device__ __forceinline__ uint64_t accumulated(const Bytes& bytes, uint32_t start, uint32_t stripes, uint32_t lane,
                                                uint64_t seed) {
    uint64_t sum = seed + (lane == 0 ? P1 + P2 : lane == 1 ? P2 : lane == 2 ? 0 : 0 - P1);
#pragma unroll 8
    for (uint32_t i = 0; i < stripes; i++) sum = round_of(sum, bytes.word(start + 32 * i + 8 * lane));
    return sum;
}

// What follows the last whole stripe: fewer than 32 bytes, a multiple of four.
__device__ __forceinline__ uint64_t with_rest(const Bytes& bytes, uint64_t hash, uint32_t at, uint32_t end) {
    for (; at + 8 <= end; at += 8) hash = rotated(hash ^ round_of(0, bytes.word(at)), 27) * P1 + P4;
    if (at < end) hash = rotated(hash ^ (bytes.half(at) * P1), 23) * P2 + P3;
    return hash;
}

__device__ __forceinline__ uint64_t avalanche(uint64_t hash) {
    hash = (hash ^ (hash >> 33)) * P2;
    hash = (hash ^ (hash >> 29)) * P3;
    return hash ^ (hash >> 32);
}

extern "C" __global__ void __launch_bounds__(32)
    digest_leaves(const uint8_t* block, uint32_t width, uint32_t stride, uint32_t layers, uint64_t* leaves) {
    const Bytes bytes = {block, width, stride};
    uint32_t total = width * layers, thread = blockIdx.x * 32 + threadIdx.x;
    uint32_t leaf = thread / 4, lane = thread % 4, start = leaf * LEAF;
    // Beyond the last leaf there is nothing, but a shuffle wants the whole warp.
    uint32_t end = min(total, start + LEAF), length = start < total ? end - start : 0, stripes = length / 32;
    uint64_t sum = accumulated(bytes, start, stripes, lane, leaf);
    uint64_t sums[4];
    for (int i = 0; i < 4; i++) sums[i] = __shfl_sync(0xffffffffu, sum, i, 4);
    if (lane != 0 || length == 0) return;
    uint64_t hash = leaf + P5;
    if (stripes > 0) {
        hash = rotated(sums[0], 1) + rotated(sums[1], 7) + rotated(sums[2], 12) + rotated(sums[3], 18);
        for (int i = 0; i < 4; i++) hash = merged(hash, sums[i]);
    }
    leaves[leaf] = avalanche(with_rest(bytes, hash + length, start + 32 * stripes, end));
}
