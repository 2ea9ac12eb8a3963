// MLA attention in the absorbed form for 64 heads and more, over the paged cache, causal by position: attention.cu has the formula,
// the layouts and the sum over splits.
//
// Threads: a block has 64 heads of a row and a split of its context: two warpgroups and one thread that loads. Of a tile of 64
//       positions each warpgroup computes the scores of 32 and, when the other's probabilities have come through shared memory,
//       multiplies all 64 by its 256 of the 512 columns. The scores of the next tile are queued behind the sums of the last, so
//       that the tensor cores rest only while probabilities are made.
// Shared memory: queries, and two tiles of the cache, in panels [64 rows][128 bytes] as the copy engine swizzles them. A tile is both
//       keys (all 576 columns) and values (the first 512); it is fetched while the other is worked on. Probabilities [64][PITCH],
//       and the largest score and the sum of each head.
// Bound: tensor cores; with few heads' blocks, the cache's bytes.
#include "numbers.cuh"
#include "splits.cuh"
#include "tensor.cuh"

#define HEADS 64
#define LATENT 512
#define WIDTH 576
#define PANELS 9
#define PANEL (TILE * 128)
#define BYTES (PANELS * PANEL)
#define CONSUMERS 256
#define THREADS (CONSUMERS + 128)
#define HALF (TILE / 2)
// Of a row of probabilities: so that the fragments' words fall into 32 different banks.
#define PITCH (TILE + 8)
#define LOG2E 1.4426950408889634f

struct Ring {
    uint8_t *queries, *tiles;
    bf16* probabilities;
    float* of_heads;  // [warpgroup][HEADS]
    uint64_t *asked, *full, *empty;
    __device__ uint8_t* tile(uint32_t index) const { return tiles + index % 2 * BYTES; }
    __device__ static uint32_t phase(uint32_t index) { return index / 2 & 1; }
};

// A split of a row's context.
struct Split {
    uint32_t begin, end, tiles;
    const uint32_t* blocks;
};

__device__ __forceinline__ void load_panels(uint8_t* to, const CUtensorMap* map, uint32_t row, uint64_t* full) {
    barrier_expect(full, BYTES);
    for (uint32_t p = 0; p < PANELS; p++) load_box(to + p * PANEL, map, p * 128, row, full);
}

__device__ __forceinline__ void produce(const CUtensorMap* query, const CUtensorMap* pool, const Ring& ring, const Split& split,
                                        uint32_t query_row, uint32_t layers, uint32_t layer) {
    load_panels(ring.queries, query, query_row, ring.asked);
    uint32_t block = split.blocks[0];
    for (uint32_t tile = 0; tile < split.tiles; tile++) {
        uint32_t next = tile + 1 < split.tiles ? split.blocks[tile + 1] : 0;
        if (tile >= 2) barrier_wait(ring.empty + tile % 2, Ring::phase(tile) ^ 1);
        load_panels(ring.tile(tile), pool, (block * layers + layer) * TILE, ring.full + tile % 2);
        block = next;
    }
}

// 64 heads: their scores with the warpgroup's 32 positions, its columns of the sums so far, and for each of a lane's two heads the
// largest score and the sum of the warpgroup's probabilities.
struct State {
    float scores[16], sums[2][64], top[2], total[2];
    uint32_t probabilities[16];
};

__device__ __forceinline__ uint32_t group() { return threadIdx.x / 128; }

// A lane's first head; the second is 8 further.
__device__ __forceinline__ uint32_t head() { return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4; }

__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }

__device__ __forceinline__ void begin_scores(State& state, const Ring& ring, uint32_t tile) {
    barrier_wait(ring.full + tile % 2, Ring::phase(tile));
    const uint8_t* keys = ring.tile(tile) + group() * HALF * 128;
    wgmma_fence();
#pragma unroll
    for (int p = 0; p < PANELS; p++) {
        uint64_t q = operand(ring.queries + p * PANEL), k = operand(keys + p * PANEL);
#pragma unroll
        for (int step = 0; step < 4; step++) wgmma<false, HALF>(state.scores, q + 2 * step, k + 2 * step, p + step > 0);
    }
    wgmma_commit();
}

__device__ __forceinline__ void begin_sums(State& state, const Ring& ring, uint32_t tile) {
    const uint8_t* values = ring.tile(tile) + group() * 4 * PANEL;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < TILE / 16; step++) {
        const uint32_t(&p)[16] = state.probabilities;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            wgmma_by_columns(state.sums[half], p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3],
                             operand_by_columns(values + half * 2 * PANEL + step * 16 * 128, PANEL));
        }
    }
    wgmma_commit();
}

