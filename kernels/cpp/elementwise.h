// Norm, rotary embedding, gated activation, and the copy of keys and values into the cache.

#pragma once

#include "math.h"
#include "threads.h"

namespace quorum {

// y = norm(x) * weight, or with a residual `total` = x + residual and y = norm(total) * weight.
// weight: as float32.
template <class T>
void rms_norm_row(const T *x, const T *residual, const float *weight, T *y, T *total, int64_t size,
                  float eps, bool plus_one) {
    thread_local std::vector<float> storage;
    if (residual) {
        map_row(size, total, [](vec a, vec b) { return a + b; }, x, residual);
        x = total;
    }
    const float *s = widened(x, size, storage);
    const float rstd = 1 / std::sqrt(row_sum<true>(s, size) / size + eps);
    const vec scale = splat(rstd), one = splat(1);
    if (plus_one) map_row(size, y, [&](vec a, vec w) { return a * scale * (w + one); }, s, weight);
    else map_row(size, y, [&](vec a, vec w) { return a * scale * w; }, s, weight);
}

// x: (rows / inner, inner, size), strides x_t, x_a, 1; all else contiguous.
template <class T>
void rms_norm(const T *x, int64_t x_t, int64_t x_a, const T *residual, const T *weight, T *y,
              T *total, int64_t rows, int64_t inner, int64_t size, float eps, int64_t plus_one,
              int64_t threads) {
    std::vector<float> storage;
    const float *wide = widened(weight, size, storage);
    parallel(rows, std::max<int64_t>(1, 2048 / size), threads, [&](int64_t row) {
        const int64_t first = row * size;
        rms_norm_row(x + row / inner * x_t + row % inner * x_a,
                     residual ? residual + first : nullptr, wide, y + first, total + first, size,
                     eps, plus_one);
    });
}

// Turns one head of 2 * half channels; x and y may be the same.
template <class T>
void rope_head(const T *x, const float *cos, const float *sin, T *y, int64_t half) {
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const vec a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(y + i, a * c - b * s);
        store(y + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        const float a = widen(x[i]), b = widen(x[half + i]);
        narrow(a * cos[i] - b * sin[i], y + i);
        narrow(b * cos[i] + a * sin[i], y + half + i);
    }
}

// x: (tokens, heads, 2 * half), strides x_t, x_h, 1; cos, sin: (tokens, half); y contiguous.
template <class T>
void rope(const T *x, int64_t x_t, int64_t x_h, const float *cos, const float *sin, T *y,
          int64_t tokens, int64_t heads, int64_t half, int64_t threads) {
    parallel(tokens, std::max<int64_t>(1, 4096 / (heads * half)), threads, [&](int64_t t) {
        for (int64_t h = 0; h < heads; h++)
            rope_head(x + t * x_t + h * x_h, cos + t * half, sin + t * half,
                      y + (t * heads + h) * 2 * half, half);
    });
}

// Cosine and sine of an angle in radians, |angle| < 2^24. In float64, so that they round to
// float32 as the exact values do but for one in some hundred million.
inline void cos_sin(double angle, float *cos, float *sin) {
    const double quarter = angle * 0.63661977236758134308;  // 2 / pi
    const int64_t k = (int64_t)(quarter + (quarter < 0 ? -0.5 : 0.5));
    // pi / 2 in two parts, the first of 33 bits: its product with k is exact.
    double r = angle - (double)k * 1.57079632673412561417e+00;
    r -= (double)k * 6.07710050650619224932e-11;
    const double z = r * r;
    const double s =
        r + r * z *
                (-1.0 / 6 +
                 z * (1.0 / 120 +
                      z * (-1.0 / 5040 +
                           z * (1.0 / 362880 + z * (-1.0 / 39916800 +
                                                    z * (1.0 / 6227020800 - z / 1307674368000))))));
    const double c =
        1 - z / 2 +
        z * z *
            (1.0 / 24 +
             z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800 +
                                                       z * (1.0 / 479001600 - z / 87178291200)))));
    const bool swap = k & 1;
    *cos = (float)((k + 1) & 2 ? -(swap ? s : c) : (swap ? s : c));
    *sin = (float)(k & 2 ? -(swap ? c : s) : (swap ? c : s));
}
// cos, sin: (tokens, half) of the angles position * inv_freq, which are float32.
inline void rope_cos_sin(const int64_t *positions, const float *inv_freq, float *cos, float *sin,
                         int64_t tokens, int64_t half, int64_t threads) {
    parallel(tokens, 64, threads, [&](int64_t t) {
        for (int64_t i = 0; i < half; i++) {
            const float angle = (float)positions[t] * inv_freq[i];
            cos_sin(angle, cos + t * half + i, sin + t * half + i);
        }
    });
}

enum Activation : int64_t { NONE, SILU, GELU };

inline vec silu(vec x) { return x / (exp(-x) + splat(1)); }
inline vec gelu_tanh(vec x) {
    const vec z = fma(x * x, splat(0.044715f), splat(1)) * x;
    return (tanh(z * splat(0.79788456080286535588f)) + splat(1)) * x * splat(0.5f);  // sqrt(2 / pi)
}

// gate_up: (tokens, 2 * size), stride `stride`; y: (tokens, size) = act(gate) * up.
template <class T>
void gated_act(const T *gate_up, int64_t stride, T *y, int64_t tokens, int64_t size, int64_t gelu,
               int64_t threads) {
    constexpr int64_t PIECE = 512;
    const int64_t pieces = (size + PIECE - 1) / PIECE;
    parallel(tokens * pieces, 8, threads, [&](int64_t task) {
        const int64_t t = task / pieces, first = task % pieces * PIECE;
        const int64_t n = std::min(PIECE, size - first);
        const T *gate = gate_up + t * stride + first, *up = gate + size;
        if (gelu)
            map_row(
                n, y + t * size + first, [](vec a, vec b) { return gelu_tanh(a) * b; }, gate, up);
        else map_row(n, y + t * size + first, [](vec a, vec b) { return silu(a) * b; }, gate, up);
    });
}

// k_cache[h, slots[t]] = k[t, h], and v alike.
template <class T>
void write_kv(const T *k, int64_t k_t, int64_t k_h, const T *v, int64_t v_t, int64_t v_h,
              T *k_cache, int64_t kc_h, int64_t kc_n, T *v_cache, int64_t vc_h, int64_t vc_n,
              const int64_t *slots, int64_t tokens, int64_t heads, int64_t dim, int64_t v_dim,
              int64_t threads) {
    parallel(tokens, 64, threads, [&](int64_t t) {
        for (int64_t h = 0; h < heads; h++) {
            std::copy_n(k + t * k_t + h * k_h, dim, k_cache + h * kc_h + slots[t] * kc_n);
            std::copy_n(v + t * v_t + h * v_h, v_dim, v_cache + h * vc_h + slots[t] * vc_n);
        }
    });
}

}  // namespace quorum
