// The router's choice: GateRule (src/shape.rs) applied to f32 logits [rows][experts]; specification: src/cpu/gate.rs.
//
//   s = scoring(z), c = s + bias; all but the `kept_groups` best runs of consecutive experts count as -inf;
//   the `top_k` largest c, best first, ties to the lower id; weight = s * (normalize ? scale / (sum s + 1e-20) : scale)
//
// Out: experts u32 [rows][top_k], weights f32 [rows][top_k]. Every sum is taken in the order of the CPU: the same bits.
// Thread map: a warp per row, 4 rows per block; lane l holds experts l, l + 32, ...; lane g scores group g, lane j keeps the
// j-th choice. Shared memory: scores and choices, 4 x 2 x 384 f32. Bound by latency: a few hundred steps of one warp.
#include "math.cuh"

namespace {

constexpr uint32_t ROWS = 4;
constexpr uint32_t MAX_EXPERTS = 384;
constexpr uint32_t PER_LANE = MAX_EXPERTS / 32;
constexpr uint32_t EVERY = 0xffffffffu;

struct Rule {
    uint32_t softmax, groups, kept_groups, top_two, top_k, normalize;
    float scale;
};

__device__ void score(const float* logits, uint32_t experts, bool softmax, float* scores) {
    uint32_t lane = threadIdx.x % 32;
    if (!softmax) {
        for (uint32_t e = lane; e < experts; e += 32) scores[e] = sigmoid(logits[e]);
        __syncwarp();
        return;
    }
    float max = -INFINITY;
    for (uint32_t e = lane; e < experts; e += 32) max = fmaxf(max, logits[e]);
    for (int offset = 16; offset > 0; offset >>= 1) max = fmaxf(max, __shfl_xor_sync(EVERY, max, offset));
    for (uint32_t e = lane; e < experts; e += 32) scores[e] = exp_f32(__fsub_rn(logits[e], max));
    __syncwarp();
    // Every lane sums all, in the order of ids, as the CPU does.
    float sum = 0.0f;
    for (uint32_t e = 0; e < experts; e++) sum = __fadd_rn(sum, scores[e]);
    __syncwarp();
    for (uint32_t e = lane; e < experts; e += 32) scores[e] = __fdiv_rn(scores[e], sum);
    __syncwarp();
}

// -inf for the experts of all groups but the best.
__device__ void mask_groups(float* choice, uint32_t experts, const Rule& rule) {
    uint32_t lane = threadIdx.x % 32, size = experts / rule.groups;
    float own = 0.0f;
    if (lane < rule.groups) {
        const float* group = choice + lane * size;
        float first = group[0], second = 0.0f;
        for (uint32_t i = 1; i < size; i++) {
            bool larger = ordered(group[i]) > ordered(first);
            float less = larger ? first : group[i];
            if (i == 1 || ordered(less) > ordered(second)) second = less;
            if (larger) first = group[i];
        }
        own = rule.top_two && size > 1 ? __fadd_rn(first, second) : first;
    }
    uint32_t before = 0;
    for (uint32_t g = 0; g < rule.groups; g++) {
        uint32_t other = ordered(__shfl_sync(EVERY, own, g)), key = ordered(own);
        if (other > key || (other == key && g < lane)) before++;
    }
    uint32_t kept = __ballot_sync(EVERY, lane < rule.groups && before < rule.kept_groups);
    // Shuffles do not order memory: every lane has read its group before any of them is written.
    __syncwarp();
    for (uint32_t e = lane; e < experts; e += 32) {
        if (!(kept >> e / size & 1)) choice[e] = -INFINITY;
    }
    __syncwarp();
}

// The `top_k` largest choices; lane j returns the j-th.
__device__ uint32_t largest(const float* choice, uint32_t experts, uint32_t top_k) {
    uint32_t lane = threadIdx.x % 32, taken = 0, chosen = 0;
    for (uint32_t j = 0; j < top_k; j++) {
        uint32_t key = 0, id = EVERY;
#pragma unroll
        for (uint32_t i = 0; i < PER_LANE; i++) {
            uint32_t e = lane + 32 * i;
            if (e >= experts || taken >> i & 1) continue;
            uint32_t other = ordered(choice[e]);
            if (id == EVERY || other > key) {
                key = other;
                id = e;
            }
        }
        uint32_t best = __reduce_max_sync(EVERY, key);
        uint32_t winner = __reduce_min_sync(EVERY, key == best ? id : EVERY);
        if (winner % 32 == lane) taken |= 1u << winner / 32;
        if (lane == j) chosen = winner;
    }
    return chosen;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(32 * ROWS) gate_route(
    const uint32_t* counts, const float* logits, uint32_t experts, const float* bias, uint32_t softmax,
    uint32_t groups, uint32_t kept_groups, uint32_t top_two, uint32_t top_k, uint32_t normalize, float scale,
    uint32_t* chosen_experts, float* weights) {
    __shared__ float all_scores[ROWS][MAX_EXPERTS];
    __shared__ float all_choices[ROWS][MAX_EXPERTS];
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t row = blockIdx.x * ROWS + warp;
    if (row >= counts[0]) return;
    Rule rule = Rule{softmax, groups, kept_groups, top_two, top_k, normalize, scale};
    float* scores = all_scores[warp];
    float* choice = all_choices[warp];
    score(logits + (uint64_t)row * experts, experts, softmax, scores);
    for (uint32_t e = lane; e < experts; e += 32) {
        choice[e] = bias ? __fadd_rn(scores[e], bias[e]) : scores[e];
    }
    __syncwarp();
    if (kept_groups < groups) mask_groups(choice, experts, rule);
    uint32_t id = largest(choice, experts, top_k);
    float own = lane < top_k ? scores[id] : 0.0f;
    float sum = 0.0f;
    for (uint32_t j = 0; j < top_k; j++) sum = __fadd_rn(sum, __shfl_sync(EVERY, own, j));
    float factor = normalize ? __fdiv_rn(scale, __fadd_rn(sum, 1e-20f)) : scale;
    if (lane < top_k) {
        chosen_experts[(uint64_t)row * top_k + lane] = id;
        weights[(uint64_t)row * top_k + lane] = __fmul_rn(own, factor);
    }
}
