// Hopper's tensor cores and tensor copy engine: mbarriers, TMA, WGMMA (PTX ISA 9.7.13, 9.7.9.27, 9.7.15).
#pragma once
#include <cuda.h>
#include <stdint.h>

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine; before the __syncthreads that lets others use them.
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and has the phase wait for so many more bytes.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
    } while (!done);
}

// The box of `map` at (column, row) to shared memory; bytes outside of the map are zeros.
__device__ __forceinline__ void load_box(void* to, const CUtensorMap* map, uint32_t column, uint32_t row, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(to)),
        "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
        : "memory");
}

// What this thread wrote to shared memory, for the copy engine to read; before the barrier that lets others have it read.
__device__ __forceinline__ void written_for_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Bytes of shared memory to global memory, all multiples of 16, when the engine comes to it.
__device__ __forceinline__ void bulk_store(void* to, const void* from, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until what this thread has sent is read; or is written, too.
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Among the threads of warpgroup `group`.
__device__ __forceinline__ void group_sync(uint32_t group) {
    asm volatile("bar.sync %0, 128;" ::"r"(group + 2) : "memory");
}

// Operand in shared memory: rows of 128 bytes of k, each 8 of them 1024 bytes, chunks of 16 bytes swizzled by the row as the copy
// engine does it (128-byte swizzle). Begins at a multiple of 1024; 32 bytes further along k add 2.
__device__ __forceinline__ uint64_t operand(const void* rows) {
    return (uint64_t)(shared_address(rows) >> 4) | 1ull << 16 | (uint64_t)(1024 >> 4) << 32 | 1ull << 62;
}

// Registers of each thread of this warpgroup, out of what the block's others have given away.
template <int COUNT>
__device__ __forceinline__ void registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Right operand of bf16 whose rows are k and whose columns, 64 in 128 bytes, are n: panels of 64 columns lie `panel` bytes apart.
// Swizzled alike; 16 rows further along k are 2048 bytes.
__device__ __forceinline__ uint64_t operand_by_columns(const void* rows, uint32_t panel) {
    return (uint64_t)(shared_address(rows) >> 4) | (uint64_t)(panel >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 | 1ull << 62;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `LEFT` committed groups are in flight; `d` belongs to those that are complete.
template <int LEFT, int COUNT>
__device__ __forceinline__ void wgmma_wait(float (&d)[COUNT]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// d[64][N] (+)= a[64][k] b[N][k], k of 32 bytes: 32 of e4m3 or 16 of bf16. A warp has rows 16 w .., a lane of it
// d[4 j + 2 h + c] = [lane / 4 + 8 h][8 j + lane % 4 * 2 + c].
template <bool FP8, int N>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool add);

#define WGMMA(FP8, N, K, TYPES, REGISTERS, A, B, ADD, TAIL, ...)                                                      \
    template <>                                                                                                       \
    __device__ __forceinline__ void wgmma<FP8, N>(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {              \
        asm volatile("{.reg .pred p; setp.ne.b32 p, " ADD ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k" #K ".f32."  \
                     TYPES " {" REGISTERS "}, " A ", " B ", p, 1, 1" TAIL ";}"                                        \
                     : __VA_ARGS__                                                                                    \
                     : "l"(a), "l"(b), "r"((int)add)                                                                  \
                     : "memory");                                                                                     \
    }

#define WGMMA_BOTH(N, REGISTERS, A, B, ADD, ...)                                             \
    WGMMA(true, N, 32, "e4m3.e4m3", REGISTERS, A, B, ADD, "", __VA_ARGS__)                   \
    WGMMA(false, N, 16, "bf16.bf16", REGISTERS, A, B, ADD, ", 0, 0", __VA_ARGS__)

#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define R0 "%0, %1, %2, %3"
#define R4 "%4, %5, %6, %7"
#define R8 "%8, %9, %10, %11, %12, %13, %14, %15"
#define R16 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define R32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define R48 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define UP_TO_16 R0 ", " R4 ", " R8

WGMMA_BOTH(8, R0, "%4", "%5", "%6", D4(0))
WGMMA_BOTH(16, R0 ", " R4, "%8", "%9", "%10", D4(0), D4(4))
WGMMA_BOTH(32, UP_TO_16, "%16", "%17", "%18", D16(0))
WGMMA_BOTH(64, UP_TO_16 ", " R16, "%32", "%33", "%34", D16(0), D16(16))
WGMMA_BOTH(96, UP_TO_16 ", " R16 ", " R32, "%48", "%49", "%50", D16(0), D16(16), D16(32))
WGMMA_BOTH(128, UP_TO_16 ", " R16 ", " R32 ", " R48, "%64", "%65", "%66", D16(0), D16(16), D16(32), D16(48))

// d[64][128] += a[64][16] b[16][128] in bf16: a in registers, as a quarter of what wgmma leaves, rounded; b by columns.
__device__ __forceinline__ void wgmma_by_columns(float (&d)[64], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" UP_TO_16 ", " R16 ", " R32 ", " R48
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : D16(0), D16(16), D16(32), D16(48)
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b)
                 : "memory");
}
