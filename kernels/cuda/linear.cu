// Matrix products: y[t][n] = sum_k x[t][k] W[n][k], for W in FP8 with 128 x 128 block scales or in bf16.
//
// FP8:  y = sum_b sx[t][b] sw[n / 128][b] (sum over the 128 k of block b of e4m3 x times e4m3 W): the inner sum by tensor cores
//       in f32, promoted to a second accumulator each 128 k, because their own sum keeps about 14 bits.
// Layouts: W [matrices][n][k] row-major, x [rows][k] with a stride and its scales [k blocks][rows], y [rows][n] with a stride. `tiles`, if given, are runs of rows
//       that belong to one of several matrices (experts).
// Threads: two warpgroups that multiply and one thread that loads; beside it, for tiles of 128 rows in FP8, a warp that
//       multiplies the scales of x by that of W, once for all, and lays them as they are read: what promotes sums is bound by
//       the number of its instructions. A tile of work is 128 rows of W (the M side: weights are what there is much of in
//       decode) by TOKENS rows of x (the N side: 8 to 128); a warpgroup has 64 by TOKENS of it. Of a tile with fewer rows only
//       the tensor work that it needs is done. There are as many blocks as run at once, each takes tile after tile; the next
//       one's rows are fetched while the results of the last are written, and of many rows the copy engine writes them, out of
//       shared memory, while the next ones are multiplied.
// Order: of many rows, a block of W meets up to TOGETHER tiles of rows (of one matrix) one after the other before the next does: it
//       comes from memory once and from the L2 for the others, and so do the rows. Else memory is what bounds a prompt: every tile
//       of rows reads all of W.
// Clusters: of few tiles, `splits` blocks share one, each takes a part of k, and their sums are added in the order of k: a narrow
//       matrix is streamed by many multiprocessors, and the same input gives the same bits.
// Shared memory: a ring of stages, each (128 + TOKENS) rows of 128 bytes of k as the copy engine swizzles them, and for FP8
//       the scales of TOKENS rows of x; for tiles of 128 rows their products with that of W, and the results on their way out.
// Bound: weights' bytes over memory bandwidth for few rows, tensor cores for many.
#include <cooperative_groups.h>

#include "numbers.cuh"
#include "tensor.cuh"
#include "tile.cuh"

#define WEIGHT_ROWS 128
#define CHUNK 128
#define CONSUMERS 256
// Of the scales that a lane needs of a stage, two of each eight rows, one after the other: so that four lanes read from 16 banks.
#define SCALED_PITCH 36
// Of a row of results in shared memory, in floats: so that the fragments' words fall into 32 different banks.
#define PITCH (WEIGHT_ROWS + 4)
// Of a warpgroup's row of results on its way out, in bytes; likewise.
#define OUT_PITCH (64 * 2 + 16)

// The launcher computes the same.
template <int TOKENS>
struct Ring {
    static constexpr uint32_t stages = TOKENS <= 32 ? 4 : TOKENS == 64 ? 8 : 5;
    static constexpr uint32_t blocks = TOKENS <= 16 ? 3 : TOKENS == 32 ? 2 : 1;
    // A whole warpgroup loads where registers are short: it can give its own away.
    static constexpr uint32_t threads = CONSUMERS + (TOKENS == 128 ? 128 : 32);
    static constexpr uint32_t weights = WEIGHT_ROWS * CHUNK;
    static constexpr uint32_t bytes = weights + TOKENS * CHUNK;
    // The copy engine begins at 16 bytes and writes where 128 begin: up to three floats before the tile's come along.
    static constexpr uint32_t scales_box = TOKENS + 4;
    static constexpr uint32_t scales = (scales_box + 31) / 32 * 32;
    static constexpr bool scaled = TOKENS == 128;
};

