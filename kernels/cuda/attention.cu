// MLA attention over the paged cache, causal by position: a row sees positions 0 ..= its own.
//
// Absorbed form, any row:
//   s_j = scale * (q . cache_j) over 576 columns (latent 512 | rotary 64),  out = sum_j softmax(s)_j latent_j
//   attend_absorbed_16 / _32, and for more heads that of absorbed.cu: query bf16 [rows][heads][576] -> out bf16 [rows][heads][512] if the row
//   has one split, else partial f32 [rows][splits][heads][512] and lse f32 [rows][splits][heads], log2 of the
//   sum of 2^(s log2 e); attend_combine: those into out. `rows` of the scratch are those of one launch, from
//   first_row on. A split is a run of whole tiles of 64 positions (splits.cuh).
//   Thread map: one block of 8 warps per (16 or 32 heads, split, row). Warps lie MT x WN: MT groups of 16
//   heads, WN groups of 64 / WN positions for the scores and of 512 / WN columns for the sums. combine: 128
//   threads per (head, row), 4 columns each.
//   Shared memory: queries, two tiles of the cache (the next is copied while one is used), probabilities, row
//   statistics. Bound by memory.
//
//   gather_context, for the direct form (direct.cu): cache rows of an entry -> latent [context][512], rope [context][64], a warp
//   per position.
//
// The pool is bf16 [block][layer][64][576]: a tile is a block, contiguous. Scores and sums are f32,
// probabilities are rounded to bf16 before they multiply values; their sum is taken before that. Rows in
// shared memory are multiples of 128 bytes; the 16-byte chunk c of row r lies at c ^ (r & 7), so that
// ldmatrix meets no bank twice.
#include "numbers.cuh"
#include "splits.cuh"

#define LATENT 512
#define ROPE 64
#define WIDTH 576
#define LOG2E 1.4426950408889634f

extern __shared__ __align__(128) uint8_t shared[];

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

// Byte offset of a chunk of 16 bytes in a tile whose rows have CHUNKS of them.
template <int CHUNKS>
__device__ __forceinline__ uint32_t chunk_at(uint32_t row, uint32_t chunk) {
    return (row * CHUNKS + (chunk ^ (row & 7))) * 16;
}

// Copies 16 bytes, or zeros if not `valid`; `from` must be an address either way.
__device__ __forceinline__ void copy_chunk(uint32_t to, const void* from, bool valid) {
    uint32_t bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of this thread but the last one.
__device__ __forceinline__ void wait_all_but_one() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// d[16][8] += a[16][16] b[16][8]
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
}

// Over the four lanes that share the rows of a fragment.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// d[16][8 N] += a[16][K] b[8 N][K]: rows a_row.. of tile `a` with rows b_row.. of tile `b`, both [row][K].
template <int CHUNKS, int N>
__device__ __forceinline__ void multiply_rows(float (&d)[N][4], uint32_t a, uint32_t a_row, uint32_t b,
                                              uint32_t b_row) {
    uint32_t lane = threadIdx.x & 31;
#pragma unroll 2
    for (uint32_t k = 0; k < CHUNKS; k += 4) {
        uint32_t first[4], second[4];
        load_matrices(first, a + chunk_at<CHUNKS>(a_row + (lane & 15), k + (lane >> 4)));
        load_matrices(second, a + chunk_at<CHUNKS>(a_row + (lane & 15), k + 2 + (lane >> 4)));
#pragma unroll
        for (int n = 0; n < N; n++) {
            uint32_t keys[4];
            load_matrices(keys, b + chunk_at<CHUNKS>(b_row + 8 * n + (lane & 7), k + (lane >> 3)));
            multiply(d[n], first, keys[0], keys[1]);
            multiply(d[n], second, keys[2], keys[3]);
        }
    }
}

// d[16][8 N] += a[16][16] b[16][8 N]: rows b_row.. of tile `b`, from chunk `column` on.
template <int CHUNKS, int N>
__device__ __forceinline__ void multiply_columns(float (&d)[N][4], const uint32_t (&a)[4], uint32_t b,
                                                 uint32_t b_row, uint32_t column) {
    uint32_t lane = threadIdx.x & 31;
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        uint32_t values[4];
        load_transposed(values, b + chunk_at<CHUNKS>(b_row + (lane & 15), column + n + (lane >> 4)));
        multiply(d[n], a, values[0], values[1]);
        multiply(d[n + 1], a, values[2], values[3]);
    }
}

__device__ __forceinline__ const bf16* block_rows(const bf16* pool, uint64_t block, uint32_t layers,
                                                  uint32_t layer) {
    return pool + (block * layers + layer) * (uint64_t)(TILE * WIDTH);
}

