// Gradients of forest attention: those of queries, keys and values from those of its output.
//
//     P = exp(S - lse)    dS = P (dO V^T - delta), times the soft-cap's slope
//     dQ = scale dS K     dK = dS^T (scale Q)     dV = P^T dO
//
// A task is a key/value head, whose gradients nobody else writes. It takes one work tile after the
// other, and of its query rows as many as fit into vectors. A key adds query rows in order, a query
// adds the sums over tiles in order: the same bits on every processor.

#pragma once

#include "attention.h"

namespace quorum {

// d_o (T, heads, v_dim) with its strides, lse and delta (T, heads); tiles (num_tiles, 5) as
// kernels/forest_attention/plan.py has them. Results in float32: d_q (T, heads, dim), and d_k and
// d_v (kv_heads, cells, their channels rounded up to whole vectors), which begin as zeros.
#define QUORUM_GRADIENTS(F)                                                                        \
    F(const void *, d_o) F(int64_t, o_t) F(int64_t, o_h) F(const float *, lse)                     \
    F(const float *, delta) F(const int64_t *, tiles) F(int64_t, num_tiles) F(int64_t, cells)      \
    F(float *, d_q) F(float *, d_k) F(float *, d_v)
QUORUM_STRUCT(Gradients, QUORUM_GRADIENTS);

// n rows times a factor, as they are, `width` apart, and laid out as (dim, rows).
template <class T>
void both_layouts(const T *const *from, int64_t n, int64_t dim, float factor, float *by_row,
                  int64_t width, float *by_channel, int64_t rows) {
    const vec by = splat(factor);
    for (int64_t r = 0; r < n; r++) {
        map_row(dim, by_row + r * width, [by](vec x) { return x * by; }, from[r]);
        std::fill(by_row + r * width + dim, by_row + (r + 1) * width, 0.0f);
    }
    if (n < rows) std::fill_n(by_channel, dim * rows, 0.0f);
    for (int64_t v = 0; v < n; v += LANES)
        lay_out([&](int64_t r) { return by_row + (v + r) * width; },
                std::min<int64_t>(n - v, LANES), dim, by_channel + v, rows);
}

// out (n, width) += the sums over m rows (m, width) with weights: (n, rows) if `by_row`, and then
// row i of out takes row i of them; else (m, rows). Without `by_row` out is overwritten.
template <bool by_row>
void add_rows(const float *weights, int64_t rows, int64_t n, const float *values, int64_t stride,
              int64_t m, float *out, int64_t width) {
    for (int64_t i = 0; i < n;) {
        const auto add = [&](auto count) {
            constexpr int R = decltype(count)::value;
            add_values<R, by_row>(weights + (by_row ? i * rows : i), rows, values, stride, m,
                                  out + i * width, width, !by_row);
            i += R;
        };
        if (n - i >= 6) add(std::integral_constant<int, 6>{});
        else if (n - i >= 2) add(std::integral_constant<int, 2>{});
        else add(std::integral_constant<int, 1>{});
    }
}

template <class T>
void attend_backward(const AttentionArguments *arguments, const Gradients *gradients,
                     int64_t threads) {
    const Attention<T> a(*arguments);
    const Gradients &g = *gradients;
    const int64_t groups = a.heads / a.kv_heads, most = MAX_VECTORS * LANES;
    const int64_t k_width = whole_vectors(a.dim), v_width = whole_vectors(a.v_dim);
    parallel(a.kv_heads, 1, threads, [&](int64_t head) {
        thread_local std::vector<float> keys_buffer, values_buffer, rows_buffer, scores_buffer;
        float *q = room(rows_buffer, most * (2 * k_width + 2 * v_width + k_width));
        float *q_by_channel = q + most * k_width, *d_o = q_by_channel + most * k_width;
        float *d_o_by_channel = d_o + most * v_width, *sums = d_o_by_channel + most * v_width;
        for (int64_t i = 0; i < g.num_tiles; i++) {
            const int64_t *t = g.tiles + 5 * i;
            const Tile tile = {t[0], t[1], t[2], t[3], t[4], 0};
            const int64_t num_keys = tile.num_keys, all = tile.num_queries * groups;
            int64_t k_stride = a.k_n, v_stride = a.v_n;
            const float *keys = block_of(a.k + head * a.k_h + tile.key * a.k_n, k_stride, num_keys,
                                         a.dim, k_width, keys_buffer);
            const float *values = block_of(a.v + head * a.v_h + tile.key * a.v_n, v_stride,
                                           num_keys, a.v_dim, v_width, values_buffer);
            float *weights = room(scores_buffer, 2 * num_keys * most);
            for (int64_t first = 0; first < all; first += most) {
                const int64_t n = std::min(all - first, most);
                int64_t vectors = (n + LANES - 1) / LANES;
                if (vectors == 5) vectors = 6;
                const int64_t rows = vectors * LANES;
                float *slopes = weights + num_keys * rows;
                const T *q_rows[MAX_VECTORS * LANES], *d_o_rows[MAX_VECTORS * LANES];
                float *d_q_rows[MAX_VECTORS * LANES];
                float lse[MAX_VECTORS * LANES] = {}, delta[MAX_VECTORS * LANES] = {};
                float largest[MAX_VECTORS * LANES] = {};
                int32_t low[MAX_VECTORS * LANES] = {}, high[MAX_VECTORS * LANES] = {};
                for (int64_t r = 0; r < n; r++) {
                    const int64_t query = tile.query + (first + r) / groups;
                    const int64_t h = head * groups + (first + r) % groups;
                    q_rows[r] = a.q + query * a.q_t + h * a.q_h;
                    d_o_rows[r] = (const T *)g.d_o + query * g.o_t + h * g.o_h;
                    d_q_rows[r] = g.d_q + (query * a.heads + h) * a.dim;
                    lse[r] = g.lse[query * a.heads + h];
                    delta[r] = g.delta[query * a.heads + h];
                    visible_keys(a, tile, a.positions[query], low[r], high[r]);
                }
                both_layouts(q_rows, n, a.dim, a.scale, q, k_width, q_by_channel, rows);
                both_layouts(d_o_rows, n, a.v_dim, 1.0f, d_o, v_width, d_o_by_channel, rows);
                scores_of(vectors, q_by_channel, keys, k_stride, num_keys, a.dim, weights,
                            largest);
                scores_of(vectors, d_o_by_channel, values, v_stride, num_keys, a.v_dim, slopes,
                            largest);
                for (int64_t v = 0; v < rows; v += LANES) {
                    const ivec from = read<ivec>(low + v), to = read<ivec>(high + v);
                    const vec own_lse = load(lse + v), own_delta = load(delta + v);
                    for (int64_t j = 0; j < num_keys; j++) {
                        float *weight = weights + j * rows + v, *slope = slopes + j * rows + v;
                        vec s = load(weight), cap_slope = splat(1.0f);
                        if (a.softcap > 0) {
                            const vec capped = tanh(s / splat(a.softcap));
                            cap_slope = splat(1.0f) - capped * capped;
                            s = capped * splat(a.softcap);
                        }
                        const ivec key = ivec{} + (int32_t)j, seen = (key >= from) & (key < to);
                        const vec p = exp(s - own_lse);
                        const vec d_s = p * (load(slope) - own_delta) * cap_slope;
                        store(weight, select(seen, p, vec{}));
                        store(slope, select(seen, d_s, vec{}));
                    }
                }
                add_rows<false>(slopes, rows, n, keys, k_stride, num_keys, sums, k_width);
                const vec scale = splat(a.scale);
                for (int64_t r = 0; r < n; r++)
                    map_row(a.dim, d_q_rows[r], [=](vec x, vec y) { return fma(y, scale, x); },
                            d_q_rows[r], sums + r * k_width);
                const int64_t cell = head * g.cells + tile.key;
                add_rows<true>(slopes, rows, num_keys, q, k_width, n, g.d_k + cell * k_width,
                               k_width);
                add_rows<true>(weights, rows, num_keys, d_o, v_width, n, g.d_v + cell * v_width,
                               v_width);
            }
        }
    });
}

}  // namespace quorum
