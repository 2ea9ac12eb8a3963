// Matrix products: y[t][n] = sum_k x[t][k] W[n][k], for W in FP8 with 128 x 128 block scales or in bf16.
//
// FP8:  y = sum_b sx[t][b] sw[n / 128][b] (sum over the 128 k of block b of e4m3 x times e4m3 W): the inner sum by tensor cores
//       in f32, promoted to a second accumulator each 128 k, because their own sum keeps about 14 bits.
// Layouts: W [matrices][n][k] row-major, x [rows][k] with a stride, y [rows][n] with a stride. `tiles`, if given, are runs of rows
//       that belong to one of several matrices (experts).
// Threads: two warpgroups that multiply and one warp that loads. A block computes 128 rows of W (the M side: weights are what
//       there is much of in decode) by TOKENS rows of x (the N side: 8 to 128); a warpgroup 64 by TOKENS. Of a tile with fewer
//       rows only the tensor work that it needs is done.
// Clusters: the blocks of a cluster share a tile, each takes a part of k; their sums are added in the order of k. So a narrow matrix,
//       of few tiles, is streamed by many multiprocessors, and the same input gives the same bits.
// Shared memory: a ring of stages, each (128 + TOKENS) rows of 128 bytes of k as the copy engine swizzles them, and for FP8
//       the block's scales: TOKENS of x, one of W.
// Bound: weights' bytes over memory bandwidth for few rows, tensor cores for many.
#include <cooperative_groups.h>

#include "numbers.cuh"
#include "tensor.cuh"
#include "tile.cuh"

#define WEIGHT_ROWS 128
#define CHUNK 128
#define CONSUMERS 256
#define THREADS (CONSUMERS + 32)
// Of a row of results in shared memory, in floats: so that the fragments' words fall into 32 different banks.
#define PITCH (WEIGHT_ROWS + 4)

// The launcher computes the same.
template <int TOKENS>
struct Ring {
    static constexpr uint32_t stages = TOKENS == 128 ? 6 : 4;
    static constexpr uint32_t blocks = TOKENS <= 16 ? 3 : TOKENS <= 64 ? 2 : 1;
    static constexpr uint32_t weights = WEIGHT_ROWS * CHUNK;
    static constexpr uint32_t bytes = weights + TOKENS * CHUNK;
    static constexpr uint32_t scales = TOKENS + 4;
};

template <int TOKENS>
struct Shared {
    uint8_t* stages;
    float* scales;
    uint64_t *full, *empty;
    __device__ uint8_t* weights(uint32_t turn) const { return stages + turn % Ring<TOKENS>::stages * Ring<TOKENS>::bytes; }
    __device__ uint8_t* tokens(uint32_t turn) const { return weights(turn) + Ring<TOKENS>::weights; }
    __device__ float* scales_of(uint32_t turn) const { return scales + turn % Ring<TOKENS>::stages * Ring<TOKENS>::scales; }
    __device__ uint64_t* full_of(uint32_t turn) const { return full + turn % Ring<TOKENS>::stages; }
    __device__ uint64_t* empty_of(uint32_t turn) const { return empty + turn % Ring<TOKENS>::stages; }
    __device__ static uint32_t phase(uint32_t turn) { return turn / Ring<TOKENS>::stages & 1; }
};

// What a block multiplies.
struct Operands {
    const CUtensorMap *w, *x;
    const float* w_scales;  // FP8 only, of the tile: [k blocks]
    const float* x_scales;  // FP8 only: [rows][k blocks]
    uint32_t w_row, x_column;  // x_column in bytes
    uint32_t first, rows;      // of x and y, in this tile
    uint32_t k_blocks;
    uint32_t begin, end;  // chunks of 128 bytes of k
};

// One warp fills the ring.
template <bool FP8, int TOKENS>
__device__ __forceinline__ void produce(const Operands& op, const Shared<TOKENS>& shared) {
    uint32_t lane = threadIdx.x % 32;
    for (uint32_t chunk = op.begin; chunk < op.end; chunk++) {
        uint32_t turn = chunk - op.begin;
        if (turn >= Ring<TOKENS>::stages) barrier_wait(shared.empty_of(turn), shared.phase(turn) ^ 1);
        uint64_t* full = shared.full_of(turn);
        if (lane == 0) {
            barrier_expect(full, Ring<TOKENS>::bytes);
            load_box(shared.weights(turn), op.w, chunk * CHUNK, op.w_row, full);
            load_box(shared.tokens(turn), op.x, op.x_column + chunk * CHUNK, op.first, full);
        }
        if (FP8) {
            float* scales = shared.scales_of(turn);
            for (uint32_t row = lane; row < TOKENS; row += 32) {
                bool valid = row < op.rows;
                copy4(scales + row, op.x_scales + (uint64_t)(valid ? op.first + row : 0) * op.k_blocks + chunk, valid);
            }
            if (lane == 0) copy4(scales + TOKENS, op.w_scales + chunk, true);
            barrier_arrive_copies(full);
        }
    }
}

