// AVX-512: 16 lanes, 32 registers.

#pragma once

#include <immintrin.h>

namespace quorum {

constexpr int LANES = 16;
constexpr int ROWS = 14;        // most rows of a tile of a linear layer: 2 accumulators each
constexpr int SCORE_TILE = 24;  // accumulators of the product of queries and keys
constexpr int MAX_VECTORS = 6;  // vectors of query rows that are taken together
constexpr int VALUE_VECTORS = 4;

typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef uint32_t uvec __attribute__((vector_size(64)));
constexpr ivec LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
inline vec splat(float x) { return _mm512_set1_ps(x); }

// a0 b0 a1 b1 ...: its first and its second half.
inline void interleave(vec a, vec b, vec &low, vec &high) {
    const ivec first = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    low = _mm512_permutex2var_ps(a, (__m512i)first, b);
    high = _mm512_permutex2var_ps(a, (__m512i)(first + 8), b);
}
// The first n <= LANES lanes.
inline void store_lanes(float *p, vec v, int64_t n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, v); }
inline vec load(const bf16 *p) {
    return (vec)((ivec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)) << 16);
}
inline void store(bf16 *p, vec v) {
    const ivec bits = (ivec)v;
    ivec upper = (ivec)((uvec)(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    upper = v == v ? upper : ivec{} + 0x7FC0;
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)upper));
}

// Dot products of bfloat16, in functions that say QUORUM_DOTS and run where `has_dots`: a lane is
// two numbers, and sum += a0 b0 + a1 b1. How it rounds is the processor's own affair.
#define QUORUM_DOTS [[gnu::target("avx512bf16")]]
QUORUM_DOTS inline vec add_dots(vec sum, vec a, vec b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
inline bool has_dots() { return __builtin_cpu_supports("avx512bf16"); }

}  // namespace quorum
