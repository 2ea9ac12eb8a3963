// From f32 logits to tokens, in the order that Sampling (src/batch.rs) documents; specification: src/cpu/sample.rs.
//
//   sample_rows      [samples][vocab] -> a Result per sample; notes the token as the slot's last and in its history
//   sample_logprobs  the same report for tokens that are given (prompt logprobs)
//   sample_resolve   puts the slots' last tokens where a step says SAMPLED
//
// Thread map: a block of 1024 threads per row, thread t takes ids 4t..4t+3 of every run of 4096. No sorting: the k-th
// largest value and the end of top_p's mass are found digit by digit (3 bits, 11 passes at most) on keys that order as
// floats do, then the last of equal values by id. Plainly greedy rows are read once.
// Reductions are over lanes, then warps, in a fixed order: same logits, same bits. All values are the CPU's, but that
// masses and the normaliser of logprobs are summed in another order than there (f64: the last bit may differ).
// Shared memory: struct Shared, 3.5 KiB. Scratch: per sample the f32 logits after bias, penalties and temperature.
// Bound by reading a row from L2 by one SM, once per pass; noise only for tokens that could win.
#include "math.cuh"

namespace {

constexpr uint32_t THREADS = 1024;
constexpr uint32_t WARPS = THREADS / 32;
constexpr uint32_t DIGITS = 8;
constexpr uint32_t EVERY = 0xffffffffu;
constexpr uint32_t MAX_TOP = 20;
constexpr uint32_t MAX_SUPPRESSED = 1088;
constexpr uint32_t MAX_BIASES = 1024;
constexpr uint32_t SAMPLED = 0xffffffffu;
constexpr float GREEDY = 1e-5f;

// Parameters of a slot; src/cuda/sample.rs writes the same.
struct Parameters {
    float temperature, top_p, min_p;
    float presence_penalty, frequency_penalty, repetition_penalty;
    uint32_t top_k, choice, seed_low, seed_high;
    uint32_t min_tokens, prompt_len;
    // EVERY: none are asked for.
    uint32_t logprobs;
    uint32_t suppressed, biases, penalized;
};

// The state of a slot. Its history follows, u16 [vocab]: bit 15 if the prompt has the id, below it how often the output
// does.
struct Slot {
    Parameters parameters;
    uint32_t suppress[MAX_SUPPRESSED];
    uint32_t bias_ids[MAX_BIASES];
    float bias_values[MAX_BIASES];
};

struct Listed {
    uint32_t token;
    float logprob;
    uint32_t rank;
};

struct Result {
    uint32_t id, finite, has_logprobs, listed;
    Listed token;
    Listed top[MAX_TOP];
};

struct Shared {
    double warp_masses[WARPS][DIGITS];
    uint32_t warp_counts[WARPS][DIGITS];
    double masses[DIGITS];
    uint32_t counts[DIGITS];
    float values[WARPS];
    uint32_t ids[WARPS];
    uint32_t found;
    uint32_t listed;
    float listed_values[MAX_TOP];
    uint32_t listed_ids[MAX_TOP];
};

// A row of values by id; the first `length` of them.
struct Row {
    const float* values;
    uint32_t length;
    // Whether four ids at a multiple of four may be read at once, those beyond `length` included.
    bool aligned;

    __device__ __forceinline__ float4 four(uint32_t first) const {
        if (aligned) return *reinterpret_cast<const float4*>(values + first);
        float4 found = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        found.x = values[first];
        if (first + 1 < length) found.y = values[first + 1];
        if (first + 2 < length) found.z = values[first + 2];
        if (first + 3 < length) found.w = values[first + 3];
        return found;
    }

    // f(id, value) for every id of this thread, ascending. BATCH reads are under way at a time.
    template <uint32_t BATCH, class F>
    __device__ __forceinline__ void each(F f) const {
        constexpr uint32_t STRIDE = 4 * THREADS;
        for (uint32_t base = 4 * threadIdx.x; base < length; base += BATCH * STRIDE) {
            float4 read[BATCH];
#pragma unroll
            for (uint32_t i = 0; i < BATCH; i++) {
                if (base + i * STRIDE < length) read[i] = four(base + i * STRIDE);
            }
#pragma unroll
            for (uint32_t i = 0; i < BATCH; i++) {
                uint32_t first = base + i * STRIDE;
                if (first < length) f(first, read[i].x);
                if (first + 1 < length) f(first + 1, read[i].y);
                if (first + 2 < length) f(first + 2, read[i].z);
                if (first + 3 < length) f(first + 3, read[i].w);
            }
        }
    }
};

struct Best {
    float value;
    uint32_t id;

