// Around the experts' products: where each copy of a row goes, and the weighted sum.
//
// A slot is a row's choice of an expert, `slot = row * top_k + rank`; slots are placed by expert, within one in their own order,
// so that the same routing gives the same places. Tiles are runs of at most TOKENS places of one expert.
// Bound: bytes, and for few rows the latency of three small launches.
#include "numbers.cuh"
#include "tile.cuh"

// Slots of an expert. Grid: experts.
extern "C" __global__ void __launch_bounds__(256)
    moe_count(const uint32_t* counts, uint32_t top_k, const uint32_t* chosen, uint32_t* slots_of) {
    __shared__ uint32_t sums[8];
    uint32_t slots = counts[0] * top_k, sum = 0;
    for (uint32_t slot = threadIdx.x; slot < slots; slot += 256) sum += chosen[slot] == blockIdx.x;
    for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < 8; i++) sum += sums[i];
        slots_of[blockIdx.x] = sum;
    }
}

// First place of every expert, and the tiles: `tile_count[0]` of them, `tile_count[1]` is the number of slots. A thread has up to
// four experts one after the other; places and tiles before them are sums over the threads before, by doubling distances.
extern "C" __global__ void __launch_bounds__(256) moe_tiles(const uint32_t* slots_of, uint32_t experts, uint32_t tokens,
                                                            uint32_t* first_of, uint32_t* tile_count, Tile* tiles) {
    __shared__ uint2 sums[256];
    uint32_t count[4], begin = threadIdx.x * 4;
    uint2 sum = {0, 0};
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        count[i] = begin + i < experts ? slots_of[begin + i] : 0;
        sum = {sum.x + count[i], sum.y + (count[i] + tokens - 1) / tokens};
    }
    uint2 own = sum;
    for (uint32_t distance = 1; distance < 256; distance *= 2) {
        sums[threadIdx.x] = sum;
        __syncthreads();
        if (threadIdx.x >= distance) sum = {sum.x + sums[threadIdx.x - distance].x, sum.y + sums[threadIdx.x - distance].y};
        __syncthreads();
    }
    if (threadIdx.x == 255) {
        tile_count[0] = sum.y;
        tile_count[1] = sum.x;
    }
    uint32_t place = sum.x - own.x, tile = sum.y - own.y;
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        if (begin + i < experts) first_of[begin + i] = place;
        uint32_t tiles_of = (count[i] + tokens - 1) / tokens;
        for (uint32_t at = 0; at < tiles_of; at++) {
            uint32_t done = at * tokens;
            tiles[tile++] = tile_of(begin + i, place + done, min(tokens, count[i] - done), at, tiles_of);
        }
        place += count[i];
    }
}

// `place[slot]`, and the row that lies at each place. Grid: experts.
extern "C" __global__ void __launch_bounds__(256)
    moe_place(const uint32_t* counts, uint32_t top_k, const uint32_t* chosen, const uint32_t* first_of, uint32_t* place,
              uint32_t* row_at) {
    __shared__ uint32_t before[9];
    uint32_t slots = counts[0] * top_k, next = first_of[blockIdx.x];
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (uint32_t base = 0; base < slots; base += 256) {
        uint32_t slot = base + threadIdx.x;
        bool mine = slot < slots && chosen[slot] == blockIdx.x;
        uint32_t warps = __ballot_sync(0xffffffffu, mine);
        if (lane == 0) before[warp + 1] = __popc(warps);
        __syncthreads();
        if (threadIdx.x == 0) {
            before[0] = 0;
            for (int i = 1; i < 9; i++) before[i] += before[i - 1];
        }
        __syncthreads();
        if (mine) {
            uint32_t at = next + before[warp] + __popc(warps & ((1u << lane) - 1));
            place[slot] = at;
            row_at[at] = slot / top_k;
        }
        next += before[8];
        __syncthreads();
    }
}

// Sum over this thread and those before it, of 1024.
__device__ __forceinline__ uint2 sum_to_here(uint2 own) {
    __shared__ uint2 warps[32];
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (uint32_t distance = 1; distance < 32; distance *= 2) {
        uint32_t x = __shfl_up_sync(0xffffffffu, own.x, distance), y = __shfl_up_sync(0xffffffffu, own.y, distance);
        if (lane >= distance) own = {own.x + x, own.y + y};
    }
    if (lane == 31) warps[warp] = own;
    __syncthreads();
    for (uint32_t i = 0; i < warp; i++) own = {own.x + warps[i].x, own.y + warps[i].y};
    return own;
}

// What the three kernels above do, for at most 1024 slots and experts, by one block: a thread has a slot, then an expert.
extern "C" __global__ void __launch_bounds__(1024)
    moe_place_few(const uint32_t* counts, uint32_t top_k, const uint32_t* chosen, uint32_t tokens, uint32_t* place,
                  uint32_t* row_at, uint32_t* tile_count, Tile* tiles) {
    __shared__ uint32_t expert_of[1024], count_of[1024];
    uint32_t slots = counts[0] * top_k, thread = threadIdx.x, before = 0;
    uint32_t expert = thread < slots ? chosen[thread] : 0xffffffffu;
    expert_of[thread] = expert;
    count_of[thread] = 0;
    __syncthreads();
    if (thread < slots) atomicAdd(count_of + expert, 1);
    if (thread < slots) {
        for (uint32_t slot = 0; slot < thread; slot++) before += expert_of[slot] == expert;
    }
    __syncthreads();
    uint32_t count = count_of[thread], tiles_of = (count + tokens - 1) / tokens;
    uint2 sum = sum_to_here({count, tiles_of});
    uint32_t first = sum.x - count, tile = sum.y - tiles_of;
    count_of[thread] = first;
    for (uint32_t at = 0; at < tiles_of; at++) {
        uint32_t done = at * tokens;
        tiles[tile++] = tile_of(thread, first + done, min(tokens, count - done), at, tiles_of);
    }
    if (thread == 1023) {
        tile_count[0] = sum.y;
        tile_count[1] = sum.x;
    }
    __syncthreads();
    if (thread < slots) {
        uint32_t at = count_of[expert] + before;
        place[thread] = at;
        row_at[at] = thread / top_k;
    }
}

// out[row] = sum over slots, best first, of weight * at[place[slot]], then + shared[row]; eight columns a thread. Grid: rows by
// hidden / 1024.
extern "C" __global__ void __launch_bounds__(128)
    moe_combine(const uint32_t* counts, uint32_t top_k, const bf16* at, const uint32_t* place, const float* weights,
                const bf16* shared, uint32_t hidden, bf16* out) {
    uint32_t row = blockIdx.x, column = (blockIdx.y * 128 + threadIdx.x) * 8;
    if (row >= counts[0] || column >= hidden) return;
    Eight sum = {};
#pragma unroll 4
    for (uint32_t rank = 0; rank < top_k; rank++) {
        uint32_t slot = row * top_k + rank;
        Eight x = load8(at + (uint64_t)place[slot] * hidden + column);
        float weight = weights[slot];
#pragma unroll
        for (int i = 0; i < 8; i++) sum.at[i] = fmaf(weight, x.at[i], sum.at[i]);
    }
    if (shared) {
        Eight x = load8(shared + (uint64_t)row * hidden + column);
#pragma unroll
        for (int i = 0; i < 8; i++) sum.at[i] += x.at[i];
    }
    store8(out + (uint64_t)row * hidden + column, sum);
}
