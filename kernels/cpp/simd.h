// Vectors of float32, and what an instruction set does better than the compiler's own vectors.
//
// A lane of a vector is a row, a key or a channel, never a term of a sum, so the width of a vector
// changes no result. One fused multiply-add is one rounding on every processor; -ffp-contract=off
// keeps every other multiplication and addition apart. bfloat16 is widened on loading and rounded
// to nearest even on storing.
//
// Each instruction set gives LANES, `fma`, `splat`, `interleave`, `store_first`, bfloat16's `load`
// and `store`, and the sizes of register tiles.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace quorum {

constexpr float INF = std::numeric_limits<float>::infinity();

struct bf16 {
    uint16_t bits;
};
// bfloat16 laid out for dot products: the terms of a sum in pairs.
struct bf16_pair {
    uint16_t bits;
};
template <class W>
constexpr bool IN_PAIRS = std::is_same_v<W, bf16_pair>;
template <class W>
constexpr int64_t STEP_TERMS = IN_PAIRS<W> ? 2 : 1;  // terms that are added at once

template <class V, class T>
inline V read(const T *p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

}  // namespace quorum

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "simd_avx2.h"
#elif defined(__ARM_NEON)
#include "simd_neon.h"
#else
#error "this needs AVX-512, AVX2 with FMA, or NEON"
#endif

namespace quorum {

inline vec load(const float *p) { return read<vec>(p); }
inline void store(float *p, vec v) { std::memcpy(p, &v, sizeof v); }
inline vec select(ivec mask, vec yes, vec no) { return mask ? yes : no; }

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    const uint32_t bits = (uint32_t)x.bits << 16;
    return read<float>(&bits);
}
inline void narrow(float x, float *p) { *p = x; }
inline void narrow(float x, bf16 *p) {
    const uint32_t bits = read<uint32_t>(&x);
    p->bits = x == x ? (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 : 0x7FC0;
}

// The first n < LANES numbers of a row; the other lanes are 0.
template <class T>
inline vec load_first(const T *p, int64_t n) {
    float lanes[LANES] = {};
    for (int64_t i = 0; i < n; i++) lanes[i] = widen(p[i]);
    return load(lanes);
}
template <class T>
inline void store_first(T *p, vec v, int64_t n) {
    float lanes[LANES];
    store(lanes, v);
    for (int64_t i = 0; i < n; i++) narrow(lanes[i], p + i);
}

// y[i] = f(x[i], ...) for n numbers of each row, a vector at a time.
template <class T, class F, class... X>
inline void map_row(int64_t n, T *y, F f, const X *...x) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(y + i, f(load(x + i)...));
    if (i < n) store_first(y + i, f(load_first(x + i, n - i)...), n - i);
}
template <class T>
inline void widen_row(const T *x, float *y, int64_t n) {
    map_row(n, y, [](vec a) { return a; }, x);
}
template <class T>
inline void narrow_row(const float *x, T *y, int64_t n) {
    map_row(n, y, [](vec a) { return a; }, x);
}

// Row i of x becomes its column i.
inline void transpose(vec (&x)[LANES]) {
    for (int round = 1; round < LANES; round *= 2) {
        vec y[LANES];
        for (int i = 0; i < LANES / 2; i++)
            interleave(x[i], x[i + LANES / 2], y[2 * i], y[2 * i + 1]);
        for (int i = 0; i < LANES; i++) x[i] = y[i];
    }
}

// Scratch that a thread keeps: at least n elements of any content, from the start of a cache line
// on, so that no vector lies in two lines.
template <class T>
inline T *room(std::vector<T> &storage, int64_t n) {
    constexpr int64_t LINE = 64;
    if ((int64_t)storage.size() < n + LINE) storage.resize(n + LINE);
    return (T *)(((uintptr_t)storage.data() + LINE - 1) / LINE * LINE);
}

// n numbers of a row as float32: the row itself, or a copy.
inline const float *widened(const float *x, int64_t, std::vector<float> &) { return x; }
inline const float *widened(const bf16 *x, int64_t n, std::vector<float> &to) {
    float *wide = room(to, n);
    widen_row(x, wide, n);
    return wide;
}

// to[i * stride + r] = row(r)[i], for n <= LANES rows of k numbers.
template <class F>
void lay_out(F row, int64_t n, int64_t k, float *to, int64_t stride) {
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
        vec block[LANES];
        for (int r = 0; r < LANES; r++) block[r] = r < n ? load(row(r) + i) : vec{};
        transpose(block);
        for (int j = 0; j < LANES; j++) store_lanes(to + (i + j) * stride, block[j], n);
    }
    using T = std::remove_cvref_t<decltype(*row(0))>;
    for (; i < k; i++)
        for (int64_t r = 0; r < n; r++) to[i * stride + r] = widen(read<T>(row(r) + i));
}

}  // namespace quorum
