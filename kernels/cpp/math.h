// exp, log and tanh of vectors, and sums over a row: the same bits on every processor.
//
// Each function reduces its argument and evaluates a polynomial with fused multiply-adds; the
// polynomials are minimax fits whose own error is below a tenth of a unit in the last place.
// tests/spec/test_arithmetic.py walks every float32 and states the largest errors.
//
// A sum over a row has 16 virtual lanes: term i goes to lane i mod 16, in order, and the lanes are
// joined in a fixed tree (8 apart, then 4, 2, 1).

#pragma once

#include "simd.h"

namespace quorum {

inline vec polynomial(vec, float c) { return splat(c); }
// c0 + x (c1 + x (c2 + ...)).
template <class... C>
inline vec polynomial(vec x, float c, C... more) {
    return fma(polynomial(x, more...), x, splat(c));
}

inline vec exp(vec x) {
    // Results beyond these bounds are infinite or 0 anyway; a NaN passes both comparisons.
    x = select(x < splat(-104.0f), splat(-104.0f), x);
    x = select(x > splat(89.0f), splat(89.0f), x);
    // exp(x) = 2^n exp(r), |r| <= ln(2) / 2. Adding 1.5 * 2^23 rounds to an integer.
    const vec magic = splat(12582912.0f), shifted = fma(x, splat(0x1.715476p+0f), magic);
    const vec n = shifted - magic;
    vec r = fma(n, splat(-0x1.62e4p-1f), x);
    r = fma(n, splat(-0x1.7f7d1cp-20f), r);
    const vec tail = polynomial(r, 0.499999934127f, 0.166665201086f, 0.0416683941625f,
                                0.00836878034015f, 0.00138144693545f);
    const vec y = fma(r * r, tail, r) + splat(1.0f);
    // Two factors, since 2^n alone may be no normal number.
    const ivec power = (ivec)shifted - (ivec)magic, half = power >> 1;
    const uvec first = (uvec)(half + 127) << 23, second = (uvec)(power - half + 127) << 23;
    return y * (vec)first * (vec)second;
}

inline vec log(vec x) {
    const vec tiny = splat(0x1p-126f);
    const ivec is_small = x < tiny;
    const vec scaled = select(is_small, x * splat(0x1p23f), x);
    // x = 2^n m, sqrt(1/2) <= m < sqrt(2).
    const ivec bits = (ivec)scaled, exponent = (bits - 0x3F3504F3) >> 23;
    const vec f = (vec)((uvec)bits - ((uvec)exponent << 23)) - splat(1.0f);
    const vec n = __builtin_convertvector(exponent - (is_small & 23), vec);
    const vec square = f * f;
    vec y = polynomial(f, 0.33333310447f, -0.249999865764f, 0.2000222623f, -0.166692517774f,
                       0.142186653636f, -0.123843362695f, 0.118729165409f, -0.117898567101f,
                       0.0691555152522f);
    y = y * square * f;
    y = fma(n, splat(-2.12194440e-4f), y);
    y = fma(square, splat(-0.5f), y);
    y = fma(n, splat(0.693359375f), f + y);
    y = select(x == splat(INF), x, y);
    y = select(x == splat(0.0f), splat(-INF), y);
    return select(x >= splat(0.0f), y, splat(std::numeric_limits<float>::quiet_NaN()));
}

inline vec tanh(vec x) {
    const vec size = (vec)((ivec)x & 0x7FFFFFFF), square = x * x;
    const vec tail = polynomial(square, -0.333332839265f, 0.133314913127f, -0.0537434998676f,
                                0.0206505923516f, -0.00571705008397f);
    const vec small = fma(square * x, tail, x);
    // Beyond 10 the result is 1 and exp would be large for nothing.
    const vec bound = select(size > splat(10.0f), splat(10.0f), size);
    const vec large = splat(1.0f) - splat(2.0f) / (exp(bound + bound) + splat(1.0f));
    const vec with_sign = (vec)((ivec)large | ((ivec)x & (int32_t)0x80000000));
    return select(size < splat(0.625f), small, with_sign);
}

inline float log(float x) { return log(splat(x))[0]; }

// 16 running sums, lane by lane.
struct LaneSums {
    static constexpr int64_t WIDTH = 16;
    vec parts[WIDTH / LANES] = {};

    // The terms x(i), ..., x(i + LANES - 1) of a row, i a multiple of LANES.
    void add(int64_t i, vec x) { parts[i / LANES % (WIDTH / LANES)] += x; }
    void add_square(int64_t i, vec x) {
        vec &part = parts[i / LANES % (WIDTH / LANES)];
        part = fma(x, x, part);
    }
    float total() const {
        float lanes[WIDTH];
        for (int i = 0; i < WIDTH / LANES; i++) store(lanes + i * LANES, parts[i]);
        for (int apart = WIDTH / 2; apart; apart /= 2)
            for (int i = 0; i < apart; i++) lanes[i] += lanes[i + apart];
        return lanes[0];
    }
};

// Sums of n numbers and of their squares. Lanes past the end add 0, which changes nothing.
template <bool squared = false>
inline float row_sum(const float *x, int64_t n) {
    LaneSums sums;
    const auto add = [&](int64_t i, vec v) { squared ? sums.add_square(i, v) : sums.add(i, v); };
    int64_t i = 0;
    for (; i + LaneSums::WIDTH <= n; i += LaneSums::WIDTH)
        for (int j = 0; j < LaneSums::WIDTH; j += LANES) add(i + j, load(x + i + j));
    for (; i + LANES <= n; i += LANES) add(i, load(x + i));
    if (i < n) add(i, load_first(x + i, n - i));
    return sums.total();
}

}  // namespace quorum