// When at most `LEFT` products begun later are in flight.
template <int LEFT>
__device__ __forceinline__ void end_sums(State& state, const Ring& ring, uint32_t tile) {
    wgmma_wait<LEFT>(state.sums[0]);
    wgmma_wait<LEFT>(state.sums[1]);
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(ring.empty + tile % 2);
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Positions from `visible` on, which the split does not have.
__device__ __forceinline__ void mask(State& state, uint32_t visible) {
    uint32_t position = group() * HALF + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        if (position + i / 4 * 8 + i % 2 >= visible) state.scores[i] = -INFINITY;
    }
}

// Rows of the tile from `visible` on become zeros: whatever the block holds there would be multiplied by probability 0, which is no
// zero if it is no number.
__device__ __forceinline__ void clear(const Ring& ring, uint32_t tile, uint32_t visible) {
    barrier_wait(ring.full + tile % 2, Ring::phase(tile));
    uint32_t of_panel = (TILE - visible) * 8;
    for (uint32_t i = threadIdx.x; i < PANELS * of_panel; i += CONSUMERS) {
        uint8_t* panel = ring.tile(tile) + i / of_panel * PANEL;
        *(uint4*)(panel + visible * 128 + i % of_panel * 16) = {0, 0, 0, 0};
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    meet();
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *(uint32_t*)&pair;
}

// The largest score of each head so far, in all 64 positions.
__device__ __forceinline__ void meet_tops(const State& state, const Ring& ring, float (&top)[2]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        top[h] = state.top[h];
#pragma unroll
        for (int i = 0; i < 16; i += 4) top[h] = fmaxf(top[h], fmaxf(state.scores[i + 2 * h], state.scores[i + 2 * h + 1]));
        top[h] = quad_max(top[h]);
        if (threadIdx.x % 4 == 0) ring.of_heads[group() * HEADS + head() + 8 * h] = top[h];
    }
    meet();
    // The first position of a tile is visible, so that these are finite.
#pragma unroll
    for (int h = 0; h < 2; h++) top[h] = fmaxf(top[h], ring.of_heads[(group() ^ 1) * HEADS + head() + 8 * h]);
}

// Scores to powers of two relative to the largest so far, all 64 of a head in `state.probabilities`, rounded; `factor`: what the
// sums so far shrink by. Both warpgroups have read the last tile's when they meet at its end.
__device__ __forceinline__ void softmax(State& state, const Ring& ring, float scale, float (&factor)[2]) {
    float top[2];
    meet_tops(state, ring, top);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        factor[h] = exp2f((state.top[h] - top[h]) * scale);
        state.top[h] = top[h];
        float sum = 0.f, shift = top[h] * scale;
        bf16* to = ring.probabilities + (head() + 8 * h) * PITCH + group() * HALF + threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
            float low = exp2f(fmaf(state.scores[i + 2 * h], scale, -shift));
            float high = exp2f(fmaf(state.scores[i + 2 * h + 1], scale, -shift));
            sum += low + high;
            *(uint32_t*)(to + i / 4 * 8) = pack(low, high);
        }
        state.total[h] = state.total[h] * factor[h] + sum;
    }
    meet();
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const bf16* from = ring.probabilities + (head() + i % 2 * 8) * PITCH + i / 4 * 16 + i % 4 / 2 * 8 + threadIdx.x % 4 * 2;
        state.probabilities[i] = *(const uint32_t*)from;
    }
}

__device__ __forceinline__ void shrink(State& state, const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 64; i++) {
        state.sums[0][i] *= factor[i % 4 / 2];
        state.sums[1][i] *= factor[i % 4 / 2];
    }
}

// Both warpgroups' sums of probabilities.
__device__ __forceinline__ void meet_totals(State& state, const Ring& ring) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        state.total[h] = quad_sum(state.total[h]);
        if (threadIdx.x % 4 == 0) ring.of_heads[group() * HEADS + head() + 8 * h] = state.total[h];
    }
    meet();
#pragma unroll
    for (int h = 0; h < 2; h++) state.total[h] = ring.of_heads[head() + 8 * h] + ring.of_heads[HEADS + head() + 8 * h];
}