    // Of equals the lower id. NaN is never taken.
    __device__ __forceinline__ void consider(float other, uint32_t other_id) {
        if (other > value || (other == value && other_id < id)) {
            value = other;
            id = other_id;
        }
    }

    __device__ __forceinline__ void over_warp() {
        for (int offset = 16; offset > 0; offset >>= 1) {
            float other = __shfl_xor_sync(EVERY, value, offset);
            uint32_t other_id = __shfl_xor_sync(EVERY, id, offset);
            consider(other, other_id);
        }
    }
};

__device__ __forceinline__ Best nothing() { return Best{-INFINITY, EVERY}; }

__device__ Best over_block(Best best, Shared& shared) {
    uint32_t lane = threadIdx.x % 32;
    best.over_warp();
    if (lane == 0) {
        shared.values[threadIdx.x / 32] = best.value;
        shared.ids[threadIdx.x / 32] = best.id;
    }
    __syncthreads();
    best = Best{shared.values[lane], shared.ids[lane]};
    best.over_warp();
    __syncthreads();
    return best;
}

// Arg-max of a row; id 0 if nothing in it is a number.
__device__ Best largest(Row row, Shared& shared) {
    Best best = nothing();
    row.each<8>([&](uint32_t id, float value) { best.consider(value, id); });
    best = over_block(best, shared);
    if (best.id == EVERY) best.id = 0;
    return best;
}

// What is kept: larger keys, and of equal keys the ids up to `last`.
struct Cut {
    uint32_t key, last;

