// The decoder's forward over a cache, in one call: `Transformer.forward` is its definition.

#pragma once

#include "../kernels/cpp/attention.h"
#include "../kernels/cpp/interface.h"
#include "../kernels/cpp/linear.h"
#include "../kernels/cpp/moe.h"

namespace quorum {

// Weights of a layer: matrices packed, a null pointer for what the model does not have. gate_up and
// down are of the dense block, or where there are experts of the shared one. Caches:
// (kv_heads, cache_size, dim) and (kv_heads, cache_size, v_dim). chunks: (num_chunks, 6) int64:
// tiles, number of tiles, index, its columns, first and last query. cos, sin: tables by position.
// window, softcap 0: none. Of latent attention: to_latent, of_latent: a packed matrix for each head
// (`LatentAttention.absorbed`); values are the first v_dim channels of k_cache.
#define QUORUM_LAYER(F)                                                                            \
    F(const void *, input_norm) F(const void *, qkv) F(const void *, qkv_bias)                     \
    F(const void *, q_norm) F(const void *, k_norm) F(const void *, o)                             \
    F(const void *, post_attention_norm) F(const void *, pre_feedforward_norm)                     \
    F(const void *, post_feedforward_norm) F(const void *, gate_up) F(const void *, down)          \
    F(int64_t, intermediate) F(const Experts *, experts)                                           \
    F(const void *, q_b) F(const void *, q_a_norm) F(const void *, latent_norm)                    \
    F(const void *, to_latent) F(const void *, of_latent)                                          \
    F(void *, k_cache) F(void *, v_cache) F(const int64_t *, chunks) F(int64_t, num_chunks)        \
    F(const float *, cos) F(const float *, sin) F(int64_t, window) F(float, scale)                 \
    F(float, softcap)
QUORUM_STRUCT(Layer, QUORUM_LAYER);

// embedding_scale 0: none. dim, v_dim, kv_heads: of keys and values in the cache. Of latent
// attention, else 0: nope_dim, rope_dim: of a head's query; q_rank: of the latents of queries, 0 if
// they have none; out_dim: of a head's output.
#define QUORUM_DECODER(F)                                                                          \
    F(const void *, embedding) F(const void *, norm) F(const Layer *, layers)                      \
    F(int64_t, num_layers) F(int64_t, hidden) F(int64_t, heads) F(int64_t, kv_heads)               \
    F(int64_t, dim) F(int64_t, v_dim) F(int64_t, cache_size) F(int64_t, nope_dim)                  \
    F(int64_t, rope_dim) F(int64_t, q_rank) F(int64_t, out_dim) F(int64_t, plus_one)               \
    F(int64_t, gelu) F(float, eps) F(float, latent_eps) F(float, embedding_scale)
QUORUM_STRUCT(Decoder, QUORUM_DECODER);

// The hidden states (n, hidden) of n tokens after the final norm. suffixes: null where there are
// none. o, lse: room for partial results. Matrices are packed as W.
template <class T, class W>
void decode(const Decoder *decoder, const int64_t *tokens, int64_t n, const int64_t *positions,
            const int64_t *slots, const Suffixes *suffixes, float *o, float *lse, T *out,
            int64_t threads) {
    const Decoder &d = *decoder;
    const bool latent = d.rope_dim > 0;
    const int64_t q_size = d.heads * d.dim, attended_size = d.heads * d.v_dim;
    // What the first projection gives, and of latent attention the heads' queries and outputs.
    const int64_t head_dim = d.nope_dim + d.rope_dim, head_size = d.heads * head_dim;
    const int64_t qkv_size = latent ? (d.q_rank ? d.q_rank : head_size) + d.dim
                                    : q_size + d.kv_heads * (d.dim + d.v_dim);
    const int64_t out_size = latent ? d.heads * d.out_dim : 0;
    const int64_t half = (latent ? d.rope_dim : d.dim) / 2, stream = n * d.hidden;
    thread_local std::vector<T> scratch;
    thread_local std::vector<float> lse_scratch, weight_scratch;
    thread_local RowTiles<W> row_tiles;
    float *merged_lse = room(lse_scratch, n * d.heads);
    int64_t intermediate = 0;
    bool has_experts = false;
    for (int64_t i = 0; i < d.num_layers; i++) {
        intermediate = std::max(intermediate, d.layers[i].intermediate);
        has_experts |= d.layers[i].experts != nullptr;
    }
    // Two residual streams, since a norm reads one while it writes the other.
    const int64_t streams = has_experts ? 4 : 3;
    const int64_t wide = qkv_size + q_size + attended_size + intermediate + head_size + out_size;
    T *hidden = room(scratch, streams * stream + n * wide), *next = hidden + stream;
    T *update = next + stream, *normed = update + stream;
    T *qkv = hidden + streams * stream, *q = qkv + n * qkv_size;
    T *attended = q + n * q_size, *active = attended + n * attended_size;
    T *head_q = active + n * intermediate, *head_out = head_q + n * head_size;

    const auto norm_update = [&](const void *weight) {
        rms_norm<T>(update, d.hidden, d.hidden, nullptr, (const T *)weight, update, nullptr, n, 1,
                    d.hidden, d.eps, d.plus_one, threads);
    };
    // hidden = hidden + update, and its norm is given row by row to `to`.
    const auto add_and_norm = [&](const void *weight, bool first, auto to) {
        const float *w = widened((const T *)weight, d.hidden, weight_scratch);
        to([&, w](int64_t t, T *y) {
            const T *old = hidden + t * d.hidden;
            rms_norm_row(first ? old : update + t * d.hidden, first ? nullptr : old, w, y,
                         next + t * d.hidden, d.hidden, d.eps, d.plus_one);
        });
        if (!first) std::swap(hidden, next);
    };
    // Rows of k numbers, which make_row(t, y) writes, go into row_tiles.
    const auto tile_made = [&](int64_t k, auto make_row) {
        row_tiles.resize(n, k);
        const int64_t tile = row_tiles.tile;
        row_tiles.fill(
            [&](int64_t t) {
                thread_local std::vector<T> rows;
                T *y = room(rows, ROWS * k) + t % tile * k;
                make_row(t, y);
                return (const T *)y;
            },
            threads);
    };
    const auto tile_norm = [&](const void *weight, bool first = false) {
        add_and_norm(weight, first, [&](auto norm_row) { tile_made(d.hidden, norm_row); });
    };
    const auto norm_rows = [&](const void *weight, T *y) {
        add_and_norm(weight, false, [&](auto norm_row) {
            parallel(n, 16, threads, [&](int64_t t) { norm_row(t, y + t * d.hidden); });
        });
    };
    const auto tile_rows = [&](const T *x, int64_t k) {
        row_tiles.resize(n, k);
        row_tiles.fill([&](int64_t t) { return x + t * k; }, threads);
    };
    // The block of rows in row_tiles, given to `out`.
    const auto feed_forward = [&](const Layer &layer, T *out) {
        linear<W, T>(row_tiles, (const W *)layer.gate_up, layer.intermediate, nullptr, active, threads,
                  d.gelu ? GELU : SILU);
        tile_rows(active, layer.intermediate);
        linear<W, T>(row_tiles, (const W *)layer.down, d.hidden, nullptr, out, threads);
    };
    // Norms and turns the heads of queries and keys; keys and values go into the cache.
    const auto turn_and_write = [&](const Layer &layer) {
        std::vector<float> q_wide, k_wide;
        const T *q_norm = (const T *)layer.q_norm, *k_norm = (const T *)layer.k_norm;
        const float *q_weight = q_norm ? widened(q_norm, d.dim, q_wide) : nullptr;
        const float *k_weight = k_norm ? widened(k_norm, d.dim, k_wide) : nullptr;
        parallel(n, std::max<int64_t>(1, 4096 / qkv_size), threads, [&](int64_t t) {
            const float *c = layer.cos + positions[t] * half, *s = layer.sin + positions[t] * half;
            const T *x = qkv + t * qkv_size;
            const auto turn = [&](const float *weight, T *y) {
                if (weight)
                    rms_norm_row<T>(x, nullptr, weight, y, nullptr, d.dim, d.eps, d.plus_one);
                rope_head<T>(weight ? y : x, c, s, y, half);
                x += d.dim;
            };
            for (int64_t h = 0; h < d.heads; h++) turn(q_weight, q + t * q_size + h * d.dim);
            for (int64_t h = 0; h < d.kv_heads; h++)
                turn(k_weight, (T *)layer.k_cache + (h * d.cache_size + slots[t]) * d.dim);
            for (int64_t h = 0; h < d.kv_heads; h++, x += d.v_dim)
                std::copy_n(x, d.v_dim,
                            (T *)layer.v_cache + (h * d.cache_size + slots[t]) * d.v_dim);
        });
    };

    // The same with latent attention: a query goes over to the latents, head by head.
    const auto turn_and_write_latent = [&](const Layer &layer) {
        const T *heads_q = qkv;
        int64_t q_t = qkv_size, rest = head_size;
        if (d.q_rank) {
            const float *w = widened((const T *)layer.q_a_norm, d.q_rank, weight_scratch);
            tile_made(d.q_rank, [&, w](int64_t t, T *y) {
                rms_norm_row<T>(qkv + t * qkv_size, nullptr, w, y, nullptr, d.q_rank, d.latent_eps,
                                0);
            });
            linear<W, T>(row_tiles, (const W *)layer.q_b, head_size, nullptr, head_q, threads);
            heads_q = head_q, q_t = head_size, rest = d.q_rank;
        }
        const float *w = widened((const T *)layer.latent_norm, d.v_dim, weight_scratch);
        parallel(n, std::max<int64_t>(1, 4096 / qkv_size), threads, [&](int64_t t) {
            const float *c = layer.cos + positions[t] * half, *s = layer.sin + positions[t] * half;
            for (int64_t h = 0; h < d.heads; h++)
                rope_head<T>(heads_q + t * q_t + h * head_dim + d.nope_dim, c, s,
                             q + t * q_size + h * d.dim + d.v_dim, half);
            const T *x = qkv + t * qkv_size + rest;
            T *cell = (T *)layer.k_cache + slots[t] * d.dim;
            rms_norm_row<T>(x, nullptr, w, cell, nullptr, d.v_dim, d.latent_eps, 0);
            rope_head<T>(x + d.v_dim, c, s, cell + d.v_dim, half);
        });
        const auto to_latent = [&](int64_t h) {
            return Product<T, W>{n, (const W *)layer.to_latent + h * packed_size(d.v_dim, d.nope_dim),
                              q + h * d.dim, q_size};
        };
        const auto query = [&](int64_t h, int64_t t) { return heads_q + t * q_t + h * head_dim; };
        linear_many<T, W>(d.heads, d.nope_dim, d.v_dim, to_latent, query, threads);
    };

    const T *table = (const T *)d.embedding;
    parallel(n, 16, threads, [&](int64_t t) {
        const T *from = table + tokens[t] * d.hidden;
        T *to = hidden + t * d.hidden;
        if (d.embedding_scale > 0)
            map_row(d.hidden, to, [&](vec x) { return x * splat(d.embedding_scale); }, from);
        else std::copy_n(from, d.hidden, to);
    });
    for (int64_t i = 0; i < d.num_layers; i++) {
        const Layer &layer = d.layers[i];
        tile_norm(layer.input_norm, i == 0);
        linear(row_tiles, (const W *)layer.qkv, qkv_size, (const T *)layer.qkv_bias, qkv, threads);
        if (latent) turn_and_write_latent(layer);
        else turn_and_write(layer);
        const T *k_cache = (const T *)layer.k_cache, *v_cache = (const T *)layer.v_cache;
        const int64_t v_n = latent ? d.dim : d.v_dim;
        const int64_t k_h = d.cache_size * d.dim, v_h = d.cache_size * v_n;
        const Attention<T> a(AttentionArguments{
            q, k_cache, v_cache, q_size, d.dim, k_h, d.dim, v_h, v_n, d.heads, d.kv_heads,
            d.dim, d.v_dim, positions, layer.scale, layer.softcap, layer.window, o, lse}, IN_PAIRS<W>);
        if (suffixes) attend_suffixes(a, *suffixes, threads);
        for (int64_t c = 0; c < layer.num_chunks; c++) {
            const int64_t *chunk = layer.chunks + c * 6, start = chunk[4];
            attend_tiles(a, (const Tile *)chunk[0], chunk[1], threads);
            merge(o, lse, (const int64_t *)chunk[2], chunk[5] - start, chunk[3], d.heads, d.v_dim,
                  attended + start * attended_size, merged_lse + start * d.heads, threads);
        }
        if (latent) {
            const auto of_latent = [&](int64_t h) {
                return Product<T, W>{
                    n, (const W *)layer.of_latent + h * packed_size(d.out_dim, d.v_dim),
                    head_out + h * d.out_dim, out_size};
            };
            const auto mixed = [&](int64_t h, int64_t t) {
                return attended + t * attended_size + h * d.v_dim;
            };
            linear_many<T, W>(d.heads, d.v_dim, d.out_dim, of_latent, mixed, threads);
            tile_rows(head_out, out_size);
        } else {
            tile_rows(attended, attended_size);
        }
        linear<W, T>(row_tiles, (const W *)layer.o, d.hidden, nullptr, update, threads);
        const void *norm = layer.post_attention_norm;
        if (layer.pre_feedforward_norm) {
            norm_update(norm);
            norm = layer.pre_feedforward_norm;
        }
        if (layer.experts) {
            norm_rows(norm, normed);
            mix_experts<W>(*layer.experts, normed, n, d.hidden, d.gelu, update, threads);
            if (layer.gate_up) {
                tile_rows(normed, d.hidden);
                feed_forward(layer, normed);
                parallel(n, 16, threads, [&](int64_t t) {
                    T *y = update + t * d.hidden;
                    map_row(d.hidden, y, [](vec a, vec b) { return a + b; }, y,
                            normed + t * d.hidden);
                });
            }
        } else {
            tile_norm(norm);
            feed_forward(layer, update);
        }
        if (layer.post_feedforward_norm) norm_update(layer.post_feedforward_norm);
    }
    norm_rows(d.norm, out);
}

}  // namespace quorum
