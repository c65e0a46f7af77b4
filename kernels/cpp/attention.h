// Forest attention: partial results of queries over runs of keys, and their merge.
//
// A task is a work tile (or a split of a suffix) and a key/value head. Scores add channels
// in index order and outputs add keys in index order, with fused multiply-adds; the sum of a row's
// weights runs over 16 lanes by key. So a partial depends on its query and its keys alone.
// Two forms give the same bits: for a few query rows the lanes are keys, for more they are rows.

#pragma once

#include "elementwise.h"
#include "interface.h"

namespace quorum {

// q (T, heads, dim), k (kv_heads, N, dim), v (kv_heads, N, v_dim) with their strides; softcap,
// window 0: none; o, lse: partials (P, heads, v_dim), (P, heads).
#define QUORUM_ATTENTION(F)                                                                        \
    F(const void *, q_data) F(const void *, k_data) F(const void *, v_data) F(int64_t, q_t)        \
    F(int64_t, q_h) F(int64_t, k_h) F(int64_t, k_n) F(int64_t, v_h) F(int64_t, v_n)                \
    F(int64_t, heads) F(int64_t, kv_heads) F(int64_t, dim) F(int64_t, v_dim)                       \
    F(const int64_t *, positions) F(float, scale) F(float, softcap) F(int64_t, window)             \
    F(float *, o) F(float *, lse)
QUORUM_STRUCT(AttentionArguments, QUORUM_ATTENTION);

template <class T>
struct Attention : AttentionArguments {
    const T *q, *k, *v;
    bool dots;  // scores of many query rows are added up in pairs of channels

