// Matrix products: y[t][n] = sum_k x[t][k] W[n][k], for W in FP8 with 128 x 128 block scales or in bf16.
//
// FP8:  y = sum_b sx[t][b] sw[n / 128][b] (sum over the 128 k of block b of e4m3 x times e4m3 W): the inner sum by tensor cores
//       in f32, promoted to a second accumulator each 128 k, because their own sum keeps about 14 bits.
// Layouts: W [n][k] row-major, x [rows][k] with a stride, y [rows][n] with a stride; `gather`, if given, names the row of x that
//       a row of y comes from. `tiles`, if given, are runs of rows that belong to one of several matrices (experts).
// Threads: 4 warps. A block computes 64 rows of W (the M side: weights are what there is much of in decode) by TOKENS rows of x
//       (the N side: 8 to 128); a warp 16 by TOKENS, with mma m16n8k32 (e4m3) or m16n8k16 (bf16). Both instructions
//       see a k step of 32 bytes in the same arrangement, so one loop serves both.
// Shared memory: a ring of stages (8 up to 32 rows, else 4), each (64 + TOKENS) rows of 128 bytes of k, padded to 144 so that the
//       fragments' words fall into 32 different banks, and for FP8 the block's scales: TOKENS of x, one of W.
// Bound: weights' bytes over memory bandwidth for few rows, tensor cores for many. With few rows a block has 56 KB of weights on
//       their way, so that even a narrow matrix, of few blocks, is streamed.
#include "numbers.cuh"
#include "tile.cuh"

#define WEIGHT_ROWS 64
#define CHUNK 128
#define PITCH 144

// The launcher computes the same.
template <int TOKENS>
struct Ring {
    static constexpr uint32_t stages = TOKENS <= 32 ? 8 : 4;
    static constexpr uint32_t scales = (WEIGHT_ROWS + TOKENS) * PITCH;
    static constexpr uint32_t stage_bytes = scales + 4 * TOKENS + 16;
};

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

