// Rows `first ..` of a grouped product, all of one matrix: placed by moe.cu, multiplied by linear.cu.
#pragma once
#include <stdint.h>

struct Tile {
    uint32_t matrix, first, rows, unused;
};
