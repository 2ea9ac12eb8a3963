// Matrix products: y[t][n] = sum_k x[t][k] W[n][k], for W in FP8 with 128 x 128 block scales or in bf16.
//
// FP8:  y = sum_b sx[t][b] sw[n / 128][b] (sum over the 128 k of block b of e4m3 x times e4m3 W): the inner sum by tensor cores
//       in f32, promoted to a second accumulator each 128 k, because their own sum keeps about 14 bits.
// Layouts: W [matrices][n][k] row-major, x [rows][k] with a stride and its scales [k blocks][rows], y [rows][n] with a stride. `tiles`, if given, are runs of rows
//       that belong to one of several matrices (experts).
// Threads: two warpgroups that multiply and one thread that loads. A block computes 128 rows of W (the M side: weights are what
//       there is much of in decode) by TOKENS rows of x (the N side: 8 to 128); a warpgroup 64 by TOKENS. Of a tile with fewer
//       rows only the tensor work that it needs is done.
// Clusters: either `splits` blocks share a tile, each takes a part of k, and their sums are added in the order of k: a narrow matrix,
//       of few tiles, is streamed by many multiprocessors, and the same input gives the same bits. Or the blocks of a
//       cluster have different rows of W and the same rows of x, and each fetches a part of these for all: with tiles of
//       128 by 128 and no sharing, FP8 tensor cores ask for more than the second-level cache delivers.
// Shared memory: a ring of stages, each (128 + TOKENS) rows of 128 bytes of k as the copy engine swizzles them, and for FP8
//       the scales of TOKENS rows of x.
// Bound: weights' bytes over memory bandwidth for few rows, tensor cores for many.
#include <cooperative_groups.h>

#include "numbers.cuh"
#include "tensor.cuh"
#include "tile.cuh"

#define WEIGHT_ROWS 128
#define CHUNK 128
#define CONSUMERS 256
// Of a row of results in shared memory, in floats: so that the fragments' words fall into 32 different banks.
#define PITCH (WEIGHT_ROWS + 4)

// The launcher computes the same.
template <int TOKENS>
struct Ring {
    static constexpr uint32_t stages = TOKENS <= 32 ? 4 : TOKENS == 64 ? 8 : 6;
    static constexpr uint32_t blocks = TOKENS <= 16 ? 3 : TOKENS == 32 ? 2 : 1;
    // A whole warpgroup loads where registers are short: it can give its own away.
    static constexpr uint32_t threads = CONSUMERS + (TOKENS == 128 ? 128 : 32);
    static constexpr uint32_t weights = WEIGHT_ROWS * CHUNK;
    static constexpr uint32_t bytes = weights + TOKENS * CHUNK;
    // The copy engine begins at 16 bytes and writes where 128 begin: up to three floats before the tile's come along.
    static constexpr uint32_t scales_box = TOKENS + 4;
    static constexpr uint32_t scales = (scales_box + 31) / 32 * 32;
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
    const float* w_scales;        // FP8 only, of the tile: [k blocks]
    const CUtensorMap* x_scales;  // FP8 only
    uint32_t w_row, x_column;  // x_column in bytes
    uint32_t first, rows;      // of x and y, in this tile
    uint32_t k_blocks;
    uint32_t begin, end;  // chunks of 128 bytes of k
    uint32_t share, rank, base;  // blocks with the same rows of x; this one among them; the first of them
};

// One thread fills the ring.
template <bool FP8, int TOKENS>
__device__ __forceinline__ void produce(const Operands& op, const Shared<TOKENS>& shared) {
    uint32_t box = TOKENS / op.share, boxes = (op.rows + box - 1) / box;
    uint32_t bytes = Ring<TOKENS>::weights + boxes * box * CHUNK + (FP8 ? 4 * Ring<TOKENS>::scales_box : 0);
    uint16_t everyone = (1 << op.share) - 1;
    for (uint32_t chunk = op.begin; chunk < op.end; chunk++) {
        uint32_t turn = chunk - op.begin, column = op.x_column + chunk * CHUNK;
        if (turn >= Ring<TOKENS>::stages) barrier_wait(shared.empty_of(turn), shared.phase(turn) ^ 1);
        uint64_t* full = shared.full_of(turn);
        barrier_expect(full, bytes);
        load_box(shared.weights(turn), op.w, chunk * CHUNK, op.w_row, full);
        if (FP8) load_box(shared.scales_of(turn), op.x_scales, op.first / 4 * 4, chunk, full);
        uint8_t* to = shared.tokens(turn) + op.rank * box * CHUNK;
        uint32_t row = op.first + op.rank * box;
        if (op.share == 1) load_box(to, op.x, column, row, full);
        else if (op.rank < boxes) load_box_for(everyone, to, op.x, column, row, full);
    }
}

