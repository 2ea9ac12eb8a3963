// Rows `first ..` of a grouped product, all of one matrix: placed by moe.cu, multiplied by linear.cu.
#pragma once
#include <stdint.h>

// Tiles that meet a block of a matrix one after the other, at most.
#define TOGETHER 8

struct Tile {
    uint32_t matrix, first, rows;
    // Of those that meet a block of the matrix one after the other: how many come before this one, and all of them.
    uint16_t before, together;
};

// Tile `index` of the `count` that a matrix has.
__device__ __forceinline__ Tile tile_of(uint32_t matrix, uint32_t first, uint32_t rows, uint32_t index, uint32_t count) {
    uint32_t before = index % TOGETHER;
    return {matrix, first, rows, (uint16_t)before, (uint16_t)min(TOGETHER, count - (index - before))};
}
