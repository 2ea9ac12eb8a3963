// MLA attention in the direct form: rows of one entry over keys and values made from its whole context, causal by position.
//
//   s_j = scale * (q_nope . k_j + q_rope . rope_j),  out = sum_j softmax(s)_j v_j
// Layouts: query bf16 [rows][all heads][192], k and v bf16 [context][heads][128], rope bf16 [context][64], out bf16
//       [rows][all heads][128]. Scores and sums are f32; probabilities are rounded to bf16 before they multiply values, their
//       sum is taken before that.
// Threads: a block has 128 queries of a head: two warpgroups with 64 each, and one thread that loads. A warpgroup computes the scores
//       of the next 128 keys and multiplies the probabilities of the last by their values at the same time (as FlashAttention-3
//       does, arXiv:2407.08608, section 3.2); while one takes the softmax, the other keeps the tensor cores busy.
// Shared memory: queries, and two stages of 128 keys and values, in panels [128 rows][128 bytes] as the copy engine swizzles them.
// Bound: tensor cores.
#include "numbers.cuh"
#include "tensor.cuh"

#define ROWS 128
#define KEYS 128
#define NOPE 128
#define QUERY 192
#define HEAD 128
#define CONSUMERS 256
#define THREADS (CONSUMERS + 128)
#define STAGES 2
#define PANEL (128 * 128)
#define KEY_PANELS 3
#define VALUE_PANELS 2
#define LOG2E 1.4426950408889634f

struct Ring {
    uint8_t *queries, *stages;
    uint64_t *asked, *keys_full, *values_full, *keys_empty, *values_empty;
    __device__ uint8_t* keys(uint32_t tile) const { return stages + tile % STAGES * (KEY_PANELS + VALUE_PANELS) * PANEL; }
    __device__ uint8_t* values(uint32_t tile) const { return keys(tile) + KEY_PANELS * PANEL; }
    __device__ static uint32_t phase(uint32_t tile) { return tile / STAGES & 1; }
};

struct Maps {
    const CUtensorMap *query, *k, *rope, *v;
};

__device__ __forceinline__ void produce(const Maps& maps, const Ring& ring, uint32_t first, uint32_t head,
                                        uint32_t query_head, uint32_t tiles) {
    barrier_expect(ring.asked, KEY_PANELS * PANEL);
    for (uint32_t p = 0; p < KEY_PANELS; p++) {
        load_box(ring.queries + p * PANEL, maps.query, query_head * QUERY * 2 + p * 128, first, ring.asked);
    }
    for (uint32_t tile = 0; tile < tiles; tile++) {
        uint32_t stage = tile % STAGES, key = tile * KEYS, column = head * HEAD * 2;
        if (tile >= STAGES) barrier_wait(ring.keys_empty + stage, Ring::phase(tile) ^ 1);
        uint64_t* full = ring.keys_full + stage;
        barrier_expect(full, KEY_PANELS * PANEL);
        load_box(ring.keys(tile), maps.k, column, key, full);
        load_box(ring.keys(tile) + PANEL, maps.k, column + 128, key, full);
        load_box(ring.keys(tile) + 2 * PANEL, maps.rope, 0, key, full);
        if (tile >= STAGES) barrier_wait(ring.values_empty + stage, Ring::phase(tile) ^ 1);
        full = ring.values_full + stage;
        barrier_expect(full, VALUE_PANELS * PANEL);
        load_box(ring.values(tile), maps.v, column, key, full);
        load_box(ring.values(tile) + PANEL, maps.v, column + 128, key, full);
    }
}

// A warpgroup's 64 queries: their scores with 128 keys, the sums so far, and for each of a lane's two rows the largest score
// and the sum of probabilities.
struct State {
    float scores[64], sums[64], top[2], total[2];
    uint32_t probabilities[32];
};

__device__ __forceinline__ void begin_scores(State& state, const Ring& ring, uint32_t tile) {
    barrier_wait(ring.keys_full + tile % STAGES, Ring::phase(tile));
    const uint8_t *queries = ring.queries + threadIdx.x / 128 * 64 * 128, *keys = ring.keys(tile);
    wgmma_fence();
#pragma unroll
    for (int p = 0; p < KEY_PANELS; p++) {
        uint64_t q = operand(queries + p * PANEL), k = operand(keys + p * PANEL);
#pragma unroll
        for (int step = 0; step < 4; step++) wgmma<false, 128>(state.scores, q + 2 * step, k + 2 * step, p + step > 0);
    }
    wgmma_commit();
}

__device__ __forceinline__ void begin_sums(State& state, const Ring& ring, uint32_t tile) {
    barrier_wait(ring.values_full + tile % STAGES, Ring::phase(tile));
    const uint8_t* values = ring.values(tile);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++) {
        const uint32_t(&p)[32] = state.probabilities;
        wgmma_by_columns(state.sums, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3],
                         operand_by_columns(values + step * 16 * 128, PANEL));
    }
    wgmma_commit();
}

__device__ __forceinline__ void release(uint64_t* empty) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(empty);
}

__device__ __forceinline__ float over_quad(float x, float y, bool largest) { return largest ? fmaxf(x, y) : x + y; }

// Over the four lanes that share a row.
__device__ __forceinline__ float quad(float x, bool largest) {
    x = over_quad(x, __shfl_xor_sync(0xffffffffu, x, 1), largest);
    return over_quad(x, __shfl_xor_sync(0xffffffffu, x, 2), largest);
}

// Keys that a query does not see. `position`: of the lane's first row; its second is 8 later.
__device__ __forceinline__ void mask(State& state, uint32_t tile, uint32_t position) {
    uint32_t key = tile * KEYS + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 64; i++) {
        if (key + i / 4 * 8 + i % 2 > position + i % 4 / 2 * 8) state.scores[i] = -INFINITY;
    }
}

