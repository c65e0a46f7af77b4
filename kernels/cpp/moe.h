// Experts of a mixture: which of them a token goes to, and what they make of it. The definitions are
// kernels/route.py and kernels/moe.py.

#pragma once

#include "interface.h"
#include "linear.h"

namespace quorum {

#define QUORUM_ROUTING(F)                                                                          \
    F(int64_t, per_token) F(int64_t, normalise) F(float, scale) F(int64_t, groups)                 \
    F(int64_t, groups_kept)
QUORUM_STRUCT(Routing, QUORUM_ROUTING);

// Of one layer: the router, and all experts' weights, one after another; all packed.
#define QUORUM_EXPERTS(F)                                                                          \
    F(const void *, gate) F(const void *, gate_up) F(const void *, down) F(int64_t, count)         \
    F(int64_t, intermediate) F(const Routing *, routing)
QUORUM_STRUCT(Experts, QUORUM_EXPERTS);

// The largest of n numbers that have not been taken, and of equal ones the first; it is taken.
inline int64_t take_largest(const float *x, int64_t n, char *taken) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; i++)
        if (!taken[i] && (best < 0 || x[i] > x[best])) best = i;
    taken[best] = 1;
    return best;
}

// The experts of one token, and their weights, from its logits.
inline void route_row(const float *logits, int64_t count, const Routing &r, int64_t *experts,
                      float *weights) {
    thread_local std::vector<float> storage;
    thread_local std::vector<char> marks;
    float *order = room(storage, 2 * count + r.groups), *p = order + count, *best = p + count;
    char *taken = room(marks, count);
    const auto begin = [&](int64_t n) { std::fill_n(taken, n, 0); };
    for (int64_t e = 0; e < count; e++) order[e] = logits[e] == logits[e] ? logits[e] : -INF;
    const vec largest = splat(*std::max_element(order, order + count));
    map_row(count, p, [&](vec l) { return exp(l - largest); }, logits);
    const float total = row_sum(p, count);
    if (r.groups > 1) {
        const int64_t size = count / r.groups;
        for (int64_t g = 0; g < r.groups; g++)
            best[g] = *std::max_element(order + g * size, order + (g + 1) * size);
        begin(r.groups);
        for (int64_t i = 0; i < r.groups_kept; i++) take_largest(best, r.groups, taken);
        for (int64_t e = 0; e < count; e++)
            if (!taken[e / size]) order[e] = -INF;
    }
    begin(count);
    float sum = 0;
    for (int64_t k = 0; k < r.per_token; k++) {
        experts[k] = take_largest(order, count, taken);
        weights[k] = p[experts[k]] / total;
        sum += weights[k];
    }
    for (int64_t k = 0; k < r.per_token; k++)
        weights[k] = (r.normalise ? weights[k] / sum : weights[k]) * r.scale;
}

// x: (tokens, hidden); gate: packed (count, hidden); experts, weights: (tokens, per_token).
template <class T, class W>
void route(const T *x, int64_t tokens, int64_t hidden, const W *gate, int64_t count,
           const Routing *routing, int64_t *experts, float *weights, int64_t threads) {
    thread_local RowTiles<W> row_tiles;
    thread_local std::vector<float> storage;
    float *logits = room(storage, tokens * count);
    row_tiles.resize(tokens, hidden);
    row_tiles.fill([&](int64_t t) { return x + t * hidden; }, threads);
    linear<W, T>(row_tiles, gate, count, nullptr, logits, threads);
    const int64_t k = routing->per_token;
    parallel(tokens, 16, threads, [&](int64_t t) {
        route_row(logits + t * count, count, *routing, experts + t * k, weights + t * k);
    });
}

constexpr int64_t MAX_PAIRS = 1 << 12;  // past so many no further expert is laid out beside others