template <int N>
__device__ __forceinline__ void promote(const float* scales, float sw, const float (&sum)[N / 2], float (&total)[N / 2]) {
    const float2* pairs = (const float2*)scales + threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        float2 sx = pairs[j * 4];
        float even = sw * sx.x, odd = sw * sx.y;
        total[4 * j] = fmaf(even, sum[4 * j], total[4 * j]);
        total[4 * j + 1] = fmaf(odd, sum[4 * j + 1], total[4 * j + 1]);
        total[4 * j + 2] = fmaf(even, sum[4 * j + 2], total[4 * j + 2]);
        total[4 * j + 3] = fmaf(odd, sum[4 * j + 3], total[4 * j + 3]);
    }
}

template <bool FP8, int N, int TOKENS>
__device__ __forceinline__ void multiply_chunk(const Shared<TOKENS>& shared, uint32_t turn, float (&sum)[N / 2], bool add) {
    uint64_t w = operand(shared.weights(turn) + threadIdx.x / 128 * 64 * CHUNK), x = operand(shared.tokens(turn));
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < CHUNK / 32; step++) wgmma<FP8, N>(sum, w + 2 * step, x + 2 * step, add || step > 0);
    wgmma_commit();
}

// A warpgroup's 64 rows of W by N rows of x, left in shared memory: [N][PITCH].
template <bool FP8, int N, int TOKENS>
__device__ __forceinline__ void consume(const Operands& op, const Shared<TOKENS>& shared) {
    uint32_t lane = threadIdx.x % 32, turns = op.end - op.begin;
    float total[N / 2] = {};
    for (uint32_t turn = 0; turn < turns; turn++) {
        barrier_wait(shared.full_of(turn), shared.phase(turn));
        if (FP8) {
            float sum[N / 2];
            multiply_chunk<FP8, N>(shared, turn, sum, false);
            const float* scales = shared.scales_of(turn);
            float sw = scales[TOKENS];
            wgmma_wait<0>(sum);
            promote<N>(scales, sw, sum, total);
            __syncwarp();
            if (lane == 0) barrier_arrive(shared.empty_of(turn));
        } else {
            multiply_chunk<FP8, N>(shared, turn, total, turn > 0);
            wgmma_wait<1>(total);
            if (lane == 0 && turn > 0) barrier_arrive(shared.empty_of(turn - 1));
        }
    }
    wgmma_wait<0>(total);
    // Both warpgroups have read all stages: their memory holds the results now.
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
    float* results = (float*)shared.stages + threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        float* at = results + (j * 8 + lane % 4 * 2) * PITCH;
        at[0] = total[4 * j];
        at[PITCH] = total[4 * j + 1];
        at[8] = total[4 * j + 2];
        at[PITCH + 8] = total[4 * j + 3];
    }
}

__device__ __forceinline__ void store(bf16* y, float x) { *y = to_bf16(x); }
__device__ __forceinline__ void store(float* y, float x) { *y = x; }

__device__ __forceinline__ void store4(float* y, float4 x) { *(float4*)y = x; }
__device__ __forceinline__ void store4(bf16* y, float4 x) {
    __nv_bfloat162 low = __floats2bfloat162_rn(x.x, x.y), high = __floats2bfloat162_rn(x.z, x.w);
    *(uint2*)y = {*(uint32_t*)&low, *(uint32_t*)&high};
}

// Adds the cluster's parts and writes them; each block some of the rows.
template <typename Out>
__device__ __forceinline__ void write(const float* results, uint32_t rows, uint32_t columns, Out* y, uint32_t y_stride) {
    auto cluster = cooperative_groups::this_cluster();
    uint32_t rank = cluster.block_rank(), splits = cluster.num_blocks();
    bool aligned = ((uint64_t)y | (uint64_t)y_stride * sizeof(Out)) % (4 * sizeof(Out)) == 0;
    for (uint32_t i = threadIdx.x; i < rows * WEIGHT_ROWS / 4; i += THREADS) {
        uint32_t row = i / (WEIGHT_ROWS / 4), column = i % (WEIGHT_ROWS / 4) * 4;
        if (row % splits != rank || column >= columns) continue;
        float4 sum = {};
        for (uint32_t part = 0; part < splits; part++) {
            const float* from = splits == 1 ? results : cluster.map_shared_rank(results, part);
            float4 add = *(const float4*)(from + row * PITCH + column);
            sum = {sum.x + add.x, sum.y + add.y, sum.z + add.z, sum.w + add.w};
        }
        Out* to = y + (uint64_t)row * y_stride + column;
        if (aligned && column + 4 <= columns) {
            store4(to, sum);
        } else {
            float four[4] = {sum.x, sum.y, sum.z, sum.w};
            for (uint32_t c = 0; c < min(4u, columns - column); c++) store(to + c, four[c]);
        }
    }
}