    __device__ __forceinline__ bool keeps(uint32_t other, uint32_t id) const {
        return other > key || (other == key && id <= last);
    }
};

__device__ __forceinline__ Cut everything() { return Cut{0, EVERY}; }

__device__ __forceinline__ Cut tighter(Cut a, Cut b) {
    if (a.key != b.key) return a.key > b.key ? a : b;
    return Cut{a.key, min(a.last, b.last)};
}

// Share of a value in the softmax, up to the common factor.
__device__ __forceinline__ double mass_of(float value, float max) {
    return exp_f64((double)__fsub_rn(value, max));
}

// Of each digit at `shift`, among the values kept by `among` whose higher digits are those of `prefix`: how many, and if
// MASS how heavy. Ends with them in shared.counts and shared.masses. NaN counts as removed.
template <bool MASS>
__device__ void tally(Row row, Cut among, uint32_t prefix, int shift, float max, Shared& shared) {
    uint32_t decided = shift + 3 >= 32 ? 0u : EVERY << (shift + 3);
    uint32_t counts[DIGITS] = {};
    double masses[DIGITS] = {};
    row.each<MASS ? 1 : 4>([&](uint32_t id, float value) {
        uint32_t key = ordered(value);
        if (isnan(value) || (key & decided) != prefix || !among.keeps(key, id)) return;
        uint32_t digit = key >> shift & (DIGITS - 1);
        double mass = MASS ? mass_of(value, max) : 0.0;
#pragma unroll
        for (uint32_t j = 0; j < DIGITS; j++) {
            if (digit == j) {
                counts[j]++;
                if (MASS) masses[j] = __dadd_rn(masses[j], mass);
            }
        }
    });
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (uint32_t j = 0; j < DIGITS; j++) {
        uint32_t count = __reduce_add_sync(EVERY, counts[j]);
        if (lane == 0) shared.warp_counts[warp][j] = count;
        if (MASS) {
            double mass = masses[j];
            for (int offset = 16; offset > 0; offset >>= 1) mass += __shfl_xor_sync(EVERY, mass, offset);
            if (lane == 0) shared.warp_masses[warp][j] = mass;
        }
    }
    __syncthreads();
    if (threadIdx.x < DIGITS) {
        uint32_t count = 0;
        double mass = 0.0;
        for (uint32_t w = 0; w < WARPS; w++) {
            count += shared.warp_counts[w][threadIdx.x];
            if (MASS) mass += shared.warp_masses[w][threadIdx.x];
        }
        shared.counts[threadIdx.x] = count;
        shared.masses[threadIdx.x] = mass;
    }
    __syncthreads();
}

// The `nth` id, from 1 and ascending, among those with this key.
__device__ uint32_t nth_id(Row row, uint32_t key, uint32_t nth, Shared& shared) {
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, seen = 0;
    for (uint32_t first = 0; first < row.length; first += THREADS) {
        uint32_t id = first + threadIdx.x;
        bool equal = id < row.length && ordered(row.values[id]) == key;
        uint32_t here = __syncthreads_count(equal);
        if (seen + here < nth) {
            seen += here;
            continue;
        }
        uint32_t lanes = __ballot_sync(EVERY, equal);
        if (lane == 0) shared.ids[warp] = __popc(lanes);
        __syncthreads();
        uint32_t rank = seen + 1 + __popc(lanes & ((1u << lane) - 1));
        for (uint32_t w = 0; w < warp; w++) rank += shared.ids[w];
        if (equal && rank == nth) shared.found = id;
        __syncthreads();
        return shared.found;
    }
    return EVERY;
}

// Keeps the k largest, k >= 1; of equals the lower ids. Everything, if there are no more than k.
__device__ __noinline__ Cut largest_k(Row row, uint32_t k, Shared& shared) {
    uint32_t prefix = 0, above = 0;
    for (int shift = 30; shift >= 0; shift -= 3) {
        tally<false>(row, everything(), prefix, shift, 0.0f, shared);
        uint32_t digit = DIGITS, count = above;
        while (digit > 0 && count < k) count += shared.counts[--digit];
        if (count < k) return everything();
        prefix |= digit << shift;
        if (count == k) return Cut{prefix, EVERY};
        above = count - shared.counts[digit];
    }
    return Cut{prefix, nth_id(row, prefix, k - above, shared)};
}

// Of what `among` keeps: the shortest prefix by (value descending, id ascending) whose share of the mass is at least
// top_p.
__device__ __noinline__ Cut top_mass(Row row, Cut among, float max, float top_p, Shared& shared) {
    uint32_t prefix = 0, count_above = 0, equals = 0;
    double above = 0.0, target = 0.0;
    for (int shift = 30; shift >= 0; shift -= 3) {
        tally<true>(row, among, prefix, shift, max, shared);
        if (shift == 30) {
            double total = 0.0;
            for (uint32_t j = DIGITS; j > 0; j--) total += shared.masses[j - 1];
            target = __dmul_rn((double)top_p, total);
        }
        uint32_t digit = DIGITS, count = count_above;
        double mass = above, before = above;
        bool reached = false;
        while (digit > 0 && !reached) {
            digit--;
            before = mass;
            mass += shared.masses[digit];
            count += shared.counts[digit];
            reached = count > 0 && mass >= target;
        }
        prefix |= digit << shift;
        equals = shared.counts[digit];
        // Not reached: only by rounding; then all of them are needed.
        if (!reached || equals == 1) return tighter(Cut{prefix, EVERY}, among);
        above = before;
        count_above = count - equals;
    }
    double needed = ceil((target - above) / mass_of(from_ordered(prefix), max));
    needed = fmin(fmax(needed, 1.0), (double)equals);
    if (needed == (double)equals) return tighter(Cut{prefix, EVERY}, among);
    return Cut{prefix, nth_id(row, prefix, (uint32_t)needed, shared)};
}

// Where the noise of a row comes from; src/cpu/philox.rs.
struct Noise {
    uint2 seed;
    uint32_t choice, position;

    // Of the ids from `first`, a multiple of four, on.
    __device__ __forceinline__ uint4 four(uint32_t first) const {
        return philox(seed, make_uint4(position, first / 4, choice, 0));
    }

    __device__ float of(uint32_t id) const {
        uint4 words = four(id);
        uint32_t which = id % 4;
        return gumbel(which == 0 ? words.x : which == 1 ? words.y : which == 2 ? words.z : words.w);
    }
};

// Arg-max of value plus noise over what `cut` keeps, and `top`, the largest value.
__device__ __noinline__ uint32_t draw(Row row, Cut cut, Best top, Noise noise, Shared& shared) {
    Best best = Best{__fadd_rn(top.value, noise.of(top.id)), top.id};
    for (uint32_t first = 4 * threadIdx.x; first < row.length; first += 4 * THREADS) {
        float4 four = row.four(first);
        float values[4] = {four.x, four.y, four.z, four.w};
        uint32_t able = 0;
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            bool may_win = first + i < row.length && __fadd_rn(values[i], LARGEST_NOISE) >= best.value;
            if (may_win && cut.keeps(ordered(values[i]), first + i)) able |= 1u << i;
        }
        if (able == 0) continue;
        uint4 drawn = noise.four(first);
        uint32_t words[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            if (!(able >> i & 1) || __fadd_rn(values[i], gumbel_bound(words[i])) < best.value) continue;
            best.consider(__fadd_rn(values[i], gumbel(words[i])), first + i);
        }
    }
    return over_block(best, shared).id;
}