template <int N>
__device__ __forceinline__ void promote(const float* scales, float sw, const float (&sum)[N / 2], float (&total)[N / 2]) {
    const float* own = scales + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        float even = sw * own[j * 8], odd = sw * own[j * 8 + 1];
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

// The stage may be filled again, as far as this warp is concerned: says so to every block that fills it.
template <int TOKENS>
__device__ __forceinline__ void release(const Operands& op, const Shared<TOKENS>& shared, uint32_t turn) {
    __syncwarp();
    uint32_t lane = threadIdx.x % 32;
    if (op.share > 1) {
        if (lane < op.share) barrier_arrive_at(shared.empty_of(turn), op.base + lane);
    } else if (lane == 0) {
        barrier_arrive(shared.empty_of(turn));
    }
}

// Begins the product of a stage.
template <int N, int TOKENS>
__device__ __forceinline__ void begin(const Shared<TOKENS>& shared, uint32_t turn, float (&sum)[N / 2]) {
    barrier_wait(shared.full_of(turn), shared.phase(turn));
    multiply_chunk<true, N>(shared, turn, sum, false);
}

// Ends the product of a stage, when at most `LEFT` later ones are begun.
template <int LEFT, int N, int TOKENS>
__device__ __forceinline__ void end(const Operands& op, const Shared<TOKENS>& shared, uint32_t turn, float (&sum)[N / 2],
                                    float (&total)[N / 2]) {
    float sw = op.w_scales[op.begin + turn];
    wgmma_wait<LEFT>(sum);
    promote<N>(shared.scales_of(turn) + op.first % 4, sw, sum, total);
    release(op, shared, turn);
}

// The sums of a stage are promoted while the tensor cores work on those of the next.
template <int N, int TOKENS>
__device__ __forceinline__ void consume_fp8(const Operands& op, const Shared<TOKENS>& shared, float (&total)[N / 2]) {
    float even[N / 2], odd[N / 2];
    uint32_t turn = 0, turns = op.end - op.begin;
    if (turns == 0) return;
    begin<N>(shared, 0, even);
    for (; turn + 2 < turns; turn += 2) {
        begin<N>(shared, turn + 1, odd);
        end<1, N>(op, shared, turn, even, total);
        begin<N>(shared, turn + 2, even);
        end<1, N>(op, shared, turn + 1, odd, total);
    }
    if (turn + 1 < turns) {
        begin<N>(shared, turn + 1, odd);
        end<1, N>(op, shared, turn, even, total);
        end<0, N>(op, shared, turn + 1, odd, total);
    } else {
        end<0, N>(op, shared, turn, even, total);
    }
}

template <int N, int TOKENS>
__device__ __forceinline__ void consume_bf16(const Operands& op, const Shared<TOKENS>& shared, float (&total)[N / 2]) {
    for (uint32_t turn = 0; turn < op.end - op.begin; turn++) {
        barrier_wait(shared.full_of(turn), shared.phase(turn));
        multiply_chunk<false, N>(shared, turn, total, turn > 0);
        wgmma_wait<1>(total);
        if (turn > 0) release(op, shared, turn - 1);
    }
    wgmma_wait<0>(total);
}

// A warpgroup's 64 rows of W by N rows of x, left in shared memory: [N][PITCH].
template <bool FP8, int N, int TOKENS>
__device__ __forceinline__ void consume(const Operands& op, const Shared<TOKENS>& shared) {
    uint32_t lane = threadIdx.x % 32;
    float total[N / 2] = {};
    if (FP8) consume_fp8<N>(op, shared, total);
    else consume_bf16<N>(op, shared, total);
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
__device__ __forceinline__ void write(const float* results, uint32_t rows, uint32_t columns, uint32_t splits, Out* y,
                                      uint32_t y_stride) {
    auto cluster = cooperative_groups::this_cluster();
    uint32_t rank = splits == 1 ? 0 : cluster.block_rank();
    bool aligned = ((uint64_t)y | (uint64_t)y_stride * sizeof(Out)) % (4 * sizeof(Out)) == 0;
    for (uint32_t i = threadIdx.x; i < rows * WEIGHT_ROWS / 4; i += blockDim.x) {
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

__device__ __forceinline__ void synchronize(const cooperative_groups::cluster_group& cluster) {
    if (cluster.num_blocks() == 1) __syncthreads();
    else cluster.sync();
}

// Grid: (rows of W / 128) * splits blocks, runs of rows of x, batch. `count` is the number of rows of y, or with `tiles` that of tiles.
// Batch: the matrices follow each other, inputs and outputs lie `x_batch` bytes and `y_batch` elements apart in their rows.
template <bool FP8, int TOKENS, typename Out>
__device__ __forceinline__ void linear(const CUtensorMap* w, const CUtensorMap* x, const CUtensorMap* x_scales,
                                       const float* w_scales, const uint32_t* count, const Tile* tiles, Out* y, uint32_t n,
                                       uint32_t k, uint32_t y_stride, uint32_t x_batch, uint32_t y_batch, uint32_t splits) {
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
    uint32_t rank = cluster.block_rank(), part = rank % splits, n0 = blockIdx.x / splits * WEIGHT_ROWS;
    // The last cluster may have a block that no rows of W are left for; it takes part in the fetching.
    uint32_t columns = n0 < n ? min((uint32_t)WEIGHT_ROWS, n - n0) : 0, scale_rows = (n + 127) / 128;
    Operands op;
    op.w = w;
    op.x = x;
    op.w_scales = FP8 ? w_scales + ((uint64_t)tile.matrix * scale_rows + min(n0 / 128, scale_rows - 1)) * k_blocks : nullptr;
    op.x_scales = x_scales;
    op.w_row = tile.matrix * n + n0;
    op.x_column = blockIdx.z * x_batch;
    op.first = tile.first;
    op.rows = tile.rows;
    op.k_blocks = k_blocks;
    op.begin = chunks * part / splits;
    op.end = chunks * (part + 1) / splits;
    op.share = cluster.num_blocks() / splits;
    op.rank = rank % op.share;
    op.base = rank - op.rank;
    Shared<TOKENS> shared;
    shared.stages = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;
    shared.scales = (float*)(shared.stages + Ring<TOKENS>::stages * Ring<TOKENS>::bytes);
    shared.full = full;
    shared.empty = empty;
    if (threadIdx.x < Ring<TOKENS>::stages) {
        barrier_init(full + threadIdx.x, 1);
        barrier_init(empty + threadIdx.x, CONSUMERS / 32 * op.share);
        barriers_ready();
    }
    synchronize(cluster);
    if (threadIdx.x >= CONSUMERS) {
        if (TOKENS == 128) registers_down<40>();
        if (threadIdx.x == CONSUMERS) produce<FP8>(op, shared);
        // The cluster's barrier wants whole warps.
        __syncwarp();
    } else {
        if (TOKENS == 128) registers_up<232>();
        if (TOKENS == 128 && tile.rows <= 32) consume<FP8, TOKENS == 128 ? 32 : TOKENS>(op, shared);
        else if (TOKENS == 128 && tile.rows <= 64) consume<FP8, TOKENS == 128 ? 64 : TOKENS>(op, shared);
        else if (TOKENS == 128 && tile.rows <= 96) consume<FP8, TOKENS == 128 ? 96 : TOKENS>(op, shared);
        else consume<FP8, TOKENS>(op, shared);
    }
    synchronize(cluster);
    y += (uint64_t)blockIdx.z * y_batch + (uint64_t)tile.first * y_stride + n0;
    write((const float*)shared.stages, tile.rows, columns, splits, y, y_stride);
    // Others may still read this block's memory.
    if (splits > 1) cluster.sync();
}

#define LINEAR(NAME, FP8, TOKENS, OUT)                                                                                        \
    extern "C" __global__ void __launch_bounds__(Ring<TOKENS>::threads, Ring<TOKENS>::blocks) NAME##_##TOKENS(                              \
        const __grid_constant__ CUtensorMap w, const __grid_constant__ CUtensorMap x,                                         \
        const __grid_constant__ CUtensorMap x_scales, const float* w_scales, const uint32_t* count, const Tile* tiles, OUT* y, uint32_t n, uint32_t k, uint32_t y_stride,   \
        uint32_t x_batch, uint32_t y_batch, uint32_t splits) {                                                                \
        linear<FP8, TOKENS, OUT>(&w, &x, &x_scales, w_scales, count, tiles, y, n, k, y_stride, x_batch, y_batch, splits);      \
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