__device__ __forceinline__ void consume(State& state, const Ring& ring, const Split& split, float scale) {
    float factor[2];
    uint32_t last = split.tiles - 1, visible = split.end - split.begin - last * TILE;
#pragma unroll
    for (int i = 0; i < 64; i++) state.sums[0][i] = state.sums[1][i] = 0.f;
    state.top[0] = state.top[1] = -INFINITY;
    state.total[0] = state.total[1] = 0.f;
    barrier_wait(ring.asked, 0);
    if (last == 0 && visible < TILE) clear(ring, 0, visible);
    begin_scores(state, ring, 0);
    for (uint32_t tile = 0; tile < last; tile++) {
        wgmma_wait<0>(state.scores);
        softmax(state, ring, scale, factor);
        shrink(state, factor);
        begin_sums(state, ring, tile);
        if (tile + 1 == last && visible < TILE) clear(ring, last, visible);
        begin_scores(state, ring, tile + 1);
        end_sums<1>(state, ring, tile);
    }
    wgmma_wait<0>(state.scores);
    mask(state, visible);
    softmax(state, ring, scale, factor);
    shrink(state, factor);
    begin_sums(state, ring, last);
    end_sums<0>(state, ring, last);
    meet_totals(state, ring);
}

// The warpgroup's columns of 64 heads: into `out` if the row has one split, else with the logarithm of their weight for the sum.
__device__ __forceinline__ void write(const State& state, bool alone, uint64_t place, uint64_t out_place, uint32_t heads_left,
                                      float scale, float* partial, float* lse, bf16* out) {
    uint32_t column = group() * 256 + threadIdx.x % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float inverse = 1.f / state.total[h];
        uint32_t at = head() + h * 8;
        if (at >= heads_left) continue;
#pragma unroll
        for (int i = 0; i < 128; i += 4) {
            const float* two = state.sums[i / 64] + i % 64 + 2 * h;
            float x = two[0] * inverse, y = two[1] * inverse;
            uint32_t to = column + i / 64 * 128 + i % 64 / 4 * 8;
            if (alone) *(uint32_t*)(out + (out_place + at) * LATENT + to) = pack(x, y);
            else *(float2*)(partial + (place + at) * LATENT + to) = {x, y};
        }
        if (!alone && column == 0) lse[place + at] = state.top[h] * scale + log2f(state.total[h]);
    }
}

// Grid: heads / 64, splits, rows of the launch.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attend_absorbed_64(const __grid_constant__ CUtensorMap query, const __grid_constant__ CUtensorMap pool,
                       const uint32_t* counts, const uint32_t* positions, const uint32_t* entry_of_row,
                       const uint32_t* block_table, uint32_t max_blocks, uint32_t layers, uint32_t layer, uint32_t heads,
                       float scale, uint32_t first_row, uint32_t wanted, float* partial, float* lse, bf16* out) {
    extern __shared__ uint8_t dynamic[];
    __shared__ uint64_t barriers[5];
    uint32_t first_head = blockIdx.x * HEADS, row = first_row + blockIdx.z;
    if (row >= counts[0]) return;
    uint32_t context = positions[row] + 1, length = split_length(context, wanted), begin = blockIdx.y * length;
    if (begin >= context) return;
    uint32_t end = min(begin + length, context);
    const uint32_t* blocks = block_table + (uint64_t)entry_of_row[row] * max_blocks + begin / TILE;
    Split split = {begin, end, (end - begin + TILE - 1) / TILE, blocks};
    uint8_t* panels = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;
    bf16* probabilities = (bf16*)(panels + 3 * BYTES);
    float* of_heads = (float*)(probabilities + HEADS * PITCH);
    Ring ring = {panels, panels + BYTES, probabilities, of_heads, barriers, barriers + 1, barriers + 3};
    if (threadIdx.x == 0) {
        for (int i = 0; i < 3; i++) barrier_init(barriers + i, 1);
        for (int i = 0; i < 2; i++) barrier_init(ring.empty + i, CONSUMERS / 32);
        barriers_ready();
    }
    __syncthreads();
    uint64_t out_place = (uint64_t)row * heads + first_head;
    if (threadIdx.x >= CONSUMERS) {
        registers_down<24>();
        if (threadIdx.x == CONSUMERS) produce(&query, &pool, ring, split, (uint32_t)out_place, layers, layer);
    } else {
        registers_up<240>();
        State state;
        consume(state, ring, split, scale * LOG2E);
        uint64_t place = ((uint64_t)blockIdx.z * gridDim.y + blockIdx.y) * heads + first_head;
        write(state, length >= context, place, out_place, heads - first_head, scale * LOG2E, partial, lse, out);
    }
}
