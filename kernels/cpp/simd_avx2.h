// AVX2 with FMA: 8 lanes, 16 registers.

#pragma once

#include <immintrin.h>

namespace quorum {

constexpr int LANES = 8;
constexpr int ROWS = 6;         // most rows of a tile of a linear layer: 2 accumulators each
constexpr int SCORE_TILE = 12;  // accumulators of the product of queries and keys
constexpr int MAX_VECTORS = 3;  // vectors of query rows that are taken together
constexpr int VALUE_VECTORS = 2;

typedef float vec __attribute__((vector_size(32)));
typedef int32_t ivec __attribute__((vector_size(32)));
typedef uint32_t uvec __attribute__((vector_size(32)));
constexpr ivec LANE = {0, 1, 2, 3, 4, 5, 6, 7};

inline vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
inline vec splat(float x) { return _mm256_set1_ps(x); }

// a0 b0 a1 b1 ...: its first and its second half.
inline void interleave(vec a, vec b, vec &low, vec &high) {
    const vec even = _mm256_unpacklo_ps(a, b), odd = _mm256_unpackhi_ps(a, b);
    low = _mm256_permute2f128_ps(even, odd, 0x20);
    high = _mm256_permute2f128_ps(even, odd, 0x31);
}
// The first n <= LANES lanes.
inline void store_lanes(float *p, vec v, int64_t n) {
    _mm256_maskstore_ps(p, (__m256i)(LANE < (int32_t)n), v);
}
inline vec load(const bf16 *p) {
    return (vec)((ivec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)) << 16);
}
inline void store(bf16 *p, vec v) {
    const ivec bits = (ivec)v;
    ivec upper = (ivec)((uvec)(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    upper = v == v ? upper : ivec{} + 0x7FC0;
    const __m256i packed = _mm256_packus_epi32((__m256i)upper, (__m256i)upper);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8)));
}

}  // namespace quorum