// Grid: (rows of W / 128) clusters, runs of rows of x, batch. `count` is the number of rows of y, or with `tiles` that of tiles.
// Batch: the matrices follow each other, inputs and outputs lie `x_batch` bytes and `y_batch` elements apart in their rows.
template <bool FP8, int TOKENS, typename Out>
__device__ __forceinline__ void linear(const CUtensorMap* w, const CUtensorMap* x, const float* w_scales,
                                       const float* x_scales, const uint32_t* count, const Tile* tiles, Out* y, uint32_t n,
                                       uint32_t k, uint32_t y_stride, uint32_t x_batch, uint32_t y_batch) {
    extern __shared__ uint8_t dynamic[];
    __shared__ uint64_t full[Ring<TOKENS>::stages], empty[Ring<TOKENS>::stages];
    Tile tile = {blockIdx.z, blockIdx.y * TOKENS, 0, 0};
    if (tiles) {
        if (blockIdx.y >= *count) return;
        tile = tiles[blockIdx.y];
    } else {
        if (tile.first >= *count) return;
        tile.rows = min((uint32_t)TOKENS, *count - tile.first);
    }
    uint32_t chunks = (k * (FP8 ? 1 : 2) + CHUNK - 1) / CHUNK, k_blocks = (k + 127) / 128;
    auto cluster = cooperative_groups::this_cluster();
    uint32_t rank = cluster.block_rank(), splits = cluster.num_blocks(), n0 = blockIdx.x / splits * WEIGHT_ROWS;
    Operands op;
    op.w = w;
    op.x = x;
    op.w_scales = FP8 ? w_scales + ((uint64_t)tile.matrix * ((n + 127) / 128) + n0 / 128) * k_blocks : nullptr;
    op.x_scales = x_scales;
    op.w_row = tile.matrix * n + n0;
    op.x_column = blockIdx.z * x_batch;
    op.first = tile.first;
    op.rows = tile.rows;
    op.k_blocks = k_blocks;
    op.begin = chunks * rank / splits;
    op.end = chunks * (rank + 1) / splits;
    Shared<TOKENS> shared;
    shared.stages = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;
    shared.scales = (float*)(shared.stages + Ring<TOKENS>::stages * Ring<TOKENS>::bytes);
    shared.full = full;
    shared.empty = empty;
    if (threadIdx.x < Ring<TOKENS>::stages) {
        barrier_init(full + threadIdx.x, FP8 ? 1 + 32 : 1);
        barrier_init(empty + threadIdx.x, CONSUMERS / 32);
        barriers_ready();
    }
    __syncthreads();
    if (threadIdx.x >= CONSUMERS) {
        produce<FP8>(op, shared);
    } else if (TOKENS == 128 && tile.rows <= 32) {
        consume<FP8, TOKENS == 128 ? 32 : TOKENS>(op, shared);
    } else if (TOKENS == 128 && tile.rows <= 64) {
        consume<FP8, TOKENS == 128 ? 64 : TOKENS>(op, shared);
    } else if (TOKENS == 128 && tile.rows <= 96) {
        consume<FP8, TOKENS == 128 ? 96 : TOKENS>(op, shared);
    } else {
        consume<FP8, TOKENS>(op, shared);
    }
    if (splits == 1) __syncthreads();
    else cluster.sync();
    y += (uint64_t)blockIdx.z * y_batch + (uint64_t)tile.first * y_stride + n0;
    write((const float*)shared.stages, tile.rows, min((uint32_t)WEIGHT_ROWS, n - n0), y, y_stride);
    // Others still read this block's memory.
    if (splits > 1) cluster.sync();
}

#define LINEAR(NAME, FP8, TOKENS, OUT)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, Ring<TOKENS>::blocks) NAME##_##TOKENS(                              \
        const __grid_constant__ CUtensorMap w, const __grid_constant__ CUtensorMap x, const float* w_scales,                  \
        const float* x_scales, const uint32_t* count, const Tile* tiles, OUT* y, uint32_t n, uint32_t k, uint32_t y_stride,   \
        uint32_t x_batch, uint32_t y_batch) {                                                                                 \
        linear<FP8, TOKENS, OUT>(&w, &x, w_scales, x_scales, count, tiles, y, n, k, y_stride, x_batch, y_batch);              \
    }

#define LINEARS(NAME, FP8, OUT)  \
    LINEAR(NAME, FP8, 8, OUT)    \
    LINEAR(NAME, FP8, 16, OUT)   \
    LINEAR(NAME, FP8, 32, OUT)   \
    LINEAR(NAME, FP8, 64, OUT)   \
    LINEAR(NAME, FP8, 128, OUT)

LINEARS(linear_fp8, true, bf16)
LINEARS(linear_bf16, false, bf16)
LINEARS(linear_bf16_f32, false, float)