template <int TOKENS>
struct Shared {
    uint8_t* stages;
    float* scales;
    float* scaled;
    uint8_t* results;
    uint64_t *full, *empty, *ready;
    __device__ uint8_t* weights(uint32_t turn) const { return stages + turn % Ring<TOKENS>::stages * Ring<TOKENS>::bytes; }
    __device__ uint8_t* tokens(uint32_t turn) const { return weights(turn) + Ring<TOKENS>::weights; }
    __device__ float* scales_of(uint32_t turn) const { return scales + turn % Ring<TOKENS>::stages * Ring<TOKENS>::scales; }
    __device__ uint64_t* full_of(uint32_t turn) const { return full + turn % Ring<TOKENS>::stages; }
    __device__ float* scaled_of(uint32_t turn) const { return scaled + turn % Ring<TOKENS>::stages * 4 * SCALED_PITCH; }
    __device__ uint64_t* ready_of(uint32_t turn) const { return ready + turn % Ring<TOKENS>::stages; }
    __device__ uint64_t* empty_of(uint32_t turn) const { return empty + turn % Ring<TOKENS>::stages; }
    __device__ static uint32_t phase(uint32_t turn) { return turn / Ring<TOKENS>::stages & 1; }
};

// All that there is to multiply. Matrices follow each other; the inputs and outputs of a batch lie `x_batch` bytes and `y_batch`
// elements apart in their rows. `count` is the number of rows of y, or with `tiles` that of tiles.
template <typename Out>
struct Problem {
    const CUtensorMap *w, *x, *x_scales;
    const float* w_scales;
    const uint32_t* count;
    const Tile* tiles;
    Out* y;
    uint32_t n, k, y_stride, batch, x_batch, y_batch, splits;
};

// A tile of work.
template <typename Out>
struct Work {
    const float* w_scales;  // [k blocks]
    uint32_t w_row, x_column, first, rows;  // x_column in bytes; `first` of x, `rows` in this tile
    uint32_t begin, end;                    // chunks of 128 bytes of k
    uint32_t columns, y_stride;
    Out* y;
};

// Tiles of rows of x, of every item of a batch.
template <int TOKENS, typename Out>
__device__ __forceinline__ uint32_t runs(const Problem<Out>& of) {
    return (of.tiles ? *of.count : (*of.count + TOKENS - 1) / TOKENS) * of.batch;
}

template <int TOKENS, typename Out>
__device__ __forceinline__ uint32_t works(const Problem<Out>& of) {
    return runs<TOKENS>(of) * ((of.n + WEIGHT_ROWS - 1) / WEIGHT_ROWS);
}

// Tiles of rows that meet a block of W one after the other.
struct Group {
    uint32_t begin, count;
};

// The one that tile of rows `run` is in.
template <int TOKENS, typename Out>
__device__ __forceinline__ Group group(const Problem<Out>& of, uint32_t run) {
    if (TOKENS < 128) return {run, 1};
    if (of.tiles) return {run - of.tiles[run].before, of.tiles[run].together};
    uint32_t begin = run / TOGETHER * TOGETHER;
    return {begin, min(TOGETHER, runs<TOKENS>(of) - begin)};
}

// Tile `index`: in a group of tiles of rows those first, then rows of W. `part` of the chunks of k.
template <bool FP8, int TOKENS, typename Out>
__device__ __forceinline__ Work<Out> work(const Problem<Out>& of, uint32_t index, uint32_t part) {
    uint32_t blocks = (of.n + WEIGHT_ROWS - 1) / WEIGHT_ROWS;
    // All groups before have met all blocks, so this is one of its tiles.
    Group tiles = group<TOKENS>(of, index / blocks);
    uint32_t within = index - tiles.begin * blocks, n0 = within / tiles.count * WEIGHT_ROWS;
    uint32_t run = tiles.begin + within % tiles.count, item = run % of.batch;
    Tile tile = {item, run / of.batch * TOKENS, 0, 0, 0};
    if (of.tiles) tile = of.tiles[run];
    else tile.rows = min((uint32_t)TOKENS, *of.count - tile.first);
    uint32_t chunks = (of.k * (FP8 ? 1 : 2) + CHUNK - 1) / CHUNK, k_blocks = (of.k + 127) / 128;
    Work<Out> work;
    work.w_scales = FP8 ? of.w_scales + ((uint64_t)tile.matrix * blocks + n0 / 128) * k_blocks : nullptr;
    work.w_row = tile.matrix * of.n + n0;
    work.x_column = item * of.x_batch;
    work.first = tile.first;
    work.rows = tile.rows;
    work.begin = chunks * part / of.splits;
    work.end = chunks * (part + 1) / of.splits;
    work.columns = min((uint32_t)WEIGHT_ROWS, of.n - n0);
    work.y_stride = of.y_stride;
    work.y = of.y + (uint64_t)item * of.y_batch + (uint64_t)tile.first * of.y_stride + n0;
    return work;
}

