// Drawing one token per row: the order of operations of kernels/sample_token.py, bit for bit the
// same on every processor.

#pragma once

#include <numeric>

#include "math.h"
#include "threads.h"

namespace quorum {

// Where in a number a control state is, as in kernels/score_grammar.py.
constexpr int64_t NOWHERE = 0, BEGINS = 1, CONTINUES = 2;

// Philox4x32-10: the first word of each (key, counter), as a uniform.
inline void uniforms(const int64_t *keys, const int64_t *index, const int64_t *positions,
                     int64_t rows, int64_t columns, float *uniform, int64_t) {
    for (int64_t i = 0; i < rows * columns; i++) {
        const int64_t row = i / columns;
        const uint64_t sample = index[row], position = positions[i];
        uint32_t k0 = keys[2 * row], k1 = keys[2 * row + 1];
        uint32_t c0 = sample, c1 = sample >> 32, c2 = position, c3 = position >> 32;
        for (int round = 0; round < 10; round++) {
            const uint64_t a = (uint64_t)c0 * 0xD2511F53, b = (uint64_t)c2 * 0xCD9E8D57;
            c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
            c1 = b;
            c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
            c3 = a;
            k0 += 0x9E3779B9;
            k1 += 0xBB67AE85;
        }
        uniform[i] = ((float)(c0 >> 9) + 0.5f) * 0x1p-23f;
    }
}

// The first index whose running sum exceeds the threshold, which is lowered below the last one, and
// what of the threshold is left inside it. Only a row of NaN exceeds the last index.
inline int64_t search(const float *running, int64_t n, float &threshold) {
    threshold = std::min(threshold, std::nextafter(running[n - 1], 0.0f));
    int64_t i = std::upper_bound(running, running + n, threshold) - running;
    i = std::min(i, n - 1);
    threshold -= i ? running[i - 1] : 0;
    return i;
}

inline void running_sums(const float *x, int64_t n, float *running) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) running[i] = (float)(sum += x[i]);
}
// Sums of tiles of `tile` weights, accumulated: (tiles,).
inline void running_tile_sums(const float *weights, int64_t vocab, int64_t tile, float *running) {
    const int64_t tiles = (vocab + tile - 1) / tile;
    for (int64_t j = 0; j < tiles; j++)
        running[j] = row_sum(weights + j * tile, std::min(tile, vocab - j * tile));
    running_sums(running, tiles, running);
}

// Sets to 0 the weights that top-k and top-p remove. Tokens are ranked by their logit, equal ones
// by their index. total: of all weights. x holds no NaN.
inline void keep_likely(const float *x, float *weights, int64_t vocab, int64_t top_k, float top_p,
                        float total) {
    thread_local std::vector<int32_t> ranking;
    thread_local std::vector<float> mass;
    const bool limited = top_k > 0 && top_k < vocab;
    const int64_t limit = limited ? top_k : vocab;
    ranking.resize(vocab);
    mass.resize(vocab);
    std::iota(ranking.begin(), ranking.end(), 0);
    const auto before = [x](int32_t a, int32_t b) {
        return x[a] > x[b] || (x[a] == x[b] && a < b);
    };
    int64_t width = limited ? limit : std::min<int64_t>(limit, 64), count = 0;
    for (int64_t sorted = 0;; width = std::min(limit, 8 * width)) {
        std::partial_sort(ranking.begin() + sorted, ranking.begin() + width, ranking.end(), before);
        sorted = width;
        for (int64_t i = 0; i < width; i++) mass[i] = weights[ranking[i]];
        running_sums(mass.data(), width, mass.data());
        const float goal = top_p * (limited ? mass[width - 1] : total);
        const int64_t enough =
            std::lower_bound(mass.begin(), mass.begin() + width, goal) - mass.begin();
        count = top_p < 1 ? std::min(enough + 1, width) : width;
        if (enough < width || width == limit) break;
    }
    for (int64_t i = 0; i < count; i++) mass[i] = weights[ranking[i]];
    std::fill_n(weights, vocab, 0.0f);
    for (int64_t i = 0; i < count; i++) weights[ranking[i]] = mass[i];
}

