// Leaves of the digest of a KV block (kv::Digest is the specification and has the test vectors):
//
//   leaves[i] = XXH3-64(bytes[4096 i ..][.. 4096])
//
// over the valid rows of every layer, one after the other, and zeros behind their end. XXH3: github.com/Cyan4973/xxHash,
// doc/xxhash_spec.md, "XXH3 Algorithm for long inputs"; for 4096 bytes these are four blocks of sixteen stripes of 64 bytes.
//
// Layouts: `block` is [layers][stride] bytes, of which the first `width` of each layer count; both are multiples of four.
// Thread map: eight threads a leaf, one for each accumulator, which takes every eighth word of eight bytes; neighbours
// exchange the sums of their words once a block. No shared memory. Bound: the latency of four times sixteen independent
// loads; a block of DeepSeek-V3 has 1,098 leaves, so that it takes about the time of one.
#include <stdint.h>

#define LEAF 4096u
#define STRIPE 64u
#define STRIPES 16
#define BLOCKS 4
#define P32_1 0x9E3779B1ull
#define P32_2 0x85EBCA77ull
#define P32_3 0xC2B2AE3Dull
#define P64_1 0x9E3779B185EBCA87ull
#define P64_2 0xC2B2AE3D27D4EB4Full
#define P64_3 0x165667B19E3779F9ull
#define P64_4 0x85EBCA77C2B2AE63ull
#define P64_5 0x27D4EB2F165667C5ull
#define ALL 0xffffffffu

// XXH3's default secret, little-endian.
__constant__ uint64_t SECRET[24] = {
    0xBE4BA423396CFEB8ull, 0x1CAD21F72C81017Cull, 0xDB979083E96DD4DEull, 0x1F67B3B7A4A44072ull, 0x78E5C0CC4EE679CBull,
    0x2172FFCC7DD05A82ull, 0x8E2443F7744608B8ull, 0x4C263A81E69035E0ull, 0xCB00C391BB52283Cull, 0xA32E531B8B65D088ull,
    0x4EF90DA297486471ull, 0xD8ACDEA946EF1938ull, 0x3F349CE33F76FAA8ull, 0x1D4F0BC7C7BBDCF9ull, 0x3159B4CD4BE0518Aull,
    0x647378D9C97E9FC8ull, 0xC3EBD33483ACC5EAull, 0xEB6313FAFFA081C5ull, 0x49DAF0B751DD0D17ull, 0x9E68D429265516D3ull,
    0xFCA1477D58BE162Bull, 0xCE31D07AD1B8F88Full, 0x280416958F3ACB45ull, 0x7E404BBBCAFBD7AFull,
};

__constant__ uint64_t BEGIN[8] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};

// The secret's eight bytes from `at` on, which is no multiple of eight.
__device__ __forceinline__ uint64_t secret(uint32_t at) {
    uint32_t shift = 8 * (at % 8);
    return (SECRET[at / 8] >> shift) | (SECRET[at / 8 + 1] << (64 - shift));
}

// The valid bytes of a block as if they lay one after the other, and zeros behind them.
struct Bytes {
    const uint8_t* block;
    uint32_t width, stride, total;

    __device__ __forceinline__ uint32_t half(uint32_t at) const {
        if (at >= total) return 0;
        uint32_t place = width == stride ? at : at / width * stride + at % width;
        return *reinterpret_cast<const uint32_t*>(block + place);
    }

    __device__ __forceinline__ uint64_t word(uint32_t at) const { return half(at) | (uint64_t)half(at + 4) << 32; }
};

// What the words of one accumulator add to it, and what they add to its neighbour.
struct Sums {
    uint64_t own, neighbour;

    __device__ __forceinline__ void take(uint64_t word, uint64_t key) {
        uint64_t mixed = word ^ key;
        own += (mixed & 0xffffffffu) * (mixed >> 32);
        neighbour += word;
    }
};

// Accumulator `lane` over the stripes of a block that begins at `at`; the last stripe of a leaf has a secret of its own.
__device__ __forceinline__ Sums summed(const Bytes& bytes, uint32_t at, const uint64_t* keys, bool last, uint32_t lane) {
    Sums sums = {0, 0};
#pragma unroll
    for (int i = 0; i < STRIPES; i++) {
        uint64_t key = last && i == STRIPES - 1 ? secret(121 + 8 * lane) : keys[i];
        sums.take(bytes.word(at + STRIPE * i + 8 * lane), key);
    }
    return sums;
}

__device__ __forceinline__ uint64_t scrambled(uint64_t sum, uint32_t lane) {
    return (sum ^ (sum >> 47) ^ SECRET[16 + lane]) * P32_1;
}

__device__ __forceinline__ uint64_t folded(uint64_t a, uint64_t b) { return a * b ^ __umul64hi(a, b); }

__device__ __forceinline__ uint64_t avalanche(uint64_t hash) {
    hash = (hash ^ (hash >> 37)) * 0x165667919E3779F9ull;
    return hash ^ (hash >> 32);
}

// Accumulator `lane` after the whole leaf at `start`.
__device__ __forceinline__ uint64_t accumulated(const Bytes& bytes, uint32_t start, uint32_t lane) {
    uint64_t sum = BEGIN[lane], keys[STRIPES];
#pragma unroll
    for (int i = 0; i < STRIPES; i++) keys[i] = SECRET[i + lane];
#pragma unroll 1
    for (int block = 0; block < BLOCKS; block++) {
        bool last = block == BLOCKS - 1;
        Sums sums = summed(bytes, start + block * STRIPE * STRIPES, keys, last, lane);
        sum += sums.own + __shfl_xor_sync(ALL, sums.neighbour, 1);
        if (!last) sum = scrambled(sum, lane);
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(32)
    digest_leaves(const uint8_t* block, uint32_t width, uint32_t stride, uint32_t layers, uint64_t* leaves) {
    const Bytes bytes = {block, width, stride, width * layers};
    uint32_t thread = blockIdx.x * 32 + threadIdx.x, leaf = thread / 8, lane = thread % 8;
    // Beyond the last leaf there is nothing, but a shuffle wants the whole warp.
    uint64_t mixed = accumulated(bytes, leaf * LEAF, lane) ^ secret(11 + 8 * lane);
    uint64_t hash = folded(mixed, __shfl_xor_sync(ALL, mixed, 1));
    hash += __shfl_xor_sync(ALL, hash, 2);
    hash += __shfl_xor_sync(ALL, hash, 4);
    if (lane == 0 && leaf * LEAF < bytes.total) leaves[leaf] = avalanche(hash + LEAF * P64_1);
}