// One thread fills the ring, from `turn` on.
template <bool FP8, int TOKENS, typename Out>
__device__ __forceinline__ void produce(const Problem<Out>& of, const Work<Out>& work, const Shared<TOKENS>& shared,
                                        uint32_t turn) {
    constexpr uint32_t bytes = Ring<TOKENS>::bytes + (FP8 ? 4 * Ring<TOKENS>::scales_box : 0);
    for (uint32_t chunk = work.begin; chunk < work.end; chunk++, turn++) {
        if (turn >= Ring<TOKENS>::stages) barrier_wait(shared.empty_of(turn), shared.phase(turn) ^ 1);
        uint64_t* full = shared.full_of(turn);
        barrier_expect(full, bytes);
        load_box(shared.weights(turn), of.w, chunk * CHUNK, work.w_row, full);
        load_box(shared.tokens(turn), of.x, work.x_column + chunk * CHUNK, work.first, full);
        if (FP8) load_box(shared.scales_of(turn), of.x_scales, work.first / 4 * 4, chunk, full);
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

// One warp: the scales of rows times that of W, from `turn` on, in the order in which promote reads them.
template <int TOKENS, typename Out>
__device__ __forceinline__ void scale(const Work<Out>& work, const Shared<TOKENS>& shared, uint32_t turn) {
    uint32_t lane = threadIdx.x % 32;
    float next = 0.f;
    for (uint32_t i = 0; i < work.end - work.begin; i++, turn++) {
        if (i % 32 == 0 && work.begin + i + lane < work.end) next = work.w_scales[work.begin + i + lane];
        float sw = __shfl_sync(0xffffffffu, next, i % 32);
        barrier_wait(shared.full_of(turn), shared.phase(turn));
        const float* sx = shared.scales_of(turn) + work.first % 4;
#pragma unroll
        for (uint32_t row = lane; row < TOKENS; row += 32) {
            shared.scaled_of(turn)[row % 8 / 2 * SCALED_PITCH + row / 8 * 2 + row % 2] = sw * sx[row];
        }
        barrier_arrive(shared.ready_of(turn));
    }
}

template <int N>
__device__ __forceinline__ void promote(const float* scaled, const float (&sum)[N / 2], float (&total)[N / 2]) {
    const float4* own = (const float4*)(scaled + threadIdx.x % 4 * SCALED_PITCH);
#pragma unroll
    for (int j = 0; j < N / 8; j += 2) {
        float4 s = own[j / 2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int at = 4 * j + 2 * half;
            total[at] = fmaf(s.x, sum[at], total[at]);
            total[at + 1] = fmaf(s.y, sum[at + 1], total[at + 1]);
            total[at + 4] = fmaf(s.z, sum[at + 4], total[at + 4]);
            total[at + 5] = fmaf(s.w, sum[at + 5], total[at + 5]);
        }
    }
}

// The stage may be filled again, as far as this thread is concerned: where a warp scales, it writes over what each thread has read.
// Else the copy engine does, and a warp speaks with one voice.
template <int TOKENS>
__device__ __forceinline__ void release(const Shared<TOKENS>& shared, uint32_t turn) {
    if (!Ring<TOKENS>::scaled) __syncwarp();
    if (Ring<TOKENS>::scaled || threadIdx.x % 32 == 0) barrier_arrive(shared.empty_of(turn));
}

// Begins the product of a stage.
template <int N, int TOKENS>
__device__ __forceinline__ void begin(const Shared<TOKENS>& shared, uint32_t turn, float (&sum)[N / 2]) {
    barrier_wait(shared.full_of(turn), shared.phase(turn));
    multiply_chunk<true, N>(shared, turn, sum, false);
}

// Ends the product of a stage, when at most `LEFT` later ones are begun. `sw`: the scale of W there.
template <int LEFT, int N, int TOKENS>
__device__ __forceinline__ void end(const Shared<TOKENS>& shared, uint32_t turn, uint32_t first, const float* sw,
                                    float (&sum)[N / 2], float (&total)[N / 2]) {
    if constexpr (Ring<TOKENS>::scaled) {
        wgmma_wait<LEFT>(sum);
        barrier_wait(shared.ready_of(turn), shared.phase(turn));
        promote<N>(shared.scaled_of(turn), sum, total);
    } else {
        float scale = *sw;
        wgmma_wait<LEFT>(sum);
        promote<N>(shared.scales_of(turn) + first % 4, scale, sum, total);
    }
    release(shared, turn);
}

// The sums of a stage are promoted while the tensor cores work on those of the next.
template <int N, int TOKENS, typename Out>
__device__ __forceinline__ void consume_fp8(const Work<Out>& work, const Shared<TOKENS>& shared, uint32_t turn,
                                            float (&total)[N / 2]) {
    float even[N / 2], odd[N / 2];
    const float* sw = work.w_scales + work.begin;
    uint32_t left = work.end - work.begin, first = work.first;
    if (left == 0) return;
    begin<N>(shared, turn, even);
    for (; left > 2; left -= 2, turn += 2, sw += 2) {
        begin<N>(shared, turn + 1, odd);
        end<1, N>(shared, turn, first, sw, even, total);
        begin<N>(shared, turn + 2, even);
        end<1, N>(shared, turn + 1, first, sw + 1, odd, total);
    }
    if (left == 2) {
        begin<N>(shared, turn + 1, odd);
        end<1, N>(shared, turn, first, sw, even, total);
        end<0, N>(shared, turn + 1, first, sw + 1, odd, total);
    } else {
        end<0, N>(shared, turn, first, sw, even, total);
    }
}

template <int N, int TOKENS, typename Out>
__device__ __forceinline__ void consume_bf16(const Work<Out>& work, const Shared<TOKENS>& shared, uint32_t turn,
                                             float (&total)[N / 2]) {
    uint32_t left = work.end - work.begin;
    for (uint32_t i = 0; i < left; i++) {
        barrier_wait(shared.full_of(turn + i), shared.phase(turn + i));
        multiply_chunk<false, N>(shared, turn + i, total, i > 0);
        wgmma_wait<1>(total);
        if (i > 0) release(shared, turn + i - 1);
    }
    wgmma_wait<0>(total);
    if (left > 0) release(shared, turn + left - 1);
}

__device__ __forceinline__ void store(bf16* y, float x) { *y = to_bf16(x); }
__device__ __forceinline__ void store(float* y, float x) { *y = x; }

// A warp's 16 rows of W by 8 rows of x, `d` as wgmma leaves them: each lane has single columns of rows of y.
template <typename Out>
__device__ __forceinline__ void write8(const Work<Out>& work, uint32_t token, const float* d) {
    uint32_t lane = threadIdx.x % 32, column = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t row = token + lane % 4 * 2 + i % 2, at = column + i / 2 * 8;
        if (row < work.rows && at < work.columns) store(work.y + (uint64_t)row * work.y_stride + at, d[i]);
    }
}

// 8 x 8 values of 16 bits, two a lane, transposed.
__device__ __forceinline__ uint32_t transposed(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t out;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(*(uint32_t*)&pair));
    return out;
}

