// How a context is split among blocks that attend to it at the same time.
#pragma once
#include <stdint.h>

#define TILE 64
// Positions of a split: shorter ones are not worth the sum over splits, longer ones leave multiprocessors without work.
#define SHORTEST_SPLIT 128
#define LONGEST_SPLIT 4096

// Positions of a split of a row that sees `context` positions and would have `wanted` splits.
__device__ __forceinline__ uint32_t split_length(uint32_t context, uint32_t wanted) {
    uint32_t even = (context + wanted - 1) / wanted;
    even = (even + TILE - 1) / TILE * TILE;
    return min(max(even, SHORTEST_SPLIT), LONGEST_SPLIT);
}

__device__ __forceinline__ uint32_t splits_of(uint32_t context, uint32_t wanted) {
    uint32_t length = split_length(context, wanted);
    return (context + length - 1) / length;
}