template <int MT>
__device__ __forceinline__ void attend_absorbed(
    const uint32_t* counts, const uint32_t* positions, const uint32_t* entry_of_row,
    const uint32_t* block_table, uint32_t max_blocks, const bf16* query, const bf16* pool, uint32_t layers,
    uint32_t layer, uint32_t heads, float scale, uint32_t first_row, uint32_t wanted, float* partial, float* lse,
    bf16* out) {
    constexpr int HEADS = 16 * MT, WN = 8 / MT;
    constexpr int TOKENS = TILE / WN, COLUMNS = LATENT / WN;
    constexpr int CHUNKS = WIDTH / 8, KV_BYTES = TILE * WIDTH * 2;
    uint8_t* p_tile = shared + HEADS * WIDTH * 2 + 2 * KV_BYTES;
    float* maxima = reinterpret_cast<float*>(p_tile + HEADS * TILE * 2);
    float* sums = maxima + WN * HEADS;

    uint32_t first_head = blockIdx.x * HEADS, split = blockIdx.y, row = first_row + blockIdx.z;
    if (row >= counts[0]) return;
    uint32_t context = positions[row] + 1, length = split_length(context, wanted);
    uint32_t begin = split * length;
    if (begin >= context) return;
    uint32_t end = min(begin + length, context);
    uint32_t tiles = (end - begin + TILE - 1) / TILE;
    const uint32_t* table = block_table + (uint64_t)entry_of_row[row] * max_blocks + begin / TILE;

    uint32_t queries = shared_address(shared), cache = queries + HEADS * WIDTH * 2;
    uint32_t probabilities = shared_address(p_tile);
    uint32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    uint32_t m = warp / WN, n = warp % WN;
    // Rows of the fragments that this thread holds.
    uint32_t upper = 16 * m + (lane >> 2), lower = upper + 8;

    const bf16* from = query + ((uint64_t)row * heads + first_head) * WIDTH;
    for (uint32_t i = threadIdx.x; i < HEADS * CHUNKS; i += 256) {
        uint32_t head = i / CHUNKS;
        bool valid = first_head + head < heads;
        copy_chunk(queries + chunk_at<CHUNKS>(head, i % CHUNKS), valid ? from + i * 8 : query, valid);
    }
    auto load_tile = [&](uint32_t tile) {
        const bf16* rows = block_rows(pool, table[tile], layers, layer);
        uint32_t visible = end - begin - tile * TILE, to = cache + (tile & 1) * KV_BYTES;
        for (uint32_t i = threadIdx.x; i < TILE * CHUNKS; i += 256) {
            uint32_t token = i / CHUNKS;
            copy_chunk(to + chunk_at<CHUNKS>(token, i % CHUNKS), rows + i * 8, token < visible);
        }
    };
    load_tile(0);
    commit_copies();

    float sum[COLUMNS / 8][4] = {};
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
    for (uint32_t tile = 0; tile < tiles; tile++) {
        if (tile + 1 < tiles) load_tile(tile + 1);
        commit_copies();
        wait_all_but_one();
        __syncthreads();
        uint32_t kv = cache + (tile & 1) * KV_BYTES;

        float s[TOKENS / 8][4] = {};
        multiply_rows<CHUNKS>(s, queries, 16 * m, kv, TOKENS * n);
        float tile_top[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                uint32_t position = begin + tile * TILE + TOKENS * n + 8 * j + 2 * (lane & 3) + (c & 1);
                s[j][c] = position < end ? s[j][c] * (scale * LOG2E) : -INFINITY;
                tile_top[c >> 1] = fmaxf(tile_top[c >> 1], s[j][c]);
            }
        }
        tile_top[0] = quad_max(tile_top[0]);
        tile_top[1] = quad_max(tile_top[1]);
        if ((lane & 3) == 0) {
            maxima[n * HEADS + upper] = tile_top[0];
            maxima[n * HEADS + lower] = tile_top[1];
        }
        __syncthreads();
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // The first position of a tile is visible, so that this is finite.
            float now = top[half];
            for (int w = 0; w < WN; w++) now = fmaxf(now, maxima[w * HEADS + (half ? lower : upper)]);
            factor[half] = exp2f(top[half] - now);
            top[half] = now;
            total[half] *= factor[half];
        }
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                s[j][c] = exp2f(s[j][c] - top[c >> 1]);
                total[c >> 1] += s[j][c];
            }
            uint32_t chunk = (TOKENS * n) / 8 + j, inner = 4 * (lane & 3);
            uint8_t* to = p_tile + inner;
            *reinterpret_cast<uint32_t*>(to + chunk_at<TILE / 8>(upper, chunk)) = pack(s[j][0], s[j][1]);
            *reinterpret_cast<uint32_t*>(to + chunk_at<TILE / 8>(lower, chunk)) = pack(s[j][2], s[j][3]);
        }
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++) {
#pragma unroll
            for (int c = 0; c < 4; c++) sum[j][c] *= factor[c >> 1];
        }
        __syncthreads();