// 16 bytes to shared memory; zeros if not `valid`.
__device__ __forceinline__ void copy16(void* to, const void* from, bool valid) {
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy4(void* to, const void* from, bool valid) {
    int bytes = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}

template <bool FP8>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if (FP8) {
        asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

struct Operands {
    const uint8_t* w;       // bytes of the matrix, k contiguous
    const float* w_scales;  // FP8 only
    const uint8_t* x;
    const float* x_scales;  // FP8 only: [rows][k blocks]
    const uint32_t* gather;
    uint32_t n, k_bytes, x_stride_bytes, k_blocks;
    uint32_t first, rows;  // of y and of gather, in this tile
};

// `source`: the row of x of every row of the tile.
template <bool FP8, int TOKENS>
__device__ __forceinline__ void load_chunk(const Operands& op, const uint32_t* source, uint32_t n0, uint32_t chunk,
                                           uint8_t* stage) {
    uint32_t k0 = chunk * CHUNK;
    for (uint32_t i = threadIdx.x; i < WEIGHT_ROWS * 8; i += 128) {
        uint32_t row = i / 8, k = k0 + i % 8 * 16;
        bool valid = n0 + row < op.n && k < op.k_bytes;
        const uint8_t* from = valid ? op.w + (uint64_t)(n0 + row) * op.k_bytes + k : op.w;
        copy16(stage + row * PITCH + i % 8 * 16, from, valid);
    }
    uint8_t* tokens = stage + WEIGHT_ROWS * PITCH;
    for (uint32_t i = threadIdx.x; i < TOKENS * 8; i += 128) {
        uint32_t row = i / 8, k = k0 + i % 8 * 16;
        bool valid = row < op.rows && k < op.k_bytes;
        const uint8_t* from = valid ? op.x + (uint64_t)source[row] * op.x_stride_bytes + k : op.x;
        copy16(tokens + row * PITCH + i % 8 * 16, from, valid);
    }
    if (FP8) {
        float* scales = (float*)(stage + Ring<TOKENS>::scales);
        uint32_t row = threadIdx.x;
        bool valid = row < op.rows;
        const float* from = valid ? op.x_scales + (uint64_t)source[row] * op.k_blocks + chunk : op.x_scales;
        if (row < TOKENS) copy4(scales + row, from, valid);
        if (row == 0) copy4(scales + TOKENS, op.w_scales + (uint64_t)(n0 / 128) * op.k_blocks + chunk, true);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <bool FP8, int TOKENS>
__device__ __forceinline__ void multiply_chunk(const uint8_t* stage, float (&sum)[TOKENS / 8][4]) {
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint8_t* w = stage + (warp * 16 + lane / 4) * PITCH + lane % 4 * 4;
    const uint8_t* x = stage + (WEIGHT_ROWS + lane / 4) * PITCH + lane % 4 * 4;
#pragma unroll
    for (int step = 0; step < CHUNK / 32; step++) {
        const uint8_t* at = w + step * 32;
        uint32_t a[4] = {*(const uint32_t*)at, *(const uint32_t*)(at + 8 * PITCH), *(const uint32_t*)(at + 16),
                         *(const uint32_t*)(at + 8 * PITCH + 16)};
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) {
            const uint8_t* b = x + j * 8 * PITCH + step * 32;
            mma<FP8>(sum[j], a, *(const uint32_t*)b, *(const uint32_t*)(b + 16));
        }
    }
}

template <int TOKENS>
__device__ __forceinline__ void promote(const uint8_t* stage, const float (&sum)[TOKENS / 8][4], float (&total)[TOKENS / 8][4]) {
    const float* scales = (const float*)(stage + Ring<TOKENS>::scales);
    uint32_t lane = threadIdx.x % 32;
    float sw = scales[TOKENS];
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            float scale = sw * scales[j * 8 + lane % 4 * 2 + c];
            total[j][c] += scale * sum[j][c];
            total[j][c + 2] += scale * sum[j][c + 2];
        }
    }
}

__device__ __forceinline__ void store(bf16* y, float x) { *y = to_bf16(x); }
__device__ __forceinline__ void store(float* y, float x) { *y = x; }

template <bool FP8, int TOKENS, typename Out>
__device__ __forceinline__ void product(const Operands& op, uint32_t n0, Out* y, uint32_t y_stride) {
    extern __shared__ __align__(16) uint8_t shared[];
    __shared__ uint32_t source[TOKENS];
    constexpr uint32_t stages = Ring<TOKENS>::stages, stage_bytes = Ring<TOKENS>::stage_bytes;
    if (threadIdx.x < op.rows) source[threadIdx.x] = op.gather ? op.gather[op.first + threadIdx.x] : op.first + threadIdx.x;
    __syncthreads();
    uint32_t chunks = (op.k_bytes + CHUNK - 1) / CHUNK;
    float total[TOKENS / 8][4] = {};
    for (uint32_t s = 0; s < stages - 1; s++) {
        if (s < chunks) load_chunk<FP8, TOKENS>(op, source, n0, s, shared + s * stage_bytes);
        else asm volatile("cp.async.commit_group;" ::: "memory");
    }
    for (uint32_t chunk = 0; chunk < chunks; chunk++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(stages - 2) : "memory");
        __syncthreads();
        uint32_t next = chunk + stages - 1;
        if (next < chunks) load_chunk<FP8, TOKENS>(op, source, n0, next, shared + next % stages * stage_bytes);
        else asm volatile("cp.async.commit_group;" ::: "memory");
        const uint8_t* stage = shared + chunk % stages * stage_bytes;
        if (FP8) {
            float sum[TOKENS / 8][4] = {};
            multiply_chunk<FP8, TOKENS>(stage, sum);
            promote<TOKENS>(stage, sum, total);
        } else {
            multiply_chunk<FP8, TOKENS>(stage, total);
        }
    }
    // Through shared memory, so that rows of y are written in runs.
    __syncthreads();
    float* rows = (float*)shared;
    const uint32_t pitch = WEIGHT_ROWS + 1;
    uint32_t lane = threadIdx.x % 32, n = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
        uint32_t row = j * 8 + lane % 4 * 2;
        rows[row * pitch + n] = total[j][0];
        rows[(row + 1) * pitch + n] = total[j][1];
        rows[row * pitch + n + 8] = total[j][2];
        rows[(row + 1) * pitch + n + 8] = total[j][3];
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < op.rows * WEIGHT_ROWS; i += 128) {
        uint32_t row = i / WEIGHT_ROWS, column = i % WEIGHT_ROWS;
        if (n0 + column < op.n) store(y + (uint64_t)(op.first + row) * y_stride + n0 + column, rows[row * pitch + column]);
    }
}