    explicit Attention(const AttentionArguments &a, bool dots = false)
        : AttentionArguments(a),
          q((const T *)a.q_data),
          k((const T *)a.k_data),
          v((const T *)a.v_data),
          dots(dots && dim % 2 == 0) {}
};

// As `kernels/forest_attention/plan.py` has it: queries, keys, the position of the first key, and
// the partial of the first query.
struct Tile {
    int64_t query, num_queries, key, num_keys, position, partial;
};

// Every query's own keys, as in kernels/forest_attention/plan.py: blocks (num_queries, stride),
// length and position (num_queries,).
#define QUORUM_SUFFIXES(F)                                                                         \
    F(const int64_t *, blocks) F(const int64_t *, length) F(const int64_t *, position)             \
    F(int64_t, num_queries) F(int64_t, stride) F(int64_t, max_split) F(int64_t, num_splits)
QUORUM_STRUCT(Suffixes, QUORUM_SUFFIXES);

inline int64_t whole_vectors(int64_t channels) { return (channels + LANES - 1) / LANES * LANES; }

// -- products ------------------------------------------------------------------------------------

// Keeps the scores (K, V * LANES) of a tile, and the largest so far of each row.
template <int V, int K>
inline void keep_scores(const vec (&sum)[K][V], float *scores, float *row_max) {
    for (int v = 0; v < V; v++) {
        vec most = load(row_max + v * LANES);
        for (int k = 0; k < K; k++) {
            store(scores + (k * V + v) * LANES, sum[k][v]);
            most = select(sum[k][v] > most, sum[k][v], most);
        }
        store(row_max + v * LANES, most);
    }
}

// Scores of K keys under V vectors of query rows.
template <int V, int K>
[[gnu::noinline]] void scores_tile(const float *q, const float *keys, int64_t stride, int64_t dim,
                                   float *scores, float *row_max) {
    vec sum[K][V];
    for (int k = 0; k < K; k++)
        for (int v = 0; v < V; v++) sum[k][v] = vec{};
#pragma GCC unroll 4
    for (int64_t d = 0; d < dim; d++) {
        vec row[V];
        for (int v = 0; v < V; v++) row[v] = load(q + (d * V + v) * LANES);
        for (int k = 0; k < K; k++) {
            const vec key = splat(keys[k * stride + d]);
            for (int v = 0; v < V; v++) sum[k][v] = fma(row[v], key, sum[k][v]);
        }
    }
    keep_scores(sum, scores, row_max);
}
#ifdef QUORUM_DOTS
// The same with pairs of channels: the rows are not yet scaled.
template <int V, int K>
[[gnu::noinline]] QUORUM_DOTS void scores_tile(const float *q, const bf16 *keys, int64_t stride,
                                               int64_t dim, float *scores, float *row_max,
                                               float scale) {
    vec sum[K][V];
    for (int k = 0; k < K; k++)
        for (int v = 0; v < V; v++) sum[k][v] = vec{};
#pragma GCC unroll 4
    for (int64_t d = 0; d < dim; d += 2) {
        vec row[V];
        for (int v = 0; v < V; v++) row[v] = load(q + (d / 2 * V + v) * LANES);
        for (int k = 0; k < K; k++) {
            const vec key = splat(read<float>(keys + k * stride + d));
            for (int v = 0; v < V; v++) sum[k][v] = add_dots(sum[k][v], row[v], key);
        }
    }
    for (int k = 0; k < K; k++)
        for (int v = 0; v < V; v++) sum[k][v] *= splat(scale);
    keep_scores(sum, scores, row_max);
}
#endif

// scale: nothing for rows that are scaled.
template <int V, class T, class... S>
void scores_of(const float *q, const T *keys, int64_t stride, int64_t n, int64_t dim,
               float *scores, float *row_max, S... scale) {
    constexpr int K = std::min(SCORE_TILE / V, 12);
    int64_t j = 0;
    for (; j + K <= n; j += K)
        scores_tile<V, K>(q, keys + j * stride, stride, dim, scores + j * V * LANES, row_max,
                          scale...);
    for (; j < n; j++)
        scores_tile<V, 1>(q, keys + j * stride, stride, dim, scores + j * V * LANES, row_max,
                          scale...);
}

template <class T, class... S>
void scores_of(int64_t vectors, const float *q, const T *keys, int64_t stride, int64_t n,
               int64_t dim, float *scores, float *row_max, S... scale) {
    switch (vectors) {
        case 1: scores_of<1>(q, keys, stride, n, dim, scores, row_max, scale...); break;
        case 2: scores_of<2>(q, keys, stride, n, dim, scores, row_max, scale...); break;
        case 3: scores_of<3>(q, keys, stride, n, dim, scores, row_max, scale...); break;
        default:
            if constexpr (MAX_VECTORS > 3) {
                if (vectors == 4) scores_of<4>(q, keys, stride, n, dim, scores, row_max, scale...);
                else scores_of<6>(q, keys, stride, n, dim, scores, row_max, scale...);
            }
    }
}

// Adds n weighted values to V vectors of channels of R rows, or to 0 if `first`: weights (n, rows)
// or, `by_row`, (R, rows); values (n, stride).
template <int R, int V, bool by_row, class T>
[[gnu::noinline]] void values_tile(const float *weights, int64_t rows, const T *values,
                                   int64_t stride, int64_t n, float *out, int64_t out_stride,
                                   bool first) {
    vec sum[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++)
            sum[r][v] = first ? vec{} : load(out + r * out_stride + v * LANES);
#pragma GCC unroll 4
    for (int64_t j = 0; j < n; j++) {
        vec value[V];
        for (int v = 0; v < V; v++) value[v] = load(values + j * stride + v * LANES);
        for (int r = 0; r < R; r++) {
            const vec weight = splat(by_row ? weights[r * rows + j] : weights[j * rows + r]);
            for (int v = 0; v < V; v++) sum[r][v] = fma(weight, value[v], sum[r][v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(out + r * out_stride + v * LANES, sum[r][v]);
}

#ifdef QUORUM_DOTS
// The same over n pairs of keys: weights (n, rows) or (R, rows) and values (n, stride) of two
// bfloat16 each.
template <int R, int V, bool by_row>
[[gnu::noinline]] QUORUM_DOTS void values_tile(const float *weights, int64_t rows,
                                               const bf16_pair *values, int64_t stride, int64_t n,
                                               float *out, int64_t out_stride, bool first) {
    vec sum[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++)
            sum[r][v] = first ? vec{} : load(out + r * out_stride + v * LANES);
#pragma GCC unroll 4
    for (int64_t j = 0; j < n; j++) {
        vec value[V];
        for (int v = 0; v < V; v++) value[v] = read<vec>(values + j * stride + 2 * v * LANES);
        for (int r = 0; r < R; r++) {
            const vec weight = splat(by_row ? weights[r * rows + j] : weights[j * rows + r]);
            for (int v = 0; v < V; v++) sum[r][v] = add_dots(sum[r][v], weight, value[v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(out + r * out_stride + v * LANES, sum[r][v]);
}

// Numbers of two vectors side by side as bfloat16, those of `a` first.
inline vec pair_up(vec a, vec b) {
    const auto rounded = [](vec x) {
        const ivec bits = (ivec)x;
        return bits + 0x7FFF + ((bits >> 16) & 1);
    };
    return (vec)((ivec)((uvec)rounded(a) >> 16) | (rounded(b) & (int32_t)0xFFFF0000));
}

// Pairs of n rows of values, `width` wide: what lies past the last row and past `dim` is 0.
inline const bf16_pair *pairs_of(const bf16 *x, int64_t stride, int64_t n, int64_t dim,
                                 int64_t width, std::vector<bf16_pair> &to) {
    bf16_pair *pairs = room(to, (n + 1) / 2 * 2 * width);
    for (int64_t j = 0; j < n; j += 2) {
        float *row = (float *)(pairs + j * width);
        const bf16 *one = x + j * stride, *other = one + stride;
        for (int64_t c = 0; c < width; c += LANES) {
            const int64_t here = std::clamp<int64_t>(dim - c, 0, LANES);
            const auto from = [&](const bf16 *y) {
                return here == LANES ? load(y + c) : load_first(y + c, here);
            };
            store(row + c, pair_up(from(one), j + 1 < n ? from(other) : vec{}));
        }
    }
    return pairs;
}
#endif

// The same for all `width` channels, a multiple of LANES, of R rows.
template <int R, bool by_row, class T>
void add_values(const float *weights, int64_t rows, const T *values, int64_t stride, int64_t n,
                float *out, int64_t width, bool first) {
    int64_t c = 0;
    const auto add = [&](auto vectors) {
        constexpr int V = decltype(vectors)::value;
        for (; c + V * LANES <= width; c += V * LANES)
            values_tile<R, V, by_row>(weights, rows, values + c * STEP_TERMS<T>, stride, n, out + c,
                                      width, first);
    };
    if constexpr (VALUE_VECTORS > 2) add(std::integral_constant<int, VALUE_VECTORS>{});
    add(std::integral_constant<int, 2>{});
    add(std::integral_constant<int, 1>{});
}

// A block of keys or values as float32, rows `width` apart; what lies past `dim` is 0.
template <class T>
inline const float *block_of(const T *x, int64_t &stride, int64_t n, int64_t dim, int64_t width,
                             std::vector<float> &to) {
    if constexpr (std::is_same_v<T, float>)
        if (width == dim) return x;
    float *block = room(to, n * width);
    for (int64_t j = 0; j < n; j++) {
        widen_row(x + j * stride, block + j * width, dim);
        std::fill(block + j * width + dim, block + (j + 1) * width, 0.0f);
    }
    stride = width;
    return block;
}

inline vec soft_cap(vec score, float softcap) {
    return tanh(score / splat(softcap)) * splat(softcap);
}
inline void soft_cap_row(float *scores, int64_t n, float softcap) {
    map_row(n, scores, [&](vec s) { return soft_cap(s, softcap); }, scores);
}

// Writes sums / row_sum and the log-sum-exp of a partial and head; a row without a key gives 0.
template <class T>
inline void write_partial(const Attention<T> &a, int64_t index, const float *sums, float row_max,
                          float row_sum) {
    const vec by = splat(row_sum > 0 ? row_sum : 1);
    map_row(a.v_dim, a.o + index * a.v_dim, [&](vec s) { return s / by; }, sums);
    a.lse[index] = row_max + log(row_sum);
}

// Keys and values that are used next: they come from memory while others are in use.
struct NextKeys {
    const char *k = nullptr, *v = nullptr;
    int64_t k_bytes = 0, v_bytes = 0;

    template <class T>
    static NextKeys of(const Attention<T> &a, int64_t head, int64_t key, int64_t num_keys) {
        return {(const char *)(a.k + head * a.k_h + key * a.k_n),
                (const char *)(a.v + head * a.v_h + key * a.v_n),
                num_keys * a.k_n * (int64_t)sizeof(T), num_keys * a.v_n * (int64_t)sizeof(T)};
    }
};
// Fetches a part of `bytes` bytes, the whole of them in `parts` parts; into the second cache, since
// the first holds what is in use.
inline void fetch(const char *from, int64_t bytes, int64_t part, int64_t parts) {
    const int64_t step = (bytes / parts + 64) / 64 * 64;
    for (int64_t i = part * step; i < std::min(bytes, (part + 1) * step); i += 64)
        __builtin_prefetch(from + i, 0, 2);
}

// Keys [low, high) of a tile's that a query at `position` sees.
template <class T>
inline void visible_keys(const Attention<T> &a, const Tile &tile, int64_t position, int32_t &low,
                         int32_t &high) {
    const int64_t own = position - tile.position;  // its own place among the keys
    high = (int32_t)std::clamp<int64_t>(own + 1, 0, tile.num_keys);
    low = a.window ? (int32_t)std::clamp<int64_t>(own - a.window + 1, 0, tile.num_keys) : 0;
}

// -- a few query rows: lanes are keys -------------------------------------------------------------

constexpr int FEW_ROWS = 8;

// sum[r] += the products of R query rows and LANES keys over channels [d, d + LANES).
template <int R, class T>
inline void add_lanes(const float *q, const T *keys, int64_t stride, int64_t d, int64_t dim,
                      vec (&sum)[R]) {
    vec key[LANES];
    for (int i = 0; i < LANES; i++) key[i] = load(keys + i * stride + d);
    transpose(key);
    for (int i = 0; i < LANES; i++)
        for (int r = 0; r < R; r++) sum[r] = fma(splat(q[r * dim + d + i]), key[i], sum[r]);
}
// The same, over as many channels as are taken at once; returns how many.
template <int R>
inline int64_t add_channels(const float *q, const float *keys, int64_t stride, int64_t d,
                            int64_t dim, vec (&sum)[R]) {
    add_lanes<R>(q, keys, stride, d, dim, sum);
    return LANES;
}
template <int R>
inline int64_t add_channels(const float *q, const bf16 *keys, int64_t stride, int64_t d,
                            int64_t dim, vec (&sum)[R]) {
    if (d + 2 * LANES > dim) {
        add_lanes<R>(q, keys, stride, d, dim, sum);
        return LANES;
    }
    // Pairs of channels are transposed as 32-bit words, then taken apart.
    vec pair[LANES];
    for (int i = 0; i < LANES; i++) pair[i] = read<vec>(keys + i * stride + d);
    transpose(pair);
    for (int i = 0; i < LANES; i++) {
        const ivec both = (ivec)pair[i];
        const vec even = (vec)(both << 16), odd = (vec)(both & (int32_t)0xFFFF0000);
        const float *from = q + d + 2 * i;
        for (int r = 0; r < R; r++) sum[r] = fma(splat(from[r * dim]), even, sum[r]);
        for (int r = 0; r < R; r++) sum[r] = fma(splat(from[r * dim + 1]), odd, sum[r]);
    }
    return 2 * LANES;
}

// Keys j to j + LANES of n, or where there are not so many a copy: nothing is read past the last.
template <class T>
inline const T *block_of_lanes(const T *keys, int64_t stride, int64_t j, int64_t n, int64_t dim) {
    thread_local std::vector<T> tail;
    const T *block = keys + j * stride;
    if (j + LANES <= n) return block;
    T *rows = room(tail, LANES * stride);
    std::copy_n(block, (n - j - 1) * stride + dim, rows);
    return rows;
}

// Scores (R, stride) of n keys under R query rows (R, dim); past them anything.
template <int R, class T>
[[gnu::noinline]] void few_scores(const float *q, const T *keys, int64_t k_stride, int64_t n,
                                  int64_t dim, float *scores, int64_t stride,
                                  const NextKeys &next) {
    const int64_t parts = (n + LANES - 1) / LANES;
    for (int64_t j = 0; j < n; j += LANES) {
        fetch(next.k, next.k_bytes, j / LANES, parts);
        const T *block = block_of_lanes(keys, k_stride, j, n, dim);
        vec sum[R];
        for (int r = 0; r < R; r++) sum[r] = vec{};
        for (int64_t d = 0; d < dim;) d += add_channels<R>(q, block, k_stride, d, dim, sum);
        for (int r = 0; r < R; r++) store(scores + r * stride + j, sum[r]);
    }
}

#ifdef QUORUM_DOTS
// The same with pairs of channels: q is (R, dim / 2) of them, and not yet scaled.
template <int R>
[[gnu::noinline]] QUORUM_DOTS void few_scores(const float *q, const bf16 *keys, int64_t k_stride,
                                              int64_t n, int64_t dim, float scale, float *scores,
                                              int64_t stride, const NextKeys &next) {
    const int64_t parts = (n + LANES - 1) / LANES, pairs = dim / 2;
    for (int64_t j = 0; j < n; j += LANES) {
        fetch(next.k, next.k_bytes, j / LANES, parts);
        const bf16 *block = block_of_lanes(keys, k_stride, j, n, dim);
        vec sum[R];
        for (int r = 0; r < R; r++) sum[r] = vec{};
        for (int64_t d = 0; d < pairs; d += LANES) {
            const int64_t here = std::min<int64_t>(LANES, pairs - d);
            vec key[LANES];
            for (int i = 0; i < LANES; i++) {
                const bf16 *from = block + i * k_stride + 2 * d;
                key[i] = here == LANES ? read<vec>(from) : load_first((const float *)from, here);
            }
            transpose(key);
            for (int64_t i = 0; i < here; i++)
                for (int r = 0; r < R; r++)
                    sum[r] = add_dots(sum[r], splat(q[r * pairs + d + i]), key[i]);
        }
        for (int r = 0; r < R; r++) store(scores + r * stride + j, sum[r] * splat(scale));
    }
}
#endif

// Turns the scores (R, stride) into weights, 0 outside keys [low, high) of a row; also the largest
// score and the sum of the weights of each row. stride is a multiple of 16.
template <int R>
void few_weights(float *scores, int64_t stride, float softcap, const int32_t *low,
                 const int32_t *high, float *row_max, float *row_sum) {
    for (int r = 0; r < R; r++) {
        float *row = scores + r * stride;
        vec most = splat(-INF);
        for (int64_t j = 0; j < stride; j += LANES) {
            vec s = load(row + j);
            if (softcap > 0) s = soft_cap(s, softcap);
            const ivec key = LANE + (int32_t)j;
            s = select((key >= low[r]) & (key < high[r]), s, splat(-INF));
            store(row + j, s);
            most = select(s > most, s, most);
        }
        float largest = -INF;
        for (int lane = 0; lane < LANES; lane++) largest = std::max(largest, most[lane]);
        row_max[r] = largest == -INF ? 0 : largest;
        LaneSums sums;
        for (int64_t j = 0; j < stride; j += LANES) {
            const vec weight = exp(load(row + j) - splat(row_max[r]));
            store(row + j, weight);
            sums.add(j, weight);
        }
        row_sum[r] = sums.total();
    }
}

// As `attend`, of R query rows in all.
template <int R, class T>
void attend_few(const Attention<T> &a, int64_t head, const Tile &tile, const NextKeys &next) {
    thread_local std::vector<float> values_storage, storage;
    const int64_t groups = a.heads / a.kv_heads, num_keys = tile.num_keys;
    const int64_t width = whole_vectors(a.v_dim);
    const int64_t stride = (num_keys + 15) / 16 * 16;
    float *scores = room(storage, R * (stride + a.dim + width));
    float *q = scores + R * stride, *sums = q + R * a.dim;
    int32_t low[R], high[R];
    int64_t index[R];
    for (int64_t r = 0, t = tile.query, g = 0; r < R; r++) {
        const T *from = a.q + t * a.q_t + (head * groups + g) * a.q_h;
        if (a.dots) std::memcpy(q + r * a.dim / 2, from, a.dim * sizeof(T));
        else map_row(a.dim, q + r * a.dim, [&](vec x) { return x * splat(a.scale); }, from);
        visible_keys(a, tile, a.positions[t], low[r], high[r]);
        index[r] = (tile.partial + t - tile.query) * a.heads + head * groups + g;
        if (++g == groups) t++, g = 0;
    }
    const T *keys = a.k + head * a.k_h + tile.key * a.k_n;
#ifdef QUORUM_DOTS
    if constexpr (std::is_same_v<T, bf16>)
        if (a.dots)
            few_scores<R>(q, keys, a.k_n, num_keys, a.dim, a.scale, scores, stride, next);
#endif
    if (!a.dots) few_scores<R>(q, keys, a.k_n, num_keys, a.dim, scores, stride, next);
    float row_max[R], row_sum[R];
    few_weights<R>(scores, stride, a.softcap, low, high, row_max, row_sum);

    // Values of 32 keys at a time, in steps of `step` keys.
    const auto add_all = [&](const auto *values, int64_t v_stride, int64_t step) {
        constexpr int FIRST = R <= 6 ? R : 4;
        for (int64_t j = 0; j < num_keys; j += 32) {
            const int64_t here = (std::min<int64_t>(32, num_keys - j) + step - 1) / step;
            const float *weights = scores + j / step;
            const auto *from = values + j / step * v_stride;
            fetch(next.v, next.v_bytes, j / 32, (num_keys + 31) / 32);
            add_values<FIRST, true>(weights, stride, from, v_stride, here, sums, width, j == 0);
            if constexpr (R > FIRST)
                add_values<R - FIRST, true>(weights + FIRST * stride, stride, from, v_stride, here,
                                            sums + FIRST * width, width, j == 0);
        }
    };
    const T *values = a.v + head * a.v_h + tile.key * a.v_n;
    int64_t v_stride = a.v_n;
    if (a.dots) {
#ifdef QUORUM_DOTS
        if constexpr (std::is_same_v<T, bf16>) {
            thread_local std::vector<bf16_pair> pairs_storage;
            for (int r = 0; r < R; r++) {
                float *row = scores + r * stride;  // its weights become bfloat16 where they lie
                for (int64_t j = 0; j < stride; j += LANES) store((bf16 *)row + j, load(row + j));
            }
            add_all(pairs_of(values, v_stride, num_keys, a.v_dim, width, pairs_storage), 2 * width,
                    2);
        }
#endif
    } else if (width == a.v_dim) {
        add_all(values, v_stride, 1);
    } else {
        const float *block = block_of(values, v_stride, num_keys, a.v_dim, width, values_storage);
        add_all(block, v_stride, 1);
    }
    for (int r = 0; r < R; r++)
        write_partial(a, index[r], sums + r * width, row_max[r], row_sum[r]);
}

template <int R, class T>
void attend_few_rows(int64_t rows, const Attention<T> &a, int64_t head, const Tile &tile,
                     const NextKeys &next) {
    if constexpr (R > 0) {
        if (rows == R) return attend_few<R>(a, head, tile, next);
        attend_few_rows<R - 1>(rows, a, head, tile, next);
    }
}

// -- more query rows: lanes are rows --------------------------------------------------------------

// Query rows of a head, [first, first + n) of a tile's, laid out as (dim, rows): vectors of rows.
struct QueryRows {
    int64_t first, n, vectors, rows;
    float *q;
    int64_t earliest, latest;  // position
};

template <class T>
QueryRows lay_out_queries(const Attention<T> &a, int64_t head, const Tile &tile, int64_t first) {
    thread_local std::vector<float> storage;
    const int64_t groups = a.heads / a.kv_heads;
    const int64_t n = std::min<int64_t>(tile.num_queries * groups - first, MAX_VECTORS * LANES);
    int64_t vectors = (n + LANES - 1) / LANES;
    if (vectors == 5) vectors = 6;
    const int64_t rows = vectors * LANES;
    float *q = room(storage, a.dim * rows);
    const T *q_rows[MAX_VECTORS * LANES];
    int64_t t = tile.query + first / groups, g = first % groups;
    QueryRows query_rows = {first, n, vectors, rows, q, a.positions[t], a.positions[t]};
    for (int64_t r = 0; r < n; r++) {
        q_rows[r] = a.q + t * a.q_t + (head * groups + g) * a.q_h;
        query_rows.earliest = std::min(query_rows.earliest, a.positions[t]);
        query_rows.latest = std::max(query_rows.latest, a.positions[t]);
        if (++g == groups) t++, g = 0;
    }
    if (n < rows) std::fill_n(q, a.dim * rows, 0.0f);
    for (int64_t v = 0; v < n; v += LANES) {
        const int64_t here = std::min<int64_t>(n - v, LANES);
        if (a.dots)  // pairs of channels, each moved as a float
            lay_out([&](int64_t r) { return (const float *)q_rows[v + r]; }, here, a.dim / 2, q + v,
                    rows);
        else lay_out([&](int64_t r) { return q_rows[v + r]; }, here, a.dim, q + v, rows);
    }
    if (!a.dots) map_row(a.dim * rows, q, [&](vec x) { return x * splat(a.scale); }, q);
    return query_rows;
}

// Partials of query rows, laid out as above, over a tile's keys.
template <class T>
void attend_rows(const Attention<T> &a, int64_t head, const Tile &tile,
                 const QueryRows &query_rows) {
    thread_local std::vector<float> keys_buffer, values_buffer, scores_buffer, out_buffer;
    const int64_t groups = a.heads / a.kv_heads, width = whole_vectors(a.v_dim);
    const int64_t num_keys = tile.num_keys, n = query_rows.n, rows = query_rows.rows,
                  vectors = query_rows.vectors;
    int64_t k_stride = a.k_n, v_stride = a.v_n;
    const T *tile_keys = a.k + head * a.k_h + tile.key * a.k_n;
    const T *tile_values = a.v + head * a.v_h + tile.key * a.v_n;
    float *scores = room(scores_buffer, num_keys * rows), *out = room(out_buffer, rows * width);

    int32_t low[MAX_VECTORS * LANES], high[MAX_VECTORS * LANES];
    const int64_t last = tile.position + num_keys - 1;
    const bool masked =
        query_rows.earliest < last || (a.window && query_rows.latest - tile.position >= a.window);
    if (masked) {
        std::fill_n(low, rows, 0);
        std::fill_n(high, rows, 0);
        int64_t t = tile.query + query_rows.first / groups, g = query_rows.first % groups;
        for (int64_t r = 0; r < n; r++) {
            visible_keys(a, tile, a.positions[t], low[r], high[r]);
            if (++g == groups) t++, g = 0;
        }
    }
    float row_max[MAX_VECTORS * LANES];
    std::fill_n(row_max, rows, -INF);
    if (a.dots) {
#ifdef QUORUM_DOTS
        if constexpr (std::is_same_v<T, bf16>)
            scores_of(vectors, query_rows.q, tile_keys, k_stride, num_keys, a.dim, scores, row_max,
                      a.scale);
#endif
    } else {
        const float *keys = block_of(tile_keys, k_stride, num_keys, a.dim, a.dim, keys_buffer);
        scores_of(vectors, query_rows.q, keys, k_stride, num_keys, a.dim, scores, row_max);
    }
    if (masked || a.softcap > 0) {
        for (int64_t v = 0; v < rows; v += LANES) {
            const ivec from = masked ? read<ivec>(low + v) : ivec{};
            const ivec to = masked ? read<ivec>(high + v) : ivec{} + (int32_t)num_keys;
            vec most = splat(-INF);
            for (int64_t j = 0; j < num_keys; j++) {
                float *at = scores + j * rows + v;
                vec s = load(at);
                if (a.softcap > 0) s = soft_cap(s, a.softcap);
                const ivec key = ivec{} + (int32_t)j;
                s = select((key >= from) & (key < to), s, splat(-INF));
                store(at, s);
                most = select(s > most, s, most);
            }
            store(row_max + v, most);
        }
    }
    for (int64_t r = 0; r < rows; r++) row_max[r] = row_max[r] == -INF ? 0 : row_max[r];

    // So many keys at a time that their weights stay in the first cache from the exponential to the
    // values; a multiple of 16, so that a key keeps its lane of the sum.
    vec lanes[MAX_VECTORS][LaneSums::WIDTH] = {};
    const int64_t piece = std::max<int64_t>(16, 4096 / rows / 16 * 16);
    // keep(weights, i, last, weight) takes the weights of key i of a piece; then add_up takes all.
    const auto weigh = [&](auto keep, auto add_up) {
        for (int64_t j = 0; j < num_keys; j += piece) {
            const int64_t here = std::min(piece, num_keys - j);
            float *weights = scores + j * rows;
            for (int64_t v = 0; v < vectors; v++) {
                const vec most = load(row_max + v * LANES);
                for (int64_t i = 0; i < here; i++) {
                    const vec weight = exp(load(weights + i * rows + v * LANES) - most);
                    keep(weights + v * LANES, i, i + 1 == here, weight);
                    lanes[v][i % LaneSums::WIDTH] += weight;
                }
            }
            add_up(weights, j, here);
        }
    };
    // Adds n steps of values to all rows.
    const auto add_rows = [&](const float *weights, const auto *from, int64_t stride, int64_t steps,
                              bool first) {
        for (int64_t r = 0; r < n;) {
            const auto add = [&](auto count) {
                constexpr int R = decltype(count)::value;
                add_values<R, false>(weights + r, rows, from, stride, steps, out + r * width, width,
                                     first);
                r += R;
            };
            if (n - r > 4 && rows - r >= 6) add(std::integral_constant<int, 6>{});
            else if (n - r > 2) add(std::integral_constant<int, 4>{});
            else add(std::integral_constant<int, 2>{});
        }
    };
    if (a.dots) {
#ifdef QUORUM_DOTS
        if constexpr (std::is_same_v<T, bf16>) {
            thread_local std::vector<bf16_pair> pairs_buffer;
            const bf16_pair *pairs =
                pairs_of(tile_values, v_stride, num_keys, a.v_dim, width, pairs_buffer);
            vec even = {};
            weigh(
                [&](float *weights, int64_t i, bool last, vec weight) {
                    if (i % 2) store(weights + i / 2 * rows, pair_up(even, weight));
                    else if (last) store(weights + i / 2 * rows, pair_up(weight, vec{}));
                    even = weight;
                },
                [&](const float *weights, int64_t j, int64_t here) {
                    add_rows(weights, pairs + j * width, 2 * width, (here + 1) / 2, j == 0);
                });
        }
#endif
    } else {
        const float *values =
            block_of(tile_values, v_stride, num_keys, a.v_dim, width, values_buffer);
        weigh([&](float *weights, int64_t i, bool,
                  vec weight) { store(weights + i * rows, weight); },
              [&](const float *weights, int64_t j, int64_t here) {
                  add_rows(weights, values + j * v_stride, v_stride, here, j == 0);
              });
    }
    float row_sum[MAX_VECTORS * LANES];
    for (int64_t v = 0; v < vectors; v++) {
        for (int apart = LaneSums::WIDTH / 2; apart; apart /= 2)
            for (int i = 0; i < apart; i++) lanes[v][i] += lanes[v][i + apart];
        store(row_sum + v * LANES, lanes[v][0]);
    }
    int64_t index = (tile.partial + query_rows.first / groups) * a.heads + head * groups;
    int64_t g = query_rows.first % groups;
    for (int64_t r = 0; r < n; r++) {
        write_partial(a, index + g, out + r * width, row_max[r], row_sum[r]);
        if (++g == groups) index += a.heads, g = 0;
    }
}

// -- all query rows -------------------------------------------------------------------------------

// Partials of one key/value head of tiles [tile, end), all of the same queries.
template <class T>
void attend(const Attention<T> &a, int64_t head, const Tile *tile, const Tile *end,
            const NextKeys &next) {
    const int64_t rows = tile->num_queries * (a.heads / a.kv_heads);
    if (rows <= FEW_ROWS && a.dim % LANES == 0) {
        for (; tile < end; tile++) attend_few_rows<FEW_ROWS>(rows, a, head, *tile, next);
        return;
    }
    fetch(next.k, next.k_bytes, 0, 1);
    fetch(next.v, next.v_bytes, 0, 1);
    for (int64_t first = 0; first < rows; first += MAX_VECTORS * LANES) {
        const QueryRows query_rows = lay_out_queries(a, head, *tile, first);
        for (const Tile *each = tile; each < end; each++) attend_rows(a, head, *each, query_rows);
    }
}

template <class T>
void attend_tiles(const Attention<T> &a, const Tile *tiles, int64_t n, int64_t threads) {
    // Neighbours with the same queries and few keys make up one task.
    constexpr int64_t ENOUGH_KEYS = 128;
    thread_local std::vector<int64_t> storage;
    int64_t *starts = room(storage, n + 1), tasks = 0, keys = 0;
    for (int64_t i = 0; i < n; i++) {
        const bool same = i && tiles[i].query == tiles[i - 1].query &&
                          tiles[i].num_queries == tiles[i - 1].num_queries;
        if (!same || keys >= ENOUGH_KEYS) starts[tasks++] = i, keys = 0;
        keys += tiles[i].num_keys;
    }
    starts[tasks] = n;
    parallel(tasks * a.kv_heads, 1, threads, [&, starts](int64_t task) {
        const int64_t *range = starts + task / a.kv_heads;
        attend(a, task % a.kv_heads, tiles + range[0], tiles + range[1], {});
    });
}

// Every query's own keys, split by split; the partial of query t and split j is
// j * num_queries + t.
template <class T>
void attend_suffixes(const Attention<T> &a, const Suffixes &s, int64_t threads) {
    struct Suffix {
        int64_t row, start, keys, first;
    };
    const auto suffix_of = [&](int64_t partial) -> Suffix {
        const int64_t row = partial % s.num_queries, split = partial / s.num_queries;
        const int64_t start = split * s.max_split;
        const int64_t keys = std::clamp<int64_t>(s.length[row] - start, 0, s.max_split);
        return {row, start, keys, keys ? s.blocks[row * s.stride + split] : 0};
    };
    parallel_blocks(s.num_splits * s.num_queries, 8, threads, [&](int64_t first, int64_t last) {
        Suffix next = suffix_of(first);
        for (int64_t partial = first; partial < last; partial++) {
            const Suffix mine = next;
            if (partial + 1 < last) next = suffix_of(partial + 1);
            if (!mine.keys) {
                std::fill_n(a.lse + partial * a.heads, a.heads, -INF);
                continue;
            }
            const Tile tile = {
                mine.row, 1, mine.first, mine.keys, s.position[mine.row] + mine.start, partial};
            for (int64_t head = 0; head < a.kv_heads; head++) {
                const bool same = head + 1 < a.kv_heads;
                attend(a, head, &tile, &tile + 1,
                       NextKeys::of(a, same ? head + 1 : 0, same ? mine.first : next.first,
                                    same ? mine.keys : next.keys));
            }
        }
    });
}

// Merge of each query's partials index (T, J), -1 where there is none, in that order.
template <class T>
void merge(const float *o, const float *lse, const int64_t *index, int64_t queries, int64_t most,
           int64_t heads, int64_t v_dim, T *out, float *out_lse, int64_t threads) {
    parallel(queries, 8, threads, [&](int64_t t) {
        thread_local std::vector<float> storage;
        thread_local std::vector<int64_t> partials_storage;
        int64_t *partials = room(partials_storage, most), n = 0;
        for (int64_t j = 0; j < most; j++)
            if (index[t * most + j] >= 0) partials[n++] = index[t * most + j] * heads;
        float *weights = room(storage, heads * (n + 2)), *row_max = weights + n * heads;
        float *row_sum = row_max + heads;
        std::fill_n(row_max, heads, -INF);
        for (int64_t j = 0; j < n; j++)
            for (int64_t h = 0; h < heads; h++) {
                const float log = lse[partials[j] + h];
                row_max[h] = log > row_max[h] || log != log ? log : row_max[h];
            }
        for (int64_t h = 0; h < heads; h++) row_max[h] = row_max[h] == -INF ? 0 : row_max[h];
        std::fill_n(row_sum, heads, 0.0f);
        const auto weigh = [](vec log, vec most) { return exp(log - most); };
        for (int64_t j = 0; j < n; j++) {
            map_row(heads, weights + j * heads, weigh, lse + partials[j], row_max);
            for (int64_t h = 0; h < heads; h++) row_sum[h] += weights[j * heads + h];
        }
        for (int64_t h = 0; h < heads; h++) {
            const vec by = splat(row_sum[h] != 0 ? row_sum[h] : 1);
            T *to = out + (t * heads + h) * v_dim;
            // A partial of weight 0 may hold anything.
            const auto merged = [&](auto get) {
                vec sum = {};
                for (int64_t j = 0; j < n; j++) {
                    const float weight = weights[j * heads + h];
                    if (weight != 0)
                        sum = fma(splat(weight), get(o + (partials[j] + h) * v_dim), sum);
                }
                return sum / by;
            };
            int64_t c = 0;
            for (; c + LANES <= v_dim; c += LANES)
                store(to + c, merged([c](const float *x) { return load(x + c); }));
            if (const int64_t rest = v_dim - c)
                store_first(to + c, merged([&](const float *x) { return load_first(x + c, rest); }),
                            rest);
            out_lse[t * heads + h] = row_max[h] + log(row_sum[h]);
        }
    });
}

}  // namespace quorum
