// NEON on 64-bit ARM: 4 lanes, 32 registers.

#pragma once

#include <arm_neon.h>

namespace quorum {

constexpr int LANES = 4;
constexpr int ROWS = 12;        // most rows of a tile of a linear layer: 2 accumulators each
constexpr int SCORE_TILE = 24;  // accumulators of the product of queries and keys
constexpr int MAX_VECTORS = 6;  // vectors of query rows that are taken together
constexpr int VALUE_VECTORS = 4;

typedef float vec __attribute__((vector_size(16)));
typedef int32_t ivec __attribute__((vector_size(16)));
typedef uint32_t uvec __attribute__((vector_size(16)));
constexpr ivec LANE = {0, 1, 2, 3};

inline vec fma(vec a, vec b, vec c) {
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
inline vec splat(float x) { return (vec)vdupq_n_f32(x); }

// a0 b0 a1 b1 ...: its first and its second half.
inline void interleave(vec a, vec b, vec &low, vec &high) {
    low = (vec)vzip1q_f32((float32x4_t)a, (float32x4_t)b);
    high = (vec)vzip2q_f32((float32x4_t)a, (float32x4_t)b);
}
// The first n <= LANES lanes.
inline void store_lanes(float *p, vec v, int64_t n) { std::memcpy(p, &v, n * sizeof(float)); }
inline vec load(const bf16 *p) { return (vec)vshll_n_u16(vld1_u16((const uint16_t *)p), 16); }
inline void store(bf16 *p, vec v) {
    const ivec bits = (ivec)v;
    ivec upper = (ivec)((uvec)(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    upper = v == v ? upper : ivec{} + 0x7FC0;
    vst1_u16((uint16_t *)p, vmovn_u32((uint32x4_t)upper));
}

}  // namespace quorum