__device__ __forceinline__ float penalize(float value, uint16_t count, const Parameters& p) {
    if (count == 0) return value;
    float output = (float)(count & 0x7fff);
    value = value > 0.0f ? __fdiv_rn(value, p.repetition_penalty) : __fmul_rn(value, p.repetition_penalty);
    value = __fsub_rn(value, __fmul_rn(p.frequency_penalty, output));
    return output > 0.0f ? __fsub_rn(value, p.presence_penalty) : value;
}

// Writes what is suppressed and biased into z. Equal ids, which are neighbours, are left to the thread of the first.
__device__ void suppress_and_bias(float* z, uint32_t length, const Slot& slot, bool suppress) {
    const Parameters& p = slot.parameters;
    for (uint32_t i = threadIdx.x; suppress && i < p.suppressed; i += THREADS) {
        if (slot.suppress[i] < length) z[slot.suppress[i]] = -INFINITY;
    }
    __syncthreads();
    uint32_t i = threadIdx.x;
    if (i < p.biases && slot.bias_ids[i] < length && (i == 0 || slot.bias_ids[i - 1] != slot.bias_ids[i])) {
        uint32_t id = slot.bias_ids[i];
        for (; i < p.biases && slot.bias_ids[i] == id; i++) z[id] = __fadd_rn(z[id], slot.bias_values[i]);
    }
    __syncthreads();
}

// The token of a row that is not plainly greedy.
__device__ __noinline__ uint32_t choose(Row raw, float* z, const Slot& slot, bool suppress, uint32_t position,
                           Shared& shared) {
    const Parameters& p = slot.parameters;
    const uint16_t* history = reinterpret_cast<const uint16_t*>(&slot + 1);
    Row row = Row{z, raw.length, raw.aligned}, from = raw;
    if ((suppress && p.suppressed > 0) || p.biases > 0) {
        raw.each<2>([&](uint32_t id, float value) { z[id] = value; });
        __syncthreads();
        suppress_and_bias(z, raw.length, slot, suppress);
        from = row;
    }
    bool warm = !(p.temperature < GREEDY);
    Best top = nothing();
    from.each<2>([&](uint32_t id, float value) {
        if (p.penalized) value = penalize(value, history[id], p);
        if (warm) value = __fdiv_rn(value, p.temperature);
        z[id] = value;
        top.consider(value, id);
    });
    top = over_block(top, shared);
    if (top.id == EVERY) top.id = 0;
    if (!warm || top.value == -INFINITY) return top.id;
    if (p.min_p > 0.0f) {
        row.each<2>([&](uint32_t id, float value) {
            if (!(exp_f32(__fsub_rn(value, top.value)) >= p.min_p)) z[id] = NAN;
        });
        __syncthreads();
    }
    Cut cut = everything();
    if (p.top_k > 0 && p.top_k < row.length) cut = largest_k(row, p.top_k, shared);
    if (p.top_p < 1.0f) cut = top_mass(row, cut, top.value, p.top_p, shared);
    Noise noise = Noise{make_uint2(p.seed_low, p.seed_high), p.choice, position};
    return draw(row, cut, top, noise, shared);
}

// ln of the sum of exp over the whole vocabulary; in `rank`: 1 + how many of the first `eligible` values exceed `value`.
__device__ double normalizer(Row all, uint32_t eligible, float value, uint32_t& rank, Shared& shared) {
    float max = largest(all, shared).value;
    double sum = 0.0;
    uint32_t larger = 0;
    all.each<2>([&](uint32_t id, float other) {
        sum = __dadd_rn(sum, (double)exp_f32(__fsub_rn(other, max)));
        if (id < eligible && other > value) larger++;
    });
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(EVERY, sum, offset);
    larger = __reduce_add_sync(EVERY, larger);
    if (lane == 0) {
        shared.warp_masses[warp][0] = sum;
        shared.warp_counts[warp][0] = larger;
    }
    __syncthreads();
    sum = 0.0;
    rank = 1;
    for (uint32_t w = 0; w < WARPS; w++) {
        sum += shared.warp_masses[w][0];
        rank += shared.warp_counts[w][0];
    }
    __syncthreads();
    return __dadd_rn((double)max, ln(sum));
}