template <class T>
void sample_token(const T *logits, int64_t batch, int64_t vocab, const float *uniform,
                  int64_t uniform_stride, float temperature, int64_t top_k, float top_p,
                  float min_p, float softcap, int64_t tile, int64_t *token, float *logprob,
                  float *sampling_logprob, int64_t threads) {
    parallel(batch, 1, threads, [&](int64_t row) {
        thread_local std::vector<float> storage;
        const int64_t tiles = (vocab + tile - 1) / tile;
        float *x = room(storage, 2 * vocab + 2 * tile + tiles), *weights = x + vocab;
        float *running = weights + vocab + tile, *inside = running + tiles;
        const T *from = logits + row * vocab;
        if (softcap > 0) {
            const vec cap = splat(softcap);
            map_row(vocab, x, [cap](vec a) { return tanh(a / cap) * cap; }, from);
        } else {
            widen_row(from, x, vocab);
        }
        float most = -INF;
        bool nan = false;
        for (int64_t i = 0; i < vocab; i++) {
            most = x[i] > most ? x[i] : most;
            nan |= x[i] != x[i];
        }
        if (nan) most = std::numeric_limits<float>::quiet_NaN();
        const bool greedy = temperature == 0;
        int64_t chosen = greedy && !nan ? std::find(x, x + vocab, most) - x : 0;
        const vec top = splat(most);
        map_row(vocab, x, [top](vec a) { return a - top; }, x);
        map_row(vocab, weights, [](vec a) { return exp(a); }, x);
        running_tile_sums(weights, vocab, tile, running);
        const float log_normalizer = log(running[tiles - 1]);
        if (greedy) {
            token[row] = chosen;
            logprob[row] = -log_normalizer;
            sampling_logprob[row] = 0;
            return;
        }
        if (temperature != 1) {
            const vec by = splat(temperature);
            map_row(vocab, weights, [by](vec a) { return exp(a / by); }, x);
        }
        const bool ranked = !nan && ((top_k > 0 && top_k < vocab) || top_p < 1);
        if (temperature != 1 && ranked) running_tile_sums(weights, vocab, tile, running);
        if (ranked) keep_likely(x, weights, vocab, top_k, top_p, running[tiles - 1]);
        if (min_p > 0)
            for (int64_t i = 0; i < vocab; i++) weights[i] = weights[i] < min_p ? 0 : weights[i];
        if (temperature != 1 || ranked || min_p > 0)
            running_tile_sums(weights, vocab, tile, running);
        float threshold = uniform[row * uniform_stride] * running[tiles - 1];
        const float log_total = log(running[tiles - 1]);
        const int64_t in = search(running, tiles, threshold);
        // One tile is searched as it is; of several, the last is filled up with zeros.
        const int64_t n = tiles == 1 ? vocab : tile, first = in * tile;
        std::fill_n(weights + vocab, tile, 0.0f);
        running_sums(weights + first, n, inside);
        chosen = std::min(first + search(inside, n, threshold), vocab - 1);
        token[row] = chosen;
        logprob[row] = x[chosen] - log_normalizer;
        sampling_logprob[row] = x[chosen] / temperature - log_total;
    });
}

// The expected score where a token was drawn: kernels/expected_score.py, edge after edge.
template <class T>
void expected_score(const T *logits, int64_t batch, int64_t vocab, const int64_t *token,
                    const float *logprob, const int64_t *control, const int64_t *value,
                    const int64_t *place, const int64_t *prefixes, const int64_t *edge_token,
                    const int64_t *edge_value, const bool *open, int64_t edges, int64_t low,
                    int64_t high, float softcap, int64_t first, int64_t minus, float *expected,
                    int64_t) {
    for (int64_t row = 0; row < batch; row++) {
        expected[row] = std::numeric_limits<float>::quiet_NaN();
        const int64_t at = place[control[row]];
        if (at == NOWHERE) continue;
        const int64_t prefix = at == BEGINS ? first : at == CONTINUES ? value[row] : minus;
        const auto logit = [&](int64_t i) {
            const float x = widen(logits[row * vocab + i]);
            return softcap > 0 ? tanh(splat(x / softcap))[0] * softcap : x;
        };
        const float shift = logit(token[row]) - logprob[row];
        float every = 0, closed = 0, total = 0;
        bool any = false, known = false, pending = false;
        for (int64_t i = 0; i < edges; i++) {
            if (prefixes[i] != prefix) continue;
            any = true;
            const float chance = exp(splat(logit(edge_token[i]) - shift))[0];
            every += chance;
            if (!open[i]) {
                closed += chance;
                total = std::fma(chance, (float)edge_value[i], total);
            }
            if (edge_token[i] == token[row]) (open[i] ? pending : known) = true;
        }
        if (any && at == CONTINUES && low <= prefix && prefix <= high) {
            const float rest = std::max(1 - every, 0.0f);
            known = true;
            closed += rest;
            total = std::fma(rest, (float)prefix, total);
        }
        if (known && !pending) expected[row] = total / closed;
    }
}

}  // namespace quorum