// As write8, two columns at once.
__device__ __forceinline__ void write8_pairs(const Work<bf16>& work, uint32_t token, const float* d) {
    uint32_t lane = threadIdx.x % 32, row = token + lane / 4, column = threadIdx.x / 32 * 16 + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t pair = transposed(d[half * 2], d[half * 2 + 1]), at = column + half * 8;
        if (row < work.rows && at < work.columns) *(uint32_t*)(work.y + (uint64_t)row * work.y_stride + at) = pair;
    }
}

template <int N>
__device__ __forceinline__ void write(const Work<float>& work, const float (&total)[N / 2]) {
#pragma unroll
    for (int j = 0; j < N / 8; j++) write8(work, j * 8, total + 4 * j);
}

template <int N>
__device__ __forceinline__ void write(const Work<bf16>& work, const float (&total)[N / 2]) {
    bool pairs = ((uint64_t)work.y % 4 | work.y_stride % 2 | work.columns % 2) == 0;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        if (pairs) write8_pairs(work, j * 8, total + 4 * j);
        else write8(work, j * 8, total + 4 * j);
    }
}

// As write, by way of shared memory, by the copy engine: a thread sends a row of the warpgroup's 64 columns and waits for it before
// the next tile's results take its place.
template <int N>
__device__ __forceinline__ void send(const Work<bf16>& work, uint8_t* results, const float (&total)[N / 2]) {
    uint32_t lane = threadIdx.x % 32, row = threadIdx.x % 128, group = threadIdx.x / 128;
    results += group * 128 * OUT_PITCH;
    bulk_wait_read();
    group_sync(group);
    uint8_t* at = results + lane / 4 * OUT_PITCH + row / 32 * 32 + lane % 4 * 4;
#pragma unroll
    for (int j = 0; j < N / 8; j++, at += 8 * OUT_PITCH) {
        *(uint32_t*)at = transposed(total[4 * j], total[4 * j + 1]);
        *(uint32_t*)(at + 16) = transposed(total[4 * j + 2], total[4 * j + 3]);
    }
    written_for_copies();
    group_sync(group);
    uint32_t first = group * 64;
    if (row < work.rows && first < work.columns) {
        bulk_store(work.y + (uint64_t)row * work.y_stride + first, results + row * OUT_PITCH, 2 * min(64u, work.columns - first));
    }
    bulk_commit();
}