// Logprob and rank of `token` and the `top` largest beside it, of raw logits.
__device__ __noinline__ void report(const float* logits, uint32_t vocab, uint32_t eligible, uint32_t token, uint32_t top,
                       Result& result, Shared& shared) {
    bool aligned = vocab % 4 == 0;
    Row all = Row{logits, vocab, aligned}, row = Row{logits, eligible, aligned};
    uint32_t rank;
    double less = normalizer(all, eligible, logits[token], rank, shared);
    if (threadIdx.x == 0) shared.listed = 0;
    __syncthreads();
    top = min(top, MAX_TOP);
    if (top > 0) {
        Cut cut = top < eligible ? largest_k(row, top, shared) : everything();
        row.each<2>([&](uint32_t id, float value) {
            if (isnan(value) || !cut.keeps(ordered(value), id)) return;
            // In any order: sorted below. There are `top` at most.
            uint32_t place = atomicAdd(&shared.listed, 1u);
            if (place >= MAX_TOP) return;
            shared.listed_values[place] = value;
            shared.listed_ids[place] = id;
        });
        __syncthreads();
    }
    uint32_t listed = min(shared.listed, MAX_TOP), i = threadIdx.x;
    if (i < listed) {
        float value = shared.listed_values[i];
        uint32_t id = shared.listed_ids[i], place = 0, larger = 0;
        for (uint32_t j = 0; j < listed; j++) {
            uint32_t other = ordered(shared.listed_values[j]), own = ordered(value);
            if (other > own || (other == own && shared.listed_ids[j] < id)) place++;
            if (shared.listed_values[j] > value) larger++;
        }
        result.top[place] = Listed{id, (float)__dsub_rn((double)value, less), 1 + larger};
    }
    if (i == 0) {
        result.has_logprobs = 1;
        result.listed = listed;
        result.token = Listed{token, (float)__dsub_rn((double)logits[token], less), rank};
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) sample_rows(
    const uint32_t* counts, const uint32_t* sample_entry, const uint32_t* slot_of, const uint32_t* start,
    const uint32_t* row_count, const float* logits, uint32_t vocab, uint32_t eligible, char* slots,
    uint64_t slot_bytes, float* scratch, uint32_t* last, Result* results) {
    __shared__ Shared shared;
    if (blockIdx.x >= counts[2]) return;
    uint32_t entry = sample_entry[blockIdx.x];
    Slot& slot = *reinterpret_cast<Slot*>(slots + slot_of[entry] * slot_bytes);
    const Parameters& p = slot.parameters;
    Result& result = results[blockIdx.x];
    uint64_t offset = (uint64_t)blockIdx.x * vocab;
    Row raw = Row{logits + offset, eligible, vocab % 4 == 0};
    Best best = largest(raw, shared);
    bool finite = isfinite(best.value);
    if (threadIdx.x == 0) {
        result.id = best.id;
        result.finite = finite;
        result.has_logprobs = 0;
        result.listed = 0;
    }
    if (!finite) return;
    uint32_t position = start[entry] + row_count[entry];
    uint32_t output = position > p.prompt_len ? position - p.prompt_len : 0;
    bool suppress = output < p.min_tokens;
    bool greedy = p.temperature < GREEDY && p.biases == 0 && !p.penalized && !suppress;
    uint32_t id = greedy ? best.id : choose(raw, scratch + offset, slot, suppress, position, shared);
    if (p.logprobs != EVERY) report(raw.values, vocab, eligible, id, p.logprobs, result, shared);
    if (threadIdx.x == 0) {
        result.id = id;
        last[slot_of[entry]] = id;
        uint16_t* history = reinterpret_cast<uint16_t*>(&slot + 1);
        if (p.penalized && (history[id] & 0x7fff) < 0x7fff) history[id]++;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) sample_logprobs(
    const float* logits, uint32_t vocab, uint32_t eligible, const uint32_t* targets, const uint32_t* tops,
    Result* results) {
    __shared__ Shared shared;
    const float* row = logits + (uint64_t)blockIdx.x * vocab;
    uint32_t target = targets[blockIdx.x];
    Result& result = results[blockIdx.x];
    if (threadIdx.x == 0) {
        result.id = target;
        result.finite = isfinite(row[target]);
    }
    report(row, vocab, eligible, target, tops[blockIdx.x], result, shared);
}

extern "C" __global__ void sample_resolve(
    const uint32_t* counts, uint32_t* tokens, const uint32_t* entry_of_row, const uint32_t* slot_of,
    const uint32_t* last) {
    uint32_t row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= counts[0] || tokens[row] != SAMPLED) return;
    tokens[row] = last[slot_of[entry_of_row[row]]];
}