// Scores to powers of two relative to the largest so far; `factor`: what the sums so far shrink by.
__device__ __forceinline__ void softmax(State& state, float scale, float (&factor)[2]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float top = state.top[h];
#pragma unroll
        for (int i = 0; i < 64; i += 4) top = fmaxf(top, fmaxf(state.scores[i + 2 * h], state.scores[i + 2 * h + 1]));
        // Every query sees position 0, so that this is finite from the first tile on.
        top = quad(top, true);
        factor[h] = exp2f((state.top[h] - top) * scale);
        state.top[h] = top;
        float sum = 0.f, shift = top * scale;
#pragma unroll
        for (int i = 0; i < 64; i += 4) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float& score = state.scores[i + 2 * h + c];
                score = exp2f(fmaf(score, scale, -shift));
                sum += score;
            }
        }
        state.total[h] = state.total[h] * factor[h] + sum;
    }
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *(uint32_t*)&pair;
}

// As the left operand of the next product has them: in pairs, where they are.
__device__ __forceinline__ void round_probabilities(State& state) {
#pragma unroll
    for (int i = 0; i < 32; i++) state.probabilities[i] = pack(state.scores[2 * i], state.scores[2 * i + 1]);
}

__device__ __forceinline__ void shrink(State& state, const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 64; i++) state.sums[i] *= factor[i % 4 / 2];
}

__device__ __forceinline__ void consume(State& state, const Ring& ring, uint32_t tiles, uint32_t position, float scale) {
    float factor[2];
    // Tiles up to here are seen by all queries of the warp.
    uint32_t seen = (position - threadIdx.x % 32 / 4 + 1) / KEYS;
#pragma unroll
    for (int i = 0; i < 64; i++) state.sums[i] = 0.f;
    state.top[0] = state.top[1] = -INFINITY;
    state.total[0] = state.total[1] = 0.f;
    barrier_wait(ring.asked, 0);
    begin_scores(state, ring, 0);
    wgmma_wait<0>(state.scores);
    release(ring.keys_empty);
    if (seen == 0) mask(state, 0, position);
    softmax(state, scale, factor);
    round_probabilities(state);
    for (uint32_t tile = 1; tile < tiles; tile++) {
        begin_scores(state, ring, tile);
        begin_sums(state, ring, tile - 1);
        wgmma_wait<1>(state.scores);
        release(ring.keys_empty + tile % STAGES);
        if (tile >= seen) mask(state, tile, position);
        softmax(state, scale, factor);
        wgmma_wait<0>(state.sums);
        release(ring.values_empty + (tile - 1) % STAGES);
        shrink(state, factor);
        round_probabilities(state);
    }
    begin_sums(state, ring, tiles - 1);
    wgmma_wait<0>(state.sums);
}

// `out`: of the lane's first row.
__device__ __forceinline__ void write(const State& state, bf16* out, uint64_t stride, uint32_t rows_left) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float inverse = 1.f / quad(state.total[h], false);
        if (h * 8 >= rows_left) continue;
#pragma unroll
        for (int i = 0; i < 64; i += 4) {
            uint32_t pair = pack(state.sums[i + 2 * h] * inverse, state.sums[i + 2 * h + 1] * inverse);
            *(uint32_t*)(out + h * 8 * stride + i / 4 * 8) = pair;
        }
    }
}

// Grid: queries / 128, heads; the longest blocks are begun first. Head h of k and v is head first_head + h of query and out. Query
// and out begin at the entry's first row, which is at position `start`.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attend_direct(const __grid_constant__ CUtensorMap query, const __grid_constant__ CUtensorMap k,
                  const __grid_constant__ CUtensorMap rope, const __grid_constant__ CUtensorMap v, uint32_t rows,
                  uint32_t start, uint32_t first_head, uint32_t all_heads, float scale, bf16* out) {
    extern __shared__ uint8_t dynamic[];
    __shared__ uint64_t barriers[1 + 4 * STAGES];
    uint8_t* panels = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;
    uint64_t* each = barriers + 1;
    Ring ring = {panels,        panels + KEY_PANELS * PANEL, barriers, each, each + STAGES, each + 2 * STAGES,
                 each + 3 * STAGES};
    if (threadIdx.x == 0) {
        barrier_init(ring.asked, 1);
        for (int i = 0; i < 2 * STAGES; i++) barrier_init(ring.keys_full + i, 1);
        for (int i = 0; i < 2 * STAGES; i++) barrier_init(ring.keys_empty + i, CONSUMERS / 32);
        barriers_ready();
    }
    __syncthreads();
    uint32_t first = (gridDim.x - 1 - blockIdx.x) * ROWS, head = blockIdx.y, query_head = first_head + head;
    uint32_t keys = start + min(first + ROWS, rows), tiles = (keys + KEYS - 1) / KEYS;
    if (threadIdx.x >= CONSUMERS) {
        registers_down<24>();
        Maps maps = {&query, &k, &rope, &v};
        if (threadIdx.x == CONSUMERS) produce(maps, ring, first, head, query_head, tiles);
    } else {
        registers_up<240>();
        State state;
        uint32_t lane = threadIdx.x % 32, row = first + threadIdx.x / 32 * 16 + lane / 4;
        consume(state, ring, tiles, start + row, scale * LOG2E);
        uint64_t stride = (uint64_t)all_heads * HEAD;
        uint32_t left = row < rows ? rows - row : 0;
        write(state, out + row * stride + query_head * HEAD + lane % 4 * 2, stride, left);
    }
}