// Whether every row of results can be sent.
__device__ __forceinline__ bool sendable(const Work<bf16>& work) {
    return ((uint64_t)work.y % 16 | work.y_stride % 8 | work.columns % 8) == 0;
}

template <int N>
__device__ __forceinline__ void write(const Work<bf16>& work, uint8_t* results, const float (&total)[N / 2]) {
    if (results && sendable(work)) send<N>(work, results, total);
    else write<N>(work, total);
}

template <int N>
__device__ __forceinline__ void write(const Work<float>& work, uint8_t*, const float (&total)[N / 2]) {
    write<N>(work, total);
}

// A warpgroup's part of the results into shared memory, [N][PITCH], when both have read all stages.
template <int N>
__device__ __forceinline__ void keep(float* results, const float (&total)[N / 2]) {
    uint32_t lane = threadIdx.x % 32;
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
    results += threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        float* at = results + (j * 8 + lane % 4 * 2) * PITCH;
        at[0] = total[4 * j];
        at[PITCH] = total[4 * j + 1];
        at[8] = total[4 * j + 2];
        at[PITCH + 8] = total[4 * j + 3];
    }
}

// A warpgroup's 64 rows of W by N rows of x: written, or if others have parts of the sums, kept for them.
template <bool FP8, int N, int TOKENS, typename Out>
__device__ __forceinline__ void consume(const Work<Out>& work, const Shared<TOKENS>& shared, uint32_t turn, bool whole) {
    float total[N / 2] = {};
    if (FP8) consume_fp8<N>(work, shared, turn, total);
    else consume_bf16<N>(work, shared, turn, total);
    if (whole) write<N>(work, TOKENS == 128 ? shared.results : nullptr, total);
    else keep<N>((float*)shared.stages, total);
}

template <bool FP8, int TOKENS, typename Out>
__device__ __forceinline__ void consume_rows(const Work<Out>& work, const Shared<TOKENS>& shared, uint32_t turn, bool whole) {
    if (TOKENS == 128 && work.rows <= 32) consume<FP8, TOKENS == 128 ? 32 : TOKENS>(work, shared, turn, whole);
    else if (TOKENS == 128 && work.rows <= 64) consume<FP8, TOKENS == 128 ? 64 : TOKENS>(work, shared, turn, whole);
    else if (TOKENS == 128 && work.rows <= 96) consume<FP8, TOKENS == 128 ? 96 : TOKENS>(work, shared, turn, whole);
    else consume<FP8, TOKENS>(work, shared, turn, whole);
}

