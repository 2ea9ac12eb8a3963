// The rotary part of queries beside their latent part: to[t][head][latent ..] = from[t][head][nope ..].
// Layouts: from bf16 [rows][heads][nope + rope], to bf16 [rows][heads][latent + rope]. Threads: 4 bytes each. Bound: bytes.
#include "numbers.cuh"

extern "C" __global__ void __launch_bounds__(256)
    absorb_rope(const uint32_t* counts, const uint32_t* from, uint32_t heads, uint32_t nope, uint32_t rope, uint32_t latent,
                uint32_t* to) {
    uint32_t row = blockIdx.x, pairs = rope / 2;
    if (row >= counts[0]) return;
    for (uint32_t i = threadIdx.x; i < heads * pairs; i += 256) {
        uint64_t head = (uint64_t)row * heads + i / pairs;
        to[head * (latent + rope) / 2 + latent / 2 + i % pairs] = from[head * (nope + rope) / 2 + nope / 2 + i % pairs];
    }
}