// Grid: rows of W / 64, runs of rows of x, batch. `count` is the number of rows of y, or with `tiles` that of tiles.
// Batch: matrices, inputs and outputs lie `w_batch`, `x_batch` bytes and `y_batch` elements apart.
template <bool FP8, int TOKENS, typename Out>
__device__ __forceinline__ void linear(const uint8_t* w, const float* w_scales, const uint8_t* x, const float* x_scales,
                                       const uint32_t* gather, const uint32_t* count, const Tile* tiles, Out* y, uint32_t n,
                                       uint32_t k, uint32_t x_stride, uint32_t y_stride, uint32_t w_batch, uint32_t x_batch,
                                       uint32_t y_batch) {
    const uint32_t element = FP8 ? 1 : 2;
    Tile tile = {0, blockIdx.y * TOKENS, 0, 0};
    if (tiles) {
        if (blockIdx.y >= *count) return;
        tile = tiles[blockIdx.y];
    } else {
        if (tile.first >= *count) return;
        tile.rows = min((uint32_t)TOKENS, *count - tile.first);
    }
    uint64_t matrix = (uint64_t)tile.matrix * n * k;
    uint32_t k_blocks = (k + 127) / 128;
    Operands op;
    op.w = w + matrix * element + (uint64_t)blockIdx.z * w_batch;
    op.w_scales = FP8 ? w_scales + (uint64_t)tile.matrix * ((n + 127) / 128) * k_blocks : nullptr;
    op.x = x + (uint64_t)blockIdx.z * x_batch;
    op.x_scales = x_scales;
    op.gather = gather;
    op.n = n;
    op.k_bytes = k * element;
    op.x_stride_bytes = x_stride * element;
    op.k_blocks = k_blocks;
    op.first = tile.first;
    op.rows = tile.rows;
    product<FP8, TOKENS, Out>(op, blockIdx.x * WEIGHT_ROWS, y + (uint64_t)blockIdx.z * y_batch, y_stride);
}

#define LINEAR(NAME, FP8, TOKENS, OUT)                                                                                        \
    extern "C" __global__ void __launch_bounds__(128) NAME##_##TOKENS(                                                        \
        const uint8_t* w, const float* w_scales, const uint8_t* x, const float* x_scales, const uint32_t* gather,             \
        const uint32_t* count, const Tile* tiles, OUT* y, uint32_t n, uint32_t k, uint32_t x_stride, uint32_t y_stride,       \
        uint32_t w_batch, uint32_t x_batch, uint32_t y_batch) {                                                               \
        linear<FP8, TOKENS, OUT>(w, w_scales, x, x_scales, gather, count, tiles, y, n, k, x_stride, y_stride, w_batch,        \
                                 x_batch, y_batch);                                                                           \
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

// Rows of bf16 to e4m3 with a scale for each 128 channels: s = max(max |x|, 1e-4) / 448, q = e4m3(x / s), to nearest even.
// Grid: rows by groups / 4; a warp takes a group. `count` rows, `per` times as many if rows are copies. Bound: bytes.
extern "C" __global__ void __launch_bounds__(128)
    quantize(const uint32_t* count, uint32_t per, const bf16* x, uint32_t stride, uint32_t k, uint8_t* q, float* scales) {
    uint32_t row = blockIdx.x, lane = threadIdx.x % 32;
    uint32_t group = blockIdx.y * 4 + threadIdx.x / 32, groups = (k + 127) / 128;
    if (row >= *count * per || group >= groups) return;
    const bf16* from = x + (uint64_t)row * stride + group * 128;
    uint32_t column = group * 128 + lane * 4;
    __align__(8) bf16 four[4] = {};
    if (column < k) *(uint2*)four = *(const uint2*)(from + lane * 4);
    float largest = 1e-4f;
#pragma unroll
    for (int i = 0; i < 4; i++) largest = fmaxf(largest, fabsf(to_f32(four[i])));
    float scale = warp_max(largest) / 448.f;
    if (lane == 0) scales[(uint64_t)row * groups + group] = scale;
    uint32_t packed = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        packed |= (uint32_t)__nv_cvt_float_to_fp8(to_f32(four[i]) / scale, __NV_SATFINITE, __NV_E4M3) << (8 * i);
    }
    if (column < k) *(uint32_t*)(q + (uint64_t)row * k + column) = packed;
}