// Adds the parts that the blocks of the cluster have kept and writes the sums, each block some of the rows.
template <typename Out>
__device__ __forceinline__ void write_sums(const Work<Out>& work, const float* results, uint32_t part, uint32_t splits) {
    auto cluster = cooperative_groups::this_cluster();
    for (uint32_t i = threadIdx.x; i < work.rows * WEIGHT_ROWS; i += blockDim.x) {
        uint32_t row = i / WEIGHT_ROWS, column = i % WEIGHT_ROWS;
        if (row % splits != part || column >= work.columns) continue;
        float sum = 0.f;
        for (uint32_t from = 0; from < splits; from++) {
            sum += cluster.map_shared_rank(results, from)[row * PITCH + column];
        }
        store(work.y + (uint64_t)row * work.y_stride + column, sum);
    }
}

template <bool FP8, int TOKENS, typename Out>
__device__ __forceinline__ void linear(const Problem<Out>& of) {
    extern __shared__ uint8_t dynamic[];
    __shared__ uint64_t full[Ring<TOKENS>::stages], empty[Ring<TOKENS>::stages], ready[Ring<TOKENS>::stages];
    Shared<TOKENS> shared;
    shared.stages = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;
    shared.scales = (float*)(shared.stages + Ring<TOKENS>::stages * Ring<TOKENS>::bytes);
    shared.scaled = shared.scales + Ring<TOKENS>::stages * Ring<TOKENS>::scales;
    shared.results = (uint8_t*)(shared.scaled + Ring<TOKENS>::stages * 4 * SCALED_PITCH);
    shared.ready = ready;
    shared.full = full;
    shared.empty = empty;
    if (threadIdx.x < Ring<TOKENS>::stages) {
        barrier_init(full + threadIdx.x, 1);
        barrier_init(empty + threadIdx.x, Ring<TOKENS>::scaled ? CONSUMERS : CONSUMERS / 32);
        barrier_init(ready + threadIdx.x, 32);
        barriers_ready();
    }
    __syncthreads();
    uint32_t begin = blockIdx.x / of.splits, step = gridDim.x / of.splits, part = blockIdx.x % of.splits;
    uint32_t end = works<TOKENS>(of), turn = 0;
    bool whole = of.splits == 1;
    if (threadIdx.x >= CONSUMERS) {
        if (TOKENS == 128) registers_down<40>();
        bool loads = threadIdx.x == CONSUMERS, scales = FP8 && Ring<TOKENS>::scaled && threadIdx.x / 32 == CONSUMERS / 32 + 1;
        for (uint32_t index = begin; index < end && (loads || scales); index += step) {
            Work<Out> one = work<FP8, TOKENS>(of, index, part);
            if (loads) produce<FP8>(of, one, shared, turn);
            else scale(one, shared, turn);
            turn += one.end - one.begin;
        }
        // The cluster's barrier wants whole warps.
        __syncwarp();
    } else {
        if (TOKENS == 128) registers_up<232>();
        for (uint32_t index = begin; index < end; index += step) {
            Work<Out> one = work<FP8, TOKENS>(of, index, part);
            consume_rows<FP8>(one, shared, turn, whole);
            turn += one.end - one.begin;
        }
        if (TOKENS == 128) bulk_wait();
    }
    if (whole || begin >= end) return;
    auto cluster = cooperative_groups::this_cluster();
    cluster.sync();
    write_sums(work<FP8, TOKENS>(of, begin, part), (const float*)shared.stages, part, of.splits);
    // Others may still read this block's memory.
    cluster.sync();
}

// Grid: with splits, every tile that there may be times the splits; else as many as run at once.
#define LINEAR(NAME, FP8, TOKENS, OUT)                                                                                        \
    extern "C" __global__ void __launch_bounds__(Ring<TOKENS>::threads, Ring<TOKENS>::blocks) NAME##_##TOKENS(                \
        const __grid_constant__ CUtensorMap w, const __grid_constant__ CUtensorMap x,                                         \
        const __grid_constant__ CUtensorMap x_scales, const float* w_scales, const uint32_t* count, const Tile* tiles,        \
        OUT* y, uint32_t n, uint32_t k, uint32_t y_stride, uint32_t batch, uint32_t x_batch, uint32_t y_batch,                \
        uint32_t splits) {                                                                                                    \
        linear<FP8, TOKENS, OUT>({&w, &x, &x_scales, w_scales, count, tiles, y, n, k, y_stride, batch, x_batch, y_batch,      \
                                  splits});                                                                                   \
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