#pragma unroll
        for (uint32_t k = 0; k < TILE / 16; k++) {
            uint32_t p[4];
            load_matrices(p, probabilities + chunk_at<TILE / 8>(16 * m + (lane & 15), 2 * k + (lane >> 4)));
            multiply_columns<CHUNKS>(sum, p, kv, 16 * k, COLUMNS / 8 * n);
        }
        // The tile is overwritten in the next round but one, which is begun in the next.
        __syncthreads();
    }

    total[0] = quad_sum(total[0]);
    total[1] = quad_sum(total[1]);
    if ((lane & 3) == 0) {
        sums[n * HEADS + upper] = total[0];
        sums[n * HEADS + lower] = total[1];
    }
    __syncthreads();
    bool alone = length >= context;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t at = half ? lower : upper, head = first_head + at;
        if (head >= heads) continue;
        float whole = 0.0f;
        for (int w = 0; w < WN; w++) whole += sums[w * HEADS + at];
        float inverse = 1.0f / whole;
        uint64_t place = ((uint64_t)blockIdx.z * gridDim.y + split) * heads + head;
        float* to_partial = partial + place * LATENT + COLUMNS * n + 2 * (lane & 3);
        bf16* to_out = out + ((uint64_t)row * heads + head) * LATENT + COLUMNS * n + 2 * (lane & 3);
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++) {
            float x = sum[j][2 * half] * inverse, y = sum[j][2 * half + 1] * inverse;
            if (alone) {
                *reinterpret_cast<uint32_t*>(to_out + 8 * j) = pack(x, y);
            } else {
                *reinterpret_cast<float2*>(to_partial + 8 * j) = make_float2(x, y);
            }
        }
        if (!alone && n == 0 && (lane & 3) == 0) lse[place] = top[half] + log2f(whole);
    }
}

#define ABSORBED(NAME, MT) \
    extern "C" __global__ void __launch_bounds__(256) \
    NAME(const uint32_t* counts, const uint32_t* positions, const uint32_t* entry_of_row, \
         const uint32_t* block_table, uint32_t max_blocks, const bf16* query, const bf16* pool, \
         uint32_t layers, uint32_t layer, uint32_t heads, float scale, uint32_t first_row, uint32_t wanted, \
         float* partial, float* lse, bf16* out) { \
        attend_absorbed<MT>(counts, positions, entry_of_row, block_table, max_blocks, query, pool, layers, \
                            layer, heads, scale, first_row, wanted, partial, lse, out); \
    }

ABSORBED(attend_absorbed_16, 1)
ABSORBED(attend_absorbed_32, 2)

extern "C" __global__ void __launch_bounds__(128)
attend_combine(const uint32_t* counts, const uint32_t* positions, uint32_t heads, uint32_t first_row,
               uint32_t splits, uint32_t wanted, const float* partial, const float* lse, bf16* out) {
    uint32_t head = blockIdx.x, row = first_row + blockIdx.y;
    if (row >= counts[0]) return;
    uint32_t count = splits_of(positions[row] + 1, wanted);
    if (count == 1) return;
    uint64_t first = (uint64_t)blockIdx.y * splits * heads + head;
    float top = -INFINITY;
    for (uint32_t split = 0; split < count; split++) top = fmaxf(top, lse[first + (uint64_t)split * heads]);
    float whole = 0.0f, sum[4] = {};
    for (uint32_t split = 0; split < count; split++) {
        uint64_t place = first + (uint64_t)split * heads;
        float weight = exp2f(lse[place] - top);
        float4 part = reinterpret_cast<const float4*>(partial + place * LATENT)[threadIdx.x];
        whole += weight;
        sum[0] = fmaf(weight, part.x, sum[0]);
        sum[1] = fmaf(weight, part.y, sum[1]);
        sum[2] = fmaf(weight, part.z, sum[2]);
        sum[3] = fmaf(weight, part.w, sum[3]);
    }
    float inverse = 1.0f / whole;
    uint32_t low = pack(sum[0] * inverse, sum[1] * inverse), high = pack(sum[2] * inverse, sum[3] * inverse);
    bf16* to = out + ((uint64_t)row * heads + head) * LATENT;
    reinterpret_cast<uint2*>(to)[threadIdx.x] = make_uint2(low, high);
}

extern "C" __global__ void __launch_bounds__(256)
gather_context(const uint32_t* block_table, const bf16* pool, uint32_t layers, uint32_t layer,
               uint32_t context, bf16* latent, bf16* rope) {
    uint32_t position = blockIdx.x * 8 + (threadIdx.x >> 5);
    if (position >= context) return;
    const bf16* block = block_rows(pool, block_table[position / TILE], layers, layer);
    const uint4* from = reinterpret_cast<const uint4*>(block + position % TILE * WIDTH);
    uint4* to_latent = reinterpret_cast<uint4*>(latent + (uint64_t)position * LATENT);
    uint4* to_rope = reinterpret_cast<uint4*>(rope + (uint64_t)position * ROPE);
    for (uint32_t i = threadIdx.x & 31; i < WIDTH / 8; i += 32) {
        if (i < LATENT / 8) {
            to_latent[i] = from[i];
        } else {
            to_rope[i - LATENT / 8] = from[i];
        }
    }
}