// x, out: (tokens, hidden); experts, weights: (tokens, per_token). gate_up, down: packed, of `count`
// experts that are `width` wide. Pairs of a token and an expert are sorted by expert.
template <class T, class W>
void moe(const T *x, int64_t tokens, int64_t hidden, const W *gate_up, const W *down, int64_t count,
         int64_t width, const int64_t *experts, const float *weights, int64_t per_token,
         int64_t gelu, T *out, int64_t threads) {
    thread_local std::vector<int64_t> indices;
    thread_local std::vector<T> scratch;
    const int64_t pairs = tokens * per_token;
    int64_t *end = room(indices, 2 * count + 2 * pairs), *used = end + count;
    int64_t *order = used + count, *place = order + pairs;
    T *outputs = room(scratch, pairs * (hidden + width)), *active = outputs + pairs * hidden;
    std::fill_n(end, count, 0);
    for (int64_t p = 0; p < pairs; p++) end[experts[p]]++;
    const int64_t num_used = std::count_if(end, end + count, [](int64_t n) { return n > 0; });
    for (int64_t e = 0, u = 0; e < count; e++)
        if (end[e]) used[u++] = e;
    for (int64_t e = 0, before = 0; e < count; e++) std::swap(before, end[e]), before += end[e];
    for (int64_t p = 0; p < pairs; p++) order[place[p] = end[experts[p]]++] = p;

    const int64_t gate_up_size = packed_size(width, hidden, true);
    const int64_t down_size = packed_size(hidden, width);
    const auto first_of = [&](int64_t e) { return e ? end[e - 1] : 0; };
    // Several experts at once, but not all of a prefill: what is laid out for them is bounded.
    for (int64_t start = 0, stop = 0; start < num_used; start = stop) {
        int64_t rows = 0;
        while (stop < num_used && (stop == start || rows < MAX_PAIRS))
            rows += end[used[stop]] - first_of(used[stop]), stop++;
        const int64_t *here = used + start;
        linear_many<T, W>(
            stop - start, hidden, width,
            [&](int64_t b) {
                const int64_t e = here[b], first = first_of(e);
                return Product<T, W>{end[e] - first, gate_up + e * gate_up_size,
                                  active + first * width, width};
            },
            [&](int64_t b, int64_t i) {
                return x + order[first_of(here[b]) + i] / per_token * hidden;
            },
            threads, gelu ? GELU : SILU);
        linear_many<T, W>(
            stop - start, width, hidden,
            [&](int64_t b) {
                const int64_t e = here[b], first = first_of(e);
                return Product<T, W>{end[e] - first, down + e * down_size, outputs + first * hidden,
                                  hidden};
            },
            [&](int64_t b, int64_t i) { return active + (first_of(here[b]) + i) * width; },
            threads);
    }
    parallel(tokens, std::max<int64_t>(1, 4096 / hidden), threads, [&](int64_t t) {
        thread_local std::vector<float> storage;
        float *sum = room(storage, hidden);
        for (int64_t p = t * per_token; p < (t + 1) * per_token; p++) {
            const T *y = outputs + place[p] * hidden;
            const vec weight = splat(weights[p]);
            if (p % per_token)
                map_row(hidden, sum, [&](vec a, vec s) { return fma(weight, a, s); }, y, sum);
            else map_row(hidden, sum, [&](vec a) { return weight * a; }, y);
        }
        narrow_row(sum, out + t * hidden, hidden);
    });
}

// What a layer's experts make of the rows x (tokens, hidden).
template <class W, class T>
void mix_experts(const Experts &e, const T *x, int64_t tokens, int64_t hidden, int64_t gelu, T *out,
                 int64_t threads) {
    thread_local std::vector<int64_t> experts;
    thread_local std::vector<float> weights;
    const int64_t k = e.routing->per_token;
    int64_t *chosen = room(experts, tokens * k);
    float *shares = room(weights, tokens * k);
    route(x, tokens, hidden, (const W *)e.gate, e.count, e.routing, chosen, shares, threads);
    moe(x, tokens, hidden, (const W *)e.gate_up, (const W *)e.down, e.count, e.intermediate, chosen,
        shares, k, gelu, out, threads);
}

}  // namespace quorum
